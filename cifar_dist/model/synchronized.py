"""Networks that compute the same whether one rank holds the global batch or two share it.

Batch normalisation over the global batch is not enough for that: a sum over 128 images rounds
differently from two sums over 64, and training doubles such a difference in a step or two (measured
in docs/faults.md). So a single rank computes in halves, as two would, layer by layer; sums of
two are the same in either order. With one rank and two the weights agree to the bit where both
use the same kernels and as many threads; with more, up to rounding.

Shapes: B images of this rank, C channels, H and W height and width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def synchronize(network: nn.Module) -> nn.Module:
    """Make a network's layers compute in halves, and its batch normalisation over the global batch.

    In place; weights, statistics and their names stay. torch's own ``SyncBatchNorm`` does not take
    tensors on the CPU. Every rank of the default group must take part in each training step.

    Args:
        network: its layers with weights must be ``Conv2d``, ``Linear`` and ``BatchNorm2d``.

    Returns:
        The network.
    """
    for module in network.modules():
        for plain, synchronized in _SYNCHRONIZED.items():
            # Exactly these types: a subclass may compute something else in its forward.
            if type(module) is plain:
                module.__class__ = synchronized
    return network


class HalvedConv2d(nn.Conv2d):
    """``nn.Conv2d`` that a single rank applies to each half of its images."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([super(HalvedConv2d, self).forward(part) for part in _parts(input)])


class HalvedLinear(nn.Linear):
    """``nn.Linear`` that a single rank applies to each half of its images."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([super(HalvedLinear, self).forward(part) for part in _parts(input)])


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose training statistics are of all ranks' images; on any device.

    Outputs, gradients and running statistics are those of one process with the whole batch, up
    to rounding. Ranks' parts may differ in size. Gradients of weight and bias are this rank's
    share: their sum over ranks is the global one. In evaluation it is ``nn.BatchNorm2d``.

    Raises:
        ValueError: on use with anything but ``[B, C, H, W]``.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        # Detached: autograd does not follow a gather over ranks. `_Normalise` computes the gradient
        # that flows through the moments.
        count, mean, variance = _global_moments([part.detach() for part in _parts(input)])
        if self.track_running_stats:
            self._track(count, mean, variance)
        output: Tensor = _Normalise.apply(
            input, self.weight, self.bias, count, mean, variance, self.eps
        )
        return output

    def _track(self, count: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics; the arguments are `_global_moments`'s result."""
        assert self.running_mean is not None  # all three buffers exist, or none
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # torch's way to ask for the mean over all batches
            momentum = 1.0 / float(self.num_batches_tracked)
        unbiased = variance * (count / (count - 1))
        with torch.no_grad():
            for running, seen in ((self.running_mean, mean), (self.running_var, unbiased)):
                running.mul_(1 - momentum).add_(seen.to(running.dtype), alpha=momentum)


_SYNCHRONIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: HalvedConv2d,
    nn.Linear: HalvedLinear,
    nn.BatchNorm2d: GlobalBatchNorm2d,
}


class _Normalise(torch.autograd.Function):
    """Normalise by given moments, with the gradient that also goes through the moments."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor,
        count: Tensor,
        mean: Tensor,
        variance: Tensor,
        eps: float,
    ) -> Tensor:
        dtype = _at_least_float32(images.dtype)
        ctx.save_for_backward(images, weight, count, mean, torch.rsqrt(variance + eps))
        # Evaluation's batch normalisation is the one that takes its moments as given.
        return torch.cat(
            [
                F.batch_norm(part, mean.to(dtype), variance.to(dtype), weight, bias, eps=eps)
                for part in _parts(images)
            ]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight, count, mean, inverse_std = ctx.saved_tensors
        dtype = _at_least_float32(images.dtype)
        normalised = (images.to(dtype) - _per_channel(mean, dtype)).mul_(
            _per_channel(inverse_std, dtype)
        )
        gradient = gradient.to(dtype)
        by_part = torch.stack(
            [
                torch.stack([_sum(own), _sum(own * part)])
                for own, part in zip(_parts(gradient), _parts(normalised), strict=True)
            ]
        )
        # Rounded before they are added, as ranks' gradients are.
        to_bias, to_weight = by_part.to(dtype).sum(0)
        # Every image moved the moments, so the gradients of all images' outputs flow through them.
        sums = by_part.sum(0)
        if _others():
            dist.all_reduce(sums)
        of_mean, of_scale = sums / count
        to_images = gradient - normalised.mul_(_per_channel(of_scale, dtype))
        to_images.sub_(_per_channel(of_mean, dtype)).mul_(_per_channel(inverse_std * weight, dtype))
        return to_images.to(images.dtype), to_weight, to_bias, None, None, None, None


def _others() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _parts(images: Tensor) -> tuple[Tensor, ...]:
    """Return this rank's images; those of a single rank in halves, cut as for two ranks."""
    if _others() or len(images) < 2:
        return (images,)
    half = len(images) // 2
    return images[:half], images[half:]


def _global_moments(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the moments over all ranks' ``[B, C, H, W]`` images; a collective.

    Returns:
        Float64, the same bits on every rank: number of values a channel ``[]``, mean ``[C]``,
        biased variance ``[C]``.
    """
    moments = [_moments(part) for part in parts]
    if _others():
        own, moments = (
            moments[0],
            [torch.empty_like(moments[0]) for _ in range(dist.get_world_size())],
        )
        # Gathered and combined by each rank in the order of ranks, so that all get the same bits.
        dist.all_gather(moments, own)
    channels = parts[0].shape[1]
    means, squares, counts = torch.stack(moments).split([channels, channels, 1], dim=1)
    # Source: Chan, Golub and LeVeque, "Updating formulae ... for computing sample variances", 1979.
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    squares = (squares + counts * (means - mean).square()).sum(0)
    return total, mean, squares / total


def _moments(images: Tensor) -> Tensor:
    """Return ``[2 C + 1]`` float64: means, sums of squared deviations, values a channel."""
    images = images.to(_at_least_float32(images.dtype))
    count = images.numel() // images.shape[1]
    mean = _sum(images) / count
    # Not the mean of squares minus the square of the mean, which would cancel in float32.
    squares = _sum((images - _per_channel(mean, images.dtype)).square_())
    # Correct for the rounding of the mean that was subtracted.
    squares -= count * (mean - mean.to(images.dtype)).square()
    return torch.cat([mean, squares, mean.new_tensor([count])])


def _sum(images: Tensor) -> Tensor:
    """Sum ``[B, C, H, W]`` to ``[C]`` float64; within an image in the images' own type."""
    return images.sum((2, 3)).double().sum(0)


def _per_channel(values: Tensor, dtype: torch.dtype) -> Tensor:
    """View ``[C]`` values as ``[C, 1, 1]``, which broadcasts over ``[B, C, H, W]`` images."""
    return values.to(dtype).view(-1, 1, 1)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    # bfloat16 keeps 8 bits, to which every square and every image's sum would be rounded.
    return torch.promote_types(dtype, torch.float32)
