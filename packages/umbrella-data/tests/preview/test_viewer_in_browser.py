"""The viewer in headless Chromium: what is drawn is on the side that the letters and the page say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="pictures need the extra [preview]")

from matplotlib.image import imread

from umbrella_data.cli import main
from umbrella_data.viewer import Overlay, viewer_html, viewer_script

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]  # software rendering, on a machine that may be busy

WIDTH, HEIGHT = 900, 640
# Its colour, from 0 to 1.
CROSSHAIR = (0.2, 0.7, 1.0)
# Only the viewer is left on the page, so that a picture of the scan cannot be taken for it.
STYLE = "<style>body { margin: 0; padding: 0; max-width: none; } body > *, figure > * { display: none; } \
h2 ~ figure, figure > details { display: block; margin: 0; }</style>"
CLICK = """<script>
const timer = setInterval(() => {
  if (document.querySelector("details").dataset.state !== "shown") return;
  clearInterval(timer);
  document.querySelector("input[type=checkbox]").click();
}, 50);
</script>"""


# Uses the controls of the first viewer, then opens the second one; writes what the page says to #log.
STEPS = """<pre id="log"></pre><script>
const [first, second] = document.querySelectorAll("details");
const shown = (details) => new Promise((resolve) => {
  const timer = setInterval(() => {
    if (details.dataset.state === "shown") { clearInterval(timer); resolve(); }
  }, 50);
});
const write = (text) => { document.querySelector("#log").textContent += text + "\\n"; };
const value = (details) => write(details.querySelector(".scan-viewer-value").textContent.split(";")[0]);
(async () => {
  await shown(first);
  value(first);
  const frame = first.querySelector("input[type=range]");
  frame.value = 2;
  frame.oninput();
  value(first);
  const channel = first.querySelector("select");
  channel.selectedIndex = 1;
  await channel.onchange();
  value(first);
  write(first.querySelector(".scan-viewer-place").textContent.match(/Frames in this page.*[.]/));
  second.open = true;
  await shown(second);
  value(second);
  write(`${first.open} ${first.querySelectorAll("canvas").length} ${second.querySelectorAll("canvas").length}`);
})();
</script>"""


class Pane(NamedTuple):
    """What the axial pane shows: pixels from its left edge, and whether its left letter is L."""

    marker: float
    middle: float
    is_left_on_the_left: bool


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser; required in CI, otherwise tests are skipped without it."""
    for name in ("chromium", "google-chrome"):
        if (path := shutil.which(name)) is not None:
            return path
    if os.environ.get("CI"):
        pytest.fail("chromium is not installed: in CI the tests in a browser must not skip")
    pytest.skip("chromium is not installed")


def browse(browser: str, page: Path, *options: str) -> str:
    """Starts the browser for one page, and returns what it prints."""
    command = [
        browser, "--headless", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
        "--hide-scrollbars", "--virtual-time-budget=20000", f"--user-data-dir={page.parent / 'profile'}",
        *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, timeout=500, check=True, text=True).stdout


def take_pictures(browser: str, pages: list[Path], folder: Path) -> list[np.ndarray]:
    """The pixels (HEIGHT, WIDTH, 3), from 0 to 1, of some pages, in one start of the browser."""
    frames = "".join(f'<iframe src="{page}" width="{WIDTH}" height="{HEIGHT}"></iframe>' for page in pages)
    style = "<style>body { margin: 0 } iframe { display: block; border: 0 }</style>"
    (folder / "all.html").write_text(f"<!doctype html>{style}{frames}")
    picture = folder / "all.png"
    browse(browser, folder / "all.html", f"--window-size={WIDTH},{HEIGHT * len(pages)}", f"--screenshot={picture}")
    pixels = imread(picture)[..., :3]
    return np.split(pixels[: HEIGHT * len(pages)], len(pages))


def opened(page: Path, name: str, *, more: str = "") -> Path:
    """A copy of a preview page with one scan, whose viewer is open and alone."""
    text = page.read_text().replace('<details class="scan-viewer">', '<details class="scan-viewer" open>')
    assert text.count('<details class="scan-viewer" open>') == 1
    copy = page.with_name(name)
    copy.write_text(text.replace("</body>", f"{STYLE}{more}</body>"))
    return copy


