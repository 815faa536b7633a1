"""Tokenizers of other people's data (nanoGPT's characters, text without spaces, Llama 3), and
verifiers as they are written by people who do not know this program."""

import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import prepare
import runs
from configurator import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CHARACTERS = "\n !$&',-.3:;?" + "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ITOS = dict(enumerate(CHARACTERS))
STOI = {c: i for i, c in ITOS.items()}


def nanogpt_data(directory, meta, count=3000):
    """train.bin, val.bin and meta.pkl as nanoGPT's data/shakespeare_char/prepare.py makes them."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        rng.integers(0, 65, count).astype("<u2").tofile(directory / f"{split}.bin")
    (directory / "meta.pkl").write_bytes(meta)
    return str(directory)


# -----------------------------------------------------------------------------
# nanoGPT's character data


@pytest.mark.parametrize(
    "meta",
    [
        {"vocab_size": 65, "itos": ITOS, "stoi": STOI},
        {"itos": ITOS},
        {"itos": list(CHARACTERS)},
        {"stoi": STOI},
    ],
)
def test_meta_pkl_becomes_the_char_tokenizer(tmp_path, meta):
    """The vocabulary is nanoGPT's, without an end-of-text token, also after it was saved."""
    directory = nanogpt_data(tmp_path / "nano", pickle.dumps(meta, protocol=4))
    assert prepare.read_meta(directory)["vocab_size"] == 65
    tokenizer = prepare.load_tokenizer(directory)
    tokenizer.save(tmp_path / "saved")
    for tok in (tokenizer, prepare.load_tokenizer(str(tmp_path / "saved"))):
        assert tok.name == "char" and tok.vocab_size == 65
        assert tok.eos is None and tok.eos_id == -1 and tok.start_id == 0  # a line break
        assert tok.encode("Be it\nso.") == [STOI[c] for c in "Be it\nso."]
        assert tok.decode(range(65)) == CHARACTERS
        with pytest.raises(UserError, match="'é'"):
            tok.encode("é")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert len(theirs) == 65 and theirs.encode("Be it\n") == tokenizer.encode("Be it\n")


