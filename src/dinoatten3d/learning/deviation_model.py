"""The default model of one fold: attention over slices by how much they deviate, beside the mean patch token.

The attention's direction and the classifier are logistic regressions, and inner folds choose which of the two inputs
the classifier has. With tens of scans this beat what is trained step by step (docs/log.md), and the same data gives
the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from dinoatten3d.errors import FeatureError
from dinoatten3d.learning.bags import Bags, Look
from dinoatten3d.learning.deviation import (
    Deviation,
    PlaneDeviation,
    fit_deviation,
    larger_in_tissue,
    slice_scores,
    top_slices,
)
from dinoatten3d.learning.splits import inner_folds

Array = NDArray[np.float64]
MEAN_STRENGTH = 0.01
SCORE_STRENGTH = 0.1
SHARPNESS = 2.0
LARGEST_LOGIT = 60.0


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Standardisation and a linear map: `(x - mean) / scale @ weight + bias`, `[inputs]` to `[classes]`."""

    mean: Array
    scale: Array
    weight: Array
    bias: Array

    def __call__(self, x: Array) -> Array:
        """Apply it to `[n, inputs]`; gives a logit for each class, `[n, classes]`."""
        return np.asarray((x - self.mean) / self.scale @ self.weight + self.bias)


@dataclass(frozen=True, kw_only=True)
class DeviationModel:
    """A fold's model: deviation, attention direction `[2]`, logits of the mean patch token, and the classifier."""

    deviation: Deviation
    direction: Array
    mean_logit: Linear
    classifier: Linear

    def score(self, bags: Bags) -> tuple[Array, Array]:
        """Give probabilities `[scans, classes]` and slice weights `[scans, slices]` of scans it was not fitted on."""
        probabilities, weights, _ = self.look(bags)
        return probabilities, weights

    def look(self, bags: Bags) -> Look:
        """Give the same, and the larger of the darker and brighter scores of each tissue patch."""
        scans = tokens_of(bags)
        maps = [self.deviation.map(scan) for scan in scans]
        scores = np.stack([slice_scores(found, scan.tissue) for found, scan in zip(maps, scans, strict=True)])
        weights = attend_to_deviation(scores, self.direction)
        inputs = np.concatenate([_pool(scores, weights), _against_first(self.mean_logit(_mean_token(bags)))], axis=1)
        larger = [larger_in_tissue(found, scan.tissue) for found, scan in zip(maps, scans, strict=True)]
        return Look(softmax(self.classifier(inputs)), weights, np.stack(larger))

    def notes(self) -> list[str]:
        """Say so where inner folds chose the mean patch token alone: the answer then owes nothing to the attention."""
        if np.abs(self.classifier.weight[: len(self.direction)]).max() > 0:
            return []
        return ["the answer comes from the mean patch token alone; the slice weights show deviation, not what decided"]

    def tensors(self) -> dict[str, Tensor]:
        """Give what `from_tensors` takes, for safetensors."""
        found: dict[str, Tensor] = {"direction": torch.from_numpy(self.direction)}
        for number, plane in enumerate(self.deviation.by_plane):
            found |= {f"deviation.{number}.{k}": torch.as_tensor(v).contiguous() for k, v in vars(plane).items()}
            found[f"deviation.{number}.place"] = plane.place.half()
        for name in ("mean_logit", "classifier"):
            found |= {f"{name}.{k}": torch.from_numpy(v) for k, v in vars(getattr(self, name)).items()}
        return found

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> DeviationModel:
        """Read back what `tensors` gave."""

        def group(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}

        def plane(own: dict[str, Tensor]) -> PlaneDeviation:
            return PlaneDeviation(
                place=own["place"].float(),
                weight=own["weight"],
                bias=own["bias"],
                mean=own["mean"].numpy(),
                deviation=own["deviation"].numpy(),
            )

        linear = {n: Linear(**{k: t.numpy() for k, t in group(n).items()}) for n in ("mean_logit", "classifier")}
        count = sum(name.endswith(".place") for name in tensors)
        deviation = Deviation(by_plane=tuple(plane(group(f"deviation.{number}")) for number in range(count)))
        return cls(deviation=deviation, direction=tensors["direction"].numpy(), **linear)


class FittedDeviation(NamedTuple):
    """A fitted model and the cross-fitted probabilities of its own training scans, `[train, classes]`."""

    model: DeviationModel
    inner: Array


