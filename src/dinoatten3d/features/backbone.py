"""A frozen vision encoder that turns 8-bit slices into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dinoatten3d.errors import ConfigError, WeightsError
from dinoatten3d.features.encoder import Anatomy, PixelStatistics, load_model, pixel_statistics, recognise
from dinoatten3d.features.weights import Weights

Positions = Literal["official", "transformers"]
BATCH = 12
"""Slices in one forward pass; larger ones are slower on a CPU's cache."""


class Tokens(NamedTuple):
    """What the backbone says of n slices.

    `cls` is `[n, dim]`: the CLS token after the final norm, or what the encoder pools. `patches` maps a layer to
    `[n, rows, columns, dim]`, the last's as the encoder gives it (after the final norm where it has one), the others as
    they leave their block; the stages of a ConvNeXt differ in grid and dim. `attention` is the last block's from CLS to
    the patches, mean over heads.
    """

    cls: NDArray[np.float32]
    patches: dict[int, NDArray[np.float32]]
    attention: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A loaded encoder; make one with `load_backbone`.

    `position_table` says how the table is resized to the picture: `official` or `transformers`; `none` where there is
    none (rotary positions, convolutions).
    """

    model: Any
    weights: Weights
    anatomy: Anatomy
    pixels: PixelStatistics
    position_table: Positions | Literal["none"]
    device: torch.device

    @property
    def patch_px(self) -> int:
        """Side of a patch, which the side of a slice must be a multiple of."""
        return self.anatomy.patch_px

    @property
    def dim(self) -> int:
        """Width of the token of a slice."""
        return self.anatomy.dim

    @property
    def layers(self) -> int:
        """Number of blocks, or of stages."""
        return self.anatomy.layers

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: CLS and registers."""
        return self.anatomy.prefix_tokens

    @property
    def identity(self) -> dict[str, str]:
        """What decides the features: tensors, how positions are resized, pixel statistics other than ImageNet's."""
        told = {
            "name": self.weights.name,
            "title": self.weights.title,
            "source": self.weights.source,
            "reference": self.weights.reference,
            "sha256": self.weights.sha256,
            "position_table": self.position_table,
        }
        if self.pixels != PixelStatistics():
            told["pixels"] = f"mean {self.pixels.mean}, std {self.pixels.std}"
        return told

    def embed(self, pixels: NDArray[np.uint8], *, layers: Sequence[int] = (), attention: bool = False) -> Tokens:
        """Embed slices.

        Args:
            pixels: 8-bit grey, `[n, height, width]`, both multiples of the patch.
            layers: Blocks (1 is the first) whose patch tokens are wanted.
            attention: Also give the last block's attention from CLS to the patches.

        Raises:
            ConfigError: The picture does not divide into patches, a layer does not exist, or there is no attention.
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
        wanted = dict(self.anatomy.arguments)
        if attention:
            self._look("eager")
            wanted["output_attentions"] = True
        picture = to_rgb(torch.from_numpy(pixels).to(self.device), self.pixels)
        with torch.inference_mode():
            out = self.model(picture, output_hidden_states=bool(layers), **wanted)
        last = out.last_hidden_state
        first = self.prefix_tokens

        def grid(state: Tensor) -> NDArray[np.float32]:
            if state.ndim == 4:  # a feature map
                return state.permute(0, 2, 3, 1).float().cpu().numpy()
            return state[:, first:].reshape(len(pixels), rows, columns, -1).float().cpu().numpy()

        seen = None
        if attention:
            self._look("sdpa")
            seen = (getattr(out, "attentions", None) or [None])[-1]
            if seen is None or not first:
                raise self._no_attention()
            seen = seen.mean(dim=1)[:, 0, first:].reshape(-1, rows, columns).float().cpu().numpy()
        return Tokens(
            cls=(out.pooler_output.flatten(1) if self.anatomy.pooled else last[:, 0]).float().cpu().numpy(),
            patches={n: grid(last if n == self.layers else out.hidden_states[n]) for n in layers},
            attention=seen,
        )

    def _look(self, how: Literal["eager", "sdpa"]) -> None:
        """Choose how attention is computed; only `eager` shows its weights."""
        try:
            self.model.set_attn_implementation(how)
        except ValueError:
            raise self._no_attention() from None

    def _no_attention(self) -> ConfigError:
        kind = self.model.config.model_type
        return ConfigError(f"{self.weights.name} is a {kind} and shows no attention from a CLS token to its patches")


def load_backbone(weights: Weights, *, device: str = "cpu", positions: Positions = "official") -> Backbone:
    """Load an encoder.

    Args:
        weights: A folder that transformers reads.
        device: Where it runs, such as `cpu` or `cuda`.
        positions: How DINOv2's position table is resized; other encoders have one way only.

    Raises:
        WeightsError: transformers cannot load the folder, it lacks tensors of the encoder, or that gives no tokens.
    """
    loaded = load_model(weights.folder)
    for names, fault in ((loaded.missing, "lacks"), (loaded.misshapen, "has in another shape")):
        if names:
            raise WeightsError(f"{weights.folder} {fault} {len(names)} tensors of its architecture, such as {names[0]}")
    anatomy = recognise(loaded.model, weights.name)
    try:
        model = loaded.model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either where a device is unknown or not there
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device '{device}' cannot be used here ({reason}); use --device cpu") from None
    table: Positions | Literal["none"] = "transformers" if anatomy.arguments else "none"
    if model.config.model_type in ("dinov2", "dinov2_with_registers"):
        table = positions
        if positions == "official":
            _resize_positions_officially(model, int(getattr(model.config, "num_register_tokens", 0) or 0))
    return Backbone(
        model=model,
        weights=weights,
        anatomy=anatomy,
        pixels=pixel_statistics(weights.folder),
        position_table=table,
        device=torch.device(device),
    )


def to_rgb(pixels: Tensor, statistics: PixelStatistics = PixelStatistics()) -> Tensor:  # noqa: B008  immutable
    """Turn 8-bit grey `[n, height, width]` into standardised `[n, 3, height, width]`."""
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in statistics)
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
