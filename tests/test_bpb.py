"""Bits per byte: the bytes of each token, for every kind of tokenizer, and val/bpb from them."""

import math
import os
import types

import numpy as np
import pytest
import torch
from conftest import write
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import prepare
import runs

TEXT = (
    "It's 12:45, isn't it?  naïve café\n\n\tÜber 日本語、テスト。한국어 👍🏽 e\u0301 \U0001d54f x.\n"
    "Once upon a time there was a cat. The cat sat on the mat, and the cat was a happy cat.\n"
)


def counted(tokenizer, text):
    """Bytes that token_bytes counts in a text."""
    return int(tokenizer.token_bytes()[tokenizer.encode(text)].sum())


@pytest.mark.parametrize("spec", ["byte", "char", "bpe:300", "gpt2", "smollm2"])
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(spec, here, request, monkeypatch):
    if spec == "gpt2":
        cache = os.path.join(request.getfixturevalue("shared"), "tiktoken_cache")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache)
        monkeypatch.setenv("XDG_CACHE_HOME", str(here))
    if spec == "smollm2":
        spec = os.path.join(request.getfixturevalue("shared"), "smollm2_tokenizer.json")
    tokenizer = prepare.make_tokenizer(spec, [TEXT])
    fast = prepare.with_chat_tokens(tokenizer).fast()  # tiktoken's engine where it is the same
    for each in (tokenizer, fast):
        assert counted(each, TEXT) == len(TEXT.encode())
        sizes = each.token_bytes()
        assert len(sizes) == each.vocab_size and sizes.min() == 0
        for special in (each.eos, "<|im_start|>", "<|im_end|>"):
            if each.encode_special(special) is not None:
                assert sizes[each.encode_special(special)] == 0


def saved(library, directory, special):
    library.add_special_tokens(special)
    library.save(os.path.join(directory, "tokenizer.json"))
    return prepare.load_tokenizer(str(directory))


def test_tokens_that_are_no_bytes_but_text(here):
    """Added tokens that are no special ones, as Qwen's <tool_call>, stand for their own text."""
    tokenizer = prepare.train_bpe([TEXT], 300, "bpe:300")
    spec, i = tokenizer.spec, tokenizer.vocab_size
    added = prepare._special("<tool é>", i) | {"special": False}
    tokenizer = prepare.Tokenizer(spec | {"added_tokens": spec["added_tokens"] + [added]}, "x")
    assert tokenizer.token_bytes()[i] == len("<tool é>".encode())


