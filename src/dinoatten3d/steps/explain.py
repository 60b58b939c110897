"""A prediction becomes a folder with maps, a table and a figure."""

from __future__ import annotations

from pathlib import Path

from dinoatten3d.data.cohort import stem
from dinoatten3d.errors import RunError
from dinoatten3d.files import whole_folder, write_json
from dinoatten3d.inference.explain import deviation_map, explain, slice_weight_map
from dinoatten3d.inference.predict import Prediction
from dinoatten3d.report.slices_figure import slice_weights_figure


def explanation_folder(scan: Path, out: Path) -> Path:
    """Give the folder that what is said of a scan will be.

    Raises:
        RunError: It exists.
    """
    target = out / stem(scan)
    if target.exists():
        raise RunError(f"{target} exists; choose another --out or remove it")
    return target


def explain_scan(prediction: Prediction, out: Path) -> Path:
    """Explain a scan in the folder `out/<scan>`: two maps, a table, a figure and the answer."""
    target = explanation_folder(prediction.scan, out)
    with whole_folder(target) as folder:
        explain(prediction).to_csv(folder / "weights.csv", index=False)
        slice_weight_map(prediction).to_filename(folder / "weights.nii.gz")
        deviation = deviation_map(prediction)
        if deviation is not None:
            deviation.to_filename(folder / "deviation.nii.gz")
        chance = ", ".join(f"{n} {p:.2f}" for n, p in zip(prediction.classes, prediction.probabilities, strict=True))
        picture = slice_weights_figure(
            prediction.slices.pixels,
            prediction.slices.position_mm,
            prediction.slice_weights,
            prediction.slices.planes,
            title=f"{stem(prediction.scan)}: {chance}",
        )
        (folder / "slices.png").write_bytes(picture)
        write_json(folder / "prediction.json", prediction.to_dict())
    return target
