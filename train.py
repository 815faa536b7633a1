"""
Trains a small language model: one flat loop, read from top to bottom.

    python train.py                                           the toy run: two minutes on two cores
    python train.py config/smol_360m.py --batch_size=32       a config; options override it
    python train.py config/smol_360m.py --dry_run --gpu=H100  what it takes: memory, hours, dollars
    python train.py config/toy_sft.py                         the next stage; then toy_dpo, toy_rlvr
    python train.py config/toy_distill.py                     a small model learns from a larger one
    torchrun --nproc_per_node=8 train.py config/smol_360m.py  several GPUs, the same steps

A run lives in out_dir. The same command again resumes it.
"""

import math
import os
import sys
import time
import types

from configurator import UserError, configure, survive_dead_stdout

# -----------------------------------------------------------------------------
# The defaults are the toy run. Quoted values ('a' | 'b') and bounds (>= 1) in comments are checked.
# fmt: off
# where a run lives
out_dir = ""                  # '': out/<name of the config>, out/toy without one
init_from = "scratch"         # scratch, resume, or where weights are: a run, a model, a Hub id
eval_interval = 100           # steps between evaluations (>= 1)
eval_iters = 50               # x batch_size held-out sequences are measured, the same ones (>= 1)
eval_only = False             # evaluate once and stop
log_interval = 10             # steps between lines of the log (>= 1)
always_save_checkpoint = True # also at evaluations; False: at intervals, the best and the last
checkpoint_interval = 0       # steps between checkpoints; 0: only at evaluations (>= 0)
checkpoint_minutes = 0.0      # also every so many minutes; 0: never (>= 0)
keep_checkpoints = 2          # the newest N stay, and best/; 0: all stay (>= 0)
sample_interval = 0           # steps between samples; 0: at the end only (>= 0)
sample_start = ""             # what a sample begins with; '': the end-of-text token
wandb_log = False             # also log to Weights & Biases
wandb_project = "nanosmol"
wandb_run_name = ""           # '': the name of out_dir
tensorboard = False           # also log to TensorBoard (pip install tensorboard)
# beyond this machine; HF_TOKEN, WANDB_API_KEY, RUNPOD_API_KEY come from the environment or .env
hf_repo = ""                  # you/smol-llama: receives every checkpoint, and the final model
hf_private = False            # create it as a private repository
backup_dir = ""               # a slow mount (Google Drive): mirrors the newest checkpoints
terminate_pod = False         # RunPod: terminate it once the Hub has the final model, else stop it
terminate_on_error = "stop"   # the pod after a crash, if terminate_pod: 'stop' | 'never'
# what is learned, and from what
stage = "pretrain"            # 'pretrain' | 'sft' | 'dpo' | 'rlvr' | 'distill'
dataset = "toy"               # a directory in data/, or a mixture: web:0.87,code:0.13
data_dir = "data"
batch_size = 12               # sequences, whatever fits; dpo: pairs; rlvr, distill: prompts (>= 1)
gradient_accumulation_steps = 1  # x batch_size sequences make a step, on all processes (>= 1)
micro_batch_size = 0          # sequences on the device at a time; 0: as many as fit (>= 0)
doc_mask = True               # documents packed into one window don't attend to each other
# the model: all keys of GPTConfig in model.py are keys, too (n_layer, n_embd, block_size, ...)
grad_checkpoint = False       # recompute activations: less memory, a third more time
hf_layout = True              # False: the maths was edited, config.json names no architecture
# optimizer and schedule
optimizer = "muon"            # 'muon' (matrices inside blocks; AdamW for the rest) | 'adamw'
learning_rate = 1e-2          # AdamW's peak (>= 0)
muon_lr = 0.01                # Muon's peak (>= 0)
muon_momentum = 0.95          # (>= 0, < 1)
weight_decay = 0.0            # (>= 0)
cautious = False              # Muon decays a weight only where its update has the same sign
decay_embeddings = False      # nanoGPT does
beta1 = 0.9                   # (>= 0, < 1)
beta2 = 0.95                  # (>= 0, < 1)
grad_clip = 1.0               # 0: never (>= 0)
max_iters = 650               # steps (>= 1)
time_budget = 0.0             # seconds of training that run and schedule last; 0: steps (>= 0)
decay_lr = True               # False: constant after warm-up
schedule = "wsd"              # 'wsd' (warm-up, stable, decay) | 'cosine' | 'constant'
warmup_iters = 20             # (>= 0)
decay_frac = 0.4              # wsd: share of lr_decay_iters in which the rate falls (>= 0, <= 1)
decay_shape = "linear"        # wsd: 'linear' | '1-sqrt'
lr_decay_iters = 0            # 0: max_iters (>= 0)
min_lr = 0.0                  # AdamW's rate at the end; Muon's falls by the same factor (>= 0)
# dpo
pref_loss = "sigmoid"         # 'sigmoid' (DPO) | 'apo_zero' | 'apo_down'
beta = 0.1                    # strength of the pull towards the reference model (> 0)
label_smoothing = 0.0         # sigmoid: share of pairs with swapped labels (>= 0, <= 0.5)
reference_model = ""          # '': the model that training starts from
# rlvr
verifier = "number"           # number, exact, regex:..., toy, or a .py file that defines verify()
verifier_timeout = 10.0       # seconds; a call that takes longer counts as raised (> 0)
verifier_model = ""           # a model that answers yes or no, instead of the verifier
group_size = 8                # completions for each prompt (>= 2)
max_completion = 64           # tokens; a truncated completion is left out of the loss (>= 1)
rollout_temperature = 1.0     # (> 0)
scale_rewards = False         # divide advantages by the standard deviation of their group
clip_eps = 0.2                # PPO's clipping range (> 0)
inner_epochs = 1              # updates on the same rollouts (>= 1)
kl_coef = 0.0                 # weight of the KL divergence from the reference model (>= 0)
# distill; completions and val/pass@1 as in rlvr
teacher = ""                  # a run, a model directory or a Hub id, with the same tokenizer
# guards
spike_z = 12.0                # skip steps so many deviations above the usual loss; 0: never (>= 0)
max_bad_steps = 5             # so many in a row: roll back and skip their data (>= 1)
max_rollbacks = 3             # then stop (>= 0)
# machine
device = "auto"               # 'auto' | 'cpu' | 'cuda' | 'cuda:...' | 'mps'
dtype = "auto"                # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile = True                # torch.compile, where it pays back within the run
backend = "nccl"              # of torch.distributed on CUDA; gloo on a CPU
seed = 1337                   # (>= 0)
# money
dry_run = False               # print what a run would take, and stop
gpu = ""                      # dry_run: a GPU's name, such as H100
mfu = 0.4                     # dry_run: share of the peak that the run reaches (> 0, <= 1)
gpu_cost_per_hour = 0.0       # dollars; 0: not counted (dry_run: the table's price) (>= 0)
# -----------------------------------------------------------------------------
setup = configure(globals(), also="model.py:GPTConfig")  # config files, then --key=value
config = setup.config         # every key and its value: what a checkpoint and the log record
survive_dead_stdout()         # training goes on if the terminal closes; log.jsonl has the log

