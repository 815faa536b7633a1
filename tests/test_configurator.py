"""The command line: keys and their schema, config files, and streams that fail."""

import os
import subprocess
import sys
import textwrap

import pytest

from configurator import UserError, configure

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = '''
"""What the script is."""
import os
# fmt: off
# the first group
out_dir = 'out'       # where # it goes
batch_size = 12       # sequences (>= 1)
learning_rate = 6e-4  # peak (> 0)
compile = True
grad_clip = 1.0; _hidden = 3
CONSTANT = 5
derived = os.sep
# the second group
top_k = 200
share = 0.5           # (>= 0, < 1) of the whole
stage = "sft"         # 'pretrain' | 'sft' (chats | texts) | 'dpo': pairs
device = "auto"       # 'auto' | 'cuda' | 'cuda:...' (one of several)
start_from = "x"      # 'scratch' | 'resume' | a run directory
offset = -1           # (>= -5, <= 2**40)
product = 5 * 8
# fmt: on
def after(): pass
too_late = 1
'''
KEYS = ["out_dir", "batch_size", "learning_rate", "compile", "grad_clip", "top_k"]
KEYS += ["share", "stage", "device", "start_from", "offset", "product"]


@pytest.fixture(autouse=True)
def _restore(monkeypatch):
    """configure() sets the exception hook and wraps the streams."""
    for name in ("excepthook", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"

    def run(*argv, words=False, also="", source=SCRIPT):
        """The values after configure(), and what it returned."""
        path.write_text(source)
        variables = {"__file__": str(path)}
        exec(source, variables)
        setup = configure(variables, words=words, also=also, argv=[str(a) for a in argv])
        return variables, setup

    return run


def write(tmp_path, text, name="c.py"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(text))
    return path


# -----------------------------------------------------------------------------
# keys and values


def test_keys_are_the_constants_of_the_block(script):
    variables, setup = script()
    assert setup.keys == KEYS
    assert setup.given == {} and setup.files == []
    assert setup.config == {key: variables[key] for key in KEYS} and setup.config["product"] == 40


def test_files_in_order_then_the_command_line(script, tmp_path):
    first = write(tmp_path, "batch_size = 1\nlearning_rate = 1\nout_dir = 'a'", "first.py")
    second = write(tmp_path, "batch_size = 2\nout_dir = 'b'", "second.py")
    variables, setup = script(first, "--out_dir=c", second)
    assert variables["batch_size"] == 2 and variables["out_dir"] == "c"
    assert variables["learning_rate"] == 1.0 and type(variables["learning_rate"]) is float
    assert setup.given == {
        "batch_size": str(second),
        "learning_rate": str(first),
        "out_dir": "command line",
    }
    assert setup.files == [str(first), str(second)]
    assert setup.from_files == {"batch_size": 2, "learning_rate": 1.0, "out_dir": "b"}


@pytest.mark.parametrize(
    "arg, key, value",
    [
        ("--batch_size=3", "batch_size", 3),
        ("--batch_size=1e3", "batch_size", 1000),
        ("--top_k=-1", "top_k", -1),
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--learning_rate=3e-4", "learning_rate", 3e-4),
        ("--compile", "compile", True),
        ("--compile=False", "compile", False),
        ("--compile=true", "compile", True),
        ("--out_dir=007", "out_dir", "007"),
        ("--out_dir=a=b", "out_dir", "a=b"),
        ("--out_dir=", "out_dir", ""),
        ("--product=3", "product", 3),
    ],
)
def test_values(script, arg, key, value):
    found = script(arg)[0][key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "arg, message",
    [
        ("--batchsize=3", "--batchsize: there is no such key; did you mean 'batch_size'"),
        ("--batch_size=3.5", "batch_size=3.5: expected a whole number, such as 12"),
        ("--batch_size=many", "batch_size='many': expected a whole number, such as 12"),
        ("--learning_rate=fast", "learning_rate='fast': expected a number, such as 0.0006"),
        ("--compile=1", "compile='1': expected True or False, such as True"),
        ("--batch_size", "--batch_size: expected a value, as in --batch_size=12"),
        ("--too_late=2", "no such key"),
        ("--CONSTANT=2", "no such key"),
        ("nowhere.py", "nowhere.py: no such config file"),
        ("stray", "'stray' is neither a config file"),
        # values that would end in a traceback elsewhere
        ("--top_k=1e30", "top_k=0xc9"),
        ("--top_k=" + "9" * 30, "a whole number of at most 64 bits"),
        ("--top_k=0x" + "f" * 9000, "a whole number of at most 64 bits"),
        ("--learning_rate=1" + "0" * 400, "learning_rate=0x"),
        ("--top_k=" + "(" * 9000, "expected a whole number"),
    ],
)
def test_mistakes_are_reported_in_one_line(script, arg, message):
    with pytest.raises(UserError) as e:
        script(arg)
    assert message in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 300


# -----------------------------------------------------------------------------
# the schema in a key's comment


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("batch_size", 0, "batch_size=0: expected at least 1 (--help explains it)"),
        ("learning_rate", 0.0, "learning_rate=0.0: expected more than 0"),
        ("share", 1.0, "share=1.0: expected at least 0 and less than 1"),
        ("share", -0.1, "share=-0.1: expected at least 0 and less than 1"),
        ("offset", -6, "offset=-6: expected at least -5 and at most 2**40"),
        ("offset", 2**40 + 1, "offset=1099511627777: expected at least -5"),
        ("stage", "sff", "stage='sff': expected 'pretrain', 'sft' or 'dpo'; did you mean 'sft'?"),
        ("stage", "", "stage='': expected 'pretrain'"),
        ("device", "tpu", "device='tpu': expected 'auto', 'cuda' or 'cuda:...'"),
        # no number is infinite or NaN, with bounds or without
        ("learning_rate", float("inf"), "learning_rate=inf: expected a finite number"),
        ("share", float("nan"), "share=nan: expected a finite number"),
        ("grad_clip", float("nan"), "grad_clip=nan: expected a finite number"),
    ],
)
def test_what_the_comment_forbids(script, tmp_path, name, value, message):
    """The same check, and the same words, for the command line, config files and other values."""
    with pytest.raises(UserError) as e:
        script(f"--{name}={value}")
    assert str(e.value).startswith(message)
    literal = f"float('{value}')" if isinstance(value, float) else repr(value)
    path = write(tmp_path, f"{name} = {literal}\n")
    with pytest.raises(UserError) as e:
        script(path)
    assert str(e.value).startswith(f"{path}: {message}")
    with pytest.raises(UserError) as e:
        script()[1].check(name, value)
    assert str(e.value).startswith(message)


