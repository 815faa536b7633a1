"""
What a run leaves behind: where it begins, its log, its checkpoints, their mirrors on the Hub and a backup, the model card,
and the pod that it runs on.

It knows directories, models and configs, but no batch, no loss and no optimizer step: those are train.py's. sample.py takes
newest_run and model_directory from here. torch is imported where it is needed, so that a mistake is reported without it.
"""
import collections
import concurrent.futures
import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import types

import prepare
from configurator import UserError

# -----------------------------------------------------------------------------
# where runs and models lie

LOG, SAMPLES, PLOT = "log.jsonl", "samples.txt", "loss.png"


def directory_of(config_files):
    """The out_dir of a run that names none: out/<name of the last config>, out/toy without a config."""
    if not config_files:
        return os.path.join("out", "toy")
    return os.path.join("out", os.path.splitext(os.path.basename(config_files[-1]))[0])


def checkpoints(run):
    """The step_* directories of a run, oldest first. One without any file of a model is none."""
    names = os.listdir(run) if os.path.isdir(run) else []
    names = [name for name in names if re.fullmatch(r"step_\d{6,}", name) and has_model_file(os.path.join(run, name))]
    return [os.path.join(run, name) for name in sorted(names, key=lambda name: int(name[5:]))]


def has_model_file(directory):
    return any(os.path.exists(os.path.join(directory, name)) for name in ("config.json", "model.safetensors", "trainer.pt"))


def newest_run(parent="out"):
    """The run under `parent` whose checkpoint is the newest."""
    runs = [os.path.join(parent, name) for name in os.listdir(parent)] if os.path.isdir(parent) else []
    runs = [run for run in runs if checkpoints(run)]
    if not runs:
        raise UserError(f"{parent}/: no run with a checkpoint yet; python train.py makes one in two minutes")
    return max(runs, key=lambda run: os.path.getmtime(checkpoints(run)[-1]))


def model_directory(where):
    """The directory of the model that `where` names: a model directory, the newest checkpoint of a run's
    directory, or a Hub id, which is fetched."""
    if os.path.exists(os.path.join(where, "config.json")):
        return where
    if os.path.isdir(where):
        if not checkpoints(where):
            raise UserError(f"{where}: neither a model directory (no config.json) nor a run (no step_* in it)")
        return checkpoints(where)[-1]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", where) or where.startswith((".", "out/", "data/")):
        raise UserError(f"{where}: no such directory, and not the id of a model on the Hub (owner/name)")
    return prepare.fetch_model(where)


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


def is_checkpoint(directory):
    """Whether a run wrote this directory, and nothing else is in it: only then may it be removed or replaced."""
    return prepare.kind_of_directory(directory) == "checkpoint" and prepare.ours(directory)


def remove_leftover(directory):
    """Removes what is left of a checkpoint that was being written or deleted; files of others in it stay."""
    if os.path.isdir(directory):
        prepare.remove_directory(directory, "checkpoint")


def remove_checkpoint(directory):
    """Renames it away first: what stands under a final name is whole at every moment."""
    hidden = os.path.join(os.path.dirname(directory), f".deleting.{os.path.basename(directory)}")
    remove_leftover(hidden)
    os.rename(directory, hidden)
    remove_leftover(hidden)


def set_aside(path):
    """Renames a file or directory to the first free name path~1, path~2, ...; returns that name."""
    number = 1
    while os.path.lexists(f"{path}~{number}"):
        number += 1
    os.rename(path, f"{path}~{number}")
    return f"{path}~{number}"


def make_way(target):
    """Sets aside what stands under the name of a checkpoint and holds files that no run wrote."""
    if os.path.lexists(target) and not is_checkpoint(target):
        set_aside(target)


def is_run(directory):
    """Whether a run has begun in this directory. UserError if something stands under a name that a run needs: it is
    somebody's own, and nothing of it is touched."""
    if checkpoints(directory) or Log(directory).rows() or not os.path.lexists(directory):
        return os.path.exists(directory)
    if not os.path.isdir(directory):
        raise UserError(f"{directory}: File exists, and is not a directory; choose another --out_dir or --backup_dir")
    for name in sorted(os.listdir(directory)):
        if re.fullmatch(r"step_\d{6,}|best|start|log\.jsonl|samples\.txt|loss\.png", name):
            raise UserError(f"{directory} holds {name}, but no run: a run would replace it; choose another --out_dir or "
                            "--backup_dir, or move it away")
    return False


def link_or_copy(source, target):
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


# -----------------------------------------------------------------------------
# where a run begins

def backup_of(config):
    """The directory in backup_dir that mirrors this run; '' without backup_dir."""
    if not config["backup_dir"]:
        return ""
    return os.path.join(config["backup_dir"], os.path.basename(os.path.normpath(config["out_dir"])))


def check(config):
    """UserError for keys about places beyond this machine that can't be right, before anything is loaded."""
    hf_repo, backup_dir = config["hf_repo"], config["backup_dir"]
    if hf_repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", hf_repo):
        raise UserError(f"hf_repo={hf_repo!r}: expected the id of a Hub repository, owner/name")
    mount = os.path.dirname(os.path.abspath(backup_dir))
    if backup_dir and not os.path.isdir(mount):
        raise UserError(f"backup_dir={backup_dir!r}: {mount} does not exist; mount the drive first")
    if backup_dir and os.path.exists(backup_dir) and not os.path.isdir(backup_dir):
        raise UserError(f"backup_dir={backup_dir!r}: not a directory")


def load(checkpoint, say):
    """(model, trainer state) of a checkpoint; (None, None) if it is damaged, and says so."""
    import torch

    from model import GPT
    try:
        prepare.load_tokenizer(checkpoint)
        model = GPT.from_pretrained(checkpoint)
        state = torch.load(os.path.join(checkpoint, "trainer.pt"), map_location="cpu", weights_only=True)
        return model, of_today(state)
    except Exception as e:
        say(f"warning: {checkpoint} is damaged and passed over: {first_line(e)}")
        return None, None


