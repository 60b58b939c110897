"""The tables that a run keeps: who was held out when, what was answered, where the attention lay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dinoatten3d.data.cohort import Scan
from dinoatten3d.files import sha256
from dinoatten3d.learning.bags import Bags


def splits_table(bags: Bags, folds: NDArray[np.int64]) -> pd.DataFrame:
    """Give one row a scan and repeat with the fold that scores it; -1 where it is only trained on."""
    one = pd.DataFrame(
        {
            "scan_id": [scan.id for scan in bags.scans],
            "subject": bags.subjects,
            "label": np.array(bags.classes)[bags.labels.numpy()],
        }
    )
    return pd.concat([one.assign(repeat=r, fold=own) for r, own in enumerate(folds)], ignore_index=True)


def probability_table(bags: Bags, probabilities: NDArray[np.float64], folds: NDArray[np.int64]) -> pd.DataFrame:
    """Give one row a held-out scan: true class, fold, predicted class and a probability for each class."""
    names = np.array(bags.classes)
    table = pd.DataFrame(
        {
            "scan_id": [scan.id for scan in bags.scans],
            "subject": bags.subjects,
            "label": names[bags.labels.numpy()],
            "fold": folds,
            "predicted": names[probabilities.argmax(axis=1)],
        }
    )
    for number, name in enumerate(bags.classes):
        table[f"p_{name}"] = probabilities[:, number]
    return table[folds >= 0].reset_index(drop=True)


def model_tables(bags: Bags, answers: Mapping[str, NDArray[np.float64]], folds: NDArray[np.int64]) -> pd.DataFrame:
    """Give the probability tables of several models, one below the other, named in `model`."""
    tables = [probability_table(bags, found, folds).assign(model=name) for name, found in answers.items()]
    return pd.concat(tables, ignore_index=True)


def attention_table(bags: Bags, weights: NDArray[np.float64], folds: NDArray[np.int64]) -> pd.DataFrame:
    """Give one row a slice of a held-out scan with its position and weight."""
    scan, part = np.nonzero(bags.mask.numpy() & (folds >= 0)[:, None])
    return pd.DataFrame(
        {
            "scan_id": np.array([s.id for s in bags.scans])[scan],
            "fold": folds[scan],
            "label": np.array(bags.classes)[bags.labels.numpy()[scan]],
            "slice": part,
            "plane": np.array(bags.planes)[part],
            "position_mm": bags.position_mm[scan, part],
            "weight": weights[scan, part],
        }
    )


def cohort_table(scans: Sequence[Scan], brain_ml: NDArray[np.float64]) -> pd.DataFrame:
    """Give one row a scan with its covariates."""
    names = ("path", "subject", "label", "session", "site", "age", "sex")
    table = pd.DataFrame({name: [getattr(scan, name) for scan in scans] for name in names})
    table["path"] = [str(scan.path.resolve()) for scan in scans]
    table.insert(0, "scan_id", [scan.id for scan in scans])
    table["brain_ml"] = brain_ml.round(2)
    table["sha256"] = [sha256(scan.path) if scan.path.exists() else "" for scan in scans]
    return table
