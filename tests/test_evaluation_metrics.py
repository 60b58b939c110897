"""Figures, calibration, conformal sets and thresholds against scikit-learn and against their definitions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn import metrics as sk

from dinoatten3d.errors import ConfigError, RunError
from dinoatten3d.evaluation.calibration import (
    apply_temperature,
    brier_decomposition,
    conformal_sets,
    expected_calibration_error,
    fit_temperature,
    reliability_curve,
    risk_coverage,
    threshold_for_sensitivity,
    youden_threshold,
)
from dinoatten3d.evaluation.metrics import METRICS, Scores, chance, confusion, per_class_scores, score


def predictions(seed: int, n: int = 60, n_classes: int = 2, digits: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Labels with every class and probabilities that know something; few digits make ties."""
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(n_classes), generator.integers(0, n_classes, n - n_classes)])
    logits = generator.normal(size=(n, n_classes)) + np.eye(n_classes)[labels]
    probabilities = softmax(logits, axis=1).round(digits)
    probabilities[:, 0] = 1 - probabilities[:, 1:].sum(axis=1)
    probabilities = probabilities.clip(0, 1)
    return labels, probabilities / probabilities.sum(axis=1, keepdims=True)


seeds = st.integers(0, 10_000)
class_counts = st.integers(2, 5)


@settings(max_examples=25)
@given(seeds)
def test_binary_figures_are_those_of_scikit_learn(seed: int) -> None:
    labels, probabilities = predictions(seed)
    positive, decided = probabilities[:, 1], probabilities.argmax(axis=1)
    expected = {
        "auroc": sk.roc_auc_score(labels, positive),
        "average_precision": sk.average_precision_score(labels, positive),
        "accuracy": sk.accuracy_score(labels, decided),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, decided),
        "f1_macro": sk.f1_score(labels, decided, average="macro"),
        "f1_weighted": sk.f1_score(labels, decided, average="weighted"),
        "sensitivity": sk.recall_score(labels, decided),
        "specificity": sk.recall_score(labels, decided, pos_label=0),
        "brier": sk.brier_score_loss(labels, positive),
    }
    assert dataclasses.asdict(score(labels, probabilities)) == pytest.approx(expected)


@settings(max_examples=25)
@given(seeds, st.integers(3, 5))
def test_multi_class_figures_are_macro_averages(seed: int, n_classes: int) -> None:
    labels, probabilities = predictions(seed, n_classes=n_classes)
    found, decided = score(labels, probabilities), probabilities.argmax(axis=1)
    truth = np.eye(n_classes)[labels]
    assert found.auroc == pytest.approx(sk.roc_auc_score(labels, probabilities, multi_class="ovr"))
    assert found.average_precision == pytest.approx(sk.average_precision_score(truth, probabilities))
    assert found.sensitivity == pytest.approx(sk.recall_score(labels, decided, average="macro"))
    assert found.f1_macro == pytest.approx(sk.f1_score(labels, decided, average="macro"))
    assert found.f1_weighted == pytest.approx(sk.f1_score(labels, decided, average="weighted"))
    each = sk.multilabel_confusion_matrix(labels, decided)
    assert found.specificity == pytest.approx(np.mean(each[:, 0, 0] / each[:, 0].sum(axis=1)))
    assert found.brier == pytest.approx(((probabilities - truth) ** 2).sum() / (2 * len(labels)))
    assert np.array_equal(confusion(labels, probabilities), sk.confusion_matrix(labels, decided))


@settings(max_examples=25)
@given(seeds)
def test_auroc_depends_on_order_alone_and_turns_with_the_labels(seed: int) -> None:
    labels, probabilities = predictions(seed)
    bent = probabilities[:, 1] ** 3
    auroc = score(labels, probabilities).auroc
    assert score(labels, np.column_stack([1 - bent, bent])).auroc == pytest.approx(auroc)
    assert score(1 - labels, probabilities).auroc == pytest.approx(1 - auroc)


@given(seeds, class_counts)
@settings(max_examples=20)
def test_per_class_figures_average_to_the_macro_figures(seed: int, n_classes: int) -> None:
    labels, probabilities = predictions(seed, n_classes=n_classes)
    per_class, overall = per_class_scores(labels, probabilities), score(labels, probabilities)
    assert [one.count for one in per_class] == np.bincount(labels).tolist()
    assert np.mean([one.sensitivity for one in per_class]) == pytest.approx(overall.balanced_accuracy)
    assert np.mean([one.f1 for one in per_class]) == pytest.approx(overall.f1_macro)
    if n_classes == 2:
        assert per_class[1].auroc == overall.auroc
        assert per_class[1].specificity == pytest.approx(per_class[0].sensitivity)


