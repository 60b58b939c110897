"""Real brains with real lesion shapes: a cohort with known truth that is as hard as the real task.

Half of a folder of skull-stripped brains get a stroke-lesion mask drawn in MNI space. The mask is placed by
matching the box around the MNI152 brain to the box around the subject's, which keeps the hemisphere and
the rough anatomy, and is clipped to the brain. All brains, healthy ones too, are read, resampled and
written by the same rules, so that nothing but the lesion tells the two classes apart.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from dinoatten3d.data.cohort import stem
from dinoatten3d.demo.cohorts import DemoCohort, DemoScan, Progress, publish, stored_image
from dinoatten3d.demo.phantom import Array, Mask, check_range, darken, mni_brain, voxel_box
from dinoatten3d.errors import CohortError, ConfigError, ScanError
from dinoatten3d.files import sha256

__all__ = ["DARK", "SUBTLE", "ImplantConfig", "implant_cohort"]


@dataclass(frozen=True, kw_only=True)
class ImplantConfig:
    """Which lesions are implanted, and how they look."""

    seed: int = 0
    """Decides which brains get a lesion, which mask each gets, and its intensity."""
    volume_ml: tuple[float, float] = (16.0, 98.0)
    """Smallest and largest lesion as implanted, after placing and clipping, in mL."""
    intensity: tuple[float, float] = (0.15, 0.45)
    """Factor on the tissue's intensity inside a lesion, drawn once a lesion; within (0, 1]."""
    edge_mm: float = 1.2
    """Standard deviation of the lesion's soft edge, in mm; 0 to 10."""
    normalise_head_size: bool = False
    """Scale every brain to the box of the MNI brain, so that head size can tell nothing."""

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, but seeds count from 0; give 0 or more")
        check_range("volume_ml", self.volume_ml, above=0, up_to=1000)
        check_range("intensity", self.intensity, above=0, up_to=1)
        if not 0 <= self.edge_mm <= 10:
            raise ConfigError(f"edge_mm is {self.edge_mm}, but a soft edge is 0-10 mm; choose a value between")


DARK = ImplantConfig()
"""Large, dark lesions that a person sees at once."""

SUBTLE = ImplantConfig(volume_ml=(5.0, 37.0), intensity=(0.45, 0.7))
"""Small, faint lesions that a person has to look for."""


class Brain(NamedTuple):
    """A skull-stripped brain on a canonical grid."""

    tissue: Array
    inside: Mask
    affine_ras: NDArray[np.float64]
    axcodes: tuple[str, ...]
    """Axis order of the file it came from, and goes back to."""


def implant_cohort(
    brains: Path, lesions: Path, out: Path, *, config: ImplantConfig, progress: Progress | None = None
) -> DemoCohort:
    """Make a cohort at ``out`` in which half of the brains have a lesion; reuse it if it is there already.

    Args:
        brains: folder of skull-stripped ``*.nii.gz`` or ``*.nii``; a BIDS name starts with its subject
            (``sub-01_...``), any other name is a subject. A ``participants.tsv`` beside them
            (participant_id, age, gender or sex, group, site) balances the two classes and fills the table.
        lesions: folder of lesion masks in MNI space; each is used at most once.
        out: folder to make; the layout is that of ``demo.cohorts``.
        config: which lesions; ``DARK`` and ``SUBTLE`` are ready-made.
        progress: called as ``progress(done, total)`` after each scan.

    Raises:
        CohortError: a folder holds no images, no mask gives the wanted volume, or ``out`` is taken.
        ScanError: a brain or a mask cannot be read.
    """
    brain_paths = _images(brains, "brains", at_least=2)
    mask_paths = _images(lesions, "lesion masks", at_least=1)
    participants = brains / "participants.tsv"
    sources = {
        "brains": [*brain_paths, *([participants] if participants.exists() else [])],
        "lesions": mask_paths,
    }
    record = {"config": asdict(config), "sources": {key: _digest(paths) for key, paths in sources.items()}}
    scans = _scans(brain_paths, mask_paths, _people(brain_paths, participants), config)
    return publish(out, "implant", record, scans, total=len(brain_paths), progress=progress)


