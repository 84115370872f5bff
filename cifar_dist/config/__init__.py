"""Settings: what each means, its unit, its default and its check.

Nothing here loads torch or Ray, so that ``--help`` and every refusal are quick.
"""

from cifar_dist.config.train import TrainConfig, make_config

__all__ = ["TrainConfig", "make_config"]
