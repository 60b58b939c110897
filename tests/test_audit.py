"""The audit finds what was planted, says nothing where nothing is, and its statistics are those of other code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, hypergeom, rankdata
from sklearn.linear_model import LogisticRegression

from conftest import head, shared
from dinoatten3d.data.cohort import Cohort, Scan, read_cohort
from dinoatten3d.data.covariates import covariate_matrix, covariate_table
from dinoatten3d.data.header import Header, read_header
from dinoatten3d.data.inspect import Inspection, Voxels, inspect_scan
from dinoatten3d.errors import ConfigError
from dinoatten3d.evaluation.audit import Audit, audit
from dinoatten3d.evaluation.confounds import associations, confound_findings
from dinoatten3d.evaluation.covariates import covariate_probabilities
from dinoatten3d.evaluation.duplicates import near_duplicates
from dinoatten3d.evaluation.intervals import delong_interval
from dinoatten3d.evaluation.power import smallest_auroc
from dinoatten3d.learning.splits import group_folds
from dinoatten3d.report.audit_page import audit_page
from dinoatten3d.steps.audit import audit_cohort

HEADER = Header(
    shape=(80, 96, 80), spacing_mm=(2.0, 2.0, 2.0), axes="RAS", tilt_degrees=0.0, oriented=True, stored_as="float32"
)
VOXELS = Voxels(
    digest="",
    lowest=0.0,
    highest=150.0,
    levels=250,
    clipped=0.0,
    brain_ml=1400.0,
    extent_mm=(140.0, 170.0, 130.0),
    empty_slices=0,
    cut_mm2=0.0,
    notes=(),
)


def make_cohort(count: int = 24, target: str | None = "DX", **columns: list) -> tuple[Cohort, list[Inspection]]:
    """A faultless cohort of two classes in turn, with covariates that know nothing; columns replace its own."""
    rng = np.random.default_rng(0)
    own: dict[str, list] = {
        "subject": [f"s{i:03d}" for i in range(count)],
        "label": [("NL", "AD")[i % 2] for i in range(count)],
        "age": [float(a) for a in rng.integers(50, 80, count)],
        "sex": ["fm"[i // 2 % 2] for i in range(count)],
        "site": ["AB"[i // 4 % 2] for i in range(count)],
    } | columns
    scans = tuple(
        Scan(id=f"scan{i:03d}", path=Path(f"scan{i:03d}.nii"), row=i + 2, **{k: v[i] for k, v in own.items()})
        for i in range(count)
    )
    inspections = [
        Inspection(sha256=f"{i:064d}", header=HEADER, voxels=replace(VOXELS, digest=f"d{i}")) for i in range(count)
    ]
    classes = tuple(sorted({s.label for s in scans}, reverse=True)) if target else ()
    return Cohort(scans=scans, classes=classes, target=target, source=Path("cohort.csv")), inspections


def codes(found: Audit) -> dict[str, str]:
    return {finding.code: finding.severity for finding in found.findings}


def test_a_faultless_cohort_has_nothing_worse_than_a_note() -> None:
    cohort, inspections = make_cohort()
    found = audit(cohort, inspections)
    assert not found.invalid
    assert codes(found) == {"near-duplicates-not-looked-for": "note"}


def test_a_subject_of_two_classes_is_invalid_unless_sessions_tell_them_apart() -> None:
    subject = ["p", "p", *[f"s{i}" for i in range(22)]]
    cohort, inspections = make_cohort(subject=subject)
    assert codes(audit(cohort, inspections))["subject-in-several-classes"] == "invalid"
    cohort, inspections = make_cohort(subject=subject, session=["1", "2", *[None] * 22])
    converted = codes(audit(cohort, inspections))
    assert converted["subject-changes-class"] == "warning"
    assert "subject-in-several-classes" not in converted
    cohort, inspections = make_cohort(subject=subject, session=["1", "1", *[None] * 22])
    assert codes(audit(cohort, inspections))["subject-in-several-classes"] == "invalid"


def test_a_subject_in_two_splits_is_invalid() -> None:
    subject = ["p", "s0", "p", *[f"s{i}" for i in range(1, 22)]]
    cohort, inspections = make_cohort(subject=subject, split=["train", "train", "test", *["train"] * 21])
    assert codes(audit(cohort, inspections))["subject-in-several-splits"] == "invalid"
    cohort, inspections = make_cohort(subject=subject, split=["train", "train", None, *["train"] * 21])
    assert "subject-in-several-splits" not in codes(audit(cohort, inspections))


@pytest.mark.parametrize(
    ("subject", "label", "code", "severity"),
    [
        (["a", "b"], ["NL", "NL"], "duplicate-across-subjects", "invalid"),
        (["a", "a"], ["NL", "NL"], "duplicate-within-subject", "warning"),
        (["a", "a"], ["NL", "AD"], "duplicate-with-two-labels", "invalid"),
    ],
)
def test_a_copied_image_is_found_and_weighed_by_whose_it_is(subject, label, code, severity) -> None:
    rest = range(22)
    cohort, inspections = make_cohort(
        subject=[*subject, *[f"s{i}" for i in rest]], label=[*label, *[("NL", "AD")[i % 2] for i in rest]]
    )
    inspections[1] = replace(inspections[1], voxels=replace(VOXELS, digest="d0"))
    found = {code: s for code, s in codes(audit(cohort, inspections)).items() if code.startswith("duplicate")}
    assert found == {code: severity}


def brains(count: int = 40) -> np.ndarray:
    """Tokens of different people: what they share, what is the scan's in all slices, what is their own."""
    rng = np.random.default_rng(1)
    everyone, scanner = 5 * rng.normal(size=(6, 32)), 2 * rng.normal(size=(count, 1, 32))
    return np.asarray(everyone + scanner + rng.normal(size=(count, 6, 32)), np.float32)


