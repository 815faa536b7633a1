"""prepare.py from the source to the data set: what is held out, names, what is replaced, and what
it advises next."""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from test_prepare import EOT, ROOT, files_of, ids_of, meta_of, write

import prepare
from configurator import UserError, counted


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def documents(count, words=8, seed=0):
    """Different texts of about 5 * words bytes."""
    rng = random.Random(seed)
    return [
        f"{i} " + " ".join(rng.choices(["some", "word", "here"], k=words)) for i in range(count)
    ]


def held_out(directory):
    """The documents of the validation split of a data set made with tokenizer=byte."""
    ids = ids_of(directory, "val")
    ids[ids == 256] = ord("\n")
    return set(bytes(ids.astype(np.uint8)).decode().splitlines())


def jsonl(path, records):
    write(path, "".join(json.dumps(record) + "\n" for record in records))


def chats(count):
    roles = ("user", "assistant")
    return [
        dict(messages=[dict(role=role, content=f"{role} {i}") for role in roles])
        for i in range(count)
    ]


# --- what is held out


@pytest.mark.parametrize("count", [2, 3, 10, 100, 300, 1000])
def test_a_document_and_a_window_are_held_out(here, capsys, count):
    """However few documents there are, by the order of their hashes, and said in one line."""
    texts = documents(count)
    write("t.txt", EOT.join(texts))
    directory = prepare.prepare("t.txt", tokenizer="byte")
    meta, val = meta_of(directory), held_out(directory)
    tokens = meta["train_tokens"] + meta["val_tokens"]
    assert meta["documents"] == count and 1 <= len(val) < count
    ranked = sorted(texts, key=prepare.hash_of)
    assert val == set(ranked[: len(val)])
    if tokens > 3 * prepare.WINDOW:
        assert meta["val_tokens"] > prepare.WINDOW
        assert meta["train_tokens"] >= 2 * prepare.WINDOW
        if count < 1000:  # not a document more than that takes
            assert meta["val_tokens"] <= prepare.WINDOW + 1 + max(map(len, texts))
    said = capsys.readouterr().out
    assert (f"held out: {len(val)} of {counted(count, 'document')}" in said) == (count < 1000)


def test_more_data_moves_no_document_to_training(here):
    """Unless it makes the share large enough; the documents that are held out are always the first
    ones by their hashes."""
    for size in (50, 100, 20_000):
        texts = documents(20_000)[:size]
        write("t.txt", EOT.join(texts))
        val = held_out(prepare.prepare("t.txt", tokenizer="byte"))
        assert val == set(sorted(texts, key=prepare.hash_of)[: len(val)])
    assert len(val) / 20_000 == pytest.approx(0.005, abs=0.002)


def test_what_is_held_out_is_the_same_for_all_workers_and_after_a_kill(here, monkeypatch):
    """A kill while the parts are made again with more held out."""
    monkeypatch.setattr(prepare, "BLOCK", 500)
    monkeypatch.setattr(prepare, "BLOCKS_PER_PART", 1)
    jsonl("t.jsonl", chats(200))
    made = []
    for workers in (1, 3):
        directory = prepare.prepare("t.jsonl", "byte", data_dir=f"data{workers}", workers=workers)
        made.append(files_of(directory))
    join, joined = prepare._join, []

    def killed(pieces, partial):
        joined.append(partial)
        if len(joined) == 2:
            raise KeyboardInterrupt
        join(pieces, partial)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "_join", killed)
        prepare.prepare("t.jsonl", "byte")
    monkeypatch.setattr(prepare, "_encode_part", lambda *args: pytest.fail("made again"))
    directory = prepare.prepare("t.jsonl", "byte")
    made.append(files_of(directory))
    assert made[0] == made[1] == made[2] and os.listdir("data") == ["t"]


