"""Lesions found without lesion labels: patches, slices and scans, by contrast and by lesion volume.

    python benchmarks/anomaly.py --brains BRAINS --lesions MASKS --work WORK --draws 0 1 2

uses (and fills) the same WORK folder as recipes.py. Patch AUROC: within each lesion scan, tissue patches at least half
inside the lesion against those wholly outside, averaged over scans.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from dinoatten3d.data.cohort import read_cohort
from dinoatten3d.demo.implant import DARK, SUBTLE, implant_cohort
from dinoatten3d.features.backbone import load_backbone
from dinoatten3d.features.extract import extract
from dinoatten3d.features.weights import find_weights
from dinoatten3d.inference.anomaly import score_anomalies
from dinoatten3d.learning.bags import load_bags
from dinoatten3d.toml import load_recipe

PRESETS = {"dark": DARK, "subtle": SUBTLE}
VOLUMES_ML = (5, 10, 15, 25, 40, 100)
SAMPLE_PX = 2


def main() -> None:
    arguments = parse()
    weights = find_weights("auto", print)
    backbone = load_backbone(weights)
    recipe = load_recipe("default")
    draws, scans = [], []
    for contrast in arguments.contrasts:
        for draw in arguments.draws:
            config = replace(PRESETS[contrast], seed=draw)
            place = arguments.work / f"{contrast}-{draw}"
            made = implant_cohort(arguments.brains, arguments.lesions, place, config=config)
            cohort = read_cohort(made.table, target="diagnosis")
            features = arguments.work / "features"
            done = extract(cohort, backbone, features, slices=recipe.slices, patches=recipe.patches)
            bags = load_bags(cohort, done.store)
            found = score_anomalies(bags, folds=6)
            truth = pd.read_csv(made.truth, dtype={"scan": str, "mask": str}, keep_default_na=False).set_index("scan")
            labels = bags.labels.numpy()
            patch, hit = [], []
            for i in np.flatnonzero(labels == 1):
                mask = nib.load(made.truth.parent / truth.loc[bags.scans[i].id, "mask"])
                affine = done.store.read(bags.scans[i].path).affine_ras[0]
                share = lesion_share(mask, affine, found.maps[i].shape, recipe.slices.size_px)
                tissue = bags.tokens[i].tissue
                inside, outside = tissue & (share >= 0.5), tissue & (share == 0)
                if inside.any():
                    values = np.concatenate([found.maps[i][inside], found.maps[i][outside]])
                    patch.append(roc_auc_score(np.arange(len(values)) < inside.sum(), values))
                hit.append(share[found.slice_scores[i].argmax()].max() > 0)
            score = found.table["score"].to_numpy()
            draws.append((contrast, draw, roc_auc_score(labels, score), np.mean(patch), np.mean(hit)))
            lesion_ml = [float(truth.loc[scan.id, "lesion_ml"] or 0) for scan in bags.scans]
            scans += zip([contrast] * len(labels), labels, lesion_ml, found.table["percentile"], strict=True)
            print(f"{contrast} draw {draw} done", flush=True)
    report(draws, scans, weights.title)


def lesion_share(mask: nib.Nifti1Image, affine_ras: np.ndarray, grid: tuple[int, ...], size_px: int) -> np.ndarray:
    """Give the share of each patch that is lesion, read at every second pixel, [slices, rows, columns]."""
    slices, rows, columns = grid
    px = np.arange(SAMPLE_PX / 2 - 0.5, size_px, SAMPLE_PX)
    index = np.stack([*np.meshgrid(px, px, np.arange(slices), indexing="ij"), np.ones((len(px), len(px), slices))])
    voxel = np.rint((np.linalg.inv(mask.affine) @ affine_ras @ index.reshape(4, -1))[:3]).astype(int)
    data = np.asarray(mask.dataobj) > 0
    within = ((voxel >= 0) & (voxel < np.array(data.shape)[:, None])).all(axis=0)
    values = np.zeros(voxel.shape[1])
    values[within] = data[tuple(voxel[:, within])]
    return (
        values.reshape(rows, len(px) // rows, columns, len(px) // columns, slices).mean(axis=(1, 3)).transpose(2, 0, 1)
    )


def report(draws: list[tuple[str, int, float, float, float]], scans: list[tuple], title: str) -> None:
    """Print a row a contrast, and the curve against volume (lesion scans of a size against all healthy ones)."""
    print(f"\nweights: {title}; no lesion label used; 6 folds\n")
    print("| contrast | draws | scan AUROC (min-max) | patch AUROC (min-max) | heaviest slice holds lesion (min-max) |")
    print("|---|---|---|---|---|")
    table = pd.DataFrame(draws, columns=["contrast", "draw", "scan", "patch", "hit"])
    for contrast, group in table.groupby("contrast", sort=False):
        cells = [f"{group[c].mean():.2f} ({group[c].min():.2f}-{group[c].max():.2f})" for c in ("scan", "patch", "hit")]
        print(f"| {contrast} | {len(group)} | {' | '.join(cells)} |")
    print("\n| contrast | mL | lesions | AUROC |\n|---|---|---|---|")
    cases = pd.DataFrame(scans, columns=["contrast", "label", "ml", "percentile"])
    for contrast, group in cases.groupby("contrast", sort=False):
        healthy = group[group["label"] == 0]
        for low, high in pairwise(VOLUMES_ML):
            lesions = group[(group["label"] == 1) & (group["ml"] >= low) & (group["ml"] < high)]
            if len(lesions) >= 5:
                both = pd.concat([healthy, lesions])
                print(
                    f"| {contrast} | {low}-{high} | {len(lesions)} | {roc_auc_score(both.label, both.percentile):.2f} |"
                )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brains", type=Path, required=True)
    parser.add_argument("--lesions", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--contrasts", nargs="+", default=["dark", "subtle"], choices=list(PRESETS))
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2])
    return parser.parse_args()


if __name__ == "__main__":
    main()
