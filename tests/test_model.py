"""The model: its sizes, its loss, its optimizers, its cache."""

import contextlib
import copy
import itertools
import math
import pathlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import model as model_module
from configurator import UserError
from model import (
    GPT,
    GPTConfig,
    KVCache,
    Muon,
    attend,
    documents,
    fast_attention,
    linear_cross_entropy,
    make_optimizers,
    orthogonalize,
    pack_weights,
    pick_attention,
    sample_token,
    schedule_factor,
)

SMALL = dict(
    vocab_size=97,
    block_size=48,
    n_layer=3,
    n_head=4,
    n_embd=64,
    rope_theta=1e4,
    qk_norm=False,
    unit_embed=False,
)
LLAMA = dict(n_kv_head=2)
GPT2 = dict(norm="layernorm", mlp="gelu", pos="learned", bias=True)
ALL = dict(
    n_kv_head=2, qk_norm=True, nope_every=2, embed_scale=True, tie_embeddings=False, head_dim=24
)


def make(**keys):
    model = GPT(GPTConfig(**{**SMALL, **keys})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


@pytest.fixture(autouse=True)
def kernels_are_looked_up_anew():
    yield
    model_module._varlen.cache_clear()


@contextlib.contextmanager
def plain(*names):
    """Without these fast paths."""
    before = model_module.FAST
    model_module.FAST = set(before) - set(names)
    try:
        yield
    finally:
        model_module.FAST = before


kernels = pytest.mark.skipif(
    "attention" not in model_module.FAST, reason="FAST has no attention: no kernel is used"
)


# --- shapes and their contradictions


@pytest.mark.parametrize(
    "keys, said",
    [
        (dict(n_embd=65), "n_embd=65 is not divisible by n_head=4"),
        (dict(n_kv_head=3), "n_head=4 .* n_kv_head=3"),
        (dict(block_size=64, max_positions=32), "block_size=64 is beyond max_positions=32"),
        (dict(norm="batchnorm"), "norm='batchnorm': expected 'rmsnorm' or 'layernorm'"),
        (dict(head_dim=15), "head_dim=15"),
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(n_layer=0), "n_layer=0"),
        *[
            (dict([pair]), f"^{pair[0]}={pair[1]}: expected")
            for pair in (
                ("n_kv_head", -1),
                ("head_dim", -2),
                ("ffn_dim", -5),
                ("max_positions", -1),
                ("nope_every", -1),
                ("block_size", -1),
                ("vocab_size", 0),
                ("n_head", 0),
                ("n_embd", -8),
                ("norm_eps", 0.0),
                ("norm_eps", -1e-5),
                ("norm_eps", math.nan),
                ("norm_eps", math.inf),
                ("rope_theta", 0.0),
                ("rope_theta", math.nan),
                ("init_std", -0.1),
                ("dropout", -0.1),
                ("dropout", math.nan),
            )
        ],
    ],
)
def test_contradictions_are_named(keys, said):
    with pytest.raises(UserError, match=said) as e:
        GPTConfig(**{**SMALL, **keys})
    assert "\n" not in str(e.value)


def test_a_model_needs_a_vocabulary():
    """0 means the data's, which a model by itself does not have."""
    with pytest.raises(UserError, match="vocab_size=0: expected at least 1"):
        GPTConfig()


def test_zero_follows():
    c = GPTConfig(vocab_size=97, n_embd=576, n_head=9, block_size=128)
    assert (c.n_kv_head, c.head_dim, c.ffn_dim, c.max_positions) == (9, 64, 1536, 128)
    assert GPTConfig(vocab_size=97, n_embd=960, n_head=15).ffn_dim == 2560
    assert GPTConfig(vocab_size=97, n_embd=768, mlp="gelu", pos="learned").ffn_dim == 3072


def test_longer_than_the_positions_is_refused():
    with pytest.raises(UserError, match="49 tokens are beyond max_positions=48"):
        make()(torch.zeros(1, 49, dtype=torch.long))


# --- forward and loss


@pytest.mark.parametrize("keys", [LLAMA, GPT2, ALL])
def test_no_token_sees_a_later_one(keys):
    model, idx = make(**keys), torch.randint(97, (2, 20))
    changed = idx.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 97
    a, b = model(idx)[0], model(changed)[0]
    assert torch.equal(a[:, :12], b[:, :12]) and (a[:, 12:] - b[:, 12:]).abs().amax(-1).min() > 1e-4


