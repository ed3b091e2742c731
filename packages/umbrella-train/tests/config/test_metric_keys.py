"""The documented forms of keys in metrics.jsonl."""

from __future__ import annotations

import pytest

from umbrella_train.config.metric_keys import METRIC_KEYS, metric_key
from umbrella_train.config.training import LOGGED_IN_TRAINING


@pytest.mark.parametrize(
    ("key", "form"),
    [
        ("loss", "loss"),
        ("eval/loss/rsfMRI+T1", "eval/loss/MODALITIES"),
        ("eval/auroc_lower/T1/sex", "eval/LABEL/NAME"),
        ("grad/[inactive]/vision_tower.T1_patch_embed.proj", "grad/[MODALITY]/PART"),
        ("grad_share/[T1]/vision_tower.T1_patch_embed", "grad_share/[MODALITY]/PART"),
        ("non_finite/skipped_by_deepspeed", "non_finite/skipped_by_deepspeed"),
        ("baseline/volume/accuracy/T1/sex", "baseline/BASELINE/LABEL/NAME"),
    ],
)
def test_keys_have_their_form(key: str, form: str) -> None:
    found = metric_key(key)
    assert found is not None
    assert found.form == form


@pytest.mark.parametrize("key", ["losses", "drift", "best/other", "evaluation/accuracy/T1"])
def test_other_keys_have_none(key: str) -> None:
    assert metric_key(key) is None


def test_forms_are_unique_and_have_a_meaning() -> None:
    assert len({each.form for each in METRIC_KEYS}) == len(METRIC_KEYS)
    assert all(each.meaning for each in METRIC_KEYS)


def test_keys_that_choose_a_checkpoint() -> None:
    assert set(LOGGED_IN_TRAINING) == {
        "eval_loss", "eval/loss/", "loss", "grad_norm", "grad/", "grad_share/", "drift/",
    }  # fmt: skip
