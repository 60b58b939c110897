"""Small files that every room's tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook
from numpy.typing import NDArray

# shapes written in annotations are checked in tests and cost nothing in use
install_import_hook(["dinoatten3d.learning"], "beartype.beartype")

# a busy machine is no defect of the code; CI always tries the same examples
settings.register_profile(
    "house",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("house")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(*parts: str) -> Path:
    """Give a file of the reference data beside the project, or skip the test and say so."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"reference data {'/'.join(parts)} is not beside the project")
    return path


def head(shape: tuple[int, int, int] = (40, 48, 40), seed: int = 0) -> NDArray[np.float32]:
    """Make an ellipsoid of tissue with a smooth gradient, asymmetric on every axis, on a zero background."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    inside = (grid**2).sum(axis=0) < 0.75
    tissue = 100 + 30 * grid[0] + 20 * grid[1] + 10 * grid[2]
    noise = np.random.default_rng(seed).normal(0, 1, shape)
    return np.where(inside, tissue + noise, 0).astype(np.float32)


@pytest.fixture
def save_nifti(tmp_path: Path) -> Callable[..., Path]:
    """Write an array as NIfTI and give its path."""

    def save(array: NDArray[np.generic], name: str = "scan.nii.gz", affine: NDArray[np.float64] | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.Nifti1Image(array, np.diag([4.0, 4.0, 4.0, 1.0]) if affine is None else affine).to_filename(path)
        return path

    return save


@pytest.fixture(scope="session")
def tiny_backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of 3 layers and 48 dimensions with random weights: for shapes and plumbing, never for accuracy."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    config = Dinov2Config(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=518, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cohort_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty small heads of ten subjects a class; the patients' heads have a dark hole, so the task is easy."""
    folder = tmp_path_factory.mktemp("cohort")
    (folder / "scans").mkdir()
    rows = ["path,subject,DX,age,sex"]
    for number in range(20):
        array = head(seed=number)
        if number % 2:
            array[15:25, 15:30, 22:30] *= 0.1
        path = folder / "scans" / f"scan{number:02d}.nii.gz"
        nib.Nifti1Image(array, np.diag([4.0, 4.0, 4.0, 1.0])).to_filename(path)
        rows.append(
            f"scans/{path.name},s{number:02d},{'AD' if number % 2 else 'NL'},{50 + number},{'fm'[number // 10]}"
        )
    (folder / "cohort.csv").write_text("\n".join(rows) + "\n")
    return folder