def of_today(state):
    """The trainer state of a checkpoint, converted if it was written before train.py kept its counters together."""
    if "run" in state:
        return state
    counters = ("step", "position", "train_s", "wall_s", "rollbacks", "skipped", "recent")
    run = {name: state[name] for name in counters if name in state}
    best = state["best_val"]
    run |= {"tokens": state["tokens_seen"], "recent": [tuple(pair) for pair in state["recent"]]}
    if best == best:  # NaN: there was no evaluation yet
        run["best"] = [best, -math.inf] if state["config"]["stage"] == "rlvr" else [-best]
    rng = {"cpu": state["rng"], "cuda": state["cuda_rng"]}
    return {**{key: state[key] for key in ("config", "fingerprint", "optimizers", "scaler")}, "run": run, "rng": rng}


def restore_backup(config, setup, say):
    """Where out_dir holds no run, on a machine that was replaced: the newest whole checkpoint of the backup is copied back."""
    out_dir, backup = config["out_dir"], backup_of(config)
    starts_over = setup.given.get("init_from") == "command line" and config["init_from"] == "scratch"
    if not backup or starts_over or checkpoints(out_dir) or not checkpoints(backup):
        return
    for checkpoint in reversed(checkpoints(backup)):
        os.makedirs(out_dir, exist_ok=True)
        copy = prepare.copy_whole(checkpoint, os.path.join(out_dir, os.path.basename(checkpoint)))
        if load(copy, say)[0]:
            for name in ("best", "start"):
                if os.path.isdir(os.path.join(backup, name)) and not os.path.exists(os.path.join(out_dir, name)):
                    prepare.copy_whole(os.path.join(backup, name), os.path.join(out_dir, name))
            prepare.copy_files(backup, out_dir, [LOG, SAMPLES, PLOT])
            return say(f"{out_dir} held no run: {checkpoint} is copied back")
        remove_checkpoint(copy)
    raise UserError(f"{backup}: no checkpoint is whole; --init_from=scratch sets the backup aside and starts over")


def find(config, setup, say):
    """Where a run begins, the one place that knows what init_from means. A namespace:

    `checkpoint`, `model`, `state`: of the newest whole checkpoint in out_dir; None for a new run;
    `init_from`: 'scratch', or where a new run takes its weights from; of a run that goes on, where it once took them;
    `start_over`: --init_from=scratch was typed, so an old run in out_dir is to be set aside;
    `damaged`: newer checkpoints than `checkpoint` that can't be read.
    """
    out_dir, init_from = config["out_dir"], config["init_from"]
    typed = setup.given.get("init_from") == "command line"  # an order; in a config it is a default
    start = types.SimpleNamespace(checkpoint=None, model=None, state=None, damaged=[], typed=typed, start_over=False)
    if typed and init_from == "scratch":  # as the config says: that of a later stage names the model to begin with
        start.start_over, init_from = True, setup.from_files.get("init_from", "scratch")
    start.init_from = init_from
    measures_another = config["eval_only"] and typed and init_from != "resume"
    saved = [] if start.start_over or measures_another else checkpoints(out_dir)
    for checkpoint in reversed(saved):
        start.model, start.state = load(checkpoint, say)
        if start.state:
            start.checkpoint = checkpoint
            start.init_from = start.state["config"]["init_from"]
            return start
        start.damaged.append(checkpoint)
    if saved:
        raise UserError(f"{out_dir}: no checkpoint is whole; --init_from=scratch sets the run aside and starts over")
    if init_from == "resume":
        raise UserError(f"{out_dir}: there is no run to resume; leave out --init_from=resume to start one")
    if config["stage"] in ("dpo", "rlvr") and init_from == "scratch":
        raise UserError(f"stage={config['stage']!r} starts from a model: --init_from=out/<a run>, a model directory or a "
                        "Hub id")
    if init_from != "scratch":
        start.checkpoint = model_directory(init_from)
    return start


def began_with(key, config, setup, start):
    """The value of a key that a run keeps for its whole life, such as dtype, unless another is typed on the command line:
    recorded in its checkpoints, and before the first one in its log."""
    if setup.given.get(key) == "command line" or start.start_over:
        return config[key]
    if start.state:
        return start.state["config"].get(key, config[key])
    if start.init_from != config["init_from"] or config["eval_only"]:
        return config[key]
    rows = Log(config["out_dir"]).rows()
    configs = [row["config"] for row in rows if isinstance(row.get("config"), dict)]
    return configs[-1].get(key, config[key]) if configs else config[key]


def open_model(start, config, setup, data, say):
    """The model that training goes on with or begins from. UserError where out_dir holds a run with another model or other
    data, or where the weights contradict what was asked for."""
    import torch

    from model import FOLLOWS, GPT, GPTConfig
    keys = {key: config[key] for key in GPTConfig.__dataclass_fields__}
    how_weights_begin = ("init", "init_std", "unit_embed", "scale_residual")
    if start.init_from == "scratch":
        asked = vars(GPTConfig(**keys | {"vocab_size": config["vocab_size"] or data.vocab_size}))
    else:  # the weights bring their shape; only what was asked for in so many words can contradict it
        asked = {key: value for key, value in keys.items() if key in setup.given and key not in how_weights_begin
                 and not (key in FOLLOWS and value == 0)}
    if start.state:
        refuse_another_run(start, config, asked, data.fingerprint)
        say(f"{'evaluating' if config['eval_only'] else 'resuming'} {start.checkpoint}")
        before = start.state["config"]
        changed = [f"{key} {before[key]!r} -> {config[key]!r}" for key in setup.keys if key in before
                   and before[key] != config[key] and key not in ("init_from", "eval_only", "dtype") and key not in keys]
        if changed:
            say(f"changed since: {', '.join(changed)}")
        return start.model
    if start.init_from == "scratch":
        if config["stage"] == "sft":
            say("warning: stage='sft' from random weights; --init_from= names a model to begin with")
        torch.manual_seed(config["seed"])
        return GPT(GPTConfig(**asked))

    where, directory, block_size = start.init_from, start.checkpoint, config["block_size"]
    model = GPT.from_pretrained(directory)
    for key, value in asked.items():
        if value != getattr(model.config, key) and key not in ("block_size", "dropout"):
            raise UserError(f"{key}={value!r} was asked for, the model in {where} has {getattr(model.config, key)!r}")
    if block_size > model.config.max_positions:
        raise UserError(f"block_size={block_size} is beyond the max_positions={model.config.max_positions} of {where}")
    model.set_runtime(block_size, config["dropout"])
    say(f"weights from {directory}")
    if os.path.exists(os.path.join(directory, "tokenizer.json")) and \
            not data.tokenizer.agrees(prepare.load_tokenizer(directory)):
        raise UserError(f"{config['dataset']} was made with another tokenizer than {where}; prepare it with "
                        f"--tokenizer={directory}")
    if model.config.vocab_size < data.vocab_size and config["stage"] != "pretrain":
        say(f"the model grows rows for {data.vocab_size - model.config.vocab_size} chat tokens")
        model.grow(data.vocab_size)
    return model


