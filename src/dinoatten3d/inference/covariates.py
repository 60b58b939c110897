"""What is known of a person beside the scan, for a run whose features were adjusted for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinoatten3d.errors import ConfigError, suggest
from dinoatten3d.files import sha256
from dinoatten3d.learning.run import Run


class Covariates(NamedTuple):
    """Age in years, sex and site as the cohort's table writes them; None where unknown."""

    age: float | None = None
    sex: str | None = None
    site: str | None = None


NOTHING_KNOWN = Covariates()


def given_covariates(run: Run, texts: Sequence[str]) -> Covariates:
    """Read `age=63`, `sex=f`, `site=A`; head size comes from the scan itself.

    Raises:
        ConfigError: One is not of that form, given twice, or the run does not adjust for it.
    """
    asked: list[str] = [name for name in run.recipe.adjust.covariates if name != "head-size"]
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not value or name in values:
            raise ConfigError(f"--covariate is '{text}'; wanted a name and a value such as age=63, each name once")
        if name not in asked:
            has = f"it adjusts for {', '.join(asked)}" if asked else "it adjusts for nothing that could be given"
            raise ConfigError(f"--covariate '{name}' has no part in run {run.folder}{suggest(name, asked)}; {has}")
        values[name] = value
    age = values.pop("age", None)
    try:
        years = None if age is None else float(age)
    except ValueError:
        raise ConfigError(f"--covariate age is '{age}'; write years, such as age=63") from None
    return Covariates(age=years, **values)


def of_cohort(run: Run, scan: Path) -> Covariates:
    """Give what the run's cohort knows of one of its scans, found by content."""
    cohort = run.table("cohort.csv")
    row = cohort[cohort["sha256"] == sha256(scan)].iloc[0]
    age = None if np.isnan(row["age"]) else float(row["age"])
    return Covariates(age=age, sex=row["sex"] or None, site=row["site"] or None)