@pytest.mark.parametrize(("noise", "code"), [(0.1, "near-duplicate-across-subjects"), (0.8, "alike-across-subjects")])
def test_one_brain_under_two_names_is_found_among_different_brains(noise, code) -> None:
    rng, tokens = np.random.default_rng(2), brains()
    cohort, inspections = make_cohort(40)
    assert codes(audit(cohort, inspections, embeddings=list(tokens))) == {}
    tokens[7] = tokens[3] + noise * rng.normal(size=(6, 32)) + 3 * rng.normal(size=32)  # noise, and another scanner
    found = audit(cohort, inspections, embeddings=list(tokens))
    assert list(codes(found)) == [code]
    assert "scan003 and scan007" in found.findings[0].seen
    people = [s.subject for s in cohort.scans]
    people[7] = people[3]
    assert near_duplicates(tokens, people) == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"lowest": -3.0}, "negative-intensities"),
        ({"levels": 12}, "few-grey-levels"),
        ({"clipped": 0.1}, "clipped"),
        ({"empty_slices": 2}, "empty-slices"),
        ({"cut_mm2": 900.0}, "brain-cut-off"),
        ({"brain_ml": 300.0}, "odd-brain-size"),
        ({"extent_mm": (140.0, 130.0, 170.0)}, "wrong-axes"),
        ({"highest": 1.0}, "odd-intensities"),
        ({"notes": ("3 voxels were NaN or infinite and became the smallest finite value",)}, "not-finite"),
    ],
)
def test_an_odd_scan_is_named(change, code) -> None:
    cohort, inspections = make_cohort()
    inspections[5] = replace(inspections[5], voxels=replace(VOXELS, digest="odd", **change))
    found = next(f for f in audit(cohort, inspections).findings if f.code == code)
    assert "scan005" in found.seen
    assert found.severity in ("warning", "note")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"axes": "PSR"}, "odd-axes"),
        ({"oriented": False}, "no-orientation"),
        ({"tilt_degrees": 25.0}, "oblique"),
        ({"spacing_mm": (1.0, 2.0, 2.0), "shape": (160, 96, 80)}, "odd-grid"),
        ({"shape": (80, 96, 40)}, "odd-grid"),
        ({"spacing_mm": (2.0, 2.0, 4.2)}, "thick-slices"),
    ],
)
def test_an_odd_header_is_named(change, code) -> None:
    cohort, inspections = make_cohort()
    inspections[5] = replace(inspections[5], header=replace(HEADER, **change))
    assert "scan005" in next(f.seen for f in audit(cohort, inspections).findings if f.code == code)


