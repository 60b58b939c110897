"""Ways to learn from classes of unequal size, against their formulas written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dinoatten3d.config import LossConfig
from dinoatten3d.errors import ConfigError
from dinoatten3d.learning.fit import Job, fit_jobs
from dinoatten3d.learning.losses import balanced, classification_loss, cross_entropy
from dinoatten3d.learning.stack import plan_job
from dinoatten3d.toml import from_dict
from test_learning import QUICK, bags

LOGITS = torch.tensor([[[2.0, -1.0, 0.5], [0.3, 0.2, -0.7], [1.5, 1.0, 0.0], [0.0, 0.1, 0.4]]])
LABELS = torch.tensor([[0, 1, 0, 2]])
EVERYONE = torch.ones(1, 4, dtype=torch.bool)
FREQUENCY = torch.tensor([[0.7, 0.2, 0.1]])


def test_focal_loss_agrees_with_its_formula_written_out() -> None:
    wanted = 0.0
    for logits, label in zip(LOGITS[0].tolist(), LABELS[0].tolist(), strict=True):
        p = np.exp(logits[label]) / np.exp(logits).sum()
        wanted += -((1 - p) ** 2) * np.log(p) / 4
    config = LossConfig(classification="focal", focal_gamma=2, class_weights=False)
    assert classification_loss(LOGITS, LABELS, EVERYONE, config, FREQUENCY).item() == pytest.approx(wanted, rel=1e-5)


def test_focal_loss_without_focus_is_cross_entropy() -> None:
    config = LossConfig(classification="focal", focal_gamma=0)
    torch.testing.assert_close(
        classification_loss(LOGITS, LABELS, EVERYONE, config, FREQUENCY),
        cross_entropy(LOGITS, LABELS, EVERYONE, balanced(FREQUENCY)),
    )


def test_logit_adjusted_loss_agrees_with_its_formula_written_out() -> None:
    wanted = 0.0
    prior = FREQUENCY[0].tolist()
    for logits, label in zip(LOGITS[0].tolist(), LABELS[0].tolist(), strict=True):
        rest = sum(prior[c] / prior[label] * np.exp(logits[c] - logits[label]) for c in range(3) if c != label)
        wanted += np.log(1 + rest) / 4
    config = LossConfig(classification="logit_adjusted")
    assert classification_loss(LOGITS, LABELS, EVERYONE, config, FREQUENCY).item() == pytest.approx(wanted, rel=1e-5)


def test_class_weights_agree_with_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.repeat([0, 1, 2], [14, 4, 2])
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(balanced(FREQUENCY)[0].numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize("classification", ["cross_entropy", "focal", "logit_adjusted"])
def test_equal_classes_need_no_mending(classification: str) -> None:
    config = from_dict(LossConfig, {"classification": classification, "class_weights": True}, "loss")
    even = torch.full((1, 3), 1 / 3)
    torch.testing.assert_close(
        classification_loss(LOGITS, LABELS, EVERYONE, config, even),
        classification_loss(LOGITS, LABELS, EVERYONE, config, None),
    )


def test_balanced_sampling_shows_each_class_as_often() -> None:
    data = bags(per_class=30)
    rows = np.concatenate([np.arange(30), np.arange(30, 36)])  # five to one
    job = Job(rows=rows, labels=data.labels.numpy()[rows], seed=0)
    plan = plan_job(data, job, QUICK)
    seen = torch.cat([row for _ in range(60) for row in plan.batches("balanced")])
    assert job.labels[seen].mean() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(torch.cat(plan.batches("shuffled")).sort().values, plan.fitted_on)


@pytest.mark.parametrize(
    ("loss", "training"),
    [
        ({"class_weights": True}, {}),
        ({"class_weights": False}, {"sampling": "balanced"}),
        ({"class_weights": False, "classification": "logit_adjusted"}, {}),
        ({"class_weights": True, "classification": "focal"}, {}),
    ],
)
def test_a_rare_class_is_answered_more_often_than_without(loss: dict[str, object], training: dict[str, object]) -> None:
    data = bags(per_class=60, signal=0.25)
    rows = np.concatenate([np.arange(40), np.arange(60, 68)])
    job = Job(rows=rows, labels=data.labels.numpy()[rows], seed=0)
    test = data.take(np.concatenate([np.arange(40, 60), np.arange(100, 120)]))
    plain = replace(QUICK, loss=LossConfig(class_weights=False))
    mended = replace(
        QUICK,
        loss=from_dict(LossConfig, loss, "loss"),
        training=replace(QUICK.training, **training),  # type: ignore[arg-type]
    )
    before, after = (fit_jobs(data, [job], recipe)[0].model.score(test)[0][:, 1].mean() for recipe in (plain, mended))
    assert after > before + 0.05


def test_a_focus_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="focal_gamma is -1; it must be 0 or more"):
        LossConfig(focal_gamma=-1)
