"""What users hand in: prompts, parameters and conversations in any form that is taken, checked."""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ListLike
from operator import index
from typing import Any

from nanovllm.sampling_params import SamplingParams

Prompt = str | ListLike[int]
Conversation = ListLike[Mapping[str, Any]]


def as_ids(prompt: ListLike[int]) -> list[int]:
    """A list of token ids as plain ints (numpy's are taken too)."""
    if not isinstance(prompt, Iterable) or isinstance(prompt, (bytes, dict)):
        raise TypeError(f"a prompt must be a str or a list of token ids, got {prompt!r:.80}")
    ids = []
    for token in prompt:
        if isinstance(token, bool) or not _is_int_like(token):
            raise TypeError(f"token ids must be ints, got {token!r:.80}")
        ids.append(index(token))
    return ids


def _is_int_like(value: object) -> bool:
    """Whether a value is an int, or one of numpy's; arrays and tensors may be prompts."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


def as_prompt_list(prompts: Prompt | ListLike[Prompt]) -> list[Prompt]:
    """One prompt as a list of one; a list of prompts as it is."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, dict)):
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
    if not isinstance(params, Iterable):
        raise TypeError(f"sampling_params must be SamplingParams or a list of them, got {params!r}")
    params = list(params)
    if len(params) != num_prompts:
        raise ValueError(f"{num_prompts} prompts, but {len(params)} sampling_params")
    return params


def as_conversations(messages: Conversation | ListLike[Conversation]) -> list[list[dict[str, Any]]]:
    """One conversation as a list of one; a list of conversations as it is.

    Raises:
        TypeError, ValueError: what is no message, or has no role or text.
    """
    if not _is_list(messages):
        raise TypeError(f"messages must be a list of dicts, got {messages!r:.80}")
    entries: list[Any] = list(messages)
    is_one = any(isinstance(entry, Mapping) for entry in entries)
    conversations = [entries] if is_one else entries
    for conversation in conversations:
        if not _is_list(conversation):
            raise TypeError(f"a conversation must be a list of dicts, got {conversation!r:.80}")
        if not conversation:
            raise ValueError("a conversation must have at least one message, got []")
        for message in conversation:
            _check_message(message)
    return [[dict(message) for message in conversation] for conversation in conversations]


def _is_list(value: object) -> bool:
    return isinstance(value, ListLike) and not isinstance(value, (str, bytes))


def _check_message(message: object) -> None:
    if not isinstance(message, Mapping):
        raise TypeError(f"a message must be a dict with 'role' and 'content', got {message!r:.80}")
    if not isinstance(message.get("role"), str):
        raise ValueError(f"a message must have a 'role' that is a str, got {message!r:.80}")
    calls_tools = bool(message.get("tool_calls")) and message.get("content") is None
    if not (isinstance(message.get("content"), str) or calls_tools):
        raise ValueError(f"a message must have a 'content' that is a str, got {message!r:.80}")


def render_chat(
    tokenizer: Any, conversation: list[dict[str, Any]], options: Mapping[str, Any]
) -> list[int]:
    """The token ids of a conversation in the tokenizer's chat template.

    Args:
        tokenizer: one with a chat template, unless `options` holds a chat_template.
        conversation: messages of "role" and "content".
        options: what the template is given; add_generation_prompt is true unless it says else.

    Raises:
        ValueError: the template refuses the conversation.
    """
    try:
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, **{"add_generation_prompt": True, **options}
        )
    except Exception as error:  # whatever a template makes it raise
        raise ValueError(f"the chat template refuses {conversation!r:.80}: {error}") from error
    # The template writes every special token itself.
    return encode(tokenizer, text, add_special_tokens=False)


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
