"""Maps lie where they belong in the scan's own grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import head
from dinoatten3d.config import SliceConfig
from dinoatten3d.data.slices import take_slices
from dinoatten3d.data.volume import load_volume
from dinoatten3d.inference.explain import deviation_map, explain, slice_weight_map
from dinoatten3d.inference.predict import Prediction


def prediction(path: Path, plane: str, patch_map: np.ndarray | None = None) -> Prediction:
    volume = load_volume(path)
    slices = take_slices(volume, SliceConfig(plane=plane, count=20, size_px=112))  # type: ignore[arg-type]
    weights = np.arange(20) / 190
    return Prediction(
        scan=path,
        classes=("NL", "AD"),
        probabilities=np.array([0.3, 0.7]),
        by_fold=np.array([[0.3, 0.7]]),
        slice_weights=weights,
        patch_map=patch_map,
        slices=slices,
        volume=volume,
        notes=(),
    )


@settings(max_examples=12)
@given(
    plane=st.sampled_from(["axial", "coronal", "sagittal"]),
    order=st.permutations([0, 1, 2]),
    flips=st.tuples(*[st.sampled_from([1, -1])] * 3),
    where=st.tuples(st.integers(5, 14), st.integers(2, 5), st.integers(2, 5)),
)
def test_a_hot_patch_is_laid_over_its_own_voxels(
    save_nifti: Callable[..., Path], plane: str, order: list[int], flips: tuple[int, ...], where: tuple[int, int, int]
) -> None:
    image = nib.Nifti1Image(head(), np.array([[4.0, 0, 0, -70], [0, 4, 0, -90], [0, 0, 4, -60], [0, 0, 0, 1]]))
    stored = image.as_reoriented(np.array(list(zip(order, flips, strict=True))))
    path = save_nifti(stored.get_fdata(dtype=np.float32), affine=stored.affine)
    patches = np.zeros((20, 8, 8), np.float32)
    patches[where] = 1
    answer = prediction(path, plane, patches)
    laid = deviation_map(answer)
    assert laid is not None
    assert laid.shape == stored.shape
    values = np.asarray(laid.dataobj)
    centre = np.array([np.average(i, weights=values) for i in np.indices(values.shape)])
    found = (laid.affine @ [*centre, 1])[:3]
    number, row, column = where
    wanted = (answer.slices.affine_ras @ [(row + 0.5) * 14 - 0.5, (column + 0.5) * 14 - 0.5, number, 1])[:3]
    np.testing.assert_allclose(found, wanted, atol=2.5)  # voxels are 4 mm, patches about 20


def test_slice_weights_add_up_and_the_heaviest_is_first(save_nifti: Callable[..., Path]) -> None:
    answer = prediction(save_nifti(head()), "axial")
    table = explain(answer)
    assert table["weight"].sum() == pytest.approx(1)
    assert table.loc[table["rank"] == 1, "slice"].item() == 19
    laid = np.asarray(slice_weight_map(answer).dataobj)
    assert laid.max() == pytest.approx(20 * 19 / 190)
    assert deviation_map(answer) is None
