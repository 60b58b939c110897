"""Deviation finds what is put in, and nothing of a held-out scan reaches the reference that scores it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from dinoatten3d.config import EvaluationConfig, Recipe
from dinoatten3d.data.cohort import Scan
from dinoatten3d.errors import CohortError, ConfigError, FeatureError
from dinoatten3d.features.store import PatchTokens
from dinoatten3d.inference.anomaly import percentile_among, score_anomalies
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.deviation import fit_deviation, slice_scores
from dinoatten3d.learning.deviation_model import DeviationModel, attend_to_deviation, fit_deviation_model
from dinoatten3d.learning.fit import cross_validate
from dinoatten3d.learning.splits import outer_folds

SLICES, GRID, DIM = 6, 5, 8
DARKER, BRIGHTER = np.eye(DIM)[0] * 4, np.eye(DIM)[1] * 4


def scan_tokens(rng: np.random.Generator, anatomy: np.ndarray, *, lesion: tuple[int, int, int] | None) -> PatchTokens:
    """Tokens of one scan: shared anatomy, own noise, perhaps a lesion of 2 x 2 patches; three blemished slices."""
    tokens = anatomy + rng.normal(0, 1, anatomy.shape)
    if lesion is not None:
        s, r, c = lesion
        tokens[s, r : r + 2, c : c + 2] += DARKER
    index = np.sort(rng.permutation(SLICES)[:3])
    weight = np.zeros((3, GRID, GRID), np.float32)
    factor = np.array([0.5, 1.5, 0.5])
    blemished = tokens[index].copy()
    for k in range(3):
        r, c = rng.integers(0, GRID - 1, 2)
        weight[k, r : r + 2, c : c + 2] = 1
        blemished[k, r : r + 2, c : c + 2] += DARKER if factor[k] < 1 else BRIGHTER
    return PatchTokens(
        tokens=tokens.astype(np.float16),
        tissue=np.ones((SLICES, GRID, GRID), bool),
        blemished=blemished.astype(np.float16),
        blemished_slice=index,
        blemished_weight=weight,
        blemished_factor=factor,
    )


def cohort(n: int = 40, *, seed: int = 0, lesions: bool = True, scans_each: int = 1) -> tuple[Bags, np.ndarray]:
    """Make n healthy and n lesion scans, and say which slice holds the lesion (-1: none)."""
    rng = np.random.default_rng(seed)
    anatomy = rng.normal(0, 5, (SLICES, GRID, GRID, DIM))
    labels = np.repeat([0, 1], n)
    place = np.where(labels == 1, rng.integers(SLICES, size=2 * n), -1) if lesions else np.full(2 * n, -1)
    tokens = tuple(
        scan_tokens(rng, anatomy, lesion=(p, *rng.integers(0, GRID - 1, 2)) if p >= 0 else None) for p in place
    )
    bags = Bags(
        features=torch.from_numpy(rng.normal(size=(2 * n, SLICES, 10))).float(),
        mask=torch.ones(2 * n, SLICES, dtype=torch.bool),
        labels=torch.from_numpy(labels),
        scans=tuple(Scan(id=str(i), path=Path(str(i)), subject=f"s{i // scans_each}", row=i) for i in range(2 * n)),
        position_mm=np.tile(np.arange(SLICES, dtype=float), (2 * n, 1)),
        brain_ml=rng.normal(1400, 100, 2 * n),
        classes=("healthy", "lesion"),
        planes=("axial",) * SLICES,
        tokens=tokens,
    )
    return bags, place


def test_a_lesion_that_cls_does_not_show_is_found_with_its_slice() -> None:
    bags, place = cohort()
    result = cross_validate(bags, Recipe(), EvaluationConfig(folds=4))
    assert roc_auc_score(bags.labels, result.scored.probabilities[:, 1]) > 0.9
    lesion = place >= 0
    assert (result.scored.weights.argmax(axis=1) == place)[lesion].mean() > 0.8
    np.testing.assert_allclose(result.scored.weights.sum(axis=1), 1)


def test_without_a_lesion_it_is_at_chance() -> None:
    """Healthy training scans are cross-fitted: were they their own reference, labels alone would tell them apart."""
    figures = []
    for seed in range(4):
        bags, _ = cohort(30, seed=seed, lesions=False)
        result = cross_validate(bags, Recipe(), EvaluationConfig(folds=3, seed=seed))
        figures.append(roc_auc_score(bags.labels, result.scored.probabilities[:, 1]))
    assert 0.4 < np.mean(figures) < 0.6


def test_healthy_training_scans_score_as_new_healthy_ones_do() -> None:
    bags, _ = cohort(60, lesions=False)
    train = bags.take(np.arange(30))
    fitted = fit_deviation(train.tokens, train.subjects, np.ones(30, bool), planes=bags.planes, seed=0)  # type: ignore[arg-type]
    new = np.stack([fitted.deviation.map(bags.tokens[i]) for i in range(30, 60)])  # type: ignore[arg-type]
    old_scores, new_scores = (slice_scores(m, np.ones(m.shape[:-1], bool)).max(axis=1) for m in (fitted.maps, new))
    assert (np.abs(old_scores.mean(axis=0) - new_scores.mean(axis=0)) < 0.6 * new_scores.std(axis=0)).all()


def test_the_held_out_scans_cannot_enter_the_reference() -> None:
    """The planted leak: tokens of held-out scans are made absurd, and the model of their fold does not notice."""
    bags, _ = cohort(12)
    folds = outer_folds(bags.labels.numpy(), bags.subjects, bags.classes, folds=3, seed=0)
    absurd = tuple(
        replace(t, tokens=t.tokens + np.float16(100), blemished=t.blemished - np.float16(100)) if folds[i] == 0 else t
        for i, t in enumerate(bags.tokens)
        if t is not None
    )
    honest = cross_validate(bags, Recipe(), EvaluationConfig(folds=3), folds=folds)
    planted = cross_validate(replace(bags, tokens=absurd), Recipe(), EvaluationConfig(folds=3), folds=folds)
    for name, tensor in honest.fitted[0].model.tensors().items():
        assert torch.equal(tensor, planted.fitted[0].model.tensors()[name]), name
    places = [result.fitted[1].model.tensors()["deviation.0.place"] for result in (honest, planted)]
    assert not torch.equal(*places)


def test_a_subject_is_never_its_own_reference_with_any_of_its_scans() -> None:
    """Both scans of a healthy person have the same odd patch; as each other's reference neither would stand out."""
    bags, _ = cohort(8, scans_each=2)
    tokens = [t for t in bags.tokens if t is not None]
    for i in (0, 1):
        odd = tokens[i].tokens.copy()
        odd[3, 1:4, 1:4] += (4 * DARKER).astype(np.float16)
        tokens[i] = replace(tokens[i], tokens=odd)
    maps = fit_deviation(tokens, bags.subjects, bags.labels.numpy() == 0, planes=bags.planes, seed=0).maps
    assert (maps[:2, 3, 2, 2, 0] > 6).all()  # in 8 scans, a member of its own reference stays below 8 ** 0.5


