"""Any vision encoder that transformers loads with a CLS or pooled token goes through the whole program."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from dinoatten3d import cli
from dinoatten3d.config import PatchConfig, SliceConfig
from dinoatten3d.data.cohort import read_cohort
from dinoatten3d.errors import ConfigError, RunError, WeightsError
from dinoatten3d.features.backbone import Backbone, load_backbone, to_rgb
from dinoatten3d.features.catalogue import ENTRIES
from dinoatten3d.features.encoder import PixelStatistics, pixel_statistics
from dinoatten3d.features.extract import extract
from dinoatten3d.features.store import open_store
from dinoatten3d.features.weights import find_weights

SIZE = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
VIT = {**SIZE, "intermediate_size": 96, "image_size": 224, "patch_size": 16}
STAGES = {"hidden_sizes": [8, 16, 24, 48], "depths": [1, 1, 2, 1]}
TEXT = {**SIZE, "intermediate_size": 96, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TINY = {
    "dinov2": ("Dinov2", {**SIZE, "image_size": 518, "patch_size": 14}),
    "registers": ("Dinov2WithRegisters", {**SIZE, "image_size": 518, "patch_size": 14, "num_register_tokens": 4}),
    "dinov3": ("DINOv3ViT", {**VIT, "num_register_tokens": 4}),
    "dinov3-convnext": ("DINOv3ConvNext", STAGES),
    "vit": ("ViT", VIT),
    "deit": ("DeiT", VIT),
    "beit": ("Beit", VIT),
    "clip": ("CLIP", {"text_config": TEXT, "vision_config": VIT}),
    "clip-vision": ("CLIPVision", VIT),
    "siglip": ("Siglip", {"text_config": TEXT, "vision_config": VIT}),
    "convnext": ("ConvNext", STAGES),
    "mae": ("ViTMAE", VIT),
    "ijepa": ("IJepa", VIT),
    "swin": ("Swin", {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2]}),
}
SHAPES = {  # patch, width, layers, prefix tokens
    "dinov2": (14, 48, 3, 1),
    "registers": (14, 48, 3, 5),
    "dinov3": (16, 48, 3, 5),
    "dinov3-convnext": (32, 48, 4, 1),
    "vit": (16, 48, 3, 1),
    "deit": (16, 48, 3, 2),
    "beit": (16, 48, 3, 1),
    "clip": (16, 48, 3, 1),
    "clip-vision": (16, 48, 3, 1),
    "siglip": (16, 48, 3, 0),
    "convnext": (32, 48, 4, 0),
}
NONE = PatchConfig(layers=())
END_TO_END = ("dinov2", "registers", "dinov3", "dinov3-convnext", "vit", "siglip")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random encoder of every kind, as a folder."""
    made = {}
    for name, (kind, settings) in TINY.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp("encoders") / name
        config = getattr(transformers, f"{kind}Config")(**settings)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(made[name])
    return made


def load(folder: Path, **options) -> Backbone:
    return load_backbone(find_weights(str(folder)), **options)


def pixels(side: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, side, side)).astype(np.uint8)


@pytest.mark.parametrize("name", SHAPES)
def test_what_an_encoder_gives_is_recognised(name: str, folders: dict[str, Path]) -> None:
    backbone = load(folders[name])
    assert (backbone.patch_px, backbone.dim, backbone.layers, backbone.prefix_tokens) == SHAPES[name]
    last, before = backbone.layers, backbone.layers - 1
    tokens = backbone.embed(pixels(128 if backbone.patch_px > 14 else 112), layers=(before, last))
    assert tokens.cls.shape == (3, 48)
    side = tokens.patches[last].shape[1]
    assert tokens.patches[last].shape == (3, side, side, 48)
    assert side == (4 if backbone.patch_px == 32 else 8)
    assert tokens.patches[before].shape == ((3, 8, 8, 24) if backbone.patch_px == 32 else (3, 8, 8, 48))


@pytest.mark.parametrize("name", SHAPES)
def test_patches_lie_where_the_picture_has_them(name: str, folders: dict[str, Path]) -> None:
    backbone = load(folders[name])
    side = 4 * backbone.patch_px
    picture = np.zeros((1, side, side), np.uint8)
    picture[0, : backbone.patch_px, 3 * backbone.patch_px :] = 255
    one, nothing = (backbone.embed(p, layers=(1,)).patches[1][0] for p in (picture, np.zeros_like(picture)))
    change = np.linalg.norm(one - nothing, axis=-1)
    row, column = np.array(np.unravel_index(change.argmax(), change.shape)) * 4 // change.shape[0]
    assert (row, column) == (0, 3)


