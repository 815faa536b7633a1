"""prepare.py: text to tokens, exactly; nothing lost, whatever is cut or killed; bad input told in a line."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
DATA = os.path.normpath(os.path.join(ROOT, "..", "shared", "data"))
if os.path.isdir(os.path.join(DATA, "tiktoken_cache")):
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", os.path.abspath(os.path.join(DATA, "tiktoken_cache")))

import prepare  # noqa: E402
from configurator import UserError  # noqa: E402
from prepare import EOT, load_tokenizer, make_tokenizer  # noqa: E402


def shared(name):
    path = os.path.join(DATA, name)
    if not os.path.exists(path):
        pytest.skip(f"needs ../shared/data/{name}")
    return path


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def meta_of(directory):
    return json.loads(read(os.path.join(directory, "meta.json")))


def ids_of(directory, part):
    return np.fromfile(os.path.join(directory, part + ".bin"), meta_of(directory)["dtype"])


def files_of(directory):
    return {f: open(os.path.join(directory, f), "rb").read() for f in sorted(os.listdir(directory))}


def command(*args, cwd, **env):
    return subprocess.run([sys.executable, os.path.join(ROOT, "prepare.py"), *args], cwd=cwd, text=True,
                          capture_output=True, timeout=60, env={**os.environ, **env})


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NANOSMOL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


SOUNDS = [a + b + c for a in "bdfgklmnprst" for b in ("a", "e", "i", "ou", "ï") for c in ("", "n", "rk", "st")]
NAMES = [SOUNDS[i * 7 % 240].title() + SOUNDS[i * 31 % 239] for i in range(997)]  # words enough for a BPE to learn
STORIES = [f"Story {i}. {NAMES[i % 997]} has {i} {NAMES[i * 5 % 991].lower()}s. “Good,” said {NAMES[i * 3 % 983]}.\n\n"
           f"So it was {i * 7 % 13}." for i in range(3000)]
WORDS = " ".join(STORIES[:200])


# --- tokenizers

def kinds():
    return {"byte": lambda: load_tokenizer("byte"), "llama": llama,
            "char": lambda: make_tokenizer("char", [prepare.SAMPLE, WORDS]),
            "bpe:600": lambda: make_tokenizer("bpe:600", [WORDS]),
            "gpt2": lambda: shared("tiktoken_cache") and load_tokenizer("gpt2"),
            "smollm2": lambda: load_tokenizer(shared("smollm2_tokenizer.json"))}


def llama():
    """A tokenizer of Llama 2's kind: SentencePiece's BPE with bytes to fall back on; </s> ends a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    trained.train_from_iterator([t.replace("\n", "") for t in STORIES[:300]], trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, show_progress=False))
    spec = json.loads(trained.to_str())
    spec["pre_tokenizer"] = None
    spec["added_tokens"] = spec["added_tokens"][:3]
    spec["decoder"] = json.loads(decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ]).__getstate__())
    return prepare.Tokenizer(spec, "llama")


@pytest.mark.parametrize("kind", kinds())
def test_tokenizer_round_trip_and_transformers(kind, tmp_path):
    """Decoding gives the text back; saved, loaded here and by transformers, the ids are the same."""
    tok = kinds()[kind]()
    text = WORDS[:500] if kind == "bpe:600" else prepare.SAMPLE.replace("\x07", "").replace("\x00", "")
    text = text.replace(EOT, "").replace("<|im_end|>", "")
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert max(ids) < tok.vocab_size and tok.eos_id < tok.vocab_size
    tok.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).encode(text) == ids
    assert load_tokenizer(str(tmp_path)).name == tok.name
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tok.eos_id and len(theirs) == tok.vocab_size


@pytest.mark.parametrize("kind", kinds())
def test_special_text_stays_text(kind):
    tok = kinds()[kind]()
    for text in (EOT, "a" + EOT, "<|im_end|>") if kind != "llama" else ("</s>", "a</s>"):
        assert tok.eos_id not in tok.encode(text) and tok.decode(tok.encode(text)) == text
        assert tok.eos_id not in tok.fast().encode(text)


def test_gpt2_is_tiktoken():
    import tiktoken
    shared("tiktoken_cache")
    theirs, ours = tiktoken.get_encoding("gpt2"), load_tokenizer("gpt2")
    texts = [prepare.SAMPLE, read(shared("shakespeare.txt")), read(shared("tinystories_sample.txt"))]
    for text in texts:
        assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.fast().tik and ours.vocab_size == 50257 and ours.eos_id == theirs.eot_token
    for text in texts:
        assert ours.encode(text) == theirs.encode_ordinary(text)


