"""Ways to learn from one case among ten controls, where there is something to learn.

    python benchmarks/rare.py

200 controls and 20 cases of random features with a planted effect train trained attention; 400 others are scored.
The real brains of `recipes.py --task rare` have four lesions, too few for any of these to show. No
backbone is involved.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import balanced_accuracy_score, recall_score, roc_auc_score
from training import planted

from dinoatten3d.learning.fit import Job, fit_jobs
from dinoatten3d.toml import load_recipe

SEEDS = 5


def main() -> None:
    bags = planted(840, 12, 64, shift=0.8)
    labels = bags.labels.numpy()
    jobs = []
    for seed in range(SEEDS):
        order = np.random.default_rng(seed).permutation(len(bags))
        controls, cases = (order[labels[order] == label] for label in (0, 1))
        rows = np.concatenate([controls[:200], cases[:20]])
        jobs.append(Job(rows=rows, labels=labels[rows], seed=seed))
    figures = []
    for path in sorted(Path(__file__).with_name("imbalance").glob("*.toml")):
        for job, fitted in zip(jobs, fit_jobs(bags, jobs, load_recipe(path)), strict=True):
            test = np.setdiff1d(np.arange(len(bags)), job.rows)
            test = np.concatenate([test[labels[test] == label][:200] for label in (0, 1)])
            probability = fitted.model.score(bags.take(test))[0][:, 1]
            figures.append(
                {
                    "recipe": path.stem,
                    "AUROC": roc_auc_score(labels[test], probability),
                    "sensitivity": recall_score(labels[test], probability > 0.5),
                    "balanced accuracy": balanced_accuracy_score(labels[test], probability > 0.5),
                }
            )
    table = pd.DataFrame(figures).groupby("recipe").agg(["mean", "std"])
    print("| recipe | AUROC | sensitivity | balanced accuracy |\n|---|---|---|---|")
    for name, row in table.iterrows():
        cells = [f"{row[c, 'mean']:.2f} ({row[c, 'std']:.2f})" for c in ("AUROC", "sensitivity", "balanced accuracy")]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
