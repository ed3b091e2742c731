"""Vision encoders that are modules of one's own: width, checks, saving, and registration by name."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from umbrella_model import OwnEncoderConfig, PatchEmbedConfig, UmbrellaForConditionalGeneration, UmbrellaModel
from umbrella_model.own_encoder import ENCODER_GROUP, check_token_encoder
from umbrella_model.vision_encoder import load_vision_encoder


class Mixer(nn.Module):
    """A small encoder with an attribute for its width on request, a buffer outside of its state dict, and dropout."""

    def __init__(self, *, width=16, named=False, depth=1):
        super().__init__()
        if named:
            self.hidden_size = width
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(3 * width, width))
            for _ in range(depth)
        )
        self.register_buffer("scale", torch.tensor(2.5), persistent=False)

    def forward(self, tokens):
        for layer in self.layers:
            tokens = tokens + self.scale * layer(self.norm(tokens - tokens.mean(dim=1, keepdim=True)))
        return tokens


class Broken(Mixer):
    """Does something wrong to the features."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, tokens):
        return self.change(super().forward(tokens))


def own_model(make_config, module):
    loaded = load_vision_encoder(module, feature_layer=None)
    return UmbrellaForConditionalGeneration(make_config(vision_config=loaded.config), vision_encoder=loaded.module)


@pytest.fixture
def registered(monkeypatch):
    """The name `mixer` in the entry point group."""
    entry = EntryPoint(name="mixer", value=f"{__name__}:Mixer", group=ENCODER_GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Mixer)
    monkeypatch.setattr("umbrella_model.own_encoder.entry_points", lambda *, group: {ENCODER_GROUP: [entry]}[group])


@pytest.mark.parametrize("named", [True, False])
def test_the_width_is_an_attribute_or_found(named):
    module = Mixer(width=24, named=named).train()
    loaded = load_vision_encoder(module, feature_layer=None)
    assert loaded.module is module
    assert loaded.config.hidden_size == 24
    assert loaded.patches is None
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize("module", [nn.Identity(), nn.GELU(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))])
def test_an_unknown_width_asks_for_it(module):
    with pytest.raises(ValueError, match="set its attribute hidden_size"):
        load_vision_encoder(module, feature_layer=None)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Broken(lambda features: (features,)), "returns a tuple"),
        (Broken(lambda features: features[:, :1]), r"returns shape \(2, 1, 16\)"),
        (
            Broken(lambda features: features + torch.zeros(2, 16)[: features.shape[1]]),
            r"fails on tokens of shape \(2, 5, 16\)",
        ),
        (Broken(lambda features: features + features.mean(dim=0)), "mixes the scans"),
        (Broken(lambda features: features.mean(dim=1)), r"returns shape \(2, 16\)"),
    ],
)
def test_a_module_that_is_no_token_encoder_raises(module, message):
    module.hidden_size = 16
    with pytest.raises(ValueError, match=message):
        load_vision_encoder(module, feature_layer=None)


def test_a_layer_with_the_batch_second_raises():
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=20, batch_first=False)
    layer.hidden_size = 16
    with pytest.raises(ValueError, match="mixes the scans"):
        load_vision_encoder(layer, feature_layer=None)
    again = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, dim_feedforward=20, batch_first=True), 2)
    assert load_vision_encoder(again, feature_layer=None).config.hidden_size == 16


def test_convolutions_are_rejected_with_what_is_supported():
    with pytest.raises(ValueError, match=r"'Conv2d'.*clip_vision_model.*monai"):
        load_vision_encoder(nn.Conv2d(3, 8, 3), feature_layer=None)


def test_lengths_of_the_modalities_can_be_checked():
    class Limited(Mixer):
        def forward(self, tokens):
            return super().forward(tokens) + torch.zeros(8, 16)[: tokens.shape[1]]

    module = Limited(named=True)
    load_vision_encoder(module, feature_layer=None)
    with pytest.raises(ValueError, match=r"\(2, 9, 16\)"):
        check_token_encoder(module, hidden_size=16, lengths=(8, 9))


