"""A finished run becomes `metrics.json`: figures with intervals beside chance and the controls, and a verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dinoatten3d.config import EvaluationConfig
from dinoatten3d.evaluation.comparison import corrected_resampled_ttest, paired_bootstrap_difference
from dinoatten3d.evaluation.controls import baselines, permutation_p_value
from dinoatten3d.evaluation.decisions import judge_decisions
from dinoatten3d.evaluation.intervals import bootstrap_intervals
from dinoatten3d.evaluation.metrics import chance, confusion, per_class_scores, score
from dinoatten3d.evaluation.subgroups import subgroup_figures, subgroup_sentences
from dinoatten3d.evaluation.verdict import adjustment_sentences, attention_sentences, reach_verdict
from dinoatten3d.files import write_json
from dinoatten3d.learning.run import FORMAT_VERSION, Run
from dinoatten3d.toml import from_dict


def judge(run: Run) -> dict[str, Any]:
    """Compute every figure of a run and write `metrics.json` into it.

    Returns:
        What was written: per model the pooled figures with subject-level bootstrap intervals, the figures of each
        fold and class and the confusion matrix; chance; the AUROCs on shuffled labels; how far the attention is from
        uniform; and the verdict.
    """
    evaluation, classes = run.config["evaluation"], list(run.classes)
    predictions, answers, by_fold = run.table("predictions.csv"), all_answers(run), fold_scores(run)
    labels, subjects = class_index(predictions["label"], classes), predictions["subject"].to_numpy()
    models = _models(run, answers, labels, subjects, by_fold)
    model, best = models[0], max(models[1:], key=lambda m: m["pooled"]["auroc"]["value"])
    raw = answers[model["name"]]
    gain = paired_bootstrap_difference(
        labels, raw, answers[best["name"]], subjects, replicates=evaluation["bootstrap"], seed=evaluation["seed"]
    )
    attention, shuffled = _attention(run.table("attention.csv")), _shuffled(run)
    subgroups = subgroup_figures(
        labels,
        raw,
        class_index(predictions["predicted"], classes),
        run.table("cohort.csv").set_index("scan_id").loc[predictions["scan_id"]],
        classes=classes,
        target=run.config["cohort"]["target"],
        evaluation=evaluation,
    )
    verdict = reach_verdict(model, best, gain, shuffled, classes)._asdict()
    verdict["sentences"] += adjustment_sentences(run.recipe.adjust, evaluation.get("split", ""))
    verdict["sentences"] += subgroup_sentences(subgroups, model["pooled"])
    verdict["sentences"] += attention_sentences(attention) + _notes(run)
    metrics: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "classes": classes,
        "positive": classes[1] if len(classes) == 2 else None,
        "scans": len(predictions),
        "subjects": len(np.unique(subjects)),
        "class_counts": {name: int((labels == k).sum()) for k, name in enumerate(classes)},
        "folds": run.folds,
        "repeats": evaluation["repeats"],
        "bootstrap": {"replicates": evaluation["bootstrap"], "level": 0.95, "unit": "subject"},
        "chance": vars(chance(labels, len(classes))),
        "attention": attention,
        "shuffled": shuffled,
        "models": models,
        "gain": {"over": best["name"], **gain._asdict(), "resampled": _resampled_gain(run, by_fold, best["name"])},
        "subgroups": subgroups,
        "decisions": _decisions(run, labels, raw, subjects),
        "verdict": verdict,
    }
    write_json(run.folder / "metrics.json", metrics)
    return metrics


def all_answers(run: Run) -> dict[str, NDArray[np.float64]]:
    """Give the probabilities of the model (first) and each control, `[scans, classes]`, scans as in predictions.csv."""
    predictions = run.table("predictions.csv")
    tables = {run.config["run"]["recipe"]: predictions}
    tables |= dict(tuple(run.table("baselines.csv").groupby("model", sort=False)))
    columns = [f"p_{name}" for name in run.classes]
    return {
        name: table.set_index("scan_id").loc[predictions["scan_id"], columns].to_numpy(np.float64)
        for name, table in tables.items()
    }


def _models(
    run: Run,
    answers: Mapping[str, NDArray[np.float64]],
    labels: NDArray[np.int64],
    subjects: NDArray[Any],
    by_fold: Mapping[str, list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    descriptions = {b.name: b.description for b in baselines(run.config["cohort"]["target"])}
    return [
        {
            "name": name,
            "role": "baseline" if number else "model",
            "description": descriptions.get(name, "slice attention, out of fold"),
            "pooled": pooled_figures(labels, probabilities, subjects, run.config["evaluation"]),
            "folds": by_fold[name if number else ""],
            "classes": {c: vars(s) for c, s in zip(run.classes, per_class_scores(labels, probabilities), strict=True)},
            "confusion": confusion(labels, probabilities).tolist(),
        }
        for number, (name, probabilities) in enumerate(answers.items())
    ]


def _notes(run: Run) -> list[str]:
    """Say what the models of the folds have to say of themselves, and which recipe was chosen how often."""
    notes = Counter(note for fold_model in run.models() for note in fold_model.notes())
    if any((run.folder / f"fold-{fold}" / "choice.json").exists() for fold in range(run.folds)):
        notes.update(f"inner folds chose {run.choice(fold)[0]}" for fold in range(run.folds))
    return [f"In {n} of {run.folds} folds {note}." for note, n in sorted(notes.items())]


def class_index(names: pd.Series[str], classes: list[str]) -> NDArray[np.int64]:
    """Give the index of each class name."""
    return np.asarray(pd.Index(classes).get_indexer(names), dtype=np.int64)


def pooled_figures(
    labels: NDArray[np.int64], probabilities: NDArray[np.float64], subjects: NDArray[Any], evaluation: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Give every figure with its subject-level bootstrap interval."""
    intervals = bootstrap_intervals(
        labels, probabilities, subjects, replicates=evaluation["bootstrap"], seed=evaluation["seed"]
    )
    return {key: interval._asdict() for key, interval in intervals.items()}


