"""Strict reading of brain scans, conversations about them, and modality-tagged batches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from umbrella_data.augment import AugmentConfig
    from umbrella_data.bad_scans import BadScanList
    from umbrella_data.cache import VolumeCache
    from umbrella_data.chat import ChatEncoder, encode_conversation, encode_prompt
    from umbrella_data.collator import PaddingCollator
    from umbrella_data.dataset import ConversationDataset, Example, ExampleScan
    from umbrella_data.errors import CacheError, ManifestError, ScanError, ScanReason, UmbrellaDataError
    from umbrella_data.hf_export import to_hf_dataset
    from umbrella_data.interleave import InterleaveDataset
    from umbrella_data.manifest import Answer, Manifest, Sample, Scan, Turn, read_manifest
    from umbrella_data.modality import MODALITIES, ModalitySpec, find_modality
    from umbrella_data.sampler import ModalityBatchSampler
    from umbrella_data.transforms import Pipeline, PipelineConfig
    from umbrella_data.volume import Volume, load_volume

# Names are imported on first use: the commands print their help without loading torch.
_HOME = {
    "AugmentConfig": "augment",
    "ChatEncoder": "chat",
    "encode_conversation": "chat",
    "encode_prompt": "chat",
    "PaddingCollator": "collator",
    "ConversationDataset": "dataset",
    "Example": "dataset",
    "ExampleScan": "dataset",
    "CacheError": "errors",
    "ManifestError": "errors",
    "ScanError": "errors",
    "ScanReason": "errors",
    "UmbrellaDataError": "errors",
    "InterleaveDataset": "interleave",
    "BadScanList": "bad_scans",
    "to_hf_dataset": "hf_export",
    "VolumeCache": "cache",
    "Answer": "manifest",
    "Manifest": "manifest",
    "Sample": "manifest",
    "Scan": "manifest",
    "Turn": "manifest",
    "read_manifest": "manifest",
    "MODALITIES": "modality",
    "ModalitySpec": "modality",
    "find_modality": "modality",
    "ModalityBatchSampler": "sampler",
    "Pipeline": "transforms",
    "PipelineConfig": "transforms",
    "Volume": "volume",
    "load_volume": "volume",
}

__all__ = [
    "MODALITIES",
    "Answer",
    "AugmentConfig",
    "BadScanList",
    "CacheError",
    "ChatEncoder",
    "ConversationDataset",
    "Example",
    "ExampleScan",
    "InterleaveDataset",
    "Manifest",
    "ManifestError",
    "ModalityBatchSampler",
    "ModalitySpec",
    "PaddingCollator",
    "Pipeline",
    "PipelineConfig",
    "Sample",
    "Scan",
    "ScanError",
    "ScanReason",
    "Turn",
    "UmbrellaDataError",
    "Volume",
    "VolumeCache",
    "encode_conversation",
    "encode_prompt",
    "find_modality",
    "load_volume",
    "read_manifest",
    "to_hf_dataset",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
