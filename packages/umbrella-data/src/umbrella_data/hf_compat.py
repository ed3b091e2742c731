"""Private names of torch that this package uses; nothing else in it may use one."""

from __future__ import annotations

from typing import Any

import torch

# As `__torch_function__` of a subclass of Tensor: results of operations are plain tensors.
PLAIN_RESULTS: Any = torch._C._disabled_torch_function_impl
