"""Many small models trained side by side: folds, repeats and shuffled labels as one batched computation.

Jobs that take as many steps an epoch are stacked on the model axis and trained together. Each has its own random
numbers, batches, scaling and best epochs, so that its answer does not depend on which jobs run beside it. A job
that has stopped leaves the stack.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoatten3d.config import Recipe
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.losses import balanced, composite_loss, cross_entropy
from dinoatten3d.learning.model import SliceAttentionNet
from dinoatten3d.learning.stack import (
    BestEpoch,
    Job,
    Plan,
    Stack,
    inner_probabilities,
    make_batch,
    plan_job,
    pool_rows,
    stack_jobs,
)

STACK_BYTES = 2**28
"""Scaled features that are held at a time; a stack has at least one job."""


class Trained(NamedTuple):
    """A trained model, a row of history for each member and epoch, and inner probabilities `[train, classes]`."""

    model: SliceAttentionNet
    history: list[dict[str, Any]]
    inner: NDArray[np.float64]


class _Validation(NamedTuple):
    """Logits `[models, validation, classes]`, cross-entropy and accuracy `[models]` on a model's own scans."""

    logits: Tensor
    loss: Tensor
    accuracy: Tensor


def train_jobs(
    bags: Bags, jobs: Sequence[Job], recipe: Recipe, *, progress: Callable[[int, int], None]
) -> list[Trained]:
    """Train every job; the figures are those of each job trained alone.

    Args:
        bags: What the jobs' rows point into.
        jobs: What to train.
        recipe: Model, loss and training, of all jobs.
        progress: Called with epochs done and the most there can be, over all jobs.
    """
    bags = replace(bags, features=bags.slice_features(recipe.model.slice_features))
    plans = [plan_job(bags, job, recipe) for job in jobs]
    trained: dict[int, Trained] = {}
    epochs = recipe.training.epochs
    for stack in _stacks(plans, bags):
        before = len(trained) * epochs
        answers = _train_stack(
            bags,
            [plans[n] for n in stack],
            recipe,
            lambda done, before=before: progress(before + done, len(jobs) * epochs),  # type: ignore[misc]
        )
        trained |= dict(zip(stack, answers, strict=True))
    return [trained[n] for n in range(len(jobs))]


