"""
What a run leaves behind: where it begins, its log, its checkpoints, their mirrors on the Hub and in
a backup, the model card, and the pod that it runs on.

It knows directories, models and configs, but no batch, no loss and no optimizer step: those are in
train.py. sample.py takes newest_run and model_directory from here.
"""

import concurrent.futures
import contextlib
import filecmp
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
import zipfile

import torch

import prepare
from configurator import UserError, command_line, counted
from model import FOLLOWS, GPT, GPUS, GPTConfig, flops_per_token, gpu_named, recorded_checksum
from prepare import checkpoints, files_of, hidden, step_of

# -----------------------------------------------------------------------------
# where runs and models are

LOG, SAMPLES, PLOT = BESIDE = ("log.jsonl", "samples.txt", "loss.png")
NAMES = r"step_\d{6,}|best|log\.jsonl|samples\.txt|loss\.png"  # a user's are refused


def directory_of(config_files):
    """The out_dir of a run that names none: out/<name of the last config>; out/toy without one."""
    if not config_files:
        return os.path.join("out", "toy")
    return os.path.join("out", os.path.splitext(os.path.basename(config_files[-1]))[0])


def newest_run(parent="out"):
    """The run under `parent` whose checkpoint is the newest."""
    names = os.listdir(parent) if os.path.isdir(parent) else []
    runs = [os.path.join(parent, name) for name in names]
    runs = [run for run in runs if checkpoints(run)]
    if not runs:
        raise UserError(f"{parent}/: no run with a checkpoint yet; python train.py makes one")
    return max(runs, key=lambda run: os.path.getmtime(checkpoints(run)[-1]))


def model_directory(where):
    """The directory of the model that `where` names: a model directory, the newest checkpoint of a
    run's directory, or a Hub id, which is fetched."""
    if os.path.exists(os.path.join(where, "config.json")):
        warn_of_changes(where)
        return where
    if os.path.isdir(where):
        if not checkpoints(where):
            raise UserError(f"{where}: neither a model directory (config.json) nor a run (step_*)")
        warn_of_changes(checkpoints(where)[-1])
        return checkpoints(where)[-1]
    if where == directory_of([]):
        raise UserError(f"{where}: no such run yet; python train.py comes first, and makes it")
    config = os.path.join("config", f"{os.path.basename(where)}.py")
    is_config = os.path.exists(os.path.join(os.path.dirname(os.path.abspath(__file__)), config))
    if where == directory_of([config]) and is_config:
        raise UserError(f"{where}: no such run yet; python train.py {config} comes first")
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", where)
    if not is_id or where.startswith((".", "out/", "data/")):
        raise UserError(f"{where}: no such directory, and no id of a model on the Hub (owner/name)")
    return prepare.fetch_model(where)


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


# -----------------------------------------------------------------------------
# directories: only what a run wrote is removed or replaced. prepare.py has the rules.


def is_checkpoint(directory):
    """Whether a run wrote this directory as a checkpoint. A user may have put files in it since:
    prepare.ours says whether it may be removed."""
    return prepare.kind_of_directory(directory) == "checkpoint"


def whole_checkpoints(run):
    return [path for path in checkpoints(run) if is_checkpoint(path)]


def size_of(directory):
    return sum(map(os.path.getsize, files_of(directory).values()))


def same_files(a, b, skip=()):
    """Whether two directories hold the same model or checkpoint, byte for byte."""
    a, b = files_of(a, skip), files_of(b, skip)
    if a.keys() != b.keys() or any(os.path.getsize(a[f]) != os.path.getsize(b[f]) for f in a):
        return False
    return all(os.path.samefile(a[f], b[f]) or filecmp.cmp(a[f], b[f], shallow=False) for f in a)


def is_run(directory):
    """Whether a run has begun in this directory. UserError if something else has a name there that
    a run needs: it is a user's, and nothing of it is touched."""
    if checkpoints(directory) or Log(directory).rows():
        return True
    if not os.path.lexists(directory):
        return False
    another = "choose another --out_dir or --backup_dir"
    if not os.path.isdir(directory):
        raise UserError(f"{directory} exists, and is not a directory; {another}")
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        left_by_full_disk = os.path.isfile(path) and os.path.getsize(path) == 0
        if re.fullmatch(NAMES, name) and not left_by_full_disk:
            reason = f"{directory} holds {name}, but no run: a run would replace it"
            raise UserError(f"{reason}; {another}, or move it away")
    return False


@contextlib.contextmanager
def written_whole(target):
    """Gives a directory to write in. It gets the name `target` once all of it is on the disk, or
    after an error is removed. What has the name and holds a user's files is set aside."""
    beside = hidden("writing", target)
    try:
        prepare.remove_directory(beside, "checkpoint")
        os.makedirs(beside, exist_ok=True)
        yield beside
        if os.path.lexists(target) and not prepare.ours(target):
            set_aside(target)
        prepare.publish(beside, target)
    except BaseException:
        prepare.remove_directory(beside, "checkpoint")
        raise


def copy_directory(source, target, skip=(), link=False):
    """Copies a model or checkpoint, whole or not at all. `link`: as hard links, which cost no
    space, where the file system has them."""
    with written_whole(target) as beside:
        for name, path in files_of(source, skip).items():
            copy = os.path.join(beside, name)
            if link:
                with contextlib.suppress(OSError):
                    os.link(os.path.realpath(path), copy)
            if not os.path.exists(copy):
                shutil.copyfile(path, copy)


def remove_checkpoint(directory):
    deleting = hidden("deleting", directory)
    if os.path.exists(deleting):
        prepare.remove_directory(deleting, "checkpoint")
    os.rename(directory, deleting)
    prepare.remove_directory(deleting, "checkpoint")


def clean(directory):
    """Ends or undoes what a process that was killed had begun in a run's directory or backup."""
    name = r"(step_\d{6,}|best|start)"
    for entry in os.listdir(directory) if os.path.isdir(directory) else []:
        # .part: as copies were called before
        if re.fullmatch(rf"(\.(writing|deleting)\.)+{name}|\.(\.writing\.)?{name}\.part", entry):
            prepare.remove_directory(os.path.join(directory, entry), "checkpoint")
        replaced = re.fullmatch(rf"\.{name}\.replaced", entry)
        if replaced:
            prepare.restore(os.path.join(directory, replaced[1]), "checkpoint")


def set_aside(path):
    """Renames a file or directory to the first free name path~1, path~2, ...; returns that name."""
    path, number = os.path.normpath(path), 1
    while os.path.lexists(f"{path}~{number}"):
        number += 1
    os.rename(path, f"{path}~{number}")
    return f"{path}~{number}"


# -----------------------------------------------------------------------------
# where a run begins


def backup_of(config):
    """The directory in backup_dir that mirrors this run; '' without backup_dir."""
    if not config["backup_dir"]:
        return ""
    return os.path.join(config["backup_dir"], os.path.basename(os.path.abspath(config["out_dir"])))


def check(config, world_size=1):
    """UserError, before anything is loaded, for places that can't be right, and for a step that the
    processes can't share."""
    out_dir, hf_repo, backup_dir = config["out_dir"], config["hf_repo"], config["backup_dir"]
    for key, value in config.items():  # a config is printed, logged, and kept in checkpoints
        if isinstance(value, str) and prepare.without_secrets(value) != value:
            raise UserError(f"{key}: its value is a secret of the environment; leave it out")
    sequences = config["batch_size"] * config["gradient_accumulation_steps"]
    if sequences % world_size:
        raise UserError(
            f"batch_size * gradient_accumulation_steps = {sequences} sequences a step can't be "
            f"shared among {world_size} processes; make it a multiple of {world_size}"
        )
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
        raise UserError(f"out_dir={out_dir!r}: not a directory; choose another --out_dir")
    later = config["stage"] != "pretrain" and config["init_from"].startswith(("out/", "./", "../"))
    begun = checkpoints(out_dir) or checkpoints(backup_of(config))
    if later and not begun and not config["dry_run"] and not os.path.isdir(config["init_from"]):
        model_directory(config["init_from"])  # says what comes first, before data is prepared
    if config["stage"] == "distill" and not config["teacher"]:
        where = "--teacher=RUN, a model directory or a Hub id"
        raise UserError(f"teacher='': stage='distill' learns from a model: {where}")
    if hf_repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", hf_repo):
        raise UserError(f"hf_repo={hf_repo!r}: expected the id of a Hub repository, owner/name")
    if not backup_dir:
        return
    mount = os.path.dirname(os.path.abspath(backup_dir))
    if not os.path.isdir(mount):
        raise UserError(f"backup_dir={backup_dir!r}: {mount} does not exist; mount the drive first")
    if os.path.exists(backup_dir) and not os.path.isdir(backup_dir):
        raise UserError(f"backup_dir={backup_dir!r}: not a directory")
    if os.path.realpath(backup_of(config)) == os.path.realpath(out_dir):
        raise UserError(f"backup_dir={backup_dir!r}: the backup would be out_dir itself")


