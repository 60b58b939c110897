"""Jobs side by side: their data stacked on one axis, the batches each draws for itself, and the best epoch of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from dinoatten3d.config import ModelConfig, Recipe
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.model import SliceAttention, SliceAttentionNet
from dinoatten3d.learning.splits import inner_folds


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model, with its members, to fit.

    Attributes:
        rows: Its training scans among the bags, `[train]`.
        labels: Their class index, `[train]`: the true one, or a shuffled one for a control.
        seed: Decides initial weights, inner folds, batches and dropout.
        validate: Scans that choose the epoch of each member, bool `[members, train]`, which it is not fitted on; None
            draws inner folds, stratified and by subject.
    """

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    seed: int
    validate: NDArray[np.bool_] | None = None


class Plan(NamedTuple):
    """A job made ready.

    Attributes:
        job: The job.
        model: Its untrained members, scaled.
        validate: Validation scans of each member, bool `[members, train]`.
        fitted_on: Rows that any member is fitted on.
        steps: Batches an epoch.
        generator: Its own random numbers.
    """

    job: Job
    model: SliceAttentionNet
    validate: Tensor
    fitted_on: Tensor
    steps: int
    generator: torch.Generator

    def batches(self, sampling: str) -> list[Tensor]:
        """Deal the rows of an epoch into batches of nearly equal size (no last batch of one)."""
        count = len(self.fitted_on)
        if sampling == "balanced":  # with replacement, each class as often
            labels = torch.from_numpy(self.job.labels)[self.fitted_on]
            chance = 1 / torch.bincount(labels)[labels]
            order = torch.multinomial(chance, count, replacement=True, generator=self.generator)
        else:
            order = torch.randperm(count, generator=self.generator)
        return list(torch.tensor_split(self.fitted_on[order], self.steps))


def plan_job(bags: Bags, job: Job, recipe: Recipe) -> Plan:
    """Draw inner folds and initial weights, and fit the scaling; member m is validated on inner fold m."""
    training = recipe.training
    generator = torch.Generator().manual_seed(job.seed)
    chosen = job.validate
    if chosen is None:
        inner = inner_folds(job.labels, bags.subjects[job.rows], folds=training.inner_folds, seed=job.seed)
        chosen = np.stack([inner == m % (inner.max() + 1) for m in range(training.members)])
    validate = torch.from_numpy(chosen)
    model = SliceAttentionNet(
        dim=bags.features.shape[-1],
        classes=len(bags.classes),
        members=training.members,
        config=recipe.model,
        generator=generator,
        planes=bags.planes,
    )
    fitted_on = torch.nonzero((~validate).any(dim=0)).squeeze(1)
    rows = torch.from_numpy(job.rows)[fitted_on]
    model.fit_scaling(bags.features[rows], bags.mask[rows])
    return Plan(job, model, validate, fitted_on, max(1, round(len(fitted_on) / training.batch_size)), generator)


class Stack(NamedTuple):
    """Data of jobs side by side, padded to the longest.

    Attributes:
        features: Scaled, `[jobs, train, slices, dim]`.
        mask: True at real slices, `[jobs, train, slices]`.
        labels: `[models, train]`.
        fit: Scans that a model is fitted on, bool `[models, train]`.
        validation: Rows of a model's validation scans, `[models, validation]`, -1 where padded.
        frequency: Share of each class among the scans that a model is fitted on, `[models, classes]`.
    """

    features: Tensor
    mask: Tensor
    labels: Tensor
    fit: Tensor
    validation: Tensor
    frequency: Tensor

    def models(self, jobs: Tensor) -> Tensor:
        """Give the models of these jobs, in order."""
        members = len(self.labels) // len(self.features)
        return (jobs.unsqueeze(1) * members + torch.arange(members)).flatten()

    def job_of(self, models: Tensor) -> Tensor:
        """Give the job of each model."""
        return models // (len(self.labels) // len(self.features))


def stack_jobs(bags: Bags, plans: Sequence[Plan], recipe: Recipe) -> Stack:
    """Copy, scale and pad what each job trains on."""
    members, rows = recipe.training.members, [torch.from_numpy(plan.job.rows) for plan in plans]
    labels = pad_sequence([torch.from_numpy(plan.job.labels) for plan in plans], batch_first=True)
    fit = pad_sequence([(~plan.validate).T for plan in plans], batch_first=True).transpose(1, 2).flatten(0, 1)
    of_model = labels.repeat_interleave(members, dim=0)
    return Stack(
        features=pad_sequence([p.model.scaled(bags.features[r]) for p, r in zip(plans, rows, strict=True)], True),
        mask=pad_sequence([bags.mask[r] for r in rows], batch_first=True, padding_value=True),
        labels=of_model,
        fit=fit,
        validation=pad_sequence(
            [torch.nonzero(v).squeeze(1) for plan in plans for v in plan.validate], batch_first=True, padding_value=-1
        ),
        frequency=_frequency(of_model, fit, len(bags.classes)),
    )


