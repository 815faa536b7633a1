"""Edits as people make them, each a patch in tests/hacks/ of at most 10 lines in 2 files.

Each is applied to a copy of the project, which trains 20 steps, resumes to 24, samples, and loads
its checkpoint; and each is checked to do what its source says. A hack that no longer applies, needs
more than its lines, or has no effect (because a fast path goes on with the mathematics of before,
for example) is a fault of the design, not of the patch: a user's edit would fare no better.
"""

import difflib
import importlib.util
import itertools
import math
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import ROOT, Processes
from safetensors.torch import load_file
from test_signals import (
    answers_in_letters,
    optimizer_state,
    save_model,
    steps_of,
    write_meta,
    write_problems,
)

import model
import prepare

HACKS = pathlib.Path(ROOT) / "tests" / "hacks"
FILES = ("configurator.py", "model.py", "prepare.py", "runs.py", "sample.py", "train.py")
LOOP = (
    "--block_size=64 --batch_size=4 --eval_iters=1 --eval_interval=1000 --log_interval=1"
    " --warmup_iters=0 --schedule=constant --compile=False --device=cpu --dtype=float32"
    " --learning_rate=1e-3 --muon_lr=1e-3 --checkpoint_interval=20 --keep_checkpoints=0"
)
STAGES = {
    "pretrain": f"{LOOP} --n_layer=2 --n_head=2 --n_embd=32 --dataset=text",
    "dpo": f"--stage=dpo {LOOP} --dataset=pairs --init_from=letters",
    "rlvr": f"--stage=rlvr {LOOP} --dataset=problems --init_from=letters --verifier=exact"
    " --max_completion=16 --group_size=4",
}
WINDOW, CAP = 8, 1.5
# the stage of each hack, and its options
RUNS = {
    "relu2_mlp": ("pretrain", "--mlp=relu2"),
    "sliding_window": ("pretrain", f"--window={WINDOW}"),
    "logit_softcap": ("pretrain", f"--logit_cap={CAP}"),
    "value_embeddings": ("pretrain", "--value_embed"),
    "lion": ("pretrain", "--optimizer=lion"),
    "rsqrt_schedule": ("pretrain", "--schedule=rsqrt --warmup_iters=4"),
    "sorting_data": ("pretrain", "--dataset=sorting"),
    "ipo": ("dpo", "--pref_loss=ipo"),
    "similarity_verifier": ("rlvr", "--verifier=similar"),
    "typical_sampling": ("pretrain", ""),
    "normuon": ("pretrain", ""),
    "tail_average": ("pretrain", "--tail_average=0.1"),
}


