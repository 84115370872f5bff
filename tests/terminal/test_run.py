"""What the person at the terminal sees."""

from __future__ import annotations

import io

from cifar_dist.events import EpochDone, Plan, Started, StepDone, Warned, WorkersLost
from cifar_dist.terminal.run import Display, duration

ROW = {
    "train_loss": 1.5,
    "train_accuracy": 0.4,
    "val_loss": 1.25,
    "val_accuracy": 0.5,
    "images_per_second": 1234.5,
}


def step(epoch: int) -> StepDone:
    return StepDone(epoch, step=3, loss=2.0, accuracy=0.25, images_per_second=1000.0)


EVENTS = [
    Plan(max_epochs=2, steps_per_epoch=10, lines=["what", "where"]),
    Started(world_size=2, checkpoint=None),
    step(1),
    EpochDone({"epoch": 1, **ROW}),
    step(2),
    WorkersLost("worker 1 of 2: its process died"),
    Warned("checkpoint epoch-0002.ckpt is damaged"),
    Started(world_size=1, checkpoint="epoch-0001.ckpt"),
    step(2),
    EpochDone({"epoch": 2, **ROW}),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_a_plain_line_an_epoch() -> None:
    stream = io.StringIO()
    display = Display(stream)
    for event in EVENTS:
        display(event)
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["what", "where"]
    assert lines[2].startswith(
        "epoch 1/2  loss 1.5000  accuracy 0.4000  val_loss 1.2500  val_accuracy 0.5000  "
        "1,234 images/s  "
    )
    assert lines[2].endswith(" left")
    assert lines[3:6] == [
        "workers lost: worker 1 of 2: its process died",
        "checkpoint epoch-0002.ckpt is damaged",
        "restarted with 1 workers from epoch-0001.ckpt",
    ]
    assert lines[6].endswith("0:00 left")
    assert len(lines) == 7
    assert "\r" not in stream.getvalue()


def test_a_terminal_gets_one_live_line() -> None:
    stream = Terminal()
    display = Display(stream)
    for event in EVENTS[:5]:
        display(event)
    assert stream.getvalue().count("\n") == 3
    live = stream.getvalue().rsplit("\r", 1)[1]
    assert "epoch 2/2  step 3/10  loss 2.0000  accuracy 0.2500  1,000 images/s" in live
    display.close()
    assert stream.getvalue().endswith("\n")
    display.close()
    assert stream.getvalue().count("\n") == 4


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.6, 185, 3723)] == ["0:00", "1:00", "3:05", "1:02:03"]


def test_a_resumed_run_says_where_it_continues() -> None:
    stream = io.StringIO()
    Display(stream)(Started(2, "/runs/first/checkpoints/epoch-0002-step-0006.ckpt"))
    assert stream.getvalue() == "resumed from epoch-0002-step-0006.ckpt\n"
