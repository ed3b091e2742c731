"""Issue forms and policies: every form warns about personal data, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FORMS = ("bug", "question", "feature")
MARKDOWN = sorted(
    path for folder in (".", "docs", ".github", "examples/*", "packages/*") for path in ROOT.glob(f"{folder}/*.md")
)
# tools/docs_reference.py writes these pages of the site; the repository has files that say so.
GENERATED = (
    "api-data.md",
    "api-model.md",
    "api-train.md",
    "codes.md",
    "commands.md",
    "configuration.md",
    "metrics.md",
)
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


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(path):
    wrong = []
    for target in links(path):
        file, _, heading = target.partition("#")
        other = path.parent / file if file else path
        if "://" in target:
            # Not opened: tests have no network.
            address = urlsplit(target)
            wrong += (
                [] if address.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc) else [target]
            )
        elif not other.exists() or (heading and other.name not in GENERATED and heading not in headings(other)):
            wrong.append(target)
    assert wrong == []


def test_links_are_found():
    assert len(MARKDOWN) > 30
    assert sum(len(links(path)) for path in MARKDOWN) > 100


@pytest.mark.parametrize("name", GENERATED)
def test_pages_that_the_site_generates_say_so_in_the_repository(name):
    assert "bash tools/build_docs.sh OUT" in (ROOT / "docs" / name).read_text()


def links(path: Path) -> list[str]:
    """Targets of the links of a file, without those in code."""
    text = re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text))


def headings(path: Path) -> list[str]:
    """Anchors of the headings of a file, as GitHub forms them."""
    text = re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found]


def test_no_address_was_invented():
    for name in (
        *FILES[:3],
        "README.md",
        *(f"packages/umbrella-{part}/README.md" for part in ("data", "model", "train")),
    ):
        text = (ROOT / name).read_text()
        assert not re.findall(r"YOUR-ORG|[\w.]+@[\w-]+\.\w+", text), name
