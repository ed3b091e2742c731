from .batch.collator import PaddingCollator
from .cache.store import VolumeCache
from .chat.encoder import ChatEncoder, encode_conversation, encode_prompt
from .dataset.bad_scans import BadScanList
from .dataset.conversation import ConversationDataset, Example, ExampleScan
from .dataset.interleave import InterleaveDataset
from .dataset.sampler import ModalityBatchSampler
from .errors import CacheError, ManifestError, ScanError, ScanReason, UmbrellaDataError
from .manifest.hf_export import to_hf_dataset
from .manifest.manifest import Manifest, read_manifest
from .manifest.sample import Answer, Sample, Scan, Turn
from .modality import MODALITIES, ModalitySpec, find_modality
from .pipeline.config import AugmentConfig, PipelineConfig
from .pipeline.pipeline import Pipeline
from .scan.volume import Volume, load_volume

__version__: str

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
