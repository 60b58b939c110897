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
from dinoatten3d.config import EvaluationConfig, PatchConfig, Recipe, SliceConfig
from dinoatten3d.data.cohort import read_cohort
from dinoatten3d.data.slices import AXIS, stacks, take_slices
from dinoatten3d.data.volume import load_volume
from dinoatten3d.features.backbone import load_backbone
from dinoatten3d.features.extract import extract
from dinoatten3d.features.weights import find_weights
from dinoatten3d.inference.explain import deviation_map, explain, slice_weight_map
from dinoatten3d.inference.predict import Prediction, predict
from dinoatten3d.steps.train import train_run


def prediction(path: Path, *planes: str, patch_map: np.ndarray | None = None) -> Prediction:
    volume = load_volume(path)
    slices = take_slices(volume, SliceConfig(planes=planes, count=20, size_px=112))  # type: ignore[arg-type]
    weights = np.tile(np.arange(20) / 190, len(planes)) / len(planes)
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
    answer = prediction(path, plane, patch_map=patches)
    laid = deviation_map(answer)
    assert laid is not None
    assert laid.shape == stored.shape
    values = np.asarray(laid.dataobj)
    centre = np.array([np.average(i, weights=values) for i in np.indices(values.shape)])
    found = (laid.affine @ [*centre, 1])[:3]
    number, row, column = where
    wanted = (answer.slices.affine_ras[0] @ [(row + 0.5) * 14 - 0.5, (column + 0.5) * 14 - 0.5, number, 1])[:3]
    np.testing.assert_allclose(found, wanted, atol=2.5)  # voxels are 4 mm, patches about 20


@pytest.mark.parametrize("size_px", [126, 336, pytest.param(518, marks=pytest.mark.slow)])
def test_slices_of_any_size_that_divides_by_the_patch_work_from_extraction_to_the_map(
    size_px: int, cohort_folder: Path, tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    cohort = read_cohort(cohort_folder / "cohort.csv", target="DX")
    backbone = load_backbone(find_weights(str(tiny_backbone_folder)))
    config, patches = SliceConfig(count=4, size_px=size_px), PatchConfig(layers=(2,), blemished=4)
    store = extract(cohort, backbone, tmp_path / "f", slices=config, patches=patches).store
    evaluation = EvaluationConfig(folds=2, bootstrap=100, shuffles=0)
    run = train_run(cohort, store, tmp_path / "run", recipe=Recipe(), recipe_name="default", evaluation=evaluation)
    answer = predict(run, cohort.scans[1].path, backbone)
    assert answer.patch_map is not None
    assert answer.patch_map.shape == (4, size_px // 14, size_px // 14)
    out_of_fold = run.table("predictions.csv").set_index("scan_id").loc[cohort.scans[1].id, "p_AD"]
    assert answer.probabilities[1] == pytest.approx(out_of_fold, abs=5e-3)  # places are kept in half precision
    laid = deviation_map(answer)
    assert laid is not None
    assert laid.shape == (40, 48, 40)


def test_slice_weights_add_up_and_the_heaviest_is_first(save_nifti: Callable[..., Path]) -> None:
    answer = prediction(save_nifti(head()), "axial")
    table = explain(answer)
    assert table["weight"].sum() == pytest.approx(1)
    assert table.loc[table["rank"] == 1, "slice"].item() == 19
    laid = np.asarray(slice_weight_map(answer).dataobj)
    assert laid.max() == pytest.approx(20 * 19 / 190)
    assert deviation_map(answer) is None


def test_three_planes_meet_where_all_of_them_see_it(save_nifti: Callable[..., Path]) -> None:
    path = save_nifti(head(), affine=np.array([[4.0, 0, 0, -70], [0, 4, 0, -90], [0, 0, 4, -60], [0, 0, 0, 1]]))
    planes = ("axial", "coronal", "sagittal")
    wanted = np.array([-20.0, 15.0, 40.0])  # mm
    slices = prediction(path, *planes).slices
    patches = np.zeros((60, 8, 8), np.float32)
    for run in stacks(slices.planes).values():
        row, column, number = (np.linalg.inv(slices.affine_ras[run.start]) @ [*wanted, 1])[:3]
        patches[run.start + round(number), int(row // 14), int(column // 14)] = 3
    answer = prediction(path, *planes, patch_map=patches)
    laid = deviation_map(answer)
    assert laid is not None
    hottest = np.unravel_index(np.asarray(laid.dataobj).argmax(), laid.shape)
    np.testing.assert_allclose((laid.affine @ [*hottest, 1])[:3], wanted, atol=9)  # half a patch
    weights = slice_weight_map(answer)
    voxel = (15, 25, 22)
    place = (weights.affine @ [*voxel, 1])[:3]
    crossing = [
        60 * answer.slice_weights[run][np.abs(answer.slices.position_mm[run] - place[AXIS[plane]]).argmin()]
        for plane, run in stacks(answer.slices.planes).items()
    ]
    assert np.asarray(weights.dataobj)[voxel] == pytest.approx(np.mean(crossing), rel=1e-5)
    assert explain(answer)["plane"].tolist() == list(np.repeat(planes, 20))
