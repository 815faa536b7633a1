"""
Trains a small language model: one flat loop, read from top to bottom.

    python train.py                                            the toy run: two minutes on two CPU cores
    python train.py config/smol_360m.py --batch_size=32        a config, with the last word on the command line
    python train.py config/smol_360m.py --dry_run --gpu=H100   what it would take: memory, hours, dollars
    torchrun --nproc_per_node=8 train.py config/smol_360m.py   on several GPUs: the very same sequences a step

A run lives in out_dir and goes on where it stopped: the same command again resumes it.
"""
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time

from configurator import UserError, configure

# -----------------------------------------------------------------------------
# The defaults are the toy run.
# where a run lives
out_dir = ''                  # '': out/<name of the config>, out/toy without one
init_from = 'scratch'         # 'scratch' | 'resume' | a run or model directory | a Hub id
eval_interval = 250           # steps between evaluations
eval_iters = 50               # micro-batches of held-out data in one; always the same ones
eval_only = False             # evaluate once and stop
log_interval = 10             # steps between lines of the log
always_save_checkpoint = True # after every evaluation; False: only where one is due, and best/
checkpoint_interval = 0       # steps between checkpoints; 0: at evaluations only
checkpoint_minutes = 0.0      # also every so many minutes; 0: never
keep_checkpoints = 2          # the newest N stay, and best/; 0: all stay
sample_interval = 0           # steps between samples; 0: at the end only
sample_start = ''             # what a sample begins with; '': the end-of-text token
wandb_log = False             # also log to Weights & Biases
wandb_project = 'nanosmol'
wandb_run_name = ''           # '': the name of out_dir
tensorboard = False           # also log to TensorBoard (pip install tensorboard)
# data
dataset = 'toy'               # a directory in data/, or a mixture: 'web:0.87,code:0.13'
data_dir = 'data'
gradient_accumulation_steps = 1  # micro-batches in a step, over all processes
batch_size = 12               # sequences in a micro-batch
block_size = 256              # tokens in a training window
doc_mask = True               # documents packed in one window don't see each other
# model: the keys of GPTConfig in model.py
n_layer = 4                   # blocks
n_head = 4                    # query heads
n_embd = 128                  # width
n_kv_head = 2                 # key and value heads; 0: n_head
head_dim = 0                  # 0: n_embd / n_head
ffn_dim = 0                   # hidden width of the MLP; 0: 8/3 n_embd (swiglu), 4 n_embd (gelu)
vocab_size = 0                # 0: the data's; it may be larger, never smaller
max_positions = 0             # longest context that config.json declares; 0: block_size
dropout = 0.0
bias = False                  # in linear layers and LayerNorm
norm = 'rmsnorm'              # 'rmsnorm' | 'layernorm'
norm_eps = 1e-5
mlp = 'swiglu'                # 'swiglu' | 'gelu'
pos = 'rope'                  # 'rope' | 'learned'
rope_theta = 10000.0
nope_every = 0                # every n-th layer without RoPE; 0: never
qk_norm = False               # RMSNorm on queries and keys
tie_embeddings = True         # one matrix for embedding and head
embed_scale = False           # embeddings x sqrt(n_embd)
unit_embed = True             # embeddings begin at std 1: a tiny model learns to copy names only then
init = 'normal'               # 'normal' | 'trunc_normal'
init_std = 0.02
scale_residual = True         # projections into the residual stream begin smaller by sqrt(2 n_layer)
hf_layout = True              # False: you changed the maths, config.json is not to claim an architecture
# optimizer
optimizer = 'muon'            # 'muon': Muon for the matrices inside the blocks, AdamW for the rest | 'adamw'
learning_rate = 5e-3          # AdamW's peak
muon_lr = 0.02                # Muon's peak
muon_momentum = 0.95
weight_decay = 0.0
cautious = False              # Muon decays a weight only where its update agrees
decay_embeddings = False      # nanoGPT does
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0               # 0: never
max_iters = 1000              # steps
# schedule
decay_lr = True               # False: constant after warm-up
schedule = 'wsd'              # 'wsd': stable, then down | 'cosine' | 'constant'
warmup_iters = 20
decay_frac = 0.4              # wsd: the last part of lr_decay_iters, in which the rate falls
decay_shape = 'linear'        # wsd: 'linear' | '1-sqrt'
lr_decay_iters = 0            # 0: max_iters
min_lr = 0.0                  # AdamW's rate at the end; Muon's falls by the same factor
# a step that goes wrong
spike_z = 12.0                # skip a step whose loss or gradient norm is this many robust deviations high; 0: never
max_bad_steps = 5             # so many in a row: back to the last checkpoint, and past the data that did it
max_rollbacks = 3             # then stop
# machine
device = 'auto'               # 'auto' | 'cpu' | 'cuda' | 'cuda:1' | 'mps'
dtype = 'auto'                # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile = True                # torch.compile where it pays back within the run
grad_checkpoint = False       # less memory, a third more time
backend = 'nccl'              # of torch.distributed on CUDA; gloo on a CPU
seed = 1337
# money
dry_run = False               # print what a run would take, and stop
gpu = ''                      # for dry_run: a GPU's name, such as 'H100'
mfu = 0.4                     # for dry_run: the share of the peak that a run reaches
gpu_cost_per_hour = 0.0       # dollars; 0: not counted (dry_run: the table's price)
# -----------------------------------------------------------------------------
setup = configure(globals())
config = {key: globals()[key] for key in setup.keys}

