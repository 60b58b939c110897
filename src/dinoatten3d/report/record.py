"""A finished run, read back from its folder and checked, as tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dinoatten3d.errors import ConfigError, RunError
from dinoatten3d.evaluation.metrics import check_predictions
from dinoatten3d.learning.run import FORMAT_VERSION
from dinoatten3d.toml import read_toml

CURVE = "learning_curve.json"
_NUMBERS = ("repeat", "fold", "age", "brain_ml", "slice", "position_mm", "weight")
_HISTORY = ("train_loss", "validation_loss", "validation_auroc")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run left behind; names and labels are text, whatever they look like.

    Attributes:
        folder: The run folder.
        config: `config.toml`.
        metrics: `metrics.json`.
        environment: `environment.json`.
        cohort: One row a scan.
        splits: scan_id, subject, label, repeat, fold (-1: only trained on).
        predictions: Pooled out-of-fold: scan_id, subject, label, fold, predicted, p_<class>.
        baselines: The same for every baseline, named in `model`; empty where none was run.
        attention: One row a slice: scan_id, fold, label, slice, plane, position_mm, weight.
        audit: `audit.json`; None in a run that has none.
        learning_curve: `learning_curve.json`; empty where none was drawn.
        history: One row an epoch: fold, member, epoch, train_loss, validation_loss, chosen; may be empty.
    """

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    environment: dict[str, Any]
    cohort: pd.DataFrame
    splits: pd.DataFrame
    predictions: pd.DataFrame
    baselines: pd.DataFrame
    attention: pd.DataFrame
    learning_curve: dict[str, Any]
    history: pd.DataFrame
    audit: dict[str, Any] | None = None

    @property
    def classes(self) -> list[str]:
        """Names of the classes; of two the second is the positive one."""
        return [str(name) for name in self.config["cohort"]["classes"]]


def read_record(folder: Path) -> Record:
    """Read a run folder.

    Raises:
        RunError: It is missing, unfinished, of another format, or a file of it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"run folder {folder} does not exist; make one with `dinoatten3d train`")
    config = _config(folder)
    columns = [f"p_{name}" for name in config["cohort"]["classes"]]
    probabilities = ("scan_id", "subject", "label", "fold", *columns)
    record = Record(
        folder=folder,
        config=config,
        metrics=_metrics(folder),
        environment=_json(folder, "environment.json"),
        cohort=_table(folder, "cohort.csv", ("scan_id", "subject", "label")),
        splits=_table(folder, "splits.csv", ("scan_id", "subject", "label", "repeat", "fold")),
        predictions=_table(folder, "predictions.csv", (*probabilities, "predicted")),
        baselines=_baselines(folder, ("model", *probabilities)),
        attention=_table(folder, "attention.csv", ("scan_id", "label", "plane", "position_mm", "weight")),
        learning_curve=_json(folder, CURVE) if (folder / CURVE).exists() else {},
        history=_history(folder),
        audit=_json(folder, "audit.json") if (folder / "audit.json").exists() else None,
    )
    probabilities_of(record.predictions, record.classes)
    return record


def probabilities_of(predictions: pd.DataFrame, classes: list[str]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Give the class index of each row, `[n]`, and its probabilities, `[n, K]`.

    Raises:
        RunError: A label is not one of the classes, or a row holds no probabilities.
    """
    strangers = sorted(set(predictions["label"]) - set(classes))
    if strangers:
        raise RunError(f"a prediction has label '{strangers[0]}'; wanted one of {', '.join(classes)}")
    labels = predictions["label"].map({name: index for index, name in enumerate(classes)}).to_numpy(np.int64)
    probabilities = predictions[[f"p_{name}" for name in classes]].to_numpy(np.float64)
    check_predictions(labels, probabilities)
    return labels, probabilities


def _config(folder: Path) -> dict[str, Any]:
    _require(folder, "config.toml")
    try:
        config = read_toml(folder / "config.toml")
    except ConfigError as error:
        raise RunError(str(error)) from None
    _check_format(folder, config)
    for name in ("run", "cohort", "features", "recipe", "evaluation"):
        if name not in config:
            raise RunError(f"{folder / 'config.toml'} has no table [{name}]; train again")
    return config


def _metrics(folder: Path) -> dict[str, Any]:
    metrics = _json(folder, "metrics.json")
    _check_format(folder, metrics)
    wanted = ("scans", "subjects", "class_counts", "folds", "bootstrap", "models", "chance", "verdict")
    missing = [name for name in wanted if name not in metrics]
    if missing:
        raise RunError(f"{folder / 'metrics.json'} has no entry '{missing[0]}'; train again")
    if not any(model.get("role") == "model" for model in metrics["models"]):
        raise RunError(f"{folder / 'metrics.json'} names no model with the role 'model'; train again")
    return metrics


def _check_format(folder: Path, found: dict[str, Any]) -> None:
    if found.get("format_version") != FORMAT_VERSION:
        seen = found.get("format_version", "unknown")
        raise RunError(
            f"run folder {folder} has format {seen}, this program reads {FORMAT_VERSION}; "
            "use the version of dinoatten3d that made it, or train again"
        )


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(_require(folder, name))
    except ValueError as error:
        raise RunError(f"{folder / name} is not a JSON file ({error}); train again") from None
    if not isinstance(found, dict):
        raise RunError(f"{folder / name} holds a {type(found).__name__}, wanted an object; train again")
    return found


def _table(folder: Path, name: str, columns: tuple[str, ...]) -> pd.DataFrame:
    """Read a CSV as text and turn the known columns into numbers; a class called NA stays a class."""
    content = _require(folder, name)
    try:
        table = pd.read_csv(StringIO(content), dtype=str, keep_default_na=False)
        for column in table.columns:
            if column in _NUMBERS or column.startswith("p_"):
                table[column] = pd.to_numeric(table[column].replace("", np.nan))
    except ValueError as error:
        raise RunError(f"{folder / name} cannot be read as a table ({error}); train again") from None
    missing = [column for column in columns if column not in table]
    if missing or table.empty:
        seen = f"no column '{missing[0]}'" if missing else "no rows"
        raise RunError(f"{folder / name} has {seen}; wanted {', '.join(columns)}; train again")
    return table


def _baselines(folder: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    if not (folder / "baselines.csv").exists():
        return pd.DataFrame(columns=list(columns))
    return _table(folder, "baselines.csv", columns)


def _history(folder: Path) -> pd.DataFrame:
    """Join the histories of all folds, in order; a fold without one (a closed-form head) adds nothing."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("fold-*/history.jsonl"), key=lambda path: (len(str(path)), str(path))):
        fold = path.parent.name.removeprefix("fold-")
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise RunError(f"{path} is not a JSON-lines file ({error}); train again") from None
        rows += [{"fold": fold, "member": 0, "chosen": False, **line} for line in lines]
    history = pd.DataFrame(rows, columns=["fold", "member", "epoch", *_HISTORY, "chosen"])
    for name in _HISTORY:
        history[name] = pd.to_numeric(history[name])
    return history.astype({"chosen": bool})


def _require(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunError(
            f"run folder {folder} has no {name}, so it is unfinished; run `dinoatten3d train` again"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{folder / name} cannot be read ({error}); train again") from None
