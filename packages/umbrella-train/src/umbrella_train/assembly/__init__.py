"""Model, tokenizer and data of a run, built from its configuration."""
