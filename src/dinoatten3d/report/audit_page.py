"""The findings of an audit as a page of their own, and as a part of a run's report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from dinoatten3d.report import figures
from dinoatten3d.report.drawing import to_svg
from dinoatten3d.report.page import NOTHING, number, templates


def audit_page(found: Mapping[str, Any]) -> str:
    """Render what `audit.json` holds as one self-contained HTML page."""
    page = templates().get_template("audit_page.html.j2")
    return page.render(audited=found, audit_figure=audit_figure(found))


def audit_figure(found: Mapping[str, Any]) -> Markup:
    """Draw how well each covariate alone tells the classes; nothing where there is no figure to draw."""
    aurocs = {a["covariate"]: a["auroc"] for a in found["associations"] if number(a["auroc"]["value"]) != NOTHING}
    if not aurocs:
        return Markup("")
    said = ", ".join(f"{name} {number(auroc['value'])}" for name, auroc in aurocs.items())
    return to_svg(figures.forest_figure(aurocs, 0.5), "covariates", f"AUROC of each covariate alone: {said}.")
