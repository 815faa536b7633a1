"""
Everything between text and tokens, and everything that is fetched.

    python prepare.py                                # lists the known data sets and their sizes
    python prepare.py tinystories                    # prepares one of them
    python prepare.py input.txt --tokenizer=char     # a file: .txt .jsonl .csv .parquet, also .gz
    python prepare.py texts/ --name=mine             # or a folder of files
    python prepare.py hub:owner/name --field=text --max_tokens=1e9
    python prepare.py chats.jsonl --as=chat          # or prefs, verify: if a file could be several
    python prepare.py tokenizer texts/ --vocab_size=49152 --name=mine

Each makes data/<name>/: train.bin and val.bin (headerless little-endian token ids, each document
ended by the end-of-text token), meta.json, and the tokenizer's files. Chat adds train.mask and
val.mask (1 where the loss counts). Preferences and verifiable problems are train.jsonl and
val.jsonl instead of bins. However small the source is, something of it is held out in val.
"""

import codecs
import collections
import concurrent.futures
import contextlib
import csv
import ctypes
import decimal
import difflib
import errno
import fnmatch
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import re
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import time
import types
import zlib

import numpy as np

from configurator import UserError, configure, counted

# fmt: off
# what to make, and where
tokenizer = ''           # char, byte, gpt2, bpe:4096 (trained on the text), a run, path or Hub id
name = ''                # the data set becomes data/<name>/; '' follows the source
data_dir = 'data'        # where data sets are written
max_tokens = 0           # stop after about this many training tokens; 0: take everything (>= 0)
# how to read the source
field = ''               # the key or column that holds the text; '' tries text, content
config = ''              # hub: a folder or subset of the repository, such as sample/10BT
split = ''               # hub: take this split only, such as train
as_ = ''                 # '' | 'text' | 'chat' | 'prefs' | 'verify'; '' follows the source
val_fraction = 0.005     # share held out: of documents, by a hash; the end of a text (> 0, < 1)
keep_crlf = False        # keep CRLF and CR as line ends; else they become LF
max_unusable = 0.05      # share of records that may be unusable; they are left out (>= 0, <= 1)
block_size = 0           # chat: leave out conversations of more tokens; 0: none (>= 0)
# how to work
workers = 0              # 0: one for each core; the output does not depend on it (>= 0)
seed = 1337              # of the toy world (>= 0)
vocab_size = 49152       # of `prepare.py tokenizer PATH...` (>= 259, <= 1048576)
min_frequency = 2        # of `prepare.py tokenizer`: rarer pairs are not merged (>= 1)
# -----------------------------------------------------------------------------

EOT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLOCK = 1 << 20          # bytes of text that are tokenized at a time
BLOCKS_PER_PART = 8      # blocks that a worker gets at a time, and that a kill costs at most
LONGEST = 16 << 20       # a longer document is split, so that nothing larger is held in memory
LONGEST_ARRAY = 256 << 20  # a JSON array is read whole, unless it has more bytes
MAX_VOCABULARY = 1 << 20
LONGEST_WORD = 64        # characters: longer words are cut before a BPE is trained, see train_bpe
WINDOW = 256             # tokens: train.py's usual block_size; at least as many are held out

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M"
LLAMA2 = "NousResearch/Llama-2-7b-hf"  # a copy of Meta's tokenizer that needs no signature
VOCABULARIES = {"gpt2": 50257, SMOLLM2: 49152, LLAMA2: 32000}

KNOWN = {  # name -> where it comes from; `get`: a URL and the SHA-256 of its content
    "toy": dict(size="made here, no download", toy="stories", tokenizer="bpe:4096"),
    "toy_chat": dict(size="made here, no download", toy="chat", val_fraction=0.05, as_="chat",
                     tokenizer="toy"),
    "toy_prefs": dict(size="made here, no download", toy="prefs", val_fraction=0.1, as_="prefs",
                      tokenizer="toy"),
    "toy_sums": dict(size="made here, no download", toy="sums", val_fraction=0.1, as_="verify",
                     tokenizer="toy"),
    "toy_problems": dict(size="made here, no download", toy="problems", val_fraction=0.1,
                         as_="verify", tokenizer="toy"),
    "toy_questions": dict(size="made here, no download", toy="questions", val_fraction=0.1,
                          as_="verify", tokenizer="toy"),
    "shakespeare": dict(size="1.1 MB", tokenizer="gpt2", get=(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")),
    "tinystories": dict(size="2.3 GB", tokenizer="gpt2", hub="roneneldan/TinyStories",
                        files="TinyStoriesV2-GPT4-*.txt"),
    # tokenized already: its bins and tokenizer are used as they are
    "fineweb_6b": dict(size="12 GB", hub="weights-and-wires/fineweb-6b", bins="tokenized"),
    "fineweb_edu": dict(size="28 GB, 10B tokens", hub="HuggingFaceFW/fineweb-edu",
                        config="sample/10BT", tokenizer=LLAMA2),
    # a hundredth of DCLM's four trillion tokens, which is more than anyone trains on here
    "dclm": dict(size="60 GB, 40B tokens", hub="mlfoundations/dclm-baseline-1.0",
                 config="global-shard_01_of_10/local-shard_0_of_10", tokenizer=LLAMA2),
    "openwebmath": dict(size="27 GB, 14B tokens", hub="open-web-math/open-web-math", config="data",
                        tokenizer=LLAMA2),
    # permissively licensed source files filtered for quality; The Stack itself needs a signature
    "code": dict(size="about 70 GB", hub="common-pile/stackv2_edu_filtered", tokenizer=LLAMA2),
    "cosmopedia": dict(size="122 GB, 28B tokens", hub="HuggingFaceTB/smollm-corpus",
                       config="cosmopedia-v2", tokenizer=SMOLLM2),
    "smoltalk": dict(size="2.1 GB, 1.1M conversations", hub="HuggingFaceTB/smoltalk",
                     config="data/all", as_="chat", tokenizer=SMOLLM2),
    "ultrafeedback": dict(size="230 MB, 61K pairs", hub="HuggingFaceH4/ultrafeedback_binarized",
                          files="data/*_prefs-*.parquet", as_="prefs"),
    "gsm8k": dict(size="3 MB, 7.5K problems", hub="openai/gsm8k", config="main", as_="verify",
                  tokenizer=SMOLLM2),
}
KNOWN["shakespeare_char"] = dict(KNOWN["shakespeare"], tokenizer="char")
# fmt: on


def describe(name):
    """What preparing the known data set `name` takes, in words; None if no set has that name."""
    return f"{name}: {KNOWN[name]['size']}" if name in KNOWN else None


# -----------------------------------------------------------------------------
# Tokenizers. Each is a tokenizer.json, whatever it was made from, so transformers reads it too.


# What ends a document: the first of these that a tokenizer has, and only then the token that its
# config names, which for an instruct model ends a turn (<|im_end|>, <|eot_id|>).
DOCUMENT_ENDS = (EOT, "<|end_of_text|>", "<eos>", "</s>", "<EOS_TOKEN>", "<|eos|>", "[EOS]")


class Tokenizer:
    """Text to ids and back. `name` is the spec that it was made from, `vocab_size` counts all ids,
    `eos_id` ends a document; nanoGPT's character data has no such token, there it is -1. encode()
    never returns special tokens: "<|im_end|>" in a text is encoded as the characters that it
    consists of."""

    def __init__(self, spec, name, settings=None):
        """`spec`: the content of tokenizer.json; `settings`: of tokenizer_config.json beside it."""
        from tokenizers import Tokenizer as Library

        self.name = name
        self.spec = {"added_tokens": []} | spec | {"truncation": None, "padding": None}
        self.library = Library.from_str(json.dumps(self.spec))
        self.library.encode_special_tokens = True  # which means: as ordinary text
        vocab = self.library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.eos = self._end_of_document(vocab, settings or {})
        self.eos_id = vocab.get(self.eos, -1)
        self.bos = next((t for t in ("<s>", "<|begin_of_text|>", "<bos>") if t in vocab), None)
        # what a text without a prompt begins with; nanoGPT's samples begin with a line break
        self.start_id = vocab.get(self.eos or "\n", 0)
        self.engine = self._plain_engine()

    def _end_of_document(self, vocab, settings):
        configured = settings.get("eos_token")
        if isinstance(configured, dict):
            configured = configured["content"]
        if "nanosmol_name" in settings:  # written by save(): decided already
            return configured
        for token in (*DOCUMENT_ENDS, configured):
            if token in vocab:
                return token
        raise UserError(f"{self.name}: this tokenizer has no end-of-text token ({EOT}, </s>, ...)")

    def _plain_engine(self):
        model, pre_tokenizer = self.spec["model"], self.spec.get("pre_tokenizer") or {}
        if model["type"] == "WordLevel" and pre_tokenizer.get("type") == "Split":
            return CharacterEngine(model["vocab"], self.name)
        byte_level = model["type"] == "BPE" and pre_tokenizer.get("type") == "ByteLevel"
        if byte_level and not model["merges"]:
            return ByteEngine()
        return LibraryEngine(self.library, self.name)

    def fast(self):
        """Uses tiktoken's engine, 3 times as fast, if it is certain to give the same ids."""
        if not isinstance(self.engine, LibraryEngine):
            return self
        encoding = _tiktoken_encoding(self.spec, self.vocab_size, self.eos_id)
        if encoding:
            engine = TiktokenEngine(encoding, self.vocab_size, self.engine)
            texts = (SAMPLE, *SAMPLE.split(" "))
            if all(np.array_equal(engine.encode(t), self.engine.encode(t)) for t in texts):
                self.engine = engine
        return self

    def encode(self, text):
        """A list of ids. UserError for a character that a char tokenizer does not know."""
        return self.engine.encode(text).tolist()

    def encode_documents(self, texts):
        """The ids of all texts in a row, each ended by eos_id, as a uint32 array."""
        return self.engine.encode_documents(texts, self.eos_id)

    def encode_piece(self, text, first):
        """The ids of a piece of a long text that was split at _cut_place(), as an array."""
        if first or self.engine.splits_anywhere:
            return self.engine.encode(text)
        # SentencePiece puts a space before each text: begin with a line break and drop both
        ids, lead = self.engine.encode("\n" + text), self.engine.encode("\n")
        if np.array_equal(ids[: len(lead)], lead):
            return ids[len(lead) :]
        return self.engine.encode(text)

    def encode_special(self, token):
        """The id of a special token such as <|im_end|>; None if this tokenizer does not have it."""
        return self.library.token_to_id(token)

    def has_chat_tokens(self):
        return all(self.encode_special(token) is not None for token in (IM_START, IM_END))

    def decode(self, ids):
        return self.library.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self):
        """UTF-8 bytes that each id adds to a text, (vocab_size,); 0 for special tokens. Exact for a
        tokenizer that only cuts a text up. The space that SentencePiece puts before a text counts.
        """
        decoder = self.spec.get("decoder") or {}
        kinds = {part.get("type") for part in (decoder, *decoder.get("decoders", []))}
        special = {token["content"] for token in self.spec["added_tokens"] if token["special"]}
        vocab = self.library.get_vocab(with_added_tokens=True)
        vocab = {token: i for token, i in vocab.items() if token not in special}
        sizes, bytes_as_text = np.zeros(self.vocab_size, np.int64), set(_byte_characters())
        if "ByteLevel" in kinds:  # a character of the token is a byte of the text
            for token, i in vocab.items():
                is_bytes = bytes_as_text.issuperset(token)
                sizes[i] = len(token) if is_bytes else len(token.encode())
            return sizes
        # what a token adds between two others: it may bring the space before or after it
        anchor = self.encode("a" if "a" in vocab else next(iter(vocab)))[-1:]
        rows = [[*anchor, i, *anchor] for i in vocab.values()]
        texts = self.library.decode_batch([anchor * 2, *rows], skip_special_tokens=False)
        length, *lengths = [len(text.encode()) for text in texts]
        for (token, i), longer in zip(vocab.items(), lengths):
            is_byte = "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", token)
            sizes[i] = 1 if is_byte else longer - length
        return sizes

    def agrees(self, other):
        """Whether the tokens that both have, have equal ids; one may have more special tokens."""
        vocab, others = (t.library.get_vocab(with_added_tokens=True) for t in (self, other))
        if abs(len(vocab) - len(others)) >= 100:
            return False
        return all(others.get(token, i) == i for token, i in vocab.items())

    def special_ids(self, ends):
        """The ids in config.json and generation_config.json of a model whose texts end at one of
        `ends`; None where there is none."""
        eos = None if self.eos_id < 0 else self.eos_id
        bos = eos if self.bos is None else self.encode_special(self.bos)
        end = ends
        if len(ends) < 2:
            end = ends[0] if ends else None
        return {"bos_token_id": bos, "eos_token_id": end, "pad_token_id": eos}

    def save(self, directory):
        """Writes tokenizer.json and tokenizer_config.json, as AutoTokenizer reads them."""
        unk = self.spec["model"].get("unk_token") or ""  # not in every vocabulary that names it
        settings = dict(
            tokenizer_class="PreTrainedTokenizerFast",
            # without token_type_ids, which transformers 4 adds and generate() refuses
            model_input_names=["input_ids", "attention_mask"],
            eos_token=self.eos,
            pad_token=self.eos,
            unk_token=self.eos if self.encode_special(unk) is None else unk,  # for CTranslate2
            clean_up_tokenization_spaces=False,
            nanosmol_name=self.name,
            bos_token=self.bos or self.eos,
        )
        if self.has_chat_tokens():
            settings.update(chat_template=CHAT_TEMPLATE)
        os.makedirs(directory, exist_ok=True)
        # the settings first: they mark the directory as written by this program
        write_json(os.path.join(directory, "tokenizer_config.json"), settings)
        write_json(os.path.join(directory, "tokenizer.json"), self.spec, indent=None)

    def gguf_vocabulary(self, vocab_size):
        """The keys of a GGUF file that hold this tokenizer, for a model of `vocab_size` tokens;
        UserError if llama.cpp can't encode as this one does."""
        model = self.spec["model"]
        if model["type"] != "BPE" or model.get("byte_fallback"):
            raise UserError(
                f"{self.name}: llama.cpp needs a byte-level BPE, this is no such tokenizer"
            )
        pre = "gpt-2"
        if model["merges"]:  # without any, how a text is split into words makes no difference
            pre = GGUF_WORDS.get((_words_pattern(self.spec), bool(model.get("ignore_merges"))))
        if not pre or self.spec.get("normalizer"):
            raise UserError(f"{self.name}: llama.cpp cannot split a text into words as it does")
        tokens, types = self._gguf_tokens(vocab_size)
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        keys = {
            "model": "gpt2",
            "pre": pre,
            "tokens": tokens,
            "token_type": types,
            "merges": merges or ["À Á"],  # GGUF has no empty list; no UTF-8 has these two bytes
            "bos_token_id": self.special_ids([])["bos_token_id"],
            "eos_token_id": self.eos_id,
            "padding_token_id": self.eos_id,
            "add_bos_token": False,
            "add_eos_token": False,
        }
        keys = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
        if self.has_chat_tokens():
            keys["tokenizer.ggml.eot_token_id"] = self.encode_special(IM_END)
            keys["tokenizer.chat_template"] = UNMARKED_TEMPLATE
        return keys

    def _gguf_tokens(self, vocab_size):
        """(the tokens by id, their types); the ids without a token are marked as unused."""
        from gguf import TokenType

        if self.vocab_size > vocab_size:
            both = f"{self.name} has {self.vocab_size} tokens, the model {vocab_size}"
            raise UserError(f"{both}: they do not belong together")
        tokens = [f"[unused {i}]" for i in range(vocab_size)]
        types = [int(TokenType.UNUSED)] * vocab_size
        for token, i in self.library.get_vocab(with_added_tokens=True).items():
            tokens[i], types[i] = token, int(TokenType.NORMAL)
        for token in self.spec["added_tokens"]:
            kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
            types[token["id"]] = int(kind)
        return tokens, types


class Engine:
    """What encodes text: encode(text) returns an array of ids, without special tokens."""

    splits_anywhere = True  # encodes pieces of a text as it encodes the whole, see encode_piece

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def encode_documents(self, texts, eos_id):
        end = np.array([eos_id], np.uint32)
        parts = [end[:0]]
        for ids in self.encode_batch(texts):
            parts += [np.asarray(ids, np.uint32), end]
        return np.concatenate(parts)


class CharacterEngine(Engine):
    """One id for each character, looked up in a table."""

    def __init__(self, vocab, name):
        self.name, self.table = name, np.full(0x110000, -1, np.int32)
        for character, i in vocab.items():
            if len(character) == 1:
                self.table[ord(character)] = i

    def encode(self, text):
        ids = self.table[np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)]
        if len(ids) and ids.min() < 0:
            unknown = text[int(ids.argmin())]
            raise UserError(f"the character {unknown!r} is not in the vocabulary of {self.name}")
        return ids


class ByteEngine(Engine):
    """The bytes of UTF-8 are the ids."""

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)


class LibraryEngine(Engine):
    """The `tokenizers` library, which encodes with any tokenizer.json."""

    splits_anywhere = False

    def __init__(self, library, name):
        self.library, self.name = library, name

    def encode(self, text):
        return np.array(self._call(self.library.encode, text).ids, np.uint32)

    def encode_batch(self, texts):
        return [e.ids for e in self._call(self.library.encode_batch_fast, texts)]

    def _call(self, encode, text):
        try:
            return encode(text, add_special_tokens=False)
        except Exception as e:  # the library raises the bare Exception
            raise UserError(f"{self.name}: this tokenizer can't encode the text: {e}") from None


class TiktokenEngine(Engine):
    """tiktoken, for those tokenizers that _tiktoken_encoding accepts."""

    def __init__(self, encoding, vocab_size, fallback):
        self.encoding, self.vocab_size, self.fallback = encoding, vocab_size, fallback

    def encode(self, text):
        ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        return ids if self._valid(ids) else self.fallback.encode(text)

    def encode_documents(self, texts, eos_id):
        joined = "".join([part for text in texts for part in (text, EOT)])
        if joined.count(EOT) == len(texts):  # always, unless a text contains <|endoftext|>
            ids = self.encoding.encode_to_numpy(
                joined, allowed_special={EOT}, disallowed_special=()
            )
            if self._valid(ids):
                return ids
        return super().encode_documents(texts, eos_id)

    def _valid(self, ids):
        """False if the text has a byte that the vocabulary lacks, see _tiktoken_encoding."""
        return not len(ids) or ids.max() < self.vocab_size


