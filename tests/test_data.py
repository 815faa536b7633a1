"""The order of the data is a pure function of (seed, position): nothing else moves a window."""

import json

import numpy as np
import pytest
import torch

from configurator import UserError
from prepare import Bins, Mixture, Records, parse_mixture


def write(path, tokens, mask=None, **meta):
    path.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        np.asarray(tokens, "<u2").tofile(path / f"{split}.bin")
        if mask is not None:
            np.asarray(mask, np.uint8).tofile(path / f"{split}.mask")
    (path / "meta.json").write_text(
        json.dumps(dict(tokenizer="byte", vocab_size=60000, dtype="uint16", eos_id=0) | meta)
    )
    return str(path)


def test_every_epoch_visits_every_window_once_on_a_grid_of_its_own(tmp_path):
    bins = Bins(write(tmp_path, range(1000)), "train", 32, seed=3)
    n = bins.per_epoch
    epochs = [[bins.start(e * n + i) for i in range(n)] for e in range(4)]
    for starts in epochs:
        assert (
            np.diff(sorted(starts)).tolist() == [32] * (n - 1)
            and min(starts) >= 0
            and max(starts) + 33 <= 1000
        )
        assert starts != sorted(starts)
    assert len({min(starts) for starts in epochs}) > 1  # the grid moved
    assert n >= 1000 // 32 - 2


def test_any_position_at_any_time(tmp_path):
    directory = write(tmp_path, range(1000))
    a, b = Bins(directory, "train", 32, seed=3), Bins(directory, "train", 32, seed=3)
    forwards = [a.start(p) for p in range(100)]
    assert forwards == [b.start(p) for p in reversed(range(100))][::-1]
    assert forwards != [Bins(directory, "train", 32, seed=4).start(p) for p in range(100)]
    x, y = a.batch(range(5, 9))
    assert x.shape == (4, 32) and torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x[2:], b.batch([7, 8])[0])  # the size of the batch changes nothing


def test_masked_targets_do_not_count(tmp_path):
    mask = np.arange(1000) % 3 == 0
    bins = Bins(write(tmp_path, range(1000), mask), "train", 32)
    alone, _ = bins.batch([1])  # of a single row, inputs and targets must not share memory either
    x, y = bins.batch([0, 1])
    assert torch.equal(alone[0], x[1]) and x.min() >= 0
    assert torch.equal(y >= 0, (x + 1) % 3 == 0) and (y[y >= 0] == (x + 1)[y >= 0]).all()


def test_held_out_windows_are_the_yardsticks(tmp_path):
    """All of them: windows of T from the first token on, as ../shared/bench/reference_gpt.py cuts them, and the rest of
    the text, which is a part of one."""
    bins = Bins(write(tmp_path, range(1000)), "val", 32)
    assert bins.held_out(10**6) == list(range(0, 1000 - 1, 32))
    x, y = bins.read([992])
    assert (
        x[0, :8].tolist() == list(range(992, 1000))
        and y[0, :7].tolist() == list(range(993, 1000))
        and (y[0, 7:] == -1).all()
    )
    assert x[0, 8:].eq(0).all()  # the end-of-text token
    some = bins.held_out(7)
    assert len(some) == 7 and some == bins.held_out(7) and set(some) <= set(bins.held_out(10**6))


def test_a_mixture_keeps_its_shares_and_its_order(tmp_path):
    bins = [
        Bins(write(tmp_path / n, range(a, a + 5000)), "train", 16, seed=1)
        for n, a in (("a", 0), ("b", 10000), ("c", 20000))
    ]
    mix = Mixture(bins, [87, 10, 3], seed=1)
    where = [mix.where(p) for p in range(5000)]
    for block in range(5):
        counts = np.bincount([i for i, _ in where[block * 1000 : block * 1000 + 1000]], minlength=3)
        assert np.abs(counts - [870, 100, 30]).max() <= 1
    for i in range(3):  # each is read in its own order, without a gap
        assert [p for j, p in where if j == i] == list(range(sum(j == i for j, _ in where)))
    assert [Mixture(bins, [87, 10, 3], seed=1).where(p) for p in (4999, 0, 1234)] == [
        where[4999],
        where[0],
        where[1234],
    ]
    x, _ = mix.batch(range(50))
    assert [int(row[0]) // 10000 for row in x] == [i for i, _ in where[:50]]


@pytest.mark.parametrize(
    "dataset, said",
    [
        ("web:0.87,code:-1", "'code:-1'"),
        ("web:x", "'web:x'"),
        (":1", "':1'"),
        ("web:0", "'web:0'"),
        ("web:nan", "'web:nan'"),
    ],
)
def test_mixtures_that_are_none(dataset, said):
    with pytest.raises(UserError, match=said):
        parse_mixture(dataset)


def test_mixtures():
    assert parse_mixture("web:0.87, code:0.13") == [
        ("web", 0.87),
        ("code", 0.13),
    ] and parse_mixture("toy") == [("toy", 1.0)]


def test_fingerprint_sees_a_changed_token(tmp_path):
    tokens = np.arange(1000)
    before = Bins(write(tmp_path, tokens), "train", 32).fingerprint()
    tokens[-1] += 1
    assert Bins(write(tmp_path, tokens), "train", 32).fingerprint() != before


def test_bins_of_nanogpt_are_gpt2_tokens(tmp_path):
    directory = write(tmp_path, range(1000))
    (tmp_path / "meta.json").unlink()
    bins = Bins(directory, "train", 32)
    assert (
        bins.meta["tokenizer"] == "gpt2"
        and bins.meta["vocab_size"] == 50304
        and bins.meta["dtype"] == "uint16"
    )


def test_records_are_shuffled_by_position_too(tmp_path):
    lines = [json.dumps(dict(n=i, text="a\u2028b"), ensure_ascii=False) for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    records = Records(
        str(tmp_path), "train", lambda r: r if r["n"] % 5 else "divisible by five", seed=1
    )
    assert records.per_epoch == 16 and records.left_out == {"divisible by five": 4}
    first, second = ([records[e * 16 + i][1]["n"] for i in range(16)] for e in (0, 1))
    assert sorted(first) == sorted(second) == [n for n in range(20) if n % 5] and first != second
    assert records[3][1]["n"] == first[3]  # back again
