"""train.py and sample.py as their users run them: as processes, on a text of a few kilobytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import runs

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = [
    "--n_layer=2",
    "--n_head=2",
    "--n_kv_head=1",
    "--n_embd=32",
    "--block_size=32",
    "--batch_size=4",
    "--eval_iters=2",
    "--eval_interval=10",
    "--log_interval=5",
    "--warmup_iters=2",
    "--dtype=float32",
    "--max_iters=20",
]


def script(name, *args, cwd, env=None, **options):
    return subprocess.run(
        [sys.executable, os.path.join(ROOT, name), *args],
        cwd=cwd,
        text=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        timeout=300,
        **options,
    )


def train(cwd, *args, ok=True, **options):
    run = script("train.py", "--dataset=tiny", *TINY, *args, cwd=cwd, **options)
    if ok:
        assert run.returncode == 0, run.stderr[-3000:]
    else:  # a mistake is told in one line, before any training
        assert (
            run.returncode == 1
            and run.stderr.count("\n") == 1
            and run.stderr.startswith("train.py: ")
        ), run.stderr
        assert "tok/s" not in run.stdout
    return run


def log(run):
    with open(os.path.join(run, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with data/tiny: 200 small documents, bytes for tokens."""
    cwd = tmp_path_factory.mktemp("place")
    rng, words = random.Random(0), "the cat sat on a mat and saw one red hat in an old van".split()
    docs = [" ".join(rng.choices(words, k=rng.randrange(10, 30))) + "." for _ in range(200)]
    (cwd / "tiny.txt").write_text("<|endoftext|>".join(docs))
    run = script("prepare.py", "tiny.txt", "--tokenizer=byte", "--val_fraction=0.1", cwd=cwd)
    assert run.returncode == 0, run.stderr
    return cwd


@pytest.fixture(scope="module")
def finished(place):
    """A finished run of 20 steps, and what it printed."""
    return place / "out" / "toy", train(place).stdout


# --- a run from end to end


def test_a_run_ends_where_it_should(finished):
    out, text = finished
    rows = log(out)
    val = [(r["step"], r["val/loss"]) for r in rows if "val/loss" in r]
    assert [s for s, _ in val] == [0, 10, 20] and val[-1][1] < val[0][1] - 0.3
    steps = [r for r in rows if "train/loss" in r]
    assert [r["step"] for r in steps] == [5, 10, 15, 20]
    for key in (
        "train/lr",
        "train/grad_norm",
        "train/tok_per_sec",
        "train/epoch",
        "time/train_s",
        "cost/eta_hours",
    ):
        assert all(r[key] >= 0 for r in steps), key
    assert sorted(os.listdir(out)) == [
        "best",
        "log.jsonl",
        "loss.png",
        "samples.txt",
        "step_000010",
        "step_000020",
    ]
    assert text.count("--- a sample ---") == 3 and "python sample.py --out_dir=out/toy" in text
    assert (
        "step     20 | val loss" in text
        and "tok/s" in text
        and "0:00:00 left" in text
        and "\r" not in text
    )


def test_a_checkpoint_is_a_hugging_face_model(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model import GPT

    checkpoint = finished[0] / "step_000020"
    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    ids = tokenizer("the cat, né 1742 \U0001f600", return_tensors="pt").input_ids
    assert (
        ids[0].tolist() == list("the cat, né 1742 \U0001f600".encode())
        or tokenizer.decode(ids[0]) == "the cat, né 1742 \U0001f600"
    )
    ours = GPT.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)[0]).abs().max() < 1e-4
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id is not None
    torch.load(checkpoint / "trainer.pt", weights_only=True)
    assert all(
        t.dtype == torch.float32 for t in load_file(checkpoint / "model.safetensors").values()
    )


def test_sample(place, finished):
    args = (
        "sample.py",
        "--start=the cat",
        "--num_samples=2",
        "--max_new_tokens=20",
        "--out_dir=out/toy",
    )
    a, b = script(*args, cwd=place), script(*args, "--seed=1338", cwd=place)
    assert a.returncode == 0 and a.stdout.count("the cat") == 2, a.stderr
    # sample i draws from seed + i, so the second of one seed is the first of the next
    assert a.stdout.split("---------------\n")[1] == b.stdout.split("---------------\n")[0]
    (place / "prompt.txt").write_text("a mat")
    run = script(
        "sample.py", "--start=FILE:prompt.txt", "--num_samples=1", "--temperature=0", cwd=place
    )  # the newest run
    assert run.returncode == 0 and run.stdout.startswith("a mat")


