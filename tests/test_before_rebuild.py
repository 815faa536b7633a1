"""Runs and data sets as this program wrote them before train.py was rebuilt (commit 87bf808) load,
resume and sample: before_rebuild.tar.xz holds three, small, of ten steps each."""

import concurrent.futures
import json
import os
import subprocess
import sys
import tarfile

import pytest

TESTS = os.path.dirname(os.path.abspath(__file__))
TINY = "--block_size=32 --batch_size=4 --eval_iters=2 --eval_interval=5 --log_interval=1".split()
TINY += "--dtype=float32 --keep_checkpoints=1 --max_iters=12".split()
SHAPE = "--n_layer=2 --n_head=2 --n_kv_head=1 --n_embd=16 --ffn_dim=32 --warmup_iters=2".split()
RUNS = {
    "pretrain": [*TINY, *SHAPE, "--dataset=tiny", "--out_dir=out/pretrain"],
    "dpo": "--stage=dpo --dataset=prefs --init_from=out/sft --out_dir=out/dpo".split()
    + [*TINY, "--warmup_iters=0"],
}


def script(cwd, name, *args):
    command = [sys.executable, os.path.join(os.path.dirname(TESTS), name), *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, timeout=200)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """(working directory, {run: what train.py printed})."""
    cwd = tmp_path_factory.mktemp("before")
    with tarfile.open(os.path.join(TESTS, "before_rebuild.tar.xz")) as archive:
        archive.extractall(cwd, filter="data")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        texts = pool.map(lambda args: script(cwd, "train.py", *args), RUNS.values())
        return cwd, dict(zip(RUNS, texts, strict=True))


def log(cwd, run):
    with open(cwd / "out" / run / "log.jsonl") as f:
        return [json.loads(line) for line in f]


@pytest.mark.parametrize("run", RUNS)
def test_it_goes_on_where_it_was(resumed, run):
    cwd, texts = resumed
    assert f"resuming out/{run}/step_000010" in texts[run] and "damaged" not in texts[run]
    losses = {row["step"]: row["train/loss"] for row in log(cwd, run) if "train/loss" in row}
    assert sorted(losses) == list(range(1, 13))
    if run == "pretrain":  # as the program of that time went on
        assert [losses[11], losses[12]] == pytest.approx([5.3292, 5.2992], abs=1e-3)
    else:
        assert losses[12] < losses[10] < losses[1]
    checkpoints = [d for d in os.listdir(cwd / "out" / run) if d.startswith("step_")]
    assert checkpoints == ["step_000012"]


def test_a_dpo_run_still_measures_against_its_first_model(resumed):
    """It had no start/; now it has, and what is measured at step 10 is what was measured then."""
    cwd, _ = resumed
    kept = cwd / "out" / "dpo" / "start" / "model.safetensors"
    first = cwd / "out" / "sft" / "step_000010" / "model.safetensors"
    assert kept.read_bytes() == first.read_bytes()
    margins = [row["val/rewards/margins"] for row in log(cwd, "dpo") if "val/loss" in row]
    assert margins == sorted(margins) and len(margins) == 4


@pytest.mark.parametrize("run", ["pretrain", "dpo", "sft"])
def test_it_samples(resumed, run):
    """Greedily, in a context of 32 tokens: a conversation takes most of them for itself."""
    cwd, _ = resumed
    args = [f"--out_dir=out/{run}", "--start=a", "--num_samples=1", "--max_new_tokens=8"]
    assert "a" in script(cwd, "sample.py", *args, "--temperature=0")
