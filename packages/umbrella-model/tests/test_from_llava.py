"""from_llava() on small checkpoints of each supported architecture, saved with Hugging Face's own classes."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
)

from umbrella_model import PatchEmbedConfig, UmbrellaForConditionalGeneration
from umbrella_model.from_llava import convert_llava

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "initializer_range": 0.2,
}


def llava_config(vision_config, text_config, *, layer, strategy="full"):
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=60,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )


LLAVAS = {
    "llava-1.5": llava_config(
        CLIPVisionConfig(**VISION, projection_dim=8), LlamaConfig(**TEXT), layer=-2, strategy="default"
    ),
    "interleave-0.5b": llava_config(
        SiglipVisionConfig(**VISION, vision_use_head=False), Qwen2Config(**TEXT, tie_word_embeddings=True), layer=-1
    ),
    "interleave-7b": llava_config(SiglipVisionConfig(**VISION), Qwen2Config(**TEXT), layer=-2),
    "onevision": LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_token_index=60,
        video_token_index=61,
    ),
    "next": LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=8),
        text_config=LlamaConfig(**TEXT),
        image_token_index=60,
    ),
}
MODALITIES = {
    "T1": PatchEmbedConfig(image_size=(8, 8, 8), patch_size=(4, 4, 8)),
    "rsfMRI": PatchEmbedConfig(image_size=(8, 8, 8, 4), patch_size=(4, 4, 8, 2)),
}


@pytest.fixture(params=LLAVAS)
def checkpoint(request, tmp_path):
    """A saved LLaVA and its folder."""
    torch.manual_seed(0)
    config = LLAVAS[request.param]
    llava = AutoModelForImageTextToText.from_config(config).eval()
    llava.generation_config.max_new_tokens = 7
    llava.save_pretrained(tmp_path)
    return llava, tmp_path


class CustomModel(UmbrellaForConditionalGeneration):
    """A user's subclass."""


def test_from_llava_returns_the_class_it_is_called_on(checkpoint, tmp_path_factory):
    model = CustomModel.from_llava(checkpoint[1], modalities=MODALITIES)
    assert type(model) is CustomModel
    folder = tmp_path_factory.mktemp("custom")
    model.save_pretrained(folder)
    assert type(CustomModel.from_pretrained(folder)) is CustomModel


def test_text_only_input_gives_the_logits_of_hugging_face_llava(checkpoint):
    llava, folder = checkpoint
    model = UmbrellaForConditionalGeneration.from_llava(folder, modalities=MODALITIES)
    input_ids = torch.randint(0, 60, (3, 9))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :4] = 0
    with torch.no_grad():
        expected = llava(input_ids=input_ids, attention_mask=attention_mask).logits
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_vision_features_equal_those_of_the_checkpoint(checkpoint):
    llava, folder = checkpoint
    model = UmbrellaForConditionalGeneration.from_llava(folder, modalities=MODALITIES)
    tower, layer = model.model.vision_tower, llava.config.vision_feature_layer
    tokens, source = torch.randn(2, 5, 16), llava.model.vision_tower.embeddings
    has_class_token = hasattr(source, "class_embedding")
    with torch.no_grad():
        whole = tokens
        if has_class_token:
            class_token = source.class_embedding + source.position_embedding.weight[0]
            whole = torch.cat((class_token.expand(2, 1, 16), tokens), dim=1)
        source.forward = lambda pixel_values, **kwargs: pixel_values
        hidden = llava.model.vision_tower(whole, output_hidden_states=True).hidden_states[layer]
        expected = llava.model.multi_modal_projector(hidden[:, int(has_class_token) :])
        ours = model.model.multi_modal_projector(tower.encode(tokens))
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_conversion_lists_every_key_and_kept_tensors_are_bit_identical(checkpoint):
    llava, folder = checkpoint
    llava = type(llava).from_pretrained(folder)
    source = {name: tensor.clone() for name, tensor in llava.state_dict().items()}
    model, conversion = convert_llava(UmbrellaForConditionalGeneration, llava, modalities=MODALITIES)
    target = model.state_dict()
    assert set(conversion.kept).isdisjoint(conversion.dropped)
    assert {*conversion.kept, *conversion.dropped} == set(source)
    renamed = {name: name.replace("vision_tower.", "vision_tower.encoder.") for name in conversion.kept}
    assert {*renamed.values(), *conversion.new} == set(target)
    assert set(renamed.values()).isdisjoint(conversion.new)
    for old, new in renamed.items():
        assert torch.equal(source[old], target[new]), old
    assert all("_patch_embed." in name or name.endswith(".special_tokens") for name in conversion.new)
    allowed = ("embeddings.", "post_layernorm.", ".head.", "layers.2.")
    dropped = [name for name in conversion.dropped if name != "model.image_newline"]
    assert all("vision_tower" in name and any(part in name for part in allowed) for name in dropped)
    depth = model.config.vision_depth
    assert any(f"layers.{depth - 1}." in name for name in conversion.kept if "vision_tower" in name)


