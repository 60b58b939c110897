"""Any axis order, scaling and tilt becomes the same RAS+ volume; what cannot be used is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import head, shared
from dinoatten3d.data.volume import load_volume
from dinoatten3d.errors import ScanError

AFFINE = np.array([[2.0, 0, 0, -30], [0, 2.5, 0, -40], [0, 0, 3, -50], [0, 0, 0, 1]])
Save = Callable[..., Path]


@settings(max_examples=30)
@given(order=st.permutations([0, 1, 2]), flips=st.tuples(*[st.sampled_from([1, -1])] * 3))
def test_every_axis_order_and_flip_gives_the_same_volume(
    save_nifti: Save, order: list[int], flips: tuple[int, ...]
) -> None:
    reference = nib.Nifti1Image(head((10, 12, 14)), AFFINE)
    stored = reference.as_reoriented(np.array(list(zip(order, flips, strict=True))))
    volume = load_volume(save_nifti(stored.get_fdata(dtype=np.float32), affine=stored.affine))
    np.testing.assert_array_equal(volume.data, reference.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(volume.affine_ras, AFFINE, atol=1e-5)
    assert volume.source_shape == stored.shape


def test_scl_slope_and_inter_are_applied(tmp_path: Path) -> None:
    image = nib.Nifti1Image(head((8, 8, 8)).astype(np.uint8), AFFINE)
    image.header.set_slope_inter(3.0, 7.0)
    raw = np.asarray(image.dataobj).astype(np.float32)
    nib.Nifti1Image.to_filename(image, tmp_path / "a.nii.gz")
    loaded = nib.load(tmp_path / "a.nii.gz")
    volume = load_volume(tmp_path / "a.nii.gz")
    assert volume.data.dtype == np.float32
    np.testing.assert_allclose(volume.data, loaded.get_fdata(), rtol=1e-6)
    assert loaded.dataobj.slope == 3.0 or np.allclose(loaded.get_fdata(), raw)


def test_a_fourth_axis_of_one_volume_is_dropped_and_of_two_refused(save_nifti: Save) -> None:
    assert load_volume(save_nifti(head()[..., None])).data.shape == (40, 48, 40)
    with pytest.raises(ScanError, match="wanted one 3D volume"):
        load_volume(save_nifti(np.stack([head(), head()], axis=-1)))


def test_nan_and_infinity_become_the_smallest_value_and_are_counted(save_nifti: Save) -> None:
    array = head()
    array[0, 0, 0], array[1, 1, 1] = np.nan, np.inf
    volume = load_volume(save_nifti(array))
    assert np.isfinite(volume.data).all()
    assert volume.data[1, 1, 1] == 0
    assert volume.notes == ("2 voxels were NaN or infinite and became the smallest finite value",)


def test_a_strong_tilt_is_resampled_onto_the_scanner_axes(save_nifti: Save) -> None:
    angle = np.radians(30)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    volume = load_volume(save_nifti(head(), affine=turn @ np.diag([4.0, 4, 4, 1])))
    assert np.allclose(volume.affine_ras[:3, :3], np.diag([4, 4, 4]), atol=1e-5)
    assert "tilted by 30 degrees" in volume.notes[0]
    centre = np.array([78.0, 94.0, 78.0, 1])  # of the ellipsoid, in the array's own axes
    index = np.linalg.inv(volume.affine_ras) @ turn @ centre
    assert abs(volume.data[tuple(np.round(index[:3]).astype(int))] - 100) < 8


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.full((8, 8, 8), 3.0, np.float32), "holds the single value 3 everywhere"),
        (np.full((8, 8, 8), np.nan, np.float32), "holds no finite voxel"),
        (np.zeros((8, 8), np.float32), "wanted one 3D volume"),
        (np.zeros((8, 8, 1), np.float32), "wanted one 3D volume"),
    ],
)
def test_what_holds_no_volume_is_refused_by_name(save_nifti: Save, array: np.ndarray, said: str) -> None:
    path = save_nifti(array)
    with pytest.raises(ScanError, match=said) as error:
        load_volume(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kept", [0, 10, 200, 2000])
def test_a_truncated_file_is_refused_by_name(save_nifti: Save, kept: int) -> None:
    path = save_nifti(head())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ScanError, match="cannot be read as an image") as error:
        load_volume(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match="does not exist"):
        load_volume(tmp_path / "none.nii.gz")


@pytest.mark.slow
def test_a_real_dicom_series_is_read_through_dcm2niix() -> None:
    volume = load_volume(shared("data", "dicom", "hanke_t1_384.zip"))
    assert volume.data.shape == (274, 384, 384)
    np.testing.assert_allclose(volume.spacing_mm, [0.7, 0.667, 0.667], atol=0.001)


def test_an_unusable_dicom_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"not dicom")
    with pytest.raises(ScanError, match="gives no image through dcm2niix"):
        load_volume(tmp_path / "a.dcm")
