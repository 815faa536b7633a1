"""bench.py --first_hour: each part does its work, and none keeps another from its turn."""

import os
import re
import subprocess
import sys
import time

import pytest
from processes import ROOT, Processes

SMALL = "--n_layer=1 --n_head=2 --n_kv_head=1 --n_embd=32 --ffn_dim=32 --block_size=32"
SMALL += " --vocab_size=300 --batch_size=2 --gradient_accumulation_steps=2 --dtype=float32"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    processes = Processes(tmp_path_factory.mktemp("hour"))
    yield processes
    processes.close()


def part(program, name, config="smol_600m"):
    """The lines of a part that runs as in a process of its own."""
    own = f"--first_hour --measure=hour_{name} --scratch={program.cwd}"
    command = f"{ROOT}/config/{config}.py {SMALL} {own}"
    return program.finished("bench.py", command).out.splitlines()


def test_parts_report(program):
    lines = part(program, "environment")
    assert "LEFT OUT smol_600m: there is no GPU" in "\n".join(lines)
    lines = part(program, "ceilings")
    assert sum("TFLOP/s" in line for line in lines) == 2 and "GB/s of copying" in lines[-1]
    lines = part(program, "attention", "smol_360m")
    assert lines[0].startswith("causal") and lines[1].startswith("sdpa")
    assert lines[-1].startswith("ok       smol_360m: documents apart: train.py picks sdpa")


def test_right_and_wrong_gradients_are_told_apart(program):
    """torch.compile is replaced by what computes the same, and by what gives zeros, as torch 2.11
    once did."""
    for factor, verdict in ((1, "ok"), (0, "WRONG")):
        patch = f"""
import torch
def compile(model):
    def forward(*args):
        loss = model(*args)[1]
        return None, loss + ({factor} - 1) * (loss - loss.detach())
    return forward
torch.compile = compile
"""
        own = f"--first_hour --measure=hour_gradients --scratch={program.cwd}"
        command = f"{ROOT}/config/smol_600m.py {SMALL} {own}"
        out = program.finished("bench.py", command, patch=patch).out
        verdicts = re.findall(r"^(ok|WRONG) +smol_600m: gradients in \S+ (.*?), are", out, re.M)
        assert verdicts == [("ok", "as it comes"), (verdict, "compiled")]


# Processes of parts are replaced by short scripts, and seconds by hundredths of seconds
STAND_INS = """
import subprocess, sys, threading
scripts = {
    "environment": "print('ok       fine')",
    "ceilings": "print('a line'); print('SLOW     a card')",
    "gradients": "print('WRONG    zeros'); 1 / 0",
    "attention": "import subprocess, sys; print('begun', flush=True); "
                 "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
}
class Popen(subprocess.Popen):
    def __init__(self, command, **options):
        part = next(a[15:] for a in command if a.startswith("--measure=hour_"))
        super().__init__([sys.executable, "-c", scripts[part]], **options)
subprocess.Popen = Popen
Timer = threading.Timer
threading.Timer = lambda seconds, end: Timer(seconds / 100, end)
"""


def test_the_worst_news_comes_first(program):
    """A part that fails and one that hangs become a line, and the next one runs."""
    parts = "--only=environment,ceilings,gradients,attention"
    out = program.finished("bench.py", f"--first_hour {parts}", patch=STAND_INS).out
    begins = [line for line in out.splitlines() if line.startswith("== ")]
    assert len(begins) == 7 and "the worst first" in begins[-1]
    summary = out[out.index(begins[-1]) :].splitlines()[1:-1]
    assert summary[:2] == ["WRONG    zeros"] * 2
    assert summary[2:4] == [
        f"FAILED   gradients of {name}, status 1: ZeroDivisionError: division by zero"
        for name in ("smol_360m", "smol_600m")
    ]
    assert summary[4] == "SLOW     a card" and summary[-1] == "ok       fine"
    assert summary[5].startswith("LEFT OUT the rest of attention of smol_600m: it took longer")
    kept = re.search(r"kept in (.*)", out)[1]
    with open(kept, encoding="utf-8") as f:
        assert f.read() == out


def test_a_part_does_not_outlive_the_first_hour(program):
    """It has a session of its own, so that a terminal's signals do not reach it."""
    patch = (
        STAND_INS
        + """
import os
scripts["attention"] = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)"
threading.Timer = lambda seconds, end: Timer(0.5, lambda: os.kill(os.getpid(), 15))
"""
    )
    done = program.run("bench.py", "--first_hour --only=attention", patch=patch)
    assert done.code == 143 and "Traceback" not in done.all
    pid = int(re.search(r"pid (\d+)", done.out)[1])
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until init has collected it
            os.kill(pid, 0)
            time.sleep(0.02)


def test_an_unknown_part_of_the_first_hour(program):
    error = program.run("bench.py", "--first_hour --only=ceilings,lunch").err
    assert error.startswith("bench.py: only=ceilings,lunch: there is no part 'lunch'; expected")


@pytest.mark.slow
def test_the_first_hour_without_a_gpu(tmp_path):
    """From start to end, with processes: nothing fails, and what is left out is said."""
    command = [sys.executable, os.path.join(ROOT, "bench.py"), "--first_hour"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.findall("^(?:WRONG|FAILED).*", done.stdout, re.M)
    assert "goes on with steps [1" in done.stdout and "there is no GPU" in done.stdout
    assert len(list(tmp_path.glob("first_hour_*"))) == 2
