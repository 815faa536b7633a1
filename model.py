"""
The whole model: one GPT that is a Llama block or a GPT-2 block by its config, its losses,
its optimizers, generation with a KV cache, and the Hugging Face layout of a directory.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384))
    logits, _ = model(idx)            # (B, T) token ids -> (B, T, vocab_size)
    _, loss = model(idx, targets)     # targets (B, T), -1 where nothing is asked

In order: config, layers, GPT (forward, generate, from_pretrained, save_pretrained), documents, loss,
optimizers and schedule, the machine, arithmetic (FLOPs, memory), the Hugging Face layout. Importing it does nothing.
"""
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
import typing
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import UserError


# -----------------------------------------------------------------------------
# config

FOLLOWS = ("vocab_size", "n_kv_head", "head_dim", "ffn_dim", "max_positions")  # keys whose 0 follows another


@dataclasses.dataclass
class GPTConfig:
    """The keys that shape a model.

    Raises UserError where two keys contradict each other.
    """
    # fmt: off
    block_size: int = 256         # tokens in a training window (>= 1)
    vocab_size: int = 0           # rows of the embedding; 0: the data's; it may be larger, never smaller (>= 0)
    n_layer: int = 4              # blocks (>= 1)
    n_head: int = 4               # query heads (>= 1)
    n_embd: int = 128             # width of the residual stream (>= 1)
    n_kv_head: int = 0            # key and value heads (GQA); 0: n_head (>= 0)
    head_dim: int = 0             # width of a head; 0: n_embd / n_head (>= 0)
    ffn_dim: int = 0              # hidden width of the MLP; 0: 4 n_embd (gelu), 8/3 n_embd in 64s (swiglu) (>= 0)
    max_positions: int = 0        # the longest context that config.json declares; 0: block_size (>= 0)
    dropout: float = 0.0          # (>= 0, < 1)
    bias: bool = False            # in linear layers and LayerNorm
    norm: str = "rmsnorm"         # 'rmsnorm' | 'layernorm'
    norm_eps: float = 1e-5        # (> 0)
    mlp: str = "swiglu"           # 'swiglu' | 'gelu' (tanh form, as GPT-2)
    pos: str = "rope"             # 'rope' | 'learned'
    rope_theta: float = 300.0     # (> 0)
    nope_every: int = 0           # every n-th layer has no RoPE (4: layers 3, 7, 11, ...); 0: never (>= 0)
    qk_norm: bool = True          # RMSNorm on each head's queries and keys (Qwen3)
    tie_embeddings: bool = True   # one matrix for embedding and head
    embed_scale: bool = False     # embeddings x sqrt(n_embd)
    unit_embed: bool = True       # embeddings begin at std 1, the final norm's gain at n_embd^-0.5
    init: str = "normal"          # 'normal' | 'trunc_normal' (cut at 3 std)
    init_std: float = 0.02        # (> 0)
    scale_residual: bool = True   # projections into the residual stream begin smaller by sqrt(2 n_layer)
    # fmt: on

    def __post_init__(self):
        for field in dataclasses.fields(self):  # a config.json of someone else may hold anything
            value, kind = getattr(self, field.name), field.type
            if kind not in (bool, int, float, str):
                continue  # a key that was added, of a type that only its author knows
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise UserError(f"{field.name}={value!r}: expected {kind.__name__}")
            if kind is float and not math.isfinite(value):
                raise UserError(f"{field.name}={value}: expected a finite number")
        for key, allowed in (("norm", ("rmsnorm", "layernorm")), ("mlp", ("swiglu", "gelu")),
                             ("pos", ("rope", "learned")), ("init", ("normal", "trunc_normal"))):
            if getattr(self, key) not in allowed:
                raise UserError(f"{key}={getattr(self, key)!r}: expected one of {', '.join(map(repr, allowed))}")
        for least, keys in ((1, ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")),
                            (0, ("n_kv_head", "head_dim", "ffn_dim", "max_positions", "nope_every", "init_std"))):
            for key in keys:
                if getattr(self, key) < least:
                    raise UserError(f"{key}={getattr(self, key)}: expected at least {least}")
        for key in ("norm_eps", "rope_theta"):
            if getattr(self, key) <= 0:
                raise UserError(f"{key}={getattr(self, key)}: expected more than 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout}: expected at least 0 and less than 1")
        self.n_kv_head = self.n_kv_head or self.n_head
        if not self.head_dim and self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; set head_dim to free them")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        if self.pos == "rope" and self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim}: RoPE turns pairs, so it has to be even")
        if not self.ffn_dim:
            self.ffn_dim = 4 * self.n_embd if self.mlp == "gelu" else -(-8 * self.n_embd // (3 * 64)) * 64
        self.max_positions = self.max_positions or self.block_size
        if self.block_size > self.max_positions:
            raise UserError(f"block_size={self.block_size} is beyond max_positions={self.max_positions}")


# -----------------------------------------------------------------------------
# layers

class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang & Sennrich 2019), given out in the dtype in which matrices are multiplied."""

    def forward(self, x):
        dtype = _compute_dtype(x)
        if x.dtype != self.weight.dtype:  # under autocast queries and keys come in bf16, the gain is in float32
            x = x.float()
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps).to(dtype)


def make_norm(config):
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)


def rope_tables(config):
    """cos and sin, (max_positions, head_dim) each, for Llama's layout: pair (i, i + head_dim/2).

    RoFormer (Su et al. 2021), eq. 34. The sign of the rotation is folded into sin's first half, so that
    rotating is x * cos + roll(x) * sin: three kernels where the textbook form takes seven.
    """
    half = config.head_dim // 2
    angles = torch.outer(torch.arange(config.max_positions).float(),
                         config.rope_theta ** (-torch.arange(half).float() / half))
    return torch.cat([angles.cos()] * 2, dim=1), torch.cat([-angles.sin(), angles.sin()], dim=1)


def rotate(x, cos, sin):
    """RoPE: x (B, T, heads, head_dim), cos and sin (T or B x T, 1, head_dim)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023); q, k and v are one matrix."""

    def __init__(self, config, layer):
        super().__init__()
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        self.head_dim, self.dropout = config.head_dim, config.dropout
        self.qkv = nn.Linear(config.n_embd, sum(self.heads) * config.head_dim, bias=config.bias)
        self.proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.qkv.weight.parts = [n * config.head_dim for n in self.heads]  # three matrices to Muon
        self.has_rope = config.pos == "rope" and not (config.nope_every and (layer + 1) % config.nope_every == 0)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, cache):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, -1, self.head_dim).split(self.heads, dim=2)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.has_rope:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.to(q.dtype).transpose(1, 2)  # (B, heads, T, head_dim)
        if cache is not None:
            k, v = cache.extend(k, v)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))


def attend(q, k, v, mask, dropout=0.0):
    """softmax(q k^T / sqrt(head_dim)) v, causal unless `mask` says otherwise.

    q (B, n_head, T, head_dim), k and v (B, n_kv_head, S, head_dim) with S >= T. `mask` is None, a boolean
    (B or 1, 1, T, S), True where a query may look, a BlockMask of FlexAttention, or Segments.
    """
    gqa = q.shape[1] != k.shape[1]
    if isinstance(mask, Segments):
        heads_last = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
        y = mask.kernel(*heads_last, mask.ends, q.shape[2])
        return y.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)
    if mask is not None and not torch.is_tensor(mask):
        from torch.nn.attention.flex_attention import flex_attention
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < q.shape[2] <= 256:
        # on windows this short the CPU's kernel takes several times as long in bfloat16
        with torch.autocast("cpu", enabled=False):
            return attend(q.float(), k.float(), v.float(), mask, dropout).to(q.dtype)
    # a single query (a step of generation) sees every key, so it needs no mask at all
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=gqa,
                                          is_causal=mask is None and q.shape[2] > 1)


def pick_attention(device, dtype, doc_mask, compiled, dropout=0.0):
    """The name of the attention to train with, chosen once at the start.

    'sdpa' is PyTorch's own choice, FlashAttention-2 on CUDA in bf16 or fp16. Documents that don't see each other
    want a kernel for sequences of different lengths: FlashAttention-3 or -2 where their packages are installed,
    PyTorch's own (2.10 and later), or FlexAttention; elsewhere 'sdpa' with a boolean mask.
    """
    if not (doc_mask and device.startswith("cuda") and dtype in ("bfloat16", "float16")) or dropout:
        return "sdpa"
    if torch.cuda.get_device_capability(device) >= (8, 0):  # older ones than Ampere have no FlashAttention
        for package in ("flash_attn_interface", "flash_attn", "torch.nn.attention.varlen"):
            if importlib.util.find_spec(package):
                return package
    return "flex" if compiled else "sdpa"


@functools.cache
def _varlen(package):
    """attention(q, k, v, ends, longest): causal within segments of (tokens, heads, head_dim) that end at `ends`."""
    module = importlib.import_module(package)
    if package != "torch.nn.attention.varlen":
        def flash(q, k, v, ends, longest):
            y = module.flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)
            return y[0] if isinstance(y, tuple) else y
        return flash
    known = inspect.signature(module.varlen_attn).parameters  # they changed between torch 2.10 and 2.13
    options = dict(window_size=(-1, 0)) if "window_size" in known else dict(is_causal=True)
    if "enable_gqa" in known:
        options["enable_gqa"] = True

    def varlen(q, k, v, ends, longest):
        if "enable_gqa" not in known and q.shape[1] != k.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        return module.varlen_attn(q, k, v, ends, ends, longest, longest, **options)
    return varlen


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020), gate and up in one matrix, or GPT-2's two layers with GELU."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.up = nn.Linear(config.n_embd, config.ffn_dim * (2 if self.gated else 1), bias=config.bias)
        self.down = nn.Linear(config.ffn_dim, config.n_embd, bias=config.bias)
        if self.gated:
            self.up.weight.parts = [config.ffn_dim] * 2  # gate, up: two matrices to Muon

    def forward(self, x):
        if self.gated:
            gate, up = self.up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm, self.attn = make_norm(config), Attention(config, layer)
        self.mlp_norm, self.mlp = make_norm(config), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, mask=None, cache=None):
        x = x + self.drop(self.attn(self.attn_norm(x), rope, mask, cache))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class KVCache:
    """Keys and values of every token so far, allocated once. `pad` (B,) counts the padding tokens at the
    left of each row, where prompts of different lengths share a batch; None where there are none."""

    def __init__(self, config, batch, length, device, dtype, pad=None):
        shape = (config.n_layer, batch, config.n_kv_head, length, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.start, self.pad, self.layer = 0, pad, 0

    def extend(self, k, v):
        """Stores one layer's new keys and values (B, n_kv_head, T, head_dim); returns all so far."""
        end = self.start + k.shape[2]
        self.k[self.layer, :, :, self.start:end] = k
        self.v[self.layer, :, :, self.start:end] = v
        k, v = self.k[self.layer, :, :, :end], self.v[self.layer, :, :, :end]
        self.layer += 1
        return k, v

    def advance(self, tokens):
        self.start, self.layer = self.start + tokens, 0

    def positions(self, tokens):
        """Positions (tokens,) or (B, tokens), and the mask that padding and later tokens ask for."""
        positions = torch.arange(self.start, self.start + tokens, device=self.k.device)
        keys = torch.arange(self.start + tokens, device=self.k.device)
        if self.pad is None:
            # from an empty cache plain causal attention is right, and so is one query that sees all
            return positions, None if tokens == 1 or not self.start else (keys <= positions[:, None])[None, None]
        seen = (keys <= positions[:, None]) & (keys >= self.pad[:, None, None])
        seen = seen | (keys == positions[:, None])  # padding sees itself: a row without any key would be NaN
        return (positions - self.pad[:, None]).clamp(min=0), seen[:, None]