def test_no_target_gives_zero_and_zero_gradients():
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    loss = linear_cross_entropy(x, w, torch.full((6,), -1))
    loss.backward()
    assert loss.item() == 0 and not x.grad.any() and not w.grad.any()


def test_a_second_backward_pass_gives_the_same_gradients():
    """The gradient is made in the forward pass, and must not be scaled in place, twice."""
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    loss = 0.5 * linear_cross_entropy(x, w, torch.arange(6))
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, (x, w))
    for a, b, c in zip(kept, first, second, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_gradient_checkpointing_changes_no_gradient():
    model, idx = make(**LLAMA).train(), torch.randint(97, (2, 48))
    grads = []
    for model.grad_checkpoint in (False, True):
        model.zero_grad()
        model(idx, idx)[1].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("keys", [LLAMA, GPT2, dict(nope_every=2), dict(qk_norm=True)])
def test_packed_documents_are_as_if_alone(keys):
    """The logits of a document in a packed window are those that it has alone."""
    model, eos = make(**keys), 0
    docs = [torch.cat([torch.randint(1, 97, (n,)), torch.tensor([eos])]) for n in (9, 1, 21, 13)]
    window = torch.cat(docs)[None, :48]
    packed = model(window, docs=documents(window, eos))[0][0]
    start = 0
    for doc in docs:
        doc = doc[: 48 - start]
        assert (model(doc[None])[0][0] - packed[start : start + len(doc)]).abs().max() < 1e-5
        start += len(doc)
    assert (model(window)[0][0] - packed).abs().max() > 1e-3  # and without the mask they are not


def test_attention_is_picked_by_what_is_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert pick_attention("cpu", "bfloat16", True, True) == "sdpa"
    assert pick_attention("cuda", "bfloat16", False, True) == "sdpa"
    assert pick_attention("cuda:1", "bfloat16", True, True) == "torch.nn.attention.varlen"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace())
    assert pick_attention("cuda", "bfloat16", True, True) == "flash_attn"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert pick_attention("cuda", "bfloat16", True, True) == "flex"
    assert (
        pick_attention("cuda", "bfloat16", True, False)
        == pick_attention("cuda", "float32", True, True)
        == "sdpa"
    )
    monkeypatch.undo()
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))  # a T4
    assert pick_attention("cuda", "float16", True, True) == "flex"


def test_a_flash_attention_that_does_not_load_is_passed_over(monkeypatch, tmp_path):
    """Built for another torch or CUDA, its import raises; training takes the next kernel."""
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c104')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    with pytest.warns(
        UserWarning, match="flash_attn is installed but does not load: undefined symbol"
    ):
        assert pick_attention("cuda", "bfloat16", True, True) == "torch.nn.attention.varlen"


def test_initial_sizes():
    model = GPT(GPTConfig(**{**SMALL, "n_layer": 8, "n_embd": 128}))
    assert abs(model.blocks[3].attn.qkv.weight.std() - 0.02) < 2e-3
    assert abs(model.blocks[3].mlp.down.weight.std() - 0.02 / 4) < 5e-4  # sqrt(2 * 8)
    cut = (
        GPT(GPTConfig(**SMALL, init="trunc_normal", init_std=0.1, scale_residual=False))
        .blocks[0]
        .mlp.down.weight
    )
    assert cut.abs().max() <= 0.3 and cut.std() > 0.09
    unit = GPT(GPTConfig(**SMALL | dict(unit_embed=True)))
    assert abs(unit.embed.weight.std() - 1) < 0.05 and torch.allclose(
        unit.norm.weight, torch.tensor(64**-0.5)
    )


