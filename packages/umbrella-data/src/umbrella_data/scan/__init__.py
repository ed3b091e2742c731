"""One scan on disk to checked voxels in RAS+."""
