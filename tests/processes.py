"""Runs scripts as their users do, in processes of their own.

A server imports torch once and forks for every run, which takes a tenth of the time that a fresh
interpreter needs.
"""

import json
import os
import subprocess
import sys
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# What a process does: `job` says what to run, where, and where its output goes. It ends as Python
# ends, except that modules are not freed, which takes a second once torch was imported.
PROCESS = """
os.chdir(job["cwd"])
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for number, path in ((1, job["stdout"]), (2, job["stderr"])):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
sys.path[0] = job["root"]
sys.argv = job["argv"]
code = 0
try:
    exec(job["patch"])
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as e:
    code = e.code
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
except BaseException:
    sys.excepthook(*sys.exc_info())
    code = 1
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code or 0)
"""
IMPORTS = "import atexit, gc, json, os, runpy, sys, threading"
ALONE = f"{IMPORTS}\njob = json.loads(sys.argv[1])\n{PROCESS}"
SERVER = f"""{IMPORTS}
sys.path[0] = sys.argv[1]
import matplotlib.figure, requests, safetensors.torch, tokenizers, torch._dynamo, tqdm
if sys.argv[1]:
    import model, prepare
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
{PROCESS}
"""


class Processes:
    """Runs scripts in the directory `cwd`. `root` is where they are; '': each run says where, and
    model.py and prepare.py are imported by each."""

    def __init__(self, cwd, root=ROOT):
        self.cwd, self.root, self.server = cwd, root, None
        self.env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if sys.platform == "linux":  # elsewhere a fork is slow, unsafe or not there
            command = [sys.executable, "-c", SERVER, str(root)]
            pipes = dict(text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.server = subprocess.Popen(command, env=self.env, **pipes)

    def run(self, script, *args, patch="", root=None):
        """The exit code and output of a script; `args` are texts of options with spaces between
        them. `patch` is Python code that runs first."""
        root, cwd = str(root or self.root), self.cwd
        paths = {name: str(cwd / name) for name in ("stdout", "stderr")}
        argv = [os.path.join(root, script), *" ".join(args).split()]
        job = json.dumps({"root": root, "cwd": str(cwd), "argv": argv, "patch": patch, **paths})
        if self.server:
            self.server.stdin.write(job + "\n")
            self.server.stdin.flush()
            code = int(self.server.stdout.readline())
        else:
            command = [sys.executable, "-c", ALONE, job]
            code = subprocess.run(command, env=self.env).returncode
        out, err = ((cwd / name).read_text("utf-8", "replace") for name in ("stdout", "stderr"))
        return types.SimpleNamespace(code=code, out=out, err=err, all=out + err)

    def finished(self, script, *args, **more):
        """The same; the exit code must be 0."""
        result = self.run(script, *args, **more)
        assert result.code == 0, result.err[-3000:]
        return result

    def close(self):
        if self.server:
            self.server.stdin.close()
            self.server.wait(timeout=60)
