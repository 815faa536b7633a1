"""
The model, its losses, optimizers and generation, and the Hugging Face layout of a directory.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384, vocab_size=50304))
    logits, _ = model(idx)            # token ids (B, T) -> (B, T, vocab_size)
    _, loss = model(idx, targets)     # targets (B, T); -1 is ignored

In order: the config, the architecture, losses, stages, generation, optimizers and schedule, fast
paths, the machine, arithmetic (FLOPs, memory), the Hugging Face layout. The architecture is written
the plain way. FAST names the parts of it that also exist in a faster form: after you edit the plain
code, `pytest -k fast` tells which of them no longer agree. Importing this file has no side effect.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import time
import typing
import warnings
import zlib

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import configurator
from configurator import UserError

# Delete a name after you changed its plain code, and only the plain code runs. An edit of attend,
# GPT.visible or GPT.logits needs no such thing: it is noticed (see "fast paths").
#   attention   attend: kernels in place of softmax(q k^T) v
#   loss        GPT.logits: the logits and their gradient in one pass, a chunk of rows at a time
#   cache       anything: generation reads each token once
#   packing     nn.Linear: laid out for generation on a CPU
FAST = {"attention", "loss", "cache", "packing"}


# -----------------------------------------------------------------------------
# config

# keys whose 0 follows another value
FOLLOWS = ("vocab_size", "n_kv_head", "head_dim", "ffn_dim", "max_positions")


@dataclasses.dataclass
class GPTConfig:
    """The keys that shape a model; the defaults are the toy run's.

    The comments are the schema: `'a' | 'b'` and bounds such as (>= 1) are checked here and on the
    command line. Raises UserError for a value that they exclude and for keys that contradict each
    other.
    """

    # fmt: off
    block_size: int = 256         # tokens in a training window (>= 1, <= 2**31)
    vocab_size: int = 0           # rows of the embedding; 0: the data's (>= 0, <= 2**31)
    n_layer: int = 4              # blocks (>= 1, <= 2**14)
    n_head: int = 4               # query heads (>= 1, <= 2**16)
    n_embd: int = 128             # width of the residual stream (>= 1, <= 2**20)
    n_kv_head: int = 0            # key and value heads (GQA); 0: n_head (>= 0)
    head_dim: int = 0             # width of a head; 0: n_embd / n_head (>= 0, <= 2**20)
    ffn_dim: int = 0              # of the MLP; 0: 4 or 8/3 (swiglu) n_embd (>= 0, <= 2**22)
    max_positions: int = 0        # the longest context; 0: block_size (>= 0, <= 2**31)
    dropout: float = 0.0          # (>= 0, < 1)
    bias: bool = False            # in linear layers and LayerNorm
    norm: str = "rmsnorm"         # 'rmsnorm' | 'layernorm'
    norm_eps: float = 1e-5        # (> 0)
    mlp: str = "swiglu"           # 'swiglu' | 'gelu' (tanh form, as GPT-2)
    pos: str = "rope"             # 'rope' | 'learned'
    rope_theta: float = 300.0     # (> 0); 300: the slowest pair turns within the toy run's window
    nope_every: int = 0           # no RoPE in every n-th layer (4: 3, 7, 11, ...); 0: never (>= 0)
    qk_norm: bool = True          # RMSNorm on queries and keys: a tenth off the toy run's loss
    tie_embeddings: bool = True   # one matrix for embedding and head
    embed_scale: bool = False     # embeddings x sqrt(n_embd)
    unit_embed: bool = True       # embeddings begin at std 1: a tiny model learns names only then
    init: str = "normal"          # 'normal' | 'trunc_normal' (cut at 3 std)
    init_std: float = 0.02        # (>= 0)
    scale_residual: bool = True   # projections into the stream begin smaller by sqrt(2 n_layer)
    # fmt: on

    def __post_init__(self):
        for name, key in _schema(type(self)).items():
            setattr(self, name, key.check(getattr(self, name)))
        if not self.vocab_size:
            raise UserError("vocab_size=0: expected at least 1; only train.py can take the data's")
        if not self.n_kv_head:
            self.n_kv_head = self.n_head
        if self.n_head % self.n_kv_head:
            both = f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}"
            raise UserError(f"{both}; as many query heads share each key and value head")
        if not self.head_dim and self.n_embd % self.n_head:
            both = f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}"
            raise UserError(f"{both}; change one of them, or set head_dim")
        if not self.head_dim:
            self.head_dim = self.n_embd // self.n_head
        if self.pos == "rope" and self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim}: expected an even number, RoPE turns pairs")
        if not self.ffn_dim and self.mlp == "swiglu":
            self.ffn_dim = math.ceil(8 * self.n_embd / (3 * 64)) * 64
        if not self.ffn_dim:
            self.ffn_dim = 4 * self.n_embd
        if not self.max_positions:
            self.max_positions = self.block_size
        if self.block_size > self.max_positions:
            both = f"block_size={self.block_size} is beyond max_positions={self.max_positions}"
            raise UserError(f"{both}; lower one or raise the other")


@functools.cache
def _schema(config_class):
    """{name: configurator's Key} of a config's fields, from the comments in its source."""
    keys = {}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            try:
                path = inspect.getsourcefile(base)
                keys |= configurator.read_keys(path, base.__name__)
            except (OSError, TypeError, UserError):  # a class without a source file: unchecked
                continue
    return keys


# -----------------------------------------------------------------------------
# the architecture


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang and Sennrich 2019), in the dtype of the matrix products."""

    def forward(self, x):
        dtype = _compute_dtype(x)
        if x.dtype != self.weight.dtype:  # under autocast queries and keys are bf16, the gain not
            x = x.float()
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps).to(dtype)


def make_norm(config):
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)


def rope_tables(config):
    """cos and sin, each (max_positions, head_dim), for pairs (i, i + head_dim/2) as in Llama.

    RoFormer (Su et al. 2021), eq. 34. The sign of the rotation is folded into the first half of
    sin, so that `rotate` takes three kernels instead of seven.
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-torch.arange(half).float() / half)
    angles = torch.outer(torch.arange(config.max_positions).float(), frequencies)
    cos = torch.cat([angles.cos(), angles.cos()], dim=1)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=1)
    return cos, sin


def rotate(x, cos, sin):
    """RoPE of x (B, T, heads, head_dim); cos and sin ((B,) T, 1, head_dim)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def causal(query, key):
    """GPT.visible as it comes. Integer tensors of any shapes that broadcast."""
    return key <= query


def attend(q, k, v, mask=None, dropout=0.0):
    """softmax(q k^T / sqrt(head_dim)) v -> (B, n_head, T, head_dim).

    q (B, n_head, T, head_dim), k and v (B, n_kv_head, S, head_dim): the queries are the last T of S
    tokens. `mask` is None (causal), a boolean that broadcasts to (B, 1, T, S), or what `documents`
    made for a kernel.
    """
    T, S = q.shape[2], k.shape[2]
    if mask is None:
        positions = torch.arange(S, device=q.device)
        mask = causal(positions[S - T :, None], positions)  # (T, S)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, n_head, S, head_dim)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, n_head, T, S)
    scores = scores.masked_fill(~mask, -math.inf)
    probs = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return F.dropout(probs, dropout) @ v


class Shared(typing.NamedTuple):
    """What every block gets beside the residual stream."""

    idx: torch.Tensor  # (B, T): token ids
    rope: typing.Any = None  # cos and sin, each ((B,) T, 1, head_dim)
    mask: typing.Any = None  # see attend
    cache: typing.Any = None  # a KVCache


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023); q, k, v are one matrix."""

    def __init__(self, config, layer):
        super().__init__()
        n_head, n_kv_head, head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.heads = (n_head, n_kv_head, n_kv_head)
        self.head_dim, self.dropout = head_dim, config.dropout
        self.qkv = nn.Linear(config.n_embd, sum(self.heads) * head_dim, bias=config.bias)
        self.qkv.weight.parts = [n * head_dim for n in self.heads]  # three matrices for Muon
        self.proj = nn.Linear(n_head * head_dim, config.n_embd, bias=config.bias)
        skips_rope = config.nope_every > 0 and (layer + 1) % config.nope_every == 0
        self.has_rope = config.pos == "rope" and not skips_rope
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.norm_eps)
            self.k_norm = RMSNorm(head_dim, config.norm_eps)

    def forward(self, x, shared):
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim)
        q, k, v = qkv.split(self.heads, dim=2)  # (B, T, heads, head_dim)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.has_rope:
            q, k = rotate(q, *shared.rope), rotate(k, *shared.rope)
        # (B, heads, T, head_dim)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.to(q.dtype).transpose(1, 2)
        if shared.cache is not None:
            k, v = shared.cache.extend(k, v)  # (B, n_kv_head, S, head_dim)
        attention = fast_attention if "attention" in FAST else attend
        y = attention(q, k, v, shared.mask, self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020) with gate and up in one matrix, or GPT-2's two layers with GELU."""

    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        widths = [config.ffn_dim] * 2 if self.kind == "swiglu" else [config.ffn_dim]
        self.up = nn.Linear(config.n_embd, sum(widths), bias=config.bias)
        self.up.weight.parts = widths  # gate and up are two matrices for Muon
        self.down = nn.Linear(config.ffn_dim, config.n_embd, bias=config.bias)

    def forward(self, x):
        if self.kind == "swiglu":
            gate, up = self.up(x).chunk(2, dim=-1)  # (B, T, ffn_dim) each
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm, self.attn = make_norm(config), Attention(config, layer)
        self.mlp_norm, self.mlp = make_norm(config), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, shared):
        x = x + self.drop(self.attn(self.attn_norm(x), shared))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """A decoder-only transformer.

    `model.grad_checkpoint = True` computes each block's activations a second time in the backward
    pass: less memory, a third more time.
    """

    config_class = GPTConfig  # what from_pretrained makes of a config.json

    def __init__(self, config):
        super().__init__()
        self.config, self.grad_checkpoint = config, False
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_embed = None
        if config.pos == "learned":
            self.pos_embed = nn.Embedding(config.max_positions, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        if config.pos == "rope":
            cos, sin = rope_tables(config)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.init_weights()
        # edits that the fast paths take into account
        self.is_causal, self.has_plain_logits = is_causal(self.visible), has_plain_logits(self)

    @torch.no_grad()
    def init_weights(self):
        """Draws the weights of linear layers and embeddings; other parameters keep their values."""
        config, drawn = self.config, set()
        for name, module in self.named_modules():
            if not isinstance(module, (nn.Linear, nn.Embedding)) or module.weight in drawn:
                continue  # a tied head is the embedding
            std = config.init_std
            if config.unit_embed and name == "embed":
                std = 1.0
            if config.scale_residual and name.endswith(("proj", "down")):
                std /= math.sqrt(2 * config.n_layer)  # GPT-2, section 2.3
            if config.init == "normal":
                nn.init.normal_(module.weight, std=std)
            else:
                nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
            drawn.add(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        if config.unit_embed:
            # the gain keeps the logits of a tied head at the size that they have without it
            nn.init.constant_(self.norm.weight, config.n_embd**-0.5)

    def visible(self, query, key):
        """Whether the token at position `query` may attend to the token at position `key`.

        Integer tensors of any shapes that broadcast. Documents and padding are excluded elsewhere.
        """
        return causal(query, key)

    def hidden(self, idx, docs=None, cache=None):
        """Token ids (B, T) -> (B, T, n_embd), the input of the head."""
        positions, mask = slice(0, idx.shape[1]), None
        if docs is not None:
            positions, mask = docs
        elif not self.is_causal:
            start = 0 if cache is None else cache.start
            where = torch.arange(start + idx.shape[1], device=idx.device)
            mask = self.visible(where[start:, None], where)  # (T, S)
        if cache is not None:
            positions, mask = cache.positions(idx.shape[1], mask)
        x = self.embed(idx)  # (B, T, n_embd)
        if self.config.embed_scale:
            x = x * math.sqrt(self.config.n_embd)
        rope = None
        if self.pos_embed is not None:
            x = x + self.pos_embed.weight[positions]
        else:
            cos, sin = self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)
            rope = cos.to(_compute_dtype(x)), sin.to(_compute_dtype(x))  # ((B,) T, 1, head_dim)
        if _compute_dtype(x) == torch.bfloat16:
            # the residual stream, too: a tenth less memory. Not in float16, whose range is small
            x = x.bfloat16()
        x, shared = self.drop(x), Shared(idx, rope, mask, cache)
        for block in self.blocks:
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, shared, use_reentrant=False)
            else:
                x = block(x, shared)
        if cache is not None:
            cache.advance(idx.shape[1])
        return self.norm(x)

    def logits(self, x):
        """(..., n_embd) -> (..., vocab_size) in float32."""
        return self.head(x).float()

    def forward(self, idx, targets=None, docs=None, per_token=False, temperature=1.0):
        """Token ids (B, T) -> (logits of every position, None); with targets (B, T), (None, loss).

        The loss is the mean of -log p over targets that are not -1; 0 where there is none. `docs`
        (see `documents`) keeps the documents of a window apart. With `per_token` log p of each
        target takes the place of the loss: (B, T), 0 where it is -1, as sampled at `temperature`.
        """
        if idx.shape[1] > self.config.max_positions:
            limit = f"max_positions={self.config.max_positions}"
            raise UserError(f"{idx.shape[1]} tokens are beyond {limit}; shorten the input")
        x = self.hidden(idx, docs)
        if targets is None:
            return self.logits(x), None
        x, targets = x.flatten(0, 1), targets.flatten()
        if per_token:
            return None, token_log_probs(self, x, targets, temperature).view(idx.shape)
        if "loss" in FAST and self.has_plain_logits:
            return None, linear_cross_entropy(x, self.head.weight, targets)
        return None, -token_log_probs(self, x, targets).sum() / (targets >= 0).sum().clamp(min=1)

    def set_runtime(self, block_size, dropout):
        """Sets what a loaded model may be trained with, whatever it was trained with before."""
        self.config.block_size = min(block_size, self.config.max_positions)
        self.config.dropout = dropout
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            elif isinstance(module, Attention):
                module.dropout = dropout

    @torch.no_grad()
    def grow(self, vocab_size):
        """Adds rows to embedding and head for new tokens; each begins as the mean of the others.

        Any other nn.Embedding with a row for each token, of an edited model, grows, too.
        """
        tables = [m for m in self.modules() if isinstance(m, nn.Embedding)]
        tables = [m for m in tables if m is not self.pos_embed]
        tables = [m for m in tables if m.num_embeddings == self.config.vocab_size]
        for module in tables if self.config.tie_embeddings else [*tables, self.head]:
            old = module.weight  # (V, n_embd)
            rows = old.mean(dim=0, keepdim=True).expand(vocab_size - old.shape[0], -1)
            module.weight = nn.Parameter(torch.cat([old, rows]))
        for module in tables:
            module.num_embeddings = vocab_size
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.head.out_features = vocab_size
        self.config.vocab_size = vocab_size

    def n_params(self):
        """Unique parameters: a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def stream(self, idx, max_new_tokens, *args, **sampling):
        """Yields the next token of each row, a tensor (B,). For the arguments see stream_tokens."""
        return stream_tokens(self, idx, max_new_tokens, *args, **sampling)

    def generate(self, idx, max_new_tokens, *args, **sampling):
        """idx (B, T) continued by at most max_new_tokens. For the arguments see stream_tokens."""
        tokens = list(stream_tokens(self, idx, max_new_tokens, *args, **sampling))
        if not tokens:
            return idx
        return torch.cat([idx, torch.stack(tokens, dim=1)], dim=1)

    @classmethod
    def from_pretrained(cls, directory):
        """The model in a Hugging Face directory: Llama, SmolLM3, Qwen3, GPT-2 or nanosmol."""
        return load_hf(cls, directory)

    def save_pretrained(self, directory, hf_layout=True, generation=None, state=None):
        """Writes config.json, model.safetensors (float32) and generation_config.json.

        `generation` goes into generation_config.json (eos_token_id and the like). `state` is a
        state dict to write instead of the module's: a copy made earlier, while training goes on.
        `hf_layout=False` declares that the maths is no longer that of a known architecture.
        """
        state = self.state_dict() if state is None else state
        save_hf(self.config, state, directory, hf_layout, generation or {})


def _compute_dtype(x):
    """The dtype in which matrices are multiplied here and now."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Documents(typing.NamedTuple):
    positions: torch.Tensor  # (B, T): restart at 0 with each document
    mask: typing.Any  # boolean (B, 1, T, T), or what a kernel takes


