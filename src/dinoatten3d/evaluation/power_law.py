"""The learning curve as an inverse power law, and how far the data carry it.

AUROC = a - b n^-c in the number n of training scans (Figueroa et al. 2012, BMC Medical Informatics and Decision Making
12:8). It is fitted to the figures themselves and to each of their bootstrap draws, which gives the band.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinoatten3d.evaluation.intervals import Interval, auroc_half_width

Array = NDArray[np.float64]
EXPONENTS = np.geomspace(0.1, 3, 40)
"""Values of c that the fit tries."""
FEWEST_POINTS = 4
"""A law of three numbers needs more points than that."""
WIDEST = 0.3
"""An extrapolated band wider than this is of no use. A stricter bound would be worse: it keeps the lucky cohorts, whose
curves lead too high (docs/log.md)."""
MOST_SUBJECTS = 100_000


class PowerLaw(NamedTuple):
    """AUROC = a - b n^-c; one value of each a bootstrap draw, the first being the figures themselves."""

    a: Array
    b: Array
    c: Array

    def at(self, scans: float) -> Interval:
        """Give the AUROC of models trained on this many scans, with the middle 95 % of the draws."""
        auroc = np.clip(self.a - self.b * scans**-self.c, 0, 1)
        low, high = np.quantile(auroc[1:], [0.025, 0.975])
        return Interval(float(auroc[0]), float(min(low, auroc[0])), float(max(high, auroc[0])))


def fit_power_law(scans: Array, auroc: Array, draws: Array, *, exponents: Array = EXPONENTS) -> PowerLaw:
    """Fit by least squares, each point weighted with the inverse variance of its draws.

    For each c the rest is linear, with its constraints: a curve never falls (b >= 0) nor passes 1 (a <= 1).

    Args:
        scans: Training scans, `[points]`.
        auroc: The figures, `[points]`.
        draws: The same in each bootstrap draw, `[draws, points]`.
        exponents: Values of c to try.

    Returns:
        The law of the figures and of each draw, `[1 + draws]`.
    """
    y = np.vstack([auroc, draws])
    weight = 1 / np.maximum(draws.var(axis=0), 1e-6)
    weight = weight / weight.sum()
    mean = y @ weight
    best = np.full((4, len(y)), np.inf)
    for c in exponents:
        x = scans**-c
        x_mean = float(x @ weight)
        spread = float((x - x_mean) ** 2 @ weight)
        b = np.maximum(-((y - mean[:, None]) * (x - x_mean)) @ weight / spread, 0)
        a = mean + b * x_mean
        over = a > 1
        a[over], b[over] = 1, ((1 - y[over]) * x) @ weight / float(x**2 @ weight)
        error = (y - a[:, None] + b[:, None] * x) ** 2 @ weight
        better = error < best[0]
        best[:, better] = np.stack([error, a, b, np.full_like(a, c)])[:, better]
    return PowerLaw(*best[1:])


def why_not_extrapolate(scans: Array, at_all_scans: Interval, draws: Array, law: PowerLaw | None) -> str:
    """Give the reason why the curve must not be followed beyond the data, or nothing.

    Args:
        scans: Training scans, `[points]`, rising.
        at_all_scans: AUROC of the last point.
        draws: Bootstrap draws of the AUROC, `[draws, points]`.
        law: The law, where there are points enough to fit one.
    """
    if law is None:
        return f"only {len(scans)} sizes of training set could be scored, {FEWEST_POINTS} are needed"
    if not at_all_scans.low > 0.5:
        return "the AUROC at all scans is not beyond chance"
    if np.quantile(draws[:, -1] - draws[:, 0], 0.025) <= 0:
        return "it is not shown to rise over these sizes"
    ahead = law.at(2 * scans[-1])
    if ahead.high - ahead.low > WIDEST:
        return f"at twice the scans its 95 % band would reach from {ahead.low:.2f} to {ahead.high:.2f}"
    return ""


def subjects_needed(
    half_width: float, share: float, auroc_at: Callable[[int], float], *, at_least: int = 4
) -> int | None:
    """Fewest subjects whose AUROC has a 95 % interval of this half width (Hanley & McNeil 1982).

    Args:
        half_width: The half width wanted, in units of AUROC.
        share: Share of subjects in one class (the smallest); the others make up the rest.
        auroc_at: The AUROC to expect with so many subjects.
        at_least: Where the search starts.

    Returns:
        The number, or None beyond 100,000.
    """

    def narrow_enough(subjects: int) -> bool:
        few = max(1, round(share * subjects))
        return auroc_half_width(few, max(1, subjects - few), auroc_at(subjects)) <= half_width

    sizes = range(at_least, MOST_SUBJECTS + 1)
    place = bisect_left(sizes, True, key=narrow_enough)
    return sizes[place] if place < len(sizes) else None
