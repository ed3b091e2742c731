"""Previews of preprocessed scans: figures, and an HTML page of them."""
