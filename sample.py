"""
A finished model in use.

    python sample.py                                           the newest run under out/, newest checkpoint
    python sample.py --start="Once upon a time" --num_samples=5
    python sample.py --start=FILE:prompt.txt --temperature=0   greedy: the likeliest token, always
    python sample.py --init_from=HuggingFaceTB/SmolLM2-135M    a model directory, or a Hub id
    python sample.py --interactive                             chat in the terminal, or write a text together
    python sample.py --prompts=in.jsonl --out_file=out.jsonl   many prompts, in batches
    python sample.py --web                                     a page at 127.0.0.1:7860 (pip install gradio)

A model that was trained on conversations takes a text as its user's turn, any other one goes on with it;
--chat decides otherwise. The same text comes out whatever the batch: to the letter with --dtype=float32.

As a Hugging Face Space: SDK gradio, `app_file: sample.py`, with model.py, prepare.py, configurator.py and
requirements.txt beside it, and the model's Hub id in a variable MODEL or in a file of that name.
"""
import json
import os
import re
import sys
import time

from configurator import UserError, configure

# -----------------------------------------------------------------------------
# which model
out_dir = ''                  # a run, or one checkpoint of it; '': the newest run under out/
init_from = 'resume'          # 'resume': out_dir's newest checkpoint | a model directory | a Hub id
# what to write
start = ''                    # the prompt; FILE:prompt.txt reads it from a file; '': the end-of-text token
num_samples = 3               # of start
max_new_tokens = 500          # each ends here, or at its end-of-text token
temperature = 0.8             # 0: greedy; below 1: likelier words; above 1: wilder ones
top_k = 200                   # only the k likeliest tokens; 0: all
top_p = 1.0                   # only the likeliest that hold this much probability together
min_p = 0.0                   # only those at least this many times as likely as the likeliest
repetition_penalty = 1.0      # above 1: what was already said becomes less likely
stop = ''                     # a text that ends it (\n is a line break); several: ["User:", "\n\n"]
seed = 1337                   # sample i, prompt i, turn i draws from seed + i
overflow = 'slide'            # beyond the window: 'slide' (a chat forgets its oldest turns) | 'refuse'
chat = 'auto'                 # 'auto': if it was trained on conversations | 'yes' | 'no'
system = ''                   # chat: the system message
# another way to use it
interactive = False           # in the terminal
prompts = ''                  # a .jsonl of {"prompt": ...} or {"messages": ...}; any other file: one a line
out_file = ''                 # prompts: the .jsonl to write; '': standard output
batch_size = 8                # prompts: answered side by side
web = False                   # a web page
host = '127.0.0.1'            # web: 0.0.0.0 opens it to everyone who can reach this machine
port = 7860                   # web
# machine
device = 'auto'               # 'auto' | 'cpu' | 'cuda' | 'mps'
dtype = 'auto'                # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile = False               # torch.compile: pays back over many samples only
# -----------------------------------------------------------------------------
configure(globals())

import prepare
import runs

prepare.read_secrets()

ALLOWED = {
    'num_samples': ('at least 1', lambda v: v >= 1), 'max_new_tokens': ('at least 1', lambda v: v >= 1),
    'temperature': ('at least 0', lambda v: 0 <= v < float('inf')), 'top_k': ('at least 0', lambda v: v >= 0),
    'top_p': ('0 to 1', lambda v: 0 <= v <= 1), 'min_p': ('0 to 1', lambda v: 0 <= v <= 1),
    'repetition_penalty': ('more than 0', lambda v: 0 < v < float('inf')),
    'seed': ('0 to 2^62', lambda v: 0 <= v <= 2 ** 62), 'batch_size': ('at least 1', lambda v: v >= 1),
    'overflow': ("'slide' or 'refuse'", lambda v: v in ('slide', 'refuse')),
    'chat': ("'auto', 'yes' or 'no'", lambda v: v in ('auto', 'yes', 'no')),
    'port': ('1 to 65535', lambda v: 1 <= v <= 65535),
    'dtype': ("'auto', 'float32', 'bfloat16' or 'float16'", lambda v: v in ('auto', 'float32', 'bfloat16', 'float16'))}


def check(**values):
    """Keys from the command line, or from the page."""
    for key, value in values.items():
        if not ALLOWED[key][1](value):
            raise UserError(f"{key}={value!r}: expected {ALLOWED[key][0]}")


def read(path, key):
    try:
        with open(path, encoding='utf-8-sig') as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{key}={path}: {e}") from None


