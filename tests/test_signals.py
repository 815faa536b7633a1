"""Training that is wrong and says nothing: what train.py must refuse, count, skip or name.

train.py is run as a user runs it, and only what it prints and writes is looked at: exit code,
output, log.jsonl, checkpoints.
"""

import functools
import itertools
import json
import math
import re
import shutil
import types

import numpy as np
import pytest
import torch
from processes import Processes
from safetensors.torch import load_file, save_file

import prepare
from model import GPT, GPTConfig

END = "<|im_end|>"

# -----------------------------------------------------------------------------
# runs of train.py

MODEL = "--n_layer=1 --n_head=2 --n_embd=32"
LOOP = (
    "--block_size=64 --batch_size=1 --eval_iters=8 --eval_interval=1000 --log_interval=1"
    " --warmup_iters=0 --schedule=constant --compile=False --device=cpu"
)
SFT = f"--stage=sft {MODEL} {LOOP} --dtype=float32"
RLVR = (
    f"--stage=rlvr {LOOP} --dtype=float32 --dataset=problems --init_from=letters --eval_iters=2"
    " --max_completion=24 --group_size=8 --learning_rate=1e-3 --muon_lr=1e-3 --spike_z=0.0"
)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train.run(*args, patch="") runs train.py in the directory train.cwd and returns its exit
    code and output; `args` are texts of options with spaces between them. train.finished()
    wants exit code 0.

    `patch` is Python code that runs first; it pretends to be another machine.
    """
    processes = Processes(tmp_path_factory.mktemp("signals"))
    run = functools.partial(processes.run, "train.py")
    finished = functools.partial(processes.finished, "train.py")
    yield types.SimpleNamespace(cwd=processes.cwd, run=run, finished=finished)
    processes.close()


def refused(result, *words):
    """Exit code 1, and one line on standard error in which all `words` stand."""
    assert result.code == 1, result.all[-3000:]
    assert result.err.count("\n") == 1 and result.err.startswith("train.py: "), result.err[-3000:]
    for word in words:
        assert word in result.err


def rows_of(run):
    with open(run / "log.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def steps_of(run):
    """{step: its row of the log}, for a run with log_interval=1."""
    return {row["step"]: row for row in rows_of(run) if "train/lr" in row}


def weights(run, step):
    return (run / f"step_{step:06d}" / "model.safetensors").read_bytes()


def optimizer_state(run, step):
    state = torch.load(run / f"step_{step:06d}" / "trainer.pt", weights_only=True)
    return [optimizer["state"] for optimizer in state["optimizers"]]


def equal(a, b):
    """Whether two nests of dicts, lists and tensors are the same, bit for bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# -----------------------------------------------------------------------------
# data and models


