"""What a reviewer would find in a cohort before any training: what invalidates a result, and what to ask about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinoatten3d.data.cohort import Cohort
from dinoatten3d.data.covariates import covariate_table
from dinoatten3d.data.inspect import Inspection
from dinoatten3d.evaluation.confounds import Association, associations, confound_findings, missing_findings
from dinoatten3d.evaluation.duplicates import duplicate_findings
from dinoatten3d.evaluation.findings import SEVERITIES, Finding
from dinoatten3d.evaluation.intervals import auroc_half_width
from dinoatten3d.evaluation.power import smallest_auroc
from dinoatten3d.evaluation.scan_checks import scan_findings
from dinoatten3d.evaluation.table_checks import class_findings, gap_findings, subject_findings
from dinoatten3d.learning.splits import group_folds

FORMAT_VERSION = 1
PLANNED = (0.75, 0.9)
"""AUROCs for which the width of the interval is planned."""


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """What so many subjects can show of one class against the others."""

    positive: str
    subjects: int
    others: int
    half_widths: dict[str, float]
    """AUROC -> half the width of its 95 % interval."""
    smallest_auroc: float
    """The smallest AUROC that is told from 0.5 with 80 % power."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The findings, worst first, with the figures behind them."""

    scans: int
    subjects: int
    target: str | None
    class_counts: dict[str, int]
    """Subjects a class."""
    looked_at: tuple[str, ...]
    findings: tuple[Finding, ...]
    associations: tuple[Association, ...]
    resolution: tuple[Resolution, ...]

    @property
    def invalid(self) -> bool:
        """Whether something was found that would invalidate any result."""
        return any(finding.severity == "invalid" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Give what `audit.json` holds."""
        found = asdict(self)
        found["associations"] = [{**asdict(a), "auroc": a.auroc._asdict()} for a in self.associations]
        return {"format_version": FORMAT_VERSION, "invalid": self.invalid, **found}


def audit(
    cohort: Cohort,
    inspections: Sequence[Inspection],
    *,
    embeddings: Sequence[NDArray[np.float32] | None] | None = None,
    brain_ml: NDArray[np.float64] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Audit:
    """Look for what would invalidate a result of this cohort.

    Args:
        cohort: The scans; without a target only what does not need labels is looked at.
        inspections: What `inspect_scan` found in each file, in the order of the scans.
        embeddings: CLS tokens of each scan, `[slices, dim]`, None for a scan that has none.
        brain_ml: Brain volume, `[scans]`, NaN where unknown; by default that of the inspected voxels.
        folds: Folds of the cross-validation to come.
        seed: Decides folds, permutations and bootstrap draws.
    """
    scans = cohort.scans
    subjects = np.array([scan.subject for scan in scans])
    voxels = [found.voxels for found in inspections]
    if brain_ml is None and any(voxels):
        brain_ml = np.array([v.brain_ml if v else np.nan for v in voxels])
    table = covariate_table(
        scans,
        brain_ml=brain_ml,
        headers=[found.header for found in inspections],
        grey_levels=[v.levels if v else np.nan for v in voxels] if any(voxels) else None,
        without=cohort.target,
    )
    findings = [
        *subject_findings(scans, labelled=cohort.target is not None),
        *duplicate_findings(scans, inspections, embeddings),
        *scan_findings(scans, inspections),
        *missing_findings(table),
        *gap_findings(cohort, embeddings),
    ]
    found: list[Association] = []
    resolution: list[Resolution] = []
    counts = _class_counts(cohort)
    if cohort.target is not None:
        findings += class_findings(counts, folds)
        labels = np.array([cohort.classes.index(scan.label or "") for scan in scans])
        if len(counts) > 1:
            fewest = min(counts.values())
            assigned = group_folds(labels, subjects, folds=min(folds, fewest), seed=seed) if fewest > 1 else None
            found = associations(table, labels, subjects, assigned, seed=seed)
            findings += confound_findings(found, table)
            resolution = _resolution(counts)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Audit(
        scans=len(scans),
        subjects=len(set(subjects)),
        target=cohort.target,
        class_counts=counts,
        looked_at=_looked_at(cohort, embeddings, any(voxels)),
        findings=tuple(findings),
        associations=tuple(found),
        resolution=tuple(resolution),
    )


def _class_counts(cohort: Cohort) -> dict[str, int]:
    return {name: len({scan.subject for scan in cohort.scans if scan.label == name}) for name in cohort.classes}


def _looked_at(cohort: Cohort, embeddings: Sequence[Any] | None, voxels: bool) -> tuple[str, ...]:
    parts = {"table": True, "files": True, "headers": True, "voxels": voxels, "features": embeddings is not None}
    parts["labels"] = cohort.target is not None
    return tuple(name for name, looked in parts.items() if looked)


def _resolution(counts: dict[str, int]) -> list[Resolution]:
    """What each class against the others can show; of two classes, the second against the first."""
    everyone = sum(counts.values())
    shown = list(counts)[1:] if len(counts) == 2 else list(counts)
    return [
        Resolution(
            positive=name,
            subjects=counts[name],
            others=everyone - counts[name],
            half_widths={
                f"{auroc:g}": auroc_half_width(counts[name], everyone - counts[name], auroc) for auroc in PLANNED
            },
            smallest_auroc=smallest_auroc(counts[name], everyone - counts[name]),
        )
        for name in shown
    ]