def clean(text):
    """`text` without half characters: a terminal, or JSON's \\ud800, can hand them over."""
    return text.encode('utf-8', 'replace').decode('utf-8')


if os.environ.get('SPACE_ID'):  # on a Hugging Face Space this file is the page
    web, host, init_from = True, '0.0.0.0', os.environ.get('MODEL') or read('MODEL', 'MODEL').strip()
check(**{key: globals()[key] for key in ALLOWED})
if interactive + bool(prompts) + web > 1:
    raise UserError("--interactive, --prompts and --web are three ways to use a model: choose one")
if out_file and not prompts:
    raise UserError(f"out_file={out_file}: only the answers to --prompts=FILE are written to a file")
if os.path.exists(out_file):
    raise UserError(f"out_file={out_file}: it exists already; choose another name, or remove it")
if not os.path.isdir(os.path.dirname(os.path.abspath(out_file))):
    raise UserError(f"out_file={out_file}: its directory does not exist")
try:
    stops = json.loads(stop) if stop.startswith('[') else [stop.replace('\\n', '\n')] if stop else []
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError("not a text, or an empty one")
except ValueError as e:
    raise UserError(f'stop={stop}: expected a text, or a list such as ["User:", "\\n\\n"] ({e})') from None
if start.startswith('FILE:'):
    start = read(start[5:], 'start')
start = clean(start)
if init_from == 'resume':
    init_from = out_dir or runs.newest_run('out')
    if not os.path.isdir(init_from):
        raise UserError(f"out_dir={out_dir}: no such directory")

# -----------------------------------------------------------------------------
# the model, and what ends its texts

import torch  # this late, so that a mistake above is told at once

from model import GPT, pack_weights, pick_device, pick_dtype

device = pick_device(device)
directory = runs.model_directory(init_from)
tokenizer = prepare.load_tokenizer(directory)
model = GPT.from_pretrained(directory)
dtype = pick_dtype(dtype, device, model.config)
model.to(device, getattr(torch, dtype)).eval()
window = model.config.max_positions
if compile:
    model.hidden = torch.compile(model.hidden, dynamic=True)
elif device == 'cpu':
    pack_weights(model)

im_end, ends = tokenizer.encode_special(prepare.IM_END), [tokenizer.eos_id]
path = os.path.join(directory, 'generation_config.json')
if os.path.exists(path):
    declared = prepare.read_json(path).get('eos_token_id') or []
    declared = declared if isinstance(declared, list) else [declared]
    if not all(isinstance(i, int) for i in declared):
        raise UserError(f"{path}: eos_token_id is {declared!r}, expected token ids")
    ends += declared


def trained_to_chat():
    """A tokenizer may hold the chat tokens from its first day, so they prove nothing. What was taught to
    talk ends a turn with <|im_end|>, and its files say so; a run of ours knows its stage."""
    state = os.path.join(directory, 'trainer.pt')
    if im_end is None or im_end in ends or not os.path.exists(state):
        return im_end in ends
    try:
        config = torch.load(state, map_location='cpu', weights_only=True, mmap=True)['config']  # the rest is gigabytes
    except Exception as e:
        raise UserError(f"{state}: damaged; --chat=yes or --chat=no does without it ({type(e).__name__})") from None
    return config.get('stage', 'pretrain') != 'pretrain'


chatting = trained_to_chat() if chat == 'auto' else chat == 'yes'
if chatting:
    prepare.render_chat([], tokenizer)  # says what a tokenizer lacks that can't
    ends.append(im_end)
