"""One scan and a run become a `Prediction`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinoatten3d.config import SliceConfig
from dinoatten3d.data.cohort import Scan, stem
from dinoatten3d.data.slices import Slices, take_slices
from dinoatten3d.data.volume import Volume, load_volume
from dinoatten3d.errors import RunError
from dinoatten3d.evaluation.decisions import Decisions, decide, read_calibrations
from dinoatten3d.features.backbone import Backbone
from dinoatten3d.features.extract import embed_slices
from dinoatten3d.files import sha256
from dinoatten3d.inference.covariates import NOTHING_KNOWN, Covariates, of_cohort
from dinoatten3d.learning.adapter import embed_entries, enter, read_adapter
from dinoatten3d.learning.bags import Bags, choose_layers, one_bag
from dinoatten3d.learning.fit import AdjustedModel
from dinoatten3d.learning.run import Run
from dinoatten3d.toml import from_dict


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer for one scan.

    Attributes:
        scan: The file.
        classes: Names of the classes.
        probabilities: Mean over the models, `[classes]`.
        by_fold: What the model of each outer fold says, `[models, classes]`.
        slice_weights: Mean slice attention, `[slices]`, summing to 1.
        decisions: Calibrated probabilities, the class called and conformal p-values; None where the run was too small
            to calibrate.
        alpha: Share of a class that may fall outside its prediction sets.
        patch_map: How much each patch deviates from the reference class, mean over the models, in standard
            deviations, `[slices, rows, columns]`; None where the recipe looks at slices alone.
        slices: The pictures that were looked at.
        volume: The scan in RAS+.
        notes: What a reader should know, one sentence each.
    """

    scan: Path
    classes: tuple[str, ...]
    probabilities: NDArray[np.float64]
    by_fold: NDArray[np.float64]
    slice_weights: NDArray[np.float64]
    decisions: Decisions | None = None
    alpha: float = 0.1
    patch_map: NDArray[np.float32] | None
    slices: Slices
    volume: Volume
    notes: tuple[str, ...]

    @property
    def predicted(self) -> str:
        """The most probable class."""
        return self.classes[int(self.probabilities.argmax())]

    def to_dict(self) -> dict[str, Any]:
        """Give what `predict` writes as JSON."""
        named = dict(zip(self.classes, self.probabilities.tolist(), strict=True))
        spread = self.by_fold.std(axis=0) if len(self.by_fold) > 1 else np.full(len(self.classes), np.nan)
        heaviest = np.argsort(-self.slice_weights, kind="stable")[:5]
        return {
            "scan": str(self.scan),
            "name": stem(self.scan),
            "predicted": self.predicted,
            "probabilities": named,
            "sd_over_models": dict(zip(self.classes, spread.tolist(), strict=True)),
            "models": len(self.by_fold),
            "heaviest_slices": [
                {
                    "slice": int(i),
                    "plane": self.slices.planes[i],
                    "position_mm": float(self.slices.position_mm[i]),
                    "weight": float(self.slice_weights[i]),
                }
                for i in heaviest
            ],
            "planes": list(dict.fromkeys(self.slices.planes)),
            "brain_ml": self.slices.brain_ml,
            "notes": list(self.notes),
            **self._decided(),
            "use": "for research, not for diagnosis",
        }

    def _decided(self) -> dict[str, Any]:
        if self.decisions is None:
            return {}
        calibrated, p_values = self.decisions.probabilities[0], self.decisions.p_values[0]
        return {
            "calibrated": dict(zip(self.classes, calibrated.tolist(), strict=True)),
            "called": self.classes[int(self.decisions.called[0])],
            "set": [name for name, p in zip(self.classes, p_values, strict=True) if p > self.alpha],
            "set_coverage_wanted": 1 - self.alpha,
        }