class Changed(GPT):
    """A model as someone would change it: added parameters with initial values of their own."""

    def __init__(self, config):
        super().__init__(config)
        self.value_embed = torch.nn.Embedding(config.vocab_size, config.n_embd)
        for block in self.blocks:
            block.gate = torch.nn.Parameter(torch.full((config.n_embd,), 0.25))
            block.attn.bias_table = torch.nn.Embedding(config.block_size, 1)
            block.mlp.experts = torch.nn.Parameter(torch.zeros(2, 3, 4))
        self.init_weights()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_parameters_of_ones_own_are_trained_and_keep_their_first_values(optimizer):
    """A vector set to ones, or a stack that no optimizer steps, would be an edit without effect."""
    model = Changed(GPTConfig(**SMALL))
    assert (model.blocks[1].gate == 0.25).all() and not model.blocks[0].mlp.experts.any()
    assert model.value_embed.weight.std() < 0.03  # an embedding begins as embeddings do
    opts = make_optimizers(model, optimizer)
    stepped = [p for opt in opts for group in opt.param_groups for p in group["params"]]
    assert len(stepped) == len({id(p) for p in stepped}) == len(list(model.parameters()))
    if optimizer == "muon":  # orthogonal updates are for matrices, not for tables and stacks
        muon = {id(p) for group in opts[1].param_groups for p in group["params"]}
        assert (
            id(model.blocks[0].attn.bias_table.weight) not in muon
            and id(model.blocks[0].mlp.experts) not in muon
        )


# --- generation


@pytest.mark.parametrize("keys", [LLAMA, GPT2, ALL])
def test_prompts_of_different_lengths_share_a_batch(keys):
    model, lengths = make(**keys), [3, 9, 6]
    prompts = [torch.randint(97, (n,)) for n in lengths]
    pad = torch.tensor([9 - n for n in lengths])
    batch = torch.stack([F.pad(p, (9 - len(p), 0)) for p in prompts])
    together = model.generate(batch, 20, temperature=0.9, seed=3, pad=pad)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], 20, temperature=0.9, seed=3 + row)
        assert torch.equal(together[row, 9:], alone[0, len(prompt) :])


@pytest.mark.parametrize("keys", [LLAMA, GPT2, ALL])
def test_log_probs_of_sampled_tokens_equal_a_full_forward_pass(keys, monkeypatch):
    """What RLVR relies on: sampled with a cache, padded left; read again at once, padded right."""
    model, lengths, new = make(**keys), [2, 11, 7, 5], 20
    seen, sample = [], model_module.sample_token

    def watched(logits, draw, temperature, *more):
        token = sample(logits, draw, temperature, *more)
        seen.append((logits / temperature).log_softmax(-1).gather(1, token[:, None])[:, 0])
        return token

    monkeypatch.setattr(model_module, "sample_token", watched)
    prompts = [torch.randint(97, (n,)) for n in lengths]
    pad = torch.tensor([11 - n for n in lengths])
    batch = torch.stack([F.pad(p, (11 - len(p), 0)) for p in prompts])
    out = model.generate(batch, new, temperature=0.7, seed=5, pad=pad)
    rows = torch.stack([F.pad(row[n:], (0, n)) for row, n in zip(out, pad.tolist(), strict=True)])
    x, y = rows[:, :-1], rows[:, 1:].clone()
    for row, n in enumerate(lengths):
        y[row, : n - 1] = y[row, n - 1 + new :] = -1
    again = model(x, y, per_token=True, temperature=0.7)[1]
    assert (again[y >= 0].view(4, new) - torch.stack(seen, dim=1)).abs().max() < 1e-4


def test_generation_ends_slides_and_repeats():
    model, idx = make(**LLAMA), torch.randint(97, (2, 5))
    long = model.generate(idx, 100, seed=1)  # beyond its 48 positions
    assert long.shape == (2, 105) and long.max() < 97
    assert torch.equal(long, model.generate(idx, 100, seed=1)) and not torch.equal(
        long, model.generate(idx, 100, seed=2)
    )
    stop = long[0, 8].item()
    ended = model.generate(idx, 100, seed=1, stop=[stop])[0]
    first = (ended[5:] == stop).nonzero()[0].item() + 5
    assert torch.equal(ended[: first + 1], long[0, : first + 1]) and (ended[first:] == stop).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.floats(0.05, 1.0), st.floats(0.0, 0.999))
def test_sampling_stays_within_top_k_and_top_p(k, p, u):
    logits = torch.randn(4, 30)
    token = sample_token(logits, torch.full((4,), u), 1.0, k, p)
    ordered = logits.argsort(descending=True)
    probs = logits.gather(1, ordered[:, :k]).softmax(-1)  # what is left by top_k
    for row in range(4):
        rank = (ordered[row] == token[row]).nonzero().item()
        assert rank < k and probs[row, :rank].sum() < p


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20000, 4)
    counts = sample_token(logits, torch.rand(20000)).bincount(minlength=4) / 20000
    assert (counts - logits[0].exp()).abs().max() < 0.015