if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # less of a GPU's memory is lost between pieces
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what a Mac's GPU lacks, its CPU does
import torch  # this late, so that --help and mistyped keys are answered at once
import torch.distributed as dist

import prepare
import runs
from model import (MemoryGuard, Threads, barrier, broadcast_weights, compile_pays, completion_loss,
                   completion_measures, distillation_loss, document_ends, documents,
                   expected_seconds, faster_attention, group_advantages, make_optimizers,
                   over_processes, pair_loss, pick_attention, pick_dtype, pick_micro_batch_size,
                   pick_muon_dtype, plan, sample_completions, schedule_factor, schedule_step,
                   set_up_device, sum_gradients, undo_compile, why_harmful, yes_probability)
# fmt: on

prepare.read_secrets()
out_dir = config["out_dir"] = os.path.normpath(out_dir or runs.directory_of(setup.files))
dataset = config["dataset"] = prepare.dataset_names(dataset, data_dir)
ddp = "RANK" in os.environ  # set by torchrun
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
master_process = rank == 0  # prints, logs and saves
runs.check(config, world_size)
rolls_out = stage in ("rlvr", "distill")  # learns from the model's own completions
if rolls_out:  # a verifier that is missing is refused before anything is loaded
    verify = prepare.verifier(verifier)
if dry_run:
    config["gpu_cost_per_hour"] = runs.price_of(gpu, config, setup)
    plan(config, runs.shape_of(config, setup), gpu, runs.most_steps(config, setup))
    sys.exit()

