"""The learning curve as a figure: AUROC against the number of training scans, and as far as it is followed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from dinoatten3d.report.drawing import GREY, STYLE, legend_below, look, new_figure, shorten


@mpl.rc_context(STYLE)
def learning_curve_figure(curves: Sequence[Mapping[str, Any]]) -> Figure:
    """AUROC against training scans, with intervals, the fitted law and its band; beyond the data in open marks.

    Args:
        curves: As in `learning_curve.json`: name, points, band and ahead.
    """
    figure = new_figure(9.0, 4.2)
    axes = figure.subplots()
    for index, curve in enumerate(curves):
        style = look(index)
        band = {key: [place[key] for place in curve["band"]] for key in ("scans", "value", "low", "high")}
        axes.fill_between(band["scans"], band["low"], band["high"], color=style["color"], alpha=0.13, linewidth=0)
        axes.plot(band["scans"], band["value"], linewidth=1.2, label=f"{shorten(curve['name'])}, fitted", **style)
        for places, face in ((curve["points"], style["color"]), (curve["ahead"], "white")):
            for place in places:
                x = place["scans"] * (1 + 0.012 * index)  # so that bars of two curves do not hide each other
                axes.plot([x, x], [place["low"], place["high"]], color=style["color"], linewidth=1.2)
                axes.plot(x, place["value"], "os"[index % 2], color=style["color"], mfc=face, markersize=5.5)
    sizes = sorted({round(p["scans"]) for curve in curves for p in (*curve["points"], *curve["ahead"])})
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle=":", label="chance")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(size) for size in sizes])
    axes.set(xlabel="Training scans (logarithmic)", ylabel="AUROC", ylim=(min(0.4, *_lowest(curves)), 1.02))
    legend_below(figure, axes, columns=3)
    return figure


def _lowest(curves: Sequence[Mapping[str, Any]]) -> list[float]:
    return [point["low"] - 0.02 for curve in curves for point in curve["points"]]
