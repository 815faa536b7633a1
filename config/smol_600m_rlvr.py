# Fourth stage of smol_600m: GSM8K's problems, rewarded if the last number is right.
#   python prepare.py gsm8k && python train.py config/smol_600m_rlvr.py

stage = "rlvr"
init_from = "out/smol_600m_dpo"
dataset = "gsm8k"
batch_size = 8                # prompts, with 8 completions each
gradient_accumulation_steps = 4
block_size = 1024

verifier = "number"
group_size = 8
max_completion = 400
scale_rewards = False
kl_coef = 0.0
optimizer = "adamw"
learning_rate = 1e-6
weight_decay = 0.0
max_iters = 500
warmup_iters = 10
schedule = "constant"
spike_z = 0.0                 # off: the loss of a policy gradient has no usual level

eval_interval = 50
eval_iters = 16
log_interval = 1
sample_start = "Tom has 36 spoons. He finds 40 more. How many spoons does Tom have now?"
gpu = "H100"                 # what the price is for
gpu_cost_per_hour = 2.50
