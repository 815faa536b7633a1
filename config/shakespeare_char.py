# Shakespeare, one character per token: about a minute on two CPU cores.
#   python prepare.py shakespeare_char && python train.py config/shakespeare_char.py

dataset = "shakespeare_char"
batch_size = 24
block_size = 64
doc_mask = False              # the text is a single document

n_layer = 4
n_head = 4
n_kv_head = 0                 # as many as query heads: sharing them saves nothing at this size
n_embd = 128
ffn_dim = 256
qk_norm = True
tie_embeddings = False        # a head of its own adds 1% of parameters and saves 20 of 200 steps
unit_embed = False            # it helps to copy names, and 64 characters are too few for that
rope_theta = 1000.0           # small, so that even the slowest frequency rotates within the window

learning_rate = 1e-2
muon_lr = 0.012
muon_momentum = 0.85          # low, because there are few steps
max_iters = 650
warmup_iters = 10
schedule = "wsd"
decay_frac = 1.0              # the rate falls from the end of warm-up to the last step

eval_interval = 50
eval_iters = 10000            # more than there are: the whole validation split is measured
log_interval = 20
sample_start = "ROMEO:"
