"""Can the probabilities be taken at their word, and what to do with them: sets, abstention, thresholds.

Whatever is fitted here (a temperature, a threshold, a conformal set) is fitted on one set of cases and used
on another; fit on inner validation folds, never on the fold that is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import binomtest
from sklearn.metrics import roc_curve

from dinoatten3d.errors import ConfigError, RunError
from dinoatten3d.evaluation.metrics import brier_losses, check_binary, check_predictions, shown_classes

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = [
    "BrierParts",
    "Reliability",
    "RiskCoverage",
    "apply_temperature",
    "brier_decomposition",
    "conformal_p_values",
    "conformal_sets",
    "expected_calibration_error",
    "fit_temperature",
    "reliability_curve",
    "risk_coverage",
    "threshold_for_sensitivity",
    "youden_threshold",
]

Binning = Literal["equal-mass", "equal-width"]
TEMPERATURES = (0.05, 20.0)
"""Where a temperature is looked for; a separable calibration set would send it to 0."""


class Reliability(NamedTuple):
    """What was promised and what came true, bin by bin; empty bins are left out."""

    predicted: Float[np.ndarray, " bins"]
    """Mean probability given."""
    observed: Float[np.ndarray, " bins"]
    """Share of cases in which the event happened."""
    low: Float[np.ndarray, " bins"]
    high: Float[np.ndarray, " bins"]
    """Wilson 95 % interval of `observed`."""
    cases: Int[np.ndarray, " bins"]


class BrierParts(NamedTuple):
    """Murphy's parts of the Brier score: reliability - resolution + uncertainty + within_bins = the score."""

    reliability: float
    """Squared gap between promise and outcome; 0 is perfect."""
    resolution: float
    """How far outcomes differ between bins; higher is better."""
    uncertainty: float
    """What the prior alone would score."""
    within_bins: float
    """What binning leaves over; 0 when each bin holds one distinct probability."""


class RiskCoverage(NamedTuple):
    """Error rate among the cases answered, when the least confident are left to a human."""

    coverage: Float[np.ndarray, " steps"]
    """Share of cases answered, rising to 1."""
    risk: Float[np.ndarray, " steps"]
    """Share of wrong answers among them."""
    confidence: Float[np.ndarray, " steps"]
    """Answer where the highest probability is at least this."""


def reliability_curve(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n K"],
    *,
    bins: int = 10,
    binning: Binning = "equal-mass",
) -> Reliability:
    """Promised against observed frequency: of the positive class, or of "the answer is right" for K > 2.

    Args:
        labels: True class of each case, 0..K-1.
        probabilities: Predicted probability of each class.
        bins: Most bins to make.
        binning: Bins of (nearly) as many cases each, tied probabilities together; or of the same width.

    Returns:
        The bins that hold cases, from low to high probability.

    Raises:
        RunError: The arrays are no predictions.
        ConfigError: `bins` is below 1.
    """
    check_predictions(labels, probabilities)
    if probabilities.shape[1] == 2:
        event, promised = labels == 1, probabilities[:, 1]
    else:
        event, promised = probabilities.argmax(axis=1) == labels, probabilities.max(axis=1)
    return _reliability(event, promised, bins, binning)


def expected_calibration_error(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n K"],
    *,
    bins: int = 10,
    binning: Binning = "equal-mass",
) -> float:
    """Mean gap between promised and observed frequency, weighted by the cases in each bin (ECE).

    Biased upwards when bins hold few cases: about 0.1 for a perfect model with 10 bins of 10 cases.
    Args and errors are those of `reliability_curve`.
    """
    curve = reliability_curve(labels, probabilities, bins=bins, binning=binning)
    return float(np.average(np.abs(curve.predicted - curve.observed), weights=curve.cases))


def brier_decomposition(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n K"],
    *,
    bins: int = 10,
    binning: Binning = "equal-mass",
) -> BrierParts:
    """Split the Brier score into its causes (Murphy 1973); for K > 2, half the sum over classes.

    Args and errors are those of `reliability_curve`; the parts add up to `Scores.brier`.
    """
    check_predictions(labels, probabilities)
    shown = shown_classes(probabilities.shape[1])
    parts = np.zeros(3)
    for k in shown:
        curve = _reliability(labels == k, probabilities[:, k], bins, binning)
        prior = np.mean(labels == k)
        gap = np.average((curve.predicted - curve.observed) ** 2, weights=curve.cases)
        spread = np.average((curve.observed - prior) ** 2, weights=curve.cases)
        parts += np.array([gap, spread, prior * (1 - prior)]) / (1 if len(shown) == 1 else 2)
    reliability, resolution, uncertainty = (float(part) for part in parts)
    brier = float(brier_losses(labels, probabilities).mean())
    return BrierParts(reliability, resolution, uncertainty, brier - (reliability - resolution + uncertainty))


