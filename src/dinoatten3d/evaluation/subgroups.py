"""Does the model do as well for women as for men, for the old as for the young, at each site, for each head size?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dinoatten3d.evaluation.intervals import bootstrap_intervals

FEWEST = 5
"""Subjects of each class that a group needs for a figure."""
FIGURES = ("auroc", "balanced_accuracy")
TERTILES = {"age": "years", "brain_ml": "mL"}
NAMES = {"brain_ml": "head size"}


def subgroup_figures(
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    called: NDArray[np.int64],
    cohort: pd.DataFrame,
    *,
    classes: list[str],
    target: str | None,
    evaluation: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Score sex, age tertiles, sites and head-size tertiles by themselves.

    Args:
        labels: Class index, `[scans]`.
        probabilities: Out of fold, `[scans, classes]`.
        called: Class that each scan was called, `[scans]`.
        cohort: One row a scan in the same order: subject, sex, age, site, brain_ml.
        classes: Names of the classes.
        target: Column of the label, which makes no groups.
        evaluation: `bootstrap` and `seed`.

    Returns:
        One entry a group: covariate, group, scans, subjects, people of each class, and AUROC and balanced accuracy with
        their intervals; None where a class has fewer than five people. A covariate with one group has no entries.
    """
    found = []
    for column in ("sex", "age", "site", "brain_ml"):
        groups = _tertiles(cohort[column], TERTILES[column]) if column in TERTILES else _named(cohort[column])
        if column == target or len(groups) < 2:
            continue
        for group, inside in groups.items():
            subjects = cohort["subject"].to_numpy()[inside]
            people = [len(np.unique(subjects[labels[inside] == k])) for k in range(len(classes))]
            figures: dict[str, Any] = dict.fromkeys(FIGURES)
            if min(people) >= FEWEST:
                intervals = bootstrap_intervals(
                    labels[inside],
                    probabilities[inside],
                    subjects,
                    decisions=called[inside],
                    replicates=evaluation["bootstrap"],
                    seed=evaluation["seed"],
                )
                figures = {name: intervals[name]._asdict() for name in FIGURES}
            found.append(
                {
                    "covariate": NAMES.get(column, column),
                    "group": group,
                    "scans": int(inside.sum()),
                    "subjects": len(np.unique(subjects)),
                    "people": dict(zip(classes, people, strict=True)),
                    **figures,
                }
            )
    return found


def subgroup_sentences(subgroups: list[dict[str, Any]], overall: Mapping[str, Any]) -> list[str]:
    """Name the groups whose interval of the AUROC excludes the figure of all scans, and how many were looked at.

    Args:
        subgroups: What `subgroup_figures` gave.
        overall: Pooled figures of the model, each with its `value`.
    """
    scored = [row for row in subgroups if row["auroc"] is not None]
    value = overall["auroc"]["value"]
    apart = [row for row in scored if not row["auroc"]["low"] <= value <= row["auroc"]["high"]]
    if not apart:
        return []
    named = "; ".join(
        f"{row['covariate']} {row['group']} {row['auroc']['value']:.2f} "
        f"({row['auroc']['low']:.2f} to {row['auroc']['high']:.2f})"
        for row in apart
    )
    return [
        f"The AUROC of some subgroups differs from {value:.2f}: {named}. {len(scored)} subgroups were looked at; of as "
        "many, one in twenty would differ by chance."
    ]


def _named(values: pd.Series[Any]) -> dict[str, NDArray[np.bool_]]:
    """Give who is in each category; the unknown are in none."""
    text = values.fillna("").astype(str)
    return {name: (text == name).to_numpy() for name in sorted(set(text) - {""})}


def _tertiles(values: pd.Series[Any], unit: str) -> dict[str, NDArray[np.bool_]]:
    """Give who is in each third; ties stay together, so that thirds may differ in size or be fewer."""
    numbers = values.to_numpy(np.float64)
    known = np.isfinite(numbers)
    if not known.any():
        return {}
    edges = np.unique(np.quantile(numbers[known], [1 / 3, 2 / 3]))
    place = np.where(known, np.searchsorted(edges, numbers, side="right"), -1)
    groups = {}
    for third in np.unique(place[known]):
        inside = place == third
        groups[f"{numbers[inside].min():.4g} to {numbers[inside].max():.4g} {unit}"] = inside
    return groups
