"""What the command line talks with: messages, progress bars, and options from files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts.config import Dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dinoatten3d.config import SliceConfig, load_recipe, read_toml, recipe_table

if TYPE_CHECKING:
    from dinoatten3d.features.backbone import Backbone

RECIPE_TABLES = {"extract": ("slices", "patches"), "train": ("model", "loss", "training")}
"""Which of a recipe's tables are options of which command."""

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


def fetch_backbone(name: str, device: str = "cpu") -> Backbone:
    """Find a backbone, say where it comes from, and load it."""
    from dinoatten3d.features.backbone import load_backbone
    from dinoatten3d.features.weights import find_weights

    found = find_weights(name, say.print)
    say.print(f"backbone: {found.title}, from {found.source}", markup=False)
    return load_backbone(found, device=device)


def print_verdict(run: Path) -> None:
    """Print what a run found."""
    verdict = json.loads((run / "metrics.json").read_text())["verdict"]
    print(verdict["headline"])
    for sentence in verdict["sentences"]:
        print(f"  {sentence}")