def documents(idx, eos_id, attention="sdpa", visible=causal, ends=None):
    """Where the documents packed in windows idx (B, T) lie; each ends with its eos_id.

    Attention becomes block-diagonal and positions restart, so that a document's logits are those
    that it has alone. `attention` is what pick_attention chose, `visible` the model's, `ends` what
    document_ends gives, if it is known.
    """
    B, T = idx.shape
    where = torch.arange(T, device=idx.device).expand(B, T)
    first = _first_tokens(idx, eos_id)
    positions = where - (where * first).cummax(dim=1).values  # (B, T)
    doc = first.cumsum(dim=1)  # (B, T)
    if attention == "flex":
        return Documents(positions, _block_mask(doc, visible))
    if attention != "sdpa":
        ends = document_ends(idx, eos_id) if ends is None else ends
        return Documents(positions, _segments(ends, attention))
    same = doc[:, :, None] == doc[:, None, :]  # (B, T, T)
    mask = same & visible(positions[:, :, None], positions[:, None, :])
    return Documents(positions, mask[:, None])


def document_ends(idx, eos_id):
    """(documents + 1,) int32: 0, and where each document of the flattened windows idx (B, T) ends.

    To be called on a CPU: the size of the result depends on the content of idx, and a GPU would be
    waited for.
    """
    # the first token of a window begins a document, so that none crosses from row to row
    starts = _first_tokens(idx, eos_id).flatten().nonzero()[:, 0].int()
    return F.pad(starts, (0, 1), value=idx.numel())


def _first_tokens(idx, eos_id):
    """(B, T): True at the first token of each document of windows idx (B, T). An end-of-text token
    still belongs to the text that it ends."""
    first = torch.ones_like(idx, dtype=torch.bool)
    first[:, 1:] = idx[:, :-1] == eos_id
    return first


# -----------------------------------------------------------------------------
# losses

# logits that one product of matrices makes
LOGITS_IN_A_CHUNK = {"cuda": 2**29, "cpu": 2**26}


