"""LoRA inside each outer fold: what is frozen stays frozen, what is held out is not seen, what is saved is small."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinoatten3d import cli
from dinoatten3d.config import LoraConfig, LossConfig, ModelConfig, PatchConfig, Recipe, SliceConfig, TrainingConfig
from dinoatten3d.data.cohort import Scan, read_cohort
from dinoatten3d.errors import ConfigError, RunError
from dinoatten3d.features.backbone import Backbone, load_backbone
from dinoatten3d.features.extract import extract
from dinoatten3d.features.weights import find_weights
from dinoatten3d.learning.adapt import AdaptedFold, adapt_fold
from dinoatten3d.learning.adapter import (
    adapted_blocks,
    adapter_tensors,
    embed_entries,
    enter,
    read_adapter,
    set_adapter_tensors,
)
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.end_to_end import AdaptedNet, draw_slices
from dinoatten3d.learning.losses import composite_loss
from dinoatten3d.learning.model import SliceAttentionNet

pytest.importorskip("peft", reason="needs the extra 'adapt'")

RECIPE = Recipe(
    adapt="lora",
    lora=LoraConfig(blocks=2, rank=4, epochs=6, patience=0, learning_rate=5e-3, batch_size=6),
    model=ModelConfig(pooling="attention", attention_width=8, dropout=0.0, slice_dropout=0.0),
    training=TrainingConfig(members=1, inner_folds=3, epochs=5),
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A DINOv2 of 3 blocks and 32 dimensions with random weights that are large enough to matter."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "smallest"
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes, initializer_range=0.2)).save_pretrained(folder)
    return load_backbone(find_weights(str(folder)))


def pictures(scans: int = 24, slices: int = 3) -> np.ndarray:
    """Draw noise; in every second scan one slice has a bright quarter."""
    pixels = np.random.default_rng(0).integers(0, 120, (scans, slices, 28, 28))
    pixels[1::2, 1, :14, :14] += 120
    return pixels.astype(np.uint8)


def entered(backbone: Backbone, pixels: np.ndarray) -> tuple[Bags, np.ndarray]:
    """Give frozen bags of the pictures and the tokens at the entry of the last two blocks."""
    scans, slices = pixels.shape[:2]
    bags = Bags(
        features=torch.from_numpy(np.stack([backbone.embed(p).cls for p in pixels])),
        mask=torch.ones(scans, slices, dtype=torch.bool),
        labels=torch.arange(scans) % 2,
        scans=tuple(Scan(id=str(n), path=Path(str(n)), subject=f"s{n}", row=n) for n in range(scans)),
        position_mm=np.tile(np.arange(slices, dtype=float), (scans, 1)),
        brain_ml=np.full(scans, 1400.0),
        classes=("A", "B"),
        planes=("axial",) * slices,
        tokens=(None,) * scans,
    )
    return bags, np.stack([enter(backbone, p, RECIPE.lora.blocks) for p in pixels])


def adapted(backbone: Backbone, pixels: np.ndarray, *, labels: Tensor | None = None, **lora: object) -> AdaptedFold:
    """Adapt on all scans but the first six."""
    bags, entries = entered(backbone, pixels)
    if labels is not None:
        bags = dataclasses.replace(bags, labels=labels)
    recipe = dataclasses.replace(RECIPE, lora=dataclasses.replace(RECIPE.lora, **lora))
    return adapt_fold(bags, entries, np.arange(6, len(bags)), backbone, recipe, seed=0)


def some_matrices(upper: torch.nn.Module) -> dict[str, Tensor]:
    """Give matrices of which none is zero."""
    generator = torch.Generator().manual_seed(1)
    return {k: torch.randn(t.shape, generator=generator) * 0.1 for k, t in adapter_tensors(upper).items()}


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_cached_tokens_and_the_last_blocks_give_what_the_whole_backbone_gives(
    backbone: Backbone, blocks: int
) -> None:
    pixels = pictures(2)[1]
    upper = adapted_blocks(backbone, LoraConfig(blocks=blocks))
    found = embed_entries(upper, [enter(backbone, pixels, blocks)])[0]
    # half precision between the blocks is all that differs
    np.testing.assert_allclose(found, backbone.embed(pixels).cls, atol=5e-3)


def test_peft_puts_the_same_adapter_on_the_whole_backbone(backbone: Backbone, tmp_path: Path) -> None:
    from peft import PeftModel

    pixels = pictures(2)[1]
    upper = adapted_blocks(backbone, RECIPE.lora)
    set_adapter_tensors(upper, some_matrices(upper))
    upper.save_pretrained(tmp_path)  # type: ignore[operator]
    whole = load_backbone(backbone.weights)
    theirs = dataclasses.replace(whole, model=PeftModel.from_pretrained(whole.model, tmp_path).get_base_model())
    ours = embed_entries(read_adapter(tmp_path, backbone, RECIPE.lora), [enter(backbone, pixels, 2)])[0]
    assert np.abs(backbone.embed(pixels).cls - ours.numpy()).max() > 0.1
    np.testing.assert_allclose(ours, theirs.embed(pixels).cls, atol=5e-3)


def test_the_loss_falls_and_the_frozen_weights_stay(backbone: Backbone) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    fold = adapted(backbone, pictures())
    losses = [row["train_loss"] for row in fold.history if row["epoch"]]
    assert losses[-1] < 0.5 * losses[0]
    chosen = [row["epoch"] for row in fold.history if row["chosen"]]
    assert len(chosen) == 1
    assert chosen[0] > 0
    assert [row["epoch"] for row in fold.history] == list(range(7))
    after = backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_matrices_are_saved_and_read_back_they_give_the_same_features(backbone: Backbone, tmp_path: Path) -> None:
    fold = adapted(backbone, pictures())
    fold.write(tmp_path)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    assert len(tensors) == 2 * 6 * 2  # a pair beside each of the six linear layers of two blocks
    upper = read_adapter(tmp_path / "adapter", backbone, RECIPE.lora)
    _, entries = entered(backbone, pictures())
    assert torch.equal(embed_entries(upper, entries), fold.features)
    assert torch.equal(load_file(tmp_path / "features.safetensors")["cls"], fold.features)


def test_nothing_of_a_held_out_scan_reaches_the_adapter(backbone: Backbone) -> None:
    labels = torch.arange(24) % 2
    first = adapted(backbone, pictures())
    other = pictures()
    other[:6] = np.random.default_rng(9).integers(0, 255, other[:6].shape)
    second = adapted(backbone, other, labels=torch.where(torch.arange(24) < 6, 1 - labels, labels))
    assert all(torch.equal(first.adapter[name], second.adapter[name]) for name in first.adapter)
    heads = first.model.tensors(), second.model.tensors()
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert torch.equal(first.features[6:], second.features[6:])
    assert not torch.equal(first.features[:6], second.features[:6])
    # and the test can fail: a training scan does reach it
    other = pictures()
    other[6] = 255 - other[6]
    third = adapted(backbone, other)
    assert not all(torch.equal(first.adapter[name], third.adapter[name]) for name in first.adapter)


def test_the_same_seed_gives_the_same_bytes_and_leaves_torchs_own_generator_alone(backbone: Backbone) -> None:
    state = torch.get_rng_state()
    runs = [adapted(backbone, pictures(), dropout=0.2, slices=2, epochs=2) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(runs[0].adapter[name], runs[1].adapter[name]) for name in runs[0].adapter)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_batch_in_two_parts_has_the_gradient_of_the_whole_also_where_scans_are_compared(
    backbone: Backbone, dropout: float
) -> None:
    bags, entries = entered(backbone, pictures(8))
    gradients = []
    for parts in (1, 2):
        torch.manual_seed(3)
        upper = adapted_blocks(backbone, dataclasses.replace(RECIPE.lora, dropout=0.0))
        set_adapter_tensors(upper, some_matrices(upper))
        head = SliceAttentionNet(
            dim=32, classes=2, members=1, config=dataclasses.replace(RECIPE.model, dropout=dropout),
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        net = AdaptedNet(upper, head, parts).train()
        out = net(torch.from_numpy(entries), bags.mask, torch.Generator().manual_seed(5))
        loss = composite_loss(
            out.logits,
            out.embedding,
            bags.labels[None],
            torch.ones(1, 8, dtype=torch.bool),
            LossConfig(supcon=1, variance=1),
        )
        loss.total.sum().backward()
        gradients.append([p.grad for p in net.parameters() if p.requires_grad])
    assert max(float(g.abs().max()) for g in gradients[0] if g is not None) > 1e-3
    for whole, parted in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parted, atol=1e-5, rtol=1e-4)


def test_drawn_slices_are_real_different_and_in_order() -> None:
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    drawn = torch.stack([draw_slices(mask, 3, torch.Generator().manual_seed(n)) for n in range(40)])
    assert (drawn.diff(dim=2) > 0).all()
    assert (drawn[:, 1] == torch.arange(3)).all()
    assert len(drawn[:, 0].unique(dim=0)) > 5
    assert draw_slices(mask, 0, torch.Generator()).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_what_cannot_work_is_said_in_a_sentence(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="add --model.pooling attention"):
        Recipe(adapt="lora")
    with pytest.raises(ConfigError, match="lora.rank is 0"):
        LoraConfig(rank=0)
    with pytest.raises(ConfigError, match=r"lora\.blocks is 4, but smallest has 3 blocks"):
        adapted_blocks(backbone, LoraConfig(blocks=4))
    with pytest.raises(RunError, match="missing or damaged"):
        read_adapter(tmp_path, backbone, RECIPE.lora)
    upper = adapted_blocks(backbone, LoraConfig(blocks=1))
    with pytest.raises(RunError, match="does not fit this backbone's last blocks"):
        set_adapter_tensors(adapted_blocks(backbone, RECIPE.lora), adapter_tensors(upper))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r'pip install "dinoatten3d\[adapt\]"'):
        adapted_blocks(backbone, RECIPE.lora)


@pytest.fixture(scope="module")
def features(cohort_folder: Path, tiny_backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frozen features of a few small slices."""
    done = extract(
        read_cohort(cohort_folder / "cohort.csv"),
        load_backbone(find_weights(str(tiny_backbone_folder))),
        tmp_path_factory.mktemp("features"),
        slices=SliceConfig(count=4, size_px=56),
        patches=PatchConfig(layers=()),
    )
    return done.store.folder


