"""The `data` section takes effect in the batches: mixing, length, token budget, handling of bad scans."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from umbrella_data.errors import ScanError
from umbrella_data.scan import reader
from umbrella_data.synthetic.cohort import DemoCohort, make_demo_cohort
from umbrella_train.assembly.build import build_components
from umbrella_train.assembly.sources import Sources
from umbrella_train.config import DatasetConfig, RunConfig
from umbrella_train.config.data import DataConfig
from umbrella_train.errors import RunError
from umbrella_train.run.training import _build_trainer
from umbrella_train.trainer.arguments import build_arguments

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MODEL: dict[str, Any] = {
    "vision_config": {"model_type": "siglip_vision_model", **SIZES, "vision_use_head": False},
    "text_config": {"model_type": "qwen2", **SIZES, "num_key_value_heads": 1},
    "vision_feature_layer": -1,
    "modalities": {
        "rsfMRI": {"image_size": [8, 8, 8, 8], "patch_size": [8, 8, 4, 4]},
        "T1": {"image_size": [16, 16, 16], "patch_size": [8, 8, 8]},
        "dMRI": {"image_size": [8, 8, 8], "patch_size": [8, 8, 2]},
    },
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> DemoCohort:
    """Four subjects to train on and one held out."""
    return make_demo_cohort(tmp_path_factory.mktemp("cohort"), num_train=4, num_test=1, seed=0)


@pytest.fixture
def build(cohort: DemoCohort, tmp_path: Path) -> Callable[..., Any]:
    """Builds the trainer of a run on the cohort; keywords are keys of the data section."""

    def make(**data: Any) -> Any:
        train = [{"manifest": str(data.pop("manifest", cohort.train_manifest))}]
        content = {"model": MODEL, "data": {"train": train, **data}, "trainer": {"use_cpu": True, "report_to": []}}
        config = RunConfig.model_validate({"name": "run", "output_dir": tmp_path, **content})
        arguments = build_arguments(config, output_dir=tmp_path / "run")
        components = build_components(config)
        components.list_bad_scans_in(tmp_path / "run")
        return _build_trainer(config, arguments, components, Sources(config.data.train, []))

    return make


def batches_of(trainer: Any) -> list[list[int]]:
    return list(trainer.get_train_dataloader().batch_sampler)


def test_token_budget_bounds_training_batches_and_replaces_their_number_of_samples(build: Callable[..., Any]) -> None:
    dataset = build().train_dataset
    lengths = dataset.lengths(np.arange(len(dataset)))
    budget = 3 * int(lengths.max())
    trainer = build(max_tokens_per_batch=budget)
    batches = batches_of(trainer)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    costs = [len(batch) * int(lengths[batch].max()) for batch in batches]
    assert max(costs) <= budget
    assert max(map(len, batches)) in (3, 4)
    assert trainer.get_train_dataloader().batch_sampler.batch_size is None
    assert build().get_train_dataloader().batch_sampler.batch_size == 8


def test_a_sample_longer_than_the_budget_is_an_error_with_its_key(build: Callable[..., Any]) -> None:
    with pytest.raises(RunError, match=r"data\.max_tokens_per_batch: "):
        build(max_tokens_per_batch=10).get_train_dataloader()


def test_packing_fills_rows_and_the_budget_counts_no_padding(build: Callable[..., Any]) -> None:
    dataset = build().train_dataset
    lengths = dataset.lengths(np.arange(len(dataset)))
    budget = 3 * int(lengths.max()) - 1
    trainer = build(packing=True, batches="mixed", max_tokens_per_batch=budget)
    batches = batches_of(trainer)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    totals = [int(lengths[batch].sum()) for batch in batches]
    assert max(totals) <= budget < max(len(batch) * int(lengths[batch].max()) for batch in batches)
    rows = list(trainer.get_train_dataloader())
    assert [row["input_ids"].shape for row in rows] == [(1, total) for total in totals]
    assert [len(row["cu_seq_lens_q"]) - 1 for row in rows] == [len(batch) for batch in batches]


def test_the_layout_depends_on_the_token_budget(build: Callable[..., Any]) -> None:
    layouts = [build(**data).checkpoints.layout for data in ({}, {"max_tokens_per_batch": 4000}, {"batches": "mixed"})]
    assert all(first != second for first, second in itertools.combinations(layouts, 2))
    assert build(packing=True).checkpoints.layout == layouts[0]
    assert build(packing=True, max_tokens_per_batch=4000).checkpoints.layout != layouts[1]


def test_batches_by_length_mix_modalities_of_similar_length(build: Callable[..., Any]) -> None:
    def spread(trainer: Any) -> int:
        lengths = trainer.train_dataset.lengths(np.arange(len(trainer.train_dataset)))
        return sum(int(lengths[batch].max() - lengths[batch].min()) for batch in batches_of(trainer))

    trainer = build(batches="by_length")
    assert spread(trainer) < spread(build(batches="mixed")) * 0.7
    kinds = [{trainer.train_dataset.modalities(index) for index in batch} for batch in batches_of(trainer)]
    assert max(map(len, kinds)) > 1


def damage(cohort: DemoCohort, folder: Path) -> tuple[Path, str]:
    """A copy of the cohort's manifest and scans, the first T1 of them truncated; and that scan's subject."""
    rows = [json.loads(line) for line in cohort.train_manifest.read_text().splitlines()]
    row = next(row for row in rows if row["messages"][0]["content"][0]["modality"] == "T1")
    bad = row["messages"][0]["content"][0]["path"]
    for path in cohort.train_manifest.parent.rglob("*"):
        target = folder / path.relative_to(cohort.train_manifest.parent)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (folder / bad).write_bytes((folder / bad).read_bytes()[:-200])
    return folder / cohort.train_manifest.name, row["subject"]


def test_bad_scan_is_raised_or_skipped_and_listed(
    build: Callable[..., Any], cohort: DemoCohort, tmp_path: Path
) -> None:
    manifest, subject = damage(cohort, tmp_path / "damaged")
    with pytest.raises(ScanError):
        list(build(manifest=manifest).train_dataset)
    examples = list(build(manifest=manifest, on_bad_scan="skip", max_bad_fraction=0.9).train_dataset)
    assert len(examples) == len(list(build().train_dataset))
    text = (tmp_path / "run" / "bad_scans.jsonl").read_text()
    assert all(json.loads(line)["reason"].startswith("gzip") for line in text.splitlines())
    assert subject not in text


def test_mixture_uses_temperature_and_the_end_of_an_epoch(cohort: DemoCohort) -> None:
    def draws(**data: Any) -> tuple[int, ...]:
        sources = [{"manifest": str(cohort.train_manifest)}, {"manifest": str(cohort.test_manifest)}]
        config = RunConfig.model_validate({"model": MODEL, "data": {"train": sources, **data}})
        components = build_components(config)
        return components.mixture(
            [DatasetConfig.model_validate(each) for each in sources], config=config, augment=True
        ).draws

    large, small = draws()
    assert draws(mixing="temperature", temperature=1e9) == (large, large)
    assert draws(mixing="temperature", temperature=1e9, stop="first") == (small, small)


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"temperature": 2}, "temperature"),
        ({"mixing": "temperature"}, "temperature"),
        ({"max_bad_fraction": 0.1}, "max_bad_fraction"),
        ({"index_dir": "a", "cache_dir": "b"}, "index_dir"),
        ({"on_bad_scan": "skip", "max_bad_fraction": 1.1}, "max_bad_fraction"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch"),
    ],
)
def test_unsupported_combinations_are_rejected(data: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DataConfig.model_validate({"train": [{"manifest": "a.jsonl"}], **data})
    assert [error["loc"] for error in caught.value.errors()] == [(key,)]


def test_index_dir_gives_the_same_batches(
    build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("indexed_gzip", reason="the index is an extra")
    monkeypatch.setattr(reader, "_MIN_INDEXED_BYTES", 0)
    folder = tmp_path / "index"
    streamed, indexed = (
        [batch["pixel_values"] for batch in build(**data).get_train_dataloader()]
        for data in ({}, {"index_dir": str(folder)})
    )
    torch.testing.assert_close(indexed, streamed, rtol=0, atol=0)
    # One for each subject's series.
    assert len(list(folder.rglob("*.gzindex"))) == 4


@pytest.fixture
def ages(cohort: DemoCohort) -> Path:
    """A manifest with a question about a number in each row."""
    rows = [json.loads(line) for line in cohort.train_manifest.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["task"] = "age"
        row["messages"][-1]["content"] = f"{20 + number}.25 years"
        row["answer"] = {"type": "number", "value": 20.25 + number, "unit": "years"}
    path = cohort.train_manifest.parent / "ages.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_of(dataset: Any, tokenizer: Any, index: int) -> str:
    labels = dataset[index].labels
    return str(tokenizer.decode(labels[labels != -100], skip_special_tokens=True))


def test_numbers_are_written_and_drawn_in_training_alone(build: Callable[..., Any], ages: Path) -> None:
    keys = {"number_decimals": 0, "number_smoothing": {"age": 2.0}, "max_tokens_per_batch": 400}
    trainer = build(manifest=ages, **keys)
    tokenizer = trainer.processing_class.tokenizer
    drawn = {words_of(trainer.train_dataset.datasets[0], tokenizer, 12 * epoch) for epoch in range(12)}
    assert len(drawn) > 3
    assert all(words.removesuffix(" years").isdigit() for words in drawn)
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].numel() > 0


def test_smoothing_of_a_task_without_numbers_is_an_error(build: Callable[..., Any], ages: Path) -> None:
    with pytest.raises(RunError, match=r"data\.number_smoothing: .*task aeg.*'age'"):
        build(manifest=ages, number_smoothing={"aeg": 2.0})


def test_numbers_that_cannot_be_written_are_found_before_a_run(build: Callable[..., Any], ages: Path) -> None:
    rows = ages.read_text().splitlines()
    for number in (1, 4):
        rows[number] = rows[number].replace(".25 years", ".5 years")
    ages.write_text("\n".join(rows))
    for keys in ({"number_decimals": 1}, {"number_smoothing": {"age": 1.0}}):
        with pytest.raises(RunError) as caught:
            build(manifest=ages, **keys)
        assert [line.split(", ")[1] for line in str(caught.value).splitlines()] == ["line 2", "line 5"]


@pytest.mark.parametrize("keys", [{"number_decimals": -1}, {"number_smoothing": {"age": 0.0}}, {"number_smoothing": 2}])
def test_wrong_keys_of_numbers_are_errors(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(keys))):
        DataConfig.model_validate({"train": [{"manifest": "a.jsonl"}], **keys})
