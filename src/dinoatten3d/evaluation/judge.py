"""A finished run becomes `metrics.json`: figures with intervals beside chance and the baselines, and a verdict."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dinoatten3d.evaluation.comparison import paired_bootstrap_difference
from dinoatten3d.evaluation.controls import BASELINES
from dinoatten3d.evaluation.intervals import bootstrap_intervals
from dinoatten3d.evaluation.metrics import chance, confusion, score
from dinoatten3d.files import write_json
from dinoatten3d.learning.run import Run

FORMAT_VERSION = 1


def judge(run: Run) -> dict[str, Any]:
    """Compute every figure of a run and write `metrics.json` into it.

    Returns:
        What was written: per model the pooled figures with subject-level bootstrap intervals, the figures of each
        fold and the confusion matrix; chance; how far the attention is from uniform; and the verdict.
    """
    evaluation = run.config["evaluation"]
    predictions = run.table("predictions.csv")
    classes = list(run.classes)
    labels = pd.Categorical(predictions["label"], categories=classes).codes.astype(np.int64)
    answers = {run.config["run"]["recipe"]: predictions}
    answers |= dict(tuple(run.table("baselines.csv").groupby("model", sort=False)))
    subjects, folds = predictions["subject"].to_numpy(), predictions["fold"].to_numpy()
    models = []
    for name, table in answers.items():
        aligned = table.set_index("scan_id").loc[predictions["scan_id"]]
        probabilities = aligned[[f"p_{c}" for c in classes]].to_numpy(dtype=np.float64)
        models.append(_figures(name, labels, probabilities, subjects, folds, evaluation))
    model, baselines = models[0], models[1:]
    metrics: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "classes": classes,
        "positive": classes[1] if len(classes) == 2 else None,
        "scans": len(predictions),
        "subjects": len(np.unique(subjects)),
        "class_counts": {name: int((labels == k).sum()) for k, name in enumerate(classes)},
        "folds": run.folds,
        "bootstrap": {"replicates": evaluation["bootstrap"], "level": 0.95, "unit": "subject"},
        "chance": vars(chance(labels, len(classes))),
        "attention": _attention(run.table("attention.csv")),
        "models": [{k: v for k, v in m.items() if k != "probabilities"} for m in models],
        "verdict": _verdict(model, baselines, labels, subjects, classes, evaluation),
    }
    metrics["verdict"]["sentences"] += _attention_sentences(metrics["attention"])
    notes = Counter(note for fold_model in run.models() for note in fold_model.notes())
    metrics["verdict"]["sentences"] += [f"In {n} of {run.folds} folds {note}." for note, n in sorted(notes.items())]
    write_json(run.folder / "metrics.json", metrics)
    return metrics


def _figures(
    name: str,
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    subjects: NDArray[Any],
    folds: NDArray[np.int64],
    evaluation: dict[str, Any],
) -> dict[str, Any]:
    intervals = bootstrap_intervals(
        labels, probabilities, subjects, replicates=evaluation["bootstrap"], seed=evaluation["seed"]
    )
    return {
        "name": name,
        "role": "baseline" if name in BASELINES else "model",
        "description": BASELINES[name][0] if name in BASELINES else "slice attention, out of fold",
        "pooled": {key: interval._asdict() for key, interval in intervals.items()},
        "folds": [vars(score(labels[folds == k], probabilities[folds == k])) for k in np.unique(folds)],
        "confusion": confusion(labels, probabilities).tolist(),
        "probabilities": probabilities,
    }


def _verdict(
    model: dict[str, Any],
    baselines: list[dict[str, Any]],
    labels: NDArray[np.int64],
    subjects: NDArray[Any],
    classes: list[str],
    evaluation: dict[str, Any],
) -> dict[str, Any]:
    """Say whether the model tells the classes apart, and whether something simpler does as well."""
    auroc = model["pooled"]["auroc"]
    figure = f"AUROC {auroc['value']:.2f} (95 % interval {auroc['low']:.2f} to {auroc['high']:.2f})"
    told = f"{', '.join(classes[:-1])} and {classes[-1]}"
    best = max(baselines, key=lambda m: m["pooled"]["auroc"]["value"])
    rival = f"{best['name']} ({best['description']}) reaches {best['pooled']['auroc']['value']:.2f}"
    if not auroc["low"] > 0.5:
        sentences = [f"{figure} on scans that the model had not seen; 0.50 is chance.", f"For comparison, {rival}."]
        return {"level": "no", "headline": f"No evidence that these scans tell {told} apart", "sentences": sentences}
    gain = paired_bootstrap_difference(
        labels,
        model["probabilities"],
        best["probabilities"],
        subjects,
        replicates=evaluation["bootstrap"],
        seed=evaluation["seed"],
    )
    difference = f"difference {gain.value:+.2f}, {gain.low:+.2f} to {gain.high:+.2f}"
    sentences = [f"{figure} on scans that the model had not seen; 0.50 is chance."]
    if gain.low > 0:
        sentences.append(f"The best of the simple baselines, {rival}; the model does better ({difference}).")
        return {"level": "yes", "headline": f"The scans tell {told} apart", "sentences": sentences}
    sentences.append(f"{rival[0].upper()}{rival[1:]}; the model is not shown to do better ({difference}).")
    if best["name"] == "head size":
        sentences.append("Brain volume alone may be all that the model sees.")
    headline = f"The scans tell {told} apart, but something simpler does as well"
    return {"level": "weak", "headline": headline, "sentences": sentences}


def _attention(attention: pd.DataFrame) -> dict[str, float]:
    """Give the mean over scans of the weights' entropy (1: uniform) and of the largest weight in units of uniform."""
    entropy, largest = [], []
    for _, weights in attention.groupby("scan_id")["weight"]:
        w = weights.to_numpy()
        entropy.append(float(-(w[w > 0] * np.log(w[w > 0])).sum() / np.log(len(w))) if len(w) > 1 else 1.0)
        largest.append(float(w.max() * len(w)))
    return {"normalised_entropy": float(np.mean(entropy)), "max_over_uniform": float(np.mean(largest))}


def _attention_sentences(attention: dict[str, float]) -> list[str]:
    if attention["normalised_entropy"] < 0.98:
        return []
    return [
        "The slice weights hardly differ from uniform "
        f"(normalised entropy {attention['normalised_entropy']:.3f}): read nothing into which slice weighs most."
    ]