@pytest.mark.parametrize(
    "arg",
    ["--batch_size=1", "--share=0", "--share=0.99", "--offset=-5", "--offset=1099511627776"]
    + ["--stage=pretrain", "--stage=dpo", "--device=cuda:3", "--start_from=elsewhere"]
    + ["--out_dir=it", "--top_k=-9"],
)
def test_what_the_comment_allows(script, arg):
    script(arg)


@pytest.mark.parametrize(
    "line, allowed, forbidden",
    [
        ("k = 'a'  # MLP: 'a' | \"b\" (see 'x')", ["b"], ["c", "x"]),
        ("k = ''  # '' | 'b': none, or b", ["", "b"], ["a"]),
        ("k = 'a'  # 'a' is the model's own, or a path", ["z"], []),
        ("k = 'a'  # a Hub id | 'a' | 'b'", ["z"], []),
        ("k = 'a'  # how it ends ('a' | 'b')", ["b"], ["c"]),
        ("k = 3  # one of (> 2) or more (<= 4.5)", [4], [2, 5]),
        ("k = 3  # (0: none) (> b) (about 5)", [-100], []),
        ("k = 0.5  # (>= 1e-3,<1)", [0.001], [0.0009, 1.0]),
        ("k: float = 3  # (>= 0)", [2.5, 0], [-1]),
    ],
)
def test_syntax_of_the_schema(script, line, allowed, forbidden):
    setup = script(source=line + "\n")[1]
    for value in allowed:
        assert setup.check("k", value) == value
    for value in forbidden:
        with pytest.raises(UserError):
            setup.check("k", value)


