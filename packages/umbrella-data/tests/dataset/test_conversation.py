"""Examples are pure functions of the virtual index; prompts and their controls load the right scans."""

from __future__ import annotations

import pytest
import torch

from umbrella_data.dataset.conversation import ConversationDataset
from umbrella_data.errors import ScanError
from umbrella_data.manifest.manifest import read_manifest

NUM_TOKENS = {"T1": 3, "rsfMRI": 2, "dMRI": 2}


def noisy_pipeline(paths, *, generator):
    """The scan's name as a number, plus noise where there is a generator."""
    value = float(sum(map(ord, paths[0].name)))
    noise = 0.0 if generator is None else torch.rand((), generator=generator)
    return torch.full((1, 2, 2, 2), value) + noise


@pytest.fixture
def make_dataset(make_tokenizer, write_manifest):
    def make(rows, *, pipeline=noisy_pipeline, may_end_with_user=False, **options):
        tokenizer = make_tokenizer()
        dataset = ConversationDataset(
            read_manifest(write_manifest(rows), may_end_with_user=may_end_with_user),
            tokenizer=tokenizer,
            image_token_id=tokenizer.ids["<image>"],
            num_image_tokens=NUM_TOKENS,
            pipelines=dict.fromkeys(NUM_TOKENS, pipeline),
            **options,
        )
        return tokenizer, dataset

    return make


def test_example_holds_tokens_and_scans_of_its_sample(make_dataset, make_row):
    tokenizer, dataset = make_dataset([make_row("a", "T1"), make_row("b", "dMRI", "T1")], augment=False)
    assert len(dataset) == 2
    example = dataset[1]
    assert [(scan.modality, scan.num_tokens) for scan in example.scans] == [("dMRI", 2), ("T1", 3)]
    for scan in example.scans:
        run = example.input_ids[scan.start : scan.start + scan.num_tokens]
        assert (run == tokenizer.ids["<image>"]).all()
    assert tokenizer.decode(example.labels[example.labels != -100]) == "a brain<|im_end|>"
    assert example.scans[0].volume[0, 0, 0, 0] == sum(map(ord, "b_0.nii.gz"))


def test_example_names_its_row(make_dataset, make_row):
    _, dataset = make_dataset([make_row("a", "T1"), make_row("b", "T1")])
    origin = dataset[3].origin
    assert origin == dataset.prompt(1).origin
    assert (origin.manifest, origin.line) == (str(dataset.manifest.path), dataset.manifest.line(1))
    assert origin.subject == dataset.manifest[1].subject
    assert str(origin) == f"{origin.manifest}, line {origin.line}, subject {origin.subject}"


def test_example_is_a_function_of_seed_and_virtual_index(make_dataset, make_row):
    rows = [make_row("a", "T1"), make_row("b", "T1")]
    _, dataset = make_dataset(rows, seed=1)
    _, again = make_dataset(rows, seed=1)
    _, other = make_dataset(rows, seed=2)
    volume = {index: dataset[index].scans[0].volume for index in (3, 1, 5)}
    assert torch.equal(volume[3], again[3].scans[0].volume)
    assert not torch.equal(volume[1], volume[3])
    assert not torch.equal(volume[3], other[3].scans[0].volume)
    assert dataset[5].index == 5
    assert torch.equal(dataset[1].input_ids, dataset[5].input_ids)


def test_augmentation_when_off_passes_no_generator(make_dataset, make_row):
    _, dataset = make_dataset([make_row("a", "T1")], augment=False)
    assert torch.equal(dataset[0].scans[0].volume, dataset[7].scans[0].volume)


def test_list_of_the_dataset_is_one_epoch(make_dataset, make_row):
    _, dataset = make_dataset([make_row(name, "T1") for name in "abc"])
    assert [example.index for example in list(dataset)] == [0, 1, 2]
    with pytest.raises(IndexError, match="-1"):
        dataset[-1]


def test_num_tokens_and_modalities_agree_with_the_example(make_dataset, make_row):
    rows = [make_row("a", "T1"), make_row("b", "dMRI", "T1"), make_row("c", question="A longer question?")]
    _, dataset = make_dataset(rows)
    for index in range(5):
        example = dataset[index]
        assert dataset.num_tokens(index) == len(example.input_ids)
        assert dataset.modalities(index) == tuple(scan.modality for scan in example.scans)
    assert dataset.modality_sets() == {frozenset({"T1"}), frozenset({"T1", "dMRI"}), frozenset()}


def two_exchanges(make_row):
    row = make_row("a", "T1")
    row["messages"] += make_row("b", "dMRI", question="And?", answer="no")["messages"]
    return row