def load(checkpoint, say):
    """(model, trainer state) of a checkpoint; (None, None) if it is damaged, and says so."""
    path = os.path.join(checkpoint, "trainer.pt")
    try:
        with zipfile.ZipFile(path) as records:  # torch.load does not compare their checksums
            damaged = records.testzip()
        if damaged:
            raise UserError(f"trainer.pt: the CRC-32 of {damaged} differs")
        state = of_today(torch.load(path, map_location="cpu", weights_only=True))
        check_files(checkpoint, state.get("crc32"), say)
        prepare.load_tokenizer(checkpoint)
        return GPT.from_pretrained(checkpoint), state
    except MemoryError:  # the checkpoint is not to blame
        raise
    except Exception as e:
        say(f"warning: {checkpoint} is damaged and passed over: {first_line(e)}")
        return None, None


def checksums_of(checkpoint):
    """{name: CRC-32} of what trainer.pt stands for: the tensors of the weights, and small files."""
    small = files_of(checkpoint, skip=("trainer.pt", "model.safetensors"))
    checksums = {name: prepare.checksum(path) for name, path in small.items()}
    return checksums | {"model.safetensors": recorded_checksum(checkpoint)}


def check_files(checkpoint, recorded, say):
    """UserError where a file of a checkpoint is missing, or another than trainer.pt recorded.
    GPT.from_pretrained compares the weights with the checksum in their file."""
    if recorded is None:
        return say(f"{checkpoint}: an older version wrote it, without checksums of its weights")
    there = checksums_of(checkpoint)
    for name, crc in recorded.items():
        if there.get(name) != crc:
            raise UserError(f"{name} is missing, or not the one that was written (CRC-32)")


def warn_of_changes(directory):
    """A warning where a checkpoint that is used as a model has files that were changed since, which
    may be meant, or damage. Without a trainer.pt that can be read nothing is known."""
    try:
        path = os.path.join(directory, "trainer.pt")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check_files(directory, state.get("crc32", {}), print)
    except UserError as e:
        warnings.warn(f"{directory}: {e}", stacklevel=3)
    except Exception:  # no checkpoint; or trainer.pt is damaged, which only a resume reads
        return


def of_today(state):
    """The trainer state of a checkpoint, converted if it was written before train.py kept its
    counters together."""
    if "run" in state:
        return state
    counters = ("step", "position", "train_s", "wall_s", "rollbacks", "skipped")
    run = {name: state[name] for name in counters if name in state}
    run["tokens"] = state["tokens_seen"]
    run["recent"] = [tuple(pair) for pair in state["recent"]]
    best = state["best_val"]
    if not math.isnan(best):  # NaN: there was no evaluation yet
        is_rlvr = state["config"]["stage"] == "rlvr"
        run["best"] = [best, -math.inf] if is_rlvr else [-best]
    rng = {"cpu": state["rng"], "cuda": state["cuda_rng"]}
    kept = {key: state[key] for key in ("config", "fingerprint", "optimizers", "scaler")}
    return kept | {"run": run, "rng": rng}


def is_typed(key, setup):
    """Whether a key was given on the command line: an order. In a config it is a default."""
    return setup.given.get(key) == "command line"


def remedy(config, setup):
    """What to do where out_dir's run can't go on. To start over from scratch is no help to
    somebody who typed where the weights are to come from."""
    if is_typed("init_from", setup) and config["init_from"] not in ("scratch", "resume"):
        return "choose another --out_dir"
    return "choose another --out_dir, or --init_from=scratch to set the old run aside"


def leaves_the_run_alone(config, setup):
    """--init_from=scratch starts over; with --eval_only --init_from names a model to measure."""
    if not is_typed("init_from", setup) or config["init_from"] == "resume":
        return False
    return config["eval_only"] or config["init_from"] == "scratch"


def restore_backup(config, setup, say):
    """Where out_dir holds no run, on a machine that was replaced: the backup is copied back, with
    its newest whole checkpoint. That comes last: a restore that is killed begins again."""
    out_dir, backup = config["out_dir"], backup_of(config)
    if leaves_the_run_alone(config, setup) or not checkpoints(backup) or checkpoints(out_dir):
        return
    try:
        clean(backup)
        is_run(out_dir)
        os.makedirs(out_dir, exist_ok=True)
        prepare.copy_files(backup, out_dir, BESIDE)
        for name in ("best", "start"):
            source, target = os.path.join(backup, name), os.path.join(out_dir, name)
            if os.path.isdir(source) and not os.path.exists(target):
                copy_directory(source, target)
        for checkpoint in reversed(checkpoints(backup)):
            if load(checkpoint, say)[0]:
                copy_directory(checkpoint, os.path.join(out_dir, os.path.basename(checkpoint)))
                return say(f"{out_dir} held no run: {checkpoint} is copied back")
    except OSError as e:
        raise UserError(f"{backup} can't be copied back to {out_dir}: {first_line(e)}") from None
    raise UserError(f"{backup}: no checkpoint is whole; {remedy(config, setup)}")


def find(config, setup, say):
    """Where a run begins, the one place that knows what init_from means. A namespace:

    `checkpoint`, `model`, `state`: of the newest whole checkpoint in out_dir; None for a new run;
    `init_from`: "scratch", or where a new run takes its weights from; of a resumed run, where it
        once took them;
    `start_over`: --init_from=scratch was typed, so an old run in out_dir is to be set aside;
    `seen`: the checkpoints in out_dir; `damaged`: those newer than `checkpoint`, unreadable.
    """
    out_dir, init_from = config["out_dir"], config["init_from"]
    start = types.SimpleNamespace(checkpoint=None, model=None, state=None, damaged=[])
    start.start_over = is_typed("init_from", setup) and init_from == "scratch"
    if start.start_over:  # from where the config says: in a later stage it names a model
        init_from = setup.from_files.get("init_from", "scratch")
    start.init_from = init_from
    start.seen = checkpoints(out_dir)
    saved = [] if leaves_the_run_alone(config, setup) else start.seen
    for checkpoint in reversed(saved):
        start.model, start.state = load(checkpoint, say)
        if start.state:
            start.checkpoint = checkpoint
            start.init_from = start.state["config"]["init_from"]
            return start
        start.damaged.append(checkpoint)
    if saved:
        raise UserError(f"{out_dir}: no checkpoint is whole; {remedy(config, setup)}")
    if init_from == "resume":
        raise UserError(f"{out_dir}: no run to resume; leave out --init_from=resume to start one")
    if config["stage"] not in ("pretrain", "sft") and init_from == "scratch":
        where = "--init_from=RUN, a model directory or a Hub id"
        raise UserError(f"stage={config['stage']!r} starts from a model: {where}")
    if init_from != "scratch":
        start.checkpoint = model_directory(init_from)
    return start


def began_with(key, config, setup, start):
    """The value of a key that a run keeps for its whole life, such as dtype, unless another is
    typed: recorded in its checkpoints, and before the first one in its log."""
    if is_typed(key, setup) or start.start_over:
        return config[key]
    if start.state:
        return start.state["config"].get(key, config[key])
    if start.init_from != config["init_from"] or config["eval_only"]:
        return config[key]
    rows = Log(config["out_dir"]).rows()
    configs = [row["config"] for row in rows if isinstance(row.get("config"), dict)]
    return configs[-1].get(key, config[key]) if configs else config[key]


def shape_of(config, setup):
    """The GPTConfig of the model that a run would train, for --dry_run: of the keys, or of the
    model that init_from names, unless a config or the command line says its width."""
    keys = {key: config[key] for key in GPTConfig.__dataclass_fields__}
    where = config["init_from"]
    if where in ("scratch", "resume") or "n_embd" in setup.given:
        vocab_size = config["vocab_size"] or prepare.vocab_size_of(config)
        return GPTConfig(**keys | {"vocab_size": vocab_size})
    if not os.path.isdir(where):
        advice = "put the config of the run that makes it before this one, or fetch it"
        raise UserError(f"init_from={where!r}: --dry_run asks this model for its shape; {advice}")
    shape = GPT.from_pretrained(model_directory(where)).config
    shape.block_size = min(config["block_size"], shape.max_positions)
    return shape


def price_of(gpu, config, setup):
    """Dollars an hour for --dry_run; 0: the table's. What a config says is the price of its own GPU
    and not of another one, which is typed."""
    is_another = is_typed("gpu", setup) and gpu != setup.from_files.get("gpu")
    if is_another and not is_typed("gpu_cost_per_hour", setup):
        return 0.0
    return config["gpu_cost_per_hour"]