def _chunks(x, other, vocab_size):
    """(x, other) of the rows whose logits are made at a time: of equal size, so that none is a
    few rows with a slow product of matrices of its own."""
    most = max(128, LOGITS_IN_A_CHUNK["cuda" if x.is_cuda else "cpu"] // vocab_size)
    count = -(-len(x) // most)
    return zip(x.chunk(count), other.chunk(count), strict=True)


def rows_with_targets(targets):
    """The indices of targets that are not -1, for a CPU: prompts and padding then cost no products
    with the vocabulary. A GPU would have to be waited for: there, all rows."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return slice(None)
    rows = (targets >= 0).nonzero()[:, 0]
    return rows if 0 < len(rows) < len(targets) else slice(None)


def token_log_probs(model, x, targets, temperature=1.0):
    """log softmax(model.logits(x) / temperature)[target] of each row, 0 where the target is -1.

    x (N, n_embd), targets (N,) -> (N,). The logits exist one chunk of rows at a time and are made
    again in the backward pass, where each row's share of the loss is known.
    """

    def chunk(x, targets):
        logits = model.logits(x) / temperature  # (rows, V)
        return -F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")

    rows = rows_with_targets(targets)
    chunks = _chunks(x[rows], targets[rows], model.config.vocab_size)
    found = torch.cat([checkpoint(chunk, *some, use_reentrant=False) for some in chunks])
    log_probs = found.new_zeros(len(x))
    log_probs[rows] = found
    return log_probs


def preference_loss(kind, chosen, rejected, beta=0.1, label_smoothing=0.0):
    """The loss of each preference pair, (B,).

    `chosen` and `rejected` (B,) are log-ratios: log p of an answer under the policy minus log p
    under the reference, summed over its tokens. 'sigmoid': DPO (Rafailov et al. 2023, eq. 7),
    conservative with label_smoothing. 'apo_zero' and 'apo_down': Anchored Preference Optimization
    (D'Oosterlinck et al. 2024), which raises the chosen and lowers the rejected, or lowers both,
    the rejected more.
    """
    if kind == "sigmoid":
        margin = beta * (chosen - rejected)
        loss = -(1 - label_smoothing) * F.logsigmoid(margin)
        return loss - label_smoothing * F.logsigmoid(-margin)
    if kind == "apo_zero":
        return (1 - torch.sigmoid(beta * chosen)) + torch.sigmoid(beta * rejected)
    if kind == "apo_down":
        return torch.sigmoid(beta * chosen) + (1 - torch.sigmoid(beta * (chosen - rejected)))
    raise UserError(f"pref_loss={kind!r}: preference_loss has no such loss; train.py lists them")


def policy_loss(log_probs, old, advantages, clip_eps=0.2, reference=None, kl_coef=0.0):
    """The loss of each sampled token, (B, T).

    The clipped policy gradient (PPO, Schulman et al. 2017, eq. 7; GRPO, Shao et al. 2024, eq. 3),
    and with kl_coef the k3 estimate of the divergence from a reference. All (B, T): log_probs, with
    a gradient; `old`, under which the tokens were sampled; `advantages` of each token's completion.
    """
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if kl_coef:
        loss = loss + kl_coef * k3(log_probs, reference)
    return loss


def k3(log_probs, reference):
    """An unbiased, never negative estimate of KL(policy || reference) (Schulman 2020), from tokens
    sampled under the policy."""
    return (reference - log_probs).exp() - (reference - log_probs) - 1


def group_advantages(rewards, scale=False):
    """Rewards (groups, group_size) -> advantages: minus the group's mean; `scale`: over its std.

    A group with equal rewards gives exactly 0. That is decided on the rewards: the mean of equal
    numbers is rounded and leaves advantages of 1e-8, which Muon would turn into a whole step.
    """
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    return advantages.masked_fill(equal, 0.0)


# -----------------------------------------------------------------------------
# stages: the loss of a micro-batch of pairs or completions (a Batch of prepare.py), and its metrics
# `policy` is the model that is trained, `reference` the frozen model that training started from.


def answer_log_probs(model, batch, temperature=1.0):
    """log p of each target of a batch, (B, T), 0 where there is none."""
    return model(batch.x, batch.y, per_token=True, temperature=temperature)[1]


def pair_loss(policy, reference, batch, kind="sigmoid", beta=0.1, label_smoothing=0.0):
    """(mean loss, metrics) of preference pairs.

    The first half of the batch holds the chosen answers, the second half the rejected ones.
    `rewards/...` are the implicit rewards of Rafailov et al. 2023, section 4: beta x the log-ratio.
    """
    with torch.no_grad():
        before = answer_log_probs(reference, batch).sum(dim=1)  # (2 pairs,)
    log_ratios = answer_log_probs(policy, batch).sum(dim=1) - before
    chosen, rejected = log_ratios.chunk(2)
    loss = preference_loss(kind, chosen, rejected, beta, label_smoothing).mean()
    chosen, rejected = chosen.detach(), rejected.detach()
    return loss, {
        "rewards/chosen": beta * chosen.mean(),
        "rewards/rejected": beta * rejected.mean(),
        "rewards/margins": beta * (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
    }


def completion_loss(policy, reference, batch, temperature=1.0, clip_eps=0.2, kl_coef=0.0):
    """(mean loss over batch.units tokens, metrics) of sampled completions with `batch.advantages`
    (B,).

    The log-probabilities under which they were sampled, and with kl_coef those under the reference,
    are computed at the first call and stay on the batch, for further updates on the same rollouts.
    """
    log_probs = answer_log_probs(policy, batch, temperature)
    if not hasattr(batch, "old_log_probs"):
        batch.old_log_probs, batch.reference_log_probs = log_probs.detach(), None
        if kl_coef:
            with torch.no_grad():
                batch.reference_log_probs = answer_log_probs(reference, batch, temperature)
    advantages = batch.advantages[:, None].expand_as(log_probs)  # (B, T)
    old, before = batch.old_log_probs, batch.reference_log_probs
    losses = policy_loss(log_probs, old, advantages, clip_eps, before, kl_coef)
    loss = (losses * (batch.y >= 0)).sum() / max(batch.units, 1)
    return loss, {"policy/entropy": _token_mean(-old, batch)[0]}


def distillation_loss(policy, teacher, batch):
    """(mean loss over the tokens, metrics) of sampled completions: KL(policy || teacher), summed
    over the vocabulary (Agarwal et al. 2023, reverse KL on the student's own samples).

    Its gradient is what a policy gradient with the advantages log p_teacher - log p_policy of the
    sampled tokens has on average, without the variance. As in token_log_probs, the logits exist one
    chunk of rows at a time.
    """

    def divergence(x, teacher_x):
        log_p = policy.logits(x).log_softmax(dim=-1)  # (rows, V)
        log_q = teacher.logits(teacher_x).log_softmax(dim=-1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)

    # (N, n_embd) of each model, of the N positions before the completions' tokens
    x, teacher_x = (model.hidden(batch.x)[batch.y >= 0] for model in (policy, teacher))
    chunks = _chunks(x, teacher_x, 2 * policy.config.vocab_size)
    kl = torch.cat([checkpoint(divergence, *rows, use_reentrant=False) for rows in chunks])
    return kl.mean(), {}


def completion_measures(policy, reference, batch, temperature=1.0):
    """{name: (mean over the completions' tokens, how many)}: entropy, and KL from the reference."""
    log_probs = answer_log_probs(policy, batch, temperature)
    divergence = k3(log_probs, answer_log_probs(reference, batch, temperature))
    return {
        "policy/entropy": _token_mean(-log_probs, batch),
        "policy/kl": _token_mean(divergence, batch),
    }


def _token_mean(values, batch):
    """(mean, count) of values (B, T) over a batch's targets."""
    mask = (batch.y >= 0).float()
    count = mask.sum().clamp(min=1)
    return (values * mask).sum() / count, count


def sample_completions(model, prompts, seeds, max_new_tokens, temperature, stop):
    """[(ids, ended)]: a completion of each prompt, both lists of ids; if it ended, its last token
    is one of `stop`. Each draws from its own seed and does not depend on the other prompts."""
    device = model.embed.weight.device
    longest = max(len(ids) for ids in prompts)
    padded = [[stop[0]] * (longest - len(ids)) + ids for ids in prompts]
    pad = torch.tensor([longest - len(ids) for ids in prompts], device=device)
    idx = torch.tensor(padded, device=device)
    rows = model.generate(idx, max_new_tokens, temperature, seed=seeds, stop=stop, pad=pad)
    completions = []
    for ids in rows[:, longest:].tolist():
        end = next((i for i, token in enumerate(ids) if token in stop), None)
        if end is None:
            completions.append((ids, False))
        else:
            completions.append((ids[: end + 1], True))
    return completions


def yes_probability(model, ids, yes, no):
    """A model's probability of the token `yes` among `yes` and `no`, after the prompt `ids`."""
    idx = torch.tensor([ids], device=model.embed.weight.device)
    logits = model(idx)[0][0, -1]  # (V,)
    return logits[[yes, no]].softmax(0)[0].item()


# -----------------------------------------------------------------------------
# generation


class KVCache:
    """Keys and values of every token so far, allocated once.

    `pad` (B,) counts the padding tokens at the left of each row, where prompts of different lengths
    share a batch; None where there are none.
    """

    def __init__(self, config, batch, length, device, dtype, pad=None):
        shape = (config.n_layer, batch, config.n_kv_head, length, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.start, self.pad, self.layer = 0, pad, 0

    def extend(self, k, v):
        """Stores a layer's new keys and values (B, n_kv_head, T, head_dim); returns all so far."""
        end = self.start + k.shape[2]
        self.k[self.layer, :, :, self.start : end] = k
        self.v[self.layer, :, :, self.start : end] = v
        k, v = self.k[self.layer, :, :, :end], self.v[self.layer, :, :, :end]
        self.layer += 1
        return k, v

    def advance(self, tokens):
        self.start, self.layer = self.start + tokens, 0

    def positions(self, tokens, mask=None):
        """Positions (T,) or (B, T) of the next tokens, and `mask` (T, S), None for a causal one,
        without what is padding."""
        positions = torch.arange(self.start, self.start + tokens, device=self.k.device)
        if self.pad is None:
            return positions, mask
        keys = torch.arange(self.start + tokens, device=self.k.device)
        if mask is None:
            mask = causal(positions[:, None], keys)
        mask = mask & (keys >= self.pad[:, None, None])  # (B, T, S)
        mask = mask | (keys == positions[:, None])  # padding sees itself: no key at all gives NaN
        return (positions - self.pad[:, None]).clamp(min=0), mask[:, None]


@torch.inference_mode()
def stream_tokens(
    model, idx, max_new_tokens, temperature=1.0, seed=None, stop=(), pad=None,
    repetition_penalty=1.0, **sampling,
):  # fmt: skip
    """Yields the next token of each row, a tensor (B,), at most max_new_tokens times.

    idx (B, T): prompts; pad (B,): how many tokens at the left of each row are padding. Row r draws
    from its own stream, seeded with seed + r, or seed[r] of a list, so that a text does not depend
    on its neighbours (in bf16 rounding still lets it). A row that has produced a token of `stop`
    repeats it; when all have, generation ends. temperature 0 is greedy; `sampling` goes to
    sample_token, repetition_penalty to penalize. Beyond max_positions the context slides: its older
    half is dropped and the rest read again.
    """
    (B, T), limit, device = idx.shape, model.config.max_positions, idx.device
    draws = [torch.rand(max_new_tokens, generator=_generator(seed, row)) for row in range(B)]
    draws = torch.stack(draws, dim=1).to(device)  # (max_new_tokens, B)
    stop = torch.tensor(list(stop), dtype=idx.dtype, device=device)
    idx = torch.cat([idx, idx.new_zeros(B, max_new_tokens)], dim=1)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    if pad is not None:
        pad = pad.to(device) if pad.any() else None  # without padding no mask is needed
    seen = None
    if repetition_penalty != 1:
        seen = tokens_of_rows(idx[:, :T], model.config.vocab_size, pad)
    cache, begin, training = None, 0, model.training
    model.eval()
    try:
        for step, end in enumerate(range(T, T + max_new_tokens)):
            new = idx[:, end - 1 : end]
            if end - begin > limit:
                cache, begin = None, end - (limit + 1) // 2
            if cache is None or "cache" not in FAST:  # everything is read, into an empty cache
                new = idx[:, begin:end]
                left = None if pad is None else (pad - begin).clamp(min=0)
                length = min(limit, end - begin + max_new_tokens - step)
                dtype = _compute_dtype(model.embed.weight)
                cache = KVCache(model.config, B, length, device, dtype, left)
            logits = model.logits(model.hidden(new, cache=cache)[:, -1])  # (B, V)
            if seen is not None:
                logits = penalize(logits, seen, repetition_penalty)
            token = sample_token(logits, draws[step], temperature, **sampling)
            if len(stop):
                token = torch.where(done, idx[:, end - 1], token)
                done = done | torch.isin(token, stop)
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            yield token
            if len(stop) and done.all():
                return
            idx[:, end] = token
    finally:
        model.train(training)


def tokens_of_rows(idx, vocab_size, pad=None):
    """A boolean (B, V): which tokens each row of idx (B, T) holds, but for pad (B,) at its left."""
    seen = torch.zeros(len(idx), vocab_size, dtype=torch.bool, device=idx.device)
    for row, ids in enumerate(idx):
        seen[row, ids if pad is None else ids[pad[row] :]] = True
    return seen


def penalize(logits, seen, penalty):
    """Logits (B, V), smaller where `seen` (B, V): divided, or multiplied where negative (CTRL,
    Keskar et al. 2019, section 4.1)."""
    smaller = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, smaller, logits)


def _generator(seed, row):
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    return torch.Generator().manual_seed(seed + row if isinstance(seed, int) else seed[row])


def sample_token(logits, draw, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One token a row (B,) from logits (B, V), given a uniform number a row, draw (B,).

    top_k keeps the k likeliest tokens (0: all), top_p the fewest that hold this much probability
    (nucleus, Holtzman et al. 2020), min_p those at least this many times as likely as the likeliest
    (Nguyen et al. 2024). The draw is inverted through the cumulative sum in the order of the ids:
    the same draw gives the same token, and a rounding error moves a boundary by no more than
    itself; ordered by likelihood, equal tokens would change places.
    """
    if temperature < 1e-5:  # 0, or what float32 can't divide by
        return logits.argmax(dim=-1)
    ids, logits = None, logits / temperature
    if top_k and top_k < logits.shape[-1]:  # what follows is done on k numbers instead of V
        ids = logits.topk(top_k, sorted=False).indices.sort().values  # (B, k)
        logits = logits.gather(-1, ids)
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        probs = keep_first(probs, probs.argsort(dim=-1, descending=True), top_p)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    if logits.device.type == "mps":  # it has no float64
        probs, draw = probs.cpu(), draw.cpu()
    total = probs.double().cumsum(dim=-1)
    target = draw[:, None].double() * total[:, -1:]
    token = torch.searchsorted(total, target, right=True).clamp(max=logits.shape[-1] - 1)  # (B, 1)
    token = token.to(logits.device)
    if ids is not None:
        token = ids.gather(-1, token)
    return token[:, 0]


def keep_first(probs, order, mass):
    """probs (B, V) with 0 beyond the first tokens in `order` (B, V) that hold `mass` together."""
    ordered = probs.gather(-1, order)
    beyond = ordered.cumsum(dim=-1) - ordered >= max(mass, 1e-9)  # never the first token
    return probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)


# -----------------------------------------------------------------------------
# optimizers and schedule

# Polar Express (Amsel et al. 2025), table for the lower bound 1e-3: the best odd quintic for the
# interval in which the one before has left the singular values. The safety factor of 1.01 keeps
# rounding from diverging.
_POLAR_EXPRESS = [
    (a / factor, b / factor**3, c / factor**5)
    for factor, a, b, c in (
        (1.01, 8.28721201814563, -23.595886519098837, 17.300387312530933),
        (1.01, 4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (1.01, 3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (1.01, 3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (1.0, 2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
]


def orthogonalize(G, dtype=torch.bfloat16):
    """About the nearest (semi-)orthogonal matrices to G (N, m, n): U V^T of each SVD.

    Each iteration is X <- (a I + b A + c A A) X with A = X X^T, or from the other side where X is
    tall: it moves singular values towards 1 and leaves singular vectors alone. Five iterations
    leave every value above 0.001 of the norm within 0.13 of 1.
    """
    tall = G.shape[1] > G.shape[2]
    norm = torch.linalg.vector_norm(G, dim=(1, 2), keepdim=True, dtype=torch.float32)
    X = G.to(dtype, copy=True).mul_(1 / (norm * 1.02 + 1e-6))
    for a, b, c in _POLAR_EXPRESS:
        A = X.mT @ X if tall else X @ X.mT
        B = A * c  # a I + (b I + c A) A: sums on a diagonal; baddbmm would pass over X once more
        B.diagonal(dim1=1, dim2=2).add_(b)
        B = B @ A
        B.diagonal(dim1=1, dim2=2).add_(a)
        X = X @ B if tall else B @ X
    return X


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (Jordan et al. 2024) for the hidden matrices of a network.

    All matrices of one shape are stepped at once: stack, one batched iteration, unstack; a loop
    over 200 matrices would be slower. A parameter with `.parts` holds several matrices stacked
    along its rows (q, k, v; gate, up), each orthogonalised by itself. The rate is multiplied by
    sqrt(max(1, rows / columns)), so that updates change outputs alike whatever the shape. Across
    processes each orthogonalises a share and the results are gathered.
    """

    def __init__(
        self, params, lr=0.02, momentum=0.95, weight_decay=0.0, cautious=False, dtype=torch.bfloat16
    ):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, cautious=cautious)
        super().__init__(params, defaults)
        self.dtype, self._stacks = dtype, {}

    def _group_stacks(self, group):
        """{shape: [(parameter, first row)]}"""
        if id(group) not in self._stacks:
            shapes = {}
            for p in group["params"]:
                row = 0
                for rows in getattr(p, "parts", [p.shape[0]]):
                    shapes.setdefault((rows, p.shape[1]), []).append((p, row))
                    row += rows
            self._stacks[id(group)] = shapes
        return self._stacks[id(group)]

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape, members in self._group_stacks(group).items():
                members = [(p, row) for p, row in members if p.grad is not None]
                if members:
                    self._step_stack(group, shape, members)

    def _step_stack(self, group, shape, members):
        rows, columns = shape
        grad = torch.stack([p.grad[row : row + rows] for p, row in members])  # (N, rows, columns)
        state = self.state[members[0][0]].setdefault(f"{rows}x{columns}", {})
        if not state:
            state["momentum"] = torch.zeros_like(grad)
        momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
        update = self._orthogonalize(grad.lerp_(momentum, group["momentum"]))  # Nesterov
        params = [p.data[row : row + rows] for p, row in members]
        updates = list(update.to(params[0].dtype).unbind())
        decay = group["lr"] * group["weight_decay"]
        if decay and group["cautious"]:
            for p, u in zip(params, updates, strict=True):
                p.mul_(1 - decay * (p * u > 0))  # only where the update already pulls towards 0
        elif decay:
            torch._foreach_mul_(params, 1 - decay)
        lr = group["lr"] * math.sqrt(max(1, rows / columns))
        torch._foreach_add_(params, updates, alpha=-lr)

    def _orthogonalize(self, stack):
        if not _distributed() or dist.get_world_size() == 1:
            return orthogonalize(stack, self.dtype)
        world_size, rank = dist.get_world_size(), dist.get_rank()
        per_rank = math.ceil(len(stack) / world_size)
        local = stack[rank * per_rank : (rank + 1) * per_rank]
        shape = stack.shape[1:]
        out = torch.zeros(per_rank, *shape, dtype=self.dtype, device=stack.device)
        if len(local):
            out[: len(local)] = orthogonalize(local, self.dtype)
        gathered = torch.empty(world_size * per_rank, *shape, dtype=self.dtype, device=stack.device)
        dist.all_gather_into_tensor(gathered, out)
        return gathered[: len(stack)]


def make_optimizers(
    model, optimizer="muon", learning_rate=3e-4, muon_lr=0.02, muon_momentum=0.95, weight_decay=0.0,
    betas=(0.9, 0.95), cautious=False, decay_embeddings=False, muon_dtype=torch.bfloat16,
):  # fmt: skip
    """[AdamW] or [AdamW, Muon]: Muon takes the matrices inside the blocks, AdamW everything else.

    Gains and biases are never decayed, embeddings and head only with `decay_embeddings` (as nanoGPT
    does). Each group has a `base_lr`, which a schedule multiplies.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    hidden, outer, vectors, others = [], [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2:
            vectors.append(p)
        elif p.dim() > 2:  # none in the model as it comes
            others.append(p)
        elif name.startswith("blocks.") and id(p) not in tables:
            hidden.append(p)
        else:
            outer.append(p)
    outer_decay = weight_decay if decay_embeddings else 0.0
    groups = [dict(params=vectors, weight_decay=0.0), dict(params=outer, weight_decay=outer_decay)]
    if optimizer != "muon":
        groups.append(dict(params=hidden, weight_decay=weight_decay))
    groups.append(dict(params=others, weight_decay=weight_decay))
    groups = [group for group in groups if group["params"]]
    if optimizer in ("adamw", "muon"):
        optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
    else:
        what = "make_optimizers has no such optimizer"
        raise UserError(f"optimizer={optimizer!r}: {what}; train.py lists them")
    if optimizer == "muon" and hidden:
        muon = Muon(hidden, muon_lr, muon_momentum, weight_decay, cautious, muon_dtype)
        optimizers.append(muon)
    for opt in optimizers:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def schedule_factor(
    step, schedule, warmup_iters, decay_iters, floor=0.0, decay_frac=0.2, decay_shape="linear"
):
    """The factor of every base rate at `step` (0 is the first).

    Linear warm-up, then by `schedule` 'constant', 'cosine' (nanoGPT's) or 'wsd': stable until the
    last decay_frac of decay_iters, then down, linear or '1-sqrt' (Hägele et al. 2024). The end, at
    decay_iters and after, is `floor` = min_lr / learning_rate.
    """
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return 1.0
    if step >= decay_iters:
        return floor
    if schedule == "cosine":
        progress = (step - warmup_iters) / max(1, decay_iters - warmup_iters)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule != "wsd":
        what = "schedule_factor has no such schedule"
        raise UserError(f"schedule={schedule!r}: {what}; train.py lists them")
    begin = max(warmup_iters, decay_iters - round(decay_frac * decay_iters))
    if step < begin:
        return 1.0
    progress = (step - begin) / max(1, decay_iters - begin)
    if decay_shape == "1-sqrt":
        progress = math.sqrt(progress)
    return floor + (1 - floor) * (1 - progress)


def schedule_step(run, max_iters, max_steps, time_budget=0.0):
    """Where a run is on a schedule of max_iters steps: at its step. With a time budget (seconds)
    the schedule is stretched over the time that compilation leaves of it; if a limit of max_steps
    is nearer than the end of the time, over these steps. The run ends at max_iters or beyond."""
    if not time_budget:
        return run.step
    time = (run.train_s - run.compile_s) / max(time_budget - run.compile_s, 1e-9)
    return max_iters * max(time, run.step / max_steps)


def why_harmful(loss, grad_norm, recent, spike_z=12.0, scaled=False):
    """Why an update must not be taken: '' for a good one, else 'not finite', 'gradient is 0',
    'loss spike' or 'gradient spike'.

    A spike is more than spike_z deviations (0: never) above the median of `recent`, the (loss, log
    of the gradient norm) of earlier updates, once there are 32. 1.4826 times the median absolute
    deviation estimates a standard deviation; the floors keep a run with little noise from skipping
    ordinary steps. `scaled`: float16 gradients may overflow, and the scaler skips those updates.
    """
    if not math.isfinite(loss):
        return "not finite"
    if not math.isfinite(grad_norm):
        return "" if scaled else "not finite"
    if grad_norm == 0:
        return "gradient is 0"
    if not spike_z or len(recent) < 32:
        return ""
    losses, log_norms = zip(*recent, strict=True)
    if _above(loss, losses, spike_z, floor=0.03):
        return "loss spike"
    if _above(math.log(grad_norm), log_norms, spike_z, floor=0.2):
        return "gradient spike"
    return ""


def _above(value, earlier, spike_z, floor):
    earlier = sorted(earlier)
    median = earlier[len(earlier) // 2]
    deviation = 1.4826 * sorted(abs(e - median) for e in earlier)[len(earlier) // 2]
    return value - median > spike_z * max(deviation, floor)


# -----------------------------------------------------------------------------
# fast paths: each is another form of plain code above, and a test named test_fast_... holds the two
# equal. FAST turns them off.


def is_causal(visible):
    """Whether `visible` is `causal`, the only shape for which the kernels need no mask: tried on
    positions at all distances up to 2**31."""
    places = {2**i + d for i in range(32) for d in (-1, 0, 1)}
    places = torch.tensor(sorted(places), device="cpu")
    return torch.equal(visible(places[:, None], places), causal(places[:, None], places))


def attend_is_plain():
    """Whether fast_attention gives what attend gives, tried on a few numbers."""
    q = torch.arange(24, device="cpu").sin().view(1, 2, 3, 4) * 3
    k, v = torch.arange(40, device="cpu").cos().view(2, 1, 1, 5, 4) * 3
    return torch.allclose(fast_attention(q, k, v, None), attend(q, k, v), atol=1e-4)


class _Calls(torch.overrides.TorchFunctionMode):
    """Records the functions of torch that are called in this context."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs))
        return func(*args, **(kwargs or {}))


def has_plain_logits(model):
    """Whether model.logits is the head and nothing else, as linear_cross_entropy takes it to be:
    which functions it calls is seen without a row of input."""
    weight, recorded = model.head.weight, _Calls()
    x = weight.new_empty(0, weight.shape[1])
    try:
        with recorded:
            model.logits(x)
    except Exception:  # an edit that needs rows, or what is not there yet
        return False
    functions = [func for func, _, _ in recorded.calls]
    if functions != [F.linear, torch.Tensor.float]:
        return False
    _, used, bias = recorded.calls[0][1]
    return used is weight and bias is None


def fast_attention(q, k, v, mask, dropout=0.0):
    """`attend` with the kernels of PyTorch and FlashAttention.

    Gain: the scores (B, n_head, T, S) are never held in memory, and what lies above the diagonal or
    in other documents is not computed.
    """
    if isinstance(mask, Segments):
        heads_last = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]  # (B T, heads, head_dim)
        y = mask.kernel(*heads_last, mask.ends, q.shape[2])
        return y.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)
    gqa = q.shape[1] != k.shape[1]
    if mask is not None and not torch.is_tensor(mask):
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)
    T, S = q.shape[2], k.shape[2]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < T <= 256:
        # on windows this short the CPU's kernel takes several times as long in bfloat16
        with torch.autocast("cpu", enabled=False):
            y = fast_attention(q.float(), k.float(), v.float(), mask, dropout)
        return y.to(q.dtype)
    if mask is None and 1 < T < S:
        positions = torch.arange(S, device=q.device)
        mask = causal(positions[S - T :, None], positions)
    # A single query sees every key. In a model compiled for any length `T > 1` is symbolic, which
    # the kernels don't take
    triangle = False
    if mask is None and T > 1:
        triangle = True
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=triangle, enable_gqa=gqa
    )


class Segments(typing.NamedTuple):
    ends: torch.Tensor  # (documents + 1,) int32: 0, and where each document of the batch ends
    kernel: typing.Callable  # see _varlen


def _block_mask(doc, visible):
    """FlexAttention's form of the mask of `documents`; doc (B, T) numbers the documents of each
    window."""
    from torch.nn.attention.flex_attention import create_block_mask

    def same_document(b, h, query, key):
        return visible(query, key) & (doc[b, query] == doc[b, key])

    B, T = doc.shape
    return create_block_mask(same_document, B, None, T, T, device=doc.device)


def _segments(ends, attention):
    """What kernels for sequences of different lengths take in place of a mask."""
    import torch._dynamo

    torch._dynamo.maybe_mark_dynamic(ends, 0)  # one graph for any number of documents
    return Segments(ends, _varlen(attention))


def pick_attention(device, dtype, doc_mask, compiled, dropout=0.0, is_causal=True):
    """The name of the attention to train with, chosen once at the start.

    'sdpa' is PyTorch's choice, FlashAttention-2 on CUDA in bf16 or fp16. Documents that don't see
    each other take a kernel for sequences of different lengths: of the package flash_attn where it
    is installed, PyTorch's, or FlexAttention, which alone can do what is not causal; elsewhere
    'sdpa' with a boolean mask. 'FA3', on Hopper where the package is installed, puts
    FlashAttention-3 behind all of PyTorch's functions.
    """
    if "attention" not in FAST or not device.startswith("cuda"):
        return "sdpa"
    if doc_mask and dropout:  # on Hopper cuDNN gives NaN at some lengths, with mask and dropout
        torch.backends.cuda.enable_cudnn_sdp(False)
    if dropout or dtype not in ("bfloat16", "float16"):
        return "sdpa"
    names = []
    if is_causal and torch.cuda.get_device_capability(device) == (9, 0):
        names += ["FA3"]
    # FlashAttention begins with Ampere
    if is_causal and doc_mask and torch.cuda.get_device_capability(device) >= (8, 0):
        names += ["flash_attn", "torch.nn.attention.varlen"]
    for name in names:
        if _varlen_works(name):
            return name
    return "flex" if doc_mask and compiled else "sdpa"


def faster_attention(attention, model, device, clock=None):
    """(the faster of `attention` and FlexAttention for packed documents, the same with the times).

    `attention` is what pick_attention chose: anything but a kernel for sequences of different
    lengths stays, unmeasured. On several processes all choose the same. `clock` gives seconds.
    """
    if attention in ("sdpa", "flex"):
        return attention, attention
    if clock is None:

        def clock():
            torch.cuda.synchronize()
            return time.perf_counter()

    ms = {}
    for name in (attention, "flex"):
        seconds = math.inf
        with contextlib.suppress(Exception):  # what does not run here is not chosen
            seconds = _seconds_of_attention(name, model, device, clock)
        ms[name] = 1000 * over_processes(seconds)[0]
    fastest = min(ms, key=ms.get)  # the first of equal ones
    times = ", ".join(f"{name} {ms[name]:.2f} ms" for name in ms)
    return fastest, f"{fastest} ({times} a layer)"


def _seconds_of_attention(name, model, device, clock):
    """Forward and backward of a layer and its share of the mask, for four windows with documents of
    about 700 tokens: the least of five, after one in which FlexAttention is compiled."""
    c = model.config
    shapes = [(4, n, c.block_size, c.head_dim) for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
    q, k, v = (torch.zeros(s, device=device, dtype=torch.bfloat16) for s in shapes)
    qkv = [t.requires_grad_() for t in (q, k, v)]
    idx = torch.ones(4, c.block_size, dtype=torch.long, device=device)
    idx[:, ::700] = 0
    ends = document_ends(idx.cpu(), 0).to(device)
    attend = fast_attention
    if name == "flex":
        attend = torch.compile(fast_attention)
    seconds = []
    for _ in range(6):
        begun = clock()
        mask = documents(idx, 0, name, model.visible, ends).mask
        made = clock()
        torch.autograd.grad(attend(*qkv, mask), qkv, torch.zeros_like(q))
        seconds.append((made - begun) / c.n_layer + clock() - made)
    return min(seconds[1:])


def _varlen_works(name):
    package = "flash_attn_interface" if name == "FA3" else name
    if not importlib.util.find_spec(package):
        return False
    try:
        _varlen(name)
    except Exception as e:  # built for another torch or CUDA, most often
        reason = (str(e) or type(e).__name__).splitlines()[0]
        warnings.warn(f"{package} is installed but does not load: {reason}", stacklevel=3)
        return False
    return True


@functools.cache
def _varlen(name):
    """attention(q, k, v, ends, longest), causal within segments of (tokens, heads, head_dim); k and
    v may have fewer heads."""
    if name == "flash_attn":
        package = importlib.import_module(name)

        def flash(q, k, v, ends, longest):
            return package.flash_attn_varlen_func(
                q, k, v, ends, ends, longest, longest, causal=True
            )

        return flash
    if name == "FA3":
        torch.nn.attention.activate_flash_attention_impl(name)
    module = importlib.import_module("torch.nn.attention.varlen")
    options = {"window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(module.varlen_attn).parameters:
        options["enable_gqa"] = True  # torch 2.11 takes fewer heads without it

    def varlen(q, k, v, ends, longest):
        return module.varlen_attn(q, k, v, ends, ends, longest, longest, **options)

    return varlen


LOGITS_IN_CACHE = 2**19  # that a CPU turns into probabilities at a time, in float32


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(x @ weight.T)[target].

    The logits exist one chunk of rows at a time, and their gradient is taken while they do. Gain:
    with a vocabulary of 49,152 all logits would outweigh everything else in memory, and computing
    them again, as token_log_probs does, takes a third more time.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype):
        x_low, w_low = x.to(dtype), weight.to(dtype)
        need_x, need_w = ctx.needs_input_grad[:2]
        total = torch.zeros((), device=x.device)
        grads_x, grad_w = [], None
        for x_chunk, target in _chunks(x_low, targets, len(weight)):
            mask = (target >= 0)[:, None]
            target = target.clamp(min=0)[:, None]
            chunk = x_chunk @ w_low.T  # logits, (rows, V), overwritten by their gradient
            blocks = [(chunk, target, mask)]
            if x.device.type == "cpu" and not torch.compiler.is_compiling():
                # a softmax in the CPU's cache; torch.compile would unroll the loop, and does it
                # itself
                rows = max(1, LOGITS_IN_CACHE // len(weight))
                blocks = zip(chunk.split(rows), target.split(rows), mask.split(rows), strict=True)
            for logits, t, m in blocks:
                log_p = logits.float().log_softmax(dim=-1)
                log_p_target = log_p.gather(1, t)  # (rows, 1)
                # not `total -=`: a result last written in place gets no gradient when torch 2.11
                # compiles it
                total = total - (log_p_target * m).sum()
                if need_x or need_w:
                    # d(-log p_target) / d logits = p - onehot(target). The targets' entries are
                    # written last, into what the products read: a compiler then keeps no p
                    logits.copy_(log_p.exp_().mul_(m))
                    logits.scatter_(1, t, (log_p_target.expm1() * m).to(logits.dtype))
            if need_x:
                grads_x.append(chunk @ w_low)
            if need_w:
                part = chunk.T @ x_chunk
                grad_w = part.to(weight.dtype) if grad_w is None else grad_w.add_(part)
        grad_x = torch.cat(grads_x) if need_x else None
        ctx.save_for_backward(grad_x, grad_w)
        ctx.x_dtype = x.dtype
        return total

    @staticmethod
    def backward(ctx, grad_out):
        grad_x, grad_w = ctx.saved_tensors
        if grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype) * grad_out
        if grad_w is not None:
            grad_w = grad_w * grad_out
        return grad_x, grad_w, None, None


def linear_cross_entropy(x, weight, targets):
    """Mean cross-entropy of logits x @ weight.T against targets, without holding all logits.

    x (N, n_embd), weight (V, n_embd), targets (N,), -1 ignored; 0 where there is no target.
    """
    if not torch.is_grad_enabled():  # an autograd.Function sees requires_grad, not no_grad
        x, weight = x.detach(), weight.detach()
    rows = rows_with_targets(targets)
    total = _LinearCrossEntropy.apply(x[rows], weight, targets[rows], _compute_dtype(x))
    return total / (targets >= 0).sum().clamp(min=1)


def pack_weights(model):
    """Lays out the linear layers of a finished model as oneDNN reads them fastest on a CPU.

    Gain: bfloat16 generation took 0.7 of the time. Each weight is held twice, and a model so packed
    is not for training. torch.compile does the same when it freezes a model, with these operators.
    """
    reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    if "packing" not in FAST or reorder is None or model.embed.weight.device.type != "cpu":
        return model
    if not torch.backends.mkldnn.is_available():
        return model
    linear = torch.ops.mkldnn._linear_pointwise.default
    for module in model.modules():
        if type(module) is nn.Linear:  # a subclass may compute something else
            weight = reorder(module.weight.detach(), None)
            module.forward = functools.partial(
                linear, W=weight, B=module.bias, attr="none", scalars=[], algorithm=""
            )
    return model


if "attention" in FAST and not attend_is_plain():
    FAST.remove("attention")
    warnings.warn("attend in model.py was edited: attention is no longer in FAST", stacklevel=2)


# -----------------------------------------------------------------------------
# the machine


def _distributed():
    return dist.is_available() and dist.is_initialized()


def over_processes(*numbers):
    """The sums of numbers over all processes of torch.distributed, a list of floats.

    They are added up on the CPU, by gloo: with NCCL each sum would wait for the GPU.
    """
    if not _distributed():
        return [float(number) for number in numbers]
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def barrier():
    """Waits for all processes of torch.distributed."""
    if _distributed():
        dist.barrier()


def broadcast_weights(model):
    """Makes the weights of all processes those of the first."""
    if _distributed():
        for p in model.parameters():
            dist.broadcast(p.data, 0)


def sum_gradients(params):
    """Makes each gradient the sum over all processes. After the last micro-batch and not during its
    backward pass, as DistributedDataParallel does it: by then every process knows whether another
    ran out of memory, and none waits for it."""
    if _distributed():
        sums = [dist.all_reduce(p.grad, async_op=True) for p in params if p.grad is not None]
        for pending in sums:
            pending.wait()


class MemoryGuard:
    """`with guard:` ends quietly where memory runs out; guard.ran_out then tells.

    `key` is what there may be less of, `advice` what to do when it is down to 1.
    """

    def __init__(self, device, key="micro_batch_size", advice=""):
        self.device, self.key, self.ran_out = device, key, False
        self.advice = advice or (
            "take a shorter block_size (rlvr: a smaller group_size), a smaller model, or set "
            "grad_checkpoint=True"
        )

    def __enter__(self):
        self.ran_out = False

    def __exit__(self, kind, error, traceback):
        # a CPU's allocator raises RuntimeError
        self.ran_out = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
            isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
        )
        return self.ran_out

    def halve(self, size):
        """Half of it, rounded up, after memory ran out. UserError where there is nothing to
        halve."""
        if size == 1:
            raise UserError(f"out of memory with {self.key}=1: {self.advice}")
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        return (size + 1) // 2


def free_memory(device):
    """Bytes that tensors can still take on a device, the least of all processes; inf if unknown."""
    free = math.inf
    if device.startswith("cuda"):
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + held
    elif device == "cpu":
        free = _available_memory()
    if _distributed():
        least = torch.tensor(free, dtype=torch.float64)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        free = least.item()
    return free


def _available_memory():
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            return 1024 * int(re.search(r"MemAvailable:\s*(\d+)", f.read())[1])
    except (OSError, TypeError):  # not Linux
        return math.inf


def set_up_device(device):
    """Picks the device, prepares it for training and returns its name.

    Each process of torchrun takes a GPU of its own. TF32 is on.
    """
    device = pick_device(device)
    if device.startswith("cuda") and "LOCAL_RANK" in os.environ:
        local_rank = int(os.environ["LOCAL_RANK"])
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
        gpus = torch.cuda.device_count() if device == "cuda" else 1
        if processes > gpus:
            what = f"device={device!r}: {gpus} GPUs for {processes} processes, and each takes one"
            raise UserError(f"{what}; start torchrun with --nproc_per_node={gpus}")
        if device == "cuda":
            device = f"cuda:{local_rank}"
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if device == "cpu":
        keep_memory()
    return device


def pick_device(device):
    """'auto' -> the fastest device here. UserError for one that is not here."""
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={device!r}: expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'")
    count = {"mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}
    if kind != "cpu" and index >= count[kind]:
        found = f"torch {torch.__version__} finds {count[kind] or 'none'} here"
        raise UserError(f"device={device!r}: {found}; 'auto' takes what there is")
    return device


def pick_dtype(dtype, device, model, sequences=0):
    """'auto' -> the faster of bfloat16 and float32 on a device, to train on so many sequences at a
    time; without any, to generate. With it, why: what the start line says.

    On a CPU training measures it: one without AMX multiplies bfloat16 fast, and may still lose more
    in converting than it gains. Generation reads every weight for each token, so there bfloat16
    pays where they fit in no cache; a rule, so that a seed gives the same text every time.
    """
    if dtype != "auto":
        return dtype, ""
    if not multiplies_bf16(device):
        return "float32", "it has no bfloat16"
    if device != "cpu":
        return "bfloat16", ""
    if not sequences:
        return ("bfloat16" if 4 * model.n_params() > 2**27 else "float32"), ""
    if sum(p.numel() for p in model.blocks[0].parameters()) < 100_000:
        return "float32", "too little to multiply for bfloat16"
    seconds = seconds_by_dtype(model, sequences)
    gain = seconds["float32"] / seconds["bfloat16"]
    why = f"measured: bfloat16 {gain:.1f} times as fast as float32"
    return ("bfloat16" if gain > 1.1 else "float32"), why


def seconds_by_dtype(model, sequences):
    """{'float32': seconds, 'bfloat16': seconds} of one block on a CPU, forward and backward, the
    least of three."""
    block_size = min(model.config.block_size, 512)
    with torch.random.fork_rng(devices=[]):
        probe = type(model)(dataclasses.replace(model.config, n_layer=1, vocab_size=512))
    # at most about 10 GFLOP, a tenth of a second
    affordable = 2e9 / (sum(p.numel() for p in probe.blocks.parameters()) * block_size)
    rows = max(1, min(sequences, int(affordable)))
    idx = torch.arange(rows * block_size).view(rows, block_size) % 512
    seconds = {"float32": math.inf, "bfloat16": math.inf}
    for _ in range(4):  # the first of each warms up
        for dtype in seconds:
            begun = time.perf_counter()
            with contextlib.suppress(RuntimeError):  # an edited model may know float32 only
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                    loss = probe(idx, idx)[1]
                loss.backward()
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - begun)
            probe.zero_grad(set_to_none=True)
    return dict(zip(seconds, over_processes(*seconds.values()), strict=True))


def pick_muon_dtype(dtype, device):
    """The dtype of Muon's iteration: bfloat16 where that is fast, unless training is in float32."""
    if dtype == "float32" or not multiplies_bf16(device):
        return torch.float32
    return torch.bfloat16


def multiplies_bf16(device):
    """Whether the hardware does, so that bf16 is faster than float32 and not an emulation."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def compile_pays(device_type, steps_left, seconds_a_step):
    """Whether torch.compile saves more in the steps left, a quarter of their time, than it takes:
    about a minute on a GPU and two on a CPU."""
    seconds = {"cuda": 60, "cpu": 120}.get(device_type, math.inf)
    return steps_left * seconds_a_step / 4 > seconds


def expected_seconds(model, tokens, device):
    """Seconds that training on so many tokens takes on a GPU without torch.compile, by its peak; 0
    where that is not known, as on a CPU."""
    spec = None
    if device.startswith("cuda"):
        spec = GPUS.get(gpu_named(torch.cuda.get_device_name(device)))
    if not spec:
        return 0.0
    return tokens * flops_per_token(model) / (UNCOMPILED_MFU * spec[0])


def undo_compile(model):
    """After model.compile() failed: the model runs as it did before."""
    import torch._dynamo

    model._compiled_call_impl = None
    torch._dynamo.reset()


def keep_memory():
    """Makes glibc keep freed memory: a twelfth less time for a small model's step on a CPU.

    By default it maps large buffers afresh and gives them back at every step. Elsewhere this does
    nothing.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        if not libc.mallopt(-3, 2**31 - 1):  # M_MMAP_THRESHOLD
            libc.mallopt(-3, 2**25)  # the most that an old glibc takes
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass


class Threads:
    """`adapt()`, after a step: one thread less on a CPU while another program keeps a core busy.

    The threads of a product wait for each other; where one shares its core, all of them run at a
    fraction of their speed. The system counts how often it took a core away from this process.
    Weights were equal to the byte with 1 and 2 threads; with more, float32 products may be rounded
    otherwise. OMP_NUM_THREADS turns this off.
    """

    def __init__(self, device):
        self.most, self.pause, self.again_at = torch.get_num_threads(), 5.0, math.inf
        self.since, self.preemptions = time.perf_counter(), _preemptions()
        self.is_on = device == "cpu" and self.most > 1 and "OMP_NUM_THREADS" not in os.environ

    def adapt(self):
        """Whether it took one thread away."""
        now = time.perf_counter()
        if not self.is_on or now - self.since < 0.5:
            return False
        counted = _preemptions()
        rate = (counted - self.preemptions) / (now - self.since)
        self.since, self.preemptions = now, counted
        if torch.get_num_threads() < self.most:
            if now > self.again_at:  # all are tried again, after a pause of 5 seconds to a minute
                torch.set_num_threads(self.most)
            return False
        is_busy = rate > 60 + 20 * self.most  # 15 a second and thread are usual
        if is_busy:
            torch.set_num_threads(self.most - 1)
            self.again_at = now + self.pause
        self.pause = min(2 * self.pause, 60) if is_busy else 5.0
        return is_busy


def _preemptions():
    """How often a thread of this process lost its core to another process; 0 where unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


# -----------------------------------------------------------------------------
# arithmetic

# fmt: off
GPUS = {
    # name:       peak bf16 FLOP/s, GB of memory (both by data sheet, without sparsity), $/hour
    "B200":      (2250e12,  180, 5.99),
    "H200 NVL":  (835e12,   141, 3.59),
    "H200":      (989e12,   141, 3.59),
    "H100 NVL":  (835e12,    94, 2.59),
    "H100 PCIe": (756e12,    80, 1.99),
    "H100":      (989e12,    80, 2.69),
    "A100":      (312e12,    80, 1.49),
    "L40S":      (362e12,    48, 0.86),
    "A40":       (150e12,    48, 0.40),
    "L4":        (121e12,    24, 0.43),
    "RTX 4090":  (165e12,    24, 0.59),
    "RTX 3090":  (71e12,     24, 0.43),
}
# fmt: on


SHARE_OF_MEMORY = 0.92  # of what is free: the rest goes to kernels' scratch space and to gaps
UNCOMPILED_MFU = 0.2  # share of a GPU's peak without torch.compile: an assumption, not measured


def gpu_named(name):
    """The key of GPUS for a name such as 'NVIDIA A100-SXM4-80GB', 'RTX4090' or '4090', or None: for
    other GPUs, and for slices and variants of these that have another peak."""
    if re.search(r"\b(MIG|Ti|SUPER|D|Laptop)\b", name, re.IGNORECASE):
        return None
    for gpu in GPUS:
        words = gpu.replace(" ", "[ _-]?").replace("RTX[ _-]?", "(RTX[ _-]?)?")
        if re.search(rf"(?<![A-Z0-9]){words}(?![A-Z0-9])", name, re.IGNORECASE):
            return gpu
    return None


def flops_per_token(model):
    """Training FLOPs a token, forward and backward (PaLM, Chowdhery et al. 2022, appendix B).

    6 for each weight that multiplies, and 12 n_layer n_head head_dim T for attention, which counts
    the half that causal kernels skip.
    """
    c = model.config
    looked_up = 0 if c.tie_embeddings else c.vocab_size * c.n_embd
    if c.pos == "learned":
        looked_up += c.max_positions * c.n_embd
    attention = 12 * c.n_layer * c.n_head * c.head_dim * c.block_size
    return 6 * (model.n_params() - looked_up) + attention


def memory_estimate(
    model, sequences, optimizer="muon", dtype="bfloat16", grad_checkpoint=False, compiled=True
):
    """{what: bytes} of training on so many sequences of block_size at a time: exact for weights,
    gradients and optimizer, within 15% for the activations that the backward pass keeps."""
    c, n = model.config, model.n_params()
    hidden = sum(
        p.numel() for name, p in model.named_parameters()
        if p.dim() == 2 and name.startswith("blocks.")
    )  # fmt: skip
    low = 4 if dtype == "float32" else 2
    # a token of a block: the residual stream before both norms, by RMSNorm without compilation in
    # float32 and normed, too; then what products read and write: both norms' results, q k v, q k
    # with RoPE, the heads' output; gate and up, their product, and without compilation silu(gate)
    stream = c.n_embd * (2 if dtype == "bfloat16" else 4)
    norms = 2 * stream
    if c.norm == "rmsnorm" and not compiled:
        norms = 4 * 4 * c.n_embd
    heads = 3 * (c.n_head + c.n_kv_head) * c.head_dim
    mlp = 2 * c.ffn_dim
    if c.mlp == "swiglu":
        mlp = (3 if compiled else 4) * c.ffn_dim
    block = norms + low * (2 * c.n_embd + heads + mlp)
    per_token = c.n_layer * block
    if grad_checkpoint:
        per_token = c.n_layer * stream + block
    tokens = sequences * c.block_size
    logits = min(tokens * c.vocab_size, LOGITS_IN_A_CHUNK["cuda"]) * (8 + low)  # and their log p
    copies = 0 if dtype == "float32" else low * n  # of the weights, by autocast
    states = 8 * n - (4 * hidden if optimizer == "muon" else 0)
    activations = tokens * per_token + logits + copies
    return {"weights": 4 * n, "gradients": 4 * n, "optimizer": states, "activations": activations}


def largest_micro_batch(model, free, config, compiled, processes=1):
    """The largest number of sequences, up to config["batch_size"], with which training is expected
    to fit into `free` bytes beside the weights. If a number up to a half smaller divides the
    process's share of a step, that: all micro-batches then take one graph in a compiled model."""
    share = config["batch_size"] * config["gradient_accumulation_steps"] // processes
    # a pair of preferences has two rows, a prompt of a later stage group_size completions
    group_size = config["group_size"]
    rows = {"dpo": 2, "rlvr": group_size, "distill": group_size}.get(config["stage"], 1)
    how = (config["optimizer"], config["dtype"], config["grad_checkpoint"], compiled)

    def fits(size):
        memory = memory_estimate(model, size * rows, *how)
        return sum(memory.values()) - memory["weights"] <= SHARE_OF_MEMORY * free

    largest = max(1, min(config["batch_size"], share))
    while largest > 1 and not fits(largest):
        largest -= 1
    even = [size for size in range(largest // 2 + 1, largest + 1) if share % size == 0]
    return max(even, default=largest)


def pick_micro_batch_size(model, config):
    """largest_micro_batch for the memory that is free now, once the model is on its device."""
    device = str(model.embed.weight.device)
    compiled = config["compile"] and device.startswith("cuda")
    processes = dist.get_world_size() if _distributed() else 1
    return largest_micro_batch(model, free_memory(device), config, compiled, processes)


def plan(config, shape, gpu="", max_steps=math.inf):
    """Prints what a run would take, for train.py --dry_run: parameters, FLOPs, tokens, memory, and
    on `gpu` (a name in GPUS) hours and dollars. `config` holds every key of train.py, `shape` is
    the model's GPTConfig; max_steps is inf where only config["time_budget"] ends the run."""
    gpu, asked = gpu_named(gpu), gpu
    if asked and not gpu:
        raise UserError(f"gpu={asked!r}: expected one of {', '.join(GPUS)}")
    with torch.device("meta"):
        model = GPT(shape)
    flops = flops_per_token(model)
    size, gigabytes = config["micro_batch_size"] or config["batch_size"], math.inf
    sequences = config["batch_size"] * config["gradient_accumulation_steps"]
    tokens_per_step = sequences * config["block_size"]
    if gpu:
        peak, gigabytes, price = GPUS[gpu]
        speed = peak * config["mfu"] / flops  # tokens a second
        if config["time_budget"]:
            max_steps = min(max_steps, int(config["time_budget"] * speed / tokens_per_step))
        if not config["micro_batch_size"]:
            free = gigabytes * 1e9 - 4 * model.n_params()
            size = largest_micro_batch(model, free, config, config["compile"])
    tokens = tokens_per_step * max_steps
    memory = memory_estimate(
        model, size, config["optimizer"], config["dtype"], config["grad_checkpoint"],
        config["compile"],
    )  # fmt: skip
    print(f"parameters        {model.n_params():,}")
    print(f"FLOPs a token     {flops:.4g}")
    print(f"tokens a step     {tokens_per_step:,}")
    if max_steps < math.inf:
        print(f"total tokens      {tokens:,} in {max_steps:,} steps")
    else:
        print(f"total tokens      of {config['time_budget']:g} seconds; --gpu= tells how many")
    print(f"micro_batch_size  {size}")
    for what, bytes_of_it in {**memory, "memory in all": sum(memory.values())}.items():
        print(f"{what:17} {bytes_of_it / 1e9:.2f} GB")
    if not gpu:
        return
    price = config["gpu_cost_per_hour"] or price
    hours = tokens / speed / 3600
    print(
        f"on one {gpu:10} {hours:,.1f} hours, ${hours * price:,.2f}, at {speed:,.0f} tok/s "
        f"({config['mfu']:.0%} of {peak / 1e12:.0f} TFLOP/s) and ${price:.2f} an hour"
    )
    if sum(memory.values()) > SHARE_OF_MEMORY * gigabytes * 1e9:
        print(
            f"a single sequence won't fit {gigabytes} GB: set grad_checkpoint=True, or take a "
            "smaller block_size"
        )


# -----------------------------------------------------------------------------
# the Hugging Face layout: a table for each architecture, read in both directions. ARCHITECTURES
# holds them; a new architecture is a new entry.

REQUIRED = object()  # in place of a default: a config.json without this key is refused

# What a key means that an architecture has no word for. GPTConfig's defaults are the toy run's and
# never complete a file.
# fmt: off
NEUTRAL = dict(
    n_kv_head=0, head_dim=0, ffn_dim=0, dropout=0.0, bias=False, norm="rmsnorm", norm_eps=1e-5,
    mlp="swiglu", pos="rope", rope_theta=10000.0, nope_every=0, qk_norm=False, tie_embeddings=True,
    embed_scale=False, unit_embed=False, init="normal", init_std=0.02, scale_residual=True,
)
SHAPE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "max_positions")


class Architecture(typing.NamedTuple):
    model_class: str        # as transformers calls it
    maths: dict             # our keys that are built in; 0: the value that it follows
    keys: list              # (our key, their key, transformers' default)
    allowed: dict           # their options that change the maths: the values that we compute
    extra: typing.Callable  # config -> what config.json holds beside `keys`
    block: str              # the prefix of a layer's tensors
    tensors: list           # (ours, theirs stacked along our rows, their rows, columns, leaves)
    conv1d: bool = False    # matrices in blocks are stored transposed; there are always biases


_ANY_ALLOWED = {  # options that every config.json of transformers may have
    "is_causal":            (True,),
    "is_encoder_decoder":   (False,),
    "add_cross_attention":  (False,),
    "per_layer_config":     ({},),
    "pruned_heads":         ({},),
    "quantization_config":  (None,),
}
_LLAMA_ALLOWED = _ANY_ALLOWED | {
    "hidden_act":             ("silu", "swish"),
    "rope_type":              ("default",),
    "partial_rotary_factor":  (1,),
    "use_sliding_window":     (False,),
    "layer_types":            ("full_attention",),
}
_GPT2_ALLOWED = _ANY_ALLOWED | {
    "activation_function":              ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "scale_attn_weights":               (True,),
    "scale_attn_by_inverse_layer_idx":  (False,),
}
_LLAMA_KEYS = [
    # ours              theirs                      transformers' default
    ("vocab_size",      "vocab_size",               REQUIRED),
    ("n_embd",          "hidden_size",              REQUIRED),
    ("n_layer",         "num_hidden_layers",        REQUIRED),
    ("n_head",          "num_attention_heads",      REQUIRED),
    ("n_kv_head",       "num_key_value_heads",      0),
    ("ffn_dim",         "intermediate_size",        REQUIRED),
    ("norm_eps",        "rms_norm_eps",             1e-6),
    ("bias",            "attention_bias",           False),
    ("init_std",        "initializer_range",        0.02),
]
_GPT2_KEYS = [
    ("vocab_size",      "vocab_size",               50257),
    ("max_positions",   "n_positions",              1024),
    ("n_embd",          "n_embd",                   768),
    ("n_layer",         "n_layer",                  12),
    ("n_head",          "n_head",                   12),
    ("ffn_dim",         "n_inner",                  0),
    ("norm_eps",        "layer_norm_epsilon",       1e-5),
    ("init_std",        "initializer_range",        0.02),
    ("tie_embeddings",  "tie_word_embeddings",      True),
]
_LLAMA_TENSORS = [  # a star stands for the prefix of a block
    # ours         theirs                                     rows       columns    weight, bias
    ("embed",      "model.embed_tokens",                      "vocab",   "width",   "w"),
    ("norm",       "model.norm",                              "width",   "",        "w"),
    ("head",       "lm_head",                                 "vocab",   "width",   "w"),
    ("*attn_norm", "*input_layernorm",                        "width",   "",        "w"),
    ("*attn.qkv",  "*self_attn.q_proj *self_attn.k_proj *self_attn.v_proj",
                                                              "q kv kv", "width",   "wb"),
    ("*attn.proj", "*self_attn.o_proj",                       "width",   "q",       "wb"),
    ("*mlp_norm",  "*post_attention_layernorm",               "width",   "",        "w"),
    ("*mlp.up",    "*mlp.gate_proj *mlp.up_proj",             "ffn ffn", "width",   "wb"),
    ("*mlp.down",  "*mlp.down_proj",                          "width",   "ffn",     "wb"),
]
_QWEN3_TENSORS = _LLAMA_TENSORS + [
    ("*attn.q_norm", "*self_attn.q_norm",                     "head",    "",        "w"),
    ("*attn.k_norm", "*self_attn.k_norm",                     "head",    "",        "w"),
]
_GPT2_TENSORS = [
    ("embed",      "wte",                                     "vocab",     "width", "w"),
    ("pos_embed",  "wpe",                                     "positions", "width", "w"),
    ("norm",       "ln_f",                                    "width",     "",      "wb"),
    ("head",       "lm_head",                                 "vocab",     "width", "w"),
    ("*attn_norm", "*ln_1",                                   "width",     "",      "wb"),
    ("*attn.qkv",  "*attn.c_attn",                            "qkv",       "width", "wb"),
    ("*attn.proj", "*attn.c_proj",                            "width",     "q",     "wb"),
    ("*mlp_norm",  "*ln_2",                                   "width",     "",      "wb"),
    ("*mlp.up",    "*mlp.c_fc",                               "ffn",       "width", "wb"),
    ("*mlp.down",  "*mlp.c_proj",                             "width",     "ffn",   "wb"),
]


def _llama_extra(c):
    # transformers 5 reads rope_parameters; transformers 4, vLLM and llama.cpp read rope_theta
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    return {"hidden_act": "silu", "rope_parameters": rope}


def _smollm3_extra(c):
    layers = [int((layer + 1) % c.nope_every != 0) for layer in range(c.n_layer)]
    return _llama_extra(c) | {"no_rope_layers": layers, "use_sliding_window": False}


def _gpt2_extra(c):
    dropout = {"resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout}
    # n_ctx: what n_positions was called once; llama.cpp's converter reads it
    return dropout | {"activation_function": "gelu_new", "n_ctx": c.max_positions}


ARCHITECTURES = {
    "llama": Architecture(
        "LlamaForCausalLM",
        dict(norm="rmsnorm", mlp="swiglu", pos="rope", qk_norm=False, nope_every=0),
        _LLAMA_KEYS + [
            ("head_dim",        "head_dim",                 0),
            ("max_positions",   "max_position_embeddings",  2048),
            ("rope_theta",      "rope_theta",               10000.0),
            ("bias",            "mlp_bias",                 False),
            ("tie_embeddings",  "tie_word_embeddings",      False),
        ],
        _LLAMA_ALLOWED, _llama_extra, "model.layers.", _LLAMA_TENSORS),
    "smollm3": Architecture(
        "SmolLM3ForCausalLM",
        dict(norm="rmsnorm", mlp="swiglu", pos="rope", qk_norm=False, head_dim=0),
        _LLAMA_KEYS + [
            ("head_dim",        "head_dim",                 0),
            ("max_positions",   "max_position_embeddings",  32768),
            ("rope_theta",      "rope_theta",               2e6),
            ("bias",            "mlp_bias",                 False),
            ("nope_every",      "no_rope_layer_interval",   4),
            ("tie_embeddings",  "tie_word_embeddings",      True),
        ],
        _LLAMA_ALLOWED, _smollm3_extra, "model.layers.", _LLAMA_TENSORS),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        dict(norm="rmsnorm", mlp="swiglu", pos="rope", qk_norm=True, nope_every=0, bias=False),
        _LLAMA_KEYS + [
            ("head_dim",        "head_dim",                 128),
            ("max_positions",   "max_position_embeddings",  32768),
            ("rope_theta",      "rope_theta",               10000.0),
            ("tie_embeddings",  "tie_word_embeddings",      False),
        ],
        _LLAMA_ALLOWED | {"attention_bias": (False,)},
        _llama_extra, "model.layers.", _QWEN3_TENSORS),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        dict(norm="layernorm", mlp="gelu", pos="learned", qk_norm=False, nope_every=0,
             n_kv_head=0, head_dim=0),
        _GPT2_KEYS, _GPT2_ALLOWED, _gpt2_extra, "h.", _GPT2_TENSORS, conv1d=True),
}
# fmt: on


def architecture(config, state=None):
    """(model_type, obstacles): the Hugging Face architecture whose maths a config is, and [], or
    'nanosmol' and a sentence for each key and tensor that no architecture has.

    With `state`, a state dict, its tensors are compared too: a parameter that was added to the
    model has no name in another library, and must not be left out of a checkpoint.
    """
    kind, obstacles = "", None
    for name, arch in ARCHITECTURES.items():
        wrong = []
        for key, value in arch.maths.items():
            if key == "n_kv_head":
                value = config.n_head
            elif key == "head_dim":
                value = config.n_embd / config.n_head
            if getattr(config, key) != value:
                wrong.append(f"{name} has {key}={value!r}, not {getattr(config, key)!r}")
        if obstacles is None or len(wrong) < len(obstacles):
            kind, obstacles = name, wrong
    if state is not None and not obstacles:
        obstacles = _tensor_obstacles(config, kind, state)
    for field in dataclasses.fields(config):
        if field.name in NEUTRAL or field.name in SHAPE:
            continue
        value = getattr(config, field.name)
        if value != field.default:
            obstacles.append(f"no architecture has the key {field.name}={value!r}")
    return ("nanosmol", obstacles) if obstacles else (kind, [])


def _tensor_obstacles(config, kind, state):
    """A sentence for each tensor that only one of a state dict and an architecture has."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected = {row.ours: row.shape for row in _tensor_rows(config, kind) if not row.optional}
    if config.tie_embeddings:
        del expected["head.weight"]
    if _head_is_embedding(config, state):
        shapes.pop("head.weight", None)
    obstacles = {}  # as a set, in order: one sentence for all layers
    for name in sorted(shapes.keys() | expected.keys()):
        ours, theirs = shapes.get(name, "absent"), expected.get(name, "absent")
        if ours != theirs:
            name = re.sub(r"^blocks\.\d+\.", "blocks.*.", name)
            obstacles[f"{kind} has {name} {theirs}, not {ours}"] = True
    return list(obstacles)


def _head_is_embedding(config, state):
    """Whether a file leaves out the head: it is the embedding (an edit of GPT may untie it)."""
    embed, head = state.get("embed.weight"), state.get("head.weight")
    if not config.tie_embeddings or embed is None:
        return False
    return head is None or torch.equal(head, embed)


class _TensorRow(typing.NamedTuple):
    ours: str
    shape: tuple
    pieces: list  # [(their name, rows)], stacked along our rows
    transposed: bool = False  # there
    optional: bool = False  # here


def _tensor_rows(config, kind):
    """The table `tensors` of an architecture, written out for a config."""
    arch, c = ARCHITECTURES[kind], config
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    sizes = dict(vocab=c.vocab_size, positions=c.max_positions, width=c.n_embd, ffn=c.ffn_dim)
    sizes |= dict(q=q, kv=kv, qkv=q + 2 * kv, head=c.head_dim)
    table = []
    prefixes = [(f"blocks.{layer}.", f"{arch.block}{layer}.") for layer in range(c.n_layer)]
    for our_prefix, their_prefix in [("", ""), *prefixes]:
        for ours, theirs, rows, columns, leaves in arch.tensors:
            if ours.startswith("*") != bool(our_prefix):
                continue
            rows = [sizes[row] for row in rows.split()]
            names = [their_prefix + name.lstrip("*") for name in theirs.split()]
            ours = our_prefix + ours.lstrip("*")
            shape = (sum(rows), sizes[columns]) if columns else (sum(rows),)
            transposed = arch.conv1d and bool(columns and our_prefix)
            pieces = [(f"{name}.weight", n) for name, n in zip(names, rows, strict=True)]
            table.append(_TensorRow(f"{ours}.weight", shape, pieces, transposed))
            if leaves == "wb" and (c.bias or arch.conv1d):
                pieces = [(f"{name}.bias", n) for name, n in zip(names, rows, strict=True)]
                table.append(_TensorRow(f"{ours}.bias", shape[:1], pieces, False, not c.bias))
    return table


def _to_hf_config(config, kind):
    """config.json of a config. Keys without a word in the architecture stand under 'nanosmol'."""
    values = dataclasses.asdict(config)
    hf = {"model_type": kind, "architectures": ["NanosmolForCausalLM"], "dtype": "float32"}
    if kind == "nanosmol":
        return hf | {"nanosmol": values}
    arch = ARCHITECTURES[kind]
    hf |= {"architectures": [arch.model_class], "use_cache": True}
    # without these, transformers takes ids of its own, beyond a small vocabulary
    hf |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    hf |= {theirs: values[ours] for ours, theirs, _ in arch.keys}
    hf |= arch.extra(config)
    hf["tie_word_embeddings"] = config.tie_embeddings and not config.embed_scale
    read_back = dataclasses.asdict(_from_hf_config(hf, "config.json", type(config)))
    hf["nanosmol"] = {key: value for key, value in values.items() if read_back[key] != value}
    return hf


def _from_hf_config(hf, where, config_class):
    """The config of a config.json; UserError where it asks for maths that is not here."""
    kind, ours = hf.get("model_type"), hf.get("nanosmol", {})
    fields = config_class.__dataclass_fields__
    for key in ours:
        if key not in fields:
            what = f"GPTConfig has no key {key!r}"
            raise UserError(f"{where}: {what}; load it with the model.py that wrote it")
    if kind == "nanosmol":
        for key in (*SHAPE, *NEUTRAL):
            if key in fields and key not in ours:
                raise UserError(f"{where}: the key {key!r} is missing under 'nanosmol'")
        return config_class(**ours)
    if kind not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise UserError(f"{where}: model_type is {kind!r}; expected {known} or 'nanosmol'")
    arch, hf = ARCHITECTURES[kind], _flat_hf_config(hf, where)
    for option, allowed in arch.allowed.items():
        values = hf.get(option)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value not in allowed:
                raise UserError(f"{where}: {option} is {value!r}; expected {allowed[0]!r}")
    values, sources = {"bias": True} if arch.conv1d else {}, {}
    for key, theirs, default in arch.keys:
        value = default if hf.get(theirs) is None else hf[theirs]
        if value is REQUIRED:
            raise UserError(f"{where}: the key {theirs!r} is missing")
        if key in sources and values[key] != value:
            both = f"{theirs} is {value!r}, {sources[key]} is {values[key]!r}"
            raise UserError(f"{where}: {both}; expected the same, here they are one key")
        values[key], sources[key] = value, theirs
    values["block_size"] = values["max_positions"]
    return config_class(**NEUTRAL | arch.maths | values | ours)


def _flat_hf_config(hf, where):
    """config.json with RoPE's parameters, which have stood in three places, beside the other keys,
    and SmolLM3's list of layers as an interval."""
    rope = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or rope
    flat = {**hf, **rope, **scaling, "rope_type": scaling.get("rope_type", scaling.get("type"))}
    layers = hf.get("no_rope_layers")
    if layers is not None:
        every = layers.index(0) + 1 if 0 in layers else 0
        for layer, has_rope in enumerate(layers[: hf.get("num_hidden_layers")]):
            if bool(has_rope) == (every > 0 and (layer + 1) % every == 0):
                raise UserError(f"{where}: no_rope_layers is {layers}; expected 0 in every n-th")
        flat["no_rope_layer_interval"] = every
    return flat


def save_hf(config, state, directory, hf_layout, generation):
    """See GPT.save_pretrained. What no architecture has is saved as nanosmol, with a warning."""
    from safetensors.torch import save_file

    kind, obstacles = architecture(config, state)
    if hf_layout and obstacles:
        what = "saved as model_type nanosmol, which loads here but not in transformers"
        warnings.warn(f"{what}: {'; '.join(obstacles)}", stacklevel=3)
    if not hf_layout:
        kind = "nanosmol"
    tensors = {}
    for name, tensor in state.items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        tensors[name] = tensor.detach().to("cpu", dtype)
    if _head_is_embedding(config, tensors):
        tensors.pop("head.weight", None)
    if kind != "nanosmol":
        tensors = _to_hf_tensors(config, kind, tensors)
    if kind == "gpt2" and "lm_head.weight" in tensors:
        # transformers 4 takes the names of the Hub's gpt2 only where there is no head beside them
        head = {"lm_head.weight": tensors.pop("lm_head.weight")}
        tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()} | head
    addresses = set()
    for name, tensor in tensors.items():  # a file can't hold one tensor under two names
        shared = tensor.data_ptr() in addresses
        tensors[name] = tensor.clone() if shared else tensor.contiguous()
        addresses.add(tensor.data_ptr())
    os.makedirs(directory, exist_ok=True)
    metadata = {"format": "pt", "crc32": tensors_checksum(tensors)}
    path = os.path.join(directory, "model.safetensors")
    save_file(tensors, path, metadata=metadata)
    _sort_metadata(path)
    hf = _to_hf_config(config, kind) | generation
    for name, content in (("config.json", hf), ("generation_config.json", generation)):
        with open(os.path.join(directory, name), "w", encoding="utf-8") as f:
            json.dump(content, f, indent=2)
    with contextlib.suppress(OSError):  # save_file keeps its file from other users
        shutil.copymode(os.path.join(directory, "config.json"), path)


def _sort_metadata(path):
    """save_file writes its metadata in a random order; equal weights are to be equal files."""
    with open(path, "r+b") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:
            f.seek(8)
            f.write(text.ljust(size))


def _to_hf_tensors(config, kind, state):
    """{their name: tensor} of a state dict."""
    embed, head = state["embed.weight"], state.get("head.weight")
    if config.embed_scale:  # folded into the embedding; the head keeps the matrix as it is
        head = embed if config.tie_embeddings else head
        embed = embed * math.sqrt(config.n_embd)
    state = state | {"embed.weight": embed, "head.weight": head}
    tensors = {}
    for row in _tensor_rows(config, kind):
        tensor = state.get(row.ours)
        if row.optional:  # GPT-2 always has biases; without them they are 0
            tensor = torch.zeros(row.shape)
        if tensor is not None:  # a tied head is not stored
            pieces = tensor.split([rows for _, rows in row.pieces])
            for (name, _), piece in zip(row.pieces, pieces, strict=True):
                tensors[name] = piece.T if row.transposed else piece
    return tensors


def load_hf(model_class, directory):
    """See GPT.from_pretrained."""
    path = os.path.join(directory, "config.json")
    if not os.path.lexists(path):
        raise UserError(f"{directory}: not a model directory, it has no config.json")
    hf = _read_json(path)
    try:
        config, kind = _from_hf_config(hf, path, model_class.config_class), hf["model_type"]
    except (AttributeError, TypeError, KeyError, OverflowError, ZeroDivisionError) as e:
        raise UserError(f"{path}: not a model's config: {e}") from None
    except UserError as e:
        raise UserError(str(e) if path in str(e) else f"{path}: {e}") from None
    tensors = _read_safetensors(directory)
    _check_size(config, tensors, path)
    if kind == "gpt2":  # with the prefix or, as the Hub's gpt2, without
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    if kind == "nanosmol":
        tied = config.tie_embeddings and "head.weight" not in tensors
    else:
        _trust_tensors(config, kind, tensors, directory)
        tied = config.tie_embeddings

    with _Uninitialized():
        model = model_class(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if kind == "nanosmol":
        rows = [_TensorRow(name, shape, [(name, None)]) for name, shape in shapes.items()]
    else:
        rows = [row for row in _tensor_rows(config, kind) if row.ours in shapes]
    added = sorted(shapes.keys() - {row.ours for row in rows})
    if added:  # parameters of an edited model.py, in a model of someone else
        model = model_class(config)
        what = f"{directory} has no {', '.join(added)}"
        warnings.warn(f"{what}: parameters of this model.py keep initial values", stacklevel=3)
    rows = [row for row in rows if not (tied and row.ours == "head.weight")]
    _check_left_over(tensors, rows, directory)
    state = {name: tensor for name, tensor in model.state_dict().items() if name in added}
    for row in rows:
        if tied and config.embed_scale and row.ours == "embed.weight" and kind != "nanosmol":
            # the embedding that is stored beside it is the same, scaled and so rounded
            row = row._replace(pieces=[("lm_head.weight", config.vocab_size)])
        state[row.ours] = _stacked(row, tensors, shapes[row.ours], directory)
    if config.embed_scale and not config.tie_embeddings and kind != "nanosmol":
        state["embed.weight"] = state["embed.weight"].float() / math.sqrt(config.n_embd)
    if tied and "head.weight" in shapes:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state)
    return model


def _read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError, RecursionError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path}: not valid JSON: {reason}") from None


def _check_size(config, tensors, path):
    """UserError for a config that is far larger than the weights: its model is not to be made."""
    c, there = config, sum(tensor.numel() for tensor in tensors.values())
    layer = c.n_embd * (2 * c.n_head * c.head_dim + 2 * c.ffn_dim)
    claimed = c.vocab_size * c.n_embd + c.n_layer * layer + c.max_positions * c.head_dim
    if claimed > 4 * there + 10**8 or c.n_layer > len(tensors):
        sizes = f"{c.n_layer:,} layers and {claimed:,} parameters or more"
        raise UserError(f"{path}: asks for {sizes}, the weights beside it are {there:,} numbers")


def _stacked(row, tensors, shape, directory):
    """Our tensor from theirs; UserError where one is missing or has another shape."""
    where, pieces = f"{directory}: the tensor", []
    for name, rows in row.pieces:
        expected = row.shape if rows is None else (rows, *row.shape[1:])
        if row.transposed:
            expected = expected[::-1]
        if name not in tensors:
            raise UserError(f"{where} {name} is missing; expected one of shape {expected}")
        if tensors[name].shape != expected:
            found = f"{name} has shape {tuple(tensors[name].shape)}"
            raise UserError(f"{where} {found}; config.json asks for {expected}")
        pieces.append(tensors[name].T if row.transposed else tensors[name])
    tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    if tensor.shape != shape:
        found = f"{row.ours} has shape {tuple(tensor.shape)}"
        raise UserError(f"{where} {found}; this model.py makes it {shape}")
    return tensor


def _check_left_over(tensors, rows, directory):
    """Nothing may be left but masks, RoPE's frequencies, a head that is the embedding and biases of
    0: it would be another model."""
    names = {name for row in rows for name, _ in row.pieces}
    harmless = re.compile(r"(lm_head\.weight|inv_freq|attn\.(masked_)?bias)$")
    left = [
        name
        for name, tensor in tensors.items()
        if name not in names and not harmless.search(name) and tensor.any()
    ]
    if left:
        what = f"{len(left)} tensors, such as {left[0]},"
        raise UserError(f"{directory}: {what} have no place in the model of config.json")


def _trust_tensors(config, kind, tensors, directory):
    """Where tensors contradict config.json they are what was trained: changes `config` and warns.

    Otherwise a model that was fine-tuned elsewhere would lose its head, embedding or biases.
    transformers unties a head that differs from the embedding, too.
    """
    table = {row.ours: row for row in _tensor_rows(config, kind)}
    embed = tensors.get(table["embed.weight"].pieces[0][0])
    head = tensors.get("lm_head.weight")
    if config.tie_embeddings and embed is not None and head is not None:
        same = embed.shape == head.shape and torch.equal(embed, head)
        if config.embed_scale and embed.shape == head.shape and embed.is_floating_point():
            scale, precision = math.sqrt(config.n_embd), torch.finfo(embed.dtype)
            same = torch.allclose(  # both may have been rounded
                embed.float(), head.float() * scale, rtol=2 * precision.eps, atol=precision.tiny
            )
        if not same:
            config.tie_embeddings = False
            what = "lm_head.weight is not the embedding that config.json ties it to"
            warnings.warn(f"{directory}: {what}: loaded with tie_embeddings=False", stacklevel=4)
    optional = [name for row in table.values() if row.optional for name, _ in row.pieces]
    if any(name in tensors and tensors[name].any() for name in optional):
        config.bias = True
        what = "the biases are not 0, although config.json says bias=False"
        warnings.warn(f"{directory}: {what}: loaded with bias=True", stacklevel=4)


class _Uninitialized(torch.overrides.TorchFunctionMode):
    """Modules made in this context draw no first weights: four fifths of the time of loading.

    The meta device would do, but imports torch.compile's machinery: a second more.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return (kwargs or {}).get("tensor")
        return func(*args, **(kwargs or {}))


def _read_safetensors(directory):
    """{name: tensor} of a directory, from one file or from the shards that its index names."""
    index = os.path.join(directory, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if os.path.lexists(index):
        try:
            files = sorted(set(_read_json(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{index}: not an index of shards: {e}") from None
    tensors = {}
    for file in files:
        # the directory itself is all that a model may have read
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise UserError(f"{index}: names {file!r}; expected *.safetensors beside it")
        tensors |= _read_shard(os.path.join(directory, file))
    return tensors


def _read_shard(path):
    """{name: tensor} of a file, compared with the checksum in its metadata if it has one."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; a model directory holds its weights there")
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as f:
            recorded = (f.metadata() or {}).get("crc32")
    except (SafetensorError, OSError, ValueError, KeyError) as e:
        raise UserError(f"{path}: damaged or cut short, no safetensors file ({e})") from None
    if recorded not in (None, tensors_checksum(tensors)):
        raise UserError(f"{path}: not the weights that were written (their CRC-32 differs)")
    return tensors


