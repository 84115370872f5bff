"""Parts of a search's page."""

import pandas as pd

from cifar_dist.config.tune import make_tune_config
from cifar_dist.reports.search import _rungs


def test_rungs_of_a_fractional_factor_are_those_at_which_asha_stops() -> None:
    trials = pd.DataFrame(
        {"epochs": [1, 3, 7, 9], "status": ["stopped", "stopped", "stopped", "completed"]}
    )
    table = _rungs(trials, make_tune_config({"reduction_factor": 2.5, "max_epochs": 9}))
    assert [[each.text for each in row] for row in table.rows] == [
        ["epoch 1", "4", "1"], ["epoch 3", "3", "1"], ["epoch 7", "2", "1"],
        ["epoch 9, the last", "1", "0"],
    ]  # fmt: skip
