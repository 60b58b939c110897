"""Features of a cohort as padded bags of slices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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
        plane: Anatomical plane of the slices.
        tokens: Patch tokens of each scan, None where they were not extracted.
    """

    features: Tensor
    mask: Tensor
    labels: Tensor
    scans: tuple[Scan, ...]
    position_mm: NDArray[np.float64]
    brain_ml: NDArray[np.float64]
    classes: tuple[str, ...]
    plane: Plane
    tokens: tuple[PatchTokens | None, ...]

    def __len__(self) -> int:
        return len(self.scans)

    @property
    def subjects(self) -> NDArray[Any]:
        """Subject of each scan, `[scans]`."""
        return np.array([scan.subject for scan in self.scans])

    @property
    def columns_run_left_to_right(self) -> bool:
        """Whether a slice's mirror image is its other hemisphere: true of axial and coronal slices."""
        return self.plane != "sagittal"

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
            plane=self.plane,
            tokens=tuple(self.tokens[i] for i in index),
        )


def load_bags(cohort: Cohort, store: FeatureStore) -> Bags:
    """Read the features of a labelled cohort.

    Raises:
        FeatureError: Features of a scan are missing or damaged.
        CohortError: There are fewer than two classes.
    """
    if cohort.target is not None and len(cohort.classes) < 2:
        only = f"the single class '{cohort.classes[0]}'" if cohort.classes else "no class"
        raise CohortError(f"{cohort.target} holds {only}; two or more are needed to tell them apart")
    found = [store.read(scan.path) for scan in cohort.scans]
    if not found:
        raise FeatureError("the cohort is empty; there is nothing to learn from")
    return _pack(cohort.scans, found, cohort.classes)


def one_bag(scan: Scan, features: Features, classes: tuple[str, ...]) -> Bags:
    """Make a bag of one scan whose class is not known."""
    return _pack((replace(scan, label=None),), [features], classes)


def _pack(scans: tuple[Scan, ...], found: list[Features], classes: tuple[str, ...]) -> Bags:
    """Pad every scan to the longest."""
    longest = max(len(features.cls) for features in found)
    dim = found[0].cls.shape[1]
    features = torch.zeros(len(found), longest, dim)
    mask = torch.zeros(len(found), longest, dtype=torch.bool)
    position = np.full((len(found), longest), np.nan)
    for row, item in enumerate(found):
        count = len(item.cls)
        features[row, :count] = torch.from_numpy(item.cls)
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
        plane=found[0].plane,
        tokens=tuple(item.patches for item in found),
    )
