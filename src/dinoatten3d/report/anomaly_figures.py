"""How far scans are from the healthy ones: a cohort's scores, and one scan's slices with what deviates laid over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dinoatten3d.config import Plane
from dinoatten3d.report.drawing import GREY, PALETTE, STYLE, legend_below, new_figure, save, shorten

SHOWN_FROM, SHOWN_TO = 2.0, 6.0
"""Standard deviations over which the overlay grows from clear to opaque."""


@mpl.rc_context(STYLE)
def anomaly_scores_figure(table: pd.DataFrame, healthy: str) -> bytes:
    """Draw every scan's score in order, with the band that nine of ten held-out healthy scans lie in.

    Args:
        table: Columns score, label and reference, one row a scan.
        healthy: Name of the references.

    Returns:
        A PNG file.
    """
    ordered = table.sort_values("score", kind="stable").reset_index(drop=True)
    low, high = np.percentile(ordered.loc[ordered["reference"], "score"], [5, 95])
    figure = new_figure(7.5, 3.6)
    axes = figure.subplots()
    axes.axhspan(low, high, color=GREY, alpha=0.15, linewidth=0, label=f"5-95 % of held-out {shorten(healthy)}")
    named = ordered["label"].where(~ordered["reference"], healthy)
    for index, name in enumerate([healthy, *sorted(set(named) - {healthy})]):
        of_class = ordered[named == name]
        marker = "os^Dv<>"[index % 7]
        label = f"{shorten(name)} (n = {len(of_class)})"
        axes.scatter(
            of_class.index, of_class["score"], s=16, color=PALETTE[index % len(PALETTE)], marker=marker, label=label
        )
    axes.set_xlabel("Scans, from ordinary to far")
    axes.set_ylabel("Anomaly score")
    legend_below(figure, axes, columns=3)
    return save(figure, "png")


@mpl.rc_context(STYLE)
def deviation_figure(
    pixels: NDArray[np.uint8],
    position_mm: NDArray[np.floating],
    slice_scores: NDArray[np.floating],
    patch_map: NDArray[np.float32],
    planes: Sequence[Plane],
    *,
    title: str,
    count: int = 4,
) -> bytes:
    """Draw the slices that deviate most, as they are and with the deviating patches laid over.

    Args:
        pixels: 8-bit grey slices, `[slices, rows, columns]`.
        position_mm: Position of each slice along its plane's normal, RAS+ mm, `[slices]`.
        slice_scores: `[slices]`.
        patch_map: In standard deviations of reference scans, `[slices, patch rows, patch columns]`.
        planes: Anatomical plane of each slice, `[slices]`.
        title: One line over the figure.
        count: Slices to show at most, the farthest first.

    Returns:
        A PNG file.
    """
    heaviest: Sequence[int] = np.argsort(-np.asarray(slice_scores), kind="stable")[:count].tolist()
    figure = new_figure(2.0 * max(len(heaviest), 2) + 0.9, 4.6)
    figure.suptitle(shorten(title, 100), fontsize=10.5, x=0.01, ha="left")
    panels = figure.subplots(2, len(heaviest), squeeze=False)
    height, width = pixels.shape[1:]
    overlay: Any = None
    for column, index in enumerate(heaviest):
        for panel in panels[:, column]:
            panel.imshow(pixels[index], cmap="gray", vmin=0, vmax=255)
            panel.axis("off")
        strength = np.clip((patch_map[index] - SHOWN_FROM) / (SHOWN_TO - SHOWN_FROM), 0, 1)
        overlay = panels[1, column].imshow(
            patch_map[index],
            cmap="inferno",
            vmin=0,
            vmax=SHOWN_TO,
            alpha=0.65 * strength,
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        )
        place = f"{planes[index]} {round(float(position_mm[index])):d} mm".replace("-", "\N{MINUS SIGN}")
        panels[0, column].set_title(
            f"{column + 1}   {place}   {slice_scores[index]:.1f} sd", fontsize=8.5, loc="center"
        )
    figure.colorbar(overlay, ax=panels[1].tolist(), shrink=0.9, label="sd of healthy scans")
    return save(figure, "png")
