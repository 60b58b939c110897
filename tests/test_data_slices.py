"""Slices are where they say they are, show the whole brain, and are the published ones on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import head, shared
from dinoatten3d.config import Plane, SliceConfig
from dinoatten3d.data.brain import brain_box, brain_mask
from dinoatten3d.data.slices import AXIS, stacks, take_slices
from dinoatten3d.data.volume import load_volume
from dinoatten3d.errors import ConfigError, ScanError
from dinoatten3d.toml import load_recipe

Save = Callable[..., Path]
AFFINE = np.array([[4.0, 0, 0, -70], [0, 4.0, 0, -90], [0, 0, 4.0, -60], [0, 0, 0, 1]])


def marked(save: Save, where: tuple[int, int, int]) -> Path:
    array = np.where(head() > 0, 50.0, 0.0).astype(np.float32)
    array[tuple(slice(n - 3, n + 4) for n in where)] = 500  # over 0.5 % of the tissue, so the window shows it
    return save(array, affine=AFFINE)


@settings(max_examples=20)
@given(
    plane=st.sampled_from(["axial", "coronal", "sagittal"]),
    fit=st.sampled_from(["brain", "array"]),
    where=st.tuples(st.integers(12, 27), st.integers(14, 33), st.integers(12, 27)),
)
def test_a_bright_spot_is_found_at_its_place_in_mm(
    save_nifti: Save, plane: str, fit: str, where: tuple[int, int, int]
) -> None:
    config = SliceConfig(planes=(plane,), fit=fit, count=20, spacing_mm="brain")  # type: ignore[arg-type]
    slices = take_slices(load_volume(marked(save_nifti, where)), config)
    spot = slices.pixels.astype(float) > 180
    rows, columns, numbers = (spot.transpose(1, 2, 0).nonzero()[i].mean() for i in range(3))
    found = (slices.affine_ras[0] @ [rows, columns, numbers, 1])[:3]
    wanted = (AFFINE @ [*where, 1])[:3]
    np.testing.assert_allclose(found, wanted, atol=4.5)
    assert np.all(np.diff(slices.position_mm) > 0)
    assert slices.position_mm[round(numbers)] == pytest.approx(wanted[AXIS[plane]], abs=6)  # type: ignore[index]


def test_up_is_anterior_and_left_is_left(save_nifti: Save) -> None:
    front_left = (12, 34, 20)  # low x is left, high y is anterior
    slices = take_slices(load_volume(marked(save_nifti, front_left)), SliceConfig())
    _, rows, columns = (slices.pixels > 180).nonzero()
    assert rows.mean() < 112
    assert columns.mean() < 112


def test_the_whole_brain_stays_in_view_by_default(save_nifti: Save) -> None:
    slices = take_slices(load_volume(save_nifti(head(), affine=AFFINE)), SliceConfig())
    border = np.concatenate([slices.pixels[:, [0, -1]].ravel(), slices.pixels[:, :, [0, -1]].ravel()])
    assert border.max() == 0
    assert (slices.pixels > 0).any(axis=(1, 2)).all()


def test_the_published_crop_cuts_the_brain(save_nifti: Save) -> None:
    config = SliceConfig(fit="published", window="slice", spacing_mm="native", centre="array", count=20)
    slices = take_slices(load_volume(save_nifti(head()[5:-5, 5:-5], affine=AFFINE)), config)
    assert slices.pixels[:, 0].max() > 0


def test_the_published_pixels_are_reproduced() -> None:
    from safetensors.numpy import load_file

    golden = load_file(shared("golden", "published_method.safetensors"))["slices_sub01_rows_0_12_25_37_49"]
    volume = load_volume(shared("data", "ds002748_2mm", "sub-01_T1w_2mm.nii.gz"))
    pixels = take_slices(volume, load_recipe("published").slices).pixels[[0, 12, 25, 37, 49]]
    mean, std = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    wanted = np.round((golden.astype(np.float64) * std + mean) * 255)
    difference = np.abs(pixels[:, None] - wanted)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02  # float32 volumes: values at an integer may fall to either side


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (SliceConfig(count=50, spacing_mm="native", centre="array"), "has 40 axial slices"),
        (SliceConfig(count=24, spacing_mm=20.0), "has 40 axial slices"),
        (SliceConfig(count=200), "too thick for 200 slices"),
    ],
)
def test_thin_volumes_are_refused_not_filled_with_wrong_slices(
    save_nifti: Save, config: SliceConfig, said: str
) -> None:
    with pytest.raises(ScanError, match=said):
        take_slices(load_volume(save_nifti(head(), affine=AFFINE)), config)


def test_three_slices_are_refused(save_nifti: Save) -> None:
    with pytest.raises(ScanError, match="has 3 axial slices"):
        take_slices(load_volume(save_nifti(head((40, 48, 3)))), SliceConfig())


def test_spacing_in_mm_is_kept(save_nifti: Save) -> None:
    slices = take_slices(load_volume(save_nifti(head(), affine=AFFINE)), SliceConfig(count=9, spacing_mm=7.0))
    np.testing.assert_allclose(np.diff(slices.position_mm), 7.0, atol=1e-6)


def test_native_slices_around_a_brain_near_the_border_stay_inside(save_nifti: Save) -> None:
    array = np.zeros((40, 48, 60), np.float32)
    array[:, :, 20:] = head()
    slices = take_slices(load_volume(save_nifti(array)), SliceConfig(count=50, spacing_mm="native"))
    np.testing.assert_allclose(np.diff(slices.position_mm), 4.0, atol=1e-6)
    assert slices.position_mm[-1] <= 59 * 4


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(5, 40), st.integers(5, 40), st.integers(5, 40)),
    count=st.integers(1, 12),
    fit=st.sampled_from(["brain", "array"]),
    plane=st.sampled_from(["axial", "coronal", "sagittal"]),
    seed=st.integers(0, 99),
)
def test_any_grid_gives_slices_or_one_clear_sentence(
    save_nifti: Save, shape: tuple[int, int, int], count: int, fit: str, plane: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    path = save_nifti(rng.gamma(1, 50, shape).astype(np.float32), affine=np.diag([*rng.uniform(0.5, 6, 3), 1]))
    config = SliceConfig(count=count, fit=fit, planes=(plane,), size_px=56)  # type: ignore[arg-type]
    try:
        slices = take_slices(load_volume(path), config)
    except ScanError as error:
        assert "\n" not in str(error)
    else:
        assert slices.pixels.shape == (count, 56, 56)
        assert np.isfinite(slices.position_mm).all()


def test_the_brain_of_a_whole_head_is_found() -> None:
    for name in ("IXI012-HH-1211-T1_ds.nii.gz", "IXI051-HH-1328-T1_ds.nii.gz"):
        volume = load_volume(shared("data", "ixi10_2mm", name))
        box = brain_box(volume)
        assert 1000 < box.brain_ml < 1900
        assert 110 < (box.high - box.low)[2] * volume.spacing_mm[2] < 150
        assert brain_mask(volume).mean() < 0.25


def test_a_stripped_brain_is_its_own_mask() -> None:
    volume = load_volume(shared("data", "ds002748_2mm", "sub-01_T1w_2mm.nii.gz"))
    mask = brain_mask(volume)
    assert (mask & (volume.data > 0)).sum() / (volume.data > 0).sum() > 0.99


def test_several_planes_are_the_single_ones_one_after_the_other(save_nifti: Save) -> None:
    volume = load_volume(save_nifti(head(), affine=AFFINE))
    planes: tuple[Plane, ...] = ("coronal", "axial", "sagittal")
    together = take_slices(volume, SliceConfig(planes=planes, count=7, size_px=56))
    assert together.planes == tuple(np.repeat(planes, 7))
    for plane, run in stacks(together.planes).items():
        alone = take_slices(volume, SliceConfig(planes=(plane,), count=7, size_px=56))
        for name in ("pixels", "position_mm", "affine_ras"):
            np.testing.assert_array_equal(getattr(together, name)[run], getattr(alone, name), err_msg=name)
        assert (np.diff(together.position_mm[run]) > 0).all()


def test_a_configuration_that_cannot_work_is_refused() -> None:
    for wrong in (
        {"planes": ()},
        {"planes": "axial"},
        {"planes": ("axial", "oblique")},
        {"planes": ("axial", "axial")},
        *({"count": 0}, {"spacing_mm": -1.0}, {"fit": "published"}, {"size_px": 3}),
    ):
        with pytest.raises(ConfigError):
            replace(SliceConfig(), **wrong)  # type: ignore[arg-type]
