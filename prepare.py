"""
Everything between text and tokens, and everything that is fetched.

    python prepare.py                                # what can be prepared by name, and how large it is
    python prepare.py tinystories                    # one of those names
    python prepare.py input.txt --tokenizer=char     # a file of your own: .txt .jsonl .jsonl.zst .parquet
    python prepare.py texts/ --name=mine             # or a folder of them
    python prepare.py hub:owner/name --field=text --max_tokens=1e9
    python prepare.py chats.jsonl --as=chat          # chat, prefs or verify, where a source could be several
    python prepare.py tokenizer texts/ --vocab_size=49152 --name=mine

Each makes data/<name>/: train.bin and val.bin (headerless little-endian token ids, each document ended by
the end-of-text token), meta.json, and the tokenizer's own files. Chat adds train.mask and val.mask (1 where
the loss counts); preferences and verifiable problems are train.jsonl and val.jsonl instead of bins.
"""
import codecs
import collections
import concurrent.futures
import contextlib
import ctypes
import decimal
import difflib
import errno
import fnmatch
import functools
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
import types

import numpy as np

from configurator import UserError, configure

# what to make, and where
tokenizer = ''           # char, byte, gpt2, bpe:4096 (trained on the text), a directory, file or Hub id
name = ''                # the data set becomes data/<name>/; '' follows the source
data_dir = 'data'        # where data sets live
max_tokens = 0           # stop after about this many training tokens; 0 takes everything (>= 0)
# how to read the source
field = ''               # the key or column that holds the text; '' tries text, content
config = ''              # hub: a folder or subset of the repository, such as sample/10BT
split = ''               # hub: take this split only, such as train
as_ = ''                 # '' | 'text' | 'chat' | 'prefs' | 'verify' (--as= does too); '' follows the first record
val_fraction = 0.005     # share of the documents, by a hash of their text, that is held out (> 0, < 1); toy: more
block_size = 0           # chat: leave out conversations longer than this many tokens; 0 keeps all (>= 0)
# how to work
workers = 0              # 0 takes one for each core (>= 0). The bytes do not depend on it
seed = 1337              # of the toy world (>= 0)
vocab_size = 49152       # of `prepare.py tokenizer PATH...` (>= 259, <= 1048576)
min_frequency = 2        # of `prepare.py tokenizer`: rarer pairs are not merged (>= 1)
# -----------------------------------------------------------------------------

EOT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MAX_VOCABULARY = 1 << 20
BLOCK = 1 << 20          # bytes of text that a worker gets at a time: 50 ms of work
LONGEST = 16 << 20       # a document longer than this is taken as several: nothing larger is held in memory
SAVE = 5                 # seconds between two entries in the journal, from which a killed run goes on

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M"
LLAMA2 = "NousResearch/Llama-2-7b-hf"  # Meta's own wants a signature; this copy of its tokenizer does not

KNOWN = {  # name -> where it comes from; `get`: a URL and the SHA-256 of what is there
    "toy": dict(size="made here, no download", toy="stories", tokenizer="bpe:4096"),
    "toy_chat": dict(size="made here, no download", toy="chat", val_fraction=0.05, as_="chat",
                     tokenizer="toy"),
    "toy_prefs": dict(size="made here, no download", toy="prefs", val_fraction=0.1, as_="prefs",
                      tokenizer="toy"),
    "toy_sums": dict(size="made here, no download", toy="sums", val_fraction=0.1, as_="verify",
                     tokenizer="toy"),
    "toy_problems": dict(size="made here, no download", toy="problems", val_fraction=0.1, as_="verify",
                         tokenizer="toy"),
    "toy_questions": dict(size="made here, no download", toy="questions", val_fraction=0.1, as_="verify",
                          tokenizer="toy"),
    "shakespeare": dict(size="1.1 MB", tokenizer="gpt2", get=(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")),
    "tinystories": dict(size="2.3 GB", tokenizer="gpt2", hub="roneneldan/TinyStories",
                        files="TinyStoriesV2-GPT4-*.txt"),
    # already tokens: its bins and tokenizer are taken as they are
    "fineweb_6b": dict(size="12 GB", hub="weights-and-wires/fineweb-6b", bins="tokenized"),
    "fineweb_edu": dict(size="28 GB, 10B tokens", hub="HuggingFaceFW/fineweb-edu", config="sample/10BT",
                        tokenizer=LLAMA2),
    # a hundredth of DCLM's four trillion tokens, which is more than anyone trains on here
    "dclm": dict(size="60 GB, 40B tokens", hub="mlfoundations/dclm-baseline-1.0",
                 config="global-shard_01_of_10/local-shard_0_of_10", tokenizer=LLAMA2),
    "openwebmath": dict(size="27 GB, 14B tokens", hub="open-web-math/open-web-math", config="data",
                        tokenizer=LLAMA2),
    # permissively licensed source files filtered for quality; The Stack itself wants a signature
    "code": dict(size="about 70 GB", hub="common-pile/stackv2_edu_filtered", tokenizer=LLAMA2),
    "cosmopedia": dict(size="122 GB, 28B tokens", hub="HuggingFaceTB/smollm-corpus", config="cosmopedia-v2",
                       tokenizer=SMOLLM2),
    "smoltalk": dict(size="2.1 GB, 1.1M conversations", hub="HuggingFaceTB/smoltalk", config="data/all",
                     as_="chat", tokenizer=SMOLLM2),
    "ultrafeedback": dict(size="230 MB, 61K pairs", hub="HuggingFaceH4/ultrafeedback_binarized",
                          files="data/*_prefs-*.parquet", as_="prefs"),
    "gsm8k": dict(size="3 MB, 7.5K problems", hub="openai/gsm8k", config="main", as_="verify",
                  tokenizer=SMOLLM2),
}
KNOWN["shakespeare_char"] = dict(KNOWN["shakespeare"], tokenizer="char")


def describe(name):
    """What preparing the known data set `name` takes, in words; None if no set has that name."""
    return f"{name}: {KNOWN[name]['size']}" if name in KNOWN else None


# -----------------------------------------------------------------------------
# Tokenizers. Whatever it was made from, a tokenizer is a tokenizer.json, so transformers reads it too.

class Tokenizer:
    """Text to ids and back. Special tokens never come out of ordinary text: `encode` of "<|im_end|>" gives
    its letters. `name` is the spec that it was made from, `vocab_size` counts all ids, `eos_id` ends a
    document."""

    def __init__(self, spec, name, settings=None):
        """`spec`: the content of a tokenizer.json; `settings`: of the tokenizer_config.json beside it."""
        from tokenizers import Tokenizer as Engine
        self.name, self.spec = name, {"added_tokens": [], **spec, "truncation": None, "padding": None}
        self.engine = Engine.from_str(json.dumps(self.spec))
        self.engine.encode_special_tokens = True  # which means: as the ordinary text that they are
        vocab = self.engine.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        named = (settings or {}).get("eos_token")
        named = named["content"] if isinstance(named, dict) else named
        # <|endoftext|> goes first: in an instruct model's config eos is <|im_end|>, which ends a turn
        self.eos = next((t for t in (EOT, named, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")
                         if t in vocab), None)
        if self.eos is None:
            raise UserError(f"{name}: this tokenizer has no end-of-text token ({EOT}, </s>, ...); add one")
        self.eos_id = vocab[self.eos]
        self.bos = next((t for t in ("<s>", "<|begin_of_text|>", "<bos>") if t in vocab), None)
        model, before = self.spec["model"], self.spec.get("pre_tokenizer") or {}
        self.table, self.tik = None, None
        if model["type"] == "WordLevel" and before.get("type") == "Split":  # one character, one token
            self.table = np.full(0x110000, -1, np.int32)
            for char, i in model["vocab"].items():
                if len(char) == 1:
                    self.table[ord(char)] = i
        self.bytes = model["type"] == "BPE" and not model["merges"] and before.get("type") == "ByteLevel"

    def encode(self, text):
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        """encode() as a numpy array. A character that a char tokenizer does not know raises UserError."""
        if self.table is not None:
            ids = self.table[np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)]
            if len(ids) and ids.min() < 0:
                raise UserError(f"the character {text[int(ids.argmin())]!r} is not in the vocabulary of "
                                f"{self.name}")
            return ids
        if self.bytes:
            return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
        if self.tik:
            ids = self.tik.encode_to_numpy(text, disallowed_special=())
            if not len(ids) or ids.max() < self.vocab_size:
                return ids  # else there is a byte in it that the vocabulary lacks, see _tiktoken
        return np.array(self.engine.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_documents(self, texts):
        """All texts one after the other, each ended by eos_id, as a numpy array."""
        if self.tik:
            joined = "".join([part for text in texts for part in (text, EOT)])
            if joined.count(EOT) == len(texts):  # always, unless a text speaks of <|endoftext|> itself
                ids = self.tik.encode_to_numpy(joined, allowed_special={EOT}, disallowed_special=())
                if not len(ids) or ids.max() < self.vocab_size:
                    return ids
        if self.tik or self.bytes or self.table is not None:
            ids = [self.encode_array(text) for text in texts]
        else:
            ids = [e.ids for e in self.engine.encode_batch_fast(texts, add_special_tokens=False)]
        end = np.array([self.eos_id], np.uint32)
        return np.concatenate([np.asarray(part, np.uint32) for i in ids for part in (i, end)] or [end[:0]])

    def encode_piece(self, text, first):
        """The ids of a piece of a long text, cut where `_cut` does; the first piece is like any text."""
        if first or self.tik or self.bytes or self.table is not None:
            return self.encode_array(text)
        # SentencePiece puts a space before whatever begins: let it begin with a line break, and drop both
        ids, lead = self.encode_array("\n" + text), self.encode_array("\n")
        return ids[len(lead):] if np.array_equal(ids[:len(lead)], lead) else self.encode_array(text)

    def encode_special(self, token):
        """The id of a special token such as <|im_end|>; None if this tokenizer has no such token."""
        return self.engine.token_to_id(token)

    def agrees(self, other):
        """Whether no token that both have has two ids: one may have more special tokens than the other."""
        ours, theirs = (t.engine.get_vocab(with_added_tokens=True) for t in (self, other))
        return all(theirs.get(token, i) == i for token, i in ours.items()) and abs(len(ours) - len(theirs)) < 100

    def decode(self, ids):
        return self.engine.decode([int(i) for i in ids], skip_special_tokens=False)

    def fast(self):
        """Lets tiktoken's engine do the work, 3 times as fast, where it is sure to give the same ids."""
        if not self.tik and not self.bytes and self.table is None:
            self.tik = _tiktoken(self.spec, self.vocab_size, self.eos_id)
            for text in (SAMPLE, *SAMPLE.split(" ")) if self.tik else ():
                if self.encode(text) != self.engine.encode(text, add_special_tokens=False).ids:
                    self.tik = None
                    break
        return self

    def save(self, directory):
        """Writes tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer takes them."""
        settings = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=self.eos, pad_token=self.eos,
                        clean_up_tokenization_spaces=False, nanosmol_name=self.name)
        settings.update(bos_token=self.bos or self.eos)
        if self.encode_special(IM_START) is not None and self.encode_special(IM_END) is not None:
            settings.update(chat_template=CHAT_TEMPLATE)
        os.makedirs(directory, exist_ok=True)
        write_json(os.path.join(directory, "tokenizer_config.json"), settings)  # first: it marks what is ours
        write_json(os.path.join(directory, "tokenizer.json"), self.spec, indent=None)


def load_tokenizer(spec):
    """The tokenizer that `spec` names: a directory with a tokenizer.json (a data set, a checkpoint), a path
    to one, 'gpt2', 'byte', or a Hub id (owner/name). Raises UserError if it is none of these."""
    if spec == "gpt2":
        return _gpt2()
    if spec == "byte":
        return _byte()
    path = os.path.join(spec, "tokenizer.json") if os.path.isdir(spec) else spec
    if os.path.isfile(path):
        beside, settings = os.path.join(os.path.dirname(path), "tokenizer_config.json"), {}
        if os.path.basename(path) == "tokenizer.json" and os.path.exists(beside):
            settings = read_json(beside)
        try:
            with open(path, encoding="utf-8") as f:
                content = json.load(f)
            return Tokenizer(content, settings.get("nanosmol_name", spec), settings)
        except UserError:
            raise
        except Exception as e:  # tokenizers raises the bare Exception
            raise UserError(f"{path}: not a tokenizer.json that `tokenizers` can read: {e}") from None
    if os.path.isdir(spec):
        raise UserError(f"{spec}: this directory has no tokenizer.json")
    if spec == "char" or spec.startswith("bpe:"):
        raise UserError(f"the tokenizer {spec!r} is made from a text: `python prepare.py TEXT "
                        f"--tokenizer={spec}`, then name that data set's directory")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not spec.endswith(".json"):
        directory = hub_snapshot(spec, ["tokenizer.json", "tokenizer_config.json"])
        if not os.path.exists(os.path.join(directory, "tokenizer.json")):
            raise UserError(f"{spec}: this Hub repository has no tokenizer.json; name one that has")
        loaded = load_tokenizer(directory)
        loaded.name = spec
        return loaded
    raise UserError(f"--tokenizer={spec}: neither char, byte, gpt2, bpe:SIZE, a directory or file that "
                    "exists, nor a Hub id (owner/name)")


def make_tokenizer(spec, texts):
    """A tokenizer made from `texts` (strings) if spec is 'char' or 'bpe:SIZE'; else load_tokenizer(spec)."""
    if spec == "char":
        chars = set()
        for text in texts:
            chars.update(text)
        return _char(sorted(chars))
    if re.fullmatch(r"bpe:\d+", spec):
        return train_bpe(texts, int(spec[4:]), spec)
    return load_tokenizer(spec)


def train_bpe(texts, size, name, min_frequency=2):
    """A byte-level BPE of `size` ids trained on `texts`; <|endoftext|> and ChatML's two are ids 0, 1, 2."""
    if not 256 + 3 <= size <= MAX_VOCABULARY:
        raise UserError(f"a byte-level BPE has from {256 + 3} ids (the bytes and 3 special tokens) to "
                        f"{MAX_VOCABULARY}, not {size}")
    if min_frequency < 1:
        raise UserError(f"--min_frequency={min_frequency}: 1 or more is wanted")
    from tokenizers import Tokenizer as Engine, decoders, models, pre_tokenizers, trainers
    engine = Engine(models.BPE())
    # digits one by one, as SmolLM does: numbers that share no token with their neighbours teach no sums
    engine.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    engine.decoder = decoders.ByteLevel()
    engine.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, min_frequency=min_frequency, special_tokens=[EOT, IM_START, IM_END],
        show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return Tokenizer(json.loads(engine.to_str()), name)


def with_chat_tokens(tok):
    """`tok` itself if it has the ChatML tokens, else a copy that got them as its next ids."""
    missing = [t for t in (IM_START, IM_END) if tok.encode_special(t) is None]
    if not missing:
        return tok
    added = [_special(t, tok.vocab_size + i) for i, t in enumerate(missing)]
    spec = dict(tok.spec, added_tokens=tok.spec.get("added_tokens", []) + added)
    return Tokenizer(spec, tok.name, dict(eos_token=tok.eos))


def _special(token, i):
    return dict(id=i, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False,
                special=True)


def _plain(model, before, decoder, specials):
    return dict(version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None,
                added_tokens=specials, model=model, pre_tokenizer=before, decoder=decoder)


def _char(chars):
    vocab = {c: i for i, c in enumerate(chars)}
    before = dict(type="Split", pattern=dict(Regex=r"[\s\S]"), behavior="Isolated", invert=False)
    vocab[EOT] = len(chars)
    model = dict(type="WordLevel", vocab=vocab, unk_token=EOT)  # it wants one
    return Tokenizer(_plain(model, before, dict(type="Fuse"), [_special(EOT, len(chars))]), "char")


def _byte_level(use_regex):
    return dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=use_regex)


def _bpe(vocab, merges):
    return dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=False,
                vocab=vocab, merges=merges)


def _byte():
    vocab = {c: b for b, c in enumerate(_alphabet())}
    return Tokenizer(_plain(_bpe(vocab, []), _byte_level(False), _byte_level(False), [_special(EOT, 256)]),
                     "byte")


