"""Reading and writing files safely: atomic writes, regular files, mapped arrays, scan file names."""
