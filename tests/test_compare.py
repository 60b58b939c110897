"""Runs side by side: planted answers whose tests are known, and refusals of what is no pair."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tomli_w
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from dinoatten3d.errors import RunError
from dinoatten3d.evaluation.compare import compare_runs
from dinoatten3d.learning.run import FORMAT_VERSION, open_run
from dinoatten3d.report.comparison import compare_folders, comparison_lines, comparison_page

CLASSES = ("NL", "AD")
FOLDS = 4


def planted(
    folder: Path,
    *,
    strength: float,
    noise: int,
    scans: int = 80,
    classes: tuple[str, ...] = CLASSES,
    target: str = "DX",
    keep: slice = slice(None),
    fold_seed: int = 0,
    scans_a_subject: int = 1,
    swap: bool = False,
) -> Path:
    """A run folder as far as comparing reads it: answers of a given strength, every fold with every class."""
    label = np.arange(scans) // scans_a_subject % len(classes)
    rng = np.random.default_rng(noise)
    logits = rng.normal(size=(scans, len(classes))) + strength * np.eye(len(classes))[label]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    table = pd.DataFrame({"scan_id": [f"s{i:03d}" for i in range(scans)]})
    table["subject"] = [f"p{i // scans_a_subject:03d}" for i in range(scans)]
    shown = 1 - label if swap else label
    table["label"] = [classes[k] for k in shown]
    pairs = np.arange(scans) // scans_a_subject // len(classes)
    table["fold"] = np.random.default_rng(fold_seed).permutation(pairs.max() + 1)[pairs] % FOLDS
    table["predicted"] = [classes[k] for k in probabilities.argmax(axis=1)]
    for k, name in enumerate(classes):
        table[f"p_{name}"] = probabilities[:, k]
    table = table.iloc[keep]
    flat = table.assign(**{f"p_{name}": 1 / len(classes) for name in classes}, model="head size")
    folder.mkdir(parents=True)
    table.assign(repeat=0)[["scan_id", "subject", "label", "repeat", "fold"]].to_csv(folder / "splits.csv", index=False)
    table.to_csv(folder / "predictions.csv", index=False)
    flat.to_csv(folder / "baselines.csv", index=False)
    table[["scan_id", "subject", "label"]].assign(session="", sha256="").to_csv(folder / "cohort.csv", index=False)
    for k in range(FOLDS):
        (folder / f"fold-{k}").mkdir()
        table[table["fold"] == k].to_csv(folder / f"fold-{k}" / "predictions.csv", index=False)
        flat[flat["fold"] == k].to_csv(folder / f"fold-{k}" / "baselines.csv", index=False)
    config = {
        "format_version": FORMAT_VERSION,
        "run": {"recipe": f"strength {strength}"},
        "cohort": {"target": target, "classes": list(classes)},
        "features": {"weights": "some weights"},
        "evaluation": {"folds": FOLDS, "repeats": 1, "seed": 0, "bootstrap": 200, "split": "folds"},
    }
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    return folder


def compared(*folders: Path, with_baselines: bool = False):
    return compare_runs([open_run(folder) for folder in folders], with_baselines=with_baselines)


def test_a_planted_difference_is_found_by_all_three_tests(tmp_path: Path) -> None:
    good, bad = planted(tmp_path / "good", strength=2.5, noise=1), planted(tmp_path / "bad", strength=0.2, noise=2)
    found = compared(good, bad)
    pair = found.pairs[0]
    table = [pd.read_csv(folder / "predictions.csv") for folder in (good, bad)]
    aurocs = [roc_auc_score(t["label"] == "AD", t["p_AD"]) for t in table]
    assert pair.auroc["value"] == pytest.approx(aurocs[0] - aurocs[1])
    right = [(t["label"] == t["predicted"]).to_numpy() for t in table]
    only = [(right[0] & ~right[1]).sum(), (~right[0] & right[1]).sum()]
    assert [pair.decisions["only_a"], pair.decisions["only_b"]] == only
    assert pair.decisions["p_value"] == pytest.approx(binomtest(only[0], sum(only)).pvalue)
    by_fold = [[roc_auc_score(g["label"] == "AD", g["p_AD"]) for _, g in t.groupby("fold")] for t in table]
    assert pair.resampled is not None
    assert pair.resampled["value"] == pytest.approx(np.mean(np.subtract(*by_fold)))
    assert max(test["p_holm"] for test in (pair.auroc, pair.decisions, pair.resampled)) < 0.05
    assert pair.sentence.startswith("good tells the classes apart better than bad")
    assert "they differ" in pair.sentence


def test_the_order_of_the_runs_turns_signs_and_nothing_else(tmp_path: Path) -> None:
    a, b = planted(tmp_path / "a", strength=2, noise=1), planted(tmp_path / "b", strength=0.5, noise=2)
    there, back = compared(a, b).pairs[0], compared(b, a).pairs[0]
    assert there.auroc["value"] == pytest.approx(-back.auroc["value"])
    assert there.auroc["p_value"] == pytest.approx(back.auroc["p_value"])
    assert there.sentence == back.sentence


def test_models_of_equal_strength_are_not_called_different(tmp_path: Path) -> None:
    pair = compared(planted(tmp_path / "a", strength=1, noise=1), planted(tmp_path / "b", strength=1, noise=2)).pairs[0]
    assert "are not shown to differ" in pair.sentence
    assert "is not excluded" in pair.sentence


def test_a_copy_of_a_run_differs_by_nothing(tmp_path: Path) -> None:
    pair = compared(planted(tmp_path / "a", strength=1, noise=1), planted(tmp_path / "b", strength=1, noise=1)).pairs[0]
    assert (pair.auroc["value"], pair.auroc["p_value"], pair.decisions["p_value"]) == (0, 1, 1)


def test_p_values_are_corrected_over_pairs_and_baselines_only_meet_runs(tmp_path: Path) -> None:
    runs = [planted(tmp_path / n, strength=s, noise=i) for i, (n, s) in enumerate({"a": 2, "b": 1, "c": 1.5}.items())]
    found = compared(*runs, with_baselines=True)
    assert [row.name for row in found.rows] == ["a", "b", "c", "head size"]
    assert len(found.pairs) == 6
    raw = sorted(pair.auroc["p_value"] for pair in found.pairs)
    smallest = min(found.pairs, key=lambda pair: pair.auroc["p_value"])
    assert smallest.auroc["p_holm"] == pytest.approx(min(1, 6 * raw[0]))
    assert any("6 pairs" in note for note in found.notes)


def test_other_cohorts_are_compared_on_what_they_share_and_the_rest_is_counted(tmp_path: Path) -> None:
    a = planted(tmp_path / "a", strength=2, noise=1, keep=slice(0, 70))
    b = planted(tmp_path / "b", strength=1, noise=2, keep=slice(10, 80))
    found = compared(a, b)
    assert found.scans == 60
    assert "left out: 10 of a, 10 of b" in found.notes[0]
    shared = pd.read_csv(a / "predictions.csv").iloc[10:]
    assert found.rows[0].figures["auroc"]["value"] == pytest.approx(
        roc_auc_score(shared["label"] == "AD", shared["p_AD"])
    )
    assert found.pairs[0].resampled is None


def test_other_folds_have_no_t_test_and_the_page_says_why(tmp_path: Path) -> None:
    a = planted(tmp_path / "a", strength=2, noise=1)
    found = compared(a, planted(tmp_path / "b", strength=1, noise=2, fold_seed=1))
    assert found.pairs[0].resampled is None
    assert "the folds differ" in found.pairs[0].why_not_resampled
    assert any("the other tests hold" in note for note in found.notes)
    assert "the folds differ" in comparison_page(found)


def test_mcnemar_sees_one_scan_a_subject_whatever_the_order_of_the_runs(tmp_path: Path) -> None:
    a = planted(tmp_path / "a", strength=2, noise=1, scans_a_subject=2)
    b = planted(tmp_path / "b", strength=1, noise=2, scans_a_subject=2)
    table = pd.read_csv(b / "predictions.csv")
    table.iloc[::-1].to_csv(b / "predictions.csv", index=False)
    there, back = compared(a, b), compared(b, a)
    assert (there.scans, there.subjects) == (80, 40)
    assert there.pairs[0].decisions["only_a"] == back.pairs[0].decisions["only_b"]
    first = [pd.read_csv(f / "predictions.csv").sort_values("scan_id").groupby("subject").first() for f in (a, b)]
    right = [(t["label"] == t["predicted"]).to_numpy() for t in first]
    assert there.pairs[0].decisions["only_a"] == (right[0] & ~right[1]).sum()


def test_more_classes_are_compared_by_bootstrap(tmp_path: Path) -> None:
    names = ("NL", "MCI", "AD")
    a = planted(tmp_path / "a", strength=3, noise=1, scans=120, classes=names)
    found = compared(a, planted(tmp_path / "b", strength=0, noise=2, scans=120, classes=names))
    assert found.auroc_test == "paired bootstrap of subjects"
    assert found.pairs[0].auroc["p_holm"] < 0.01
    assert found.pairs[0].sentence.startswith("a tells")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": "group"}, "the target of a: DX; of b: group"),
        ({"classes": ("NL", "MCI")}, "the classes of a: NL, AD; of b: NL, MCI"),
        ({"classes": ("AD", "NL")}, "in the same order"),
        ({"swap": True}, "another label in b than in a (scan s000"),
        ({"scans_a_subject": 2}, "have another"),
        ({"keep": slice(0, 3)}, "hold 1 subjects of class 'AD', 2 or more are needed"),
    ],
)
def test_what_is_no_pair_is_refused_in_one_sentence(tmp_path: Path, change: dict, said: str) -> None:
    a = planted(tmp_path / "a", strength=1, noise=1)
    with pytest.raises(RunError) as error:
        compared(a, planted(tmp_path / "b", strength=1, noise=2, **change))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_one_run_a_run_twice_and_strangers_are_refused(tmp_path: Path) -> None:
    a = planted(tmp_path / "a", strength=1, noise=1, keep=slice(0, 40))
    with pytest.raises(RunError, match="two or more"):
        compared(a)
    with pytest.raises(RunError, match="is given twice"):
        compared(a, tmp_path / "a" / ".." / "a")
    with pytest.raises(RunError, match="no scan in common"):
        compared(a, planted(tmp_path / "b", strength=1, noise=2, keep=slice(40, 80)))


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [planted(tmp_path / place / "run", strength=1, noise=n) for n, place in enumerate("xy")]
    assert [row.name for row in compared(*folders).rows] == ["x/run", "y/run"]


def test_the_page_holds_everything_escapes_names_and_is_the_same_each_time(tmp_path: Path) -> None:
    hostile = planted(tmp_path / "<script>alert(1)<", strength=2, noise=1)
    out = tmp_path / "out"
    lines = compare_folders([hostile, planted(tmp_path / "b", strength=1, noise=2)], out=out, with_baselines=True)
    page = (out / "comparison.html").read_text()
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert "http:" not in page
    assert "https:" not in page
    assert page.count('role="img"') == 2
    document = json.loads((out / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert all(pair["sentence"] in lines for pair in document["pairs"])
    found = compared(hostile, tmp_path / "b", with_baselines=True)
    assert comparison_page(found) == page
    assert comparison_lines(found) == lines[:-1]
    with pytest.raises(RunError, match="exists"):
        compare_folders([hostile, tmp_path / "b"], out=out, with_baselines=False)
