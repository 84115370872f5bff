"""``python -m tests.faults --kills 50 --seed 7``: a campaign of faults, as a table."""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.campaign import KINDS, STEPS, WORKERS, Fault, Run, draw, draw_kinds, run
from tests.faults.hosts import Hosts, hosts

EPOCHS = 5
KILLS_PER_RUN = 5


def main() -> int:
    """Run the campaign; 1 if a run ended with other bits, or an image was not seen once."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of processes and nodes")
    parser.add_argument("--asks", type=int, default=2, help="interrupts and notices besides")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    chosen = parser.parse_args()
    say = functools.partial(print, flush=True)
    with tempfile.TemporaryDirectory() as folder, hosts(WORKERS) as cluster:
        say(f"hosts: {cluster.kind}; seed {chosen.seed}")
        kinds = draw_kinds(chosen.seed, chosen.kills, chosen.asks)
        return int(campaign(cluster, Path(folder), kinds, chosen.seed, say) > 0)


def campaign(
    cluster: Hosts, folder: Path, kinds: list[str], seed: int, say: Callable[[str], None]
) -> int:
    """Runs with these faults, each against one without; says a table.

    Every second run, the first one too, is elastic: a lost node shrinks it, and the next one lets
    it grow. It has ``--sync-batchnorm``, so that its weights too must come out to the bit.

    Returns:
        How many runs ended otherwise than they must.
    """
    began = time.monotonic()
    undisturbed: dict[bool, Run] = {}
    say("| fault | at step | workers | restarts | noticed, s | restarted, s | caught up, s | "
        "lost, s | end |")  # fmt: skip
    say("|---|---|---|---|---|---|---|---|---|")
    wrong, all_faults = 0, []
    for number in range(0, len(kinds), KILLS_PER_RUN):
        elastic = number // KILLS_PER_RUN % 2 == 0
        if elastic not in undisturbed:
            undisturbed[elastic] = run(
                cluster, folder, f"undisturbed{elastic}", EPOCHS, sync_batchnorm=elastic
            )
        ended = run(
            cluster, folder, f"faults{number}", EPOCHS,
            draw(seed * 1000 + number, kinds[number : number + KILLS_PER_RUN], EPOCHS * STEPS),
            num_workers=f"1:{WORKERS}" if elastic else WORKERS, sync_batchnorm=elastic,
        )  # fmt: skip
        good, end = verdict(ended, undisturbed[elastic])
        wrong += not good
        all_faults += ended.faults
        for fault in ended.faults:
            say(row(fault, f"1:{WORKERS}" if elastic else str(WORKERS), end))
    for kind in KINDS:
        if of_kind := [each for each in all_faults if each.kind == kind]:
            say(summary(kind, of_kind))
    say(f"{len(kinds)} faults in {time.monotonic() - began:.0f} s; runs that ended wrong: {wrong}")
    return wrong


def verdict(ended: Run, undisturbed: Run) -> tuple[bool, str]:
    """Whether a run ended as it must, and how, in words."""
    if not ended.every_image_once:
        return False, "IMAGES NOT SEEN ONCE"
    if not ended.same_weights(undisturbed):
        return False, "OTHER WEIGHTS"
    if ended.workers != [WORKERS] * EPOCHS:
        workers = " ".join(map(str, ended.workers))
        return True, f"same weights, every image once; workers by epoch {workers}"
    same = ended.same_history(undisturbed)
    return same, "same weights and metrics.csv, every image once" if same else "OTHER METRICS"


def row(fault: Fault, workers: str, end: str) -> str:
    """A fault as a line of the table."""
    noticed, restarted, lost = fault.detected, fault.restarted, fault.caught_up
    cells = [
        fault.kind, str(fault.was_at), workers, str(fault.restarts),
        f"{noticed:.1f}" if noticed else "-",
        f"{restarted - noticed:.1f}" if noticed and restarted else "-",
        f"{lost - restarted:.1f}" if restarted and lost else "-",
        f"{lost:.1f}" if lost else "-", end,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def summary(kind: str, faults: list[Fault]) -> str:
    """Median and range of the seconds that a kind of fault cost."""
    lost = [each.caught_up for each in faults if each.caught_up is not None]
    if not lost:
        return f"{kind}: {len(faults)} kills"
    return (
        f"{kind}: {len(faults)} kills, seconds lost {statistics.median(lost):.1f} "
        f"({min(lost):.1f} to {max(lost):.1f})"
    )


if __name__ == "__main__":
    sys.exit(main())
