"""The command `audit`."""

from __future__ import annotations

from pathlib import Path

from dinoatten3d.console import print_audit, progress_bars
from dinoatten3d.options import Classes, Ignore

INVALID = 1
"""Exit code when something was found that would invalidate a result."""


def audit(
    cohort: Path,
    *,
    features: Path | None = None,
    target: str | None = None,
    classes: Classes = [],  # noqa: B006  cyclopts reads the default
    ignore: Ignore = [],  # noqa: B006
    voxels: bool = True,
    folds: int = 5,
    seed: int = 0,
    out: Path | None = None,
) -> int:
    """Show what a reviewer would find, before any training; exit code 1 if it would invalidate a result.

    Args:
        cohort: CSV or TSV with a row a scan (path, subject, ...), or a BIDS folder.
        features: A feature folder made by `extract`: also look for one person under two names.
        target: Column with the label: also look at what goes with it.
        voxels: Read every scan, not only its header.
        folds: Folds of the cross-validation to come.
        seed: Decides folds, permutations and bootstrap draws.
        out: Write the findings to a .json or .html file, or both into a folder.
    """
    from dinoatten3d.data.cohort import read_cohort
    from dinoatten3d.features.store import open_store
    from dinoatten3d.steps import audit_cohort, write_audit

    table = read_cohort(cohort, target=target, classes=classes, ignore=ignore)
    store = open_store(features) if features else None
    with progress_bars() as bar:
        found = audit_cohort(table, store, voxels=voxels, folds=folds, seed=seed, progress=bar("inspecting"))
    print_audit(found)
    for path in write_audit(found, out) if out else ():
        print(path)
    return INVALID if found.invalid else 0
