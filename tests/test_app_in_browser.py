"""umbrella-app in headless Chromium: a real scan is given, looked at, asked about and removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from devtools import Page, find_chromium, open_page, wait_for
from random_run import write_random_run
from tiny_model import MODEL

from umbrella_data.manifest.sample import Scan
from umbrella_data.synthetic.cohort import make_demo_cohort
from umbrella_train.assembly.predict import predict
from umbrella_train.config import RunConfig

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

QUESTION = "What is the sex of this person?"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    find_chromium()
    folder = tmp_path_factory.mktemp("run")
    cohort = make_demo_cohort(folder / "cohort", num_train=1, num_test=1, seed=0)
    content = {"name": "run", "output_dir": folder, "model": MODEL, "trainer": {"use_cpu": True}}
    content["data"] = {"train": [{"manifest": str(cohort.train_manifest)}]}
    return write_random_run(folder / "random-run", RunConfig.model_validate(content))


def give(page: Page, modality: str, **files: Path) -> None:
    """Chooses a modality and files, and presses the button."""
    page.evaluate(f"document.getElementById('modality').value = '{modality}'; modality.onchange()")
    for part, file in files.items():
        page.choose_files(f'[data-part="{part}"] input', file)
    page.evaluate("document.getElementById('read').click()")


@pytest.fixture(scope="module")
def app(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of an app, and the folder of its temporary files."""
    temporary = tmp_path_factory.mktemp("temporary")
    words = [str(run), "--use-cpu", "--no-browser", "--port", "0"]
    app = subprocess.Popen(
        [sys.executable, "-c", "from umbrella_train.cli import app_command; app_command()", *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    try:
        assert app.stdout is not None
        yield app.stdout.readline().removeprefix("address: ").strip(), temporary
    finally:
        app.kill()
        app.wait()


def status_of(address: str) -> int:
    try:
        with urlopen(address, timeout=60) as reply:
            return reply.status
    except HTTPError as error:
        return error.code


def test_a_real_scan_is_shown_and_asked_about(
    run: Path, app: tuple[str, Path], real_data: Path, tmp_path: Path
) -> None:
    scan = sorted(real_data.glob("sub-ixi*/anat/*_T1w.nii.gz"))[0]
    damaged = tmp_path / "damaged.nii.gz"
    damaged.write_bytes(scan.read_bytes()[:100_000])
    expected = predict(run, question=QUESTION, scans=[Scan("T1", (scan,))], device="cpu")
    address, temporary = app
    with open_page(address, folder=tmp_path / "profile") as page:
        give(page, "T1", scan=scan)
        page.wait_for("!see.hidden && viewer.contentDocument?.querySelector('details')?.dataset.state === 'shown'")
        page.evaluate(f"question.value = '{QUESTION}'; send.click()")
        assert page.wait_for("document.querySelector('#answers dd')?.textContent") == expected
        assert page.evaluate("document.querySelector('#answers dt').textContent") == QUESTION
        assert list(temporary.glob("*/*")) == []
        page.take_screenshot(tmp_path / "page.png", width=1400)
        # Neither the page nor the viewer is wider than a phone.
        page.take_screenshot(tmp_path / "phone.png", width=390)
        wide = "document.documentElement.scrollWidth <= 390 && viewer.contentDocument.body.scrollWidth <= 390"
        assert page.evaluate(wide)
        assert page.errors == []
        # Who leaves the page removes the scan.
        shown = page.evaluate("viewer.src")
        page.call("Page.navigate", url="about:blank")
        page.wait_for("location.href === 'about:blank'")
        wait_for(lambda: status_of(shown) == 400, what="removed")
        page.call("Page.navigate", url=address)
        page.wait_for("location.href !== 'about:blank' && document.readyState === 'complete'")
        # A scan that is rejected: its reason, and no question about the scan before.
        give(page, "T1", scan=scan)
        page.wait_for("!see.hidden")
        give(page, "T1", scan=damaged)
        text = page.wait_for("document.querySelector('#scan-state.bad')?.textContent")
        assert text.startswith("This scan cannot be used: damaged.nii.gz: ")
        assert "[gzip_truncated]" in text
        assert page.evaluate("see.hidden && ask.hidden")
        give(page, "T1", scan=tmp_path / "page.png")
        assert ".nii" in page.wait_for("document.querySelector('#scan-state.bad')?.textContent")


def test_only_one_dropped_file_is_taken_for_a_field(app: tuple[str, Path], tmp_path: Path) -> None:
    with open_page(app[0], folder=tmp_path / "profile") as page:
        page.evaluate("""window.dropOn = (selector, ...names) => {
          const dataTransfer = new DataTransfer();
          for (const name of names) dataTransfer.items.add(new File(["1"], name));
          const drop = new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true });
          document.querySelector(selector).dispatchEvent(drop);
        }""")
        chosen = """[...document.querySelectorAll("[data-part]")].flatMap((label) =>
          [...label.querySelector("input").files].map((file) => `${label.dataset.part}: ${file.name}`))"""
        message = "document.querySelector('#scan-state.bad')?.textContent ?? ''"

        # Neither a T1 with its mask, nor two maps, nor two files on one field.
        for selector, *names in (
            ("#drop", "sub-1_T1w.nii.gz", "sub-1_mask.nii.gz"),
            ("#drop", "sub-1_FA.nii", "sub-1_MD.NII", "sub-1_dwi.json"),
            ("[data-part=mask]", "a.nii", "b.nii"),
        ):
            page.evaluate(f"dropOn({json.dumps(selector)}, ...{json.dumps(names)})")
            assert page.evaluate(chosen) == []
            text = page.evaluate(message)
            assert [name in text for name in names] == [not name.endswith(".json") for name in names]
        page.evaluate(
            "dropOn('#drop', 'a.nii.gz', 'a.bval', 'a.bvec', 'a.json'); dropOn('[data-part=mask]', 'mask.nii')"
        )
        assert page.evaluate(message) == ""
        ends = ["scan: a.nii.gz", "scan.bval: a.bval", "scan.bvec: a.bvec", "scan.json: a.json", "mask: mask.nii"]
        assert page.evaluate(chosen) == ends
        assert page.errors == []


def test_a_scan_that_another_window_replaced_is_removed_from_the_page(
    run: Path, app: tuple[str, Path], tmp_path: Path
) -> None:
    scan = next((run.parent / "cohort").glob("sub-*/anat/*_T1w.nii.gz"))
    with open_page(app[0], folder=tmp_path / "one") as page, open_page(app[0], folder=tmp_path / "two") as other:
        for each in (page, other):
            give(each, "T1", scan=scan)
            each.wait_for("!see.hidden")
        page.evaluate("document.getElementById('remove').click()")
        assert "another window" in page.wait_for("document.querySelector('#scan-state.bad')?.textContent")
        assert page.evaluate("see.hidden && ask.hidden")
        assert not other.evaluate("see.hidden")
