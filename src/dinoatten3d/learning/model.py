"""Slice attention and the head on top of it, for one model or several side by side.

Every parameter has a leading axis of members: an ensemble trains as one batched computation, and a single model is
an ensemble of one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from dinoatten3d.config import ModelConfig
from dinoatten3d.learning.bags import Bags


class Pooled(NamedTuple):
    """A bag as one feature, `[members, scans, dim]`, and the slice weights that made it, `[members, scans, slices]`."""

    feature: Tensor
    weights: Tensor


class Output(NamedTuple):
    """What the model says: logits `[members, scans, classes]`, embedding `[members, scans, dim]`, slice weights."""

    logits: Tensor
    embedding: Tensor
    weights: Tensor


def attend(
    features: Float[Tensor, "scans slices dim"],
    scores: Float[Tensor, "members scans slices"],
    mask: Bool[Tensor, "scans slices"],
) -> Pooled:
    """Pool slices with the softmax of their scores (Rafsani et al. 2025, slice attention); padding weighs nothing."""
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return Pooled(torch.einsum("mns,nsd->mnd", weights, features), weights)


class MemberLinear(nn.Module):
    """A linear layer for each member: weight `[members, in, out]`, bias `[members, out]`."""

    def __init__(self, members: int, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = inputs**-0.5  # as torch.nn.Linear
        self.weight = nn.Parameter(_uniform((members, inputs, outputs), bound, generator))
        self.bias = nn.Parameter(_uniform((members, outputs), bound, generator))

    def forward(self, x: Float[Tensor, "members scans inputs"]) -> Float[Tensor, "members scans outputs"]:
        """Apply each member's layer to its own input."""
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight)


class SliceAttention(nn.Module):
    """Score of a slice: Linear(dim, width), tanh, Linear(width, 1)."""

    def __init__(self, members: int, dim: int, width: int, *, uniform: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden = MemberLinear(members, dim, width, generator)
        self.score = MemberLinear(members, width, 1, generator)
        if uniform:
            nn.init.zeros_(self.score.weight)
            nn.init.zeros_(self.score.bias)

    def forward(self, features: Float[Tensor, "scans slices dim"], mask: Bool[Tensor, "scans slices"]) -> Pooled:
        """Pool every bag."""
        members = self.hidden.weight.shape[0]
        scans, slices, dim = features.shape
        flat = features.reshape(1, scans * slices, dim).expand(members, -1, -1)
        scores = self.score(torch.tanh(self.hidden(flat))).reshape(members, scans, slices)
        return attend(features, scores, mask)


class EmbeddingHead(nn.Module):
    """Linear layers with ReLU between them, and after the last one where the recipe says so."""

    def __init__(self, members: int, dim: int, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        widths = (dim, *config.hidden)
        self.layers = nn.ModuleList(MemberLinear(members, a, b, generator) for a, b in pairwise(widths))
        self.relu_last = config.relu_embedding
        self.width = widths[-1]

    def forward(self, x: Float[Tensor, "members scans dim"]) -> Float[Tensor, "members scans width"]:
        """Embed pooled features."""
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x)
            if number < len(self.layers) or self.relu_last:
                x = torch.relu(x)
        return x


class SliceAttentionNet(nn.Module):
    """Scaling, slice attention, embedding head and linear classifier; `fit_scaling` is called once, before training."""

    mean: Tensor
    scale: Tensor

    def __init__(
        self, *, dim: int, classes: int, members: int, config: ModelConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        uniform = config.attention_start == "uniform"
        self.attention = SliceAttention(members, dim, config.attention_width, uniform=uniform, generator=generator)
        self.embedding = EmbeddingHead(members, dim, config, generator)
        self.classifier = MemberLinear(members, self.embedding.width, classes, generator)

    def fit_scaling(self, features: Float[Tensor, "scans slices dim"], mask: Bool[Tensor, "scans slices"]) -> None:
        """Centre and scale by the mean-pooled training scans.

        Slices of one brain differ far more than the same slice of two people. Scaled by the spread of all slices,
        what tells people apart is lost among small numbers (docs/log.md); scaled by the spread of people it is not.
        """
        if not self.config.standardise:
            return
        real = mask.unsqueeze(-1)
        pooled = (features * real).sum(dim=1) / real.sum(dim=1)
        self.mean, self.scale = pooled.mean(dim=0), pooled.std(dim=0).clamp_min(1e-6)

    def scaled(self, features: Float[Tensor, "scans slices dim"]) -> Float[Tensor, "scans slices dim"]:
        """Apply the fixed scaling."""
        return (features - self.mean) / self.scale if self.config.standardise else features

    def forward(
        self,
        scaled: Float[Tensor, "scans slices dim"],
        mask: Bool[Tensor, "scans slices"],
        generator: torch.Generator | None = None,
    ) -> Output:
        """Classify bags of scaled features; with a generator and in training mode, with dropout."""
        if self.training and self.config.slice_dropout and generator is not None:
            kept = mask & (torch.rand(mask.shape, generator=generator) >= self.config.slice_dropout)
            mask = torch.where(kept.any(dim=1, keepdim=True), kept, mask)
        pooled = self.attention(scaled, mask)
        x = pooled.feature
        if self.training and self.config.dropout and generator is not None:
            keep = 1 - self.config.dropout
            x = x * (torch.rand(x.shape, generator=generator) < keep) / keep
        embedding = self.embedding(x)
        return Output(self.classifier(embedding), embedding, pooled.weights)

    def score(self, bags: Bags) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Give probabilities `[scans, classes]` and slice weights `[scans, slices]`, averaged over the members."""
        self.eval()
        with torch.no_grad():
            out = self(self.scaled(bags.features), bags.mask)
        probabilities = torch.softmax(out.logits.double(), dim=-1).mean(dim=0).numpy()
        return probabilities, out.weights.double().mean(dim=0).numpy()

    def patch_maps(self, bags: Bags) -> None:
        """Give nothing: this model sees slices, not patches."""

    def notes(self) -> list[str]:
        """Nothing to say."""
        return []

    def tensors(self) -> dict[str, Tensor]:
        """Give parameters and scaling, for safetensors."""
        return {name: tensor.contiguous() for name, tensor in self.state_dict().items()}


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound
