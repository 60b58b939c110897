"""Would more scans help: AUROC against the number of training scans.

Within each outer fold the model is trained on growing, nested shares of the training subjects and scores the same
held-out scans; the law of `power_law.py` goes through the pooled AUROCs, and on to larger cohorts where the data
carry it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinoatten3d.config import EvaluationConfig, Recipe
from dinoatten3d.errors import CohortError, DinoAtten3DError
from dinoatten3d.evaluation.controls import adjusted_inputs, fit_and_score, mean_pooled, out_of_fold
from dinoatten3d.evaluation.intervals import (
    Interval,
    auroc_half_width,
    interval_around,
    subject_weights,
    weighted_scores,
)
from dinoatten3d.evaluation.power_law import (
    FEWEST_POINTS,
    WIDEST,
    PowerLaw,
    fit_power_law,
    subjects_needed,
    why_not_extrapolate,
)
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.fit import CrossValidation, fit_fold

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
Learner = Callable[[Rows, Rows, int], Array]
"""Training rows, held-out rows and the fold to probabilities of the held-out rows, `[held out, classes]`."""
SHARES = (0.2, 0.35, 0.5, 0.7)
"""Shares of the training subjects beside all of them; each is drawn about 1 / share times, so that all cost alike."""
FEWEST = 2
"""Training subjects that every class keeps."""
AHEAD = (2, 4)
"""Times the training scans at which the curve is read off."""


class Trial(NamedTuple):
    """Out-of-fold probabilities, `[scans, classes]`, of models trained on a share: `scans` of them in the mean."""

    share: float
    scans: float
    probabilities: Array


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The learning curve of one model, each point and place with `scans` to train on, `value`, `low` and `high`.

    Attributes:
        name: The recipe, or the baseline.
        points: Mean AUROC over the `draws` of each `share`, from few scans to all.
        law: a, b and c of AUROC = a - b n^-c; None with too few points.
        band: The fitted curve with its bootstrap band, as far as it is trusted.
        ahead: The curve at twice and four times the scans; empty where the data do not carry it.
        sentence: What it means.
    """

    name: str
    points: list[dict[str, float]]
    law: dict[str, float] | None
    band: list[dict[str, float]]
    ahead: list[dict[str, float]]
    sentence: str


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """Curves of the recipe and of mean pooling, the size of the next cohort, and what was left out."""

    curves: list[Curve]
    needed: dict[str, Any]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Give plain tables that JSON can hold."""
        return asdict(self)


def learning_curve(
    bags: Bags,
    recipe: Recipe,
    recipe_name: str,
    evaluation: EvaluationConfig,
    result: CrossValidation,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LearningCurve:
    """Train a recipe, and mean pooling + logistic regression, on growing shares of the training subjects.

    Where the recipe adjusts the features, they are adjusted for both, anew on each share.

    Args:
        bags: Labelled bags.
        recipe: The recipe of the run.
        recipe_name: Its name.
        evaluation: The run's: seed, bootstrap draws, the half width wanted.
        result: The run itself; its first repeat gives the folds and the last point of the curve.
        progress: Called with models trained and how many there will be.
    """
    folds, pooled, labels = result.folds[0], mean_pooled(bags), bags.labels.numpy()
    plain = replace(bags, tokens=(None,) * len(bags), means=None)  # what mean pooling looks at

    def train_recipe(rows: Rows, held_out: Rows, fold: int) -> Array:
        fitted = fit_fold(bags.take(rows), recipe, seed=evaluation.seed * 1000 + fold)
        return fitted.model.score(bags.take(held_out))[0]

    def train_pooled(rows: Rows, held_out: Rows, fold: int) -> Array:
        x = pooled
        if recipe.adjust.covariates:
            x = adjusted_inputs(pooled, plain, rows, recipe.adjust)
        return fit_and_score(x[rows], labels[rows], x[held_out], 0.01)

    pooled_on_all = out_of_fold(plain, folds, mean_pooled, 0.01, recipe.adjust)[0]
    all_scans = {recipe_name: result.by_repeat[0], "mean pooling": pooled_on_all}
    curves, notes = [], []
    for name, learn in ((recipe_name, train_recipe), ("mean pooling", train_pooled)):
        report = progress if learn is train_recipe else (lambda done, total: None)
        trials, skipped = train_on_shares(bags, folds, learn, seed=evaluation.seed, progress=report)
        trials.append(Trial(1.0, _mean_size(folds), all_scans[name]))
        curves.append(trace_curve(name, labels, bags.subjects, folds >= 0, trials, evaluation))
        notes += [f"{name}: {note}" for note in skipped]
    scored = bags.take(np.flatnonzero(folds >= 0))
    return LearningCurve(curves=curves, needed=_needed(curves[0], scored, evaluation.wanted_half_width), notes=notes)


def train_on_shares(
    bags: Bags,
    folds: NDArray[np.int64],
    learn: Learner,
    *,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Trial], list[str]]:
    """Train on each share as often as it is drawn; a share that is too small for the learner is left out, with a note.

    Args:
        bags: Labelled bags.
        folds: Fold of each scan, `[scans]`; -1 where it is only trained on.
        learn: Trains on some rows and scores others.
        seed: Decides who is in which share.
        progress: Called with models trained and how many there will be.
    """
    trials, notes = [], []
    numbers = np.unique(folds[folds >= 0])
    total, done = len(numbers) * sum(math.ceil(1 / share) for share in SHARES), 0
    for share in SHARES:
        found = []
        try:
            for draw in range(math.ceil(1 / share)):
                probabilities, size = np.zeros((len(bags), len(bags.classes))), 0.0
                for fold in numbers:
                    rng = np.random.default_rng([seed, int(fold), draw])
                    rows = nested_share(bags, np.flatnonzero(folds != fold), share, rng)
                    held_out = np.flatnonzero(folds == fold)
                    probabilities[held_out] = learn(rows, held_out, int(fold))
                    size += len(rows) / len(numbers)
                    done += 1
                    progress(done, total)
                found.append(Trial(share, size, probabilities))
        except DinoAtten3DError as error:
            notes.append(f"{100 * share:.0f} % of the training subjects were left out: {error}")
        else:
            trials += found
    progress(total, total)  # a share that was left out is done with too
    return trials, notes


def nested_share(bags: Bags, train: Rows, share: float, rng: np.random.Generator) -> Rows:
    """Take a share of the training subjects of each class, with all their scans; a larger share holds the smaller.

    Raises:
        CohortError: A class would keep too few subjects.
    """
    subjects, labels = bags.subjects[train], bags.labels.numpy()[train]
    people, first = np.unique(subjects, return_index=True)
    chosen: list[Any] = []
    for number, name in enumerate(bags.classes):
        own = rng.permutation(people[labels[first] == number])
        count = round(share * len(own))
        if count < FEWEST:
            raise CohortError(f"class '{name}' would keep {count} subjects to train on, {FEWEST} are needed")
        chosen.extend(own[:count])
    return train[np.isin(subjects, chosen)]


def trace_curve(
    name: str,
    labels: NDArray[np.int64],
    subjects: NDArray[Any],
    scored: NDArray[np.bool_],
    trials: Sequence[Trial],
    evaluation: EvaluationConfig,
) -> Curve:
    """Put points, law, band and extrapolation together from trials, in rising order of shares.

    Intervals and band come from bootstrap draws of the held-out subjects, the same for all points, and of a share's
    training sets where there are several.
    """
    labels, subjects = labels[scored], subjects[scored]
    rng = np.random.default_rng(evaluation.seed)
    weights = subject_weights(labels, subjects, replicates=evaluation.bootstrap, seed=rng)
    once = np.ones((1, len(labels)))
    fewest = min(len(np.unique(subjects[labels == k])) for k in np.unique(labels))
    points, draws = [], []
    for share in dict.fromkeys(trial.share for trial in trials):
        own = [trial for trial in trials if trial.share == share]
        both = np.array(
            [weighted_scores(labels, t.probabilities[scored], np.vstack([once, weights]))["auroc"] for t in own]
        )
        again = rng.integers(len(own), size=(len(own), evaluation.bootstrap))
        draws.append(np.take_along_axis(both[:, 1:], again, axis=0).mean(axis=0))
        value = float(both[:, 0].mean())
        around = interval_around(value, float(draws[-1].std(ddof=1)), fewest=fewest)
        scans = float(np.mean([trial.scans for trial in own]))
        points.append({"share": share, "draws": len(own), "scans": scans, **around._asdict()})
    return _followed(name, points, np.stack(draws, axis=1))


def _followed(name: str, points: list[dict[str, float]], draws: Array) -> Curve:
    """Fit the law and follow it as far as the data carry it."""
    scans, auroc = (np.array([point[key] for point in points]) for key in ("scans", "value"))
    law = fit_power_law(scans, auroc, draws) if len(points) >= FEWEST_POINTS else None
    last = points[-1]
    reason = why_not_extrapolate(scans, Interval(last["value"], last["low"], last["high"]), draws, law)
    ahead = [] if reason or law is None else [_place(law, times * scans[-1]) for times in AHEAD]
    ahead = [place for place in ahead if place["high"] - place["low"] <= WIDEST]
    horizon = ahead[-1]["scans"] if ahead else scans[-1]
    return Curve(
        name=name,
        points=points,
        law=None if law is None else {key: float(value[0]) for key, value in law._asdict().items()},
        band=[] if law is None else [_place(law, n) for n in np.geomspace(scans[0], horizon, 40)],
        ahead=ahead,
        sentence=_sentence(name, last, ahead, reason),
    )


def _place(law: PowerLaw, scans: float) -> dict[str, float]:
    return {"scans": float(scans), **law.at(scans)._asdict()}


def _sentence(name: str, last: dict[str, float], ahead: list[dict[str, float]], reason: str) -> str:
    seen = f"{name}: AUROC {last['value']:.2f} with {last['scans']:.0f} training scans"
    if not ahead:
        return f"{seen}; the curve is not followed beyond the data, because {reason}."
    places = " and ".join(f"{p['value']:.2f} ({p['low']:.2f} to {p['high']:.2f}) with {p['scans']:.0f}" for p in ahead)
    return f"{seen}; the fitted curve leads to {places}, if new scans are like these."


def _needed(curve: Curve, bags: Bags, half_width: float) -> dict[str, Any]:
    """Plan the next cohort at the AUROC that the curve leads to (or has now), with the classes' shares of this one.

    Only subjects that are scored narrow an interval, so `bags` holds no others; those that are trained on are taken to
    grow with them.
    """
    first = np.unique(bags.subjects, return_index=True)[1]
    counts = np.bincount(bags.labels.numpy()[first], minlength=len(bags.classes))
    now, few = int(counts.sum()), int(counts.min())
    last, law = curve.points[-1], curve.law
    if not last["low"] > 0.5:
        said = (
            f"How many subjects a 95 % interval of ±{half_width:g} needs cannot be said while the AUROC may be chance."
        )
        return {"half_width": half_width, "subjects_now": now, "subjects": None, "sentence": said}

    def auroc_at(subjects: int) -> float:
        most = 1 - 1 / (2 * few / now * subjects)  # a perfect AUROC would promise an interval without width
        if law is None or not curve.ahead:
            return min(last["value"], most)
        scans = min(subjects / now * last["scans"], curve.ahead[-1]["scans"])
        return min(float(law["a"] - law["b"] * scans ** -law["c"]), most)

    now_half = auroc_half_width(few, now - few, auroc_at(now))
    wanted = now if now_half <= half_width else subjects_needed(half_width, few / now, auroc_at, at_least=now)
    said = f"The {now} subjects that were scored let a 95 % interval of the AUROC of ±{now_half:.2f} be expected"
    if wanted != now:
        name, place = bags.classes[int(counts.argmin())], "the curve leads to" if curve.ahead else "was seen"
        number = "more than 100,000" if wanted is None else f"about {wanted}"
        said += f"; ±{half_width:g} takes {number}, {100 * few / now:.0f} % of them {name}, at the AUROC that {place}"
    return {
        "half_width": half_width,
        "half_width_now": now_half,
        "subjects_now": now,
        "subjects": wanted,
        "auroc": None if wanted is None else auroc_at(wanted),
        "sentence": f"{said} (Hanley & McNeil 1982).",
    }


def _mean_size(folds: NDArray[np.int64]) -> float:
    return float(np.mean([(folds != fold).sum() for fold in np.unique(folds[folds >= 0])]))
