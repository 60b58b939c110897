"""The answers of several models to the same scans: read from runs, and refused where they are no pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dinoatten3d.errors import RunError
from dinoatten3d.evaluation.controls import baselines
from dinoatten3d.learning.run import Run


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one model answered, out of fold.

    Attributes:
        name: Unique among those that are compared.
        role: The model of a run, or a baseline on its folds.
        description: The recipe, or what the baseline does.
        run: Where it comes from.
        pooled: Indexed by scan_id: subject, label, p_<class>.
        folds: The same for each fold alone.
        splits: scan_id, repeat, fold (-1: only trained on).
    """

    name: str
    role: Literal["model", "baseline"]
    description: str
    run: Run
    pooled: pd.DataFrame
    folds: list[pd.DataFrame]
    splits: pd.DataFrame

    def partition(self) -> str:
        """Say in a few words who was held out when."""
        if self.run.evaluates is not None:
            return f"another cohort, by the models of {Path(self.run.evaluates).name}"
        repeats = self.splits["repeat"].nunique()
        folds = self.run.folds // repeats
        kind = self.run.config["evaluation"].get("split", "folds")
        by = {"folds": "", "site": ", one a site", "column": ", given by the table"}[kind]
        return f"{folds} fold{'s' if folds > 1 else ''}{f' × {repeats}' if repeats > 1 else ''}{by}"


def read_answers(runs: Sequence[Run], *, with_baselines: bool = False) -> list[Answers]:
    """Read the answers of each run, and of the baselines of the first where they are wanted.

    Raises:
        RunError: There are fewer than two runs, one is given twice, or they answer different questions.
    """
    names = _names(runs)
    _check_same_question(runs, names)
    found = [_of_model(run, name) for run, name in zip(runs, names, strict=True)]
    return found + (_of_baselines(runs[0], names) if with_baselines else [])


def common_scans(answers: Sequence[Answers]) -> pd.DataFrame:
    """Give subject and label of the scans that every model scored, indexed by scan_id, in the first run's order.

    Raises:
        RunError: There is none, or too few of a class, or two runs call one scan by different labels or subjects.
    """
    index = reduce(lambda kept, own: kept[kept.isin(own.pooled.index)], answers, answers[0].pooled.index)
    if index.empty:
        raise RunError("the runs have no scan in common (by scan_id); compare runs of the same cohort")
    common = answers[0].pooled.loc[index, ["subject", "label"]]
    for own in answers[1:]:
        for column in ("label", "subject"):
            theirs = own.pooled.loc[index, column]
            differ = common[column] != theirs
            if differ.any():
                scan = differ.idxmax()
                raise RunError(
                    f"{differ.sum()} scans have another {column} in {own.name} than in {answers[0].name} (scan {scan}: "
                    f"{theirs[scan]} and {common.loc[scan, column]}); train both on the same table"
                )
    for name in answers[0].run.classes:
        people = common.loc[common["label"] == name, "subject"].nunique()
        if people < 2:
            raise RunError(
                f"the {len(common)} common scans hold {people} subjects of class '{name}', 2 or more are needed; "
                "compare runs of the same cohort"
            )
    return common


def one_scan_a_subject(first: Run, common: pd.DataFrame) -> NDArray[np.int64]:
    """Give the row of each subject's first scan, by session, then by name: a choice that knows no answer."""
    session = first.table("cohort.csv").set_index("scan_id")["session"].reindex(common.index)
    order = common.assign(session=session, row=range(len(common))).rename_axis("scan_id")
    rows = order.sort_values(["session", "scan_id"], kind="stable").groupby("subject")["row"].first()
    return np.sort(rows.to_numpy())


def other_files(answers: Sequence[Answers], common: pd.DataFrame) -> int:
    """Count the common scans whose image file is another in some run (other preprocessing, say)."""
    tables = [own.run.table("cohort.csv").set_index("scan_id").loc[common.index, "sha256"] for own in answers]
    return int(sum(len(set(digests) - {""}) > 1 for digests in zip(*tables, strict=True)))


def _names(runs: Sequence[Run]) -> list[str]:
    """Call each run after its folder, with the way to it where two folders have one name."""
    if len(runs) < 2:
        raise RunError(f"{len(runs)} run was given; give two or more to compare")
    places = [run.folder.resolve() for run in runs]
    twice = [place for place, count in Counter(places).items() if count > 1]
    if twice:
        raise RunError(f"{twice[0]} is given twice; give each run once")
    short = Counter(place.name for place in places)
    return [place.name if short[place.name] == 1 else f"{place.parent.name}/{place.name}" for place in places]


def _check_same_question(runs: Sequence[Run], names: Sequence[str]) -> None:
    first, *others = runs
    for run, name in zip(others, names[1:], strict=True):
        for what, wanted, seen in (
            ("target", first.config["cohort"]["target"], run.config["cohort"]["target"]),
            ("classes", ", ".join(first.classes), ", ".join(run.classes)),
        ):
            if wanted != seen:
                raise RunError(
                    f"the {what} of {names[0]}: {wanted}; of {name}: {seen}; runs that answer different questions "
                    "cannot be compared, train them with the same --target and --classes, in the same order"
                )


def _of_model(run: Run, name: str) -> Answers:
    return Answers(
        name=name,
        role="model",
        description=run.config["run"]["recipe"],
        run=run,
        pooled=run.table("predictions.csv").set_index("scan_id"),
        folds=[run.table(f"fold-{k}/predictions.csv").set_index("scan_id") for k in range(run.folds)],
        splits=run.table("splits.csv"),
    )


def _of_baselines(run: Run, taken: Sequence[str]) -> list[Answers]:
    described = {b.name: b.description for b in baselines(run.config["cohort"]["target"])}
    folds = [run.table(f"fold-{k}/baselines.csv") for k in range(run.folds)]
    return [
        Answers(
            name=f"{name} (baseline)" if name in taken else str(name),
            role="baseline",
            description=described.get(str(name), ""),
            run=run,
            pooled=rows.set_index("scan_id"),
            folds=[fold[fold["model"] == name].set_index("scan_id") for fold in folds],
            splits=run.table("splits.csv"),
        )
        for name, rows in run.table("baselines.csv").groupby("model", sort=False)
        if name != "prior"  # knows nothing, and pooled over folds of unequal prevalence falls far below 0.5
    ]
