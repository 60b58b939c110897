"""Intervals and paired tests against brute force, scikit-learn, scipy and small simulations."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import norm, ttest_1samp
from sklearn.metrics import roc_auc_score

from dinoatten3d.errors import ConfigError, RunError
from dinoatten3d.evaluation.comparison import (
    corrected_resampled_ttest,
    delong_test,
    holm,
    mcnemar,
    paired_bootstrap_difference,
)
from dinoatten3d.evaluation.intervals import (
    auroc_half_width,
    bootstrap_intervals,
    delong,
    delong_interval,
    subject_weights,
    weighted_scores,
)
from dinoatten3d.evaluation.metrics import METRICS, score

seeds = st.integers(0, 10_000)


def predictions(seed: int, n: int = 40, n_classes: int = 2, digits: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Labels with two or more of every class and probabilities that know something; few digits make ties."""
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.repeat(np.arange(n_classes), 2), generator.integers(0, n_classes, n - 2 * n_classes)])
    logits = generator.normal(size=(n, n_classes)) + 1.2 * np.eye(n_classes)[labels]
    probabilities = softmax(logits, axis=1).round(digits)
    probabilities[:, 0] = 1 - probabilities[:, 1:].sum(axis=1)
    probabilities = probabilities.clip(0, 1)
    return labels, probabilities / probabilities.sum(axis=1, keepdims=True)


def binormal(generator: np.random.Generator, n: int, auroc: float) -> tuple[np.ndarray, np.ndarray]:
    """Half the cases positive, scores normal with this AUROC in truth."""
    labels = np.arange(n) % 2
    return labels, labels * math.sqrt(2) * norm.ppf(auroc) + generator.normal(size=n)


def as_probabilities(scores: np.ndarray) -> np.ndarray:
    return np.column_stack([1 - norm.cdf(scores), norm.cdf(scores)])