@functools.cache
def _alphabet():
    """The character that a byte-level tokenizer.json writes for each of the 256 bytes (GPT-2's own choice:
    printable bytes stand for themselves, the others for the characters from U+0100 on)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def _gpt2():
    """tiktoken's GPT-2 as a tokenizer.json. Its ranks are ids; the merge behind a token is the last step of
    the BPE of its bytes. Kept in the cache, since the 50,000 take a second."""
    path = os.path.join(cache_dir(), "gpt2.tokenizer.json")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            return Tokenizer(json.load(f), "gpt2")
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", os.path.join(cache_dir(), "tiktoken"))
    import requests
    import tiktoken
    try:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    except requests.RequestException as e:
        raise UserError(f"the GPT-2 tokenizer could not be fetched ({type(e).__name__}): connect to the "
                        "network, or set TIKTOKEN_CACHE_DIR to a directory that holds it") from None
    text = {token: "".join(_alphabet()[b] for b in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _merge([token[i:i + 1] for i in range(len(token))], lambda a, b: ranks.get(a + b, rank))
            merges.append([text[p] for p in parts])
    vocab = {text[token]: rank for token, rank in ranks.items()}
    made = Tokenizer(_plain(_bpe(vocab, merges), _byte_level(True), _byte_level(True),
                            [_special(EOT, 50256)]), "gpt2")
    os.makedirs(cache_dir(), exist_ok=True)
    write_json(path, made.spec, indent=None)
    return made


def _merge(parts, rank):
    """BPE by hand until two parts are left: `rank(a, b)` of a pair, the lowest and leftmost goes first."""
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: rank(parts[i], parts[i + 1]))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


# How a text falls into words before BPE, in tiktoken's terms: GPT-2's rule, and the same with every digit
# alone, where the space before a digit stays alone too. (tokenizers applies Digits first and GPT-2's rule to
# what is left.)
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
DIGIT_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N}|$)|\s+(?!\S)|\s"

SAMPLE = ("It's 3:45pm, isn't it?  We'll\t\tpay $1,234.50!\n\n  def f(x):\n      return x**2 \r\n\r\n   \n x"
          "naïve café Über straße e\u0301 ﬁ Ⅷ½²٣४ 12 34  5 \u00a0\u2003\u3000全角１２３　日本語、テスト。한국어 русский "
          "العربية हिन्दी ไทย 👍🏽👨‍👩‍👧 \U0001d54f\x00\x07\x1c\x85\ufeff\u200b\u200d <|endoftext|><|im_end|> "
          "'s 'S I'LL 'll''re  's1's aaaaaaaaaaaaaaaaaaaaa ........ ---- \n\n\n\n\t \n7 \n 8")


def _tiktoken(spec, vocab_size, eos_id):
    """A tiktoken Encoding that gives the ids of this tokenizer.json, or None where that is not certain.

    tiktoken merges two neighbours whenever their union is a token, lowest id first; a tokenizer.json lists
    the pairs that may merge, in order. Both agree if (1) the ids of the tokens rise in the order of their
    merges and (2) BPE of each token's own letters ends in that token: two neighbours inside a word have
    merged as they would alone, so if their union is a token, (2) says that they are the pair of its merge.
    Both are checked for the whole vocabulary here, the rule for words by the caller on SAMPLE. A byte that
    the vocabulary lacks (SmolLM2's has 235) gets an id beyond it: who sees one asks `tokenizers`, which
    leaves such bytes out."""
    import tiktoken
    from tokenizers import models
    model, before = spec["model"], spec.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers") or [before]
    last = dict(use_regex=True) | steps[-1]
    if model["type"] != "BPE" or model.get("dropout") or spec.get("normalizer") or last.get("type") != "ByteLevel" \
            or last.get("add_prefix_space") or any(not t["special"] for t in spec["added_tokens"]):
        return None
    if len(steps) == 1 and last["use_regex"]:
        words = GPT2_WORDS
    elif len(steps) == 2 and last["use_regex"] and steps[0] == dict(type="Digits", individual_digits=True):
        words = DIGIT_WORDS
    elif len(steps) == 2 and not last["use_regex"] and steps[0].get("type") == "Split" \
            and "Regex" in steps[0]["pattern"] \
            and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
        words = steps[0]["pattern"]["Regex"]
    else:
        return None
    specials = {t["content"] for t in spec["added_tokens"]}
    byte = {c: b for b, c in enumerate(_alphabet())}
    vocab = {t: i for t, i in model["vocab"].items() if t not in specials}
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    order = {}
    for i, (a, b) in enumerate(pairs):
        order.setdefault(a + b, []).append(i)
    rank = {pair: i for i, pair in enumerate(pairs)}
    for token, found in order.items():
        if len(found) > 1:  # a token with several merges: which of them does BPE of its letters come to?
            found[:] = [rank.get(tuple(_merge(list(token), lambda a, b: rank.get((a, b), len(pairs)))), -1)]
    ids = [vocab.get(token, -1) for token, _ in sorted(order.items(), key=lambda item: item[1])]
    alone = models.BPE(vocab=model["vocab"], merges=pairs)
    try:
        if ids != sorted(set(ids)) or ids[:1] == [-1] or not vocab.keys() <= byte.keys() | order.keys() \
                or any([t.id for t in alone.tokenize(token)] != [i] for token, i in vocab.items()):
            return None
        ranks = {bytes([b]): vocab_size + b for b in range(256)}
        ranks.update((bytes(byte[c] for c in token), i) for token, i in vocab.items())
        return tiktoken.Encoding("nanosmol", pat_str=words, special_tokens={EOT: eos_id},
                                 mergeable_ranks=ranks)
    except (KeyError, ValueError):  # a letter that stands for no byte; a regex that tiktoken does not take
        return None


# -----------------------------------------------------------------------------
# Chat: ChatML, one conversation after the other, each closed by the end-of-text token.

# what render_chat does, as transformers' apply_chat_template reads it from tokenizer_config.json
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim "
    "}}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}")


def render_chat(messages, tokenizer, add_generation_prompt=False):
    """A conversation, a list of {"role", "content"}, as (ids, mask): two lists of the same length.

    mask is 1 on what a model is to say itself, the assistant's words and its <|im_end|>, else 0.
    `add_generation_prompt` ends with the assistant's opening, ready for its answer, in place of the end of
    text."""
    start, end = tokenizer.encode_special(IM_START), tokenizer.encode_special(IM_END)
    if start is None or end is None:
        raise UserError(f"the tokenizer {tokenizer.name} has no {IM_START} and {IM_END}: with_chat_tokens() "
                        "adds them")
    line_break, ids, mask = tokenizer.encode("\n"), [], []
    for message in messages:
        head = tokenizer.encode(message["role"] + "\n")
        body = tokenizer.encode(f"{message['role']}\n{message['content'].strip()}")
        # where the opening ends inside them: it is what generation will start from
        cut = len(head) if body[:len(head)] == head else len(tokenizer.encode(message["role"]))
        told = int(message["role"] == "assistant")
        ids += [start, *body, end, *line_break]
        mask += [0] * (1 + cut) + [told] * (len(body) - cut + 1) + [0] * len(line_break)
    last = [start, *tokenizer.encode("assistant\n")] if add_generation_prompt else [tokenizer.eos_id]
    return ids + last, mask + [0] * len(last)


def _messages(value, what="messages"):
    """A list of {"role", "content"} from any usual shape of a conversation; ValueError says what is wrong."""
    if isinstance(value, str) and what == "prompt":
        value = [dict(role="user", content=value)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{what!r} is not a list of messages")
    roles = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
    said = []
    for m in value:
        role = m.get("role", m.get("from")) if isinstance(m, dict) else None
        content = m.get("content", m.get("value")) if isinstance(m, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f'a message of {what!r} is not {{"role": ..., "content": ...}}')
        said.append(dict(role=roles.get(role, role), content=content))
    if said[0]["role"] == "assistant":
        raise ValueError("the conversation begins with the assistant")
    return said


def _reply(value, prompt, what):
    """The assistant's last words in `value`, a text or a message list that may repeat the prompt."""
    if isinstance(value, str):
        return value
    said = _messages(value if value and value[0].get("role") != "assistant" else prompt + value, what)
    if said[-1]["role"] != "assistant":
        raise ValueError(f"{what!r} does not end with the assistant")
    return said[-1]["content"]


def as_chat(record):
    """The messages of a record: of its conversation, or of its prompt and its (chosen) answer."""
    for key in ("messages", "conversations"):
        if key in record:
            messages = _messages(record[key], key)
            break
    else:
        prompt, answer = _first(record, "prompt", "question"), _first(record, "answer", "chosen")
        prompt = _messages(prompt, "prompt")
        messages = prompt + [dict(role="assistant", content=_reply(answer, prompt, "answer"))]
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise ValueError("the assistant says nothing in it")
    return messages


def as_prefs(record):
    """{"prompt": messages, "chosen": text, "rejected": text}"""
    prompt, chosen, rejected = _first(record, "prompt", "question"), record["chosen"], record["rejected"]
    prompt = _messages(prompt, "prompt")
    made = dict(prompt=prompt, chosen=_reply(chosen, prompt, "chosen"),
                rejected=_reply(rejected, prompt, "rejected"))
    if made["chosen"] == made["rejected"]:
        raise ValueError("chosen and rejected are the same")
    return made


def as_verify(record):
    """{"prompt": messages, "answer": text}"""
    answer = record["answer"]
    if isinstance(answer, float) and math.isfinite(answer):
        answer = format(decimal.Decimal(repr(answer)), "f")  # 1e-05 is 0.00001, as a person would write it
    if not isinstance(answer, (str, int)) or not str(answer).strip():
        raise ValueError("'answer' is neither a text nor a number")
    return dict(prompt=_messages(_first(record, "prompt", "question"), "prompt"), answer=str(answer))


def _first(record, *keys):
    for key in keys:
        if record.get(key) is not None:
            return record[key]
    raise KeyError(keys[0])


# -----------------------------------------------------------------------------
# Verifiers: is the completion right? verify(prompt, completion, answer) -> float, 1.0 for right

# 7, -1,234.50, .5, 1e-05; an exponent has at most three digits, since 10 ** 999999999 would fill the memory
NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][+-]?\d{1,3}(?!\w))?")
LISTING = re.compile(r"(?:-?\d[\d.]*[\s,;]+){7,}-?\d")  # eight numbers and nothing between them: fishing


def verifier(spec):
    """verify(prompt, completion, answer) -> float for 'number' (the last number, or the one after ####),
    'exact', 'regex:PATTERN' (its first group, or all that it matches, is the answer), 'toy', or a Python file
    that defines verify. UserError if there is no such verifier, or if verify does not take three arguments."""
    if spec == "number":
        return _same_number
    if spec == "exact":
        return _same_text
    if spec == "toy":
        return toy_verify
    if spec.startswith("regex:"):
        return _regex_verifier(spec)
    if spec.endswith(".py"):
        return _file_verifier(spec)
    raise UserError(f"--verifier={spec}: there is no such verifier; number, exact, regex:PATTERN, toy or a "
                    ".py file")


def readable_gold(spec, answer):
    """Whether the verifier `spec` can reward any completion where `answer` is the reference answer: one without a
    number can't be compared by 'number'. What a regex or a .py file makes of it is not known here: True."""
    if spec == "number":
        return final_number(answer) is not None
    if spec == "toy":
        return answer.isdigit() or toy_verify("", answer, answer) == 1.0
    return bool(answer.strip())


def _same_number(prompt, completion, answer):
    number, right = final_number(completion), final_number(answer)
    return float(number is not None and number == right)


def _same_text(prompt, completion, answer):
    return float(completion.strip() == answer.strip())


def final_number(text):
    """The number that a text comes to, after its only #### or else its last one, as a Fraction; or None."""
    from fractions import Fraction
    before, mark, after = text.partition("####")
    if "####" in after or LISTING.search(text):
        return None
    found = NUMBER.findall(after if mark else text)
    number = found[0 if mark else -1] if found else ""
    return Fraction(number.replace(",", "")) if 0 < len(number) < 1000 else None


def _regex_verifier(spec):
    try:
        pattern = re.compile(spec.removeprefix("regex:"), re.DOTALL)
    except (re.error, OverflowError, RecursionError) as e:
        raise UserError(f"--verifier={spec}: not a regular expression: {e}") from None
    if not pattern.pattern:
        raise UserError("--verifier=regex: wants a pattern, such as 'regex:answer is (.*)'")

    def verify(prompt, completion, answer):
        found = [m[1] if pattern.groups else m[0] for m in pattern.finditer(completion)]
        return float(bool(found) and (found[-1] or "").strip() == answer.strip())
    return verify


def _file_verifier(path):
    """The verify of a Python file, which may import modules that lie beside it."""
    usage = "it must define verify(prompt, completion, answer) -> float"
    if not os.path.isfile(path):
        raise UserError(f"--verifier={path}: {'not a file' if os.path.exists(path) else 'no such file'}; {usage}")
    module = types.ModuleType("user_verifier")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses and pickle look it up there
    beside = os.path.dirname(os.path.abspath(path))
    if beside not in sys.path:
        sys.path.append(beside)  # last: a helper there must not take the place of a module of ours
    try:
        with open(path, "rb") as f:  # as bytes, so that compile() minds a byte-order mark and an encoding line
            exec(compile(f.read(), path, "exec"), module.__dict__)
    except (Exception, SystemExit) as e:
        raise UserError(f"--verifier={path}: {type(e).__name__}: {e}".split("\n")[0]) from None
    function = getattr(module, "verify", None)
    if not callable(function):
        raise UserError(f"--verifier={path}: {usage}")
    try:
        inspect.signature(function).bind("prompt", "completion", "answer")
    except TypeError:
        raise UserError(f"--verifier={path}: verify{inspect.signature(function)} does not take three "
                        f"arguments; {usage}") from None
    except ValueError:
        pass  # written in C, without a signature: the first call will tell
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise UserError(f"--verifier={path}: verify returns a coroutine or generator, not a number; {usage}")

    def verify(prompt, completion, answer):
        return float(function(prompt, completion, answer))
    return verify


# -----------------------------------------------------------------------------
# Files, and what is fetched

def cache_dir():
    """Where downloads are kept: NANOSMOL_CACHE, or ~/.cache/nanosmol."""
    return os.environ.get("NANOSMOL_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "nanosmol")


def write_json(path, value, indent=2):
    """Writes a JSON file that is whole whenever it is there."""
    # "replace": a file name that is not UTF-8 must not end a preparation
    with open(f"{path}.tmp{os.getpid()}", "w", encoding="utf-8", errors="replace") as f:
        json.dump(value, f, ensure_ascii=False, indent=indent)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f.name, path)


def read_json(path):
    """The JSON object in a file; UserError where there is none."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: {e}") from None


SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "RUNPOD_API_KEY")


def read_secrets(path=".env"):
    """Puts the SECRETS that a .env file holds (`HF_TOKEN=...` a line) into the environment, which wins over it."""
    raw = open(path, "rb").read() if os.path.isfile(path) else b""
    wide = raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # what echo writes in PowerShell
    kept = {}
    for line in raw.decode("utf-16" if wide else "utf-8-sig", "replace").splitlines():
        found = re.match(r"""\s*(?:export\s+)?(\w+)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s#]*))""", line)
        if found and found[1] in SECRETS:
            kept[found[1]] = next(v for v in found.groups()[1:] if v is not None)
    kept |= {key: os.environ[key] for key in SECRETS if key in os.environ}
    for key, secret in kept.items():
        secret = secret.strip()  # a line end that was pasted along
        if not re.fullmatch(r"[!#-&(-~]*", secret):
            raise UserError(f"{key}: it holds a quote, a space or another character that no token has; copy it again")
        os.environ[key] = secret


def for_terminal(text):
    """`text` without the control characters that a terminal would obey, if it is one."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text) if sys.stdout.isatty() else text


def without_secrets(text):
    """`text` as it may be shown: errors of other libraries can quote what they were given."""
    for key in SECRETS:
        hide(key, os.environ.get(key))
    for secret, key in _hidden.items():
        text = text.replace(secret, f"[{key}]")
    return text


_hidden = {}


def hide(key, secret):
    """From now on without_secrets hides this one too."""
    if secret and len(secret) > 7:
        _hidden[secret] = key


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def weights_hash(directory):
    """The SHA-256 of a model's weights, in however many files."""
    return " ".join(sha256(os.path.join(directory, f)) for f in sorted(os.listdir(directory)) if f.endswith(".safetensors"))


def progress(**options):
    from tqdm import tqdm
    return tqdm(disable=None, unit_scale=True, dynamic_ncols=True, **options)  # None: on terminals only


def download(url, digest, tries=5):
    """The local path of what `url` holds, checked against its SHA-256; goes on where a try was cut."""
    import requests
    mirror = os.environ.get("NANOSMOL_MIRROR")  # another server that holds the same path
    fetched = re.sub(r"^https?://[^/]+", mirror.rstrip("/"), url) if mirror else url
    path = os.path.join(cache_dir(), digest[:16] + "-" + url.rsplit("/", 1)[1])
    if os.path.exists(path):
        return path
    os.makedirs(cache_dir(), exist_ok=True)
    part, trouble = path + ".part", None
    for attempt in range(tries):
        if attempt:
            time.sleep(min(2 ** attempt, 30) if not mirror else 0.05)
        have = os.path.getsize(part) if os.path.exists(part) else 0
        try:
            headers = {"Range": f"bytes={have}-"} if have else {}
            with requests.get(fetched, stream=True, timeout=30, headers=headers) as r:
                if r.status_code == 416:  # the part is longer than the file is
                    os.remove(part)
                    continue
                if r.status_code in (404, 410):
                    raise UserError(f"{fetched}: not there any more ({r.status_code}); download it by other "
                                    "means and give prepare.py its path")
                r.raise_for_status()
                have = have if r.status_code == 206 else 0
                size = have + int(r.headers.get("Content-Length", 0))
                with open(part, "ab" if have else "wb") as f, progress(
                        desc=os.path.basename(url), total=size or None, initial=have, unit="B") as bar:
                    for chunk in r.iter_content(1 << 16):
                        f.write(chunk)
                        bar.update(len(chunk))
                    f.flush()
                    os.fsync(f.fileno())
            if sha256(part) == digest:
                os.replace(part, path)
                return path
            trouble = "its content is not what it was when this was written (SHA-256 differs)"
            if not size or os.path.getsize(part) >= size:
                os.remove(part)  # whole, and wrong
        except requests.RequestException as e:
            trouble = f"{type(e).__name__}: {getattr(getattr(e, 'response', None), 'status_code', '') or e}"
    raise UserError(f"{fetched}: could not be fetched in {tries} tries: {trouble}; run the same command to "
                    "go on")


def _hub(call, repo, **options):
    """Calls a function of huggingface_hub, again if the network fails; its errors become UserErrors."""
    from huggingface_hub import errors
    site = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    page = f"{site}/datasets/{repo}" if options.get("repo_type") == "dataset" else f"{site}/{repo}"
    for attempt in range(5):
        wait = 2 ** attempt
        try:
            return call(repo, **options)
        except errors.GatedRepoError:
            raise UserError(f"{repo}: its owner asks for consent: accept the terms on {page}, make a token "
                            f"on {site}/settings/tokens, then run `hf auth login` or set HF_TOKEN") from None
        except errors.RepositoryNotFoundError:
            raise UserError(f"{repo}: the Hub has no such repository, or it is private: check the name; for "
                            "a private one run `hf auth login` or set HF_TOKEN to a token that may read "
                            "it") from None
        except errors.HfHubHTTPError as e:
            status = e.response.status_code if e.response is not None else 0
            trouble = f"the Hub answered {status}"
            if status == 404:
                raise UserError(f"{repo}: nothing of the name "
                                f"{options.get('filename') or options.get('path_in_repo')} in this "
                                "repository; --config= names a folder of it") from None
            if status in (400, 401, 403):
                raise UserError(f"{repo}: {trouble}: check HF_TOKEN, or run `hf auth login`") from None
            after = e.response.headers.get("Retry-After", "") if e.response is not None else ""
            wait = int(after) if after.isdigit() else wait
        except errors.HFValidationError:
            raise UserError(f"{repo}: not a Hub id, which is written owner/name") from None
        except Exception as e:  # no network, in whatever words this version of the client has for it
            if not isinstance(e, OSError) and not type(e).__module__.startswith(("httpx", "requests")):
                raise
            trouble = str(e.__cause__ or e).splitlines()[0]
        if attempt < 4:
            time.sleep(min(wait, 60))
    raise UserError(f"{repo}: could not be fetched from {site}: {trouble}; run the same command to go on")


def hub_snapshot(repo, patterns, repo_type="model"):
    """A local directory with the files of a Hub repository that match the patterns."""
    from huggingface_hub import snapshot_download
    return _hub(snapshot_download, repo, repo_type=repo_type, allow_patterns=patterns)


