"""Train a recipe inside one outer fold, and over all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoatten3d.config import AdjustConfig, EvaluationConfig, Recipe
from dinoatten3d.learning.adjust import Adjustment, fit_adjustment
from dinoatten3d.learning.bags import Bags, Look
from dinoatten3d.learning.deviation_model import fit_deviation_model
from dinoatten3d.learning.splits import partition, repeat_of
from dinoatten3d.learning.stack import Job
from dinoatten3d.learning.train import train_jobs

Progress = Callable[[int, int], None]


@runtime_checkable
class FoldModel(Protocol):
    """What a fold leaves behind, whatever kind it is."""

    def score(self, bags: Bags) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Give probabilities `[scans, classes]` and slice weights `[scans, slices]`."""

    def look(self, bags: Bags) -> Look:
        """Give the same and how much each patch deviates, computed once."""

    def notes(self) -> list[str]:
        """Give what a reader of an answer should know of the model."""

    def tensors(self) -> dict[str, Tensor]:
        """Give what to keep on disk."""


@dataclass(frozen=True, kw_only=True)
class AdjustedModel:
    """A model of adjusted features with the adjustment of its fold, which it makes itself."""

    adjustment: Adjustment
    model: FoldModel

    def score(self, bags: Bags) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Adjust scans and score them."""
        return self.model.score(self.adjustment.apply(bags))

    def look(self, bags: Bags) -> Look:
        """Adjust scans and look at them."""
        return self.model.look(self.adjustment.apply(bags))

    def notes(self) -> list[str]:
        """Give the model's own notes."""
        return self.model.notes()

    def unknown(self, bags: Bags) -> list[str]:
        """Say which covariates of one scan are not known."""
        return self.adjustment.unknown(bags)

    def tensors(self) -> dict[str, Tensor]:
        """Give the model's tensors, and those of the adjustment under `adjust.`."""
        return self.model.tensors() | {f"adjust.{name}": t for name, t in self.adjustment.tensors().items()}


class Choice(NamedTuple):
    """The recipe that inner folds chose for a fold, and the inner AUROC of each candidate."""

    name: str
    recipe: Recipe
    aurocs: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class FittedFold:
    """The model of one outer fold.

    Attributes:
        model: The model.
        history: How it got there, a row for each member and epoch; nothing where it was solved and not trained.
        inner: Probabilities of its own training scans from the members that were not fitted on them,
            `[train, classes]`: what calibration may see. NaN where no member held a scan out. A member's epoch (or the
            attention's direction) was chosen on the same scans, so they are a little too good.
        choice: How its recipe was chosen, where there were several.
    """

    model: FoldModel
    history: list[dict[str, Any]]
    inner: NDArray[np.float64]
    choice: Choice | None = None


@runtime_checkable
class Fit(Protocol):
    """Fits a model for each job."""

    def __call__(self, bags: Bags, jobs: Sequence[Job], *, progress: Progress) -> list[FittedFold]:
        """Give the models in the order of the jobs."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Probabilities `[scans, classes]` and slice weights `[scans, slices]`, averaged over the members."""

    probabilities: NDArray[np.float64]
    weights: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """Out-of-fold answers and the models that gave them.

    Attributes:
        folds: Which fold scored each scan in each repeat, `[repeats, scans]`; -1: none (learning/splits.py).
        by_repeat: Probabilities in each repeat, `[repeats, scans, classes]`; zero where a scan was not held out.
        scored: The same, and slice weights, averaged over the repeats.
        fitted: The model of each fold.
        seconds: Time taken.
    """

    folds: NDArray[np.int64]
    by_repeat: NDArray[np.float64]
    scored: Scored
    fitted: tuple[FittedFold, ...]
    seconds: float


def cross_validate(
    bags: Bags,
    recipe: Recipe,
    evaluation: EvaluationConfig,
    *,
    folds: NDArray[np.int64] | None = None,
    fit: Fit | None = None,
    progress: Progress = lambda done, total: None,
) -> CrossValidation:
    """Train one model (or ensemble) for each outer fold and score each scan with the one that never saw its subject.

    Args:
        bags: Labelled bags.
        recipe: Model, loss and training.
        evaluation: Kind and number of folds, and the seed.
        folds: The fold of each scan, `[scans]` or `[repeats, scans]`, where it is decided elsewhere.
        fit: Fits the models of all folds; by default `fit_jobs` with the recipe.
        progress: Called with epochs done and the most there can be.

    Returns:
        Out-of-fold probabilities and slice weights, and the models.
    """
    started = time.monotonic()
    labels = bags.labels.numpy()
    if folds is None:
        folds = partition(bags.scans, labels, bags.classes, evaluation)
    folds = np.atleast_2d(folds)
    jobs = fold_jobs(folds, labels, evaluation.seed)
    fitted = (fit or partial(fit_jobs, recipe=recipe))(bags, jobs, progress=progress)
    probabilities = np.zeros((*folds.shape, len(bags.classes)))
    weights = np.zeros((len(folds), *bags.mask.shape))
    for fold, found in enumerate(fitted):
        repeat, held_out = np.nonzero(folds == fold)
        probabilities[repeat, held_out], weights[repeat, held_out] = found.model.score(bags.take(held_out))
    return over_repeats(folds, probabilities, weights, fitted, seconds=time.monotonic() - started)


