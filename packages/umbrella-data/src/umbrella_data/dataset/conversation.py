"""Map-style data set of one manifest: tokens, labels and preprocessed scans as a pure function of the index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from umbrella_data.batch.example import Example, ExampleScan, SampleOrigin, ScanPipeline
from umbrella_data.chat.candidates import encode_candidates
from umbrella_data.chat.encoder import ChatEncoder, EncodedConversation, Tokenizer
from umbrella_data.chat.number_targets import NumberTargets, number_tasks
from umbrella_data.chat.row_check import encoding_problems
from umbrella_data.dataset.bad_scans import BadScan, BadScanList, replacements
from umbrella_data.dataset.batch_plan import Indices
from umbrella_data.dataset.token_lengths import measure_samples
from umbrella_data.errors import ScanError, UmbrellaDataError
from umbrella_data.manifest.manifest import Manifest
from umbrella_data.manifest.row_columns import RowFacts
from umbrella_data.manifest.sample import Sample, Scan, Turn, without_scans
from umbrella_data.seeding import derive_seed

# Stream of the random numbers of one (seed, index), next to those of augmentation and of replaced scans.
_NUMBER_STREAM = 3

__all__ = ["ConversationDataset", "Example", "ExampleScan", "ScanPipeline"]


class ConversationDataset(Dataset[Example]):
    """The examples of one manifest.

    Index `epoch * len(dataset) + i` is sample i in that epoch: the generator of augmentation is seeded with
    (seed, index), so that ranks, workers and resumed runs agree. `list(dataset)` is epoch 0, and so is every pass
    of a loader without a `ModalityBatchSampler`; `ModalityBatchSampler.set_epoch` selects another epoch.

    Args:
        manifest: The samples.
        tokenizer: A Hugging Face fast tokenizer, or an object with the same interface.
        image_token_id: The model's image token.
        num_image_tokens: Number of positions of a scan of each modality.
        pipelines: For each modality the pipeline that reads and preprocesses its scans.
        seed: Seed of the augmentation.
        max_length: Maximum number of positions of an example; whole turns are dropped from the front to fit.
        augment: Whether the pipelines get a generator.
        bad_scans: Records samples with unusable scans. Each is replaced by another sample of the same modalities,
            a pure function of (seed, index). With None an unusable scan raises its error.
        asks_for_reasoning: Whether answers of training start with reasoning, see `ChatEncoder`.
        number_decimals: Decimals of the numbers to learn, see `NumberTargets`; None keeps the words of the rows.
        number_smoothing: Standard deviations of the numbers to learn, by task, in the unit of the answer. The number
            is drawn again in each epoch, a pure function of (seed, index), if `augment` is on. Lengths are those of
            the number that is not drawn: a batch may have a few tokens more than its budget. A draw that would not
            fit into `max_length` with the same turns is replaced by that number.

    Raises:
        ValueError: If `pipelines` and `num_image_tokens` have different modalities, or the tokenizer cannot be used.
        ManifestError: With `number_smoothing`, if a row is invalid.
    """

    # Every epoch holds the same samples, so the number of batches is known before training.
    is_epoch_constant = True

    def __init__(
        self,
        manifest: Manifest,
        *,
        tokenizer: Tokenizer,
        image_token_id: int,
        num_image_tokens: Mapping[str, int],
        pipelines: Mapping[str, ScanPipeline],
        seed: int = 0,
        max_length: int | None = None,
        augment: bool = True,
        bad_scans: BadScanList | None = None,
        asks_for_reasoning: bool = False,
        number_decimals: int | None = None,
        number_smoothing: Mapping[str, float] | None = None,
    ) -> None:
        if set(pipelines) != set(num_image_tokens):
            raise ValueError(f"pipelines has keys {', '.join(sorted(pipelines))}, but num_image_tokens has "
                             f"{', '.join(sorted(num_image_tokens))}; give both the same modalities")  # fmt: skip
        self.manifest = manifest
        self._encoder = ChatEncoder(
            tokenizer,
            image_token_id=image_token_id,
            num_image_tokens=num_image_tokens,
            asks_for_reasoning=asks_for_reasoning,
        )
        self._num_image_tokens = dict(num_image_tokens)
        self._pipelines = dict(pipelines)
        self._seed = seed
        self._max_length = max_length
        self._augment = augment
        smoothing = dict(number_smoothing or {}) if augment else {}
        self._numbers = NumberTargets(number_decimals, smoothing)
        self.number_tasks = number_tasks(manifest) if smoothing else {}
        self._measured: RowFacts | None = None
        self._bad_scans = bad_scans
        self._bad_rows: dict[int, ScanError] = {}

    def __len__(self) -> int:
        return len(self.manifest)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        """The example at a virtual index.

        Raises:
            ManifestError: With every problem of the row.
            ScanError: If a scan is unusable and has no replacement.
            TooManyBadScansError: If more scans than allowed are unusable.
            ValueError: If the conversation cannot be encoded, or does not fit into `max_length`.
        """
        first = index % len(self)
        if self._bad_scans is None:
            return self._read(index, row=first)
        try:
            return self._read_good(index, first, self._bad_scans)
        except ScanError as error:
            rows = replacements(first, index=index, facts=self._facts, seed=self._seed, length=self.num_tokens)
            for row in rows:
                try:
                    return self._read_good(index, row, self._bad_scans)
                except ScanError:
                    continue
            error.add_note("no replacement: no other sample of the same modalities has usable scans")
            raise

    def _read(self, index: int, *, row: int) -> Example:
        """The example of a row, with the augmentation of the index."""
        sample = self.sample(index) if row == index % len(self) else self.manifest[row]
        encoded = self._encode_target(index, sample, row=row)
        generator = None
        if self._augment:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, index))
        origin = self._origin(row, sample)
        return self._example(index, encoded, encoded.scans, generator=generator, row=row, origin=origin)

    def _encode_target(self, index: int, sample: Sample, *, row: int) -> EncodedConversation:
        """The conversation to learn: with the number of this index, if numbers are drawn and it fits."""
        if (problem := self._numbers.problem(sample)) is not None:
            raise ValueError(f"{self._where(row)}: {problem}")
        encoded = self._encode(row, self._numbers.write(sample))
        seed, may_be_negative = derive_seed(self._seed, index, _NUMBER_STREAM), self.number_tasks.get(sample.task, True)
        drawn = self._numbers.draw(sample, seed=seed, may_be_negative=may_be_negative)
        if drawn is None:
            return encoded
        try:
            other = self._encoder.encode(drawn, max_length=self._max_length)
        except ValueError:  # longer than max_length: the other number is encodable
            return encoded
        # With other turns, modalities would differ from those that batches were planned with.
        return other if other.num_dropped_turns == encoded.num_dropped_turns else encoded

    def _read_good(self, index: int, row: int, bad_scans: BadScanList) -> Example:
        """`_read`, but a row that failed before raises its error without reading again."""
        if row in self._bad_rows:
            raise self._bad_rows[row].bare()
        try:
            return self._read(index, row=row)
        except ScanError as error:
            self._record(row, error, bad_scans)
            raise

    def _record(self, row: int, error: ScanError, bad_scans: BadScanList) -> None:
        self._bad_rows[row] = error.bare()
        bad_scans.add(
            BadScan(
                manifest=self.manifest.path,
                line=self.manifest.line(row),
                num_rows=len(self.manifest.whole),
                subject=self.manifest[row].subject,
                error=error,
            )
        )

    def leave_out(self, index: int, error: ScanError) -> None:
        """Record a sample whose prompt cannot be built; in generation it is skipped, not replaced.

        Args:
            index: The sample with the unusable scan.
            error: The error that `prompt` raised.

        Raises:
            ScanError: `error`, if the data set has no `bad_scans`.
            TooManyBadScansError: If more scans than allowed are unusable.
        """
        if self._bad_scans is None:
            raise error
        self._record(index % len(self), error, self._bad_scans)

    def sample(self, index: int) -> Sample:
        """The manifest's row at a virtual index."""
        if index < 0:
            raise IndexError(f"virtual index {index} is negative; it must be epoch * {len(self)} + i")
        return self.manifest[index % len(self)]

    def modalities(self, index: int) -> tuple[str, ...]:
        """The modality of each scan of an example in reading order; no scan is opened."""
        if self._max_length is None:
            return self.manifest.modalities(index % len(self))
        # The scans of dropped turns are dropped too.
        messages = self._numbers.write(self.sample(index))
        encoded = self._encode(index, messages, is_prompt=messages[-1].role == "user")
        return tuple(scan.modality for scan in encoded.scans)

    def modality_sets(self) -> frozenset[frozenset[str]]:
        """The sets of modalities of the samples; the first call reads every row, unless an index is saved."""
        return self._facts.modality_sets()

    def modality_masks(self, indices: Indices) -> Indices:
        """The set of modalities of each example as a bit mask, (N,); see `row_columns.modality_mask`."""
        return self._facts.masks(indices % len(self))

    def num_tokens(self, index: int) -> int:
        """The length L of an example, from its text and the number of tokens of its scans; no scan is opened."""
        return len(self._encode(index, self._numbers.write(self.sample(index))).input_ids)

    def lengths(self, indices: Indices) -> Indices:
        """`num_tokens` of many examples at once, (N,). The first call measures every row, unless lengths are saved.

        Raises:
            ManifestError: With the problems of all rows that are invalid or do not fit into `max_length`.
        """
        return self._measures.arrays["lengths"][indices % len(self)].astype(np.int64)

    def encoding_problems(self, rows: Iterable[int] | None = None) -> Iterator[tuple[int, str]]:
        """Line and message of each row that cannot be encoded, or is asked otherwise than trained; all by default."""
        return encoding_problems(
            self.manifest, self._encoder, max_length=self._max_length, rows=rows, numbers=self._numbers
        )

    @property
    def _facts(self) -> RowFacts:
        return self.manifest.facts if self._max_length is None else self._measures

    @property
    def _measures(self) -> RowFacts:
        if self._measured is None:
            self._measured = measure_samples(
                self.manifest, encoder=self._encoder, max_length=self._max_length, numbers=self._numbers
            )
        return self._measured

    def prompt(self, index: int, *, scans_from: int | None = None, with_scans: bool = True) -> Example:
        """The prompt for generation: the conversation without its last turn if that is the assistant's.

        Nothing is augmented, and all labels are -100.

        Args:
            index: The sample.
            scans_from: A sample whose scans replace those of this one: control that shows whether answers depend on
                the scan.
            with_scans: Whether the prompt holds scans; False is the text-only control.

        Raises:
            ValueError: If the two samples do not hold the same modalities in the same order.
        """
        sample = self.sample(index)
        messages = self._numbers.write(sample)  # the same turns are dropped as in training
        if not with_scans:
            messages = without_scans(messages)
        encoded = self._encode(index, messages, is_prompt=True)
        scans = encoded.scans
        if scans_from is not None and with_scans:
            other = self.sample(scans_from)
            if other.modalities != sample.modalities:
                raise ValueError(f"sample {sample.id!r} has {_listed(sample.modalities)}, but {other.id!r} has "
                                 f"{_listed(other.modalities)}; both need the same modalities")  # fmt: skip
            # Scans of dropped turns, and of turns after the prompt, are skipped in both samples.
            first = 1 if messages[0].role == "system" else 0
            dropped = messages[first : first + encoded.num_dropped_turns]
            skipped = sum(len(turn.scans) for turn in dropped)
            scans = other.scans[skipped : skipped + len(scans)]
        origin = self._origin(index % len(self), sample)
        return self._example(index, encoded, scans, generator=None, origin=origin)

    def candidate_tokens(
        self, index: int, candidates: Sequence[str], *, with_scans: bool = True
    ) -> list[tuple[int, ...]] | None:
        """The tokens of possible answers after `prompt(index)`; see `encode_candidates`."""
        messages = self._numbers.write(self.sample(index))
        try:
            turns = messages if with_scans else without_scans(messages)
            return encode_candidates(self._encoder, turns, candidates, max_length=self._max_length)
        except ValueError as error:
            raise ValueError(f"{self._where(index)}: {error}") from error

    def _encode(self, index: int, messages: Sequence[Turn], *, is_prompt: bool = False) -> EncodedConversation:
        encode: Callable[..., EncodedConversation] = self._encoder.encode_prompt if is_prompt else self._encoder.encode
        try:
            return encode(messages, max_length=self._max_length)
        except ValueError as error:
            raise ValueError(f"{self._where(index)}: {error}") from error

    def _example(
        self,
        index: int,
        encoded: EncodedConversation,
        scans: Sequence[Scan],
        *,
        generator: torch.Generator | None,
        row: int | None = None,
        origin: SampleOrigin,
    ) -> Example:
        return Example(
            input_ids=encoded.input_ids,
            labels=encoded.labels,
            scans=tuple(
                ExampleScan(
                    modality=scan.modality,
                    volume=self._load(index if row is None else row, scan, generator=generator),
                    start=start,
                    num_tokens=self._num_image_tokens[scan.modality],
                )
                for scan, start in zip(scans, encoded.scan_starts, strict=True)
            ),
            index=index,
            origin=origin,
        )

    def _load(self, index: int, scan: Scan, *, generator: torch.Generator | None) -> torch.Tensor:
        try:
            if scan.mask is None:
                return self._pipelines[scan.modality](scan.paths, generator=generator)
            return self._pipelines[scan.modality](scan.paths, generator=generator, mask=scan.mask)
        except (UmbrellaDataError, ValueError) as error:
            error.add_note(f"while reading a {scan.modality} scan of {self._where(index)}")
            raise

    def _where(self, index: int) -> str:
        row = index % len(self)
        return str(self._origin(row, self.manifest[row]))

    def _origin(self, row: int, sample: Sample) -> SampleOrigin:
        return SampleOrigin(str(self.manifest.path), line=self.manifest.line(row), subject=sample.subject)


def _listed(modalities: Sequence[str]) -> str:
    return ", ".join(modalities) or "no scan"
