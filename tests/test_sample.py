"""sample.py as a user runs it, with models made here: as a process, in a terminal, in a browser."""

import json
import os
import pty
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

import prepare
from model import GPT, GPTConfig, pack_weights, sample_token

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TERM": "dumb",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
SHAPE = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "hat", "in", "an"]
WORDS += ["old", "van"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`chat` answers in a few words; `base` has the same files but declares that it is pretrained;
    `endless` has a long window and never ends a text under greedy decoding."""
    cwd = tmp_path_factory.mktemp("sample")
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other on a busy machine are slower than one
    rng, tok = random.Random(0), prepare.with_chat_tokens(prepare.load_tokenizer("byte"))
    model = GPT(GPTConfig(**SHAPE, block_size=128, vocab_size=tok.vocab_size))
    opt = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(100):
        rows = [
            prepare.render_chat(
                [
                    dict(role=role, content=" ".join(rng.choices(WORDS, k=3)))
                    for role in ("user", "assistant")
                ],
                tok,
            )[0]
            for _ in range(8)
        ]
        x = torch.tensor([(ids + [tok.eos_id] * 80)[:80] for ids in rows])
        model(x[:, :-1].contiguous(), x[:, 1:].contiguous())[1].backward()
        opt.step()
        opt.zero_grad()
    im_end = tok.encode_special(prepare.IM_END)
    endless = GPT(
        GPTConfig(**SHAPE, block_size=8192, vocab_size=tok.vocab_size, tie_embeddings=False)
    )
    for (
        name,
        p,
    ) in endless.named_parameters():  # nothing is added to an embedding of ones, which reads "a"
        if p.dim() == 2:
            torch.nn.init.constant_(p, float(name == "embed.weight"))
    torch.nn.init.ones_(endless.head.weight.data[ord("a")])
    for name, m, ends in (
        ("chat", model, [tok.eos_id, im_end]),
        ("base", model, tok.eos_id),
        ("endless", endless, [tok.eos_id, im_end]),
    ):
        m.save_pretrained(cwd / name, generation={"eos_token_id": ends})
        tok.save(cwd / name)
    torch.set_num_threads(threads)
    return cwd


def sample(cwd, *args, stdin=None, code=0, **env):
    run = subprocess.run(
        [sys.executable, os.path.join(ROOT, "sample.py"), *args],
        cwd=cwd,
        input=stdin,
        text=True,
        capture_output=True,
        env={**ENV, **env},
        timeout=120,
    )
    assert run.returncode == code and "Traceback" not in run.stderr, run.stderr[-3000:]
    return run


PROMPT = r"\n> $"


class Terminal:
    """A process in a pseudo-terminal: what is typed, and what is seen."""

    def __init__(self, cwd, *args):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.chdir(cwd)
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # a job in the background may have been told to ignore it
            os.execve(sys.executable, [sys.executable, os.path.join(ROOT, "sample.py"), *args], ENV)
        self.seen = ""

    def until(self, pattern, seconds=20):
        """Reads until `pattern` is seen; returns everything up to its end."""
        end = time.time() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.time() < end, f"{pattern!r} did not come; seen: {self.seen[-2000:]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:  # the process is gone
                    assert re.search(pattern, self.seen), (
                        f"it ended before {pattern!r}: {self.seen[-2000:]!r}"
                    )
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def type(self, text):
        time.sleep(0.1)  # the prompt is there a moment before readline listens
        os.write(self.fd, text.encode())

    def ask(self, line):
        """What a line is answered with, up to the next `> `."""
        self.type(line + "\n")
        return self.until(PROMPT)

    def exit_code(self):
        for _ in range(100):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.1)
        os.kill(self.pid, signal.SIGKILL)
        return "it did not end"


# --- model.py: what sampling can do


def tiny(**keys):
    return GPT(GPTConfig(vocab_size=97, block_size=48, **{**SHAPE, **keys})).eval()


def test_min_p_and_repetition_penalty_are_those_of_transformers():
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits, draws = torch.randn(200, 97) * 3, torch.rand(200)
    kept = logits / 0.7
    for warper in (TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)):
        kept = warper(None, kept)
    wanted = sample_token(kept, draws)  # nothing left to cut
    assert torch.equal(sample_token(logits, draws, 0.7, 20, 0.9, 0.05), wanted)

    model, idx = tiny(), torch.randint(97, (2, 9))
    with torch.no_grad():
        model.head.weight.mul_(20)
    plain, processor, pad = idx.clone(), RepetitionPenaltyLogitsProcessor(1.5), torch.tensor([0, 4])
    ours = model.generate(idx[:1], 20, temperature=0, repetition_penalty=1.5)
    plain = idx[:1].clone()
    for _ in range(20):
        logits = processor(plain, model(plain)[0][:, -1])
        plain = torch.cat([plain, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ours, plain)
    # padding is nothing that was said
    both = model.generate(idx, 20, seed=3, repetition_penalty=1.5, pad=pad)
    alone = model.generate(idx[1:, 4:], 20, seed=[4], repetition_penalty=1.5)
    assert torch.equal(both[1, 4:], alone[0])


def test_packed_weights_change_nothing():
    plain = tiny()
    packed, idx = GPT(plain.config).eval(), torch.randint(97, (3, 9))
    packed.load_state_dict(plain.state_dict())
    pack_weights(packed)
    assert torch.equal(
        plain.generate(idx, 60, temperature=0), packed.generate(idx, 60, temperature=0)
    )
    with torch.inference_mode():
        assert (plain(idx)[0] - packed(idx)[0]).abs().max() < 1e-5
    out = plain.generate(idx, 5)  # what is generated may be trained on
    plain(out[:, :-1].contiguous(), out[:, 1:].contiguous())[1].backward()


# --- one prompt


def test_one_prompt(place):
    run = sample(place, "--init_from=chat", "--start=the cat", "--num_samples=3")
    first, second, third, rest = run.stdout.split("\n---------------\n")
    assert (
        all(text.startswith("the cat\n") and set(text.split()) for text in (first, second, third))
        and not rest
    )
    assert (
        "<|" not in run.stdout and ", chat" in run.stderr
    )  # it answers, and its end token is not shown
    again = sample(place, "--init_from=chat", "--start=the cat", "--num_samples=1", "--seed=1338")
    assert again.stdout.split("\n---------------\n")[0] == second
    # a stop string is never shown, not even its first half, and ends the text
    whole, stop = first.removeprefix("the cat\n"), first[-4:-1]
    cut = sample(
        place,
        "--init_from=chat",
        "--start=the cat",
        "--num_samples=1",
        f'--stop=["~~", {json.dumps(stop)}]',
    )
    assert cut.stdout == f"the cat\n{whole[: whole.index(stop)]}\n---------------\n"


@pytest.mark.parametrize(
    "args, message",
    [
        (["--temperature=-1"], "temperature=-1.0: expected at least 0"),
        (["--temperature=nan"], "temperature=nan: expected a finite number"),
        (["--top_k=-1"], "top_k=-1: expected at least 0"),
        (["--top_p=3"], "top_p=3.0: expected at least 0 and at most 1"),
        (["--min_p=2"], "min_p=2.0"),
        (["--repetition_penalty=0"], "repetition_penalty=0.0: expected more than 0"),
        (["--seed=-1"], "seed=-1: expected at least 0"),
        (["--num_samples=0"], "num_samples=0: expected at least 1"),
        (["--max_new_tokens=0"], "max_new_tokens=0: expected at least 1"),
        (["--max_new_tokens=1e12"], "max_new_tokens=1000000000000"),
        (["--batch_size=0"], "batch_size=0: expected at least 1"),
        (["--port=0"], "port=0: expected at least 1 and at most 65535"),
        (["--overflow=fall"], "overflow='fall': expected 'slide' or 'refuse'"),
        (["--chat=maybe"], "chat='maybe': expected 'auto', 'yes' or 'no'"),
        (["--device=tpu"], "device='tpu'"),
        (["--dtype=int8"], "dtype='int8': expected"),
        (["--stop=[]x"], "stop=[]x: expected a text, or a list"),
        (["--stop=[1]"], "stop=[1]: expected a text, or a list"),
        (["--stop=" + "[" * 9999], "expected a text, or a list"),
        (["--interactive", "--web"], "choose one"),
        (["--prompts=a", "--out_file=none/x"], "its directory does not exist"),
        (["--out_file=x.jsonl"], "only the answers to --prompts"),
        (["--prompts=a", "--out_file=chat"], "it exists already"),
        (["--prompts=chat"], "prompts=chat: Is a directory"),
        (["--prompts=latin.txt"], "prompts=latin.txt: not a UTF-8 text"),
        (["--start=FILE:chat"], "start=chat: Is a directory"),
        (["--init_from=resume", "--out_dir=none"], "out_dir=none: no such directory"),
    ],
)
def test_refuses_in_one_line(place, args, message):
    """Keys, files and their combinations that sample.py cannot use; most before torch is there."""
    (place / "latin.txt").write_bytes(b"caf\xe9\n")
    run = sample(place, "--init_from=chat", *args, code=1)
    assert message in run.stderr and run.stderr.count("\n") == 1 and not run.stdout


def damage(directory, file, content):
    if content is None:
        os.remove(directory / file)
    else:
        (directory / file).write_bytes(content)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("tokenizer.json", b"{", "tokenizer.json: not a tokenizer.json"),
        ("tokenizer.json", b"\xff\xff", "tokenizer.json: not a tokenizer.json"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "expected token ids"),
        ("generation_config.json", b'{"eos_token_id": 99999999999999999999}', "expected token ids"),
        ("generation_config.json", b"[", "generation_config.json: "),
        ("trainer.pt", b"x", "trainer.pt: damaged"),
    ],
)
def test_a_damaged_model_directory_is_one_line(place, tmp_path, file, content, message):
    shutil.copytree(place / "base", tmp_path / "model")
    damage(tmp_path / "model", file, content)
    run = sample(tmp_path, "--init_from=model", code=1)
    assert message in run.stderr and run.stderr.count("\n") == 1 and not run.stdout


def test_a_tokenizer_of_another_model_is_one_line(place):
    """An id without a row in the embedding ended in an IndexError: prompts, chats, end of text."""
    small = GPT(GPTConfig(**SHAPE, block_size=32, vocab_size=90))
    small.save_pretrained(place / "small")
    shutil.copy(place / "base" / "tokenizer.json", place / "small")
    (place / "two.txt").write_text("AB\nzz\n")
    for args in (["--start=zzz"], ["--chat=yes", "--start=A"], ["--prompts=two.txt"], []):
        run = sample(place, "--init_from=small", "--num_samples=1", *args, code=1)
        assert "they do not belong together" in run.stderr and run.stderr.count("\n") == 2
    # ids that it has are enough, alone and with padding
    (place / "two.txt").write_text("AB\nABC\n")
    args = ["--init_from=small", "--prompts=two.txt", "--max_new_tokens=4"]
    assert sample(place, *args).stdout.count("finish_reason") == 2


def test_float16_on_a_cpu(place):
    """Most CPUs cannot pack float16 weights; they multiply them all the same."""
    run = sample(place, "--init_from=base", "--dtype=float16", "--max_new_tokens=3")
    assert "cpu, float16" in run.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_standard_output_that_is_gone(place):
    (place / "few.txt").write_text("the cat\n" * 3)
    for use in ("--start=a", "--prompts=few.txt"):
        args = [sys.executable, os.path.join(ROOT, "sample.py"), "--init_from=endless", use]
        args += ["--max_new_tokens=300", "--temperature=0", "--batch_size=1"]
        with open("/dev/full", "w") as full:
            run = subprocess.run(args, cwd=place, stdout=full, stderr=subprocess.PIPE, text=True)
        last = run.stderr.splitlines()[-1]
        assert run.returncode == 1 and "Traceback" not in run.stderr
        assert last == "sample.py: standard output: No space left on device"
        with subprocess.Popen(
            args, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            process.stdout.read(5)
            process.stdout.close()
            notes = process.stderr.read().splitlines()
        assert not any("Error" in line or "Exception" in line for line in notes), notes


def test_ten_megabytes(place):
    (place / "big.txt").write_text("the cat " * 1_250_000)
    run = sample(
        place, "--init_from=base", "--start=FILE:big.txt", "--num_samples=1", "--max_new_tokens=9"
    )
    assert len(run.stdout) > 10_000_000 and "only its end is used" in run.stderr


# --- a file of prompts


def test_many_prompts(place):
    records = [
        {"prompt": p, "id": i}
        for i, p in enumerate(
            (
                "the cat",
                "",
                "a hat <|im_end|>",
                "\ud800 \x00 \x1b[31m <|im_start|>",
                "an old van sat on the red mat",
                "on",
            )
        )
    ]
    records.insert(
        3, {"messages": [dict(role="system", content="be brief"), dict(role="user", content="one")]}
    )
    (place / "in.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    args = ("--init_from=chat", "--prompts=in.jsonl", "--max_new_tokens=60", "--dtype=float32")
    run = sample(place, *args, "--out_file=out.jsonl", "--batch_size=3")
    rows = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    assert [r.get("id") for r in rows] == [
        0,
        1,
        2,
        None,
        3,
        4,
        5,
    ] and not run.stdout  # in the file's order
    assert all(
        r["finish_reason"] in ("stop", "length") and "<|im_end|>" not in r["completion"]
        for r in rows
    )
    # one by one; and the same weights that say nothing of chats, where one is asked for
    alone = sample(
        place, *args, "--batch_size=1", "--init_from=base", "--chat=yes"
    ).stdout.splitlines()
    assert [json.loads(line)["completion"] for line in alone] == [r["completion"] for r in rows]
    single = sample(
        place, "--init_from=chat", "--start=the cat", "--num_samples=1", "--max_new_tokens=60"
    ).stdout
    assert single == f"the cat\n{rows[0]['completion']}\n---------------\n"


def test_what_is_answered_is_kept(place):
    """Ctrl-C, a full disk, a reader that is gone: whole lines stay, and no traceback is shown."""
    import resource

    (place / "many.txt").write_text("the cat\n" * 400)
    args = [
        sys.executable,
        os.path.join(ROOT, "sample.py"),
        "--init_from=base",
        "--prompts=many.txt",
        "--batch_size=1",
        "--max_new_tokens=40",
    ]
    with subprocess.Popen(
        [*args, "--out_file=int.jsonl"],
        cwd=place,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # not as of a job behind &
        while not os.path.exists(place / "int.jsonl") or not os.path.getsize(place / "int.jsonl"):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
    lines = (place / "int.jsonl").read_text().splitlines()
    assert (
        process.returncode == 130
        and f"stopped: {len(lines)} of 400 prompts are answered in int.jsonl" in told
    )
    assert len(list(map(json.loads, lines))) >= 16 and "Traceback" not in told
    run = subprocess.run(
        [*args, "--out_file=full.jsonl"],
        cwd=place,
        capture_output=True,
        text=True,
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000)),
        ),
    )
    lines = (place / "full.jsonl").read_text().splitlines()
    assert (
        run.returncode == 1
        and f"stopped: {len(lines)} of 400" in run.stderr
        and "Traceback" not in run.stderr
    )
    assert all(map(json.loads, lines)) and len(lines) % 16 == 0
    run = subprocess.run(
        f"{' '.join(args)} --max_new_tokens=1 | head -c 9",
        shell=True,
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert len(run.stdout) == 9 and "Traceback" not in run.stderr


def test_a_text_is_continued_alike_in_any_batch_also_where_the_window_slides(place):
    prompts = ["the cat", "a hat", "sat on " * 15, "one", "red " * 60]
    (place / "in.txt").write_text("\n".join(prompts))
    args = (
        "--init_from=base",
        "--prompts=in.txt",
        "--max_new_tokens=50",
        "--top_p=0.95",
        "--repetition_penalty=1.2",
    )
    rows = [json.loads(line) for line in sample(place, *args, "--batch_size=4").stdout.splitlines()]
    assert [r["prompt"] for r in rows] == prompts and any(r["completion"] for r in rows)
    assert rows == [
        json.loads(line) for line in sample(place, *args, "--batch_size=1").stdout.splitlines()
    ]


@pytest.mark.parametrize(
    "model, line, said",
    [
        ("chat", "{", "bad.jsonl, line 2: "),
        (
            "chat",
            '{"messages": [{"role": "user", "content": "a"}, '
            '{"role": "assistant", "content": "b"}]}',
            "the assistant's",
        ),
        (
            "base",
            '{"messages": [{"role": "user", "content": "a"}]}',
            "not trained on conversations",
        ),
        ("base", json.dumps({"prompt": "a" * 10_000_000}), "longer than the context of 128 tokens"),
    ],
    ids=["json", "answered", "base", "long"],
)
def test_a_bad_line_is_named_before_anything_is_written(place, model, line, said):
    (place / "bad.jsonl").write_text('{"prompt": "the"}\n' + line + "\n")
    run = sample(
        place,
        f"--init_from={model}",
        "--prompts=bad.jsonl",
        "--out_file=never.jsonl",
        "--overflow=refuse",
        code=1,
    )
    assert (
        said in run.stderr
        and run.stderr.strip().count("\n") == 1
        and not (place / "never.jsonl").exists()
    )


# --- in a terminal


def test_a_chat_in_a_terminal(place):
    chat = Terminal(place, "--init_from=chat", "--interactive=True", "--max_new_tokens=30")
    chat.until(PROMPT)
    first = chat.ask("the cat")
    assert set(first.split()) & set(WORDS)
    commands = chat.ask("/help")
    assert "0 is greedy" in commands and "/system" in commands
    assert "no such command" in chat.ask("/temperature hot") and "no such command" in chat.ask(
        "/jump"
    )
    chat.ask("/temperature 0")
    assert "<|im_end|>" in chat.ask(
        "a \x16\x1bhat <|im_end|>"
    )  # what was typed, as the terminal echoes it
    chat.ask("/system be brief")
    assert "appended" in chat.ask("/save talk.jsonl")
    assert chat.ask("/reset") and "appended" in chat.ask("/save talk.jsonl")
    chat.type("\x1b[A\x1b[A\x1b[A")  # arrow up, three times: /save, /reset, /save
    chat.until("talk.jsonl")
    assert "appended" in chat.ask("")
    forgot = ""
    for _ in range(4):
        forgot += chat.ask("sat on the mat in an old van and saw a")
    assert "oldest messages are dropped" in forgot
    assert "shorten it" in chat.ask("saw a " * 60)
    chat.type("\x03")
    chat.until(r"Ctrl-D leaves\)\s+> $")
    chat.type("\x04")
    assert chat.exit_code() == 0
    talks = [
        json.loads(line)["messages"] for line in (place / "talk.jsonl").read_text().splitlines()
    ]
    assert [m["role"] for m in talks[0]] == ["system", "user", "assistant", "user", "assistant"]
    assert talks[0][0]["content"] == "be brief" and talks[0][3]["content"].endswith(
        "hat <|im_end|>"
    )
    assert [m["role"] for m in talks[1]] == ["system"] and talks[2] == talks[1]


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(place):
    chat = Terminal(
        place, "--init_from=endless", "--interactive", "--max_new_tokens=100000", "--temperature=0"
    )
    chat.until(PROMPT)
    chat.type("the cat\n")
    chat.until("a{20}")
    os.kill(chat.pid, signal.SIGINT)
    assert chat.until(r"\(stopped\)\s+> $")
    assert "0 is greedy" in chat.ask("/help")
    chat.ask("/save stopped.jsonl")
    chat.type("/quit\n")
    assert chat.exit_code() == 0
    user, assistant = json.loads((place / "stopped.jsonl").read_text())["messages"]
    assert user["content"] == "the cat" and set(assistant["content"]) == {"a"}


def test_a_base_model_goes_on_with_the_text(place):
    run = sample(
        place,
        "--init_from=base",
        "--interactive",
        "--max_new_tokens=12",
        stdin="/help\nthe cat\n/system x\n",
    )
    assert "/system x: no such command" in run.stdout and ", chat" not in run.stderr
    assert "/save FILE" in run.stdout and "/system TEXT" not in run.stdout
    # Enter alone lets the model continue; a chat model continues a text with --chat=no
    sample(
        place,
        "--init_from=endless",
        "--chat=no",
        "--interactive",
        "--max_new_tokens=12",
        "--temperature=0",
        stdin="the cat\n\na hat\n/save text.jsonl\n",
    )
    text = json.loads((place / "text.jsonl").read_text())["text"]
    assert text == "the cat" + "a" * 24 + "\na hat" + "a" * 12


# --- in a browser


def test_web_says_how_to_install_what_is_missing(place):
    (place / "without" / "gradio").mkdir(parents=True)
    (place / "without" / "gradio" / "__init__.py").write_text("raise ImportError('no gradio')")
    run = sample(place, "--init_from=chat", "--web", code=1, PYTHONPATH=str(place / "without"))
    assert run.stderr.endswith("pip install 'gradio>=6'\n")
    run = sample(place, code=1, SPACE_ID="you/space")
    assert "MODEL" in run.stderr and run.stderr.count("\n") == 1


@pytest.fixture
def page(place):
    """The address of the page of a model that never ends a text; run as a Space, to test both."""
    pytest.importorskip("gradio", reason="needs gradio (pip install gradio)")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    args = ["--max_new_tokens=8000", "--temperature=0", f"--port={port}"]
    with open(place / "web.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, os.path.join(ROOT, "sample.py"), *args],
            cwd=place,
            stdout=log,
            stderr=log,
            env={**ENV, "SPACE_ID": "you/space", "MODEL": "endless"},
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert server.poll() is None, (place / "web.log").read_text()
            try:
                urllib.request.urlopen(address, timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def test_the_page_in_a_browser(page, place):
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright (pip install playwright)"
    )
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not browser:
        pytest.skip("needs a browser: no chromium is installed")
    with playwright.sync_playwright() as p:
        tab = p.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        tab.goto(page)
        box = tab.get_by_placeholder("Enter sends")
        box.fill("the cat <|im_end|>")
        box.press("Enter")
        said = tab.get_by_test_id("bot")

        def length():
            return len(said.inner_text())

        tab.wait_for_function(
            "document.querySelector('[data-testid=bot]')?.innerText.length > 5", timeout=20000
        )
        before = length()
        tab.wait_for_timeout(1000)
        assert length() > before  # it streams
        tab.locator("button.stop-button").click()
        tab.wait_for_timeout(1000)
        before = length()
        tab.wait_for_timeout(1000)
        assert length() == before < 8000 and "<|im_end|>" in tab.get_by_test_id("user").inner_text()

        tab.locator("button[role=tab]:visible", has_text="Text").click()
        text = tab.locator("#text textarea")
        text.fill("the cat")
        tab.get_by_role("button", name="Write on").click()
        tab.wait_for_function(
            "document.querySelector('#text textarea').value.length > 20", timeout=20000
        )
        tab.get_by_role("button", name="Stop", exact=True).click()
        tab.wait_for_timeout(1000)
        before = text.input_value()
        tab.wait_for_timeout(500)
        assert text.input_value() == before and before.startswith("the cat") and len(before) < 8000
        tab.close()
