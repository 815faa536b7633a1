"""runs.py part by part, in milliseconds: where a run begins, log, checkpoints, mirrors, pod."""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import sys
import threading
import types

import pytest
import torch
from stand_ins import SECRETS, Liar, Outside

import prepare
import runs
from model import GPT, GPTConfig

WEIGHTS = b"weights " * 20
FULL = OSError(errno.ENOSPC, "No space left on device")


def checkpoint(run, step, weights=WEIGHTS):
    """A directory with the files of a checkpoint, and not a model in it."""
    path = run / f"step_{step:06d}"
    path.mkdir(parents=True)
    files = {"config.json": b"{}", "model.safetensors": weights, "trainer.pt": b"state %d" % step}
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def steps(run):
    return [runs.step_of(path) for path in runs.checkpoints(run)]


class Rows(runs.Log):
    """A log that also remembers what it was given."""

    def __init__(self, out_dir, **options):
        super().__init__(str(out_dir), **options)
        self.said, self.logged = [], []

    def say(self, text):
        self.said.append(text)

    def __call__(self, step, row):
        self.logged.append((row.get("event"), step, row.get("path")))
        super().__call__(step, row)

    def events(self):
        return [event for event, _, _ in self.logged]


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


# --- directories


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (999_000, 1_000_000, 20):
        checkpoint(tmp_path, step)
    for name in ("step_20", "step_000030.damaged", ".writing.step_000040", "best"):
        (tmp_path / name).mkdir()
    assert steps(tmp_path) == [20, 999_000, 1_000_000]
    assert runs.step_of("me/tiny") == 0 and runs.checkpoints(str(tmp_path / "none")) == []


def test_what_is_set_aside_takes_the_first_free_name(tmp_path):
    for _ in range(2):
        (tmp_path / "toy").mkdir()
        runs.set_aside(f"{tmp_path}/toy/")  # as a shell completes it
    assert sorted(os.listdir(tmp_path)) == ["toy~1", "toy~2"]


def test_models_are_found_by_directory_run_or_id(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "toy", 10)
    assert runs.model_directory(str(path)) == str(path)
    assert runs.model_directory(str(tmp_path / "toy")) == str(path)
    assert runs.newest_run(str(tmp_path)) == str(tmp_path / "toy")
    monkeypatch.setattr(prepare, "fetch_model", "fetched {}".format)
    assert runs.model_directory("me/tiny") == "fetched me/tiny"
    for where, said in ((str(tmp_path), "nor a run"), ("out/gone", "no such directory")):
        with pytest.raises(runs.UserError, match=said):
            runs.model_directory(where)
    with pytest.raises(runs.UserError, match="no run with a checkpoint yet"):
        runs.newest_run(str(tmp_path / "none"))


def test_what_a_kill_left_is_cleaned_and_a_users_files_stay(tmp_path):
    for name in (".writing.step_000010", ".deleting.step_000005", ".writing.best", ".start.part"):
        checkpoint(tmp_path, 1).rename(tmp_path / name)
    (tmp_path / ".deleting.step_000005" / "notes.txt").write_text("mine")
    for name in (".writing.book", ".best"):  # no names of ours
        checkpoint(tmp_path, 1).rename(tmp_path / name)
    checkpoint(tmp_path, 1).rename(tmp_path / ".best.replaced")  # killed between two renames
    elsewhere = checkpoint(tmp_path / "elsewhere", 7)
    (tmp_path / ".deleting.step_000007").symlink_to(elsewhere)
    runs.clean(str(tmp_path))
    left = {".deleting.step_000005", ".deleting.step_000007", ".writing.book", ".best", "best"}
    assert set(os.listdir(tmp_path)) == left | {"elsewhere"}
    assert os.listdir(tmp_path / ".deleting.step_000005") == ["notes.txt"]
    assert len(os.listdir(elsewhere)) == 3 and len(os.listdir(tmp_path / "best")) == 3


# --- where a run begins


def asks(tmp_path, **given):
    """(config, setup) as train.py has them; keys with a leading underscore stand in a config."""
    config = {"out_dir": str(tmp_path / "out"), "init_from": "scratch", "stage": "pretrain"}
    config |= {"hf_repo": "", "hf_private": False, "backup_dir": "", "keep_checkpoints": 2}
    config |= {"eval_only": False, "dtype": "auto", "data_dir": str(tmp_path / "data")}
    config |= {"batch_size": 12, "gradient_accumulation_steps": 1}
    from_files = {key[1:]: value for key, value in given.items() if key[0] == "_"}
    typed = {key: value for key, value in given.items() if key[0] != "_"}
    config |= from_files | typed
    origin = dict.fromkeys(from_files, "config") | dict.fromkeys(typed, "command line")
    return config, types.SimpleNamespace(given=origin, from_files=from_files, keys=list(config))


@pytest.fixture
def loads(monkeypatch):
    """runs.load without torch: a checkpoint is whole if its weights are WEIGHTS."""

    def load(path, say):
        with open(os.path.join(path, "model.safetensors"), "rb") as f:
            if f.read() == WEIGHTS:
                return "a model", {"config": {"init_from": "out/sft", "dtype": "float32"}}
        say(f"warning: {path} is damaged and passed over: short")
        return None, None

    monkeypatch.setattr(runs, "load", load)


