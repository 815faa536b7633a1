"""A run or a preparation that is killed, however often and wherever, ends as one that was not: equal
weights and bins to the byte, no directory under its final name that is not whole at any moment, no
temporary file at the end, every step in the log once."""

import itertools
import random
import sys

import pytest
from stand_ins import SECRETS, Outside

sys.path.insert(0, __file__.rpartition("/")[0])
import driver

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks runs, as Linux does it")
BACKUP, UPLOADS = "--backup_dir=backup", "--hf_repo=me/tiny"


@pytest.fixture(scope="module")
def hub():
    """A stand-in of the Hub, for the real client in the processes that are killed."""
    hub = Outside()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        patch.setenv("NO_PROXY", "*")
        yield hub
    hub.close()


@pytest.fixture(scope="module")
def killer(tmp_path_factory, hub):
    killer = driver.Killer(tmp_path_factory.mktemp("kill"), ", huggingface_hub.hf_api")
    driver.make_world(killer)
    yield killer
    killer.close()


def kill(killer, hub, stage, rng, kills, more=""):
    hub.files.clear()
    hub.blobs.clear()
    hits = driver.kill_training(killer, stage, rng, kills, more)
    last = driver.runs.checkpoints(killer.cwd / "out" / "run")[-1]
    with open(f"{last}/model.safetensors", "rb") as f:
        weights = f.read()
    if UPLOADS in more:
        place = f"checkpoints/{last.rpartition('/')[2]}/model.safetensors"
        assert hub.files["model.safetensors"] == hub.files[place] == weights
    if BACKUP in more:
        assert not driver.not_whole(killer.cwd / "backup")
    return hits


@pytest.mark.parametrize("stage", driver.STAGES)
def test_training(killer, hub, stage):
    """The short version: each stage, killed up to three times."""
    more = {"pretrain": BACKUP, "sft": UPLOADS}.get(stage, "")
    assert kill(killer, hub, stage, random.Random(0), 3, more) > 0


@pytest.mark.parametrize("name", ("bpe", "chat"))
def test_preparation(killer, name):
    assert driver.kill_preparation(killer, name, random.Random(0), 3, over="text") > 0


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_a_thousand_kills(killer, hub, part):
    """250 in each part: two thirds in training, a third in preparation."""
    rng, hits, runs = random.Random(part + 1), 0, 0
    everything = itertools.product(("", BACKUP, UPLOADS), driver.STAGES)
    scenes = itertools.cycle([*everything, *(("prepare", name) for name in driver.SOURCES)])
    while hits < 250:
        what, name = next(scenes)
        kills = rng.choice((2, 5, 9))
        if what == "prepare":
            over = rng.choice(("", "text", "chat"))
            hits += driver.kill_preparation(killer, name, rng, kills, over)
        else:
            hits += kill(killer, hub, name, rng, kills, what)
        runs += 1
    print(f"{hits} kills in {runs} runs: all ended as runs that were not killed")
