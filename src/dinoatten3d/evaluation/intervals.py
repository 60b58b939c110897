"""How sure are we: subject-level bootstrap for every figure, DeLong for the AUROC, and planning ahead.

The unit is the subject, not the scan: several scans of one person are no independent evidence. The bootstrap
draws subjects, and DeLong's variance sums over subjects (Obuchowski 1997), which is DeLong's own formula when
each subject has one scan.

Figures between 0 and 1 get their interval on the log-odds scale. Plain bootstrap percentiles are too narrow
for the cohorts at hand (an AUROC of 0.9 from 10 patients and 30 controls: they hold it 90 times in 100, not
95); `benchmarks/coverage.py` measures what is used here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import norm, rankdata

from dinoatten3d.errors import ConfigError, RunError
from dinoatten3d.evaluation.metrics import (
    brier_losses,
    check_binary,
    check_predictions,
    score,
    scores_of_confusion,
    shown_classes,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = [
    "DeLong",
    "Interval",
    "auroc_half_width",
    "bootstrap_intervals",
    "check_level",
    "delong",
    "delong_interval",
    "interval_around",
    "subject_weights",
    "weighted_scores",
]


class Interval(NamedTuple):
    """A figure and the range that holds its true value at the level asked for."""

    value: float
    low: float
    high: float


class DeLong(NamedTuple):
    """AUROC of several models on the same cases, and how their errors vary together."""

    auroc: Float[np.ndarray, " models"]
    covariance: Float[np.ndarray, "models models"]


def bootstrap_intervals(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n K"],
    subjects: np.ndarray,
    *,
    decisions: Int[np.ndarray, " n"] | None = None,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> dict[str, Interval]:
    """Bootstrap interval of every figure of `Scores`, drawing subjects with all their scans.

    The draws give the standard error; the interval is symmetric on the log-odds scale. A figure of exactly 0
    or 1 has no error to draw; it gets Wilson's interval of as many trials as the smallest class has subjects.

    Args:
        labels: True class of each scan, 0..K-1.
        probabilities: Predicted probability of each class.
        subjects: Subject of each scan.
        decisions: Predicted class of each scan; by default the most probable one.
        replicates: Number of bootstrap draws.
        level: Coverage wanted, between 0 and 1.
        seed: Seed or generator of the draws.

    Returns:
        Name of the figure -> its value with the interval; NaN where the figure is undefined.

    Raises:
        RunError: The arrays are no predictions, or differ in length.
        ConfigError: `level` is not between 0 and 1.
    """
    values = vars(score(labels, probabilities, decisions))
    weights = subject_weights(labels, subjects, replicates=replicates, seed=seed)
    drawn = weighted_scores(labels, probabilities, weights, decisions)
    fewest = min(len(np.unique(subjects[labels == k])) for k in np.unique(labels))
    return {
        name: interval_around(value, float(drawn[name].std(ddof=1)), fewest=fewest, level=level)
        for name, value in values.items()
    }


def interval_around(value: float, spread: float, *, fewest: int, level: float = 0.95) -> Interval:
    """Interval of a figure between 0 and 1 from its standard error, symmetric on the log-odds scale.

    A figure of exactly 0 or 1 has no error of its own; it gets Wilson's interval of `fewest` trials, the number of
    subjects in the smallest class.
    """
    z = _normal_quantile(level)
    if min(value, 1 - value) < 1e-9:
        return _wilson_interval(value, fewest, z)
    return _log_odds_interval(value, spread, z)


def subject_weights(
    labels: Int[np.ndarray, " n"], subjects: np.ndarray, *, replicates: int, seed: int | np.random.Generator
) -> Float[np.ndarray, "replicates n"]:
    """How much each scan counts in each bootstrap draw.

    Subjects are drawn with replacement among the m with the same class (or the same set of classes, for one
    whose diagnosis changes), so that no draw lacks a class. Drawing m - 1 of them, with weight m / (m - 1)
    each, keeps class sizes and makes the variance unbiased; m draws make it too small (Rao & Wu 1988).

    Raises:
        RunError: There is not one subject a label.
    """
    if len(subjects) != len(labels):
        raise RunError(f"got {len(subjects)} subjects for {len(labels)} labels; give the subject of each scan")
    generator = np.random.default_rng(seed)
    names, member = np.unique(subjects, return_inverse=True)
    has_class = np.zeros((len(names), int(labels.max()) + 1), bool)
    has_class[member, labels] = True
    kinds, kind = np.unique(has_class, axis=0, return_inverse=True)
    times = np.empty((replicates, len(names)))
    for stratum in range(len(kinds)):
        inside = np.flatnonzero(kind == stratum)
        drawn = max(len(inside) - 1, 1)
        evenly = np.full(len(inside), 1 / len(inside))
        times[:, inside] = generator.multinomial(drawn, evenly, size=replicates) * len(inside) / drawn
    return times[:, member]


def weighted_scores(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n K"],
    weights: Float[np.ndarray, "replicates n"],
    decisions: Int[np.ndarray, " n"] | None = None,
) -> dict[str, Float[np.ndarray, " replicates"]]:
    """Every figure of `Scores` for many weightings of the same scans at once.

    A weight of w counts a scan w times: the same figures as `score` on the repeated rows.
    """
    check_predictions(labels, probabilities)
    n_classes = probabilities.shape[1]
    shown = shown_classes(n_classes)
    ranking = [_weighted_ranking(labels == k, probabilities[:, k], weights) for k in shown]
    auroc, average_precision = np.mean(ranking, axis=0)
    predicted = probabilities.argmax(axis=1) if decisions is None else decisions
    cell = np.eye(n_classes**2)[labels * n_classes + predicted]
    table = (weights @ cell).reshape(-1, n_classes, n_classes)
    brier = weights @ brier_losses(labels, probabilities) / weights.sum(axis=1)
    return {
        "auroc": auroc,
        "average_precision": average_precision,
        **scores_of_confusion(table),
        "brier": brier,
    }


def delong_interval(
    labels: Int[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    *,
    subjects: np.ndarray | None = None,
    level: float = 0.95,
    transform: Literal["logit", "none"] = "logit",
) -> Interval:
    """AUROC with an interval from DeLong's variance (DeLong, DeLong & Clarke-Pearson 1988).

    A perfect (or perfectly wrong) ranking has no variance of its own; its interval is Newcombe's (2006,
    method 5), which keeps the width that so few cases deserve.

    Args:
        labels: 0 or 1 for each scan.
        scores: Higher means more likely 1; any monotone scale.
        subjects: Subject of each scan; by default each scan is its own subject.
        level: Coverage wanted, between 0 and 1.
        transform: Build the interval on the log-odds of the AUROC, where it is closer to normal and stays
            within 0 and 1, or on the AUROC itself (then clipped).

    Returns:
        The AUROC and its interval.

    Raises:
        RunError: One of the two classes is absent.
        ConfigError: `level` is not between 0 and 1.
    """
    z = _normal_quantile(level)
    found = delong(labels, np.asarray(scores)[None], subjects)
    auroc, spread = float(found.auroc[0]), float(np.sqrt(found.covariance[0, 0]))
    if auroc in (0, 1):
        n_positive = int(np.sum(labels))
        return _newcombe_interval(auroc, n_positive, len(labels) - n_positive, z)
    if transform == "none":
        return Interval(auroc, max(0.0, auroc - z * spread), min(1.0, auroc + z * spread))
    return _log_odds_interval(auroc, spread, z)


def delong(
    labels: Int[np.ndarray, " n"], scores: Float[np.ndarray, "models n"], subjects: np.ndarray | None = None
) -> DeLong:
    """AUROC of each row of scores and the covariance between them, in O(n log n).

    The share of the other class that a case outranks ("placement") comes from midranks (Sun & Xu 2014); its
    deviations are summed within subjects before they are squared (Obuchowski 1997).

    Raises:
        RunError: One of the two classes is absent, or has a single subject.
    """
    check_binary(labels, "DeLong's variance")
    positive = np.asarray(labels) == 1
    member = np.unique(np.arange(len(positive)) if subjects is None else subjects, return_inverse=True)[1]
    everyone = rankdata(scores, axis=1)
    placements = np.empty_like(everyone)
    for side in (positive, ~positive):
        placements[:, side] = (everyone[:, side] - rankdata(scores[:, side], axis=1)) / (~side).sum()
    placements[:, ~positive] = 1 - placements[:, ~positive]
    auroc = placements[:, positive].mean(axis=1)
    errors = np.zeros((member.max() + 1, len(auroc)))
    for side in (positive, ~positive):
        n_subjects = len(np.unique(member[side]))
        if n_subjects < 2:
            raise RunError("DeLong's variance got one subject in a class; it needs two or more in each")
        # Both classes get their own small-sample correction; a subject of both keeps their shared error.
        shrink = np.sqrt(n_subjects / (n_subjects - 1)) / side.sum()
        np.add.at(errors, member[side], (placements[:, side] - auroc[:, None]).T * shrink)
    return DeLong(auroc, errors.T @ errors)


def check_level(level: float) -> None:
    """Refuse a level that is no share, such as 95.

    Raises:
        ConfigError: `level` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ConfigError(f"the level of an interval is {level}; give a share between 0 and 1, such as 0.95")


