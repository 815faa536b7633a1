"""The web page, asked as a browser asks it: its limits, what it escapes, what Enter does."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from conftest import ROOT

import prepare
from model import GPT, GPTConfig

pytest.importorskip("gradio", minversion="6", reason="needs gradio (pip install 'gradio>=6')")


def says(text, directory):
    """Writes a chat model that says one character for ever."""
    tokenizer = prepare.with_chat_tokens(prepare.load_tokenizer("byte"))
    config = dict(n_layer=1, n_embd=8, n_head=1, block_size=64, tie_embeddings=False)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **config))
    with torch.no_grad():
        model.embed.weight.fill_(1)
        model.head.weight.zero_()[tokenizer.encode(text)[0]] = 1
        model.blocks[0].attn.proj.weight.zero_()
        model.blocks[0].mlp.down.weight.zero_()
    ends = [tokenizer.eos_id, tokenizer.encode_special("<|im_end|>")]
    model.save_pretrained(directory, generation=tokenizer.special_ids(ends))
    tokenizer.save(directory)


@pytest.fixture
def page(here):
    """The address of the page of a model that says "<" for ever."""
    says("<", "model")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = ["--init_from=model", "--web", f"--port={port}", "--temperature=0"]
    options += ["--max_new_tokens=1000000", "--max_seconds=2", "--dtype=float32"]
    with open("log", "w") as log:
        command = [sys.executable, os.path.join(ROOT, "sample.py"), *options]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert server.poll() is None, open("log").read()
            if address in open("log").read():
                break
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def called(page, name, *data):
    """(the seconds that it took, the last event, its data) of a function of the page."""
    address, began = f"{page}/gradio_api/call/{name}", time.monotonic()
    body = json.dumps({"data": data}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request))["event_id"]
    last = urllib.request.urlopen(f"{address}/{event}").read().decode().strip().split("\n\n")[-1]
    kind, data = last.split("\n")
    return time.monotonic() - began, kind.removeprefix("event: "), json.loads(data[6:])


def test_the_page(page):
    # what Gradio says about itself is not shown
    assert len(open("log").read().splitlines()) == 2
    # each box says what it is for; Enter, which Gradio calls submit, generates
    config = json.load(urllib.request.urlopen(f"{page}/config"))
    boxes = {c["id"]: c["props"] for c in config["components"] if c["type"] == "textbox"}
    enter = {
        box for d in config["dependencies"] for box, event in d["targets"] if event == "submit"
    }
    hints = {boxes[box]["placeholder"]: boxes[box]["lines"] for box in enter}
    assert sorted(hints.values()) == [1, 1] and all("Enter" in hint for hint in hints)
    # a generation ends in time, and in length, whatever is asked for
    settings = [0, 1, 0, 1_000_000, 1]
    seconds, kind, text = called(page, "page_text", "abc", *settings)
    assert kind == "complete" and text[0].startswith("abc<<<") and 2 < seconds < 10
    # what the model says is shown as text, not as HTML
    settings[3] = 3
    seconds, kind, answer = called(page, "page_chat", "a <b> c", *settings, "")
    assert kind == "complete" and answer[0] == "&lt;" * 3
    # what is mistyped is answered, and what it quotes is no HTML
    seconds, kind, error = called(page, "page_text", "abc", 0, 1, 0, 3, 2.0**70)
    assert kind == "error" and "seed=" in error["error"]