# --- fast paths: each equals the plain code that it replaces. After an edit of the plain code, a
# failure means: delete the name from FAST in model.py, or edit the fast path, too


def logits_and_gradients(model, idx, docs=None, share=None):
    model.zero_grad()
    logits = model(idx, docs=docs)[0]
    (logits * share).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("keys", [LLAMA, GPT2, ALL])
@pytest.mark.parametrize("packed", [False, True])
def test_fast_attention_equals_plain_attention(keys, packed):
    model, idx, share = make(**keys), torch.randint(97, (3, 48)), torch.randn(3, 48, 97)
    idx[:, ::7] = 0
    docs = documents(idx, 0) if packed else None
    fast = logits_and_gradients(model, idx, docs, share)
    with plain("attention"):
        slow = logits_and_gradients(model, idx, documents(idx, 0) if packed else None, share)
    for a, b in zip(fast, slow, strict=True):
        assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())


def test_fast_attention_of_short_windows_in_bf16():
    q, k, v = torch.randn(2, 4, 30, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
    fast = fast_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), None)
    assert fast.dtype == torch.bfloat16 and (fast - attend(q, k, v)).abs().max() < 0.05


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_fast_attention_of_the_last_tokens(tokens):
    """As with a cache: the queries are the last of the keys."""
    q, k, v = torch.randn(2, 4, tokens, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
    assert (fast_attention(q, k, v, None) - attend(q, k, v)).abs().max() < 1e-5


@kernels
@pytest.mark.parametrize("package", ["flash_attn", "torch.nn.attention.varlen"])
def test_fast_attention_kernels_for_documents(package, monkeypatch):
    """The kernels need CUDA; a stand-in, a loop over documents, checks how they are called."""

    def loop(
        q,
        k,
        v,
        starts,
        starts_k,
        longest,
        longest_k,
        causal=False,
        window_size=(-1, -1),
        enable_gqa=False,
        is_causal=False,
    ):
        assert causal or is_causal or window_size == (-1, 0)
        assert starts.dtype == torch.int32 and torch.equal(starts, starts_k)
        assert (
            starts[0] == 0 and starts[-1] == len(q) and starts.diff().max() <= longest == longest_k
        )
        return torch.cat(
            [
                F.scaled_dot_product_attention(
                    *(t[a:b].transpose(0, 1) for t in (q, k, v)), is_causal=True, enable_gqa=True
                ).transpose(0, 1)
                for a, b in itertools.pairwise(starts)
            ]
        )

    if package == "flash_attn":
        monkeypatch.setitem(
            sys.modules, package, types.SimpleNamespace(flash_attn_varlen_func=loop)
        )
    else:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", loop)
    model, idx = make(**LLAMA), torch.randint(97, (3, 48))
    idx[:, ::7] = 0
    fast = model(idx, docs=documents(idx, 0, package))[0]
    with plain("attention"):
        assert (model(idx, docs=documents(idx, 0))[0] - fast).abs().max() < 1e-5


@kernels
@torch.no_grad()  # on a CPU it has no backward
def test_fast_attention_flex():
    model, idx = make(**LLAMA), torch.randint(97, (3, 48))
    idx[:, ::7] = 0
    flex = model(idx, docs=documents(idx, 0, "flex"))[0]
    with plain("attention"):
        assert (model(idx, docs=documents(idx, 0))[0] - flex).abs().max() < 1e-5


@pytest.mark.parametrize("keys", [LLAMA, GPT2, ALL])
def test_fast_loss_equals_cross_entropy_of_the_logits(keys, monkeypatch):
    monkeypatch.setattr(
        "model.LOGITS_IN_A_CHUNK", {"cpu": 97 * 5}
    )  # several chunks, the last one short
    model, idx, targets = make(**keys), torch.randint(97, (11, 48)), torch.randint(97, (11, 48))
    targets[torch.rand(targets.shape) < 0.3] = -1

    def plain_loss():
        return F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten(), ignore_index=-1)

    def loss_and_gradients(loss):
        model.zero_grad()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = loss_and_gradients(plain_loss())
    fast = loss_and_gradients(model(idx, targets)[1])
    with plain("loss"):
        slow = loss_and_gradients(model(idx, targets)[1])
    for a, b, c in zip(fast, slow, expected, strict=True):
        assert (a - c).abs().max() < 1e-5 and (b - c).abs().max() < 1e-5


