"""Adapt the backbone's last blocks inside each outer fold, end to end through slice attention and head.

The frozen blocks below are run once a scan and their tokens kept in half precision, so an epoch costs the last blocks
alone. Attention and head first learn on the frozen tokens (fine-tuning from a random head distorts good features,
Kumar et al. 2022), and "not adapted at all" is the first candidate that inner validation chooses among.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from dinoatten3d.config import EvaluationConfig, Recipe
from dinoatten3d.data.slices import take_slices
from dinoatten3d.data.volume import load_volume
from dinoatten3d.errors import ConfigError, FeatureError
from dinoatten3d.features.backbone import Backbone
from dinoatten3d.features.store import FeatureStore
from dinoatten3d.learning.adapter import adapted_blocks, adapter_tensors, embed_entries, enter, write_adapter
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.end_to_end import AdaptedNet, Entered, Entries, train_end_to_end
from dinoatten3d.learning.fit import CrossValidation, FittedFold, Progress, fit_fold, over_repeats
from dinoatten3d.learning.model import SliceAttentionNet
from dinoatten3d.learning.splits import inner_folds, partition, repeat_of


@dataclass(frozen=True, kw_only=True)
class AdaptedFold(FittedFold):
    """A fold with an adapter of its own.

    Attributes:
        adapter: The LoRA matrices by name.
        settings: peft's description of them.
        features: CLS tokens of all scans under this adapter, `[scans, slices, dim]`, in the order of the bags.
    """

    adapter: dict[str, Tensor]
    settings: Any
    features: Tensor

    def write(self, folder: Path) -> None:
        """Write the adapter and the features that it gives into a fold's folder."""
        write_adapter(folder / "adapter", self.adapter, self.settings)
        save_file({"cls": self.features.contiguous()}, folder / "features.safetensors")


def cross_validate_adapted(
    bags: Bags,
    store: FeatureStore,
    backbone: Backbone,
    recipe: Recipe,
    evaluation: EvaluationConfig,
    *,
    scratch: Path,
    folds: NDArray[np.int64] | None = None,
    progress: Progress = lambda done, total: None,
) -> CrossValidation:
    """Adapt and train in each outer fold, and score each scan with the model that never saw its subject.

    Started by `accelerate launch`, all processes train together and all but the first end here.

    Args:
        bags: Labelled bags of the frozen features; their scans are read again.
        store: The feature folder they came from.
        backbone: The encoder that made it.
        recipe: Model, loss, training and adaptation; it trains one member.
        evaluation: Kind and number of folds, and the seed.
        scratch: Folder with room for the frozen tokens; the file in it has no name and ends with the process.
        folds: The fold of each scan, `[scans]` or `[repeats, scans]`, where it is decided elsewhere.
        progress: Called with scans and epochs done and the most there can be.

    Raises:
        FeatureError: The backbone is not the one that made the features.
        ConfigError: peft or accelerate is not installed, or the backbone cannot be adapted.
    """
    started = time.monotonic()
    check_backbone(store, backbone)
    adapted_blocks(backbone, recipe.lora)  # what is missing is said now, not after an hour of work
    if recipe.lora.slices and len(set(bags.planes)) > 1:
        raise ConfigError("lora.slices draws from one plane, and these features have several; leave it at 0")
    from accelerate import PartialState

    if folds is None:
        folds = partition(bags.scans, bags.labels.numpy(), bags.classes, evaluation)
    folds = np.atleast_2d(folds)
    count, epochs = int(folds.max()) + 1, recipe.lora.epochs
    steps = len(bags) + count * epochs
    entries = enter_cohort(bags, store, backbone, recipe.lora.blocks, scratch, lambda n: progress(n, steps))
    probabilities = np.zeros((len(folds), len(bags), len(bags.classes)))
    weights = np.zeros((len(folds), *bags.mask.shape))
    fitted: list[AdaptedFold] = []
    for fold in range(count):
        repeat = repeat_of(folds, fold)
        held_out = np.flatnonzero(folds[repeat] == fold)
        done = len(bags) + fold * epochs
        fitted.append(
            adapt_fold(
                bags,
                entries,
                np.flatnonzero(folds[repeat] != fold),
                backbone,
                recipe,
                seed=evaluation.seed * 1000 + fold,
                progress=lambda epoch, done=done: progress(done + epoch, steps),  # type: ignore[misc]
            )
        )
        adapted = replace(bags, features=fitted[-1].features)
        probabilities[repeat, held_out], weights[repeat, held_out] = fitted[-1].model.score(adapted.take(held_out))
        progress(done + epochs, steps)
    if not PartialState().is_main_process:
        raise SystemExit(0)
    return over_repeats(folds, probabilities, weights, fitted, seconds=time.monotonic() - started)


