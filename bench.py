"""
What is fast, and how fast: ratios, measured side by side in one run.

    python bench.py                                                the toy run's model
    python bench.py config/smol_135m.py --batch_size=2 --block_size=512
    python bench.py config/smol_360m.py --json=bench.json          keep the figures

Every comparison takes its turns A B A B ..., so that a machine whose speed drifts slows both alike, and is
reported as the median of the ratios pair by pair with their range. Rivals: a plain float32 GPT-2-style
step of the same size, and transformers' own Llama with the same weights where it is installed.
"""
import json as json_lib
import os
import statistics
import tempfile
import time

from configurator import configure

# -----------------------------------------------------------------------------
pairs = 7                     # turns of each comparison
new_tokens = 64               # to generate
json = ''                     # keep the figures in this file
# -----------------------------------------------------------------------------
configure(globals(), also='train.py')  # batch_size, block_size, the model's keys and all others of train.py

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, GPTConfig, architecture, documents, flops_per_token, make_optimizers, pick_device, pick_dtype

device = pick_device(device)
config = GPTConfig(**{k: globals()[k] or (vocab_size or 4096 if k == 'vocab_size' else globals()[k])
                      for k in GPTConfig.__dataclass_fields__})
dtype = pick_dtype(dtype, device, config)
autocast = torch.autocast(device.split(':')[0], getattr(torch, dtype), enabled=dtype != 'float32')
idx = torch.randint(config.vocab_size, (batch_size, block_size + 1), device=device)
x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
tokens = batch_size * block_size
results = []


def seconds(work):
    """One run of `work`, the accelerator's included."""
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def compare(what, ours, rival, against, amount, unit):
    """Times ours and a rival in turn; prints amount/second of both and how many times faster ours is."""
    for warm_up in (ours, rival, ours, rival):
        warm_up()
    times = [(seconds(ours), seconds(rival)) for _ in range(pairs)]
    a, b = (statistics.median(t) for t in zip(*times))
    ratios = sorted(theirs / mine for mine, theirs in times)
    ratio = statistics.median(ratios)
    results.append(dict(what=what, against=against, ours=amount / a, theirs=amount / b, unit=unit, ratio=ratio,
                        lowest=ratios[0], highest=ratios[-1]))
    print(f"{what:24} {amount / a:12,.0f} {unit:8} {against:32} {amount / b:12,.0f}   "
          f"{ratio:5.2f}x  ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


# --- rivals

class PlainBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT2(nn.Module):
    """What people write first: float32, eager, learned positions, whole logits."""

    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(config.vocab_size, config.n_embd), nn.Embedding(block_size, config.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(config.n_embd, config.n_head) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)

    def forward(self, x, y):
        h = self.token(x) + self.position.weight
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy((self.norm(h) @ self.token.weight.T).flatten(0, 1), y.flatten())


def train_step(loss_of, optimizers, precision):
    def step():
        with precision:
            loss = loss_of()
        loss.backward()
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
    return step


model = GPT(config).to(device)
plain = PlainGPT2().to(device) if config.n_embd % config.n_head == 0 else None
try:
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        theirs = AutoModelForCausalLM.from_pretrained(directory).to(device) \
            if architecture(config)[0] != 'nanosmol' else None
except ImportError:
    theirs = None
    print("transformers is not installed: measured without it (pip install transformers)")

optimizers = make_optimizers(model, optimizer, muon_dtype=torch.float32 if dtype == 'float32' else torch.bfloat16)
print(f"{model.n_params():,} parameters, {flops_per_token(model):.3g} FLOPs a token, {batch_size} x {block_size} tokens, "
      f"{device}, {dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
ours = train_step(lambda: model(x, y)[1], optimizers, autocast)
if plain:
    compare('training step', ours, train_step(lambda: plain(x, y), [torch.optim.AdamW(plain.parameters())],
                                              torch.autocast('cpu', enabled=False)), 'plain float32 GPT-2', tokens, 'tok/s')
if theirs:
    compare('training step', ours, train_step(lambda: theirs(x, labels=x).loss, [torch.optim.AdamW(theirs.parameters())],
                                              autocast), f'transformers + AdamW, {dtype}', tokens, 'tok/s')
eos = torch.full_like(x, 1)
eos[:, ::100] = 0
compare('forward, documents apart', lambda: model(x, y, documents(eos, 0)), lambda: model(x, y), 'plain causal', tokens, 'tok/s')
model.eval().to(getattr(torch, dtype))
for rows in (1, 8):
    prompt = idx[:1, :8].expand(rows, -1)
    fast = lambda: model.generate(prompt, new_tokens, temperature=0)
    if theirs:
        theirs.eval().to(getattr(torch, dtype))
        compare(f'generation, batch {rows}', fast, lambda: theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=new_tokens, max_new_tokens=new_tokens,
            do_sample=False, pad_token_id=0), f'transformers, {dtype}', rows * new_tokens, 'tok/s')
if json:
    with open(json, 'w') as f:
        json_lib.dump(dict(config=vars(config), device=device, dtype=dtype, torch=torch.__version__, results=results), f, indent=1)
    print(f"\nkept in {os.path.abspath(json)}")