def test_max_length_when_it_drops_turns_drops_their_scans_everywhere(make_dataset, make_row):
    row = two_exchanges(make_row)
    _, whole = make_dataset([row])
    _, cut = make_dataset([row], max_length=whole.num_tokens(0) - 1)
    assert cut.modalities(0) == ("dMRI",)
    assert [scan.modality for scan in cut[0].scans] == ["dMRI"]
    assert cut.num_tokens(0) == len(cut[0].input_ids) < whole.num_tokens(0)


def test_max_length_when_nothing_fits_names_the_line(make_dataset, make_row):
    _, dataset = make_dataset([make_row("a"), make_row("b", "T1")], max_length=5)
    with pytest.raises(ValueError, match=r"manifest\.jsonl, line 2, subject sub-b: .*max_length 5"):
        dataset[1]


def test_prompt_ends_before_the_answer(make_dataset, make_row):
    tokenizer, dataset = make_dataset([make_row("a", "T1")])
    prompt, whole = dataset.prompt(0), dataset[0]
    length = len(prompt.input_ids)
    assert torch.equal(whole.input_ids[:length], prompt.input_ids)
    assert tokenizer.decode(whole.input_ids[length:]) == "a brain<|im_end|>\n"
    assert (prompt.labels == -100).all()
    assert prompt.scans[0].volume[0, 0, 0, 0] == sum(map(ord, "a_0.nii.gz"))


def test_prompt_of_a_row_that_ends_with_the_user_is_the_whole_conversation(make_dataset, make_row):
    answered, asked = two_exchanges(make_row), two_exchanges(make_row)
    del asked["messages"][-1]
    _, dataset = make_dataset([answered, {**asked, "id": "asked"}], may_end_with_user=True)
    prompt, same = dataset.prompt(0), dataset.prompt(1)
    assert torch.equal(prompt.input_ids, same.input_ids)
    assert len(same.scans) == len(prompt.scans) == 2
    _, cut = make_dataset([asked], may_end_with_user=True, max_length=len(same.input_ids) - 1)
    assert cut.modalities(0) == tuple(scan.modality for scan in cut.prompt(0).scans)
    assert len(cut.modalities(0)) == 1


def test_prompt_with_scans_of_another_sample_keeps_its_own_text(make_dataset, make_row):
    _, dataset = make_dataset([make_row("a", "T1", question="One?"), make_row("b", "T1", question="Two?")])
    swapped = dataset.prompt(0, scans_from=1)
    assert torch.equal(swapped.input_ids, dataset.prompt(0).input_ids)
    assert torch.equal(swapped.scans[0].volume, dataset.prompt(1).scans[0].volume)


def test_prompt_with_scans_of_other_modalities_is_rejected(make_dataset, make_row):
    _, dataset = make_dataset([make_row("a", "T1"), make_row("b", "dMRI"), make_row("c")])
    with pytest.raises(ValueError, match=r"'a' .*T1.* 'b' .*dMRI"):
        dataset.prompt(0, scans_from=1)
    with pytest.raises(ValueError, match=r"'c' .*no scan"):
        dataset.prompt(0, scans_from=2)


def test_prompt_when_turns_are_dropped_takes_the_same_scans_from_the_other(make_dataset, make_row):
    rows = [two_exchanges(make_row), two_exchanges(make_row)]
    rows[1]["id"] = "other"
    for turn, name in ((0, "x.nii.gz"), (2, "y.nii.gz")):
        rows[1]["messages"][turn]["content"][0]["path"] = name
    _, dataset = make_dataset(rows)
    _, cut = make_dataset(rows, max_length=len(dataset.prompt(0).input_ids) - 1)
    volumes = [scan.volume[0, 0, 0, 0] for scan in cut.prompt(0, scans_from=1).scans]
    assert volumes == [sum(map(ord, "y.nii.gz"))]


def test_prompt_without_scans_holds_only_text(make_dataset, make_row):
    tokenizer, dataset = make_dataset([make_row("a", "T1")])
    prompt = dataset.prompt(0, with_scans=False)
    assert prompt.scans == ()
    assert tokenizer.decode(prompt.input_ids) == "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"


def test_scan_error_names_the_row(make_dataset, make_row):
    def broken(paths, *, generator):
        raise ScanError("no good", path=paths[0], reason="header")

    _, dataset = make_dataset([make_row("a", "T1")], pipeline=broken)
    with pytest.raises(ScanError) as caught:
        dataset[0]
    assert "line 1" in caught.value.__notes__[0]


def test_pipelines_and_token_numbers_must_have_the_same_modalities(make_tokenizer, make_row, write_manifest):
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"pipelines .*T1.* num_image_tokens "):
        ConversationDataset(
            read_manifest(write_manifest([make_row("a", "T1")])),
            tokenizer=tokenizer,
            image_token_id=tokenizer.ids["<image>"],
            num_image_tokens=NUM_TOKENS,
            pipelines={"T1": noisy_pipeline},
        )
