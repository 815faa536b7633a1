# SmaLLM: 30M parameters (the original project says 60M), a GPT-2 block, trained on TinyStories.
#   python prepare.py tinystories && python train.py config/smallm.py

dataset = "tinystories"       # in GPT-2's tokens, made with tiktoken
batch_size = 32
block_size = 128
gradient_accumulation_steps = 32
doc_mask = False              # as in GPT-2, documents in one window attend to each other

n_layer = 6
n_head = 6
n_kv_head = 0                 # as many as query heads
n_embd = 384
vocab_size = 50257
dropout = 0.1                 # the run passes over the text about five times
bias = True
norm = "layernorm"
mlp = "gelu"
pos = "learned"
qk_norm = False
unit_embed = False
init_std = 0.02

optimizer = "adamw"
learning_rate = 1e-4
weight_decay = 0.1
beta2 = 0.95
grad_clip = 0.5
max_iters = 20000
schedule = "cosine"
warmup_iters = 1000
min_lr = 1e-5                 # a tenth of the peak

eval_interval = 500
eval_iters = 100
always_save_checkpoint = False  # only if the validation loss is the lowest, for best/
checkpoint_interval = 1000
sample_start = "Once upon a time"
