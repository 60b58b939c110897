"""One person under two names: files, voxels and embeddings that are too alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinoatten3d.data.cohort import Scan
from dinoatten3d.data.inspect import Inspection
from dinoatten3d.evaluation.findings import Finding, count, listed

ALIKE = 0.75
"""Similarity from which two scans are taken for one brain; measured in docs/log.md."""
FEWEST_SCANS = 10
"""With fewer scans the average scan says too little about what scans have in common."""


class Alike(NamedTuple):
    """Two scans (places in the cohort) and how alike they are, up to 1."""

    first: int
    second: int
    similarity: float


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


def near_duplicates(embeddings: NDArray[np.float32], people: Sequence[str], *, alike: float = ALIKE) -> list[Alike]:
    """Find scans of different subjects that look like one brain.

    The similarity is the cosine between scans, slice by slice, after the cohort's mean at each slice is taken away:
    what all brains share says nothing about who it is.

    Args:
        embeddings: CLS token of each slice, `[scans, slices, dim]`; slices at like places.
        people: Subject of each scan.
        alike: Least similarity to report.

    Returns:
        Pairs, most alike first.
    """
    centred = (embeddings - embeddings.mean(axis=0)).reshape(len(embeddings), -1)
    directions = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    similarity = directions @ directions.T
    names = np.asarray(people)
    similarity[names[:, None] == names[None, :]] = -1
    first, second = np.nonzero(np.triu(similarity >= alike, k=1))
    order = np.argsort(-similarity[first, second], kind="stable")
    return [Alike(int(a), int(b), float(similarity[a, b])) for a, b in zip(first[order], second[order], strict=True)]


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
        Alike(known[pair.first], known[pair.second], pair.similarity)
        for pair in near_duplicates(stacked, [scans[place].subject for place in known])
    ]
    pairs = [pair for pair in pairs if frozenset(pair[:2]) not in copies]
    if not pairs:
        return []
    named = listed(f"{scans[a].id} and {scans[b].id} ({similarity:.2f})" for a, b, similarity in pairs)
    return [
        Finding(
            code="near-duplicate-across-subjects",
            severity="invalid",
            seen=f"{count(len(pairs), 'pair')} of scans under different subjects look like one brain "
            f"(similarity of their features from {ALIKE:.2f}; 1 is a copy): {named}.",
            means="If it is one person, a fold can be trained on the brain that it is scored on.",
            advice="Look at both scans; if it is one person, give both rows the same subject.",
        )
    ]


def _named(scans: Sequence[Scan], groups: list[list[int]]) -> str:
    return listed(
        " = ".join(f"{scans[place].subject} ({scans[place].id}, row {scans[place].row})" for place in group)
        for group in groups
    )