@pytest.mark.parametrize(
    "args, said",
    [
        (["--out_dir=nowhere"], "out_dir=nowhere: no such directory"),
        (["--start=FILE:nothing.txt"], "nothing.txt"),
        (["--init_from=data"], "data: neither a model directory"),
    ],
)
def test_sample_refuses_in_one_line(place, finished, args, said):
    run = script("sample.py", *args, cwd=place)
    assert run.returncode == 1 and said in run.stderr and run.stderr.count("\n") == 1


# --- where a run begins


def test_the_same_command_resumes_and_trains_longer(place, finished):
    out = ("--out_dir=out/longer", "--decay_lr=False")
    train(place, *out)
    again = train(place, *out)
    assert "resuming out/longer/step_000020" in again.stdout and "tok/s" not in again.stdout
    train(place, *out, "--max_iters=25", "--init_from=resume")
    whole = place / "out" / "whole"
    train(place, "--out_dir=out/whole", "--decay_lr=False", "--max_iters=25")
    a, b = (r / "step_000025" / "model.safetensors" for r in (place / "out" / "longer", whole))
    assert a.read_bytes() == b.read_bytes()


def test_another_model_or_data_set_is_refused_and_nothing_is_touched(place, finished):
    before = {
        f: os.stat(os.path.join(d, f)).st_mtime_ns
        for d, _, files in os.walk(finished[0])
        for f in files
    }
    for arg, said in (
        ("--n_layer=3", "holds a run with n_layer=2, this one asks for 3"),
        ("--rope_theta=500", "rope_theta=300.0, this one asks for 500.0"),
        ("--doc_mask=False", "doc_mask=True, this one asks for False"),
    ):
        assert said in train(place, arg, ok=False).stderr
    assert before == {
        f: os.stat(os.path.join(d, f)).st_mtime_ns
        for d, _, files in os.walk(finished[0])
        for f in files
    }


def test_scratch_on_the_command_line_sets_the_old_run_aside(place):
    train(place, "--out_dir=out/again", "--max_iters=3")
    old = (place / "out" / "again" / "step_000003" / "model.safetensors").read_bytes()
    text = train(
        place, "--out_dir=out/again", "--max_iters=2", "--init_from=scratch", "--seed=5"
    ).stdout
    assert (
        "set aside as out/again~1" in text
        and "--init_from=scratch" not in text.split("train longer")[1]
    )
    assert (place / "out" / "again~1" / "step_000003" / "model.safetensors").read_bytes() == old
    assert os.path.exists(place / "out" / "again" / "step_000002")
    # what is refused, or only measured, moves nothing
    assert (
        "no such data set"
        in train(
            place, "--out_dir=out/again", "--init_from=scratch", "--dataset=none", ok=False
        ).stderr
    )
    train(place, "--out_dir=out/again", "--init_from=scratch", "--eval_only")
    assert not os.path.exists(place / "out" / "again~2")


