"""From checked voxels to the tensor that the model sees: grid, normalisation, augmentation."""
