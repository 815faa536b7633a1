"""
Generates text with a trained model.

    python sample.py                                           the newest checkpoint under out/
    python sample.py --start="Once upon a time" --num_samples=5
    python sample.py --start=FILE:prompt.txt --temperature=0   greedy: always the likeliest token
    python sample.py --init_from=HuggingFaceTB/SmolLM2-135M    a model directory, or a Hub id
    python sample.py --interactive                             chat, or write a text together
    python sample.py --prompts=in.jsonl --out_file=out.jsonl   many prompts, in batches
    python sample.py --web                                     a web page (pip install gradio)
    python sample.py --gguf=model.gguf                         for llama.cpp (pip install gguf)

A model trained on conversations answers `start` as its user's message, any other continues it;
--chat overrides this. The text is the same for any batch size, to the letter with float32.

As a Hugging Face Space: SDK gradio, `app_file: sample.py`, with model.py, prepare.py,
configurator.py and requirements.txt beside it, and the model's Hub id in a variable MODEL or in a
file of that name.
"""

import contextlib
import html
import importlib.util
import json
import os
import re
import sys
import threading
import time

from configurator import UserError, configure, counted

# fmt: off
# -----------------------------------------------------------------------------
# the model
out_dir = ""                  # a run, or one of its checkpoints; '': the newest run under out/
init_from = "resume"          # 'resume' (out_dir's newest step) | a model directory | a Hub id
# what to generate
start = ""                    # the prompt; FILE:prompt.txt reads a file; '': the end-of-text token
num_samples = 3               # how many samples of start (>= 1)
max_new_tokens = 500          # a sample ends here, or at its end-of-text token (>= 1, <= 10**7)
temperature = 0.8             # 0: greedy; higher values give more varied text (>= 0)
top_k = 200                   # sample from the k likeliest tokens only (>= 0); 0: from all
top_p = 1.0                   # from the likeliest with this probability together (>= 0, <= 1)
min_p = 0.0                   # relative to the likeliest token's probability (>= 0, <= 1)
repetition_penalty = 1.0      # above 1: tokens already in the text become less likely (> 0)
stop = ""                     # text that ends a sample (\n: line break); several: ["User:", "\n\n"]
seed = 1337                   # sample, prompt or turn i uses seed + i (>= 0, <= 2**62)
overflow = "slide"            # past the context: 'slide' (a chat drops old messages) | 'refuse'
chat = "auto"                 # 'auto' (if the model was trained on conversations) | 'yes' | 'no'
system = ""                   # the system message of a chat
# other ways to use the model
interactive = False           # in the terminal
prompts = ""                  # .jsonl of {"prompt": ...} or {"messages": ...}; .txt: one a line
out_file = ""                 # the .jsonl for the answers to prompts; '': standard output
batch_size = 8                # prompts that are answered in parallel (>= 1)
web = False                   # a web page
host = "127.0.0.1"            # of the page; 0.0.0.0 serves everyone who can reach this machine
port = 7860                   # of the page (>= 1, <= 65535)
max_seconds = 120.0           # an answer on the page ends after this time (> 0)
gguf = ""                     # writes the model to this file, for llama.cpp, Ollama, LM Studio
gguf_dtype = "float32"        # 'float32' | 'float16' | 'bfloat16' | 'q8_0'
# machine
device = "auto"               # 'auto' | 'cpu' | 'cuda' | 'cuda:...' (cuda:1, for example) | 'mps'
dtype = "auto"                # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile = False               # torch.compile; pays off only with many samples
# -----------------------------------------------------------------------------
# fmt: on
setup = configure(globals())

import prepare  # noqa: E402

prepare.read_secrets()


def read_text(path, key):
    try:
        with open(path, encoding="utf-8-sig") as f:
            return f.read()
    except UnicodeDecodeError as e:
        raise UserError(f"{key}={path}: not a UTF-8 text ({e.reason} at byte {e.start})") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{key}={path}: {getattr(e, 'strerror', None) or e}") from None


def parse_stop(stop):
    """The stop strings that --stop=TEXT or --stop='["TEXT", ...]' names."""
    if not stop.startswith("["):
        return [stop.replace("\\n", "\n")] if stop else []
    try:
        strings = json.loads(stop)
    except (ValueError, RecursionError) as e:
        strings = [e]
    if not all(isinstance(s, str) and s for s in strings):
        raise UserError(f'stop={stop[:80]}: expected a text, or a list such as ["User:", "\\n\\n"]')
    return strings


