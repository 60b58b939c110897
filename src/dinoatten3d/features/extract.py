"""Run the frozen backbone once over a cohort and keep what it saw."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinoatten3d.config import PatchConfig, SliceConfig
from dinoatten3d.data.cohort import Cohort, Scan
from dinoatten3d.data.slices import Slices, stacks, take_slices
from dinoatten3d.data.volume import load_volume
from dinoatten3d.errors import DinoAtten3DError, ScanError
from dinoatten3d.features.backbone import Backbone
from dinoatten3d.features.blemish import Blemished, blemish, patch_mean, tissue_mask
from dinoatten3d.features.reduce import MOST_SCANS, Reduction, fit_reduction, sample_patches, write_reduction
from dinoatten3d.features.store import REDUCTION, Features, FeatureStore, PatchTokens, create_store, open_store
from dinoatten3d.files import sha256, write_text

Progress = Callable[[int, int], None]
TRAINING_SPLITS = ("train", "training")


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What an `extract` did: scans embedded, found from before, and failed (scan id to reason); notes by scan id."""

    store: FeatureStore
    embedded: int
    found: int
    failed: dict[str, str]
    notes: dict[str, tuple[str, ...]]


def extract(
    cohort: Cohort,
    backbone: Backbone,
    out: Path,
    *,
    slices: SliceConfig,
    patches: PatchConfig,
    progress: Progress = lambda done, total: None,
) -> Extraction:
    """Extract the features of every scan that does not have them yet.

    A scan that cannot be read is listed and the others go on. Killed at any point, at most the scan in hand is lost.

    Args:
        cohort: The scans.
        backbone: The encoder.
        out: Folder of feature folders; the right one inside is made or taken up again.
        slices: Which slices, and how they become pixels.
        patches: Patch tokens to keep too.
        progress: Called with scans done and scans in all.

    Returns:
        The feature folder and what was done.
    """
    store = create_store(out, slices, backbone.identity, patches)
    try:
        if patches.pca and store.reduction is None:
            write_reduction(store.folder / REDUCTION, _fit_reduction(cohort, backbone, store))
            store = open_store(store.folder)
        return _extract_into(store, cohort, backbone, progress)
    except DinoAtten3DError:  # a setting that the backbone cannot do: no folder without features stays behind
        if not (store.folder / "scans").exists():
            shutil.rmtree(store.folder, ignore_errors=True)
        raise


def _extract_into(store: FeatureStore, cohort: Cohort, backbone: Backbone, progress: Progress) -> Extraction:
    """Embed the scans that `store` does not hold yet, and list those that cannot be read."""
    embedded, found = 0, 0
    failed: dict[str, str] = {}
    notes: dict[str, tuple[str, ...]] = {}
    rows: list[tuple[str, str, str, str]] = []
    with ThreadPoolExecutor(max_workers=1) as reader:  # the next scan is read while this one is embedded
        pending = [reader.submit(_prepare, scan, store) for scan in cohort.scans[:2]]
        for number, scan in enumerate(cohort.scans):
            if number + 2 < len(cohort):
                pending.append(reader.submit(_prepare, cohort.scans[number + 2], store))
            try:
                target, pictures, scan_notes = pending[number].result()
            except (ScanError, OSError) as error:
                failed[scan.id] = str(error)
            else:
                if pictures is None:
                    found += 1
                else:
                    seed = int(target.stem[:8], 16)  # by content: the same scan has the same blemishes everywhere
                    kept = embed_slices(pictures, backbone, store.patches, seed=seed, reduction=store.reduction)
                    store.write(target, kept)
                    embedded += 1
                if scan_notes:
                    notes[scan.id] = scan_notes
                rows.append((scan.id, str(scan.path), target.stem, "; ".join(scan_notes)))
            pending[number].cancel()
            progress(number + 1, len(cohort))
    _write_index(store, rows)
    return Extraction(store=store, embedded=embedded, found=found, failed=failed, notes=notes)


