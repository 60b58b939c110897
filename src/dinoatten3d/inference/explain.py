"""What a prediction looked at, as a table, a figure's data and a map in the scan's own space."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from dinoatten3d.data.slices import Slices, stacks
from dinoatten3d.data.volume import Volume
from dinoatten3d.inference.predict import Prediction


def explain(prediction: Prediction) -> pd.DataFrame:
    """Give one row a slice: its position, its weight, its weight in units of uniform attention, and its rank."""
    weights = prediction.slice_weights
    order = np.argsort(-weights, kind="stable")
    rank = np.empty(len(weights), dtype=int)
    rank[order] = np.arange(1, len(weights) + 1)
    return pd.DataFrame(
        {
            "slice": np.arange(len(weights)),
            "plane": prediction.slices.planes,
            "position_mm": prediction.slices.position_mm,
            "weight": weights,
            "over_uniform": weights * len(weights),
            "rank": rank,
        }
    )


def slice_weight_map(prediction: Prediction) -> nib.Nifti1Image:
    """Lay the slice weights over the scan, in the file's own grid.

    Each voxel holds the weight, in units of uniform attention (1: as much as any slice), of the slice that it lies
    in, 0 beyond the slices; with several planes the mean of the slices that cross there. Nothing is resampled: the
    image has the scan's shape and affine.
    """
    volume, slices = prediction.volume, prediction.slices
    relative = prediction.slice_weights * len(prediction.slice_weights)
    laid = [
        _by_slice(
            relative[run], np.linalg.inv(slices.affine_ras[run.start]) @ volume.source_affine, volume.source_shape
        )
        for run in stacks(slices.planes).values()
    ]
    return nib.Nifti1Image(np.mean(laid, axis=0, dtype=np.float32), volume.source_affine)


def deviation_map(prediction: Prediction) -> nib.Nifti1Image | None:
    """Lay the patch map over the scan; None where the recipe looks at slices alone."""
    if prediction.patch_map is None:
        return None
    return patch_volume(prediction.patch_map, prediction.slices, prediction.volume)


def patch_volume(patch_map: NDArray[np.float32], slices: Slices, volume: Volume) -> nib.Nifti1Image:
    """Lay a patch map over the scan, in the file's own grid, read linearly between patch centres; 0 beyond them.

    With several planes a voxel holds their mean: what deviates from every side stands out. A patch of 224 px slices
    is about 11 mm wide: the map shows where to look, not an outline.

    Args:
        patch_map: `[slices, rows, columns]`.
        slices: The pictures that were cut into these patches.
        volume: The scan that they were taken from.
    """
    patch_px = slices.pixels.shape[1] / patch_map.shape[1]
    laid = []
    for run in stacks(slices.planes).values():
        to_picture = np.linalg.inv(slices.affine_ras[run.start]) @ volume.source_affine  # voxel to (row, column, slice)
        to_patch = np.diag([1 / patch_px, 1 / patch_px, 1, 1]) @ to_picture
        to_patch[:2, 3] += 0.5 / patch_px - 0.5  # from pixel centres to patch centres
        by_row = np.moveaxis(patch_map[run], 0, 2)  # [rows, columns, slices]
        laid.append(ndimage.affine_transform(by_row, to_patch[:3, :3], to_patch[:3, 3], volume.source_shape, order=1))
    return nib.Nifti1Image(np.mean(laid, axis=0, dtype=np.float32), volume.source_affine)


def _by_slice(
    values: NDArray[np.float64], to_slice: NDArray[np.float64], shape: tuple[int, int, int]
) -> NDArray[np.float32]:
    """Read `values` at the slice coordinate (third row of `to_slice`) of every voxel, nearest neighbour."""
    i, j, k = (np.arange(n).reshape([-1 if a == axis else 1 for a in range(3)]) for axis, n in enumerate(shape))
    row = to_slice[2]
    # a tiny bias keeps voxels halfway between two slices on one side, whatever the rounding
    nearest = np.floor(row[0] * i + row[1] * j + row[2] * k + row[3] + 0.5 + 1e-6).astype(int)
    inside = (nearest >= 0) & (nearest < len(values))
    return np.where(inside, values[np.clip(nearest, 0, len(values) - 1)], 0.0).astype(np.float32)
