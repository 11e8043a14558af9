"""Find a checkpoint and fill a model's parameters from it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nanovllm.model_config import LFS_ADVICE, ModelConfig, is_lfs_pointer, read_json
from nanovllm.utils.parallel import RankGroup

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

    def shards(self) -> Iterator[tuple[str, Tensor]]:
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
    try:
        return ModelConfig.from_dict(raw)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{model_dir / 'config.json'}: {error}") from error


def checkpoint_targets(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a checkpoint must hold, by its name there: the memory it is copied to."""
    targets: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Merged):
            parent = prefix.rpartition(".")[0]
            targets.update((f"{parent}.{name}", part) for name, part in module.shards())
        else:
            parameters = module.named_parameters(recurse=False)
            targets.update((f"{prefix}.{name}", parameter) for name, parameter in parameters)
    return targets


def checkpoint_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of every tensor that a checkpoint must hold, by its name there."""
    return {name: target.shape for name, target in checkpoint_targets(model).items()}


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
    found: set[str] = set()
    for file, name in _tensors(model_dir, torch.device("cpu")):
        if name in found:
            raise ValueError(f"{model_dir}: tensor {name!r} stands in the checkpoint twice")
        if name not in shapes:
            hint = ""
            if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
                hint = "; experts are to be saved one by one, as save_pretrained does by itself"
            raise ValueError(f"{model_dir}: the model has no parameter for tensor {name!r}{hint}")
        tensor = file.get_slice(name)
        if not tensor.get_dtype().startswith(("F", "BF")):
            raise ValueError(
                f"{model_dir}: tensor {name!r} is {tensor.get_dtype()}; quantised checkpoints are "
                "not implemented"
            )
        if list(tensor.get_shape()) != list(shapes[name]):
            raise ValueError(
                f"{model_dir}: tensor {name!r} has shape {tensor.get_shape()}, the configuration "
                f"asks for {list(shapes[name])}"
            )
        found.add(name)
    if is_tied and found & TIED:
        found |= TIED
    if missing := [name for name in shapes if name not in found]:
        raise ValueError(
            f"{model_dir}: no tensor fills {len(missing)} parameters: {_some(missing)}"
        )


def load_weights(
    model: nn.Module,
    model_dir: Path,
    shapes: dict[str, torch.Size] | None = None,
    group: RankGroup | None = None,
) -> None:
    """Fill all of a model's parameters from the safetensors in a directory.

    Tensors are read straight to the parameters' device and converted to their dtype. Rotary
    frequencies, which old exports carry, are passed over.

    Args:
        shapes: the checkpoint's, where the model is one rank's part of it; None: the model's own.
        group: of the ranks that share it: of each tensor only the rank's part is read.

    Raises:
        ValueError: as check_checkpoint, and then nothing has been changed; or tied weights that
            differ.
    """
    targets = checkpoint_targets(model)
    group = RankGroup() if group is None else group
    is_tied = bool(getattr(model, "tie_word_embeddings", False))
    check_checkpoint(checkpoint_shapes(model) if shapes is None else shapes, is_tied, model_dir)
    filled: set[str] = set()
    for file, name in _tensors(model_dir, next(model.parameters()).device):
        if name not in targets:
            continue  # another rank's
        target = targets[name].data
        tensor = _read_part(file, name, target.shape, group)
        is_again = is_tied and name in TIED and filled & TIED
        if is_again and not torch.equal(tensor.to(target.dtype), target):
            raise ValueError(
                f"{model_dir}: tie_word_embeddings is true, but lm_head.weight differs from the "
                "embedding"
            )
        target.copy_(tensor)
        filled.add(name)


def _read_part(file: Any, name: str, shape: torch.Size, group: RankGroup) -> Tensor:
    """A tensor of the checkpoint, or of the dimension in which that is larger the rank's part."""
    whole = file.get_slice(name)
    for dim, (whole_size, size) in enumerate(zip(whole.get_shape(), shape, strict=True)):
        if whole_size != size:
            start = group.part_of(whole_size, size)
            part: Tensor = whole[(slice(None),) * dim + (slice(start, start + size),)]
            return part
    tensor: Tensor = file.get_tensor(name)
    return tensor


def _tensors(model_dir: Path, device: torch.device) -> Iterator[tuple[Any, str]]:
    """Each tensor of the checkpoint: the opened file, and the tensor's name in it."""
    from safetensors import SafetensorError, safe_open

    for path in _weight_files(model_dir):
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    if not name.endswith("rotary_emb.inv_freq"):
                        yield file, name
        except (SafetensorError, OSError) as error:
            if is_lfs_pointer(path):
                raise ValueError(f"{path} {LFS_ADVICE}") from None
            raise ValueError(f"{path} is missing, truncated or corrupt: {error}") from error


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
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.02, generator=generator)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
