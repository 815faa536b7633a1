"""Damages files that the programs read, runs them, and tells how that ended.

A case is (scene, file, damage). A scene is a small directory and a command: resuming a run, starting
one of each later stage, sampling, preparing. It ends well in one of these ways:

    refused   one line on standard error that names the file or its directory, and a code not 0;
              nothing that was there before has changed
    said      the code is 0, and a line that the undamaged run does not print names the file or its
              directory
    equal     the code is 0, and the result is that of the undamaged run
    read      a source or a prompt, which is whatever it holds: the code is 0

Everything else is a failure: another result without a word, a traceback, a hang, a file that is gone.
"""

import gzip
import hashlib
import json
import os
import re
import shutil

import driver
from safetensors.torch import load_file, save_file

from model import tensors_checksum

# ends a process that hangs, and one that takes 6 GB more than it has: neither is a refusal
LIMITS = """
import faulthandler, resource
faulthandler.dump_traceback_later({seconds}, exit=True)
with open("/proc/self/statm") as f:
    used = int(f.read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 30), resource.RLIM_INFINITY))
"""
ABSURD = (-1, 0, 1, 7, 2**31, 2**63, 10**30, 1e308, "", "x", "../../x", None, True, [], [0], {})
ABSURD += (float("nan"), [[]], {"a": 1}, 0.5)


def damaged(rng, kind, path, other):
    """Does one kind of damage to a file; `other` is a file of the same kind from elsewhere."""
    with open(path, "rb") as f:
        data = bytearray(f.read())
    if kind == "cut":
        data = data[: rng.randrange(len(data))] if rng.random() < 0.7 else data[:-1]
    elif kind == "empty":
        data = b""
    elif kind == "bit":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        at = rng.randrange(len(data))
        data[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
    elif kind == "zeros":
        at = rng.randrange(len(data))
        data[at:] = bytes(len(data) - at)
    elif kind == "other":
        shutil.copyfile(other, path)
        return
    elif kind == "json":
        data = json.dumps(absurd(rng, json.loads(data))).encode()
    elif kind == "deep":
        data = b'{"a":' + b"[" * 200_000
    os.remove(path)
    if kind == "directory":
        os.makedirs(os.path.join(path, "inside"))
    elif kind == "loop":
        os.symlink(os.path.basename(path), path)
    elif kind != "gone":
        with open(path, "wb") as f:
            f.write(data)


def absurd(rng, value):
    """A JSON value with one of its keys or items changed or missing."""
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)) and node[key]:
                walk(node[key])

    walk(value)
    # a vocabulary has thousands of places, and what stands beside it a few
    node, key = rng.choice(places[:40] if rng.random() < 0.7 else places)
    if rng.random() < 0.15:
        del node[key]
    else:
        node[key] = rng.choice(ABSURD)
    return value


KINDS = (
    "cut",
    "empty",
    "bit",
    "bit",
    "bit",
    "bytes",
    "zeros",
    "other",
    "directory",
    "loop",
    "gone",
)


def kinds_for(name):
    if name.endswith(".json"):
        return (*KINDS, "json", "json", "json", "json", "deep")
    return KINDS


# -----------------------------------------------------------------------------
# scenes


