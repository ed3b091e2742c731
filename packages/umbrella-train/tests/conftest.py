"""Shared fixtures: a toy model with its trainer, and a tiny cohort on disk with its config."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2Config, SiglipVisionConfig, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from umbrella_data import Example, ExampleScan, PaddingCollator, progress
from umbrella_data.synthetic.cohort import DemoCohort, make_demo_cohort
from umbrella_model import PatchEmbedConfig, UmbrellaConfig, UmbrellaForConditionalGeneration
from umbrella_train.batches.collators import SupervisedCollator
from umbrella_train.config import DummyLossConfig, RunConfig
from umbrella_train.trainer.trainer import UmbrellaTrainer

# For models this small threads cost more than they save.
torch.set_num_threads(1)

VOCABULARY, IMAGE_TOKEN, PADDING = 64, 63, 0
# Not alphabetical, so that a sorted table is noticed.
ORDER = ("rsfMRI", "T1", "dMRI")
PATCH_EMBEDS = {
    "rsfMRI": PatchEmbedConfig((8, 8, 4, 4), (4, 4, 4, 2)),
    "T1": PatchEmbedConfig((8, 8, 8), (4, 4, 4)),
    "dMRI": PatchEmbedConfig((8, 8, 8), (4, 4, 8), in_channels=2),
}
Kind = tuple[str, ...]


@pytest.fixture(autouse=True)
def _restore_output(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What commands set for their process: which messages are shown, and whether progress is."""
    monkeypatch.setattr(progress, "_is_shown", True)
    loggers = [logging.getLogger(name) for name in ("umbrella_train", "umbrella_model")]
    before = [(logger.level, logger.handlers) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)  # an assignment would not reset what the loggers below have cached
        logger.handlers = handlers


@pytest.fixture
def make_model() -> Callable[..., UmbrellaForConditionalGeneration]:
    """A model of two layers, the same at every call."""
    return build_model


def build_model() -> UmbrellaForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"num_key_value_heads": 1, "vocab_size": VOCABULARY, "initializer_range": 0.2}
    return UmbrellaForConditionalGeneration(
        UmbrellaConfig(
            modalities={name: PATCH_EMBEDS[name] for name in ORDER},
            vision_config=SiglipVisionConfig(**sizes),
            text_config=Qwen2Config(**sizes, **words),
            image_token_index=IMAGE_TOKEN,
        )
    )


@pytest.fixture
def make_example() -> Callable[..., Example]:
    """An example with these scans, random by its index."""
    return build_example


def build_example(kind: Sequence[str], index: int) -> Example:
    generator = torch.Generator().manual_seed(index)

    def words(count: int) -> Tensor:
        return torch.randint(1, IMAGE_TOKEN, (count,), generator=generator)

    pieces, scans, position = [words(2)], [], 2
    for name in kind:
        config = PATCH_EMBEDS[name]
        volume = torch.randn(config.in_channels, *config.image_size, generator=generator)
        scans.append(ExampleScan(name, volume, start=position, num_tokens=config.num_patches))
        pieces += [torch.full((config.num_patches,), IMAGE_TOKEN), words(1)]
        position += config.num_patches + 1
    # Answers of different lengths: a mean over samples is not the mean over tokens.
    answer = words(2 + index % 4)
    labels = torch.full((position + len(answer),), -100)
    labels[position:] = answer
    return Example(input_ids=torch.cat([*pieces, answer]), labels=labels, scans=tuple(scans), index=index)


@pytest.fixture
def collate() -> PaddingCollator:
    """The collator for the model."""
    return PaddingCollator(pad_token_id=PADDING, modality_order=list(ORDER))


class ToyDataset(Dataset[Example]):
    """Examples with given scans, in given batches."""

    def __init__(self, batches: Sequence[Sequence[Kind]]) -> None:
        self.kinds = [kind for batch in batches for kind in batch]
        ends = [sum(len(batch) for batch in batches[:count]) for count in range(len(batches) + 1)]
        self.batches = [list(range(*pair)) for pair in itertools.pairwise(ends)]

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> Example:
        return build_example(self.kinds[index], index)


class ToyTrainer(UmbrellaTrainer):
    """Uses the batches of its data sets in their order; `given` are the arguments that it was built with."""

    given: TrainingArguments

    def _build_loader(self, dataset: Any, batch_size: int, *, shuffle: bool) -> DataLoader[Any]:
        return DataLoader(dataset, batch_sampler=dataset.batches, collate_fn=self.data_collator)


@dataclass
class Trained:
    """Results of a short training.

    Attributes:
        trainer: With the model in its last state.
        gradients: Of every parameter, before each optimizer step; None without one.
        before: The parameters before the first step.
        log: The lines of the log with a loss.
    """

    trainer: ToyTrainer
    gradients: list[dict[str, Tensor | None]]
    before: dict[str, Tensor]
    log: list[dict[str, float]]

    def norm(self, modality: str, *, step: int = 0, part: str = "") -> float | None:
        """Norm of all gradients of a modality's patch embed (or of a part of it), None without gradients."""
        start = f"vision_tower.{modality}_patch_embed.{part}"
        found = [gradient for name, gradient in self.gradients[step].items() if start in name]
        assert found, start
        if all(gradient is None for gradient in found):
            return None
        return float(torch.cat([gradient.double().flatten() for gradient in found if gradient is not None]).norm())