import torch  # after the config, so that --help and slips of the pen answer at once
import torch.distributed as dist

import prepare
from model import (FOLLOWS, GPT, GPUS, GPTConfig, architecture, documents, flops_per_token, make_optimizers,
                   memory_estimate, pick_attention, pick_device, pick_dtype, schedule_factor)

name = os.path.splitext(os.path.basename(setup.files[-1]))[0] if setup.files else 'toy'
out_dir = config['out_dir'] = out_dir or os.path.join('out', name)
mixture = prepare.parse_mixture(dataset)
directories = [os.path.join(data_dir, n) for n, _ in mixture]
model_keys = {k: config[k] for k in GPTConfig.__dataclass_fields__}
for key, allowed in (('schedule', ('wsd', 'cosine', 'constant')), ('decay_shape', ('linear', '1-sqrt')),
                     ('optimizer', ('muon', 'adamw')), ('dtype', ('auto', 'float32', 'bfloat16', 'float16'))):
    if config[key] not in allowed:
        raise UserError(f"{key}={config[key]!r}: expected one of {', '.join(map(repr, allowed))}")
for key in ('batch_size', 'gradient_accumulation_steps', 'eval_interval', 'eval_iters', 'log_interval'):
    if config[key] < 1:
        raise UserError(f"{key}={config[key]}: expected at least 1")

if dry_run:
    vocab = vocab_size or prepare.read_meta(directories[0])['vocab_size']
    with torch.device('meta'):
        model = GPT(GPTConfig(**{**model_keys, 'vocab_size': vocab}))
    flops, tokens = flops_per_token(model), batch_size * gradient_accumulation_steps * block_size
    print(f"parameters        {model.n_params():,}")
    print(f"FLOPs a token     {flops:.4g}")
    print(f"tokens a step     {tokens:,}")
    print(f"total tokens      {tokens * max_iters:,} in {max_iters:,} steps")
    memory = memory_estimate(model, batch_size, optimizer, dtype, grad_checkpoint)
    for what, size in memory.items():
        print(f"{what:17} {size / 1e9:.2f} GB")
    if gpu:
        if gpu.upper() not in GPUS:
            raise UserError(f"gpu={gpu!r}: expected one of {', '.join(GPUS)}")
        peak, room, price = GPUS[gpu.upper()]
        speed, price = peak * mfu / flops, gpu_cost_per_hour or price
        hours = tokens * max_iters / speed / 3600
        print(f"on one {gpu.upper():10} {hours:,.1f} hours, ${hours * price:,.2f}, at {speed:,.0f} tok/s "
              f"({mfu:.0%} of {peak / 1e12:.0f} TFLOP/s) and ${price:.2f} an hour")
        if sum(memory.values()) > 0.95 * room * 1e9:
            print(f"it won't fit {room} GB: halve batch_size and double gradient_accumulation_steps until it does (the "
                  "tokens a step stay the same), or set grad_checkpoint=True")
    sys.exit()

# -----------------------------------------------------------------------------
# processes and device