# -----------------------------------------------------------------------------
# log and device

log = runs.Log(out_dir, master_process)
say = log.say
sequences = batch_size * gradient_accumulation_steps  # in a step, over all processes
device = set_up_device(device)
device_type = device.split(":")[0]
if ddp:
    # numbers of the host go through gloo and wait for no GPU
    dist.init_process_group(f"cpu:gloo,cuda:{backend}" if device_type == "cuda" else "gloo")


# -----------------------------------------------------------------------------
# data and model: the newest whole checkpoint in out_dir (or its backup) is resumed; without one,
# init_from says where the weights come from

if master_process:
    runs.restore_backup(config, setup, say)
barrier()
prepare.prepare_missing(config, say, world_size)
start = runs.find(config, setup, say)
state = start.state  # what a checkpoint holds beside the weights; None: a new run
# the order of the data is a function of (seed, position) and of nothing else
data = prepare.open_data(config, start.checkpoint, say, world_size)
tokenizer, ends = data.tokenizer, data.ends
model = runs.open_model(start, config, setup, data, say)
data.check_vocabulary(model.config.vocab_size)

config |= vars(model.config) | {"init_from": start.init_from}
dtype = runs.began_with("dtype", config, setup, start)
dtype, why_dtype = pick_dtype(dtype, device, model, batch_size)
config["dtype"] = dtype
attention = pick_attention(device, dtype, doc_mask, compile, model.config.dropout, model.is_causal)
model.to(device)
model.grad_checkpoint = grad_checkpoint
hf_layout = runs.declares_architecture(model, hf_layout, say)

# -----------------------------------------------------------------------------
# optimizers, and what a run counts

# fmt: off
optimizers = make_optimizers(  # [AdamW, Muon] or [AdamW]; each group has a base_lr, its peak
    model, optimizer, learning_rate, muon_lr, muon_momentum, weight_decay, (beta1, beta2), cautious,
    decay_embeddings, pick_muon_dtype(dtype, device))
# fmt: on
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
params = list(model.parameters())
broadcast_weights(model)
warmup_steps, decay_steps = min(warmup_iters, max_iters), lr_decay_iters or max_iters
max_steps = runs.most_steps(config, setup)  # inf: only the time budget ends the run
floor = min_lr / (learning_rate or 1)  # what the rate falls to, as a share of its peak
if not decay_lr:
    schedule = "constant"

# fmt: off
run = types.SimpleNamespace(
    step=0,            # steps done
    position=0,        # sequences consumed: where the data goes on
    tokens=0,          # tokens seen
    train_s=0.0,       # seconds in steps, compilation included
    compile_s=0.0,     # of these, in compilation
    wall_s=0.0,        # seconds in all: what a rented machine is paid for
    best=[-math.inf],  # the highest score_of an evaluation
    skipped=0,         # bad steps: not counted in step, their data is skipped
    rollbacks=0,       # returns to a checkpoint after bad steps
    no_signal=0,       # steps without a target, or with equal rewards everywhere: nothing moved
    micro_batch_size=0,  # sequences on the device at a time
    recent=[])         # (loss, log of the gradient norm) of the last 128 good updates
# fmt: on
torch.manual_seed(seed + 1)  # from here on the generator draws dropout masks and nothing else


def restore(state):
    """Everything but the weights, from trainer.pt."""
    vars(run).update(state["run"])
    for opt, saved in zip(optimizers, state["optimizers"]):
        for group, old in zip(opt.param_groups, saved["param_groups"]):
            # the rates and decays are the config's, the moments the checkpoint's
            old |= {key: value for key, value in group.items() if key != "params"}
        opt.load_state_dict(saved)
    if state["scaler"]:  # empty where the run was not in float16
        scaler.load_state_dict(state["scaler"])
    runs.set_rng_state(state["rng"], device)


