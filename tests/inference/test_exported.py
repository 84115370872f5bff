"""An exported file takes the images of the model's data set, of any size."""

import numpy as np
import pytest
import torch
from torch import nn

from cifar_dist.data.cache import DatasetInfo
from cifar_dist.data.transforms import Normalisation
from cifar_dist.inference.exported import exported
from cifar_dist.inference.model import TrainedModel


@pytest.mark.parametrize("form", ["torch", "safetensors"])
@pytest.mark.parametrize(("side", "size"), [(8, 8), (8, 12), (12, 8)])
def test_images_of_any_side_are_answered_as_by_the_model(form: str, side: int, size: int) -> None:
    torch.manual_seed(0)
    about = DatasetInfo("grey", ("light", "dark"), (0.5,), (0.25,), side)
    network = nn.Sequential(nn.Flatten(), nn.Linear(size * size, 2)).eval()
    model = TrainedModel(network, Normalisation(about.mean, about.std, size), torch.device("cpu"))
    _, answer = exported(model, about, form)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 1, side, side), "u1"))
    with torch.inference_mode():
        torch.testing.assert_close(answer(images), model.logits(images), rtol=1e-4, atol=1e-4)
