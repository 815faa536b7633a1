"""What matters on a GPU, and can be seen without one: graphs, bytes, and what is chosen and refused."""

import itertools
import json
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
import prepare
from configurator import UserError
from model import (
    GPT,
    GPUS,
    GPTConfig,
    compile_pays,
    documents,
    expected_seconds,
    gpu_named,
    linear_cross_entropy,
    pick_attention,
    pick_device,
    set_up_device,
)

SMALL = dict(vocab_size=61, block_size=512, n_layer=1, n_head=2, n_kv_head=1, n_embd=32)


@pytest.fixture
def cuda(monkeypatch):
    """Sets what torch.cuda says of this machine: a Hopper, unless it is called."""

    def describe(name="NVIDIA H100 80GB HBM3", count=1, capability=(9, 0)):
        monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: name)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)
        monkeypatch.setattr("torch.cuda.set_device", lambda device: None)

    describe()
    yield describe
    model_module._varlen.cache_clear()


# --- torch.compile: when


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA L4"])
def test_compile_pays_by_the_seconds_of_the_steps_left(cuda, name):
    """Few large steps do, many tiny ones don't; the seconds of an unknown GPU are 0 until some are
    measured, and so are a CPU's."""
    cuda(name)
    with torch.device("meta"):
        large = GPT(GPTConfig(vocab_size=49152, n_layer=32, n_embd=960, n_head=15, block_size=2048))
        tiny = GPT(GPTConfig(**SMALL))
    million = expected_seconds(large, 2**20, "cuda")
    assert 2 * expected_seconds(large, 2**19, "cuda:1") == pytest.approx(million)
    assert compile_pays("cuda", 50, million)  # a resumed tail
    assert not compile_pays("cuda", 1, million)
    assert not compile_pays("cuda", 2000, expected_seconds(tiny, 4096, "cuda"))
    cuda("NVIDIA GeForce GTX 1080")
    assert expected_seconds(large, 2**20, "cuda") == expected_seconds(large, 2**20, "cpu") == 0
    assert not compile_pays("cuda", 10**6, 0.0)
    assert compile_pays("cuda", 300, 1.0) and not compile_pays("cpu", 300, 1.0)
    assert compile_pays("cpu", 500, 1.0) and not compile_pays("mps", 500, 1.0)


# --- torch.compile: how many graphs


def graphs(calls, **keys):
    torch._dynamo.reset()
    counters.clear()
    gpt = GPT(GPTConfig(**SMALL | keys))
    gpt.compile(backend="eager")
    for call in calls:
        call(gpt)
    assert not counters["graph_break"]
    assert counters["frames"]["ok"] == counters["frames"]["total"]  # none fell back to eager
    return counters["stats"]["unique_graphs"]


def backward(batch, length, **options):
    def call(gpt):
        idx = torch.randint(61, (batch, length))
        gpt(idx, idx, **options)[1].sum().backward()

    return call


LENGTHS = (37, 120, 256, 300, 411, 512, 49, 77, 101, 490, 500)


@pytest.mark.parametrize("nope_every", [0, 1])
def test_answers_of_any_length_take_two_graphs(nope_every):
    """As in DPO and RLVR: the first length has its own graph, the second one is for all others."""
    calls = [backward(2, length, per_token=True) for length in LENGTHS]
    assert graphs(calls, nope_every=nope_every) == 2


def test_chunks_of_logits_take_a_graph_for_each_number_of_chunks(monkeypatch):
    monkeypatch.setattr("model.LOGITS_IN_A_CHUNK", {"cpu": 61 * 512})
    calls = [backward(2, length, per_token=True) for length in LENGTHS[:6]]
    assert graphs(calls) <= 3
    assert graphs([backward(batch, 256) for batch in range(2, 8)]) <= 4


def test_documents_of_any_number_take_one_graph(monkeypatch):
    """Where documents end is marked as of any length before the model is compiled."""

    def kernel(q, k, v, ends, ends_k, longest, longest_k, **options):
        return q * ends.sum()

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)

    def call_with(many):
        def call(gpt):
            idx = torch.randint(1, 61, (2, 128))
            idx[:, :many] = 0
            gpt(idx, idx, documents(idx, 0, "torch.nn.attention.varlen"))[1].backward()

        return call

    model_module._varlen.cache_clear()
    assert graphs([call_with(many) for many in (3, 5, 0, 9)]) == 1
    model_module._varlen.cache_clear()