@pytest.mark.parametrize("which", ["smollm2_tokenizer.json", "bpe:1000"])
def test_fast_engine_gives_the_ids_of_tokenizers(which):
    """tiktoken's engine for a tokenizer.json: every character of Unicode, in contexts where words may end."""
    text = WORDS if which.startswith("bpe") else read(shared("tinystories_sample.txt")) + read(shared("shakespeare.txt"))
    tok = make_tokenizer(which, [text]) if which.startswith("bpe") else load_tokenizer(shared(which))
    exact = lambda text: tok.engine.encode(text, add_special_tokens=False).ids
    assert tok.fast().tik is not None
    assert tok.encode(text) == exact(text)
    planes = [*range(0xD800), *range(0xE000, 0x11000), *range(0x1F000, 0x20000), 0x40000, 0xF0000, 0x10FFFF]
    for context in ("a%s1", " %s%s 7"):
        for i in range(0, len(planes), 512):
            text = "|".join(context.replace("%s", chr(c)) for c in planes[i:i + 512])
            assert tok.encode(text) == exact(text), (context, planes[i])


def test_fast_engine_is_refused_where_it_would_differ():
    """A vocabulary whose merges tiktoken would not follow: a token that its own letters do not come to."""
    tok = make_tokenizer("bpe:600", [WORDS])
    spec = json.loads(json.dumps(tok.spec))
    spec["model"]["merges"].reverse()
    assert prepare.Tokenizer(spec, "odd").fast().tik is None
    spec = dict(tok.spec, normalizer=dict(type="NFC"))
    assert prepare.Tokenizer(spec, "odd").fast().tik is None


def test_encode_documents_is_each_document_and_its_end():
    texts = STORIES[:20] + ["", "about " + EOT, "\x04 control"]
    for tok in (make_tokenizer("bpe:600", [WORDS]), load_tokenizer("byte"), llama()):
        wanted = [i for text in texts for i in tok.encode(text) + [tok.eos_id]]
        assert tok.encode_documents(texts).tolist() == wanted
        assert tok.fast().encode_documents(texts).tolist() == wanted


def test_training_a_bpe():
    a, b = make_tokenizer("bpe:600", STORIES[:500]), make_tokenizer("bpe:600", STORIES[:500])
    assert a.spec == b.spec and a.vocab_size == 600
    assert [a.encode_special(t) for t in (EOT, "<|im_start|>", "<|im_end|>")] == [0, 1, 2] and a.eos_id == 0
    assert len(a.encode("1234")) == 4
    assert a.encode_special("<|nothing|>") is None


def test_what_is_no_tokenizer(here):
    (here / "empty").mkdir()
    (here / "bad.json").write_text("{}")
    for spec, said in (("gpt3", "neither"), ("empty", "no tokenizer.json"), ("bad.json", "bad.json"), ("char", "--tokenizer="),
                       ("bpe:20", "259"), ("bpe4096", "bpe:4096")):
        with pytest.raises(UserError, match=said) as e:
            make_tokenizer(spec, []) if spec.startswith("bpe") else load_tokenizer(spec)
        assert "\n" not in str(e.value)


# --- from text to bins

def test_one_text_is_split_as_nanogpt_does(here):
    text = read(shared("shakespeare.txt"))
    directory = prepare.prepare(shared("shakespeare.txt"), tokenizer="char", name="sc")
    chars = sorted(set(text))
    ids = [chars.index(c) for c in text]
    cut = int(0.9 * len(ids))
    assert ids_of(directory, "train").tolist() == ids[:cut]
    assert ids_of(directory, "val").tolist() == ids[cut:] + [65]
    meta = meta_of(directory)
    assert meta["vocab_size"] == 66 and meta["dtype"] == "uint16" and meta["eos_id"] == 65 and meta["documents"] == 1
    assert (meta["train_tokens"], meta["val_tokens"]) == (cut, len(ids) - cut + 1)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe:600", "llama"])
def test_a_long_text_is_cut_without_a_trace(here, monkeypatch, kind):
    """In blocks of 5,000 bytes the ids are those of the whole text; the split counts characters, not bytes."""
    text = "\n".join(STORIES)
    (here / "long.txt").write_text("\ufeff" + text + "\n" + EOT + "\n", encoding="utf-8")
    monkeypatch.setattr(prepare, "BLOCK", 5000)
    if kind == "llama":
        llama().save("llama")
    directory = prepare.prepare("long.txt", tokenizer=kind)
    tok, cut = load_tokenizer(directory), int(0.9 * (len(text) + 1))
    assert ids_of(directory, "train").tolist() == tok.encode(text[:cut])
    assert ids_of(directory, "val").tolist() == tok.encode(text[cut:] + "\n") + [tok.eos_id]


def test_documents_are_split_by_their_hash(here):
    (here / "a.txt").write_text(EOT.join(STORIES), encoding="utf-8")
    (here / "b.txt").write_text(f"\n{EOT}\n".join(STORIES[::-1] + [s + "!" for s in STORIES]), encoding="utf-8")

    def held_out(path):
        directory = prepare.prepare(path, tokenizer="byte", val_fraction=0.05)
        ids = ids_of(directory, "val").tolist()
        return {bytes(d).decode() for d in split_at(ids, 256)}, directory
    a, directory = held_out("a.txt")
    b, _ = held_out("b.txt")
    assert 90 < len(a) < 210 and a == b & set(STORIES)
    train = {bytes(d).decode() for d in split_at(ids_of(directory, "train").tolist(), 256)}
    assert train | a == set(STORIES) and not train & a