def test_tokens_of_every_modality_must_fit(make_config):
    class Limited(Mixer):
        def forward(self, tokens):
            return super().forward(tokens) + torch.zeros(6, 16)[: tokens.shape[1]]

    with pytest.raises(ValueError, match=r"'Limited' fails on tokens of shape \(2, \d+, 16\)"):
        own_model(make_config, Limited(named=True))
    text = AutoConfig.for_model("llama", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    for size, error in (((8, 8, 8), pytest.raises(ValueError, match=r"\(2, 8, 16\)")), ((8, 8, 4), nullcontext())):
        modalities = {"T1": PatchEmbedConfig(image_size=size, patch_size=(4, 4, 4))}
        with error:
            UmbrellaForConditionalGeneration.from_parts(
                language_model=text, vision_encoder=Limited(named=True), modalities=modalities
            )


def test_batch_normalisation_is_rejected():
    class Normed(Mixer):
        def __init__(self):
            super().__init__(named=True)
            self.batch_norm = nn.BatchNorm1d(16)

        def forward(self, tokens):
            return self.batch_norm(super().forward(tokens).transpose(1, 2)).transpose(1, 2)

    with pytest.raises(ValueError, match="has batch normalisation"):
        load_vision_encoder(Normed(), feature_layer=None)


def test_a_feature_layer_does_not_apply(make_config, registered):
    with pytest.raises(ValueError, match="does not apply"):
        load_vision_encoder(Mixer(), feature_layer=-1)
    config = make_config(vision_config=OwnEncoderConfig(encoder="mixer"), vision_feature_layer=-2)
    with pytest.raises(ValueError, match="does not apply"):
        UmbrellaForConditionalGeneration(config)


def test_weights_are_kept_and_every_parameter_gets_a_gradient(make_config, make_batch):
    module = Mixer()
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = own_model(make_config, module).train()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())
    out = model(**make_batch((3, "T1", 2)))
    (out.loss + sum(out.dummy_terms.values())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("model_class", [UmbrellaForConditionalGeneration, UmbrellaModel])
def test_a_saved_model_loads_with_the_module(make_config, tmp_path, model_class):
    model = own_model(make_config, Mixer()).eval()
    model.save_pretrained(tmp_path)
    other = Mixer()
    loaded = model_class.from_pretrained(tmp_path, vision_encoder=other)
    tower = loaded.base_model.vision_tower
    assert tower.encoder is other
    volumes = {"T1": torch.randn(2, 1, 8, 8, 8)}
    with torch.no_grad():
        expected = model.model.vision_tower(volumes).features["T1"]
        assert torch.equal(tower(volumes).features["T1"], expected)
    with pytest.raises(ValueError, match=r"from_pretrained\(folder, vision_encoder=module\)"):
        model_class.from_pretrained(tmp_path)


def test_keys_of_the_module_are_checked(make_config, tmp_path):
    own_model(make_config, Mixer()).save_pretrained(tmp_path)
    for strict in (True, False):  # the model cannot initialise weights of a module that it does not know
        with pytest.raises(ValueError, match=r"vision_tower\.encoder\.layers\.1"):
            UmbrellaForConditionalGeneration.from_pretrained(tmp_path, vision_encoder=Mixer(depth=2), strict=strict)


def test_a_registered_module_is_built_by_its_name(make_config, registered, tmp_path):
    entries = {"model_type": "umbrella_vision_encoder", "encoder": "mixer", "options": {"depth": 2}}
    model = UmbrellaForConditionalGeneration(make_config(vision_config=entries)).eval()
    assert model.config.vision_config.hidden_size == 16
    assert len(model.model.vision_tower.encoder.layers) == 2
    model.save_pretrained(tmp_path)
    loaded = UmbrellaForConditionalGeneration.from_pretrained(tmp_path)
    volumes = {"T1": torch.randn(2, 1, 8, 8, 8)}
    with torch.no_grad():
        expected = model.model.vision_tower(volumes).features["T1"]
        assert torch.equal(loaded.model.vision_tower(volumes).features["T1"], expected)


def test_an_unknown_name_lists_the_registered_ones(registered):
    with pytest.raises(ValueError, match=r"'mixr'.*registered: mixer"):
        load_vision_encoder(OwnEncoderConfig(encoder="mixr"), feature_layer=None)
    with pytest.raises(ValueError, match="hidden_size is 8"):
        load_vision_encoder(OwnEncoderConfig(encoder="mixer", hidden_size=8), feature_layer=None)


def test_a_parameter_with_two_names_is_rejected_before_it_cannot_be_saved():
    module = Mixer(named=True)
    module.again = module.layers[0]
    with pytest.raises(ValueError, match=r"'Mixer' has parameters under several names \(again\.0\.weight"):
        load_vision_encoder(module, feature_layer=None)
