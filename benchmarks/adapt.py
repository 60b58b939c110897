"""Adapting the backbone's last blocks against leaving it frozen, on real brains with implanted real lesions.

    python benchmarks/adapt.py --brains BRAINS --lesions MASKS --work WORK --contrasts dark subtle --draws 0

prints a Markdown table: out-of-fold AUROC and seconds. Every row has the same slices and folds; `frozen` and `lora`
have the same attention and head, trained the same way, and `lora` then goes on end to end.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from dinoatten3d.config import EvaluationConfig, LoraConfig, Recipe
from dinoatten3d.data.cohort import read_cohort
from dinoatten3d.demo.implant import DARK, SUBTLE, implant_cohort
from dinoatten3d.evaluation.controls import run_baselines
from dinoatten3d.evaluation.metrics import score
from dinoatten3d.features.backbone import Backbone, load_backbone
from dinoatten3d.features.extract import extract
from dinoatten3d.features.store import FeatureStore
from dinoatten3d.features.weights import find_weights
from dinoatten3d.learning.adapt import cross_validate_adapted
from dinoatten3d.learning.bags import Bags, load_bags
from dinoatten3d.learning.fit import CrossValidation, cross_validate
from dinoatten3d.learning.splits import outer_folds
from dinoatten3d.toml import load_recipe

PRESETS = {"dark": DARK, "subtle": SUBTLE}


def main() -> None:
    arguments = parse()
    weights = find_weights("auto", print)
    backbone = load_backbone(weights)
    default = load_recipe("default")
    slices = replace(default.slices, count=arguments.slices, size_px=arguments.size_px)
    lora = LoraConfig(
        blocks=arguments.blocks,
        rank=arguments.rank,
        learning_rate=arguments.learning_rate,
        epochs=arguments.epochs,
        patience=arguments.patience,
        batch_size=arguments.batch_size,
    )
    rows = []
    for contrast in arguments.contrasts:
        for draw in arguments.draws:
            config = replace(PRESETS[contrast], seed=draw)
            place = arguments.work / f"{contrast}-{draw}"
            cohort = read_cohort(
                implant_cohort(arguments.brains, arguments.lesions, place, config=config).table, target="diagnosis"
            )
            started = time.monotonic()
            folder = arguments.work / "features"
            store = extract(cohort, backbone, folder, slices=slices, patches=default.patches).store
            print(f"{contrast} draw {draw}: features in {time.monotonic() - started:.0f} s", flush=True)
            bags = load_bags(cohort, store)
            for seed in arguments.seeds:
                for row in measure(bags, store, backbone, lora, arguments, seed):
                    rows.append({"contrast": contrast, "draw": draw, "seed": seed, **row})
                pd.DataFrame(rows).to_csv(arguments.work / f"adapt-{arguments.name}.csv", index=False)
    print(f"\nweights: {weights.title}; {arguments.folds} folds; {arguments.slices} slices of {arguments.size_px} px\n")
    print(summary(pd.DataFrame(rows)))


def measure(
    bags: Bags, store: FeatureStore, backbone: Backbone, lora: LoraConfig, arguments: argparse.Namespace, seed: int
) -> list[dict[str, object]]:
    """Score the frozen and the adapted backbone, the default recipe and the baselines on the same folds."""
    labels = bags.labels.numpy()
    folds = outer_folds(labels, bags.subjects, bags.classes, folds=arguments.folds, seed=seed)
    judged = EvaluationConfig(folds=arguments.folds, seed=seed)
    rows: list[dict[str, object]] = []

    def note(name: str, result: CrossValidation) -> None:
        chosen = [row["epoch"] for fitted in result.fitted for row in fitted.history if row["chosen"]]
        figures = score(labels, result.scored.probabilities)
        rows.append(
            {"model": name, "auroc": figures.auroc, "balanced": figures.balanced_accuracy, "seconds": result.seconds}
            | {"chosen": " ".join(map(str, chosen))}
        )
        print(rows[-1], flush=True)

    for head in arguments.heads:
        recipe = attention(head, lora)
        note(f"{head} head, frozen", cross_validate(bags, recipe, judged, folds=folds))
        adapted = cross_validate_adapted(bags, store, backbone, recipe, judged, folds=folds, scratch=arguments.work)
        note(f"{head} head, lora", adapted)
    note("default recipe", cross_validate(bags, load_recipe("default"), judged, folds=folds))
    for name, probabilities in run_baselines(bags, folds).items():
        figures = score(labels, probabilities[0])
        rows.append({"model": name, "auroc": figures.auroc, "balanced": figures.balanced_accuracy})
    return rows


def attention(name: str, lora: LoraConfig) -> Recipe:
    """Give a recipe with trained slice attention and one member."""
    recipe = load_recipe(name)
    return replace(
        recipe,
        model=replace(recipe.model, pooling="attention"),
        training=replace(recipe.training, members=1),
        adapt="lora",
        lora=lora,
    )


def summary(table: pd.DataFrame) -> str:
    """Give a row a contrast and model."""
    lines = ["| contrast | model | AUROC | range | s |", "|---|---|---|---|---|"]
    for (contrast, model), group in table.groupby(["contrast", "model"], sort=False):
        auroc, seconds = group["auroc"], group["seconds"].mean()
        cells = f"{auroc.mean():.2f} | {auroc.min():.2f}-{auroc.max():.2f} | {seconds:.0f}"
        lines.append(f"| {contrast} | {model} | {cells} |".replace("nan", "-"))
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brains", type=Path, required=True)
    parser.add_argument("--lesions", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for cohorts, features and the table")
    parser.add_argument("--name", default="all", help="of the table's file")
    parser.add_argument("--contrasts", nargs="+", default=["dark", "subtle"], choices=list(PRESETS))
    parser.add_argument("--draws", nargs="+", type=int, default=[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--heads", nargs="+", default=["default"], choices=["default", "paper"])
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--size-px", type=int, default=112)
    for name in ("blocks", "rank", "epochs", "patience", "batch_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(LoraConfig(), name))
    parser.add_argument("--learning-rate", type=float, default=LoraConfig().learning_rate)
    return parser.parse_args()


if __name__ == "__main__":
    main()
