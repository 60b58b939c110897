"""How a scan's patches differ from those of reference scans at the same place.

The backbone's middle layers see a lesion that its CLS token misses. A patch token minus the mean token of the reference
class at that place (and the same minus its mirror image) goes through a linear discriminant that tells blemished
patches of reference scans from whole ones; its scores are standardised per place. A scan's own median is taken away,
for a whole brain that looks different is no lesion, and darker and brighter are brought to one scale by how far
reference scans stray in each. All of it comes from the training scans of one fold, and a training scan is never its own
reference: its subject is left out of the mean, of the standardisation and of the discriminant that score it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from dinoatten3d.config import Plane
from dinoatten3d.data.slices import stacks
from dinoatten3d.errors import CohortError
from dinoatten3d.features.store import PatchTokens

Map = NDArray[np.float32]
SHRINKAGE = 0.1
PARTS = 5
BLUR = (0.8, 0.7, 0.7)
"""Slices, rows and columns over which a map is smoothed: a lesion is a blob, noise is not."""
TOP_PATCHES, TOP_SLICES = 2, 3
"""Highest patches whose mean is the score of a slice, and highest slices whose mean is that of a scan."""
FEWEST_REFERENCES = 4
RARE_PERCENT, RARE_SCORE = 99.9, 3.09
"""One reference patch in a thousand passes this score, darker or brighter, as of a normal variable."""


class _Moments(NamedTuple):
    """Sums that a discriminant is made of: x'x, sum of x by kind, count by kind (whole, darker, brighter)."""

    gram: Tensor
    sums: Tensor
    counts: Tensor


