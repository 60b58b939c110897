"""What a file holds, before anything is learned from it: content, header and, if wanted, its voxels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinoatten3d.data.brain import brain_mask
from dinoatten3d.data.header import Header, read_header
from dinoatten3d.data.volume import Volume, load_volume
from dinoatten3d.errors import ScanError
from dinoatten3d.files import sha256

COARSE_MM = 2.0
SAMPLE = 100_000
"""Voxels that are looked at to count distinct intensities."""


@dataclass(frozen=True, kw_only=True)
class Voxels:
    """What the intensities of one scan show; directions are right, anterior, superior.

    Attributes:
        digest: SHA-256 of the voxels in RAS+ order with their size: the same for a copy under another name,
            compression, axis order or (lossless) type.
        lowest: Smallest intensity.
        highest: Largest intensity.
        levels: Distinct intensities in the brain, counted on a sample of its voxels.
        clipped: Share of brain voxels that have the largest intensity.
        brain_ml: Brain volume.
        extent_mm: Size of the brain.
        empty_slices: Constant slices between others that are not.
        cut_mm2: Largest area of brain on a face of the array, the lower one of a whole head left out.
        notes: What reading had to mend.
    """

    digest: str
    lowest: float
    highest: float
    levels: int
    clipped: float
    brain_ml: float
    extent_mm: tuple[float, float, float]
    empty_slices: int
    cut_mm2: float
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """One file: `problem` says why it cannot be used ("" if it can); what was not looked at is None."""

    sha256: str
    header: Header | None
    voxels: Voxels | None
    problem: str = ""


def inspect_scan(path: Path, *, voxels: bool = True) -> Inspection:
    """Read a scan's content digest and header, and look at its voxels unless told not to."""
    content = sha256(path) if path.exists() else ""
    header = None
    try:
        header = read_header(path)
        return Inspection(sha256=content, header=header, voxels=inspect_voxels(load_volume(path)) if voxels else None)
    except ScanError as error:
        return Inspection(sha256=content, header=header, voxels=None, problem=str(error))


def inspect_voxels(volume: Volume) -> Voxels:
    """Measure what can be wrong with the intensities of a volume, on every k-th voxel where it is finer than 2 mm."""
    digest = hashlib.sha256(f"{volume.data.shape} {volume.spacing_mm.round(2)}".encode() + volume.data.tobytes())
    empty = sum(_empty_slices(volume.data, axis) for axis in range(3))
    volume = _thinned(volume)
    data, spacing = volume.data, volume.spacing_mm
    mask = brain_mask(volume)
    inside = data[mask]
    extent = [_span(np.asarray(mask.any(axis=_others(axis)))) * spacing[axis] for axis in range(3)]
    return Voxels(
        digest=digest.hexdigest(),
        lowest=float(data.min()),
        highest=float(data.max()),
        levels=len(np.unique(inside[:: max(1, len(inside) // SAMPLE)])),
        clipped=float(np.mean(inside == data.max())),
        brain_ml=float(mask.sum() * np.prod(spacing) / 1000),
        extent_mm=(float(extent[0]), float(extent[1]), float(extent[2])),
        empty_slices=empty,
        cut_mm2=_cut_mm2(data, mask, spacing),
        notes=volume.notes,
    )


def _others(axis: int) -> tuple[int, int]:
    return (1, 2) if axis == 0 else (0, 2) if axis == 1 else (0, 1)


def _span(present: NDArray[np.bool_]) -> int:
    """Count from the first to the last that is present."""
    where = np.flatnonzero(present)
    return int(where[-1] - where[0] + 1)


def _thinned(volume: Volume) -> Volume:
    """Keep every k-th voxel, so that none is larger than 2 mm for it: a brain mask need not be fine to be checked."""
    steps = np.maximum(1, (COARSE_MM / volume.spacing_mm + 0.01).astype(int))
    return replace(
        volume,
        data=volume.data[:: steps[0], :: steps[1], :: steps[2]],
        affine_ras=volume.affine_ras @ np.diag([*steps, 1.0]),
    )


def _empty_slices(data: NDArray[np.float32], axis: int) -> int:
    """Count the constant slices among those that hold 99.6 % of the intensity."""
    others = _others(axis)
    share = np.cumsum((data - data.min()).sum(axis=others, dtype=np.float64))
    low, high = np.searchsorted(share / share[-1], (0.002, 0.998))
    constant = data.max(axis=others) == data.min(axis=others)
    return int(constant[low:high].sum())


def _cut_mm2(data: NDArray[np.float32], mask: NDArray[np.bool_], spacing: NDArray[np.float64]) -> float:
    """Give the largest area of brain that lies on a face; a neck may leave a whole head through the lower one."""
    stripped = bool(np.mean(data == data.min()) > 0.2 and np.mean(data[~mask] == data.min()) > 0.9)
    areas = []
    for axis in range(3):
        for index in (0, -1):
            if (axis, index) == (2, 0) and not stripped:
                continue
            voxel_mm2 = np.prod(spacing[list(_others(axis))])
            areas.append(float(np.take(mask, index, axis=axis).sum() * voxel_mm2))
    return max(areas)