def test_a_default_outside_its_own_schema(script, capsys):
    """Defaults are edited in the source as often as they are overridden."""
    source = SCRIPT.replace("batch_size = 12", "batch_size = 0")
    with pytest.raises(UserError) as e:
        script("--batch_size=4", source=source)
    assert str(e.value).startswith("script.py, line 7: batch_size=0: expected at least 1")
    with pytest.raises(SystemExit):
        script("--help", source=source)  # which is where one looks up what is allowed


# -----------------------------------------------------------------------------
# keys of another source

MODEL = '''
import torch_is_not_imported
class GPTConfig:
    """Keys of the model."""
    # fmt: off
    # the shape
    n_layer: int = 2              # blocks (>= 1)
    batch_size: int = 99          # the script's own key comes first
    theta: float = 300            # an integer that is a float
    n_Experts: int = 4 * 2
    # the rest
    norm: str = "rmsnorm"         # 'rmsnorm' | 'layernorm'
    sizes: tuple = (1, 2)
    unset: int
    not_a_field = 3
    _private: int = 3
    # fmt: on
    def __post_init__(self): pass
class Other:
    n_layer: int = 7
'''


def test_fields_of_a_dataclass_are_keys(script, tmp_path, capsys):
    """Fields are read from the source, and one that a user adds is a key at once."""
    write(tmp_path, MODEL, "model.py")
    also = "model.py:GPTConfig"
    variables, setup = script("--n_layer=3", "--theta=0.5", also=also)
    assert setup.keys == KEYS + ["n_layer", "theta", "n_Experts", "norm"]
    assert (variables["n_layer"], variables["theta"], variables["n_Experts"]) == (3, 0.5, 8)
    assert setup.config["batch_size"] == 12 and type(setup.config["theta"]) is float
    assert type(script(also=also)[1].config["theta"]) is float
    with pytest.raises(UserError, match="n_layer=0: expected at least 1"):
        script("--n_layer=0", also=also)
    with pytest.raises(UserError, match="c.py: norm='none': expected 'rmsnorm' or 'layernorm'"):
        script(write(tmp_path, "norm = 'none'"), also=also)
    with pytest.raises(SystemExit):
        script("--help", also=also)
    out = [line.strip() for line in capsys.readouterr().out.splitlines()]
    part = out[out.index("the keys of model.py: GPTConfig:") :]
    assert part[1:3] == ["", "the shape"] and part[3].split() == [
        "--n_layer=2",
        "blocks",
        "(>=",
        "1)",
    ]
    assert "the rest" in part and "--theta=300.0" in part[4] and "fmt" not in "".join(out)
    assert not any("batch_size" in line for line in part)


def test_keys_of_several_sources(script, tmp_path):
    """bench.py takes the keys of train.py and those of GPTConfig; the first source wins."""
    write(tmp_path, MODEL, "model.py")

    write(tmp_path, "top_k = 7  # (> 0)\nrate = 0.5\nn_layer = 1\n", "train.py")
    variables, setup = script("--theta=2", also="train.py model.py:GPTConfig")
    assert setup.keys == KEYS + ["rate", "n_layer", "theta", "n_Experts", "norm"]
    assert (variables["top_k"], variables["n_layer"], variables["theta"]) == (200, 1, 2.0)


def test_a_key_must_not_replace_something_else(script, tmp_path):
    """A field called `os` would take the place of the module in the script."""
    write(tmp_path, "class GPTConfig:\n    os: int = 3\n", "model.py")
    with pytest.raises(UserError, match="^model.py: GPTConfig, line 2: .*has another use for os"):
        script(also="model.py:GPTConfig")
    with pytest.raises(UserError, match="there is no class Model"):
        script(also="model.py:Model")


# -----------------------------------------------------------------------------
# config files