def test_a_converted_model_trains_every_parameter(checkpoint, make_batch):
    _, folder = checkpoint
    model = UmbrellaForConditionalGeneration.from_llava(folder, modalities=MODALITIES).train()
    out = model(**make_batch((2, "T1", 3), modalities=MODALITIES))
    (out.loss + out.dummy_terms["rsfMRI"]).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_converted_model_saves_and_reloads(checkpoint, make_batch, tmp_path_factory):
    _, folder = checkpoint
    model = UmbrellaForConditionalGeneration.from_llava(folder, modalities=MODALITIES)
    target = tmp_path_factory.mktemp("converted")
    model.save_pretrained(target)
    loaded = UmbrellaForConditionalGeneration.from_pretrained(target)
    batch = make_batch((2, "T1", 1, "rsfMRI", 3), (4,), modalities=MODALITIES)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.config.image_token_id == 60
    assert loaded.generation_config.max_new_tokens == 7
    assert loaded.config.vision_feature_select_strategy == "full"


def test_dtype_and_attn_implementation_apply_to_every_part(checkpoint):
    _, folder = checkpoint
    model = UmbrellaForConditionalGeneration.from_llava(
        folder, modalities=MODALITIES, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    attentions = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    assert {module.config._attn_implementation for module in attentions} == {"eager"}
    model.set_attn_implementation("sdpa")
    assert {module.config._attn_implementation for module in attentions} == {"sdpa"}
    assert not any(parameter.is_meta for parameter in (*model.parameters(), *model.buffers()))


def test_from_llava_raises_for_another_model_type(tmp_path):
    VipLlavaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'vipllava' checkpoint.*llava, llava_next, llava_onevision"):
        UmbrellaForConditionalGeneration.from_llava(tmp_path, modalities=MODALITIES)


def test_several_feature_layers_raise():
    config = llava_config(SiglipVisionConfig(**VISION), Qwen2Config(**TEXT), layer=[-2, -1])
    with pytest.raises(ValueError, match="several feature layers"):
        convert_llava(UmbrellaForConditionalGeneration, LlavaForConditionalGeneration(config), modalities=MODALITIES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": "zeros"}, "init is 'zeros'.*inflate, random"),
        ({"modalities": {}}, "at least one modality"),
        ({"modalities": {"rs.fMRI": MODALITIES["T1"]}}, r"'rs\.fMRI'"),
        ({"vision_feature_layer": 4}, "vision_feature_layer 4 .*3 layers"),
    ],
)
def test_invalid_arguments_raise_before_weights_are_read(checkpoint, change, message):
    _, folder = checkpoint
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        UmbrellaForConditionalGeneration.from_llava(folder, **({"modalities": MODALITIES} | change))


@pytest.mark.parametrize(("layer", "depth"), [(-1, 3), (-2, 2), (1, 1), (None, None)])
def test_feature_layer_is_the_argument_or_that_of_the_checkpoint(checkpoint, layer, depth):
    llava, folder = checkpoint
    model = UmbrellaForConditionalGeneration.from_llava(folder, modalities=MODALITIES, vision_feature_layer=layer)
    wanted = llava.config.vision_feature_layer if layer is None else layer
    depth = (wanted % 4) if depth is None else depth
    layers = model.model.vision_tower.encoder.encoder.layers
    assert model.config.vision_feature_layer == wanted
    assert len(layers) == depth
    theirs = llava.model.vision_tower.encoder.layers[depth - 1].state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in layers[-1].state_dict().items())


