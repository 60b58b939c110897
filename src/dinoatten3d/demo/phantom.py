"""A cohort of synthetic brains, made from the MNI152 T1 brain that nilearn ships.

Every scan is the same brain with another head size and shape, anatomy (a smooth deformation), contrast, bias
field, noise, voxel grid and axis order. Half of the scans have one T1-dark lesion, and differ from the
others in nothing else: what a scanner and a person would vary is drawn before, and apart from, the lesion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nilearn.datasets import load_mni152_brain_mask, load_mni152_template
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from dinoatten3d.demo.cohorts import DemoCohort, DemoScan, Progress, publish, stored_image
from dinoatten3d.errors import CohortError, ConfigError

__all__ = ["PhantomConfig", "make_phantom_cohort", "phantom_scan"]

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

STORED_ORDERS = ("RAS", "LAS", "LPS", "PSR", "RSA", "AIL")
"""Axis orders that real scans come in; the array must not be assumed to be any one of them."""


@dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """What the synthetic cohort looks like."""

    scans: int = 48
    """Number of scans, one a subject; half of them get a lesion; >= 2."""
    seed: int = 0
    """Decides every draw; the same seed gives the same bytes."""
    lesion_volume_ml: tuple[float, float] = (1.0, 30.0)
    """Smallest and largest lesion, every volume between as likely; at most 300 mL."""
    lesion_intensity: tuple[float, float] = (0.05, 0.4)
    """Factor on the tissue's intensity inside a lesion: lower is darker and easier to see; within (0, 1]."""
    edge_mm: float = 1.5
    """Standard deviation of the lesion's soft edge, in mm; >= 0."""
    deformation_mm: float = 1.5
    """Standard deviation of the smooth displacement that makes each anatomy its own; 0 to 6 mm."""
    noise: tuple[float, float] = (0.005, 0.015)
    """Least and most noise, as a share of the white matter's intensity; > 0."""

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        if self.scans < 2:
            raise ConfigError(f"scans is {self.scans}, but a cohort needs one healthy and one lesion scan; give 2+")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, but seeds count from 0; give 0 or more")
        check_range("lesion_volume_ml", self.lesion_volume_ml, above=0, up_to=300)
        check_range("lesion_intensity", self.lesion_intensity, above=0, up_to=1)
        check_range("noise", self.noise, above=0, up_to=1)
        if not 0 <= self.deformation_mm <= 6:
            raise ConfigError(f"deformation_mm is {self.deformation_mm}, but beyond 0-6 the brain folds; choose less")
        if not 0 <= self.edge_mm <= 10:
            raise ConfigError(f"edge_mm is {self.edge_mm}, but a soft edge is 0-10 mm; choose a value between")


class Template(NamedTuple):
    """The MNI152 brain on a canonical grid."""

    t1: Array
    """Shape (x, y, z), skull-stripped, about 0 to 1."""
    brain: Array
    """Shape (x, y, z), 1 in the brain and 0 outside."""
    affine_ras: NDArray[np.float64]


class Anatomy(NamedTuple):
    """One healthy brain as the scanner would see it, before noise, on a canonical grid."""

    tissue: Array
    brain: Mask
    affine_ras: NDArray[np.float64]
    spacing_mm: NDArray[np.float64]


def make_phantom_cohort(out: Path, *, config: PhantomConfig, progress: Progress | None = None) -> DemoCohort:
    """Make the synthetic cohort at ``out``; do nothing if this configuration made it before.

    Args:
        out: folder to make; the layout is that of ``demo.cohorts``.
        config: what to make.
        progress: called as ``progress(done, total)`` after each scan.

    Raises:
        CohortError: ``out`` holds something else.
    """
    record = {"config": asdict(config)}
    return publish(out, "phantom", record, _scans(config), total=config.scans, progress=progress)


def _scans(config: PhantomConfig) -> Iterator[DemoScan]:
    """Every scan in turn, half of them, drawn at random, with a lesion."""
    with_lesion = np.random.default_rng(config.seed).permutation(config.scans) < config.scans // 2
    for index in range(config.scans):
        yield phantom_scan(index, config, lesion=bool(with_lesion[index]))