def _scans(
    brain_paths: list[Path], mask_paths: list[Path], people: pd.DataFrame, config: ImplantConfig
) -> Iterator[DemoScan]:
    """Every brain in turn, with a lesion where one was drawn."""
    rng = np.random.default_rng(config.seed)
    with_lesion = people["subject"].isin(_draw_subjects(people, rng)).to_numpy()
    masks = deque(mask_paths[index] for index in rng.permutation(len(mask_paths)))
    for index, path in enumerate(brain_paths):
        brain = _read_brain(path)
        if config.normalise_head_size:
            brain = _to_mni_box(brain)
        # The largest healthy intensity sets the scale: a lesion only darkens, and cannot move it.
        slope = float(brain.tissue.max()) / 4000
        tissue, lesion, intensity = brain.tissue, None, 1.0
        if with_lesion[index]:
            of_lesion = np.random.default_rng([config.seed, index])
            weight = _draw_lesion(brain, masks, config, path.name)
            intensity = float(of_lesion.uniform(*config.intensity))
            spacing_mm = nib.affines.voxel_sizes(brain.affine_ras)
            tissue = _on_levels_of(tissue, darken(tissue, weight, intensity, 0, spacing_mm, of_lesion))
            lesion = stored_image((weight > 0.5).astype(np.uint8), brain.affine_ras, brain.axcodes)
        integers = np.rint(tissue / slope).astype(np.int16)
        image = stored_image(integers, brain.affine_ras, brain.axcodes, slope)
        person = people.iloc[index]
        known = {key: person[key] for key in ("age", "sex", "site") if key in person and pd.notna(person[key])}
        yield DemoScan(stem(path), str(person["subject"]), image, lesion, intensity, known)


def _on_levels_of(healthy: Array, tissue: Array) -> Array:
    """Round to the grey levels of the healthy scan: a model could see that a lesion scan has more of them."""
    levels = np.unique(healthy[healthy > 0])
    middles = (levels[1:] + levels[:-1]) / 2
    rounded = levels[np.searchsorted(middles, tissue)]
    return np.asarray(np.where(healthy > 0, rounded, 0), dtype=np.float32)


def _draw_subjects(people: pd.DataFrame, rng: np.random.Generator) -> list[str]:
    """Draw which half gets lesions: one of each pair of people alike in sex, group, site and age.

    Pairing keeps head size, which follows sex, from telling the classes apart.
    """
    alike = [key for key in ("sex", "group", "site", "age") if key in people]
    once = people.drop_duplicates("subject")
    shuffled = once.iloc[rng.permutation(len(once))]
    order = (shuffled.sort_values(alike, kind="stable") if alike else shuffled)["subject"].tolist()
    return [order[first + rng.integers(2)] for first in range(0, len(order) - 1, 2)]


def _draw_lesion(brain: Brain, masks: deque[Path], config: ImplantConfig, name: str) -> Array:
    """Take the next unused mask whose volume in this brain is wanted; shape (x, y, z), 0 to 1."""
    voxel_ml = abs(float(np.linalg.det(brain.affine_ras[:3, :3]))) / 1000
    low_ml, high_ml = config.volume_ml
    for _ in range(len(masks)):
        path = masks.popleft()
        weight = _place(path, brain, config.edge_mm)
        if low_ml <= np.count_nonzero(weight > 0.5) * voxel_ml <= high_ml:
            return weight
        masks.append(path)  # too large or small here, it may fit the next brain
    raise CohortError(
        f"none of the {len(masks)} unused lesion masks gives {low_ml:g}-{high_ml:g} mL in {name}; "
        "widen volume_ml or add masks"
    )


def _place(mask_path: Path, brain: Brain, edge_mm: float) -> Array:
    """Carry a mask from MNI space into a brain, box to box, with a soft edge; shape (x, y, z), 0 to 1."""
    mask = _read(mask_path)
    drawn = (np.asanyarray(mask.dataobj) != 0).astype(np.float32)
    to_mask = np.linalg.inv(mask.affine) @ _to_mni_mm(brain.inside)
    placed = ndimage.affine_transform(drawn, to_mask, output_shape=brain.inside.shape, order=1)
    soft = ndimage.gaussian_filter(placed, edge_mm / nib.affines.voxel_sizes(brain.affine_ras), mode="constant")
    return np.asarray(soft * brain.inside, dtype=np.float32)


