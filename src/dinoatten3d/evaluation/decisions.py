"""From probabilities to decisions: calibrated, called at a threshold, or left open as a set of classes.

All three are learnt from the inner probabilities of a fold's training scans (those of models that were not fitted on
them) and used on scans of which neither the fold's model nor its calibration knows anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dinoatten3d.config import EvaluationConfig
from dinoatten3d.evaluation.calibration import (
    apply_temperature,
    brier_decomposition,
    conformal_p_values,
    expected_calibration_error,
    fit_temperature,
    risk_coverage,
    threshold_for_sensitivity,
    youden_threshold,
)
from dinoatten3d.evaluation.intervals import bootstrap_intervals, interval_around, subject_weights
from dinoatten3d.learning.fit import CrossValidation, FittedFold
from dinoatten3d.learning.run import Run
from dinoatten3d.learning.splits import repeat_of

Array = NDArray[np.float64]
SMALLEST = 1e-6
"""Probabilities are kept this far from 0 before a logarithm."""
FEWEST = 2
"""Inner scans of each class that a calibration takes."""
ANSWERED = (1.0, 0.9, 0.8, 0.7, 0.5)
"""Shares of the scans answered, most confident first, for which the error rate is given."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the inner folds of one model teach about its probabilities.

    Attributes:
        temperature: Divides the log-probabilities; above 1 the model was too sure of itself.
        threshold: Calibrated probability of the positive class from which it is called; None for several classes.
        inner: For each class, the calibrated probabilities that its own inner scans were given, rising.
    """

    temperature: float
    threshold: float | None
    inner: tuple[tuple[float, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Give what `from_dict` takes."""
        return {"temperature": self.temperature, "threshold": self.threshold, "inner": [list(c) for c in self.inner]}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Calibration:
        """Read back what `to_dict` gave."""
        threshold = None if found["threshold"] is None else float(found["threshold"])
        return cls(
            temperature=float(found["temperature"]),
            threshold=threshold,
            inner=tuple(tuple(map(float, c)) for c in found["inner"]),
        )


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What is made of the probabilities of n scans.

    Attributes:
        probabilities: Calibrated, `[n, classes]`.
        called: Class index, `[n]`: the positive class from the threshold on; of several the most probable one.
        p_values: How usual such a probability is among scans of the class, `[n, classes]`; a class is in the set
            where this exceeds alpha.
    """

    probabilities: Array
    called: NDArray[np.int64]
    p_values: Array


def calibrate(inner: Array, labels: NDArray[np.int64], sensitivity: float) -> Calibration | None:
    """Learn from the inner probabilities of training scans; None where too few scans of a class have one.

    Args:
        inner: `[train, classes]`, NaN where a scan has none.
        labels: Class index, `[train]`.
        sensitivity: Wanted of the threshold; 0 for the largest sum of sensitivity and specificity.
    """
    known = np.isfinite(inner).all(axis=1)
    inner, labels = inner[known], labels[known]
    if np.bincount(labels, minlength=inner.shape[1]).min() < FEWEST:
        return None
    temperature = fit_temperature(_log(inner), labels)
    calibrated = apply_temperature(_log(inner), temperature)
    threshold = None
    if inner.shape[1] == 2 and sensitivity:
        threshold = threshold_for_sensitivity(labels, calibrated, sensitivity=sensitivity)
    elif inner.shape[1] == 2:
        threshold = youden_threshold(labels, calibrated)
    own = tuple(tuple(np.sort(calibrated[labels == k, k]).tolist()) for k in range(inner.shape[1]))
    return Calibration(temperature=temperature, threshold=threshold, inner=own)


def calibrate_folds(
    fitted: Sequence[FittedFold], rows: Sequence[NDArray[np.int64]], labels: NDArray[np.int64], sensitivity: float
) -> list[Calibration] | None:
    """Calibrate the model of each fold; None where one of them cannot be.

    Args:
        fitted: The models with their inner probabilities.
        rows: Training scans of each.
        labels: Class index of all scans.
        sensitivity: As in `calibrate`.
    """
    found = [calibrate(f.inner, labels[r], sensitivity) for f, r in zip(fitted, rows, strict=True)]
    return None if None in found else [c for c in found if c is not None]


def read_calibrations(run: Run) -> list[Calibration] | None:
    """Read what `calibrate_folds` found for each model of a run; None where nothing was."""
    if not (run.folder / "fold-0" / "calibration.json").exists():
        return None
    return [Calibration.from_dict(run.document(f"fold-{fold}/calibration.json")) for fold in range(run.folds)]


def decide(calibrations: Sequence[Calibration], answers: Sequence[Array]) -> Decisions:
    """Decide on scans that several models answered: calibrated probabilities, margins and p-values are averaged.

    A mean of p-values is only sure to be right within a factor of two (Vovk & Wang 2020), and a model's epoch was
    chosen on its inner scans: so alpha is what is wanted of the sets, and their coverage is measured.

    Args:
        calibrations: Of each model.
        answers: Its probabilities, `[n, classes]` each.
    """
    calibrated = [apply_temperature(_log(a), c.temperature) for c, a in zip(calibrations, answers, strict=True)]
    probabilities = np.mean(calibrated, axis=0)
    p_values = [conformal_p_values(c.inner, q) for c, q in zip(calibrations, calibrated, strict=True)]
    thresholds = [c.threshold for c in calibrations if c.threshold is not None]
    if thresholds:
        called = (np.mean([q[:, 1] - t for q, t in zip(calibrated, thresholds, strict=True)], axis=0) >= 0).astype(int)
    else:
        called = probabilities.argmax(axis=1)
    return Decisions(probabilities=probabilities, called=called, p_values=np.mean(p_values, axis=0))


def decide_held_out(result: CrossValidation, calibrations: Sequence[Calibration]) -> Decisions:
    """Decide on every scan with the models that held it out; rows of scans that none did are zero."""
    n, classes = result.by_repeat.shape[1:]
    found = Decisions(
        probabilities=np.zeros((n, classes)), called=np.zeros(n, np.int64), p_values=np.zeros((n, classes))
    )
    which = [tuple(int(f) for f in column if f >= 0) for column in result.folds.T]
    for group in set(which) - {()}:
        rows = np.flatnonzero([w == group for w in which])
        answers = [result.by_repeat[repeat_of(result.folds, fold), rows] for fold in group]
        own = decide([calibrations[fold] for fold in group], answers)
        for name, values in vars(own).items():
            getattr(found, name)[rows] = values
    return found


def decision_table(decisions: Decisions, scan_ids: Sequence[str], classes: Sequence[str], alpha: float) -> pd.DataFrame:
    """Give one row a scan: calibrated `q_<class>`, the class called, conformal `s_<class>` and the set they make."""
    table = pd.DataFrame({"scan_id": list(scan_ids)})
    for k, name in enumerate(classes):
        table[f"q_{name}"] = decisions.probabilities[:, k]
    table["called"] = np.array(classes)[decisions.called]
    for k, name in enumerate(classes):
        table[f"s_{name}"] = decisions.p_values[:, k]
    table["set"] = [" | ".join(np.array(classes)[p > alpha]) for p in decisions.p_values]
    return table


def judge_decisions(
    table: pd.DataFrame,
    labels: NDArray[np.int64],
    raw: Array,
    subjects: NDArray[Any],
    classes: Sequence[str],
    evaluation: EvaluationConfig,
) -> dict[str, Any]:
    """Say how good the decisions are on scans that had no part in them.

    Args:
        table: What `decision_table` gave, a row for each scan in the order of the other arguments.
        labels: True class index, `[n]`.
        raw: Probabilities before calibration, `[n, classes]`.
        subjects: Subject of each scan.
        classes: Their names.
        evaluation: Of the run.
    """
    calibrated = table[[f"q_{name}" for name in classes]].to_numpy(np.float64)
    called = pd.Index(classes).get_indexer(table["called"])
    inside = table[[f"s_{name}" for name in classes]].to_numpy(np.float64) > evaluation.alpha
    figures = bootstrap_intervals(
        labels, calibrated, subjects, decisions=called, replicates=evaluation.bootstrap, seed=evaluation.seed
    )
    shown = ("sensitivity", "specificity", "balanced_accuracy", "accuracy")
    return {
        "raw": _quality(labels, raw),
        "calibrated": _quality(labels, calibrated),
        "threshold": {
            "kind": f"sensitivity {evaluation.sensitivity:g}" if evaluation.sensitivity else "Youden",
            **{name: figures[name]._asdict() for name in shown},
        },
        "sets": {
            "alpha": evaluation.alpha,
            "size": float(inside.sum(axis=1).mean()),
            "single": float((inside.sum(axis=1) == 1).mean()),
            "empty": float((inside.sum(axis=1) == 0).mean()),
            "coverage": {
                name: _coverage(inside[labels == k, k], subjects[labels == k], evaluation)
                for k, name in enumerate(classes)
            },
        },
        "abstention": _abstention(labels, calibrated),
    }


def _quality(labels: NDArray[np.int64], probabilities: Array) -> dict[str, float]:
    return {
        "ece": expected_calibration_error(labels, probabilities),
        **brier_decomposition(labels, probabilities)._asdict(),
    }


def _coverage(held: NDArray[np.bool_], subjects: NDArray[Any], evaluation: EvaluationConfig) -> dict[str, float]:
    """Give the share of a class's scans that its sets hold, with an interval from bootstrap draws of subjects."""
    if len(held) == 0:
        return {"value": np.nan, "low": np.nan, "high": np.nan}
    one_class = np.zeros(len(held), np.int64)
    weights = subject_weights(one_class, subjects, replicates=evaluation.bootstrap, seed=evaluation.seed)
    drawn = weights @ held / weights.sum(axis=1)
    spread = float(drawn.std(ddof=1))
    return interval_around(float(held.mean()), spread, fewest=len(np.unique(subjects)))._asdict()


def _abstention(labels: NDArray[np.int64], probabilities: Array) -> list[dict[str, float]]:
    """Give the error rate when only the most confident share is answered, at the nearest share that ties allow."""
    curve = risk_coverage(labels, probabilities)
    steps = [int(np.abs(curve.coverage - share).argmin()) for share in ANSWERED]
    return [
        {"answered": float(curve.coverage[i]), "error": float(curve.risk[i]), "confidence": float(curve.confidence[i])}
        for i in dict.fromkeys(steps)
    ]


def _log(probabilities: Array) -> Array:
    return np.asarray(np.log(np.clip(probabilities, SMALLEST, 1)))