def trainer_state():
    """What a checkpoint holds beside the weights. `rng` is taken at the beginning of each step."""
    return {
        "run": dict(vars(run)),
        "config": config,
        "fingerprint": data.fingerprint,
        "optimizers": [opt.state_dict() for opt in optimizers],
        "scaler": scaler.state_dict(),
        "rng": rng,
    }


def autocast():
    """A fresh context at each use: one object entered inside itself leaves autocast on."""
    return torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != "float32")


if state:
    restore(state)

# of two kernels for packed documents the faster one, where the run is worth the seconds that it
# takes to compile one of them
shown_attention = attention
step_s = expected_seconds(model, sequences * model.config.block_size / world_size, device)
is_worth_it = compile and compile_pays(device_type, max_iters - run.step, step_s)
if stage in ("pretrain", "sft") and is_worth_it:
    attention, shown_attention = faster_attention(attention, model, device)

# -----------------------------------------------------------------------------
# The stage: where a micro-batch comes from, its loss (a mean over batch.units: tokens, or pairs),
# and what is measured on a held-out batch. Nothing else differs. model.py has the arithmetic,
# prepare.py the rows.

if stage in ("dpo", "rlvr"):
    # the reference is the model that training starts from, unless another is named
    directory = reference_model or runs.first_model(config, start)
    reference = runs.frozen("reference_model", directory, data, device)

if rolls_out:
    # completions: the model answers prompts, a verifier or a model grades the answers
    if verifier_model:
        judge = runs.frozen("verifier_model", verifier_model, data, device)

        def verify(question, completion, answer):
            return yes_probability(judge, *data.judge_prompt(question, completion))

    limit = math.inf if verifier_model else verifier_timeout  # a model always answers
    grade = prepare.Grader(verify, verifier_model or verifier, say, limit)

    def complete(problems, copies, temperature, first_seed):
        def generate(prompts, seeds):
            with autocast():
                return sample_completions(model, prompts, seeds, max_completion, temperature, ends)

        return data.complete(problems, copies, first_seed, generate, grade)


if stage in ("pretrain", "sft"):
    # windows of text; the targets of sft are the assistant's words only
    batch_of = data.batch
    token_bytes = data.token_bytes(model.config.vocab_size).to(device)

    def loss_of(batch):
        docs = None
        if doc_mask:
            docs = documents(batch.x, tokenizer.eos_id, attention, model.visible, batch.ends)
        return model(batch.x, batch.y, docs)[1], {}

elif stage == "dpo":
    # pairs of answers: the chosen one is to become likelier than the rejected one
    batch_of = data.batch

    def loss_of(batch):
        return pair_loss(model, reference, batch, pref_loss, beta, label_smoothing)

elif stage == "rlvr":
    # the model's own completions; those that the verifier rewards become likelier
    def batch_of(positions):
        completions = complete(data.batch(positions), group_size, rollout_temperature, seed + 1)
        rewards = torch.tensor([reward for *_, reward in completions]).view(-1, group_size)
        advantages = group_advantages(rewards, scale_rewards).flatten()
        batch = data.rollouts(completions, advantages, keep_all=kl_coef > 0)
        equal_groups = (rewards == rewards[:, :1]).all(dim=1).float().mean()
        batch.metrics |= {"reward/mean": rewards.mean(), "reward/equal_groups": equal_groups}
        # a running total; metrics are averaged over processes, so this logs their sum
        batch.metrics["reward/verifier_raised"] = grade.raised * world_size
        return batch

    def loss_of(batch):
        return completion_loss(model, reference, batch, rollout_temperature, clip_eps, kl_coef)

else:
    # distill: the model's own completions; at each token it is to predict what the teacher does
    teacher_model = runs.frozen_teacher(config, model, data, device)
    compile = False  # distillation_loss reads the hidden states, which compiled code doesn't give

    def batch_of(positions):
        completions = complete(data.batch(positions), group_size, rollout_temperature, seed + 1)
        batch, rewards = data.rollouts(completions), [reward for *_, reward in completions]
        batch.metrics["reward/mean"] = sum(rewards) / len(rewards)  # is shown, not learned from
        return batch

    def loss_of(batch):
        return distillation_loss(model, teacher_model, batch)


