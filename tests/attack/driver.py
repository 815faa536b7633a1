"""Kills runs of train.py and prepare.py and starts them again, in a fork for each, see processes.py.

A fork is killed at an event (a file opened for writing, synced, renamed, removed, copied or linked,
an optimizer's step, a request to the Hub), just before or just after it, or after so many
milliseconds of its processor time. Aimed kills are SIGKILL. The others are SIGPROF of a timer,
whose default action is the same: no handler, no clean-up, at any instruction.
"""

import json
import os
import random
import shutil
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import processes

import prepare
import runs
from model import GPT

# Runs first in a fork. `target` is the number of an event, 0 for none.
HOOKS = """
import builtins, io, socket, shutil, signal
import safetensors.torch, torch
target, after, seconds, events_file = {plan}
events = []

def around(owner, name, label=None):
    plain = getattr(owner, name)
    def hooked(*args, **options):
        event = label(*args) if label else name
        if not event:
            return plain(*args, **options)
        events.append(event)
        number = len(events)
        if number == target and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = plain(*args, **options)
        if number == target:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, hooked)

def writes(path, mode="r", *rest):
    return f"open {{os.path.basename(str(path))}}" if set(str(mode)) & set("wax+") else ""

around(builtins, "open", writes)
for name in ("rename", "replace", "link", "unlink", "remove", "rmdir", "mkdir", "fsync"):
    around(os, name)
around(shutil, "copyfile")
around(torch, "save")
around(safetensors.torch, "save_file")
around(torch.optim.AdamW, "step")
around(socket.socket, "sendall")
if seconds:
    signal.setitimer(signal.ITIMER_PROF, seconds)
if events_file:
    import resource
    plain_open = io.open
    def note():
        used = resource.getrusage(resource.RUSAGE_SELF)
        with plain_open(events_file, "w") as f:
            json.dump([events, used.ru_utime + used.ru_stime], f)
    atexit.register(note)
"""
KILLED = (-9, -27)


class Killer(processes.Processes):
    """Runs the same command until it ends, killing it on the way."""

    def __init__(self, cwd, imports=""):
        plain = processes.SERVER
        processes.SERVER = plain.replace("gc.freeze()", f"import runs{imports}\ngc.freeze()")
        try:
            super().__init__(cwd)
        finally:
            processes.SERVER = plain

    def events(self, script, *args, patch=""):
        """(the result, events and processor time) of a run that is not killed."""
        path = str(self.cwd / "events.json")
        result = self.run(script, *args, patch=HOOKS.format(plan=(0, False, 0, path)) + patch)
        assert result.code == 0, result.all[-3000:]
        with open(path) as f:
            return result, *json.load(f)

    def attack(self, rng, events, cpu_s, script, *args, patch=""):
        """One run with a kill at a random event or instant; its result."""
        plan = (rng.randint(1, len(events)), rng.random() < 0.5, 0, "")
        if rng.random() < 0.3:
            plan = (0, False, rng.uniform(0.001, cpu_s), "")
        result = self.run(script, *args, patch=HOOKS.format(plan=plan) + patch)
        result.plan = plan
        if result.code == 1 and "a worker was killed" in result.err:
            return result  # the event came in a process that encodes for another one
        assert result.code in (0, *KILLED), (plan, result.all[-3000:])
        assert "Traceback" not in result.all and "damaged" not in result.all, (plan, result.all)
        return result


# -----------------------------------------------------------------------------
# what must be true at any moment, and at the end


def not_whole(root):
    """What under `root` has a final name and is not whole: checkpoints and data sets."""
    trouble = []
    for directory, names, files in os.walk(root):
        name = os.path.basename(directory)
        if prepare.step_of(directory) or name == "best":
            if not runs.load(directory, trouble.append)[0]:
                trouble.append(directory)
        elif name == "start" and "out" in directory:
            GPT.from_pretrained(directory)
        elif os.path.basename(os.path.dirname(directory)) == "data" and not name.startswith("."):
            trouble += not_whole_data(directory, files)
        names[:] = [n for n in names if not n.startswith(".") and not n.endswith(".partial")]
    return trouble


def not_whole_data(directory, files):
    if "meta.json" not in files:
        return [f"{directory}: no meta.json"]
    trouble = [] if all(map(prepare.IS_FILE, files)) else [f"{directory} holds {files}"]
    prepare.check_content(directory, trouble.append)
    return trouble


