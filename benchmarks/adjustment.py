"""Which way of taking a site out of features is honest? Simulated scans, where the truth is known.

    python benchmarks/adjustment.py --draws 40

72 scans, 100 independent features, a site that makes up 70 % of one class and 30 % of the other. Logistic regression
(C = 0.01) in 5 folds; AUROC over all scans and within sites. The rows that are no option of `train` are fitted here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import StratifiedKFold

from dinoatten3d.config import AdjustConfig
from dinoatten3d.data.cohort import Scan
from dinoatten3d.evaluation.controls import fit_and_score, mean_pooled
from dinoatten3d.evaluation.metrics import score
from dinoatten3d.learning.adjust import Adjustment, Residual, fit_adjustment
from dinoatten3d.learning.bags import Bags

SITE, COMBAT = AdjustConfig(covariates=("site",)), AdjustConfig(covariates=("site",), method="combat")
TRUTHS = {
    "site alone": {"site": 1.0, "scale": 1.0, "classes": 0.0},
    "site alone, 1.5 times the spread": {"site": 1.0, "scale": 1.5, "classes": 0.0},
    "site and class": {"site": 1.0, "scale": 1.0, "classes": 0.12},
    "class alone": {"site": 0.0, "scale": 1.0, "classes": 0.12},
}
"""Effect of the site and of the class on every feature, and how much more scans of the second site vary."""
Fit = Callable[[Bags], Adjustment]


def main() -> None:
    draws = parse().draws
    fits: dict[str, Fit] = {
        "residual": lambda bags: fit_adjustment(bags, SITE),
        "combat": lambda bags: fit_adjustment(bags, COMBAT),
        "residual, beside the class": lambda bags: beside_the_class(bags, np.ones(len(bags), bool)),
        "residual, healthy scans only": lambda bags: beside_the_class(bags, bags.labels.numpy() == 0),
    }
    rows = []
    for truth, effects in TRUTHS.items():
        for draw in range(draws):
            bags = simulate(np.random.default_rng(draw), **effects)
            before = fit_adjustment(bags, SITE).apply(bags)
            found = {"none": figures(bags, None, draw), "residual, before the split": figures(before, None, draw)}
            found |= {name: figures(bags, fit, draw) for name, fit in fits.items()}
            rows += [{"truth": truth, "adjustment": name, **value} for name, value in found.items()]
    print(pd.DataFrame(rows).groupby(["truth", "adjustment"], sort=False).agg(["mean", "sem"]).round(3).to_string())


def simulate(
    rng: np.random.Generator, *, site: float, scale: float, classes: float, n: int = 72, dim: int = 100
) -> Bags:
    """Make bags of one slice a scan."""
    labels = np.repeat([0, 1], n // 2)
    other = rng.random(n) < np.where(labels == 1, 0.7, 0.3)
    x = rng.normal(size=(n, dim)) * np.where(other, scale, 1)[:, None]
    x += site * other[:, None] * np.sign(np.arange(dim) % 2 - 0.5)
    x += classes * labels[:, None] * np.sign(np.arange(dim) % 3 - 0.5)
    return Bags(
        features=torch.from_numpy(x).float()[:, None],
        mask=torch.ones(n, 1, dtype=torch.bool),
        labels=torch.from_numpy(labels),
        scans=tuple(
            Scan(id=str(i), path=Path(str(i)), subject=str(i), row=i, site="AB"[int(o)]) for i, o in enumerate(other)
        ),
        position_mm=np.zeros((n, 1)),
        brain_ml=np.full(n, 1400.0),
        classes=("NL", "AD"),
        planes=("axial",),
        tokens=(None,) * n,
    )


def beside_the_class(bags: Bags, used: np.ndarray) -> Adjustment:
    """Fit the site's effect with the class in the model, on some of the scans (of one class: on those alone)."""
    design = fit_adjustment(bags, SITE).design
    columns = np.concatenate([design.encode(bags), np.eye(2)[bags.labels.numpy()]], axis=1)[used]
    slope = np.linalg.lstsq(columns, mean_pooled(bags)[used], rcond=None)[0][: len(design.columns)]
    return Adjustment(design=design, parts={"features": Residual(slope=slope)})


def figures(bags: Bags, fit: Fit | None, seed: int) -> dict[str, float]:
    """AUROC out of fold, over all scans and as the mean within sites."""
    labels, answers = bags.labels.numpy(), np.zeros((len(bags), 2))
    for train, held_out in StratifiedKFold(5, shuffle=True, random_state=seed).split(labels, labels):
        seen, unseen = bags.take(train), bags.take(held_out)
        if fit is not None:
            adjustment = fit(seen)
            seen, unseen = adjustment.apply(seen), adjustment.apply(unseen)
        answers[held_out] = fit_and_score(mean_pooled(seen), labels[train], mean_pooled(unseen), 0.01)
    site = np.array([scan.site for scan in bags.scans])
    within = [score(labels[site == name], answers[site == name]).auroc for name in ("A", "B")]
    return {"all scans": score(labels, answers).auroc, "within sites": float(np.mean(within))}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=40)
    return parser.parse_args()


if __name__ == "__main__":
    main()
