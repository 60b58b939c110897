"""Does the label go with something that is known without looking at the brain?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import MonteCarloMethod, chi2_contingency, fisher_exact, kruskal
from scipy.stats.contingency import association

from dinoatten3d.data.covariates import PERSON, VOXELS, covariate_matrix
from dinoatten3d.evaluation.comparison import holm
from dinoatten3d.evaluation.covariates import covariate_probabilities
from dinoatten3d.evaluation.findings import Finding, listed
from dinoatten3d.evaluation.intervals import Interval, bootstrap_intervals, delong_interval

EVERYTHING = "all together"
PERMUTATIONS = 9999
UNKNOWN_INTERVAL = Interval(float("nan"), float("nan"), float("nan"))
DECIDES = 0.8
"""A covariate of the scanner whose AUROC is surely above this leaves nothing that a brain could be credited with."""


@dataclass(frozen=True, kw_only=True)
class Association:
    """How a covariate goes with the label.

    Attributes:
        covariate: Its name; `<name> unknown` is whether it is missing.
        test: The test, on one row a subject and class.
        subjects: Rows in the test.
        p_value: Of no association, Holm-adjusted over all covariates; NaN where there is no test.
        effect: Name of the effect size.
        effect_size: 0 (none) to 1 (it decides the label).
        auroc: Of a model that sees this covariate alone, out of fold by subject, with its 95 % interval.
    """

    covariate: str
    test: str
    subjects: int
    p_value: float
    effect: str
    effect_size: float
    auroc: Interval


def associations(
    table: pd.DataFrame,
    labels: NDArray[np.int64],
    subjects: NDArray[np.str_],
    folds: NDArray[np.int64] | None,
    *,
    seed: int = 0,
) -> list[Association]:
    """Test every covariate of `covariate_table`, whether it is missing, and all of them together.

    Args:
        table: One row a scan.
        labels: Class index, `[scans]`.
        subjects: Subject, `[scans]`.
        folds: The fold in which each scan is scored; None where there are too few subjects, then there is no AUROC.
        seed: Decides permutations and bootstrap draws.

    Returns:
        Strongest first; "all together" last.
    """
    columns = {name: table[name] for name in table}
    columns |= {f"{name} unknown": table[name].isna() for name in table if table[name].isna().any()}
    # One row a subject and class: further sessions of a person are no further evidence.
    once = ~pd.DataFrame({"subject": subjects, "label": labels}).duplicated().to_numpy()
    tests = {
        name: test
        for name, column in columns.items()
        if (test := _test(column[once].reset_index(drop=True), labels[once], seed)) is not None
    }
    adjusted = holm(np.array([test.p_value for test in tests.values()]))
    found = [
        Association(
            covariate=name,
            test=test.name,
            subjects=test.rows,
            p_value=float(p_value),
            effect=test.effect,
            effect_size=test.effect_size,
            auroc=_auroc(columns[name].to_frame(name), labels, subjects, folds, seed),
        )
        for (name, test), p_value in zip(tests.items(), adjusted, strict=True)
    ]
    found.sort(key=lambda a: (a.p_value, -a.effect_size, a.covariate))
    if len(table.columns) > 1:
        auroc = _auroc(table, labels, subjects, folds, seed)
        together = Association(
            covariate=EVERYTHING,
            test="-",
            subjects=int(once.sum()),
            p_value=float("nan"),
            effect="-",
            effect_size=float("nan"),
            auroc=auroc,
        )
        found.append(together)
    return found


def confound_findings(found: list[Association], table: pd.DataFrame, *, alpha: float = 0.05) -> list[Finding]:
    """Turn associations that are no accident into findings: of the person, of the scanner, of what is missing."""
    beyond = [a for a in found if a.p_value < alpha]
    missing = [a for a in beyond if a.covariate.endswith(" unknown")]
    person = [a for a in beyond if a not in missing and _belongs_to_person(a.covariate, table)]
    scanner = [a for a in beyond if a not in missing and a not in person]
    # How a file is stored can be mended, and the pictures that a model sees are rescaled: a question, no verdict.
    decisive = [a for a in scanner if a.auroc.low > DECIDES and a.covariate not in ("grey levels", "stored type")]
    findings = []
    if decisive:
        findings.append(
            Finding(
                code="scanner-decides-label",
                severity="invalid",
                seen=f"The label can be told from how the scan was made: {_named(decisive)}.",
                means="A model that recognises the scanner scores as well as one that recognises the disease; "
                "no figure from this cohort can tell them apart.",
                advice="Add scans so that every class comes from every scanner, or compare within one scanner.",
            )
        )
    weaker = [a for a in scanner if a not in decisive]
    if weaker:
        findings.append(
            Finding(
                code="scanner-goes-with-label",
                severity="warning",
                seen=f"The classes differ in how their scans were made or stored: {_named(weaker)}.",
                means="A part of what a model reaches may be the scanner or the processing.",
                advice="Process all scans alike from the raw data; match the classes, or report each scanner apart.",
            )
        )
    if person:
        strongest = max(person, key=lambda a: np.nan_to_num(a.auroc.value))
        amount = "nearly everything" if strongest.auroc.value >= 0.9 else "a part"
        findings.append(
            Finding(
                code="person-goes-with-label",
                severity="warning",
                seen=f"The classes differ in {_named(person)}.",
                means=f"{amount[0].upper()}{amount[1:]} of what a model reaches may be {strongest.covariate}.",
                advice="Match the classes, or show that the model does better than a model of these alone.",
            )
        )
    if missing:
        findings.append(
            Finding(
                code="missing-goes-with-label",
                severity="warning",
                seen=f"What is missing in the table goes with the label: {_named(missing)}.",
                means="The classes were recorded in different ways, perhaps recruited and scanned so too.",
                advice="Fill in the table, and find out why one class lacks it.",
            )
        )
    return findings


def missing_findings(table: pd.DataFrame) -> list[Finding]:
    """Report how many scans lack which covariate."""
    counts = table.isna().sum()
    counts = counts[counts > 0]
    if counts.empty:
        return []
    seen = listed(f"{name} of {number} of {len(table)} scans" for name, number in counts.items())
    return [
        Finding(
            code="missing-covariates",
            severity="note",
            seen=f"Unknown: {seen}.",
            means="Tests use the scans that have a value; models of covariates fill in the median and count the gap.",
            advice="Fill in the table where the values exist.",
        )
    ]


@dataclass(frozen=True, kw_only=True)
class _Test:
    name: str
    rows: int
    p_value: float
    effect: str
    effect_size: float


def _test(column: pd.Series, labels: NDArray[np.int64], seed: int) -> _Test | None:
    """Test one covariate on the rows where it is known; None where it is the same everywhere."""
    known = column.notna().to_numpy()
    values, labels = column[known], labels[known]
    if values.nunique() < 2 or len(np.unique(labels)) < 2:
        return None
    if pd.api.types.is_float_dtype(column):
        return _rank_test(values.to_numpy(float), labels)
    return _table_test(pd.crosstab(values, labels).to_numpy(), seed)


def _rank_test(values: NDArray[np.float64], labels: NDArray[np.int64]) -> _Test:
    """Kruskal-Wallis, with epsilon squared H / (n - 1) as effect size (Kelley 1935; Tomczak & Tomczak 2014)."""
    found = kruskal(*(values[labels == label] for label in np.unique(labels)))
    return _Test(
        name="Kruskal-Wallis",
        rows=len(values),
        p_value=float(found.pvalue),
        effect="epsilon squared",
        effect_size=float(found.statistic / (len(values) - 1)),
    )


def _table_test(counts: NDArray[np.int64], seed: int) -> _Test:
    """Fisher's exact test for two by two, else chi-square; by permutation where a cell expects fewer than five."""
    cramer = float(association(counts, method="cramer"))
    if counts.shape == (2, 2):
        name, p_value = "Fisher", fisher_exact(counts).pvalue
    elif chi2_contingency(counts).expected_freq.min() >= 5:
        name, p_value = "chi-square", chi2_contingency(counts).pvalue
    else:
        method = MonteCarloMethod(n_resamples=PERMUTATIONS, rng=np.random.default_rng(seed))
        name, p_value = "chi-square, permuted", chi2_contingency(counts, correction=False, method=method).pvalue
    return _Test(name=name, rows=int(counts.sum()), p_value=float(p_value), effect="Cramér's V", effect_size=cramer)


