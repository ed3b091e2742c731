"""Vision encoders that are modules of one's own, given to the model or registered by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

ENCODER_GROUP = "umbrella_model.vision_encoders"
# What a module may raise on tokens that it is not made for.
_CALL_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# The model also runs the encoder on one zero token.
_LENGTHS = (2, 1, 5)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class OwnEncoderConfig(PretrainedConfig):
    """The `vision_config` of a model whose vision encoder is a module of one's own.

    Attributes:
        hidden_size: Width of a token; None to find it when the module is built.
        encoder: Name in the entry point group `umbrella_model.vision_encoders` of a callable that returns the module;
            None if the module is given to `from_pretrained`.
        options: Keyword arguments of the callable.
    """

    model_type = "umbrella_vision_encoder"

    hidden_size: int | None = None
    encoder: str | None = None
    options: dict[str, Any] | None = None


def build_own_encoder(config: OwnEncoderConfig) -> nn.Module:
    """Builds the module that is registered under the name in the config, and sets `hidden_size` of the config.

    Raises:
        ValueError: There is no name, the name is not registered, or the module does not map tokens to tokens.
    """
    if config.encoder is None:
        raise ValueError(
            "the vision encoder is a module of your own, which the config does not describe; pass it: "
            "from_pretrained(folder, vision_encoder=module)"
        )
    registered = {entry.name: entry for entry in entry_points(group=ENCODER_GROUP)}
    if config.encoder not in registered:
        raise ValueError(
            f"vision encoder {config.encoder!r} is not registered in the entry point group {ENCODER_GROUP!r} of an "
            f"installed package (registered: {', '.join(sorted(registered)) or 'none'}); install the package, or pass "
            "the module: from_pretrained(folder, vision_encoder=module)"
        )
    # Loading builds models on the meta device, where the module's own buffers would have no values.
    with torch.device("cpu"):
        module = registered[config.encoder].load()(**(config.options or {}))
        if not isinstance(module, nn.Module):
            raise ValueError(f"vision encoder {config.encoder!r} is a {type(module).__name__}, not a torch module")
        width = token_width(module)
    if config.hidden_size not in (None, width):
        raise ValueError(f"vision encoder {config.encoder!r} has width {width}; hidden_size is {config.hidden_size}")
    config.hidden_size = width
    return module


def token_width(module: nn.Module) -> int:
    """Width D of a module that maps tokens of shape (N, L, D) to (N, L, D).

    It is the module's `hidden_size`, `embed_dim` or `d_model`, otherwise the one size of a parameter on which the
    module works.

    Raises:
        ValueError: The width is not known, or the module does not map tokens of several lengths to tokens.
    """
    if shared := _shared_tensors(module):
        raise ValueError(
            f"vision encoder {type(module).__name__!r} has parameters under several names ({', '.join(shared)}), which "
            "would not be saved; give each one name"
        )
    for name in ("hidden_size", "embed_dim", "d_model"):
        width = getattr(module, name, None)
        if isinstance(width, int):
            check_token_encoder(module, hidden_size=width)
            return width
    sizes = sorted({size for parameter in module.parameters() for size in parameter.shape})
    problems = {size: _problem(module, size, lengths=_LENGTHS[:1]) for size in sizes}
    widths = [size for size, problem in problems.items() if problem is None]
    if len(widths) != 1:
        found = f"it works with {widths}" if widths else f"it works with none of {sizes}"
        last = next(reversed(problems.values())) if problems and not widths else None
        raise ValueError(
            f"vision encoder {type(module).__name__!r}: the width of its tokens is not known, {found}"
            f"{f' ({last})' if last else ''}; set its attribute hidden_size. A module must map tokens (N, L, D) to "
            "(N, L, D)"
        )
    check_token_encoder(module, hidden_size=widths[0])
    return widths[0]


def check_token_encoder(module: nn.Module, *, hidden_size: int, lengths: Collection[int] = _LENGTHS) -> None:
    """Runs a module on tokens of each length, in eval mode.

    Args:
        module: The module; its modes are restored.
        hidden_size: Width D of a token.
        lengths: Numbers of tokens, for example the `num_patches` of the modalities.

    Raises:
        ValueError: The module fails, returns anything but one tensor of the shape of its input, or the features of a
            scan depend on the other scans of the batch, in training at least.
    """
    problem = _problem(module, hidden_size, lengths=lengths)
    if problem is None and any(isinstance(part, _BATCH_NORMS) for part in module.modules()):
        problem = "has batch normalisation, which mixes the scans of a batch in training (LayerNorm does not)"
    if problem is not None:
        raise ValueError(
            f"vision encoder {type(module).__name__!r} {problem}; a module must map tokens (N, L, {hidden_size}) to "
            f"(N, L, {hidden_size}) for every N and L"
        )


def _shared_tensors(module: nn.Module) -> list[str]:
    """Names of parameters that have another name before."""
    first = {name for name, _ in module.named_parameters()}
    return [name for name, _ in module.named_parameters(remove_duplicate=False) if name not in first]


@torch.no_grad()
def _problem(module: nn.Module, width: int, *, lengths: Collection[int]) -> str | None:
    like = next(module.parameters(), torch.empty(0))
    # A model is built on the meta device, where what a module makes in its forward would be too.
    with _eval_mode(module), torch.device(like.device):
        for length in lengths:
            shape = (2, length, width)
            # Fixed values, so that the state of the random number generator does not change.
            tokens = torch.arange(2 * length * width, dtype=torch.float32).mul(0.7).sin().reshape(shape).to(like)
            try:
                output, first = module(tokens), module(tokens[:1])
            except _CALL_ERRORS as error:
                return f"fails on tokens of shape {shape}: {error}"
            for value, expected in ((output, shape), (first, (1, length, width))):
                if not isinstance(value, Tensor):
                    return f"returns a {type(value).__name__} on tokens of shape {shape}, not one tensor"
                if tuple(value.shape) != expected:
                    return f"returns shape {tuple(value.shape)} on tokens of shape {expected}"
            scale = first.float().abs().max()
            if (output[:1].float() - first.float()).abs().max() > 0.05 * scale:
                return "mixes the scans of a batch (its attention may need batch_first=True)"
    return None


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
