"""Training steps of the whole model against Hugging Face's LLaVA and a merge loop, on the same weights and data.

    uv run python tools/bench_step.py                                         # small widths, real numbers of tokens
    uv run python tools/bench_step.py --device cuda --size 0.5b --batch-size 32
    uv run python tools/bench_step.py --size tiny --batch-size 2 --pool 4 --repeats 1         # a dry run

A step is forward and backward; the optimiser's part is the same for all and left out. All contenders of a section take
turns, after a check that their losses are equal, and medians are compared. Sections:

    T1, rsfMRI   one scan and 100 words a sample, 24 of them supervised, with each preset of what learns
    mixed        samples of 250 to 2,344 tokens: by length and packed, against random batches of 8 with dynamic padding
    logits       memory of the logits with a vocabulary of 151,936: at all positions, and at the supervised ones

MFU is floating point operations that the step needs / (seconds * peak), counted without padding and recomputation:

    linear layers    2 * weights * tokens in forward; as much again in backward for the gradient of the input, where
                     anything before learns, and as much again for the gradient of the weights, where they learn
    attention        4 * length^2 * width a layer in forward (half of it in the causal one), twice that in backward

The peak is the card's dense bfloat16 rate, or what a large matrix product reaches here where the card is not known.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from umbrella_model import (
    PatchEmbedConfig,
    UmbrellaConfig,
    UmbrellaForConditionalGeneration,
    pack_batch,
    set_trainable,
    supervised_index,
)
from umbrella_model.parts import named_part_parameters

NUM_WORDS, NUM_SUPERVISED, VOCABULARY, FILL = 100, 24, 151_936, 0
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
# Widths of the vision encoder and of the language model, and the voxels along X, Y and Z.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"vision": (32, 64, 2, 2), "text": (32, 64, 2, 2, 1), "vocabulary": 512, "image": 16, "patch": 8},
    "toy": {"vision": (192, 768, 4, 4), "text": (256, 1024, 4, 4, 2), "vocabulary": 8192, "image": 96, "patch": 16},
    "0.5b": {
        "vision": (1152, 4304, 27, 16), "text": (896, 4864, 24, 14, 2), "vocabulary": VOCABULARY, "image": 96,
        "patch": 16,
    },
}  # fmt: skip
Batch = dict[str, Any]


def main() -> None:
    """Run the sections and print a table."""
    options = parse_options()
    peak = options.peak_tflops or find_peak(options)
    print(
        f"torch {torch.__version__}  transformers {transformers.__version__}  python {platform.python_version()}  "
        f"{options.device}, {options.dtype}, size {options.size}; peak {peak:.3g} TFLOP/s",
        flush=True,
    )
    figures: list[dict[str, Any]] = []
    for section in options.sections:
        for figure in SECTIONS[section](section, options, peak):
            print("  ".join(f"{key} {_shown(value)}" for key, value in figure.items()), flush=True)
            figures.append(figure)
    if options.json is not None:
        settings = {key: str(value) for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({"settings": settings, "figures": figures}, indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="default: bfloat16 on a GPU")
    parser.add_argument("--size", choices=tuple(SIZES), default="toy")
    parser.add_argument("--presets", nargs="+", default=["full", "align", "patch_embed_only"])
    parser.add_argument("--batch-size", type=int, default=4, help="samples a step of the T1 and rsfMRI sections")
    parser.add_argument("--pool", type=int, default=32, help="samples of the mixed section")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, default=None)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here as well")
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    return options


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- models ----


def build_model(options: argparse.Namespace) -> UmbrellaForConditionalGeneration:
    """Our model with random weights."""
    torch.manual_seed(0)
    size = SIZES[options.size]
    image, patch = (size["image"],) * 3, (size["patch"],) * 3
    config = UmbrellaConfig(
        modalities={"T1": PatchEmbedConfig(image, patch), "rsfMRI": PatchEmbedConfig((*image, 24), (*patch, 3))},
        vision_config=_vision_config(size),
        text_config=_text_config(size),
        image_token_index=size["vocabulary"] - 1,
    )
    model = UmbrellaForConditionalGeneration(config).to(options.device, getattr(torch, options.dtype)).train()
    # The kernel for packed rows is the GPU's; on a CPU the plain path is as fast.
    model.set_attn_implementation("varlen" if options.device == "cuda" else "sdpa")
    return model


def _vision_config(size: dict[str, Any]) -> PretrainedConfig:
    width, inner, layers, heads = size["vision"]
    return SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vision_use_head=False,
    )


def _text_config(size: dict[str, Any]) -> PretrainedConfig:
    width, inner, layers, heads, key_heads = size["text"]
    return Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=size["vocabulary"],
        tie_word_embeddings=True,
        pad_token_id=FILL,
    )


class ConvEmbeddings(nn.Module):
    """What a plain port of LLaVA to volumes does: `Conv3d` in place of `Conv2d`; frames of a patch as channels."""

    def __init__(self, patch_embed: Any) -> None:
        super().__init__()
        patch = patch_embed.config.patch_size
        weight = patch_embed.proj.weight.detach().reshape(-1, 1, *patch)
        self.frames = patch[3] if len(patch) > 3 else 0
        if self.frames:
            weight = weight.permute(0, 1, 5, 2, 3, 4).flatten(1, 2)
        self.conv = nn.Conv3d(weight.shape[1], len(weight), kernel_size=patch[:3], stride=patch[:3])
        self.conv.to(weight.device, weight.dtype)
        with torch.no_grad():
            self.conv.weight.copy_(weight)
            assert self.conv.bias is not None
            self.conv.bias.copy_(patch_embed.proj.bias)
        self.position_embedding = nn.Parameter(patch_embed.position_embedding.detach().clone())

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = None) -> Tensor:  # noqa: ARG002
        """Tokens (N, P, H) of volumes (N, 1, X, Y, Z[, T]); the signature is the encoder's."""
        num_scans = len(pixel_values)
        if self.frames:
            windows = pixel_values.unflatten(-1, (-1, self.frames)).permute(0, 5, 1, 6, 2, 3, 4)
            pixel_values = windows.flatten(2, 3).flatten(0, 1)
        tokens = self.conv(pixel_values).flatten(2).transpose(1, 2).unflatten(0, (num_scans, -1))
        return tokens.transpose(1, 2).flatten(1, 2) + self.position_embedding


