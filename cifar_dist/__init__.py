"""ResNet-18 on CIFAR-10, from a notebook to many GPUs."""

__version__ = "0.2.0"
