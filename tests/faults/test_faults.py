"""Faults at moments drawn from a seed; ``python -m tests.faults`` draws more of them."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.faults.__main__ import campaign
from tests.faults.campaign import ASKS, KILLS, KINDS, WORKERS, draw, draw_kinds
from tests.faults.hosts import Hosts, hosts

SEED = int(os.environ.get("CIFAR_DIST_FAULTS_SEED", "0"))


@pytest.fixture(scope="module")
def cluster():
    with hosts(WORKERS) as cluster:
        yield cluster


@pytest.mark.timeout(900)
def test_faults_on_two_hosts_change_no_bit(cluster: Hosts, tmp_path: Path) -> None:
    # The loss of a host, and two others of the kinds that there are: each costs half a minute.
    chance = random.Random(SEED)
    kinds = ["node", *chance.sample([kind for kind in KINDS if kind != "node"], 2)]
    chance.shuffle(kinds)
    said: list[str] = []
    wrong = campaign(cluster, tmp_path, kinds, SEED, said.append)
    print("\n".join(said))
    assert wrong == 0, said


def test_faults_are_drawn_anew_from_the_seed() -> None:
    assert draw(7, KINDS, 45) == draw(7, KINDS, 45)
    drawn = [[(fault.step, fault.delay) for fault in draw(seed, KINDS, 45)] for seed in range(50)]
    assert len({repr(each) for each in drawn}) == 50
    assert {step for each in drawn for step, _ in each} == set(range(1, 44))
    assert draw_kinds(1, 20, 2) != draw_kinds(2, 20, 2)
    assert sorted(draw_kinds(3, 20, 2)) == sorted([*KILLS * 4, *ASKS])