def fit_deviation_model(bags: Bags, *, seed: int) -> FittedDeviation:
    """Fit on the training scans of one outer fold; the first class is the reference.

    Slice scores and mean-token logits of the training scans are cross-fitted, so that the classifier learns from
    figures of the kind that it will see.

    Raises:
        FeatureError: The features hold no patch tokens.
        CohortError: The reference class is too small.
    """
    labels, count = bags.labels.numpy(), len(bags.classes)
    scans = tokens_of(bags)
    fitted = fit_deviation(scans, bags.subjects, labels == 0, planes=bags.planes, seed=seed)
    scores = slice_scores(fitted.maps, np.stack([scan.tissue for scan in scans]))
    guide = _logistic(top_slices(scores), labels, count, SCORE_STRENGTH)
    direction = attention_direction(guide)
    mean = _mean_token(bags)
    mean_logit = _logistic(mean, labels, count, MEAN_STRENGTH)
    crossed = np.zeros((len(bags), count))
    inner = inner_folds(labels, bags.subjects, folds=5, seed=seed)
    for fold in np.unique(inner):
        rest = inner != fold
        crossed[~rest] = _logistic(mean[rest], labels[rest], count, MEAN_STRENGTH)(mean[~rest])
    pooled = _pool(scores, attend_to_deviation(scores, direction))
    classifier, inner_answers = _classifier(pooled, _against_first(crossed), bags, seed)
    model = DeviationModel(
        deviation=fitted.deviation, direction=direction, mean_logit=mean_logit, classifier=classifier
    )
    return FittedDeviation(model, inner_answers)


def attention_direction(guide: Linear) -> Array:
    """Turn the classifier of the three highest slices into the unit direction that slices are weighed along, `[2]`."""
    per_score = guide.weight / guide.scale[:, None]
    # two classes: towards the positive one; more: whatever tells any of them apart
    direction = per_score[:, 1] - per_score[:, 0] if per_score.shape[1] == 2 else np.abs(per_score).max(axis=1)
    return np.asarray(direction / max(float(np.linalg.norm(direction)), 1e-12))


def attend_to_deviation(scores: Array, direction: Array) -> Array:
    """Give softmax weights of slices along the direction, `[scans, slices, 2]` to `[scans, slices]`."""
    return softmax(np.clip(SHARPNESS * (scores @ direction), -LARGEST_LOGIT, LARGEST_LOGIT))


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def tokens_of(bags: Bags) -> list[Any]:
    """Give the patch tokens of every scan.

    Raises:
        FeatureError: They were not extracted.
    """
    if any(tokens is None for tokens in bags.tokens):
        raise FeatureError(
            "these features hold no patch tokens, which the default recipe looks at; "
            "extract with --recipe default, or train with --model.pooling attention"
        )
    return list(bags.tokens)


def _pool(scores: Array, weights: Array) -> Array:
    return np.asarray((weights[..., None] * scores).sum(axis=1))


def _mean_token(bags: Bags) -> Array:
    """Average the tissue patches of each scan, `[scans, dim]`: it tells diffuse differences better than CLS does."""
    return np.stack([scan.tokens[scan.tissue].astype(np.float64).mean(axis=0) for scan in tokens_of(bags)])


def _against_first(logits: Array) -> Array:
    return logits[:, 1:] - logits[:, :1]


def _classifier(pooled: Array, crossed: Array, bags: Bags, seed: int) -> tuple[Linear, Array]:
    """Fit on the attention-pooled scores, on the mean-token logits or on both, as inner folds choose by AUROC.

    Gives the classifier and what the chosen inputs say of each scan in the inner fold that left it out.
    """
    labels, count = bags.labels.numpy(), len(bags.classes)
    inputs = np.concatenate([pooled, crossed], axis=1)
    from_scores = np.arange(inputs.shape[1]) < pooled.shape[1]
    inner = inner_folds(labels, bags.subjects, folds=5, seed=seed + 7)  # other folds than those of the logits
    best, chosen, kept = -1.0, inputs, np.zeros((len(bags), count))
    for used in (from_scores, ~from_scores, from_scores | True):
        candidate = inputs * used
        answers = np.zeros((len(bags), count))
        for fold in np.unique(inner):
            rest = inner != fold
            answers[~rest] = softmax(_logistic(candidate[rest], labels[rest], count, SCORE_STRENGTH)(candidate[~rest]))
        figure = roc_auc_score(labels, answers[:, 1] if count == 2 else answers, multi_class="ovr")
        if figure > best:
            best, chosen, kept = figure, candidate, answers
    return _logistic(chosen, labels, count, SCORE_STRENGTH), kept


def _logistic(x: Array, labels: NDArray[np.int64], classes: int, strength: float) -> Linear:
    """Fit class-balanced logistic regression on standardised inputs, one logit a class."""
    mean, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-9)
    model = LogisticRegression(C=strength, max_iter=3000, class_weight="balanced").fit((x - mean) / scale, labels)
    weight, bias = model.coef_.T, model.intercept_
    if classes == 2:  # scikit-learn gives the positive class alone
        weight, bias = np.concatenate([-weight, weight], axis=1) / 2, np.concatenate([-bias, bias]) / 2
    return Linear(mean=mean, scale=scale, weight=np.ascontiguousarray(weight), bias=bias)
