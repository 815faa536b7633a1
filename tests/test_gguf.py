"""What sample.py --gguf writes, llama.cpp reads: the same tokens of a text, the same greedy tokens."""

import functools
import json
import math
import os
import urllib.request

import pytest
import torch
from conftest import SHARED
from processes import Processes

import prepare
from configurator import UserError
from model import GPT, GPTConfig, save_gguf

pytest.importorskip("gguf", reason="needs gguf: pip install gguf")
llama_cpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")

SHAPE = dict(block_size=256, n_layer=5, n_head=4, n_embd=64, qk_norm=False, unit_embed=False)
SHAPE |= dict(init_std=0.3)  # so that no two tokens are equally likely
GPT2 = dict(norm="layernorm", mlp="gelu", pos="learned")
ARCHITECTURES = {
    "llama": dict(n_kv_head=2),
    "smollm3": dict(n_kv_head=2, nope_every=4, embed_scale=True),
    "qwen3": dict(n_kv_head=2, qk_norm=True, head_dim=32, rope_theta=1e4),
    "gpt2": GPT2 | dict(bias=True),
}
VARIANTS = {
    "llama-bias": dict(n_kv_head=1, bias=True, head_dim=32, tie_embeddings=False),
    "llama-scaled": dict(embed_scale=True),
    "llama-odd-rows": dict(n_head=2, n_embd=36, ffn_dim=50),
    "gpt2-no-bias": GPT2 | dict(ffn_dim=96, tie_embeddings=False),
}


def trained(pre_tokenizer=None):
    """A byte-level BPE such as the toy's, or one that splits words by another rule."""
    texts = [prepare.SAMPLE, "Once upon a time there was a boy. " * 8]
    tokenizer = prepare.train_bpe(texts, 400, "bpe:400", min_frequency=1)
    if pre_tokenizer is None:
        return tokenizer
    split = dict(type="Split", pattern=dict(Regex=pre_tokenizer), behavior="Isolated", invert=False)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    steps = dict(type="Sequence", pretokenizers=[split, level])
    return prepare.Tokenizer(tokenizer.spec | dict(pre_tokenizer=steps), "split")


def with_ignore_merges():
    tokenizer = trained(prepare.LLAMA3_WORDS)
    model = tokenizer.spec["model"] | dict(ignore_merges=True)
    return prepare.Tokenizer(tokenizer.spec | dict(model=model), "ignore")


@functools.cache
def shared_tokenizer(name):
    if not os.path.isdir(SHARED):
        pytest.skip(f"needs the tokenizers of {SHARED}")
    if name == "gpt2":
        os.environ["TIKTOKEN_CACHE_DIR"] = os.path.join(SHARED, "tiktoken_cache")
        return prepare.with_chat_tokens(prepare.load_tokenizer("gpt2"))
    return prepare.load_tokenizer(os.path.join(SHARED, "smollm2_tokenizer.json"))


TOKENIZERS = {
    "toy": trained,
    "smollm2": lambda: shared_tokenizer("smollm2"),
    "gpt2": lambda: shared_tokenizer("gpt2"),
    "byte": lambda: prepare.load_tokenizer("byte"),
    "llama3": lambda: trained(prepare.LLAMA3_WORDS),
    "llama3-ignore-merges": with_ignore_merges,
    "qwen2": lambda: trained(prepare.QWEN2_WORDS),
}


def made(tokenizer, **keys):
    config = SHAPE | dict(vocab_size=tokenizer.vocab_size + 5) | keys
    return GPT(GPTConfig(**config)).eval()


def served(path):
    """llama.cpp with a model."""
    params = llama_cpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = params.n_batch = 256
    params.n_parallel = params.cpuparams.n_threads = 1
    # in float32, so that the numbers can be compared
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.fit_params, params.verbosity = False, False, 0
    return llama_cpp.Server(params)


def exported(model, tokenizer, dtype="float32"):
    save_gguf(model, "m.gguf", dtype, tokenizer.gguf_vocabulary(model.config.vocab_size))
    return served("m.gguf")


