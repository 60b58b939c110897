"""Slice attention and the head on top of it, for one model or several side by side.

Every parameter has a leading axis of models, and bags have a leading axis of jobs: the models of one job (its members)
see the same bags, those of another job have bags of their own. Many small models so train as one batched
computation; a single model is one member of one job.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from dinoatten3d.config import ModelConfig, Plane
from dinoatten3d.data.slices import stacks
from dinoatten3d.learning.bags import Bags, Look


class Pooled(NamedTuple):
    """A bag as one feature, `[models, scans, dim]`, and the slice weights that made it, `[models, scans, slices]`."""

    feature: Tensor
    weights: Tensor


class Answer(NamedTuple):
    """Logits `[models, scans, classes]` and the embedding they come from, `[models, scans, dim]`."""

    logits: Tensor
    embedding: Tensor


class Output(NamedTuple):
    """What the model says: logits, embedding, and slice weights `[models, scans, slices]`."""

    logits: Tensor
    embedding: Tensor
    weights: Tensor


def attend(
    features: Float[Tensor, "jobs scans slices dim"],
    scores: Float[Tensor, "models scans slices"],
    mask: Bool[Tensor, "jobs scans slices"],
) -> Pooled:
    """Pool slices with the softmax of their scores (Rafsani et al. 2025, slice attention); padding weighs nothing."""
    jobs, scans, slices, dim = features.shape
    by_job = scores.reshape(jobs, -1, scans, slices)
    weights = torch.softmax(by_job.masked_fill(~mask.unsqueeze(1), float("-inf")), dim=-1)
    by_scan = weights.transpose(1, 2).reshape(jobs * scans, -1, slices)
    pooled = torch.bmm(by_scan, features.reshape(jobs * scans, slices, dim)).reshape(jobs, scans, -1, dim)
    return Pooled(pooled.transpose(1, 2).reshape(-1, scans, dim), weights.reshape(-1, scans, slices))


class MemberLinear(nn.Module):
    """A linear layer for each model: weight `[models, in, out]`, bias `[models, out]`."""

    def __init__(self, members: int, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = inputs**-0.5  # as torch.nn.Linear
        self.weight = nn.Parameter(_uniform((members, inputs, outputs), bound, generator))
        self.bias = nn.Parameter(_uniform((members, outputs), bound, generator))

    def forward(self, x: Float[Tensor, "models scans inputs"]) -> Float[Tensor, "models scans outputs"]:
        """Apply each model's layer to its own input."""
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight)


class SliceAttention(nn.Module):
    """Score of a slice: Linear(dim, width), tanh, Linear(width, 1).

    With several planes, an embedding of the slice's plane is added before the tanh.
    """

    which: Tensor

    def __init__(
        self,
        members: int,
        dim: int,
        width: int,
        *,
        uniform: bool,
        planes: Sequence[Plane],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        names = list(stacks(planes))
        self.several = len(names) > 1
        if self.several:
            self.register_buffer("which", torch.tensor([names.index(plane) for plane in planes]))
            self.plane = nn.Parameter(torch.zeros(members, len(names), width))
        self.hidden = MemberLinear(members, dim, width, generator)
        self.score = MemberLinear(members, width, 1, generator)
        if uniform:
            nn.init.zeros_(self.score.weight)
            nn.init.zeros_(self.score.bias)

    def forward(
        self, features: Float[Tensor, "jobs scans slices dim"], mask: Bool[Tensor, "jobs scans slices"]
    ) -> Pooled:
        """Pool every bag with every model of its job."""
        jobs, scans, slices, dim = features.shape
        models, _, width = self.hidden.weight.shape
        # one product a job, with the models of a job side by side; slices run along the last axis throughout
        weight = self.hidden.weight.transpose(1, 2).reshape(jobs, -1, dim)
        bias = self.hidden.bias.reshape(jobs, -1, 1)
        hidden = torch.baddbmm(bias, weight, features.reshape(jobs, scans * slices, dim).transpose(1, 2))
        hidden = hidden.reshape(models, width, scans * slices)
        if self.several:
            hidden = hidden + self.plane[:, self.which].transpose(1, 2).repeat(1, 1, scans)
        hidden = torch.tanh(hidden)
        scores = torch.baddbmm(self.score.bias.unsqueeze(1), self.score.weight.transpose(1, 2), hidden)
        return attend(features, scores.reshape(models, scans, slices), mask)


class EmbeddingHead(nn.Module):
    """Linear layers with ReLU between them, and after the last one where the recipe says so."""

    def __init__(self, members: int, dim: int, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        widths = (dim, *config.hidden)
        self.layers = nn.ModuleList(MemberLinear(members, a, b, generator) for a, b in pairwise(widths))
        self.relu_last = config.relu_embedding
        self.width = widths[-1]

    def forward(self, x: Float[Tensor, "models scans dim"]) -> Float[Tensor, "models scans width"]:
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
        self,
        *,
        dim: int,
        classes: int,
        members: int,
        config: ModelConfig,
        generator: torch.Generator,
        planes: Sequence[Plane] = (),
    ) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        uniform = config.attention_start == "uniform"
        self.attention = SliceAttention(
            members, dim, config.attention_width, uniform=uniform, planes=planes, generator=generator
        )
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
        self, scaled: Float[Tensor, "jobs scans slices dim"], mask: Bool[Tensor, "jobs scans slices"]
    ) -> Output:
        """Classify bags of scaled features, without dropout."""
        pooled = self.attention(scaled, mask)
        return Output(*self.answer(pooled.feature), pooled.weights)

    def answer(self, pooled: Float[Tensor, "models scans dim"]) -> Answer:
        """Classify pooled bags."""
        embedding = self.embedding(pooled)
        return Answer(self.classifier(embedding), embedding)

    def score(self, bags: Bags) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Give probabilities `[scans, classes]` and slice weights `[scans, slices]`, averaged over the members."""
        with torch.no_grad():
            scaled = self.scaled(bags.slice_features(self.config.slice_features))
            out = self(scaled.unsqueeze(0), bags.mask.unsqueeze(0))
        probabilities = torch.softmax(out.logits.double(), dim=-1).mean(dim=0).numpy()
        return probabilities, out.weights.double().mean(dim=0).numpy()

    def look(self, bags: Bags) -> Look:
        """Give the same; this model sees slices, not patches."""
        return Look(*self.score(bags))

    def notes(self) -> list[str]:
        """Nothing to say."""
        return []

    def tensors(self) -> dict[str, Tensor]:
        """Give parameters and scaling, for safetensors."""
        return {name: tensor.contiguous() for name, tensor in self.state_dict().items()}


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound
