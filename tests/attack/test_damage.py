"""Whatever happens to a file that the programs read, it is named in one line, or made up for in one
that says so, or does not matter: see damage.py for how a case may end."""

import collections
import random
import sys

import pytest

sys.path.insert(0, __file__.rpartition("/")[0])
import damage
import driver

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks runs, as Linux does it")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    killer = driver.Killer(tmp_path_factory.mktemp("damage"))
    yield damage.scenes(killer)
    killer.close()


def attack(scenes, seed, count):
    rng, counts, failures = random.Random(seed), collections.Counter(), []
    for i in range(count):
        ending, what = scenes[i % len(scenes)].case(rng)
        counts[ending] += 1
        if ending[0].isupper():
            failures.append(f"--- {ending}: {what}")
    print(f"{count} cases: {dict(counts)}")
    assert not failures, "\n".join([str(dict(counts)), *failures])


def test_damage(scenes):
    """The short version."""
    attack(scenes, 0, len(scenes))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_a_thousand_damaged_files(scenes, part):
    attack(scenes, part + 1, 250)
