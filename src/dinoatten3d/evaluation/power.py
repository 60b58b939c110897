"""What a cohort of this size can show, before anything is trained."""

from __future__ import annotations

from scipy.optimize import brentq
from scipy.stats import norm

from dinoatten3d.evaluation.intervals import auroc_half_width

CERTAIN = 1 - 1e-9


def smallest_auroc(n_positive: int, n_negative: int, *, power: float = 0.8, level: float = 0.95) -> float:
    """Smallest true AUROC that a two-sided test would tell from 0.5 with this probability.

    The difference from 0.5 has to be as large as the test's critical value under chance plus what the estimate may
    fall short of the truth (the usual normal approximation; standard errors after Hanley & McNeil 1982).

    Args:
        n_positive: Subjects of the positive class.
        n_negative: Subjects of the other class.
        power: Probability of finding it, above 0.5.
        level: One minus the chance of a false alarm.

    Returns:
        An AUROC above 0.5; 1 where even a perfect one would not be found that often.

    Raises:
        ConfigError: A class has no subject, or `level` is not between 0 and 1.
    """
    z_level = float(norm.ppf((1 + level) / 2))
    critical = auroc_half_width(n_positive, n_negative, 0.5, level)

    def surplus(auroc: float) -> float:
        spread = auroc_half_width(n_positive, n_negative, auroc, level) / z_level
        return auroc - 0.5 - critical - float(norm.ppf(power)) * spread

    return float(brentq(surplus, 0.5, CERTAIN)) if surplus(CERTAIN) > 0 else 1.0
