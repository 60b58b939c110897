"""Decisions are learnt from inner scans alone, hold what they promise there, and say so where they cannot be made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from dinoatten3d.config import ConfigError, EvaluationConfig
from dinoatten3d.evaluation.decisions import (
    Calibration,
    calibrate,
    calibrate_folds,
    decide,
    decide_held_out,
    decision_table,
    judge_decisions,
)
from dinoatten3d.learning.fit import cross_validate, fold_jobs
from test_learning import QUICK, bags


def draws(n: int, seed: int = 0, sharpness: float = 1.0, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are right when sharpness is 1 and too sure above it, with the labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, classes))
    truth = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(classes, p=row) for row in truth])
    given_ = np.exp(sharpness * logits)
    return given_ / given_.sum(axis=1, keepdims=True), labels


def test_a_model_that_is_too_sure_is_cooled_and_keeps_its_ranking() -> None:
    inner, labels = draws(2000, sharpness=3)
    calibration = calibrate(inner, labels, 0)
    assert calibration is not None
    assert 2.5 < calibration.temperature < 3.5
    probabilities, truth = draws(1000, seed=1, sharpness=3)
    decided = decide([calibration], [probabilities])
    assert (decided.probabilities[:, 1].argsort() == probabilities[:, 1].argsort()).all()
    table = decision_table(decided, [str(n) for n in range(1000)], ("a", "b"), 0.1)
    found = judge_decisions(
        table, truth, probabilities, np.arange(1000).astype(str), ["a", "b"], EvaluationConfig(bootstrap=100)
    )
    assert found["calibrated"]["ece"] < 0.06 < found["raw"]["ece"]


@pytest.mark.parametrize("classes", [2, 4])
def test_sets_hold_each_class_as_often_as_promised(classes: int) -> None:
    inner, labels = draws(3000, classes=classes)
    calibration = calibrate(inner, labels, 0)
    assert calibration is not None
    probabilities, truth = draws(3000, seed=1, classes=classes)
    p = decide([calibration], [probabilities]).p_values
    for k in range(classes):
        held = int((p[truth == k, k] > 0.1).sum())
        count = int((truth == k).sum())
        assert abs(held / count - 0.9) < 0.04


def test_the_wanted_sensitivity_is_reached() -> None:
    inner, labels = draws(4000)
    calibration = calibrate(inner, labels, 0.9)
    assert calibration is not None
    probabilities, truth = draws(4000, seed=1)
    called = decide([calibration], [probabilities]).called
    found = int(called[truth == 1].sum())
    count = int((truth == 1).sum())
    assert binom.cdf(found, count, 0.87) > 0.001
    assert found / count < 0.94


def test_scans_without_an_inner_answer_have_no_part_and_too_few_are_refused() -> None:
    inner, labels = draws(200)
    holes = inner.copy()
    holes[::2] = np.nan
    assert calibrate(holes, labels, 0) == calibrate(inner[1::2], labels[1::2], 0)
    assert calibrate(np.full_like(inner, np.nan), labels, 0) is None


def test_a_held_out_label_has_no_part_in_what_is_decided() -> None:
    data = bags(per_class=16)
    evaluation = EvaluationConfig(folds=3, repeats=2)
    first = cross_validate(data, QUICK, evaluation)
    flipped = data.labels.clone()
    held_out = torch.from_numpy(first.folds[0] == 1)
    flipped[held_out] = 1 - flipped[held_out]
    tables = []
    for labels in (data.labels, flipped):
        own = replace(data, labels=labels)
        once = cross_validate(own, QUICK, evaluation, folds=first.folds[:1])
        rows = [job.rows for job in fold_jobs(once.folds, labels.numpy(), 0)]
        calibrations = calibrate_folds(once.fitted, rows, labels.numpy(), 0)
        assert calibrations is not None
        tables.append(decide_held_out(once, calibrations))
    for name in ("probabilities", "called", "p_values"):
        np.testing.assert_array_equal(*(getattr(t, name)[held_out.numpy()] for t in tables), err_msg=name)


def test_repeats_are_averaged_scan_by_scan() -> None:
    data = bags(per_class=16)
    result = cross_validate(data, QUICK, EvaluationConfig(folds=3, repeats=2))
    rows = [job.rows for job in fold_jobs(result.folds, data.labels.numpy(), 0)]
    calibrations = calibrate_folds(result.fitted, rows, data.labels.numpy(), 0)
    assert calibrations is not None
    together = decide_held_out(result, calibrations)
    for scan in (0, 9):
        own = [calibrations[fold] for fold in result.folds[:, scan]]
        alone = decide(own, [result.by_repeat[r, [scan]] for r in range(2)])
        np.testing.assert_allclose(together.probabilities[scan], alone.probabilities[0])
        assert together.called[scan] == alone.called[0]


@given(st.floats(0.05, 20), st.one_of(st.none(), st.floats(0, 1)), st.lists(st.floats(0, 1), max_size=5))
def test_a_calibration_survives_the_disk(temperature: float, threshold: float | None, inner: list[float]) -> None:
    calibration = Calibration(temperature=temperature, threshold=threshold, inner=(tuple(inner), ()))
    assert Calibration.from_dict(calibration.to_dict()) == calibration


@pytest.mark.parametrize(("name", "value"), [("alpha", 0.0), ("alpha", 1.0), ("sensitivity", 1.2)])
def test_shares_beyond_their_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"evaluation.{name} is"):
        EvaluationConfig(**{name: value})  # type: ignore[arg-type]


def test_several_scans_of_a_person_do_not_make_the_coverage_surer() -> None:
    probabilities, labels = draws(60)
    rng = np.random.default_rng(0)
    calibration = Calibration(temperature=1.0, threshold=0.5, inner=((0.2, 0.4, 0.6), (0.2, 0.4, 0.6)))
    width = []
    for times in (1, 5):
        several, truth, people = (np.repeat(x, times, axis=0) for x in (probabilities, labels, np.arange(60)))
        order = rng.permutation(len(truth))
        table = decision_table(decide([calibration], [several[order]]), list(map(str, order)), ("a", "b"), 0.5)
        found = judge_decisions(
            table, truth[order], several[order], people[order].astype(str), ["a", "b"], EvaluationConfig(alpha=0.5)
        )
        held = found["sets"]["coverage"]["b"]
        assert 0 < held["low"] < held["value"] < held["high"] < 1
        width.append(held["high"] - held["low"])
    assert width[1] == pytest.approx(width[0], rel=0.1)


def test_a_class_without_a_scan_has_no_coverage() -> None:
    probabilities, _ = draws(20)
    calibration = Calibration(temperature=1.0, threshold=0.5, inner=((0.5,), (0.5,)))
    table = decision_table(decide([calibration], [probabilities]), list(map(str, range(20))), ("a", "b"), 0.1)
    people = np.arange(20).astype(str)
    found = judge_decisions(
        table, np.zeros(20, int), probabilities, people, ["a", "b"], EvaluationConfig(bootstrap=100)
    )
    assert np.isnan(found["sets"]["coverage"]["b"]["value"])
