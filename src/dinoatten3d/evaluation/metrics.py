"""How well do probabilities tell classes apart: one figure each, per class and for chance.

Labels are 0..K-1 and probabilities have one column a class. With two classes, index 1 is the positive class,
and ranking figures, sensitivity and specificity are its own; with more, they are the mean over classes, each
against the rest. A figure that the labels at hand cannot define, such as the AUROC of a single class, is NaN
and never a guess.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

from dinoatten3d.errors import RunError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = [
    "METRICS",
    "ClassScores",
    "Metric",
    "Scores",
    "brier_losses",
    "chance",
    "check_binary",
    "check_predictions",
    "confusion",
    "per_class_scores",
    "score",
    "scores_of_confusion",
    "shown_classes",
]


class Metric(NamedTuple):
    """How a figure is called in a table, and which way is better."""

    label: str
    higher_is_better: bool


METRICS: dict[str, Metric] = {
    "auroc": Metric("AUROC", True),
    "average_precision": Metric("Average precision", True),
    "accuracy": Metric("Accuracy", True),
    "balanced_accuracy": Metric("Balanced accuracy", True),
    "f1_macro": Metric("F1 (macro)", True),
    "f1_weighted": Metric("F1 (weighted)", True),
    "sensitivity": Metric("Sensitivity", True),
    "specificity": Metric("Specificity", True),
    "brier": Metric("Brier score", False),
}
"""Every field of `Scores`, in the order in which a table shows them."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The figures of one set of predictions; NaN where the labels leave a figure undefined."""

    auroc: float
    """Area under the ROC curve; chance 0.5. More than two classes: mean of one-vs-rest."""
    average_precision: float
    """Area under the precision-recall curve (step sum); chance is the prevalence."""
    accuracy: float
    """Share of right decisions; chance is the share of the largest class."""
    balanced_accuracy: float
    """Mean over classes of the share found; chance 1/K."""
    f1_macro: float
    """Mean over classes of F1."""
    f1_weighted: float
    """Mean over classes of F1, weighted with the class sizes."""
    sensitivity: float
    """Share of the positive class that is called positive. More than two classes: mean of one-vs-rest."""
    specificity: float
    """Share of the others that is not called positive. More than two classes: mean of one-vs-rest."""
    brier: float
    """Mean squared error of the probabilities, 0 to 1 for any number of classes; lower is better."""


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """The figures of one class against all the others; NaN where undefined."""

    count: int
    auroc: float
    average_precision: float
    sensitivity: float
    specificity: float
    precision: float
    f1: float


def score(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n K"],
    decisions: Int[np.ndarray, " n"] | None = None,
) -> Scores:
    """Figures of one set of predictions.

    Args:
        labels: True class of each case, 0..K-1.
        probabilities: Predicted probability of each class; rows sum to one.
        decisions: Predicted class of each case, where a threshold was chosen elsewhere; by default the class
            of highest probability.

    Returns:
        The figures; those that need a class which `labels` lacks are NaN.

    Raises:
        RunError: The arrays are empty, differ in length, or hold no probabilities.
    """
    table = confusion(labels, probabilities, decisions)
    per_class = [_ranking(labels == k, probabilities[:, k]) for k in shown_classes(len(table))]
    auroc, average_precision = np.mean(per_class, axis=0)
    return Scores(
        auroc=float(auroc),
        average_precision=float(average_precision),
        brier=float(brier_losses(labels, probabilities).mean()),
        **{name: float(value) for name, value in scores_of_confusion(table).items()},
    )


def per_class_scores(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n K"],
    decisions: Int[np.ndarray, " n"] | None = None,
) -> list[ClassScores]:
    """Figures of each class against all the others, in the order of the classes.

    Args and errors are those of `score`.
    """
    rates = _class_rates(confusion(labels, probabilities, decisions))
    found = []
    for k in range(probabilities.shape[1]):
        auroc, average_precision = _ranking(labels == k, probabilities[:, k])
        found.append(
            ClassScores(
                count=int((labels == k).sum()),
                auroc=auroc,
                average_precision=average_precision,
                **{name: float(rate[k]) for name, rate in rates._asdict().items()},
            )
        )
    return found


def confusion(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n K"],
    decisions: Int[np.ndarray, " n"] | None = None,
) -> Int[np.ndarray, "K K"]:
    """Count cases by true class (rows) and predicted class (columns).

    Args and errors are those of `score`.
    """
    check_predictions(labels, probabilities)
    predicted = probabilities.argmax(axis=1) if decisions is None else decisions
    table: np.ndarray = confusion_matrix(labels, predicted, labels=range(probabilities.shape[1]))
    return table


