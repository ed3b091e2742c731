"""The Hugging Face Trainer for batches of any mixture of modalities."""
