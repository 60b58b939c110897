"""Who is held out when: folds that keep a subject's scans together, sites, or what the table says.

A partition is an integer array `[repeats, scans]`: the number of the fold in which a scan is scored, unique over
repeats, or -1 where it is only ever trained on. The model of fold k is trained on what its repeat does not hold out
in k.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from dinoatten3d.config import EvaluationConfig
from dinoatten3d.data.cohort import Scan
from dinoatten3d.errors import CohortError

ATTEMPTS = 20
TRAIN, TEST = ("train", "training", "val", "validation"), ("test",)
"""Values of a `split` column that name sides; validation scans are trained on, since inner folds choose."""


def partition(
    scans: Sequence[Scan], labels: NDArray[np.int64], classes: tuple[str, ...], evaluation: EvaluationConfig
) -> NDArray[np.int64]:
    """Decide who is held out when.

    Args:
        scans: The scans.
        labels: Class index, `[scans]`.
        classes: Names of the classes.
        evaluation: The kind of split, the number of folds and repeats, the seed.

    Returns:
        Fold of each scan, `[repeats, scans]`; -1 where it is never held out.

    Raises:
        CohortError: The cohort does not allow it; the message says what to do.
    """
    subjects = np.array([scan.subject for scan in scans])
    if evaluation.split == "folds":
        count = evaluation.folds
        repeats = [
            outer_folds(labels, subjects, classes, folds=count, seed=evaluation.seed + 7919 * r) + count * r
            for r in range(evaluation.repeats)
        ]
        return np.stack(repeats)
    values = [getattr(scan, "site" if evaluation.split == "site" else "split") for scan in scans]
    held_out = _by_column(values, "site" if evaluation.split == "site" else "split")
    _check_given_split(held_out, labels, subjects, classes, values)
    return held_out[None]


def repeat_of(folds: NDArray[np.int64], fold: int) -> int:
    """Give the repeat that a fold belongs to, in a partition `[repeats, scans]`."""
    return int(np.flatnonzero((folds == fold).any(axis=1))[0])


def _by_column(values: list[str | None], column: str) -> NDArray[np.int64]:
    """Make each value a fold; of `train` and `test` only the second is held out."""
    if None in values:
        raise CohortError(
            f"{values.count(None)} of {len(values)} scans have no {column}; fill the column in, or use "
            "--evaluation.split folds"
        )
    names = sorted({str(value) for value in values})
    if len(names) < 2:
        raise CohortError(
            f"column {column} holds the single value '{names[0]}'; two or more are needed to hold one out"
        )
    sides = {name.lower() for name in names}
    if column == "split" and sides <= {*TRAIN, *TEST}:
        if not sides & set(TEST):
            raise CohortError("column split names no 'test' scan, so none could be scored; name some")
        return np.array([0 if str(value).lower() in TEST else -1 for value in values])
    if column == "split" and sides & {*TRAIN, *TEST}:
        strange = next(name for name in names if name.lower() not in {*TRAIN, *TEST})
        raise CohortError(
            f"column split holds '{strange}' beside {', '.join(name for name in names if name != strange)}; wanted "
            "train, val and test, or names of folds and none of these"
        )
    return np.array([names.index(str(value)) for value in values])


def _check_given_split(
    held_out: NDArray[np.int64],
    labels: NDArray[np.int64],
    subjects: NDArray[Any],
    classes: tuple[str, ...],
    values: list[str | None],
) -> None:
    for subject in np.unique(subjects):
        sides = {str(values[i]) for i in np.flatnonzero(subjects == subject)}
        if len(np.unique(held_out[subjects == subject])) > 1:
            raise CohortError(
                f"subject {subject} is in {' and '.join(sorted(sides))}: training and test scans would share a "
                "person; mend the table"
            )
    for number, name in enumerate(classes):
        if not ((held_out >= 0) & (labels == number)).any():
            raise CohortError(f"no scan of class '{name}' is held out, so nothing could be said of it; mend the split")
    for fold in np.unique(held_out[held_out >= 0]):
        for number, name in enumerate(classes):
            people = len(np.unique(subjects[(held_out != fold) & (labels == number)]))
            if people < 2:
                left_out = values[int(np.flatnonzero(held_out == fold)[0])]
                raise CohortError(
                    f"without '{left_out}' class '{name}' has {people} subjects left to train on, 2 are needed; "
                    "use --evaluation.split folds"
                )


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
            rest = "group it with another class, or leave it out with --ignore"
            raise CohortError(
                f"class '{name}' has {count} subjects, fewer than the {folds} folds; "
                f"use --evaluation.folds {count}, or {rest}"
                if count > 1
                else f"class '{name}' has a single subject, which cannot be trained on and held out; {rest}"
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
