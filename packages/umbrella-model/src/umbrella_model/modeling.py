"""UMBRELLA on Hugging Face's LLaVA: scans of several modalities in one conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import Cache

from umbrella_model.backbone import UmbrellaModel, UmbrellaPreTrainedModel
from umbrella_model.config import PatchEmbedConfig, UmbrellaConfig
from umbrella_model.from_llava import load_llava
from umbrella_model.generation import check_generation, check_keeps_cache
from umbrella_model.hf_compat import CACHE
from umbrella_model.lora import LoraSettings, add_lora
from umbrella_model.outputs import UmbrellaCausalLMOutput
from umbrella_model.supervision import gather_supervised
from umbrella_model.supervision import supervised_index as find_supervised


class UmbrellaForConditionalGeneration(UmbrellaPreTrainedModel, LlavaForConditionalGeneration):
    """The model to train and to ask: vision tower, projector, language model and its head."""

    # Hugging Face's Trainer guesses both from the signature otherwise, and guesses wrongly (4 times the gradient at 4
    # accumulation steps).
    accepts_loss_kwargs = True

    def __init__(self, config: UmbrellaConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.loss_type = "ForCausalLM"  # the base class has just guessed another from the name of this one
        self.model = UmbrellaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        if config.lora is not None:
            settings = dict(config.lora)
            add_lora(self, settings.pop("parts"), LoraSettings(**settings))

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
        """Starts from a pretrained LLaVA: its encoder layers, projector and language model, with new patch embeds.

        Args:
            name_or_path: A LLaVA, LLaVA-NeXT or LLaVA-OneVision checkpoint with a SigLIP or CLIP tower.
            modalities: Patch embeds by modality; their order is the order of the tags.
            init: `inflate` starts the patch embeds from the checkpoint's 2-D filter and positions, `random` from
                nothing.
            vision_feature_layer: The encoder layer whose output goes to the projector, as in LlavaConfig (0 is the
                embeddings, -1 the last layer); layers behind it are dropped. None: as the checkpoint says.
            strict: Whether tensors that the checkpoint lacks, or that a LLaVA has not, are an error. Those that would
                be dropped may be absent.
            **kwargs: For `LlavaForConditionalGeneration.from_pretrained` (attn_implementation, ...; dtype, by
                default the one that the checkpoint was saved in).

        Returns:
            The model; what was kept and what replaced is logged.

        Raises:
            ValueError: With `strict`, the checkpoint's tensors are not those of a LLaVA, or have another shape; all
                that differ are named.
                Before any weight is read: an unknown `init`, modalities that no model can have, another kind of
                checkpoint, or a feature layer that the encoder has not.
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
        """Tokens, and so positions in `input_ids`, of one scan of a modality."""
        return self.model.vision_tower.patch_embed(modality).config.num_tokens

    def dummy_sizes(self) -> dict[str, int]:
        """Trainable elements N of each modality's patch embed, frozen ones left out."""
        sizes = {
            name: sum(p.numel() for p in self.model.vision_tower.patch_embed(name).parameters() if p.requires_grad)
            for name in self.model.vision_tower.modality_order
        }
        return {name: size for name, size in sizes.items() if size}

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Hugging Face's `resize_token_embeddings`.

        Raises:
            ValueError: The table and the head have adapters, whose shapes would not follow.
        """
        if self.config.lora is not None and "embeddings" in self.config.lora["parts"]:
            raise ValueError(
                "the token table and the head have adapters of the old size: resize before set_trainable adds them, or "
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
        """One step on a batch of `umbrella_data.PaddingCollator`, or on tensors of the same form.

        Args:
            input_ids: Shape (B, L); the image token stands at scan positions.
            attention_mask: Shape (B, L).
            position_ids: Shape (B, L).
            past_key_values: Cache of earlier positions, when generating; `cache` is its name in newer transformers.
            inputs_embeds: Shape (B, L, H), in place of `input_ids`.
            modality_ids: Shape (B, L); 0 is text, i+1 the i-th modality.
            pixel_values: For each modality present, shape (N_m, C, X, Y, Z) or (N_m, C, X, Y, Z, T).
            labels: Shape (B, L), -100 where no loss is taken.
            supervised_index: Positions that carry loss, from `umbrella_model.supervised_index(labels)`; logits are then
                computed at these alone. A model that trains on the CPU finds them itself; on a GPU it would have to
                wait for the device, and computes all logits without them.
            logits_to_keep: As in Hugging Face's models: how many last positions get logits (0 is all).
            cache: The same as `past_key_values`.
            **kwargs: For the language model and the loss (`num_items_in_batch`).

        Returns:
            Loss, logits and, while training, the dummy terms of absent modalities. Where only supervised positions
            were computed, `logits` is None and `supervised_logits` has them.
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
            supervised_index = find_supervised(labels)
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
        """Logits and loss at the positions that carry loss alone."""
        chosen, targets = gather_supervised(hidden_states, labels, supervised_index)
        logits = self.lm_head(chosen)
        return {"supervised_logits": logits, "loss": self._loss(logits, shift_labels=targets, **kwargs)}

    def _whole_head(
        self, hidden_states: Tensor, labels: Tensor | None, logits_to_keep: int | Tensor, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Logits at all positions, or those to keep, and a loss where there are labels."""
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, keep, :])
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": self._loss(logits, labels=labels, **kwargs)}

    def _loss(self, logits: Tensor, *, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        loss: Tensor = self.loss_function(
            logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
        )
        return loss

    @torch.no_grad()
    def generate(  # type: ignore[override]  # Hugging Face calls the first argument "inputs", and takes any other
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

        The scans are encoded once and handed on as embeddings, so that beams and several returned sequences expand
        them with their rows.

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
            ValueError: Padding on the right, several prompts without a mask, an option that does not work with scans
                (assisted decoding, guidance, no cache or one of one's own), also in the model's `generation_config`, or
                train mode with activation checkpointing.
        """
        check_generation(input_ids, attention_mask, kwargs, default_config=self.generation_config)
        check_keeps_cache(self.model.language_model)
        inputs_embeds, _ = self.model.embed(input_ids, modality_ids=modality_ids, pixel_values=pixel_values)
        decode: Any = super().generate  # type: ignore[misc]  # its self is a Protocol that no model class fulfils
        return decode(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