def refuse_another_run(start, config, asked, fingerprint):
    """A run goes on only with the same stage, data and model."""
    before, out_dir = start.state["config"], config["out_dir"]
    same = {key: config[key] for key in ("stage", "dataset", "seed", "doc_mask", "optimizer")} | asked
    if start.typed and config["init_from"] != "resume":
        same["init_from"] = config["init_from"]
    for key, value in same.items():
        if before.get(key, value) != value:
            raise UserError(f"{out_dir} holds a run with {key}={before[key]!r}, this one asks for {value!r}; choose "
                            "another --out_dir, or --init_from=scratch to set the old run aside")
    if start.state["fingerprint"] != fingerprint:
        raise UserError(f"{config['dataset']}: the data changed since the run in {out_dir} began; put it back, "
                        "choose another --out_dir, or --init_from=scratch to set the old run aside")


def claim(config, start, say):
    """All checks are passed: locks out_dir for this process, sets an old run aside, clears what a killed run left."""
    out_dir = config["out_dir"]
    places = [place for place in (out_dir, backup_of(config)) if place]
    old_runs = [place for place in places if is_run(place)]
    os.makedirs(out_dir, exist_ok=True)
    lock(out_dir)
    if start.start_over:
        for old in old_runs:
            if os.path.realpath(os.getcwd()).startswith(os.path.realpath(old)):
                raise UserError(f"out_dir={old!r} is the directory that you are in, so it can't be set aside; choose another")
            say(f"the run in {old} is set aside as {set_aside(old)}")
        if not os.path.isdir(out_dir):
            os.makedirs(out_dir)
            lock(out_dir)
    for damaged in start.damaged:  # else rotation would take it for the newest
        if os.path.exists(damaged + ".damaged"):
            set_aside(damaged + ".damaged")
        os.rename(damaged, damaged + ".damaged")
    for name in os.listdir(out_dir):
        if re.fullmatch(r"\.(writing|deleting)\..+", name):
            remove_leftover(os.path.join(out_dir, name))
    if config["stage"] in ("dpo", "rlvr"):
        keep_first_model(out_dir, first_model(config, start))


def lock(out_dir):
    """UserError if another process trains in out_dir: they would delete each other's checkpoints. The lock goes with this
    process."""
    try:
        import fcntl  # not on Windows
        fcntl.flock(os.open(out_dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out_dir}: another training is under way in it; choose another --out_dir") from None
    except (ImportError, OSError):  # a drive without locks
        pass


def first_model(config, start):
    """The directory of the model that a later stage began with: out_dir/start of a run that goes on."""
    kept = os.path.join(config["out_dir"], "start")
    if not start.state:
        return start.checkpoint
    if os.path.isfile(os.path.join(kept, "config.json")):
        return kept
    before = start.state["config"]  # of a run that was made before start/ was: it recorded where its first model lay
    source = before.get("start_directory", start.init_from)
    try:
        source = model_directory(source)
        if "start_weights" in before and prepare.weights_hash(source) != before["start_weights"]:
            raise UserError("it holds another model by now")
    except UserError as e:
        raise UserError(f"{source}: the model that the run in {config['out_dir']} began with is no longer there; put it "
                        f"back, or choose another --out_dir ({e})") from None
    return source


def keep_first_model(out_dir, source):
    """out_dir/start: the model that a later stage began with, as hard links, so that it stays whatever becomes of the run
    that it comes from."""
    kept, beside = os.path.join(out_dir, "start"), os.path.join(out_dir, ".writing.start")
    if os.path.exists(kept):
        return
    remove_leftover(beside)
    os.makedirs(beside, exist_ok=True)
    for name in os.listdir(source):
        if os.path.isfile(os.path.join(source, name)) and name != "trainer.pt":
            link_or_copy(os.path.join(source, name), os.path.join(beside, name))
    prepare.publish(beside, kept)


def frozen(key, where, data, device):
    """A model beside the one that is trained, such as a reference model, with as many rows for chat tokens, and without
    gradients. UserError if it has another tokenizer than the data; `key` is the key that names it."""
    from model import GPT
    directory = model_directory(where)
    if not data.tokenizer.agrees(prepare.load_tokenizer(directory)):
        raise UserError(f"{key}={where!r} has another tokenizer than the model that is trained")
    model = GPT.from_pretrained(directory)
    if model.config.vocab_size < data.vocab_size:
        model.grow(data.vocab_size)
    return model.to(device).eval().requires_grad_(False)


def rng_state(device):
    """The state of torch's generators, which draw dropout masks."""
    import torch
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if device.startswith("cuda") else None}


def set_rng_state(state, device):
    import torch
    torch.set_rng_state(state["cpu"])
    if device.startswith("cuda") and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


# -----------------------------------------------------------------------------
# log

