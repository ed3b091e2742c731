"""Fixtures of this package: generated NIfTI files, manifest rows, a tokenizer, and the real scans."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import nibabel as nib
import numpy as np
import pytest

from umbrella_data.cli.pipeline_options import PipelineOptions


@pytest.fixture
def real_data() -> Path:
    """The BIDS tree of real scans in UMBRELLA_REAL_DATA; required in CI, otherwise tests are skipped without it."""
    folder = os.environ.get("UMBRELLA_REAL_DATA")
    if folder:
        assert Path(folder).is_dir(), f"UMBRELLA_REAL_DATA is {folder}, which is not a folder"
        return Path(folder)
    if os.environ.get("CI"):
        pytest.fail("UMBRELLA_REAL_DATA is not set: in CI the tests on real scans must not skip")
    pytest.skip("UMBRELLA_REAL_DATA is not set")


@dataclass
class NiftiFactory:
    """Writes small scans into a folder."""

    folder: Path

    def image(
        self,
        voxels: np.ndarray,
        *,
        affine: np.ndarray | None = None,
        orientation: str = "RAS",
        repetition_time: float | None = None,
        version: int = 1,
        endianness: str = "<",
        scaling: tuple[float, float] | None = None,
    ) -> Any:
        """An image of voxels in RAS+ order, stored in another orientation."""
        kind = nib.Nifti1Image if version == 1 else nib.Nifti2Image
        base = np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine
        header = kind.header_class(endianness=endianness)
        header.set_data_dtype(voxels.dtype)
        image = kind(voxels, base, header)
        image.header.set_xyzt_units("mm", "sec")
        image.set_sform(base, code=1)
        image.set_qform(base, code=1)
        if orientation != "RAS":
            start = nib.orientations.io_orientation(base)
            image = image.as_reoriented(
                nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(orientation))
            )
        if repetition_time is not None:
            zooms = image.header.get_zooms()
            image.header.set_zooms((*zooms[:3], repetition_time))
        if scaling is not None:
            image.header.set_slope_inter(*scaling)
        return image

    def write(self, voxels: np.ndarray, name: str = "scan.nii.gz", **options: Any) -> Path:
        """Write voxels in RAS+ order, with the options of `image`, and return the path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        scaling = options.get("scaling")
        image = self.image(voxels, **options)
        if scaling is None:
            nib.save(image, path)
            return path
        # Saving with nibabel would divide the voxels by the slope.
        header = image.header.copy()
        header.set_slope_inter(*scaling)
        header["vox_offset"] = 352 if options.get("version", 1) == 1 else 544
        header["magic"] = b"n+1" if options.get("version", 1) == 1 else b"n+2\x00\r\n\x1a\n"
        stored = np.asarray(image.dataobj).astype(header.get_data_dtype())
        content = header.binaryblock + b"\0\0\0\0" + stored.tobytes(order="F")
        path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
        return path

    def patch(self, path: Path, offset: int, value: bytes) -> Path:
        """Overwrite bytes of the (decompressed) file."""
        compressed = path.name.endswith(".gz")
        content = bytearray(gzip.decompress(path.read_bytes()) if compressed else path.read_bytes())
        content[offset : offset + len(value)] = value
        path.write_bytes(gzip.compress(bytes(content)) if compressed else bytes(content))
        return path


@pytest.fixture
def nifti(tmp_path: Path) -> NiftiFactory:
    """Writes small NIfTI files into the test's folder."""
    return NiftiFactory(tmp_path)


@pytest.fixture
def random_voxels() -> Callable[..., np.ndarray]:
    """Random int16 voxels of a shape, the same in every call."""

    def make(*shape: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(1, 1000, size=shape).astype(np.int16)

    return make


@dataclass(frozen=True)
class AddedToken:
    """A token that is not a byte."""

    content: str
    special: bool = True


class ByteTokenizer:
    """The part of a Hugging Face fast tokenizer that this package uses: one token per byte, and added tokens."""

    is_fast = True
    unk_token_id = None

    def __init__(self, chat_template: str | None = None, *, specials: tuple[str, ...], eos_token: str | None) -> None:
        self.chat_template = chat_template
        self.eos_token = eos_token
        self.added_tokens_decoder = {256 + i: AddedToken(token) for i, token in enumerate(specials)}
        self.ids = {token.content: token_id for token_id, token in self.added_tokens_decoder.items()}
        self.num_encodes = 0

    def apply_chat_template(
        self, conversation: Any, *, chat_template: str | None = None, tokenize: bool, **names: Any
    ) -> str:
        assert not tokenize
        return jinja2.Template(chat_template or self.chat_template).render(messages=conversation, **names)

    def __call__(self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool = False) -> dict[str, list]:
        assert not add_special_tokens
        self.num_encodes += return_offsets_mapping
        input_ids, offsets, position = [], [], 0
        for part in re.split("(" + "|".join(map(re.escape, self.ids)) + ")", text):
            if part in self.ids:
                input_ids.append(self.ids[part])
                offsets.append((position, position + len(part)))
            else:
                for i, character in enumerate(part, start=position):
                    input_ids += character.encode("utf-8")
                    offsets += [(i, i + 1)] * len(character.encode("utf-8"))
            position += len(part)
        return {"input_ids": input_ids, "offset_mapping": offsets}

    def decode(self, input_ids: Any) -> str:
        parts = [
            self.added_tokens_decoder[token].content.encode() if token >= 256 else bytes([token])
            for token in map(int, input_ids)
        ]
        return b"".join(parts).decode("utf-8")


@pytest.fixture
def make_tokenizer() -> Callable[..., ByteTokenizer]:
    """Creates byte tokenizers; by default without a chat template, with the markup of ChatML as added tokens."""

    def make(
        chat_template: str | None = None,
        *,
        specials: tuple[str, ...] = ("<image>", "<pad>", "<|im_start|>", "<|im_end|>", "</s>"),
        eos_token: str | None = "</s>",
    ) -> ByteTokenizer:
        return ByteTokenizer(chat_template, specials=specials, eos_token=eos_token)

    return make


@pytest.fixture
def make_row() -> Callable[..., dict[str, Any]]:
    """Creates canonical manifest rows: `make_row("a", "T1", "dMRI")` has one question about two scans."""

    def make(name: str, *modalities: str, question: str = "What is it?", answer: str = "a brain") -> dict[str, Any]:
        images = [
            {"type": "image", "modality": modality, "path": f"{name}_{i}.nii.gz"}
            for i, modality in enumerate(modalities)
        ]
        return {
            "id": name,
            "subject": f"sub-{name}",
            "task": "kind",
            "messages": [
                {"role": "user", "content": [*images, {"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
        }

    return make


@pytest.fixture
def write_manifest(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON Lines into the test's folder."""

    def write(rows: list[Any], name: str = "manifest.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def run_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes the configuration file of a run, for which a fake umbrella_train returns the given options."""

    def write(**options: Any) -> str:
        reader = SimpleNamespace(load=lambda: lambda path: PipelineOptions(**options))
        monkeypatch.setattr("umbrella_data.cli.pipeline_options.entry_points", lambda group: [reader])
        path = tmp_path / "run.yaml"
        path.touch()
        return str(path)

    return write
