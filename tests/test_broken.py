"""Inputs that were read as something else than they are, ended in a traceback, or got advice that
does not help."""

import decimal
import gzip
import io
import json
import os
import pickle
import re
import runpy
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, write

import prepare
from configurator import UserError
from prepare import EOT, as_chat, as_prefs, as_verify

LINES = [f"The cat number {i} sat on the mat, and was glad.\n" for i in range(60)]
CHINESE = "猫坐在垫子上，非常高兴。今天天气很好。\n" * 40
RUSSIAN = "Кошка сидела на коврике и была счастлива сегодня.\n" * 40


def parquet(**columns):
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def made(source, **options):
    """(meta.json, all text of both splits, with [[ ]] where the loss counts)."""
    directory = prepare.prepare(source, **{"tokenizer": "byte", "name": "made", **options})
    meta = prepare.read_json(os.path.join(directory, "meta.json"))
    tokenizer, text = prepare.load_tokenizer(directory), ""
    for split in ("train", "val"):
        ids = np.fromfile(os.path.join(directory, f"{split}.bin"), meta["dtype"])
        path = os.path.join(directory, f"{split}.mask")
        mask = np.fromfile(path, np.uint8) if os.path.exists(path) else np.zeros(len(ids), np.uint8)
        for begin in np.flatnonzero(np.diff(mask, prepend=2)):
            end = begin + int(np.argmax(np.append(mask[begin:], 2) != mask[begin]))
            part = tokenizer.decode(ids[begin:end])
            text += f"[[{part}]]" if mask[begin] else part
    return meta, text


def records_of(source, **options):
    directory = prepare.prepare(source, name="made", **options)
    found = []
    for split in ("train", "val"):
        with open(os.path.join(directory, f"{split}.jsonl"), encoding="utf-8") as f:
            found += map(json.loads, f)
    return found


def refused(said, source, **options):
    with pytest.raises(UserError, match=said) as e:
        prepare.prepare(source, **{"tokenizer": "byte", "name": "made", **options})
    assert "\n" not in str(e.value)


# --- encodings

NOT_UTF8 = {
    "utf-32 with its mark": ("".join(LINES).encode("utf-32"), "not UTF-8 but utf-32;"),
    "utf-32": ("".join(LINES).encode("utf-32-le"), "iconv -f utf-32le "),
    "utf-32, big endian": ("".join(LINES).encode("utf-32-be"), "iconv -f utf-32be "),
    "chinese utf-16": (CHINESE.encode("utf-16-le"), "iconv -f utf-16le "),
    "chinese utf-16, big endian": (CHINESE.encode("utf-16-be"), "iconv -f utf-16be "),
    "russian utf-16": (RUSSIAN.encode("utf-16-le"), "iconv -f utf-16le "),
    "utf-16 with emoji": (("😀 hi\n" * 100).encode("utf-16-le"), "iconv -f utf-16le "),
    "russian among english": (("".join(LINES * 3) + RUSSIAN).encode("cp1251"), "not recognized"),
    "numpy": (b"\x93NUMPY\x01\0" + b"\0\1" * 100, "binary data"),
    "sqlite": (b"SQLite format 3\0" + b"\0\1" * 500, "binary data"),
    "program": (b"\x7fELF\2\1\1\0" + bytes(range(256)) * 20, "binary data"),
}


@pytest.mark.parametrize("name", NOT_UTF8)
def test_wide_encodings_and_binary_data_are_named(here, name):
    """UTF-32 was called UTF-16 or became U+FFFD, Russian UTF-16 too; Chinese UTF-16 was called
    cp1252, and binary data got a line of iconv that can't convert it."""
    content, said = NOT_UTF8[name]
    write("a.txt", content)
    refused(said, "a.txt")


def test_utf8_with_some_zero_bytes_stays_utf8(here):
    text = "".join(LINES).encode()
    for zeros in (b"\0", b"\0" * 300, b"a\0" * 20):
        write("a.txt", text[:100] + zeros + text[100:])
        assert made("a.txt")[0]["replaced_characters"] == zeros.count(0)