how = {k: globals()[k] for k in ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')}


def note(text):
    print(text, file=sys.stderr, flush=True)


def show(text):
    print(prepare.for_terminal(text), end='', flush=True)


sys.stdout.reconfigure(errors='replace')  # a terminal that can't show a character shows a ? in its place
note(f"{directory}: {model.n_params() / 1e6:.1f}M parameters, {device}, {dtype}" + ", chat" * chatting)

# -----------------------------------------------------------------------------
# from a prompt to ids, from ids to a text

def encode_text(text, length):
    """(the ids of a text to go on with, how many tokens may follow)"""
    # only the end of what is beyond the window is read, so ten megabytes are cut before they are tokenized
    ids = tokenizer.encode(clean(text[-32 * window:])) or [tokenizer.eos_id]
    if len(ids) >= window and overflow == 'refuse':
        raise UserError(f"the prompt is longer than the window of {window:,} tokens: shorten it, or read "
                        "only its end with --overflow=slide")
    if len(ids) > window:
        note(f"the prompt is longer than the window of {window:,} tokens: only its end is read")
    return ids, length if overflow == 'slide' else min(length, window - len(ids))


def encode_chat(turns, length, told):
    """(the ids up to the assistant's opening, how many tokens may follow, how many of the oldest messages
    were left out to keep a quarter of the window for the answer). `told` is the system message, or ''."""
    turns = [dict(m, content=clean(m['content'])) for m in turns]
    if told and turns[0]['role'] != 'system':
        turns.insert(0, dict(role='system', content=clean(told)))
    head, turns, dropped = turns[:turns[0]['role'] == 'system'], turns[turns[0]['role'] == 'system':], 0
    free = min(length, window // 4) if overflow == 'slide' else 1
    while True:
        if sum(len(m['content']) for m in head + turns) <= 32 * window:
            ids = prepare.render_chat(head + turns, tokenizer, add_generation_prompt=True)[0]
            if len(ids) + free <= window:
                return ids, min(length, window - len(ids)), dropped
        later = [i for i, m in enumerate(turns) if i and m['role'] == 'user']
        if overflow == 'refuse' or not later:
            raise UserError(f"this is longer than the window of {window:,} tokens: " + (
                "begin anew, or forget the oldest turns with --overflow=slide" if later else "shorten it"))
        turns, dropped = turns[later[0]:], dropped + later[0]


class Text:
    """One text as it grows: ids in, characters out. Half a character waits for its other half, and what could
    be the beginning of a stop string waits until it is one or is not."""

    def __init__(self, prompt):
        # decoded behind the end of the prompt: SentencePiece takes the space off whatever comes first
        self.ids, self.since, self.known = prompt[-8:], 0, len(prompt[-8:])
        self.text, self.held, self.tokens, self.finish_reason = '', '', 0, ''

    def add(self, token=None):
        """Takes an id, or None when no more will come; returns what may be shown now."""
        if token is None or token in ends:
            self.finish_reason = 'length' if token is None else 'stop'
        else:
            self.ids.append(token)
            self.tokens += 1
        before = tokenizer.decode(self.ids[self.since:self.known])
        new = tokenizer.decode(self.ids[self.since:])[len(before):]
        if new.endswith('\ufffd') and not self.finish_reason:
            return ''
        self.since, self.known, self.held, keep = self.known, len(self.ids), self.held + new, 0
        found = [at for at in map(self.held.find, stops) if at >= 0]
        if found:
            self.held, self.finish_reason = self.held[:min(found)], 'stop'
        elif not self.finish_reason:
            keep = max((n for s in stops for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        out = self.held[:len(self.held) - keep]
        self.text, self.held = self.text + out, self.held[len(out):]
        return out

    def stream(self, prompt, length, seed, how):
        for token in model.stream(torch.tensor([prompt], device=device), length, seed=seed, stop=ends, **how):
            yield self.add(token.item())
            if self.finish_reason:
                return
        yield self.add()


# -----------------------------------------------------------------------------
# four ways to use it

def write_samples():
    as_turn, tokens, begun = chatting and start, 0, time.perf_counter()
    prompt, length = encode_text(start, max_new_tokens) if not as_turn else \
        encode_chat([dict(role='user', content=start)], max_new_tokens, system)[:2]
    for i in range(num_samples):
        show(start + ('\n' if as_turn else ''))
        text = Text(prompt)
        for piece in text.stream(prompt, length, seed + i, how):
            show(piece)
        tokens += text.tokens
        show('\n---------------\n')
    note(f"{tokens / (time.perf_counter() - begun):,.0f} tokens a second")


def encode_record(record):
    asked = record.get('messages', record.get('prompt')) if isinstance(record, dict) else None
    if not isinstance(asked, (str, list)):
        raise ValueError('expected an object with a "prompt" or with "messages"')
    if isinstance(asked, str) and not chatting:
        return encode_text(asked, max_new_tokens)
    if not chatting:
        raise ValueError("messages, to a model that was not trained on conversations; --chat=yes insists")
    asked = prepare._messages(asked, 'prompt' if isinstance(asked, str) else 'messages')
    if asked[-1]['role'] == 'assistant':
        raise ValueError("the last message is the assistant's, there is nothing to answer")
    return encode_chat(asked, max_new_tokens, system)[:2]


def answer_file():
    found, tokens, begun = [], 0, time.perf_counter()
    for n, line in enumerate(read(prompts, 'prompts').split('\n'), 1):
        if line.strip():
            try:
                record = json.loads(line) if prompts.endswith('.jsonl') else {'prompt': line}
                found.append((record, *encode_record(record)))
            except (ValueError, RecursionError) as e:  # json's own, and UserError is one too
                raise UserError(f"{prompts}, line {n}: {e}") from None
    if not found:
        raise UserError(f"prompts={prompts}: there is no prompt in it")
    try:
        out = open(out_file, 'xb', buffering=0) if out_file else sys.stdout.buffer
    except OSError as e:
        raise UserError(f"out_file={out_file}: {e}") from None
    written = size = 0  # answers, and their bytes
    try:
        for texts in answers(found):
            lines = [json.dumps(found[i][0] | dict(completion=texts[i].text, finish_reason=texts[i].finish_reason),
                                ensure_ascii=False) + '\n' for i in sorted(texts)]
            rest = whole = ''.join(lines).encode('utf-8', 'replace')
            while rest:  # a disk that fills up takes a part, and refuses the next
                rest = rest[out.write(rest):]
            out.flush()
            written, size = written + len(texts), size + len(whole)
            tokens += sum(text.tokens for text in texts.values())
    except (KeyboardInterrupt, OSError):
        if out_file and written:
            out.truncate(size)
        elif out_file:
            os.remove(out_file)
        note(f"stopped: {written:,} of {len(found):,} prompts are answered" + (f" in {out_file}" if written and out_file else ''))
        raise
    note(f"{len(found):,} prompts, {tokens / (time.perf_counter() - begun):,.0f} tokens a second")


def answers(found):
    """{i: Text} of the next 16 batches of prompts in the file's order, until all are answered."""
    with prepare.progress(total=len(found), unit=' prompts') as bar:
        for lo in range(0, len(found), 16 * batch_size):
            texts, todo = {}, list(range(lo, min(lo + 16 * batch_size, len(found))))
            todo.sort(key=lambda i: len(found[i][1]))  # similar lengths side by side: little padding
            while todo:
                # where the window slides follows from a row's length: a longer neighbour would move it
                longest, most = len(found[todo[-1]][1]), max(found[i][2] for i in todo)
                batch = [i for i in todo[-batch_size:]
                         if len(found[i][1]) == longest or longest + most <= window]
                todo = [i for i in todo if i not in batch]
                texts |= answer_batch({i: found[i][1:] for i in batch})
                bar.update(len(batch))
            yield texts


def answer_batch(rows):
    """{i: (ids, how many tokens may follow)} -> {i: Text}"""
    prompts, lengths = zip(*rows.values())
    texts, pad = dict(zip(rows, map(Text, prompts))), [max(map(len, prompts)) - len(ids) for ids in prompts]
    idx = torch.tensor([[tokenizer.eos_id] * n + ids for n, ids in zip(pad, prompts)], device=device)
    for tokens in model.stream(idx, max(lengths), seed=[seed + i for i in rows], stop=ends,
                               pad=torch.tensor(pad), **how):
        for (i, text), token in zip(texts.items(), tokens.tolist()):
            if not text.finish_reason:
                text.add(token)
                if text.tokens == rows[i][1] and not text.finish_reason:
                    text.add()
        if all(text.finish_reason for text in texts.values()):
            break
    return texts


HELP = """/reset              begin anew
/system TEXT        what the assistant is told beforehand
/temperature 0.7    0 is greedy
/save FILE          append this conversation to FILE, as one line of JSON
/quit               or Ctrl-D; Ctrl-C stops an answer"""


def converse():
    """A chat; with a model of texts one text that both write, where Enter alone lets the model go on."""
    try:
        import readline  # noqa: F401  arrow keys: input() uses it once it is there
    except ImportError:
        pass
    told, turns, text, ended, said = system, [], '', False, 0
    print("/help lists the commands, Ctrl-D leaves" + ("" if chatting else ", Enter alone lets it write on"))
    while True:
        try:
            line = clean(input('> '))
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print("  (Ctrl-D leaves)")
            continue
        command, _, rest = line.partition(' ')
        rest = rest.strip()
        try:
            if command == '/quit':
                return
            elif command == '/help':
                print(HELP)
            elif command == '/reset':
                turns, text, said = [], '', 0
            elif command == '/system' and chatting:
                told = rest
            elif command == '/temperature' and re.fullmatch(r'\d*\.?\d+', rest):
                check(temperature=float(rest))
                how['temperature'] = float(rest)
            elif command == '/save' and rest:
                head = [dict(role='system', content=told)] if told else []
                with open(rest, 'a', encoding='utf-8') as f:
                    f.write(json.dumps(dict(messages=head + turns) if chatting else dict(text=text)) + '\n')
                print(f"appended to {rest}")
            elif command.startswith('/'):
                raise UserError(f"{line[:60]}: no such command, or not written as in /help; a text with a space before it")
            elif chatting and line.strip():
                turns.append(dict(role='user', content=line))
                try:
                    prompt, length, dropped = encode_chat(turns, max_new_tokens, told)
                except UserError:
                    turns.pop()
                    raise
                if dropped:
                    note(f"(the window is full: the {dropped} oldest messages are forgotten)")
                answer = say(prompt, length, seed + said)
                turns, said = turns[dropped:] + [dict(role='assistant', content=answer.text)], said + 1
            elif not chatting:
                text = '' if ended else text + ('\n' if text and line else '')
                more = say(*encode_text(text + line, max_new_tokens), seed + said)
                text, said, ended = text + line + more.text, said + 1, more.finish_reason == 'stop'
                if ended:
                    print("(it ends here; what you write next begins another)")
        except (UserError, OSError) as e:  # told in one line, and the conversation goes on
            print(e)


def say(prompt, length, seed):
    text = Text(prompt)
    try:
        for piece in text.stream(prompt, length, seed, how):
            show(piece)
        print()
    except KeyboardInterrupt:
        print("  (stopped)")
    return text


def serve():
    """A page with Gradio: a chat where the model can, and a text to go on with."""
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    try:
        import gradio as gr
        if int(gr.__version__.split('.')[0]) < 6:  # before it, messages had another form
            raise ImportError
    except ImportError:
        raise UserError("web=True needs Gradio 6, which is not installed: pip install 'gradio>=6'") from None

    def answer(encode, asked, temperature, top_p, top_k, length, seed, *told):
        try:
            sampling = dict(temperature=temperature, top_p=top_p, top_k=int(top_k or 0))
            check(**sampling, max_new_tokens=int(length), seed=int(seed or 0))
            prompt, length, *dropped = encode(asked, int(length), *told)
            if any(dropped):
                gr.Info(f"The window is full: the {dropped[0]} oldest messages are forgotten")
            text = Text(prompt)
            for _ in text.stream(prompt, length, int(seed or 0), how | sampling):
                yield text.text
        except UserError as e:
            raise gr.Error(str(e), print_exception=False) from None

    def reply(message, history, *chosen):
        turns = [dict(role=m['role'], content=''.join(part.get('text', '') for part in m['content']))
                 for m in history]  # Gradio 6 keeps a message as a list of parts
        yield from answer(encode_chat, turns + [dict(role='user', content=message)], *chosen)

    def go_on(start, *chosen):
        for text in answer(encode_text, start, *chosen):
            yield start + text

    name = os.path.basename(os.path.normpath(init_from))
    with gr.Blocks(title=f"{name} · nanosmol") as page:
        gr.Markdown(f"## {name}\n{model.n_params() / 1e6:.1f}M parameters · {window:,} tokens of context")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                most = max(window, max_new_tokens)
                chosen = [gr.Slider(0, 2, temperature, step=0.05, label="Temperature", info="0: greedy"),
                          gr.Slider(0, 1, top_p, step=0.01, label="Top-p"),
                          gr.Slider(0, 1000, top_k, step=1, label="Top-k", info="0: all"),
                          gr.Slider(1, most, max_new_tokens, step=1, label="Length in tokens"),
                          gr.Number(seed, label="Seed", precision=0)]
                told = gr.Textbox(system, label="System message", visible=chatting)
            with gr.Column(scale=3):
                if chatting:
                    with gr.Tab("Chat"):
                        box = gr.Chatbot(height=460, show_label=False, render_markdown=False)
                        gr.ChatInterface(reply, chatbot=box, additional_inputs=[*chosen, told])
                with gr.Tab("Text"):
                    text = gr.Textbox(start, lines=18, show_label=False, elem_id='text')
                    with gr.Row():
                        go, halt = gr.Button("Write on", variant='primary'), gr.Button("Stop")
                    event = go.click(go_on, [text, *chosen], text)
                    halt.click(None, cancels=event)
    try:
        page.launch(server_name=host, server_port=port, show_error=True, footer_links=[], ssr_mode=False,
                    theme=gr.themes.Default(font=['sans-serif'], font_mono=['monospace']))
    except OSError as e:
        raise UserError(f"host={host}, port={port}: {e}") from None


try:
    converse() if interactive else answer_file() if prompts else serve() if web else write_samples()
except KeyboardInterrupt:
    sys.exit(130)
