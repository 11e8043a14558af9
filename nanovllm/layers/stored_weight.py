"""StoredWeight: a weight that is kept in the model's dtype, as FP8 or as int4."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.layers.fp8 import is_kept
from nanovllm.layers.int4 import Groups, Int4Weight, packed
from nanovllm.model_config import Quantization
from nanovllm.utils.loader import targets_by_module
from nanovllm.utils.parallel import RankGroup
from nanovllm.utils.quantization import Fp8Weight

ROUTER = ".mlp.gate"  # how the name of a layer's router ends


class StoredWeight(nn.Module):
    """A weight [..., num_rows, input_size], or a stack of them, that may be FP8 or int4.

    Int4 is made by `pack` of what was filled: till then the weight is as the checkpoint has it.

    Args:
        shape: of the weight.
        **options: its device and dtype; of a weight that is kept as FP8, what it stands for.
    """

    def __init__(self, *shape: int, **options: Any) -> None:
        super().__init__()
        self.scales: Tensor | None
        self.weight = nn.Parameter(torch.empty(shape, **options), requires_grad=False)
        self.register_parameter("scales", None)
        self.dtype, self.own_shape = self.weight.dtype, self.weight.shape
        self.group = RankGroup()  # the ranks that have a part of the inputs each
        self.is_fp8 = False
        self.int4: Groups | None = None
        self.fits_int4 = True

    @property
    def row_step(self) -> int:
        """Parts of the rows that are filled by themselves begin at multiples of it."""
        return self.weight.size(-2)

    @property
    def first_input(self) -> int | None:
        """Where what is to be filled begins in the checkpoint's, if it is more than the rank's."""
        if self.int4 is None or self.weight.size(-1) == self.own_shape[-1]:
            return None
        return self.group.rank * self.own_shape[-1] - self.int4.before

    @property
    def stored(self) -> Tensor | Fp8Weight | Int4Weight:
        """The weight, with its scales if it has any."""
        if self.scales is None:
            return self.weight
        if self.int4 is not None:
            return Int4Weight(self.weight, self.scales, self.own_shape[-2])
        return Fp8Weight(self.weight, self.scales)

    def quantize(self, quantization: Quantization) -> None:
        """Be filled with FP8 numbers, or become int4 once it is filled.

        The former are kept as such or dequantised: see layers.fp8.is_kept.

        Raises:
            ValueError: int4 of a part of FP8 weights that cuts a group of inputs.
        """
        self.is_fp8 = quantization.method == "fp8" or quantization.is_stored
        shape, device = self.own_shape, self.weight.device
        if quantization.method == "int4":
            self.int4 = Groups.of(shape[-1], self.group.rank, self.group.size)
            self.fits_int4 = self.int4 is not None
            if self.is_fp8 and self.int4 is not None and self.int4.num_others:
                raise ValueError(
                    f"quantization='int4' of a checkpoint's FP8 weights: {self.group.size} ranks "
                    f"cut a group of {self.int4.size} of {shape[-1] * self.group.size} inputs, "
                    "which is not implemented; take tensor_parallel_size=1 or quantization='auto'"
                )
            self.unpack()
        elif is_kept(shape, Fp8Weight.block_of(shape, self.row_step), self.dtype, device):
            self.replace(*Fp8Weight.empty(*shape, row_step=self.row_step, device=device))

    def pack(self) -> None:
        """Keep it, now that it is filled, as this machine multiplies fastest."""
        if self.int4 is not None and self._is_plain():
            found = packed(self.weight, self.int4)
            self.fits_int4 = isinstance(found, Int4Weight)
            if isinstance(found, Int4Weight):
                self.replace(found.values, found.scales)
            else:
                self.replace(found)

    def unpack(self) -> None:
        """Have memory for it, to be filled."""
        is_kept_fp8 = self.scales is not None and self.int4 is None
        if not is_kept_fp8 and not self._is_plain():
            shape, device = self._plain_shape(), self.weight.device
            self.replace(torch.empty(shape, dtype=self.dtype, device=device))

    def _plain_shape(self) -> tuple[int, ...]:
        """Of what is read from the checkpoint: of groups that the rank's part cuts, all inputs."""
        *stack, input_size = self.own_shape
        return *stack, input_size + (0 if self.int4 is None else self.int4.num_others)

    def _is_plain(self) -> bool:
        """True if it is in the memory that a checkpoint's numbers are read to."""
        weight = self.weight
        is_plain = weight.dtype == self.dtype and not weight.is_mkldnn
        return is_plain and weight.shape == self._plain_shape()

    def replace(self, weight: Tensor, scales: Tensor | None = None) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales = None if scales is None else nn.Parameter(scales, requires_grad=False)


def pack(module: nn.Module) -> None:
    """Pack each weight in a module, and let those alone that are packed."""
    for part in module.modules():
        if isinstance(part, StoredWeight):
            part.pack()


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
            weight.quantize(quantization)


def notes(model: nn.Module) -> Iterator[str]:
    """What is to be said of weights that are not kept as they were to be quantised."""
    weights = {n: part for n, part in model.named_modules() if isinstance(part, StoredWeight)}
    if left := [name for name, weight in weights.items() if not weight.fits_int4]:
        yield (
            f"{len(left)} weights are not int4, no group of 32 inputs fits them: "
            f"{', '.join(left[:5])}{', ...' if len(left) > 5 else ''}"
        )
    fp8 = [weight for weight in weights.values() if weight.is_fp8 and weight.int4 is None]
    if other := [weight for weight in fp8 if weight.scales is None]:
        yield (
            f"{len(other)} of {len(fp8)} FP8 weights are kept as {str(other[0].dtype)[6:]}: they "
            "are small, or there are no kernels for them as such"
        )
