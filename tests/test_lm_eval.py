"""lm-eval, run as the README says, gives a checkpoint's answers the log-likelihoods that we give."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import write

import prepare
from model import GPT, GPTConfig

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lm-eval[hf]'")

QUESTIONS = [
    dict(question="Anna has 3 apples and gets 2. How many?", choices=["5 apples", "4"], answer=0),
    dict(question="Who said “Straße”?", choices=["Tom’s boy", "a girl", "nobody"], answer=2),
    dict(question="Once upon a", choices=["time", "time there was a boy"], answer=1),
]
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.mark.slow
@pytest.mark.parametrize("keys", [dict(qk_norm=True), dict(qk_norm=False, nope_every=4)])
def test_log_likelihoods_are_ours(keys, here):
    tokenizer = prepare.train_bpe([prepare.SAMPLE, "Once upon a time. " * 8], 400, "bpe:400")
    config = dict(block_size=128, n_layer=4, n_head=4, n_embd=64, unit_embed=False, init_std=0.1)
    model = GPT(GPTConfig(**config | keys, vocab_size=tokenizer.vocab_size)).eval()
    model.save_pretrained("model", generation=tokenizer.special_ids([tokenizer.eos_id]))
    tokenizer.save("model")
    write("questions.jsonl", QUESTIONS)
    write("tasks/sums.yaml", TASK.replace("QUESTIONS", str(here / "questions.jsonl")))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf"]
    command += ["--model_args", "pretrained=model", "--tasks", "sums", "--include_path", "tasks"]
    command += ["--device", "cpu", "--log_samples", "--output_path", "scores"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(here), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    samples = [json.loads(line) for line in next(here.glob("scores/*/samples*")).open()]
    assert len(samples) == len(QUESTIONS)
    for sample in samples:
        for choice, response in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            before = tokenizer.encode(sample["doc"]["question"])
            ids = tokenizer.encode(f"{sample['doc']['question']} {choice}")
            targets = torch.tensor([ids[1:]])
            targets[0, : len(before) - 1] = -1
            with torch.no_grad():
                ours = model(torch.tensor([ids[:-1]]), targets, per_token=True)[1].sum().item()
            difference = abs(ours - float(response[0][0]))
            print(f"log-likelihood {ours:.4f}, difference {difference:.1e}")
            assert difference < 1e-4
