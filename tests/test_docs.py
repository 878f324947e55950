"""The documents: the reference of commands is that of the program, and no link leads nowhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
REFERENCE = ("-m", "typer", "eval.cli", "utils", "docs", "--name", "unmemorize")  # `make docs`


def test_the_reference_of_commands() -> None:
    told = subprocess.run([sys.executable, *REFERENCE], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.count("\n## `unmemorize ") > 15
    assert told.strip() == (ROOT / "docs" / "cli.md").read_text().strip(), "docs/cli.md is old: run `make docs`"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in targets if target and not (ROOT / page).parent.joinpath(target).exists()]
    assert missing == []
