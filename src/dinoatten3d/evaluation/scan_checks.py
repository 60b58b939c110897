"""Scans that are not like the others: files, axes, grids and intensities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from dinoatten3d.data.cohort import Scan
from dinoatten3d.data.header import Header
from dinoatten3d.data.inspect import Inspection, Voxels
from dinoatten3d.data.volume import OBLIQUE_DEGREES
from dinoatten3d.evaluation.findings import Finding, Severity, count, listed

ODD_FACTOR = 1.5
"""A voxel size or field of view this many times larger or smaller than the cohort's median is odd."""
THICK_MM = 3.0
FEW_LEVELS = 64
CLIPPED = 0.01
CUT_MM2 = 300.0
BRAIN_ML = (700.0, 2200.0)
WIDEST = 1.05
"""Brains are longer from front to back than they are wide (0.71 to 0.94 in 82 adults) or high (0.70 to 0.91)."""
UNITS_FACTOR = 20.0


def scan_findings(scans: Sequence[Scan], inspections: Sequence[Inspection]) -> list[Finding]:
    """Report what is odd about single scans, in the order of severity of its kind."""
    headers = [(scan, found.header) for scan, found in zip(scans, inspections, strict=True) if found.header]
    voxels = [(scan, found.voxels) for scan, found in zip(scans, inspections, strict=True) if found.voxels]
    found = [
        _unreadable(scans, inspections),
        *_header_findings(headers),
        *_grid_findings(headers),
        *_voxel_findings(voxels),
        _different_units(voxels),
    ]
    return [finding for finding in found if finding is not None]


def _unreadable(scans: Sequence[Scan], inspections: Sequence[Inspection]) -> Finding | None:
    problems = [f"row {scan.row}: {i.problem}" for scan, i in zip(scans, inspections, strict=True) if i.problem]
    return _finding(
        problems,
        "unreadable-scan",
        "invalid",
        seen=f"{count(len(problems), 'scan')} cannot be used: {listed(problems, most=3)}.",
        means="Training refuses a cohort with such a scan; leaving it out silently would change the cohort.",
        advice="Mend the file, or remove the row and say so.",
    )


def _header_findings(headers: Sequence[tuple[Scan, Header]]) -> list[Finding | None]:
    without = [scan.id for scan, header in headers if not header.oriented]
    oblique = [f"{scan.id} ({h.tilt_degrees:.0f}°)" for scan, h in headers if h.tilt_degrees > OBLIQUE_DEGREES]
    axes = Counter(header.axes for _, header in headers)
    usual = axes.most_common(1)[0][0] if axes else ""
    odd = [f"{scan.id} ({header.axes})" for scan, header in headers if header.axes != usual]
    return [
        _finding(
            without,
            "no-orientation",
            "warning",
            seen=f"The header of {count(len(without), 'scan')} gives no orientation: {listed(without)}.",
            means="Which side is left, and which axis is axial, is a guess.",
            advice="Convert these scans again from the original, or set the sform.",
        ),
        _finding(
            odd,
            "odd-axes",
            "warning",
            seen=f"{count(len(odd), 'scan')} of {len(headers)} with axes other than {usual}: {listed(odd)}.",
            means="Axes are turned by the header, so nothing is lost if it is right; a wrong one swaps sides unseen.",
            advice="Find out why they were converted differently, and look at their sides in a viewer.",
        ),
        _finding(
            oblique,
            "oblique",
            "note",
            seen=f"{count(len(oblique), 'scan')} tilted by more than {OBLIQUE_DEGREES:.0f}°: {listed(oblique)}.",
            means="They are resampled onto the scanner's axes, which blurs them a little.",
            advice="Nothing, unless the classes differ in it.",
        ),
    ]


def _grid_findings(headers: Sequence[tuple[Scan, Header]]) -> list[Finding | None]:
    if not headers:
        return []
    spacing = np.array([header.spacing_mm for _, header in headers])
    field_mm = spacing * np.array([header.shape for _, header in headers])
    odd = _far_from_median(spacing) | _far_from_median(field_mm)
    named = [
        f"{scan.id} ({' x '.join(f'{mm:g}' for mm in h.spacing_mm)} mm, {' x '.join(map(str, h.shape))})"
        for (scan, h), strange in zip(headers, odd, strict=True)
        if strange
    ]
    thick = [f"{scan.id} ({max(h.spacing_mm):g} mm)" for scan, h in headers if max(h.spacing_mm) > THICK_MM]
    return [
        _finding(
            named,
            "odd-grid",
            "warning",
            seen=f"Voxel size or field of view of {count(len(named), 'scan')} is {ODD_FACTOR} times off the median: "
            f"{listed(named, most=3)}.",
            means="They come from another sequence, or were cut or resampled in another way.",
            advice="Check that they are T1 scans of the whole brain; leave them out, or process all alike.",
        ),
        _finding(
            thick,
            "thick-slices",
            "warning",
            seen=f"{count(len(thick), 'scan')} with slices thicker than {THICK_MM:g} mm: {listed(thick)}.",
            means="Between such slices much is interpolated, and small lesions are lost.",
            advice="Take slices in the plane in which they were scanned (--slices.planes), or leave them out.",
        ),
    ]


