"""An audit of a cohort, from its files or from features that are there already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dinoatten3d.config import EvaluationConfig
from dinoatten3d.data.cohort import Cohort
from dinoatten3d.data.inspect import Inspection, inspect_scan
from dinoatten3d.errors import ConfigError, FeatureError
from dinoatten3d.evaluation.audit import Audit, audit
from dinoatten3d.features.store import Features, FeatureStore
from dinoatten3d.files import write_json, write_text
from dinoatten3d.learning.bags import Bags
from dinoatten3d.report.audit_page import audit_page

Progress = Callable[[int, int], None]


READERS = 4
"""Scans that an audit reads at a time."""


def audit_cohort(
    cohort: Cohort,
    store: FeatureStore | None,
    *,
    voxels: bool = True,
    folds: int = 5,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Audit:
    """Look for what would invalidate a result before anything is trained; files, headers, voxels and features."""
    if folds < 2:
        raise ConfigError(f"folds is {folds}; it must be 2 or more")
    inspections = _inspect(cohort, voxels=voxels, progress=progress)
    if store is None:
        return audit(cohort, inspections, folds=folds, seed=seed)
    found = [_features_or_none(store, scan.path) for scan in cohort.scans]
    return audit(
        cohort,
        inspections,
        embeddings=[features.cls if features else None for features in found],
        brain_ml=np.array([features.brain_ml if features else np.nan for features in found]),
        folds=folds,
        seed=seed,
    )


def audit_bags(cohort: Cohort, bags: Bags, evaluation: EvaluationConfig) -> Audit:
    """Audit a cohort whose features are loaded already, without reading a voxel again."""
    return audit(
        cohort,
        _inspect(cohort, voxels=False),
        embeddings=[tokens[real].numpy() for tokens, real in zip(bags.features, bags.mask, strict=True)],
        brain_ml=bags.brain_ml,
        folds=evaluation.folds if evaluation.split == "folds" else 2,  # given splits make no demand on class sizes
        seed=evaluation.seed,
    )


def write_audit(found: Audit, out: Path) -> Sequence[Path]:
    """Write an audit: a `.json` or `.html` file, or both into a folder."""
    content = found.to_dict()
    paths = [out] if out.suffix in (".json", ".html") else [out / "audit.json", out / "audit.html"]
    for path in paths:
        if path.suffix == ".json":
            write_json(path, content)
        else:
            write_text(path, audit_page(content))
    return paths


def _inspect(cohort: Cohort, *, voxels: bool, progress: Progress = lambda done, total: None) -> list[Inspection]:
    """Inspect the files of a cohort, a few at a time, in order."""
    found = []
    with ThreadPoolExecutor(max_workers=READERS) as readers:
        for inspection in readers.map(lambda scan: inspect_scan(scan.path, voxels=voxels), cohort.scans):
            found.append(inspection)
            progress(len(found), len(cohort))
    return found


def _features_or_none(store: FeatureStore, scan: Path) -> Features | None:
    try:
        return store.read(scan)
    except (FeatureError, OSError):
        return None
