"""Augmentation and normalisation of batches, against torchvision image by image."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as reference

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.transforms import (
    Augmentation,
    CropAndFlip,
    Cutout,
    Normalisation,
    crop_flip,
    no_augmentation,
)

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]

DRAWN = [[3, 7, 7, 8, 1], [1, 8, 4, 0, 4], [0, 0, 0, 0, 1], [25, 0, 2, 3, 31], [1, 24, 28, 3, 22]]
"""Row and column of the crop, flip, row and column of cutout's middle, of the first five images at
seed 1 in epoch 2."""


@pytest.fixture
def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), np.uint8))


def drawn(augmentation: Augmentation, images: int, seed: int = 1, epoch: int = 2) -> torch.Tensor:
    draws = torch.from_numpy(augmentation.draw(seed, epoch, images, 32))
    assert draws.shape == (augmentation.columns, images)
    return draws


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("padding", "flip"), [(4, 0.5), (0, 0.5), (3, 0.0), (4, 1.0)])
def test_crop_and_flip_are_torchvisions(images, padding: int, flip: float, device: str) -> None:
    augmentation = CropAndFlip(padding, flip)
    draws = drawn(augmentation, 64)
    ours = augmentation.apply(images.to(device), draws.to(device)).cpu()
    for image, got, top, left, flipped in zip(images, ours, *draws, strict=True):
        expected = reference.crop(reference.pad(image, padding), int(top), int(left), 32, 32)
        expected = reference.hflip(expected) if flipped else expected
        assert torch.equal(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("padding", "flip"), [(4, 0.5), (31, 0.0), (1, 1.0), (0, 0.5)])
def test_a_reflected_crop_is_torchs(images, padding: int, flip: float, dtype, device: str) -> None:
    augmentation = CropAndFlip(padding, flip, "reflect")
    draws = drawn(augmentation, 64)
    ours = augmentation.apply(images.to(device, dtype), draws.to(device)).cpu()
    assert ours.dtype == dtype
    padded = F.pad(images.float(), (padding,) * 4, mode="reflect")
    for image, got, top, left, flipped in zip(padded, ours.float(), *draws, strict=True):
        expected = reference.crop(image, int(top), int(left), 32, 32)
        assert torch.equal(got, reference.hflip(expected) if flipped else expected)


def test_what_the_padding_shows_changes_no_draw() -> None:
    black, mirrored = (CropAndFlip(4, 0.5, mode) for mode in ("constant", "reflect"))
    assert np.array_equal(black.draw(5, 1, 64, 32), mirrored.draw(5, 1, 64, 32))


def test_draws_cover_their_ranges() -> None:
    top, left, flip = drawn(CropAndFlip(4, 0.25), 20_000)
    for offsets in (top, left):
        assert offsets.unique().tolist() == list(range(9))
    assert flip.float().mean() == pytest.approx(0.25, abs=0.02)
    for middle in drawn(Cutout(8), 20_000):
        assert middle.unique().tolist() == list(range(32))


def test_draws_are_what_they_were() -> None:
    # Taken before augmentations had names: another draw would be another training.
    assert drawn(CropAndFlip(4, 0.5), 5).tolist() == DRAWN[:3]
    assert drawn(Cutout(8), 5).tolist() == DRAWN[3:]


@pytest.mark.parametrize(("flip", "share"), [(0.0, 0), (1.0, 1)])
def test_probabilities_0_and_1_mean_never_and_always(flip: float, share: float) -> None:
    assert drawn(CropAndFlip(0, flip), 10_000)[2].float().mean() == share


def test_an_image_is_augmented_alike_in_any_batch(images) -> None:
    augmentation = CropAndFlip(4, 0.5)
    draws = drawn(augmentation, 64)
    whole = augmentation.apply(images, draws)
    part = augmentation.apply(images[40:50], draws[:, 40:50])
    assert torch.equal(whole[40:50], part)
    assert not torch.equal(whole, augmentation.apply(images, drawn(augmentation, 64, epoch=3)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", [1, 7, 8])
def test_cutout_blanks_a_square_cut_off_at_the_edge(side: int, device: str) -> None:
    augmentation = Cutout(side)
    draws = drawn(augmentation, 200)
    blanked = augmentation.apply(torch.ones(200, 3, 32, 32, device=device), draws.to(device)).cpu()
    for image, row, column in zip(blanked, *draws, strict=True):
        expected = torch.ones(3, 32, 32)
        top, left = int(row) - side // 2, int(column) - side // 2
        expected[:, max(top, 0) : top + side, max(left, 0) : left + side] = 0
        assert torch.equal(image, expected)


def test_settings_make_the_augmentation(images) -> None:
    config = TrainConfig(crop_padding=3, flip=0.25, crop_padding_mode="reflect", cutout=8)
    assert crop_flip(config) == CropAndFlip(3, 0.25, "reflect")
    none = no_augmentation(config)
    assert none.apply(images, drawn(none, 64)) is images
    assert none.columns == 0


def test_no_cutout_draws_and_changes_nothing(images) -> None:
    assert Cutout(0).columns == 0
    assert Cutout(0).apply(images, drawn(Cutout(0), 64)) is images


@pytest.mark.parametrize("device", DEVICES)
def test_normalisation_is_torchvisions(images, device: str) -> None:
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    ours = Normalisation(mean, std, size=32).apply(images.to(device)).cpu()
    expected = reference.normalize(images.float() / 255, mean, std)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_resize_changes_the_side_only_where_asked(images) -> None:
    values = images.float()
    assert Normalisation((0,) * 3, (1,) * 3, size=32).resize(values) is values
    larger = Normalisation((0,) * 3, (1,) * 3, size=64).resize(values)
    expected = reference.resize(values, [64, 64], antialias=True)
    torch.testing.assert_close(larger, expected)
