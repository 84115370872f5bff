"""A search's page: what its tables say, and which settings decided."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from cifar_dist.reports.search import Setting, importance_of
from tests.reports.pages import Read, make_search, read


def test_a_searchs_page_says_what_its_tables_say(pages: dict[str, Path]) -> None:
    page = Read(pages["search"])
    # 4 trials of 1, 3 and 9 epochs each: 52 of 108, and 2 more were run that do not count.
    assert "ASHA stopped 8 of 12 trials: 54 of 108 epochs were run, 50% saved." in page.text
    assert "2 of the 54 were run beyond the rung" in page.text
    rungs = page.tables["Trials by rung"]
    assert rungs[1:] == [["epoch 1", "12", "4"], ["epoch 3", "8", "4"],
                         ["epoch 9, the last", "4", "0"]]  # fmt: skip
    table = page.tables["All trials: press a heading to sort by it"]
    names = [cell.strip() for cell in table[0]]
    assert names[:5] == ["trial_id", "status", "val_accuracy", "val_loss", "lr"]
    assert [row[0] for row in table[1:]] == [f"t{number:04d}" for number in range(12)]
    assert table[1][2:5] == ["0.9", "0.1", "0.0001"]
    labels = " ".join(str(svg["aria-label"]) for svg in page.all("svg"))
    assert "val_accuracy by epoch of 12 trials: 8 stopped, 4 completed" in labels
    for name in ("lr", "flip"):
        assert f"val_accuracy of 12 trials against {name}" in labels
    assert "parallel coordinates of 12 trials over lr, flip, val_accuracy" in labels
    assert "importance of each setting: lr" in labels


def test_importance_is_what_decides_and_needs_enough_trials(folder: Path) -> None:
    random = np.random.default_rng(0)
    places = pd.DataFrame(random.uniform(1, 2, (40, 3)), columns=["noise", "strong", "weak"])
    settings = [Setting(name, places[name], 1, 2, {}) for name in places]
    settings.append(Setting("same", pd.Series(np.ones(40)), 1, 1, {}))
    drops, explained = importance_of(settings, (5 * places["strong"] + places["weak"]).to_numpy())
    assert list(drops["setting"]) == ["strong", "weak", "noise"]
    assert drops["mean_drop"][0] > 5 * drops["mean_drop"][1]
    assert explained > 0.7
    page = read(make_search(folder, trials=9, name="few"))
    assert "9 trials have results, too few to estimate importance" in page.text


def test_a_search_without_tables_has_a_page_too(folder: Path) -> None:
    directory = make_search(folder, 3, "begun-search")
    for file in (directory.trials_parquet, directory.history_file, directory.summary_file):
        file.unlink()
    page = read(directory)
    assert "No trial has finished an epoch yet." in page.text
