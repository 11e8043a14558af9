"""Find a checkpoint and fill a model's parameters from it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nanovllm.model_config import LFS_ADVICE, ModelConfig, is_lfs_pointer, read_json
from nanovllm.utils.parallel import RankGroup
from nanovllm.utils.quantization import (
    BLOCK,
    E4M3,
    E4M3_MAX,
    SCALES_SUFFIX,
    Dequantized,
    Fp8Weight,
    Target,
    WidePart,
    memory_of,
    num_blocks,
    own_targets,
    quantize,
)

CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
)
FP8_SCALE = 0.02 / 100  # of random weights
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")


def resolve_model_dir(model: str | Path, with_weights: bool = True) -> Path:
    """The local directory of a model: `model` itself, or where the Hub client keeps that repo.

    Offline, a repo is taken from the Hub client's cache.

    Args:
        model: a directory or a Hub repo id.
        with_weights: fetch the weights too, not only configuration and tokenizer.

    Raises:
        TypeError: `model` is neither str nor Path.
        ValueError: neither a directory nor a repo that can be had.
    """
    if not isinstance(model, (str, Path)):
        raise TypeError(f"model must be a directory or a Hub repo id, got {model!r}")
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise ValueError(f"{model} is a file, not a model directory{_hint(path)}")
    except (RuntimeError, OSError) as error:  # no such user's home, a name that is too long
        raise ValueError(f"{model} is no directory: {error}") from error
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = [*CONFIG_FILES, *(WEIGHT_FILES if with_weights else ())]
    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except HFValidationError:
        raise ValueError(f"{model} is no directory, and no Hub repo id either") from None
    except Exception as error:  # the client's own, its HTTP library's or the system's
        raise ValueError(
            f"{model} is no directory, and as a Hub repo it cannot be fetched: {error}"
        ) from error


@runtime_checkable
class Merged(Protocol):
    """A module whose parameters stand in a checkpoint as several tensors each."""

    def shards(self) -> Iterator[tuple[str, Target]]:
        """Their names there, where the module's own name would stand, and the parts they fill."""


def _hint(path: Path) -> str:
    """What a file or a directory holds in the place of a checkpoint, and what to do about it."""
    names = [path.name] if path.is_file() else [entry.name for entry in path.iterdir()]
    if "adapter_config.json" in names:
        return ": it holds a LoRA adapter, which is to be merged into its base model and saved"
    if any(name.endswith(".gguf") for name in names):
        return ": GGUF is not supported, give the directory with the model's safetensors"
    if path.is_file() and path.suffix == ".safetensors":
        return ": give the directory that holds it and config.json"
    if any(name.startswith("pytorch_model") for name in names):
        return ": it holds PyTorch's .bin files, which are to be saved anew as safetensors"
    return ""


