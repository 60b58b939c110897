"""The made cohorts: their truth is true, and nothing but the lesion tells the classes apart."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from dinoatten3d.demo.cohorts import DemoCohort, lesion_area_mm2, stored_image
from dinoatten3d.demo.implant import DARK, SUBTLE, ImplantConfig, implant_cohort
from dinoatten3d.demo.phantom import PhantomConfig, make_phantom_cohort, phantom_scan
from dinoatten3d.errors import CohortError, ConfigError, ScanError

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_real_brains = pytest.mark.skipif(
    not (SHARED / "ds002748_2mm").is_dir() or not (SHARED / "soop_lesion_masks").is_dir(),
    reason="the real brains and lesion masks are not beside the project",
)
SMALL = ImplantConfig(volume_ml=(3, 60))


def canonical(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.as_closest_canonical(nib.load(path))
    return image.get_fdata(), image.affine


def truth_of(cohort: DemoCohort) -> pd.DataFrame:
    return pd.read_csv(cohort.truth)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> DemoCohort:
    return make_phantom_cohort(tmp_path_factory.mktemp("phantom") / "made", config=PhantomConfig(scans=6, seed=1))


@pytest.fixture(scope="module")
def brains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight ellipsoids of several sizes and axis orders, 4 mm, far from the MNI origin."""
    folder = tmp_path_factory.mktemp("brains")
    grid = np.indices((40, 48, 40)).transpose(1, 2, 3, 0) - [19.5, 23.5, 19.5]
    affine = np.array([[4.0, 0, 0, -31], [0, 4, 0, -170], [0, 0, 4, 40], [0, 0, 0, 1]])
    rows = []
    for index in range(8):
        radii = np.array([17, 21, 17]) * (0.8 if index % 2 else 1.0)
        inside = np.linalg.norm(grid / radii, axis=-1) < 1
        grey = inside * (5 + np.indices(inside.shape)[2] * 95 // 39)  # many levels, 5 to 100
        image = stored_image(grey.astype(np.uint8), affine, tuple(("RAS", "LPS", "PSR")[index % 3]), 2.5)
        nib.save(image, folder / f"sub-{index}_T1w.nii.gz")
        rows.append({"participant_id": f"sub-{index}", "age": 30 + index, "gender": "fm"[index % 2], "group": "x"})
    pd.DataFrame(rows).to_csv(folder / "participants.tsv", sep="\t", index=False)
    return folder


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve balls in the left and right half of MNI space, 3 mm, stored LAS."""
    folder = tmp_path_factory.mktemp("lesions")
    affine = np.array([[3.0, 0, 0, -78], [0, 3, 0, -112], [0, 0, 3, -70], [0, 0, 0, 1]])
    grid = nib.affines.apply_affine(affine, np.indices((53, 63, 52)).transpose(1, 2, 3, 0))
    for index in range(12):
        side = "left" if index % 2 else "right"
        centre_mm = [-30 if side == "left" else 30, -40 + 6 * index, 20]
        ball = np.linalg.norm(grid - centre_mm, axis=-1) < 14 + index / 2
        nib.save(stored_image(ball.astype(np.uint8), affine, ("L", "A", "S")), folder / f"{side}-{index}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def implanted(brains: Path, lesions: Path, tmp_path_factory: pytest.TempPathFactory) -> DemoCohort:
    return implant_cohort(brains, lesions, tmp_path_factory.mktemp("implant") / "made", config=SMALL)


def test_half_of_the_phantoms_have_a_lesion(phantoms: DemoCohort) -> None:
    table = pd.read_csv(phantoms.table)
    assert table.columns.tolist() == ["path", "subject", "diagnosis"]
    assert table["diagnosis"].value_counts().to_dict() == {"healthy": 3, "lesion": 3}
    assert all((phantoms.table.parent / path).is_file() for path in table["path"])


def test_a_phantom_differs_from_its_healthy_twin_in_the_lesion_only() -> None:
    config = PhantomConfig(seed=5)
    sick, well = (phantom_scan(3, config, lesion=lesion) for lesion in (True, False))
    assert sick.lesion is not None
    assert well.lesion is None
    assert sick.image.header.binaryblock == well.image.header.binaryblock
    near = ndimage.maximum_filter(np.asarray(sick.lesion.dataobj) > 0, size=9)  # 4 sd of the soft edge
    dark, light = (np.asarray(scan.image.dataobj).astype(float) for scan in (sick, well))
    assert np.array_equal(dark[~near], light[~near])
    core = ndimage.binary_erosion(np.asarray(sick.lesion.dataobj) > 0, iterations=2)
    assert dark[core].mean() < 0.95 * light[core].mean()


def test_phantoms_come_in_several_grids_and_orders(phantoms: DemoCohort) -> None:
    images = [nib.load(path) for path in sorted((phantoms.table.parent / "scans").iterdir())]
    assert len({nib.aff2axcodes(image.affine) for image in images}) > 2
    assert len({tuple(np.round(image.header.get_zooms(), 2)) for image in images}) > 2
    assert all(image.get_data_dtype() == np.int16 for image in images)
    assert len({float(image.dataobj.slope) for image in images}) == len(images)
    assert max(path.stat().st_size for path in (phantoms.table.parent / "scans").iterdir()) < 2_000_000


@pytest.mark.parametrize("kind", ["phantoms", "implanted"])
def test_the_truth_table_agrees_with_the_masks(kind: str, request: pytest.FixtureRequest) -> None:
    cohort: DemoCohort = request.getfixturevalue(kind)
    root = cohort.truth.parent
    truth = truth_of(cohort)
    assert truth.loc[truth["diagnosis"] == "healthy", ["intensity", "mask", "side", "z_low_mm"]].isna().all(axis=None)
    for row in truth[truth["diagnosis"] == "lesion"].itertuples():
        scan, mask = nib.load(root / "scans" / f"{row.scan}.nii.gz"), nib.load(root / row.mask)
        assert np.array_equal(scan.affine, mask.affine)
        assert scan.shape == mask.shape
        lesion, affine = canonical(root / row.mask)
        assert lesion.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000 == pytest.approx(row.lesion_ml, abs=1e-3)
        assert not (lesion.astype(bool) & (canonical(root / "scans" / f"{row.scan}.nii.gz")[0] == 0)).any()
        z_mm = np.linspace(row.z_low_mm - 30, row.z_high_mm + 30, 200)
        cut = lesion_area_mm2(mask, "axial", z_mm, 0.01) > 0
        assert z_mm[cut].min() == pytest.approx(row.z_low_mm, abs=1.5)
        assert z_mm[cut].max() == pytest.approx(row.z_high_mm, abs=1.5)


def test_lesion_volumes_are_in_the_range_asked_for(phantoms: DemoCohort, implanted: DemoCohort) -> None:
    for cohort, (low, high) in ((phantoms, PhantomConfig().lesion_volume_ml), (implanted, SMALL.volume_ml)):
        volumes = truth_of(cohort).query("diagnosis == 'lesion'")["lesion_ml"]
        assert volumes.between(low * 0.98, high * 1.02).all()


def test_implanted_lesions_keep_their_hemisphere(brains: Path, lesions: Path, tmp_path: Path) -> None:
    for side in ("left", "right"):
        one_sided = tmp_path / side
        one_sided.mkdir()
        for path in lesions.glob(f"{side}-*"):
            (one_sided / path.name).symlink_to(path)
        cohort = implant_cohort(brains, one_sided, tmp_path / f"cohort-{side}", config=SMALL)
        assert set(truth_of(cohort)["side"].dropna()) == {side}


def test_an_implanted_brain_differs_from_its_source_in_the_lesion_only(brains: Path, implanted: DemoCohort) -> None:
    for row in truth_of(implanted).itertuples():
        scan, source = (nib.load(f / f"{row.scan}.nii.gz") for f in (implanted.table.parent / "scans", brains))
        assert np.allclose(scan.affine, source.affine)
        assert scan.get_data_dtype() == np.int16
        assert float(scan.dataobj.slope) == pytest.approx(source.get_fdata().max() / 4000)
        changed = np.abs(scan.get_fdata() - source.get_fdata()) > 1
        if row.diagnosis == "healthy":
            assert not changed.any()
        else:
            lesion = nib.load(implanted.truth.parent / row.mask).get_fdata() > 0
            assert changed[lesion].all()
            # how many grey levels there are must not tell who has a lesion
            assert len(np.unique(scan.get_fdata())) <= len(np.unique(source.get_fdata()))
            assert not changed[~ndimage.binary_dilation(lesion, iterations=3)].any()


def test_sex_is_balanced_over_the_classes(implanted: DemoCohort) -> None:
    table = pd.read_csv(implanted.table)
    assert set(table.columns) == {"path", "subject", "diagnosis", "age", "sex"}
    assert pd.crosstab(table["diagnosis"], table["sex"]).to_numpy().tolist() == [[2, 2], [2, 2]]


def test_all_scans_of_a_subject_get_the_same_diagnosis(brains: Path, lesions: Path, tmp_path: Path) -> None:
    sessions = tmp_path / "sessions"
    sessions.mkdir()
    for index, path in enumerate(sorted(brains.glob("*.nii.gz"))):
        (sessions / f"sub-{index // 2}_ses-{index % 2}_T1w.nii.gz").symlink_to(path)
    table = pd.read_csv(implant_cohort(sessions, lesions, tmp_path / "out", config=SMALL).table)
    assert (table.groupby("subject")["diagnosis"].nunique() == 1).all()
    assert table["diagnosis"].nunique() == 2


def test_normalised_brains_all_fill_the_same_box(brains: Path, lesions: Path, tmp_path: Path) -> None:
    config = ImplantConfig(volume_ml=(3, 90), normalise_head_size=True)
    cohort = implant_cohort(brains, lesions, tmp_path / "out", config=config)
    boxes = []
    for path in pd.read_csv(cohort.table)["path"]:
        inside, affine = canonical(cohort.table.parent / path)
        filled = np.argwhere(inside > 0)
        boxes.append(nib.affines.apply_affine(affine, [filled.min(axis=0), filled.max(axis=0)]))
    assert np.ptp(boxes, axis=0).max() <= 2


def test_the_seed_decides_every_byte(phantoms: DemoCohort, brains: Path, lesions: Path, tmp_path: Path) -> None:
    again = make_phantom_cohort(tmp_path / "phantom", config=PhantomConfig(scans=6, seed=1))
    assert bytes_of(again.table.parent) == bytes_of(phantoms.table.parent)
    first, same, other = (
        implant_cohort(brains, lesions, tmp_path / name, config=ImplantConfig(volume_ml=(3, 60), seed=seed))
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert bytes_of(first.table.parent) == bytes_of(same.table.parent)
    assert not truth_of(first).equals(truth_of(other))


def test_the_same_configuration_is_reused_and_another_is_refused(
    phantoms: DemoCohort, implanted: DemoCohort, brains: Path, lesions: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in phantoms.table.parent.rglob("*")}
    calls: list[int] = []
    again = make_phantom_cohort(
        phantoms.table.parent,
        config=PhantomConfig(scans=6, seed=1),
        progress=lambda done, _: calls.append(done),
    )
    assert again == phantoms._replace(reused=True)
    assert not calls
    assert {path: path.stat().st_mtime_ns for path in phantoms.table.parent.rglob("*")} == before
    with pytest.raises(CohortError, match="another configuration"):
        make_phantom_cohort(phantoms.table.parent, config=PhantomConfig(scans=6, seed=2))
    with pytest.raises(CohortError, match="another configuration"):
        implant_cohort(brains, lesions, implanted.table.parent, config=DARK)


def test_a_changed_brain_is_another_cohort(brains: Path, lesions: Path, tmp_path: Path) -> None:
    mine = tmp_path / "brains"
    mine.mkdir()
    for path in brains.glob("*.nii.gz"):
        (mine / path.name).write_bytes(path.read_bytes())
    implant_cohort(mine, lesions, tmp_path / "out", config=SMALL)
    (mine / "sub-0_T1w.nii.gz").write_bytes((mine / "sub-2_T1w.nii.gz").read_bytes())
    with pytest.raises(CohortError, match="another configuration"):
        implant_cohort(mine, lesions, tmp_path / "out", config=SMALL)


def test_a_folder_of_something_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CohortError, match="not a demo cohort"):
        make_phantom_cohort(tmp_path, config=PhantomConfig(scans=2))
    assert bytes_of(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_failure_leaves_nothing_behind(brains: Path, lesions: Path, tmp_path: Path) -> None:
    out = tmp_path / "here" / "out"
    with pytest.raises(CohortError, match=r"none of the 12 unused lesion masks gives 900-950 mL in sub-"):
        implant_cohort(brains, lesions, out, config=ImplantConfig(volume_ml=(900, 950)))
    assert list((tmp_path / "here").iterdir()) == []


def test_each_mask_is_used_once(brains: Path, lesions: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(lesions.iterdir())[:3]:
        (few / path.name).symlink_to(path)
    with pytest.raises(CohortError, match="none of the 0 unused lesion masks"):
        implant_cohort(brains, few, tmp_path / "out", config=SMALL)


def test_bad_input_gets_one_sentence(brains: Path, lesions: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CohortError, match="0 NIfTI files, but brains"):
        implant_cohort(empty, lesions, tmp_path / "out", config=SMALL)
    with pytest.raises(CohortError, match="0 NIfTI files, but lesion masks"):
        implant_cohort(brains, empty, tmp_path / "out", config=SMALL)
    for name in ("a.nii.gz", "b.nii.gz"):
        (empty / name).write_bytes(b"not an image")
    with pytest.raises(ScanError, match=r"[ab]\.nii\.gz is no readable NIfTI"):
        implant_cohort(empty, lesions, tmp_path / "out", config=SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"scans": 1},
        {"seed": -1},
        {"lesion_volume_ml": (9, 2)},
        {"lesion_intensity": (0, 0.5)},
        {"noise": (0.1, 2)},
    ],
)
def test_an_impossible_phantom_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PhantomConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"volume_ml": (0, 5)}, {"intensity": (0.5, 1.5)}, {"edge_mm": -1}])
def test_an_impossible_implant_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ImplantConfig(**wrong)  # type: ignore[arg-type]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    axcodes=st.sampled_from(["RAS", "LPS", "PSR", "AIL"]),
    plane=st.sampled_from(["axial", "coronal", "sagittal"]),
    thickness_mm=st.floats(0.5, 9),
)
def test_lesion_area_over_touching_slices_adds_up_to_the_volume(
    seed: int, axcodes: str, plane: str, thickness_mm: float
) -> None:
    rng = np.random.default_rng(seed)
    spacing_mm, lesion = rng.uniform(0.5, 4, 3), rng.random((5, 6, 7)) < 0.3
    affine = nib.affines.from_matvec(np.diag(spacing_mm), rng.uniform(-20, 20, 3))
    mask = stored_image(lesion.astype(np.uint8), affine, tuple(axcodes))
    positions_mm = np.arange(-60, 60, thickness_mm)
    area_mm2 = lesion_area_mm2(mask, plane, positions_mm, thickness_mm)
    assert area_mm2.sum() * thickness_mm == pytest.approx(lesion.sum() * np.prod(spacing_mm))


def test_lesion_area_is_found_at_the_slice_that_holds_it() -> None:
    lesion = np.zeros((4, 5, 6), dtype=np.uint8)
    lesion[1:3, 2, 4] = 1
    mask = stored_image(lesion, np.diag([1.0, 2.0, 3.0, 1.0]), ("L", "P", "S"))
    assert lesion_area_mm2(mask, "axial", np.arange(6) * 3.0, 3.0).tolist() == [0, 0, 0, 0, 4, 0]
    assert lesion_area_mm2(mask, "coronal", np.arange(5) * 2.0, 2.0).tolist() == [0, 0, 6, 0, 0]
    assert lesion_area_mm2(mask, "sagittal", [0.0, 1.0, 2.0, 3.0], 1.0).tolist() == [0, 6, 6, 0]
    with pytest.raises(ConfigError, match="plane 'oblique'"):
        lesion_area_mm2(mask, "oblique", [0.0], 1.0)
    with pytest.raises(ConfigError, match="thickness_mm is 0"):
        lesion_area_mm2(mask, "axial", [0.0], 0)


@needs_real_brains
@pytest.mark.parametrize("config", [DARK, SUBTLE], ids=["dark", "subtle"])
def test_real_lesions_darken_real_brains(config: ImplantConfig, tmp_path: Path) -> None:
    brains = tmp_path / "brains"
    brains.mkdir()
    for path in sorted((SHARED / "ds002748_2mm").iterdir())[:7]:
        (brains / path.name).symlink_to(path)
    cohort = implant_cohort(brains, SHARED / "soop_lesion_masks", tmp_path / "out", config=config)
    rows = truth_of(cohort).query("diagnosis == 'lesion'")
    assert len(rows) == 3
    assert rows["lesion_ml"].between(*config.volume_ml).all()
    for row in rows.itertuples():
        after, before = (
            nib.load(f / f"{row.scan}.nii.gz").get_fdata() for f in (cohort.table.parent / "scans", brains)
        )
        lesion = nib.load(cohort.truth.parent / row.mask).get_fdata() > 0
        core = ndimage.binary_erosion(lesion, iterations=2)
        assert after[core].sum() / before[core].sum() == pytest.approx(row.intensity, abs=0.08)
