"""Inner folds choose among recipes; the scans that are scored have no part in it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dinoatten3d.config import AdjustConfig, EvaluationConfig, Recipe
from dinoatten3d.errors import ConfigError
from dinoatten3d.learning.choice import candidates, fit_chosen
from dinoatten3d.learning.fit import cross_validate, fit_jobs, fold_jobs
from dinoatten3d.learning.splits import partition
from test_learning import QUICK, bags

UNTRAINED = replace(QUICK, training=replace(QUICK.training, epochs=1, learning_rate=1e-9))


def test_the_recipe_that_learns_is_chosen_and_its_model_is_the_one_it_would_give_alone() -> None:
    data = bags(per_class=20)
    folds = partition(data.scans, data.labels.numpy(), data.classes, EvaluationConfig(folds=3))
    jobs = fold_jobs(folds, data.labels.numpy(), 0)
    chosen = fit_chosen(data, jobs, {"untrained": UNTRAINED, "quick": QUICK})
    assert [f.choice.name for f in chosen if f.choice is not None] == ["quick"] * 3
    assert all(f.choice is not None and f.choice.aurocs["quick"] > f.choice.aurocs["untrained"] for f in chosen)
    for own, alone in zip(chosen, fit_jobs(data, jobs, QUICK), strict=True):
        for name, tensor in alone.model.tensors().items():
            torch.testing.assert_close(own.model.tensors()[name], tensor, msg=name)


def test_scans_that_are_scored_have_no_part_in_the_choice() -> None:
    data = bags(per_class=20)
    folds = partition(data.scans, data.labels.numpy(), data.classes, EvaluationConfig(folds=3))
    held_out = torch.from_numpy(folds[0] == 0)
    labels = data.labels.clone()
    labels[held_out] = 1 - labels[held_out]
    features = data.features.clone()
    features[held_out] = 1e3
    spoiled = replace(data, labels=labels, features=features)
    fit = partial(fit_chosen, recipes={"untrained": UNTRAINED, "quick": QUICK})
    honest, other = (cross_validate(d, QUICK, EvaluationConfig(), folds=folds, fit=fit) for d in (data, spoiled))
    assert honest.fitted[0].choice == other.fitted[0].choice


def test_a_grid_gives_every_combination_and_names_it() -> None:
    found = candidates("default", Recipe(), ["paper"], ["training.weight_decay=0.01,1", "model.standardise=true,false"])
    assert len(found) == 8
    assert found["default (training.weight_decay 1, model.standardise False)"].training.weight_decay == 1
    assert found["paper (training.weight_decay 0.01, model.standardise True)"].model.pooling == "attention"


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ("training.weight_decai=1", r"no setting 'weight_decai' \(did you mean 'weight_decay'"),
        ("slices.count=8,16", "it may vary model, loss, training"),
        ("training.epochs", "wanted a setting and its values"),
        ("training.epochs=many", "training.epochs cannot be 'many'"),
        ("training.epochs=5", "'default' has nothing to compete with"),
        ("training.epochs=0,5", "training.epochs is 0"),
        ("training.epochs=" + ",".join(map(str, range(1, 40))), "39 candidates are more than 24"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(grid: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        candidates("default", Recipe(), [], [grid])


def test_an_adapted_backbone_is_not_chosen_by() -> None:
    recipe = replace(QUICK, adapt="lora")
    with pytest.raises(ConfigError, match="adapts the backbone"):
        candidates("mine", recipe, [], ["training.epochs=5,10"])


def test_all_candidates_are_adjusted_as_the_run_is(tmp_path: Path) -> None:
    adjusted = Recipe(adjust=AdjustConfig(covariates=("age", "sex")))
    found = candidates("default", adjusted, ["paper"], ["training.weight_decay=0.01,1"])
    assert len(found) == 4
    assert {recipe.adjust for recipe in found.values()} == {adjusted.adjust}
    other = tmp_path / "other.toml"
    other.write_text('[adjust]\ncovariates = ["site"]\n')
    with pytest.raises(ConfigError, match="adjusts for something else than the run"):
        candidates("default", adjusted, [str(other)], [])


def test_candidates_that_look_at_other_layers_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("[model]\nlayers = [6]\n")
    with pytest.raises(ConfigError, match=r"has model.layers \[6\], the run \[\]"):
        candidates("default", Recipe(), [str(other)], [])


def test_inner_scores_are_kept_for_the_reader() -> None:
    data = bags(per_class=20)
    jobs = fold_jobs(np.arange(40)[None] // 2 % 3, data.labels.numpy(), 0)
    (first, *_) = fit_chosen(data, jobs, {"a": UNTRAINED, "b": QUICK})
    assert first.choice is not None
    assert set(first.choice.aurocs) == {"a", "b"}
    assert all(0 <= value <= 1 for value in first.choice.aurocs.values())
