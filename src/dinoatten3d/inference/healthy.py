"""A healthy reference that is kept in a folder, and how far new scans are from it.

Every fold's reference is kept beside the held-out scores of its own healthy scans. A new scan is compared with each
healthy scan under the one reference that holds neither of the two, as in CV+ (Barber et al., 2021, Predictive inference
with the jackknife+, section 3), so its rank among them is that of one more held-out scan.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tomli_w
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dinoatten3d import __version__
from dinoatten3d.config import PatchConfig, SliceConfig
from dinoatten3d.data.cohort import stem
from dinoatten3d.data.slices import Slices, take_slices
from dinoatten3d.data.volume import Volume, load_volume
from dinoatten3d.errors import FeatureError, RunError
from dinoatten3d.features.backbone import Backbone
from dinoatten3d.features.extract import embed_slices
from dinoatten3d.features.reduce import read_reduction, write_reduction
from dinoatten3d.features.store import REDUCTION, FeatureStore
from dinoatten3d.files import sha256, write_bytes, write_text
from dinoatten3d.inference.anomaly import Anomalies, map_slice_scores
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.deviation import Deviation, top_slices
from dinoatten3d.toml import from_dict, to_dict

FORMAT_VERSION = 1
CONFIG, SCORES = "anomaly.toml", "scores.csv"
HEAVIEST = 5


@dataclass(frozen=True, kw_only=True)
class HealthyReference:
    """A folder that `dinoatten3d anomaly` left behind; get one with `open_reference`.

    `table` is its `scores.csv`: one row a scan with score, fold, content, and whether it was a reference.
    """

    folder: Path
    config: dict[str, Any]
    table: pd.DataFrame
    deviations: tuple[Deviation, ...]


@dataclass(frozen=True, kw_only=True)
class ScanAnomaly:
    """How far one scan is from the healthy ones.

    Attributes:
        scan: The file.
        score: Mean of its highest slices, in standard deviations of reference scans, mean over the references.
        farther_than: Held-out healthy scans that score lower under the same reference; ties count half.
        healthy: Held-out healthy scans in all.
        slice_scores: `[slices]`.
        patch_map: The larger of darker and brighter, 0 outside tissue, `[slices, rows, columns]`.
        slices: The pictures that were looked at.
        volume: The scan in RAS+.
        notes: What a reader should know, one sentence each.
    """

    scan: Path
    score: float
    farther_than: float
    healthy: int
    slice_scores: NDArray[np.float64]
    patch_map: NDArray[np.float32]
    slices: Slices
    volume: Volume
    notes: tuple[str, ...]

    @property
    def percentile(self) -> float:
        """Place among held-out healthy scans, in percent."""
        return 100 * self.farther_than / self.healthy

    def to_dict(self) -> dict[str, Any]:
        """Give what `score` writes as JSON."""
        heaviest = np.argsort(-self.slice_scores, kind="stable")[:HEAVIEST]
        planes, position_mm = self.slices.planes, self.slices.position_mm
        return {
            "scan": str(self.scan),
            "name": stem(self.scan),
            "score": self.score,
            "percentile": self.percentile,
            "farther_than": self.farther_than,
            "healthy": self.healthy,
            "heaviest_slices": [
                {
                    "slice": int(i),
                    "plane": planes[i],
                    "position_mm": float(position_mm[i]),
                    "score": float(self.slice_scores[i]),
                }
                for i in heaviest
            ],
            "notes": list(self.notes),
            "use": "for research, not for diagnosis",
        }


def write_reference(
    folder: Path, bags: Bags, found: Anomalies, *, store: FeatureStore, made_by: dict[str, Any]
) -> None:
    """Write what `open_reference` reads into a folder that exists: settings, scores, and the reference of each fold."""
    config = {
        "format_version": FORMAT_VERSION,
        "version": __version__,
        **made_by,
        "features": {"digest": store.digest, "backbone": dict(store.backbone)},
        "slices": to_dict(store.slices),
        "patches": to_dict(store.patches),
    }
    write_text(folder / CONFIG, tomli_w.dumps(config))
    content = [sha256(scan.path) if scan.path.exists() else "" for scan in bags.scans]
    table = found.table.assign(sha256=content).sort_values("score", ascending=False, kind="stable")
    write_text(folder / SCORES, table.to_csv(index=False))
    if store.reduction is not None:  # new scans are scored without the feature folder
        write_reduction(folder / REDUCTION, store.reduction)
    for fold, deviation in enumerate(found.deviations):
        write_bytes(folder / f"fold-{fold}.safetensors", save(deviation.tensors(), {"features": store.digest}))


def open_reference(folder: Path) -> HealthyReference:
    """Open a folder of `dinoatten3d anomaly`.

    Raises:
        RunError: It is not one, is damaged, or was written in another format.
    """
    if not (folder / CONFIG).exists():
        raise RunError(f"{folder} holds no healthy reference (no {CONFIG}); make one with `dinoatten3d anomaly`")
    try:
        config = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config.get("format_version") != FORMAT_VERSION:
            raise RunError(
                f"{folder} has format {config.get('format_version')}, this program reads {FORMAT_VERSION}; "
                "run `dinoatten3d anomaly` again"
            )
        text = dict.fromkeys(("scan_id", "subject", "label", "sha256"), str)
        table = pd.read_csv(folder / SCORES, dtype=text, keep_default_na=False)
        deviations = tuple(
            Deviation.from_tensors(load_file(folder / f"fold-{fold}.safetensors"))
            for fold in range(int(table["fold"].max()) + 1)
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RunError(f"{folder} is damaged ({error}); run `dinoatten3d anomaly` again") from None
    return HealthyReference(folder=folder, config=config, table=table, deviations=deviations)


def score_scan(reference: HealthyReference, scan: Path, backbone: Backbone) -> ScanAnomaly:
    """Say how far a scan is from the healthy ones.

    A scan of the cohort behind the reference (known by its content) is no new scan: only the reference of its own fold,
    which it is no part of, is asked, and it is not ranked against itself.

    Args:
        reference: An open reference.
        scan: NIfTI or DICOM.
        backbone: The encoder that made the reference's features.

    Raises:
        ScanError: The scan cannot be used.
        RunError: The backbone is another one.
    """
    made_with = reference.config["features"]["backbone"]
    for part in ("sha256", "position_table", "pixels"):
        wanted, seen = (identity.get(part, "ImageNet") for identity in (made_with, backbone.identity))
        if wanted != seen:
            raise RunError(
                f"{reference.folder} was made with {made_with['name']} ({part} {wanted[:12]}), not "
                f"{backbone.identity['name']} ({part} {seen[:12]}); pass the same with --backbone"
            )
    where = str(reference.folder / CONFIG)
    volume = load_volume(scan)
    slices = take_slices(volume, from_dict(SliceConfig, reference.config["slices"], where))
    patches = from_dict(PatchConfig, reference.config["patches"], where)
    reduction = read_reduction(reference.folder / REDUCTION) if patches.pca else None
    tokens = embed_slices(slices, backbone, patches, reduction=reduction).patches
    if tokens is None:
        raise FeatureError(f"{where} keeps no patch tokens; run `dinoatten3d anomaly` again")
    own = _row_of(reference.table, scan)
    folds = range(len(reference.deviations)) if own is None else [int(own["fold"])]
    maps = np.stack([reference.deviations[fold].patch_map(tokens) for fold in folds])
    by_slice = map_slice_scores(maps, np.broadcast_to(tokens.tissue, maps.shape))
    score = dict(zip(folds, top_slices(by_slice).tolist(), strict=True))
    notes = list(volume.notes)
    others = reference.table[reference.table["reference"]]
    if own is not None:
        role = "one of the healthy scans" if own["reference"] else "in the cohort"
        notes.append(
            f"this scan is {role} behind the reference: only fold {own['fold']}, which it is no part of, answers"
        )
        others = others[others["scan_id"] != own["scan_id"]]
    mine = np.array([score.get(fold, next(iter(score.values()))) for fold in others["fold"]])
    theirs = others["score"].to_numpy()
    return ScanAnomaly(
        scan=scan,
        score=float(np.mean(list(score.values()))),
        farther_than=float(((theirs < mine) + 0.5 * (theirs == mine)).sum()),
        healthy=len(others),
        slice_scores=by_slice.mean(axis=0),
        patch_map=maps.mean(axis=0, dtype=np.float32),
        slices=slices,
        volume=volume,
        notes=tuple(notes),
    )


def _row_of(table: pd.DataFrame, scan: Path) -> dict[str, Any] | None:
    """Find a scan of the cohort by its content; None for a new one."""
    same = table[table["sha256"] == sha256(scan)] if scan.exists() else table[:0]
    return None if same.empty else same.iloc[0].to_dict()
