"""
Trains a small language model: one flat loop, read from top to bottom.

    python train.py                                            the toy run: two minutes on two CPU cores
    python train.py config/smol_360m.py --batch_size=32        a config, with the last word on the command line
    python train.py config/smol_360m.py --dry_run --gpu=H100   what it would take: memory, hours, dollars
    python train.py config/toy_sft.py                          the later stages: then toy_dpo.py, toy_rlvr.py
    torchrun --nproc_per_node=8 train.py config/smol_360m.py   on several GPUs: the very same sequences a step

A run lives in out_dir and goes on where it stopped: the same command again resumes it.
"""
import collections
import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import re
import shlex
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
eval_interval = 100           # steps between evaluations
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
# beyond this machine: tokens come from the environment or a .env file (HF_TOKEN, WANDB_API_KEY, RUNPOD_API_KEY)
hf_repo = ''                  # 'you/smol-llama': the Hub repository that receives every checkpoint and the final model
hf_private = False            # whether it is private, should this run create it
backup_dir = ''               # a slow mount (Google Drive) that receives a copy of each checkpoint, and gives it back
terminate_pod = False         # RunPod: the pod ends with the run, once the Hub has the final model; else it is stopped
terminate_on_error = 'stop'   # the pod after a crash, if terminate_pod: 'stop' | 'never'
# what is learned
stage = 'pretrain'            # 'pretrain' | 'sft' | 'dpo' | 'rlvr': where a batch comes from, and its loss
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
n_kv_head = 0                 # key and value heads; 0: n_head
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
rope_theta = 300.0            # so that even the slowest pair turns within the toy run's 256 positions
nope_every = 0                # every n-th layer without RoPE; 0: never
qk_norm = True                # RMSNorm on queries and keys: a tenth off the toy run's loss
tie_embeddings = True         # one matrix for embedding and head
embed_scale = False           # embeddings x sqrt(n_embd)
unit_embed = True             # embeddings begin at std 1: a tiny model learns to copy names only then
init = 'normal'               # 'normal' | 'trunc_normal'
init_std = 0.02
scale_residual = True         # projections into the residual stream begin smaller by sqrt(2 n_layer)
hf_layout = True              # False: you changed the maths, config.json is not to claim an architecture
# optimizer
optimizer = 'muon'            # 'muon': Muon for the matrices inside the blocks, AdamW for the rest | 'adamw'
learning_rate = 1e-2          # AdamW's peak
muon_lr = 0.01                # Muon's peak
muon_momentum = 0.95
weight_decay = 0.0
cautious = False              # Muon decays a weight only where its update agrees
decay_embeddings = False      # nanoGPT does
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0               # 0: never
max_iters = 700               # steps
# schedule
decay_lr = True               # False: constant after warm-up
schedule = 'wsd'              # 'wsd': stable, then down | 'cosine' | 'constant'
warmup_iters = 20
decay_frac = 0.4              # wsd: the last part of lr_decay_iters, in which the rate falls
decay_shape = 'linear'        # wsd: 'linear' | '1-sqrt'
lr_decay_iters = 0            # 0: max_iters
min_lr = 0.0                  # AdamW's rate at the end; Muon's falls by the same factor
# preferences: stage = 'dpo', batch_size counts pairs
pref_loss = 'sigmoid'         # 'sigmoid' (DPO) | 'apo_zero' | 'apo_down'
beta = 0.1                    # how far the policy may leave the model that it starts from: smaller, further
label_smoothing = 0.0         # sigmoid: the share of pairs that may be the wrong way round
reference_model = ''          # what the pairs are measured against; '': the model that training starts from
# verifiable rewards: stage = 'rlvr', batch_size counts prompts
verifier = 'number'           # 'number' | 'exact' | 'regex:...' | 'toy' | a .py file with verify()
verifier_model = ''           # a model directory that answers "yes" or "no", in the verifier's place
group_size = 8                # completions of each prompt
max_completion = 64           # tokens; one that is cut there gets no reward and teaches nothing
rollout_temperature = 1.0
scale_rewards = False         # advantages over the deviation of their group
clip_eps = 0.2                # how far a token's probability may move in the updates of one step
inner_epochs = 1              # updates of one step, all on the same rollouts
kl_coef = 0.0                 # weight of the divergence from the model that it starts from
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
from model import (FOLLOWS, GPT, GPUS, GPTConfig, architecture, compile_pays, documents, flops_per_token, gpu_spec,
                   group_advantages, k3, keep_memory, make_optimizers, memory_estimate, multiplies_bf16, pick_attention,
                   pick_device, pick_dtype, policy_loss, preference_loss, schedule_factor)

prepare.read_secrets()
init_typed = setup.given.get('init_from') == 'command line'  # a config's is a default, what was typed is meant
start_over = init_typed and init_from == 'scratch'
if start_over:  # as its config says: a later stage's names the model to begin with
    init_from = config['init_from'] = setup.from_files.get('init_from', 'scratch')
name = os.path.splitext(os.path.basename(setup.files[-1]))[0] if setup.files else 'toy'
out_dir = config['out_dir'] = out_dir or os.path.join('out', name)
mixture = prepare.parse_mixture(dataset)
directories = [os.path.join(data_dir, n) for n, _ in mixture]
model_keys = {k: config[k] for k in GPTConfig.__dataclass_fields__}
for key, allowed in (('stage', ('pretrain', 'sft', 'dpo', 'rlvr')), ('pref_loss', ('sigmoid', 'apo_zero', 'apo_down')),
                     ('schedule', ('wsd', 'cosine', 'constant')), ('decay_shape', ('linear', '1-sqrt')),
                     ('optimizer', ('muon', 'adamw')), ('dtype', ('auto', 'float32', 'bfloat16', 'float16')),
                     ('terminate_on_error', ('stop', 'never'))):
    if config[key] not in allowed:
        raise UserError(f"{key}={config[key]!r}: expected one of {', '.join(map(repr, allowed))}")
for least, keys in ((1, ('batch_size', 'gradient_accumulation_steps', 'block_size', 'eval_interval', 'eval_iters', 'log_interval',
                         'max_iters', 'max_completion', 'inner_epochs')),
                    (0, ('keep_checkpoints', 'checkpoint_interval', 'checkpoint_minutes', 'sample_interval', 'warmup_iters',
                         'learning_rate', 'muon_lr', 'min_lr', 'weight_decay', 'grad_clip', 'kl_coef', 'label_smoothing'))):
    for key in keys:
        if not config[key] >= least:
            raise UserError(f"{key}={config[key]}: expected at least {least}")
for key in ('beta', 'clip_eps', 'rollout_temperature'):
    if not config[key] > 0:
        raise UserError(f"{key}={config[key]}: expected more than 0")
if label_smoothing > 0.5:
    raise UserError(f"label_smoothing={label_smoothing}: expected at most 0.5, where half of the pairs are the wrong way round")
if stage == 'rlvr' and group_size < 2:
    raise UserError(f"group_size={group_size}: expected at least 2, a completion is measured against others of its group")
if hf_repo and not re.fullmatch(r'[\w.-]+/[\w.-]+', hf_repo):
    raise UserError(f"hf_repo={hf_repo!r}: expected the id of a Hub repository, owner/name")
mount = os.path.dirname(os.path.abspath(backup_dir))
if backup_dir and not os.path.isdir(mount):
    raise UserError(f"backup_dir={backup_dir!r}: {mount} does not exist; mount the drive first")
if backup_dir and os.path.exists(backup_dir) and not os.path.isdir(backup_dir):
    raise UserError(f"backup_dir={backup_dir!r}: not a directory")
if stage in ('dpo', 'rlvr') and len(mixture) > 1:
    raise UserError(f"dataset={dataset!r}: stage={stage!r} takes one data set, not a mixture")
if stage == 'rlvr':  # a verifier that is missing is refused before anything is loaded
    verify = prepare.verifier(verifier)
    if verifier_model and not os.path.isdir(verifier_model):
        raise UserError(f"verifier_model={verifier_model!r}: not a model directory, nor a run")

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
        if not gpu_spec(gpu):
            raise UserError(f"gpu={gpu!r}: expected one of {', '.join(GPUS)}")
        peak, room, price = gpu_spec(gpu)
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
if ddp and device_type == 'cuda':
    device = f"cuda:{os.environ['LOCAL_RANK']}"
