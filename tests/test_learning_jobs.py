"""Many models trained side by side are the models trained alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dinoatten3d.config import LossConfig, ModelConfig, Recipe, TrainingConfig
from dinoatten3d.learning import train
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.fit import Job, fit_jobs
from dinoatten3d.learning.model import SliceAttentionNet
from dinoatten3d.toml import load_recipe
from test_learning import QUICK, bags

RECIPES = {
    "attention": replace(QUICK, training=replace(QUICK.training, epochs=40, patience=6)),
    "paper": load_recipe("paper"),
    "published": load_recipe("published"),
    "widths": Recipe(
        model=ModelConfig(pooling="attention", hidden=(7,)),
        training=TrainingConfig(members=2, epochs=12, patience=0, checkpoint="accuracy"),
    ),
}


def jobs_of(data: Bags, count: int = 7) -> list[Job]:
    """Jobs of unequal length, every other one with shuffled labels."""
    rng = np.random.default_rng(3)
    made = []
    for number in range(count):
        rows = np.sort(rng.permutation(len(data))[: len(data) - 3 * number])
        labels = data.labels.numpy()[rows]
        made.append(Job(rows=rows, labels=rng.permutation(labels) if number % 2 else labels, seed=number))
    return made


@pytest.mark.parametrize("name", RECIPES)
def test_jobs_trained_together_are_the_jobs_trained_alone(name: str) -> None:
    recipe, data = RECIPES[name], bags(per_class=26)
    if name in ("paper", "published"):
        recipe = replace(recipe, training=replace(recipe.training, epochs=15, patience=4))
    jobs = jobs_of(data)
    together = fit_jobs(data, jobs, recipe)
    for job, found in zip(jobs, together, strict=True):
        alone = fit_jobs(data, [job], recipe)[0]
        np.testing.assert_allclose(found.model.score(data)[0], alone.model.score(data)[0], atol=1e-6)
        np.testing.assert_allclose(found.model.score(data)[1], alone.model.score(data)[1], atol=1e-6)
        np.testing.assert_allclose(found.inner, alone.inner, atol=1e-6)
        assert [row["epoch"] for row in found.history] == [row["epoch"] for row in alone.history]
    assert len({len(found.history) for found in together}) > 1 or not recipe.training.patience


def test_how_many_fit_in_memory_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bags()
    jobs = jobs_of(data, count=3)
    whole = fit_jobs(data, jobs, RECIPES["attention"])
    monkeypatch.setattr(train, "STACK_BYTES", 1)
    for one, other in zip(whole, fit_jobs(data, jobs, RECIPES["attention"]), strict=True):
        np.testing.assert_allclose(one.inner, other.inner, atol=1e-6)


def test_bags_of_different_length_do_not_see_their_padding() -> None:
    data = bags(per_class=16)
    mask = data.mask.clone()
    mask[::2, 4:] = False
    plain = replace(data, mask=mask, features=data.features * mask.unsqueeze(-1))
    spoiled = replace(data, mask=mask, features=torch.where(mask.unsqueeze(-1), data.features, torch.tensor(50.0)))
    job = Job(rows=np.arange(len(data)), labels=data.labels.numpy(), seed=0)
    first, second = (fit_jobs(b, [job], RECIPES["attention"])[0].inner for b in (plain, spoiled))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_inner_probabilities_come_from_the_member_that_was_not_fitted_on_the_scan() -> None:
    data = bags(per_class=15, signal=0)
    recipe = replace(
        QUICK, training=replace(QUICK.training, members=2, inner_folds=3), loss=LossConfig(class_weights=False)
    )
    job = Job(rows=np.arange(len(data)), labels=data.labels.numpy(), seed=1)
    found = fit_jobs(data, [job], recipe)[0]
    never = np.isnan(found.inner).all(axis=1)
    assert 0.2 < never.mean() < 0.5  # two members of three folds
    model = found.model
    assert isinstance(model, SliceAttentionNet)
    with torch.no_grad():
        logits = model(model.scaled(data.features)[None], data.mask[None]).logits
    by_member = torch.softmax(logits.double(), dim=-1).numpy()
    same = np.isclose(by_member, found.inner, atol=1e-6).all(axis=2)
    assert (same.sum(axis=0) == ~never).all()
    for member in range(2):
        chosen = next(row for row in found.history if row["member"] == member and row["chosen"])
        true = found.inner[same[member], data.labels.numpy()[same[member]]]
        assert -np.log(true).mean() == pytest.approx(chosen["validation_loss"], rel=1e-5)


def test_progress_ends_where_it_said_it_would() -> None:
    seen: list[tuple[int, int]] = []
    data = bags()
    fit_jobs(
        data, jobs_of(data, count=3), RECIPES["attention"], progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (120, 120)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_scans_that_a_protocol_holds_out_choose_the_epoch_and_nothing_else() -> None:
    data = bags()
    held_out = np.arange(len(data)) % 4 == 0
    recipe = replace(QUICK, training=replace(QUICK.training, members=1, epochs=1))
    job = Job(rows=np.arange(len(data)), labels=data.labels.numpy(), seed=0, validate=held_out[None])
    spoiled = replace(data, features=torch.where(torch.from_numpy(held_out)[:, None, None], 1e3, data.features))
    found, other = (fit_jobs(b, [job], recipe)[0] for b in (data, spoiled))
    for name, tensor in found.model.tensors().items():
        assert torch.equal(tensor, other.model.tensors()[name]), name
    assert (np.isfinite(found.inner).all(axis=1) == held_out).all()