def load_tokenizer(spec):
    """The tokenizer that `spec` names: a directory (of a data set, a run, a model, or with
    nanoGPT's meta.pkl), a path to a tokenizer.json, 'gpt2', 'byte', or a Hub id (owner/name); else
    UserError."""
    if spec == "gpt2":
        return _gpt2()
    if spec == "byte":
        return _byte()
    path = tokenizer_file(spec)
    if os.path.isfile(path):
        return _tokenizer_from_file(path, spec)
    if os.path.isdir(spec):
        if os.path.exists(os.path.join(spec, "meta.pkl")):
            return _char(read_meta_pkl(spec), end=None)
        raise UserError(f"{spec}: this directory has no tokenizer.json")
    if spec == "char" or spec.startswith("bpe:"):
        raise UserError(
            f"the tokenizer {spec!r} is made from a text: run `python prepare.py TEXT "
            f"--tokenizer={spec}`, then name that data set's directory"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not spec.endswith(".json"):
        directory = hub_snapshot(spec, ["tokenizer.json", "tokenizer_config.json"])
        path = os.path.join(directory, "tokenizer.json")
        if not os.path.exists(path):
            raise UserError(f"{spec}: this Hub repository has no tokenizer.json; name one that has")
        tokenizer = _tokenizer_from_file(path, spec)
        tokenizer.name = spec
        return tokenizer
    raise UserError(
        f"--tokenizer={spec}: neither char, byte, gpt2, bpe:SIZE, a directory or file that "
        "exists, nor a Hub id (owner/name)"
    )


def tokenizer_file(spec):
    """The tokenizer.json of a directory; of a run's directory, that of its newest checkpoint. What
    is no directory stays as it is."""
    if not os.path.isdir(spec):
        return spec
    places = [spec, *reversed(checkpoints(spec))]
    paths = [os.path.join(place, "tokenizer.json") for place in places]
    return next(filter(os.path.isfile, paths), paths[0])


def _tokenizer_from_file(path, spec):
    settings_path, settings = os.path.join(os.path.dirname(path), "tokenizer_config.json"), {}
    if os.path.basename(path) == "tokenizer.json" and os.path.exists(settings_path):
        settings = read_json(settings_path)
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        return Tokenizer(content, settings.get("nanosmol_name", spec), settings)
    except UserError:
        raise
    except Exception as e:  # tokenizers raises the bare Exception
        raise UserError(f"{path}: not a tokenizer.json that `tokenizers` can read: {e}") from None


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, texts and numbers. A pickle that names a class or a function could run
    any program: it is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not loaded")


def read_meta_pkl(directory):
    """{character: id} of the meta.pkl beside nanoGPT's character data (stoi, or itos)."""
    path = os.path.join(directory, "meta.pkl")
    try:
        with open(path, "rb") as f:
            meta = _PlainUnpickler(f).load()
        if not isinstance(meta, dict) or not (meta.get("stoi") or meta.get("itos")):
            raise ValueError("it has neither")
        vocab = meta.get("stoi")
        if not vocab:
            itos = meta["itos"]  # a list, or a dict
            vocab = {itos[i]: i for i in range(len(itos))}
        is_text = all(
            type(c) is str and len(c) == 1 and not 0xD800 <= ord(c) < 0xE000 for c in vocab
        )
        ids = [i for i in vocab.values() if type(i) is int]
        if not is_text or sorted(ids) != list(range(len(vocab))):
            raise ValueError("they do not number single characters from 0 on")
        return vocab
    except Exception as e:  # a damaged pickle raises whatever it likes
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise UserError(
            f"{path}: expected nanoGPT's stoi and itos, one id for each character ({reason}); "
            "remove it if the bins hold GPT-2 tokens"
        ) from None


def make_tokenizer(spec, texts):
    """A tokenizer made from `texts` if spec is 'char' or 'bpe:SIZE'; else load_tokenizer(spec)."""
    if spec == "char":
        characters = set()
        for text in texts:
            characters.update(text)
        return _char({c: i for i, c in enumerate(sorted(characters))})
    if re.fullmatch(r"bpe:\d+", spec):
        return train_bpe(texts, int(spec[4:]), spec)
    return load_tokenizer(spec)


def train_bpe(texts, size, name, min_frequency=2):
    """A byte-level BPE of `size` ids trained on `texts`. Ids 0, 1 and 2 are <|endoftext|> and
    ChatML's two.

    The time that training takes grows with the square of a word's length, and Chinese, DNA or
    base64 is one long word. So training sees words of LONGEST_WORD (64) characters and more in
    pieces of that length. It changes no other word, and not how a text is encoded afterwards."""
    if not 256 + 3 <= size <= MAX_VOCABULARY:
        raise UserError(
            f"a byte-level BPE has from {256 + 3} ids (the bytes and 3 special tokens) to "
            f"{MAX_VOCABULARY}, not {size}"
        )
    if min_frequency < 1:
        raise UserError(f"--min_frequency={min_frequency}: 1 or more is wanted")
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    # digits one by one, as SmolLM has them: numbers that share no token with their neighbours are
    # hard to calculate with
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # a word is a run of letters, of other characters or of spaces
    n = LONGEST_WORD
    piece = Regex(rf"\p{{L}}{{{n}}}|[^\s\p{{L}}\p{{N}}]{{{n}}}|\s{{{n}}}")
    cut = pre_tokenizers.Split(piece, "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([cut, digits, byte_level])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=[EOT, IM_START, IM_END],
        show_progress=sys.stderr.isatty(),  # elsewhere it prints empty lines
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    library.train_from_iterator(texts, trainer)
    library.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    return Tokenizer(json.loads(library.to_str()), name)


def with_chat_tokens(tokenizer):
    """`tokenizer` itself if it has all that the chat template needs, else a copy with the rest as
    the next ids: ChatML's tokens, an end-of-text token, and to a char tokenizer the characters of
    the roles' names."""
    model, eos, characters = tokenizer.spec["model"], tokenizer.eos or EOT, []
    if isinstance(tokenizer.engine, CharacterEngine):
        characters = sorted(set("\n".join(ROLES)) - model["vocab"].keys())
    tokens = [t for t in (eos, IM_START, IM_END) if tokenizer.encode_special(t) is None]
    if not characters and not tokens:
        return tokenizer
    ids = {new: tokenizer.vocab_size + i for i, new in enumerate([*characters, *tokens])}
    if characters:
        model = dict(model, vocab=model["vocab"] | {c: ids[c] for c in characters})
    added = tokenizer.spec["added_tokens"] + [_special(token, ids[token]) for token in tokens]
    spec = dict(tokenizer.spec, model=model, added_tokens=added)
    return Tokenizer(spec, tokenizer.name, dict(eos_token=eos, nanosmol_name=tokenizer.name))


# What the tokenizer.json of char, byte and gpt2 consists of


def _special(token, i):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return dict(id=i, content=token, **flags, special=True)


def _tokenizer_json(model, pre_tokenizer, decoder, added_tokens):
    absent = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    parts = dict(model=model, pre_tokenizer=pre_tokenizer, decoder=decoder)
    return dict(version="1.0", **absent, added_tokens=added_tokens, **parts)


def _char(vocab, end=EOT):
    """One id for each character of `vocab`, and one for the end-of-text token unless it is None."""
    added = []
    if end:
        added = [_special(end, len(vocab))]
        vocab = vocab | {end: len(vocab)}
    pattern = dict(Regex=r"[\s\S]")
    pre_tokenizer = dict(type="Split", pattern=pattern, behavior="Isolated", invert=False)
    model = dict(type="WordLevel", vocab=vocab, unk_token=EOT)  # the library needs an unk_token
    spec = _tokenizer_json(model, pre_tokenizer, dict(type="Fuse"), added)
    return Tokenizer(spec, "char", dict(eos_token=end, nanosmol_name="char"))


def _byte():
    vocab = {c: b for b, c in enumerate(_byte_characters())}
    return Tokenizer(_byte_level_bpe(vocab, [], 256, use_regex=False), "byte")


def _byte_level_bpe(vocab, merges, eot_id, use_regex):
    absent = dict.fromkeys(
        ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    flags = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    model = dict(type="BPE", **absent, **flags, vocab=vocab, merges=merges)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=use_regex)
    return _tokenizer_json(model, level, level, [_special(EOT, eot_id)])


@functools.cache
def _byte_characters():
    """The character that a byte-level tokenizer.json writes for each of the 256 bytes. As in GPT-2,
    printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def _gpt2():
    """tiktoken's GPT-2 as a tokenizer.json. The ranks are the ids; the merge behind a token is the
    last step of the BPE of its bytes. Kept in the cache, since the 50,000 merges take a second."""
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
        raise UserError(
            f"the GPT-2 tokenizer could not be fetched ({type(e).__name__}): connect to the "
            "network, or set TIKTOKEN_CACHE_DIR to a directory that holds it"
        ) from None
    text = {token: "".join(_byte_characters()[b] for b in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            single = [token[i : i + 1] for i in range(len(token))]
            last_two = _merge(single, lambda a, b, rank=rank: ranks.get(a + b, rank))
            merges.append([text[part] for part in last_two])
    vocab = {text[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(_byte_level_bpe(vocab, merges, 50256, use_regex=True), "gpt2")
    os.makedirs(cache_dir(), exist_ok=True)
    write_json(path, tokenizer.spec, indent=None)
    return tokenizer


def _merge(parts, rank):
    """Plain BPE until two parts are left: of all pairs the one with the lowest `rank(a, b)` merges,
    the leftmost if there are several."""
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: rank(parts[i], parts[i + 1]))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


# How a text is split into words before BPE, as tiktoken writes it: GPT-2's rule, and the same with
# every digit alone, where a space before a digit stays alone too. (tokenizers applies Digits first
# and GPT-2's rule to what is left.)
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
DIGIT_WORDS = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N}|$)|\s+(?!\S)|\s"
)

# the same for Llama 3's and Qwen2's tokenizers
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace("{1,3}", "")

# llama.cpp's name of a rule for words; whether a word that is a token stays whole, whatever merges
GGUF_WORDS = {
    (GPT2_WORDS, False): "gpt-2",
    (DIGIT_WORDS, False): "smollm",
    (LLAMA3_WORDS, True): "llama-bpe",
    (LLAMA3_WORDS, False): "dbrx",
    (QWEN2_WORDS, False): "qwen2",
}

SAMPLE = (
    "It's 3:45pm, isn't it?  We'll\t\tpay $1,234.50!\n\n  def f(x):\n      return x**2 \r\n"
    "\r\n   \n xnaïve café Über straße e\u0301 ﬁ Ⅷ½²٣४ 12 34  5 \u00a0\u2003\u3000全角１２３　"
    "日本語、テスト。한국어 русский "
    "العربية हिन्दी ไทย 👍🏽👨‍👩‍👧 \U0001d54f\x00\x07\x1c\x85\ufeff\u200b\u200d "
    "<|endoftext|><|im_end|> "
    "'s 'S I'LL 'll''re  's1's aaaaaaaaaaaaaaaaaaaaa ........ ---- \n\n\n\n\t \n7 \n 8"
)


def _tiktoken_encoding(spec, vocab_size, eos_id):
    """A tiktoken Encoding that gives the ids of this tokenizer.json; None if that is not certain.

    tiktoken merges two neighbours whenever their union is a token, lowest id first; a
    tokenizer.json lists the pairs that may merge, in order. Both agree if (1) the ids of the tokens
    rise in the order of their merges and (2) BPE of each token's own letters ends in that token:
    two neighbours inside a word have merged as they would alone, so if their union is a token, (2)
    says that they are the pair of its merge. Both are checked for the whole vocabulary here, the
    rule for words by the caller on SAMPLE. A byte that the vocabulary lacks (SmolLM2's has 235 of
    256) gets an id beyond it: on such an id the caller falls back to `tokenizers`, which leaves
    these bytes out."""
    import tiktoken
    from tokenizers import models

    model, words = spec["model"], _words_pattern(spec)
    if model["type"] != "BPE" or model.get("dropout") or spec.get("normalizer") or not words:
        return None
    if any(not token["special"] for token in spec["added_tokens"]):
        return None
    specials = {token["content"] for token in spec["added_tokens"]}
    byte = {c: b for b, c in enumerate(_byte_characters())}
    vocab = {token: i for token, i in model["vocab"].items() if token not in specials}
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    rank = {pair: i for i, pair in enumerate(pairs)}
    merges_of = {}
    for i, (a, b) in enumerate(pairs):
        merges_of.setdefault(a + b, []).append(i)
    for token, merges in merges_of.items():
        if len(merges) > 1:  # only the merge counts that BPE of the token's letters ends in
            last_two = _merge(list(token), lambda a, b: rank.get((a, b), len(pairs)))
            merges[:] = [rank.get(tuple(last_two), -1)]
    in_order = sorted(merges_of, key=merges_of.get)
    ids = [vocab.get(token, -1) for token in in_order]
    if ids != sorted(set(ids)) or ids[:1] == [-1]:
        return None
    if not vocab.keys() <= byte.keys() | merges_of.keys():
        return None
    alone = models.BPE(vocab=model["vocab"], merges=pairs)
    try:
        if any([t.id for t in alone.tokenize(token)] != [i] for token, i in vocab.items()):
            return None
        ranks = {bytes([b]): vocab_size + b for b in range(256)}
        ranks.update((bytes(byte[c] for c in token), i) for token, i in vocab.items())
        return tiktoken.Encoding(
            "nanosmol", pat_str=words, special_tokens={EOT: eos_id}, mergeable_ranks=ranks
        )
    except (KeyError, ValueError):  # a letter that is no byte; a regex that tiktoken refuses
        return None


def _words_pattern(spec):
    """The regular expression by which a byte-level tokenizer.json splits a text into words; None if
    it works in another way."""
    pre_tokenizer = spec.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    level = dict(use_regex=True) | steps[-1]
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space") or len(steps) > 2:
        return None
    if len(steps) == 1:
        return GPT2_WORDS if level["use_regex"] else None
    first = steps[0]
    if level["use_regex"]:
        return DIGIT_WORDS if first == dict(type="Digits", individual_digits=True) else None
    if first.get("type") != "Split" or first["behavior"] != "Isolated" or first["invert"]:
        return None
    return first["pattern"].get("Regex")


# -----------------------------------------------------------------------------
# Chat: ChatML, one conversation after the other, each ended by the end-of-text token.

# render_chat as transformers' apply_chat_template reads it from tokenizer_config.json, up to the
# last <|im_end|>: what followed would count as a part of the answer in TRL. TRL and transformers
# take what stands between the generation marks for the assistant's words; other programs do not
# know these marks.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] | trim }}<|im_end|>{% endif %}"
    "{% if add_generation_prompt or not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED_TEMPLATE = re.sub(r"{% (end)?generation %}", "", CHAT_TEMPLATE)


def render_chat(messages, tokenizer, add_generation_prompt=False, last_only=False):
    """A conversation, a list of {"role", "content"}, as (ids, mask): two lists of equal length.

    mask is 1 where the loss counts: on the assistant's words and its <|im_end|>, but for messages
    with a "weight" of 0; with `last_only` only on those of the last message. With
    `add_generation_prompt` the ids end with the opening of the assistant's answer instead of the
    end-of-text token."""
    start, end = tokenizer.encode_special(IM_START), tokenizer.encode_special(IM_END)
    if start is None or end is None:
        raise UserError(
            f"the tokenizer {tokenizer.name} has no {IM_START} and {IM_END}: with_chat_tokens() "
            "adds them"
        )
    line_break, ids, mask = tokenizer.encode("\n"), [], []
    for i, message in enumerate(messages):
        head = tokenizer.encode(message["role"] + "\n")
        body = tokenizer.encode(f"{message['role']}\n{message['content'].strip()}")
        # where the opening ends inside the body: that is what generation will start from
        if body[: len(head)] != head:
            head = tokenizer.encode(message["role"])
        is_trained = i == len(messages) - 1 if last_only else message.get("weight") != 0
        counts = int(message["role"] == "assistant" and is_trained)
        ids += [start, *body, end, *line_break]
        mask += [0] * (1 + len(head)) + [counts] * (len(body) - len(head) + 1)
        mask += [0] * len(line_break)
    last = [tokenizer.eos_id]
    if add_generation_prompt:
        last = [start, *tokenizer.encode("assistant\n")]
    return ids + last, mask + [0] * len(last)


# Records as people have them: the fields that are tried, in this order, and the names of roles
TEXT_FIELDS = ("text", "content")
CONVERSATION = ("messages", "conversations", "conversation")
PROMPT = ("prompt", "instruction", "question", "problem", "query", "input")
ABOUT_INSTRUCTION = ("question", "problem", "query", "input", "context")
ANSWER = ("answer", "completion", "response", "output", "chosen")
ROLES = {"user": "user", "human": "user", "system": "system", "developer": "system"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai"), "assistant")
# of {"human": ..., "assistant": ...} and {"input": ..., "output": ...} in a conversation
TURN_ROLES = ROLES | dict.fromkeys(PROMPT, "user") | dict.fromkeys(ANSWER, "assistant")
TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")
# why a record is left out although nothing is wrong with it
EMPTY, TOOLS, NOT_TEXT = "empty", "with tool calls", "with content that is no text"
LONG, BAD = "of more tokens than --block_size", "with an answer labelled false"
NO_WEIGHT = "without an answer to train on"
SKIPPED = EMPTY, TOOLS, NOT_TEXT, LONG, BAD, NO_WEIGHT
TOO_DEEP = "JSON of too many levels, or too long a number"


class Skipped(ValueError):
    """A record that is left out and counted, and does not count against max_unusable."""


def _is_filled(value):
    """Whether a field holds something: null, blanks and empty lists are nothing."""
    if isinstance(value, str):
        value = value.strip()
    return value not in (None, "", [], {})


def _filled(record, *fields):
    """(field, value) of the first of these fields that holds something, else (None, None)."""
    filled = ((field, record[field]) for field in fields if _is_filled(record.get(field)))
    return next(filled, (None, None))


def _required(record, *fields):
    """As _filled, but a record without such a field is unusable, and one that leaves it empty is
    skipped."""
    field, value = _filled(record, *fields)
    if field is None and any(field in record for field in fields):
        raise Skipped(EMPTY)
    if field is None:
        raise ValueError("no field " + " or ".join(repr(field) for field in fields))
    return field, value


def _unexpected(what, value, expected):
    """The reason why a value can't be used."""
    shown = json.dumps(value, ensure_ascii=False, default=str)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ValueError(f"{what} holds {shown}; expected {expected}")


def _messages(value, what="messages"):
    """[{"role", "content"}, ...] from the conversation, prompt or answer that the field `what`
    holds; else ValueError. A text is one message, or a dialogue as Anthropic's HH writes it."""
    if what in CONVERSATION and isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)  # a cell of a spreadsheet
    is_text = isinstance(value, str)
    if is_text and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value:
        _, *parts = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", value)
        value = [
            dict(role=role, content=text.strip()) for role, text in zip(parts[::2], parts[1::2])
        ]
        if what in PROMPT and value[-1] == dict(role="Assistant", content=""):
            value.pop()  # the opening of the answer
    elif is_text and what not in CONVERSATION:
        role = "assistant" if what in (*ANSWER, "rejected") else "user"
        value = [dict(role=role, content=value)]
    elif isinstance(value, dict) and what not in CONVERSATION:
        value = [value]  # a single message
    if not isinstance(value, list):
        expected = "a list of messages" if what in CONVERSATION else "a text or a list of messages"
        raise _unexpected(repr(what), value, expected)
    messages = []
    for message in filter(None, value):
        if isinstance(message, dict) and message.keys() <= TURN_ROLES.keys():
            turn = [dict(role=TURN_ROLES[key], content=text) for key, text in message.items()]
            messages += [_message(m, what) for m in turn if m["content"] is not None]
        else:
            messages.append(_message(message, what))
    # many data sets have a system message in every record and leave it empty
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    if not messages:
        raise Skipped(EMPTY)
    return messages


def _message(message, what):
    expected = '{"role": ..., "content": ...}'
    if not isinstance(message, dict):
        raise _unexpected(f"a message of {what!r}", message, expected)
    _, role = _filled(message, "role", "from")
    _, content = _filled(message, "content", "value")
    if role in TOOL_ROLES or _filled(message, "tool_calls", "function_call")[0]:
        raise Skipped(TOOLS)
    if isinstance(content, list):  # OpenAI's parts
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise Skipped(NOT_TEXT)
        content = "\n".join(texts)
    if content is None and ("content" in message or "value" in message):
        content = ""
    weight = {}
    if message.get("weight") == 0 or message.get("train") is False:  # OpenAI's, axolotl's
        weight = dict(weight=0)
    if not isinstance(role, str) or not isinstance(content, str):
        raise _unexpected(f"a message of {what!r}", message, expected)
    return dict(role=ROLES.get(role.lower(), role), content=content, **weight)


def _prompt(record):
    """The messages of a record's prompt. Alpaca's is an instruction and perhaps what it is about;
    `history` may hold earlier turns, as [[user, assistant], ...]."""
    field, prompt = _required(record, *PROMPT)
    if field == "instruction" and isinstance(prompt, str):
        for key in ABOUT_INSTRUCTION:
            value = record.get(key)
            if not _is_filled(value):
                continue
            if not isinstance(value, str):
                raise _unexpected(repr(key), value, "a text")
            prompt += f"\n\n{value}"
    return _history(record) + _messages(prompt, field)


def _history(record):
    """The earlier turns of a record, where its history is a list of them."""
    turns = record.get("history")
    if not isinstance(turns, list) or not turns:
        return []
    is_pair = [isinstance(turn, list) and len(turn) == 2 for turn in turns]
    if all(is_pair):
        turns = [dict(user=question, assistant=answer) for question, answer in turns]
    return _messages(turns, "history")


def _with_system(record, messages):
    system = _filled(record, "system", "system_prompt")[1]
    if isinstance(system, str) and messages[0]["role"] != "system":
        return [dict(role="system", content=system), *messages]
    return messages


def _with_answer(prompt, value, what):
    """The conversation that ends with an answer, which may repeat the end of the prompt, or be a
    whole conversation of which the prompt is a part."""
    answer = _messages(value, what)
    for n in range(min(len(prompt), len(answer)), 0, -1):
        if prompt[-n:] == answer[:n]:
            return prompt + answer[n:]
    if not prompt or prompt[-1] in answer or answer[0]["role"] != "assistant":
        return answer
    return prompt + answer


def _conversation(record, messages):
    """The messages with the record's system message, if they can be trained on."""
    roles = [message["role"] for message in messages]
    if not all(m["content"].strip() for m in messages if m["role"] == "assistant"):
        raise Skipped(EMPTY)  # an empty answer is no answer
    if "assistant" not in roles or "user" not in roles:
        raise ValueError(f"its roles are {', '.join(roles)}; expected a user and an assistant")
    return _with_system(record, messages)


def as_chat(record):
    """The messages of a record: its conversation, or its prompt and its (chosen) answer."""
    if record.get("label") is False:  # KTO's mark of a bad answer
        raise Skipped(BAD)
    field, value = _required(record, *CONVERSATION, *PROMPT, "chosen")
    if field in CONVERSATION:
        messages = _messages(value, field)
    else:
        prompt = _prompt(record) if field in PROMPT else []
        field, answer = _required(record, *ANSWER)
        messages = _with_answer(prompt, answer, field)
    weights = {m.get("weight") for m in messages if m["role"] == "assistant"}
    if weights == {0}:
        raise Skipped(NO_WEIGHT)
    return _conversation(record, messages)


def as_prefs(record):
    """{"prompt": messages, "chosen": text, "rejected": text}. Where chosen and rejected hold the
    whole conversation, what they begin with in common is the prompt."""
    field, prompt = _filled(record, *PROMPT, *CONVERSATION)
    if field is None:
        prompt = []
    elif field in PROMPT:
        prompt = _prompt(record)
    else:
        prompt = _messages(prompt, field)
    sides = []
    for side in ("chosen", "rejected"):
        messages = _with_answer(prompt, _required(record, side)[1], side)
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"{side!r} ends with {messages[-1]['role']}; expected the assistant")
        sides.append(_conversation(record, messages))
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected differ before their last message")
    answers = chosen[-1]["content"], rejected[-1]["content"]
    if answers[0].strip() == answers[1].strip():
        raise ValueError("chosen and rejected are the same")
    return dict(prompt=chosen[:-1], chosen=answers[0], rejected=answers[1])


def as_verify(record):
    """{"prompt": messages, "answer": text}, and the other fields, which a verifier may take."""
    prompt, (_, answer) = _with_system(record, _prompt(record)), _required(record, "answer")
    if isinstance(answer, (float, decimal.Decimal)) and math.isfinite(answer):
        answer = format(decimal.Decimal(str(answer)), "f")  # 0.00001 for 1e-05
    if not isinstance(answer, (str, int)):
        raise _unexpected("'answer'", answer, "a text or a number")
    used = ("prompt", "answer", _filled(record, *PROMPT)[0])
    others = {key: value for key, value in record.items() if key not in used}
    # null is absent, and so is a cell that can't be read, see _rows
    others = {k: v for k, v in others.items() if not isinstance(v, (types.NoneType, Exception))}
    return dict(prompt=prompt, answer=str(answer), **others)


# -----------------------------------------------------------------------------
# Verifiers: verify(prompt, completion, answer) -> float, 1.0 for a right completion

# 7, -1,234.50, .5, 1e-05, 3/4, 1 1/2. Three digits of an exponent at most: 10 ** 999999999 fills
# the memory. A minus after a digit, a letter or a bracket is no sign: 3-5
NUMBER = (
    r"(?P<sign>(?<![\w)}])[-+])?"
    r"(?:(?:(?P<whole>\d+) )?(?P<over>\d+) ?/ ?(?P<under>\d+)(?![\d/]|\.\d)"
    r"|(?P<decimal>(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE][+-]?\d{1,3}(?!\w))?))"
)
# what may stand around the one number of a reference answer: "The answer is" or "x =" before it, a
# unit behind it (5cm, 60 km/h, 12 apples), but no word or letter that makes it another number
LEAD_IN = (
    r"(?:(?i:(?:so|thus|the|final|correct|answer|result|total|value|it|that|this|is|equals)[:,]?)\s+"
    r"|[A-Za-z] ?= ?|= ?)*"
)
WORD = (
    r"(?!(?i:hundred|thousand|million|billion|trillion|dozen|percentile|squared|cubed|factorial|pi|"
    r"half|halves|thirds?|quarters?|times|plus|minus|or|and|to|of|less|more|than|below|above)s?\b)"
    r"(?:[^\W\d_]{2,}|[mgshLlKVAWJNCF]\b)\.?"
)
GLUED = (
    r"(?:mm|cm|dm|km|m|mg|g|kg|lbs?|oz|ft|in|yd|mi|mph|kph|ml|mL|L|ms|s|min|hr?s?|h|Hz|kHz|MHz|GHz|"
    r"KB|MB|GB|TB|kW|kWh|W|V|kPa|Pa|J|kJ|N)(?![^\W\d_])"
)
GOLD = re.compile(rf"{LEAD_IN}{NUMBER}(?: ?%| ?°[CF]?|(?:{GLUED}| {WORD})(?:(?: |/|-){WORD})*)?\.?")
# eight numbers with nothing between them: a model that tries them all gets no reward
LISTING = re.compile(r"(?<![\d.])(?:-?\d[\d.]*[\s,;]+){7,}-?\d")


def verifier(spec):
    """The function verify(prompt, completion, answer) -> float that `spec` names.

    'number': the number that the completion ends in (final_number) equals the answer, which is one
    number (gold_number); 1/2 is 0.5, 50% is 50. 'exact': the texts are equal. 'regex:PATTERN': its
    first group, or all that it matches, is the answer. 'toy': toy_verify. FILE.py: the function
    verify that it defines; if that takes **record, it also gets the other fields of the record.
    UserError if there is no such verifier, or if its verify does not take three arguments."""
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
    raise UserError(
        f"--verifier={spec}: there is no such verifier; number, exact, regex:PATTERN, toy or a "
        ".py file"
    )


def readable_gold(spec, answer):
    """Whether the verifier `spec` can reward a completion if `answer` is the reference answer. To
    'number', an answer that is not one number can't be compared. True for regex: and .py, whose
    requirements are not known here."""
    if spec == "number":
        return gold_number(answer) is not None
    if spec == "toy":
        return answer.isdigit() or toy_verify("", answer, answer) == 1.0
    return bool(answer.strip())


def _same_number(prompt, completion, answer):
    number, right = final_number(completion), gold_number(answer)
    return float(number is not None and number == right)


def _same_text(prompt, completion, answer):
    return float(completion.strip() == answer.strip())