def without_surrogates(text):
    """`text` without halves of UTF-16 pairs, which a terminal or JSON's \\ud800 may contain."""
    return text.encode("utf-8", "replace").decode("utf-8")


# -----------------------------------------------------------------------------
# check the keys before torch is imported, so that mistakes are reported at once

if os.environ.get("SPACE_ID"):  # on a Hugging Face Space, this script is the page
    web, host = True, "0.0.0.0"
    init_from = os.environ.get("MODEL") or read_text("MODEL", "MODEL").strip()
if interactive + bool(prompts) + web + bool(gguf) > 1:
    raise UserError("--interactive, --prompts, --web and --gguf exclude each other: choose one")
if out_file and not prompts:
    raise UserError(f"out_file={out_file}: only the answers to --prompts=FILE go to a file")
for key, path in (("out_file", out_file), ("gguf", gguf)):
    if os.path.exists(path):
        raise UserError(f"{key}={path}: it exists already; choose another name, or remove it")
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise UserError(f"{key}={path}: its directory does not exist")
if gguf and not importlib.util.find_spec("gguf"):
    raise UserError(f"gguf={gguf}: it is written by a package: pip install gguf")
stops = parse_stop(stop)
if start.startswith("FILE:"):
    start = read_text(start[5:], "start")
start = without_surrogates(start)
prompts_text = read_text(prompts, "prompts") if prompts else ""
if out_dir and init_from == "resume" and not os.path.isdir(out_dir):
    raise UserError(f"out_dir={out_dir}: no such directory")

# -----------------------------------------------------------------------------
# load the model and its tokenizer

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what a Mac's GPU lacks, its CPU does
import torch  # noqa: E402

import runs  # noqa: E402
from model import (  # noqa: E402
    GPT,
    MemoryGuard,
    pack_weights,
    pick_device,
    pick_dtype,
    save_gguf,
)

if init_from == "resume":
    init_from = out_dir or runs.newest_run("out")
if gguf:
    device, dtype = "cpu", "float32"  # nothing is computed
device = pick_device(device)
directory = runs.model_directory(init_from)
tokenizer = prepare.load_tokenizer(directory)
model = GPT.from_pretrained(directory)
dtype, _ = pick_dtype(dtype, device, model)
model.to(device, getattr(torch, dtype)).eval()
window = model.config.max_positions  # tokens of context
if compile:
    model.hidden = torch.compile(model.hidden, dynamic=True)
elif device == "cpu" and dtype != "float16" and not gguf:  # most CPUs cannot pack float16
    pack_weights(model)
im_end = tokenizer.encode_special(prepare.IM_END)
sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
sampling["repetition_penalty"] = repetition_penalty


def end_tokens():
    """The ids that end a text: the tokenizer's, and those of generation_config.json."""
    path = os.path.join(directory, "generation_config.json")
    ids = prepare.read_json(path).get("eos_token_id") if os.path.exists(path) else None
    if ids is None:
        ids = []
    elif not isinstance(ids, list):
        ids = [ids]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise UserError(f"{path}: eos_token_id is {ids!r}, expected token ids")
    return [tokenizer.eos_id, *ids]  # -1, no token's id, where the tokenizer has none


def trained_on_chats():
    """Whether the model was trained on conversations.

    The chat tokens prove nothing, a tokenizer may have them before pretraining. A chat model's
    generation_config.json ends a text at <|im_end|>, and a run of ours knows its stage.
    """
    state = os.path.join(directory, "trainer.pt")
    if im_end is None or im_end in ends or not os.path.exists(state):
        return im_end in ends
    try:  # mmap: only the config is read, not gigabytes of optimizer state
        config = torch.load(state, map_location="cpu", weights_only=True, mmap=True)["config"]
        return config.get("stage", "pretrain") != "pretrain"
    except Exception as e:
        reason = f"damaged ({type(e).__name__}); --chat=yes or --chat=no does without it"
        raise UserError(f"{state}: {reason}") from None


ends = end_tokens()
chatting = chat == "yes" or (chat == "auto" and trained_on_chats())
if chatting:
    prepare.render_chat([], tokenizer)  # raises UserError if the tokenizer lacks the chat tokens
    ends.append(im_end)


