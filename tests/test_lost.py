"""A run that is hit by trouble loses nothing: processes as a user starts them, with one fault
injected into each. What is checked is only what a user sees: the exit code, what was printed,
log.jsonl, and the files of checkpoints."""

import concurrent.futures
import contextlib
import http.server
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODEL = [
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=16",
    "--max_positions=64",
    "--dropout=0.1",
]
TINY = [
    "--dataset=tiny",
    "--batch_size=4",
    "--eval_iters=1",
    "--eval_interval=4",
    "--log_interval=1",
    "--warmup_iters=2",
    "--dtype=float32",
    "--max_iters=12",
    "--keep_checkpoints=0",
    "--schedule=constant",
]
CHECKPOINT = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer.pt",
}

# FAULTS is a list of "point|which time|what happens", for example
# "evaluation|2|RuntimeError"; * is every time
SITE = """
import builtins, importlib.abc, importlib.util, io, os, signal, sys

FAULTS = [fault.split("|") for fault in os.environ.get("FAULTS", "").split(",") if fault]
counts = {}


def hit(point):
    counts[point] = counts.get(point, 0) + 1
    for where, which, what in FAULTS:
        if where == point and which in ("*", str(counts[point])):
            if what == "exit":
                os._exit(9)
            if what == "abort":
                os.abort()
            if what == "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise getattr(builtins, what)("injected")


def around(owner, name, before=None, after=None):
    plain = getattr(owner, name)
    def patched(*args, **options):
        if before:
            hit(before(*args))
        result = plain(*args, **options)
        if after:
            hit(after(*args))
        return result
    setattr(owner, name, patched)


def base(path):
    return os.path.basename(os.fspath(path)) if isinstance(path, (str, bytes, os.PathLike)) else ""


def opened(path, mode="r", *rest):
    return f"open {base(path)}" if set(mode) & set("aw") else ""


for owner in (builtins, io):
    around(owner, "open", opened)
for name in ("rename", "replace"):
    around(os, name, lambda old, new: f"rename {base(new)}",
           lambda old, new: f"renamed {base(new)}")
for name in ("unlink", "remove"):
    around(os, name, None, lambda path, *rest: f"removed {base(path)}")


def patch_model(module):
    import torch
    points = {where for where, _, _ in FAULTS}
    if points & {"step", "evaluation"}:
        forward = module.GPT.forward
        def patched(self, *args, **options):
            before = self.__dict__.get("was_training", True)
            self.__dict__["was_training"] = self.training
            if self.training:
                hit("step")
            elif before:
                hit("evaluation")
            return forward(self, *args, **options)
        module.GPT.forward = patched
    if "generate" in points:
        around(module.GPT, "generate", lambda *args: "generate")
    around(torch, "save", lambda *args: "torch.save")
    if "compiled" in points:
        def compile(function=None, **options):
            return lambda *args, **options: hit("compiled")
        torch.compile = compile
    if os.environ.get("COMPILE_PAYS"):
        module.compile_pays = lambda *args: True


def patch_figure(module):
    around(module.Figure, "savefig", lambda *args: "savefig")


class Patches(importlib.abc.MetaPathFinder):
    todo = {"model": patch_model, "matplotlib.figure": patch_figure}

    def find_spec(self, name, path, target=None):
        patch = self.todo.pop(name, None)
        spec = importlib.util.find_spec(name) if patch else None
        if spec:
            load = spec.loader.exec_module
            def exec_module(module):
                load(module)
                patch(module)
            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Patches())
"""


# --- runs


def script(name, *args, cwd, faults="", path=(), root=ROOT, **env):
    """The arguments of subprocess.Popen for one of the scripts, with faults and packages of our
    own in its way."""
    ours = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "WANDB_", "RUNPOD_", "CXX", "TORCHINDUCTOR"))
    }
    path = os.pathsep.join([str(cwd / "site"), *map(str, path)])
    env = {
        **ours,
        "OMP_NUM_THREADS": "1",
        "HOME": str(cwd),
        "FAULTS": faults,
        "PYTHONPATH": path,
        **env,
    }
    return dict(args=[sys.executable, os.path.join(root, name), *args], cwd=cwd, env=env)