class GradientCapture(TrainerCallback):
    """Copies the gradients just before each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor | None]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(
            {
                name: None if parameter.grad is None else parameter.grad.detach().clone()
                for name, parameter in kwargs["model"].named_parameters()
            }
        )


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., ToyTrainer]:
    """A trainer over given batches, not yet started."""

    def make(
        batches: Sequence[Sequence[Kind]] = (),
        *,
        evaluation: Sequence[Sequence[Kind]] = (),
        dummy_loss: Mapping[str, Any] | None = None,
        model: UmbrellaForConditionalGeneration | None = None,
        part_learning_rates: Mapping[Any, float] | None = None,
        engine: Any = "ddp",
        gradient_scale: Any = "mean",
        packing: bool = False,
        callbacks: Sequence[TrainerCallback] = (),
        on_non_finite: Any = "stop",
        max_skipped_steps: int = 10,
        batches_are: Any = "by_modality",
        compute_metrics: Any = None,
        **arguments: Any,
    ) -> ToyTrainer:
        settings = {
            "learning_rate": 0.05,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "num_train_epochs": 1,
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "logging_nan_inf_filter": False,
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
        }
        given = TrainingArguments(output_dir=str(tmp_path / "trainer"), **(settings | arguments))
        trainer = ToyTrainer(
            model=model or build_model(),
            args=given,
            train_dataset=ToyDataset(batches),
            eval_dataset=ToyDataset(evaluation),
            data_collator=SupervisedCollator(pad_token_id=PADDING, modality_order=list(ORDER)),
            dummy_loss=DummyLossConfig(**(dummy_loss or {})),
            part_learning_rates=part_learning_rates,
            engine=engine,
            gradient_scale=gradient_scale,
            packing=packing,
            callbacks=callbacks,
            on_non_finite=on_non_finite,
            max_skipped_steps=max_skipped_steps,
            batches=batches_are,
            compute_metrics=compute_metrics,
        )
        trainer.given = given
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make


@pytest.fixture
def train_batches(make_trainer: Callable[..., ToyTrainer]) -> Callable[..., Trained]:
    """Trains on given batches, such as `[[("T1",), ()], [("T1", "dMRI")]]`, and keeps every gradient."""

    def run(batches: Sequence[Sequence[Kind]], **options: Any) -> Trained:
        trainer = make_trainer(batches, **options)
        capture = GradientCapture()
        trainer.add_callback(capture)
        before = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
        trainer.train()
        log = [row for row in trainer.state.log_history if "loss" in row]
        return Trained(trainer, capture.steps, before, log)

    return run


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> DemoCohort:
    """Six subjects to train on and two held out, each with a scan of each modality, on disk."""
    return make_demo_cohort(tmp_path_factory.mktemp("cohort"), num_train=6, num_test=2, seed=0)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache of prepared scans."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def make_config(cohort: DemoCohort, cache_dir: Path) -> Callable[..., RunConfig]:
    """A run on the cohort with dropout; keywords replace entries of its sections."""

    def make(output_dir: Path, **sections: Mapping[str, Any]) -> RunConfig:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        content: dict[str, dict[str, Any]] = {
            "model": {
                "vision_config": {"model_type": "siglip_vision_model", **sizes, "vision_use_head": False},
                "text_config": {
                    "model_type": "qwen2",
                    **sizes,
                    "num_key_value_heads": 1,
                    "attention_dropout": 0.1,
                    "max_position_embeddings": 512,
                },
                "vision_feature_layer": -1,
                "modalities": {
                    "rsfMRI": {"image_size": [8, 8, 8, 8], "patch_size": [8, 8, 4, 4]},
                    "T1": {"image_size": [16, 16, 16], "patch_size": [8, 8, 8]},
                    "dMRI": {"image_size": [8, 8, 8], "patch_size": [8, 8, 2]},
                },
            },
            "data": {
                "train": [{"manifest": str(cohort.train_manifest)}],
                "evaluation": [{"manifest": str(cohort.test_manifest)}],
                "cache_dir": str(cache_dir),
            },
            "trainer": {
                "max_steps": 4,
                "per_device_train_batch_size": 3,
                "per_device_eval_batch_size": 4,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "use_cpu": True,
            },
            "report": {"enabled": False, "pictures": False, "controls": False, "max_new_tokens": 2},
        }
        for name, entries in sections.items():
            content[name] = {**content.get(name, {}), **entries}
        return RunConfig.model_validate({"name": "run", "output_dir": output_dir, **content})

    return make
