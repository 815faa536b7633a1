# Second stage of smol_600m: conversations, 16 x 2,048 x 4 = 131K tokens a step.
#   python prepare.py smoltalk --tokenizer=out/smol_600m/best
#   python train.py config/smol_600m_sft.py

stage = "sft"
init_from = "out/smol_600m"
dataset = "smoltalk"
batch_size = 16
gradient_accumulation_steps = 4
block_size = 2048
doc_mask = True

muon_lr = 0.002               # a tenth of pretraining's
learning_rate = 3e-4
max_iters = 2000
warmup_iters = 50
decay_frac = 1.0

eval_interval = 200
log_interval = 1
sample_start = "What is the capital of France?"
gpu = "H100"                 # what the price is for
gpu_cost_per_hour = 2.50
