"""What the command line talks with: messages, progress bars, and options from files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts.config import Dict
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dinoatten3d.config import SliceConfig
from dinoatten3d.errors import ScanError
from dinoatten3d.toml import load_recipe, read_toml, recipe_table

if TYPE_CHECKING:
    from dinoatten3d.evaluation.audit import Audit
    from dinoatten3d.features.backbone import Backbone, Positions
    from dinoatten3d.features.verify import Comparison
    from dinoatten3d.inference.predict import Prediction

RECIPE_TABLES = {"extract": ("slices", "patches"), "train": ("model", "loss", "training", "adapt", "lora", "adjust")}
"""Which of a recipe's tables are options of which command."""

EFFECT_SIGNS = {"epsilon squared": "ε²", "Cramér's V": "V"}
SEVERITY_STYLE = {"invalid": "bold red", "warning": "yellow", "note": "dim"}

say = Console(stderr=True, highlight=False, soft_wrap=True)


def config_layers(arguments: list[str]) -> list[Dict]:
    """Lay --config over --recipe over the defaults: the values that options have when they are not given."""
    layers = []
    command = arguments[0] if arguments else ""
    foreign = {table for name, tables in RECIPE_TABLES.items() if name != command for table in tables}
    chosen = _option(arguments, "--config")
    given = read_toml(Path(chosen)) if chosen else {}
    if chosen:  # one file may serve several commands: each takes its own tables
        own = {key: value for key, value in given.items() if key not in foreign}
        layers.append(Dict(own, use_commands_as_keys=False, source=chosen))
    if command in RECIPE_TABLES:
        recipe = _option(arguments, "--recipe") or str(given.get("recipe", "default"))
        load_recipe(recipe)  # refuses tables and settings that no command knows
        tables = recipe_table(recipe)
        own = {key: tables[key] for key in RECIPE_TABLES[command] if key in tables}
        layers.append(Dict(own, use_commands_as_keys=False, source=f"recipe {recipe}"))
    return layers


def with_planes(slices: SliceConfig, planes: str | None) -> SliceConfig:
    """Put `--planes axial,coronal` in the place of the slices' planes, where it was given."""
    if planes is None:
        return slices
    names: Any = tuple(name.strip() for name in planes.split(","))  # SliceConfig refuses what is no plane
    return replace(slices, planes=names)


def _option(arguments: list[str], name: str) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == name and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Give a function that opens a named bar and returns its `progress(done, total)`."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=say) as bars:

        def bar(name: str) -> Callable[[int, int], None]:
            task = bars.add_task(name, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield bar


def fetch_backbone(name: str, device: str = "cpu", positions: Positions = "official") -> Backbone:
    """Find a backbone, say where it comes from, and load it."""
    from dinoatten3d.features.backbone import load_backbone
    from dinoatten3d.features.weights import find_weights

    found = find_weights(name, tell)
    tell(f"backbone: {found.title}, from {found.source}")
    return load_backbone(found, device=device, positions=positions)


def fetch_same_backbone(made_with: Mapping[str, str], device: str = "cpu", instead: str | None = None) -> Backbone:
    """Find the backbone that made features (their `identity`), or the one named instead, and load it the same way."""
    positions: Positions = "transformers" if made_with["position_table"] == "transformers" else "official"
    return fetch_backbone(instead or made_with.get("reference", made_with["name"]), device, positions)


def predictions(
    folder: Path, scans: list[Path], covariates: list[str], backbone: str | None, device: str
) -> Iterator[Prediction | str]:
    """Yield a prediction for each scan, or the reason why there is none (said at once)."""
    from dinoatten3d.inference.covariates import given_covariates
    from dinoatten3d.inference.predict import predict as run_predict
    from dinoatten3d.learning.run import open_run

    run = open_run(folder)
    given = given_covariates(run, covariates)
    model = fetch_same_backbone(run.config["features"]["backbone_identity"], device, backbone)
    for scan in scans:
        try:
            yield run_predict(run, scan, model, given)
        except ScanError as error:
            say.print(f"failed: {error}", markup=False, style="red")
            yield str(error)


def tell(sentence: str) -> None:
    """Say a sentence that may hold brackets."""
    say.print(sentence, markup=False)


def print_verdict(run: Path) -> None:
    """Print what a run found."""
    verdict = json.loads((run / "metrics.json").read_text())["verdict"]
    print(verdict["headline"])
    for sentence in verdict["sentences"]:
        print(f"  {sentence}")
    if (run / "audit.json").exists():
        for found in json.loads((run / "audit.json").read_text())["findings"]:
            if found["severity"] != "note":
                print(f"  Audit, {found['severity']}: {found['seen']} {found['means']}")


def print_comparison(found: Comparison, *, rows: int = 10) -> None:
    """Print the tensors that differ most, how many are equal, and the verdict."""
    if found.differences:
        print(f"{'tensor':<60} {'largest':>10} {'relative':>10}")
    for one in found.differences[:rows]:
        print(f"{one.name:<60} {one.largest:>10.2g} {one.relative:>10.2g}")
    for sentence in found.alone[:rows]:
        print(sentence)
    print(f"{found.equal} tensors are equal, {len(found.differences)} differ, {len(found.alone)} have no counterpart")
    print(found.verdict)


def print_audit(found: Audit) -> None:
    """Print the findings of an audit as tables, worst first."""
    console = Console(highlight=False)
    classes = "".join(f", {name} {count}" for name, count in found.class_counts.items())
    console.print(f"{found.scans} scans of {found.subjects} subjects{classes}", markup=False)
    table = Table("weight", "what was seen", "what it means, and what to do", box=None, padding=(0, 2, 1, 0))
    for finding in found.findings:
        style = SEVERITY_STYLE[finding.severity]
        meaning = f"{escape(finding.means)} [bold]{escape(finding.advice)}[/bold]"
        table.add_row(f"[{style}]{finding.severity}[/{style}]", escape(finding.seen), meaning)
    if found.findings:
        console.print(table)
    if found.associations:
        console.print(_association_table(found))
    for row in found.resolution:
        widths = ", ".join(f"{auroc} ± {half:.2f}" for auroc, half in row.half_widths.items())
        console.print(
            f"{row.positive} ({row.subjects}) against the others ({row.others}): AUROC {widths}; the smallest "
            f"told from 0.5 with 80 % power is {row.smallest_auroc:.2f}",
            markup=False,
        )
    verdict = (
        "Something would invalidate any result of this cohort." if found.invalid else "Nothing invalidates a result."
    )
    console.print(f"{verdict} Looked at: {', '.join(found.looked_at)}.")


def _association_table(found: Audit) -> Table:
    table = Table(
        "covariate", "test", "effect size", "p (Holm)", "AUROC alone", box=None, padding=(0, 2, 0, 0), expand=False
    )
    for row in found.associations:
        effect = "" if row.effect == "-" else f"{EFFECT_SIGNS[row.effect]} {row.effect_size:.2f}"
        p_value = "" if isnan(row.p_value) else "< 0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}"
        auroc = row.auroc
        alone = "" if isnan(auroc.value) else f"{auroc.value:.2f} ({auroc.low:.2f} to {auroc.high:.2f})"
        style = "bold" if row.p_value < 0.05 else None
        table.add_row(escape(row.covariate), row.test, effect, p_value, alone, style=style)
    return table