def check_backbone(store: FeatureStore, backbone: Backbone) -> None:
    """Refuse a backbone that did not make these features.

    Raises:
        FeatureError: It did not.
    """
    if store.backbone["sha256"] != backbone.identity["sha256"]:
        raise FeatureError(
            f"features {store.folder} were made with {store.backbone['name']} ({store.backbone['sha256'][:12]}), "
            f"not {backbone.identity['name']} ({backbone.identity['sha256'][:12]}); pass the same with --backbone"
        )


def enter_cohort(
    bags: Bags,
    store: FeatureStore,
    backbone: Backbone,
    blocks: int,
    scratch: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> Entries:
    """Read every scan again and run the frozen blocks, `[scans, slices, tokens, dim]` in a memory-mapped file.

    The file is unlinked from the start: the system keeps in memory what fits, and nothing is left behind whatever ends
    the process.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    entries: Entries | None = None
    with tempfile.TemporaryFile(dir=scratch) as file:
        for row, scan in enumerate(bags.scans):
            pixels = take_slices(load_volume(scan.path), store.slices).pixels
            entry = enter(backbone, pixels, blocks)
            if entries is None:
                shape = (*bags.mask.shape, *entry.shape[1:])
                if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash in the midst of it
                    os.posix_fallocate(file.fileno(), 0, 2 * math.prod(shape))
                entries = np.memmap(file, dtype=np.float16, mode="w+", shape=shape)
            entries[row, : len(entry)] = entry
            progress(row + 1)
    assert entries is not None
    return entries


def adapt_fold(
    bags: Bags,
    entries: Entries,
    train: NDArray[np.int64],
    backbone: Backbone,
    recipe: Recipe,
    *,
    seed: int,
    progress: Callable[[int], None] = lambda epoch: None,
) -> AdaptedFold:
    """Adapt on the scans `train`, of which one inner fold chooses the epoch, and give the features of all scans.

    Args:
        bags: All scans, with their frozen features.
        entries: Tokens of all scans at the entry of the blocks that are adapted.
        train: The scans that may be learnt from; of the others nothing but the answer's features is computed.
        backbone: The encoder.
        recipe: Model, loss, training (of one member) and adaptation.
        seed: Decides initial weights, the inner fold, batches and dropout.
        progress: Called after each epoch.
    """
    from accelerate import Accelerator

    learner = Entered(bags=bags.take(train), entries=entries, rows=train)
    start = fit_fold(learner.bags, recipe, seed=seed)
    assert isinstance(start.model, SliceAttentionNet)
    inner = inner_folds(bags.labels.numpy()[train], bags.subjects[train], folds=recipe.training.inner_folds, seed=seed)
    cuda = backbone.device.type == "cuda"
    precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "no"
    accelerator = Accelerator(cpu=backbone.device.type == "cpu", mixed_precision=precision)
    with torch.random.fork_rng(devices=[backbone.device] if cuda else []):  # peft draws from torch's own generator
        torch.manual_seed(seed)
        net = AdaptedNet(adapted_blocks(backbone, recipe.lora), start.model, recipe.lora.accumulation)
        history = train_end_to_end(
            net.to(accelerator.device),
            learner.take(np.flatnonzero(inner != 0)),  # as the head did: fit_fold's member 0
            learner.take(np.flatnonzero(inner == 0)),
            recipe,
            seed=seed,
            accelerator=accelerator,
            progress=progress,
        )
    features, model = embed_entries(net.upper, entries), net.head.cpu().eval()
    chosen_by = np.flatnonzero(inner == 0)
    probabilities = np.full((len(train), len(bags.classes)), np.nan)
    probabilities[chosen_by] = model.score(replace(bags, features=features).take(train[chosen_by]))[0]
    return AdaptedFold(
        model=model,
        history=history,
        inner=probabilities,
        adapter=adapter_tensors(net.upper),
        settings=net.upper.peft_config["default"],  # type: ignore[index,union-attr]
        features=features,
    )