@pytest.mark.parametrize("as_", ["prefs", "verify"])
def test_a_record_of_few_is_held_out(here, as_):
    record = dict(answer="7") if as_ == "verify" else dict(chosen="a", rejected="b")
    jsonl("t.jsonl", [dict(prompt=f"{i}?") | record for i in range(3)])
    meta = meta_of(prepare.prepare("t.jsonl", as_=as_))
    assert (meta["train_records"], meta["val_records"]) == (2, 1)


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz", "t.md.gz"])
def test_the_share_of_a_single_text(here, name):
    """A tenth, or val_fraction; of a compressed text too, which ends where the plain one does."""
    text = " ".join(documents(400))
    content = text.encode()
    write(name, gzip.compress(content) if name.endswith("gz") else content)
    for share in (None, 0.3):
        directory = prepare.prepare(name, tokenizer="byte", name=f"s{share}", val_fraction=share)
        cut = int((1 - (share or 0.1)) * len(text))
        assert bytes(ids_of(directory, "train").astype(np.uint8)).decode() == text[:cut]
        assert bytes(ids_of(directory, "val")[:-1].astype(np.uint8)).decode() == text[cut:]
        assert meta_of(directory)["val_fraction"] == (share or 0.1)
        assert meta_of(directory)["documents"] == 1


