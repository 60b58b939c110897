"""Where the brain is in a volume, well enough to place slices and to measure head size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dinoatten3d.data.volume import Volume

LARGEST_BRAIN_ML = 2200.0
BRAIN_HEIGHT_MM = 150.0
ERODE_MM = 6.0


class BrainBox(NamedTuple):
    """Bounding box of the brain in voxel indices, `low` included and `high` excluded, and its volume."""

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    brain_ml: float


def brain_mask(volume: Volume) -> NDArray[np.bool_]:
    """Find the brain in a T1 volume.

    In a skull-stripped volume it is what differs from the background. In a whole head (more than 2.2 L of
    tissue) it is the largest piece of bright tissue that a 6 mm erosion leaves within 150 mm below the crown: a
    rough mask, good for extents and a head-size covariate, not for volumetry.

    Args:
        volume: RAS+ volume, `[right, anterior, superior]`.

    Returns:
        Mask of the same shape; never empty.
    """
    voxel_ml = float(np.prod(volume.spacing_mm)) / 1000
    background = _background(volume.data)
    head = volume.data > background
    if background == volume.data.min() and _volume_ml(head, voxel_ml) <= LARGEST_BRAIN_ML:
        return _largest_piece(head)
    tissue = volume.data > background + 0.5 * (_otsu(volume.data[head]) - background)
    if _volume_ml(tissue, voxel_ml) > LARGEST_BRAIN_ML:
        tissue = _without_scalp(volume, tissue)
    return _largest_piece(tissue)


def brain_box(volume: Volume) -> BrainBox:
    """Give the brain's bounding box and volume.

    End planes that hold less than 0.2 % of the mask are left out, so that a few stray voxels do not move the box.
    """
    mask = brain_mask(volume)
    low, high = [], []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        share = np.cumsum(mask.sum(axis=others)) / mask.sum()
        low.append(int(np.searchsorted(share, 0.002)))
        high.append(int(np.searchsorted(share, 0.998)) + 1)
    brain_ml = _volume_ml(mask, float(np.prod(volume.spacing_mm)) / 1000)
    return BrainBox(np.asarray(low), np.asarray(high), brain_ml)


def _background(data: NDArray[np.float32]) -> float:
    """Give the smallest value where the border holds little else, otherwise a bound on the border's noise."""
    faces = [np.take(data, index, axis=axis).ravel() for axis in range(3) for index in (0, -1)]
    border = np.concatenate(faces)
    lowest = float(data.min())
    return lowest if np.mean(border == lowest) > 0.5 else float(np.median(border))


def _otsu(values: NDArray[np.float32]) -> float:
    """Threshold that splits a histogram with the largest variance between its parts (Otsu 1979)."""
    counts, edges = np.histogram(values, bins=128)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(centres[int(np.nanargmax(between[:-1]))])


def _without_scalp(volume: Volume, tissue: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Cut the neck off, erode until scalp and brain part, keep the larger piece and grow it back."""
    per_slice = tissue.any(axis=(0, 1))
    crown = int(np.flatnonzero(per_slice)[-1])
    lowest = max(0, crown - round(BRAIN_HEIGHT_MM / volume.spacing_mm[2]))
    tissue = tissue.copy()
    tissue[:, :, :lowest] = False
    distance = ndimage.distance_transform_edt(tissue, sampling=volume.spacing_mm)
    core = distance > ERODE_MM
    if not core.any():
        return tissue
    core = _largest_piece(core)
    grown = ndimage.distance_transform_edt(~core, sampling=volume.spacing_mm) <= ERODE_MM + 0.5
    return np.asarray(grown & tissue)


def _largest_piece(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    pieces, count = ndimage.label(mask)
    if count > 1:
        mask = pieces == 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))
    return np.asarray(ndimage.binary_fill_holes(mask))


def _volume_ml(mask: NDArray[np.bool_], voxel_ml: float) -> float:
    return float(mask.sum()) * voxel_ml
