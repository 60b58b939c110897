"""A `Volume` becomes `Slices`: square 8-bit pictures that know their place in millimetres."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinoatten3d.config import Plane, SliceConfig
from dinoatten3d.data.brain import BrainBox, brain_box
from dinoatten3d.data.volume import Volume
from dinoatten3d.errors import ScanError

AXIS: dict[Plane, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
"""The array axis that a plane's slices are stacked along."""
BRAIN_MARGIN = 0.04
MOST_INVENTED = 4
"""Interpolation may make at most this many slices out of one."""


@dataclass(frozen=True, kw_only=True)
class Slices:
    """Pictures of one scan, plane after plane.

    Attributes:
        pixels: 8-bit grey, `[slices, rows, columns]`. Anterior (axial) or superior (coronal, sagittal) is up and
            the patient's left is left, except for the published pixels, which keep the array's own axes.
        position_mm: RAS+ coordinate of each slice's centre along its plane's normal, `[slices]`, increasing in a plane.
        planes: Anatomical plane of each slice, `[slices]`.
        affine_ras: For each slice (row, column, slices further on in its plane) to RAS+ mm, `[slices, 4, 4]`.
        brain_ml: Volume of the brain (of the head, where the skull could not be told from it).
    """

    pixels: NDArray[np.uint8]
    position_mm: NDArray[np.float64]
    planes: tuple[Plane, ...]
    affine_ras: NDArray[np.float64]
    brain_ml: float


def planes_of(config: SliceConfig) -> tuple[Plane, ...]:
    """Give the plane of each slice that this configuration takes."""
    return tuple(plane for plane in config.planes for _ in range(config.count))


def stacks(planes: Sequence[Plane]) -> dict[Plane, slice]:
    """Give where the slices of each plane stand: slices are neighbours within a plane only."""
    found: dict[Plane, slice] = {}
    start = 0
    for plane, run in groupby(planes):
        found[plane] = slice(start, start + len(list(run)))
        start = found[plane].stop
    return found


def take_slices(volume: Volume, config: SliceConfig) -> Slices:
    """Cut a volume into pictures.

    Args:
        volume: RAS+ volume.
        config: Planes, count, spacing, grey window and fit.

    Returns:
        `config.count` slices in increasing position for each plane, in the order of `config.planes`.

    Raises:
        ScanError: The volume has too few slices for the count and spacing that were asked for.
    """
    box = brain_box(volume)
    cuts = [_cut(volume, box, config, plane) for plane in config.planes]
    pixels, position_mm, affine_ras = (np.concatenate(parts) for parts in zip(*cuts, strict=True))
    return Slices(
        pixels=pixels,
        position_mm=position_mm,
        planes=planes_of(config),
        affine_ras=affine_ras,
        brain_ml=box.brain_ml,
    )


class _Cut(NamedTuple):
    """The slices of one plane: pixels, position_mm and affine_ras as `Slices` has them."""

    pixels: NDArray[np.uint8]
    position_mm: NDArray[np.float64]
    affine_ras: NDArray[np.float64]


def _cut(volume: Volume, box: BrainBox, config: SliceConfig, plane: Plane) -> _Cut:
    axis = AXIS[plane]
    index = _slice_index(volume, box, config, plane)
    grey = _to_8_bit(_interpolate(volume.data, index, axis), volume, box, config)
    rows, columns = [a for a in range(3) if a != axis][::-1]
    if config.fit == "published":
        pixels, row_voxel, column_voxel = _published_fit(grey, config.size_px)
        rows, columns = columns, rows
    else:
        pixels, row_voxel, column_voxel = _square_fit(grey, volume, box, config, rows, columns)
    to_voxel = np.zeros((len(index), 4, 4))
    to_voxel[:, rows, [0, 3]] = row_voxel
    to_voxel[:, columns, [1, 3]] = column_voxel
    to_voxel[:, axis, 2] = index[1] - index[0] if len(index) > 1 else 1.0
    to_voxel[:, axis, 3] = index
    to_voxel[:, 3, 3] = 1
    affine = volume.affine_ras @ to_voxel
    middle = (config.size_px - 1) / 2
    return _Cut(pixels, (affine @ [middle, middle, 0, 1])[:, axis], affine)


