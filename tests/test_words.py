"""What the program says to somebody who typed something else than it expects, and that the lines
which it tells to type are right."""

import json
import sys
import types

import pytest
from processes import Processes
from test_configurator import _restore, script, write  # noqa: F401  fixtures

import model
import prepare
import runs
from configurator import UserError

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
        ("--config=toy_sft --top_k=3", "config/toy_sft.py --top_k=3"),
        ("--config config/toy_sft.py", "config/toy_sft.py"),
        ("Toy-SFT", "config/toy_sft.py"),
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


# -----------------------------------------------------------------------------
# --dry_run


@pytest.mark.parametrize(
    "name, gpu",
    [
        ("4090", "RTX 4090"),
        ("RTX4090", "RTX 4090"),
        ("rtx-3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("a100", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("A100_80GB", "A100"),
        ("L40S", "L40S"),
        ("H1", ""),
        ("40", ""),
        ("RTX A4000", ""),
        ("14090", ""),
        ("", ""),
    ],
)
def test_names_of_gpus(name, gpu):
    assert (model.gpu_named(name) or "") == gpu


@pytest.mark.parametrize(
    "typed, from_files, dollars",
    [
        ({"gpu": "A100"}, {"gpu_cost_per_hour": 2.4}, 0.0),
        ({"gpu": "A100"}, {"gpu": "H100", "gpu_cost_per_hour": 2.4}, 0.0),
        ({"gpu": "H100"}, {"gpu": "H100", "gpu_cost_per_hour": 2.4}, 2.4),
        ({}, {"gpu": "H100", "gpu_cost_per_hour": 2.4}, 2.4),
        ({"gpu": "A100", "gpu_cost_per_hour": 1.0}, {"gpu_cost_per_hour": 2.4}, 1.0),
        ({"gpu": "A100"}, {}, 0.0),
    ],
)
def test_a_price_is_that_of_the_gpu(typed, from_files, dollars):
    """0 stands for the table's price. That of a config belongs to the config's own GPU."""
    config = {"gpu": "", "gpu_cost_per_hour": 0.0} | from_files | typed
    given = dict.fromkeys(from_files, "c.py") | dict.fromkeys(typed, "command line")
    setup = types.SimpleNamespace(given=given, from_files=from_files)
    assert runs.price_of(config["gpu"], config, setup) == dollars


def test_a_wrong_gpu_is_refused_before_the_table(capsys):
    with pytest.raises(UserError, match="gpu='H1': expected one of B200, "):
        model.plan({}, None, "H1")
    assert not capsys.readouterr().out


# -----------------------------------------------------------------------------
# what a run says at its start and its end


def test_another_init_from_is_not_told_to_start_from_scratch():
    """--init_from=scratch is what somebody did not ask for who typed where weights come from."""
    for typed, advice in (("out/sft", ""), ("me/tiny", ""), ("scratch", "-"), ("resume", "-")):
        setup = types.SimpleNamespace(given={"init_from": "command line"})
        text = runs.remedy({"init_from": typed}, setup)
        assert text.startswith("choose another --out_dir") and ("scratch" in text) == bool(advice)
    in_a_config = types.SimpleNamespace(given={"init_from": "config/toy_sft.py"})
    assert "--init_from=scratch" in runs.remedy({"init_from": "out/toy"}, in_a_config)


def digits():
    return prepare.make_tokenizer("char", ["0+1=1\n2345"])


def test_write_more_works_where_the_vocabulary_lacks_a_letter(monkeypatch):
    """The line that ends a run of character data, with sample_start and without."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--max_iters=20"])
    run = types.SimpleNamespace(step=20, tokens=1000, train_s=3.2, best=[-1.5])
    config = {"out_dir": "out/d", "stage": "pretrain", "max_iters": 20, "time_budget": 0.0}

    def sample_line(start, tokenizer):
        text = runs.summary(config | {"sample_start": start}, run, True, True, tokenizer)
        line = next(line for line in text.splitlines() if line.startswith("write more"))
        return line.removeprefix("write more").strip()

    assert sample_line("", digits()) == "python sample.py --out_dir=out/d"
    assert sample_line("Once", digits()) == "python sample.py --out_dir=out/d"
    assert sample_line("2+", digits()) == "python sample.py --out_dir=out/d --start=2+"
    letters = prepare.load_tokenizer("byte")
    assert sample_line("", letters).endswith("'--start=Once upon a time'")


def test_a_finished_run_says_that_nothing_is_left(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--out_dir=out/d", "--learning_rate=0.5"])
    run = types.SimpleNamespace(step=20, tokens=1000, train_s=3.2, best=[-1.5])
    config = {
        "out_dir": "out/d",
        "stage": "sft",
        "sample_start": "",
        "max_iters": 8,
        "time_budget": 0.0,
    }
    lines = runs.summary(config, run, False, True, digits()).splitlines()
    expected = "nothing left to do: the run in out/d has 20 steps, and max_iters=8 asks for no more"
    assert lines[0] == f"--- {expected}; best val loss 1.5000 ---"
    longer, anew = lines[-2:]
    assert longer.endswith("python train.py --out_dir=out/d --learning_rate=0.5 --max_iters=28")
    assert anew.endswith("python train.py --learning_rate=0.5 --out_dir=out/d_again")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run of two steps on digits; runs it again as its user types it."""
    processes = Processes(tmp_path_factory.mktemp("words"))
    lines = [f"{i}+{j}={i + j}\n" for i in range(9) for j in range(9)]
    (processes.cwd / "digits.txt").write_text("".join(lines))
    processes.finished("prepare.py", "digits.txt --tokenizer=char")
    processes.first = processes.finished("train.py", TINY, "--sample_start=Once")
    yield processes
    processes.close()


TINY = "--dataset=digits --out_dir=out/d --n_layer=1 --n_head=1 --n_kv_head=1 --n_embd=16"
TINY += " --ffn_dim=16 --block_size=8 --batch_size=2 --max_iters=2 --eval_iters=1 --compile=False"


def test_a_run_on_digits_from_its_start_to_the_lines_that_it_ends_with(place):
    """What its last lines tell to type works; typed again with another rate, it does nothing."""
    out = place.first.out
    assert "warning: sample_start='Once': the character 'O' is not in the vocabulary" in out
    assert out.index("sample_start='Once'") < out.index("step      0")
    assert out.count("--- a sample ---") == 3
    line = next(line for line in out.splitlines() if line.startswith("write more"))
    args = line.removeprefix("write more").split()
    assert args[:2] == ["python", "sample.py"]
    assert "---------------" in place.finished(*args[1:], "--max_new_tokens=20").out
    again = place.finished("train.py", TINY, "--learning_rate=0.5").out
    assert "--- nothing left to do: the run in out/d has 2 steps" in again
    assert "a sample" not in again and "of training" not in again
    assert "learning_rate 0.01 -> 0.5" in again
    refused = place.run("train.py", TINY, "--init_from=out/other").err
    assert refused.endswith("this one asks for 'out/other'; choose another --out_dir\n")
    refused = place.run("sample.py", "--out_dir=out/d", "--start=Once").err
    assert "start='Once': the character 'O' is not in the vocabulary" in refused


@pytest.mark.parametrize(
    "name, content",
    [
        ("p.jsonl", '{"prompt": "1+1"}\n{"prompt": "2+2"}\n'),
        ("p.ndjson", '{"prompt": "1+1"}\n\n{"prompt": "2+2"}'),
        ("P.JSONL", '{"prompt": "1+1"}\r\n{"prompt": "2+2"}\r\n'),
        ("p.Json", '[\n  {"prompt": "1+1"},\n  {"prompt":\n   "2+2"}\n]\n'),
        ("p.txt", "1+1\n2+2\n"),
        ("p", "1+1\r\n2+2"),
    ],
)
def test_prompts_by_the_name_of_their_file(place, name, content):
    (place.cwd / name).write_bytes(content.encode())
    run = place.finished("sample.py", f"--out_dir=out/d --prompts={name} --max_new_tokens=2")
    records = [json.loads(line) for line in run.out.splitlines()]
    assert [record["prompt"] for record in records] == ["1+1", "2+2"]
    kind = "JSON" if "js" in name.lower() else "one a line"
    assert f"{name}: 2 prompts, {kind}\n" in run.err


def test_no_replacement_characters_at_the_ends_of_lines(monkeypatch):
    """Models of CRLF text write carriage returns; on a terminal they are dropped, in one piece
    with the line feed or without. Elsewhere the text is as it is."""
    text = "one\r\ntwo\r\n\x1b[31m"
    assert prepare.for_terminal(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert prepare.for_terminal(text) == "one\ntwo\n\ufffd[31m"
    assert "".join(map(prepare.for_terminal, text)) == "one\ntwo\n\ufffd[31m"
