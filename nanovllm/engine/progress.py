"""Progress: the bar that `generate` shows."""

from time import perf_counter

from tqdm.auto import tqdm

from nanovllm.engine.sequence import Sequence


class Progress:
    """Prompts done, tokens generated, and the speed of the last prefill and decode step.

    It is drawn anew at tqdm's own interval, also while no prompt comes to its end.

    Args:
        seqs: the requests of the call.
        is_shown: False: nothing is.
    """

    def __init__(self, seqs: list[Sequence], is_shown: bool) -> None:
        self.seqs = seqs
        self.bar = tqdm(total=len(seqs), desc="Generating", disable=not is_shown, miniters=0)
        self._speeds = {"Prefill": "-", "Decode": "-"}
        self._next_s = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._draw()
        self.bar.close()

    def count_step(self, num_tokens: int, seconds: float) -> None:
        """A step took so long; its tokens as `LLMEngine.step` gives them, or 0: only draw."""
        if self.bar.disable:
            return
        if num_tokens:
            kind = "Prefill" if num_tokens > 0 else "Decode"
            self._speeds[kind] = f"{abs(num_tokens) / seconds:.0f}tok/s"
        if perf_counter() >= self._next_s:
            self._draw()

    def count_prompts(self, num_prompts: int) -> None:
        """So many more are done."""
        self.bar.update(num_prompts)

    def _draw(self) -> None:
        if not self.bar.disable:
            self._next_s = perf_counter() + self.bar.mininterval
            tokens = sum(seq.num_known_completion_tokens for seq in self.seqs)
            self.bar.set_postfix(self._speeds | {"Tokens": tokens})
