"""The command line: a table of commands. Torch is imported when a command needs it, never for help."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

# A waiting OpenMP thread must not spin against a busy neighbour (set before torch is imported).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from cyclopts import App, Parameter

from dinoatten3d import __version__
from dinoatten3d.cli_anomaly import SOME_FAILED, anomaly, score
from dinoatten3d.cli_audit import audit
from dinoatten3d.cli_compare import compare
from dinoatten3d.cli_train import train
from dinoatten3d.cli_weights import weights_app
from dinoatten3d.config import PatchConfig, SliceConfig
from dinoatten3d.console import config_layers, fetch_backbone, predictions, print_verdict, progress_bars, say
from dinoatten3d.errors import DinoAtten3DError
from dinoatten3d.options import BackboneName, Classes, ConfigFile, Covariates, Device, Ignore, Positions, RecipeName

app = App(
    name="dinoatten3d",
    version=__version__,
    help="Slice attention over frozen DINOv2 features for 3D brain MRI. For research, not for diagnosis.",
)
app.command(weights_app)
app.command(audit)
app.command(anomaly)
app.command(score)
app.command(compare)


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


@app.command
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


@app.command
def evaluate(
    run: Path,
    /,
    *,
    cohort: Path,
    features: Path,
    out: Path,
    target: str | None = None,
    classes: Classes = [],  # noqa: B006
    ignore: Ignore = [],  # noqa: B006
) -> None:
    """Score another cohort with the models of a run, as they are; a person of the run's own cohort is refused.

    Args:
        run: A run folder.
        cohort: Table or BIDS folder of the other cohort.
        features: Its features, made like those of the run (in the same folder, so that the controls can be fitted too).
        out: Folder to make: tables, figures and a report like a run's.
        target: Column with the label; by default named like the run's.
    """
    from dinoatten3d.data.cohort import read_cohort
    from dinoatten3d.features.store import open_store
    from dinoatten3d.learning.run import open_run
    from dinoatten3d.steps import evaluate_run

    opened = open_run(run)
    table = read_cohort(
        cohort,
        target=target or opened.config["cohort"]["target"],
        classes=classes or list(opened.classes),
        ignore=ignore,
    )
    evaluation = evaluate_run(opened, table, open_store(features), out)
    print_verdict(evaluation.folder)
    print(f"report  {evaluation.folder / 'report.html'}")


app.command(train)


@app.command
def report(run: Path) -> None:
    """Compute the figures of a run again and write its report.

    Args:
        run: A run folder.
    """
    from dinoatten3d.steps import report_run

    print(report_run(run))


@app.command
def predict(
    run: Path,
    scans: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    out: Path | None = None,
    covariate: Covariates = [],  # noqa: B006
    backbone: BackboneName = None,
    device: Device = "cpu",
) -> int:
    """Classify scans with the models of all folds.

    Args:
        run: A run folder.
        scans: NIfTI or DICOM, one or several.
        out: JSON file to write; without it only the table is printed.
    """
    from dinoatten3d.files import write_json

    answers, failed = [], 0
    for prediction in predictions(run, scans, covariate, backbone, device):
        if isinstance(prediction, str):
            failed += 1
            continue
        answer = prediction.to_dict()
        answers.append(answer)
        print(f"{answer['name']}: {answer['predicted']}")
        for name, value in answer["probabilities"].items():
            spread = answer["sd_over_models"][name]
            print(f"  {name:<20} {value:.3f}" + (f"  (sd over models {spread:.3f})" if spread == spread else ""))
        if "set" in answer:
            print(f"  called               {answer['called']} (threshold and calibration from inner folds)")
            held = " or ".join(answer["set"]) or "none of the classes: unlike the training scans of each"
            print(f"  {answer['set_coverage']:.0%} set              {held}")
        for note in answer["notes"]:
            print(f"  note: {note}")
    if out is not None and answers:
        write_json(out, answers)
        print(f"json  {out}")
    if answers:
        print("For research, not for diagnosis.")
    return SOME_FAILED if failed else 0


@app.command
def explain(
    run: Path,
    scans: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    out: Path | None = None,
    covariate: Covariates = [],  # noqa: B006
    backbone: BackboneName = None,
    device: Device = "cpu",
) -> int:
    """Show which slices weighed most: a table, a figure and a map that opens over the scan.

    Args:
        run: A run folder.
        scans: NIfTI or DICOM, one or several.
        out: Folder for the explanations; by default `explain` inside the run.
    """
    from dinoatten3d.steps import explain_scan, explanation_folder

    failed = 0
    for scan in scans:
        explanation_folder(scan, out or run / "explain")
    for prediction in predictions(run, scans, covariate, backbone, device):
        if isinstance(prediction, str):
            failed += 1
        else:
            print(explain_scan(prediction, out or run / "explain"))
    return SOME_FAILED if failed else 0


def main() -> None:
    """Run a command; errors that the user can mend are one sentence and exit code 2."""
    try:
        app.config = config_layers(sys.argv[1:])
        code = app(sys.argv[1:], result_action="return_value")
    except DinoAtten3DError as error:
        say.print(f"dinoatten3d: {error}", markup=False, style="red")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say.print("dinoatten3d: interrupted; what was finished is kept, the same command goes on from there")
        sys.exit(130)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        say.print(f"dinoatten3d: {error.strerror or error}{where}", markup=False, style="red")
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
