# 653M parameters on 10B tokens of web, code and mathematics: Muon, document masks, no RoPE in every
# fourth layer.
#   for d in fineweb_edu dclm code openwebmath; do
#     python prepare.py $d --tokenizer=NousResearch/Llama-2-7b-hf --max_tokens=5e9; done
#   python train.py config/smol_600m.py

dataset = "fineweb_edu:0.435,dclm:0.435,code:0.10,openwebmath:0.03"
batch_size = 48               # 48 x 2,048 x 16 = 1,572,864 tokens a step
block_size = 2048
gradient_accumulation_steps = 16
doc_mask = True

n_layer = 24
n_head = 12
n_kv_head = 4
n_embd = 1536
ffn_dim = 4096
vocab_size = 32000            # Llama 2's
nope_every = 4                # layers 3, 7, 11, ... attend by content alone
embed_scale = True
rope_theta = 10000.0
qk_norm = False
unit_embed = False
init = "trunc_normal"
init_std = 0.5 / 1536 ** 0.5
scale_residual = False        # with embed_scale and a tied head, scaling makes the first loss 19

optimizer = "muon"
muon_lr = 0.02
learning_rate = 3e-3          # of embeddings and gains
weight_decay = 0.1
max_iters = 6358              # 10B tokens
schedule = "wsd"
warmup_iters = 200
decay_frac = 0.2
min_lr = 0.0

eval_interval = 250
eval_iters = 8
log_interval = 1              # a step takes seconds
gpu = "H100"                 # what the price is for
gpu_cost_per_hour = 2.50
