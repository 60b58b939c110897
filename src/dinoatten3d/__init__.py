"""Slice attention over frozen DINOv2 features for 3D brain MRI, honestly evaluated.

For research, not for diagnosis. The verbs are imported when first used, so that `import dinoatten3d` and the
command line's help need neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dinoatten3d.data.cohort import read_cohort as read_cohort
    from dinoatten3d.data.slices import take_slices as take_slices
    from dinoatten3d.data.volume import load_volume as load_volume
    from dinoatten3d.features.extract import extract as extract
    from dinoatten3d.inference.explain import explain as explain
    from dinoatten3d.inference.predict import predict as predict
    from dinoatten3d.learning.estimator import SliceAttentionClassifier as SliceAttentionClassifier
    from dinoatten3d.learning.fit import cross_validate as cross_validate
    from dinoatten3d.report.html import write_report as write_report
    from dinoatten3d.toml import load_recipe as load_recipe

_HOME = {
    "load_recipe": "toml",
    "read_cohort": "data.cohort",
    "load_volume": "data.volume",
    "take_slices": "data.slices",
    "extract": "features.extract",
    "cross_validate": "learning.fit",
    "SliceAttentionClassifier": "learning.estimator",
    "predict": "inference.predict",
    "explain": "inference.explain",
    "write_report": "report.html",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dinoatten3d' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dinoatten3d.{_HOME[name]}"), name)
