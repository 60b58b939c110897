"""Run folder -> `report.html`, one file that can be mailed, printed and read without a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from dinoatten3d.evaluation.metrics import METRICS
from dinoatten3d.files import write_text
from dinoatten3d.report import figures
from dinoatten3d.report.audit_page import audit_figure
from dinoatten3d.report.cases import CaseSlices, choose_cases, png_uri
from dinoatten3d.report.curve_figure import learning_curve_figure
from dinoatten3d.report.drawing import to_svg
from dinoatten3d.report.page import NOTHING, number, templates
from dinoatten3d.report.record import Record, probabilities_of, read_record
from dinoatten3d.report.slices_figure import attention_profile_figure

__all__ = ["CaseSlices", "choose_cases", "write_report"]

REPORT = "report.html"
HEAVIEST = 4
"""Slices named for a case that has no pictures."""


def write_report(run: Path, *, thumbnails: Mapping[str, CaseSlices] | None = None) -> Path:
    """Write the report of a finished run into its folder.

    Args:
        run: The run folder.
        thumbnails: Pictures by scan id for the cases that `choose_cases` names; without them the report lists
            the slices by position alone.

    Returns:
        Path of `report.html`. It holds everything it shows, and the same run gives the same bytes.

    Raises:
        RunError: The run folder is missing, unfinished, damaged or of another format.
    """
    record = read_record(run)
    page = (
        templates()
        .get_template("report.html.j2")
        .render(
            run=record.config["run"],
            config=record.config,
            metrics=record.metrics,
            classes=record.classes,
            columns=METRICS,
            model=_model(record),
            baselines=_baselines(record),
            best=_best_baseline(record),
            cohort=_cohort_rows(record.cohort, record.classes),
            figures=_draw(record),
            cases=_case_rows(record, thumbnails or {}),
            learning_curve=record.learning_curve,
            audit=_audit(record),
            audited=record.audit,
            audit_figure=audit_figure(record.audit) if record.audit else "",
            environment=record.environment,
        )
    )
    target = record.folder / REPORT
    write_text(target, page)
    return target


def _model(record: Record) -> dict[str, Any]:
    return next(model for model in record.metrics["models"] if model["role"] == "model")


def _baselines(record: Record) -> list[dict[str, Any]]:
    return [model for model in record.metrics["models"] if model["role"] == "baseline"]


def _best_baseline(record: Record) -> dict[str, Any] | None:
    """The baseline of highest AUROC, which the model has to beat."""
    known = [model for model in _baselines(record) if _auroc(model) is not None]
    return max(known, key=lambda model: float(_auroc(model) or 0), default=None)


def _auroc(model: Mapping[str, Any]) -> float | None:
    return (model["pooled"].get("auroc") or {}).get("value")


def _cohort_rows(cohort: pd.DataFrame, classes: list[str]) -> list[dict[str, Any]]:
    """Describe each class and all of them; age and sex count each subject once, brain volume each scan."""
    groups = [(name, cohort[cohort["label"] == name]) for name in classes]
    rows = []
    for name, scans in [*groups, ("all", cohort[cohort["label"].isin(classes)])]:
        subjects = scans.drop_duplicates("subject")
        rows.append(
            {
                "name": name,
                "scans": len(scans),
                "subjects": len(subjects),
                "age": _mean_sd(subjects, "age"),
                "sex": _counts(subjects, "sex"),
                "brain": _mean_sd(scans, "brain_ml"),
                "site": _counts(scans, "site"),
            }
        )
    return rows


def _mean_sd(table: pd.DataFrame, column: str) -> str:
    known = table[column].dropna() if column in table else pd.Series(dtype=float)
    if known.empty:
        return NOTHING
    text = f"{known.mean():.0f} ± {known.std(ddof=1):.0f}" if len(known) > 1 else f"{known.mean():.0f}"
    return text if len(known) == len(table) else f"{text} (of {len(known)})"


def _counts(table: pd.DataFrame, column: str, most: int = 5) -> str:
    """Count the values of a column, `12 f, 10 m`; the rarest are summed up."""
    values = [value or "unknown" for value in table[column]] if column in table else []
    if set(values) <= {"unknown"}:
        return NOTHING
    counts = pd.Series(values).value_counts().sort_index().sort_values(ascending=False, kind="stable")
    shown = [f"{count} {value}" for value, count in counts[:most].items()]
    left = len(counts) - most
    return ", ".join([*shown, f"{counts[most:].sum()} in {left} more"] if left > 0 else shown)


def _case_rows(record: Record, thumbnails: Mapping[str, CaseSlices]) -> list[dict[str, Any]]:
    """The chosen cases with their heaviest slices, as pictures where there are any."""
    attention = dict(list(record.attention.groupby("scan_id")))
    rows = []
    for case in choose_cases(record.predictions, record.classes).to_dict("records"):
        weights = attention.get(case["scan_id"], record.attention[:0])
        pictures = thumbnails.get(case["scan_id"])
        if pictures is None:
            heavy = weights.nlargest(HEAVIEST, "weight")
            planes, place, weight, uris = heavy["plane"], heavy["position_mm"], heavy["weight"], [""] * len(heavy)
        else:
            planes, place, weight = pictures.planes, pictures.position_mm, pictures.weights
            uris = [png_uri(picture) for picture in pictures.pixels]
        slices = [
            {"plane": plane, "mm": mm, "percent": 100 * share, "times": share * len(weights), "uri": uri}
            for plane, mm, share, uri in zip(planes, place, weight, uris, strict=True)
        ]
        rows.append({str(key): value for key, value in case.items()} | {"slices": slices})
    return rows


def _audit(record: Record) -> dict[str, Any]:
    """What the folder itself proves about leakage: checked here, not copied from a promise."""
    folds_of_subject = record.splits.groupby(["repeat", "subject"])["fold"].nunique()
    predicted = record.predictions["scan_id"]
    sites = set(record.cohort["site"]) - {""} if "site" in record.cohort else set()
    held_out = set(record.splits.loc[record.splits["fold"] >= 0, "scan_id"])
    labelled = record.cohort[record.cohort["label"].isin(record.classes) & record.cohort["scan_id"].isin(held_out)]
    return {
        "leaking": int((folds_of_subject > 1).sum()),
        "twice": int(predicted.duplicated().sum()),
        "unpredicted": int((~labelled["scan_id"].isin(predicted)).sum()),
        "sites": len(sites),
        "smallest": min(record.metrics["class_counts"].values()),
    }


def _draw(record: Record) -> dict[str, Markup]:
    """All figures of the report by name; `loss` and `learning_curve` are absent where they were not recorded."""
    drawn = _prediction_figures(record) | _comparison_figures(record)
    drawn["attention"] = (
        attention_profile_figure(record.attention, record.classes),
        "Mean slice weight of each class against position in mm, with its standard deviation.",
    )
    if record.history[["train_loss", "validation_loss"]].notna().any(axis=None):
        epochs = record.history["epoch"].max()
        caption = f"Training and inner validation loss of every fold against epoch, up to epoch {epochs:.0f}."
        drawn["loss"] = (figures.loss_figure(record.history), caption)
    if record.learning_curve:
        curves = record.learning_curve["curves"]
        told = " ".join(curve["sentence"] for curve in curves)
        drawn["learning_curve"] = (learning_curve_figure(curves), f"AUROC against training scans. {told}")
    return {name: to_svg(figure, name, text) for name, (figure, text) in drawn.items()}


def _prediction_figures(record: Record) -> dict[str, tuple[Figure, str]]:
    """Figures of the model's own predictions, each with what it shows in words."""
    classes = record.classes
    labels, probabilities = probabilities_of(record.predictions, classes)
    rankings = _rankings(record, labels, probabilities)
    shown = ", ".join(ranking.name for ranking in rankings)
    counts = _model(record)["confusion"]
    return {
        "roc": (figures.roc_figure(rankings), f"ROC curves of {shown}."),
        "precision_recall": (figures.precision_recall_figure(rankings), f"Precision-recall curves of {shown}."),
        "calibration": (
            figures.calibration_figure(labels, probabilities, classes),
            "Share of true positives against predicted probability, and how many scans each bin holds.",
        ),
        "confusion": (
            figures.confusion_figure(np.array(counts), classes),
            f"Confusion matrix, true class by predicted class ({', '.join(classes)}): {counts}.",
        ),
    }


