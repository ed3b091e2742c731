"""Files: atomic writes, paths of scans, memory-mapped arrays, processing in parallel."""
