"""A run of so many seconds: its schedule, its end, its resumption; and the results of any run."""

import math
import multiprocessing
import os
import re
import types

import numpy as np
import pytest
from conftest import write
from processes import Processes

import model
import prepare
import runs
from model import schedule_factor, schedule_step

# each look at the clock is a tenth of a second after the one before, so that a step takes as long
CLOCK = "import itertools, time; time.perf_counter = itertools.count(0, 0.1).__next__"
OPTIONS = (
    "--n_layer=1 --n_head=2 --n_embd=32 --block_size=64 --batch_size=1 --eval_iters=2"
    " --eval_interval=1000 --log_interval=1 --device=cpu --dtype=float32 --dataset=text"
    " --compile=False --decay_frac=0.5 --warmup_iters=70 --out_dir=out/timed"
)


def run_of(**counters):
    usual = {"step": 0, "train_s": 0.0, "compile_s": 0.0, "tokens": 0, "best": [-math.inf]}
    return types.SimpleNamespace(**usual | counters)


def test_a_schedule_follows_steps_time_or_the_nearer_limit():
    assert schedule_step(run_of(step=7), 700, 700) == 7
    half = run_of(step=90, train_s=150.0)
    assert schedule_step(half, 700, math.inf, 300.0) == 350
    assert schedule_step(half, 100, 100, 300.0) == 90  # its steps will end it first
    assert schedule_step(half, 700, math.inf, 150.0) == 700
    # the time after compilation is what the schedule has: warm-up is not skipped
    compiled = run_of(step=1, train_s=61.0, compile_s=60.0)
    assert schedule_step(compiled, 700, math.inf, 300.0) == pytest.approx(700 / 240)
    # a budget that compilation used up ends after the first step
    assert schedule_step(compiled, 700, math.inf, 50.0) > 700
    assert schedule_factor(699.9, "wsd", 20, 700, 0.0, 0.4) < 0.001


def test_which_of_both_limits_counts():
    """A max_iters of a config does not end a run whose time was typed, as --max_iters does."""
    config = {"time_budget": 300.0, "max_iters": 700}
    for time, steps, expected in (
        ("command line", None, math.inf),
        ("command line", "config/a.py", math.inf),
        ("command line", "command line", 700),
        ("config/a.py", None, math.inf),
        ("config/a.py", "config/b.py", 700),
        ("config/a.py", "command line", 700),
    ):
        given = {"time_budget": time, "max_iters": steps}
        given = {key: place for key, place in given.items() if place}
        assert runs.most_steps(config, types.SimpleNamespace(given=given)) == expected
    given = types.SimpleNamespace(given={})
    assert runs.most_steps(config | {"time_budget": 0.0}, given) == 700


def test_what_is_left():
    """The steps for torch.compile's decision, and the hours of the log."""
    tiny = model.GPT(model.GPTConfig(vocab_size=9, n_layer=1, n_head=1, n_embd=2, block_size=4))

    def meter(max_steps, time_budget):
        config = {"gpu_cost_per_hour": 0.0, "time_budget": time_budget}
        return runs.Meter(run_of(), tiny, config, max_steps, "cpu", 1)

    now = run_of(step=50, train_s=100.0)
    assert meter(700, 0.0).steps_left(now, 2.0) == 650
    assert meter(math.inf, 300.0).steps_left(now, 2.0) == 100
    assert meter(60, 300.0).steps_left(now, 2.0) == 10
    assert meter(math.inf, 50.0).steps_left(now, 2.0) == 0
    assert meter(math.inf, 300.0).row(now)["cost/eta_hours"] == pytest.approx(200 / 3600)
    unknown = meter(math.inf, 300.0).steps_left(now, 0.0)
    assert not model.compile_pays("cpu", unknown, 0.0)


def test_plan_of_a_time_budget(capsys):
    config = prepare_config(time_budget=300.0, gpu_cost_per_hour=1.0)
    shape = model.GPTConfig(vocab_size=300, n_layer=1, n_head=2, n_embd=32, block_size=64)
    model.plan(config, shape, "H100")
    assert re.search(r"total tokens +[\d,]+ in [\d,]+ steps", text := capsys.readouterr().out)
    assert "0.1 hours, $0.08" in text
    model.plan(config, shape)
    assert "of 300 seconds; --gpu= tells how many" in capsys.readouterr().out


def prepare_config(**keys):
    usual = {"micro_batch_size": 1, "batch_size": 1, "gradient_accumulation_steps": 1}
    usual |= {"block_size": 64, "optimizer": "muon", "dtype": "bfloat16", "compile": False}
    return usual | {"grad_checkpoint": False, "mfu": 0.4, "stage": "pretrain"} | keys


