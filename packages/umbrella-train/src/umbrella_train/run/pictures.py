"""Pictures of what the model sees, one for each modality, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from umbrella_data import ScanError
from umbrella_data.preview.figure import draw_volume
from umbrella_train.assembly.build import TrainingComponents
from umbrella_train.config import DatasetConfig, RunConfig


def draw_pictures(
    sources: Sequence[DatasetConfig], *, components: TrainingComponents, config: RunConfig, folder: Path
) -> None:
    """Draws the first scan of each modality after its pipeline, as `T1.png` and so on."""
    missing = dict(config.model.modalities)
    for source in sources:
        dataset = components.dataset(source, config=config, augment=False)
        for index in range(len(dataset)):
            if not missing:
                return
            if missing.keys().isdisjoint(dataset.modalities(index)):
                continue
            for scan in dataset.sample(index).scans:
                modality = missing.get(scan.modality)
                if modality is not None:
                    try:
                        volume = components.pipelines[scan.modality](scan.paths, generator=None, mask=scan.mask)
                    except ScanError:
                        if config.data.on_bad_scan == "raise":
                            raise
                        continue  # training reports it
                    del missing[scan.modality]
                    figure = draw_volume(volume, modality=scan.modality, patch_size=modality.patch_size)
                    # The report shows two next to each other: a smaller figure keeps the text readable.
                    width, height = figure.get_size_inches()
                    figure.set_size_inches(0.7 * width, 0.7 * height)
                    figure.savefig(folder / f"{scan.modality}.png", dpi=160)
