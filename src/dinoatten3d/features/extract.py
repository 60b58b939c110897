"""Run the frozen backbone once over a cohort and keep what it saw."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoatten3d.config import PatchConfig, SliceConfig
from dinoatten3d.data.cohort import Cohort, Scan
from dinoatten3d.data.slices import Slices, take_slices
from dinoatten3d.data.volume import load_volume
from dinoatten3d.errors import ScanError
from dinoatten3d.features.backbone import Backbone
from dinoatten3d.features.blemish import blemish, patch_mean, tissue_mask
from dinoatten3d.features.store import Features, FeatureStore, PatchTokens, create_store
from dinoatten3d.files import write_text

Progress = Callable[[int, int], None]


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
                    store.write(target, embed_slices(pictures, backbone, patches, seed=seed))
                    embedded += 1
                if scan_notes:
                    notes[scan.id] = scan_notes
                rows.append((scan.id, str(scan.path), target.stem, "; ".join(scan_notes)))
            pending[number].cancel()
            progress(number + 1, len(cohort))
    _write_index(store, rows)
    return Extraction(store=store, embedded=embedded, found=found, failed=failed, notes=notes)


def embed_slices(slices: Slices, backbone: Backbone, patches: PatchConfig, *, seed: int | None = None) -> Features:
    """Embed the pictures of one scan; without a seed no blemish is painted."""
    tokens = backbone.embed(slices.pixels, layers=(patches.layer,) if patches.layer else ())
    kept = None
    if patches.layer:
        mm_per_px = float(np.linalg.norm(slices.affine_ras[:3, 0]))
        rng = np.random.default_rng(seed)
        spoiled = blemish(slices.pixels, mm_per_px, patches.blemished if seed is not None else 0, rng)
        tissue = tissue_mask(slices.pixels).astype(np.float32)
        shape = (0, *tokens.patches[patches.layer].shape[1:])
        patch_px = slices.pixels.shape[1] // shape[1]
        again = (
            backbone.embed(spoiled.pixels, layers=(patches.layer,)).patches[patches.layer]
            if len(spoiled.index)
            else None
        )
        kept = PatchTokens(
            tokens=tokens.patches[patches.layer].astype(np.float16),
            tissue=patch_mean(tissue, patch_px) > 0.5,
            blemished=np.zeros(shape, np.float16) if again is None else again.astype(np.float16),
            blemished_slice=spoiled.index,
            blemished_weight=patch_mean(spoiled.weight, patch_px),
            blemished_factor=spoiled.factor,
        )
    return Features(
        cls=tokens.cls,
        position_mm=slices.position_mm,
        affine_ras=slices.affine_ras,
        plane=slices.plane,
        brain_ml=slices.brain_ml,
        patches=kept,
    )


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