# -----------------------------------------------------------------------------
# the runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, a model that answers in letters, and a run of each stage without any hack, which its
    `losses` hold."""
    place = Processes(tmp_path_factory.mktemp("hacks"), root="")
    tokenizer = prepare.with_chat_tokens(prepare.load_tokenizer("byte"))
    words, rng = "the cat sat on a mat and saw two red birds".split(), np.random.default_rng(0)
    for split, count in (("train", 800), ("val", 200)):
        ids = tokenizer.encode(" ".join(rng.choice(words, count)))
        ids = [tokenizer.eos_id if i % 50 == 49 else token for i, token in enumerate(ids)]
        if split == "train":
            write_meta(place.cwd / "data" / "text", tokenizer, "text")
        np.array(ids, "<u2").tofile(place.cwd / "data" / "text" / f"{split}.bin")
    problems = [(f"t{i}", "abcdefgh"[i % 8]) for i in range(60)]
    problems = dict(train=problems, val=[(f"v{i}", "a") for i in range(4)])
    write_problems(place.cwd / "data" / "problems", tokenizer, **problems)
    write_pairs(place.cwd / "data" / "pairs", tokenizer)
    save_model(place.cwd / "letters", tokenizer, answers_in_letters(tokenizer))
    place.original = place.cwd / "original"
    place.original.mkdir()
    for file in FILES:
        shutil.copy2(pathlib.Path(ROOT) / file, place.original)
    place.losses = {}
    for stage, options in STAGES.items():
        options = f"{options} --max_iters=20 --out_dir=out/{stage}"
        place.finished("train.py", options, root=place.original)
        place.losses[stage] = losses(place.cwd / "out" / stage)
    yield place
    place.close()


def write_pairs(directory, tokenizer):
    write_meta(directory, tokenizer, "prefs")
    record = '{"prompt": [{"role": "user", "content": "%s"}], "chosen": "%s", "rejected": "%s"}\n'
    for split, count in (("train", 40), ("val", 8)):
        rows = [record % (f"{split}{i}", "abcd"[i % 4], "efgh"[i % 4]) for i in range(count)]
        (directory / f"{split}.jsonl").write_text("".join(rows))


def losses(run):
    return [row["train/loss"] for _, row in sorted(steps_of(run).items())]


def applied(name, place):
    """A copy of the project to which a hack is applied."""
    root = place.cwd / name
    shutil.copytree(place.original, root, copy_function=shutil.copy2)
    command = ["git", "apply", str(HACKS / f"{name}.patch")]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    return root


def module_of(root):
    """The model.py of a copy, as a module beside the one of the project."""
    spec = importlib.util.spec_from_file_location("hacked_model", root / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Hacked:
    """What a hack's run left, for its check."""

    def __init__(self, name, place, root):
        self.place, self.root, self.run = place, root, place.cwd / "out" / name
        self.losses = losses(self.run)
        self.before = place.losses[RUNS[name][0]]
        self.module = module_of(root)
        self.model = self.module.GPT.from_pretrained(self.run / "step_000024").eval()
        self.idx = torch.randint(97, 123, (2, 40))

    def tensors(self, step):
        return load_file(self.run / f"step_{step:06d}" / "model.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_hack(name, place):
    root, (stage, options) = applied(name, place), RUNS[name]
    train = f"{STAGES[stage]} {options} --out_dir=out/{name}"
    place.finished("train.py", train, "--max_iters=20", root=root)
    resumed = place.finished("train.py", train, "--max_iters=24", root=root)
    assert f"resuming out/{name}/step_000020" in resumed.out
    text = place.finished(
        "sample.py", f"--out_dir=out/{name} --num_samples=1 --max_new_tokens=20", root=root
    )
    assert "step_000024" in text.err and text.out.endswith("\n---------------\n")
    hacked = Hacked(name, place, root)
    assert sorted(steps_of(hacked.run)) == list(range(1, 25))
    assert all(map(math.isfinite, hacked.losses))
    assert hacked.model(hacked.idx)[0].isfinite().all()
    moved = {k for k, v in hacked.tensors(20).items() if not torch.equal(v, hacked.tensors(24)[k])}
    assert moved
    CHECKS[name](hacked)


def test_every_hack_is_run():
    assert {path.stem for path in HACKS.iterdir()} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_hack_is_at_most_10_lines_in_2_files(name):
    """Lion's class aside. A changed line counts once."""
    text = (HACKS / f"{name}.patch").read_text(encoding="utf-8")
    head, *diff = text.split("diff --git ")
    lines = [line for line in "".join(diff).splitlines() if re.match(r"[+](?![+][+] b/)", line)]
    if name == "lion":
        begin = next(i for i, line in enumerate(lines) if line.startswith("+class Lion("))
        end = begin + 1
        while lines[end].startswith("+    ") or lines[end] == "+":
            end += 1
        del lines[begin:end]
    assert 1 <= len(lines) <= 10 and len(diff) <= 2
    assert max(map(len, [*lines, *head.splitlines()])) <= 101
    assert "Source: " in head and f"git apply tests/hacks/{name}.patch" in head
    assert re.search(r"python (train|sample)\.py ", head)


# -----------------------------------------------------------------------------
# what each does


def relu2_mlp(hacked):
    mlp, x = hacked.model.blocks[1].mlp, torch.randn(3, 32)
    assert mlp.up.weight.shape == (4 * 32, 32) and hacked.losses[0] != hacked.before[0]
    expected = (x @ mlp.up.weight.T).clamp(min=0) ** 2 @ mlp.down.weight.T
    assert (mlp(x) - expected).abs().max() < 1e-5


def sliding_window(hacked):
    """In two layers a token sees 2 (WINDOW - 1) back. Also with documents, where kernels work, and
    in generation, which looks at one query."""
    model, idx = hacked.model, hacked.idx
    assert hacked.losses[0] != hacked.before[0]
    other, reach = idx.clone(), 2 * (WINDOW - 1)
    other[:, 0] += 1
    for fast in (hacked.module.FAST, set()):
        hacked.module.FAST = fast
        a, b = model(idx)[0], model(other)[0]
        assert torch.equal(a[:, reach + 1 :], b[:, reach + 1 :])
        assert (a[:, reach] != b[:, reach]).any()
        docs = hacked.module.documents(idx, 256, "sdpa", model.visible)
        assert (model(idx, docs=docs)[0] - a).abs().max() < 1e-5
        ids = model.generate(idx, 20, temperature=0)
        assert torch.equal(model(ids[:, :-1])[0].argmax(-1)[:, 39:], ids[:, 40:])
        pad = torch.tensor([0, 5])
        both = model.generate(idx, 20, temperature=0, pad=pad)
        assert torch.equal(both[1:, 5:], model.generate(idx[1:, 5:], 20, temperature=0))
    assert hacked.module.pick_attention("cuda", "bfloat16", True, True, 0.0, False) != "flash_attn"


def logit_softcap(hacked):
    """Also in the loss and its gradient, which FAST["loss"] computes for the plain logits only."""
    model, idx = hacked.model, hacked.idx
    assert hacked.losses[0] != hacked.before[0]
    logits, targets = model(idx)[0], idx.roll(-1, 1)
    expected = CAP * torch.tanh(model.hidden(idx) @ model.embed.weight.T / CAP)
    assert (logits - expected).abs().max() < 1e-5
    gradients = []
    for loss in (F.cross_entropy(logits.flatten(0, 1), targets.flatten()), model(idx, targets)[1]):
        model.zero_grad()
        loss.backward()
        gradients.append((loss.detach(), model.embed.weight.grad.clone()))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() < 1e-5


def value_embeddings(hacked):
    assert hacked.losses[0] != hacked.before[0]
    before, after = hacked.tensors(20), hacked.tensors(24)
    for name in ("blocks.0.attn.value_embed.weight", "blocks.1.attn.value_embed.weight"):
        assert after[name].shape == (hacked.model.config.vocab_size, 32)
        assert not torch.equal(before[name], after[name])
    rows = hacked.model.config.vocab_size + 2
    hacked.model.grow(rows)  # as SFT does for its chat tokens
    assert hacked.model(torch.tensor([[rows - 1]]))[0].isfinite().all()


def lion(hacked):
    """Four steps of 1e-3 up or down, exactly, and a momentum that a checkpoint holds."""
    assert hacked.losses[0] == hacked.before[0] and hacked.losses[2] != hacked.before[2]
    (state,) = optimizer_state(hacked.run, 24)
    assert all(set(values) == {"momentum"} for values in state.values())
    before, after = hacked.tensors(20), hacked.tensors(24)
    for name, tensor in after.items():
        steps = (tensor - before[name]) / 1e-3
        assert (steps - steps.round()).abs().max() < 0.01 and steps.abs().max() < 4.01
    assert steps.abs().max() > 0.99


def rsqrt_schedule(hacked):
    for step, row in steps_of(hacked.run).items():
        expected = step / 5 if step <= 4 else math.sqrt(5 / step)
        assert row["train/lr"] == pytest.approx(1e-3 * expected)


def sorting_data(hacked):
    data = hacked.place.cwd / "data" / "sorting"
    ids = np.fromfile(data / "train.bin", "<u2")
    text = prepare.load_tokenizer(str(data)).decode(ids[:2000].tolist())
    documents = [d.split(":") for d in re.findall(r"\d+:\d+", text)[:-1]]
    assert len(documents) > 50
    assert all("".join(sorted(left)) == right for left, right in documents)


def ipo(hacked):
    """Policy and reference are equal at the first step: the loss is 1 / (2 beta) squared."""
    assert hacked.losses[0] == pytest.approx(25, abs=1e-3)
    assert hacked.before[0] == pytest.approx(math.log(2), abs=1e-4)
    chosen, rejected = torch.tensor([3.0, -1.0]), torch.tensor([-2.0, 1.5])
    loss = hacked.module.preference_loss("ipo", chosen, rejected, 0.25)
    assert torch.allclose(loss, torch.tensor([9.0, 20.25]))
    margins = [row["rewards/margins"] for _, row in sorted(steps_of(hacked.run).items())]
    assert margins[-1] > margins[0]


def similarity_verifier(hacked):
    rewards = [row["reward/mean"] for row in steps_of(hacked.run).values()]
    assert any(reward * 16 % 1 for reward in rewards)  # 16 completions a step: not all 0 or 1
    code = "import prepare; print(prepare.verifier('similar')('?', ' abcd', 'abxd '))"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=hacked.root, capture_output=True, text=True, check=True)
    assert float(out.stdout) == difflib.SequenceMatcher(None, "abcd", "abxd").ratio() == 0.75


