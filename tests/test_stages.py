"""SFT, DPO and RLVR as their users run them: processes, on a byte-level model of a few thousand weights."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from test_train import ROOT, log, script

import prepare
from model import GPT, GPTConfig

TINY = [
    "--batch_size=4",
    "--eval_iters=2",
    "--eval_interval=5",
    "--log_interval=1",
    "--warmup_iters=0",
    "--dtype=float32",
    "--max_iters=10",
    "--block_size=64",
    "--spike_z=0.0",
    "--max_completion=8",
    "--group_size=4",
]


def train(cwd, *args, ok=True):
    run = script("train.py", *TINY, *args, cwd=cwd)
    assert (run.returncode == 0) == ok, run.stderr[-3000:]
    if not ok:
        assert run.stderr.count("\n") == 1 and run.stderr.startswith("train.py: "), run.stderr
    return run.stderr if not ok else run.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """data/text, chat, prefs, sums and, from them, runs out/base and out/chat."""
    cwd = tmp_path_factory.mktemp("stages")
    sums = [(f"{a}+{b}?", str(a + b)) for a in range(1, 8) for b in range(1, 8) if a + b < 10]
    write = lambda name, rows: (cwd / f"{name}.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows)
    )
    (cwd / "text.txt").write_text("<|endoftext|>".join(f"{q} {a}" for q, a in sums * 30))
    chat = [
        dict(messages=[dict(role="user", content=q), dict(role="assistant", content=a)])
        for q, a in sums * 8
    ]
    write(
        "chat",
        [
            dict(
                messages=m["messages"]
                + [dict(role="user", content=f"thanks {i}"), dict(role="assistant", content="ok")]
            )
            for i, m in enumerate(chat)
        ],
    )
    write(
        "prefs",
        [dict(prompt=q, chosen=f"yes {a}", rejected=f"no {a}") for q, a in sums]
        + [
            r
            for i in range(8)
            for r in (
                dict(prompt=f"same {i}", chosen="x", rejected="x"),
                dict(prompt=f"long {i}" * 40, chosen="x", rejected="y"),
            )
        ],
    )
    write(
        "sums",
        [dict(question=q, answer=a) for q, a in sums]
        + [dict(question=f"{i}" * 200, answer="1") for i in range(8)],
    )
    for name, more in (
        ("text", ["--tokenizer=byte"]),
        ("chat", ["--tokenizer=byte"]),
        ("prefs", []),
        ("sums", ["--as=verify"]),
    ):
        file = "text.txt" if name == "text" else f"{name}.jsonl"
        run = script("prepare.py", file, *more, "--val_fraction=0.2", cwd=cwd)
        assert run.returncode == 0, run.stderr
    train(
        cwd,
        "--dataset=text",
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=32",
        "--out_dir=out/base",
        "--max_positions=128",
    )
    text = train(
        cwd,
        "--stage=sft",
        "--dataset=chat",
        "--init_from=out/base",
        "--out_dir=out/chat",
        "--max_iters=40",
        "--sample_start=1+1?",
    )
    assert "the model grows rows for 2 chat tokens" in text and "> 1+1?" in text
    return cwd


def test_sft_learns_and_declares_both_ends(place):
    rows = [r["val/loss"] for r in log(place / "out" / "chat") if "val/loss" in r]
    assert rows[-1] < rows[0] - 1
    said = json.load(open(place / "out" / "chat" / "step_000040" / "generation_config.json"))
    assert said["eos_token_id"] == [256, 258]
    assert load_file(place / "out" / "chat" / "step_000040" / "model.safetensors")[
        "model.embed_tokens.weight"
    ].shape == (259, 32)


def test_sft_wants_conversations(place):
    assert "stage='sft' wants conversations" in train(
        place, "--stage=sft", "--dataset=text", "--init_from=out/base", "--out_dir=out/no", ok=False
    )


@pytest.mark.parametrize("kind", ["sigmoid", "apo_zero", "apo_down"])
def test_preferences_are_learned(place, kind):
    args = (
        "--stage=dpo",
        "--dataset=prefs",
        "--init_from=out/chat",
        f"--out_dir=out/{kind}",
        f"--pref_loss={kind}",
        "--learning_rate=3e-3",
        "--muon_lr=0.01",
        "--schedule=constant",
    )
    text = train(place, *args)
    assert "left out" in text and "longer than block_size=64" in text
    rows = log(place / "out" / kind)
    val = [r for r in rows if "val/rewards/accuracies" in r]
    assert val[0]["val/rewards/margins"] == pytest.approx(
        0, abs=1e-5
    )  # policy and reference begin as one
    assert val[-1]["val/rewards/margins"] > 0.01 and val[-1]["val/loss"] < val[0]["val/loss"]
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"} < set(
        next(r for r in rows if "train/loss" in r)
    )
    if (
        kind == "sigmoid"
    ):  # the model that it began with is kept beside it, and what is only measured changes nothing
        assert val[0]["val/loss"] == pytest.approx(0.693147, abs=1e-5)
        start = place / "out" / kind / "start" / "model.safetensors"
        assert (
            start.read_bytes()
            == (place / "out" / "chat" / "step_000040" / "model.safetensors").read_bytes()
        )
        before = sorted(os.listdir(place / "out" / kind))
        text = train(
            place, *args, "--eval_only", "--init_from=out/base", "--reference_model=out/chat"
        )
        assert (
            "val/rewards/accuracies" in text and sorted(os.listdir(place / "out" / kind)) == before
        )
        assert "resuming" in train(place, *args, "--max_iters=11")


def test_a_dry_run_has_the_shape_of_the_model_that_a_stage_begins_with(place):
    sft = ("--stage=sft", "--dataset=chat", "--dry_run")
    count = GPT.from_pretrained(place / "out" / "base" / "step_000010").n_params()
    assert f"parameters        {count:,}\n" in train(place, *sft, "--init_from=out/base")
    said = train(place, *sft, "--init_from=out/nothing", ok=False)
    assert "out/nothing" in said and "asks this model for its shape" in said
    said = train(place, "--stage=dpo", "--dataset=mine", "--init_from=out/chat", ok=False)
    assert "python prepare.py YOUR_FILE.jsonl --as=prefs --name=mine" in said


def test_models_beside_share_the_tokenizer(place, tmp_path):
    shutil.copytree(place / "out" / "chat" / "step_000040", tmp_path / "other")
    spec = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "other" / "trainer.pt").unlink()  # it would tell that the file was changed
    for stage, key in (("dpo", "reference_model"), ("rlvr", "verifier_model")):
        said = train(
            place,
            f"--stage={stage}",
            f"--dataset={'prefs' if stage == 'dpo' else 'sums'}",
            "--init_from=out/chat",
            f"--{key}={tmp_path}/other",
            "--out_dir=out/no",
            ok=False,
        )
        assert f"{key}='{tmp_path}/other' has another tokenizer" in said
    assert not os.path.exists(place / "out" / "no")


def test_a_stage_starts_over_from_the_model_of_its_config(place):
    (place / "again.py").write_text(
        "stage = 'dpo'\ndataset = 'prefs'\ninit_from = 'out/chat'\nmax_iters = 2\n"
    )
    train(place, "again.py", "--max_iters=2")
    text = train(place, "again.py", "--max_iters=2", "--init_from=scratch")
    assert "set aside as out/again~1" in text and "weights from out/chat" in text


RLVR = (
    "--stage=rlvr",
    "--dataset=sums",
    "--init_from=out/chat",
    "--muon_lr=0.002",
    "--learning_rate=1e-3",
    "--verifier=number",
    "--eval_iters=1",
)


def test_rewards_are_measured_and_a_killed_run_ends_the_same(place):
    """Rollouts depend on position alone: killed after a checkpoint and resumed, the weights are byte for byte the same."""
    more = (
        *RLVR,
        "--inner_epochs=2",
        "--kl_coef=0.05",
        "--checkpoint_interval=2",
        "--max_iters=8",
        "--eval_interval=8",
    )
    text = train(place, *more, "--out_dir=out/calm")
    assert "a prompt longer than 56 tokens" in text
    rows = log(place / "out" / "calm")
    step = next(r for r in rows if "train/loss" in r)
    assert {
        "reward/mean",
        "reward/equal_groups",
        "completions/length",
        "completions/cut",
        "policy/entropy",
    } < set(step)
    val = [r for r in rows if "val/pass@1" in r]
    assert val[0]["val/policy/kl"] == pytest.approx(0, abs=1e-5) and {
        "val/pass@4",
        "val/policy/entropy",
    } < set(val[0])
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "train.py"), *TINY, *more, "--out_dir=out/killed"],
        cwd=place,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("step      5 |"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    assert "resuming" in train(place, *more, "--out_dir=out/killed")
    a, b = (
        (place / "out" / r / "step_000008" / "model.safetensors").read_bytes()
        for r in ("calm", "killed")
    )
    assert a == b


def test_guards_of_the_verifier(place):
    (place / "raises.py").write_text("""calls = 0
