# Shakespeare by the character: a minute on two CPU cores.
#   python prepare.py shakespeare_char && python train.py config/shakespeare_char.py

dataset = 'shakespeare_char'
batch_size = 12
block_size = 64
doc_mask = False              # the text is a single document

n_layer = 4
n_head = 4
n_kv_head = 0                 # as many as query heads: at this size sharing them saves nothing
n_embd = 128
ffn_dim = 320
qk_norm = True
tie_embeddings = False        # 66 characters: a head of its own costs 1% and gains 20 steps in 200
unit_embed = False            # there are no names to copy in 64 characters
rope_theta = 1000.0           # the slowest pair still turns within the window

learning_rate = 1e-2
muon_lr = 0.012
muon_momentum = 0.9           # a short memory: there are few steps
max_iters = 1000
warmup_iters = 10
schedule = 'wsd'
decay_frac = 1.0              # falls from the first step to the last

eval_interval = 100
eval_iters = 10000            # more than there is: the whole validation split
log_interval = 20
sample_start = 'ROMEO:'