def test_a_model_reads_back_as_it_was_written() -> None:
    bags, _ = cohort(12)
    model = fit_deviation_model(bags, seed=0).model
    again = DeviationModel.from_tensors(model.tensors())
    for mine, theirs in zip(model.score(bags), again.score(bags), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-2)  # the reference is kept in half precision


def test_the_same_seed_gives_the_same_model() -> None:
    bags, _ = cohort(12)
    first, again = (fit_deviation_model(bags, seed=3).model.tensors() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_slice_without_tissue_is_ordinary() -> None:
    maps = np.random.default_rng(0).normal(5, 1, (SLICES, GRID, GRID, 2)).astype(np.float32)
    tissue = np.ones((SLICES, GRID, GRID), bool)
    tissue[2] = False
    tissue[3, 1:] = False
    tissue[3, 0, 1:] = False
    scores = slice_scores(maps, tissue)
    assert (scores[2] == 0).all()
    np.testing.assert_allclose(scores[3], maps[3, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(scores[0], np.sort(maps[0].reshape(-1, 2), axis=0)[-2:].mean(axis=0), rtol=1e-5)


def test_attention_follows_its_direction() -> None:
    scores = np.array([[[0.0, 9], [5, 0], [1, 0]]])
    assert attend_to_deviation(scores, np.array([1.0, 0])).argmax() == 1
    assert attend_to_deviation(scores, np.array([0.0, 1])).argmax() == 0


@pytest.mark.parametrize("plane", ["axial", "sagittal"])
def test_a_sagittal_slice_is_not_compared_with_its_own_front_and_back(plane: str) -> None:
    bags, _ = cohort(12)
    model = fit_deviation_model(replace(bags, planes=(plane,) * SLICES), seed=0).model  # type: ignore[arg-type]
    assert len(model.deviation.by_plane[0].weight) == (DIM if plane == "sagittal" else 2 * DIM)
    assert model.score(bags)[0].shape == (24, 2)


def test_nothing_crosses_from_one_plane_into_another() -> None:
    bags, _ = cohort(12)
    planes = ("axial",) * 4 + ("sagittal",) * 2
    loud = tuple(
        replace(t, tokens=np.where(np.arange(SLICES)[:, None, None, None] >= 4, np.float16(50), 1) * t.tokens)
        for t in bags.tokens
        if t is not None
    )
    reference = bags.labels.numpy() == 0
    one, other = (
        fit_deviation(tokens, bags.subjects, reference, planes=planes, seed=0)  # type: ignore[arg-type]
        for tokens in (bags.tokens, loud)
    )
    np.testing.assert_array_equal(one.maps[:, :4], other.maps[:, :4])
    assert not np.array_equal(one.maps[:, 4:], other.maps[:, 4:])
    axial, sagittal = one.deviation.by_plane
    assert (len(axial.weight), len(sagittal.weight)) == (2 * DIM, DIM)
    assert (len(axial.place), len(sagittal.place)) == (4, 2)
    assert one.deviation.map(loud[0])[:4].tolist() == one.deviation.map(bags.tokens[0])[:4].tolist()  # type: ignore[arg-type]


def test_several_classes_work() -> None:
    bags, place = cohort(24)
    labels = np.where(place < 0, 0, np.where(place < 3, 1, 2))
    bags = replace(bags, labels=torch.from_numpy(labels), classes=("healthy", "low", "high"))
    result = cross_validate(bags, Recipe(), EvaluationConfig(folds=3))
    assert result.scored.probabilities.shape == (48, 3)
    assert roc_auc_score(labels == 0, result.scored.probabilities[:, 0]) > 0.8


def test_features_without_patches_and_too_few_references_are_named() -> None:
    bags, _ = cohort(12)
    with pytest.raises(FeatureError, match="hold no patch tokens"):
        fit_deviation_model(replace(bags, tokens=(None,) * 24), seed=0)
    with pytest.raises(CohortError, match="has 3 subjects in the training scans"):
        fit_deviation(bags.tokens[:3], bags.subjects[:3], np.ones(3, bool), planes=bags.planes, seed=0)  # type: ignore[arg-type]
    bare = [replace(t, blemished_weight=t.blemished_weight * 0) for t in bags.tokens if t is not None]
    with pytest.raises(CohortError, match="hold no patch that was painted darker"):
        fit_deviation(bare, bags.subjects, bags.labels.numpy() == 0, planes=bags.planes, seed=0)


def test_anomaly_finds_lesions_and_their_slices_without_their_labels() -> None:
    bags, place = cohort()
    found = score_anomalies(bags, folds=4)
    assert roc_auc_score(place >= 0, found.table["score"]) > 0.9
    lesion = place >= 0
    assert (found.slice_scores.argmax(axis=1) == place)[lesion].mean() > 0.8
    healthy = found.table.loc[~lesion, "percentile"]
    assert healthy.mean() == pytest.approx(50, abs=1)


def test_labels_of_the_others_change_nothing_in_an_anomaly_score() -> None:
    bags, _ = cohort(12)
    three = replace(bags, labels=torch.where(bags.labels == 1, 1 + torch.arange(24) % 2, 0), classes=("a", "b", "c"))
    np.testing.assert_array_equal(score_anomalies(bags, folds=3).maps, score_anomalies(three, folds=3).maps)


def test_an_anomaly_score_needs_no_labels_at_all_and_enough_people() -> None:
    bags, _ = cohort(10, lesions=False)
    unlabelled = replace(bags, labels=torch.full((20,), -1))
    assert len(score_anomalies(unlabelled, folds=5).table) == 20
    with pytest.raises(CohortError, match="there are 10 reference subjects, fewer than the 11 folds"):
        score_anomalies(bags, folds=11)
    with pytest.raises(ConfigError, match="folds is 1; it must be 2 or more"):
        score_anomalies(bags, folds=1)


def test_a_whole_brain_that_looks_different_is_no_lesion() -> None:
    bags, _ = cohort(20, lesions=False)
    tokens = [t for t in bags.tokens if t is not None]
    fitted = fit_deviation(
        tokens[:-1], bags.subjects[:-1], np.ones(39, bool), planes=("sagittal",) * SLICES, seed=0
    ).deviation
    shifted = replace(tokens[-1], tokens=(tokens[-1].tokens + 0.5 * DARKER).astype(np.float16))
    np.testing.assert_allclose(np.median(fitted.map(shifted), axis=(0, 1, 2)), 0, atol=1e-3)
    assert fitted.map(shifted).max() < fitted.map(tokens[-1]).max() + 1


def test_darker_and_brighter_are_equally_rare_among_references() -> None:
    bags, _ = cohort(20, lesions=False)
    tokens = [t for t in bags.tokens if t is not None]
    maps = fit_deviation(tokens, bags.subjects, np.ones(40, bool), planes=bags.planes, seed=0).maps
    np.testing.assert_allclose(np.percentile(maps, 99.9, axis=(0, 1, 2, 3)), 3.09, atol=0.1)


def test_two_labels_leave_what_deviates_abnormal() -> None:
    """Two scans without a lesion are called lesion scans: that does not turn the direction, and lesions are found."""
    bags, _ = cohort()
    called = replace(bags, labels=torch.where(torch.arange(80) < 28, 0, 1))
    model = fit_deviation_model(called.take(np.arange(30)), seed=0).model
    assert (model.direction > 0.3).all()
    answers = model.score(bags.take(np.arange(30, 80)))[0][:, 1]
    assert roc_auc_score(bags.labels[30:], answers) > 0.8


def test_a_percentile_is_among_the_others() -> None:
    score, reference = np.array([1.0, 2, 3, 2.5]), np.array([True, True, True, False])
    np.testing.assert_allclose(percentile_among(score, reference), [0, 50, 100, 200 / 3])