ddp = 'RANK' in os.environ  # torchrun's mark
rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
master = rank == 0  # this process prints, logs and saves
device = pick_device(device)
device_type = device.split(':')[0]
sequences = batch_size * gradient_accumulation_steps  # in a step, however many processes share them
if sequences % world:
    raise UserError(f"batch_size * gradient_accumulation_steps = {sequences} sequences a step can't be shared "
                    f"among {world} processes; make it a multiple of {world}")
if ddp:
    if device_type == 'cuda':
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group(backend if device_type == 'cuda' else 'gloo')
if device_type == 'cuda':
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
bar = None  # tqdm's progress bar, once the loop begins on a terminal


def say(text):
    """Prints on one process, above the progress bar."""
    if master:
        bar.write(text) if bar else print(text, flush=True)


# -----------------------------------------------------------------------------
# data

for (set_name, _), directory in zip(mixture, directories):
    if not os.path.exists(os.path.join(directory, 'train.bin')):
        if set_name not in prepare.KNOWN:
            raise UserError(f"{directory}: no such data set; {prepare.how_to_prepare(directory)}")
        say(f"{directory} is missing; preparing it now: {prepare.describe(set_name)}")
        if master:
            prepare.prepare(set_name, data_dir=data_dir)
if ddp:
    dist.barrier()
metas = [prepare.read_meta(d) for d in directories]
meta = metas[0]
for directory, other in zip(directories, metas):
    if (other['tokenizer'], other['vocab_size']) != (meta['tokenizer'], meta['vocab_size']):
        raise UserError(f"{directory} was made with the tokenizer {other['tokenizer']!r}, {directories[0]} with "
                        f"{meta['tokenizer']!r}; a mixture has to share one")
train_sets = [prepare.Bins(d, 'train', block_size, seed) for d in directories]
val_sets = [prepare.Bins(d, 'val', block_size, seed) for d in directories]
data = prepare.Mixture(train_sets, [weight for _, weight in mixture], seed)
fingerprint = [bins.fingerprint() for bins in train_sets]
tokenizer = prepare.load_tokenizer(directories[0] if os.path.exists(os.path.join(directories[0], 'tokenizer.json'))
                                   else meta['tokenizer'])


def on_device(x, y):
    """A batch where the model is, and the layout of its documents if they are to be kept apart."""
    if device_type == 'cuda':
        x, y = (t.pin_memory().to(device, non_blocking=True) for t in (x, y))
    else:
        x, y = x.to(device), y.to(device)
    return x, y, documents(x, meta['eos_id'], attention) if doc_mask else None


# -----------------------------------------------------------------------------
# where the run begins: a run in out_dir goes on; without one, init_from says

if setup.given.get('init_from') == 'command line' and init_from == 'scratch' and os.path.exists(out_dir):
    aside = next(f"{out_dir}~{i}" for i in range(1, 10 ** 6) if not os.path.exists(f"{out_dir}~{i}"))
    say(f"the run in {out_dir} is set aside as {aside}")
    if ddp:
        dist.barrier()  # every process has seen the old run before it moves
    if master:
        os.rename(out_dir, aside)
if ddp:
    dist.barrier()

state, damaged = None, 0
for checkpoint in reversed(prepare.checkpoints(out_dir)):
    try:
        model = GPT.from_pretrained(checkpoint)
        state = torch.load(os.path.join(checkpoint, 'trainer.pt'), map_location='cpu', weights_only=True)
        break
    except Exception as e:  # whatever is wrong with this one, the one before may be whole
        damaged += 1
        say(f"warning: {checkpoint} is damaged and passed over: {str(e).splitlines()[0]}")
if damaged and not state:
    raise UserError(f"{out_dir}: no checkpoint is whole; --init_from=scratch sets the run aside and starts over")
if init_from == 'resume' and not state:
    raise UserError(f"{out_dir}: there is no run to resume; leave out --init_from=resume to start one")

origin = state['config']['init_from'] if state else init_from
if origin == 'scratch':
    asked = vars(GPTConfig(**{**model_keys, 'vocab_size': vocab_size or meta['vocab_size']}))
else:  # the weights bring their shape; only what was asked for in so many words can contradict it
    asked = {k: v for k, v in model_keys.items() if k in setup.given and not (k in FOLLOWS and v == 0)}
