"""The learning curve: nested shares, the law through its points, and when it must not be followed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit
from sklearn.metrics import roc_auc_score

from dinoatten3d.config import AdjustConfig, EvaluationConfig
from dinoatten3d.data.cohort import Scan
from dinoatten3d.errors import CohortError, ConfigError
from dinoatten3d.evaluation.controls import run_baselines
from dinoatten3d.evaluation.intervals import Interval, auroc_half_width
from dinoatten3d.evaluation.learning_curve import Trial, learning_curve, nested_share, trace_curve, train_on_shares
from dinoatten3d.evaluation.power_law import fit_power_law, subjects_needed, why_not_extrapolate
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.fit import cross_validate
from dinoatten3d.report.curve_figure import learning_curve_figure
from test_adjust import scanned
from test_learning import QUICK

SCANS = np.array([12.0, 20, 30, 42, 60])


def cohort(scans: int = 120, scans_a_subject: int = 2) -> Bags:
    """Bags without content: only subjects, labels and folds matter here."""
    label = np.arange(scans) // scans_a_subject % 2
    rows = [
        Scan(id=f"s{i}", path=Path("x"), subject=f"p{i // scans_a_subject}", row=i, label=str(label[i]))
        for i in range(scans)
    ]
    return Bags(
        features=torch.zeros(scans, 1, 2),
        mask=torch.ones(scans, 1, dtype=torch.bool),
        labels=torch.from_numpy(label),
        scans=tuple(rows),
        position_mm=np.zeros((scans, 1)),
        brain_ml=np.ones(scans),
        classes=("0", "1"),
        planes=("axial",),
        tokens=(None,) * scans,
    )


def folds_of(bags: Bags, count: int = 4) -> np.ndarray:
    pair = np.unique(bags.subjects, return_inverse=True)[1]
    return np.random.default_rng(0).permutation(pair.max() + 1)[pair] % count


def learner_of_strength(bags: Bags, strength):
    """Scores whose separation depends only on how many scans were trained on."""
    noise = np.random.default_rng(5).normal(size=len(bags))

    def learn(rows, held_out, fold):
        shifted = noise[held_out] + strength(len(rows)) * bags.labels.numpy()[held_out]
        p = 1 / (1 + np.exp(-shifted))
        return np.stack([1 - p, p], axis=1)

    return learn


def curve_of(bags: Bags, strength):
    folds = folds_of(bags)
    learn = learner_of_strength(bags, strength)
    trials, notes = train_on_shares(bags, folds, learn, seed=0)
    probabilities = np.zeros((len(bags), 2))
    for fold in range(4):
        held_out = np.flatnonzero(folds == fold)
        probabilities[held_out] = learn(np.flatnonzero(folds != fold), held_out, fold)
    trials.append(Trial(1.0, 0.75 * len(bags), probabilities))
    labels = bags.labels.numpy()
    curve = trace_curve("m", labels, bags.subjects, folds >= 0, trials, EvaluationConfig(bootstrap=200))
    return curve, notes, roc_auc_score(labels, probabilities[:, 1])


def test_a_larger_share_holds_the_smaller_and_keeps_subjects_whole_and_classes_even() -> None:
    bags = cohort()
    train = np.arange(80)
    smaller, larger = (nested_share(bags, train, share, np.random.default_rng(3)) for share in (0.35, 0.7))
    assert set(smaller) < set(larger) < set(train)
    for rows in (smaller, larger):
        counts = np.unique(bags.subjects[rows], return_counts=True)[1]
        assert (counts == 2).all()
        assert bags.labels.numpy()[rows].mean() == pytest.approx(0.5)
    assert len(larger) == 56


def test_nobody_is_trained_on_and_scored() -> None:
    bags = cohort()
    seen = []

    def learn(rows, held_out, fold):
        assert not set(bags.subjects[rows]) & set(bags.subjects[held_out])
        seen.append(len(rows))
        return np.full((len(held_out), 2), 0.5)

    trials, notes = train_on_shares(bags, folds_of(bags), learn, seed=0)
    assert [sum(t.share == s for t in trials) for s in (0.2, 0.35, 0.5, 0.7)] == [5, 3, 2, 2]
    assert len(seen) == 4 * 12
    assert notes == []


def test_a_share_that_is_too_small_is_left_out_with_a_note() -> None:
    bags = cohort(24)
    with pytest.raises(CohortError, match="class '0' would keep 1 subjects"):
        nested_share(bags, np.arange(18), 0.2, np.random.default_rng(0))
    curve, notes, _ = curve_of(bags, lambda n: 2.0)
    assert notes[0].startswith("20 % of the training subjects were left out: class '0'")
    assert curve.points[0]["share"] > 0.2


def test_the_law_is_recovered_and_agrees_with_an_independent_fit() -> None:
    auroc = 0.92 - 1.5 * SCANS**-0.8
    draws = auroc + np.random.default_rng(0).normal(0, 0.01, (300, 5))
    law = fit_power_law(SCANS, auroc, draws, exponents=np.linspace(0.1, 3, 300))
    theirs, _ = curve_fit(lambda n, a, b, c: a - b * n**-c, SCANS, auroc, p0=(0.9, 1, 1), sigma=draws.std(axis=0))
    assert (law.a[0], law.b[0], law.c[0]) == pytest.approx(tuple(theirs), abs=0.03)
    assert law.at(240).value == pytest.approx(0.92 - 1.5 * 240**-0.8, abs=2e-3)
    assert law.at(240).low < law.at(240).value < law.at(240).high


def test_a_fitted_curve_never_falls_and_never_passes_one() -> None:
    rng = np.random.default_rng(1)
    falling = fit_power_law(SCANS, np.linspace(0.8, 0.7, 5), rng.uniform(0.5, 1, (50, 5)))
    assert falling.b[0] == 0
    assert (falling.b >= 0).all()
    steep = fit_power_law(SCANS, 0.4 + 0.01 * SCANS, rng.uniform(0.5, 1, (50, 5)))
    assert steep.a.max() <= 1
    assert steep.at(10_000).high <= 1


def test_a_rising_curve_is_followed_and_its_last_point_is_the_runs_own_auroc() -> None:
    curve, notes, auroc = curve_of(cohort(240), lambda n: 2 - 12 / n)
    assert notes == []
    assert curve.points[-1]["value"] == pytest.approx(auroc)
    assert [point["scans"] for point in curve.points] == sorted(point["scans"] for point in curve.points)
    assert [place["scans"] for place in curve.ahead] == [360, 720]
    assert curve.points[-1]["value"] <= curve.ahead[0]["value"] <= curve.ahead[1]["value"] < 1
    assert "if new scans are like these" in curve.sentence


@pytest.mark.parametrize(
    ("strength", "said"), [(lambda n: 0.0, "not beyond chance"), (lambda n: 2.0, "not shown to rise")]
)
def test_chance_and_a_flat_curve_are_not_followed(strength, said: str) -> None:
    curve, _, _ = curve_of(cohort(), strength)
    assert curve.ahead == []
    assert said in curve.sentence
    assert curve.band[-1]["scans"] == curve.points[-1]["scans"]


def test_few_points_and_a_wide_band_are_no_ground_to_go_on() -> None:
    rng = np.random.default_rng(0)
    auroc = 0.9 - 2 * SCANS**-0.7
    draws = auroc + rng.normal(0, 0.01, (200, 5))
    at_all = Interval(auroc[-1], auroc[-1] - 0.02, auroc[-1] + 0.02)
    assert "4 are needed" in why_not_extrapolate(SCANS[2:], at_all, draws[:, 2:], None)
    assert why_not_extrapolate(SCANS, at_all, draws, fit_power_law(SCANS, auroc, draws)) == ""
    noisy = np.clip(auroc + rng.normal(0, 1, (200, 1)) * (0.035 * np.arange(5)), 0, 1)
    noisy[:, -1] = np.maximum(noisy[:, -1], noisy[:, 0] + 0.01)
    assert "band would reach" in why_not_extrapolate(SCANS, at_all, noisy, fit_power_law(SCANS, auroc, noisy))


def test_the_number_of_subjects_is_the_fewest_that_reach_the_half_width() -> None:
    found = subjects_needed(0.05, 0.25, lambda n: 0.8)
    assert found is not None

    def half(n: int) -> float:
        return auroc_half_width(round(0.25 * n), n - round(0.25 * n), 0.8)

    assert half(found) <= 0.05 < half(found - 1)
    assert subjects_needed(0.001, 0.25, lambda n: 0.8) is None


def test_a_half_width_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="wanted_half_width is 5"):
        EvaluationConfig(wanted_half_width=5)


def test_the_figure_ends_at_the_last_place_that_is_followed() -> None:
    followed, flat = (curve_of(cohort(240), s)[0] for s in (lambda n: 2 - 12 / n, lambda n: 2.0))
    figure = learning_curve_figure([vars(followed), vars(flat)])
    labels = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert labels[-1] == "720"
    figure.canvas.draw()


def test_the_baseline_is_adjusted_as_the_run_is_and_only_scored_subjects_are_counted() -> None:
    data = scanned(n=120, site_effect=2, class_effect=1)
    recipe = replace(QUICK, adjust=AdjustConfig(covariates=("site",)))
    folds = np.arange(120) % 2 - 1  # half is only trained on
    evaluation = EvaluationConfig(bootstrap=100)
    result = cross_validate(data, recipe, evaluation, folds=folds)
    found = learning_curve(data, recipe, "quick", evaluation, result)
    baseline = run_baselines(data, folds, "DX", recipe.adjust)["mean pooling"][0]
    scored = folds >= 0
    expected = roc_auc_score(data.labels.numpy()[scored], baseline[scored, 1])
    assert found.curves[1].points[-1]["value"] == pytest.approx(expected)
    assert found.needed["subjects_now"] == 60
