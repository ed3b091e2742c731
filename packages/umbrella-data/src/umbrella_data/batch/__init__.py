"""From examples to a padded batch with modality tags."""