def test_meta_pkl_runs_no_program(tmp_path):
    """A pickle that names a class or a function, one that is damaged, and one of another kind are
    refused in a line that names the file."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was_run"),)

    numbers = {"stoi": {c: np.int64(i) for c, i in STOI.items()}}
    refused = [
        pickle.dumps({"stoi": STOI, "itos": Evil()}),
        pickle.dumps(numbers),
        b"cos\nsystem\n(S'touch x'\ntR.",
        pickle.dumps({"stoi": STOI})[:-20],
        b"",
        b"\xff\x00",
        pickle.dumps({"vocab_size": 50257}),
        pickle.dumps([1, 2]),
        pickle.dumps({"stoi": {"ab": 0, "c": 1}}),
        pickle.dumps({"stoi": {"a": 0, "b": 5}}),
        pickle.dumps({"stoi": {"a": "0"}}),
    ]
    for i, meta in enumerate(refused):
        directory = nanogpt_data(tmp_path / str(i), meta, count=10)
        with pytest.raises(UserError, match="meta.pkl") as e:
            prepare.read_meta(directory)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "was_run").exists()


def test_nanogpt_char_data_trains_as_in_nanogpt(tmp_path):
    """65 rows in the embedding, ln 65 at step 0, samples of its characters; then chats."""
    meta = pickle.dumps({"vocab_size": 65, "itos": ITOS, "stoi": STOI})
    nanogpt_data(tmp_path / "data" / "shakespeare_char", meta)
    (tmp_path / "theirs.py").write_text(
        "dataset = 'shakespeare_char'\nblock_size = 16\nbatch_size = 4\nn_layer = 1\nn_head = 2\n"
        "n_embd = 16\nmax_iters = 2\nlr_decay_iters = 2\nwarmup_iters = 1\neval_iters = 5\n"
        "gradient_accumulation_steps = 1\ncompile = False\ndevice = 'cpu'\ndtype = 'float32'\n"
    )
    configs = [os.path.join(ROOT, "config", "nanogpt.py"), "theirs.py"]
    run = subprocess.run(
        [sys.executable, os.path.join(ROOT, "train.py"), *configs, "--out_dir=out/char"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "65 characters by its meta.pkl" in run.stdout
    saved = tmp_path / "out" / "char" / "step_000002"
    config = json.loads((saved / "config.json").read_text())
    assert config["vocab_size"] == 65
    rows = [json.loads(line) for line in open(tmp_path / "out" / "char" / "log.jsonl")]
    first = next(row["val/loss"] for row in rows if "val/loss" in row)
    assert first == pytest.approx(math.log(65), abs=0.05)
    sample = run.stdout.split("--- a sample ---\n")[1].split("\n---")[0]
    assert sample and set(sample) <= set(CHARACTERS)
    generation = json.loads((saved / "generation_config.json").read_text())
    assert generation.get("eos_token_id") is None

    # a text prepared for it would have documents without an end; chats bring one along
    (tmp_path / "more.txt").write_text("Be it so. " * 500)
    with pytest.raises(UserError, match="end-of-text"):
        prepare.prepare(
            str(tmp_path / "more.txt"), tokenizer=str(saved), data_dir=str(tmp_path / "data")
        )
    tokenizer = prepare.with_chat_tokens(prepare.load_tokenizer(str(saved)))
    ids, _ = prepare.render_chat([{"role": "user", "content": "Hi"}], tokenizer)
    assert ids[-1] == tokenizer.eos_id == 65 and tokenizer.vocab_size == 68


# -----------------------------------------------------------------------------
# training a BPE


def without_spaces(kind, size):
    rng = random.Random(0)
    alphabets = {
        "DNA": "ACGT",
        "base64": "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz+/",
        "Chinese": [chr(0x4E00 + i) for i in range(1500)],
        "blanks": " ",
    }
    alphabet = alphabets[kind]
    return "".join(rng.choices(alphabet, k=size // len(alphabet[0].encode())))


@pytest.mark.parametrize("kind", ["DNA", "base64", "Chinese", "blanks"])
def test_a_bpe_is_trained_on_text_without_spaces_in_seconds(kind):
    """600 kB: a second. It was minutes, since training took the square of a word's length."""
    text, begun = without_spaces(kind, 600_000), time.perf_counter()
    tokenizer = prepare.train_bpe([text], 1000, "bpe:1000")
    assert time.perf_counter() - begun < 20
    ids = tokenizer.encode(text[:10_000])
    assert tokenizer.decode(ids) == text[:10_000]
    assert kind in ("blanks",) or tokenizer.vocab_size == 1000
    assert len(ids) < 0.9 * len(text[:10_000].encode())
    assert "Split" not in json.dumps(tokenizer.spec["pre_tokenizer"])  # in training only