def test_an_unreadable_scan_is_invalid() -> None:
    cohort, inspections = make_cohort()
    inspections[4] = Inspection(sha256="x", header=None, voxels=None, problem="scan004.nii is cut short")
    assert codes(audit(cohort, inspections))["unreadable-scan"] == "invalid"


def test_a_site_that_is_the_class_is_invalid_and_one_that_leans_is_a_warning() -> None:
    labels = [("NL", "AD")[i % 2] for i in range(60)]
    cohort, inspections = make_cohort(60, site=["B" if label == "AD" else "A" for label in labels])
    assert codes(audit(cohort, inspections))["scanner-decides-label"] == "invalid"
    leaning = ["B" if (label == "AD") != (i % 10 < 2) else "A" for i, label in enumerate(labels)]
    cohort, inspections = make_cohort(60, site=leaning)
    found = codes(audit(cohort, inspections))
    assert found["scanner-goes-with-label"] == "warning"
    assert "scanner-decides-label" not in found


def test_ages_missing_in_one_class_are_a_warning() -> None:
    cohort, inspections = make_cohort(40, age=[60.0 + i if i % 2 or i > 36 else None for i in range(40)])
    found = codes(audit(cohort, inspections))
    assert found["missing-goes-with-label"] == "warning"
    assert found["missing-covariates"] == "note"


def test_small_classes_are_told_against_the_folds() -> None:
    cohort, inspections = make_cohort(24, label=["AD" if i < 3 else "NL" for i in range(24)])
    assert codes(audit(cohort, inspections, folds=5))["fewer-subjects-than-folds"] == "invalid"
    assert codes(audit(cohort, inspections, folds=3))["few-subjects"] == "warning"
    cohort, inspections = make_cohort(24, label=["NL"] * 24)
    assert codes(audit(cohort, inspections))["one-class"] == "invalid"


def test_an_audit_of_one_fold_is_refused() -> None:
    cohort, _ = make_cohort()
    with pytest.raises(ConfigError, match="folds is 1"):
        audit_cohort(cohort, None, folds=1)


def test_the_target_itself_is_no_covariate() -> None:
    labels = [("f", "m")[i % 2] for i in range(24)]
    cohort, inspections = make_cohort(label=labels, sex=labels, target="sex")
    assert "sex" not in [a.covariate for a in audit(cohort, inspections).associations]


def test_covariates_that_know_nothing_are_rarely_accused() -> None:
    rng, accused = np.random.default_rng(2), 0
    for _ in range(60):
        labels = rng.permutation(np.arange(40) % 2)
        table = pd.DataFrame(
            {"age": rng.normal(size=40), "site": rng.choice(list("ABC"), 40), "b": rng.normal(size=40)}
        )
        found = associations(table, labels, np.arange(40).astype(str), None)
        accused += bool(confound_findings(found, table))
    assert accused <= 9  # 5 %, 3 of 60, are meant; a chance of 1 in 500 to see more than 9


