"""Faults of the table: who is in which class and split, how many there are, and what it does not say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dinoatten3d.data.cohort import Cohort, Scan
from dinoatten3d.evaluation.duplicates import FEWEST_SCANS
from dinoatten3d.evaluation.findings import Finding, count, listed

FEW_SUBJECTS = 10


def subject_findings(scans: Sequence[Scan], *, labelled: bool) -> list[Finding]:
    """Report subjects of several classes or splits."""
    by_subject: dict[str, list[Scan]] = {}
    for scan in scans:
        by_subject.setdefault(scan.subject, []).append(scan)
    several = {name: own for name, own in by_subject.items() if len({scan.label for scan in own}) > 1}
    converted = {name for name, own in several.items() if _sessions_differ(own)}
    contradicting = [_with(own, "label") for name, own in several.items() if name not in converted]
    converting = [_with(own, "label") for name, own in several.items() if name in converted]
    parted = [_with(own, "split") for own in by_subject.values() if len({scan.split for scan in own} - {None}) > 1]
    found = []
    if labelled and contradicting:
        found.append(
            Finding(
                code="subject-in-several-classes",
                severity="invalid",
                seen=f"{count(len(contradicting), 'subject has', 'subjects have')} scans of several classes, not told "
                f"apart by session: {listed(contradicting)}.",
                means="Either a label is wrong or two people share a name; a model is asked to tell a person from "
                "himself.",
                advice="Mend the labels or the subjects; if people convert between visits, name the visits in a "
                "'session' column.",
            )
        )
    if labelled and converting:
        found.append(
            Finding(
                code="subject-changes-class",
                severity="warning",
                seen=f"{count(len(converting), 'subject changes', 'subjects change')} class between sessions: "
                f"{listed(converting)}.",
                means="Folds keep them together, so nothing leaks, but most of such a scan is the same brain.",
                advice="If this is meant (conversion, treatment), say so; else keep one session of each subject, or "
                "label all by the outcome.",
            )
        )
    if parted:
        found.append(
            Finding(
                code="subject-in-several-splits",
                severity="invalid",
                seen=f"{count(len(parted), 'subject stands', 'subjects stand')} in several values of 'split': "
                f"{listed(parted)}.",
                means="The test scans hold brains that the model was trained on.",
                advice="Give all scans of a subject the same split.",
            )
        )
    return found


def class_findings(counts: dict[str, int], folds: int) -> list[Finding]:
    """Report classes too small for the folds, or for anything."""
    if len(counts) < 2:
        return [
            Finding(
                code="one-class",
                severity="invalid",
                seen=f"All scans are of one class: {listed(counts)}.",
                means="There is nothing to tell apart.",
                advice="Check --target and --classes.",
            )
        ]
    found = []
    short = [f"{name} ({number})" for name, number in counts.items() if number < folds]
    few = [f"{name} ({number})" for name, number in counts.items() if folds <= number < FEW_SUBJECTS]
    if short:
        found.append(
            Finding(
                code="fewer-subjects-than-folds",
                severity="invalid",
                seen=f"Fewer subjects than the {folds} folds: {listed(short)}.",
                means="Some folds could not hold every class, so training refuses.",
                advice=f"Use --evaluation.folds {max(2, min(counts.values()))}, group classes, or add subjects.",
            )
        )
    if few:
        found.append(
            Finding(
                code="few-subjects",
                severity="warning",
                seen=f"Fewer than {FEW_SUBJECTS} subjects: {listed(few)}.",
                means="A figure for this class hangs on one or two people.",
                advice="Add subjects, or report it as a pilot.",
            )
        )
    return found


def gap_findings(cohort: Cohort, embeddings: Sequence[Any] | None) -> list[Finding]:
    """Say what could not be looked at."""
    scans = cohort.scans
    absent = [
        name
        for name in ("age", "sex", "site")
        if name != cohort.target and all(getattr(scan, name) is None for scan in scans)
    ]
    unseen = [scan.id for scan, tokens in zip(scans, embeddings or (), strict=False) if tokens is None]
    found = []
    if absent:
        found.append(
            Finding(
                code="not-in-table",
                severity="note",
                seen=f"The table does not name {' or '.join(absent)}.",
                means="Whether the classes differ in it cannot be looked at; a reviewer will ask.",
                advice="Add the columns where the values are known.",
            )
        )
    if embeddings is None or len(scans) < FEWEST_SCANS:
        reason = "no features were given" if embeddings is None else f"fewer than {FEWEST_SCANS} scans"
        found.append(
            Finding(
                code="near-duplicates-not-looked-for",
                severity="note",
                seen=f"Rescans of one person under two names were not looked for ({reason}).",
                means="Only copies of the same image would have been found.",
                advice="Run it again with --features after `extract`.",
            )
        )
    if unseen:
        found.append(
            Finding(
                code="no-features",
                severity="warning",
                seen=f"{count(len(unseen), 'scan has', 'scans have')} no features: {listed(unseen)}.",
                means="Training would refuse, and near-duplicates among them were not looked for.",
                advice="Run `dinoatten3d extract` again (it only adds).",
            )
        )
    return found


def _with(own: Sequence[Scan], field: str) -> str:
    """Give `sub-01 (AD, MCI)`."""
    return f"{own[0].subject} ({', '.join(sorted({str(getattr(scan, field)) for scan in own}))})"


def _sessions_differ(own: Sequence[Scan]) -> bool:
    """Whether every session of a subject has a name, and one label."""
    labels_of: dict[str | None, set[str | None]] = {}
    for scan in own:
        labels_of.setdefault(scan.session, set()).add(scan.label)
    return None not in labels_of and all(len(labels) == 1 for labels in labels_of.values())
