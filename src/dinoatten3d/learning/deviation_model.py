"""The default model of one fold: attention over slices by how much they deviate, beside the mean patch token.

The attention's direction and the classifier are logistic regressions. With two classes they start at "what deviates is
not healthy" and move as far as the labels carry them; inner folds choose which of the two inputs the classifier has.
With tens of scans this beat what is trained step by step (docs/log.md), and the same data gives the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from dinoatten3d.errors import FeatureError
from dinoatten3d.learning.adjust import mean_token
from dinoatten3d.learning.bags import Bags, Look
from dinoatten3d.learning.deviation import (
    Deviation,
    fit_deviation,
    larger_in_tissue,
    slice_scores,
    top_slices,
)
from dinoatten3d.learning.splits import inner_folds

Array = NDArray[np.float64]
MEAN_STRENGTH = 0.01
SCORE_STRENGTH = 0.1
PRIOR_WEIGHT, PRIOR_OFFSET = 0.5, -0.75
"""Log-odds of the second of two classes before any label: each standard deviation of healthy scans adds 0.5."""
PRIOR_STRENGTH, OFFSET_STRENGTH = 3.0, 50.0
"""Precision of those: a few scans may turn the weights, none may move the offset far, which must not differ by fold."""
MARGIN = 2.0
"""Standard errors of the AUROC by which the mean patch token must win on inner folds to be used."""
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
        inputs = np.concatenate([_pool(scores, weights), _against_first(self.mean_logit(mean_token(bags)))], axis=1)
        larger = [larger_in_tissue(found, scan.tissue) for found, scan in zip(maps, scans, strict=True)]
        return Look(softmax(self.classifier(inputs)), weights, np.stack(larger))

    def notes(self) -> list[str]:
        """Say so where inner folds chose the mean patch token alone: the answer then owes nothing to the attention."""
        if np.abs(self.classifier.weight[: len(self.direction)]).max() > 0:
            return []
        return ["the answer comes from the mean patch token alone; the slice weights show deviation, not what decided"]

    def tensors(self) -> dict[str, Tensor]:
        """Give what `from_tensors` takes, for safetensors."""
        found = {f"deviation.{k}": v for k, v in self.deviation.tensors().items()}
        found["direction"] = torch.from_numpy(self.direction)
        for name in ("mean_logit", "classifier"):
            found |= {f"{name}.{k}": torch.from_numpy(v) for k, v in vars(getattr(self, name)).items()}
        return found

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> DeviationModel:
        """Read back what `tensors` gave."""

        def group(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}

        linear = {n: Linear(**{k: t.numpy() for k, t in group(n).items()}) for n in ("mean_logit", "classifier")}
        deviation = Deviation.from_tensors(group("deviation"))
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
    guide = _from_prior(top_slices(scores), labels, count)
    direction = attention_direction(guide)
    mean = mean_token(bags)
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


def _against_first(logits: Array) -> Array:
    return logits[:, 1:] - logits[:, :1]


def _classifier(pooled: Array, crossed: Array, bags: Bags, seed: int) -> tuple[Linear, Array]:
    """Fit on the attention-pooled scores, on the mean-token logits or on both, as inner folds choose by AUROC.

    With two classes the scores are left only where another choice is better by more than chance would have it: among
    tens of scans the best of three is often the luckiest.

    Gives the classifier and what the chosen inputs say of each scan in the inner fold that left it out.
    """
    labels, count = bags.labels.numpy(), len(bags.classes)
    inputs = np.concatenate([pooled, crossed], axis=1)
    from_scores = np.arange(inputs.shape[1]) < pooled.shape[1]
    inner = inner_folds(labels, bags.subjects, folds=5, seed=seed + 7)  # other folds than those of the logits
    candidates = (from_scores, ~from_scores, from_scores | True)

    def fit(rows: NDArray[np.bool_], used: NDArray[np.bool_]) -> Linear:
        x = inputs[rows] * used
        if not used[0]:
            return _logistic(x, labels[rows], count, SCORE_STRENGTH)
        return _from_prior(x, labels[rows], count, scores=pooled.shape[1])

    answers = np.zeros((len(candidates), len(bags), count))
    for answer, used in zip(answers, candidates, strict=True):
        for fold in np.unique(inner):
            answer[inner == fold] = softmax(fit(inner != fold, used)(inputs[inner == fold] * used))
    figures = [roc_auc_score(labels, answer[:, 1] if count == 2 else answer, multi_class="ovr") for answer in answers]
    error = np.sqrt(figures[0] * (1 - figures[0]) / np.bincount(labels).min()) if count == 2 else 0.0
    best = int(np.argmax(figures)) if max(figures) > figures[0] + MARGIN * error else 0
    return fit(np.ones(len(bags), dtype=bool), candidates[best]), answers[best]


def _from_prior(x: Array, labels: NDArray[np.int64], classes: int, scores: int | None = None) -> Linear:
    """Fit logistic regression that shrinks to "what deviates is not healthy" instead of to nothing.

    Maximum a posteriori under a normal prior; inputs are in standard deviations of the reference class. Classes weigh
    the same, and together as much as the smaller one can tell (4 n0 n1 / n scans, which is n where they are equal).
    More than two classes have no such direction: there it is `_logistic`.

    Args:
        x: `[scans, inputs]`.
        labels: `[scans]`; 0 is the reference.
        classes: Number of classes.
        scores: How many of the first inputs are scores of deviation, with such a prior; the others' is 0. All, if None.
    """
    if classes > 2:
        return _logistic(x, labels, classes, SCORE_STRENGTH)
    healthy = x[labels == 0]
    mean, scale = healthy.mean(axis=0), np.maximum(healthy.std(axis=0), 1e-9)
    design = np.column_stack([(x - mean) / scale, np.ones(len(x))])
    sign, share = np.where(labels == 1, 1.0, -1.0), np.bincount(labels) / len(labels)
    weight = 2 * share[1 - labels]
    prior = np.full(design.shape[1], PRIOR_WEIGHT) * (np.arange(design.shape[1]) < (scores or design.shape[1]))
    prior[-1] = PRIOR_OFFSET
    precision = np.append(np.full(x.shape[1], PRIOR_STRENGTH), OFFSET_STRENGTH)

    def loss(theta: Array) -> tuple[float, Array]:
        margin, away = sign * (design @ theta), theta - prior
        value = weight @ np.logaddexp(0, -margin) + 0.5 * precision @ away**2
        return float(value), precision * away - design.T @ (weight * sign * expit(-margin))

    theta = minimize(loss, prior, jac=True, method="L-BFGS-B").x
    return Linear(
        mean=mean, scale=scale, weight=np.outer(theta[:-1], [-0.5, 0.5]), bias=theta[-1] * np.array([-0.5, 0.5])
    )


def _logistic(x: Array, labels: NDArray[np.int64], classes: int, strength: float) -> Linear:
    """Fit class-balanced logistic regression on standardised inputs, one logit a class."""
    mean, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-9)
    model = LogisticRegression(C=strength, max_iter=3000, class_weight="balanced").fit((x - mean) / scale, labels)
    weight, bias = model.coef_.T, model.intercept_
    if classes == 2:  # scikit-learn gives the positive class alone
        weight, bias = np.concatenate([-weight, weight], axis=1) / 2, np.concatenate([-bias, bias]) / 2
    return Linear(mean=mean, scale=scale, weight=np.ascontiguousarray(weight), bias=bias)
