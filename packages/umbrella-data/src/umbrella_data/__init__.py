"""Strict reading of brain scans, conversations about them, and modality-tagged batches."""

from importlib.metadata import version as _version

import lazy_loader

# Names are listed in __init__.pyi and imported on first use: the commands print their help without loading torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = _version("umbrella-data")