def greedy(server, ids, n):
    """(tokens, their log-probabilities) of llama.cpp, which leaves out those from the first token
    on that is not a whole character."""
    asked = dict(prompt=ids, max_tokens=n, temperature=0, logprobs=1, ignore_eos=True)
    got = server.handle_completions(asked | dict(return_tokens=True, verbose=True))
    tokens, log_probs = got["__verbose"]["tokens"], []
    for token, entry in zip(tokens, got["choices"][0]["logprobs"]["content"]):
        if token != entry["id"]:
            break
        log_probs.append(entry["logprob"])
    return tokens, log_probs


# of log-probabilities; llama.cpp looks up GELU in a table of float16
TOLERANCE = {"swiglu": 1e-4, "gelu": 1e-2}


def compare(model, server, tokenizer, tolerance=0):
    """Greedy tokens are equal and their log-probabilities near; with `tolerance` only the latter."""
    ids = tokenizer.encode("Once upon a time there was")
    tokens, log_probs = greedy(server, ids, 16)
    logits = model(torch.tensor([ids + tokens]))[0][0, len(ids) - 1 : -1]  # (n, vocab_size)
    ours = logits.log_softmax(-1)[range(len(log_probs)), tokens[: len(log_probs)]]
    difference = (ours - torch.tensor(log_probs)).abs().max().item() if log_probs else 0
    assert difference < (tolerance or TOLERANCE[model.config.mlp])
    if not tolerance:
        logits[:, [tokenizer.eos_id, tokenizer.encode_special("<|im_end|>")]] = -math.inf
        assert logits.argmax(-1).tolist() == tokens and len(set(tokens)) > 4
    print(f"largest difference of {len(log_probs)} log-probabilities {difference:.1e}")


QUICK = [*((kind, "toy") for kind in ARCHITECTURES), ("llama", "smollm2"), ("gpt2", "gpt2")]
PAIRS = [
    pytest.param(kind, name, marks=[] if (kind, name) in QUICK else pytest.mark.slow)
    for kind in ARCHITECTURES
    for name in ("toy", "smollm2", "gpt2")
]


@torch.no_grad()
@pytest.mark.parametrize("kind, name", PAIRS)
def test_greedy_tokens_are_ours(kind, name, here):
    tokenizer = TOKENIZERS[name]()
    model = made(tokenizer, **ARCHITECTURES[kind])
    compare(model, exported(model, tokenizer), tokenizer)


@torch.no_grad()
@pytest.mark.parametrize("kind", VARIANTS)
def test_greedy_tokens_are_ours_for_other_shapes(kind, here):
    tokenizer = trained()
    model = made(tokenizer, **VARIANTS[kind])
    compare(model, exported(model, tokenizer), tokenizer)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_smaller_dtypes_are_near(dtype, here):
    tokenizer = trained()
    for keys in (ARCHITECTURES["gpt2"], VARIANTS["llama-odd-rows"]):
        model = made(tokenizer, **keys | dict(init_std=0.05))
        compare(model, exported(model, tokenizer, dtype), tokenizer, tolerance=0.05)
        whole = sum(p.numel() for p in model.parameters()) * 4
        assert os.path.getsize("m.gguf") < 0.75 * whole + 20_000


