"""Reports: what is on the page is what the files say, and a browser shows it."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cifar_dist.config.train import TrainConfig
from cifar_dist.config.tune import make_tune_config
from cifar_dist.data.datasets.cifar10 import CLASSES
from cifar_dist.errors import UserError
from cifar_dist.events import Event, Warned
from cifar_dist.inference.predictions import Predictions
from cifar_dist.report import report
from cifar_dist.reports.attempt import leave_report
from cifar_dist.reports.search import Setting, importance_of
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.runs.metrics import METRICS, Outcome
from cifar_dist.search.directory import SearchDirectory
from cifar_dist.search.space import read_space
from cifar_dist.train import train
from tests.conftest import ROOT, run_command
from tests.processes import PATIENCE_S

FINGERPRINT = "ab" * 32
REPORT = "cifar_dist.report"


# --- directories, written as commands write them ---------------------------------------------


def history(epochs: int, workers: tuple[int, ...] = (2,), lr: float = 1e-3) -> list[dict[str, Any]]:
    rows = []
    for epoch in range(1, epochs + 1):
        values = (epoch, 352 * epoch, 45_000 * epoch, workers[min(epoch, len(workers)) - 1], lr,
                  2 / epoch, 1 - 0.6 / epoch, 2.1 / epoch, 0.9 - 0.5 / epoch, 500.0 + epoch,
                  90.0 + epoch)  # fmt: skip
        rows.append(dict(zip(METRICS, values, strict=True)))
    return rows


def predictions(classes: tuple[str, ...] = CLASSES) -> Predictions:
    """For 60 images: all correct but for three cats predicted as dogs, with rising confidence."""
    labels = np.arange(60, dtype=np.uint8) % 10
    logits = np.zeros((60, 10), np.float32)
    logits[np.arange(60), labels] = 3
    for image, odds in ((3, 4.0), (13, 9.0), (23, 6.0)):
        logits[image, 5] = odds
    images = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32)).astype(np.uint8)
    return Predictions.of("test", 3, classes, logits, labels, images, np.arange(60))


def make_run(
    storage: Path,
    name: str = "run",
    epochs: int = 3,
    status: str = "completed",
    kept: Predictions | None = None,
    workers: tuple[int, ...] = (2,),
    **settings: Any,
) -> RunDirectory:
    config = TrainConfig(storage_path=str(storage), name=name, max_epochs=3, **settings)
    run = RunDirectory.create(config)
    run.write_config(config)
    rows = history(epochs, workers, config.lr)
    run.write_metrics(rows)
    run.write_environment({"python": "3.11.7", "gpus": [], "dataset_fingerprint": FINGERPRINT})
    if kept:
        run.predictions_file.write_bytes(kept.to_bytes())
    done = Outcome(rows, epochs, 57 / 60, 0.25, 60, 0, "c" * 64) if status == "completed" else None
    run.write_summary(config.dataset, status, done, restarts=1, seconds=3700.4)
    return run


def make_search(storage: Path, trials: int = 12, name: str = "search") -> SearchDirectory:
    """Of lr, which decides all, and of flip, which decides nothing."""
    space = storage / f"{name}.yaml"
    space.write_text("lr: {loguniform: [0.0001, 0.01]}\nflip: {choice: [0.0, 0.5]}\n")
    config = make_tune_config(
        {"space": str(space), "storage_path": str(storage), "name": name, "max_epochs": 9,
         "num_samples": trials}
    )  # fmt: skip
    directory = SearchDirectory.create(config, read_space(str(space)))
    rows, epochs = [], []
    for number in range(trials):
        lr = 1e-4 * 100 ** (number / max(trials - 1, 1))
        ran = 9 if number % 3 == 2 else 3 if number % 3 else 1
        accuracy = 0.9 - 0.05 * number
        rows.append(
            {"trial_id": f"t{number:04d}", "status": "completed" if ran == 9 else "stopped",
             "lr": lr, "flip": 0.5 * (number % 2), "epochs": ran, "best_epoch": ran,
             "val_accuracy": accuracy, "val_loss": 1 - accuracy, "seconds": 9.0 * ran,
             "reason": None if ran == 9 else f"ASHA: below the cut at epoch {ran}", "error": None}
        )  # fmt: skip
        epochs += [
            {"trial_id": f"t{number:04d}", **row, "val_accuracy": accuracy * row["epoch"] / ran}
            for row in history(ran)
        ]
    for file, frame in (
        (directory.trials_parquet, pd.DataFrame(rows)),
        (directory.history_file, pd.DataFrame(epochs)),
    ):
        frame.to_parquet(file, index=False)
    counts = Counter(row["status"] for row in rows)
    directory.write_summary(
        {"status": "completed", "dataset": "cifar10", "metric": "val_accuracy", "trials": trials,
         "completed": counts["completed"], "stopped": counts["stopped"], "failed": 0,
         "unfinished": 0, "best_trial": "t0000", "val_accuracy": 0.9, "val_loss": 0.1,
         "epochs": len(epochs), "epochs_run": len(epochs) + 2, "epochs_possible": 9 * trials,
         "seconds": 225.0}
    )  # fmt: skip
    return directory


# --- pages, read back ------------------------------------------------------------------------


class Read(HTMLParser):
    """A page's elements, its tables, and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.html = file.read_text()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._open: list[str] = []
        self._caption = ""
        self._rows: list[list[str]] = []
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self._open.append(tag)
        if tag == "table":
            self._caption, self._rows = "", []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "table":
            self.tables[self._caption.strip()] = self._rows

    def handle_data(self, data: str) -> None:
        if {"style", "script"} & set(self._open):
            return
        self.text += data
        if "caption" in self._open:
            self._caption += data
        elif {"td", "th"} & set(self._open):
            self._rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(*paths: Any, **options: Any) -> Read:
    return Read(Path(str(report([getattr(path, "path", path) for path in paths], **options))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def run(folder: Path) -> RunDirectory:
    return make_run(folder, kept=predictions(), workers=(2, 2, 1), lr=0.002)


@pytest.fixture(scope="module")
def search(folder: Path) -> SearchDirectory:
    return make_search(folder)


@pytest.fixture(scope="module")
def pages(run: RunDirectory, search: SearchDirectory, folder: Path) -> dict[str, Path]:
    """A page of each kind."""
    other = make_run(folder, "other", epochs=2, status="interrupted", seed=1)
    compared = report([run.path, other.path], folder / "comparison.html")
    found = {"run": report([run.path]), "search": report([search.path]), "comparison": compared}
    return {kind: Path(str(file)) for kind, file in found.items()}


def test_a_runs_page_says_what_its_files_say(pages: dict[str, Path], run: RunDirectory) -> None:
    assert pages["run"] == run.path / "report.html"
    page = Read(pages["run"])
    assert page.all("html")[0]["lang"] == "en"
    for said in ("0.9500", "loss 0.2500", "0.7333", "epoch 3", "1:01:40", "502", "completed",
                 "57 of 60 test images were classified correctly, by the weights of epoch 3",
                 "Epoch 3 ended with 1 workers, the one before with 2.",
                 "1 restart of workers after failures"):  # fmt: skip
        assert said in page.text
    table = page.tables["Precision, recall and F1 by class"]
    assert [cell.strip() for cell in table[0]] == ["class", "images", "precision", "recall", "F1"]
    assert table[1 + 3] == ["cat", "6", "1.0000", "0.5000", "0.6667"]
    assert table[1 + 5] == ["dog", "6", "0.6667", "1.0000", "0.8000"]
    settings = dict(row for row in page.tables["Settings"])
    assert (settings["lr"], settings["max_epochs"]) == ("0.002", "3")
    assert dict(row for row in page.tables["Environment"])["python"] == "3.11.7"
    confusion = next(svg for svg in page.all("svg") if "confusion" in str(svg["aria-label"]))
    assert "57 on the diagonal; most often confused: cat predicted as dog, 3 times" in str(
        confusion["aria-label"]
    )


def test_mistakes_are_shown_the_most_confident_first_with_both_labels(
    pages: dict[str, Path], run: RunDirectory
) -> None:
    page = Read(pages["run"])
    assert [image["alt"] for image in page.all("img")] == ["labelled cat, predicted dog"] * 3
    confidences = re.findall(r"dog([\d.]+)%", page.text.replace(" ", "").replace("\n", ""))
    # exp(odds) against exp(3) for the label and 1 for each of eight others.
    expected = [np.exp(o) / (np.exp(o) + np.exp(3) + 8) for o in (9, 6, 4)]
    assert [float(each) / 100 for each in confidences] == pytest.approx(expected, abs=5e-4)
    first = str(page.all("img")[0]["src"]).removeprefix("data:image/png;base64,")
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(first))))
    kept = predictions()
    assert kept.mistakes.tolist() == [13, 23, 3]
    assert np.array_equal(pixels, kept.pictures[0].transpose(1, 2, 0))


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


