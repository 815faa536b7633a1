"""Sources as people have them: folders as cloned, empty rows, many shapes of records, files from
Windows. Each is read as what it is, and what is decided or left out is printed."""

import csv
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import prepare  # noqa: E402
from configurator import UserError  # noqa: E402
from prepare import EOT, as_chat, as_prefs, as_verify  # noqa: E402

STORIES = [
    f"Story {i}: the cat number {i * 7 % 100} sat on mat {i}.\nSo it did." for i in range(200)
]


def parquet(rows):
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=50)
    return out.getvalue()


def made(source, **options):
    """(meta.json, the documents of both splits as sorted texts) of a data set."""
    options = {"tokenizer": "byte", "val_fraction": 0.2, "name": "made"} | options
    directory = prepare.prepare(source, **options)
    meta = prepare.read_json(os.path.join(directory, "meta.json"))
    tokenizer, documents = prepare.load_tokenizer(directory), []
    for split in ("train", "val"):
        ids = np.fromfile(os.path.join(directory, f"{split}.bin"), meta["dtype"])
        documents += filter(None, tokenizer.decode(ids).split(EOT))
    return meta, sorted(documents)


def records_of(source, **options):
    directory = prepare.prepare(source, val_fraction=0.2, name="made", **options)
    found = []
    for split in ("train", "val"):
        with open(os.path.join(directory, f"{split}.jsonl"), encoding="utf-8") as f:
            found += map(json.loads, f)
    return prepare.read_json(os.path.join(directory, "meta.json")), found


def refused(said, source, **options):
    with pytest.raises(UserError, match=said) as e:
        prepare.prepare(source, **{"tokenizer": "byte", "name": "made", **options})
    assert "\n" not in str(e.value)


def say(role, content):
    return dict(role=role, content=content)


# --- folders


def test_a_folder_holds_data_of_one_kind(here, capsys):
    """As cloned from the Hub: a card, metadata and hidden folders beside the data are named or
    skipped, however large they are."""
    write("set/README.md", "# A card\n" * 5000)
    write("set/dataset_infos.json", json.dumps({"default": {}}))
    write("set/.git/big.txt", "hidden " * 5000)
    write("set/.cache.jsonl", [dict(text="hidden")] * 900)
    write("set/notes.txt", "a note")
    write("set/data/train-00000.parquet", parquet([dict(text=s, body="b" + s) for s in STORIES]))
    _, documents = made("set")
    assert documents == sorted(STORIES)
    said = capsys.readouterr().out
    assert (
        "set: reads its .parquet files; left out: README.md, dataset_infos.json, notes.txt" in said
    )
    assert "train-00000.parquet: read as text, from text" in said and ".git" not in said
    assert made("set", field="body")[1] == sorted("b" + s for s in STORIES)


def test_a_folder_of_chats_with_a_card(here):
    write("chats/README.md", "A card")
    write("chats/train.jsonl", [dict(prompt=f"{s}?", answer=s) for s in STORIES])
    assert made("chats", as_="chat")[0]["kind"] == "chat"
    assert records_of("chats", as_="verify")[0]["kind"] == "verify"


