run = python -m uv run --all-extras

.PHONY: check docs fmt test test-slow
check: ; $(run) ruff check && $(run) mypy && $(run) pytest
docs: ; $(run) typer eval.cli utils docs --name unmemorize --output docs/cli.md
fmt: ; $(run) ruff format && $(run) ruff check --fix
test: ; $(run) pytest
test-slow: ; $(run) pytest -m slow
