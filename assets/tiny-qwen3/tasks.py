"""The tasks that tiny-qwen3 is trained on: prompts with exactly one right answer.

Pure Python, so that training, the tests and an evaluation through any engine draw the same
instances. A few prompts are learned by heart (MEMORISED). In the FAMILIES about one prompt in
five is held out of training, chosen by a hash of the prompt.

    held_out("add", 100)    ->  [Sample(prompt="what is 45 + 86?", answer="131"), ...]
"""

import random
import zlib
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Sample(NamedTuple):
    """One user turn and the one right answer."""

    prompt: str
    answer: str


class Family(NamedTuple):
    """A kind of task: how to draw an instance, and how often relative to the other families."""

    draw: Callable[[random.Random], Sample]
    weight: float


INTRODUCTION = (
    "I am tiny-qwen3, a very small language model that runs on nano-vLLM. "
    "I can list primes, count, add, sort and spell, and I know nothing else."
)
LARGEST_PRIME_LIMIT = 200
INTRODUCTION_PROMPTS = (
    "introduce yourself",
    "please introduce yourself",
    "who are you?",
    "what can you do?",
)


def joined(items: Iterable[object]) -> str:
    """Items as every list in an answer is written: `2, 3, 5`."""
    return ", ".join(map(str, items))


def numbers(rng: random.Random) -> list[int]:
    """Three to five different numbers of one or two digits."""
    return rng.sample(range(100), rng.randint(3, 5))


def word(rng: random.Random) -> str:
    """A made-up word of two to four syllables, such as `tomavek`."""
    syllables = [
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4))
    ]
    return "".join(syllables) + rng.choice(["", "", "n", "r", "s", "t", "l", "k"])


def primes_between(low: int, high: int) -> list[int]:
    """The primes p with low <= p <= high."""
    candidates = range(max(low, 2), high + 1)
    return [n for n in candidates if all(n % d for d in range(2, int(n**0.5) + 1))]


def introduce(rng: random.Random) -> Sample:
    return Sample(rng.choice(INTRODUCTION_PROMPTS), INTRODUCTION)


def primes_within(limit: int) -> Sample:
    return Sample(f"list all prime numbers within {limit}", joined(primes_between(2, limit)))


def some_primes_within(rng: random.Random) -> Sample:
    return primes_within(100 if rng.random() < 0.1 else rng.randint(2, LARGEST_PRIME_LIMIT))


def primes(rng: random.Random) -> Sample:
    found: list[int] = []
    while not found:
        low, high = sorted(rng.sample(range(LARGEST_PRIME_LIMIT + 1), 2))
        found = primes_between(low, high)
    return Sample(f"list all prime numbers from {low} to {high}", joined(found))


def add(rng: random.Random) -> Sample:
    a, b = rng.randrange(100), rng.randrange(100)
    return Sample(f"what is {a} + {b}?", str(a + b))


def subtract(rng: random.Random) -> Sample:
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    return Sample(f"what is {a} - {b}?", str(a - b))


def sort(rng: random.Random) -> Sample:
    items = numbers(rng)
    return Sample(f"sort {joined(items)}", joined(sorted(items)))


def reverse(rng: random.Random) -> Sample:
    items = numbers(rng)
    return Sample(f"reverse {joined(items)}", joined(reversed(items)))


def largest(rng: random.Random) -> Sample:
    items = numbers(rng)
    return Sample(f"which is the largest of {joined(items)}?", str(max(items)))


def smallest(rng: random.Random) -> Sample:
    items = numbers(rng)
    return Sample(f"which is the smallest of {joined(items)}?", str(min(items)))


def count_up(rng: random.Random) -> Sample:
    start = rng.randrange(150)
    end = start + rng.randint(1, 60)
    return Sample(f"count from {start} to {end}", joined(range(start, end + 1)))


def count_down(rng: random.Random) -> Sample:
    end = rng.randrange(150)
    start = end + rng.randint(1, 60)
    return Sample(f"count down from {start} to {end}", joined(range(start, end - 1, -1)))


