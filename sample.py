"""
A finished model in use.

    python sample.py                                              the newest run under out/, its newest checkpoint
    python sample.py --start="Once upon a time" --num_samples=5
    python sample.py --start=FILE:prompt.txt --temperature=0      greedy: the likeliest token, always
    python sample.py --init_from=HuggingFaceTB/SmolLM2-135M       a model directory, or a Hub id
    python sample.py --interactive                                chat in the terminal; a base model writes with you
    python sample.py --prompts=asked.jsonl --out_file=said.jsonl  many prompts, in batches
    python sample.py --web                                        a page at http://127.0.0.1:7860 (pip install gradio)

A model that was trained on conversations is given a text as its user's turn, any other one goes on with it; --chat
decides otherwise. The same text comes out whatever the batch, to the letter with --dtype=float32.

As a Hugging Face Space: SDK gradio, `app_file: sample.py`, beside it model.py, prepare.py, configurator.py,
requirements.txt, and the model's Hub id in a variable MODEL or in a file of that name. There it is --web by itself.
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
prompts = ''                  # a .jsonl file of {"prompt": ...} or {"messages": ...}, any other file has one a line
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

import torch

import prepare
from model import GPT, pack_weights, pick_device, pick_dtype

ALLOWED = {
    'num_samples': ('at least 1', lambda v: v >= 1), 'max_new_tokens': ('at least 1', lambda v: v >= 1),
    'temperature': ('at least 0', lambda v: 0 <= v < float('inf')), 'top_k': ('at least 0', lambda v: v >= 0),
    'top_p': ('0 to 1', lambda v: 0 <= v <= 1), 'min_p': ('0 to 1', lambda v: 0 <= v <= 1),
    'repetition_penalty': ('more than 0', lambda v: 0 < v < float('inf')),
    'seed': ('at least 0, below 2^63', lambda v: 0 <= v < 2 ** 63), 'batch_size': ('at least 1', lambda v: v >= 1),
    'overflow': ("'slide' or 'refuse'", lambda v: v in ('slide', 'refuse')),
    'chat': ("'auto', 'yes' or 'no'", lambda v: v in ('auto', 'yes', 'no')),
    'port': ('1 to 65535', lambda v: 1 <= v <= 65535)}


def check(**values):
    """A mistake in a key, from the command line, from a chat's /temperature or from the page."""
    for key, value in values.items():
        if not ALLOWED[key][1](value):
            raise UserError(f"{key}={value!r}: expected {ALLOWED[key][0]}")


def clean(text):
    """`text` without half characters, which a terminal or a \\ud800 in JSON can hand over and UTF-8 can't say."""
    return text.encode('utf-8', 'replace').decode('utf-8')


if os.environ.get('SPACE_ID'):  # on a Hugging Face Space this file is the page
    web, host, init_from = True, '0.0.0.0', os.environ.get('MODEL', '')
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'MODEL')
    if not init_from and os.path.exists(beside):
        with open(beside, encoding='utf-8') as f:
            init_from = f.read().strip()
    if not init_from:
        raise UserError("MODEL: neither a variable of this Space nor a file beside sample.py; give it the id of a model")
check(**{key: globals()[key] for key in ALLOWED})
if interactive + bool(prompts) + web > 1:
    raise UserError("--interactive, --prompts and --web are three ways to use a model: choose one")
if out_file and not prompts:
    raise UserError(f"out_file={out_file}: only the answers to --prompts=FILE are written to a file")
if out_file and os.path.exists(out_file):
    raise UserError(f"out_file={out_file}: it exists already; choose another name, or remove it")
try:
    stops = json.loads(stop) if stop.startswith('[') else [stop.replace('\\n', '\n')] if stop else []
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError("an empty text, or none at all")
except ValueError as e:
    raise UserError(f'stop={stop}: expected a text, or a list of texts such as ["User:", "\\n\\n"]: {e}') from None
if start.startswith('FILE:'):
    try:
        with open(start[5:], encoding='utf-8') as f:
            start = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"start={start}: {e}") from None
if init_from == 'resume':
    init_from = out_dir or prepare.newest_run('out')
    if not os.path.isdir(init_from):
        raise UserError(f"out_dir={out_dir}: no such directory")

# -----------------------------------------------------------------------------
# the model, and where its texts end