def test_the_line_that_converts_can_be_pasted_into_a_shell(here):
    write("it's.txt", "".join(LINES).encode("utf-16"))
    with pytest.raises(UserError) as e:
        prepare.prepare("it's.txt", tokenizer="byte", name="made")
    command = str(e.value).partition("convert it: ")[2]
    assert os.system(command) == 0
    with open("it's-utf8.txt", encoding="utf-8") as f:
        assert f.read() == "".join(LINES)


# --- line ends and zero bytes, wherever they stand


def test_a_lone_carriage_return_ends_a_line(here, capsys):
    """As in Python's own text files, and so in nanoGPT's data. It was a token of its own."""
    write("a.txt", "".join(LINES).replace("\n", "\r"))
    assert made("a.txt")[1].replace(EOT, "") == "".join(LINES)
    assert "CR: 60 line ends became LF; --keep_crlf" in capsys.readouterr().out
    assert "\r" in made("a.txt", keep_crlf=True, name="kept")[1]


def test_texts_inside_records_are_cleaned_too(here, capsys):
    """Zero bytes escaped in JSON or in a column, and CRLF in chats, were kept without a word."""
    write("a.jsonl", [dict(text=f"a\0b {i}\r\nc") for i in range(5)])
    meta, text = made("a.jsonl")
    assert meta["replaced_characters"] == 5 and "a\ufffdb 0\nc" in text
    write("a.parquet", parquet(text=[f"a\0b {i}" for i in range(5)]))
    assert made("a.parquet")[0]["replaced_characters"] == 5
    chat = [dict(prompt=f"one\r\ntwo {i}", completion="yes\r\nno\0") for i in range(5)]
    write("c.jsonl", chat)
    assert "one\ntwo 0<|im_end|>\n<|im_start|>assistant\n[[yes\nno\ufffd<" in made("c.jsonl")[1]
    assert "CRLF: 10 line ends became LF" in capsys.readouterr().out


# --- cells of tables


def test_cells_that_python_can_not_hold(here, capsys):
    """A date beyond the year 9999 in another column, or a text that is not UTF-8: a traceback."""
    import pyarrow as pa

    texts, dates = [f"row {i}" for i in range(9)], pa.array([2**61] * 9, pa.timestamp("us"))
    write("a.parquet", parquet(text=texts, date=dates))
    assert made("a.parquet")[0]["documents"] == 9
    write("v.parquet", parquet(question=texts, answer=texts, date=dates))
    assert {key for record in records_of("v.parquet", as_="verify") for key in record} == {
        "prompt",
        "answer",
    }
    offsets = pa.py_buffer(np.array([0, 3, 6, 9], np.int32).tobytes())
    broken = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"ab\xffcdefgh")])
    write("b.parquet", parquet(text=broken))
    made("b.parquet")
    said = r"b.parquet, row 1: 'text' holds .*can't decode.*; expected a text"
    assert re.search(said, capsys.readouterr().out)


def test_answers_that_are_decimals():
    """They were refused as '"1.50"; expected a text or a number'."""
    assert as_verify(dict(question="q", answer=decimal.Decimal("1.50")))["answer"] == "1.50"
    assert as_verify(dict(question="q", answer=decimal.Decimal("1E+2")))["answer"] == "100"


def test_a_table_that_begins_with_empty_lines(here):
    write("a.csv", "\n\ntext;label\nhello, you;1\nbye;2\n")
    assert made("a.csv")[0]["documents"] == 2
    write("b.csv", 'text,l\n"unclosed,3\nmore\n')
    refused(r"b.csv: .* a row of 1 cell \(unclosed,3 more\) below 2 columns", "b.csv")


# --- folders


