"""The commands `anomaly` and `score`: how far scans are from the healthy ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dinoatten3d.console import fetch_same_backbone, progress_bars, say
from dinoatten3d.errors import ScanError
from dinoatten3d.options import BackboneName, Classes, Device, Ignore

SOME_FAILED = 3
"""Exit code when some scans could not be used and the others were."""


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
    from dinoatten3d.steps_anomaly import find_anomalies

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
    from dinoatten3d.steps_anomaly import keep_scan_anomaly

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
