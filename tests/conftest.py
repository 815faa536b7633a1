import json
import os
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
SHARED = os.path.join(os.path.dirname(ROOT), "shared", "data")


# models this small lose more to waiting for a second thread than they gain
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty directory, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, content):
    """Writes a text, bytes, or a list of records as JSON lines."""
    if isinstance(content, list):
        content = "".join(json.dumps(record) + "\n" for record in content)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as f:
        f.write(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def shared():
    """The directory of real texts; tests that need it are skipped, with the reason, where it is not."""
    if not os.path.isdir(SHARED):
        pytest.skip(f"needs the sample texts of {SHARED}")
    return SHARED


# the files that take longest, of which pytest-xdist would begin with those of most tests
LONG = ("outside", "hacks", "lost", "stages", "train", "toy", "signals", "bench", "out_of_memory")


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Long files first: at the end no process waits minutes for the other."""
    order = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))