def test_what_a_folder_leaves_out_or_puts_together_is_printed(here, capsys):
    """Test files beside validation files vanished, and two configs became one data set."""
    for config in ("en", "fr"):
        for split in ("train", "validation", "test"):
            rows = [dict(text=f"{config} {split} {i}") for i in range(5)]
            write(f"f/{config}/{split}-0.jsonl", rows)
    text, said = made("f")[1], capsys.readouterr().out
    assert "en train 0" in text and "fr train 0" in text and "test" not in text
    assert "f: one data set of its folders en, fr" in said
    validation = "validation data, without a use for val_fraction: en/validation-0.jsonl, fr/valid"
    assert validation in said and "; left out: en/test-0.jsonl, fr/test-0.jsonl\n" in said
    for split in ("train", "val"):  # these are no configs
        write(f"g/{split}/a.jsonl", [dict(text=f"{split} {i}") for i in range(5)])
    made("g")
    assert "one data set" not in capsys.readouterr().out


def test_keys_that_have_no_use_are_refused(here):
    """--split=train of a folder took its test files for validation, without a word."""
    write("f/train.jsonl", [dict(text=f"row {i}") for i in range(5)])
    refused("--split=train chooses files of hub:.*; of the local f name", "f", split="train")
    refused("--config=en chooses files of hub:.*; of the local f name", "f", config="en")
    refused("own/er: no such file .* did you mean hub:own/er", "own/er", name="")


# --- records


def test_messages_that_are_not_to_be_trained_on(here):
    """OpenAI's weight and axolotl's train were ignored: what a teacher marked as bad was learned."""
    for mark in (dict(weight=0), dict(train=False)):
        bad = dict(role="assistant", content="bad", **mark)
        good = dict(role="assistant", content="good")
        rows = [dict(messages=[_user(f"q{i}"), bad, _user("more"), good]) for i in range(5)]
        write("c.jsonl", [*rows, dict(messages=[_user("q"), bad])])
        meta, text = made("c.jsonl")
        assert meta["left_out"] == 1  # the last: nothing could be learned from it
        assert text.count("[[good<|im_end|>]]") == 5 and "assistant\nbad<|im_end|>" in text


def _user(content):
    return dict(role="user", content=content)


def _assistant(content):
    return dict(role="assistant", content=content)


def test_all_parts_of_a_prompt_are_read():
    """The question beside an instruction, and the earlier turns of a history, were left out."""
    record = dict(instruction="Be brief.", question="Why?", answer="So.")
    assert as_chat(record) == [_user("Be brief.\n\nWhy?"), _assistant("So.")]
    assert as_verify(record)["prompt"] == [_user("Be brief.\n\nWhy?")]
    history = dict(instruction="And?", input="", output="So.", history=[["Hi", "Yes"]])
    assert as_chat(history) == [_user("Hi"), _assistant("Yes"), _user("And?"), _assistant("So.")]
    assert as_chat(history | dict(history=[_user("Hi"), _assistant("Yes")])) == as_chat(history)
    with pytest.raises(ValueError, match="a message of 'history' holds .*expected"):
        as_chat(history | dict(history=["Hi", "Yes"]))
    with pytest.raises(ValueError, match="'input' holds 5; expected a text"):
        as_chat(history | dict(input=5))


def test_records_of_too_many_levels_are_left_out(here):
    """In a field that nobody reads, too: cleaning texts goes into every one."""
    rows = "".join(f'{{"prompt":"q{i}","completion":"a","x":[[]]}}\n' for i in range(5))
    write("a.jsonl", rows + rows.replace("[[]]", "[" * 995 + "]" * 995).partition("\n")[0])
    meta = made("a.jsonl")[0]
    assert (meta["documents"], meta["left_out"]) == (5, 1)


def test_fields_that_are_not_read_are_named(here, capsys):
    rows = [dict(question=f"q{i}", context="c", answer="5", system="s") for i in range(5)]
    write("a.jsonl", rows)
    assert all(record["context"] == "c" for record in records_of("a.jsonl"))
    assert "for the verifier only: context\n" in capsys.readouterr().out
    made("a.jsonl", as_="chat")
    assert "not read: context\n" in capsys.readouterr().out


