"""A made cohort on disk: scans, the table of diagnoses, and the truth about every lesion.

Both makers of cohorts (``phantom`` and ``implant``) end here. The layout is

    cohort.toml   what made it: kind, configuration, digest
    cohort.csv    path, subject, diagnosis (healthy or lesion), and age, sex, site where known
    scans/        <name>.nii.gz
    truth.csv     scan, subject, diagnosis, lesion_ml, intensity, mask, side, z_low_mm, z_high_mm
    truth/        <name>_lesion.nii.gz, on the grid of the scan

Frames: arrays are taken to closest-canonical order (axis 0 to the Right, 1 to the Anterior, 2 to the
Superior) before anything is measured on them, and millimetres are RAS world coordinates.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
import tomli_w
from numpy.typing import ArrayLike, NDArray

from dinoatten3d.data.slices import AXIS
from dinoatten3d.errors import CohortError, ConfigError
from dinoatten3d.files import whole_folder

__all__ = ["DemoCohort", "DemoScan", "Progress", "lesion_area_mm2", "publish", "stored_image"]

Progress = Callable[[int, int], None]
"""Called as ``progress(done, total)`` after each scan."""

FORMAT = 2
"""Part of every digest: raise it when the same configuration starts to give other scans."""


class DemoCohort(NamedTuple):
    """Where a made cohort lies, and whether this call made it."""

    table: Path
    """The cohort.csv, ready for ``read_cohort``."""
    truth: Path
    """The truth.csv beside it."""
    reused: bool
    """True when the same configuration had already made it and nothing was done."""


class DemoScan(NamedTuple):
    """One scan as it will be stored, and the truth about it."""

    name: str
    subject: str
    image: nib.Nifti1Image
    lesion: nib.Nifti1Image | None
    """Binary uint8 mask on the grid of ``image``; None for a healthy scan."""
    intensity: float = 1.0
    """Factor that the lesion multiplies the tissue's intensity by."""
    covariates: dict[str, Any] = {}  # noqa: RUF012  never mutated
    """Known among age, sex and site."""


def stored_image(
    array: NDArray[Any], affine_ras: NDArray[np.float64], axcodes: tuple[str, ...], slope: float | None = None
) -> nib.Nifti1Image:
    """Turn a canonical array into an image stored in another axis order.

    Args:
        array: integers, shape (x, y, z), axes to the Right, Anterior, Superior.
        affine_ras: 4 x 4, voxel of ``array`` to RAS mm.
        axcodes: order and direction of the stored axes, such as ``("L", "P", "S")``.
        slope: written as scl_slope, so that a reader sees ``slope * integer``; None stores no scaling.
    """
    there = nib.orientations.axcodes2ornt(axcodes)
    here = nib.orientations.io_orientation(affine_ras)
    image: nib.Nifti1Image = nib.Nifti1Image(array, affine_ras).as_reoriented(
        nib.orientations.ornt_transform(here, there)
    )
    image.header.set_xyzt_units("mm")
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    return image


def lesion_area_mm2(
    mask: nib.Nifti1Image, plane: str, positions_mm: ArrayLike, thickness_mm: float
) -> NDArray[np.float64]:
    """Measure how much lesion each slice of a plane cuts through.

    Args:
        mask: lesion mask in any axis order; non-zero is lesion.
        plane: "axial", "coronal" or "sagittal".
        positions_mm: shape (slices,), RAS world coordinate of each slice along the plane's normal (axial z,
            coronal y, sagittal x), measured where the normal passes the middle of the array.
        thickness_mm: what each slice covers, centred on its position; > 0.

    Returns:
        Shape (slices,), lesion area in mm^2, averaged over the slice's thickness.

    Raises:
        ConfigError: an unknown plane or a thickness that is not above 0.
    """
    if plane not in AXIS:
        raise ConfigError(f"plane {plane!r} is not one of {', '.join(sorted(AXIS))}; choose one of them")
    if not thickness_mm > 0:
        raise ConfigError(f"thickness_mm is {thickness_mm}, but a slice covers more than 0 mm; give its spacing")
    canonical = nib.as_closest_canonical(mask)
    axis = AXIS[plane]  # type: ignore[index]  # checked above
    lesion = np.asanyarray(canonical.dataobj) != 0
    centres_mm, step_mm = _slice_centres_mm(canonical, axis)
    in_plane = tuple(other for other in range(3) if other != axis)
    pixel_mm2 = float(np.prod([nib.affines.voxel_sizes(canonical.affine)[other] for other in in_plane]))
    area_mm2 = lesion.sum(axis=in_plane) * pixel_mm2

    wanted_mm = np.asarray(positions_mm, dtype=np.float64)[:, None]
    top_mm = np.minimum(wanted_mm + thickness_mm / 2, centres_mm + step_mm / 2)
    bottom_mm = np.maximum(wanted_mm - thickness_mm / 2, centres_mm - step_mm / 2)
    overlap_mm = np.clip(top_mm - bottom_mm, 0, None)
    return np.asarray(overlap_mm @ area_mm2 / thickness_mm, dtype=np.float64)