class Log:
    """log.jsonl, W&B, TensorBoard, the progress bar and what is printed. Nothing in here ever stops a run.

    On any but the master process it does nothing.
    """

    def __init__(self, out_dir, master=True):
        self.out_dir, self.master, self.path = out_dir, master, os.path.join(out_dir, LOG)
        self.wandb_run = self.board = self.bar = None
        self.warned = set()  # the kinds of trouble that were reported: each is once

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

    def rows(self):
        """The rows of log.jsonl. A line that is none, one that a full disk cut short for example, is passed over."""
        rows = []
        with contextlib.suppress(OSError), open(self.path, encoding="utf-8", errors="replace") as f:
            for line in f:
                with contextlib.suppress(ValueError, RecursionError):
                    row = json.loads(line)
                    if isinstance(row, dict) and isinstance(row.get("step"), int):
                        rows.append(row)
        return rows

    def done(self, step, best, score_of):
        """What a run that goes on from `step` has done, by its log: the last steps evaluated and sampled, the best step
        and its score. trainer.pt knows only what was before the evaluation of its own step."""
        evaluated, sampled, best_step = -1, -1, 0
        for row in self.rows():
            if row["step"] > step:
                continue
            if row.get("event") == "sample":
                sampled = row["step"]
            with contextlib.suppress(KeyError, TypeError):  # TypeError: null stands for a number that was not finite
                score = score_of(row)
                evaluated = row["step"]
                if row["step"] > 0 and score >= best:
                    best, best_step = score, row["step"]
        return evaluated, sampled, best_step, best

    def start(self, config, step, resumed, left_out):
        """Cuts log and samples back to the step that the run goes on from, and starts the loggers."""
        if not self.master:
            return
        try:
            self._cut_back(step if resumed else -1)
        except OSError as e:
            self.warn_once("log", f"{self.path}: {first_line(e)}; training goes on, the log has a gap")
        self.wandb_run = self._start_wandb(config) if config["wandb_log"] else None
        self.board = self._start_tensorboard(step) if config["tensorboard"] else None
        more = {"left_out": left_out} if left_out else {}
        self(step, {"event": "resume" if resumed else "start", "config": config, **more})

    def _cut_back(self, step):
        """Drops rows and samples of later steps: they will be taken again."""
        if os.path.exists(self.path):
            rows = self.rows()
            if not rows and os.path.getsize(self.path):
                self.say(f"{self.path} is no log of a run; it is set aside as {set_aside(self.path)}")
            else:
                with open(self.path + ".part", "w", encoding="utf-8") as f:
                    f.writelines(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
                os.replace(self.path + ".part", self.path)
        samples = os.path.join(self.out_dir, SAMPLES)
        if os.path.exists(samples):
            with open(samples, encoding="utf-8", errors="replace", newline="") as f:
                head, *parts = re.split(r"^(?=--- step \d+ ---$)", f.read(), flags=re.MULTILINE)
            kept = [part for part in parts if int(part.split()[2]) <= step]
            if len(kept) < len(parts):
                with open(samples + ".part", "w", encoding="utf-8", newline="") as f:
                    f.write(head + "".join(kept))
                os.replace(samples + ".part", samples)

    def __call__(self, step, row):
        """A row of log.jsonl, and of W&B and TensorBoard where they run."""
        if not self.master:
            return
        # JSON has no word for a number that is not finite: null
        in_json = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(prepare.without_secrets(json.dumps({"step": step, **in_json})) + "\n")
        except OSError as e:
            self.warn_once("log", f"{self.path}: {first_line(e)}; training goes on, the log has a gap")
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        try:
            if self.wandb_run:
                self.wandb_run.log(numbers, step=step)
            if self.board:
                for key, value in numbers.items():
                    self.board.add_scalar(key, value, step)
        except Exception as e:
            self.wandb_run = self.board = None
            self.say(f"warning: W&B or TensorBoard failed, and get no more of this run: {first_line(e)}")

    def sample(self, step, text):
        """Adds a text that the model wrote to samples.txt and the log."""
        self(step, {"event": "sample", "text": text})
        try:
            with open(os.path.join(self.out_dir, SAMPLES), "a", encoding="utf-8") as f:
                f.write(f"--- step {step} ---\n{text}\n")
        except OSError as e:
            self.warn_once("samples", f"{self.out_dir}/{SAMPLES}: {first_line(e)}; training goes on")

    def _start_wandb(self, config):
        """A W&B run: online where it can be, else offline (`wandb sync` uploads it later); None where it does not start."""
        try:
            import wandb
            options = {"project": config["wandb_project"], "config": config, "dir": self.out_dir,
                       "name": config["wandb_run_name"] or os.path.basename(self.out_dir)}
            settings = {"silent": True, "init_timeout": 20}
            if "finish_timeout" in wandb.Settings.model_fields:  # a server that is gone keeps no rented machine waiting
                settings["finish_timeout"] = 120
            settings = wandb.Settings(**settings)
        except Exception as e:
            return self.say(f"warning: W&B can't be used, and gets nothing of this run: {first_line(e)}")
        try:
            if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") or wandb.api.api_key:
                return wandb.init(**options, settings=settings)
            self.say("warning: not logged in to W&B (wandb login), so it logs offline; wandb sync uploads it later")
        except Exception as e:
            self.say(f"warning: W&B did not start, so it logs offline; wandb sync uploads it later: {first_line(e)}")
        try:
            return wandb.init(**options, mode="offline", settings=settings)
        except Exception as e:
            self.say(f"warning: W&B can't log offline either, and gets nothing of this run: {first_line(e)}")

    def _start_tensorboard(self, step):
        try:
            from torch.utils.tensorboard import SummaryWriter
            return SummaryWriter(os.path.join(self.out_dir, "tensorboard"), purge_step=step)
        except ImportError:
            self.say("warning: tensorboard=True, but it is not installed (pip install tensorboard); the run goes on without")
        except Exception as e:
            self.say(f"warning: TensorBoard did not start, the run goes on without: {first_line(e)}")

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
        """out_dir/loss.png: the loss of training and of held-out data, and the learning rate."""
        if not self.master:
            return
        try:
            from matplotlib.figure import Figure
            rows = self.rows()
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            axis = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)", title=self.out_dir)
            rate = axis.twinx()
            rate.set_ylabel("learning rate")
            for ax, key, style in ((axis, "train/loss", {"alpha": 0.6}), (axis, "val/loss", {"marker": "o"}),
                                   (rate, "train/lr", {"color": "gray", "linewidth": 0.7})):
                points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
                ax.plot([x for x, _ in points], [y for _, y in points], label=key, **style)
            axis.legend()
            figure.savefig(os.path.join(self.out_dir, PLOT), dpi=120)
        except Exception as e:
            self.warn_once("plot", f"{self.out_dir}/{PLOT}: {first_line(e)}; training goes on")

    def close(self):
        self.close_bar()
        for logger, end, name in ((self.wandb_run, "finish", "W&B"), (self.board, "close", "TensorBoard")):
            if logger:
                try:
                    getattr(logger, end)()
                except Exception as e:
                    self.say(f"warning: {name} could not be closed: {first_line(e)}")
        self.wandb_run = self.board = None


