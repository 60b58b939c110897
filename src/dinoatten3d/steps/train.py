"""A cohort and its features become a run folder with its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dinoatten3d.config import EvaluationConfig, Recipe, SliceConfig
from dinoatten3d.data.cohort import Cohort
from dinoatten3d.data.slices import take_slices
from dinoatten3d.data.volume import load_volume
from dinoatten3d.errors import ConfigError, DinoAtten3DError, RunError
from dinoatten3d.evaluation.controls import run_baselines, shuffled_aurocs
from dinoatten3d.evaluation.decisions import (
    calibrate_folds,
    decide_held_out,
    decision_table,
)
from dinoatten3d.evaluation.judge import judge
from dinoatten3d.evaluation.learning_curve import learning_curve
from dinoatten3d.evaluation.metrics import score
from dinoatten3d.features.backbone import Backbone
from dinoatten3d.features.store import FeatureStore
from dinoatten3d.learning.adapt import cross_validate_adapted
from dinoatten3d.learning.adjust import refuse_one_site, refuse_target
from dinoatten3d.learning.bags import Bags, load_bags
from dinoatten3d.learning.choice import fit_chosen
from dinoatten3d.learning.fit import CrossValidation, cross_validate, fold_jobs
from dinoatten3d.learning.run import Run, open_run, run_config, write_run
from dinoatten3d.report.cases import CaseSlices, choose_cases
from dinoatten3d.report.html import write_report
from dinoatten3d.steps.audit import audit_bags
from dinoatten3d.toml import from_dict

Progress = Callable[[int, int], None]


PICTURES = 4
"""Slices shown for a case of the report."""


def train_run(
    cohort: Cohort,
    store: FeatureStore,
    out: Path,
    *,
    recipe: Recipe,
    recipe_name: str,
    evaluation: EvaluationConfig,
    note: str = "",
    backbone: Backbone | None = None,
    alternatives: Mapping[str, Recipe] = MappingProxyType({}),
    progress: Progress = lambda done, total: None,
) -> Run:
    """Cross-validate a recipe and its baselines on a cohort, and leave a run folder with its report.

    A recipe that adapts the backbone needs it, and trains one member. Where there are `alternatives` (the recipe itself
    among them) inner folds choose one for each fold, and for each shuffle of the labels too.

    Raises:
        RunError: `out` exists.
        FeatureError, CohortError: The features or the classes do not allow it.
        ConfigError: The features are to be adjusted for the target itself.
    """
    if out.exists():
        raise RunError(f"{out} exists; choose another --out or remove it (a run is never overwritten)")
    refuse_target(recipe.adjust, cohort.target)
    refuse_one_site(recipe.adjust, cohort.scans)
    if evaluation.learning_curve and (alternatives or recipe.adapt == "lora"):
        raise ConfigError(
            "a learning curve is of one recipe, not adapted; leave it out, or --choose, --grid and --adapt"
        )
    bags = load_bags(cohort, store, layers=recipe.model.layers)
    if recipe.adapt == "lora":
        if backbone is None:
            raise RunError("this recipe adapts the backbone; pass the one that made the features")
        recipe = replace(recipe, training=replace(recipe.training, members=1))
        evaluation = replace(evaluation, shuffles=0)  # each would adapt anew: days where the run takes hours
    fit = partial(fit_chosen, recipes=alternatives) if alternatives else None
    first, then = _in_turn(progress, evaluation.shuffles)
    if recipe.adapt == "lora" and backbone is not None:
        result = cross_validate_adapted(bags, store, backbone, recipe, evaluation, scratch=out.parent, progress=first)
    else:
        result = cross_validate(bags, recipe, evaluation, fit=fit, progress=first)
    held_out = result.folds[0] >= 0
    files: dict[str, Any] = {
        "audit.json": audit_bags(cohort, bags, evaluation).to_dict(),
        "controls.json": {
            "auroc_of_one_repeat": score(bags.labels.numpy()[held_out], result.by_repeat[0, held_out]).auroc,
            "shuffled_aurocs": shuffled_aurocs(bags, recipe, evaluation, fit=fit, progress=then),
        },
        **_decisions(bags, result, evaluation),
    }
    if evaluation.learning_curve:
        curve = learning_curve(bags, recipe, recipe_name, evaluation, result, progress=progress)
        files["learning_curve.json"] = curve.to_dict()
    run = write_run(
        out,
        bags,
        result,
        store=store,
        config=run_config(
            name=out.name,
            recipe_name=recipe_name,
            recipe=recipe,
            evaluation=evaluation,
            cohort=cohort,
            store=store,
            note=note,
        ),
        baselines=run_baselines(bags, result.folds, cohort.target, recipe.adjust),
        extras=files,
    )
    report_run(run.folder)
    return run


def _in_turn(progress: Progress, shuffles: int) -> tuple[Progress, Progress]:
    """Share one bar between the run and its shuffles, each of which takes about as long."""

    def first(done: int, total: int) -> None:
        progress(done, total * (shuffles + 1))

    def then(done: int, total: int) -> None:
        progress(done + total // shuffles, total + total // shuffles)

    return first, then


def report_run(folder: Path) -> Path:
    """Compute the figures of a run and write its report, with pictures where the scans are still in place."""
    run = open_run(folder)
    judge(run)
    return write_report(folder, thumbnails=_case_pictures(run))


def _decisions(bags: Bags, result: CrossValidation, evaluation: EvaluationConfig) -> dict[str, Any]:
    """Calibrate each fold on its inner probabilities and decide on the scans that it held out; gives the files."""
    labels = bags.labels.numpy()
    rows = [job.rows for job in fold_jobs(result.folds, labels, evaluation.seed)]
    calibrations = calibrate_folds(result.fitted, rows, labels, evaluation.sensitivity)
    if calibrations is None:
        return {}
    ids = [scan.id for scan in bags.scans]
    table = decision_table(decide_held_out(result, calibrations), ids, bags.classes, evaluation.alpha)
    files = {f"fold-{fold}/calibration.json": c.to_dict() for fold, c in enumerate(calibrations)}
    return {"decisions.csv": table[result.folds[0] >= 0], **files}


def _case_pictures(run: Run) -> dict[str, CaseSlices]:
    """Cut the heaviest slices of the report's cases; a scan that has moved has no pictures."""
    cases = choose_cases(run.table("predictions.csv"), run.classes)
    paths = run.table("cohort.csv").set_index("scan_id")["path"]
    attention = run.table("attention.csv")
    config = from_dict(SliceConfig, run.config["features"]["slices"], "config.toml")
    pictures = {}
    for scan_id in cases["scan_id"]:
        weights = attention[attention["scan_id"] == scan_id].sort_values("slice")
        try:
            slices = take_slices(load_volume(paths[scan_id]), config)
        except DinoAtten3DError:
            continue
        heaviest = np.sort(np.argsort(-weights["weight"].to_numpy(), kind="stable")[:PICTURES])
        pictures[scan_id] = CaseSlices(
            scan_id=scan_id,
            pixels=slices.pixels[heaviest],
            position_mm=slices.position_mm[heaviest],
            planes=tuple(slices.planes[i] for i in heaviest),
            weights=weights["weight"].to_numpy()[heaviest],
        )
    return pictures
