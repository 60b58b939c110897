"""The house stays in order: imports go one way, files stay small, help needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "dinoatten3d"
GROUND = {"config", "errors", "files", "toml"}
ORDER = ["data", "features", "learning", "evaluation", "inference", "report", "steps", "demo", "console", "cli"]
FILES = sorted(p for p in SOURCE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py"))


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("dinoatten3d.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_room_imports_only_from_rooms_to_its_left(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if room in GROUND:
        assert _imports(path) <= GROUND
    else:
        assert _imports(path) <= GROUND | set(ORDER[: ORDER.index(room) + 1])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_is_one_concept_and_not_a_book(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 360


def test_help_and_import_do_not_import_torch() -> None:
    code = (
        "import sys, dinoatten3d, dinoatten3d.cli as cli\n"
        "cli.app('train --help', result_action='return_value', exit_on_error=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
