"""HTML page with figures of some preprocessed scans of each modality (`umbrella-data preview`)."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from umbrella_data.errors import ManifestError, ScanError
from umbrella_data.files.atomic import write_atomically
from umbrella_data.manifest.sample import Sample, Scan
from umbrella_data.pipeline.patch_grid import patch_grid
from umbrella_data.preview.figure import draw_volume
from umbrella_data.preview.scan_viewer import conversation_html, header_warnings, scan_viewer
from umbrella_data.scan.diffusion import check_dipy, needs_fit
from umbrella_data.viewer import viewer_script
from umbrella_data.viewer.fragment import MAX_FRAMES, NUM_LEVELS

if TYPE_CHECKING:
    import torch

    from umbrella_data.manifest.manifest import Manifest
    from umbrella_data.pipeline.pipeline import Pipeline

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
figure { margin: 1.5rem 0; } img { display: block; width: 100%; } figcaption { font-size: .9rem; color: #444; }
table { border-collapse: collapse; display: block; overflow-x: auto; white-space: nowrap; }
td, th { padding: .2rem .8rem; text-align: left; border-bottom: 1px solid #ddd; }
code { font-size: .85em; } .bad { color: #a00; }
.conversation { display: grid; grid-template-columns: max-content 1fr; gap: .2rem .8rem; font-size: .9rem; }
.conversation { margin: .5rem 0; } .conversation dt { color: #444; }
.conversation dd { margin: 0; white-space: pre-line; }
"""


@dataclass(frozen=True)
class Picture:
    """One scan on the page.

    Attributes:
        modality: The canonical name.
        label: The scan's heading.
        caption: Subject, file, shape and values, or the error.
        file: Name of its PNG next to the page; None if the scan cannot be used.
        details: HTML of the questions, the answers and the viewer.
    """

    modality: str
    label: str
    caption: str
    file: str | None
    details: str = ""


@dataclass(frozen=True)
class PreviewReport:
    """The written page.

    Attributes:
        page: The HTML file.
        pictures: The scans on it.
        failed: The errors of scans that cannot be used.
    """

    page: Path
    pictures: Sequence[Picture]
    failed: Sequence[ScanError]


