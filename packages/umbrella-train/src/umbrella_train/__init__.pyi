from .config import load_config
from .dummy_loss.loss import DummyLoss
from .run.evaluation import evaluate_run
from .run.stages import train_stages
from .run.training import train
from .trainer.trainer import UmbrellaTrainer

__version__: str

__all__ = ["DummyLoss", "UmbrellaTrainer", "evaluate_run", "load_config", "train", "train_stages"]
