# A small model learns from a larger one: on-policy distillation of the toy world's SFT model into
# one of half its width. After python train.py and python train.py config/toy_sft.py:
#   python train.py --n_embd=64 --out_dir=out/toy_small
#   python train.py config/toy_sft.py --init_from=out/toy_small --out_dir=out/toy_small_sft
#   python train.py config/toy_distill.py
# Against as many more steps of SFT:
#   python train.py config/toy_sft.py --init_from=out/toy_small_sft --out_dir=out/toy_small_more \
#       --max_iters=100
#   python train.py config/toy_rlvr.py --eval_only --dataset=toy_questions \
#       --init_from=out/toy_distill    # or out/toy_small_more, out/toy_small_sft, out/toy_sft

stage = "distill"
init_from = "out/toy_small_sft"
teacher = "out/toy_sft"
dataset = "toy_questions"     # its answers are only used to measure val/pass@1
batch_size = 16               # prompts, with 4 completions each

verifier = "toy"
group_size = 4
max_completion = 64
rollout_temperature = 1.0
muon_lr = 0.01
learning_rate = 2e-3
max_iters = 100
warmup_iters = 5
decay_frac = 1.0              # the rate falls from the end of warm-up

eval_interval = 50
eval_iters = 8
log_interval = 5
sample_start = "What does a cow say?"
