"""Choose among recipes on inner folds, for each outer fold anew, so that the outer folds stay untouched."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from dinoatten3d.config import Recipe
from dinoatten3d.errors import ConfigError, suggest
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.fit import Choice, FittedFold, Progress, fit_jobs
from dinoatten3d.learning.splits import inner_folds
from dinoatten3d.learning.stack import Job
from dinoatten3d.toml import from_dict, load_recipe, to_dict

INNER_FOLDS = 3
OPEN = ("model", "loss", "training")
"""Tables of a recipe that a grid may vary; slices and patches were settled by `extract`, and what is adjusted for says
what is asked: unadjusted features would often win, by what they owe to the covariates."""
MOST = 24
"""Candidates; a choice among many on tens of scans is luck."""


def candidates(name: str, recipe: Recipe, others: Sequence[str], grid: Sequence[str]) -> dict[str, Recipe]:
    """Give every combination of recipe and grid values by name, the recipe itself first; all are adjusted as it is.

    Args:
        name: What `recipe` is called.
        recipe: The recipe of the run.
        others: Names or TOML files of recipes that compete with it.
        grid: Settings and their values, such as `model.dropout=0.1,0.3`.

    Raises:
        ConfigError: A setting or a value does not exist, there is one combination or too many, or a recipe adapts the
            backbone, asks for other layers or adjusts for something else.
    """
    settings = [_values(text) for text in grid]
    found: dict[str, Recipe] = {}
    for own_name, own in [(name, recipe), *((other, load_recipe(other)) for other in others)]:
        if own.adapt != "none":
            raise ConfigError(
                f"recipe '{own_name}' adapts the backbone, which is too slow to choose by; leave adapt none"
            )
        if own.model.layers != recipe.model.layers:
            raise ConfigError(
                f"recipe '{own_name}' has model.layers {list(own.model.layers)}, the run {list(recipe.model.layers)}; "
                "all candidates must look at the same layers"
            )
        if own.adjust.covariates and own.adjust != recipe.adjust:
            raise ConfigError(
                f"recipe '{own_name}' adjusts for something else than the run; give one --adjust for all candidates"
            )
        own = replace(own, adjust=recipe.adjust)
        for values in itertools.product(*(values for _, values in settings)):
            chosen = dict(zip((key for key, _ in settings), values, strict=True))
            told = ", ".join(f"{key} {value}" for key, value in chosen.items())
            found[f"{own_name} ({told})" if told else own_name] = _with(own, chosen)
    if len(found) < 2:
        raise ConfigError(f"'{name}' has nothing to compete with; --choose another recipe, or give --grid two values")
    if len(found) > MOST:
        raise ConfigError(
            f"{len(found)} candidates are more than {MOST}; on so few scans such a choice is luck, drop some"
        )
    return found


def fit_chosen(
    bags: Bags,
    jobs: Sequence[Job],
    recipes: Mapping[str, Recipe],
    *,
    progress: Progress = lambda done, total: None,
) -> list[FittedFold]:
    """Fit for each job the recipe of the highest AUROC on its inner folds; of equal ones the first.

    Args:
        bags: What the jobs' rows point into.
        jobs: Training rows, their labels and the seed of each model.
        recipes: Name to candidate.
        progress: Called with candidates done and in all.
    """
    inner = [inner_folds(j.labels, bags.subjects[j.rows], folds=INNER_FOLDS, seed=j.seed + 31) for j in jobs]
    aurocs = np.zeros((len(jobs), len(recipes)))
    for number, recipe in enumerate(recipes.values()):
        parts = [
            Job(rows=job.rows[folds != k], labels=job.labels[folds != k], seed=job.seed)
            for job, folds in zip(jobs, inner, strict=True)
            for k in range(folds.max() + 1)
        ]
        fitted = iter(fit_jobs(bags, parts, recipe))
        for row, (job, folds) in enumerate(zip(jobs, inner, strict=True)):
            answers = np.zeros((len(job.rows), len(bags.classes)))
            for k in range(folds.max() + 1):
                answers[folds == k] = next(fitted).model.score(bags.take(job.rows[folds == k]))[0]
            aurocs[row, number] = _auroc(job.labels, answers)
        progress(number + 1, len(recipes) + 1)
    best = aurocs.argmax(axis=1)
    names, chosen = list(recipes), list(recipes.values())
    final: dict[int, FittedFold] = {}
    for number in np.unique(best):
        own = np.flatnonzero(best == number).tolist()
        for row, fitted_fold in zip(own, fit_jobs(bags, [jobs[n] for n in own], chosen[number]), strict=True):
            seen = dict(zip(names, aurocs[row].tolist(), strict=True))
            final[row] = replace(fitted_fold, choice=Choice(names[number], chosen[number], seen))
    progress(len(recipes) + 1, len(recipes) + 1)
    return [final[row] for row in range(len(jobs))]


def _auroc(labels: NDArray[np.int64], answers: NDArray[np.float64]) -> float:
    binary = answers.shape[1] == 2
    return float(roc_auc_score(labels, answers[:, 1] if binary else answers, multi_class="ovr"))


def _values(text: str) -> tuple[str, list[Any]]:
    key, _, values = text.partition("=")
    if not values or key.count(".") != 1:
        raise ConfigError(f"grid '{text}' cannot be read; wanted a setting and its values, model.dropout=0.1,0.3")
    if key.split(".")[0] not in OPEN:
        raise ConfigError(f"grid '{text}' varies '{key.split('.')[0]}'; it may vary {', '.join(OPEN)}")
    return key, [_value(value.strip()) for value in values.split(",")]


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _with(recipe: Recipe, chosen: Mapping[str, Any]) -> Recipe:
    tables = to_dict(recipe)
    for key, value in chosen.items():
        table, name = key.split(".")
        if name not in tables[table]:
            raise ConfigError(f"recipe.{table} has no setting '{name}'{suggest(name, sorted(tables[table]))}")
        if type(value) is not type(tables[table][name]) and not {type(value), type(tables[table][name])} <= {
            int,
            float,
        }:
            raise ConfigError(f"{key} cannot be {value!r}; it is now {tables[table][name]!r}")
        tables[table][name] = value
    return from_dict(Recipe, tables, "grid")
