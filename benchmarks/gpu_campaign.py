"""Everything that only a GPU can show, in at most nine minutes: ``make gpu``.

Needs one GPU, no network, and whatever ``python3`` has installed: PyTorch, Lightning and pytest,
and Ray and tyro for the parts that use them. Each part of `benchmarks.gpu_parts` runs in a process
of its own under a time limit of its own, and is killed with everything that it has started. What a
part needs and lacks is one line with the reason.

Three files, however many parts there are: ``results.json`` (status, figures and seconds of each
part), ``table.md`` and ``campaign.log`` (what the parts printed). They are rewritten as soon as a
part finds something, so that a campaign that is cut off leaves what it has. Exits with 0 if no part
failed or ran over its limit, else with 1.

``--device cpu`` tries all parts small, on a machine without a GPU; its figures say nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.limited import OVER_LIMIT

MINUTES = 9
"""Of a whole campaign on a GPU. The parts' limits only end one that hangs, and add up to more."""
FOUND = "FOUND"
"""Stands in a part's command for the file that takes what it finds."""
REHEARSAL = "**A rehearsal on a CPU: its figures say nothing.**"


@dataclass(frozen=True)
class Part:
    """A part of the campaign."""

    name: str
    limit_s: int
    """Seconds on a GPU after which it is killed."""
    rehearsal_limit_s: int = 400
    """The same on a CPU."""
    needs: tuple[str, ...] = ()
    """Packages without which it is skipped."""
    programs: tuple[tuple[str, ...], ...] = ()
    """Programs without which it is skipped; of each tuple one will do."""
    words: tuple[str, ...] = ()
    """Its command; the part of this name in `benchmarks.gpu_parts` if empty."""


# Lightning's own package is the umbrella's name; the parts that start commands need tyro.
TRAINS = ("torch", "lightning")
COMMANDS = (*TRAINS, "tyro")
RAY = (*COMMANDS, "ray")

# The most valuable first: a campaign that is cut off has those.
PARTS = (
    Part("device", 60, needs=("torch",)),
    Part("data", 60, needs=TRAINS),
    Part("tests", 90, needs=("torch", "pytest")),
    Part("waits", 40, needs=TRAINS),
    Part("rates", 130, needs=TRAINS),
    Part("bits", 90, needs=COMMANDS),
    Part("preset", 60, needs=COMMANDS),
    Part("halves", 120, needs=RAY),
    Part("compiled", 100, needs=TRAINS, programs=(("cc", "gcc", "clang"),)),
    Part("trials", 90, needs=RAY),
    Part("nccl", 30, needs=TRAINS),
    Part("checkpoints", 30, needs=TRAINS),
    Part("profile", 90, needs=TRAINS, programs=(("cc", "gcc", "clang"),)),
)


@dataclass
class Result:
    """What came of a part."""

    status: str
    """``ok``, ``failed``, ``over its limit``, ``skipped`` or ``running``."""
    limit_s: int
    seconds: float = 0.0
    reason: str = ""
    """Why it failed or was skipped, in a line."""
    rows: list[list[str]] = field(default_factory=list)
    """What it found for the table: (what, value)."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What it found, in full."""