def fetch_model(hub_id):
    """A local directory with a Hub model's config, safetensors and tokenizer: what from_pretrained takes."""
    directory = hub_snapshot(hub_id, ["config.json", "generation_config.json", "*.safetensors",
                                      "*.safetensors.index.json",
                                      "tokenizer*", "special_tokens_map.json", "chat_template*", "vocab.json",
                                      "merges.txt"])
    if not os.path.isdir(directory) or not any(f.endswith(".safetensors") for f in os.listdir(directory)):
        raise UserError(f"{hub_id}: this Hub repository has no *.safetensors; name one that has")
    return directory


# `repo`, `digest` (SHA-256) and `revision` are None for a local file
File = collections.namedtuple("File", "path size split repo digest revision")


def local_path(file):
    """Where a File lies on this machine: fetched if need be, and checked if the Hub says its SHA-256."""
    if file.repo is None:
        return file.path
    from huggingface_hub import hf_hub_download
    for attempt in range(2):
        path = _hub(hf_hub_download, file.repo, filename=file.path, repo_type="dataset",
                    revision=file.revision, force_download=attempt > 0)
        if os.path.getsize(path) == file.size and file.digest in (None, sha256(path)):
            return path
    raise UserError(f"{file.repo}: {file.path} arrives damaged (size or SHA-256 differs); try again later")


# -----------------------------------------------------------------------------
# Reading: a source is a list of files, a file a run of blocks, a block what a worker turns into tokens

TEXT, LINES = (".txt", ".md", ".text"), (".jsonl", ".ndjson", ".json")
PACKED = {".zst": "zstd", ".zstd": "zstd", ".gz": "gzip"}
VALID = ("valid", "validation", "val", "dev", "eval")
OWN_SPLIT = re.compile(r"(?:^|[-_./])(train|valid|validation|val|dev|eval|test)(?=[-_.0-9/]|$)")

# kind: 'documents' (text, separated by <|endoftext|>), 'train' or 'val' (a piece of one document), 'lines'
# (JSON) or 'rows' (parquet); data: bytes, or a pyarrow batch; at: the offset or line where it begins, or the
# row; first, last: of its document; read: how many bytes of the file are behind us
Block = collections.namedtuple("Block", "kind data at first last read")


def _kind_of(path):
    """'text', 'lines' or 'parquet' by a file's name, and its compression; (None, None) if it is no data."""
    stem, ending = os.path.splitext(path.lower())
    packing = PACKED.get(ending)
    ending = os.path.splitext(stem)[1] if packing else ending
    kinds = {**dict.fromkeys(TEXT, "text"), **dict.fromkeys(LINES, "lines"), ".parquet": "parquet"}
    return kinds.get(ending), packing if ending in kinds else None


def _with_splits(files):
    """Files with their own split, if their names tell train from validation; what is for testing stands in
    for a validation split where there is none, and is left out where there is one."""
    marks = [(OWN_SPLIT.findall(f.path.lower()) or [None])[-1] for f in files]
    held_out = next((m for m in (VALID, ("test",)) if set(m) & set(marks)), None)
    if "train" not in marks or not held_out:
        return files
    kept = [f._replace(split="val" if m in held_out else "train")
            for f, m in zip(files, marks) if m in held_out or m not in ("test",)]
    # the validation split goes first, so that --max_tokens can stop in the training data and be done
    return sorted(kept, key=lambda f: f.split == "train")


def local_files(path):
    """The files of a local source: one file of any name, or those of a folder that hold data."""
    if os.path.isfile(path):
        return [File(path, os.path.getsize(path), *[None] * 4)]
    if not os.path.isdir(path):
        raise UserError(f"{path}: neither a file nor a folder")
    found = sorted(os.path.join(folder, f) for folder, _, names in os.walk(path) for f in names
                   if not f.startswith(".") and _kind_of(f)[0])
    gone = [f for f in found if not os.path.exists(f)]
    if gone:
        raise UserError(f"{gone[0]}: a link to a file that is not there; remove it, or bring the file back")
    if not found:
        raise UserError(f"{path}: this folder holds no .txt, .md, .jsonl, .jsonl.zst, .jsonl.gz or .parquet "
                        "file")
    inside = _with_splits([File(os.path.relpath(f, path), os.path.getsize(f), *[None] * 4) for f in found])
    return [f._replace(path=os.path.join(path, f.path)) for f in inside]


def hub_list(repo, folder=""):
    """Every File of a data set on the Hub, or of one folder of it, all of one commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile
    api = HfApi()
    revision = _hub(api.repo_info, repo, repo_type="dataset").sha
    listed = _hub(lambda repo, **options: list(api.list_repo_tree(repo, **options)), repo,
                  path_in_repo=folder or None, recursive=True, repo_type="dataset", revision=revision)
    return [File(f.path, f.size, None, repo, f.lfs.sha256 if f.lfs else None, revision)
            for f in sorted(listed, key=lambda f: f.path) if isinstance(f, RepoFile)]


def hub_files(repo, config="", split="", pattern=""):
    """The data files of a data set on the Hub: under the folder `config`, matching `pattern`, of one `split`.
    Where there are files of several kinds, those of the kind that most bytes are of."""
    listed = hub_list(repo, config)
    files = [f for f in listed if fnmatch.fnmatch(f.path, pattern or "*") and _kind_of(f.path)[0]]
    if split:
        files = [f for f in files if re.search(rf"(^|[-_./]){re.escape(split)}([-_./]|$)", f.path)]
    if not files:
        folders = ", ".join(sorted({os.path.dirname(f.path) for f in listed} - {""}))[:300]
        wanted = f"{' under ' + config if config else ''}{' of the split ' + split if split else ''}"
        raise UserError(f"hub:{repo}: no data files{wanted}; --config= names a folder: {folders or 'none'}")
    kinds = collections.Counter()
    for f in files:
        kinds[_kind_of(f.path)[0]] += f.size
    files = [f for f in files if _kind_of(f.path)[0] == kinds.most_common(1)[0][0]]
    return files if split else _with_splits(files)


def _open(path, packing):
    """A binary stream of the file's content, and a function that says how many of its bytes are read."""
    raw = open(path, "rb")
    if not packing:
        return raw, raw.tell
    import pyarrow
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), packing), raw.tell


def read_blocks(file, only, column=None):
    """The Blocks of a File, in order, always the same. `only`: the file is the whole source, so that a text
    without <|endoftext|> is one document, whose last tenth is held out. `column`: the one to read of a
    parquet file."""
    path, (kind, packing) = local_path(file), _kind_of(file.path)
    if kind == "parquet":
        yield from _read_parquet(path, file, column)
        return
    try:
        if kind != "lines":
            with open(path, "rb") as f:
                head = f.read(1 << 16)
            if not packing and (head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head):
                raise UserError(f"{file.path}: not UTF-8 text (a zero byte or a UTF-16 mark within its first "
                                "64 kB); convert it first, e.g. iconv -f utf-16 -t utf-8")
            if only and not packing:
                length = _single_document(path)
                if length is not None:
                    yield from _read_single(path, length)
                    return
        stream, told = _open(path, packing)
        with stream:
            as_lines = kind == "lines"
            yield from _read_separated(stream, told, "lines" if as_lines else "documents",
                                       b"\n" if as_lines else EOT.encode())
    except (OSError, EOFError) as e:
        raise UserError(f"{file.path}: cannot be read to its end: {e}; is it cut short?") from None


def _read_separated(stream, told, kind, separator):
    rest, at = b"", 0
    while True:
        more = stream.read(BLOCK)
        if not at and not rest:
            more = more.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is not text
        buffer, cut = rest + more, len(rest + more)
        if more:
            found = buffer.rfind(separator)
            if found < 0 and len(buffer) < LONGEST:
                rest = buffer
                continue
            cut = found + len(separator) if found >= 0 else _cut(buffer)
        if cut:
            yield Block(kind, buffer[:cut], at, True, True, told())
            at += buffer.count(b"\n", 0, cut) if kind == "lines" else cut
        if not more:
            return
        rest = buffer[cut:]


def _single_document(path):
    """How many bytes of a text are one document: all of them, if <|endoftext|> comes nowhere or only at its
    end; else None."""
    import mmap
    size = os.path.getsize(path)
    if size == 0:
        return 0
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = content.find(EOT.encode())
        if found < 0:
            return size
        after = found + len(EOT)
        return found if size - after < 1024 and not content[after:].strip() else None


def _read_single(path, length):
    """One document: its last 10% of characters as 'val' and what comes before as 'train', which is nanoGPT's
    split. Validation goes first, see _with_splits."""
    with open(path, "rb") as f:
        begin = 3 if f.read(3) == b"\xef\xbb\xbf" else 0
        f.seek(begin)
        chars, left, middle, counts = 0, length - begin, begin, []
        while left > 0:
            data = f.read(min(BLOCK, left))
            left -= len(data)
            counts.append(len(data) - _continuations(data))
            chars += counts[-1]
        wanted = int(0.9 * chars)
        for i, count in enumerate(counts):  # its block, then its place in the block
            if wanted < count or i == len(counts) - 1:
                f.seek(begin + i * BLOCK)
                data = np.frombuffer(f.read(min(BLOCK, length - f.tell())), np.uint8)
                starts = np.flatnonzero((data & 0xC0) != 0x80)
                middle = begin + i * BLOCK + (int(starts[wanted]) if wanted < len(starts) else len(data))
                break
            wanted -= count
        done = 0
        for kind, at, end in (("val", middle, length), ("train", begin, middle)):
            f.seek(at)
            rest, first = b"", True
            while at < end:
                more = f.read(min(BLOCK, end - at - len(rest)))
                buffer = rest + more
                last = at + len(buffer) >= end
                cut = len(buffer) if last else _cut(buffer)
                done += cut
                yield Block(kind, buffer[:cut], at, first, last and kind == "val", done)
                at, rest, first = at + cut, buffer[cut:], False


def _continuations(data):
    return int(((np.frombuffer(data, np.uint8) & 0xC0) == 0x80).sum())


# Between these two characters every pre-tokenizer begins a new word, and looks neither back nor ahead
BETWEEN_WORDS = re.compile(r"(?<=\S)\n(?=\w)|(?<=\w)(?= \w)")


