"""All scans with warnings are counted; the first ones per code are listed, independent of the order of reading."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from umbrella_data.scan.header import ScanWarning
from umbrella_data.scan.warnings import WarningList


def add_scans(warnings: WarningList, numbers: list[int]) -> None:
    for i in numbers:
        codes = ["bitpix", "no_form"] if i == 7 else ["bitpix"]
        warnings.add({Path(f"{i:04}.nii"): codes}, subject=f"sub-{i}", modality="T1", manifests=[Path("a.jsonl")])


def test_scans_beyond_the_first_ones_are_counted_and_not_kept():
    order = list(range(500))
    random.Random(0).shuffle(order)
    warnings = WarningList(max_listed=3)
    add_scans(warnings, order)
    assert warnings.counts == {"bitpix": 500, "no_form": 1}
    assert [scan.files for scan in warnings.listed("bitpix")] == [("0000.nii",), ("0001.nii",), ("0002.nii",)]
    assert [scan.subject for scan in warnings.listed("no_form")] == ["sub-7"]
    assert warnings.listed("pixdim") == ()
    rows = warnings.rows(name=str.upper)
    assert (rows["bitpix"]["num_scans"], rows["bitpix"]["num_listed"], len(rows["bitpix"]["scans"])) == (500, 3, 3)
    assert rows["no_form"]["scans"] == [
        {"files": ["0007.NII"], "subject": "SUB-7", "modality": "T1", "manifests": ["A.JSONL"]}
    ]


def test_scan_is_counted_once_when_several_of_its_files_raise_the_warning():
    warnings = WarningList()
    warnings.add({Path("fa.nii"): ["bitpix"], Path("md.nii"): ["bitpix", "pixdim"]}, subject="a", modality="dMRI")
    assert warnings.counts == {"bitpix": 1, "pixdim": 1}
    assert [scan.files for scan in warnings.listed("bitpix")] == [("fa.nii", "md.nii")]
    assert [scan.files for scan in warnings.listed("pixdim")] == [("md.nii",)]


@pytest.mark.parametrize("warning", ScanWarning)
def test_every_code_has_a_meaning(warning):
    assert len(warning.meaning) > 20
