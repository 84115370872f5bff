"""Write docs/flags.md from the settings' own declarations: ``make docs``."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "train": ["config/train.py:TrainConfig"],
    "tune": ["config/tune.py:TuneConfig"],
    "evaluate": ["config/model.py:ModelConfig", "config/model.py:EvaluateConfig"],
    "predict": ["config/model.py:ModelConfig", "config/model.py:PredictConfig"],
    "report": ["config/report.py:ReportConfig"],
    "export": ["config/model.py:ModelConfig", "config/model.py:ExportConfig"],
}
INTRODUCTION = """# Every flag

Made from the settings' declarations by `make docs`; a test checks that it is up to date. A setting
has one name everywhere: the flag `--weight-decay` is the key `weight_decay` in YAML, in Python, in
a search space and in the trials' table. A switch has its opposite too (`--no-deterministic`).
"""


def settings(file: str, name: str) -> list[tuple[str, str, str]]:
    """Flag, default and meaning of each setting that a class declares."""
    tree = ast.parse((ROOT / "cifar_dist" / file).read_text())
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name).body
    found = []
    for field, after in pairwise(body):
        described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if not isinstance(field, ast.AnnAssign) or not described:
            continue
        setting = ast.unparse(field.target)
        kind = ast.unparse(field.annotation)
        if "Suppress" in kind or "TrainConfig" in kind:
            continue
        given = "" if field.value is None else ast.unparse(field.value)
        default = {"None": "", "True": "on", "False": "off"}.get(given, given.strip("'"))
        if default.startswith("TrainConfig."):
            of_train = {
                flag: value for flag, value, _ in settings("config/train.py", "TrainConfig")
            }
            default = of_train["--" + default.removeprefix("TrainConfig.").replace("_", "-")]
        shown = "--" + setting.replace("_", "-")
        if "Positional" in kind:
            named = re.search(r"metavar='([^']+)'", kind)
            shown = named[1] if named else setting.upper()
        found.append((shown, default, " ".join(str(after.value.value).split())))
    return found


def text() -> str:
    """The page."""
    parts = [INTRODUCTION]
    for command, classes in COMMANDS.items():
        parts.append(f"## {command}\n")
        if command == "tune":
            parts.append("All of `train`'s, for all trials, and:\n")
        parts.append("| flag | default | meaning |\n|---|---|---|")
        if command in ("train", "tune"):
            parts.append(
                "| `--config` |  | YAML file of any of these settings; flags override it. |"
            )
        for each in classes:
            for flag, default, meaning in settings(*each.split(":")):
                default = f"`{default}`" if default else ""
                row = [f"`{flag}`", default, meaning]
                parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "flags.md").write_text(text())