def tensors_checksum(tensors):
    """The CRC-32 of {name: tensor}: names, dtypes, shapes and values. 1 to 4 GB a second."""
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def recorded_checksum(directory):
    """The CRC-32 in the metadata of a checkpoint's weights; None in those of older versions."""
    from safetensors import safe_open

    with safe_open(os.path.join(directory, "model.safetensors"), "pt") as f:
        return (f.metadata() or {}).get("crc32")


# -----------------------------------------------------------------------------
# GGUF, the file that llama.cpp, Ollama and LM Studio read: the tensors of the Hugging Face layout
# under the names that the `gguf` package has for them

GGUF_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}


def gguf_obstacles(model):
    """A sentence for each thing about `model` that llama.cpp does not compute."""
    config = model.config
    kind, obstacles = architecture(config, model.state_dict())
    if kind == "smollm3" and config.nope_every != 4:
        obstacles.append(f"its smollm3 has nope_every=4, not {config.nope_every}")
    if kind == "smollm3" and config.bias:
        obstacles.append("its smollm3 has bias=False, not True")
    edits = {"visible": model.is_causal, "logits": model.has_plain_logits}
    obstacles += [f"GPT.{name} was edited" for name, is_plain in edits.items() if not is_plain]
    if not attend_is_plain():
        obstacles.append("attend was edited")
    return obstacles