TEXTS = [
    prepare.SAMPLE,
    "Straße 12345 kostet 3,50 €.\n\n\n\tdef f(x):\n        return x ** 2  # ok?   \r\n",
    "Él dijo: «¿qué?» — 你好，世界！ Привет, мир. नमस्ते 🙂👩‍💻 I'll we've DON'T",
    " leading", "trailing ", "   ", "\n", "a\n\n\nb", "1 22 333 4444 ½ ²", "<|endoftext|> <|im_end|>",
]  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_ids_are_ours(name, here):
    tokenizer = TOKENIZERS[name]()
    server = exported(made(tokenizer), tokenizer)
    for text in TEXTS:
        asked = json.dumps(dict(content=text, parse_special=False, add_special=True)).encode()
        address = f"{server.listening_address}/tokenize"
        request = urllib.request.Request(address, asked, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["tokens"] == tokenizer.encode(text), text


def test_a_chat_reads_our_prompt_and_ends_at_im_end(here):
    tokenizer = trained()
    messages = [dict(role="system", content="Be short."), dict(role="user", content="Hi!")]
    answer = dict(role="assistant", content="Hello there, boy.")
    ids, mask = prepare.render_chat([*messages, answer], tokenizer)
    model = made(tokenizer, init_std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    idx, targets = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
    targets[torch.tensor([mask[1:]]) == 0] = -1
    for _ in range(40):
        model(idx, targets)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    server = exported(model.eval(), tokenizer)
    asked = dict(messages=messages, max_tokens=30, temperature=0)
    got = server.handle_chat_completions(asked)
    assert got["choices"][0]["message"]["content"] == answer["content"]
    assert got["choices"][0]["finish_reason"] == "stop"
    prompt, _ = prepare.render_chat(messages, tokenizer, add_generation_prompt=True)
    assert got["usage"]["prompt_tokens"] == len(prompt)
    # a later turn, as llama.cpp renders it
    asked["messages"] = [*messages, answer, dict(role="user", content="Bye!")]
    prompt, _ = prepare.render_chat(asked["messages"], tokenizer, add_generation_prompt=True)
    assert server.handle_chat_completions(asked)["usage"]["prompt_tokens"] == len(prompt)


class Window(GPT):
    def visible(self, query, key):
        return (key <= query) & (key > query - 8)


class SoftCap(GPT):
    def logits(self, x):
        return 30 * torch.tanh(super().logits(x) / 30)


REFUSED = {
    "nope_every=4, not 2": (GPT, dict(nope_every=2)),
    "bias=False, not True": (GPT, dict(nope_every=4, bias=True)),
    "has mlp='swiglu', not 'gelu'": (GPT, dict(mlp="gelu")),
    "GPT.visible was edited": (Window, {}),
    "GPT.logits was edited": (SoftCap, {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(reason, here):
    kind, keys = REFUSED[reason]
    tokenizer = prepare.load_tokenizer("byte")
    model = kind(GPTConfig(**SHAPE | dict(vocab_size=257) | keys))
    with pytest.raises(UserError, match=reason):
        save_gguf(model, "m.gguf", "float32", tokenizer.gguf_vocabulary(257))
    assert os.listdir() == []


def test_tokenizers_that_llama_cpp_lacks_are_refused_by_name(here):
    characters = prepare.make_tokenizer("char", ["abc"])
    with pytest.raises(UserError, match="char: llama.cpp needs a byte-level BPE"):
        characters.gguf_vocabulary(10)
    with pytest.raises(UserError, match="split: llama.cpp cannot split a text into words"):
        trained(r"\w+").gguf_vocabulary(500)
    with pytest.raises(UserError, match="400 tokens, the model 300: they do not belong together"):
        trained().gguf_vocabulary(300)


def test_the_command_writes_a_file_that_runs_and_overwrites_none(here):
    tokenizer = trained()
    model = made(tokenizer)
    model.save_pretrained("model", generation={"eos_token_id": 0})
    tokenizer.save("model")
    processes = Processes(here)
    command = ("sample.py", "--init_from=model --gguf_dtype=float16")
    written = processes.finished(*command, "--gguf=m.gguf")
    assert "m.gguf: float16, 0.6 MB, llama.cpp's pre-tokenizer smollm" in written.err
    with torch.no_grad():
        compare(model, served("m.gguf"), tokenizer, tolerance=0.1)
    before = os.stat("m.gguf")
    again = processes.run(*command, "--gguf=m.gguf")
    assert again.code == 1 and "gguf=m.gguf: it exists already" in again.err
    assert os.stat("m.gguf").st_mtime_ns == before.st_mtime_ns
    model.save_pretrained("model", hf_layout=False)  # an edit that no config can tell
    refused = processes.run(*command, "--gguf=other.gguf")
    assert refused.code == 1 and "model_type nanosmol" in refused.err
    assert not os.path.exists("other.gguf")
    processes.close()


def test_nothing_is_left_of_a_file_that_could_not_be_written(here, monkeypatch):
    import gguf

    def full(self, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    tokenizer = prepare.load_tokenizer("byte")
    model = made(tokenizer)
    with pytest.raises(OSError, match="No space left"):
        save_gguf(model, "m.gguf", "float32", tokenizer.gguf_vocabulary(model.config.vocab_size))
    assert os.listdir() == []