def auroc_half_width(n_positive: int, n_negative: int, auroc: float, level: float = 0.95) -> float:
    """Half the width of the interval to expect for an AUROC at these class sizes (Hanley & McNeil 1982).

    Args:
        n_positive: Subjects of the positive class.
        n_negative: Subjects of the other class.
        auroc: The AUROC to plan for.
        level: Coverage wanted, between 0 and 1.

    Returns:
        The half width, in units of AUROC.

    Raises:
        ConfigError: A class has no subject, or `auroc` or `level` is not between 0 and 1.
    """
    if min(n_positive, n_negative) < 1 or not 0 <= auroc <= 1:
        raise ConfigError(
            f"planned for {n_positive} and {n_negative} subjects at AUROC {auroc}; "
            "give at least one subject a class and an AUROC from 0 to 1"
        )
    better_than_two = auroc / (2 - auroc)
    two_better = 2 * auroc**2 / (1 + auroc)
    variance = (
        auroc * (1 - auroc)
        + (n_positive - 1) * (better_than_two - auroc**2)
        + (n_negative - 1) * (two_better - auroc**2)
    ) / (n_positive * n_negative)
    return _normal_quantile(level) * float(np.sqrt(variance))


def _weighted_ranking(
    positive: np.ndarray, scores: np.ndarray, weights: np.ndarray
) -> tuple[Float[np.ndarray, " replicates"], Float[np.ndarray, " replicates"]]:
    """AUROC and average precision under each row of weights, from one sort; tied scores share a step."""
    if positive.all() or not positive.any():
        undefined = np.full(len(weights), np.nan)
        return undefined, undefined
    order = np.argsort(scores)
    steps = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    sorted_weights = weights[:, order]
    everyone = np.add.reduceat(sorted_weights, steps, axis=1)
    positives = np.add.reduceat(sorted_weights * positive[order], steps, axis=1)
    negatives = everyone - positives
    n_positive, n_negative = positives.sum(axis=1), negatives.sum(axis=1)
    outranked = np.cumsum(negatives, axis=1) - negatives / 2
    auroc = (positives * outranked).sum(axis=1) / (n_positive * n_negative)
    called = np.cumsum(everyone[:, ::-1], axis=1)[:, ::-1]
    right = np.cumsum(positives[:, ::-1], axis=1)[:, ::-1]
    # A step that no drawn scan reaches has no precision, and no weight in the sum either.
    average_precision = (positives * right / np.maximum(called, 1e-300)).sum(axis=1) / n_positive
    return auroc, average_precision


