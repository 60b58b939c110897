"""A planted scanner: does adjustment take a site out of the answer, and what does it cost?

    python benchmarks/sites.py --cohort WORK/subtle-100 --work WORK/sites --features WORK/features

Half of an implanted cohort is saved again as another scanner might have made it (darker mid-tones, a smooth bias field,
a little blur) and embedded again; 70 % of the lesion scans and 30 % of the healthy ones. `--features` is a folder of
feature folders that holds the untouched scans. The tasks: lesions with the site confounded, the same within either site
alone and with one site held out ("lesion"), and healthy scans with a class that goes with the site and means nothing
else ("nothing": an honest figure is 0.5).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import ndimage

from dinoatten3d.config import AdjustConfig, EvaluationConfig, Recipe
from dinoatten3d.data.cohort import read_cohort
from dinoatten3d.evaluation.controls import run_baselines
from dinoatten3d.evaluation.metrics import score
from dinoatten3d.features.backbone import load_backbone
from dinoatten3d.features.extract import extract
from dinoatten3d.features.weights import find_weights
from dinoatten3d.learning.bags import Bags, load_bags
from dinoatten3d.learning.fit import cross_validate
from dinoatten3d.toml import load_recipe

SHARE = {"lesion": 0.7, "healthy": 0.3}
"""Scans of each class that the second scanner made."""
ADJUSTMENTS = {
    "none": AdjustConfig(),
    "residual": AdjustConfig(covariates=("site",)),
    "combat": AdjustConfig(covariates=("site",), method="combat"),
}


def main() -> None:
    arguments = parse()
    recipe = load_recipe("default")
    cohort = read_cohort(two_scanners(arguments.cohort, arguments.work), target="diagnosis")
    backbone = load_backbone(find_weights("auto", print))
    done = extract(cohort, backbone, arguments.features, slices=recipe.slices, patches=recipe.patches)
    bags = load_bags(cohort, done.store)
    healthy = bags.take(np.flatnonzero(bags.labels.numpy() == 0))
    rows = []
    for seed in arguments.seeds:
        tasks = {"lesion": bags, "nothing": with_class_that_goes_with_site(healthy, seed)}
        for name, adjust in ADJUSTMENTS.items():
            for task, own in tasks.items():
                for figure, value in figures(own, replace(recipe, adjust=adjust), seed, task == "lesion").items():
                    rows.append({"adjustment": name, "seed": seed, "figure": f"{task}: {figure}", "auroc": value})
                    print(*rows[-1].values(), flush=True)
    result = pd.DataFrame(rows)
    result.to_csv(arguments.work / "sites.csv", index=False)
    print(result.pivot_table(index="figure", columns="adjustment", values="auroc", sort=False).round(2).to_string())


def figures(bags: Bags, recipe: Recipe, seed: int, leave_one_out: bool) -> dict[str, float]:
    """AUROC over all scans, within sites (mean of the two) and with one site held out (mean of the two)."""
    labels, site = bags.labels.numpy(), np.array([scan.site for scan in bags.scans])
    evaluation = EvaluationConfig(seed=seed)
    result = cross_validate(bags, recipe, evaluation)
    mean_pooling = run_baselines(bags, result.folds, None, recipe.adjust)["mean pooling"][0]
    found = {}
    for name, answers in (("default", result.scored.probabilities), ("mean pooling", mean_pooling)):
        found[f"{name}, all scans"] = score(labels, answers).auroc
        found[f"{name}, within sites"] = within(labels, answers, site)
    if leave_one_out:
        held_out = cross_validate(bags, recipe, replace(evaluation, split="site"))
        found["default, site held out"] = within(labels, held_out.scored.probabilities, site)
    return found


def within(labels: NDArray[np.int64], answers: NDArray[np.float64], site: NDArray[np.str_]) -> float:
    """Mean over sites of the AUROC among the scans of one site."""
    return float(np.mean([score(labels[site == name], answers[site == name]).auroc for name in np.unique(site)]))


def with_class_that_goes_with_site(bags: Bags, seed: int) -> Bags:
    """Give healthy scans a class that means nothing but is 70 % of one site and 30 % of the other."""
    rng = np.random.default_rng(seed)
    other = np.array([scan.site == "B" for scan in bags.scans])
    labels = np.zeros(len(bags), np.int64)
    for inside, share in ((other, 0.7), (~other, 0.3)):
        own = np.flatnonzero(inside)
        labels[rng.choice(own, round(share * len(own)), replace=False)] = 1
    return replace(bags, labels=torch.from_numpy(labels))


def two_scanners(source: Path, work: Path) -> Path:
    """Write the cohort with some of its scans as another scanner might have made them."""
    table = pd.read_csv(source / "cohort.csv", dtype=str)
    rng = np.random.default_rng(0)
    table["site"] = "A"
    for name, share in SHARE.items():
        own = np.flatnonzero(table["diagnosis"] == name)
        table.loc[rng.choice(own, round(share * len(own)), replace=False), "site"] = "B"
    folder = work / "scans"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for path, site in zip(table["path"], table["site"], strict=True):
        original = (source / path).resolve()
        target = folder / original.name
        if site == "B" and not target.exists():
            other_scanner(nib.load(original)).to_filename(target)
        paths.append(str(target if site == "B" else original))
    table["path"] = paths
    table.to_csv(work / "cohort.csv", index=False)
    return work / "cohort.csv"


def other_scanner(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """Darken the mid-tones, lay a smooth bias field over the head and blur by half a voxel."""
    values = image.get_fdata(dtype=np.float32)
    top = np.percentile(values[values > 0], 99.5)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in values.shape), indexing="ij")
    field = 1 + 0.15 * y + 0.1 * z - 0.1 * x**2
    changed = ndimage.gaussian_filter(top * (values / top).clip(0) ** 1.25 * field, 0.5) * (values > 0)
    return nib.Nifti1Image(changed.astype(np.float32), image.affine)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", type=Path, required=True, help="an implanted cohort's folder")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args()


if __name__ == "__main__":
    main()
