"""The errors a user can cause, and the exit code that each ends in.

Every message is one sentence that says what was seen, what was wanted and what to do.
"""

from __future__ import annotations

import difflib

__all__ = [
    "CohortError",
    "ConfigError",
    "DinoAtten3DError",
    "FeatureError",
    "RunError",
    "ScanError",
    "WeightsError",
    "suggest",
]


class DinoAtten3DError(Exception):
    """Base of all errors that the user can mend; the command line prints it without a traceback."""

    exit_code = 2


class ConfigError(DinoAtten3DError):
    """An option, a recipe or a combination of them that cannot work."""


class CohortError(DinoAtten3DError):
    """The table of scans is missing something or contradicts itself."""


class ScanError(DinoAtten3DError):
    """One image file cannot be used; the others can."""


class FeatureError(DinoAtten3DError):
    """A feature folder is missing, incomplete or made by something else."""


class WeightsError(DinoAtten3DError):
    """Backbone weights cannot be found, fetched or trusted."""


class RunError(DinoAtten3DError):
    """A run folder is missing, unfinished or of another version."""


def suggest(word: str, known: tuple[str, ...] | list[str]) -> str:
    """Give `(did you mean 'x'?)` with a leading space where a known word is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
