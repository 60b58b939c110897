"""A table becomes a checked cohort, and what is wrong with it is said by row and value."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import shared
from dinoatten3d.data.cohort import read_cohort
from dinoatten3d.errors import CohortError


def table(folder: Path, text: str, *, files: int = 4, name: str = "cohort.csv") -> Path:
    for number in range(files):
        (folder / f"{number}.nii.gz").touch()
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_relative_paths_resolve_against_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path, "path,subject,DX\n0.nii.gz,a,NL\n1.nii.gz,b,AD\n")
    monkeypatch.chdir("/")
    cohort = read_cohort(path, target="DX")
    assert [scan.path for scan in cohort.scans] == [tmp_path / "0.nii.gz", tmp_path / "1.nii.gz"]
    assert [scan.row for scan in cohort.scans] == [2, 3]


def test_a_healthy_name_is_the_first_class_and_so_the_other_is_positive(tmp_path: Path) -> None:
    path = table(tmp_path, "path,subject,DX\n0.nii.gz,a,NL\n1.nii.gz,b,AD\n")
    assert read_cohort(path, target="DX").classes == ("NL", "AD")


def test_classes_group_raw_labels_in_the_given_order(tmp_path: Path) -> None:
    path = table(tmp_path, "path,subject,DX\n0.nii.gz,a,HC\n1.nii.gz,b,HC_MIXED\n2.nii.gz,c,MCM\n3.nii.gz,d,PTH\n")
    cohort = read_cohort(path, target="DX", classes=["migraine=MCM", "healthy=HC,HC_MIXED"], ignore=["PTH"])
    assert cohort.classes == ("migraine", "healthy")
    assert [scan.label for scan in cohort.scans] == ["healthy", "healthy", "migraine"]


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("path,subject,DX\n0.nii.gz,a,NL\n", {"target": "DXX"}, "no column 'DXX' (did you mean 'DX'?)"),
        ("file,subject,DX\n0.nii.gz,a,NL\n", {"target": "DX"}, "row 2: no T1w image"),
        ("path,subject,DX\n9.nii.gz,a,NL\n", {"target": "DX"}, "row 2: "),
        ("path,subject,DX\n0.nii.gz,a,NL\n./0.nii.gz,a,NL\n", {"target": "DX"}, "row 3: "),
        ("path,subject,DX\n0.nii.gz,a,\n", {"target": "DX"}, "row 2: DX is empty"),
        ("path,subject,DX\n0.nii.gz,,NL\n", {"target": "DX"}, "row 2: subject is empty"),
        ("path,subject,DX,age\n0.nii.gz,a,NL,old\n", {"target": "DX"}, "row 2: age 'old' is not a number"),
        (
            "path,subject,DX\n0.nii.gz,a,NL\n1.nii.gz,b,MCII\n",
            {"target": "DX", "classes": ["NL", "MCI"]},
            "row 3: DX 'MCII' is not one of MCI, NL",
        ),
        ("path,subject,DX\n0.nii.gz,a,NL\n", {"target": "DX", "classes": ["NL", "AD"]}, "no row belongs to class 'AD'"),
        ("path,subject,DX\n0.nii.gz,a,NL\n", {"target": "DX", "classes": ["x=NL", "y=NL"]}, "stands in two --classes"),
        ("path,subject,DX\n", {"target": "DX"}, "no row"),
        ("", {"target": "DX"}, "cannot be read as a table"),
    ],
)
def test_what_is_wrong_is_said_by_row_and_value(tmp_path: Path, text: str, options: dict[str, str], said: str) -> None:
    with pytest.raises(CohortError) as error:
        read_cohort(table(tmp_path, text), **options)  # type: ignore[arg-type]
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bids_folder_is_read_with_its_sessions_and_without_derivatives(tmp_path: Path) -> None:
    for session in ("01", "02"):
        folder = tmp_path / "sub-1" / f"ses-{session}" / "anat"
        folder.mkdir(parents=True)
        (folder / f"sub-1_ses-{session}_T1w.nii.gz").touch()
    (tmp_path / "derivatives" / "sub-1").mkdir(parents=True)
    (tmp_path / "derivatives" / "sub-1" / "sub-1_T1w.nii.gz").touch()
    (tmp_path / "participants.tsv").write_text("participant_id\tgroup\tgender\nsub-1\tcontrol\tF\n")
    cohort = read_cohort(tmp_path, target="group")
    assert [(scan.subject, scan.session, scan.sex) for scan in cohort.scans] == [
        ("sub-1", "01", "F"),
        ("sub-1", "02", "F"),
    ]


def test_equal_file_names_get_ids_of_their_own(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t1.nii.gz").touch()
    cohort = read_cohort(table(tmp_path, "path,subject\na/t1.nii.gz,1\nb/t1.nii.gz,2\n", files=0))
    assert [scan.id for scan in cohort.scans] == ["a__t1", "b__t1"]


def test_the_real_participants_table_is_read_as_it_is() -> None:
    cohort = read_cohort(shared("data", "ds002748_2mm") / "participants.tsv", target="group")
    assert len(cohort) == 72
    assert cohort.classes == ("control", "depr")
    assert all(scan.age and scan.sex for scan in cohort.scans)
    assert len(read_cohort(shared("data", "ds002748_2mm"), target="gender").classes) == 2


@settings(max_examples=80)
@given(text=st.text(max_size=200), separator=st.sampled_from(["cohort.csv", "cohort.tsv"]))
def test_any_text_is_a_cohort_or_one_clear_sentence(tmp_path: Path, text: str, separator: str) -> None:
    path = tmp_path / separator
    path.write_bytes(b"path,subject,DX\n" + text.encode("utf-8", "surrogatepass"))
    try:
        read_cohort(path, target="DX")
    except CohortError as error:
        assert "\n" not in str(error)
