"""What each fault of the published protocol adds to the figures: `published` as its scripts evaluate it, then mended.

    python benchmarks/faults.py --brains BRAINS --lesions MASKS --work WORK

Every subject has three scans: the same brain with another gain, bias field, sub-voxel shift and noise, as
three sessions on one scanner would have. The model, its features and its 1000 epochs are the same in every row; only
the way it is judged changes:

- split by scan: another scan of a test subject is in training;
- checkpoint on test: the epoch with the best accuracy on the very scans that are reported;
- AUC of hard labels: the ROC curve of yes and no instead of probabilities.

Two tasks: labels dealt to subjects at random (nothing to find: an honest AUC is 0.5), and real lesion masks implanted
in half of the subjects. Figures are means over five folds and the seeds (in brackets: smallest and largest over seeds);
a seed decides folds, weights and random labels.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from dinoatten3d.config import PatchConfig
from dinoatten3d.data.cohort import read_cohort
from dinoatten3d.demo.implant import DARK, implant_cohort
from dinoatten3d.features.backbone import load_backbone
from dinoatten3d.features.extract import extract
from dinoatten3d.features.weights import find_weights
from dinoatten3d.files import whole_folder
from dinoatten3d.learning.bags import Bags, load_bags
from dinoatten3d.learning.fit import FittedFold, Job, fit_jobs
from dinoatten3d.learning.splits import group_folds, outer_folds
from dinoatten3d.toml import load_recipe

FOLDS = 5


class Trial(NamedTuple):
    """One training: its task and protocol, the scans that are reported with their labels, and the job."""

    task: str
    seed: int
    split: str
    checkpoint: str
    reported: np.ndarray
    labels: np.ndarray
    job: Job


def main() -> None:
    arguments = parse()
    weights = find_weights("auto", print)
    work = arguments.work
    table = sessions(arguments.brains, arguments.lesions, work, draw=arguments.draw, count=arguments.sessions)
    recipe = load_recipe("published")
    slices = replace(recipe.slices, count=arguments.slices, spacing_mm=10.0, size_px=arguments.size_px)
    cohort = read_cohort(table, target="diagnosis")
    store = extract(
        cohort,
        load_backbone(weights),
        work / "features",
        slices=slices,
        patches=PatchConfig(layers=(), blemished=0),
    ).store
    bags = load_bags(cohort, store)
    recipe = replace(recipe, training=replace(recipe.training, epochs=arguments.epochs, patience=0))
    trials = list(all_trials(bags, arguments.seeds))
    fitted = fit_jobs(bags, [trial.job for trial in trials], recipe)
    rows = pd.DataFrame([figures(bags, trial, found) for trial, found in zip(trials, fitted, strict=True)])
    rows.to_csv(work / "faults.csv", index=False)
    people = len(set(bags.subjects))
    print(f"\nweights: {weights.title}; {len(bags)} scans of {people} subjects; {len(arguments.seeds)} seeds\n")
    print(summary(rows))


def all_trials(bags: Bags, seeds: list[int]) -> Iterator[Trial]:
    """Give every task, seed, way to split, way to choose the epoch, and fold."""
    subjects, scans = bags.subjects, np.array([scan.id for scan in bags.scans])
    for seed in seeds:
        rng = np.random.default_rng(seed)
        people = np.unique(subjects)
        dealt = dict(zip(people, rng.permutation(np.arange(len(people)) % 2), strict=True))
        tasks = {"null": np.array([dealt[s] for s in subjects]), "lesion": bags.labels.numpy()}
        for task, labels in tasks.items():
            for by, groups in (("scan", scans), ("subject", subjects)):
                folds = outer_folds(labels, groups, bags.classes, folds=FOLDS, seed=seed)
                for fold in range(FOLDS):
                    yield from two_checkpoints(task, seed, by, labels, groups, folds == fold, 100 * seed + fold)


def two_checkpoints(
    task: str, seed: int, split: str, labels: np.ndarray, groups: np.ndarray, test: np.ndarray, job_seed: int
) -> Iterator[Trial]:
    """Choose the epoch on the test scans, or on a quarter of the others, split in the same way."""
    reported, train = np.flatnonzero(test), np.flatnonzero(~test)
    everything = np.arange(len(labels))
    inner = group_folds(labels[train], groups[train], folds=4, seed=job_seed)
    jobs = {
        "test": Job(rows=everything, labels=labels, seed=job_seed, validate=test[None]),
        "inner": Job(rows=train, labels=labels[train], seed=job_seed, validate=(inner == 0)[None]),
    }
    for checkpoint, job in jobs.items():
        yield Trial(task, seed, split, checkpoint, reported, labels[reported], job)


def figures(bags: Bags, trial: Trial, fitted: FittedFold) -> dict[str, object]:
    """Judge a trained model on the scans that are reported, by probabilities and by hard labels."""
    probability = fitted.model.score(bags.take(trial.reported))[0][:, 1]
    hard = probability > 0.5
    return {
        "task": trial.task,
        "seed": trial.seed,
        "split": trial.split,
        "checkpoint": trial.checkpoint,
        "accuracy": (hard == trial.labels).mean(),
        "probabilities": roc_auc_score(trial.labels, probability),
        "hard labels": roc_auc_score(trial.labels, hard),
    }


def summary(rows: pd.DataFrame) -> str:
    """Give a row a protocol: AUC and accuracy of both tasks, with the spread over seeds."""
    protocols = (
        ("**as the scripts do it**", "scan", "test", "hard labels"),
        ("AUC of probabilities", "scan", "test", "probabilities"),
        ("+ checkpoint on an inner fold", "scan", "inner", "probabilities"),
        ("+ split by subject: **no fault left**", "subject", "inner", "probabilities"),
        ("only fault: split by scan", "scan", "inner", "probabilities"),
        ("only fault: checkpoint on test", "subject", "test", "probabilities"),
        ("only fault: AUC of hard labels", "subject", "inner", "hard labels"),
    )
    lines = ["| protocol | null AUC | null accuracy | lesion AUC | lesion accuracy |", "|---|---|---|---|---|"]
    for name, split, checkpoint, scored in protocols:
        kept = rows[(rows["split"] == split) & (rows["checkpoint"] == checkpoint)]
        cells = []
        for task in ("null", "lesion"):
            by_seed = kept[kept["task"] == task].groupby("seed")[[scored, "accuracy"]].mean()
            cells += [f"{by_seed[c].mean():.2f} ({by_seed[c].min():.2f}-{by_seed[c].max():.2f})" for c in by_seed]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sessions(brains: Path, lesions: Path, work: Path, *, draw: int, count: int) -> Path:
    """Write several scans of each subject of an implanted cohort and give their table; made once."""
    folder = work / f"sessions-{draw}"
    if folder.exists():
        return folder / "cohort.csv"
    made = implant_cohort(brains, lesions, work / f"dark-{draw}", config=replace(DARK, seed=draw))
    cohort = pd.read_csv(made.table, dtype=str)
    rows = []
    with whole_folder(folder) as target:
        for number, row in cohort.iterrows():
            image = nib.load(made.table.parent / row["path"])
            for session in range(count):
                name = f"{row['subject']}_ses-{session}.nii.gz"
                rng = np.random.default_rng([draw, int(str(number)), session])
                nib.save(nib.Nifti1Image(another_session(image.get_fdata(), rng), image.affine), target / name)
                rows.append({"path": name, "subject": row["subject"], "diagnosis": row["diagnosis"]})
        pd.DataFrame(rows).to_csv(target / "cohort.csv", index=False)
    return folder / "cohort.csv"


def another_session(brain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scan the same brain again: shift up to half a voxel, gain, smooth bias field of 10 %, 2 % noise."""
    moved = ndimage.shift(brain, rng.uniform(-0.5, 0.5, 3), order=1)
    bias = ndimage.zoom(rng.normal(0, 0.1, (3, 3, 3)), np.array(brain.shape) / 3, order=3)
    noise = rng.normal(0, 0.02 * brain.max(), brain.shape)
    return np.where(moved > 0, moved * rng.uniform(0.8, 1.2) * np.exp(bias) + noise, 0).clip(0).astype(np.float32)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brains", type=Path, required=True)
    parser.add_argument("--lesions", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the cohort, features and faults.csv")
    parser.add_argument("--draw", type=int, default=0, help="seed of the implanted cohort")
    parser.add_argument("--sessions", type=int, default=3)
    parser.add_argument("--slices", type=int, default=5, help="slices a scan, 10 mm apart")
    parser.add_argument("--size-px", type=int, default=224)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=1000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