def split_at(ids, end):
    out, start = [], 0
    for i, token in enumerate(ids):
        if token == end:
            out.append(ids[start:i])
            start = i + 1
    assert start == len(ids), "the last document has no end"
    return out


def test_own_validation_split_is_kept(here):
    (here / "set").mkdir()
    (here / "set" / "mine-train.txt").write_text(EOT.join(STORIES[:50]), encoding="utf-8")
    (here / "set" / "mine-valid.txt").write_text(EOT.join(STORIES[50:60]), encoding="utf-8")
    (here / "set" / "mine-test.txt").write_text("not used", encoding="utf-8")
    directory = prepare.prepare("set", tokenizer="byte")
    assert len(split_at(ids_of(directory, "train").tolist(), 256)) == 50
    assert [bytes(d).decode() for d in split_at(ids_of(directory, "val").tolist(), 256)] == STORIES[50:60]


def test_a_vocabulary_beyond_uint16(here):
    tok = make_tokenizer("bpe:600", [WORDS])
    tok.spec["model"]["vocab"]["farther than uint16"] = 70000
    tok.save("big")
    (here / "t.txt").write_text(WORDS, encoding="utf-8")
    directory = prepare.prepare("t.txt", tokenizer="big")
    assert meta_of(directory)["dtype"] == "uint32"
    assert tok.decode(ids_of(directory, "train")) + tok.decode(ids_of(directory, "val")[:-1]) == WORDS


def test_prepared_again(here, capsys):
    """The same again is nothing to do; another one replaces it only when it is whole."""
    (here / "t.txt").write_text(WORDS, encoding="utf-8")
    directory = prepare.prepare("t.txt", tokenizer="byte")
    before = files_of(directory)
    assert prepare.prepare("t.txt", tokenizer="byte") == directory and "already" in capsys.readouterr().out
    (here / "t.txt").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="empty"):
        prepare.prepare("t.txt", tokenizer="byte")
    assert files_of(directory) == before
    (here / "t.txt").write_text(WORDS, encoding="utf-8")
    prepare.prepare("t.txt", tokenizer="char")
    assert meta_of(directory)["tokenizer"] == "char" and os.listdir("data") == ["t"]


def test_the_summary_and_the_list(here):
    (here / "t.txt").write_text(WORDS, encoding="utf-8")
    done = command("t.txt", "--tokenizer=bpe:600", "--name=mine", cwd=here)
    assert done.returncode == 0, done.stderr
    for part in ("1 documents", "bytes a token", "Story 0. B", "python train.py --dataset=mine"):
        assert part in done.stdout
    listed = command(cwd=here).stdout
    assert all(name in listed and prepare.describe(name) for name in prepare.KNOWN)
    assert prepare.describe("nothing") is None


def test_bad_text(here, capsys):
    def refused(said, *args, **options):
        with pytest.raises(UserError, match=said) as e:
            prepare.prepare(*args, **options)
        assert "\n" not in str(e.value)
    (here / "empty.txt").write_text("")
    (here / "short.txt").write_text("a")
    (here / "wide.txt").write_bytes("wide".encode("utf-16"))
    (here / "folder").mkdir()
    (here / "folder" / "picture.png").write_bytes(b"")
    refused("empty.txt: empty", "empty.txt")
    refused("too short", "short.txt", tokenizer="byte")
    refused("wide.txt.*UTF-8.*iconv", "wide.txt")
    refused("folder: this folder holds no", "folder")
    refused("no such file", "missing/there.txt")
    refused("did you mean shakespeare", "shakespear")
    refused("--name=", "short.txt", name="../up")
    refused("--val_fraction", "short.txt", val_fraction=2.0)
    assert not os.path.exists("data") or os.listdir("data") == []
    (here / "broken.txt").write_bytes(WORDS.encode() + b"caf\xe9 \xff\n" + WORDS.encode())
    directory = prepare.prepare("broken.txt", tokenizer="bpe:600")
    assert meta_of(directory)["replaced_characters"] == 2
    assert f"byte {len(WORDS.encode()) + 3}" in capsys.readouterr().out
    (here / "few").mkdir()
    for i in range(3):
        (here / "few" / f"{i}.txt").write_text(STORIES[i])
    refused("none fell into val; set --val_fraction", "few", tokenizer="byte")


def test_importing_has_no_side_effect(here):
    """And is quick: what is heavy is imported where it is used."""
    heavy = "tokenizers tiktoken pyarrow requests huggingface_hub tqdm torch transformers".split()
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {ROOT!r}); import prepare; "
                           f"print([m for m in {heavy} if m in sys.modules])"], text=True, capture_output=True, cwd=here)
    assert done.stdout.strip() == "[]" and os.listdir(here) == []


@pytest.mark.skipif(not hasattr(prepare, "toy_stories"), reason="the toy world is not pasted in yet")
def test_the_toy_world(here):
    directory = prepare.prepare("toy")
    assert meta_of(directory)["documents"] >= 20_000
    for name in ("toy_chat", "toy_prefs", "toy_sums"):
        prepare.prepare(name)
    assert meta_of("data/toy_chat")["vocab_size"] == meta_of(directory)["vocab_size"]
