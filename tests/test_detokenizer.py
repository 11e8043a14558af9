"""Detokenizer: text that only grows, the same as decoding the whole, and stop texts in it."""

import random
from collections.abc import Iterable
from typing import Any

import pytest
import transformers
from conftest import TINY, Tally

from nanovllm import SamplingParams
from nanovllm.engine.detokenizer import MAX_WINDOW, REPLACEMENT, Detokenizer
from nanovllm.engine.tokenizer import find_hidden_ids

PROMPT = [5, 6, 7]
ALPHABET = [
    *"abc e  \n.,!",
    *"你好世界、。",  # three bytes a character
    *"éßñж",  # two
    *"😀🚀🧠",  # four
    "e\u0301",  # combining marks
    "नि",
    "👩‍👩‍👧",  # emoji joined by invisible characters
    "🇫🇷",
    "\ufffd",  # what stands for bytes that are no UTF-8 may also be meant
    "the ",
    "small model ",
    "<|im_end|>",
]


@pytest.fixture(scope="module")
def byte_level() -> Any:
    """A tokenizer of bytes and merged bytes, as Qwen's."""
    return transformers.AutoTokenizer.from_pretrained(TINY)


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 60)))


def start(tokenizer: Any, **params: Any) -> Detokenizer:
    hidden_ids = find_hidden_ids(tokenizer)
    return Detokenizer(tokenizer, SamplingParams(**params), len(PROMPT), hidden_ids)


def stream(
    detokenizer: Detokenizer, ids: list[int], rng: random.Random | None = None
) -> tuple[list[str], int]:
    """The settled pieces of text, and how many tokens were taken; several at a time with `rng`."""
    pieces, num_sent, end = [], 0, 0
    while end < len(ids):
        end = min(len(ids), end + (rng.choice([1, 1, 1, 2, 5]) if rng else 1))
        stop = detokenizer.update(PROMPT + ids[:end], is_final=end == len(ids))
        pieces.append(detokenizer.text[num_sent : detokenizer.num_settled])
        num_sent += len(pieces[-1])
        if stop is not None:
            break
    assert num_sent == len(detokenizer.text)
    return pieces, end


