"""Any vision encoder that transformers loads: its model, and what can be had from it, found out by asking it."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dinoatten3d.errors import WeightsError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PROBE_PX = 64
"""Side of the picture that an encoder is asked with; the next multiple of the patch."""
MOST_PREFIX_TOKENS = 16


class Loaded(NamedTuple):
    """A vision tower, and how its file and its architecture disagree (tensor names)."""

    model: Any
    missing: list[str]
    extra: list[str]
    misshapen: list[str]


class PixelStatistics(NamedTuple):
    """What pixels of 0 to 1 are standardised by, for red, green and blue."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What an encoder is made of.

    Attributes:
        patch_px: Side of a patch; of an encoder with feature maps, of one place of its last map.
        dim: Width of the token of a slice.
        layers: Blocks, or stages with a feature map.
        prefix_tokens: Tokens before the patches in the last state (CLS, registers).
        pooled: The token of a slice is what the model pools, not the first of its tokens.
        arguments: What the forward pass must be told to take pictures of any size.
    """

    patch_px: int
    dim: int
    layers: int
    prefix_tokens: int
    pooled: bool
    arguments: Mapping[str, bool]


def load_model(folder: Path) -> Loaded:
    """Load a folder with transformers; of a model for pictures and text, the vision tower alone.

    Raises:
        WeightsError: transformers cannot load it.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        whole, report = transformers.AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused by name
        )
    except Exception as error:  # transformers raises what its readers raise
        raise WeightsError(
            f"{folder} cannot be loaded as a backbone: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from None
    tower = getattr(whole, "vision_model", whole)
    unused = () if _pools_for_us(tower) else ("pooler.", "vision_model.pooler.")
    missing = [
        key
        for key in sorted(report["missing_keys"])
        if (tower is whole or key.startswith("vision_model.")) and not key.startswith(unused)
    ]
    return Loaded(
        model=tower.eval().requires_grad_(False),
        missing=missing,
        extra=sorted(report["unexpected_keys"]),
        misshapen=sorted(str(item[0]) for item in report["mismatched_keys"]),
    )


def recognise(model: Any, name: str) -> Anatomy:
    """Find out what an encoder gives by embedding one small blank picture.

    Raises:
        WeightsError: It takes no such picture, its tokens are no grid of patches, or it has neither a CLS nor a
            pooled token.
    """
    patch = getattr(model.config, "patch_size", 0)
    patch = patch if isinstance(patch, int) else 0
    side = -(-PROBE_PX // patch) * patch if patch else PROBE_PX
    resizes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    arguments = {"interpolate_pos_encoding": True} if resizes else {}
    try:
        with torch.inference_mode():
            out = model(torch.zeros(1, 3, side, side), output_hidden_states=True, **arguments)
            last, states = out.last_hidden_state, out.hidden_states
    except Exception as error:  # whatever its forward pass stumbles over
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{name} is a {model.config.model_type} and cannot embed a picture of {side} px ({reason}); "
            "wanted a vision encoder"
        ) from None
    maps = states[-1].ndim == 4
    patch_px = side // states[-1].shape[-1] if maps else patch
    prefix = last.shape[1] - (side // patch_px) ** 2 if last.ndim == 3 and patch_px else 0
    if (last.ndim == 3 and not (patch_px and 0 <= prefix <= MOST_PREFIX_TOKENS)) or last.ndim not in (3, 4):
        raise WeightsError(
            f"{name} is a {model.config.model_type}, whose tokens are no grid of patches; "
            "wanted an encoder such as DINOv2, DINOv3, ViT, CLIP, SigLIP or ConvNeXt"
        )
    pooled = getattr(out, "pooler_output", None) if _pools_for_us(model) else None
    if pooled is None and not prefix:
        raise WeightsError(f"{name} is a {model.config.model_type}, which has neither a CLS nor a pooled token")
    return Anatomy(
        patch_px=patch_px,
        dim=(last[:, 0] if pooled is None else pooled.flatten(1)).shape[-1],
        layers=len(states) - 1,
        prefix_tokens=prefix,
        pooled=pooled is not None,
        arguments=arguments,
    )


def pixel_statistics(folder: Path) -> PixelStatistics:
    """Read mean and standard deviation from preprocessor_config.json; without that file they are ImageNet's.

    Raises:
        WeightsError: The file is there and does not tell them.
    """
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return PixelStatistics()
    try:
        told = json.loads(path.read_text())
        if not told.get("do_normalize", True):
            return PixelStatistics(mean=(0.0,) * 3, std=(1.0,) * 3)
        mean, std = (tuple(float(value) for value in told[key]) for key in ("image_mean", "image_std"))
    except (ValueError, KeyError, TypeError, AttributeError):
        mean = std = ()
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise WeightsError(f"{path} does not tell image_mean and image_std for three channels; mend or remove it")
    return PixelStatistics(mean=mean, std=std)


def _pools_for_us(model: Any) -> bool:
    """Say whether pooling is part of the encoder; a dense layer after CLS (ViT, DeiT) belongs to another task."""
    return not hasattr(getattr(model, "pooler", None), "dense")