def axial_pane(pixels: np.ndarray) -> Pane:
    """Finds the axial pane, which is the leftmost, by its crosshair."""
    crosshair = np.abs(pixels - CROSSHAIR).max(axis=2) < 0.08
    columns = np.flatnonzero(crosshair.sum(axis=0) > 100)
    middles = columns[np.r_[True, np.diff(columns) > 3]]
    assert len(middles) == 3, "a vertical line in each of three panes"
    middle = int(middles[0])
    top, bottom = np.flatnonzero(crosshair[:, middle])[[0, -1]]
    row = int(crosshair.sum(axis=1).argmax())
    left = int(np.flatnonzero(crosshair[row])[0])
    # The crosshair is in the centre of the pane.
    pane = pixels[top : bottom + 1, left : 2 * middle - left + 1]
    marker = np.flatnonzero((pane.min(axis=2) > 0.97).sum(axis=0) > 5)
    assert marker.size > 5, "the marker, in white"
    letters = (pane[..., 0] > 0.5) & (pane[..., 2] < 0.3)
    width = pane.shape[1]
    names = {letter(letters[:, : width // 4]), letter(letters[:, -width // 4 :])}
    assert names == {"L", "R"}
    return Pane(float(marker.mean()), width / 2, letter(letters[:, : width // 4]) == "L")


def letter(pixels: np.ndarray) -> str:
    """Whether pixels (H, W) bool are an L or an R: an L has nothing in its upper right quarter."""
    rows, columns = (np.flatnonzero(pixels.any(axis=axis)) for axis in (1, 0))
    assert 8 < np.ptp(rows) < 30, "one letter"
    box = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = box.shape
    return "R" if box[: height // 2, width // 2 + 1 :].any() else "L"


@pytest.fixture
def phantom() -> np.ndarray:
    """A head in RAS+ with a bright marker on the person's left, in front, in its middle slice."""
    grid = np.meshgrid(*[np.linspace(-1, 1, 24)] * 3, indexing="ij")
    voxels = np.where(sum(axis**2 for axis in grid) < 0.7, 400, 0).astype(np.int16)
    voxels[5:9, 13:17, 10:14] = 3000
    return voxels


def test_marker_is_on_the_labelled_side(chromium, phantom, nifti, make_row, write_manifest, tmp_path):
    pages = []
    for orientation in ("RAS", "LAS"):
        nifti.write(phantom, f"{orientation}_0.nii.gz", orientation=orientation)
        path = write_manifest([make_row(orientation, "T1")], f"{orientation}.jsonl")
        out = tmp_path / f"page-{orientation}"
        assert main(["preview", str(path), "--size", "T1=24,24,24", "--out", str(out), "--num", "1"]) == 0
        pages.append(opened(out / "index.html", "open.html"))
    pages.append(opened(out / "index.html", "radiological.html", more=CLICK))
    shown = [axial_pane(pixels) for pixels in take_pictures(chromium, pages, tmp_path)]
    for pane in shown:
        # The marker is where the letter L is.
        assert (pane.marker < pane.middle - 20) == pane.is_left_on_the_left
        assert abs(pane.marker - pane.middle) > 20
    assert [pane.is_left_on_the_left for pane in shown] == [True, True, False]


def test_real_scan_is_drawn(chromium, real_data, make_row, write_manifest, tmp_path):
    row = make_row("real", "T1")
    scan = min(real_data.glob("sub-*/anat/*_T1w.nii.gz"))
    row["messages"][0]["content"][0]["path"] = str(scan.relative_to(real_data))
    out = tmp_path / "page"
    args = ["--data-root", str(real_data), "--size", "T1=32,32,32", "--out", str(out)]
    assert main(["preview", str(write_manifest([row])), *args]) == 0
    (pixels,) = take_pictures(chromium, [opened(out / "index.html", "open.html")], tmp_path)
    is_grey = (np.ptp(pixels, axis=2) < 0.02) & (pixels.min(axis=2) > 0.1) & (pixels.max(axis=2) < 0.9)
    assert is_grey.sum() > 20_000
    assert len(np.unique(pixels[is_grey].round(2))) > 30


def test_controls_change_frame_and_channel_and_one_viewer_is_open(chromium, tmp_path):
    # The value is 10 times the channel plus the frame, from 1.
    frames = torch.arange(1.0, 5.0) + 10 * torch.arange(2.0).view(2, 1, 1, 1, 1)
    volume = frames.expand(2, 5, 5, 5, 4).contiguous()
    volume[:, 0] = 0  # contrast
    inside = Overlay(name="Inside <b>", values=np.ones((5, 5, 5)))
    options = {"spacing": (2.0, 2.0, 2.0), "overlays": [inside]}
    viewers = [
        viewer_html(volume, channels=["A", "B"], max_frames=3, is_open=True, **options),
        viewer_html(volume[:1, ..., 0], channels=["C"], **options),
    ]
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html>{''.join(viewers)}<script>{viewer_script()}</script>{STEPS}", encoding="utf-8")
    (log,) = re.findall(r'<pre id="log">(.*?)</pre>', browse(chromium, page, "--dump-dom"), re.DOTALL)
    first, second, third, listed, other, last = log.splitlines()
    for line, expected in ((first, 1), (second, 4), (third, 14), (other, 1)):
        found, overlay = re.fullmatch(r"Crosshair: value ([\d.]+), Inside &lt;b&gt; ([\d.]+)", line).groups()
        assert float(found) == pytest.approx(expected, abs=0.01)
        assert float(overlay) == 1
    assert re.findall(r"\d+", listed) == ["1", "3", "4", "4"]
    assert last == "false 0 1"
