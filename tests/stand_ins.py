"""Stand-ins of the Hub and of RunPod on loopback, for the real clients; and secrets to look for."""

import base64
import hashlib
import http.server
import json
import socket
import threading
import urllib.parse

SECRETS = {
    "HF_TOKEN": "hf_" + "Aq7" * 11,
    "WANDB_API_KEY": "5e" * 20,
    "RUNPOD_API_KEY": "rpa_" + "Zx9" * 12,
}
LARGE = (".safetensors", ".pt", ".png")  # what the Hub keeps beside git


class Outside(http.server.ThreadingHTTPServer):
    """The Hub, and RunPod under /runpod. `faults`: (part of "METHOD path", a status or 'cut'), each used up once;
    `always`: the same, for ever. `open`: requests wait for it."""

    daemon_threads = True

    def __init__(self, faults=(), always=()):
        super().__init__(("127.0.0.1", 0), Answer)
        self.faults, self.always, self.open = list(faults), list(always), threading.Event()
        self.seen, self.bodies, self.keys, self.blobs, self.files, self.lock = (
            [],
            [],
            set(),
            {},
            {},
            threading.Lock(),
        )
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.open.set()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

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
                hub.keys.add(
                    (what.partition("/runpod/")[1] or "hub", self.headers.get("Authorization"))
                )
            status = fault[1] if fault else 200
            value = self.value(what, body) if not fault else {"error": "no"}
            status = 404 if value is None else 400 if value == "bad" else status
            hub.seen.append(f"{what} -> {status}")
        self.say(value, status)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = answer

    def value(self, what, body):
        hub = self.server
        if (
            "/runpod/pods/" in what
            or "/validate-yaml" in what
            or "GET /api/models/" in what
            and "xet" not in what
        ):
            return {"errors": [], "warnings": [], "id": "me/tiny", "siblings": []}
        if "/api/repos/create" in what:
            return {"url": hub.url + "/me/tiny", "name": "me/tiny"}
        if "/preupload/" in what:
            return {
                "files": [
                    {
                        "path": f["path"],
                        "shouldIgnore": False,
                        "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                    }
                    for f in json.loads(body)["files"]
                ]
            }
        if "/objects/batch" in what:
            return {
                "objects": [
                    {
                        **o,
                        **(
                            {}
                            if o["oid"] in hub.blobs
                            else {"actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}}
                        ),
                    }
                    for o in json.loads(body)["objects"]
                ]
            }
        if "PUT /lfs/" in what:
            oid = what.split("/")[-1]
            hub.blobs[oid] = body
            return {} if hashlib.sha256(body).hexdigest() == oid else "bad"
        if "/xet-write-token/" in what:
            return {"casUrl": hub.url, "exp": 9 * 10**9, "accessToken": "xet"}
        if "/v1/xorbs/" in what or "/v1/shards" in what:
            return {"was_inserted": True, "result": 1}
        if "/commit/" in what:
            for line in map(json.loads, body.splitlines()):
                item = line["value"]
                if line["key"] == "file":
                    hub.files[item["path"]] = base64.b64decode(item["content"])
                elif line["key"] == "lfsFile":
                    hub.files[item["path"]] = hub.blobs.get(
                        item["oid"], (item["oid"], item["size"])
                    )
            return {"commitUrl": f"{hub.url}/me/tiny/commit/{'a' * 40}", "commitOid": "a" * 40}
        if "/paths-info/" in what:
            return [
                self.info(p)
                for p in urllib.parse.parse_qs(body.decode())["paths"]
                if p in hub.files
            ]

    def info(self, path):
        content = self.server.files[path]
        oid, size = (
            content
            if isinstance(content, tuple)
            else (hashlib.sha256(content).hexdigest(), len(content))
        )
        return {
            "type": "file",
            "path": path,
            "size": size,
            "oid": "0" * 40,
            **(
                {"lfs": {"oid": oid, "size": size, "pointerSize": 130}}
                if path.endswith(LARGE)
                else {}
            ),
        }


class Liar(Answer):
    """A Hub where every request succeeds, but which names other weights when it is asked."""

    def info(self, path):
        honest = super().info(path)
        return honest | (
            {"lfs": dict(honest["lfs"], oid="0" * 64)} if path == "model.safetensors" else {}
        )
