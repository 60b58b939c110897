"""Subgroups are scored by themselves, small ones are named without a figure, and the verdict says what stands out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from dinoatten3d.evaluation.metrics import score
from dinoatten3d.evaluation.subgroups import subgroup_figures, subgroup_sentences

EVALUATION = {"bootstrap": 200, "seed": 0}


def answers(n: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Make answers that are right for women and mean nothing for men."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    sex = np.where(np.arange(n) % 4 < 2, "f", "m")
    logit = np.where(sex == "f", 4.0 * labels - 2, 0) + rng.normal(size=n)
    positive = 1 / (1 + np.exp(-logit))
    cohort = pd.DataFrame(
        {
            "subject": [f"s{i}" for i in range(n)],
            "sex": sex,
            "age": rng.normal(50, 10, n),
            "site": ["A"] * (n - 6) + ["B"] * 6,
            "brain_ml": rng.normal(1400, 100, n),
        }
    )
    return labels, np.stack([1 - positive, positive], axis=1), cohort


def figures(cohort: pd.DataFrame, labels: np.ndarray, probabilities: np.ndarray, **more: Any) -> list[dict[str, Any]]:
    settings = {"classes": ["NL", "AD"], "target": "DX", "evaluation": EVALUATION} | more
    return subgroup_figures(labels, probabilities, probabilities.argmax(axis=1), cohort, **settings)


def test_each_group_is_scored_by_its_own_scans() -> None:
    labels, probabilities, cohort = answers()
    found = {(row["covariate"], row["group"]): row for row in figures(cohort, labels, probabilities)}
    women = (cohort["sex"] == "f").to_numpy()
    expected = score(labels[women], probabilities[women])
    row = found[("sex", "f")]
    assert row["scans"] == row["subjects"] == women.sum()
    assert row["auroc"]["value"] == expected.auroc
    assert row["auroc"]["low"] < expected.auroc < row["auroc"]["high"]
    assert row["balanced_accuracy"]["value"] == expected.balanced_accuracy


def test_thirds_of_age_hold_everyone_whose_age_is_known_once() -> None:
    labels, probabilities, cohort = answers()
    cohort.loc[:10, "age"] = np.nan
    thirds = [row for row in figures(cohort, labels, probabilities) if row["covariate"] == "age"]
    assert len(thirds) == 3
    assert sum(row["scans"] for row in thirds) == 109
    cohort["age"] = 50.0
    assert not [row for row in figures(cohort, labels, probabilities) if row["covariate"] == "age"]


def test_thirds_within_one_year_keep_their_own_names() -> None:
    labels, probabilities, cohort = answers()
    cohort["age"] = np.linspace(0.01, 0.3, 120)
    thirds = [row for row in figures(cohort, labels, probabilities) if row["covariate"] == "age"]
    assert [row["scans"] for row in thirds] == [40, 40, 40]


def test_a_group_with_few_people_of_a_class_has_no_figure() -> None:
    labels, probabilities, cohort = answers()
    small = next(row for row in figures(cohort, labels, probabilities) if row["group"] == "B")
    assert small["people"] == {"NL": 3, "AD": 3}
    assert small["auroc"] is None
    cohort["subject"] = [f"s{i // 40}" for i in range(120)]  # many scans of few people are few people
    assert all(row["auroc"] is None for row in figures(cohort, labels, probabilities))


def test_the_target_makes_no_groups() -> None:
    labels, probabilities, cohort = answers()
    assert all(row["covariate"] != "sex" for row in figures(cohort, labels, probabilities, target="sex"))


def test_the_verdict_names_groups_that_stand_out_and_how_many_were_looked_at() -> None:
    labels, probabilities, cohort = answers()
    rows = figures(cohort, labels, probabilities)
    overall = {"auroc": {"value": score(labels, probabilities).auroc}}
    (sentence,) = subgroup_sentences(rows, overall)
    assert "sex f" in sentence
    assert "sex m" in sentence
    assert f"{sum(row['auroc'] is not None for row in rows)} subgroups were looked at" in sentence
    alike = [row for row in rows if row["covariate"] == "site"]
    assert subgroup_sentences(alike, overall) == []
