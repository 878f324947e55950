"""Imports go one way: eval → defense → dedup."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {"dedup": {"dedup"}, "defense": {"dedup", "defense"}, "eval": {"dedup", "defense", "eval"}}


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names & set(ALLOWED)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_no_module_imports_upwards(package: str) -> None:
    modules = list((ROOT / package).rglob("*.py"))
    assert len(modules) > 5
    for path in modules:
        assert imported_packages(path) <= ALLOWED[package], path