def write_meta(directory, tokenizer, kind):
    directory.mkdir(parents=True)
    tokenizer.save(directory)
    meta = dict(tokenizer="byte", dtype="uint16", kind=kind)
    meta |= dict(vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    (directory / "meta.json").write_text(json.dumps(meta))


def write_bins(directory, tokenizer, train=None, val=None):
    """A data set for SFT; a split is (tokens, mask), or 500 tokens that are all targets."""
    write_meta(directory, tokenizer, "chat")
    whole = text(500), np.ones(500)
    for split, (tokens, mask) in dict(train=train or whole, val=val or whole).items():
        np.asarray(tokens, "<u2").tofile(directory / f"{split}.bin")
        np.asarray(mask, np.uint8).tofile(directory / f"{split}.mask")


def write_problems(directory, tokenizer, **splits):
    """A data set for RLVR: split=[(question, answer)]."""
    write_meta(directory, tokenizer, "verify")
    for split, problems in splits.items():
        with open(directory / f"{split}.jsonl", "w") as f:
            for question, answer in problems:
                prompt = [dict(role="user", content=question)]
                f.write(json.dumps(dict(prompt=prompt, answer=answer)) + "\n")


def text(length):
    return np.random.default_rng(length).integers(97, 123, length)


def save_model(directory, tokenizer, change):
    """A Llama of random weights, `change`d under their Hugging Face names."""
    torch.manual_seed(0)
    config = GPTConfig(
        n_layer=1, n_head=2, n_embd=32, ffn_dim=64, block_size=64, tie_embeddings=False,
        vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    GPT(config).save_pretrained(directory)
    tokenizer.save(directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def answers_in_letters(tokenizer):
    """Makes a model that answers with one or more letters from a to h; after each the chance of
    the end is a half."""

    def change(tensors):
        embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
        tensors["model.layers.0.self_attn.o_proj.weight"] *= 0.1
        tensors["model.layers.0.mlp.down_proj.weight"] *= 0.1
        embedding.normal_(std=0.1)
        # about sqrt(32) for every token after the last norm: this column of the head is a bias
        embedding[:, 0] = 4.0
        head.normal_(std=0.02)
        head[:, 0] = -3.0
        head[list(b"abcdefgh"), 0] = 0.0
        head[tokenizer.encode_special(END), 0] = math.log(8) / math.sqrt(32)
        embedding[10, 1] = 4.0  # an answer begins after a line break, and not with its end
        head[tokenizer.encode_special(END), 1] = -5.0

    return change


@pytest.fixture(scope="module")
def place(train):
    """train, in a directory that has data/problems and a model that answers in letters."""
    tokenizer = prepare.with_chat_tokens(prepare.load_tokenizer("byte"))
    learned = [(f"t{i}", str(i)) for i in range(60)]
    held_out = [(f"v{i}", str(i)) for i in range(4)]
    write_problems(train.cwd / "data" / "problems", tokenizer, train=learned, val=held_out)
    save_model(train.cwd / "letters", tokenizer, answers_in_letters(tokenizer))
    train.tokenizer = tokenizer
    return train


def write_verifier(place, name, body):
    """A verifier file: the `body` of verify(prompt, completion, answer). It has `graded`, a
    reward that differs between completions, and `seen`, the training prompts that were answered
    so far."""
    lines = [
        "seen = set()",
        "def verify(prompt, completion, answer):",
        "    graded = sum(map(ord, completion)) % 97 / 97",
        "    if prompt.startswith('t'):",
        "        seen.add(prompt)",
        *(f"    {line}" for line in body.splitlines()),
    ]
    (place.cwd / f"{name}.py").write_text("\n".join(lines) + "\n")
    return f"--verifier={name}.py"


# -----------------------------------------------------------------------------
# steps without a signal


def moves_only_with_a_signal(run, steps):
    """Checks a run with log_interval=1 and a checkpoint at every step: the steps that the log
    counts as without a signal left weights and optimizer state as they were, all others moved
    them. Returns how many there were of each kind."""
    rows, kinds = steps_of(run), {True: 0, False: 0}
    assert sorted(rows) == list(range(1, steps + 1))
    counts = [0, *(rows[step]["train/no_signal"] for step in range(1, steps + 1))]
    for step, (before, after) in enumerate(itertools.pairwise(counts), 1):
        assert after - before in (0, 1)
        without = after > before
        kinds[without] += 1
        assert rows[step]["train/skipped"] == 0
        if step > 1:
            assert (weights(run, step) == weights(run, step - 1)) == without
            assert equal(optimizer_state(run, step), optimizer_state(run, step - 1)) == without
        if without:
            assert not rows[step]["train/loss"]  # 0 or no number, but no loss
    assert not [row for row in rows_of(run) if row.get("event") == "skipped"]
    return kinds[True], kinds[False]


def test_a_batch_without_a_target_moves_nothing(place):
    """SFT, one window a step. Targets lie in a third of the text, so that some windows have
    none. Neither momentum nor weight decay moves a weight at such a step, but the schedule goes
    on, and the run ends."""
    tokens = text(9 * 16 + 1)
    mask = (np.arange(len(tokens)) >= 64) & (np.arange(len(tokens)) < 100)
    data = place.cwd / "data" / "gaps"
    write_bins(data, place.tokenizer, train=(tokens, mask), val=(tokens, mask * 0))
    result = place.finished(
        SFT,
        "--dataset=gaps --block_size=16 --out_dir=out/gaps --max_iters=8 --schedule=cosine",
        "--eval_interval=4 --checkpoint_interval=1 --keep_checkpoints=0",
        "--weight_decay=0.1 --decay_embeddings",
    )
    run = place.cwd / "out" / "gaps"
    without, with_signal = moves_only_with_a_signal(run, 8)
    assert without >= 3 and with_signal >= 3
    for step, row in steps_of(run).items():
        expected = 1e-2 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 8))
        assert row["train/lr"] == pytest.approx(expected, rel=1e-6)

    # its held-out split has no target: that is no loss of 0, and no best model
    values = [row["val/loss"] for row in rows_of(run) if "val/loss" in row]
    assert values == [None] * 3
    warnings = [line for line in result.out.splitlines() if "warning" in line and "target" in line]
    assert len(warnings) == 1 and "gaps" in warnings[0]
    assert "0.0000" not in result.out
    assert not (run / "best").exists()


def test_equal_rewards_move_nothing(place):
    """RLVR, one prompt a step. Rewards of 0.1 for every completion are no signal, though in
    float32 their mean is not 0.1."""
    verifier = write_verifier(place, "tenths", "return 0.1 if int(answer) % 2 else graded")
    place.finished(
        RLVR,
        verifier,
        "--out_dir=out/tenths --max_iters=8 --weight_decay=0.1",
        "--checkpoint_interval=1 --keep_checkpoints=0",
    )
    run = place.cwd / "out" / "tenths"
    without, with_signal = moves_only_with_a_signal(run, 8)
    assert without >= 1 and with_signal >= 2
    for before, row in itertools.pairwise(steps_of(run).values()):
        tenths = row["reward/mean"] == pytest.approx(0.1, abs=1e-6)
        assert tenths == (row["train/no_signal"] > before["train/no_signal"])
        assert tenths == (row["reward/equal_groups"] == 1)


def test_gradients_of_exactly_0_are_a_bad_step(place):
    """A model whose weights are all 0 has targets and a loss, but every gradient is 0: it
    learns nothing."""

    def zeros(tensors):
        for name, tensor in tensors.items():
            if "norm" not in name:
                tensor.zero_()

    save_model(place.cwd / "zeros", place.tokenizer, zeros)
    write_bins(place.cwd / "data" / "text", place.tokenizer)
    options = "--dataset=text --init_from=zeros --out_dir=out/zeros --max_bad_steps=2 --max_iters=4"
    result = place.run(SFT, options)
    refused(result, "gradient", "2 bad steps")
    assert "earning rate" not in result.err
    rows = rows_of(place.cwd / "out" / "zeros")
    skipped = [row for row in rows if row.get("event") == "skipped"]
    assert len(skipped) == 2
    assert all(row["train/grad_norm"] == 0 and row["train/loss"] > 5 for row in skipped)
    assert not [row for row in rows if "train/lr" in row]


# -----------------------------------------------------------------------------
# what is measured on held-out data


def test_the_last_partial_window_counts(place):
    """Held-out text of two and a half windows, whose targets begin in the second or in the last
    one: the loss is the mean over exactly these. Without the half window a small split may hold
    no target at all."""
    tokens = text(2 * 64 + 32)
    model = GPT.from_pretrained(place.cwd / "letters")
    for name, first in (("ends", 100), ("last", 140)):
        targets = np.arange(len(tokens)) >= first
        write_bins(place.cwd / "data" / name, place.tokenizer, val=(tokens, targets))
        options = f"--dataset={name} --init_from=letters --eval_only --doc_mask=False"
        out = place.finished(SFT, options).out
        total = 0.0
        for start in (0, 64, 128):
            window = torch.tensor(tokens[start : start + 65])[None]
            y = torch.where(torch.tensor(targets[start : start + 65])[None, 1:], window[:, 1:], -1)
            with torch.no_grad():
                total += model(window[:, :-1], y)[1].item() * (y >= 0).sum().item()
        found = float(re.search(r"val/loss\W+([\d.]+)", out)[1])
        assert found == pytest.approx(total / targets.sum(), abs=2e-4)


def test_best_follows_the_mean_reward_where_pass_at_1_is_equal(place):
    """Rewards between 0 and 1 never pass, so pass@1 is 0 at every evaluation."""
    body = "return 0.9 * completion.count('a') / len(completion)"
    verifier = write_verifier(place, "share_of_a", body)
    place.finished(
        RLVR,
        verifier,
        "--out_dir=out/share_of_a --max_iters=8 --batch_size=4 --learning_rate=3e-2",
        "--eval_interval=2 --keep_checkpoints=0",
    )
    run = place.cwd / "out" / "share_of_a"
    rows = [row for row in rows_of(run) if "val/pass@1" in row]
    values = {row["step"]: (row["val/pass@1"], row["val/reward/mean"]) for row in rows}
    assert {passed for passed, _ in values.values()} == {0.0}
    best = max((step for step in values if step), key=lambda step: values[step])
    assert best > 2  # else the first evaluation would be the best by chance
    assert (run / "best" / "model.safetensors").read_bytes() == weights(run, best)


# -----------------------------------------------------------------------------
# verifiers


def test_a_verifier_that_always_raises_stops_the_run(place):
    body = "def verify(prompt, completion, answer):\n    return 1.0 + answer\n"
    (place.cwd / "two.py").write_text(body)
    start = (place.cwd / "letters" / "model.safetensors").read_bytes()
    result = place.run(RLVR, "--verifier=two.py --out_dir=out/two --max_iters=50")
    refused(result, "two.py", "verif", "TypeError")
    run = place.cwd / "out" / "two"
    assert max(row["step"] for row in rows_of(run)) <= 1
    assert all((path / "model.safetensors").read_bytes() == start for path in run.glob("step_*"))


def test_a_verifier_that_breaks_during_a_run_stops_it_where_it_was(place):
    """A file that it needs is gone, say. The steps before are saved."""
    verifier = write_verifier(place, "breaks", "assert len(seen) <= 3\nreturn graded")
    options = "--out_dir=out/breaks --max_iters=50 --max_bad_steps=3"
    refused(place.run(RLVR, verifier, options), "breaks.py", "verif")
    run = place.cwd / "out" / "breaks"
    last = max(int(path.name[5:]) for path in run.glob("step_*"))
    assert last == max(row["step"] for row in rows_of(run)) < 10


def test_a_verifier_that_raises_now_and_then_goes_on(place):
    verifier = write_verifier(place, "moody", "assert completion.count('a') % 2\nreturn graded")
    result = place.finished(RLVR, verifier, "--out_dir=out/moody --max_iters=2")
    assert result.out.count("AssertionError") == 1
    assert steps_of(place.cwd / "out" / "moody")[2]["reward/verifier_raised"] > 0


@pytest.mark.parametrize("when", ["int(answer) % 2", "True"])
def test_a_reward_that_overflows_is_named(place, when):
    """float32 ends at 3e38; the loss that comes of it is no matter of the learning rate."""
    name = f"huge_{len(when)}"
    verifier = write_verifier(place, name, f"return 1e308 if {when} else graded")
    result = place.run(RLVR, verifier, f"--out_dir=out/{name} --max_iters=4")
    assert re.search(r"1e\+?308", result.all), result.all[-3000:]
    assert "earning rate" not in result.all and "Traceback" not in result.err
    run = place.cwd / "out" / name
    assert not [row for row in rows_of(run) if row.get("event") == "skipped"]
    for path in run.glob("step_*"):
        assert all(t.isfinite().all() for t in load_file(path / "model.safetensors").values())


def test_number_needs_answers_that_hold_one(place):
    """Problems that verifier='number' can never reward are refused where there are no others,
    else counted."""
    yes = [(f"Is {i} even?", ["yes", "no"][i % 2]) for i in range(12)]
    number = [(f"{i} + 1?", f"it is {i + 1}") for i in range(12)]
    data = place.cwd / "data"
    write_problems(data / "yes", place.tokenizer, train=yes, val=yes)
    write_problems(data / "mixed", place.tokenizer, train=yes[:7] + number, val=yes[:1] + number)
    result = place.run(RLVR, "--verifier=number --dataset=yes --out_dir=out/yes")
    refused(result, "number", "answer")
    assert not (place.cwd / "out" / "yes" / "log.jsonl").exists()
    options = "--verifier=number --dataset=mixed --out_dir=out/mixed --max_iters=1"
    out = place.finished(RLVR, options).out
    told = [line for line in out.splitlines() if "number" in line and re.search(r"\b7\b", line)]
    assert len(told) == 1 and "mixed" in told[0]
    # another verifier reads them
    place.finished(RLVR, "--verifier=exact --dataset=yes --out_dir=out/exact --max_iters=1")


def test_a_verifier_file_is_read_as_python_reads_it(place):
    """With a byte order mark, as editors on Windows write it, and with an import of what lies
    beside it."""
    directory = place.cwd / "verifiers"
    directory.mkdir()
    (directory / "graders.py").write_text("def grade(text):\n    return len(text) / 100\n")
    lines = [
        "\ufefffrom graders import grade",
        "def verify(prompt, completion, answer):",
        "    return grade(completion)",
    ]
    (directory / "bom.py").write_text("\n".join(lines), encoding="utf-8")
    result = place.finished(RLVR, "--verifier=verifiers/bom.py --out_dir=out/bom --max_iters=1")
    assert "raised" not in result.all
    assert 0 < steps_of(place.cwd / "out" / "bom")[1]["reward/mean"] < 1


# -----------------------------------------------------------------------------
# updates


def test_each_inner_update_is_tested_before_it_is_applied(place):
    """36 ordinary steps of two updates each, then one with rewards a million times as large,
    then one without a signal: the large one is skipped whole, so that the weights at the end
    are those before it."""
    body = """
if len(seen) <= 36:
    return graded
return 1e6 * graded if len(seen) == 37 else 0.1
"""
    place.finished(
        RLVR,
        write_verifier(place, "spike", body.strip()),
        "--out_dir=out/spike --max_iters=37 --inner_epochs=2 --spike_z=8.0",
        "--checkpoint_interval=1 --keep_checkpoints=3",
    )
    run = place.cwd / "out" / "spike"
    skipped = [row for row in rows_of(run) if row.get("event") == "skipped"]
    assert [row["step"] for row in skipped] == [36] and "spike" in skipped[0]["why"]
    assert weights(run, 36) == weights(run, 37) != weights(run, 35)


def test_a_later_inner_update_that_is_clipped_whole_is_no_bad_step(place):
    """Its gradient is 0 because PPO clips every token: the update before it counts."""
    patch = """
import model
plain = model.completion_loss

def clipped(policy, reference, batch, *rest):
    again = hasattr(batch, "old_log_probs")
    loss, metrics = plain(policy, reference, batch, *rest)
    return loss * (0.0 if again else 1.0), metrics

model.completion_loss = clipped
"""
    verifier = write_verifier(place, "graded", "return graded")
    options = "--out_dir=out/clipped --max_iters=3 --inner_epochs=3"
    place.finished(RLVR, verifier, options, patch=patch)
    rows = rows_of(place.cwd / "out" / "clipped")
    assert not [row for row in rows if row.get("event") == "skipped"]
    assert steps_of(place.cwd / "out" / "clipped")[3]["train/skipped"] == 0
    moved = (place.cwd / "out" / "clipped" / "step_000003" / "model.safetensors").read_bytes()
    assert moved != (place.cwd / "letters" / "model.safetensors").read_bytes()


def test_a_rollback_does_not_forget_the_best(place):
    """Step 2 is the best, one bad step rolls back to it, step 4 is worse: best/ stays step 2."""
    patch = """
import model, prepare
plain, calls, losses = model.why_harmful, [], iter([5.0, 1.0, 2.0])

def harmful(*args):
    calls.append(1)
    return "loss spike" if len(calls) == 3 else plain(*args)

model.why_harmful = harmful
prepare.means = lambda *args: {"val/loss": next(losses)}
"""
    write_bins(place.cwd / "data" / "plain", place.tokenizer)
    options = "--dataset=plain --out_dir=out/back --max_iters=4 --max_bad_steps=1 --eval_interval=2"
    place.finished(SFT, options, "--keep_checkpoints=0", patch=patch)
    run = place.cwd / "out" / "back"
    assert [row for row in rows_of(run) if row.get("event") == "rollback"]
    assert (run / "best" / "model.safetensors").read_bytes() == weights(run, 2)


def test_an_evaluation_leaves_autocast_as_it_was(place):
    """RLVR in bfloat16. After a resume there is no evaluation before the next step, in a run
    that goes through there is one: had it left autocast on, the optimizer's products would be
    in bfloat16 too, and the weights would differ."""
    verifier = write_verifier(place, "graded", "return graded")
    options = f"{RLVR} {verifier} --dtype=bfloat16 --eval_interval=1 --keep_checkpoints=0"
    slow = "import torch; torch.cpu._is_avx512_bf16_supported = lambda: False"  # Muon in float32
    place.finished(options, "--out_dir=out/through --max_iters=4", patch=slow)
    place.finished(options, "--out_dir=out/halves --max_iters=2", patch=slow)
    place.finished(options, "--out_dir=out/halves --max_iters=4", patch=slow)
    through, halves = place.cwd / "out" / "through", place.cwd / "out" / "halves"
    assert weights(through, 2) == weights(halves, 2)
    assert weights(through, 4) == weights(halves, 4) != weights(through, 2)


def test_a_run_goes_on_in_the_dtype_that_it_began_with(place):
    """dtype='auto' chose bfloat16 on the machine where the run began, and chooses float32 on
    the next one. A dtype that was typed at the start holds too where the next command line is
    silent, and one that is typed then holds."""
    write_bins(place.cwd / "data" / "wide", place.tokenizer)
    wide = f"--stage=sft {MODEL} {LOOP} --dataset=wide --n_embd=128 --optimizer=adamw"
    patch = "import model, torch; torch.cpu._is_avx512_bf16_supported = lambda: "
    measured = "; model.seconds_by_dtype = lambda *args: dict(float32=2.0, bfloat16=1.0)"
    out = place.cwd / "out"

    def start(name, steps, *options, fast):
        options = [wide, f"--out_dir=out/{name} --max_iters={steps}", *options]
        return place.finished(*options, patch=patch + str(fast) + measured).out

    start("fast", 4, fast=True)
    recorded = re.search(r'"dtype": "(\w+)"', (out / "fast" / "log.jsonl").read_text())[1]
    assert recorded == "bfloat16"  # from the first row on, and not 'auto'
    uninterrupted = weights(out / "fast", 4)

    start("next", 2, fast=True)
    assert "bfloat16" in start("next", 4, fast=False)
    assert weights(out / "next", 4) == uninterrupted

    start("named", 2, "--dtype=bfloat16", fast=False)
    start("named", 4, fast=False)
    assert weights(out / "named", 4) == uninterrupted

    start("typed", 2, fast=True)
    start("typed", 4, "--dtype=float32", fast=False)
    assert weights(out / "typed", 4) != uninterrupted

    # a run that was killed before its first checkpoint has recorded it too
    gone = shutil.ignore_patterns("step_*", "best")
    shutil.copytree(out / "fast", out / "killed", ignore=gone)
    start("killed", 4, fast=False)
    assert weights(out / "killed", 4) == uninterrupted


# -----------------------------------------------------------------------------
# values out of range

BAD = """
    seed=-1 seed=99999999999999999999 beta1=1.5 beta1=-0.1 beta2=1.0 beta2=2 muon_momentum=1.0
    muon_momentum=-1 weight_decay=-0.1 decay_frac=-0.1 decay_frac=1.5 eval_iters=0 eval_iters=-3
    eval_interval=0 log_interval=0 max_iters=0 max_iters=-5 batch_size=0 batch_size=-1
    gradient_accumulation_steps=0 block_size=0 block_size=-64 n_layer=0 n_layer=-1 n_head=0
    n_head=-2 n_head=3 n_embd=0 n_embd=-8 n_embd=1e18 n_kv_head=-1 n_kv_head=3 head_dim=-2
    head_dim=3 ffn_dim=-5 vocab_size=-1 max_positions=-1 max_positions=1 nope_every=-1
    dropout=-0.1 dropout=1.0 dropout=1.5 norm_eps=-1 rope_theta=0 rope_theta=-1 init_std=-0.1
    norm=batchnorm mlp=relu pos=alibi init=zeros optimizer=sgd stage=train schedule=step
    decay_shape=square dtype=int8 device=tpu device=cuda:x learning_rate=-1 learning_rate=1e999
    muon_lr=-0.1 min_lr=-1 grad_clip=-1 warmup_iters=-1 lr_decay_iters=-1 spike_z=-1
    max_bad_steps=0 max_bad_steps=-1 max_rollbacks=-1 keep_checkpoints=-1 checkpoint_interval=-1
    checkpoint_minutes=-1 sample_interval=-1 pref_loss=ipo beta=0 beta=-1 label_smoothing=-0.1
    label_smoothing=0.6 max_completion=0 clip_eps=0 clip_eps=-1 inner_epochs=0 kl_coef=-1
    rollout_temperature=0 mfu=0 mfu=-1 mfu=1.5 gpu=H1 gpu_cost_per_hour=-1 terminate_on_error=go
    hf_repo=nothing backup_dir=/nowhere/at/all dataset=a:x compile=maybe bias=2 batch_size=1.5
    batch_size=many learning_rate=fast learning_rate= tie_embeddings= n_layer=1e999 dataset=
""".split()  # noqa: SIM905


@pytest.mark.parametrize("bad", BAD)
def test_no_value_gives_a_traceback(place, bad):
    """Each key's range is checked at the start: one line that names the key."""
    key = bad.partition("=")[0]
    given = [f"--{bad}"]
    if key != "device":  # a plan is made for another machine: it takes any
        given.append("--dry_run")
    if key == "mfu":
        given.append("--gpu=H100")
    refused(place.run(*given), key)