class Scene:
    """`place`: the directory with all that the command reads; `files`: those that are damaged;
    `result`: the files whose content counts; `free`: what is read is whatever it holds."""

    remakes = False  # the command makes again what is damaged

    def __init__(self, killer, name, files, command, result=(), free=False):
        self.killer, self.name, self.command, self.free = killer, name, command, free
        self.files, self.result, self.others = files, result, {}
        self.place = killer.cwd / name

    def run(self, seconds=180):
        self.killer.cwd, home = self.place.parent / "case", self.killer.cwd
        try:
            script, *options = self.command
            return self.killer.run(script, *options, patch=LIMITS.format(seconds=seconds))
        finally:
            self.killer.cwd = home

    def outcome(self):
        """{name: digest} of what counts: weights, bins, or what was printed."""
        case, found = self.place.parent / "case", {}
        for name in self.result:
            path = case / name
            if path.is_file():
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def begin(self):
        """The result of the undamaged command."""
        self.reset()
        result = self.run()
        assert result.code == 0, result.all
        self.right, self.lines = self.outcome(), set(result.all.splitlines())
        if not self.result:
            self.right = result.out

    def reset(self):
        case = self.place.parent / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(self.place, case, symlinks=True)

    def case(self, rng):
        """One case; how it ended, and what was done."""
        self.reset()
        name = rng.choice(self.files)
        kind = rng.choice(kinds_for(name))
        case = self.place.parent / "case"
        other = self.place / self.others.get(name, f"others/{os.path.basename(name)}")
        if kind == "other" and not other.exists():
            kind = "bit"
        what = f"{self.name}: {name}: {kind}"
        try:
            damaged(rng, kind, str(case / name), other)
        except (IsADirectoryError, ValueError):
            return "equal", what  # nothing in it to damage
        before = driver.content(case)
        result = self.run()
        return self.judge(name, result, before), what + f"\n{result.all[-1500:]}"

    def judge(self, name, result, before):
        case, new = self.place.parent / "case", []
        for line in result.all.splitlines():
            if line not in self.lines:
                new.append(line)
        parts = (name, os.path.basename(name), os.path.dirname(name) or name)
        named = any(part in line for line in new for part in parts)
        after = driver.content(case)
        lost = set(before.values()) - set(after.values())
        lost = [n for n, data in before.items() if data in lost and self.is_kept(n)]
        if self.remakes:
            lost = []
        if "Traceback" in result.all or "Timeout (" in result.all:
            return "TRACEBACK"
        if result.code not in (0, 1):
            return f"CODE {result.code}"
        if result.code == 1:
            if not re.match(r"\w+\.py: ", result.err.strip().splitlines()[-1]):
                return "NOT ONE LINE"
            return "refused" if named and not lost else f"UNNAMED, lost {lost}"
        if lost:
            return f"LOST {lost}"
        if self.free:
            return "read"
        right = self.outcome() == self.right if self.result else result.out == self.right
        if right:
            return "said" if named else "equal"
        return "said" if named else "SILENT"

    @staticmethod
    def is_kept(name):
        """Whether a file is to be there after any command: not what a run itself replaces."""
        return not re.search(
            r"log\.jsonl|samples\.txt|loss\.png|std|/step_|/best/|^data/made", name
        )