if state:  # it goes on only with the same data and model; otherwise nothing is touched
    before = state['config']
    for key, value in {'dataset': dataset, 'seed': seed, 'doc_mask': doc_mask, 'optimizer': optimizer, **asked}.items():
        if before[key] != value:
            raise UserError(f"{out_dir} holds a run with {key}={before[key]!r}, this one asks for {value!r}; choose "
                            "another --out_dir, or --init_from=scratch to set the old run aside")
    if state['fingerprint'] != fingerprint:
        raise UserError(f"{', '.join(directories)}: the data changed since the run in {out_dir} began; put it back, "
                        "choose another --out_dir, or --init_from=scratch to set the old run aside")
    say(f"resuming {checkpoint}")
elif origin == 'scratch':
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**asked))
else:
    directory = prepare.model_directory(init_from)
    model = GPT.from_pretrained(directory)
    for key, value in asked.items():
        found = getattr(model.config, key)
        if value != found and key not in ('block_size', 'dropout', 'init', 'init_std', 'unit_embed', 'scale_residual'):
            raise UserError(f"{key}={value!r} was asked for, the model in {init_from} has {found!r}")
    model.set_runtime(block_size, dropout)
    say(f"weights from {directory}")
if model.config.vocab_size < meta['vocab_size']:
    raise UserError(f"vocab_size={model.config.vocab_size} of the model is smaller than the data's {meta['vocab_size']}")
for bins in train_sets + val_sets:
    bins.check_vocabulary(model.config.vocab_size)
config |= vars(model.config) | {'init_from': origin}

# -----------------------------------------------------------------------------
# model, precision, optimizers

dtype = pick_dtype(dtype, device, model.config)
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
attention = pick_attention(device, dtype, doc_mask, compile, model.config.dropout)

model.to(device)
model.grad_checkpoint = grad_checkpoint
odd = architecture(model.config)[1]
if odd and hf_layout:
    say(f"warning: no Hugging Face architecture combines {', '.join(odd)} like this; checkpoints will be model_type "
        "nanosmol, which loads here but not in transformers")
optimizers = make_optimizers(model, optimizer, learning_rate, muon_lr, muon_momentum, weight_decay, (beta1, beta2),
                             cautious, decay_embeddings, torch.float32 if dtype == 'float32' else torch.bfloat16)
flops = flops_per_token(model)
peak_flops = next((peak for gpu_name, (peak, *_) in GPUS.items()
                   if device_type == 'cuda' and gpu_name in torch.cuda.get_device_name(device).upper()), 0)

# what a checkpoint counts
step = 0          # updates done
position = 0      # sequences consumed: where the data goes on
tokens_seen = 0
train_s = 0.0     # seconds in steps, compilation included
wall_s = 0.0      # seconds in all: what a rented machine is paid for
best_val = math.inf
rollbacks = 0
recent = []       # (loss, log of the gradient norm) of the last 128 good steps
COUNTERS = ('step', 'position', 'tokens_seen', 'train_s', 'wall_s', 'best_val', 'rollbacks', 'recent')


def restore(state):
    """Everything but the weights, from trainer.pt."""
    globals().update({k: state[k] for k in COUNTERS})
    for opt, saved in zip(optimizers, state['optimizers']):
        for group, old in zip(opt.param_groups, saved['param_groups']):
            old |= {k: v for k, v in group.items() if k != 'params'}  # the config's rates, the checkpoint's moments
        opt.load_state_dict(saved)
    scaler.load_state_dict(state['scaler'])
    torch.set_rng_state(state['rng'])
    if device_type == 'cuda' and state['cuda_rng'] is not None:
        torch.cuda.set_rng_state(state['cuda_rng'])


torch.manual_seed(seed + 1)  # from here on the generator draws dropout masks and nothing else
if state:
    restore(state)
resumed_at = step if state else -1
forward = torch.nn.parallel.DistributedDataParallel(model) if ddp else model
if warmup_iters > max_iters:
    say(f"warning: warmup_iters={warmup_iters} is beyond max_iters and clamped to {max_iters}")

# -----------------------------------------------------------------------------
# evaluation, samples, log, plot