def note(text):
    """Prints on standard error, apart from what the model writes."""
    print(text, file=sys.stderr, flush=True)


def show(text):
    print(prepare.for_terminal(text), end="", flush=True)


kind = ", chat" if chatting else ""
note(f"{directory}: {model.n_params() / 1e6:.1f}M parameters, {device}, {dtype}{kind}")

# -----------------------------------------------------------------------------
# from a prompt to token ids, and from token ids to text


def in_vocabulary(ids):
    """`ids`, if the embedding has a row for each; UserError for another model's tokenizer."""
    if max(ids) >= model.config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer gives the id {max(ids)}, the model's vocabulary has "
            f"{model.config.vocab_size} tokens: they do not belong together"
        )
    return ids


def encode_text(text, max_tokens):
    """(the ids of a text to continue, how many tokens may follow)."""
    # tokenize only what the context may hold: a prompt can have megabytes
    ids = tokenizer.encode(without_surrogates(text[-32 * window :])) or [tokenizer.start_id]
    if len(ids) >= window and overflow == "refuse":
        raise UserError(
            f"the prompt is longer than the context of {window:,} tokens: shorten it, or use only "
            "its end with --overflow=slide"
        )
    if len(ids) > window:
        note(f"the prompt is longer than the context of {window:,} tokens: only its end is used")
    if overflow == "refuse":
        max_tokens = min(max_tokens, window - len(ids))
    return in_vocabulary(ids), max_tokens


def encode_chat(messages, max_tokens, system=""):
    """(the ids up to the assistant's opening, how many tokens may follow, how many messages of
    `messages` were left out). The oldest are, to leave a quarter of the context for the answer."""
    messages = [dict(m, content=without_surrogates(m["content"])) for m in messages]
    head = []
    if messages[0]["role"] == "system":
        head = [messages.pop(0)]
    elif system:
        head = [{"role": "system", "content": without_surrogates(system)}]
    needed = min(max_tokens, window // 4) if overflow == "slide" else 1
    dropped = 0
    while True:
        conversation = head + messages
        if sum(len(m["content"]) for m in conversation) <= 32 * window:
            ids, _ = prepare.render_chat(conversation, tokenizer, add_generation_prompt=True)
            if len(ids) + needed <= window:
                return in_vocabulary(ids), min(max_tokens, window - len(ids)), dropped
        next_turns = [i for i, m in enumerate(messages) if i > 0 and m["role"] == "user"]
        too_long = f"this is longer than the context of {window:,} tokens"
        if not next_turns:
            raise UserError(f"{too_long}: shorten it")
        if overflow == "refuse":
            hint = "start again, or drop the oldest messages with --overflow=slide"
            raise UserError(f"{too_long}: {hint}")
        messages = messages[next_turns[0] :]
        dropped += next_turns[0]


class Completion:
    """A text as it is generated: token ids in, characters out.

    A character that spans several tokens is held back until it is complete, and the possible
    beginning of a stop string until it is one or is not.
    """

    def __init__(self, prompt):
        # the prompt's end is decoded along: SentencePiece drops the space of a first token
        self.ids = prompt[-8:]
        self.shown_from, self.shown_to = 0, len(self.ids)  # ids[shown_from:shown_to] were decoded
        self.text, self.held_back, self.n_tokens = "", "", 0
        self.finish_reason = ""  # "stop", "length", or "" while it is growing

    def add(self, token=None):
        """Takes a token id, or None if no more will come; returns the text that is now certain."""
        if token is None:
            self.finish_reason = "length"
        elif token in ends:
            self.finish_reason = "stop"
        else:
            self.ids.append(token)
            self.n_tokens += 1
        before = tokenizer.decode(self.ids[self.shown_from : self.shown_to])
        new = tokenizer.decode(self.ids[self.shown_from :])[len(before) :]
        if new.endswith("\ufffd") and not self.finish_reason:
            return ""
        self.shown_from, self.shown_to = self.shown_to, len(self.ids)
        certain, self.held_back = self._split_at_stop(self.held_back + new)
        self.text += certain
        return certain

    def _split_at_stop(self, text):
        """(what is certain, what may be the beginning of a stop string)."""
        positions = [text.find(s) for s in stops if s in text]
        if positions:
            self.finish_reason = "stop"
            return text[: min(positions)], ""
        if self.finish_reason:
            return text, ""
        beginnings = [n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])]
        cut = len(text) - max(beginnings, default=0)
        return text[:cut], text[cut:]

    def stream(self, prompt, max_tokens, seed, sampling):
        """Generates the text; yields its pieces."""
        idx = torch.tensor([prompt], device=device)  # (1, T)
        for token in model.stream(idx, max_tokens, seed=seed, stop=ends, **sampling):
            yield self.add(token.item())
            if self.finish_reason:
                return
        yield self.add()


