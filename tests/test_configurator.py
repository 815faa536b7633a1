"""nanoGPT's command line with better manners."""
import os
import subprocess
import sys
import textwrap

import pytest

from configurator import UserError, configure

SCRIPT = '''
"""What the script is."""
import os
# the first group
out_dir = 'out'       # where # it goes
batch_size = 12       # sequences
learning_rate = 6e-4  # peak
compile = True
grad_clip = 1.0; _hidden = 3
CONSTANT = 5
derived = os.sep
# the second group
top_k = 200
def after(): pass
too_late = 1
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)

    def run(*argv, words=False):
        """The values after configure(), and what it returned."""
        variables = {"__file__": str(path)}
        exec(SCRIPT, variables)
        setup = configure(variables, words=words, argv=[str(a) for a in argv])
        return variables, setup
    yield run
    sys.excepthook = sys.__excepthook__


def config_file(tmp_path, text, name="c.py"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(text))
    return path


def test_keys_are_the_literals_of_the_block(script):
    _, setup = script()
    assert setup.keys == ["out_dir", "batch_size", "learning_rate", "compile", "grad_clip", "top_k"]
    assert setup.given == {} and setup.files == []


def test_files_in_order_then_the_command_line(script, tmp_path):
    first = config_file(tmp_path, "batch_size = 1\nlearning_rate = 1\nout_dir = 'a'", "first.py")
    second = config_file(tmp_path, "batch_size = 2\nout_dir = 'b'", "second.py")
    variables, setup = script(first, "--out_dir=c", second)
    assert (variables["batch_size"], variables["learning_rate"], variables["out_dir"]) == (2, 1.0, "c")
    assert type(variables["learning_rate"]) is float
    assert setup.given == {"batch_size": str(second), "learning_rate": str(first), "out_dir": "command line"}


@pytest.mark.parametrize("arg, key, value", [
    ("--batch_size=3", "batch_size", 3), ("--batch_size=1e3", "batch_size", 1000), ("--batch_size=-1", "batch_size", -1),
    ("--learning_rate=1", "learning_rate", 1.0), ("--learning_rate=3e-4", "learning_rate", 3e-4),
    ("--compile", "compile", True), ("--compile=False", "compile", False), ("--compile=true", "compile", True),
    ("--out_dir=007", "out_dir", "007"), ("--out_dir=a=b", "out_dir", "a=b"), ("--out_dir=", "out_dir", "")])
def test_values(script, arg, key, value):
    found = script(arg)[0][key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("arg, said", [
    ("--batchsize=3", r"--batchsize: there is no such key; did you mean 'batch_size'"),
    ("--batch_size=3.5", r"batch_size wants a whole number, such as 12; got 3.5, a number"),
    ("--batch_size=many", r"batch_size wants a whole number, such as 12; got 'many', a text"),
    ("--learning_rate=fast", r"learning_rate wants a number, such as 0.0006; got 'fast', a text"),
    ("--compile=1", r"compile wants True or False, such as True; got 1, a whole number"),
    ("--batch_size", r"--batch_size wants a value: --batch_size=12"),
    ("--too_late=2", r"no such key"), ("--CONSTANT=2", r"no such key"),
    ("nowhere.py", r"nowhere.py: no such config file"), ("stray", r"'stray' is neither a config file")])
def test_slips_are_told_in_one_line(script, arg, said):
    with pytest.raises(UserError, match=said) as e:
        script(arg)
    assert "\n" not in str(e.value)


def test_imports_and_helpers_in_a_config_are_not_keys(script, tmp_path):
    path = config_file(tmp_path, """
        import math, time
        from os import path
        tokens = 2 ** 6            # a helper: the next line reads it
        batch_size = tokens // 4
        _note = 'not read, but marked as private'
        def twice(x):
            return 2 * x
        learning_rate = twice(learning_rate)  # a config sees the defaults
        out_dir = 'run-' + str(math.floor(2.5))
    """)
    variables, setup = script(path)
    assert (variables["batch_size"], variables["learning_rate"], variables["out_dir"]) == (16, 12e-4, "run-2")
    assert "tokens" not in variables and set(setup.given) == {"batch_size", "learning_rate", "out_dir"}


@pytest.mark.parametrize("text, said", [
    ("batchsize = 3", r"c.py, line 1: there is no key 'batchsize'; did you mean 'batch_size'"),
    ("\nbatch_size = 'x'", r"c.py: batch_size wants a whole number"),
    ("x = 1 +", r"c.py, line 1: not valid Python"), ("\nout_dir = 1 / 0", r"c.py, line 2: ZeroDivisionError")])
def test_slips_in_a_config(script, tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        script(config_file(tmp_path, text))


def test_words_where_they_are_wanted(script):
    assert script("tinystories", "--top_k=3", words=True)[1].words == ["tinystories"]


def test_help_prints_every_key_with_its_default_and_comment(script, capsys):
    with pytest.raises(SystemExit) as e:
        script("--help")
    assert e.value.code == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for line in ("What the script is.", "the first group", "--out_dir='out' where # it goes",
                 "--learning_rate=0.0006 peak", "--compile=True", "the second group", "--top_k=200"):
        assert line.split() in lines


@pytest.mark.parametrize("name", ["train.py", "sample.py", "prepare.py"])
def test_the_real_scripts(name):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    run = subprocess.run([sys.executable, os.path.join(root, name), "--sed=3"], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == f"{name}: --sed: there is no such key; did you mean 'seed'?; --help lists them all\n"
    run = subprocess.run([sys.executable, os.path.join(root, name), "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "--seed=1337" in run.stdout