@pytest.mark.parametrize("keys", [LLAMA, GPT2, ALL])
@pytest.mark.parametrize("how", [dict(temperature=0), dict(seed=3, temperature=0.9, top_k=20)])
def test_fast_cache_changes_no_token(keys, how):
    """Also beyond the 48 positions, where the context slides, and with padding at the left."""
    model, idx = make(**keys), torch.randint(97, (3, 7))
    for more in ({}, dict(pad=torch.tensor([0, 3, 5]))):
        fast = model.generate(idx, 60, **how, **more)
        with plain("cache"):
            assert torch.equal(fast, model.generate(idx, 60, **how, **more))
    if how["temperature"] == 0:
        for t in range(7, 47):
            assert torch.equal(model(fast[:1, :t])[0][:, -1].argmax(-1), fast[:1, t])


@pytest.mark.parametrize("keys", [LLAMA, GPT2, ALL])
def test_fast_cache_changes_no_logit(keys):
    model, idx = make(**keys), torch.randint(97, (3, 30))
    cache = KVCache(model.config, 3, 30, "cpu", torch.float32)
    parts = [
        model.logits(model.hidden(idx[:, a:b], cache=cache))
        for a, b in ((0, 11), (11, 12), (12, 20), (20, 30))
    ]
    assert (torch.cat(parts, 1) - model(idx)[0]).abs().max() < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_fast_packing_changes_no_logit(dtype, tolerance):
    model, idx = make(**ALL).to(dtype), torch.randint(97, (3, 30))
    packed = pack_weights(copy.deepcopy(model))
    assert (packed(idx)[0] - model(idx)[0]).abs().max() < tolerance
    with plain("packing"):
        assert pack_weights(model).blocks[0].mlp.up.forward.__func__ is torch.nn.Linear.forward


@pytest.mark.parametrize("keys", [LLAMA, GPT2, ALL])
def test_fast_paths_are_used_where_nothing_was_edited(keys, tmp_path):
    model = make(**keys)
    model.save_pretrained(tmp_path)
    for each in (model, GPT.from_pretrained(tmp_path)):
        assert each.is_causal and each.has_plain_logits
    assert model_module.attend_is_plain()


EDITS = {
    "scores capped": (
        "    scores = scores.masked_fill(",
        "    scores = 5 * torch.tanh(scores / 5)\n    scores = scores.masked_fill(",
    ),
    "scores scaled otherwise": ("k.mT / math.sqrt(q.shape[-1])", "k.mT / q.shape[-1]"),
    "logits scaled": ("return self.head(x).float()", "return 3.0 * self.head(x).float()"),
    "logits of what is cut off": ("self.head(x).float()", "self.head(x.clamp(max=1)).float()"),
    "a bias of the head": (
        "config.n_embd, config.vocab_size, bias=False)",
        "config.n_embd, config.vocab_size, bias=True)",
    ),
    "every other token": (
        "return causal(query, key)",
        "return causal(query, key) & ((query - key) % 2 == 0)",
    ),
    "a window": ("return causal(query, key)", "return (key <= query) & (query - key < 5)"),
}


@pytest.mark.filterwarnings("ignore:attend in model.py was edited")
@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_fast_paths_follow_an_edit_of_the_plain_code(edit):
    """An edited model.py gives the same with all of FAST as with nothing of it, and something else
    than before."""
    source = pathlib.Path(model_module.__file__).read_text(encoding="utf-8")
    old, new = EDITS[edit]
    assert source.count(old) == 1
    edited = types.ModuleType("edited_model")
    edited.__file__ = model_module.__file__
    exec(compile(source.replace(old, new), edited.__file__, "exec"), edited.__dict__)
    model, before = edited.GPT(edited.GPTConfig(**SMALL)).eval(), make()
    for p in model.parameters():
        p += 0.05 * torch.randn_like(p)
    before.load_state_dict(model.state_dict(), strict=False)
    idx, targets = torch.randint(97, (3, 30)), torch.randint(97, (3, 30))

    def results(model):
        logits, loss = model(idx)[0], model(idx, targets)[1]
        together = loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, *together, model.generate(idx, 15, temperature=0)

    fast, unedited = results(model), results(before)
    edited.FAST = set()
    for a, b in zip(fast, results(model), strict=True):
        assert (a - b).abs().max() < 1e-5
    assert (fast[0] - unedited[0]).abs().max() > 1e-3
    assert (fast[1] - fast[2]).abs() < 1e-5


