"""An image file becomes a `Volume`: float32, axes towards right, anterior and superior, millimetres."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.processing import resample_to_output
from numpy.typing import NDArray

from dinoatten3d.errors import ScanError

OBLIQUE_DEGREES = 15.0
"""Beyond this angle the array axes are no longer called axial, coronal and sagittal, and the volume is resampled."""

UNREADABLE = (
    OSError,
    EOFError,
    zlib.error,
    ValueError,
    TypeError,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A scan in RAS+ order.

    Attributes:
        data: Intensities, float32 `[right, anterior, superior]`, finite.
        affine_ras: Voxel index to RAS+ millimetres, `[4, 4]`.
        source_shape: Grid of the file, three axes.
        source_affine: Affine of the file, `[4, 4]`.
        notes: What was mended on the way, one sentence each.
    """

    data: NDArray[np.float32]
    affine_ras: NDArray[np.float64]
    source_shape: tuple[int, int, int]
    source_affine: NDArray[np.float64]
    notes: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> NDArray[np.float64]:
        """Voxel size along the three axes, mm."""
        return np.asarray(nib.affines.voxel_sizes(self.affine_ras), dtype=np.float64)


def load_volume(path: str | Path) -> Volume:
    """Read NIfTI (or anything nibabel reads), or a DICOM series, into RAS+.

    Axis order and flips are undone without resampling. A volume tilted by more than 15 degrees against the
    scanner's axes is resampled linearly onto them. `scl_slope` is applied; a fourth axis of length one is dropped;
    NaN and infinite voxels become the smallest finite value and are noted.

    Args:
        path: Image file; for DICOM a folder, a zip of one, or a single (enhanced) file.

    Returns:
        The volume.

    Raises:
        ScanError: The file is missing, unreadable, truncated, not one 3D volume, or constant.
    """
    path = Path(path)
    if not path.exists():
        raise ScanError(f"{path} does not exist")
    with nifti_file(path) as image:
        return _load_image(image, str(path))


def _load_image(path: Path, name: str) -> Volume:
    try:
        image: Any = nib.load(path)
        shape = tuple(int(n) for n in image.shape)
        if len(shape) < 3 or any(n > 1 for n in shape[3:]) or min(shape[:3]) < 2:
            size = " x ".join(map(str, shape))
            raise ScanError(f"{name} is {size}; wanted one 3D volume (split a series into its volumes first)")
        array = np.asanyarray(image.dataobj, dtype=np.float32).reshape(shape[:3])
        affine = np.asarray(image.affine, dtype=np.float64)
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ScanError(f"{name} cannot be read as an image, or is cut short: {reason}") from None
    notes: list[str] = []
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ScanError(f"{name} has a header without a usable orientation; mend its sform or qform")
    header = image.header
    if isinstance(header, nib.Nifti1Header) and header["sform_code"] == 0 and header["qform_code"] == 0:
        notes.append("the header gives no orientation; axes were taken as the file stores them")
    array = _finite(array, name, notes)
    if array.min() == array.max():
        raise ScanError(f"{name} holds the single value {array.flat[0]:g} everywhere; there is nothing to see")
    source = nib.Nifti1Image(array, affine)
    canonical = nib.as_closest_canonical(source)
    tilt = float(np.degrees(nib.affines.obliquity(canonical.affine).max()))
    if tilt > OBLIQUE_DEGREES:
        spacing = nib.affines.voxel_sizes(canonical.affine)
        canonical = resample_to_output(canonical, voxel_sizes=spacing, order=1, cval=float(array.min()))
        notes.append(f"tilted by {tilt:.0f} degrees against the scanner's axes; resampled onto them")
    return Volume(
        data=np.ascontiguousarray(canonical.get_fdata(dtype=np.float32)),
        affine_ras=np.asarray(canonical.affine, dtype=np.float64),
        source_shape=(shape[0], shape[1], shape[2]),
        source_affine=affine,
        notes=tuple(notes),
    )


def _finite(array: NDArray[np.float32], name: str, notes: list[str]) -> NDArray[np.float32]:
    """Replace NaN and infinity by the smallest finite value."""
    bad = ~np.isfinite(array)
    count = int(bad.sum())
    if count == 0:
        return array
    if count == array.size:
        raise ScanError(f"{name} holds no finite voxel; there is nothing to see")
    notes.append(f"{count} voxels were NaN or infinite and became the smallest finite value")
    return np.where(bad, array[~bad].min(), array).astype(np.float32)


@contextmanager
def nifti_file(path: Path) -> Iterator[Path]:
    """Give the path of an image file: itself, or a temporary NIfTI with its JSON sidecar made of a DICOM series.

    Raises:
        ScanError: dcm2niix does not make one volume of it.
    """
    if not (path.is_dir() or path.suffix.lower() in (".dcm", ".ima", ".zip")):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield _convert_dicom(path, Path(folder))


def _convert_dicom(path: Path, folder: Path) -> Path:
    """Convert one series with dcm2niix and give the image it leaves in `folder`."""
    series, out = path, folder / "nifti"
    out.mkdir()
    if path.suffix.lower() == ".zip":
        series = folder / "dicom"
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(series)
        except (zipfile.BadZipFile, OSError, zlib.error) as error:
            raise ScanError(f"{path} is not a readable zip of DICOM files: {error}") from None
    options = ["-z", "n", "-b", "y", "-o", str(out), *(["-s", "y"] if series.is_file() else [])]
    command = [sys.executable, "-m", "dcm2niix", *options, str(series)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    images = sorted(out.glob("*.nii"))
    if len(images) != 1:
        seen = f"{len(images)} volumes" if images else "no image"
        last = (result.stdout.strip().splitlines() or ["no output"])[-1]
        raise ScanError(f"{path} gives {seen} through dcm2niix; wanted one series ({last})")
    return images[0]