def build_llava(model: UmbrellaForConditionalGeneration, modality: str) -> LlavaForConditionalGeneration:
    """Hugging Face's own LLaVA with our weights, `Conv3d` patches and its own attention; for one modality."""
    config = LlavaConfig(
        vision_config=model.config.vision_config.to_dict(),
        text_config=model.config.text_config.to_dict(),
        image_token_index=model.config.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    parameter = next(model.parameters())
    llava = LlavaForConditionalGeneration(config).train()
    llava.to(device=parameter.device, dtype=parameter.dtype)
    ours = model.model
    llava.model.vision_tower.encoder.load_state_dict(ours.vision_tower.encoder.encoder.state_dict())
    llava.model.multi_modal_projector.load_state_dict(ours.multi_modal_projector.state_dict())
    llava.model.language_model.load_state_dict(ours.language_model.state_dict())
    llava.model.vision_tower.embeddings = ConvEmbeddings(ours.vision_tower.patch_embed(modality))
    learns = {part: parameter.requires_grad for part, _, parameter in named_part_parameters(model)}
    for name, parameter in llava.named_parameters():
        parameter.requires_grad_(learns[_part_in_llava(name)] and "post_layernorm" not in name)
    return llava


def _part_in_llava(name: str) -> Any:
    if "vision_tower.embeddings" in name:
        return "patch_embed"
    if "vision_tower" in name:
        return "vision_tower"
    if "projector" in name:
        return "projector"
    return "embeddings" if "embed_tokens" in name or "lm_head" in name else "language_model"


def merge_loop_loss(llava: LlavaForConditionalGeneration, batch: Batch, volumes: Tensor) -> Tensor:
    """The step as earlier code wrote it: sample by sample through the tower, pieces joined, rows padded, all logits."""
    rows, labels = [], []
    image_id = llava.config.image_token_id
    for all_ids, mask, all_labels, volume in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], volumes, strict=True
    ):
        ids, row_labels = all_ids[mask.bool()], all_labels[mask.bool()]
        hidden = llava.model.vision_tower(volume[None], output_hidden_states=True).hidden_states[-1]
        features = llava.model.multi_modal_projector(hidden)[0]
        start = int((ids == image_id).nonzero()[0])
        before, after = ids[:start], ids[start + len(features) :]
        embed = llava.get_input_embeddings()
        rows.append(torch.cat([embed(before), features.to(embed.weight.dtype), embed(after)]))
        labels.append(row_labels)
    embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    targets = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    logits = llava(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


# ---- data ----


def make_sample(model: UmbrellaForConditionalGeneration, modality: str, *, num_words: int, seed: int) -> Batch:
    """One conversation of a scan and words, the last of which are supervised; on the host."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = model.num_image_tokens(modality)
    words = torch.randint(1, model.config.text_config.vocab_size - 1, (num_words,), generator=generator)
    image = torch.full((num_tokens,), model.config.image_token_id)
    tag = list(model.config.patch_embeds).index(modality) + 1
    config = model.config.patch_embeds[modality]
    return {
        "modality": modality,
        "input_ids": torch.cat([words[:4], image, words[4:]]),
        "modality_ids": torch.cat([torch.zeros(4), torch.full((num_tokens,), tag), torch.zeros(num_words - 4)]).long(),
        "labels": torch.cat([torch.full((num_tokens + num_words - NUM_SUPERVISED,), -100), words[-NUM_SUPERVISED:]]),
        "volume": torch.randn(config.in_channels, *config.image_size, generator=generator),
    }


def collate(samples: list[Batch], options: argparse.Namespace, *, packed: bool = False) -> Batch:
    """A padded or packed batch on the device, as a loader hands it over."""
    batch: Batch = {}
    for key, value in (("input_ids", FILL), ("modality_ids", 0), ("labels", -100)):
        rows = [sample[key] for sample in samples]
        batch[key] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    batch["supervised_index"] = supervised_index(batch["labels"])
    names = dict.fromkeys(sample["modality"] for sample in samples)
    volumes = {n: torch.stack([s["volume"] for s in samples if s["modality"] == n]) for n in names}
    batch["pixel_values"] = volumes
    if packed:
        batch = pack_batch(batch)
    dtype = getattr(torch, options.dtype)
    moved = {key: value.to(options.device) for key, value in batch.items() if isinstance(value, Tensor)}
    pixel_values = {name: volume.to(options.device, dtype) for name, volume in volumes.items()}
    return {**batch, **moved, "pixel_values": pixel_values}


# ---- sections ----


def one_modality(modality: str, options: argparse.Namespace, peak: float) -> Iterable[dict[str, Any]]:
    """Ours against Hugging Face's forward and the merge loop."""
    for preset in options.presets:
        model = build_model(options)
        set_trainable(model, preset)
        llava = build_llava(model, modality)
        samples = [make_sample(model, modality, num_words=NUM_WORDS, seed=i) for i in range(options.batch_size)]
        padded = collate(samples, options)
        ours = collate(samples, options, packed=options.device == "cuda")
        volumes = padded["pixel_values"][modality]
        theirs = {key: padded[key] for key in ("input_ids", "attention_mask", "labels")}
        losses: dict[str, Callable[[], Tensor]] = {
            "ours": lambda m=model, b=ours: _our_loss(m, b),  # type: ignore[misc]
            "HF LLaVA": lambda m=llava, b=theirs, v=volumes: m(**b, pixel_values=v).loss,  # type: ignore[misc]
            "merge loop": lambda m=llava, b=theirs, v=volumes: merge_loop_loss(m, b, v),  # type: ignore[misc]
        }
        check_equal(losses, options)
        flops = count_flops(model, samples)
        num_tokens = sum(len(sample["input_ids"]) for sample in samples)
        results = take_turns({name: _step(loss) for name, loss in losses.items()}, options)
        for name, (seconds, memory) in results.items():
            yield {
                "section": modality, "preset": preset, "step": name, "ms": 1000 * seconds,
                "tokens/s": num_tokens / seconds, "MFU": flops / seconds / peak / 1e12, "peak GiB": memory,
                "ours is faster by": seconds / results["ours"][0],
            }  # fmt: skip


def _our_loss(model: UmbrellaForConditionalGeneration, batch: Batch) -> Tensor:
    out = model(**batch)
    loss: Tensor = out.loss
    for term in (out.dummy_terms or {}).values():
        loss = loss + 1e-7 * term
    return loss


def mixed(section: str, options: argparse.Namespace, peak: float) -> Iterable[dict[str, Any]]:
    """All samples once: in random batches of 8, by length within a token budget, and packed."""
    model = build_model(options)
    shuffled = random.Random(0)
    samples = []
    for i in range(options.pool):
        modality = ("T1", "rsfMRI")[i % 2]
        # 216 + 34 to 1,728 + 616.
        samples.append(make_sample(model, modality, num_words=shuffled.randint(34, 616), seed=i))
    shuffled.shuffle(samples)
    num_tokens = sum(len(sample["input_ids"]) for sample in samples)
    budget = 8 * num_tokens // len(samples)
    by_length = sorted(samples, key=lambda sample: len(sample["input_ids"]))
    plans = {
        "random batches of 8": [collate(samples[i : i + 8], options) for i in range(0, len(samples), 8)],
        "by length": [collate(group, options) for group in within_budget(by_length, budget, is_padded=True)],
        "packed": [collate(group, options, packed=True) for group in within_budget(samples, budget, is_padded=False)],
    }
    flops = count_flops(model, samples)

    def epoch(batches: list[Batch], *, attention: str) -> Callable[[], None]:
        def run() -> None:
            model.set_attn_implementation(attention)
            for batch in batches:
                model.zero_grad(set_to_none=True)
                _our_loss(model, batch).backward()

        return run

    plain = "sdpa"
    steps = {name: epoch(batches, attention="varlen" if name == "packed" else plain) for name, batches in plans.items()}
    results = take_turns(steps, options)
    for name, (seconds, memory) in results.items():
        yield {
            "section": section, "batches": name, "ms": 1000 * seconds, "useful tokens/s": num_tokens / seconds,
            "useful": num_tokens / sum(batch["input_ids"].numel() for batch in plans[name]),
            "MFU": flops / seconds / peak / 1e12, "peak GiB": memory,
            "faster than random by": results["random batches of 8"][0] / seconds,
        }  # fmt: skip


def within_budget(samples: list[Batch], budget: int, *, is_padded: bool) -> list[list[Batch]]:
    """Neighbours in batches of at most `budget` computed tokens."""
    groups: list[list[Batch]] = [[]]
    for sample in samples:
        lengths = [len(other["input_ids"]) for other in [*groups[-1], sample]]
        cost = max(lengths) * len(lengths) if is_padded else sum(lengths)
        if groups[-1] and cost > budget:
            groups.append([])
        groups[-1].append(sample)
    return groups


def logits(section: str, options: argparse.Namespace, peak: float) -> Iterable[dict[str, Any]]:  # noqa: ARG001
    """Head and loss of T1 samples: at every position, and at the supervised ones."""
    model = build_model(options)
    width = model.config.text_config.hidden_size
    dtype = getattr(torch, options.dtype)
    head = nn.Linear(width, VOCABULARY, bias=False).to(options.device, dtype)
    sample = make_sample(model, "T1", num_words=NUM_WORDS, seed=0)
    length = len(sample["input_ids"])
    for name, positions in (("all positions", length), ("supervised positions", NUM_SUPERVISED)):
        hidden = torch.randn(positions, width, device=options.device, dtype=dtype, requires_grad=True)
        targets = torch.randint(VOCABULARY, (positions,), device=options.device)
        made: list[Tensor] = []

        def run(h: Tensor = hidden, t: Tensor = targets, made: list[Tensor] = made) -> None:
            out = head(h)
            made[:] = [out.detach()]
            F.cross_entropy(out.float(), t).backward()

        ((seconds, memory),) = take_turns({name: run}, options).values()
        size = made[0].numel() * made[0].element_size() / 2**20
        yield {"section": section, "logits": name, "ms": 1000 * seconds, "MiB a sample": size, "peak GiB": memory}


SECTIONS: dict[str, Callable[[str, argparse.Namespace, float], Iterable[dict[str, Any]]]] = {
    "T1": one_modality,
    "rsfMRI": one_modality,
    "mixed": mixed,
    "logits": logits,
}


# ---- measuring ----


def check_equal(losses: dict[str, Callable[[], Tensor]], options: argparse.Namespace) -> None:
    """All contenders compute the same loss, or the comparison means nothing."""
    values = {name: float(loss().detach()) for name, loss in losses.items()}
    if max(values.values()) - min(values.values()) > (0.05 if options.dtype == "bfloat16" else 1e-3):
        raise SystemExit(f"the losses differ: {values}")


def _step(loss: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: loss().backward()


def take_turns(
    steps: dict[str, Callable[[], None]], options: argparse.Namespace
) -> dict[str, tuple[float, float | None]]:
    """Median seconds of each after one unmeasured turn, and on a GPU the peak of its memory in GiB."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    memory: dict[str, float | None] = dict.fromkeys(steps)
    for turn in range(options.repeats + 1):
        for name, run in steps.items():
            if options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if options.device == "cuda":
                torch.cuda.synchronize()
                memory[name] = torch.cuda.max_memory_allocated() / 2**30
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(values), memory[name]) for name, values in seconds.items()}


def count_flops(model: UmbrellaForConditionalGeneration, samples: list[Batch]) -> float:
    """Operations of a forward and backward, by the formula at the top of this file."""
    weights: dict[str, int] = dict.fromkeys(("vision_tower", "projector", "language_model"), 0)
    learns: dict[str, bool] = {}
    for part, _, parameter in named_part_parameters(model):
        learns[part] = learns.get(part, False) or parameter.requires_grad
        if part in weights and parameter.ndim == 2:
            weights[part] += parameter.numel()
    vision, text = model.config.vision_config, model.config.text_config
    before_vision = learns["patch_embed"]
    before_projector = before_vision or learns["vision_tower"]
    before_text = before_projector or learns["projector"] or learns["embeddings"]
    total = 0.0
    for sample in samples:
        config, length = model.config.patch_embeds[sample["modality"]], len(sample["input_ids"])
        patches, tokens = config.num_patches, config.num_tokens
        embed = 2.0 * config.patch_elements * vision.hidden_size * patches
        total += embed * (1 + learns["patch_embed"])
        total += _linear(weights["vision_tower"] * patches, before=before_vision, learns=learns["vision_tower"])
        attended = 4.0 * patches**2 * vision.hidden_size * vision.num_hidden_layers
        total += attended * (3 if before_projector else 1)
        total += _linear(weights["projector"] * tokens, before=before_projector, learns=learns["projector"])
        total += _linear(weights["language_model"] * length, before=before_text, learns=learns["language_model"])
        total += 2.0 * length**2 * text.hidden_size * text.num_hidden_layers * (3 if before_text else 1)
        head = text.vocab_size * text.hidden_size * NUM_SUPERVISED
        total += _linear(head, before=before_text or learns["language_model"], learns=learns["embeddings"])
    return total


def _linear(products: float, *, before: bool, learns: bool) -> float:
    return 2.0 * products * (1 + before + learns)


def find_peak(options: argparse.Namespace) -> float:
    """TFLOP/s: of the card by its name, or of a large matrix product here and now."""
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
        for card, peak in PEAK_TFLOPS.items():
            if card in name and options.dtype == "bfloat16":
                return peak
    side = 8192 if options.device == "cuda" else 2048
    matrix = torch.randn(side, side, device=options.device, dtype=getattr(torch, options.dtype))
    best = min(seconds for seconds, _ in (take_turns({"": lambda: matrix @ matrix}, options)[""] for _ in range(3)))  # type: ignore[dict-item]
    return 2.0 * side**3 / best / 1e12


if __name__ == "__main__":
    main()
