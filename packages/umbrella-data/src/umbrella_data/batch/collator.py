"""Collate examples: text padded to the longest row, volumes stacked by modality, a modality tag at each position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from umbrella_data.batch.example import Example, ExampleScan
from umbrella_data.chat.layout import IGNORE_INDEX
from umbrella_data.memory.shared_pool import stack


class PaddingCollator:
    """Builds the dict of model inputs.

    Args:
        pad_token_id: Padding of `input_ids`: `tokenizer.pad_token_id`. For a tokenizer without one (GPT-2, Llama) set
            `tokenizer.pad_token = tokenizer.eos_token`; padding has no loss.
        modality_order: Names of the modalities: tag 0 is text, i + 1 the i-th of these.
        padding_side: `right` for training, `left` for generation.

    Raises:
        ValueError: If `modality_order` names a modality twice, `padding_side` is unknown, or `pad_token_id` is None.
    """

    def __init__(self, *, pad_token_id: int, modality_order: Sequence[str], padding_side: str = "right") -> None:
        if pad_token_id is None:  # attributes of tokenizers are not typed
            raise ValueError("pad_token_id is None: the tokenizer has no padding token; set tokenizer.pad_token = "
                             "tokenizer.eos_token, and pass tokenizer.pad_token_id")  # fmt: skip
        if len(set(modality_order)) < len(modality_order):
            raise ValueError(f"modality_order {list(modality_order)} names a modality twice; remove one")
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side is {padding_side!r}; it must be 'right' or 'left'")
        self.pad_token_id = pad_token_id
        self.modality_order = tuple(modality_order)
        self.padding_side = padding_side
        self._tags = {modality: tag for tag, modality in enumerate(modality_order, start=1)}

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Collate examples.

        Returns:
            `input_ids`, `attention_mask`, `labels` and `modality_ids`, each (B, L) int64, and `pixel_values`:
            {modality: (N_m, C, X, Y, Z) or (N_m, C, X, Y, Z, T)} with the modalities of this batch as keys.

        Raises:
            ValueError: If scans do not match their positions in the text, or two scans of a modality differ in shape.
        """
        if not examples:
            raise ValueError("the batch is empty; pass at least one example")
        shape = (len(examples), max(len(example.input_ids) for example in examples))
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        modality_ids = torch.zeros(shape, dtype=torch.int64)
        for row, example in enumerate(examples):
            length = len(example.input_ids)
            first = 0 if self.padding_side == "right" else shape[1] - length
            place = slice(first, first + length)
            input_ids[row, place] = example.input_ids
            labels[row, place] = example.labels
            attention_mask[row, place] = 1
            modality_ids[row, place] = self._tag(example)
        pixel_values = self._stack([scan for example in examples for scan in example.scans])
        _check_image_tokens(input_ids, modality_ids, attention_mask)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "modality_ids": modality_ids,
            "pixel_values": pixel_values,
        }

    def _tag(self, example: Example) -> torch.Tensor:
        """The modality tag of each position: (L,) int64."""
        length = len(example.input_ids)
        if len(example.labels) != length:
            raise ValueError(f"example {example.index} has {length} input_ids but {len(example.labels)} labels")
        tags = torch.zeros(length, dtype=torch.int64)
        end = 0
        for scan in example.scans:
            if scan.modality not in self._tags:
                raise ValueError(f"example {example.index} has a {scan.modality} scan, but modality_order is "
                                 f"{', '.join(self.modality_order) or 'empty'}; add {scan.modality}")  # fmt: skip
            stop = scan.start + scan.num_tokens
            if scan.start < end or scan.num_tokens < 1 or stop > length:
                raise ValueError(f"example {example.index}: the {scan.modality} scan has positions {scan.start} to "
                                 f"{stop - 1}, but only positions {end} to {length - 1} are free")  # fmt: skip
            tags[scan.start : stop] = self._tags[scan.modality]
            end = stop
        return tags

    def _stack(self, scans: Sequence[ExampleScan]) -> dict[str, torch.Tensor]:
        stacked: dict[str, torch.Tensor] = {}
        for modality in self.modality_order:
            chosen = [scan for scan in scans if scan.modality == modality]
            if not chosen:
                continue
            for name, values in (
                ("shapes", {tuple(scan.volume.shape) for scan in chosen}),
                ("numbers of tokens", {scan.num_tokens for scan in chosen}),
            ):
                if len(values) > 1:
                    raise ValueError(f"{modality} scans of one batch differ in {name}: {sorted(values)}; use the same "
                                     "pipeline and model size for all")  # fmt: skip
            stacked[modality] = stack([scan.volume for scan in chosen])
        return stacked


def _check_image_tokens(input_ids: torch.Tensor, modality_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
    """Check that every position of a scan holds the image token, and no other position does."""
    is_scan = modality_ids > 0
    if not is_scan.any():
        return
    tokens = torch.unique(input_ids[is_scan])
    if len(tokens) > 1:
        raise ValueError(f"positions of scans hold the tokens {tokens.tolist()}; all must be the model's image token")
    num_tokens = int(((input_ids == tokens[0]) & (attention_mask == 1)).sum())
    num_positions = int(is_scan.sum())
    if num_tokens != num_positions:
        raise ValueError(f"the text holds {num_tokens} image tokens, but its scans have {num_positions} positions; "
                         "check image_token_id and num_image_tokens")  # fmt: skip
