"""A table of scans, or a BIDS folder, becomes a checked `Cohort`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from dinoatten3d.errors import CohortError, suggest

ALIASES = {"subject": ("participant_id", "subject_id"), "sex": ("gender",), "session": ("session_id",)}
HEALTHY_NAMES = {"control", "controls", "healthy", "hc", "cn", "nl", "normal", "0", "no", "none", "negative"}
SUFFIXES = (".nii.gz", ".nii", ".dcm", ".zip")


@dataclass(frozen=True, kw_only=True)
class Scan:
    """One row of the table.

    `id` is unique in the cohort, `label` is the class after grouping, `row` the line in the file (the header is 1).
    """

    id: str
    path: Path
    subject: str
    row: int
    label: str | None = None
    session: str | None = None
    site: str | None = None
    age: float | None = None
    sex: str | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """The scans in the order of the table; of two `classes` the second is the positive one."""

    scans: tuple[Scan, ...]
    classes: tuple[str, ...]
    target: str | None
    source: Path

    def __len__(self) -> int:
        return len(self.scans)

    def subset(self, ids: set[str]) -> Cohort:
        """Keep the scans with these ids, in order."""
        return replace(self, scans=tuple(scan for scan in self.scans if scan.id in ids))


def read_cohort(
    source: str | Path,
    *,
    target: str | None = None,
    classes: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Cohort:
    """Read a CSV or TSV with one row a scan, or a BIDS folder with its `participants.tsv`.

    Relative paths resolve against the table. A table without a `path` column is taken for a BIDS participants
    table: the T1w images are looked for beside and below it.

    Args:
        source: The table, or the BIDS folder.
        target: Column with the label; without it the scans have none.
        classes: Groups of raw labels, each `name=label,label` or just `label`, in the order of the classes.
        ignore: Raw labels whose rows are left out; an empty string stands for a missing label.

    Returns:
        The cohort. Without `classes` they are the sorted labels, one with a healthy name first.

    Raises:
        CohortError: A column, file or label is missing, unknown or given twice; the message names row and value.
    """
    source = Path(source)
    table_path = source / "participants.tsv" if source.is_dir() else source
    table = _with_standard_names(_read_table(table_path))
    if target is not None:
        target = {"gender": "sex", "participant_id": "subject"}.get(target, target)
        _require_column(table, target, table_path)
    if "path" not in table:
        table = _find_bids_images(table, table_path)
    _require_column(table, "subject", table_path)
    groups = _parse_classes(classes)
    scans: list[Scan] = []
    for row, values in enumerate(table.to_dict("records"), start=2):
        line = int(values.get("_row", row))
        scan = _scan(values, line, table_path.parent)
        if target is not None:
            raw = values[target]
            if raw in ignore:
                continue
            scan = replace(scan, label=_label(raw, groups, line, target))
        if not scan.path.exists():
            raise CohortError(f"row {line}: {scan.path} does not exist; mend the path or remove the row")
        scans.append(scan)
    if not scans:
        raise CohortError(f"{table_path} leaves no scan to work with; check the rows and --ignore")
    _refuse_duplicates(scans)
    return Cohort(
        scans=_with_ids(scans),
        classes=_class_order(scans, groups) if target is not None else (),
        target=target,
        source=source,
    )


def _read_table(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise CohortError(f"{path} does not exist; wanted a CSV or TSV with one row a scan, or a BIDS folder")
    separator = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    try:
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise CohortError(f"{path} cannot be read as a table: {str(error).splitlines()[0]}") from None
    table.columns = [str(name).strip() for name in table.columns]
    table = table.map(lambda value: "" if not isinstance(value, str) else value.strip())
    table["_row"] = range(2, len(table) + 2)
    table = table[(table.drop(columns="_row") != "").any(axis=1)]
    if table.empty:
        raise CohortError(f"{path} has a header but no row; wanted one row a scan")
    return table


def _with_standard_names(table: pd.DataFrame) -> pd.DataFrame:
    renamed = {
        alias: name for name, aliases in ALIASES.items() for alias in aliases if alias in table and name not in table
    }
    return table.rename(columns=renamed)


def _require_column(table: pd.DataFrame, name: str, path: Path) -> None:
    known = [str(column) for column in table.columns if column != "_row"]
    if name not in known:
        hint = suggest(name, known)
        raise CohortError(f"{path} has no column '{name}'{hint}; it has {', '.join(known)}")


def _find_bids_images(table: pd.DataFrame, table_path: Path) -> pd.DataFrame:
    """Give one row an image for each participant, with the session from the file name."""
    if "subject" not in table:
        _require_column(table, "path", table_path)
    root = table_path.parent
    images: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("sub-*T1w*.nii*")):
        if "derivatives" not in path.relative_to(root).parts:
            images.setdefault(path.name.split("_")[0], []).append(path)
    rows = []
    for values in table.to_dict("records"):
        name = values["subject"] if values["subject"].startswith("sub-") else f"sub-{values['subject']}"
        if name not in images:
            raise CohortError(
                f"row {values['_row']}: no T1w image {name}_*T1w*.nii.gz lies under {root}; "
                "add it, remove the row, or give the table a 'path' column"
            )
        for path in images[name]:
            session = re.search(r"_ses-([A-Za-z0-9]+)", path.name)
            own = {"session": session.group(1)} if session else {}
            rows.append({**values, **own, "path": str(path.relative_to(root))})
    return pd.DataFrame(rows)


def _scan(values: dict[str, str], row: int, folder: Path) -> Scan:
    for name in ("path", "subject"):
        if not values[name]:
            raise CohortError(f"row {row}: {name} is empty; every scan needs one")
    path = Path(values["path"]).expanduser()
    return Scan(
        id="",
        path=path if path.is_absolute() else folder / path,
        subject=values["subject"],
        row=row,
        session=values.get("session") or None,
        site=values.get("site") or None,
        age=_age(values.get("age", ""), row),
        sex=values.get("sex") or None,
        split=values.get("split") or None,
    )


def _age(text: str, row: int) -> float | None:
    if text.lower() in ("", "n/a", "na", "nan"):
        return None
    try:
        return float(text.rstrip("Yy+"))
    except ValueError:
        raise CohortError(f"row {row}: age '{text}' is not a number; write years, or leave it empty") from None


def _parse_classes(classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, tuple[str, ...]] = {}
    for text in classes:
        name, _, labels = text.partition("=")
        groups[name.strip()] = tuple(label.strip() for label in labels.split(",")) if labels else (name.strip(),)
    grouped = [label for group in groups.values() for label in group]
    twice = sorted({label for label in grouped if grouped.count(label) > 1})
    if twice:
        raise CohortError(f"label '{twice[0]}' stands in two --classes; put it into one")
    return groups


def _label(raw: str, groups: dict[str, tuple[str, ...]], row: int, target: str) -> str:
    if raw == "" or raw.lower() == "n/a":
        raise CohortError(f"row {row}: {target} is empty; fill it in, or leave such rows out with --ignore '{raw}'")
    if not groups:
        return raw
    for name, labels in groups.items():
        if raw in labels:
            return name
    known = sorted(label for labels in groups.values() for label in labels)
    raise CohortError(
        f"row {row}: {target} '{raw}' is not one of {', '.join(known)}; "
        "fix the table, group it with --classes or leave it out with --ignore"
    )


def _class_order(scans: Sequence[Scan], groups: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    found = {scan.label for scan in scans if scan.label is not None}
    if groups:
        absent = [name for name in groups if name not in found]
        if absent:
            raise CohortError(f"no row belongs to class '{absent[0]}'; check --classes against the table")
        return tuple(groups)
    return tuple(sorted(found, key=lambda label: (label.lower() not in HEALTHY_NAMES, label)))


def _refuse_duplicates(scans: Sequence[Scan]) -> None:
    seen: dict[Path, int] = {}
    for scan in scans:
        path = scan.path.resolve()
        if path in seen:
            raise CohortError(f"row {scan.row}: {scan.path} is already in row {seen[path]}; keep one of them")
        seen[path] = scan.row


def _with_ids(scans: Sequence[Scan]) -> tuple[Scan, ...]:
    """Name scans by file name, with as many parent folders as it takes to make the names unique."""
    for depth in range(1, 20):
        names = ["__".join((*scan.path.resolve().parts[-depth:-1], stem(scan.path))) for scan in scans]
        if len(set(names)) == len(names):
            break
    return tuple(replace(scan, id=name) for scan, name in zip(scans, names, strict=True))


def stem(path: Path) -> str:
    """Give the file name without its image suffix, double ones included."""
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)] or path.name