def test_cutting_long_words_changes_no_other_word(monkeypatch):
    """A text whose words are all shorter gives the tokenizer that it gave without the limit, and
    no token holds half a character of a longer one."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioustré中", k=rng.randint(1, 14))) for _ in range(5000)]
    cut = prepare.train_bpe([" ".join(words)], 600, "x").spec
    monkeypatch.setattr(prepare, "LONGEST_WORD", 10**5)
    assert prepare.train_bpe([" ".join(words)], 600, "x").spec == cut
    monkeypatch.setattr(prepare, "LONGEST_WORD", 64)
    tokenizer = prepare.train_bpe(["中国" * 500] * 3, 300, "x")
    learned = [tokenizer.decode([i]) for i in range(259, tokenizer.vocab_size)]
    assert not any(text.startswith("国") and len(text) > 12 for text in learned)


def test_training_a_tokenizer_shows_its_progress_on_a_terminal():
    """And prints nothing where there is none."""
    pty = pytest.importorskip("pty")
    code = "import prepare; prepare.train_bpe(['so it was ' * 2000], 300, 'x')"
    terminal, end = pty.openpty()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=end, stderr=end)
    os.close(end)
    shown = os.read(terminal, 1 << 16).decode(errors="replace")
    os.close(terminal)
    assert done.returncode == 0 and "merges" in shown
    quiet = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert quiet.stdout == quiet.stderr == b""


# -----------------------------------------------------------------------------
# special tokens


@pytest.mark.parametrize(
    "tokens, configured, end",
    [
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|eot_id|>", "<|end_of_text|>"),
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], None, "<|end_of_text|>"),
        (["<bos>", "<eos>", "<end_of_turn>"], "<end_of_turn>", "<eos>"),
        (["<s>", "</s>", "<|im_end|>"], "<|im_end|>", "</s>"),
        (["<|endoftext|>", "<|im_end|>"], {"content": "<|im_end|>"}, "<|endoftext|>"),
        (["<|eot_id|>"], "<|eot_id|>", "<|eot_id|>"),
        (["<end of sentence>"], "<end of sentence>", "<end of sentence>"),
    ],
)
def test_a_document_ends_with_the_token_for_documents(tmp_path, tokens, configured, end):
    """Not with the one that ends a turn, which the config of an instruct model names."""
    spec = json.loads(json.dumps(prepare.load_tokenizer("byte").spec))
    del spec["model"]["vocab"]  # of bytes, with <|endoftext|> among the added tokens
    spec["model"]["vocab"] = {c: b for b, c in enumerate(prepare._byte_characters())}
    spec["added_tokens"] = [prepare._special(t, 256 + i) for i, t in enumerate(tokens)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    if configured:
        settings = json.dumps({"eos_token": configured})
        (tmp_path / "tokenizer_config.json").write_text(settings)
    tokenizer = prepare.load_tokenizer(str(tmp_path))
    assert tokenizer.eos == end and tokenizer.eos_id == 256 + tokens.index(end)
    # what was decided once stays: a data set made with another end of documents keeps it
    saved = tmp_path / "saved"
    tokenizer.save(saved)
    settings = json.loads((saved / "tokenizer_config.json").read_text())
    (saved / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": tokens[-1]}))
    assert prepare.load_tokenizer(str(saved)).eos == tokens[-1]


def test_a_char_tokenizer_holds_the_roles_of_a_chat(tmp_path, monkeypatch):
    """Conversations in digits: system, user and assistant are names of the template's own."""
    monkeypatch.chdir(tmp_path)
    chats = [
        [
            {"role": "system", "content": "1"},
            {"role": "user", "content": f"{i}+{i}"},
            {"role": "assistant", "content": str(2 * i)},
        ]
        for i in range(300)
    ]
    lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
    (tmp_path / "c.jsonl").write_text("".join(lines))
    directory = prepare.prepare("c.jsonl", tokenizer="char", val_fraction=0.1)
    tokenizer = prepare.load_tokenizer(directory)
    ids, _ = prepare.render_chat(chats[0], tokenizer)
    assert tokenizer.decode(ids).startswith("<|im_start|>system\n1<|im_end|>\n<|im_start|>user\n0+")
    assert max(ids) < tokenizer.vocab_size == prepare.read_meta(directory)["vocab_size"]
    # the ids of a model that was pretrained on digits stay: roles come behind them
    digits = prepare.make_tokenizer("char", ["0123456789+"])
    assert digits.vocab_size == 12 and digits.eos_id == 11  # a plain text gets no letters
    more = prepare.with_chat_tokens(digits)
    assert more.encode("1+2") == digits.encode("1+2") and more.eos_id == 11
    assert more.agrees(digits) and prepare.with_chat_tokens(more) is more
    prepare.render_chat(chats[0], more)


# -----------------------------------------------------------------------------
# the verifier 'number'