def typical_sampling(hacked):
    """Of a small vocabulary, the tokens that remain, found by hand; and another text."""
    assert hacked.losses[:20] == hacked.before
    logits, p = torch.randn(50, 12) * 2, 0.6
    draws = torch.linspace(0, 0.999, 50)
    for row in logits:
        probs = row.softmax(0).tolist()
        entropy = -sum(q * math.log(q) for q in probs)
        order = sorted(range(12), key=lambda i: abs(-math.log(probs[i]) - entropy))
        sums = list(itertools.accumulate(probs[i] for i in order))
        kept = set(order[: 1 + sum(total < p for total in sums)])
        drawn = hacked.module.sample_token(row.expand(50, 12), draws, typical_p=p)
        assert set(drawn.tolist()) <= kept
        assert all(probs[i] < 0.1 for i in kept - set(drawn.tolist()))
    texts = []
    for options in ("", "--typical_p=0.2"):
        options += " --out_dir=out/typical_sampling --num_samples=1 --max_new_tokens=40 --top_k=0"
        texts.append(hacked.place.finished("sample.py", options, root=hacked.root).out)
    assert texts[0] != texts[1]


def normuon(hacked):
    """All rows of the first update have one norm, and together that of Muon's update."""
    assert hacked.losses[0] == hacked.before[0] and hacked.losses[2] != hacked.before[2]
    weight = torch.nn.Parameter(torch.zeros(6, 4))
    weight.grad = torch.randn(6, 4) * torch.arange(1, 7)[:, None]
    plain = model.orthogonalize(weight.grad[None].clone(), torch.float32)[0]
    muon = hacked.module.Muon([weight], lr=1.0, dtype=torch.float32)
    muon.step()
    norms = weight.detach().norm(dim=1)
    assert (norms - norms.mean()).abs().max() < 1e-4 < plain.norm(dim=1).std()
    assert weight.norm().item() == pytest.approx(plain.norm().item() * math.sqrt(6 / 4), rel=1e-4)
    momenta = [v for state in optimizer_state(hacked.run, 24) for v in state.values()]
    assert momenta  # what a checkpoint holds loads again: the run was resumed


def tail_average(hacked):
    """The last of 20 steps is the mean of the weights of the last two."""
    options = f"{STAGES['pretrain']} --max_iters=20 --checkpoint_interval=1 --out_dir=out/each"
    hacked.place.finished("train.py", options, root=hacked.place.original)
    each = hacked.place.cwd / "out" / "each"
    last = [load_file(each / f"step_{step:06d}" / "model.safetensors") for step in (19, 20)]
    for name, tensor in hacked.tensors(20).items():
        mean = (last[0][name] + last[1][name]) / 2
        assert torch.allclose(tensor, mean, atol=1e-6) and not torch.equal(tensor, last[1][name])


CHECKS = {
    "relu2_mlp": relu2_mlp,
    "sliding_window": sliding_window,
    "logit_softcap": logit_softcap,
    "value_embeddings": value_embeddings,
    "lion": lion,
    "rsqrt_schedule": rsqrt_schedule,
    "sorting_data": sorting_data,
    "ipo": ipo,
    "similarity_verifier": similarity_verifier,
    "typical_sampling": typical_sampling,
    "normuon": normuon,
    "tail_average": tail_average,
}
