"""The model's tokenizer, and which ids end a request or have no text."""

from pathlib import Path
from threading import Lock
from typing import Any

from nanovllm.config import Config
from nanovllm.model_config import LFS_ADVICE, as_token_ids, is_lfs_pointer, read_json

_importing = Lock()  # what transformers imports when it is asked for, a second thread finds halfway


def load_tokenizer(config: Config) -> Any | None:
    """The tokenizer in the model's directory, or None if it has none.

    Raises:
        ValueError: its files cannot be read.
    """
    names = ("tokenizer.json", "vocab.json", "tokenizer.model", "tokenizer_config.json")
    if not any((config.model_dir / name).is_file() for name in names):
        return None
    with _importing:
        import transformers  # slow, and AutoTokenizer, which pulls in every model, is slower still

        name = "PreTrainedTokenizerFast" if _is_plain(config.model_dir) else "AutoTokenizer"
        tokenizer_class = getattr(transformers, name)
    try:
        tokenizer = tokenizer_class.from_pretrained(config.model_dir)
        # It would take back the space before a full stop, which a stream has given already.
        tokenizer.clean_up_tokenization_spaces = False
        # What it says of long prompts ("indexing errors") is untrue here: max_model_len counts.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = (
            True
        )
        return tokenizer
    except Exception as error:  # whatever a broken file makes it raise
        for path in config.model_dir.iterdir():
            if path.is_file() and is_lfs_pointer(path):
                raise ValueError(f"{path} {LFS_ADVICE}") from None
        raise ValueError(f"{config.model_dir}: the tokenizer cannot be loaded: {error}") from error


def _is_plain(model_dir: Path) -> bool:
    """True if tokenizer.json says all; other classes (Llama's) put a BOS before a text as well."""
    config = model_dir / "tokenizer_config.json"
    if not ((model_dir / "tokenizer.json").is_file() and config.is_file()):
        return False
    plain = {"Qwen2Tokenizer", "PreTrainedTokenizer", "TokenizersBackend"}
    return str(read_json(config).get("tokenizer_class")).removesuffix("Fast") in plain


def find_stop_ids(config: Config, tokenizer: Any | None) -> frozenset[int]:
    """The option `eos`, else the union of what tokenizer and configuration files name.

    Raises:
        TypeError, ValueError: generation_config.json cannot be read, or names what is no id.
    """
    if config.eos != -1:
        return frozenset([config.eos])
    stop_ids: set[int] = set()
    generation_config = config.model_dir / "generation_config.json"
    if generation_config.is_file():
        stop_ids |= as_token_ids(read_json(generation_config).get("eos_token_id"))
    # The default of a class of models is for those which say nothing at all.
    if not stop_ids or "eos_token_id" in read_json(config.model_dir / "config.json"):
        stop_ids |= config.model_config.eos_token_ids
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        stop_ids.add(tokenizer.eos_token_id)
    return frozenset(stop_ids)


def find_hidden_ids(tokenizer: Any | None) -> frozenset[int]:
    """The special tokens that have no text when special tokens are skipped; none without tokenizer.

    They are left out before anything is decoded, since a run of them would fill a window.
    """
    if tokenizer is None:
        return frozenset()
    ids: list[int] = tokenizer.all_special_ids
    return frozenset(i for i in ids if not tokenizer.decode([i], skip_special_tokens=True))
