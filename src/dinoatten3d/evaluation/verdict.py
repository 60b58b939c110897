"""The verdict of a run in a headline and a few sentences: beyond chance, and beyond what is simpler?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dinoatten3d.config import AdjustConfig
from dinoatten3d.evaluation.comparison import Difference

P_VALUE = 0.05
NEARLY_UNIFORM = 0.98


class Verdict(NamedTuple):
    """`level` is yes (beyond chance and the baselines), weak (beyond chance only) or no."""

    level: str
    headline: str
    sentences: list[str]


def reach_verdict(
    model: dict[str, Any], best: dict[str, Any], gain: Difference, shuffled: dict[str, Any] | None, classes: list[str]
) -> Verdict:
    """Say whether the model tells the classes apart, and whether something simpler does as well.

    Args:
        model: Figures of the model, as in `metrics.json`.
        best: Figures of the best baseline.
        gain: AUROC of the model minus that of the best baseline, on the same scans.
        shuffled: Figures of the pipeline on shuffled labels, where it was run.
        classes: Names of the classes.
    """
    told = f"{', '.join(classes[:-1])} and {classes[-1]}"
    auroc = model["pooled"]["auroc"]
    sentences = [
        f"AUROC {auroc['value']:.2f} (95 % interval {auroc['low']:.2f} to {auroc['high']:.2f}) on scans that the model "
        "had not seen; 0.50 is chance.",
        *_shuffled_sentences(shuffled),
    ]
    rival = f"{best['name']} ({best['description']}) reaches {best['pooled']['auroc']['value']:.2f}"
    reached = shuffled is not None and shuffled["p_value"] > P_VALUE and shuffled["reached"] > 0
    if not auroc["low"] > 0.5 or reached:
        sentences.append(f"For comparison, {rival}.")
        return Verdict("no", f"No evidence that these scans tell {told} apart", sentences)
    difference = f"difference {gain.value:+.2f}, {gain.low:+.2f} to {gain.high:+.2f}"
    if gain.low > 0:
        sentences.append(f"The best of the controls, {rival}; the model does better ({difference}).")
        return Verdict("yes", f"The scans tell {told} apart", sentences)
    sentences.append(f"{rival[0].upper()}{rival[1:]}; the model is not shown to do better ({difference}).")
    if best["name"] in ("head size", "covariates"):
        known = "Brain volume" if best["name"] == "head size" else "What the table knows of a person"
        sentences.append(f"{known} alone may be all that the model sees.")
    return Verdict("weak", f"The scans tell {told} apart, but something simpler does as well", sentences)


def adjustment_sentences(adjust: AdjustConfig, split: str) -> list[str]:
    """Say what the features were adjusted for, and where that could do nothing."""
    if not adjust.covariates:
        return []
    names = [name.replace("-", " ") for name in adjust.covariates]
    if adjust.method == "combat":
        kept = [name for name in names if name != "site"]
        how = "harmonised between sites (ComBat" + (f", {' and '.join(kept)} preserved)" if kept else ")")
    else:
        how = f"adjusted for {', '.join(names[:-1])}{' and ' if names[:-1] else ''}{names[-1]}"
    sentences = [
        f"The features of the model and of the image controls were {how}, fitted on the training scans of each fold "
        "without their class."
    ]
    if split == "site" and "site" in names:
        sentences.append("A held-out site is not among the training scans, so that its features were left as they are.")
    return sentences


def attention_sentences(attention: dict[str, float]) -> list[str]:
    """Warn where the weights are as good as uniform."""
    if attention["normalised_entropy"] < NEARLY_UNIFORM:
        return []
    return [
        "The slice weights hardly differ from uniform "
        f"(normalised entropy {attention['normalised_entropy']:.3f}): read nothing into which slice weighs most."
    ]


def _shuffled_sentences(shuffled: dict[str, Any] | None) -> Sequence[str]:
    if shuffled is None:
        return ["The pipeline was not run on shuffled labels."]
    spread = f"{shuffled['mean']:.2f} on average ({shuffled['low']:.2f} to {shuffled['high']:.2f})"
    what = "With shuffled labels the same pipeline reaches" if shuffled["pipeline"] else "Shuffled labels give"
    return [
        f"{what} {spread} in {shuffled['runs']} runs; {shuffled['reached']} of them reach the model's figure "
        f"(p = {shuffled['p_value']:.3f})."
    ]