def test_a_last_held_out_batch_is_as_large_as_the_others(tmp_path):
    """Its loss and its number of targets are those of the windows that it holds."""
    for split, size in (("train", 400), ("val", 120)):
        (np.arange(size) % 60 + 1).astype("uint16").tofile(tmp_path / f"{split}.bin")
    meta = {"tokenizer": "byte", "vocab_size": 257, "dtype": "uint16", "eos_id": 256}
    meta |= {"train_tokens": 400, "val_tokens": 120}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    config = dict(dataset=tmp_path.name, data_dir=str(tmp_path.parent), batch_size=1000)
    data = prepare.Windows(config | dict(block_size=8, seed=1, stage="pretrain"))
    whole = [batch for _, batch in data.held_out(14, 14)]
    parts = [batch for _, batch in data.held_out(14, 4)]
    assert [batch.x.shape for batch in parts] == [(4, 8)] * 4
    assert sum(batch.units for batch in parts) == whole[0].units == 14 * 8
    gpt = GPT(GPTConfig(**SMALL))
    sums = [
        sum(gpt(batch.x, batch.y)[1].item() * batch.units for batch in batches)
        for batches in (whole, parts)
    ]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    # fewer windows than a batch has rows are not filled up
    assert [batch.x.shape for _, batch in data.held_out(3, 4)] == [(3, 8)]


# --- memory


@pytest.mark.parametrize(
    "dtype, expected",
    [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "float32")],
)
@pytest.mark.parametrize("keys", [{}, dict(pos="learned", norm="layernorm", embed_scale=True)])
def test_the_residual_stream_has_the_dtype_of_autocast(dtype, expected, keys):
    """Only in bfloat16, whose range is float32's."""
    gpt, seen = GPT(GPTConfig(**SMALL | keys)), []
    for block in gpt.blocks:
        block.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    idx = torch.randint(61, (2, 32))
    with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
        loss = gpt(idx, idx)[1]
    loss.backward()
    assert {x.dtype for x in seen} == {getattr(torch, expected)}
    assert all(p.grad.dtype == torch.float32 for p in gpt.parameters())


# --- the loss


