"""What a model has to beat: simpler models on the same folds, and itself on labels that mean nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dinoatten3d.config import AdjustConfig, EvaluationConfig, Recipe
from dinoatten3d.data.covariates import covariate_matrix, covariate_table
from dinoatten3d.errors import CohortError
from dinoatten3d.evaluation.metrics import score
from dinoatten3d.learning.adjust import fit_adjustment
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.fit import Fit, FittedFold, fit_jobs, fold_jobs
from dinoatten3d.learning.splits import partition
from dinoatten3d.learning.stack import Job

Array = NDArray[np.float64]
Inputs = Callable[[Bags], Array]
NO_ADJUSTMENT = AdjustConfig()


def mean_pooled(bags: Bags) -> Array:
    """Average the slices of each scan, `[scans, dim]`."""
    return _pooled(bags, np.ones(bags.mask.shape))


def max_pooled(bags: Bags) -> Array:
    """Take the largest value of each feature over the slices, `[scans, dim]`."""
    hidden = bags.features.masked_fill(~bags.mask.unsqueeze(-1), float("-inf"))
    return np.asarray(hidden.amax(dim=1).double().numpy())


def randomly_attended(bags: Bags) -> Array:
    """Average the slices with the softmax of standard normal scores, drawn once for each slice, `[scans, dim]`."""
    scores = np.random.default_rng(0).standard_normal(bags.mask.shape)
    return _pooled(bags, softmax(scores, axis=1))


def head_size(bags: Bags) -> Array:
    """Brain volume alone, mL, `[scans, 1]`."""
    return bags.brain_ml[:, None]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A model without the network's attention.

    `strength` is the inverse C of logistic regression's L2 penalty; an `image` baseline sees features, which are
    adjusted as the model's are.
    """

    name: str
    description: str
    inputs: Inputs | None
    strength: float = 1.0
    image: bool = False


def baselines(target: str | None) -> tuple[Baseline, ...]:
    """List the baselines; the covariate that is itself the target is left out of `covariates`."""
    names = [name for name in ("age", "sex", "site") if name != target]

    def covariates(bags: Bags) -> Array:
        table = covariate_table(bags.scans, brain_ml=bags.brain_ml, without=target)
        return np.asarray(covariate_matrix(table).to_numpy())

    shown = f"{', '.join(names)} and head size"
    return (
        Baseline(
            name="prior",
            description="the class frequencies of the training scans; only the pooling of folds moves it from 0.50",
            inputs=None,
        ),
        Baseline(name="head size", description="logistic regression on brain volume alone", inputs=head_size),
        Baseline(
            name="covariates",
            description=f"logistic regression on {shown}, as far as the table has them; no image",
            inputs=covariates,
        ),
        Baseline(
            name="mean pooling",
            description="logistic regression (C = 0.01) on the mean over slices",
            inputs=mean_pooled,
            strength=0.01,
            image=True,
        ),
        Baseline(
            name="max pooling",
            description="logistic regression (C = 0.01) on the maximum over slices",
            inputs=max_pooled,
            strength=0.01,
            image=True,
        ),
        Baseline(
            name="random attention",
            description="logistic regression (C = 0.01) on slices weighed at random",
            inputs=randomly_attended,
            strength=0.01,
            image=True,
        ),
    )


def run_baselines(
    bags: Bags, folds: NDArray[np.int64], target: str | None = None, adjust: AdjustConfig = NO_ADJUSTMENT
) -> dict[str, Array]:
    """Score every held-out scan with every baseline, each fitted on what the fold is trained on.

    Args:
        bags: Labelled bags.
        folds: Which fold scores each scan, `[scans]` or `[repeats, scans]` (learning/splits.py).
        target: Column of the label.
        adjust: What features are adjusted for in each fold.

    Returns:
        Name to probabilities, `[repeats, scans, classes]`.
    """
    seen = replace(bags, tokens=(None,) * len(bags), means=None)  # what no baseline looks at needs no adjustment
    return {
        b.name: out_of_fold(seen, folds, b.inputs, b.strength, adjust if b.image else NO_ADJUSTMENT)
        for b in baselines(target)
    }


def out_of_fold(
    bags: Bags,
    folds: NDArray[np.int64],
    inputs: Inputs | None,
    strength: float,
    adjust: AdjustConfig = NO_ADJUSTMENT,
) -> Array:
    """Give out-of-fold probabilities of logistic regression on `inputs`, or of the class frequencies without them."""
    folds = np.atleast_2d(folds)
    x = inputs(bags) if inputs is not None else np.zeros((len(bags), 0))
    labels = bags.labels.numpy()
    probabilities = np.zeros((*folds.shape, len(bags.classes)))
    for repeat, assigned in enumerate(folds):
        for fold in np.unique(assigned[assigned >= 0]):
            train, held_out = assigned != fold, assigned == fold
            if adjust.covariates and inputs is not None:
                x = adjusted_inputs(inputs(bags), bags, np.flatnonzero(train), adjust)
            probabilities[repeat, held_out] = fit_and_score(x[train], labels[train], x[held_out], strength)
    return probabilities


