"""Train LoRA matrices, slice attention and head together, from the tokens that the frozen blocks left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinoatten3d.config import Recipe
from dinoatten3d.learning.adapter import adapter_tensors, embed_entries, set_adapter_tensors
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.losses import balanced, composite_loss, cross_entropy
from dinoatten3d.learning.model import Output, SliceAttentionNet

LARGEST_GRADIENT = 1.0
"""The gradient's norm is clipped here, as is usual for transformers."""
Entries = NDArray[np.float16]
"""Tokens of all scans at the entry of the blocks that are adapted, `[scans, slices, tokens, dim]`."""


@dataclass(frozen=True, kw_only=True)
class Entered:
    """Bags and the rows of `entries` that hold their tokens."""

    bags: Bags
    entries: Entries
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: NDArray[np.int64]) -> Entered:
        """Keep the scans at these indices, in this order."""
        return Entered(bags=self.bags.take(index), entries=self.entries, rows=self.rows[index])

    def embed(self, upper: nn.Module) -> Tensor:
        """Give the CLS tokens under these blocks, `[scans, slices, dim]`."""
        return embed_entries(upper, (self.entries[row] for row in self.rows))


class AdaptedNet(nn.Module):
    """Last blocks, slice attention and head as one module."""

    def __init__(self, upper: nn.Module, head: SliceAttentionNet, accumulation: int) -> None:
        super().__init__()
        self.upper = upper
        self.head = head
        self.accumulation = accumulation

    def forward(
        self,
        entries: Float[Tensor, "scans slices tokens dim"],
        mask: Bool[Tensor, "scans slices"],
        generator: torch.Generator,
    ) -> Output:
        """Classify a batch of scans.

        In several parts, each is run again in the backward pass instead of keeping what it computed (Gao et al. 2021):
        unlike a sum of the parts' own losses, that leaves a loss that compares scans with each other as it is.
        """
        parts = entries.flatten(0, 1).chunk(self.accumulation)
        if self.accumulation > 1:
            cls = torch.cat([checkpoint(self.upper, part.float(), use_reentrant=False) for part in parts])
        else:
            cls = self.upper(parts[0].float())
        with torch.autocast(cls.device.type, enabled=False):  # the head is small and stays exact
            features = self.head.scaled(cls.float().unflatten(0, entries.shape[:2]))
            return _answer(self.head, features, mask, generator)


def train_end_to_end(
    net: AdaptedNet,
    fit: Entered,
    check: Entered,
    recipe: Recipe,
    *,
    seed: int,
    accelerator: Any,
    progress: Callable[[int], None] = lambda epoch: None,
) -> list[dict[str, Any]]:
    """Train in place and go back to the best epoch; epoch 0 is the net as it came.

    Args:
        net: On the accelerator's device.
        fit: Scans to learn from.
        check: Scans that choose the epoch.
        recipe: Loss, training and adaptation.
        seed: Decides batches, slices and dropout.
        accelerator: What accelerate knows of devices and processes.
        progress: Called after each epoch.

    Returns:
        One row an epoch.
    """
    counts = torch.bincount(fit.bags.labels, minlength=len(fit.bags.classes)).clamp_min(1)
    frequency = (counts / counts.sum())[None].to(accelerator.device)
    steps = max(1, round(len(fit) / (recipe.lora.batch_size * accelerator.num_processes)))
    optimiser = _optimiser(net, recipe)
    # Adam's first steps are as long as any, however small the gradient: over the first epoch they grow
    rise = torch.optim.lr_scheduler.LinearLR(optimiser, start_factor=1 / (steps + 1), total_iters=steps)
    model, optimiser = accelerator.prepare(net, optimiser)
    draw = torch.Generator().manual_seed(seed)  # every process draws the same batches and takes its share of each
    dropout = torch.Generator(accelerator.device).manual_seed(seed + accelerator.process_index)
    history: list[dict[str, Any]] = []
    best, lowest, kept = 0, float("inf"), _keep(net)
    for epoch in range(recipe.lora.epochs + 1):
        row: dict[str, Any] = {"member": 0, "epoch": epoch}
        if epoch:
            row["train_loss"] = _epoch(
                model, optimiser, rise, fit, steps, recipe, frequency, draw, dropout, accelerator
            )
        seen = _validate(net, check, recipe, frequency, accelerator)
        # accuracy moves in steps; the loss decides between equal ones
        figure = seen.loss if recipe.training.checkpoint == "loss" else -seen.accuracy + 1e-4 * seen.loss
        if figure < lowest:
            best, lowest, kept = epoch, figure, _keep(net)
        history.append(row | {"validation_loss": seen.loss, "validation_accuracy": seen.accuracy})
        progress(epoch)
        if recipe.lora.patience and epoch - best >= recipe.lora.patience:
            break
    set_adapter_tensors(net.upper, kept.adapter)
    net.head.load_state_dict(kept.head)
    return [{**row, "chosen": row["epoch"] == best} for row in history]


