"""Features on disk: one folder a recipe and backbone, one file a scan, named by the scan's content."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from dinoatten3d.config import Plane, SliceConfig, digest, from_dict, to_dict
from dinoatten3d.errors import FeatureError
from dinoatten3d.files import sha256, write_bytes, write_text

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the backbone saw in one scan.

    Attributes:
        cls: CLS token of each slice, float32 `[slices, dim]`.
        patches: Patch tokens by layer, float16 `[slices, rows, columns, dim]`; empty unless they were asked for.
        position_mm: Place of each slice along the plane's normal, `[slices]`.
        affine_ras: (row, column, slice) of the pictures to RAS+ mm, `[4, 4]`.
        plane: Anatomical plane.
        brain_ml: Brain volume.
    """

    cls: NDArray[np.float32]
    position_mm: NDArray[np.float64]
    affine_ras: NDArray[np.float64]
    plane: Plane
    brain_ml: float
    patches: Mapping[int, NDArray[np.float16]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FeatureStore:
    """A feature folder; make one with `create_store` or `open_store`."""

    folder: Path
    slices: SliceConfig
    backbone: Mapping[str, str]
    digest: str
    layers: tuple[int, ...] = ()

    def path(self, scan: Path) -> Path:
        """Give the file that holds (or will hold) a scan's features; reads the scan to know its content."""
        return self.folder / "scans" / f"{sha256(scan)[:24]}.safetensors"

    def read(self, scan: Path) -> Features:
        """Read a scan's features.

        Raises:
            FeatureError: They were not extracted, or the file is damaged.
        """
        path = self.path(scan)
        if not path.exists():
            raise FeatureError(
                f"{self.folder} has no features of {scan} as it is now; run `dinoatten3d extract` again (it only adds)"
            )
        try:
            arrays = load_file(path)
        except (SafetensorError, OSError) as error:
            raise FeatureError(f"{path} is damaged ({error}); delete it and run `dinoatten3d extract` again") from None
        return Features(
            cls=arrays["cls"],
            position_mm=arrays["position_mm"],
            affine_ras=arrays["affine_ras"],
            plane=self.slices.plane,
            brain_ml=float(arrays["brain_ml"][0]),
            patches={layer: arrays[f"patches_{layer}"] for layer in self.layers},
        )

    def write(self, path: Path, features: Features) -> None:
        """Write one scan's features, whole or not at all."""
        arrays: dict[str, NDArray[Any]] = {
            "cls": features.cls,
            "position_mm": features.position_mm,
            "affine_ras": features.affine_ras,
            "brain_ml": np.array([features.brain_ml]),
        }
        arrays |= {f"patches_{layer}": tokens for layer, tokens in features.patches.items()}
        content = save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, {"made_by": self.digest})
        write_bytes(path, content)


def create_store(
    root: Path, slices: SliceConfig, backbone: Mapping[str, str], layers: tuple[int, ...] = ()
) -> FeatureStore:
    """Make (or find again) the folder `<backbone>-<digest>` under `root` for these slices and this backbone."""
    made_from: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "slices": to_dict(slices),
        "backbone": {key: value for key, value in backbone.items() if key not in ("title", "source")},
    }
    if layers:
        made_from["layers"] = list(layers)
    name = digest(made_from)
    folder = root / f"{backbone['name']}-{name}"
    if not (folder / "recipe.toml").exists():
        write_text(folder / "recipe.toml", tomli_w.dumps({"digest": name, **made_from, "backbone": dict(backbone)}))
    return FeatureStore(folder=folder, slices=slices, backbone=dict(backbone), digest=name, layers=layers)


def open_store(folder: Path) -> FeatureStore:
    """Open a feature folder.

    Raises:
        FeatureError: It is not one, or was made by another version.
    """
    path = folder / "recipe.toml"
    if not path.exists():
        inside = sorted(p.parent for p in folder.glob("*/recipe.toml")) if folder.is_dir() else []
        hint = f"; did you mean {inside[0]}?" if inside else "; make one with `dinoatten3d extract`"
        raise FeatureError(f"{folder} is not a feature folder (it has no recipe.toml){hint}")
    try:
        made = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FeatureError(f"{path} is damaged: {error}") from None
    if made.get("format_version") != FORMAT_VERSION:
        raise FeatureError(
            f"{folder} has format {made.get('format_version')}, this program reads {FORMAT_VERSION}; extract again"
        )
    return FeatureStore(
        folder=folder,
        slices=from_dict(SliceConfig, made["slices"], str(path)),
        backbone=made["backbone"],
        digest=made["digest"],
        layers=tuple(made.get("layers", ())),
    )
