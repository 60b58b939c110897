"""Age, sex, site and head size taken out of the features, with what the training scans of one fold teach.

What is adjusted is each slice (its CLS token; the mean of its tissue patches, whose change is added to all of its
patches), by what the same slice of the training scans shows. A shift of the whole scan is not enough: where a slice
depends on a covariate in another way than the scan's mean does, the shift puts the covariate in. Nothing of the scans
that will be scored has a part in the fit, and nothing but their covariates in the use. Residualising all scans before
they are split leaks, and biases the figures (Snoek, Miletic & Scholte 2019).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoatten3d.config import AdjustConfig
from dinoatten3d.data.cohort import Scan
from dinoatten3d.data.covariates import person_and_site
from dinoatten3d.errors import CohortError, ConfigError
from dinoatten3d.features.store import PatchTokens
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.combat import Combat, fit_combat

Array = NDArray[np.float64]
FEWEST = 3
"""Training scans that a sex or a site needs to be adjusted for; those of a rarer one count as unknown."""
PARTS = ("features", "means", "tokens")
"""What bags hold of a scan, each with a value a slice to adjust."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """Covariates as centred columns; what is unknown lies at the mean of the training scans, 0.

    Attributes:
        columns: `age`, `head size`, or a category such as `sex=f` and `site=A`.
        mean: Mean of each column over the training scans that have it, `[columns]`.
    """

    columns: tuple[str, ...]
    mean: Array

    def encode(self, bags: Bags) -> Array:
        """Give the columns of each scan, `[scans, columns]`."""
        table = person_and_site(bags.scans, bags.brain_ml)
        found = np.zeros((len(bags), len(self.columns)))
        for number, column in enumerate(self.columns):
            name, category, level = column.partition("=")
            if category:
                known = table[name].isin(self.levels(name)).to_numpy()
                values = (table[name] == level).to_numpy(float)
            else:
                values = table[name].to_numpy(float)
                known = np.isfinite(values)
            found[known, number] = values[known] - self.mean[number]
        return found

    @property
    def of_site(self) -> NDArray[np.bool_]:
        """Which columns say the site, `[columns]`."""
        return np.array([column.startswith("site=") for column in self.columns])

    def levels(self, name: str) -> list[str]:
        """Give the categories of a covariate that the training scans have."""
        return [column.partition("=")[2] for column in self.columns if column.startswith(f"{name}=")]

    def sites(self, bags: Bags) -> NDArray[np.int64]:
        """Give the site of each scan, `[scans]`; -1 for one that the training scans do not have."""
        levels = self.levels("site")
        return np.array([levels.index(s) if (s := str(scan.site).strip()) in levels else -1 for scan in bags.scans])


@dataclass(frozen=True, kw_only=True)
class Residual:
    """The linear effect of covariates on a feature, `slope` `[columns, dim]`, to subtract."""

    slope: Array


@dataclass(frozen=True, kw_only=True)
class Adjustment:
    """What one fold's training scans taught: for each part of the bags a residual or a ComBat model."""

    design: Design
    parts: Mapping[str, Residual | Combat]

    def apply(self, bags: Bags) -> Bags:
        """Adjust scans by their covariates alone."""
        design = self.design.encode(bags)
        preserved, site = design[:, ~self.design.of_site], self.design.sites(bags)
        shift = {}
        for name, part in self.parts.items():
            if isinstance(part, Residual):
                change = -design @ part.slope
            else:
                values = slice_values(bags, name)
                change = part(values, preserved, site) - values
            shift[name] = change.reshape(*bags.mask.shape, -1)
        return _shifted(bags, shift)

    def unknown(self, bags: Bags) -> list[str]:
        """Say which covariates of the one scan in `bags` are not known and were taken at the training mean."""
        scan, table = bags.scans[0], person_and_site(bags.scans, bags.brain_ml)
        notes = []
        for name in dict.fromkeys(column.partition("=")[0] for column in self.design.columns):
            given = {"age": scan.age, "sex": scan.sex, "site": scan.site, "head size": 1}[name]
            levels = self.design.levels(name)
            if given is None:
                notes.append(
                    f"the model adjusts for {name}, which was not given: taken at the mean of the training scans"
                )
            elif levels and table[name].iloc[0] not in levels:
                notes.append(
                    f"{name} '{given}' is not among those of the training scans ({', '.join(levels)}): left as it is"
                )
        return notes

    def tensors(self) -> dict[str, Tensor]:
        """Give what `from_tensors` takes, for safetensors, which holds no text: names are bytes of JSON."""
        names = json.dumps(self.design.columns).encode()
        found = {"columns": torch.tensor(list(names), dtype=torch.uint8), "mean": torch.from_numpy(self.design.mean)}
        for name, part in self.parts.items():
            found |= {f"{name}.{key}": torch.from_numpy(np.ascontiguousarray(v)) for key, v in vars(part).items()}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Adjustment:
        """Read back what `tensors` gave."""
        columns = json.loads(bytes(tensors["columns"].tolist()))
        parts: dict[str, Residual | Combat] = {}
        for name in PARTS:
            own = {k.removeprefix(f"{name}."): t.numpy() for k, t in tensors.items() if k.startswith(f"{name}.")}
            if own:
                parts[name] = Combat(**own) if "location" in own else Residual(**own)
        return cls(design=Design(columns=tuple(columns), mean=tensors["mean"].numpy()), parts=parts)