def write_preview(
    manifests: Sequence[Manifest],
    *,
    pipelines: Mapping[str, Pipeline],
    patch_sizes: Mapping[str, Sequence[int]],
    folder: Path,
    name: Callable[[str], str],
    num_scans: int = 3,
    progress: Callable[[list[tuple[Sample, Scan]]], Iterable[tuple[Sample, Scan]]] = iter,
) -> PreviewReport:
    """Draw the first scans of each modality, of different subjects if possible, and write them as a page.

    The page is `index.html`, with PNG files and `viewer.js`, the script of its viewers, next to it.

    Args:
        manifests: The manifests with the scans.
        pipelines: By modality; scans of other modalities are skipped.
        patch_sizes: Voxels (and frames) of a patch, by modality; no grid is drawn without one.
        folder: Folder for the page.
        name: Maps the names of subjects and files to those on the page: hashes, or the same names.
        num_scans: Scans of each modality.
        progress: Wraps the scans while they are drawn, as tqdm does.

    Raises:
        ManifestError: If no manifest has a scan of these modalities.
        ImportError: If matplotlib is missing, or dipy and a DWI must be fitted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = _choose(manifests, list(pipelines), num_scans)
    if not chosen:
        listed = ", ".join(sorted(pipelines))
        raise ManifestError(f"no scan of {listed}", path=manifests[0].path if manifests else "")
    check_dipy(scan.paths[0] for _, scan in chosen if needs_fit(scan.paths, scan.modality))
    pictures: list[Picture] = []
    failed: list[ScanError] = []
    for sample, scan in progress(chosen):
        number = sum(picture.modality == scan.modality for picture in pictures) + 1
        label = f"{scan.modality} {number}"
        file: str | None = f"{scan.modality}-{number}.png"
        details = conversation_html(sample, name=name)
        pipeline = pipelines[scan.modality]
        try:
            volume = pipeline(scan.paths, generator=None, mask=scan.mask)
            caption = _draw(volume, scan, patch_sizes.get(scan.modality), folder / str(file), number)
            caption += "".join(f" Warning: {warning}." for warning in header_warnings(scan.paths, spec=pipeline.spec))
            details += scan_viewer(volume, pipeline=pipeline, paths=scan.paths, mask=scan.mask)
        except ScanError as error:
            failed.append(error.bare())
            file, caption = None, f"cannot be used: {error.reason}"
        source = f"subject {name(sample.subject)}, scan {name(str(scan.paths[0]))}"
        pictures.append(Picture(scan.modality, label, f"{source}. {caption}", file, details))
    write_atomically(folder / "viewer.js", [viewer_script().encode()])
    page = folder / "index.html"
    write_atomically(page, [_to_html(pictures, pipelines, patch_sizes).encode()])
    return PreviewReport(page, pictures, failed)


def _choose(manifests: Sequence[Manifest], modalities: Sequence[str], num_scans: int) -> list[tuple[Sample, Scan]]:
    """The first scans of each modality in the order of the manifests, one of each subject before any second one."""
    found: dict[str, dict[str, tuple[Sample, Scan]]] = {modality: {} for modality in modalities}
    more: dict[str, dict[Scan, Sample]] = {modality: {} for modality in found}
    for manifest in manifests:
        for row in range(len(manifest)):
            wanted = {modality for modality in modalities if len(found[modality]) < num_scans}
            if not wanted:
                break
            if wanted.isdisjoint(manifest.modalities(row)):
                continue
            sample = manifest[row]
            for scan in sample.scans:
                if scan.modality not in wanted:
                    continue
                _, first = found[scan.modality].setdefault(sample.subject, (sample, scan))
                if scan != first and len(more[scan.modality]) < num_scans:
                    more[scan.modality].setdefault(scan, sample)
    chosen = []
    for modality, of_subjects in found.items():
        others = ((sample, scan) for scan, sample in more[modality].items())
        chosen += [*of_subjects.values(), *others][:num_scans]
    return chosen


def _draw(volume: torch.Tensor, scan: Scan, patch_size: Sequence[int] | None, path: Path, number: int) -> str:
    figure = draw_volume(volume, modality=scan.modality, patch_size=patch_size, title=f"scan {number}")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    masked = "" if scan.mask is None else "; voxels outside of the brain mask are 0 before normalisation"
    return (f"Shape {' × '.join(map(str, volume.shape))}, values {volume.min():.2f} to {volume.max():.2f}, "
            f"mean {volume.mean():.2f}{masked}.")  # fmt: skip


def _to_html(
    pictures: Sequence[Picture], pipelines: Mapping[str, Pipeline], patch_sizes: Mapping[str, Sequence[int]]
) -> str:
    sections = []
    for modality in dict.fromkeys(picture.modality for picture in pictures):
        rows = [_figure(picture) for picture in pictures if picture.modality == modality]
        sections.append(f"<h2>{html.escape(modality)}</h2>\n" + "\n".join(rows))
    table = "\n".join(_table_row(name, pipeline, patch_sizes.get(name)) for name, pipeline in pipelines.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>What the model sees</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>What the model sees</h1>
<p>Each scan after its pipeline, without augmentation. Letters are directions: <b>R</b>ight and <b>L</b>eft of the
person, <b>A</b>nterior, <b>P</b>osterior, <b>S</b>uperior, <b>I</b>nferior. Lines are the borders of patches; each
patch is one token. Voxels are drawn as squares: if the whole field of view is resized, a head may look stretched. A
carpet plot shows foreground voxels over time, each minus its own mean. Below a picture, the scan can be opened: its
values are rounded to {NUM_LEVELS:,} levels, and of a series at most {MAX_FRAMES} frames are in the page.</p>
<table><tr><th>modality</th><th>image size</th><th>patch size</th><th>tokens</th><th>spacing</th><th>normalised by</th>
</tr>
{table}
</table>
{chr(10).join(sections)}
<script src="viewer.js"></script>
</body></html>
"""


def _table_row(name: str, pipeline: Pipeline, patch_size: Sequence[int] | None) -> str:
    config = pipeline.config
    size = config.image_size
    tokens = "–" if patch_size is None else f"{prod(patch_grid(size, patch_size, modality=name)):,}"
    spacing = (
        "whole field of view" if config.spacing is None else " × ".join(f"{mm:g}" for mm in config.spacing) + " mm"
    )
    cells = [name, _times(size), "–" if patch_size is None else _times(patch_size), tokens, spacing, config.normalise]
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _times(numbers: Sequence[float]) -> str:
    return " × ".join(f"{number:g}" for number in numbers)


def _figure(picture: Picture) -> str:
    label, caption = html.escape(picture.label), html.escape(picture.caption)
    if picture.file is None:
        return f'<p class="bad"><b>{label}</b>: {caption}</p>'
    return (f'<figure><img src="{html.escape(picture.file)}" alt="{label} in three planes">'
            f"<figcaption><b>{label}</b>: {caption}</figcaption>\n{picture.details}</figure>")  # fmt: skip