# -----------------------------------------------------------------------------
# samples of one prompt


def write_samples():
    began, n_tokens, header = time.perf_counter(), 0, start
    try:
        if chatting and start:
            header += "\n"
            message = {"role": "user", "content": start}
            prompt, max_tokens, _ = encode_chat([message], max_new_tokens, system)
        else:
            prompt, max_tokens = encode_text(start, max_new_tokens)
    except UserError as e:
        raise UserError(f"start={start[:80]!r}: {e}") from None
    for i in range(num_samples):
        show(header)
        completion = Completion(prompt)
        for piece in completion.stream(prompt, max_tokens, seed + i, sampling):
            show(piece)
        show("\n---------------\n")
        n_tokens += completion.n_tokens
    note(f"{n_tokens / (time.perf_counter() - began):,.0f} tokens/s")


# -----------------------------------------------------------------------------
# a file of prompts


def encode_record(record):
    """(ids, how many tokens may follow) of a record of the prompts file."""
    prompt = record.get("messages", record.get("prompt")) if isinstance(record, dict) else None
    if not isinstance(prompt, (str, list)):
        raise ValueError('expected an object with a "prompt" or with "messages"')
    if isinstance(prompt, str) and not chatting:
        return encode_text(prompt, max_new_tokens)
    if not chatting:
        raise ValueError("messages, but the model was not trained on conversations; see --chat=yes")
    messages = prepare._messages(prompt, "prompt" if isinstance(prompt, str) else "messages")
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's: there is nothing to answer")
    return encode_chat(messages, max_new_tokens, system)[:2]


def read_prompts():
    """[(record, ids, how many tokens may follow)] of the prompts file."""
    kind = prepare._kind_of(prompts)[0]
    if kind in ("table", "parquet"):
        raise UserError(
            f"prompts={prompts}: expected a .jsonl file, or a .txt of one prompt a line"
        )
    is_json = kind == "lines"  # .jsonl, .ndjson, .json, in any case
    lines = prompts_text.split("\n")
    if is_json:
        with contextlib.suppress(ValueError, RecursionError):  # one array or object, in any layout
            whole = json.loads(prompts_text)
            records = whole if isinstance(whole, list) else [whole]
            lines = [json.dumps(record) for record in records]
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line) if is_json else {"prompt": line}
            requests.append((record, *encode_record(record)))
        except prepare.Skipped as e:
            raise UserError(f"{prompts}, line {number}: a record {e}; leave it out") from None
        except json.JSONDecodeError as e:
            reason = f"not JSON: {e.msg} at character {e.pos + 1}"
            raise UserError(f"{prompts}, line {number}: {reason}") from None
        except (ValueError, RecursionError) as e:  # of encode_record(), or a UserError
            raise UserError(f"{prompts}, line {number}: {e}") from None
    if not requests:
        raise UserError(f"prompts={prompts}: there is no prompt in it")
    note(f"{prompts}: {len(requests):,} prompts, {'JSON' if is_json else 'one a line'}")
    return requests


