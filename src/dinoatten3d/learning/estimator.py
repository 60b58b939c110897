"""Slice attention as a scikit-learn classifier over bags of slice features."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_array, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from dinoatten3d.config import AdjustConfig, ModelConfig, Recipe
from dinoatten3d.data.cohort import Scan
from dinoatten3d.errors import CohortError, RunError
from dinoatten3d.files import write_bytes
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.fit import fit_fold
from dinoatten3d.learning.model import SliceAttentionNet
from dinoatten3d.toml import from_dict, load_recipe, to_dict


class SliceAttentionClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Trained slice attention with `fit`, `predict`, `predict_proba` and `slice_weights`.

    `X` is an array `[scans, slices, dim]` in which a slice of NaN is padding, a list of arrays `[slices, dim]`, or an
    array `[scans, dim]`: bags of one slice. `y` holds labels of any kind. `fit` takes `groups`, the subject of
    each scan: no subject is on both sides of the inner folds that choose the epoch. To split outside by subject too:

        cross_val_score(SliceAttentionClassifier(), X, y, groups=g, cv=StratifiedGroupKFold(5), params={"groups": g})

    Wrong input is a ValueError, as scikit-learn wants it.

    Args:
        recipe: `default`, `paper`, `published` or a TOML file; its attention, loss and training are used (pooling by
            deviation needs patches, which bags do not have). None in what follows leaves the recipe's value.
        attention_width: See `ModelConfig` for this and the next.
        attention_start: `uniform` or `random`.
        standardise: Scale features by the training scans.
        hidden: Widths of the embedding head.
        dropout: On the pooled feature.
        slice_dropout: Chance that a slice is left out.
        supcon: See `LossConfig` for this and the next.
        variance: Weight of the within-class variance.
        class_weights: Weigh classes by their inverse frequency.
        classification: `cross_entropy`, `focal` or `logit_adjusted`.
        members: See `TrainingConfig` for this and the next.
        inner_folds: Folds of which one chooses the epoch.
        epochs: At most.
        patience: Epochs without a better validation score.
        batch_size: Bags in a step.
        sampling: `shuffled` or `balanced`.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        random_state: Seed, generator or None, as everywhere in scikit-learn.

    Attributes:
        classes_: Labels in the order of the probabilities.
        n_features_in_: Length of a slice's feature.
        model_: The trained network.
    """

    def __init__(
        self,
        recipe: Any = "default",
        *,
        attention_width: Any = None,
        attention_start: Any = None,
        standardise: Any = None,
        hidden: Any = None,
        dropout: Any = None,
        slice_dropout: Any = None,
        supcon: Any = None,
        variance: Any = None,
        class_weights: Any = None,
        classification: Any = None,
        members: Any = None,
        inner_folds: Any = None,
        epochs: Any = None,
        patience: Any = None,
        batch_size: Any = None,
        sampling: Any = None,
        learning_rate: Any = None,
        weight_decay: Any = None,
        random_state: Any = None,
    ) -> None:
        self.recipe = recipe
        self.attention_width = attention_width
        self.attention_start = attention_start
        self.standardise = standardise
        self.hidden = hidden
        self.dropout = dropout
        self.slice_dropout = slice_dropout
        self.supcon = supcon
        self.variance = variance
        self.class_weights = class_weights
        self.classification = classification
        self.members = members
        self.inner_folds = inner_folds
        self.epochs = epochs
        self.patience = patience
        self.batch_size = batch_size
        self.sampling = sampling
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        """Say that bags are welcome."""
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def fit(self, X: Any, y: Any, groups: Any = None) -> SliceAttentionClassifier:
        """Train on bags.

        Args:
            X: Bags, see the class.
            y: Label of each scan.
            groups: Subject of each scan; None: every scan is a subject of its own.
        """
        features = self._features(X, fitting=True)
        labels = column_or_1d(y, warn=True)
        check_consistent_length(features, labels, groups)
        check_classification_targets(labels)
        self.classes_, encoded = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y holds one class, {self.classes_[0]!r}; two or more are needed to tell them apart")
        subjects = np.arange(len(features)) if groups is None else np.asarray(groups)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        try:
            model = fit_fold(_bags(features, encoded, subjects), self._recipe(), seed=seed).model
        except CohortError as error:
            raise ValueError(str(error)) from None
        assert isinstance(model, SliceAttentionNet)  # pooling is by attention
        self.model_ = model
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Give probabilities in the order of `classes_`, `[scans, classes]`."""
        return self._score(X)[0]

    def predict(self, X: Any) -> NDArray[Any]:
        """Give the most probable class of each scan."""
        best = self.predict_proba(X).argmax(axis=1)
        return np.asarray(self.classes_[best])

    def slice_weights(self, X: Any) -> NDArray[np.float64]:
        """Give how much each slice was weighed, `[scans, slices]`: a row sums to 1, padding weighs 0."""
        return self._score(X)[1]

    def save(self, path: str | Path) -> None:
        """Write the fitted classifier to one safetensors file; nothing is pickled."""
        check_is_fitted(self)
        parameters = {k: v.item() if isinstance(v, np.generic) else v for k, v in self.get_params().items()}
        parameters = {k: v for k, v in parameters.items() if isinstance(v, str | int | float | list | tuple)}
        about = {
            "parameters": parameters | {"recipe": str(self.recipe)},
            "model": to_dict(self.model_.config),
            "classes": self.classes_.tolist(),
            "classes_dtype": self.classes_.dtype.str,
            "dim": self.n_features_in_,
        }
        write_bytes(Path(path), save(self.model_.tensors(), {"estimator": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path) -> SliceAttentionClassifier:
        """Read what `save` wrote.

        Raises:
            RunError: The file is missing, damaged or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["estimator"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise RunError(f"{path} is missing or no saved classifier ({error}); write one with `save`") from None
        found = cls(**about["parameters"])
        found.classes_ = np.array(about["classes"], dtype=about["classes_dtype"])
        found.n_features_in_ = about["dim"]
        model = SliceAttentionNet(
            dim=about["dim"],
            classes=len(found.classes_),
            members=tensors["classifier.bias"].shape[0],
            config=from_dict(ModelConfig, about["model"], str(path)),
            generator=torch.Generator(),
        )
        model.load_state_dict(tensors)
        found.model_ = model.eval()
        return found

    def _score(self, X: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        check_is_fitted(self)
        features = self._features(X, fitting=False)
        unknown = np.zeros(len(features), dtype=np.int64)
        probabilities, weights = self.model_.score(_bags(features, unknown, unknown))
        return probabilities, weights

    def _recipe(self) -> Recipe:
        """Give the recipe with what was set here in place of its own."""
        recipe = load_recipe(self.recipe)
        tables = {}
        for name in ("model", "loss", "training"):
            table = getattr(recipe, name)
            own = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(table)}
            set_here = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items() if v is not None}
            tables[name] = dataclasses.replace(table, **set_here)
        tables["model"] = dataclasses.replace(tables["model"], pooling="attention")
        return dataclasses.replace(recipe, adjust=AdjustConfig(), **tables)  # bags have no covariates

    def _features(self, X: Any, *, fitting: bool) -> NDArray[np.float32]:
        """Turn any of the forms into `[scans, slices, dim]`, padded with NaN."""
        if isinstance(X, list | tuple) and len(X) and all(np.ndim(bag) == 2 for bag in X):
            X = _padded([np.asarray(bag, dtype=np.float32) for bag in X])
        if getattr(X, "ndim", 2) != 3:
            flat = validate_data(self, X, reset=fitting, dtype=np.float32)
            return np.asarray(flat[:, None, :])
        features: NDArray[np.float32] = check_array(X, allow_nd=True, dtype=np.float32, ensure_all_finite=False)
        if fitting:
            self.n_features_in_ = features.shape[2]
        elif features.shape[2] != self.n_features_in_:
            raise ValueError(f"X has {features.shape[2]} features a slice, but {self.n_features_in_} were fitted")
        padding = np.asarray(np.isnan(features).all(axis=2))
        broken = ~np.asarray(np.isfinite(features).all(axis=2)) & ~padding
        spoiled = broken.any(axis=1) | padding.all(axis=1)
        if spoiled.any():
            raise ValueError(
                f"scan {spoiled.argmax()} holds NaN or infinity; mend it, or make whole slices NaN to leave them out "
                "(one slice at least must stay)"
            )
        return features