def _comparison_figures(record: Record) -> dict[str, tuple[Figure, str]]:
    """Figures of the model beside its baselines, each with what it shows in words."""
    models = [_model(record), *_baselines(record)]
    chance = record.metrics["chance"].get("auroc")
    pooled = {model["name"]: model["pooled"].get("auroc") or {} for model in models}
    shuffled = record.metrics.get("shuffled")
    if shuffled:
        pooled["shuffled labels"] = {"value": shuffled["mean"], "low": shuffled["low"], "high": shuffled["high"]}
    by_fold = {model["name"]: [fold.get("auroc") for fold in model["folds"]] for model in models}
    named = ", ".join(f"{name} {number(auroc.get('value'))}" for name, auroc in pooled.items())
    of_model = ", ".join(number(auroc) for auroc in by_fold[models[0]["name"]])
    return {
        "forest": (
            figures.forest_figure(pooled, chance),
            f"Pooled AUROC with its interval: {named}; chance {number(chance)}.",
        ),
        "folds": (figures.folds_figure(by_fold, chance), f"AUROC of each fold. Of the model: {of_model}."),
    }


def _rankings(record: Record, labels: np.ndarray, probabilities: np.ndarray) -> list[figures.Ranking]:
    """The model and its best baseline; of more than two classes, each against the rest."""
    classes = record.classes
    if len(classes) > 2:
        return [figures.Ranking(name, labels == k, probabilities[:, k]) for k, name in enumerate(classes)]
    rankings = [figures.Ranking(_model(record)["name"], labels == 1, probabilities[:, 1])]
    best = _best_baseline(record)
    name = best["name"] if best else ""
    rows = record.baselines[record.baselines["model"] == name]
    if len(rows):
        baseline_labels, baseline = probabilities_of(rows, classes)
        rankings.append(figures.Ranking(name, baseline_labels == 1, baseline[:, 1]))
    return rankings
