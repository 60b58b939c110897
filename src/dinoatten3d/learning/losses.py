"""The composite loss as pure functions of one batch, with a leading axis of models.

`include` says which scans count for which model, `[models, scans]`: the members of a job train on different inner
folds of the same batch. Labels are `[models, scans]` too, or `[1, scans]` where all models share them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from dinoatten3d.config import LossConfig


class LossTerms(NamedTuple):
    """The total and its unweighted terms, each `[models]`."""

    total: Tensor
    cross_entropy: Tensor
    supcon: Tensor
    variance: Tensor


def composite_loss(
    logits: Float[Tensor, "models scans classes"],
    embedding: Float[Tensor, "models scans dim"],
    labels: Int[Tensor, "#models scans"],
    include: Bool[Tensor, "models scans"],
    config: LossConfig,
    frequency: Float[Tensor, "models classes"] | None = None,
) -> LossTerms:
    """Cross-entropy + supcon weight x SupCon + variance weight x within-class variance (Rafsani et al. 2025).

    Args:
        logits: What the models say.
        embedding: What they say it from.
        labels: Class index.
        include: Scans that count.
        config: Weights and variants.
        frequency: Share of each class among the scans that a model is fitted on; None: all alike, nothing to mend.
    """
    ce = classification_loss(logits, labels, include, config, frequency)
    zero = torch.zeros_like(ce)
    contrast = supcon(embedding, labels, include, config.temperature, config.lonely_anchors) if config.supcon else zero
    spread = within_class_variance(embedding, labels, include, config.variance_scale) if config.variance else zero
    return LossTerms(ce + config.supcon * contrast + config.variance * spread, ce, contrast, spread)


def classification_loss(
    logits: Float[Tensor, "models scans classes"],
    labels: Int[Tensor, "#models scans"],
    include: Bool[Tensor, "models scans"],
    config: LossConfig,
    frequency: Float[Tensor, "models classes"] | None = None,
) -> Float[Tensor, " models"]:
    """Cross-entropy in the recipe's variant.

    Logit adjustment (Menon et al. 2021, equation 10, tau = 1) adds the log-frequency of the classes in training only:
    what the model says later is for classes that come as often.
    """
    gamma = float(config.focal_gamma) if config.classification == "focal" else 0.0
    if frequency is None:
        return cross_entropy(logits, labels, include, gamma=gamma)
    if config.classification == "logit_adjusted":
        return cross_entropy(logits + frequency.log().unsqueeze(1), labels, include)
    return cross_entropy(logits, labels, include, balanced(frequency) if config.class_weights else None, gamma)


def balanced(frequency: Float[Tensor, "models classes"]) -> Float[Tensor, "models classes"]:
    """Weigh each class so that all have the same share, one on average over scans."""
    return 1 / (frequency.shape[1] * frequency)


def cross_entropy(
    logits: Float[Tensor, "models scans classes"],
    labels: Int[Tensor, "#models scans"],
    include: Bool[Tensor, "models scans"],
    class_weights: Float[Tensor, "models classes"] | None = None,
    gamma: float = 0.0,
) -> Float[Tensor, " models"]:
    """Mean negative log-probability of the true class, weighted by class where weights are given.

    With `gamma` (focal loss, Lin et al. 2017) each scan also counts by (1 - p) ** gamma, p being the probability of
    its true class.
    """
    log_p = functional.log_softmax(logits, dim=-1)
    true = log_p.gather(-1, labels.expand(len(logits), -1).unsqueeze(-1)).squeeze(-1)
    weight = include.to(true.dtype) if class_weights is None else include * _of_class(class_weights, labels)
    loss = true * (1 - true.exp()) ** gamma if gamma else true
    return -(weight * loss).sum(dim=1) / weight.sum(dim=1).clamp_min(1e-12)


def supcon(
    embedding: Float[Tensor, "models scans dim"],
    labels: Int[Tensor, "#models scans"],
    include: Bool[Tensor, "models scans"],
    temperature: float,
    lonely_anchors: str = "drop",
) -> Float[Tensor, " models"]:
    """Supervised contrastive loss on L2-normalised embeddings (Khosla et al. 2020, L_out).

    An anchor without a positive is left out of the mean (`drop`), or counts as zero (`zero`, as published).
    """
    z = functional.normalize(embedding, dim=-1)
    similarity = z @ z.transpose(1, 2) / temperature
    others = ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device) & include.unsqueeze(1)
    log_p = similarity - torch.logsumexp(similarity.masked_fill(~others, float("-inf")), dim=-1, keepdim=True)
    positives = others & (labels.unsqueeze(1) == labels.unsqueeze(2))
    count = positives.sum(dim=-1)
    per_anchor = -torch.where(positives, log_p, 0.0).sum(dim=-1) / count.clamp_min(1)
    anchors = include if lonely_anchors == "zero" else include & (count > 0)
    return torch.where(anchors & (count > 0), per_anchor, 0.0).sum(dim=1) / anchors.sum(dim=1).clamp_min(1)


def within_class_variance(
    embedding: Float[Tensor, "models scans dim"],
    labels: Int[Tensor, "#models scans"],
    include: Bool[Tensor, "models scans"],
    scale: str = "sum",
) -> Float[Tensor, " models"]:
    """Squared distance of the L2-normalised embeddings to their class mean, averaged within and then over classes.

    `mean` also averages over the embedding's dimensions, as published, which makes the term too small to act.
    """
    z = functional.normalize(embedding, dim=-1)
    classes = torch.arange(int(labels.max()) + 1, device=labels.device)
    member_of = (labels.unsqueeze(1) == classes[:, None]) & include.unsqueeze(1)  # [models, classes, scans]
    weight = member_of.to(z.dtype)
    count = weight.sum(dim=-1)
    centre = (weight @ z) / count.clamp_min(1).unsqueeze(-1)
    spread = (weight * (z.unsqueeze(1) - centre.unsqueeze(2)).square().sum(dim=-1)).sum(dim=-1) / count.clamp_min(1)
    if scale == "mean":
        spread = spread / z.shape[-1]
    return spread.sum(dim=1) / (count > 0).sum(dim=1).clamp_min(1)


def _of_class(value: Tensor, labels: Tensor) -> Tensor:
    """Look up a value of each class, `[models, classes]`, at each scan, `[models, scans]`."""
    return value.gather(1, labels.expand(len(value), -1))
