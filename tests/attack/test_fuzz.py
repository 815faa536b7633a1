"""Whatever stands in a command line, a config, a record, a meta.json or a tokenizer.json: it is taken,
or refused by a UserError in one line. HYPOTHESIS_EXAMPLES sets how many examples each test tries."""

import json
import math
import os
import tempfile

import numpy as np
import pytest
import torch
from conftest import ROOT

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import configurator
import prepare
from configurator import UserError
from model import sample_token

few = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", 30)),
    deadline=None,
    derandomize="HYPOTHESIS_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    database=None,
)
KEYS = configurator.read_keys(os.path.join(ROOT, "train.py"))
leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
value = st.recursive(
    leaf, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(), v, max_size=4)
)
words = st.sampled_from(
    "prompt chosen rejected messages role content user assistant system text question answer "
    "conversations from value human gpt instruction input output response history".split()
)
record = st.recursive(
    leaf | words, lambda v: st.lists(v, max_size=4) | st.dictionaries(words, v, max_size=5)
)


def taken_or_refused(function, *args, **options):
    """The result, or None after a UserError."""
    try:
        return function(*args, **options)
    except UserError as e:
        assert str(e)


@few
@given(st.sampled_from(list(KEYS)), st.text(max_size=40))
def test_values_on_the_command_line(key, text):
    got = taken_or_refused(KEYS[key].parse, text)
    assert got is None or type(got) is type(KEYS[key].default)


@few
@given(
    st.lists(
        st.text(max_size=20) | st.sampled_from(["--n", "-", "--", "--seed=", "a=b"]), max_size=5
    )
)
def test_command_lines(argv):
    taken_or_refused(configurator._read_arguments, argv, KEYS, False)


@few
@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_config_files(content):
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "own.py")
        with open(path, "wb") as f:
            f.write(
                b"# " + content.replace(b"(", b"[") + b"\nseed = 2\n" + content.replace(b"(", b"[")
            )
        taken_or_refused(configurator._run_config, path, {"seed": 1})


@few
@given(st.dictionaries(st.sampled_from([*prepare.META, "train_tokens", "val_tokens"]), value))
def test_meta(meta):
    """What is taken can be relied on."""
    with tempfile.TemporaryDirectory() as directory:
        with open(os.path.join(directory, "meta.json"), "w") as f:
            json.dump(meta, f)
        np.arange(40, dtype=np.uint16).tofile(os.path.join(directory, "train.bin"))
        taken_or_refused(prepare.Bins, directory, "train", 8)
        taken_or_refused(prepare.check_content, directory, print)


@few
@given(st.binary(max_size=200) | value.map(lambda v: json.dumps(v).encode()))
def test_meta_of_any_bytes(content):
    with tempfile.TemporaryDirectory() as directory:
        with open(os.path.join(directory, "meta.json"), "wb") as f:
            f.write(content)
        taken_or_refused(prepare.read_meta, directory)


TOKENIZER = prepare.with_chat_tokens(prepare.load_tokenizer("byte"))


@few
@given(
    st.lists(record | st.binary(max_size=30), max_size=4),
    st.sampled_from(["chat", "prefs", "verify"]),
)
def test_records_as_sources(records, shape):
    """A reader of records keeps, counts or refuses each, whatever its fields hold."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "a.jsonl")
        with open(path, "wb") as f:
            for item in records:
                f.write((item if isinstance(item, bytes) else json.dumps(item).encode()) + b"\n")
        options = dict(tokenizer="byte", as_=shape, name="made", workers=1)
        taken_or_refused(prepare.prepare, path, data_dir=os.path.join(directory, "d"), **options)


@few
@given(st.lists(record, max_size=4))
def test_prepared_records(records):
    """Records that somebody edited: train.jsonl of preferences and of problems."""
    pairs = prepare.Pairs.__new__(prepare.Pairs)
    pairs.tokenizer, pairs.block_size = TOKENIZER, 64
    with tempfile.TemporaryDirectory() as directory:
        with open(os.path.join(directory, "train.jsonl"), "w") as f:
            f.writelines(json.dumps(item) + "\n" for item in records)
        taken_or_refused(prepare.Records, directory, "train", pairs.encode)


@few
@given(st.lists(st.fixed_dictionaries(dict(role=st.sampled_from(["system", "user", "assistant"]),
                                           content=st.text(max_size=30)))), st.booleans())  # fmt: skip
def test_chats_are_encoded_and_masked(messages, last_only):
    done = taken_or_refused(prepare.render_chat, messages, TOKENIZER, last_only=last_only)
    if done:
        assert len(done[0]) == len(done[1]) and set(done[1]) <= {0, 1}


@few
@given(st.data())
def test_tokenizers(data):
    """A tokenizer.json with one place changed, at any depth."""
    spec = json.loads(json.dumps(TOKENIZER.spec))
    node = spec
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [k for k in node if isinstance(node[k], dict) and node[k]]
        if not inner:
            break
        node = node[data.draw(st.sampled_from(sorted(inner)))]
    node[data.draw(st.sampled_from(sorted(node)))] = data.draw(value)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "tokenizer.json")
        with open(path, "w") as f:
            json.dump(spec, f)
        tokenizer = taken_or_refused(prepare.load_tokenizer, path)
        if tokenizer:
            taken_or_refused(tokenizer.encode, "ab c")


@few
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 10),
    st.integers(0, 20),
    st.floats(0, 1, exclude_min=True),
    st.floats(0, 1),
)
def test_the_sampler_gives_a_token(logits, draw, temperature, top_k, top_p, min_p):
    draws = torch.tensor([draw], dtype=torch.float64)
    token = sample_token(torch.tensor([logits]), draws, temperature, top_k, top_p, min_p)
    assert 0 <= int(token.flatten()[0]) < len(logits) and math.isfinite(
        logits[int(token.flatten()[0])]
    )
