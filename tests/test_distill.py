"""On-policy distillation: its loss against the sum over the vocabulary, and runs of train.py."""

import functools
import shutil
import types

import pytest
import torch
from processes import Processes
from test_signals import (
    LOOP,
    answers_in_letters,
    refused,
    rows_of,
    save_model,
    steps_of,
    weights,
    write_bins,
    write_problems,
)

import prepare
from model import GPT, GPTConfig, distillation_loss

DISTILL = (
    f"--stage=distill {LOOP} --dtype=float32 --dataset=problems --init_from=student"
    " --batch_size=4 --eval_iters=2 --group_size=2 --max_completion=24 --learning_rate=0.05"
    " --muon_lr=0.02 --max_iters=8 --keep_checkpoints=0 --verifier=exact"
)

# -----------------------------------------------------------------------------
# the loss


def tiny(n_embd, vocab_size=31):
    return GPT(GPTConfig(vocab_size=vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=n_embd))


def sampled_batch(rows=24, length=20):
    """A micro-batch of 24 completions of 1 to 12 tokens after prompts of 8."""
    x = torch.randint(31, (rows, length))
    y = x.roll(-1, dims=1)
    y[:, :7] = -1
    for i, row in enumerate(y):
        row[8 + i % 12 :] = -1
    return types.SimpleNamespace(x=x, y=y)


def test_its_gradient_is_that_of_the_reverse_kl(monkeypatch):
    """By hand, with all logits at once; and on average that of a policy gradient whose advantages
    are log p_teacher - log p_student: here the average over all tokens that could be sampled."""
    monkeypatch.setattr("model.LOGITS_IN_A_CHUNK", {"cpu": 0})  # the smallest chunks: 128 rows
    student, teacher, batch = tiny(16), tiny(32).requires_grad_(False), sampled_batch()
    loss, _ = distillation_loss(student, teacher, batch)
    counts = batch.y >= 0
    assert counts.sum() > 128
    log_p = student(batch.x)[0].log_softmax(-1)[counts]  # (N, V)
    log_q = teacher(batch.x)[0].log_softmax(-1)[counts]
    by_hand = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    advantages = (log_q - log_p).detach()
    policy_gradient = -(log_p.detach().exp() * advantages * log_p).sum() / counts.sum()
    params = list(student.parameters())
    grads = torch.autograd.grad(loss, params)
    assert loss.item() == pytest.approx(by_hand.item() / counts.sum().item(), rel=1e-5)
    for other in (by_hand / counts.sum(), policy_gradient):
        expected = torch.autograd.grad(other, params, retain_graph=True)
        for a, b in zip(grads, expected, strict=True):
            assert (a - b).abs().max() < 1e-6 + 1e-4 * b.abs().max()


def test_an_equal_teacher_gives_no_loss_and_no_gradient():
    student, teacher, batch = tiny(16), tiny(16).requires_grad_(False), sampled_batch()
    teacher.load_state_dict(student.state_dict())
    loss, _ = distillation_loss(student, teacher, batch)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(p.grad.abs().max().item() for p in student.parameters()) < 1e-6


def test_a_step_moves_the_student_towards_the_teacher():
    student, teacher, batch = tiny(16), tiny(32).requires_grad_(False), sampled_batch()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    before, _ = distillation_loss(student, teacher, batch)
    before.backward()
    optimizer.step()
    assert 0 < distillation_loss(student, teacher, batch)[0] < before


