"""Private names of torch that this package uses; nothing else in it may use one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

PRIVATE_NAMES: Mapping[str, tuple[str, ...]] = {"torch._C:_disabled_torch_function_impl": ()}
"""`module:name` or `module:Class.name` of each, with the parameters that are relied on."""

# As `__torch_function__` of a subclass of Tensor: results of operations are plain tensors.
PLAIN_RESULTS: Any = torch._C._disabled_torch_function_impl
