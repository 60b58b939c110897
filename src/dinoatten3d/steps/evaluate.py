"""A run and another cohort become a folder like a run's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dinoatten3d.data.cohort import Cohort
from dinoatten3d.errors import RunError
from dinoatten3d.evaluation.decisions import (
    decide,
    decision_table,
    read_calibrations,
)
from dinoatten3d.evaluation.external import (
    as_one_fold,
    external_answers,
    external_baselines,
    refuse_other_features,
    refuse_seen,
    shuffled_external,
)
from dinoatten3d.evaluation.metrics import score
from dinoatten3d.features.store import FeatureStore
from dinoatten3d.learning.bags import Bags, load_bags
from dinoatten3d.learning.fit import Scored
from dinoatten3d.learning.run import Run, now, write_run
from dinoatten3d.steps.train import report_run

JUDGED_BY = ("seed", "bootstrap", "sensitivity", "alpha")
"""What an evaluation takes over of the run's settings; how the run was split has no part in it."""


def evaluate_run(run: Run, cohort: Cohort, store: FeatureStore, out: Path) -> Run:
    """Score another cohort with the models of a run, and leave a folder with tables, figures and a report.

    Raises:
        RunError: The cohort shares a person or a file with the run's, its features were made in another way, `out`
            exists, or `run` is itself an evaluation.
    """
    if run.evaluates is not None:
        raise RunError(f"{run.folder} is an evaluation and has no models of its own; give {run.evaluates}")
    if run.recipe.adapt == "lora":
        raise RunError(f"{run.folder} adapted its backbone, and features are of the frozen one; use `predict` on scans")
    if out.exists():
        raise RunError(f"{out} exists; choose another --out or remove it (a run is never overwritten)")
    refuse_other_features(run, store)
    refuse_seen(run, cohort)
    cohort = replace(cohort, classes=run.classes)  # in the order in which the models answer
    bags = load_bags(cohort, store, layers=run.recipe.model.layers)
    answers = external_answers(run, bags)
    result = as_one_fold(answers)
    controls = {
        "auroc_of_one_repeat": score(bags.labels.numpy(), result.scored.probabilities).auroc,
        "shuffled_aurocs": shuffled_external(bags, result, seed=run.config["evaluation"]["seed"]),
    }
    about = {
        "run": run.config["run"] | {"name": out.name, "created": now(), "evaluates": str(run.folder.resolve())},
        "cohort": run.config["cohort"] | {"path": str(cohort.source.resolve())},
        "evaluation": {name: run.config["evaluation"][name] for name in JUDGED_BY} | {"repeats": 1},
    }
    evaluation = write_run(
        out,
        bags,
        result,
        store=store,
        config=run.config | about,
        baselines=external_baselines(run, cohort, store),
        extras={"controls.json": controls} | _external_decisions(run, bags, answers),
    )
    report_run(evaluation.folder)
    return evaluation


def _external_decisions(run: Run, bags: Bags, answers: Sequence[Scored]) -> dict[str, Any]:
    calibrations = read_calibrations(run)
    if calibrations is None:
        return {}
    decisions = decide(calibrations, [answer.probabilities for answer in answers])
    ids = [scan.id for scan in bags.scans]
    return {"decisions.csv": decision_table(decisions, ids, bags.classes, run.config["evaluation"]["alpha"])}
