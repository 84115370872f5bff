"""The driver of a run that faults happen to: trains, and prints its events as lines of JSON."""

from __future__ import annotations

import dataclasses
import functools
import json

from cifar_dist.cluster import trainer
from cifar_dist.config.train import make_config
from cifar_dist.events import Event
from cifar_dist.exits import run_command
from cifar_dist.train import train
from tests.faults.workers import counting_worker


def print_event(event: Event) -> None:
    print(json.dumps({"kind": type(event).__name__, **dataclasses.asdict(event)}), flush=True)


def main(words: list[str]) -> None:
    trainer.train_on_ray = functools.partial(trainer.train_on_ray, worker=counting_worker)
    train(make_config(json.loads(words[0])), print_event)


if __name__ == "__main__":
    run_command(main)
