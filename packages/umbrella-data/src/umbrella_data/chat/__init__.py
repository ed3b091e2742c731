"""Chat templates, and the encoding of conversations into tokens and labels."""
