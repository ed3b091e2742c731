"""The processor: the same batch as in training, saved and loaded next to the weights, and answers to questions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from umbrella_data import ScanError, read_manifest
from umbrella_data.manifest.sample import Sample, Scan
from umbrella_data.pipeline.config import PipelineConfig
from umbrella_data.synthetic.cohort import DemoCohort
from umbrella_train import cli
from umbrella_train.assembly.build import TrainingComponents, build_components
from umbrella_train.assembly.predict import find_model, predict
from umbrella_train.cli.predict import read_scan
from umbrella_train.config import DatasetConfig, RunConfig
from umbrella_train.errors import RunError
from umbrella_train.processor import UmbrellaProcessor, question_with_scans


@pytest.fixture(scope="module")
def config(make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return make_config(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def components(config: RunConfig) -> TrainingComponents:
    components = build_components(config)
    # Random weights give the same answer to every scan.
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in components.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return components


@pytest.fixture(scope="module")
def run_folder(components: TrainingComponents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a finished run that prediction needs."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("{}")
    components.model.save_pretrained(folder / "model")
    components.processor().save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def processor(run_folder: Path) -> UmbrellaProcessor:
    loaded = AutoProcessor.from_pretrained(run_folder / "model")
    assert isinstance(loaded, UmbrellaProcessor)
    return loaded


@pytest.fixture(scope="module")
def sample(cohort: DemoCohort) -> Sample:
    samples = read_manifest(cohort.test_manifest)
    return next(samples[i] for i in range(len(samples)) if samples[i].modalities == ("T1",))


def messages_of(sample: Sample) -> list[dict[str, Any]]:
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": item}
                if isinstance(item, str)
                else {"type": "image", "modality": item.modality, "path": [str(path) for path in item.paths]}
                for item in turn.content
            ],
        }
        for turn in sample.messages
    ]


def assert_equal_batches(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours.keys() - {"pixel_values"}:
        assert torch.equal(ours[key], theirs[key]), key
    assert list(ours["pixel_values"]) == list(theirs["pixel_values"])
    for name, volume in ours["pixel_values"].items():
        # The cache of the data set keeps float16.
        torch.testing.assert_close(volume.float(), theirs["pixel_values"][name].float(), atol=5e-3, rtol=1e-3)


def test_a_batch_equals_that_of_the_data_set(
    processor: UmbrellaProcessor, components: TrainingComponents, config: RunConfig, cohort: DemoCohort
) -> None:
    dataset = components.dataset(DatasetConfig(manifest=cohort.test_manifest), config=config, augment=False)
    chosen = [0, 1, 2, len(dataset) - 1]
    examples = [messages_of(dataset.sample(index)) for index in chosen]
    trained = components.collator()([dataset[index] for index in chosen])
    del trained["supervised_index"]
    assert_equal_batches(processor(examples), trained)
    prompts = [messages[:-1] for messages in examples]
    expected = components.collator(padding_side="left")([dataset.prompt(index) for index in chosen])
    del expected["labels"]
    assert_equal_batches(processor(prompts), expected)


def test_a_question_after_an_answer_keeps_both(processor: UmbrellaProcessor, sample: Sample) -> None:
    first = messages_of(sample)
    more = [*first, {"role": "user", "content": "And why?"}]
    longer, shorter = processor(more)["input_ids"], processor(first[:1])["input_ids"]
    text = processor.tokenizer.decode(longer[0])
    assert "And why?" in text
    assert first[1]["content"][0]["text"] in text
    assert longer.shape[1] > shorter.shape[1]


def test_the_mask_of_a_scan_is_applied(processor: UmbrellaProcessor, sample: Sample, tmp_path: Path) -> None:
    messages = messages_of(sample)[:1]
    image = next(item for item in messages[0]["content"] if item["type"] == "image")
    scan = nib.load(image["path"][0])
    brain = np.zeros(scan.shape[:3], dtype=np.uint8)
    brain[: scan.shape[0] // 2] = 1
    nib.save(nib.Nifti1Image(brain, scan.affine), tmp_path / "mask.nii.gz")
    whole = processor(messages)["pixel_values"]["T1"]
    image["mask"] = str(tmp_path / "mask.nii.gz")
    masked = processor(messages)["pixel_values"]["T1"]
    outside = [float((volume == volume.flatten()[0]).float().mean()) for volume in (whole, masked)]
    assert outside[0] < 0.1
    assert 0.3 < outside[1] < 0.7


def test_the_saved_processor_names_no_file(run_folder: Path, cohort: DemoCohort) -> None:
    content = (run_folder / "model" / "processor_config.json").read_text()
    assert json.loads(content)["modality_order"] == ["rsfMRI", "T1", "dMRI"]
    assert str(cohort.train_manifest.parent) not in content
    assert "cache" not in content


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "doctor", "content": "Hm."}], r"conversation 1: messages\[0\] must be an object with a role"),
        ([{"role": "user", "content": []}], r"messages\[0\].content must be a text"),
        ([{"role": "user", "content": [{"type": "image", "path": "a.nii"}]}], "needs a 'modality'"),
        ([{"role": "system", "content": "Be brief."}], "roles are system"),
        (
            [{"role": "user", "content": "?"},
             {"role": "assistant", "content": [{"type": "image", "modality": "T1", "path": "a.nii"}]}],
            r"messages\[1\]: a scan",
        ),
    ],
)  # fmt: skip
def test_conversations_of_another_form_are_rejected(
    processor: UmbrellaProcessor, messages: list[Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        processor(messages)


def test_prompts_and_examples_do_not_mix(processor: UmbrellaProcessor, sample: Sample) -> None:
    messages = messages_of(sample)
    with pytest.raises(ValueError, match="all end with the user"):
        processor([messages, messages[:1]])


def test_decoding_stops_at_the_end_of_the_turn(processor: UmbrellaProcessor) -> None:
    tokenizer = processor.tokenizer
    ids = [1, 2, *tokenizer.encode("yes"), tokenizer.eos_token_id, *tokenizer.encode("no")]
    assert processor.decode_answers(torch.tensor([ids]), prompt_length=2) == ["yes"]


# ---- predict ----


def test_predict_gives_the_models_answer_for_a_run_or_model_folder(
    run_folder: Path,
    processor: UmbrellaProcessor,
    components: TrainingComponents,
    sample: Sample,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scans = sample.scans
    batch = processor(question_with_scans("Old or young?", scans))
    ids = components.model.eval().generate(**batch, max_new_tokens=5, do_sample=False)
    (expected,) = processor.decode_answers(ids, prompt_length=batch["input_ids"].shape[1])
    before = sorted(run_folder.rglob("*"))
    stops: list[object] = []
    generate = type(components.model).generate

    def note_stops(model: Any, **options: Any) -> Any:
        stops.append(options.get("eos_token_id"))
        return generate(model, **options)

    monkeypatch.setattr(type(components.model), "generate", note_stops)
    for folder in (run_folder, run_folder / "model"):
        answer = predict(folder, question="Old or young?", scans=scans, max_new_tokens=5, device="cpu")
        assert answer == expected
    assert stops == [list(processor.end_of_turn.stop_ids)] * 2
    assert sorted(run_folder.rglob("*")) == before


@pytest.mark.parametrize(
    "content",
    [
        {"do_sample": True, "temperature": 5.0, "repetition_penalty": 1e4, "no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(0, 256, 2)), "bad_words_ids": [[number] for number in range(1, 256, 2)]},
        {"return_dict_in_generate": True},
        {"stop_strings": ["e"]},
        {"penalty_alpha": 0.6, "top_k": 4},
    ],
    ids="-".join,
)
def test_answers_do_not_depend_on_the_generation_config_of_the_language_model(
    content: dict[str, Any], run_folder: Path, sample: Sample, tmp_path: Path
) -> None:
    """A repetition penalty, as of many published ones, would count against the words of the question."""
    asked: dict[str, Any] = {"question": "Old or young?", "scans": sample.scans, "max_new_tokens": 8, "device": "cpu"}
    expected = predict(run_folder, **asked)
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run/model/generation_config.json").write_text(json.dumps(content))
    assert predict(tmp_path / "run", **asked) == expected


def test_a_prompt_that_does_not_fit_is_an_error(run_folder: Path) -> None:
    with pytest.raises(RunError, match=r"more than the \d+ of the language model"):
        predict(run_folder, question="Old or young? " * 2000, device="cpu")


def test_a_question_may_have_no_scan_or_several(run_folder: Path, cohort: DemoCohort, sample: Sample) -> None:
    samples = read_manifest(cohort.test_manifest)
    series = next(samples[i] for i in range(len(samples)) if samples[i].modalities == ("rsfMRI",))
    (t1,), (bold,) = sample.scans[0].paths, series.scans[0].paths
    for scans in ([], [Scan("T1w", (t1,)), Scan("bold", (bold,)), Scan("T1", (t1,))]):
        assert isinstance(predict(run_folder, question="?", scans=scans, max_new_tokens=2, device="cpu"), str)


def test_a_damaged_scan_and_an_unknown_modality_are_rejected(run_folder: Path, sample: Sample, tmp_path: Path) -> None:
    path = sample.scans[0].paths[0]
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ScanError):
        predict(run_folder, question="?", scans=[Scan("T1", (cut,))], device="cpu")
    with pytest.raises(RunError, match=r"did you mean|unknown"):
        predict(run_folder, question="?", scans=[Scan("T11", (path,))], device="cpu")


def test_a_folder_without_a_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no config.json"):
        find_model(tmp_path)
    with pytest.raises(RunError, match="missing: there is no such folder; give"):
        find_model(tmp_path / "missing")
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(RunError, match="did not finish"):
        find_model(tmp_path)


def test_the_command_prints_the_answer(
    run_folder: Path, sample: Sample, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = sample.scans[0].paths[0]
    words = [str(run_folder), "--scan", f"T1={path}", "--question", "Old or young?", "--max-new-tokens", "3"]
    cli.predict_command([*words, "--use-cpu"])
    expected = predict(
        run_folder, question="Old or young?", scans=[Scan("T1", (path,))], max_new_tokens=3, device="cpu"
    )
    assert capsys.readouterr().out.strip() == expected
    for scan, says in ((f"T1={tmp_path / 'no.nii'}", "there is no such file"), ("T1", "is not MODALITY=FILE")):
        with pytest.raises(SystemExit) as caught:
            cli.predict_command([str(run_folder), "--question", "?", "--scan", scan])
        assert caught.value.code == 2
        assert says in capsys.readouterr().err


def test_maps_are_split_at_commas_but_a_name_with_a_comma_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a,b.nii").touch()
    assert read_scan(f"T1={tmp_path / 'a,b.nii'}") == Scan("T1", (tmp_path / "a,b.nii",))
    assert read_scan("dMRI=fa.nii,md.nii") == Scan("dMRI", (Path("fa.nii"), Path("md.nii")))


def test_a_model_without_a_processor_is_rejected(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder / "model", tmp_path / "model")
    (tmp_path / "model" / "processor_config.json").unlink()
    with pytest.raises(RunError, match="has no processor"):
        predict(tmp_path / "model", scans=[], question="Is there one?")


# ---- masks ----


@pytest.fixture
def masked_scan(sample: Sample, tmp_path: Path) -> Scan:
    path = sample.scans[0].paths[0]
    image = nib.load(path)
    inside = np.zeros(image.shape[:3], dtype=np.uint8)
    inside[2:-2, 2:-2, 2:-2] = 1
    nib.save(nib.Nifti1Image(inside, image.affine), tmp_path / "mask.nii.gz")
    return Scan("T1", (path,), mask=tmp_path / "mask.nii.gz")


@pytest.mark.parametrize(
    ("trained", "has_mask", "num_warnings"),
    [({"T1": True}, True, 0), ({"T1": True}, False, 1), ({"T1": False}, True, 1), ({"T1": False}, False, 0),
     ({}, True, 0), ({}, False, 0)],
)  # fmt: skip
def test_a_scan_with_a_mask_unlike_training_or_without_one_is_read_with_a_warning(
    components: TrainingComponents, masked_scan: Scan, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    trained: dict[str, bool], has_mask: bool, num_warnings: int,
) -> None:  # fmt: skip
    components.processor(masked=trained).save_pretrained(tmp_path / "saved")
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert processor.masked == trained
    scan = masked_scan if has_mask else Scan("T1", masked_scan.paths)
    volume = processor(question_with_scans("?", [scan]))["pixel_values"]["T1"][0]
    expected = components.pipelines["T1"](scan.paths, generator=None, mask=scan.mask)
    torch.testing.assert_close(volume, expected.float(), atol=5e-3, rtol=0)
    assert len(caplog.records) == num_warnings


def test_the_command_gives_a_mask_to_the_scan_before_it(
    run_folder: Path, masked_scan: Scan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("umbrella_train.assembly.predict.predict", lambda *_, scans, **__: asked.extend(scans) or "x")
    path, mask = masked_scan.paths[0], masked_scan.mask
    scan = f"T1={path}"
    cli.predict_command([str(run_folder), "--scan", scan, "--scan", scan, "--mask", str(mask), "--question", "?"])
    assert asked == [Scan("T1", (path,)), Scan("T1", (path,), mask=mask)]
    for words in (["--mask", str(mask), "--scan", scan], ["--scan", scan, "--mask", str(mask), "--mask", str(mask)],
                  ["--scan", scan, "--mask", "nowhere.nii"]):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            cli.predict_command([str(run_folder), "--question", "?", *words])
        assert caught.value.code == 2
        assert "mask" in capsys.readouterr().err or "nowhere.nii" in words


def test_pipelines_are_saved_without_augmentation(components: TrainingComponents) -> None:
    settings = PipelineConfig(image_size=(16, 16, 16), augment=[{"name": "RandFlip"}], allow_left_right=True)
    assert settings.preprocessing().keys().isdisjoint({"augment", "allow_left_right"})
    saved = components.processor().pipelines
    assert saved == {name: pipeline.config.preprocessing() for name, pipeline in components.pipelines.items()}
