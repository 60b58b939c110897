"""The simplest models on the same folds: what a result has to beat before it means anything."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.run import probability_table

Inputs = Callable[[Bags], NDArray[np.float64]]


def mean_pooled(bags: Bags) -> NDArray[np.float64]:
    """Average the slices of each scan, `[scans, dim]`."""
    weight = bags.mask.unsqueeze(-1).double()
    return np.asarray(((bags.features * weight).sum(dim=1) / weight.sum(dim=1)).numpy())


def max_pooled(bags: Bags) -> NDArray[np.float64]:
    """Take the largest value of each feature over the slices, `[scans, dim]`."""
    hidden = bags.features.masked_fill(~bags.mask.unsqueeze(-1), float("-inf"))
    return np.asarray(hidden.amax(dim=1).double().numpy())


def head_size(bags: Bags) -> NDArray[np.float64]:
    """Brain volume alone, mL, `[scans, 1]`."""
    return bags.brain_ml[:, None]


BASELINES: dict[str, tuple[str, Inputs | None, float]] = {
    "prior": ("the class frequencies of the training scans", None, 1.0),
    "head size": ("logistic regression on brain volume alone", head_size, 1.0),
    "mean pooling": ("logistic regression (C = 0.01) on the mean over slices", mean_pooled, 0.01),
    "max pooling": ("logistic regression (C = 0.01) on the maximum over slices", max_pooled, 0.01),
}
"""Name to description, input and the inverse strength C of the L2 penalty."""


def run_baselines(bags: Bags, folds: NDArray[np.int64]) -> pd.DataFrame:
    """Score every scan with every baseline, each fitted on the other folds only.

    Args:
        bags: Labelled bags.
        folds: The fold in which each scan is scored, `[scans]`.

    Returns:
        One row a model and scan: model, scan_id, subject, label, fold, predicted and a probability for each class.
    """
    tables = []
    for name, (_, inputs, strength) in BASELINES.items():
        probabilities = out_of_fold(bags, folds, inputs, strength)
        table = probability_table(bags, probabilities, folds)
        table.insert(0, "model", name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def out_of_fold(bags: Bags, folds: NDArray[np.int64], inputs: Inputs | None, strength: float) -> NDArray[np.float64]:
    """Give out-of-fold probabilities of logistic regression on `inputs`, or of the class frequencies without them."""
    labels = bags.labels.numpy()
    probabilities = np.zeros((len(bags), len(bags.classes)))
    x = inputs(bags) if inputs is not None else None
    for fold in np.unique(folds):
        train, held_out = folds != fold, folds == fold
        if x is None:
            probabilities[held_out] = np.bincount(labels[train], minlength=len(bags.classes)) / train.sum()
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        probabilities[held_out] = model.fit(x[train], labels[train]).predict_proba(x[held_out])
    return probabilities