def embed_slices(
    slices: Slices,
    backbone: Backbone,
    patches: PatchConfig,
    *,
    seed: int | None = None,
    reduction: Reduction | None = None,
) -> Features:
    """Embed the pictures of one scan; without a seed no blemish is painted."""
    seen = backbone.embed(slices.pixels, layers=patches.layers)
    means = kept = None
    if patches.layers:
        patch_px = slices.pixels.shape[1] // seen.patches[patches.layers[0]].shape[1]
        tissue = _tissue_patches(slices, patch_px)
        means = np.concatenate([_tissue_mean(seen.patches[layer], tissue) for layer in patches.layers], axis=-1)
        spoiled = _blemished(slices, patches.blemished if seed is not None else 0, np.random.default_rng(seed))
        again = {layer: grid[:0] for layer, grid in seen.patches.items()}
        if len(spoiled.index):
            again = backbone.embed(spoiled.pixels, layers=patches.layers).patches
        kept = PatchTokens(
            tokens=_joined(seen.patches, patches, reduction),
            tissue=tissue,
            blemished=_joined(again, patches, reduction),
            blemished_slice=spoiled.index,
            blemished_weight=patch_mean(spoiled.weight, patch_px),
            blemished_factor=spoiled.factor,
        )
    return Features(
        cls=seen.cls,
        means=means,
        position_mm=slices.position_mm,
        affine_ras=slices.affine_ras,
        planes=slices.planes,
        brain_ml=slices.brain_ml,
        patches=kept,
    )


def _tissue_patches(slices: Slices, patch_px: int) -> NDArray[np.bool_]:
    return patch_mean(tissue_mask(slices.pixels).astype(np.float32), patch_px) > 0.5


def _tissue_mean(grid: NDArray[np.float32], tissue: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Average the tissue patches of each slice (all of them where it has none), `[slices, dim]`."""
    counted = tissue | ~tissue.any(axis=(1, 2), keepdims=True)
    total = np.einsum("srcd,src->sd", grid, counted.astype(np.float32))
    return np.asarray(total / counted.sum(axis=(1, 2))[:, None], dtype=np.float32)


def _blemished(slices: Slices, count: int, rng: np.random.Generator) -> Blemished:
    """Paint blobs into `count` slices of each plane."""
    parts = []
    for stack in stacks(slices.planes).values():
        mm_per_px = float(np.linalg.norm(slices.affine_ras[stack.start, :3, 0]))
        found = blemish(slices.pixels[stack], mm_per_px, count, rng)
        parts.append(replace(found, index=found.index + stack.start))
    names = ("index", "pixels", "weight", "factor")
    return Blemished(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _joined(
    grids: dict[int, NDArray[np.float32]], patches: PatchConfig, reduction: Reduction | None
) -> NDArray[np.float16]:
    """Put the (reduced) tokens of the layers side by side, `[slices, rows, columns, layers * dim]`."""
    layers = [grids[layer] for layer in patches.layers]
    reduced = layers if reduction is None else [reduction(number, grid) for number, grid in enumerate(layers)]
    return np.concatenate(reduced, axis=-1).astype(np.float16)


def _fit_reduction(cohort: Cohort, backbone: Backbone, store: FeatureStore) -> Reduction:
    """Fit on scans that the `split` column gives to training, where there is one, else on the first of the cohort."""
    training = [scan for scan in cohort.scans if (scan.split or "").lower() in TRAINING_SPLITS] or cohort.scans
    samples, names = [], []
    for scan in training:
        try:
            slices = take_slices(load_volume(scan.path), store.slices)
            name = sha256(scan.path)
        except (ScanError, OSError):  # extraction goes over all scans again and says so
            continue
        grids = backbone.embed(slices.pixels, layers=store.patches.layers).patches
        rng = np.random.default_rng(int(name[:8], 16))
        patch_px = slices.pixels.shape[1] // grids[store.patches.layers[0]].shape[1]
        samples.append(sample_patches(grids, _tissue_patches(slices, patch_px), rng))
        names.append(name)
        if len(names) == MOST_SCANS:
            break
    if not names:
        raise ScanError(f"none of {len(training)} scans can be read, so no PCA can be fitted; use --patches.pca 0")
    return fit_reduction(samples, tuple(names), store.patches.pca)


def _prepare(scan: Scan, store: FeatureStore) -> tuple[Path, Slices | None, tuple[str, ...]]:
    target = store.path(scan.path)
    if target.exists():
        return target, None, ()
    volume = load_volume(scan.path)
    try:
        return target, take_slices(volume, store.slices), volume.notes
    except ScanError as error:
        raise ScanError(f"{scan.path}: {error}") from None


def _write_index(store: FeatureStore, rows: list[tuple[str, str, str, str]]) -> None:
    """Write which file belongs to which scan, for people; the program goes by content."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["scan_id", "path", "features", "notes"])
    writer.writerows(rows)
    write_text(store.folder / "index.csv", text.getvalue())
