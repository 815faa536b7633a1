"""Models, data and names of others run no code and lead nowhere; bombs end in a line, within a bounded
memory; a token typed as a config value is recorded nowhere and not printed."""

import gzip
import json
import os
import pickle
import shutil
import sys

import pytest
import torch
from conftest import ROOT, write
from safetensors.torch import save_file
from stand_ins import SECRETS

sys.path.insert(0, __file__.rpartition("/")[0])
import driver

import configurator
import prepare
import runs
from configurator import UserError
from model import GPT, GPTConfig

SHAPE = dict(vocab_size=257, n_layer=1, n_head=2, n_embd=16, block_size=16)


def refused(said, function, *args, **options):
    with pytest.raises(UserError, match=said) as e:
        function(*args, **options)
    return str(e.value)


@pytest.fixture
def model(here):
    """model/: a checkpoint as train.py writes it, but for trainer.pt."""
    GPT(GPTConfig(**SHAPE)).save_pretrained("model")
    prepare.load_tokenizer("byte").save("model")
    return "model"


# --- names and paths

INDEXES = ["../model/model.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", 1, None]
INDEXES += [["model.safetensors"], "model.safetensors\0", "trainer.pt", "C:\\model.safetensors"]


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_of_shards_stays_in_its_directory(model, name):
    """It may name files beside it and no others: ../secret/model.safetensors was loaded."""
    os.rename("model/model.safetensors", "model/other")
    write("model/model.safetensors.index.json", json.dumps(dict(weight_map={"a": name})))
    refused("model.safetensors.index.json: ", GPT.from_pretrained, "model")


NAMES = [
    "../x",
    "..",
    ".",
    "...",
    "a/b",
    "/a",
    "x" * 201,
    "x" * 300,
    "a\0b",
    "a\nb",
    "a b",
    "x.partial",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_directory_in_data(here, name):
    write("a.txt", "The cat sat on the mat. " * 100)
    refused("--name=", prepare.prepare, "a.txt", tokenizer="byte", name=name)
    assert os.listdir(".") == ["a.txt"] or os.listdir("data") == []


def test_the_longest_name_can_be_prepared(here):
    write("a.txt", "The cat sat on the mat. " * 100)
    assert os.path.isdir(prepare.prepare("a.txt", tokenizer="byte", name="x" * 200))


def test_a_missing_source_is_not_looked_for_on_the_hub(here, monkeypatch):
    """With --name= it was, for as long as the network took to fail."""
    monkeypatch.setattr(prepare, "hub_files", lambda *args, **options: 1 / 0)
    refused("gone.txt: no such file", prepare.prepare, "gone.txt", tokenizer="byte", name="made")


# --- code


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("owned",))


def test_pickles_run_no_code(model):
    said = []
    torch.save({"run": Payload()}, "model/trainer.pt")
    assert runs.load("model", said.append) == (None, None) and "passed over" in said[0]
    write("data/x/meta.pkl", pickle.dumps(Payload()))
    refused("meta.pkl: ", prepare.read_meta, "data/x")
    assert not os.path.exists("owned")


def test_code_beside_a_model_is_not_run(model):
    """auto_map, modeling_*.py and a chat template that is a program are left alone."""
    attack = "import os; os.mkdir('owned')"
    config = prepare.read_json("model/config.json")
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.GPT", "AutoConfig": "modeling_x.C"}
    prepare.write_json("model/config.json", config)
    settings = prepare.read_json("model/tokenizer_config.json")
    settings["chat_template"] = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    settings["auto_map"] = {"AutoTokenizer": ["modeling_x.T", None]}
    prepare.write_json("model/tokenizer_config.json", settings)
    for name in ("modeling_x.py", "tokenization_x.py", "config.py", "sitecustomize.py"):
        write(f"model/{name}", attack)
    GPT.from_pretrained("model")
    tokenizer = prepare.with_chat_tokens(prepare.load_tokenizer("model"))
    prepare.render_chat([dict(role="user", content="{{ 7 * 7 }}")], tokenizer)
    assert not os.path.exists("owned")


# --- bombs

BOMB = """
import os, resource, sys
sys.path.insert(0, {root!r})
import prepare, pyarrow
with open("/proc/self/statm") as f:
    used = int(f.read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20), resource.RLIM_INFINITY))
try:
    prepare.prepare(sys.argv[1], tokenizer="byte", name="made", workers=1)
except prepare.UserError as e:
    sys.exit(f"small.py: {{e}}")
"""
LINE = json.dumps(dict(text="a" * (200 << 20))).encode()
BOMBS = {
    "line.jsonl": lambda: LINE + b"\n" + b'{"text": "b"}\n' * 30,
    "line.jsonl.gz": lambda: gzip.compress(LINE, 1),
    "zeros.txt.gz": lambda: gzip.compress(bytes(1 << 28), 1),
    "deep.jsonl": lambda: (b'{"a":' * 300_000 + b"\n") * 30,
    "deep.json": lambda: b"[" * 3_000_000,
    "array.json": lambda: b"[" + b"1," * (140 << 20),
    "number.jsonl": lambda: (b'{"text": ' + b"9" * 1_000_000 + b"}\n") * 30,
    "column.csv": lambda: b'text\n"' + b"a" * (200 << 20),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BOMBS, "bomb.jsonl.zst"])
