"""Commands that make runs and judge them: `train`, `evaluate`, `compare`, `report`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from dinoatten3d.cli.options import BackboneName, Classes, ConfigFile, Device, Ignore, RecipeName
from dinoatten3d.config import (
    AdjustConfig,
    EvaluationConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    Recipe,
    TrainingConfig,
)
from dinoatten3d.console import (
    fetch_same_backbone,
    print_verdict,
    progress_bars,
)


def train(
    cohort: Path,
    *,
    features: Path,
    target: str,
    out: Path,
    classes: Classes = [],  # noqa: B006  cyclopts reads the default
    ignore: Ignore = [],  # noqa: B006
    recipe: RecipeName = "default",
    choose: Annotated[list[str], Parameter(negative=())] = [],  # noqa: B006
    grid: Annotated[list[str], Parameter(negative=())] = [],  # noqa: B006
    config: ConfigFile = None,
    model: ModelConfig | None = None,
    loss: LossConfig | None = None,
    training: TrainingConfig | None = None,
    adapt: Literal["none", "lora"] = "none",
    lora: LoraConfig | None = None,
    adjust: AdjustConfig | None = None,
    evaluation: EvaluationConfig | None = None,
    learning_curve: bool = False,
    backbone: BackboneName = None,
    device: Device = "cpu",
) -> None:
    """Cross-validate a recipe by subject, compare it with the simplest baselines and write a run with its report.

    Args:
        cohort: The table or BIDS folder that the features were extracted from.
        features: A feature folder made by `extract`.
        target: Column with the label.
        out: Run folder to make; an existing one is never overwritten.
        choose: Recipe that competes with --recipe on inner folds; once a recipe.
        grid: Setting and its values, 'training.weight_decay=0.01,0.1'; all combinations compete on inner folds.
        learning_curve: Short for --evaluation.learning-curve.
        adapt: Leave the backbone as it is, or adapt its last blocks inside each outer fold (slow without a GPU).
    """
    from dinoatten3d.data.cohort import read_cohort
    from dinoatten3d.features.store import open_store
    from dinoatten3d.learning.choice import candidates
    from dinoatten3d.steps.train import train_run

    made = Recipe(
        model=model or ModelConfig(),
        loss=loss or LossConfig(),
        training=training or TrainingConfig(),
        adapt=adapt,
        lora=lora or LoraConfig(),
        adjust=adjust or AdjustConfig(),
    )
    table = read_cohort(cohort, target=target, classes=classes, ignore=ignore)
    store, judged = open_store(features), evaluation or EvaluationConfig()
    alternatives = candidates(recipe, made, choose, grid) if choose or grid else {}
    encoder = fetch_same_backbone(store.backbone, device, backbone) if adapt == "lora" else None
    with progress_bars() as bar:
        run = train_run(
            table,
            store,
            out,
            recipe=made,
            recipe_name=recipe,
            evaluation=replace(judged, learning_curve=True) if learning_curve else judged,
            backbone=encoder,
            alternatives=alternatives,
            progress=bar("training"),
        )
    print_verdict(run.folder)
    print(f"report  {run.folder / 'report.html'}")


def evaluate(
    run: Path,
    /,
    *,
    cohort: Path,
    features: Path,
    out: Path,
    target: str | None = None,
    classes: Classes = [],  # noqa: B006
    ignore: Ignore = [],  # noqa: B006
) -> None:
    """Score another cohort with the models of a run, as they are; a person of the run's own cohort is refused.

    Args:
        run: A run folder.
        cohort: Table or BIDS folder of the other cohort.
        features: Its features, made like those of the run (in the same folder, so that the controls can be fitted too).
        out: Folder to make: tables, figures and a report like a run's.
        target: Column with the label; by default named like the run's.
    """
    from dinoatten3d.data.cohort import read_cohort
    from dinoatten3d.features.store import open_store
    from dinoatten3d.learning.run import open_run
    from dinoatten3d.steps.evaluate import evaluate_run

    opened = open_run(run)
    table = read_cohort(
        cohort,
        target=target or opened.config["cohort"]["target"],
        classes=classes or list(opened.classes),
        ignore=ignore,
    )
    evaluation = evaluate_run(opened, table, open_store(features), out)
    print_verdict(evaluation.folder)
    print(f"report  {evaluation.folder / 'report.html'}")


def compare(
    runs: Annotated[list[Path], Parameter(negative=())], /, *, out: Path | None = None, baselines: bool = False
) -> None:
    """Compare runs on the scans that all of them scored: a table, and paired tests between every two.

    Args:
        runs: Two run folders or more, of the same target and classes.
        out: Folder to make for a page and a JSON file; without it the table is only printed.
        baselines: Compare with the baselines of the first run too.
    """
    from dinoatten3d.report.comparison import compare_folders

    for line in compare_folders(runs, out=out, with_baselines=baselines):
        print(line)


def report(run: Path) -> None:
    """Compute the figures of a run again and write its report.

    Args:
        run: A run folder.
    """
    from dinoatten3d.steps.train import report_run

    print(report_run(run))
