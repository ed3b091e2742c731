"""A small 3-D CNN of the SFCN kind.

Source: Peng et al. 2021, "Accurate brain age prediction with lightweight deep neural networks", Medical Image Analysis
68:101871.

Blocks of a 3x3x3 convolution, batch normalisation, max pooling and ReLU, then a 1x1x1 convolution, the mean over all
positions, and a linear head. It has fewer channels than the paper's, so that a hundred scans take minutes on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss

from umbrella_train.baselines.features import StoredVolume
from umbrella_train.baselines.models import Targets

NUM_EPOCHS = 30
_WIDTHS = (8, 16, 32, 64, 64)
_BATCH_SIZE = 8
_LEARNING_RATE = 3e-3
_MAX_SHIFT = 2


class SmallSFCN(nn.Module):
    """One branch of convolutions for each scan of a row, and one linear head on the features of all.

    Args:
        shapes: Shape (C, X, Y, Z) of each scan.
        num_outputs: Number of classes, or 1 for a number.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], *, num_outputs: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_branch(shape) for shape in shapes)
        self.head = nn.Linear(_WIDTHS[-1] * len(shapes), num_outputs)

    def forward(self, scans: Sequence[Tensor]) -> Tensor:
        """Outputs (B, num_outputs) for scans (B, C, X, Y, Z)."""
        features = [branch(scan).mean(dim=(2, 3, 4)) for branch, scan in zip(self.branches, scans, strict=True)]
        return self.head(torch.cat(features, dim=1))


def _branch(shape: tuple[int, ...]) -> nn.Sequential:
    channels, sizes = shape[0], list(shape[1:])
    layers: list[nn.Module] = []
    for width in _WIDTHS:
        # Axes of one voxel are not halved; the first block exists for any size.
        pool = tuple(2 if size > 1 else 1 for size in sizes)
        layers += [nn.Conv3d(channels, width, 3, padding=1, bias=False), nn.BatchNorm3d(width)]
        layers += [nn.MaxPool3d(pool), nn.ReLU()]
        channels, sizes = width, [size // step for size, step in zip(sizes, pool, strict=True)]
        if max(sizes) < 2:
            break
    return nn.Sequential(*layers, nn.Conv3d(channels, _WIDTHS[-1], 1), nn.ReLU())


def predict_cnn(
    train: Sequence[Sequence[StoredVolume]],
    test: Sequence[Sequence[StoredVolume]],
    targets: Targets,
    *,
    read: Callable[[StoredVolume], Tensor],
    seed: int,
    device: torch.device | str = "cpu",
    num_epochs: int = NUM_EPOCHS,
) -> np.ndarray:
    """Train on the rows of one question, and answer others: a pure function of its arguments on one machine.

    Args:
        train: Volumes of the scans of each training row, (N); all rows have the same shapes.
        test: Those of each test row, (M).
        targets: Answers of the training rows; not all the same.
        read: Returns a volume (C, X, Y, Z).
        seed: Seed of the weights, the order of the rows and the shifts.
        device: Where to compute.
        num_epochs: Passes over the training rows.

    Returns:
        Probabilities of the classes (M, K), or numbers (M,).
    """
    offset, scale = (0.0, 1.0) if targets.is_choice else (float(targets.values.mean()), float(targets.values.std()))
    right = torch.from_numpy(
        np.searchsorted(targets.classes, targets.values) if targets.is_choice else (targets.values - offset) / scale
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        torch.manual_seed(seed)
        network = SmallSFCN([each.shape for each in train[0]], num_outputs=len(targets.classes) or 1).to(device)
        chunks = -(-len(train) // _BATCH_SIZE)
        optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_epochs * chunks)
        for _ in range(num_epochs):
            # Batches of similar sizes: batch normalisation cannot use a last batch of one row.
            for rows in torch.randperm(len(train), generator=generator).tensor_split(chunks):
                outputs = network(_batch([train[row] for row in rows.tolist()], read, device, generator))
                answers = right[rows].to(device)
                loss = (
                    cross_entropy(outputs, answers)
                    if targets.is_choice
                    else smooth_l1_loss(outputs[:, 0], answers.float())
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        network.eval()
        with torch.no_grad():
            outputs = torch.cat([network(_batch([row], read, device)) for row in test]).double().cpu()
    return outputs.softmax(dim=1).numpy() if targets.is_choice else (outputs[:, 0] * scale + offset).numpy()


def _batch(
    rows: Sequence[Sequence[StoredVolume]],
    read: Callable[[StoredVolume], Tensor],
    device: torch.device | str,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """The scans of each place (B, C, X, Y, Z); with a generator each row is shifted by up to two voxels."""
    scans = []
    for place in range(len(rows[0])):
        volumes = [read(row[place]) for row in rows]
        if generator is not None:
            shifts = torch.randint(-_MAX_SHIFT, _MAX_SHIFT + 1, (len(rows), 3), generator=generator).tolist()
            # What is moved out at one side is background, and comes in at the other.
            volumes = [volume.roll(shift, dims=(1, 2, 3)) for volume, shift in zip(volumes, shifts, strict=True)]
        scans.append(torch.stack(volumes).to(device))
    return scans