def on_device(batch):
    """The batch, moved without waiting, with where its documents end: the CPU knows it at once."""
    batch.ends = None
    if doc_mask and attention not in ("sdpa", "flex"):
        batch.ends = document_ends(batch.x, tokenizer.eos_id)
    return batch.to(device)


def micro_batches_at(position):
    """The positions in each micro-batch of this process's share of the step at `position`."""
    share, size = sequences // world_size, run.micro_batch_size
    first, end = position + rank * share, position + (rank + 1) * share
    return [range(i, min(i + size, end)) for i in range(first, end, size)]


def make_batches(micro_batches):
    return [on_device(batch_of(positions)) for positions in micro_batches]


def measure(batch):
    """{name: (mean, count)} of a held-out batch. RLVR and distillation answer each problem once
    greedily, and group_size times by sampling."""
    rates = {}
    if rolls_out:
        greedy = complete(batch, 1, 0.0, seed)
        sampled = complete(batch, group_size, rollout_temperature, seed)
        rates = prepare.pass_rates(greedy, sampled, group_size, 0.5 if verifier_model else 1.0)
        batch = data.rollouts(sampled)
    batch = on_device(batch)
    if stage == "rlvr":
        return rates | completion_measures(model, reference, batch, rollout_temperature)
    loss, metrics = loss_of(batch)
    means = {name: (mean, batch.units) for name, mean in {"loss": loss, **metrics}.items()}
    if stage in ("pretrain", "sft"):
        means["bytes"] = (token_bytes[batch.y].sum(), 1)  # of the text that the targets are
    return rates | means


@torch.no_grad()
def evaluate():
    """{'val/...': mean} over held-out data: of each domain of a mixture, and of all."""
    model.eval()
    most, finished = eval_iters * batch_size, False
    while not finished:
        held_out = data.held_out(most, run.micro_batch_size, rank, world_size)
        with memory, autocast():
            measured = [(domain, measure(batch)) for domain, batch in held_out]
        finished = not ran_out_of_memory()
    model.train()
    row = prepare.means(measured, data.shares, over_processes)
    if math.isnan(score_of(row)[0]):
        log.warn_once(
            "no target", f"{dataset}: no held-out token is a target: no val/loss, no best/"
        )
    return row


def score_of(row):
    """What best/ is chosen by, the higher the better: the loss, negated; for RLVR pass@1, and
    on a tie the mean reward."""
    if stage == "rlvr":
        return [row["val/pass@1"], row["val/reward/mean"]]
    return [-row["val/loss"]]


def ran_out_of_memory():
    """Whether a process did in its last `with memory:`. Then all of them take half as many
    sequences at a time from here on, and what was tried is to be tried again."""
    if not over_processes(memory.ran_out)[0]:
        return False
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)
    run.micro_batch_size = memory.halve(run.micro_batch_size)
    say(f"out of memory: micro_batch_size={run.micro_batch_size} from here on, for the same steps")
    log(run.step, {"event": "out of memory", "micro_batch_size": run.micro_batch_size})
    return True


def undo_first_update():
    """After memory ran out within the optimizers' steps, when some weights may be updated. In the
    first update of a run, where the optimizers make their states, all is again as it was before;
    later only a checkpoint is whole. Nor can one of several processes go back alone."""
    if run.recent or state or ddp:
        smaller = runs.command(f"--micro_batch_size={(run.micro_batch_size + 1) // 2}")
        raise UserError(
            f"out of memory in the update after step {run.step}, which is not saved: some of its "
            f"weights are updated, some are not. From the last checkpoint: {smaller}"
        )
    model.load_state_dict(runs.open_model(start, config, setup, data, say).state_dict())
    for opt in optimizers:
        opt.state.clear()
    scaler.update()  # only now gradients may be unscaled again
    ran_out_of_memory()


def save_last_step():
    """After a crash: saves the last good step, unless it came in the middle of an update."""
    if master_process and run.step not in (0, saved_at) and not updating:
        checkpoints.save(model, tokenizer, trainer_state(), ends, hf_layout)


