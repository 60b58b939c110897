"""Runs side by side: one row each, and for every pair whether their answers to the same scans differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dinoatten3d.evaluation.answers import Answers, common_scans, one_scan_a_subject, other_files, read_answers
from dinoatten3d.evaluation.comparison import (
    Difference,
    McNemar,
    corrected_resampled_ttest,
    delong_test,
    holm,
    mcnemar,
    paired_bootstrap_difference,
)
from dinoatten3d.evaluation.judge import class_index, pooled_figures
from dinoatten3d.evaluation.metrics import score
from dinoatten3d.evaluation.verdict import P_VALUE
from dinoatten3d.learning.run import Run

Labels = NDArray[np.int64]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model: where it comes from, how many scans it scored, and its figures on the common ones."""

    name: str
    role: str
    description: str
    weights: str
    partition: str
    scans: int
    figures: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two models and the tests between them; every difference is a minus b, `p_holm` is p after Holm's correction.

    Attributes:
        a: Name of the first.
        b: Name of the second.
        auroc: Difference in AUROC over all common scans.
        decisions: McNemar's test of the most probable classes, one scan a subject.
        resampled: Mean difference in AUROC over folds (corrected resampled t-test); None where folds are no pairs.
        why_not_resampled: Why there is no such test; empty where there is one.
        sentence: What it means.
    """

    a: str
    b: str
    auroc: dict[str, float]
    decisions: dict[str, float]
    resampled: dict[str, float] | None
    why_not_resampled: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Models side by side on the scans that all of them scored."""

    target: str
    classes: list[str]
    scans: int
    subjects: int
    class_counts: dict[str, int]
    auroc_test: str
    notes: list[str]
    rows: list[Row]
    pairs: list[Pair]

    def to_dict(self) -> dict[str, Any]:
        """Give plain tables that JSON can hold."""
        return asdict(self)


def compare_runs(runs: Sequence[Run], *, with_baselines: bool = False) -> Comparison:
    """Compare runs on the scans that all of them scored.

    Args:
        runs: Two or more, of the same target and classes.
        with_baselines: Compare them with the baselines of the first run too (but these not with each other).

    Returns:
        A row for each model, and every pair: difference in AUROC with paired DeLong clustered by subject (two
        classes) or paired bootstrap of subjects (more), McNemar on one scan a subject, and the corrected resampled
        t-test where both have the same folds; p-values of each kind adjusted over the pairs (Holm 1979).

    Raises:
        RunError: There are fewer than two runs or one twice, they answer different questions, or their common
            scans do not allow it.
    """
    answers = read_answers(runs, with_baselines=with_baselines)
    common = common_scans(answers)
    classes, evaluation = list(runs[0].classes), runs[0].config["evaluation"]
    labels = class_index(common["label"], classes)
    given = {own.name: _probabilities(own.pooled.loc[common.index], classes) for own in answers}
    single = one_scan_a_subject(runs[0], common)
    pairs = [(a, b) for a, b in combinations(answers, 2) if "model" in (a.role, b.role)]
    subjects = common["subject"].to_numpy()
    rows = [_row(own, labels, given[own.name], subjects) for own in answers]
    aurocs = [_auroc_difference(labels, given[a.name], given[b.name], subjects, evaluation) for a, b in pairs]
    decisions = [
        mcnemar(labels[single], given[a.name].argmax(axis=1)[single], given[b.name].argmax(axis=1)[single])
        for a, b in pairs
    ]
    folded = [_resampled_difference(a, b, common.index, classes) for a, b in pairs]
    found = zip(pairs, _adjusted(aurocs), _adjusted(decisions), _adjusted(folded), folded, strict=True)
    value = {row.name: row.figures["auroc"]["value"] for row in rows}
    return Comparison(
        target=str(runs[0].config["cohort"]["target"]),
        classes=classes,
        scans=len(common),
        subjects=len(single),
        class_counts={name: int((labels == k).sum()) for k, name in enumerate(classes)},
        auroc_test="paired DeLong by subject" if len(classes) == 2 else "paired bootstrap of subjects",
        notes=_notes(answers, common, len(pairs)),
        rows=rows,
        pairs=[
            Pair(
                a=a.name,
                b=b.name,
                auroc=auroc,
                decisions=decision,
                resampled=resampled or None,
                why_not_resampled=reason if isinstance(reason, str) else "",
                sentence=pair_sentence((a.name, b.name), value, auroc, decision, resampled, len(single)),
            )
            for (a, b), auroc, decision, resampled, reason in found
        ],
    )