def count_by(rng: random.Random) -> Sample:
    step, start = rng.randint(2, 9), rng.randrange(100)
    end = start + step * rng.randint(2, 20)
    return Sample(f"count by {step} from {start} to {end}", joined(range(start, end + 1, step)))


def letters(rng: random.Random) -> Sample:
    first, last = sorted(rng.sample("abcdefghijklmnopqrstuvwxyz", 2))
    answer = joined(map(chr, range(ord(first), ord(last) + 1)))
    return Sample(f"list the letters from {first} to {last}", answer)


def spell(rng: random.Random) -> Sample:
    text = word(rng)
    return Sample(f"spell {text}", "-".join(text))


def repeat(rng: random.Random) -> Sample:
    phrase = " ".join(word(rng) for _ in range(rng.randint(1, 2)))
    times = rng.randint(2, 9)
    return Sample(f"repeat {phrase} {times} times", " ".join([phrase] * times))


# Families with short answers are drawn more often: the loss counts tokens, not answers.
FAMILIES = {
    "primes": Family(primes, 3),
    "add": Family(add, 8),
    "subtract": Family(subtract, 6),
    "sort": Family(sort, 5),
    "reverse": Family(reverse, 2),
    "largest": Family(largest, 3),
    "smallest": Family(smallest, 3),
    "count_up": Family(count_up, 1),
    "count_down": Family(count_down, 1),
    "count_by": Family(count_by, 2),
    "letters": Family(letters, 1),
    "spell": Family(spell, 3),
    "repeat": Family(repeat, 2),
}
TRAINING_FAMILIES = [*FAMILIES.values(), Family(introduce, 1), Family(some_primes_within, 2)]
TRAINING_WEIGHTS = [family.weight for family in TRAINING_FAMILIES]


def vary(rng: random.Random, prompt: str) -> str:
    """The prompt as it is, capitalised, or as a capitalised sentence with its final mark."""
    if rng.random() < 0.6:
        return prompt
    prompt = prompt[0].upper() + prompt[1:]
    if rng.random() < 0.5:
        return prompt
    return prompt[:-1] if prompt.endswith("?") else prompt + "."


def normalised(prompt: str) -> str:
    """What all variants of a prompt have in common."""
    return prompt.lower().rstrip(".?!")


MEMORISED = [Sample(prompt, INTRODUCTION) for prompt in INTRODUCTION_PROMPTS]
MEMORISED += [primes_within(limit) for limit in range(2, LARGEST_PRIME_LIMIT + 1)]
MEMORISED_KEYS = {normalised(sample.prompt) for sample in MEMORISED}
# The prompts of example.py with their answers.
EXAMPLES = [Sample("introduce yourself", INTRODUCTION), primes_within(100)]


def is_held_out(prompt: str) -> bool:
    """Whether this prompt, in all its variants, is kept out of training."""
    key = normalised(prompt)
    return key not in MEMORISED_KEYS and zlib.crc32(key.encode()) % 5 == 0


def training_sample(rng: random.Random) -> Sample:
    """One sample for training, never a held-out one."""
    family = rng.choices(TRAINING_FAMILIES, TRAINING_WEIGHTS)[0]
    while True:
        prompt, answer = family.draw(rng)
        if not is_held_out(prompt):
            return Sample(vary(rng, prompt), answer)


def held_out(family: str, count: int = 100, seed: int = 0) -> list[Sample]:
    """`count` different held-out samples of a family; the same ones for the same seed.

    Fewer where the family has fewer (`letters` has about 200).
    Raises ValueError for an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; there are {', '.join(FAMILIES)}")
    rng = random.Random(f"{family} {seed}")
    samples: dict[str, Sample] = {}
    for _ in range(1000 * count):
        if len(samples) == count:
            break
        prompt, answer = FAMILIES[family].draw(rng)
        if is_held_out(prompt):
            prompt = vary(rng, prompt)
            samples[prompt] = Sample(prompt, answer)
    return list(samples.values())