def test_fast_muon_steps_each_matrix_as_if_alone():
    """Fused q, k, v and gate, up, wide and tall, all of a shape at once: as a loop would."""
    torch.manual_seed(1)
    fused, tall, wide = (torch.nn.Parameter(torch.randn(s)) for s in ((32, 16), (24, 16), (16, 24)))
    fused.parts = [16, 8, 8]
    start = [p.detach().clone() for p in (fused, tall, wide)]
    optimizer = Muon(
        [fused, tall, wide], lr=0.1, momentum=0.9, weight_decay=0.5, dtype=torch.float32
    )
    momenta = None

    def cut(tensors):
        return [*tensors[0].split([16, 8, 8]), tensors[1], tensors[2]]

    for _ in range(3):
        grads = [torch.randn_like(p) for p in (fused, tall, wide)]
        for p, g in zip((fused, tall, wide), grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        momenta = momenta or [torch.zeros_like(g) for g in cut(grads)]
        for p, g, m in zip(cut(start), cut(grads), momenta, strict=True):
            m.mul_(0.9).add_(0.1 * g)
            u = 0.1 * g + 0.9 * m
            u = (
                orthogonalize(u.mT[None], torch.float32)[0].mT
                if u.shape[0] > u.shape[1]
                else orthogonalize(u[None], torch.float32)[0]
            )
            p.mul_(1 - 0.1 * 0.5).sub_(0.1 * math.sqrt(max(1, p.shape[0] / p.shape[1])) * u)
    for p, s in zip((fused, tall, wide), start, strict=True):
        assert torch.allclose(p, s, atol=1e-5)


@pytest.mark.parametrize("keys", [LLAMA, GPT2, ALL])
def test_fast_gradients_are_those_of_the_forward_pass(keys):
    """The slope of the loss along its gradient, by finite differences.

    An edit of the maths above a gradient that is written by hand would train with the old gradient.
    """
    model, idx = make(**keys), torch.randint(97, (4, 48))
    model(idx, idx.roll(-1, 1))[1].backward()
    params = list(model.parameters())
    slope = sum(p.grad.double().square().sum() for p in params).item()
    step = 1e-2 / slope**0.5
    losses = []
    for sign in (1, -2):
        with torch.no_grad():
            for p in params:
                p += sign * step * p.grad
            losses.append(model(idx, idx.roll(-1, 1))[1].item())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=0.01)
    for block in model.blocks:  # each part by itself, so that the embedding's share hides none
        for module in (block.mlp.up, block.mlp.down, block.attn.qkv):
            grad = module.weight.grad
            step, losses = 3e-2 / grad.norm(), []
            for sign in (1, -2, 1):
                with torch.no_grad():
                    module.weight += sign * step * grad
                    losses.append(model(idx, idx.roll(-1, 1))[1].item())
            assert (losses[0] - losses[1]) / (2 * step * grad.norm() ** 2) == pytest.approx(
                1, rel=0.05
            )


# --- optimizers and schedules


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 48, 160)])
def test_orthogonalize_against_the_svd(shape):
    G = torch.randn(shape)
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    out = orthogonalize(G, torch.float32)
    # the singular vectors stay; the values above 1e-3, for which it is made, become 1
    values = torch.diagonal(U.mT @ out @ V.mT, dim1=1, dim2=2)
    assert (U @ torch.diag_embed(values) @ V - out).abs().max() < 1e-3
    large = S / S.norm(dim=1, keepdim=True) > 2e-3
    assert large.float().mean() > 0.9 and (values[large] - 1).abs().max() < 0.13
    assert values.min() > 0 and values.max() < 1.13
    assert (orthogonalize(G).float() - out).norm() / out.norm() < 0.1  # bf16