def _log_odds_interval(value: float, spread: float, z: float) -> Interval:
    """Value and error moved to log-odds (delta method), z errors to each side, and back; NaN stays NaN."""
    half = z * spread / (value * (1 - value))
    return Interval(value, float(expit(logit(value) - half)), float(expit(logit(value) + half)))


def _wilson_interval(value: float, trials: int, z: float) -> Interval:
    """What `trials` successes (or failures) out of as many leave possible."""
    width = z**2 / (trials + z**2)
    return Interval(value, max(0.0, value - width), min(1.0, value + width))


def _newcombe_interval(auroc: float, n_positive: int, n_negative: int, z: float) -> Interval:
    """Values of the AUROC whose own (Hanley-McNeil-like) spread makes the one seen no surprise."""
    surplus = (n_positive + n_negative) / 2 - 1

    def excess(true: float, seen: float) -> float:
        shape = 1 + surplus * ((1 - true) / (2 - true) + true / (1 + true))
        return seen - true - z * float(np.sqrt(true * (1 - true) * shape / (n_positive * n_negative)))

    def lower(seen: float) -> float:
        return 0.0 if seen == 0 else float(brentq(excess, 0, seen - 1e-12, args=(seen,)))

    return Interval(auroc, lower(auroc), 1 - lower(1 - auroc))


def _normal_quantile(level: float) -> float:
    """How many standard errors to each side hold `level` of a normal distribution."""
    check_level(level)
    return float(norm.ppf((1 + level) / 2))
