"""A finished run on people it has never seen: the models as they are, on another cohort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinoatten3d.data.cohort import Cohort, Scan
from dinoatten3d.errors import DinoAtten3DError, RunError
from dinoatten3d.evaluation.controls import run_baselines, shuffle_between_subjects
from dinoatten3d.evaluation.metrics import score
from dinoatten3d.features.store import FeatureStore
from dinoatten3d.files import sha256
from dinoatten3d.learning.bags import Bags, load_bags
from dinoatten3d.learning.fit import CrossValidation, Scored
from dinoatten3d.learning.run import Run

Array = NDArray[np.float64]
SHUFFLES = 999


def refuse_seen(run: Run, cohort: Cohort) -> None:
    """Refuse a cohort that shares a person or a file with the run's, or does not have the classes that the run has.

    Raises:
        RunError: It does; the message names the first one.
    """
    strangers = sorted(set(cohort.classes) - set(run.classes))
    if strangers:
        raise RunError(f"class '{strangers[0]}' is none of the run's: {', '.join(run.classes)}; group with --classes")
    held = {scan.label for scan in cohort.scans}
    absent = [name for name in run.classes if name not in held]
    if absent:
        raise RunError(
            f"no scan of this cohort is of class '{absent[0]}', which the run tells from the others; add some, or "
            "train a run on the classes that both cohorts have"
        )
    known = run.table("cohort.csv")
    people, files = set(known["subject"]), dict(zip(known["sha256"], known["scan_id"], strict=True))
    for scan in cohort.scans:
        if scan.subject in people:
            raise RunError(
                f"row {scan.row}: subject {scan.subject} is in the run's own cohort, so it is no test of it; leave it "
                "out, or rename it if it is another person of that name"
            )
        content = sha256(scan.path)
        if content in files:
            raise RunError(
                f"row {scan.row}: {scan.path.name} is the same file as {files[content]} of the run's own cohort, so it "
                "is no test of it; leave it out"
            )


def refuse_other_features(run: Run, store: FeatureStore) -> None:
    """Refuse features that were made in another way than those the run was trained on.

    Raises:
        RunError: They were.
    """
    wanted = run.config["features"]["digest"]
    if store.digest != wanted:
        raise RunError(
            f"{store.folder} holds features {store.digest}, run {run.folder} was trained on {wanted}; extract this "
            "cohort with the same backbone, slices and patches"
        )


def external_answers(run: Run, bags: Bags) -> list[Scored]:
    """Score scans with the model of every fold."""
    return [Scored(probabilities=p, weights=w) for p, w in (model.score(bags) for model in run.models())]


def as_one_fold(answers: Sequence[Scored]) -> CrossValidation:
    """Average the models' answers, as `predict` does; all scans are one fold, for which nothing was fitted."""
    mean = Scored(
        probabilities=np.mean([a.probabilities for a in answers], axis=0),
        weights=np.mean([a.weights for a in answers], axis=0),
    )
    return CrossValidation(
        folds=np.zeros((1, len(mean.weights)), np.int64),
        by_repeat=mean.probabilities[None],
        scored=mean,
        fitted=(),
        seconds=0.0,
    )


def external_baselines(run: Run, cohort: Cohort, store: FeatureStore) -> dict[str, Array]:
    """Fit the controls on the run's own cohort and score the external scans, `[1, scans, classes]` each.

    Where the run's own scans have moved, or their features are in another folder, only the class frequencies are left.
    """
    own = _own_scans(run)
    held_out = np.repeat([-1, 0], [len(own), len(cohort)])
    try:
        both = load_bags(replace(cohort, scans=own + cohort.scans), store)
    except (DinoAtten3DError, OSError):
        frequencies = np.bincount([run.classes.index(str(scan.label)) for scan in own]) / len(own)
        return {"prior": np.tile(frequencies, (1, len(cohort), 1))}
    found = run_baselines(both, held_out, run.config["cohort"]["target"], run.recipe.adjust)
    return {name: probabilities[:, len(own) :] for name, probabilities in found.items()}


def shuffled_external(bags: Bags, result: CrossValidation, *, seed: int) -> list[float]:
    """Give the AUROCs of the same answers against labels that changed hands between subjects."""
    rng = np.random.default_rng(seed)
    answers = result.scored.probabilities
    return [score(shuffle_between_subjects(bags, rng), answers).auroc for _ in range(SHUFFLES)]


def _own_scans(run: Run) -> tuple[Scan, ...]:
    return tuple(
        Scan(
            id=row["scan_id"],
            path=Path(row["path"]),
            subject=row["subject"],
            row=number,
            label=row["label"],
            site=row["site"] or None,
            age=None if np.isnan(row["age"]) else float(row["age"]),
            sex=row["sex"] or None,
        )
        for number, row in enumerate(run.table("cohort.csv").to_dict("records"), start=2)
    )
