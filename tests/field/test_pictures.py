"""What a person gives to predict: odd names, lists, pipes, files that are no pictures."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cifar_dist.config.model import PredictConfig
from cifar_dist.predict import predict
from cifar_dist.terminal.hints import in_one_line
from cifar_dist.train import train
from tests.conftest import encoded
from tests.field.test_surroundings import few, shell


@pytest.fixture(scope="module")
def model(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    config = few(few_digits, tmp_path_factory.mktemp("model"), max_epochs=1)
    return str(train(config).run.path)


def picture(form: str = "PNG") -> bytes:
    return encoded(np.zeros((32, 32, 3), np.uint8), form)


def predict_in(
    folder: Path, model: str, *words: str, data: bytes = b"", then: str = "", **variables: str
) -> subprocess.CompletedProcess[bytes]:
    line = shlex.join(["-m", "cifar_dist.predict", model, *words])
    return shell(f"$python {line} {then}", folder, data, **variables)


def names(done: subprocess.CompletedProcess[bytes]) -> list[str]:
    return [line.split(b"  ")[-1].decode() for line in done.stdout.splitlines()]


def errors(done: subprocess.CompletedProcess[bytes]) -> list[str]:
    lines = done.stderr.decode().splitlines()
    return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]


def test_predicting_a_folder_of_all_sorts_of_files(tmp_path: Path, model: str) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    latin = os.fsdecode(b"caf\xe9.png")
    for name in ("a.png", latin, "two\nlines.png", "caf\u00e9.png"):
        (folder / name).write_bytes(picture())
    for name in ("._a.png", "paper.pdf", "arrays.h5", "film.mpg", "notes.txt"):
        (folder / name).write_bytes(b"\x89HDF\r\n\x1a\n")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    (folder / "lost.png").symlink_to("nowhere.png")
    for encoding in ("utf-8", "ascii"):
        done = predict_in(tmp_path, model, "all", PYTHONIOENCODING=encoding)
        assert done.returncode == 1
        accent = "\u00e9" if encoding == "utf-8" else "\\xe9"
        assert sorted(names(done)) == sorted(
            ["all/a.png", "all/caf\\udce9.png", "all/two\\nlines.png", f"all/caf{accent}.png"]
        )
        assert errors(done) == [
            "all/broken.png: is no image", "all/lost.png: No such file or directory",
        ]  # fmt: skip


def test_predicting_into_a_pipe_that_closes(tmp_path: Path, model: str) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    then = "| head -1; echo ${PIPESTATUS[0]}"
    done = predict_in(tmp_path, model, *["a.png"] * 400, then=then)
    assert [line.split()[-1] for line in done.stdout.splitlines()] == [b"a.png", b"0"]
    assert b"rror" not in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("list_", "found", "missing"),
    [
        (b"none.png\na.png\n", ["a.png"], ["none.png"]),
        (b"caf\xe9.png\na.png\nnone\xe9.png", ["caf\\udce9.png", "a.png"], ["none\\udce9.png"]),
        (b"none.png\nnor this.png\n", [], ["none.png", "nor this.png"]),
        (b"\xef\xbb\xbfa.png\r\n\r\nb.png\r\n", ["a.png", "b.png"], []),
        (b"a.png\0none.png\0b.png\0", ["a.png", "b.png"], ["none.png"]),
        (b"a.png\n" + b"n" * 5000 + b"\n", ["a.png"], ["n" * 5000]),
    ],
)
def test_predicting_a_list_with_missing_and_foreign_names(
    tmp_path: Path, model: str, monkeypatch, list_: bytes, found: list[str], missing: list[str]
) -> None:
    for name in ("a.png", "b.png", os.fsdecode(b"caf\xe9.png")):
        (tmp_path / name).write_bytes(picture())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(list_)))
    done = list(predict(PredictConfig(model=model, images=("-",))))
    assert [in_one_line(each.image) for each in done if each.classes] == found
    assert [in_one_line(each.image) for each in done if each.error] == missing


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_predicting_an_image_from_standard_input(model: str, monkeypatch, form: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(picture(form))))
    (done,) = predict(PredictConfig(model=model, images=("-",)))
    assert (done.image, done.error, len(done.classes)) == ("-", None, 1)


@pytest.mark.slow
def test_predicting_with_an_empty_folder_among_others_or_a_closed_input(
    tmp_path: Path, model: str
) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "empty").mkdir()
    done = predict_in(tmp_path, model, "empty", "a.png")
    assert (done.returncode, names(done)) == (1, ["a.png"])
    assert errors(done) == ["empty: holds no images"]
    done = predict_in(tmp_path, model, "-", then="<&-")
    assert done.returncode == 2
    assert errors(done)[0].startswith("-: standard input is closed")
