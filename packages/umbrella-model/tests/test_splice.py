"""Vision tokens land at the positions of their own scans."""

from __future__ import annotations

import pytest
import torch

from umbrella_model.splice import splice_features

ORDER = ("rsfMRI", "T1")


def test_features_land_at_their_tags_in_reading_order():
    modality_ids = torch.tensor([[0, 2, 2, 0, 1], [2, 2, 1, 0, 0]])
    embeds = -torch.ones(2, 5, 1)
    features = {"T1": torch.tensor([[[10.0], [11.0]], [[20.0], [21.0]]]), "rsfMRI": torch.tensor([[[5.0]], [[6.0]]])}
    spliced = splice_features(embeds, features, modality_ids, modality_order=ORDER)
    assert spliced[..., 0].tolist() == [[-1, 10, 11, -1, 5], [20, 21, 6, -1, -1]]


def test_gradients_go_to_features_at_tags_and_to_embeddings_elsewhere():
    modality_ids = torch.tensor([[0, 2, 2, 0]])
    embeds = torch.zeros(1, 4, 1, requires_grad=True)
    features = torch.zeros(1, 2, 1, requires_grad=True)
    spliced = splice_features(embeds, {"T1": features}, modality_ids, modality_order=ORDER)
    spliced.backward(torch.arange(4.0).view(1, 4, 1))
    assert embeds.grad[0, :, 0].tolist() == [0, 0, 0, 3]
    assert features.grad[0, :, 0].tolist() == [1, 2]


def test_features_take_the_dtype_of_the_embeddings():
    spliced = splice_features(
        torch.zeros(1, 1, 2).bfloat16(), {"T1": torch.ones(1, 1, 2)}, torch.tensor([[2]]), modality_order=ORDER
    )
    assert spliced.dtype == torch.bfloat16


@pytest.mark.parametrize("modality_ids", [[[0, 2, 2, 2]], [[0, 2, 0, 0]], [[0, 0, 0, 0]]])
def test_counts_that_differ_raise_with_both_counts(modality_ids):
    ids = torch.tensor(modality_ids)
    with pytest.raises(ValueError, match=f"T1: the batch has {int((ids == 2).sum())} positions .* but 2 vision tokens"):
        splice_features(torch.zeros(1, 4, 1), {"T1": torch.zeros(1, 2, 1)}, ids, modality_order=ORDER)


def test_tags_of_a_modality_without_scans_raise():
    with pytest.raises(ValueError, match="rsfMRI: the batch has 1 positions tagged rsfMRI but 0 vision tokens"):
        splice_features(torch.zeros(1, 2, 1), {}, torch.tensor([[1, 0]]), modality_order=ORDER)


@pytest.mark.parametrize("tag", [3, -1])
def test_a_tag_of_no_modality_is_refused_with_the_count(tag):
    with pytest.raises(ValueError, match=r"2 positions of modality_ids have a tag .*: 0 is text, 1 is rsfMRI, 2 is T1"):
        splice_features(torch.zeros(1, 4, 1), {}, torch.tensor([[tag, 0, 0, tag]]), modality_order=ORDER)


def test_image_tokens_without_tags_and_tags_on_words_are_refused_with_both_counts(make_model, make_batch):
    model, batch = make_model(), make_batch((2, "T1", 2))
    shifted = batch["input_ids"].roll(1, dims=1)
    with pytest.raises(ValueError, match=r"1 of 4 image tokens \(60\) have no tag, and 1 of 4 tags stand at other tok"):
        model(**(batch | {"input_ids": shifted}))
    del batch["pixel_values"]
    for tags in (None, torch.zeros_like(batch["modality_ids"])):
        with pytest.raises(ValueError, match=r"4 of 4 image tokens \(60\) have no tag, and 0 of 0 tags"):
            model(**(batch | {"modality_ids": tags}))


MIXED_ROWS = ((6,), (2, "T1", 3), (1, "dMRI", 1, "T1", 2), (1, "T1", "T1", 1, "rsfMRI", 2))


def test_each_scan_lands_in_its_own_sample_of_a_mixed_batch(make_model, make_batch):
    model = make_model().eval()
    with torch.no_grad():
        batched = model(**make_batch(*MIXED_ROWS)).logits
        for i, row in enumerate(MIXED_ROWS):
            alone = model(**make_batch(row)).logits[0]
            torch.testing.assert_close(batched[i, : len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_a_scan_of_another_sample_changes_the_answer(make_model, make_batch):
    model, batch = make_model().eval(), make_batch(*MIXED_ROWS)
    with torch.no_grad():
        before = model(**batch).logits[:, -2:]
        batch["pixel_values"]["T1"] = batch["pixel_values"]["T1"].roll(1, dims=0)
        after = model(**batch).logits[:, -2:]
    changed = (before - after).abs().amax(dim=(1, 2)) > 1e-3
    assert changed.tolist() == [False, True, True, True]


def test_the_gradient_of_an_answer_reaches_the_scans_of_its_own_sample_alone(make_model, make_batch):
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


def test_scans_without_tags_are_refused(make_model, make_batch):
    batch = make_batch((2, "T1", 2))
    del batch["modality_ids"]
    with pytest.raises(ValueError, match="without modality_ids"):
        make_model()(**batch)


def test_a_batch_with_one_scan_too_many_names_both_counts(make_model, make_batch):
    batch = make_batch((2, "T1", 2))
    batch["pixel_values"]["T1"] = batch["pixel_values"]["T1"].repeat(2, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="4 positions tagged T1 but 8 vision tokens"):
        make_model()(**batch)