GOLDS = {
    "7": 7, "-7": -7, "+7": 7, "007": 7, "3.0": 3, ".5": 0.5, "-.5": -0.5, "1,234.50": 1234.5,
    "$1,234": 1234, "-$5": -5, "$-5": -5, "\\$5": 5, "€5": 5, "5 €": 5, "US$5": 5, "USD 5": 5,
    "50%": 50, "50\\%": 50, "3/4": 0.75, "-3/4": -0.75, "3 / 4": 0.75, "1 1/2": 1.5,
    "\\frac{3}{4}": 0.75, "-\\dfrac{3}{4}": -0.75, "\\frac{-3}{4}": -0.75, "\\frac34": 0.75,
    "1\\frac{1}{2}": 1.5, "$\\frac{3}{4}$": 0.75, "\\(5\\)": 5, "1e-05": 0.00001, "1E+16": 1e16,
    "3 \\times 10^{8}": 3e8, "3×10^8": 3e8, "5cm": 5, "5 cm^2": 5, "5\\text{ cm}": 5, "60 km/h": 60,
    "60 miles per hour": 60, "12 apples": 12, "72^\\circ": 72, "20 °C": 20, "9.81 m/s²": 9.81,
    "10\\,000": 10000, "10{,}000": 10000, "1\u202f234": 1234, "\u22125": -5, "It is 7.": 7,
    "The answer is 7": 7, "x = 5": 5, "a + b\n#### 1,234": 1234, "so \\boxed{\\frac{3}{4}}": 0.75,
    "**7**": 7,
}  # fmt: skip
NO_GOLDS = [
    "2^{10}", "10^5", "(1, 5)", "[1,2]", "2x+1", "x+1", "2x", "2 x", "2n", "x", "1,5", "1.234,56",
    "5!", "3:45", "10:1", "3 of 4", "7 or 8", "7 or more", "7 million", "7 squared", "minus 7",
    "half of 7", "7 and a half", "\\sqrt{2}", "2\\sqrt{3}", "2\\pi", "7 pi", "7i", "3+4i", "1/0",
    "\\frac{x}{4}", "1/2/2020", "2020-01-02", "12 34", "7th", "v1.2", "5 \\cdot 3", "0.333...",
    "1e999999999", "yes", "", "####", "#### 7 #### 8", "1 2 3 4 5 6 7 8 9", "9" * 5000, "\\boxed{}",
]  # fmt: skip


def test_a_reference_answer_is_one_number():
    """With separators, currency, percent, a fraction, an exponent, a unit; what is none is not
    compared by its last digits."""
    verify = prepare.verifier("number")
    for answer, value in GOLDS.items():
        assert prepare.readable_gold("number", answer), answer
        assert float(prepare.gold_number(answer)) == pytest.approx(value, rel=1e-12), answer
        assert verify("", answer, answer) == 1.0, answer
    for answer in NO_GOLDS:
        assert not prepare.readable_gold("number", answer), answer
        assert verify("", answer, answer) == 0.0, answer


@pytest.mark.parametrize(
    "completion, answer, reward",
    [
        ("\\frac{1}{4}", "\\frac{3}{4}", 0), ("10", "2^{10}", 0), ("(2, 5)", "(1, 5)", 0),
        ("x+1", "2x+1", 0), ("-5", "1e-05", 0), ("5", "1e-05", 0), ("0.00001", "1e-05", 1),
        ("1/2", "0.5", 1), ("0.5", "1/2", 1), ("it is \\frac12.", "0.5", 1), ("2", "1/2", 0),
        ("3", "3.0", 1), ("3.0", "3", 1), ("So 3 + 4 = **7**.", "7", 1), ("It's $1,234.", "1234", 1),
        ("\\boxed{7}, checked 3 times", "7", 1), ("\\boxed{3} or \\boxed{7}", "7", 1),
        ("\\boxed{\\frac{3}{4}}", "0.75", 1), ("7 = \\boxed{x+1}", "1", 0),
        ("\\boxed{(1, 5)}", "5", 0), ("\\boxed{5 apples}", "5", 1), ("2^{10}", "10", 0),
        ("12 cm^2", "12", 1), ("It is 5!", "5", 1), ("2**10", "10", 0),
        ("2**10", "210", 0), ("3 * 10**8", "3e8", 1), ("`7`", "7", 1), ("3-5", "5", 1), ("10 - 5", "-5", 0),
        ("x=-5", "-5", 1), ("3 × 10^8 m/s", "3e8", 1), ("50", "50%", 1), ("#### 8 7", "7", 0),
        ("(1,5)", "15", 0),
    ],
)  # fmt: skip
def test_number_compares_values(completion, answer, reward):
    assert prepare.verifier("number")("", completion, answer) == reward


