"""Recipes and configurations as TOML tables, there and back."""

from __future__ import annotations

import dataclasses
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from dinoatten3d.config import Recipe
from dinoatten3d.errors import ConfigError, suggest

T = TypeVar("T")


RECIPES = ("default", "paper", "published")


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe that ships with the package, or a TOML file.

    Args:
        name: `default`, `paper`, `published`, or the path of a TOML file.

    Returns:
        The recipe; what the file leaves out has the default recipe's value.

    Raises:
        ConfigError: The name is unknown, the file unreadable, or a key or value does not fit.
    """
    return from_dict(Recipe, recipe_table(name), "recipe")


def recipe_table(name: str | Path) -> dict[str, Any]:
    """Give the recipe's TOML tables as they stand in the file."""
    if str(name) in RECIPES:
        return tomllib.loads((resources.files("dinoatten3d") / "recipes" / f"{name}.toml").read_text())
    if not Path(name).suffix:
        raise ConfigError(f"there is no recipe '{name}'{suggest(str(name), RECIPES)}; known: {', '.join(RECIPES)}")
    return read_toml(Path(name))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file, with the file named in every error."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None


def from_dict(kind: type[T], table: dict[str, Any], where: str) -> T:
    """Build a configuration dataclass from nested tables, refusing keys it does not have."""
    hints = get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in names:
            raise ConfigError(f"{where} has no setting '{key}'{suggest(key, sorted(names))}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            values[key] = from_dict(hint, value, f"{where}.{key}")
        else:
            values[key] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where} holds a value of the wrong type: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a configuration into plain tables that TOML and JSON can hold."""
    return {
        key: list(value) if isinstance(value, tuple) else to_dict(value) if isinstance(value, dict) else value
        for key, value in (config if isinstance(config, dict) else dataclasses.asdict(config)).items()
    }
