"""From a BIDS folder of real scans to a trained model that reloads to equal logits, by the commands of a user."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

import umbrella_train
from umbrella_data.cli import main as umbrella_data
from umbrella_model import UmbrellaForConditionalGeneration
from umbrella_train.config import load_config
from umbrella_train.run import training as run
from umbrella_train.trainer.trainer import UmbrellaTrainer

pytestmark = pytest.mark.timeout(600)

NUM_STEPS = 30
BIDS_SMALL = Path(umbrella_train.__file__).parent / "configs" / "bids_small.yaml"


@dataclass
class TrainedRun:
    """A finished run with its trainer."""

    folder: Path
    trainer: UmbrellaTrainer
    steps: list[dict[str, Any]]


@pytest.fixture(scope="module")
def manifests(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifests")
    # No series of this tree is of rest.
    assert umbrella_data(["from-bids", str(real_data), "--out", str(folder), "--task", "*"]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(real_data: Path, manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """The shipped configuration for a BIDS folder, shortened to 30 steps; every step is logged."""
    scratch = tmp_path_factory.mktemp("real-run")
    overrides = {
        "output-dir": scratch,
        "data.train.0.manifest": manifests / "train.jsonl",
        "data.train.0.data-root": real_data,
        "data.evaluation.0.manifest": manifests / "test.jsonl",
        "data.evaluation.0.data-root": real_data,
        "data.cache-dir": scratch / "cache",
        "trainer.max-steps": NUM_STEPS,
        "trainer.warmup-steps": 3,
        "trainer.logging-steps": 1,
        "trainer.save-steps": NUM_STEPS,
        "trainer.eval-steps": NUM_STEPS,
        "trainer.use-cpu": "true",
    }
    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    trainers: list[UmbrellaTrainer] = []

    class RememberedTrainer(UmbrellaTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            trainers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "UmbrellaTrainer", RememberedTrainer)
        folder = run.train(load_config(BIDS_SMALL, words))
    assert folder is not None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return TrainedRun(folder, trainers[0], [line for line in lines if "loss" in line])


def _active(step: dict[str, Any]) -> set[str]:
    labels = {key.split("[")[1].split("]")[0] for key in step if key.startswith("grad/")}
    return labels - {"inactive"}


def test_every_readable_scan_has_a_row_and_no_subject_is_in_two_splits(manifests: Path, real_data: Path) -> None:
    splits = {
        name: [json.loads(line) for line in (manifests / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    }
    subjects = {name: {row["subject"] for row in rows} for name, rows in splits.items()}
    assert not subjects["train"] & subjects["test"]
    paths = {
        part["path"]
        for rows in splits.values()
        for row in rows
        for part in row["messages"][0]["content"]
        if part["type"] == "image"
    }
    scans = {
        str(path.relative_to(real_data))
        for suffix in ("T1w", "bold", "dwi")
        for path in real_data.glob(f"sub-*/*/*_{suffix}.nii*")
    }
    unreadable = scans - paths
    # The voxels of both runs start at a byte that their headers do not name.
    assert all("sub-nt01" in path and "bold" in path for path in unreadable)
    assert paths <= scans
    assert len(paths) >= 36


def test_one_run_has_batches_of_each_modality(trained: TrainedRun) -> None:
    assert [line["step"] for line in trained.steps] == list(range(1, NUM_STEPS + 1))
    active = [_active(step) for step in trained.steps]
    assert all(len(modalities) == 1 for modalities in active)
    assert set.union(*active) == {"T1", "rsfMRI", "dMRI"}


def test_loss_is_finite_and_decreases(trained: TrainedRun) -> None:
    losses = [step["loss"] for step in trained.steps]
    assert all(math.isfinite(loss) for loss in losses)
    assert mean(losses[-5:]) < 0.7 * mean(losses[:5])


def test_reloaded_checkpoint_has_equal_logits(trained: TrainedRun) -> None:
    model = trained.trainer.accelerator.unwrap_model(trained.trainer.model).eval()
    # Neither of the two subjects with rsfMRI is held out: training batches are added to those of the evaluation.
    batches = list(trained.trainer.get_eval_dataloader())
    for batch in trained.trainer.get_train_dataloader():
        if not {name for seen in batches for name in seen["pixel_values"]} >= set(batch["pixel_values"]):
            batches.append(batch)
    assert {name for batch in batches for name in batch["pixel_values"]} == {"T1", "rsfMRI", "dMRI"}
    for saved in (trained.folder / f"checkpoint-{NUM_STEPS}", trained.folder / "model"):
        reloaded = UmbrellaForConditionalGeneration.from_pretrained(saved).eval()
        assert reloaded.config.modality_order == model.config.modality_order
        for batch in batches:
            # Without it the model computes the logits at all positions.
            batch.pop("supervised_index", None)
            with torch.no_grad():
                expected, found = model(**batch).logits, reloaded(**batch).logits
            assert torch.equal(expected, found)


def test_no_file_of_the_run_names_a_subject(trained: TrainedRun, manifests: Path) -> None:
    rows = [
        json.loads(line)
        for name in ("train.jsonl", "test.jsonl")
        for line in (manifests / name).read_text().splitlines()
    ]
    subjects = {row["subject"].removeprefix("sub-") for row in rows}
    written = [
        path
        for path in trained.folder.rglob("*")
        if path.suffix in (".html", ".jsonl", ".json", ".svg", ".txt") and path.name != "names.jsonl"
    ]
    assert {"metrics.jsonl", "predictions.jsonl", "report.html"} <= {path.name for path in written}
    for path in written:
        # Four letters may be in a picture's base64 by chance.
        text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", path.read_text(encoding="utf-8"))
        assert not [name for name in subjects if name in text], path
