"""Another cohort is scored by the models as they are, and nobody that they have seen is let in."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from conftest import head
from dinoatten3d.cli import app
from dinoatten3d.config import EvaluationConfig, PatchConfig, Recipe, SliceConfig, TrainingConfig
from dinoatten3d.data.cohort import read_cohort
from dinoatten3d.errors import RunError
from dinoatten3d.evaluation.answers import read_answers
from dinoatten3d.features.backbone import load_backbone
from dinoatten3d.features.extract import extract
from dinoatten3d.features.store import open_store
from dinoatten3d.features.weights import find_weights
from dinoatten3d.learning.run import open_run
from dinoatten3d.steps.evaluate import evaluate_run
from dinoatten3d.steps.train import report_run, train_run

SLICES = SliceConfig(count=6, size_px=112)
PATCHES = PatchConfig(layers=(2,), blemished=3)


@pytest.fixture(autouse=True)
def no_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipe layers that another test's command left on the app have no part here."""
    monkeypatch.setattr(app, "config", ())


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, cohort_folder: Path, tiny_backbone_folder: Path) -> Path:
    """A run, and the features of a second cohort of twelve people."""
    room = tmp_path_factory.mktemp("external")
    (room / "other").mkdir()
    rows = ["path,subject,DX,age"]
    for number in range(12):
        array = head(seed=100 + number)
        if number % 2:
            array[15:25, 15:30, 22:30] *= 0.1
        nib.Nifti1Image(array, np.diag([4.0, 4.0, 4.0, 1.0])).to_filename(room / "other" / f"o{number}.nii.gz")
        rows.append(f"o{number}.nii.gz,o{number},{'AD' if number % 2 else 'NL'},{50 + number}")
    (room / "other" / "other.csv").write_text("\n".join(rows) + "\n")
    backbone = load_backbone(find_weights(str(tiny_backbone_folder)))
    for table in (cohort_folder / "cohort.csv", room / "other" / "other.csv"):
        store = extract(read_cohort(table), backbone, room / "features", slices=SLICES, patches=PATCHES).store
    train_run(
        read_cohort(cohort_folder / "cohort.csv", target="DX", classes=["NL", "AD"]),
        store,
        room / "run",
        recipe=Recipe(training=TrainingConfig(epochs=5)),
        recipe_name="default",
        evaluation=EvaluationConfig(folds=3, bootstrap=100, shuffles=2),
    )
    (room / "store.txt").write_text(str(store.folder))
    return room


def evaluate(room: Path, table: Path, out: Path) -> None:
    features = (room / "store.txt").read_text()
    app(
        ["evaluate", str(room / "run"), "--cohort", str(table), "--features", features, "--out", str(out)],
        result_action="return_value",
    )


def test_the_answers_are_those_of_the_run_and_every_control_is_there(room: Path, tmp_path: Path) -> None:
    evaluate(room, room / "other" / "other.csv", tmp_path / "out")
    predictions = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert list(predictions["subject"]) == [f"o{n}" for n in range(12)]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["models"][0]["pooled"]["auroc"]["value"] > 0.8
    assert [m["name"] for m in metrics["models"]][1:] == [
        "prior",
        "head size",
        "covariates",
        "mean pooling",
        "max pooling",
        "random attention",
    ]
    assert metrics["shuffled"]["runs"] == 999
    page = (tmp_path / "out" / "report.html").read_text()
    assert "An evaluation on another cohort" in page
    assert not list((tmp_path / "out").rglob("model.safetensors"))


def test_the_order_of_the_classes_given_changes_nothing(room: Path, tmp_path: Path) -> None:
    store = open_store(Path((room / "store.txt").read_text()))
    for name, classes in (("one", ["NL", "AD"]), ("two", ["AD", "NL"])):
        table = read_cohort(room / "other" / "other.csv", target="DX", classes=classes)
        evaluate_run(open_run(room / "run"), table, store, tmp_path / name)
    for file in ("predictions.csv", "baselines.csv", "decisions.csv"):
        assert (tmp_path / "one" / file).read_text() == (tmp_path / "two" / file).read_text()


def test_an_evaluation_does_not_claim_the_split_or_the_shuffles_of_its_run(room: Path, tmp_path: Path) -> None:
    evaluate(room, room / "other" / "other.csv", tmp_path / "out")
    evaluation = open_run(tmp_path / "out")
    assert set(evaluation.config["evaluation"]) == {"seed", "bootstrap", "sensitivity", "alpha", "repeats"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "runs of the whole pipeline" not in page
    assert "999 draws, against the same answers" in page
    report_run(tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_text() == page
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    answers = read_answers([evaluation, open_run(tmp_path / "other")])
    assert answers[0].partition() == "another cohort, by the models of run"


def test_without_the_runs_own_scans_only_the_class_frequencies_are_left(room: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(room / "run", run)
    cohort = (run / "cohort.csv").read_text()
    (run / "cohort.csv").write_text(cohort.replace("/scan", "/gone"))
    table = read_cohort(room / "other" / "other.csv", target="DX", classes=["NL", "AD"])
    evaluate_run(open_run(run), table, open_store(Path((room / "store.txt").read_text())), tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [m["name"] for m in metrics["models"]][1:] == ["prior"]


def test_a_person_or_a_file_of_the_run_is_refused(room: Path, cohort_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="row 2: subject s00 is in the run's own cohort"):
        evaluate(room, cohort_folder / "cohort.csv", tmp_path / "out")
    renamed = tmp_path / "renamed.csv"
    text = (cohort_folder / "cohort.csv").read_text().replace("scans/", f"{cohort_folder}/scans/")
    renamed.write_text(re.sub(r",s(\d)", r",new\1", text))
    with pytest.raises(RunError, match=r"scan00.nii.gz is the same file as scan00 of the run's own cohort"):
        evaluate(room, renamed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_evaluation_has_no_models_to_evaluate_with(room: Path, tmp_path: Path) -> None:
    evaluate(room, room / "other" / "other.csv", tmp_path / "out")
    (tmp_path / "again").mkdir()
    with pytest.raises(RunError, match="is an evaluation and has no models of its own"):
        app(
            [
                "evaluate",
                str(tmp_path / "out"),
                "--cohort",
                str(room / "other" / "other.csv"),
                "--features",
                (room / "store.txt").read_text(),
                "--out",
                str(tmp_path / "again" / "x"),
            ],
            result_action="return_value",
        )


def test_a_class_that_the_run_does_not_know_is_refused(room: Path, tmp_path: Path) -> None:
    table = read_cohort(room / "other" / "other.csv", target="DX", classes=["NL", "Alzheimer=AD"])
    with pytest.raises(RunError, match="class 'Alzheimer' is none of the run's: NL, AD"):
        evaluate_run(
            open_run(room / "run"), table, open_store(Path((room / "store.txt").read_text())), tmp_path / "out"
        )


def test_a_cohort_without_one_of_the_classes_is_refused_and_leaves_nothing(room: Path, tmp_path: Path) -> None:
    table = read_cohort(room / "other" / "other.csv", target="DX", classes=["AD"], ignore=["NL"])
    store = open_store(Path((room / "store.txt").read_text()))
    with pytest.raises(RunError, match="no scan of this cohort is of class 'NL'"):
        evaluate_run(open_run(room / "run"), table, store, tmp_path / "out")
    assert not (tmp_path / "out").exists()