@pytest.mark.parametrize("text", ["9", "1.1", "the ", "1/", "\\frac{", "\\boxed{", "**a", "1,"])
def test_reading_a_number_takes_no_time_that_explodes(text):
    """A model that repeats itself for thousands of tokens must not hold up a step."""
    begun = time.perf_counter()
    prepare.verifier("number")("", text * 5000, text * 5000)
    assert time.perf_counter() - begun < 2


def test_preparing_counts_answers_that_are_no_number(tmp_path, monkeypatch, capsys):
    """Before anybody pays for training. Float answers keep their value."""
    monkeypatch.chdir(tmp_path)
    answers = ["yes", "(1, 5)", 1e-05, 1e16, 3.0] * 20
    records = [{"question": f"{i}?", "answer": a} for i, a in enumerate(answers)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    directory = prepare.prepare("p.jsonl", as_="verify", val_fraction=0.2)
    assert "40 of 100 answers" in capsys.readouterr().out
    written = (tmp_path / directory / "train.jsonl").read_text().splitlines()
    found = {prepare.gold_number(json.loads(line)["answer"]) for line in written}
    assert found == {None, prepare.gold_number("0.00001"), 10**16, 3}


# -----------------------------------------------------------------------------
# verifiers in files


def grader(tmp_path, source, timeout=0.2):
    """(a Grader of a verifier file, what it says)."""
    (tmp_path / "v.py").write_text(source)
    said = []
    verify = prepare.verifier(str(tmp_path / "v.py"))
    return prepare.Grader(verify, "v.py", said.append, timeout), said


@pytest.mark.parametrize("names", ["prompt, completion, answer", "p, c, a", "q, /, text, gold"])
def test_a_verifier_may_see_the_whole_record(tmp_path, names):
    """With **record it gets the fields that are not an argument already."""
    source = f"def verify({names}, **record):\n    return record['level'] + len(record) / 100\n"
    grade, said = grader(tmp_path, source)
    record = {"prompt": "Q?", "answer": "1", "level": 3, "source": "x"}
    record = {key: value for key, value in record.items() if key not in ("prompt", "answer")}
    assert grade("Q?", "1", "1", True, record) == 3.02 and not said
    # a field that is named like an argument is not given twice
    assert grade("Q?", "1", "1", True, record | {names.split(", ")[-1]: "?"}) == 3.02
    plain, said = grader(tmp_path, "def verify(p, c, a):\n    return 0.5\n")
    assert plain("Q?", "1", "1", True, record) == 0.5 and not said


def test_preparing_keeps_the_fields_of_a_problem(tmp_path, monkeypatch):
    """They come to the verifier by way of train.jsonl, and do not move a problem to the other
    split."""
    monkeypatch.chdir(tmp_path)
    splits = []
    for more in ({}, {"level": 3, "tests": ["a"], "nothing": None}):
        records = [{"question": f"{i}?", "answer": i, **more} for i in range(50)]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        directory = prepare.prepare("p.jsonl", as_="verify", val_fraction=0.3, name=f"n{len(more)}")
        lines = (tmp_path / directory / "val.jsonl").read_text().splitlines()
        splits.append([json.loads(line)["answer"] for line in lines])
        assert json.loads(lines[0]).get("level") == more.get("level")
        assert "nothing" not in json.loads(lines[0])
    assert splits[0] == splits[1]
    tokenizer = prepare.with_chat_tokens(prepare.load_tokenizer("byte"))
    config = dict(dataset="n3", data_dir="data", stage="rlvr", seed=1, block_size=200, batch_size=1)
    config |= dict(max_completion=10, verifier="number", verifier_model="")
    problems = prepare.Problems(config, tokenizer)
    seen = []

    def grade(question, completion, answer, ended, fields):
        seen.append((question, completion, ended, fields))
        return 1.0

    def generate(prompts, seeds):
        return [([ord("7"), tokenizer.eos_id], True)] * len(prompts)

    problems.complete(problems.batch([0]), 2, 1, generate, grade)
    question = seen[0][0]
    assert seen == [(question, "7", True, {"level": 3, "tests": ["a"]})] * 2


def test_a_verifier_imports_the_file_beside_it(tmp_path):
    """Also where a module of that name is installed; afterwards it replaces none."""
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "tomllib.py").write_text("def norm(text):\n    return text.lower()\n")
    source = "from tomllib import norm\ndef verify(p, c, a):\n    return norm(c) == norm(a)\n"
    loaded = sys.modules.pop("tomllib", None)
    try:
        grade, said = grader(tmp_path / "v", source)
        assert grade("", "YES", "yes", True, {}) == 1.0 and not said
        assert sys.path[0] != str(tmp_path / "v") and sys.path[-1] == str(tmp_path / "v")
    finally:
        del sys.modules["tomllib"]
        sys.path.remove(str(tmp_path / "v"))
        if loaded:
            sys.modules["tomllib"] = loaded


