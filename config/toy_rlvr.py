# The toy world, fourth stage: it learns to get sums right by trying. After config/toy_dpo.py:
#   python train.py config/toy_rlvr.py

stage = 'rlvr'
init_from = 'out/toy_dpo'
dataset = 'toy_problems'      # sums, and facts, which it is not to forget
batch_size = 32               # prompts, 8 completions each

verifier = 'toy'              # the right number of the right thing, in a whole sentence
group_size = 8
max_completion = 64
rollout_temperature = 1.0
muon_lr = 0.002
learning_rate = 2e-4
max_iters = 120
warmup_iters = 5
decay_frac = 1.0              # down from the first step: what it could do before, it is to keep
spike_z = 0.0                 # the loss of a policy gradient has no level to be measured by

eval_interval = 30
eval_iters = 4
log_interval = 5
sample_start = 'Tom has 36 spoons. He finds 40 more. How many spoons does Tom have now?'