def test_preferences_as_single_messages_or_beside_a_conversation():
    pair = dict(prompt="q", chosen="good", rejected="bad")
    expected = dict(prompt=[_user("q")], chosen="good", rejected="bad")
    assert as_prefs(pair) == expected
    single = dict(chosen=_assistant("good"), rejected={"from": "gpt", "value": "bad"})
    assert as_prefs(dict(prompt="q", **single)) == expected
    assert as_prefs(dict(conversations=[{"from": "human", "value": "q"}], **single)) == expected
    assert as_prefs(dict(pair, prompt=None, messages=[_user("q")])) == expected


def test_answers_that_differ_by_blanks_are_the_same():
    """They were written, and train.py left out every one of them."""
    with pytest.raises(ValueError, match="chosen and rejected are the same"):
        as_prefs(dict(prompt="q", chosen="good", rejected=" good\n"))


def test_equal_records_get_advice_that_helps(here):
    write("a.jsonl", [dict(messages=[_user("q"), _assistant("a")])] * 8)
    refused(
        "none fell into train; set a smaller --val_fraction, unless they are all equal", "a.jsonl"
    )


# --- meta.pkl and verifiers

WRONG_META = [
    dict(stoi={b"a": 0}),
    dict(stoi={"a": 0.0}),
    dict(stoi={"a": False, "b": True}),
    dict(stoi={"\ud800": 0}),
    ["a", "b"],
    None,
]


@pytest.mark.parametrize("content", WRONG_META, ids=repr)
def test_a_wrong_meta_pkl_is_one_line(here, content):
    """Some ended in a traceback of another library, some in Python's own words."""
    write("d/meta.pkl", pickle.dumps(content))
    with pytest.raises(UserError, match="d/meta.pkl: expected nanoGPT's stoi and itos") as e:
        prepare.load_tokenizer("d")
    assert "attribute" not in str(e.value)


def test_a_verifier_that_catches_everything_is_late_all_the_same():
    """A bare `except:` made of a call that took too long one that is right."""

    def verify(prompt, completion, answer):
        try:
            time.sleep(10)
        except:  # noqa: E722
            return 1.0

    said = []
    grade = prepare.Grader(verify, "v.py", said.append, timeout=0.1)
    assert grade("q", "a", "a", True, {}) == 0.0
    assert grade.raised == 1 and "longer than verifier_timeout=0.1" in said[0]


def test_compressed_utf32(here):
    write("a.jsonl.gz", gzip.compress('{"text": "hello"}\n'.encode("utf-32") * 20))
    refused("decompress and convert it: iconv -f utf-32 ", "a.jsonl.gz")


# --- prompts

NO_PROMPTS = {
    "p.csv": ("prompt\nhello\n", "prompts=p.csv: expected a .jsonl file, or a .txt of one prompt"),
    "p.jsonl": ('{"prompt": "a"}\n{bad\n', "p.jsonl, line 2: not JSON: "),
    "t.jsonl": (
        [dict(messages=[_user("q"), dict(role="tool", content="r")])],
        "t.jsonl, line 1: a record with tool calls; leave it out",
    ),
}


@pytest.mark.parametrize("name", NO_PROMPTS)
def test_files_that_hold_no_prompts(here, monkeypatch, name):
    """The head of a table was a prompt, and its rows were prompts with their commas."""
    from model import GPT, GPTConfig

    tokenizer = prepare.with_chat_tokens(prepare.load_tokenizer("byte"))
    shape = dict(n_layer=1, n_head=1, n_embd=8, block_size=32, vocab_size=tokenizer.vocab_size)
    GPT(GPTConfig(**shape)).save_pretrained("m", generation={"eos_token_id": tokenizer.eos_id})
    tokenizer.save("m")
    content, said = NO_PROMPTS[name]
    write(name, content)
    script = os.path.join(ROOT, "sample.py")
    arguments = ["--init_from=m", "--device=cpu", "--chat=yes", f"--prompts={name}"]
    for stream in ("stdout", "stderr", "excepthook"):  # sample.py replaces them
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(UserError, match=re.escape(said)):
        runpy.run_path(script, run_name="__main__")
