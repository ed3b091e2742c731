"""Pictures of what the model sees, one for each modality, and viewers of these scans, for the report."""

from __future__ import annotations

from collections.abc import Sequence

from umbrella_data import ScanError
from umbrella_data.files.atomic import write_atomically
from umbrella_data.preview.figure import draw_volume
from umbrella_data.preview.scan_viewer import conversation_html, scan_viewer
from umbrella_train.assembly.build import TrainingComponents
from umbrella_train.config import DatasetConfig, RunConfig
from umbrella_train.report.run_data import has_viewers
from umbrella_train.run_folder import RunFolder


def draw_pictures(
    sources: Sequence[DatasetConfig], *, components: TrainingComponents, config: RunConfig, folder: RunFolder
) -> None:
    """Draws the first scan of each modality after its pipeline, as `T1.png` and so on.

    The HTML of its viewer, with its questions and answers, is written as `T1.html` if the report may have it.
    """
    missing = dict(config.model.modalities)
    for source in sources:
        dataset = components.dataset(source, config=config, augment=False)
        for index in range(len(dataset)):
            if not missing:
                return
            if missing.keys().isdisjoint(dataset.modalities(index)):
                continue
            sample = dataset.sample(index)
            for scan in sample.scans:
                modality = missing.get(scan.modality)
                if modality is not None:
                    pipeline = components.pipelines[scan.modality]
                    try:
                        volume = pipeline(scan.paths, generator=None, mask=scan.mask)
                    except ScanError:
                        if config.data.on_bad_scan == "raise":
                            raise
                        continue  # training reports it
                    del missing[scan.modality]
                    figure = draw_volume(volume, modality=scan.modality, patch_size=modality.patch_size)
                    # The report shows two next to each other: a smaller figure keeps the text readable.
                    width, height = figure.get_size_inches()
                    figure.set_size_inches(0.7 * width, 0.7 * height)
                    figure.savefig(folder.pictures / f"{scan.modality}.png", dpi=160)
                    if has_viewers(config.model_dump()):
                        viewer = scan_viewer(volume, pipeline=pipeline, paths=scan.paths, mask=scan.mask)
                        text = conversation_html(sample, name=folder.subject_hash()) + viewer
                        write_atomically(folder.pictures / f"{scan.modality}.html", [text.encode()])
