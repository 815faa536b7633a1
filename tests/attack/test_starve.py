"""What a machine withholds: writes that fail, descriptors, memory, a clock, a home, standard output,
an undisturbed run. Whatever a run says of it, the same command without the fault ends it as a run
that met none."""

import random
import shutil
import sys

import pytest

sys.path.insert(0, __file__.rpartition("/")[0])
import driver

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks runs, as Linux does it")

# every write from event number `target` on fails, or `count` of them
FULL_DISK = """
import errno
target, count = {target}, {count}

def fail(owner, name, label=None):
    plain = getattr(owner, name)
    def failing(*args, **options):
        if label and not label(*args):
            return plain(*args, **options)
        events.append(name)
        if target <= len(events) < target + count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
        return plain(*args, **options)
    setattr(owner, name, failing)

import builtins, shutil, safetensors.torch, torch
events = []
fail(builtins, "open", lambda path, mode="r", *rest: set(str(mode)) & set("wax+"))
for owner, name in ((os, "mkdir"), (os, "fsync"), (os, "replace"), (os, "rename"), (os, "link"),
                    (shutil, "copyfile"), (torch, "save"), (safetensors.torch, "save_file")):
    fail(owner, name)
"""
SIGNAL = """
import signal, threading, torch
def send():
    os.kill(os.getpid(), signal.{name})
plain, count = torch.optim.AdamW.step, [0]
if {step}:
    def step(self, *args):
        count[0] += 1
        if count[0] == {step}:
            send()
        return plain(self, *args)
    torch.optim.AdamW.step = step
else:
    timer = threading.Timer({seconds}, send)
    timer.daemon = True
    timer.start()
"""
STARVED = {
    "32 descriptors": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))",
    "a jumping clock": "import time\nplain, n = time.time, [0]\ndef jump():\n    n[0] += 1\n"
    "    return plain() + (-1) ** n[0] * 1e8\ntime.time = jump",
    "no home": "os.environ.pop('HOME', None); os.environ.pop('USER', None)",
    "no standard output": "os.close(1)",
    "no standard streams": "os.close(0); os.close(1); os.close(2)",
    "out_dir removed": "import shutil, torch\nplain, n = torch.optim.AdamW.step, [0]\n"
    "def step(self, *args):\n    n[0] += 1\n    if n[0] == 5:\n"
    "        shutil.rmtree('out/run', ignore_errors=True)\n    return plain(self, *args)\n"
    "torch.optim.AdamW.step = step",
}


@pytest.fixture(scope="module")
def killer(tmp_path_factory):
    killer = driver.Killer(tmp_path_factory.mktemp("starve"))
    driver.make_world(killer)
    killer.finished("train.py", *OPTIONS, "--out_dir=out/calm")
    yield killer
    killer.close()


OPTIONS = (*driver.TINY, driver.STAGES["pretrain"])


def starve(killer, patch, codes=(0, 1)):
    """A run with a fault, and then one without."""
    shutil.rmtree(killer.cwd / "out" / "run", ignore_errors=True)
    result = killer.run("train.py", *OPTIONS, "--out_dir=out/run", patch=patch)
    assert result.code in codes, (result.code, result.all[-2000:])
    assert "Traceback" not in result.all, result.all[-3000:]
    assert not driver.not_whole(killer.cwd / "out" / "run"), result.all
    again = killer.finished("train.py", *OPTIONS, "--out_dir=out/run")
    assert "Traceback" not in again.all and "damaged" not in again.all, again.all
    run, calm = killer.cwd / "out" / "run", killer.cwd / "out" / "calm"
    trouble = driver.differences(run, calm)
    return result, trouble


def full_disk(killer, rng):
    """A full disk may cost rows of the log, samples, and checkpoints that a later one replaces."""
    patch = FULL_DISK.format(target=rng.randint(1, 160), count=rng.choice((1, 3, 20, 10**6)))
    result, trouble = starve(killer, patch)
    weights = [t for t in trouble if "step_000008/" in t]
    assert not weights, (patch[:60], trouble, result.all)


def test_a_full_disk(killer):
    rng = random.Random(0)
    for _ in range(2):
        full_disk(killer, rng)


@pytest.mark.slow
def test_a_full_disk_at_every_kind_of_write(killer):
    rng = random.Random(1)
    for _ in range(100):
        full_disk(killer, rng)


@pytest.mark.parametrize("what", STARVED)
def test_what_a_machine_withholds(killer, what):
    result, trouble = starve(killer, STARVED[what])
    if what == "out_dir removed":
        trouble = [t for t in trouble if "step_000008/model" in t]
    assert not trouble, (trouble, result.all)


def signalled(killer, name, step, seconds):
    """Until its handler is there a signal ends a run as the system does it, or as Ctrl-C does."""
    patch = SIGNAL.format(name=name, step=step, seconds=seconds)
    result, trouble = starve(killer, patch, codes=(0, 1, 130, -1, -15))
    assert not trouble, (name, step, seconds, trouble, result.all)


@pytest.mark.parametrize("name", ("SIGINT", "SIGTERM", "SIGHUP"))
def test_signals(killer, name):
    signalled(killer, name, 3, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("SIGINT", "SIGTERM", "SIGHUP"))
def test_signals_at_any_time(killer, name):
    rng = random.Random(2)
    for _ in range(15):
        signalled(killer, name, 0, rng.uniform(0.001, 1.5))


def test_preparation_with_few_descriptors(killer):
    """24 of them: the files of a part are opened one after the other."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))"
    for source, name in (
        ("text.txt --tokenizer=byte", "few"),
        ("chat.jsonl --tokenizer=byte", "few2"),
    ):
        killer.finished("prepare.py", source, f"--name={name}", patch=limit)


@pytest.mark.slow
def test_more_than_a_processor_has_memory_for(killer):
    """The allocator's failure is no traceback: the micro-batch is halved until it fits."""
    limit = """
import resource
with open("/proc/self/statm") as f:
    used = int(f.read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), resource.RLIM_INFINITY))
"""
    options = (
        "--batch_size=4096 --micro_batch_size=4096 --max_iters=1 --eval_interval=1 --n_embd=64"
    )
    run = ("train.py", *OPTIONS, options, "--out_dir=out/large")
    result = killer.run(*run, patch=limit)
    assert "Traceback" not in result.all, result.all[-3000:]
    assert result.code == 0 and "out of memory: micro_batch_size=2048" in result.out, result.all
