"""The look of every figure, and its way into a page: one palette, real text, ids that never collide."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
"""Okabe and Ito's colours without the yellow, which white paper swallows."""
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
"""Line styles that go with the colours, so that a grey print still tells the lines apart."""
INK, GREY, FAINT = "#222222", "#767676", "#e4e4e4"

STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $x$
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "svg.fonttype": "none",  # the reader's own fonts draw the text: it can be searched, and any script shows
}
"""Settings under which a figure is made (`@mpl.rc_context(STYLE)`) and saved."""

_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of `width` by `height` inches that keeps its labels inside."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def look(index: int) -> dict[str, Any]:
    """Give the colour and line style of the class or model number `index`."""
    turn = index // len(PALETTE) + index
    return {"color": PALETTE[index % len(PALETTE)], "linestyle": DASHES[turn % len(DASHES)]}


def shorten(text: object, width: int = 22) -> str:
    """Make any text fit a label: one line, printable, at most `width` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    line = line if len(line) <= width else line[: width - 1].rstrip() + "…"
    return f" {line}" if line.startswith("_") else line  # matplotlib hides labels that start with "_"


def legend_below(figure: Figure, axes: Axes, columns: int = 1) -> None:
    """Put the legend of the axes under the whole figure, where no line can run through it."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", ncols=columns, handlelength=2.6)


def save(figure: Figure, form: str, *, salt: str = "", dpi: int = 150) -> bytes:
    """Give the bytes of a figure as `svg` or `png`; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    metadata = _NO_METADATA if form == "svg" else {"Software": None}
    with mpl.rc_context({**STYLE, "svg.hashsalt": salt or "figure"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the layout font lacks it; the reader's may not
        figure.savefig(buffer, format=form, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def to_svg(figure: Figure, name: str, description: str) -> Markup:
    """Turn a figure into an SVG element to stand inside an HTML page.

    Args:
        figure: The figure.
        name: Unique on the page; every id in the element starts with it.
        description: What a reader who cannot see the figure should know.

    Returns:
        The element, scaled by its container, without style sheet, metadata or anything to fetch.
    """
    text = save(figure, "svg", salt=name).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r" d=\"[^\"]*\"", _round_path, text)
    text = re.sub(r"'DejaVu Sans'(, sans-serif)?", "var(--sans)", text)
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None, "matplotlib always writes a viewBox"
    # Safe to mark as markup: matplotlib escapes every text that it writes.
    label = Markup('role="img" aria-label="{}"').format(description)
    return Markup(f"<svg {view_box[0]} {label}>" + text[text.index(">") + 1 :])


def _round_path(match: re.Match[str]) -> str:
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", match[0])
