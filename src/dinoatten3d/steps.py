"""The steps that commands are made of, one above the rooms: each reads a folder and writes a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dinoatten3d.config import EvaluationConfig, Recipe, SliceConfig, from_dict, to_dict
from dinoatten3d.data.cohort import Cohort, stem
from dinoatten3d.data.inspect import Inspection, inspect_scan
from dinoatten3d.data.slices import take_slices
from dinoatten3d.data.volume import load_volume
from dinoatten3d.errors import DinoAtten3DError, FeatureError, RunError
from dinoatten3d.evaluation.audit import Audit, audit
from dinoatten3d.evaluation.controls import run_baselines, shuffled_aurocs
from dinoatten3d.evaluation.decisions import (
    calibrate_folds,
    decide,
    decide_held_out,
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
from dinoatten3d.evaluation.judge import judge
from dinoatten3d.evaluation.learning_curve import learning_curve
from dinoatten3d.evaluation.metrics import score
from dinoatten3d.features.backbone import Backbone
from dinoatten3d.features.store import Features, FeatureStore
from dinoatten3d.files import whole_folder, write_json, write_text
from dinoatten3d.inference.explain import deviation_map, explain, slice_weight_map
from dinoatten3d.inference.predict import Prediction
from dinoatten3d.learning.adapt import cross_validate_adapted
from dinoatten3d.learning.adjust import refuse_target
from dinoatten3d.learning.bags import Bags, load_bags
from dinoatten3d.learning.fit import CrossValidation, Scored, cross_validate, fold_jobs
from dinoatten3d.learning.run import Run, now, open_run, run_config, write_run
from dinoatten3d.report.audit_page import audit_page
from dinoatten3d.report.cases import CaseSlices, choose_cases
from dinoatten3d.report.html import write_report
from dinoatten3d.report.slices_figure import slice_weights_figure

Progress = Callable[[int, int], None]
PICTURES = 4
"""Slices shown for a case of the report."""
READERS = 4
"""Scans that an audit reads at a time."""


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
    progress: Progress = lambda done, total: None,
) -> Run:
    """Cross-validate a recipe and its baselines on a cohort, and leave a run folder with its report.

    A recipe that adapts the backbone needs it, and trains one member.

    Raises:
        RunError: `out` exists.
        FeatureError, CohortError: The features or the classes do not allow it.
        ConfigError: The features are to be adjusted for the target itself.
    """
    if out.exists():
        raise RunError(f"{out} exists; choose another --out or remove it (a run is never overwritten)")
    refuse_target(recipe.adjust, cohort.target)
    bags = load_bags(cohort, store, layers=recipe.model.layers)
    shuffles = evaluation.shuffles
    if recipe.adapt == "lora":
        if backbone is None:
            raise RunError("this recipe adapts the backbone; pass the one that made the features")
        recipe = replace(recipe, training=replace(recipe.training, members=1))
        evaluation = replace(evaluation, shuffles=0)  # each would adapt anew: days where the run takes hours
        result = cross_validate_adapted(
            bags, store, backbone, recipe, evaluation, scratch=out.parent, progress=progress
        )
    else:
        result = cross_validate(
            bags, recipe, evaluation, progress=lambda done, total: progress(done, total * (shuffles + 1))
        )
    config = run_config(
        name=out.name,
        recipe_name=recipe_name,
        recipe=replace(recipe, slices=store.slices, patches=store.patches),
        evaluation=evaluation,
        cohort={
            "path": str(cohort.source.resolve()),
            "target": cohort.target,
            "classes": list(cohort.classes),
            "synthetic": bool(note),
            "note": note,
        },
        features={
            "folder": str(store.folder.resolve()),
            "digest": store.digest,
            "backbone": store.backbone["name"],
            "weights": store.backbone["title"],
            "source": store.backbone["source"],
            "backbone_identity": dict(store.backbone),
            "slices": to_dict(store.slices),
        },
    )
    held_out = result.folds[0] >= 0
    controls = {
        "auroc_of_one_repeat": score(bags.labels.numpy()[held_out], result.by_repeat[0, held_out]).auroc,
        "shuffled_aurocs": shuffled_aurocs(
            bags,
            recipe,
            evaluation,
            progress=lambda done, total: progress(done + total // shuffles, total + total // shuffles),
        ),
    }
    extras = {"controls.json": controls, "audit.json": audit_bags(cohort, bags, evaluation).to_dict()}
    if evaluation.learning_curve:
        extras["learning_curve.json"] = learning_curve(
            bags, recipe, recipe_name, evaluation, result, progress=progress
        ).to_dict()
    run = write_run(
        out,
        bags,
        result,
        store=store,
        config=config,
        baselines=run_baselines(bags, result.folds, cohort.target, recipe.adjust),
        extras=extras | _decisions(bags, result, evaluation),
    )
    report_run(run.folder)
    return run


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
    bags = load_bags(replace(cohort, classes=run.classes), store, layers=run.recipe.model.layers)
    answers = external_answers(run, bags)
    result = as_one_fold(answers)
    controls = {
        "auroc_of_one_repeat": score(bags.labels.numpy(), result.scored.probabilities).auroc,
        "shuffled_aurocs": shuffled_external(bags, result, seed=run.config["evaluation"]["seed"]),
    }
    about = {
        "run": run.config["run"] | {"name": out.name, "created": now(), "evaluates": str(run.folder.resolve())},
        "cohort": run.config["cohort"] | {"path": str(cohort.source.resolve())},
        "evaluation": run.config["evaluation"] | {"repeats": 1},
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


def report_run(folder: Path) -> Path:
    """Compute the figures of a run and write its report, with pictures where the scans are still in place."""
    run = open_run(folder)
    judge(run)
    return write_report(folder, thumbnails=_case_pictures(run))


def audit_cohort(
    cohort: Cohort,
    store: FeatureStore | None,
    *,
    voxels: bool = True,
    folds: int = 5,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Audit:
    """Look for what would invalidate a result before anything is trained; files, headers, voxels and features."""
    inspections = _inspect(cohort, voxels=voxels, progress=progress)
    if store is None:
        return audit(cohort, inspections, folds=folds, seed=seed)
    found = [_features_or_none(store, scan.path) for scan in cohort.scans]
    return audit(
        cohort,
        inspections,
        embeddings=[features.cls if features else None for features in found],
        brain_ml=np.array([features.brain_ml if features else np.nan for features in found]),
        folds=folds,
        seed=seed,
    )


def audit_bags(cohort: Cohort, bags: Bags, evaluation: EvaluationConfig) -> Audit:
    """Audit a cohort whose features are loaded already, without reading a voxel again."""
    return audit(
        cohort,
        _inspect(cohort, voxels=False),
        embeddings=[tokens[real].numpy() for tokens, real in zip(bags.features, bags.mask, strict=True)],
        brain_ml=bags.brain_ml,
        folds=evaluation.folds if evaluation.split == "folds" else 2,  # given splits make no demand on class sizes
        seed=evaluation.seed,
    )


def write_audit(found: Audit, out: Path) -> Sequence[Path]:
    """Write an audit: a `.json` or `.html` file, or both into a folder."""
    content = found.to_dict()
    paths = [out] if out.suffix in (".json", ".html") else [out / "audit.json", out / "audit.html"]
    for path in paths:
        if path.suffix == ".json":
            write_json(path, content)
        else:
            write_text(path, audit_page(content))
    return paths


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


def _inspect(cohort: Cohort, *, voxels: bool, progress: Progress = lambda done, total: None) -> list[Inspection]:
    """Inspect the files of a cohort, a few at a time, in order."""
    found = []
    with ThreadPoolExecutor(max_workers=READERS) as readers:
        for inspection in readers.map(lambda scan: inspect_scan(scan.path, voxels=voxels), cohort.scans):
            found.append(inspection)
            progress(len(found), len(cohort))
    return found


def _features_or_none(store: FeatureStore, scan: Path) -> Features | None:
    try:
        return store.read(scan)
    except (FeatureError, OSError):
        return None


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
