"""The processor next to a model's weights: conversations with scan files -> model inputs, and token ids -> text.

    messages, paths -> pipelines -> volumes
                    -> tokens    -> the batch that `umbrella_data.PaddingCollator` makes

Importing this module registers it with Hugging Face's `AutoProcessor`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

from umbrella_data import Example, ExampleScan, PaddingCollator
from umbrella_data.chat.encoder import ChatEncoder
from umbrella_data.manifest.row_validation import parse_turns
from umbrella_data.manifest.sample import Scan, Turn
from umbrella_data.pipeline.config import PipelineConfig
from umbrella_data.pipeline.pipeline import Pipeline
from umbrella_model import UmbrellaConfig
from umbrella_train.end_of_turn import EndOfTurn, find_end_of_turn

Message = Mapping[str, Any]
__all__ = ["UmbrellaProcessor"]

logger = logging.getLogger(__name__)


class UmbrellaProcessor(ProcessorMixin):
    """Makes a batch from conversations that name scan files, as the model was trained on them.

    Args:
        tokenizer: Of the language model.
        image_token_id: The token at scan positions.
        modality_order: The modalities by tag.
        num_image_tokens: Positions that a scan of each modality takes.
        pipelines: Fields of each modality's `umbrella_data.pipeline.config.PipelineConfig`.
        masked: By modality, whether the scans of the training data had a brain mask; a modality is absent if some had
            one and others had none. A scan that differs is read, with a warning.
        asks_for_reasoning: Whether the answers of the training data start with a block of reasoning.
        chat_template: Kept by Hugging Face next to the tokenizer's; not used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_token_id: int,
        modality_order: Sequence[str],
        num_image_tokens: Mapping[str, int],
        pipelines: Mapping[str, Mapping[str, Any]],
        masked: Mapping[str, bool] | None = None,
        asks_for_reasoning: bool = False,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        # These are what is written to processor_config.json, whose keys lose their order.
        self.image_token_id = image_token_id
        self.modality_order = list(modality_order)
        self.num_image_tokens = dict(num_image_tokens)
        self.pipelines = {name: dict(settings) for name, settings in pipelines.items()}
        self.masked = dict(masked or {})
        self.asks_for_reasoning = asks_for_reasoning

    def __call__(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        load: Callable[[Scan], Tensor] | None = None,
    ) -> dict[str, Any]:
        """Prompts for generation, or training examples, from one conversation or several.

        Args:
            conversations: Messages as in a manifest, `{"role": "user", "content": [{"type": "image", "modality": "T1",
                "path": "scan.nii.gz"}, {"type": "text", "text": "..."}]}`, with paths relative to the current folder.
                Those that end with the user's turn make prompts, padded on the left; those that end with the
                assistant's make training examples, padded on the right and with labels.
            load: Returns the volume of a scan, for scans that were already loaded; None loads each by `load_scan`.

        Returns:
            The batch of `umbrella_data.PaddingCollator`; prompts have no `labels`.

        Raises:
            ValueError: With all problems of a conversation, or if some end with the user and some with the assistant.
            ScanError: A scan is damaged or inconsistent.
        """
        rows = [conversations] if conversations and isinstance(conversations[0], Mapping) else conversations
        turns = [_read_turns(row, where=f"conversation {number}") for number, row in enumerate(rows, start=1)]
        ends = {conversation[-1].role for conversation in turns}
        if ends not in ({"user"}, {"assistant"}):
            raise ValueError("conversations must all end with the user (a prompt) or all with the assistant (training)")
        is_prompt = ends == {"user"}
        encoder = ChatEncoder(
            self.tokenizer,
            image_token_id=self.image_token_id,
            num_image_tokens=self.num_image_tokens,
            asks_for_reasoning=self.asks_for_reasoning,
        )
        examples = [
            self._example(conversation, encoder, is_prompt=is_prompt, index=index, load=load or self.load_scan)
            for index, conversation in enumerate(turns)
        ]
        collate = PaddingCollator(
            pad_token_id=self.tokenizer.pad_token_id,
            modality_order=self.modality_order,
            padding_side="left" if is_prompt else "right",
        )
        batch = collate(examples)
        if is_prompt:
            del batch["labels"]
        return batch

    @property
    def end_of_turn(self) -> EndOfTurn:
        """Where generation stops: `generate(..., eos_token_id=list(processor.end_of_turn.stop_ids))`."""
        return find_end_of_turn(self.tokenizer, image_token_id=self.image_token_id)

    def decode_answers(self, generated: Tensor, *, prompt_length: int) -> list[str]:
        """The text that `generate` added to each prompt, up to the end of the turn.

        Args:
            generated: Shape (B, prompt_length + new).
            prompt_length: Length of the padded prompts.
        """
        end = self.end_of_turn
        return [end.decode(row, self.tokenizer) for row in generated[:, prompt_length:].tolist()]

    def load_scan(self, scan: Scan) -> Tensor:
        """The scan as the model sees it, (C, X, Y, Z) or (C, X, Y, Z, T); warns of a mask that is unlike training.

        Raises:
            ScanError: The scan is damaged or inconsistent.
        """
        if problem := other_mask(scan.modality, trained=self.masked, is_masked=scan.mask is not None):
            logger.warning("%s", problem)
        return self.pipeline_of(scan.modality)(scan.paths, generator=None, mask=scan.mask)

    def pipeline_of(self, modality: str) -> Pipeline:
        """The pipeline of one of the model's modalities, by its canonical name."""
        return Pipeline(PipelineConfig.model_validate(self.pipelines[modality]), modality=modality)

    def _example(
        self,
        turns: Sequence[Turn],
        encoder: ChatEncoder,
        *,
        is_prompt: bool,
        index: int,
        load: Callable[[Scan], Tensor],
    ) -> Example:
        encoded = encoder.encode_prompt(turns) if is_prompt else encoder.encode(turns)
        scans = tuple(
            ExampleScan(scan.modality, load(scan), start=start, num_tokens=self.num_image_tokens[scan.modality])
            for scan, start in zip(encoded.scans, encoded.scan_starts, strict=True)
        )
        return Example(input_ids=encoded.input_ids, labels=encoded.labels, scans=scans, index=index)