def brute_delong(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROCs and covariance by comparing every positive with every negative case."""
    wins = []
    for model in scores:
        gap = model[labels == 1][:, None] - model[labels == 0][None]
        wins.append((gap > 0) + 0.5 * (gap == 0))
    by_positive = np.array([table.mean(axis=1) for table in wins])
    by_negative = np.array([table.mean(axis=0) for table in wins])
    covariance = np.cov(by_positive) / by_positive.shape[1] + np.cov(by_negative) / by_negative.shape[1]
    return np.array([table.mean() for table in wins]), covariance


@settings(max_examples=30)
@given(seeds)
def test_delong_is_its_definition_over_all_pairs(seed: int) -> None:
    labels, _ = predictions(seed)
    scores = np.random.default_rng(seed).normal(size=(3, len(labels))).round(1) + 0.5 * labels
    auroc, covariance = brute_delong(labels, scores)
    found = delong(labels, scores)
    np.testing.assert_allclose(found.auroc, auroc)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-12)


@settings(max_examples=30)
@given(seeds)
def test_delong_depends_on_order_alone_and_turns_with_the_labels(seed: int) -> None:
    labels, probabilities = predictions(seed, digits=2)
    plain = delong_interval(labels, probabilities[:, 1])
    assert delong_interval(labels, np.exp(5 * probabilities[:, 1])) == pytest.approx(plain)
    turned = delong_interval(1 - labels, probabilities[:, 1])
    assert turned == pytest.approx((1 - plain.value, 1 - plain.high, 1 - plain.low))
    assert plain.value == pytest.approx(roc_auc_score(labels, probabilities[:, 1]))


def test_copies_of_a_scan_add_no_evidence() -> None:
    labels, probabilities = predictions(0, digits=4)
    thrice, subjects = np.repeat(np.arange(len(labels)), 3), np.repeat(np.arange(len(labels)).astype(str), 3)
    once = delong_interval(labels, probabilities[:, 1])
    assert delong_interval(labels[thrice], probabilities[thrice, 1], subjects=subjects) == pytest.approx(once)
    naive = delong_interval(labels[thrice], probabilities[thrice, 1])
    assert naive.high - naive.low < 0.7 * (once.high - once.low)
    drawn = bootstrap_intervals(labels, probabilities, np.arange(len(labels)), seed=0)
    drawn_thrice = bootstrap_intervals(labels[thrice], probabilities[thrice], thrice, seed=0)
    for name, interval in drawn.items():
        assert drawn_thrice[name] == pytest.approx(interval), name


def test_an_interval_stays_within_0_and_1_and_a_perfect_one_keeps_its_width() -> None:
    labels = np.repeat([0, 1], 10)
    for transform in ("logit", "none"):
        perfect = delong_interval(labels, labels.astype(float), transform=transform)
        assert perfect.value == perfect.high == 1
        assert 0.7 < perfect.low < 0.9
    wrong = delong_interval(labels, -labels.astype(float))
    assert wrong == pytest.approx((0, 0, 1 - perfect.low))
    certain = np.eye(2)[labels]
    for name, interval in bootstrap_intervals(labels, certain, np.arange(20), seed=0).items():
        assert 0 <= interval.low < interval.high <= 1, name
        assert interval.high - interval.low == pytest.approx(norm.ppf(0.975) ** 2 / (10 + norm.ppf(0.975) ** 2))


@settings(max_examples=30)
@given(seeds, st.integers(2, 4))
def test_a_weighted_figure_is_that_of_the_repeated_scans(seed: int, n_classes: int) -> None:
    labels, probabilities = predictions(seed, n_classes=n_classes)
    generator = np.random.default_rng(seed)
    weights = generator.integers(0, 3, size=(4, len(labels)))
    weights[:, : 2 * n_classes] = generator.integers(1, 3, size=(4, 2 * n_classes))  # keeps every class
    found = weighted_scores(labels, probabilities, weights)
    for replicate, times in enumerate(weights):
        rows = np.repeat(np.arange(len(labels)), times)
        expected = vars(score(labels[rows], probabilities[rows]))
        assert {name: values[replicate] for name, values in found.items()} == pytest.approx(expected)


@settings(max_examples=30)
@given(seeds)
def test_draws_move_subjects_whole_and_keep_the_class_sizes(seed: int) -> None:
    generator = np.random.default_rng(seed)
    subject_labels = np.concatenate([[0, 1], generator.integers(0, 2, 18)])
    subjects = np.repeat(np.array([f"sub-{i:02d}" for i in range(20)]), 2)
    labels = np.repeat(subject_labels, 2)
    weights = subject_weights(labels, subjects, replicates=50, seed=seed)
    assert np.array_equal(weights[:, ::2], weights[:, 1::2])
    for k in (0, 1):
        np.testing.assert_allclose(weights[:, labels == k].sum(axis=1), (labels == k).sum())


def test_draws_vary_as_much_as_the_mean_of_so_few_subjects_does() -> None:
    values = np.array([0.0, 1.0, 3.0, 4.0, 9.0])
    weights = subject_weights(np.zeros(5, int), np.arange(5), replicates=20_000, seed=0)
    assert np.var(weights @ values / 5) == pytest.approx(values.var(ddof=1) / 5, rel=0.05)


def test_subjects_who_change_class_are_drawn_among_themselves() -> None:
    labels = np.array([0, 1, 0, 1, 0, 0, 0, 1, 1, 1])
    subjects = np.array(list("aabbcdefgh"))
    weights = subject_weights(labels, subjects, replicates=200, seed=0)
    np.testing.assert_allclose(weights[:, :2].sum(axis=1) + weights[:, 2:4].sum(axis=1), 4)
    assert np.array_equal(weights[:, 0], weights[:, 1])


def test_the_same_seed_gives_the_same_intervals() -> None:
    labels, probabilities = predictions(0)
    subjects = np.arange(len(labels))
    first, again, other = (bootstrap_intervals(labels, probabilities, subjects, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert list(first) == list(METRICS)


def test_a_missing_class_gives_an_undefined_interval_and_no_error() -> None:
    labels, probabilities = np.ones(5, int), np.tile([0.3, 0.7], (5, 1))
    found = bootstrap_intervals(labels, probabilities, np.arange(5), seed=0)
    assert np.isnan(found["auroc"]).all()
    assert found["sensitivity"].value == 1
    with pytest.raises(RunError, match="both 0 and 1"):
        delong_interval(labels, probabilities[:, 1])


def test_a_thousand_draws_of_every_figure_take_less_than_a_second() -> None:
    labels, probabilities = predictions(0, n=500, digits=6)
    start = time.perf_counter()
    bootstrap_intervals(labels, probabilities, np.arange(500), seed=0)
    assert time.perf_counter() - start < 1


def test_nominal_95_percent_intervals_hold_the_truth_that_often() -> None:
    held = {"delong": 0, "bootstrap": 0}
    draws = 300
    for generator in np.random.default_rng(0).spawn(draws):
        labels, scores = binormal(generator, 40, 0.8)
        drawn = bootstrap_intervals(labels, as_probabilities(scores), np.arange(40), replicates=200, seed=generator)
        for kind, interval in (("delong", delong_interval(labels, scores)), ("bootstrap", drawn["auroc"])):
            held[kind] += interval.low <= 0.8 <= interval.high
    assert all(0.92 < hits / draws < 0.98 for hits in held.values()), held


def test_planned_width_is_the_width_that_studies_then_get() -> None:
    widths = []
    for generator in np.random.default_rng(0).spawn(100):
        found = delong_interval(*binormal(generator, 100, 0.8), transform="none")
        widths.append((found.high - found.low) / 2)
    assert np.mean(widths) == pytest.approx(auroc_half_width(50, 50, 0.8), rel=0.1)
    assert auroc_half_width(50, 50, 0.8, level=0.9) < auroc_half_width(50, 50, 0.8)


@settings(max_examples=20)
@given(seeds)
def test_paired_delong_is_its_definition_and_antisymmetric(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels, a = binormal(generator, 60, 0.8)
    b = a + generator.normal(size=60)
    auroc, covariance = brute_delong(labels, np.stack([a, b]))
    z = (auroc[0] - auroc[1]) / math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    found = delong_test(labels, a, b)
    assert found.value == pytest.approx(roc_auc_score(labels, a) - roc_auc_score(labels, b))
    assert found.p_value == pytest.approx(2 * norm.sf(abs(z)))
    turned = delong_test(labels, b, a)
    assert turned == pytest.approx((-found.value, -found.high, -found.low, found.p_value))
    assert delong_test(labels, a, np.exp(a)) == (0, 0, 0, 1)


def test_equal_models_are_called_different_about_one_time_in_twenty() -> None:
    alarms = {"delong": 0, "bootstrap": 0}
    draws = 200
    for generator in np.random.default_rng(1).spawn(draws):
        labels, shared = binormal(generator, 60, 0.8)
        a, b = (shared + 0.7 * generator.normal(size=60) for _ in range(2))
        alarms["delong"] += delong_test(labels, a, b).p_value < 0.05
        models = as_probabilities(a), as_probabilities(b)
        drawn = paired_bootstrap_difference(labels, *models, np.arange(60), replicates=200, seed=generator)
        alarms["bootstrap"] += drawn.p_value < 0.05
    assert all(0.01 < count / draws < 0.1 for count in alarms.values()), alarms


def test_paired_bootstrap_agrees_with_delong_and_finds_a_better_model() -> None:
    generator = np.random.default_rng(0)
    labels, a = binormal(generator, 300, 0.9)
    b = a + 1.5 * generator.normal(size=300)
    exact = delong_test(labels, a, b)
    drawn = paired_bootstrap_difference(
        labels, as_probabilities(a), as_probabilities(b), np.arange(300), replicates=4000, seed=0
    )
    assert drawn.value == pytest.approx(exact.value)
    assert (drawn.low, drawn.high) == pytest.approx((exact.low, exact.high), abs=0.005)
    assert drawn.low > 0
    assert drawn.p_value < 0.001
    same = paired_bootstrap_difference(labels, as_probabilities(a), as_probabilities(a), np.arange(300), seed=0)
    assert same == (0, 0, 0, 1)


def test_mcnemar_counts_only_the_cases_that_differ() -> None:
    labels = np.zeros(30, int)
    a, b = np.repeat([0, 0, 1, 1], [10, 8, 2, 10]), np.repeat([0, 1, 0, 1], [10, 8, 2, 10])
    found = mcnemar(labels, a, b)
    by_hand = 2 * sum(math.comb(10, k) for k in range(3)) / 2**10
    assert (found.only_a, found.only_b, found.p_value) == (8, 2, pytest.approx(by_hand))
    assert mcnemar(labels, a, a).p_value == 1


def test_resampled_t_test_is_the_plain_one_when_nothing_overlaps_and_wider_when_it_does() -> None:
    differences = np.random.default_rng(0).normal(0.03, 0.05, size=25)
    plain = ttest_1samp(differences, 0)
    apart = corrected_resampled_ttest(differences, n_train=1e12, n_test=1)
    assert (apart.value, apart.p_value) == pytest.approx((differences.mean(), plain.pvalue))
    assert (apart.low, apart.high) == pytest.approx(tuple(plain.confidence_interval()))
    folds = corrected_resampled_ttest(differences, n_train=80, n_test=20)
    widening = math.sqrt((1 / 25 + 20 / 80) / (1 / 25))
    assert (folds.high - folds.low) / (apart.high - apart.low) == pytest.approx(widening)
    assert folds.p_value > apart.p_value
    with pytest.raises(RunError, match="2 differences, 1 of them finite"):
        corrected_resampled_ttest(np.array([0.1, math.nan]), n_train=80, n_test=20)


def test_holm_on_a_worked_example() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.6, 0.9])).tolist() == [1, 1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_no_correction_and_bonferroni(p_values: list[float]) -> None:
    raw = np.array(p_values)
    adjusted = holm(raw)
    assert ((adjusted >= raw) & (adjusted <= np.minimum(raw * len(raw), 1) + 1e-12)).all()
    assert (np.diff(adjusted[np.argsort(raw)]) >= 0).all()


def test_mistaken_options_are_refused() -> None:
    labels, probabilities = predictions(0)
    subjects = np.arange(len(labels))
    with pytest.raises(ConfigError, match="level of an interval is 95"):
        bootstrap_intervals(labels, probabilities, subjects, level=95)
    with pytest.raises(RunError, match="3 subjects"):
        bootstrap_intervals(labels, probabilities, subjects[:3])
    with pytest.raises(ConfigError, match="'auc' is unknown"):
        paired_bootstrap_difference(labels, probabilities, probabilities, subjects, metric="auc")
    with pytest.raises(ConfigError, match="at least one subject"):
        auroc_half_width(0, 10, 0.8)