memory, threads = MemoryGuard(device), Threads(device)
recorded = state["config"].get("micro_batch_size", 0) if state else 0
if not run.micro_batch_size or micro_batch_size not in (0, recorded):
    run.micro_batch_size = micro_batch_size or pick_micro_batch_size(model, config)

# -----------------------------------------------------------------------------
# all checks are passed: out_dir is this run's

if eval_only:
    say(", ".join(f"{name} {value:.4f}" for name, value in evaluate().items()))
    barrier()
    sys.exit()
barrier()  # every process has read the old run
if master_process:
    runs.claim(config, start, say)
stop = runs.StopSignal(says=master_process)  # ends the step, saves, exits; a second exits at once
# A killed run may have saved its last step but not evaluated it. Only log.jsonl can tell.
saved_at = run.step if state else -1
evaluated_at, sampled_at, best_at, run.best = log.done(saved_at, run.best, score_of)
barrier()
log.start(config, run.step, state is not None, data.notes)
checkpoints = runs.Checkpoints(out_dir, keep_checkpoints, log, best_at) if master_process else None
hub = runs.start_mirrors(config, checkpoints, log)  # threads for Hub and backup; None: no Hub
pod = runs.Pod(config, log, stop) if runs.on_a_pod(config) else None
meter = runs.Meter(run, model, config, max_steps, device, world_size)
code = runs.revision()  # now: somebody may edit it while it runs
runs.finish_on_crash(save_last_step, checkpoints, log, stop, pod, terminate_on_error)
runs.headline(model, data, config, max_steps, sequences, shown_attention, why_dtype, say)
log.start_bar(max_steps, run.step)
# a CPU has better to do during a step, and rollouts need the weights that the step before leaves
batches_ahead = prepare.Ahead(make_batches, enabled=device_type == "cuda" and not rolls_out)

# -----------------------------------------------------------------------------
# the loop

model.train()
compile_tried, updating, bad_in_a_row, steps_here = False, False, 0, 0
clock = last_saved = time.perf_counter()