def train(cwd, *args, code=0, **options):
    """Runs train.py on data/tiny. `code`: its exit code; None: any but 0; "any": that too."""
    model = [] if any(a.startswith("--init_from=out") for a in args) else MODEL
    streams = {k: options.pop(k) for k in ("stdout", "preexec_fn") if k in options}
    call = (
        script("train.py", *TINY, *model, *args, cwd=cwd, **options)
        | dict(stdout=subprocess.PIPE)
        | streams
    )
    run = subprocess.run(
        **call, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", timeout=300
    )
    told = f"{run.stdout}{run.stderr}"
    if code is None:
        assert run.returncode != 0, told[-4000:]
    elif code != "any":
        assert run.returncode == code, told[-4000:]
    run.told = told
    return run


def log(run):
    with open(run / "log.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def values(run, key):
    return [(r["step"], r[key]) for r in log(run) if r.get(key) is not None]


def steps(run):
    """The steps of a run's checkpoints, all of which must be whole."""
    found = sorted(d for d in os.listdir(run) if re.fullmatch(r"step_\d{6}", d))
    for name in [*found, *(["best"] if (run / "best").exists() else [])]:
        assert set(os.listdir(run / name)) == CHECKPOINT, name
    return [int(d[5:]) for d in found]


def weights(checkpoint):
    return (checkpoint / "model.safetensors").read_bytes()


def best_step(run):
    return min(((loss, step) for step, loss in values(run, "val/loss") if step))[1]


def alike(run, calm):
    """A run that met trouble ends as the one that met none: weights, every evaluation and every
    step once."""
    assert weights(run / "step_000012") == weights(calm / "step_000012")
    for key in ("val/loss", "train/loss"):
        assert values(run, key) == values(calm, key)
    best = run / f"step_{best_step(run):06d}"
    assert not best.exists() or weights(run / "best") == weights(best)


def named(told, *parts):
    """The lines of what was printed that name one of the parts."""
    return [line for line in told.splitlines() if re.search("|".join(parts), line, re.I)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with data/tiny, which prepare.py wrote to a terminal that is not
    UTF-8, and a run that met no
    trouble in out/calm."""
    cwd = tmp_path_factory.mktemp("lost")
    (cwd / "site").mkdir()
    (cwd / "site" / "sitecustomize.py").write_text(SITE)
    rng, words = random.Random(0), "the cat sat on a mat and saw one 赤い hat in an old van".split()
    docs = [
        "赤い " + " ".join(rng.choices(words, k=rng.randrange(10, 30))) + "." for _ in range(100)
    ]
    (cwd / "tiny.txt").write_text("<|endoftext|>".join(docs), encoding="utf-8")
    call = script(
        "prepare.py",
        "tiny.txt",
        "--tokenizer=byte",
        "--val_fraction=0.2",
        cwd=cwd,
        PYTHONIOENCODING="cp1252",
    )
    prepared = subprocess.run(**call, capture_output=True, text=True)
    train(cwd, "--out_dir=out/calm", "--sample_interval=2")
    return cwd, prepared


@pytest.fixture(scope="module")
def side_by_side(request, place, tmp_path_factory):
    """{test: the future of what its scene_... returns}, for the tests of this file that were
    asked for."""
    names = [
        i.function.__name__
        for i in request.session.items
        if i.module is request.module and "scene" in i.fixturenames
    ]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = {}
        for name in names:
            cwd = tmp_path_factory.mktemp(name[:40])
            shutil.copytree(place[0], cwd, dirs_exist_ok=True)
            futures[name] = pool.submit(
                getattr(request.module, name.replace("test_", "scene_", 1)), cwd
            )
        yield futures


@pytest.fixture
def scene(request, side_by_side):
    return side_by_side[request.function.__name__].result()


# --- trouble at a step whose checkpoint is due


def scene_trouble_at_a_due_step_loses_nothing(cwd):
    """Five starts of one command, each of which meets another trouble, the last one only such as
    are no reason to end."""
    run, seen = cwd / "out" / "run", []

    def start(faults, code):
        done = train(cwd, "--out_dir=out/run", "--sample_interval=2", faults=faults, code=code)
        seen.append((done, steps(run)))

    start("step|3|exit", 9)  # before there is any checkpoint
    start("evaluation|2|RuntimeError", None)  # at step 4
    start("step|3|exit", 9)  # in step 7: samples.txt is beyond the checkpoint
    start("evaluation|1|abort", -signal.SIGABRT)  # at step 8, which step 4 is evaluated before
    start(
        "generate|1|MemoryError,open samples.txt|1|PermissionError,savefig|*|RuntimeError,"
        "generate|3|RuntimeError",
        0,
    )
    return cwd, run, seen


def test_trouble_at_a_due_step_loses_nothing(scene):
    """A checkpoint that is due is on the disk before the evaluation, the samples and the plot,
    and what was not evaluated
    is evaluated by the run that goes on."""
    cwd, run, seen = scene
    assert [found for _, found in seen] == [[], [4], [4], [4, 8], [4, 8, 12]]
    alike(run, cwd / "out" / "calm")


def test_what_is_only_for_show_never_ends_a_run(side_by_side):
    """Samples, samples.txt and the plot fail in one line each."""
    _, _, seen = side_by_side["test_trouble_at_a_due_step_loses_nothing"].result()
    told = seen[-1][0].told
    assert (
        "Traceback" not in told
        and named(told, "warning.*sample")
        and named(told, r"warning.*(plot|loss\.png)")
    )


def test_samples_are_in_their_file_once(side_by_side):
    _, run, _ = side_by_side["test_trouble_at_a_due_step_loses_nothing"].result()
    found = re.findall(
        r"^--- step (\d+) ---$", (run / "samples.txt").read_text(encoding="utf-8"), re.M
    )
    assert (
        found.count("6") == 1
        and len(found) == len(set(found))
        and [int(s) for s in found] == sorted(map(int, found))
    )
    logged = [r["step"] for r in log(run) if r.get("event") == "sample"]
    assert len(logged) == len(set(logged))


def scene_a_crash_saves_the_last_good_step(cwd):
    """Where the evaluation decides what is saved, and in the middle of a step."""
    args = ("--out_dir=out/run", "--always_save_checkpoint=False")
    run, found = cwd / "out" / "run", []
    for faults, code in (
        ("evaluation|2|KeyboardInterrupt", None),
        ("step|3|RuntimeError", None),
        ("", 0),
    ):
        train(cwd, *args, faults=faults, code=code)
        found.append(steps(run))
    return cwd, run, found


def test_a_crash_saves_the_last_good_step(scene):
    """An exception of any kind, in an evaluation or in a step: what was trained so far is kept,
    to the byte."""
    cwd, run, found = scene
    assert found[0] == [4] and found[1][-1] == 6 and found[2][-1] == 12
    alike(run, cwd / "out" / "calm")


def scene_killed_between_two_names(cwd):
    run, found = cwd / "out" / "run", {}
    train(cwd, "--out_dir=out/run", "--max_iters=4", faults="rename best|1|exit", code=9)
    train(cwd, "--out_dir=out/run", "--max_iters=4")
    found["missing"] = weights(run / "best") == weights(run / "step_000004")
    shutil.copytree(run / "step_000004", cwd / "old")
    args = ("--out_dir=out/run", "--keep_checkpoints=1")
    train(
        cwd,
        *args,
        faults="removed model.safetensors|1|exit,removed trainer.pt|1|exit,"
        "removed config.json|1|exit",
        code=9,
    )
    found["rotation"] = steps(run)  # which are whole, or it fails here
    train(cwd, *args)
    found["end"] = sorted(os.listdir(run))
    shutil.rmtree(run / "best")
    (cwd / "old").rename(run / "best")
    train(cwd, *args)
    found["stale"] = weights(run / "best") == weights(run / f"step_{best_step(run):06d}")
    return found


def test_killed_between_two_names(scene):
    """best/ follows from the log where a kill left it missing or stale, and what rotation
    deletes has lost its name first."""
    assert scene["missing"] and scene["stale"] and scene["rotation"]
    assert scene["end"] == ["best", "log.jsonl", "loss.png", "samples.txt", "step_000012"]


# --- nothing of the user's is removed or replaced


def give(directory, *paths):
    """Files of the user's own, each with a content of its own."""
    for path in paths:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(f"mine: {path}")


def in_place(directory, *paths):
    return [
        p
        for p in paths
        if not (directory / p).is_file() or (directory / p).read_text() != f"mine: {p}"
    ] == []


def somewhere(directory, *paths):
    """Those of the user's files whose content is no longer there under any name."""
    there = {f.read_bytes() for f in directory.rglob("*") if f.is_file()}
    return [p for p in paths if f"mine: {p}".encode() not in there] == []


OWN = (
    "best/notes.txt",
    "step_000004/notes.txt",
    "step_000099/notes.txt",
    ".writing/notes.txt",
    "loss.png",
    "log.jsonl",
    "samples.txt",
    "notes.txt",
    "best~1/notes.txt",
)


def scene_a_directory_of_the_users_own(cwd):
    run = cwd / "out" / "run"
    give(run, *OWN)
    done = [
        train(
            cwd,
            "--out_dir=out/run",
            "--keep_checkpoints=1",
            "--sample_interval=4",
            *more,
            code=code,
        )
        for more, code in (([], None), (["--init_from=scratch"], None))
    ]
    give(cwd / "out" / "docs", "notes.txt", "docs/more.txt", ".writing/notes.txt")
    train(cwd, "--out_dir=out/docs", "--init_from=scratch", "--max_iters=4")
    return cwd, run, done


def test_a_directory_of_the_users_own(scene):
    """A directory that holds the names of a run, but no run: it is refused in one line; other
    files are not in the way."""
    cwd, run, done = scene
    assert in_place(run, *OWN) and sorted(os.listdir(run)) == sorted({p.split("/")[0] for p in OWN})
    for refused in done:
        assert (
            refused.stderr.count("\n") == 1
            and "out/run" in refused.stderr
            and "tok/s" not in refused.stdout
        )
    docs = cwd / "out" / "docs"
    assert (
        in_place(docs, "notes.txt", "docs/more.txt")
        and somewhere(docs, ".writing/notes.txt")
        and steps(docs) == [4]
    )


def scene_files_of_the_users_own_in_a_run(cwd):
    """A run of 12 steps, into which its user has put files, and which goes on with rotation."""
    run = cwd / "out" / "calm"
    give(run, *INSIDE)
    (run / "step_000012" / "model.safetensors").write_bytes(weights(run / "step_000012")[:500])
    give(run, "step_000012.damaged/notes.txt")
    done = train(
        cwd, "--out_dir=out/calm", "--sample_interval=2", "--max_iters=20", "--keep_checkpoints=1"
    )
    return run, done


INSIDE = (
    "step_000004/notes.txt",
    "best/notes.txt",
    ".writing/notes.txt",
    ".copying/notes.txt",
    ".copying/a/notes.txt",
    ".removing/notes.txt",
    "best.old/notes.txt",
    "step_000099/notes.txt",
    "step_000003/notes.txt",
)


def test_files_of_the_users_own_in_a_run(scene):
    """Rotation, best/, and the directories that a run works in: a file that no run wrote stays."""
    run, done = scene
    assert somewhere(run, *INSIDE) and somewhere(run, "step_000012.damaged/notes.txt")
    assert in_place(
        run, "step_000099/notes.txt", "step_000003/notes.txt"
    )  # no checkpoints, and nothing is made of them
    assert (
        weights(run / "best") == weights(run / f"step_{best_step(run):06d}")
        and "resuming" in done.stdout
    )
    assert (
        set(os.listdir(run / "step_000020")) == CHECKPOINT
        and set(os.listdir(run / "best")) == CHECKPOINT
    )
    assert not (run / "step_000008").exists()


def scene_starting_over_takes_a_free_name(cwd):
    give(cwd / "out", "calm~1/notes.txt")
    os.symlink("nowhere", cwd / "out" / "calm~2")
    train(cwd, "--out_dir=out/calm", "--max_iters=2", "--init_from=scratch")
    (cwd / "log.jsonl").write_text('{"step": 0, "event": "start"}\n')
    here = train(cwd, "--out_dir=.", "--max_iters=2", "--init_from=scratch", code=None)
    return cwd, here


def test_starting_over_takes_a_free_name(scene, place):
    """An old run is set aside under a name that nothing has, and never with the directory that
    the user works in."""
    cwd, here = scene
    assert (
        in_place(cwd / "out", "calm~1/notes.txt")
        and os.readlink(cwd / "out" / "calm~2") == "nowhere"
    )
    assert weights(cwd / "out" / "calm~3" / "step_000012") == weights(
        place[0] / "out" / "calm" / "step_000012"
    )
    assert here.stderr.count("\n") == 1 and (cwd / "data" / "tiny" / "train.bin").is_file()


def scene_a_drive_of_the_users_own(cwd):
    drive = cwd / "drive" / "run"
    give(drive, *DRIVE)
    refused = train(cwd, "--out_dir=out/run", "--backup_dir=drive", code=None)
    kept = in_place(drive, *DRIVE)
    shutil.rmtree(drive)
    train(cwd, "--out_dir=out/run", "--backup_dir=drive", "--max_iters=4")
    give(drive, *WITHIN)
    train(cwd, "--out_dir=out/run", "--backup_dir=drive", "--max_iters=12", "--keep_checkpoints=1")
    return drive, refused, kept


DRIVE = ("best/notes.txt", "loss.png", ".part/notes.txt", "notes.txt")
WITHIN = ("best/notes.txt", "step_000004/notes.txt", ".part/notes.txt", "best.old/notes.txt")


def test_a_drive_of_the_users_own(scene, place):
    """The backup keeps to what a run of ours wrote, too."""
    drive, refused, kept = scene
    assert kept and "drive" in refused.stderr and refused.stderr.count("\n") == 1
    assert somewhere(drive, *WITHIN) and set(os.listdir(drive / "best")) == CHECKPOINT
    assert weights(drive / "step_000012") == weights(place[0] / "out" / "calm" / "step_000012")


# --- a parameter and a key of one's own

OWN_MODEL = """

_plain_init = GPT.__init__


def _init_with_own(self, config):
    _plain_init(self, config)
    self.own = nn.Embedding(config.vocab_size, config.n_embd)
    self.embed.register_forward_hook(
        lambda module, args, out: out + config.own_scale * self.own(args[0])
    )
    for block in self.blocks:
        block.own_gain = nn.Parameter(torch.ones(config.n_embd))
        block.register_forward_hook(lambda module, args, out: out * module.own_gain)


GPT.__init__ = _init_with_own
"""


def scene_a_parameter_of_ones_own(cwd):
    """A copy of the project, with an embedding of its own, a gain in each block, and a key that
    only GPTConfig has."""
    copy = cwd / "project"
    copy.mkdir()
    for file in os.listdir(ROOT):
        if file.endswith(".py"):
            shutil.copy(os.path.join(ROOT, file), copy)
    text = (copy / "model.py").read_text(encoding="utf-8")
    text, count = re.subn(
        r"(class GPTConfig.*?\n    n_embd: int[^\n]*\n)",
        r"\1    own_scale: float = 0.5\n",
        text,
        count=1,
        flags=re.S,
    )
    assert count == 1
    (copy / "model.py").write_text(text + OWN_MODEL, encoding="utf-8")
    first = train(cwd, "--out_dir=out/run", "--max_iters=4", root=copy)
    again = train(cwd, "--out_dir=out/run", "--max_iters=8", root=copy)
    call = script(
        "sample.py",
        "--out_dir=out/run",
        "--start=the",
        "--num_samples=1",
        "--max_new_tokens=5",
        cwd=cwd,
        root=copy,
    )
    return cwd / "out" / "run", first, again, subprocess.run(**call, capture_output=True, text=True)


def test_a_parameter_of_ones_own(scene):
    """It is saved, the run goes on from it, sample.py reads it, and no architecture of others is
    claimed."""
    run, first, again, sampled = scene
    assert sampled.returncode == 0 and sampled.stdout.startswith("the"), sampled.stderr
    assert (
        "resuming" in again.stdout
        and "damaged" not in again.told
        and values(run, "train/loss")[-1][0] == 8
    )
    assert json.loads((run / "step_000004" / "config.json").read_text())["model_type"] == "nanosmol"
    assert named(first.told, r"warning.*(\bown\.weight|own_gain)")
    before, after = (load_file(run / f"step_{n:06d}" / "model.safetensors") for n in (4, 8))
    own = [name for name in before if re.search(r"(^|\.)own", name)]
    assert len(own) == 2
    for name in own:  # trained on, and not begun anew
        assert 0 < (after[name] - before[name]).abs().max() < 0.5


# --- a compiler that is not there, or fails


def scene_without_a_compiler(cwd):
    runs = []
    for name, faults, env in (
        ("no", "", dict(CXX="/nonexistent")),
        ("bad", "compiled|*|RuntimeError", {}),
    ):
        runs.append(
            train(
                cwd,
                f"--out_dir=out/{name}",
                "--max_iters=22",
                "--eval_interval=11",
                faults=faults,
                COMPILE_PAYS="1",
                TORCHINDUCTOR_CACHE_DIR=str(cwd / name),
                TMPDIR=str(cwd),
                **env,
            )
        )
    return cwd / "out", runs


def test_without_a_compiler(scene):
    """One line, and the very step is taken without it."""
    out, runs = scene
    for run in runs:
        assert "Traceback" not in run.told and len(named(run.told, "warning.*compile")) == 1, (
            run.told
        )
    assert weights(out / "no" / "step_000022") == weights(out / "bad" / "step_000022")
    assert [s for s, _ in values(out / "no", "train/loss")] == list(range(1, 23))


# --- parts that are optional


def scene_optional_parts_that_fail(cwd):
    """wandb and tensorboard that don't import, on a terminal that is not UTF-8; a wandb that
    fails when it has begun."""
    for package in ("wandb", "tensorboard"):
        (cwd / "broken" / package).mkdir(parents=True)
        (cwd / "broken" / package / "__init__.py").write_text(
            "raise RuntimeError('broken package')\n"
        )
    (cwd / "failing").mkdir()
    (cwd / "failing" / "wandb.py").write_text(
        "import sys\nfrom unittest.mock import MagicMock\nsys.modules['wandb'] = w = "
        "MagicMock()\nw.init.return_value.finish.side_effect = RuntimeError('gone')\n"
    )
    (cwd / "unstarted").mkdir()
    (cwd / "unstarted" / "wandb.py").write_text(
        "import sys\nfrom unittest.mock import MagicMock\nsys.modules['wandb'] = w = "
        "MagicMock()\nw.init.side_effect = OSError('no start')\n"
    )
    return cwd / "out", [
        train(
            cwd,
            "--out_dir=out/broken",
            "--wandb_log",
            "--tensorboard",
            "--sample_start=赤い",
            path=[cwd / "broken"],
            PYTHONIOENCODING="cp1252",
        ),
        train(cwd, "--out_dir=out/failing", "--wandb_log", "--max_iters=4", path=[cwd / "failing"]),
        train(
            cwd, "--out_dir=out/unstarted", "--wandb_log", "--max_iters=4", path=[cwd / "unstarted"]
        ),
    ]


def test_optional_parts_that_fail(scene, place):
    """One line each, and the run goes on to its end."""
    out, (broken, failing, unstarted) = scene
    assert steps(out / "broken")[-1] == 12 and steps(out / "failing") == steps(
        out / "unstarted"
    ) == [4]
    assert (
        len(named(broken.told, "warning.*(wandb|W&B)")) == 1
        and len(named(broken.told, "warning.*tensorboard")) == 1
    )
    assert named(failing.told, "warning.*(wandb|W&B)") and named(
        unstarted.told, "warning.*(wandb|W&B)"
    )
    assert not any("Traceback" in run.told for run in (broken, failing, unstarted))


def test_prepare_prints_where_not_every_character_can(place):
    """data/tiny was prepared with a standard output of cp1252, its texts hold characters beyond
    that."""
    _, prepared = place
    assert prepared.returncode == 0, prepared.stderr
    assert "begins:" in prepared.stdout


def test_flash_attention_that_does_not_import(tmp_path, monkeypatch):
    """A package that is there but fails, for another torch say, is passed over in one line."""
    import model

    (tmp_path / "flash_attn.py").write_text("raise OSError('undefined symbol: _ZN3c105ErrorE')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.warns(UserWarning, match="flash_attn is installed but does not load.*undefined"):
        picked = model.pick_attention("cuda", "bfloat16", True, True)
    assert picked not in ("flash_attn", "flash_attn_interface")


# --- a terminal that is gone


def scene_standard_output_that_is_gone(cwd):
    out = cwd / "out"
    with open("/dev/full", "w") as full:
        train(cwd, "--out_dir=out/full", stdout=full)
    train(cwd, "--out_dir=out/closed", preexec_fn=lambda: os.close(1), stdout=None)
    call = script("train.py", *TINY, *MODEL, "--out_dir=out/head", cwd=cwd)  # | head -2
    process = subprocess.Popen(**call, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(2):
        process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode()
    return (
        {name: steps(out / name) for name in ("full", "closed", "head")},
        process.wait(300),
        errors,
    )


def test_standard_output_that_is_gone(scene):
    """A full device, none at all, a reader that has read enough: the run goes on to its end."""
    found, code, errors = scene
    assert code == 0 and "Error" not in errors
    assert found == {name: [4, 8, 12] for name in ("full", "closed", "head")}


def until_step(run, step, process, terminal=None):
    """Waits until log.jsonl tells that a step was taken; reads what a run writes to its terminal
    meanwhile."""
    for _ in range(20000):
        if terminal is not None:
            with contextlib.suppress(BlockingIOError):
                os.read(terminal, 10000)
        path = run / "log.jsonl"
        rows = path.read_text(encoding="utf-8").splitlines()[:-1] if path.exists() else []
        if any("train/loss" in r and r["step"] >= step for r in map(json.loads, rows)):
            return
        assert process.poll() is None, process.returncode
        time.sleep(0.01)


def session():
    """A session of its own, whose terminal is standard input."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def scene_a_terminal_that_is_closed(cwd):
    """A terminal that goes in the middle of a run, which means SIGHUP and no more output. SIGHUP
    twice. SIGHUP to a run
    that was started by nohup."""
    out, long = cwd / "out", ["--max_iters=100000", "--eval_interval=100000"]
    nothing = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    codes = []
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        **script("train.py", *TINY, *MODEL, *long, "--out_dir=out/closed", cwd=cwd),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=session,
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    until_step(out / "closed", 3, process, ours)
    os.close(ours)
    codes.append(process.wait(300))
    for name, more, ignored in (
        ("twice", long, False),
        ("nohup", ["--max_iters=600", "--eval_interval=600"], True),
    ):
        process = subprocess.Popen(
            **script("train.py", *TINY, *MODEL, *more, f"--out_dir=out/{name}", cwd=cwd),
            **nothing,
            preexec_fn=(lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignored else None,
        )
        until_step(out / name, 3, process)
        for _ in range(2):
            process.send_signal(signal.SIGHUP)
            time.sleep(0.002)
        codes.append(process.wait(300))
    return codes, {name: steps(out / name) for name in ("closed", "twice", "nohup")}


def test_a_terminal_that_is_closed(scene):
    """SIGHUP is SIGTERM: the step ends and is saved. What was started by nohup goes on to its
    end."""
    codes, found = scene
    assert codes == [0, 0, 0] and found["nohup"] == [600]
    assert len(found["closed"]) == len(found["twice"]) == 1


# --- exit codes: 0 only if what was asked for is there


class Refuses(http.server.BaseHTTPRequestHandler):
    """A Hub that knows no token."""

    def log_message(self, *args):
        pass

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_PUT = do_HEAD = answer


def scene_exit_codes(cwd):
    (cwd / "always.py").write_text("def verify(prompt, completion):\n    return 1.0\n")
    (cwd / "sums.jsonl").write_text(
        "".join(
            json.dumps(dict(question=f"{a}+{b}?", answer=str(a + b))) + "\n"
            for a in range(8)
            for b in range(8)
        )
    )
    call = script("prepare.py", "sums.jsonl", "--as=verify", "--val_fraction=0.2", cwd=cwd)
    subprocess.run(**call, check=True, stdout=subprocess.DEVNULL)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    return cwd / "out", dict(
        upload=train(
            cwd,
            "--out_dir=out/upload",
            "--hf_repo=me/tiny",
            "--max_iters=4",
            code=None,
            HF_ENDPOINT=url,
            HF_TOKEN="hf_" + "x" * 30,
            NO_PROXY="*",
            HF_HUB_DISABLE_XET="1",
        ),
        stopped=train(
            cwd, "--out_dir=out/stopped", faults="step|3|terminate,torch.save|*|OSError", code=None
        ),
        verifier=train(cwd, *RLVR, "--out_dir=out/verifier", "--verifier=always.py", code=None),
    )


RLVR = (
    "--stage=rlvr",
    "--dataset=sums",
    "--init_from=out/calm",
    "--group_size=32",
    "--max_completion=16",
    "--batch_size=8",
    "--block_size=64",
    "--eval_interval=100",
    "--muon_lr=0.001",
    "--learning_rate=1e-4",
)


def test_exit_codes(scene):
    """An upload that is refused, a checkpoint that can't be written, a verifier that can't be
    called: the model is not
    where it was asked for, and the exit code says so."""
    out, runs = scene
    assert steps(out / "upload") == [4] and "401" in runs["upload"].told
    assert steps(out / "stopped") == [] and "could not be written" in runs["stopped"].told
    assert (
        "always.py" in runs["verifier"].told.splitlines()[-1] or "verif" in runs["verifier"].stderr
    )
    assert not any("Traceback" in run.told for run in runs.values())


VERIFIER = """calls = 0


def verify(prompt, completion, answer):
    global calls
    calls += 1
    if calls % 5 == 0:
        raise KeyError("赤い")
    if calls == LAST:
        raise KeyboardInterrupt
    return (sum(map(ord, completion)) % 7) / 7
"""


def scene_a_verifier_that_interrupts(cwd):
    """It raises now and then, in characters that standard output has not, and KeyboardInterrupt
    in the fourth step."""
    scene_sums = script("prepare.py", "sums.jsonl", "--as=verify", "--val_fraction=0.2", cwd=cwd)
    (cwd / "sums.jsonl").write_text(
        "".join(
            json.dumps(dict(question=f"{a}+{b}?", answer=str(a + b))) + "\n"
            for a in range(8)
            for b in range(8)
        )
    )
    subprocess.run(**scene_sums, check=True, stdout=subprocess.DEVNULL)
    (cwd / "verify.py").write_text(VERIFIER.replace("LAST", "58"), encoding="utf-8")
    run = train(
        cwd,
        *RLVR,
        "--out_dir=out/run",
        "--verifier=verify.py",
        "--max_iters=12",
        code="any",
        PYTHONIOENCODING="cp1252",
    )
    return cwd / "out" / "run", run


def test_a_verifier_that_interrupts(scene):
    """Whatever a verifier raises: it counts as no reward, or else the steps before it are saved."""
    run, done = scene
    taken = values(run, "train/loss")[-1][0]
    assert taken >= 1 and steps(run)[-1] >= taken and "UnicodeEncodeError" not in done.told
    assert named(done.told, "warning.*KeyError")
