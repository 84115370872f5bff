"""A model as a file for other programs: one module from bytes to logits, normalisation inside.

Loading such a file takes torch (or an ONNX runtime), neither Ray nor Lightning nor this package.
"""

from __future__ import annotations

import io
import json

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_dist.data.cache import DatasetInfo
from cifar_dist.errors import UserError
from cifar_dist.inference.model import TrainedModel
from cifar_dist.inference.sharded import Logits


class WithNormalisation(nn.Module):
    """A module from ``[n, channels, side, side]`` bytes to ``[n, classes]`` float32 logits.

    Args:
        model: whose network and normalisation it takes.
        side: height and width of the images, in pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: TrainedModel, side: int) -> None:
        super().__init__()
        self.network = model.network
        self.side, self.size = side, model.normalisation.size
        for name in ("mean", "std"):  # of pixels from 0 to 255
            value = torch.tensor(getattr(model.normalisation, name)).mul(255).view(-1, 1, 1)
            self.register_buffer(name, value)

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.float() - self.mean) / self.std
        if self.size != self.side:
            # Antialiasing changes nothing where images grow, and not every format knows it.
            pixels = F.interpolate(
                pixels,
                (self.size, self.size),
                mode="bilinear",
                antialias=self.size < self.side,
                align_corners=False,
            )
        logits: Tensor = self.network(pixels)
        return logits


def exported(model: TrainedModel, about: DatasetInfo, form: str) -> tuple[bytes, Logits]:
    """Return a file's content, and a function that computes logits with it, loaded again.

    Args:
        model: in float32, on the CPU.
        about: what it was trained on; its classes are included where a format has room for them.
        form: ``torch``, ``onnx`` or ``safetensors``.

    Raises:
        UserError: a package that the format needs is not installed.
    """
    module = WithNormalisation(model, about.side).eval()
    return {"torch": _torch, "onnx": _onnx, "safetensors": _safetensors}[form](module, about)


def _about(about: DatasetInfo) -> dict[str, str]:
    return {"dataset": about.name, "classes": json.dumps(about.classes)}


def _example(about: DatasetInfo) -> tuple[Tensor]:
    # Two images: torch.export takes a size of 1 for a constant, and would refuse a dynamic one.
    return (torch.zeros(2, about.channels, about.side, about.side, dtype=torch.uint8),)


def _torch(module: WithNormalisation, about: DatasetInfo) -> tuple[bytes, Logits]:
    n = torch.export.Dim("n")
    program = torch.export.export(module, _example(about), dynamic_shapes={"images": {0: n}})
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=_about(about))
    loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), loaded


def _onnx(module: WithNormalisation, about: DatasetInfo) -> tuple[bytes, Logits]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter loads it
    except ImportError as error:
        raise UserError(
            f"--format onnx: {error.name} is not installed; pip install 'cifar-dist[onnx]'"
        ) from None
    n = torch.export.Dim("n")
    program = torch.onnx.export(
        module, _example(about), dynamo=True, verbose=False, input_names=["images"],
        output_names=["logits"], dynamic_shapes={"images": {0: n}},
    )  # fmt: skip
    assert program is not None  # only where it writes the file itself
    proto = program.model_proto
    onnx.helper.set_model_props(proto, _about(about))
    content: bytes = proto.SerializeToString()
    # On the CPU, as the model with whose logits the caller compares these.
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def logits_of(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return content, logits_of


def _safetensors(module: WithNormalisation, about: DatasetInfo) -> tuple[bytes, Logits]:
    # safetensors refuses other strides, such as those of channels_last weights.
    state = {name: value.contiguous() for name, value in module.state_dict().items()}
    metadata = {**_about(about), "image_size": str(module.size)}
    content = safetensors.torch.save(state, metadata)
    loaded = safetensors.torch.load(content)

    def logits_of(images: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(module, loaded, (images,))
        return logits

    return content, logits_of
