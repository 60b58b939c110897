"""The command `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def compare(
    runs: Annotated[list[Path], Parameter(negative=())], /, *, out: Path | None = None, baselines: bool = False
) -> None:
    """Compare runs on the scans that all of them scored: a table, and paired tests between every two.

    Args:
        runs: Two run folders or more, of the same target and classes.
        out: Folder to make for a page and a JSON file; without it the table is only printed.
        baselines: Compare with the baselines of the first run too.
    """
    from dinoatten3d.report.comparison import compare_folders

    for line in compare_folders(runs, out=out, with_baselines=baselines):
        print(line)