directory = prepare.model_directory(init_from)
tokenizer = prepare.load_tokenizer(directory)
model = GPT.from_pretrained(directory)
device = pick_device(device)
dtype = pick_dtype(dtype, device, model.config)
model.to(device, getattr(torch, dtype)).eval()
window = model.config.max_positions
if compile:
    model.hidden = torch.compile(model.hidden, dynamic=True)
elif device == 'cpu':
    pack_weights(model)
sys.stdout.reconfigure(errors='replace')  # a terminal that can't show a character shows a ? in its place


def declared_ends():
    """The ids that the model's own files name as ends."""
    for name in ('generation_config.json', 'config.json'):
        path = os.path.join(directory, name)
        if os.path.exists(path):
            with open(path, encoding='utf-8') as f:
                found = json.load(f).get('eos_token_id')
            if found is not None:
                return set(found if isinstance(found, list) else [found])
    return set()


def trained_to_chat():
    """A tokenizer may hold the chat tokens from its first day, so they prove nothing. A model that was taught
    conversations ends its turns with <|im_end|> and its files say so; a run of ours also knows its stage."""
    if tokenizer.encode_special(prepare.IM_START) is None or im_end is None:
        return False
    state = os.path.join(directory, 'trainer.pt')
    if im_end in ends or not os.path.exists(state):
        return im_end in ends
    state = torch.load(state, map_location='cpu', weights_only=True, mmap=True)  # mmap: the rest is gigabytes
    return state['config'].get('stage', 'pretrain') != 'pretrain'


im_end, ends = tokenizer.encode_special(prepare.IM_END), declared_ends() | {tokenizer.eos_id}
chatting = trained_to_chat() if chat == 'auto' else chat == 'yes'
if chatting:
    prepare.render_chat([], tokenizer)  # says what is missing in a tokenizer that can't
    ends.add(im_end)
ends = sorted(ends)
how = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)


def note(text):
    print(text, file=sys.stderr, flush=True)


note(f"{directory}: {model.n_params() / 1e6:.1f}M parameters, {device}, {dtype}, {'chat' if chatting else 'text'}")

# -----------------------------------------------------------------------------
# from a prompt to ids, from ids to a text


def encode_text(text, length):
    """The ids of a text to go on with, and how many tokens may follow."""
    # Only the end of a text beyond the window is read, so ten megabytes are cut before they are tokenized
    ids = tokenizer.encode(clean(text[-32 * window:])) or [tokenizer.eos_id]
    if overflow == 'refuse':
        if len(ids) >= window:
            raise UserError(f"the prompt has {len(ids):,} tokens or more, the window {window:,}: shorten it, or let "
                            "--overflow=slide read its end")
        length = min(length, window - len(ids))
    if len(ids) > window:
        note(f"the prompt is longer than the window of {window:,} tokens: only its end is read")
    return ids, length