def open_model(start, config, setup, data, say):
    """The model that training continues or begins with. UserError where out_dir holds a run with
    another model or other data, or where the weights contradict what was asked for."""
    keys = {key: config[key] for key in GPTConfig.__dataclass_fields__}
    if start.init_from == "scratch":
        asked = vars(GPTConfig(**keys | {"vocab_size": config["vocab_size"] or data.vocab_size}))
    else:  # the weights bring their shape; only what was asked for explicitly can contradict it
        follows = {key for key in FOLLOWS if keys[key] == 0}
        ignored = follows | {"init", "init_std", "unit_embed", "scale_residual"}
        asked = {key: keys[key] for key in keys if key in setup.given and key not in ignored}
    if start.state:
        refuse_another_run(start, config, setup, asked, data.fingerprint)
        say(f"{'evaluating' if config['eval_only'] else 'resuming'} {start.checkpoint}")
        say_what_changed(start.state["config"], config, set(setup.keys) - set(keys), say)
        return start.model
    if start.init_from == "scratch":
        if config["stage"] == "sft":
            say("warning: stage='sft' from random weights; --init_from= names a model")
        torch.manual_seed(config["seed"])
        return GPT(GPTConfig(**asked))
    return model_to_continue(start, config, asked, data, say)


def model_to_continue(start, config, asked, data, say):
    """The model that init_from names, with as many rows as the data has chat tokens."""
    where, directory, block_size = start.init_from, start.checkpoint, config["block_size"]
    model = GPT.from_pretrained(directory)
    found = vars(model.config)
    for key, value in asked.items():
        if value != found[key] and key not in ("block_size", "dropout"):
            raise UserError(
                f"{key}={value!r} was asked for, the model in {where} has {found[key]!r}"
            )
    if block_size > found["max_positions"]:
        limit = f"max_positions={found['max_positions']}"
        shorter = f"set --block_size={found['max_positions']} or less"
        raise UserError(f"block_size={block_size} is beyond the {limit} of {where}; {shorter}")
    model.set_runtime(block_size, config["dropout"])
    say(f"weights from {directory}")
    has_tokenizer = os.path.exists(os.path.join(directory, "tokenizer.json"))
    if has_tokenizer and not data.tokenizer.agrees(prepare.load_tokenizer(directory)):
        differs = f"{config['dataset']} was made with another tokenizer than {where}"
        raise UserError(f"{differs}; prepare it with --tokenizer={directory}")
    missing = data.vocab_size - model.config.vocab_size
    if missing > 0 and config["stage"] != "pretrain":
        say(f"the model grows rows for {counted(missing, 'chat token')}")
        model.grow(data.vocab_size)
    return model


def say_what_changed(before, config, keys, say):
    keys = keys - {"init_from", "eval_only", "dtype"}
    keys = [key for key in config if key in keys and before.get(key, config[key]) != config[key]]
    if keys:
        changes = ", ".join(f"{key} {before[key]!r} -> {config[key]!r}" for key in keys)
        say(f"changed since: {changes}")


def refuse_another_run(start, config, setup, asked, fingerprint):
    """A run goes on only with the same stage, data and model."""
    before, out_dir = start.state["config"], config["out_dir"]
    same = {key: config[key] for key in ("stage", "dataset", "seed", "doc_mask", "optimizer")}
    same |= asked
    if is_typed("init_from", setup) and config["init_from"] != "resume":
        same["init_from"] = config["init_from"]
    for key, value in same.items():
        if before.get(key, value) != value:
            differs = f"{key}={before[key]!r}, this one asks for {value!r}"
            raise UserError(f"{out_dir} holds a run with {differs}; {remedy(config, setup)}")
    # an older run has recorded less
    if any(old != new for old, new in zip(start.state["fingerprint"], fingerprint)):
        changed = f"{config['dataset']}: the data changed since the run in {out_dir} began"
        raise UserError(f"{changed}; put it back, or {remedy(config, setup)}")


def claim(config, start, say):
    """All checks are passed: locks out_dir for this process, sets an old run aside, cleans up
    after a run that was killed, and keeps the model that a later stage begins with."""
    out_dir, backup = config["out_dir"], backup_of(config)
    try:
        # the backup first: if this is killed in between, the same command does the rest
        old_runs = [place for place in (backup, out_dir) if place and is_run(place)]
        os.makedirs(out_dir, exist_ok=True)
        lock(out_dir)
        if start.start_over:
            for old in old_runs:
                refuse_to_move(old, config)
            for old in old_runs:
                say(f"the run in {old} is set aside as {set_aside(old)}")
            if not os.path.exists(out_dir):
                os.makedirs(out_dir)
                lock(out_dir)
        elif checkpoints(out_dir) != start.seen:
            raise UserError(f"{out_dir}: another training went on in it just now; try again")
        for path in start.damaged:  # under its name, rotation would take it for the newest
            if os.path.exists(path + ".damaged"):
                set_aside(path + ".damaged")
            os.rename(path, path + ".damaged")
        for place in (out_dir, backup):
            clean(place)
        if config["stage"] in ("dpo", "rlvr"):
            keep_first_model(out_dir, first_model(config, start), say)
        tempfile.TemporaryFile(dir=out_dir).close()  # now, and not after hours of training
    except OSError as e:
        raise UserError(f"out_dir={out_dir!r} can't be written: {first_line(e)}") from None


def refuse_to_move(directory, config):
    """UserError if more than a run would be set aside with a directory."""
    for inside in (os.getcwd(), config["data_dir"], os.path.dirname(os.path.abspath(__file__))):
        if (os.path.realpath(inside) + os.sep).startswith(os.path.realpath(directory) + os.sep):
            reason = f"{directory} holds {inside}, so it can't be set aside"
            raise UserError(f"{reason}; choose another --out_dir")


def lock(out_dir):
    """UserError if another process trains in out_dir: both would delete checkpoints there."""
    prepare.lock(out_dir, "another training is under way in it; choose another --out_dir")


def first_model(config, start):
    """The directory of the model that a later stage began with: out_dir/start of a resumed run."""
    kept = os.path.join(config["out_dir"], "start")
    if not start.state:
        return start.checkpoint
    if os.path.isfile(os.path.join(kept, "config.json")):
        return kept
    before = start.state["config"]  # made before start/ was: it recorded where that model was
    source = before.get("start_directory", start.init_from)
    try:
        source = model_directory(source)
        if before.get("start_weights") not in (None, prepare.weights_hash(source)):
            raise UserError("it holds another model by now")
    except UserError as e:
        gone = f"{source}: the model that this run began with is no longer there"
        raise UserError(f"{gone}; put it back, or choose another --out_dir ({e})") from None
    return source


def keep_first_model(out_dir, source, say):
    """out_dir/start: the model that a later stage began with, which stays whatever becomes of the
    run that it comes from."""
    kept, skip = os.path.join(out_dir, "start"), ("trainer.pt",)
    if os.path.realpath(source) == os.path.realpath(kept):
        return
    if os.path.lexists(kept):  # of a run that ended before its first checkpoint, or a user's
        if same_files(source, kept, skip):
            return
        say(f"{kept} is not the model that this run begins with: set aside as {set_aside(kept)}")
    copy_directory(source, kept, skip, link=True)


def frozen(key, where, data, device):
    """A model beside the one that is trained, such as a reference model: with as many rows for
    chat tokens, and without gradients. UserError if it has another tokenizer than the data; `key`
    is the key that names it."""
    directory = model_directory(where)
    tokenizer = prepare.load_tokenizer(directory)
    if not data.tokenizer.agrees(tokenizer):
        differs = f"{key}={where!r} has another tokenizer ({tokenizer.name})"
        raise UserError(f"{differs} than the model that is trained ({data.tokenizer.name})")
    model = GPT.from_pretrained(directory)
    if model.config.vocab_size < data.vocab_size:
        model.grow(data.vocab_size)
    return model.to(device).eval().requires_grad_(False)


def frozen_teacher(config, model, data, device):
    """The teacher of stage='distill'; UserError if `model` can't learn from it."""
    where, student = f"teacher={config['teacher']!r}", f"init_from={config['init_from']!r}"
    teacher = frozen("teacher", config["teacher"], data, device)
    has, wants = teacher.config, model.config
    if has.vocab_size != wants.vocab_size or has.max_positions < wants.block_size:
        raise UserError(
            f"{where} (vocab_size={has.vocab_size}, max_positions={has.max_positions}) does not "
            f"fit {student} (vocab_size={wants.vocab_size}, block_size={wants.block_size}): "
            "expected the same vocabulary, and as many positions"
        )
    weights, others = model.state_dict(), teacher.state_dict()
    same = weights.keys() == others.keys() and not config["eval_only"]
    if same and all(torch.equal(weights[name], others[name]) for name in weights):
        raise UserError(f"{where} and {student} are the same model; name another teacher")
    return teacher


def rng_state(device):
    """The state of torch's generators, which draw dropout masks."""
    cuda = torch.cuda.get_rng_state() if device.startswith("cuda") else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.startswith("cuda") and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


