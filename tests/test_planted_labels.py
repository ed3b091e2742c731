"""Figures of a trained model on labels with a known relation to the scans: learnable, random, noisy, and not seen."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from umbrella_train import load_config, train
from umbrella_train.run.evaluation import evaluate_run

NUM_TRAIN, NUM_TEST = 80, 60
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_scan(path: Path, *, side: str, seed: int) -> None:
    """Noise that is brighter on one side."""
    values = np.random.default_rng(seed).normal(100, 10, (16, 16, 16))
    values[8:] += 40 if side == "right" else 0
    values[:8] += 40 if side == "left" else 0
    path.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(values.astype(np.float32), np.diag([2, 2, 2, 1])), path)


def row_of(number: int, side: str) -> dict[str, Any]:
    scan = {"type": "image", "modality": "T1", "path": f"sub-{number}/scan.nii"}
    user = {"role": "user", "content": [scan, {"type": "text", "text": "Which side?"}]}
    answer = {"type": "choice", "options": ["left", "right"], "value": side}
    turns = [user, {"role": "assistant", "content": side}]
    return {"id": f"{number}", "subject": f"sub-{number}", "task": "side", "messages": turns, "answer": answer}


@dataclass(frozen=True)
class Trained:
    run: Path
    folder: Path
    metrics: dict[str, float]
    labels: list[str]

    def evaluate(self, name: str, labels: list[str]) -> dict[str, float]:
        """The figures of the test scans with other labels."""
        write_rows(self.folder / f"{name}.jsonl", labels, first=NUM_TRAIN)
        return evaluate_run(self.run, manifests=[self.folder / f"{name}.jsonl"])


def write_rows(path: Path, labels: list[str], *, first: int) -> None:
    rows = [row_of(first + place, side) for place, side in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model that has learned the question; the seeds are fixed."""
    folder = tmp_path_factory.mktemp("planted")
    labels = [("left", "right")[number % 2] for number in range(NUM_TRAIN + NUM_TEST)]
    for number, side in enumerate(labels):
        write_scan(folder / f"sub-{number}" / "scan.nii", side=side, seed=number)
    write_rows(folder / "train.jsonl", labels[:NUM_TRAIN], first=0)
    write_rows(folder / "test.jsonl", labels[NUM_TRAIN:], first=NUM_TRAIN)
    settings = {
        "name": "planted",
        "output_dir": str(folder / "runs"),
        "report": {"enabled": False, "pictures": False},
        "model": {
            "text_config": {"model_type": "qwen2", "num_key_value_heads": 2, "initializer_range": 0.1, **SIZES},
            "vision_config": {
                "model_type": "siglip_vision_model", "vision_use_head": False, "initializer_range": 0.1, **SIZES,
            },
            "modalities": {"T1": {"image_size": [16, 16, 16], "patch_size": [8, 8, 8]}},
        },
        "data": {
            "train": [{"manifest": str(folder / "train.jsonl")}],
            "evaluation": [{"manifest": str(folder / "test.jsonl")}],
            "cache_dir": str(folder / "cache"),
            "calibration_fraction": 0.2,
            "pipelines": {"T1": {"spacing": [2, 2, 2]}},
        },
        "trainer": {
            "max_steps": 50,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 64,
            "learning_rate": 0.005,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "use_cpu": True,
        },
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    run = train(load_config(folder / "run.yaml"))
    assert run is not None
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = next(line for line in lines if "eval/accuracy/T1/side" in line)
    return Trained(run, folder, metrics, labels[NUM_TRAIN:])


def interval(metrics: dict[str, float], label: str, name: str) -> tuple[float, float]:
    return metrics[f"eval/{label}_lower/T1/{name}"], metrics[f"eval/{label}_upper/T1/{name}"]


def test_what_the_scans_show_is_learned_and_clear_of_its_controls(trained: Trained) -> None:
    metrics = trained.metrics
    assert metrics["eval/auroc/T1/side"] > 0.97
    assert metrics["eval/accuracy/T1/side"] > 0.9
    assert 0.3 < metrics["eval/auroc_shuffled/T1/side"] < 0.7
    assert metrics["eval/auroc_no_scan/T1/side"] == 0.5
    assert metrics["eval/auroc_swapped/T1/side"] < 0.1
    assert metrics["eval/overlaps/T1/side"] == 0
    # Fitted on subjects that were not trained on.
    assert 0.01 < metrics["eval/temperature/T1/side"] < 100
    assert metrics["eval/brier_scaled/T1/side"] < 0.1


def test_a_coin_label_is_at_chance_and_marked(trained: Trained) -> None:
    dice = random.Random(1)
    coin = [dice.choice(["left", "right"]) for _ in trained.labels]
    metrics = trained.evaluate("coin", coin)
    lower, upper = interval(metrics, "auroc", "side")
    assert lower < 0.5 < upper
    assert metrics["eval/overlaps/T1/side"] > 0


def test_labels_with_known_noise_give_the_known_ceiling(trained: Trained) -> None:
    turned = {"left": "right", "right": "left"}
    # Every fifth of each side.
    noisy = [turned[side] if place // 2 % 5 == 0 else side for place, side in enumerate(trained.labels)]
    metrics = trained.evaluate("noisy", noisy)
    assert metrics["eval/accuracy/T1/side"] == pytest.approx(0.8, abs=0.07)
    lower, upper = interval(metrics, "accuracy", "side")
    assert lower < 0.8 < upper
    assert metrics["eval/auroc/T1/side"] == pytest.approx(0.8, abs=0.1)


def test_a_model_whose_image_path_is_cut_overlaps_its_controls_and_is_marked(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from umbrella_train.evaluation.score_table import OVERLAP_NOTE, score_table

    weights = trained.run / "model" / "model.safetensors"
    content = load_file(weights)
    try:
        cut = {name: torch.zeros_like(value) if "projector" in name else value for name, value in content.items()}
        save_file(cut, weights, metadata={"format": "pt"})
        metrics = trained.evaluate("cut", trained.labels)
    finally:
        save_file(content, weights, metadata={"format": "pt"})
    assert metrics["eval/auroc/T1/side"] == pytest.approx(0.5)
    assert metrics["eval/overlaps/T1/side"] == 3
    assert OVERLAP_NOTE in score_table(metrics)
