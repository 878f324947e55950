"""Imports go one way: eval → defense → dedup."""

import ast
import re
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


def listed_modules(package: str) -> list[str]:
    """Modules of a package in the order of its table in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.split(f"| {package}/ | |")[1].split("\n\n")[0]
    return re.findall(r"^\| `(\w+)(?:\.py|/)`", table, flags=re.MULTILINE)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_module_imports_only_those_above_it(package: str) -> None:
    order = listed_modules(package)
    for path in (ROOT / package).glob("*.py"):
        if path.stem == "__init__":
            continue
        assert path.stem in order, f"docs/architecture.md does not list {package}/{path.name}"
        above = set(order[: order.index(path.stem)])
        for module in re.findall(rf"from {package}\.(\w+)", path.read_text()):
            assert module in above, f"{package}/{path.name} imports {module}, which is not above it"
        for names in re.findall(rf"^ *from {package} import (.+)$", path.read_text(), flags=re.MULTILINE):
            for name in re.findall(r"(\w+)(?: as \w+)?(?:, |$)", names):
                assert name in above, f"{package}/{path.name} imports {name}, which is not above it"
