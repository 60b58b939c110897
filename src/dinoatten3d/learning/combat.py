"""ComBat: sites brought to a common location and scale, feature by feature, with what features share as a prior.

Johnson, Li & Rabinovic (2007); Fortin et al. (2018) for images. Fitted on some scans and used on others; the figures
are those of neuroCombat 0.2.12 where both are the same scans (tests/test_adjust.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SMALLEST = 1e-9
"""Standard deviation below which a feature is the same in all scans."""
TOLERANCE = 1e-4
"""Relative change at which the alternation of location and scale has settled."""
MOST_STEPS = 500


@dataclass(frozen=True, kw_only=True)
class Combat:
    """Location and scale of each site.

    Attributes:
        centre: Mean of a feature over sites, `[dim]`.
        slope: What preserved covariates add, `[preserved, dim]`.
        spread: Standard deviation of a feature within sites, `[dim]`.
        location: Of each site, in units of `spread`, `[sites, dim]`.
        scale: Of each site, in units of `spread`, `[sites, dim]`.
    """

    centre: Array
    slope: Array
    spread: Array
    location: Array
    scale: Array

    def __call__(self, x: Array, preserved: Array, site: NDArray[np.int64]) -> Array:
        """Harmonise scans; their class has no part in it.

        Args:
            x: Features, `[n, dim]`.
            preserved: Centred covariates whose effect stays, `[n, preserved]`.
            site: Index of the site, `[n]`; -1 for one that was not fitted, which is left as it is.
        """
        known = site >= 0
        expected = self.centre + preserved[known] @ self.slope
        standard = (x[known] - expected) / self.spread
        harmonised = x.copy()
        own = site[known]
        harmonised[known] = expected + self.spread * (standard - self.location[own]) / self.scale[own]
        return harmonised


def fit_combat(x: Array, preserved: Array, site: NDArray[np.int64]) -> Combat:
    """Estimate location and scale of each site by empirical Bayes.

    Args:
        x: Features, `[n, dim]`.
        preserved: Centred covariates whose effect stays, `[n, preserved]`.
        site: Index of the site, `[n]`, 0 to sites - 1; each needs two scans or more. A single site is left as it is.
    """
    sites = np.eye(int(site.max()) + 1)[site]
    design = np.concatenate([sites, preserved], axis=1)
    coefficients = np.linalg.lstsq(design, x, rcond=None)[0]
    counts = sites.sum(axis=0)
    by_site, slope = coefficients[: len(counts)], coefficients[len(counts) :]
    centre = counts / counts.sum() @ by_site
    spread = np.maximum(np.sqrt(((x - design @ coefficients) ** 2).mean(axis=0)), SMALLEST)
    standard = (x - centre - preserved @ slope) / spread
    location, scale = np.zeros((len(counts), x.shape[1])), np.ones((len(counts), x.shape[1]))
    if len(counts) > 1:
        for number in range(len(counts)):
            location[number], scale[number] = _empirical_bayes(standard[site == number])
    return Combat(centre=centre, slope=slope, spread=spread, location=location, scale=scale)


def _empirical_bayes(z: Array) -> tuple[Array, Array]:
    """Posterior location and scale of one site, `[dim]` each, from its standardised features `[scans, dim]`.

    A feature's location is normal and its variance inverse gamma around what all features of the site show; the two
    posterior means are taken in turn until they settle (Johnson et al. 2007, section 3.2).
    """
    count = len(z)
    mean, variance = z.mean(axis=0), np.maximum(z.var(axis=0, ddof=1), SMALLEST)
    prior_mean, prior_variance = mean.mean(), mean.var(ddof=1)
    v, v_spread = variance.mean(), max(variance.var(ddof=1), SMALLEST)
    shape, rate = (2 * v_spread + v**2) / v_spread, (v * v_spread + v**3) / v_spread
    location, squared = mean, variance
    for _ in range(MOST_STEPS):
        before = location, squared
        location = (prior_variance * count * mean + squared * prior_mean) / (prior_variance * count + squared)
        squared = (rate + 0.5 * ((z - location) ** 2).sum(axis=0)) / (count / 2 + shape - 1)
        moved = [
            np.abs(new - old) / np.maximum(np.abs(old), SMALLEST)
            for new, old in zip((location, squared), before, strict=True)
        ]
        if np.max(moved) < TOLERANCE:
            break
    return location, np.sqrt(squared)
