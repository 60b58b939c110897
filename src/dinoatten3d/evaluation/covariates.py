"""A model that sees nothing but covariates: what a label owes to age, sex, site, head size or the scanner."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler


def covariate_model() -> Pipeline:
    """Logistic regression on a covariate matrix; unknown numbers become the median of the training scans."""
    return make_pipeline(
        SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler(), LogisticRegression(max_iter=2000)
    )


def covariate_probabilities(
    matrix: pd.DataFrame, labels: NDArray[np.int64], folds: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Out-of-fold probabilities, `[scans, classes]`, of a model that sees nothing but these covariates.

    Args:
        matrix: What `covariate_matrix` gives, `[scans, columns]`.
        labels: Class index, `[scans]`.
        folds: The fold in which each scan is scored, `[scans]`; every training side must hold every class.
    """
    found = cross_val_predict(
        covariate_model(), matrix.to_numpy(), labels, cv=PredefinedSplit(folds), method="predict_proba"
    )
    return np.asarray(found)