def chance(labels: Int[np.ndarray, " n"], n_classes: int | None = None) -> Scores:
    """Figures of a model that has seen no scan and always answers with the class frequencies.

    Args:
        labels: True class of each case, 0..K-1.
        n_classes: K; by default the highest label plus one, at least two.

    Returns:
        AUROC 0.5, average precision at the prevalence, the accuracy of naming the largest class, balanced
        accuracy 1/K, the Brier score of the prior, and the rest that follows from naming the largest class.

    Raises:
        RunError: There are no labels, or one lies outside 0..K-1.
    """
    if len(labels) == 0:
        raise RunError("there are no labels to work out chance from; give at least one case")
    frequencies = np.bincount(labels, minlength=n_classes or max(2, labels.max() + 1)) / len(labels)
    return score(labels, np.tile(frequencies, (len(labels), 1)))


def brier_losses(labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n K"]) -> Float[np.ndarray, " n"]:
    """Half the squared distance from each row of probabilities to the truth: 0 (certain, right) to 1."""
    losses: np.ndarray = ((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(axis=1) / 2
    return losses


def scores_of_confusion(table: Float[np.ndarray, "*batch K K"]) -> dict[str, Float[np.ndarray, " *batch"]]:
    """The figures of `Scores` that depend on decisions alone, for one or many (weighted) confusion matrices.

    Args:
        table: True class by predicted class on the last two axes; counts or sums of weights.

    Returns:
        One array a figure, shaped like the leading axes.
    """
    rates = _class_rates(table)
    shown = shown_classes(table.shape[-1])
    counts = table.sum(axis=-1)
    total = counts.sum(axis=-1)
    return {
        "accuracy": np.trace(table, axis1=-2, axis2=-1) / total,
        "balanced_accuracy": rates.sensitivity.mean(axis=-1),
        "f1_macro": rates.f1.mean(axis=-1),
        "f1_weighted": np.nansum(rates.f1 * counts, axis=-1) / total,
        "sensitivity": rates.sensitivity[..., shown].mean(axis=-1),
        "specificity": rates.specificity[..., shown].mean(axis=-1),
    }


def shown_classes(n_classes: int) -> list[int]:
    """The classes that a one-vs-rest figure is averaged over: of two, the positive one stands for both."""
    return [1] if n_classes == 2 else list(range(n_classes))


def check_predictions(labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n K"]) -> None:
    """Refuse what is no set of labels with their probabilities.

    Raises:
        RunError: Lengths differ, there is no case or fewer than two classes, a label is outside 0..K-1, or
            a row is not finite, not in [0, 1] or does not sum to one.
    """
    if probabilities.ndim != 2 or probabilities.shape[1] < 2 or probabilities.shape[0] != len(labels):
        raise RunError(
            f"probabilities have shape {probabilities.shape} for {len(labels)} labels; "
            "give one row a label and one column a class, two classes or more"
        )
    n_classes = probabilities.shape[1]
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= n_classes:
        seen = f"labels from {labels.min()} to {labels.max()}" if len(labels) else "no labels"
        raise RunError(f"got {seen}; give at least one, each from 0 to {n_classes - 1}")
    # Loose enough for float16 networks and for tables that were rounded to four digits.
    sound = (probabilities >= 0).all(axis=1) & (np.abs(probabilities.sum(axis=1) - 1) < 5e-3)
    if not sound.all():
        row = int(np.argmin(sound))
        raise RunError(
            f"row {row} holds {probabilities[row].tolist()}, which is no set of probabilities; "
            "give finite values from 0 to 1 that sum to one (a network that diverged gives NaN)"
        )


def check_binary(positive: np.ndarray, wanted_by: str) -> None:
    """Refuse labels that do not hold both of two classes.

    Raises:
        RunError: A label is neither 0 nor 1, or one of the two is absent.
    """
    present = np.unique(positive)
    if not np.array_equal(present, [0, 1]):
        raise RunError(
            f"{wanted_by} got the classes {present.tolist()} and needs both 0 and 1; "
            "compare two classes that each have cases"
        )


class _Rates(NamedTuple):
    """What one class is worth against the others, from counts alone; one value a class on the last axis."""

    sensitivity: np.ndarray
    specificity: np.ndarray
    precision: np.ndarray
    f1: np.ndarray


def _class_rates(table: Float[np.ndarray, "*batch K K"]) -> _Rates:
    right = np.diagonal(table, axis1=-2, axis2=-1).astype(float)
    true = table.sum(axis=-1)
    called = table.sum(axis=-2)
    others = true.sum(axis=-1, keepdims=True) - true
    with np.errstate(invalid="ignore"):  # 0/0 is the NaN of an undefined figure
        return _Rates(
            sensitivity=right / true,
            specificity=1 - (called - right) / others,
            precision=right / called,
            f1=np.where(true > 0, 2 * right / (true + called), np.nan),
        )


def _ranking(positive: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """AUROC and average precision of one class, NaN where all cases are of one kind."""
    if positive.all() or not positive.any():
        return math.nan, math.nan
    return float(roc_auc_score(positive, scores)), float(average_precision_score(positive, scores))