def phantom_scan(index: int, config: PhantomConfig, *, lesion: bool) -> DemoScan:
    """Make one scan; with and without ``lesion`` it differs inside the lesion only.

    Args:
        index: number of the scan; with ``config.seed`` it decides every draw.
        config: what to make.
        lesion: implant a lesion.

    Raises:
        CohortError: the lesion drawn does not fit into the brain.
    """
    of_scan, of_noise, of_lesion = (np.random.default_rng([config.seed, index, use]) for use in range(3))
    anatomy = _draw_anatomy(of_scan, config)
    axcodes = tuple(of_scan.choice(STORED_ORDERS))
    scale = float(np.exp(of_scan.uniform(np.log(0.3), np.log(3))))
    tissue, mask, intensity = anatomy.tissue, None, 1.0
    if lesion:
        inside = _draw_lesion(anatomy, config, of_lesion)
        intensity = float(of_lesion.uniform(*config.lesion_intensity))
        tissue = darken(tissue, inside, intensity, config.edge_mm, anatomy.spacing_mm, of_lesion)
        mask = stored_image(inside.astype(np.uint8), anatomy.affine_ras, axcodes)
    seen = _acquire(tissue, anatomy, config, of_noise)
    # 1000 is white matter in every scan, so neither integers nor scl_slope depend on the lesion.
    integers = np.rint(1000 * np.where(anatomy.brain, seen, 0)).astype(np.int16)
    image = stored_image(integers, anatomy.affine_ras, axcodes, slope=scale)
    name = f"phantom-{index + 1:03d}"
    return DemoScan(name, name, image, mask, intensity)


def _draw_anatomy(rng: np.random.Generator, config: PhantomConfig) -> Anatomy:
    """Sample the deformed template on a random grid, and give it a contrast of its own."""
    template = mni_brain()
    spacing_mm = rng.permutation([2.0, 2.0, 3.0]) if rng.random() < 0.25 else np.repeat(rng.uniform(1.5, 2.5), 3)
    tilt_deg = rng.uniform(-4, 4, 3) * (rng.random() < 0.3)
    turn_deg, shear = rng.uniform(-3, 3, 3), rng.uniform(-0.02, 0.02, (3, 3))
    size = rng.uniform(0.9, 1.1) * rng.uniform(0.96, 1.04, 3)
    shift_mm, gamma = rng.uniform(-8, 8, 3), rng.uniform(0.9, 1.2)

    box_mm = nib.affines.apply_affine(template.affine_ras, voxel_box(template.brain > 0.5))
    fov_mm = (box_mm[1] - box_mm[0]) * 1.25
    shape = tuple(np.ceil(fov_mm / spacing_mm).astype(int))
    grid = np.eye(4)
    grid[:3, :3] = Rotation.from_euler("xyz", tilt_deg, degrees=True).as_matrix() * spacing_mm
    grid[:3, 3] = box_mm.mean(axis=0) + shift_mm - grid[:3, :3] @ (np.array(shape) - 1) / 2

    middle = box_mm.mean(axis=0)
    head = Rotation.from_euler("xyz", turn_deg, degrees=True).as_matrix() @ (np.eye(3) + shear) / size
    to_template = np.eye(4)
    to_template[:3, :3], to_template[:3, 3] = head, middle - head @ (middle + shift_mm / 2)
    points = _template_voxels(shape, np.linalg.inv(template.affine_ras) @ to_template @ grid)
    for axis, step_mm in enumerate(nib.affines.voxel_sizes(template.affine_ras)):
        wave = smooth_field(shape, spacing_mm, 70, rng)
        points[axis] += config.deformation_mm / step_mm * wave
    tissue = ndimage.map_coordinates(template.t1, points, order=1)
    brain = ndimage.map_coordinates(template.brain, points, order=1) > 0.5
    return Anatomy(np.clip(tissue, 0, None) ** np.float32(gamma), brain, grid, spacing_mm)


def _template_voxels(shape: tuple[int, ...], matrix: NDArray[np.float64]) -> Array:
    """Voxel of the template that each voxel of a grid falls on; shape (3, x, y, z)."""
    index = np.ogrid[tuple(slice(size) for size in shape)]
    rows = [sum(row[axis] * index[axis] for axis in range(3)) + row[3] for row in matrix[:3]]
    return np.stack(rows).astype(np.float32)


def _acquire(tissue: Array, anatomy: Anatomy, config: PhantomConfig, rng: np.random.Generator) -> Array:
    """Bias field and Rician noise: what the coil and the receiver add to a brain."""
    bias = np.exp(rng.uniform(0.03, 0.08) * smooth_field(tissue.shape, anatomy.spacing_mm, 150, rng))
    sigma = rng.uniform(*config.noise)
    real, imaginary = rng.standard_normal((2, *tissue.shape), dtype=np.float32) * np.float32(sigma)
    return np.asarray(np.hypot(tissue * bias + real, imaginary), dtype=np.float32)


