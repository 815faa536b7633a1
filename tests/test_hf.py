"""What we write, transformers reads; what transformers writes, we read; the numbers are equal."""

import copy
import dataclasses
import json
import os
import pathlib
import types
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from configurator import UserError
from model import ARCHITECTURES, GPT, REQUIRED, GPTConfig, architecture

SHAPE = dict(vocab_size=97, block_size=32, n_layer=5, n_head=4, n_embd=64)
NEUTRAL = dict(
    qk_norm=False, unit_embed=False, rope_theta=1e4
)  # GPTConfig's own defaults are the toy run's
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
COMMON = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
THEIRS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**COMMON, rope_theta=5e4, tie_word_embeddings=True)),
    "smollm3": (
        SmolLM3ForCausalLM,
        SmolLM3Config(**COMMON, bos_token_id=0, eos_token_id=0, pad_token_id=0),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**COMMON, head_dim=32)),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=97, n_embd=64, n_layer=5, n_head=4, n_positions=32),
    ),
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
    greedy = theirs.generate(
        prompt,
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        attention_mask=torch.ones_like(prompt),
    )
    assert torch.equal(ours.generate(prompt, 16, temperature=0), greedy)
    return difference


@pytest.mark.parametrize("name", OURS)
def test_ours_loads_there(name, tmp_path):
    ours = shaken(GPT(GPTConfig(**SHAPE | NEUTRAL | OURS[name])))
    ours.save_pretrained(tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert theirs.config.model_type == name.split("-")[0]
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    print(f"{name}: largest difference {compare(ours, theirs):.1e}")


@pytest.mark.parametrize("name", OURS)
def test_ours_comes_back_the_same(name, tmp_path):
    ours = shaken(GPT(GPTConfig(**SHAPE | NEUTRAL | OURS[name])))
    ours.save_pretrained(tmp_path)
    back = GPT.from_pretrained(tmp_path)
    assert back.config == ours.config
    for (k, a), b in zip(ours.state_dict().items(), back.state_dict().values(), strict=True):
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
    compare(
        GPT.from_pretrained(tmp_path).eval(),
        LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32),
    )


@pytest.mark.parametrize(
    "keys", [dict(qk_norm=True, nope_every=2), dict(norm="layernorm"), dict(mlp="gelu")]
)
def test_what_no_architecture_expresses(keys, tmp_path):
    ours = shaken(GPT(GPTConfig(**SHAPE | NEUTRAL | keys)))
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nanosmol"
    idx = torch.randint(97, (2, 16))
    assert torch.equal(GPT.from_pretrained(tmp_path).eval()(idx)[0], ours(idx)[0])
    with pytest.raises(
        ValueError, match="nanosmol"
    ):  # clean: it names the type that it doesn't know
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_hack_can_say_that_the_layout_is_no_longer_true(tmp_path):
    ours = GPT(GPTConfig(**SHAPE | NEUTRAL))
    ours.save_pretrained(tmp_path, hf_layout=False)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nanosmol"
    assert GPT.from_pretrained(tmp_path).config == ours.config


