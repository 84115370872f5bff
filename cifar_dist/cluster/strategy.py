"""Lightning's DDP among Ray Train's workers."""

from __future__ import annotations

from ray.train.lightning import RayDDPStrategy
from torch.nn.parallel import DistributedDataParallel

from cifar_dist.training.buckets import fix_buckets


class FixedBucketsStrategy(RayDDPStrategy):
    """Ray's strategy, with the same gradient buckets at every step."""

    def __init__(self) -> None:
        super().__init__(
            # Statistics of batch normalisation are averaged once an epoch instead.
            broadcast_buffers=False,
            # Gradients live in the buckets, which saves copying them in and out at every step.
            gradient_as_bucket_view=True,
        )

    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        fix_buckets(self.model)