def fold_scores(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Give the figures of each fold, for the model (under the empty name) and each baseline."""
    classes = list(run.classes)
    found: dict[str, list[dict[str, Any]]] = {}
    for fold in range(run.folds):
        own = run.table(f"fold-{fold}/predictions.csv").assign(model="")
        both = pd.concat([own, run.table(f"fold-{fold}/baselines.csv")])
        for name, rows in both.groupby("model", sort=False):
            labels = class_index(rows["label"], classes)
            found.setdefault(str(name), []).append(
                {"n": len(rows), **vars(score(labels, rows[[f"p_{c}" for c in classes]].to_numpy(np.float64)))}
            )
    return found


def _decisions(
    run: Run, labels: NDArray[np.int64], raw: NDArray[np.float64], subjects: NDArray[Any]
) -> dict[str, Any] | None:
    if not (run.folder / "decisions.csv").exists():
        return None
    evaluation = from_dict(EvaluationConfig, run.config["evaluation"], str(run.folder / "config.toml"))
    return judge_decisions(run.table("decisions.csv"), labels, raw, subjects, run.classes, evaluation)


def _shuffled(run: Run) -> dict[str, Any] | None:
    """Set the shuffles beside the figure of one repeat, which is what each of them is."""
    controls = run.document("controls.json")
    values = controls["shuffled_aurocs"]
    if not values:
        return None
    observed = controls["auroc_of_one_repeat"]
    return {
        "pipeline": run.evaluates is None,
        "runs": len(values),
        "mean": float(np.mean(values)),
        "low": float(min(values)),
        "high": float(max(values)),
        "aurocs": values,
        "observed": observed,
        "reached": sum(value >= observed for value in values),
        "p_value": permutation_p_value(observed, values),
    }


def _resampled_gain(run: Run, by_fold: dict[str, list[dict[str, Any]]], rival: str) -> dict[str, float] | None:
    """Compare fold by fold with the corrected resampled t-test, where every fold has an AUROC."""
    differences = np.array([a["auroc"] - b["auroc"] for a, b in zip(by_fold[""], by_fold[rival], strict=True)])
    if len(differences) < 2 or not np.isfinite(differences).all():
        return None
    held_out = float(np.mean([fold["n"] for fold in by_fold[""]]))
    scans = len(run.table("cohort.csv"))
    return corrected_resampled_ttest(differences, n_train=scans - held_out, n_test=held_out)._asdict()


def _attention(attention: pd.DataFrame) -> dict[str, float]:
    """Give the mean over scans of the weights' entropy (1: uniform) and of the largest weight in units of uniform."""
    entropy, largest = [], []
    for _, weights in attention.groupby("scan_id")["weight"]:
        w = weights.to_numpy()
        entropy.append(float(-(w[w > 0] * np.log(w[w > 0])).sum() / np.log(len(w))) if len(w) > 1 else 1.0)
        largest.append(float(w.max() * len(w)))
    return {"normalised_entropy": float(np.mean(entropy)), "max_over_uniform": float(np.mean(largest))}
