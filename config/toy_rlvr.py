# Fourth stage of the toy world: learns sums by trial and reward. After config/toy_dpo.py:
#   python train.py config/toy_rlvr.py

stage = "rlvr"
init_from = "out/toy_dpo"
dataset = "toy_problems"      # sums, and facts so that they are not forgotten
batch_size = 32               # prompts, with 8 completions each

verifier = "toy"              # rewards the right number of the right thing in a whole sentence
group_size = 8
max_completion = 64
rollout_temperature = 1.0
muon_lr = 0.001
learning_rate = 1e-4
kl_coef = 0.1                 # what sums do not need stays as the DPO model had it
max_iters = 100
warmup_iters = 5
decay_frac = 1.0              # the rate falls from the end of warm-up: less is forgotten
spike_z = 0.0                 # off: the loss of a policy gradient has no usual level

eval_interval = 50
eval_iters = 4
log_interval = 5
sample_start = "Tom has 36 spoons. He finds 40 more. How many spoons does Tom have now?"
