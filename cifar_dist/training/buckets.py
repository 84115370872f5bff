"""A bucket layout for DDP that is the same at every step of every start."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def fix_buckets(ddp: DistributedDataParallel) -> None:
    """Make DDP build its final gradient buckets before the first training step; a collective.

    DDP lays out its buckets anew once it has seen the order in which gradients become ready. With
    three or more workers a gradient's place in its bucket decides in which order the workers'
    values are added, so the first step after a restart would differ in the last bit from the same
    step of an undisturbed run (arXiv 2208.14228 describes it). Here the order is seen in a backward
    pass over the weights alone: it touches no image, no statistic and no generator, and gives
    gradients of zero, which are dropped. Gradients become ready from the last layer to the first,
    as nearly as in training.

    ``find_unused_parameters=True`` would keep the first layout too, for a walk over the graph and
    another all-reduce at every step.

    Args:
        ddp: before its first step. What it wraps is restored.
    """
    module = ddp.module

    def over_the_weights(start: Tensor) -> Tensor:
        total = start
        for weight in module.parameters():
            if weight.requires_grad:
                total = total + weight.reshape(-1)[0] * 0.0
        return total

    module.forward = over_the_weights  # this instance's alone
    try:
        # Through DDP's own forward: it is there that DDP prepares to see gradients become ready,
        # and there, at the next call, that it builds its buckets from the order that it saw.
        # On a GPU it raises where it is given nothing to move there.
        ddp(torch.zeros((), device=next(module.parameters()).device)).backward()
    finally:
        del module.forward
    for weight in module.parameters():
        weight.grad = None