def pair_sentence(
    names: tuple[str, str],
    aurocs: dict[str, float],
    auroc: dict[str, float],
    decisions: dict[str, float],
    resampled: dict[str, float],
    subjects: int,
) -> str:
    """Say what the tests of a pair mean; the tests as in `Pair`, `aurocs` by name."""
    ahead, behind = names if auroc["value"] >= 0 else names[::-1]
    low, high = sorted([abs(auroc["low"]), abs(auroc["high"])]) if auroc["low"] * auroc["high"] > 0 else (None, None)
    seen = f"AUROC {aurocs[ahead]:.2f} against {aurocs[behind]:.2f}"
    if auroc["p_holm"] > P_VALUE:
        reach = max(abs(auroc["low"]), abs(auroc["high"]))
        said = (
            f"{ahead} and {behind} are not shown to differ ({seen}, {p_text(auroc['p_holm'])}); "
            f"a difference of up to {reach:.2f} is not excluded either."
        )
    else:
        range_ = f", by {low:.2f} to {high:.2f}" if low is not None else ""
        said = f"{ahead} tells the classes apart better than {behind} ({seen}{range_}, {p_text(auroc['p_holm'])})."
        if resampled and resampled["p_holm"] > P_VALUE:
            said += (
                f" Fold by fold this is not shown ({p_text(resampled['p_holm'])}): "
                "models trained on other subjects might come out otherwise."
            )
    own, other = ("only_a", "only_b") if ahead == names[0] else ("only_b", "only_a")
    differ = "differ" if decisions["p_holm"] <= P_VALUE else "are not shown to differ"
    return (
        f"{said} Of {subjects} decisions {ahead} alone is right in {decisions[own]:.0f} and {behind} alone in "
        f"{decisions[other]:.0f}: they {differ} ({p_text(decisions['p_holm'])})."
    )


def p_text(p_value: float) -> str:
    """Write a p-value as `p = 0.03` or `p < 0.001`."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}" if p_value < 0.1 else f"p = {p_value:.2f}"


def _row(own: Answers, labels: Labels, probabilities: Probabilities, subjects: NDArray[Any]) -> Row:
    return Row(
        name=own.name,
        role=own.role,
        description=own.description,
        weights=str(own.run.config["features"]["weights"]) if own.role == "model" else "",
        partition=own.partition(),
        scans=len(own.pooled),
        figures=pooled_figures(labels, probabilities, subjects, own.run.config["evaluation"]),
    )


def _auroc_difference(
    labels: Labels, a: Probabilities, b: Probabilities, subjects: NDArray[Any], evaluation: dict[str, Any]
) -> Difference:
    if a.shape[1] == 2:
        return delong_test(labels, a[:, 1], b[:, 1], subjects=subjects)
    return paired_bootstrap_difference(
        labels, a, b, subjects, replicates=evaluation["bootstrap"], seed=evaluation["seed"]
    )


def _resampled_difference(a: Answers, b: Answers, common: pd.Index[str], classes: list[str]) -> Difference | str:
    """Compare fold by fold, or say why not."""
    columns = ["repeat", "scan_id", "fold"]
    folds_of_a, folds_of_b = (own.splits[columns].sort_values(columns).reset_index(drop=True) for own in (a, b))
    if not folds_of_a.equals(folds_of_b):
        return "the folds differ, so that a fold of one has no partner in the other"
    aurocs = [[_fold_auroc(fold, common, classes) for fold in own.folds] for own in (a, b)]
    differences = np.array(aurocs[0]) - np.array(aurocs[1])
    if len(differences) < 2:
        return "there is a single fold"
    if not np.isfinite(differences).all():
        return "a fold lacks a class among the common scans, so that it has no AUROC"
    held_out = float(np.mean([len(fold) for fold in a.folds]))
    scans = a.splits["scan_id"].nunique()
    return corrected_resampled_ttest(differences, n_train=scans - held_out, n_test=held_out)


def _fold_auroc(fold: pd.DataFrame, common: pd.Index[str], classes: list[str]) -> float:
    rows = fold[fold.index.isin(common)]
    return score(class_index(rows["label"], classes), _probabilities(rows, classes)).auroc if len(rows) else np.nan


def _adjusted(found: Sequence[Difference | McNemar | str]) -> list[dict[str, float]]:
    """Correct the p-values of one kind of test for their number; where there is no test stays nothing."""
    tests = [test for test in found if not isinstance(test, str)]
    p_holm = iter(holm(np.array([test.p_value for test in tests])))
    return [{} if isinstance(test, str) else {**test._asdict(), "p_holm": float(next(p_holm))} for test in found]


def _notes(answers: Sequence[Answers], common: pd.DataFrame, pairs: int) -> list[str]:
    """Say what was left out, how cases were chosen, and what the tests can and cannot carry."""
    left = {own.name: len(own.pooled) - len(common) for own in answers if own.role == "model"}
    subjects = common["subject"].nunique()
    notes = []
    if any(left.values()):
        named = ", ".join(f"{count} of {name}" for name, count in left.items() if count)
        notes.append(f"Compared on the {len(common)} scans that every run scored; left out: {named}.")
    if others := other_files(answers, common):
        notes.append(
            f"The image files of {others} common scans differ between runs: their preprocessing is compared too."
        )
    chosen = "each subject has one scan" if subjects == len(common) else "each subject's first, by session and name"
    notes.append(f"McNemar's test takes cases for independent, so it sees one scan a subject ({chosen}).")
    if any(not own.splits.equals(answers[0].splits) for own in answers):
        notes.append(
            "Runs with different folds have no t-test over folds; the other tests hold, since each answer comes from a "
            "model that never saw the subject. Part of a difference may then owe to the folds; train with one seed."
        )
    if pairs > 1:
        notes.append(f"p-values are corrected for {pairs} pairs, each kind of test by itself (Holm).")
    notes.append("Picking the best of several runs and quoting its own figure flatters it; confirm it on other scans.")
    return notes


def _probabilities(answers: pd.DataFrame, classes: list[str]) -> Probabilities:
    return np.asarray(answers[[f"p_{name}" for name in classes]].to_numpy(np.float64))
