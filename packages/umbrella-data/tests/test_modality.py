"""The contract of every row of the modality table, and how names are resolved."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from umbrella_data.modality import MODALITIES, ModalitySpec, find_modality

FLAIR = """
from umbrella_data import ModalitySpec
FLAIR = ModalitySpec(name="FLAIR", aliases=("T2-FLAIR",), is_series=False, channels=("FLAIR",), is_masked=False,
                     bids_suffixes=("FLAIR",), bids_datatype="anat", description="a FLAIR scan")
"""


@pytest.mark.parametrize("spec", MODALITIES.values(), ids=lambda spec: spec.name)
def test_every_row_meets_the_contract(spec: ModalitySpec) -> None:
    assert MODALITIES[spec.name] is spec
    assert spec.channels
    assert spec.bids_suffixes
    assert spec.bids_datatype
    assert spec.description.startswith(("a ", "an "))
    assert spec.spatial_rank == (4 if spec.is_series else 3)
    for alias in (spec.name, *spec.aliases):
        assert find_modality(alias) is spec
        assert find_modality(f" {alias.upper()} ") is spec


def test_names_and_aliases_are_unique_when_case_is_ignored() -> None:
    names = [alias.lower() for spec in MODALITIES.values() for alias in (spec.name, *spec.aliases)]
    assert len(names) == len(set(names))


def test_table_has_the_three_modalities() -> None:
    assert list(MODALITIES) == ["T1", "rsfMRI", "dMRI"]
    assert MODALITIES["dMRI"].channels == ("FA", "MD")


def test_find_modality_suggests_the_nearest_when_unknown() -> None:
    with pytest.raises(ValueError, match=r"unknown modality 'bolt'.*T1, rsfMRI, dMRI.*did you mean 'bold'\?"):
        find_modality("bolt")


def run_with_package(
    folder: Path, module: str, question: str, *, names: Sequence[str] = ("FLAIR",)
) -> subprocess.CompletedProcess[str]:
    """Run Python code with an installed distribution `lab-modalities`, whose entry point refers to `FLAIR`."""
    (folder / "lab_modalities.py").write_text(module)
    info = folder / "lab_modalities-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-modalities\nVersion: 1.0\n")
    entries = [f"{name} = lab_modalities:{name}" for name in names]
    (info / "entry_points.txt").write_text("\n".join(["[umbrella_data.modalities]", *entries]))
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", question], env=environment, capture_output=True, text=True, check=False
    )


def test_modality_of_an_installed_package_is_known_everywhere(tmp_path: Path) -> None:
    question = """
import sys
from umbrella_data.modality import MODALITIES, find_modality
assert "lab_modalities" not in sys.modules
assert list(MODALITIES) == ["T1", "rsfMRI", "dMRI", "FLAIR"] and len(MODALITIES) == 4
assert find_modality("t2-flair") is MODALITIES["FLAIR"]
from umbrella_data.bids.layout import _MODALITY_OF
from umbrella_data.manifest.dialects import _modality_of_name
from umbrella_data.manifest.row_columns import modality_mask
assert _MODALITY_OF["anat", "FLAIR"] == _modality_of_name("sub-01/anat/sub-01_FLAIR.nii.gz") == "FLAIR"
assert modality_mask(["FLAIR"]) == 8
"""
    done = run_with_package(tmp_path, FLAIR, question)
    assert done.returncode == 0, done.stderr


def test_order_of_modalities_does_not_depend_on_where_packages_are_installed(tmp_path: Path) -> None:
    pet = FLAIR.replace("FLAIR", "PET")
    question = "from umbrella_data import MODALITIES; assert list(MODALITIES)[3:] == ['FLAIR', 'PET'], list(MODALITIES)"
    done = run_with_package(tmp_path, f"{FLAIR}\n{pet}", question, names=("PET", "FLAIR"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        ("", "cannot be loaded: AttributeError"),
        ("FLAIR = 'FLAIR'", "is a str; it must be a ModalitySpec"),
        (FLAIR.replace('("T2-FLAIR",)', '("T1W",)'), "'t1w' of modality FLAIR belongs to T1"),
        (FLAIR.replace('bids_suffixes=("FLAIR",)', 'bids_suffixes=("T1w",)'), "'anat/*_T1w' of modality FLAIR belongs"),
        (FLAIR.replace('("T2-FLAIR",)', '("T2-FLAIR")'), "aliases of modality FLAIR must be a tuple"),
        (FLAIR.replace('name="FLAIR"', 'name="T2 FLAIR"'), "the name 'T2 FLAIR' of a modality"),
    ],
    ids=["no such name", "no spec", "alias taken", "BIDS name taken", "text for a tuple", "blank in the name"],
)
def test_modality_of_an_installed_package_when_wrong_is_rejected(tmp_path: Path, module: str, problem: str) -> None:
    done = run_with_package(tmp_path, module, "import umbrella_data; umbrella_data.find_modality('T1')")
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ValueError: lab-modalities, entry point 'FLAIR' of umbrella_data.modalities: ")
    assert problem in message
