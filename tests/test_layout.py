"""The house stays tidy: imports go one way, and what the package needs at run time is packed."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "tools": set(),
    "feedback_store": set(),
    "serving": {"tools", "feedback_store"},
    "online_rl": {"serving", "tools", "feedback_store"},
    "app": {"serving", "tools", "feedback_store", "online_rl"},
}


def imports(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_lower_ones(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    wrong = {
        str(file.relative_to(ROOT)): sorted(above)
        for file in files
        if (above := imports(file) & set(MAY_IMPORT) - MAY_IMPORT[room] - {room})
    }
    assert not wrong


def test_every_data_file_of_a_room_is_packed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packed = {
        file
        for room, patterns in project["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for file in (ROOT / room).glob(pattern)
    }
    data = {
        file
        for room in MAY_IMPORT
        for file in (ROOT / room).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc", ".gguf")
    }
    assert data - packed == set()