def _draw_lesion(anatomy: Anatomy, config: PhantomConfig, rng: np.random.Generator) -> Mask:
    """Draw an irregular blob of a given volume in a random place of the brain."""
    voxel_ml = float(np.prod(anatomy.spacing_mm)) / 1000
    size = max(1, round(float(rng.uniform(*config.lesion_volume_ml)) / voxel_ml))
    voxels = np.argwhere(anatomy.brain)
    if size > len(voxels) // 2:
        raise CohortError(f"a lesion of {size * voxel_ml:.0f} mL fills half the brain; lower lesion_volume_ml")
    stretch = np.exp(rng.uniform(-0.35, 0.35, 3))
    turned = Rotation.random(random_state=rng).apply((voxels - rng.choice(voxels)) * anatomy.spacing_mm)
    distance_mm = np.linalg.norm(turned * stretch, axis=1)
    # Bending the distance, and keeping the nearest voxels, gives a ragged blob of exactly the wanted volume.
    ragged = np.exp(0.3 * smooth_field(anatomy.brain.shape, anatomy.spacing_mm, 25, rng)[anatomy.brain])
    nearest = np.argpartition(distance_mm * ragged, size)[:size]
    inside = np.zeros_like(anatomy.brain)
    inside[tuple(voxels[nearest].T)] = True
    return inside


def darken(
    tissue: Array,
    lesion: Array | Mask,
    intensity: float,
    edge_mm: float,
    spacing_mm: NDArray[np.float64],
    rng: np.random.Generator,
    texture: float = 0.12,
) -> Array:
    """Multiply the intensity inside a lesion, with a soft edge and a mild texture.

    Args:
        tissue: shape (x, y, z), any unit, >= 0.
        lesion: shape (x, y, z), 0 to 1.
        intensity: factor on the tissue inside the lesion.
        edge_mm: standard deviation of the edge.
        spacing_mm: shape (3,), voxel size.
        rng: draws the texture.
        texture: relative standard deviation of the factor within the lesion.
    """
    weight = ndimage.gaussian_filter(lesion.astype(np.float32), edge_mm / spacing_mm, mode="constant")
    pattern = np.clip(smooth_field(tissue.shape, spacing_mm, 12, rng), -2, 2)
    factor = np.clip(intensity * (1 + texture * pattern), 0, 1)
    return np.asarray(tissue * (1 - weight * (1 - factor)), dtype=np.float32)


def smooth_field(
    shape: tuple[int, ...], spacing_mm: NDArray[np.float64], wavelength_mm: float, rng: np.random.Generator
) -> Array:
    """Draw a smooth random field of mean 0 and standard deviation 1.

    A sum of cosines with random weights: exact, free of edges, and three small matrix products instead of
    a wide filter. ``wavelength_mm`` is about the shortest wave in it.
    """
    shortest = np.maximum(1, np.rint(2 * np.array(shape) * spacing_mm / wavelength_mm)).astype(int)
    field = rng.standard_normal(tuple(shortest + 1), dtype=np.float32)
    field[0, 0, 0] = 0
    for size, waves in zip(shape, shortest, strict=True):
        order = np.arange(waves + 1)[:, None]
        basis = np.cos(np.pi * order * (np.arange(size) + 0.5) / size) * np.exp(-((order / waves) ** 2))
        field = np.tensordot(field, basis.astype(np.float32), axes=(0, 0))
    return np.asarray((field - field.mean()) / field.std(), dtype=np.float32)


def voxel_box(brain: NDArray[Any]) -> NDArray[np.float64]:
    """Outer faces of the box around a mask, in voxels; shape (2, 3): low, high."""
    planes = [np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return np.array([[p[0] - 0.5 for p in planes], [p[-1] + 0.5 for p in planes]])


@lru_cache(maxsize=1)
def mni_brain() -> Template:
    """The MNI152 brain of nilearn's package, 1 mm, in closest-canonical order."""
    images = [nib.as_closest_canonical(load(resolution=1)) for load in (load_mni152_template, load_mni152_brain_mask)]
    t1, brain = (np.asarray(image.dataobj, dtype=np.float32) for image in images)
    return Template(t1 * (brain > 0), brain, np.asarray(images[0].affine, dtype=np.float64))


def check_range(name: str, bounds: tuple[float, float], *, above: float, up_to: float) -> None:
    """Refuse a (low, high) pair that is not ordered or leaves ``(above, up_to]``."""
    low, high = bounds
    if not above < low <= high <= up_to:
        wanted = f"two numbers above {above:g} and up to {up_to:g}, the lower first, were wanted"
        raise ConfigError(f"{name} is {low:g} to {high:g}, but {wanted}; mend the option")
