"""defense.cli: thin, quick to import, and clear about a missing extra."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from defense.cli import MissingExtraError, app, require_extra

ROOT = Path(__file__).parent.parent


def test_importing_the_command_line_imports_nothing_heavy():
    code = (
        "import sys, defense.cli; "
        "print(sorted({'torch', 'polars', 'numpy', 'diffusers', 'transformers', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_train_passes_its_arguments_on(tmp_path, monkeypatch):
    from defense import train as training
    from defense.config import TrainConfig

    calls = []
    monkeypatch.setattr(training, "train", lambda *args: calls.append(args))
    path = tmp_path / "c.toml"
    path.write_text("steps = 3")
    arguments = [
        "train",
        "OUT",
        "--arm",
        "refill",
        "--config",
        str(path),
        "-o",
        str(tmp_path / "run"),
        "--seed",
        "5",
        "--samples",
        "0",
    ]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'run' / 'model'}\n"
    assert calls == [(Path("OUT"), "refill", TrainConfig(steps=3), tmp_path / "run", 5)]


@pytest.mark.parametrize(("rank", "drawn"), [("0", 1), ("1", 0)])
def test_training_ends_with_a_sheet_of_samples_once(tmp_path, monkeypatch, rank, drawn):
    from defense import sample, sheet
    from defense import train as training

    calls = []
    monkeypatch.setattr(training, "train", lambda *args: None)
    monkeypatch.setattr(sample, "sample_trained", lambda *args: calls.append(args))
    monkeypatch.setattr(sheet, "write_sheet", lambda folder: calls.append(folder))
    monkeypatch.setenv("RANK", rank)
    (tmp_path / "c.toml").write_text("")
    words = ["train", "OUT", "--arm", "raw", "--config", str(tmp_path / "c.toml"), "-o", "RUN"]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    assert calls == [(Path("OUT"), Path("RUN"), 8), Path("RUN/samples")] * drawn


def test_a_negative_seed_is_refused():
    result = CliRunner().invoke(app, ["train", "OUT", "--arm", "raw", "--config", "c", "-o", "r", "--seed", "-1"])
    assert result.exit_code == 2


def test_a_missing_extra_is_named():
    code = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path; from defense.cli import train\n"
        "try: train(Path('OUT'), 'raw', Path('c'), Path('r'), 0)\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "torch is not installed: pip install 'unmemorize[train]'\n"


def test_a_hole_in_our_own_package_is_no_missing_extra():
    with pytest.raises(ModuleNotFoundError), require_extra("train"):
        raise ModuleNotFoundError("gone", name="defense.gone")
    with pytest.raises(MissingExtraError, match=r"unmemorize\[eval\]"), require_extra("eval"):
        raise ModuleNotFoundError("gone", name="networkx")
