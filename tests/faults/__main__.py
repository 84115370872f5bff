"""``python -m tests.faults --kills 50 --seed 7``: a campaign of faults, as a table."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.campaign import KINDS, WORKERS, Fault, Run, draw, draw_kinds, run
from tests.faults.hosts import Hosts, hosts

EPOCHS = 5
KILLS_PER_RUN = 5


def main() -> int:
    """Run the campaign; 1 if a run ended with other bits, or an image was not seen once."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="faults in all")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, hosts(WORKERS) as cluster:
        print(f"hosts: {cluster.kind}; seed {chosen.seed}", flush=True)
        return campaign(cluster, Path(folder), chosen.kills, chosen.seed, print)


def campaign(
    cluster: Hosts, folder: Path, kills: int, seed: int, say: Callable[[str], None]
) -> int:
    """Runs with faults until there were enough, against one without; says a table."""
    began = time.monotonic()
    undisturbed = run(cluster, folder, "undisturbed", EPOCHS)
    say(f"undisturbed: {EPOCHS} epochs, 2 workers, {time.monotonic() - began:.0f} s, "
        f"weights {undisturbed.weights_sha256[:12]}")  # fmt: skip
    say(f"{'fault':<12} {'at step':>8} {'workers':>8} {'restarts':>8} {'detected':>9} "
        f"{'restarted':>9} {'caught up':>9} {'lost, s':>8}  end")  # fmt: skip
    wrong, all_faults = 0, []
    kinds = draw_kinds(seed, kills)
    for number in range(0, kills, KILLS_PER_RUN):
        some = kinds[number : number + KILLS_PER_RUN]
        # Every second run is elastic: a lost node shrinks it, and the next one lets it grow.
        elastic = number // KILLS_PER_RUN % 2 == 1
        ended = run(
            cluster, folder, f"faults{number}", EPOCHS,
            draw(seed * 1000 + number, some, EPOCHS * 9),
            num_workers=f"1:{WORKERS}" if elastic else WORKERS,
        )  # fmt: skip
        good, end = verdict(ended, undisturbed)
        wrong += not good
        all_faults += ended.faults
        for fault in ended.faults:
            say(row(fault, "1:2" if elastic else "2", end))
    for kind in KINDS:
        if of_kind := [each for each in all_faults if each.kind == kind]:
            say(summary(kind, of_kind))
    say(f"{kills} kills, {time.monotonic() - began:.0f} s, {wrong} runs wrong")
    return int(wrong > 0)


def verdict(ended: Run, undisturbed: Run) -> tuple[bool, str]:
    """Whether a run ended as it must, and how, in words."""
    if not ended.every_image_once:
        return False, "IMAGES NOT SEEN ONCE"
    worlds = [row["world_size"] for row in ended.rows]
    if worlds == [WORKERS] * EPOCHS:
        same = ended.same_bits(undisturbed)
        return same, "same bits, every image once" if same else "OTHER BITS"
    return True, f"every image once; workers by epoch {' '.join(map(str, worlds))}"


def row(fault: Fault, workers: str, end: str) -> str:
    """A fault as a line of the table."""
    at, restart, lost = fault.detected, fault.restarted, fault.caught_up
    cells = [
        f"{at:.1f}" if at else "-",
        f"{restart - at:.1f}" if at and restart else "-",
        f"{lost - restart:.1f}" if restart and lost else "-",
        f"{lost:.1f}" if lost else "-",
    ]
    return (
        f"{fault.kind:<12} {fault.step:>8} {workers:>8} {fault.restarts:>8} {cells[0]:>9} "
        f"{cells[1]:>9} {cells[2]:>9} {cells[3]:>8}  {end}"
    )


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
