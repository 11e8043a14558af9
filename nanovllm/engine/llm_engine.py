"""LLMEngine: the request queue and the loop schedule -> run -> postprocess -> decode."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as ListLike
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from tqdm import tqdm

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.inputs import (
    Conversation,
    Prompt,
    as_chat_prompts,
    as_params_list,
    as_prompt_ids,
    as_prompt_list,
    check_params,
)
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.outputs import Launched
from nanovllm.engine.results import StreamedSequence, result
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.tokenizer import find_hidden_ids, find_stop_ids, load_tokenizer
from nanovllm.sampling_params import SamplingParams

# Told of a step with what has just happened to it: see LLMEngine.
Observer = Callable[[str, Batch | None], object]


class LLMEngine:
    """Generates text for many requests at a time. Use it from one thread at a time.

    Functions in the list `observers` are called as the steps go on: with "begin" and None, with
    "scheduled" and "launched" and the new step, or None if there is nothing to compute, and with
    "read" and "processed" and the step whose ids have come, which where steps overlap is the one
    before. They may look at it, and change nothing.

    Args:
        model: a local directory with config.json, safetensors and, for text prompts, a tokenizer;
            or a Hub repo id.
        **options: those of nanovllm.config.Config.

    Raises:
        TypeError, ValueError: an unknown option, or whatever Config and ModelRunner refuse.
    """

    def __init__(self, model: str, **options: Any) -> None:
        config = Config.from_options(model, options)
        self.config = config
        with ThreadPoolExecutor(1) as pool:  # beside the model: importing it takes seconds
            tokenizer = pool.submit(load_tokenizer, config)
            self.model_runner: ModelRunner | None = ModelRunner(config)
        try:
            self.tokenizer = tokenizer.result()
            self.stop_ids = find_stop_ids(config, self.tokenizer)
        except (TypeError, ValueError):
            self.model_runner.free()
            raise
        self._hidden_ids = find_hidden_ids(self.tokenizer)
        self.scheduler = Scheduler(
            config,
            BlockManager(self.model_runner.num_blocks, config.kvcache_block_size),
            self.stop_ids,
        )
        self.observers: list[Observer] = []
        self._requests: dict[int, Sequence] = {}  # under way
        self._finished: list[Sequence] = []  # not reported yet
        self._in_flight: Launched | None = None  # a step whose ids have not been read
        self._is_consistent = True  # False while the queues and blocks are being changed
        self._is_changing = False  # likewise, but true no more once the change has broken off
        self._dropped: set[int] = set()  # requests of streams that were dropped within a change

    def __enter__(self) -> "LLMEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.exit()

    def exit(self) -> None:
        """Drop all requests and give the memory back. The engine cannot be used afterwards."""
        self._requests.clear()
        self._finished.clear()
        self._in_flight = None
        self._is_consistent = True
        if self.model_runner is not None:
            self.model_runner.free()
            self.model_runner = None

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue a prompt, text or token ids, and return the request's id.

        Raises:
            TypeError, ValueError: a bad prompt or parameter; nothing is queued.
            RuntimeError: the engine was shut down.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        seq = self._make_sequence(prompt, params)
        self._enqueue(seq)
        return seq.seq_id

    def abort_request(self, seq_id: int) -> None:
        """End a request in any state and free its blocks; an unknown id is ignored.

        Raises:
            TypeError: `seq_id` is no int.
            RuntimeError: the engine was shut down.
        """
        self._runner()
        if not isinstance(seq_id, int):
            raise TypeError(f"seq_id must be an int, got {seq_id!r:.80}")
        self._abort({seq_id})

    def is_finished(self) -> bool:
        """True when nothing is under way and every result has been given out."""
        return not self._requests and not self._finished and self._in_flight is None

    def step(self) -> tuple[list[tuple[int, list[int]]], int]:
        """Compute one step.

        Returns:
            (seq_id, completion token ids) of each request that has finished, and the number of
            tokens of the step that was read: positive for a prefill, negative for a decode. 0 if
            none was: there was nothing to do, or, where steps overlap, the first is only under way.
            Loop on `is_finished`, not on this.
        """
        num_tokens = self._step()
        outputs = [(seq.seq_id, seq.completion_token_ids) for seq in self._finished]
        self._finished = []  # only now, so that an interruption loses no result
        return outputs, num_tokens

    def generate(
        self,
        prompts: Prompt | ListLike[Prompt],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Complete prompts.

        Args:
            prompts: texts, lists of token ids, or one prompt of either kind.
            sampling_params: one for all prompts, or one for each.
            use_tqdm: show the prompts done and the prefill and decode speed.

        Returns:
            For each prompt, in order:
            "text": up to the stop text, if one ended it;
            "token_ids": the stop id, or the token that completed the stop text, included;
            "finish_reason": "stop" or "length";
            "stop_reason": the stop text, or the id of `stop_token_ids`, that ended it, else None;
            "prompt_token_ids";
            "num_cached_tokens": tokens of the prompt found in the prefix cache;
            "logprobs", where asked for: for each token a dict from id to log-probability, its own
            first, then the likeliest.

        Raises:
            TypeError, ValueError: a bad prompt or parameter, lists of different lengths; nothing is
                queued.
            RuntimeError: the engine was shut down.
        """
        seqs = self._make_sequences(prompts, sampling_params)
        try:
            for seq in seqs:
                self._enqueue(seq)
            self._run_until_finished(seqs, use_tqdm)
        except BaseException:
            self._abort({seq.seq_id for seq in seqs})
            raise
        return [result(seq, self.tokenizer) for seq in seqs]

    def chat(
        self,
        messages: Conversation | ListLike[Conversation],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[dict[str, Any]]:
        """Complete conversations, each written out by the tokenizer's chat template.

        Args:
            messages: dicts with "role" and "content", or a list of such conversations.
            sampling_params: one for all conversations, or one for each.
            use_tqdm: as in `generate`.
            **template_options: given to the template: add_generation_prompt (True unless given),
                enable_thinking, tools, chat_template and what else it knows.

        Returns:
            What `generate` gives.

        Raises:
            TypeError, ValueError: no tokenizer, no chat template, a malformed conversation, or what
                `generate` refuses; nothing is queued.
            RuntimeError: the engine was shut down.
        """
        self._runner()
        prompts = as_chat_prompts(messages, self.config, self.tokenizer, template_options)
        return self.generate(prompts, sampling_params, use_tqdm)

    def stream(
        self,
        prompts: Prompt | ListLike[Prompt],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Complete prompts, giving the tokens as they come.

        Nothing is queued before the first result is asked for. When the iterator is closed, dropped
        or left by an exception, its requests are aborted. In between, the engine may be used for
        anything else.

        Args:
            prompts: as in `generate`.
            sampling_params: as in `generate`.

        Returns:
            An iterator of dicts: "index" of the prompt, "text" and "token_ids" that are new,
            "finish_reason" and "stop_reason" (None but in a prompt's last dict), and "logprobs" of
            the new tokens where asked for. Joined, they are what `generate` gives. Text that may
            yet become another character, or part of a stop text, comes later than its tokens.

        Raises:
            TypeError, ValueError, RuntimeError: at the call, what `generate` raises.
        """
        return self._stream(self._make_sequences(prompts, sampling_params, is_streamed=True))

    def stats(self) -> dict[str, int | float]:
        """What the engine holds now, and counts since it was made.

        Returns:
            "num_waiting" and "num_running" requests, "num_free_blocks" and "num_used_blocks" of the
            KV pool; and so far: "num_prompt_tokens" whose prefill began, "prefix_hit_rate" (the
            share of them found in the prefix cache, 0 to 1), "num_generated_tokens",
            "num_preemptions".

        Raises:
            RuntimeError: the engine was shut down.
        """
        self._runner()
        scheduler = self.scheduler
        return {
            "num_waiting": len(scheduler.waiting),
            "num_running": len(scheduler.running),
            "num_free_blocks": scheduler.block_manager.num_free_blocks,
            "num_used_blocks": scheduler.block_manager.num_used_blocks,
            "prefix_hit_rate": scheduler.num_cached_tokens / max(1, scheduler.num_prompt_tokens),
            "num_preemptions": scheduler.num_preemptions,
            "num_prompt_tokens": scheduler.num_prompt_tokens,
            "num_generated_tokens": scheduler.num_generated_tokens,
        }

    def _run_until_finished(self, seqs: list[Sequence], use_tqdm: bool) -> None:
        """Step until all of `seqs` are finished; what else finishes is left to be reported."""
        own = {seq.seq_id for seq in seqs}
        speeds = {"Prefill": "-", "Decode": "-"}
        with tqdm(total=len(seqs), desc="Generating", disable=not use_tqdm) as progress:
            while own:
                started = perf_counter()
                num_tokens = self._step()
                if use_tqdm and num_tokens:
                    speed = abs(num_tokens) / (perf_counter() - started)
                    speeds["Prefill" if num_tokens > 0 else "Decode"] = f"{speed:.0f}tok/s"
                    progress.set_postfix(speeds, refresh=False)
                if self._finished:
                    done = own.intersection(seq.seq_id for seq in self._finished)
                    self._finished = [seq for seq in self._finished if seq.seq_id not in done]
                    own -= done
                    progress.update(len(done))

    def _stream(self, seqs: list[Sequence]) -> Iterator[dict[str, Any]]:
        """Queue sequences, step until they are finished, and give what is new after each step."""
        try:
            for seq in seqs:
                self._enqueue(seq)
            streams = [StreamedSequence(index, seq) for index, seq in enumerate(seqs)]
            while streams:
                for stream in streams:
                    if stream.has_news:
                        yield stream.take_news()
                # While the caller held a result, any of them may have come to its end.
                streams = [stream for stream in streams if not stream.is_told_the_end]
                if streams:
                    self._step()
                streams = [s for s in streams if s.has_news or s.seq.seq_id in self._requests]
        finally:
            self._drop({seq.seq_id for seq in seqs})

    def _drop(self, seq_ids: set[int]) -> None:
        """Abort requests now, or if that cannot be, with the next step.

        The garbage collector may close a forgotten stream in the middle of a step.
        """
        if self._is_changing:
            self._dropped |= seq_ids
        else:
            self._abort(seq_ids)

    def _step(self) -> int:
        """One turn of the loop; gives its tokens as `step` does, and adds to `_finished`."""
        runner = self._runner()
        if dropped := set(self._dropped):
            self._abort(dropped)
            self._dropped -= dropped  # only now, so that an interruption forgets none
        if not self._is_consistent:
            self._recover()
        with self._changing():
            step = self._launch_ahead(runner) if runner.runs_ahead else self._launch(runner)
            if step is None:
                return 0
            token_ids, logprobs = step.token_ids(), step.logprobs()
            self._tell("read", step.batch)
            finished = self.scheduler.postprocess(step.batch, token_ids, logprobs)
            self._tell("processed", step.batch)
            self._finished.extend(seq for seq in finished if not seq.is_streamed)
            for seq in finished:
                del self._requests[seq.seq_id]
            self._drop_idle_step()
        return step.batch.num_tokens if step.batch.is_prefill else -step.batch.num_tokens

    def _launch(self, runner: ModelRunner, in_flight: bool = False) -> Launched | None:
        """Launch the next step."""
        self._tell("begin", None)
        batch = self.scheduler.schedule(in_flight)
        self._tell("scheduled", batch)
        launched = runner.launch(batch) if batch else None
        self._tell("launched", batch)
        return launched

    def _launch_ahead(self, runner: ModelRunner) -> Launched | None:
        """Launch the next step while the one before still runs, and give that one."""
        previous = self._in_flight
        self._in_flight = self._launch(runner, in_flight=previous is not None)
        return previous

    def _tell(self, event: str, batch: Batch | None) -> None:
        for observer in self.observers:
            observer(event, batch)

    def _abort(self, seq_ids: set[int]) -> None:
        """Forget requests, whatever state they are in."""
        was_consistent = self._is_consistent
        with self._changing():
            seqs = [self._requests[seq_id] for seq_id in seq_ids if seq_id in self._requests]
            self._requests = {i: seq for i, seq in self._requests.items() if i not in seq_ids}
            self._finished = [seq for seq in self._finished if seq.seq_id not in seq_ids]
            for seq in seqs if was_consistent else ():
                self.scheduler.abort(seq)
            self._drop_idle_step()
        if not was_consistent:
            self._recover()

    def _drop_idle_step(self) -> None:
        """Forget a step in flight if all that it computes is for requests that have ended."""
        if not self._requests:
            self._in_flight = None

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around every change of queues and blocks: an exception within makes `_recover` due.

        Where it was due already, it stays so.
        """
        was_consistent, self._is_consistent = self._is_consistent, False
        self._is_changing = True
        try:
            yield
            self._is_consistent = was_consistent
        finally:
            self._is_changing = False

    def _recover(self) -> None:
        """After a change that broke off halfway: start anew from the requests and their tokens."""
        with self._changing():
            self._in_flight = None
            self._runner().synchronize()
            reported = {seq.seq_id for seq in self._finished}
            seqs = [seq for seq_id, seq in self._requests.items() if seq_id not in reported]
            ended = self.scheduler.start_over(seqs)
            self._finished.extend(seq for seq in ended if not seq.is_streamed)
            self._requests = {seq.seq_id: seq for seq in seqs if seq.finish_reason is None}
        self._is_consistent = True

    def _runner(self) -> ModelRunner:
        if self.model_runner is None:
            raise RuntimeError("this engine was shut down by exit(); make a new one")
        return self.model_runner

    def _make_sequences(
        self,
        prompts: Prompt | ListLike[Prompt],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None,
        is_streamed: bool = False,
    ) -> list[Sequence]:
        """Check prompts and their parameters, and make the requests. Nothing is queued."""
        self._runner()
        prompts = as_prompt_list(prompts)
        params = as_params_list(sampling_params, len(prompts))
        pairs = zip(prompts, params, strict=True)
        return [self._make_sequence(*pair, is_streamed) for pair in pairs]

    def _make_sequence(
        self, prompt: Prompt, params: SamplingParams, is_streamed: bool = False
    ) -> Sequence:
        runner = self._runner()
        check_params(params, self.config, self.tokenizer)
        token_ids = as_prompt_ids(prompt, self.config, self.tokenizer)
        seed = runner.new_seed() if params.seed is None else params.seed
        seq = Sequence(token_ids, params, self.config.max_model_len, seed)
        seq.is_streamed = is_streamed
        if params.stop or (is_streamed and self.tokenizer is not None):
            seq.detokenizer = Detokenizer(
                self.tokenizer, params, seq.num_prompt_tokens, self._hidden_ids
            )
        return seq

    def _enqueue(self, seq: Sequence) -> None:
        with self._changing():
            self._requests[seq.seq_id] = seq
            self.scheduler.add(seq)
