"""How well, how sure, how calibrated: the figures about predictions and training.

Each function makes one matplotlib figure from arrays and reads or writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from dinoatten3d.evaluation.metrics import shown_classes
from dinoatten3d.report.drawing import (
    GREY,
    INK,
    PALETTE,
    STYLE,
    legend_below,
    look,
    new_figure,
    shorten,
)

HALF = 4.4
"""Width in inches of a figure that shares the page with another."""
MOST_POINTS = 200
"""A training curve is drawn with at most about this many points."""
NORMAL_95 = 1.96


class Ranking(NamedTuple):
    """A score that should put the positives first, under the name that the legend shows."""

    name: str
    positive: np.ndarray
    score: np.ndarray


@mpl.rc_context(STYLE)
def roc_figure(rankings: Sequence[Ranking]) -> Figure:
    """ROC curve of each ranking, with its area in the legend and the diagonal of chance."""
    figure, axes = _square("False positive rate", "True positive rate", len(rankings) + 1)
    for index, (name, positive, score) in enumerate(rankings):
        if _is_defined(positive):
            false_rate, true_rate, _ = roc_curve(positive, score)
            area = roc_auc_score(positive, score)
            axes.plot(false_rate, true_rate, label=f"{shorten(name, 34)} · {area:.2f}", **look(index))
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="chance · 0.50")
    legend_below(figure, axes)
    return figure


@mpl.rc_context(STYLE)
def precision_recall_figure(rankings: Sequence[Ranking]) -> Figure:
    """Precision against recall of each ranking; a dotted line at each prevalence, which is chance."""
    figure, axes = _square("Recall (sensitivity)", "Precision", len(rankings) + 1)
    for index, (name, positive, score) in enumerate(rankings):
        if _is_defined(positive):
            precision, recall, _ = precision_recall_curve(positive, score)
            area = average_precision_score(positive, score)
            label = f"{shorten(name, 34)} · {area:.2f}"
            axes.step(recall, precision, where="post", label=label, **look(index))
    levels = sorted({float(np.mean(ranking.positive)) for ranking in rankings})
    for level in levels:
        axes.axhline(level, color=GREY, linewidth=1, linestyle=":")
    axes.plot([], [], color=GREY, linewidth=1, linestyle=":", label="chance (share of positives)")
    legend_below(figure, axes)
    return figure


@mpl.rc_context(STYLE)
def calibration_figure(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> Figure:
    """Share of true positives against predicted probability, in bins, and how many scans each bin holds.

    Args:
        labels: True class of each scan, 0..K-1, `[n]`.
        probabilities: Predicted probability of each class, `[n, K]`.
        classes: Names; of two, only the second is drawn, with Wilson intervals.
    """
    shown = shown_classes(len(classes))
    figure = new_figure(HALF, 3.5 + 0.2 * (len(shown) + 1))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    edges = np.linspace(0, 1, 6 if len(labels) < 200 else 11)
    upper.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="perfect calibration")
    for index, k in enumerate(shown):
        score, positive = probabilities[:, k], labels == k
        place = np.clip(np.digitize(score, edges) - 1, 0, len(edges) - 2)
        counts = np.bincount(place, minlength=len(edges) - 1)
        full = counts > 0
        mean = np.bincount(place, score, len(counts))[full] / counts[full]
        share = np.bincount(place, positive, len(counts))[full] / counts[full]
        if len(shown) == 1:
            low, high = _wilson(share, counts[full])
            upper.vlines(mean, low, high, color=look(index)["color"], linewidth=1)
        upper.plot(mean, share, marker="o", markersize=4, label=shorten(classes[k], 34), **look(index))
        lower.stairs(counts, edges, fill=len(shown) == 1, alpha=0.8 if len(shown) == 1 else 1, **look(index))
        if len(shown) == 1:
            _write_counts(lower, edges, counts)
    upper.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="Share of positives")
    lower.set(xlabel="Predicted probability", ylabel="Scans")
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    lower.margins(y=0.28)
    lower.set_ylim(bottom=0)
    legend_below(figure, upper)
    return figure


@mpl.rc_context(STYLE)
def confusion_figure(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Scans by true (rows) and predicted class (columns), shaded by the share of the row."""
    counts = np.asarray(counts)
    size = len(classes)
    names = [shorten(name, 14) for name in classes]
    figure = new_figure(HALF, min(HALF, 2.6 + 0.4 * size))
    axes = figure.subplots()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1.15)
    for row, column in np.ndindex(size, size):
        colour = "white" if share[row, column] > 0.6 else INK
        number, percent = f"{counts[row, column]}", f"{100 * share[row, column]:.0f} %"
        axes.text(column, row, number, va="bottom", ha="center", color=colour, fontsize=12 - 0.5 * size)
        axes.text(column, row, percent, va="top", ha="center", color=colour, fontsize=max(5, 8.5 - 0.4 * size))
    axes.set_xticks(range(size), names, rotation=30 if size > 3 else 0, ha="right" if size > 3 else "center")
    axes.set_yticks(range(size), names)
    axes.set(xlabel="Predicted class", ylabel="True class")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