def test_damaged_directories_are_refused_in_one_line(tmp_path):
    GPT(GPTConfig(**SHAPE | NEUTRAL)).save_pretrained(tmp_path)
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
    weights.write_bytes(whole[: len(whole) // 2])
    refused("damaged or cut short")
    weights.write_bytes(whole)
    config.write_text(json.dumps(said | {"model_type": "mamba"}))
    refused("model_type is 'mamba'")
    config.write_text(json.dumps(said | {"rope_parameters": {"rope_type": "yarn"}}))
    refused("rope_type is 'yarn'")
    for key, value, pattern in (
        (
            "num_hidden_layers",
            2,
            r"tensors, such as model\.layers\.2\..* have no place in the model",
        ),
        ("hidden_size", "a", "n_embd='a': expected a whole number"),
        ("vocab_size", 1.5, "vocab_size=1.5: expected a whole number"),
    ):
        config.write_text(json.dumps(said | {key: value}))
        refused(pattern)
    config.write_text("[]")
    refused("not a model's config")
    config.write_text("{")
    refused("not valid JSON")
    config.unlink()
    refused("no config.json")


# --- what another program wrote


def test_a_tied_config_with_another_head_in_the_file(tmp_path):
    """transformers unties such a model and warns; dropping its head would change every logit."""
    for name in ("llama", "gpt2"):
        kind, config = THEIRS[name]
        theirs = shaken(kind(copy.deepcopy(config)))
        theirs.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        save_file(
            load_file(file) | {"lm_head.weight": 0.1 * torch.randn(97, 64)},
            file,
            metadata={"format": "pt"},
        )
        with pytest.warns(UserWarning, match="lm_head.weight is not the embedding"):
            ours = GPT.from_pretrained(tmp_path / name).eval()
        assert not ours.config.tie_embeddings
        compare(ours, AutoModelForCausalLM.from_pretrained(tmp_path / name).eval())


def test_a_tied_config_with_the_same_head_in_the_file_stays_tied(tmp_path):
    ours = shaken(GPT(GPTConfig(**SHAPE | NEUTRAL)))
    ours.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = GPT.from_pretrained(tmp_path)
    assert back.config == ours.config and back.head.weight is back.embed.weight


@pytest.mark.parametrize("name", ["llama-embed-scale", "smollm3", "gpt2-no-bias"])
def test_fine_tuned_elsewhere_it_comes_back_as_it_was_trained(name, tmp_path):
    """There embedding and head are two matrices where here they are one, and GPT-2 has biases."""
    shaken(GPT(GPTConfig(**SHAPE | NEUTRAL | OURS[name]))).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    optimizer, idx = torch.optim.AdamW(theirs.parameters(), 1e-2), torch.randint(97, (4, 32))
    for _ in range(3):
        theirs(idx, labels=idx).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.eval().save_pretrained(tmp_path / "tuned")
    with pytest.warns(UserWarning, match="is not the embedding|biases are not 0"):
        ours = GPT.from_pretrained(tmp_path / "tuned").eval()
    compare(ours, theirs)
    ours.save_pretrained(tmp_path / "again")
    assert GPT.from_pretrained(tmp_path / "again").config == ours.config


def test_a_scaled_embedding_that_was_only_rounded_stays_tied(tmp_path):
    ours = shaken(GPT(GPTConfig(**SHAPE | NEUTRAL | dict(embed_scale=True))))
    ours.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "bf16"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = GPT.from_pretrained(tmp_path / "bf16")
    assert back.config == ours.config


CONFIGS = {"llama": LlamaConfig, "smollm3": SmolLM3Config, "qwen3": Qwen3Config, "gpt2": GPT2Config}
# options that change no logit
HARMLESS = {
    # ids of the tokenizer, names, the form of the output, numerics
    *("pad_token_id", "bos_token_id", "eos_token_id", "transformers_version", "architectures"),
    *("dtype", "return_dict", "output_hidden_states", "tie_last_hidden_states", "use_cache"),
    *("chunk_size_feed_forward", "pretraining_tp", "reorder_and_upcast_attn"),
    # training, heads for other tasks
    *("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "id2label", "label2id"),
    *("num_labels", "problem_type", "summary_type", "summary_use_proj", "summary_activation"),
    *("summary_proj_to_labels", "summary_first_dropout"),
    # act through layer_types, which is refused; read apart from the table
    *("sliding_window", "max_window_layers", "rope_parameters", "no_rope_layers"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_option_of_transformers_is_read_or_refused_or_harmless(kind):
    """A later transformers that adds an option fails here, by the option's name."""
    table = ARCHITECTURES[kind]
    known = {theirs for _, theirs, _ in table.keys} | set(table.allowed) | HARMLESS
    options = {
        field.name for field in dataclasses.fields(CONFIGS[kind]) if not field.name.startswith("_")
    }
    assert "tie_word_embeddings" in options and not options - known


@pytest.mark.parametrize("kind", CONFIGS)
def test_defaults_are_those_of_transformers(kind):
    """A key that a config.json leaves out is what transformers takes it for."""
    theirs = CONFIGS[kind]()
    for _, key, default in ARCHITECTURES[kind].keys:
        if default is not REQUIRED and default != 0:
            value = (
                theirs.rope_parameters["rope_theta"]
                if key == "rope_theta"
                else getattr(theirs, key)
            )
            assert value == default, key


REFUSED = [
    ("gpt2", "scale_attn_weights", False),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "add_cross_attention", True),
    ("gpt2", "activation_function", "relu"),
    ("gpt2", "pruned_heads", {"0": [1]}),
    ("gpt2", "is_causal", False),
    ("gpt2", "is_encoder_decoder", True),
    ("gpt2", "per_layer_config", {"0": {}}),
    ("llama", "hidden_act", "gelu"),
    ("llama", "quantization_config", {"bits": 4}),
    ("llama", "mlp_bias", True),
    ("llama", "is_causal", False),
    ("llama", "partial_rotary_factor", 0.5),
    ("llama", "rope_scaling", {"type": "linear"}),
    ("llama", "rope_parameters", {"rope_type": "llama3"}),
    ("llama", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ("qwen3", "attention_bias", True),
    ("qwen3", "use_sliding_window", True),
    ("qwen3", "layer_types", ["full_attention"] * 4 + ["sliding_attention"]),
    ("qwen3", "hidden_act", "relu"),
    ("smollm3", "no_rope_layers", [1, 0, 0, 1, 1]),
    ("smollm3", "use_sliding_window", True),
    ("smollm3", "layer_types", ["sliding_attention"] * 5),
    ("smollm3", "attention_bias", True),
]


@pytest.mark.parametrize("kind, option, value", REFUSED)
def test_options_that_change_the_maths_are_refused_by_name(kind, option, value, tmp_path):
    theirs, config = THEIRS[kind]
    theirs(config).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {option: value}))
    name = {"rope_scaling": "rope_type", "rope_parameters": "rope_type|partial_rotary_factor"}.get(
        option, option
    )
    with pytest.raises(UserError, match=rf"config\.json: .*({name})") as e:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(e.value)


def test_options_that_change_no_logit_are_accepted(tmp_path):
    for kind, options in {
        "gpt2": {"reorder_and_upcast_attn": True, "resid_pdrop": 0.3},
        "llama": {"pretraining_tp": 2},
        "smollm3": {"no_rope_layer_interval": 9, "no_rope_layers": [1, 0, 1, 0, 1]},
    }.items():
        theirs, config = THEIRS[kind]
        config = copy.deepcopy(config)
        for option, value in options.items():
            setattr(config, option, value)
        theirs = shaken(theirs(config))
        theirs.save_pretrained(tmp_path / kind)
        compare(GPT.from_pretrained(tmp_path / kind).eval(), theirs)


# --- what someone added to model.py


class OwnParts(GPT):
    """Parameters and buffers that no architecture has a name for, in every kind of place."""

    def __init__(self, config):
        super().__init__(config)
        self.value_embed = nn.Embedding(97, 64)
        self.second_head = nn.Linear(64, 97, bias=False)
        self.second_head.weight = self.value_embed.weight  # one matrix under two names
        self.register_buffer("count", torch.tensor(2**40 + 1))
        for block in self.blocks:
            block.gate = nn.Parameter(torch.tensor(0.5))
            block.attn.sinks = nn.Parameter(torch.randn(4))
            block.mlp.experts = nn.Parameter(torch.randn(2, 3, 64))


PARTS = [
    "value_embed.weight",
    "count",
    "blocks.*.gate",
    "blocks.*.attn.sinks",
    "blocks.*.mlp.experts",
]


def test_parameters_of_ones_own_are_saved_and_come_back(tmp_path):
    """Left out of a checkpoint, they would make it "damaged", and a run that cannot be resumed."""
    ours = shaken(OwnParts(GPTConfig(**SHAPE | NEUTRAL)))
    kind, obstacles = architecture(ours.config, ours.state_dict())
    assert kind == "nanosmol" and len(obstacles) == 6  # one line for all layers
    assert all(any(part in line for line in obstacles) for part in PARTS)
    with pytest.warns(UserWarning, match="value_embed.weight"):
        ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nanosmol"
    back = OwnParts.from_pretrained(tmp_path)
    assert back.config == ours.config and back.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert (
            torch.equal(back.state_dict()[name], tensor)
            and back.state_dict()[name].dtype == tensor.dtype
        ), name
    with pytest.raises(UserError, match="tensors, such as .* have no place"):
        GPT.from_pretrained(tmp_path)  # without the change it is refused, and nothing is dropped


@pytest.mark.parametrize("change", ["other shape", "left out", "no longer tied", "factorised"])
def test_other_changes_of_the_tensors_are_not_called_llama(change, tmp_path):
    class Changed(GPT):
        def __init__(self, config):
            super().__init__(config)
            if change == "other shape":
                self.blocks[1].mlp.up = nn.Linear(64, 200, bias=False)
            elif change == "left out":
                self.norm = nn.Identity()
            elif change == "no longer tied":
                self.head = nn.Linear(64, 97, bias=False)
            else:
                self.embed = nn.Sequential(nn.Embedding(97, 8), nn.Linear(8, 64, bias=False))
                self.head = nn.Linear(64, 97, bias=False)

    ours = Changed(GPTConfig(**SHAPE | NEUTRAL))
    with pytest.warns(UserWarning, match="mlp.up.weight|norm.weight|head.weight"):
        ours.save_pretrained(tmp_path)
    back = Changed.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in ours.state_dict().items())


def test_a_model_of_someone_else_takes_parameters_of_ones_own(tmp_path):
    """They keep their initial values, and a warning names them."""
    LlamaForCausalLM(THEIRS["llama"][1]).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="blocks.0.attn.sinks"):
        ours = OwnParts.from_pretrained(tmp_path)
    assert (ours.blocks[3].gate == 0.5).all() and ours.value_embed.weight.isfinite().all()


def patched_model(old, new):
    """model.py as a user changed it."""
    import model

    source = pathlib.Path(model.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    module = types.ModuleType("patched_model")
    module.__file__ = model.__file__
    import sys

    sys.modules[module.__name__] = module  # where dataclasses look for it
    exec(compile(source.replace(old, new), model.__file__, "exec"), module.__dict__)
    return module


def test_a_key_of_ones_own(tmp_path):
    """At its default a model is what it was; at another value no architecture has it."""
    field = "    n_layer: int = "
    changed = patched_model(
        field,
        "    softcap: float = 0.0    # tanh(logits / softcap), a key that was added\n" + field,
    )
    plain = changed.GPT(changed.GPTConfig(**SHAPE | NEUTRAL))
    plain.save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["model_type"] == "llama"
    assert GPT.from_pretrained(tmp_path / "plain").config.n_layer == 5
    capped = changed.GPT(changed.GPTConfig(**SHAPE | NEUTRAL | dict(softcap=30.0)))
    assert changed.architecture(capped.config)[0] == "nanosmol"
    with pytest.warns(UserWarning, match="softcap=30.0"):
        capped.save_pretrained(tmp_path / "capped")
    assert changed.GPT.from_pretrained(tmp_path / "capped").config == capped.config
    with pytest.raises(UserError, match="no key 'softcap'"):
        GPT.from_pretrained(tmp_path / "capped")
    # a checkpoint from before the key was added has its default
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        GPT(GPTConfig(**SHAPE | NEUTRAL | dict(mlp="gelu"))).save_pretrained(tmp_path / "before")
    assert changed.GPT.from_pretrained(tmp_path / "before").config.softcap == 0.0


def test_a_nanosmol_config_that_lacks_a_key_is_refused(tmp_path):
    GPT(GPTConfig(**SHAPE | NEUTRAL)).save_pretrained(tmp_path, hf_layout=False)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    del written["nanosmol"]["rope_theta"]
    file.write_text(json.dumps(written))
    with pytest.raises(UserError, match="the key 'rope_theta' is missing"):
        GPT.from_pretrained(tmp_path)


# config.json as it was written before the layout became a table: checkpoints of that time are read,
# and what is written today is read by the model.py of that time
WRITTEN = {
    "qwen3": (
        dict(n_kv_head=2, qk_norm=True, head_dim=32, rope_theta=300.0, unit_embed=True),
        {
            "architectures": ["Qwen3ForCausalLM"], "vocab_size": 97, "hidden_size": 64,
            "intermediate_size": 192, "num_hidden_layers": 5, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu",
            "max_position_embeddings": 32, "rms_norm_eps": 1e-05, "rope_theta": 300.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
            "attention_bias": False, "initializer_range": 0.02, "model_type": "qwen3",
            "tie_word_embeddings": True, "dtype": "float32", "use_cache": True,
            "nanosmol": {"unit_embed": True},
        },
    ),
    "smollm3": (
        dict(n_kv_head=2, nope_every=4, embed_scale=True, init="trunc_normal"),
        {
            "architectures": ["SmolLM3ForCausalLM"], "vocab_size": 97, "hidden_size": 64,
            "intermediate_size": 192, "num_hidden_layers": 5, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu",
            "max_position_embeddings": 32, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "attention_bias": False, "initializer_range": 0.02, "mlp_bias": False,
            "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0, 1],
            "use_sliding_window": False, "pad_token_id": None, "model_type": "smollm3",
            "tie_word_embeddings": False, "dtype": "float32", "use_cache": True,
            "nanosmol": {"tie_embeddings": True, "embed_scale": True, "init": "trunc_normal"},
        },
    ),
    "gpt2": (
        dict(norm="layernorm", mlp="gelu", pos="learned", dropout=0.1),
        {
            "architectures": ["GPT2LMHeadModel"], "vocab_size": 97, "n_positions": 32,
            "n_embd": 64, "n_layer": 5, "n_head": 4, "n_inner": 256,
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05, "resid_pdrop": 0.1,
            "embd_pdrop": 0.1, "attn_pdrop": 0.1, "initializer_range": 0.02,
            "model_type": "gpt2", "tie_word_embeddings": True, "dtype": "float32",
            "use_cache": True, "nanosmol": {"dropout": 0.1, "bias": False},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITTEN)
def test_config_json_is_written_and_read_as_before(kind, tmp_path):
    keys, written = WRITTEN[kind]
    ours = shaken(GPT(GPTConfig(**SHAPE | NEUTRAL | keys)))
    ours.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    now = json.loads(file.read_text())
    assert {key: now[key] for key in written} == written
    assert now.keys() - written.keys() <= {"bos_token_id", "eos_token_id", "pad_token_id", "n_ctx"}
    file.write_text(json.dumps(written))
    assert GPT.from_pretrained(tmp_path).config == ours.config