def test_two_trainings_at_once_in_one_directory(place, finished):
    import fcntl

    handle = os.open(finished[0], os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for arg in ("--max_iters=30", "--init_from=scratch"):
            assert (
                "out/toy: another training is under way in it" in train(place, arg, ok=False).stderr
            )
    finally:
        os.close(handle)


def test_a_run_tells_what_changed_and_how_it_goes_on(place):
    train(place, "--out_dir=out/told", "--max_iters=2", "--weight_decay=0.1")
    with open(
        place / "out" / "told" / "log.jsonl", "ab"
    ) as f:  # what a full disk or a hand may leave
        f.write(b'[1]\n{"a": 1}\n\xff\n')
    run = train(
        place,
        "--out_dir=out/told",
        "--max_iters=3",
        "--weight_decay=0.2",
        '--sample_start=a "red" hat',
    )
    assert "weight_decay 0.1 -> 0.2, max_iters 2 -> 3" in run.stdout.split("changed since: ")[1]
    assert "'--start=a \"red\" hat'" in run.stdout  # as a shell takes it
    assert (
        "init_from='scratch', this one asks for 'out/toy'"
        in train(place, "--out_dir=out/told", "--init_from=out/toy", ok=False).stderr
    )


def test_weights_from_a_run_or_a_model_directory(place, finished):
    run = train(
        place,
        "--out_dir=out/tuned",
        "--init_from=out/toy",
        "--max_iters=2",
        "--learning_rate=0.0",
        "--muon_lr=0.0",
        "--dropout=0.1",
    )
    assert "weights from out/toy/step_000020" in run.stdout
    first = log(place / "out" / "tuned")[1]["val/loss"]
    last = [row["val/loss"] for row in log(finished[0]) if "val/loss" in row][-1]
    assert first == pytest.approx(last, abs=1e-4)
    again = train(
        place,
        "--out_dir=out/tuned",
        "--init_from=out/toy",
        "--max_iters=3",
        "--dropout=0.1",
        "--init_std=0.5",
    )
    assert (
        "resuming out/tuned/step_000002" in again.stdout
    )  # how weights would begin is no reason to refuse
    a, b = (
        load_file(d / "model.safetensors")
        for d in (finished[0] / "step_000020", place / "out" / "tuned" / "step_000002")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    said = train(
        place, "--out_dir=out/tuned2", "--init_from=out/toy", "--n_layer=3", ok=False
    ).stderr
    assert "n_layer=3 was asked for, the model in out/toy has 2" in said


def test_killed_at_random_and_resumed_equals_uninterrupted(place):
    """kill -9 at three moments; the weights of step 60 are byte for byte those of a run that nobody killed."""
    args = (
        "--max_iters=60",
        "--eval_interval=1000",
        "--checkpoint_interval=3",
        "--dropout=0.1",
        "--log_interval=1",
    )
    train(place, "--out_dir=out/calm", *args)
    command = [
        sys.executable,
        os.path.join(ROOT, "train.py"),
        "--dataset=tiny",
        *TINY,
        "--out_dir=out/killed",
        *args,
    ]
    rng = random.Random(7)
    for kill in range(3):
        process = subprocess.Popen(
            command,
            cwd=place,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        until = f"step {17 * (kill + 1):6d} |"
        for line in process.stdout:
            if line.startswith(until):
                time.sleep(rng.random() * 0.05)
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    text = train(place, "--out_dir=out/killed", *args).stdout
    assert "resuming out/killed/step_0000" in text
    a, b = (
        (place / "out" / r / "step_000060" / "model.safetensors").read_bytes()
        for r in ("calm", "killed")
    )
    assert a == b
    losses = lambda r: [
        (x["step"], x["train/loss"]) for x in log(place / "out" / r) if "train/loss" in x
    ]
    assert losses("calm") == losses("killed")  # every step is in the log once


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(place, number):
    out = f"out/{number.name}"
    process = subprocess.Popen(
        [
            sys.executable,
            os.path.join(ROOT, "train.py"),
            "--dataset=tiny",
            *TINY,
            f"--out_dir={out}",
            "--max_iters=100000",
            "--log_interval=1",
            "--eval_interval=100000",
        ],
        cwd=place,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("step      4 |"):
            process.send_signal(number)
            break
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and not errors
    assert f"{number.name}: stopped after step" in rest and "train.py --dataset=tiny" in rest
    (saved,) = [d for d in os.listdir(place / out) if d.startswith("step_")]
    assert int(saved[5:]) >= 4


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(place):
    out = place / "out" / "damaged"
    train(place, "--out_dir=out/damaged")
    weights = out / "step_000020" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with open(out / "log.jsonl", "a") as f:
        f.write('{"step": 20, "tra')  # a line that a full disk cut
    text = train(place, "--out_dir=out/damaged", "--max_iters=22", "--keep_checkpoints=1").stdout
    assert (
        "step_000020 is damaged and passed over" in text
        and "resuming out/damaged/step_000010" in text
    )
    assert {d for d in os.listdir(out) if d.startswith("step")} == {
        "step_000020.damaged",
        "step_000022",
    }


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (999_000, 1_000_000, 20):
        (tmp_path / f"step_{step:06d}").mkdir()
        (tmp_path / f"step_{step:06d}" / "config.json").touch()
    assert [os.path.basename(d) for d in runs.checkpoints(tmp_path)] == [
        "step_000020",
        "step_999000",
        "step_1000000",
    ]


# --- one mean over all targets


def test_micro_batches_and_processes_do_not_change_a_step(place):
    """1 x 8, 4 x 2 and two processes: the same losses, and two processes' checkpoint goes on in one."""
    # a moderate rate: at 0.02 this run falls so fast that the last bit of a sum becomes 2e-5 by step 50
    args = ["--eval_interval=1000", "--log_interval=1", "--max_iters=50", "--muon_lr=0.005"]
    shapes = {
        "one": ["--batch_size=8"],
        "four": ["--batch_size=2", "--gradient_accumulation_steps=4"],
    }
    for name, shape in shapes.items():
        train(place, f"--out_dir=out/{name}", *shape, *args)
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            os.path.join(ROOT, "train.py"),
            "--dataset=tiny",
            *TINY,
            "--out_dir=out/two",
            "--batch_size=8",
            *args,
        ],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    losses = {
        name: [r["train/loss"] for r in log(place / "out" / name) if "train/loss" in r]
        for name in ("one", "four", "two")
    }
    for other in ("four", "two"):
        largest = max(abs(a - b) for a, b in zip(losses["one"], losses[other]))
        print(f"one against {other}: largest difference of loss {largest:.1e}")
        assert len(losses[other]) == 50 and largest < 1e-5
    train(place, "--out_dir=out/two", "--batch_size=8", *args, "--max_iters=52")
    said = train(
        place, "--out_dir=out/odd", "--batch_size=3", ok=False, env={"RANK": "0", "WORLD_SIZE": "2"}
    ).stderr
    assert "3 sequences a step can't be shared among 2 processes" in said


# --- what goes wrong


@pytest.mark.parametrize(
    "args, said",
    [
        (["--dataset=nothing"], "python prepare.py YOUR_TEXT.txt --name=nothing"),
        (["--dataset=tiny:0.5,nothing:0.5"], "data/nothing: no such data set"),
        (["--dataset=tiny:-1"], "a weight above 0"),
        (
            ["--vocab_size=100"],
            "smaller than the 257 ids of tiny (byte): the same command with --vocab_size=0",
        ),
        (["--block_size=100000"], "too few for one window of block_size=100000"),
        (["--n_head=3"], "not divisible by n_head=3"),
        (["--init_from=resume", "--out_dir=out/none"], "no run to resume"),
        (["--optimizer=sgd"], "optimizer='sgd'"),
        (["--batch_size=0"], "batch_size=0: expected at least 1"),
        (["--inner_epochs=0"], "inner_epochs=0: expected at least 1"),
        (["--keep_checkpoints=-1"], "keep_checkpoints=-1: expected at least 0"),
        (["--beta=0"], "beta=0.0: expected more than 0"),
        (["--label_smoothing=0.6"], "label_smoothing=0.6: expected at least 0 and at most 0.5"),
        (["--device=tpu"], "device='tpu': expected 'auto'"),
        (["--device=cuda:99"], "finds none here"),
        (["--out_dir=tiny.txt"], "out_dir='tiny.txt': not a directory"),
        (
            ["--stage=dpo", "--init_from=gpt2"],
            "data/tiny holds text, stage='dpo' wants pairs of answers",
        ),
        (["--rollout_temperature=0.0"], "rollout_temperature=0.0: expected more than 0"),
        (["--stage=rlvr", "--group_size=1"], "group_size=1: expected at least 2"),
        (["--schedule=linear"], "schedule='linear'"),
        (["--dtype=half"], "dtype='half'"),
        (["--init_from=./nowhere"], "nowhere: no such directory"),
    ],
)
def test_bad_input_is_told_in_one_line(place, args, said):
    run = train(place, *(["--out_dir=out/bad"] + args), ok=False)
    assert said in run.stderr and not os.path.exists(place / "out" / "bad")


def replace_bin(directory, content):
    """Another train.bin, with a meta.json that has neither its size nor its checksum."""
    meta = json.loads((directory / "meta.json").read_text())
    for key in ("crc32", "train_tokens"):
        meta.pop(key, None)
    (directory / "meta.json").write_text(json.dumps(meta))
    (directory / "train.bin").write_bytes(content)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "0 bytes are no tokens"),
        (b"abc", "no whole number of uint16 tokens"),
        (np.full(500, 300, "<u2").tobytes(), "token 300 exceeds the vocabulary of 257"),
    ],
)
def test_bad_bins_are_told_in_one_line(place, tmp_path, content, said):
    shutil.copytree(place / "data", tmp_path / "data")
    replace_bin(tmp_path / "data" / "tiny", content)
    assert said in train(tmp_path, ok=False).stderr