def test_imports_and_helpers_in_a_config_are_not_keys(script, tmp_path):
    path = write(
        tmp_path,
        """
        import math, time
        from os import path
        tokens = 2 ** 6            # a helper: the next line reads it
        batch_size = tokens // 4
        _note = 'not read, but marked as private'
        def twice(x):
            return 2 * x
        learning_rate = twice(learning_rate)  # a config sees the defaults
        out_dir = 'run-' + str(math.floor(2.5))
        del compile                # back to the default
        """,
    )
    variables, setup = script(path)
    assert (variables["batch_size"], variables["learning_rate"]) == (16, 12e-4)
    assert variables["out_dir"] == "run-2" and variables["compile"] is True
    assert "tokens" not in variables
    assert set(setup.given) == {"batch_size", "learning_rate", "out_dir"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("batchsize = 3", "c.py, line 1: there is no key 'batchsize'; did you mean 'batch_size'"),
        ("\nbatch_size = 'x'", "c.py: batch_size='x': expected a whole number"),
        ("x = 1 +", "c.py, line 1: not valid Python"),
        ("\nout_dir = 1 / 0", "c.py, line 2: ZeroDivisionError"),
        ("exit(0)", "c.py, line 1: SystemExit: 0"),
        ("raise ValueError('a\\nb')", "c.py, line 1: ValueError: a b"),
        (b"# \xff\n", "c.py"),
        (b"#\n#\nx = '\xff'\n", "c.py"),
        (b"x = \0", "c.py"),
        ("x = " + "(" * 5000, "c.py"),
        (None, "c.py: not a Python file"),
    ],
)
def test_mistakes_in_a_config(script, tmp_path, text, message):
    path = tmp_path / "c.py"
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as e:
        script(path)
    assert message in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 300


def test_words_where_they_are_wanted(script):
    assert script("tinystories", "--top_k=3", words=True)[1].words == ["tinystories"]


def test_help_prints_every_key_with_its_default_and_comment(script, capsys):
    with pytest.raises(SystemExit) as e:
        script("--help")
    assert e.value.code == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for line in (
        "What the script is.",
        "the first group",
        "--out_dir='out' where # it goes",
        "--batch_size=12 sequences (>= 1)",
        "--compile=True",
        "the second group",
        "--top_k=200",
        "--product=40",
    ):
        assert line.split() in lines


@pytest.mark.parametrize("name", ["train.py", "sample.py", "prepare.py"])
def test_the_real_scripts(name):
    def run(arg):
        args = [sys.executable, os.path.join(ROOT, name), arg]
        return subprocess.run(args, capture_output=True, text=True)

    mistyped = run("--sed=3")
    assert mistyped.returncode == 1
    line = f"{name}: --sed: there is no such key; did you mean 'seed'?; --help lists all keys\n"
    assert mistyped.stderr == line
    explained = run("--help")
    assert explained.returncode == 0 and "--seed=1337" in explained.stdout


# -----------------------------------------------------------------------------
# standard output and error that fail; each script below is a process, as its user starts it

PRINTS = """
    import contextlib, os, sys
    sys.path.insert(0, {root!r})
    from configurator import configure, survive_dead_stdout
    lines = 3
    flush = True
    survive = False
    setup = configure(globals())
    if survive:
        survive_dead_stdout()
    assert sys.stdin.read() == ""
    log = open("log.txt", "w")
    with contextlib.suppress(OSError):
        os.write(1, b"raw\\n")  # must not end in log.txt
    for i in range(lines):
        print("line", i, "\\u2192", flush=flush)
        print("note \\u2192", file=sys.stderr)
    print("done", file=log, flush=True)
"""


def shell(tmp_path, command, script=PRINTS, **env):
    """Runs `command` with $S for the script; (exit code of the script, stdout, stderr)."""
    path = write(tmp_path, script.format(root=ROOT), "s.py")
    command = command.replace("$S", f"{sys.executable} {path}") + '\nexit "${PIPESTATUS[0]}"'
    run = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONUNBUFFERED": "", **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    return run.returncode, run.stdout.decode(), run.stderr.decode()


needs_bash = pytest.mark.skipif(os.name == "nt", reason="needs bash and /dev/full")


@needs_bash
@pytest.mark.parametrize("encoding", ["cp1252", "ascii:strict", "utf-8"])
def test_a_stream_that_lacks_a_character(tmp_path, encoding):
    """Windows' `> log.txt` is cp1252, which has no arrow."""
    code, out, err = shell(tmp_path, "$S", PYTHONIOENCODING=encoding)
    arrow = "→" if encoding == "utf-8" else "\\u2192"
    assert code == 0 and f"line 2 {arrow}\n" in out and err == f"note {arrow}\n" * 3


