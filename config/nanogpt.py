# nanoGPT's defaults: put your own nanoGPT config behind this one and it trains what nanoGPT would,
#   python train.py config/nanogpt.py config/train_shakespeare_char.py
# The block is GPT-2's; as in nanoGPT, bias=False also takes the biases out of LayerNorm.
# A data set without meta.json is taken as GPT-2 tokens in 50,304 rows, as there.

eval_interval = 2000
log_interval = 1
eval_iters = 200
always_save_checkpoint = True
keep_checkpoints = 1          # nanoGPT overwrites a single file
wandb_project = 'owt'
dataset = 'openwebtext'
gradient_accumulation_steps = 5 * 8
batch_size = 12
block_size = 1024
doc_mask = False              # its windows run across documents
spike_z = 0.0                 # and it takes every step

n_layer = 12
n_head = 12
n_embd = 768
n_kv_head = 0                 # as many as query heads
dropout = 0.0
bias = False
norm = 'layernorm'
mlp = 'gelu'
pos = 'learned'
qk_norm = False
unit_embed = False
init_std = 0.02

optimizer = 'adamw'
learning_rate = 6e-4
max_iters = 600000
weight_decay = 1e-1
decay_embeddings = True       # every matrix is decayed
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

decay_lr = True
schedule = 'cosine'
warmup_iters = 2000
lr_decay_iters = 600000
min_lr = 6e-5

backend = 'nccl'
compile = True
