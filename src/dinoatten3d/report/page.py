"""What all pages share: the templates, and how figures are written for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jinja2

NOTHING = "–"
"""What is unknown."""


def templates() -> jinja2.Environment:
    """Give the templates of the report, which escape whatever they are given."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("dinoatten3d.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"number": number, "interval": interval, "plain": plain, "duration": duration}
    return found


def number(value: float | None, digits: int = 2) -> str:
    """Write a figure with a true minus sign; what is unknown is an en dash."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")  # never "-0"


def interval(estimate: Mapping[str, float | None] | None) -> str:
    """Write `low to high` of an estimate, or nothing where it has no interval."""
    low, high = (number((estimate or {}).get(end)) for end in ("low", "high"))
    return "" if NOTHING in (low, high) else f"{low}\N{EN DASH}{high}"


def plain(value: Any) -> str:
    """Write a value of a configuration as a person would."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:g}".replace("-", "\N{MINUS SIGN}")
    return NOTHING if value is None or value == "" else str(value)


def duration(seconds: float) -> str:
    """Write seconds as `4 min 12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h"] * bool(hours) + [f"{minutes} min"] * bool(minutes or hours) + [f"{rest} s"]
    return " ".join(parts[:2] if hours else parts)