class Batch(NamedTuple):
    """A step of several jobs: rows `[jobs, scans]`, bags, and what is dropped for the step.

    Attributes:
        rows: `[jobs, scans]`; jobs with a shorter batch are padded.
        mask: Slices that take part, `[jobs, scans, slices]`.
        keep: Factor on the pooled features (dropout), `[models, scans, dim]`, or None.
        labels: `[models, scans]`.
        include: Scans that count, bool `[models, scans]`.
    """

    rows: Tensor
    mask: Tensor
    keep: Tensor | None
    labels: Tensor
    include: Tensor


def make_batch(
    stack: Stack, jobs: Tensor, rows: Sequence[Tensor], generators: Sequence[torch.Generator], config: ModelConfig
) -> Batch:
    """Put the batches of several jobs side by side; each job draws its dropout from its own generator."""
    models = stack.models(jobs)
    members, dim = len(models) // len(jobs), stack.features.shape[-1]
    padded = pad_sequence(list(rows), batch_first=True, padding_value=-1)
    real = (padded >= 0).repeat_interleave(members, dim=0)
    padded = padded.clamp_min(0)
    of_model = padded.repeat_interleave(members, dim=0)
    mask, keep = stack.mask[jobs.unsqueeze(1), padded], None
    if config.slice_dropout:
        drawn = [torch.rand((len(r), mask.shape[-1]), generator=g) for r, g in zip(rows, generators, strict=True)]
        kept = mask & (pad_sequence(drawn, batch_first=True) >= config.slice_dropout)
        mask = torch.where(kept.any(dim=-1, keepdim=True), kept, mask)
    if config.dropout:
        drawn = [torch.rand((members, len(r), dim), generator=g) for r, g in zip(rows, generators, strict=True)]
        by_scan = pad_sequence([d.transpose(0, 1) for d in drawn], batch_first=True)
        keep = (by_scan.transpose(1, 2).flatten(0, 1) < 1 - config.dropout) / (1 - config.dropout)
    return Batch(
        rows=padded,
        mask=mask,
        keep=keep,
        labels=stack.labels[models].gather(1, of_model),
        include=stack.fit[models].gather(1, of_model) & real,
    )


def pool_rows(attention: SliceAttention, stack: Stack, models: Tensor, rows: Tensor) -> Tensor:
    """Pool other scans for each model, without gradient, a few models at a time, `[models, scans, dim]`.

    Args:
        attention: Of these models.
        stack: The data.
        models: Which models of the stack, `[models]`.
        rows: Scans of each, `[models, scans]`; -1 where padded.
    """
    parameters, job, rows = dict(attention.named_parameters()), stack.job_of(models), rows.clamp_min(0)
    pooled = []
    with torch.no_grad():
        for n in range(len(models)):
            features, mask = stack.features[job[n], rows[n]], stack.mask[job[n], rows[n]]
            own = {name: parameter[n : n + 1] for name, parameter in parameters.items()}
            pooled.append(functional_call(attention, own, (features.unsqueeze(0), mask.unsqueeze(0))).feature)
    return torch.cat(pooled)


class BestEpoch:
    """Keeps, for each model by itself, the parameters and validation logits of its best epoch."""

    def __init__(self, net: SliceAttentionNet, stack: Stack) -> None:
        count, scans = stack.validation.shape
        self.figure = torch.full((count,), float("inf"))
        self.epoch = torch.zeros(count, dtype=torch.long)
        self.parameters = [p.detach().clone() for p in net.parameters()]
        self.logits = torch.zeros(count, scans, net.classifier.bias.shape[1])

    def see(self, epoch: int, models: Tensor, figure: Tensor, net: SliceAttentionNet, logits: Tensor) -> None:
        """Look at an epoch of these models."""
        better = figure < self.figure[models]
        chosen = models[better]
        self.figure[chosen], self.epoch[chosen], self.logits[chosen] = figure[better], epoch, logits[better]
        for kept, now in zip(self.parameters, net.parameters(), strict=True):
            kept[chosen] = now.detach()[better]


def inner_probabilities(plan: Plan, validation: Tensor, logits: Tensor) -> NDArray[np.float64]:
    """Average, for each training scan, the probabilities of the members that it validated, `[train, classes]`."""
    total = torch.zeros(len(plan.job.rows), logits.shape[-1], dtype=torch.float64)
    for rows, own in zip(validation, torch.softmax(logits.double(), dim=-1), strict=True):
        total[rows[rows >= 0]] += own[rows >= 0]
    return np.asarray((total / plan.validate.sum(dim=0).unsqueeze(1)).numpy())  # 0 / 0 is NaN: never validated


def _frequency(labels: Tensor, include: Tensor, classes: int) -> Tensor:
    """Share of each class among each model's scans; an absent class counts as one scan, `[models, classes]`."""
    of_class = labels.unsqueeze(1) == torch.arange(classes)[:, None]
    count = (include.unsqueeze(1) & of_class).sum(dim=-1).clamp_min(1)
    return count / count.sum(dim=1, keepdim=True)
