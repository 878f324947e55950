run = python -m uv run --all-extras

.PHONY: check fmt test test-slow
check: ; $(run) ruff check && $(run) mypy && $(run) pytest
fmt: ; $(run) ruff format && $(run) ruff check --fix
test: ; $(run) pytest
test-slow: ; $(run) pytest -m slow