@mpl.rc_context(STYLE)
def folds_figure(values: Mapping[str, Sequence[float | None]], chance: float | None) -> Figure:
    """AUROC of every fold as a dot, one row a model, with the mean over folds as a bar."""
    figure, axes = _rows(list(values), chance)
    for row, (_, found) in enumerate(values.items()):
        known = [value for value in map(_float, found) if np.isfinite(value)]
        colour = PALETTE[0] if row == 0 else GREY
        axes.plot(known, [row] * len(known), "o", color=colour, alpha=0.55, markersize=6, mew=0)
        if known:
            axes.plot(np.mean(known), row, "|", color=colour, markersize=16, markeredgewidth=2.2)
    axes.set_xlabel("AUROC of each fold; bar: mean of the folds")
    return figure


@mpl.rc_context(STYLE)
def forest_figure(estimates: Mapping[str, Mapping[str, float | None]], chance: float | None) -> Figure:
    """Pooled AUROC with its interval, one row a model.

    Args:
        estimates: Model name -> `value`, `low`, `high`; the first is the model itself.
        chance: AUROC of a guess, drawn as a line.
    """
    figure, axes = _rows(list(estimates), chance)
    for row, estimate in enumerate(estimates.values()):
        colour = PALETTE[0] if row == 0 else GREY
        value, low, high = (_float(estimate.get(name)) for name in ("value", "low", "high"))
        axes.plot([low, high], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(value, row, "s", color=colour, markersize=6)
    axes.set_xlabel("AUROC, all folds pooled; line: interval")
    return figure


@mpl.rc_context(STYLE)
def loss_figure(history: pd.DataFrame) -> Figure:
    """Training and validation loss against epoch, one panel a fold and one line a member.

    Args:
        history: Columns fold, member, epoch, train_loss, validation_loss, chosen; losses may be NaN.
    """
    folds = list(dict.fromkeys(history["fold"]))
    rows = -(-len(folds) // 5)
    columns = -(-len(folds) // rows)
    figure = new_figure(9.0, 0.5 + 2.1 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, fold in zip(panels, folds, strict=False):
        inside = history[history["fold"] == fold]
        for _, member in inside.groupby("member", sort=True):
            thin = member.iloc[:: max(1, len(member) // MOST_POINTS)]
            panel.plot(thin["epoch"], thin["train_loss"], color=GREY, linewidth=0.8, alpha=0.8)
            panel.plot(thin["epoch"], thin["validation_loss"], color=PALETTE[0], linewidth=1)
        chosen = inside[inside["chosen"]]
        panel.plot(chosen["epoch"], chosen["validation_loss"], "o", color=PALETTE[1], markersize=4)
        panel.set_title(f"fold {fold}")
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for panel in panels[len(folds) :]:
        panel.set_visible(False)
    handles = [
        Line2D([], [], color=GREY),
        Line2D([], [], color=PALETTE[0]),
        Line2D([], [], color=PALETTE[1], marker="o", markersize=4, linestyle=""),
    ]
    names = ["training", "inner validation", "chosen checkpoint"]
    figure.legend(handles, names, loc="outside upper left", ncols=3)
    figure.supxlabel("Epoch", fontsize=9)
    figure.supylabel("Loss", fontsize=9)
    return figure


def _square(x_label: str, y_label: str, lines: int) -> tuple[Figure, Axes]:
    """Axes from 0 to 1 in both directions, with room under them for a legend of `lines`."""
    figure = new_figure(HALF, 3.3 + 0.2 * lines)
    axes = figure.subplots()
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=x_label, ylabel=y_label)
    return figure, axes


def _rows(names: Sequence[str], chance: float | None) -> tuple[Figure, Axes]:
    """Axes with one named row a model, the first on top, and the line of chance."""
    figure = new_figure(HALF, 1.0 + 0.42 * len(names))
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), [shorten(name) for name in names])
    axes.set(ylim=(len(names) - 0.4, -0.6), xlim=(-0.02, 1.02))
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    if chance is not None:
        axes.axvline(chance, color=GREY, linewidth=1, linestyle=":")
        axes.text(chance, -0.55, " chance", color=GREY, fontsize=7.5, va="top")
    return figure, axes


def _write_counts(axes: Axes, edges: np.ndarray, counts: np.ndarray) -> None:
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        axes.text((left + right) / 2, count, f"{count}", ha="center", va="bottom", fontsize=7.5)


def _wilson(share: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give Wilson's 95 % interval of a share, which stays within 0 and 1 in small bins."""
    z2 = NORMAL_95**2
    middle = (share + z2 / (2 * counts)) / (1 + z2 / counts)
    half = NORMAL_95 * np.sqrt(share * (1 - share) / counts + z2 / (4 * counts**2)) / (1 + z2 / counts)
    return middle - half, middle + half


def _is_defined(positive: np.ndarray) -> bool:
    return bool(positive.any() and not positive.all())


def _float(value: float | None) -> float:
    return float("nan") if value is None else float(value)
