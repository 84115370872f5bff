"""What one training step costs at N GPUs on M nodes, on paper.

``python -m benchmarks.scaling`` adds up a step of ResNet-18 from what a GPU computes and what links
carry. The gradient's bytes and DDP's buckets are counted from the network. How many images a GPU
computes is an argument: measure it with ``make gpu``; the default is an assumption, and says so.
Links are given by bandwidth and latency.

- Compute: ``max(floor, images of a GPU / rate)``. The floor is what starting a step's kernels takes
  whatever the batch.
- Exchange: a ring's all-reduce, ``2 (n - 1) / n x bytes / bandwidth + 2 (n - 1) x latency``
  (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
  2009), among the GPUs of a node and then among the nodes, once for each bucket.
- Overlap: DDP exchanges a bucket while the backward pass, two thirds of the compute, goes on (Li et
  al., "PyTorch distributed: experiences on accelerating data parallel training", 2020). The last
  bucket's exchange is always waited for.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

BACKWARD = 2 / 3
"""Shard of compute: it takes about twice the operations of the forward pass."""


@dataclass(frozen=True)
class Link:
    """What carries gradients."""

    bandwidth: float
    """Bytes a second, one way."""
    latency: float
    """Seconds a message."""

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds to sum ``size`` bytes over a ring of so many ranks."""
        steps = 2 * (ranks - 1)
        return steps / ranks * size / self.bandwidth + steps * self.latency


# Datasheets: H100 SXM's NVLink 900 GB/s both ways together; a line rate over 8 for networks, one
# card a node. Latencies are assumptions of the usual order.
NVLINK = Link(450e9, 3e-6)
NETWORKS = {
    "400 Gb/s InfiniBand": Link(50e9, 5e-6),
    "100 Gb/s Ethernet": Link(12.5e9, 15e-6),
    "10 Gb/s Ethernet": Link(1.25e9, 30e-6),
}


@dataclass(frozen=True)
class Gpu:
    """What a GPU makes of a step."""

    rate: float
    """Images a second, forward, backward and update, at batches that fill it."""
    floor: float
    """Seconds that no step falls below."""

    def compute(self, images: float) -> float:
        """Seconds of a step of so many images."""
        return max(self.floor, images / self.rate)


def step(
    gpus: int, batch_size: int, gpu: Gpu, buckets: list[int], network: Link, a_node: int = 8
) -> tuple[float, float]:
    """Seconds of compute, and of exchange that nothing hides, in a step.

    Args:
        gpus: in all.
        batch_size: global.
        gpu: each of them.
        buckets: DDP's, in bytes, in the order in which they are exchanged.
        network: between nodes.
        a_node: GPUs on each node.
    """
    here, nodes = min(gpus, a_node), -(-gpus // a_node)

    def exchange(size: int) -> float:
        return NVLINK.all_reduce(size, here) + network.all_reduce(size, nodes)

    compute = gpu.compute(batch_size / gpus)
    if gpus == 1:
        return compute, 0.0
    *hidden, last = map(exchange, buckets)
    return compute, last + max(0.0, sum(hidden) - BACKWARD * compute)


def ddp_buckets() -> list[int]:
    """Bytes of DDP's buckets for ResNet-18, as torch assigns them with its default sizes."""
    import torch.distributed as dist

    from cifar_dist.model.resnet import resnet18

    parameters = list(resnet18(10, "cifar").parameters())
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20]
    assigned, _ = dist._compute_bucket_assignment_by_size(parameters, limits)
    # The last layers' gradients are there first.
    return [sum(parameters[i].numel() * 4 for i in bucket) for bucket in reversed(assigned)]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images-per-second", type=float, default=25_000,
                        help="of one GPU (default: assumed)")  # fmt: skip
    parser.add_argument("--floor-ms", type=float, default=5,
                        help="a step takes no less (default: assumed)")  # fmt: skip
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[512, 1024, 4096, 16_384])
    chosen = parser.parse_args()
    gpu = Gpu(chosen.images_per_second, chosen.floor_ms / 1000)
    buckets = ddp_buckets()
    print(f"gradients {sum(buckets):,} bytes in buckets of {buckets}")
    counts = [1, 2, 4, 8, 16, 32, 64, 128]
    for name, network in NETWORKS.items():
        print(f"\n{name}: milliseconds of a step, compute + exchange (speed-up)\n")
        print("| batch size | " + " | ".join(f"{n} GPUs" for n in counts) + " | stops at |")
        print("|---" * (len(counts) + 2) + "|")
        for size in chosen.batch_sizes:
            parts = [step(n, size, gpu, buckets, network) for n in counts]
            ups = [sum(parts[0]) / sum(each) for each in parts]
            cells = [
                f"{1000 * compute:.1f} + {1000 * exchange:.1f} ({up:.1f})"
                for (compute, exchange), up in zip(parts, ups, strict=True)
            ]
            # Where as many again bring less than half of what they should.
            stop = next((n for n, a, b in zip(counts, ups, ups[1:], strict=False) if b < 1.5 * a),
                        counts[-1])  # fmt: skip
            print(f"| {size} | {' | '.join(cells)} | {stop} |")


if __name__ == "__main__":
    main()
