"""The estimator does what scikit-learn expects of a classifier, over bags."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

import dinoatten3d
from dinoatten3d.errors import RunError
from dinoatten3d.learning import estimator as module
from dinoatten3d.learning.estimator import SliceAttentionClassifier
from test_learning import bags

QUICK = SliceAttentionClassifier(
    attention_width=8, members=2, inner_folds=2, epochs=40, patience=0, learning_rate=2e-2, random_state=0
)


def bags_and_labels(classes: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    data = bags(per_class=18, classes=classes)
    return data.features.numpy(), np.array(["NL", "AD", "MCI"])[data.labels.numpy()], data.subjects


@pytest.mark.slow
@parametrize_with_checks([clone(QUICK).set_params(batch_size=64)])
def test_scikit_learn_s_own_checks(estimator, check) -> None:  # type: ignore[no-untyped-def]
    check(estimator)


def test_cross_val_score_by_subject() -> None:
    X, y, groups = bags_and_labels()
    scores = cross_val_score(QUICK, X, y, groups=groups, cv=StratifiedGroupKFold(3), params={"groups": groups})
    assert scores.mean() > 0.8


def test_grid_search_chooses_a_setting_that_learns() -> None:
    X, y, groups = bags_and_labels()
    search = GridSearchCV(QUICK, {"learning_rate": [1e-7, 2e-2], "recipe": ["default"]}, cv=StratifiedGroupKFold(2))
    search.fit(X, y, groups=groups)
    assert search.best_params_["learning_rate"] == 2e-2
    assert search.best_estimator_.slice_weights(X).shape == X.shape[:2]


def test_a_pipeline_takes_bags() -> None:
    X, y, groups = bags_and_labels()
    pipeline = Pipeline([("halve", FunctionTransformer(lambda bags: bags[:, ::2])), ("attend", clone(QUICK))])
    assert pipeline.fit(X, y, attend__groups=groups).predict_proba(X).shape == (len(X), 2)


def test_a_clone_is_unfitted_and_gives_the_same_answer() -> None:
    X, y, _ = bags_and_labels()
    fitted = clone(QUICK).fit(X, y)
    copy = clone(fitted)
    assert not hasattr(copy, "model_")
    np.testing.assert_array_equal(copy.fit(X, y).predict_proba(X), fitted.predict_proba(X))


def test_several_classes_with_any_labels() -> None:
    X, y, _ = bags_and_labels(classes=3)
    fitted = clone(QUICK).fit(X, y)
    assert fitted.classes_.tolist() == ["AD", "MCI", "NL"]
    assert set(fitted.predict(X)) <= set(y)
    assert fitted.score(X, y) > 0.8
    numbers = np.array([30, -1, 7])[np.unique(y, return_inverse=True)[1]]
    assert set(clone(QUICK).fit(X, numbers).predict(X)) <= {30, -1, 7}


def test_no_subject_is_on_both_sides_of_an_inner_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y, groups = bags_and_labels()
    seen = []
    whole = module.fit_fold
    monkeypatch.setattr(module, "fit_fold", lambda data, *a, **k: seen.append(data.subjects) or whole(data, *a, **k))
    clone(QUICK).fit(X, y, groups=groups)
    clone(QUICK).fit(X, y)
    assert seen[0].tolist() == groups.tolist()
    assert len(set(seen[1])) == len(X)


def test_a_list_of_ragged_bags_is_an_array_padded_with_nan() -> None:
    X, y, _ = bags_and_labels()
    ragged = [bag[: 4 + n % 3] for n, bag in enumerate(X)]
    padded = X.copy()
    for n in range(len(X)):
        padded[n, 4 + n % 3 :] = np.nan
    first, second = clone(QUICK).fit(ragged, y), clone(QUICK).fit(padded, y)
    np.testing.assert_array_equal(first.predict_proba(ragged), second.predict_proba(padded))
    weights = first.slice_weights(ragged)
    assert (weights[np.isnan(padded[..., 0])] == 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("kind", [str, int, object])
def test_saved_and_loaded_it_answers_the_same(tmp_path: Path, kind: type) -> None:
    X, y, _ = bags_and_labels()
    labels = (y == "AD").astype(int) + 4 if kind is int else y.astype(kind)
    fitted = clone(QUICK).set_params(hidden=(6,)).fit(X, labels)
    fitted.save(tmp_path / "classifier.safetensors")
    loaded = SliceAttentionClassifier.load(tmp_path / "classifier.safetensors")
    np.testing.assert_array_equal(loaded.predict_proba(X), fitted.predict_proba(X))
    np.testing.assert_array_equal(loaded.predict(X), fitted.predict(X))
    assert loaded.get_params()["learning_rate"] == 2e-2
    assert loaded.classes_.dtype == fitted.classes_.dtype


def test_what_is_no_saved_classifier_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match="no saved classifier"):
        SliceAttentionClassifier.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda X: X.__setitem__((3, 1, 0), np.nan), "scan 3 holds NaN or infinity"),
        (lambda X: X.__setitem__(5, np.nan), "scan 5 holds NaN or infinity"),
        (lambda X: X.__setitem__((2, 0, 0), np.inf), "scan 2 holds NaN or infinity"),
    ],
)
def test_a_spoiled_scan_is_named(spoil, said: str) -> None:  # type: ignore[no-untyped-def]
    X, y, _ = bags_and_labels()
    X = X.copy()
    spoil(X)
    with pytest.raises(ValueError, match=said):
        clone(QUICK).fit(X, y)


def test_other_features_than_those_fitted_are_refused() -> None:
    X, y, _ = bags_and_labels()
    fitted = clone(QUICK).fit(X, y)
    with pytest.raises(ValueError, match="X has 5 features a slice, but 10 were fitted"):
        fitted.predict(X[..., :5])


def test_the_package_gives_it_by_name() -> None:
    assert dinoatten3d.SliceAttentionClassifier is SliceAttentionClassifier
