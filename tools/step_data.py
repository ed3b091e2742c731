"""Samples and batches of `bench_step.py`."""

from __future__ import annotations

import argparse
import random

import torch
from torch import Tensor, nn

from step_models import FILL, Batch
from umbrella_model import UmbrellaForConditionalGeneration, pack_batch, supervised_index

NUM_WORDS, NUM_SUPERVISED = 100, 24


def make_sample(model: UmbrellaForConditionalGeneration, modality: str, *, num_words: int, seed: int) -> Batch:
    """One conversation with a scan and words, on the host; the last `NUM_SUPERVISED` words are supervised."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = model.num_image_tokens(modality)
    words = torch.randint(1, model.config.text_config.vocab_size - 1, (num_words,), generator=generator)
    image = torch.full((num_tokens,), model.config.image_token_id)
    tag = list(model.config.patch_embeds).index(modality) + 1
    config = model.config.patch_embeds[modality]
    return {
        "modality": modality,
        "input_ids": torch.cat([words[:4], image, words[4:]]),
        "modality_ids": torch.cat([torch.zeros(4), torch.full((num_tokens,), tag), torch.zeros(num_words - 4)]).long(),
        "labels": torch.cat([torch.full((num_tokens + num_words - NUM_SUPERVISED,), -100), words[-NUM_SUPERVISED:]]),
        "volume": torch.randn(config.in_channels, *config.image_size, generator=generator),
    }


def collate(samples: list[Batch], options: argparse.Namespace, *, packed: bool = False) -> Batch:
    """A padded or packed batch on the device."""
    batch: Batch = {}
    for key, value in (("input_ids", FILL), ("modality_ids", 0), ("labels", -100)):
        rows = [sample[key] for sample in samples]
        batch[key] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    batch["supervised_index"] = supervised_index(batch["labels"])
    names = dict.fromkeys(sample["modality"] for sample in samples)
    volumes = {n: torch.stack([s["volume"] for s in samples if s["modality"] == n]) for n in names}
    batch["pixel_values"] = volumes
    if packed:
        batch = pack_batch(batch)
    dtype = getattr(torch, options.dtype)
    moved = {key: value.to(options.device) for key, value in batch.items() if isinstance(value, Tensor)}
    pixel_values = {name: volume.to(options.device, dtype) for name, volume in volumes.items()}
    return {**batch, **moved, "pixel_values": pixel_values}


def scans_in_order(batch: Batch, model: UmbrellaForConditionalGeneration) -> list[Tensor]:
    """Each sample's scan, (1, X, Y, Z[, T]), of a padded batch with one scan per sample."""
    remaining = {name: iter(volumes) for name, volumes in batch["pixel_values"].items()}
    names = list(model.config.patch_embeds)
    return [next(remaining[names[int(tag) - 1]]) for tag in batch["modality_ids"].amax(dim=1)]


def within_budget(samples: list[Batch], budget: int, *, is_padded: bool) -> list[list[Batch]]:
    """Groups consecutive samples to batches of at most `budget` computed tokens."""
    groups: list[list[Batch]] = [[]]
    for sample in samples:
        lengths = [len(other["input_ids"]) for other in [*groups[-1], sample]]
        cost = max(lengths) * len(lengths) if is_padded else sum(lengths)
        if groups[-1] and cost > budget:
            groups.append([])
        groups[-1].append(sample)
    return groups


def mixed_samples(model: UmbrellaForConditionalGeneration, options: argparse.Namespace) -> list[Batch]:
    """Shuffled samples of 250 (216 + 34) to 2,344 (1,728 + 616) tokens, a share of them with a series."""
    generator = random.Random(0)
    num_series = round(options.pool * options.series_share)
    modalities = ["rsfMRI"] * num_series + ["T1"] * (options.pool - num_series)
    generator.shuffle(modalities)
    return [
        make_sample(model, modality, num_words=generator.randint(34, 616), seed=i)
        for i, modality in enumerate(modalities)
    ]


def batch_plans(samples: list[Batch], options: argparse.Namespace) -> dict[str, list[Batch]]:
    """All samples once: in random batches of 8, and by length and packed with an equal number of tokens per batch."""
    budget = 8 * sum(len(sample["input_ids"]) for sample in samples) // len(samples)
    by_length = sorted(samples, key=lambda sample: len(sample["input_ids"]))
    return {
        "random batches of 8": [collate(samples[i : i + 8], options) for i in range(0, len(samples), 8)],
        "by length": [collate(group, options) for group in within_budget(by_length, budget, is_padded=True)],
        "packed": [collate(group, options, packed=True) for group in within_budget(samples, budget, is_padded=False)],
    }
