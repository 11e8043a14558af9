"""StoredWeight: a weight as it is loaded, and as it is kept afterwards."""

from typing import Any

import torch
from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.model_config import Quantization
from nanovllm.utils.loader import targets_by_module
from nanovllm.utils.quantization import Fp8Weight

ROUTER = ".mlp.gate"  # how the name of a layer's router ends


class StoredWeight(nn.Module):
    """A weight [..., num_rows, input_size], or a stack of them, that may be FP8.

    Args:
        shape: of the weight.
        **options: device and dtype; once it is quantised, of what it stands for.
    """

    def __init__(self, *shape: int, **options: Any) -> None:
        super().__init__()
        self.scales: Tensor | None
        self.weight = nn.Parameter(torch.empty(shape, **options), requires_grad=False)
        self.register_parameter("scales", None)
        self.dtype = self.weight.dtype
        self.is_fp8 = False

    @property
    def row_step(self) -> int:
        """Parts of the rows that are filled by themselves begin at multiples of it."""
        return self.weight.size(-2)

    def quantize(self) -> None:
        """Have FP8 memory for it, to be filled."""
        self.is_fp8 = True
        shape, device = self.weight.shape, self.weight.device
        self.replace(*Fp8Weight.empty(*shape, row_step=self.row_step, device=device))

    def pack(self) -> None:
        """Keep it, now that it is filled, as this machine multiplies fastest."""
        if self.scales is not None and not kernels.multiplies_fp8(self.weight.device):
            self.replace(Fp8Weight(self.weight, self.scales).dequantized(self.dtype))

    def unpack(self) -> None:
        """Have memory for it again, to be filled."""
        if self.is_fp8 and self.scales is None:
            self.quantize()

    def replace(self, weight: Tensor, scales: Tensor | None = None) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales = None if scales is None else nn.Parameter(scales, requires_grad=False)


def pack(module: nn.Module) -> None:
    """Pack each weight in a module, and let those alone that are packed."""
    for part in module.modules():
        if isinstance(part, StoredWeight):
            part.pack()


def quantize(layer: nn.Module, name: str, quantization: Quantization) -> None:
    """Have quantised memory for the weights of a layer, but for its router's and those kept.

    Args:
        name: of the layer in a checkpoint.

    Raises:
        ValueError: of a merged weight some parts are to be kept, and others not.
    """
    for module, targets in targets_by_module(layer, name):
        names = {target.rpartition(".")[0] for target, _ in targets}
        kept = {name for name in names if name.endswith(ROUTER) or quantization.keeps(name)}
        weights = [part for part in module.modules() if isinstance(part, StoredWeight)]
        if weights and kept and kept != names:
            raise ValueError(
                f"modules_to_not_convert names {min(kept)} but not {min(names - kept)}, which is "
                "merged with it: that is not implemented"
            )
        for weight in weights if not kept else ():
            weight.quantize()
