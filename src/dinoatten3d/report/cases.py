"""The cases worth a look: those that the model was surest of, right and wrong."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from dinoatten3d.errors import RunError

THUMBNAIL_PX = 160


@dataclass(frozen=True, kw_only=True)
class CaseSlices:
    """Pictures of the slices of one scan that weigh most.

    Attributes:
        scan_id: The scan, as in the predictions.
        pixels: 8-bit grey, `[slices, rows, columns]`.
        planes: Anatomical plane of each slice, `[slices]`.
        position_mm: Position of each slice along its plane's normal, RAS+ mm, `[slices]`.
        weights: Attention of each slice, `[slices]`.
    """

    scan_id: str
    pixels: NDArray[np.uint8]
    position_mm: NDArray[np.float64]
    planes: tuple[str, ...]
    weights: NDArray[np.float64]


def choose_cases(predictions: pd.DataFrame, classes: Sequence[str], *, count: int = 3) -> pd.DataFrame:
    """Choose the most confident right and the most confident wrong predictions.

    Args:
        predictions: Columns scan_id, label, predicted and p_<class>, one row a scan.
        classes: Names of the classes.
        count: Rows of each kind at most.

    Returns:
        The chosen rows, right ones first and surest first in each kind, with two more columns: `confidence`,
        the probability given to the predicted class, and `verdict`, `right` or `wrong`.

    Raises:
        RunError: A predicted class is not one of `classes`.
    """
    strangers = predictions.loc[~predictions["predicted"].isin(classes), "predicted"]
    if len(strangers):
        raise RunError(f"a scan is predicted to be '{strangers.iloc[0]}'; wanted one of {', '.join(classes)}")
    probability = predictions[[f"p_{name}" for name in classes]].to_numpy(dtype=np.float64)
    place = pd.Index(classes).get_indexer(predictions["predicted"])
    right = predictions["predicted"] == predictions["label"]
    ranked = predictions.assign(
        confidence=probability[np.arange(len(place)), place], verdict=np.where(right, "right", "wrong")
    ).sort_values(["verdict", "confidence", "scan_id"], ascending=[True, False, True])
    return ranked.groupby("verdict").head(count).reset_index(drop=True)


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """Turn one 8-bit grey picture, `[rows, columns]`, into a `data:` address of a PNG of thumbnail size."""
    picture = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
