"""The model as a Hugging Face model: attention, precision, checkpointing, embeddings, loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

ROWS = ((3, "T1", 2), (1, "dMRI", "rsfMRI", 1, "T1", 3), (5,))


def gradients(model, batch):
    out = model(**batch)
    (out.loss + sum(out.dummy_terms.values())).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return grads


def test_num_image_tokens_is_the_number_of_patches(make_model):
    model = make_model()
    assert {name: model.num_image_tokens(name) for name in model.config.modality_order} == {
        "rsfMRI": 8,
        "T1": 4,
        "dMRI": 2,
    }


def test_loss_is_the_mean_over_supervised_tokens_and_follows_num_items_in_batch(make_model, make_batch):
    model, batch = make_model().eval(), make_batch(*ROWS)
    out = model(**batch)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(model(**batch, num_items_in_batch=12).loss, expected * 6 / 12)


def test_attributes_that_hugging_face_infers_wrongly_are_set(make_model):
    model = make_model()
    assert model.accepts_loss_kwargs is True
    assert model.loss_type == "ForCausalLM"


def test_logits_to_keep_gives_the_last_positions(make_model, make_batch):
    model, batch = make_model().eval(), make_batch(*ROWS)
    del batch["labels"]
    everything = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, everything[:, -2:])


def test_left_and_right_padding_give_equal_logits(make_model, make_batch):
    model = make_model().eval()
    right, left = make_batch(*ROWS), make_batch(*ROWS, padding_side="left")
    position_ids = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        a, b = model(**right).logits, model(**left, position_ids=position_ids).logits
    for i, mask in enumerate(right["attention_mask"].bool()):
        torch.testing.assert_close(a[i, mask], b[i, mask.flip(0)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree_and_reach_every_part(make_config, make_model, make_batch, implementation):
    model, batch = make_model().eval(), make_batch(*ROWS)
    with torch.no_grad():
        expected = model(**batch).logits
        model.set_attn_implementation(implementation)
        chosen = {
            type(module).__name__: module.config._attn_implementation
            for module in model.modules()
            if type(module).__name__.endswith("Attention")
        }
        assert set(chosen.values()) == {implementation}
        assert len(chosen) == 2
        mask = batch["attention_mask"].bool()
        torch.testing.assert_close(model(**batch).logits[mask], expected[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_flex_attention_agrees_with_the_others(make_model, make_batch):
    """Forward only and in eager mode: on a CPU torch has no backward, and compilation takes minutes."""
    batch, plain, flex = make_batch(*ROWS), make_model().eval(), make_model().eval()
    flex.set_attn_implementation("flex_attention")
    mask = batch["attention_mask"].bool()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(flex(**batch).logits[mask], plain(**batch).logits[mask], atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_gives_equal_gradients(make_model, make_batch):
    model, batch = make_model(), make_batch(*ROWS)
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = [*model.model.vision_tower.encoder.encoder.layers, *model.model.language_model.layers]
    assert all(layer.gradient_checkpointing for layer in layers)
    calls = []
    layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    assert len(batch["pixel_values"]) == 3
    checkpointed = gradients(model, batch)
    assert len(calls) == 6  # one encoder call per modality, each computed twice
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, msg=name)


def test_tied_embeddings_stay_tied_when_resized(make_model, make_batch):
    model = make_model(text_config=_tied_text_config())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(80)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model(**make_batch(*ROWS)).supervised_logits.shape[-1] == 80
    assert model.config.text_config.vocab_size == 80


def _tied_text_config():
    from transformers import Qwen2Config

    return Qwen2Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip


def test_image_token_can_change_after_resizing(make_model, make_batch):
    model, batch = make_model().eval(), make_batch(*ROWS)
    with torch.no_grad():
        before = model(**batch).logits
        model.resize_token_embeddings(66, mean_resizing=False)
        batch["input_ids"][batch["input_ids"] == 60] = 65
        with pytest.raises(ValueError, match=r"0 of 0 image tokens \(60\)"):
            model(**batch)
        model.config.image_token_id = 65
        torch.testing.assert_close(model(**batch).logits[..., :64], before)
    assert model(**batch).loss.isfinite()


def test_bfloat16_model_trains_on_float32_volumes(make_model, make_batch):
    model = make_model().bfloat16()
    out = model(**make_batch(*ROWS))
    assert out.supervised_logits.dtype == torch.bfloat16
    (out.loss + sum(out.dummy_terms.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_model_runs_on_text_only(make_model, make_batch):
    out = make_model().bfloat16()(**make_batch((6,)))
    assert {term.dtype for term in out.dummy_terms.values()} == {torch.float32}
    assert out.loss.isfinite()


def test_autocast_keeps_dummy_terms_in_float32(make_model, make_batch):
    model = make_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**make_batch((3, "T1", 2)))
    assert {term.dtype for term in out.dummy_terms.values()} == {torch.float32}
    out.loss.backward()


def test_both_or_neither_of_input_ids_and_embeddings_raise(make_model, make_batch):
    model, batch = make_model(), make_batch((3,))
    with pytest.raises(ValueError, match="exactly one"):
        model(**batch, inputs_embeds=torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="exactly one"):
        model(attention_mask=batch["attention_mask"])


def test_inputs_embeds_skip_the_vision_tower(make_model):
    model = make_model().eval()
    embeds = torch.randn(1, 4, 16)
    expected = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)
    assert torch.equal(model(inputs_embeds=embeds).logits, expected)


def test_hugging_face_trainer_passes_only_logits_to_compute_metrics(make_model, make_batch, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, batch, seen = make_model(), make_batch(ROWS[0]), []
    trainer = Trainer(
        model=model,
        args=TrainingArguments(tmp_path, use_cpu=True, report_to="none", disable_tqdm=True),
        data_collator=lambda batches: batches[0],
        eval_dataset=[batch],
        compute_metrics=lambda prediction: seen.append(prediction.predictions) or {},
    )
    trainer.evaluate()
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    torch.testing.assert_close(torch.as_tensor(seen[0]), expected)
