"""Conversations to tokens and labels, by the chat template of a tokenizer."""