@torch.no_grad()
def evaluate():
    """The mean loss over the held-out windows: of each data set, and weighted as they are mixed."""
    model.eval()
    row, mean = {}, 0.0
    rows = max(batch_size, 4096 // block_size)
    for bins, (domain, _), share in zip(val_sets, mixture, data.shares):
        total = torch.zeros(2, dtype=torch.float64, device=device)
        starts = bins.held_out(eval_iters * batch_size)[rank::world]
        for i in range(0, len(starts), rows):
            x, y, docs = on_device(*bins.read(starts[i:i + rows]))
            with autocast:
                _, loss = model(x, y, docs)
            count = (y >= 0).sum()
            total += torch.stack([loss * count, count])
        if ddp:
            dist.all_reduce(total)
        loss = (total[0] / total[1].clamp(min=1)).item()
        mean += share * loss
        if len(mixture) > 1:
            row |= {f'val/{domain}/loss': loss, f'val/{domain}/ppl': math.exp(min(loss, 700))}
    model.train()
    return {'val/loss': mean, 'val/ppl': math.exp(min(mean, 700)), **row}


def samples(count):
    """Texts that begin with sample_start, each until its end-of-text token."""
    start = tokenizer.encode(sample_start) or [meta['eos_id']]
    length = max(1, min(200, model.config.max_positions - len(start)))
    with autocast:
        out = model.generate(torch.tensor([start] * count, device=device), length, temperature=0.8, top_k=200,
                             seed=seed, stop=[meta['eos_id']])
    texts = [ids[len(start):] + [meta['eos_id']] for ids in out.tolist()]
    return [sample_start + tokenizer.decode(ids[:ids.index(meta['eos_id'])]) for ids in texts]


def log(row):
    """A row of log.jsonl, and of W&B and TensorBoard where they listen."""
    if not master:
        return
    with open(os.path.join(out_dir, 'log.jsonl'), 'a', encoding='utf-8') as f:
        f.write(json.dumps({'step': step, **row}) + '\n')
    numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
    if wandb_run:
        wandb_run.log(numbers, step=step)
    if board:
        for key, value in numbers.items():
            board.add_scalar(key, value, step)


def start_wandb():
    """A W&B run: online where it can be, else offline (`wandb sync` uploads it later). It never stops a run."""
    import wandb
    options = dict(project=wandb_project, name=wandb_run_name or os.path.basename(out_dir), config=config, dir=out_dir)
    quiet = dict(silent=True, init_timeout=20)
    try:
        known = os.environ.get('WANDB_API_KEY') or wandb.api.api_key
        if known or os.environ.get('WANDB_MODE'):
            return wandb.init(**options, settings=wandb.Settings(**quiet))
        say("warning: not logged in to W&B (wandb login), so it logs offline; wandb sync uploads it later")
    except Exception as e:
        say(f"warning: W&B can't be reached, so it logs offline; wandb sync uploads it later: {str(e).splitlines()[0]}")
    return wandb.init(**options, mode='offline', settings=wandb.Settings(**quiet))


def start_tensorboard():
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(os.path.join(out_dir, 'tensorboard'), purge_step=step)
    except ImportError:
        say("warning: tensorboard=True, but it is not installed (pip install tensorboard); the run goes on without")


def plot():
    """out_dir/loss.png: the loss of training and of held-out data, and the learning rate."""
    from matplotlib.figure import Figure
    with open(os.path.join(out_dir, 'log.jsonl'), encoding='utf-8') as f:
        rows = [json.loads(line) for line in f]
    figure = Figure(figsize=(8, 4.5), layout='constrained')
    axis = figure.add_subplot(xlabel='step', ylabel='loss (nats a token)', title=out_dir)
    rate = axis.twinx()
    rate.set_ylabel('learning rate')
    for ax, key, style in ((axis, 'train/loss', dict(alpha=0.6)), (axis, 'val/loss', dict(marker='o')),
                           (rate, 'train/lr', dict(color='gray', linewidth=0.7))):
        ax.plot([r['step'] for r in rows if key in r], [r[key] for r in rows if key in r], label=key, **style)
    axis.legend()
    figure.savefig(os.path.join(out_dir, 'loss.png'), dpi=120)


def too_high(value, earlier, least):
    """More than spike_z robust deviations above the median; 1.4826 MAD estimates a standard deviation,
    and `least` is the smallest that counts, so that a calm run does not start at shadows."""
    if len(earlier) < 32 or not spike_z:
        return False
    median = sorted(earlier)[len(earlier) // 2]
    mad = sorted(abs(e - median) for e in earlier)[len(earlier) // 2]
    return value - median > spike_z * max(1.4826 * mad, least)


# -----------------------------------------------------------------------------
# checkpoints

writer = None  # the thread that writes the last one


def in_memory(value):
    """A copy on the CPU that later steps leave alone."""
    if torch.is_tensor(value):
        return value.detach().to('cpu', copy=True)
    if isinstance(value, dict):
        return {k: in_memory(v) for k, v in value.items()}
    return [in_memory(v) for v in value] if isinstance(value, (list, tuple)) else value


def save(best):
    """A checkpoint of this step. Training waits for the copy to memory; a thread writes it."""
    global writer
    begun = time.perf_counter()
    finish_writing()
    weights = {k: v for k, v in model.state_dict().items() if k != 'head.weight' or not model.config.tie_embeddings}
    trainer = {k: globals()[k] for k in COUNTERS}
    trainer |= {'config': config, 'fingerprint': fingerprint, 'optimizers': [opt.state_dict() for opt in optimizers],
                'scaler': scaler.state_dict(), 'rng': torch.get_rng_state(),
                'cuda_rng': torch.cuda.get_rng_state() if device_type == 'cuda' else None}
    weights, trainer = in_memory(weights), in_memory(trainer)
    writer = threading.Thread(target=write, args=(weights, trainer, best, time.perf_counter() - begun))
    writer.start()


def write(weights, trainer, best, waited):
    """Written beside, synced, renamed: a directory under its final name is whole."""
    target, beside = os.path.join(out_dir, f"step_{trainer['step']:06d}"), os.path.join(out_dir, '.writing')
    try:
        shutil.rmtree(beside, ignore_errors=True)
        model.save_pretrained(beside, hf_layout, {'eos_token_id': meta['eos_id']}, weights)
        tokenizer.save(beside)
        torch.save(trainer, os.path.join(beside, 'trainer.pt'))
        prepare.publish(beside, target)
        if best:  # the same files under a second name: hard links cost no space
            shutil.copytree(target, beside, copy_function=link_or_copy)
            prepare.publish(beside, os.path.join(out_dir, 'best'))
        for old in prepare.checkpoints(out_dir)[:-keep_checkpoints] if keep_checkpoints else []:
            shutil.rmtree(old, ignore_errors=True)
        size = sum(os.path.getsize(os.path.join(target, f)) for f in os.listdir(target))
        log({'step': trainer['step'], 'event': 'checkpoint', 'path': target, 'best': best, 'bytes': size,
             'training_waited_s': waited})
    except Exception as e:  # a full disk, most often: training goes on, and the one before stays whole
        shutil.rmtree(beside, ignore_errors=True)
        say(f"warning: {target} could not be written, the one before it stays: {str(e).splitlines()[0]}")
        log({'step': trainer['step'], 'event': 'checkpoint failed', 'path': target, 'error': str(e)})


def link_or_copy(source, target):
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def finish_writing():
    if writer:
        writer.join()


# -----------------------------------------------------------------------------
# the start: loggers, signals, a line or two

wandb_run = board = None
if eval_only:
    say(', '.join(f"{k} {v:.4f}" for k, v in evaluate().items()))
    sys.exit()
if master:
    os.makedirs(out_dir, exist_ok=True)
    log_path = os.path.join(out_dir, 'log.jsonl')
    if os.path.exists(log_path):  # rows past the checkpoint tell of steps that will be taken again
        with open(log_path, encoding='utf-8') as f:
            rows = [line for line in f if line.endswith('}\n') and json.loads(line)['step'] <= step]
        with open(log_path + '.part', 'w', encoding='utf-8') as f:
            f.writelines(rows)
        os.replace(log_path + '.part', log_path)
    wandb_run = start_wandb() if wandb_log else None
    board = start_tensorboard() if tensorboard else None
    log({'event': 'resume' if state else 'start', 'config': config})
stop_signal = None


def ask_to_stop(number, frame):
    """SIGINT and SIGTERM: the step ends, a checkpoint is written. A second one ends it at once."""
    global stop_signal
    if stop_signal:
        os._exit(130)
    stop_signal = signal.Signals(number).name


signal.signal(signal.SIGINT, ask_to_stop)
signal.signal(signal.SIGTERM, ask_to_stop)
say(f"{model.n_params() / 1e6:.2f}M parameters; {dataset}: {sum(len(b.tokens) for b in train_sets):,} tokens; "
    f"{max_iters:,} steps of {sequences} x {block_size} = {sequences * block_size:,} tokens")
say(f"{out_dir}: {device}, {dtype}, {optimizer}, attention: {attention}{', documents apart' if doc_mask else ''}")
if master and sys.stdout.isatty():
    from tqdm import tqdm
    bar = tqdm(total=max_iters, initial=step, unit='step', dynamic_ncols=True)

# -----------------------------------------------------------------------------
# the loop

model.train()
params = list(model.parameters())
compiled, bad_in_a_row, steps_here = False, 0, 0
clock = last_saved = time.perf_counter()
marked = tokens_seen, train_s  # at the last line of the log

while True:
    # evaluation, sample, checkpoint: before the first step, at every interval, after the last
    finished = step >= max_iters
    due = step != resumed_at  # what a checkpoint was saved with has been done
    evaluated = best = False
    if due and (step % eval_interval == 0 or finished):
        row, evaluated = evaluate(), True
        best, best_val = 0 < step and row['val/loss'] < best_val, min(best_val, row['val/loss'])
        log(row)
        say(f"step {step:6,d} | val loss {row['val/loss']:.4f}" +
            ''.join(f" | {domain} {row[f'val/{domain}/loss']:.4f}" for domain, _ in mixture if len(mixture) > 1))
    if due and sample_interval and step and step % sample_interval == 0 and master:
        text = samples(1)[0]
        log({'event': 'sample', 'text': text})
        with open(os.path.join(out_dir, 'samples.txt'), 'a', encoding='utf-8') as f:
            f.write(f"--- step {step} ---\n{text}\n")
    wall_s, clock = wall_s + time.perf_counter() - clock, time.perf_counter()
    if master and due and step and (
            finished or stop_signal or best or evaluated and always_save_checkpoint
            or checkpoint_interval and step % checkpoint_interval == 0
            or checkpoint_minutes and clock - last_saved > 60 * checkpoint_minutes):
        save(best)
        last_saved = clock
    if master and evaluated and step:
        plot()
    if finished or stop_signal:
        break

    # torch.compile, where what it saves in the steps left outweighs what it takes: about a minute on a
    # GPU, two on a CPU, where it saves a quarter
    if compile and not compiled and (
            device_type == 'cuda' and max_iters - step > 100
            or device_type == 'cpu' and steps_here == 20 and train_s / step * (max_iters - step) / 4 > 120):
        say("torch.compile: pays back within this run")
        model.compile()
        compiled = True

    # the step: one mean over all targets of all micro-batches of all processes
    begun = time.perf_counter()
    factor = schedule_factor(step, schedule if decay_lr else 'constant', min(warmup_iters, max_iters),
                             lr_decay_iters or max_iters, min_lr / (learning_rate or 1), decay_frac, decay_shape)
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr'] = group['base_lr'] * factor
    mine = range(position + rank * sequences // world, position + (rank + 1) * sequences // world)
    batches = [data.batch(mine[i:i + batch_size]) for i in range(0, len(mine), batch_size)]
    targets = torch.stack([(y >= 0).sum() for _, y in batches]).sum().to(device)
    if ddp:
        dist.all_reduce(targets)
    step_loss = torch.zeros((), device=device)
    for i, (x, y) in enumerate(batches):
        x, y, docs = on_device(x, y)
        if ddp:
            forward.require_backward_grad_sync = i == len(batches) - 1
        with autocast:
            _, loss = forward(x, y, docs)
            loss = loss * ((y >= 0).sum() / targets.clamp(min=1))
        step_loss += loss.detach()
        scaler.scale(loss * world).backward()  # DDP divides by world
    if ddp:
        dist.all_reduce(step_loss)
    for opt in optimizers:
        scaler.unscale_(opt)
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf).item()
    train_loss = step_loss.item()
    position += sequences

    # a step that would do harm is skipped and not counted; its data is passed over
    log_norm = math.log(norm) if 0 < norm < math.inf else -math.inf if norm == 0 else math.inf
    why = 'not finite' if not (math.isfinite(train_loss) and math.isfinite(norm)) else \
        'loss spike' if too_high(train_loss, [r[0] for r in recent], 0.03) else \
        'gradient spike' if too_high(log_norm, [r[1] for r in recent], 0.2) else ''
    if why and not (scaler.is_enabled() and why == 'not finite'):  # float16's scaler skips those itself
        bad_in_a_row += 1
        say(f"step {step + 1} skipped: {why}, loss {train_loss:.4f}, gradient norm {norm:.4g}")
        log({'event': 'skipped', 'why': why, 'train/loss': train_loss, 'train/grad_norm': norm, 'position': position})
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        if bad_in_a_row == max_bad_steps:
            finish_writing()
            if ddp:
                dist.barrier()
            if not prepare.checkpoints(out_dir) or rollbacks == max_rollbacks:
                raise UserError(f"{max_bad_steps} bad steps in a row after step {step} and {rollbacks} rollbacks; what is "
                                f"in {out_dir} is whole. Lower the learning rate, or look at the data")
            last = prepare.checkpoints(out_dir)[-1]
            beyond, times, spent = position, rollbacks + 1, wall_s
            model.load_state_dict(GPT.from_pretrained(last).state_dict())
            restore(torch.load(os.path.join(last, 'trainer.pt'), map_location='cpu', weights_only=True))
            position, rollbacks, wall_s, bad_in_a_row, resumed_at = beyond, times, spent, 0, step
            marked = tokens_seen, train_s
            say(f"{max_bad_steps} bad steps in a row: back to {last}, past the data that did it")
            log({'event': 'rollback', 'position': position})
        continue
    bad_in_a_row, recent = 0, recent[-127:] + [[train_loss, log_norm]]

    for opt in optimizers:
        scaler.step(opt)
    scaler.update()
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)
    step, steps_here = step + 1, steps_here + 1
    tokens_seen += sequences * block_size
    train_s += time.perf_counter() - begun
    if ddp:  # all stop at the same step, whichever heard the signal
        heard = torch.tensor(float(stop_signal is not None), device=device)
        dist.all_reduce(heard)
        stop_signal = stop_signal or ('a signal' if heard.item() else None)

    if bar:
        bar.update()
    if step % log_interval == 0 or step == max_iters:
        speed = (tokens_seen - marked[0]) / (train_s - marked[1])
        left = (max_iters - step) * sequences * block_size / speed
        marked = tokens_seen, train_s
        row = {'train/loss': train_loss, 'train/lr': learning_rate * factor, 'train/grad_norm': norm,
               'train/tok_per_sec': speed, 'train/epoch': position / data.per_epoch, 'time/train_s': train_s,
               'train/skipped': position // sequences - step, 'cost/eta_hours': left / 3600}
        if peak_flops:
            row |= {'train/mfu': speed * flops / (peak_flops * world),
                    'gpu/memory_allocated_gb': torch.cuda.max_memory_allocated() / 1e9}
        if gpu_cost_per_hour:
            spent = (wall_s + time.perf_counter() - clock) / 3600 * gpu_cost_per_hour
            row |= {'cost/usd_spent': spent, 'cost/usd_left': left / 3600 * gpu_cost_per_hour,
                    'cost/tokens_per_dollar': tokens_seen / spent}
        log(row)
        minutes = f"{int(left // 3600)}:{int(left // 60 % 60):02d}:{int(left % 60):02d}"
        money = f" | ${row['cost/usd_spent']:.2f} spent" if gpu_cost_per_hour else ''
        if bar:
            bar.set_description(f"loss {train_loss:.3f} | {speed:,.0f} tok/s{money}")
        else:
            say(f"step {step:6,d} | loss {train_loss:.4f} | {speed:,.0f} tok/s | {minutes} left{money}")

# -----------------------------------------------------------------------------
# the end

finish_writing()
if bar:
    bar.close()
    bar = None
again = 'python ' + ' '.join(sys.argv)
if stop_signal and not finished:
    say(f"{stop_signal}: stopped after step {step:,} of {max_iters:,}, which is saved. To go on:\n  {again}")
elif master:
    for text in samples(3):
        print(f"--- a sample ---\n{text}")
    print(f"--- {step:,} steps, {tokens_seen:,} tokens in {train_s:.0f} s of training: "
          f"best val loss {best_val:.4f} ---\n"
          f"the loss, drawn      {os.path.join(out_dir, 'loss.png')}\n"
          f"write more           python sample.py --out_dir={out_dir} --start=\"{sample_start or 'Once upon a time'}\"\n"
          f"train longer         {again} --max_iters={2 * max_iters}")
if wandb_run:
    wandb_run.finish()
if board:
    board.close()
if ddp:
    dist.destroy_process_group()
