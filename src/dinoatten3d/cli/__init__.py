"""The command line: a table of commands. Torch is imported when a command needs it, never for help."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

# A waiting OpenMP thread must not spin against a busy neighbour (set before torch is imported).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from cyclopts import App

from dinoatten3d import __version__
from dinoatten3d.cli.cohorts import audit, extract
from dinoatten3d.cli.options import BackboneName
from dinoatten3d.cli.runs import compare, evaluate, report, train
from dinoatten3d.cli.scans import anomaly, explain, predict, score
from dinoatten3d.cli.weights import weights_app
from dinoatten3d.console import config_layers, fetch_backbone, print_verdict, progress_bars, say
from dinoatten3d.errors import DinoAtten3DError

app = App(
    name="dinoatten3d",
    version=__version__,
    suppress_keyboard_interrupt=False,  # main says what an interruption left
    help="Slice attention over frozen DINOv2 features for 3D brain MRI. For research, not for diagnosis.",
)
for command in (audit, extract, train, evaluate, compare, report, predict, explain, anomaly, score, weights_app):
    app.command(command)


@app.command
def demo(
    *,
    out: Path = Path("demo"),
    brains: Path | None = None,
    lesions: Path | None = None,
    contrast: Literal["dark", "subtle"] = "dark",
    scans: int = 48,
    seed: int = 0,
    backbone: BackboneName = "auto",
) -> None:
    """Make a cohort with known lesions, run everything on it and write the report.

    Args:
        out: Folder for the cohort, the features and the run.
        brains: Real skull-stripped brains to implant lesions into, instead of the MNI152 template.
        lesions: Lesion masks in MNI space (with --brains).
        contrast: Dark lesions of 16-98 mL or subtle ones of 5-37 mL (with --brains).
        scans: Scans in the synthetic cohort.
        seed: Decides every draw.
        backbone: Where the encoder comes from.
    """
    from dinoatten3d.demo.pipeline import run_demo

    with progress_bars() as bar:
        result = run_demo(
            out,
            brains=brains,
            lesions=lesions,
            contrast=contrast,
            scans=scans,
            seed=seed,
            load=lambda: fetch_backbone(backbone or "auto"),
            bar=bar,
            say=say.print,
        )
    print_verdict(result.run)
    print(
        f"cohort        {result.table}\ntruth         {result.truth}\n"
        f"features      {result.features}\nrun           {result.run}"
    )
    for folder in result.explanations:
        print(f"explanation   {folder}")
    print(f"report        {result.run / 'report.html'}")


def main() -> None:
    """Run a command; errors that the user can mend are one sentence and exit code 2."""
    try:
        app.config = config_layers(sys.argv[1:])
        code = app(sys.argv[1:], result_action="return_value")
    except DinoAtten3DError as error:
        say.print(f"dinoatten3d: {error}", markup=False, style="red")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say.print("dinoatten3d: interrupted; nothing half-written is left, and `extract` goes on where it was")
        sys.exit(130)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        say.print(f"dinoatten3d: {error.strerror or error}{where}", markup=False, style="red")
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