# -----------------------------------------------------------------------------
# log


def column(rows, key):
    """[(step, value)] of the rows of a log that have a number under this key."""
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]


def smoothed(points):
    """[(step, mean)]: each value becomes the mean of those around it, a tenth of all."""
    reach, values = len(points) // 20, [value for _, value in points]
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [(step, sum(w) / len(w)) for (step, _), w in zip(points, windows)]


def limits_of(*curves):
    """The lowest and the highest value of a plot, without the fall of the first tenth: it would
    press the rest of the curve flat."""
    points = [point for curve in curves for point in curve]
    last = max([step for step, _ in points], default=0)
    values = [value for step, value in points if step > last / 10]
    if not values or min(values) == max(values):
        return None, None  # what matplotlib finds
    margin = 0.05 * (max(values) - min(values))
    return min(values) - margin, max(values) + margin


def replace_text(path, text):
    with open(path + ".part", "w", encoding="utf-8", errors="replace", newline="") as f:
        f.write(text)
    os.replace(path + ".part", path)


class Log:
    """log.jsonl, samples.txt, W&B, TensorBoard, the progress bar, the plot, and what is printed.
    Nothing in here ever stops a run. On any but the master process it does nothing."""

    def __init__(self, out_dir, master=True):
        self.out_dir, self.master = out_dir, master
        self.path = os.path.join(out_dir, LOG)
        self.wandb_run = self.board = self.bar = None
        self.warned = set()  # the kinds of trouble that were reported: each is once
        self.lock = threading.Lock()  # mirrors and the writer of checkpoints log, too

    def say(self, text):
        """Prints above the progress bar, without secrets."""
        if not self.master:
            return
        text = prepare.without_secrets(text)
        if self.bar:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def warn_once(self, kind, text):
        if kind not in self.warned:
            self.say(f"warning: {text}")
        self.warned.add(kind)

    @contextlib.contextmanager
    def optional(self, kind, what):
        """What fails in here is reported once of its kind, and training goes on."""
        try:
            yield
        except Exception as e:
            self.warn_once(kind, f"{what}: {first_line(e)}; training goes on")

    def rows(self):
        """The rows of log.jsonl, without damaged lines, such as one that a full disk cut short."""
        try:
            with open(self.path, encoding="utf-8", errors="replace") as f:
                lines = f.readlines()
        except OSError:
            return []
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
        return rows

    def done(self, step, best, score_of):
        """By the log, what a run resumed at `step` has done: the last steps evaluated and sampled,
        the best step and its score. trainer.pt, written before the evaluation of its own step,
        knows less."""
        evaluated, sampled, best_step = -1, -1, 0
        for row in self.rows():
            if row["step"] > step:
                continue
            if row.get("event") == "sample":
                sampled = row["step"]
            # TypeError: null stands for a number that was not finite
            with contextlib.suppress(KeyError, TypeError):
                score = score_of(row)
                evaluated = row["step"]
                if row["step"] > 0 and score >= best:
                    best, best_step = score, row["step"]
        return evaluated, sampled, best_step, best

    def start(self, config, step, resumed, left_out):
        """Cuts log and samples back to the step where the run begins, and starts the loggers."""
        if not self.master:
            return
        with self.optional("log", self.path):
            self._cut_back(step if resumed else -1)
        self.wandb_run = self._start_wandb(config) if config["wandb_log"] else None
        self.board = self._start_tensorboard(step) if config["tensorboard"] else None
        more = {"left_out": left_out} if left_out else {}
        self(step, {"event": "resume" if resumed else "start", "config": config, **more})

    def _cut_back(self, step):
        """Drops rows and samples of later steps: they will be taken again."""
        if os.path.exists(self.path):
            rows = self.rows()
            if not rows and os.path.getsize(self.path):
                aside = set_aside(self.path)
                self.say(f"{self.path} is no log of a run; it is set aside as {aside}")
            else:
                kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= step]
                replace_text(self.path, "".join(kept))
        samples = os.path.join(self.out_dir, SAMPLES)
        if os.path.exists(samples):
            with open(samples, encoding="utf-8", errors="replace", newline="") as f:
                text = f.read()
            head, *parts = re.split(r"^(?=--- step \d{1,15} ---$)", text, flags=re.MULTILINE)
            kept = [part for part in parts if int(part.split()[2]) <= step]
            if len(kept) < len(parts):
                replace_text(samples, head + "".join(kept))

    def __call__(self, step, row):
        """A row of log.jsonl, and if it is no event of W&B and TensorBoard where they run."""
        if not self.master:
            return
        in_json = {"step": step} | row
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                in_json[key] = None  # JSON has no word for such a number
        with self.optional("log", self.path):
            line = prepare.without_secrets(json.dumps(in_json)) + "\n"
            with self.lock, open(self.path, "a", encoding="utf-8") as f:
                f.write(line)
        if "event" in row:  # an upload's step is past by then, and W&B refuses steps out of order
            return
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        try:
            if self.wandb_run:
                self.wandb_run.log(numbers, step=step)
            if self.board:
                for key, value in numbers.items():
                    self.board.add_scalar(key, value, step)
        except Exception as e:
            self.wandb_run = self.board = None
            self.say(f"warning: W&B or TensorBoard failed, and get no more rows: {first_line(e)}")

    def sample(self, step, text):
        """Adds a text that the model wrote to samples.txt and the log."""
        self(step, {"event": "sample", "text": text})
        path = os.path.join(self.out_dir, SAMPLES)
        with (
            self.optional("samples", path),
            open(path, "a", encoding="utf-8", errors="replace") as f,
        ):
            f.write(f"--- step {step} ---\n{text}\n")

    def _start_wandb(self, config):
        """A W&B run, online or else offline; None, with a warning, where W&B does not work."""
        with self.optional("wandb", "W&B can't be used"):
            import wandb

            name = config["wandb_run_name"] or os.path.basename(os.path.abspath(self.out_dir))
            options = {"project": config["wandb_project"], "name": name}
            options |= {"config": config, "dir": self.out_dir}
            settings = {"silent": True, "init_timeout": 20}
            if "finish_timeout" in wandb.Settings.model_fields:
                settings["finish_timeout"] = 120  # a server that is gone must not cost hours
            options["settings"] = wandb.Settings(**settings)
            trouble = "not logged in to W&B (wandb login)"
            try:
                has_key = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")
                if has_key or wandb.api.api_key:
                    return wandb.init(**options)
            except Exception as e:
                trouble = f"W&B did not start: {first_line(e)}"
            self.say(f"warning: {trouble}; so it logs offline, and wandb sync uploads it later")
            return wandb.init(**options, mode="offline")

    def _start_tensorboard(self, step):
        with self.optional("tensorboard", "TensorBoard can't be used (pip install tensorboard)"):
            from torch.utils.tensorboard import SummaryWriter

            return SummaryWriter(os.path.join(self.out_dir, "tensorboard"), purge_step=step)

    def start_bar(self, total, step):
        if self.master and sys.stdout and sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True)

    def progress(self, step, text=""):
        """Moves the bar; `text` stands beside it, or without a bar on a line of its own."""
        if self.bar:
            self.bar.update(step - self.bar.n)
            if text:
                self.bar.set_description_str(text.partition(" | ")[2])
        elif text:
            self.say(text)

    def close_bar(self):
        if self.bar:
            self.bar.close()
        self.bar = None

    def plot(self):
        """out_dir/loss.png: training and held-out loss, and the learning rate."""
        if not self.master:
            return
        path = os.path.join(self.out_dir, PLOT)
        with self.optional("plot", path):
            from matplotlib.figure import Figure

            rows, title = self.rows(), self.out_dir
            if column(rows, "val/bpb"):
                title += ": val/bpb {1:.4f} after {0:,} steps".format(*column(rows, "val/bpb")[-1])
            train, val = column(rows, "train/loss"), column(rows, "val/loss")
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            loss = figure.add_subplot(xlabel="step", ylabel="loss", title=title)
            lr = loss.twinx()
            lr.set_ylabel("learning rate")
            for axes, points, style in (
                (lr, column(rows, "train/lr"), {"color": "gray", "label": "train/lr"}),
                (loss, train, {"color": "C0", "alpha": 0.3}),
                (loss, smoothed(train), {"color": "C0", "label": "train/loss, smoothed"}),
                (loss, val, {"color": "C1", "marker": "o", "ls": "", "label": "val/loss"}),
            ):
                axes.plot([x for x, _ in points], [y for _, y in points], lw=1, **style)
            loss.set_ylim(limits_of(train, val))
            loss.legend(handles=[*loss.lines[1:], *lr.lines])
            figure.savefig(path, dpi=120)

    def close(self):
        self.close_bar()
        with self.optional("close", "W&B or TensorBoard could not be closed"):
            if self.wandb_run:
                self.wandb_run.finish()
            if self.board:
                self.board.close()
        self.wandb_run = self.board = None


