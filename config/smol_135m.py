# SmolLM-135M's shape, trained on one text of your own in SmolLM2's tokens.
#   python prepare.py input.txt --tokenizer=HuggingFaceTB/SmolLM2-135M
#   python train.py config/smol_135m.py
#   python train.py config/smol_135m.py --max_iters=5500    # 500 more steps, from the checkpoint

dataset = "input"
batch_size = 16
block_size = 1024             # training uses windows shorter than max_positions
max_positions = 8192
doc_mask = False              # the text is a single document

n_layer = 30
n_head = 9
n_kv_head = 3
n_embd = 576
ffn_dim = 1536
vocab_size = 49152
rope_theta = 100000.0
norm_eps = 1e-5
qk_norm = False
unit_embed = False
init_std = 0.0417             # 1/sqrt(576), as in SmolLM's config.json
scale_residual = False

optimizer = "adamw"
learning_rate = 3e-4
weight_decay = 0.1
beta2 = 0.95
max_iters = 5000
schedule = "cosine"
warmup_iters = 200
min_lr = 3e-5

eval_interval = 500
eval_iters = 20
sample_interval = 500
sample_start = "The meaning of life is"
