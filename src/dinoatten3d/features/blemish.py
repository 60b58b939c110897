"""A second look at a scan with a blemish painted in: what do tokens do where something is wrong?

A blemish is generic: a soft, ragged, textured blob anywhere in the tissue, darker or brighter. Nothing of a
diagnosis or of a real lesion goes in, so every scan can have one, and a probe that tells blemished patches from whole
ones needs no labels (learning/deviation.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

VOLUME_ML = (2.0, 60.0)
DARKER = (0.3, 0.8)
BRIGHTER = (1.2, 1.8)
EDGE_MM = (0.8, 2.0)
LEAST_TISSUE_PX = 200


@dataclass(frozen=True, kw_only=True)
class Blemished:
    """Slices with a blob painted in.

    Attributes:
        index: Which slices of the scan they are, `[k]`.
        pixels: 8-bit grey, `[k, rows, columns]`.
        weight: How far each pixel is inside the blob, 0 to 1, `[k, rows, columns]`.
        factor: What the blob multiplies the intensity by, `[k]`; below 1 is darker.
    """

    index: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    weight: NDArray[np.float32]
    factor: NDArray[np.float64]


def blemish(pixels: NDArray[np.uint8], mm_per_px: float, count: int, rng: np.random.Generator) -> Blemished:
    """Paint one blob into each of `count` slices, drawn at random among those with tissue.

    Args:
        pixels: Slices of one scan, 8-bit grey, `[slices, rows, columns]`.
        mm_per_px: Size of a pixel.
        count: Slices wanted; fewer where fewer hold tissue.
        rng: Decides slices, places, sizes, shapes and intensities.
    """
    masks = tissue_mask(pixels)
    eligible = np.flatnonzero(masks.sum(axis=(1, 2)) >= LEAST_TISSUE_PX)
    index = np.sort(rng.permutation(eligible)[:count])
    painted = [_paint(pixels[i], masks[i], mm_per_px, rng) for i in index]
    shape = (0, *pixels.shape[1:])
    return Blemished(
        index=index,
        pixels=np.stack([p for p, _, _ in painted]) if painted else np.zeros(shape, np.uint8),
        weight=np.stack([w for _, w, _ in painted]) if painted else np.zeros(shape, np.float32),
        factor=np.array([f for _, _, f in painted]),
    )


def tissue_mask(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Say which pixels are tissue: over a tenth of the slice's bright end, holes filled, `[slices, rows, columns]`."""
    bright = np.maximum(np.percentile(pixels, 99, axis=(1, 2)), 1)
    return np.stack([ndimage.binary_fill_holes(p > 0.1 * b) for p, b in zip(pixels, bright, strict=True)])


def patch_mean(values: NDArray[np.float32], patch_px: int) -> NDArray[np.float32]:
    """Average over patches: `[n, rows * patch, columns * patch]` to `[n, rows, columns]`."""
    n, height, width = values.shape
    tiles = values.reshape(n, height // patch_px, patch_px, width // patch_px, patch_px)
    return np.asarray(tiles.mean(axis=(2, 4)), dtype=np.float32)


def _paint(
    picture: NDArray[np.uint8], tissue: NDArray[np.bool_], mm_per_px: float, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float32], float]:
    """Paint one blob into one slice; gives the picture, the blob's weight and its factor."""
    rows, columns = np.indices(picture.shape)
    volume_mm3 = 1000 * np.exp(rng.uniform(*np.log(VOLUME_ML)))
    radius = (3 * volume_mm3 / (4 * np.pi)) ** (1 / 3) / mm_per_px
    radius *= np.sqrt(1 - rng.uniform(0, 0.9) ** 2)  # the slice cuts the ball off its centre
    places = np.argwhere(tissue)
    row, column = places[rng.integers(len(places))]
    angle, stretch = rng.uniform(0, np.pi), np.exp(rng.uniform(-0.4, 0.4))
    along = ((rows - row) * np.cos(angle) + (columns - column) * np.sin(angle)) * stretch
    across = (-(rows - row) * np.sin(angle) + (columns - column) * np.cos(angle)) / stretch
    ragged = np.exp(0.3 * _smooth_noise(picture.shape, max(4.0, radius / 2), rng))
    inside = (np.hypot(along, across) * ragged < radius) & tissue
    weight = ndimage.gaussian_filter(inside.astype(np.float32), rng.uniform(*EDGE_MM) / mm_per_px) * tissue
    factor = float(rng.uniform(*(BRIGHTER if rng.random() < 0.5 else DARKER)))
    grain = np.clip(_smooth_noise(picture.shape, 5 / mm_per_px, rng), -2, 2)
    texture = factor * (1 + rng.uniform(0, 0.2) * grain)
    painted = np.clip(picture * (1 + weight * (texture - 1)) + 0.5, 0, 255).astype(np.uint8)
    return painted, weight.astype(np.float32), factor


def _smooth_noise(shape: tuple[int, ...], sigma_px: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw a smooth random picture of mean 0 and deviation 1; coarse first, then enlarged, which is cheap."""
    step = max(1, int(sigma_px // 2))
    coarse = rng.standard_normal([n // step + 3 for n in shape])
    coarse = ndimage.gaussian_filter(coarse, sigma_px / step, mode="wrap")
    picture = ndimage.zoom(coarse, step, order=1)[: shape[0], : shape[1]]
    return np.asarray((picture - picture.mean()) / picture.std())
