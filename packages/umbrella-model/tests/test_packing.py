"""Packed rows: equal loss and gradients to padded rows, and no attention across conversations."""

from __future__ import annotations

import pytest
import torch
from transformers import StableLmConfig

from umbrella_model import UmbrellaForConditionalGeneration, attention, pack_batch, supervised_index

ROWS = ((3, "T1", 2), (1, "dMRI", "rsfMRI", 1, "T1", 3), (6,), (2, "T1", "T1", 4))


def step(model, batch):
    out = model(**batch)
    grads = torch.autograd.grad(out.loss + sum(out.dummy_terms.values()), list(model.parameters()))
    return out, grads


@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_batch_holds_every_token_once_in_reading_order(make_batch, side):
    batch = make_batch(*ROWS, padding_side=side)
    packed = pack_batch(batch)
    mask = batch["attention_mask"].bool()
    lengths = [9, 19, 6, 14]
    for key in ("input_ids", "modality_ids"):
        assert packed[key][0].tolist() == batch[key][mask].tolist()
    assert packed["position_ids"][0].tolist() == [i for length in lengths for i in range(length)]
    assert packed["cu_seq_lens_q"].tolist() == [0, 9, 28, 34, 48]
    assert packed["cu_seq_lens_q"].dtype == torch.int32
    assert packed["max_length_q"] == packed["max_length_k"] == 19
    assert packed["pixel_values"] is batch["pixel_values"]
    assert "attention_mask" not in packed


def test_the_first_token_of_a_conversation_is_never_a_target(make_batch):
    batch = make_batch((3,), (3,))
    batch["labels"] = batch["input_ids"].clone()
    packed = pack_batch(batch, supervised_multiple_of=8)
    assert (packed["labels"][0] == -100).nonzero().flatten().tolist() == [0, 3]
    assert packed["supervised_index"].tolist() == [0, 1, 3, 4, -1, -1, -1, -1]


@pytest.mark.parametrize("implementation", ["varlen", "sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_padded(make_model, make_batch, implementation, checkpointing):
    batch = make_batch(*ROWS)
    reference, expected = step(make_model(), batch)
    model = make_model()
    model.set_attn_implementation(implementation)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    out, grads = step(model, pack_batch(batch))
    torch.testing.assert_close(out.loss, reference.loss, atol=1e-5, rtol=1e-5)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["varlen", "sdpa"])
def test_conversations_of_a_packed_row_are_independent(make_model, make_batch, implementation):
    model = make_model().eval()
    model.set_attn_implementation(implementation)
    packed = pack_batch(make_batch(*ROWS))
    for key in ("labels", "supervised_index"):
        del packed[key]
    with torch.no_grad():
        before = model(**packed).logits[0]
        packed["input_ids"][0, 9] = (packed["input_ids"][0, 9] + 1) % 60
        packed["input_ids"][0, 27] = (packed["input_ids"][0, 27] + 1) % 60
        after = model(**packed).logits[0]
    changed = (before != after).any(dim=1)
    assert changed[9]
    assert not changed[:9].any()
    assert not changed[28:].any()


@pytest.mark.parametrize("packed", [False, True])
def test_varlen_equals_sdpa_while_training(make_model, make_batch, packed):
    batch = make_batch(*ROWS)
    batch = pack_batch(batch) if packed else batch
    reference, expected = step(make_model(), batch)
    model = make_model()
    model.set_attn_implementation("varlen")
    out, grads = step(model, batch)
    torch.testing.assert_close(out.loss, reference.loss, atol=1e-5, rtol=1e-5)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-4)


def test_varlen_raises_for_left_padding_in_training(make_model, make_batch):
    model = make_model()
    model.set_attn_implementation("varlen")
    with pytest.raises(ValueError, match='padding_side="right"'):
        model(**make_batch(*ROWS, padding_side="left"))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_on_host", [False, True])