def train_command(cohort: Path, features: Path, out: Path, backbone: Path, *more: str) -> list[str]:
    given = ["train", cohort / "cohort.csv", "--features", features, "--target", "DX", "--out", out]
    return [*map(str, given), "--adapt", "lora", "--backbone", str(backbone), *more]


ATTENTION = ["--model.pooling", "attention", "--training.epochs", "5", "--evaluation.bootstrap", "100"]
SHORT = ["--lora.blocks", "2", "--lora.rank", "2", "--lora.epochs", "2", "--evaluation.folds", "2"]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line in this process and give its exit code."""
    monkeypatch.setattr(sys, "argv", ["dinoatten3d", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_train_predict_and_explain_go_by_each_folds_own_adapter(
    cohort_folder: Path,
    tiny_backbone_folder: Path,
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "runs" / "adapted"
    given = train_command(cohort_folder, features, run, tiny_backbone_folder, *ATTENTION, *SHORT)
    assert command(monkeypatch, *given) == 0
    assert [path.name for path in run.parent.iterdir()] == ["adapted"]
    assert {str(path.relative_to(run / "fold-1")) for path in (run / "fold-1").rglob("*") if path.is_file()} == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "baselines.csv",
        "features.safetensors",
        "history.jsonl",
        "model.safetensors",
        "predictions.csv",
    }
    made = tomllib.loads((run / "config.toml").read_text())["recipe"]
    assert (made["adapt"], made["lora"]["rank"], made["training"]["members"]) == ("lora", 2, 1)
    for path in run.rglob("*.safetensors"):
        assert not any("base_layer" in name or name.endswith("norm1.weight") for name in load_file(path)), path

    old, new = cohort_folder / "scans" / "scan03.nii.gz", tmp_path / "new.nii.gz"
    image = nib.load(old)
    nib.Nifti1Image(image.get_fdata(dtype=np.float32) * 1.01, image.affine).to_filename(new)
    asked = ("--backbone", tiny_backbone_folder)
    assert command(monkeypatch, "predict", run, old, new, "--out", tmp_path / "p.json", *asked) == 0
    first, second = json.loads((tmp_path / "p.json").read_text())
    assert (first["models"], second["models"]) == (1, 2)
    out_of_fold = pd.read_csv(run / "predictions.csv").set_index("scan_id")
    assert first["probabilities"]["AD"] == pytest.approx(out_of_fold.loc["scan03", "p_AD"], abs=1e-4)
    assert command(monkeypatch, "explain", run, old, "--out", tmp_path / "x", *asked) == 0
    shown = pd.read_csv(tmp_path / "x" / "scan03" / "weights.csv")["weight"].to_numpy()
    attention = pd.read_csv(run / "attention.csv")
    np.testing.assert_allclose(shown, attention.loc[attention["scan_id"] == "scan03", "weight"], atol=1e-5)

    given = ("evaluate", run, "--cohort", cohort_folder / "cohort.csv", "--features", features, "--out", tmp_path / "e")
    assert command(monkeypatch, *given) == 2
    assert "features are of the frozen one; use `predict` on scans" in capsys.readouterr().err

    # another adapter in the fold that held scan03 out: its answer changes, that of the other fold's scans does not
    folds = out_of_fold["fold"]
    other = next(name for name in folds.index if folds[name] != folds["scan03"])
    path = run / f"fold-{folds['scan03']}" / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, 0.3) for name, tensor in load_file(path).items()}, path)
    both = (old, old.with_name(f"{other}.nii.gz"))
    assert command(monkeypatch, "predict", run, *both, "--out", tmp_path / "q.json", *asked) == 0
    changed, same = (answer["probabilities"]["AD"] for answer in json.loads((tmp_path / "q.json").read_text()))
    assert abs(changed - out_of_fold.loc["scan03", "p_AD"]) > 1e-3
    assert same == pytest.approx(out_of_fold.loc[other, "p_AD"], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--training.epochs", "3"], "add --model.pooling attention"),
        ([*ATTENTION, "--lora.blocks", "9"], "lora.blocks is 9, but tiny has 3 blocks"),
        ([*ATTENTION, "--lora.rank", "0"], "lora.rank is 0"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_sentence_and_exit_code_2(
    cohort_folder: Path,
    tiny_backbone_folder: Path,
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    said: str,
) -> None:
    given = train_command(cohort_folder, features, tmp_path / "run", tiny_backbone_folder, *change)
    assert command(monkeypatch, *given) == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_another_backbone_than_that_of_the_features_is_refused(
    backbone: Backbone, cohort_folder: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = train_command(cohort_folder, features, tmp_path / "run", backbone.weights.folder, *ATTENTION, *SHORT)
    assert command(monkeypatch, *given) == 2
    assert "pass the same with --backbone" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_adaptation_leaves_nothing_behind(
    cohort_folder: Path, tiny_backbone_folder: Path, features: Path, tmp_path: Path, how: signal.Signals
) -> None:
    endless = ["--lora.epochs", "1000000", "--lora.patience", "0"]
    given = train_command(cohort_folder, features, tmp_path / "run", tiny_backbone_folder, *ATTENTION, *endless)
    code = "from dinoatten3d.learning import adapt\nfrom dinoatten3d import cli\n"
    code += "plain = adapt.train_end_to_end\n"
    code += "def told(*given, **more):\n    print('training', flush=True)\n    return plain(*given, **more)\n"
    code += "adapt.train_end_to_end = told\ncli.main()\n"
    process = subprocess.Popen([sys.executable, "-c", code, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"training\n"
    time.sleep(0.5)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    assert not list(tmp_path.iterdir())