def test_a_missing_class_leaves_figures_undefined_and_never_guessed() -> None:
    labels, probabilities = np.ones(4, int), np.tile([0.3, 0.7], (4, 1))
    found = dataclasses.asdict(score(labels, probabilities))
    undefined = {name for name, value in found.items() if math.isnan(value)}
    assert undefined == {"auroc", "average_precision", "balanced_accuracy", "f1_macro", "specificity"}
    assert found["sensitivity"] == found["accuracy"] == 1


def test_decisions_of_a_chosen_threshold_move_rates_and_leave_ranking_alone() -> None:
    labels, probabilities = predictions(1)
    default, strict = score(labels, probabilities), score(labels, probabilities, np.zeros_like(labels))
    assert (strict.sensitivity, strict.specificity) == (0, 1)
    assert (strict.auroc, strict.brier) == (default.auroc, default.brier)


def test_chance_is_what_the_class_frequencies_reach() -> None:
    found = chance(np.repeat([0, 1], [30, 10]))
    assert (found.auroc, found.average_precision, found.accuracy) == (0.5, 0.25, 0.75)
    assert (found.balanced_accuracy, found.sensitivity, found.specificity) == (0.5, 0, 1)
    assert found.brier == pytest.approx(0.25 * 0.75)
    assert chance(np.repeat([0, 1, 2], 10)).average_precision == pytest.approx(1 / 3)


def test_every_figure_is_described() -> None:
    assert list(METRICS) == [field.name for field in dataclasses.fields(Scores)]
    assert [name for name, metric in METRICS.items() if not metric.higher_is_better] == ["brier"]


@pytest.mark.parametrize(
    ("labels", "probabilities", "said"),
    [
        ([0, 1], [[0.5, 0.5]], "2 labels"),
        ([], np.empty((0, 2)), "no labels"),
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]], "from 0 to 1"),
        ([0, 1], [[0.5, 0.5], [math.nan, math.nan]], "row 1"),
        ([0, 1], [[2.0, -1.0], [0.5, 0.5]], "row 0"),
        ([0, 1], [[0.5, 0.5], [1.2, 0.7]], "row 1"),
    ],
)
def test_what_is_no_prediction_is_refused(labels: list, probabilities: list, said: str) -> None:
    with pytest.raises(RunError, match=said):
        score(np.array(labels, int), np.array(probabilities, float))


@settings(max_examples=20)
@given(seeds, class_counts, st.sampled_from(["equal-mass", "equal-width"]))
def test_brier_parts_add_up_to_the_brier_score(seed: int, n_classes: int, binning: str) -> None:
    labels, probabilities = predictions(seed, n_classes=n_classes)
    parts = brier_decomposition(labels, probabilities, binning=binning)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bins
    assert total == pytest.approx(score(labels, probabilities).brier)
    assert min(parts[:3]) >= 0


def test_nothing_is_left_within_bins_of_one_probability() -> None:
    labels, probabilities = predictions(3, n=200, digits=1)
    parts = brier_decomposition(labels, probabilities, bins=50, binning="equal-width")
    assert parts.within_bins == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("binning", ["equal-mass", "equal-width"])
def test_reliability_bins_hold_every_case_once_and_ties_together(binning: str) -> None:
    labels, probabilities = predictions(4, n=300, digits=1)
    curve = reliability_curve(labels, probabilities, binning=binning)
    assert curve.cases.sum() == 300
    assert np.average(curve.observed, weights=curve.cases) == pytest.approx(labels.mean())
    assert (np.diff(curve.predicted) > 0).all()
    assert ((curve.low <= curve.observed) & (curve.observed <= curve.high)).all()
    turned = np.random.default_rng(0).permutation(300)
    again = reliability_curve(labels[turned], probabilities[turned], binning=binning)
    assert np.array_equal(again.cases, curve.cases)


