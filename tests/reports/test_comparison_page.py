"""The page that compares runs."""

from __future__ import annotations

from pathlib import Path

from tests.reports.pages import Read


def test_a_comparison_shows_what_differs_and_nothing_else(pages: dict[str, Path]) -> None:
    page = Read(pages["comparison"])
    assert page.tables["Settings that differ"][1:] == [
        ["lr", "0.002", "0.001"], ["seed", "0", "1"]
    ]  # fmt: skip
    table = page.tables["Figures: press a heading to sort by it"]
    assert [row[:4] for row in table[1:]] == [
        ["run", "completed", "0.9500", "0.2500"], ["other", "interrupted", "", ""]
    ]  # fmt: skip
    labels = [str(svg["aria-label"]) for svg in page.all("svg")]
    assert "val_accuracy by epoch: run ends at 0.7333, other ends at 0.65" in labels
    assert "Environments that differ" in page.text
    assert "None: they are the same." in page.text