def answer_line(record, completion):
    answer = {"completion": completion.text, "finish_reason": completion.finish_reason}
    return json.dumps(record | answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def answer_prompts():
    """Answers a file of prompts in its order. Only whole lines remain, whatever interrupts it."""
    requests, began = read_prompts(), time.perf_counter()
    n_answers = n_tokens = size = 0
    where, mode = (out_file, "xb") if out_file else (os.dup(sys.stdout.fileno()), "wb")
    output = open(where, mode, buffering=0)  # noqa: SIM115  unbuffered: what is written is known
    try:
        for completions in complete_all(requests):
            data = b"".join(answer_line(requests[i][0], c) for i, c in sorted(completions.items()))
            rest = data
            while rest:  # a disk that is nearly full takes a part, and raises at the next call
                rest = rest[output.write(rest) :]
            size += len(data)
            n_answers += len(completions)
            n_tokens += sum(completion.n_tokens for completion in completions.values())
    except (KeyboardInterrupt, OSError, UserError) as e:
        place = ""
        if not out_file:
            e.filename = "standard output"
        elif n_answers:
            output.truncate(size)
            place = f" in {out_file}"
        else:
            output.close()
            os.remove(out_file)
        note(f"stopped: {n_answers:,} of {len(requests):,} prompts are answered{place}")
        raise
    speed = n_tokens / (time.perf_counter() - began)
    note(f"{counted(len(requests), 'prompt')}, {speed:,.0f} tokens/s")


def complete_all(requests):
    """Yields {i: Completion} of the next 16 batches of requests, until all are complete."""
    memory = MemoryGuard(device, "batch_size", "set a smaller --max_new_tokens")
    size = batch_size
    with prepare.progress(total=len(requests), unit=" prompts") as bar:
        for first in range(0, len(requests), 16 * batch_size):
            waiting = list(range(first, min(first + 16 * batch_size, len(requests))))
            waiting.sort(key=lambda i: len(requests[i][1]))  # similar lengths: little padding
            completions = {}
            while waiting:
                batch = next_batch(requests, waiting, size)
                with memory:
                    completed = complete_batch({i: requests[i][1:] for i in batch})
                if memory.ran_out:
                    size = memory.halve(len(batch))
                    note(f"out of memory: batch_size={size} from here on, for the same texts")
                    continue
                waiting = [i for i in waiting if i not in batch]
                completions |= completed
                bar.update(len(batch))
            yield completions


def next_batch(requests, waiting, size):
    """The longest of the requests in `waiting`, at most `size`.

    Where the context slides depends on a row's length, padding included, so a row may only be
    padded if no row of the batch slides.
    """
    longest = len(requests[waiting[-1]][1])
    most_tokens = max(requests[i][2] for i in waiting)
    fits = longest + most_tokens <= window
    return [i for i in waiting[-size:] if fits or len(requests[i][1]) == longest]


def complete_batch(rows):
    """{i: (ids, how many tokens may follow)} -> {i: Completion}"""
    longest = max(len(ids) for ids, _ in rows.values())
    pad = torch.tensor([longest - len(ids) for ids, _ in rows.values()])  # (B,)
    padded = [ids[:1] * (longest - len(ids)) + ids for ids, _ in rows.values()]
    idx = torch.tensor(padded, device=device)  # (B, T)
    completions = {i: Completion(ids) for i, (ids, _) in rows.items()}
    max_tokens = max(limit for _, limit in rows.values())
    seeds = [seed + i for i in rows]
    for tokens in model.stream(idx, max_tokens, seed=seeds, stop=ends, pad=pad, **sampling):
        for (i, completion), token in zip(completions.items(), tokens.tolist(), strict=True):
            if completion.finish_reason:
                continue
            completion.add(token)
            if completion.n_tokens == rows[i][1] and not completion.finish_reason:
                completion.add()
        if all(completion.finish_reason for completion in completions.values()):
            break
    return completions


# -----------------------------------------------------------------------------
# in the terminal

COMMANDS = {
    "/reset": "start again",
    "/system TEXT": "the system message",
    "/temperature 0.7": "0 is greedy",
    "/save FILE": "append this conversation to FILE, as one line of JSON",
    "/quit": "or Ctrl-D; Ctrl-C stops an answer",
}
if not chatting:
    del COMMANDS["/system TEXT"]


class Conversation:
    """The messages of a chat; without chat, one text that the model and the user write together."""

    def __init__(self):
        self.system, self.sampling = system, dict(sampling)
        self.reset()

    def reset(self):
        self.messages, self.text = [], ""
        self.ended = False  # the model ended the text; what the user writes next starts another
        self.n_answers = 0

    def command(self, line):
        """Executes a line such as "/save FILE"."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/help":
            for command, what in COMMANDS.items():
                print(f"{command:18}  {what}")
        elif name == "/reset":
            self.reset()
        elif name == "/system" and chatting:
            self.system = argument
        elif name == "/temperature" and re.fullmatch(r"\d*\.?\d+", argument):
            self.sampling["temperature"] = setup.check("temperature", float(argument))
        elif name == "/save" and argument:
            self.save(argument)
        else:
            hint = "/help lists the commands; put a space before a text that begins with /"
            raise UserError(f"{line[:60]}: no such command; {hint}")

    def save(self, path):
        head = [{"role": "system", "content": self.system}] if self.system else []
        record = {"messages": head + self.messages} if chatting else {"text": self.text}
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
        print(f"appended to {path}")

    def reply(self, line):
        """Answers the user's message."""
        messages = [*self.messages, {"role": "user", "content": line}]
        prompt, max_tokens, dropped = encode_chat(messages, max_new_tokens, self.system)
        if dropped:
            note(f"(the context is full: {dropped} oldest messages are dropped)")
        answer = self.generate(prompt, max_tokens)
        self.messages = [*messages[dropped:], {"role": "assistant", "content": answer.text}]

    def extend(self, line):
        """Appends the line to the text and lets the model continue it."""
        text = "" if self.ended else self.text
        if text and line:
            text += "\n"
        text += line
        completion = self.generate(*encode_text(text, max_new_tokens))
        self.text = text + completion.text
        self.ended = completion.finish_reason == "stop"
        if self.ended:
            print("(the text ends here; what you write next starts another)")

    def generate(self, prompt, max_tokens):
        completion = Completion(prompt)
        try:
            pieces = completion.stream(prompt, max_tokens, seed + self.n_answers, self.sampling)
            for piece in pieces:
                show(piece)
            print()
        except KeyboardInterrupt:
            print("  (stopped)")
        self.n_answers += 1
        return completion


def converse():
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() has arrow keys once it is imported
    sys.stdin.reconfigure(errors="replace")
    conversation = Conversation()
    continue_hint = "" if chatting else ", Enter alone lets the model continue"
    print(f"/help lists the commands, Ctrl-D leaves{continue_hint}")
    while True:
        try:
            line = without_surrogates(input("> "))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("  (Ctrl-D leaves)")
            continue
        if line.strip() == "/quit":
            return
        try:
            if line.startswith("/"):
                conversation.command(line)
            elif not chatting:
                conversation.extend(line)
            elif line.strip():
                conversation.reply(line)
        except (UserError, OSError) as e:  # reported, and the conversation continues
            print(e)


# -----------------------------------------------------------------------------
# a web page


most_on_page = max(window, max_new_tokens)  # tokens of an answer, whatever a visitor asks for


def generate_for_page(encode, prompt, settings):
    """Yields the growing completion of a text or of messages; `settings` are the page's inputs, of
    which a visitor may send any."""
    import gradio as gr

    temperature, top_p, top_k, max_tokens, seed, *system = settings
    deadline = time.monotonic() + max_seconds
    try:
        chosen = {
            "temperature": setup.check("temperature", float(temperature)),
            "top_p": setup.check("top_p", float(top_p)),
            "top_k": setup.check("top_k", int(top_k or 0)),
        }
        max_tokens = min(setup.check("max_new_tokens", int(max_tokens)), most_on_page)
        seed = setup.check("seed", int(seed or 0))
        ids, max_tokens, *dropped = encode(prompt, max_tokens, *system)
        if any(dropped):
            gr.Info(f"The context is full: {dropped[0]} oldest messages are dropped")
        completion = Completion(ids)
        for _ in completion.stream(ids, max_tokens, seed, sampling | chosen):
            yield completion.text
            if time.monotonic() > deadline:
                gr.Info(f"Stopped after {max_seconds:g} seconds")
                return
    except UserError as e:  # it may quote what was typed, and is shown as HTML
        raise gr.Error(html.escape(str(e)), print_exception=False) from None
    except torch.OutOfMemoryError:
        raise gr.Error("Out of memory: ask for fewer tokens", print_exception=False) from None


def page_chat(message, history, *settings):
    """Yields the answer as HTML, which is what Gradio takes it for."""
    messages = []
    for m in history:  # since Gradio 6, the content of a message is a list of parts
        content = "".join(part.get("text", "") for part in m["content"])
        if m["role"] == "assistant":
            content = html.unescape(content)
        messages.append({"role": m["role"], "content": content})
    messages.append({"role": "user", "content": message})
    for completion in generate_for_page(encode_chat, messages, settings):
        yield html.escape(completion)


def page_text(text, *settings):
    for completion in generate_for_page(encode_text, text, settings):
        yield text + completion


def build_page(gr):
    name = os.path.basename(os.path.normpath(init_from))
    limits = {"max_length": 32 * window}  # characters: more is not read
    with gr.Blocks(title=f"{name} · nanosmol") as page:
        size = f"{model.n_params() / 1e6:.1f}M parameters"
        gr.Markdown(f"## {html.escape(name)}\n{size} · {window:,} tokens of context")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                settings = [
                    gr.Slider(0, 2, temperature, step=0.05, label="Temperature", info="0: greedy"),
                    gr.Slider(0, 1, top_p, step=0.01, label="Top-p"),
                    gr.Slider(0, 1000, top_k, step=1, label="Top-k", info="0: all"),
                    gr.Slider(1, most_on_page, max_new_tokens, step=1, label="Length in tokens"),
                    gr.Number(seed, label="Seed", precision=0),
                ]
                system_box = gr.Textbox(system, label="System message", visible=chatting)
            with gr.Column(scale=3):
                if chatting:
                    with gr.Tab("Chat"):
                        chat_log = gr.Chatbot(height=460, show_label=False, render_markdown=False)
                        message = gr.Textbox(placeholder="Enter sends", show_label=False, **limits)
                        gr.ChatInterface(
                            page_chat,
                            chatbot=chat_log,
                            textbox=message,
                            additional_inputs=[*settings, system_box],
                        )
                with gr.Tab("Text"):
                    # of one line: in a taller box, Gradio makes Enter a line break
                    text = gr.Textbox(
                        start,
                        max_lines=18,
                        placeholder="Once upon a time (Enter: write on, Shift+Enter: a new line)",
                        show_label=False,
                        elem_id="text",
                        **limits,
                    )
                    with gr.Row():
                        write_on = gr.Button("Write on", variant="primary")
                        stop_button = gr.Button("Stop")
                    triggers = [write_on.click, text.submit]
                    event = gr.on(triggers, page_text, [text, *settings], text)
                    stop_button.click(None, cancels=event)
    return page


def serve():
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr

        if int(gr.__version__.split(".")[0]) < 6:  # messages had another format
            raise ImportError
    except ImportError:
        hint = "pip install 'gradio>=6'"
        raise UserError(f"web=True needs Gradio 6, which is not installed: {hint}") from None
    page = build_page(gr)
    theme = gr.themes.Default(font=["sans-serif"], font_mono=["monospace"])
    options = {"show_error": True, "footer_links": [], "ssr_mode": False, "theme": theme}
    options |= {"quiet": True, "prevent_thread_lock": True}  # its hints are about other things
    try:
        page.launch(server_name=host, server_port=port, **options)
    except OSError as e:
        raise UserError(f"host={host}, port={port}: {e}") from None
    note(f"http://{host}:{port} in a browser; Ctrl-C ends it")
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


# -----------------------------------------------------------------------------
# a file for llama.cpp


def write_gguf():
    """Writes the model to the file `gguf`; UserError if llama.cpp cannot run it."""
    if prepare.read_json(os.path.join(directory, "config.json"))["model_type"] == "nanosmol":
        reason = "its config.json says model_type nanosmol, a maths that llama.cpp does not know"
        raise UserError(f"gguf={gguf}: {directory} cannot be written: {reason}")
    vocabulary = tokenizer.gguf_vocabulary(model.config.vocab_size)
    matrices = save_gguf(model, gguf, gguf_dtype, vocabulary)
    kept = ""
    if gguf_dtype == "q8_0" and "F16" in matrices:
        kept = f" ({matrices['F16']} matrices float16: their rows are no multiple of 32)"
    size = os.path.getsize(gguf) / 1e6
    pre = vocabulary["tokenizer.ggml.pre"]
    note(f"{gguf}: {gguf_dtype}{kept}, {size:,.1f} MB, llama.cpp's pre-tokenizer {pre}")


# -----------------------------------------------------------------------------

try:
    if gguf:
        write_gguf()
    elif interactive:
        converse()
    elif prompts:
        answer_prompts()
    elif web:
        serve()
    else:
        write_samples()
except KeyboardInterrupt:
    sys.exit(130)
except torch.OutOfMemoryError:
    raise UserError("out of GPU memory: try a smaller --batch_size or --max_new_tokens") from None
