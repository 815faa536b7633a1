"""What the program says to somebody who typed something else than it expects, and that the lines
which it tells to type are right."""

import os
import sys

import pytest
from test_configurator import MODEL, _restore, script, write  # noqa: F401  fixtures

from configurator import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# -----------------------------------------------------------------------------
# the command line


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A directory with configs in it, from which train.py is started."""
    (tmp_path / "config").mkdir()
    for name in ("toy_sft", "nanogpt", "smol"):
        (tmp_path / "config" / f"{name}.py").write_text("batch_size = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    "typed, right",
    [
        ("config/toy_sft", "config/toy_sft.py"),
        ("toy_sft", "config/toy_sft.py"),
        ("toy_sft.py", "config/toy_sft.py"),
        ("config/toy_stf.py", "config/toy_sft.py"),
        ("nanogtp --top_k=3", "config/nanogpt.py --top_k=3"),
        ("--batch_size 16", "--batch_size=16"),
        (
            "toy_sft --learning_rate 3e-4 --compile",
            "config/toy_sft.py --learning_rate=3e-4 --compile",
        ),
        ("--offset -1 --compile False", "--offset=-1 --compile=False"),
        ("--compile toy_sft --out_dir out/x", "--compile config/toy_sft.py --out_dir=out/x"),
        ("--batch-size=16", "--batch_size=16"),
        ("-batch_size=16", "--batch_size=16"),
        ("batch_size=16", "--batch_size=16"),
    ],
)
def test_the_line_that_would_have_been_right(script, configs, typed, right):  # noqa: F811
    with pytest.raises(UserError) as e:
        script(*typed.split())
    assert str(e.value).endswith(f"; did you mean: python train.py {right}")
    script(*right.split())


@pytest.mark.parametrize(
    "typed",
    [
        "config/nope.py",  # not nanogpt.py, whose letters it has
        "config/foo",
        "stray",
        "nowhere/toy.py",
        "--batch_size many",
        "toy_sft --nothing=3",  # a second mistake, which has no such remedy
        "--batch_size",
    ],
)
def test_no_line_is_suggested_that_would_be_wrong(script, configs, typed):  # noqa: F811
    with pytest.raises(UserError) as e:
        script(*typed.split())
    assert "did you mean" not in str(e.value)


def test_a_source_is_not_taken_for_a_config(script, configs):  # noqa: F811
    """prepare.py takes names of data sets, which may be those of configs."""
    with pytest.raises(UserError, match=r"did you mean: python train.py toy_sft --top_k=3$"):
        script("toy_sft", "--top_k", "3", words=True)


@pytest.mark.parametrize(
    "value", ["(0.9, 0.95)", "[1]", "None", "{}", "lambda: 3", "3", "'x'", "1j", "b'x'", "object()"]
)
def test_an_unknown_key_in_a_config_is_refused_whatever_it_holds(script, tmp_path, value):  # noqa: F811
    path = write(tmp_path, f"batch_size = 2\nbetas = {value}\n")
    with pytest.raises(UserError, match="c.py, line 2: there is no key 'betas'; --help lists all"):
        script(path)
    for name in ("_betas", "batch_size, _betas"):
        script(write(tmp_path, f"{name} = {value if ',' not in name else '(3, 4)'}\n"))
    config = write(tmp_path, f"betas = {value}\nout_dir = str(betas)\n")
    assert "betas" not in script(config)[0]


@pytest.mark.parametrize(
    "line",
    ["betas, top_k = 1, 2", "betas: tuple = (1, 2)", "(betas := 3)", "top_k = betas = 3"],
)
def test_however_an_unknown_key_is_assigned(script, tmp_path, line):  # noqa: F811
    with pytest.raises(UserError, match="line 1: there is no key 'betas'"):
        script(write(tmp_path, line + "\n"))


def test_what_a_config_does_not_leave_behind_is_no_key(script, tmp_path):  # noqa: F811
    """Variables of a function, of a comprehension, and what the config deletes itself."""
    text = "def f():\n    x = 3\ntop_k = len([0 for y in (1, 2)])\nz = 3\ndel z\n"
    assert script(write(tmp_path, text))[0]["top_k"] == 2