def scenes(killer):
    """All scenes, made of the world in killer.cwd."""
    cwd = killer.cwd
    driver.make_world(killer)
    other_world(cwd)
    run = (*driver.TINY, driver.STAGES["pretrain"], "--out_dir=out/run --keep_checkpoints=0")
    killer.finished("train.py", *run, "--max_iters=4")
    sharded(cwd / "out/chat/step_000002", cwd / "model")
    (cwd / "own.py").write_text("# a config of one's own\nlearning_rate = 1e-2\nseed = 7\n")
    (cwd / ".env").write_text("HF_TOKEN=abcdefghijkl\nRUNPOD_API_KEY='x'\n")
    model = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    model += ["tokenizer_config.json"]
    steps = [f"out/run/step_000004/{name}" for name in [*model, "trainer.pt"]]
    bins = ["train.bin", "val.bin", "meta.json", "tokenizer.json", "tokenizer_config.json"]
    masks = ["train.mask", "val.mask"]
    end = "/step_000006/model.safetensors"
    made = []

    def add(name, keep, files, *command, result=(), free=False):
        place = cwd / "scenes" / name
        for path in (*keep, "others"):
            copy = shutil.copytree if (cwd / path).is_dir() else shutil.copy2
            os.makedirs((place / path).parent, exist_ok=True)
            copy(cwd / path, place / path)
        scene = Scene(killer, f"scenes/{name}", files, command, result, free)
        scene.place = place
        scene.begin()
        made.append(scene)

    resume = ["data/text", "out/run", ".env", "own.py"]
    files = steps + [f"data/text/{name}" for name in bins] + [".env"]
    files += ["out/run/log.jsonl", "out/run/samples.txt"]
    add("resume", resume, files, "train.py", *run, "--max_iters=6", result=(f"out/run{end}",))
    fresh = ("--out_dir=out/new --max_iters=2 --eval_interval=2",)
    end = ("out/new/step_000002/model.safetensors",)
    files = [f"data/text/{name}" for name in bins] + ["own.py"]
    pretrain = (*driver.TINY, *driver.MODEL, "--dataset=text", *fresh)
    add("pretrain", ["data/text", "own.py"], files, "train.py", "own.py", *pretrain, result=end)
    files = [f"data/chat/{name}" for name in bins + masks]
    files += [f"out/base/step_000002/{name}" for name in model]
    sft = (*driver.TINY, driver.STAGES["sft"], *fresh)
    add("sft", ["data/chat", "out/base"], files, "train.py", *sft, result=end)
    for stage, name in (("dpo", "prefs"), ("rlvr", "sums")):
        files = [f"data/{name}/{f}" for f in ("train.jsonl", "val.jsonl", "meta.json")]
        options = (*driver.TINY, driver.STAGES[stage], *fresh)
        add(stage, [f"data/{name}", "out/chat"], files, "train.py", *options, result=end)
    files = ["model.safetensors.index.json", "one.safetensors", "two.safetensors"]
    files = [f"model/{name}" for name in files + [n for n in model if "model.s" not in n]]
    sample = "--num_samples=1 --max_new_tokens=8 --temperature=0 --device=cpu"
    add("sample", ["model"], files, "sample.py", "--init_from=model --start=1+1?", sample)
    files = [f"out/chat/step_000002/{name}" for name in model]
    add("run", ["out/chat"], files, "sample.py", "--out_dir=out/chat --start=1+1?", sample)
    files = [f"data/text/{name}" for name in bins]
    again = ("prepare.py", "text.txt --tokenizer=byte --val_fraction=0.2")
    result = ("data/text/train.bin", "data/text/val.bin", "data/text/tokenizer.json")
    add("again", ["data/text", "text.txt"], files, *again, result=result)
    made[-1].remakes = True
    for name, content in sources(cwd).items():
        (cwd / name).write_bytes(content)
        made_of = ("prepare.py", name, "--tokenizer=byte --name=made --val_fraction=0.2")
        add(f"source {name}".replace(" ", "_"), [name], [name], *made_of, free=True)
    (cwd / "in.jsonl").write_text('{"prompt": "1+1?"}\n{"prompt": "2+2?"}\n')
    options = ("--init_from=model --prompts=in.jsonl --out_file=o.jsonl", sample)
    add("prompts", ["model", "in.jsonl"], ["in.jsonl"], "sample.py", *options, free=True)
    return made


def other_world(cwd):
    """others/: files of the same names and sizes, of another seed or source."""
    os.makedirs(cwd / "others")
    for path in (cwd / "out/base/step_000002", cwd / "data/chat", cwd / "data/prefs"):
        for name in os.listdir(path):
            shutil.copy(path / name, cwd / "others" / name)
    tensors = load_file(cwd / "out/base/step_000002/model.safetensors")
    tensors = {name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "crc32": tensors_checksum(tensors)}
    save_file(tensors, cwd / "others/model.safetensors", metadata=metadata)


def sharded(checkpoint, target):
    """A model directory without a trainer.pt, its weights in two files."""
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("trainer.pt", "model.s*"))
    tensors = load_file(checkpoint / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for file, part in (("one", names[::2]), ("two", names[1::2])):
        shard = {name: tensors[name] for name in part}
        metadata = {"format": "pt", "crc32": tensors_checksum(shard)}
        save_file(shard, target / f"{file}.safetensors", metadata=metadata)
        weight_map |= dict.fromkeys(part, f"{file}.safetensors")
    index = dict(metadata=dict(total_size=1), weight_map=weight_map)
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def sources(cwd):
    """{file name: bytes} of small sources, one of each format."""
    import io

    import pyarrow
    import pyarrow.parquet

    texts = [f"The cat number {i} sat on the mat." for i in range(40)]
    lines = "".join(json.dumps(dict(text=text)) + "\n" for text in texts).encode()
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(dict(text=texts)), out)
    zstd = pyarrow.Codec("zstd").compress(lines, asbytes=True)
    return {
        "a.txt": "\n".join(texts).encode(),
        "a.jsonl": lines,
        "a.json": json.dumps([dict(text=text) for text in texts]).encode(),
        "a.csv": ("text,label\n" + "".join(f"{text},1\n" for text in texts)).encode(),
        "a.parquet": out.getvalue(),
        "a.jsonl.gz": gzip.compress(lines, mtime=0),
        "a.jsonl.zst": zstd,
        "c.jsonl": (cwd / "chat.jsonl").read_bytes(),
    }
