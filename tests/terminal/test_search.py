"""What the person at the terminal sees of a search."""

from __future__ import annotations

import io

import pandas as pd

from cifar_dist.events import SearchPlan, TrialUpdated, Warned
from cifar_dist.terminal.search import SearchDisplay, ranking

PLAN = SearchPlan(
    max_epochs=9, trials=3, finished=1, metric="val_accuracy", mode="max", lines=["what", "where"]
)


def trial(number: int, status: str, epochs: int, value: float | None, error=None) -> TrialUpdated:
    return TrialUpdated(
        trial_id=f"t{number:04d}",
        status=status,
        settings={"lr": 0.00123456, "optimizer": "sgd"},
        epochs=epochs,
        best_epoch=None,
        value=value,
        seconds=0.0,
        reason=None,
        error=error,
    )


EVENTS = [
    PLAN,
    trial(1, "running", 0, None),
    trial(2, "running", 0, None),
    trial(1, "running", 1, 0.5),
    trial(1, "stopped", 1, 0.5),
    trial(1, "stopped", 1, 0.5),
    trial(2, "failed", 0, None, "ZeroDivisionError: no trial divides by zero"),
]


def test_a_warning_is_a_line_on_a_pipe_and_on_a_terminal() -> None:
    for stream in (io.StringIO(), Terminal()):
        display = SearchDisplay(stream)
        display(PLAN)
        display(Warned("no report.html: [no] room"))
        display.close()
        assert "no report.html: [no] room\n" in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_a_plain_line_a_trial() -> None:
    stream = io.StringIO()
    display = SearchDisplay(stream)
    for event in EVENTS:
        display(event)
    display.close()
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["what", "where"]
    assert lines[2] == (
        "t0001  stopped    1 epoch   val_accuracy 0.5  lr 0.001235, optimizer sgd  2/3 trials, 0:00"
    )
    assert lines[3].startswith("t0002  failed     0 epochs  val_accuracy -")
    assert lines[3].endswith("3/3 trials, 0:00  (ZeroDivisionError: no trial divides by zero)")
    assert len(lines) == 4


def test_a_terminal_gets_a_live_table() -> None:
    stream = Terminal()
    display = SearchDisplay(stream)
    for event in EVENTS[:5]:
        display(event)
    display.close()
    shown = stream.getvalue()
    assert "2 of 3 trials over, 1 running" in shown
    last = shown[shown.rindex("trials over") :]
    assert last.index("t0002") < last.index("t0001")  # what runs stands above what is over
    assert "1/9" in last
    assert "0.001235" in last
    display.line("after")
    assert stream.getvalue().endswith("after\n")


def test_the_ranking_holds_the_ten_best() -> None:
    table = pd.DataFrame(
        {
            "trial_id": [f"t{number:04d}" for number in range(12)],
            "lr": 0.1,
            "epochs": [0] + [1] * 11,
            "val_accuracy": [None, *(number / 100 for number in range(11))],
            "seconds": 1.0,
            "reason": None,
            "error": None,
        }
    )
    lines = ranking(table, "val_accuracy", "max")
    assert len(lines) == 11
    assert [line.split()[0] for line in lines[1:4]] == ["t0011", "t0010", "t0009"]
    assert ranking(table, "val_accuracy", "min")[1].split()[0] == "t0001"
    assert ranking(table[:1], "val_accuracy", "max") == ["none ended an epoch"]
