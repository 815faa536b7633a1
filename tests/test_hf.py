"""What we write, transformers reads; what transformers writes, we read; the numbers are equal."""
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM, SmolLM3Config, SmolLM3ForCausalLM)

from configurator import UserError
from model import GPT, GPTConfig

SHAPE = dict(vocab_size=97, block_size=32, n_layer=5, n_head=4, n_embd=64)
OURS = {
    "llama": dict(n_kv_head=2),
    "llama-untied-bias-wide-heads": dict(n_kv_head=1, tie_embeddings=False, bias=True, head_dim=32),
    "llama-embed-scale": dict(embed_scale=True),
    "llama-unit-embed": dict(unit_embed=True),
    "smollm3": dict(n_kv_head=2, nope_every=4, embed_scale=True, init="trunc_normal"),
    "qwen3": dict(n_kv_head=2, qk_norm=True, head_dim=32),
    "gpt2": dict(norm="layernorm", mlp="gelu", pos="learned", bias=True),
    "gpt2-no-bias": dict(norm="layernorm", mlp="gelu", pos="learned", bias=False),
}
COMMON = dict(vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=5, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=32)
THEIRS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**COMMON, rope_theta=5e4, tie_word_embeddings=True)),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config(**COMMON, bos_token_id=0, eos_token_id=0, pad_token_id=0)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**COMMON, head_dim=32)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=97, n_embd=64, n_layer=5, n_head=4, n_positions=32)),
}


def shaken(model):
    """Every parameter away from its initial value, so that a forgotten gain or bias shows."""
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model.eval()


def compare(ours, theirs, tokens=24):
    idx = torch.randint(97, (3, tokens))
    with torch.no_grad():
        difference = (ours(idx)[0] - theirs(idx).logits).abs().max().item()
    assert difference < 1e-4
    prompt = idx[:, :8]
    greedy = theirs.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None,
                             attention_mask=torch.ones_like(prompt))
    assert torch.equal(ours.generate(prompt, 16, temperature=0), greedy)
    return difference


@pytest.mark.parametrize("name", OURS)
def test_ours_loads_there(name, tmp_path):
    ours = shaken(GPT(GPTConfig(**SHAPE, **OURS[name])))
    ours.save_pretrained(tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert theirs.config.model_type == name.split("-")[0]
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    print(f"{name}: largest difference {compare(ours, theirs):.1e}")


@pytest.mark.parametrize("name", OURS)
def test_ours_comes_back_the_same(name, tmp_path):
    ours = shaken(GPT(GPTConfig(**SHAPE, **OURS[name])))
    ours.save_pretrained(tmp_path)
    back = GPT.from_pretrained(tmp_path)
    assert back.config == ours.config
    for (k, a), b in zip(ours.state_dict().items(), back.state_dict().values()):
        assert torch.equal(a, b) or ours.config.embed_scale and not ours.config.tie_embeddings, k


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_loads_here(name, tmp_path):
    kind, config = THEIRS[name]
    theirs = shaken(kind(config))
    theirs.save_pretrained(tmp_path)
    print(f"{name}: largest difference {compare(GPT.from_pretrained(tmp_path).eval(), theirs):.1e}")


def test_sharded_and_bf16_files_load(tmp_path):
    theirs = shaken(LlamaForCausalLM(THEIRS["llama"][1])).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert os.path.exists(tmp_path / "model.safetensors.index.json")
    compare(GPT.from_pretrained(tmp_path).eval(), LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


@pytest.mark.parametrize("keys", [dict(qk_norm=True, nope_every=2), dict(norm="layernorm"), dict(mlp="gelu")])
def test_what_no_architecture_expresses(keys, tmp_path):
    ours = shaken(GPT(GPTConfig(**SHAPE, **keys)))
    ours.save_pretrained(tmp_path)
    assert json.load(open(tmp_path / "config.json"))["model_type"] == "nanosmol"
    idx = torch.randint(97, (2, 16))
    assert torch.equal(GPT.from_pretrained(tmp_path).eval()(idx)[0], ours(idx)[0])
    with pytest.raises(ValueError, match="nanosmol"):  # clean: it names the type that it doesn't know
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_hack_can_say_that_the_layout_is_no_longer_true(tmp_path):
    ours = GPT(GPTConfig(**SHAPE))
    ours.save_pretrained(tmp_path, hf_layout=False)
    assert json.load(open(tmp_path / "config.json"))["model_type"] == "nanosmol"
    assert GPT.from_pretrained(tmp_path).config == ours.config


def test_damaged_directories_are_refused_in_one_line(tmp_path):
    GPT(GPTConfig(**SHAPE)).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, tensors, said = weights.read_bytes(), load_file(weights), json.loads(config.read_text())
    name = "model.layers.2.mlp.gate_proj.weight"

    def refused(pattern):
        with pytest.raises(UserError, match=pattern) as e:
            GPT.from_pretrained(tmp_path)
        assert "\n" not in str(e.value)

    save_file({k: v for k, v in tensors.items() if k != name}, weights)
    refused(rf"{name} is missing; expected one of shape \(192, 64\)")
    save_file(tensors | {name: torch.zeros(191, 64)}, weights)
    refused(rf"{name} has shape \(191, 64\); config.json asks for \(192, 64\)")
    weights.write_bytes(whole[:len(whole) // 2])
    refused("damaged or cut short")
    weights.write_bytes(whole)
    config.write_text(json.dumps(said | {"model_type": "mamba"}))
    refused("model_type is 'mamba'")
    config.write_text(json.dumps(said | {"rope_parameters": {"rope_type": "yarn"}}))
    refused("rope_type is 'yarn'")
    for key, value, pattern in (("num_hidden_layers", 2, r"tensors, such as model\.layers\.2\..* have no place in the model"),
                                ("hidden_size", "a", "n_embd='a': expected int"), ("vocab_size", 1.5, "vocab_size=1.5: expected int")):
        config.write_text(json.dumps(said | {key: value}))
        refused(pattern)
    config.write_text("[]")
    refused("not a model's config")
    config.write_text("{")
    refused("not valid JSON")
    config.unlink()
    refused("no config.json")