def _slice_index(volume: Volume, box: BrainBox, config: SliceConfig, plane: Plane) -> NDArray[np.float64]:
    """Give the (fractional) array index of each slice along the plane's normal."""
    axis = AXIS[plane]
    length = volume.data.shape[axis]
    have = f"the scan has {length} {plane} slices of {volume.spacing_mm[axis]:.3g} mm"
    low, high = (0.0, length - 1.0) if config.centre == "array" else (float(box.low[axis]), box.high[axis] - 1.0)
    if config.spacing_mm == "brain":
        low, high = float(box.low[axis]), box.high[axis] - 1.0
        step = (high - low) / config.count
        index = low + step * (np.arange(config.count) + 0.5)
    elif config.spacing_mm == "native" and config.centre == "array":
        index = np.arange(config.count) + float(length // 2 - config.count // 2)
        step = 1.0
    else:
        step = 1.0 if config.spacing_mm == "native" else float(config.spacing_mm) / volume.spacing_mm[axis]
        start = (low + high) / 2 - step * (config.count - 1) / 2
        index = (round(start) if config.spacing_mm == "native" else start) + step * np.arange(config.count)
        shift = max(0.0, -index[0]) - max(0.0, index[-1] - (length - 1))
        if config.spacing_mm == "native":  # a brain near the border: move whole slices into the array
            index = index + np.sign(shift) * np.ceil(abs(shift))
    if index[0] < -1e-6 or index[-1] > length - 1 + 1e-6:
        raise ScanError(
            f"{have}, but {config.count} slices at spacing '{config.spacing_mm}' were asked for; "
            "take fewer, or use --slices.spacing-mm brain"
        )
    if step * MOST_INVENTED < 1:
        raise ScanError(f"{have}: too thick for {config.count} slices; take fewer (--slices.count)")
    return np.asarray(index, dtype=np.float64)


def _interpolate(data: NDArray[np.float32], index: NDArray[np.float64], axis: int) -> NDArray[np.float32]:
    """Read slices at fractional indices, `[slices, a, b]` with the remaining axes in order."""
    stack = np.moveaxis(data, axis, 0)
    below = np.clip(np.floor(index).astype(int), 0, len(stack) - 1)
    above = np.minimum(below + 1, len(stack) - 1)
    weight = (index - below)[:, None, None]
    if not weight.any():
        return np.asarray(stack[below])
    return np.asarray(stack[below] * (1 - weight) + stack[above] * weight, dtype=np.float32)


def _to_8_bit(planes: NDArray[np.float32], volume: Volume, box: BrainBox, config: SliceConfig) -> NDArray[np.uint8]:
    """Map intensities to 0..255, by volume or by slice."""
    if config.window == "slice":
        low = planes.min(axis=(1, 2), keepdims=True).astype(np.float64)
        high = planes.max(axis=(1, 2), keepdims=True).astype(np.float64)
        span = np.where(high > low, high - low, 1.0)
        return np.asarray((planes - low) / span * 255, dtype=np.uint8)
    inside = volume.data[tuple(slice(a, b) for a, b in zip(box.low, box.high, strict=True))]
    floor = float(volume.data.min())
    low, high = np.percentile(inside[inside > floor], [0.5, 99.5])
    low = min(low, floor) if np.mean(inside == floor) > 0.05 else low
    return np.asarray(np.clip((planes - low) / max(high - low, 1e-6) * 255 + 0.5, 0, 255), dtype=np.uint8)


def _square_fit(
    grey: NDArray[np.uint8], volume: Volume, box: BrainBox, config: SliceConfig, rows: int, columns: int
) -> tuple[NDArray[np.uint8], tuple[float, float], tuple[float, float]]:
    """Resize a square field of view around the brain or the array, up being anterior or superior.

    Returns the pixels and, for rows and columns, (scale, offset) from pixel to voxel index.
    """
    spacing, shape = volume.spacing_mm, volume.data.shape
    if config.fit == "brain":
        low, high = box.low.astype(float), box.high.astype(float)
    else:
        low, high = np.zeros(3), np.asarray(shape, dtype=float)
    extent = (high - low) * spacing
    side_mm = max(extent[rows], extent[columns]) * (1 + 2 * BRAIN_MARGIN * (config.fit == "brain"))
    edges = {}
    for axis in (rows, columns):
        middle, half = (low[axis] + high[axis]) / 2, side_mm / spacing[axis] / 2
        edges[axis] = (middle - half, middle + half)
    pictures = grey.transpose(0, 2, 1)[:, ::-1]  # [slice, row from the top, column from the left]
    top = shape[rows] - edges[rows][1]
    left = edges[columns][0]
    height, width = (edges[a][1] - edges[a][0] for a in (rows, columns))
    pad = 1 + int(np.ceil(max(0.0, -top, -left, top + height - shape[rows], left + width - shape[columns])))
    padded = np.pad(pictures, ((0, 0), (pad, pad), (pad, pad)))
    frame = (left + pad, top + pad, left + pad + width, top + pad + height)
    size = (config.size_px, config.size_px)
    pixels = np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC, frame)) for p in padded])
    row_scale, column_scale = height / config.size_px, width / config.size_px
    row_voxel = (-row_scale, edges[rows][1] - row_scale / 2 - 0.5)
    column_voxel = (column_scale, left + column_scale / 2 - 0.5)
    return pixels, row_voxel, column_voxel


def _published_fit(
    grey: NDArray[np.uint8], size_px: int
) -> tuple[NDArray[np.uint8], tuple[float, float], tuple[float, float]]:
    """Resize the shorter edge to 256/224 of the side and crop the centre, as the published code does."""
    rows, columns = grey.shape[1:]
    shorter = round(size_px * 256 / 224)
    scale = shorter / min(rows, columns)
    height, width = (
        shorter if n == min(rows, columns) else int(shorter * n / min(rows, columns)) for n in (rows, columns)
    )
    top, left = round((height - size_px) / 2), round((width - size_px) / 2)
    pixels = np.stack(
        [
            np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.BILINEAR))[
                top : top + size_px, left : left + size_px
            ]
            for p in grey
        ]
    )
    return pixels, (1 / scale, (top + 0.5) / scale - 0.5), (1 / scale, (left + 0.5) / scale - 0.5)
