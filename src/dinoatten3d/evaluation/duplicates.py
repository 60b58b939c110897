"""One person under two names: files, voxels and embeddings that are too alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinoatten3d.data.cohort import Scan
from dinoatten3d.data.inspect import Inspection
from dinoatten3d.evaluation.findings import Finding, Severity, count, listed

SUSPECT, SURE = 7.0, 12.0
"""How far a pair must stand out to be suspected, or taken, to be one brain; measured in docs/log.md."""
SHRINKAGE = 0.1
"""Share of the mean variance that is added to every direction before whitening; few scans leave some at zero."""
FEWEST_SCANS = 10
"""With fewer scans the cohort says too little about how alike two brains usually are."""


class Alike(NamedTuple):
    """Two scans (places in the cohort), and how far their likeness stands out among all pairs of the cohort."""

    first: int
    second: int
    deviations: float


def duplicate_groups(inspections: Sequence[Inspection]) -> list[list[int]]:
    """Give the places of scans that are one file, or hold the same voxels; one list a group, in order.

    A copy that was renamed, compressed again or stored in another axis order has the same voxels.
    """
    groups: dict[str, list[int]] = {}
    for place, found in enumerate(inspections):
        content = found.voxels.digest if found.voxels else found.sha256
        if content:
            groups.setdefault(content, []).append(place)
    return [places for places in groups.values() if len(places) > 1]


def near_duplicates(embeddings: NDArray[np.float32], people: Sequence[str], *, least: float = SUSPECT) -> list[Alike]:
    """Find scans of different subjects that are alike as no other two of the cohort are.

    What all brains share at a slice, and what is the same in all slices of a scan (noise, gain, scanner), says nothing
    about who it is: both means are taken away, and the rest is whitened by the cohort's own covariance. The
    likeness is the cosine between scans; it stands out by so many robust standard deviations (1.4826 times the
    median absolute deviation) from the median over pairs of different subjects.

    Args:
        embeddings: CLS token of each slice, `[scans, slices, dim]`; slices at like places.
        people: Subject of each scan.
        least: Deviations from which a pair is reported.

    Returns:
        Pairs, most alike first.
    """
    own = embeddings - embeddings.mean(axis=0)
    own = own - own.mean(axis=1, keepdims=True)
    tokens = own.reshape(-1, own.shape[-1])
    variance, directions = np.linalg.eigh(tokens.T @ tokens / len(tokens))
    white = own @ (directions / np.sqrt(np.maximum(variance, 0) + SHRINKAGE * variance.mean() + 1e-12))
    flat = white.reshape(len(own), -1)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
    names = np.asarray(people)
    first, second = np.triu_indices(len(flat), k=1)
    strangers = names[first] != names[second]
    first, second = first[strangers], second[strangers]
    likeness = (flat @ flat.T)[first, second]
    if len(likeness) == 0:
        return []
    middle = np.median(likeness)
    deviations = (likeness - middle) / max(1.4826 * float(np.median(np.abs(likeness - middle))), 1e-6)
    order = np.argsort(-deviations, kind="stable")
    order = order[deviations[order] >= least]
    return [Alike(int(first[i]), int(second[i]), float(deviations[i])) for i in order]


def duplicate_findings(
    scans: Sequence[Scan], inspections: Sequence[Inspection], embeddings: Sequence[NDArray[np.float32] | None] | None
) -> list[Finding]:
    """Report copies, and scans of different subjects that are too alike."""
    groups = duplicate_groups(inspections)
    copies = {frozenset((a, b)) for group in groups for a in group for b in group if a != b}
    found = _copy_findings(scans, groups)
    return [*found, *_near_findings(scans, embeddings, copies)]


def _copy_findings(scans: Sequence[Scan], groups: list[list[int]]) -> list[Finding]:
    across = [g for g in groups if len({scans[place].subject for place in g}) > 1]
    contradicting = [g for g in groups if g not in across and len({scans[place].label for place in g}) > 1]
    within = [g for g in groups if g not in across and g not in contradicting]
    found = []
    if across:
        found.append(
            Finding(
                code="duplicate-across-subjects",
                severity="invalid",
                seen=f"{count(len(across), 'image stands', 'images stand')} under several subjects: "
                f"{_named(scans, across)}.",
                means="A fold can be trained on the very scan that it is scored on, and one of the names is wrong.",
                advice="Find out whose scan it is; keep one row, or give both rows the same subject.",
            )
        )
    if contradicting:
        found.append(
            Finding(
                code="duplicate-with-two-labels",
                severity="invalid",
                seen=f"{count(len(contradicting), 'image has', 'images have')} two labels: "
                f"{_named(scans, contradicting)}.",
                means="No model can be right about both.",
                advice="Keep the row with the right label.",
            )
        )
    if within:
        found.append(
            Finding(
                code="duplicate-within-subject",
                severity="warning",
                seen=f"{count(len(within), 'image stands', 'images stand')} in several rows of one subject: "
                f"{_named(scans, within)}.",
                means="It stays in one fold, so nothing leaks, but it counts twice.",
                advice="Keep one row of each; if they were to be two sessions, one file was copied by mistake.",
            )
        )
    return found


def _near_findings(
    scans: Sequence[Scan],
    embeddings: Sequence[NDArray[np.float32] | None] | None,
    copies: set[frozenset[int]],
) -> list[Finding]:
    known = [place for place, tokens in enumerate(embeddings or ()) if tokens is not None]
    shapes = {tokens.shape for tokens in embeddings or () if tokens is not None}
    if len(known) < FEWEST_SCANS or len(shapes) != 1:
        return []
    stacked = np.stack([tokens for tokens in embeddings or () if tokens is not None])
    pairs = [
        Alike(known[pair.first], known[pair.second], pair.deviations)
        for pair in near_duplicates(stacked, [scans[place].subject for place in known])
    ]
    pairs = [pair for pair in pairs if frozenset(pair[:2]) not in copies]
    advice = "Look at both scans; if it is one person, give both rows the same subject."
    means = "If it is one person, a fold can be trained on the brain that it is scored on."
    found = []
    grades: tuple[tuple[Severity, list[Alike], str], ...] = (
        ("invalid", [pair for pair in pairs if pair.deviations >= SURE], "are surely copies of one brain"),
        ("warning", [pair for pair in pairs if pair.deviations < SURE], "may be one brain"),
    )
    for severity, kept, words in grades:
        if kept:
            named = listed(f"{scans[a].id} and {scans[b].id} ({far:.0f})" for a, b, far in kept)
            seen = (
                f"{count(len(kept), 'pair')} of scans under different subjects {words}: {named} (how many standard "
                "deviations their likeness stands out from other pairs)."
            )
            code = "near-duplicate-across-subjects" if severity == "invalid" else "alike-across-subjects"
            found.append(Finding(code=code, severity=severity, seen=seen, means=means, advice=advice))
    return found


def _named(scans: Sequence[Scan], groups: list[list[int]]) -> str:
    return listed(
        " = ".join(f"{scans[place].subject} ({scans[place].id}, row {scans[place].row})" for place in group)
        for group in groups
    )