@pytest.fixture
def mismatched(checkpoint):
    """A checkpoint with one missing and one unexpected key."""
    _, folder = checkpoint
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("projector.linear_1.weight"))]
    save_file(tensors | {"bogus.weight": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_from_llava_raises_for_missing_and_unexpected_keys(mismatched):
    with pytest.raises(ValueError, match="2 keys") as error:
        UmbrellaForConditionalGeneration.from_llava(mismatched, modalities=MODALITIES)
    assert "missing in the checkpoint: model.multi_modal_projector.linear_1.weight" in str(error.value)
    assert "not in the model: bogus.weight" in str(error.value)


def test_from_llava_raises_for_a_shape_mismatch(checkpoint):
    _, folder = checkpoint
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("projector.linear_1.weight"))
    save_file(tensors | {name: torch.zeros(16, 15)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"linear_1\.weight .*\(16, 15\) .*\(16, 16\)"):
        UmbrellaForConditionalGeneration.from_llava(folder, modalities=MODALITIES)


@pytest.fixture
def trimmed(checkpoint):
    """A converted model, and the folder of the same LLaVA without the tensors that are dropped."""
    llava, folder = checkpoint
    model, conversion = convert_llava(
        UmbrellaForConditionalGeneration, type(llava).from_pretrained(folder), modalities=MODALITIES
    )
    dropped = tuple(name.rpartition("vision_tower.")[2].removeprefix("model.") for name in conversion.dropped)
    if isinstance(llava.config.vision_config, CLIPVisionConfig):
        # The class token and its position are used.
        dropped = tuple(name for name in dropped if "class_embedding" not in name and "position_emb" not in name)
    tensors = load_file(folder / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith(dropped)}
    assert len(tensors) - len(rest) == len(dropped) > 0
    save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
    return model, folder


def test_tensors_that_are_dropped_may_be_missing(trimmed):
    whole, folder = trimmed
    model = UmbrellaForConditionalGeneration.from_llava(folder, modalities=MODALITIES, init="random")
    tensors = model.state_dict()
    assert tensors.keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert "_patch_embed." in name or torch.equal(tensors[name], tensor), name


def test_inflate_raises_without_2d_filter_and_positions(trimmed):
    with pytest.raises(ValueError, match="missing in the checkpoint") as error:
        UmbrellaForConditionalGeneration.from_llava(trimmed[1], modalities=MODALITIES)
    lines = str(error.value).splitlines()[1:]
    assert all("embeddings.p" in line for line in lines)
    assert "patch_embedding.weight" in {line.split("embeddings.")[1] for line in lines}


@pytest.mark.parametrize("checkpoint", ["llava-1.5", "next"], indirect=True)
def test_the_class_token_of_clip_must_not_be_missing(checkpoint):
    _, folder = checkpoint
    tensors = load_file(folder / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith("class_embedding")}
    save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing in the checkpoint: \S*embeddings\.class_embedding"):
        UmbrellaForConditionalGeneration.from_llava(folder, modalities=MODALITIES, init="random")


def test_logged_names_follow_the_file_when_not_strict(mismatched, caplog):
    with caplog.at_level(logging.INFO, logger="umbrella_model.from_llava"):
        UmbrellaForConditionalGeneration.from_llava(mismatched, modalities=MODALITIES, strict=False)
    (message,) = (record.message for record in caplog.records if record.name == "umbrella_model.from_llava")
    dropped, new = message.split("dropped (")[1].split(") init")[0].split(" new, ")
    assert "bogus.weight" in dropped
    assert "model.multi_modal_projector.linear_1.weight" in new
    assert "linear_1.weight" not in dropped


def test_dropped_and_new_tensors_are_logged(checkpoint, caplog):
    with caplog.at_level(logging.INFO, logger="umbrella_model.from_llava"):
        UmbrellaForConditionalGeneration.from_llava(checkpoint[1], modalities=MODALITIES)
    (message,) = (record.message for record in caplog.records if record.name == "umbrella_model.from_llava")
    dropped, new = message.split(" new, ")
    assert "model.vision_tower.embeddings.patch_embedding.weight" in dropped
    assert "init: inflate" in new
    assert "model.vision_tower.T1_patch_embed.proj.weight" in new


def test_config_is_read_from_the_folder_of_the_weights(checkpoint, tmp_path_factory):
    _, folder = checkpoint
    parent = tmp_path_factory.mktemp("parent")
    folder.rename(parent / "inner")
    model = UmbrellaForConditionalGeneration.from_llava(parent, modalities=MODALITIES, subfolder="inner")
    assert model.config.image_token_id == 60


@pytest.mark.parametrize(
    ("settings", "is_right"),
    [
        ({"projector_hidden_act": "relu"}, lambda projector: isinstance(projector.act, torch.nn.ReLU)),
        ({"multimodal_projector_bias": False}, lambda projector: projector.linear_1.bias is None),
    ],
)
def test_projector_settings_are_kept_and_saved(settings, is_right, tmp_path):
    torch.manual_seed(0)
    config = llava_config(SiglipVisionConfig(**VISION), Qwen2Config(**TEXT), layer=-1)
    config.update(settings)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "llava")
    model = UmbrellaForConditionalGeneration.from_llava(tmp_path / "llava", modalities=MODALITIES)
    model.save_pretrained(tmp_path / "model")
    loaded = UmbrellaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert is_right(loaded.model.multi_modal_projector)
    tokens = torch.randn(3, 16)
    assert torch.equal(loaded.model.multi_modal_projector(tokens), model.model.multi_modal_projector(tokens))


def test_a_resized_vocabulary_is_saved(checkpoint, tmp_path_factory):
    model = UmbrellaForConditionalGeneration.from_llava(checkpoint[1], modalities=MODALITIES)
    assert model.config.text_config is model.model.language_model.config
    assert model.config.vision_config is model.model.vision_tower.encoder.config
    model.resize_token_embeddings(70)
    assert model.config.text_config.vocab_size == model.model.language_model.config.vocab_size == 70
    folder = tmp_path_factory.mktemp("resized")
    model.save_pretrained(folder)
    assert UmbrellaForConditionalGeneration.from_pretrained(folder).lm_head.weight.shape == (70, 16)
