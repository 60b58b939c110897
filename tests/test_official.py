"""Official weights give official features, at every size, with and without registers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import shared
from dinoatten3d.errors import WeightsError
from dinoatten3d.features.backbone import load_backbone
from dinoatten3d.features.weights import find_weights

KINDS = ("plain", "reg4", "giant_swiglu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOATTEN3D_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("size", ["224x224", "112x98", "336x336", "518x518"])
@pytest.mark.parametrize("kind", KINDS)
def test_official_weights_give_official_features(kind: str, size: str) -> None:
    golden = load_file(shared("golden", f"dinov2_tiny_{kind}_io.safetensors"))
    backbone = load_backbone(find_weights(str(shared("golden", f"dinov2_tiny_{kind}_weights.safetensors"))))
    height, width = (int(n) for n in size.split("x"))
    if f"image_{size}" in golden:
        image = golden[f"image_{size}"].float()
        step = 1
    else:
        generator = torch.Generator().manual_seed(int(golden[f"seed_{size}"]))
        image = torch.randn(2, 3, height, width, generator=generator).half().float()
        step = 37
    with torch.inference_mode():
        tokens = backbone.model(image).last_hidden_state
    for mine, wanted in (
        (tokens[:, 0], golden[f"cls_{size}"]),
        (tokens[:, backbone.prefix_tokens :][:, ::step], golden[f"patches_{size}"]),
    ):
        assert float((mine - wanted).norm() / wanted.norm()) < 1e-4


def test_a_pth_file_is_the_same_as_safetensors(tmp_path: Path) -> None:
    path = shared("golden", "dinov2_tiny_reg4_weights.safetensors")
    torch.save({"teacher": {f"backbone.{name}": t for name, t in load_file(path).items()}}, tmp_path / "vits.pth")
    found = find_weights(str(tmp_path / "vits.pth"))
    again = load_file(found.folder / "model.safetensors")
    same = load_file(find_weights(str(path)).folder / "model.safetensors")
    assert again.keys() == same.keys()
    assert all(torch.equal(again[name], same[name]) for name in again)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.pop("blocks.1.mlp.fc2.bias"),
            r"lacks 1 tensors of its architecture, such as encoder\.layer\.1\.mlp\.fc2",
        ),
        (
            lambda t: t.update({"head.weight": torch.zeros(2)}),
            r"holds 1 tensors that DINOv2 does not have, such as head\.weight",
        ),
        (lambda t: t.pop("pos_embed"), "is no DINOv2 checkpoint in the official layout"),
    ],
)
def test_missing_and_strange_tensors_are_named(tmp_path: Path, change, said: str) -> None:
    tensors = dict(load_file(shared("golden", "dinov2_tiny_plain_weights.safetensors")))
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=said):
        find_weights(str(tmp_path / "a.safetensors"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_what_is_no_checkpoint_is_refused_and_never_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "executed",))  # type: ignore[return-value]

    torch.save({"teacher": Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "text.pth").write_text("hello")
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("bomb.pth", "text.pth", "array.npy"):
        with pytest.raises(WeightsError, match="is not a checkpoint that can be read safely"):
            find_weights(str(tmp_path / name))
    assert not (tmp_path / "executed").exists()