def cut(text: str, stops: Iterable[str]) -> tuple[str, str | None]:
    """What comes before the stop text that is complete first, and that stop text."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_the_pieces_of_a_text_are_the_whole(seed: int, byte_level: Any, tally: Tally) -> None:
    rng = random.Random(seed)
    text = random_text(rng)
    ids = byte_level.encode(text)
    for skip in (True, False):
        detokenizer = start(byte_level, skip_special_tokens=skip)
        pieces, _ = stream(detokenizer, ids, rng if seed % 2 else None)
        whole = byte_level.decode(ids, skip_special_tokens=skip)
        assert "".join(pieces) == detokenizer.text == whole
        assert whole == (text.replace("<|im_end|>", "") if skip else text)
        tally.count("detokenizer: texts in pieces")
        tally.count("detokenizer: pieces", sum(map(bool, pieces)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_a_text_is_cut_before_the_stop_text_that_is_complete_first(
    seed: int, byte_level: Any, tally: Tally
) -> None:
    """Stop texts from the text itself, which begin and end within tokens as they happen to."""
    rng = random.Random(seed)
    text = random_text(rng).replace("<|im_end|>", "")
    ids = byte_level.encode(text)
    stops = ["never comes"]
    for _ in range(rng.randint(1, 3)):
        begin = rng.randint(0, len(text))
        stops.append(text[begin : begin + rng.randint(1, 6)] or "x")
    rng.shuffle(stops)
    detokenizer = start(byte_level, stop=stops)
    pieces, num_tokens = stream(detokenizer, ids)
    expected, stop = cut(text, stops)
    assert "".join(pieces) == expected
    assert detokenizer.update(PROMPT + ids[:num_tokens], is_final=True) == stop
    before = byte_level.decode(ids[: num_tokens - 1]).rstrip("\ufffd")
    assert stop is None or stop not in before, "it was complete with an earlier token"
    tally.count("detokenizer: texts with stop texts")
    tally.count("detokenizer: pieces", sum(map(bool, pieces)))
    tally.count("detokenizer: stop texts hit", stop is not None)
    if stop is not None:
        begins_within = all(byte_level.decode(ids[:n]) != expected for n in range(num_tokens))
        ends_within = byte_level.decode(ids[:num_tokens]) != expected + stop
        tally.count("detokenizer: stop texts that begin within a token", begins_within)
        tally.count("detokenizer: stop texts that end within a token", ends_within)


def random_ids(rng: random.Random, tokenizer: Any) -> list[int]:
    """Any ids, bytes that are no UTF-8 alone, special ids among bytes, or few different ids."""
    bytes_ = [i for i in range(256) if tokenizer.decode([i]) == "\ufffd"]
    pools = [range(512), bytes_, [*bytes_[:40], 509, 511], rng.sample(bytes_, 3), [510, 511, 3]]
    return rng.choices(list(rng.choice(pools)), k=rng.randint(1, 120))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_the_pieces_of_random_ids_are_the_whole(seed: int, byte_level: Any) -> None:
    rng = random.Random(seed)
    ids = random_ids(rng, byte_level)
    for skip in (True, False):
        pieces, _ = stream(start(byte_level, skip_special_tokens=skip), ids)
        assert "".join(pieces) == byte_level.decode(ids, skip_special_tokens=skip)


def test_a_character_is_held_back_until_its_last_byte(byte_level: Any) -> None:
    ids = byte_level.encode("é😀")
    assert len(ids) == 6
    pieces, _ = stream(start(byte_level), ids)
    assert pieces == ["", "é", "", "", "", "😀"]


def test_what_stays_incomplete_is_given_at_the_end(byte_level: Any) -> None:
    ids = byte_level.encode("a😀")[:-1]
    pieces, _ = stream(start(byte_level), ids)
    assert pieces == ["a", "", "", "\ufffd"]


def test_only_what_may_begin_a_stop_text_is_held_back(byte_level: Any) -> None:
    ids = [byte_level.encode(c)[0] for c in "xaabaabaac!"]
    pieces, num_tokens = stream(start(byte_level, stop="aabaac"), ids)
    # "aabaab": the stop text may still begin at the second "aab", but no more at the first.
    assert pieces == ["x", "", "", "", "", "", "aab", "", "", ""]
    assert num_tokens == len(ids) - 1


def test_what_was_held_back_for_a_stop_text_is_given_at_the_end(byte_level: Any) -> None:
    ids = [byte_level.encode(c)[0] for c in "xab"]
    assert stream(start(byte_level, stop="abc"), ids)[0] == ["x", "", "ab"]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ["three", "two"], ("one ", "two")),
        ("one two three", ["o t", "two"], ("one ", "two")),
        ("one two three", ["two", "e tw", " two"], ("on", "e tw")),
        ("one two three", ["two", "ne two"], ("o", "ne two")),  # complete together: the longer
        ("one two three", ["e"], ("on", "e")),
        ("one two three", ["one two three!"], ("one two three", None)),
        ("one", ["o"], ("", "o")),
    ],
)
@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "at once"])
def test_of_several_stop_texts_the_first_in_the_text_counts(
    text: str, stops: list[str], expected: tuple[str, str | None], at_once: bool, byte_level: Any
) -> None:
    """Wherever tokens begin, and whatever the order in the list."""
    ids = [byte_level.encode(c)[0] for c in text]
    for order in (stops, stops[::-1]):
        detokenizer = start(byte_level, stop=order)
        for end in [len(ids)] if at_once else range(1, len(ids) + 1):
            stop = detokenizer.update(PROMPT + ids[:end], is_final=end == len(ids))
            if stop is not None:
                break
        assert (detokenizer.text, stop) == expected


def test_the_prompt_is_no_part_of_the_text(byte_level: Any) -> None:
    ids = byte_level.encode("a stop text")
    detokenizer = Detokenizer(byte_level, SamplingParams(stop="stop"), len(ids), frozenset())
    assert detokenizer.update([*ids, *byte_level.encode(" text")], is_final=True) is None
    assert detokenizer.text == " text"


def test_the_same_tokens_again_change_nothing(byte_level: Any) -> None:
    ids = byte_level.encode("你好 a stop text")
    detokenizer = start(byte_level, stop="stop")
    for end in range(1, len(ids) + 1):
        is_final = end == len(ids)
        found = [detokenizer.update(PROMPT + ids[:end], is_final) for _ in range(3)]
        assert found == [found[0]] * 3
    assert (detokenizer.text, found[0]) == ("你好 a ", "stop")


def test_many_ids_without_text_may_lie_within_a_character(byte_level: Any) -> None:
    """Ids that only the model has."""
    ids = byte_level.encode("😀")
    ids[-1:-1] = [len(byte_level) + 1] * 50
    pieces, _ = stream(start(byte_level), byte_level.encode("a") + ids)
    assert [piece for piece in pieces if piece] == ["a", "😀"]


class Counting:
    """A tokenizer that notes how many ids it is asked to decode."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.num_decoded: list[int] = []
        self.all_special_ids = tokenizer.all_special_ids

    def decode(self, ids: list[int], **options: bool) -> str:
        self.num_decoded.append(len(ids))
        text: str = self.tokenizer.decode(ids, **options)
        return text