def _voxel_findings(voxels: Sequence[tuple[Scan, Voxels]]) -> list[Finding | None]:
    def which(is_odd: Callable[[Voxels], bool], detail: Callable[[Voxels], str]) -> list[str]:
        return [f"{scan.id} ({detail(v)})" for scan, v in voxels if is_odd(v)]

    mended = which(lambda v: any("NaN" in note for note in v.notes), lambda v: v.notes[0].split(" were ")[0])
    negative = which(lambda v: v.lowest < 0, lambda v: f"{v.lowest:.4g}")
    coarse = which(lambda v: v.levels < FEW_LEVELS, lambda v: f"{v.levels} grey levels")
    clipped = which(lambda v: v.clipped > CLIPPED, lambda v: f"{100 * v.clipped:.0f} % at the maximum")
    empty = which(lambda v: v.empty_slices > 0, lambda v: f"{v.empty_slices}")
    cut = which(lambda v: v.cut_mm2 > CUT_MM2, lambda v: f"{v.cut_mm2 / 100:.0f} cm²")
    turned = which(_is_turned, lambda v: " x ".join(f"{mm:.0f}" for mm in v.extent_mm) + " mm")
    size = which(lambda v: not BRAIN_ML[0] <= v.brain_ml <= BRAIN_ML[1], lambda v: f"{v.brain_ml:.0f} mL")
    return [
        _finding(
            turned,
            "wrong-axes",
            "warning",
            seen=f"{count(len(turned), 'brain is', 'brains are')} wider or higher than long: {listed(turned)} "
            "(left-right, front-back, bottom-top).",
            means="The header names the axes wrongly, so that slices are not in the plane that they are said to be in.",
            advice="Look at them in a viewer; convert them again from the original.",
        ),
        _finding(
            mended,
            "not-finite",
            "warning",
            seen=f"{count(len(mended), 'scan holds', 'scans hold')} NaN or infinite voxels: {listed(mended)}.",
            means="They became the smallest finite value; something went wrong before.",
            advice="Find the step that made them (a division by zero outside the brain, a bad resampling).",
        ),
        _finding(
            empty,
            "empty-slices",
            "warning",
            seen=f"Slices inside {count(len(empty), 'scan')} are empty: {listed(empty)}.",
            means="Part of the brain is missing, and a model sees the gap.",
            advice="Look at them; convert them again or leave them out.",
        ),
        _finding(
            cut,
            "brain-cut-off",
            "warning",
            seen=f"The brain is cut by the border of {count(len(cut), 'scan')}: {listed(cut)}.",
            means="Part of the brain is missing; head size and slice places are off.",
            advice="Look at them; if classes differ in it, leave them out.",
        ),
        _finding(
            size,
            "odd-brain-size",
            "warning",
            seen=f"The brain found in {count(len(size), 'scan')} has an unlikely size: {listed(size)}.",
            means="Skull stripping failed, the scan is no head, or the voxel size in the header is wrong.",
            advice="Look at them; strip them again, or leave them out.",
        ),
        _finding(
            clipped,
            "clipped",
            "warning",
            seen=f"Bright tissue of {count(len(clipped), 'scan')} is clipped: {listed(clipped)}.",
            means="Contrast inside it is lost.",
            advice="Export them again with the full range.",
        ),
        _finding(
            coarse,
            "few-grey-levels",
            "warning",
            seen=f"{count(len(coarse), 'scan has', 'scans have')} fewer than {FEW_LEVELS} grey levels: "
            f"{listed(coarse)}.",
            means="They were stored too coarsely, or are masks and no images.",
            advice="Convert them again from the original.",
        ),
        _finding(
            negative,
            "negative-intensities",
            "note",
            seen=f"{count(len(negative), 'scan has', 'scans have')} negative intensities: {listed(negative)}.",
            means="They were normalised or resampled with overshoot; pictures are scaled by scan, so little changes.",
            advice="Nothing, if all scans were processed alike.",
        ),
    ]


def _different_units(voxels: Sequence[tuple[Scan, Voxels]]) -> Finding | None:
    usual = np.median([v.highest for _, v in voxels]) if voxels else 0.0
    odd = [
        f"{scan.id} (up to {v.highest:.4g})"
        for scan, v in voxels
        if not usual / UNITS_FACTOR <= v.highest <= usual * UNITS_FACTOR
    ]
    return _finding(
        odd,
        "odd-intensities",
        "note",
        seen=f"Intensities of {count(len(odd), 'scan')} are in other units than the others' (up to {usual:.4g}): "
        f"{listed(odd)}.",
        means="Pictures are scaled by scan, so little changes, but the scans were processed differently.",
        advice="Process all scans alike.",
    )


def _is_turned(voxels: Voxels) -> bool:
    width, length, height = voxels.extent_mm
    return max(width, height) > WIDEST * length


def _far_from_median(values: np.ndarray) -> np.ndarray:
    ratio = values / np.median(values, axis=0)
    far: np.ndarray = (np.maximum(ratio, 1 / ratio) > ODD_FACTOR).any(axis=1)
    return far


def _finding(
    cases: Sequence[str], code: str, severity: Severity, *, seen: str, means: str, advice: str
) -> Finding | None:
    """Give the finding where there is a case of it."""
    return Finding(code=code, severity=severity, seen=seen, means=means, advice=advice) if cases else None