@pytest.mark.parametrize("length, val", [(300, 31), (1000, 258), (20_000, 2001)])
def test_a_short_single_text_holds_out_a_window(here, length, val):
    """Unless it leaves training less than two of them: then a tenth, as usual. A share that was
    asked for is taken as it is."""
    write("t.txt", "abcd" * (length // 4))
    found = meta_of(prepare.prepare("t.txt", tokenizer="byte"))["val_tokens"]
    assert val <= found <= val + 8
    directory = prepare.prepare("t.txt", tokenizer="byte", val_fraction=0.2)
    assert meta_of(directory)["val_tokens"] == length // 5 + 1


def test_the_own_split_of_a_source_is_kept_however_small(here, capsys):
    os.mkdir("set")
    write("set/train.txt", EOT.join(documents(300)))
    write("set/valid.txt", "held out")
    assert held_out(prepare.prepare("set", tokenizer="byte")) == {"held out"}
    assert "held out:" not in capsys.readouterr().out


def test_a_compressed_text_of_many_documents_is_read_as_it_is(here):
    texts = documents(300)
    write("t.txt.gz", gzip.compress(EOT.join(texts).encode()))
    write("p.txt", EOT.join(texts))
    packed, plain = (prepare.prepare(f, tokenizer="byte") for f in ("t.txt.gz", "p.txt"))
    assert held_out(packed) == held_out(plain) and os.listdir(packed) == os.listdir(plain)


# --- names, and what is replaced


def test_what_is_replaced_is_said_before_the_work(here, capsys, monkeypatch):
    """With the source and the size of what is there; nothing where it is the same again."""
    for folder, count in (("a", 100), ("b", 200)):
        os.mkdir(folder)
        write(f"{folder}/input.txt", EOT.join(documents(count)))
    prepare.prepare("a/input.txt", tokenizer="byte")
    prepare.prepare("a/input.txt", tokenizer="byte")
    assert "replaces" not in capsys.readouterr().out
    monkeypatch.setattr(prepare, "pack", lambda *args: pytest.fail("too late"))
    with pytest.raises(pytest.fail.Exception):
        prepare.prepare("b/input.txt", tokenizer="byte")
    said = "data/input replaces what was made there from a/input.txt (100 documents,"
    assert said in capsys.readouterr().out
    assert meta_of("data/input")["source"] == "a/input.txt"


@pytest.mark.parametrize(
    "source, name",
    [("toy.txt", ""), ("Toy.txt", ""), ("t.txt", "toy"), ("t.txt", "tinystories"), ("gsm8k", "")],
)
def test_a_known_name_is_not_taken_over(here, source, name):
    if "." not in source:
        os.mkdir(source)
        source += os.sep
        write(f"{source}t.txt", "text")
    else:
        write(source, "text")
    with pytest.raises(UserError, match="the name of a known data set.*--name="):
        prepare.prepare(source, name=name, tokenizer="byte")
    assert not os.path.exists("data")


@pytest.mark.parametrize(
    "source, name",
    [
        ("a b.txt", "a_b"),
        ("war & peace (1).txt", "war_peace_1"),
        ("Война и мир.txt", "Война_и_мир"),
        ("_x_.txt", "_x_"),
        ("a:0.5,b.txt", "a_0.5_b"),
    ],
)
def test_a_name_is_made_of_the_letters_of_the_file(here, source, name):
    write(source, EOT.join(documents(100)))
    assert prepare.prepare(source, tokenizer="byte") == os.path.join("data", name)
    with pytest.raises(UserError, match="--name=a b"):
        prepare.prepare(source, tokenizer="byte", name="a b")


def test_paths_as_a_shell_completes_them_are_names(here):
    """--dataset=data/x/ is x, in mixtures too; a path elsewhere leads there from data_dir."""
    os.makedirs("other/y")
    for dataset, names in (
        ("x", "x"),
        ("data/x", "x"),
        ("./data/x/", "x"),
        (os.path.abspath("data/x"), "x"),
        ("data/x/:0.25, data/y:0.75", "x:0.25,y:0.75"),
        ("web:0.87,code:0.13", "web:0.87,code:0.13"),
        ("other/y", "../other/y"),
    ):
        assert prepare.dataset_names(dataset, "data") == names
    assert prepare.dataset_names("drive/data/x", "drive/data") == "x"


def test_the_tokenizer_of_a_run_is_that_of_its_newest_checkpoint(here):
    write("t.txt", EOT.join(documents(100)))
    for step, size in ((10, 262), (20, 266)):
        directory = f"out/x/step_{step:06d}"
        prepare.train_bpe(documents(100), size, f"bpe:{size}").save(directory)
        write(f"{directory}/config.json", "{}")
    directory = prepare.prepare("t.txt", tokenizer="out/x")
    assert meta_of(directory)["vocab_size"] == 266
    shutil.rmtree("out/x/step_000020")
    assert prepare.load_tokenizer("out/x/").vocab_size == 262
    os.makedirs("out/none")
    with pytest.raises(UserError, match="out/none: this directory has no tokenizer.json"):
        prepare.prepare("t.txt", tokenizer="out/none")


# --- what is asked for and advised


def test_conversations_ask_for_the_tokenizer_of_their_model(here, monkeypatch, capsys):
    """On a terminal by a question, before any work; else by a line, and by the advice."""
    jsonl("c.jsonl", chats(50))
    prepare.prepare("c.jsonl", name="plain")
    said = capsys.readouterr().out
    asked, _, advice = said.partition("data/plain: chat")
    assert "--tokenizer=" in asked and "--tokenizer=MODEL" in advice
    prepare.train_bpe(documents(100), 300, "bpe:300").save("out/x/step_000010")
    write("out/x/step_000010/config.json", "{}")
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdin, "isatty", lambda: True)
        patch.setattr("builtins.input", lambda prompt: " out/x ")
        assert meta_of(prepare.prepare("c.jsonl"))["tokenizer"] == "bpe:300"
    said = capsys.readouterr().out
    assert "next: python train.py --stage=sft --init_from=out/x --dataset=c --out_dir=out/c" in said
    prepare.prepare("c.jsonl", tokenizer="out/x", name="again")
    assert "Without one" not in capsys.readouterr().out
    assert "--as=chat --name=c --tokenizer=MODEL" in prepare.how_to_prepare("data/c", "sft")
    said = prepare._next_command("data/c", "HuggingFaceTB/SmolLM2-135M")
    assert "--init_from=HuggingFaceTB/SmolLM2-135M --dataset=c" in said


def test_records_advise_a_model_and_need_no_tokenizer(here, capsys):
    jsonl("p.jsonl", [dict(prompt=f"{i}?", chosen="a", rejected="b") for i in range(9)])
    prepare.prepare("p.jsonl")
    said = capsys.readouterr().out
    assert "--stage=dpo --init_from=MODEL" in said and "the tokenizer of any model" in said
    assert "Without one" not in said


def test_the_run_that_comes_first_is_named_before_any_work(here):
    """Of two stages that are missing the one that was asked for needs; nothing is prepared."""
    for stage, first in (("toy_rlvr", "config/toy_dpo.py"), ("toy_sft", "train.py comes first")):
        done = subprocess.run(
            [sys.executable, os.path.join(ROOT, "train.py"), f"{ROOT}/config/{stage}.py"],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=here,
        )
        assert done.returncode == 1 and first in done.stderr and "comes first" in done.stderr
        assert len(done.stderr.splitlines()) == 1 and not os.path.exists("data")


@pytest.mark.parametrize(
    "reason", ["longer than block_size=8, so raise --block_size", "a prompt that is too long"]
)
def test_records_that_are_all_left_out_name_the_reason_alone(here, reason):
    """The data is not to blame, so it is not advised to prepare another."""
    jsonl("train.jsonl", chats(3))
    with pytest.raises(UserError) as e:
        prepare.Records(".", "train", lambda record: reason)
    assert str(e.value).endswith(f"nothing in it can be used: 3 {reason}")
    write("train.jsonl", "")
    with pytest.raises(UserError, match="it is empty; python prepare.py"):
        prepare.Records(".", "train", lambda record: reason)


def test_pairs_and_problems_say_which_key_to_change():
    tokenizer = prepare.with_chat_tokens(prepare.load_tokenizer("byte"))
    prompt = [dict(role="user", content="a long question" * 9)]
    pairs = types.SimpleNamespace(tokenizer=tokenizer, block_size=8)
    reason = prepare.Pairs.encode(pairs, dict(prompt=prompt, chosen="a", rejected="b"))
    assert "block_size=8" in reason and "raise --block_size" in reason
    problems = types.SimpleNamespace(tokenizer=tokenizer, longest=8, verifier="")
    reason = prepare.Problems.encode(problems, dict(prompt=prompt, answer="1"))
    assert "raise --block_size or lower --max_completion" in reason


def test_offline_a_local_file_works_too(here, monkeypatch):
    """Whichever way a known text would have come."""
    import huggingface_hub
    import requests

    def offline(*args, **options):
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "get", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", offline)
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("NANOSMOL_CACHE", str(here / "cache"))
    for name in ("shakespeare", "tinystories", "gsm8k"):
        with pytest.raises(UserError, match="a local file works too") as e:
            prepare.prepare(name)
        assert "\n" not in str(e.value)


def test_plurals(here, capsys):
    assert [counted(n, "record") for n in (0, 1, 1200)] == [
        "0 records",
        "1 record",
        "1,200 records",
    ]
    write("t.txt", "one text that is a single document. " * 9)
    prepare.prepare("t.txt", tokenizer="byte")
    jsonl("bad.jsonl", [dict(text=t) for t in documents(100)] + [3])
    prepare.prepare("bad.jsonl", tokenizer="byte")
    said = capsys.readouterr().out
    assert "1 document," in said and "left out: 1 record " in said
    assert "1 documents" not in said and "1 records" not in said
    lengths = np.array([1], "uint16")
    lengths.tofile("val.bin")
    with pytest.raises(UserError, match="1 token, too few for one window"):
        prepare.Bins(".", "val", 8)


def test_the_vocabulary_of_a_known_data_set_that_is_not_prepared(tmp_path, capsys):
    """--dry_run counts with what its tokenizer will have at most, not with GPT-2's 50,304 rows."""
    sizes = dict(toy=4096, toy_chat=4096, shakespeare=50257, gsm8k=49152, dclm=32000)
    for name, size in sizes.items():
        assert prepare.vocab_size_of(dict(dataset=name, data_dir=str(tmp_path))) == size
        said = capsys.readouterr().out
        assert f"{name} is not prepared yet: counted with {size:,} ids" in said
    for name in prepare.KNOWN:
        assert prepare.vocab_size_of(dict(dataset=name, data_dir=str(tmp_path))) > 100
