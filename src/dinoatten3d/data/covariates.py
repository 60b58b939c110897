"""What is known of a scan without looking at the brain: age, sex, site, head size, scanner header."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dinoatten3d.data.cohort import Scan
from dinoatten3d.data.header import PROTOCOL, Header

UNKNOWN = {"", "n/a", "na", "nan", "none", "unknown", "?"}
PERSON = ("age", "sex", "head size")
"""Covariates of the person; all others come from how the scan was made and stored."""
VOXELS = "voxels, "
"""How the covariates of the array's size start; it is cropped to the head in some cohorts."""
_DIRECTIONS = ("right", "anterior", "superior")
_MEASURED = {
    "age",
    "head size",
    "grey levels",
    "field strength",
    "repetition time",
    "echo time",
    "inversion time",
    "flip angle",
}


def covariate_table(
    scans: Sequence[Scan],
    *,
    brain_ml: NDArray[np.float64] | None = None,
    headers: Sequence[Header | None] | None = None,
    grey_levels: Sequence[float] | None = None,
    without: str | None = None,
) -> pd.DataFrame:
    """Give one row a scan and one column a covariate, as far as they are known and vary.

    Args:
        scans: The rows of the cohort.
        brain_ml: Brain volume, `[scans]`.
        headers: What `read_header` found; None for a scan whose header is not known.
        grey_levels: Distinct intensities in each brain, which tell how a file was made; NaN where not counted.
        without: A covariate to leave out: the target itself.

    Returns:
        Numbers (NaN where unknown) and categories (None where unknown), indexed by scan id.
    """
    columns = _person_and_site(scans, brain_ml)
    if headers is not None:
        columns |= _header_columns(headers)
    if grey_levels is not None:
        columns["grey levels"] = list(grey_levels)
    table = _typed(columns, scans)
    varies = [name for name in table if name != without and table[name].nunique(dropna=False) > 1]
    return table[varies]


def person_and_site(scans: Sequence[Scan], brain_ml: NDArray[np.float64]) -> pd.DataFrame:
    """Give age, sex, site and head size of each scan, whether they vary or not; typed like `covariate_table`."""
    return _typed(_person_and_site(scans, brain_ml), scans)


def covariate_matrix(table: pd.DataFrame) -> pd.DataFrame:
    """Turn covariates into columns for a model: numbers as they are, a column a category, one for "unknown".

    Unknown numbers stay NaN, to be filled in within the training folds (`evaluation.covariates` does).
    """
    columns: dict[str, pd.Series] = {}
    for name in table:
        known = table[name].notna()
        if pd.api.types.is_float_dtype(table[name]):
            columns[name] = table[name]
        else:
            levels = sorted(table[name].dropna().unique())
            columns |= {f"{name}={level}": (table[name] == level).astype(float) for level in levels}
        if not known.all():
            columns[f"{name} unknown"] = (~known).astype(float)
    return pd.DataFrame(columns, index=table.index, dtype=float)


def _person_and_site(
    scans: Sequence[Scan], brain_ml: NDArray[np.float64] | None
) -> dict[str, list[float | str | None]]:
    columns: dict[str, list[float | str | None]] = {
        "age": [np.nan if scan.age is None else scan.age for scan in scans],
        "sex": [(scan.sex or "").casefold() for scan in scans],
        "site": [scan.site for scan in scans],
    }
    if brain_ml is not None:
        columns["head size"] = [float(ml) for ml in brain_ml]
    return columns


def _typed(columns: dict[str, list[float | str | None]], scans: Sequence[Scan]) -> pd.DataFrame:
    """Make numbers of numbers and clean text of categories."""
    table = pd.DataFrame(columns, index=pd.Index([scan.id for scan in scans], name="scan_id"))
    for name in table:
        if name in _numeric(table):
            table[name] = pd.to_numeric(table[name], errors="coerce").astype(float)
        else:
            table[name] = _categories(table[name])
    return table


def _numeric(table: pd.DataFrame) -> set[str]:
    return {name for name in table if name in _MEASURED or name.startswith(("voxel size, ", VOXELS))}


def _categories(column: pd.Series) -> pd.Series:
    """Text without the many ways of writing "unknown"."""
    text = column.map(lambda value: "" if value is None else str(value).strip())
    return text.where(~text.str.lower().isin(UNKNOWN), None).astype(object)


def _header_columns(headers: Sequence[Header | None]) -> dict[str, list[float | str | None]]:
    columns: dict[str, list[float | str | None]] = {}
    for axis, direction in enumerate(_DIRECTIONS):
        columns[f"voxel size, {direction}"] = [h.spacing_mm[axis] if h else np.nan for h in headers]
        columns[f"{VOXELS}{direction}"] = [h.shape[axis] if h else np.nan for h in headers]
    columns["stored axes"] = [h.axes if h else None for h in headers]
    columns["stored type"] = [h.stored_as if h else None for h in headers]
    for name in PROTOCOL.values():
        columns[name] = [h.protocol.get(name) if h else None for h in headers]
    return columns
