"""The command ``python -m cifar_dist.report``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cifar_dist.errors import UserError
from cifar_dist.runs.directory import RunDirectory
from tests.conftest import run_command

REPORT = "cifar_dist.report"


def test_the_command_prints_where_the_page_is(run: RunDirectory, folder: Path) -> None:
    done = run_command(folder, "run", module=REPORT)
    assert (done.code, done.out, done.err) == (0, "report: run/report.html\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none"], "none: there is no such run; give the directory of one"),
        (["."], "is neither a run nor a search; give the directory of one"),
        (["run", "search"], "search: is a search, and only runs are compared"),
        (["run", "other", "--data-dir", "x"], "--data-dir x: runs are compared without"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_refused(
    pages: dict[str, Path], folder: Path, words: list[str], said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from cifar_dist.report import main

    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=re.escape(said)):
        main(words)


def test_bad_usage_is_one_line(tmp_path: Path) -> None:
    for words in ([], ["none"], ["none", "--outptu", "x"]):
        done = run_command(tmp_path, *words, module=REPORT)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done
