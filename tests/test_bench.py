"""bench.py as a user runs it, on a model so small that the figures mean nothing: every part has to report."""

import importlib.util
import json
import math
import os
import subprocess
import sys

from conftest import ROOT

TINY = [
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=32",
    "--block_size=16",
    "--batch_size=2",
    "--vocab_size=300",
    "--dataset=none",
    "--pairs=1",
    "--new_tokens=4",
    "--run_iters=2",
]
# a GPT-2, so that the plain one too has our weights, and the first losses of all three are compared
GPT2 = [
    "--norm=layernorm",
    "--mlp=gelu",
    "--pos=learned",
    "--qk_norm=False",
    "--unit_embed=False",
    "--bias",
]


def bench(directory, *args):
    return subprocess.run(
        [sys.executable, os.path.join(ROOT, "bench.py"), *args],
        cwd=directory,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
    )


def test_every_part_reports(tmp_path):
    done = bench(tmp_path, *TINY, *GPT2, "--json=found.json", "--profile")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    rows = found["results"]
    assert {row["part"] for row in rows} == {
        "train",
        "startup",
        "loop",
        "data",
        "documents",
        "evaluation",
        "checkpoint",
        "generate",
        "muon",
    }
    for row in rows:
        assert all(math.isfinite(row[key]) for key in ("ours", "theirs", "ratio") if key in row), (
            row
        )
        assert row["what"] in done.stdout
    rivals = {row["against"] for row in rows if row["what"] == "training step" and "ratio" in row}
    assert len(rivals) == 1 + bool(importlib.util.find_spec("transformers"))
    assert "first loss: ours 5." in done.stdout and ", plain 5." in done.stdout
    outside = [row["ours"] for row in rows if row["what"] == "share outside these"]
    assert len(outside) == 2 and all(0 < share < 100 for share in outside)
    assert found["threads"] == 1 and found["config"]["n_embd"] == 32
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sorted(os.listdir(tmp_path)) == ["found.json", "trace.json"]


def test_unknown_part(tmp_path):
    done = bench(tmp_path, "--only=train,lunch")
    assert done.returncode == 1 and done.stderr.startswith(
        "bench.py: only=train,lunch: there is no part 'lunch'"
    )
    assert done.stderr.count("\n") == 1