@pytest.mark.parametrize("name", [n for n in SHAPES if n not in ("clip", "siglip", "beit")])
def test_the_token_is_what_transformers_gives(name: str, folders: dict[str, Path]) -> None:
    model = transformers.AutoModel.from_pretrained(folders[name]).eval()
    picture = pixels(224)
    with torch.inference_mode():
        out = model(to_rgb(torch.from_numpy(picture)))
    wanted = out.pooler_output.flatten(1) if name in ("clip-vision", "convnext") else out.last_hidden_state[:, 0]
    np.testing.assert_allclose(load(folders[name], positions="transformers").embed(picture).cls, wanted, atol=1e-4)


def test_attention_is_shown_where_there_is_a_cls_token(folders: dict[str, Path]) -> None:
    for name in ("dinov3", "vit", "deit"):
        seen = load(folders[name]).embed(pixels(64), attention=True).attention
        assert seen is not None
        assert seen.shape == (3, 4, 4)
        assert (seen.sum(axis=(1, 2)) < 1).all()
    for name in ("dinov3-convnext", "siglip"):
        with pytest.raises(ConfigError, match="shows no attention from a CLS token"):
            load(folders[name]).embed(pixels(64), attention=True)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mae", "whose tokens are no grid of patches"),
        ("swin", "whose tokens are no grid of patches"),
        ("ijepa", "which has neither a CLS nor a pooled token"),
    ],
)
def test_an_encoder_without_a_token_of_the_slice_is_refused(name: str, said: str, folders: dict[str, Path]) -> None:
    with pytest.raises(WeightsError, match=said):
        load(folders[name])


def test_a_model_that_sees_nothing_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(**TEXT)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="is a bert and cannot embed a picture"):
        load(tmp_path)


def test_what_a_convnext_cannot_give_is_refused_in_a_sentence(folders: dict[str, Path], cohort_folder: Path) -> None:
    backbone = load(folders["dinov3-convnext"])
    with pytest.raises(ConfigError, match=r"layers \[9\] were asked for; dinov3-convnext has layers 1 to 4"):
        backbone.embed(pixels(224), layers=(9,))
    with pytest.raises(
        ConfigError, match="slices of 112 x 112 px do not divide into 32 px patches; use --slices.size-px 128"
    ):
        backbone.embed(pixels(112))


def test_a_classifier_that_was_fine_tuned_lends_its_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)).eval()
    classifier.save_pretrained(tmp_path)  # it has no pooler, and a head
    picture = pixels(224)
    with torch.inference_mode():
        wanted = classifier.vit(to_rgb(torch.from_numpy(picture))).last_hidden_state[:, 0]
    np.testing.assert_allclose(load(tmp_path).embed(picture).cls, wanted, atol=1e-5)


