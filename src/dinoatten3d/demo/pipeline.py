"""The main job from nothing to a report, on a cohort whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dinoatten3d.config import EvaluationConfig
from dinoatten3d.data.cohort import read_cohort
from dinoatten3d.demo.cohorts import DemoCohort
from dinoatten3d.demo.implant import DARK, SUBTLE, implant_cohort
from dinoatten3d.demo.phantom import PhantomConfig, make_phantom_cohort
from dinoatten3d.errors import ConfigError, ScanError
from dinoatten3d.features.backbone import Backbone
from dinoatten3d.features.extract import extract
from dinoatten3d.inference.predict import predict
from dinoatten3d.steps.explain import explain_scan
from dinoatten3d.steps.train import train_run
from dinoatten3d.toml import load_recipe

Bar = Callable[[str], Callable[[int, int], None]]
PHANTOM_NOTE = "synthetic: deformed copies of the MNI152 brain, half of them with a made-up lesion"
IMPLANT_NOTE = "semi-synthetic: real brains, half of them with a real lesion's mask implanted ({contrast})"


class DemoResult(NamedTuple):
    """Where everything is."""

    table: Path
    truth: Path
    features: Path
    run: Path
    explanations: list[Path]


def run_demo(
    out: Path,
    *,
    brains: Path | None,
    lesions: Path | None,
    contrast: str,
    scans: int,
    seed: int,
    load: Callable[[], Backbone],
    bar: Bar,
    say: Callable[[str], Any],
) -> DemoResult:
    """Make (or find again) a cohort, extract its features, cross-validate, report, and explain two lesion scans.

    Raises:
        ConfigError: Only one of `brains` and `lesions` was given.
    """
    if (brains is None) != (lesions is None):
        raise ConfigError("--brains and --lesions go together; give both, or neither for the synthetic cohort")
    if brains is not None and lesions is not None:
        name, note = f"implanted-{contrast}-{seed}", IMPLANT_NOTE.format(contrast=contrast)
        config = replace(DARK if contrast == "dark" else SUBTLE, seed=seed)
        made = implant_cohort(brains, lesions, out / name, config=config, progress=bar("cohort"))
    else:
        name, note = f"phantom-{scans}-{seed}", PHANTOM_NOTE
        made = make_phantom_cohort(out / name, config=PhantomConfig(scans=scans, seed=seed), progress=bar("cohort"))
    if made.reused:
        say(f"cohort {made.table.parent} is there already")
    return _analyse(made, name, note, out, seed, load(), bar)


def _analyse(made: DemoCohort, name: str, note: str, out: Path, seed: int, backbone: Backbone, bar: Bar) -> DemoResult:
    recipe = load_recipe("default")
    cohort = read_cohort(made.table, target="diagnosis")
    done = extract(
        cohort, backbone, out / "features", slices=recipe.slices, patches=recipe.patches, progress=bar("extracting")
    )
    if done.failed:
        raise ScanError(f"{len(done.failed)} scans of the demo failed, such as {next(iter(done.failed.values()))}")
    run = train_run(
        cohort,
        done.store,
        _free(out / "runs" / name),
        recipe=recipe,
        recipe_name="default",
        evaluation=EvaluationConfig(seed=seed),
        note=note,
        progress=bar("training"),
    )
    with_lesion = [scan.path for scan in cohort.scans if scan.label == "lesion"][:2]
    explanations = []
    explaining = bar("explaining")
    for number, path in enumerate(with_lesion, start=1):
        explanations.append(explain_scan(predict(run, path, backbone), run.folder / "explain"))
        explaining(number, len(with_lesion))
    return DemoResult(made.table, made.truth, done.store.folder, run.folder, explanations)


def _free(folder: Path) -> Path:
    """Give the first of folder, folder-2, folder-3, ... that does not exist: a run is never overwritten."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free
