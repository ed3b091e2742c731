"""Issue forms and policies: every form warns about personal data, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FORMS = ("bug", "question", "feature")
FILES = ("SECURITY.md", "CODE_OF_CONDUCT.md", ".github/PULL_REQUEST_TEMPLATE.md", "CONTRIBUTING.md")


@pytest.mark.parametrize("name", FORMS)
def test_every_form_warns_about_personal_data_first_and_asks_last(name):
    body = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())["body"]
    assert body[0]["type"] == "markdown"
    assert {"scans", "subjects", "paths"} <= set(re.findall(r"\w+", body[0]["attributes"]["value"]))
    assert body[-1]["id"] == "privacy"
    assert body[-1]["attributes"]["options"][0]["required"]
    ids = [field["id"] for field in body[1:]]
    assert len(ids) == len(set(ids))


def test_a_bug_names_its_versions_and_the_output_of_check():
    body = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())["body"]
    fields = {field.get("id"): field for field in body}
    assert fields["versions"]["validations"]["required"]
    assert "umbrella-data check" in fields["check"]["attributes"]["label"]


@pytest.mark.parametrize("name", FILES)
def test_links_lead_to_files_and_headings(name):
    text = re.sub(r"`[^`]*`", "", (ROOT / name).read_text())  # not what is code
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, heading = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        if heading:
            heads = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], target


def test_no_address_was_invented():
    for name in (
        *FILES[:3],
        "README.md",
        *(f"packages/umbrella-{part}/README.md" for part in ("data", "model", "train")),
    ):
        text = (ROOT / name).read_text()
        assert not re.findall(r"YOUR-ORG|[\w.]+@[\w-]+\.\w+", text), name