def over_repeats(
    folds: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    weights: NDArray[np.float64],
    fitted: Sequence[FittedFold],
    *,
    seconds: float,
) -> CrossValidation:
    """Average the answers of each repeat, `[repeats, scans, classes]` and `[repeats, scans, slices]`."""
    return CrossValidation(
        folds=folds,
        by_repeat=probabilities,
        scored=Scored(probabilities=probabilities.mean(axis=0), weights=weights.mean(axis=0)),
        fitted=tuple(fitted),
        seconds=seconds,
    )


def fold_jobs(folds: NDArray[np.int64], labels: NDArray[np.int64], seed: int) -> list[Job]:
    """Give the job of each fold: train on what its repeat does not hold out in it.

    Args:
        folds: Which fold scores each scan, `[repeats, scans]`.
        labels: Class index, `[scans]`.
        seed: Of the cross-validation.
    """
    jobs = []
    for fold in range(int(folds.max()) + 1):
        rows = np.flatnonzero(folds[repeat_of(folds, fold)] != fold)
        jobs.append(Job(rows=rows, labels=labels[rows], seed=seed * 1000 + fold))
    return jobs


def fit_jobs(
    bags: Bags, jobs: Sequence[Job], recipe: Recipe, *, progress: Progress = lambda done, total: None
) -> list[FittedFold]:
    """Fit a model for each job: folds, repeats and shuffled labels in one go, with the figures of one at a time.

    With pooling by deviation a model is solved in closed form, one after the other. Otherwise all train side by side;
    member m is validated on inner fold m and trained on the others, and its epoch is the one with the best
    validation figure. Scans that will be scored are not among a job's rows.

    Args:
        bags: What the jobs' rows point into.
        jobs: Training rows, their labels and the seed of each model.
        recipe: Model, loss and training.
        progress: Called with epochs done and the most there can be, over all jobs.
    """
    if recipe.adjust.covariates:
        return _fit_adjusted(bags, jobs, recipe, progress)
    if recipe.model.pooling == "attention":
        return [FittedFold(**trained._asdict()) for trained in train_jobs(bags, jobs, recipe, progress=progress)]
    fitted = []
    for done, job in enumerate(jobs, start=1):
        train = replace(bags.take(job.rows), labels=torch.from_numpy(job.labels))
        solved = fit_deviation_model(train, seed=job.seed)
        fitted.append(FittedFold(model=solved.model, history=[], inner=solved.inner))
        progress(done * recipe.training.epochs, len(jobs) * recipe.training.epochs)
    return fitted


def _fit_adjusted(bags: Bags, jobs: Sequence[Job], recipe: Recipe, progress: Progress) -> list[FittedFold]:
    """Adjust the training scans of each job by themselves and fit on them, one job after the other."""
    plain, epochs = replace(recipe, adjust=AdjustConfig()), recipe.training.epochs
    fitted = []
    for done, job in enumerate(jobs):
        train = replace(bags.take(job.rows), labels=torch.from_numpy(job.labels))
        adjustment = fit_adjustment(train, recipe.adjust)
        own = fit_jobs(
            adjustment.apply(train),
            [replace(job, rows=np.arange(len(train)))],
            plain,
            progress=lambda now, total, done=done: progress(done * epochs + now, len(jobs) * epochs),  # type: ignore[misc]
        )[0]
        fitted.append(replace(own, model=AdjustedModel(adjustment=adjustment, model=own.model)))
    return fitted


def fit_fold(bags: Bags, recipe: Recipe, *, seed: int) -> FittedFold:
    """Fit one model on all of the bags, as `fit_jobs` does."""
    return fit_jobs(bags, [Job(rows=np.arange(len(bags)), labels=bags.labels.numpy(), seed=seed)], recipe)[0]
