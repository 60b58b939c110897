"""Commands that answer for single scans: `predict`, `explain`, `anomaly`, `score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dinoatten3d.cli.options import (
    SOME_FAILED,
    BackboneName,
    Classes,
    Covariates,
    Device,
    Ignore,
)
from dinoatten3d.console import (
    fetch_same_backbone,
    predictions,
    progress_bars,
    say,
)
from dinoatten3d.errors import ScanError


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
            print(
                f"  set                  {held} ({answer['set_coverage_wanted']:.0%} wanted; reached: see the report)"
            )
        for note in answer["notes"]:
            print(f"  note: {note}")
    if out is not None and answers:
        write_json(out, answers)
        print(f"json  {out}")
    if answers:
        print("For research, not for diagnosis.")
    return SOME_FAILED if failed else 0


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
    from dinoatten3d.steps.explain import explain_scan, explanation_folder

    failed = 0
    for scan in scans:
        explanation_folder(scan, out or run / "explain")
    for prediction in predictions(run, scans, covariate, backbone, device):
        if isinstance(prediction, str):
            failed += 1
        else:
            print(explain_scan(prediction, out or run / "explain"))
    return SOME_FAILED if failed else 0


def anomaly(
    cohort: Path,
    *,
    features: Path,
    out: Path,
    target: str | None = None,
    classes: Classes = [],  # noqa: B006  cyclopts reads the default
    ignore: Ignore = [],  # noqa: B006
    maps: int = 3,
    folds: int = 5,
    seed: int = 0,
) -> None:
    """Score how far each scan is from the healthy ones, without diagnosis labels, and keep the healthy reference.

    Args:
        cohort: The table or BIDS folder that the features were extracted from.
        features: A feature folder made by `extract` with patch tokens (the default recipe).
        out: Folder to make: scores.csv, a figure, maps, and the reference that `score` asks about new scans.
        target: Column that says which scans are healthy (the first class); without it all are references.
        maps: Farthest scans whose deviation is laid over them as NIfTI, with a figure of their slices.
        folds: Healthy scans are held out in this many folds.
        seed: Decides folds and sampling.
    """
    from dinoatten3d.data.cohort import read_cohort
    from dinoatten3d.features.store import open_store
    from dinoatten3d.steps.anomaly import find_anomalies

    table = read_cohort(cohort, target=target, classes=classes, ignore=ignore)
    with progress_bars() as bar:
        sentences = find_anomalies(
            table, open_store(features), out, maps=maps, folds=folds, seed=seed, progress=bar("scoring")
        )
    for sentence in sentences:
        print(sentence)


def score(
    reference: Path,
    scans: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    out: Path | None = None,
    backbone: BackboneName = None,
    device: Device = "cpu",
) -> int:
    """Say how far new scans are from the healthy ones that `anomaly` learnt from.

    Args:
        reference: A folder made by `anomaly`.
        scans: NIfTI or DICOM, one or several.
        out: Folder for a map, a figure and the answer of each scan; without it the answer is only printed.
    """
    from dinoatten3d.inference.healthy import open_reference, score_scan
    from dinoatten3d.steps.anomaly import keep_scan_anomaly

    healthy = open_reference(reference)
    model = fetch_same_backbone(healthy.config["features"]["backbone"], device, backbone)
    failed = 0
    for scan in scans:
        try:
            found = score_scan(healthy, scan, model)
        except ScanError as error:
            say.print(f"failed: {error}", markup=False, style="red")
            failed += 1
            continue
        answer = found.to_dict()
        print(
            f"{answer['name']}: farther than {answer['farther_than']:g} of {answer['healthy']} held-out healthy scans "
            f"(score {answer['score']:.2f})"
        )
        for place in answer["heaviest_slices"]:
            print(f"  {place['plane']:<8} {place['position_mm']:7.1f} mm  {place['score']:.2f} sd")
        for note in answer["notes"]:
            print(f"  note: {note}")
        if out is not None:
            print(f"  {keep_scan_anomaly(found, out)}")
    if failed < len(scans):
        print("For research, not for diagnosis.")
    return SOME_FAILED if failed else 0