def adjusted_inputs(x: Array, bags: Bags, train: NDArray[np.int64], adjust: AdjustConfig) -> Array:
    """Adjust what a baseline sees, `[scans, dim]`: what was pooled need not go with a covariate as its slices do."""
    pooled = replace(
        bags, features=torch.from_numpy(x)[:, None].float(), mask=torch.ones(len(bags), 1, dtype=torch.bool)
    )
    adjusted = fit_adjustment(pooled.take(train), adjust).apply(pooled)
    return np.asarray(adjusted.features[:, 0].double().numpy())


def fit_and_score(train: Array, labels: NDArray[np.int64], held_out: Array, strength: float) -> Array:
    """Fit a logistic regression on standardised inputs and give `[held out, classes]`; without inputs, frequencies.

    An unknown number (NaN) becomes the median of the training scans.
    """
    if train.shape[1] == 0:
        return np.tile(np.bincount(labels) / len(labels), (len(held_out), 1))
    model = make_pipeline(
        SimpleImputer(strategy="median", keep_empty_features=True),
        StandardScaler(),
        LogisticRegression(C=strength, max_iter=2000),
    )
    return np.asarray(model.fit(train, labels).predict_proba(held_out))


def shuffled_aurocs(
    bags: Bags,
    recipe: Recipe,
    evaluation: EvaluationConfig,
    *,
    fit: Fit | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """Run the whole pipeline on labels that mean nothing: what AUROC does chance reach here?

    Labels change hands between subjects with as many scans, so that a subject's scans stay together. Folds, inner
    choices and fits are made anew, once each (no repeats).

    Args:
        bags: Labelled bags.
        recipe: The recipe of the run.
        evaluation: The run's; `shuffles` says how often.
        fit: What fits the models of the run; by default `fit_jobs` with the recipe.
        progress: Called with epochs done and the most there can be.

    Returns:
        Pooled out-of-fold AUROC of each shuffle that can be fitted.
    """
    shuffles = [s for number in range(evaluation.shuffles) if (s := _shuffle(bags, evaluation, number)) is not None]
    # trained models go side by side; solved ones are large, one shuffle at a time
    groups = [shuffles] if recipe.model.pooling == "attention" else [[shuffle] for shuffle in shuffles]
    found: list[float] = []
    for done, group in enumerate(groups):  # which may grow
        if not group:
            continue
        total = len(groups)
        try:
            fitted = (fit or partial(fit_jobs, recipe=recipe))(
                bags,
                [job for shuffle in group for job in shuffle.jobs],
                progress=lambda now, most, done=done, total=total: progress(done * most + now, total * most),  # type: ignore[misc]
            )
        except CohortError:  # too few of something in one of them, by chance: the others are fitted without it
            groups += [[shuffle] for shuffle in group] if len(group) > 1 else []
            continue
        for number, shuffle in enumerate(group):
            own = fitted[number * len(shuffle.jobs) : (number + 1) * len(shuffle.jobs)]
            found.append(_auroc_of(bags, shuffle, own))
    return found


class _Shuffle(NamedTuple):
    """Labels that mean nothing, who is held out when, and what to fit for it."""

    labels: NDArray[np.int64]
    folds: NDArray[np.int64]
    jobs: list[Job]


def _shuffle(bags: Bags, evaluation: EvaluationConfig, number: int) -> _Shuffle | None:
    """Shuffle once; None where a site or a side is left without a class."""
    labels = shuffle_between_subjects(bags, np.random.default_rng([evaluation.seed, number]))
    seed = evaluation.seed + number
    try:
        folds = partition(bags.scans, labels, bags.classes, replace(evaluation, repeats=1, seed=seed))
    except CohortError:
        return None
    return _Shuffle(labels, folds, fold_jobs(folds, labels, seed))


def _auroc_of(bags: Bags, shuffle: _Shuffle, fitted: Sequence[FittedFold]) -> float:
    probabilities = np.zeros((len(bags), len(bags.classes)))
    for fold, found in enumerate(fitted):
        held_out = np.flatnonzero(shuffle.folds[0] == fold)
        probabilities[held_out] = found.model.score(bags.take(held_out))[0]
    scored = shuffle.folds[0] >= 0
    return score(shuffle.labels[scored], probabilities[scored]).auroc


def shuffle_between_subjects(bags: Bags, rng: np.random.Generator) -> NDArray[np.int64]:
    """Hand the labels of each subject to another with as many scans, `[scans]`."""
    labels, subjects = bags.labels.numpy(), bags.subjects
    own = {subject: np.flatnonzero(subjects == subject) for subject in dict.fromkeys(subjects)}
    shuffled = labels.copy()
    for count in {len(rows) for rows in own.values()}:
        alike = [rows for rows in own.values() if len(rows) == count]
        for taker, giver in zip(alike, rng.permutation(len(alike)), strict=True):
            shuffled[taker] = labels[alike[giver]]
    return shuffled


def permutation_p_value(observed: float, shuffled: Sequence[float]) -> float:
    """Chance of a figure at least as high without an effect: (1 + shuffles that reach it) / (1 + shuffles).

    Phipson & Smyth (2010): the observed labelling counts as one of the permutations, so p is never 0.
    """
    return (1 + sum(value >= observed for value in shuffled)) / (1 + len(shuffled))


def _pooled(bags: Bags, weights: NDArray[Any]) -> Array:
    kept = torch.from_numpy(weights).double() * bags.mask
    pooled = torch.einsum("nsd,ns->nd", bags.features.double(), kept / kept.sum(dim=1, keepdim=True))
    return np.asarray(pooled.numpy())
