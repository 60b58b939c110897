"""What an audit says: one thing that was seen, what it means for a result, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["invalid", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("invalid", "warning", "note")
"""From what makes a result worthless to what is merely good to know."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One finding of an audit."""

    code: str
    """What kind of finding, `duplicate-across-subjects`; stable, for programs."""
    severity: Severity
    """`invalid`: no figure from this cohort can be trusted; `warning`: a reviewer will ask; `note`: good to know."""
    seen: str
    """What was seen, with figures and names."""
    means: str
    """What it means for a result."""
    advice: str
    """What to do."""


def listed(names: Iterable[str], most: int = 5) -> str:
    """Name the first few: `a, b, c and 4 more`."""
    found = list(names)
    shown = ", ".join(found[:most])
    return shown if len(found) <= most else f"{shown} and {len(found) - most} more"


def count(number: int, singular: str, plural: str = "") -> str:
    """Give `1 scan`, `3 scans`."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
