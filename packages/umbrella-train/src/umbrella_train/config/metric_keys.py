"""The kinds of keys in metrics.jsonl, for `metric_for_best_model` and for the reference of the documentation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MetricKey:
    """Keys of one form.

    Attributes:
        form: The key; words in capitals are replaced: LABEL by a figure, NAME by modalities and task (`T1/sex`).
        meaning: What the value is, with its unit.
        is_of_training: Whether it is logged before the end of a run, so that it can choose the best checkpoint.
    """

    form: str
    meaning: str
    is_of_training: bool = False

    @property
    def start(self) -> str:
        """The key up to the first part that is replaced."""
        words = self.form.split("/")
        fixed = next((index for index, word in enumerate(words) if word.strip("[]").isupper()), None)
        return self.form if fixed is None else "".join(f"{word}/" for word in words[:fixed])


METRIC_KEYS = (
    MetricKey(form="step", meaning="optimizer steps so far"),
    MetricKey(form="epoch", meaning="epochs so far, with fractions"),
    MetricKey(form="eval_loss", meaning="loss of the held-out samples, without dummy terms", is_of_training=True),
    MetricKey(form="eval/loss/MODALITIES", meaning="the same, of the samples with these modalities",
              is_of_training=True),
    MetricKey(form="eval_runtime", meaning="duration of the evaluation loss in seconds"),
    MetricKey(form="eval_samples_per_second", meaning="samples per second in it"),
    MetricKey(form="eval_steps_per_second", meaning="batches per second in it"),
    MetricKey(form="loss", meaning="training loss, the mean since the line before", is_of_training=True),
    MetricKey(form="grad_norm", meaning="L2 norm of the whole gradient before clipping", is_of_training=True),
    MetricKey(form="grad/[MODALITY]/PART", meaning="gradient norm of a patch embed; `[inactive]` if "
              "no scan of it was in the step; `.proj`: of its projection alone", is_of_training=True),
    MetricKey(form="grad_share/[MODALITY]/PART", meaning="the same as a fraction of grad_norm", is_of_training=True),
    MetricKey(form="drift/MODALITY", meaning="how far the weights of an absent patch embed have moved, in standard "
              "deviations of the initial weights", is_of_training=True),
    MetricKey(form="learning_rate", meaning="learning rate of the step"),
    MetricKey(form="non_finite/skipped", meaning="steps skipped so far, since a loss or gradient was not finite"),
    MetricKey(form="non_finite/skipped_by_deepspeed", meaning="steps that DeepSpeed skipped"),
    MetricKey(form="best/step", meaning="step of the best checkpoint"),
    MetricKey(form="best/value", meaning="its value of metric_for_best_model"),
    MetricKey(form="train_loss", meaning="training loss, the mean over the run"),
    MetricKey(form="train_runtime", meaning="duration of training in seconds"),
    MetricKey(form="train_samples_per_second", meaning="samples per second"),
    MetricKey(form="train_steps_per_second", meaning="optimizer steps per second"),
    MetricKey(form="total_flos", meaning="floating-point operations, as Hugging Face's Trainer estimates them"),
    MetricKey(form="eval/LABEL/NAME", meaning="a figure of the answers, see below"),
    MetricKey(form="baseline/BASELINE/LABEL/NAME", meaning="the same figure of a simple model"),
)  # fmt: skip
"""More special forms precede more general ones."""


def metric_key(key: str) -> MetricKey | None:
    """The form of a key of metrics.jsonl; None for one that is not documented."""
    return next(
        (each for each in METRIC_KEYS if key == each.form or (each.start != each.form and key.startswith(each.start))),
        None,
    )
