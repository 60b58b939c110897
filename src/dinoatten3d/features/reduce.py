"""Fewer numbers a patch token: a principal component analysis of each layer, fitted once and kept with the features.

It sees no label. It does see the scans that it was fitted on, and in a cohort without a `split` column some of them
are held out later: their pixels, never their diagnosis, have had a say in which directions are kept (measured in
docs/log.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from sklearn.decomposition import PCA

from dinoatten3d.errors import ConfigError, FeatureError
from dinoatten3d.files import write_bytes

MOST_SCANS = 20
"""Scans that it is fitted on at most."""
SAMPLE = 2000
"""Tissue patches of one scan that it is fitted on at most."""


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """Principal components of the patch tokens of each layer.

    Attributes:
        mean: `[layers, dim]`.
        basis: `[layers, dim, components]`, orthonormal columns, the widest first.
        scans: SHA-256 of each scan that it was fitted on.
    """

    mean: NDArray[np.float32]
    basis: NDArray[np.float32]
    scans: tuple[str, ...]

    def __call__(self, layer: int, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """Project the tokens of the layer at this index, `[..., dim]` to `[..., components]`."""
        return np.asarray((tokens - self.mean[layer]) @ self.basis[layer])


def fit_reduction(samples: Iterable[list[NDArray[np.float32]]], scans: tuple[str, ...], components: int) -> Reduction:
    """Fit on samples of tissue patches.

    Args:
        samples: For each scan and layer `[patches, dim]`.
        scans: SHA-256 of the scans.
        components: How many to keep.

    Raises:
        ConfigError: There are more components than dimensions or patches.
    """
    layers = [np.concatenate(layer) for layer in zip(*samples, strict=True)]
    most = min(min(layer.shape) for layer in layers)
    if components > most:
        raise ConfigError(f"patches.pca is {components}; these tokens allow {most} at most")
    found = [PCA(components, svd_solver="covariance_eigh").fit(layer) for layer in layers]
    return Reduction(
        mean=np.stack([pca.mean_ for pca in found]).astype(np.float32),
        basis=np.stack([pca.components_.T for pca in found]).astype(np.float32),
        scans=scans,
    )


def sample_patches(
    patches: Mapping[int, NDArray[np.float32]], tissue: NDArray[np.bool_], rng: np.random.Generator
) -> list[NDArray[np.float32]]:
    """Draw the same tissue patches of one scan from each layer, `[patches, dim]` each."""
    chosen = rng.permutation(np.flatnonzero(tissue))[:SAMPLE]
    return [grid.reshape(tissue.size, -1)[chosen] for grid in patches.values()]


def write_reduction(path: Path, reduction: Reduction) -> None:
    """Write it, whole or not at all."""
    arrays = {"mean": reduction.mean, "basis": np.ascontiguousarray(reduction.basis)}
    write_bytes(path, save(arrays, {"scans": json.dumps(reduction.scans)}))


def read_reduction(path: Path) -> Reduction:
    """Read it back.

    Raises:
        FeatureError: The file is missing or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            scans = tuple(json.loads(file.metadata()["scans"]))
            return Reduction(mean=file.get_tensor("mean"), basis=file.get_tensor("basis"), scans=scans)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise FeatureError(
            f"{path} is missing or damaged ({error}); without it the tokens mean nothing, extract into another folder"
        ) from None