def read_model_config(model_dir: Path) -> ModelConfig:
    """What config.json in a model's directory says.

    Raises:
        TypeError, ValueError: there is none (says what there is instead), it cannot be read, or is
            of a model that is not supported.
    """
    if not (model_dir / "config.json").is_file():
        raise ValueError(
            f"{model_dir} is no model directory, it has no config.json{_hint(model_dir)}"
        )
    raw = read_json(model_dir / "config.json")
    with errors_name(model_dir / "config.json"):
        return ModelConfig.from_dict(raw)


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """A TypeError or ValueError raised meanwhile says in which model, or file, it lies."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{path}: {error}") from error


def checkpoint_targets(model: nn.Module) -> dict[str, Target]:
    """Every tensor that a checkpoint must hold, by its name there: the memory it is copied to."""
    return {name: target for _, targets in targets_by_module(model) for name, target in targets}


def targets_by_module(
    module: nn.Module, prefix: str = ""
) -> Iterator[tuple[nn.Module, list[tuple[str, Target]]]]:
    """checkpoint_targets of each module that has any of its own."""
    if isinstance(module, Merged):
        parent = prefix.rpartition(".")[0]
        yield module, [(f"{parent}.{name}", part) for name, part in module.shards()]
        return
    if own := own_targets(module):
        yield module, [(f"{prefix}.{name}", target) for name, target in own.items()]
    for name, child in module.named_children():
        yield from targets_by_module(child, f"{prefix}.{name}".lstrip("."))


def checkpoint_shapes(model: nn.Module, is_fp8: bool = False) -> dict[str, torch.Size]:
    """The shape of every tensor that a checkpoint must hold, by its name there.

    Args:
        is_fp8: the checkpoint holds as FP8 what the model is to have as such, or dequantised.
    """
    shapes = {}
    for name, target in checkpoint_targets(model).items():
        shapes[name] = target.shape
        if is_fp8 and not isinstance(target, Tensor):
            shapes[name + SCALES_SUFFIX] = torch.Size(map(num_blocks, target.shape))
    return shapes


# One tensor under two names, where tie_word_embeddings is true.
TIED = {"lm_head.weight", "model.embed_tokens.weight"}


def check_checkpoint(shapes: dict[str, torch.Size], is_tied: bool, model_dir: Path) -> None:
    """See whether the safetensors in a directory fill a model, by what their headers say.

    Args:
        shapes: from checkpoint_shapes.
        is_tied: a weight of TIED may stand under either name, or both.

    Raises:
        ValueError: a missing, truncated or corrupt file, a tensor of the wrong shape or with no
            parameter, a tensor that comes twice, or a parameter with no tensor.
    """
    with _opened(model_dir, torch.device("cpu")) as files:
        for name, file in files.items():
            if name not in shapes:
                raise ValueError(
                    f"{model_dir}: the model has no parameter for tensor {name!r}{_why(name)}"
                )
            tensor, is_fp8 = file.get_slice(name), name + SCALES_SUFFIX in shapes
            kind = tensor.get_dtype()
            if is_fp8 and kind != "F8_E4M3":
                raise ValueError(
                    f"{model_dir}: tensor {name!r} is {kind}, quantization_config in config.json "
                    "asks for F8_E4M3, or for its module's name in modules_to_not_convert"
                )
            if not is_fp8 and kind not in ("F16", "F32", "F64", "BF16"):
                raise ValueError(
                    f"{model_dir}: tensor {name!r} is {kind}; quantised checkpoints are not "
                    "implemented, but for FP8 weights that quantization_config says to be so"
                )
            if list(tensor.get_shape()) != list(shapes[name]):
                raise ValueError(
                    f"{model_dir}: tensor {name!r} has shape {tensor.get_shape()}, the "
                    f"configuration asks for {list(shapes[name])}"
                )
        found = set(files)
    if is_tied and found & TIED:
        found |= TIED
    if missing := [name for name in shapes if name not in found]:
        raise ValueError(
            f"{model_dir}: no tensor fills {len(missing)} parameters: {_some(missing)}"
        )


def _why(name: str) -> str:
    """A checkpoint may hold a tensor that the model has no parameter for: what to do about it."""
    if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return "; experts are to be saved one by one, as save_pretrained does by itself"
    if name.endswith(SCALES_SUFFIX):
        return ", which scales a weight that quantization_config does not say to be quantised"
    return ""


def load_weights(
    model: nn.Module,
    model_dir: Path,
    shapes: dict[str, torch.Size] | None = None,
    group: RankGroup | None = None,
    on_filled: Callable[[nn.Module], object] = lambda module: None,
    is_finite: bool = False,
) -> None:
    """Fill all of a model's parameters from the safetensors in a directory.

    Tensors are read straight to the parameters' device and converted to their dtype; those of FP8
    weights are quantised, if they are not.

    Args:
        shapes: the checkpoint's, where the model is one rank's part of it; None: the model's own.
        group: of the ranks that share it: of each tensor only the rank's part is read.
        on_filled: told of each module once all of its parameters are filled.
        is_finite: matrices must be, since they are quantised later.

    Raises:
        ValueError: as check_checkpoint, and then nothing has been changed; or tied weights that
            differ, or weights to be quantised that are not finite.
    """
    group = RankGroup() if group is None else group
    is_tied = bool(getattr(model, "tie_word_embeddings", False))
    check_checkpoint(checkpoint_shapes(model) if shapes is None else shapes, is_tied, model_dir)
    targets, left = _to_fill(model)
    is_one_filled = False
    with _opened(model_dir, next(model.parameters()).device) as files:
        for name in files:
            if name not in targets:
                continue  # another rank's, or scales, which are read with their weight
            is_again = is_tied and name in TIED and is_one_filled
            is_one_filled |= name in TIED
            with errors_name(model_dir):
                # Popped, so that what a module replaces when it is filled is freed there and then.
                _fill(targets.pop(name), files, name, group, is_again, is_finite)
            module, names = left[name]
            names.discard(name)
            if not names:
                on_filled(module)


def _to_fill(
    model: nn.Module,
) -> tuple[dict[str, Target], dict[str, tuple[nn.Module, set[str]]]]:
    """What each tensor fills; its module, and the names of all that fill that one."""
    targets: dict[str, Target] = {}
    modules: dict[str, tuple[nn.Module, set[str]]] = {}
    for module, pairs in targets_by_module(model):
        targets.update(pairs)
        names = {name for name, _ in pairs}
        modules.update(dict.fromkeys(names, (module, names)))
    return targets, modules


def _fill(
    target: Target,
    files: dict[str, Any],
    name: str,
    group: RankGroup,
    is_again: bool,
    is_finite: bool,
) -> None:
    """Read the rank's part of a tensor to where it belongs.

    Args:
        is_again: it has been filled from another tensor, which must be equal.
        is_finite: a matrix must be.
    """
    if isinstance(target, (Fp8Weight, Dequantized)):
        target.fill(*_read_fp8(files, name, target.shape, group))
    else:
        place = _place(files[name].get_slice(name).get_shape(), target.shape, group)
        if isinstance(target, WidePart):
            place = place[0], slice(target.start, target.start + target.shape[1])
        tensor, memory = _read(files, name, place), memory_of(target)
        if is_again and not _is_same(tensor.to(memory.dtype), memory):
            raise ValueError(
                "tie_word_embeddings is true, but lm_head.weight differs from the embedding"
            )
        memory.data.copy_(tensor)
    if is_finite and not isinstance(target, Fp8Weight):
        memory = memory_of(target)
        if memory.dim() > 1 and not memory.isfinite().all():
            raise ValueError(
                f"tensor {name!r} holds infinite numbers or NaN as {str(memory.dtype)[6:]}, which "
                "int4 weights cannot"
            )


def _is_same(x: Tensor, y: Tensor) -> bool:
    """NaN are the same if their bits are."""
    return torch.equal(x, y) or torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def _place(whole: list[int], shape: torch.Size, group: RankGroup) -> tuple[slice, ...]:
    """Where a checkpoint's tensor has the rank's part: all of a dimension that is no larger."""
    starts = [
        0 if whole_size == size else group.part_of(whole_size, size)
        for whole_size, size in zip(whole, shape, strict=True)
    ]
    return tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))


def _read(files: dict[str, Any], name: str, place: tuple[slice, ...]) -> Tensor:
    """That part of a tensor."""
    whole = files[name].get_slice(name)
    is_all = [part.stop - part.start for part in place] == list(whole.get_shape())
    tensor: Tensor = files[name].get_tensor(name) if is_all else whole[place]
    return tensor


def _read_fp8(
    files: dict[str, Any], name: str, shape: torch.Size, group: RankGroup
) -> tuple[Tensor, Tensor, list[int]]:
    """The rank's part of a weight, for Fp8Weight.fill: quantised, if the checkpoint's is not."""
    whole = files[name].get_slice(name).get_shape()
    place = _place(whole, shape, group)
    blocks = tuple(slice(part.start // BLOCK, num_blocks(part.stop)) for part in place)
    starts = [part.start % BLOCK for part in place]
    if name + SCALES_SUFFIX in files:
        scales = _read(files, name + SCALES_SUFFIX, blocks)
        if not scales.isfinite().all():
            raise ValueError(f"tensor {name + SCALES_SUFFIX!r} holds infinite numbers or NaN")
        return _read(files, name, place), scales.float(), starts
    # A block that is cut has the scale of all of it.
    around = tuple(
        slice(part.start * BLOCK, min(part.stop * BLOCK, size))
        for part, size in zip(blocks, whole, strict=True)
    )
    values, scales = quantize(_read(files, name, around), name)
    rows, inputs = (slice(start, start + size) for start, size in zip(starts, shape, strict=True))
    return values[rows, inputs], scales, starts


@contextmanager
def _opened(model_dir: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    """The opened file that each tensor of the checkpoint is in.

    Raises:
        ValueError: a missing, truncated or corrupt file, or a tensor that comes twice.
    """
    from safetensors import SafetensorError, safe_open

    files: dict[str, Any] = {}
    with ExitStack() as stack:
        for path in _weight_files(model_dir):
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device=str(device)))
                names = [name for name in file.keys() if not name.endswith("rotary_emb.inv_freq")]  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                if is_lfs_pointer(path):
                    raise ValueError(f"{path} {LFS_ADVICE}") from None
                raise ValueError(f"{path} is missing, truncated or corrupt: {error}") from error
            for name in names:
                if name in files:
                    raise ValueError(f"{model_dir}: tensor {name!r} stands in the checkpoint twice")
                files[name] = file
        yield files


def _weight_files(model_dir: Path) -> list[Path]:
    """The checkpoint's safetensors: one file, or shards, those that an index names if there is one.

    Where there is model.safetensors it is the checkpoint, as in transformers.
    """
    index = model_dir / "model.safetensors.index.json"
    if (model_dir / "model.safetensors").is_file():
        return [model_dir / "model.safetensors"]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        paths = [model_dir / name for name in names]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ValueError(f"{model_dir}: {index.name} names missing files: {_some(missing)}")
    else:
        paths = sorted(model_dir.glob("model*.safetensors"))
    if not paths:
        raise ValueError(
            f"{model_dir} holds no model.safetensors (or shards with an index){_hint(model_dir)}"
        )
    return paths


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def fill_random(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter random values, for benchmarks without a checkpoint.

    Matrices: normal, standard deviation 0.02, as at the start of training. Biases 0, norms 1. Where
    ranks share the model their parts are alike.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def fill(parameter: Tensor) -> None:
        parameter.normal_(std=0.02, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dtype == E4M3:
                for matrix in parameter.flatten(0, -2).split(1 << 16):
                    fill(random := torch.empty(matrix.shape, device=device))
                    # Larger ones, one of 200,000, are NaN in e4m3 unless torch saturates.
                    matrix.copy_((random / FP8_SCALE).clamp_(-E4M3_MAX, E4M3_MAX))
            elif name.endswith("scales"):
                parameter.fill_(FP8_SCALE)
            elif parameter.dim() > 1:
                fill(parameter)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