def gold_number(answer):
    """The number that a reference answer is, as a Fraction; None if it is not one number. It may
    have a currency, a percent sign, a unit; with a #### or a \boxed{} only what is there counts."""
    before, mark, after = answer.partition("####")
    boxed = _last_boxed(answer)
    if boxed is not None:
        after = boxed
    elif not mark:
        after = before
    return _value(GOLD.fullmatch(_plain_numbers(after)))


def final_number(text):
    """The number that a completion ends in, as a Fraction, or None: what stands in its last
    \boxed{}, else the first number after its only ####, else its last one."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return gold_number(boxed)
    _, mark, after = text.partition("####")
    if "####" in after or LISTING.search(text):
        return None
    plain = _plain_numbers(after if mark else text)
    numbers = list(re.finditer(NUMBER, plain))
    if not numbers:
        return None
    number = numbers[0] if mark else numbers[-1]
    before, behind = plain[: number.start()], plain[number.end() :]
    if before.endswith(("^", "^{")) or behind.startswith("^"):  # 2^10 is neither 2 nor 10
        return None
    return _value(number)


def _last_boxed(text):
    """What stands between the braces of the last \boxed{} of a text; None without one."""
    _, found, rest = text.rpartition("\\boxed{")
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:i]
    return rest if found else None


def _plain_numbers(text):
    """`text` with its numbers as NUMBER reads them: no LaTeX, no currency, 1,234 for 1 234."""
    for pattern, plain in (
        (r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1"),
        (r"\\left|\\right|\\[()\[\]!]|`", ""),
        (r"(?<!\d)\*\*([^*]+)\*\*", r"\1"),  # bold
        (r"\*\*", "^"),
        ("\u2212", "-"),  # the minus sign
        (r"(?<=\d)(?:\{,\}|\\,|[\u00a0\u2009\u202f])(?=\d{3})", ","),
        (r"\\[ ,]|~|\s+", " "),
        (r"\\([%$])", r"\1"),
        (r"\^ ?\{? ?\\circ ?\}?|\\degree", "°"),
        (r"^ *\$(.*)\$ *$", r"\1"),  # mathematics in $ $
        (r"(?:(?:US)?[$€£¥₹] ?|\b(?:USD|EUR|GBP) )(?=[-+.\d])|(?<=\d) ?[$€£¥₹]", ""),
        (r"(?<=\d) ?\\[dtc]?frac", r" \\frac"),  # 1\frac{1}{2} is 1 1/2
        (r"\\[dtc]?frac ?\{ ?(-?\d+) ?\} ?\{ ?(\d+) ?\}", r"\1/\2"),
        (r"\\[dtc]?frac ?(\d) ?(\d)", r"\1/\2"),
        (r"(?<=\d) ?(?:\\times|\\cdot|×|·|\*) ?10 ?\^ ?\{?([-+]?\d{1,3})\b\}?", r"e\1"),
        (r"(?<=[^\W\d_])(?:\^\{?[23]\}?|[²³])", ""),  # cm^2
    ):
        text = re.sub(pattern, plain, text)
    return text.strip()


def _value(number):
    """The Fraction that a match of NUMBER is; None for no match, and for a denominator of 0."""
    from fractions import Fraction

    if not number or len(number[0]) > 1000 or not int(number["under"] or 1):
        return None
    if number["decimal"]:
        value = Fraction(number["decimal"].replace(",", ""))
    else:
        value = int(number["whole"] or 0) + Fraction(int(number["over"]), int(number["under"]))
    return -value if number["sign"] == "-" else value


def _regex_verifier(spec):
    try:
        pattern = re.compile(spec.removeprefix("regex:"), re.DOTALL)
    except (re.error, OverflowError, RecursionError) as e:
        raise UserError(f"--verifier={spec}: not a regular expression: {e}") from None
    if not pattern.pattern:
        raise UserError("--verifier=regex: wants a pattern, such as 'regex:answer is (.*)'")

    def verify(prompt, completion, answer):
        matches = list(pattern.finditer(completion))
        if not matches:
            return 0.0
        result = matches[-1][1 if pattern.groups else 0] or ""
        return float(result.strip() == answer.strip())

    return verify


def _file_verifier(path):
    """The verify of a Python file, which may import modules from its own directory."""

    def refuse(problem):
        usage = "it must define verify(prompt, completion, answer) -> float"
        raise UserError(f"--verifier={path}: {problem}; {usage}") from None

    if not os.path.isfile(path):
        refuse("not a file" if os.path.exists(path) else "no such file")
    module = types.ModuleType("user_verifier")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses and pickle look it up there
    directory = os.path.dirname(os.path.abspath(path))
    is_new = directory not in sys.path
    if is_new:
        sys.path.insert(0, directory)  # as Python does for a script
    try:
        with open(path, "rb") as f:  # bytes: compile() handles a byte-order mark and encoding line
            exec(compile(f.read(), path, "exec"), module.__dict__)
    except (Exception, SystemExit) as e:
        refuse(f"{type(e).__name__}: {e}".splitlines()[0])
    finally:
        if is_new:  # from here on last, so that nothing there replaces a module of this program
            sys.path.remove(directory)
            sys.path.append(directory)
    function = getattr(module, "verify", None)
    if not callable(function):
        refuse("there is no function verify in it")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        refuse("verify is a coroutine or a generator")
    signature = _signature(function)
    try:
        signature.bind("prompt", "completion", "answer")
    except TypeError:
        refuse(f"verify{signature} does not take three arguments")
    return function


def _signature(function):
    try:
        return inspect.signature(function)
    except ValueError:  # written in C; three arguments are given to it
        return inspect.signature(_same_text)


# -----------------------------------------------------------------------------
# Files, secrets, downloads


def cache_dir():
    """Where downloads are kept: NANOSMOL_CACHE, or ~/.cache/nanosmol."""
    default = os.path.join(os.path.expanduser("~"), ".cache", "nanosmol")
    return os.environ.get("NANOSMOL_CACHE") or default


def write_json(path, value, indent=2, sync=True):
    """Writes a JSON file so that it is complete or not there; `sync`: even if power fails."""
    # "replace": a file name in it that is not UTF-8 must not end a preparation
    with open(f"{path}.tmp", "w", encoding="utf-8", errors="replace") as f:
        json.dump(value, f, ensure_ascii=False, indent=indent)
        f.flush()
        if sync:
            os.fsync(f.fileno())
    os.replace(f.name, path)


def read_json(path):
    """The JSON object in a file; UserError if there is none."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value
    except (OSError, ValueError, RecursionError) as e:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path}: {getattr(e, 'strerror', None) or e}") from None


SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "RUNPOD_API_KEY")
_hidden = {}  # secret -> what is shown in its place


def read_secrets(path=".env"):
    """Puts the SECRETS of a .env file (`HF_TOKEN=...` a line) into the environment, unless they are
    set there already."""
    raw = b""
    if os.path.isfile(path):
        with open(path, "rb") as f:
            raw = f.read()
    utf_16 = raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # PowerShell's echo writes it
    secrets = {}
    for line in raw.decode("utf-16" if utf_16 else "utf-8-sig", "replace").splitlines():
        assignment = r"""\s*(?:export\s+)?(\w+)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s#]*))"""
        match = re.match(assignment, line)
        if match and match[1] in SECRETS:
            secrets[match[1]] = next(value for value in match.groups()[1:] if value is not None)
    secrets |= {key: os.environ[key] for key in SECRETS if key in os.environ}
    for key, secret in secrets.items():
        secret = secret.strip()  # a line end that was pasted along
        if not re.fullmatch(r"[!#-&(-~]*", secret):
            raise UserError(
                f"{key}: it holds a quote, a space or another character that no token has; copy it "
                f"again, into the environment or {path}"
            )
        os.environ[key] = secret


def for_terminal(text):
    """`text` without control characters if standard output is a terminal, which would obey them;
    CRLF, which may come in two pieces, is a line end."""
    if not sys.stdout.isatty():
        return text
    text = text.replace("\r", "")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def without_secrets(text):
    """`text` as it may be shown: errors of other libraries can quote secrets."""
    for key in SECRETS:
        hide(key, os.environ.get(key))
    for secret, key in _hidden.items():
        text = text.replace(secret, f"[{key}]")
    return text


def hide(key, secret):
    """From now on without_secrets hides this secret too."""
    if secret and len(secret) > 7:
        _hidden[secret] = key


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def checksum(path):
    """The CRC-32 of a file, in which every flipped bit shows. It reads 1 to 4 GB a second, twice to
    four times what cryptographic hashes do."""
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def weights_hash(directory):
    """The SHA-256 of a model's weights, in however many files."""
    files = [f for f in sorted(os.listdir(directory)) if f.endswith(".safetensors")]
    return " ".join(sha256(os.path.join(directory, f)) for f in files)


def progress(**options):
    from tqdm import tqdm

    # disable=None: shown on a terminal only
    return tqdm(disable=None, unit_scale=True, dynamic_ncols=True, **options)


LOCAL_TOO = "a local file works too: fetch it by other means, and give prepare.py its path"


def download(url, digest, tries=3):
    """The local path of a small file from `url`, checked against its SHA-256."""
    import requests

    path = os.path.join(cache_dir(), digest[:16] + "-" + url.rsplit("/", 1)[1])
    if os.path.exists(path):
        return path
    mirror = os.environ.get("NANOSMOL_MIRROR")  # another server with the same path
    if mirror:
        url = re.sub(r"^https?://[^/]+", mirror.rstrip("/"), url)
    for attempt in range(tries):
        time.sleep(attempt)
        try:
            response = requests.get(url, timeout=30)
            response.raise_for_status()
        except requests.RequestException as e:
            problem = f"{type(e).__name__}: {e}"
            continue
        if hashlib.sha256(response.content).hexdigest() == digest:
            os.makedirs(cache_dir(), exist_ok=True)
            with open(f"{path}.tmp{os.getpid()}", "wb") as f:
                f.write(response.content)
            os.replace(f.name, path)
            return path
        problem = "its content is not what it was when this was written (SHA-256 differs)"
    raise UserError(f"{url}: could not be fetched in {tries} tries: {problem}; {LOCAL_TOO}")


# -----------------------------------------------------------------------------
# The Hugging Face Hub


def _hub(call, repo, **options):
    """Calls a function of huggingface_hub, again if the network fails; else UserError."""
    from huggingface_hub import errors

    site = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    page = f"{site}/datasets/{repo}" if options.get("repo_type") == "dataset" else f"{site}/{repo}"
    refusals = {
        errors.GatedRepoError: f"its owner asks for consent: accept the terms on {page}, make a "
        f"token on {site}/settings/tokens, then run `hf auth login` or set HF_TOKEN",
        errors.RepositoryNotFoundError: "the Hub has no such repository, or it is private: check "
        "the name; for a private one run `hf auth login` or set HF_TOKEN to a token that may read "
        "it",
        errors.HFValidationError: "not a Hub id, which is written owner/name",
    }
    for attempt in range(5):
        wait = 2**attempt
        try:
            return call(repo, **options)
        except tuple(refusals) as e:
            raise UserError(f"{repo}: {refusals[type(e)]}") from None
        except errors.HfHubHTTPError as e:
            status = e.response.status_code if e.response is not None else 0
            problem = f"the Hub answered {status}"
            if status == 404:
                missing = options.get("filename") or options.get("path_in_repo")
                raise UserError(
                    f"{repo}: nothing of the name {missing} in this repository; --config= names a "
                    "folder of it"
                ) from None
            if status in (400, 401, 403):
                raise UserError(
                    f"{repo}: {problem}: check HF_TOKEN, or run `hf auth login`"
                ) from None
            after = e.response.headers.get("Retry-After", "") if e.response is not None else ""
            wait = int(after) if after.isdigit() else wait
        except Exception as e:  # no network; the exception depends on the version of the client
            of_client = type(e).__module__.startswith(("httpx", "requests"))
            if not isinstance(e, OSError) and not of_client:
                raise
            problem = str(e.__cause__ or e).splitlines()[0]
        if attempt < 4:
            time.sleep(min(wait, 60))
    local = f"; {LOCAL_TOO}" if options.get("repo_type") == "dataset" else ""
    raise UserError(
        f"{repo}: could not be fetched from {site}: {problem}; run the same command to continue"
        + local
    )


def hub_snapshot(repo, patterns, repo_type="model"):
    """A local directory with the files of a Hub repository that match the patterns."""
    from huggingface_hub import snapshot_download

    return _hub(snapshot_download, repo, repo_type=repo_type, allow_patterns=patterns)


def fetch_model(hub_id):
    """A local directory with a Hub model's config, safetensors and tokenizer."""
    weights = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]
    tokenizer = ["tokenizer*", "special_tokens_map.json", "chat_template*", "vocab.json"]
    directory = hub_snapshot(hub_id, [*weights, *tokenizer, "merges.txt"])
    found = os.listdir(directory) if os.path.isdir(directory) else []
    if not any(f.endswith(".safetensors") for f in found):
        raise UserError(f"{hub_id}: this Hub repository has no *.safetensors; name one that has")
    return directory


# A file of a source. `repo`, `digest` (SHA-256) and `revision` are None for a local file. `split`
# is 'train' or 'val' if the source has its own validation split, else None.
File = collections.namedtuple("File", "path size split repo digest revision", defaults=[None] * 4)


def local_path(file):
    """Where a File is on this machine: fetched if need be, and checked if its SHA-256 is known."""
    if file.repo is None:
        return file.path
    from huggingface_hub import hf_hub_download

    for attempt in range(2):
        path = _hub(
            hf_hub_download,
            file.repo,
            filename=file.path,
            repo_type="dataset",
            revision=file.revision,
            force_download=attempt > 0,
        )
        if os.path.getsize(path) == file.size and file.digest in (None, sha256(path)):
            return path
    raise UserError(
        f"{file.repo}: {file.path} arrives damaged (size or SHA-256 differs); try again later"
    )


def hub_list(repo, folder=""):
    """Every File of a data set on the Hub, or of one folder of it, all of one commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    revision = _hub(api.repo_info, repo, repo_type="dataset").sha

    def list_files(repo, **options):
        return list(api.list_repo_tree(repo, recursive=True, **options))

    where = dict(path_in_repo=folder or None, repo_type="dataset", revision=revision)
    entries = sorted(_hub(list_files, repo, **where), key=lambda entry: entry.path)
    return [
        File(f.path, f.size, None, repo, f.lfs.sha256 if f.lfs else None, revision)
        for f in entries
        if isinstance(f, RepoFile)
    ]


def hub_files(repo, config="", split="", pattern=""):
    """The data files of a data set on the Hub: under the folder `config`, matching `pattern`, of
    one `split`."""
    listed = hub_list(repo, config)
    seen = [f for f in listed if not re.search(r"(^|/)\.", f.path)]  # the others are hidden
    files = [f for f in seen if fnmatch.fnmatch(f.path, pattern or "*")]
    if split:
        part = rf"(^|[-_./]){re.escape(split)}([-_./]|$)"
        files = [f for f in files if re.search(part, f.path)]
    files = _of_one_kind(files, f"hub:{repo}")
    if not files:
        folders = ", ".join(sorted({os.path.dirname(f.path) for f in listed} - {""}))[:300]
        raise UserError(
            f"hub:{repo}: no data files for --config={config} --split={split}; --config= names a "
            f"folder: {folders or 'none'}"
        )
    return files if split else _with_splits(files)


# -----------------------------------------------------------------------------
# Sources: a source is a list of Files, a File a sequence of Blocks

KINDS = dict.fromkeys((".txt", ".md", ".text"), "text")  # of files, by the ending of the name
KINDS |= dict.fromkeys((".jsonl", ".ndjson", ".json"), "lines")
KINDS |= {".parquet": "parquet", ".csv": "table", ".tsv": "table"}
NO_TEXT = {  # begin of a file -> what it is
    b"PK\x03\x04": "a zip archive or an Office document",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "compressed by gzip, though its name does not end in .gz",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"PAR1": "a parquet file, though its name does not end in .parquet",
}
MARKS = {  # begin of a text -> its encoding; that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
BINARY = "binary data, or an encoding that is not recognized"
COMPRESSED = {".zst": "zstd", ".zstd": "zstd", ".gz": "gzip"}
VALID = ("valid", "validation", "val", "dev", "eval")
OWN_SPLIT = re.compile(r"(?:^|[-_./])(train|valid|validation|val|dev|eval|test)(?=[-_.0-9/]|$)")

# what lies beside the data of a repository, and what the Hub's libraries write beside it
ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|contributing)\b.*|"
    r"dataset_infos?\.json|dataset_dict\.json|state\.json",
    re.IGNORECASE,
)

# kind: 'documents' (text with <|endoftext|> between documents), 'train' or 'val' (a piece of a
# single document), 'lines' (JSON), 'records' (of a JSON array) or 'rows' (parquet). data: bytes, or
# a pyarrow batch. at: the byte, line, record or row at which it begins. first, last: of the pieces
# of a document. read: how many bytes of the file have been read, for the progress bar.
Block = collections.namedtuple("Block", "kind data at first last read")


def _ending(path):
    """The ending of a file's name, before that of a compression, and the compression or None."""
    stem, ending = os.path.splitext(path.lower())
    if ending in COMPRESSED:
        return os.path.splitext(stem)[1], COMPRESSED[ending]
    return ending, None


def _kind_of(path):
    """(kind, compression) of a file by its name; the kind is None if it is no data."""
    ending, compression = _ending(path)
    return KINDS.get(ending), compression


def _of_one_kind(files, folder):
    """The data among the files of a folder: those of the ending that has the most bytes. The others
    are named."""

    def ending_of(file):
        return "" if ABOUT.fullmatch(os.path.basename(file.path)) else _ending(file.path)[0]

    sizes = collections.Counter()
    for f in files:
        if ending_of(f) in KINDS:
            sizes[ending_of(f)] += f.size
    ending = max(sizes, key=sizes.get, default=None)
    data = [f for f in files if ending_of(f) == ending]
    others = [f.path for f in files if ending_of(f) != ending]
    if data and others:
        print(f"{folder}: reads its {ending} files; left out: {_first_few(others)}")
    places = {os.path.dirname(f.path) for f in data}
    places = sorted(p for p in places if not OWN_SPLIT.fullmatch(os.path.basename(p)))
    if len(places) > 1:
        print(f"{folder}: one data set of its folders {_first_few([p or '.' for p in places])}")
    return data


def _first_few(paths):
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return ", ".join(paths[:5]) + more


def _with_splits(files):
    """The files with their split, if their names tell training from validation. Test files are the
    validation split if there is no other, and left out if there is."""
    marks = [(OWN_SPLIT.findall(f.path.lower()) or [None])[-1] for f in files]
    held_out = next((m for m in (VALID, ("test",)) if set(m) & set(marks)), None)
    if "train" not in marks or not held_out:
        return files
    with_split, others = [], []
    for f, mark in zip(files, marks, strict=True):
        if mark == "test" and mark not in held_out:
            others.append(f.path)
        else:
            with_split.append(f._replace(split="val" if mark in held_out else "train"))
    validation = _first_few([f.path for f in with_split if f.split == "val"])
    left_out = f"; left out: {_first_few(others)}" if others else ""
    print(f"validation data, without a use for val_fraction: {validation}{left_out}")
    # validation first, so that --max_tokens can stop within the training data
    return sorted(with_split, key=lambda f: f.split == "train")


def local_files(path):
    """The files of a local source: one file of any name, or those of a folder that hold data."""
    if os.path.isfile(path):
        return [File(path, os.path.getsize(path))]
    if not os.path.isdir(path):
        raise UserError(f"{path}: neither a file nor a folder")
    paths = []
    for folder, folders, names in os.walk(path):
        folders[:] = [f for f in folders if f[0] != "."]
        paths += [os.path.join(folder, f) for f in names if f[0] != "."]
    dangling = [f for f in paths if not os.path.exists(f)]
    if dangling:
        raise UserError(f"{dangling[0]}: a link to a file that is not there; remove the link")
    # a split is recognized by the path within the folder, not by the folder's own path
    files = [File(os.path.relpath(f, path), os.path.getsize(f)) for f in sorted(paths)]
    files = _with_splits(_of_one_kind(files, path))
    if not files:
        raise UserError(f"{path}: this folder holds no {', '.join(KINDS)} file")
    return [f._replace(path=os.path.join(path, f.path)) for f in files]


def read_blocks(file, only, fields=(), val_share=0.1):
    """The Blocks of a File, in order, the same every time. `only`: the file is the whole source, so
    a text without <|endoftext|> is a single document, of whose end `val_share` is for validation.
    `fields`: the columns to read of a parquet file, as far as it has them; (): all."""
    path, (kind, compression) = local_path(file), _kind_of(file.path)
    try:
        with open(path, "rb") as raw:
            head = _stream(raw, compression).read(1 << 16)
        if head.startswith(b"version https://git-lfs.github.com/"):
            raise UserError(f"{file.path}: a pointer of Git LFS; `git lfs pull` fetches the file")
        for mark, what in NO_TEXT.items():
            if head.startswith(mark) and kind != "parquet":
                raise UserError(f"{file.path}: {what}, no text; unpack it, or export its text")
        if kind == "parquet":
            yield from _read_parquet(path, file, fields)
            return
        _check_utf8(file.path, head)
        if kind == "table":
            yield from _read_table(path, file, fields, head)
            return
        for block in _read_text(path, file, only, head, val_share):
            _check_utf8(file.path, block.data)
            yield block
    except (OSError, EOFError) as e:
        raise UserError(f"{file.path}: cannot be read to its end: {e}; is it cut short?") from None


def _stream(raw, compression):
    if not compression:
        return raw
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), compression)


def _read_text(path, file, only, head, val_share):
    """The Blocks of a text or JSON file, which begins with the bytes `head`; see read_blocks."""
    kind, compression = _kind_of(file.path)
    if only and kind != "lines" and not compression:
        length = _single_document(path)
        if length is not None:
            yield from _read_single(path, length, val_share)
            return
    with open(path, "rb") as raw:
        stream = source = _stream(raw, compression)
        if kind == "lines" and head.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
            kind, stream = "records", _array_as_lines(source, file.path)
        yield from _read_separated(stream, raw.tell, kind)


def _check_utf8(path, data):
    """UserError if a text is in another encoding than UTF-8. Some broken characters in a text that
    is UTF-8 otherwise are no reason, nor are some zero bytes."""
    encoding = _encoding_of(data)
    if encoding == BINARY:
        raise UserError(f"{path}: not UTF-8 but {BINARY}; expected a text: save it as UTF-8")
    if encoding:
        stem, ending = os.path.splitext(path)
        first = "decompress and " if _ending(path)[1] else ""
        line = f"iconv -f {encoding.split()[0]} -t utf-8 {shlex.quote(path)}"
        raise UserError(
            f"{path}: not UTF-8 but {encoding}; {first}convert it: "
            f"{line} > {shlex.quote(f'{stem}-utf8{ending}')}"
        )


def _encoding_of(data):
    """The likely encoding of a text, as iconv names it, if it is not UTF-8; BINARY if it is no text
    in any encoding that is recognized."""
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return encoding
    is_utf8, head = True, data[: 1 << 16]
    try:
        data.decode()
    except UnicodeDecodeError:
        is_utf8 = False
    encoding = _wide_encoding_of(head, is_utf8)
    if encoding:
        text = head.decode(encoding, "replace")
        return encoding if _share_of_controls(text) < 0.02 else BINARY
    if is_utf8:
        return None
    text, ascii_text = data.decode("utf-8", "replace"), data.decode("ascii", "ignore")
    broken = text.count("\ufffd") - data.count("\ufffd".encode())
    of_several_bytes = len(text) - len(ascii_text) - broken
    if broken <= max(of_several_bytes, len(data) / 10_000):
        return None
    if _share_of_controls(head.decode("latin-1")) > 0.01:
        return BINARY
    # in a Latin script letters with accents are few, and stand alone; in others they form words
    in_words = sum(map(len, re.findall(rb"[\x80-\xff]{3,}", data)))
    if len(ascii_text) < 0.7 * len(data) or in_words > 0.5 * (len(data) - len(ascii_text)):
        return "ENCODING (it is not recognized)"
    return "cp1252 or latin-1, most likely"


