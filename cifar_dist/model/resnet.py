"""torchvision's ResNets for small images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchvision.models import ResNet


@dataclass(frozen=True)
class TorchvisionResNet:
    """One of torchvision's ResNets with every layer trainable; call it to make a network.

    Sources: He et al., "Deep residual learning for image recognition", 2016; torchvision. The
    ``cifar`` stem is the one of the paper's CIFAR networks: a 3x3 convolution, no max-pooling.
    """

    torchvision_name: str
    """By which torchvision knows it, and its ImageNet weights."""

    def __call__(self, num_classes: int, stem: str = "imagenet") -> ResNet:
        """Return a network with random weights, from torch's generator.

        Args:
            num_classes: outputs of the last layer.
            stem: ``imagenet`` (torchvision's own) or ``cifar``.

        Returns:
            A module from ``[B, 3, H, W]`` float images to ``[B, num_classes]`` logits.
        """
        from torch import nn
        from torchvision.models import get_model

        network = get_model(self.torchvision_name, weights=None)
        if stem == "cifar":
            channels = network.conv1.out_channels
            network.conv1 = nn.Conv2d(3, channels, kernel_size=3, stride=1, padding=1, bias=False)
            # As torchvision does for its own convolutions; Conv2d by itself draws from another
            # distribution.
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
            # Replaced, not removed, so that the names of layers stay torchvision's.
            network.maxpool = nn.Identity()
        network.fc = nn.Linear(network.fc.in_features, num_classes)
        return network


resnet18 = TorchvisionResNet("resnet18")

resnet34 = TorchvisionResNet("resnet34")
