"""Checkpoints in the key layout of the official DINOv2 code, as a folder that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinoatten3d.errors import WeightsError
from dinoatten3d.files import whole_folder

HEAD_DIM = 64
"""Width of an attention head in every official DINOv2 model."""
TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
IN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}


def convert_official(path: Path, folder: Path) -> None:
    """Write an official checkpoint as `config.json` and `model.safetensors`.

    Size, register count and feed-forward kind are read off the tensors. A `.pth` file is read with weights_only:
    nothing in it is executed.

    Args:
        path: `.pth`, `.pt` or `.safetensors` in the facebookresearch/dinov2 layout.
        folder: Where the folder appears, whole or not at all.

    Raises:
        WeightsError: The file is no such checkpoint, or lacks tensors or has strangers among them (they are named).
    """
    official, heads = _read(path)
    tensors: dict[str, Tensor] = {}
    strangers = []
    for name, tensor in official.items():
        found = _rename(name, tensor)
        if not found:
            strangers.append(name)
        tensors |= found
    if "pos_embed" not in official or "blocks.0.attn.qkv.weight" not in official:
        raise WeightsError(f"{path} is no DINOv2 checkpoint in the official layout (it has no pos_embed and no blocks)")
    if strangers:
        raise WeightsError(f"{path} holds {len(strangers)} tensors that DINOv2 does not have, such as {strangers[0]}")
    config = _config(official, heads)
    wanted = {name for layer in range(config["num_hidden_layers"]) for name in _block_names(layer, config)}
    missing = sorted((wanted | (set(TOP.values()) - {TOP["register_tokens"], TOP["mask_token"]})) - set(tensors))
    if missing:
        raise WeightsError(f"{path} lacks {len(missing)} tensors of its architecture, such as {missing[0]}")
    tensors.setdefault(TOP["mask_token"], torch.zeros(1, config["hidden_size"]))
    with whole_folder(folder, keep_existing=True) as place:
        save_file(
            {k: t.float().contiguous() for k, t in tensors.items()}, place / "model.safetensors", {"format": "pt"}
        )
        (place / "config.json").write_text(json.dumps(config, indent=1))


def _read(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """Give the tensors and, where a safetensors header tells it, the number of heads."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                told = (file.metadata() or {}).get("num_heads")
            return load_file(path), int(told) if told else None
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise whatever strange bytes lead them to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(f"{path} is not a checkpoint that can be read safely: {reason}") from None
    for key in ("teacher", "model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise WeightsError(f"{path} holds no table of tensors; wanted a checkpoint in the official DINOv2 layout")
    return {name.removeprefix("backbone."): t for name, t in found.items()}, None


def _rename(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Give a tensor under its transformers name (qkv becomes three); nothing where the name is unknown."""
    if name in TOP:
        return {TOP[name]: tensor}
    parts = name.split(".")
    if parts[0] != "blocks" or len(parts) < 4 or not parts[1].isdigit():
        return {}
    stem, inside, kind = f"encoder.layer.{parts[1]}", ".".join(parts[2:-1]), parts[-1]
    if inside == "attn.qkv":
        names = ("query", "key", "value")
        return {
            f"{stem}.attention.attention.{n}.{kind}": t.clone() for n, t in zip(names, tensor.chunk(3), strict=True)
        }
    if inside in ("ls1", "ls2") and kind == "gamma":
        return {f"{stem}.layer_scale{inside[2]}.lambda1": tensor}
    return {f"{stem}.{IN_BLOCK[inside]}.{kind}": tensor} if inside in IN_BLOCK else {}


def _block_names(layer: int, config: dict[str, Any]) -> set[str]:
    stem = f"encoder.layer.{layer}"
    linear = ["norm1", "norm2", "attention.output.dense"]
    linear += [f"attention.attention.{n}" for n in ("query", "key", "value")]
    linear += ["mlp.weights_in", "mlp.weights_out"] if config["use_swiglu_ffn"] else ["mlp.fc1", "mlp.fc2"]
    scales = {f"{stem}.layer_scale{n}.lambda1" for n in (1, 2)}
    return scales | {f"{stem}.{n}.{kind}" for n in linear for kind in ("weight", "bias")}


def _config(official: dict[str, Tensor], heads: int | None) -> dict[str, Any]:
    dim = official["cls_token"].shape[-1]
    patch = official["patch_embed.proj.weight"].shape[-1]
    side = round((official["pos_embed"].shape[1] - 1) ** 0.5)
    registers = official["register_tokens"].shape[1] if "register_tokens" in official else 0
    config = {
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": dim,
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in official if name.startswith("blocks.")),
        "num_attention_heads": heads or max(1, dim // HEAD_DIM),
        "mlp_ratio": 4,
        "image_size": side * patch,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_swiglu_ffn": "blocks.0.mlp.w12.weight" in official,
    }
    return config | ({"num_register_tokens": registers} if registers else {})
