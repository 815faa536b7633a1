# nanoGPT's defaults. A nanoGPT config given after this one trains the same model in the same way:
#   python train.py config/nanogpt.py config/train_shakespeare_char.py
# The block is GPT-2's. As in nanoGPT, bias=False also removes the biases of LayerNorm.
# As in nanoGPT, a data set with a meta.pkl is read as characters, one without it and without
# meta.json as GPT-2 tokens, with 50,304 embedding rows.

eval_interval = 2000
log_interval = 1
eval_iters = 200
always_save_checkpoint = True
keep_checkpoints = 1          # nanoGPT keeps a single one
wandb_project = "owt"
dataset = "openwebtext"
gradient_accumulation_steps = 5 * 8
batch_size = 12
block_size = 1024
doc_mask = False              # in nanoGPT, documents in one window attend to each other
spike_z = 0.0                 # nanoGPT skips no step

n_layer = 12
n_head = 12
n_embd = 768
n_kv_head = 0                 # as many as query heads
dropout = 0.0
bias = False
norm = "layernorm"
mlp = "gelu"
pos = "learned"
qk_norm = False
unit_embed = False
init_std = 0.02

optimizer = "adamw"
learning_rate = 6e-4
max_iters = 600000
weight_decay = 1e-1
decay_embeddings = True       # nanoGPT decays every matrix
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

decay_lr = True
schedule = "cosine"
warmup_iters = 2000
lr_decay_iters = 600000
min_lr = 6e-5

backend = "nccl"
compile = True