def test_pixel_statistics_come_from_the_folder_and_are_part_of_the_digest(
    folders: dict[str, Path], cohort_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "vit"
    folder.mkdir()
    for file in folders["vit"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    cohort = read_cohort(cohort_folder / "cohort.csv").subset({"scan00"})
    told = folder / "preprocessor_config.json"
    seen, vectors = [], []
    for content in (None, {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
                    {"image_mean": [0.5307] * 3, "image_std": [0.2583] * 3}, {"do_normalize": False}):  # fmt: skip
        if content is not None:
            told.write_text(json.dumps(content))
        done = extract(cohort, load(folder), tmp_path / "f", slices=SliceConfig(count=2, size_px=64), patches=NONE)
        seen.append(done.store.digest)
        vectors.append(done.store.read(cohort.scans[0].path).cls)
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3
    assert load(folder).pixels == PixelStatistics(mean=(0, 0, 0), std=(1, 1, 1))
    assert np.abs(vectors[2] - vectors[0]).max() > 1e-3
    for wrong in (
        "no json",
        "{}",
        '{"image_mean": [0.5], "image_std": [0.5]}',
        '{"image_mean": 1, "image_std": 2}',
        "[]",
    ):
        told.write_text(wrong)
        with pytest.raises(WeightsError, match="does not tell image_mean and image_std"):
            load(folder)


@given(content=st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner)))
def test_any_pixel_statistics_are_read_or_refused(content: object, tmp_path: Path) -> None:
    for told in (content, {"image_mean": content, "image_std": content}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
        try:
            read = pixel_statistics(tmp_path)
        except WeightsError:
            continue
        assert len(read.mean) == len(read.std) == 3
        assert np.isfinite([*read.mean, *read.std]).all()
        assert min(read.std) > 0


def test_white_becomes_what_the_statistics_say() -> None:
    white = to_rgb(torch.full((1, 2, 2), 255, dtype=torch.uint8), PixelStatistics(mean=(0.5,) * 3, std=(0.25,) * 3))
    assert torch.equal(white, torch.full((1, 3, 2, 2), 2.0))


def test_the_way_of_resizing_positions_is_part_of_the_digest_and_recorded(
    folders: dict[str, Path], cohort_folder: Path, tmp_path: Path
) -> None:
    cohort = read_cohort(cohort_folder / "cohort.csv").subset({"scan00"})
    slices = SliceConfig(count=2, size_px=56)
    stores = {}
    for positions in ("official", "transformers"):
        backbone = load(folders["dinov2"], positions=positions)
        stores[positions] = extract(cohort, backbone, tmp_path, slices=slices, patches=NONE).store
        assert open_store(stores[positions].folder).backbone["position_table"] == positions
    a, b = (store.read(cohort.scans[0].path).cls for store in stores.values())
    assert stores["official"].digest != stores["transformers"].digest
    assert 1e-5 < np.linalg.norm(a - b) / np.linalg.norm(a) < 0.5
    tables = {
        name: load(folders[name]).position_table for name in ("dinov2", "dinov3", "dinov3-convnext", "convnext", "vit")
    }
    assert tables == {
        "dinov2": "official",
        "dinov3": "none",
        "dinov3-convnext": "none",
        "convnext": "none",
        "vit": "transformers",
    }


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the command line in this process; give what it printed."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["dinoatten3d", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        assert stop.value.code == 0, printed.err
        return printed.out

    return run


QUICK = ["--training.epochs", 4, "--evaluation.folds", 2, "--evaluation.bootstrap", 100, "--evaluation.shuffles", 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", END_TO_END)
def test_every_kind_of_encoder_goes_from_scan_to_report_and_back(
    name: str, folders: dict[str, Path], cohort_folder: Path, tmp_path: Path, command: Callable[..., str]
) -> None:
    cohort = cohort_folder / "cohort.csv"
    size = 112 if "reg" in name or name == "dinov2" else 128
    layer = 3 if name == "dinov3-convnext" else 2
    features = command(
        "extract", cohort, "--out", tmp_path / "f", "--backbone", folders[name], "--slices.count", 6,
        "--slices.size-px", size, "--patches.layers", layer, "--patches.blemished", 6, "--positions", "transformers",
    ).strip()  # fmt: skip
    for recipe in ("attention", "deviation"):
        run = tmp_path / recipe
        command(
            "train", cohort, "--features", features, "--target", "DX", "--out", run, "--model.pooling", recipe, *QUICK
        )
        assert "not for diagnosis" in (run / "report.html").read_text()
    # without --backbone the run's own is found again, and its positions are resized as they were
    answer = command("predict", tmp_path / "deviation", cohort_folder / "scans" / "scan00.nii.gz")
    assert "scan00:" in answer
    command("explain", tmp_path / "attention", cohort_folder / "scans" / "scan00.nii.gz")


def test_a_run_refuses_features_of_another_position_table(
    folders: dict[str, Path], cohort_folder: Path, tmp_path: Path
) -> None:
    from dinoatten3d.config import EvaluationConfig, ModelConfig, Recipe, TrainingConfig
    from dinoatten3d.inference.predict import predict
    from dinoatten3d.steps.train import train_run

    cohort = read_cohort(cohort_folder / "cohort.csv", target="DX")
    made_with = load(folders["dinov2"], positions="transformers")
    slices = SliceConfig(count=2, size_px=56)
    store = extract(cohort, made_with, tmp_path / "f", slices=slices, patches=NONE).store
    recipe = Recipe(model=ModelConfig(pooling="attention"), training=TrainingConfig(epochs=2))
    evaluation = EvaluationConfig(folds=2, bootstrap=100, shuffles=0)
    run = train_run(cohort, store, tmp_path / "run", recipe=recipe, recipe_name="x", evaluation=evaluation)
    assert predict(run, cohort.scans[0].path, made_with).probabilities.sum() == pytest.approx(1)
    with pytest.raises(
        RunError, match="made with position table 'transformers', this backbone is loaded with 'official'"
    ):
        predict(run, cohort.scans[0].path, load(folders["dinov2"]))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_the_catalogue_tells_the_size_of_its_backbones(entry) -> None:
    if entry.model_type == "dinov3_convnext":
        dims = [entry.dim // n for n in (8, 4, 2, 1)]
        depths = [3, 3, 9 if "tiny" in entry.name else 27, 3]
        config = transformers.DINOv3ConvNextConfig(hidden_sizes=dims, depths=depths)
    elif entry.model_type == "dinov3_vit":
        wide = {"dinov3-vits16plus": 4, "dinov3-vith16plus": 4, "dinov3-vit7b16": 2}.get(entry.name)
        config = transformers.DINOv3ViTConfig(
            hidden_size=entry.dim, num_hidden_layers=entry.layers, patch_size=entry.patch_px, use_gated_mlp=bool(wide),
            intermediate_size=entry.dim * (wide or 4), num_register_tokens=entry.registers,
        )  # fmt: skip
    else:
        kind = transformers.Dinov2WithRegistersConfig if entry.registers else transformers.Dinov2Config
        config = kind(
            hidden_size=entry.dim, num_hidden_layers=entry.layers, patch_size=entry.patch_px, image_size=518,
            num_attention_heads=entry.dim // 64, use_swiglu_ffn="giant" in entry.name,
        )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert config.model_type == entry.model_type
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(entry.parameters, abs=0.06)
