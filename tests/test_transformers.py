"""A checkpoint as transformers and TRL read it: ids, tokenizer settings, chat template, names."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import prepare
from model import GPT, GPTConfig

SHAPE = dict(block_size=128, n_layer=2, n_head=4, n_embd=64, qk_norm=False, unit_embed=False)
SHAPE |= dict(init_std=0.1)
GPT2 = dict(norm="layernorm", mlp="gelu", pos="learned", bias=True)
KINDS = {
    "llama": {},
    "smollm3": dict(nope_every=4),
    "qwen3": dict(qk_norm=True),
    "gpt2": GPT2,
    "gpt2-untied": GPT2 | dict(tie_embeddings=False),
}


def written(directory, tokenizer, ends, **keys):
    model = GPT(GPTConfig(**SHAPE | dict(vocab_size=tokenizer.vocab_size) | keys)).eval()
    model.save_pretrained(directory, generation=tokenizer.special_ids(ends))
    tokenizer.save(directory)
    return model


def bpe():
    return prepare.train_bpe(["Once upon a time there was a boy. " * 8], 300, "bpe:300")


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_are_ours(kind, here):
    """SmolLM3's class has bos 128000, Llama's 1, GPT-2's 50256: none of them is in a vocabulary of
    300."""
    tokenizer = bpe()
    written("m", tokenizer, [0, 2], **KINDS[kind])
    for config in (AutoConfig.from_pretrained("m"), GenerationConfig.from_pretrained("m")):
        assert (config.bos_token_id, config.pad_token_id) == (0, 0)
        assert config.eos_token_id == [0, 2]
    assert AutoConfig.from_pretrained("m").max_position_embeddings == 128
    if kind.startswith("gpt2"):
        assert json.load(open("m/config.json"))["n_ctx"] == 128


def test_a_tokenizer_without_special_tokens_has_no_ids(here):
    tokenizer = prepare._char({"a": 0, "b": 1, "\n": 2}, end=None)
    written("m", tokenizer, [])
    for config in (AutoConfig.from_pretrained("m"), GenerationConfig.from_pretrained("m")):
        assert config.bos_token_id is config.eos_token_id is config.pad_token_id is None


def test_the_tokenizer_gives_what_generate_takes(here):
    tokenizer = bpe()
    model = written("m", tokenizer, [0])
    theirs = AutoTokenizer.from_pretrained("m")
    inputs = theirs(["Once upon", "Once upon a time"], padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    tokens = AutoModelForCausalLM.from_pretrained("m").generate(**inputs, max_new_tokens=4)
    assert tokens.shape[0] == 2
    assert theirs.unk_token_id == tokenizer.eos_id
    inputs = theirs("Once upon a time", return_tensors="pt")
    ids = tokenizer.encode("Once upon a time")
    assert inputs["input_ids"][0].tolist() == ids
    expected = model.generate(torch.tensor([ids]), 8, temperature=0)
    model = AutoModelForCausalLM.from_pretrained("m")
    got = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert got.tolist() == expected.tolist()


CHAT = [
    dict(role="system", content="Be short."),
    dict(role="user", content=" 12 + 3?\n"),
    dict(role="assistant", content="15"),
    dict(role="user", content="And 1 + 1?"),
    dict(role="assistant", content="\n2, of course. "),
]


def test_an_answer_has_the_tokens_that_preferences_count(here):
    """TRL takes for an answer what the template adds to its prompt: the words and <|im_end|>."""
    tokenizer = bpe()
    tokenizer.save("m")
    theirs = AutoTokenizer.from_pretrained("m")
    ours, mask = prepare.render_chat(CHAT, tokenizer, last_only=True)
    prompt = theirs.apply_chat_template(CHAT[:-1], add_generation_prompt=True, return_dict=False)
    whole = theirs.apply_chat_template(CHAT, return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert whole[len(prompt) :] == [i for i, counts in zip(ours, mask) if counts]
    # and each part of a conversation is the beginning of what follows it
    for n in range(1, len(CHAT)):
        part = theirs.apply_chat_template(CHAT[:n], return_dict=False)
        assert whole[: len(part)] == part


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_loads_with_both_forms_of_its_names(tied, here):
    """The Hub's gpt2 leaves out `transformer.`; files with it were written here, too."""
    tokenizer = bpe()
    model = written("m", tokenizer, [0], **GPT2 | dict(tie_embeddings=tied))
    tensors = load_file("m/model.safetensors")
    assert ("wte.weight" in tensors) == tied  # transformers 4 wants the prefix beside a head
    other = {}
    for name, tensor in tensors.items():
        if not tied:
            name = name.removeprefix("transformer.")
        elif name != "lm_head.weight":
            name = f"transformer.{name}"
        other[name] = tensor
    os.mkdir("other")
    (here / "other" / "config.json").write_text((here / "m" / "config.json").read_text())
    save_file(other, "other/model.safetensors", metadata={"format": "pt"})
    for directory in ("m", "other"):
        back = GPT.from_pretrained(directory).state_dict()
        assert all(torch.equal(back[name], t) for name, t in model.state_dict().items())
