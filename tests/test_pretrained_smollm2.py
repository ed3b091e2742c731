"""With the weights of a pretrained language model: `UMBRELLA_SMOLLM2` names its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from umbrella_model import PatchEmbedConfig, UmbrellaForConditionalGeneration
from umbrella_train.config import demo_config_path, load_config
from umbrella_train.run.stages import train_stages

pytestmark = pytest.mark.pretrained


def test_text_of_a_composed_model_is_the_language_models_own(smollm2: Path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    language = AutoModelForCausalLM.from_pretrained(smollm2)
    assert language.dtype == torch.float32
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    question = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = {name: question[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = language(**prompt).logits
    answer = language.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = UmbrellaForConditionalGeneration.from_parts(
        language_model=language,
        vision_encoder=AutoConfig.for_model("siglip_vision_model", **vision, image_size=16, patch_size=4),
        modalities={"T1": PatchEmbedConfig((16, 16, 16), (8, 8, 8))},
        tokenizer=tokenizer,
    )
    # The image token has one more row; ties and template are kept.
    assert model.config.image_token_id == 49_152
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        torch.testing.assert_close(model(**prompt).logits[..., :49_152], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(**prompt, max_new_tokens=16, do_sample=False), answer)


def test_the_shipped_configuration_trains_in_two_stages(smollm2: Path, tmp_path: Path):
    small = {
        "model.language_model": smollm2,
        "data.synthetic.num_train": 12,
        "data.synthetic.num_test": 4,
        "data.cache_dir": tmp_path / "cache",
        "trainer.max_steps": 5,
        "trainer.per_device_train_batch_size": 2,
        "trainer.warmup_steps": 1,
        "trainer.logging_steps": 1,
        "report.enabled": "false",
        "report.pictures": "false",
        "report.controls": "false",
        "report.max_samples": 1,
        "report.max_new_tokens": 2,
        "output_dir": tmp_path,
    }
    overrides = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    last = train_stages(load_config(demo_config_path().with_name("smollm2_135m.yaml"), overrides))
    assert last == tmp_path / "smollm2-135m" / "instruct"
    losses = []
    for stage in ("align", "instruct"):
        lines = (tmp_path / "smollm2-135m" / stage / "metrics.jsonl").read_text().splitlines()
        losses += [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert len(losses) == 10
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_shipped_configuration_learns_the_built_in_cohort(smollm2: Path, tmp_path: Path):
    """About 30 minutes on one core."""
    options = {"model.language_model": smollm2, "data.cache_dir": tmp_path / "cache", "output_dir": tmp_path}
    overrides = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    last = train_stages(load_config(demo_config_path().with_name("smollm2_135m.yaml"), overrides))
    assert last is not None
    scores = json.loads((last / "metrics.jsonl").read_text().splitlines()[-1])
    for task in ("T1/lesion_side", "dMRI/fibre_damage_side", "rsfMRI/first_active_side"):
        assert scores[f"eval/accuracy/{task}"] >= 0.95
        for control in ("shuffled", "no_scan"):
            assert 0.3 <= scores[f"eval/{control}/{task}"] <= 0.7