class Operators(TorchDispatchMode):
    """Records the operators of torch that are called, with their first argument."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func.overloadpacket, args))
        return func(*args, **(kwargs or {}))


def test_the_loss_holds_its_gradient_in_the_dtype_of_the_logits():
    """p - onehot(target) is not made in float32 first, which a compiler would have to store."""
    x, w = torch.randn(64, 16, requires_grad=True), torch.randn(61, 16, requires_grad=True)
    with Operators() as operators, torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(x, w, torch.randint(61, (64,)))
    scattered = [args[0] for func, args in operators.calls if "scatter" in str(func)]
    assert scattered and all(t.dtype == torch.bfloat16 for t in scattered)


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 257, 1000, 1026])
@pytest.mark.parametrize("per_token", [False, True])
def test_no_chunk_of_logits_is_a_few_rows(rows, per_token, monkeypatch):
    monkeypatch.setattr("model.LOGITS_IN_A_CHUNK", {"cpu": 61 * 128})
    gpt, sizes = GPT(GPTConfig(**SMALL | dict(block_size=2048))), []
    idx = torch.randint(61, (1, rows))
    with Operators() as operators:
        loss = gpt(idx, idx, per_token=per_token)[1]
    for func, args in operators.calls:
        if func is torch.ops.aten.mm and args[1].shape == (32, 61):
            sizes.append(len(args[0]))
    assert sum(sizes) == rows and max(sizes) <= 128
    assert min(sizes) >= max(sizes) - len(sizes)
    plain = F.cross_entropy(gpt(idx)[0][0], idx[0], reduction="none" if per_token else "mean")
    assert torch.allclose(-loss[0] if per_token else loss, plain, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_loss_are_those_of_cross_entropy(dtype):
    """Certain, impossible and absent targets included."""
    x, w = torch.randn(40, 16, requires_grad=True), torch.randn(61, 16, requires_grad=True)
    targets = torch.randint(61, (40,))
    targets[::5] = -1
    with torch.no_grad():
        x[1], x[2] = 30 * w[targets[1]], -30 * w[targets[2]]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = linear_cross_entropy(x, w, targets)
    low_x, low_w = x.to(dtype), w.to(dtype)
    logits = (low_x @ low_w.T).float()
    plain = F.cross_entropy(logits, targets, ignore_index=-1)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (x, w)), torch.autograd.grad(plain, (x, w)), strict=True
    ):
        assert (ours - theirs).norm() < (0.01 if dtype == torch.bfloat16 else 1e-6) * theirs.norm()


# --- attention


def test_grouped_heads_reach_the_kernels_as_they_are(monkeypatch):
    """They read each key and value head once; no copy of it is made for each query head."""
    seen = []

    def kernel(q, k, v, *args, window_size=(-1, -1)):  # the parameters of torch 2.11
        seen.append((q.shape[1], k.shape[1], v.shape[1]))
        return q

    idx = torch.randint(61, (2, 32))
    for gqa in (False, True):
        if gqa:

            def kernel(q, k, v, *args, window_size=(-1, -1), enable_gqa=False):  # of torch 2.13
                seen.append((q.shape[1], k.shape[1], v.shape[1]))
                assert enable_gqa
                return q

        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        model_module._varlen.cache_clear()
        GPT(GPTConfig(**SMALL))(idx, idx, documents(idx, 0, "torch.nn.attention.varlen"))
    model_module._varlen.cache_clear()
    assert seen == [(2, 1, 1)] * 2


def test_flash_attention_3_is_activated_on_hopper(cuda, monkeypatch):
    """With and without documents, where its package is installed; not with dropout, in float32, or
    for what is not causal."""
    activated = []
    monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", activated.append)
    installed = ["flash_attn_interface"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in installed)
    for doc_mask in (True, False):
        model_module._varlen.cache_clear()
        assert pick_attention("cuda", "bfloat16", doc_mask, True) == "FA3"
    assert activated == ["FA3", "FA3"]
    for args in (("float32", True, True), ("bfloat16", True, True, 0.1)):
        assert pick_attention("cuda", *args) == "sdpa"
    assert pick_attention("cuda", "bfloat16", True, True, 0.0, False) == "flex"
    assert pick_attention("cpu", "bfloat16", True, True) == "sdpa"
    installed.append("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace())
    cuda("NVIDIA A100-SXM4-80GB", capability=(8, 0))
    assert pick_attention("cuda", "bfloat16", True, True) == "flash_attn"
    assert pick_attention("cuda", "bfloat16", False, True) == "sdpa"


def test_a_flash_attention_3_that_fails_is_passed_over(cuda, monkeypatch):
    def fail(name):
        raise RuntimeError("Module 'flash_attn_interface' does not expose FA3 kernels")

    monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", fail)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "flash_attn")
    with pytest.warns(UserWarning, match="flash_attn_interface .* does not expose FA3"):
        assert pick_attention("cuda", "bfloat16", True, True) == "torch.nn.attention.varlen"
    with pytest.warns(UserWarning, match="flash_attn_interface .* does not expose FA3"):
        assert pick_attention("cuda", "bfloat16", False, True) == "sdpa"


@pytest.mark.parametrize("doc_mask, dropout", itertools.product([False, True], [0.0, 0.1]))
def test_documents_with_dropout_leave_cudnn_out(cuda, monkeypatch, doc_mask, dropout):
    """On Hopper its attention gives NaN there at some lengths."""
    asked = []
    monkeypatch.setattr("torch.backends.cuda.enable_cudnn_sdp", asked.append)
    pick_attention("cuda", "bfloat16", doc_mask, True, dropout)
    assert asked == ([False] if doc_mask and dropout else [])


# --- which GPU


@pytest.mark.parametrize(
    "name, tflops, gigabytes",
    [
        ("NVIDIA H100 80GB HBM3", 989, 80),
        ("NVIDIA H100 PCIe", 756, 80),
        ("NVIDIA H100 NVL", 835, 94),
        ("NVIDIA H200", 989, 141),
        ("NVIDIA H200 NVL", 835, 141),
        ("NVIDIA A100-SXM4-80GB", 312, 80),
        ("NVIDIA A100 80GB PCIe", 312, 80),
        ("NVIDIA GeForce RTX 4090", 165, 24),
        ("NVIDIA L4", 121, 24),
        ("NVIDIA L40S", 362, 48),
        ("h100 pcie", 756, 80),
        ("H100PCIe", 756, 80),
        ("RTX4090", 165, 24),
        ("H100", 989, 80),
    ],
)
def test_the_peak_of_a_gpu_by_its_name(name, tflops, gigabytes):
    """As torch.cuda.get_device_name gives it, and as one types it after --gpu=."""
    assert GPUS[gpu_named(name)][:2] == (tflops * 1e12, gigabytes)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA L40",
        "NVIDIA GH200 480GB",
        "Tesla T4",
    ],
)
def test_a_gpu_with_another_peak_has_none_here(name):
    assert gpu_named(name) is None


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused(cuda, monkeypatch, device):
    cuda(count=2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(UserError, match="2 GPUs for 4 processes.*nproc_per_node=2") as error:
            set_up_device(device)
        assert "\n" not in str(error.value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert set_up_device(device) == "cuda:1"


def test_processes_that_would_share_a_gpu_are_refused(cuda, monkeypatch):
    cuda(count=4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="device='cuda:1'.*2 processes"):
        set_up_device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert set_up_device("cuda:1") == "cuda:1"
    with pytest.raises(UserError, match="device='cuda:4': torch .* finds 4 here"):
        pick_device("cuda:4")
