# SmolLM2-135M's shape with 2,048 tokens of context, trained on one input.txt.
#   python prepare.py input.txt --tokenizer=HuggingFaceTB/SmolLM2-135M
#   python train.py config/smol2_135m.py
#   python train.py config/smol2_135m.py --max_iters=5050   # 50 more steps, from the checkpoint

dataset = "input"
batch_size = 8
block_size = 2048
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
init_std = 0.0417             # 1/sqrt(576), as in SmolLM2's config.json
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
tensorboard = True
