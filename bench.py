"""
What is fast, and how fast: everything is measured beside a rival, in one run.

    python bench.py                                             the toy run's model, all parts
    python bench.py config/smol_135m.py --batch_size=2 --block_size=512            any config
    python bench.py --only=train,generate --profile             some parts, a trace for Perfetto
    python bench.py --only=loop --run_iters=700                 where the toy run's time goes
    python bench.py config/smol_360m.py --batch_size=8 --json=bench.json     keep the figures
    python bench.py --first_hour                                the first ten minutes on a new GPU
    python bench.py --compare=@HEAD,. --time_budget=120         which trains better: see RESEARCH.md

The parts: train (speed and peak memory of a step), startup, loop, which take processes of their
own; then data, documents, evaluation, checkpoint, generate, muon. The rivals: a plain GPT-2 in
float32 as people write it first and, where it is installed, transformers' own model with our
weights in our dtype. They take turns, A B C A B C, so that a machine whose speed drifts slows all
alike. A row shows medians, and as ratio ours over theirs turn by turn: of a rate more is better, of
s and GB less.

--first_hour asks of a rented GPU what would cost most to find out later: does it reach its rates,
are gradients right when compiled, which attention is fastest, do smol_360m and smol_600m run,
resume, and at which speed. It ends within ten minutes, with the worst news first, and keeps all
that it printed in first_hour_<time>.txt. Without a GPU it does the same at small sizes.
"""

import collections
import contextlib
import dataclasses
import datetime
import functools
import glob
import importlib.metadata
import importlib.util
import inspect
import json as json_lib
import math
import os
import platform
import re
import runpy
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import types

from configurator import UserError, configure

# -----------------------------------------------------------------------------
only = ""  # parts, by comma; '': all of them
pairs = 5  # turns of each comparison
new_tokens = 256  # to generate
run_iters = 100  # loop: steps of the real run
profile = (
    False  # also write trace.json, for Perfetto, and print the ten operators that take longest
)
json = ""  # keep the figures in this file
first_hour = False  # the first ten minutes on a rented GPU; --only=ceilings,steps: some parts of it
# sides that train in turns, by comma: configs, @revisions, patches, options; .: as it stands
compare = ""
seeds = 3  # compare: runs of each side, with the seeds seed, seed + 1, ... (>= 1)
measure = ""  # internal: what a process of its own measures ...
scratch = ""  # ... and the directory that it shares with the one that started it
# -----------------------------------------------------------------------------
own = set(globals())
setup = configure(globals(), also="train.py model.py:GPTConfig")  # all keys of a run are keys here


# -----------------------------------------------------------------------------
# --compare: which side trains to the lower val/bpb. Before torch is imported, since train.py does
# the work, in processes of its own.

HOME = os.path.dirname(os.path.abspath(__file__))
# 97.5% quantile of Student's t for 2, 3, ... 10 seeds; the last one, for more, is a little careful
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
RESULT = re.compile(r"^---\n((?:[\w/@.]+: .*\n)+)---$", re.MULTILINE)  # the block that ends a run


def git(*words, where=HOME):
    command = ["git", "-C", where, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def side_of(text):
    """What a side of --compare trains: a revision ("" for the files as they are), patches, and the
    arguments of train.py. A patch brings the options of the train.py line in its head."""
    side = types.SimpleNamespace(name=text.strip() or ".", revision="", code="")
    side.patches, side.arguments = [], []
    as_it_is = False
    for word in shlex.split(text):
        if word == ".":
            as_it_is = True
        elif word.startswith("--") or word.endswith(".py"):
            side.arguments.append(word)
        elif word.endswith(".patch"):
            side.patches.append(os.path.abspath(word))
            side.arguments = options_of_patch(word) + side.arguments
        else:
            side.revision = revision_of(word)
    if side.patches and not side.revision and not as_it_is:
        side.revision = revision_of("@HEAD")
    return side


def options_of_patch(path):
    """The options that turn a patch on: of the line `python train.py ...` above the diff."""
    if not os.path.exists(path):
        raise UserError(f"compare: {path}: no such patch")
    with open(path, encoding="utf-8") as f:
        head = f.read().partition("\ndiff --git ")[0]
    line = re.search(r"^ *python train\.py (.*)$", head, re.MULTILINE)
    words = shlex.split(line[1]) if line else []
    return [word for word in words if not word.startswith("--out_dir=")]


def revision_of(word):
    try:
        return git("rev-parse", "--verify", "--quiet", f"{word.removeprefix('@')}^{{commit}}")
    except (OSError, subprocess.CalledProcessError):
        expected = (
            "expected configs (*.py), --key=value, @revision, *.patch, or . for files as they are"
        )
        raise UserError(f"compare: {word!r} is no revision; {expected}") from None


def make_code(side, scratch):
    """Puts the code of a side into the directory side.code: a worktree of git, or a copy, so that
    the files can be edited while this runs."""
    name = "-".join([side.revision or "as_it_is", *side.patches])
    side.code = os.path.join(scratch, re.sub(r"\W", "_", name)[-200:])
    if os.path.exists(side.code):
        return  # another side has the same code
    if side.revision:
        git("worktree", "add", "--detach", side.code, side.revision)
    else:
        shutil.copytree(os.path.join(HOME, "assets"), os.path.join(side.code, "assets"))
        for path in glob.glob(os.path.join(glob.escape(HOME), "*.py")):
            shutil.copy2(path, side.code)
    for patch in side.patches:
        try:
            git("apply", patch, where=side.code)
        except subprocess.CalledProcessError as e:
            raise UserError(
                f"compare: {patch} does not apply: {' '.join(e.stderr.split())}"
            ) from None


def command_of(side, seed, out_dir):
    """The command line of train.py for a run of a side."""
    typed = [word for word in sys.argv[1:] if word.startswith("--")]
    typed = [word for word in typed if word[2:].partition("=")[0] not in own]
    fixed = dict(seed=seed, out_dir=out_dir, data_dir=os.path.abspath(data_dir), keep_checkpoints=1)
    fixed |= dict(hf_repo="", backup_dir="", wandb_log=False, tensorboard=False)
    fixed |= dict(terminate_pod=False)
    return [
        *(sys.executable, os.path.join(side.code, "train.py"), *setup.files),
        "--eval_interval=1000000000",  # those on the way change nothing; start and end stay
        *(*typed, *side.arguments),
        *(f"--{key}={value}" for key, value in fixed.items()),
    ]


def result_of(side, seed, scratch):
    """{name: text} of the block that ends a run of train.py. Its directory is removed."""
    out_dir, lines = os.path.join(scratch, "run"), []
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command_of(side, seed, out_dir), **pipes) as process:
        try:
            for line in process.stdout:
                lines.append(line)
                if sys.stderr.isatty():  # where the run is
                    print(f"{line.rstrip()[:99]:99}", end="\r", file=sys.stderr)
        finally:
            process.kill()  # it has ended, unless this process is interrupted
    shutil.rmtree(out_dir, ignore_errors=True)
    found = RESULT.findall("".join(lines))
    values = dict(line.split(": ", 1) for line in found[-1].splitlines()) if found else {}
    if "val/bpb" not in values:
        print("".join(lines[-20:]), file=sys.stderr)
        raise UserError(f"compare: {side.name}: its run ended without a val/bpb; why stands above")
    return values