def test_bombs_end_in_a_line(here, name):
    """Files that unpack to, or hold, far more than a record: 700 MB beside the program are enough,
    and they are refused in a line."""
    import subprocess

    if name == "bomb.jsonl.zst":
        import pyarrow

        content = pyarrow.Codec("zstd").compress(b'{"text": "' + b"a" * (1 << 30), asbytes=True)
    else:
        content = BOMBS[name]()
    write(name, content)
    del content
    write("small.py", BOMB.format(root=ROOT))
    command = [sys.executable, "small.py", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr and "MemoryError" not in done.stderr, done.stderr[-2000:]
    assert done.returncode == 1 and name in done.stderr and done.stderr.count("\n") == 1, done


# --- secrets

ALL_TOKENS = [SECRETS["HF_TOKEN"], SECRETS["RUNPOD_API_KEY"], f"https://u:{SECRETS['HF_TOKEN']}@x"]


@pytest.mark.parametrize("key, token", zip(("sample_start", "hf_repo", "device"), ALL_TOKENS))
def test_a_token_as_a_value_is_refused_without_being_shown(key, token):
    """--sample_start=hf_... was printed, and recorded in samples.txt and every trainer.pt."""
    variables = {"__file__": os.path.join(ROOT, "train.py"), "__doc__": ""}
    options = dict(also="model.py:GPTConfig", argv=[f"--{key}={token}"])
    message = refused(f"{key}: .* access token", configurator.configure, variables, **options)
    assert "hf_" not in message.replace("hf_repo", "") and "rpa_" not in message


def test_a_token_in_a_config_file_is_refused(here):
    write("own.py", f"sample_start = {SECRETS['HF_TOKEN']!r}\n")
    path = os.path.join(ROOT, "train.py")
    variables = {name: key.default for name, key in configurator.read_keys(path).items()}
    variables |= {"__file__": path, "__doc__": ""}
    message = refused("access token", configurator.configure, variables, argv=["own.py"])
    assert SECRETS["HF_TOKEN"] not in message


def test_a_secret_of_the_environment_as_a_value_is_refused(here, monkeypatch):
    """Those of W&B look like a commit's hash: only the environment tells them."""
    key = SECRETS["WANDB_API_KEY"]
    monkeypatch.setenv("WANDB_API_KEY", key)
    config = dict(out_dir="out/a", hf_repo="", backup_dir="", wandb_run_name=f"my {key}")
    config |= dict(batch_size=1, gradient_accumulation_steps=1)
    assert key not in refused("wandb_run_name: .* secret", runs.check, config)


@pytest.mark.skipif(sys.platform != "linux", reason="forks runs, as Linux does it")
def test_nothing_of_a_secret_is_left_behind(tmp_path, monkeypatch):
    """A run, with the secrets in the environment, and one with each typed as a value."""
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    killer = driver.Killer(tmp_path)
    driver.make_sources(tmp_path)
    printed = killer.finished("prepare.py", "text.txt --tokenizer=byte").all
    options = (*driver.TINY, *driver.MODEL, "--dataset=text --max_iters=2 --sample_interval=1")
    printed += killer.finished("train.py", *options, "--out_dir=out/a --sample_start=1+").all
    for i, secret in enumerate(SECRETS.values()):
        for key in ("sample_start", "out_dir"):
            done = killer.run("train.py", *options, f"--out_dir=out/{i} --{key}={secret}")
            assert done.code == 1, done.all
            printed += done.all
    killer.close()
    shutil.rmtree(tmp_path / "hf", ignore_errors=True)
    for name, content in driver.content(tmp_path).items():
        for secret in SECRETS.values():
            assert secret not in printed and secret.encode() not in content, name


# --- absurd sizes


@pytest.mark.parametrize(
    "key", ("num_hidden_layers", "vocab_size", "intermediate_size", "max_position_embeddings")
)
def test_absurd_sizes_in_a_config_make_no_model(model, key):
    """The allocator's traceback, or minutes of making layers: the weights beside it tell."""
    config = prepare.read_json("model/config.json")
    for value in (2**14, 2**20, 2**31, 2**62, 10**30, -1, 1.5, "x"):
        prepare.write_json("model/config.json", config | {key: value})
        try:
            GPT.from_pretrained("model")
        except UserError as e:
            assert "model" in str(e) and "\n" not in str(e)
        else:
            assert key == "max_position_embeddings" and value <= 2**20


def test_weights_that_were_changed_are_found(model):
    """Every bit of the tensors counts, and so does another run's file with a checksum of its own."""
    with open("model/model.safetensors", "rb") as f:
        data = f.read()
    size = int.from_bytes(data[:8], "little")
    for at in (8 + size, 8 + size + 777, len(data) - 1):
        write("model/model.safetensors", data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        refused("model.safetensors: not the weights", GPT.from_pretrained, "model")
    state = {"a": torch.zeros(1)}
    save_file(state, "model/model.safetensors", metadata={"format": "pt", "crc32": "00000000"})
    refused("not the weights", GPT.from_pretrained, "model")
