"""Batches that are made while a step runs, and what a step waits for.

Only a GPU's batches are made ahead; here a patch does it on a CPU.
"""

import json
import threading
import time

import pytest
import torch
from processes import Processes
from safetensors.torch import load_file
from test_out_of_memory import LOOP, MODEL, limit

import prepare
from model import document_ends, documents

AHEAD = """
import prepare
init = prepare.Ahead.__init__
prepare.Ahead.__init__ = lambda self, make, enabled: init(self, make, True)
"""


# --- the thread


def test_what_is_taken_is_what_was_asked_for():
    """Made ahead or not, in the order asked for, by one thread at a time."""
    made, running = [], []

    def make(asked):
        running.append(1)
        assert len(running) == 1
        time.sleep(0.002)
        made.append((asked, threading.current_thread() is threading.main_thread()))
        running.pop()
        return asked * 10

    for enabled in (False, True):
        made.clear()
        ahead = prepare.Ahead(make, enabled)
        assert ahead.take(1) == 10
        ahead.begin(2)
        assert ahead.take(2) == 20
        ahead.begin(3)
        assert ahead.take(4) == 40  # a step was skipped
        assert ahead.take(4) == 40  # and is done again
        asked = [1, 2, 3, 4, 4] if enabled else [1, 2, 4, 4]
        assert made == [(number, not enabled) for number in asked]


@pytest.mark.parametrize("enabled", [False, True])
def test_an_error_of_reading_is_raised_where_its_batch_is_taken(enabled):
    def make(asked):
        if asked == 2:
            raise OSError("the disk is gone")
        return asked

    ahead = prepare.Ahead(make, enabled)
    ahead.begin(2)
    assert ahead.take(1) == 1  # nobody needed 2
    ahead.begin(2)
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.take(2)
    assert ahead.take(3) == 3


# --- runs


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Processes in a directory with data of three stages, and out/base, a pretrained model."""
    processes = Processes(tmp_path_factory.mktemp("ahead"))
    texts, chats, pairs = [], [], []
    for i in range(120):
        texts.append({"text": f"the {i} cat sat on mat {i * 7 % 10}. " * 3})
        question = {"role": "user", "content": f"say {i}"}
        chats.append({"messages": [question, {"role": "assistant", "content": f"{i} it is"}]})
        pairs.append({"prompt": f"say {i}", "chosen": f"{i} it is", "rejected": "no"})
    for name, kind, records in (
        ("texts", "text", texts), ("chats", "chat", chats), ("pairs", "prefs", pairs),
    ):  # fmt: skip
        (processes.cwd / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
        options = f"--as={kind} --tokenizer=byte --val_fraction=0.1"
        processes.finished("prepare.py", f"{name}.jsonl {options}")
    train(processes, "pretrain", "base", steps=1)
    yield processes
    processes.close()


STAGES = {
    "pretrain": f"{MODEL} --dataset=texts",
    "sft": "--stage=sft --dataset=chats --init_from=out/base",
    "dpo": "--stage=dpo --dataset=pairs --init_from=out/base",
}


def train(program, stage, name, more="", patch="", steps=6):
    shape = "--dtype=float32 --compile=False --device=cpu --block_size=64 --batch_size=4"
    args = f"--gradient_accumulation_steps=2 --max_iters={steps} --out_dir=out/{name} {more}"
    return program.finished("train.py", STAGES[stage], shape, LOOP, args, patch=patch)


def weights(program, name):
    return (program.cwd / "out" / name / "step_000006" / "model.safetensors").read_bytes()


# the third update is bad, and so are three in a row, after which the run goes back
BAD = """
import model
why_harmful, updates = model.why_harmful, []
def patched(*args):
    updates.append(1)
    return "loss spike" if len(updates) in (3, 6, 7, 8) else why_harmful(*args)