def test_sessions_of_one_person_are_no_further_evidence() -> None:
    table = pd.DataFrame({"age": np.repeat([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 10)})
    labels, subjects = np.repeat([0, 1, 0, 1, 1, 1], 10), np.repeat(list("abcdef"), 10)
    (found,) = associations(table, labels, subjects, None)
    assert found.subjects == 6
    assert found.p_value > 0.1


def test_kruskal_and_epsilon_squared_follow_their_formulas() -> None:
    rng = np.random.default_rng(3)
    values, labels = rng.integers(0, 9, 50).astype(float), rng.integers(0, 3, 50)
    (found,) = associations(pd.DataFrame({"age": values}), labels, np.arange(50).astype(str), None)
    ranks = rankdata(values)
    between = sum((ranks[labels == k].mean() - 25.5) ** 2 * (labels == k).sum() for k in range(3))
    share = between / ((ranks - 25.5) ** 2).sum()  # H is (n - 1) times the share of rank variance, ties included
    assert found.effect_size == pytest.approx(share)
    assert found.p_value == pytest.approx(chi2.sf(49 * share, 2))


def test_fisher_and_cramers_v_follow_their_formulas() -> None:
    table = np.array([[9, 4], [3, 14]])
    sex, labels = np.repeat(["f", "f", "m", "m"], table.ravel()), np.repeat([0, 1, 0, 1], table.ravel())
    (found,) = associations(pd.DataFrame({"sex": sex}), labels, np.arange(30).astype(str), None)
    all_tables = hypergeom(30, 12, 13)
    chances = all_tables.pmf(np.arange(13))
    assert found.p_value == pytest.approx(chances[chances <= all_tables.pmf(9) * (1 + 1e-9)].sum())
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / 30
    assert found.effect_size == pytest.approx(np.sqrt(((table - expected) ** 2 / expected).sum() / 30))


def test_a_sparse_table_is_tested_by_permutation() -> None:
    rng = np.random.default_rng(4)
    site, labels = rng.choice(list("ABCDE"), 30), rng.integers(0, 2, 30)
    (found,) = associations(pd.DataFrame({"site": site}), labels, np.arange(30).astype(str), None)
    assert found.test == "chi-square, permuted"

    def statistic(y: np.ndarray) -> float:
        counts = pd.crosstab(site, y).to_numpy()
        expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / 30
        return float(((counts - expected) ** 2 / expected).sum())

    seen = statistic(labels)
    drawn = [statistic(rng.permutation(labels)) >= seen - 1e-9 for _ in range(1000)]
    assert found.p_value == pytest.approx(np.mean(drawn), abs=0.06)


def test_the_covariate_model_learns_from_the_training_folds_alone() -> None:
    cohort, _ = make_cohort(40, age=[None if i % 7 == 0 else 50.0 + i for i in range(40)])
    table = covariate_table(cohort.scans)
    matrix = covariate_matrix(table)
    assert list(matrix) == ["age", "age unknown", "sex=f", "sex=m", "site=A", "site=B"]
    labels = np.array([s.label == "AD" for s in cohort.scans]).astype(int)
    folds = group_folds(labels, np.array([s.subject for s in cohort.scans]), folds=4, seed=0)
    assert folds is not None
    found = covariate_probabilities(matrix, labels, folds)
    x = matrix.to_numpy()
    for fold in range(4):
        train = folds != fold
        filled = np.where(np.isnan(x), np.nanmedian(x[train], axis=0), x)
        mean, spread = filled[train].mean(axis=0), filled[train].std(axis=0)
        model = LogisticRegression(max_iter=2000).fit((filled[train] - mean) / spread, labels[train])
        np.testing.assert_allclose(found[~train], model.predict_proba((filled[~train] - mean) / spread), atol=1e-6)


def test_the_smallest_auroc_is_found_four_times_in_five() -> None:
    rng, draws = np.random.default_rng(5), 400
    truth = smallest_auroc(25, 35)
    shift = np.sqrt(2) * NormalDist().inv_cdf(truth)
    labels = np.repeat([1, 0], [25, 35])
    told = [delong_interval(labels, rng.normal(size=60) + shift * labels).low > 0.5 for _ in range(draws)]
    assert np.mean(told) == pytest.approx(0.8, abs=0.07)
    assert smallest_auroc(250, 350) < truth < smallest_auroc(8, 12) <= 1
    assert smallest_auroc(2, 2) == 1


def test_the_same_voxels_are_known_in_another_file(save_nifti) -> None:
    array = np.round(head())
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    first = inspect_scan(save_nifti(array, "a.nii.gz"))
    other_type = inspect_scan(save_nifti(array.astype(np.int16), "b.nii"))
    turned = nib.Nifti1Image(array, affine).as_reoriented(np.array([[2, 1], [0, -1], [1, 1]]))
    path = save_nifti(array, "c.nii.gz")
    turned.to_filename(path)
    assert first.sha256 != other_type.sha256
    assert first.voxels
    assert other_type.voxels
    assert first.voxels.digest == other_type.voxels.digest
    assert inspect_scan(path).voxels.digest == first.voxels.digest
    array[20, 20, 20] += 1
    assert inspect_scan(save_nifti(array, "d.nii.gz")).voxels.digest != first.voxels.digest


def test_what_is_wrong_with_voxels_is_measured(save_nifti) -> None:
    good = inspect_scan(save_nifti(head())).voxels
    assert good
    assert (good.empty_slices, good.cut_mm2, good.notes) == (0, 0.0, ())
    assert good.extent_mm == pytest.approx((140, 168, 140), abs=8)
    spoiled = head()
    spoiled[:, :, 20:22] = 0
    assert inspect_scan(save_nifti(spoiled)).voxels.empty_slices == 2
    assert inspect_scan(save_nifti(head()[:, :, 12:])).voxels.cut_mm2 > 5000
    assert inspect_scan(save_nifti(np.minimum(head(), 100))).voxels.clipped > 0.2
    spoiled = head()
    spoiled[20, 20, 20] = np.nan
    assert "NaN" in inspect_scan(save_nifti(spoiled)).voxels.notes[0]
    assert "single value" in inspect_scan(save_nifti(np.ones((9, 9, 9), np.float32))).problem


def test_the_header_is_given_along_right_anterior_superior_with_its_sidecar(save_nifti) -> None:
    turned = np.array(
        [[0, 0, 1, 0], [-2, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 1.0]]
    )  # stored as posterior, superior, right
    path = save_nifti(head((8, 10, 12)), "sub-1_T1w.nii.gz", turned)
    path.with_name("sub-1_T1w.json").write_text('{"RepetitionTime": 2.3, "Manufacturer": "Siemens", "Other": 1}')
    found = read_header(path)
    assert (found.axes, found.shape, found.spacing_mm) == ("PSR", (12, 8, 10), (1.0, 2.0, 3.0))
    assert found.protocol == {"repetition time": 2.3, "manufacturer": "Siemens"}
    path.with_name("sub-1_T1w.json").write_text("{broken")
    assert "manufacturer" not in read_header(path).protocol


@pytest.mark.slow
def test_a_dicom_series_has_a_header_too() -> None:
    found = read_header(shared("data", "dicom", "hanke_t1_384.zip"))
    assert found.shape == (274, 384, 384)
    assert found.protocol


@pytest.mark.slow
def test_head_size_is_seen_to_tell_sex_in_real_brains_and_nothing_tells_depression() -> None:
    folder = shared("data", "ds002748_2mm")
    inspections = [inspect_scan(scan.path) for scan in read_cohort(folder).scans]
    sex = audit(read_cohort(folder, target="gender"), inspections)
    told = next(f for f in sex.findings if f.code == "person-goes-with-label")
    assert "head size" in told.seen
    assert "Nearly everything" in told.means
    assert sex.associations[0].covariate == "head size"
    assert sex.associations[0].auroc.value > 0.9
    depression = audit(read_cohort(folder, target="group"), inspections)
    assert {f.severity for f in depression.findings} == {"note"}


@settings(max_examples=25)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "subject": st.sampled_from("abcdefgh"),
                "label": st.sampled_from(["NL", "AD", "MCI"]),
                "age": st.none() | st.floats(0, 120),
                "sex": st.sampled_from([None, "f", "M", "n/a", "<b>"]),
                "site": st.sampled_from([None, "A", "B"]),
                "split": st.sampled_from([None, "train", "test"]),
            }
        ),
        min_size=1,
        max_size=20,
    )
)
def test_any_table_is_audited_and_written(rows) -> None:
    cohort, inspections = make_cohort(len(rows), **{key: [row[key] for row in rows] for key in rows[0]})
    found = audit(cohort, inspections, folds=2).to_dict()
    page = audit_page(json.loads(json.dumps(found)))
    assert "<b>" not in page
    assert found["invalid"] == any(f["severity"] == "invalid" for f in found["findings"])
