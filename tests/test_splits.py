"""Every partition keeps subjects together, whoever decides it, and says so where it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoatten3d.config import EvaluationConfig
from dinoatten3d.data.cohort import Scan
from dinoatten3d.errors import CohortError, ConfigError
from dinoatten3d.learning.fit import cross_validate
from dinoatten3d.learning.splits import partition
from test_learning import QUICK, bags

CLASSES = ("NL", "AD")


def scans_of(*rows: tuple[str, str | None, str | None]) -> list[Scan]:
    return [
        Scan(id=str(n), path=Path(str(n)), subject=subject, row=n + 2, site=site, split=split)
        for n, (subject, site, split) in enumerate(rows)
    ]


def test_repeats_are_different_partitions_with_folds_of_their_own() -> None:
    data = bags(per_class=24)
    folds = partition(data.scans, data.labels.numpy(), data.classes, EvaluationConfig(folds=3, repeats=4))
    assert folds.shape == (4, 48)
    assert [sorted(set(row)) for row in folds] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert len({tuple(row % 3) for row in folds}) == 4
    for row in folds:
        assert all(len(set(row[data.subjects == subject])) == 1 for subject in data.subjects)


def test_the_answer_of_repeats_is_the_mean_of_answers_of_models_that_never_saw_the_subject() -> None:
    data = bags()
    result = cross_validate(data, QUICK, EvaluationConfig(folds=3, repeats=2))
    assert len(result.fitted) == 6
    np.testing.assert_allclose(result.scored.probabilities, result.by_repeat.mean(axis=0))
    for repeat, scan in ((0, 0), (1, 5)):
        model = result.fitted[result.folds[repeat, scan]].model
        np.testing.assert_allclose(
            result.by_repeat[repeat, scan], model.score(data.take(np.array([scan])))[0][0], atol=1e-6
        )


def test_one_site_is_held_out_at_a_time() -> None:
    rows = scans_of(*((f"s{n}", "ABC"[n % 3], None) for n in range(18)))
    labels = np.array([n // 3 % 2 for n in range(18)])
    folds = partition(rows, labels, CLASSES, EvaluationConfig(split="site"))
    assert folds.shape == (1, 18)
    assert [{rows[i].site for i in np.flatnonzero(folds[0] == k)} for k in range(3)] == [{"A"}, {"B"}, {"C"}]


def test_of_train_and_test_only_the_second_is_scored() -> None:
    sides = ["train", "val", "Test"]
    rows = scans_of(*((f"s{n}", None, sides[n % 3]) for n in range(18)))
    labels = np.array([n // 3 % 2 for n in range(18)])
    folds = partition(rows, labels, CLASSES, EvaluationConfig(split="column"))
    assert [rows[i].split for i in np.flatnonzero(folds[0] == 0)] == ["Test"] * 6
    assert set(folds[0]) == {-1, 0}


def test_a_scan_that_is_only_trained_on_has_no_answer() -> None:
    data = bags()
    folds = np.where(np.arange(len(data)) % 4 < 2, 0, -1)
    result = cross_validate(data, QUICK, EvaluationConfig(), folds=folds)
    assert len(result.fitted) == 1
    assert not result.scored.probabilities[folds < 0].any()
    np.testing.assert_allclose(result.scored.probabilities[folds == 0].sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("split", "rows", "says"),
    [
        ("site", [("a", None, None), ("b", "x", None)] * 4, "4 of 8 scans have no site"),
        ("site", [("a", "x", None)] * 8, "single value 'x'"),
        ("site", [("a", "x", None), ("a", "y", None)] * 4, "subject a is in x and y"),
        ("column", [("a", None, "train"), ("a", None, "test")] * 4, "subject a is in test and train"),
        ("column", [("a", None, "train"), ("b", None, "val")] * 4, "names no 'test' scan"),
        (
            "column",
            [(f"s{n}", None, ("train", "test", "tset")[n % 3]) for n in range(8)],
            "holds 'tset' beside test, train",
        ),
        ("column", [(f"s{n}", None, "train" if n < 5 else "test") for n in range(8)], "class 'AD' has 1 subjects left"),
    ],
)
def test_a_split_that_cannot_be_is_refused(
    split: str, rows: list[tuple[str, str | None, str | None]], says: str
) -> None:
    labels = np.array([0, 0, 0, 0, 1, 0, 1, 1])
    with pytest.raises(CohortError, match=says):
        partition(scans_of(*rows), labels, CLASSES, EvaluationConfig(split=split))  # type: ignore[arg-type]


def test_a_test_side_without_a_class_is_refused() -> None:
    rows = scans_of(*((f"s{n}", None, "train" if n < 8 else "test") for n in range(12)))
    labels = np.array([0, 1] * 4 + [0] * 4)
    with pytest.raises(CohortError, match="no scan of class 'AD' is held out"):
        partition(rows, labels, CLASSES, EvaluationConfig(split="column"))


def test_repeats_of_a_split_that_has_one_partition_are_refused() -> None:
    with pytest.raises(ConfigError, match="one partition only"):
        EvaluationConfig(split="site", repeats=3)


@given(st.lists(st.sampled_from([None, "", "train", "test", "A", "B"]), min_size=2, max_size=20), st.integers(0, 99))
def test_any_split_column_is_used_or_refused_in_a_sentence(values: list[str | None], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [
        replace(scan, split=value or None)
        for scan, value in zip(scans_of(*[("", None, None)] * len(values)), values, strict=True)
    ]
    rows = [replace(scan, subject=f"s{rng.integers(8)}") for scan in rows]
    labels = rng.integers(2, size=len(rows))
    try:
        folds = partition(rows, labels, CLASSES, EvaluationConfig(split="column"))
    except CohortError as error:
        assert len(str(error).splitlines()) == 1
        return
    subjects = np.array([scan.subject for scan in rows])
    for fold in set(folds[0][folds[0] >= 0]):
        assert not set(subjects[folds[0] == fold]) & set(subjects[folds[0] != fold])
        assert set(labels[folds[0] != fold]) == {0, 1}
