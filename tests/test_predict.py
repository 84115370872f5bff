"""What `predict` prints: a line for each image of any kind; unreadable ones are reported."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_dist.config.model import PredictConfig
from cifar_dist.config.train import TrainConfig
from cifar_dist.data.cache import prepare
from cifar_dist.data.datasets import find_source
from cifar_dist.inference.images import read_picture
from cifar_dist.inference.model import model_of
from cifar_dist.inference.sharded import shard_logits
from cifar_dist.predict import predict
from cifar_dist.train import Trained, train
from tests.conftest import ROOT, encoded, run_command
from tests.processes import PATIENCE_S


@pytest.fixture(scope="module")
def trained(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    storage = tmp_path_factory.mktemp("runs")
    return train(
        TrainConfig(data_dir=str(few_digits), num_workers=0, batch_size=24, flip=0.0,
                    max_epochs=2, lr=3e-4, storage_path=str(storage), name="run")
    )  # fmt: skip


@pytest.fixture(scope="module")
def pictures(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the 40 test images as files."""
    folder = tmp_path_factory.mktemp("pictures")
    images, _ = prepare("cifar10", find_source("cifar10", str(few_digits))).part("test")
    for number, image in enumerate(images.images):
        Image.fromarray(np.array(image).transpose(1, 2, 0)).save(folder / f"{number:03}.png")
    return folder


def test_images_of_the_data_set_get_what_evaluation_gives(
    trained: Trained, few_digits: Path, pictures: Path
) -> None:
    config = PredictConfig(model=str(trained.run.path), images=(str(pictures),), top=10)
    found = list(predict(config))
    model, _ = model_of(config)
    dataset = prepare("cifar10", find_source("cifar10", str(few_digits)))
    logits = shard_logits(model, dataset, "test", 256).astype(np.float64)
    odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert [Path(each.image).name for each in found] == [f"{n:03}.png" for n in range(40)]
    for each, expected in zip(found, odds, strict=True):
        assert dict(each.classes) == pytest.approx(
            dict(zip(dataset.classes, expected, strict=True)), abs=1e-5
        )
        probabilities = [p for _, p in each.classes]
        assert probabilities == sorted(probabilities, reverse=True)


def test_the_model_needs_no_data_set(trained: Trained, pictures: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "elsewhere"
    shutil.copytree(Path(str(trained.run.path)), run)
    config = (run / "config.yaml").read_text()
    data = trained.run.read_config().data_dir
    assert data in config
    (run / "config.yaml").write_text(config.replace(data, str(tmp_path / "nowhere")))
    found = list(predict(PredictConfig(model=str(run), images=(str(pictures / "000.png"),))))
    assert len(found[0].classes) == 1


@pytest.mark.parametrize(("said", "side"), [(None, 32), (32, 32), (20, 20)])
def test_pictures_get_the_side_of_the_runs_data_set(
    trained: Trained, pictures: Path, tmp_path: Path, said: int | None, side: int
) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(Path(str(trained.run.path)), run)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["dataset"].pop("side") == 32
    if said is not None:  # runs of earlier versions do not say it
        environment["dataset"]["side"] = said
    (run / "environment.json").write_text(json.dumps(environment))
    config = PredictConfig(model=str(run), images=(str(pictures / "000.png"),))
    assert model_of(config)[1].side == side
    (found,) = predict(config)
    (whole,) = predict(dataclasses.replace(config, model=str(trained.run.path)))
    assert (found.classes == whole.classes) == (side == 32)


def test_a_folder_with_broken_files_is_done_but_for_them(
    trained: Trained, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "many"
    (folder / "below").mkdir(parents=True)
    for number in range(1000):
        target = folder / ("below" if number % 2 else "") / f"{number:04}.png"
        content = (pictures / f"{number % 40:03}.png").read_bytes()
        target.write_bytes(content if number % 100 else content[:50])
    (folder / "notes.txt").write_text("no image")
    done = run_command(tmp_path, str(trained.run.path), "many", module="cifar_dist.predict")
    assert done.code == 1
    assert len(done.out.splitlines()) == 990
    *errors, summary, after = done.err.splitlines()
    assert after.startswith("next: python -m cifar_dist.export ")
    assert len(errors) == 10
    assert all(line.startswith("error: many/0") for line in errors)
    assert summary.startswith("990 images, 10 errors; ")
    assert summary.endswith(" images/s")


def test_standard_input_is_an_image_or_names_of_images(trained: Trained, pictures: Path) -> None:
    def ask(given: bytes) -> list[dict]:
        words = [str(trained.run.path), "-", "--format", "jsonl", "--top", "2"]
        done = subprocess.run(
            [sys.executable, "-m", "cifar_dist.predict", *words],
            cwd=ROOT, input=given, capture_output=True, timeout=PATIENCE_S, check=True,
        )  # fmt: skip
        return [json.loads(line) for line in done.stdout.splitlines()]

    names = [str(pictures / f"{number:03}.png") for number in (0, 1)]
    by_name = ask("\n".join(names).encode())
    assert [each["image"] for each in by_name] == names
    alone = ask((pictures / "000.png").read_bytes())
    assert [each["image"] for each in alone] == ["-"]
    first, second = alone[0]["classes"], by_name[0]["classes"]
    assert [each["class"] for each in first] == [each["class"] for each in second]
    odds = [[each["probability"] for each in classes] for classes in (first, second)]
    assert odds[0] == pytest.approx(odds[1], abs=1e-6)  # batches of one and of two
    assert len(odds[0]) == 2


@pytest.mark.parametrize(
    ("mode", "form"),
    [("RGB", "PNG"), ("L", "JPEG"), ("RGBA", "PNG"), ("P", "GIF"), ("CMYK", "TIFF"), ("1", "BMP"),
     ("LA", "PNG"), ("RGB", "WEBP"), ("I;16", "PNG")],
)  # fmt: skip
@pytest.mark.parametrize("size", [(32, 32), (1, 1), (300, 20)])
def test_pictures_of_any_kind_and_size_are_read(mode: str, form: str, size: tuple) -> None:
    file = io.BytesIO()
    Image.new(mode, size).save(file, form)
    for side, channels in ((32, 3), (8, 3), (28, 1)):
        pixels = read_picture(file.getvalue(), side, channels)
        assert (pixels.shape, pixels.dtype) == ((channels, side, side), np.uint8)


def test_a_picture_of_the_data_sets_size_comes_out_as_it_is() -> None:
    for shape in ((8, 8, 3), (28, 28)):
        image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        pixels = read_picture(encoded(image), shape[0], channels=3 if len(shape) == 3 else 1)
        assert np.array_equal(pixels.transpose(1, 2, 0).reshape(shape), image)


def test_a_picture_is_turned_upright_and_shown_on_white() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 0] = 255  # a white column on the left
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(image).save(file, "PNG", exif=exif)
    assert read_picture(file.getvalue(), 32)[:, 0].min() == 255  # now a row at the top
    file = io.BytesIO()
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(file, "PNG")
    assert read_picture(file.getvalue(), 32).min() == 255


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"GIF89a\x01"])
def test_what_is_no_picture_is_said_in_one_line(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_picture(content, 32)


def test_a_missing_file_and_an_empty_folder_are_reported(trained: Trained, tmp_path: Path) -> None:
    run = str(trained.run.path)
    done = run_command(tmp_path, run, "none.png", module="cifar_dist.predict")
    assert done.code == 1
    assert "error: none.png: No such file or directory" in done.err
    done = run_command(tmp_path, run, ".", module="cifar_dist.predict")
    assert done.code == 2
    assert done.err == "error: .: holds no images; name another folder, or files\n"