model.why_harmful = patched
"""


@pytest.mark.parametrize(
    "stage, more, patch, said",
    [
        ("pretrain", "--dropout=0.1", "", ""),
        ("pretrain", "--micro_batch_size=4", limit(2, first=5), "micro_batch_size=2 from here on"),
        ("pretrain", "--checkpoint_interval=2 --max_bad_steps=3", BAD, "3 bad steps in a row"),
        ("dpo", "", "", ""),
    ],
)
def test_batches_made_ahead_are_the_same(program, request, stage, more, patch, said):
    """Weights are equal to the byte, steps that are skipped, done again or gone back to included."""
    name = request.node.name.partition("[")[2].strip("]").replace("/", "_").replace(" ", "")[:20]
    name = f"{name}{len(patch)}"
    for ahead in (False, True):
        output = train(program, stage, f"{name}_{ahead}", more, AHEAD * ahead + patch).all
        assert said in output
    assert weights(program, f"{name}_False") == weights(program, f"{name}_True")


def test_a_resumed_run_makes_the_same_batches_ahead(program):
    train(program, "pretrain", "whole")
    train(program, "pretrain", "parts", patch=AHEAD, steps=3)
    train(program, "pretrain", "parts", patch=AHEAD)
    assert weights(program, "parts") == weights(program, "whole")


def test_a_run_whose_data_fails_while_it_trains(program):
    """It ends as without a thread: the error is the main thread's, the last good step is saved."""
    fail = """
import prepare
batch = prepare.Windows.batch
def failing(self, positions):
    if positions[0] >= 24:
        raise OSError(5, "Input/output error", self.train[0].path)
    return batch(self, positions)
prepare.Windows.batch = failing
"""
    shape = "--dtype=float32 --compile=False --device=cpu --block_size=64 --batch_size=4"
    args = f"{STAGES['pretrain']} {shape} {LOOP} --gradient_accumulation_steps=2 --max_iters=6"
    for name, patch in (("broken", fail), ("broken_ahead", AHEAD + fail)):
        done = program.run("train.py", args, f"--out_dir=out/{name}", patch=patch)
        assert done.code == 1 and "Traceback" not in done.err
        assert done.err.splitlines()[-1].startswith("train.py: data/texts/train.bin: Input/output")
        assert (program.cwd / "out" / name / "step_000003" / "trainer.pt").exists()
    a, b = (
        load_file(program.cwd / "out" / name / "step_000003" / "model.safetensors")
        for name in ("broken", "broken_ahead")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- what a step waits for

# Everything through which a number of a tensor, or a size that depends on it, gets to the host; in
# the main thread, between two beginnings of a step
COUNT = """
import atexit, json, torch, runs
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
waits, rng_state = [], runs.rng_state
class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            waits[-1].append(str(func))
        return func(*args, **(kwargs or {}))
class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"):
            waits[-1].append(name)
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            waits[-1].append("index by a mask")
        return func(*args, **(kwargs or {}))
def counted(device):
    waits.append([])
    if len(waits) == 1:
        Functions().__enter__(), Operators().__enter__()
    return rng_state(device)
runs.rng_state = counted
atexit.register(lambda: open("waits.json", "w").write(json.dumps(waits)))
"""


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_waits_for_the_device_once(program, stage):
    """For the loss, the norm of the gradient and the metrics together, also where they are logged.
    With document masks as kernels take them: where documents end is known before the step."""
    kernel = """
import model, torch
model.pick_attention = lambda *args: "torch.nn.attention.varlen"
model._varlen = lambda name: lambda q, k, v, ends, longest: q + k.mean() + v.mean() + ends.sum()
model.rows_with_targets = lambda targets: slice(None)  # as on a GPU
"""
    train(program, stage, f"{stage}_waits", patch=kernel + AHEAD + COUNT, steps=4)
    first, *steps, last = json.loads((program.cwd / "waits.json").read_text())
    assert len(steps) == 3
    for waits in steps:
        assert len(waits) == 1 and "tolist" in waits[0]


def test_the_ends_of_documents():
    """Given or found, what kernels take is the same."""
    idx = torch.randint(1, 9, (3, 16))
    idx[0, 3], idx[0, 15], idx[2, 0] = 0, 0, 0
    ends = document_ends(idx, 0)
    assert ends.tolist() == [0, 4, 16, 32, 33, 48] and ends.dtype == torch.int32
    for given in (None, ends):
        segments = documents(idx, 0, "torch.nn.attention.varlen", ends=given).mask
        assert torch.equal(segments.ends, ends)
