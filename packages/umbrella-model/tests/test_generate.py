"""generate(): greedy and beam search, sampling, padding and cache, compared with a loop over forward."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from umbrella_model import checkpoint_parts
from umbrella_model.hf_compat import CACHE

ROWS = (
    (4,),
    (2, "T1", 3),
    (1, "dMRI", "rsfMRI", 1, "T1", 2),
    (1, "T1", "T1", "T1", 1, "rsfMRI", 2),
    (1, "T1", 1, "T1", 2),
)


def greedy_reference(model, batch, num_new):
    """Greedy decoding of one row without cache or padding, with a full forward for every token."""
    ids, tags = batch["input_ids"], batch["modality_ids"]
    for _ in range(num_new):
        logits = model(input_ids=ids, modality_ids=tags, pixel_values=batch["pixel_values"]).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        tags = torch.cat([tags, torch.zeros_like(tags[:, :1])], dim=1)
    return ids


@pytest.fixture
def model(make_model):
    model = make_model().eval()
    model.generation_config.pad_token_id = 61  # differs from the padding of the batches: only the mask identifies it
    return model


@pytest.mark.parametrize("row", ROWS)
def test_greedy_equals_a_loop_without_cache(model, make_batch, row):
    batch = make_batch(row)
    ids = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert torch.equal(ids, greedy_reference(model, batch, 5))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_a_left_padded_batch_equals_single_prompts(model, make_batch, options):
    together = model.generate(**make_batch(*ROWS, padding_side="left"), max_new_tokens=4, do_sample=False, **options)
    copies = options.get("num_return_sequences", 1)
    assert len(together) == len(ROWS) * copies
    for i, row in enumerate(ROWS):
        alone = model.generate(**make_batch(row), max_new_tokens=4, do_sample=False, **options)
        assert torch.equal(together[i * copies : (i + 1) * copies, -alone.shape[1] :], alone)


def test_beam_search_is_at_least_as_likely_as_greedy(model, make_batch):
    batch = make_batch(ROWS[2])

    def log_likelihood(ids):
        tags = torch.nn.functional.pad(batch["modality_ids"], (0, 4))
        logits = model(input_ids=ids, modality_ids=tags, pixel_values=batch["pixel_values"]).logits.log_softmax(-1)
        return logits[0, -5:-1].gather(1, ids[0, -4:, None]).sum()

    beams = model.generate(**batch, max_new_tokens=4, num_beams=8, do_sample=False)
    greedy = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert log_likelihood(beams) >= log_likelihood(greedy)


def test_sampling_returns_different_sequences_that_start_with_the_prompt(model, make_batch):
    batch = make_batch(ROWS[1], ROWS[2], padding_side="left")
    torch.manual_seed(0)
    ids = model.generate(**batch, max_new_tokens=6, do_sample=True, num_return_sequences=3)
    assert ids.shape == (6, batch["input_ids"].shape[1] + 6)
    assert torch.equal(ids[:, :-6], batch["input_ids"].repeat_interleave(3, dim=0))
    assert len({tuple(row[-6:].tolist()) for row in ids[:3]}) > 1


def test_the_answer_depends_on_the_scan(model, make_batch):
    batch = make_batch(ROWS[1])
    answers = set()
    for seed in range(8):
        torch.manual_seed(seed)
        batch["pixel_values"]["T1"] = 3 * torch.randn_like(batch["pixel_values"]["T1"])
        answers.add(tuple(model.generate(**batch, max_new_tokens=4, do_sample=False)[0].tolist()))
    assert len(answers) > 1


def test_scans_are_encoded_once(model, make_batch):
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**make_batch(ROWS[1]), max_new_tokens=5, num_beams=2)
    assert calls == [1]


def test_generation_in_train_mode_builds_no_graph(model, make_batch):
    ids = model.train().generate(**make_batch(ROWS[1]), max_new_tokens=2)
    assert not ids.requires_grad


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_cache_is_accepted_by_either_name(model, make_batch, name):
    batch = make_batch(ROWS[1])
    del batch["labels"], batch["attention_mask"]
    out = model(**batch)
    assert {"cache", "past_key_values"}.intersection(out.keys()) == {CACHE}
    ids, tags = torch.tensor([[7]]), torch.zeros(1, 1, dtype=torch.long)
    step = model(input_ids=ids, **{name: out[CACHE]}).logits
    whole = {
        "input_ids": torch.cat([batch["input_ids"], ids], 1),
        "modality_ids": torch.cat([batch["modality_ids"], tags], 1),
    }
    torch.testing.assert_close(step[0, -1], model(**whole, pixel_values=batch["pixel_values"]).logits[0, -1])


def test_generate_raises_for_a_missing_scan(model, make_batch):
    batch = make_batch(ROWS[2])
    del batch["pixel_values"]["T1"]
    with pytest.raises(ValueError, match=r"T1: .*\b4\b.*\b0\b"):
        model.generate(**batch, max_new_tokens=2)


def test_beam_sampling_and_static_cache_are_supported(model, make_batch):
    batch = make_batch(*ROWS, padding_side="left")
    sampled = model.generate(**batch, max_new_tokens=3, do_sample=True, num_beams=2, num_return_sequences=2)
    assert sampled.shape == (2 * len(ROWS), batch["input_ids"].shape[1] + 3)
    expected = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert torch.equal(
        model.generate(**batch, max_new_tokens=3, do_sample=False, cache_implementation="static"), expected
    )


def test_each_prompt_is_sampled_from_its_own_distribution(model, make_batch):
    """Compares frequencies of the first token over many draws from a batch with single-prompt probabilities."""
    rows, draws = (ROWS[1], ROWS[2]), 4000
    torch.manual_seed(0)
    options = {"max_new_tokens": 1, "do_sample": True, "num_return_sequences": draws, "top_k": 0}
    together = model.generate(**make_batch(*rows, padding_side="left"), **options)[:, -1].view(2, draws)
    for row, drawn in zip(rows, together, strict=True):
        expected = model(**make_batch(row)).logits[0, -1].softmax(-1)
        frequencies = torch.bincount(drawn, minlength=64) / draws
        assert (frequencies - expected).abs().max() < 5 * (0.25 / draws) ** 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"assistant_model": object()}, "assistant_model"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"generation_config": GenerationConfig(guidance_scale=2.0)}, "guidance_scale"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"negative_prompt_ids": torch.ones(5, 1, dtype=torch.long)}, "negative_prompt_ids"),
        ({"inputs_embeds": torch.zeros(5, 18, 16)}, "inputs_embeds: .*input_ids, modality_ids and pixel_values"),
        ({"assistant_early_exit": 1}, "assistant_early_exit"),
        ({"prefill_chunk_size": 3}, "prefill_chunk_size"),
        ({"use_cache": False}, "use_cache=False"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache=False"),
        ({"past_key_values": DynamicCache()}, "past_key_values"),
        ({"cache": DynamicCache()}, "not support cache"),
        ({"attention_mask": None}, "attention_mask is missing"),
    ],
)
def test_options_that_do_not_work_with_scans_raise(model, make_batch, change, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**(make_batch(*ROWS, padding_side="left") | change), max_new_tokens=2)


def test_pixel_values_that_are_not_a_dict_raise(model, make_batch):
    batch = make_batch(ROWS[1])
    with pytest.raises(ValueError, match=r"pixel_values is a Tensor.*'rsfMRI'"):
        model.generate(**(batch | {"pixel_values": batch["pixel_values"]["T1"]}), max_new_tokens=2)


def test_right_padding_raises(model, make_batch):
    with pytest.raises(ValueError, match='padding_side="left"'):
        model.generate(**make_batch(*ROWS), max_new_tokens=2)


@pytest.mark.parametrize(("name", "value"), [("guidance_scale", 3.0), ("prompt_lookup_num_tokens", 2)])
def test_unsupported_options_in_the_generation_config_raise(model, make_batch, name, value):
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=rf"{name}: .*model\.generation_config"):
        model.generate(**make_batch(ROWS[1]), max_new_tokens=2)


def test_use_cache_of_the_generation_config_is_ignored(model, make_batch):
    batch = make_batch(ROWS[1])
    expected = model.generate(**batch, max_new_tokens=3, do_sample=False)
    model.generation_config.use_cache = False
    assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), expected)


def test_train_mode_with_activation_checkpointing_raises(model, make_batch):
    batch = make_batch(ROWS[1])
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False)
    checkpoint_parts(model.train(), ["language_model"])
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.eval().generate(**batch, max_new_tokens=6, do_sample=False), expected)
