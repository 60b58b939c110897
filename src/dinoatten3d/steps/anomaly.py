"""The steps that the commands `anomaly` and `score` are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinoatten3d.data.cohort import Cohort, stem
from dinoatten3d.data.slices import Slices, take_slices
from dinoatten3d.data.volume import Volume, load_volume
from dinoatten3d.errors import RunError
from dinoatten3d.evaluation.intervals import delong_interval
from dinoatten3d.features.store import FeatureStore
from dinoatten3d.files import whole_folder, write_json
from dinoatten3d.inference.anomaly import score_anomalies
from dinoatten3d.inference.explain import patch_volume
from dinoatten3d.inference.healthy import ScanAnomaly, write_reference
from dinoatten3d.learning.bags import load_bags
from dinoatten3d.report.anomaly_figures import anomaly_scores_figure, deviation_figure
from dinoatten3d.steps.explain import explanation_folder

Progress = Callable[[int, int], None]


def find_anomalies(
    cohort: Cohort, store: FeatureStore, out: Path, *, maps: int, folds: int, seed: int, progress: Progress
) -> list[str]:
    """Write the folder of an anomaly run and say in a few sentences what it holds.

    Raises:
        RunError: `out` exists.
        CohortError, FeatureError: There are too few references, or no patch tokens.
    """
    if out.exists():
        raise RunError(f"{out} exists; choose another --out or remove it")
    bags = load_bags(cohort, store)
    found = score_anomalies(bags, folds=folds, seed=seed, progress=progress)
    table = found.table
    healthy = cohort.classes[0] if cohort.classes else "all scans"
    made_by = {"cohort": str(cohort.source.resolve()), "healthy": healthy, "folds": folds, "seed": seed}
    with whole_folder(out) as folder:
        write_reference(folder, bags, found, store=store, made_by=made_by)
        (folder / "scores.png").write_bytes(anomaly_scores_figure(table, healthy))
        for row in table["score"].nlargest(maps).index:
            path = bags.scans[row].path
            volume = load_volume(path)
            slices = take_slices(volume, store.slices)
            name = f"{stem(path)}-{row}"  # files of two subjects may have one name
            title = f"{bags.scans[row].id}: score {table['score'][row]:.1f}"
            _write_deviation(folder / "maps" / name, found.maps[row], found.slice_scores[row], slices, volume, title)
    top = table.loc[table["score"].idxmax()]
    sentences = [
        f"{out}: {len(table)} scans; the farthest is {top['scan_id']} "
        f"({top['heaviest_slice_plane']} {top['heaviest_slice_mm']:.0f} mm)."
    ]
    for name in cohort.classes[1:]:
        kept = table[table["label"].isin([healthy, name])]
        if kept.groupby("label")["subject"].nunique().min() < 2:
            sentences.append(f"{name} against {healthy}: one subject of a class has no AUROC.")
            continue
        positive = (kept["label"] == name).to_numpy()
        auroc = delong_interval(positive.astype(int), kept["score"].to_numpy(), subjects=kept["subject"].to_numpy())
        sentences.append(
            f"{name} against {healthy}: AUROC {auroc.value:.2f} (95 % interval {auroc.low:.2f} to "
            f"{auroc.high:.2f}); no label of {name} was used."
        )
    return [*sentences, "For research, not for diagnosis."]


def keep_scan_anomaly(found: ScanAnomaly, out: Path) -> Path:
    """Keep the answer for one scan in the folder `out/<scan>`: map, figure and JSON.

    Raises:
        RunError: The folder exists.
    """
    target = explanation_folder(found.scan, out)
    title = f"{stem(found.scan)}: farther than {found.farther_than:g} of {found.healthy} healthy scans"
    with whole_folder(target) as folder:
        write_json(folder / "anomaly.json", found.to_dict())
        _write_deviation(folder, found.patch_map, found.slice_scores, found.slices, found.volume, title)
    return target


def _write_deviation(
    folder: Path,
    patch_map: NDArray[np.float32],
    slice_scores: NDArray[np.float64],
    slices: Slices,
    volume: Volume,
    title: str,
) -> None:
    """Write a patch map over its scan, and a figure of the slices that deviate most."""
    folder.mkdir(parents=True, exist_ok=True)
    patch_volume(patch_map, slices, volume).to_filename(folder / "deviation.nii.gz")
    picture = deviation_figure(slices.pixels, slices.position_mm, slice_scores, patch_map, slices.planes, title=title)
    (folder / "slices.png").write_bytes(picture)
