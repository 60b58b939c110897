"""Is one model better than another: paired tests on the same cases, and the price of asking many times.

Every test here is paired. Each returns the difference a minus b with its interval and a two-sided p-value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.stats import binomtest, norm
from scipy.stats import t as student_t

from dinoatten3d.errors import ConfigError, RunError
from dinoatten3d.evaluation.intervals import check_level, delong, subject_weights, weighted_scores
from dinoatten3d.evaluation.metrics import METRICS, score

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = [
    "Difference",
    "McNemar",
    "corrected_resampled_ttest",
    "delong_test",
    "holm",
    "mcnemar",
    "paired_bootstrap_difference",
]


class Difference(NamedTuple):
    """A figure of model a minus that of model b, its interval, and the p-value of there being none."""

    value: float
    low: float
    high: float
    p_value: float


class McNemar(NamedTuple):
    """Cases that only one of two models gets right, and the p-value of this being an even toss."""

    only_a: int
    only_b: int
    p_value: float


def delong_test(
    labels: Int[np.ndarray, " n"],
    scores_a: Float[np.ndarray, " n"],
    scores_b: Float[np.ndarray, " n"],
    *,
    subjects: np.ndarray | None = None,
    level: float = 0.95,
) -> Difference:
    """Difference between two AUROCs on the same cases (DeLong, DeLong & Clarke-Pearson 1988).

    Args:
        labels: 0 or 1 for each scan.
        scores_a: Scores of the first model; higher means more likely 1.
        scores_b: Scores of the second model, on any scale of its own.
        subjects: Subject of each scan; by default each scan is its own subject.
        level: Coverage wanted of the interval, between 0 and 1.

    Returns:
        AUROC of a minus AUROC of b. Two models that rank alike differ by exactly 0, with p = 1.

    Raises:
        RunError: One of the two classes is absent or has a single subject.
    """
    found = delong(labels, np.stack([scores_a, scores_b]), subjects)
    contrast = np.array([1, -1])
    return _symmetric_difference(
        float(contrast @ found.auroc), float(contrast @ found.covariance @ contrast), level, norm
    )


def paired_bootstrap_difference(
    labels: Int[np.ndarray, " n"],
    probabilities_a: Float[np.ndarray, "n K"],
    probabilities_b: Float[np.ndarray, "n K"],
    subjects: np.ndarray,
    *,
    metric: str = "auroc",
    replicates: int = 1000,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> Difference:
    """Difference of any figure of `Scores`, both models scored on the same draws of subjects.

    Args:
        labels: True class of each scan, 0..K-1.
        probabilities_a: Class probabilities of the first model.
        probabilities_b: Class probabilities of the second model.
        subjects: Subject of each scan.
        metric: A name in `METRICS`.
        replicates: Number of bootstrap draws.
        level: Coverage wanted of the interval, between 0 and 1.
        seed: Seed or generator of the draws.

    Returns:
        The figure of a minus that of b; interval and p from the standard error of the draws.

    Raises:
        ConfigError: The metric is unknown, or `level` is not between 0 and 1.
        RunError: The arrays are no predictions, or differ in length.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric {metric!r} is unknown; choose one of {', '.join(METRICS)}")
    models = (probabilities_a, probabilities_b)
    value_a, value_b = (getattr(score(labels, model), metric) for model in models)
    weights = subject_weights(labels, subjects, replicates=replicates, seed=seed)
    drawn_a, drawn_b = (weighted_scores(labels, model, weights)[metric] for model in models)
    variance = float(np.var(drawn_a - drawn_b, ddof=1))
    return _symmetric_difference(value_a - value_b, variance, level, norm)


def mcnemar(
    labels: Int[np.ndarray, " n"], decisions_a: Int[np.ndarray, " n"], decisions_b: Int[np.ndarray, " n"]
) -> McNemar:
    """Exact test of whether two models are right equally often (McNemar 1947).

    Give one scan a subject: the test takes cases for independent.
    """
    right_a, right_b = decisions_a == labels, decisions_b == labels
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    discordant = only_a + only_b
    return McNemar(only_a, only_b, float(binomtest(only_a, discordant).pvalue) if discordant else 1.0)


def corrected_resampled_ttest(
    differences: Float[np.ndarray, " resamples"], *, n_train: float, n_test: float, level: float = 0.95
) -> Difference:
    """Test the mean of per-fold differences, whose training sets overlap (Nadeau & Bengio 2003).

    A plain t-test takes folds for independent and finds differences that are not there; this one widens the
    variance by the share of the data that is tested.

    Args:
        differences: Figure of a minus figure of b, one for each fold of each repeat.
        n_train: Cases a model is trained on in one fold (the mean, where folds differ).
        n_test: Cases it is tested on.
        level: Coverage wanted of the interval, between 0 and 1.

    Returns:
        The mean difference, its interval and p-value.

    Raises:
        RunError: There are fewer than two differences, or one is not finite.
    """
    count, finite = len(differences), int(np.isfinite(differences).sum())
    if count < 2 or finite < count:
        raise RunError(
            f"the resampled t-test got {count} differences, {finite} of them finite; "
            "give two or more, all finite (a fold that lacks a class has no AUROC)"
        )
    variance = float(np.var(differences, ddof=1)) * (1 / count + n_test / n_train)
    return _symmetric_difference(float(np.mean(differences)), variance, level, student_t(count - 1))


def holm(p_values: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """Adjust p-values of several tests so that the chance of any false alarm stays at its level (Holm 1979).

    Returns:
        Adjusted p-values in the order given.
    """
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def _symmetric_difference(value: float, variance: float, level: float, distribution: Any) -> Difference:
    """Interval and two-sided p of an estimate whose error follows `distribution` in units of its spread."""
    check_level(level)
    spread = float(np.sqrt(max(variance, 0.0)))
    if spread < 1e-12:  # two models that agree on every case, or differ by the same on each
        return Difference(value, value, value, 1.0 if abs(value) < 1e-12 else 0.0)
    half = spread * float(distribution.ppf((1 + level) / 2))
    return Difference(value, value - half, value + half, float(2 * distribution.sf(abs(value) / spread)))