# -----------------------------------------------------------------------------
# the model

class GPT(nn.Module):
    """A decoder-only transformer. `grad_checkpoint=True` on the module trades time for memory."""

    config_class = GPTConfig  # what from_pretrained makes of a config.json

    def __init__(self, config):
        super().__init__()
        self.config, self.grad_checkpoint = config, False
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_embed = nn.Embedding(config.max_positions, config.n_embd) if config.pos == "learned" else None
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

    @torch.no_grad()
    def init_weights(self):
        c, drawn = self.config, set()
        for name, module in self.named_modules():  # parameters that are added elsewhere keep the values given there
            if not isinstance(module, (nn.Linear, nn.Embedding)) or module.weight in drawn:
                continue
            std = 1.0 if c.unit_embed and name == "embed" else c.init_std
            if c.scale_residual and name.endswith(("proj", "down")):
                std /= math.sqrt(2 * c.n_layer)  # GPT-2, section 2.3
            if c.init == "normal":
                nn.init.normal_(module.weight, std=std)
            else:
                nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
            drawn.add(module.weight)  # a tied head is the embedding
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        if c.unit_embed:
            # Embeddings of std 1 let a tiny model learn to copy names; the gain keeps the logits of a tied
            # head at the size they would have had, without leaving Llama's layout
            nn.init.constant_(self.norm.weight, c.n_embd ** -0.5)

    def set_runtime(self, block_size, dropout):
        """What a model that was loaded may be trained with, whatever it was trained with before."""
        self.config.block_size, self.config.dropout = min(block_size, self.config.max_positions), dropout
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            elif isinstance(module, Attention):
                module.dropout = dropout

    @torch.no_grad()
    def grow(self, vocab_size):
        """More rows for embedding and head, where a tokenizer got new tokens: each begins as the mean of the old."""
        for module in {id(m): m for m in (self.embed, self.head)}.values():
            old = module.weight
            mean = old.mean(dim=0, keepdim=True).expand(vocab_size - old.shape[0], -1)
            module.weight = nn.Parameter(torch.cat([old, mean]))
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.embed.num_embeddings = self.head.out_features = self.config.vocab_size = vocab_size

    def n_params(self):
        """Unique parameters: a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def hidden(self, idx, docs=None, cache=None):
        """(B, T) ids -> (B, T, n_embd), what the head reads."""
        if cache is not None:
            positions, mask = cache.positions(idx.shape[1])
        elif docs is not None:
            positions, mask = docs
        else:
            positions, mask = slice(0, idx.shape[1]), None
        x = self.embed(idx)
        if self.config.embed_scale:
            x = x * math.sqrt(self.config.n_embd)
        rope = None
        if self.pos_embed is not None:
            x = x + self.pos_embed.weight[positions]
        else:
            dtype = _compute_dtype(x)
            rope = self.cos[positions].unsqueeze(-2).to(dtype), self.sin[positions].unsqueeze(-2).to(dtype)
        x = self.drop(x)
        for block in self.blocks:
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        if cache is not None:
            cache.advance(idx.shape[1])
        return self.norm(x)

    def forward(self, idx, targets=None, docs=None, per_token=False, temperature=1.0):
        """Token ids (B, T) -> (logits of every position, None), or with targets (B, T) -> (None, loss):
        the mean of -log p over targets that are not -1, and 0 where there is none.

        `docs` (see `documents`) keeps the documents of a window apart. `per_token` gives log p of each target,
        (B, T), 0 where it is -1, in place of the loss, as it is sampled at `temperature`.
        """
        if idx.shape[1] > self.config.max_positions:
            raise UserError(f"{idx.shape[1]} tokens are beyond max_positions={self.config.max_positions}")
        x = self.hidden(idx, docs)
        if targets is None:
            return self.head(x).float(), None
        if per_token:
            x = x / temperature if temperature != 1 else x
            return None, token_log_probs(x.flatten(0, 1), self.head.weight, targets.flatten()).view(idx.shape)
        return None, linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten())

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=None, stop=(), pad=None,
               min_p=0.0, repetition_penalty=1.0):
        """Yields the next token of every row, a tensor (B,), at most max_new_tokens times.

        idx (B, T): prompts; pad (B,): how many tokens at the left of each row are padding. Row r draws from
        a stream of its own seeded with seed + r, or seed[r] of a list, so a text does not depend on its
        neighbours (in bfloat16 rounding still lets it: a batch is summed in another order). A row that has
        produced a token of `stop` repeats it; when all have, it ends. temperature 0 is greedy.
        repetition_penalty (CTRL, Keskar et al. 2019, section 4.1) makes less likely what a row already holds,
        its prompt included. Past max_positions the context slides: its older half is dropped and the rest
        read anew.
        """
        (B, T), limit, device = idx.shape, self.config.max_positions, idx.device
        draws = torch.stack([torch.rand(max_new_tokens, generator=_generator(seed, r)) for r in range(B)], dim=1)
        draws, stop = draws.to(device), torch.tensor(list(stop), dtype=idx.dtype, device=device)
        idx = torch.cat([idx, idx.new_zeros(B, max_new_tokens)], dim=1)  # prompts, and room for what follows
        done = torch.zeros(B, dtype=torch.bool, device=device)
        pad = None if pad is None or not pad.any() else pad.to(device)  # without it there is no mask to pay for
        seen = None
        if repetition_penalty != 1:
            seen = torch.zeros(B, self.config.vocab_size, dtype=torch.bool, device=device)
            for row, ids in enumerate(idx[:, :T]):
                seen[row, ids if pad is None else ids[pad[row]:]] = True
        cache, new = None, idx[:, :T]
        training, _ = self.training, self.eval()
        try:
            for step, end in enumerate(range(T, T + max_new_tokens)):
                if cache is None or cache.start + 1 > limit:
                    new = idx[:, :end] if end <= limit else idx[:, end - (limit + 1) // 2:end]
                    left = None if pad is None else (pad - (end - new.shape[1])).clamp(min=0)
                    room = min(limit, new.shape[1] + max_new_tokens - step)
                    cache = KVCache(self.config, B, room, device, _compute_dtype(self.embed.weight), left)
                logits = self.head(self.hidden(new, cache=cache)[:, -1]).float()
                if seen is not None:
                    worse = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
                    logits = torch.where(seen, worse, logits)
                token = sample_token(logits, draws[step], temperature, top_k, top_p, min_p)
                if len(stop):
                    token = torch.where(done, idx[:, end - 1], token)
                    done = done | torch.isin(token, stop)
                if seen is not None:
                    seen.scatter_(1, token[:, None], True)
                yield token
                if len(stop) and done.all():
                    return
                idx[:, end] = token
                new = idx[:, end:end + 1]
        finally:
            self.train(training)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=None, stop=(), pad=None,
                 min_p=0.0, repetition_penalty=1.0):
        """idx (B, T) continued: (B, T + at most max_new_tokens). The arguments are those of `stream`."""
        tokens = list(self.stream(idx, max_new_tokens, temperature, top_k, top_p, seed, stop, pad, min_p,
                                  repetition_penalty))
        return torch.cat([idx, torch.stack(tokens, dim=1)], dim=1) if tokens else idx

    @classmethod
    def from_pretrained(cls, directory):
        """The model in a Hugging Face directory, ours or theirs: Llama, SmolLM3, Qwen3, GPT-2, nanosmol."""
        return _load_hf(cls, directory)

    def save_pretrained(self, directory, hf_layout=True, generation=None, state=None):
        """Writes config.json, model.safetensors (float32) and generation_config.json.

        `generation` goes into generation_config.json (eos_token_id and the like). `state` is a state dict to
        write in place of the module's own: a copy made earlier, while training goes on. `hf_layout=False`
        declares that the maths is no longer a known architecture's.
        """
        _save_hf(self.config, self.state_dict() if state is None else state, directory, hf_layout, generation or {})


def _compute_dtype(x):
    """The dtype in which matrices are multiplied here and now."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _generator(seed, row):
    if seed is None:
        seed = int(torch.randint(2 ** 62, ()))
    return torch.Generator().manual_seed(seed + row if isinstance(seed, int) else seed[row])


