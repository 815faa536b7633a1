# Third stage of the toy world: learns a friendly tone from answer pairs. After config/toy_sft.py:
#   python train.py config/toy_dpo.py

stage = "dpo"
init_from = "out/toy_sft"
dataset = "toy_prefs"
batch_size = 32               # pairs

pref_loss = "sigmoid"
beta = 0.1
muon_lr = 0.001               # gently: what was learned before is soon lost
learning_rate = 1e-4
max_iters = 20
warmup_iters = 5
decay_frac = 1.0

eval_interval = 10
eval_iters = 10
log_interval = 5
sample_start = "What does a cow say?"
