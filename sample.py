"""
A finished model in use.

    python sample.py                                              the newest run under out/, its newest checkpoint
    python sample.py --start="Once upon a time" --num_samples=5
    python sample.py --start=FILE:prompt.txt --temperature=0      greedy: the likeliest token, always
    python sample.py --init_from=HuggingFaceTB/SmolLM2-135M       a model directory, or a Hub id
"""
import os
import sys
import time

from configurator import UserError, configure

# -----------------------------------------------------------------------------
# which model
out_dir = ''                  # a run, or one checkpoint of it; '': the newest run under out/
init_from = 'resume'          # 'resume': out_dir's newest checkpoint | a model directory | a Hub id
# what to write
start = ''                    # the prompt; FILE:prompt.txt reads it from a file; '': the end-of-text token
num_samples = 3
max_new_tokens = 500          # each ends here, or at its end-of-text token
temperature = 0.8             # 0: greedy; below 1: likelier words; above 1: wilder ones
top_k = 200                   # only the k likeliest tokens; 0: all
top_p = 1.0                   # only the likeliest that hold this much probability together
seed = 1337                   # sample i draws from seed + i
# machine
device = 'auto'               # 'auto' | 'cpu' | 'cuda' | 'mps'
dtype = 'auto'                # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile = False               # torch.compile: pays back over many samples only
# -----------------------------------------------------------------------------
configure(globals())

import torch

import prepare
from model import GPT, pick_device, pick_dtype

if start.startswith('FILE:'):
    try:
        with open(start[5:], encoding='utf-8') as f:
            start = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"start={start}: {e}") from None
if init_from == 'resume':
    init_from = out_dir or prepare.newest_run('out')
    if not os.path.isdir(init_from):
        raise UserError(f"out_dir={out_dir}: no such directory")
directory = prepare.model_directory(init_from)
tokenizer = prepare.load_tokenizer(directory)
model = GPT.from_pretrained(directory)
device = pick_device(device)
dtype = pick_dtype(dtype, device, model.config)
model.to(device, getattr(torch, dtype)).eval()
if compile:
    model.compile()
print(f"{directory}: {model.n_params() / 1e6:.1f}M parameters, {device}, {dtype}", file=sys.stderr)

prompt = tokenizer.encode(start) or [tokenizer.eos_id]
idx = torch.tensor([prompt], device=device)
tokens, begun = 0, time.perf_counter()
for i in range(num_samples):
    print(start, end='', flush=True)
    ids, shown = [], ''
    for token in model.stream(idx, max_new_tokens, temperature, top_k, top_p, seed + i, stop=[tokenizer.eos_id]):
        if token.item() == tokenizer.eos_id:
            break
        ids.append(token.item())
        text = tokenizer.decode(ids)
        if not text.endswith('\ufffd'):  # half of a character: wait for the rest
            print(text[len(shown):], end='', flush=True)
            shown = text
    tokens += len(ids)
    print('\n---------------')
print(f"{tokens / (time.perf_counter() - begun):,.0f} tokens a second", file=sys.stderr)