def _padded(bags: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    if len({bag.shape[1] for bag in bags}) > 1:
        raise ValueError(f"bags have features of lengths {sorted({b.shape[1] for b in bags})}; all must have the same")
    features = np.full((len(bags), max(len(bag) for bag in bags), bags[0].shape[1]), np.nan, dtype=np.float32)
    for row, bag in enumerate(bags):
        features[row, : len(bag)] = bag
    return features


def _bags(features: NDArray[np.float32], labels: NDArray[np.int64], subjects: NDArray[Any]) -> Bags:
    """Make bags of features alone; positions and head sizes are not known."""
    mask = ~np.asarray(np.isnan(features).all(axis=2))
    return Bags(
        features=torch.from_numpy(np.where(mask[..., None], features, np.float32(0))),
        mask=torch.from_numpy(mask),
        labels=torch.from_numpy(labels),
        scans=tuple(Scan(id=str(n), path=Path(str(n)), subject=str(s), row=n) for n, s in enumerate(subjects)),
        position_mm=np.full(mask.shape, np.nan),
        brain_ml=np.full(len(mask), np.nan),
        classes=tuple(str(n) for n in range(int(labels.max()) + 1)),
        planes=("axial",) * mask.shape[1],
        tokens=(None,) * len(mask),
    )