def save_gguf(model, path, dtype, vocabulary):
    """Writes a GGUF file, whole or not at all. `vocabulary` holds the tokenizer's keys.

    Vectors and learned positions stay float32. q8_0 packs 32 numbers of a row: matrices whose rows
    are no multiple of that are float16. Returns {dtype: how many matrices}. UserError for what
    llama.cpp does not compute.
    """
    import gguf

    obstacles = gguf_obstacles(model)
    if obstacles:
        raise UserError(f"{path}: llama.cpp cannot run this model: {'; '.join(obstacles)}")
    kind, counts = architecture(model.config)[0], {}
    partial = f"{path}.tmp{os.getpid()}"
    writer = gguf.GGUFWriter(partial, kind)
    name = os.path.basename(path).removesuffix(".gguf")
    for key, value in (
        {"general.name": name} | _gguf_keys(model.config, kind) | vocabulary
    ).items():
        kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in _gguf_tensors(model, kind):
        stored = "F32"
        if tensor.ndim == 2 and name != "position_embd.weight":
            stored = GGUF_DTYPES[dtype]
            if stored == "Q8_0" and tensor.shape[1] % 32:
                stored = "F16"
            counts[stored] = counts.get(stored, 0) + 1
        stored = gguf.GGMLQuantizationType[stored]
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), stored), raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open(partial, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            os.remove(partial)  # of an attempt that failed
    return counts


def _gguf_keys(config, kind):
    """The keys of a GGUF file that give a model's shape."""
    c = config
    keys = {
        "vocab_size": c.vocab_size,
        "context_length": c.max_positions,
        "embedding_length": c.n_embd,
        "block_count": c.n_layer,
        "feed_forward_length": c.ffn_dim,
        "attention.head_count": c.n_head,
        "attention.head_count_kv": c.n_kv_head,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
    }
    if c.norm == "layernorm":
        keys["attention.layer_norm_epsilon"] = c.norm_eps
    else:
        keys["attention.layer_norm_rms_epsilon"] = c.norm_eps
    if c.pos == "rope":
        keys |= {"rope.dimension_count": c.head_dim, "rope.freq_base": float(c.rope_theta)}
    return {f"{kind}.{key}": value for key, value in keys.items()}


def _gguf_tensors(model, kind):
    """Yields (name, tensor), float32, matrices as (out, in)."""
    import gguf

    config = model.config
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, config.n_layer)
    state = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    if _head_is_embedding(config, state):
        del state["head.weight"]
    rows = _tensor_rows(config, kind)
    transposed = {name for row in rows if row.transposed for name, _ in row.pieces}
    for name, tensor in _to_hf_tensors(config, kind, state).items():
        if name in transposed:
            tensor = tensor.T
        if kind in ("llama", "smollm3") and re.search(r"\.[qk]_proj\.", name):
            # where RoPE turns the i-th number with the one half a head later, llama.cpp turns
            # neighbours, in these two architectures
            halves = tensor.view(-1, 2, config.head_dim // 2, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.contiguous()