def spread_of(differences):
    """(mean, half the width of its 95% interval) by Student's t; one alone has no interval."""
    mean, count = statistics.mean(differences), len(differences)
    if count == 1:
        return mean, math.inf
    quantile = T_QUANTILES[min(count - 2, len(T_QUANTILES) - 1)]
    return mean, quantile * statistics.stdev(differences) / math.sqrt(count)


def verdict_on(bpb, first):
    """[mean difference, 95% interval, verdict] of a side whose runs have the same seeds as those of
    the first side."""
    mean, half = spread_of([a - b for a, b in zip(bpb, first)])
    if half == math.inf:
        return [f"{mean:+.4f}", "", "one seed tells nothing of noise"]
    verdict = "within noise"
    if abs(mean) > half:
        verdict = "better" if mean < 0 else "worse"
    return [f"{mean:+.4f}", f"{mean - half:+.4f} to {mean + half:+.4f}", verdict]


def table_of(sides, found):
    """Lines of Markdown: each side, and against the first."""
    columns = ["side", "val/bpb", "mean", "difference", "95% interval", "verdict", "steps"]
    yield " | ".join(["", *columns, ""]).strip()
    yield "|---" * len(columns) + "|"
    bpb = [[float(run["val/bpb"]) for run in values] for values in found]
    for side, values, numbers in zip(sides, found, bpb):
        verdict = [""] * 3 if side is sides[0] else verdict_on(numbers, bpb[0])
        each, mean = ", ".join(f"{x:.4f}" for x in numbers), f"{statistics.mean(numbers):.4f}"
        steps = f"{statistics.mean(int(run['steps']) for run in values):,.0f}"
        yield " | ".join(["", side.name, each, mean, *verdict, steps, ""]).strip()
    yield "difference: the mean over the seeds, to the first side's run with the same seed. Its 95%"
    yield "interval is Student's t. better, worse: the interval excludes 0, as it does by chance"
    yield "for one in twenty sides that are no different."


def train_sides(sides, scratch):
    """[the blocks of each side's runs], of every side with the first seed, then the second, every
    other time in reverse, so that a machine whose speed drifts favours none."""
    found, begun, total = [[] for _ in sides], time.monotonic(), len(sides) * seeds
    for turn in range(seeds):
        for i in list(range(len(sides)))[:: -1 if turn % 2 else 1]:
            values = result_of(sides[i], seed + turn, scratch)
            found[i].append(values)
            done = sum(map(len, found))
            left = (time.monotonic() - begun) / done * (total - done) / 60
            print(
                f"run {done} of {total}: {sides[i].name}, seed {seed + turn}: val/bpb "
                f"{values['val/bpb']}, {values['steps']} steps in {values['train_s']} s; "
                f"about {left:.0f} minutes left",
                flush=True,
            )
    return found


def compare_sides():
    sides = [side_of(text) for text in compare.split(",")]
    if len(sides) < 2 or seeds < 1:
        raise UserError(
            f"compare={compare!r}, seeds={seeds}: expected two sides or more, and seeds"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench.py: stopped"))  # after tidying up
    with tempfile.TemporaryDirectory(prefix="nanosmol_compare_") as scratch:
        try:
            for side in sides:
                make_code(side, scratch)
                print(f"{side.name}: {shlex.join(['train.py', *side.arguments])}", flush=True)
            found = train_sides(sides, scratch)
        finally:
            for side in sides:
                if side.revision and os.path.exists(side.code):
                    git("worktree", "remove", "--force", side.code)
    print("", *table_of(sides, found), sep="\n")
    if json:
        rows = [dict(side=side.name, runs=runs) for side, runs in zip(sides, found)]
        with open(json, "w", encoding="utf-8") as f:
            json_lib.dump(rows, f, indent=1)


if compare:
    compare_sides()
    sys.exit()

# -----------------------------------------------------------------------------

PARTS = (
    "train",
    "startup",
    "loop",
    "data",
    "documents",
    "evaluation",
    "checkpoint",
    "generate",
    "muon",
)
# of the first hour, in the order of what they are worth: (part, config, seconds at most)
HOUR = (
    ("environment", "smol_360m", 30),
    ("ceilings", "smol_360m", 30),
    ("gradients", "smol_360m", 90),
    ("gradients", "smol_600m", 90),
    ("attention", "smol_600m", 60),
    ("attention", "smol_360m", 60),
    ("steps", "smol_360m", 190),
    ("resume", "smol_360m", 90),
    ("steps", "smol_600m", 190),
    ("whole_steps", "smol_360m", 120),
    ("profile", "smol_600m", 90),
)
HOUR_SECONDS = 580  # in all
known = list(dict.fromkeys(part for part, _, _ in HOUR)) if first_hour else PARTS
asked = only.split(",") if only else known
for part in asked:
    if part not in known:
        raise UserError(
            f"only={only}: there is no part {part!r}; expected some of {','.join(known)}"
        )
if pairs < 1:
    raise UserError(f"pairs={pairs}: expected at least 1")

import numpy as np  # after the config, so that --help and slips of the pen answer at once
import torch
import torch.nn as nn
import torch.nn.functional as F

import prepare
from model import (
    GPT,
    GPUS,
    GPTConfig,
    Muon,
    architecture,
    compile_pays,
    documents,
    fast_attention,
    flops_per_token,
    gpu_named,
    keep_memory,
    make_optimizers,
    memory_estimate,
    multiplies_bf16,
    pack_weights,
    pick_attention,
    pick_device,
    pick_dtype,
)
from runs import peak_memory

# -----------------------------------------------------------------------------
# the first hour: each part is a process of its own, which may fail, hang or crash its GPU

# how bad the news is, the worst first; a line that begins with one of these is in the summary
VERDICTS = ("WRONG", "FAILED", "SLOW", "LEFT OUT", "ok")
# what a machine without a GPU does instead of the configs' shapes
SMALL = dict(
    n_layer=2, n_head=6, n_kv_head=2, n_embd=96, ffn_dim=256, block_size=128, vocab_size=512,
    batch_size=4, gradient_accumulation_steps=2,
)  # fmt: skip


def run_first_hour():
    """Runs the parts of HOUR until the time is up, then repeats what they found, the worst first.
    Everything is printed as it comes, and kept in a file."""
    begun, found, path = time.monotonic(), [], f"first_hour_{datetime.datetime.now():%m%d_%H%M%S}"
    with open(f"{path}.txt", "x", encoding="utf-8") as file:

        def out(line):
            print(line, flush=True)
            print(line, file=file, flush=True)
            if line.startswith(VERDICTS):
                found.append(line)

        with tempfile.TemporaryDirectory(prefix="nanosmol_bench_", ignore_cleanup_errors=True) as d:
            for part, name, seconds in HOUR:
                left = HOUR_SECONDS - (time.monotonic() - begun)
                if part not in asked:
                    continue
                out(f"\n== {part}, {name} ({left:.0f} s left)")
                if left < 15:
                    out(f"LEFT OUT {part} of {name}: the {HOUR_SECONDS} s are over")
                    continue
                run_part(part, name, min(seconds, left), d, out)
            if os.path.exists(os.path.join(d, "trace.json")):
                shutil.move(os.path.join(d, "trace.json"), f"{path}_trace.json")
        out(f"\n== what was found, the worst first ({time.monotonic() - begun:.0f} s)")
        for line in sorted(found, key=lambda line: [line.startswith(v) for v in VERDICTS].index(1)):
            out(line)
        out(f"kept in {os.path.abspath(file.name)}")


def run_part(part, name, seconds, scratch, out):
    """A part in a process of its own: its lines, and one more if it fails or takes too long."""
    config = os.path.join(os.path.dirname(os.path.abspath(__file__)), "config", f"{name}.py")
    small = [] if torch.cuda.is_available() else [f"--{k}={v}" for k, v in SMALL.items()]
    if part == "profile":  # what compiles fast, and fits
        small += ["--compile=False"] if small else ["--n_layer=4", "--batch_size=16"]
    own = [f"--measure=hour_{part}", f"--scratch={scratch}"]
    environment = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # as train.py sets it
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        # a part that is killed while it compiles leaves half a library, which must not be found by
        # the runs that come after
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(scratch, "inductor"),
    }
    process = subprocess.Popen(
        [sys.executable, __file__, config, *small, *sys.argv[1:], *own],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True, env=environment,
    )  # fmt: skip
    late = []

    def end():
        late.append(part)
        os.killpg(process.pid, signal.SIGKILL)  # train.py, too

    timer, line = threading.Timer(seconds, end), ""
    timer.start()
    try:
        for line in process.stdout:
            out(line.rstrip())
        code = process.wait()
    finally:
        timer.cancel()
        with contextlib.suppress(ProcessLookupError):  # what it left behind
            os.killpg(process.pid, signal.SIGKILL)
    if late:
        out(f"LEFT OUT the rest of {part} of {name}: it took longer than {seconds:.0f} s")
    elif code:
        out(f"FAILED   {part} of {name}, status {code}: {line.strip()[:200]}")