if device.startswith('cuda:'):
    torch.cuda.set_device(device)
if ddp:
    dist.init_process_group(backend if device_type == 'cuda' else 'gloo')
if device_type == 'cuda':
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
elif device_type == 'cpu':
    keep_memory()
bar = None  # tqdm's progress bar, once the loop begins on a terminal


def say(text):
    """Prints on one process, above the progress bar."""
    if master:
        text = prepare.without_secrets(text)
        bar.write(text) if bar else print(text, flush=True)


# -----------------------------------------------------------------------------
# where the run begins: a run in out_dir goes on; without one, init_from says

backup = os.path.join(backup_dir, os.path.basename(os.path.normpath(out_dir))) if backup_dir else ''
BESIDE = ('log.jsonl', 'samples.txt', 'loss.png', 'reference.pt')  # what a run has beside its checkpoints, and its backup too


def whole(checkpoint):
    """(model, trainer.pt) of a checkpoint; None if it is damaged, which is told: the one before may be whole."""
    try:
        prepare.load_tokenizer(checkpoint)
        return GPT.from_pretrained(checkpoint), torch.load(os.path.join(checkpoint, 'trainer.pt'), map_location='cpu',
                                                           weights_only=True)
    except Exception as e:
        say(f"warning: {checkpoint} is damaged and passed over: {first_line(e)}")


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


if master and backup and not start_over and not prepare.checkpoints(out_dir):  # a machine that was replaced
    for kept in reversed(prepare.checkpoints(backup)):
        os.makedirs(out_dir, exist_ok=True)
        if whole(prepare.copy_whole(kept, os.path.join(out_dir, os.path.basename(kept)))):
            if os.path.isdir(os.path.join(backup, 'best')):
                prepare.copy_whole(os.path.join(backup, 'best'), os.path.join(out_dir, 'best'))
            prepare.copy_files(backup, out_dir, BESIDE)
            say(f"{out_dir} held no run: {kept} is copied back")
            break
        shutil.rmtree(os.path.join(out_dir, os.path.basename(kept)))
    else:
        if prepare.checkpoints(backup):
            raise UserError(f"{backup}: no checkpoint is whole; --init_from=scratch sets the backup aside and starts over")
if ddp:
    dist.barrier()

state = None
another = eval_only and init_typed and init_from != 'resume'  # not out_dir's own
own = [] if another or start_over else prepare.checkpoints(out_dir)
for checkpoint in reversed(own):
    if found := whole(checkpoint):
        model, state = found
        break
if own and not state:
    raise UserError(f"{out_dir}: no checkpoint is whole; --init_from=scratch sets the run aside and starts over")
if not state and (init_from == 'resume' or stage in ('dpo', 'rlvr') and init_from == 'scratch'):
    raise UserError(f"{out_dir}: there is no run to resume; leave out --init_from=resume to start one" if init_from == 'resume'
                    else f"stage={stage!r} starts from a model: --init_from=out/<a run>, a model directory or a Hub id")

# -----------------------------------------------------------------------------
# data

for (set_name, _), directory in zip(mixture, directories):
    if os.path.exists(os.path.join(directory, 'meta.json')):
        prepare.check_kind(directory, stage)
    if not os.path.exists(os.path.join(directory, 'meta.json' if stage in ('dpo', 'rlvr') else 'train.bin')):
        if set_name not in prepare.KNOWN or ddp:  # processes that wait for the one that prepares are paid for
            raise UserError(f"{directory}: no such data set; {prepare.how_to_prepare(directory)}")
        say(f"{directory} is missing; preparing it now: {prepare.describe(set_name)}")
        prepare.prepare(set_name, data_dir=data_dir)
if stage in ('pretrain', 'sft'):
    metas = [prepare.read_meta(d) for d in directories]
    for directory, other in zip(directories, metas):
        if (other['tokenizer'], other['vocab_size']) != (metas[0]['tokenizer'], metas[0]['vocab_size']):
            raise UserError(f"{directory} was made with the tokenizer {other['tokenizer']!r}, {directories[0]} with "
                            f"{metas[0]['tokenizer']!r}; a mixture has to share one")
    train_sets = [prepare.Bins(d, 'train', block_size, seed) for d in directories]
    val_sets = [prepare.Bins(d, 'val', block_size, seed) for d in directories]
    if stage == 'sft' and any(bins.mask is None for bins in train_sets + val_sets):
        raise UserError(f"{dataset}: stage='sft' wants conversations, with a train.mask and a val.mask beside the bins; "
                        "python prepare.py CHATS.jsonl --as=chat makes them")
    data = prepare.Mixture(train_sets, [weight for _, weight in mixture], seed)
    tokenizer = prepare.load_tokenizer(directories[0] if os.path.exists(os.path.join(directories[0], 'tokenizer.json'))
                                       else metas[0]['tokenizer'])
    data_vocab = metas[0]['vocab_size']
else:  # records stay text until a model's own tokenizer meets them
    tokenizer = prepare.with_chat_tokens(prepare.load_tokenizer(checkpoint if state else prepare.model_directory(init_from)))
    data_vocab = tokenizer.vocab_size
    encode = (lambda r: prepare.encode_pair(r, tokenizer, block_size)) if stage == 'dpo' else \
        (lambda r: prepare.encode_problem(r, tokenizer, block_size - max_completion))
    train_sets, val_sets = ([prepare.Records(d, split, encode, seed) for d in directories] for split in ('train', 'val'))
    data, = train_sets
    for records, what in ((data, 'records'), (val_sets[0], 'held-out records')):
        for reason, count in records.left_out.items():
            say(f"left out {count} of {count + records.per_epoch} {what} of {dataset}: {reason}")
for s, directory in zip(val_sets, directories):
    if len(s.held_out(eval_iters * batch_size)) < world:
        raise UserError(f"{directory}: {world} processes need as many held-out windows or records, there are fewer")
for key in ('reference_model', 'verifier_model') if stage in ('dpo', 'rlvr') else ():
    if config[key] and not tokenizer.agrees(prepare.load_tokenizer(prepare.model_directory(config[key]))):
        raise UserError(f"{key}={config[key]!r} has another tokenizer than the model that is trained")
fingerprint = [s.fingerprint() for s in train_sets]
eos = tokenizer.eos_id
ends = [eos] if stage == 'pretrain' else [eos, tokenizer.encode_special('<|im_end|>')]  # what a text may end with
sample_ids = tokenizer.encode(sample_start) or [eos] if stage == 'pretrain' else \
    prepare.render_chat([dict(role='user', content=sample_start)], tokenizer, add_generation_prompt=True)[0]

origin = state['config']['init_from'] if state else init_from
if origin == 'scratch':
    asked = vars(GPTConfig(**{**model_keys, 'vocab_size': vocab_size or data_vocab}))
else:  # the weights bring their shape; only what was asked for in so many words can contradict it
    asked = {k: v for k, v in model_keys.items() if k in setup.given and not (k in FOLLOWS and v == 0)
             and k not in ('init', 'init_std', 'unit_embed', 'scale_residual')}  # how weights begin
if state:  # it goes on only with the same data and model; otherwise nothing is touched
    before = state['config']
    same = {'stage': stage, 'dataset': dataset, 'seed': seed, 'doc_mask': doc_mask, 'optimizer': optimizer, **asked}
    if init_typed and init_from != 'resume':
        same['init_from'] = init_from
    for key, value in same.items():
        if before[key] != value:
            raise UserError(f"{out_dir} holds a run with {key}={before[key]!r}, this one asks for {value!r}; choose "
                            "another --out_dir, or --init_from=scratch to set the old run aside")
    if state['fingerprint'] != fingerprint:
        raise UserError(f"{', '.join(directories)}: the data changed since the run in {out_dir} began; put it back, "
                        "choose another --out_dir, or --init_from=scratch to set the old run aside")
    say(f"{'evaluating' if eval_only else 'resuming'} {checkpoint}")
    changed = [f"{k} {before[k]!r} -> {config[k]!r}" for k in setup.keys if k in before and before[k] != config[k]
               and k not in ('init_from', 'eval_only') and k not in model_keys]
    if changed:
        say(f"changed since: {', '.join(changed)}")
