"""What a scan's header and sidecar say about how it was made, without reading a voxel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from dinoatten3d.data.cohort import stem
from dinoatten3d.data.volume import UNREADABLE, nifti_file
from dinoatten3d.errors import ScanError

PROTOCOL = {
    "Manufacturer": "manufacturer",
    "ManufacturersModelName": "scanner model",
    "MagneticFieldStrength": "field strength",
    "RepetitionTime": "repetition time",
    "EchoTime": "echo time",
    "InversionTime": "inversion time",
    "FlipAngle": "flip angle",
}
"""Fields of a BIDS sidecar that tell scanners and protocols apart, and what they are called here."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """How a scan was stored and made.

    Attributes:
        shape: Voxels towards right, anterior and superior.
        spacing_mm: Voxel size in the same order.
        axes: Where the array's own axes point, such as `PSR`.
        tilt_degrees: Largest angle between an array axis and the scanner's.
        oriented: Whether the header gives an orientation at all.
        stored_as: Type of the voxels in the file.
        protocol: Scanner and sequence by the names in `PROTOCOL`, where a sidecar (or the header) gives them.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    axes: str
    tilt_degrees: float
    oriented: bool
    stored_as: str
    protocol: Mapping[str, str | float] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Read the header of an image and the JSON sidecar beside it; a DICOM series is converted first.

    Raises:
        ScanError: The file is no image, not 3D, or its orientation cannot be used.
    """
    with nifti_file(path) as image_path:
        try:
            image: Any = nib.load(image_path)
            affine = np.asarray(image.affine, dtype=np.float64)
            canonical = nib.orientations.io_orientation(affine)
        except (*UNREADABLE, np.linalg.LinAlgError) as error:
            raise ScanError(f"{path} has no header that can be read: {str(error).splitlines()[0]}") from None
        if len(image.shape) < 3 or np.isnan(canonical).any():
            raise ScanError(f"{path} is no 3D volume with an orientation; mend its header")
        right, anterior, superior = np.argsort(canonical[:, 0])
        header = image.header
        nifti = isinstance(header, nib.Nifti1Header)
        shape, spacing = image.shape, nib.affines.voxel_sizes(affine).round(3).tolist()
        return Header(
            shape=(int(shape[right]), int(shape[anterior]), int(shape[superior])),
            spacing_mm=(spacing[right], spacing[anterior], spacing[superior]),
            axes="".join(nib.orientations.ornt2axcodes(canonical)),
            tilt_degrees=round(float(np.degrees(nib.affines.obliquity(affine).max())), 1),
            oriented=not nifti or bool(header["sform_code"] or header["qform_code"]),
            stored_as=str(image.get_data_dtype()),
            protocol=_repetition_time(header if nifti else None) | _sidecar(image_path),
        )


def _repetition_time(header: Any) -> dict[str, str | float]:
    """Give the repetition time that some converters leave in the fourth voxel size of a 3D NIfTI."""
    value = float(header["pixdim"][4]) if header is not None else 0.0
    return {"repetition time": round(value, 6)} if np.isfinite(value) and value > 0 else {}


def _sidecar(image: Path) -> dict[str, str | float]:
    """Read what `PROTOCOL` names from the JSON beside an image; a damaged one says nothing."""
    try:
        fields = json.loads((image.parent / f"{stem(image)}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(fields, dict):
        return {}
    return {name: fields[key] for key, name in PROTOCOL.items() if isinstance(fields.get(key), (str, int, float))}
