"""Runs side by side as `comparison.html`, one file that can be mailed, with its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from dinoatten3d import __version__
from dinoatten3d.errors import RunError
from dinoatten3d.evaluation.compare import Comparison, compare_runs, p_text
from dinoatten3d.evaluation.metrics import METRICS
from dinoatten3d.evaluation.verdict import P_VALUE
from dinoatten3d.files import whole_folder, write_json, write_text
from dinoatten3d.learning.run import open_run
from dinoatten3d.report.drawing import GREY, PALETTE, STYLE, new_figure, shorten, to_svg
from dinoatten3d.report.page import number, templates

COLUMNS = ("auroc", "average_precision", "balanced_accuracy", "sensitivity", "specificity", "f1_macro", "brier")
"""Figures of the page's table."""


def compare_folders(folders: Sequence[Path], *, out: Path | None, with_baselines: bool) -> list[str]:
    """Compare runs; give the table and what it means as lines, and leave a page and a JSON file in a new folder `out`.

    Raises:
        RunError: `out` exists, or the runs cannot be compared.
    """
    if out is not None and out.exists():
        raise RunError(f"{out} exists; choose another --out or remove it")
    comparison = compare_runs([open_run(folder) for folder in folders], with_baselines=with_baselines)
    lines = comparison_lines(comparison)
    if out is None:
        return lines
    with whole_folder(out) as folder:
        write_json(folder / "comparison.json", comparison.to_dict())
        write_text(folder / "comparison.html", comparison_page(comparison))
    return [*lines, f"page  {out / 'comparison.html'}"]


def comparison_page(comparison: Comparison) -> str:
    """Give the page: everything it shows is inside, and the same comparison gives the same bytes."""
    environment = templates()
    environment.filters["p"] = lambda value: p_text(value).removeprefix("p ").removeprefix("= ")
    differences = ", ".join(f"{p.a} minus {p.b} {number(p.auroc['value'])}" for p in comparison.pairs)
    aurocs = ", ".join(f"{row.name} {number(row.figures['auroc']['value'])}" for row in comparison.rows)
    return environment.get_template("comparison.html.j2").render(
        comparison=comparison,
        columns={key: METRICS[key] for key in COLUMNS},
        version=__version__,
        figures={
            "aurocs": to_svg(auroc_figure(comparison), "aurocs", f"AUROC with its interval: {aurocs}; chance 0.50."),
            "differences": to_svg(
                difference_figure(comparison), "differences", f"Difference in AUROC with its interval: {differences}."
            ),
        },
    )


def comparison_lines(comparison: Comparison) -> list[str]:
    """Give the table, the notes and a sentence for each pair, as lines of text."""
    shown = ("auroc", "balanced_accuracy", "brier")
    width = max(len(row.name) for row in comparison.rows)
    lines = [f"{'':<{width}}  {'AUROC (95 %)':<18}  {'balanced accuracy':>17}  {'Brier':>5}  recipe, folds, weights"]
    for row in comparison.rows:
        auroc, accuracy, brier = (row.figures[key] for key in shown)
        spread = f"{auroc['value']:.2f} ({auroc['low']:.2f}-{auroc['high']:.2f})"
        origin = f"{row.description}; {row.partition}; {row.weights}" if row.role == "model" else "baseline"
        lines.append(f"{row.name:<{width}}  {spread:<18}  {accuracy['value']:>17.2f}  {brier['value']:>5.2f}  {origin}")
    counts = ", ".join(f"{count} {name}" for name, count in comparison.class_counts.items())
    lines += [f"{comparison.scans} scans of {comparison.subjects} subjects ({counts}); {comparison.auroc_test}", ""]
    return [*lines, *(pair.sentence for pair in comparison.pairs), "", *comparison.notes]


@mpl.rc_context(STYLE)
def auroc_figure(comparison: Comparison) -> Figure:
    """AUROC of each model with its interval, one row a model; models in colour, baselines grey."""
    figure = new_figure(4.4, 1.0 + 0.42 * len(comparison.rows))
    axes = figure.subplots()
    for place, row in enumerate(comparison.rows):
        auroc = row.figures["auroc"]
        colour = PALETTE[0] if row.role == "model" else GREY
        axes.plot([auroc["low"], auroc["high"]], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(auroc["value"], place, "s", color=colour, markersize=6)
    axes.axvline(0.5, color=GREY, linewidth=1, linestyle=":")
    axes.text(0.5, -0.55, " chance", color=GREY, fontsize=7.5, va="top")
    axes.set_yticks(range(len(comparison.rows)), [shorten(row.name) for row in comparison.rows])
    axes.set(ylim=(len(comparison.rows) - 0.4, -0.6), xlim=(-0.02, 1.02), xlabel="AUROC; line: 95 % interval")
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    return figure


@mpl.rc_context(STYLE)
def difference_figure(comparison: Comparison) -> Figure:
    """Difference in AUROC of each pair with its interval; filled where it is shown after Holm's correction."""
    figure = new_figure(4.4, 1.0 + 0.42 * len(comparison.pairs))
    axes = figure.subplots()
    for place, pair in enumerate(comparison.pairs):
        shown = pair.auroc["p_holm"] <= P_VALUE
        colour = PALETTE[1] if shown else GREY
        axes.plot([pair.auroc["low"], pair.auroc["high"]], [place, place], color=colour, linewidth=2)
        axes.plot(pair.auroc["value"], place, "o", color=colour, markersize=6, mfc=colour if shown else "white")
    axes.axvline(0, color=GREY, linewidth=1, linestyle=":")
    names = [f"{shorten(pair.a, 18)} − {shorten(pair.b, 18)}" for pair in comparison.pairs]
    axes.set_yticks(range(len(names)), names)
    widest = max(_reach(pair.auroc) for pair in comparison.pairs)
    axes.set(ylim=(len(names) - 0.4, -0.6), xlim=(-widest, widest), xlabel="Difference in AUROC; line: 95 % interval")
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    return figure


def _reach(difference: Mapping[str, float]) -> float:
    ends = np.abs([difference["low"], difference["high"]])
    return float(max(0.05, 1.08 * np.max(ends)))