elif origin == 'scratch':
    if stage == 'sft':
        say("warning: stage='sft' from random weights; --init_from= names a model to begin with")
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**asked))
else:
    directory = prepare.model_directory(init_from)
    model = GPT.from_pretrained(directory)
    for key, value in asked.items():
        found = getattr(model.config, key)
        if value != found and key not in ('block_size', 'dropout'):
            raise UserError(f"{key}={value!r} was asked for, the model in {init_from} has {found!r}")
    if block_size > model.config.max_positions:
        raise UserError(f"block_size={block_size} is beyond the max_positions={model.config.max_positions} of {init_from}")
    model.set_runtime(block_size, dropout)
    say(f"weights from {directory}")
    if os.path.exists(os.path.join(directory, 'tokenizer.json')) and \
            not tokenizer.agrees(prepare.load_tokenizer(directory)):
        raise UserError(f"{dataset} was made with another tokenizer than {init_from}; prepare it with --tokenizer={directory}")
    if model.config.vocab_size < data_vocab and stage != 'pretrain':
        say(f"the model grows rows for {data_vocab - model.config.vocab_size} chat tokens")
        model.grow(data_vocab)
if model.config.vocab_size < data_vocab:
    raise UserError(f"vocab_size={model.config.vocab_size} of the model is smaller than the data's {data_vocab}")
if stage in ('pretrain', 'sft'):
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
odd = architecture(model.config, model.state_dict())[1]
if odd and hf_layout:
    say("warning: checkpoints will be model_type nanosmol, which loads here but not in transformers: " + '; '.join(odd))
muon_dtype = torch.bfloat16 if config['dtype'] != 'float32' and multiplies_bf16(device) else torch.float32
optimizers = make_optimizers(model, optimizer, learning_rate, muon_lr, muon_momentum, weight_decay, (beta1, beta2),
                             cautious, decay_embeddings, muon_dtype)
flops = flops_per_token(model)
spec = gpu_spec(torch.cuda.get_device_name(device)) if device_type == 'cuda' else None
peak_flops = spec[0] if spec else 0  # 0: not known, and no MFU

# what a checkpoint counts
step = 0          # updates done
position = 0      # sequences consumed: where the data goes on
tokens_seen = 0
train_s = 0.0     # seconds in steps, compilation included
wall_s = 0.0      # seconds in all: what a rented machine is paid for
best_val = math.nan   # the best of what the stage is after
rollbacks = 0
skipped = 0       # steps whose data was consumed and that count for nothing
recent = []       # (loss, log of the gradient norm) of the last 128 good steps
COUNTERS = ('step', 'position', 'tokens_seen', 'train_s', 'wall_s', 'best_val', 'rollbacks', 'skipped', 'recent')


def restore(state):
    """Everything but the weights, from trainer.pt."""
    globals().update({k: state[k] for k in COUNTERS if k in state})
    for opt, saved in zip(optimizers, state['optimizers']):
        for group, old in zip(opt.param_groups, saved['param_groups']):
            old |= {k: v for k, v in group.items() if k != 'params'}  # the config's rates, the checkpoint's moments
        opt.load_state_dict(saved)
    if state['scaler']:  # empty where the run was not in float16
        scaler.load_state_dict(state['scaler'])
    torch.set_rng_state(state['rng'])
    if device_type == 'cuda' and state['cuda_rng'] is not None:
        torch.cuda.set_rng_state(state['cuda_rng'])


torch.manual_seed(seed + 1)  # from here on the generator draws dropout masks and nothing else
if state:
    restore(state)
looked_at = saved_at = step if state else -1  # the last steps that were evaluated, and saved
forward = torch.nn.parallel.DistributedDataParallel(model) if ddp else model
if ddp:  # buffers are RoPE's tables, alike on all; sent along, they would tie processes together in evaluation too
    forward.broadcast_buffers = False  # the argument is deprecated since torch 2.13, its successor unknown before
if warmup_iters > max_iters:
    say(f"warning: warmup_iters={warmup_iters} is beyond max_iters and clamped to {max_iters}")

# -----------------------------------------------------------------------------
# The stages. Each says where a batch comes from (a list of micro-batches for some positions), what its loss is
# (a mean over its units: tokens, pairs), and what is measured on held-out data. Nothing else differs.

