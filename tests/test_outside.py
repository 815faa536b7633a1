"""What a run does beyond its machine, as its user sees it: processes, against stand-ins of the Hub
and of RunPod on loopback, with the real clients. The runs mostly wait, so those of all the tests
asked for go on side by side. test_runs.py tests the same parts one by one, in milliseconds."""

import base64
import concurrent.futures
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from stand_ins import SECRETS, Liar, Outside

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = "--dataset=tiny --n_layer=2 --n_head=2 --n_kv_head=1 --n_embd=32 --block_size=32".split()
TINY += "--batch_size=4 --eval_iters=2 --eval_interval=10 --log_interval=5 --warmup_iters=2".split()
TINY += ["--dtype=float32", "--max_iters=20"]
UPLOADS = ["--hf_repo=me/tiny"]
POD = [*UPLOADS, "--terminate_pod=True"]
POD_ENV = {"RUNPOD_POD_ID": "pod1", "RUNPOD_API_KEY": SECRETS["RUNPOD_API_KEY"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with data/tiny: 200 small documents, bytes for tokens."""
    cwd = tmp_path_factory.mktemp("outside")
    rng, words = random.Random(0), "the cat sat on a mat and saw one red hat in an old van".split()
    docs = [" ".join(rng.choices(words, k=rng.randrange(10, 30))) + "." for _ in range(200)]
    (cwd / "tiny.txt").write_text("<|endoftext|>".join(docs))
    prepare = [sys.executable, os.path.join(ROOT, "prepare.py"), "tiny.txt", "--tokenizer=byte"]
    run = subprocess.run([*prepare, "--val_fraction=0.1"], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return cwd


def start(cwd, hub, *args, **env):
    """A run in `cwd`, with the stand-in for its Hub and its RunPod. None takes a variable away."""
    import matplotlib

    nowhere = "http://127.0.0.1:9"
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WANDB_", "RUNPOD_"))}
    ours |= {
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": hub.url if hub else nowhere,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(cwd / "hf"),
        "HF_TOKEN": SECRETS["HF_TOKEN"],
        "HOME": str(cwd),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),
        "NO_PROXY": "*",
        "RUNPOD_API_BASE": f"{hub.url}/runpod" if hub else nowhere,
    }
    env = {k: v for k, v in (ours | env).items() if v is not None}
    return subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "train.py"), *TINY, *args],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
    )


def finish(process, code=0):
    """What a run printed, when it has ended."""
    out, errors = process.communicate(timeout=200)
    assert process.returncode == code, out + errors
    return out, errors


def until(process, line):
    """Reads what a run prints up to a line that begins so."""
    read = []
    for got in process.stdout:
        read.append(got)
        if got.startswith(line):
            return "".join(read)
    raise AssertionError("".join(read) + process.stderr.read())


def log(cwd, run="toy"):
    with open(cwd / "out" / run / "log.jsonl") as f:
        return [json.loads(line) for line in f]


def events(cwd, *kinds):
    return [(r["event"], r.get("path")) for r in log(cwd) if r.get("event") in kinds]


def warnings(text):
    return re.findall("^warning: .*", text, re.M)


def weights(cwd, step=20):
    return (cwd / "out" / "toy" / f"step_{step:06d}" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def side_by_side(request, place, tmp_path_factory):
    """{test: the future of what its scene_... returns}, for the tests that were asked for."""
    items = [i for i in request.session.items if i.module is request.module]
    names = [i.function.__name__ for i in items if "scene" in i.fixturenames]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = {}
        for name in names:
            cwd = tmp_path_factory.mktemp(name)
            shutil.copytree(place / "data", cwd / "data")
            scene = getattr(request.module, name.replace("test_", "scene_", 1))
            futures[name] = pool.submit(scene, cwd)
        yield futures


@pytest.fixture
def scene(request, side_by_side):
    return side_by_side[request.function.__name__].result()


# --- the Hub, and the pod


def scene_the_pod_ends_after_the_confirmed_model(cwd):
    """The first two uploads fail, the third is cut half-way; the secrets stand in .env, in each of
    its notations."""
    (cwd / ".env").write_text(
        f"# mine\nHF_TOKEN={SECRETS['HF_TOKEN']}  # write\n"
        f'export WANDB_API_KEY="{SECRETS["WANDB_API_KEY"]}"\n'
        f"RUNPOD_API_KEY = '{SECRETS['RUNPOD_API_KEY']}'\nOTHER=1\n"
    )
    hub = Outside(faults=[("/objects/batch", 520), ("/commit/", 520), ("/commit/", "cut")])
    env = {"HF_TOKEN": None, "RUNPOD_POD_ID": "pod1", "WANDB_MODE": "offline"}
    out, errors = finish(start(cwd, hub, *POD, "--wandb_log", **env))
    return cwd, hub, out, errors


def test_the_pod_ends_after_the_confirmed_model(scene):
    """Three failures, two checkpoints, the final model, confirmed by the Hub, then the pod."""
    cwd, hub, out, errors = scene
    first, second = "me/tiny/checkpoints/step_000010", "me/tiny/checkpoints/step_000020"
    sent = [("upload", first), ("upload", second), ("upload", "me/tiny")]
    failed = [("upload failed", first)] * 3
    order = events(cwd, "upload failed", "upload", "pod")
    assert order == [*failed, *sent, ("pod", None)]
    kinds = [re.search(r"commit/main -> \w+|paths-info|DELETE .*|/stop", s) for s in hub.seen]
    kinds = [k[0] for k in kinds if k]
    # each checkpoint is asked for before it is sent; all three are asked for afterwards
    asked, sent = "paths-info", "commit/main -> 200"
    failures = [asked, asked, "commit/main -> 520", asked, "commit/main -> cut"]
    checkpoint = [asked, sent, asked]
    end = [sent, asked, "DELETE /runpod/pods/pod1 -> 200"]
    assert kinds == [*failures, *checkpoint, *checkpoint, *end]
    asked = [body for body in hub.bodies if b"/paths-info/" in body]
    assert b"model.safetensors" in asked[-1] and b"checkpoints" not in asked[-1]
    token, key = (f"Bearer {SECRETS[name]}" for name in ("HF_TOKEN", "RUNPOD_API_KEY"))
    assert hub.keys == {("hub", token), ("/runpod/", key)}
    assert len(warnings(out)) == 2 and "not in /workspace" in out
    assert "is tried again, training goes on" in out
    said = ["waiting for uploads", "the final model is at", "in ten seconds; Ctrl-C calls"]
    places = [out.index(line) for line in said]
    assert places == sorted(places) and "pod pod1 was told to terminate" in out and not errors


def test_what_is_on_the_hub(side_by_side):
    cwd, hub, _, _ = side_by_side["test_the_pod_ends_after_the_confirmed_model"].result()
    local = set(os.listdir(cwd / "out" / "toy" / "step_000020"))
    assert {"trainer.pt", "model.safetensors", "tokenizer.json"} < local
    files = {f"checkpoints/step_0000{n}/{f}" for n in (10, 20) for f in local}
    assert set(hub.files) == files | local - {"trainer.pt"} | {"README.md", "loss.png"}
    for path, content in hub.files.items():  # a checkpoint's trainer.pt too, to go on from the Hub
        name = path.removeprefix("checkpoints/") if "/" in path else f"step_000020/{path}"
        if path not in ("README.md", "loss.png"):
            assert (cwd / "out" / "toy" / name).read_bytes() == content
    card = hub.files["README.md"].decode()
    head = '---\nlibrary_name: "transformers"\npipeline_tag: "text-generation"\n'
    assert card.startswith(head + 'tags: ["nanosmol", "pretrain"]\n---\n')
    last = [r["val/loss"] for r in log(cwd) if "val/loss" in r][-1]
    for part in (
        f"| val/loss at the end | 20 | {last:.4f} |",
        "n_embd = 32",
        "tokens of tiny",
        'AutoModelForCausalLM.from_pretrained("me/tiny")',
        "python sample.py --init_from=me/tiny",
        "![loss](loss.png)",
    ):
        assert part in card
    assert str(cwd) not in card and not re.search(r"= '[/~]", card)


def test_no_secret_is_anywhere(side_by_side):
    cwd, hub, out, errors = side_by_side["test_the_pod_ends_after_the_confirmed_model"].result()
    paths = [os.path.join(d, f) for d, _, files in os.walk(cwd) for f in files if f != ".env"]
    texts = {p: open(p, "rb").read() for p in paths}
    assert any(f.endswith(".wandb") for f in texts) and any(f.endswith("trainer.pt") for f in texts)
    texts |= {"stdout": out.encode(), "stderr": errors.encode()}
    texts |= {f"request {i}": b for i, b in enumerate(hub.bodies)}
    texts |= {f"upload {p}": b for p, b in hub.files.items()}
    for name, text in texts.items():
        for key, secret in SECRETS.items():
            assert secret.encode() not in text, (key, name)
            assert base64.b64encode(secret.encode())[:-4] not in text, (key, name)


def scene_uploads_that_always_fail_stop_the_pod(cwd):
    hub = Outside(always=[("/preupload/", 520)])
    out, _ = finish(start(cwd, hub, *POD, **POD_ENV), code=1)
    first, hub.seen, hub.always = hub.seen, [], []
    again, _ = finish(start(cwd, hub, *POD, **POD_ENV))
    return cwd, hub, out, first, again


def test_uploads_that_always_fail_stop_the_pod(scene):
    """The exit code is 1. The same command later uploads what is missing, and terminates."""
    cwd, hub, out, first, again = scene
    assert first[-1] == "POST /runpod/pods/pod1/stop -> 200"
    assert not any("DELETE" in s or "commit" in s for s in first)
    told = warnings(out)
    assert len(told) == 2 and "/workspace" in told[0] and "is tried again" in told[1]
    assert "the final model is not on the Hub but in out/toy; the same command tries again" in out
    assert weights(cwd, 10) and weights(cwd, 20)
    assert "step_000020" in again and "tok/s" not in again
    assert hub.seen[-1] == "DELETE /runpod/pods/pod1 -> 200"
    assert hub.files["model.safetensors"] == weights(cwd)
    assert "checkpoints/step_000010/trainer.pt" in hub.files


def scene_a_hub_that_lies_stops_the_pod(cwd):
    hub = Outside()
    hub.RequestHandlerClass = Liar
    return hub, finish(start(cwd, hub, *POD, **POD_ENV), code=1)[0]


def test_a_hub_that_lies_stops_the_pod(scene):
    """Every request succeeds, but what the Hub names, when asked, is other weights."""
    hub, out = scene
    assert hub.seen[-1] == "POST /runpod/pods/pod1/stop -> 200" and not hub.asked("DELETE")
    assert "checkpoints/step_000020/config.json" in hub.files
    assert "what is on the Hub is not what was sent" in out


def scene_training_does_not_wait(cwd):
    """The Hub answers nothing until training has ended: keep_checkpoints=1 leaves all four for it.
    Then kill -9, and the same command. The client's defaults here, which is the Xet protocol."""
    hub = Outside()
    hub.open.clear()
    env = {"HF_HUB_DISABLE_XET": None, "RUNPOD_POD_ID": "p", "RUNPOD_API_KEY": "k"}
    args = [*UPLOADS, "--keep_checkpoints=1", "--checkpoint_interval=5"]
    process = start(cwd, hub, *args, **env)
    until(process, "steps: 20")
    before = list(hub.seen)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = sorted(d for d in os.listdir(cwd / "out" / "toy") if d.startswith("step"))
    hub.open.set()
    return cwd, hub, before, left, finish(start(cwd, hub, *args, **env))[0]


def test_training_does_not_wait(scene):
    cwd, hub, before, left, text = scene
    assert before == [] and hub.asked("/v1/xorbs/") and not warnings(text)
    assert not hub.asked("runpod")  # on a pod, but without terminate_pod
    steps = [f"step_0000{n}" for n in ("05", "10", "15", "20")]
    assert left == steps
    sent = [f"me/tiny/checkpoints/{step}" for step in steps]
    assert [path for _, path in events(cwd, "upload")] == [*sent, "me/tiny"]
    digest = hashlib.sha256(weights(cwd)).hexdigest()
    assert hub.files["model.safetensors"] == (digest, len(weights(cwd)))
    kept = [d for d in os.listdir(cwd / "out" / "toy") if d.startswith("step")]
    assert kept == ["step_000020"]


def scene_an_interrupted_run_never_touches_the_pod(cwd):
    """SIGTERM in training, and Ctrl-C within the ten seconds."""
    hub = Outside()
    process = start(cwd, hub, *POD, "--max_iters=100000", **POD_ENV)
    until(process, "step      5 |")
    process.send_signal(signal.SIGTERM)
    said = [finish(process)[0]]
    process = start(cwd, hub, *POD, "--out_dir=out/second", **POD_ENV)
    until(process, "RunPod: about to terminate")
    process.send_signal(signal.SIGINT)
    return hub, [*said, finish(process)[0]]


def test_an_interrupted_run_never_touches_the_pod(scene):
    hub, said = scene
    assert not hub.asked("runpod") and "SIGTERM: stopped after step" in said[0]
    assert "called off, pod pod1 runs on" in said[1]
    # the last checkpoint of the first went up, too
    assert len([p for p in hub.files if p.endswith("trainer.pt")]) >= 3


def scene_a_crash_stops_the_pod(cwd):
    hub, never = Outside(), Outside()
    crash = [*POD, "--learning_rate=1e30", "--muon_lr=1e30", "--max_bad_steps=1"]
    said = [finish(start(cwd, hub, *crash, **POD_ENV), code=1)[1]]
    leave = [*crash, "--terminate_on_error=never"]
    return hub, never, [*said, finish(start(cwd, never, *leave, **POD_ENV), code=1)[1]]


def test_a_crash_stops_the_pod(scene):
    hub, never, told = scene
    assert hub.seen[-1] == "POST /runpod/pods/pod1/stop -> 200" and not hub.asked("DELETE")
    assert not never.asked("runpod")
    assert all(t.startswith("train.py: 1 bad step in a row") and t.count("\n") == 1 for t in told)


def scene_a_wrong_token(cwd):
    hub = Outside(always=[("/api/", 401)])
    return cwd, hub, *finish(start(cwd, hub, *UPLOADS), code=1)


def test_a_wrong_token(scene):
    """One warning, after one request; training goes on; exit code 1."""
    cwd, hub, out, errors = scene
    assert weights(cwd) and "steps: 20" in out and not errors
    told = warnings(out)
    assert len(told) == 1 and "the Hub refuses (401)" in told[0] and "HF_TOKEN" in told[0]
    assert len(hub.asked("repos/create -> 401")) == 1 and not hub.asked("preupload")


def scene_wandb_that_hangs(cwd):
    """A server that accepts and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        env = {"WANDB_BASE_URL": url, "WANDB_API_KEY": SECRETS["WANDB_API_KEY"]}
        return cwd, finish(start(cwd, None, "--wandb_log", **env))


def test_wandb_that_hangs(scene):
    cwd, (out, errors) = scene
    assert len(warnings(out)) == 1 and "so it logs offline" in out and "steps: 20" in out
    assert SECRETS["WANDB_API_KEY"] not in out + errors
    assert any("offline-run" in d for d in os.listdir(cwd / "out" / "toy" / "wandb"))


def test_a_mistake_before_training_leaves_the_pod_alone(place):
    hub = Outside()
    out, errors = finish(start(place, hub, *POD, "--dataset=nothing", **POD_ENV), code=1)
    assert "data/nothing: no such data set" in errors and errors.count("\n") == 1
    assert not out and hub.seen == []


# --- a slow mount


def losses(cwd):
    return [(r["step"], r["train/loss"]) for r in log(cwd) if "train/loss" in r]


def scene_a_machine_that_was_replaced(cwd):
    """A run, its backup, and then only the backup, with its newest checkpoint damaged; then set
    aside."""

    def run(*args):
        args = ["--backup_dir=drive", "--checkpoint_interval=5", *args]
        return finish(start(cwd, None, *args))[0]

    run()
    kept, listed, curve = weights(cwd), sorted(os.listdir(cwd / "drive" / "toy")), losses(cwd)
    shutil.rmtree(cwd / "out")
    damaged = cwd / "drive" / "toy" / "step_000020" / "model.safetensors"
    damaged.write_bytes(kept[:1000])
    again = run()
    equal = weights(cwd) == kept, losses(cwd) == curve, (cwd / "out" / "toy" / "best").is_dir()
    equal += (damaged.read_bytes() == kept,)
    shutil.rmtree(cwd / "out")
    return cwd, listed, again, equal, run("--init_from=scratch", "--max_iters=10")


def test_a_machine_that_was_replaced(scene):
    cwd, listed, again, equal, scratch = scene
    # rotated like the original
    assert listed == ["best", "log.jsonl", "loss.png", "samples.txt", "step_000015", "step_000020"]
    assert "step_000020 is damaged and passed over" in again
    assert "out/toy held no run: drive/toy/step_000015 is copied back" in again
    assert "resuming out/toy/step_000015" in again
    # the weights of a run that lost nothing; every step in the log once; best/; the backup mended
    assert equal == (True, True, True, True)
    assert "the run in drive/toy is set aside as drive/toy~1" in scratch
    assert "resuming" not in scratch
    assert os.listdir(cwd / "drive" / "toy~1" / "step_000020")
    assert (cwd / "drive" / "toy" / "step_000010").is_dir()
