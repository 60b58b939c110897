"""A frozen vision transformer that turns 8-bit slices into tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dinoatten3d.errors import ConfigError, WeightsError
from dinoatten3d.features.weights import Weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BATCH = 12
"""Slices in one forward pass; larger ones are slower on a CPU's cache."""


class Tokens(NamedTuple):
    """What the backbone says of n slices.

    `cls` is `[n, dim]` after the final norm. `patches` maps a layer to `[n, rows, columns, dim]`, the last's after
    the final norm, the others as they leave their block. `attention` is the last block's from CLS to the patches,
    mean over heads.
    """

    cls: NDArray[np.float32]
    patches: dict[int, NDArray[np.float32]]
    attention: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A loaded encoder; make one with `load_backbone`."""

    model: Any
    weights: Weights
    patch_px: int
    dim: int
    layers: int
    prefix_tokens: int
    device: torch.device

    @property
    def identity(self) -> dict[str, str]:
        """What decides the features: the tensors and the rule that resizes the position table."""
        return {
            "name": self.weights.name,
            "title": self.weights.title,
            "source": self.weights.source,
            "sha256": self.weights.sha256,
            "position_table": "official",
        }

    def embed(self, pixels: NDArray[np.uint8], *, layers: Sequence[int] = (), attention: bool = False) -> Tokens:
        """Embed slices.

        Args:
            pixels: 8-bit grey, `[n, height, width]`, both multiples of the patch.
            layers: Blocks (1 is the first) whose patch tokens are wanted.
            attention: Also give the last block's attention from CLS to the patches.

        Raises:
            ConfigError: The picture does not divide into patches, or a layer does not exist.
        """
        rows, columns = (n // self.patch_px for n in pixels.shape[1:])
        if pixels.shape[1] % self.patch_px or pixels.shape[2] % self.patch_px:
            size = " x ".join(map(str, pixels.shape[1:]))
            fits = max(1, round(pixels.shape[1] / self.patch_px)) * self.patch_px
            raise ConfigError(
                f"slices of {size} px do not divide into {self.patch_px} px patches; use --slices.size-px {fits}"
            )
        if any(not 1 <= layer <= self.layers for layer in layers):
            raise ConfigError(
                f"layers {list(layers)} were asked for; {self.weights.name} has layers 1 to {self.layers}"
            )
        batches = [
            self._embed_batch(pixels[start : start + BATCH], rows, columns, layers, attention)
            for start in range(0, len(pixels), BATCH)
        ]
        return Tokens(
            cls=np.concatenate([b.cls for b in batches]),
            patches={layer: np.concatenate([b.patches[layer] for b in batches]) for layer in layers},
            attention=np.concatenate([b.attention for b in batches if b.attention is not None]) if attention else None,
        )

    def _embed_batch(
        self, pixels: NDArray[np.uint8], rows: int, columns: int, layers: Sequence[int], attention: bool
    ) -> Tokens:
        self.model.set_attn_implementation("eager" if attention else "sdpa")
        with torch.inference_mode():
            out = self.model(
                to_rgb(torch.from_numpy(pixels).to(self.device)),
                output_hidden_states=bool(layers),
                output_attentions=attention,
            )
        first = self.prefix_tokens

        def grid(tokens: Tensor) -> NDArray[np.float32]:
            return tokens[:, first:].reshape(len(pixels), rows, columns, -1).float().cpu().numpy()

        normed = out.last_hidden_state
        patches = {n: grid(normed if n == self.layers else out.hidden_states[n]) for n in layers}
        seen = out.attentions[-1].mean(dim=1)[:, 0, first:].reshape(-1, rows, columns) if attention else None
        return Tokens(
            cls=normed[:, 0].float().cpu().numpy(),
            patches=patches,
            attention=seen.float().cpu().numpy() if seen is not None else None,
        )


def load_backbone(weights: Weights, *, device: str = "cpu") -> Backbone:
    """Load a DINOv2 encoder, with its position table resized the official way.

    Args:
        weights: A folder that transformers reads.
        device: Where it runs, such as `cpu` or `cuda`.

    Raises:
        WeightsError: transformers cannot load the folder, or it lacks tensors of the encoder.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = transformers.AutoModel.from_pretrained(
            weights.folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except Exception as error:  # transformers raises what its readers raise
        raise WeightsError(f"{weights.folder} cannot be loaded as a backbone: {str(error).splitlines()[0]}") from None
    missing = sorted(set(report["missing_keys"]))
    if missing:
        raise WeightsError(f"{weights.folder} lacks {len(missing)} tensors of its architecture, such as {missing[0]}")
    config = model.config
    registers = int(getattr(config, "num_register_tokens", 0) or 0)
    if config.model_type in ("dinov2", "dinov2_with_registers"):
        _resize_positions_officially(model, registers)
    model.eval().requires_grad_(False).to(device)
    return Backbone(
        model=model,
        weights=weights,
        patch_px=int(config.patch_size),
        dim=int(config.hidden_size),
        layers=int(config.num_hidden_layers),
        prefix_tokens=1 + registers,
        device=torch.device(device),
    )


def to_rgb(pixels: Tensor) -> Tensor:
    """Turn 8-bit grey `[n, height, width]` into ImageNet-standardised `[n, 3, height, width]`."""
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels.unsqueeze(1).float() / 255 - mean) / std


def official_positions(table: Tensor, rows: int, columns: int, *, registers: int) -> Tensor:
    """Resize DINOv2's position table as the official code does.

    Without registers the scale is (n + 0.1) / N without antialiasing; with registers it is exact, with antialiasing.

    Args:
        table: `[1, 1 + N * N, dim]`, the class position first.
        rows: Patches down the picture.
        columns: Patches across it.
        registers: Number of register tokens.

    Returns:
        `[1, 1 + rows * columns, dim]`.
    """
    side = int((table.shape[1] - 1) ** 0.5)
    if (rows, columns) == (side, side):
        return table
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    if registers:
        grid = functional.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
    else:
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = functional.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=False)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, rows * columns, -1).to(table)], dim=1)


def _resize_positions_officially(model: Any, registers: int) -> None:
    """Replace the resizing of transformers on this instance."""
    embeddings, patch = model.embeddings, int(model.config.patch_size)
    resized: dict[tuple[int, int], Tensor] = {}

    def interpolate(_: Tensor, height: int, width: int) -> Tensor:
        grid = (height // patch, width // patch)
        if grid not in resized:
            resized[grid] = official_positions(embeddings.position_embeddings, *grid, registers=registers)
        return resized[grid]

    embeddings.interpolate_pos_encoding = interpolate
