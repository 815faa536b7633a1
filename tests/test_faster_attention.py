"""Which of two kernels for packed documents a run on a GPU takes, by a stand-in of clock and
kernels."""

import pytest
import torch

import model as model_module
from model import GPT, GPTConfig, Segments, documents, faster_attention

VARLEN = "torch.nn.attention.varlen"


@pytest.fixture
def kernels(monkeypatch):
    """Sets the seconds that each kernel takes, None where it fails; returns the clock."""
    now, cost = [0.0], {}

    def attention(q, k, v, mask, dropout=0.0):
        name = VARLEN if isinstance(mask, Segments) else "flex"
        if cost[name] is None:
            raise RuntimeError("no such kernel for this GPU")
        # once more than it takes, as if it had to be compiled
        now[0] += cost[name] if cost.get("warm") else 100
        cost["warm"] = True
        groups = q.shape[1] // k.shape[1]
        return q + k.repeat_interleave(groups, 1) + v.repeat_interleave(groups, 1)

    def masks(*args):
        now[0] += cost["mask"]
        return documents(*args)

    monkeypatch.setattr(model_module, "fast_attention", attention)
    monkeypatch.setattr(model_module, "documents", masks)
    monkeypatch.setattr(torch, "compile", lambda function: function)

    def clock():
        return now[0]

    def describe(varlen, flex, mask=0.0):
        cost.clear()
        cost.update({VARLEN: varlen, "flex": flex, "mask": mask})
        return clock

    return describe


@pytest.fixture
def gpt():
    return GPT(GPTConfig(vocab_size=61, block_size=64, n_layer=4, n_head=2, n_kv_head=1, n_embd=32))


def test_the_faster_kernel_is_taken(kernels, gpt):
    clock = kernels(0.002, 0.003)
    name, shown = faster_attention(VARLEN, gpt, "cpu", clock)
    assert name == VARLEN and shown == f"{VARLEN} ({VARLEN} 2.00 ms, flex 3.00 ms a layer)"
    clock = kernels(0.002, 0.001)
    assert faster_attention(VARLEN, gpt, "cpu", clock)[0] == "flex"
    clock = kernels(0.002, 0.002)
    assert faster_attention(VARLEN, gpt, "cpu", clock)[0] == VARLEN


def test_a_mask_is_shared_by_all_layers(kernels, gpt):
    clock = kernels(0.002, 0.001, mask=0.004)
    shown = faster_attention(VARLEN, gpt, "cpu", clock)[1]
    assert shown == f"flex ({VARLEN} 3.00 ms, flex 2.00 ms a layer)"


def test_a_kernel_that_fails_is_not_taken(kernels, gpt):
    clock = kernels(0.002, None)
    assert faster_attention(VARLEN, gpt, "cpu", clock)[0] == VARLEN
    clock = kernels(None, 0.002)
    assert faster_attention(VARLEN, gpt, "cpu", clock)[0] == "flex"
    clock = kernels(None, None)
    assert faster_attention(VARLEN, gpt, "cpu", clock)[0] == VARLEN


@pytest.mark.parametrize("name", ["sdpa", "flex"])
def test_where_there_is_no_choice_nothing_is_measured(gpt, name):
    assert faster_attention(name, gpt, "cpu") == (name, name)
