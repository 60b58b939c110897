"""A `Run`: the folder that training leaves behind, and reading it back."""

from __future__ import annotations

import json
import os
import platform
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import tomli_w
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dinoatten3d import __version__
from dinoatten3d.config import EvaluationConfig, Recipe
from dinoatten3d.data.cohort import Cohort
from dinoatten3d.data.slices import planes_of
from dinoatten3d.errors import RunError
from dinoatten3d.features.reduce import Reduction, read_reduction, write_reduction
from dinoatten3d.features.store import REDUCTION, FeatureStore
from dinoatten3d.files import whole_folder, write_bytes, write_json, write_text
from dinoatten3d.learning.adapt import AdaptedFold
from dinoatten3d.learning.adjust import Adjustment
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.deviation_model import DeviationModel
from dinoatten3d.learning.fit import AdjustedModel, CrossValidation, FittedFold, FoldModel
from dinoatten3d.learning.model import SliceAttentionNet
from dinoatten3d.learning.splits import repeat_of
from dinoatten3d.learning.tables import attention_table, cohort_table, model_tables, probability_table, splits_table
from dinoatten3d.toml import from_dict, to_dict

FORMAT_VERSION = 3
PACKAGES = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "pandas", "nibabel", "peft", "accelerate")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run folder; get one with `open_run`."""

    folder: Path
    config: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; of two, the second is the positive one."""
        return tuple(self.config["cohort"]["classes"])

    @property
    def recipe(self) -> Recipe:
        """The recipe that was trained."""
        return from_dict(Recipe, self.config["recipe"], str(self.folder / "config.toml"))

    @property
    def evaluates(self) -> str | None:
        """The run whose models gave these answers, where this is an evaluation on another cohort."""
        found = self.config["run"].get("evaluates")
        return None if found is None else str(found)

    @property
    def folds(self) -> int:
        """Number of outer folds."""
        return len(list(self.folder.glob("fold-*")))

    def table(self, name: str) -> pd.DataFrame:
        """Read one of the run's tables; ids and names are text, and a class may be called NA."""
        text = (
            "scan_id",
            "subject",
            "label",
            "predicted",
            "path",
            "site",
            "sex",
            "session",
            "model",
            "sha256",
            "called",
            "set",
        )
        missing = {"age": ["", "nan"], "brain_ml": ["", "nan"]}
        try:
            return pd.read_csv(
                self.folder / name, dtype=dict.fromkeys(text, str), keep_default_na=False, na_values=missing
            )
        except (OSError, ValueError) as error:
            raise RunError(f"{self.folder / name} cannot be read ({error}); train again") from None

    def document(self, name: str) -> dict[str, Any]:
        """Read one of the run's JSON files."""
        try:
            return dict(json.loads((self.folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{self.folder / name} cannot be read ({error}); train again") from None

    def reduction(self) -> Reduction | None:
        """Load the PCA of the patch tokens, where the recipe has one."""
        return read_reduction(self.folder / REDUCTION) if self.recipe.patches.pca else None

    def models(self) -> list[FoldModel]:
        """Load the model of every fold; an evaluation on another cohort has none of its own."""
        if self.evaluates is not None:
            return []
        return [
            _read_model(self.folder / f"fold-{k}" / "model.safetensors", self.choice(k)[1]) for k in range(self.folds)
        ]

    def choice(self, fold: int) -> tuple[str, Recipe]:
        """Give name and recipe of a fold's model: the run's, or what its inner folds chose."""
        if not (self.folder / f"fold-{fold}" / "choice.json").exists():
            return str(self.config["run"]["recipe"]), self.recipe
        found = self.document(f"fold-{fold}/choice.json")
        return str(found["chosen"]), from_dict(Recipe, found["recipe"], f"fold-{fold}/choice.json")


def write_run(
    out: Path,
    bags: Bags,
    result: CrossValidation,
    *,
    store: FeatureStore,
    config: dict[str, Any],
    baselines: Mapping[str, NDArray[np.float64]] = MappingProxyType({}),
    extras: Mapping[str, Any] = MappingProxyType({}),
) -> Run:
    """Write a run folder; it appears whole or not at all.

    Args:
        out: The folder, which must not exist yet.
        bags: The bags that were scored.
        result: What cross-validation gave.
        store: Where the features came from.
        config: Tables `run`, `cohort`, `features`, `recipe`, `evaluation` as `config.toml` holds them.
        baselines: Name to out-of-fold probabilities of simpler models on the same folds, `[repeats, scans, classes]`.
        extras: File name to the table, or the JSON, that it holds.

    Raises:
        RunError: `out` exists.
    """
    if out.exists():
        raise RunError(f"{out} exists; choose another --out or remove it (a run is never overwritten)")
    ids = [scan.id for scan in bags.scans]
    first = result.folds[0]
    predictions = probability_table(bags, result.scored.probabilities, first)
    attention = attention_table(bags, result.scored.weights, first)
    with whole_folder(out) as folder:
        write_text(folder / "config.toml", tomli_w.dumps({"format_version": FORMAT_VERSION, **config}))
        cohort_table(bags.scans, bags.brain_ml).to_csv(folder / "cohort.csv", index=False)
        splits_table(bags, result.folds).to_csv(folder / "splits.csv", index=False)
        predictions.to_csv(folder / "predictions.csv", index=False)
        attention.to_csv(folder / "attention.csv", index=False)
        if baselines:
            means = {name: by_repeat.mean(axis=0) for name, by_repeat in baselines.items()}
            model_tables(bags, means, first).to_csv(folder / "baselines.csv", index=False)
        if store.reduction is not None:  # a run answers for new scans without its feature folder
            write_reduction(folder / REDUCTION, store.reduction)
        for fold in range(int(result.folds.max()) + 1):
            place = folder / f"fold-{fold}"
            place.mkdir()
            repeat = repeat_of(result.folds, fold)
            own = probability_table(bags, result.by_repeat[repeat], result.folds[repeat])
            own[own["fold"] == fold].to_csv(place / "predictions.csv", index=False)
            if baselines:
                once = {name: by_repeat[repeat] for name, by_repeat in baselines.items()}
                rows = model_tables(bags, once, np.where(result.folds[repeat] == fold, fold, -1))
                rows.to_csv(place / "baselines.csv", index=False)
        for fold, fitted in enumerate(result.fitted):
            _write_model(folder / f"fold-{fold}", fitted, {"features": store.digest})
        for name, content in extras.items():
            if isinstance(content, pd.DataFrame):
                content.to_csv(folder / name, index=False)
            else:
                write_json(folder / name, content)
        write_json(folder / "environment.json", environment(seconds=result.seconds, scans=len(ids)))
    return open_run(out)


def open_run(folder: Path) -> Run:
    """Open a run folder.

    Raises:
        RunError: It is not one, is damaged, or was written in another format.
    """
    path = folder / "config.toml"
    if not path.exists():
        inside = sorted(p.parent for p in folder.glob("*/config.toml")) if folder.is_dir() else []
        hint = f"; did you mean {inside[0]}?" if inside else "; make one with `dinoatten3d train`"
        raise RunError(f"{folder} is not a run folder (it has no config.toml){hint}")
    try:
        config = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged: {error}") from None
    found = config.get("format_version")
    if found != FORMAT_VERSION:
        raise RunError(
            f"run folder {folder} has format {found}, this program reads {FORMAT_VERSION}; "
            "train again, or use the version that wrote it"
        )
    return Run(folder=folder, config=config)


def run_config(
    *,
    name: str,
    recipe_name: str,
    recipe: Recipe,
    evaluation: EvaluationConfig,
    cohort: Cohort,
    store: FeatureStore,
    note: str,
) -> dict[str, Any]:
    """Put together what `config.toml` holds; a `note` says that the cohort is made and how."""
    return {
        "run": {
            "name": name,
            "created": now(),
            "recipe": recipe_name,
            "version": __version__,
            "target": cohort.target,
        },
        "cohort": {
            "path": str(cohort.source.resolve()),
            "target": cohort.target,
            "classes": list(cohort.classes),
            "synthetic": bool(note),
            "note": note,
        },
        "features": {
            "folder": str(store.folder.resolve()),
            "digest": store.digest,
            "backbone": store.backbone["name"],
            "weights": store.backbone["title"],
            "source": store.backbone["source"],
            "backbone_identity": dict(store.backbone),
            "slices": to_dict(store.slices),
        },
        "recipe": acting_settings(replace(recipe, slices=store.slices, patches=store.patches)),
        "evaluation": to_dict(evaluation),
    }


def now() -> str:
    """Give the time as a run records it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def acting_settings(recipe: Recipe) -> dict[str, Any]:
    """Give the recipe's tables without the settings that its pooling makes no use of."""
    tables = to_dict(recipe)
    if recipe.model.pooling == "deviation":
        model = {name: tables["model"][name] for name in ("pooling", "layers")}
        return {**{name: tables[name] for name in ("slices", "patches", "adjust")}, "model": model}
    return tables if recipe.adapt == "lora" else {k: v for k, v in tables.items() if k != "lora"}


def _write_model(place: Path, fitted: FittedFold, header: dict[str, str]) -> None:
    write_bytes(place / "model.safetensors", save(fitted.model.tensors(), header))
    if isinstance(fitted, AdaptedFold):
        fitted.write(place)
    if fitted.choice is not None:
        chosen = {"chosen": fitted.choice.name, "inner_auroc": fitted.choice.aurocs}
        write_json(place / "choice.json", chosen | {"recipe": to_dict(fitted.choice.recipe)})
    lines = [json.dumps(row) for row in fitted.history]
    if lines:
        write_text(place / "history.jsonl", "\n".join(lines) + "\n")


def environment(**more: Any) -> dict[str, Any]:
    """Describe the machine and the versions that made a run."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "dinoatten3d": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        **versions,
        **more,
    }


def _read_model(path: Path, recipe: Recipe) -> FoldModel:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise RunError(f"{path} is missing or damaged ({error}); train again") from None
    adjusting = {name.removeprefix("adjust."): t for name, t in tensors.items() if name.startswith("adjust.")}
    if adjusting:
        model = _model_of({name: t for name, t in tensors.items() if not name.startswith("adjust.")}, recipe)
        return AdjustedModel(adjustment=Adjustment.from_tensors(adjusting), model=model)
    return _model_of(tensors, recipe)


def _model_of(tensors: dict[str, Tensor], recipe: Recipe) -> FoldModel:
    if recipe.model.pooling == "deviation":
        return DeviationModel.from_tensors(tensors)
    model = SliceAttentionNet(
        dim=tensors["mean"].shape[-1],
        classes=tensors["classifier.bias"].shape[-1],
        members=recipe.training.members,
        config=recipe.model,
        generator=torch.Generator().manual_seed(0),
        planes=planes_of(recipe.slices),
    )
    model.load_state_dict(tensors)
    return model.eval()
