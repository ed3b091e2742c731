"""Tokenizer, model, pipelines and data sets of a config match each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from umbrella_data import InterleaveDataset
from umbrella_data.synthetic.cohort import DemoCohort
from umbrella_train.assembly.build import build_components
from umbrella_train.config import DatasetConfig, RunConfig
from umbrella_train.errors import RunError

MakeConfig = Callable[..., RunConfig]
TOKENS = {"rsfMRI": 4, "T1": 8, "dMRI": 4}


def test_model_tokenizer_and_pipelines_match_the_config(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    components = build_components(config)
    assert list(components.pipelines) == ["rsfMRI", "T1", "dMRI"]
    assert {name: components.model.num_image_tokens(name) for name in components.pipelines} == TOKENS
    assert components.model.get_input_embeddings().weight.shape == (len(components.tokenizer), 16)
    assert components.tokenizer.convert_ids_to_tokens(components.model.config.image_token_id) == "<|image|>"
    assert components.collator().modality_order == ("rsfMRI", "T1", "dMRI")
    assert components.collator(padding_side="left").padding_side == "left"


def test_examples_of_the_cohort_go_through_the_model(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    components = build_components(config)
    mixture = components.mixture(config.data.train, config=config, augment=True)
    assert isinstance(mixture, InterleaveDataset)
    assert len(mixture) == 18
    batch = components.collator()(list(mixture))
    assert set(batch["pixel_values"]) == set(TOKENS)
    assert batch["pixel_values"]["dMRI"].shape[1] == 2
    output = components.model(**batch)
    assert torch.isfinite(output.loss)


def test_labels_are_the_answers_and_the_ends_of_turn(
    make_config: MakeConfig, cohort: DemoCohort, tmp_path: Path
) -> None:
    config = make_config(tmp_path)
    components = build_components(config)
    dataset = components.dataset(config.data.train[0], config=config, augment=False)
    batch = components.collator()([dataset[i] for i in range(6)])
    for row, labels in enumerate(batch["labels"]):
        (answer,) = (turn.text for turn in dataset.sample(row).messages if turn.role == "assistant")
        words = components.tokenizer.decode(labels[labels != -100])
        assert words == f"{answer}{components.tokenizer.eos_token}"
        supervised = batch["input_ids"][row][labels != -100]
        assert torch.equal(supervised, labels[labels != -100])


def test_weights_depend_only_on_the_seed(make_config: MakeConfig, tmp_path: Path) -> None:
    first, again = (build_components(make_config(tmp_path)).model.state_dict() for _ in range(2))
    other = build_components(make_config(tmp_path).model_copy(update={"seed": 1})).model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_trained_model_is_loaded_with_its_tokenizer(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    components = build_components(config)
    with torch.no_grad():
        components.model.lm_head.weight[3] = 7.0
    components.model.save_pretrained(tmp_path / "model")
    components.tokenizer.save_pretrained(tmp_path / "model")
    again = build_components(config, weights=tmp_path / "model")
    state, loaded = components.model.state_dict(), again.model.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], loaded[name]) for name in state)
    assert again.tokenizer.get_vocab() == components.tokenizer.get_vocab()
    # The tags of a batch are those of the model.
    assert again.collator().modality_order == tuple(again.model.config.patch_embeds)


@pytest.mark.parametrize(
    ("preset", "trained"),
    [("patch_embed_only", {"patch_embed"}), ("align", {"patch_embed", "multi_modal_projector"})],
)
def test_parts_outside_a_preset_are_frozen(
    make_config: MakeConfig, tmp_path: Path, preset: str, trained: set[str]
) -> None:
    components = build_components(make_config(tmp_path, model={"learn": {"preset": preset}}))
    learning = {name for name, parameter in components.model.named_parameters() if parameter.requires_grad}
    assert all(any(word in name for word in trained) for name in learning)
    assert all(any(word in name for name in learning) for word in trained)


def mixture_of(make_config: MakeConfig, cohort: DemoCohort, tmp_path: Path, **data: Any) -> tuple[int, ...]:
    rows = [{"manifest": str(cohort.train_manifest)}, {"manifest": str(cohort.test_manifest)}]
    for row, weight in zip(rows, data.pop("weights", []), strict=False):
        row["weight"] = weight
    config = make_config(tmp_path, data={"train": rows, "evaluation": [], **data})
    return build_components(config).mixture(config.data.train, config=config, augment=True).draws


def test_mixing_of_the_config_is_applied(make_config: MakeConfig, cohort: DemoCohort, tmp_path: Path) -> None:
    assert mixture_of(make_config, cohort, tmp_path) == (18, 6)
    assert mixture_of(make_config, cohort, tmp_path, mixing="equal") == (18, 18)
    assert mixture_of(make_config, cohort, tmp_path, mixing="weights", weights=[1.0, 2.0]) == (18, 36)


@pytest.mark.parametrize("mixing", ["proportional", "equal"])
def test_evaluation_has_every_sample_once_for_any_mixing(
    make_config: MakeConfig, cohort: DemoCohort, tmp_path: Path, mixing: str
) -> None:
    config = make_config(tmp_path, data={"mixing": mixing})
    sources = [DatasetConfig(manifest=path) for path in (cohort.train_manifest, cohort.test_manifest)]
    assert build_components(config).mixture(sources, config=config, augment=False).draws == (18, 6)


def test_transforms_of_augmentation_are_built_before_workers_start(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipelines = {"T1": {"augment": [{"name": "RandZoom"}]}}
    config = make_config(tmp_path, data={"pipelines": pipelines})
    components = build_components(config)
    components.mixture(config.data.train, config=config, augment=True)
    assert vars(components.pipelines["T1"])["augmentation"] is not None

    def reject(**arguments: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr("monai.transforms.RandZoom", reject)
    with pytest.raises(RunError, match=r"^data\.pipelines\.T1\.augment\.0 "):
        build_components(config).mixture(config.data.train, config=config, augment=True)