def tree(root):
    """The names of all files under a directory."""
    found = []
    for directory, names, files in os.walk(root):
        names.sort()
        found += [os.path.relpath(os.path.join(directory, f), root) for f in sorted(files)]
    return found


def content(root):
    """{name: bytes} of all files under a directory."""
    found = {}
    for name in tree(root):
        path = os.path.join(root, name)
        if os.path.isfile(path):  # no loop of links
            with open(path, "rb") as f:
                found[name] = f.read()
    return found


def measures(run):
    """What a log holds of each step and evaluation: the step and the loss, in order."""
    with open(os.path.join(run, "log.jsonl"), encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    found = {}
    for key in ("train/loss", "val/loss", "val/pass@1", "reward/mean"):
        found[key] = [(row["step"], row[key]) for row in rows if key in row]
    return found


def differences(run, calm):
    """How a run that was killed ended otherwise than one that was not."""
    found = []
    other = (set(tree(run)) ^ set(tree(calm))) - {"samples.txt"}  # made where a step was taken
    if other:
        found.append(f"files: {sorted(other)}")
    for name in sorted(set(tree(calm)) & set(tree(run))):
        if name.endswith((".safetensors", "config.json", "tokenizer.json")):
            with (
                open(os.path.join(run, name), "rb") as a,
                open(os.path.join(calm, name), "rb") as b,
            ):
                if a.read() != b.read():
                    found.append(name)
    mine, other = measures(run), measures(calm)
    found += [f"log: {key}: {mine[key]}" for key in other if mine[key] != other[key]]
    return found


# -----------------------------------------------------------------------------
# the world in which runs are killed

SUMS = [(f"{a}+{b}?", str(a + b)) for a in range(1, 8) for b in range(1, 8) if a + b < 10]
TINY = """--batch_size=4 --eval_iters=1 --log_interval=1 --warmup_iters=1 --dtype=float32
    --compile=False --spike_z=0 --block_size=32 --max_completion=4 --group_size=2""".split()
MODEL = "--n_layer=1 --n_head=2 --n_embd=16 --max_positions=64 --dropout=0.1".split()
STAGES = {
    "pretrain": "--dataset=text --max_iters=8 --eval_interval=2 --sample_interval=3 "
    + " ".join(MODEL),
    "sft": "--stage=sft --dataset=chat --init_from=out/base --max_iters=6 --eval_interval=2",
    "dpo": "--stage=dpo --dataset=prefs --init_from=out/chat --max_iters=6 --eval_interval=2",
    "rlvr": "--stage=rlvr --dataset=sums --init_from=out/chat --max_iters=4 --eval_interval=2 "
    "--checkpoint_interval=1",
}
# prepare.py with parts of a few hundred bytes; the words are the source and keys of prepare()
SMALL_PARTS = """
import sys
import configurator, prepare
sys.excepthook = configurator._print_exception
prepare.BLOCK, prepare.BLOCKS_PER_PART = 400, 2
words = [word.split("=") for word in sys.argv[2:]]
prepare.prepare(sys.argv[1], workers=2, **dict(words))
"""
SOURCES = {
    "text": "text.txt tokenizer=byte",
    "bpe": "text.txt tokenizer=bpe:270",  # encoded in processes
    "char": "one.txt tokenizer=char",
    "chat": "chat.jsonl tokenizer=byte",
    "prefs": "prefs.jsonl",
}


def make_sources(cwd):
    def write(name, records):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (cwd / name).write_text("".join(lines), encoding="utf-8")

    (cwd / "text.txt").write_text("<|endoftext|>".join(f"{q} {a}" for q, a in SUMS * 8))
    (cwd / "one.txt").write_text("The cat sat on the mat. " * 150)
    rows = [(q, a, f"thanks {i}") for i, (q, a) in enumerate(SUMS)]
    chats = [["user", q, "assistant", a, "user", t, "assistant", "ok"] for q, a, t in rows]
    chats = [[dict(role=r, content=c) for r, c in zip(m[::2], m[1::2])] for m in chats]
    write("chat.jsonl", [dict(messages=messages) for messages in chats])
    write("prefs.jsonl", [dict(prompt=q, chosen=a, rejected=f"no {a}") for q, a in SUMS])
    write("sums.jsonl", [dict(question=q, answer=a) for q, a in SUMS])
    (cwd / "small.py").write_text(SMALL_PARTS)


def make_world(killer):
    """data/ and the runs that later stages begin with."""
    cwd = killer.cwd
    make_sources(cwd)
    for file, more in (("text.txt", "--tokenizer=byte"), ("chat.jsonl", "--tokenizer=byte"),
                       ("prefs.jsonl", ""), ("sums.jsonl", "--as=verify")):  # fmt: skip
        killer.finished("prepare.py", file, more, "--val_fraction=0.2")
    base = "--max_iters=2 --eval_interval=2"
    killer.finished("train.py", *TINY, *MODEL, "--dataset=text --out_dir=out/base", base)
    chat = "--stage=sft --dataset=chat --init_from=out/base --out_dir=out/chat"
    killer.finished("train.py", *TINY, chat, base)


def kill_training(killer, stage, rng, kills, more="", patch=""):
    """Kills a run `kills` times at most and lets it end; returns how often it was hit. `more`:
    options of train.py. The run that was never killed is made once."""
    out, key = killer.cwd / "out", f"{stage}{'_'.join(more.split('--'))}".partition("=")[0]
    options, calm = (*TINY, STAGES[stage], more), f"out/calm_{key}"
    if not hasattr(killer, "plans"):
        killer.plans = {}
    if key not in killer.plans:
        _, *killer.plans[key] = killer.events(
            "train.py", *options, f"--out_dir={calm}", patch=patch
        )
    for place in (out, killer.cwd / "backup"):
        shutil.rmtree(place / "run", ignore_errors=True)
    events, cpu_s = killer.plans[key]
    command, hits, history = ("train.py", *options, "--out_dir=out/run"), 0, []
    for _ in range(kills):
        result = killer.attack(rng, events, cpu_s, *command, patch=patch)
        history.append(result.plan)
        trouble = not_whole(out / "run") + not_whole(killer.cwd / "backup")
        assert not trouble, (stage, history, trouble)
        if result.code == 0:
            break
        hits += 1
    result = killer.finished(*command, patch=patch)
    assert "Traceback" not in result.all and "damaged" not in result.all, (history, result.all)
    trouble = differences(out / "run", killer.cwd / calm)
    if "backup_dir" in more and tree(killer.cwd / "backup" / "run") != tree(out / "run"):
        trouble.append(f"backup: {tree(killer.cwd / 'backup' / 'run')}")
    assert not trouble, (stage, history, trouble)
    return hits


def kill_preparation(killer, name, rng, kills, over=""):
    """The same for a preparation; `over`: the source of what it replaces, which must stay whole
    until it is replaced."""
    data, calm = killer.cwd / "data", f"name=calm_{name}"
    if not hasattr(killer, "plans"):
        killer.plans = {}
    script = str(killer.cwd / "small.py")
    if f"prepare {name}" not in killer.plans:
        _, *killer.plans[f"prepare {name}"] = killer.events(script, SOURCES[name], calm)
    for path in (data / "run", data / "run.partial", data / ".run.replaced"):
        shutil.rmtree(path, ignore_errors=True)
    if over:
        killer.finished(script, SOURCES[over], "name=run")
    events, cpu_s = killer.plans[f"prepare {name}"]
    command, hits, history = (script, SOURCES[name], "name=run"), 0, []
    for _ in range(kills):
        result = killer.attack(rng, events, cpu_s, *command)
        history.append(result.plan)
        assert not not_whole(data), (name, history, not_whole(data))
        if result.code == 0:
            break
        hits += 1
    killer.finished(*command)
    run, expected = content(data / "run"), content(data / f"calm_{name}")
    for side in (run, expected):  # the stamp depends on the name
        meta = json.loads(side.pop("meta.json"))
        side["meta"] = {k: v for k, v in meta.items() if k not in ("name", "stamp")}
    assert run == expected, (name, history, run.keys(), expected.keys())
    litter = [n for n in os.listdir(data) if "run" in n and n != "run"]
    assert not litter, (name, history, litter)
    return hits


def seeds(count):
    return [random.Random(i) for i in range(count)]
