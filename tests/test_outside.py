"""What a run does beyond its machine, as its user sees it: processes, against stand-ins of the Hub and of RunPod on
loopback, with the real clients. The runs mostly wait, so those of all the tests asked for go on side by side."""
import base64
import concurrent.futures
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ["--dataset=tiny", "--n_layer=2", "--n_head=2", "--n_kv_head=1", "--n_embd=32", "--block_size=32", "--batch_size=4",
        "--eval_iters=2", "--eval_interval=10", "--log_interval=5", "--warmup_iters=2", "--dtype=float32", "--max_iters=20"]
SECRETS = {"HF_TOKEN": "hf_" + "Aq7" * 11, "WANDB_API_KEY": "5e" * 20, "RUNPOD_API_KEY": "rpa_" + "Zx9" * 12}
UPLOADS = ["--hf_repo=me/tiny"]
LARGE = (".safetensors", ".pt", ".png")  # what the Hub keeps beside git
POD = [*UPLOADS, "--terminate_pod=True"]


# --- the stand-ins

class Outside(http.server.ThreadingHTTPServer):
    """The Hub, and RunPod under /runpod. `faults`: (part of "METHOD path", a status or 'cut'), each used up once;
    `always`: the same, for ever. `open`: requests wait for it."""
    daemon_threads = True

    def __init__(self, faults=(), always=()):
        super().__init__(("127.0.0.1", 0), Answer)
        self.faults, self.always, self.open = list(faults), list(always), threading.Event()
        self.seen, self.bodies, self.keys, self.blobs, self.files, self.lock = [], [], set(), {}, {}, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.open.set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a run that was killed

    def asked(self, part):
        """The positions of the requests that hold `part`, in the order in which they were answered."""
        return [i for i, s in enumerate(self.seen) if part in s]


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def say(self, value=None, status=200):
        body = json.dumps(value if value is not None else {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self):
        hub, what = self.server, f"{self.command} {self.path}"
        hub.open.wait(60)
        with hub.lock:
            fault = next((f for f in hub.faults if f[0] in what), None)
            if fault:
                hub.faults.remove(fault)
            fault = fault or next((f for f in hub.always if f[0] in what), None)
        size = int(self.headers.get("Content-Length") or 0)
        if fault and fault[1] == "cut":
            self.rfile.read(size // 2)
            hub.seen.append(f"{what} -> cut")
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        body = self.rfile.read(size)
        with hub.lock:
            hub.bodies.append(what.encode() + b"\n" + body)
            if "/runpod/" in what or "/me/tiny" in what:
                hub.keys.add((what.partition("/runpod/")[1] or "hub", self.headers.get("Authorization")))
            status = fault[1] if fault else 200
            value = self.value(what, body) if not fault else {"error": "no"}
            status = 404 if value is None else 400 if value == "bad" else status
            hub.seen.append(f"{what} -> {status}")
        self.say(value, status)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = answer

    def value(self, what, body):
        hub = self.server
        if "/runpod/pods/" in what or "/validate-yaml" in what or "GET /api/models/" in what and "xet" not in what:
            return {"errors": [], "warnings": [], "id": "me/tiny", "siblings": []}
        if "/api/repos/create" in what:
            return {"url": hub.url + "/me/tiny", "name": "me/tiny"}
        if "/preupload/" in what:
            return {"files": [{"path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if f["path"].endswith(LARGE)
                               else "regular"} for f in json.loads(body)["files"]]}
        if "/objects/batch" in what:
            return {"objects": [{**o, **({} if o["oid"] in hub.blobs else {"actions": {"upload": {
                "href": f"{hub.url}/lfs/{o['oid']}"}}})} for o in json.loads(body)["objects"]]}
        if "PUT /lfs/" in what:
            oid = what.split("/")[-1]
            hub.blobs[oid] = body
            return {} if hashlib.sha256(body).hexdigest() == oid else "bad"
        if "/xet-write-token/" in what:
            return {"casUrl": hub.url, "exp": 9 * 10 ** 9, "accessToken": "xet"}
        if "/v1/xorbs/" in what or "/v1/shards" in what:
            return {"was_inserted": True, "result": 1}
        if "/commit/" in what:
            for line in map(json.loads, body.splitlines()):
                item = line["value"]
                if line["key"] == "file":
                    hub.files[item["path"]] = base64.b64decode(item["content"])
                elif line["key"] == "lfsFile":
                    hub.files[item["path"]] = hub.blobs.get(item["oid"], (item["oid"], item["size"]))
            return {"commitUrl": f"{hub.url}/me/tiny/commit/{'a' * 40}", "commitOid": "a" * 40}
        if "/paths-info/" in what:
            return [self.info(p) for p in urllib.parse.parse_qs(body.decode())["paths"] if p in hub.files]

    def info(self, path):
        content = self.server.files[path]
        oid, size = content if isinstance(content, tuple) else (hashlib.sha256(content).hexdigest(), len(content))
        return {"type": "file", "path": path, "size": size, "oid": "0" * 40,
                **({"lfs": {"oid": oid, "size": size, "pointerSize": 130}} if path.endswith(LARGE) else {})}


# --- runs

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with data/tiny: 200 small documents, bytes for tokens."""
    cwd = tmp_path_factory.mktemp("outside")
    rng, words = random.Random(0), "the cat sat on a mat and saw one red hat in an old van".split()
    docs = [" ".join(rng.choices(words, k=rng.randrange(10, 30))) + "." for _ in range(200)]
    (cwd / "tiny.txt").write_text("<|endoftext|>".join(docs))
    run = subprocess.run([sys.executable, os.path.join(ROOT, "prepare.py"), "tiny.txt", "--tokenizer=byte",
                          "--val_fraction=0.1"], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return cwd


def start(cwd, hub, *args, **env):
    """A run in `cwd`, with the stand-in for its Hub and its RunPod. A value of None takes a variable away."""
    import matplotlib
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WANDB_", "RUNPOD_"))}
    nowhere = "http://127.0.0.1:9"
    env = {**ours, "OMP_NUM_THREADS": "1", "HF_ENDPOINT": hub.url if hub else nowhere, "NO_PROXY": "*",
           "HF_HUB_DISABLE_XET": "1", "RUNPOD_API_BASE": f"{hub.url}/runpod" if hub else nowhere, "HOME": str(cwd),
           "HF_HOME": str(cwd / "hf"),
           "MPLCONFIGDIR": matplotlib.get_cachedir(), "HF_TOKEN": SECRETS["HF_TOKEN"], **env}
    return subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *TINY, *args], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={k: v for k, v in env.items() if v is not None})


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


def weights(cwd, step=20, run="toy"):
    return (cwd / "out" / run / f"step_{step:06d}" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def side_by_side(request, place, tmp_path_factory):
    """{test: the future of what its scene_... returns}, for the tests of this file that were asked for."""
    names = [i.function.__name__ for i in request.session.items if i.module is request.module and "scene" in i.fixturenames]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = {}
        for name in names:
            cwd = tmp_path_factory.mktemp(name)
            shutil.copytree(place / "data", cwd / "data")
            futures[name] = pool.submit(getattr(request.module, name.replace("test_", "scene_", 1)), cwd)
        yield futures


@pytest.fixture
def scene(request, side_by_side):
    return side_by_side[request.function.__name__].result()


# --- the Hub, and the pod

def scene_the_pod_ends_after_the_confirmed_model(cwd):
    """The first two uploads fail, the third is cut half-way; the secrets stand in .env, in each of its notations."""
    (cwd / ".env").write_text(f"# mine\nHF_TOKEN={SECRETS['HF_TOKEN']}  # write\n"
                              f"export WANDB_API_KEY=\"{SECRETS['WANDB_API_KEY']}\"\n"
                              f"RUNPOD_API_KEY = '{SECRETS['RUNPOD_API_KEY']}'\nOTHER=1\n")
    hub = Outside(faults=[("/objects/batch", 520), ("/commit/", 520), ("/commit/", "cut")])
    out, errors = finish(start(cwd, hub, *POD, "--wandb_log", HF_TOKEN=None, RUNPOD_POD_ID="pod1", WANDB_MODE="offline"))
    return cwd, hub, out, errors


def test_the_pod_ends_after_the_confirmed_model(scene):
    cwd, hub, out, errors = scene
    # in log.jsonl and in the requests: three failures, two checkpoints, the final model, asked for, and then the pod
    order = events(cwd, "upload failed", "upload", "pod")
    first, second = "me/tiny/checkpoints/step_000010", "me/tiny/checkpoints/step_000020"
    went = [("upload", first), ("upload", second), ("upload", "me/tiny")]
    assert order == [("upload failed", first)] * 3 + went + [("pod", None)]
    kinds = [re.search(r"create|batch -> \d+|commit/main -> \w+|paths-info|DELETE .*|/stop", s) for s in hub.seen]
    kinds = [k[0] for k in kinds if k]
    whole = ["create", "batch -> 200", "commit/main -> 200", "paths-info"]
    assert kinds == ["create", "create", "batch -> 520", "create", "batch -> 200", "commit/main -> 520", "create",
                     "batch -> 200", "commit/main -> cut", *whole * 3, "DELETE /runpod/pods/pod1 -> 200"]
    assert hub.keys == {("hub", f"Bearer {SECRETS['HF_TOKEN']}"), ("/runpod/", f"Bearer {SECRETS['RUNPOD_API_KEY']}")}
    assert len(warnings(out)) == 2 and "not in /workspace" in out and "is tried again, training goes on" in out
    assert out.index("waiting for uploads") < out.index("the final model is at") < out.index("in ten seconds; Ctrl-C calls")
    assert "pod pod1 was told to terminate" in out and not os.path.exists(cwd / "out" / "toy" / ".uploading") and not errors


def test_what_is_on_the_hub(side_by_side):
    cwd, hub, _, _ = side_by_side["test_the_pod_ends_after_the_confirmed_model"].result()
    local = set(os.listdir(cwd / "out" / "toy" / "step_000020"))
    assert {"trainer.pt", "model.safetensors", "tokenizer.json"} < local
    assert set(hub.files) == {f"checkpoints/step_0000{n}/{f}" for n in (10, 20) for f in local} \
        | local - {"trainer.pt"} | {"README.md", "loss.png"}
    for path, content in hub.files.items():  # byte for byte; a checkpoint's trainer.pt too, so that a run can go on from it
        there = cwd / "out" / "toy" / (path.removeprefix("checkpoints/") if "/" in path else f"step_000020/{path}")
        assert path in ("README.md", "loss.png") or there.read_bytes() == content
    card = hub.files["README.md"].decode()
    assert card.startswith('---\nlibrary_name: "transformers"\npipeline_tag: "text-generation"\n'
                           'tags: ["nanosmol", "pretrain"]\n---\n')
    last = [r["val/loss"] for r in log(cwd) if "val/loss" in r][-1]
    for part in (f"| val/loss at the end | 20 | {last:.4f} |", "n_embd = 32", "tokens of tiny",
                 'AutoModelForCausalLM.from_pretrained("me/tiny")', "python sample.py --init_from=me/tiny",
                 "![loss](loss.png)"):
        assert part in card
    assert str(cwd) not in card and not re.search(r"= '[/~]", card)


def test_no_secret_is_anywhere(side_by_side):
    cwd, hub, out, errors = side_by_side["test_the_pod_ends_after_the_confirmed_model"].result()
    paths = [os.path.join(d, f) for d, _, files in os.walk(cwd) for f in files if f != ".env"]
    texts = {p: open(p, "rb").read() for p in paths}
    assert any(f.endswith(".wandb") for f in texts) and any(f.endswith("trainer.pt") for f in texts)
    texts |= {"stdout": out.encode(), "stderr": errors.encode()} | {f"request {i}": b for i, b in enumerate(hub.bodies)}
    texts |= {f"upload {p}": b for p, b in hub.files.items()}
    for name, text in texts.items():
        for key, secret in SECRETS.items():
            assert secret.encode() not in text and base64.b64encode(secret.encode())[:-4] not in text, (key, name)


def scene_uploads_that_always_fail_stop_the_pod(cwd):
    hub = Outside(always=[("/preupload/", 520)])
    env = dict(RUNPOD_POD_ID="pod1", RUNPOD_API_KEY=SECRETS["RUNPOD_API_KEY"])
    out, _ = finish(start(cwd, hub, *POD, **env))
    first, hub.seen, hub.always = hub.seen, [], []
    kept = sorted(os.listdir(cwd / "out" / "toy" / ".uploading"))
    again, _ = finish(start(cwd, hub, *POD, **env))
    return cwd, hub, out, first, kept, again


def test_uploads_that_always_fail_stop_the_pod(scene):
    cwd, hub, out, first, kept, again = scene
    assert first[-1] == "POST /runpod/pods/pod1/stop -> 200" and not any("DELETE" in s or "commit" in s for s in first)
    assert len(warnings(out)) == 2 and "/workspace" in warnings(out)[0] and "is tried again" in warnings(out)[1]
    assert "the final model is not on the Hub but in out/toy; the same command tries again" in out
    assert weights(cwd, 10) and weights(cwd, 20) and kept == ["final", "step_000010", "step_000020"]
    # the pod is started again, and the same command typed: what is missing goes up, and now it ends
    assert "step_000020" in again and "tok/s" not in again and hub.seen[-1] == "DELETE /runpod/pods/pod1 -> 200"
    assert hub.files["model.safetensors"] == weights(cwd) and "checkpoints/step_000010/trainer.pt" in hub.files


def scene_a_hub_that_lies_stops_the_pod(cwd):
    """Every request succeeds, but what the Hub names, when asked, is other weights."""
    hub = Outside()

    class Liar(Answer):
        def info(self, path):
            told = super().info(path)
            return told | ({"lfs": dict(told["lfs"], oid="0" * 64)} if path == "model.safetensors" else {})
    hub.RequestHandlerClass = Liar
    out, _ = finish(start(cwd, hub, *POD, RUNPOD_POD_ID="pod1", RUNPOD_API_KEY=SECRETS["RUNPOD_API_KEY"]))
    return hub, out


def test_a_hub_that_lies_stops_the_pod(scene):
    hub, out = scene
    assert hub.seen[-1] == "POST /runpod/pods/pod1/stop -> 200" and not hub.asked("DELETE")
    assert "checkpoints/step_000020/config.json" in hub.files and "what is on the Hub is not what was sent" in out


def scene_training_does_not_wait(cwd):
    """The Hub answers nothing until training has ended. The client's defaults here, which is the Xet protocol."""
    hub = Outside()
    hub.open.clear()
    process = start(cwd, hub, *UPLOADS, HF_HUB_DISABLE_XET=None, RUNPOD_POD_ID="p", RUNPOD_API_KEY="k")
    text = until(process, "--- 20 steps")
    before = list(hub.seen)
    hub.open.set()
    return cwd, hub, before, text + finish(process)[0]


def test_training_does_not_wait(scene):
    cwd, hub, before, text = scene
    assert before == [] and hub.asked("/v1/xorbs/") and not warnings(text)
    assert not hub.asked("runpod")  # a first try on a pod, without terminate_pod, does not end it
    assert hub.files["model.safetensors"] == (hashlib.sha256(weights(cwd)).hexdigest(), len(weights(cwd)))
    assert [e[1] for e in events(cwd, "upload")] == [
        "me/tiny/checkpoints/step_000010", "me/tiny/checkpoints/step_000020", "me/tiny"]


def scene_rotation_leaves_what_is_to_be_uploaded(cwd):
    """keep_checkpoints=1 and a Hub that opens only after the last of four checkpoints; then a kill -9 before it does."""
    hub = Outside()
    hub.open.clear()
    args = [*UPLOADS, "--keep_checkpoints=1", "--checkpoint_interval=5"]
    process = start(cwd, hub, *args)
    until(process, "--- 20 steps")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = [d for d in os.listdir(cwd / "out" / "toy") if d.startswith("step")]
    hub.open.set()
    finish(start(cwd, hub, *args))
    return cwd, hub, left


def test_rotation_leaves_what_is_to_be_uploaded(scene):
    cwd, hub, left = scene
    assert left == ["step_000020"]
    assert {p.split("/")[1] for p in hub.files if "/" in p} == {f"step_0000{n}" for n in ("05", "10", "15", "20")}
    assert hub.files["model.safetensors"] == weights(cwd)


def scene_runpod_that_refuses_is_told(cwd):
    hub = Outside(always=[("/runpod/", 500)])
    return hub, finish(start(cwd, hub, "--terminate_pod=True", RUNPOD_POD_ID="p", RUNPOD_API_KEY="wrong"))[0]


def test_runpod_that_refuses_is_told(scene):
    hub, out = scene
    assert hub.seen == ["POST /runpod/pods/p/stop -> 500"] * 3 and "without hf_repo the pod is stopped" in out
    assert "could not stop pod p, which runs on, and costs: 500" in out and "https://console.runpod.io/pods" in out


def scene_an_interrupted_run_never_touches_the_pod(cwd):
    """SIGTERM in training, and Ctrl-C within the ten seconds."""
    hub, env = Outside(), dict(RUNPOD_POD_ID="p", RUNPOD_API_KEY=SECRETS["RUNPOD_API_KEY"])
    process = start(cwd, hub, *POD, "--max_iters=100000", **env)
    until(process, "step      5 |")
    process.send_signal(signal.SIGTERM)
    said = [finish(process)[0]]
    process = start(cwd, hub, *POD, "--out_dir=out/second", **env)
    until(process, "RunPod: about to terminate")
    process.send_signal(signal.SIGINT)
    return hub, [*said, finish(process)[0]]


def test_an_interrupted_run_never_touches_the_pod(scene):
    hub, said = scene
    assert not hub.asked("runpod") and "SIGTERM: stopped after step" in said[0] and "called off, pod p runs on" in said[1]
    assert len([p for p in hub.files if p.endswith("trainer.pt")]) >= 3  # the last checkpoint of the first went up too


def scene_a_crash_stops_the_pod(cwd):
    hub, never, env = Outside(), Outside(), dict(RUNPOD_POD_ID="p", RUNPOD_API_KEY=SECRETS["RUNPOD_API_KEY"])
    crash = ["--learning_rate=1e30", "--muon_lr=1e30", "--max_bad_steps=1"]
    return hub, never, [finish(start(cwd, h, *POD, *crash, *more, **env), code=1)[1]
                        for h, more in ((hub, []), (never, ["--terminate_on_error=never"]))]


def test_a_crash_stops_the_pod(scene):
    hub, never, told = scene
    assert hub.seen[-1] == "POST /runpod/pods/p/stop -> 200" and not hub.asked("DELETE") and not never.asked("runpod")
    assert all(t.startswith("train.py: 1 bad steps in a row") and t.count("\n") == 1 for t in told)


def test_secrets_come_from_the_environment_or_the_file(tmp_path, monkeypatch):
    import prepare
    (tmp_path / "env").write_text("HF_TOKEN=from_file # mine\nexport WANDB_API_KEY = 'quoted+key='\n"
                                  "RUNPOD_API_KEY=\nPATH=/x\n=\n")
    for key in SECRETS:
        monkeypatch.setenv(key, "")  # so that what it was comes back afterwards
        monkeypatch.delenv(key)
    monkeypatch.setenv("HF_TOKEN", "hf_environment\n")
    before = os.environ["PATH"]
    prepare.read_secrets(str(tmp_path / "env"))
    assert [os.environ[k] for k in SECRETS] == ["hf_environment", "quoted+key=", ""] and os.environ["PATH"] == before
    assert prepare.without_secrets("Illegal header b'Bearer hf_environment'") == "Illegal header b'Bearer [HF_TOKEN]'"
    prepare.read_secrets(str(tmp_path / "none"))
    for written in ("\ufeffHF_TOKEN=one\nHF_TOKEN=two".encode(), "\ufeffHF_TOKEN=two\r\n".encode("utf-16-le")):  # Windows' editors
        (tmp_path / "env").write_bytes(written)
        monkeypatch.delenv("HF_TOKEN")
        prepare.read_secrets(str(tmp_path / "env"))
        assert os.environ["HF_TOKEN"] == "two"
    for bad in ("hf_café", '"hf_open', "hf_a\0b"):
        (tmp_path / "env").write_text(f"HF_TOKEN={bad}\n")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        with pytest.raises(prepare.UserError, match="HF_TOKEN: it holds a quote, a space or another character") as e:
            prepare.read_secrets(str(tmp_path / "env"))
        assert bad not in str(e.value)


# --- bad input: one warning, and training goes on

def bad_hub(cwd, hub, *args, **env):
    out, errors = finish(start(cwd, hub, *UPLOADS, *args, **env))
    assert weights(cwd) and "--- 20 steps" in out and not errors
    return hub, warnings(out), out


def scene_a_wrong_token(cwd):
    return bad_hub(cwd, Outside(always=[("/api/", 401)]))


def test_a_wrong_token(scene):
    hub, told, _ = scene
    assert len(told) == 1 and "the Hub refuses (401)" in told[0] and "HF_TOKEN" in told[0] and not hub.asked("preupload")
    assert len(hub.asked("repos/create -> 401")) == 1  # asked at the start, not at the first checkpoint


def scene_a_repository_of_someone_else(cwd):
    return bad_hub(cwd, Outside(always=[("/repos/create", 403), ("/preupload/", 403)]))


def test_a_repository_of_someone_else(scene):
    hub, told, _ = scene
    assert len(told) == 1 and "the Hub refuses (403)" in told[0] and len(hub.asked("preupload")) == 1


def scene_no_network_at_all(cwd):
    return bad_hub(cwd, None)


def test_no_network_at_all(scene):
    _, told, out = scene
    assert len(told) == 1 and "Connection refused" in told[0] and "the final model is not on the Hub but in out/toy" in out


def scene_wandb_that_hangs(cwd):
    """A server that accepts and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        process = start(cwd, None, "--wandb_log", WANDB_BASE_URL=f"http://127.0.0.1:{server.getsockname()[1]}",
                        WANDB_API_KEY=SECRETS["WANDB_API_KEY"])
        return cwd, finish(process)


def test_wandb_that_hangs(scene):
    cwd, (out, errors) = scene
    assert len(warnings(out)) == 1 and "so it logs offline" in out and "--- 20 steps" in out
    assert SECRETS["WANDB_API_KEY"] not in out + errors
    assert any("offline-run" in d for d in os.listdir(cwd / "out" / "toy" / "wandb"))


@pytest.mark.parametrize("arg, said", [("--hf_repo=tiny", "hf_repo='tiny': expected the id of a Hub repository, owner/name"),
                                       ("--backup_dir=no/drive/x", "no/drive does not exist; mount the drive"),
                                       ("--dataset=nothing", "data/nothing: no such data set")])
def test_slips_of_the_pen(place, arg, said):
    """Told in one line, and the pod lives on: training had not begun."""
    hub = Outside()
    out, errors = finish(start(place, hub, *POD, arg, RUNPOD_POD_ID="p", RUNPOD_API_KEY=SECRETS["RUNPOD_API_KEY"]), code=1)
    assert said in errors and errors.count("\n") == 1 and not out and hub.seen == []


# --- a slow mount

def scene_a_machine_that_was_replaced(cwd):
    """A run, its backup, and then only the backup: with its newest checkpoint damaged, and set aside."""
    def run(*args):
        return finish(start(cwd, None, "--backup_dir=drive", "--checkpoint_interval=5", *args))[0]
    run()
    kept, listed, curve = weights(cwd), sorted(os.listdir(cwd / "drive" / "toy")), losses(cwd)
    shutil.rmtree(cwd / "out")
    (cwd / "drive" / "toy" / "step_000020" / "model.safetensors").write_bytes(kept[:1000])
    again = run()
    equal = weights(cwd) == kept, losses(cwd) == curve, (cwd / "out" / "toy" / "best").is_dir()
    shutil.rmtree(cwd / "out")
    return cwd, listed, again, equal, run("--init_from=scratch", "--max_iters=10")


def losses(cwd):
    return [(r["step"], r["train/loss"]) for r in log(cwd) if "train/loss" in r]


def test_a_machine_that_was_replaced(scene):
    cwd, listed, again, equal, scratch = scene
    assert listed == ["best", "log.jsonl", "loss.png", "step_000015", "step_000020"]  # rotated like the original
    assert "step_000020 is damaged and passed over" in again and "resuming out/toy/step_000015" in again
    assert "out/toy held no run: drive/toy/step_000015 is copied back" in again
    assert equal == (True, True, True)  # the weights of a run that lost nothing; every step in the log once; best/
    assert "the run in drive/toy is set aside as drive/toy~1" in scratch and "resuming" not in scratch
    assert os.listdir(cwd / "drive" / "toy~1" / "step_000020") and (cwd / "drive" / "toy" / "step_000010").is_dir()


FULL = """import errno, shutil
copy = shutil.copyfile
def copyfile(source, target, **options):
    if "/drive/" in str(target) or str(target).startswith("drive/"):
        open(target, "wb").write(open(source, "rb").read(1000))
        raise OSError(errno.ENOSPC, "No space left on device")
    return copy(source, target, **options)
shutil.copyfile = copyfile
"""


def scene_a_full_drive(cwd):
    """Every copy to the drive ends after 1,000 bytes, as on a full one."""
    (cwd / "full").mkdir()
    (cwd / "full" / "sitecustomize.py").write_text(FULL)
    return cwd, finish(start(cwd, None, "--backup_dir=drive", PYTHONPATH=str(cwd / "full")))


def test_a_full_drive(scene):
    cwd, (out, errors) = scene
    assert len(warnings(out)) == 1 and "backup_dir=drive: [Errno 28] No space left on device" in out and not errors
    assert [e for e, _ in events(cwd, "backup failed")] == ["backup failed"] * 2
    assert weights(cwd) and not [f for f in os.listdir(cwd / "drive" / "toy") if not f.endswith(".tmp")]