@pytest.mark.parametrize("kind", ["run", "search", "comparison"])
def test_a_page_needs_nothing_but_itself(pages: dict[str, Path], kind: str) -> None:
    page = Read(pages[kind])
    assert not re.search(r"https?:", page.html)
    for _, attributes in page.elements:
        assert str(attributes.get("src", "data:")).startswith("data:")
        assert str(attributes.get("href", "#")).startswith(("#", "data:"))
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"@import|url\((?!#)", page.html)
    ids = [str(attributes["id"]) for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page.html))
    assert {each for pair in referred for each in pair if each} <= set(ids)
    (script,) = re.findall(r"<script>(.*?)</script>", page.html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.html
    assert len(page.html) < 400_000


def test_the_same_files_give_the_same_bytes(pages: dict[str, Path], folder: Path) -> None:
    again = report([pages["run"].parent], folder / "again.html")
    assert Path(str(again)).read_bytes() == pages["run"].read_bytes()


def test_hostile_names_stay_text(folder: Path) -> None:
    hostile = '<script>alert("1")</script><img src=x onerror=alert(1)>'
    classes = (hostile, "$x^{", "a&b", *CLASSES[3:])
    made = make_run(folder, "hostile", kept=predictions(classes), data_dir=f"/data/{hostile}")
    moved = folder / 'run "<i>$'
    shutil.move(made.path, moved)
    environment = {"command": hostile, "dataset_fingerprint": FINGERPRINT}
    RunDirectory(moved).write_environment(environment)
    page = read(moved)
    assert hostile in page.text
    assert len(page.all("script")) == 1
    assert not page.all("i")
    assert all(str(image["src"]).startswith("data:") for image in page.all("img"))
    compared = read(moved, make_run(folder, "tame"), output=folder / "hostile.html")
    assert not compared.all("i")


# --- what is not there -----------------------------------------------------------------------


def test_an_interrupted_run_shows_its_curves_so_far(folder: Path) -> None:
    page = read(make_run(folder, "interrupted", epochs=2, status="interrupted"))
    assert "The run has not reached its last epoch: 2 of 3 epochs so far." in page.text
    assert "There are no weights to evaluate" in page.text
    assert len(page.all("svg")) == 4


def test_a_run_without_an_epoch_or_a_summary_has_a_page_too(folder: Path) -> None:
    run = make_run(folder, "begun", epochs=0, status="failed")
    run.summary_file.unlink()
    run.environment_file.unlink()
    page = read(run)
    assert "not ended" in page.text
    assert "No epoch has finished yet." in page.text
    assert "The run ended before its environment was written." in page.text


def test_a_run_that_diverged_shows_the_epochs_before(folder: Path) -> None:
    run = make_run(folder, "diverged", status="failed")
    rows = history(3)
    rows[-1].update(train_loss=float("nan"), val_loss=float("inf"))
    run.write_metrics(rows)
    assert len(read(run).all("svg")) == 4


def test_without_the_runs_images_the_page_says_so(folder: Path, tmp_path: Path) -> None:
    run = make_run(folder, "elsewhere", data_dir=str(tmp_path))
    run.model_file.write_bytes(b"weights")
    page = read(run)
    assert (
        f"Classes and mistakes cannot be evaluated here. {tmp_path}: has no CIFAR-10" in page.text
    )
    assert list(tmp_path.iterdir()) == []  # nothing was downloaded


def test_a_search_without_tables_has_a_page_too(folder: Path) -> None:
    directory = make_search(folder, 3, "begun-search")
    for file in (directory.trials_parquet, directory.history_file, directory.summary_file):
        file.unlink()
    page = read(directory)
    assert "No trial has finished an epoch yet." in page.text


def test_what_was_kept_needs_neither_torch_nor_ray(run: RunDirectory, folder: Path) -> None:
    code = """
import sys
from cifar_dist.report import report
report([sys.argv[1]], sys.argv[2])
loaded = {"torch", "ray", "lightning", "torchmetrics"} & set(sys.modules)
sys.exit(" ".join(loaded) or 0)
"""
    words = [sys.executable, "-c", code, str(run.path), str(folder / "lean.html")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "57 of 60 test images" in Read(folder / "lean.html").text


# --- real runs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    storage = tmp_path_factory.mktemp("trained")
    config = TrainConfig(
        data_dir=str(few_digits), num_workers=0, batch_size=48, flip=0.0, max_epochs=1, lr=3e-4,
        storage_path=str(storage), name="real",
    )  # fmt: skip
    return train(config).run


def test_a_run_leaves_its_report_and_predictions_computed_again_are_the_same(
    trained: RunDirectory, tmp_path: Path
) -> None:
    by_itself = Read(Path(str(trained.report_file)))
    right = round(trained.read_summary()["test_accuracy"] * 40)
    assert f"{right} of 40 test images were classified correctly" in by_itself.text
    before = Predictions.from_bytes(trained.predictions_file.read_bytes())
    assert before.epoch == trained.read_summary()["best_epoch"]
    without = tmp_path / "real"
    shutil.copytree(trained.path, without)
    RunDirectory(without).predictions_file.unlink()
    again = read(without)
    assert again.tables == by_itself.tables
    assert [image["src"] for image in again.all("img")] == [
        image["src"] for image in by_itself.all("img")
    ]


def test_predictions_are_found_by_the_name_of_version_0_1(run: RunDirectory, folder: Path) -> None:
    old = RunDirectory(folder / "old")
    shutil.copytree(run.path, old.path)
    old.predictions_file.rename(old.path / "test-answers.safetensors")
    assert "57 of 60 test images were classified correctly" in read(old).text


def test_test_images_are_not_used_until_a_run_is_over(
    trained: RunDirectory, tmp_path: Path
) -> None:
    unfinished = RunDirectory(tmp_path / "real")
    shutil.copytree(trained.path, unfinished.path)
    unfinished.predictions_file.unlink()
    unfinished.write_summary("cifar10", "interrupted")
    assert "of 16 validation images were classified correctly" in read(unfinished).text


def test_a_report_that_fails_does_not_fail_the_run(
    trained: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Event] = []
    broken = RunDirectory(tmp_path / "real")
    shutil.copytree(trained.path, broken.path)
    broken.metrics_file.write_text("epoch\nno number\n")
    leave_report(broken, heard.append)
    (warning,) = heard
    assert isinstance(warning, Warned)
    assert warning.message.startswith("no report.html: ")
    assert "\n" not in warning.message


# --- the command -----------------------------------------------------------------------------


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


# --- in a browser ----------------------------------------------------------------------------

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="a browser: install selenium")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("a browser: install chromium and chromedriver (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for word in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "disable-dev-shm-usage", f"user-data-dir={profile}"):  # fmt: skip
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def shown(browser: Any, file: Path, width: int = 1280, scheme: str = "light") -> Any:
    """The browser with a page in it, as wide as that, in light or dark."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 850, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(file.as_uri())
    return browser


PICTURES = """
return [...document.querySelectorAll("img, svg[role=img]")].map(each => {
  const box = each.getBoundingClientRect();
  const loaded = each.tagName === "IMG" ? each.complete && each.naturalWidth > 0 : true;
  return loaded && box.width > 50 && box.height > 50;
});
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "search", "comparison"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_picture_is_there_and_the_page_fits(
    browser: Any, pages: dict[str, Path], kind: str, width: int
) -> None:
    shown(browser, pages[kind], width)
    assert browser.get_log("browser") == []
    pictures = browser.execute_script(PICTURES)
    assert len(pictures) >= 6
    assert all(pictures)
    page = "document.documentElement"
    wide, seen = browser.execute_script(f"return [{page}.scrollWidth, {page}.clientWidth]")
    assert wide == seen <= width


COLUMN = """
const table = [...document.querySelectorAll("table.sortable")].at(-1);
const at = [...table.tHead.rows[0].cells].findIndex(c => c.textContent.trim() === arguments[0]);
return [...table.tBodies[0].rows].map(row => row.cells[at].textContent);
"""


@pytest.mark.slow
def test_headings_sort_the_table_by_mouse_and_by_key(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.by import By

    shown(browser, pages["search"])

    def heading(name: str) -> Any:
        found = browser.find_elements(By.XPATH, f"//th[normalize-space()='{name}']/button")
        return found[-1]

    def column(name: str) -> list[str]:
        values: list[str] = browser.execute_script(COLUMN, name)
        return values

    seconds = column("seconds")
    assert sorted(seconds, key=float) != sorted(seconds)  # so that numbers are no words
    heading("val_accuracy").click()
    assert column("val_accuracy") == sorted(column("val_accuracy"), key=float)
    heading("seconds").send_keys("\ue007")  # Enter
    assert column("seconds") == sorted(seconds, key=float)
    heading("seconds").send_keys(" ")
    assert column("seconds") == sorted(seconds, key=float, reverse=True)
    states = browser.execute_script(
        "return [...document.querySelectorAll('[aria-sort]')].map(each => "
        "[each.textContent.trim(), each.getAttribute('aria-sort')])"
    )
    assert states == [["seconds", "descending"]]
    for _ in range(2):
        heading("reason").click()
        assert column("reason")[-4:] == [""] * 4  # those without one stay after the others
    assert browser.get_log("browser") == []


CONTRAST = """
const numbers = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
const light = colour => numbers(colour).map(c => c / 255)
  .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const between = (x, y) => (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
const ground = getComputedStyle(document.querySelector("section")).backgroundColor;
const card = light(ground);
const texts = [...document.querySelectorAll("main svg text, main p, main td, main th, main h2")];
const colour = each => getComputedStyle(each)[each.tagName === "text" ? "fill" : "color"];
// A cell of the confusion matrix lets the ground shine through.
const cells = [...document.querySelectorAll("path[style*='--hue']")].map(each => {
  const {fill, fillOpacity} = getComputedStyle(each);
  const mix = (c, i) => c * fillOpacity + numbers(ground)[i] * (1 - fillOpacity);
  return between(light(`rgb(${numbers(fill).map(mix)})`), light(colour(document.body)));
});
return [card, Math.min(...texts.map(each => between(light(colour(each)), card)), ...cells),
        cells.length];
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "search", "comparison"])
def test_text_can_be_read_in_light_and_in_dark(
    browser: Any, pages: dict[str, Path], kind: str
) -> None:
    cards = []
    for scheme in ("light", "dark"):
        shown(browser, pages[kind], scheme=scheme)
        card, contrast, cells = browser.execute_script(CONTRAST)
        assert cells == (11 if kind == "run" else 0)  # those with images
        assert contrast >= 4.5  # WCAG 2, level AA
        cards.append(card)
    assert cards[0] > 0.8
    assert cards[1] < 0.05
