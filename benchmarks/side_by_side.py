"""Measuring the project and its peers in one run, in turn, and saying what came of it."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

Figures = dict[str, list[dict[str, float]]]
"""By subject: what each repeat measured, by name."""


def arguments(doc: str | None, name: str, repeats: int = 5) -> argparse.ArgumentParser:
    """A benchmark's command line: how often, and where its JSON goes."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--warm-ups", type=int, default=1, help="rounds that do not count")
    output = Path(__file__).parent / "results" / f"{name}.json"
    parser.add_argument("--output", type=Path, default=output)
    return parser


def in_turn(
    subjects: Mapping[str, Callable[[], dict[str, float]]], repeats: int, warm_ups: int
) -> Figures:
    """Measure every subject ``repeats`` times, one after the other (A B C A B C ...).

    Args:
        subjects: by name, what measures one once.
        repeats: how often each is measured.
        warm_ups: rounds before that, whose figures are thrown away.
    """
    figures: Figures = {name: [] for name in subjects}
    for repeat in range(-warm_ups, repeats):
        for name, measure in subjects.items():
            figure = measure()
            said = ", ".join(f"{key} {value:.4g}" for key, value in figure.items())
            print(f"{'warm-up' if repeat < 0 else repeat + 1}: {name}: {said}", flush=True)
            if repeat >= 0:
                figures[name].append(figure)
    return figures


def output(words: Sequence[str]) -> str:
    """What a command prints, on a Ray of its own where it starts one; it must succeed."""
    env = {**os.environ, "RAY_ADDRESS": "local"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def cell(values: Sequence[float], form: str = ",.0f") -> str:
    """Median, least and most."""
    middle = statistics.median(values)
    return f"{middle:{form}} ({min(values):{form}} to {max(values):{form}})"


def ratios(figures: Figures, key: str, over: str) -> dict[str, list[float]]:
    """By subject: each repeat's figure over that of subject ``over`` in the same repeat."""
    return {
        name: [mine[key] / its[key] for mine, its in zip(runs, figures[over], strict=True)]
        for name, runs in figures.items()
    }


def say(figures: Figures, key: str, over: str, title: str, form: str = ",.0f") -> None:
    """Print a figure of every subject, and its ratio to that of ``over``, as a Markdown table."""
    against = ratios(figures, key, over)
    print(f"\n| {title} | median (least to most) | over {over} |\n|---|---|---|")
    for name, runs in figures.items():
        print(f"| {name} | {cell([r[key] for r in runs], form)} | {cell(against[name], '.2f')} |")


def write(output: Path, figures: Figures, **about: Any) -> None:
    """Write figures as JSON, with what they were measured on."""
    result = {"machine": machine(), **about, "figures": figures}
    output.write_text(json.dumps(result, indent=1) + "\n")
