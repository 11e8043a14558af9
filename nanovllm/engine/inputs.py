"""What users hand in: prompts, parameters and conversations in any form that is taken, checked."""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as ListLike
from functools import lru_cache
from operator import index
from typing import Any, TypeVar

from nanovllm.config import Config
from nanovllm.sampling_params import SamplingParams

T = TypeVar("T")
R = TypeVar("R")

Prompt = str | ListLike[int]
Conversation = ListLike[Mapping[str, Any]]


def as_ids(prompt: ListLike[int]) -> list[int]:
    """A list of token ids as plain ints (numpy's are taken too)."""
    prompt = _input_ids(prompt)
    is_iterable = isinstance(prompt, Iterable) and getattr(prompt, "ndim", 1) > 0
    if not is_iterable or isinstance(prompt, (bytes, Mapping)):
        raise TypeError(f"a prompt must be a str or a list of token ids, got {prompt!r:.80}")
    ids: list[Any] = list(prompt)
    if list(map(type, ids)).count(int) == len(ids):  # nearly always, and twenty times as fast
        return ids
    for token in ids:
        if isinstance(token, bool) or not _is_int_like(token):
            raise TypeError(f"token ids must be ints, got {token!r:.80}")
    return [index(token) for token in ids]


def _input_ids(prompts: Any) -> Any:
    """The ids in a tokenizer's output, without its padding; anything else as it is."""
    if not isinstance(prompts, Mapping) or "input_ids" not in prompts:
        return prompts
    ids, mask = prompts["input_ids"], prompts.get("attention_mask")
    return ids if mask is None else _without_padding(ids, mask)


def _without_padding(ids: Any, mask: Any) -> list[Any]:
    """The ids, of one prompt or of several, where the mask is not 0."""
    if len(ids) != len(mask):
        raise ValueError(f"input_ids has {len(ids)} entries, attention_mask {len(mask)}")
    pairs = list(zip(ids, mask, strict=True))
    if any(isinstance(row, Iterable) and getattr(row, "ndim", 1) for row in ids):
        return [_without_padding(*pair) for pair in pairs]
    return [token for token, is_kept in pairs if is_kept]


def _is_int_like(value: object) -> bool:
    """Whether a value is an int, or one of numpy's or torch's; arrays and tensors are prompts."""
    is_bool = str(getattr(value, "dtype", "")).endswith("bool")
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0 and not is_bool


def as_prompt_list(prompts: Prompt | ListLike[Prompt]) -> list[Prompt]:
    """One prompt as a list of one; a list of prompts as it is."""
    prompts = _input_ids(prompts)
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, Mapping)):
        raise TypeError(f"prompts must be texts or lists of token ids, got {prompts!r:.80}")
    entries: list[Any] = list(prompts)
    is_one_prompt = bool(entries) and all(_is_int_like(entry) for entry in entries)
    return [entries] if is_one_prompt else entries


