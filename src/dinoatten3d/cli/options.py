"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

RecipeName = Annotated[str, Parameter(help="default, paper, published, or a TOML file with the same tables.")]
ConfigFile = Annotated[Path | None, Parameter(help="TOML file that sets any option of this command.")]
Classes = Annotated[
    list[str],
    Parameter(name="--classes", help="A class and its raw labels, 'healthy=HC,HC_MIXED'; once a class, in order."),
]
Ignore = Annotated[list[str], Parameter(help="Raw label whose rows are left out; '' for a missing one.")]
BackboneName = Annotated[
    str | None, Parameter(name="--backbone", help="A known name (see `weights list`), a hub id, a folder, or auto.")
]
Covariates = Annotated[
    list[str],
    Parameter(
        name="--covariate",
        help="What is known of the person, for a run that adjusts for it: age=63, sex=f, site=A. For all scans given.",
    ),
]
Device = Annotated[str, Parameter(help="Where the backbone runs: cpu, cuda, mps.")]
Positions = Annotated[
    Literal["official", "transformers"],
    Parameter(help="How DINOv2's position table is resized: as its authors' code does, or as transformers does."),
]

SOME_FAILED = 3
"""Exit code when some scans could not be used and the others were."""
