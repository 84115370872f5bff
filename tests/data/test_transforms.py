"""Augmentation and normalisation of batches, against torchvision image by image."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as reference

from cifar_dist.data.transforms import Augmentation, Draws, Normalisation

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


@pytest.fixture
def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), np.uint8))


def drawn(augmentation: Augmentation, images: int, seed: int = 1, epoch: int = 2) -> Draws:
    return Draws(*torch.from_numpy(augmentation.draw(seed, epoch, images, 32)))


def on(device: str, draws: Draws) -> Draws:
    return Draws(*(each.to(device) for each in draws))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("padding", "flip"), [(4, 0.5), (0, 0.5), (3, 0.0), (4, 1.0)])
def test_crop_and_flip_are_torchvisions(images, padding: int, flip: float, device: str) -> None:
    augmentation = Augmentation(padding, flip, cutout=0)
    draws = drawn(augmentation, 64)
    ours = augmentation.apply(images.to(device), on(device, draws)).cpu()
    for image, got, top, left, flipped in zip(images, ours, *draws[:3], strict=True):
        expected = reference.crop(reference.pad(image, padding), int(top), int(left), 32, 32)
        expected = reference.hflip(expected) if flipped else expected
        assert torch.equal(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("padding", "flip"), [(4, 0.5), (31, 0.0), (1, 1.0), (0, 0.5)])
def test_a_reflected_crop_is_torchs(images, padding: int, flip: float, dtype, device: str) -> None:
    augmentation = Augmentation(padding, flip, cutout=0, padding_mode="reflect")
    draws = drawn(augmentation, 64)
    ours = augmentation.apply(images.to(device, dtype), on(device, draws)).cpu()
    assert ours.dtype == dtype
    padded = F.pad(images.float(), (padding,) * 4, mode="reflect")
    for image, got, top, left, flipped in zip(padded, ours.float(), *draws[:3], strict=True):
        expected = reference.crop(image, int(top), int(left), 32, 32)
        assert torch.equal(got, reference.hflip(expected) if flipped else expected)


def test_what_the_padding_shows_changes_no_draw() -> None:
    black, mirrored = (Augmentation(4, 0.5, 8, mode) for mode in ("constant", "reflect"))
    assert np.array_equal(black.draw(5, 1, 64, 32), mirrored.draw(5, 1, 64, 32))


def test_draws_cover_their_ranges() -> None:
    draws = drawn(Augmentation(4, 0.25, 8), 20_000)
    for offsets in (draws.top, draws.left):
        assert offsets.unique().tolist() == list(range(9))
    assert draws.flip.float().mean() == pytest.approx(0.25, abs=0.02)
    for middle in (draws.cutout_row, draws.cutout_column):
        assert middle.unique().tolist() == list(range(32))


@pytest.mark.parametrize(("flip", "share"), [(0.0, 0), (1.0, 1)])
def test_probabilities_0_and_1_mean_never_and_always(flip: float, share: float) -> None:
    assert drawn(Augmentation(0, flip, 0), 10_000).flip.float().mean() == share


def test_an_image_is_augmented_alike_in_any_batch(images) -> None:
    augmentation = Augmentation(4, 0.5, 8)
    draws = drawn(augmentation, 64)
    whole = augmentation.apply(images, draws)
    part = augmentation.apply(images[40:50], Draws(*(each[40:50] for each in draws)))
    assert torch.equal(whole[40:50], part)
    assert not torch.equal(whole, augmentation.apply(images, drawn(augmentation, 64, epoch=3)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", [1, 7, 8])
def test_cutout_blanks_a_square_cut_off_at_the_edge(side: int, device: str) -> None:
    augmentation = Augmentation(0, 0.0, cutout=side)
    draws = drawn(augmentation, 200)
    blanked = augmentation.blank(torch.ones(200, 3, 32, 32, device=device), on(device, draws)).cpu()
    for image, row, column in zip(blanked, draws.cutout_row, draws.cutout_column, strict=True):
        expected = torch.ones(3, 32, 32)
        top, left = int(row) - side // 2, int(column) - side // 2
        expected[:, max(top, 0) : top + side, max(left, 0) : left + side] = 0
        assert torch.equal(image, expected)


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