def other_mask(modality: str, *, trained: Mapping[str, bool], is_masked: bool) -> str | None:
    """A warning about a scan that has a brain mask, or none, unlike those of training (`masked` of the processor).

    None if it is alike.
    """
    if trained.get(modality, is_masked) == is_masked:
        return None
    if is_masked:
        return f"{modality}: the model was trained on scans without a brain mask, and is asked about one with a mask"
    return (
        f"{modality}: the model was trained on scans with a brain mask, and is asked about a whole one; give its mask "
        "(mask in a manifest, --mask of umbrella-predict)"
    )


def question_with_scans(question: str, scans: Sequence[Scan]) -> list[Message]:
    """One user turn: the scans in their order, then the question. Paths may be relative to the current folder."""
    images = [
        {
            "type": "image",
            "modality": scan.modality,
            "path": [str(path) for path in scan.paths],
            "mask": None if scan.mask is None else str(scan.mask),
        }
        for scan in scans
    ]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


def _read_turns(messages: Any, *, where: str) -> tuple[Turn, ...]:
    turns, problems = parse_turns(messages, resolve=_resolve, may_end_with_user=True)
    if problems:
        raise ValueError("\n  ".join(f"{where}: {problem}" for problem in problems))
    return turns


def _resolve(modality: str, paths: Sequence[str], mask: str | None) -> Scan:
    own_mask = None if mask is None else Path(mask).resolve()
    return Scan(modality, tuple(Path(path).resolve() for path in paths), mask=own_mask)


AutoProcessor.register(UmbrellaConfig, UmbrellaProcessor, exist_ok=True)