while True:
    # save, before an evaluation or sample that may fail: at every interval, after the last step
    rng = runs.rng_state(device)
    now = time.perf_counter()
    run.wall_s, clock = run.wall_s + now - clock, now
    at = schedule_step(run, max_iters, max_steps, time_budget)  # with a time budget, by time
    finished, stopping = at >= max_iters, over_processes(bool(stop.signal))[0] > 0
    evaluation_due = run.step != evaluated_at and (finished or run.step % eval_interval == 0)
    save_due = finished or stopping or (evaluation_due and always_save_checkpoint)
    if checkpoint_interval and run.step % checkpoint_interval == 0:
        save_due = True
    if checkpoint_minutes and now - last_saved > 60 * checkpoint_minutes:
        save_due = True
    if master_process and save_due and run.step not in (0, saved_at):
        # training waits for a copy in memory; a thread writes it
        checkpoints.save(model, tokenizer, trainer_state(), ends, hf_layout)
        saved_at, last_saved = run.step, now
        if evaluation_due:
            checkpoints.wait()  # on the disk before anything that may fail

    # evaluate: before the first step, at every interval, after the last step
    if evaluation_due:
        row = evaluate()
        evaluated_at = run.step
        log(run.step, row)
        say(runs.evaluation_line(run.step, row, model.config))
        if run.step > 0 and score_of(row) > run.best:  # a comparison with NaN is False
            run.best = score_of(row)
            if master_process:
                if saved_at != run.step:
                    checkpoints.save(model, tokenizer, trainer_state(), ends, hf_layout)
                    saved_at, last_saved = run.step, now
                checkpoints.link_best(run.step)
        if run.step > 0:
            log.plot()

    # write a sample
    sample_due = sample_interval and run.step > 0 and run.step % sample_interval == 0
    if master_process and sample_due and run.step != sampled_at and not finished:
        sampled_at = run.step
        for text in runs.samples(model, data, config, 1, autocast, log):
            log.sample(run.step, text)
    if finished or stopping:
        break

    # this process's share of the next sequences, in micro-batches; then those of the step after it
    begun = time.perf_counter()
    with memory:
        batches = batches_ahead.take(micro_batches_at(run.position))
    if ran_out_of_memory():  # in rollouts: the same step again
        continue
    batches_ahead.begin(micro_batches_at(run.position + sequences))
    sums = [[batch.units, batch.with_signal, batch.tokens] for batch in batches]
    units, with_signal, tokens = over_processes(*map(sum, zip(*sums)))
    if stage == "rlvr":
        grade.check_step(max_bad_steps, over_processes)

    # torch.compile: at once on a GPU whose speed is known, else once the time of a step is known
    updates = inner_epochs if stage == "rlvr" else 1
    time_to_compile = compile and not compile_tried and steps_here in (0, 20)
    step_s = run.train_s / max(run.step, 1)
    if steps_here == 0:
        step_s = expected_seconds(model, updates * tokens / world_size, device)
    if time_to_compile and compile_pays(device_type, meter.steps_left(run, step_s), step_s):
        say("torch.compile: pays back within this run")
        compile_tried, compile_begun = True, time.perf_counter()
        try:
            # one pass forward and backward, for nothing but compilation
            model.compile()
            with memory, autocast():  # if it runs out, so will the step below, which handles it
                loss_of(batches[0])[0].backward()
            torch._dynamo.config.suppress_errors = True  # what fails later runs uncompiled
        except Exception as e:
            undo_compile(model)
            say(f"warning: torch.compile failed, training goes on without it: {runs.first_line(e)}")
        runs.set_rng_state(rng, device)
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        run.compile_s += time.perf_counter() - compile_begun

    # the learning rate: one factor for the peak of every group
    factor = schedule_factor(
        at, schedule, warmup_steps, decay_steps, floor, decay_frac, decay_shape
    )
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = group["base_lr"] * factor

    # updates: one, with RLVR several on the same rollouts; none where no unit has a signal: every
    # gradient would be 0, and the optimizer's momentum alone would still move the weights
    if not with_signal:
        updates = 0
        run.no_signal += 1
    train_loss, grad_norm, why, again = math.nan, 0.0, "", False
    for inner in range(updates):
        # forward and backward: one mean over all targets of all micro-batches of all processes
        step_loss = torch.zeros((), device=device)
        with memory:
            for batch in batches:
                with autocast():
                    loss, metrics = loss_of(batch)
                    loss = loss * (batch.units / units)
                scaler.scale(loss).backward()
                step_loss += loss.detach()
                batch.metrics |= metrics
        loss = metrics = None  # what they hold of the graph would stay in memory
        if ran_out_of_memory():
            again = inner == 0  # later updates on the same rollouts are left out
            break
        sum_gradients(params)
        for opt in optimizers:
            scaler.unscale_(opt)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
        # the only wait for the device in a step
        step_loss, grad_norm = prepare.to_numbers(batches, step_loss, grad_norm)
        train_loss = over_processes(step_loss)[0]

        # update, unless it would do harm: not finite, gradient 0, or a spike above the last 128
        why = why_harmful(train_loss, grad_norm, run.recent, spike_z, scaler.is_enabled())
        all_clipped = inner > 0 and grad_norm == 0  # by PPO: these rollouts have no more to teach
        if all_clipped:
            why = ""
        # float16 gradients that overflow are no update either; the scaler then lowers its scale
        if not why and not all_clipped and math.isfinite(grad_norm):
            updating = True  # a crash in here must not save half-updated weights
            with memory:
                for opt in optimizers:
                    scaler.step(opt)
            if memory.ran_out:
                undo_first_update()
                again = True
                break
            run.recent = run.recent[-127:] + [(train_loss, math.log(grad_norm))]
        scaler.update()
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        if why or all_clipped:
            break

    updating = False
    if again:  # the same step, in smaller micro-batches and with the same random numbers
        runs.set_rng_state(rng, device)
        continue

    # a bad step is not counted, its data is skipped; too many in a row: back to a checkpoint
    run.position += sequences
    run.train_s += time.perf_counter() - begun
    if time_budget:  # all processes have to end at the same step: they take the mean of their times
        times = over_processes(run.train_s / world_size, run.compile_s / world_size)
        run.train_s, run.compile_s = times
    if why:
        bad_in_a_row += 1
        run.skipped += 1
        numbers = f"loss {train_loss:.4f}, gradient norm {grad_norm:.4g}"
        say(f"step {run.step + 1} skipped: {why}, {numbers}")
        row = {"train/loss": train_loss, "train/grad_norm": grad_norm, "position": run.position}
        log(run.step, {"event": "skipped", "why": why, **row})
        if bad_in_a_row == max_bad_steps:
            if master_process:
                checkpoints.wait()
            barrier()
            before = types.SimpleNamespace(**vars(run))
            path, saved_model, saved_state = runs.last_checkpoint(config, run, why, say)
            model.load_state_dict(saved_model.state_dict())
            restore(saved_state)
            # trainer.pt is older than the evaluation of its own step
            run.position, run.wall_s, run.best = before.position, before.wall_s, before.best
            run.train_s, run.compile_s = before.train_s, before.compile_s
            run.micro_batch_size = before.micro_batch_size
            run.rollbacks = before.rollbacks + 1
            run.skipped = before.skipped + before.step - run.step
            saved_at = evaluated_at = sampled_at = run.step
            meter.mark(run)
            say(
                f"{bad_in_a_row} bad steps in a row: back to {path}, past the data that caused them"
            )
            log(run.step, {"event": "rollback", "position": run.position})
            bad_in_a_row = 0
        continue
    bad_in_a_row = 0
    run.step, steps_here = run.step + 1, steps_here + 1
    run.tokens += int(tokens)
    if not compile_tried and threads.adapt():  # compiled code has their number built in
        log.warn_once("threads", "another program keeps a core busy: one thread less meanwhile")

    # log
    log.progress(run.step)
    is_last = schedule_step(run, max_iters, max_steps, time_budget) >= max_iters
    if run.step % log_interval == 0 or is_last:
        row = {
            "train/loss": train_loss,
            "train/lr": learning_rate * factor,
            "train/grad_norm": grad_norm,
            "train/epoch": run.position / data.epoch,
            "train/skipped": run.skipped,
            "train/no_signal": run.no_signal,
            "train/micro_batch_size": run.micro_batch_size,
            "time/train_s": run.train_s,
            **prepare.batch_means(batches, over_processes),
            **meter.row(run),
        }
        log(run.step, row)
        log.progress(run.step, runs.step_line(run.step, row))