@needs_bash
@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize(
    "command", ["$S ARGS | head -2", "$S ARGS > /dev/full", "$S ARGS >&-", "$S ARGS <&- >&- 2>&-"]
)
def test_a_long_run_survives_a_dead_standard_output(tmp_path, command, flush):
    """It ends with exit code 0 and everything it had to do is done, in its own files only."""
    args = f"--survive --lines=20000 --flush={flush}"
    code, _, err = shell(tmp_path, command.replace("ARGS", args))
    assert code == 0 and (tmp_path / "log.txt").read_text() == "done\n"
    gone = err.count("s.py: standard output is gone (")
    assert gone == (0 if ">&-" in command else 1) and "Exception" not in err and "Error" not in err


@needs_bash
@pytest.mark.parametrize("flush", [True, False])
def test_other_scripts_end_when_standard_output_is_dead(tmp_path, flush):
    args = f"--lines=20000 --flush={flush}"
    code, out, err = shell(tmp_path, f"$S {args} 2> /dev/null | head -2")
    assert out.count("\n") == 2 and (tmp_path / "log.txt").read_text() == ""
    code, out, err = shell(tmp_path, f"$S {args} 2> err.txt > /dev/full")
    lines = [line for line in (tmp_path / "err.txt").read_text().splitlines() if "note" not in line]
    assert code == 1 and lines == ["s.py: standard output: No space left on device"]
    # a failure that only the flush at exit would meet
    code, out, err = shell(tmp_path, "$S --flush=False --lines=1 > /dev/full")
    assert code == 1 and err == "note →\ns.py: standard output: No space left on device\n"
    code, out, err = shell(tmp_path, "$S --help > /dev/full")
    assert code == 1 and err == "s.py: standard output: No space left on device\n"
    code, out, err = shell(tmp_path, "$S --flush=False --lines=9 --help | true")
    assert err == ""


@needs_bash
@pytest.mark.parametrize("command", ["$S 2> /dev/full", "$S 2>&-", "$S 2> >(head -1 > /dev/null)"])
def test_a_dead_standard_error_ends_nothing(tmp_path, command):
    code, out, _ = shell(tmp_path, command)
    assert code == 0 and out.count("line") == 3


@needs_bash
def test_a_progress_bar_and_child_processes_survive_too(tmp_path):
    script = """
        import subprocess, sys
        sys.path.insert(0, {root!r})
        from configurator import configure, survive_dead_stdout
        from tqdm import tqdm
        setup = configure(globals())
        survive_dead_stdout()
        for i in tqdm(range(50), file=sys.stdout, mininterval=0):
            print("x" * 9000)
        child = [sys.executable, "-c", "print('x' * 100000)"]
        assert subprocess.run(child).returncode == 0
        raise ValueError("a bug keeps its traceback and its exit code")
    """
    for command in ("$S > /dev/full", "$S | head -1"):
        code, _, err = shell(tmp_path, command, script)
        assert code == 1 and "ValueError: a bug" in err and err.count("Traceback") == 1, err
    assert shell(tmp_path, "$S > /dev/full 2> /dev/full", script)[0] == 1


@needs_bash
def test_a_broken_pipe_elsewhere_is_no_silent_end(tmp_path):
    script = """
        import os, sys
        sys.path.insert(0, {root!r})
        from configurator import configure
        configure(globals())
        read, write = os.pipe()
        os.close(read)
        os.write(write, b"x")
    """
    code, _, err = shell(tmp_path, "$S", script)
    assert code == 1 and "BrokenPipeError" in err


def test_the_help_of_train_py_shows_keys_only():
    """Comments above GPTConfig in model.py are no headings of its keys."""
    help = subprocess.run(
        [sys.executable, os.path.join(ROOT, "train.py"), "--help"], capture_output=True, text=True
    ).stdout
    part = help.partition("the keys of model.py: GPTConfig")[2].splitlines()[1:]
    assert sum("--n_layer=" in line for line in part) == 1
    headings = [line for line in part if line and not line.startswith("  --")]
    assert not [line for line in headings if "plain code" in line or "follows" in line]
