# Third stage of smol_600m: preferences, 8 x 4 pairs a step, about 65K tokens.
#   python prepare.py ultrafeedback && python train.py config/smol_600m_dpo.py

stage = "dpo"
init_from = "out/smol_600m_sft"
dataset = "ultrafeedback"
batch_size = 8                # pairs
gradient_accumulation_steps = 4
block_size = 2048             # longer pairs are left out and counted

pref_loss = "apo_zero"
beta = 0.1
optimizer = "adamw"
learning_rate = 1e-6
weight_decay = 0.0
max_iters = 1900              # one pass over the 61K pairs
warmup_iters = 100
decay_frac = 1.0

eval_interval = 200
eval_iters = 32
log_interval = 1
sample_start = "What is the capital of France?"
gpu = "H100"                 # what the price is for
gpu_cost_per_hour = 2.50
