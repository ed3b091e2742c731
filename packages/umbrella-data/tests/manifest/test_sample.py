"""Names of subjects and files in texts: what is replaced, and what is left as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from umbrella_data.manifest.sample import Sample, Scan, Turn, hide_names


@pytest.mark.parametrize(
    ("subject", "text", "hidden"),
    [
        ("sub-0303", "Patient sub-0303_ses-1 (sub-0303): old?", "Patient <sub-0303>_ses-1 (<sub-0303>): old?"),
        ("sub-0303", "SUB-0303, _sub-0303_", "<SUB-0303>, _<sub-0303>_"),
        ("sub-0303", "sub-03031 xsub-0303 ésub-0303 sub-030", "sub-03031 xsub-0303 ésub-0303 sub-030"),
        ("sub-0303", "0303", "0303"),
        ("12", "12, 12.5 mm, sub-12, sub-123", "12, 12.5 mm, <sub-12>, sub-123"),
        ("AD01", "ad01 sub-AD01", "<ad01> <sub-AD01>"),
        ("sub-AD01", "AD01 sub-AD01", "<AD01> <sub-AD01>"),
        ("sub-a", "a sub-a", "a <sub-a>"),
        ("sub-1.5", "sub-1x5 sub-1.5", "sub-1x5 <sub-1.5>"),
        ("x", "x of /data/12/scan.nii.gz, scan.nii.gz, scan", "<x> of </data/12/scan.nii.gz>, <scan.nii.gz>, scan"),
        ("x1", "its mask x1_mask.nii.gz", "its mask <x1_mask.nii.gz>"),
    ],
)
def test_names_are_hidden_at_the_borders_of_letters_and_digits(subject: str, text: str, hidden: str) -> None:
    scan = Scan("T1", (Path("/data/12/scan.nii.gz"),), mask=Path("/masks/x1_mask.nii.gz"))
    sample = Sample("i", subject, "task", (Turn("user", (scan, text)), Turn("assistant", ("yes",))))
    assert hide_names(text, sample, name=lambda name: f"<{name}>") == hidden
