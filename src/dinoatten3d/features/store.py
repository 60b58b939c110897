"""Features on disk: one folder a recipe and backbone, one file a scan, named by the scan's content."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save
from safetensors.torch import load_file

from dinoatten3d.config import PatchConfig, Plane, SliceConfig
from dinoatten3d.data.slices import planes_of
from dinoatten3d.errors import FeatureError
from dinoatten3d.features.reduce import Reduction, read_reduction
from dinoatten3d.files import digest, sha256, write_bytes, write_text
from dinoatten3d.toml import from_dict, to_dict

FORMAT_VERSION = 2
NO_PART = ("title", "source", "reference")
"""What is told of a backbone and has no part in its features."""
REDUCTION = "pca.safetensors"


@dataclass(frozen=True, kw_only=True)
class PatchTokens:
    """The middle layers' view of a scan, as it is and with blemishes painted in (features/blemish.py).

    Attributes:
        tokens: Of all kept layers side by side, float16 `[slices, rows, columns, layers * dim]`.
        tissue: Patches that are mostly tissue, `[slices, rows, columns]`.
        blemished: Tokens of the blemished slices, float16 `[k, rows, columns, layers * dim]`.
        blemished_slice: Which slices those are, `[k]`.
        blemished_weight: How far each patch is inside the blemish, 0 to 1, `[k, rows, columns]`.
        blemished_factor: What the blemish multiplies the intensity by, `[k]`.
    """

    tokens: NDArray[np.float16]
    tissue: NDArray[np.bool_]
    blemished: NDArray[np.float16]
    blemished_slice: NDArray[np.int64]
    blemished_weight: NDArray[np.float32]
    blemished_factor: NDArray[np.float64]

    def stack(self, slices: slice) -> PatchTokens:
        """Keep a run of slices, such as those of one plane."""
        inside = (self.blemished_slice >= slices.start) & (self.blemished_slice < slices.stop)
        return PatchTokens(
            tokens=self.tokens[slices],
            tissue=self.tissue[slices],
            blemished=self.blemished[inside],
            blemished_slice=self.blemished_slice[inside] - slices.start,
            blemished_weight=self.blemished_weight[inside],
            blemished_factor=self.blemished_factor[inside],
        )


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the backbone saw in one scan.

    Attributes:
        cls: CLS token of each slice, float32 `[slices, dim]`.
        means: Mean tissue patch of each slice, the kept layers side by side, float32 `[slices, layers * dim]`.
        patches: Patch tokens of the kept layers, where there are any.
        position_mm: Place of each slice along its plane's normal, `[slices]`.
        affine_ras: (row, column, slices further on) of each slice to RAS+ mm, `[slices, 4, 4]`.
        planes: Anatomical plane of each slice, `[slices]`.
        brain_ml: Brain volume.
    """

    cls: NDArray[np.float32]
    position_mm: NDArray[np.float64]
    affine_ras: NDArray[np.float64]
    planes: tuple[Plane, ...]
    brain_ml: float
    means: NDArray[np.float32] | None = None
    patches: PatchTokens | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureStore:
    """A feature folder; make one with `create_store` or `open_store`."""

    folder: Path
    slices: SliceConfig
    backbone: Mapping[str, str]
    digest: str
    patches: PatchConfig
    reduction: Reduction | None = None

    def path(self, scan: Path) -> Path:
        """Give the file that holds (or will hold) a scan's features; reads the scan to know its content."""
        return self.folder / "scans" / f"{sha256(scan)[:24]}.safetensors"

    def read(self, scan: Path) -> Features:
        """Read a scan's features; they stay on the disk until they are looked at (memory-mapped).

        Raises:
            FeatureError: They were not extracted, or the file is damaged.
        """
        path = self.path(scan)
        if not path.exists():
            raise FeatureError(
                f"{self.folder} has no features of {scan} as it is now; run `dinoatten3d extract` again (it only adds)"
            )
        try:
            arrays = {name: tensor.numpy() for name, tensor in load_file(path).items()}
        except (SafetensorError, OSError) as error:
            raise FeatureError(f"{path} is damaged ({error}); delete it and run `dinoatten3d extract` again") from None
        return Features(
            cls=arrays["cls"],
            position_mm=arrays["position_mm"],
            affine_ras=arrays["affine_ras"],
            planes=planes_of(self.slices),
            brain_ml=float(arrays["brain_ml"][0]),
            means=arrays.get("means"),
            patches=PatchTokens(**{f.name: arrays[f"patches.{f.name}"] for f in fields(PatchTokens)})
            if self.patches.layers
            else None,
        )

    def write(self, path: Path, features: Features) -> None:
        """Write one scan's features, whole or not at all."""
        arrays: dict[str, NDArray[Any]] = {
            "cls": features.cls,
            "position_mm": features.position_mm,
            "affine_ras": features.affine_ras,
            "brain_ml": np.array([features.brain_ml]),
        }
        if features.means is not None and features.patches is not None:
            arrays["means"] = features.means
            arrays |= {f"patches.{name}": array for name, array in vars(features.patches).items()}
        content = save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, {"made_by": self.digest})
        write_bytes(path, content)


def create_store(root: Path, slices: SliceConfig, backbone: Mapping[str, str], patches: PatchConfig) -> FeatureStore:
    """Make (or find again) the folder `<backbone>-<digest>` under `root` for these slices and this backbone."""
    made_from: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "slices": to_dict(slices),
        "backbone": {key: value for key, value in backbone.items() if key not in NO_PART},
    }
    if patches.layers:
        made_from["patches"] = to_dict(patches)
    name = digest(made_from)
    folder = root / f"{backbone['name']}-{name}"
    if not (folder / "recipe.toml").exists():
        write_text(folder / "recipe.toml", tomli_w.dumps({"digest": name, **made_from, "backbone": dict(backbone)}))
    return open_store(folder)


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
    patches = from_dict(PatchConfig, made.get("patches", {"layers": []}), str(path))
    reduced = folder / REDUCTION
    fitted = bool(patches.pca) and (reduced.exists() or (folder / "scans").exists())
    reduction = read_reduction(reduced) if fitted else None
    return FeatureStore(
        folder=folder,
        slices=from_dict(SliceConfig, made["slices"], str(path)),
        backbone=made["backbone"],
        digest=digest(made["digest"], sha256(reduced)) if fitted else made["digest"],
        patches=patches,
        reduction=reduction,
    )