def test_varlen_supports_either_padding_side_in_evaluation(make_model, make_batch, monkeypatch, side, is_on_host):
    monkeypatch.setattr(attention, "_is_on_host", lambda tensor: is_on_host)
    model = make_model().eval()
    model.set_attn_implementation("varlen")
    for rows in (ROWS, ROWS[:1] * 2):
        batch = make_batch(*rows, padding_side=side)
        with torch.no_grad():
            logits = model(**batch).logits
            alone = [model(**make_batch(row)).logits[0] for row in rows]
        for found, expected, mask in zip(logits, alone, batch["attention_mask"], strict=True):
            torch.testing.assert_close(found[mask.bool()], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_varlen_generates_the_same_as_sdpa(make_model, make_batch, options):
    batch = make_batch(*ROWS, padding_side="left")
    expected = make_model().eval().generate(**batch, max_new_tokens=4, do_sample=False, **options)
    model = make_model().eval()
    model.set_attn_implementation("varlen")
    assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False, **options), expected)


def test_varlen_raises_for_attention_dropout(make_model, make_batch):
    model = make_model()
    model.set_attn_implementation("varlen")
    model.config.text_config.attention_dropout = 0.1
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention dropout"):
        model(**pack_batch(make_batch(*ROWS)))


@pytest.mark.parametrize("implementation", ["varlen", "sdpa", "eager"])
@pytest.mark.parametrize("is_training", [False, True])
def test_packed_rows_without_boundaries_raise(make_model, make_batch, implementation, is_training):
    model = make_model().train(is_training)
    model.set_attn_implementation(implementation)
    packed = {key: value for key, value in pack_batch(make_batch(*ROWS)).items() if not key.startswith(("cu_", "max_"))}
    for mask in ({}, {"attention_mask": torch.ones_like(packed["input_ids"])}):
        with pytest.raises(ValueError, match="cu_seq_lens_q"):
            model(**packed, **mask)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padding_are_ignored(make_model, make_batch, side):
    batch = make_batch(*ROWS, padding_side=side)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 1)
    assert (positions[:, 1:] < positions[:, :-1]).any()
    with torch.no_grad():
        model = make_model().eval()
        torch.testing.assert_close(model(**batch, position_ids=positions).loss, model(**make_batch(*ROWS)).loss)


def test_pack_batch_raises_for_unknown_keys(make_batch):
    batch = make_batch(*ROWS) | {"num_items_in_batch": torch.tensor(8)}
    assert pack_batch(batch)["num_items_in_batch"] is batch["num_items_in_batch"]
    with pytest.raises(ValueError, match="position_ids, weights"):
        pack_batch(batch | {"weights": torch.ones(4), "position_ids": batch["input_ids"]})


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_runs_on_the_meta_device(make_model, make_batch, packed):
    """Tensors on the meta device have no values, so that any operation that would synchronise on a GPU fails."""
    batch = make_batch(*ROWS)
    batch["supervised_index"] = supervised_index(batch["labels"])
    batch = pack_batch(batch) if packed else batch
    model = make_model().bfloat16().to("meta")
    model.set_attn_implementation("varlen")
    volumes = {name: volume.to("meta") for name, volume in batch.pop("pixel_values").items()}
    tensors = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    for present in (volumes, {"T1": volumes["T1"]}, {}):
        out = model(**tensors, pixel_values=present)
        assert out.loss.device.type == "meta"
        (out.loss + sum(out.dummy_terms.values())).backward()
        model.zero_grad(set_to_none=True)


def test_language_model_that_drops_the_boundaries_raises(make_config, make_batch):
    config = make_config()
    sizes = {key: getattr(config.text_config, key) for key in ("hidden_size", "intermediate_size", "vocab_size")}
    # Its layers drop unknown arguments: plain causal attention would attend across conversations.
    config.text_config = StableLmConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    model = UmbrellaForConditionalGeneration(config).train()
    model.set_attn_implementation("varlen")
    batch = make_batch(*ROWS)
    assert model(**batch).loss.isfinite()
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"StableLm.* cu_seq_lens_q"):
            model.train(mode)(**pack_batch(batch))