if first_hour and not measure:
    # whatever ends this process ends the part that runs, too
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    run_first_hour()
    sys.exit()

# -----------------------------------------------------------------------------
# data, model and machine, as train.py sets them up

shared = (
    None if scratch else tempfile.TemporaryDirectory(prefix="nanosmol_bench_")
)  # goes when this process ends
scratch = scratch or shared.name
mixture = prepare.parse_mixture(dataset)
if dataset == "toy" and not os.path.exists(os.path.join(data_dir, "toy", "train.bin")):
    prepare.prepare("toy", data_dir=data_dir)
if first_hour or not all(
    os.path.exists(os.path.join(data_dir, name, "train.bin")) for name, _ in mixture
):  # random tokens will do
    meta = dict(tokenizer="byte", vocab_size=vocab_size or 50304, eos_id=256)
    dataset, data_dir = f"random_{meta['vocab_size']}", os.path.join(scratch, "data")
    directory, mixture = os.path.join(data_dir, dataset), [(dataset, 1.0)]
    meta["dtype"] = "uint16" if meta["vocab_size"] <= 2**16 else "uint32"
    if not os.path.exists(directory):
        os.makedirs(directory)
        for split, size in (("train", 2**22), ("val", 2**20)):
            ids = np.random.default_rng(seed).integers(
                meta["vocab_size"], size=size, dtype=meta["dtype"]
            )
            ids[::1000] = meta["eos_id"]  # documents about as long as those of the web
            ids.tofile(os.path.join(directory, f"{split}.bin"))
        prepare.write_json(os.path.join(directory, "meta.json"), meta)
directories = [os.path.join(data_dir, name) for name, _ in mixture]
meta = prepare.read_meta(directories[0])
data = prepare.Mixture(
    [prepare.Bins(d, "train", block_size, seed) for d in directories], [w for _, w in mixture], seed
)
held_out = prepare.Bins(directories[0], "val", block_size, seed)
vocab_size = vocab_size or meta["vocab_size"]
config = GPTConfig(**{k: globals()[k] for k in GPTConfig.__dataclass_fields__})
held_out.check_vocabulary(vocab_size)
with torch.device("meta"):
    shape = GPT(config)

device = pick_device(device)
device_type = device.split(":")[0]
muon_dtype = torch.bfloat16 if dtype != "float32" and multiplies_bf16(device) else torch.float32
dtype, _ = pick_dtype(dtype, device, shape, batch_size)
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != "float32")
attention = pick_attention(
    device, dtype, True, compile, dropout
)  # where documents don't see each other
if device_type == "cuda":
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
elif device_type == "cpu" and measure not in ("plain", "transformers"):
    keep_memory()
x, y = (t.to(device) for t in data.batch(range(batch_size)))
tokens = batch_size * block_size
kind = architecture(config)[0]
same_shape = (
    kind == "gpt2" and config.tie_embeddings and config.ffn_dim == 4 * config.n_embd
)  # as the plain GPT-2
first_weights = os.path.join(scratch, "model")  # a checkpoint of ours before the first step
results = []


# -----------------------------------------------------------------------------
# measuring


def now():
    """Seconds, once the device has done what it was asked to."""
    getattr(torch, device_type).synchronize()
    return time.perf_counter()


def timed(work):
    """{'': seconds of one call}, and of its phases where it is a generator that yields their names
    as they end. Work that is done in another process returns what was timed there."""
    begun = last = now()
    phases, running = {}, work()
    if isinstance(running, dict):
        return running
    for phase in running if inspect.isgenerator(running) else ():
        phases[phase], last = now() - last, now()
    return {"": now() - begun, **phases}