@pytest.mark.parametrize("kind", ["text", "emoji", "no utf-8", "cut short", "special"])
def test_a_token_costs_the_same_however_many_have_come(kind: str, byte_level: Any) -> None:
    continuation, lead = byte_level.encode("é")[1], byte_level.encode("😀")[:3]
    ids = {
        "text": byte_level.encode("the small model " * 100),
        "emoji": byte_level.encode("😀" * 200)[1:],
        "no utf-8": [continuation] * 500,
        "cut short": lead * 200,
        "special": [*lead, *[byte_level.eos_token_id] * 500],
    }[kind]
    counting = Counting(byte_level)
    detokenizer = start(counting)
    counting.num_decoded.clear()
    pieces, _ = stream(detokenizer, ids)
    assert "".join(pieces) == byte_level.decode(ids, skip_special_tokens=True)
    assert max(counting.num_decoded) <= MAX_WINDOW
    assert len(counting.num_decoded) <= 1.2 * len(ids)


def sentence_piece() -> Any:
    """Words that carry the space before them, of which a decoder drops the first one's."""
    from tokenizers import Tokenizer, decoders, models

    words = ["▁the", "▁model", "s", "▁", "!", "▁a", "<end>", "é"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="!"))
    tokenizer.decoder = decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def byte_fallback() -> Any:
    """As Llama 2's: words with the space before them, bytes for what is none, a BOS."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", *"abcdefghijklmnopqrstuvwxyz.,!?'<>|_", "é", "你"]
    vocab = {word: i for i, word in enumerate(words)}
    model = models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_rows_of_bytes_come_as_whole_characters(seed: int, byte_fallback: Any) -> None:
    """Emoji after emoji: there a row's end, unfinished, makes its beginning unreadable."""
    rng = random.Random(seed)
    text = "".join(rng.choice([*ALPHABET, "😀🚀", "世界"]) for _ in range(rng.randint(1, 60)))
    text = text.replace(REPLACEMENT, "")
    ids = byte_fallback.encode(text)
    assert ids[0] == byte_fallback.bos_token_id
    pieces, _ = stream(start(byte_fallback), ids, rng if seed % 2 else None)
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_given_at_last(byte_fallback: Any) -> None:
    """And what follows them is right."""
    first = byte_fallback.encode("a🚀", add_special_tokens=False)
    lone = first[-4:-2]
    rest = byte_fallback.encode("bc d", add_special_tokens=False)[1:]
    pieces, _ = stream(start(byte_fallback), [*first, *lone, *rest])
    assert "".join(pieces).startswith("a🚀")
    assert "".join(pieces).endswith(f"{REPLACEMENT}bc d")
    pieces, _ = stream(start(byte_fallback), [*first, *lone])
    assert "".join(pieces) == f"a🚀{REPLACEMENT * 5}"


@pytest.mark.parametrize(
    "text", ["ภาษาไทย" * 60, "한국어" * 100, "😀" * 150, "ж" * 200, "a😀" * 100 + "界" * 99]
)
def test_a_long_row_of_bytes_costs_the_same_a_token(text: str, byte_fallback: Any) -> None:
    counting = Counting(byte_fallback)
    ids = byte_fallback.encode(text)
    pieces, _ = stream(start(counting), ids)
    assert "".join(pieces) == text
    assert max(counting.num_decoded) <= MAX_WINDOW + 8


def test_bytes_that_are_no_character_cost_the_same_a_token(byte_fallback: Any) -> None:
    counting = Counting(byte_fallback)
    ids = [
        *byte_fallback.encode("a😀"),
        *byte_fallback.encode("ж", add_special_tokens=False)[1:2] * 300,
    ]
    pieces, _ = stream(start(counting), ids)
    assert "".join(pieces).endswith(REPLACEMENT * 200)
    assert max(counting.num_decoded) <= MAX_WINDOW + 8
    assert max(map(len, pieces)) < 20


def word_piece() -> Any:
    from tokenizers import Tokenizer, decoders, models

    words = ["the", "model", "##s", "a", "##!", "<end>", "##é"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.mark.parametrize("make", [sentence_piece, word_piece])
@pytest.mark.parametrize("seed", range(20))
def test_spaces_between_tokens_are_those_of_the_whole(make: Any, seed: int) -> None:
    tokenizer = make()
    ids = random.Random(seed).choices(range(len(tokenizer)), k=80)
    for skip in (True, False):
        pieces, _ = stream(start(tokenizer, skip_special_tokens=skip), ids)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