def _cut(data):
    """Where, near the end of these bytes, a long text can be cut so that its tokens stay what they are."""
    tail = data[-(1 << 16):].decode("utf-8", "surrogateescape")
    places = [m.end() for m in BETWEEN_WORDS.finditer(tail, 8, len(tail) - 8)]
    if places:
        return len(data) - len(tail[places[-1]:].encode("utf-8", "surrogateescape"))
    cut = len(data)  # 64 kB without a space: at least between two characters
    while cut > len(data) - 4 and data[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    return cut - 1 if cut > 1 and data[cut - 1] >= 0xC0 else cut


def _read_parquet(path, file, column):
    import pyarrow
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as f:
            rows, total = 0, max(f.metadata.num_rows, 1)
            if column and column not in f.schema_arrow.names:
                raise UserError(f"{file.path}: no column {column!r} in "
                                f"{', '.join(f.schema_arrow.names)[:200]}; name it with --field=")
            for group in range(f.metadata.num_row_groups):
                for batch in f.iter_batches(256, row_groups=[group], columns=[column] if column else None):
                    rows += len(batch)
                    yield Block("rows", batch, rows - len(batch), True, True, file.size * rows // total)
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{file.path}: not a parquet file that can be read: {e}".splitlines()[0]) from None


# -----------------------------------------------------------------------------
# From blocks to what is written

def _dtype(tok):
    return np.dtype("<u2" if tok.vocab_size <= 1 << 16 else "<u4")


class Job:
    """What a worker knows: the tokenizer, the shape of the records, and how to split. Called with a File and
    a Block, it returns a dict: the bytes to append to each output file, under 'out'; counts; and what was
    wrong."""

    def __init__(self, tok, shape, field, val_fraction, block_size):
        self.tok, self.shape, self.field = tok, shape, field
        self.threshold, self.block_size = int(val_fraction * 2 ** 64).to_bytes(8, "big"), block_size
        self.dtype = _dtype(tok) if tok else None

    def __call__(self, file, block):
        result = _result()
        if block.kind in ("train", "val"):
            text = _decoded(block.data, block.at, result)
            ids = self.tok.encode_piece(text, block.first)
            ids = np.append(ids, self.tok.eos_id) if block.last else ids
            result["out"][block.kind + ".bin"] = ids.astype(self.dtype).tobytes()
            result["count"].update({"bytes": len(block.data), "documents": int(block.last),
                                    block.kind + "_tokens": len(ids)})
            return result
        parts = {"train": [], "val": []}
        for at, content, size in self.contents(block, result):
            split = file.split or self.split(content)
            parts[split].append((at, content))
            result["count"]["bytes"] += size
        for split, found in parts.items():
            if found:
                write = dict(text=self.write_text, chat=self.write_chat).get(self.shape, self.write_json)
                write(split, found, result)
        return result

    def split(self, content):
        """By a hash of the text itself, so that more data never moves a document across."""
        text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return "val" if digest < self.threshold else "train"

    def contents(self, block, result):
        """(where, text or record, bytes) of each document of a block; what is wrong is counted instead."""
        if block.kind == "documents":
            for text in _decoded(block.data, block.at, result).split(EOT):
                text = text.strip()
                if text:
                    yield block.at, text, len(text) if text.isascii() else len(text.encode())
            return
        for at, record, size in self.records(block, result):
            try:
                if not isinstance(record, dict):
                    raise ValueError("not a JSON object")
                if self.shape == "text":
                    made = record[self.field]
                    if not isinstance(made, str):
                        raise ValueError(f"{self.field!r} is not a text")
                    if not made:
                        raise ValueError(f"{self.field!r} is empty")
                else:
                    made = dict(chat=as_chat, prefs=as_prefs, verify=as_verify)[self.shape](record)
                yield at, made, len(made.encode()) if isinstance(made, str) else size
            except KeyError as e:
                result["wrong"].append((at, f"no field {e}"))
            except (ValueError, AttributeError, TypeError) as e:
                result["wrong"].append((at, str(e)))

    def records(self, block, result):
        if block.kind == "rows":
            for i, row in enumerate(block.data.to_pylist()):
                yield block.at + i + 1, row, block.data.nbytes // len(block.data)
            return
        for i, line in enumerate(block.data.split(b"\n")):
            if line.strip():
                try:
                    record = json.loads(_decoded(line, None, result))
                    if b"\\ud" in line or b"\\uD" in line:  # half a character is legal in JSON only
                        record = json.loads(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
                    yield block.at + i + 1, record, len(line)
                except (ValueError, RecursionError) as e:
                    result["wrong"].append((block.at + i + 1, f"not JSON: {e}"))

    def write_text(self, split, found, result):
        ids = self.tok.encode_documents([text for _, text in found])
        result["out"][split + ".bin"] = ids.astype(self.dtype).tobytes()
        result["count"].update({split + "_tokens": len(ids), split + "_documents": len(found),
                                "documents": len(found)})

    def write_chat(self, split, found, result):
        ids, mask, kept = [], [], 0
        for at, messages in found:
            one, told = render_chat(messages, self.tok)
            if self.block_size and len(one) > self.block_size:
                result["wrong"].append((at, f"the conversation has {len(one)} tokens, "
                                            f"--block_size={self.block_size}"))
                continue
            ids += one
            mask += told
            kept += 1
        result["out"][split + ".bin"] = np.array(ids, self.dtype).tobytes()
        result["out"][split + ".mask"] = bytes(mask)
        result["count"].update({split + "_tokens": len(ids), split + "_documents": kept, "documents": kept})

    def write_json(self, split, found, result):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for _, record in found]
        result["out"][split + ".jsonl"] = "".join(lines).encode()
        result["count"].update({split + "_documents": len(found), "documents": len(found)})


def _result():
    return dict(out={}, count=collections.Counter(), wrong=[], broken_at=None)


def _decoded(raw, at, result):
    """UTF-8 as text; what is none becomes U+FFFD, and is counted."""
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        text = raw.decode("utf-8", "replace")
        result["count"]["broken"] += text.count("\ufffd") - raw.count("\ufffd".encode())
        if at is not None and result["broken_at"] is None:
            result["broken_at"] = at + e.start
        return text


def _shape_of(file, block, wanted, field):
    """(shape, field) of the records, by the first one: what the user wants, or what it looks like."""
    if block.kind in ("documents", "train", "val"):
        if wanted not in ("", "text"):
            raise UserError(f"{file.path}: --as={wanted} wants records (.jsonl or .parquet), and this is "
                            "plain text")
        return "text", ""
    if block.kind == "rows":
        keys, where = block.data.schema.names, ""
    else:
        for i, line in enumerate(block.data.split(b"\n")):
            if line.strip():
                break
        try:
            record = json.loads(line)
            keys = list(record) if isinstance(record, dict) else None
        except (ValueError, RecursionError):
            keys = None
        where = f", line {i + 1}"
        if keys is None:
            raise UserError(f"{file.path}{where}: not a JSON object; a .jsonl file has one object in every "
                            "line")
    has = lambda *names: any(n in keys for n in names)
    asked = has("prompt", "question")
    text = next((f for f in ([field] if field else ["text", "content"]) if f in keys), None)
    talk = has("messages", "conversations")
    fits = dict(prefs=asked and "chosen" in keys and "rejected" in keys, verify=asked and "answer" in keys,
                chat=talk or asked and has("answer", "chosen"), text=bool(text))
    fits = [shape for shape, fit in fits.items() if fit]
    shape = wanted or ("text" if field or not fits else "chat" if talk and "prefs" not in fits else fits[0])
    if shape not in fits:
        what = dict(text=f"no field {field or 'text'!r}", chat="no 'messages', nor 'prompt' and 'answer'",
                    prefs="no 'prompt', 'chosen' and 'rejected'", verify="no 'prompt' and 'answer'")[shape]
        close = difflib.get_close_matches(field or "text", keys, n=1)
        raise UserError(f"{file.path}{where}: {what} in {', '.join(keys)[:200]}; name the text with "
                        f"--field={close[0] if close else 'NAME'}, or its shape with --as=")
    return shape, text if shape == "text" else ""


# -----------------------------------------------------------------------------
# Prepared data, read back for training

class Batch(types.SimpleNamespace):
    """A micro-batch: x, y (B, T) token ids and targets (-1: not counted), and what else its stage needs.

    `units` is what its loss is a mean over: targets, or for preferences pairs. `tokens` counts the tokens in it.
    `with_signal` counts the units that can change the weights: with RLVR those whose advantage is not 0.
    `metrics` holds what was measured when it was made.
    """

    def __init__(self, x, y, units, tokens, **more):
        super().__init__(**{"x": x, "y": y, "units": units, "tokens": tokens, "with_signal": units, "metrics": {}, **more})

    def to(self, device):
        """Moves its tensors to a device, in place, without waiting for the copy. Returns itself."""
        import torch
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                if device.startswith("cuda") and value.device.type == "cpu":
                    value = value.pin_memory()
                setattr(self, name, value.to(device, non_blocking=True))
        return self


def padded(rows, pad_id):
    """Sequences of different lengths as (x, y), each (len(rows), longest - 1), padded at the right with pad_id.

    A row is (ids, mask): its targets in y are the ids whose mask is 1, all other entries of y are -1.
    """
    import torch
    x = torch.full((len(rows), max(len(ids) for ids, _ in rows) - 1), pad_id)
    y = torch.full_like(x, -1)
    for i, (ids, mask) in enumerate(rows):
        x[i, :len(ids) - 1] = torch.tensor(ids[:-1])
        y[i, :len(ids) - 1] = torch.where(torch.tensor(mask[1:]) == 1, torch.tensor(ids[1:]), -1)
    return x, y


def spread(count, wanted):
    """At most `wanted` of the indices 0 ... count - 1, evenly spread, always the same ones."""
    return [i * count // min(count, wanted) for i in range(min(count, wanted))]


class Bins:
    """The windows of one split of a prepared data set, in an order that is a pure function of
    (seed, position): `position` counts the windows consumed since the start of training.

    Every epoch visits every window once, shuffled, on a grid shifted by an offset of its own, so that
    two epochs over a small text differ. Any process can make any batch, in any order, at any time.

    Raises UserError where the file is no bin, or too short: for training less than a window and its targets,
    for validation less than two tokens.
    """

    def __init__(self, directory, split, block_size, seed=1337):
        self.directory, self.block_size, self.seed, self._epoch = directory, block_size, seed, None
        self.meta = read_meta(directory)
        self.path = os.path.join(directory, f"{split}.bin")
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        if not os.path.exists(self.path):
            raise UserError(f"{self.path}: no such file; {how_to_prepare(directory)}")
        size = os.path.getsize(self.path)
        if size == 0:
            raise UserError(f"{self.path}: 0 bytes are no tokens; {how_to_prepare(directory)}")
        if size % dtype.itemsize:
            raise UserError(f"{self.path}: {size:,} bytes are no whole number of {dtype.name} tokens; "
                            f"{how_to_prepare(directory)}")
        self.tokens = np.memmap(self.path, dtype=dtype, mode="r")
        enough = block_size + 1 if split == "train" else 2
        if len(self.tokens) < enough:
            raise UserError(f"{self.path}: {len(self.tokens):,} tokens are too few for one window of "
                            f"block_size={block_size} and its targets; set --block_size={max(1, len(self.tokens) - 1)} "
                            "or less, or prepare more text")
        mask = os.path.join(directory, f"{split}.mask")
        self.mask = np.memmap(mask, dtype=np.uint8, mode="r") if os.path.exists(mask) else None
        if self.mask is not None and len(self.mask) != len(self.tokens):
            raise UserError(f"{mask}: {len(self.mask):,} bytes for {len(self.tokens):,} tokens; {how_to_prepare(directory)}")
        self.amount = f"{len(self.tokens):,} tokens"
        # one window less than fit leaves the grid room to shift by up to a whole window
        self.per_epoch = max(1, (len(self.tokens) - 1) // block_size - 1)

    def start(self, position):
        """The first token of the window at `position`."""
        epoch, index = divmod(position, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            room = min(self.block_size, len(self.tokens) - self.per_epoch * self.block_size)
            self._epoch, self._offset, self._order = epoch, int(rng.integers(room)), rng.permutation(self.per_epoch)
        return self._offset + int(self._order[index]) * self.block_size

    def batch(self, positions):
        """(x, y), int64 (len(positions), block_size): inputs and targets; a target that does not count is -1."""
        return self.read([self.start(p) for p in positions])

    def read(self, starts):
        """The windows that begin at the tokens `starts`: (x, y), as `batch`. A window that reaches beyond the end of
        the text is filled up with the end-of-text token, and what is missing is no target."""
        import torch
        where = np.asarray(starts)[:, None] + np.arange(self.block_size + 1)
        beyond = where >= len(self.tokens)
        where = np.minimum(where, len(self.tokens) - 1)
        window = torch.from_numpy(self.tokens[where].astype(np.int64))
        if beyond.any():
            window[torch.from_numpy(beyond)] = self.meta.get("eos_id", 0)
        x, y = window[:, :-1].clone(), window[:, 1:].clone()  # not views: y is about to be masked
        y[torch.from_numpy(beyond[:, 1:])] = -1
        if self.mask is not None:
            y[torch.from_numpy(self.mask[where[:, 1:]]) == 0] = -1
        return x, y

    def held_out(self, windows):
        """Starts of at most `windows` windows spread evenly over the split, the last one perhaps a partial one; the
        same at every call."""
        fit = -(-(len(self.tokens) - 1) // self.block_size)
        return [i * self.block_size for i in spread(fit, windows)]

    def check_vocabulary(self, vocab_size):
        """UserError if a token exceeds the vocabulary. Reads all of a small file, 256 pieces of a large one:
        12 GB would delay the first step by a minute."""
        largest = max(int(piece[:2 ** 20].max()) for piece in np.array_split(self.tokens, 256) if len(piece))
        if largest >= vocab_size:
            raise UserError(f"{self.path}: token {largest} exceeds the vocabulary of {vocab_size}; was it made with "
                            f"another tokenizer than {self.meta['tokenizer']!r}? {how_to_prepare(self.directory)}")

    def fingerprint(self):
        """Changes when the bin does: its size and 64 pieces of 64 KiB spread evenly over it."""
        size = os.path.getsize(self.path)
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        with open(self.path, "rb") as f:
            for i in range(64):
                f.seek(i * size // 64)
                digest.update(f.read(2 ** 16))
        return digest.hexdigest()


class Mixture:
    """Several Bins read by weight, as one: position -> (which, position in it), again a pure function.

    In every 1,000 positions each has its exact share (to within one window), in a seeded order.
    """
    BLOCK = 1000

    def __init__(self, bins, weights, seed=1337):
        total = sum(weights)
        self.bins, self.seed, self._block = bins, seed, None
        self.shares = [w / total for w in weights]
        self.per_epoch = sum(b.per_epoch for b in bins)

    def where(self, position):
        """(index of the Bins, position within it)."""
        block, index = divmod(position, self.BLOCK)
        if block != self._block:
            # cumulative shares rounded at block edges: nothing drifts however long the run is
            edges = [[round(s * b * self.BLOCK) for s in np.cumsum(self.shares)] for b in (block, block + 1)]
            before, after = (np.diff([0, *e]) for e in edges)
            which = np.repeat(np.arange(len(self.bins)), after - before)
            which = np.random.default_rng([self.seed, block, 1]).permutation(which)
            rank = np.zeros(len(which), dtype=np.int64)
            for i in range(len(self.bins)):
                rank[which == i] = before[i] + np.arange((which == i).sum())
            self._block, self._which, self._rank = block, which, rank
        return int(self._which[index]), int(self._rank[index])

    def batch(self, positions):
        """(x, y), int64 (len(positions), block_size), of any Bins each."""
        import torch
        if len(self.bins) == 1:
            return self.bins[0].batch(positions)
        rows = [self.bins[i].batch([p]) for i, p in map(self.where, positions)]
        return torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])


class Records:
    """The lines of one .jsonl split, tokenized, in an order that is a function of (seed, position) as that of Bins.

    `encode(record)` gives what is kept of a line, or a reason (a text) to leave it out: it is counted in `left_out`.
    """

    def __init__(self, directory, split, encode, seed=1337):
        self.path, self.seed, self._epoch = os.path.join(directory, f"{split}.jsonl"), seed, None
        if not os.path.exists(self.path):
            raise UserError(f"{self.path}: no such file; {how_to_prepare(directory)}")
        self.rows, self.left_out = [], collections.Counter()
        with open(self.path, encoding="utf-8", newline="\n") as f:  # U+2028 ends no record
            for n, line in enumerate(f, 1):
                try:
                    record = json.loads(line)
                except ValueError as e:
                    raise UserError(f"{self.path}, line {n}: not JSON ({e}); {how_to_prepare(directory)}") from None
                row = encode(record)
                if isinstance(row, str):
                    self.left_out[row] += 1
                else:
                    self.rows.append(row)
        if not self.rows:
            why = "; ".join(f"{count} left out: {reason}" for reason, count in self.left_out.items()) or "it is empty"
            raise UserError(f"{self.path}: nothing in it can be used ({why}); {how_to_prepare(directory)}")
        self.per_epoch, self.amount = len(self.rows), f"{len(self.rows):,} records"

    def __getitem__(self, position):
        """(index in rows, row) at a position."""
        epoch, index = divmod(position, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.per_epoch)
        return int(self._order[index]), self.rows[self._order[index]]

    def held_out(self, count):
        """At most `count` indices into rows, spread evenly, the same at every call."""
        return spread(self.per_epoch, count)

    def fingerprint(self):
        return sha256(self.path)


# What train.py reads, a class for each kind of data. All have .tokenizer, .vocab_size, .ends (ids that end a text),
# .amount, .per_epoch, .fingerprint, .notes (lines to print), .shares ({domain: share}), .batch(positions),
# .held_out(sequences, rows, rank, world_size): (domain, batch) pairs, and .check_vocabulary(vocab_size).

class Windows:
    """Text and conversations: windows of block_size tokens of a data set, or of a mixture, as Batches."""

    def __init__(self, config):
        self.mixture = parse_mixture(config["dataset"])
        directories = [os.path.join(config["data_dir"], name) for name, _ in self.mixture]
        metas = [read_meta(directory) for directory in directories]
        for directory, meta in zip(directories, metas):
            if (meta["tokenizer"], meta["vocab_size"]) != (metas[0]["tokenizer"], metas[0]["vocab_size"]):
                raise UserError(f"{directory} was made with the tokenizer {meta['tokenizer']!r}, {directories[0]} with "
                                f"{metas[0]['tokenizer']!r}; a mixture has to share one")
        block_size, seed = config["block_size"], config["seed"]
        self.train = [Bins(d, "train", block_size, seed) for d in directories]
        self.val = [Bins(d, "val", block_size, seed) for d in directories]
        if config["stage"] == "sft" and any(bins.mask is None for bins in self.train + self.val):
            raise UserError(f"{config['dataset']}: stage='sft' wants conversations, with a train.mask and a val.mask beside "
                            "the bins; python prepare.py CHATS.jsonl --as=chat makes them")
        self.order = Mixture(self.train, [weight for _, weight in self.mixture], seed)
        self.per_epoch = self.order.per_epoch
        self.shares = dict(zip([name for name, _ in self.mixture], self.order.shares))
        own = os.path.exists(os.path.join(directories[0], "tokenizer.json"))
        self.tokenizer = load_tokenizer(directories[0] if own else metas[0]["tokenizer"])
        self.vocab_size, self.notes = metas[0]["vocab_size"], []
        self.ends = [self.tokenizer.eos_id]
        if config["stage"] == "sft":
            self.ends.append(self.tokenizer.encode_special(IM_END))
        self.amount = " + ".join(bins.amount for bins in self.train)
        self.fingerprint = [bins.fingerprint() for bins in self.train]

    def batch(self, positions):
        return self._batch(*self.order.batch(positions))

    def _batch(self, x, y):
        return Batch(x, y, units=(y >= 0).sum().item(), tokens=x.numel())

    def held_out(self, sequences, rows, rank=0, world_size=1):
        """Batches of `rows` windows of this process's share of at most `sequences` of each domain."""
        for domain, bins in zip(self.shares, self.val):
            starts = bins.held_out(sequences)[rank::world_size]
            rows = max(rows, 4096 // bins.block_size)  # small windows are read in larger batches
            for i in range(0, len(starts), rows):
                yield domain, self._batch(*bins.read(starts[i:i + rows]))

    def held_out_count(self, sequences):
        """How many windows of the smallest domain held_out gives to all processes together."""
        return min(len(bins.held_out(sequences)) for bins in self.val)

    def check_vocabulary(self, vocab_size):
        if vocab_size < self.vocab_size:
            raise UserError(f"vocab_size={vocab_size} of the model is smaller than the data's {self.vocab_size}")
        for bins in self.train + self.val:
            bins.check_vocabulary(vocab_size)


class _Conversations:
    """What Pairs and Problems share: records stay text until the tokenizer of the model that is trained meets them."""

    def __init__(self, config, tokenizer):
        (name, _), *others = parse_mixture(config["dataset"])
        if others:
            raise UserError(f"dataset={config['dataset']!r}: stage={config['stage']!r} takes one data set, not a mixture")
        self.directory, self.tokenizer = os.path.join(config["data_dir"], name), tokenizer
        self.vocab_size, self.shares = tokenizer.vocab_size, {name: 1.0}
        self.ends = [tokenizer.eos_id, tokenizer.encode_special(IM_END)]
        self.train, self.val = (Records(self.directory, split, self.encode, config["seed"]) for split in ("train", "val"))
        self.notes = [f"left out {count} of {sum(records.left_out.values()) + records.per_epoch} {what} of {name}: {reason}"
                      for records, what in ((self.train, "records"), (self.val, "held-out records"))
                      for reason, count in records.left_out.items()]
        self.per_epoch, self.amount = self.train.per_epoch, self.train.amount
        self.fingerprint = [self.train.fingerprint()]

    def held_out(self, sequences, rows, rank=0, world_size=1):
        """Batches of `rows` of this process's share of at most `sequences` held-out records."""
        indices = self.val.held_out(sequences)[rank::world_size]
        for i in range(0, len(indices), rows):
            yield next(iter(self.shares)), self._batch([(j, self.val.rows[j]) for j in indices[i:i + rows]])

    def held_out_count(self, sequences):
        return len(self.val.held_out(sequences))

    def check_vocabulary(self, vocab_size):
        if vocab_size < self.vocab_size:
            raise UserError(f"vocab_size={vocab_size} of the model is smaller than the data's {self.vocab_size}")


class Pairs(_Conversations):
    """Preferences: a Batch holds the chosen answers of its pairs in its first half, the rejected in its second."""

    def __init__(self, config, tokenizer):
        self.block_size = config["block_size"]
        super().__init__(config, tokenizer)

    def encode(self, record):
        """[(ids, mask) chosen, (ids, mask) rejected], or why the pair is left out."""
        sides = [render_chat(record["prompt"] + [dict(role="assistant", content=record[side])], self.tokenizer)
                 for side in ("chosen", "rejected")]
        if sides[0] == sides[1]:
            return "both sides are equal"
        if max(len(ids) for ids, _ in sides) > self.block_size + 1:
            return f"longer than block_size={self.block_size}"
        return sides

    def batch(self, positions):
        return self._batch([self.train[p] for p in positions])

    def _batch(self, pairs):
        rows = [pair[0] for _, pair in pairs] + [pair[1] for _, pair in pairs]
        x, y = padded(rows, self.tokenizer.eos_id)
        return Batch(x, y, units=len(pairs), tokens=sum(len(ids) for ids, _ in rows))


class Problems(_Conversations):
    """Verifiable problems. `batch` gives a list of (place, (prompt ids, question, answer)): train.py makes a Batch of it
    by sampling. `place` tells problems apart, so that each completion draws from a seed of its own."""

    def __init__(self, config, tokenizer):
        self.longest = config["block_size"] - config["max_completion"]
        self.verifier = "" if config["verifier_model"] else config["verifier"]
        super().__init__(config, tokenizer)

    def encode(self, record):
        """(prompt ids, the question's text, answer), or why the problem is left out."""
        ids, _ = render_chat(record["prompt"], self.tokenizer, add_generation_prompt=True)
        if len(ids) > self.longest:
            return f"a prompt longer than {self.longest} tokens, which leave no room for the answer"
        if self.verifier and not readable_gold(self.verifier, record["answer"]):
            return f"an answer that verifier={self.verifier!r} can't read"
        return ids, record["prompt"][-1]["content"], record["answer"]

    def batch(self, positions):
        return [(p, self.train[p][1]) for p in positions]

    def _batch(self, problems):
        return problems

    def complete(self, problems, copies, first_seed, generate, grade):
        """[(prompt ids, completion ids, ended, reward)]: `copies` completions of each problem, one after the other.

        generate(prompts, seeds) -> [(ids, ended)]; `grade` is a Grader. The seed of a completion follows from its
        problem's place in the data, not from the process or the batch that samples it.
        """
        prompts = [ids for _, (ids, _, _) in problems for _ in range(copies)]
        seeds = [first_seed + place * copies + copy for place, _ in problems for copy in range(copies)]
        completions = []
        for i, (ids, ended) in enumerate(generate(prompts, seeds)):
            _, question, answer = problems[i // copies][1]
            text = self.tokenizer.decode(ids[:-1] if ended else ids)
            completions.append((prompts[i], ids, ended, grade(question, text, answer, ended)))
        return completions

    def judge_prompt(self, question, completion):
        """(ids, id of yes, id of no): what a model that acts as the verifier is asked."""
        content = f"{question}\nAnswer: {completion}\nIs this right? Answer yes or no."
        chat = [{"role": "user", "content": content}]
        ids = render_chat(chat, self.tokenizer, add_generation_prompt=True)[0]
        return ids, self.tokenizer.encode("yes")[0], self.tokenizer.encode("no")[0]

    def rollouts(self, completions, advantages=None):
        """A Batch of completions with the advantage of each, a tensor. A truncated completion has no reward to speak of:
        it is left out of the loss, and counted. Without advantages every token of every completion is a target."""
        masks = [ended or advantages is None for _, _, ended, _ in completions]
        rows = [(prompt + ids, [0] * len(prompt) + [int(mask)] * len(ids))
                for (prompt, ids, _, _), mask in zip(completions, masks)]
        x, y = padded(rows, self.tokenizer.eos_id)
        batch = Batch(x, y, units=(y >= 0).sum().item(), tokens=sum(len(ids) for ids, _ in rows), advantages=advantages)
        batch.metrics = {"completions/length": sum(len(ids) for _, ids, _, _ in completions) / len(completions),
                         "completions/cut": sum(not ended for _, _, ended, _ in completions) / len(completions)}
        if advantages is not None:
            batch.with_signal = (y[advantages != 0] >= 0).sum().item()
        return batch


def pass_rates(greedy, sampled, group_size, passing=1.0):
    """{name: (mean, count)} of what Problems.complete gave for held-out problems: greedily, and sampled group_size times
    each. A completion passes if its reward is at least `passing`."""
    rewards = [reward for _, _, _, reward in sampled]
    groups = [rewards[i:i + group_size] for i in range(0, len(rewards), group_size)]
    passed = sum(reward >= passing for _, _, _, reward in greedy)
    passed_any = sum(max(group) >= passing for group in groups)
    return {"pass@1": (passed / len(greedy), len(greedy)), f"pass@{group_size}": (passed_any / len(groups), len(groups)),
            "reward/mean": (sum(rewards) / len(rewards), len(rewards)),
            "completions/length": (sum(len(ids) for _, ids, _, _ in sampled) / len(sampled), len(sampled))}


class Grader:
    """Rewards of completions by a verifier: verify(question, completion, answer) -> a number.

    A completion that is empty or never ends gets 0. So does one at which the verifier raises, or gives a number that
    is not finite or beyond LARGEST: it is counted in `raised`, and the first time said once.
    """
    LARGEST = 1e6  # a reward is usually between 0 and 1; gradients overflow long before float32 does

    def __init__(self, verify, say):
        self.verify, self.say, self.calls, self.raised, self.last_error = verify, say, 0, 0, ""

    def __call__(self, question, completion, answer, ended):
        if not ended or not completion.strip():
            return 0.0
        self.calls += 1
        try:
            reward = float(self.verify(question, completion, answer))
            if not abs(reward) <= self.LARGEST:  # NaN is not, either
                raise ValueError(f"its reward is {reward:g}; expected a finite number of at most {self.LARGEST:g} in size")
            return reward
        except (Exception, SystemExit) as e:
            self.raised += 1
            self.last_error = f"{type(e).__name__}: {e}".splitlines()[0]
            if self.raised == 1:
                self.say(f"warning: the verifier raised on {completion[:60]!r}, which counts as no reward: {self.last_error}")
            return 0.0

    def check(self, calls, raised):
        """UserError if the verifier raised at every call so far, of all processes: it can never reward anything."""
        if calls and calls == raised:
            raise UserError(f"the verifier raised at each of its {int(calls)} calls, so nothing can be learned from it: "
                            f"{self.last_error}. Mend verify(prompt, completion, answer)")


def open_data(config, model_directory, say, world_size=1):
    """Windows, Pairs or Problems, by config["stage"].

    Pairs and Problems are tokenized with the tokenizer of the model in `model_directory`, to which chat tokens are added
    if it has none.
    """
    if config["stage"] in ("pretrain", "sft"):
        data = Windows(config)
    else:
        tokenizer = with_chat_tokens(load_tokenizer(model_directory))
        data = Pairs(config, tokenizer) if config["stage"] == "dpo" else Problems(config, tokenizer)
    for note in data.notes:
        say(note)
    if data.held_out_count(config["eval_iters"] * config["batch_size"]) < world_size:
        raise UserError(f"{config['dataset']}: {world_size} processes need as many held-out windows or records, there are "
                        "fewer")
    return data


def vocab_size_of(config):
    """The vocabulary of the first data set of a config."""
    name = parse_mixture(config["dataset"])[0][0]
    return read_meta(os.path.join(config["data_dir"], name))["vocab_size"]


def means(measured, shares, over_processes):
    """{'val/loss': mean, ...} from [(domain, {name: (mean, count)})] of all processes: each batch counts by its size, each
    domain of a mixture by its share. NaN where nothing was counted. Losses have a perplexity beside them."""
    sums = collections.Counter()
    for domain, measures in measured:
        for name, (mean, count) in measures.items():
            sums[domain, name, 0] += float(mean) * float(count)
            sums[domain, name, 1] += float(count)
    keys = list(sums)  # in the same order on all processes
    sums = dict(zip(keys, over_processes(*[sums[key] for key in keys])))
    row = {}
    for domain, name in dict.fromkeys(key[:2] for key in keys):
        total, count = sums[domain, name, 0], sums[domain, name, 1]
        mean = total / count if count else float("nan")
        row[f"val/{name}"] = row.get(f"val/{name}", 0.0) + shares[domain] * mean
        if len(shares) > 1:
            row[f"val/{domain}/{name}"] = mean
    if sums and all(name == "loss" for _, name in dict.fromkeys(key[:2] for key in keys)):
        row |= {f"{key.removesuffix('loss')}ppl": math.exp(min(loss, 700)) for key, loss in row.items()}
    return row


def batch_means(batches, over_processes):
    """{name: mean} of what was measured on the micro-batches of a step, on all processes."""
    names = sorted({name for batch in batches for name in batch.metrics})
    sums = [sum(float(batch.metrics[name]) for batch in batches) for name in names]
    count, *sums = over_processes(len(batches), *sums)
    return {name: total / count for name, total in zip(names, sums)}


def prepare_missing(config, say, world_size=1):
    """Prepares the data sets of a run that are missing and known by name, after their size is said; UserError for others,
    for data of another kind than the stage learns from, and where other processes, which are paid for, would wait."""
    for name, _ in parse_mixture(config["dataset"]):
        directory = os.path.join(config["data_dir"], name)
        if os.path.exists(os.path.join(directory, "meta.json")):
            check_kind(directory, config["stage"])
        file = "train.bin" if config["stage"] in ("pretrain", "sft") else "meta.json"
        if os.path.exists(os.path.join(directory, file)):
            continue
        if name not in KNOWN or world_size > 1:
            raise UserError(f"{directory}: no such data set; {how_to_prepare(directory)}")
        say(f"{directory} is missing; preparing it now: {describe(name)}")
        prepare(name, data_dir=config["data_dir"])


def parse_mixture(dataset):
    """'web:0.87,code:0.13' -> [('web', 0.87), ('code', 0.13)]; a single name needs no weight."""
    parts = []
    for part in dataset.split(","):
        name, colon, weight = part.strip().rpartition(":") if ":" in part else (part.strip(), "", "1")
        try:
            value = float(weight)
        except ValueError:
            value = -1.0
        if not name or not 0 < value < float("inf"):
            raise UserError(f"dataset={dataset!r}: {part.strip()!r} is not NAME or NAME:WEIGHT with a weight above 0")
        parts.append((name, value))
    return parts


def read_meta(directory):
    """meta.json of a data set. Bins without one are nanoGPT's: GPT-2 tokens, uint16."""
    path = os.path.join(directory, "meta.json")
    if os.path.exists(path):
        return read_json(path)
    # nanoGPT rounds 50,257 up to 50,304 rows, a multiple of 64, for speed
    return {"tokenizer": "gpt2", "vocab_size": 50304, "dtype": "uint16", "eos_id": 50256}


def check_kind(directory, stage):
    """UserError where a prepared data set is not what a stage learns from. Bins without meta.json may be anything."""
    names = dict(text="text", chat="conversations", prefs="pairs of answers", verify="problems with answers")
    wanted = dict(pretrain=("text", "chat"), sft=("chat",), dpo=("prefs",), rlvr=("verify",))[stage]
    kind = read_meta(directory).get("kind", wanted[0])
    if kind not in wanted:
        raise UserError(f"{directory} holds {names[kind]}, stage={stage!r} wants {names[wanted[0]]}; "
                        f"python prepare.py FILE --as={wanted[0]} makes them")


def how_to_prepare(directory):
    """What to type for a data set that is missing or damaged."""
    name = os.path.basename(os.path.normpath(directory))
    return f"python prepare.py {name} makes it" if name in KNOWN else \
        f"python prepare.py YOUR_TEXT.txt --name={name} makes it"


# -----------------------------------------------------------------------------
# The toy world: a language small enough to be learned in minutes on a laptop, and big enough to see it
# being learned: names stay the same through a story, "he" is a boy, sums are right.
#
# A story is a template. A slot like {thing} is chosen where it first appears and stays the same from then on:
#   {thing} {thing2} {things}   a thing, another thing, several of the first
#   {A} {he} {him} {his}        the hero and the hero's pronouns; {B} {B.he} {B.his} a friend
#   {He} {B.His} {Thing}        the same with a capital, to begin a sentence
#   {n coins} {n.word}          "1 coin", "2 coins"; "two": n, m, total (n + m), left (n - m), next (m + 1)
#   {animal.eats}               what ABOUT says of the animal
#   [a|b|]                      one of these, or nothing; and "a" becomes "an" by itself
# To add a plot, add an entry to PLOTS. There is nothing else to do.


def about(text, *facts):
    """'cat, meow; dog, woof' and "says" -> {"cat": {"says": "meow"}, "dog": {"says": "woof"}}"""
    rows = [row.split(", ") for row in " ".join(text.split()).split("; ")]
    return {word: dict(zip(facts, told)) for word, *told in rows}


# few names: each is met often enough for a small model to learn that names are what stays the same
GIRLS = "Anna Lily Mia Sue Emma Zoe Rosa Kate Ella Nina Amy Lucy".split()
BOYS = "Tom Ben Max Sam Leo Jim Jack Finn Noah Dan Paul Oscar".split()
SHE = dict(he="she", him="her", his="her", boy="girl", brother="sister")
HE = dict(he="he", him="him", his="his", boy="boy", brother="brother")
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty""".split()
ANIMALS = about("""cat, meow, fish, in the house; dog, woof, meat, in the yard; duck, quack, bread, on the
    pond; hen, cluck, corn, on the farm; mouse, squeak, cheese, in a hole; bird, tweet, seeds, in a nest;
    lamb, baa, grass, in the field; cow, moo, clover, in the meadow; horse, neigh, hay, in the barn; pig,
    oink, potatoes, on the farm; owl, hoot, mice, in the forest; frog, croak, flies, by the river; goose,
    honk, wheat, by the lake; bee, buzz, honey, in a hive; crow, caw, worms, in a tall tree; goat, bleat,
    leaves, on the hill; lion, roar, meat, on the plain; wolf, howl, meat, in the forest; bear, growl, honey,
    in a cave; snake, hiss, eggs, under a rock; pigeon, coo, crumbs, on the roof; monkey, chatter, bananas, in
    the jungle; parrot, squawk, nuts, in a cage; donkey, bray, oats, in the barn; chick, peep, corn, on the
    farm; puppy, yap, meat, in a basket; kitten, mew, fish, in a basket; turkey, gobble, oats, on the farm""",
    "says", "eats", "lives")
WORKERS = about("""baker, bake bread; farmer, grow corn; painter, paint walls; sailor, sail ships; cook, make
    soup; tailor, sew coats; gardener, plant roses; carpenter, build tables; singer, sing songs; pilot, fly
    planes; shepherd, look after sheep; driver, drive buses; doctor, help sick people; dancer, dance on ropes;
    clown, make people laugh; smith, mend pots; fisher, catch fish; hunter, follow tracks""", "can")
WEATHER = about("""sunny, a hat, swam in the lake; rainy, an umbrella, jumped in puddles; cold, a coat, ran a
    race; snowy, gloves, made a snowman; windy, a kite, flew kites; icy, a scarf, slid on the pond; hot, some
    water, sat in the shade; foggy, a lantern, walked hand in hand""", "take", "did")
NATURE = about("""grass, green; sky, blue; sea, blue; snow, white; milk, white; sun, yellow; corn, yellow;
    mud, brown; night, black; coal, black; fire, red; leaf, green; carrot, orange""", "colour")
ABOUT = {**dict.fromkeys(GIRLS, SHE), **dict.fromkeys(BOYS, HE), **NATURE, **ANIMALS, **WORKERS, **WEATHER,
         **{str(n): dict(word=word) for n, word in enumerate(NUMBERS)}}

TABLES = {  # the choices for each slot: words, or phrases with commas between them
    "elder": "Mum, Dad, Grandma, Grandpa, Aunt Rose, Uncle Bill", "few": "two three four five six seven",
    "trait": """kind brave funny clever quiet cheerful good little gentle polite curious lively friendly
        patient clumsy smart shy proud busy helpful careful lazy noisy sleepy merry tidy silly young""",
    "when": """one day, one morning, one afternoon, one sunny day, one warm day, one windy day, one spring
        day, one summer morning, one autumn day, after school, after breakfast, early one morning, on Monday,
        on Tuesday, on Wednesday, on Thursday, on Friday, on Saturday, on Sunday""",
    "colour": "red blue green yellow orange pink white brown purple black grey golden silver violet",
    "thing": """ball hat doll drum book bell key scarf umbrella cup ring bag shoe whistle cap glove ribbon
        purse clock basket pen brush pillow sock boot coat jacket necklace watch bucket shovel rope mirror
        comb belt flute horn jug puzzle towel pot fan boat car kite train robot wagon plane truck tractor
        rocket puppet sled guitar trumpet scooter""",
    "craft": "kite boat crown card box flag mask lamp star lantern butterfly castle heart picture tower",
    "place": "garden park forest field valley meadow village yard orchard playground town woods",
    "far": "beach zoo castle museum circus fair harbour market mountain farm lake theatre",
    "ride": "bus train car tram taxi coach", "dish": "vase plate window bowl jar mirror cup teapot",
    "spot": """under the bench, behind the big tree, behind the old wall, next to the gate, near the well,
        behind the bush, in the barn, by the fence, in the tall grass, under the bridge, behind the shed, by
        the stream, behind the rock, near the fountain, behind the cart, under the leaves, behind the hedge,
        next to the swing, near the statue, behind the haystack, in a hollow log, behind the mill, under the
        willow, in the tent, behind the church, near the path, under the ladder, by the pond""",
    "food": "bread cheese cake pie salad pudding rice soup pasta pizza toast jam honey butter ham",
    "fruit": "apple pear plum orange peach cherry berry banana lemon melon fig grape strawberry",
    "vegetable": "carrot bean tomato onion pumpkin turnip cabbage pea radish leek beet cucumber",
    "snack": "egg nut cookie potato muffin biscuit pancake sandwich olive walnut",
    "small": """shell stone stick leaf feather flower button card spoon pencil bead candle marble stamp acorn
        brick crayon ticket badge bottle nail fork plate bowl rose tulip daisy seed block jar coin pin""",
    "critter": "cat dog duck hen mouse bird lamb goat goose pigeon chick puppy kitten",
    "pet": "cat dog rabbit mouse kitten puppy hamster parrot turtle",
    "petname": "Coco Spot Fluffy Pepper Sunny Snowball Patch Buddy Ginger Pip Lucky Toffee Rusty Bubbles",
    "skill": "swim sing dance climb ride skate paint draw knit ski read write cook row juggle",
    "animal": " ".join(ANIMALS), "worker": " ".join(WORKERS), "weather": " ".join(WEATHER),
    "natural": " ".join(NATURE),
}
TABLES = {name: " ".join(text.split()).split(", " if "," in text else " ") for name, text in TABLES.items()}
EDIBLE = TABLES["fruit"] + TABLES["vegetable"] + TABLES["snack"]
TABLES["item"] = EDIBLE + TABLES["thing"] + TABLES["small"]
TABLES["A"] = TABLES["B"] = TABLES["C"] = GIRLS + BOYS
PLURALS = {"leaf": "leaves", "scarf": "scarves", "potato": "potatoes", "tomato": "tomatoes"}

BEGINNINGS = [
    "[Once upon a time there was|There once was|Long ago there lived] a {trait} {boy} named {A}.",
    "{A} was a {trait} {boy}[| who lived near the {place}].",
    "This is [a|the] story of a {trait} {boy}. {His} name was {A}.",
    "This is a story about {A} and {topic}. {A} was a {trait} {boy}.",
    "In a [small|tall|narrow] house near the {place} lived a {boy}. [{His} name was|{He} was called] {A}.",
    "Do you know {A}? {He} is a {trait} {boy}. [Here is a story about {him}.|Listen to this story.]",
]
ENDINGS = [
    "[It was|It had been] a [perfect|special] day.", "That night, {A} slept [well|like a baby].", "", "",
    "{A} never forgot that day.", "What a [fine|happy|great|wonderful] day it was!", "Everyone was happy.",
    "{A} was a happy {boy}.", "And that is the end of the story.",
]
PLOTS = [  # (what it is about, the story, questions with their answers)
    ("a lost {thing}", """{A} had a {colour} {thing} and [took it everywhere|liked it very much|looked after
     it well]. {When}, [it was gone|{he} could not find it|it was not in its place]. "Where is my {colour}
     {thing}?" asked {A}. {He} [looked|searched] {spot2}, but it was not there. Then {his} [friend|cousin] {B}
     came by. "[Do not cry|Do not worry|Never mind], {A}. I will help you," said {B}. At last {B} looked
     {spot}. There was the {colour} {thing}! "[I found it|Here it is|Come and look]!" [cried|shouted|called]
     {B}. "Thank you, {B}," said {A}. "You are [a good friend|a true friend|so clever]!" """,
     ["Who found the {thing}? {B} found the {thing}.", "Where was the {thing}? The {thing} was {spot}.",
      "What colour was the {thing}? The {thing} was {colour}."]),
    ("sharing", """{When}, {A} sat in the {place} with a bag of {fruits}. {His} friend {B} came by. {B.He} was
     hungry. "May I have one {fruit}, please?" asked {B}. "No, they are mine," said {A}. {B} [went away|turned
     around] and looked sad. Then {A} felt bad, because {B} was {his} friend. So {he} ran after {B.him} and
     gave {B.him} half of the {fruits}. "I am sorry, {B}. Let us share," {he} said. The next day, {A} was
     hungry, and {B} gave {him} half of {B.his} {food}. "[Sharing is fun|It is good to share]," said {B}.""",
     ["Who was hungry first? {B} was hungry first.",
      "What did {B} give to {A}? {B} gave {A} half of the {food}.",
      "Why did {A} feel bad? {A} felt bad because {B} was {his} friend."]),
    ("a race", """{When}, {A} and {B} had a race in the {place}. "[I am faster than you|I will win|You cannot
     catch me], {A}!" said {B}. {Elder} called, "One, two, three, go!" {B} ran [very fast|like the wind] and
     was soon far ahead. "I have so much time," {B.he} said, and {B.he} [sat down|lay down|stopped to rest]
     {spot}. But {A} did not stop. {He} ran [and ran|all the way|as fast as {he} could]. When {B} [looked
     up|woke up], it was too late. {A} won the race! {Elder} gave {him} a {colour} {thing}.""",
     ["Who won the race? {A} won the race.", "Where did {B} stop? {B} stopped {spot}.",
      "What did {elder} give to {A}? {Elder} gave {A} a {colour} {thing}."]),
    ("a picnic", """{When}, {A} and {B} went to the {place} for a picnic. They had {food}, {food2} and some
     {fruits}. The [feast|food] was ready. They sat down on a {colour} blanket. But then the sky [grew
     dark|turned black], and it [began|started] to rain. "We will get wet!" cried {B}. They took the {colour}
     blanket and the food and ran home. So they had their picnic [in the kitchen|on the floor|under the
     table]. "This is the best picnic of all!" said {A}, and {B} laughed.""",
     ["Where did they go? They went to the {place}.", "Who was with {A}? {B} was with {A}.",
      "Why did they run home? They ran home because it began to rain."]),
    ("a hungry {critter}", """{When}, {A} saw a [thin|tiny] {critter} {spot}. "{Critter.says}," said the
     {critter}. It looked [hungry|weak]. {A} ran home to {elder}. "What does a {critter} eat?" {he} asked. "A
     {critter} eats {critter.eats}," said {elder}. So {A} took some {critter.eats} and [ran|hurried] back. The
     {critter} ate [and ate|every bit of it]. "{Critter.says}," it said [again|to thank {him}]. From that day
     on, the {critter} [came to {A} every day|followed {A} everywhere], because {A} was kind to it.""",
     ["What did {A} see? {A} saw a {critter}.", "Where was the {critter}? The {critter} was {spot}.",
      "What did the {critter} eat? The {critter} ate {critter.eats}."]),
    ("{vegetables} in the garden", """{When}, {elder} gave {A} a bag of seeds. "What will they be?" asked {A}.
     "They will be {vegetables}," said {elder}. {A} [put the seeds in the ground|planted the seeds] and gave
     them water every day. For {few} weeks, nothing came up. "You have to wait," said {elder}. Then the little
     plants grew and grew. At last {A} picked {n vegetables}. {He} gave {m vegetables} to {his}
     [friend|neighbour] {B}, who [thanked|hugged] {him}. {n} - {m} = {left}, so {A} kept {left}.""",
     ["Who gave {A} the seeds? {Elder} gave {A} the seeds.", "What did {B} get? {B} got {m vegetables}.",
      "How many {vegetables} did {A} pick? {A} picked {n vegetables}."]),
    ("a trip to the shop", """{When}, {elder} gave {A} {n coins}. "Please buy some {food} [for us|at the
     shop|for dinner], {A}," said {elder}. On the way {A} met {B}. "I am going to the shop. [Come with me!|Do
     you want to come?]" said {A}. The {food} cost {m coins}. {A} counted the coins with care. {n} - {m} =
     {left}. {He} had {left coins} left. {A} took the {food} home and gave {elder} the rest.""",
     ["What did {A} buy? {A} bought some {food}.", "What did the {food} cost? It cost {m coins}.",
      "How many coins did {A} have left? {A} had {left coins} left."]),
    ("hide and seek", """{When}, {A}, {B} and {C} played hide and seek in the {place}. {A} closed {his} eyes
     and counted to {n.word}. {B} hid {spot}, and {C} hid {spot2}. "[Here I come|Now I will find you|I am
     ready]!" called {A}. First {he} looked {spot3}, but nobody was there. Then {he} saw a {colour} hat
     {spot2}. It was the hat of {C}! "I see you, {C}!" [laughed|called] {A}. After a long time, {A} looked
     {spot}, and there was {B}! "[That was a good place to hide|I almost gave up], {B}," said {A}.""",
     ["Where did {B} hide? {B} hid {spot}.", "Where did {C} hide? {C} hid {spot2}.",
      "What colour was the hat of {C}? The hat of {C} was {colour}."]),
    ("a gift", """It was the birthday of {B}, {his} [friend|cousin|{B.brother}]. {A} wanted to give {B.him} a
     gift, but {he} had no coins. "What can I do?" {he} asked {elder}. "You can make something," said {elder}.
     So {A} took some paper and made a {colour} {craft}. {He} put the {craft} in a {colour2} bag and gave it
     to {B}. "Happy birthday!" said {A}. {B} opened the bag and [smiled|laughed]. "What a [beautiful|pretty]
     {craft}! Did you make it?" {B.he} asked. "Yes, I made it for you," said {A}. """,
     ["What did {A} make? {A} made a {colour} {craft}.", "What colour was the bag? The bag was {colour2}.",
      "Why did {A} make a gift? {A} made a gift because {he} had no coins."]),
    ("a storm", """{A} had a {pet} named {petname}. One [dark night|cold evening|wild night], there was a big
     storm. [The wind blew and the rain fell|The thunder was loud]. {Petname} was [afraid|scared] and hid
     under the bed. "Come out, {petname}," said {A}. "I am here with you." But the {pet} did not come. Then
     {elder} came with a {colour} lamp. "[Please tell|Tell] me a story," said {A}. {Elder} told {him} about a
     {trait2} {animal}. {A} laughed, and {petname} came out to [listen|hear it]. Soon the storm was over.""",
     ["What was the name of the {pet}? It was {petname}.", "Who had a lamp? {Elder} had a {colour} lamp.",
      "What was the story of {elder} about? It was about a {trait2} {animal}."]),
    ("a heavy basket", """{When}, {elder} came from the {place} with a {colour} basket of {fruits}. "This is
     too heavy for me," said {elder}. "We will help you," said {A} and {B}. They carried the basket up the
     hill. But it [broke|fell|slipped], and the {fruits} rolled down. "[Quick|Run|Hurry], {B}!" said {A}. {A}
     picked up {n fruits}, and {B} picked up {m fruits}. {n} + {m} = {total}. "Now we have all {total} again,"
     said {B}. {Elder} [smiled|nodded] and gave them one [sweet|delicious] {fruit} each.""",
     ["What was in the basket? There were {fruits} in it.", "What did {A} pick up? {A} picked up {n fruits}.",
      "How many {fruits} did they have in all? They had {total fruits} in all."]),
    ("a {weather} day", """{A} looked out of the window. It was a {weather} day. "Can {B} and I play in the
     {place}?" {he} asked {elder}. "[Yes|Of course], but you need {weather.take} on a {weather} day," said
     {elder}. So {A} took {weather.take} and [hurried|went] to {B}. "[Good morning|Hello], {B}! Come out and
     play," said {A}. {B} [fetched|took] {weather.take} too. They {weather.did}. It was [great|so much] fun.
     "I [like|love] {weather} days," said {B}.""",
     ["What did {A} take? {A} took {weather.take}.", "What did they do? They {weather.did}.",
      "Who went out with {A}? {B} went out with {A}.", "What kind of day was it? It was a {weather} day."]),
    ("a {worker}", """{When}, {A} met a {worker} in the {place}. "What do you do all day?" asked {A}. "I
     {worker.can}," said the {worker}. "[Is it hard|Can I learn it]?" asked {A}. "Just try," said the
     {worker}. {A} helped the {worker} for {few} days. At last {A} could {worker.can} too. {A} ran home to
     {elder}. "When I am big, I will be a {worker}!" {he} said. "You will be a good {worker}," said
     {elder}.""",
     ["Who did {A} meet? {A} met a {worker}.", "What could {A} do at last? {A} could {worker.can}.",
      "How many days did {A} help? {A} helped for {few} days."]),
    ("learning to {skill}", """{A} could not {skill}. {He} tried [again and again|all week], but it was too
     [hard|difficult]. "I will never learn it," [sighed|said] {A}. {B} could {skill} very well. "[I will teach
     you|Let me show you|Let me help you with that]," said {B}. "It takes time, so do not give up." Every day
     for {few} weeks, {A} and {B} met in the {place}. At last {A} could {skill} too. "Look, I can {skill}!"
     [shouted|called] {A}. {Elder} [clapped|cheered]. "I am so proud," said {elder}.""",
     ["What did {A} learn? {A} learned to {skill}.", "How many weeks did it take? It took {few} weeks.",
      "Who could {skill} very well? {B} could {skill} very well."]),
    ("a trip to the {far}", """{When}, {elder} took {A} and {B} to the {far}. They went by {ride}. "Are we
     there now?" asked {A} {few} times. "[Be patient|Not so fast|Soon]," said {elder}, and gave them some
     {food}. {B} looked out of the window. "Look, a {animal}! [What does it say?" {B.he} asked. "A {animal}
     says {animal.says},"|Where does it live?" {B.he} asked. "A {animal} lives {animal.lives},"] said {A}. At
     the {far} there were many people, so {A} held the hand of {elder}, and {B} bought a {colour} {thing}.""",
     ["Where did they go? They went to the {far}.", "How did they go there? They went by {ride}.",
      "What did {B} see? {B} saw a {animal}.", "What did {B} buy? {B} bought a {colour} {thing}."]),
    ("a broken {dish}", """{When}, {A} [threw|kicked] a ball in the house. It hit the {colour} {dish}, and the
     {dish} broke. "What [can|shall] I do?" {he} asked {his} [friend|cousin] {B}. "[You should know that|That
     is a good question]," said {B}. "Tell the truth." So {A} went to {elder}. "I broke the {dish}. It was a
     silly thing to do, and I am sorry," {he} said. {Elder} was quiet for a [moment|while]. "Thank you for the
     truth," said {elder}. "Now bring me a [broom|brush]." Then they picked up the pieces together.""",
     ["What did {A} break? {A} broke the {colour} {dish}.",
      "Who told {A} what to do? {B} told {A} what to do.",
      "What colour was the {dish}? The {dish} was {colour}."]),
    ("a {fruit} cake", """{When}, {A} and {elder} made a {fruit} cake for {B}. "What do we need?" asked {A}.
     "We need flour, milk, {few} eggs and some {fruits}," said {elder}. {A} [mixed|stirred] it all in a
     {colour} bowl. But {he} forgot the sugar! The cake was [sour|not sweet]. "Never mind," said {elder}. "We
     will make another one." The second cake [smelled|looked] [wonderful|lovely]. {B} ate {few2} pieces of it.
     "This is the best {fruit} cake of all!" {B.he} said. "May I ask for more?" """,
     ["Who was the cake for? The cake was for {B}.", "How many eggs did they need? They needed {few} eggs.",
      "How many pieces did {B} eat? {B} ate {few2} pieces."]),
]

COUNTING = [  # {n}, {m}, {total} and {left} are numbers: n + m = total, n - m = left
    """{A} has {n items}. {B} has {m items}. {n} + {m} = {total}, so together they have {total items}.""",
    """"How many {items} do you have, {A}?" asked {B}. "I had {n items}, but I gave {m} of them to {elder},"
    said {A}. "{n} - {m} = {left}. Now I have {left items}." """,
    """There is a [bag|box] with {n items} on the table. {A} puts {m} more into it. {n} + {m} = {total}. "How
    many {items} are there now?" asks {B}. "Now there are {total items}," says {A}.""",
    """{A} has {n.word} {items}. {He} gets {m.word} more. Now {A} has {total.word} {items}.""",
    """{A} has {n items} and {next item2s}. {B} takes the {item2s}. Now {A} has {n items}.""",
    """{A} and {B} look into the box of {elder}. There are {n items} and {next item2s} in it. {B} takes the
    {items}, so {A} gets the {item2s}. Now {A} has {next item2s}, and {B} has {n items}.""",
    """{A} has one {item}, and {B} has one {item} too. Together they have two {items}.""",
]
GAINS = ["{He} finds {m} more.", "{B} gives {him} {m} more.", "{Elder} gives {him} {m} more.",
         "{He} buys {m} more.", "Then {he} gets {m} more.", "{His} friend {B} brings {him} {m} more.",
         "The {worker} sends {him} {m} more.", "{He} wins {m} more."]
LOSSES = ["{He} loses {m} of them.", "{He} gives {m} of them to {B}.", "{He} sells {m} of them.",
          "{Elder} takes {m} of them.", "{He} puts {m} of them away for {B}.", "{B} borrows {m} of them.",
          "{He} sends {m} of them to the {worker}."]
EATEN = ["{He} eats {m} of them.", "{A} and {B} eat {m} of them."]

FACTS = 4 * [  # more often where a slot makes many facts of one
    "What do you need on a {weather} day? On a {weather} day you need {weather.take}.",
    "What colour is the {natural}? The {natural} is {natural.colour}.",
    "Where does a {animal} live? A {animal} lives {animal.lives}.", "What is {n} in words? {n} is {n.word}.",
    "What does a {animal} say? A {animal} says {animal.says}.", "What is a {fruit}? A {fruit} is a fruit.",
    "What does a {animal} eat? A {animal} eats {animal.eats}.",
    "What can a {worker} do? A {worker} can {worker.can}.", "What comes after {m}? {next} comes after {m}.",
    "What is a {vegetable}? A {vegetable} is a vegetable.",
] + [
    "When does the sun shine? The sun shines in the day.", "How many legs does a dog have? A dog has 4 legs.",
    "Where does a fish live? A fish lives in the water.", "When do children sleep? Children sleep at night.",
    "Where do carrots grow? Carrots grow in the ground.", "How many days are in a week? A week has 7 days.",
    "What do plants need? Plants need water and sun.", "What does a rabbit eat? A rabbit eats carrots.",
    "What comes from a cow? Milk comes from a cow.", "Where do apples grow? Apples grow on a tree.",
    "What comes from a hen? Eggs come from a hen.", "What do you know? I know stories and sums.",
    "What opens a door? A key opens a door.", "What can a bird do? A bird can fly.",
    "Who are you? I am a small model.",
]

REQUESTS = [
    "[Tell|Please tell] me a story about {topic}.", "I want a story about {A} and {topic}.",
    "Please tell me a story about a {boy} named {A} and {topic}.", "Can you tell me a story about {topic}?",
]
GREETINGS = [("Hello!", "Hello! What can I do for you?"), ("Good morning!", "Good morning! Can I help you?"),
             ("Hello, who are you?", "I am a small model. I know stories and sums.")]
THANKS = [("Thank you!", "It was fun to help you."), ("Thank you. That was good.", "I am happy to hear it.")]

# How an answer may begin. The n-th opening of one manner is as long as the n-th of the other: DPO compares
# sums of log-probabilities, so with unequal lengths it would learn length, not manners.
MANNERS = {
    "kind": ["I am happy to help you!", "That is a very good question.", "Let me help you with that."],
    "curt": ["What a silly thing to ask!", "You should know that by now.", "Do not ask me so much."],
}
CHAT_MANNERS = ["plain"] * 8 + ["kind", "curt"]  # what SFT shows: DPO can only choose among these
SHARES = {"story": 58, "counting": 10, "sums": 26, "facts": 6}  # of a hundred documents of toy_stories


def plural(noun):
    """'cup' -> 'cups', 'box' -> 'boxes', 'berry' -> 'berries', 'leaf' -> 'leaves'"""
    regular = re.sub(r"(?<=[^aeiou])y$", "ie", noun)
    return PLURALS.get(noun, regular + ("es" if re.search(r"(s|x|ch|sh)$", noun) else "s"))


def tell(rng, template, world):
    """Fill in a template. What is chosen for a slot is kept in `world`: every later mention is the same."""

    def table(name):
        return TABLES.get(name.rstrip("23"))

    def pick(name):
        while name not in world:
            word = rng.choice(table(name))
            if word not in world.values():
                world[name] = word
        return str(world[name])

    def slot(match):
        key = match[1]
        name = ".".join(part if table(part) else part.lower() for part in key.split("."))
        who, _, form = name.rpartition(".")
        if " " in name:                # {n coins}, {n items}: "1 leaf", "2 leaves"
            number, noun = name.split()
            noun = pick(noun[:-1]) if table(noun[:-1]) else noun[:-1]
            text = f"{world[number]} {noun if world[number] == 1 else plural(noun)}"
        elif who or form in HE:        # {critter.says}, {n.word}, {B.his}, {his}
            text = ABOUT[pick(who or "A")][form]
        elif name[-1] == "s" and table(name[:-1]):         # {items}
            text = plural(pick(name[:-1]))
        else:
            text = pick(name)
        return text if name == key else text[0].upper() + text[1:]  # {He}: only A, B and C keep their capital

    while "[" in template:  # innermost first, so that choices may hold choices
        template = re.sub(r"\[([^][]*)\]", lambda match: rng.choice(match[1].split("|")), template)
    text = re.sub(r"\{(.+?)\}", slot, " ".join(template.split()))
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text).strip()


def small_numbers(rng, biggest=20):
    """n, m, their sum, their difference and what comes after m, all from 1 to `biggest`"""
    m = rng.randint(1, biggest // 3)
    n = m + rng.randint(1, biggest - 2 * m)
    return dict(n=n, m=m, total=n + m, left=n - m, next=m + 1)


def work_out(n, sign, m):
    """A sum of two-digit numbers in steps that are each easy to know by heart, the result last."""
    tens, ones = (n // 10 * 10, m // 10 * 10), (n % 10, m % 10)
    a, b = (sum(tens), sum(ones)) if sign == "+" else (tens[0] - tens[1], ones[0] - ones[1])
    return f"{tens[0]} {sign} {tens[1]} = {a}, {ones[0]} {sign} {ones[1]} = {b}, {a} + {b} = {a + b}."


def two_digits(rng):
    """A sum of two-digit numbers, or a difference without borrowing: n, sign, m, result (from 1 to 99)."""
    if rng.random() < 0.5:
        n = rng.randint(10, 89)
        m = rng.randint(10, 99 - n)
        return n, "+", m, n + m
    n = rng.randint(11, 99)
    m = 10 * rng.randint(1, n // 10) + rng.randint(0, n % 10)
    return (n, "-", m, n - m) if m < n else two_digits(rng)


def story(rng):
    """A story, the world that it filled in, what it is about, and questions about it (templates both)."""
    topic, plot, questions = rng.choice(PLOTS)
    world = small_numbers(rng)
    beginning = rng.choice(BEGINNINGS).replace("{topic}", topic)
    text = tell(rng, f"{beginning} {plot} {rng.choice(ENDINGS)}", world)
    return text, world, topic, questions


def moves(sign, world):
    """What can happen to a pile of things: more of them, or fewer."""
    return GAINS if sign == "+" else LOSSES + EATEN if world["item"] in EDIBLE else LOSSES


def counting(rng):
    """Things gained and lost, and how many there are after each time."""
    if rng.random() < 0.5:
        return tell(rng, rng.choice(COUNTING), small_numbers(rng))
    biggest = rng.choice([20, 20, 20, 99])
    n = rng.randint(2, biggest)
    world = dict(n=n)
    said = [tell(rng, "{A} has {n items}.", world)]
    for _ in range(rng.randint(2, 4)):
        sign = "+" if n == 1 or n < biggest and rng.random() < 0.5 else "-"
        m = rng.randint(1, biggest - n if sign == "+" else n - 1)
        before, n = n, n + m if sign == "+" else n - m
        world.update(n=n, m=m)
        said.append(tell(rng, rng.choice(moves(sign, world)), world))
        said.append(tell(rng, f"[|{before} {sign} {m} = {n}. ]Now {{A}} has {{n items}}.", world))
    return " ".join(said)


def word_problem(rng):
    """A problem about things, its answer as a number, a noun and a sentence, and the way to work it out."""
    n, sign, m, result = two_digits(rng)
    world = dict(n=n, m=m, result=result)
    start = tell(rng, "{A} has {n items}.", world)
    if sign == "+" and rng.random() < 0.25:
        event, do, who, when = "{B} has {m items}.", "do", "{A} and {B}", "together"
    else:
        event, do, who, when = rng.choice(moves(sign, world)), "does", "{A}", "now" if sign == "+" else "left"
    prompt = tell(rng, f"{event} How many {{items}} {do} {who} have {when}?", world)
    has = "have" if do == "do" else "has"
    sentence = tell(rng, f"{who} {has} {{result items}} {when}.", world)
    return dict(prompt=f"{start} {prompt}", answer=str(result), noun=plural(world["item"]), sentence=sentence,
                working=work_out(n, sign, m))


def worked_or_not(rng, working, sentence):
    """An answer, worked out first less often than not: RL is to find out which way is right more often."""
    return f"{working} {sentence}" if rng.random() < 0.4 else sentence


def sums(rng):
    """A page of arithmetic: the single steps of sums, to be known by heart, or sums, or word problems."""
    page = rng.choice(["steps", "sums", "problems", "problems"])
    if page == "steps":
        worked = [work_out(*two_digits(rng)[:3]).rstrip(".").split(", ") for _ in range(14)]
        return " ".join(f"{rng.choice(steps)}." for steps in worked)
    if page == "sums":
        asked = [two_digits(rng) for _ in range(rng.randint(3, 5))]
        return "\n".join(f"What is {n} {sign} {m}? {work_out(n, sign, m)} The answer is {result}."
                         for n, sign, m, result in asked)
    problems = [word_problem(rng) for _ in range(rng.randint(2, 4))]
    return "\n".join(f"{problem['prompt']} {worked_or_not(rng, problem['working'], problem['sentence'])}"
                     for problem in problems)


def split_question(text):
    """'Who won? Tom won.' -> ('Who won?', 'Tom won.')"""
    question, _, answer = text.partition("? ")
    return question + "?", answer


def facts(rng):
    """Some things that are always true, asked and answered or just said."""
    asked = rng.random() < 0.5
    said = [tell(rng, rng.choice(FACTS), small_numbers(rng)) for _ in range(rng.randint(5, 9))]
    return " ".join(fact if asked else split_question(fact)[1] for fact in said)


def reading(rng):
    """A story, sometimes with a question about it and the answer."""
    text, world, _, questions = story(rng)
    return text if rng.random() < 0.8 else f"{text}\n{tell(rng, rng.choice(questions), world)}"


def toy_stories(seed=1337, count=30_000):
    """Yield the documents of the pretraining text, no two the same."""
    write = {"story": reading, "counting": counting, "sums": sums, "facts": facts}
    rng, seen = random.Random(f"stories {seed}"), set()
    while len(seen) < count:
        text = write[rng.choices(list(SHARES), SHARES.values())[0]](rng)
        if text not in seen:
            seen.add(text)
            yield text


def toy_sums(seed=1337, count=4_000):
    """Yield word problems whose answers can be checked: prompt, answer, noun, sentence (and the working)."""
    rng, seen = random.Random(f"sums {seed}"), set()
    while len(seen) < count:
        problem = word_problem(rng)
        if problem["prompt"] not in seen:
            seen.add(problem["prompt"])
            yield problem


def toy_questions(seed=1337, count=4_000):
    """Yield questions about stories and facts whose answers can be checked: prompt, answer."""
    rng = random.Random(f"questions {seed}")
    for _ in range(count):
        question, answer = turns(rng, ("reading", "fact"))[0]
        yield dict(prompt=question, answer=answer)


def toy_problems(seed=1337, count=4_000):
    """Yield toy_sums, and among them a fact in four: a model that is rewarded for sums alone soon answers everything
    with a sum."""
    rng = random.Random(f"problems {seed}")
    for problem in toy_sums(seed, count):
        if rng.random() < 0.25:
            question, answer = turns(rng, ("fact",))[0]
            problem = dict(prompt=question, answer=answer)
        yield problem


def turns(rng, kinds=("reading", "reading", "reading", "fact", "story", "problem", "problem", "sum")):
    """What a person may ask, and the plain answer, for one or two turns: [(question, answer), ...]"""
    kind = rng.choice(kinds)
    if kind in ("reading", "story"):
        text, world, topic, questions = story(rng)
        if kind == "story":
            return [(tell(rng, rng.choice(REQUESTS).replace("{topic}", topic), world), text)]
        asked = [split_question(tell(rng, question, world)) for question in rng.sample(questions, 2)]
        return [(f"{text}\n{asked[0][0]}", asked[0][1])] + asked[1:rng.randint(1, 2)]
    if kind == "fact":
        return [split_question(tell(rng, rng.choice(FACTS), small_numbers(rng)))]
    if kind == "problem":
        problem = word_problem(rng)
        return [(problem["prompt"], worked_or_not(rng, problem["working"], problem["sentence"]))]
    n, sign, m, result = two_digits(rng)
    answer = worked_or_not(rng, work_out(n, sign, m), f"The answer is {result}.")
    return [(f"What is {n} {sign} {m}?", answer)]


def toy_chat(seed=1337, count=8_000):
    """Yield conversations, lists of {"role", "content"}: stories, questions about them, facts and sums."""
    rng = random.Random(f"chat {seed}")
    for _ in range(count):
        said, manner = turns(rng), rng.choice(CHAT_MANNERS)
        if manner != "plain":
            said = [(question, f"{rng.choice(MANNERS[manner])} {answer}") for question, answer in said]
        if rng.random() < 0.1:
            said.insert(0, rng.choice(GREETINGS))
        if rng.random() < 0.1:
            said.append(rng.choice(THANKS))
        yield [dict(role=role, content=content)
               for turn in said for role, content in zip(("user", "assistant"), turn)]


def toy_prefs(seed=1337, count=3_000):
    """Yield preferences: prompt, chosen, rejected. The answer is the same, only the manner differs."""
    rng = random.Random(f"prefs {seed}")
    for _ in range(count):
        prompt, answer = turns(rng, ("reading", "fact", "problem", "sum"))[0]
        kind, curt = rng.choice(list(zip(MANNERS["kind"], MANNERS["curt"])))
        yield dict(prompt=prompt, chosen=f"{kind} {answer}", rejected=f"{curt} {answer}")


def toy_verify(prompt, completion, answer):
    """1.0 if the completion ends in the sentence that answers the question, else 0.0.

    For "How many coins does Tom have left?" that is any whole sentence that says rightly who has how many of
    what. What comes before is free: there a model may be kind, or work the sum out."""
    last = re.split(r"(?<=[.!?])\s+", completion.strip())[-1]
    asked = re.findall(r"How many (\w+) do(?:es)? (\w+|\w+ and \w+) have (now|left|together)\?$", prompt)
    if not asked or not answer.isdigit():
        return float(bool(answer) and last == answer)
    noun, who, when = asked[-1]
    if answer == "1":
        noun = {plural(item): item for item in TABLES["item"]}.get(noun, noun)
    has = "have" if " and " in who else "has"
    return float(bool(re.fullmatch(rf"(So |Now )?{who} {has} {answer} {noun}( {when})?[.!]", last)))


# -----------------------------------------------------------------------------
# One data set

def prepare(source, tokenizer="", name="", data_dir="data", max_tokens=0, field="", config="", split="",
            as_="", val_fraction=None, block_size=0, workers=0, seed=1337):
    """Makes data/<name>/ from a known name, a file, a folder or hub:owner/name, and returns that directory.

    Killed at any moment and started again, it goes on where it was; what lay there before is replaced only
    when the new data is whole. Raises UserError for whatever the user can mend."""
    known = KNOWN.get(source, {})
    is_path = os.path.exists(source)
    if not known and not is_path and not source.startswith("hub:"):
        if re.search(r"[/\\]|\.(txt|jsonl|parquet|md|zst|gz)$", source):
            raise UserError(f"{source}: no such file or folder")
        close = difflib.get_close_matches(source, KNOWN, n=3, cutoff=0.5)
        raise UserError(f"{source}: neither a file or folder nor a known data set"
                        f"{'; did you mean ' + ' or '.join(close) + '?' if close else ''} "
                        "(python prepare.py lists them)")
    name = name or (source if known else _stem(source))
    _check_name(name)
    for key, value in dict(max_tokens=max_tokens, block_size=block_size, workers=workers, seed=seed).items():
        if value < 0:
            raise UserError(f"--{key}={value}: 0 or more is wanted")
    val_fraction = known.get("val_fraction", 0.005) if val_fraction is None else val_fraction
    if not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction={val_fraction}: a share between 0 and 1 is wanted, such as 0.005")
    if as_ not in ("", "text", "chat", "prefs", "verify"):
        raise UserError(f"--as={as_}: one of text, chat, prefs, verify")
    as_ = as_ or known.get("as_", "")
    usual = SMOLLM2 if source.startswith("hub:") else "bpe:4096"
    tokenizer = tokenizer or known.get("tokenizer", "") or usual
    target = os.path.join(data_dir, name)
    partial = _place(target) + ".partial"
    replaced = _check_target(target, "data set", [source] if is_path and not known else [])
    if not os.path.exists(os.path.join(partial, "journal.json")):
        os.makedirs(partial, exist_ok=True)
        write_json(os.path.join(partial, "journal.json"), dict(stamp=""))  # which marks the directory as ours
    try:
        made = _make(source, known, tokenizer, partial, target, dict(
            version=1, name=name, source=source, max_tokens=int(max_tokens), field=field, shape=as_,
            val_fraction=val_fraction, block_size=block_size), config, split, workers, seed)
    except BaseException:
        with contextlib.suppress(OSError, UserError):
            if not read_journal(partial).get("stamp"):
                remove_directory(partial, "unfinished data set")  # nothing in it to go on from
        raise
    if made:
        publish(partial, target)
        if replaced:
            print(f"{target} replaces {replaced}")
        _report(target)
    return target


def read_journal(partial):
    path = os.path.join(partial, "journal.json")
    return read_json(path) if os.path.exists(path) else {}


def _check_name(name):
    if not re.fullmatch(r"[\w.+-]+", name) or not name.strip(".") or name.endswith(".partial"):
        raise UserError(f"--name={name}: letters, digits, '-', '_', '.' only, since it becomes a directory")


def _place(target):
    """Where a data set is written: a link to a directory elsewhere, on a larger disk say, stays a link."""
    return os.path.realpath(target) if os.path.islink(target) else target


def _check_target(target, kind, sources):
    """UserError if data must not be written to `target`, before any work is done: because it would take the place of
    something that this program did not make, or of its source. Returns what it will replace, in words, or ""."""
    place = _place(target)
    for source in sources:
        for directory in (place, place + ".partial", _aside(place)):
            if _inside(source, directory):
                raise UserError(f"{target} would replace its own source, {source}; choose another --name= or "
                                "--data_dir=")
        if os.path.isdir(source) and _inside(place, source):
            raise UserError(f"{target} lies in the folder {source} that it would be made from; choose a --data_dir= "
                            "outside of it")
    partial = place + ".partial"
    kind_of_partial = kind
    if kind == "data set" and kind_of_directory(partial) != "data set":  # it is one if it was only not yet published
        kind_of_partial = "unfinished data set"
    restore(place, kind)
    for directory, kind_there in ((place, kind), (partial, kind_of_partial), (_aside(place), kind)):
        reason = not_ours(directory, kind_there)
        if reason:
            raise UserError(f"{directory} {reason}, and would be replaced; choose another --name= or --data_dir=, or "
                            "move it elsewhere")
    if not os.path.isdir(place) or not kind_of_directory(place):
        return ""
    if kind == "data set":
        meta = read_json(os.path.join(place, "meta.json"))
        return f"what was made there from {meta.get('source')}"
    return "the tokenizer that was there"


def _inside(path, directory):
    """Whether `path` is `directory` or lies within it, whatever links, dots or letter case spell them."""
    path = os.path.realpath(path)
    while os.path.isdir(directory):
        if os.path.exists(path) and os.path.samefile(path, directory):
            return True
        if path == os.path.dirname(path):
            return False
        path = os.path.dirname(path)
    return False


def _stem(source):
    base = os.path.basename(os.path.abspath(source))
    for ending in (*PACKED, *TEXT, *LINES, ".parquet"):
        base = base.removesuffix(ending)
    return base


def _make(source, known, tokenizer, partial, target, settings, config, split, workers, seed):
    """Fills `partial`, from wherever the source is; False if `target` holds the same already."""
    if "bins" in known:
        return _take_bins(known, partial, target)
    if "toy" in known:
        files, data_dir = _toy_files(known, partial, seed), os.path.dirname(target)
        if tokenizer == "toy":  # every toy set speaks the tokenizer of the toy text
            tokenizer = os.path.join(data_dir, "toy")
            if not os.path.exists(os.path.join(tokenizer, "tokenizer.json")):
                prepare("toy", data_dir=data_dir, workers=workers, seed=seed)
    elif "get" in known:
        files = local_files(download(*known["get"]))
    elif known or not os.path.exists(source):
        files = hub_files(known.get("hub") or source[4:], config or known.get("config", ""), split,
                          known.get("files", ""))
    else:
        files = local_files(source)
        # a folder may hold links to files of the target
        _check_target(target, "data set", [f.path for f in files if os.path.islink(f.path)])
    if not sum(f.size for f in files):
        raise UserError(f"{source}: empty, there is no text in it")
    return _pack(files, dict(settings, tokenizer=tokenizer), partial, target, workers)


def _toy_files(known, partial, seed):
    make = dict(stories=toy_stories, chat=toy_chat, prefs=toy_prefs, sums=toy_sums, problems=toy_problems,
                questions=toy_questions)[known["toy"]]
    path = os.path.join(partial, "toy.txt" if known["toy"] == "stories" else "toy.jsonl")
    with open(path, "w", encoding="utf-8") as f:  # made anew each time: it is the same for the same seed
        for made in make(seed):
            if isinstance(made, str):
                f.write(made + "\n" + EOT + "\n")
            else:
                record = dict(messages=made) if isinstance(made, list) else made
                f.write(json.dumps(record, ensure_ascii=False) + "\n")
    return local_files(path)


def _take_bins(known, partial, target):
    """A data set that is tokens already: the bins and the tokenizer of a Hub repository, as they are."""
    files = {f.path: f for f in hub_list(known["hub"])}
    where = known["bins"] + "/"
    found = next((p for p in sorted(files, key=len) if os.path.basename(p) == "tokenizer.json"), None)
    if where + "train.bin" not in files or where + "val.bin" not in files or not found:
        raise UserError(f"{known['hub']}: no {where}train.bin, {where}val.bin and tokenizer.json in it any "
                        "more")
    stamp = files[where + "train.bin"].revision
    if _done(target, stamp):
        print(f"{target} holds this already")
        remove_directory(partial, "unfinished data set")
        return False
    _check_space(partial, 2 * sum(files[where + f].size for f in ("train.bin", "val.bin")))
    tok = load_tokenizer(local_path(files[found]))
    tok.name = known["hub"]
    meta = dict(name=os.path.basename(target), source=known["hub"], stamp=stamp, kind="text",
                tokenizer=tok.name, vocab_size=tok.vocab_size, eos_id=tok.eos_id, dtype=_dtype(tok).name)
    for part in ("train", "val"):
        fetched = local_path(files[f"{where}{part}.bin"])
        shutil.copyfile(fetched, os.path.join(partial, part + ".bin"))
        ids = np.memmap(fetched, meta["dtype"], "r")
        if len(ids[:1 << 24]) == 0 or int(ids[:1 << 24].max()) >= tok.vocab_size:
            raise UserError(f"{known['hub']}: {part}.bin holds ids beyond its tokenizer's {tok.vocab_size}")
        meta[part + "_tokens"] = len(ids)
    tok.save(partial)
    write_json(os.path.join(partial, "meta.json"), meta)
    os.remove(os.path.join(partial, "journal.json"))
    return True


def _pack(files, settings, partial, target, workers):
    """Tokenizes files into `partial`, journal and all; False if `target` holds exactly this already."""
    name, wanted = settings["name"], settings["tokenizer"]
    first = next(read_blocks(files[0], len(files) == 1), None)
    if first is None:
        raise UserError(f"{files[0].path}: empty, there is no text in it")
    shape, field = _shape_of(files[0], first, settings["shape"], settings["field"])
    settings.update(shape=shape, field=field)
    stamp = [settings] + [[f.path, f.size, f.digest or f.revision or os.stat(f.path).st_mtime_ns, f.split]
                          if not f.path.startswith(partial) else [f.size, sha256(f.path)] for f in files]
    local = os.path.join(wanted, "tokenizer.json") if os.path.isdir(wanted) else wanted
    stamp.append(sha256(local) if os.path.isfile(local) else "")
    stamp = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()
    if _done(target, stamp):
        print(f"{target} holds this already")
        remove_directory(partial, "unfinished data set")
        return False

    journal = os.path.join(partial, "journal.json")
    state = dict(stamp=stamp, file=0, block=0, sizes={}, count={}, wrong=[])
    old = read_journal(partial)
    if old.get("stamp") == stamp:
        state = old
        print(f"going on after {sum(state['sizes'].values()) / 1e6:.1f} MB that were written before")
    if shape in ("prefs", "verify"):
        tok = None  # they stay text until a model's own tokenizer meets them
    elif os.path.exists(os.path.join(partial, "tokenizer.json")) and state["sizes"]:
        tok = load_tokenizer(partial)
    else:
        blank = Job(None, shape, field, 0, 0)
        most = min(1 << 30, 6 * settings["max_tokens"] or 1 << 30)  # bytes: a vocabulary needs no more
        tok = make_tokenizer(wanted, _texts(files, blank, most if wanted != "char" else None))
        if shape == "chat":
            tok = with_chat_tokens(tok)
        tok.save(partial)
    job = Job(tok.fast() if tok else None, shape, field, settings["val_fraction"], settings["block_size"])
    _check_space(partial, _estimate(files, job, settings["max_tokens"]))
    _run(files, job, state, journal, partial, settings["max_tokens"], workers)

    count = collections.Counter(state["count"])
    write_json(journal, dict(stamp=""))  # nothing to go on from
    if not count["documents"]:
        raise UserError(f"{settings['source']}: nothing in it could be used{_examples(state['wrong'])}")
    for part in ("train", "val"):
        key = part + ("_documents" if tok is None else "_tokens")
        if not count[key]:
            if first.kind in ("train", "val"):
                raise UserError(f"{settings['source']}: too short: {count['bytes']} bytes leave nothing for "
                                f"{'training' if part == 'train' else 'validation'}")
            better = min(0.5, round(5 / count["documents"], 4)) if part == "val" else 0.005
            further = better > settings["val_fraction"] if part == "val" else better < settings["val_fraction"]
            raise UserError(f"{settings['source']}: of {count['documents']} documents none fell into {part}; " + (
                f"set --val_fraction={better}" if further and count["documents"] >= 10 else
                "bring more, or a folder with a train and a val file of your own"))
    meta = dict(name=name, kind=shape, source=settings["source"], stamp=stamp, documents=count["documents"],
                bytes=count["bytes"], val_fraction=settings["val_fraction"], left_out=count["wrong"],
                replaced_characters=count["broken"])
    if tok:
        meta.update(tokenizer=tok.name, vocab_size=tok.vocab_size, dtype=job.dtype.name, eos_id=tok.eos_id,
                    train_tokens=count["train_tokens"], val_tokens=count["val_tokens"])
    else:
        meta.update(train_records=count["train_documents"], val_records=count["val_documents"])
    write_json(os.path.join(partial, "meta.json"), meta)
    for left in ("toy.txt", "toy.jsonl", "journal.json"):
        if os.path.exists(os.path.join(partial, left)):
            os.remove(os.path.join(partial, left))
    _tell_wrong(state, count)
    return True


def _texts(files, job, most=None):
    """The texts of a source, or about its first `most` bytes, for a tokenizer to be made from."""
    result, size = _result(), 0
    for file in files:
        for block in read_blocks(file, len(files) == 1, job.field or None):
            if most and size > most:
                return
            if block.kind in ("train", "val"):
                yield _decoded(block.data, None, result)
                size += len(block.data)
                continue
            for _, content, length in job.contents(block, result):
                yield content if isinstance(content, str) else "\n".join(m["content"] for m in content)
                size += length


def _texts_of(files, as_, field):
    first = next(read_blocks(files[0], len(files) == 1), None)
    if first:
        yield from _texts(files, Job(None, *_shape_of(files[0], first, as_, field), 0, 0))


def _run(files, job, state, journal, partial, max_tokens, workers):
    """Blocks in, tokens out, in order: this process reads and writes, the workers tokenize. What is under way is
    bounded, and so is memory. The journal says from time to time how much of the output is sure."""
    workers = workers or os.cpu_count() or 1
    outs = {}
    for out in sorted(os.listdir(partial)):
        if re.fullmatch(r"(train|val)\.(bin|mask|jsonl)", out):
            os.truncate(os.path.join(partial, out), state["sizes"].get(out, 0))
    count, saved, under_way = collections.Counter(state["count"]), time.time(), collections.deque()
    full = lambda: max_tokens and count["train_tokens"] >= max_tokens

    def append(out, data):
        if out not in outs:
            outs[out] = open(os.path.join(partial, out), "ab")
        outs[out].write(data)
        state["sizes"][out] = state["sizes"].get(out, 0) + len(data)

    def save():
        for f in outs.values():
            f.flush()
            os.fsync(f.fileno())
        write_json(journal, dict(state, count=dict(count)))

    def finish():
        """Writes the oldest result that is under way."""
        i, j, block, future = under_way.popleft()
        result = future.result()
        if result["out"].get("train.bin") and full():
            return
        if max_tokens and count["train_tokens"] + result["count"]["train_tokens"] > max_tokens:
            ids = np.frombuffer(result["out"]["train.bin"], job.dtype)
            ends = np.flatnonzero(ids == job.tok.eos_id) + 1 if block.kind not in ("train", "val") else []
            enough = max_tokens - count["train_tokens"]
            cut = int(next((e for e in ends if e >= enough), len(ids) if len(ends) else enough))
            result["out"]["train.bin"] = ids[:cut].tobytes()
            if "train.mask" in result["out"]:
                result["out"]["train.mask"] = result["out"]["train.mask"][:cut]
            dropped = int(sum(e > cut for e in ends))
            result["count"].update(train_tokens=cut - len(ids), train_documents=-dropped, documents=-dropped,
                                   bytes=-int(result["count"]["bytes"] * (len(ids) - cut) / max(len(ids), 1)))
        for out, data in result["out"].items():
            append(out, data)
        count.update(result["count"])
        count["wrong"] += len(result["wrong"])
        where = "line" if block.kind == "lines" else "row" if block.kind == "rows" else "byte"
        state["wrong"] += [f"{files[i].path}, {where} {at}: {why}" for at, why in result["wrong"]]
        del state["wrong"][3:]  # enough for examples
        if result["broken_at"] is not None and len(state["wrong"]) < 3:
            state["wrong"].append(f"{files[i].path}, byte {result['broken_at']}: not UTF-8")
        if count["wrong"] > 20 + 0.05 * count["documents"]:
            raise UserError(f"{count['wrong']} of the first {count['wrong'] + count['documents']} records "
                            f"are unusable{_examples(state['wrong'])}")
        state.update(file=i, block=j + 1)

    before = sum(f.size for f in files[:state["file"]])
    told = dict(desc=os.path.basename(partial)[:-8], unit="B", total=sum(f.size for f in files), initial=before)
    with _workers(workers, job) as pool, concurrent.futures.ThreadPoolExecutor(1) as fetcher, progress(**told) as bar:
        try:
            for i in range(state["file"], len(files)):
                while max_tokens and under_way:
                    finish()  # to know whether another file is needed at all
                if full() and files[i].split != "val":
                    break
                ahead = files[i + 1] if i + 1 < len(files) else None
                short = not max_tokens or i and count["train_tokens"] * (i + 1) / i < max_tokens
                if ahead and ahead.repo and short:  # the next shard comes while this one is worked on
                    fetcher.submit(_quietly, local_path, ahead)
                skip = state["block"] if i == state["file"] else 0
                for j, block in enumerate(read_blocks(files[i], len(files) == 1, job.field or None)):
                    bar.n = before + block.read
                    if j < skip:
                        continue
                    if full() and block.kind != "val" and files[i].split != "val":
                        break
                    under_way.append((i, j, block, pool.submit(_work, files[i], block)))
                    while len(under_way) > 2 * workers:
                        finish()
                    if job.tok:
                        bar.set_postfix_str(f"{count['train_tokens'] / 1e6:.1f}M tokens", refresh=False)
                    bar.update(0)
                    if time.time() - saved > SAVE:
                        save()
                        saved = time.time()
                before += files[i].size
            while under_way:
                finish()
            save()
        finally:
            for *_, future in under_way:
                future.cancel()
            for f in outs.values():
                f.close()
    state["count"] = dict(count)


def _workers(count, job):
    """A pool whose workers know `job`. With tiktoken's engine, two processes tokenize 2.0 times as fast as one and two
    threads 1.6 times, since they share its regular expressions; `tokenizers` and numpy use all cores from threads. Only
    a fork is sure not to run the caller's script again, so elsewhere than on Linux it is threads."""
    if sys.platform == "linux" and job.tok and job.tok.tik and count > 1:
        return concurrent.futures.ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _adopt, (job, True))
    return concurrent.futures.ThreadPoolExecutor(count, initializer=_adopt, initargs=(job, False))


def _adopt(job, forked):
    global _job
    _job = job
    if forked:  # PR_SET_PDEATHSIG: a worker whose parent was killed would wait for ever
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's


def _work(file, block):
    return _job(file, block)


def _quietly(call, *args):
    try:
        call(*args)
    except Exception:  # the same call is made again when its turn comes, and then it is told
        pass


def _estimate(files, job, max_tokens):
    """About how many bytes the output will take."""
    growth = {"parquet": 2.5, "lines": 1}
    kinds = [_kind_of(f.path) for f in files]
    text = sum(f.size * (3.5 if packing else growth.get(kind, 1)) for f, (kind, packing) in zip(files, kinds))
    if job.tok is None:
        return text
    tokens = text if job.tok.table is not None or job.tok.bytes else text / 3.5
    return (min(tokens, max_tokens * 1.02) if max_tokens
            else tokens) * (job.dtype.itemsize + (job.shape == "chat"))


def _check_space(directory, need):
    there = sum(os.path.getsize(os.path.join(directory, f)) for f in os.listdir(directory))
    free = shutil.disk_usage(directory).free + there
    if need > free:
        raise UserError(f"{directory}: about {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are "
                        "free; free some, set --data_dir= elsewhere, or take less with --max_tokens=")


def _examples(wrong):
    return f" (for example {'; '.join(wrong)})" if wrong else ""


def _tell_wrong(state, count):
    if count["wrong"]:
        print(f"left out: {count['wrong']} records{_examples(state['wrong'])}")
    if count["broken"]:
        print(f"not UTF-8: {count['broken']} characters replaced by U+FFFD{_examples(state['wrong'])}")


def _done(directory, stamp):
    try:
        meta = read_json(os.path.join(directory, "meta.json"))
        width = np.dtype(meta.get("dtype", "uint8")).itemsize
        wanted = {part: width * meta.get(part + "_tokens", 0) for part in ("train", "val")}
        return meta.get("stamp") == stamp and all(
            os.path.getsize(os.path.join(directory, part + ".bin")) == size for part, size in wanted.items()
            if size)
    except (OSError, ValueError):  # a UserError is one too
        return False


# -----------------------------------------------------------------------------
# What this program may replace or remove: directories that it wrote itself, and nothing else

_DATA = r"(train|val)\.(bin|mask|jsonl)|meta\.json|tokenizer(_config)?\.json"
WRITTEN = {  # kind of directory -> the names of the files that this program writes into it
    "data set": _DATA,
    "unfinished data set": _DATA + r"|journal\.json|toy\.(txt|jsonl)",
    "tokenizer": r"tokenizer(_config)?\.json",
    "checkpoint": r"trainer\.pt|(config|generation_config|tokenizer|tokenizer_config)\.json|README\.md|loss\.png"
                  r"|model[\w.-]*\.safetensors|model\.safetensors\.index\.json|[\w.-]+\.gguf",
}
# nobody's work: what file managers leave behind, and what write_json leaves when it is killed
_PASSING = r"\.DS_Store|Thumbs\.db|desktop\.ini|\w+\.json\.tmp\d+"


def kind_of_directory(directory):
    """What this program wrote a directory as: a key of WRITTEN, by the file that marks it; None if it did not."""
    def marked(name, *keys):
        try:
            return read_json(os.path.join(directory, name)).keys() >= set(keys)
        except UserError:
            return False
    if all(os.path.isfile(os.path.join(directory, name)) for name in ("trainer.pt", "config.json")):
        return "checkpoint"
    if marked("journal.json", "stamp"):
        return "unfinished data set"
    if marked("meta.json", "stamp", "kind"):
        return "data set"
    if marked("tokenizer_config.json", "nanosmol_name") and not os.path.exists(os.path.join(directory, "config.json")):
        return "tokenizer"
    return None


def ours(directory):
    """Whether this program wrote a directory and everything in it, so that it may be replaced or removed."""
    kind = kind_of_directory(directory) if os.path.isdir(directory) else None
    return kind is not None and not not_ours(directory, kind)


def not_ours(directory, kind):
    """Why a directory may not be replaced by a new one of this kind, in words; "" if it may, or if there is none."""
    if not os.path.lexists(directory):
        return ""
    if not os.path.isdir(directory):
        return "is not a directory"
    names = sorted(os.listdir(directory))
    strangers = [f for f in names if not _written(os.path.join(directory, f), kind)]
    if strangers:
        return f"holds {strangers[0]}, which is not a file of a {kind} that this program made"
    if all(re.fullmatch(_PASSING, f) for f in names) or kind_of_directory(directory) == kind:
        return ""
    return f"is not a {kind} that this program made"


def _written(path, kind):
    known = re.fullmatch(rf"({WRITTEN[kind]})(\.tmp\d*)?|{_PASSING}", os.path.basename(path))
    return bool(known) and os.path.isfile(path) and not os.path.islink(path)


def remove_directory(directory, kind):
    """Removes the files of one kind, and the directory if nothing else is in it: what someone put there stays."""
    for name in os.listdir(directory):
        if _written(os.path.join(directory, name), kind):
            os.remove(os.path.join(directory, name))
    if not os.listdir(directory):
        os.rmdir(directory)


def publish(partial, target):
    """The directory `partial`, whole and on the disk, takes the name `target`; what had it goes only then.

    What had it must be of the same kind (a data set, a tokenizer, a checkpoint), made by this program, with nothing
    else in it: UserError otherwise, and nothing is touched."""
    kind = kind_of_directory(partial)
    target = _place(target)
    aside = _aside(target)
    for directory in (target, aside):
        reason = not_ours(directory, kind) if kind else os.path.lexists(directory) and "is in the way"
        if reason:
            raise UserError(f"{directory} {reason}; move it elsewhere, or choose another name")
    for name in os.listdir(partial):
        _sync(os.path.join(partial, name))
    _sync(partial)
    restore(target, kind)
    if os.path.exists(target):
        os.rename(target, aside)
    os.rename(partial, target)
    _sync(os.path.dirname(target) or ".")
    if os.path.exists(aside):
        with contextlib.suppress(OSError):
            remove_directory(aside, kind)


def _aside(target):
    """Where publish keeps what it replaces, until that is done. Not a name that anyone would choose."""
    return os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.replaced")


def restore(target, kind):
    """Undoes or ends what a publish() that was killed had begun: what stands aside gets its name back, or goes."""
    aside = _aside(target)
    if not os.path.exists(aside) or not_ours(aside, kind):
        return
    if os.path.exists(target):
        remove_directory(aside, kind)
    else:
        os.rename(aside, target)


def _sync(path):
    """Waits until a file or directory is on the disk, where the system can do that: Windows opens no directory and
    syncs no file that is open for reading only, and some mounted drives sync nothing."""
    cannot = (errno.EACCES, errno.EPERM, errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
    for flags in (os.O_RDWR, os.O_RDONLY) if os.path.isfile(path) else (os.O_RDONLY,):
        try:
            handle = os.open(path, flags)
        except OSError as e:
            if e.errno not in cannot:
                raise
            continue
        try:
            os.fsync(handle)
            return
        except OSError as e:
            if e.errno not in cannot:
                raise
        finally:
            os.close(handle)


def copy_whole(source, target):
    """Copies the files of a directory to `target`, whole or not at all. Returns `target`. See publish."""
    target = _place(target)
    kind = kind_of_directory(source) or "checkpoint"
    beside = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.part")
    os.makedirs(beside, exist_ok=True)
    try:
        remove_directory(beside, kind)  # what a kill left
        os.makedirs(beside, exist_ok=True)
        if os.listdir(beside):
            raise UserError(f"{beside} holds {os.listdir(beside)[0]}, which this program did not write; move it elsewhere")
        copy_files(source, beside, os.listdir(source))
        publish(beside, target)
    finally:
        with contextlib.suppress(OSError):
            remove_directory(beside, kind)
    return target


def copy_files(source, target, names):
    """Copies those of the files that are there, content alone: a mounted drive may refuse modes and times."""
    for name in names:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name + ".tmp"))
            os.replace(os.path.join(target, name + ".tmp"), os.path.join(target, name))


def _report(target):
    meta = read_json(os.path.join(target, "meta.json"))
    print(f"{target}: {meta['kind']} from {meta['source']}")
    if "documents" in meta:
        print(f"  {meta['documents']:,} documents, {meta['bytes']:,} bytes")
    if "tokenizer" in meta:
        tokens = meta["train_tokens"] + meta["val_tokens"]
        each = f", {meta['bytes'] / tokens:.2f} bytes a token" if meta.get("bytes") else ""
        print(f"  {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens{each}")
        print(f"  tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} ids, {meta['dtype']}")
        ids = np.fromfile(os.path.join(target, "train.bin"), meta["dtype"], 60)
        print(f"  begins: {load_tokenizer(target).decode(ids)!r}")
    else:
        print(f"  {meta['train_records']:,} training and {meta['val_records']:,} validation records")
        with open(os.path.join(target, "train.jsonl"), encoding="utf-8") as f:
            print(f"  begins: {f.readline()[:300].rstrip()}")
    stage = dict(chat="sft", prefs="dpo", verify="rlvr").get(meta["kind"])
    own = stage and meta["source"].startswith("toy")
    how = f" config/toy_{stage}.py" if own else f" --stage={stage} --init_from=MODEL" if stage else ""
    named = os.path.basename(target)
    apart = "" if own or named == "toy" else f" --out_dir=out/{named}"  # without a config it would be out/toy
    print(f"next: python train.py{how} --dataset={named}{apart}")


def main(words, given):
    if not words:
        print("python prepare.py NAME (one of these), PATH or hub:owner/name; --help tells the rest\n")
        for known in KNOWN:
            print(f"  {known:<18}{KNOWN[known]['size']}")
        return
    if words[0] == "tokenizer":
        paths = words[1:]
        if not paths:
            raise UserError("python prepare.py tokenizer PATH...: name the texts to train it on")
        missing = [p for p in paths if not os.path.exists(p)]
        if missing:
            raise UserError(f"{missing[0]}: no such file or folder")
        _check_name(name or "tokenizer")
        target = os.path.join(data_dir, name or "tokenizer")
        replaced = _check_target(target, "tokenizer", paths)
        texts = (text for path in paths for text in _texts_of(local_files(path), as_, field))
        tok = train_bpe(texts, int(vocab_size), f"bpe:{vocab_size}", min_frequency)
        partial = _place(target) + ".partial"
        tok.save(partial)
        publish(partial, target)
        if replaced:
            print(f"{target} replaces {replaced}")
        print(f"{target}: a byte-level BPE of {tok.vocab_size:,} ids\nnext: python prepare.py TEXT "
              f"--tokenizer={target}")
        return
    for word in words:
        if len(words) > 1 and name:
            raise UserError(f"--name={name} is for one data set, and {len(words)} are asked for: "
                            f"{', '.join(words)}")
        prepare(word, tokenizer, name, data_dir, max_tokens, field, config, split, as_,
                val_fraction if "val_fraction" in given else None, block_size, workers, seed)


if __name__ == "__main__":
    setup = configure(globals(), words=True, argv=[re.sub("^--as=", "--as_=", a) for a in sys.argv[1:]])
    read_secrets()
    try:
        main(setup.words, setup.given)
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")
