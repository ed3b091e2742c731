"""The trainable model: LLaVA with scans of several modalities in one conversation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PretrainedConfig, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from umbrella_model.backbone import UmbrellaModel, UmbrellaPreTrainedModel
from umbrella_model.config import PatchEmbedConfig, UmbrellaConfig
from umbrella_model.from_llava import load_llava
from umbrella_model.from_parts import compose_parts
from umbrella_model.generation import check_generation, check_keeps_cache
from umbrella_model.hf_compat import CACHE, tie_head
from umbrella_model.language_model import LanguageModelSource, build_head, scale_logits
from umbrella_model.lora import LoraSettings, add_lora
from umbrella_model.supervision import gather_supervised
from umbrella_model.supervision import supervised_index as compute_supervised_index
from umbrella_model.vision_encoder import LoadedEncoder


@dataclass
class UmbrellaCausalLMOutput(LlavaCausalLMOutputWithPast):
    """LLaVA's output with the dummy term of each modality that is absent from a training batch.

    Attributes:
        logits: Shape (B, L, vocabulary); None if only supervised positions were computed.
        supervised_logits: Shape (K, vocabulary), for the positions whose next token has a label.
        dummy_terms: 0-dim float32 tensors, sum / sqrt(N) over the N trainable elements of each absent patch embed.
    """

    supervised_logits: Tensor | None = None
    dummy_terms: dict[str, Tensor] | None = None


class UmbrellaForConditionalGeneration(UmbrellaPreTrainedModel, LlavaForConditionalGeneration):
    """Vision tower, projector, language model and language-model head, for training and generation."""

    # Without it, Hugging Face's Trainer infers it from the signature, and wrongly: the gradient would be 4 times too
    # large with 4 accumulation steps.
    accepts_loss_kwargs = True

    def __init__(self, config: UmbrellaConfig, *, vision_encoder: nn.Module | None = None) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.loss_type = "ForCausalLM"  # the base class infers another type from the name of this class
        self.model = UmbrellaModel(config, vision_encoder=vision_encoder)
        self.lm_head = build_head(config.text_config)
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        tie_head(self, f"model.{name}.weight")
        self.post_init()
        if config.lora is not None:
            settings = dict(config.lora)
            add_lora(self, settings.pop("parts"), LoraSettings(**settings))

    @classmethod
    def from_parts(
        cls,
        *,
        language_model: LanguageModelSource,
        vision_encoder: LoadedEncoder | nn.Module | PretrainedConfig | str | Path,
        modalities: Mapping[str, PatchEmbedConfig],
        tokenizer: PreTrainedTokenizerBase | None = None,
        projector: Literal["mlp", "linear"] = "mlp",
        init: Literal["inflate", "random"] = "inflate",
        vision_feature_layer: int | None = None,
        vision_num_heads: int | None = None,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
    ) -> Self:
        """Composes a model from any language model and any vision encoder; projector and patch embeds are new.

        Args:
            language_model: A decoder that `AutoModelForCausalLM` loads: a loaded model (its weights are not copied), a
                folder, a name on the hub, a config (random weights), or a GGUF file (needs the package gguf).
            vision_encoder: A SigLIP, SigLIP 2, CLIP, DINOv2, ViT or ViT-MAE model of transformers, as a loaded model, a
                folder, a name on the hub or a config (random weights); a `ViT` of MONAI, loaded or a file with its
                state dict; any module from tokens (N, L, D) to (N, L, D); or what `load_vision_encoder` returned.
            modalities: Patch embed configuration of each modality, in the order of the tags.
            tokenizer: Of the language model. If it has no image token, `<|image|>` is added, and without a chat
                template it gets ChatML, with a warning; both change it in place. The embeddings get rows only for ids
                that have none. Without a tokenizer, the image token is a new row at the end.
            projector: `mlp` has two layers as in LLaVA-1.5, `linear` one.
            init: `inflate` initialises the patch embeds from the encoder's own filter and positions, if it has any;
                `random` at random.
            vision_feature_layer: The encoder layer whose output goes to the projector: an entry of Hugging Face's
                `hidden_states` (0 is the embeddings, -1 the last layer), before the final norm. None for the encoder's
                own output, after its final norm.
            vision_num_heads: Attention heads of the encoder in a file with a state dict, which does not say it.
            dtype: Of all weights; None for that of the language model.
            attn_implementation: Attention of the language model; None for its own.

        Returns:
            The model, an instance of the class that the method is called on, in eval mode.

        Raises:
            ValueError: An argument is unknown or out of range, or a part cannot be used: an encoder-decoder, a language
                model that ignores `inputs_embeds`, an unsupported encoder, scans of more tokens than the language model
                has positions.
            OSError: A folder, file or hub repository does not exist.
        """
        return compose_parts(
            cls,
            language_model=language_model,
            vision_encoder=vision_encoder,
            modalities=modalities,
            tokenizer=tokenizer,
            projector=projector,
            init=init,
            vision_feature_layer=vision_feature_layer,
            vision_num_heads=vision_num_heads,
            dtype=dtype,
            attn_implementation=attn_implementation,
        )

    @classmethod
    def from_llava(
        cls,
        name_or_path: str,
        *,
        modalities: Mapping[str, PatchEmbedConfig],
        init: Literal["inflate", "random"] = "inflate",
        vision_feature_layer: int | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Loads encoder layers, projector and language model of a pretrained LLaVA, and adds new patch embeds.

        The names of kept, dropped and new tensors are logged at INFO.

        Args:
            name_or_path: A LLaVA, LLaVA-NeXT or LLaVA-OneVision checkpoint with a SigLIP or CLIP tower.
            modalities: Patch embed configuration of each modality, in the order of the tags.
            init: `inflate` initialises the patch embeds from the checkpoint's 2-D filter and positions, `random` at
                random.
            vision_feature_layer: The encoder layer whose output goes to the projector, as in LlavaConfig (0 is the
                embeddings, -1 the last layer); later layers are dropped. None for that of the checkpoint.
            strict: Whether missing and unexpected tensors raise an error. Tensors that are dropped may be missing.
            **kwargs: For `LlavaForConditionalGeneration.from_pretrained` (attn_implementation, dtype, ...; the default
                dtype is that of the checkpoint).

        Returns:
            The model, an instance of the class that the method is called on, in eval mode.

        Raises:
            ValueError: Before any weight is read: an unknown `init`, invalid modalities, another kind of checkpoint, or
                a feature layer out of range. With `strict`: the checkpoint's tensors do not match a LLaVA's; the
                message lists all of them.
        """
        return load_llava(
            cls,
            name_or_path,
            modalities=modalities,
            init=init,
            vision_feature_layer=vision_feature_layer,
            strict=strict,
            **kwargs,
        )

    def num_image_tokens(self, modality: str) -> int:
        """Number of tokens, and of positions in `input_ids`, of one scan of a modality."""
        return self.model.vision_tower.patch_embed(modality).config.num_tokens

    def dummy_sizes(self) -> dict[str, int]:
        """Number N of trainable elements of each patch embed; frozen patch embeds are omitted."""
        sizes = {
            name: sum(p.numel() for p in self.model.vision_tower.patch_embed(name).parameters() if p.requires_grad)
            for name in self.model.vision_tower.modality_order
        }
        return {name: size for name, size in sizes.items() if size}

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Hugging Face's `resize_token_embeddings`.

        Raises:
            ValueError: The embeddings have adapters, which cannot be resized.
        """
        if self.config.lora is not None and "embeddings" in self.config.lora["parts"]:
            raise ValueError(
                "the embeddings have LoRA adapters of the old size; resize them before set_trainable, or call "
                "merge_lora first"
            )
        table: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        return table

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        modality_ids: Tensor | None = None,
        pixel_values: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        supervised_index: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> UmbrellaCausalLMOutput:
        """Forward pass on a batch of `umbrella_data.PaddingCollator`, or on tensors of the same form.

        Args:
            input_ids: Shape (B, L), with the image token at the positions of scans.
            attention_mask: Shape (B, L).
            position_ids: Shape (B, L).
            past_key_values: Cache of earlier positions during generation.
            inputs_embeds: Shape (B, L, H), instead of `input_ids`.
            modality_ids: Shape (B, L); 0 is text, i+1 the i-th modality.
            pixel_values: For each modality present, shape (N_m, C, X, Y, Z) or (N_m, C, X, Y, Z, T).
            labels: Shape (B, L), -100 at positions without loss.
            supervised_index: From `umbrella_model.supervised_index(labels)`; logits are then computed only at these
                positions. In training on the CPU it is computed from `labels` if missing; on a GPU that would need a
                synchronisation, so all logits are computed.
            logits_to_keep: As in Hugging Face's models: number of last positions to compute logits for (0 is all).
            cache: The name of `past_key_values` in newer versions of transformers.
            **kwargs: For the language model and the loss (`num_items_in_batch`).

        Returns:
            Loss, logits and, in training, the dummy terms of absent modalities. With `supervised_index`, `logits` is
            None and `supervised_logits` is set.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            modality_ids=modality_ids,
            pixel_values=pixel_values,
            **kwargs,
        )
        if labels is not None and self.training and supervised_index is None and labels.device.type == "cpu":
            supervised_index = compute_supervised_index(labels)
        if labels is not None and supervised_index is not None:
            head: dict[str, Any] = self._supervised_head(outputs.last_hidden_state, labels, supervised_index, **kwargs)
        else:
            head = self._whole_head(outputs.last_hidden_state, labels, logits_to_keep, **kwargs)
        head[CACHE] = getattr(outputs, CACHE)
        return UmbrellaCausalLMOutput(
            **head,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            dummy_terms=outputs.dummy_terms,
        )

    def _supervised_head(
        self, hidden_states: Tensor, labels: Tensor, supervised_index: Tensor, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Logits and loss at supervised positions only."""
        chosen, targets = gather_supervised(hidden_states, labels, supervised_index)
        logits = scale_logits(self.lm_head(chosen), self.config.text_config)
        return {"supervised_logits": logits, "loss": self._loss(logits, shift_labels=targets, **kwargs)}

    def _whole_head(
        self, hidden_states: Tensor, labels: Tensor | None, logits_to_keep: int | Tensor, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Logits at all positions or the last `logits_to_keep`, and the loss if there are labels."""
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = scale_logits(self.lm_head(hidden_states[:, keep, :]), self.config.text_config)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": self._loss(logits, labels=labels, **kwargs)}

    def _loss(self, logits: Tensor, *, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        loss: Tensor = self.loss_function(
            logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
        )
        return loss

    @torch.no_grad()
    def generate(  # type: ignore[override]  # Hugging Face names the first argument "inputs"
        self,
        input_ids: Tensor,
        *,
        modality_ids: Tensor | None = None,
        pixel_values: Mapping[str, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> Any:
        """Hugging Face's `generate` for conversations with scans.

        The scans are encoded once and passed as embeddings, which beam search and `num_return_sequences` expand
        together with the rows.

        Args:
            input_ids: Shape (B, L), padded on the left.
            modality_ids: Shape (B, L).
            pixel_values: Volumes of each modality present.
            attention_mask: Shape (B, L).
            labels: Ignored, so that a collator's batch can be passed as it is.
            **kwargs: For `GenerationMixin.generate`.

        Returns:
            Prompt and new tokens, shape (B * num_return_sequences, L + new).

        Raises:
            ValueError: Right padding, several prompts without a mask, an option that does not work with scans (assisted
                decoding, guidance, `use_cache=False`, a given cache), also in the model's `generation_config`, or train
                mode with activation checkpointing.
        """
        check_generation(input_ids, attention_mask, kwargs, default_config=self.generation_config)
        check_keeps_cache(self.model.language_model)
        inputs_embeds, _ = self.model.embed(input_ids, modality_ids=modality_ids, pixel_values=pixel_values)
        decode: Any = super().generate  # type: ignore[misc]  # its self is annotated with a Protocol
        return decode(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