def fit_temperature(logits: Float[np.ndarray, "n K"], labels: Int[np.ndarray, " n"]) -> float:
    """Temperature that, dividing the logits, makes the labels likeliest (Guo et al. 2017).

    Args:
        logits: Logits or log-probabilities of cases that the model was not trained on.
        labels: True class of each case, 0..K-1.

    Returns:
        A value from 0.05 to 20; above 1, the model was too sure of itself.

    Raises:
        RunError: The arrays are empty, differ in length or hold values that are not finite.
    """
    if not np.isfinite(logits).all():
        raise RunError("the logits are not all finite; clip probabilities above 0 before taking logarithms")
    check_predictions(labels, softmax(logits, axis=1))
    rows = np.arange(len(labels))

    def surprise(log_temperature: float) -> float:
        return -float(log_softmax(logits / np.exp(log_temperature), axis=1)[rows, labels].mean())

    found = minimize_scalar(surprise, bounds=tuple(np.log(TEMPERATURES)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def apply_temperature(logits: Float[np.ndarray, "n K"], temperature: float) -> Float[np.ndarray, "n K"]:
    """Probabilities of logits (or log-probabilities) divided by `temperature`; decisions stay."""
    probabilities: np.ndarray = softmax(logits / temperature, axis=1)
    return probabilities


def conformal_sets(
    calibration_labels: Int[np.ndarray, " m"],
    calibration_probabilities: Float[np.ndarray, "m K"],
    probabilities: Float[np.ndarray, "n K"],
    *,
    alpha: float = 0.1,
) -> Bool[np.ndarray, "n K"]:
    """Sets of classes that hold the true one with probability 1 - alpha, class by class (Mondrian conformal).

    A class stays in the set unless fewer than a share alpha of its own calibration cases look as unlike it.
    With fewer than 1/alpha - 1 calibration cases nothing can be ruled out, and the class is always in.

    Args:
        calibration_labels: True class of held-out cases, exchangeable with the new ones.
        calibration_probabilities: Their predicted probabilities.
        probabilities: Predicted probabilities of the new cases, by the same model.
        alpha: Share of cases of each class that may fall outside their set, between 0 and 1.

    Returns:
        Whether each class is in each new case's set. Sets may be empty or hold every class.

    Raises:
        RunError: The calibration arrays are no predictions.
        ConfigError: `alpha` is not between 0 and 1.
    """
    check_predictions(calibration_labels, calibration_probabilities)
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha is {alpha}; give the share of misses allowed, between 0 and 1")
    classes = range(probabilities.shape[1])
    own = [np.sort(calibration_probabilities[calibration_labels == k, k]) for k in classes]
    return conformal_p_values(own, probabilities) > alpha


def conformal_p_values(
    own: Sequence[Sequence[float] | Float[np.ndarray, " m"]], probabilities: Float[np.ndarray, "n K"]
) -> Float[np.ndarray, "n K"]:
    """How usual a probability is among the cases of a class: the share of them that look at least as unlike it.

    Args:
        own: For each class, the probabilities that its own calibration cases were given for it, rising.
        probabilities: Predicted probabilities of the new cases.

    Returns:
        p-value of each class for each new case; uniform for its true class, if cases are exchangeable.
    """
    as_unlike = [np.searchsorted(values, probabilities[:, k], side="right") for k, values in enumerate(own)]
    return np.stack([(n + 1) / (len(values) + 1) for n, values in zip(as_unlike, own, strict=True)], axis=1)


def risk_coverage(labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n K"]) -> RiskCoverage:
    """Error rate against the share of cases answered, most confident first; ties go together."""
    check_predictions(labels, probabilities)
    confidence = probabilities.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    wrong = np.cumsum(probabilities.argmax(axis=1)[order] != labels[order])
    answered = np.arange(1, len(labels) + 1)
    last = np.flatnonzero(np.diff(confidence[order], append=-1))
    return RiskCoverage(answered[last] / len(labels), wrong[last] / answered[last], confidence[order][last])


def youden_threshold(labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n 2"]) -> float:
    """Probability of class 1 from which to call it, for the largest sensitivity + specificity (Youden 1950).

    Raises:
        RunError: One of the two classes is absent.
    """
    roc = _operating_points(labels, probabilities)
    return float(roc.threshold[np.argmax(roc.sensitivity + roc.specificity)])


def threshold_for_sensitivity(
    labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n 2"], *, sensitivity: float
) -> float:
    """Highest probability of class 1 from which to call it and still find at least this share of class 1.

    Raises:
        RunError: One of the two classes is absent.
        ConfigError: `sensitivity` is not above 0 and at most 1.
    """
    if not 0 < sensitivity <= 1:
        raise ConfigError(f"the wanted sensitivity is {sensitivity}; give a share above 0, at most 1")
    roc = _operating_points(labels, probabilities)
    return float(roc.threshold[np.argmax(roc.sensitivity >= sensitivity)])


class _OperatingPoints(NamedTuple):
    threshold: np.ndarray
    sensitivity: np.ndarray
    specificity: np.ndarray


def _operating_points(labels: np.ndarray, probabilities: np.ndarray) -> _OperatingPoints:
    """Thresholds from high to low, each halfway to the next score so that rounding changes no decision."""
    check_predictions(labels, probabilities)
    check_binary(labels, "A threshold")
    false_alarms, found, scores = roc_curve(labels, probabilities[:, 1], drop_intermediate=False)
    cuts = (scores[1:] + np.append(scores[2:], 0)) / 2  # the first point calls nobody positive
    return _OperatingPoints(cuts, found[1:], 1 - false_alarms[1:])


def _reliability(event: np.ndarray, promised: np.ndarray, bins: int, binning: Binning) -> Reliability:
    if bins < 1:
        raise ConfigError(f"got {bins} bins; give one or more")
    shares = np.linspace(0, 1, bins + 1)[1:-1]
    edges = np.quantile(promised, shares) if binning == "equal-mass" else shares
    # An edge belongs to the bin above it, for every case alike, so that ties are never split.
    where = np.unique(np.searchsorted(edges, promised, side="right"), return_inverse=True)[1]
    count = np.bincount(where)
    happened = np.bincount(where, weights=event)
    wilson = [binomtest(int(k), int(n)).proportion_ci(method="wilson") for k, n in zip(happened, count, strict=True)]
    return Reliability(
        predicted=np.bincount(where, weights=promised) / count,
        observed=happened / count,
        low=np.array([interval.low for interval in wilson]),
        high=np.array([interval.high for interval in wilson]),
        cases=count,
    )