def test_the_newest_whole_checkpoint_is_resumed(tmp_path, out, loads):
    said = []
    checkpoint(out, 10), checkpoint(out, 20), checkpoint(out, 30, b"short")
    start = runs.find(*asks(tmp_path, _init_from="out/other"), said.append)
    assert start.checkpoint == str(out / "step_000020") and start.init_from == "out/sft"
    assert start.damaged == [str(out / "step_000030")] and "step_000030 is damaged" in said[0]
    assert not start.start_over
    for path in (out / "step_000010", out / "step_000020"):
        (path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(
        runs.UserError, match="no checkpoint is whole; .*--init_from=scratch to set"
    ):
        runs.find(*asks(tmp_path), said.append)


def test_init_from_on_the_command_line_is_an_order(tmp_path, out, loads):
    assert runs.find(*asks(tmp_path), print).init_from == "scratch"
    with pytest.raises(runs.UserError, match="no run to resume"):
        runs.find(*asks(tmp_path, init_from="resume"), print)
    with pytest.raises(runs.UserError, match="stage='dpo' starts from a model"):
        runs.find(*asks(tmp_path, stage="dpo"), print)
    model = str(checkpoint(tmp_path / "sft", 5))
    checkpoint(out, 10)
    config, setup = asks(tmp_path, _init_from=model, init_from="scratch")
    setup.from_files["init_from"] = model
    start = runs.find(config, setup, print)
    assert start.start_over and start.checkpoint == model and start.state is None
    start = runs.find(*asks(tmp_path, init_from=model, eval_only=True), print)
    assert start.checkpoint == model and start.state is None  # that model is measured
    assert runs.find(*asks(tmp_path, init_from="resume", eval_only=True), print).state


def test_a_run_keeps_the_dtype_that_it_began_with(tmp_path, out, loads):
    def dtype(**given):
        config, setup = asks(tmp_path, **given)
        return runs.began_with("dtype", config, setup, runs.find(config, setup, print))

    assert dtype() == "auto"
    (out / "log.jsonl").write_text('{"step": 0, "config": {"dtype": "bfloat16"}}\n')
    assert dtype() == "bfloat16"  # killed before its first checkpoint
    checkpoint(out, 10)
    assert dtype() == "float32" and dtype(dtype="float16") == "float16"
    assert dtype(init_from="scratch") == "auto"


def stub_data(**more):
    tokenizer = prepare.load_tokenizer("byte")
    values = {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer, "fingerprint": "f"}
    return types.SimpleNamespace(**values | more)


def tiny_config(**keys):
    shape = {"n_layer": 1, "n_head": 1, "n_kv_head": 1, "head_dim": 0, "n_embd": 16, "ffn_dim": 16}
    return vars(GPTConfig(**shape | {"block_size": 8, "vocab_size": 257} | keys))


def test_another_run_is_refused_by_name(tmp_path):
    same = {"stage": "pretrain", "dataset": "t", "seed": 1, "doc_mask": True, "optimizer": "muon"}
    config, setup = asks(tmp_path, **same | tiny_config())
    setup.given = {}
    before = config | {"learning_rate": 1.0}
    start = types.SimpleNamespace(state={"config": before, "fingerprint": "f"}, init_from="scratch")
    start.checkpoint, start.model = "out/step_000010", "a model"
    said = []
    changed = config | {"keep_checkpoints": 9, "learning_rate": 1.0}
    assert runs.open_model(start, changed, setup, stub_data(), said.append) == "a model"
    assert said == ["resuming out/step_000010", "changed since: keep_checkpoints 2 -> 9"]
    for key, value in {"n_layer": 2, "dataset": "u", "stage": "sft"}.items():
        with pytest.raises(runs.UserError, match=f"holds a run with {key}=.*asks for {value!r}"):
            runs.open_model(start, config | {key: value}, setup, stub_data(), print)
    with pytest.raises(runs.UserError, match="t: the data changed since the run in"):
        runs.open_model(start, config, setup, stub_data(fingerprint="g"), print)
    setup.given = {"init_from": "command line"}
    with pytest.raises(runs.UserError, match="init_from='scratch', this one asks for 'out/toy'"):
        runs.open_model(start, config | {"init_from": "out/toy"}, setup, stub_data(), print)


def test_weights_bring_their_shape(tmp_path):
    model = GPT(GPTConfig(**tiny_config()))
    model.save_pretrained(tmp_path / "m")
    start = types.SimpleNamespace(state=None, init_from="m", checkpoint=str(tmp_path / "m"))
    config, setup = asks(tmp_path, stage="sft", dataset="t", **tiny_config(block_size=4))
    setup.given = {"block_size": "config", "init_std": "config"}
    grown = runs.open_model(
        start, config | {"init_std": 9.0}, setup, stub_data(vocab_size=259), print
    )
    assert grown.config.vocab_size == 259 and grown.config.block_size == 4
    assert torch.equal(grown.embed.weight[:257], model.embed.weight)
    for key, value, said in (("n_layer", 3, "n_layer=3 was"), ("block_size", 99, "is beyond the")):
        setup.given = {key: "command line"}
        with pytest.raises(runs.UserError, match=said):
            runs.open_model(start, config | {key: value}, setup, stub_data(), print)


def claim(config, setup, say=print, lock=False):
    """As a process would; here, in one that goes on, the lock would last."""
    start = runs.find(config, setup, say)
    with pytest.MonkeyPatch.context() as patch:
        if not lock:
            patch.setattr(runs, "lock", os.path.isdir)
        runs.claim(config, start, say)
    return start


def test_a_first_run_may_ask_to_start_over(tmp_path):
    """There is nothing to set aside, and the lock is taken once."""
    claim(*asks(tmp_path, init_from="scratch"), lock=True)
    assert os.listdir(tmp_path) == ["out"]


def test_an_old_run_is_set_aside_with_its_backup(tmp_path, out, loads):
    (tmp_path / "drive").mkdir()
    checkpoint(out, 10), checkpoint(tmp_path / "drive" / "out", 10)
    config, setup = asks(tmp_path, init_from="scratch", backup_dir=str(tmp_path / "drive"))
    runs.restore_backup(config, setup, print)
    said = []
    claim(config, setup, said.append)
    assert steps(tmp_path / "out~1") == [10] and steps(tmp_path / "drive" / "out~1") == [10]
    assert os.listdir(out) == [] and len(said) == 2
    claim(*asks(tmp_path, init_from="scratch"))  # no run in it, so nothing is set aside
    assert sorted(os.listdir(tmp_path)) == ["drive", "out", "out~1"]


def test_the_working_directory_is_not_set_aside(tmp_path, out, loads, monkeypatch):
    checkpoint(out, 10), checkpoint(tmp_path / "drive" / "out", 10)
    (out / "inside").mkdir()
    for cwd in (out, out / "inside"):
        monkeypatch.chdir(cwd)
        with pytest.raises(runs.UserError, match="so it can't be set aside"):
            claim(*asks(tmp_path, init_from="scratch", backup_dir=str(tmp_path / "drive")))
        assert steps(out) == steps(tmp_path / "drive" / "out") == [10]


def test_two_trainings_in_one_directory(tmp_path, out, loads):
    fcntl = pytest.importorskip("fcntl")
    checkpoint(out, 10)
    start = runs.find(*asks(tmp_path), print)
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    for more in ({}, {"init_from": "scratch"}):
        with pytest.raises(runs.UserError, match="another training is under way in it"):
            claim(*asks(tmp_path, **more), lock=True)
    os.close(handle)
    checkpoint(out, 20)  # the other one ended while this one was loading its data
    with pytest.raises(runs.UserError, match="another training went on in it just now"):
        runs.claim(asks(tmp_path)[0], start, print)
    assert steps(out) == [10, 20]


def test_a_directory_that_cannot_be_written_is_refused_at_the_start(tmp_path, out, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(runs.UserError, match="out_dir=.*: not a directory"):
        runs.check(asks(tmp_path, out_dir=str(tmp_path / "file"))[0])
    with pytest.raises(runs.UserError, match="not a directory|Not a directory"):
        claim(*asks(tmp_path, out_dir=str(tmp_path / "file" / "toy")))

    def read_only(**options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(runs.tempfile, "TemporaryFile", read_only)
    with pytest.raises(runs.UserError, match="can't be written: .*Read-only file system"):
        claim(*asks(tmp_path))


def test_places_that_cannot_be_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for key, value, said in (
        ("hf_repo", "tiny", "hf_repo='tiny': expected the id of a Hub repository, owner/name"),
        ("backup_dir", "no/drive/x", "no/drive does not exist; mount the drive first"),
        ("backup_dir", "file", "backup_dir='file': not a directory"),
        ("backup_dir", str(tmp_path), "the backup would be out_dir itself"),
    ):
        with pytest.raises(runs.UserError, match=said):
            runs.check(asks(tmp_path, **{key: value})[0])
    config = asks(tmp_path, out_dir=".", backup_dir="/drive")[0]
    assert runs.backup_of(config) == os.path.join("/drive", tmp_path.name)


def test_a_users_directory_is_refused_and_nothing_is_touched(tmp_path, out):
    """Whatever has the name of something that a run replaces; a start/ would only be set aside."""
    (tmp_path / "drive").mkdir()
    for place in (out, tmp_path / "drive" / "out"):
        for name in ("samples.txt", "loss.png", "log.jsonl", "best/n.txt", "step_000010/n.txt"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text("mine")
            for more in ({}, {"init_from": "scratch"}):
                asked = asks(tmp_path, backup_dir=str(tmp_path / "drive"), **more)
                with pytest.raises(
                    runs.UserError, match=f"{place} holds {name.split('/')[0]}, but"
                ):
                    claim(*asked)
            assert (place / name).read_text() == "mine"
            shutil.rmtree(place)
    out.mkdir()
    for name in ("notes.txt", "start/n.txt", "step_10/n.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    (out / "log.jsonl").touch()  # of a run that began on a full disk
    claim(*asks(tmp_path, init_from="scratch"))
    assert sorted(os.listdir(out)) == ["log.jsonl", "notes.txt", "start", "step_10"]


def test_damaged_checkpoints_are_set_aside(tmp_path, out, loads):
    for content in (b"short", b"short again"):
        checkpoint(out, 20, content)
        if not (out / "step_000010").exists():
            checkpoint(out, 10)
        claim(*asks(tmp_path, out_dir=str(out) + "/"))
    names = ["step_000010", "step_000020.damaged", "step_000020.damaged~1"]
    assert sorted(os.listdir(out)) == names


def test_the_model_that_a_stage_began_with_is_kept(tmp_path, out, loads):
    """As hard links without trainer.pt; that of a run which ended before its first checkpoint, and
    a user's directory of that name, are set aside: a resumed run is measured against start/."""
    source = checkpoint(tmp_path / "sft", 5)
    (source / "notes.txt").write_text("no file of ours")
    config, setup = asks(tmp_path, stage="dpo", _init_from=str(tmp_path / "sft"))
    start = claim(config, setup)
    assert sorted(os.listdir(out / "start")) == ["config.json", "model.safetensors"]
    assert os.path.samefile(out / "start" / "config.json", source / "config.json")
    runs.keep_first_model(str(out), str(source), print)  # the same command again
    assert os.listdir(out) == ["start"]
    other, said = checkpoint(tmp_path / "other", 5, b"other weights"), []
    runs.keep_first_model(str(out), str(other), said.append)
    assert (out / "start" / "model.safetensors").read_bytes() == b"other weights"
    assert (out / "start~1" / "model.safetensors").read_bytes() == WEIGHTS and len(said) == 1
    assert runs.first_model(config, start) == str(source)
    start.state = {"config": {}}
    assert runs.first_model(config, start) == str(out / "start")


def test_the_first_model_of_a_run_made_before_it_was_kept(tmp_path, out):
    source = checkpoint(tmp_path / "sft", 5)
    start = types.SimpleNamespace(init_from="gone/", state={"config": {}})
    config = asks(tmp_path)[0]
    before = start.state["config"]
    before |= {"start_directory": str(source), "start_weights": prepare.weights_hash(source)}
    assert runs.first_model(config, start) == str(source)
    (source / "model.safetensors").write_bytes(b"trained on")
    with pytest.raises(runs.UserError, match="no longer there; .*holds another model by now"):
        runs.first_model(config, start)
    before["start_directory"] = str(tmp_path / "gone")
    with pytest.raises(runs.UserError, match="no longer there; put it back"):
        runs.first_model(config, start)


def test_links_fall_back_to_copies_and_a_kill_between_does_no_harm(tmp_path, monkeypatch):
    source, target = checkpoint(tmp_path, 5), tmp_path / "best"
    checkpoint(tmp_path, 1).rename(tmp_path / ".writing.best")

    def no_links(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    runs.copy_directory(str(source), str(target), link=True)
    assert runs.same_files(source, target) and not os.path.exists(tmp_path / ".writing.best")
    assert not os.path.samefile(source / "trainer.pt", target / "trainer.pt")
    (target / "trainer.pt").write_bytes(b"state 6")
    assert not runs.same_files(source, target)


def backup(tmp_path, *kept, **files):
    directory = tmp_path / "drive" / "out"
    for step in kept:
        checkpoint(directory, step)
    for name, content in (
        {"log.jsonl": '{"step": 0}\n', "samples.txt": "of the run"} | files
    ).items():
        (directory / name).write_text(content)
    return asks(tmp_path, backup_dir=str(tmp_path / "drive")), directory


def test_a_run_comes_back_from_its_backup(tmp_path, loads):
    asked, drive = backup(tmp_path, 10, 20, 30)
    (drive / "step_000030" / "model.safetensors").write_bytes(b"short")
    shutil.copytree(drive / "step_000010", drive / "best")
    shutil.copytree(drive / "step_000010", drive / "start")
    (drive / "start" / "trainer.pt").unlink()
    out, said = tmp_path / "out", []
    out.mkdir()
    (out / "samples.txt").write_text("mine")
    with pytest.raises(runs.UserError, match="holds samples.txt, but no run"):
        runs.restore_backup(*asked, said.append)
    assert os.listdir(out) == ["samples.txt"] and (out / "samples.txt").read_text() == "mine"
    (out / "samples.txt").unlink()
    runs.restore_backup(*asked, said.append)
    assert sorted(os.listdir(out)) == ["best", "log.jsonl", "samples.txt", "start", "step_000020"]
    assert "step_000030 is damaged and passed over" in said[0] and "is copied back" in said[1]
    before = (out / "step_000020").stat()
    runs.restore_backup(*asked, said.append)
    assert (out / "step_000020").stat() == before and len(said) == 2
    for path in (drive / "step_000010", drive / "step_000020"):
        (path / "model.safetensors").write_bytes(b"short")
    shutil.rmtree(out)
    with pytest.raises(
        runs.UserError, match="no checkpoint is whole; .*--init_from=scratch to set"
    ):
        runs.restore_backup(*asked, print)


def test_a_restore_that_is_killed_begins_again(tmp_path, loads, monkeypatch):
    """The checkpoint comes last: with it, out_dir counts as restored, log and start/ included."""
    asked, drive = backup(tmp_path, 10)
    shutil.copytree(drive / "step_000010", drive / "start")
    for count in range(1000):
        finished = False
        with killed_after(count):
            runs.restore_backup(*asked, print)
            finished = True
        runs.restore_backup(*asked, print)
        runs.clean(str(tmp_path / "out"))
        names = ["log.jsonl", "samples.txt", "start", "step_000010"]
        assert sorted(os.listdir(tmp_path / "out")) == names, count
        if finished:
            assert count > 5
            return
        shutil.rmtree(tmp_path / "out")


def test_a_backup_is_not_restored_where_it_is_not_asked_for(tmp_path, loads):
    asked, _ = backup(tmp_path, 10)
    for more in ({"init_from": "scratch"}, {"init_from": "me/tiny", "eval_only": True}):
        runs.restore_backup(*asks(tmp_path, backup_dir=asked[0]["backup_dir"], **more), print)
    assert not os.path.exists(tmp_path / "out")


# --- log


def test_a_log_passes_over_damaged_lines_and_is_cut_back(out):
    lines = [{"step": step, "train/loss": float(step)} for step in range(6)]
    damaged = b'[1]\n{"a": 1}\n{"step": "4"}\n\xff\n{"step": 5, "tra'
    text = "".join(json.dumps(row) + "\n" for row in lines).encode() + damaged
    (out / "log.jsonl").write_bytes(text)
    samples = "".join(f"--- step {step} ---\na text\n" for step in (2, 3, 4))
    (out / "samples.txt").write_text("a user's line\n" + samples)
    log = runs.Log(str(out))
    assert [row["step"] for row in log.rows()] == list(range(6))
    log.start({"wandb_log": False, "tensorboard": False}, 3, True, "2 pairs")
    rows = log.rows()
    assert rows[:4] == lines[:4] and len(rows) == 5
    assert rows[4]["event"] == "resume" and rows[4]["left_out"] == "2 pairs"
    assert (out / "samples.txt").read_text() == "a user's line\n" + samples[: -len(samples) // 3]
    log.start({"wandb_log": False, "tensorboard": False}, 0, False, "")
    assert [row.get("event") for row in log.rows()] == ["start"]


def test_a_file_that_is_no_log_is_set_aside(out):
    (out / "log.jsonl").write_text("dear diary\n")
    runs.Log(str(out)).start({"wandb_log": False, "tensorboard": False}, 0, False, "")
    assert (out / "log.jsonl~1").read_text() == "dear diary\n"


def test_a_log_never_stops_a_run(out, capsys, monkeypatch):
    """A full disk, a metric that is no number, a W&B that fails, a text without an encoding, a
    directory in the place of a file: a warning each, once."""
    log = runs.Log(str(out))

    class Broken:
        def log(self, *args, **options):
            raise RuntimeError("broken")

    log.wandb_run = Broken()
    log(1, {"train/loss": math.nan, "x": math.inf})
    assert log.wandb_run is None and log.rows() == [{"step": 1, "train/loss": None, "x": None}]
    log(2, {"metric": torch.zeros(1)})
    log.sample(3, "a \udcff")
    assert "a ?" in (out / "samples.txt").read_text()
    os.remove(out / "samples.txt")
    for name in ("samples.txt", "loss.png"):
        (out / name).mkdir()
    for _ in range(2):
        log.sample(4, "b")
        log.plot()
    shutil.rmtree(out)
    log(5, {})
    log = runs.Log(str(out))
    log.path = "/dev/full" if os.path.exists("/dev/full") else str(out / "none" / "log.jsonl")
    log(6, {})
    log(7, {})
    text = capsys.readouterr().out
    assert (
        text.count("warning: ") == 5 and text.count("log.jsonl: ") + text.count("/dev/full: ") == 2
    )
    for part in ("W&B or TensorBoard failed", "samples.txt: ", "loss.png: "):
        assert text.count(part) == 1


def test_events_are_not_sent_to_wandb(out):
    """An upload of step 10 ends while step 15 is logged: W&B would complain on standard error."""
    log, sent = runs.Log(str(out)), []
    log.wandb_run = types.SimpleNamespace(log=lambda row, step: sent.append((step, row)))
    log(15, {"train/loss": 1.0, "note": "text"})
    log(10, {"event": "upload", "seconds": 3.0})
    assert sent == [(15, {"train/loss": 1.0})] and len(log.rows()) == 2


def test_only_the_master_process_logs(out, capsys):
    log = runs.Log(str(out), master=False)
    log.start({}, 0, False, "")
    log(1, {}), log.say("x"), log.plot(), log.close()
    assert not os.listdir(out) and not capsys.readouterr().out


def test_optional_loggers_that_do_not_work_are_one_warning(out, monkeypatch, capsys):
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    config = {"wandb_log": True, "tensorboard": True, "wandb_run_name": "", "wandb_project": ""}
    log = runs.Log(str(out))
    log.start(config, 0, False, "")
    text = capsys.readouterr().out
    assert text.count("warning: ") == 2 and log.wandb_run is log.board is None


def test_what_is_said_and_logged_holds_no_secret(out, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    log = runs.Log(str(out))
    log.warn_once("x", f"Bearer {SECRETS['HF_TOKEN']}")
    log(1, {"event": "upload failed", "error": SECRETS["HF_TOKEN"]})
    text = capsys.readouterr().out + (out / "log.jsonl").read_text()
    assert text.count("[HF_TOKEN]") == 2 and SECRETS["HF_TOKEN"] not in text


def test_what_a_resumed_run_has_done(out):
    rows = [{"step": step, "val/loss": loss} for step, loss in ((0, 9), (10, 3.0), (20, 2.0))]
    rows += [{"step": 20, "event": "sample"}, {"step": 30, "val/loss": None}, {"step": 30}]
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def done(step, best):
        return runs.Log(str(out)).done(step, [best], lambda row: [-row["val/loss"]])

    assert done(20, -3.0) == (20, 20, 20, [-2.0])  # killed after the evaluation of step 20
    assert done(10, -3.0) == (10, -1, 10, [-3.0])
    assert done(30, -2.0) == (20, 20, 20, [-2.0])  # what was not finite is evaluated again
    assert done(-1, -math.inf) == (-1, -1, 0, [-math.inf])


def test_lines_for_the_terminal():
    row = {"val/loss": 1.0, "val/ppl": 2.7, "val/web/loss": 0.5}
    assert runs.evaluation_line(100, row) == "step    100 | val loss 1.0000 | web/loss 0.5000"
    row = {"train/loss": 1.0, "train/tok_per_sec": 2e4, "cost/eta_hours": 1.0233}
    line = "step    100 | loss 1.0000 | 20,000 tok/s | 1:01:23 left"
    assert runs.step_line(100, row | {"cost/eta_hours": 3683.9 / 3600}) == line
    row |= {"train/loss": math.nan, "reward/mean": 0.5, "cost/usd_spent": 1.5}
    line = "step      1 | no signal | reward 0.500 | 20,000 tok/s | 1:01:23 left | $1.50 spent"
    assert runs.step_line(1, row) == line


# --- checkpoints


@pytest.fixture(scope="module")
def model():
    return GPT(GPTConfig(**tiny_config()))


def save(checkpoints, model, step):
    """Saves, trains on, and waits until it is written."""
    trainer = {"run": {"step": step, "recent": [(1.0, 2.0)]}, "config": {}, "t": torch.ones(2)}
    checkpoints.save(model, prepare.load_tokenizer("byte"), trainer, [256])
    trainer["t"].zero_()
    checkpoints.wait()


def test_a_checkpoint_holds_what_was_at_the_time(out, model):
    log = Rows(out)
    kept = runs.Checkpoints(str(out), 2, log)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in (10, 20, 30):
        save(kept, model, step)
    kept.link_best(30)
    kept.wait()
    assert sorted(os.listdir(out)) == ["best", "log.jsonl", "step_000020", "step_000030"]
    read, state = runs.load(kept.path(30), print)
    assert all(torch.equal(value, before[name]) for name, value in read.state_dict().items())
    assert state["run"] == {"step": 30, "recent": [[1.0, 2.0]]} and state["t"].tolist() == [1, 1]
    assert log.events() == ["checkpoint"] * 3 + ["best"]
    row = log.rows()[2]
    assert row["bytes"] == runs.size_of(kept.path(30)) and row["training_waited_s"] < 1
    assert os.path.samefile(out / "best" / "trainer.pt", out / "step_000030" / "trainer.pt")
    # the run is killed before best/ follows: it does at the next start, and only if it must
    shutil.rmtree(out / "best")
    for expected in (["best"], []):
        log = Rows(out)
        runs.Checkpoints(str(out), 2, log, best_step=30).wait()
        assert log.events() == expected and (out / "best").is_dir()


def test_a_checkpoint_that_cannot_be_written(out, model, monkeypatch):
    """Nothing under its name, the one before stays, training goes on, and what follows is saved."""
    log = Rows(out)
    kept = runs.Checkpoints(str(out), 1, log)

    def fails(trainer, path):
        open(path, "w").close()
        raise FULL

    for step in (10, 20):
        save(kept, model, step)
        monkeypatch.setattr(torch, "save", fails)
    kept.link_best(20)
    kept.wait()
    assert log.events() == ["checkpoint", "checkpoint failed"] and steps(out) == [10]
    assert "step_000020 could not be written, the one before it stays" in log.said[0]
    assert "No space left on device" in log.said[0] and "MB are free" in log.said[0]
    monkeypatch.undo()
    save(kept, model, 30)
    assert sorted(os.listdir(out)) == ["log.jsonl", "step_000030"]
    shutil.rmtree(out)  # by a user, while it trains
    save(kept, model, 40)
    assert steps(out) == [40]


def test_a_users_files_block_neither_best_nor_saving(out, model):
    log = Rows(out)
    kept = runs.Checkpoints(str(out), 1, log)
    save(kept, model, 10)
    (out / "step_000010" / "notes.txt").write_text("mine")
    assert runs.is_checkpoint(kept.path(10))  # it is saved: a finished run says so
    (out / "best").mkdir()
    (out / "best" / "mine.txt").write_text("mine")
    (out / "step_000020").mkdir()
    (out / "step_000020" / "mine.txt").write_text("mine")
    kept.link_best(10)
    save(kept, model, 20)
    for name in ("best~1", "step_000020~1"):
        assert (out / name / "mine.txt").read_text() == "mine"
    assert "notes.txt" not in os.listdir(out / "best") and runs.is_checkpoint(out / "best")
    assert steps(out) == [10, 20] and "holds a user's files, so it stays" in log.said[0]
    assert (out / "step_000010" / "notes.txt").read_text() == "mine"


def test_a_link_to_a_checkpoint_elsewhere_stays(tmp_path, out):
    elsewhere = checkpoint(tmp_path / "big", 10)
    (out / "step_000010").symlink_to(elsewhere)
    checkpoint(out, 20)
    runs.Checkpoints(str(out), 1, Rows(out)).rotate()
    assert steps(out) == [10, 20] and len(os.listdir(elsewhere)) == 3


def test_rotation_spares_what_a_mirror_lacks_unless_the_disk_is_nearly_full(out, monkeypatch):
    for step in (10, 20, 1_234_567, 2_000_000):
        checkpoint(out, step)
    log, sent = Rows(out), {10}
    kept = runs.Checkpoints(str(out), 1, log)
    mirror = types.SimpleNamespace(lacks=lambda path: runs.step_of(path) not in sent)
    kept.mirrors.append(mirror)
    kept.rotate()
    assert steps(out) == [20, 1_234_567, 2_000_000] and log.events() == []
    full = types.SimpleNamespace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    kept.rotate()
    assert steps(out) == [2_000_000] and len(log.said) == 1
    assert [step for _, step, _ in log.logged] == [20, 1_234_567]
    assert log.events() == ["upload dropped"] * 2
    kept.keep = 0
    checkpoint(out, 5)
    kept.rotate()
    assert steps(out) == [5, 2_000_000]


def test_a_checkpoint_that_is_deleted_is_never_partial_under_its_name(out, monkeypatch):
    checkpoint(out, 10), checkpoint(out, 20)

    def killed(*args):
        raise KeyboardInterrupt

    kept = runs.Checkpoints(str(out), 1, Rows(out))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "remove_directory", killed)
        kept.rotate()
    assert steps(out) == [20] and len(os.listdir(out / ".deleting.step_000010")) == 3
    runs.clean(str(out))
    assert os.listdir(out) == ["step_000020"]


@contextlib.contextmanager
def killed_after(count):
    """As a kill -9 after so many calls that change a directory: none that follows does anything."""
    left = [count]

    def dies(call):
        def changed(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return call(*args, **options)

        return changed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        for name in ("rename", "replace", "remove", "link", "rmdir", "mkdir"):
            patch.setattr(os, name, dies(getattr(os, name)))
        yield


def test_killed_between_any_two_calls(tmp_path, loads):
    """Of everything that changes a directory. Whatever has a final name is whole then, and the same
    command ends as if nothing had happened."""

    def write(directory):
        checkpoint(tmp_path / "made", runs.step_of(directory)).rename(directory)

    def train(out, first):
        """Claims, saves, chooses best/ and rotates, from step `first`."""
        config, setup = asks(
            tmp_path, out_dir=str(out), stage="dpo", init_from=str(tmp_path / "sft")
        )
        setup.given = {}
        claim(config, setup)
        best = first if (out / f"step_{first:06d}").exists() else 0
        kept = runs.Checkpoints(str(out), 1, Rows(out), best)
        for step in range(first + 10, 30, 10):
            kept._submit(kept._write, step, write, 0.0)
            kept.link_best(step)
        jobs = list(kept.jobs)
        kept.wait()
        kept.finish(1, types.SimpleNamespace(signal=""))
        return [job.exception() for job in jobs if job.exception()] + kept.log.said

    checkpoint(tmp_path / "sft", 5)
    for count in range(1000):
        out, finished = tmp_path / f"out{count}", False
        with killed_after(count):
            finished = train(out, 0) == []
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        directories = [*map(str, out.glob("step_*")), *map(str, out.glob("best"))]
        assert all(len(os.listdir(path)) == 3 for path in directories), (count, directories)
        assert train(out, max(steps(out), default=0)) == []
        assert sorted(os.listdir(out)) == ["best", "log.jsonl", "start", "step_000020"], count
        assert os.path.samefile(out / "best" / "trainer.pt", out / "step_000020" / "trainer.pt")
        if finished:
            assert count > 30
            return
        shutil.rmtree(out)


# --- mirrors


class Place:
    """A place that fails as often as it is told to."""

    event, name = "upload", "a place"

    def __init__(self, out_dir, failures=(), there=()):
        self.out_dir, self.failures, self.there = str(out_dir), list(failures), set(there)
        self.allowed = threading.Event()
        self.allowed.set()

    def open(self):
        self.allowed.wait(10)

    def wanted(self):
        return runs.checkpoints(self.out_dir)

    def path_of(self, item):
        return os.path.basename(item)

    def put(self, item):
        if self.failures:
            raise self.failures.pop(0)
        step = runs.step_of(item)
        new = step not in self.there
        self.there.add(step)
        return new

    def put_beside(self):
        pass


class Finished:
    """Checkpoints of a run with one mirror, whose training has ended."""

    def __init__(self, out, place, tries=4):
        self.log, self.stop = Rows(out), types.SimpleNamespace(signal="")
        self.kept = runs.Checkpoints(str(out), 1, self.log)
        self.mirror = runs.Mirror(place, self.log)
        self.kept.mirrors.append(self.mirror)
        self.tries = tries

    def end(self):
        return self.kept.finish(self.tries, self.stop)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(runs.Mirror, "first_pause", 0.01)


def test_a_mirror_sends_what_is_not_there(out):
    """What was saved just before closing too; what the place has already is no upload."""
    checkpoint(out, 10), checkpoint(out, 20)
    place = Place(out, there={10})
    place.allowed.clear()
    run = Finished(out, place)
    assert run.mirror.lacks(str(out / "step_000020"))
    checkpoint(out, 30)
    threading.Timer(0.05, place.allowed.set).start()
    assert run.end() and place.there == {10, 20, 30}
    assert run.log.logged == [("upload", 20, "step_000020"), ("upload", 30, "step_000030")]
    assert steps(out) == [30]  # what rotation had spared goes, as the place has it
    assert "waiting for uploads and copies under way; Ctrl-C twice" in run.log.said[0]
    assert not run.mirror.lacks(str(out / "step_000030"))


def test_a_mirror_tries_again_and_warns_once(out):
    checkpoint(out, 10)
    place = Place(out, failures=[OSError("no network")] * 2 + [OSError("still none")])
    run = Finished(out, place)
    assert run.end() and place.there == {10}
    assert run.log.events() == ["upload failed"] * 3 + ["upload"]
    warnings = [text for text in run.log.said if text.startswith("warning")]
    assert len(warnings) == 1
    assert "a place: step_000010: no network; it is tried again, training goes on" in warnings[0]


def test_a_mirror_gives_up_after_training(out):
    checkpoint(out, 10)
    run = Finished(out, Place(out, failures=[OSError("full")] * 10_000), tries=2)
    assert run.end() is False and not run.mirror.complete and steps(out) == [10]


def test_ctrl_c_leaves_after_one_more_try(out):
    checkpoint(out, 10)
    run = Finished(out, Place(out, failures=[OSError("full")] * 10_000), tries=10_000)
    run.stop.signal = "SIGINT"
    assert run.end() is False


def test_a_refusal_ends_a_mirror(out):
    """One warning, no further try, and rotation waits for it no longer."""
    checkpoint(out, 10), checkpoint(out, 20)
    place = Place(out, failures=[runs.Refused("wrong token")])
    run = Finished(out, place)
    run.mirror.thread.join(5)
    assert not run.mirror.lacks(str(out / "step_000010"))
    assert run.end() is False and place.there == set() and run.log.events() == []
    assert run.log.said == ["warning: a place: wrong token"] and steps(out) == [20]


def test_a_checkpoint_that_rotation_removes_under_a_mirrors_hands(out):
    """No failure, and no warning: it is not wanted any more."""
    checkpoint(out, 10), checkpoint(out, 20)

    class Slow(Place):
        def put(self, item):
            if os.path.exists(out / "step_000010"):
                shutil.rmtree(out / "step_000010")
                raise FileNotFoundError(item)
            return super().put(item)

    run = Finished(out, Slow(out))
    assert run.end() and run.log.events() == ["upload"] and run.log.said[1:] == []


# --- the Hub, with the real client


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import close_session, constants

    server = Outside()
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    close_session()  # it would not have read NO_PROXY
    yield server
    close_session()
    server.close()


def opened(out):
    place = runs.Hub(str(out), "me/tiny", False)
    place.open()
    return place


def test_the_hub_has_what_it_was_sent(out, hub):
    """In one commit a checkpoint, asked for afterwards; a user's files are not sent; a run that is
    resumed asks, and sends nothing that is there."""
    path = checkpoint(out, 10)
    (path / "diary.txt").write_text("mine")
    (path / "more").mkdir()
    (out / "step_000020").mkdir()  # no checkpoint
    place = opened(out)
    assert place.wanted() == [str(path)]
    assert place.put(str(path)) is True
    files = {f"checkpoints/step_000010/{name}" for name in os.listdir(path)}
    assert set(hub.files) == {f for f in files if not f.endswith(("diary.txt", "more"))}
    asked, sent = hub.asked("paths-info"), hub.asked("/commit/")
    assert len(asked) == 2 and len(sent) == 1 and asked[0] < sent[0] < asked[1]
    hub.seen.clear()
    again = opened(out)
    assert again.put(str(path)) is False and not hub.asked("/commit/")
    (path / "model.safetensors").write_bytes(WEIGHTS[::-1])  # the same size
    assert again.put(str(path)) is True
    assert hub.files["checkpoints/step_000010/model.safetensors"] == WEIGHTS[::-1]
    assert not again.has_final and "is not on the Hub but in" in again.report()


def test_the_final_model_is_at_the_root(out, hub):
    path = checkpoint(out, 10)
    (path / "diary.txt").write_text("mine")
    (out / "loss.png").write_bytes(b"a plot")
    place = opened(out)
    place.put_final(str(path), "a card \udcff")
    assert place.wanted() == [str(path), place.FINAL]
    assert place.put(place.FINAL) is True and place.has_final
    assert set(hub.files) == {"README.md", "config.json", "loss.png", "model.safetensors"}
    assert hub.files["README.md"] == b"a card ?" and hub.files["loss.png"] == b"a plot"
    assert place.report() == f"the final model is at {hub.url}/me/tiny"


def test_a_hub_that_lies_does_not_have_the_final_model(out, hub):
    hub.RequestHandlerClass = Liar
    path = checkpoint(out, 10)
    place = opened(out)
    place.put_final(str(path), "a card")
    with pytest.raises(OSError, match="what is on the Hub is not what was sent"):
        place.put(place.FINAL)
    assert not place.has_final


def test_a_final_model_is_confirmed_file_by_file(out, hub):
    path = checkpoint(out, 10)
    place = opened(out)
    place.put_final(str(path), "a card")
    place.put(place.FINAL)
    for name, content in dict(hub.files).items():
        for bad in (None, content + b"x"):
            hub.files = {n: c for n, c in hub.files.items() if n != name}
            if bad:
                hub.files[name] = bad
            assert not place._confirms(place.final, ""), name
        hub.files[name] = content
    assert place._confirms(place.final, "")


@pytest.mark.parametrize("status", [400, 401, 403, 402])
def test_a_refusal_of_the_hub_is_final(out, hub, status):
    """At once where the repository can't be made; else at the first upload."""
    hub.always = [("/repos/create", status), ("GET /api/models", status)]
    with pytest.raises(runs.Refused, match=rf"the Hub refuses \({status}\).*HF_TOKEN"):
        opened(out)
    hub.always = [("/preupload/", status)]
    place = opened(out)
    with pytest.raises(runs.Refused, match=rf"the Hub refuses \({status}\)"):
        place.put(str(checkpoint(out, 10)))


@pytest.mark.parametrize("status", [404, 408, 429, 500, 520])
def test_other_answers_of_the_hub_are_a_matter_of_time(out, hub, status, monkeypatch):
    monkeypatch.setattr("time.sleep", print)  # the client's own pauses
    hub.always = [("/repos/create", status)]
    place = runs.Hub(str(out), "me/tiny", False)
    with pytest.raises(OSError):  # a turn of the mirror ends here, and is taken again
        place.open()
    hub.always = []
    place.open()
    assert place.put(str(checkpoint(out, 10))) is True


def test_a_hub_out_of_reach_is_no_refusal(out, hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", print)
    path = str(checkpoint(out, 10))
    with pytest.raises(OSError, match="refused"):
        opened(out).put(path)


# --- a backup


def backup_place(tmp_path, keep=2):
    (tmp_path / "drive").mkdir(exist_ok=True)
    directory = tmp_path / "drive" / "out"
    place = runs.Backup(str(tmp_path / "out"), str(directory), keep)
    place.open()
    return place, directory


def turn(place):
    place.open()
    return [place.put(item) for item in place.wanted()], place.put_beside()


def test_a_backup_is_rotated_like_the_run(tmp_path, out):
    place, there = backup_place(tmp_path)
    for step in (10, 20, 30):
        checkpoint(out, step)
        turn(place)
    assert steps(there) == [20, 30] and turn(place)[0] == [False, False]
    assert runs.same_files(there / "step_000030", out / "step_000030")
    assert runs.Backup(str(out), str(there), 0).wanted() == runs.checkpoints(out)


def test_a_backup_holds_what_the_run_has_beside(tmp_path, out):
    place, there = backup_place(tmp_path)
    for name in runs.BESIDE:
        (out / name).write_text(name)
    best = checkpoint(out, 1)
    best.rename(out / "best")
    checkpoint(out, 1).rename(out / "start")
    (out / "start" / "trainer.pt").unlink()
    turn(place)
    assert sorted(os.listdir(there)) == sorted([*runs.BESIDE, "best", "start"])
    before = (there / "best").stat()
    turn(place)
    assert (there / "best").stat() == before  # as it is, it is not copied again
    shutil.rmtree(out / "best")
    checkpoint(out, 1, b"better").rename(out / "best")
    turn(place)
    assert (there / "best" / "model.safetensors").read_bytes() == b"better"


def test_a_best_that_is_replaced_while_it_is_copied(tmp_path, out, monkeypatch):
    place, there = backup_place(tmp_path)
    checkpoint(out, 1).rename(out / "best")

    def moved(source, target):
        shutil.rmtree(out / "best")
        raise FileNotFoundError(source)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "copy_directory", moved)
        turn(place)
    checkpoint(out, 2).rename(out / "best")
    turn(place)
    assert (there / "best" / "trainer.pt").read_bytes() == b"state 2"


def test_a_run_that_went_back_replaces_what_its_backup_has(tmp_path, out):
    """Same sizes, other content; and what is newer than the run is not what comes back."""
    place, there = backup_place(tmp_path, keep=1)
    for step in (20, 30):
        checkpoint(there, step, WEIGHTS[::-1])
    checkpoint(out, 10)
    turn(place)
    assert steps(there) == [10] and (there / "step_000030~1").is_dir()
    checkpoint(out, 20)
    turn(place)
    assert steps(there) == [20]
    (there / "step_000020" / "model.safetensors").write_bytes(WEIGHTS[::-1])
    turn(backup_place(tmp_path, keep=1)[0])
    assert (there / "step_000020" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_users_files_in_the_backup_stay(tmp_path, out):
    there = tmp_path / "drive" / "out"
    place, _ = backup_place(tmp_path, keep=1)
    path = checkpoint(out, 10)
    (path / "diary.txt").write_text("stays at home")
    (path / "more").mkdir()
    turn(place)
    assert turn(place)[0] == [False]
    for name in ("step_000010", "step_000020", "best"):
        (there / name).mkdir(exist_ok=True)
        (there / name / "notes.txt").write_text("mine")
    checkpoint(out, 20)
    checkpoint(out, 1).rename(out / "best")
    turn(place)
    assert steps(there) == [10, 20] and runs.same_files(out / "best", there / "best")
    for name in ("step_000010", "step_000020~1", "best~1"):
        assert (there / name / "notes.txt").read_text() == "mine"


def test_a_drive_that_is_gone_does_not_become_a_local_directory(tmp_path, out):
    (tmp_path / "mnt" / "drive").mkdir(parents=True)
    place = runs.Backup(str(out), str(tmp_path / "mnt" / "drive" / "toy" / "out"), 1)
    place.open()
    shutil.rmtree(tmp_path / "mnt" / "drive")
    with pytest.raises(OSError, match="is not there"):
        place.open()
    assert os.listdir(tmp_path / "mnt") == []


def test_a_full_drive(tmp_path, out, monkeypatch):
    """Every copy ends after some bytes: nothing partial has a final name, and one warning."""
    checkpoint(out, 10)
    copy = shutil.copyfile

    def full(source, target, **options):
        with open(target, "wb") as f:
            f.write(b"some")
        raise FULL

    monkeypatch.setattr(shutil, "copyfile", full)
    place, there = backup_place(tmp_path)
    run = Finished(out, place, tries=2)
    assert run.end() is False and not steps(there) and steps(out) == [10]
    assert set(run.log.events()) == {"backup failed"}
    warnings = [text for text in run.log.said if text.startswith("warning")]
    assert len(warnings) == 1 and "No space left on device" in warnings[0]
    assert not [f for f in os.listdir(there) if not f.endswith(".tmp")]
    monkeypatch.setattr(shutil, "copyfile", copy)
    assert Finished(out, backup_place(tmp_path)[0]).end() and steps(there) == [10]


def test_a_copy_that_was_killed_is_cleaned_up(tmp_path, out):
    """Also that of a checkpoint which the run has rotated away since."""
    there = tmp_path / "drive" / "out"
    for name in (".step_000005.part", ".writing.step_000006", ".deleting.step_000001"):
        checkpoint(there, 1).rename(there / name)
    claim(*asks(tmp_path, backup_dir=str(tmp_path / "drive")))
    assert os.listdir(there) == []


def test_a_backup_that_is_killed_between_any_two_calls(tmp_path, out, loads):
    """Whatever has a final name is whole then, and the next run completes the backup."""
    for step in (10, 20):
        checkpoint(out, step)
    for name in ("best", "start"):
        checkpoint(out, 1).rename(out / name)
    (out / "log.jsonl").write_text('{"step": 0}\n')
    for count in range(1000):
        (tmp_path / "drive").mkdir()
        there = tmp_path / "drive" / "out"
        there.mkdir()
        for name in ("step_000005", "step_000010", "best"):  # older, and another content
            checkpoint(tmp_path / "made", 1, b"old").rename(there / name)
        finished = False
        with killed_after(count):
            turn(backup_place(tmp_path, keep=1)[0])
            finished = True
        whole = [*there.glob("step_*"), *there.glob("best"), *there.glob("start")]
        assert all(len(os.listdir(path)) == 3 for path in whole), (count, whole)
        claim(*asks(tmp_path, backup_dir=str(tmp_path / "drive")))
        turn(backup_place(tmp_path, keep=1)[0])
        names = {"best", "log.jsonl", "start", "step_000020"}
        assert names <= set(os.listdir(there)), count
        assert not [name for name in os.listdir(there) if name.startswith(".")], count
        assert all(runs.same_files(out / name, there / name) for name in names - {"log.jsonl"})
        if finished:
            assert count > 20 and set(os.listdir(there)) == names
            return
        shutil.rmtree(tmp_path / "drive")


def test_mirrors_follow_the_config(tmp_path, out):
    (tmp_path / "drive").mkdir()
    checkpoint(out, 10)
    config, _ = asks(tmp_path, backup_dir=str(tmp_path / "drive"))
    kept = runs.Checkpoints(str(out), 2, Rows(out))
    assert runs.start_mirrors(config, kept, kept.log) is None and len(kept.mirrors) == 1
    assert runs.start_mirrors(config, None, kept.log) is None
    assert kept.finish(4, types.SimpleNamespace(signal=""))
    assert steps(tmp_path / "drive" / "out") == [10]


# --- the pod, signals, a crash


@pytest.fixture
def runpod(monkeypatch):
    server = Outside()
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("RUNPOD_API_BASE", server.url + "/runpod")
    monkeypatch.setenv("RUNPOD_POD_ID", "a/b")
    monkeypatch.setenv("RUNPOD_API_KEY", SECRETS["RUNPOD_API_KEY"])
    monkeypatch.setattr("time.sleep", abs)
    yield server
    server.close()


def pod(tmp_path, **config):
    stop = types.SimpleNamespace(signal="")
    return runs.Pod(asks(tmp_path, **config)[0], Rows(tmp_path), stop)


def test_a_pod_is_told_how_to_end(tmp_path, runpod, capsys):
    machine = pod(tmp_path, hf_repo="me/tiny")
    machine.end("terminate", 20)
    machine.end("stop", 20)
    requested = ["DELETE /runpod/pods/a%2Fb -> 200", "POST /runpod/pods/a%2Fb/stop -> 200"]
    assert runpod.seen == requested
    assert runpod.keys == {("/runpod/", f"Bearer {SECRETS['RUNPOD_API_KEY']}")}
    assert [row["how"] for row in machine.log.rows()] == ["terminate", "stop"]
    text = capsys.readouterr().out
    assert "about to terminate pod a/b in ten seconds; Ctrl-C calls it off" in text
    assert "pod a/b was told to stop" in text and SECRETS["RUNPOD_API_KEY"] not in text
    machine.stop.signal = "SIGINT"
    machine.end("terminate", 20)
    assert len(runpod.seen) == 2 and "called off, pod a/b runs on" in capsys.readouterr().out


def test_a_pod_that_does_not_end_is_told(tmp_path, runpod, capsys):
    """Three tries, then where to end it by hand; a failure that passes is none."""
    runpod.always = [("/runpod/", 500)]
    pod(tmp_path).end("stop", 20)
    text = capsys.readouterr().out
    assert runpod.seen == ["POST /runpod/pods/a%2Fb/stop -> 500"] * 3
    assert "could not stop pod a/b, which runs on, and costs: 500" in text
    assert "https://console.runpod.io/pods" in text
    runpod.always, runpod.faults = [], [("/runpod/", "cut")]
    pod(tmp_path).end("stop", 20)
    assert "was told to stop" in capsys.readouterr().out


def test_what_a_pod_lacks_is_said_at_the_start(tmp_path, runpod, monkeypatch):
    machine = pod(tmp_path)
    assert "without hf_repo the pod is stopped at the end" in machine.log.said[0]
    assert "is not in /workspace" in machine.log.said[1] and len(machine.log.said) == 2
    monkeypatch.delenv("RUNPOD_API_KEY")
    machine = pod(tmp_path, out_dir="/workspace/out/toy", hf_repo="me/tiny")
    assert len(machine.log.said) == 1 and "there is no RUNPOD_API_KEY" in machine.log.said[0]


@pytest.fixture
def signals():
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_second_signal_ends_the_process_unless_it_is_the_same_event(signals, monkeypatch):
    """A shell that closes, and torchrun, send one and the same twice within milliseconds."""
    exits, now = [], [100.0]
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    stop = runs.StopSignal()
    assert stop.signal == ""
    signal.raise_signal(signal.SIGTERM)
    now[0] = 100.2
    signal.raise_signal(signal.SIGINT)
    assert stop.signal == "SIGTERM" and exits == []
    now[0] = 101.5
    if hasattr(signal, "SIGHUP"):
        signal.raise_signal(signal.SIGHUP)
        assert exits == []  # the terminal says it again
    signal.raise_signal(signal.SIGINT)
    assert exits == [130]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_ends_a_run_but_not_under_nohup(signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = runs.StopSignal()
    signal.raise_signal(signal.SIGHUP)
    assert stop.signal == ""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = runs.StopSignal()
    signal.raise_signal(signal.SIGHUP)
    assert stop.signal == "SIGHUP"


@pytest.mark.parametrize(
    "error, how, came, expected",
    [
        (RuntimeError("boom"), "stop", "", ["saved", "finished 1", "stop"]),
        (runs.UserError("a verifier"), "stop", "", ["saved", "finished 1", "stop"]),
        (runs.Diverged("bad steps"), "stop", "", ["finished 1", "stop"]),
        (RuntimeError("boom"), "never", "", ["saved", "finished 1"]),
        (KeyboardInterrupt(), "stop", "SIGINT", ["saved", "finished 1"]),
    ],
)
def test_a_crash_saves_uploads_and_stops_the_pod(monkeypatch, error, how, came, expected):
    done, stop = [], types.SimpleNamespace(signal=came)
    kept = types.SimpleNamespace(finish=lambda tries, stop: done.append(f"finished {tries}"))
    machine = types.SimpleNamespace(end=lambda how, step: done.append(how))
    log = types.SimpleNamespace(wandb_run="w", board="b")
    monkeypatch.setattr(sys, "excepthook", lambda *args: None)
    runs.finish_on_crash(lambda: done.append("saved"), kept, log, stop, machine, how)
    sys.excepthook(type(error), error, None)
    assert done == expected and log.wandb_run is log.board is None


def test_a_last_step_that_cannot_be_saved_stops_the_pod_all_the_same(monkeypatch, capsys):
    done = []

    def save():
        raise MemoryError

    machine = types.SimpleNamespace(end=lambda how, step: done.append(how))
    stop = types.SimpleNamespace(signal="")
    monkeypatch.setattr(sys, "excepthook", lambda *args: None)
    runs.finish_on_crash(save, None, types.SimpleNamespace(), stop, machine, "stop")
    sys.excepthook(RuntimeError, RuntimeError("boom"), None)
    assert done == ["stop"] and "could not be saved: MemoryError" in capsys.readouterr().err


# --- what a run prints, and its card


def test_what_to_type_next(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    args = ["train.py", "my config.py", "--max_iters=20", "--init_from=scratch"]
    monkeypatch.setattr(sys, "argv", args)
    run = types.SimpleNamespace(step=20, tokens=1000, train_s=3.2, best=[-1.5])
    config = {"out_dir": "out/toy", "stage": "pretrain", "sample_start": "", "max_iters": 20}
    config["time_budget"] = 0.0
    letters = prepare.load_tokenizer("byte")
    text = runs.summary(config, run, True, True, letters)
    assert "python sample.py --out_dir=out/toy '--start=Once upon a time'" in text
    assert text.endswith("python train.py 'my config.py' --max_iters=40")
    assert "train longer" not in runs.summary(config, run, True, False, letters)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    text = runs.how_to_resume("SIGTERM", types.SimpleNamespace(step=5), 20, 0.0, True)
    assert text.startswith("SIGTERM: stopped after step 5 of 20, which is saved. To go on:\n")
    assert text.endswith("torchrun --nproc_per_node=2 train.py 'my config.py' --max_iters=20")


class Counted:
    def n_params(self):
        return 1234


def test_a_card_says_what_was_measured_and_nothing_private(tmp_path):
    config = {"stage": "rlvr", "hf_repo": "me/tiny", "dataset": "t", "init_from": "me/base"}
    config |= {"beta": 0.1, "data_dir": "/home/me", "verifier": "/home/me/v.py"}
    run = types.SimpleNamespace(step=20, tokens=1000)
    rows = [{"step": 10, "val/pass@1": 0.75}, {"step": 20, "val/pass@1": 0.5, "train/loss": None}]
    card = runs.model_card(config, list(config), Counted(), False, run, rows)
    for part in (
        'library_name: "nanosmol"',
        'base_model: "me/base"',
        "# tiny",
        "1,234 parameters, trained with nanosmol (rlvr, from me/base) for 20 steps on 1,000 tokens",
        "| val/pass@1 at the end | 20 | 0.5000 |",
        "| val/pass@1 at its best | 10 | 0.7500 |",
        "| train/loss at the end | 20 | nan |",
        "beta = 0.1",
        "transformers has no architecture like this one",
    ):
        assert part in card
    assert "/home/me" not in card
    card = runs.model_card(config | {"init_from": "out/sft"}, ["beta"], Counted(), True, run, [])
    assert "base_model" not in card and 'AutoModelForCausalLM.from_pretrained("me/tiny")' in card


def test_samples_are_for_show(monkeypatch, model):
    log = Rows(os.devnull)
    data = stub_data(ends=[256])
    config = {"sample_start": "ab", "stage": "pretrain", "seed": 1}
    texts = runs.samples(model, data, config, 2, contextlib.nullcontext, log)
    assert len(texts) == 2 and all(text.startswith("ab") for text in texts)

    def no_memory(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", no_memory)
    assert runs.samples(model, data, config, 2, contextlib.nullcontext, log) == []
    assert log.said == ["warning: no sample could be made: out of memory; training goes on"]


def test_where_to_roll_back_to(out, monkeypatch):
    config = {"out_dir": str(out), "max_bad_steps": 5, "max_rollbacks": 3}
    run = types.SimpleNamespace(step=15, rollbacks=0)
    damaged = []
    loaded = {True: (None, None), False: ("model", "state")}
    monkeypatch.setattr(runs, "load", lambda path, say: loaded[path in damaged])
    with pytest.raises(runs.Diverged, match="there is no checkpoint to go back to"):
        runs.last_checkpoint(config, run, "loss spike", print)
    paths = [str(checkpoint(out, step)) for step in (5, 10)]
    assert runs.last_checkpoint(config, run, "loss spike", print) == (paths[1], "model", "state")
    damaged.append(paths[1])  # then the one before it
    assert runs.last_checkpoint(config, run, "loss spike", print) == (paths[0], "model", "state")
    run.rollbacks = 3
    with pytest.raises(runs.Diverged, match="5 bad steps in a row .*step_000005 is whole"):
        runs.last_checkpoint(config, run, "loss spike", print)
    with pytest.raises(runs.Diverged, match="gradient is 0.*No weight can learn"):
        runs.last_checkpoint(config, run, "gradient is 0", print)


def test_secrets_come_from_the_environment_or_the_file(tmp_path, monkeypatch):
    (tmp_path / "env").write_text(
        "HF_TOKEN=from_file # mine\nexport WANDB_API_KEY = 'quoted+key='\n"
        "RUNPOD_API_KEY=\nPATH=/x\n=\n"
    )
    for key in SECRETS:
        monkeypatch.setenv(key, "")  # so that what it was comes back afterwards
        monkeypatch.delenv(key)
    monkeypatch.setenv("HF_TOKEN", "hf_environment\n")
    before = os.environ["PATH"]
    prepare.read_secrets(str(tmp_path / "env"))
    assert [os.environ[k] for k in SECRETS] == ["hf_environment", "quoted+key=", ""]
    assert os.environ["PATH"] == before
    illegal = "Illegal header b'Bearer hf_environment'"
    assert prepare.without_secrets(illegal) == "Illegal header b'Bearer [HF_TOKEN]'"
    prepare.read_secrets(str(tmp_path / "none"))
    by_windows_editors = "\ufeffHF_TOKEN=two\r\n".encode("utf-16-le")
    for written in ("\ufeffHF_TOKEN=one\nHF_TOKEN=two".encode(), by_windows_editors):
        (tmp_path / "env").write_bytes(written)
        monkeypatch.delenv("HF_TOKEN")
        prepare.read_secrets(str(tmp_path / "env"))
        assert os.environ["HF_TOKEN"] == "two"
    for bad in ("hf_café", '"hf_open', "hf_a\0b"):
        (tmp_path / "env").write_text(f"HF_TOKEN={bad}\n")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        said = "HF_TOKEN.*: it holds a quote, a space or another character"
        with pytest.raises(prepare.UserError, match=said) as e:
            prepare.read_secrets(str(tmp_path / "env"))
        assert bad not in str(e.value)