def publish(
    out: Path,
    kind: str,
    record: dict[str, Any],
    scans: Iterable[DemoScan],
    *,
    total: int,
    progress: Progress | None,
) -> DemoCohort:
    """Write a cohort as one folder that appears whole or not at all.

    Args:
        out: the folder to make; one that holds this very cohort is reused, an empty one is filled.
        kind: "phantom" or "implant".
        record: everything that decides the scans (configuration, digests of what was read).
        scans: made lazily, and not at all when the cohort is there already.
        total: how many scans will come, for ``progress``.
        progress: called after each scan.

    Raises:
        CohortError: ``out`` holds anything else.
    """
    recipe = {"kind": kind, "format": FORMAT, **record}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    cohort = DemoCohort(out / "cohort.csv", out / "truth.csv", reused=True)
    if _holds(out, digest):
        return cohort
    with whole_folder(out) as folder:
        (folder / "scans").mkdir()
        (folder / "truth").mkdir()
        rows = []
        for done, scan in enumerate(scans, start=1):
            rows.append(_write_scan(folder, scan))
            if progress is not None:
                progress(done, total)
        table, truth = (pd.DataFrame(list(part)) for part in zip(*rows, strict=True))
        table.dropna(axis="columns", how="all").to_csv(folder / "cohort.csv", index=False)
        truth.to_csv(folder / "truth.csv", index=False)
        (folder / "cohort.toml").write_text(tomli_w.dumps({"digest": digest, **recipe}), encoding="utf-8")
    return cohort._replace(reused=False)


def _write_scan(folder: Path, scan: DemoScan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Store one scan and its mask; return its rows of cohort.csv and truth.csv."""
    path = Path("scans", f"{scan.name}.nii.gz")
    nib.save(scan.image, folder / path)
    identity = {"subject": scan.subject, "diagnosis": "healthy" if scan.lesion is None else "lesion"}
    truth: dict[str, Any] = {"scan": scan.name, **identity, "lesion_ml": 0.0, "intensity": None, "mask": None}
    truth |= {"side": None, "z_low_mm": None, "z_high_mm": None}
    if scan.lesion is not None:
        mask = Path("truth", f"{scan.name}_lesion.nii.gz")
        nib.save(scan.lesion, folder / mask)
        truth |= {"intensity": round(scan.intensity, 4), "mask": mask.as_posix()}
        truth |= _describe_lesion(scan.image, scan.lesion)
    covariates = {key: scan.covariates.get(key) for key in ("age", "sex", "site")}
    return {"path": path.as_posix(), **identity, **covariates}, truth


def _describe_lesion(image: nib.Nifti1Image, mask: nib.Nifti1Image) -> dict[str, Any]:
    """Volume, side of the brain's middle, and extent in z of a lesion."""
    canonical = nib.as_closest_canonical(mask)
    lesion = np.asanyarray(canonical.dataobj) != 0
    brain = np.asanyarray(nib.as_closest_canonical(image).dataobj) != 0
    brain_x = np.flatnonzero(brain.any(axis=(1, 2)))
    lesion_x = np.nonzero(lesion)[0]
    on_right = float(np.mean(lesion_x > (brain_x[0] + brain_x[-1]) / 2))
    # A lesion that only touches the midline belongs to the side that holds nearly all of it.
    side = "right" if on_right >= 0.9 else "left" if on_right <= 0.1 else "both"
    centres_mm, step_mm = _slice_centres_mm(canonical, AXIS["axial"])
    z_mm = centres_mm[lesion.any(axis=(0, 1))]
    return {
        "lesion_ml": round(lesion.sum() * abs(np.linalg.det(canonical.affine[:3, :3])) / 1000, 3),
        "side": side,
        "z_low_mm": round(float(z_mm[0] - step_mm / 2), 2),
        "z_high_mm": round(float(z_mm[-1] + step_mm / 2), 2),
    }


def _slice_centres_mm(canonical: nib.Nifti1Image, axis: int) -> tuple[NDArray[np.float64], float]:
    """RAS coordinate along ``axis`` of the middle of each slice, and the step between two slices."""
    voxels = np.tile((np.array(canonical.shape) - 1) / 2, (canonical.shape[axis], 1))
    voxels[:, axis] = np.arange(canonical.shape[axis])
    return nib.affines.apply_affine(canonical.affine, voxels)[:, axis], float(canonical.affine[axis, axis])


def _holds(out: Path, digest: str) -> bool:
    """Say whether ``out`` is the cohort of this digest; refuse to touch anything else that is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = tomllib.loads((out / "cohort.toml").read_text(encoding="utf-8"))["digest"]
    except (OSError, KeyError, ValueError):
        raise CohortError(f"{out} exists and is not a demo cohort; choose another folder or remove it") from None
    if found != digest:
        raise CohortError(f"{out} holds a cohort of another configuration; choose another folder or remove it")
    return True