def test_who_steps_what_and_what_decays():
    model = GPT(GPTConfig(**SMALL, tie_embeddings=False))
    adam, muon = make_optimizers(model, "muon", weight_decay=0.1)
    hidden = {
        id(p) for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2
    }
    assert {id(p) for g in muon.param_groups for p in g["params"]} == hidden

    def decayed(opt):
        groups = [group for group in opt.param_groups if group["weight_decay"]]
        return {id(p) for group in groups for p in group["params"]}

    assert decayed(adam) == set() and decayed(muon) == hidden
    (adam,) = make_optimizers(model, "adamw", weight_decay=0.1)
    assert decayed(adam) == hidden
    (adam,) = make_optimizers(model, "adamw", weight_decay=0.1, decay_embeddings=True)
    assert decayed(adam) == {id(p) for p in model.parameters() if p.dim() == 2}
    assert sum(len(g["params"]) for g in adam.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_it_learns(optimizer):
    model = GPT(GPTConfig(**SMALL))
    opts = make_optimizers(model, optimizer, learning_rate=3e-3)
    idx = torch.randint(97, (4, 49))
    for _ in range(60):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
    assert loss.item() < 0.5  # from ln(97) = 4.6: it knows the batch by heart


def test_schedules_at_their_corners():
    def cosine(step):
        return schedule_factor(step, "cosine", 10, 100, 0.1)

    assert cosine(0) == 1 / 11 and cosine(9) == 10 / 11 and cosine(10) == 1.0
    assert cosine(55) == pytest.approx(0.55) and cosine(100) == cosine(500) == 0.1

    def wsd(step, shape="linear"):
        return schedule_factor(step, "wsd", 10, 100, 0.0, 0.2, shape)

    assert (
        wsd(5) == 6 / 11
        and wsd(10) == wsd(80) == 1.0
        and wsd(90) == pytest.approx(0.5)
        and wsd(100) == 0
    )
    assert wsd(85, "1-sqrt") == pytest.approx(0.5) and wsd(99, "1-sqrt") < wsd(99) + 0.03
    assert schedule_factor(10**9, "constant", 10, 100) == 1.0
    for step in range(200):  # nanoGPT's own numbers: 6e-4, 6e-5
        ours = 6e-4 * schedule_factor(step, "cosine", 20, 150, 0.1)
        if step < 20:
            theirs = 6e-4 * (step + 1) / 21
        elif step > 150:
            theirs = 6e-5
        else:
            theirs = 6e-5 + 0.5 * (1 + math.cos(math.pi * (step - 20) / 130)) * (6e-4 - 6e-5)
        assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_1x8_and_4x2_micro_batches_agree(masked):
    """Each micro-batch counts by its number of targets; one without any contributes no NaN."""
    model, x, y = make(**LLAMA), torch.randint(97, (8, 48)), torch.randint(97, (8, 48))
    if masked:
        y[torch.rand(y.shape) < torch.linspace(0, 0.9, 8)[:, None]] = -1
        y[4:6] = -1
    grads = []
    for size in (8, 2):
        model.zero_grad()
        for a, b in zip(x.split(size), y.split(size), strict=True):
            (model(a, b)[1] * ((b >= 0).sum() / (y >= 0).sum())).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).abs().max() < 1e-6


# --- threads


def test_a_busy_core_takes_a_thread_away_until_it_is_free(monkeypatch):
    """From there on all are tried again after 5 seconds, 10, 20, ..., and stay once it is free."""
    clock, used = types.SimpleNamespace(now=0.0, preemptions=0), [4]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(model_module.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(model_module, "_preemptions", lambda: clock.preemptions)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    threads = model_module.Threads("cpu")

    def steps(seconds, preempted_a_second):
        """[(second of a change, threads from there on)]"""
        changes = []
        for _ in range(10 * seconds):
            before = used[-1]
            clock.now += 0.1
            clock.preemptions += preempted_a_second / 10 if before == 4 else 0
            assert threads.adapt() == (used[-1] < before)
            if used[-1] != before:
                changes.append((round(clock.now), used[-1]))
        return changes

    assert steps(10, 60) == []
    assert steps(20, 300) == [(10, 3), (16, 4), (16, 3), (26, 4), (27, 3)]
    assert steps(60, 60) == [(47, 4)]
    assert not model_module.Threads("cuda").is_on
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert not model_module.Threads("cpu").is_on