def test_data_that_changed_under_a_run(place, tmp_path):
    shutil.copytree(place / "data", tmp_path / "data")
    whole = (tmp_path / "data" / "tiny" / "train.bin").read_bytes()
    replace_bin(tmp_path / "data" / "tiny", whole)
    train(tmp_path, "--out_dir=out/changed", "--max_iters=2")
    replace_bin(tmp_path / "data" / "tiny", whole[2:] + whole[:2])
    said = train(tmp_path, "--out_dir=out/changed", ok=False).stderr
    assert "the data changed since the run in out/changed began" in said


def test_a_full_disk_leaves_the_checkpoint_before_whole(place):
    """A quota on file size stands in for the full disk: the larger trainer.pt of --optimizer=adamw won't fit."""
    import resource

    out = place / "out" / "full"
    train(place, "--out_dir=out/full", "--max_iters=10")
    limit = os.path.getsize(out / "step_000010" / "model.safetensors") - 1000
    run = script(
        "train.py",
        "--dataset=tiny",
        *TINY,
        "--out_dir=out/full",
        cwd=place,
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        ),
    )
    assert (
        run.returncode == 1
        and "the last step is not in out/full" in run.stderr
        and "train longer" not in run.stdout
    )
    assert "step_000020 could not be written, the one before it stays" in run.stdout
    assert [d for d in os.listdir(out) if d.startswith(("step", ".writing"))] == ["step_000010"]
    assert "resuming out/full/step_000010" in train(place, "--out_dir=out/full").stdout