def fit_adjustment(bags: Bags, config: AdjustConfig) -> Adjustment:
    """Learn the effect of covariates on every slice; the class of the scans has no part in it.

    A fit beside the class, or on healthy scans alone, would keep an effect of the class that goes with a covariate. At
    tens or hundreds of scans its error points along the class and flatters: with a site effect and no effect of the
    class at all it scored 0.62 to 0.68 (docs/log.md; Nygaard, Rodland & Hovig 2016 for ComBat).

    Args:
        bags: The training scans of one fold, and no other.
        config: Covariates and method.

    Raises:
        CohortError: A covariate is unknown in every scan, or none of its categories has enough scans.
    """
    design = _fit_design(bags, config)
    columns, site = design.encode(bags), design.sites(bags)
    parts: dict[str, Residual | Combat] = {}
    for name in PARTS:
        if not _has(bags, name):
            continue
        values = slice_values(bags, name)
        if config.method == "combat":
            known = site >= 0
            parts[name] = fit_combat(values[known], columns[known][:, ~design.of_site], site[known])
        else:
            effects = np.concatenate([np.ones((len(values), 1)), columns], axis=1)
            parts[name] = Residual(slope=np.linalg.lstsq(effects, values, rcond=None)[0][1:])
    return Adjustment(design=design, parts=parts)


def refuse_target(config: AdjustConfig, target: str | None) -> None:
    """Refuse to adjust for what is to be told.

    Raises:
        ConfigError: The target is one of the covariates.
    """
    if target in config.covariates:
        raise ConfigError(f"adjust.covariates holds {target}, which is the target; leave it out")


def refuse_one_site(config: AdjustConfig, scans: Sequence[Scan]) -> None:
    """Refuse to harmonise where there is nothing to bring together.

    Raises:
        CohortError: ComBat is wanted and all scans come from one site.
    """
    sites = {scan.site for scan in scans}
    if config.method == "combat" and config.covariates and len(sites) < 2:
        raise CohortError(
            f"adjust.method combat brings sites together; all scans are from {next(iter(sites)) or 'no named site'}: "
            "fill in the column site, or use residual"
        )


def slice_values(bags: Bags, part: str) -> Array:
    """Give what bags hold of each slice, or the mean of its tissue patches, side by side, `[scans, slices * dim]`."""
    if part != "tokens":
        return np.asarray(getattr(bags, part).flatten(1).double().numpy())
    return np.stack([_slice_means(scan).flatten() for scan in bags.tokens if scan])


def mean_token(bags: Bags) -> Array:
    """Average the tissue patches of each scan, `[scans, dim]`."""
    return np.stack([scan.tokens[scan.tissue].astype(np.float64).mean(axis=0) for scan in bags.tokens if scan])


def _fit_design(bags: Bags, config: AdjustConfig) -> Design:
    table = person_and_site(bags.scans, bags.brain_ml)
    columns: dict[str, float] = {}
    for name in (covariate.replace("-", " ") for covariate in config.covariates):
        values = table[name].dropna()
        if name in ("age", "head size"):
            own = {name: float(values.mean())} if len(values) else {}
        else:
            counts = values.value_counts().sort_index()
            counts = counts[counts >= FEWEST]
            own = {f"{name}={level}": count / counts.sum() for level, count in counts.items()}
        if not own:
            raise CohortError(
                f"no training scan has a {name} (that {FEWEST} or more share, if it is a category); fill the column "
                "in, or leave it out of adjust.covariates"
            )
        columns |= own
    return Design(columns=tuple(columns), mean=np.array(list(columns.values())))


def _has(bags: Bags, part: str) -> bool:
    return all(scan is not None for scan in bags.tokens) if part == "tokens" else getattr(bags, part) is not None


def _slice_means(scan: PatchTokens) -> Array:
    """Average the tissue patches of each slice (all of them where it has none), `[slices, dim]`."""
    counted = torch.from_numpy(scan.tissue | ~scan.tissue.any(axis=(1, 2), keepdims=True)).float()
    total = torch.einsum("srcd,src->sd", torch.from_numpy(scan.tokens).float(), counted)
    return np.asarray((total / counted.sum(dim=(1, 2))[:, None]).double().numpy())


def _shifted(bags: Bags, shift: Mapping[str, Array]) -> Bags:
    """Add each slice's shift `[scans, slices, dim]` to it and to its patches; padding stays zero."""
    changed: dict[str, Any] = {}
    for name, values in shift.items():
        if name == "tokens":
            changed[name] = tuple(
                None if scan is None else _shifted_tokens(scan, own)
                for scan, own in zip(bags.tokens, values, strict=True)
            )
        else:
            changed[name] = getattr(bags, name) + torch.from_numpy(values).float() * bags.mask[..., None]
    return replace(bags, **changed)


def _shifted_tokens(scan: PatchTokens, shift: Array) -> PatchTokens:
    step = torch.from_numpy(shift).float()[:, None, None]

    def moved(tokens: NDArray[np.float16], by: Tensor) -> NDArray[np.float16]:
        return np.asarray((torch.from_numpy(tokens).float() + by).half().numpy())

    return replace(
        scan,
        tokens=moved(scan.tokens, step[: len(scan.tokens)]),
        blemished=moved(scan.blemished, step[torch.from_numpy(scan.blemished_slice)]),
    )
