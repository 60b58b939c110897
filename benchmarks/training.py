"""Folds, repeats and shuffled labels trained together, against one at a time.

    python benchmarks/training.py --threads 2

Bags of random features in which a third of the slices of one class carry a planted effect. First the seconds of
processor time that one epoch of one model costs, in four ways measured in turn, and whether the figures are the
same. Then the whole: folds x repeats x members, and the shuffled labels, with their time.
No backbone is involved.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from dinoatten3d.config import Recipe
from dinoatten3d.data.cohort import Scan
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.fit import FittedFold, Job, fit_jobs
from dinoatten3d.learning.splits import inner_folds, outer_folds
from dinoatten3d.toml import load_recipe


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    bags = planted(arguments.scans, arguments.slices, arguments.dim)
    recipe = load_recipe("default")
    recipe = replace(recipe, model=replace(recipe.model, pooling="attention"))
    print(f"{arguments.scans} bags of {arguments.slices} x {arguments.dim}, {arguments.threads} threads\n")
    compare(bags, recipe)
    if not arguments.ratio_only:
        whole(bags, recipe, arguments.repeats, arguments.shuffles)


def compare(bags: Bags, recipe: Recipe, rounds: int = 3) -> None:
    """Time an epoch of a model in each way, best of several rounds in turn, and compare the figures."""
    recipe = replace(recipe, training=replace(recipe.training, epochs=4, patience=0))
    single = replace(recipe, training=replace(recipe.training, members=1))
    jobs = [with_inner_folds(bags, job) for job in jobs_of(bags, repeats=2, shuffle=False)]
    alone = [replace(job, validate=job.validate[:1]) for job in jobs[:3] if job.validate is not None]
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "a forward pass a scan, one model": (lambda: scan_by_scan(bags, jobs[0]), 1),
        "one model at a time": (lambda: [fit_jobs(bags, [job], single) for job in alone], 12),
        "one fold at a time, its 5 members together": (lambda: [fit_jobs(bags, [job], recipe) for job in jobs], 200),
        "all folds and repeats together": (lambda: [[fitted] for fitted in fit_jobs(bags, jobs, recipe)], 200),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, object] = {}
    for _ in range(rounds):
        for name, (run, epochs) in ways.items():
            started = time.process_time()
            answers[name] = run()
            seconds[name].append((time.process_time() - started) / epochs)
    slowest = min(next(iter(seconds.values())))
    print("| way | processor seconds an epoch of a model | ratio |\n|---|---|---|")
    for name, found in seconds.items():
        print(f"| {name} | {min(found):.3f} | {slowest / min(found):.1f} |")
    by_fold, together = list(answers.values())[2:]
    worst = max(
        float(np.nanmax(np.abs(one[0].inner - other[0].inner)))
        for one, other in zip(by_fold, together, strict=True)  # type: ignore[call-overload]
    )
    print(f"\nlargest difference of a probability, one fold at a time against all together: {worst:.1e}\n")


def whole(bags: Bags, recipe: Recipe, repeats: int, shuffles: int) -> None:
    """Train repeated cross-validation and the shuffled labels in one go each."""
    for name, count, shuffle in (("repeats", repeats, False), ("shuffles", shuffles, True)):
        jobs = jobs_of(bags, repeats=count, shuffle=shuffle)
        started = time.monotonic()
        fitted = fit_jobs(bags, jobs, recipe)
        seconds = time.monotonic() - started
        figures = aurocs(bags, jobs, fitted)
        models = len(jobs) * recipe.training.members
        print(
            f"{count} {name} x 5 folds x {recipe.training.members} members = {models} models: {seconds:.0f} s, "
            f"AUROC {np.mean(figures):.3f} ({min(figures):.3f} to {max(figures):.3f})",
            flush=True,
        )


def jobs_of(bags: Bags, *, repeats: int, shuffle: bool) -> list[Job]:
    """Five folds a repeat; with shuffle, labels are dealt out anew for every repeat."""
    jobs = []
    for repeat in range(repeats):
        labels = bags.labels.numpy()
        if shuffle:
            labels = np.random.default_rng(repeat).permutation(labels)
        folds = outer_folds(labels, bags.subjects, bags.classes, folds=5, seed=repeat)
        for fold in range(5):
            rows = np.flatnonzero(folds != fold)
            jobs.append(Job(rows=rows, labels=labels[rows], seed=1000 * repeat + fold))
    return jobs


def with_inner_folds(bags: Bags, job: Job) -> Job:
    """Draw the inner folds beforehand: they cost the same in every way of training, and are not what is timed."""
    inner = inner_folds(job.labels, bags.subjects[job.rows], folds=5, seed=job.seed)
    return replace(job, validate=inner == np.arange(5)[:, None])


def aurocs(bags: Bags, jobs: list[Job], fitted: list[FittedFold]) -> list[float]:
    """AUROC of each repeat against the labels that it was trained for, scored out of fold."""
    figures = []
    for start in range(0, len(jobs), 5):
        score, labels = np.zeros(len(bags)), np.zeros(len(bags), dtype=np.int64)
        for job, found in zip(jobs[start : start + 5], fitted[start : start + 5], strict=True):
            held_out = np.setdiff1d(np.arange(len(bags)), job.rows)
            score[held_out] = found.model.score(bags.take(held_out))[0][:, 1]
            labels[job.rows] = job.labels
        figures.append(float(roc_auc_score(labels, score)))
    return figures


def scan_by_scan(bags: Bags, job: Job) -> None:
    """Train and validate one plain model for an epoch as the published scripts do, with a forward pass a scan."""
    attention = torch.nn.Sequential(
        torch.nn.Linear(bags.features.shape[-1], 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)
    )
    classifier = torch.nn.Linear(bags.features.shape[-1], len(bags.classes))
    optimiser = torch.optim.AdamW([*attention.parameters(), *classifier.parameters()], lr=1e-3)

    def loss_of(batch: np.ndarray) -> torch.Tensor:
        pooled = [torch.softmax(attention(bags.features[n]), dim=0).T @ bags.features[n] for n in batch]
        logits = torch.cat([classifier(feature) for feature in pooled])
        return torch.nn.functional.cross_entropy(logits, bags.labels[batch])

    validation, rows = np.split(job.rows, [len(job.rows) // 5])
    for batch in np.array_split(rows, len(rows) // 16):
        loss = loss_of(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        loss_of(validation)


def planted(scans: int, slices: int, dim: int, shift: float = 0.25) -> Bags:
    """Make bags of random features; in a third of the slices of the second class eight features are shifted."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(scans) % 2
    features = torch.randn((scans, slices, dim), generator=generator)
    shifted = (torch.rand((scans, slices), generator=generator) < 1 / 3) & (labels == 1)[:, None]
    features[..., :8] += shift * shifted.unsqueeze(-1)
    return Bags(
        features=features,
        mask=torch.ones(scans, slices, dtype=torch.bool),
        labels=labels,
        scans=tuple(Scan(id=str(n), path=Path(str(n)), subject=str(n), row=n) for n in range(scans)),
        position_mm=np.zeros((scans, slices)),
        brain_ml=np.zeros(scans),
        classes=("healthy", "planted"),
        planes=("axial",) * slices,
        tokens=(None,) * scans,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=500)
    parser.add_argument("--slices", type=int, default=50)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shuffles", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ratio-only", action="store_true", help="leave the whole run out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
