"""10,000 steps: memory, descriptors, threads and the time of a step stay as they are."""

import json
import statistics
import sys

import pytest

sys.path.insert(0, __file__.rpartition("/")[0])
import driver

WATCH = """
import time, threading, torch
plain, rows, begun = torch.optim.AdamW.step, [], time.process_time()
def step(self, *args):
    rows.append(1)
    if len(rows) % 500 == 0:
        with open("/proc/self/statm") as f:
            resident = int(f.read().split()[1]) * 4096
        row = [resident, len(os.listdir("/proc/self/fd")), threading.active_count(), time.process_time()]
        with open("watch.jsonl", "a") as f:
            f.write(json.dumps(row) + "\\n")
    return plain(self, *args)
torch.optim.AdamW.step = step
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks runs, as Linux does it")
def test_ten_thousand_steps(tmp_path):
    killer = driver.Killer(tmp_path)
    driver.make_sources(tmp_path)
    killer.finished("prepare.py", "text.txt --tokenizer=byte --val_fraction=0.2")
    options = "--dataset=text --max_iters=10000 --eval_interval=250 --out_dir=out/long"
    killer.finished("train.py", *driver.TINY, *driver.MODEL, options, patch=WATCH)
    killer.close()
    rows = [json.loads(line) for line in open(tmp_path / "watch.jsonl")]
    resident, descriptors, threads, seconds = zip(*rows)
    per_step = [(b - a) / 500 for a, b in zip(seconds, seconds[1:])]
    log = (tmp_path / "out/long/log.jsonl").read_text().splitlines()
    early, late = statistics.median(per_step[:5]), statistics.median(per_step[-5:])
    print(f"resident {resident[0] / 1e6:.0f} to {resident[-1] / 1e6:.0f} MB, descriptors "
          f"{min(descriptors)} to {max(descriptors)}, threads {min(threads)} to {max(threads)}, "
          f"{1e3 * early:.2f} to {1e3 * late:.2f} ms a step, {len(log):,} rows of log")  # fmt: skip
    assert resident[-1] < resident[3] + (40 << 20)
    assert max(descriptors[3:]) <= max(descriptors[:3]) + 2 and max(threads) <= min(threads) + 2
    assert late < 1.5 * early
    assert 10_000 <= len(log) < 10_200