def _stacks(plans: Sequence[Plan], bags: Bags) -> list[list[int]]:
    """Group jobs of as many steps an epoch, as many at a time as memory allows."""
    order = sorted(range(len(plans)), key=lambda n: plans[n].steps)
    stacks = []
    for _, group in groupby(order, key=lambda n: plans[n].steps):
        same = list(group)
        longest = max(len(plans[n].job.rows) for n in same)
        size = max(1, STACK_BYTES // (longest * bags.features[0].nbytes))
        stacks += [same[start : start + size] for start in range(0, len(same), size)]
    return stacks


def _train_stack(bags: Bags, plans: Sequence[Plan], recipe: Recipe, progress: Callable[[int], None]) -> list[Trained]:
    """Train jobs of as many steps an epoch together."""
    training = recipe.training
    stack, net = stack_jobs(bags, plans, recipe), _side_by_side([plan.model for plan in plans])
    frozen = training.trained == "embedding"
    everyone, everything = torch.arange(len(stack.labels)), torch.arange(stack.labels.shape[1])
    # an attention that stays as it is pools every scan once
    pooled = pool_rows(net.attention, stack, everyone, everything.expand(len(everyone), -1)) if frozen else None
    trained = net.embedding if frozen else net
    optimiser = torch.optim.AdamW(
        trained.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )
    watch = BestEpoch(net, stack)
    history: list[list[dict[str, Any]]] = [[] for _ in plans]
    jobs = torch.arange(len(plans))
    for epoch in range(training.epochs):
        loss = _epoch(net, optimiser, stack, pooled, [plans[job] for job in jobs], jobs, recipe)
        models = stack.models(jobs)
        found = _validate(net, stack, pooled, models, recipe)
        # accuracy moves in steps; the loss decides between equal ones
        figure = found.loss if training.checkpoint == "loss" else -found.accuracy + 1e-4 * found.loss
        watch.see(epoch, models, figure, net, found.logits)
        for n, model in enumerate(models.tolist()):
            history[model // training.members].append(
                {
                    "member": model % training.members,
                    "epoch": epoch,
                    "train_loss": float(loss[n]),
                    "validation_loss": float(found.loss[n]),
                    "validation_accuracy": float(found.accuracy[n]),
                }
            )
        if training.patience:
            going = epoch - watch.epoch[models].reshape(len(jobs), -1).amin(dim=1) < training.patience
            jobs = jobs[going]
            _keep(net, optimiser, going.repeat_interleave(training.members))
        progress(len(jobs) * (epoch + 1) + (len(plans) - len(jobs)) * training.epochs)
        if not len(jobs):
            break
    return _unstack(plans, stack, watch, history)


def _epoch(
    net: SliceAttentionNet,
    optimiser: torch.optim.Optimizer,
    stack: Stack,
    pooled: Tensor | None,
    plans: Sequence[Plan],
    jobs: Tensor,
    recipe: Recipe,
) -> Tensor:
    """Take one pass over every job's scans; gives the mean training loss, `[models]`."""
    models = stack.models(jobs)
    frequency = None if recipe.training.sampling == "balanced" else stack.frequency[models]
    generators = [plan.generator for plan in plans]
    total = torch.zeros(len(models))
    for rows in zip(*(plan.batches(recipe.training.sampling) for plan in plans), strict=True):
        batch = make_batch(stack, jobs, rows, generators, recipe.model)
        if pooled is None:
            x = net.attention(stack.features[jobs.unsqueeze(1), batch.rows], batch.mask).feature
        else:
            x = pooled[models.unsqueeze(1), batch.rows.repeat_interleave(len(models) // len(jobs), dim=0)]
        logits, embedding = net.answer(x if batch.keep is None else x * batch.keep)
        terms = composite_loss(logits, embedding, batch.labels, batch.include, recipe.loss, frequency)
        optimiser.zero_grad(set_to_none=True)
        terms.total.sum().backward()
        optimiser.step()
        total += terms.total.detach()
    return total / plans[0].steps


def _validate(
    net: SliceAttentionNet, stack: Stack, pooled: Tensor | None, models: Tensor, recipe: Recipe
) -> _Validation:
    """Answer each model's own validation scans; a recipe that mends imbalance is judged with all classes alike."""
    rows, real = stack.validation[models].clamp_min(0), stack.validation[models] >= 0
    with torch.no_grad():
        x = pool_rows(net.attention, stack, models, rows) if pooled is None else pooled[models.unsqueeze(1), rows]
        logits = net.answer(x).logits
    labels = stack.labels[models].gather(1, rows)
    mends = recipe.loss.class_weights or recipe.loss.classification == "logit_adjusted"
    mends = mends or recipe.training.sampling == "balanced"
    weights = balanced(stack.frequency[models]) if mends else None
    right = (logits.argmax(dim=-1) == labels) & real
    return _Validation(logits, cross_entropy(logits, labels, real, weights), right.sum(dim=1) / real.sum(dim=1))


def _side_by_side(nets: Sequence[SliceAttentionNet]) -> SliceAttentionNet:
    """Stack the members of several networks on the model axis; the features are scaled elsewhere."""
    net = copy.deepcopy(nets[0])
    for stacked, *single in zip(net.parameters(), *(n.parameters() for n in nets), strict=True):
        stacked.data = torch.cat([p.data for p in single])
    return net


def _keep(net: SliceAttentionNet, optimiser: torch.optim.Optimizer, going: Tensor) -> None:
    """Let the models that have stopped leave, with what the optimiser remembers of them."""
    if going.all():
        return
    for parameter in net.parameters():
        parameter.data = parameter.data[going]
        parameter.grad = None
        for name, value in optimiser.state[parameter].items():
            if value.dim():  # the count of steps is common to all
                optimiser.state[parameter][name] = value[going]


def _unstack(
    plans: Sequence[Plan], stack: Stack, watch: BestEpoch, history: list[list[dict[str, Any]]]
) -> list[Trained]:
    """Give each job its members at their best epochs."""
    trained = []
    for number, (plan, rows) in enumerate(zip(plans, history, strict=True)):
        models = stack.models(torch.tensor([number]))
        with torch.no_grad():
            for own, best in zip(plan.model.parameters(), watch.parameters, strict=True):
                own.copy_(best[models])
        for row in rows:
            row["chosen"] = bool(watch.epoch[models[row["member"]]] == row["epoch"])
        inner = inner_probabilities(plan, stack.validation[models], watch.logits[models])
        trained.append(Trained(plan.model.eval(), rows, inner))
    return trained
