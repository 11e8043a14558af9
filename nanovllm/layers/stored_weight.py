"""StoredWeight: a weight that is kept as it is in the model's dtype, or as FP8."""

from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.layers.fp8 import is_kept
from nanovllm.model_config import Quantization
from nanovllm.utils.loader import targets_by_module
from nanovllm.utils.quantization import Fp8Weight, Stored

ROUTER = ".mlp.gate"  # how the name of a layer's router ends


class StoredWeight(nn.Module):
    """A weight [..., num_rows, input_size], or a stack of them, that may be FP8.

    Args:
        shape: of the weight.
        **options: its device and dtype; of a weight that is kept as FP8, what it stands for.
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

    @property
    def stored(self) -> Stored:
        """The weight, with its scales if it is FP8."""
        return self.weight if self.scales is None else Fp8Weight(self.weight, self.scales)

    def quantize(self) -> None:
        """Be filled with FP8 numbers, kept as such or dequantised: see layers.fp8.is_kept."""
        self.is_fp8 = True
        shape, device = self.weight.shape, self.weight.device
        block = Fp8Weight.block_of(shape, self.row_step)
        if is_kept(shape, block, self.dtype, device):
            self.replace(*Fp8Weight.empty(*shape, row_step=self.row_step, device=device))

    def replace(self, weight: Tensor, scales: Tensor | None = None) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales = None if scales is None else nn.Parameter(scales, requires_grad=False)


def quantize(layer: nn.Module, name: str, quantization: Quantization) -> None:
    """Quantise the weights of a layer, but for its router's and those kept.

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
