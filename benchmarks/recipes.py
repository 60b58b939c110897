"""Every recipe and baseline on real brains with implanted real lesions, out of fold, over draws and seeds.

    python benchmarks/recipes.py --brains BRAINS --lesions MASKS --work WORK --draws 0 1 2 --seeds 0 1 2

prints a Markdown table: AUROC (mean and sd over seeds, then over draws), how much of the attention falls on slices
that hold lesion in units of uniform attention, and how often the heaviest slice holds lesion (both over
all lesion scans).
All recipes see the same slices and folds, those of the default recipe (or of --planes, --layers and --pca), so that
only the learning differs; a recipe may be a TOML file.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch

from dinoatten3d.config import EvaluationConfig
from dinoatten3d.data.cohort import read_cohort
from dinoatten3d.data.slices import stacks
from dinoatten3d.demo.cohorts import lesion_area_mm2
from dinoatten3d.demo.implant import DARK, SUBTLE, implant_cohort
from dinoatten3d.evaluation.controls import run_baselines
from dinoatten3d.evaluation.metrics import score
from dinoatten3d.features.backbone import load_backbone
from dinoatten3d.features.extract import extract
from dinoatten3d.features.weights import find_weights
from dinoatten3d.learning.bags import Bags, load_bags
from dinoatten3d.learning.fit import cross_validate
from dinoatten3d.learning.splits import outer_folds
from dinoatten3d.toml import load_recipe

PRESETS = {"dark": DARK, "subtle": SUBTLE}


def main() -> None:
    arguments = parse()
    weights = find_weights("auto", print)
    backbone = load_backbone(weights)
    recipe = load_recipe("default")
    slices = replace(recipe.slices, planes=tuple(arguments.planes))
    patches = replace(recipe.patches, layers=tuple(arguments.layers), pca=arguments.pca)
    rows = []
    for contrast in arguments.contrasts:
        for draw in arguments.draws:
            config = replace(PRESETS[contrast], seed=draw)
            made = implant_cohort(
                arguments.brains, arguments.lesions, arguments.work / f"{contrast}-{draw}", config=config
            )
            cohort = read_cohort(made.table, target="diagnosis")
            store = extract(cohort, backbone, arguments.work / "features", slices=slices, patches=patches).store
            bags = load_bags(cohort, store)
            bags = relabelled(bags, made.truth, arguments.task)
            holds_lesion = lesion_slices(bags, made.truth)
            for seed in arguments.seeds:
                rows += [
                    {"contrast": contrast, "draw": draw, "seed": seed, **row}
                    for row in measure(bags, holds_lesion, arguments.recipes, arguments.folds, seed)
                ]
            print(f"{contrast} draw {draw} done", flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(arguments.work / "recipes.csv", index=False)
    print(f"\nweights: {weights.title}; {arguments.folds} folds by subject; default slices\n")
    print(summary(table))


def measure(bags: Bags, holds_lesion: np.ndarray, recipes: list[str], folds: int, seed: int) -> list[dict[str, object]]:
    """Score every recipe and baseline on the same folds."""
    labels = bags.labels.numpy()
    assigned = outer_folds(labels, bags.subjects, bags.classes, folds=folds, seed=seed)
    rows: list[dict[str, object]] = []
    for name in recipes:
        result = cross_validate(bags, load_recipe(name), EvaluationConfig(folds=folds, seed=seed), folds=assigned)
        weights = result.scored.weights[labels > 0]
        hit = holds_lesion[labels > 0]
        figures = score(labels, result.scored.probabilities)
        rows.append(
            {
                "model": Path(name).stem,
                "auroc": figures.auroc,
                "balanced": figures.balanced_accuracy,
                "mass": (weights * hit).sum() / hit.mean(axis=1).sum(),
                "hit": hit[np.arange(len(hit)), weights.argmax(axis=1)].mean(),
                "uniform": hit.mean(),
                "seconds": result.seconds,
            }
        )
    for name, probabilities in run_baselines(bags, assigned).items():
        figures = score(labels, probabilities[0])
        rows.append({"model": name, "auroc": figures.auroc, "balanced": figures.balanced_accuracy})
    return rows


def relabelled(bags: Bags, truth: Path, task: str) -> Bags:
    """Give four classes (`sides`: healthy, left, right, large), one lesion in ten (`rare`), or the bags as they are."""
    if task == "lesion":
        return bags
    if task == "rare":
        lesions = np.flatnonzero(bags.labels.numpy() == 1)[::9]
        return bags.take(np.sort(np.concatenate([np.flatnonzero(bags.labels.numpy() == 0), lesions])))
    known = pd.read_csv(truth, dtype={"scan": str, "side": str}, keep_default_na=False).set_index("scan")
    names = []
    for scan in bags.scans:
        row = known.loc[scan.id]
        large = row["side"] == "both" or float(row["lesion_ml"] or 0) >= 50
        names.append("healthy" if scan.label == "healthy" else "large" if large else row["side"])
    classes = ("healthy", "left", "right", "large")
    return replace(bags, labels=torch.tensor([classes.index(name) for name in names]), classes=classes)


def lesion_slices(bags: Bags, truth: Path) -> np.ndarray:
    """Say of each slice whether it cuts through the lesion, bool [scans, slices]."""
    masks = pd.read_csv(truth, dtype={"scan": str, "mask": str}, keep_default_na=False).set_index("scan")["mask"]
    holds = np.zeros(bags.mask.shape, dtype=bool)
    for row, scan in enumerate(bags.scans):
        if masks[scan.id]:
            mask = nib.load(truth.parent / masks[scan.id])
            for plane, run in stacks(bags.planes).items():
                holds[row, run] = lesion_area_mm2(mask, plane, bags.position_mm[row, run], 2.0) > 0
    return holds


def summary(table: pd.DataFrame) -> str:
    """Give a row a model and contrast: the mean over everything, the sd over seeds within a draw, and over draws."""
    lines = [
        "| contrast | model | AUROC | balanced acc. | sd over seeds | range | mass | hit | (uniform) | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (contrast, model), group in table.groupby(["contrast", "model"], sort=False):
        seeds = group.groupby("draw")["auroc"].std().mean()
        auroc = group["auroc"]
        cells = [f"{auroc.mean():.2f}", f"{group['balanced'].mean():.2f}", f"{seeds:.3f}"]
        cells.append(f"{auroc.min():.2f}-{auroc.max():.2f}")
        for column, form in (("mass", ".2f"), ("hit", ".0%"), ("uniform", ".0%"), ("seconds", ".1f")):
            value = group[column].mean()
            cells.append("-" if np.isnan(value) else format(value, form))
        lines.append(f"| {contrast} | {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brains", type=Path, required=True)
    parser.add_argument("--lesions", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for cohorts, features and recipes.csv")
    parser.add_argument("--contrasts", nargs="+", default=["dark", "subtle"], choices=list(PRESETS))
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--task", default="lesion", choices=["lesion", "sides", "rare"])
    parser.add_argument("--folds", type=int, default=6)
    parser.add_argument("--planes", nargs="+", default=["axial"])
    parser.add_argument("--layers", nargs="+", type=int, default=[9])
    parser.add_argument("--pca", type=int, default=0)
    parser.add_argument("--recipes", nargs="+", default=["default", "paper", "published"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