@dataclass(frozen=True, kw_only=True)
class PlaneDeviation:
    """What one fold's reference scans taught about the slices of one plane.

    Attributes:
        place: Mean token at each place, `[slices, rows, columns, dim]`.
        weight: Discriminant, `[dim, 2]` (darker, brighter), or `[2 * dim, 2]` where the second half acts on the mirror
            difference.
        bias: `[2]`.
        mean: Mean of the smoothed maps over reference scans, `[slices, rows, columns, 2]`.
        deviation: Standard deviation of the same, widened so that one tissue patch in a thousand of the reference scans
            passes 3.09, `[slices, rows, columns, 2]`.
    """

    place: Tensor
    weight: Tensor
    bias: Tensor
    mean: Map
    deviation: Map

    def map(self, scan: PatchTokens) -> Map:
        """Score each patch of a new scan's slices in this plane, `[slices, rows, columns, 2]`."""
        mirror = len(self.weight) > self.place.shape[-1]
        raw = _blurred(_discriminate(_residual(scan.tokens, self.place, mirror), self.weight, self.bias))
        return _centred((raw - self.mean) / self.deviation, scan.tissue)

    def tensors(self) -> dict[str, Tensor]:
        """Give what `from_tensors` takes, for safetensors; the place's mean is kept in half precision."""
        found = {name: torch.as_tensor(value).contiguous() for name, value in vars(self).items()}
        return found | {"place": self.place.half()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> PlaneDeviation:
        """Read back what `tensors` gave."""
        return cls(
            place=tensors["place"].float(),
            weight=tensors["weight"],
            bias=tensors["bias"],
            mean=tensors["mean"].numpy(),
            deviation=tensors["deviation"].numpy(),
        )


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """The planes of a scan, one after the other; nothing is compared, smoothed or standardised across them."""

    by_plane: tuple[PlaneDeviation, ...]

    def map(self, scan: PatchTokens) -> Map:
        """Score each patch of a new scan in standard deviations of reference scans, `[slices, rows, columns, 2]`."""
        starts = np.cumsum([0, *(len(plane.place) for plane in self.by_plane)])
        runs = [slice(int(a), int(b)) for a, b in pairwise(starts)]
        return np.concatenate([p.map(scan.stack(run)) for p, run in zip(self.by_plane, runs, strict=True)])

    def patch_map(self, scan: PatchTokens) -> Map:
        """Give the larger of darker and brighter at each patch, 0 outside tissue, `[slices, rows, columns]`."""
        return larger_in_tissue(self.map(scan), scan.tissue)

    def tensors(self) -> dict[str, Tensor]:
        """Give what `from_tensors` takes, for safetensors."""
        return {f"{k}.{name}": t for k, plane in enumerate(self.by_plane) for name, t in plane.tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Deviation:
        """Read back what `tensors` gave."""
        planes = sorted({int(name.partition(".")[0]) for name in tensors})
        own = [{n.partition(".")[2]: t for n, t in tensors.items() if int(n.partition(".")[0]) == k} for k in planes]
        return cls(by_plane=tuple(PlaneDeviation.from_tensors(found) for found in own))


class CrossFitted(NamedTuple):
    """A fitted deviation and the maps of its own training scans, `[scans, slices, rows, columns, 2]`."""

    deviation: Deviation
    maps: Map


def fit_deviation(
    scans: Sequence[PatchTokens],
    subjects: NDArray[Any],
    reference: NDArray[np.bool_],
    *,
    planes: Sequence[Plane],
    seed: int,
) -> CrossFitted:
    """Learn from the reference scans among the training scans of one fold, plane by plane.

    Args:
        scans: Patch tokens of the training scans.
        subjects: Their subjects, `[scans]`.
        reference: Which of them are the reference (healthy) ones, `[scans]`.
        planes: Plane of each slice, `[slices]`; in those whose columns run from left to right a patch is also compared
            with its mirror image, the other hemisphere.
        seed: Decides which patches are used and how the reference subjects are parted.

    Raises:
        CohortError: Too few reference subjects, or features without blemished slices.
    """
    fitted = [
        _fit_plane([scan.stack(run) for scan in scans], subjects, reference, mirror=plane != "sagittal", seed=seed)
        for plane, run in stacks(planes).items()
    ]
    maps = np.concatenate([maps for _, maps in fitted], axis=1)
    return CrossFitted(Deviation(by_plane=tuple(plane for plane, _ in fitted)), maps)


def _fit_plane(
    scans: Sequence[PatchTokens], subjects: NDArray[Any], reference: NDArray[np.bool_], *, mirror: bool, seed: int
) -> tuple[PlaneDeviation, Map]:
    """Fit one plane's slices; gives the deviation and the maps of the training scans, cross-fitted."""
    people = np.unique(subjects[reference])
    if len(people) < FEWEST_REFERENCES:
        raise CohortError(
            f"the reference class has {len(people)} subjects in the training scans of a fold, {FEWEST_REFERENCES} are "
            "needed; use --model.pooling attention, or put the largest (healthy) class first with --classes"
        )
    rng = np.random.default_rng(seed)
    part_of = {str(p): int(k) for p, k in zip(rng.permutation(people), np.arange(len(people)) % PARTS, strict=True)}
    own = {person: [int(i) for i in np.flatnonzero(reference & (subjects == person))] for person in part_of}
    count = int(reference.sum())
    total = torch.zeros(scans[0].tokens.shape)
    for mine in own.values():
        total += _token_sum(scans, mine)
    place = total / count

    def place_without(person: str) -> Tensor:
        return (total - _token_sum(scans, own[person])) / (count - len(own[person]))

    parts: list[list[_Moments]] = [[] for _ in range(PARTS)]
    for person, part in part_of.items():
        others = place_without(person)
        parts[part] = [_sum([*parts[part], *(_moments(scans[i], others, mirror, rng) for i in own[person])])]
    whole = _sum([moments for found in parts for moments in found])
    if float(whole.counts.min()) < 1:
        raise CohortError(
            f"the scans of {len(people)} reference subjects hold no patch that was painted darker, or none that was "
            "painted brighter; extract with more --patches.blemished (8 by default), or add reference scans"
        )
    held_out = [_solve(_sum([m for k, found in enumerate(parts) if k != part for m in found])) for part in range(PARTS)]
    weight, bias = _solve(whole)
    raw = []
    for i, scan in enumerate(scans):
        person = str(subjects[i])
        base = place_without(person) if person in part_of else place
        discriminant = held_out[part_of[person]] if person in part_of else (weight, bias)
        raw.append(_blurred(_discriminate(_residual(scan.tokens, base, mirror), *discriminant)))
    stacked = np.stack(raw)
    tissue = np.stack([scan.tissue for scan in scans])
    mean, deviation = _spread(stacked[reference])
    maps = np.empty_like(stacked)
    for i in range(len(scans)):
        rest = stacked[reference & (subjects != subjects[i])]
        mu, sd = _spread(rest) if str(subjects[i]) in part_of else (mean, deviation)
        maps[i] = _centred((stacked[i] - mu) / sd, tissue[i])
    wide = _tail(maps[reference], tissue[reference])
    own_wide = {p: _tail(maps[rest], tissue[rest]) for p in part_of if (rest := reference & (subjects != p)).any()}
    maps /= np.stack([own_wide.get(str(p), wide) for p in subjects])[:, None, None, None]
    deviation = deviation * wide
    return PlaneDeviation(place=place, weight=weight, bias=bias, mean=mean, deviation=deviation), maps


def larger_in_tissue(maps: Map, tissue: NDArray[np.bool_]) -> Map:
    """Give the larger of darker and brighter, 0 outside tissue: `[..., 2]` to `[...]`."""
    return np.where(tissue, maps.max(axis=-1), np.float32(0))


def slice_scores(maps: Map, tissue: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Score each slice by the mean of its two highest tissue patches, for each kind (darker, brighter).

    Args:
        maps: `[..., slices, rows, columns, kinds]`.
        tissue: `[..., slices, rows, columns]`.

    Returns:
        `[..., slices, kinds]`; a slice without tissue scores as an ordinary one (0).
    """
    hidden = np.where(tissue[..., None], maps, -np.inf)
    flat = hidden.reshape(*hidden.shape[:-3], -1, hidden.shape[-1])
    ordered = np.sort(flat, axis=-2)[..., -TOP_PATCHES:, :]
    finite = np.isfinite(ordered)
    count = finite.sum(axis=-2)
    return np.asarray(np.where(finite, ordered, 0).sum(axis=-2) / np.maximum(count, 1), dtype=np.float64)


def top_slices(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Score each scan by the mean of its three highest slices, `[scans, slices, ...]` to `[scans, ...]`."""
    return np.asarray(np.sort(scores, axis=1)[:, -TOP_SLICES:].mean(axis=1))


def _residual(tokens: NDArray[np.float16], place: Tensor, mirror: bool) -> Tensor:
    """Token minus the place's mean, with `mirror` also that minus its mirror image, `[..., dim or 2 * dim]`."""
    difference = torch.from_numpy(tokens).float() - place
    if not mirror:
        return difference
    return torch.cat([difference, difference - difference.flip(-2)], dim=-1)


def _discriminate(residual: Tensor, weight: Tensor, bias: Tensor) -> Map:
    """Give the log-odds of darker and brighter against whole at each patch."""
    return np.asarray((residual @ weight + bias).numpy(), dtype=np.float32)


def _blurred(values: Map) -> Map:
    return np.asarray(ndimage.gaussian_filter(values, (*BLUR, 0)), dtype=np.float32)


def _centred(maps: Map, tissue: NDArray[np.bool_]) -> Map:
    """Take away the scan's own median over tissue, for each kind."""
    return np.asarray(maps - np.median(maps[tissue], axis=0) if tissue.any() else maps, dtype=np.float32)


def _tail(maps: Map, tissue: NDArray[np.bool_]) -> Map:
    """Give how far the tails of reference scans reach beyond a normal variable's, for each kind, `[2]`."""
    return np.asarray(np.percentile(maps[tissue], RARE_PERCENT, axis=0) / RARE_SCORE, dtype=np.float32)


def _moments(scan: PatchTokens, place: Tensor, mirror: bool, rng: np.random.Generator) -> _Moments:
    """Sum up a reference scan: some whole patches as they are, some of its blemished slices, and the blemished ones."""
    chosen = scan.tissue & (rng.random(scan.tissue.shape) < 0.3)
    blemished = _residual(scan.blemished, place[torch.from_numpy(scan.blemished_slice)], mirror)
    tissue = scan.tissue[scan.blemished_slice]
    inside = tissue & (scan.blemished_weight > 0.5)
    beside = tissue & (scan.blemished_weight < 0.02) & (rng.random(tissue.shape) < 0.1)
    darker = inside & (scan.blemished_factor < 1)[:, None, None]
    rows = [_residual(scan.tokens, place, mirror)[torch.from_numpy(chosen)], blemished[torch.from_numpy(beside)]]
    kinds = [torch.cat(rows), *(blemished[torch.from_numpy(m)] for m in (darker, inside & ~darker))]
    x = torch.cat(kinds)
    return _Moments(x.T @ x, torch.stack([k.sum(dim=0) for k in kinds]), torch.tensor([float(len(k)) for k in kinds]))


def _token_sum(scans: Sequence[PatchTokens], index: Sequence[int]) -> Tensor:
    return torch.stack([torch.from_numpy(scans[i].tokens).float() for i in index]).sum(dim=0)


def _sum(moments: Sequence[_Moments]) -> _Moments:
    gram, sums, counts = (sum(parts[1:], parts[0]) for parts in zip(*moments, strict=True))
    return _Moments(gram, sums, counts)


def _solve(moments: _Moments) -> tuple[Tensor, Tensor]:
    """Linear discriminant with a covariance shrunk towards its diagonal, as log-odds against whole patches."""
    means = moments.sums / moments.counts.clamp_min(1)[:, None]
    within = (moments.gram - (means * moments.counts[:, None]).T @ means) / moments.counts.sum()
    diagonal = within.diagonal()
    within = (1 - SHRINKAGE) * within + torch.diag(SHRINKAGE * diagonal + 1e-4 * diagonal.mean())
    directions = torch.cholesky_solve(means.T, torch.linalg.cholesky(within))
    offset = -0.5 * (means * directions.T).sum(dim=1)
    return directions[:, 1:] - directions[:, :1], offset[1:] - offset[:1]


def _spread(maps: Map) -> tuple[Map, Map]:
    """Mean and standard deviation at each place, smoothed over neighbours and kept away from zero."""
    mean, variance = maps.mean(axis=0), maps.var(axis=0)
    mean, variance = (ndimage.gaussian_filter(v, (0.5, 1, 1, 0)) for v in (mean, variance))
    floor = 0.25 * variance.mean(axis=(0, 1, 2))
    return mean, np.asarray(np.sqrt(variance + floor), dtype=np.float32)
