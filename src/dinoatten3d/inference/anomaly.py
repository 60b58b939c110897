"""How far a scan is from the healthy ones, without a single diagnosis label.

The reference is the first class (or the whole cohort, where there are no labels). Each scan is scored with references
of the other folds only, and its percentile is its place among reference scans that were held out in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dinoatten3d.errors import CohortError, ConfigError
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.deviation import Deviation, fit_deviation, slice_scores, top_slices
from dinoatten3d.learning.deviation_model import tokens_of
from dinoatten3d.learning.splits import group_folds


class Anomalies(NamedTuple):
    """Scores of all scans, held out.

    `table` has one row a scan; `slice_scores` is `[scans, slices]`; `maps` is `[scans, slices, rows, columns]`: the
    larger of darker and brighter in standard deviations of reference scans, 0 outside tissue. `deviations` has what
    each fold learnt from the reference scans of the others.
    """

    table: pd.DataFrame
    slice_scores: NDArray[np.float64]
    maps: NDArray[np.float32]
    deviations: tuple[Deviation, ...]


def score_anomalies(
    bags: Bags, *, folds: int = 5, seed: int = 0, progress: Callable[[int, int], None] = lambda done, total: None
) -> Anomalies:
    """Score every scan by its deviation from reference scans of other subjects.

    Args:
        bags: Scans with patch tokens. Labels, where there are any, only say which scans are references (class 0).
        folds: Reference scans are held out in this many folds.
        seed: Decides folds and sampling.
        progress: Called with folds done and in all.

    Raises:
        ConfigError: Fewer than two folds.
        CohortError: Too few reference subjects.
        FeatureError: The features hold no patch tokens.
    """
    scans = tokens_of(bags)
    reference = bags.labels.numpy() <= 0  # class 0, or no label at all
    people = len(np.unique(bags.subjects[reference]))
    if folds < 2:
        raise ConfigError(f"folds is {folds}; it must be 2 or more, so that each reference scan is held out once")
    if people < folds:
        raise CohortError(f"there are {people} reference subjects, fewer than the {folds} folds; use fewer --folds")
    assigned = group_folds(np.where(reference, 0, 1), bags.subjects, folds=folds, seed=seed)
    if assigned is None:  # fewer other subjects than folds: fold the references alone, spread the others over them
        assigned = np.arange(len(bags)) % folds
        found = group_folds(np.zeros(int(reference.sum()), int), bags.subjects[reference], folds=folds, seed=seed)
        assert found is not None
        assigned[reference] = found
    deviations = []
    maps = np.zeros(scans[0].tokens.shape[:3], np.float32)[None].repeat(len(bags), axis=0)
    for fold in range(folds):
        held_out = np.flatnonzero(assigned == fold)
        train = np.flatnonzero(reference & (assigned != fold) & ~np.isin(bags.subjects, bags.subjects[held_out]))
        fitted = fit_deviation(
            [scans[i] for i in train],
            bags.subjects[train],
            np.ones(len(train), bool),
            planes=bags.planes,
            seed=seed * 1000 + fold,
        )
        deviations.append(fitted.deviation)
        for i in held_out:
            maps[i] = fitted.deviation.patch_map(scans[i])
        progress(fold + 1, folds)
    by_slice = map_slice_scores(maps, np.stack([scan.tissue for scan in scans]))
    score = top_slices(by_slice)
    heaviest = by_slice.argmax(axis=1)
    table = pd.DataFrame(
        {
            "scan_id": [scan.id for scan in bags.scans],
            "subject": bags.subjects,
            "label": [scan.label or "" for scan in bags.scans],
            "reference": reference,
            "fold": assigned,
            "score": score,
            "percentile": percentile_among(score, reference),
            "heaviest_slice_plane": np.array(bags.planes)[heaviest],
            "heaviest_slice_mm": bags.position_mm[np.arange(len(bags)), heaviest],
        }
    )
    return Anomalies(table, by_slice, maps, tuple(deviations))


def map_slice_scores(maps: NDArray[np.float32], tissue: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Score each slice of patch maps by its highest tissue patches, `[n, slices, rows, columns]` to `[n, slices]`."""
    return slice_scores(maps[..., None], tissue)[..., 0]


def percentile_among(score: NDArray[np.float64], reference: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Give the share, in percent, of (other) reference scans that score lower; ties count half."""
    percentile = np.empty(len(score))
    for i, value in enumerate(score):
        others = score[reference & (np.arange(len(score)) != i)]
        percentile[i] = 100 * np.mean((others < value) + 0.5 * (others == value))
    return percentile
