"""Examples, and their collation into a padded batch with modality tags."""