# -----------------------------------------------------------------------------
# the end

barrier()
if ddp:
    dist.destroy_process_group()  # uploads and the pod are the first process's
if not master_process:
    sys.exit()
checkpoints.wait()
stop.says = False  # no step is under way
is_saved = runs.is_checkpoint(checkpoints.path(run.step))
if finished and not steps_here:
    log.plot()  # a run that was killed after its last evaluation has not drawn that
if hub and finished and is_saved:
    card = runs.model_card(config, setup.keys, model, hf_layout, run, log.rows())
    hub.put_final(checkpoints.path(run.step), card)
log.close_bar()
if finished:
    if steps_here:
        texts = runs.samples(model, data, config, 3, autocast, log)
        log.sample(run.step, "\n\n".join(texts))
        for text in texts:
            say(f"--- a sample ---\n{prepare.for_terminal(text)}")
        result = runs.result(config, run, meter, model, log.rows(), code)
        say(runs.result_block(result))
        say(f"all results          {runs.add_result(result, log)}")
    say(runs.summary(config, run, steps_here > 0, is_saved, tokenizer))
else:
    say(runs.how_to_resume(stop.signal, run, max_steps, time_budget, is_saved))
everything_is_sent = checkpoints.finish(tries=4 if finished else 1, stop=stop)
if hub and finished:
    say(hub.report())
log.close()
if pod and finished and not stop.signal:
    pod.end("terminate" if hub and hub.has_final else "stop", run.step)
if not is_saved and run.step > 0:
    sys.exit(f"train.py: the last step is not in {out_dir}, its checkpoint could not be written")
if finished and not everything_is_sent:
    sys.exit(1)  # the Hub or the backup lacks what was asked for, which was said above
