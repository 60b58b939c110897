"""The command `train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from dinoatten3d.config import (
    AdjustConfig,
    EvaluationConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    Recipe,
    TrainingConfig,
)
from dinoatten3d.console import fetch_same_backbone, print_verdict, progress_bars
from dinoatten3d.options import BackboneName, Classes, ConfigFile, Device, Ignore, RecipeName


def train(
    cohort: Path,
    *,
    features: Path,
    target: str,
    out: Path,
    classes: Classes = [],  # noqa: B006  cyclopts reads the default
    ignore: Ignore = [],  # noqa: B006
    recipe: RecipeName = "default",
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
        learning_curve: Short for --evaluation.learning-curve.
        adapt: Leave the backbone as it is, or adapt its last blocks inside each outer fold (slow without a GPU).
    """
    from dinoatten3d.data.cohort import read_cohort
    from dinoatten3d.features.store import open_store
    from dinoatten3d.steps import train_run

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
            progress=bar("training"),
        )
    print_verdict(run.folder)
    print(f"report  {run.folder / 'report.html'}")
