"""Folds that keep a subject's scans together and the classes in proportion."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from dinoatten3d.errors import CohortError

ATTEMPTS = 20


def outer_folds(
    labels: NDArray[np.int64], subjects: NDArray[Any], classes: tuple[str, ...], *, folds: int, seed: int
) -> NDArray[np.int64]:
    """Give the fold in which each scan is scored.

    Args:
        labels: Class index, `[scans]`.
        subjects: Subject, `[scans]`; no subject is in two folds.
        classes: Names of the classes.
        folds: Number of folds.
        seed: Decides the shuffle.

    Returns:
        Fold of each scan, `[scans]`, 0 to folds - 1; every fold holds every class.

    Raises:
        CohortError: A class has fewer subjects than there are folds.
    """
    for number, name in enumerate(classes):
        count = len(set(subjects[labels == number]))
        if count < folds:
            raise CohortError(
                f"class '{name}' has {count} subjects, fewer than the {folds} folds; "
                f"use --evaluation.folds {max(2, count)}, or group it with another class"
            )
    found = group_folds(labels, subjects, folds=folds, seed=seed)
    if found is None:
        raise CohortError(f"no split into {folds} folds by subject has every class in every fold; use fewer folds")
    return found


def inner_folds(labels: NDArray[np.int64], subjects: NDArray[Any], *, folds: int, seed: int) -> NDArray[np.int64]:
    """Split the training scans of one outer fold again; fewer folds where a class is too small for as many."""
    fewest = min(len(set(subjects[labels == label])) for label in np.unique(labels))
    for count in range(min(folds, fewest), 1, -1):
        found = group_folds(labels, subjects, folds=count, seed=seed)
        if found is not None:
            return found
    raise CohortError(
        "a class has one subject in the training scans of a fold, so no inner fold can choose the epoch; "
        "add subjects or use fewer outer folds"
    )


def group_folds(
    labels: NDArray[np.int64], subjects: NDArray[Any], *, folds: int, seed: int
) -> NDArray[np.int64] | None:
    """Split by subject, stratified by class; None where no shuffle puts every class in every fold."""
    for attempt in range(ATTEMPTS):
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed + 1000 * attempt)
        assigned = np.full(len(labels), -1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for fold, (_, held_out) in enumerate(splitter.split(labels, labels, subjects)):
                assigned[held_out] = fold
        present = [len(np.unique(labels[assigned == fold])) for fold in range(folds)]
        if min(present) == len(np.unique(labels)):
            return assigned
    return None
