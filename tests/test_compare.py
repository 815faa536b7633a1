"""bench.py --compare, with a train.py that only prints a result: which code each side runs, with
which options, and what is concluded. One slow test trains."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
from conftest import ROOT

TRAIN = '''
"""A trainer whose loss follows from its options."""
import os
import sys
from configurator import configure
seed = 1  # (>= 0)
out_dir = ""
data_dir = "data"
keep_checkpoints = 2
eval_interval = 1
muon_lr = 0.0
time_budget = 0.0
terminate_pod = False
hf_repo = ""
backup_dir = ""
wandb_log = False
tensorboard = False
configure(globals())
CODE = 0.0
print("--- a sample ---", "---", "key: of a sample", "---", sep="\\n")
bpb = 2 + seed % 7 / 10 + muon_lr * (1 + seed % 2 / 10) + CODE
if muon_lr == 7:
    sys.exit("train.py: no such luck")
while muon_lr == 8:
    pass
os.makedirs(out_dir)
with open("runs.txt", "a") as f:
    print(os.path.realpath(os.path.dirname(__file__)), *sys.argv[1:], file=f)
print(f"---\\nval/bpb: {bpb}\\nsteps: 100\\ntrain_s: {time_budget}\\n---\\nwrite more")
'''
GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]


def git(place, *words):
    done = subprocess.run([*GIT, *words], cwd=place, capture_output=True, text=True, check=True)
    return done.stdout


def set_code(place, value):
    path = place / "train.py"
    path.write_text(re.sub("CODE = .*", f"CODE = {value}", path.read_text()))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A repository with three revisions of a train.py: 0.0, 0.5 (better by nothing), and edited."""
    place = tmp_path_factory.mktemp("compare")
    for name in ("bench.py", "configurator.py", "model.py"):
        shutil.copy(os.path.join(ROOT, name), place)
    (place / "assets").mkdir()
    (place / "assets" / "a.txt").write_text("a")
    (place / "train.py").write_text(TRAIN)
    git(place, "init", "-q")
    git(place, "add", ".")
    git(place, "commit", "-qm", "one")
    set_code(place, 0.5)
    git(place, "commit", "-qam", "two")
    set_code(place, -0.25)
    head = "It is better.\n    python train.py --muon_lr=0.125 --out_dir=out/better\n\n"
    (place / "better.patch").write_text(head + git(place, "diff"))
    (place / "low.py").write_text("muon_lr = -0.5\n")
    set_code(place, 1.0)
    yield place


def start(place, *args):
    (place / "runs.txt").unlink(missing_ok=True)
    command = [sys.executable, "bench.py", *args]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=place, text=True, **pipes)


def bench(place, *args):
    process = start(place, *args)
    out, err = process.communicate(timeout=120)
    assert git(place, "worktree", "list").count("\n") == 1  # whatever happened
    return process.returncode, out, err


def test_revisions_patches_and_the_files_as_they_are(place):
    """Each side's own code, in turns; what is edited here is no part of a revision."""
    before = git(place, "status", "--porcelain")
    sides = "@HEAD~1,HEAD,better.patch,.,. --muon_lr=0.25,low.py"
    code, out, err = bench(
        place, f"--compare={sides}", "--seeds=2", "--time_budget=3", "--json=a.json"
    )
    assert code == 0, err
    rows = json.loads((place / "a.json").read_text())
    means = [statistics.mean(float(run["val/bpb"]) for run in row["runs"]) for row in rows]
    first = 2 + (0.1 + 0.2) / 2  # seeds 1 and 2
    added = [0.0, 0.5, -0.25 + 0.125 * 1.05, 1.0, 1.0 + 0.25 * 1.05, 1.0 - 0.5 * 1.05]
    assert means == pytest.approx([first + more for more in added])
    runs = (place / "runs.txt").read_text().splitlines()
    assert len(runs) == 12 and all("--time_budget=3" in run for run in runs)
    seeds = [int(re.search(r"--seed=(\d+)", run)[1]) for run in runs]
    assert seeds == [1] * 6 + [2] * 6
    where = [run.split()[0] for run in runs]
    assert where[:6] == where[:5:-1]  # in reverse the second time
    assert len(set(where)) == 4 and str(place) not in where  # the last three share a copy
    assert "--muon_lr=0.125" in runs[2] and "out/better" not in runs[2]
    os.remove(place / "a.json")
    (place / "runs.txt").unlink()
    assert git(place, "status", "--porcelain") == before
    assert "run 12 of 12: HEAD~1" not in out and "run 12 of 12: @HEAD~1, seed 2" in out


def test_what_is_more_than_noise(place):
    """Half the difference is the same with every seed, the rest is not."""
    code, out, err = bench(place, "--compare=.,. --muon_lr=0.01", "--seeds=3", "--seed=4")
    assert code == 0, err
    differences = [0.01, 0.011, 0.01]  # seeds 4, 5, 6
    mean, half = statistics.mean(differences), 4.303 * statistics.stdev(differences) / 3**0.5
    interval = f"{mean - half:+.4f} to {mean + half:+.4f}"
    assert f"| {mean:+.4f} | {interval} | worse | 100 |" in out
    assert "| . | 2.4000, " not in out and "| . | 3.4000, 3.5000, 3.6000 | 3.5000 |" in out
    code, out, err = bench(place, "--compare=.,.", "--seeds=2")
    assert "| +0.0000 | +0.0000 to +0.0000 | within noise |" in out
    code, out, err = bench(place, "--compare=.,. --muon_lr=-0.01", "--seeds=1")
    assert "one seed tells nothing of noise" in out


@pytest.mark.parametrize(
    "sides, expected",
    [
        (".", "expected two sides or more"),
        (".,@nowhere", "'@nowhere' is no revision; expected configs"),
        (".,none.patch", "none.patch: no such patch"),
        (".,. better.patch", "does not apply"),  # it is the tree's edit undone
        (".,. --muon_lr=7", ". --muon_lr=7: its run ended without a val/bpb"),
        ("@HEAD,. --muon_lr=x", "its run ended without a val/bpb"),
    ],
)
def test_what_is_refused(place, sides, expected):
    code, out, err = bench(place, f"--compare={sides}", "--seeds=1")
    assert code == 1 and expected in err and "Traceback" not in err
    assert err.splitlines()[-1].startswith("bench.py: ")


def test_it_tidies_up_when_it_is_stopped(place):
    """A worktree that is left would be listed by git for ever, and its trainer go on."""
    process = start(place, "--compare=@HEAD,@HEAD --muon_lr=8", "--seeds=1")
    for line in process.stdout:
        if line.startswith("run 1 of 2"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert git(place, "worktree", "list").count("\n") == 1


@pytest.mark.slow
def test_a_hack_against_the_revision_that_it_applies_to(tmp_path):
    """The real train.py, a real patch: as RESEARCH.md says it."""
    if subprocess.run(["git", "-C", ROOT, "rev-parse"], capture_output=True).returncode:
        pytest.skip("needs the repository, whose revision a patch is applied to")
    options = "--n_layer=1 --n_head=2 --n_embd=32 --block_size=64 --batch_size=2 --eval_iters=2"
    options += " --time_budget=1 --device=cpu --seeds=2"
    sides = f"HEAD,{ROOT}/tests/hacks/relu2_mlp.patch"
    command = [sys.executable, os.path.join(ROOT, "bench.py"), f"--compare={sides}"]
    done = subprocess.run(
        [*command, *options.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--mlp=relu2" in done.stdout and re.search(r"within noise|better|worse", done.stdout)
    assert os.listdir(tmp_path) == ["data"]