def _wide_encoding_of(head, is_utf8):
    """UTF-16 or UTF-32 without a mark: most zero bytes stand at the same place of 2 or 4 bytes."""
    zeros = [head[i::4].count(0) for i in range(4)]
    most = 0.9 * (len(head) // 4)
    if 0 < most < min(zeros[2:]) and zeros[0] < most:
        return "utf-32le"
    if 0 < most < min(zeros[:2]) and zeros[3] < most:
        return "utf-32be"
    even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
    is_likely = even + odd > 0.1 * len(head)
    if even + odd > 0.01 * len(
        head
    ):  # Chinese or Russian, where only spaces and line ends have one
        is_likely |= not is_utf8 or _share_of_controls(head.decode("latin-1")) > 0.1
    if is_likely and max(even, odd) > 3 * min(even, odd):
        return "utf-16le" if odd > even else "utf-16be"
    return None


def _share_of_controls(text):
    """The share of characters that no text has: control characters, and what can't be decoded."""
    return len(re.findall(r"[\0-\x08\x0b\x0e-\x1a\x1c-\x1f\ufffd]", text)) / max(len(text), 1)


def _array_as_lines(stream, path):
    """A JSON array as a stream of lines, one for each of its records."""
    content = stream.read(LONGEST_ARRAY + 1)
    if len(content) > LONGEST_ARRAY:
        raise UserError(
            f"{path}: a JSON array of more than {LONGEST_ARRAY >> 20} MB; make lines of it, which "
            f"are read in pieces: jq -c '.[]' '{path}' > '{os.path.splitext(path)[0]}.jsonl'"
        )
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: begins like a JSON array and cannot be read: {e}") from None
    return io.BytesIO(b"".join(json.dumps(record).encode() + b"\n" for record in records))


def _read_separated(stream, tell, kind):
    """Blocks of whole lines or documents: each ends with the last separator in the next BLOCK
    bytes, and in a document longer than LONGEST wherever it can be split."""
    separator, block_kind = b"\n", kind
    if kind not in ("lines", "records"):
        separator = EOT.encode()
        block_kind = "documents"
    rest, at, at_start = b"", 0, True
    while True:
        data = stream.read(BLOCK)
        buffer = rest + (data.removeprefix(BYTE_ORDER_MARK) if at_start else data)
        at_start = False
        end = len(buffer)
        if data:
            found = buffer.rfind(separator)
            if found < 0 and len(buffer) < LONGEST:
                rest = buffer
                continue
            end = found + len(separator) if found >= 0 else _cut_place(buffer)
        if end:
            yield Block(block_kind, buffer[:end], at, True, True, tell())
            at += end if block_kind == "documents" else buffer.count(b"\n", 0, end)
        if not data:
            return
        rest = buffer[end:]


def _single_document(path):
    """How many bytes of a text are one document: all of them if it has no <|endoftext|>, those
    before it if there is only one, at the end; else None."""
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


def _read_single(path, length, val_share):
    """A single document: its last characters as 'val', the others as 'train'; with a tenth, the
    usual share, that is nanoGPT's split. Validation first, see _with_splits."""
    with open(path, "rb") as f:
        begin = len(BYTE_ORDER_MARK) if f.read(3) == BYTE_ORDER_MARK else 0
        middle = _place_of_character(f, begin, length, 1 - val_share)
        done = 0
        for kind, at, end in (("val", middle, length), ("train", begin, middle)):
            f.seek(at)
            rest, first = b"", True
            while at < end:
                buffer = rest + f.read(min(BLOCK, end - at - len(rest)))
                last = at + len(buffer) >= end
                cut = len(buffer) if last else _cut_place(buffer)
                done += cut
                yield Block(kind, buffer[:cut], at, first, last and kind == "val", done)
                at, rest, first = at + cut, buffer[cut:], False


def _place_of_character(f, begin, end, share):
    """The byte between `begin` and `end` before which `share` of the characters there lie."""

    def begins_character(at):
        f.seek(max(at - 1, 0))
        before = f.read(1) if at else b""
        data = np.frombuffer(before + f.read(min(BLOCK, end - at)), np.uint8)
        begins = (data & 0xC0) != 0x80  # False for the later bytes of a character
        begins[1:] &= (data[1:] != 10) | (data[:-1] != 13)  # CRLF is one character
        return begins[len(before) :]

    counts = [(at, np.count_nonzero(begins_character(at))) for at in range(begin, end, BLOCK)]
    left = int(share * sum(count for _, count in counts))
    for at, count in counts:
        if left < count:
            return at + int(np.flatnonzero(begins_character(at))[left])
        left -= count
    return end


# Between these two characters every pre-tokenizer begins a new word, whatever comes before or after
BETWEEN_WORDS = re.compile(r"(?<=\S)\r?\n(?=\w)|(?<=\w)(?= \w)")


def _cut_place(data):
    """Where, near the end of these bytes, a long text can be split without changing its tokens."""
    tail = data[-(1 << 16) :].decode("utf-8", "surrogateescape")
    places = [m.end() for m in BETWEEN_WORDS.finditer(tail, 8, len(tail) - 8)]
    if places:
        return len(data) - len(tail[places[-1] :].encode("utf-8", "surrogateescape"))
    cut = len(data)  # 64 kB without a space: at least between two characters
    while cut > len(data) - 4 and (data[cut - 1] & 0xC0 == 0x80 or data[cut - 1] == 13):
        cut -= 1
    return cut - 1 if cut > 1 and data[cut - 1] >= 0xC0 else cut


def _read_parquet(path, file, fields):
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as f:
            wanted = _columns(file.path, f.schema_arrow.names, fields)
            rows, total = 0, max(f.metadata.num_rows, 1)
            for group in range(f.metadata.num_row_groups):
                for batch in f.iter_batches(256, row_groups=[group], columns=wanted):
                    done = file.size * (rows + len(batch)) // total
                    yield Block("rows", batch, rows, True, True, done)
                    rows += len(batch)
    except (pyarrow.ArrowException, OSError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"{file.path}: not a parquet file that can be read: {reason}") from None


def _columns(path, names, fields):
    """Which columns to read: those of `fields` that are there, or without `fields` all."""
    wanted = [field for field in fields if field in names] or list(names)
    if fields and not set(fields) & set(names):
        raise UserError(
            f"{path}: no column {' or '.join(map(repr, fields))} in {', '.join(names)[:200]}; name "
            "it with --field="
        )
    return wanted


def _read_table(path, file, fields, head):
    """A spreadsheet as CSV or TSV, whose first line names the columns. Every cell is a text."""
    import pyarrow

    first_line = head.decode("utf-8-sig", "replace").lstrip().partition("\n")[0]
    delimiter = max("\t;,", key=first_line.count)
    csv.field_size_limit(LONGEST)  # the usual one is 131,072 characters
    with open(path, "rb") as raw:
        stream = _stream(raw, _kind_of(file.path)[1])
        text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=delimiter)
        try:
            names, rows = next(filter(None, reader), []), 0  # not an empty line
            wanted = _columns(file.path, names, fields)
            while batch := list(itertools.islice(reader, 256)):
                batch = [row for row in batch if row]  # empty lines
                if uneven := [row for row in batch if len(row) != len(names)]:
                    row = f"a row of {counted(len(uneven[0]), 'cell')}"
                    content = " ".join(",".join(uneven[0]).split())[:60]
                    columns = counted(len(names), "column")
                    raise csv.Error(f"{row} ({content}) below {columns}")
                records = [{k: v for k, v in zip(names, row) if k in wanted} for row in batch]
                data = pyarrow.RecordBatch.from_pylist(records)
                yield Block("rows", data, rows, True, True, min(raw.tell(), file.size))
                rows += len(batch)
        except (csv.Error, UnicodeDecodeError) as e:
            raise UserError(
                f"{file.path}: not a table that can be read, near line {reader.line_num}: {e}"
            ) from None


# -----------------------------------------------------------------------------
# From a Block to the bytes of train.bin and val.bin

SHAPES = dict(chat=as_chat, prefs=as_prefs, verify=as_verify)
NEEDS = dict(
    chat="'messages', nor 'prompt' and 'answer'",
    prefs="'prompt', 'chosen' and 'rejected'",
    verify="'prompt' and 'answer'",
)


def _dtype(tokenizer):
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


class Encoded:
    """What a Block becomes: `out`, the bytes for each output file; `count`, what is in it; `wrong`,
    [(line or row, reason)] of the unusable records; `broken_at`, the first byte that is not part of
    a text; `next_held_out`, [(hash, tokens)] of training documents, see lowest()."""

    def __init__(self):
        self.out, self.count, self.wrong, self.broken_at = {}, collections.Counter(), [], None
        self.next_held_out = []

    def decode(self, raw, at):
        """UTF-8 as text. Invalid bytes and zero bytes become U+FFFD and are counted."""
        raw = raw.replace(b"\0", b"\xff")
        try:
            return raw.decode()
        except UnicodeDecodeError as e:
            text = raw.decode("utf-8", "replace")
            self.count["broken"] += text.count("\ufffd") - raw.count("\ufffd".encode())
            if at is not None and self.broken_at is None:
                self.broken_at = at + e.start
            return text


def hash_of(content):
    """Below 2**64. The documents with the lowest hashes are held out: more data never moves a
    document over."""
    if isinstance(content, dict) and "answer" in content:  # of a problem, not what else it holds
        content = {key: content[key] for key in ("prompt", "answer")}
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def lowest(documents, window):
    """Of [(hash, tokens)] those with the lowest hashes, until they have more than `window` tokens:
    what is held out next if that is too little."""
    found, tokens = [], 0
    for order, length in sorted(documents):
        if tokens > window:
            break
        found.append([order, length])
        tokens += length or window + 1  # records that stay text: one is enough
    return found


class Encoder:
    """Turns Blocks into what is written, see Encoded. `tokenizer` is None for preferences and
    problems, which stay text. `shape`: 'text', 'chat', 'prefs' or 'verify'. `field`: that of the
    text, '' for the usual ones."""

    def __init__(self, tokenizer, shape, field="", val_fraction=0.0, block_size=0, keep_crlf=False):
        self.tokenizer, self.shape = tokenizer, shape
        self.val_fraction, self.block_size = val_fraction, block_size
        self.window, self.keep_crlf = block_size or WINDOW, keep_crlf
        self.dtype = _dtype(tokenizer) if tokenizer else None
        self.fields = ()  # to read of a record; (): all
        if shape == "text":
            self.fields = (field,) if field else TEXT_FIELDS

    def __call__(self, file, block):
        result, contents = Encoded(), {"train": [], "val": []}
        if block.kind in contents:
            self.write_piece(block, result)
            return result
        for content, size in self.contents(block, result):
            order = hash_of(content)
            split = "val" if order < self.val_fraction * 2**64 else "train"
            contents[file.split or split].append((content, order))
            result.count["bytes"] += size
        write = dict(text=self.write_text, chat=self.write_chat).get(self.shape, self.write_records)
        for split, found in contents.items():
            if found:
                written = write(split, found, result)
                result.count["documents"] += len(written)
                result.count[split + "_documents"] += len(written)
                result.count[split + "_tokens"] += sum(tokens for _, tokens in written)
                if split == "train" and not file.split:  # a source's own split is kept as it is
                    result.next_held_out = lowest(written, self.window)
        return result

    def contents(self, block, result):
        """(text or record, bytes) of each document that can be used."""
        if block.kind == "documents":
            for text in self.text_of(block, result).split(EOT):
                text = text.strip()
                if text:
                    yield text, len(text) if text.isascii() else len(text.encode())
            return
        for at, record, size in read_records(block, result):
            try:
                if not isinstance(record, dict):
                    raise _unexpected("it", record, "a JSON object")
                if self.shape == "text":
                    content = self.text_field(record, result)
                    size = len(content.encode())
                else:
                    content = SHAPES[self.shape](self.cleaned(record, result))
                yield content, size
            except Skipped as e:
                result.count[str(e)] += 1
            except RecursionError:
                result.wrong.append((at, TOO_DEEP))
            except ValueError as e:
                result.wrong.append((at, str(e)))

    def text_of(self, block, result):
        """The text of a Block of bytes."""
        return self.cleaned(result.decode(block.data, block.at), result)

    def text_field(self, record, result):
        field, text = _required(record, *self.fields)
        if not isinstance(text, str):
            raise _unexpected(repr(field), text, "a text")
        return self.cleaned(text, result)

    def cleaned(self, value, result):
        """A text, or all texts of a record. Windows ends a line with CRLF, old Macs with CR, which
        would be tokens of their own: they become LF. A zero byte becomes U+FFFD, see decode()."""
        if isinstance(value, list):
            return [self.cleaned(item, result) for item in value]
        if isinstance(value, dict):
            return {key: self.cleaned(item, result) for key, item in value.items()}
        if not isinstance(value, str):
            return value
        if "\0" in value:
            result.count["broken"] += value.count("\0")
            value = value.replace("\0", "\ufffd")
        if self.keep_crlf or "\r" not in value:
            return value
        pairs = value.count("\r\n")
        result.count["crlf"] += pairs
        result.count["cr"] += value.count("\r") - pairs
        return value.replace("\r\n", "\n").replace("\r", "\n")

    def write_piece(self, block, result):
        ids = self.tokenizer.encode_piece(self.text_of(block, result), block.first)
        if block.last:
            ids = np.append(ids, self.tokenizer.eos_id)
        result.out[block.kind + ".bin"] = ids.astype(self.dtype).tobytes()
        result.count["bytes"] += len(block.data)
        result.count["documents"] += int(block.last)
        result.count[block.kind + "_tokens"] += len(ids)

    # these write the contents of a split, and return [(hash, tokens)] of the documents

    def write_text(self, split, found, result):
        ids = self.tokenizer.encode_documents([text for text, _ in found])
        lengths = np.diff(np.flatnonzero(ids == self.tokenizer.eos_id), prepend=-1).tolist()
        result.out[split + ".bin"] = ids.astype(self.dtype).tobytes()
        return [(order, length) for (_, order), length in zip(found, lengths)]

    def write_chat(self, split, found, result):
        ids, mask, written = [], [], []
        for messages, order in found:
            conversation, its_mask = render_chat(messages, self.tokenizer)
            if self.block_size and len(conversation) > self.block_size:
                result.count[LONG] += 1
                continue
            ids += conversation
            mask += its_mask
            written.append((order, len(conversation)))
        result.out[split + ".bin"] = np.array(ids, self.dtype).tobytes()
        result.out[split + ".mask"] = bytes(mask)
        return written

    def write_records(self, split, found, result):
        # a parquet column may hold dates, which are written as text
        lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record, _ in found]
        if self.shape == "verify":
            unread = [record for record, _ in found if gold_number(record["answer"]) is None]
            result.count["no_number"] += len(unread)
        result.out[split + ".jsonl"] = "".join(lines).encode()
        return [(order, 0) for _, order in found]