def _to_mni_mm(inside: Mask) -> NDArray[np.float64]:
    """4 x 4 matrix from voxels of a canonical brain to MNI mm that maps its box onto the MNI brain's."""
    template = mni_brain()
    low, high = voxel_box(inside)
    mni_low, mni_high = nib.affines.apply_affine(template.affine_ras, voxel_box(template.brain > 0))
    scale = (mni_high - mni_low) / (high - low)
    matrix = np.diag([*scale, 1.0])
    matrix[:3, 3] = mni_low - scale * low
    return matrix


def _to_mni_box(brain: Brain) -> Brain:
    """Resample a brain so that its box is the MNI brain's, on a 2 mm MNI grid."""
    shape = np.array(mni_brain().brain.shape)
    grid = mni_brain().affine_ras @ np.diag([2.0, 2.0, 2.0, 1.0])
    to_brain = np.linalg.inv(_to_mni_mm(brain.inside)) @ grid
    tissue, inside = (
        ndimage.affine_transform(part.astype(np.float32), to_brain, output_shape=tuple(shape // 2), order=1)
        for part in (brain.tissue, brain.inside)
    )
    return Brain(np.where(inside > 0.5, tissue, 0), inside > 0.5, grid, ("R", "A", "S"))


def _read_brain(path: Path) -> Brain:
    """Read a skull-stripped brain; what is above 0, with its holes filled, is brain."""
    image = _read(path)
    try:
        tissue = np.nan_to_num(image.get_fdata(dtype=np.float32), posinf=0, neginf=0).clip(min=0)
    except Exception as error:  # nibabel lets the errors of gzip, zlib and numpy through
        raise ScanError(f"{path} is damaged ({error}); replace it or remove it from the folder") from error
    if not tissue.any():
        raise ScanError(f"{path} has no voxel above 0, but a skull-stripped brain was wanted; replace or remove it")
    axcodes = nib.aff2axcodes(nib.Nifti1Image.from_filename(path).affine)
    return Brain(tissue, ndimage.binary_fill_holes(tissue > 0), image.affine, axcodes)


def _read(path: Path) -> nib.Nifti1Image:
    """Load a 3D NIfTI in closest-canonical order, without its data."""
    try:
        image: nib.Nifti1Image = nib.squeeze_image(nib.Nifti1Image.from_filename(path))
    except Exception as error:
        raise ScanError(f"{path} is no readable NIfTI ({error}); replace it or remove it from the folder") from error
    if image.ndim != 3:
        raise ScanError(f"{path} has {image.ndim} axes, but one volume of 3 was wanted; split it or remove it")
    canonical: nib.Nifti1Image = nib.as_closest_canonical(image)
    return canonical


def _images(folder: Path, what: str, *, at_least: int) -> list[Path]:
    """The NIfTI files of a folder, by name."""
    found = sorted([*folder.glob("*.nii.gz"), *folder.glob("*.nii")])
    if len(found) < at_least:
        raise CohortError(f"{folder} holds {len(found)} NIfTI files, but {what} ({at_least}+) were wanted; check it")
    return found


def _people(brain_paths: list[Path], participants: Path) -> pd.DataFrame:
    """One row a brain: subject, and what participants.tsv knows of it."""
    stems = [stem(path) for path in brain_paths]
    names = [stem.split("_")[0] if stem.startswith("sub-") else stem for stem in stems]
    subjects = pd.DataFrame({"subject": names})
    if subjects["subject"].nunique() < 2:
        raise CohortError(f"{brain_paths[0].parent} holds one subject, but the two classes need 2+; add brains")
    if not participants.exists():
        return subjects
    table = pd.read_csv(participants, sep="\t", dtype={"participant_id": str})
    if "participant_id" not in table:
        raise CohortError(f"{participants} has no column participant_id; add it or remove the file")
    known = table.drop_duplicates("participant_id").rename(columns={"participant_id": "subject", "gender": "sex"})
    return subjects.merge(known, on="subject", how="left")


def _digest(paths: list[Path]) -> str:
    """Digest of the names and bytes of files."""
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.name}\0{sha256(path)}\n".encode())
    return total.hexdigest()[:16]
