# smol-llama 360M: 6B tokens of FineWeb, about a million tokens a step, as in the original project:
#   python prepare.py fineweb_6b
#   python train.py config/smol_360m.py --batch_size=64

dataset = "fineweb_6b"        # tokenized already: 12 GB to download
batch_size = 64               # 64 x 2,048 x 8 = 1,048,576 tokens a step
block_size = 2048
gradient_accumulation_steps = 8
doc_mask = False              # documents in one window attend to each other, as in the original

n_layer = 32
n_head = 15
n_kv_head = 5
n_embd = 960
ffn_dim = 2560
vocab_size = 49152
rope_theta = 10000.0
qk_norm = False
unit_embed = False
init_std = 0.02
scale_residual = False

optimizer = "adamw"
learning_rate = 3e-4
weight_decay = 0.1
beta2 = 0.95
max_iters = 5725
schedule = "cosine"
warmup_iters = 900
min_lr = 3e-5                 # a tenth of the peak

eval_interval = 200
eval_iters = 8
log_interval = 1              # a step takes seconds
checkpoint_interval = 200
wandb_log = True
wandb_project = "smol-llama"
gpu = "H100"                 # what the price is for
gpu_cost_per_hour = 2.40
# hf_repo = "you/smol-llama"  # gets all checkpoints; without it the pod is stopped, not terminated
terminate_pod = True          # on RunPod, when the run has ended