def on_device(*tensors):
    if device_type == 'cuda':
        return [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return [t.to(device) for t in tensors]


def padded(rows):
    """Sequences of different lengths as (inputs, targets) (rows, longest), padded at the right: rows of (ids, mask)
    with mask 1 where a token is to be predicted."""
    x = torch.full((len(rows), max(len(ids) for ids, _ in rows) - 1), eos)
    y = torch.full_like(x, -1)
    for i, (ids, mask) in enumerate(rows):
        x[i, :len(ids) - 1] = torch.tensor(ids[:-1])
        y[i, :len(ids) - 1] = torch.where(torch.tensor(mask[1:]) == 1, torch.tensor(ids[1:]), -1)
    return x, y


def in_micro_batches(items):
    return [items[i:i + batch_size] for i in range(0, len(items), batch_size)]


# --- pretrain and sft: windows of text; sft's targets are the assistant's words alone

def text_batches(positions):
    batches = []
    for some in in_micro_batches(positions):
        x, y = data.batch(some)
        batches.append(dict(x=x, y=y, units=(y >= 0).sum().item(), tokens=x.numel()))
    return batches


def text_loss(batch):
    x, y = on_device(batch['x'], batch['y'])
    return forward(x, y, documents(x, eos, attention) if doc_mask else None)[1], {}


def text_evaluation():
    """The mean loss over the held-out windows: of each data set, and weighted as they are mixed."""
    row, mean, rows = {}, 0.0, max(batch_size, 4096 // block_size)
    for bins, (domain, _), share in zip(val_sets, mixture, data.shares):
        total = torch.zeros(2, dtype=torch.float64)
        starts = bins.held_out(eval_iters * batch_size)[rank::world]
        for i in range(0, len(starts), rows):
            x, y = bins.read(starts[i:i + rows])
            loss, units = text_loss(dict(x=x, y=y))[0], (y >= 0).sum()
            total += torch.stack([loss.cpu() * units, units])
        total = over_processes(total)
        loss = (total[0] / total[1].clamp(min=1)).item()
        mean += share * loss
        if len(mixture) > 1:
            row |= {f'val/{domain}/loss': loss, f'val/{domain}/ppl': math.exp(min(loss, 700))}
    return {'val/loss': mean, 'val/ppl': math.exp(min(mean, 700)), **row}


# --- dpo: pairs of answers, of which the first is preferred

def pair_batch(rows, reference):
    x, y = padded([row[0] for row in rows] + [row[1] for row in rows])  # the chosen above the rejected
    return dict(x=x, y=y, reference=reference.T.flatten(), units=len(rows), tokens=sum(len(ids) for row in rows for ids, _ in row))


def pair_batches(positions):
    picked = [data[p] for p in positions]
    return [pair_batch([row for _, row in some], reference['train'][[i for i, _ in some]])
            for some in in_micro_batches(picked)]


def pair_loss(batch):
    x, y, before = on_device(batch['x'], batch['y'], batch['reference'])
    chosen, rejected = (forward(x, y, per_token=True)[1].sum(dim=1) - before).chunk(2)
    loss = preference_loss(pref_loss, chosen, rejected, beta, label_smoothing).mean()
    chosen, rejected = chosen.detach(), rejected.detach()
    return loss, {'rewards/chosen': beta * chosen.mean(), 'rewards/rejected': beta * rejected.mean(),
                  'rewards/margins': beta * (chosen - rejected).mean(),
                  'rewards/accuracies': (chosen > rejected).float().mean()}


def pair_evaluation():
    total = collections.Counter()
    indices = val_sets[0].held_out(eval_iters * batch_size)[rank::world]
    for some in in_micro_batches(indices):
        loss, metrics = pair_loss(pair_batch([val_sets[0].rows[i] for i in some], reference['val'][some]))
        for key, value in {'loss': loss, **metrics, 'units': 1.0}.items():
            total[key] += float(value) * len(some)
    return means_over_processes(total, 'val/')


@torch.no_grad()
def reference_log_probs():
    """{split: (pairs, 2)}: log p of both answers of every pair under the model that they are measured against. Kept in
    out_dir under a fingerprint of weights and data, so that no second model is ever in memory."""
    path = os.path.join(out_dir, 'reference.pt')
    weights = prepare.weights_hash(prepare.model_directory(reference_model)) if reference_model else config['start_weights']
    stamp = [weights, *fingerprint, val_sets[0].fingerprint(), block_size, dtype]
    with contextlib.suppress(Exception):  # not there, or damaged
        kept = torch.load(path, weights_only=True)
        if kept['stamp'] == stamp:
            return kept
    directory = prepare.model_directory(reference_model) if reference_model else start_directory()
    say(f"log-probabilities of the pairs under {directory} ...")
    model = frozen(directory)
    kept = {'stamp': stamp}
    for split, records in (('train', train_sets[0]), ('val', val_sets[0]))[eval_only:]:
        kept[split] = torch.zeros(len(records.rows), 2)
        for some in in_micro_batches(range(len(records.rows))[rank::world]):
            x, y = on_device(*padded([records.rows[i][0] for i in some] + [records.rows[i][1] for i in some]))
            with autocast:
                sums = model(x, y, per_token=True)[1].sum(dim=1).float().cpu()
            kept[split][list(some)] = sums.view(2, -1).T
        kept[split] = over_processes(kept[split])
    if master and not eval_only:
        try:
            torch.save(kept, path + '.part')
            os.replace(path + '.part', path)
        except (OSError, RuntimeError) as e:  # RuntimeError is torch's word for a full disk
            say(f"warning: {path} could not be kept, the next start computes it again: {first_line(e)}")
    return kept


# --- rlvr: completions that the model samples itself, rewarded by a verifier

def sample_completions(problems, places, copies, temperature, first_seed=seed):
    """[(prompt ids, completion ids, text, whether it came to an end)], `copies` for each problem. Each draws from a seed
    of its own that follows from its problem's place in the data, not from who samples it."""
    prompts = [ids for ids, _, _ in problems for _ in range(copies)]
    seeds = [first_seed + place * copies + copy for place in places for copy in range(copies)]
    longest = max(map(len, prompts))
    idx = torch.tensor([[eos] * (longest - len(ids)) + ids for ids in prompts], device=device)
    pad = torch.tensor([longest - len(ids) for ids in prompts], device=device)
    with autocast:
        out = model.generate(idx, max_completion, temperature, seed=seeds, stop=ends, pad=pad)[:, longest:].tolist()
    found = []
    for ids, completion in zip(prompts, out):
        end = next((i for i, token in enumerate(completion) if token in ends), None)
        text = tokenizer.decode(completion[:end])
        found.append((ids, completion if end is None else completion[:end + 1], text, end is not None))
    return found


def reward_of(problem, completion):
    """What the verifier gives; nothing for one that is empty or never ends. One that raises is counted."""
    global raised
    _, question, answer = problem
    _, _, text, ended = completion
    if not ended or not text.strip():
        return 0.0
    try:
        reward = judge(question, text, answer) if verifier_model else float(verify(question, text, answer))
        if not math.isfinite(reward):
            raise ValueError(f"it gave {reward}")
        return reward
    except (Exception, SystemExit) as e:
        raised += 1
        if raised == 1:
            say(f"warning: the verifier raised on {text[:60]!r}, which counts as no reward: {type(e).__name__}: {e}")
        return 0.0


def judge(question, text, answer):
    """The verifier model's probability of "yes" over "yes" and "no"."""
    asked = f"{question}\nAnswer: {text}\nIs this right? Answer yes or no."
    ids, _ = prepare.render_chat([dict(role='user', content=asked)], tokenizer, add_generation_prompt=True)
    yes, no = (tokenizer.encode(word)[0] for word in ('yes', 'no'))
    logits = judge_model(torch.tensor([ids], device=device))[0][0, -1]
    return logits[[yes, no]].softmax(0)[0].item()


@torch.no_grad()
def rollouts(positions):
    """Micro-batches of batch_size prompts with group_size completions each, and the advantages of these."""
    model.eval()
    batches = []
    for some in in_micro_batches(positions):
        problems = [data[p][1] for p in some]
        found = sample_completions(problems, some, group_size, rollout_temperature, seed + 1)
        rewards = torch.tensor([reward_of(problems[i // group_size], c) for i, c in enumerate(found)])
        advantages = group_advantages(rewards.view(-1, group_size), scale_rewards)
        # a completion that was cut has no reward to speak of: it is left out of the loss, and counted
        x, y = padded([(ids + completion, [0] * len(ids) + [int(ended)] * len(completion))
                       for ids, completion, _, ended in found])
        batch = dict(x=x, y=y, advantages=advantages.flatten(), units=(y >= 0).sum().item(),
                     tokens=sum(len(ids) + len(completion) for ids, completion, _, _ in found), measured={
            'reward/mean': rewards.mean(), 'reward/equal_groups': (advantages == 0).all(dim=1).float().mean(),
            'completions/length': sum(len(c[1]) for c in found) / len(found),
            'completions/cut': sum(not c[3] for c in found) / len(found)})
        if kl_coef:
            with autocast:
                batch['reference'] = start_model(*on_device(x, y), per_token=True, temperature=rollout_temperature)[1].cpu()
        batches.append(batch)
    model.train()
    return batches


def rollout_loss(batch):
    x, y, advantages = on_device(batch['x'], batch['y'], batch['advantages'])
    log_probs = forward(x, y, per_token=True, temperature=rollout_temperature)[1]
    old = batch.setdefault('old', log_probs.detach())  # what they were sampled under: before the first update
    reference = batch['reference'].to(device) if kl_coef else None
    each = policy_loss(log_probs, old, advantages[:, None].expand_as(old), clip_eps, reference, kl_coef)
    told = (y >= 0).float()
    metrics = dict(batch['measured'], **{'policy/entropy': -(old * told).sum() / told.sum().clamp(min=1)})
    return (each * told).sum() / told.sum().clamp(min=1), metrics


def rollout_evaluation():
    """Greedy pass@1, pass@group_size of samples, length, entropy, and divergence from the start, on held-out prompts."""
    records, total = val_sets[0], collections.Counter()
    passes = 0.5 if verifier_model else 1.0  # a verifier model gives a probability
    for some in in_micro_batches(records.held_out(eval_iters * batch_size)[rank::world]):
        problems = [records.rows[i] for i in some]
        greedy = [reward_of(p, c) >= passes for p, c in zip(problems, sample_completions(problems, some, 1, 0.0))]
        found = sample_completions(problems, some, group_size, rollout_temperature)
        rewards = torch.tensor([reward_of(problems[i // group_size], c) for i, c in enumerate(found)]).view(-1, group_size)
        x, y = on_device(*padded([(ids + c, [0] * len(ids) + [1] * len(c)) for ids, c, _, _ in found]))
        log_probs, start = (m(x, y, per_token=True, temperature=rollout_temperature)[1] for m in (model, start_model))
        told = (y >= 0).float()
        for key, value in {'pass@1': sum(greedy) / len(greedy), f'pass@{group_size}': (rewards.max(dim=1).values >= passes).float().mean(),
                           'reward/mean': rewards.mean(), 'completions/length': told.sum() / len(found),
                           'policy/entropy': -(log_probs * told).sum() / len(found),
                           'policy/kl': (k3(log_probs, start) * told).sum() / len(found), 'units': 1.0}.items():
            total[key] += float(value) * len(some)
    row = means_over_processes(total, 'val/')
    for key in ('val/policy/entropy', 'val/policy/kl'):  # of a completion so far; now of a token
        row[key] /= row['val/completions/length']
    return row


def over_processes(tensor):
    """The sum of a CPU tensor over all processes."""
    if ddp:
        moved = tensor.to(device)
        dist.all_reduce(moved)
        tensor = moved.cpu()
    return tensor


def any_process(flag):
    """Whether it is so on any process: all have to leave the loop at the same step."""
    return over_processes(torch.tensor(float(flag))).item() > 0


def leave_processes():
    """The other processes have nothing left to do and end here, uploads and the pod are the first one's. Not without a
    barrier: gloo's thread still frees the tensors of the last sum, and aborts if Python is gone by then."""
    if ddp:
        dist.barrier()
        dist.destroy_process_group()


def means_over_processes(total, prefix):
    keys = sorted(total)
    sums = dict(zip(keys, over_processes(torch.tensor([total[k] for k in keys], dtype=torch.float64)).tolist()))
    return {prefix + k: sums[k] / sums['units'] for k in keys if k != 'units'}


batches_of, loss_of, evaluation, goal = {
    'pretrain': (text_batches, text_loss, text_evaluation, 'val/loss'),
    'sft': (text_batches, text_loss, text_evaluation, 'val/loss'),
    'dpo': (pair_batches, pair_loss, pair_evaluation, 'val/loss'),
    'rlvr': (rollouts, rollout_loss, rollout_evaluation, 'val/pass@1')}[stage]
better = (lambda a, b: a > b) if stage == 'rlvr' else (lambda a, b: a < b)  # loss falls, pass@1 rises
raised = 0  # times that the verifier did, in this process


def start_directory():
    """The model that this run began with, known by its weights: the run that it comes from may have gone on since."""
    for where in (config['start_directory'], origin):
        with contextlib.suppress(UserError):
            directory = prepare.model_directory(where)
            if prepare.weights_hash(directory) == config['start_weights']:
                return directory
    raise UserError(f"{config['start_directory']}: the model that the run in {out_dir} began with is no longer there; put it "
                    "back, or choose another --out_dir")


def frozen(directory):
    """A model beside the one that is trained, with as many rows for chat tokens."""
    model = GPT.from_pretrained(directory)
    if model.config.vocab_size < data_vocab:
        model.grow(data_vocab)
    return model.to(device).eval().requires_grad_(False)


def lock_out_dir():
    """Two trainings at once in one out_dir would delete each other's checkpoints. The lock goes with this process."""
    try:
        import fcntl  # not on Windows
        fcntl.flock(os.open(out_dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out_dir}: another training is under way in it; choose another --out_dir") from None
    except (ImportError, OSError):  # a drive without locks
        pass


if stage in ('dpo', 'rlvr'):
    if state:
        config |= {k: state['config'][k] for k in ('start_directory', 'start_weights')}
    else:
        config['start_directory'] = prepare.model_directory(origin)
        config['start_weights'] = prepare.weights_hash(config['start_directory'])
if stage == 'rlvr':
    start_model = frozen(start_directory())
    judge_model = frozen(prepare.model_directory(verifier_model)) if verifier_model else None

# all checks are passed: an old run steps aside, and out_dir is this one's
if ddp:
    dist.barrier()  # every process is done with the old run
if master and not eval_only:
    os.makedirs(out_dir, exist_ok=True)
    lock_out_dir()
    for old in (out_dir, backup) if start_over else ():
        if os.path.isdir(old) and os.listdir(old):
            aside = next(f"{old}~{i}" for i in range(1, 10 ** 6) if not os.path.exists(f"{old}~{i}"))
            say(f"the run in {old} is set aside as {aside}")
            os.rename(old, aside)
            if old == out_dir:
                os.makedirs(out_dir)
                lock_out_dir()
if ddp:
    dist.barrier()
if stage == 'dpo':
    reference = reference_log_probs()


@torch.no_grad()
def evaluate():
    model.eval()
    with autocast:
        row = evaluation()
    model.train()
    return row


# -----------------------------------------------------------------------------
# samples, log, plot

def samples(count):
    """Texts that begin with sample_start, or after the first stage answer it, each until it ends."""
    shown = sample_start if stage == 'pretrain' else f"> {sample_start}\n"
    length = max(1, min(200, model.config.max_positions - len(sample_ids)))
    with autocast:
        out = model.generate(torch.tensor([sample_ids] * count, device=device), length, temperature=0.8, top_k=200,
                             seed=seed, stop=ends)
    return [shown + tokenizer.decode(list(itertools.takewhile(lambda t: t not in ends, ids[len(sample_ids):])))
            for ids in out.tolist()]


def log(row):
    """A row of log.jsonl, and of W&B and TensorBoard where they listen. What fails here never stops a run."""
    global wandb_run, board
    if not master:
        return
    try:
        with open(os.path.join(out_dir, 'log.jsonl'), 'a', encoding='utf-8') as f:
            f.write(prepare.without_secrets(json.dumps({'step': step, **in_json(row)})) + '\n')
    except OSError as e:
        warn_once('log', f"{out_dir}/log.jsonl: {first_line(e)}; training goes on, the log has a gap")
    numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
    try:
        if wandb_run:
            wandb_run.log(numbers, step=step)
        if board:
            for key, value in numbers.items():
                board.add_scalar(key, value, step)
    except Exception as e:
        wandb_run = board = None
        say(f"warning: W&B or TensorBoard failed, and get no more of this run: {first_line(e)}")


def in_json(row):
    """JSON has no word for a loss that is not a number: null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def logged():
    """The rows of log.jsonl. A line that is none, one that a full disk cut short say, is passed over."""
    rows = []
    with open(os.path.join(out_dir, 'log.jsonl'), encoding='utf-8', errors='replace') as f:
        for line in f:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and 'step' in row:
                    rows.append(row)
    return rows


def start_wandb():
    """A W&B run: online where it can be, else offline (`wandb sync` uploads it later). It never stops a run."""
    import wandb
    options = dict(project=wandb_project, name=wandb_run_name or os.path.basename(out_dir), config=config, dir=out_dir)
    quiet = dict(silent=True, init_timeout=20)
    if 'finish_timeout' in wandb.Settings.model_fields:  # a server that is gone at the end keeps no rented machine waiting
        quiet['finish_timeout'] = 120
    try:
        known = os.environ.get('WANDB_API_KEY') or wandb.api.api_key
        if known or os.environ.get('WANDB_MODE'):
            return wandb.init(**options, settings=wandb.Settings(**quiet))
        say("warning: not logged in to W&B (wandb login), so it logs offline; wandb sync uploads it later")
    except Exception as e:
        say(f"warning: W&B did not start, so it logs offline; wandb sync uploads it later: {first_line(e)}")
    return wandb.init(**options, mode='offline', settings=wandb.Settings(**quiet))


def start_hub():
    """The Hub's client, without bars and warnings of its own."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars, logging
    disable_progress_bars()
    logging.set_verbosity_error()
    prepare.hide('HF_TOKEN', get_token())  # `hf auth login` keeps one too, elsewhere than in the environment
    return HfApi()


def start_tensorboard():
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(os.path.join(out_dir, 'tensorboard'), purge_step=step)
    except ImportError:
        say("warning: tensorboard=True, but it is not installed (pip install tensorboard); the run goes on without")


def gpu_utilization():
    """{'gpu/utilization': percent}; nothing without NVIDIA's library for it (pip install nvidia-ml-py), or where it
    can't tell, as for a part of a GPU."""
    try:
        return {'gpu/utilization': torch.cuda.utilization(device)}
    except Exception:
        return {}


def plot():
    """out_dir/loss.png: the loss of training and of held-out data, and the learning rate."""
    from matplotlib.figure import Figure
    rows = logged()
    figure = Figure(figsize=(8, 4.5), layout='constrained')
    axis = figure.add_subplot(xlabel='step', ylabel='loss (nats a token)', title=out_dir)
    rate = axis.twinx()
    rate.set_ylabel('learning rate')
    for ax, key, style in ((axis, 'train/loss', dict(alpha=0.6)), (axis, 'val/loss', dict(marker='o')),
                           (rate, 'train/lr', dict(color='gray', linewidth=0.7))):
        known = [r for r in rows if r.get(key) is not None]
        ax.plot([r['step'] for r in known], [r[key] for r in known], label=key, **style)
    axis.legend()
    try:
        figure.savefig(os.path.join(out_dir, 'loss.png'), dpi=120)
    except OSError as e:
        warn_once('plot', f"{out_dir}/loss.png: {first_line(e)}; training goes on")


def update():
    """The optimizers take their step, and the gradients go."""
    for opt in optimizers:
        scaler.step(opt)
    scaler.update()
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)


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
        model.save_pretrained(beside, hf_layout and not odd, {'eos_token_id': ends if len(ends) > 1 else eos}, weights)
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
        send(target, best)
    except Exception as e:  # a full disk, most often: training goes on, and the one before stays whole
        shutil.rmtree(beside, ignore_errors=True)
        before = 'the one before it stays' if prepare.checkpoints(out_dir) else 'there is none before it'
        what = 'is written, but not its second name, best' if os.path.isdir(target) else f'could not be written, {before}'
        say(f"warning: {target} {what}: {first_line(e)} ({shutil.disk_usage(out_dir).free / 1e6:,.1f} MB are free)")
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
# The Hub and the backup. Each has a thread of its own: training never waits, and neither waits for the other.
# What a thread has yet to send lies in a directory of out_dir, hard links that rotation leaves alone, so that a run that
# was killed uploads the rest when it goes on.

hub = None                  # the Hub's client, where hf_repo is set
threads, jobs = {}, []      # the threads, and what they were given
warned = set()              # kinds of trouble that were told: each is told once
over = threading.Event()    # training has ended; an upload that waits for its next try tries at once
tries_left = 1              # failed uploads from then on; 0: the Hub refused, nothing more is sent


def in_background(kind, function, *args):
    if kind not in threads:
        threads[kind] = concurrent.futures.ThreadPoolExecutor(1)
    jobs.append(threads[kind].submit(function, *args))
    return jobs[-1]


def warn_once(kind, text):
    if kind not in warned:
        say(f"warning: {text}")
    warned.add(kind)


def held(checkpoint, queue):
    """The checkpoint's files under a second name, whole or not at all: rotation may take the first one meanwhile."""
    target = os.path.join(out_dir, queue, os.path.basename(checkpoint))
    shutil.rmtree(target + '.part', ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(checkpoint, target + '.part', copy_function=link_or_copy)
    os.rename(target + '.part', target)
    return target


def send(checkpoint, best):
    """Gives a finished checkpoint to the threads."""
    try:
        if backup:
            in_background('backup', back_up, held(checkpoint, '.copying'), best)
        if hub and tries_left:
            # uploads that fall far behind must not fill the disk: the oldest that waits goes, never the one under way
            size = sum(os.path.getsize(os.path.join(checkpoint, f)) for f in os.listdir(checkpoint))
            for old in prepare.checkpoints(os.path.join(out_dir, '.uploading'))[1:]:
                if shutil.disk_usage(out_dir).free < 4 * size:
                    shutil.rmtree(old)
                    log({'event': 'upload dropped', 'path': old})
                    warn_once('dropped', f"the disk is nearly full and uploads fall behind: {old} is not uploaded")
            in_background('Hub', upload, held(checkpoint, '.uploading'), f"checkpoints/{os.path.basename(checkpoint)}")
    except OSError as e:
        warn_once('held', f"{checkpoint} is whole, but could not be set aside for the Hub or the backup: {first_line(e)}")


def back_up(folder, best):
    """Copies a checkpoint to the backup, whole or not at all; what the run has beside it too; the oldest go."""
    begun = time.perf_counter()
    try:
        if best or prepare.checkpoints(os.path.join(out_dir, '.copying'))[-1] == folder:  # not one that is out of date
            target = prepare.copy_whole(folder, os.path.join(backup, os.path.basename(folder)))
            if best:
                prepare.copy_whole(folder, os.path.join(backup, 'best'))
            for old in prepare.checkpoints(backup)[:-keep_checkpoints] if keep_checkpoints else []:
                shutil.rmtree(old, ignore_errors=True)
            log({'event': 'backup', 'path': target, 'seconds': time.perf_counter() - begun})
            prepare.copy_files(out_dir, backup, BESIDE)
    except OSError as e:
        warn_once('backup', f"backup_dir={backup_dir}: {first_line(e)}; training goes on, the next one is tried again")
        log({'event': 'backup failed', 'path': folder, 'error': first_line(e)})
    shutil.rmtree(folder, ignore_errors=True)


def refused(error):
    """Whether the Hub's answer is final, which ends all uploads; what is a matter of time is tried again."""
    global tries_left
    status = getattr(getattr(error, 'response', None), 'status_code', 0)
    if not 400 <= status < 500 or status in (404, 408, 409, 412, 429):
        return False
    warn_once('Hub', f"hf_repo={hf_repo}: the Hub refuses ({status}), so nothing more is uploaded; training goes on. Check "
              f"that HF_TOKEN is right and may write there: {first_line(error)}")
    tries_left = 0
    return True


def greet_hub():
    """At the start, so that a token that may not write is told now and not at the first checkpoint."""
    try:
        hub.create_repo(hf_repo, private=hf_private, exist_ok=True)
    except Exception as e:
        refused(e)


def confirmed(folder, path):
    """Whether the Hub, asked, has every file of the folder in its size, and the weights with their SHA-256."""
    sizes = {os.path.join(path, f): os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder)}
    there = {f.path: f for f in hub.get_paths_info(hf_repo, list(sizes))}
    weights = there.get(os.path.join(path, 'model.safetensors'))
    return sizes == {f: there[f].size for f in there} and weights and weights.lfs and \
        weights.lfs.sha256 == prepare.sha256(os.path.join(folder, 'model.safetensors'))


def upload(folder, path):
    """True once the Hub has confirmed the folder. What fails is tried again with growing pauses, for as long as training
    goes on and a few times after it."""
    global tries_left
    begun, pause, where = time.perf_counter(), 1, f'{hf_repo}/{path}'.rstrip('/')
    while tries_left and os.path.isdir(folder):
        try:
            hub.create_repo(hf_repo, private=hf_private, exist_ok=True)
            hub.upload_folder(repo_id=hf_repo, folder_path=folder, path_in_repo=path, commit_message=path or 'Final model')
            if not confirmed(folder, path):
                raise OSError("what is on the Hub is not what was sent")
            log({'event': 'upload', 'path': where, 'seconds': time.perf_counter() - begun})
            shutil.rmtree(folder)
            return True
        except Exception as e:  # no network, in whatever words the client has for it
            log({'event': 'upload failed', 'path': where, 'error': first_line(e)})
            if refused(e):
                break
            warn_once('Hub', f"the upload of {where} failed; it is tried again, training goes on: {first_line(e)}")
            if over.is_set():
                tries_left = max(tries_left - 1, 0)
                time.sleep(pause if tries_left else 0)
                pause *= 2
            else:
                pause = 1 if over.wait(pause) else min(2 * pause, 60)
    return False


def upload_final():
    """The last step's model, a card and the curve, to the root of the repository."""
    folder = os.path.join(out_dir, '.uploading', 'final')
    try:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(os.path.join(out_dir, f'step_{step:06d}'), folder, copy_function=link_or_copy,
                        ignore=shutil.ignore_patterns('trainer.pt'))
        with open(os.path.join(folder, 'README.md'), 'w', encoding='utf-8') as f:
            f.write(prepare.without_secrets(model_card()))
        prepare.copy_files(out_dir, folder, ['loss.png'])
    except OSError as e:
        warn_once('held', f"the final model could not be made ready for the Hub: {first_line(e)}")
        return False
    return upload(folder, '')


# what a card does not tell: where things lie on this machine, and what is nobody's business
PRIVATE = ('out_dir', 'data_dir', 'backup_dir', 'init_from', 'hf_repo', 'hf_private', 'terminate_pod', 'terminate_on_error',
           'wandb_log', 'wandb_project', 'wandb_run_name', 'tensorboard', 'dry_run', 'gpu', 'mfu', 'gpu_cost_per_hour')


def model_card():
    """README.md of the Hub repository, from the run's own config and log."""
    rows = logged()
    measured = [(r['step'], r[goal]) for r in rows if r.get(goal) is not None] or [(step, math.nan)]
    best_step, best_value = (max if stage == 'rlvr' else min)(measured, key=lambda m: m[1])
    loss = next((r['train/loss'] for r in reversed(rows) if r.get('train/loss') is not None), math.nan)
    sources = [prepare.KNOWN[n]['hub'] for n, _ in mixture if 'hub' in prepare.KNOWN.get(n, {})]
    local = origin == 'scratch' or os.path.exists(origin) or origin.startswith(('.', '/', 'out/'))
    base = '' if local else origin  # a Hub id
    theirs = hf_layout and not odd
    head = {'library_name': 'transformers' if theirs else 'nanosmol', 'pipeline_tag': 'text-generation',
            'tags': ['nanosmol', stage], 'base_model': base, 'datasets': sources}
    front = '\n'.join(f'{k}: {json.dumps(v)}' for k, v in head.items() if v)
    settings = '\n'.join(f'{k} = {config[k]!r}' for k in setup.keys
                         if k not in PRIVATE and not str(config[k]).startswith(('/', '~')))
    load = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{hf_repo}")
tokenizer = AutoTokenizer.from_pretrained("{hf_repo}")
```

In nanosmol:""" if theirs else "In nanosmol, since transformers has no architecture like this one:"
    return f"""---
{front}
---

# {hf_repo.split('/')[1]}

{model.n_params():,} parameters, trained with nanosmol ({stage}{f', from {base}' if base else ''}) for {step:,} steps on \
{tokens_seen:,} tokens of {dataset}{f" ({', '.join(sources)})" if sources else ''}. The weights are those of the last step; \
`checkpoints/` holds earlier ones, with the state of their optimizers.

| | step | |
|---|---|---|
| {goal} at the end | {measured[-1][0]:,} | {measured[-1][1]:.4f} |
| {goal} at its best | {best_step:,} | {best_value:.4f} |
| train/loss at the end | {step:,} | {loss:.4f} |

![loss](loss.png)

{load}

    python sample.py --init_from={hf_repo}

The run's config, as nanosmol reads it:

```python
{settings}
```
"""


def finish_jobs(tries):
    """Waits for what is under way; uploads that fail have `tries` left in all, one after Ctrl-C."""
    global tries_left
    if not master:
        return
    finish_writing()
    tries_left = min(tries_left, 1) * tries
    over.set()
    if not all(job.done() for job in jobs):
        say(f"waiting for uploads and copies under way; Ctrl-C {'again' if stop_signal else 'twice'} leaves without them")
    while concurrent.futures.wait(jobs, timeout=0.2).not_done:
        tries_left = min(tries_left, 1) if stop_signal else tries_left
    if backup:
        with contextlib.suppress(OSError):  # told by now
            prepare.copy_files(out_dir, backup, BESIDE)
    for queue in ('.copying', '.uploading'):
        with contextlib.suppress(OSError):  # not there, or not empty
            os.rmdir(os.path.join(out_dir, queue))


# -----------------------------------------------------------------------------
# RunPod: terminating a pod deletes its disk, so the Hub has to have the model; stopping it keeps /workspace

pod = os.environ.get('RUNPOD_POD_ID', '') if terminate_pod else ''


def end_pod(how):
    """Terminates or stops this pod, after ten seconds in which Ctrl-C calls it off."""
    import requests
    method, url = ('DELETE', '') if how == 'terminate' else ('POST', '/stop')
    url = f"{os.environ.get('RUNPOD_API_BASE', 'https://rest.runpod.io/v1')}/pods/{requests.utils.quote(pod, safe='')}{url}"
    key = {'Authorization': f"Bearer {os.environ.get('RUNPOD_API_KEY', '')}"}
    tell = lambda text: print(f"RunPod: {prepare.without_secrets(text)}", flush=True)  # whichever process crashed
    tell(f"about to {how} pod {pod} in ten seconds; Ctrl-C calls it off")
    for _ in range(100):
        if stop_signal:
            return tell(f"called off, pod {pod} runs on, and costs")
        time.sleep(0.1)
    log({'event': 'pod', 'how': how})
    for pause in (1, 4, 0):
        try:
            requests.request(method, url, headers=key, timeout=30).raise_for_status()
            return tell(f"pod {pod} was told to {how}")
        except requests.RequestException as e:
            trouble = first_line(e)
            time.sleep(pause)
    tell(f"could not {how} pod {pod}, which runs on, and costs: {trouble}. End it at https://console.runpod.io/pods")


def on_crash(kind, error, traceback):
    """sys.excepthook once training has begun: what is under way is finished, and the pod no longer paid for."""
    global wandb_run, board
    tell_error(kind, error, traceback)
    wandb_run = board = None  # they may be what raised
    finish_jobs(tries=1)
    if pod and terminate_on_error == 'stop' and not stop_signal:
        end_pod('stop')


# -----------------------------------------------------------------------------
# the start: loggers, signals, a line or two

wandb_run = board = None
if eval_only:
    say(', '.join(f"{k} {v:.4f}" for k, v in evaluate().items()))
    leave_processes()
    sys.exit()
if master:
    log_path = os.path.join(out_dir, 'log.jsonl')
    if os.path.exists(log_path):  # rows past the checkpoint tell of steps that will be taken again
        kept = [json.dumps(row) + '\n' for row in logged() if row['step'] <= step]
        with open(log_path + '.part', 'w', encoding='utf-8') as f:
            f.writelines(kept)
        os.replace(log_path + '.part', log_path)
    wandb_run = start_wandb() if wandb_log else None
    board = start_tensorboard() if tensorboard else None
    left_out = {s.path: dict(s.left_out) for s in train_sets + val_sets if getattr(s, 'left_out', None)}
    log({'event': 'resume' if state else 'start', 'config': config, **({'left_out': left_out} if left_out else {})})
    for damaged in own[own.index(checkpoint) + 1:] if state else []:  # else rotation would take it for the newest
        shutil.rmtree(damaged + '.damaged', ignore_errors=True)
        os.rename(damaged, damaged + '.damaged')
    shutil.rmtree(os.path.join(out_dir, '.copying'), ignore_errors=True)
    if backup and state and not os.path.isdir(os.path.join(backup, os.path.basename(checkpoint))):
        in_background('backup', back_up, held(checkpoint, '.copying'), False)
    if hf_repo:
        hub = start_hub()
        in_background('Hub', greet_hub)
        for left in prepare.checkpoints(os.path.join(out_dir, '.uploading')):
            in_background('Hub', upload, left, f'checkpoints/{os.path.basename(left)}')
    if pod and not hf_repo:
        say("RunPod: without hf_repo the pod is stopped at the end, not terminated")
    if pod and not os.path.realpath(out_dir).startswith('/workspace/'):
        say(f"warning: out_dir={out_dir} is not in /workspace, and nothing else outlives a pod that is stopped")
    if pod and not os.environ.get('RUNPOD_API_KEY'):
        say("warning: terminate_pod=True, but there is no RUNPOD_API_KEY: the pod will run on, and cost, after the end")
stop_signal = None


def ask_to_stop(number, frame):
    """SIGINT and SIGTERM: the step ends, a checkpoint is written. A second one ends it at once."""
    global stop_signal
    if stop_signal:
        os._exit(130)
    stop_signal = signal.Signals(number).name


signal.signal(signal.SIGINT, ask_to_stop)
signal.signal(signal.SIGTERM, ask_to_stop)
tell_error, sys.excepthook = sys.excepthook, on_crash
say(f"{model.n_params() / 1e6:.2f}M parameters; {dataset}: {' + '.join(s.amount for s in train_sets)}; "
    f"{max_iters:,} steps of {sequences} " + {'dpo': "pairs", 'rlvr': f"prompts x {group_size} completions"}.get(
        stage, f"x {block_size} = {sequences * block_size:,} tokens"))
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
marked = step, tokens_seen, train_s  # at the last line of the log

while True:
    # evaluation, sample, checkpoint: before the first step, at every interval, after the last
    finished, stopping = step >= max_iters, any_process(stop_signal is not None)
    due, looked_at = step != looked_at, step  # a skipped step comes here twice, a resumed one has been here
    evaluated = best = False
    if due and (step % eval_interval == 0 or finished):
        row, evaluated = evaluate(), True
        best = step > 0 and not row[goal] != row[goal] and (math.isnan(best_val) or better(row[goal], best_val))
        best_val = row[goal] if best else best_val
        log(row)
        say(f"step {step:6,d} | " + ' | '.join(f"{k.replace('val/loss', 'val loss').removeprefix('val/')} {v:.4f}"
                                              for k, v in row.items() if not k.endswith('ppl')))
    if due and sample_interval and step and step % sample_interval == 0 and master:
        text = samples(1)[0]
        log({'event': 'sample', 'text': text})
        with open(os.path.join(out_dir, 'samples.txt'), 'a', encoding='utf-8') as f:
            f.write(f"--- step {step} ---\n{text}\n")
    wall_s, clock = wall_s + time.perf_counter() - clock, time.perf_counter()
    if master and step and step != saved_at and (
            finished or stopping or best or evaluated and always_save_checkpoint
            or due and checkpoint_interval and step % checkpoint_interval == 0
            or checkpoint_minutes and clock - last_saved > 60 * checkpoint_minutes):
        save(best)
        saved_at, last_saved = step, clock
    if master and evaluated and step:
        plot()
    if finished or stopping:
        break

    # torch.compile: at once on a GPU, on a CPU once it is known how long a step takes
    if compile and not compiled and (device_type == 'cuda' or steps_here == 20) and \
            compile_pays(device_type, max_iters - step, train_s / max(step, 1)):
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
    batches = batches_of(mine)
    units, tokens = over_processes(torch.tensor([sum(b[k] for b in batches) for k in ('units', 'tokens')],
                                                dtype=torch.float64)).tolist()
    units = max(units, 1)
    for inner in range(inner_epochs if stage == 'rlvr' else 1):
        step_loss, metrics = torch.zeros((), device=device), collections.Counter()
        for i, batch in enumerate(batches):
            if ddp:
                forward.require_backward_grad_sync = i == len(batches) - 1
            with autocast:
                loss, measured = loss_of(batch)
                loss = loss * (batch['units'] / units)
            step_loss += loss.detach()
            for key, value in measured.items():
                metrics[key] += float(value) / len(batches)
            scaler.scale(loss * world).backward()  # DDP divides by world
        if ddp:
            dist.all_reduce(step_loss)
        for opt in optimizers:
            scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf).item()
        train_loss = step_loss.item()
        if not (math.isfinite(train_loss) and (math.isfinite(norm) or scaler.is_enabled())):
            break
        if inner < inner_epochs - 1 and stage == 'rlvr':
            update()
    position += sequences

    # a step that would do harm is skipped and not counted; its data is passed over
    log_norm = math.log(norm) if 0 < norm < math.inf else -math.inf if norm == 0 else math.inf
    why = 'not finite' if not (math.isfinite(train_loss) and math.isfinite(norm)) else \
        'loss spike' if too_high(train_loss, [r[0] for r in recent], 0.03) else \
        'gradient spike' if too_high(log_norm, [r[1] for r in recent], 0.2) else ''
    if why and not (scaler.is_enabled() and math.isfinite(train_loss) and not math.isfinite(norm)):
        # float16's gradients may overflow; its scaler skips those steps itself
        bad_in_a_row, skipped = bad_in_a_row + 1, skipped + 1
        say(f"step {step + 1} skipped: {why}, loss {train_loss:.4f}, gradient norm {norm:.4g}")
        log({'event': 'skipped', 'why': why, 'train/loss': train_loss, 'train/grad_norm': norm, 'position': position})
        scaler.update()
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        if bad_in_a_row == max_bad_steps:
            finish_writing()
            if ddp:
                dist.barrier()
            if not prepare.checkpoints(out_dir) or rollbacks == max_rollbacks:
                leave_processes()
                if not master:
                    sys.exit()  # the first one tells, and finishes its uploads
                kept = prepare.checkpoints(out_dir)
                raise UserError(f"{max_bad_steps} bad steps in a row after step {step} and {rollbacks} rollbacks; "
                                f"{f'{kept[-1]} is whole' if kept else 'there is no checkpoint yet to go back to'}. Lower "
                                "the learning rate, or look at the data")
            last = prepare.checkpoints(out_dir)[-1]
            beyond, times, spent, lost = position, rollbacks + 1, wall_s, skipped + step
            model.load_state_dict(GPT.from_pretrained(last).state_dict())
            restore(torch.load(os.path.join(last, 'trainer.pt'), map_location='cpu', weights_only=True))
            position, rollbacks, wall_s, bad_in_a_row, looked_at, saved_at = beyond, times, spent, 0, step, step
            skipped = lost - step
            marked = step, tokens_seen, train_s
            say(f"{max_bad_steps} bad steps in a row: back to {last}, past the data that did it")
            log({'event': 'rollback', 'position': position})
        continue
    bad_in_a_row = 0
    if math.isfinite(log_norm):
        recent = recent[-127:] + [[train_loss, log_norm]]

    update()
    step, steps_here = step + 1, steps_here + 1
    tokens_seen += int(tokens)
    train_s += time.perf_counter() - begun

    if bar:
        bar.update()
    if step % log_interval == 0 or step == max_iters:
        speed = (tokens_seen - marked[1]) / (train_s - marked[2])
        left = (max_iters - step) * (train_s - marked[2]) / (step - marked[0])
        marked = step, tokens_seen, train_s
        metrics = means_over_processes({**metrics, 'units': 1}, '')
        row = {'train/loss': train_loss, 'train/lr': learning_rate * factor, 'train/grad_norm': norm,
               'train/tok_per_sec': speed, 'train/epoch': position / data.per_epoch, 'time/train_s': train_s,
               'train/skipped': skipped, 'cost/eta_hours': left / 3600, **metrics}
        if on_all := over_processes(torch.tensor(float(raised))).item():
            row['reward/verifier_raised'] = on_all
        if peak_flops:
            row['train/mfu'] = speed * flops / (peak_flops * world)
        if device_type == 'cuda':
            row |= {'gpu/memory_allocated_gb': torch.cuda.max_memory_allocated() / 1e9, **gpu_utilization()}
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
            told = ''.join(f" | {k.split('/')[0].rstrip('s')} {metrics[k]:.3f}" for k in ('rewards/accuracies', 'reward/mean')
                           if k in metrics)
            say(f"step {step:6,d} | loss {train_loss:.4f}{told} | {speed:,.0f} tok/s | {minutes} left{money}")

# -----------------------------------------------------------------------------
# the end

leave_processes()
finish_writing()
final = in_background('Hub', upload_final) if hub and finished else None
if bar:
    bar.close()
    bar = None
again = [*(['torchrun', f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"] if ddp else ['python']),
         *(a for a in sys.argv if a != '--init_from=scratch')]  # which would begin anew
is_saved = os.path.isdir(os.path.join(out_dir, f'step_{step:06d}'))
if stopping and not finished:
    say(f"{stop_signal or 'a signal'}: stopped after step {step:,} of {max_iters:,}, "
        f"{'which is saved' if is_saved else 'which is not saved'}. To go on:\n  {shlex.join(again)}")
elif master:
    for text in samples(3):
        print(f"--- a sample ---\n{prepare.for_terminal(text)}")
    write_more = ['python', 'sample.py', f'--out_dir={out_dir}', f"--start={sample_start or 'Once upon a time'}"]
    train_longer = [*(a for a in again if not a.startswith('--max_iters=')), f'--max_iters={2 * max_iters}']
    print(f"--- {step:,} steps, {tokens_seen:,} tokens in {train_s:.0f} s of training: "
          f"best {goal.replace('val/loss', 'val loss')} {best_val:.4f} ---\n"
          f"the loss, drawn      {os.path.join(out_dir, 'loss.png')}")
    if is_saved:
        print(f"write more           {shlex.join(write_more)}\n"
              f"train longer         {shlex.join(train_longer)}")
finish_jobs(tries=4 if finished else 1)
on_hub = final is not None and final.result()
if final:
    say(f"the final model is at {hub.endpoint}/{hf_repo}" if on_hub else
        f"the final model is not on the Hub but in {out_dir}; the same command tries again")
if wandb_run:
    wandb_run.finish()
if board:
    board.close()
wandb_run = board = None
if pod and master and finished and not stop_signal:
    end_pod('terminate' if on_hub else 'stop')
if master and finished and not is_saved:
    sys.exit(f"train.py: the last step is not in {out_dir}, its checkpoint could not be written (see above)")
