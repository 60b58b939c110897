"""Controls use the same folds, see what they say they see, and shuffled labels mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import binom

from dinoatten3d.config import EvaluationConfig
from dinoatten3d.errors import CohortError
from dinoatten3d.evaluation.controls import (
    baselines,
    max_pooled,
    mean_pooled,
    permutation_p_value,
    randomly_attended,
    run_baselines,
    shuffle_between_subjects,
    shuffled_aurocs,
)
from dinoatten3d.evaluation.metrics import score
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.fit import FittedFold, Progress, fit_jobs
from dinoatten3d.learning.splits import partition
from dinoatten3d.learning.stack import Job
from test_learning import QUICK, bags


def folds_of(data: Bags) -> np.ndarray:
    return partition(data.scans, data.labels.numpy(), data.classes, EvaluationConfig(folds=3))


def auroc(data: Bags, name: str, target: str | None = None) -> float:
    return score(data.labels.numpy(), run_baselines(data, folds_of(data), target)[name][0]).auroc


def test_padding_has_no_part_in_what_baselines_see() -> None:
    data = bags()
    mask = data.mask.clone()
    mask[:, 4:] = False
    padded = replace(data, mask=mask)
    short = replace(data, features=data.features[:, :4], mask=mask[:, :4])
    absurd = replace(padded, features=torch.where(mask.unsqueeze(-1), data.features, torch.tensor(1e6)))
    for pool in (mean_pooled, max_pooled):
        np.testing.assert_allclose(pool(absurd), pool(short))
    assert np.abs(randomly_attended(absurd)).max() < 100


def test_covariates_are_found_where_they_tell_all_and_left_out_where_they_are_the_target() -> None:
    data = bags(signal=0)
    telling = replace(
        data, scans=tuple(replace(s, sex="fm"[int(y)], site=None) for s, y in zip(data.scans, data.labels, strict=True))
    )
    assert auroc(telling, "covariates") == 1
    assert auroc(telling, "covariates", "sex") < 0.9
    assert "sex" not in next(b.description for b in baselines("sex") if b.name == "covariates")


def test_a_baseline_never_sees_the_scans_it_scores() -> None:
    data = bags()
    folds = folds_of(data)
    labels = data.labels.clone()
    labels[torch.from_numpy(folds[0] == 0)] = 1 - labels[torch.from_numpy(folds[0] == 0)]
    flipped = run_baselines(replace(data, labels=labels), folds)
    for name, honest in run_baselines(data, folds).items():
        np.testing.assert_array_equal(honest[0, folds[0] == 0], flipped[name][0, folds[0] == 0], name)


def test_shuffled_labels_move_between_subjects_with_all_their_scans() -> None:
    data = bags(per_class=40)
    shuffled = shuffle_between_subjects(data, np.random.default_rng(0))
    assert sorted(shuffled) == sorted(data.labels.tolist())
    assert 0.3 < np.mean(shuffled == data.labels.numpy()) < 0.7
    assert all(len(set(shuffled[data.subjects == subject])) == 1 for subject in data.subjects)


def test_shuffled_labels_reach_chance_where_true_ones_reach_the_top() -> None:
    data = bags(per_class=24)
    evaluation = EvaluationConfig(folds=3, shuffles=6)
    found = shuffled_aurocs(data, QUICK, evaluation)
    assert len(found) == 6
    assert abs(np.mean(found) - 0.5) < 0.15
    assert max(found) < 0.9
    assert found == shuffled_aurocs(data, QUICK, evaluation)


def test_a_shuffle_that_cannot_be_fitted_does_not_take_the_others_with_it() -> None:
    data = bags(per_class=12)
    evaluation = EvaluationConfig(folds=3, shuffles=4)
    everyone = shuffled_aurocs(data, QUICK, evaluation)
    third = shuffle_between_subjects(data, np.random.default_rng([evaluation.seed, 2]))

    def fit(bags: Bags, jobs: Sequence[Job], *, progress: Progress) -> list[FittedFold]:
        if any(np.array_equal(job.labels, third[job.rows]) for job in jobs):
            raise CohortError("too few of something")
        return fit_jobs(bags, jobs, QUICK)

    assert shuffled_aurocs(data, QUICK, evaluation, fit=fit) == [*everyone[:2], everyone[3]]


def test_the_permutation_p_value_is_uniform_without_an_effect() -> None:
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(4000, 20))
    p = np.array([permutation_p_value(row[0], row[1:]) for row in draws])
    assert p.min() == 1 / 20
    hits = int((p <= 0.05).sum())
    assert binom.cdf(hits, 4000, 0.05) > 0.001
    assert binom.sf(hits, 4000, 0.05) > 0.001
