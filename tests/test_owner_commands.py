"""The commands of a new user, typed one after the other, as processes against a stand-in of the Hub."""

import json
import os
import shlex

import numpy as np
import pytest
from conftest import SHARED
from processes import ROOT, Processes
from test_prepare import EOT, Hub

CONFIG = os.path.join(ROOT, "config", "smol_360m.py")
pytestmark = pytest.mark.slow
# what a CPU can't do of config/smol_360m.py; --batch_size=64 stays
SMALL = "--n_layer=1 --n_embd=60 --ffn_dim=64 --block_size=64 --gradient_accumulation_steps=1"
SMALL += " --max_iters=2 --eval_iters=1 --warmup_iters=1 --device=cpu --wandb_log=False"


@pytest.fixture
def program(shared, here, monkeypatch):
    """Processes whose Hub holds what the commands fetch: small files in place of gigabytes."""
    with open(os.path.join(shared, "smollm2_tokenizer.json"), "rb") as f:
        tokenizer = f.read()
    with open(os.path.join(shared, "tinystories_sample.txt"), encoding="utf-8") as f:
        stories = f.read(60_000).split("\n\n")
    ids = np.random.default_rng(0).integers(0, 49152, 20_000).astype("<u2")
    server = Hub(
        {
            "datasets/roneneldan/TinyStories": {
                "TinyStoriesV2-GPT4-train.txt": f"\n{EOT}\n".join(stories[:-9]).encode(),
                "TinyStoriesV2-GPT4-valid.txt": f"\n{EOT}\n".join(stories[-9:]).encode(),
            },
            "datasets/weights-and-wires/fineweb-6b": {
                "tokenized/train.bin": ids.tobytes(),
                "tokenized/val.bin": ids[:3000].tobytes(),
                "tokenizer/tokenizer.json": tokenizer,
            },
            "HuggingFaceTB/SmolLM2-135M": {"tokenizer.json": tokenizer, "config.json": b"{}"},
        }
    )
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(here / "hf"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.path.join(SHARED, "tiktoken_cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    processes = Processes(here)
    yield processes
    processes.close()
    server.shutdown()
    server.server_close()


def typed(program, line, fails=False):
    """Runs a line as a shell splits it: what it printed."""
    script, *args = shlex.split(line)
    patch = f"import sys\nsys.argv[1:] = {args!r}"
    done = program.run(script, patch=patch)
    assert done.code == int(fails), done.err[-3000:]
    assert "Traceback" not in done.err
    return done.all


def test_owner_commands_in_a_row(program):
    said = typed(program, "prepare.py tinystories")
    assert "data/tinystories" in said
    # this config's data is another, and is fetched at its first use
    said = typed(program, f"train.py {CONFIG} --batch_size=64 {SMALL}")
    assert "fineweb_6b: 12 GB" in said and "step      2 | loss" in said
    with open(program.cwd / "out" / "smol_360m" / "step_000002" / "config.json") as f:
        hf = json.load(f)
    assert hf["model_type"] == "llama" and hf["vocab_size"] == 49152
    said = typed(program, 'sample.py --start="Once upon a time" --max_new_tokens=8')
    assert said.count("Once upon a time") == 3 and "out/smol_360m/step_000002" in said


def test_owner_commands_for_data_of_another_vocabulary(program):
    """Stories for a model that is not theirs are refused, with two commands. Both work."""
    typed(program, "prepare.py tinystories")
    line = f"train.py {CONFIG} --batch_size=64 {SMALL} --dataset=tinystories --out_dir=out/stories"
    said = typed(program, line, fails=True)
    assert "vocab_size=49152 of the model is smaller than the 50257 ids" in said
    assert "the same command with --vocab_size=0" in said and not (program.cwd / "out").exists()
    typed(program, f"{line} --vocab_size=0")
    prepare = "python prepare.py tinystories --tokenizer=HuggingFaceTB/SmolLM2-135M "
    prepare += "--name=tinystories_49152"
    assert prepare in said and "with --dataset=tinystories_49152" in said
    typed(program, prepare.removeprefix("python "))
    other = line.replace("=tinystories", "=tinystories_49152").replace("stories ", "theirs ")
    typed(program, other.replace("out/stories", "out/theirs"))