def predict(run: Run, scan: Path, backbone: Backbone, known: Covariates = NOTHING_KNOWN) -> Prediction:
    """Classify one scan with the models of all folds.

    A scan of the training cohort (known by its content) is classified by the one model that never saw its subject.

    Args:
        run: A finished run.
        scan: NIfTI or DICOM.
        backbone: The encoder that made the run's features.
        known: Covariates of the person, for a run that adjusts for them; a scan of the cohort has those of its row.

    Raises:
        ScanError: The scan cannot be used.
        RunError: The backbone is not the run's, or the run is an evaluation without models.
    """
    if run.evaluates is not None:
        raise RunError(f"{run.folder} is an evaluation and has no models of its own; give {run.evaluates}")
    made_with = run.config["features"]["backbone_identity"]
    if made_with["sha256"] != backbone.identity["sha256"]:
        raise RunError(
            f"run {run.folder} was made with {made_with['name']} ({made_with['sha256'][:12]}), "
            f"not {backbone.identity['name']} ({backbone.identity['sha256'][:12]}); pass the same with --backbone"
        )
    for part, told in (("position_table", "position table"), ("pixels", "pixel statistics")):
        wanted, seen = (identity.get(part, "ImageNet") for identity in (made_with, backbone.identity))
        if wanted != seen:
            raise RunError(
                f"the features of run {run.folder} were made with {told} '{wanted}', this backbone is loaded with "
                f"'{seen}'; load it as the run's config.toml says"
            )
    volume = load_volume(scan)
    slices = take_slices(volume, from_dict(SliceConfig, run.config["features"]["slices"], "config.toml"))
    features = embed_slices(slices, backbone, run.recipe.patches, reduction=run.reduction())
    features = choose_layers(features, run.recipe.patches.layers, run.recipe.model.layers)
    notes = list(volume.notes)
    models, calibrations = run.models(), read_calibrations(run)
    held_out_in = _folds_of(run, scan)
    folds = held_out_in or list(range(len(models)))
    models = [models[fold] for fold in folds]
    if held_out_in:
        calibrations = [calibrations[fold] for fold in folds] if calibrations else None
        numbers = ", ".join(map(str, held_out_in))
        notes.append(f"this scan is in the training cohort: only models that never saw it answer (fold {numbers})")
    elif held_out_in is not None:
        notes.append("this scan was trained on by every model: its answer says nothing about how good they are")
    known = known if held_out_in is None else of_cohort(run, scan)
    bag = one_bag(Scan(id=stem(scan), path=scan, subject="", row=0, **known._asdict()), features, run.classes)
    by_fold, weights, maps = [], [], []
    notes += sorted({note for model in models for note in model.notes()})
    notes += sorted({note for model in models if isinstance(model, AdjustedModel) for note in model.unknown(bag)})
    bags = [bag] * len(folds) if run.recipe.adapt == "none" else _adapted(run, folds, bag, slices, backbone)
    for model, own in zip(models, bags, strict=True):
        seen = model.look(own)
        by_fold.append(seen.probabilities[0])
        weights.append(seen.weights[0])
        if seen.patch_maps is not None:
            maps.append(seen.patch_maps[0])
    return Prediction(
        scan=scan,
        classes=run.classes,
        probabilities=np.mean(by_fold, axis=0),
        by_fold=np.stack(by_fold),
        slice_weights=np.mean(weights, axis=0),
        decisions=decide(calibrations, [answer[None] for answer in by_fold]) if calibrations else None,
        alpha=float(run.config["evaluation"]["alpha"]),
        patch_map=np.mean(maps, axis=0, dtype=np.float32) if maps else None,
        slices=slices,
        volume=volume,
        notes=tuple(notes),
    )


def _adapted(run: Run, folds: Sequence[int], bag: Bags, slices: Slices, backbone: Backbone) -> list[Bags]:
    """Give the bag as the backbone of each of these folds sees it."""
    config = run.recipe.lora
    entry = enter(backbone, slices.pixels, config.blocks)
    adapters = (read_adapter(run.folder / f"fold-{fold}" / "adapter", backbone, config) for fold in folds)
    return [replace(bag, features=embed_entries(upper, [entry])) for upper in adapters]


def _folds_of(run: Run, scan: Path) -> list[int] | None:
    """Give the folds in which a scan of the cohort was held out, None for a new scan."""
    cohort = run.table("cohort.csv")
    same = cohort.loc[cohort["sha256"] == sha256(scan), "scan_id"]
    if same.empty:
        return None
    splits = run.table("splits.csv")
    folds = splits.loc[splits["scan_id"] == same.iloc[0], "fold"]
    return [int(fold) for fold in folds if fold >= 0]