# --- runs of train.py


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Processes(tmp_path_factory.mktemp("time"))
    ids = np.random.default_rng(0).integers(97, 123, 4000).astype("<u2").tobytes()
    meta = {"tokenizer": "byte", "vocab_size": 257, "dtype": "uint16", "eos_id": 256}
    for name, content in (("train.bin", ids), ("val.bin", ids[:600])):
        write(place.cwd / "data" / "text" / name, content)
    prepare.write_json(str(place.cwd / "data" / "text" / "meta.json"), meta | {"kind": "text"})
    yield place
    place.close()


def test_a_run_ends_on_time_and_resumes(place):
    """The rate rises and falls with the time; a run that was interrupted goes on with its time. Its
    default max_iters is the scale of the schedule, and one that is typed a limit."""

    def train(*options):
        result = place.finished("train.py", OPTIONS, *options, patch=CLOCK)
        rows = runs.Log(str(place.cwd / "out" / "timed")).rows()
        return result.out, [row for row in rows if "train/lr" in row]

    out, rows = train("--time_budget=3 --max_iters=8 --warmup_iters=0")
    assert "3 seconds of training, at most 8 steps of 1 x 64" in out and len(rows) == 8
    assert rows[-1]["train/lr"] < 0.01 * 0.3  # whichever ends it, the rate has fallen by then
    out, rows = train("--time_budget=3")
    assert "resuming out/timed/step_000008" in out and "3 seconds of training, in steps of" in out
    # a save in another thread may look at the clock, too: a few steps take longer
    assert 24 <= len(rows) <= 31 and 3.0 <= rows[-1]["time/train_s"] < 3.3
    assert f"steps: {len(rows)}\n" in out and "--time_budget=6" in out
    for before, row in zip(rows[8:], rows[9:]):
        at = before["time/train_s"] / 3 * 700
        expected = schedule_factor(at, "wsd", 70, 700, 0.0, 0.5)
        assert row["train/lr"] == pytest.approx(0.01 * expected, rel=1e-6)
    assert rows[-1]["train/lr"] < 0.01 * 0.1 and rows[-1]["cost/eta_hours"] == 0
    out, _ = train("--time_budget=3")
    assert "nothing left to do" in out and "time_budget=3 asks for no more" in out
    out, more = train("--time_budget=4")
    assert len(more) > len(rows) and "\n---\n" in out


def test_a_run_ends_with_its_results(place):
    """The block, the row, the samples of the end; bits per byte wherever the loss stands."""
    for seed in (1, 2):
        options = f"--max_iters=3 --warmup_iters=0 --out_dir=out/s{seed} --seed={seed}"
        out = place.finished("train.py", OPTIONS, options).out
    block = re.search(r"^---\n((?:[\w/@.]+: .*\n)+)---$", out, re.M)[1]
    values = dict(line.split(": ", 1) for line in block.splitlines())
    assert values["steps"] == "3" and values["tokens"] == str(3 * 64)
    last = [row for row in runs.Log(str(place.cwd / "out/s2")).rows() if "val/bpb" in row][-1]
    for key in ("val/bpb", "val/loss"):
        assert float(values[key]) == pytest.approx(last[key], rel=1e-5)
    # a token is a byte here
    assert last["val/bpb"] == pytest.approx(last["val/loss"] / math.log(2))
    assert f"val loss {last['val/loss']:.4f} | bpb {last['val/bpb']:.4f}" in out
    table = (place.cwd / "out" / "results.tsv").read_text().splitlines()
    table = [line.split("\t") for line in table]
    assert len({len(row) for row in table}) == 1 and [row[0] for row in table].count("date") == 1
    row = dict(zip(*[table[0], table[-1]]))
    assert {key: value for key, value in row.items() if value} == values
    assert "mfu" not in values and "mfu" in row and "--seed=2" in row["command"]
    samples = (place.cwd / "out" / "s2" / "samples.txt").read_text()
    assert samples.count("--- step 3 ---") == 1
    evaluated = place.finished("train.py", OPTIONS, options, "--eval_only").out
    assert f"val/bpb {last['val/bpb']:.4f}" in evaluated


# --- results.tsv


def row(**values):
    return {"date": "2026-01-01 10:00", "run": "out/a", "val/bpb": "1.5", **values}


def append(path):
    runs.add_result(row(run=path), runs.Log("out/a"))


def test_results_of_runs_that_end_together(here):
    """Sixteen processes: sixteen rows below one header."""
    os.makedirs("out/a")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(append, [f"out/{i}" for i in range(16)])
    head, *rows = (here / "out" / "results.tsv").read_text().splitlines()
    assert head == "date\trun\tval/bpb"
    assert {line.split("\t")[1] for line in rows} == {f"out/{i}" for i in range(16)}