def _auroc(
    table: pd.DataFrame,
    labels: NDArray[np.int64],
    subjects: NDArray[np.str_],
    folds: NDArray[np.int64] | None,
    seed: int,
) -> Interval:
    """Score a model of these columns out of fold."""
    if folds is None:
        return UNKNOWN_INTERVAL
    probabilities = covariate_probabilities(covariate_matrix(table), labels, folds)
    if probabilities.shape[1] == 2:
        return delong_interval(labels, probabilities[:, 1], subjects=subjects)
    return bootstrap_intervals(labels, probabilities, subjects, seed=seed)["auroc"]


def _belongs_to_person(name: str, table: pd.DataFrame) -> bool:
    """Whether a covariate is the person's; the grid is, where it was cropped to the head and so differs everywhere."""
    cropped = name.startswith(VOXELS) and table[name].nunique() > len(table) / 5
    return name in PERSON or cropped


def _named(found: list[Association]) -> str:
    return listed(f"{a.covariate} ({a.effect} {a.effect_size:.2f}, p {_p(a.p_value)}{_alone(a.auroc)})" for a in found)


def _alone(auroc: Interval) -> str:
    return "" if np.isnan(auroc.value) else f", AUROC alone {auroc.value:.2f}, {auroc.low:.2f} to {auroc.high:.2f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