def verify(prompt, completion, answer):
    global calls
    calls += 1
    if calls % 2:
        raise KeyError('no')
    return float('nan') if calls % 4 else 0.0
""")
    text = train(place, *RLVR[:-3], "--verifier=raises.py", "--max_iters=2", "--out_dir=out/raises")
    assert text.count("the verifier raised") == 1 and "KeyError" in text
    rows = [r for r in log(place / "out" / "raises") if "reward/mean" in r]
    assert all(r["reward/mean"] == 0 and r["reward/equal_groups"] == 1 for r in rows)
    assert rows[-1]["reward/verifier_raised"] >= rows[0]["reward/verifier_raised"] > 0
    for bad in ("nothing.py", "regex:(", "wish"):
        assert f"--verifier={bad}" in train(
            place, *RLVR[:-2], f"--verifier={bad}", "--out_dir=out/no", ok=False
        )
    assert "no such directory" in train(
        place, *RLVR, "--verifier_model=./nowhere", "--out_dir=out/no", ok=False
    )
    assert "starts from a model" in train(
        place, "--stage=rlvr", "--dataset=sums", "--out_dir=out/no", ok=False
    )
    assert not os.path.exists(place / "out" / "no")


def test_a_model_may_be_the_verifier(place):
    train(
        place,
        *RLVR,
        "--verifier_model=out/chat/step_000040",
        "--max_iters=2",
        "--out_dir=out/judged",
    )
    rewards = [r["reward/mean"] for r in log(place / "out" / "judged") if "train/loss" in r]
    assert all(0 <= r <= 1 for r in rewards)


def test_rewards_are_measured_alike_by_two_processes(place):
    args = [*TINY, *RLVR, "--eval_only", "--eval_iters=2", "--out_dir=out/no"]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            os.path.join(ROOT, "train.py"),
            *args,
        ],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    one, two = (
        next(line for line in text.splitlines() if line.startswith("val/"))
        for text in (train(place, *args), run.stdout)
    )
    assert one == two


@pytest.mark.parametrize("stage, dataset", [("dpo", "prefs"), ("rlvr", "sums")])
def test_what_a_run_began_with_may_be_gone(place, stage, dataset):
    """From a model without chat tokens, which is then lost: the run has kept it."""
    shutil.copytree(place / "out" / "base" / "step_000010", place / "start")
    args = (
        f"--stage={stage}",
        f"--dataset={dataset}",
        "--init_from=./start",
        f"--out_dir=out/{stage}_gone",
        "--eval_iters=1",
    )
    assert "the model grows rows for 2 chat tokens" in train(place, *args, "--max_iters=2")
    row = next(r for r in log(place / "out" / f"{stage}_gone") if "train/loss" in r)
    assert row["train/tok_per_sec"] > 0
    shutil.rmtree(place / "start")
    assert "resuming" in train(place, *args, "--max_iters=3")
    shutil.rmtree(place / "out" / f"{stage}_gone" / "start")  # as a run made before it was kept
    assert "began with is no longer there" in train(place, *args, ok=False)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "rlvr"])
def test_one_step_on_real_problems_at_135m(tmp_path_factory, shared, stage):
    """GSM8K, SmolLM2's tokenizer, smol_135m's shape with random weights: one step of each stage is taken."""
    cwd = tmp_path_factory.mktemp(stage)
    problems = [json.loads(line) for line in open(os.path.join(shared, "gsm8k_train.jsonl"))][:24]
    rows = (
        problems
        if stage != "dpo"
        else [
            dict(prompt=p["question"], chosen=p["answer"], rejected=p["answer"] + "1")
            for p in problems
        ]
    )
    (cwd / "gsm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = {"sft": "chat", "dpo": "prefs", "rlvr": "verify"}[stage]
    tokenizer = os.path.join(shared, "smollm2_tokenizer.json")
    run = script(
        "prepare.py",
        "gsm.jsonl",
        f"--as={kind}",
        f"--tokenizer={tokenizer}",
        "--val_fraction=0.25",
        cwd=cwd,
    )
    assert run.returncode == 0, run.stderr
    tok = prepare.with_chat_tokens(prepare.load_tokenizer(tokenizer))
    tok.save(cwd / "start")
    GPT(
        GPTConfig(
            n_layer=30,
            n_head=9,
            n_kv_head=3,
            n_embd=576,
            ffn_dim=1536,
            block_size=512,
            vocab_size=tok.vocab_size,
            init_std=0.0417,
        )
    ).save_pretrained(cwd / "start")
    run = script(
        "train.py",
        f"--stage={stage}",
        "--dataset=gsm",
        "--init_from=start",
        "--out_dir=out",
        "--block_size=512",
        "--batch_size=2",
        "--group_size=4",
        "--max_completion=64",
        "--max_iters=1",
        "--eval_iters=1",
        "--log_interval=1",
        "--optimizer=adamw",
        "--learning_rate=1e-5",
        "--spike_z=0",
        cwd=cwd,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    row = next(r for r in log(cwd / "out") if "train/loss" in r)
    assert math.isfinite(row["train/loss"]) and math.isfinite(row["train/grad_norm"])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6  # of all children so far
    print(
        f"\n{stage}: {row['time/train_s']:.1f} s the step, {peak:.1f} GB at most, loss {row['train/loss']:.3f}"
    )
