"""The configuration of a run: schema, strict YAML, overrides. Imports no torch."""

from umbrella_train.config.data import DataConfig, DatasetConfig, SyntheticConfig
from umbrella_train.config.loading import demo_config_path, dump_config, load_config
from umbrella_train.config.model import LearnConfig, ModalityModelConfig, ModelConfig
from umbrella_train.config.problems import ConfigError
from umbrella_train.config.run_config import RunConfig, StageConfig
from umbrella_train.config.stages import stage_configs
from umbrella_train.config.training import DummyLossConfig, ReportConfig, TrainerConfig

__all__ = [
    "ConfigError",
    "DataConfig",
    "DatasetConfig",
    "DummyLossConfig",
    "LearnConfig",
    "ModalityModelConfig",
    "ModelConfig",
    "ReportConfig",
    "RunConfig",
    "StageConfig",
    "SyntheticConfig",
    "TrainerConfig",
    "demo_config_path",
    "dump_config",
    "load_config",
    "stage_configs",
]