class Meter:
    """Speed, memory and money of a run, for the log: since the last row, and in all."""

    def __init__(self, run, model, cost_per_hour, device, world_size):
        import torch

        from model import flops_per_token, gpu_spec
        self.cost_per_hour, self.device = cost_per_hour, device
        self.flops, self.peak = flops_per_token(model), 0  # 0: not known, and no MFU
        if device.startswith("cuda"):
            spec = gpu_spec(torch.cuda.get_device_name(device))
            self.peak = spec[0] * world_size if spec else 0
        self.mark(run)

    def mark(self, run):
        self.step, self.tokens, self.train_s = run.step, run.tokens, run.train_s

    def row(self, run, steps_left):
        seconds = max(run.train_s - self.train_s, 1e-9)
        speed = (run.tokens - self.tokens) / seconds
        hours_left = steps_left * seconds / max(run.step - self.step, 1) / 3600
        self.mark(run)
        row = {"train/tok_per_sec": speed, "cost/eta_hours": hours_left}
        if self.peak:
            row["train/mfu"] = speed * self.flops / self.peak
        if self.device.startswith("cuda"):
            import torch
            row["gpu/memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
            with contextlib.suppress(Exception):  # without NVIDIA's library for it, or on a part of a GPU
                row["gpu/utilization"] = torch.cuda.utilization(self.device)
        if self.cost_per_hour:
            spent = run.wall_s / 3600 * self.cost_per_hour
            row |= {"cost/usd_spent": spent, "cost/usd_left": hours_left * self.cost_per_hour,
                    "cost/tokens_per_dollar": run.tokens / max(spent, 1e-9)}
        return row


def evaluation_line(step, row):
    """'step    100 | val loss 1.2345 | ...'"""
    parts = [f"{key.replace('val/loss', 'val loss').removeprefix('val/')} {value:.4f}" for key, value in row.items()
             if not key.endswith("ppl")]
    return " | ".join([f"step {step:6,d}", *parts])


def step_line(step, row):
    """'step    100 | loss 1.2345 | 20,000 tok/s | 0:01:23 left'"""
    parts = [f"step {step:6,d}", f"loss {row['train/loss']:.4f}"]
    if math.isnan(row["train/loss"]):
        parts[1] = "no signal"
    for key, name in (("rewards/accuracies", "reward accuracy"), ("reward/mean", "reward")):
        if key in row:
            parts.append(f"{name} {row[key]:.3f}")
    seconds = int(row["cost/eta_hours"] * 3600)
    parts += [f"{row['train/tok_per_sec']:,.0f} tok/s", f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"]
    if "cost/usd_spent" in row:
        parts.append(f"${row['cost/usd_spent']:.2f} spent")
    return " | ".join(parts)


# -----------------------------------------------------------------------------
# checkpoints

def in_memory(value):
    """A copy on the CPU that later steps leave alone."""
    import torch
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: in_memory(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [in_memory(item) for item in value]
    return value


class Checkpoints:
    """out_dir/step_*: copied to memory while training waits, written by a thread, whole or not at all, rotated, mirrored."""

    def __init__(self, out_dir, keep, log, best_step=0):
        self.out_dir, self.keep, self.log, self.mirrors = out_dir, keep, log, []
        self.thread, self.jobs = concurrent.futures.ThreadPoolExecutor(1), []
        if best_step and is_checkpoint(self.path(best_step)) and not self.best_is(best_step):
            self.link_best(best_step)  # the run was killed before it could

    def path(self, step):
        return os.path.join(self.out_dir, f"step_{step:06d}")

    def save(self, model, tokenizer, trainer, ends, hf_layout=True):
        """Starts writing a checkpoint of the step trainer['run']['step']."""
        begun = time.perf_counter()
        self.wait()  # never two copies in memory
        weights = model.state_dict()
        if model.head.weight is model.embed.weight:  # copied once
            del weights["head.weight"]
        weights, trainer = in_memory(weights), in_memory(trainer)
        waited = time.perf_counter() - begun

        def write(directory):
            import torch
            generation = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
            model.save_pretrained(directory, hf_layout, generation, weights)
            tokenizer.save(directory)
            torch.save(trainer, os.path.join(directory, "trainer.pt"))

        self.jobs.append(self.thread.submit(self._write, trainer["run"]["step"], write, waited))

    def _write(self, step, write, waited):
        """Written beside, synced, renamed: a directory under its final name is whole."""
        target, beside = self.path(step), os.path.join(self.out_dir, f".writing.step_{step:06d}")
        try:
            remove_leftover(beside)
            write(beside)
            make_way(target)
            prepare.publish(beside, target)
            size = sum(os.path.getsize(os.path.join(target, name)) for name in os.listdir(target))
            self.log(step, {"event": "checkpoint", "path": target, "bytes": size, "training_waited_s": waited})
        except Exception as e:  # a full disk, most often: training goes on, and the one before stays whole
            remove_leftover(beside)
            before = "the one before it stays" if checkpoints(self.out_dir) else "there is none before it"
            self.log.say(f"warning: {target} could not be written, {before}: {first_line(e)} "
                         f"({shutil.disk_usage(self.out_dir).free / 1e6:,.1f} MB are free)")
            self.log(step, {"event": "checkpoint failed", "path": target, "error": first_line(e)})
        self.rotate()
        for mirror in self.mirrors:
            mirror.news.set()

    def link_best(self, step):
        """best/ becomes the checkpoint of this step: the same files under a second name cost no space."""
        self.jobs.append(self.thread.submit(self._link_best, step))

    def _link_best(self, step):
        source, best = self.path(step), os.path.join(self.out_dir, "best")
        beside = os.path.join(self.out_dir, ".writing.best")
        if not is_checkpoint(source):  # it could not be written, which was said
            return
        try:
            remove_leftover(beside)
            os.makedirs(beside, exist_ok=True)
            for name in os.listdir(source):
                link_or_copy(os.path.join(source, name), os.path.join(beside, name))
            make_way(best)
            prepare.publish(beside, best)
            self.log(step, {"event": "best", "path": best})
        except Exception as e:
            remove_leftover(beside)
            self.log.warn_once("best", f"{best} could not become {source}: {first_line(e)}; training goes on")
        for mirror in self.mirrors:
            mirror.news.set()

    def best_is(self, step):
        """Whether best/ is the checkpoint of this step, which is there: the same files, or copies of them."""
        weights = [os.path.join(d, "model.safetensors") for d in (os.path.join(self.out_dir, "best"), self.path(step))]
        if not all(os.path.exists(w) for w in weights):
            return False
        return os.path.samefile(*weights) or prepare.sha256(weights[0]) == prepare.sha256(weights[1])

    def rotate(self):
        """All but the newest `keep` go, as soon as every mirror has them, or at once where the disk is nearly full."""
        saved = checkpoints(self.out_dir)
        for old in saved[:-self.keep] if self.keep else []:
            if not is_checkpoint(old):
                self.log.warn_once(old, f"{old} holds files that no run wrote, so it stays")
                continue
            lacking = [mirror for mirror in self.mirrors if mirror.lacks(old)]
            if lacking:
                size = sum(os.path.getsize(os.path.join(old, name)) for name in os.listdir(old))
                if shutil.disk_usage(self.out_dir).free >= 4 * size:
                    continue
                self.log(int(old[-6:]), {"event": "upload dropped", "path": old})
                self.log.warn_once("dropped", f"the disk is nearly full and uploads fall behind: {old} is not uploaded")
            with contextlib.suppress(OSError):
                remove_checkpoint(old)

    def wait(self):
        """Until everything is written."""
        concurrent.futures.wait(self.jobs)
        self.jobs = []

    def finish(self, tries, stop):
        """Waits for what is under way; uploads and copies that fail have `tries` left, one after Ctrl-C. Returns whether
        every mirror has all that it should."""
        self.wait()
        for mirror in self.mirrors:
            mirror.close(tries)
        if any(mirror.thread.is_alive() for mirror in self.mirrors):
            again = "again" if stop.signal else "twice"
            self.log.say(f"waiting for uploads and copies under way; Ctrl-C {again} leaves without them")
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
    """Keeps a place beyond this machine (the Hub, a mounted drive) equal to what a run has saved, in a thread of its own, so
    that training never waits.

    Each turn compares what should be there with what is. So a first try, a retry, and the first turn of a run that was killed
    and resumed are one and the same, and nothing has to be remembered on the disk.
    """

    def __init__(self, place, log):
        self.place, self.log = place, log
        self.sent, self.news = set(), threading.Event()
        self.tries_left, self.closing, self.complete = 0, False, False
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def lacks(self, checkpoint):
        """Whether the place is still to receive this checkpoint."""
        return self.thread.is_alive() and checkpoint in self.place.wanted() and checkpoint not in self.sent

    def close(self, tries):
        """Training has ended: what fails from now on has `tries` left."""
        self.tries_left, self.closing = tries, True
        self.news.set()

    def _work(self):
        pause = 1
        while True:
            closing = self.closing  # read first: whatever is saved before closing is seen by this turn
            self.news.clear()
            try:
                self._turn()
                pause = 1
                if closing:
                    self.complete = True
                    return
                self.news.wait()
            except Refused as e:
                self.log.warn_once(self.place.event, f"{self.place.name}: {e}")
                return
            except Exception as e:  # no network, a full drive: a matter of time
                self.log.warn_once(self.place.event, f"{self.place.name}: {self.current}: {first_line(e)}; it is tried again, "
                                   "training goes on")
                self.log(self.place.step_of(self.current), {
                    "event": f"{self.place.event} failed", "path": self.current, "error": first_line(e)})
                if self.closing:
                    self.tries_left -= 1
                    if self.tries_left <= 0:
                        return
                    time.sleep(pause)
                    pause *= 2
                elif self.news.wait(pause):
                    pause = 1
                else:
                    pause = min(2 * pause, 60)

    def _turn(self):
        self.current = self.place.name
        self.place.open()
        for item in self.place.wanted():
            if item not in self.sent:
                self.current, begun = self.place.path_of(item), time.perf_counter()
                if self.place.put(item):
                    self.log(self.place.step_of(item), {"event": self.place.event, "path": self.current,
                                                        "seconds": time.perf_counter() - begun})
                self.sent.add(item)
        self.current = self.place.name
        self.place.put_beside()


class Hub:
    """A repository of the Hugging Face Hub: every checkpoint under checkpoints/, and the final model at its root."""
    event, FINAL = "upload", "the final model"

    def __init__(self, out_dir, repo, private):
        self.out_dir, self.repo, self.private, self.name = out_dir, repo, private, f"hf_repo={repo}"
        self.api, self.final, self.has_final = None, {}, False

    def step_of(self, item):
        return int(item[-6:]) if re.search(r"step_\d{6,}$", item) else self.final.get("step", 0)

    def open(self):
        """The client, without bars and warnings of its own. The repository is made at once, so that a token that may not
        write is reported at the start and not at the first checkpoint."""
        if self.api:
            return
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import disable_progress_bars, logging
        disable_progress_bars()
        logging.set_verbosity_error()
        prepare.hide("HF_TOKEN", get_token())  # `hf auth login` keeps one too, elsewhere than in the environment
        api = HfApi()
        with contextlib.suppress(OSError):  # no network yet
            self._ask(api.create_repo, self.repo, private=self.private, exist_ok=True)
        self.api = api

    def _ask(self, call, *args, **options):
        """Calls the client; Refused where the answer is final, not a matter of time."""
        try:
            return call(*args, **options)
        except Exception as e:
            status = getattr(getattr(e, "response", None), "status_code", 0)
            if 400 <= status < 500 and status not in (404, 408, 409, 412, 429):
                raise Refused(f"the Hub refuses ({status}), so nothing more is uploaded; training goes on. Check that HF_TOKEN "
                              f"is right and may write there: {first_line(e)}") from None
            if status == 404 and call == self.api.get_paths_info:
                return []  # the repository is not there yet
            raise OSError(first_line(e)) from None

    def wanted(self):
        return checkpoints(self.out_dir) + ([self.FINAL] if self.final else [])

    def path_of(self, item):
        return self.repo if item == self.FINAL else f"{self.repo}/checkpoints/{os.path.basename(item)}"

    def put_final(self, step, folder, card):
        """From now on the final model is wanted, too: the model's files of a checkpoint, a card, and the plot."""
        files = {name: os.path.join(folder, name) for name in os.listdir(folder) if name != "trainer.pt"}
        plot = os.path.join(self.out_dir, PLOT)
        if os.path.exists(plot):
            files[PLOT] = plot
        self.final = {"step": step, "files": files | {"README.md": card.encode()}}

    def put(self, item):
        """Uploads a checkpoint or the final model in one commit. False if the Hub, asked, has it already; raises unless it
        has it afterwards."""
        from huggingface_hub import CommitOperationAdd
        if item == self.FINAL:
            prefix, files = "", self.final["files"]
        else:
            prefix = f"checkpoints/{os.path.basename(item)}/"
            files = {name: os.path.join(item, name) for name in os.listdir(item)}
        files = {prefix + name: source for name, source in files.items()}
        if item != self.FINAL and self._confirms(files, prefix):
            return False
        self._ask(self.api.create_repo, self.repo, private=self.private, exist_ok=True)
        self._ask(self.api.create_commit, self.repo, [CommitOperationAdd(path, source) for path, source in files.items()],
                  commit_message=prefix.rstrip("/") or "Final model")
        if not self._confirms(files, prefix):
            raise OSError("what is on the Hub is not what was sent")
        self.has_final = self.has_final or item == self.FINAL
        return True

    def report(self):
        if self.has_final:
            return f"the final model is at {self.api.endpoint}/{self.repo}"
        return f"the final model is not on the Hub but in {self.out_dir}; the same command tries again"

    def _confirms(self, files, prefix):
        """Whether the Hub, asked, has every file in its size, and the weights with their SHA-256."""
        sizes = {path: len(source) if isinstance(source, bytes) else os.path.getsize(source) for path, source in files.items()}
        there = {entry.path: entry for entry in self._ask(self.api.get_paths_info, self.repo, list(sizes))}
        if sizes != {path: there[path].size for path in sizes if path in there}:
            return False
        weights = there.get(prefix + "model.safetensors")
        if not weights or not weights.lfs:
            return False
        return weights.lfs.sha256 == prepare.sha256(files[prefix + "model.safetensors"])

    def put_beside(self):
        pass


class Backup:
    """A directory on a slow mount that holds the newest checkpoints, and what a run has beside them."""
    event = "backup"

    def __init__(self, out_dir, directory, keep):
        self.out_dir, self.directory, self.keep = out_dir, directory, keep
        self.name = f"backup_dir={os.path.dirname(directory)}"
        self.best = None

    def step_of(self, item):
        return int(item[-6:]) if re.search(r"step_\d{6,}$", item) else 0

    def open(self):
        os.makedirs(self.directory, exist_ok=True)

    def wanted(self):
        return checkpoints(self.out_dir)[-self.keep:]  # keep 0: all

    def path_of(self, item):
        return os.path.join(self.directory, os.path.basename(item))

    def put(self, item):
        """Copies a checkpoint, whole or not at all; the oldest ones go. False if it is there already."""
        target = self.path_of(item)
        sizes = {name: os.path.getsize(os.path.join(item, name)) for name in os.listdir(item)}
        if os.path.isdir(target):
            there = {name: os.path.getsize(os.path.join(target, name)) for name in os.listdir(target)}
            if there == sizes:
                return False
        make_way(target)
        prepare.copy_whole(item, target)
        for old in checkpoints(self.directory)[:-self.keep] if self.keep else []:
            if is_checkpoint(old):
                remove_checkpoint(old)
        return True

    def put_beside(self):
        """The log, samples and plot; best/ if it has changed, and start/."""
        prepare.copy_files(self.out_dir, self.directory, [LOG, SAMPLES, PLOT])
        best, start = (os.path.join(self.out_dir, name) for name in ("best", "start"))
        if is_checkpoint(best):
            weights = os.stat(os.path.join(best, "model.safetensors"))
            if self.best != (weights.st_ino, weights.st_mtime_ns):
                make_way(os.path.join(self.directory, "best"))
                prepare.copy_whole(best, os.path.join(self.directory, "best"))
                self.best = (weights.st_ino, weights.st_mtime_ns)
        if os.path.isdir(start) and not os.path.exists(os.path.join(self.directory, "start")):
            prepare.copy_whole(start, os.path.join(self.directory, "start"))


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

# what a card does not say: where things lie on this machine, and what is nobody's business
PRIVATE = ("out_dir", "data_dir", "backup_dir", "init_from", "hf_repo", "hf_private", "terminate_pod", "terminate_on_error",
           "wandb_log", "wandb_project", "wandb_run_name", "tensorboard", "dry_run", "gpu", "mfu", "gpu_cost_per_hour")


def model_card(config, keys, model, loads_in_transformers, run, rows):
    """README.md of the Hub repository, from the run's own config and log."""
    step, stage, repo, dataset = run.step, config["stage"], config["hf_repo"], config["dataset"]
    goal, choose = ("val/pass@1", max) if stage == "rlvr" else ("val/loss", min)
    measured = [(row["step"], row[goal]) for row in rows if isinstance(row.get(goal), (int, float))] or [(step, math.nan)]
    best_step, best_value = choose(measured, key=lambda m: m[1])
    losses = [row["train/loss"] for row in rows if isinstance(row.get("train/loss"), (int, float))] or [math.nan]
    known = [prepare.KNOWN.get(name, {}) for name, _ in prepare.parse_mixture(dataset)]
    sources = [entry["hub"] for entry in known if "hub" in entry]
    origin = config["init_from"]
    local = origin == "scratch" or os.path.exists(origin) or origin.startswith((".", "/", "out/"))
    base = "" if local else origin  # a Hub id
    head = {"library_name": "transformers" if loads_in_transformers else "nanosmol", "pipeline_tag": "text-generation",
            "tags": ["nanosmol", stage], "base_model": base, "datasets": sources}
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items() if value)
    settings = "\n".join(f"{key} = {config[key]!r}" for key in keys
                         if key not in PRIVATE and not str(config[key]).startswith(("/", "~")))
    usage = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```

In nanosmol:"""
    if not loads_in_transformers:
        usage = "In nanosmol, since transformers has no architecture like this one:"
    made_from = f", from {base}" if base else ""
    data = f"{dataset} ({', '.join(sources)})" if sources else dataset
    return f"""---
{front}
---

# {repo.split('/')[1]}

{model.n_params():,} parameters, trained with nanosmol ({stage}{made_from}) for {step:,} steps on {run.tokens:,} tokens of {data}. \
The weights are those of the last step; `checkpoints/` holds earlier ones, with the state of their optimizers.

| | step | |
|---|---|---|
| {goal} at the end | {measured[-1][0]:,} | {measured[-1][1]:.4f} |
| {goal} at its best | {best_step:,} | {best_value:.4f} |
| train/loss at the end | {step:,} | {losses[-1]:.4f} |

![loss](loss.png)

{usage}

    python sample.py --init_from={repo}

The run's config, as nanosmol reads it:

```python
{settings}
```
"""


# -----------------------------------------------------------------------------
# signals, the pod, the end

class StopSignal:
    """SIGINT, SIGTERM and SIGHUP (a closed terminal) end the step, and a checkpoint is written. A second one ends the
    process at once. `signal` is the name of the one that came, or ''."""

    def __init__(self):
        self.signal = ""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup ignores it
                signal.signal(number, self._receive)

    def _receive(self, number, frame):
        if self.signal and signal.Signals(number).name != "SIGHUP":  # a terminal that closes may send it twice
            os._exit(130)
        self.signal = signal.Signals(number).name


def on_a_pod(config):
    return config["terminate_pod"] and bool(os.environ.get("RUNPOD_POD_ID"))


class Pod:
    """The RunPod machine that the run is on. Terminating it deletes its disk, so the Hub has to have the model; stopping it
    keeps /workspace."""

    def __init__(self, config, log, stop):
        self.id, self.log, self.stop = os.environ["RUNPOD_POD_ID"], log, stop
        if not config["hf_repo"]:
            log.say("RunPod: without hf_repo the pod is stopped at the end, not terminated")
        if not os.path.realpath(config["out_dir"]).startswith("/workspace/"):
            log.say(f"warning: out_dir={config['out_dir']} is not in /workspace, and nothing else outlives a pod that is "
                    "stopped")
        if not os.environ.get("RUNPOD_API_KEY"):
            log.say("warning: terminate_pod=True, but there is no RUNPOD_API_KEY: the pod will run on, and cost, after the end")

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
        self.say(f"could not {how} pod {self.id}, which runs on, and costs: {trouble}. End it at "
                 "https://console.runpod.io/pods")

    def say(self, text):
        print(f"RunPod: {prepare.without_secrets(text)}", flush=True)  # whichever process crashed


def finish_on_crash(save_last_step, checkpoints, log, stop, pod, terminate_on_error):
    """Makes sys.excepthook finish a run that crashed: the last good step is saved if it can be, what is under way is written
    and uploaded, and the pod is stopped."""
    report = sys.excepthook

    def finish(kind, error, traceback):
        report(kind, error, traceback)
        try:
            if not isinstance(error, UserError):
                save_last_step()
        except BaseException as e:
            print(f"the last step could not be saved: {first_line(e)}", file=sys.stderr)
        log.wandb_run = log.board = None  # they may be what raised
        if checkpoints:
            checkpoints.finish(tries=1, stop=stop)
        if pod and terminate_on_error == "stop" and not stop.signal:
            pod.end("stop", step=0)

    sys.excepthook = finish


# -----------------------------------------------------------------------------
# what a run prints at its start and its end

def headline(model, data, config, sequences, attention, say):
    block_size = model.config.block_size
    amount = f"x {block_size} = {sequences * block_size:,} tokens"
    if config["stage"] == "dpo":
        amount = "pairs"
    if config["stage"] == "rlvr":
        amount = f"prompts x {config['group_size']} completions"
    apart = ", documents apart" if config["doc_mask"] else ""
    say(f"{model.n_params() / 1e6:.2f}M parameters; {config['dataset']}: {data.amount}; {config['max_iters']:,} steps of "
        f"{sequences} {amount}")
    say(f"{config['out_dir']}: {model.embed.weight.device}, {config['dtype']}, {config['optimizer']}, attention: {attention}{apart}")


def samples(model, data, config, count, autocast, log):
    """Texts that begin with sample_start, or after the first stage answer it. They are for show: what fails here is a
    warning."""
    import torch
    try:
        start, tokenizer = config["sample_start"], data.tokenizer
        prompt, shown = tokenizer.encode(start) or [tokenizer.eos_id], start
        if config["stage"] != "pretrain":
            chat = [{"role": "user", "content": start}]
            prompt, shown = prepare.render_chat(chat, tokenizer, add_generation_prompt=True)[0], f"> {start}\n"
        length = max(1, min(200, model.config.max_positions - len(prompt)))
        idx = torch.tensor([prompt] * count, device=model.embed.weight.device)
        with autocast():
            rows = model.generate(idx, length, temperature=0.8, top_k=200, seed=config["seed"], stop=data.ends).tolist()
        texts = []
        for ids in rows:
            ids = ids[len(prompt):]
            end = next((i for i, token in enumerate(ids) if token in data.ends), len(ids))
            texts.append(shown + tokenizer.decode(ids[:end]))
        return texts
    except Exception as e:
        log.warn_once("sample", f"no sample could be made: {first_line(e)}; training goes on")
        return []


def last_checkpoint(out_dir, run, max_bad_steps, max_rollbacks):
    """The checkpoint to roll back to; UserError if there is none, or after max_rollbacks."""
    saved = checkpoints(out_dir)
    if saved and run.rollbacks < max_rollbacks:
        return saved[-1]
    kept = f"{saved[-1]} is whole" if saved else "there is no checkpoint yet to go back to"
    raise UserError(f"{max_bad_steps} bad steps in a row after step {run.step} and {run.rollbacks} rollbacks; {kept}. Lower "
                    "the learning rate, or look at the data")


def command():
    """The command line of this process as a list, but for --init_from=scratch, which would start over."""
    head = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        head = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    return head + [arg for arg in sys.argv if arg != "--init_from=scratch"]


def summary(config, run, is_saved):
    """The end of a finished run, with what to type next."""
    out_dir, name = config["out_dir"], "pass@1" if config["stage"] == "rlvr" else "val loss"
    lines = [f"--- {run.step:,} steps, {run.tokens:,} tokens in {run.train_s:.0f} s of training: best {name} "
             f"{abs(run.best[0]):.4f} ---", f"the loss, drawn      {os.path.join(out_dir, PLOT)}"]
    if is_saved:
        sample = ["python", "sample.py", f"--out_dir={out_dir}", f"--start={config['sample_start'] or 'Once upon a time'}"]
        longer = [arg for arg in command() if not arg.startswith("--max_iters=")] + [f"--max_iters={2 * config['max_iters']}"]
        lines += [f"write more           {shlex.join(sample)}", f"train longer         {shlex.join(longer)}"]
    return "\n".join(lines)


def how_to_resume(stopped_by, step, max_iters, is_saved):
    saved = "which is saved" if is_saved else "which is not saved"
    return (f"{stopped_by or 'a signal'}: stopped after step {step:,} of {max_iters:,}, {saved}. To go on:\n"
            f"  {shlex.join(command())}")