def as_params_list(
    params: SamplingParams | ListLike[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    """One SamplingParams for each prompt."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if not isinstance(params, Iterable) or isinstance(params, (str, Mapping)):
        raise TypeError(f"sampling_params must be SamplingParams or a list of them, got {params!r}")
    params = list(params)
    if len(params) != num_prompts:
        raise ValueError(f"{num_prompts} prompts, but {len(params)} sampling_params")
    return params


def check_params(params: SamplingParams, config: Config, tokenizer: Any | None) -> None:
    """What SamplingParams cannot check without a model.

    Raises:
        TypeError: `params` is something else.
        ValueError: stop texts without a tokenizer, or stop ids that the model does not have.
    """
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling_params must be SamplingParams, got {params!r:.80}")
    if params.stop and tokenizer is None:
        raise ValueError(
            f"{config.model_dir} has no tokenizer, which stop texts need: "
            f"got stop={params.stop!r:.80}"
        )
    if params.stop_token_ids:
        _check_vocabulary("stop token id", params.stop_token_ids, config)


def as_prompt_ids(prompt: Prompt, config: Config, tokenizer: Any | None) -> list[int]:
    """The token ids of a prompt.

    Raises:
        TypeError: neither a text nor token ids.
        ValueError: a text without a tokenizer, no tokens or too many, ids outside the vocabulary.
    """
    if not isinstance(prompt, str):
        token_ids = as_ids(prompt)
    elif tokenizer is not None:
        token_ids = encode(tokenizer, prompt)
    else:
        raise ValueError(
            f"{config.model_dir} has no tokenizer: prompts must be token ids, got {prompt!r:.80}"
        )
    limit = config.max_model_len - 1
    if not 1 <= len(token_ids) <= limit:
        raise ValueError(
            f"a prompt must have 1 to {limit} tokens (max_model_len - 1), got {len(token_ids)}"
        )
    _check_vocabulary("token id", token_ids, config)
    return token_ids


def _check_vocabulary(what: str, token_ids: ListLike[int], config: Config) -> None:
    vocab_size = config.model_config.vocab_size
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"{what} {bad} is outside the vocabulary, 0 to {vocab_size - 1}")


def as_conversation_list(messages: Conversation | ListLike[Conversation]) -> list[Conversation]:
    """One conversation as a list of one; a list of conversations as it is."""
    if not _is_list(messages):
        raise TypeError(f"messages must be a list of dicts, got {messages!r:.80}")
    entries: list[Any] = list(messages)
    return [entries] if any(isinstance(entry, Mapping) for entry in entries) else entries


def as_conversation(messages: Conversation) -> list[dict[str, Any]]:
    """The messages of one conversation.

    Raises:
        TypeError, ValueError: what is no message, or has no role or text.
    """
    if not _is_list(messages):
        raise TypeError(f"a conversation must be a list of dicts, got {messages!r:.80}")
    conversation = list(messages)
    if not conversation:
        raise ValueError("a conversation must have at least one message, got []")
    for message in conversation:
        _check_message(message)
    return [dict(message) for message in conversation]


def _is_list(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


def _check_message(message: object) -> None:
    if not isinstance(message, Mapping):
        raise TypeError(f"a message must be a dict with 'role' and 'content', got {message!r:.80}")
    if not isinstance(message.get("role"), str):
        raise ValueError(f"a message must have a 'role' that is a str, got {message!r:.80}")
    calls_tools = bool(message.get("tool_calls")) and message.get("content") is None
    if not (isinstance(message.get("content"), str) or calls_tools):
        raise ValueError(f"a message must have a 'content' that is a str, got {message!r:.80}")


def as_chat_prompts(
    messages: Conversation | ListLike[Conversation],
    config: Config,
    template: Any | None,
    tokenizer: Any | None,
    options: Mapping[str, Any],
) -> list[list[int]]:
    """The token ids of each conversation in the tokenizer's chat template.

    Args:
        messages: one conversation, or a list of them.
        template: the tokenizer whose chat template is used.
        tokenizer: the one that encodes what it writes.
        options: what the template is given; add_generation_prompt is true unless it says else.

    Raises:
        TypeError, ValueError: no tokenizer, no template, an option that it does not use, a
            malformed conversation, or one that the template refuses.
    """
    if template is None or tokenizer is None:
        raise ValueError(f"{config.model_dir} has no tokenizer, which chat() needs")
    if "tokenize" in options:
        raise TypeError("chat() takes any template option but tokenize, which it sets itself")
    if not (template.chat_template or options.get("chat_template")):
        raise ValueError(
            f"the tokenizer of {config.model_dir} has no chat template: "
            "give one as chat_template=..."
        )
    _check_template_options(template, options)
    conversations = as_conversation_list(messages)

    def render(conversation: Conversation) -> list[int]:
        text = _render_chat(template, as_conversation(conversation), options)
        # The template writes every special token itself.
        return encode(tokenizer, text, add_special_tokens=False)

    return for_each(render, "conversation", conversations)


def _check_template_options(tokenizer: Any, options: Mapping[str, Any]) -> None:
    """Raise TypeError for an option that makes no difference to what the chat template writes."""
    if not options:
        return
    given = options.get("chat_template") or tokenizer.chat_template
    templates = given.values() if isinstance(given, dict) else [given]
    known = {"chat_template", "add_generation_prompt", "continue_final_message"}
    for template in templates:
        variables = _variables(template)
        if variables is None:
            return
        known |= variables
    if unknown := [name for name in options if name not in known]:
        used = ", ".join(sorted(known - {"messages"}))
        raise TypeError(f"the chat template does not use {unknown[0]!r}; it takes {used}")


@lru_cache(maxsize=16)
def _variables(template: str) -> frozenset[str] | None:
    """The names that a template is to be given; None if that cannot be told."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    try:
        return frozenset(meta.find_undeclared_variables(Environment().parse(template)))
    except TemplateSyntaxError:  # tags of the tokenizer's own, or a mistake that it will tell
        return None


def is_chat(prompts: Any) -> bool:
    """True for a conversation, or a list or array of them: dicts that are no tokenizer's output."""
    first = prompts
    for _ in range(2):
        is_array = str(getattr(first, "dtype", "")) == "object"
        is_list = isinstance(first, ListLike) and not isinstance(first, (str, bytes))
        if not (is_array or is_list) or len(first) == 0:
            break
        first = first[0]
    return first is not prompts and isinstance(first, Mapping) and "input_ids" not in first


def for_each(make: Callable[[T], R], what: str, entries: ListLike[T]) -> list[R]:
    """make(entry) for each; of several, an error says which one it was."""
    made = []
    for number, entry in enumerate(entries):
        try:
            made.append(make(entry))
        except (TypeError, ValueError) as error:
            if len(entries) == 1:
                raise
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{what} {number}: {error}") from error
    return made


def _render_chat(
    tokenizer: Any, conversation: list[dict[str, Any]], options: Mapping[str, Any]
) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            conversation, tokenize=False, **{"add_generation_prompt": True, **options}
        )
    except Exception as error:  # whatever a template makes it raise
        raise ValueError(f"the chat template refuses {conversation!r:.80}: {error}") from error
    return text


def encode(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """The token ids of a text.

    Raises:
        ValueError: the text holds half of a surrogate pair, which no encoding has.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text must be valid Unicode, got {text!r:.80}: {error}") from error
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return token_ids
