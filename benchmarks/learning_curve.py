"""Does the extrapolated learning curve hold? Synthetic bags whose true AUROC at any number of training scans is known.

Two normal classes; the mean over slices has unit variance in every dimension. For a linear score w the true AUROC is
then Phi(w . delta / (sqrt(2) |w|)), so that the truth at n, 2 n and 4 n training scans needs no test set.

    python benchmarks/learning_curve.py --draws 60 --scans 40 80 160
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from dinoatten3d.config import EvaluationConfig
from dinoatten3d.data.cohort import Scan
from dinoatten3d.evaluation.controls import fit_and_score, mean_pooled, out_of_fold
from dinoatten3d.evaluation.learning_curve import Trial, trace_curve, train_on_shares
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.splits import partition

SLICES, DIM, STRENGTH = 3, 64, 0.01


def synthetic_bags(scans: int, delta: np.ndarray, rng: np.random.Generator) -> Bags:
    """Draw a cohort with as many scans of each class."""
    labels = np.arange(scans) % 2
    noise = rng.standard_normal((scans, SLICES, DIM)) * np.sqrt(SLICES)
    features = noise + (labels[:, None] - 0.5)[:, None] * delta
    names = [Scan(id=f"s{i}", path=Path(f"s{i}"), subject=f"s{i}", row=i, label=str(labels[i])) for i in range(scans)]
    return Bags(
        features=torch.from_numpy(features).float(),
        mask=torch.ones(scans, SLICES, dtype=torch.bool),
        labels=torch.from_numpy(labels),
        scans=tuple(names),
        position_mm=np.zeros((scans, SLICES)),
        brain_ml=np.ones(scans),
        classes=("0", "1"),
        planes=("axial",) * SLICES,
        tokens=(None,) * scans,
    )


def true_auroc(scans: int, delta: np.ndarray, rng: np.random.Generator, draws: int = 200) -> float:
    """Mean over training sets of this size of the AUROC on all there is."""
    found = []
    for _ in range(draws):
        bags = synthetic_bags(scans, delta, rng)
        scaler = StandardScaler().fit(x := mean_pooled(bags))
        fitted = LogisticRegression(C=STRENGTH).fit(scaler.transform(x), bags.labels.numpy())
        weight = fitted.coef_[0] / scaler.scale_
        found.append(norm.cdf(weight @ delta / np.sqrt(2) / np.linalg.norm(weight)))
    return float(np.mean(found))


def one_curve(bags: Bags, evaluation: EvaluationConfig):
    """Trace the curve of mean pooling + logistic regression on a cohort."""
    labels, x = bags.labels.numpy(), mean_pooled(bags)
    folds = partition(bags.scans, labels, bags.classes, evaluation)[0]
    trials, _ = train_on_shares(
        bags,
        folds,
        lambda rows, held_out, fold: fit_and_score(x[rows], labels[rows], x[held_out], STRENGTH),
        seed=evaluation.seed,
    )
    size = float(np.mean([(folds != k).sum() for k in range(evaluation.folds)]))
    trials.append(Trial(1.0, size, out_of_fold(bags, folds, mean_pooled, STRENGTH)[0]))
    return trace_curve("mean pooling", labels, bags.subjects, folds >= 0, trials, evaluation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--scans", type=int, nargs="+", default=[40, 80, 160])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--best", type=float, nargs="+", default=[0.95, 0.5], help="AUROC of the best linear score")
    options = parser.parse_args()
    print("| best | scans | followed | times | truth | extrapolated, mean | sd | band holds truth | seconds a cohort |")
    print("|---|---|---|---|---|---|---|---|---|")
    for best in options.best:
        delta = np.zeros(DIM)
        delta[:4] = norm.ppf(best) * np.sqrt(2) / 2
        for scans in options.scans:
            started = time.monotonic()
            curves = []
            for draw in range(options.draws):
                bags = synthetic_bags(scans, delta, np.random.default_rng([options.seed, draw, scans]))
                curves.append(one_curve(bags, EvaluationConfig(seed=draw, bootstrap=400)))
            seconds = (time.monotonic() - started) / options.draws
            for number, times in enumerate((2, 4)):
                ahead = [curve.ahead[number] for curve in curves if len(curve.ahead) > number]
                shown = f"| {best:.2f} | {scans} | {len(ahead)} of {len(curves)} | {times} "
                if ahead:
                    truth = true_auroc(round(ahead[0]["scans"]), delta, np.random.default_rng(1))
                    value = np.array([place["value"] for place in ahead])
                    held = np.mean([place["low"] <= truth <= place["high"] for place in ahead])
                    shown += f"| {truth:.3f} | {value.mean():.3f} | {value.std():.3f} | {100 * held:.0f} % "
                else:
                    shown += "| - | - | - | - "
                print(f"{shown}| {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