class Campaign:
    """Runs parts one after another and keeps the files up to date.

    Args:
        output: the folder of the three files, which is made; older ones in it are replaced.
        device: ``cuda`` or ``cpu``.
        deadline_s: seconds after which no part is started and the one that runs is killed.
    """

    def __init__(self, output: Path, device: str, deadline_s: float) -> None:
        self.output = output
        self.device = device
        self.results: dict[str, Result] = {}
        self._began = time.monotonic()
        self._deadline_s = deadline_s
        output.mkdir(parents=True, exist_ok=True)
        self._log = output / "campaign.log"
        self._log.write_bytes(b"")

    def run(self, parts: Iterable[Part]) -> None:
        """Run the parts; returns when all have ended."""
        with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as work:
            for part in parts:
                self._run_one(part, Path(work))
                self._write()
                print(lines_of(part.name, self.results[part.name]), flush=True)

    def _run_one(self, part: Part, work: Path) -> None:
        limit = part.limit_s if self.device == "cuda" else part.rehearsal_limit_s
        result = self.results[part.name] = Result("running", limit)
        left = self._deadline_s - (time.monotonic() - self._began)
        if reason := lacking(part) or (f"no time left, it takes {limit} s" if left < 5 else ""):
            result.status, result.reason = "skipped", reason
            return
        found, began = work / f"{part.name}.json", time.monotonic()
        with self._log.open("ab") as log:
            log.write(f"\n=== {part.name}\n".encode())
            log.flush()
            printed_from = log.tell()
            running = subprocess.Popen(
                self._words(part, found, work, min(limit, left)),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(work),
            )  # fmt: skip
            while running.poll() is None:
                time.sleep(0.1)
                if _take_over(found, result):
                    result.seconds = time.monotonic() - began
                    self._write()
        _take_over(found, result)
        result.seconds = time.monotonic() - began
        if running.returncode == OVER_LIMIT:
            result.status = "over its limit"
            result.reason = f"killed after {min(limit, left):.0f} s"
        elif running.returncode and result.status != "skipped":
            result.status = "failed"
            result.reason = result.reason or self._last_line(printed_from, running.returncode)
        elif result.status == "running":
            result.status = "ok"

    def _words(self, part: Part, found: Path, work: Path, limit: float) -> list[str]:
        own = (
            sys.executable, "-m", "benchmarks.gpu_parts", part.name,
            "--device", self.device, "--work", str(work), "--found", FOUND,
        )  # fmt: skip
        words = [str(found) if word == FOUND else word for word in part.words or own]
        return [sys.executable, "-m", "benchmarks.limited", f"{limit:.1f}", *words]

    def _environment(self, work: Path) -> dict[str, str]:
        # Threads of processes that wait for each other on a few cores take ten times as long.
        few_threads = {"OMP_NUM_THREADS": "1"} if self.device == "cpu" else {}
        # One GPU where there are several: the part `nccl` would take them all.
        one_gpu = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
        return {
            **os.environ,
            **few_threads,
            **one_gpu,
            "CIFAR_DIST_CACHE": str(work / "cache"),
            # A compilation that was killed leaves half a file, which a later one would load.
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
            "TRITON_CACHE_DIR": str(work / "triton"),
            "RAY_ADDRESS": "local",  # never somebody else's cluster
            "RAY_TMPDIR": str(work),  # what killed clusters leave goes with the folder
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
        }

    def _last_line(self, start: int, code: int) -> str:
        with self._log.open("rb") as log:
            log.seek(start)
            printed = log.read().decode(errors="replace").strip().splitlines()
        return f"exit code {code}: {printed[-1].strip()[:300] if printed else 'nothing printed'}"

    def _write(self) -> None:
        about = {
            "device": self.device,
            "python": platform.python_version(),
            "seconds": round(time.monotonic() - self._began, 1),
        }
        parts = {name: vars(result) for name, result in self.results.items()}
        _replace(self.output / "results.json", json.dumps({**about, "parts": parts}, indent=1))
        _replace(self.output / "table.md", self.table())

    def table(self) -> str:
        """Return the Markdown table of all parts so far."""
        note = [] if self.device == "cuda" else [REHEARSAL, ""]
        rows = [lines_of(name, result) for name, result in self.results.items()]
        head = ["| part | what | result | s |", "|---|---|---|---|"]
        return "\n".join([*note, *head, *rows]) + "\n"


def lines_of(name: str, result: Result) -> str:
    """Return a part's rows of the table: its status if that says something, and what it found."""
    rows = [list(row) for row in result.rows]
    if result.status != "ok" or not rows:
        reason = f": {result.reason}" if result.reason else ""
        rows.insert(0, ["", f"{result.status}{reason}"])
    lines = []
    for number, row in enumerate(rows):
        first = number == 0
        seconds = f"{result.seconds:.0f}" if first else ""
        cells = [name if first else "", *row, seconds]
        lines.append("| " + " | ".join(_cell(each) for each in cells) + " |")
    return "\n".join(lines)


def lacking(part: Part) -> str:
    """Return what a part needs and this machine lacks, in a line; empty if nothing."""
    packages = [name for name in part.needs if not _installed(name)]
    if packages:
        return f"needs {' and '.join(packages)}, not installed for {sys.executable}"
    for names in part.programs:
        if not any(map(shutil.which, names)):
            return f"needs one of the programs {', '.join(names)}: none is on PATH"
    return ""


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _take_over(file: Path, result: Result) -> bool:
    """Read what a part has found so far; return whether that is news."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    new = (found["rows"], found["figures"]) != (result.rows, result.figures)
    result.rows, result.figures = found["rows"], found["figures"]
    if found["reason"]:
        result.reason = found["reason"]
    if found["skipped"]:
        result.status = "skipped"
    return new


def _replace(file: Path, text: str) -> None:
    """Write a file whole: a campaign may be killed at any moment."""
    beside = file.with_name(f".{file.name}")
    beside.write_text(text)
    beside.replace(file)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def main(words: Sequence[str] | None = None) -> int:
    """Run the campaign and print its table; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--output", type=Path, default=Path("gpu-results"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--part", choices=names, nargs="+", default=names)
    chosen = parser.parse_args(words)
    parts = [part for part in PARTS if part.name in chosen.part]
    deadline_s = MINUTES * 60 - 2 if chosen.device == "cuda" else float("inf")
    campaign = Campaign(chosen.output, chosen.device, deadline_s)
    campaign.run(parts)
    print(f"\n{campaign.table()}\nfiles in {chosen.output}: results.json table.md campaign.log")
    return int(any(r.status in ("failed", "over its limit") for r in campaign.results.values()))


if __name__ == "__main__":
    sys.exit(main())