def test_sentencepiece(here):
    """Spaces are a letter of the next token, unknown characters are bytes. The space that is put
    before the text is decoded in the middle of one."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ("▁", *"abcdehimnopstuw.", "▁c", "at", "▁cat", "é"):
        vocab.setdefault(token, len(vocab))
    merges = [("▁", "c"), ("a", "t"), ("▁c", "at")]
    library = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)]
    )
    tokenizer = saved(library, here, ["<unk>", "<s>", "</s>"])
    text = "the cat é 日本\nn"
    assert "<0xE6>" in [tokenizer.library.id_to_token(i) for i in tokenizer.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert counted(tokenizer, text) == len(text.encode()) + 1


def test_wordpiece(here):
    """Tokens of one word are written together, words with a space between them."""
    vocab = {token: i for i, token in enumerate(["[UNK]", "a", "the", "cat", "sat", "##s"])}
    library = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.WordPiece()
    tokenizer = saved(library, here, ["[UNK]", "[EOS]"])
    ids = tokenizer.encode("the cats sat")
    assert len(ids) == 4 and tokenizer.decode(ids) == "the cats sat"
    assert counted(tokenizer, "the cats sat") == len("the cats sat") + 1  # the space before it


# --- the measure


def windows(names, block_size=8, stage="pretrain", dataset=""):
    config = {"dataset": dataset or ",".join(names), "data_dir": "data", "block_size": block_size}
    return prepare.Windows(config | {"seed": 1, "stage": stage, "batch_size": 2})


def make(name, text, spec="byte", mask=None):
    tokenizer = prepare.load_tokenizer(spec)
    ids = np.array([*tokenizer.encode(text), tokenizer.eos_id], "<u2")
    for split in ("train", "val"):
        write(f"data/{name}/{split}.bin", ids.tobytes())
        if mask is not None:
            write(f"data/{name}/{split}.mask", np.array(mask, np.uint8).tobytes())
    meta = {"tokenizer": spec, "vocab_size": tokenizer.vocab_size, "dtype": "uint16"}
    meta |= {"eos_id": tokenizer.eos_id, "kind": "text" if mask is None else "chat"}
    prepare.write_json(f"data/{name}/meta.json", meta)
    return ids


def measured(data, loss, rank=0, world_size=1, vocab_size=300):
    """What train.py measures, if every target costs `loss` nats."""
    table, found = data.token_bytes(vocab_size), []
    for domain, batch in data.held_out(100, 2, rank, world_size):
        count = table[batch.y].sum()
        found.append((domain, {"loss": (loss, batch.units), "bytes": (count, 1)}))
    return found


def alone(*numbers):
    return [float(number) for number in numbers]


def test_bits_per_byte_of_a_text(here):
    """Nats of all targets, the end of the text included, over the bytes of the text. The first
    token is no target."""
    ids = make("text", "naïve 日本語 " * 9)
    row = prepare.means(measured(windows(["text"]), 2.0), {"text": 1.0}, alone)
    targets = len(ids) - 1
    assert row["val/bpb"] == pytest.approx(2.0 * targets / math.log(2) / (targets - 1))
    assert row["val/loss"] == pytest.approx(2.0) and row["val/ppl"] == pytest.approx(math.exp(2))
    assert set(row) == {"val/loss", "val/bpb", "val/ppl"}


def test_processes_and_batches_share_one_mean(here):
    """The sums of two processes, whose batches differ in bytes, are those of one."""
    make("text", "aé日" * 5 + "a" * 50)
    data, shares = windows(["text"]), {"text": 1.0}
    whole = prepare.means(measured(data, 1.5), shares, alone)
    parts = [measured(data, 1.5, rank, 2) for rank in range(2)]
    sums = []
    for part in parts:
        prepare.means(part, shares, lambda *numbers: sums.append(numbers) or alone(*numbers))
    both = prepare.means(parts[0], shares, lambda *_: [a + b for a, b in zip(*sums)])
    assert both == pytest.approx(whole)


def test_a_mixture_is_the_mean_of_its_domains(here):
    make("a", "x" * 100)
    make("b", "日" * 60)
    data = windows("ab", dataset="a:0.75,b:0.25")
    row = prepare.means(measured(data, 3.0), data.shares, alone)
    assert row["val/a/bpb"] == pytest.approx(3 / math.log(2) * 100 / 99)  # the end has no bytes
    expected = 0.75 * row["val/a/bpb"] + 0.25 * row["val/b/bpb"]
    assert row["val/bpb"] == pytest.approx(expected)
    assert {"val/a/ppl", "val/b/ppl", "val/ppl"} <= set(row) and "val/bppl" not in row


def test_answers_only(here):
    """With a mask the bytes are those of the targets, and without a target there is no number."""
    text = "question answer"
    make("chat", text, mask=[0] * 9 + [1] * 7)
    make("none", text, mask=[0] * 16)
    for name, bpb in (("chat", 7 / 6 / math.log(2)), ("none", math.nan)):
        data = windows([name], stage="pretrain")  # a byte tokenizer has no chat tokens
        row = prepare.means(measured(data, 1.0), data.shares, alone)
        assert row["val/bpb"] == pytest.approx(bpb, nan_ok=True)


def test_rows_beyond_the_tokenizer_have_no_bytes(here):
    make("text", "abc" * 10)
    table = windows(["text"]).token_bytes(320)
    assert table.shape == (321,) and table[256:].sum() == 0 and table[:256].eq(1).all()
    assert torch.equal(table[torch.tensor([-1, 97])], torch.tensor([0, 1]))


def test_the_card_has_it(here):
    config = {"stage": "pretrain", "hf_repo": "me/it", "dataset": "text", "init_from": "scratch"}
    model = types.SimpleNamespace(n_params=lambda: 5)
    run = types.SimpleNamespace(step=20, tokens=99)
    rows = [{"step": 20, "val/loss": 1.0, "val/bpb": 0.25}]
    assert "| val/bpb at the end | 20 | 0.2500 |\n| train" in runs.model_card(
        config, [], model, True, run, rows
    )
    del rows[0]["val/bpb"]
    assert "bpb" not in runs.model_card(config | {"stage": "dpo"}, [], model, True, run, rows)