def report(what, unit, ours, against="", theirs=()):
    """One row of the table, from our figures and a rival's of the same turns."""
    figure = lambda values: (
        f"{(v := statistics.median(values)):>10{',.0f' if v >= 1000 else '.3g'}}"
    )
    row = dict(
        part=part,
        what=what,
        unit=unit,
        ours=statistics.median(ours),
        against=against,
        each=list(ours),
    )
    line = f"{what:30}{figure(ours)} {unit:8} {against:32}"
    if theirs:
        ratios = sorted(a / b for a, b in zip(ours, theirs))
        row |= dict(
            theirs=statistics.median(theirs),
            each_of_theirs=list(theirs),
            ratio=statistics.median(ratios),
            lowest=ratios[0],
            highest=ratios[-1],
        )
        line += f"{figure(theirs)} {row['ratio']:7.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    elif len(ours) > 1:
        line += f" ({figure([min(ours)]).strip()} to {figure([max(ours)]).strip()})"
    results.append(row)
    print(line.rstrip(), flush=True)


def compare(what, ours, rivals, amount=0, unit="s", turns=pairs, factors={}):
    """Times ours and the rivals {name: work} in turn, and reports `amount` a second, or seconds
    where it is 0. The time of a rival whose work is another amount is multiplied by its factor.
    Returns our seconds of each turn."""
    sides = {"ours": ours, **rivals}
    for work in sides.values():
        timed(work)  # warm-up
    times = [{side: timed(work) for side, work in sides.items()} for _ in range(turns)]
    for rival in rivals or ["ours"]:
        for phase in times[0]["ours"]:
            value = lambda seconds: amount / seconds if amount and not phase else seconds
            mine, theirs = (
                [value(t[side][phase] * factors.get(side, 1)) for t in times]
                for side in ("ours", rival)
            )
            report(
                f"  {phase}" if phase else what,
                "s" if phase else unit,
                mine,
                *((rival, theirs) if rivals else ()),
            )
    return [t["ours"][""] for t in times]


def squares(size={"cuda": 8192}.get(device_type, 2048)):
    """(work, FLOPs): products of large square matrices, the rate that this machine reaches where
    nothing is in the way."""
    a, b, out = torch.randn(3, size, size, device=device).to(muon_dtype)
    return lambda: [torch.mm(a, b, out=out) for _ in range(8)], 8 * 2 * size**3


# -----------------------------------------------------------------------------
# the sides: a model of each and its loss


@functools.cache
def our_model():
    torch.manual_seed(seed)
    model = GPT(config)
    if not os.path.exists(first_weights):
        model.save_pretrained(first_weights)
    model.grad_checkpoint = grad_checkpoint
    return model.to(device)


def our_loss(x, y, doc_mask=False):
    with autocast:
        return our_model()(x, y, documents(x, meta["eos_id"], attention) if doc_mask else None)[1]


@functools.cache
def our_optimizers():
    return make_optimizers(
        our_model(),
        optimizer,
        learning_rate,
        muon_lr,
        muon_momentum,
        weight_decay,
        (beta1, beta2),
        cautious,
        decay_embeddings,
        muon_dtype,
    )


def step_of(model, optimizers, loss_of):
    """A training step, one micro-batch and an update. Our forward takes along the gradient of the
    head, see model.py."""

    def step():
        loss = loss_of()
        yield "forward"
        loss.backward()
        yield "backward"
        nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        yield "clip and update"

    return step


@functools.cache
def our_step():
    """train.py's step, compiled if train.py would compile it in a run of max_iters steps."""
    step = step_of(our_model(), our_optimizers(), lambda: our_loss(x, y, doc_mask))
    timed(step)
    if compile and compile_pays(
        device_type, max_iters, timed(step)[""] * gradient_accumulation_steps
    ):
        print(
            f"torch.compile, as in a run of {max_iters:,} steps; --compile=False leaves it out",
            file=sys.stderr,
        )
        our_model().compile()
    return step


class PlainBlock(nn.Module):
    def __init__(self, width, heads, bias):
        super().__init__()
        self.heads = heads
        self.attn_norm, self.mlp_norm = (nn.LayerNorm(width, bias=bias) for _ in range(2))
        self.qkv, self.proj = (
            nn.Linear(width, 3 * width, bias=bias),
            nn.Linear(width, width, bias=bias),
        )
        self.up, self.down = (
            nn.Linear(width, 4 * width, bias=bias),
            nn.Linear(4 * width, width, bias=bias),
        )

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.attn_norm(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        )
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class PlainGPT2(nn.Module):
    """What people write first: float32, eager, learned positions, tied head, whole logits. Of our
    width and depth."""

    def __init__(self, c):
        super().__init__()
        self.embed, self.pos_embed = (
            nn.Embedding(c.vocab_size, c.n_embd),
            nn.Embedding(c.max_positions, c.n_embd),
        )
        self.blocks = nn.ModuleList(
            PlainBlock(c.n_embd, c.n_head, c.bias) for _ in range(c.n_layer)
        )
        self.norm = nn.LayerNorm(c.n_embd, bias=c.bias)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x, y):
        h = self.embed(x) + self.pos_embed.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(
            (self.norm(h) @ self.embed.weight.T).flatten(0, 1), y.flatten(), ignore_index=-1
        )


def plain_model():
    """With our first weights where ours is the same, so that its loss can be checked; None where
    heads don't divide."""
    model = None if config.n_embd % config.n_head else PlainGPT2(config)
    if model and same_shape:
        ours = {
            k.replace(".attn.", ".").replace(".mlp.", "."): v
            for k, v in GPT.from_pretrained(first_weights).state_dict().items()
        }
        model.load_state_dict({k: ours[k] for k in model.state_dict()})
    return model and model.to(device)


def transformers_model():
    """transformers' own model of our architecture, with our first weights; None where there is
    none."""
    if not importlib.util.find_spec("transformers") or kind == "nanosmol":
        return None
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(first_weights).to(device)


# -----------------------------------------------------------------------------
# parts in processes of their own


