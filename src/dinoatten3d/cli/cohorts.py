"""Commands that take a cohort to features: `audit` and `extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dinoatten3d.cli.options import (
    SOME_FAILED,
    BackboneName,
    Classes,
    ConfigFile,
    Device,
    Ignore,
    Positions,
    RecipeName,
)
from dinoatten3d.config import PatchConfig, SliceConfig
from dinoatten3d.console import (
    fetch_backbone,
    print_audit,
    progress_bars,
    say,
)

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
    from dinoatten3d.steps.audit import audit_cohort, write_audit

    table = read_cohort(cohort, target=target, classes=classes, ignore=ignore)
    store = open_store(features) if features else None
    with progress_bars() as bar:
        found = audit_cohort(table, store, voxels=voxels, folds=folds, seed=seed, progress=bar("inspecting"))
    print_audit(found)
    for path in write_audit(found, out) if out else ():
        print(path)
    return INVALID if found.invalid else 0


def extract(
    cohort: Path,
    *,
    out: Path = Path("features"),
    recipe: RecipeName = "default",
    config: ConfigFile = None,
    planes: Annotated[str | None, Parameter(help="Planes with commas between them, for --slices.planes.")] = None,
    slices: SliceConfig | None = None,
    patches: PatchConfig | None = None,
    backbone: BackboneName = "auto",
    positions: Positions = "official",
    device: Device = "cpu",
) -> int:
    """Run the frozen backbone once over every scan of a cohort; scans that have features already are left alone.

    Args:
        cohort: CSV or TSV with a row a scan (path, subject, ...), or a BIDS folder.
        out: Folder of feature folders.
    """
    from dinoatten3d.console import with_planes
    from dinoatten3d.data.cohort import read_cohort
    from dinoatten3d.features.extract import extract as run_extract

    table = read_cohort(cohort)
    model = fetch_backbone(backbone or "auto", device, positions)
    with progress_bars() as bar:
        done = run_extract(
            table,
            model,
            out,
            slices=with_planes(slices or SliceConfig(), planes),
            patches=patches or PatchConfig(),
            progress=bar("extracting"),
        )
    if done.embedded == 0 and not done.failed:
        say.print(f"nothing to do: all {done.found} scans have features already")
    else:
        say.print(f"{done.embedded} scans embedded, {done.found} found from before, {len(done.failed)} failed")
    for name, notes in done.notes.items():
        say.print(f"note: {name}: {'; '.join(notes)}", markup=False)
    for reason in done.failed.values():
        say.print(f"failed: {reason}", markup=False)
    print(done.store.folder)
    return SOME_FAILED if done.failed else 0
