"""The HTML of a viewer has the volume on its grid, and nothing of its texts can end or add an element."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import nibabel as nib
import numpy as np
import pytest
import torch

from umbrella_data.viewer import Overlay, viewer_html, viewer_script
from umbrella_data.viewer.fragment import NUM_LEVELS

SPACING = (2.0, 3.0, 4.0)


def data_of(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def image_of(item: dict) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(item["nifti"])))


@pytest.fixture
def volume() -> torch.Tensor:
    return torch.randn(1, 5, 6, 7, generator=torch.Generator().manual_seed(0))


def test_embedded_file_has_the_volume_within_half_a_level(volume):
    (channel,) = data_of(viewer_html(volume, spacing=SPACING, channels=["T1"]))["channels"]
    level = float(volume.max() - volume.min()) / (NUM_LEVELS - 1)
    np.testing.assert_allclose(image_of(channel).get_fdata(), volume[0].numpy(), atol=0.51 * level)
    assert channel["name"] == "T1"
    assert volume.min() < channel["low"] < channel["high"] < volume.max()


def test_marker_on_the_left_of_the_person_has_a_negative_x_in_mm():
    volume = torch.zeros(1, 5, 6, 7)
    volume[0, 0, 4, 6] = 1.0  # RAS+: the first index along X is the left
    (channel,) = data_of(viewer_html(volume, spacing=SPACING, channels=["T1"]))["channels"]
    image = image_of(channel)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header.get_zooms() == SPACING
    index = np.unravel_index(image.get_fdata().argmax(), image.shape)
    np.testing.assert_allclose(nib.affines.apply_affine(image.affine, index), [-4.0, 4.5, 12.0])


def test_frames_are_limited_evenly_spaced_and_listed():
    frames = torch.arange(40.0).expand(2, 3, 3, 3, 40) * torch.tensor([1.0, 100.0]).view(2, 1, 1, 1, 1)
    data = data_of(viewer_html(frames, spacing=SPACING, channels=["A", "B"], max_frames=4))
    assert (data["frames"], data["num_frames"]) == ([1, 14, 27, 40], 40)
    for channel, scale in zip(data["channels"], (1, 100), strict=True):
        image = image_of(channel)
        assert image.shape == (3, 3, 3, 4)
        np.testing.assert_allclose(image.get_fdata()[0, 0, 0] / scale, [0, 13, 26, 39], atol=0.01)
    whole = data_of(viewer_html(frames[..., :4], spacing=SPACING, channels=["A", "B"]))
    assert (whole["frames"], whole["num_frames"]) == ([1, 2, 3, 4], 4)


def test_overlay_is_transparent_where_it_is_not_above_zero(volume):
    values = np.linspace(-5, 5, 210).reshape(5, 6, 7)
    mask = values > 0
    overlays = [Overlay(name="Brain mask", values=mask), Overlay(name="Map", values=values, colormap="hot", opacity=1)]
    shown = data_of(viewer_html(volume, spacing=SPACING, channels=["T1"], overlays=overlays))["overlays"]
    assert [(item["name"], item["colormap"], item["opacity"]) for item in shown] == [
        ("Brain mask", "red", 0.4),
        ("Map", "hot", 1),
    ]
    for item in shown:
        np.testing.assert_array_equal(image_of(item).get_fdata() > item["low"], mask)
    assert [item["high"] for item in shown] == [1.0, 5.0]
    empty = Overlay(name="Empty", values=np.zeros((5, 6, 7), dtype=bool))
    (item,) = data_of(viewer_html(volume, spacing=SPACING, channels=["T1"], overlays=[empty]))["overlays"]
    assert not (image_of(item).get_fdata() > item["low"]).any()


def test_texts_cannot_end_or_add_an_element(volume):
    text = "</script><b>&amp;</b><!--"
    overlay = Overlay(name=text, values=np.ones((5, 6, 7)))
    page = viewer_html(volume, spacing=SPACING, channels=[text], overlays=[overlay], title=text)
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)
    parser.feed(page)
    assert tags == ["details", "summary", "script"]
    data = data_of(page)
    assert data["channels"][0]["name"] == data["overlays"][0]["name"] == text


def test_viewer_is_closed_unless_asked(volume):
    assert viewer_html(volume, spacing=SPACING, channels=["T1"]).startswith('<details class="scan-viewer">')
    assert viewer_html(volume, spacing=SPACING, channels=["T1"], is_open=True).startswith(
        '<details class="scan-viewer" open>'
    )


def test_same_volume_gives_the_same_html(volume):
    first, second = (viewer_html(volume, spacing=SPACING, channels=["T1"]) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("shape", "options", "problem"),
    [
        ((5, 6, 7), {}, r"\(5, 6, 7\)"),
        ((1, 5, 6, 7), {"spacing": (1.0, 1.0)}, "2 voxel sizes"),
        ((2, 5, 6, 7), {}, "1 names of channels for a volume of 2"),
        ((1, 5, 6, 7), {"overlays": [Overlay(name="Map", values=np.zeros((5, 6, 8)))]}, r"overlay Map: .*\(5, 6, 8\)"),
    ],
)
def test_shapes_that_do_not_fit_are_rejected(shape, options, problem):
    with pytest.raises(ValueError, match=problem):
        viewer_html(torch.zeros(shape), **{"spacing": SPACING, "channels": ["T1"], **options})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_rejected(volume, value):
    volume[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match=r"T1: .* not finite"):
        viewer_html(volume, spacing=SPACING, channels=["T1"])


def test_library_is_the_published_file_with_its_licence():
    folder = files("umbrella_data.viewer")
    digest = hashlib.sha256((folder / "niivue.umd.js").read_bytes()).hexdigest()
    licence = (folder / "LICENSE.niivue.txt").read_text(encoding="utf-8")
    for text in ("@niivue/niivue 0.69.0", digest, "Copyright (c) 2021, Niivue", "BSD 2-Clause License"):
        assert text in licence


def test_script_can_be_inside_of_an_element():
    script = viewer_script()
    assert "Copyright (c) 2021, Niivue" in script
    assert not re.search(r"</script|<!--", script, re.IGNORECASE)