# -----------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs train.py in a directory with data/problems, a student of random weights, and a teacher
    that answers in letters."""
    processes = Processes(tmp_path_factory.mktemp("distill"))
    cwd, tokenizer = processes.cwd, prepare.with_chat_tokens(prepare.load_tokenizer("byte"))
    problems = [(f"t{i}", "a") for i in range(40)]
    write_problems(cwd / "data" / "problems", tokenizer, train=problems[8:], val=problems[:8])
    write_bins(cwd / "data" / "chats", tokenizer)
    save_model(cwd / "student", tokenizer, lambda tensors: None)
    save_model(cwd / "teacher", tokenizer, answers_in_letters(tokenizer))
    run = functools.partial(processes.run, "train.py", DISTILL)
    finished = functools.partial(processes.finished, "train.py", DISTILL)
    yield types.SimpleNamespace(cwd=cwd, tokenizer=tokenizer, run=run, finished=finished)
    processes.close()


def test_a_run_nears_the_teacher_and_resumes_to_the_same_bytes(place):
    """val/loss is the divergence on held-out prompts, and pass@1 stands beside it; a run that goes
    on from step 4 ends as the one that was not interrupted."""
    said = place.finished("--teacher=teacher --out_dir=calm --checkpoint_interval=4").out
    rows = [row for row in rows_of(place.cwd / "calm") if "val/loss" in row]
    assert rows[-1]["val/loss"] < 0.5 * rows[0]["val/loss"]
    assert {"val/pass@1", "val/pass@2", "val/completions/length"} < set(rows[0])
    assert {"reward/mean", "completions/length"} < set(steps_of(place.cwd / "calm")[8])
    assert "4 prompts x 2 completions" in said and "best: " in said
    shutil.copytree(place.cwd / "calm", place.cwd / "again")
    for name in ("step_000008", "best"):
        shutil.rmtree(place.cwd / "again" / name)
    said = place.finished("--teacher=teacher --out_dir=again").out
    assert "resuming again/step_000004" in said
    assert weights(place.cwd / "calm", 8) == weights(place.cwd / "again", 8)


def test_a_dry_run_counts_completions(place):
    said = place.finished("--teacher=teacher --dry_run --gpu=L4").out
    assert "parameters" in said and "on one L4" in said


def test_a_teacher_may_be_measured_against_itself(place):
    said = place.finished("--teacher=teacher --eval_only --init_from=teacher").out
    assert "val/loss 0.0000" in said and "val/pass@1" in said


def other_teachers(place):
    """Directories of teachers that don't fit: another tokenizer, more rows, fewer positions."""
    spec = prepare.load_tokenizer("byte").spec
    vocab = dict(spec["model"]["vocab"])
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    swapped = prepare.Tokenizer(spec | {"model": spec["model"] | {"vocab": vocab}}, "swapped")
    save_model(place.cwd / "swapped", swapped, lambda tensors: None)
    for name, more in (("wide", {"vocab_size": 300}), ("short", {"block_size": 32})):
        shape = dict(n_layer=1, n_head=2, n_embd=32, vocab_size=259, block_size=64) | more
        GPT(GPTConfig(**shape)).save_pretrained(place.cwd / name)
        place.tokenizer.save(place.cwd / name)


def test_teachers_that_do_not_fit_are_refused(place):
    """In one line, which names the teacher and the student; nothing is written."""
    other_teachers(place)
    place_of = "--out_dir=no"
    refused(place.run(place_of), "teacher=''", "--teacher=RUN")
    refused(place.run(place_of, "--dry_run"), "teacher=''")
    refused(place.run(place_of, "--teacher=nothing/here/x"), "nothing/here/x: no such directory")
    words = ("teacher='swapped'", "another tokenizer (swapped)", "trained (byte)")
    refused(place.run(place_of, "--teacher=swapped"), *words)
    words = ("teacher='wide' (vocab_size=300", "init_from='student' (vocab_size=259")
    refused(place.run(place_of, "--teacher=wide"), *words)
    words = ("max_positions=32", "block_size=64", "as many positions")
    refused(place.run(place_of, "--teacher=short"), *words)
    shutil.copytree(place.cwd / "student", place.cwd / "copy", dirs_exist_ok=True)
    words = ("teacher='copy'", "init_from='student'", "the same model")
    refused(place.run(place_of, "--teacher=copy"), *words)
    assert not (place.cwd / "no").exists()


def test_a_student_and_problems_are_needed(place):
    teacher = "--teacher=teacher --out_dir=no"
    refused(place.run(teacher, "--init_from=scratch"), "stage='distill' starts from a model")
    refused(place.run(teacher, "--dataset=chats"), "stage='distill' wants problems with answers")
    refused(place.run(teacher, "--dataset=mine"), "--as=verify --name=mine")
    assert not (place.cwd / "no").exists()