def encode_chat(messages, length):
    """The ids of a conversation up to the assistant's opening, how many tokens may follow, and how many of the
    oldest messages were left out, so that a quarter of the window is free for the answer."""
    system, turns, dropped = [m for m in messages if m['role'] == 'system'], list(messages), 0
    turns = [dict(m, content=clean(m['content'])) for m in messages if m['role'] != 'system']
    free = min(length, window // 4) if overflow == 'slide' else 1
    while True:
        if sum(len(m['content']) for m in system + turns) <= 32 * window:
            ids = prepare.render_chat(system + turns, tokenizer, add_generation_prompt=True)[0]
            if len(ids) + free <= window:
                return ids, min(length, window - len(ids)), dropped
        if overflow == 'refuse':
            raise UserError(f"the conversation is longer than the window of {window:,} tokens: begin a new one, or let "
                            "--overflow=slide forget its oldest turns")
        later = next((i for i, m in enumerate(turns) if i and m['role'] == 'user'), None)
        if later is None:
            raise UserError(f"the message is longer than the window of {window:,} tokens: shorten it")
        turns, dropped = turns[later:], dropped + later


class Text:
    """One text as it grows: ids in, characters out. Half a character waits for its other half, and what could
    be the beginning of a stop string waits until it is one or is not."""

    def __init__(self, prompt):
        # decoded together with what came before: a first word has no space before it in SentencePiece's eyes
        self.ids, self.since, self.known = list(prompt[-8:]), 0, len(prompt[-8:])
        self.text, self.held, self.tokens, self.finish_reason = '', '', 0, ''

    def add(self, token):
        """Takes an id, returns what may be shown now."""
        if token in ends:
            return self.close('stop')
        self.ids.append(token)
        self.tokens += 1
        new = self.decode()
        if new.endswith('\ufffd'):
            return ''
        self.since, self.known = self.known, len(self.ids)
        self.held += new
        found = [at for at in map(self.held.find, stops) if at >= 0]
        if found:
            self.held, self.finish_reason = self.held[:min(found)], 'stop'
            return self.let_out(0)
        return self.let_out(max((n for s in stops for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0))

    def decode(self):
        return tokenizer.decode(self.ids[self.since:])[len(tokenizer.decode(self.ids[self.since:self.known])):]

    def let_out(self, keep):
        out = self.held[:len(self.held) - keep]
        self.text, self.held = self.text + out, self.held[len(out):]
        return out

    def close(self, why='length'):
        """Returns what was still held back; a text that has ended already stays as it is."""
        if self.finish_reason:
            return ''
        self.finish_reason, self.held = why, self.held + self.decode()
        return self.let_out(0)

    def stream(self, prompt, length, seed, how):
        """The pieces of the text, as soon as they may be shown."""
        for token in model.stream(torch.tensor([prompt], device=device), length, seed=seed, stop=ends, **how):
            yield self.add(token.item())
            if self.finish_reason:
                return
        yield self.close()


def show(text):
    """To the standard output. A terminal gets no control characters: it would obey them."""
    print(re.sub(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]', '\ufffd', text) if sys.stdout.isatty() else text, end='', flush=True)


# -----------------------------------------------------------------------------
# the four ways to use it

def write_samples():
    tokens, begun = 0, time.perf_counter()
    as_turn = chatting and start
    if as_turn:
        opening = [dict(role='system', content=system)] if system else []
        prompt, length, _ = encode_chat(opening + [dict(role='user', content=start)], max_new_tokens)
    else:
        prompt, length = encode_text(start, max_new_tokens)
    for i in range(num_samples):
        show(clean(start) + ('\n' if as_turn else ''))
        text = Text(prompt)
        for piece in text.stream(prompt, length, seed + i, how):
            show(piece)
        tokens += text.tokens
        show('\n---------------\n')
    note(f"{tokens / (time.perf_counter() - begun):,.0f} tokens a second")


def read_prompts():
    """Of each prompt of the file: its record, its ids, and how many tokens may follow."""
    found = []
    try:
        with open(prompts, encoding='utf-8-sig') as f:
            lines = [(n, line.rstrip('\n')) for n, line in enumerate(f, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"prompts={prompts}: {e}") from None
    for n, line in lines:
        try:
            record = json.loads(line) if prompts.endswith('.jsonl') else {'prompt': line}
            asked = record.get('messages', record.get('prompt')) if isinstance(record, dict) else None
            if not isinstance(asked, (str, list)):
                raise ValueError('expected an object with a "prompt" or with "messages"')
            if chatting or isinstance(asked, list):
                messages = prepare._messages(asked, 'prompt' if isinstance(asked, str) else 'messages')
                if not chatting:
                    raise ValueError("messages, but the model was not trained on conversations; --chat=yes insists")
                if messages[-1]['role'] == 'assistant':
                    raise ValueError("the last message is the assistant's: there is nothing to answer")
                if system and messages[0]['role'] != 'system':
                    messages.insert(0, dict(role='system', content=system))
                found.append((record, *encode_chat(messages, max_new_tokens)[:2]))
            else:
                found.append((record, *encode_text(asked, max_new_tokens)))
        except ValueError as e:  # a UserError is one, and so is what json raises
            raise UserError(f"{prompts}, line {n}: {e}") from None
    if not found:
        raise UserError(f"prompts={prompts}: there is no prompt in it")
    return found


def answer_file():
    found, tokens, begun = read_prompts(), 0, time.perf_counter()
    try:
        out = open(out_file, 'x', encoding='utf-8') if out_file else sys.stdout
    except OSError as e:
        raise UserError(f"out_file={out_file}: {e}") from None
    with prepare.progress(total=len(found), unit=' prompts') as bar:
        for lo in range(0, len(found), 16 * batch_size):
            texts = {}
            # similar lengths side by side, so that little is padded; written in the file's order every 16 batches
            todo = sorted(range(lo, min(lo + 16 * batch_size, len(found))), key=lambda i: len(found[i][1]))
            while todo:
                longest, wanted = len(found[todo[-1]][1]), max(found[i][2] for i in todo)
                # where the window slides follows from a row's length: beside a longer row it would slide too early
                batch = [i for i in todo[-batch_size:]
                         if len(found[i][1]) == longest or longest + wanted <= window]
                todo = [i for i in todo if i not in batch]
                texts |= answer_batch({i: found[i][1:] for i in batch})
                bar.update(len(batch))
            for i in sorted(texts):
                record = found[i][0] | dict(completion=texts[i].text, finish_reason=texts[i].finish_reason)
                out.write(json.dumps(record, ensure_ascii=False) + '\n')
                tokens += texts[i].tokens
            out.flush()
    note(f"{len(found):,} prompts, {tokens / (time.perf_counter() - begun):,.0f} tokens a second")


def answer_batch(rows):
    """{i: (ids, how many tokens may follow)} -> {i: Text}. Prompt i draws from seed + i, whatever its neighbours."""
    texts, longest = {i: Text(ids) for i, (ids, _) in rows.items()}, max(len(ids) for ids, _ in rows.values())
    pad = [longest - len(ids) for ids, _ in rows.values()]
    idx = torch.tensor([[tokenizer.eos_id] * n + ids for n, (ids, _) in zip(pad, rows.values())], device=device)
    stream = model.stream(idx, max(length for _, length in rows.values()), seed=[seed + i for i in rows], stop=ends,
                          pad=torch.tensor(pad), **how)
    for step, drawn in enumerate(stream):
        for (i, text), token in zip(texts.items(), drawn.tolist()):
            if not text.finish_reason and step < rows[i][1]:
                text.add(token)
        if all(text.finish_reason or step + 1 >= rows[i][1] for i, text in texts.items()):
            break
    for text in texts.values():
        text.close()
    return texts


HELP = """/reset              begin anew
/system TEXT        what the assistant is told beforehand (nothing: nothing)
/temperature 0.7    0 is greedy
/save FILE          append the conversation to FILE, one line of JSON
/quit               or Ctrl-D; Ctrl-C stops an answer"""


def converse():
    """A chat. With a model of texts, one text that both write: Enter alone lets the model go on."""
    try:
        import readline  # arrow keys: input() uses it by itself once it is there
    except ImportError:
        pass
    told, messages, text, turn = system, [], '', 0
    print("/help lists the commands, Ctrl-D leaves" + ("" if chatting else "; Enter alone lets it write on"))
    while True:
        try:
            line = clean(input('> '))
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print('  (Ctrl-D leaves)')
            continue
        command, _, rest = line.partition(' ')
        opening = [dict(role='system', content=told)] if told else []
        try:
            if command == '/quit':
                return
            elif command == '/help':
                print(HELP)
            elif command == '/reset':
                messages, text = [], ''
            elif command == '/system':
                if not chatting:
                    raise UserError("/system: this model goes on with texts, there is no one to tell")
                told = rest.strip()
            elif command == '/temperature':
                try:
                    value = float(rest)
                except ValueError:
                    raise UserError(f"/temperature {rest}: expected a number, such as 0.7") from None
                check(temperature=value)
                how['temperature'] = value
            elif command == '/save':
                if not rest.strip():
                    raise UserError("/save: expected the name of a file")
                with open(rest.strip(), 'a', encoding='utf-8') as f:
                    f.write(json.dumps({'messages': opening + messages} if chatting else {'text': text},
                                       ensure_ascii=False) + '\n')
                print(f"appended to {rest.strip()}")
            elif command.startswith('/'):
                raise UserError(f"{command}: no such command; /help lists them; a space before it makes it a text")
            elif line.strip() or not chatting:
                if chatting:
                    asked = messages + [dict(role='user', content=line)]
                    prompt, length, dropped = encode_chat(opening + asked, max_new_tokens)
                    asked = asked[dropped:]
                    if dropped:
                        note(f"(the window is full: the {dropped} oldest messages are forgotten)")
                else:
                    asked = text + ('\n' if text and line else '') + line
                    prompt, length = encode_text(asked, max_new_tokens)
                said = Text(prompt)
                try:
                    for piece in said.stream(prompt, length, seed + turn, how):
                        show(piece)
                    print()
                except KeyboardInterrupt:
                    print('  (stopped)')
                turn += 1
                if chatting:
                    messages = asked + [dict(role='assistant', content=said.text)]
                elif said.finish_reason == 'stop' and not said.held:
                    print("(the end of the text; what you write next begins another)")
                    text = ''
                else:
                    text = asked + said.text
        except (UserError, OSError) as e:  # told in one line, and the conversation goes on
            print(e)


def serve():
    """A page with Gradio: a chat where the model can, and a text to go on with."""
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    try:
        import gradio as gr
        if int(gr.__version__.split('.')[0]) < 6:
            raise ImportError
    except ImportError:
        raise UserError("--web needs Gradio 6, which is not installed: pip install 'gradio>=6'") from None

    def write(prompt, length, seed, sampling):
        text = Text(prompt)
        for _ in text.stream(prompt, length, seed, sampling):
            yield text.text

    def settings(temperature, top_p, top_k, length, seed):
        sampling = dict(temperature=temperature, top_p=top_p, top_k=int(top_k or 0))
        check(**sampling, max_new_tokens=int(length), seed=int(seed or 0))
        return how | sampling, int(length), int(seed or 0)

    def go_on(start, *chosen):
        try:
            sampling, length, seed = settings(*chosen)
            prompt, length = encode_text(start, length)
            for text in write(prompt, length, seed, sampling):
                yield clean(start) + text
        except UserError as e:
            raise gr.Error(str(e)) from None

    def reply(message, history, told, *chosen):
        try:
            sampling, length, seed = settings(*chosen)
            messages = [dict(role='system', content=told)] if told and told.strip() else []
            for m in history + [dict(role='user', content=message)]:  # Gradio keeps a message as a list of its parts
                parts = m['content'] if isinstance(m['content'], list) else [m['content']]
                words = ''.join(part if isinstance(part, str) else part.get('text', '') for part in parts)
                messages.append(dict(role=m['role'], content=words))
            prompt, length, dropped = encode_chat(messages, length)
            if dropped:
                gr.Info(f"The window is full: the {dropped} oldest messages are forgotten")
            yield from write(prompt, length, seed, sampling)
        except UserError as e:
            raise gr.Error(str(e)) from None

    name = os.path.basename(os.path.normpath(init_from))
    with gr.Blocks(title=f"{name} · nanosmol", analytics_enabled=False) as page:
        gr.Markdown(f"## {name}\n{model.n_params() / 1e6:.1f}M parameters · {window:,} tokens of context · {device}, {dtype}")
        with gr.Row():
            with gr.Column(scale=1, min_width=240):
                sliders = [gr.Slider(0, 2, temperature, step=0.05, label="Temperature", info="0: always the likeliest"),
                           gr.Slider(0, 1, top_p, step=0.01, label="Top-p"),
                           gr.Slider(0, 1000, top_k, step=1, label="Top-k", info="0: all"),
                           gr.Slider(1, max(window, max_new_tokens), max_new_tokens, step=1, label="Length in tokens"),
                           gr.Number(seed, label="Seed", precision=0)]
            with gr.Column(scale=3):
                if chatting:
                    with gr.Tab("Chat"):
                        told = gr.Textbox(system, label="System message", render=False)
                        box = gr.Chatbot(height=420, render_markdown=False, show_label=False)
                        gr.ChatInterface(reply, chatbot=box, additional_inputs=[told, *sliders], api_name='chat')
                with gr.Tab("Text"):
                    text = gr.Textbox(start, lines=16, show_label=False, placeholder="Once upon a time", elem_id='text')
                    with gr.Row():
                        go, halt = gr.Button("Write on", variant='primary'), gr.Button("Stop")
                    # one after the other, whoever asks: two at once would only share the machine
                    event = go.click(go_on, [text, *sliders], text, concurrency_id='model', api_name='write')
                    halt.click(None, cancels=event)
    try:
        page.launch(server_name=host, server_port=port, show_error=True, footer_links=[], ssr_mode=False,
                    theme=gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace']))
    except OSError as e:
        raise UserError(f"host={host}, port={port}: {e}") from None


try:
    if interactive:
        converse()
    elif prompts:
        answer_file()
    elif web:
        serve()
    else:
        write_samples()
except KeyboardInterrupt:
    sys.exit(130)