def again(what):
    """A process like this one that is to --measure=what. It answers with lines of JSON."""
    return subprocess.Popen(
        [sys.executable, *sys.argv, f"--measure={what}", f"--scratch={scratch}"],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def answer(process):
    for line in process.stdout:
        if line.startswith("json:"):
            return json_lib.loads(line[5:])
    raise UserError(f"{process.args[-2]} ended with status {process.wait()}; why stands above")


def say(value):
    print(f"json:{json_lib.dumps(value)}", flush=True)


def train_py(**keys):
    """The command line of train.py with this very config: from scratch, in a directory of its own,
    and telling nobody."""
    defaults = dict(
        out_dir=os.path.join(tempfile.mkdtemp(dir=scratch), "run"),
        dataset=dataset,
        data_dir=data_dir,
        stage="pretrain",
        init_from="scratch",
        wandb_log=False,
        tensorboard=False,
        hf_repo="",
        backup_dir="",
        terminate_pod=False,
    )
    keys = defaults | keys
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
    passed = [a for a in sys.argv[1:] if a.startswith("--") and a[2:].partition("=")[0] not in own]
    return [
        script,
        *setup.files,
        *passed,
        *(f"--{k}={v}" for k, v in keys.items() if k in setup.keys),
    ]


def part_train():
    """Every side has a process of its own, so that neither memory nor allocator is shared, and
    steps when it is its turn."""
    names = dict(
        ours="ours", plain="plain float32 GPT-2", transformers=f"transformers + AdamW, {dtype}"
    )
    sides, losses, peaks, compiled = {}, {}, {}, False

    def turn(side):
        def work():
            print(file=sides[side].stdin, flush=True)
            times = answer(sides[side])
            peaks[side] = times.pop("peak")
            return times

        return work

    for side in names:
        process = again(side)
        try:
            start = answer(process)
        except UserError as e:  # for want of memory, most often
            if side == "ours":
                raise
            print(f"{names[side]} is no rival here: {e}")
            continue
        if start:
            sides[side] = process
            names[side] += f", {start['parameters'] / 1e6:.0f}M"
            compiled = compiled or start["compiled"]
            if side != "plain" or same_shape:
                losses[side] = start["loss"]
    print("first loss: " + ", ".join(f"{side} {loss:.4f}" for side, loss in losses.items()))
    if max(losses.values()) - min(losses.values()) > 0.005 * losses["ours"]:
        raise UserError("the sides don't compute the same loss, so there is no speed to compare")
    rivals = [side for side in sides if side != "ours"]
    what = "training step, compiled" if compiled else "training step"
    seconds = compare(
        what, turn("ours"), {names[side]: turn(side) for side in rivals}, tokens, "tok/s"
    )
    for side in rivals:
        report("peak memory of the process", "GB", [peaks["ours"]], names[side], [peaks[side]])
    for process in sides.values():
        process.communicate()
    report_utilization(seconds)


def report_utilization(seconds):
    """The FLOPs of training steps that took `seconds`, against those that this machine reaches with
    large squares and, on a GPU, those of its data sheet."""
    multiply, flops = squares()
    rates = [flops / timed(multiply)[""] for _ in range(pairs + 1)][1:]
    report(f"squares, {muon_dtype}", "GFLOP/s", [rate / 1e9 for rate in rates])
    reached = [flops_per_token(shape) * tokens / s for s in seconds]
    report(
        "training step, of that rate", "%", [100 * r / statistics.median(rates) for r in reached]
    )
    if device_type == "cuda" and (name := gpu_named(torch.cuda.get_device_name(device))):
        peak = GPUS[name][0]
        report(
            "training step, MFU",
            "%",
            [100 * r / peak for r in reached],
            f"of {peak / 1e12:.0f} TFLOP/s",
        )


def take_steps(side):
    """In the process of a side: says how it starts, null where there is no such side, and the times
    of a step whenever it is given a line."""

    def transformers_loss(x, y):
        with autocast:
            return model(x, labels=x, use_cache=False).loss

    model = dict(ours=our_model, plain=plain_model, transformers=transformers_model)[side]()
    loss_of = dict(ours=our_loss, plain=model, transformers=transformers_loss)[side]
    if model is None:
        return say(None)
    with torch.no_grad():
        model.eval()
        loss = loss_of(
            x, F.pad(x[:, 1:], (0, 1), value=-1)
        ).item()  # on the targets that transformers makes of labels
        model.train()
    step = (
        our_step()
        if side == "ours"
        else step_of(model, [torch.optim.AdamW(model.parameters(), lr=1e-4)], lambda: loss_of(x, y))
    )
    for _ in range(3):  # allocators settle
        timed(step)
    say(
        dict(
            loss=loss,
            compiled=model._compiled_call_impl is not None,
            parameters=sum(p.numel() for p in model.parameters()),
        )
    )
    for _ in sys.stdin:
        say(timed(step) | {"peak": peak_memory()})


def part_startup():
    """From the command to the line of the first step; of the evaluation before it one micro-batch
    is left."""

    def first_step():
        command = [sys.executable, *train_py(log_interval=1, eval_iters=1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            seen = any("tok/s" in line for line in run.stdout)
            run.kill()
        if not seen:
            raise UserError("train.py ended before its first step; why stands above")

    imports = lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True)
    compare(
        "start-up to the first step",
        first_step,
        {'python -c "import torch"': imports},
        turns=min(pairs, 3),
    )


def part_loop():
    """Where the time of a real run of train.py goes."""
    begun = time.perf_counter()
    process = again("loop")
    spent = answer(process)
    process.communicate()
    whole, loop = time.perf_counter() - begun, spent.pop("loop")
    for phase, seconds in spent.items():
        report(f"  {phase}", "s", [seconds])
    for what, wall in ((f"{run_iters} steps", loop), ("the whole process", whole)):
        report(
            "share outside these",
            "%",
            [100 * (1 - sum(spent.values()) / wall)],
            f"of the {wall:.1f} s of {what}",
        )


def instrumented_run():
    """train.py in this process, with a stopwatch around forward (in training), backward, clip and
    update. What remains of the steps is data, document masks, log, evaluation, checkpoints and
    plots; of the process, also start and end."""
    spent, times = collections.Counter(), []

    def stopwatch(owner, name, phase):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            begun = now()
            result = original(*args, **kwargs)
            if phase != "forward" or torch.is_grad_enabled():
                times.extend((begun, now()))
                spent[phase] += times[-1] - begun
            return result

        setattr(owner, name, watched)

    stopwatch(GPT, "__call__", "forward")
    stopwatch(torch.Tensor, "backward", "backward")
    for owner, name in ((nn.utils, "clip_grad_norm_"), (torch.optim.AdamW, "step"), (Muon, "step")):
        stopwatch(owner, name, "clip and update")
    sys.argv = train_py(max_iters=run_iters)
    runpy.run_path(sys.argv[0], run_name="__main__")
    say(spent | {"loop": times[-1] - times[0]})


# -----------------------------------------------------------------------------
# parts in this process


def part_data():
    batches, path, bin_type = max(1, 2**20 // tokens), data.bins[0].path, data.bins[0].tokens.dtype

    def get_batch():
        memmap = np.memmap(path, dtype=bin_type, mode="r")
        ix = torch.randint(len(memmap) - block_size, (batch_size,))
        torch.stack([torch.from_numpy(memmap[i : i + block_size].astype(np.int64)) for i in ix])
        torch.stack(
            [torch.from_numpy(memmap[i + 1 : i + 1 + block_size].astype(np.int64)) for i in ix]
        )

    compare(
        "data loading",
        lambda: [data.batch(range(i * batch_size, (i + 1) * batch_size)) for i in range(batches)],
        {"nanoGPT's get_batch": lambda: [get_batch() for _ in range(batches)]},
        batches * tokens,
        "tok/s",
    )


def part_documents():
    """What it costs that documents don't see each other. More than 1 is a gain: what is masked need
    not be computed."""

    def work(doc_mask):
        our_loss(x, y, doc_mask).backward()
        our_model().zero_grad(set_to_none=True)

    compare(
        "documents apart, no update",
        lambda: work(True),
        {"ours, plain causal": lambda: work(False)},
        tokens,
        "tok/s",
    )


@torch.no_grad()
def part_evaluation():
    """Not compiled, as in a short run."""
    our_model().eval()  # also keeps the first weights, which the rival may take
    rows, plain = (
        max(batch_size, 4096 // block_size),
        plain_model(),
    )  # as many as train.py evaluates at once
    starts = held_out.held_out(rows)
    read = lambda some: (t.to(device) for t in held_out.read(some))
    rivals = (
        {
            "plain float32 GPT-2": lambda: [
                plain(*read(starts[i : i + batch_size])).item()
                for i in range(0, len(starts), batch_size)
            ]
        }
        if plain
        else {}
    )
    compare(
        "evaluation",
        lambda: our_loss(*read(starts), doc_mask).item(),
        rivals,
        len(starts) * block_size,
        "tok/s",
    )
    our_model().train()


def part_checkpoint():
    """Weights and the optimizers' state; nobody waits for the disk itself."""
    timed(
        step_of(our_model(), our_optimizers(), lambda: our_loss(x, y))
    )  # from the first step on there is a state
    model, directory, single = (
        our_model(),
        os.path.join(scratch, "ours"),
        os.path.join(scratch, "theirs.pt"),
    )
    trainer = os.path.join(directory, "trainer.pt")
    states = lambda: [opt.state_dict() for opt in our_optimizers()]
    save = lambda: (model.save_pretrained(directory), torch.save(states(), trainer))
    load = lambda: (
        GPT.from_pretrained(directory),
        torch.load(trainer, weights_only=True, map_location="cpu"),
    )
    save_single = lambda: torch.save((model.state_dict(), states()), single)
    load_single = lambda: GPT(config).load_state_dict(
        torch.load(single, weights_only=True, map_location="cpu")[0]
    )
    save()
    size = sum(os.path.getsize(os.path.join(directory, f)) for f in os.listdir(directory)) / 1e6
    compare(f"save {size:,.0f} MB", save, {"torch.save": save_single}, size, "MB/s")
    compare(f"load {size:,.0f} MB", load, {"torch.load into a new GPT": load_single}, size, "MB/s")


def part_generate():
    """Greedy, as sample.py does it: weights in the dtype, packed on a CPU. Random weights leave the
    best two tokens close: in bfloat16 rounding parts the texts, with --dtype=float32 the ids have
    to be the same."""
    theirs, low = our_model() and transformers_model(), getattr(torch, dtype)
    model = GPT.from_pretrained(first_weights).to(device, low).eval()
    if device_type == "cpu":
        pack_weights(model)
    if theirs:
        theirs.eval().to(low).generation_config.eos_token_id = None  # never ends early
    prompts = held_out.read((held_out.held_out(8) * 8)[:8])[0][:, :8].to(device)
    length = min(new_tokens, config.max_positions - prompts.shape[1])
    for rows in (1, 8):
        idx = prompts[:rows]
        ours = lambda: model.generate(idx, length, temperature=0)
        rival = lambda: theirs.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            max_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
        )
        rivals = {f"transformers, {dtype}": rival} if theirs else {}
        compare(f"generation, batch {rows}", ours, rivals, rows * length, "tok/s")
        if theirs:
            same = (
                (ours() == rival())[:, prompts.shape[1] :].cummin(dim=1).values
            )  # up to each row's first difference
            print(f"  the same ids: {same.sum()} of {same.numel()}")


def part_muon():
    """The update of the matrices inside the blocks, against what its matrix products alone would
    take."""
    muon = make_optimizers(GPT(config).to(device), "muon", muon_dtype=muon_dtype)[-1]
    shapes = collections.Counter()
    for p in muon.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
        for rows in getattr(p, "parts", [p.shape[0]]):
            shapes[min(rows, p.shape[1]), max(rows, p.shape[1])] += 1
    # each of five iterations on an m x n matrix, m <= n: X X^T (2 m^2 n FLOPs), A A (2 m^3) and
    # B X (2 m^2 n)
    flops = sum(count * 5 * (4 * m * m * n + 2 * m**3) for (m, n), count in shapes.items())
    stacks = [
        torch.randn(count, m, n, device=device).to(muon_dtype) for (m, n), count in shapes.items()
    ]
    stacks = [(X, X @ X.mT, torch.empty_like(X)) for X in stacks]

    def products():
        for X, A, out in stacks:
            B = torch.empty_like(A)
            for _ in range(5):
                torch.bmm(X, X.mT, out=A), torch.bmm(A, A, out=B), torch.bmm(B, X, out=out)

    multiply, square_flops = squares()
    at_that_rate = f"{flops / 1e12:.3g} TFLOP at the rate of squares"
    compare(
        "Muon update",
        muon.step,
        {at_that_rate: multiply, "its products alone": products},
        factors={at_that_rate: flops / square_flops},
    )


# -----------------------------------------------------------------------------
# parts of the first hour, in processes of their own


def config_name():
    return os.path.splitext(os.path.basename(setup.files[0]))[0]


def verdict(kind, text):
    """A line that the summary repeats, see VERDICTS."""
    print(f"{kind:8} {config_name()}: {text}", flush=True)


def guarded(what, work):
    """work(), or None with a line that says what went wrong."""
    try:
        return work()
    except Exception as e:
        traceback.print_exc(limit=-3, file=sys.stdout)
        verdict("FAILED", f"{what}: {(str(e) or type(e).__name__).splitlines()[0][:200]}")


def milliseconds(work, times=10):
    """The median of so many calls, after three that warm up."""
    for _ in range(3):
        work()
    return 1000 * statistics.median(timed(work)[""] for _ in range(times))


def low_dtype():
    """The dtype of products in training on a GPU, also where a CPU stands in for it."""
    return torch.bfloat16 if device_type == "cpu" or multiplies_bf16(device) else torch.float16


def gpu_peak():
    """FLOP/s of the data sheet in bf16; None where there is no GPU or an unknown one."""
    name = gpu_named(torch.cuda.get_device_name(device)) if device_type == "cuda" else None
    return GPUS[name][0] if name else None


def hour_environment():
    """What this machine is, and what torch.compile needs of it."""
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"{os.cpu_count()} cores, scratch files in {scratch}")
    disk = shutil.disk_usage(scratch).free / 1e9
    verdict("ok" if disk > 20 else "SLOW", f"{disk:.0f} GB of disk are free for checkpoints")
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"capability {properties.major}.{properties.minor}"
        print(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, {capability}")
        print(f"{properties.total_memory / 1e9:.1f} GB of memory")
        name = torch.cuda.get_device_name(device)
        verdict("ok" if gpu_peak() else "SLOW", f"{name} is {gpu_named(name)} of the table of GPUs")
        free, total = torch.cuda.mem_get_info(device)
        if free < 0.95 * total:
            verdict("SLOW", f"another process has memory: {free / 1e9:.1f} GB of it are free")
    else:
        verdict("LEFT OUT", "there is no GPU: everything below is at small sizes, on the CPU")
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        verdict("WRONG", "there is no C compiler, torch.compile needs one: apt install gcc")
    if not os.path.exists(header):
        verdict("WRONG", f"torch.compile needs {header}: apt install python3-dev")
    for doc_mask in (False, True):
        picked = pick_attention(device, dtype, doc_mask, True)
        print(f"attention, documents apart {doc_mask}: {picked}")


def hour_ceilings():
    """The rates that nothing here can exceed: products of matrices, and memory."""
    size = 8192 if device_type == "cuda" else 512
    reached = {}
    for kind in (low_dtype(), torch.float32):
        a, b = torch.randn(2, size, size, device=device, dtype=kind)
        reached[kind] = 2 * size**3 / milliseconds(lambda: a @ b) / 1e9
        tf32 = " (TF32)" if kind == torch.float32 and device_type == "cuda" else ""
        print(f"{size} x {size}, {kind}{tf32}: {reached[kind]:.3g} TFLOP/s")
    a = torch.empty(2**31 if device_type == "cuda" else 2**25, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    print(f"memory: {2 * a.numel() / milliseconds(lambda: b.copy_(a)) / 1e6:,.0f} GB/s of copying")
    if gpu_peak():
        share = reached[low_dtype()] * 1e12 / gpu_peak()
        text = (
            f"products reach {share:.0%} of the {gpu_peak() / 1e12:.0f} TFLOP/s of the data sheet"
        )
        verdict("ok" if share > 0.6 else "SLOW", text)


def hour_gradients():
    """Of two layers of a config, in low precision as it comes and compiled, against float32."""
    torch.manual_seed(seed)
    two = GPT(dataclasses.replace(config, n_layer=2, dropout=0.0)).to(device)
    idx, targets = x[:4], y[:4].clone()
    targets[:, ::5] = -1

    def gradients(forward, low):
        two.zero_grad(set_to_none=True)
        docs = None
        if doc_mask:
            docs = documents(idx, meta["eos_id"], attention if low else "sdpa")
        with torch.autocast(device_type, low_dtype(), enabled=low):
            loss = forward(idx, targets, docs)[1]
        (loss / 2).backward()
        return loss.item(), {n: p.grad.double() for n, p in two.named_parameters()}

    if device_type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    exact_loss, exact = gradients(two, low=False)
    worst = {}
    for how, forward in (("as it comes", two), ("compiled", torch.compile(two))):
        begun = now()
        loss, found = gradients(forward, low=True)
        errors = {n: ((found[n] - exact[n]).norm() / exact[n].norm()).item() for n in exact}
        name = max(errors, key=lambda n: (math.isnan(errors[n]), errors[n]))
        worst[how] = errors[name]
        print(
            f"{how}: loss {loss:.5f} (float32 {exact_loss:.5f}), largest relative error of a "
            f"gradient {errors[name]:.1e} ({name}), {now() - begun:.1f} s",
            flush=True,
        )
    for how, error in worst.items():
        good = error < 0.1 and error < 2 * worst["as it comes"] + 0.02  # False for NaN
        text = f"gradients in {low_dtype()}, {how}, are within {error:.1e} of float32"
        verdict("ok" if good else "WRONG", text)


def hour_attention():
    """Forward and backward of every kernel that is here, at the shape of a config: causal, and with
    documents apart."""
    batch, length = (8, block_size) if device_type == "cuda" else (2, 128)
    heads = (config.n_head, config.n_kv_head, config.n_kv_head)
    q, k, v = (
        torch.randn(batch, n, length, config.head_dim, device=device, dtype=low_dtype())
        .requires_grad_()
        for n in heads
    )  # fmt: skip
    out, idx = torch.randn_like(q), torch.randint(1, 512, (batch, length), device=device)
    idx[:, ::700] = 0
    flops = 3.5 * 2 * batch * length**2 * config.n_head * config.head_dim  # of causal attention
    compiled = torch.compile(fast_attention)

    def kernel(name):
        mask = None if name == "causal" else documents(idx, 0, name).mask
        attend = compiled if name == "flex" and device_type == "cuda" else fast_attention
        work = lambda: torch.autograd.grad(attend(q, k, v, mask), (q, k, v), out)
        return milliseconds(work, 5), work()

    found, names = {}, ["causal", "sdpa", "flex", "torch.nn.attention.varlen", "flash_attn", "FA3"]
    picked = pick_attention(device, str(low_dtype())[6:], True, True)
    for name in names:
        package = {"FA3": "flash_attn_interface"}.get(name, name)
        is_here = name in ("causal", "sdpa")
        if device_type == "cuda" and not is_here:
            is_here = name == "flex" or find_module(package)
        if not is_here:
            print(f"{name}: not here")
            continue
        result = guarded(f"attention by {name}", lambda: kernel(name))
        if result:
            ms, gradients = result
            rate = f"{flops / ms / 1e9:.3g} TFLOP/s, counting all of the triangle"
            print(f"{name:28} {ms:8.3f} ms, {rate}", flush=True)
            found[name] = ms, gradients
    check_attention(found, picked)


def find_module(name):
    with contextlib.suppress(ImportError):
        return importlib.util.find_spec(name)


def check_attention(found, picked):
    """Verdicts on {kernel: (ms, gradients)}: are those with documents equal, is the fastest one
    picked, does it cost less than plain causal attention."""
    causal, apart = found.pop("causal", None), found
    for name in apart:
        if name == "sdpa" or "sdpa" not in apart:
            continue
        for ours, theirs in zip(apart[name][1], apart["sdpa"][1]):
            error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
            if not error < 0.03:
                verdict("WRONG", f"gradients of attention by {name} differ by {error:.1e}")
    if not apart:
        return
    fastest = min(apart, key=lambda name: apart[name][0])
    text = f"documents apart: train.py picks {picked}, {fastest} is fastest here"
    slow = picked not in apart or apart[picked][0] > 1.1 * apart[fastest][0]
    verdict("SLOW" if slow else "ok", text)
    if causal and picked in apart and device_type == "cuda":
        share = apart[picked][0] / causal[0]
        text = f"documents apart by {picked} take {share:.2f} of the time of causal attention"
        verdict("ok" if share <= 1.05 else "SLOW", text)


def rows_of_run(steps, out_dir, kill, **keys):
    """Runs train.py until it has done so many steps, ends it by the signal `kill`, and returns the
    rows of its log. Its own max_iters stay, so that it decides about torch.compile as it would."""
    keys |= dict(out_dir=out_dir, log_interval=1, eval_iters=1)
    command = [sys.executable, *train_py(**keys)]
    if os.path.exists(out_dir):
        command.remove("--init_from=scratch")  # which would set the run aside
    count = 0
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    with subprocess.Popen(command, **pipes) as run:
        for line in run.stdout:
            print("  " + line.rstrip(), flush=True)
            count += "tok/s" in line
            if count == steps:
                run.send_signal(kill)
        if count < steps:
            raise UserError(f"train.py ended after {count} of {steps} steps; why stands above")
    with open(os.path.join(out_dir, "log.jsonl"), encoding="utf-8") as f:
        return [json_lib.loads(line) for line in f]


def report_speed(rows, what, last):
    """The median of the last steps: tokens a second, MFU, memory beside its estimate."""
    rows = [row for row in rows if "train/tok_per_sec" in row]
    median = lambda key: statistics.median(row[key] for row in rows[-last:])
    speed, size = median("train/tok_per_sec"), rows[-1]["train/micro_batch_size"]
    name = gpu_named(torch.cuda.get_device_name(device)) if device_type == "cuda" else "CPU"
    text = f"{what}: {speed:,.0f} tok/s on {name}, {size} sequences at a time"
    if "train/mfu" in rows[-1]:
        text += f", MFU {median('train/mfu'):.1%} (aim 54%)"
    verdict("ok" if rows[-1].get("train/mfu", 1) > 0.46 else "SLOW", text)
    how = (optimizer, dtype, grad_checkpoint, device_type == "cuda")
    expected = sum(memory_estimate(shape, size, *how).values()) / 1e9
    text = f"{what}: memory_estimate says {expected:.2f} GB"
    if "gpu/memory_allocated_gb" in rows[-1]:
        peak = rows[-1]["gpu/memory_allocated_gb"]
        off = abs(peak / expected - 1) > 0.15
        verdict("SLOW" if off else "ok", f"{text}, the peak was {peak:.2f} GB")
    else:
        print(text)


def hour_steps():
    """Ten steps of batch_size sequences at the speed of a whole run, then it is told to stop."""
    out_dir = os.path.join(scratch, config_name())
    rows = rows_of_run(10, out_dir, signal.SIGTERM, gradient_accumulation_steps=1)
    report_speed(rows, f"steps of {batch_size} x {block_size} tokens", last=5)


def hour_resume():
    """The run of hour_steps goes on where it was stopped."""
    out_dir = os.path.join(scratch, config_name())
    saved = max(map(prepare.step_of, prepare.checkpoints(out_dir)), default=0)
    rows = rows_of_run(2, out_dir, signal.SIGKILL, gradient_accumulation_steps=1)
    steps = [row["step"] for row in rows if "train/loss" in row]
    after = steps[steps.index(saved) + 1 :] if saved in steps else []
    good = saved >= 10 and after[:2] == [saved + 1, saved + 2]
    text = f"a run that was stopped after step {saved} goes on with steps {after}"
    verdict("ok" if good else "WRONG", text)


def hour_whole_steps():
    """Two steps as the config has them, all micro-batches."""
    rows = rows_of_run(2, os.path.join(scratch, f"{config_name()}_whole"), signal.SIGKILL)
    sequences = batch_size * gradient_accumulation_steps
    # the first includes compilation
    report_speed(rows, f"whole steps of {sequences} x {block_size} tokens", last=1)


def hour_profile():
    """Where the time of a step goes, with a few layers, that compile fast."""
    trace(our_step(), os.path.join(scratch, "trace.json"))


def trace(step, path="trace.json"):
    """Three training steps for Perfetto, and the operators that take longest."""
    from torch.profiler import ProfilerActivity, profile

    timed(step)
    with profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device_type == "cuda")
    ) as profiler:
        for _ in range(3):
            timed(step)
    profiler.export_chrome_trace(path)
    cost = lambda event: (
        event.self_device_time_total if device_type == "cuda" else event.self_cpu_time_total
    )
    events = sorted(profiler.key_averages(), key=cost, reverse=True)
    total = sum(map(cost, events))
    print(f"\n{os.path.abspath(path)}: open it in https://ui.perfetto.dev")
    print(f"three steps, {total / 1e6:.2f} s:")
    for event in events[:10]:
        share = f"{cost(event) / total:6.1%} {event.count:8,} x"
        print(f"{cost(event) / 1e6:9.3f} s {share}  {event.key[:80]}")


# -----------------------------------------------------------------------------

if measure.startswith("hour_"):
    globals()[measure]()
    sys.exit()
if measure:
    instrumented_run() if measure == "loop" else take_steps(measure)
    sys.exit()

machine = platform.processor() or platform.machine()
if device_type == "cuda":
    machine = torch.cuda.get_device_name(device)
elif os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo") as f:
        machine = next(
            (line.partition(":")[2].strip() for line in f if line.startswith("model name")), machine
        )
found = filter(importlib.util.find_spec, ("torch", "numpy", "transformers"))
versions = {name: importlib.metadata.version(name) for name in found}
print(
    f"{shape.n_params():,} parameters ({kind}), {flops_per_token(shape):.3g} FLOPs a token, "
    f"{batch_size} x {block_size} tokens; {machine}, {torch.get_num_threads()} threads, {dtype}; "
    + ", ".join(map(" ".join, versions.items()))
)
if "transformers" not in versions:
    print("transformers is not installed, so it is no rival here: pip install transformers")
for part in PARTS:
    if part in asked:
        print(f"\n{part}", flush=True)
        globals()[f"part_{part}"]()
if profile:
    trace(our_step())
if json:
    about = dict(
        date=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        command="python " + " ".join(sys.argv),
        machine=machine,
        device=device,
        dtype=dtype,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        **versions,
        parameters=shape.n_params(),
        batch_size=batch_size,
        config=vars(config),
    )
    with open(json, "w", encoding="utf-8") as f:
        json_lib.dump(about | {"results": results}, f, indent=1)
    print(f"\nkept in {os.path.abspath(json)}")
