"""Features of a cohort as padded bags of slices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoatten3d.config import Plane
from dinoatten3d.data.cohort import Cohort, Scan
from dinoatten3d.errors import CohortError, FeatureError
from dinoatten3d.features.store import Features, FeatureStore, PatchTokens


@dataclass(frozen=True, kw_only=True)
class Bags:
    """n scans as bags of slices.

    Attributes:
        features: float32 `[scans, slices, dim]`, zero where padded.
        mask: True at real slices, `[scans, slices]`.
        labels: Class index, `[scans]`; -1 where unknown.
        scans: The rows they came from.
        position_mm: `[scans, slices]`, NaN where padded.
        brain_ml: `[scans]`.
        classes: Names of the classes.
        planes: Anatomical plane of each slice, `[slices]`.
        tokens: Patch tokens of each scan, None where they were not extracted.
        means: Mean tissue patch of each slice, float32 `[scans, slices, dim]`, zero where padded; None likewise.
    """

    features: Tensor
    mask: Tensor
    labels: Tensor
    scans: tuple[Scan, ...]
    position_mm: NDArray[np.float64]
    brain_ml: NDArray[np.float64]
    classes: tuple[str, ...]
    planes: tuple[Plane, ...]
    tokens: tuple[PatchTokens | None, ...]
    means: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scans)

    @property
    def subjects(self) -> NDArray[Any]:
        """Subject of each scan, `[scans]`."""
        return np.array([scan.subject for scan in self.scans])

    def take(self, index: NDArray[np.int64]) -> Bags:
        """Keep the scans at these indices, in this order."""
        rows = torch.from_numpy(index)
        return Bags(
            features=self.features[rows],
            mask=self.mask[rows],
            labels=self.labels[rows],
            scans=tuple(self.scans[i] for i in index),
            position_mm=self.position_mm[index],
            brain_ml=self.brain_ml[index],
            classes=self.classes,
            planes=self.planes,
            tokens=tuple(self.tokens[i] for i in index),
            means=None if self.means is None else self.means[rows],
        )

    def slice_features(self, kind: Literal["cls", "mean", "cls+mean"]) -> Tensor:
        """Give what a slice is to a trained attention, `[scans, slices, dim]`.

        Raises:
            FeatureError: Patch means are asked for and the features hold none.
        """
        if kind == "cls":
            return self.features
        if self.means is None:
            raise FeatureError(
                f"model.slice_features '{kind}' needs patch means, which these features do not hold; "
                "extract with --patches.layers 9"
            )
        return self.means if kind == "mean" else torch.cat([self.features, self.means], dim=-1)


class Look(NamedTuple):
    """A model's answer for n scans.

    `probabilities` is `[scans, classes]`, `weights` `[scans, slices]`; `patch_maps` says how much each patch deviates,
    `[scans, slices, rows, columns]`, None where the model sees slices alone.
    """

    probabilities: NDArray[np.float64]
    weights: NDArray[np.float64]
    patch_maps: NDArray[np.float32] | None = None


def load_bags(cohort: Cohort, store: FeatureStore, *, layers: tuple[int, ...] = ()) -> Bags:
    """Read the features of a labelled cohort.

    Args:
        cohort: The scans.
        store: Their features.
        layers: Which of the kept layers are wanted; empty: all of them.

    Raises:
        FeatureError: Features of a scan are missing or damaged, or a layer was not kept.
        CohortError: There are fewer than two classes.
    """
    if cohort.target is not None and len(cohort.classes) < 2:
        only = f"the single class '{cohort.classes[0]}'" if cohort.classes else "no class"
        raise CohortError(f"{cohort.target} holds {only}; two or more are needed to tell them apart")
    found = [choose_layers(store.read(scan.path), store.patches.layers, layers) for scan in cohort.scans]
    if not found:
        raise FeatureError("the cohort is empty; there is nothing to learn from")
    return _pack(cohort.scans, found, cohort.classes)


def one_bag(scan: Scan, features: Features, classes: tuple[str, ...]) -> Bags:
    """Make a bag of one scan whose class is not known."""
    return _pack((replace(scan, label=None),), [features], classes)


def choose_layers(features: Features, kept: tuple[int, ...], wanted: tuple[int, ...]) -> Features:
    """Leave patch tokens and means of some layers out; nothing wanted means all of them.

    Raises:
        FeatureError: A wanted layer was not kept.
    """
    if not wanted or wanted == kept:
        return features
    if not set(wanted) <= set(kept) or features.patches is None or features.means is None:
        have = f"layers {', '.join(map(str, kept))}" if kept else "no patch tokens"
        asked = " ".join(f"--patches.layers {layer}" for layer in wanted)
        raise FeatureError(f"these features hold {have}; model.layers asks for others, extract with {asked}")

    def chosen(values: NDArray[Any]) -> NDArray[Any]:
        parts = np.split(values, len(kept), axis=-1)
        return np.concatenate([parts[kept.index(layer)] for layer in wanted], axis=-1)

    patches = replace(
        features.patches, tokens=chosen(features.patches.tokens), blemished=chosen(features.patches.blemished)
    )
    return replace(features, means=chosen(features.means), patches=patches)


def _pack(scans: tuple[Scan, ...], found: list[Features], classes: tuple[str, ...]) -> Bags:
    """Pad every scan to the longest."""
    longest = max(len(features.cls) for features in found)
    dim = found[0].cls.shape[1]
    features = torch.zeros(len(found), longest, dim)
    deep = found[0].means
    means = None if deep is None else torch.zeros(len(found), longest, deep.shape[1])
    mask = torch.zeros(len(found), longest, dtype=torch.bool)
    position = np.full((len(found), longest), np.nan)
    for row, item in enumerate(found):
        count = len(item.cls)
        features[row, :count] = torch.from_numpy(item.cls)
        if means is not None and item.means is not None:
            means[row, :count] = torch.from_numpy(item.means)
        mask[row, :count] = True
        position[row, :count] = item.position_mm
    index = {name: number for number, name in enumerate(classes)}
    return Bags(
        features=features,
        mask=mask,
        labels=torch.tensor([index.get(scan.label or "", -1) for scan in scans]),
        scans=scans,
        position_mm=position,
        brain_ml=np.array([item.brain_ml for item in found]),
        classes=classes,
        planes=max((item.planes for item in found), key=len),
        tokens=tuple(item.patches for item in found),
        means=means,
    )
