# Second stage of the toy world: learns to answer. After python train.py:
#   python train.py config/toy_sft.py

stage = "sft"
init_from = "out/toy"
dataset = "toy_chat"
doc_mask = True               # conversations in one window don't attend to each other
batch_size = 12

muon_lr = 0.01
learning_rate = 2e-3
max_iters = 400
warmup_iters = 10
decay_frac = 1.0              # the rate falls from the end of warm-up

eval_interval = 100
sample_start = "What does a cow say?"