def test_bad_steps_are_skipped_and_roll_back(place, tmp_path):
    """A text with a poisoned stretch: tokens that no model expects raise the loss; the steps are skipped, and
    enough of them in a row go back to the last checkpoint and past the data."""
    shutil.copytree(place / "data", tmp_path / "data")
    tokens = np.tile(np.frombuffer(b"the cat sat on a mat and ran. ", np.uint8).astype("<u2"), 700)
    rng = np.random.default_rng(0)
    per = 32
    for window in rng.choice(len(tokens) // per, len(tokens) // per // 20, replace=False):
        tokens[window * per : (window + 1) * per] = rng.integers(128, 256, per)
    replace_bin(tmp_path / "data" / "tiny", tokens.tobytes())
    args = (
        "--batch_size=1",
        "--max_iters=300",
        "--spike_z=6.0",
        "--eval_interval=50",
        "--max_bad_steps=1",
        "--max_rollbacks=2",
        "--schedule=constant",
        "--eval_iters=1",
    )
    run = script("train.py", "--dataset=tiny", *TINY, *args, cwd=tmp_path)
    assert (
        run.returncode == 1 and "1 bad step in a row" in run.stderr and run.stderr.count("\n") == 1
    )
    events = [r["event"] for r in log(tmp_path / "out" / "toy") if "event" in r]
    assert events.count("rollback") == 2 and events.count("skipped") == 3
    assert "skipped: loss spike" in run.stdout and "past the data that caused them" in run.stdout
    train(
        tmp_path, *args, "--max_rollbacks=3", "--max_bad_steps=99", "--dataset=tiny"
    )  # the checkpoint is intact
    half = train(
        tmp_path, *args, "--max_bad_steps=99", "--dtype=float16", "--out_dir=out/half"
    ).stdout
    assert "skipped: loss spike" in half and "step    300 | val loss" in half


# --- ancestors


def test_nanogpt_configs_run(place):
    """nanoGPT's key names, written as its users write them, behind config/nanogpt.py."""
    (place / "theirs.py").write_text(
        "out_dir = 'out/theirs'\neval_interval = 5\neval_iters = 2\nlog_interval = 1\nalways_save_checkpoint = False\n"
        "wandb_log = False\nwandb_project = 'x'\nwandb_run_name = 'mini'\ndataset = 'tiny'\ngradient_accumulation_steps = 1\n"
        "batch_size = 4\nblock_size = 32\nn_layer = 2\nn_head = 2\nn_embd = 32\ndropout = 0.2\nlearning_rate = 1e-3\n"
        "max_iters = 10\nlr_decay_iters = 10\nmin_lr = 1e-4\nbeta2 = 0.99\nwarmup_iters = 4\ncompile = False\ndevice = 'cpu'\n"
    )
    run = script("train.py", os.path.join(ROOT, "config", "nanogpt.py"), "theirs.py", cwd=place)
    assert run.returncode == 0, run.stderr
    rates = [r["train/lr"] for r in log(place / "out" / "theirs") if "train/lr" in r]
    import math

    theirs = [
        1e-3 * (i + 1) / 5 if i < 4 else 1e-4 + 0.5 * (1 + math.cos(math.pi * (i - 4) / 6)) * 9e-4
        for i in range(10)
    ]
    assert rates == pytest.approx(theirs)
    vocab = json.load(open(place / "data" / "tiny" / "meta.json"))["vocab_size"]
    weights = load_file(place / "out" / "theirs" / "step_000010" / "model.safetensors")
    n = sum(t.numel() for k, t in weights.items() if not k.endswith("bias"))
    # its own count: embeddings, positions, and a block of 12 n_embd^2 and two norms, without biases
    assert n == vocab * 32 + 32 * 32 + 2 * (12 * 32 * 32 + 2 * 32) + 32
    assert all(not t.any() for k, t in weights.items() if k.endswith("bias"))


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("smallm", 29_995_392),
        ("smol_135m", 134_515_008),
        ("smol2_135m", 134_515_008),
        ("smol_360m", 361_821_120),
        ("smol_600m", 653_207_040),
    ],
)
def test_the_five_systems_count_to_the_digit(tmp_path, name, parameters):
    run = script(
        "train.py",
        os.path.join(ROOT, "config", f"{name}.py"),
        "--dry_run=True",
        "--gpu=H100",
        cwd=tmp_path,
    )
    assert run.returncode == 0 and f"parameters        {parameters:,}\n" in run.stdout, run.stderr
    assert "hours, $" in run.stdout and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        "smallm",
        pytest.param("smol_135m", marks=pytest.mark.slow),
        pytest.param("smol2_135m", marks=pytest.mark.slow),
        pytest.param("smol_360m", marks=pytest.mark.slow),
        pytest.param("smol_600m", marks=pytest.mark.slow),
    ],
)
def test_a_real_step_of_each(place, tmp_path, name):
    """At its own size, on windows of 64 tokens: the loss begins within 1.0 of ln(vocab), and the step is taken."""
    vocab = {"smallm": 50257, "smol_600m": 32000}.get(name, 49152)
    data = tmp_path / "data" / "any"
    data.mkdir(parents=True)
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, vocab, 400).astype("<u2").tofile(data / f"{split}.bin")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (data / file).write_bytes((place / "data" / "tiny" / file).read_bytes())
    (data / "meta.json").write_text(
        json.dumps(dict(tokenizer="byte", vocab_size=vocab, dtype="uint16", eos_id=0))
    )
    run = script(
        "train.py",
        os.path.join(ROOT, "config", f"{name}.py"),
        "--dataset=any",
        "--batch_size=1",
        "--block_size=64",
        "--max_positions=64",
        "--gradient_accumulation_steps=1",
        "--max_iters=1",
        "--eval_iters=1",
        "--sample_start=a",
        "--log_interval=1",
        "--wandb_log=False",
        "--tensorboard=False",
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    import math

    first = next(r for r in log(tmp_path / "out" / name) if "train/loss" in r)
    assert abs(first["train/loss"] - math.log(vocab)) < 1.0 and math.isfinite(
        first["train/grad_norm"]
    )


def test_wandb_offline_keeps_its_own_log(place):
    """The real client, with nobody logged in and no network: one warning, and a run file that it can read back."""
    pytest.importorskip("wandb")
    env = {"WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(place)}
    text = train(place, "--wandb_log", "--out_dir=out/logged", "--max_iters=5", env=env).stdout
    assert text.count("warning: not logged in to W&B") == 1
    files = [
        os.path.join(d, f)
        for d, _, names in os.walk(place / "out" / "logged" / "wandb")
        for f in names
        if f.endswith(".wandb")
    ]
    assert len(files) == 1 and b"train/tok_per_sec" in open(files[0], "rb").read()