def draw_slices(
    mask: Bool[Tensor, "scans slices"], count: int, generator: torch.Generator
) -> Int[Tensor, "scans drawn"]:
    """Draw `count` real slices of each scan, in their order; with 0 all, the padding too."""
    if not count or count >= mask.shape[1]:
        return torch.arange(mask.shape[1]).repeat(len(mask), 1)
    chance = torch.rand(mask.shape, generator=generator).masked_fill(~mask, -1.0)
    return chance.topk(count, dim=1).indices.sort(dim=1).values


def _optimiser(net: AdaptedNet, recipe: Recipe) -> torch.optim.Optimizer:
    """Give AdamW over the matrices and over what the recipe trains of attention and head."""
    training = recipe.training
    head = net.head.embedding if training.trained == "embedding" else net.head
    net.head.requires_grad_(False)
    head.requires_grad_(True)
    matrices = {"params": [p for p in net.upper.parameters() if p.requires_grad], "weight_decay": 0.0}
    rest = {"params": list(head.parameters()), "lr": training.learning_rate, "weight_decay": training.weight_decay}
    return torch.optim.AdamW([matrices, *([rest] if rest["params"] else [])], lr=recipe.lora.learning_rate)


def _epoch(
    net: nn.Module,
    optimiser: Any,
    rise: torch.optim.lr_scheduler.LRScheduler,
    fit: Entered,
    steps: int,
    recipe: Recipe,
    frequency: Tensor,
    draw: torch.Generator,
    dropout: torch.Generator,
    accelerator: Any,
) -> float:
    """Take one pass over the scans and give the mean loss of its steps."""
    config, device, processes = recipe.lora, accelerator.device, accelerator.num_processes
    net.train()
    losses = []
    even = recipe.training.sampling == "balanced"
    for step in _order(fit.bags.labels, even, draw).tensor_split(steps):
        chosen = draw_slices(fit.bags.mask[step], config.slices, draw)
        own = torch.arange(len(step)).tensor_split(processes)[accelerator.process_index]
        batch, chosen = step[own], chosen[own]
        entries = torch.from_numpy(fit.entries[fit.rows[batch][:, None], chosen.numpy()]).to(device)
        out = net(entries, fit.bags.mask[batch].gather(1, chosen).to(device), dropout)
        everyone = torch.ones(1, len(batch), dtype=torch.bool, device=device)
        labels, shares = fit.bags.labels[batch][None].to(device), None if even else frequency
        loss = composite_loss(out.logits, out.embedding, labels, everyone, recipe.loss, shares).total.sum()
        optimiser.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(net.parameters(), LARGEST_GRADIENT)
        optimiser.step()
        rise.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses))


def _answer(
    head: SliceAttentionNet,
    scaled: Float[Tensor, "scans slices dim"],
    mask: Bool[Tensor, "scans slices"],
    generator: torch.Generator,
) -> Output:
    """Answer with the head's dropout in training, without it otherwise."""
    config, device = head.config, generator.device
    if head.training and config.slice_dropout:
        kept = mask & (torch.rand(mask.shape, generator=generator, device=device) >= config.slice_dropout)
        mask = torch.where(kept.any(dim=1, keepdim=True), kept, mask)
    pooled = head.attention(scaled[None], mask[None])
    x = pooled.feature
    if head.training and config.dropout:
        x = x * (torch.rand(x.shape, generator=generator, device=device) < 1 - config.dropout) / (1 - config.dropout)
    return Output(*head.answer(x), pooled.weights)


def _order(labels: Tensor, even: bool, generator: torch.Generator) -> Tensor:
    """Shuffle the scans; `even` draws with replacement, each class as often."""
    if not even:
        return torch.randperm(len(labels), generator=generator)
    chance = 1 / torch.bincount(labels)[labels]
    return torch.multinomial(chance, len(labels), replacement=True, generator=generator)


class _Kept(NamedTuple):
    adapter: dict[str, Tensor]
    head: dict[str, Tensor]


def _keep(net: AdaptedNet) -> _Kept:
    return _Kept(adapter_tensors(net.upper), {k: t.detach().clone() for k, t in net.head.state_dict().items()})


class _Seen(NamedTuple):
    loss: float
    accuracy: float


def _validate(net: AdaptedNet, check: Entered, recipe: Recipe, frequency: Tensor, accelerator: Any) -> _Seen:
    """Give cross-entropy and accuracy, the same in every process: they must stop at the same epoch.

    A recipe that mends imbalance is judged with all classes alike, as in learning/train.py.
    """
    from accelerate.utils import broadcast

    device = accelerator.device
    net.eval()
    features, labels = check.embed(net.upper).to(device), check.bags.labels[None].to(device)
    with torch.no_grad():
        logits = net.head(net.head.scaled(features)[None], check.bags.mask[None].to(device)).logits
    mends = recipe.loss.class_weights or recipe.loss.classification == "logit_adjusted"
    mends = mends or recipe.training.sampling == "balanced"
    everyone = torch.ones(1, len(check), dtype=torch.bool, device=device)
    loss = cross_entropy(logits, labels, everyone, balanced(frequency) if mends else None)
    accuracy = (logits.argmax(dim=-1) == labels).float().mean(dim=1)
    agreed = broadcast(torch.cat([loss, accuracy]))
    return _Seen(float(agreed[0]), float(agreed[1]))
