"""LLaVA with one patch embed per MRI modality in front of a Hugging Face vision encoder.

Importing this package registers the model with Hugging Face's Auto classes.
"""

from importlib.metadata import version as _version

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from umbrella_model.activation_checkpointing import checkpoint_parts
from umbrella_model.backbone import UmbrellaModel
from umbrella_model.config import PatchEmbedConfig, UmbrellaConfig
from umbrella_model.lora import LoraSettings, merge_lora
from umbrella_model.modeling import UmbrellaCausalLMOutput, UmbrellaForConditionalGeneration
from umbrella_model.own_encoder import OwnEncoderConfig
from umbrella_model.packing import pack_batch
from umbrella_model.patch_embed import SeriesPatchEmbed, VolumePatchEmbed
from umbrella_model.supervision import supervised_index
from umbrella_model.trainable import parameter_groups, parameter_table, set_trainable
from umbrella_model.vision_encoder import load_vision_encoder

__version__ = _version("umbrella-model")

AutoConfig.register(UmbrellaConfig.model_type, UmbrellaConfig, exist_ok=True)
AutoConfig.register(OwnEncoderConfig.model_type, OwnEncoderConfig, exist_ok=True)
AutoModel.register(UmbrellaConfig, UmbrellaModel, exist_ok=True)
AutoModelForImageTextToText.register(UmbrellaConfig, UmbrellaForConditionalGeneration, exist_ok=True)

__all__ = [
    "LoraSettings",
    "OwnEncoderConfig",
    "PatchEmbedConfig",
    "SeriesPatchEmbed",
    "UmbrellaCausalLMOutput",
    "UmbrellaConfig",
    "UmbrellaForConditionalGeneration",
    "UmbrellaModel",
    "VolumePatchEmbed",
    "checkpoint_parts",
    "load_vision_encoder",
    "merge_lora",
    "pack_batch",
    "parameter_groups",
    "parameter_table",
    "set_trainable",
    "supervised_index",
]