needs_alarm = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="this system has no signal.setitimer"
)
HANGS = {
    "an endless loop": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "except Exception": "\n".join(
        ["import time", "try:", "    time.sleep(60)", "except Exception:", "    return 1.0"]
    ),
    "a regular expression": "import re; re.match('(a+)+b', 'a' * 60)",
    "a child process": "import subprocess; subprocess.run(['sleep', '60'])",
}


@needs_alarm
@pytest.mark.parametrize("hang", HANGS)
def test_a_call_that_takes_too_long_counts_as_raised(tmp_path, hang):
    body = "\n".join(f"        {line}" for line in HANGS[hang].splitlines())
    source = f"def verify(p, c, a):\n    if c == 'hang':\n{body}\n    return 1.0\n"
    grade, said = grader(tmp_path, source)
    before = signal.getsignal(signal.SIGALRM)
    assert grade("", "fine", "", True, {}) == 1.0
    begun = time.perf_counter()
    assert grade("", "hang", "", True, {}) == 0.0
    assert time.perf_counter() - begun < 5
    assert (grade.calls, grade.raised) == (2, 1) and "verifier_timeout=0.2" in said[0]
    assert grade("", "fine", "", True, {}) == 1.0
    # nothing is left behind: no timer, no handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == before


@needs_alarm
def test_a_bare_except_does_not_hold_a_call_for_ever(tmp_path):
    """It catches the first interruption; the next comes a second later."""
    body = "    try:\n        while True: pass\n    except:\n        while True: pass\n"
    grade, said = grader(tmp_path, f"def verify(p, c, a):\n{body}")
    assert grade("", "x", "", True, {}) == 0.0 and grade.raised == 1


@needs_alarm
def test_a_verifier_that_only_hangs_stops_the_run(tmp_path):
    """After a few calls, not after a step of hundreds of them."""
    grade, said = grader(tmp_path, "def verify(p, c, a):\n    while True: pass\n", timeout=0.01)
    with pytest.raises(UserError, match="verifier_timeout=0.01"):
        for _ in range(100):
            grade("", "x", "", True, {})
    assert grade.calls == prepare.Grader.ONLY_TIMEOUTS


def test_where_a_call_cannot_be_interrupted_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "can_interrupt", lambda: False)
    grade, said = grader(tmp_path, "def verify(p, c, a):\n    return 0.5\n")
    assert "verifier_timeout" in said[0] and grade("", "x", "", True, {}) == 0.5


def test_verifier_timeout_is_a_key():
    train = os.path.join(ROOT, "train.py")
    with open(train, encoding="utf-8") as f:
        assert "\nverifier_timeout = 10.0 " in f.read()
    refused = subprocess.run(
        [sys.executable, train, "--verifier_timeout=0"], capture_output=True, text=True
    )
    assert refused.returncode and "verifier_timeout" in refused.stderr + refused.stdout


# -----------------------------------------------------------------------------
# signals


def test_the_first_signal_is_answered_at_once(capfd):
    """A step may take a minute: who presses Ctrl-C reads that it is being finished."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    hangup = getattr(signal, "SIGHUP", None)
    if hangup:
        before[hangup] = signal.getsignal(hangup)
    try:
        stop = runs.StopSignal()
        signal.raise_signal(signal.SIGINT)
        shown = capfd.readouterr().out
        assert "SIGINT" in shown and "finishing this step" in shown and stop.signal == "SIGINT"
        signal.raise_signal(signal.SIGTERM)  # the same event, passed on by torchrun
        quiet = runs.StopSignal(says=False)  # another process than the first
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().out == "" and quiet.signal == "SIGINT"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