def sample_token(logits, draw, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One token a row from logits (B, V), given a uniform number a row, draw (B,).

    top_k keeps the k likeliest (0: all), top_p the fewest that hold that much probability (nucleus,
    Holtzman et al. 2020), min_p those at least that many times as likely as the likeliest (Nguyen et al.
    2024). The draw is inverted through the cumulative sum in the order of the ids: same draw, same token, and
    a rounding error moves a boundary by as little; ordered by likelihood, it would make equals change places.
    """
    if temperature < 1e-5:  # 0, or what float32 can't divide by
        return logits.argmax(dim=-1)
    ids, logits = None, logits / temperature
    if top_k and top_k < logits.shape[-1]:  # all that follows is done on k numbers in place of V
        ids = logits.topk(top_k, sorted=False).indices.sort().values
        logits = logits.gather(-1, ids)
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= max(top_p, 1e-9)  # the likeliest token always stays
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    total = probs.double().cumsum(dim=-1)
    token = torch.searchsorted(total, draw[:, None].double() * total[:, -1:], right=True) \
        .clamp(max=logits.shape[-1] - 1)
    return (token if ids is None else ids.gather(-1, token))[:, 0]


def pack_weights(model):
    """Lays out the linear layers of a finished model as oneDNN reads them fastest on a CPU: bfloat16
    generation took 0.7 of the time. Each weight is held twice, and a model so packed is not for training.
    torch.compile does the same when it freezes a model; these are the two operators that it calls.
    """
    reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    if reorder is None or model.embed.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return model
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight, bias = reorder(module.weight.detach(), None), module.bias
            module.forward = functools.partial(torch.ops.mkldnn._linear_pointwise.default, W=weight, B=bias,
                                               attr="none", scalars=[], algorithm="")
    return model


# -----------------------------------------------------------------------------
# documents that don't see each other

class Segments(typing.NamedTuple):
    ends: torch.Tensor       # (documents + 1,) int32: 0, and where each document of the flattened batch ends
    kernel: typing.Callable  # see _varlen


class Documents(typing.NamedTuple):
    positions: torch.Tensor  # (B, T): restart at 0 with each document
    mask: typing.Any         # boolean (B, 1, T, T), a BlockMask of FlexAttention, or Segments


def documents(idx, eos_id, attention="sdpa"):
    """Where the documents packed in windows idx (B, T) lie: each ends with its eos_id.

    Attention becomes block-diagonal and positions restart, so that a document's logits are those it
    would have alone. `attention` is what pick_attention chose.
    """
    B, T = idx.shape
    ends = idx == eos_id
    where = torch.arange(T, device=idx.device).expand(B, T)
    first = torch.ones_like(ends)
    first[:, 1:] = ends[:, :-1]  # an end-of-text token still belongs to the text it ends
    positions = where - (where * first).cummax(dim=1).values
    doc = first.cumsum(dim=1)
    if attention == "sdpa":
        mask = ((doc[:, :, None] == doc[:, None, :]) & (where[:, :, None] >= where[:, None, :]))[:, None]
    elif attention == "flex":
        from torch.nn.attention.flex_attention import create_block_mask
        mask = create_block_mask(lambda b, h, q, k: (q >= k) & (doc[b, q] == doc[b, k]), B, None, T, T,
                                 device=idx.device)
    else:  # a window's first token begins a document too, so none crosses from row to row
        starts = first.flatten().nonzero()[:, 0].int()
        mask = Segments(F.pad(starts, (0, 1), value=B * T), _varlen(attention))
    return Documents(positions, mask)


# -----------------------------------------------------------------------------
# loss

LOGITS_IN_A_CHUNK = {"cuda": 2 ** 29, "cpu": 2 ** 26}  # as many as one product of matrices makes
LOGITS_IN_CACHE = 2 ** 19  # as many as a CPU turns into probabilities at a time, in float32


class _LinearCrossEntropy(torch.autograd.Function):
    """-log softmax(x @ weight.T)[target], summed. The logits exist one chunk of rows at a time, and
    their gradient is taken at once while they do: at 49,152 tokens of vocabulary whole logits would
    outweigh everything else in memory, and computing them again would cost a third more."""

    @staticmethod
    def forward(ctx, x, weight, targets, dtype):
        x_low, w_low = x.to(dtype), weight.to(dtype)
        need_x, need_w = ctx.needs_input_grad[:2]
        total = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x_low) if need_x else None
        grad_w = None
        rows = max(128, LOGITS_IN_A_CHUNK["cuda" if x.is_cuda else "cpu"] // weight.shape[0])
        # torch.compile blocks a softmax itself, and would unroll the inner loop
        whole = x.device.type != "cpu" or torch.compiler.is_compiling()
        block = rows if whole else max(1, LOGITS_IN_CACHE // weight.shape[0])
        for lo in range(0, x.shape[0], rows):
            part, target = x_low[lo:lo + rows], targets[lo:lo + rows]
            valid = target >= 0
            target = target.clamp(min=0)[:, None]
            logits = part @ w_low.T
            for i in range(0, len(part), block):
                some, t, v = logits[i:i + block], target[i:i + block], valid[i:i + block]
                log_p = some.float().log_softmax(dim=-1)
                total = total - (log_p.gather(1, t)[:, 0] * v).sum()  # in place, torch 2.11 compiles it to no gradient
                if need_x or need_w:
                    grad = log_p.exp_()  # d(-log p_target)/d logits = p - onehot(target)
                    grad.scatter_add_(1, t, torch.full_like(t, -1, dtype=grad.dtype))
                    some.copy_(grad.mul_(v[:, None]))  # in the place of the logits
            if need_x:
                grad_x[lo:lo + rows] = logits @ w_low
            if need_w:
                share = logits.T @ part
                grad_w = share.to(weight.dtype) if grad_w is None else grad_w.add_(share)
        ctx.save_for_backward(grad_x, grad_w)
        ctx.x_dtype = x.dtype
        return total

    @staticmethod
    def backward(ctx, grad_out):
        grad_x, grad_w = ctx.saved_tensors
        return (None if grad_x is None else grad_x.to(ctx.x_dtype) * grad_out,
                None if grad_w is None else grad_w * grad_out, None, None)


def linear_cross_entropy(x, weight, targets):
    """Mean cross-entropy of logits x @ weight.T against targets, without ever holding the logits.

    x (N, n_embd), weight (V, n_embd), targets (N,), -1 ignored. A mean over no target is 0, not NaN.
    """
    if not torch.is_grad_enabled():  # an autograd function is told of requires_grad, not of no_grad
        x, weight = x.detach(), weight.detach()
    total = _LinearCrossEntropy.apply(x, weight, targets, _compute_dtype(x))
    return total / (targets >= 0).sum().clamp(min=1)


def token_log_probs(x, weight, targets):
    """log softmax(x @ weight.T)[target] of each row: x (N, n_embd), targets (N,) -> (N,), 0 where a target is -1.

    What losses over whole answers are made of. The logits are chunked as above, and made again in the backward
    pass, where alone each row's share of the loss is known.
    """
    def chunk(x, weight, targets):
        logits = (x.to(dtype) @ weight.to(dtype).T).float()
        return -F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")

    dtype = _compute_dtype(x)
    rows = max(128, LOGITS_IN_A_CHUNK["cuda" if x.is_cuda else "cpu"] // weight.shape[0])
    return torch.cat([checkpoint(chunk, x[lo:lo + rows], weight, targets[lo:lo + rows], use_reentrant=False)
                      for lo in range(0, x.shape[0], rows)])


def preference_loss(kind, chosen, rejected, beta=0.1, label_smoothing=0.0):
    """The loss of each preference pair (B,) from log-ratios (B,): of each answer, log p under the policy less
    log p under the reference, summed over its tokens.

    'sigmoid': DPO (Rafailov et al. 2023, eq. 7), conservative with label_smoothing; 'apo_zero', 'apo_down': Anchored
    Preference Optimization (D'Oosterlinck et al. 2024), which raises the chosen and lowers the rejected, or lowers
    both, the rejected more.
    """
    if kind == "sigmoid":
        margin = beta * (chosen - rejected)
        return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    if kind == "apo_zero":
        return (1 - torch.sigmoid(beta * chosen)) + torch.sigmoid(beta * rejected)
    return torch.sigmoid(beta * chosen) + (1 - torch.sigmoid(beta * (chosen - rejected)))


def policy_loss(log_probs, old, advantages, clip_eps=0.2, reference=None, kl_coef=0.0):
    """The loss of each sampled token: the clipped policy gradient (PPO, Schulman et al. 2017, eq. 7; GRPO, Shao et al.
    2024, eq. 3), and with kl_coef the k3 estimate of the divergence from a reference (Schulman 2020).

    All (B, T): log_probs with a gradient, `old` those that the tokens were sampled under, `advantages` of the
    answer that each token belongs to.
    """
    ratio = (log_probs - old).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)
    if kl_coef:
        loss = loss + kl_coef * k3(log_probs, reference)
    return loss


def k3(log_probs, reference):
    """An unbiased, never negative estimate of KL(policy || reference) from tokens sampled under the policy."""
    return (reference - log_probs).exp() - (reference - log_probs) - 1


def group_advantages(rewards, scale=False):
    """Rewards (groups, group_size) -> advantages within each group: less its mean, with `scale` over its deviation.

    A group whose rewards are all equal teaches nothing: exactly 0. That is decided on the rewards, because a mean of
    equal numbers is rounded and leaves advantages of 1e-8, which Muon would turn into a whole step.
    """
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    return advantages.masked_fill(equal, 0.0)


# -----------------------------------------------------------------------------
# stages: the loss of a micro-batch of pairs or of completions (a Batch of prepare.py), and what is measured beside it.
# `policy` is the model that is trained, `reference` the frozen model that it began as.

def answer_log_probs(model, batch, temperature=1.0):
    """log p of each target of a batch, (B, T), 0 where there is none."""
    return model(batch.x, batch.y, per_token=True, temperature=temperature)[1]


def pair_loss(policy, reference, batch, kind="sigmoid", beta=0.1, label_smoothing=0.0):
    """(mean loss, metrics) of preference pairs: the first half of the batch holds the chosen answers, the second half
    the rejected. `rewards/...` are the implicit rewards of Rafailov et al. 2023, section 4: beta times the log-ratio."""
    with torch.no_grad():
        before = answer_log_probs(reference, batch).sum(dim=1)  # (2 pairs,)
    log_ratios = answer_log_probs(policy, batch).sum(dim=1) - before
    chosen, rejected = log_ratios.chunk(2)
    loss = preference_loss(kind, chosen, rejected, beta, label_smoothing).mean()
    chosen, rejected = chosen.detach(), rejected.detach()
    return loss, {"rewards/chosen": beta * chosen.mean(), "rewards/rejected": beta * rejected.mean(),
                  "rewards/margins": beta * (chosen - rejected).mean(),
                  "rewards/accuracies": (chosen > rejected).float().mean()}


def completion_loss(policy, reference, batch, temperature=1.0, clip_eps=0.2, kl_coef=0.0):
    """(mean loss over the completions' tokens, metrics) of sampled completions with `batch.advantages` (B,).

    The log-probabilities that they were sampled under, and with kl_coef those under the reference, are made at the first
    call for a batch and kept on it, for the further updates on the same rollouts.
    """
    log_probs = answer_log_probs(policy, batch, temperature)
    if not hasattr(batch, "old_log_probs"):
        batch.old_log_probs, batch.reference_log_probs = log_probs.detach(), None
        if kl_coef:
            with torch.no_grad():
                batch.reference_log_probs = answer_log_probs(reference, batch, temperature)
    counts = (batch.y >= 0).float()
    advantages = batch.advantages[:, None].expand_as(log_probs)
    losses = policy_loss(log_probs, batch.old_log_probs, advantages, clip_eps, batch.reference_log_probs, kl_coef)
    targets = counts.sum().clamp(min=1)
    return (losses * counts).sum() / targets, {"policy/entropy": -(batch.old_log_probs * counts).sum() / targets}


def completion_measures(policy, reference, batch, temperature=1.0):
    """{name: (mean over the completions' tokens, how many)}: entropy, and the KL divergence from the reference (k3)."""
    log_probs = answer_log_probs(policy, batch, temperature)
    divergence = k3(log_probs, answer_log_probs(reference, batch, temperature))
    counts = (batch.y >= 0).float()
    targets = counts.sum().clamp(min=1)
    return {"policy/entropy": (-(log_probs * counts).sum() / targets, targets),
            "policy/kl": ((divergence * counts).sum() / targets, targets)}


def sample_completions(model, prompts, seeds, max_new_tokens, temperature, stop):
    """[(ids, ended)]: a completion of each prompt (a list of ids), its last token one of `stop` if it ended. Each draws
    from a seed of its own, so it does not depend on the other prompts of the batch."""
    device = model.embed.weight.device
    longest = max(len(ids) for ids in prompts)
    idx = torch.tensor([[stop[0]] * (longest - len(ids)) + ids for ids in prompts], device=device)
    pad = torch.tensor([longest - len(ids) for ids in prompts], device=device)
    rows = model.generate(idx, max_new_tokens, temperature, seed=seeds, stop=stop, pad=pad)[:, longest:].tolist()
    completions = []
    for ids in rows:
        end = next((i for i, token in enumerate(ids) if token in stop), None)
        completions.append((ids if end is None else ids[:end + 1], end is not None))
    return completions


def yes_probability(model, ids, yes, no):
    """A model's probability of the token `yes` over `yes` and `no`, after the prompt `ids` (a list)."""
    logits = model(torch.tensor([ids], device=model.embed.weight.device))[0][0, -1]
    return logits[[yes, no]].softmax(0)[0].item()


# -----------------------------------------------------------------------------
# optimizers

# Polar Express (Amsel et al. 2025), table for lower bound 1e-3: the best odd quintic for what interval
# the one before has left the singular values in; a safety factor of 1.01 keeps rounding from diverging.
_POLAR_EXPRESS = [(a / s, b / s ** 3, c / s ** 5) for (a, b, c), s in zip([
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
], [1.01] * 4 + [1.0])]


def orthogonalize(G, dtype=torch.bfloat16):
    """The nearest (semi-)orthogonal matrices to G (N, m, n): U V^T of each SVD, roughly.

    Each iteration is X <- (a I + b A + c A A) X with A = X X^T, or from the other side where X is tall: it moves
    singular values towards 1 and leaves singular vectors alone. Five leave every value above 0.001 of the norm
    within 0.13 of 1.
    """
    tall = G.shape[1] > G.shape[2]
    norm = torch.linalg.vector_norm(G, dim=(1, 2), keepdim=True, dtype=torch.float32)
    X = G.to(dtype, copy=True).mul_(1 / (norm * 1.02 + 1e-6))
    for a, b, c in _POLAR_EXPRESS:
        A = X.mT @ X if tall else X @ X.mT
        B = A * c  # a I + (b I + c A) A: sums on a diagonal, where baddbmm would pass over all of X once more
        B.diagonal(dim1=1, dim2=2).add_(b)
        B = B @ A
        B.diagonal(dim1=1, dim2=2).add_(a)
        X = X @ B if tall else B @ X
    return X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), for the hidden matrices of a network.

    All matrices of one shape are stepped at once: stack, one batched iteration, unstack. A parameter
    with `.parts` holds several matrices stacked along its rows (q, k, v; gate, up), each on its own here.
    The rate is multiplied by sqrt(max(1, rows / columns)), so that updates change outputs alike whatever the shape.
    Across processes each orthogonalises its share and the results are gathered.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, cautious=False, dtype=torch.bfloat16):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, cautious=cautious))
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
                members = [m for m in members if m[0].grad is not None]
                if members:
                    self._step_stack(group, shape, members)

    def _step_stack(self, group, shape, members):
        rows, columns = shape
        grad = torch.stack([p.grad[row:row + rows] for p, row in members])
        state = self.state[members[0][0]].setdefault(f"{rows}x{columns}", {})
        if not state:
            state["momentum"] = torch.zeros_like(grad)
        momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
        update = self._orthogonalize(grad.lerp_(momentum, group["momentum"]))  # Nesterov
        params = [p.data[row:row + rows] for p, row in members]
        updates = list(update.to(params[0].dtype).unbind())
        decay = group["lr"] * group["weight_decay"]
        if decay and group["cautious"]:
            for p, u in zip(params, updates):  # decay only where the update already pulls towards 0
                p.mul_(1 - decay * (p * u > 0))
        elif decay:
            torch._foreach_mul_(params, 1 - decay)
        torch._foreach_add_(params, updates, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    def _orthogonalize(self, stack):
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return orthogonalize(stack, self.dtype)
        world, rank = dist.get_world_size(), dist.get_rank()
        share = -(-len(stack) // world)
        mine = stack[rank * share:(rank + 1) * share]
        out = torch.zeros(share, *stack.shape[1:], dtype=self.dtype, device=stack.device)
        if len(mine):
            out[:len(mine)] = orthogonalize(mine, self.dtype)
        every = torch.empty(world * share, *stack.shape[1:], dtype=self.dtype, device=stack.device)
        dist.all_gather_into_tensor(every, out)
        return every[:len(stack)]


def make_optimizers(model, optimizer="muon", learning_rate=3e-4, muon_lr=0.02, muon_momentum=0.95,
                    weight_decay=0.0, betas=(0.9, 0.95), cautious=False, decay_embeddings=False,
                    muon_dtype=torch.bfloat16):
    """[AdamW] or [AdamW, Muon]: Muon takes the matrices inside the blocks, AdamW everything else.

    Gains and biases are never decayed, embeddings and head only with `decay_embeddings` (as nanoGPT does).
    Each group carries `base_lr`, which a schedule multiplies.
    """
    if optimizer not in ("muon", "adamw"):
        raise UserError(f"optimizer={optimizer!r}: expected 'muon' or 'adamw'")
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    hidden, outer, vectors, others = [], [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2:
            vectors.append(p)
        elif p.dim() > 2:
            others.append(p)
        elif name.startswith("blocks.") and id(p) not in tables:
            hidden.append(p)
        else:
            outer.append(p)
    groups = [dict(params=vectors, weight_decay=0.0),
              dict(params=outer, weight_decay=weight_decay if decay_embeddings else 0.0)]
    if optimizer == "adamw":
        groups.append(dict(params=hidden, weight_decay=weight_decay))
    groups.append(dict(params=others, weight_decay=weight_decay))  # none in the model as it comes
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=True)]
    if optimizer == "muon" and hidden:
        optimizers.append(Muon(hidden, muon_lr, muon_momentum, weight_decay, cautious, muon_dtype))
    for opt in optimizers:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def schedule_factor(step, schedule, warmup_iters, decay_iters, floor=0.0, decay_frac=0.2, decay_shape="linear"):
    """What multiplies every base rate at `step` (0 is the first): linear warm-up, then by `schedule`
    'constant', 'cosine' (nanoGPT's) or 'wsd' (stable until the last decay_frac of decay_iters, then down,
    linear or '1-sqrt', Hägele et al. 2024), to `floor` = min_lr / learning_rate at decay_iters and after."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return 1.0
    if step >= decay_iters:
        return floor
    if schedule == "cosine":
        progress = (step - warmup_iters) / max(1, decay_iters - warmup_iters)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    begin = max(warmup_iters, decay_iters - round(decay_frac * decay_iters))
    if step < begin:
        return 1.0
    progress = (step - begin) / max(1, decay_iters - begin)
    return floor + (1 - floor) * (1 - (math.sqrt(progress) if decay_shape == "1-sqrt" else progress))


def why_harmful(loss, grad_norm, recent, spike_z=12.0, scaled=False):
    """Why an update must not be taken: '' for a good one, else 'not finite', 'gradient is 0', 'loss spike', 'gradient spike'.

    A spike is more than spike_z deviations (0: never) above the median of `recent`, the (loss, log of the gradient norm) of
    earlier updates, once there are 32. 1.4826 times the median absolute deviation estimates a standard deviation; the
    floors keep a run with little noise from skipping ordinary steps. `scaled`: with float16 gradients may overflow, and its
    scaler skips those updates itself.
    """
    if not math.isfinite(loss):
        return "not finite"
    if not math.isfinite(grad_norm):
        return "" if scaled else "not finite"
    if grad_norm == 0:
        return "gradient is 0"
    if not spike_z or len(recent) < 32:
        return ""
    for i, value, floor, why in ((0, loss, 0.03, "loss spike"), (1, math.log(grad_norm), 0.2, "gradient spike")):
        earlier = sorted(pair[i] for pair in recent)
        median = earlier[len(earlier) // 2]
        deviation = 1.4826 * sorted(abs(e - median) for e in earlier)[len(earlier) // 2]
        if value - median > spike_z * max(deviation, floor):
            return why
    return ""


# -----------------------------------------------------------------------------
# the machine

def set_up_device(device):
    """The device to train on, ready for it: of torchrun's processes each takes a GPU of its own; TF32 is on."""
    device = pick_device(device)
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if device == "cpu":
        keep_memory()
    return device


def undo_compile(model):
    """After model.compile() failed: the model runs as it did before."""
    import torch._dynamo
    model._compiled_call_impl = None
    torch._dynamo.reset()



def pick_device(device):
    """'auto' -> the fastest that is here. UserError for one that is not."""
    if device != "auto":
        try:
            kind, index = torch.device(device).type, torch.device(device).index or 0
        except RuntimeError:
            kind = ""
        if kind not in ("cpu", "cuda", "mps"):
            raise UserError(f"device={device!r}: expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'")
        if kind == "cuda" and index >= torch.cuda.device_count() or kind == "mps" and not torch.backends.mps.is_available():
            raise UserError(f"device={device!r}: torch {torch.__version__} finds none here; 'auto' takes what there is")
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(dtype, device, config):
    """'auto' -> 'bfloat16' where the hardware multiplies it and there is enough to multiply: a CPU spends more
    on converting for a model narrower than 128 than it saves."""
    if dtype != "auto":
        return dtype
    enough = not device.startswith("cpu") or config.n_embd >= 128
    return "bfloat16" if multiplies_bf16(device) and enough else "float32"


def multiplies_bf16(device):
    """Whether the hardware does, so that bf16 is faster than float32 and not an emulation."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def pick_muon_dtype(dtype, device):
    """The dtype of Muon's iteration: bfloat16 where that is fast, unless training is in float32."""
    return torch.float32 if dtype == "float32" or not multiplies_bf16(device) else torch.bfloat16


def compile_pays(device_type, steps_left, seconds_a_step):
    """Whether what torch.compile saves in the steps left, a quarter, outweighs what it takes: about a minute on a GPU,
    where it is decided before any step was timed, and two on a CPU."""
    if device_type == "cuda":
        return steps_left >= 1000
    return device_type == "cpu" and steps_left * seconds_a_step / 4 > 120


def keep_memory():
    """glibc maps large buffers afresh and gives them back at every step; told to keep them, a small model's step on a
    CPU takes a twelfth less. Elsewhere it does nothing."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2 ** 31 - 1) or libc.mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD; the most that an old glibc takes
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass


# -----------------------------------------------------------------------------
# arithmetic

# name -> (peak bf16 FLOP/s without sparsity and GB of memory, by its data sheet; dollars an hour, about what
# clouds ask)
GPUS = {"B200": (2250e12, 180, 5.99), "H200": (989e12, 141, 3.59), "H100": (989e12, 80, 2.69),
        "A100": (312e12, 80, 1.49), "L40S": (362e12, 48, 0.86), "A40": (150e12, 48, 0.40), "L4": (121e12, 24, 0.43),
        "RTX 4090": (165e12, 24, 0.59), "RTX 3090": (71e12, 24, 0.43)}


def gpu_spec(name):
    """The row of GPUS that a GPU's name, such as 'NVIDIA A100-SXM4-80GB', belongs to; None for one that is not there."""
    return next((spec for gpu, spec in GPUS.items() if re.search(rf"\b{gpu}\b", name.upper())), None)


def flops_per_token(model):
    """Training FLOPs a token, forward and backward: 6 for each weight that multiplies, and 12 n_layer n_head
    head_dim T for attention (PaLM, appendix B; it counts the half that causal kernels skip)."""
    c = model.config
    looked_up = (0 if c.tie_embeddings else c.vocab_size * c.n_embd) + \
        (c.max_positions * c.n_embd if c.pos == "learned" else 0)
    return 6 * (model.n_params() - looked_up) + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size


def memory_estimate(model, batch_size, optimizer="muon", dtype="bfloat16", grad_checkpoint=False):
    """Bytes of training, by what they hold: exact for weights, gradients and optimizer, an estimate of what
    the backward pass keeps of the activations."""
    c, n = model.config, model.n_params()
    hidden = sum(p.numel() for k, p in model.named_parameters() if p.dim() == 2 and k.startswith("blocks."))
    low = 4 if dtype == "float32" else 2
    # of each block and token: both inputs of the residual stream and both norms in float32, then what the
    # matrices read and write: normed x twice, q k v and the heads' output, the MLP's four
    heads = (2 * c.n_head + 2 * c.n_kv_head) * c.head_dim
    block = 4 * 4 * c.n_embd + low * (2 * c.n_embd + 2 * heads + (4 if c.mlp == "swiglu" else 2) * c.ffn_dim)
    kept = (c.n_layer * 4 * c.n_embd + block) if grad_checkpoint else c.n_layer * block
    tokens = batch_size * c.block_size
    logits = min(tokens * c.vocab_size, LOGITS_IN_A_CHUNK["cuda"]) * (8 + low)  # as they are, in float32, and log p
    return {"weights": 4 * n, "gradients": 4 * n,
            "optimizer": 8 * n - (4 * hidden if optimizer == "muon" else 0), "activations": tokens * kept + logits}


def plan(config, vocab_size, gpu=""):
    """Prints what a run would take, for train.py --dry_run: parameters, FLOPs, tokens, memory, and on `gpu` (a name in
    GPUS) hours and dollars. `config` holds every key of train.py."""
    keys = {field.name: config[field.name] for field in dataclasses.fields(GPTConfig)}
    with torch.device("meta"):
        model = GPT(GPTConfig(**keys | {"vocab_size": vocab_size}))
    flops = flops_per_token(model)
    tokens_per_step = config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"]
    tokens = tokens_per_step * config["max_iters"]
    memory = memory_estimate(model, config["batch_size"], config["optimizer"], config["dtype"], config["grad_checkpoint"])
    print(f"parameters        {model.n_params():,}")
    print(f"FLOPs a token     {flops:.4g}")
    print(f"tokens a step     {tokens_per_step:,}")
    print(f"total tokens      {tokens:,} in {config['max_iters']:,} steps")
    for what, size in memory.items():
        print(f"{what:17} {size / 1e9:.2f} GB")
    if not gpu:
        return
    if not gpu_spec(gpu):
        raise UserError(f"gpu={gpu!r}: expected one of {', '.join(GPUS)}")
    peak, gigabytes, price = gpu_spec(gpu)
    price = config["gpu_cost_per_hour"] or price
    speed = peak * config["mfu"] / flops
    hours = tokens / speed / 3600
    print(f"on one {gpu.upper():10} {hours:,.1f} hours, ${hours * price:,.2f}, at {speed:,.0f} tok/s "
          f"({config['mfu']:.0%} of {peak / 1e12:.0f} TFLOP/s) and ${price:.2f} an hour")
    if sum(memory.values()) > 0.95 * gigabytes * 1e9:
        print(f"it won't fit {gigabytes} GB: halve batch_size and double gradient_accumulation_steps until it does (the "
              "tokens a step stay the same), or set grad_checkpoint=True")


# -----------------------------------------------------------------------------
# The Hugging Face layout: one table for each architecture, read in both directions. A new architecture
# is a new entry of ARCHITECTURES.

REQUIRED = object()  # in place of a default: a config.json without this key is refused

# What a key stands for that an architecture has no word for. A file never takes a value from GPTConfig's
# defaults: those are the toy run's.
NEUTRAL = dict(
    n_kv_head=0, head_dim=0, ffn_dim=0, dropout=0.0, bias=False, norm="rmsnorm", norm_eps=1e-5,
    mlp="swiglu", pos="rope", rope_theta=10000.0, nope_every=0, qk_norm=False, tie_embeddings=True,
    embed_scale=False, unit_embed=False, init="normal", init_std=0.02, scale_residual=True,
)  # fmt: skip
SHAPE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "max_positions")


class Architecture(typing.NamedTuple):
    model_class: str         # as transformers calls it
    maths: dict              # our keys that are built in; 0: the value that it follows
    keys: list               # (our key, their key, transformers' default)
    allowed: dict            # their options that change the maths -> the values that are ours, the default first
    extra: typing.Callable   # config -> what config.json holds beside `keys`
    block: str               # the prefix of a layer's tensors
    tensors: list            # (ours, theirs stacked along our rows, their rows, columns, leaves), see _tensor_names
    conv1d: bool = False     # matrices in blocks are stored transposed, and there are always biases


def _llama_extra(config):
    # transformers 5 reads rope_parameters; transformers 4, vLLM and llama.cpp read rope_theta
    return {"hidden_act": "silu", "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}


def _smollm3_extra(config):
    layers = [int((i + 1) % config.nope_every != 0) for i in range(config.n_layer)]
    return _llama_extra(config) | {"no_rope_layers": layers, "use_sliding_window": False, "pad_token_id": None}


def _gpt2_extra(config):
    dropout = {"resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout}
    return dropout | {"activation_function": "gelu_new"}


# fmt: off
_ANY = {  # options of every config.json of transformers
    "is_causal":            (True,),
    "is_encoder_decoder":   (False,),
    "add_cross_attention":  (False,),
    "per_layer_config":     (None, {}),
    "pruned_heads":         (None, {}),
    "quantization_config":  (None,),
}
_LLAMA_ALLOWED = _ANY | {
    "hidden_act":             ("silu", "swish"),
    "rope_type":              ("default",),
    "partial_rotary_factor":  (1,),
    "use_sliding_window":     (False,),
    "layer_types":            ("full_attention",),
}
_LLAMA_KEYS = [
    # ours              theirs                      transformers' default
    ("vocab_size",      "vocab_size",               REQUIRED),
    ("n_embd",          "hidden_size",              REQUIRED),
    ("n_layer",         "num_hidden_layers",        REQUIRED),
    ("n_head",          "num_attention_heads",      REQUIRED),
    ("n_kv_head",       "num_key_value_heads",      0),
    ("head_dim",        "head_dim",                 0),
    ("ffn_dim",         "intermediate_size",        REQUIRED),
    ("max_positions",   "max_position_embeddings",  2048),
    ("norm_eps",        "rms_norm_eps",             1e-6),
    ("rope_theta",      "rope_theta",               10000.0),
    ("bias",            "attention_bias",           False),
    ("tie_embeddings",  "tie_word_embeddings",      False),
    ("init_std",        "initializer_range",        0.02),
]
_MLP_BIAS = [("bias", "mlp_bias", False)]
_LLAMA_TENSORS = [
    # ours         theirs                                                    rows       columns      weight, bias
    ("embed",      "model.embed_tokens",                                     "vocab",   "width",     "w"),
    ("norm",       "model.norm",                                             "width",   "",          "w"),
    ("head",       "lm_head",                                                "vocab",   "width",     "w"),
    ("*attn_norm", "*input_layernorm",                                       "width",   "",          "w"),
    ("*attn.qkv",  "*self_attn.q_proj *self_attn.k_proj *self_attn.v_proj",  "q kv kv", "width",     "wb"),
    ("*attn.proj", "*self_attn.o_proj",                                      "width",   "q",         "wb"),
    ("*mlp_norm",  "*post_attention_layernorm",                              "width",   "",          "w"),
    ("*mlp.up",    "*mlp.gate_proj *mlp.up_proj",                            "ffn ffn", "width",     "wb"),
    ("*mlp.down",  "*mlp.down_proj",                                         "width",   "ffn",       "wb"),
]
_QK_NORM = [
    ("*attn.q_norm", "*self_attn.q_norm",                                    "head",    "",          "w"),
    ("*attn.k_norm", "*self_attn.k_norm",                                    "head",    "",          "w"),
]
_LLAMA_MATHS = dict(norm="rmsnorm", mlp="swiglu", pos="rope")
ARCHITECTURES = {
    "llama": Architecture(
        "LlamaForCausalLM", _LLAMA_MATHS | dict(qk_norm=False, nope_every=0), _LLAMA_KEYS + _MLP_BIAS,
        _LLAMA_ALLOWED, _llama_extra, "model.layers.", _LLAMA_TENSORS),
    "smollm3": Architecture(
        "SmolLM3ForCausalLM", _LLAMA_MATHS | dict(qk_norm=False, head_dim=0),
        [row for row in _LLAMA_KEYS if row[0] not in ("rope_theta", "tie_embeddings", "max_positions")] + _MLP_BIAS + [
            ("max_positions",   "max_position_embeddings",  32768),
            ("rope_theta",      "rope_theta",               2e6),
            ("tie_embeddings",  "tie_word_embeddings",      True),
            ("nope_every",      "no_rope_layer_interval",   4),
        ],
        _LLAMA_ALLOWED, _smollm3_extra, "model.layers.", _LLAMA_TENSORS),
    "qwen3": Architecture(
        "Qwen3ForCausalLM", _LLAMA_MATHS | dict(qk_norm=True, nope_every=0, bias=False),
        [row for row in _LLAMA_KEYS if row[0] not in ("head_dim", "max_positions")] + [
            ("head_dim",        "head_dim",                 128),
            ("max_positions",   "max_position_embeddings",  32768),
        ],
        _LLAMA_ALLOWED | {"attention_bias": (False,)}, _llama_extra, "model.layers.", _LLAMA_TENSORS + _QK_NORM),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        dict(norm="layernorm", mlp="gelu", pos="learned", qk_norm=False, nope_every=0, n_kv_head=0, head_dim=0),
        [
            ("vocab_size",      "vocab_size",               50257),
            ("max_positions",   "n_positions",              1024),
            ("n_embd",          "n_embd",                   768),
            ("n_layer",         "n_layer",                  12),
            ("n_head",          "n_head",                   12),
            ("ffn_dim",         "n_inner",                  0),
            ("norm_eps",        "layer_norm_epsilon",       1e-5),
            ("tie_embeddings",  "tie_word_embeddings",      True),
            ("init_std",        "initializer_range",        0.02),
        ],
        _ANY | {
            "activation_function":              ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"),
            "scale_attn_weights":               (True,),
            "scale_attn_by_inverse_layer_idx":  (False,),
        },
        _gpt2_extra, "transformer.h.",
        [
            ("embed",       "transformer.wte",  "vocab",     "width",  "w"),
            ("pos_embed",   "transformer.wpe",  "positions", "width",  "w"),
            ("norm",        "transformer.ln_f", "width",     "",       "wb"),
            ("head",        "lm_head",          "vocab",     "width",  "w"),
            ("*attn_norm",  "*ln_1",            "width",     "",       "wb"),
            ("*attn.qkv",   "*attn.c_attn",     "qkv",       "width",  "wb"),
            ("*attn.proj",  "*attn.c_proj",     "width",     "q",      "wb"),
            ("*mlp_norm",   "*ln_2",            "width",     "",       "wb"),
            ("*mlp.up",     "*mlp.c_fc",        "ffn",       "width",  "wb"),
            ("*mlp.down",   "*mlp.c_proj",      "width",     "ffn",    "wb"),
        ],
        conv1d=True),
}
# fmt: on


def architecture(config, state=None):
    """(model_type, obstacles): the Hugging Face architecture whose maths a config is, and no obstacles,
    or 'nanosmol' and a sentence for each key and tensor that no architecture has.

    With `state`, a state dict, its tensors are compared too: a parameter that was added to the model has no
    name in another library, and must not be left out of a checkpoint.
    """
    best = None
    for kind, arch in ARCHITECTURES.items():
        wrong = []
        for key, value in arch.maths.items():
            if key in FOLLOWS and value == 0:
                value = config.n_head if key == "n_kv_head" else config.n_embd / config.n_head
            if getattr(config, key) != value:
                wrong.append(f"{kind} has {key}={value!r}, not {getattr(config, key)!r}")
        if best is None or len(wrong) < len(best[1]):
            best = kind, wrong
    kind, obstacles = best
    for field in dataclasses.fields(config):
        if field.name in NEUTRAL or field.name in SHAPE:
            continue
        value, default = getattr(config, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value != default:
            obstacles.append(f"no architecture has the key {field.name}={value!r}")
    if state is not None and not obstacles:
        obstacles = _tensor_obstacles(config, kind, state)
    return ("nanosmol", obstacles) if obstacles else (kind, [])


def _tensor_obstacles(config, kind, state):
    obstacles = []
    expected = {ours: (theirs, optional) for ours, theirs, _, optional in _tensor_names(config, kind)}
    tied = config.tie_embeddings and "head.weight" in state
    if tied and not torch.equal(state["head.weight"], state["embed.weight"]):
        obstacles.append(f"{kind} with tie_embeddings=True has no other head.weight than embed.weight")
    for name, tensor in state.items():
        if name == "head.weight" and config.tie_embeddings:
            continue
        if name not in expected:
            obstacles.append(f"{kind} has no tensor {name}")
            continue
        shapes = [shape for _, shape in expected[name][0]]
        shape = (sum(s[0] for s in shapes), *shapes[0][1:])
        if tuple(tensor.shape) != shape:
            obstacles.append(f"{kind} has {name} in the shape {shape}, not {tuple(tensor.shape)}")
    for name, (_, optional) in expected.items():
        if name not in state and not optional and not (name == "head.weight" and config.tie_embeddings):
            obstacles.append(f"{kind} has a tensor {name}, this model has none")
    return obstacles


def _tensor_names(config, kind):
    """[(our name, [(their name, its shape in our orientation)], transposed there, optional here)]"""
    arch, c = ARCHITECTURES[kind], config
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    sizes = dict(vocab=c.vocab_size, positions=c.max_positions, width=c.n_embd, q=q, kv=kv, qkv=q + 2 * kv,
                 head=c.head_dim, ffn=c.ffn_dim)
    names = []
    prefixes = [("", "")] + [(f"blocks.{i}.", f"{arch.block}{i}.") for i in range(c.n_layer)]
    for our_prefix, their_prefix in prefixes:
        for ours, theirs, rows, columns, leaves in arch.tensors:
            if ours.startswith("*") != bool(our_prefix):
                continue
            rows = [sizes[row] for row in rows.split()]
            pieces = [their_prefix + name.lstrip("*") for name in theirs.split()]
            module = our_prefix + ours.lstrip("*")
            width = [sizes[columns]] if columns else []
            shapes = [(f"{piece}.weight", (row, *width)) for piece, row in zip(pieces, rows)]
            names.append((f"{module}.weight", shapes, arch.conv1d and bool(columns and our_prefix), False))
            if leaves == "wb" and (c.bias or arch.conv1d):
                shapes = [(f"{piece}.bias", (row,)) for piece, row in zip(pieces, rows)]
                names.append((f"{module}.bias", shapes, False, not c.bias))
    return names


def _to_hf_config(config, kind):
    """config.json for a config. Keys that the architecture has no word for stand under 'nanosmol'."""
    values = dataclasses.asdict(config)
    if kind == "nanosmol":
        return {"model_type": "nanosmol", "architectures": ["NanosmolForCausalLM"], "dtype": "float32",
                "nanosmol": values}
    arch = ARCHITECTURES[kind]
    hf = {"model_type": kind, "architectures": [arch.model_class], "dtype": "float32", "use_cache": True}
    hf |= {theirs: values[ours] for ours, theirs, _ in arch.keys}
    hf |= arch.extra(config)
    hf["tie_word_embeddings"] = config.tie_embeddings and not config.embed_scale
    read_back = dataclasses.asdict(_from_hf_config(hf, "config.json", type(config)))
    hf["nanosmol"] = {key: value for key, value in values.items() if read_back[key] != value}
    return hf


def _from_hf_config(hf, where, config_class=None):
    """The config that a config.json describes; UserError where it asks for maths that is not here."""
    config_class = config_class or GPTConfig
    kind, ours = hf.get("model_type"), hf.get("nanosmol", {})
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for key in ours:
        if key not in fields:
            raise UserError(f"{where}: the key {key!r} under 'nanosmol' is not one of this model.py's GPTConfig; "
                            "it was written by a model.py that has it")
    if kind == "nanosmol":
        for key in fields:
            if key not in ours and (key in NEUTRAL or key in SHAPE):
                raise KeyError(key)
        return config_class(**ours)
    if kind not in ARCHITECTURES:
        raise UserError(f"{where}: model_type is {kind!r}; this model.py knows "
                        f"{', '.join(map(repr, ARCHITECTURES))} and its own 'nanosmol'")
    arch, hf = ARCHITECTURES[kind], _flat_hf_config(hf, where)
    for option, allowed in arch.allowed.items():
        values = hf.get(option)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value not in allowed:
                raise UserError(f"{where}: {option} is {value!r}; this model.py computes only {allowed[0]!r}")
    keys, source = {}, {}
    for key, theirs, default in arch.keys:
        value = hf.get(theirs)
        if value is None and default is REQUIRED:
            raise KeyError(theirs)
        value = default if value is None else value
        if key in keys and keys[key] != value:
            raise UserError(f"{where}: {theirs} is {value!r}, {source[key]} is {keys[key]!r}; this model.py "
                            "has one key for both")
        keys[key], source[key] = value, theirs
    keys["block_size"] = keys["max_positions"]
    if arch.conv1d:
        keys["bias"] = True
    return config_class(**{**NEUTRAL, **arch.maths, **keys, **ours})


def _flat_hf_config(hf, where):
    """config.json with RoPE's parameters, which have stood in three places, beside the other keys, and
    SmolLM3's list of layers as its interval."""
    rope = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or rope
    flat = {**hf, **rope, **scaling, "rope_type": scaling.get("rope_type", scaling.get("type"))}
    if "rope_theta" in flat:
        flat["rope_theta"] = float(flat["rope_theta"])
    layers = hf.get("no_rope_layers")
    if layers is not None:
        every = layers.index(0) + 1 if 0 in layers else 0
        for layer, has_rope in enumerate(layers[:hf["num_hidden_layers"]]):
            if bool(has_rope) == (every > 0 and (layer + 1) % every == 0):
                raise UserError(f"{where}: no_rope_layers is {layers}; this model.py leaves out RoPE in every n-th layer")
        flat["no_rope_layer_interval"] = every
    return flat


def _save_hf(config, state, directory, hf_layout, generation):
    from safetensors.torch import save_file
    kind, obstacles = architecture(config, state)
    if not hf_layout:
        kind = "nanosmol"
    elif obstacles:
        warnings.warn(f"saved as model_type nanosmol, which loads here but not in transformers: {'; '.join(obstacles)}",
                      stacklevel=3)
    tensors = {}
    for name, tensor in state.items():
        tensors[name] = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
    if config.tie_embeddings and "head.weight" in tensors and torch.equal(tensors["head.weight"], tensors["embed.weight"]):
        del tensors["head.weight"]
    if kind != "nanosmol":
        tensors = _to_hf_tensors(config, kind, tensors)
    seen = set()
    for name, tensor in tensors.items():  # a file holds each name's own copy, where a model shares one
        tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    os.makedirs(directory, exist_ok=True)
    save_file(tensors, os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})
    for name, content in (("config.json", _to_hf_config(config, kind) | generation), ("generation_config.json", generation)):
        with open(os.path.join(directory, name), "w", encoding="utf-8") as f:
            json.dump(content, f, indent=2)


def _to_hf_tensors(config, kind, state):
    if config.embed_scale:  # folded into the embedding; the head keeps the matrix as it is
        head = state["embed.weight"] if config.tie_embeddings else state["head.weight"]
        state = state | {"head.weight": head, "embed.weight": state["embed.weight"] * math.sqrt(config.n_embd)}
    tensors = {}
    for ours, theirs, transposed, optional in _tensor_names(config, kind):
        if ours == "head.weight" and ours not in state:
            continue  # tied
        if optional:  # GPT-2 always has biases; without them ours are 0
            tensors[theirs[0][0]] = torch.zeros(theirs[0][1])
            continue
        pieces = state[ours].split([shape[0] for _, shape in theirs])
        for (name, _), piece in zip(theirs, pieces):
            tensors[name] = piece.T if transposed else piece
    return tensors


def _load_hf(cls, directory):
    path = os.path.join(directory, "config.json")
    if not os.path.exists(path):
        raise UserError(f"{directory}: not a model directory, it has no config.json")
    try:
        with open(path, encoding="utf-8") as f:
            hf = json.load(f)
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON: {e}") from None
    try:
        config, kind = _from_hf_config(hf, path, cls.config_class), hf["model_type"]
    except KeyError as e:
        raise UserError(f"{path}: the key {e} is missing") from None
    except (AttributeError, TypeError, ValueError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path}: not a model's config: {e}") from None
    tensors = _read_safetensors(directory)
    if kind == "gpt2" and "wte.weight" in tensors:  # the Hub's gpt2 leaves the prefix out
        tensors = {f"transformer.{k}": v for k, v in tensors.items()}
    if kind != "nanosmol":
        _believe_the_tensors(config, kind, tensors, directory)

    with _Uninitialized():
        model = cls(config)
    wanted = model.state_dict()
    if kind == "nanosmol":
        names = [(name, [(name, wanted[name].shape)], False, False) for name in wanted]
        added = []
    else:
        names = [row for row in _tensor_names(config, kind) if row[0] in wanted]
        added = sorted(wanted.keys() - {row[0] for row in names})
    if added:  # parameters of a changed model.py, in a model of someone else
        model = cls(config)
        wanted = model.state_dict()
        warnings.warn(f"{directory} does not have {', '.join(added)}: what this model.py adds keeps its initial values",
                      stacklevel=3)
    tied = config.tie_embeddings and (kind != "nanosmol" or "head.weight" not in tensors)
    if tied:
        names = [row for row in names if row[0] != "head.weight"]
    # beside masks, RoPE's frequencies, a head that is the embedding and biases of 0, nothing may be left: it would be
    # another model
    known = {name for _, theirs, _, _ in names for name, _ in theirs}
    left = [t for t in tensors if t not in known and not re.search(r"(lm_head\.weight|inv_freq|attn\.(masked_)?bias)$", t)
            and tensors[t].any()]
    if left:
        raise UserError(f"{directory}: {len(left)} tensors, such as {left[0]}, have no place in the model that config.json "
                        "describes")
    state = {name: wanted[name] for name in added}
    for ours, theirs, transposed, _ in names:
        pieces = []
        for name, shape in theirs:
            if config.embed_scale and tied and ours == "embed.weight" and kind != "nanosmol":
                name = "lm_head.weight"  # the embedding beside it is the same, scaled and so rounded
            shape = tuple(reversed(shape)) if transposed else tuple(shape)
            if name not in tensors:
                raise UserError(f"{directory}: the tensor {name} is missing; expected one of shape {shape}")
            if tensors[name].shape != shape:
                raise UserError(f"{directory}: the tensor {name} has shape {tuple(tensors[name].shape)}; "
                                f"config.json asks for {shape}")
            pieces.append(tensors[name].T if transposed else tensors[name])
        state[ours] = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if state[ours].shape != wanted[ours].shape:
            raise UserError(f"{directory}: {ours} has shape {tuple(state[ours].shape)}; this model.py makes it "
                            f"{tuple(wanted[ours].shape)}")
    if config.embed_scale and not config.tie_embeddings and kind != "nanosmol":
        state["embed.weight"] = state["embed.weight"].float() / math.sqrt(config.n_embd)
    if tied and "head.weight" in wanted:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state)
    return model


def _believe_the_tensors(config, kind, tensors, directory):
    """Where a file's tensors say otherwise than its config.json, they are what was trained: changes `config`, and warns.

    transformers unties a head that differs from the embedding, too. Without this, a model that was fine-tuned
    elsewhere would lose its head, its embedding or its biases.
    """
    arch = ARCHITECTURES[kind]
    embed = tensors.get({row[0]: row[1] for row in arch.tensors}["embed"] + ".weight")
    head = tensors.get("lm_head.weight")
    if config.tie_embeddings and embed is not None and head is not None:
        scale = math.sqrt(config.n_embd) if config.embed_scale else 1.0
        precision = torch.finfo(embed.dtype) if embed.is_floating_point() else torch.finfo(torch.float32)
        # an embedding that was scaled may differ by two roundings
        same = embed.shape == head.shape and torch.allclose(
            embed.float(), head.float() * scale, rtol=2 * precision.eps if config.embed_scale else 0.0,
            atol=scale * precision.tiny if config.embed_scale else 0.0)
        if not same:
            config.tie_embeddings = False
            warnings.warn(f"{directory}: lm_head.weight is not the embedding, although config.json ties them; the model "
                          "is loaded with tie_embeddings=False", stacklevel=4)
    if arch.conv1d and not config.bias:
        biases = [name for _, theirs, _, optional in _tensor_names(config, kind) if optional for name, _ in theirs]
        if any(name in tensors and tensors[name].any() for name in biases):
            config.bias = True
            warnings.warn(f"{directory}: its biases are not 0, although config.json says bias=False; the model is loaded "
                          "with bias=True", stacklevel=4)


class _Uninitialized(torch.overrides.TorchFunctionMode):
    """Modules made in this context don't draw their first weights, four fifths of the time that loading takes. (The
    meta device would do, but imports torch.compile's machinery for it: a second more.)"""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return (kwargs or {}).get("tensor")
        return func(*args, **(kwargs or {}))


def _read_safetensors(directory):
    """Every tensor of a directory, from one file or from the shards that its index names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    index = os.path.join(directory, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if os.path.exists(index):
        try:
            with open(index, encoding="utf-8") as f:
                files = sorted(set(json.load(f)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{index}: not an index of shards: {e}") from None
    tensors = {}
    for file in files:
        path = os.path.join(directory, file)
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file; a model directory holds its weights there")
        try:
            tensors |= load_file(path)
        except SafetensorError as e:
            raise UserError(f"{path}: damaged or cut short, not a readable safetensors file ({e})") from None
    return tensors