def test_results_with_other_columns_are_left_alone(here, capsys):
    """Those of an older version, or a user's own file of that name; and a row that was cut short."""
    log = runs.Log("out/a")
    write("out/results.tsv", "mine\n")
    assert runs.add_result(row(), log) == os.path.join("out", "results~1.tsv")
    runs.add_result(row(), log)
    assert runs.add_result(row(new="1"), log) == os.path.join("out", "results~2.tsv")
    assert (here / "out" / "results.tsv").read_text() == "mine\n"
    assert (here / "out" / "results~1.tsv").read_text().count("\n") == 3
    write("out/results~1.tsv", "date\trun\tval/bpb\n2026-01")
    runs.add_result(row(), log)
    lines = (here / "out" / "results~1.tsv").read_text().splitlines()
    assert lines[1:] == ["2026-01", "\t".join(row().values())]
    os.remove("out/results~2.tsv")
    os.makedirs("out/results~2.tsv")
    runs.add_result(row(new="1"), log)  # a warning, and the run goes on
    assert "warning: " in capsys.readouterr().out


def test_a_result_is_one_line(here, monkeypatch):
    """Whatever was typed; what is not known is left out of the block."""
    monkeypatch.setattr("sys.argv", ["train.py", "--sample_start=a\tb\nc"])
    tiny = model.GPT(model.GPTConfig(vocab_size=9, n_layer=1, n_head=1, n_embd=2, block_size=4))
    meter = types.SimpleNamespace(peak=1e6, flops=flops) if (flops := 10.0) else None
    run = run_of(step=5, tokens=1000, train_s=2.0, best=[-1.25])
    rows = [{"step": 4, "val/bpb": 9.0}, {"step": 5, "val/loss": 1.5}]
    values = runs.result({"out_dir": "out/a"}, run, meter, tiny, rows, ("", ""))
    assert values["val/bpb"] == "" and values["val/loss"] == "1.5"  # of this step or none
    assert values["mfu"] == "0.005" and values["tok_per_s"] == "500" and values["best"] == "1.25"
    assert "a b c" in values["command"]
    block = runs.result_block(values)
    assert "\nval/loss: 1.5\n" in block and "commit" not in block and "pass@1" not in block
    assert block.count("\n") == 1 + sum(map(bool, values.values()))


def test_the_revision_of_the_code(tmp_path, monkeypatch):
    assert re.fullmatch(r"|[0-9a-f]{7,}", runs.revision()[0])
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runs.revision() == ("", "")


# --- the start and the plot


def test_a_first_loss_above_a_uniform_guess_is_explained():
    shape = model.GPTConfig(vocab_size=2174)
    line = runs.evaluation_line(0, {"val/loss": 11.4, "val/bpb": 5.0}, shape)
    assert line.startswith("step      0 | val loss 11.4000 | bpb 5.0000 (a uniform guess has 7.7;")
    for step, loss, keys in ((100, 11.4, {}), (0, 7.7, {}), (0, 11.4, {"unit_embed": False})):
        shape = model.GPTConfig(vocab_size=2174, **keys)
        assert "(" not in runs.evaluation_line(step, {"val/loss": loss}, shape)


def test_data_that_training_prepares_itself_advises_no_training(here, monkeypatch, capsys):
    """'next: python train.py' was printed by a train.py that was about to train."""
    monkeypatch.setattr(
        prepare, "toy_stories", lambda seed: [f"Mum has {i} cats." for i in range(500)]
    )
    prepare.prepare_missing({"dataset": "toy", "data_dir": "data", "stage": "pretrain"}, print)
    out = capsys.readouterr().out
    assert "data/toy is missing; preparing it now" in out and "next:" not in out
    prepare.prepare("toy", name="again")
    assert "next: python train.py" in capsys.readouterr().out


def test_the_plot_shows_the_curve(here, monkeypatch):
    """Its axis leaves the fall of the first steps out, every line is labelled, the raw loss is
    behind the smoothed one, and validation is points."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.append(figure))
    os.makedirs("out/a")
    log = runs.Log("out/a")
    log.plot()  # nothing to draw yet
    log(0, {"val/loss": 11.4, "val/bpb": 5.0})
    for step in range(1, 101):
        log(step, {"train/loss": 1 + 10 / step**2 + step % 2, "train/lr": 0.1})
    log(100, {"val/loss": 1.2, "val/bpb": 0.5})
    log.plot()
    loss, lr = drawn[-1].axes
    low, high = loss.get_ylim()
    assert 0.8 < low < 1.05 and 2 < high < 2.5
    assert loss.get_title() == "out/a: val/bpb 0.5000 after 100 steps"
    raw, smooth, points = loss.lines
    assert points.get_linestyle() == "None" and raw.get_alpha() < 0.5
    assert np.std(smooth.get_ydata()[50:]) < np.std(raw.get_ydata()[50:]) / 5
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels == ["train/loss, smoothed", "val/loss", "train/lr"]