def test_a_folder_without_data(here):
    write("set/README.md", "A card")
    write("set/data.arrow", "x")
    refused("set: this folder holds no .*jsonl", "set")
    write("set/train.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    refused("train.parquet: a pointer of Git LFS; `git lfs pull`", "set")


def test_the_first_file_of_a_folder_may_be_empty(here):
    write("set/a.txt", "")
    write("set/b.txt", EOT.join(STORIES))
    assert made("set")[1] == sorted(STORIES)


def test_a_tokenizer_is_trained_on_the_data_of_a_folder(here, monkeypatch, capsys):
    """The card alone was taken, and the parquet file beside it ignored, without a word."""
    seen = []

    def train_bpe(texts, *args):
        seen.extend(texts)
        return prepare.load_tokenizer("byte")

    monkeypatch.setattr(prepare, "train_bpe", train_bpe)
    write("set/README.md", "A card\r\n")
    write("set/data/train.parquet", parquet([dict(body=s) for s in STORIES]))
    options = dict(name="tok", data_dir="data", as_="", vocab_size=300, min_frequency=2)
    prepare.make_tokenizer_only(["set"], field="body", keep_crlf=False, **options)
    assert seen == STORIES and "left out: README.md" in capsys.readouterr().out


# --- rows that hold nothing, fields that are null


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json"])
def test_empty_rows_are_skipped_and_counted(here, capsys, name):
    """Wikitext's rows are empty strings to a third; other columns are null in most rows."""
    rows = [dict(id=i, text=s) for i, s in enumerate(STORIES)]
    rows = (
        [dict(id=-1, text=None)] * 300
        + rows
        + [dict(id=-1, text="")] * 99
        + [dict(id=1, text=" \n")]
    )
    content = parquet(rows) if name == "a.parquet" else rows
    write(name, json.dumps(rows, indent=1) if name == "a.json" else content)
    meta, documents = made(name)
    assert documents == sorted(STORIES) and meta["left_out"] == 400
    assert "left out: 400 records empty" in capsys.readouterr().out


def test_a_source_of_empty_rows_only(here, capsys):
    write("a.jsonl", [dict(text="")] * 60)
    refused("a.jsonl: nothing in it could be used", "a.jsonl")
    assert "left out: 60 records empty" in capsys.readouterr().out


def test_how_many_records_may_be_unusable(here):
    """5%, or as many as max_unusable says; a wrong record is not an empty one."""
    rows = [dict(text=s) for s in STORIES] + [dict(other="no text")] * 100
    write("a.jsonl", rows)
    refused(r"100 of the first 300 .*--max_unusable=0.05.*line 201: no field 'text'", "a.jsonl")
    assert made("a.jsonl", max_unusable=0.4)[0]["left_out"] == 100
    write("b.jsonl", rows[190:])
    assert made("b.jsonl", max_unusable=1.0)[0]["documents"] == 10
    refused("--max_unusable=1.1", "b.jsonl", max_unusable=1.1)


def test_null_is_absent(here):
    """A table of several sources has all of their columns, and null where a source has none."""
    rows = []
    for s in STORIES[:50]:
        theirs = {"role": None, "content": None, "from": "human", "value": s}
        answer = {"role": None, "content": None, "from": "gpt", "value": "Yes. " + s}
        ours = {"role": "user", "content": s, "from": None, "value": None}
        reply = {"role": "assistant", "content": "No. " + s, "from": None, "value": None}
        rows.append(dict(messages=None, conversations=[theirs, answer], prompt=None))
        rows.append(dict(messages=[ours, reply], conversations=[], prompt=None))
    write("a.parquet", parquet(rows))
    meta, documents = made("a.parquet")
    assert meta["documents"] == 100 and meta["left_out"] == 0
    assert (
        sum("Yes. Story" in d for d in documents) == sum("No. Story" in d for d in documents) == 50
    )
    write(
        "b.jsonl",
        [dict(text=s, content=None) for s in STORIES] + [dict(content="c" + s) for s in STORIES],
    )
    assert made("b.jsonl")[1] == sorted(STORIES + ["c" + s for s in STORIES])
    write(
        "c.parquet",
        parquet([dict(text=None, content=s) for s in STORIES] + [dict(text="t", content="c")]),
    )
    assert made("c.parquet")[1] == sorted([*STORIES, "t"])
    refused("no field 'title' in text, content", "c.parquet", field="title")


# --- the shapes of records

CHAT = [say("user", "Hi?"), say("assistant", "Hello.")]
WITH_SYSTEM = [say("system", "Be kind."), *CHAT]
PARTS = [dict(type="text", text="Hi?")]
CALL = dict(id="1", type="function", function=dict(name="f", arguments="{}"))
CHATS = {
    "messages": (dict(messages=CHAT), CHAT),
    "conversation": (dict(conversation=CHAT), CHAT),
    "sharegpt": (
        dict(conversations=[{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]),
        CHAT,
    ),
    "turns": (dict(conversation=[dict(human="Hi?", assistant="Hello.")]), CHAT),
    "turns with a system": (
        dict(conversation=[dict(system="Be kind.", input="Hi?", output="Hello.")]),
        WITH_SYSTEM,
    ),
    "null turns": (dict(conversation=[dict(system=None, input="Hi?", output="Hello.")]), CHAT),
    "system beside": (dict(system="Be kind.", conversations=CHAT), WITH_SYSTEM),
    "empty system": (dict(messages=[say("system", ""), *CHAT]), CHAT),
    "developer": (dict(messages=[say("developer", "Be kind."), *CHAT]), WITH_SYSTEM),
    "alpaca": (dict(instruction="Hi?", input="", output="Hello."), CHAT),
    "alpaca input": (
        dict(instruction="Add.", input="1 2", output="3"),
        [say("user", "Add.\n\n1 2"), say("assistant", "3")],
    ),
    "dolly": (
        dict(instruction="Add.", context="1 2", response="3", category="sum"),
        [say("user", "Add.\n\n1 2"), say("assistant", "3")],
    ),
    "openorca": (dict(system_prompt="Be kind.", question="Hi?", response="Hello."), WITH_SYSTEM),
    "completion": (dict(prompt="Hi?", completion="Hello."), CHAT),
    "completion of messages": (dict(prompt=CHAT[:1], completion=CHAT[1:]), CHAT),
    "response": (dict(prompt="Hi?", response="Hello."), CHAT),
    "input and output": (dict(input="Hi?", output="Hello."), CHAT),
    "parts": (dict(messages=[say("user", PARTS), CHAT[1]]), CHAT),
    "two parts": (
        dict(messages=[say("user", [*PARTS, *PARTS]), CHAT[1]]),
        [say("user", "Hi?\nHi?"), CHAT[1]],
    ),
    "assistant first": (
        dict(messages=[say("assistant", "Welcome."), *CHAT]),
        [say("assistant", "Welcome."), *CHAT],
    ),
    "no tool calls": (dict(messages=[CHAT[0], dict(CHAT[1], tool_calls=None)], tools="[]"), CHAT),
    "tool calls": (
        dict(messages=[CHAT[0], dict(role="assistant", content=None, tool_calls=[CALL])]),
        prepare.TOOLS,
    ),
    "tool results": (dict(messages=[*CHAT, say("tool", "7")]), prepare.TOOLS),
    "image": (dict(messages=[say("user", [dict(type="image_url")]), CHAT[1]]), prepare.NOT_TEXT),
    "empty answer": (dict(instruction="Hi?", output=" "), prepare.EMPTY),
    "null message list": (dict(messages=None), prepare.EMPTY),
    "answer a number": (
        dict(prompt="Hi?", answer=7),
        "'answer' holds 7; expected a text or a list of messages",
    ),
    "a list of texts": (
        dict(messages=["Hi?", "Hello."]),
        'a message of \'messages\' holds "Hi?"; expected {"role": ..., "content": ...}',
    ),
    "a message without content": (
        dict(messages=[dict(role="user")]),
        'a message of \'messages\' holds {"role": "user"}; expected {"role": ..., "content": ...}',
    ),
    "a text": (dict(messages="Hi?"), "'messages' holds \"Hi?\"; expected a list of messages"),
    "nobody answers": (
        dict(messages=CHAT[:1]),
        "its roles are user; expected a user and an assistant",
    ),
}


def result(read, record):
    """What a record is read as, or the reason why it is not."""
    try:
        return read(record)
    except ValueError as e:
        return str(e)


@pytest.mark.parametrize("name", CHATS)
def test_conversations(name):
    record, wanted = CHATS[name]
    assert result(as_chat, record) == wanted


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_shapes_are_recognized_and_the_first_record_is_shown(here, capsys, ending):
    rows = [dict(instruction=f"Say {s}", input="", output=s) for s in STORIES]
    write(
        "a" + ending,
        dict(zip([".jsonl", ".json", ".parquet"], [rows, json.dumps(rows), parquet(rows)]))[ending],
    )
    meta, documents = made("a" + ending)
    assert meta["kind"] == "chat" and meta["documents"] == 200
    assert (
        f"<|im_start|>user\nSay {STORIES[0]}<|im_end|>\n<|im_start|>assistant\n{STORIES[0]}<|im_end|>\n"
        in documents
    )
    said = capsys.readouterr().out
    assert f"a{ending}: read as chat, from instruction, output" in said
    assert (
        "    <|im_start|>assistant\n    [[Story 0: the cat number 0 sat on mat 0.\n    So it did.<|im_end|>]]"
        in said
    )


def test_tool_calls_are_left_out_whatever_their_number(here, capsys):
    calls = dict(
        messages=[CHAT[0], dict(role="assistant", tool_calls=[CALL]), say("tool", "7"), CHAT[1]]
    )
    write("a.jsonl", [calls] * 300 + [dict(messages=[say("user", s), CHAT[1]]) for s in STORIES])
    meta, _ = made("a.jsonl")
    assert meta["documents"] == 200 and meta["left_out"] == 300
    assert "left out: 300 records with tool calls" in capsys.readouterr().out


TURN = [say("user", "Name a river."), say("assistant", "The Rhine."), say("user", "Another?")]
GOOD, BAD = say("assistant", "The Po."), say("assistant", "No.")
HH = "\n\nHuman: Name a river.\n\nAssistant: The Rhine.\n\nHuman: Another?\n\nAssistant:"
PAIR = dict(prompt=TURN, chosen="The Po.", rejected="No.")
PAIRS = {
    "texts": (
        dict(prompt="Another?", chosen="The Po.", rejected="No."),
        dict(PAIR, prompt=TURN[2:]),
    ),
    "no dialogue": (
        dict(PAIR, prompt="Human: is it?"),
        dict(PAIR, prompt=[say("user", "Human: is it?")]),
    ),
    "implicit": (dict(chosen=[*TURN, GOOD], rejected=[*TURN, BAD]), PAIR),
    "last message as prompt": (
        dict(prompt="Another?", chosen=[*TURN, GOOD], rejected=[*TURN, BAD]),
        PAIR,
    ),
    "whole prompt": (dict(prompt=TURN, chosen=[GOOD], rejected=[BAD]), PAIR),
    "whole prompt repeated": (dict(prompt=TURN, chosen=[*TURN, GOOD], rejected=[BAD]), PAIR),
    "system in the prompt": (
        dict(prompt=[say("system", "S"), *TURN], chosen=[*TURN, GOOD], rejected=[*TURN, BAD]),
        dict(PAIR, prompt=[say("system", "S"), *TURN]),
    ),
    "system beside": (
        dict(system="S", prompt="Another?", chosen=[*TURN, GOOD], rejected=[*TURN, BAD]),
        dict(PAIR, prompt=[say("system", "S"), *TURN]),
    ),
    "HH": (dict(chosen=HH + " The Po.", rejected=HH + " No."), PAIR),
    "HH prompt": (
        dict(prompt=HH, chosen=" The Po.", rejected=" No."),
        dict(PAIR, chosen=" The Po.", rejected=" No."),
    ),
    "empty chosen": (dict(prompt="Hi?", chosen="  ", rejected="No."), prepare.EMPTY),
    "empty rejected": (
        dict(chosen=[*TURN, GOOD], rejected=[*TURN, say("assistant", "")]),
        prepare.EMPTY,
    ),
    "null": (dict(prompt="Hi?", chosen=None, rejected="No."), prepare.EMPTY),
    "earlier difference": (
        dict(chosen=[*TURN, GOOD], rejected=[TURN[0], BAD, TURN[2], BAD]),
        "chosen and rejected differ before their last message",
    ),
    "same": (dict(PAIR, rejected="The Po."), "chosen and rejected are the same"),
    "number": (
        dict(PAIR, chosen=5),
        "'chosen' holds 5; expected a text or a list of messages",
    ),
    "no prompt": (
        dict(chosen="The Po.", rejected="No."),
        "its roles are assistant; expected a user and an assistant",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_preferences(name):
    """The common prefix of chosen and rejected is the prompt; an empty answer is no answer."""
    record, wanted = PAIRS[name]
    assert result(as_prefs, record) == wanted


def test_pairs_of_several_turns_stay_apart(here, capsys):
    """Earlier turns were lost: 40 different conversations became one."""
    rows = []
    for s in STORIES:
        before = [say("user", s), say("assistant", "Yes."), say("user", "And then?")]
        rows.append(dict(prompt="And then?", chosen=[*before, GOOD], rejected=[*before, BAD]))
    write("a.jsonl", rows)
    _, found = records_of("a.jsonl")
    assert sorted(r["prompt"][0]["content"] for r in found) == sorted(STORIES)
    said = capsys.readouterr().out
    assert "read as prefs, from prompt, chosen, rejected; --as=chat would do too" in said
    assert "[[The Po.<|im_end|>]]" in said and "rejected: [[No.]]" in said and "[[Yes." not in said


def test_only_the_answer_of_a_pair_is_trained_on():
    """The prompt's earlier answers are no part of the preference."""
    tokenizer = prepare.with_chat_tokens(prepare.load_tokenizer("byte"))
    ids, mask = prepare.render_chat([*TURN, GOOD], tokenizer, last_only=True)
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == "The Po.<|im_end|>"
    ids, mask = prepare.render_chat([*TURN, GOOD], tokenizer)
    assert (
        tokenizer.decode([i for i, m in zip(ids, mask) if m])
        == "The Rhine.<|im_end|>The Po.<|im_end|>"
    )


@pytest.mark.parametrize(
    "answer, wanted",
    [
        (7, "7"),
        (1e-05, "0.00001"),
        ("x", "x"),
        ("", prepare.EMPTY),
        (["7"], "'answer' holds [\"7\"]; expected a text or a number"),
        ({"n": 7}, "'answer' holds {\"n\": 7}; expected a text or a number"),
    ],
)
def test_answers_of_problems(answer, wanted):
    found = result(as_verify, dict(problem="Six and one?", answer=answer))
    assert (found["answer"] if isinstance(found, dict) else found) == wanted


def test_a_json_array_is_read_as_its_records(here, monkeypatch, capsys):
    """The same bytes as lines make, with any number of workers; refused above a stated size."""
    rows = [dict(text=s + " ☃") for s in STORIES]
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    write("a.jsonl", rows)
    wanted = made("a.jsonl")[1]
    array = "\ufeff \n" + json.dumps(rows, indent=2, ensure_ascii=False)
    write("b.json", array)
    write("c.json.gz", gzip.compress(array.encode()))
    for name in ("b.json", "c.json.gz"):
        assert made(name, workers=1)[1] == made(name, workers=3)[1] == wanted
    rows[7] = dict(text=7)
    write("d.json", json.dumps(rows, indent=2))
    assert made("d.json")[0]["left_out"] == 1
    assert (
        "(for example d.json, record 8: 'text' holds 7; expected a text)" in capsys.readouterr().out
    )
    write("e.json", "[1, 2")
    refused("e.json: begins like a JSON array and cannot be read", "e.json")
    write("f.json", json.dumps(dict(data=rows), indent=2))
    refused("f.json, line 1: not a JSON object.*array of objects", "f.json")
    monkeypatch.setattr(prepare, "LONGEST_ARRAY", 1 << 10)
    refused("b.json: a JSON array of more than .*jq -c", "b.json", name="other")


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import prepare
prepare.BLOCK, prepare.BLOCKS_PER_PART = 1000, 2
parts, write = 0, prepare.write_json
def counted(path, value, **options):
    global parts
    write(path, value, **options)
    parts += os.path.basename(path).startswith("part-")
    if parts == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
prepare.write_json = counted
for source in ("a.json", "crlf.txt"):
    prepare.prepare(source, tokenizer="byte", data_dir={data!r}, val_fraction=0.2, workers=2)
"""


def test_arrays_and_crlf_go_on_after_a_kill(here):
    write("a.json", json.dumps([dict(text=s) for s in STORIES]))
    write("crlf.txt", "\r\n".join(STORIES))

    def run(data, after):
        code = KILLED.format(root=ROOT, data=data, after=after)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert run("whole", -1).returncode == 0
    assert run("data", 3).returncode == run("data", 6).returncode == -signal.SIGKILL
    last = run("data", -1)
    assert last.returncode == 0, last.stderr
    for path in ("a/train.bin", "a/val.bin", "crlf/train.bin", "crlf/val.bin"):
        with open(f"data/{path}", "rb") as a, open(f"whole/{path}", "rb") as b:
            assert a.read() == b.read()


# --- from Windows


def test_crlf_becomes_lf(here, monkeypatch, capsys):
    """In one text as in many documents, compressed, and in the text of records: the bytes that the
    same text with LF gives, in blocks of any size."""
    monkeypatch.setattr(prepare, "BLOCK", 1001)
    text = "\n".join(STORIES)
    sources = {
        "one.txt": text,
        "docs.txt": EOT.join(STORIES),
        "nospace.txt": "GATTACA\n" * 2000,
        "docs.txt.gz": EOT.join(STORIES),
        "rows.parquet": None,
    }
    for name, content in sources.items():
        found = []
        for end in ("\n", "\r\n"):
            if content is None:
                data = parquet([dict(text=s.replace("\n", end)) for s in STORIES])
            else:
                data = content.replace("\n", end).encode()
            write(name, gzip.compress(data) if name.endswith(".gz") else data)
            meta, documents = made(name, tokenizer="char")
            found.append((meta["train_tokens"], meta["val_tokens"], meta["vocab_size"], documents))
        assert found[0] == found[1] and "\r" not in str(found[1])
        assert re.search(r"CRLF: [\d,]+ line ends became LF; --keep_crlf", capsys.readouterr().out)
        assert "\r\n" in "".join(made(name, keep_crlf=True)[1])
        assert "CRLF" not in capsys.readouterr().out


FRENCH = "La forêt était très âgée, dit l’élève. " * 100
NOT_UTF8 = {
    "utf-16": ("".join(STORIES).encode("utf-16"), "utf-16"),
    "utf-16 without a mark": ("".join(STORIES).encode("utf-16-le"), "utf-16le"),
    "big endian": ("".join(STORIES).encode("utf-16-be"), "utf-16be"),
    "cp1252": (FRENCH.encode("cp1252"), "cp1252"),
    "latin-1": (FRENCH.replace("’", "'").encode("latin-1"), "cp1252"),
    "one letter": (("plain words " * 50 + "café").encode("latin-1"), "cp1252"),
    "late": (("plain words\n" * 20000 + FRENCH).encode("cp1252"), "cp1252"),
    "cyrillic": ("Жили-были старик со старухой. ".encode("cp1251") * 99, "ENCODING"),
}


@pytest.mark.parametrize("name", NOT_UTF8)
def test_other_encodings_are_named(here, name):
    """With the line that converts them, before a tokenizer is trained; not thousands of U+FFFD."""
    content, encoding = NOT_UTF8[name]
    write("a.txt", content)
    command = rf"iconv -f {encoding} -t utf-8 a.txt > a-utf8.txt"
    refused(f"a.txt: not UTF-8.*{command}", "a.txt", tokenizer="bpe:300")
    write("b.txt.gz", gzip.compress(content))
    refused("b.txt.gz: not UTF-8.*decompress", "b.txt.gz")


def test_records_in_other_encodings(here):
    rows = "".join(json.dumps(dict(text=f"{s} était"), ensure_ascii=False) + "\n" for s in STORIES)
    for encoding, named in (("utf-16", "utf-16"), ("cp1252", "cp1252"), ("utf-16-le", "utf-16le")):
        write("a.jsonl", rows.encode(encoding))
        refused(f"a.jsonl: not UTF-8.*iconv -f {named} ", "a.jsonl")
    write("a.jsonl", rows.encode("utf-8-sig"))
    assert made("a.jsonl")[0]["documents"] == 200


def test_broken_characters_and_zero_bytes_are_alike_wherever_they_stand(here, capsys):
    """A zero byte ended the work within the first 64 kB and was kept behind them."""
    text = ("Words — " * 20_000).encode()
    for place in (10, 150_002):  # in front of a word
        for byte in (b"\0", b"\xff"):
            write("a.txt", text[:place] + byte + text[place:])
            meta, documents = made("a.txt")
            assert meta["replaced_characters"] == 1 and "".join(documents).count("\ufffd") == 1
            assert f"a.txt, byte {place}: not UTF-8" in capsys.readouterr().out


def test_a_field_of_a_plain_text_is_refused(here):
    write("a.txt", "words")
    refused("a.txt: --field=body wants records", "a.txt", field="body")


def test_reasons_name_the_field_and_what_it_holds(here, capsys):
    """No error of Python's own stands in for a reason."""
    write(
        "a.jsonl",
        "".join(json.dumps(dict(text=s)) + "\n" for s in STORIES)
        + '{"text": 7}\n[1]\n{"text": "cut\n',
    )
    assert made("a.jsonl")[0]["left_out"] == 3
    said = capsys.readouterr().out
    assert "line 201: 'text' holds 7; expected a text" in said
    assert "line 202: it holds [1]; expected a JSON object" in said
    assert "line 203: not JSON: Unterminated string" in said


def test_a_spreadsheet_is_read_by_its_columns(here, capsys):
    """CSV and TSV: quoted line ends and separators, Excel's mark, semicolons and CRLF; the ids and
    masks are those of the same records as JSON lines."""
    texts = [f'Row {i}, "quoted";\r\nsecond line' for i in range(3000)]
    for name, delimiter, encoding in (("a.csv", ";", "utf-8-sig"), ("b.tsv", "\t", "utf-8")):
        with open(name, "w", newline="", encoding=encoding) as f:
            csv.writer(f, delimiter=delimiter).writerows([("id", "text"), *enumerate(texts)])
    with open("c.jsonl", "w") as f:
        f.writelines(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    made = [prepare.prepare(f, tokenizer="byte") for f in ("a.csv", "b.tsv", "c.jsonl")]
    for split in ("train", "val"):
        a, b, c = (Path(directory, f"{split}.bin").read_bytes() for directory in made)
        assert a == b == c and len(c) > 100
    with open("chat.csv", "w", newline="") as f:
        rows = [(f"Add {i}", "" if i % 2 else "and 1", f"{i}!") for i in range(50)]
        csv.writer(f).writerows([("instruction", "input", "output"), *rows])
    prepare.prepare("chat.csv", tokenizer="byte")
    said = capsys.readouterr().out
    assert (
        "chat.csv: read as chat, from instruction, output" in said and "Add 0\n\n    and 1" in said
    )


def test_a_spreadsheet_that_cannot_be_read(here):
    """It is refused in one line that names the line or the columns."""
    for content, reason in (
        ("a,text\n1,2\n3\n", r"near line 3: a row of 1 cell \(3\) below 2 columns"),
        ("title,body\nq,w\n", "no field 'text' in title, body"),
        ("", "empty"),
    ):
        Path("bad.csv").write_text(content)
        with pytest.raises(prepare.UserError, match=reason):
            prepare.prepare("bad.csv", tokenizer="byte")


def test_messages_as_a_json_text_and_answers_labelled_false(here, capsys):
    """A cell may hold a conversation as JSON; KTO marks bad answers, which nothing is to learn."""
    turns = [dict(role="user", content="q"), dict(role="assistant", content="a")]
    assert as_chat(dict(messages=json.dumps(turns))) == turns
    with pytest.raises(ValueError, match="a list of messages"):
        as_chat(dict(messages="[not JSON"))
    rows = [dict(prompt=f"q{i}", completion=f"a{i}", label=bool(i % 2)) for i in range(80)]
    write("kto.jsonl", rows)
    prepare.prepare("kto.jsonl", tokenizer="byte")
    assert "left out: 40 records with an answer labelled false" in capsys.readouterr().out


def test_archives_and_documents_are_named(here):
    for name, begin, what in (
        ("a.zip", b"PK\x03\x04", "a zip archive or an Office document"),
        ("a.docx", b"PK\x03\x04", "a zip archive or an Office document"),
        ("a.pdf", b"%PDF-1.7", "a PDF"),
        ("a.txt", b"\x1f\x8b\x08", "compressed by gzip"),
        ("a.jsonl", b"PAR1", "a parquet file"),
    ):
        write(name, begin + bytes(range(1, 200)) * 9)
        with pytest.raises(UserError, match=f"{name}: {what}.*unpack it"):
            prepare.prepare(name, tokenizer="byte")


def test_a_folder_with_the_name_of_a_known_data_set(here, capsys):
    os.mkdir("toy_sums")
    prepare.prepare("toy_sums")
    assert "toy_sums is the known data set; ./toy_sums would be" in capsys.readouterr().out
