"""Where the attention lies: over mm for each class of a run, and over the slices of one scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dinoatten3d.config import Plane
from dinoatten3d.data.slices import stacks
from dinoatten3d.errors import ScanError
from dinoatten3d.report.drawing import GREY, PALETTE, STYLE, legend_below, look, new_figure, save, shorten

DIRECTION = {"axial": "inferior to superior", "coronal": "posterior to anterior", "sagittal": "left to right"}
"""The way in which RAS+ millimetres grow along a plane's normal."""
GRID_POINTS = 160


@mpl.rc_context(STYLE)
def attention_profile_figure(attention: pd.DataFrame, classes: Sequence[str]) -> Figure:
    """Mean slice weight of each class against position, with the spread of its scans; one panel a plane.

    Weights are shown in units of uniform attention, so that bags of different length compare. A class is
    drawn where at least half of its scans have slices.

    Args:
        attention: Columns scan_id, label, plane, position_mm, weight; the weights of a scan sum to 1.
        classes: Names of the classes, in order.
    """
    planes = list(dict.fromkeys(attention["plane"]))
    slices = attention.groupby("scan_id")["weight"].transform("size")
    attention = attention.assign(relative=attention["weight"] * slices)  # of all planes together
    figure = new_figure(9.0, 0.8 + 2.7 * len(planes))
    panels = figure.subplots(len(planes), 1, squeeze=False).ravel()
    for panel, plane in zip(panels, planes, strict=True):
        inside = attention[attention["plane"] == plane]
        grid = np.linspace(inside["position_mm"].min(), inside["position_mm"].max(), GRID_POINTS)
        for index, name in enumerate(classes):
            profiles = _profiles(inside[inside["label"] == name], grid)
            shown = np.isfinite(profiles).mean(axis=0) >= 0.5 if len(profiles) else np.zeros(len(grid), bool)
            if not shown.any():
                continue
            mean, spread = np.nanmean(profiles[:, shown], axis=0), np.nanstd(profiles[:, shown], axis=0)
            label = f"{shorten(name, 24)} (n = {len(profiles)})"
            panel.plot(grid[shown], mean, label=label, **look(index))
            band = {"color": look(index)["color"], "alpha": 0.15, "linewidth": 0}
            panel.fill_between(grid[shown], np.maximum(mean - spread, 0), mean + spread, **band)
        panel.axhline(1, color=GREY, linewidth=1, linestyle="--", label="uniform attention")
        panel.set_xlabel(f"{plane} position, mm ({DIRECTION.get(plane, 'RAS+')})")
        panel.set_ylabel("Slice weight × slices")
        panel.set_ylim(bottom=0)
    legend_below(figure, panels[0], columns=3)
    return figure


@mpl.rc_context(STYLE)
def slice_weights_figure(
    pixels: NDArray[np.uint8],
    position_mm: NDArray[np.floating],
    weights: NDArray[np.floating],
    planes: Sequence[Plane],
    *,
    title: str,
    count: int = 8,
) -> bytes:
    """Draw the attention over one scan: weight against position in each plane, and below it the heaviest slices.

    Args:
        pixels: 8-bit grey slices, `[slices, rows, columns]`.
        position_mm: Position of each slice along its plane's normal, RAS+ mm, `[slices]`.
        weights: Attention of each slice, summing to 1, `[slices]`.
        planes: Anatomical plane of each slice, `[slices]`.
        title: One line over the figure.
        count: Slices to show at most, heaviest first.

    Returns:
        A PNG file.

    Raises:
        ScanError: There are no slices, or not one position, one weight and one plane for each.
    """
    if not len(pixels) == len(position_mm) == len(weights) == len(planes) or len(pixels) == 0:
        raise ScanError(
            f"got {len(pixels)} slices, {len(position_mm)} positions, {len(weights)} weights and {len(planes)} planes "
            "to draw; give one position, one weight and one plane for each of at least one slice"
        )
    heaviest = np.argsort(-np.asarray(weights), kind="stable")[:count]
    columns = min(4, max(len(heaviest), 1))
    rows = -(-len(heaviest) // columns)
    runs = stacks(planes)
    heights = [2.2 * len(runs) + 0.5, 2.2 * rows]
    figure = new_figure(8.0, sum(heights))
    halves: Any = figure.subfigures(2, 1, height_ratios=heights)
    figure.suptitle(shorten(title, 100), fontsize=10.5, x=0.01, ha="left")
    panels = halves[0].subplots(len(runs), 1, squeeze=False, sharey=True).ravel()
    for panel, (plane, run) in zip(panels, runs.items(), strict=True):
        _draw_profile(panel, plane, position_mm[run], np.asarray(weights), run, heaviest)
    panels[0].set_ylim(0, 118 * float(np.max(weights)))  # the panels share it; room for the numbers of the heaviest
    uniform = f"uniform attention ({100 / len(weights):.1f} %)"
    panels[0].set_title(f"dashed: {uniform}", fontsize=8.5, loc="right")
    pictures = halves[1].subplots(rows, columns, squeeze=False).ravel()
    for rank, (picture, index) in enumerate(zip(pictures, heaviest, strict=False), start=1):
        picture.imshow(pixels[index], cmap="gray", vmin=0, vmax=255)
        place = f"{planes[index]} {round(position_mm[index]):d} mm".replace("-", "\N{MINUS SIGN}")
        picture.set_title(f"{rank}   {place}   {100 * weights[index]:.1f} %", fontsize=8.5, loc="center")
    for picture in pictures:
        picture.axis("off")
    return save(figure, "png")


def _draw_profile(
    axes: Axes, plane: str, position_mm: np.ndarray, weights: np.ndarray, run: slice, heaviest: np.ndarray
) -> None:
    """Weight in percent against mm in one plane, the heaviest slices numbered, uniform attention as a dashed line."""
    percent = 100 * weights[run]
    axes.plot(position_mm, percent, color=PALETTE[0], marker="o", markersize=3)
    for rank, index in enumerate(heaviest - run.start, start=1):
        if 0 <= index < len(percent):
            place = (position_mm[index], percent[index])
            axes.annotate(f"{rank}", place, xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8)
    axes.axhline(100 / len(weights), color=GREY, linewidth=1, linestyle="--")
    axes.set(xlabel=f"{plane} position, mm ({DIRECTION.get(plane, 'RAS+')})", ylabel="Weight, %")


def _profiles(attention: pd.DataFrame, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slice weights of each scan in a plane, in units of uniform, at the positions of `grid`; NaN beyond its slices."""
    profiles = []
    for _, scan in attention.groupby("scan_id", sort=True):
        scan = scan.sort_values("position_mm")
        place, relative = scan["position_mm"].to_numpy(), scan["relative"].to_numpy()
        profiles.append(np.interp(grid, place, relative, left=np.nan, right=np.nan))
    return np.array(profiles).reshape(-1, len(grid))