def test_calibration_error_is_small_for_honest_and_large_for_boastful_probabilities() -> None:
    generator = np.random.default_rng(0)
    honest = generator.uniform(size=20_000)
    labels = (generator.uniform(size=honest.size) < honest).astype(int)
    boastful = np.round(honest)
    for binning in ("equal-mass", "equal-width"):
        error = expected_calibration_error(labels, np.column_stack([1 - honest, honest]), binning=binning)
        assert error < 0.02
        loud = expected_calibration_error(labels, np.column_stack([1 - boastful, boastful]), binning=binning)
        assert loud == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 3.0])
def test_temperature_is_found_again_and_keeps_decisions(true_temperature: float) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20_000, 3)) * 2
    cumulative = softmax(logits, axis=1).cumsum(axis=1)
    labels = np.minimum((generator.uniform(size=(len(logits), 1)) > cumulative).sum(axis=1), 2)
    found = fit_temperature(logits * true_temperature, labels)
    assert found == pytest.approx(true_temperature, rel=0.05)
    mended = apply_temperature(logits * true_temperature, found)
    assert np.array_equal(mended.argmax(axis=1), logits.argmax(axis=1))
    log_probabilities = np.log(softmax(logits * true_temperature, axis=1))
    assert fit_temperature(log_probabilities, labels) == pytest.approx(found, rel=1e-4)


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(RunError, match="finite"):
        fit_temperature(np.array([[0.0, -np.inf]]), np.array([0]))


def test_conformal_sets_cover_each_class_even_the_rare_one() -> None:
    generator = np.random.default_rng(0)
    covered: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(200):
        labels = (generator.uniform(size=400) < 0.15).astype(int)
        positive = 1 / (1 + np.exp(3 - 2 * labels - generator.normal(size=400)))  # badly calibrated on purpose
        probabilities = np.column_stack([1 - positive, positive])
        sets = conformal_sets(labels[:200], probabilities[:200], probabilities[200:], alpha=0.1)
        for k, shares in covered.items():
            shares.append(sets[labels[200:] == k, k].mean())
    assert np.mean(covered[0]) == pytest.approx(0.9, abs=0.02)
    assert 0.89 < np.mean(covered[1]) < 0.95  # few calibration cases: a step of the ladder above


def test_a_class_with_too_few_calibration_cases_is_never_ruled_out() -> None:
    labels, probabilities = np.repeat([0, 1], [50, 8]), np.repeat([[0.9, 0.1], [0.1, 0.9]], [50, 8], axis=0)
    certain = np.array([[1.0, 0.0]])
    assert conformal_sets(labels, probabilities, certain, alpha=0.1).tolist() == [[True, True]]
    assert conformal_sets(labels, probabilities, certain, alpha=0.2).tolist() == [[True, False]]
    with pytest.raises(ConfigError, match="alpha"):
        conformal_sets(labels, probabilities, certain, alpha=10)


def test_risk_ends_at_the_error_rate_and_starts_with_the_surest() -> None:
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6], [0.2, 0.8]])
    curve = risk_coverage(labels, probabilities)
    assert curve.coverage.tolist() == [0.25, 0.5, 1]  # the two ties are answered together
    assert curve.risk.tolist() == [0, 0, 0.25]
    assert curve.confidence.tolist() == [0.9, 0.8, 0.6]


@settings(max_examples=25)
@given(seeds, st.floats(0.05, 1))
def test_thresholds_do_what_they_promise(seed: int, wanted: float) -> None:
    labels, probabilities = predictions(seed)
    positive, cuts = probabilities[:, 1], np.linspace(0, 1, 501)

    def rates(cut: float) -> tuple[float, float]:
        return float(np.mean(positive[labels == 1] >= cut)), float(np.mean(positive[labels == 0] < cut))

    best = max(sum(rates(cut)) for cut in cuts)
    assert sum(rates(youden_threshold(labels, probabilities))) == pytest.approx(best)
    cut = threshold_for_sensitivity(labels, probabilities, sensitivity=wanted)
    assert rates(cut)[0] >= wanted
    stricter = positive[(positive > cut) & (labels == 1)]
    assert len(stricter) == 0 or np.mean(positive[labels == 1] > stricter.min()) < wanted


def test_a_threshold_needs_both_classes() -> None:
    with pytest.raises(RunError, match="both 0 and 1"):
        youden_threshold(np.zeros(3, int), np.tile([0.5, 0.5], (3, 1)))
