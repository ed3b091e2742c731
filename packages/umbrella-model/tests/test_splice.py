"""Vision tokens are placed at the positions of their own scans."""

from __future__ import annotations

import pytest
import torch

from umbrella_model.splice import splice_features

ORDER = ("rsfMRI", "T1")


def test_features_are_placed_at_their_tags_in_reading_order():
    modality_ids = torch.tensor([[0, 2, 2, 0, 1], [2, 2, 1, 0, 0]])
    embeds = -torch.ones(2, 5, 1)
    features = {"T1": torch.tensor([[[10.0], [11.0]], [[20.0], [21.0]]]), "rsfMRI": torch.tensor([[[5.0]], [[6.0]]])}
    spliced = splice_features(embeds, features, modality_ids, modality_order=ORDER)
    assert spliced[..., 0].tolist() == [[-1, 10, 11, -1, 5], [20, 21, 6, -1, -1]]


def test_gradients_reach_features_at_tags_and_embeddings_elsewhere():
    modality_ids = torch.tensor([[0, 2, 2, 0]])
    embeds = torch.zeros(1, 4, 1, requires_grad=True)
    features = torch.zeros(1, 2, 1, requires_grad=True)
    spliced = splice_features(embeds, {"T1": features}, modality_ids, modality_order=ORDER)
    spliced.backward(torch.arange(4.0).view(1, 4, 1))
    assert embeds.grad[0, :, 0].tolist() == [0, 0, 0, 3]
    assert features.grad[0, :, 0].tolist() == [1, 2]


def test_features_are_cast_to_the_dtype_of_the_embeddings():
    spliced = splice_features(
        torch.zeros(1, 1, 2).bfloat16(), {"T1": torch.ones(1, 1, 2)}, torch.tensor([[2]]), modality_order=ORDER
    )
    assert spliced.dtype == torch.bfloat16


@pytest.mark.parametrize("modality_ids", [[[0, 2, 2, 2]], [[0, 2, 0, 0]], [[0, 0, 0, 0]]])
def test_different_numbers_of_tags_and_tokens_raise_with_both_counts(modality_ids):
    ids = torch.tensor(modality_ids)
    with pytest.raises(ValueError, match=f"T1: .* {int((ids == 2).sum())} positions .* 2 vision tokens"):
        splice_features(torch.zeros(1, 4, 1), {"T1": torch.zeros(1, 2, 1)}, ids, modality_order=ORDER)


def test_tags_without_scans_raise():
    with pytest.raises(ValueError, match=r"rsfMRI: .* 1 positions .* 0 vision tokens"):
        splice_features(torch.zeros(1, 2, 1), {}, torch.tensor([[1, 0]]), modality_order=ORDER)


@pytest.mark.parametrize("tag", [3, -1])
def test_unknown_tags_raise_with_their_count(tag):
    with pytest.raises(ValueError, match=r"modality_ids .*\b2 positions; 0 is text, 1 is rsfMRI, 2 is T1"):
        splice_features(torch.zeros(1, 4, 1), {}, torch.tensor([[tag, 0, 0, tag]]), modality_order=ORDER)


def test_image_tokens_and_tags_that_do_not_match_raise_with_both_counts(make_model, make_batch):
    model, batch = make_model(), make_batch((2, "T1", 2))
    shifted = batch["input_ids"].roll(1, dims=1)
    with pytest.raises(ValueError, match=r"1 of 4 image tokens \(60\).* 1 of 4 tags"):
        model(**(batch | {"input_ids": shifted}))
    del batch["pixel_values"]
    for tags in (None, torch.zeros_like(batch["modality_ids"])):
        with pytest.raises(ValueError, match=r"4 of 4 image tokens \(60\).* 0 of 0 tags"):
            model(**(batch | {"modality_ids": tags}))


MIXED_ROWS = ((6,), (2, "T1", 3), (1, "dMRI", 1, "T1", 2), (1, "T1", "T1", 1, "rsfMRI", 2))


def test_scans_of_a_mixed_batch_stay_in_their_own_sample(make_model, make_batch):
    model = make_model().eval()
    with torch.no_grad():
        batched = model(**make_batch(*MIXED_ROWS)).logits
        for i, row in enumerate(MIXED_ROWS):
            alone = model(**make_batch(row)).logits[0]
            torch.testing.assert_close(batched[i, : len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_exchanged_scans_change_the_logits(make_model, make_batch):
    model, batch = make_model().eval(), make_batch(*MIXED_ROWS)
    with torch.no_grad():
        before = model(**batch).logits[:, -2:]
        batch["pixel_values"]["T1"] = batch["pixel_values"]["T1"].roll(1, dims=0)
        after = model(**batch).logits[:, -2:]
    changed = (before - after).abs().amax(dim=(1, 2)) > 1e-3
    assert changed.tolist() == [False, True, True, True]


def test_gradients_of_an_answer_reach_only_its_own_scans(make_model, make_batch):
    model, batch = make_model().eval(), make_batch(*MIXED_ROWS)
    volumes = batch["pixel_values"]["T1"].requires_grad_()
    for i, own in enumerate([[], [0], [1], [2, 3]]):
        (grad,) = torch.autograd.grad(model(**batch).logits[i, -1].sum(), volumes)
        assert grad.abs().amax(dim=(1, 2, 3, 4)).nonzero().flatten().tolist() == own


def test_a_mixed_batch_trains_every_patch_embed(make_model, make_batch):
    model = make_model()
    out = model(**make_batch(*MIXED_ROWS))
    assert out.dummy_terms == {}
    out.loss.backward()
    for name in ("rsfMRI", "T1", "dMRI"):
        assert model.model.vision_tower.patch_embed(name).proj.weight.grad.abs().max() > 0


def test_scans_without_tags_raise(make_model, make_batch):
    batch = make_batch((2, "T1", 2))
    del batch["modality_ids"]
    with pytest.raises(ValueError, match="modality_ids"):
        make_model()(**batch)


def test_a_surplus_scan_raises_with_both_counts(make_model, make_batch):
    batch = make_batch((2, "T1", 2))
    batch["pixel_values"]["T1"] = batch["pixel_values"]["T1"].repeat(2, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"4 positions .*T1.* 8 vision tokens"):
        make_model()(**batch)
