"""Trainable parts, parameter groups and the table of parameter counts."""

from __future__ import annotations

import pytest
from transformers import Qwen2Config

from umbrella_model import parameter_groups, parameter_table, set_trainable
from umbrella_model.parts import named_part_parameters
from umbrella_model.trainable import PRESETS

TIED = Qwen2Config(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=64, tie_word_embeddings=True,
)  # fmt: skip
PREFIXES = {
    "patch_embed": ("model.vision_tower.T1_patch_embed.", "model.vision_tower.rsfMRI_patch_embed.",
                    "model.vision_tower.dMRI_patch_embed."),
    "vision_tower": ("model.vision_tower.encoder.",),
    "projector": ("model.multi_modal_projector.",),
    "language_model": ("model.language_model.layers.", "model.language_model.norm."),
    "embeddings": ("model.language_model.embed_tokens.", "lm_head."),
}  # fmt: skip


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_parameter_belongs_to_one_part(make_model):
    model = make_model()
    parts = [(part, name) for part, name, _ in named_part_parameters(model)]
    assert [name for _, name in parts] == [name for name, _ in model.named_parameters()]
    for part, name in parts:
        assert name.startswith(PREFIXES[part]), name


@pytest.mark.parametrize(
    ("preset", "parts"),
    [
        ("full", ("patch_embed", "vision_tower", "projector", "language_model", "embeddings")),
        ("align", ("patch_embed", "projector")),
        ("patch_embed_only", ("patch_embed",)),
    ],
)
def test_a_preset_trains_its_parts_and_freezes_the_others(make_model, preset, parts):
    model = make_model()
    set_trainable(model, preset)
    prefixes = tuple(prefix for part in parts for prefix in PREFIXES[part])
    assert trainable(model) == {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    set_trainable(model, "full")
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_parts_without_a_mode_do_not_change(make_model):
    model = make_model()
    set_trainable(model, "align")
    set_trainable(model, {"projector": "frozen", "vision_tower": "train"})
    assert trainable(model) == {n for n, _ in model.named_parameters() if n.startswith("model.vision_tower.")}


@pytest.mark.parametrize("preset", ["align", "patch_embed_only", "full"])
@pytest.mark.parametrize("row", [(3, "T1", 2), (5,)])
def test_every_trainable_parameter_of_a_preset_gets_a_gradient(make_model, make_batch, preset, row):
    model = make_model(text_config=TIED)
    set_trainable(model, preset)
    out = model(**make_batch(row))
    loss = out.loss + sum(out.dummy_terms.values())
    loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trainable(model)


def test_tied_embeddings_are_one_part_and_counted_once(make_model):
    model = make_model(text_config=TIED)
    set_trainable(model, {"language_model": "train", "embeddings": "frozen"})
    assert not model.lm_head.weight.requires_grad
    rows = {row.part: row for row in parameter_table(model)}
    assert rows["embeddings"].num_parameters == 64 * 16
    assert rows["embeddings"].num_trainable == 0
    assert sum(row.num_parameters for row in rows.values()) == sum(p.numel() for p in model.parameters())


def test_table_lists_each_patch_embed_and_adds_up(make_model):
    model = make_model()
    set_trainable(model, "align")
    rows = {row.part: row for row in parameter_table(model)}
    patch_embeds = {"rsfMRI_patch_embed", "T1_patch_embed", "dMRI_patch_embed"}
    assert set(rows) == {*patch_embeds, "vision_tower", "projector", "language_model", "embeddings"}
    assert rows["embeddings"].num_parameters == 2 * 64 * 16
    assert {name: rows[f"{name}_patch_embed"].num_trainable for name in model.dummy_sizes()} == model.dummy_sizes()
    assert sum(row.num_parameters for row in rows.values()) == sum(p.numel() for p in model.parameters())
    assert sum(row.num_trainable for row in rows.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("everything", "'everything'.*full, align, patch_embed_only, lora"),
        (["projector"], r"parts is \['projector'\].*full, .*"),
        ({"tower": "train"}, "tower.*patch_embed, vision_tower"),
        ({"projector": "learn"}, "'train', 'frozen' or 'lora', got {'projector': 'learn'}"),
    ],
)
def test_unknown_presets_parts_and_modes_raise(make_model, parts, message):
    with pytest.raises(ValueError, match=message):
        set_trainable(make_model(), parts)


def test_presets_have_every_part():
    assert all(set(preset) == set(PREFIXES) for preset in PRESETS.values())


def test_parameter_groups_have_each_trainable_parameter_once(make_model):
    model = make_model(text_config=TIED)
    set_trainable(model, {"vision_tower": "frozen"})
    groups = parameter_groups(
        model, learning_rate=1.0, part_learning_rates={"projector": 0.1, "patch_embed": 0.2}, weight_decay=0.5
    )
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    expected = {"projector": 0.1, "patch_embed": 0.2, "language_model": 1.0, "embeddings": 1.0}
    parameters = [(part, p) for part, _, p in named_part_parameters(model) if p.requires_grad]
    assert len(parameters) == sum(len(group["params"]) for group in groups) == len(rates)
    assert all(rates[id(parameter)] == expected[part] for part, parameter in parameters)
    # The Trainer logs the rate of the first group.
    assert groups[0]["lr"] == 1.0
    for group in groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] == 0.5}


def test_learning_rate_of_an_unknown_part_raises(make_model):
    with pytest.raises(ValueError, match="tower"):
        parameter_groups(make_model(), learning_rate=1.0, part_learning_rates={"tower": 0.1})