class Meter:
    """Speed, memory and cost of a run, for the log: since the last row, and in all."""

    def __init__(self, run, model, config, max_steps, device, world_size):
        self.cost_per_hour, self.device = config["gpu_cost_per_hour"], device
        self.max_steps, self.time_budget = max_steps, config["time_budget"]
        self.flops, self.peak = flops_per_token(model), 0  # 0: not known, and no MFU
        if device.startswith("cuda"):
            gpu = gpu_named(torch.cuda.get_device_name(device))
            self.peak = GPUS[gpu][0] * world_size if gpu else 0
        self.mark(run)

    def mark(self, run):
        self.step, self.tokens, self.train_s = run.step, run.tokens, run.train_s

    def steps_left(self, run, step_s):
        """Steps that are still to come, if each takes step_s seconds."""
        steps = self.max_steps - run.step
        if self.time_budget:
            seconds = max(0.0, self.time_budget - run.train_s)
            steps = min(steps, seconds / max(step_s, 1e-9))
        return steps

    def row(self, run):
        seconds = max(run.train_s - self.train_s, 1e-9)
        speed = (run.tokens - self.tokens) / seconds
        step_s = seconds / max(run.step - self.step, 1)
        hours_left = self.steps_left(run, step_s) * step_s / 3600
        self.mark(run)
        row = {"train/tok_per_sec": speed, "cost/eta_hours": hours_left}
        if self.peak:
            row["train/mfu"] = speed * self.flops / self.peak
        if self.device.startswith("cuda"):
            row["gpu/memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
            with contextlib.suppress(Exception):  # without NVIDIA's library, or on a part of a GPU
                row["gpu/utilization"] = torch.cuda.utilization(self.device)
        if self.cost_per_hour:
            spent = run.wall_s / 3600 * self.cost_per_hour
            row["cost/usd_spent"] = spent
            row["cost/usd_left"] = hours_left * self.cost_per_hour
            row["cost/tokens_per_dollar"] = run.tokens / max(spent, 1e-9)
        return row


def evaluation_line(step, row, shape=None):
    """'step    100 | val loss 1.2345 | ...'. `shape`: the GPTConfig of a model whose first loss is
    to be explained where it is above that of a uniform guess."""
    names = {"val/loss": "val loss"}
    shown = {key: value for key, value in row.items() if not key.endswith("ppl")}
    parts = [f"{names.get(k, k.removeprefix('val/'))} {value:.4f}" for k, value in shown.items()]
    line = " | ".join([f"step {step:6,d}", *parts])
    if step == 0 and shape and shape.unit_embed and shape.tie_embeddings:
        uniform = math.log(shape.vocab_size)
        if row.get("val/loss", 0.0) > uniform + 0.5:
            why = "untrained, a tied head with embeddings of std 1 expects each token again"
            line += f" (a uniform guess has {uniform:.1f}; {why})"
    return line


def step_line(step, row):
    """'step    100 | loss 1.2345 | 20,000 tok/s | 0:01:23 left'"""
    parts = [f"step {step:6,d}", f"loss {row['train/loss']:.4f}"]
    if math.isnan(row["train/loss"]):
        parts[1] = "no signal"
    for key, name in (("rewards/accuracies", "reward accuracy"), ("reward/mean", "reward")):
        if key in row:
            parts.append(f"{name} {row[key]:.3f}")
    minutes, seconds = divmod(int(row["cost/eta_hours"] * 3600), 60)
    parts.append(f"{row['train/tok_per_sec']:,.0f} tok/s")
    parts.append(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
    if "cost/usd_spent" in row:
        parts.append(f"${row['cost/usd_spent']:.2f} spent")
    return " | ".join(parts)


# -----------------------------------------------------------------------------
# checkpoints


def in_memory(value):
    """A copy on the CPU that later steps leave alone."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: in_memory(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [in_memory(item) for item in value]
    return value


class Checkpoints:
    """out_dir/step_*: copied to memory while training waits, written by a thread, whole or not at
    all, rotated, mirrored."""

    def __init__(self, out_dir, keep, log, best_step=0):
        self.out_dir, self.keep, self.log, self.mirrors = out_dir, keep, log, []
        self.best = os.path.join(out_dir, "best")
        self.thread, self.jobs = concurrent.futures.ThreadPoolExecutor(1), []
        self.thread.submit(time.monotonic)  # starts it now: later there may be no memory for it
        best = self.path(best_step)
        if is_checkpoint(best) and not same_files(best, self.best):  # killed before it was linked
            self.link_best(best_step)

    def path(self, step):
        return os.path.join(self.out_dir, f"step_{step:06d}")

    def save(self, model, tokenizer, trainer, ends, hf_layout=True):
        """Starts writing a checkpoint of the step trainer["run"]["step"]."""
        begun = time.perf_counter()
        self.wait()  # never two copies in memory
        weights = model.state_dict()
        if model.head.weight is model.embed.weight:  # copied once
            del weights["head.weight"]
        weights, trainer = in_memory(weights), in_memory(trainer)
        waited = time.perf_counter() - begun

        def write(directory):
            model.save_pretrained(directory, hf_layout, tokenizer.special_ids(ends), weights)
            tokenizer.save(directory)
            trainer["crc32"] = checksums_of(directory)
            torch.save(trainer, os.path.join(directory, "trainer.pt"))

        self._submit(self._write, trainer["run"]["step"], write, waited)

    def link_best(self, step):
        """best/ becomes the checkpoint of this step, once that is written."""
        self._submit(self._link_best, step)

    def _submit(self, job, *args):
        def run():
            with self.log.optional("writer", self.out_dir):  # it is gone itself, for example
                job(*args)
                self.rotate()
            for mirror in self.mirrors:
                mirror.news.set()

        self.jobs.append(self.thread.submit(run))

    def _write(self, step, write, waited):
        target = self.path(step)
        try:
            with written_whole(target) as directory:
                write(directory)
            row = {"event": "checkpoint", "path": target, "bytes": size_of(target)}
            self.log(step, row | {"training_waited_s": waited})
        except Exception as e:  # a full disk, most often: training goes on
            before = "the one before it stays"
            if not checkpoints(self.out_dir):
                before = "there is none before it"
            free = f"{shutil.disk_usage(self.out_dir).free / 1e6:,.1f} MB are free"
            reason = f"{first_line(e)} ({free})"
            self.log.say(f"warning: {target} could not be written, {before}: {reason}")
            self.log(step, {"event": "checkpoint failed", "path": target, "error": first_line(e)})

    def _link_best(self, step):
        source = self.path(step)
        if not is_checkpoint(source):  # it could not be written, which was said
            return
        with self.log.optional("best", f"{self.best} could not become {source}"):
            copy_directory(source, self.best, link=True)
            self.log(step, {"event": "best", "path": self.best})

    def rotate(self):
        """All but the newest `keep` go, as soon as every mirror has them, or at once where the
        disk is nearly full."""
        saved = checkpoints(self.out_dir)
        for old in saved[: -self.keep] if self.keep else []:
            if os.path.islink(old) or not prepare.ours(old):
                self.log.warn_once(old, f"{old} is a link or holds a user's files, so it stays")
                continue
            if any(mirror.lacks(old) for mirror in self.mirrors):
                if shutil.disk_usage(self.out_dir).free >= 4 * size_of(old):
                    continue
                self.log(step_of(old), {"event": "upload dropped", "path": old})
                self.log.warn_once("dropped", f"the disk is nearly full: {old} is not uploaded")
            with contextlib.suppress(OSError):
                remove_checkpoint(old)

    def wait(self):
        """Until everything is written."""
        concurrent.futures.wait(self.jobs)
        self.jobs = []

    def finish(self, tries, stop):
        """Waits for what is under way; uploads and copies that fail have `tries` left, one after
        Ctrl-C. Returns whether every mirror has all that it should."""
        self.wait()
        for mirror in self.mirrors:
            mirror.close(tries)
        if any(mirror.thread.is_alive() for mirror in self.mirrors):
            leave = f"Ctrl-C {'again' if stop.signal else 'twice'} leaves without them"
            self.log.say(f"waiting for uploads and copies under way; {leave}")
        for mirror in self.mirrors:
            while mirror.thread.is_alive():
                mirror.thread.join(0.2)
                if stop.signal:
                    mirror.tries_left = min(mirror.tries_left, 1)
        self.rotate()
        return all(mirror.complete for mirror in self.mirrors)


# -----------------------------------------------------------------------------
# mirrors


class Refused(Exception):
    """An answer that is final."""


class Mirror:
    """Keeps a place beyond this machine (the Hub, a mounted drive) equal to what a run has saved,
    in a thread of its own, so that training never waits.

    Each turn compares what should be there with what is. So a first try, a retry, and the first
    turn of a run that was killed and resumed are the same, and nothing is remembered on the disk.
    """

    first_pause = 1  # seconds between the first failure and the next try; it doubles, up to 60

    def __init__(self, place, log):
        self.place, self.log = place, log
        self.sent, self.item, self.news = set(), None, threading.Event()
        self.tries_left, self.closing, self.complete = 0, False, False
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def lacks(self, checkpoint):
        """Whether the place is still to receive this checkpoint."""
        wanted = checkpoint in self.place.wanted() and checkpoint not in self.sent
        return wanted and self.thread.is_alive()

    def close(self, tries):
        """Training has ended: what fails from now on has `tries` left."""
        self.tries_left, self.closing = tries, True
        self.news.set()

    def _work(self):
        pause = self.first_pause
        while True:
            closing = self.closing  # read first: this turn sees all that was saved before closing
            self.news.clear()
            try:
                self._turn()
            except Refused as e:
                self.log.warn_once(self.place.event, f"{self.place.name}: {e}")
                return
            except Exception as e:  # no network, a full drive: a matter of time
                if self.item and self.item not in self.place.wanted():
                    continue  # rotation was faster
                self._report(e)
                if self.closing:
                    self.tries_left -= 1
                    if self.tries_left <= 0:
                        return
                self.news.wait(pause)
                pause = min(2 * pause, 60)
                continue
            if closing:
                self.complete = True
                return
            pause = self.first_pause
            self.news.wait()

    def _turn(self):
        self.item = None
        self.place.open()
        for item in self.place.wanted():
            if item not in self.sent:
                self.item, begun = item, time.perf_counter()
                if self.place.put(item):
                    row = {"event": self.place.event, "path": self.place.path_of(item)}
                    self.log(self._step(), row | {"seconds": time.perf_counter() - begun})
                self.sent.add(item)
        self.item = None
        self.place.put_beside()

    def _step(self):
        saved = checkpoints(self.place.out_dir)
        return step_of(self.item or "") or step_of(saved[-1] if saved else "")

    def _report(self, error):
        path = self.place.path_of(self.item) if self.item else self.place.name
        trouble = f"{self.place.name}: {path}: {first_line(error)}; it is tried again"
        self.log.warn_once(self.place.event, f"{trouble}, training goes on")
        row = {"event": f"{self.place.event} failed", "path": path, "error": first_line(error)}
        self.log(self._step(), row)


class Hub:
    """A repository of the Hugging Face Hub: every checkpoint under checkpoints/, and the final
    model at its root."""

    event, FINAL = "upload", "the final model"

    def __init__(self, out_dir, repo, private):
        self.out_dir, self.repo, self.private, self.name = out_dir, repo, private, f"hf_repo={repo}"
        self.api, self.final, self.has_final = None, {}, False

    def open(self):
        """The client and the repository, at the start: a token that may not write is reported
        then and not at the first checkpoint."""
        if self.api:
            return
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import disable_progress_bars, logging

        disable_progress_bars()
        logging.set_verbosity_error()
        prepare.hide("HF_TOKEN", get_token())  # `hf auth login` keeps one outside the environment
        api = HfApi()
        self._ask(api.create_repo, self.repo, private=self.private, exist_ok=True)
        self.api = api

    def _ask(self, call, *args, **options):
        """Calls the client; Refused where the answer is final, OSError where it is a matter of
        time."""
        try:
            return call(*args, **options)
        except Exception as e:
            status, trouble = getattr(getattr(e, "response", None), "status_code", 0), first_line(e)
        if 400 <= status < 500 and status not in (404, 408, 409, 412, 429):
            refusal = f"the Hub refuses ({status}), so nothing more is uploaded; training goes on"
            raise Refused(f"{refusal}. Check that HF_TOKEN may write there: {trouble}")
        raise OSError(trouble)

    def wanted(self):
        return whole_checkpoints(self.out_dir) + ([self.FINAL] if self.final else [])

    def path_of(self, item):
        if item == self.FINAL:
            return self.repo
        return f"{self.repo}/checkpoints/{os.path.basename(item)}"

    def put_final(self, folder, card):
        """From now on the final model is wanted, too: the files of a checkpoint without trainer.pt,
        a card, and the plot."""
        files = files_of(folder, skip=("trainer.pt",))
        plot = os.path.join(self.out_dir, PLOT)
        if os.path.exists(plot):
            files[PLOT] = plot
        self.final = files | {"README.md": card.encode(errors="replace")}

    def put(self, item):
        """Uploads a checkpoint or the final model in one commit. False if the Hub, asked, has the
        checkpoint already; raises unless it has the files afterwards."""
        from huggingface_hub import CommitOperationAdd

        is_final = item == self.FINAL
        prefix = "" if is_final else f"checkpoints/{os.path.basename(item)}/"
        files = self.final if is_final else files_of(item)
        files = {prefix + name: source for name, source in files.items()}
        if not is_final and self._confirms(files, prefix):
            return False
        additions = [CommitOperationAdd(path, source) for path, source in files.items()]
        message = "Final model" if is_final else prefix.rstrip("/")
        self._ask(self.api.create_commit, self.repo, additions, commit_message=message)
        if not self._confirms(files, prefix):
            raise OSError("what is on the Hub is not what was sent")
        self.has_final = self.has_final or is_final
        return True

    def _confirms(self, files, prefix):
        """Whether the Hub, asked, has every file in its size, and the weights with their
        SHA-256."""
        infos = self._ask(self.api.get_paths_info, self.repo, list(files))
        there = {info.path: info for info in infos}
        for path, source in files.items():
            size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
            if path not in there or there[path].size != size:
                return False
        weights = there.get(prefix + "model.safetensors")
        if not weights or not weights.lfs:
            return False
        return weights.lfs.sha256 == prepare.sha256(files[weights.path])

    def put_beside(self):
        pass

    def report(self):
        if self.has_final:
            return f"the final model is at {self.api.endpoint}/{self.repo}"
        here = f"the final model is not on the Hub but in {self.out_dir}"
        return f"{here}; the same command tries again"


class Backup:
    """A directory on a slow mount that holds the newest checkpoints, and what a run has beside
    them."""

    event = "backup"

    def __init__(self, out_dir, directory, keep):
        self.out_dir, self.directory, self.keep = out_dir, directory, keep
        self.name = f"backup_dir={os.path.dirname(directory)}"
        self.copied = {}  # best/ and start/, as they were when they were copied last

    def open(self):
        mount = os.path.dirname(os.path.dirname(os.path.abspath(self.directory)))
        if not os.path.isdir(mount):  # a drive that is gone is not to become a local directory
            raise OSError(f"{mount} is not there")
        os.makedirs(self.directory, exist_ok=True)

    def wanted(self):
        return whole_checkpoints(self.out_dir)[-self.keep :]  # keep 0: all

    def path_of(self, item):
        return os.path.join(self.directory, os.path.basename(item))

    def put(self, item):
        """Copies a checkpoint, whole or not at all; the oldest ones go, which a run that was killed
        may have left. False if it is there."""
        is_new = not same_files(item, self.path_of(item))
        if is_new:
            copy_directory(item, self.path_of(item))
        wanted = [os.path.basename(path) for path in self.wanted()]
        older = []
        for there in checkpoints(self.directory):
            if step_of(there) <= step_of(item):
                older.append(there)
            elif is_new and os.path.basename(there) not in wanted:  # the run went back to before it
                set_aside(there)
        for old in older[: -self.keep] if self.keep else []:
            if prepare.ours(old):
                remove_checkpoint(old)
        return is_new

    def put_beside(self):
        """The log, samples and plot; best/ and start/ if they have changed."""
        prepare.copy_files(self.out_dir, self.directory, BESIDE)
        for name in ("best", "start"):
            source, target = os.path.join(self.out_dir, name), os.path.join(self.directory, name)
            version = self._version(source)
            if version in (None, self.copied.get(name)):
                continue
            try:
                if not same_files(source, target):
                    copy_directory(source, target)
                self.copied[name] = version
            except FileNotFoundError:
                if self._version(source) == version:
                    raise  # else it is being replaced; news of that follows

    @staticmethod
    def _version(directory):
        """What tells one best/ from the next without reading it; None if there is none."""
        try:
            weights = os.stat(os.path.join(directory, "model.safetensors"))
        except OSError:
            return None
        return weights.st_ino, weights.st_mtime_ns


def start_mirrors(config, checkpoints, log):
    """Gives the Checkpoints of the master process their mirrors. Returns the Hub, or None."""
    hub = None
    if checkpoints and config["hf_repo"]:
        hub = Hub(config["out_dir"], config["hf_repo"], config["hf_private"])
        checkpoints.mirrors.append(Mirror(hub, log))
    if checkpoints and config["backup_dir"]:
        backup = Backup(config["out_dir"], backup_of(config), config["keep_checkpoints"])
        checkpoints.mirrors.append(Mirror(backup, log))
    return hub


# -----------------------------------------------------------------------------
# the card

# what a card leaves out: paths and accounts
PRIVATE = """out_dir data_dir backup_dir init_from hf_repo hf_private terminate_pod
    terminate_on_error wandb_log wandb_project wandb_run_name tensorboard dry_run gpu mfu
    gpu_cost_per_hour""".split()  # noqa: SIM905
CARD = """---
{front}
---

# {name}

{n_params:,} parameters, trained with nanosmol ({stage}) for {step:,} steps on {tokens:,} tokens \
of {data}. The weights are those of the last step; `checkpoints/` holds earlier ones, with the \
state of their optimizers.

| | step | |
|---|---|---|
| {goal} at the end | {last[0]:,} | {last[1]:.4f} |
| {goal} at its best | {best[0]:,} | {best[1]:.4f} |
{bpb}| train/loss at the end | {step:,} | {last_loss:.4f} |

![loss](loss.png)

{usage}

    python sample.py --init_from={repo}

The run's config, as nanosmol reads it:

```python
{settings}
```
"""
IN_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```

In nanosmol:"""


def model_card(config, keys, model, loads_in_transformers, run, rows):
    """README.md of the Hub repository, from the run's own config and log."""
    stage, repo, dataset, base = (config[k] for k in ("stage", "hf_repo", "dataset", "init_from"))
    goal, choose = ("val/pass@1", max) if stage == "rlvr" else ("val/loss", min)
    nothing = [(run.step, math.nan)]
    measured, bpb = column(rows, goal) or nothing, ""
    if column(rows, "val/bpb"):  # bits per byte: comparable whatever the tokenizer
        bpb = "| val/bpb at the end | {:,} | {:.4f} |\n".format(*column(rows, "val/bpb")[-1])
    known = [prepare.KNOWN.get(name, {}) for name, _ in prepare.parse_mixture(dataset)]
    sources = [entry["hub"] for entry in known if "hub" in entry]
    if base == "scratch" or os.path.exists(base) or base.startswith((".", "/", "out/")):
        base = ""  # no Hub id
    head = {
        "library_name": "transformers" if loads_in_transformers else "nanosmol",
        "pipeline_tag": "text-generation",
        "tags": ["nanosmol", stage],
        "base_model": base,
        "datasets": sources,
    }
    usage = "In nanosmol, since transformers has no architecture like this one:"
    if loads_in_transformers:
        usage = IN_TRANSFORMERS.format(repo=repo)
    shown = [key for key in keys if key not in PRIVATE]
    shown = [key for key in shown if not str(config[key]).startswith(("/", "~"))]
    return CARD.format(
        front="\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items() if value),
        name=repo.split("/")[1],
        n_params=model.n_params(),
        stage=f"{stage}, from {base}" if base else stage,
        step=run.step,
        tokens=run.tokens,
        data=f"{dataset} ({', '.join(sources)})" if sources else dataset,
        goal=goal,
        last=measured[-1],
        best=choose(measured, key=lambda point: point[1]),
        bpb=bpb,
        last_loss=(column(rows, "train/loss") or nothing)[-1][1],
        usage=usage,
        repo=repo,
        settings="\n".join(f"{key} = {config[key]!r}" for key in shown),
    )


# -----------------------------------------------------------------------------
# signals, the pod, the end


class StopSignal:
    """SIGINT, SIGTERM and SIGHUP (a closed terminal) end the step, and a checkpoint is written.
    `signal` is the name of the one that came, or "". It is said at once, unless `says` is False,
    since a step may take a minute. Another one, a second later or more, ends the process at once:
    until then it is the same event, which shells and torchrun pass on, too."""

    def __init__(self, says=True):
        self.signal, self.at, self.says = "", 0.0, says
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            ignored = name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN  # nohup
            if number and not ignored:
                signal.signal(number, self._receive)

    def _receive(self, number, frame):
        if not self.signal:
            self.signal, self.at = signal.Signals(number).name, time.monotonic()
            if self.says:
                text = (
                    f"\n{self.signal}: finishing this step, then saving; once more ends at once\n"
                )
                with contextlib.suppress(OSError):  # the terminal is closed
                    os.write(1, text.encode())  # print() can't be called while it is under way
        elif signal.Signals(number).name != "SIGHUP" and time.monotonic() - self.at >= 1:
            os._exit(130)


def on_a_pod(config):
    return config["terminate_pod"] and bool(os.environ.get("RUNPOD_POD_ID"))


class Pod:
    """The RunPod machine that the run is on. Terminating it deletes its disk, so the Hub has to
    have the model; stopping it keeps /workspace."""

    def __init__(self, config, log, stop):
        self.id, self.log, self.stop = os.environ["RUNPOD_POD_ID"], log, stop
        if not config["hf_repo"]:
            log.say("RunPod: without hf_repo the pod is stopped at the end, not terminated")
        if not os.path.realpath(config["out_dir"]).startswith("/workspace/"):
            place = f"out_dir={config['out_dir']} is not in /workspace"
            log.say(f"warning: {place}, and nothing else outlives a pod that is stopped")
        if not os.environ.get("RUNPOD_API_KEY"):
            key = "terminate_pod=True, but there is no RUNPOD_API_KEY"
            log.say(f"warning: {key}: the pod will run on, and cost, after the end")

    def end(self, how, step):
        """Terminates or stops the pod, after ten seconds in which Ctrl-C calls it off."""
        import requests

        api = os.environ.get("RUNPOD_API_BASE", "https://rest.runpod.io/v1")
        url = f"{api}/pods/{requests.utils.quote(self.id, safe='')}"
        method = "DELETE"
        if how == "stop":
            method, url = "POST", f"{url}/stop"
        headers = {"Authorization": f"Bearer {os.environ.get('RUNPOD_API_KEY', '')}"}
        self.say(f"about to {how} pod {self.id} in ten seconds; Ctrl-C calls it off")
        for _ in range(100):
            if self.stop.signal:
                return self.say(f"called off, pod {self.id} runs on, and costs")
            time.sleep(0.1)
        self.log(step, {"event": "pod", "how": how})
        for pause in (1, 4, 0):
            try:
                requests.request(method, url, headers=headers, timeout=30).raise_for_status()
                return self.say(f"pod {self.id} was told to {how}")
            except requests.RequestException as e:
                trouble = first_line(e)
                time.sleep(pause)
        failure = f"could not {how} pod {self.id}, which runs on, and costs: {trouble}"
        self.say(f"{failure}. End it at https://console.runpod.io/pods")

    def say(self, text):
        print(f"RunPod: {prepare.without_secrets(text)}", flush=True)  # whichever process crashed


def finish_on_crash(save_last_step, checkpoints, log, stop, pod, terminate_on_error):
    """Makes sys.excepthook finish a run that crashed: the last good step is saved if it can be,
    what is under way is written and uploaded, and the pod is stopped."""
    report = sys.excepthook

    def finish(kind, error, traceback):
        report(kind, error, traceback)
        try:
            if not isinstance(error, Diverged):
                save_last_step()
        except BaseException as e:
            trouble = prepare.without_secrets(first_line(e))
            print(f"the last step could not be saved: {trouble}", file=sys.stderr)
        log.wandb_run = log.board = None  # they may be what raised
        if checkpoints:
            checkpoints.finish(tries=1, stop=stop)
        if pod and terminate_on_error == "stop" and not stop.signal:
            pod.end("stop", step=0)

    sys.excepthook = finish


# -----------------------------------------------------------------------------
# what a run prints at its start and its end


def declares_architecture(model, hf_layout, say):
    """Whether checkpoints name a Hugging Face architecture: hf_layout asks for it, and one has the
    model's maths."""
    from model import architecture

    obstacles = architecture(model.config, model.state_dict())[1]
    if hf_layout and obstacles:
        say(f"warning: checkpoints load here but not in transformers: {'; '.join(obstacles)}")
    return hf_layout and not obstacles


def most_steps(config, setup):
    """The most steps that a run takes: max_iters. A time budget that is typed outranks a max_iters
    of the config, and any that is set outranks the default: then it is without end."""
    ranks = {"command line": 2, None: 0}  # else the name of a config file
    time, steps = (ranks.get(setup.given.get(key), 1) for key in ("time_budget", "max_iters"))
    if config["time_budget"] and steps < time:
        return math.inf
    return config["max_iters"]


def headline(model, data, config, max_steps, sequences, attention, why_dtype, say):
    block_size, device = model.config.block_size, model.embed.weight.device
    amount = f"x {block_size} = {sequences * block_size:,} tokens"
    if config["stage"] == "dpo":
        amount = "pairs"
    if config["stage"] in ("rlvr", "distill"):
        amount = f"prompts x {config['group_size']} completions"
    apart = ", documents apart" if config["doc_mask"] else ""
    warmup_iters, max_iters = config["warmup_iters"], config["max_iters"]
    if warmup_iters > max_iters:
        say(f"warning: warmup_iters={warmup_iters} is beyond max_iters and clamped to {max_iters}")
    length = counted(max_iters, "step")
    if config["time_budget"]:
        unless = "in steps" if max_steps == math.inf else f"at most {length}"
        length = f"{config['time_budget']:g} seconds of training, {unless}"
    say(
        f"{model.n_params() / 1e6:.2f}M parameters; {config['dataset']}: {data.amount}; "
        f"{length} of {sequences} {amount}"
    )
    why = f" ({why_dtype})" if why_dtype else ""
    say(
        f"{config['out_dir']}: {device}, {config['dtype']}{why}, "
        f"{config['optimizer']}, attention: {attention}{apart}"
    )
    try:
        data.tokenizer.encode(config["sample_start"])
    except UserError as e:
        start = config["sample_start"]
        say(f"warning: sample_start={start!r}: {e}; samples begin with the end-of-text token")


def encodable(start, tokenizer):
    """`start`, or "" where the vocabulary lacks a character of it, which headline() reports."""
    with contextlib.suppress(UserError):
        tokenizer.encode(start)
        return start
    return ""


def samples(model, data, config, count, autocast, log):
    """Texts that begin with sample_start, or after the first stage answer it. They are for show:
    what fails here is a warning."""
    texts = []
    with log.optional("sample", "no sample could be made"):
        tokenizer = data.tokenizer
        start = encodable(config["sample_start"], tokenizer)
        prompt, shown = tokenizer.encode(start) or [tokenizer.start_id], start
        if config["stage"] != "pretrain":
            chat = [{"role": "user", "content": start}]
            prompt, _ = prepare.render_chat(chat, tokenizer, add_generation_prompt=True)
            shown = f"> {start}\n"
        length = max(1, min(200, model.config.max_positions - len(prompt)))
        idx = torch.tensor([prompt] * count, device=model.embed.weight.device)
        how = {"temperature": 0.8, "top_k": 200, "seed": config["seed"], "stop": data.ends}
        with autocast():
            rows = model.generate(idx, length, **how).tolist()
        for ids in rows:
            ids = ids[len(prompt) :]
            end = next((i for i, token in enumerate(ids) if token in data.ends), len(ids))
            texts.append(shown + tokenizer.decode(ids[:end]))
    return texts


class Diverged(UserError):
    """Too many bad steps: the weights are not worth keeping."""


def last_checkpoint(config, run, why, say):
    """(path, model, trainer state) of the checkpoint to roll back to; UserError if there is none,
    or after max_rollbacks."""
    kept = "there is no checkpoint to go back to"
    for path in reversed(checkpoints(config["out_dir"])):
        model, state = load(path, say)
        if model and run.rollbacks < config["max_rollbacks"]:
            return path, model, state
        if model:
            kept = f"{path} is whole"
            break
    advice = "Lower the learning rate, or look at the data"
    if why == "gradient is 0":
        advice = "No weight can learn: look at init_std, init_from, and what you changed in it"
    bad, rollbacks = (
        counted(config["max_bad_steps"], "bad step"),
        counted(run.rollbacks, "rollback"),
    )
    trouble = f"{bad} in a row ({why}) after step {run.step} and {rollbacks}"
    raise Diverged(f"{trouble}; {kept}. {advice}")


def command(*changes):
    """The line that started this process, with these options in place of others of their keys, and
    without --init_from=scratch, which would start over."""
    replaced = ("--init_from=scratch", *(change.partition("=")[0] + "=" for change in changes))
    return command_line([a for a in sys.argv if not a.startswith(replaced)] + list(changes))


RESULTS = "results.tsv"  # beside a run's directory: a row for each run that ended


def revision():
    """(commit, "yes" or "no": whether a file differs from it) of the code that runs; ("", "") where
    there is no git."""
    home = os.path.dirname(os.path.abspath(__file__))

    def git(*words):
        command = ["git", "-C", home, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return commit, "yes" if git("status", "--porcelain", "--untracked-files=no") else "no"
    except (OSError, subprocess.SubprocessError):
        return "", ""


def peak_memory():
    """GB: of the GPU where one is used, else of the process. Not ru_maxrss, which begins at the
    peak of the process that started this one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    if not os.path.exists("/proc/self/status"):
        return math.nan  # only Linux tells
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) * 1024 / 1e9


def result(config, run, meter, model, rows, code):
    """{column: text} of a run that ended: for people, programs and results.tsv. Empty where a stage
    or a machine has no such number. `code`: what revision() said at the start."""

    def last(key):
        points = column(rows, key)
        return points[-1][1] if points and points[-1][0] == run.step else math.nan

    speed = run.tokens / max(run.train_s, 1e-9)
    values = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "run": config["out_dir"],
        **{key: last(key) for key in ("val/bpb", "val/loss", "val/pass@1")},
        "best": abs(run.best[0]),
        "steps": run.step,
        "tokens": run.tokens,
        "train_s": round(run.train_s, 1),
        "tok_per_s": round(speed),
        "parameters": model.n_params(),
        "peak_memory_gb": round(peak_memory(), 2),
        "mfu": round(speed * meter.flops / meter.peak, 3) if meter.peak else math.nan,
        "commit": code[0],
        "changed": code[1],
        "command": prepare.without_secrets(command()),
    }
    return {key: _result_text(value) for key, value in values.items()}


def _result_text(value):
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return re.sub(r"\s", " ", str(value))


def result_block(values):
    """A result between two lines of ---, a line `key: value` for each number that there is."""
    lines = [f"{key}: {value}" for key, value in values.items() if value]
    return "\n".join(["---", *lines, "---"])


def add_result(values, log):
    """Appends a result to results.tsv and returns its path. A file whose columns are others, of
    another version or a user's, is left alone: the row goes to results~1.tsv, results~2.tsv, ..."""
    place = os.path.dirname(log.out_dir)
    header, line = ("\t".join(part).encode() + b"\n" for part in (values, values.values()))
    stem, number = os.path.splitext(RESULTS)[0], 0
    path = os.path.join(place, RESULTS)
    with log.optional("results", path):
        while not _append_row(path, header, line):
            number += 1
            path = os.path.join(place, f"{stem}~{number}.tsv")
    return path


def _append_row(path, header, line):
    """False if the file begins with another header. A row is one write under a lock, so that runs
    that end together get a row each, below one header."""
    with open(path, "a+b", buffering=0) as f:
        with contextlib.suppress(ImportError, OSError):  # Windows and some network drives
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        text = f.read()
        if text and not text.startswith(header):
            return False
        if text and not text.endswith(b"\n"):  # a full disk cut it short
            line = b"\n" + line
        f.write(line if text else header + line)
        return True


def summary(config, run, trained, is_saved, tokenizer):
    """What to type after a finished run. `trained`: whether this process did; a run that was
    finished before is not trained again."""
    out_dir, name = config["out_dir"], "pass@1" if config["stage"] == "rlvr" else "val loss"
    limit, most, longer = limit_of(config, run)
    lines = [f"the loss, drawn      {os.path.join(out_dir, PLOT)}"]
    if not trained:
        best = f"best {name} {abs(run.best[0]):.4f}"
        if not math.isfinite(run.best[0]):
            best = "not evaluated"
        done = f"the run in {out_dir} has {counted(run.step, 'step')}"
        asked = f"{limit}={most:g} asks for no more"
        lines.insert(0, f"--- nothing left to do: {done}, and {asked}; {best} ---")
    if is_saved:
        sample = ["sample.py", f"--out_dir={out_dir}", "--interactive"]
        if config["stage"] == "pretrain":
            start = encodable(config["sample_start"] or "Once upon a time", tokenizer)
            sample[2:] = [f"--start={start}"] if start else []
        lines.append(f"write more           python {shlex.join(sample)}")
        lines.append(f"train longer         {command(f'--{limit}={longer:g}')}")
    if not trained:
        lines.append(f"train anew           {command(f'--out_dir={out_dir}_again')}")
    return "\n".join(lines)


def limit_of(config, run):
    """(key, value, a larger one) of what ended a run: its steps, or its time."""
    steps, seconds = config["max_iters"], config["time_budget"]
    if seconds and run.train_s >= seconds:
        return "time_budget", seconds, seconds * (1 + run.train_s // seconds)
    return "max_iters", steps, max(2 * steps, run.step + steps)


def how_to_resume(stopped_by, run, max_steps, time_budget, is_saved):
    saved = "which is saved" if is_saved else "which is not saved"
    step = f"{run.step:,}" if max_steps == math.inf else f"{run.step:,} of {max_steps:,}"
    if time_budget:
        step += f", {run.train_s:.0f} of {time_budget:g} seconds"
    stopped = f"{stopped_by or 'a signal'}: stopped after step {step}, {saved}"
    return f"{stopped}. To go on:\n  {command()}"
