"""torchvision's ResNets: layers and stems."""

from __future__ import annotations

import pytest
import torch
import torchvision.models

from cifar_dist.model.networks import make_network
from cifar_dist.model.resnet import TorchvisionResNet, resnet18
from cifar_dist.model.weights import shapes_of
from cifar_dist.registry import NETWORKS


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_it_is_torchvisions_with_another_last_layer(name: str) -> None:
    torch.manual_seed(0)
    network = TorchvisionResNet(name)(10).eval()
    reference = getattr(torchvision.models, name)(num_classes=10).eval()
    reference.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(images), reference(images))
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_cifar_stem_keeps_the_images_size() -> None:
    network = resnet18(10, "cifar")
    features = network.maxpool(network.relu(network.bn1(network.conv1(torch.randn(2, 3, 32, 32)))))
    assert features.shape == (2, 64, 32, 32)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_registered_name_gives_torchvisions_network_of_that_name(name: str) -> None:
    shapes = shapes_of(make_network(name, 10).state_dict())
    reference = torchvision.models.get_model(name, num_classes=10)
    assert shapes == shapes_of(reference.state_dict())