def _rows(batch):
    """The rows of a pyarrow batch as dicts. A cell that Python can't hold, a date beyond the year
    9999 or a text that is not UTF-8, is the exception that says so."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        columns = [list(map(_cell, column)) for column in batch.columns]
        return [dict(zip(batch.schema.names, row)) for row in zip(*columns)]


def _cell(cell):
    try:
        return cell.as_py()
    except (ValueError, OverflowError) as e:
        return e


def read_records(block, result):
    """(line, record number or row, record, bytes) of each record of a Block."""
    if block.kind == "rows":
        for i, row in enumerate(_rows(block.data), block.at + 1):
            yield i, row, block.data.nbytes // len(block.data)
        return
    for at, line in enumerate(block.data.split(b"\n"), block.at + 1):
        if not line.strip():
            continue
        try:
            record = json.loads(result.decode(line, None))
            if b"\\ud" in line or b"\\uD" in line:  # half a surrogate pair, which JSON can hold
                whole = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")
                record = json.loads(whole)
            yield at, record, len(line)
        except json.JSONDecodeError as e:
            result.wrong.append((at, f"not JSON: {e.msg} at character {e.pos + 1}"))
        except (ValueError, RecursionError):
            result.wrong.append((at, TOO_DEEP))


def recognize(files, wanted, field):
    """(shape, field, first Block) of a source: what the user wants, or what its first record looks
    like. Prints what it was taken for."""
    sources = ((f, block) for f in files for block in read_blocks(f, len(files) == 1))
    file, block = next(sources, (files[0], None))
    if block is None:
        raise UserError(f"{file.path}: empty, there is no text in it")
    if block.kind in ("documents", "train", "val"):
        if wanted not in ("", "text") or field:
            option = f"--field={field}" if field else f"--as={wanted}"
            raise UserError(
                f"{file.path}: {option} wants records (.jsonl or .parquet), and this is plain text"
            )
        return "text", "", block
    result, text_fields = Encoded(), [field] if field else TEXT_FIELDS
    read = [row for row in read_records(block, result) if isinstance(row[1], dict)]
    unit = block.kind.removesuffix("s")
    if not read:
        at = result.wrong[0][0] if result.wrong else 1
        raise UserError(
            f"{file.path}, {unit} {at}: not a JSON object; a .jsonl file has one object in every "
            "line, a .json file may also be an array of objects"
        )
    wanted = wanted or ("text" if field else "")
    if field and wanted != "text":
        raise UserError(f"--field={field} names a text, --as={wanted} has none: leave one out")
    keys = {key: None for _, record, _ in read for key in record}
    fits = _shapes(keys, text_fields)  # those of the first record that tells
    for _, record, _ in read:
        filled = _shapes([key for key in record if _is_filled(record[key])], text_fields)
        if wanted in filled or (filled and not wanted):
            fits = filled
            break
    shape = wanted or next(iter(fits), "text")
    if shape not in fits:
        close = difflib.get_close_matches(field or "text", keys, n=1)
        missing = NEEDS.get(shape, f"field {field or 'text'!r}")
        raise UserError(
            f"{file.path}, {unit} {read[0][0]}: no {missing} in {', '.join(keys)[:200]}; name the "
            f"text with --field={close[0] if close else 'NAME'}, or its shape with --as="
        )
    others = "".join(f"; --as={other} would do too" for other in fits if other != shape)
    print(f"{file.path}: read as {shape}, from {', '.join(fits[shape])}{others}")
    unread = _unread(shape, fits[shape], keys)
    if unread:
        use = "for the verifier only" if shape == "verify" else "not read"
        print(f"{use}: {', '.join(unread)[:200]}")
    return shape, fits[shape][0] if shape == "text" else "", block


def _shapes(keys, text_fields):
    """{shape: the fields that it is made from} of the shapes that a record with these keys can
    have, the likeliest first."""

    def first(*fields):
        return next((field for field in fields if field in keys), None)

    prompt = first(*PROMPT)
    candidates = [
        ("prefs", [prompt or first(*CONVERSATION, "chosen"), first("chosen"), first("rejected")]),
        ("chat", [first(*CONVERSATION)]),
        ("verify", [prompt, first("answer")]),
        ("chat", [prompt or first("chosen"), first(*ANSWER)]),
        ("text", [first(*text_fields)]),
    ]
    fits = {}
    for shape, fields in candidates:
        if None not in fields:
            fits.setdefault(shape, list(dict.fromkeys(fields)))
    return fits


def _unread(shape, fields, keys):
    """Those of the keys that are no part of what is trained on; of texts they are not listed."""
    used = {*fields, "system", "system_prompt", "label"}
    if fields[0] in PROMPT:
        used.add("history")
    if fields[0] == "instruction":
        used.update(ABOUT_INSTRUCTION)
    return [key for key in keys if shape != "text" and key not in used]


def print_first(encoder, block):
    """Prints the first record as it will be trained on; of a text, the summary shows the begin."""
    first = next(encoder.contents(block, Encoded()), None)
    if encoder.shape == "text" or first is None:
        return
    (record, _), more = first, ""
    messages = record if encoder.shape == "chat" else record["prompt"]
    if encoder.shape == "prefs":
        messages = [*messages, dict(role="assistant", content=record["chosen"])]
        more = f"\nrejected: [[{record['rejected']}]]"
    if encoder.shape == "verify":
        more = f"\nanswer to compare with: {record['answer']}"
    tokenizer = encoder.tokenizer or with_chat_tokens(load_tokenizer("byte"))
    is_prompt, is_pair = encoder.shape == "verify", encoder.shape == "prefs"
    ids, mask = render_chat(messages, tokenizer, is_prompt, last_only=is_pair)
    text = ""
    for counts, group in itertools.groupby(zip(ids, mask), key=lambda pair: pair[1]):
        part = tokenizer.decode([token for token, _ in group])
        text += f"[[{part}]]" if counts else part
    text = for_terminal(text + more)
    text = text if len(text) < 2000 else f"{text[:1500]} ... {text[-400:]}"
    print("its first record; [[ ]] is what the loss counts:\n" + textwrap.indent(text, "    "))


# -----------------------------------------------------------------------------
# Prepared data, read back for training


class Batch(types.SimpleNamespace):
    """A micro-batch: x, y (B, T) token ids and targets (-1: not counted), and what else its stage
    needs.

    `units` is what its loss is a mean over: targets, or for preferences pairs. `tokens` counts the
    tokens in it. `with_signal` counts the units that can change the weights: with RLVR those whose
    advantage is not 0. `metrics` holds what was measured when it was made.
    """

    def __init__(self, x, y, units, tokens, **more):
        super().__init__(x=x, y=y, units=units, tokens=tokens, **more)
        self.with_signal, self.metrics = units, {}

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
    """Sequences of different lengths as (x, y), each (len(rows), longest - 1), padded at the right
    with pad_id.

    A row is (ids, mask): its targets in y are the ids whose mask is 1, all other entries of y are
    -1.
    """
    import torch

    x = torch.full((len(rows), max(len(ids) for ids, _ in rows) - 1), pad_id)
    y = torch.full_like(x, -1)
    for i, (ids, mask) in enumerate(rows):
        x[i, : len(ids) - 1] = torch.tensor(ids[:-1])
        y[i, : len(ids) - 1] = torch.where(torch.tensor(mask[1:]) == 1, torch.tensor(ids[1:]), -1)
    return x, y


def spread(count, wanted):
    """At most `wanted` of the indices 0 ... count - 1, evenly spread, always the same ones."""
    return [i * count // min(count, wanted) for i in range(min(count, wanted))]


def _unusable(path, problem):
    """The UserError for a file of a prepared data set."""
    return UserError(f"{path}: {problem}; {how_to_prepare(os.path.dirname(path))}")


class Bins:
    """The windows of one split of a prepared data set, in an order that is a pure function of
    (seed, position): `position` counts the windows consumed since the start of training.

    Every epoch visits every window once, shuffled, on a grid shifted by an offset of its own, so
    that two epochs over a small text differ. Any process can make any batch, in any order, at any
    time.

    Raises UserError where the file is no bin, or too short: for training less than a window and its
    targets, for validation less than two tokens.
    """

    def __init__(self, directory, split, block_size, seed=1337):
        self.block_size, self.seed, self._epoch = block_size, seed, None
        self.meta = read_meta(directory)
        self.path = os.path.join(directory, f"{split}.bin")
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        if not os.path.isfile(self.path):
            raise _unusable(self.path, "no such file")
        size = os.path.getsize(self.path)
        if size == 0:
            raise _unusable(self.path, "0 bytes are no tokens")
        if size % dtype.itemsize:
            problem = f"{size:,} bytes are no whole number of {dtype.name} tokens"
            raise _unusable(self.path, problem)
        self.tokens = np.memmap(self.path, dtype=dtype, mode="r")
        count = len(self.tokens)
        written = self.meta.get(f"{split}_tokens", count)
        if count != written:
            raise _unusable(self.path, f"{count:,} tokens, of {written:,} that meta.json counts")
        if count < (block_size + 1 if split == "train" else 2):
            raise UserError(
                f"{self.path}: {counted(count, 'token')}, too few for one window of "
                f"block_size={block_size} and its targets; set --block_size={max(1, count - 1)} "
                "or less, or prepare more text"
            )
        mask, self.mask = os.path.join(directory, f"{split}.mask"), None
        if os.path.lexists(mask):
            size = os.path.getsize(mask) if os.path.isfile(mask) else 0
            if size != count:
                raise _unusable(mask, f"{size:,} bytes for {count:,} tokens")
            self.mask = np.memmap(mask, dtype=np.uint8, mode="r")
        self.amount = counted(count, "token")
        # held-out windows that are read at a time: small ones in larger batches
        self.at_least = 4096 // block_size
        # windows in an order; one less than fit leaves the grid room to shift by up to a whole one
        self.per_epoch = max(1, (count - 1) // block_size - 1)
        self.epoch = (count - 1) / block_size  # windows that hold every token once

    def start(self, position):
        """The first token of the window at `position`."""
        epoch, index = divmod(position, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            room = min(self.block_size, len(self.tokens) - self.per_epoch * self.block_size)
            self._epoch, self._offset = epoch, int(rng.integers(room))
            self._order = rng.permutation(self.per_epoch)
        return self._offset + int(self._order[index]) * self.block_size

    def batch(self, positions):
        """(x, y), int64 (len(positions), block_size): inputs and targets; a target that does not
        count is -1."""
        return self.read([self.start(p) for p in positions])

    def read(self, starts, rows=0):
        """The windows that begin at the tokens `starts`: (x, y), as `batch`. A window that
        reaches beyond the end of the text is filled up with the end-of-text token, and what is
        missing is no target. So are the windows that fill up the batch to `rows`: a compiled model
        has one graph for batches of one size."""
        import torch

        count = len(starts)
        starts = starts + starts[:1] * (rows - count)
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
        y[count:] = -1
        return x, y

    def held_out(self, windows):
        """Starts of at most `windows` windows spread evenly over the split, the last one perhaps
        a partial one; the same at every call."""
        fit = -(-(len(self.tokens) - 1) // self.block_size)
        return [i * self.block_size for i in spread(fit, windows)]

    def check_vocabulary(self, vocab_size):
        """UserError if a token exceeds the vocabulary. Reads all of a small file, 256 pieces of
        a large one: 12 GB would delay the first step by a minute."""
        largest = max(
            int(piece[: 2**20].max()) for piece in np.array_split(self.tokens, 256) if len(piece)
        )
        if largest >= vocab_size:
            raise _unusable(
                self.path,
                f"token {largest} exceeds the vocabulary of {vocab_size}, was it made with another "
                f"tokenizer than {self.meta['tokenizer']!r}?",
            )

    def fingerprint(self, kind="bin"):
        """Changes when the bin, or the mask, does: its size and 64 pieces of 64 KiB spread evenly
        over it."""
        path = f"{self.path.removesuffix('bin')}{kind}"
        size = os.path.getsize(path)
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        with open(path, "rb") as f:
            for i in range(64):
                f.seek(i * size // 64)
                digest.update(f.read(2**16))
        return digest.hexdigest()


class Mixture:
    """Several Bins read by weight, as one: position -> (which, position in it), again a pure
    function.

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
            edges = [
                [round(s * b * self.BLOCK) for s in np.cumsum(self.shares)]
                for b in (block, block + 1)
            ]
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
    """The lines of one .jsonl split, tokenized, in an order that is a function of (seed, position)
    as that of Bins.

    `encode(record)` gives what is kept of a line, or a reason (a text) to leave it out: it is
    counted in `left_out`.
    """

    at_least, mask = 1, None  # see Bins

    def __init__(self, directory, split, encode, seed=1337):
        self.path, self.seed, self._epoch = os.path.join(directory, f"{split}.jsonl"), seed, None
        if not os.path.isfile(self.path):
            raise _unusable(self.path, "no such file")
        self.rows, self.left_out = [], collections.Counter()
        with open(self.path, "rb") as f:
            for n, line in enumerate(f, 1):
                try:
                    row = encode(json.loads(line.decode()))
                except UserError:
                    raise
                except json.JSONDecodeError as e:
                    raise _unusable(f"{self.path}, line {n}", f"not JSON ({e})") from None
                except Exception as e:  # no UTF-8, nested too deep, or of another kind
                    problem = f"not a record that prepare.py wrote ({type(e).__name__}: {e})"
                    raise _unusable(f"{self.path}, line {n}", problem) from None
                if isinstance(row, str):
                    self.left_out[row] += 1
                else:
                    self.rows.append(row)
        if not self.left_out and not self.rows:
            raise UserError(f"{self.path}: it is empty; {how_to_prepare(directory)}")
        if not self.rows:
            why = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
            raise UserError(f"{self.path}: nothing in it can be used: {why}")
        self.epoch = self.per_epoch = len(self.rows)
        self.amount = counted(len(self.rows), "record")

    def __getitem__(self, position):
        """(index in rows, row) at a position."""
        epoch, index = divmod(position, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, rng.permutation(self.per_epoch)
        return int(self._order[index]), self.rows[self._order[index]]

    def held_out(self, count):
        """At most `count` indices into rows, spread evenly, the same at every call."""
        return spread(self.per_epoch, count)

    def read(self, indices, rows=0):
        """[(index in rows, row)]. `rows`: see Bins, nothing is filled up here."""
        return [(i, self.rows[i]) for i in indices]

    def fingerprint(self):
        return sha256(self.path)


class _Data:
    """What train.py reads: Windows, Pairs or Problems. `train` and `val` are lists with a Bins or
    Records for each domain, `shares` is {domain: share}, `ends` the ids that end a text, `notes`
    are lines to print. batch(positions) reads from `train`."""

    def __init__(self, config, train, val, shares, tokenizer, vocab_size):
        self.train, self.val, self.shares = train, val, shares
        self.batch_size = config["batch_size"]
        self.tokenizer, self.vocab_size, self.notes = tokenizer, vocab_size, []
        self.ends = [tokenizer.eos_id] if tokenizer.eos else []
        self.amount = " + ".join(part.amount for part in train)
        self.epoch = sum(part.epoch for part in train)
        # in this order: of runs that began before the others were added, the first ones only
        self.fingerprint = [part.fingerprint() for part in [*train, *val]]
        masked = [part for part in [*train, *val] if part.mask is not None]
        self.fingerprint += [part.fingerprint("mask") for part in masked]

    def held_out(self, sequences, rows, rank=0, world_size=1):
        """(domain, batch): batches of `rows` windows or records of this process's share of at most
        `sequences` of each domain."""
        for domain, part in zip(self.shares, self.val):
            places = part.held_out(sequences)[rank::world_size]
            step = rows
            if rows >= self.batch_size:  # memory is no matter: small windows in larger batches
                step = max(rows, part.at_least)
            for i in range(0, len(places), step):
                yield domain, self._batch(part.read(places[i : i + step], step if i else 0))

    def held_out_count(self, sequences):
        """How much of the smallest domain held_out gives to all processes together."""
        return min(len(part.held_out(sequences)) for part in self.val)

    def check_vocabulary(self, vocab_size):
        if vocab_size < self.vocab_size:
            name = next(iter(self.shares))
            usual = [spec for spec, size in VOCABULARIES.items() if size == vocab_size]
            tokenizer, other = usual[0] if usual else "MODEL", f"{name}_{vocab_size}"
            raise UserError(
                f"vocab_size={vocab_size} of the model is smaller than the {self.vocab_size} ids "
                f"of {name} ({self.tokenizer.name}): the same command with --vocab_size=0 makes a "
                f"new model with these; for the model's own, python prepare.py {name} "
                f"--tokenizer={tokenizer} --name={other}, then the same with --dataset={other}"
            )


class Windows(_Data):
    """Text and conversations: windows of block_size tokens of a data set, or of a mixture, as
    Batches."""

    def __init__(self, config):
        names, weights = zip(*parse_mixture(config["dataset"]))
        directories = [os.path.join(config["data_dir"], name) for name in names]
        first, *others = [read_meta(directory) for directory in directories]
        for directory, meta in zip(directories[1:], others):
            if any(meta[key] != first[key] for key in ("tokenizer", "vocab_size")):
                raise UserError(
                    f"{directory} was made with the tokenizer {meta['tokenizer']!r}, "
                    f"{directories[0]} with {first['tokenizer']!r}; a mixture has to share one"
                )
        block_size, seed = config["block_size"], config["seed"]
        train, val = (
            [Bins(directory, split, block_size, seed) for directory in directories]
            for split in ("train", "val")
        )
        if config["stage"] == "sft" and any(bins.mask is None for bins in train + val):
            raise UserError(
                f"{config['dataset']}: stage='sft' wants conversations, with a train.mask and a "
                "val.mask beside the bins; python prepare.py CHATS.jsonl --as=chat makes them"
            )
        own = os.path.exists(os.path.join(directories[0], "tokenizer.json"))
        tokenizer = load_tokenizer(directories[0] if own else first["tokenizer"])
        if own and "stamp" in first:
            for key, value in _ids_of(tokenizer).items():
                if key != "tokenizer" and first.get(key, value) != value:
                    path = os.path.join(directories[0], "meta.json")
                    problem = f"{key} is {first[key]!r}, {value!r} in the tokenizer beside it"
                    raise _unusable(path, problem)
        self.order = Mixture(train, weights, seed)
        shares = dict(zip(names, self.order.shares))
        super().__init__(config, train, val, shares, tokenizer, first["vocab_size"])
        if config["stage"] == "sft":
            self.ends.append(tokenizer.encode_special(IM_END))

    def batch(self, positions):
        return self._batch(self.order.batch(positions))

    def token_bytes(self, vocab_size):
        """Bytes that each target decodes to, a table for a model of so many ids. Its last entry,
        which the target -1 finds, is 0."""
        import torch

        sizes = torch.zeros(vocab_size + 1, dtype=torch.int64)
        known = self.tokenizer.token_bytes()[:vocab_size]
        sizes[: len(known)] = torch.from_numpy(known)
        return sizes

    def _batch(self, windows):
        x, y = windows
        return Batch(x, y, units=(y >= 0).sum().item(), tokens=x.numel())

    def check_vocabulary(self, vocab_size):
        super().check_vocabulary(vocab_size)
        for bins in self.train + self.val:
            bins.check_vocabulary(vocab_size)


class _Conversations(_Data):
    """What Pairs and Problems share: records stay text until the tokenizer of the model that is
    trained meets them."""

    def __init__(self, config, tokenizer):
        (name, _), *others = parse_mixture(config["dataset"])
        if others:
            raise UserError(
                f"dataset={config['dataset']!r}: stage={config['stage']!r} takes one data set, not "
                "a mixture"
            )
        self.tokenizer, directory = tokenizer, os.path.join(config["data_dir"], name)
        train, val = (
            Records(directory, split, self.encode, config["seed"]) for split in ("train", "val")
        )
        super().__init__(config, [train], [val], {name: 1.0}, tokenizer, tokenizer.vocab_size)
        self.ends.append(tokenizer.encode_special(IM_END))
        for records, what in ((train, "records"), (val, "held-out records")):
            total = sum(records.left_out.values()) + records.per_epoch
            for reason, count in records.left_out.items():
                self.notes.append(f"left out {count} of {total} {what} of {name}: {reason}")


class Pairs(_Conversations):
    """Preferences: a Batch holds the chosen answers of its pairs in its first half, the rejected
    in its second."""

    def __init__(self, config, tokenizer):
        self.block_size = config["block_size"]
        super().__init__(config, tokenizer)

    def encode(self, record):
        """[(ids, mask) chosen, (ids, mask) rejected], or why the pair is left out."""
        sides = []
        for side in ("chosen", "rejected"):
            conversation = record["prompt"] + [dict(role="assistant", content=record[side])]
            sides.append(render_chat(conversation, self.tokenizer, last_only=True))
        if sides[0] == sides[1]:
            return "both sides are equal"
        if max(len(ids) for ids, _ in sides) > self.block_size + 1:
            return f"longer than block_size={self.block_size}, so raise --block_size"
        return sides

    def batch(self, positions):
        return self._batch([self.train[0][p] for p in positions])

    def _batch(self, pairs):
        rows = [pair[0] for _, pair in pairs] + [pair[1] for _, pair in pairs]
        x, y = padded(rows, self.tokenizer.eos_id)
        return Batch(x, y, units=len(pairs), tokens=sum(len(ids) for ids, _ in rows))


class Problems(_Conversations):
    """Verifiable problems. `batch` gives a list of (place, (prompt ids, question, answer, the
    record's other fields)): train.py makes a Batch of it by sampling. `place` tells problems
    apart, so that each completion draws from a seed of its own."""

    def __init__(self, config, tokenizer):
        self.longest = config["block_size"] - config["max_completion"]
        self.verifier = "" if config["verifier_model"] else config["verifier"]
        super().__init__(config, tokenizer)

    def encode(self, record):
        """(prompt ids, the question's text, answer, the record's other fields), or why the problem
        is left out."""
        ids, _ = render_chat(record["prompt"], self.tokenizer, add_generation_prompt=True)
        if len(ids) > self.longest:
            room = "block_size less max_completion, so raise --block_size or lower --max_completion"
            return f"a prompt longer than {self.longest} tokens, {room}"
        if self.verifier and not readable_gold(self.verifier, record["answer"]):
            return f"an answer that verifier={self.verifier!r} can't read"
        fields = {key: value for key, value in record.items() if key not in ("prompt", "answer")}
        return ids, record["prompt"][-1]["content"], record["answer"], fields

    def batch(self, positions):
        return [(p, self.train[0][p][1]) for p in positions]

    def _batch(self, problems):
        return problems

    def complete(self, problems, copies, first_seed, generate, grade):
        """[(prompt ids, completion ids, ended, reward)]: `copies` completions of each problem, one
        after the other.

        generate(prompts, seeds) -> [(ids, ended)]; `grade` is a Grader. The seed of a completion
        follows from its problem's place in the data, not from the process or the batch that samples
        it.
        """
        prompts = [ids for _, (ids, *_) in problems for _ in range(copies)]
        seeds = [
            first_seed + place * copies + copy for place, _ in problems for copy in range(copies)
        ]
        completions = []
        for i, (ids, ended) in enumerate(generate(prompts, seeds)):
            _, question, answer, fields = problems[i // copies][1]
            text = self.tokenizer.decode(ids[:-1] if ended else ids)
            reward = grade(question, text, answer, ended, fields)
            completions.append((prompts[i], ids, ended, reward))
        return completions

    def judge_prompt(self, question, completion):
        """(ids, id of yes, id of no): what a model that acts as the verifier is asked."""
        content = f"{question}\nAnswer: {completion}\nIs this right? Answer yes or no."
        chat = [{"role": "user", "content": content}]
        ids = render_chat(chat, self.tokenizer, add_generation_prompt=True)[0]
        return ids, self.tokenizer.encode("yes")[0], self.tokenizer.encode("no")[0]

    def rollouts(self, completions, advantages=None, keep_all=True):
        """A Batch of completions with the advantage of each, a tensor. A truncated completion
        has no reward to speak of: it is left out of the loss, and counted. Without advantages
        every token of every completion is a target. Unless keep_all, completions with an advantage
        of 0, which have no gradient, are counted in `units` and then left out: it is the same step
        in half of the time.
        """
        rows = []
        for prompt, ids, ended, _ in completions:
            counts = int(ended or advantages is None)
            rows.append((prompt + ids, [0] * len(prompt) + [counts] * len(ids)))
        units = sum(sum(mask) for _, mask in rows)
        tokens = sum(len(ids) for ids, _ in rows)
        if not keep_all:
            kept = advantages.nonzero()[:, 0].tolist() or [0]  # no batch is empty
            rows, advantages = [rows[i] for i in kept], advantages[kept]
        x, y = padded(rows, self.tokenizer.eos_id)
        batch = Batch(x, y, units, tokens, advantages=advantages)
        lengths = [len(ids) for _, ids, _, _ in completions]
        batch.metrics = {
            "completions/length": sum(lengths) / len(lengths),
            "completions/cut": sum(not ended for _, _, ended, _ in completions) / len(lengths),
        }
        if advantages is not None:
            batch.with_signal = (y[advantages != 0] >= 0).sum().item()
        return batch


def pass_rates(greedy, sampled, group_size, passing=1.0):
    """{name: (mean, count)} of what Problems.complete gave for held-out problems: greedily, and
    sampled group_size times each. A completion passes if its reward is at least `passing`."""
    rewards = [reward for _, _, _, reward in sampled]
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    passed = sum(reward >= passing for _, _, _, reward in greedy)
    passed_any = sum(max(group) >= passing for group in groups)
    tokens, count = sum(len(ids) for _, ids, _, _ in sampled), len(sampled)
    return {
        "pass@1": (passed / len(greedy), len(greedy)),
        f"pass@{group_size}": (passed_any / len(groups), len(groups)),
        "reward/mean": (sum(rewards) / count, count),
        "completions/length": (tokens / count, count),
    }


class TimeIsUp(BaseException):
    """No Exception, so that a verifier's own `except Exception` does not catch it."""


def call_within(seconds, function, *arguments, **fields):
    """function(*arguments, **fields), or TimeIsUp after so many seconds.

    A timer's signal interrupts Python code, sleeping and waiting, on Linux and macOS, but not a
    long call of C. Windows has no such timer, and only the main thread is interrupted: elsewhere
    the call takes as long as it takes."""
    if math.isinf(seconds) or not can_interrupt():
        return function(*arguments, **fields)
    running, late = True, []

    def expire(number, frame):
        if running:
            late.append(TimeIsUp(f"it took longer than verifier_timeout={seconds:g} seconds"))
            raise late[0]

    before = signal.signal(signal.SIGALRM, expire)
    try:
        # once more every second: a bare `except:` may catch the first
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)
        try:
            result = function(*arguments, **fields)
        finally:
            running = False
        if late:  # it caught what was raised
            raise late[0]
        return result
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def can_interrupt():
    in_main_thread = threading.current_thread() is threading.main_thread()
    return hasattr(signal, "setitimer") and in_main_thread


class Grader:
    """Rewards of completions by a verifier: verify(question, completion, answer) -> a number; one
    that takes **record gets the other fields of the record, too.

    A completion that is empty or never ends gets 0. So does one at which the verifier raises, takes
    longer than `timeout` seconds, or gives a number that is not finite or beyond LARGEST: it is
    counted in `raised`, and the first time said once.
    """

    LARGEST = 1e6  # usual rewards are from 0 to 1; gradients overflow long before float32 does
    ONLY_TIMEOUTS = 8  # after so many calls that all took too long, a run stops

    def __init__(self, verify, name, say, timeout=10.0):
        self.verify, self.name, self.say, self.timeout = verify, name, say, timeout
        self.calls, self.raised, self.timeouts, self.last_error = 0, 0, 0, ""
        self.calls_before, self.raised_before, self.failing_steps = 0, 0, 0
        parameters = list(_signature(verify).parameters.values())
        self.takes_record = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.taken = {p.name for p in parameters[:3]}  # a field of such a name is left out
        if not can_interrupt():
            say("warning: verifier_timeout has no effect on this system: a verifier may hang")

    def __call__(self, question, completion, answer, ended, record):
        if not ended or not completion.strip():
            return 0.0
        self.calls += 1
        fields = {}
        if self.takes_record:
            fields = {key: value for key, value in record.items() if key not in self.taken}
        try:
            arguments = (question, completion, answer)
            reward = float(call_within(self.timeout, self.verify, *arguments, **fields))
            if not abs(reward) <= self.LARGEST:  # NaN is not, either
                raise ValueError(
                    f"its reward is {reward:g}; expected a finite number of at most "
                    f"{self.LARGEST:g} in size"
                )
            return reward
        except (Exception, SystemExit, TimeIsUp) as e:
            self.raised += 1
            self.timeouts += isinstance(e, TimeIsUp)
            self.last_error = f"{type(e).__name__}: {e}".splitlines()[0]
        if self.raised == 1:
            what = f"the verifier raised on {completion[:60]!r}, which counts as no reward"
            self.say(f"warning: {what}: {self.last_error}")
        if self.timeouts == self.calls == self.ONLY_TIMEOUTS:
            raise UserError(
                f"verifier={self.name}: each of the first {self.calls} calls took longer than "
                f"verifier_timeout={self.timeout:g} seconds; raise it, or mend verify"
            )
        return 0.0

    def check_step(self, patience, over_processes):
        """To be called once a step, on all processes. UserError if the verifier raised at every
        call of the step, and never worked before, or did not for `patience` steps in a row:
        nothing can be learned from it."""
        new = (self.calls - self.calls_before, self.raised - self.raised_before)
        calls, raised, worked = over_processes(*new, self.calls - self.raised)
        self.calls_before, self.raised_before = self.calls, self.raised
        if calls == 0:
            return
        self.failing_steps = self.failing_steps + 1 if calls == raised else 0
        if self.failing_steps and (worked == 0 or self.failing_steps >= patience):
            raise UserError(
                f"verifier={self.name}: the verifier raised at each of the {int(calls)} calls of a "
                f"step, so nothing can be learned from it: {self.last_error}. Mend "
                "verify(prompt, completion, answer)"
            )


def open_data(config, model_directory, say, world_size=1):
    """Windows, Pairs or Problems, by config["stage"].

    Pairs and Problems are tokenized with the tokenizer of the model in `model_directory`, to which
    chat tokens are added if it has none.
    """
    if config["stage"] in ("pretrain", "sft"):
        data = Windows(config)
    else:
        tokenizer = with_chat_tokens(load_tokenizer(model_directory))
        data = Pairs(config, tokenizer) if config["stage"] == "dpo" else Problems(config, tokenizer)
    for name, _ in parse_mixture(config["dataset"]):
        check_content(os.path.join(config["data_dir"], name), say)
    for note in data.notes:
        say(note)
    if data.held_out_count(config["eval_iters"] * config["batch_size"]) < world_size:
        raise UserError(
            f"{config['dataset']}: {world_size} processes need as many held-out windows or "
            "records, there are fewer"
        )
    return data


CHECKED_AT_START = 1 << 30  # bytes; a larger file is read while training goes on


def check_content(directory, say):
    """Compares the files of a data set with the checksums that meta.json records. UserError where
    one differs; a warning if it is text, which may have been edited, and for a file of more than
    CHECKED_AT_START, which a thread of the first process reads."""
    meta, later = read_meta(directory), []
    if "stamp" in meta and "crc32" not in meta:
        say(
            f"{directory} has no checksums, an older prepare.py made it: its content is not checked"
        )
    for name, crc in meta.get("crc32", {}).items():
        path = os.path.join(directory, name)
        if not os.path.isfile(path):
            raise _unusable(path, "no such file")
        if os.path.getsize(path) > CHECKED_AT_START:
            later.append((path, crc))
        elif checksum(path) == crc:
            continue
        elif name.endswith(".jsonl"):
            say(f"warning: {path}: {ALTERED}; if nobody edited it, it is damaged")
        else:
            raise _unusable(path, ALTERED)

    def check_large_files():
        for path, crc in later:
            if checksum(path) != crc:
                say(f"warning: {path}: {ALTERED}; training goes on; {how_to_prepare(directory)}")

    if later and os.environ.get("RANK", "0") == "0":
        threading.Thread(target=check_large_files, daemon=True).start()


ALTERED = "not the bytes that prepare.py wrote (the CRC-32 differs)"


def vocab_size_of(config):
    """The vocabulary of the first data set of a config, for --dry_run. Of a known one that is not
    prepared yet, the vocabulary that is asked for, which is said: the real one may be smaller."""
    name = parse_mixture(config["dataset"])[0][0]
    directory = os.path.join(config["data_dir"], name)
    if name not in KNOWN or os.path.exists(os.path.join(directory, "meta.json")):
        return read_meta(directory)["vocab_size"]
    spec = KNOWN[name].get("tokenizer", SMOLLM2)
    sizes = VOCABULARIES | {"char": 128, "toy": 4096}
    vocab_size = sizes.get(spec) or int(spec.removeprefix("bpe:"))
    print(f"{directory} is not prepared yet: counted with {vocab_size:,} ids ({spec})")
    return vocab_size


def means(measured, shares, over_processes):
    """{'val/loss': mean, ...} from [(domain, {name: (mean, count)})] of all processes: each
    batch counts by its size, each domain of a mixture by its share. NaN where nothing was
    counted. Losses have a perplexity beside them, and bits per byte where the bytes of the
    targets were summed up: those of a mixture are the mean of its domains', too, so that they
    don't depend on how many tokens a tokenizer makes of each."""
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
        if name == "bytes":
            name, total, count = "bpb", sums[domain, "loss", 0] / math.log(2), total
        mean = total / count if count else float("nan")
        row[f"val/{name}"] = row.get(f"val/{name}", 0.0) + shares[domain] * mean
        if len(shares) > 1:
            row[f"val/{domain}/{name}"] = mean
    if {name for _, name, _ in keys} <= {"loss", "bytes"}:
        for key, loss in list(row.items()):
            if key.endswith("loss"):
                row[f"{key.removesuffix('loss')}ppl"] = math.exp(min(loss, 700))
    return row


class Ahead:
    """Makes what is asked for next in a thread, if `enabled`: on a GPU the next step's batches are
    ready when this step ends. What is made depends on what is asked for and on nothing else.

    `make` is called by one thread at a time, and what it raises is raised by `take`.
    """

    def __init__(self, make, enabled):
        self.make, self.asked, self.made = make, None, None
        self.thread = concurrent.futures.ThreadPoolExecutor(1) if enabled else None

    def begin(self, asked):
        """Begins to make(asked) and does not wait for it."""
        if self.thread:
            self.asked, self.made = asked, self.thread.submit(self.make, asked)

    def take(self, asked):
        """make(asked), which may have begun; if something else has, that is thrown away."""
        if not self.thread:
            return self.make(asked)
        if asked != self.asked:  # after bad steps, or if memory ran out
            self.begin(asked)
        self.asked = None
        return self.made.result()


def to_numbers(batches, *tensors):
    """The numbers in tensors of one element; those that were measured on batches become numbers in
    place.

    It is one transfer from the device: each waits until the device has done all that it was given.
    """
    import torch

    device, found = tensors[0].device, []
    for batch in batches:
        for name, value in batch.metrics.items():
            if torch.is_tensor(value) and value.device == device:
                found.append((batch.metrics, name))
    numbers = torch.stack([*tensors, *(metrics[name] for metrics, name in found)]).tolist()
    for (metrics, name), number in zip(found, numbers[len(tensors) :]):
        metrics[name] = number
    return numbers[: len(tensors)]


def batch_means(batches, over_processes):
    """{name: mean} of what was measured on the micro-batches of a step, on all processes."""
    names = sorted({name for batch in batches for name in batch.metrics})
    sums = [sum(float(batch.metrics[name]) for batch in batches) for name in names]
    count, *sums = over_processes(len(batches), *sums)
    return {name: total / count for name, total in zip(names, sums)}


def prepare_missing(config, say, world_size=1):
    """Prepares the data sets of a run that are missing and known by name, after their size is
    said; UserError for others, for data of another kind than the stage learns from, and where
    other processes, which are paid for, would wait."""
    for name, _ in parse_mixture(config["dataset"]):
        directory = os.path.join(config["data_dir"], name)
        if os.path.lexists(os.path.join(directory, "meta.json")):
            check_kind(directory, config["stage"])
        file = "train.bin" if config["stage"] in ("pretrain", "sft") else "meta.json"
        if os.path.exists(os.path.join(directory, file)):
            if "note" in read_meta(directory):
                say(read_meta(directory)["note"])
            continue
        if name not in KNOWN or world_size > 1:
            how = how_to_prepare(directory, config["stage"])
            raise UserError(f"{directory}: no such data set; {how}")
        say(f"{directory} is missing; preparing it now: {describe(name)}")
        prepare(name, data_dir=config["data_dir"], advise=False)


def dataset_names(dataset, data_dir):
    """A dataset= with the names of its data sets in place of paths to them: data/web/ is web."""

    def name_of(match):
        path = match[0].strip()
        if not re.search(r"[/\\]", path):
            return match[0]
        is_inside = os.path.abspath(path).startswith(os.path.abspath(data_dir) + os.sep)
        if is_inside or (os.path.isdir(path) and not os.path.isdir(os.path.join(data_dir, path))):
            return os.path.relpath(path, data_dir)
        return os.path.normpath(path)

    return re.sub(r"[^,:]+", name_of, dataset)


def parse_mixture(dataset):
    """'web:0.87,code:0.13' -> [('web', 0.87), ('code', 0.13)]; a single name needs no weight."""
    parts = []
    for part in dataset.split(","):
        name, colon, weight = part.strip().rpartition(":")
        if not colon:
            name, weight = part.strip(), "1"
        try:
            value = float(weight)
        except ValueError:
            value = -1.0
        if not name or not 0 < value < float("inf"):
            raise UserError(
                f"dataset={dataset!r}: {part.strip()!r} is not NAME or NAME:WEIGHT with a weight "
                "above 0"
            )
        parts.append((name, value))
    return parts


def read_meta(directory):
    """meta.json of a data set. Bins without one are nanoGPT's, uint16: characters if there is a
    meta.pkl, else GPT-2 tokens."""
    path = os.path.join(directory, "meta.json")
    if os.path.lexists(path):
        meta = read_json(path)
        _check_meta(path, meta)
        return meta
    settings = os.path.join(directory, "tokenizer_config.json")
    if os.path.isfile(settings) and "nanosmol_name" in read_json(settings):
        how = how_to_prepare(directory)
        raise UserError(f"{path}: no such file, although prepare.py made what is beside it; {how}")
    if os.path.exists(os.path.join(directory, "meta.pkl")):
        vocab_size = len(read_meta_pkl(directory))
        note = f"{directory}: nanoGPT's character data, {vocab_size} characters by its meta.pkl"
        return dict(tokenizer=directory, vocab_size=vocab_size, dtype="uint16", note=note)
    # nanoGPT rounds 50,257 up to 50,304 rows, a multiple of 64, for speed
    note = f"{directory}: no meta.json, so its bins are read as GPT-2 tokens, as nanoGPT's are"
    return dict(tokenizer="gpt2", vocab_size=50304, dtype="uint16", eos_id=50256, note=note)


# what the keys of meta.json hold, on which all else relies: in words, and as a test of a value
META = {
    "tokenizer": ("a text", lambda v: isinstance(v, str)),
    "vocab_size": ("a whole number of at least 1", lambda v: type(v) is int and v > 0),
    "dtype": ("'uint16' or 'uint32'", lambda v: v in ("uint16", "uint32")),
    "eos_id": ("an id of the vocabulary, or -1", lambda v: type(v) is int and v >= -1),
    "kind": ("text, chat, prefs or verify", lambda v: v in ("text", *SHAPES)),
    "source": ("a text", lambda v: isinstance(v, str)),
    "stamp": ("a text", lambda v: isinstance(v, str)),
    "crc32": ("checksums of files", lambda v: isinstance(v, dict) and all(map(IS_FILE, v))),
}
IS_COUNT = re.compile(r"(train|val)_(tokens|records)|documents|bytes").fullmatch
META_OF_BINS = ("tokenizer", "vocab_size", "dtype")


def _check_meta(path, meta):
    """UserError where a key of meta.json is missing, or can't be what it stands for."""
    for key in META_OF_BINS if meta.get("kind") not in ("prefs", "verify") else ():
        if key not in meta:
            raise UserError(f"{path}: the key {key!r} is missing; expected {META[key][0]}")
    for key, value in meta.items():
        expected, is_right = META.get(key, ("", lambda value: True))
        if IS_COUNT(key):
            expected, is_right = "a whole number", lambda v: type(v) is int and v >= 0
        if not is_right(value):
            raise UserError(f"{path}: {key} is {str(value)[:60]!r}; expected {expected}")


# stage -> the kinds of data set that it learns from, the usual one first
LEARNS_FROM = dict(pretrain=("text", "chat"), sft=("chat",), dpo=("prefs",), rlvr=("verify",))
LEARNS_FROM["distill"] = LEARNS_FROM["rlvr"]


def check_kind(directory, stage):
    """UserError where a prepared data set is not what a stage learns from. Bins without
    meta.json may be anything."""
    names = dict(
        text="text", chat="conversations", prefs="pairs of answers", verify="problems with answers"
    )
    wanted = LEARNS_FROM[stage]
    kind = read_meta(directory).get("kind", wanted[0])
    if kind not in wanted:
        raise UserError(
            f"{directory} holds {names[kind]}, stage={stage!r} wants {names[wanted[0]]}; "
            f"python prepare.py FILE --as={wanted[0]} makes them"
        )


def how_to_prepare(directory, stage=""):
    """What to type for a data set that is missing or damaged. Without a stage it is made again as
    what its meta.json says that it was."""
    name = os.path.basename(os.path.normpath(directory))
    if name in KNOWN:
        return f"python prepare.py {name} makes it"
    try:
        meta = read_json(os.path.join(directory, "meta.json"))
    except UserError:  # missing or damaged itself
        meta = {}
    kind = LEARNS_FROM[stage][0] if stage else meta.get("kind")
    if kind in SHAPES:
        tokenizer = " --tokenizer=MODEL" if kind == "chat" else ""
        return f"python prepare.py YOUR_FILE.jsonl --as={kind} --name={name}{tokenizer} makes it"
    return f"python prepare.py YOUR_TEXT.txt --name={name} makes it"


# -----------------------------------------------------------------------------
# The toy world: its words and templates are in assets/toy_world.txt, whose head explains them.

SHE = dict(he="she", him="her", his="her", boy="girl", brother="sister")
HE = dict(he="he", him="him", his="his", boy="boy", brother="brother")
CHAT_MANNERS = ["plain"] * 8 + ["kind", "curt"]  # what SFT shows; DPO can only choose among these
TOY_SHARES = {"story": 58, "counting": 10, "sums": 26, "facts": 6}  # percent of the documents


@functools.cache
def toy_world():
    """assets/toy_world.txt as a namespace: what each slot may be, templates, plots, manners."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "toy_world.txt")
    with open(path, encoding="utf-8") as f:
        text = re.sub(r"\n +", " ", f.read())  # an indented line continues the one before
    sections = {}
    for line in text.splitlines():
        if line.startswith("== "):
            entries = sections.setdefault(line[3:], [])
        elif line and not line.startswith("#"):
            entries.append("" if line == "-" else line)

    world = types.SimpleNamespace(plots=[], manners={}, choices={}, about={})
    for line in sections["words"]:
        name, _, words = line.partition(": ")
        world.choices[name] = words.split(", " if "," in words else " ")
    world.girls, world.boys = world.choices.pop("girls"), world.choices.pop("boys")
    world.numbers = world.choices.pop("numbers")
    world.about |= dict.fromkeys(world.girls, SHE) | dict.fromkeys(world.boys, HE)
    world.about |= {str(n): dict(word=word) for n, word in enumerate(world.numbers)}
    for title, entries in sections.items():
        kind, _, name = title.partition(": ")
        if kind == "plot":
            questions = [entry.removeprefix("? ") for entry in entries[1:]]
            world.plots.append((name, entries[0], questions))
        elif kind == "manner":
            world.manners[name] = entries
        elif kind.startswith("about "):
            rows = {word: facts for word, *facts in (row.split(", ") for row in entries)}
            world.choices[kind.removeprefix("about ")] = list(rows)
            for word, facts in rows.items():
                world.about[word] = dict(zip(name.split(", "), facts, strict=True))
        else:
            setattr(world, kind.replace(" ", "_"), entries)

    choices = world.choices
    world.edible = choices["fruit"] + choices["vegetable"] + choices["snack"]
    choices["item"] = world.edible + choices["thing"] + choices["small"]
    choices["A"] = choices["B"] = choices["C"] = world.girls + world.boys
    world.plurals = dict(row.split(", ") for row in world.plurals)
    world.facts = 4 * world.facts_with_slots + world.facts
    world.greetings = [tuple(row.split(" -> ")) for row in world.greetings]
    world.thanks = [tuple(row.split(" -> ")) for row in world.thanks]
    return world


def plural(noun):
    """'cup' -> 'cups', 'box' -> 'boxes', 'berry' -> 'berries', 'leaf' -> 'leaves'"""
    regular = re.sub(r"(?<=[^aeiou])y$", "ie", noun)
    ending = "es" if re.search(r"(s|x|ch|sh)$", noun) else "s"
    return toy_world().plurals.get(noun, regular + ending)


def fill(rng, template, slots):
    """Fills in a template. A choice is kept in `slots`, so that every later mention is the same."""
    world = toy_world()

    def choices(name):
        return world.choices.get(name.rstrip("23"))

    def choose(name):
        while name not in slots:
            word = rng.choice(choices(name))
            if word not in slots.values():
                slots[name] = word
        return str(slots[name])

    def text_of(match):
        key = match[1]
        name = ".".join(part if choices(part) else part.lower() for part in key.split("."))
        who, _, form = name.rpartition(".")
        if " " in name:  # {n coins}, {n items}: "1 leaf", "2 leaves"
            number, nouns = name.split()
            noun = choose(nouns[:-1]) if choices(nouns[:-1]) else nouns[:-1]
            text = f"{slots[number]} {noun if slots[number] == 1 else plural(noun)}"
        elif who or form in HE:  # {critter.says}, {n.word}, {B.his}, {his}
            text = world.about[choose(who or "A")][form]
        elif name[-1] == "s" and choices(name[:-1]):  # {items}
            text = plural(choose(name[:-1]))
        else:
            text = choose(name)
        if name == key:
            return text
        return text[0].upper() + text[1:]  # {He}; A, B and C are names, which have their capital

    while "[" in template:  # the innermost first, so that choices may hold choices
        template = re.sub(r"\[([^][]*)\]", lambda m: rng.choice(m[1].split("|")), template)
    text = re.sub(r"\{(.+?)\}", text_of, " ".join(template.split()))
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text).strip()


def small_numbers(rng, largest=20):
    """n, m, their sum, their difference and what comes after m, all from 1 to `largest`."""
    m = rng.randint(1, largest // 3)
    n = m + rng.randint(1, largest - 2 * m)
    return dict(n=n, m=m, total=n + m, left=n - m, next=m + 1)


def work_out(n, sign, m):
    """A sum of two-digit numbers in steps that are easy to know by heart, the result last."""
    (tens_n, ones_n), (tens_m, ones_m) = (divmod(n, 10), divmod(m, 10))
    direction = 1 if sign == "+" else -1
    tens, ones = 10 * (tens_n + direction * tens_m), ones_n + direction * ones_m
    return (
        f"{10 * tens_n} {sign} {10 * tens_m} = {tens}, {ones_n} {sign} {ones_m} = {ones}, "
        f"{tens} + {ones} = {tens + ones}."
    )


def two_digits(rng):
    """A sum of two-digit numbers, or a difference without borrowing: n, sign, m, result."""
    if rng.random() < 0.5:
        n = rng.randint(10, 89)
        m = rng.randint(10, 99 - n)
        return n, "+", m, n + m
    n = rng.randint(11, 99)
    m = 10 * rng.randint(1, n // 10) + rng.randint(0, n % 10)
    return (n, "-", m, n - m) if m < n else two_digits(rng)


def story(rng):
    """A story, its filled slots, what it is about, and questions about it (both as templates)."""
    world = toy_world()
    topic, plot, questions = rng.choice(world.plots)
    slots = small_numbers(rng)
    beginning = rng.choice(world.beginnings).replace("{topic}", topic)
    text = fill(rng, f"{beginning} {plot} {rng.choice(world.endings)}", slots)
    return text, slots, topic, questions


def events(sign, slots):
    """What can happen to a pile of things: it grows ("+") or shrinks."""
    world = toy_world()
    if sign == "+":
        return world.gains
    return world.losses + world.eaten if slots["item"] in world.edible else world.losses


def counting(rng):
    """Things gained and lost, and how many there are after each time."""
    if rng.random() < 0.5:
        return fill(rng, rng.choice(toy_world().counting), small_numbers(rng))
    largest = rng.choice([20, 20, 20, 99])
    n = rng.randint(2, largest)
    slots = dict(n=n)
    sentences = [fill(rng, "{A} has {n items}.", slots)]
    for _ in range(rng.randint(2, 4)):
        sign = "+" if n == 1 or (n < largest and rng.random() < 0.5) else "-"
        m = rng.randint(1, largest - n if sign == "+" else n - 1)
        before, n = n, n + m if sign == "+" else n - m
        slots.update(n=n, m=m)
        sentences.append(fill(rng, rng.choice(events(sign, slots)), slots))
        result = f"[|{before} {sign} {m} = {n}. ]Now {{A}} has {{n items}}."
        sentences.append(fill(rng, result, slots))
    return " ".join(sentences)


def word_problem(rng):
    """A problem, its answer as a number, a noun and a sentence, and the way to work it out."""
    n, sign, m, result = two_digits(rng)
    slots = dict(n=n, m=m, result=result)
    start = fill(rng, "{A} has {n items}.", slots)
    if sign == "+" and rng.random() < 0.25:
        event, do, has, who, when = "{B} has {m items}.", "do", "have", "{A} and {B}", "together"
    else:
        event, do, has, who = rng.choice(events(sign, slots)), "does", "has", "{A}"
        when = "now" if sign == "+" else "left"
    question = fill(rng, f"{event} How many {{items}} {do} {who} have {when}?", slots)
    return dict(
        prompt=f"{start} {question}",
        answer=str(result),
        noun=plural(slots["item"]),
        sentence=fill(rng, f"{who} {has} {{result items}} {when}.", slots),
        working=work_out(n, sign, m),
    )


def worked_or_not(rng, working, sentence):
    """An answer, mostly not worked out: RL is to find which way is right more often."""
    return f"{working} {sentence}" if rng.random() < 0.4 else sentence


def sums(rng):
    """A page of arithmetic: the single steps of sums, to be known by heart; sums; word problems."""
    page = rng.choice(["steps", "sums", "problems", "problems"])
    if page == "steps":
        worked = [work_out(*two_digits(rng)[:3]).rstrip(".").split(", ") for _ in range(14)]
        return " ".join(f"{rng.choice(steps)}." for steps in worked)
    if page == "sums":
        rows = [two_digits(rng) for _ in range(rng.randint(3, 5))]
        return "\n".join(
            f"What is {n} {sign} {m}? {work_out(n, sign, m)} The answer is {result}."
            for n, sign, m, result in rows
        )
    problems = [word_problem(rng) for _ in range(rng.randint(2, 4))]
    answers = [worked_or_not(rng, p["working"], p["sentence"]) for p in problems]
    return "\n".join(f"{p['prompt']} {a}" for p, a in zip(problems, answers, strict=True))


def split_question(text):
    """'Who won? Tom won.' -> ('Who won?', 'Tom won.')"""
    question, _, answer = text.partition("? ")
    return question + "?", answer


def facts(rng):
    """Some things that are always true, as questions with answers or as statements."""
    with_questions = rng.random() < 0.5
    count, templates = rng.randint(5, 9), toy_world().facts
    filled = [fill(rng, rng.choice(templates), small_numbers(rng)) for _ in range(count)]
    return " ".join(fact if with_questions else split_question(fact)[1] for fact in filled)


def reading(rng):
    """A story, sometimes with a question about it and the answer."""
    text, slots, _, questions = story(rng)
    if rng.random() < 0.8:
        return text
    return f"{text}\n{fill(rng, rng.choice(questions), slots)}"


def toy_stories(seed=1337, count=30_000):
    """Yields the documents of the pretraining text, no two the same."""
    write = {"story": reading, "counting": counting, "sums": sums, "facts": facts}
    rng, seen = random.Random(f"stories {seed}"), set()
    while len(seen) < count:
        text = write[rng.choices(list(TOY_SHARES), TOY_SHARES.values())[0]](rng)
        if text not in seen:
            seen.add(text)
            yield text


def toy_sums(seed=1337, count=4_000):
    """Yields word problems with answers that can be checked: see word_problem."""
    rng, seen = random.Random(f"sums {seed}"), set()
    while len(seen) < count:
        problem = word_problem(rng)
        if problem["prompt"] not in seen:
            seen.add(problem["prompt"])
            yield problem


def toy_questions(seed=1337, count=4_000):
    """Yields questions about stories and facts with answers that can be checked."""
    rng = random.Random(f"questions {seed}")
    for _ in range(count):
        question, answer = turns(rng, ("reading", "fact"))[0]
        yield dict(prompt=question, answer=answer)


def toy_problems(seed=1337, count=4_000):
    """Yields toy_sums with a fact in place of every other: a model that is rewarded for sums alone
    soon answers everything with a sum.

    A fact is asked after a greeting. Data is held out by its prompt: without, a fact that is held
    out would be missing from training, and the facts that are there would take its place.
    """
    rng, greetings = random.Random(f"problems {seed}"), toy_world().greetings
    for problem in toy_sums(seed, count):
        if rng.random() < 0.5:
            question, answer = turns(rng, ("fact",))[0]
            greeting, welcome = rng.choice(greetings)
            prompt = [
                dict(role="user", content=greeting),
                dict(role="assistant", content=welcome),
                dict(role="user", content=question),
            ]
            problem = dict(prompt=prompt, answer=answer)
        yield problem


TURNS = ("reading", "reading", "reading", "fact", "story", "problem", "problem", "sum")


def turns(rng, kinds=TURNS):
    """What a person may ask, in one or two turns: [(question, plain answer), ...]"""
    world, kind = toy_world(), rng.choice(kinds)
    if kind in ("reading", "story"):
        text, slots, topic, questions = story(rng)
        if kind == "story":
            request = rng.choice(world.requests).replace("{topic}", topic)
            return [(fill(rng, request, slots), text)]
        pairs = [split_question(fill(rng, q, slots)) for q in rng.sample(questions, 2)]
        return [(f"{text}\n{pairs[0][0]}", pairs[0][1])] + pairs[1 : rng.randint(1, 2)]
    if kind == "fact":
        return [split_question(fill(rng, rng.choice(world.facts), small_numbers(rng)))]
    if kind == "problem":
        problem = word_problem(rng)
        return [(problem["prompt"], worked_or_not(rng, problem["working"], problem["sentence"]))]
    n, sign, m, result = two_digits(rng)
    answer = worked_or_not(rng, work_out(n, sign, m), f"The answer is {result}.")
    return [(f"What is {n} {sign} {m}?", answer)]


def toy_chat(seed=1337, count=8_000):
    """Yields conversations, lists of {"role", "content"}: stories, questions, facts and sums."""
    world, rng = toy_world(), random.Random(f"chat {seed}")
    for _ in range(count):
        pairs, manner = turns(rng), rng.choice(CHAT_MANNERS)
        if manner != "plain":
            pairs = [(q, f"{rng.choice(world.manners[manner])} {answer}") for q, answer in pairs]
        if rng.random() < 0.1:
            pairs.insert(0, rng.choice(world.greetings))
        if rng.random() < 0.1:
            pairs.append(rng.choice(world.thanks))
        messages = []
        for question, answer in pairs:
            messages.append(dict(role="user", content=question))
            messages.append(dict(role="assistant", content=answer))
        yield messages


def toy_prefs(seed=1337, count=3_000):
    """Yields preferences: prompt, chosen, rejected, which differ in the manner only."""
    manners, rng = toy_world().manners, random.Random(f"prefs {seed}")
    for _ in range(count):
        prompt, answer = turns(rng, ("reading", "fact", "problem", "sum"))[0]
        kind, curt = rng.choice(list(zip(manners["kind"], manners["curt"], strict=True)))
        yield dict(prompt=prompt, chosen=f"{kind} {answer}", rejected=f"{curt} {answer}")


def toy_verify(prompt, completion, answer):
    """1.0 if the completion ends in the sentence that answers the question, else 0.0.

    For "How many coins does Tom have left?" any whole sentence will do that says rightly who has
    how many of what. What comes before is free: there a model may be kind, or work the sum out."""
    last = re.split(r"(?<=[.!?])\s+", completion.strip())[-1]
    question = r"How many (\w+) do(?:es)? (\w+|\w+ and \w+) have (now|left|together)\?$"
    matches = re.findall(question, prompt)
    if not matches or not answer.isdigit():
        return float(bool(answer) and last == answer)
    noun, who, when = matches[-1]
    if answer == "1":
        noun = {plural(item): item for item in toy_world().choices["item"]}.get(noun, noun)
    has = "have" if " and " in who else "has"
    right = rf"(So |Now )?{who} {has} {answer} {noun}( {when})?[.!]"
    return float(bool(re.fullmatch(right, last)))


# -----------------------------------------------------------------------------
# From a source to the output files, part by part
#
# A part is BLOCKS_PER_PART Blocks of one File, encoded by one worker. It writes
# part-0003-00012.train.bin and so on, and last part-0003-00012.json: with it a part is complete.
# A run that was killed makes the parts that are missing. At the end they are joined in order.

OUTPUTS = [f"{split}.{kind}" for split in ("train", "val") for kind in ("bin", "mask", "jsonl")]


class Total:
    """What the parts amount to, up to max_tokens training tokens. `pieces`: [(path of a part
    without its ending, {output: bytes of it that are taken})]. `problem`: why the source is
    refused."""

    def __init__(self, encoder, max_tokens, max_unusable):
        self.encoder, self.max_tokens, self.max_unusable = encoder, max_tokens, max_unusable
        self.count, self.examples, self.pieces = collections.Counter(), [], []
        self.problem, self.next_held_out, self.is_one_text = "", [], False

    def full(self):
        enough = bool(self.max_tokens) and self.count["train_tokens"] >= self.max_tokens
        return enough or bool(self.problem)

    def add(self, part):
        taken, start = collections.Counter(), self.count["train_tokens"]
        for block in read_json(part + ".json")["blocks"]:
            if self.full():
                break
            count, sizes = collections.Counter(block["count"]), block["sizes"]
            room = self.max_tokens - self.count["train_tokens"]
            if self.max_tokens and count["train_tokens"] > room:
                before = self.count["train_tokens"] - start
                self.shorten(part, before, count, sizes, room, block["kind"])
            self.count.update(count)
            taken.update(sizes)
            self.examples = (self.examples + block["examples"])[:3]
            self.is_one_text = block["kind"] in ("train", "val")
            documents = self.next_held_out + block["next_held_out"]
            self.next_held_out = lowest(documents, self.encoder.window)
            wrong, documents = self.count["wrong"], self.count["documents"]
            if wrong > 20 + self.max_unusable * (wrong + documents):
                self.problem = (
                    f"{wrong} of the first {counted(wrong + documents, 'record')} are unusable, "
                    f"more than 20 and --max_unusable={self.max_unusable}"
                )
        self.pieces.append((part, taken))

    def shorten(self, part, before, count, sizes, room, kind):
        """Takes of a block's training tokens those up to the end of the document in which `room`
        tokens are reached, or of a single document exactly `room`. `before`: the training tokens
        in front of the block in its part."""
        encoder = self.encoder
        offset, tokens = before * encoder.dtype.itemsize, count["train_tokens"]
        ids = np.fromfile(f"{part}.train.bin", encoder.dtype, tokens, offset=offset)
        ends, cut = np.array([], int), room
        if kind not in ("train", "val"):
            ends = np.flatnonzero(ids == encoder.tokenizer.eos_id) + 1
            cut = int(ends[np.searchsorted(ends, room)])
        dropped = int((ends > cut).sum())
        count["bytes"] -= int(count["bytes"] * (tokens - cut) / tokens)
        count["documents"] -= dropped
        count["train_documents"] -= dropped
        count["train_tokens"] = cut
        sizes["train.bin"] = cut * encoder.dtype.itemsize
        if "train.mask" in sizes:
            sizes["train.mask"] = cut

    def for_example(self):
        return f" (for example {'; '.join(self.examples)})" if self.examples else ""

    def share_needed(self):
        """The encoder's val_fraction, or a larger one if that held out too little: less than a
        document, or than a window, unless training would be left with less than two windows."""
        share, window, count = self.encoder.val_fraction, self.encoder.window, self.count
        total = count["train_tokens"] + count["val_tokens"]
        wanted = min(window + 1, max(total // 10, total - 2 * window))
        missing = wanted - count["val_tokens"]
        if self.is_one_text:
            return min(0.5, max(1.02 * share, wanted / total)) if missing > 0 else share
        held_out, left = count["val_documents"], count["train_documents"]
        for order, tokens in self.next_held_out:  # by their hashes, the lowest first
            if left < 2 or (held_out and missing <= 0):
                break
            share = math.nextafter(order / 2**64, 1)
            held_out, left, missing = held_out + 1, left - 1, missing - tokens
        return share


def pack(files, encoder, partial, max_tokens, workers, max_unusable):
    """Writes train.bin, val.bin and the like into the directory `partial`. Returns the Total."""
    workers = workers or os.cpu_count() or 1
    total, queue = Total(encoder, max_tokens, max_unusable), collections.deque()

    def collect(waiting):
        """Adds the oldest parts to the total, until `waiting` are left."""
        while len(queue) > waiting and not total.full():
            part, future = queue.popleft()
            if future:
                future.result()
            total.add(part)

    title = os.path.basename(partial).removesuffix(".partial")
    bar = progress(desc=title, unit="B", total=sum(f.size for f in files))
    pool, fetcher = _workers(workers, encoder), concurrent.futures.ThreadPoolExecutor(1)
    try:
        for part, job, done in _parts(files, partial, total, collect, fetcher):
            queue.append((part, pool.submit(_encode_part, *job) if job else None))
            collect(2 * workers)
            if encoder.tokenizer:
                tokens = total.count["train_tokens"] / 1e6
                bar.set_postfix_str(f"{tokens:.1f}M tokens", refresh=False)
            bar.update(done - bar.n)
        collect(0)
    except concurrent.futures.BrokenExecutor:
        raise UserError(
            f"{title}: a worker was killed, most likely because memory ran out; the same command "
            "with a smaller --workers= continues"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        fetcher.shutdown()
        bar.close()
    total.crc32 = _join(total.pieces, partial)
    return total


def _parts(files, partial, total, collect, fetcher):
    """Until `total` is full, for each part: its path, the arguments of _encode_part (None if it is
    there already), and how many bytes of the source have been read."""
    encoder, done, size = total.encoder, 0, BLOCKS_PER_PART
    if total.max_tokens:  # small parts: those under way when it is reached are wasted
        size = min(BLOCKS_PER_PART, max(1, total.max_tokens >> 25))
    for i, file in enumerate(files):
        if total.max_tokens:
            collect(0)  # to know whether this file is needed
        if total.full():
            return
        part_of_file = os.path.join(partial, f"part-{i:04d}")
        complete = _complete_parts(part_of_file)
        for part in complete:
            yield part, None, done
        blocks = []
        if not complete:
            _fetch_next(fetcher, files, i, total)
            blocks = read_blocks(file, len(files) == 1, encoder.fields, encoder.val_fraction)
        for j, (group, is_last) in enumerate(_groups(blocks, size)):
            if total.full():
                return
            part = f"{part_of_file}-{j:05d}"
            job = None if _is_complete(part) else (file, group, part, is_last)
            yield part, job, done + group[-1].read
        done += file.size


def _groups(items, size):
    """Lists of `size` items, and whether each is the last."""
    group = []
    for item in items:
        if len(group) == size:
            yield group, False
            group = []
        group.append(item)
    if group:
        yield group, True


def _complete_parts(part_of_file):
    """The parts of a File, if all of them are there already; else none."""
    parts = []
    while _is_complete(f"{part_of_file}-{len(parts):05d}"):
        parts.append(f"{part_of_file}-{len(parts):05d}")
        if read_json(parts[-1] + ".json")["last"]:
            return parts
    return []


def _is_complete(part):
    """Whether a part is there with all its bytes, of which a power failure may have lost some."""
    sizes = collections.Counter()
    try:
        for block in read_json(part + ".json")["blocks"]:
            sizes.update(block["sizes"])
        return all(os.path.getsize(f"{part}.{name}") == size for name, size in sizes.items())
    except (OSError, UserError):
        return False


def _fetch_next(fetcher, files, i, total):
    """Begins to download the file after file i, if that will be needed."""
    if i + 1 >= len(files) or not files[i + 1].repo:
        return
    expected = total.count["train_tokens"] * (i + 1) / i if i else math.inf
    if not total.max_tokens or expected < total.max_tokens:
        fetcher.submit(local_path, files[i + 1])  # an error is raised when it is asked for again


def _join(pieces, partial):
    """Writes the output files from those of the parts, in order. Returns their checksums, of what
    was written: see checksum()."""
    checksums = {}
    for name in OUTPUTS:
        output = os.path.join(partial, name)
        of_parts = [(f"{part}.{name}", taken[name]) for part, taken in pieces if taken[name]]
        if not of_parts:
            if os.path.exists(output):
                os.remove(output)
            continue
        crc = 0
        with open(output, "wb") as out:
            for path, size in of_parts:
                with open(path, "rb") as f:
                    data = f.read(size)
                out.write(data)
                crc = zlib.crc32(data, crc)
        checksums[name] = f"{crc:08x}"
    return checksums


def _encode_part(file, blocks, part, is_last):
    """In a worker: encodes Blocks and writes the files of a part."""
    outputs, rows = collections.defaultdict(list), []
    for block in blocks:
        result = _worker.encoder(file, block)
        for name, data in result.out.items():
            outputs[name].append(data)
        result.count["wrong"] = len(result.wrong)
        unit = dict(lines="line", records="record", rows="row").get(block.kind, "byte")
        examples = [f"{file.path}, {unit} {at}: {why}" for at, why in result.wrong[:3]]
        if result.broken_at is not None:
            examples.append(f"{file.path}, byte {result.broken_at}: not UTF-8, or zero")
        sizes = {name: len(data) for name, data in result.out.items()}
        row = dict(kind=block.kind, count=result.count, sizes=sizes, examples=examples)
        rows.append(row | dict(next_held_out=result.next_held_out))
    for name, data in outputs.items():
        with open(f"{part}.{name}", "wb") as f:
            f.writelines(data)
    write_json(part + ".json", dict(blocks=rows, last=is_last), sync=False)


def _workers(count, encoder):
    """A pool whose workers have the encoder.

    With tiktoken, two processes encode 2.0 times as fast as one, two threads 1.6 times, since they
    share its regular expressions; `tokenizers` and numpy use all cores from threads. Only a fork is
    sure not to run the caller's script again, so it is threads on other systems than Linux."""
    engine = encoder.tokenizer and encoder.tokenizer.engine
    if sys.platform == "linux" and isinstance(engine, TiktokenEngine) and count > 1:
        fork = multiprocessing.get_context("fork")
        return concurrent.futures.ProcessPoolExecutor(count, fork, _adopt, (encoder, True))
    return concurrent.futures.ThreadPoolExecutor(
        count, initializer=_adopt, initargs=(encoder, False)
    )


_worker = types.SimpleNamespace(
    encoder=None
)  # pickled with each part, it would cost more than that


def _adopt(encoder, is_process):
    _worker.encoder = encoder
    if is_process:
        # PR_SET_PDEATHSIG: the worker ends when its parent is killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent


# -----------------------------------------------------------------------------
# One data set


def prepare(
    source, tokenizer="", name="", data_dir="data", max_tokens=0, field="", config="", split="",
    as_="", val_fraction=None, keep_crlf=False, max_unusable=0.05, block_size=0, workers=0,
    seed=1337, advise=True,
):  # fmt: skip
    """Makes data/<name>/ from a known name, a file, a folder or hub:owner/name, and returns that
    directory. The arguments are the keys of the config block; `advise`: what to type next is
    printed.

    Killed at any moment and started again, it continues; what was there before is replaced only
    when the new data is complete. Raises UserError for whatever the user can correct."""
    known = KNOWN.get(source, {})
    if known and os.path.exists(source):
        print(f"{source} is the known data set; ./{source} would be what lies here")
    usual = _name_of(source)  # which refuses a source that is not there
    name = name or usual
    _check_name(name, source)
    counts = dict(max_tokens=max_tokens, block_size=block_size, workers=workers, seed=seed)
    _check_ranges(val_fraction, max_unusable, as_, counts)
    target = os.path.join(data_dir, name)
    check_target(target, "data set", [source] if os.path.exists(source) and not known else [])

    tokenizer = tokenizer or known.get("tokenizer", "")
    if "toy" in known and tokenizer == "toy":  # the toy sets share the tokenizer of the toy text
        tokenizer = _toy_tokenizer(data_dir, workers, seed)
    # what the output depends on; the stamp in meta.json is a hash of it and of the files
    settings = dict(version=1, name=name, source=source, max_tokens=int(max_tokens), field=field)
    settings |= dict(shape=as_ or known.get("as_", ""))
    settings |= dict(val_fraction=val_fraction or known.get("val_fraction"))
    settings |= dict(block_size=block_size, tokenizer=tokenizer)
    if keep_crlf:  # the stamps of data sets made before do not have it
        settings["keep_crlf"] = True
    with _working_directory(target) as partial:
        if "bins" in known:
            made = _take_bins(known, partial, target)
        else:
            files = _source_files(source, known, partial, config, split, seed)
            made = _make(files, settings, partial, target, workers, max_unusable)
        if not made:
            print(f"{target} holds this already")
            remove_directory(partial, "data set")
            return target
        remove_files(partial, "data set", keep=FINISHED)
        publish(partial, target)
    _report(target)
    if advise:
        print(f"next: {_next_command(target, settings['tokenizer'])}")
    return target


def _check_ranges(val_fraction, max_unusable, as_, counts):
    """The configurator checks the command line; this is for those who call prepare()."""
    for key, value in counts.items():
        if value < 0:
            raise UserError(f"--{key}={value}: 0 or more is wanted")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction={val_fraction}: a share between 0 and 1 is wanted")
    if not 0 <= max_unusable <= 1:
        raise UserError(f"--max_unusable={max_unusable}: a share from 0 to 1 is wanted")
    if as_ not in ("", "text", *SHAPES):
        raise UserError(f"--as={as_}: one of text, chat, prefs, verify")


def _name_of(source):
    """The name of a data set that was given none: that of its source, without the endings and the
    characters that a name can't have. UserError if there is no such source."""
    if source in KNOWN:
        return source
    if not os.path.exists(source) and not source.startswith("hub:"):
        close = difflib.get_close_matches(source, KNOWN, n=3, cutoff=0.5)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            close = [f"hub:{source}"]
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UserError(
            f"{source}: no such file or folder, nor a known data set{hint} "
            "(python prepare.py lists them)"
        )
    base = os.path.basename(os.path.abspath(source))
    for ending in (*COMPRESSED, *KINDS):
        base = base.removesuffix(ending)
    return "_".join(re.findall(r"[\w.+-]+", base)) or base


@contextlib.contextmanager
def _working_directory(target):
    """The directory beside `target` in which it is made, locked. It stays if parts of it were made
    that the same command can go on from."""
    partial = _real_place(target) + ".partial"
    os.makedirs(partial, exist_ok=True)
    problem = "another process is preparing this data set; wait for it, or choose another --name="
    handle = lock(partial, problem)
    try:
        if not os.path.exists(os.path.join(partial, "partial.json")):
            write_json(os.path.join(partial, "partial.json"), dict(stamp=""))
        yield partial
    except BaseException:
        with contextlib.suppress(OSError):
            if not _parts_in(partial):
                remove_directory(partial, "data set")
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _source_files(source, known, partial, config, split, seed):
    """The Files of a source."""
    if "toy" in known:
        files = _toy_files(known, partial, seed)
    elif "get" in known:
        files = local_files(download(*known["get"]))
    elif known or not os.path.exists(source):
        repo = known.get("hub") or source.removeprefix("hub:")
        folder, pattern = config or known.get("config", ""), known.get("files", "")
        files = hub_files(repo, folder, split, pattern)
    elif config or split:
        key, value = ("config", config) if config else ("split", split)
        raise UserError(
            f"--{key}={value} chooses files of hub:...; of the local {source} name the one file or "
            "folder that is wanted"
        )
    else:
        files = local_files(source)
    if not sum(f.size for f in files):
        raise UserError(f"{source}: empty, there is no text in it")
    if len(files) == 1 and _kind_of(files[0].path)[0] == "text" and _kind_of(files[0].path)[1]:
        return _unpacked(files, os.path.join(partial, "source.txt"))
    return files


def _unpacked(files, path):
    """A compressed text: if it is a single document, as a plain file, since its end is read first;
    else `files` as they are."""
    ended = False
    with open(path, "wb") as out:
        for block in read_blocks(files[0], only=False):
            text, *rest = block.data.split(EOT.encode())
            if (ended and text.strip()) or any(piece.strip() for piece in rest):
                return files
            ended = ended or bool(rest)
            out.write(block.data)
    return local_files(path)


def _toy_tokenizer(data_dir, workers, seed):
    directory = os.path.join(data_dir, "toy")
    if not os.path.exists(os.path.join(directory, "tokenizer.json")):
        prepare("toy", data_dir=data_dir, workers=workers, seed=seed, advise=False)
    return directory


def _toy_files(known, partial, seed):
    """Writes a text of the toy world, the same for the same seed; with `as_` it is records."""
    write = dict(
        stories=toy_stories,
        chat=toy_chat,
        prefs=toy_prefs,
        sums=toy_sums,
        questions=toy_questions,
        problems=toy_problems,
    )
    path = os.path.join(partial, "toy.jsonl" if "as_" in known else "toy.txt")
    with open(path, "w", encoding="utf-8") as f:
        for document in write[known["toy"]](seed):
            if isinstance(document, str):
                f.write(f"{document}\n{EOT}\n")
            else:
                record = dict(messages=document) if isinstance(document, list) else document
                f.write(json.dumps(record, ensure_ascii=False) + "\n")
    return local_files(path)


def _take_bins(known, partial, target):
    """A data set that is tokenized already: the bins and the tokenizer of a Hub repository. False
    if `target` holds the same."""
    repo, folder = known["hub"], known["bins"]
    files = {f.path: f for f in hub_list(repo)}
    bins = {split: f"{folder}/{split}.bin" for split in ("train", "val")}
    tokenizers = [p for p in sorted(files, key=len) if os.path.basename(p) == "tokenizer.json"]
    if not tokenizers or not all(path in files for path in bins.values()):
        raise UserError(
            f"{repo}: {folder}/train.bin, val.bin or tokenizer.json is not there any more"
        )
    stamp = files[bins["train"]].revision
    if _is_made(target, stamp):
        return False
    say_what_is_replaced(target)
    _check_space(partial, 2 * sum(files[path].size for path in bins.values()))
    tokenizer = load_tokenizer(local_path(files[tokenizers[0]]))
    tokenizer.name = repo
    meta = dict(name=os.path.basename(target), source=repo, stamp=stamp, kind="text")
    meta |= _ids_of(tokenizer)
    crc32 = meta["crc32"] = {}
    for split, path in bins.items():
        fetched = local_path(files[path])
        shutil.copyfile(fetched, os.path.join(partial, split + ".bin"))
        ids = np.memmap(fetched, meta["dtype"], "r")
        if len(ids) == 0 or int(ids[: 1 << 24].max()) >= tokenizer.vocab_size:
            raise UserError(
                f"{repo}: {split}.bin holds ids beyond its tokenizer's {tokenizer.vocab_size}"
            )
        meta[split + "_tokens"] = len(ids)
        crc32[split + ".bin"] = checksum(os.path.join(partial, split + ".bin"))
    tokenizer.save(partial)
    crc32["tokenizer.json"] = checksum(os.path.join(partial, "tokenizer.json"))
    write_json(os.path.join(partial, "meta.json"), meta)
    return True


def _ids_of(tokenizer):
    dtype = _dtype(tokenizer).name
    ids = dict(vocab_size=tokenizer.vocab_size, dtype=dtype, eos_id=tokenizer.eos_id)
    return dict(tokenizer=tokenizer.name, **ids)


def _make(files, settings, partial, target, workers, max_unusable):
    """Encodes the files into the directory `partial`; False if `target` holds the same already."""
    # a folder may hold links to files of the target
    check_target(target, "data set", [f.path for f in files if os.path.islink(f.path)])
    is_given = settings["val_fraction"] is not None
    field, first = _decide(files, settings)
    stamp = _stamp(files, dict(settings, field=field), partial)
    if _is_made(target, stamp):
        return False
    say_what_is_replaced(target)
    share = _continue_or_clear(partial, stamp, settings["val_fraction"])
    tokenizer = None  # preferences and problems stay text, for any model's own tokenizer
    if settings["shape"] in ("text", "chat"):
        tokenizer = _tokenizer_for(files, settings, partial).fast()
    encoder, max_tokens = _encoder(tokenizer, settings, share), settings["max_tokens"]
    print_first(encoder, first)
    _check_space(partial, _estimate(files, encoder, max_tokens))
    while True:
        total = pack(files, encoder, partial, max_tokens, workers, max_unusable)
        share = total.share_needed()
        if total.problem or share == encoder.val_fraction or (total.is_one_text and is_given):
            break
        encoder.val_fraction = share
        _begin(partial, stamp, share)

    problem = total.problem + total.for_example() if total.problem else ""
    if not problem:
        _say_what_was_done(settings, total)
        problem = _missing_split(total, tokenizer)
    if problem:
        remove_files(partial, "data set")
        raise UserError(f"{settings['source']}: {problem}")
    meta = _meta_of(settings, stamp, total.count, tokenizer)
    meta["crc32"] = total.crc32
    if tokenizer:
        meta["crc32"]["tokenizer.json"] = checksum(os.path.join(partial, "tokenizer.json"))
    write_json(os.path.join(partial, "meta.json"), meta)
    return True


def _encoder(tokenizer, settings, share=0.0):
    shape, field, block_size = (settings[key] for key in ("shape", "field", "block_size"))
    keep_crlf = settings.get("keep_crlf", False)
    return Encoder(tokenizer, shape, field, share, block_size, keep_crlf)


def _decide(files, settings):
    """Fills in the settings that were left open and follow from the source. Returns the field of
    its text, and its first Block."""
    source = settings["source"]
    shape, field, first = recognize(files, settings["shape"], settings["field"])
    settings["shape"] = shape
    if shape == "prefs" or (first.kind != "rows" and b"\r" in first.data):
        settings["version"] = 2  # version 1 read these differently; what it made is made again
    if settings["val_fraction"] is None:
        is_one_text = first.kind in ("train", "val")
        settings["val_fraction"] = 0.1 if is_one_text else 0.005
    if not settings["tokenizer"]:
        settings["tokenizer"] = SMOLLM2 if source.startswith("hub:") else "bpe:4096"
        if shape == "chat":
            settings["tokenizer"] = _ask_for_tokenizer(source, settings["tokenizer"])
    return field, first


def _ask_for_tokenizer(source, usual):
    """The tokenizer of the model that conversations are for, which the user is asked for on a
    terminal. No model that is trained already has one that is trained on them."""
    print(
        f"{source} holds conversations, for a model with the same tokenizer: --tokenizer= its run "
        f"(out/...), directory or Hub id. Without one it is {usual}, for a new model"
    )
    answer = ""
    if sys.stdin and sys.stdin.isatty():
        with contextlib.suppress(EOFError):
            answer = input(f"tokenizer [{usual}]: ").strip()
    return answer or usual


def _meta_of(settings, stamp, count, tokenizer):
    meta = {key: settings[key] for key in ("name", "source", "val_fraction")}
    meta |= dict(kind=settings["shape"], stamp=stamp)
    meta |= dict(documents=count["documents"], bytes=count["bytes"])
    left_out = count["wrong"] + sum(count[reason] for reason in SKIPPED)
    meta |= dict(left_out=left_out, replaced_characters=count["broken"])
    if tokenizer:
        tokens = dict(train_tokens=count["train_tokens"], val_tokens=count["val_tokens"])
        return meta | _ids_of(tokenizer) | tokens
    return meta | dict(train_records=count["train_documents"], val_records=count["val_documents"])


def _say_what_was_done(settings, total):
    """Prints what else happened to the records than that they were encoded."""
    count, examples = total.count, total.for_example()
    for reason in SKIPPED:
        if count[reason]:
            print(f"left out: {counted(count[reason], 'record')} {reason}")
    if count["wrong"]:
        print(f"left out: {counted(count['wrong'], 'record')}{examples}")
    if count["no_number"] and "toy" not in KNOWN.get(settings["source"], {}):  # it has its own
        print(
            f"not one number: {count['no_number']} of {counted(count['documents'], 'answer')}; "
            "--verifier=number will leave them out (exact, regex:... or a .py file takes them)"
        )
    if count["broken"]:
        replaced = counted(count["broken"], "character")
        print(f"not UTF-8, or zero: {replaced} became U+FFFD{examples}")
    for ending in ("crlf", "cr"):
        if count[ending]:
            ends = counted(count[ending], "line end")
            print(f"{ending.upper()}: {ends} became LF; --keep_crlf keeps them")
    if total.encoder.val_fraction > settings["val_fraction"]:
        amount = f"{total.encoder.val_fraction:.1%} of the text"
        if not total.is_one_text:
            documents = counted(count["documents"], "document")
            amount = f"{count['val_documents']:,} of {documents}"
        print(
            f"held out: {amount}, more than val_fraction={settings['val_fraction']}, for a window "
            f"of {total.encoder.window} tokens to validate on"
        )


def _stamp(files, settings, partial):
    """A hash of all that the output depends on: settings, files and tokenizer."""
    parts = [settings]
    for f in files:
        if f.path.startswith(partial):
            parts.append([f.size, sha256(f.path)])
        else:
            version = f.digest or f.revision or os.stat(f.path).st_mtime_ns
            parts.append([f.path, f.size, version, f.split])
    path = tokenizer_file(settings["tokenizer"])
    parts.append(sha256(path) if os.path.isfile(path) else "")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_made(directory, stamp):
    """Whether a directory holds the data set with this stamp, complete, and as it was written."""
    try:
        meta = read_json(os.path.join(directory, "meta.json"))
        if meta.get("stamp") != stamp:
            return False
        _check_meta(directory, meta)
        width = np.dtype(meta.get("dtype", "uint8")).itemsize
        for split in ("train", "val"):
            size = width * meta.get(split + "_tokens", 0)
            if size and os.path.getsize(os.path.join(directory, split + ".bin")) != size:
                return False
        for name, crc in meta.get("crc32", {}).items():
            if checksum(os.path.join(directory, name)) != crc:
                print(f"{os.path.join(directory, name)}: {ALTERED}; it is made again")
                return False
        if "tokenizer" in meta:
            load_tokenizer(directory)
        return True
    except (OSError, UserError):
        return False


def _continue_or_clear(partial, stamp, share):
    """Keeps the parts that an earlier run with the same stamp made, and removes others. Returns the
    share that those parts hold out, or else `share`."""
    before = read_json(os.path.join(partial, "partial.json"))
    if before == _marker(stamp, before.get("share", share)):
        parts = _parts_in(partial)
        size = sum(os.path.getsize(os.path.join(partial, f)) for f in parts)
        if parts:
            print(f"going on after {size / 1e6:.1f} MB that were written before")
        return before["share"]
    remove_files(partial, "data set", keep=rf"partial\.json|{_SOURCE}")
    _begin(partial, stamp, share)
    return share


def _begin(partial, stamp, share):
    """Removes all parts, and notes what those to come depend on."""
    for name in _parts_in(partial):
        os.remove(os.path.join(partial, name))
    write_json(os.path.join(partial, "partial.json"), _marker(stamp, share))


def _marker(stamp, share):
    """The content of partial.json: what the parts in the directory depend on."""
    return dict(stamp=stamp, share=share, layout=[BLOCK, BLOCKS_PER_PART, LONGEST])


def _parts_in(partial):
    return [f for f in os.listdir(partial) if f.startswith("part-")]


def _tokenizer_for(files, settings, partial):
    """The tokenizer of a data set, saved in `partial`; that of an earlier run if it is there."""
    if os.path.exists(os.path.join(partial, "tokenizer.json")):
        return load_tokenizer(partial)
    wanted, max_tokens = settings["tokenizer"], settings["max_tokens"]
    most = min(1 << 30, 6 * max_tokens or 1 << 30)  # bytes: a vocabulary does not need more
    encoder = _encoder(None, settings)
    tokenizer = make_tokenizer(wanted, _texts(files, encoder, None if wanted == "char" else most))
    if settings["shape"] == "chat":
        tokenizer = with_chat_tokens(tokenizer)
    if not tokenizer.eos:
        raise UserError(
            f"--tokenizer={wanted}: it has no end-of-text token, as nanoGPT's character data has "
            "none, so documents can't be told apart; --tokenizer=char makes one that has"
        )
    tokenizer.save(partial)
    return tokenizer


def _texts(files, encoder, most=None):
    """The texts of a source, or about its first `most` bytes, to make a tokenizer from."""
    result, size = Encoded(), 0
    for file in files:
        for block in read_blocks(file, len(files) == 1, encoder.fields):
            if most and size > most:
                return
            if block.kind in ("train", "val"):
                yield encoder.text_of(block, result)
                size += len(block.data)
                continue
            for content, length in encoder.contents(block, result):
                if isinstance(content, str):
                    yield content
                else:
                    yield "\n".join(message["content"] for message in content)
                size += length


def _missing_split(total, tokenizer):
    """What is wrong if training or validation data came out empty; "" if neither did."""
    count, documents = total.count, total.count["documents"]
    if not documents:
        return f"nothing in it could be used{total.for_example()}"
    for split, use in (("train", "training"), ("val", "validation")):
        if count[split + ("_tokens" if tokenizer else "_documents")]:
            continue
        if total.is_one_text:
            return f"too short: {counted(count['bytes'], 'byte')} leave nothing for {use}"
        advice = "bring more, or a folder with a train and a val file of your own"
        if split == "train" and documents > 1:
            advice = "set a smaller --val_fraction, unless they are all equal"
        return f"of {counted(documents, 'document')} none fell into {split}; {advice}"
    return ""


def _estimate(files, encoder, max_tokens):
    """About how many bytes the output will take: twice, since the parts are joined at the end."""
    text = 0
    for f in files:
        kind, compression = _kind_of(f.path)
        growth = 2.5 if kind == "parquet" else 1
        text += f.size * (3.5 if compression else growth)
    if encoder.tokenizer is None:
        return 2 * text
    one_for_a_byte = isinstance(encoder.tokenizer.engine, (CharacterEngine, ByteEngine))
    tokens = text if one_for_a_byte else text / 3.5
    if max_tokens:
        tokens = min(tokens, max_tokens * 1.02)
    return 2 * tokens * (encoder.dtype.itemsize + (encoder.shape == "chat"))


def _check_space(directory, need):
    written = sum(os.path.getsize(os.path.join(directory, f)) for f in os.listdir(directory))
    free = shutil.disk_usage(directory).free + written
    if need > free:
        raise UserError(
            f"{directory}: about {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; "
            "free some, set --data_dir= elsewhere, or take less with --max_tokens="
        )


def _amount(meta):
    """How much a data set holds, in words."""
    what = "tokens" if "tokenizer" in meta else "records"
    train, val = (f"{meta[f'{split}_{what}']:,}" for split in ("train", "val"))
    amount = f"{train} training and {val} validation {what}"
    if "documents" not in meta:
        return amount
    return f"{counted(meta['documents'], 'document')}, {counted(meta['bytes'], 'byte')}, {amount}"


def _report(target):
    """Prints what a data set holds."""
    meta = read_json(os.path.join(target, "meta.json"))
    print(f"{target}: {meta['kind']} from {meta['source']}\n  {_amount(meta)}")
    if "tokenizer" in meta:
        tokens = meta["train_tokens"] + meta["val_tokens"]
        ratio = f", {meta['bytes'] / tokens:.2f} bytes a token" if meta.get("bytes") else ""
        ids = f"{meta['vocab_size']:,} ids, {meta['dtype']}"
        print(f"  tokenizer {meta['tokenizer']}, {ids}{ratio}")
        ids = np.fromfile(os.path.join(target, "train.bin"), meta["dtype"], 60)
        if meta["kind"] == "text":
            print(f"  begins: {load_tokenizer(target).decode(ids)!r}")


def _is_model(where):
    """Whether what names a tokenizer names a model too: its directory, a run, an id on the Hub."""
    if os.path.exists(where):
        return os.path.exists(os.path.join(where, "config.json")) or bool(checkpoints(where))
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", where))


def _next_command(target, tokenizer):
    """The command that trains on a data set. `tokenizer`: what the user asked for."""
    meta, dataset = read_json(os.path.join(target, "meta.json")), os.path.basename(target)
    stage = dict(chat="sft", prefs="dpo", verify="rlvr").get(meta["kind"])
    if stage and "toy" in KNOWN.get(meta["source"], {}):
        return f"python train.py config/toy_{stage}.py --dataset={dataset}"
    out_dir = "" if dataset == "toy" else f" --out_dir=out/{dataset}"
    if not stage:
        return f"python train.py --dataset={dataset}{out_dir}"
    model = tokenizer
    if not _is_model(tokenizer):
        model = "MODEL"
        note = "the records stay text, for the tokenizer of any model"
        if stage == "sft":
            note = "it needs this tokenizer; for another one prepare again with --tokenizer=MODEL"
        print(f"  MODEL is a run, a model directory or a Hub id: {note}")
    return f"python train.py --stage={stage} --init_from={model} --dataset={dataset}{out_dir}"


# -----------------------------------------------------------------------------
# Directories that this program may replace or remove: those that it wrote itself, and no others

_TOKENIZER = r"tokenizer(_config)?\.json"
_OUTPUT = r"(train|val)\.(bin|mask|jsonl)"
_SOURCE = r"(toy|source)\.(txt|jsonl)"  # what is written first, and read as the source
FINISHED = rf"{_OUTPUT}|meta\.json|{_TOKENIZER}"  # what is left of a data set when it is complete
IS_FILE = re.compile(FINISHED).fullmatch
WRITTEN = {  # kind of directory -> the names of the files that this program writes into it
    "data set": FINISHED + rf"|partial\.json|{_SOURCE}|part-\d+-\d+\.(json|{_OUTPUT})",
    "tokenizer": _TOKENIZER,
    "checkpoint": _TOKENIZER
    + r"|trainer\.pt|(config|generation_config)\.json|README\.md|loss\.png|[\w.-]+\.gguf"
    + r"|model[\w.-]*\.safetensors|model\.safetensors\.index\.json|chat_template\.jinja"
    + r"|(vocab|added_tokens|special_tokens_map)\.json|merges\.txt|tokenizer\.model",
}
# nobody's work: what file managers leave, and what write_json leaves when it is killed
_PASSING = r"\.DS_Store|Thumbs\.db|desktop\.ini|[\w-]+\.json\.tmp\d*"


def kind_of_directory(directory):
    """The kind of directory (see WRITTEN) that this program wrote here, by the file that marks it;
    None if it did not write it. A data set may be unfinished."""

    def has(name, *keys):
        try:
            return read_json(os.path.join(directory, name)).keys() >= set(keys)
        except UserError:
            return False

    files = os.listdir(directory) if os.path.isdir(directory) else []
    if "trainer.pt" in files and "config.json" in files:
        return "checkpoint"
    if has("meta.json", "stamp", "kind") or has("partial.json", "stamp"):
        return "data set"
    if "config.json" not in files and has("tokenizer_config.json", "nanosmol_name"):
        return "tokenizer"
    return None


def ours(directory):
    """Whether this program wrote a directory and all that is in it, so that it may be removed."""
    kind = kind_of_directory(directory)
    return kind is not None and not not_ours(directory, kind)


def not_ours(directory, kind):
    """Why a directory may not be replaced by a new one of this kind; "" if it may. What is of no
    kind (None) replaces nothing."""
    if not os.path.lexists(directory):
        return ""
    if kind is None:
        return "exists"
    if not os.path.isdir(directory):
        return "is not a directory"
    names = sorted(os.listdir(directory))
    for name in names:
        if not _is_written(os.path.join(directory, name), kind):
            return f"holds {name}, which is not a file of a {kind} that this program made"
    if all(re.fullmatch(_PASSING, name) for name in names) or kind_of_directory(directory) == kind:
        return ""
    return f"is not a {kind} that this program made"


def _is_written(path, kind):
    pattern = rf"({WRITTEN[kind]})(\.tmp\d*)?|{_PASSING}"
    if not re.fullmatch(pattern, os.path.basename(path)):
        return False
    return os.path.isfile(path) and not os.path.islink(path)


def remove_files(directory, kind, keep=""):
    """Removes the files that this program writes into a directory of this kind, but for those whose
    names match `keep`."""
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if _is_written(path, kind) and not re.fullmatch(keep, name):
            os.remove(path)


def remove_directory(directory, kind):
    """Removes a directory of this kind, or what is left of it. If it holds something else, that
    stays, and so does it."""
    if os.path.isdir(directory) and not os.path.islink(directory):
        remove_files(directory, kind)
        if not os.listdir(directory):
            os.rmdir(directory)


def check_target(target, kind, sources):
    """UserError, before any work, if writing to `target` would replace something that this program
    did not make, or its own source."""
    place = _real_place(target)
    written = (place, place + ".partial", _aside(place))
    another = "choose another --name= or --data_dir="
    for source in sources:
        if any(_is_inside(source, directory) for directory in written):
            raise UserError(f"{target} would replace its own source, {source}; {another}")
        if os.path.isdir(source) and _is_inside(place, source):
            raise UserError(
                f"{target} lies in the folder {source} that it would be made from; choose a "
                "--data_dir= outside of it"
            )
    restore(place, kind)
    for directory in written:
        reason = not_ours(directory, kind)
        if reason:
            raise UserError(
                f"{directory} {reason}, and would be replaced; {another}, or move it elsewhere"
            )


def say_what_is_replaced(target):
    """Prints, before the work, what the new `target` will replace once it is complete."""
    if not os.path.isdir(target) or not os.listdir(target):
        return
    what = "what was there"
    if kind_of_directory(target) == "data set":
        with contextlib.suppress(UserError, KeyError):
            meta = read_meta(target)
            what = f"what was made there from {meta['source']} ({_amount(meta)})"
    print(f"{target} replaces {what} as soon as it is complete")


LONGEST_NAME = 200  # bytes: file systems take 255, and .partial and the like come behind it


def _check_name(name, source):
    """UserError if `name` can't be the directory of a data set or tokenizer made from `source`."""
    if not re.fullmatch(r"[\w.+-]+", name) or not name.strip(".") or name.endswith(".partial"):
        raise UserError(
            f"--name={name}: letters, digits, '-', '_', '.' only, since it becomes a directory"
        )
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise UserError(f"--name={name[:40]}...: expected at most {LONGEST_NAME} bytes")
    if name.lower() in KNOWN and name != source:
        raise UserError(
            f"--name={name}: the name of a known data set (python prepare.py {name.lower()}), "
            f"which {source} would take over; choose another --name="
        )


def _real_place(target):
    """Where `target` is written: a link to a directory, on a larger disk say, stays a link."""
    return os.path.realpath(target) if os.path.islink(target) else target


def _is_inside(path, directory):
    """Whether `path` is `directory` or lies in it, however links or dots spell it."""
    path = pathlib.Path(os.path.realpath(path))
    places = [place for place in (path, *path.parents) if place.exists()]
    return os.path.isdir(directory) and any(os.path.samefile(p, directory) for p in places)


def lock(directory, problem):
    """Locks a directory until this process ends or closes the handle that is returned; None where
    there are no locks (Windows, some network drives). UserError if another process has locked it:
    `problem` says what that means."""
    try:
        import fcntl

        handle = os.open(directory, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except BlockingIOError:
        raise UserError(f"{directory}: {problem}") from None
    except (ImportError, OSError):
        return None


def publish(partial, target):
    """Gives the directory `partial` the name `target`, after all of it is on the disk.

    Only then the directory that had the name is removed. It must be of the same kind, written by
    this program, with nothing else in it; otherwise UserError, and nothing is changed."""
    kind = kind_of_directory(partial)
    target = _real_place(target)
    aside = _aside(target)
    restore(target, kind)
    for directory in (target, aside):
        reason = not_ours(directory, kind)
        if reason:
            raise UserError(f"{directory} {reason}; move it elsewhere, or choose another name")
    for name in os.listdir(partial):
        _sync(os.path.join(partial, name))
    _sync(partial)
    if os.path.exists(target):
        os.rename(target, aside)
    os.rename(partial, target)
    _sync(os.path.dirname(target) or ".")
    with contextlib.suppress(OSError):
        restore(target, kind)


def _aside(target):
    """Where publish keeps what it replaces until that is done: a name that nobody would choose."""
    return os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.replaced")


def restore(target, kind):
    """Completes or undoes a publish(): what it set aside is removed if the new directory is in
    place, and else gets its name back."""
    aside = _aside(target)
    if kind is None or not os.path.isdir(aside):
        return
    if os.path.exists(target):
        # perhaps half removed, without the file that tells its kind: only our files go, by name
        remove_directory(aside, kind)
    elif not not_ours(aside, kind):
        os.rename(aside, target)


def _sync(path):
    """Waits until a file or directory is on the disk, if the system can do that: Windows opens no
    directory and syncs no file opened for reading, and some mounted drives sync nothing."""
    for flags in (os.O_RDWR, os.O_RDONLY) if os.path.isfile(path) else (os.O_RDONLY,):
        try:
            handle = os.open(path, flags)
            try:
                return os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):  # what was written is lost
                raise


def files_of(directory, skip=()):
    """{name: path} of the files of a model or checkpoint, without what a user put beside them."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    names = [name for name in names if re.fullmatch(WRITTEN["checkpoint"], name)]
    paths = {name: os.path.join(directory, name) for name in sorted(names) if name not in skip}
    return {name: path for name, path in paths.items() if os.path.isfile(path)}


def step_of(path):
    """The step that stands at the end of a checkpoint's path; 0 for any other path."""
    match = re.search(r"step_(\d{6,})$", path)
    return int(match[1]) if match else 0


def checkpoints(run):
    """The step_* directories of a run, oldest first; not one without any file of a model."""
    names = os.listdir(run) if os.path.isdir(run) else []
    names = [name for name in names if re.fullmatch(r"step_\d{6,}", name)]
    paths = [os.path.join(run, name) for name in sorted(names, key=step_of)]
    marks = {"config.json", "model.safetensors", "trainer.pt"}
    return [path for path in paths if marks & files_of(path).keys()]


def hidden(verb, directory):
    """Where a directory is written or deleted: what has a final name is whole at every moment."""
    return os.path.join(os.path.dirname(directory), f".{verb}.{os.path.basename(directory)}")


def copy_files(source, target, names):
    """Copies those of the files that exist. Only their content: a mounted drive may refuse modes
    and times."""
    for name in names:
        if os.path.isfile(os.path.join(source, name)):
            path = os.path.join(target, name)
            shutil.copyfile(os.path.join(source, name), path + ".tmp")
            os.replace(path + ".tmp", path)


# -----------------------------------------------------------------------------
# The command line


def make_tokenizer_only(paths, name, data_dir, as_, field, vocab_size, min_frequency, **options):
    """python prepare.py tokenizer PATH...: trains a tokenizer without preparing a data set."""
    if not paths:
        raise UserError("python prepare.py tokenizer PATH...: name the texts to train it on")
    name = name or "tokenizer"
    _check_name(name, paths[0])
    sources = [local_files(path) for path in paths]
    target = os.path.join(data_dir, name)
    check_target(target, "tokenizer", paths)
    say_what_is_replaced(target)

    def texts():
        for files in sources:
            shape, _, _ = recognize(files, as_, field)
            yield from _texts(files, Encoder(None, shape, field, keep_crlf=options["keep_crlf"]))

    tokenizer = train_bpe(texts(), int(vocab_size), f"bpe:{vocab_size}", min_frequency)
    partial = _real_place(target) + ".partial"
    tokenizer.save(partial)
    publish(partial, target)
    print(f"{target}: a byte-level BPE of {tokenizer.vocab_size:,} ids")
    print(f"next: python prepare.py TEXT --tokenizer={target}")


def main(words, options):
    if not words:
        print("python prepare.py NAME (one of these), PATH or hub:owner/name; see also --help\n")
        for known in KNOWN:
            print(f"  {known:<18}{KNOWN[known]['size']}")
        return
    if words[0] == "tokenizer":
        make_tokenizer_only(words[1:], **options)
        return
    if len(words) > 1 and options["name"]:
        raise UserError(
            f"--name={options['name']} is for one data set, and {len(words)} are asked for: "
            f"{', '.join(words)}"
        )
    for key in ("vocab_size", "min_frequency"):
        del options[key]
    for word in words:
        prepare(word, **options)


if __name__ == "__main__":
    arguments = [re.sub("^--as(=|$)", r"--as_\1", argument) for argument in sys.argv[1:]]
    setup = configure(globals(), words=True, argv=arguments)
    options = {key: globals()[key] for key in setup.keys}
    if "val_fraction" not in setup.given:
        options["val_fraction"] = None  # known data sets have their own
    read_secrets()
    try:
        main(setup.words, options)
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command continues from here")
