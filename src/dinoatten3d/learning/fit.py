"""Train a recipe inside one outer fold, and over all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoatten3d.config import EvaluationConfig, Recipe
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.deviation_model import fit_deviation_model
from dinoatten3d.learning.losses import composite_loss, cross_entropy
from dinoatten3d.learning.model import SliceAttentionNet
from dinoatten3d.learning.splits import inner_folds, partition

Progress = Callable[[int, int], None]


@runtime_checkable
class FoldModel(Protocol):
    """What a fold leaves behind, whatever kind it is."""

    def score(self, bags: Bags) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Give probabilities `[scans, classes]` and slice weights `[scans, slices]`."""

    def patch_maps(self, bags: Bags) -> NDArray[np.float32] | None:
        """Give how much each patch deviates, `[scans, slices, rows, columns]`; None where the model does not know."""

    def notes(self) -> list[str]:
        """Give what a reader of an answer should know of the model."""

    def tensors(self) -> dict[str, Tensor]:
        """Give what to keep on disk."""


@dataclass(frozen=True, kw_only=True)
class FittedFold:
    """The model of one outer fold and how it got there (nothing, where it was solved and not trained)."""

    model: FoldModel
    history: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Probabilities `[scans, classes]` and slice weights `[scans, slices]`, averaged over the members."""

    probabilities: NDArray[np.float64]
    weights: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """Out-of-fold answers and the models that gave them.

    Attributes:
        folds: Which fold scored each scan in each repeat, `[repeats, scans]`; -1: none (learning/splits.py).
        by_repeat: Probabilities in each repeat, `[repeats, scans, classes]`; zero where a scan was not held out.
        scored: The same, and slice weights, averaged over the repeats.
        fitted: The model of each fold.
        seconds: Time taken.
    """

    folds: NDArray[np.int64]
    by_repeat: NDArray[np.float64]
    scored: Scored
    fitted: tuple[FittedFold, ...]
    seconds: float


def cross_validate(
    bags: Bags,
    recipe: Recipe,
    evaluation: EvaluationConfig,
    *,
    folds: NDArray[np.int64] | None = None,
    progress: Progress = lambda done, total: None,
) -> CrossValidation:
    """Train one model (or ensemble) for each outer fold and score each scan with the one that never saw its subject.

    Args:
        bags: Labelled bags.
        recipe: Model, loss and training.
        evaluation: Kind and number of folds, and the seed.
        folds: The fold of each scan, `[scans]` or `[repeats, scans]`, where it is decided elsewhere.
        progress: Called with epochs done and the most there can be.

    Returns:
        Out-of-fold probabilities and slice weights, and the models.
    """
    started = time.monotonic()
    if folds is None:
        folds = partition(bags.scans, bags.labels.numpy(), bags.classes, evaluation)
    folds = np.atleast_2d(folds)
    count = int(folds.max()) + 1
    probabilities = np.zeros((len(folds), len(bags), len(bags.classes)))
    weights = np.zeros((len(folds), *bags.mask.shape))
    fitted = []
    for fold in range(count):
        repeat = int(np.flatnonzero((folds == fold).any(axis=1))[0])
        train = bags.take(np.flatnonzero(folds[repeat] != fold))
        held_out = np.flatnonzero(folds[repeat] == fold)
        done = fold * recipe.training.epochs
        fitted.append(
            fit_fold(
                train,
                recipe,
                seed=evaluation.seed * 1000 + fold,
                progress=lambda epoch, done=done: progress(done + epoch, count * recipe.training.epochs),  # type: ignore[misc]
            )
        )
        scored = fitted[-1].model.score(bags.take(held_out))
        probabilities[repeat, held_out], weights[repeat, held_out] = scored
        progress((fold + 1) * recipe.training.epochs, count * recipe.training.epochs)
    return CrossValidation(
        folds=folds,
        by_repeat=probabilities,
        scored=Scored(probabilities=probabilities.mean(axis=0), weights=weights.mean(axis=0)),
        fitted=tuple(fitted),
        seconds=time.monotonic() - started,
    )


def fit_fold(
    bags: Bags, recipe: Recipe, *, seed: int, progress: Callable[[int], None] = lambda epoch: None
) -> FittedFold:
    """Fit the members on the training scans of one outer fold.

    With pooling by deviation the model is solved in closed form. Otherwise member m is validated on inner fold m and
    trained on the others; its epoch is the one with the best validation figure. The scans that will be scored are
    not among `bags`.

    Args:
        bags: Training scans of one outer fold.
        recipe: Model, loss and training.
        seed: Decides initial weights, inner folds, batches and dropout.
        progress: Called after each epoch.
    """
    if recipe.model.pooling == "deviation":
        return FittedFold(model=fit_deviation_model(bags, seed=seed), history=[])
    training = recipe.training
    generator = torch.Generator().manual_seed(seed)
    inner = inner_folds(bags.labels.numpy(), bags.subjects, folds=training.inner_folds, seed=seed)
    validate = torch.from_numpy(np.stack([inner == m % (inner.max() + 1) for m in range(training.members)]))
    model = SliceAttentionNet(
        dim=bags.features.shape[-1],
        classes=len(bags.classes),
        members=training.members,
        config=recipe.model,
        generator=generator,
    )
    fitted_on = (~validate).any(dim=0)
    model.fit_scaling(bags.features[fitted_on], bags.mask[fitted_on])
    scaled = model.scaled(bags.features)
    class_weights = _class_weights(bags, ~validate) if recipe.loss.class_weights else None
    trained = model.embedding if training.trained == "embedding" else model
    optimiser = torch.optim.AdamW(trained.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    watch = _BestEpoch(model, training.members)
    history: list[dict[str, Any]] = []
    for epoch in range(training.epochs):
        model.train()
        total, batches = torch.zeros(training.members), 0
        for batch in _batches(torch.nonzero(fitted_on).squeeze(1), training.batch_size, generator):
            out = model(scaled[batch], bags.mask[batch], generator)
            terms = composite_loss(
                out.logits, out.embedding, bags.labels[batch], ~validate[:, batch], recipe.loss, class_weights
            )
            optimiser.zero_grad(set_to_none=True)
            terms.total.sum().backward()
            optimiser.step()
            total, batches = total + terms.total.detach(), batches + 1
        loss, accuracy = _validation(model, scaled, bags, validate, class_weights)
        # accuracy moves in steps; the loss decides between equal ones
        figure = loss if training.checkpoint == "loss" else -accuracy + 1e-4 * loss
        watch.see(epoch, figure)
        for member in range(training.members):
            history.append(
                {
                    "member": member,
                    "epoch": epoch,
                    "train_loss": float(total[member] / batches),
                    "validation_loss": float(loss[member]),
                    "validation_accuracy": float(accuracy[member]),
                }
            )
        progress(epoch + 1)
        if training.patience and epoch - int(watch.epoch.min()) >= training.patience:
            break
    watch.restore()
    for row in history:
        row["chosen"] = bool(watch.epoch[row["member"]] == row["epoch"])
    return FittedFold(model=model.eval(), history=history)


class _BestEpoch:
    """Keeps, for each member by itself, the parameters of its best epoch."""

    def __init__(self, model: SliceAttentionNet, members: int) -> None:
        self.model = model
        self.figure = torch.full((members,), float("inf"))
        self.epoch = torch.zeros(members, dtype=torch.long)
        self.parameters = [p.detach().clone() for p in model.parameters()]

    def see(self, epoch: int, figure: Tensor) -> None:
        better = figure < self.figure
        self.figure = torch.where(better, figure, self.figure)
        self.epoch[better] = epoch
        for kept, now in zip(self.parameters, self.model.parameters(), strict=True):
            kept[better] = now.detach()[better]

    def restore(self) -> None:
        with torch.no_grad():
            for kept, now in zip(self.parameters, self.model.parameters(), strict=True):
                now.copy_(kept)


def _validation(
    model: SliceAttentionNet, scaled: Tensor, bags: Bags, validate: Tensor, class_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Give cross-entropy and accuracy of each member on its own validation scans."""
    model.eval()
    with torch.no_grad():
        logits = model(scaled, bags.mask).logits
    loss = cross_entropy(logits, bags.labels, validate, class_weights)
    right = (logits.argmax(dim=-1) == bags.labels) & validate
    return loss, right.sum(dim=1) / validate.sum(dim=1)


def _class_weights(bags: Bags, include: Tensor) -> Tensor:
    """Inverse class frequency of each member's training scans, averaging one, `[members, classes]`."""
    classes = torch.arange(len(bags.classes))
    count = (include.unsqueeze(1) & (bags.labels == classes[:, None])).sum(dim=-1).clamp_min(1)
    return count.sum(dim=1, keepdim=True) / (len(classes) * count)


def _batches(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffle rows into batches of nearly equal size (no last batch of one)."""
    order = rows[torch.randperm(len(rows), generator=generator)]
    return iter(torch.tensor_split(order, max(1, round(len(rows) / size))))
