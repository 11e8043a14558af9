"""LLMEngine: the request queue and the loop schedule -> run -> postprocess -> decode."""

import os
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from operator import index
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NoReturn, Unpack, cast
from weakref import WeakMethod

from nanovllm.config import Config, Options
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
    for_each,
    is_chat,
)
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.outputs import Launched
from nanovllm.engine.parallel_runner import make_runner
from nanovllm.engine.progress import Progress
from nanovllm.engine.results import Result, Stream, result
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.tokenizer import find_hidden_ids, find_stop_ids, load_tokenizer
from nanovllm.engine.turns import Turns, always, never
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.loader import resolve_model_dir

# Told of a step with what has just happened to it: see LLMEngine.
Event = Literal["begin", "scheduled", "launched", "read", "processed"]
Observer = Callable[[Event, Batch | None], object]


class LLMEngine:
    """Generates text for many requests at a time, for any number of threads.

    The requests of all threads share the steps: whoever has the turn (see Turns) steps for all.
    From a signal handler or a finaliser that interrupts its own thread's step, what only changes
    the queue (add_request, abort_request, closing a stream, exit) is noted and done when the step
    ends; what would itself have to step raises RuntimeError.

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

    def __init__(self, model: str | Path, **options: Unpack[Options]) -> None:
        config = Config.from_options(model, options)
        self.config = config
        with ThreadPoolExecutor(1) as pool:  # beside the model: importing it takes seconds
            tokenizer = pool.submit(load_tokenizer, config)
            self.model_runner: ModelRunner | None = make_runner(config)
        try:
            self._tokenizer = tokenizer.result()
            self.stop_ids = find_stop_ids(config, self._tokenizer)
        except (TypeError, ValueError):
            self.model_runner.free()
            raise
        self._users_tokenizer: Any | None = None
        self._hidden_ids = find_hidden_ids(self._tokenizer)
        self.scheduler = Scheduler(
            config,
            BlockManager(self.model_runner.num_blocks, config.kvcache_block_size),
            self.stop_ids,
        )
        self.observers: list[Observer] = []
        self._requests: dict[int, Sequence] = {}  # under way
        self._finished: list[Sequence] = []  # not reported yet
        self._in_flight: Launched | None = None  # a step whose ids have not been read
        self._are_weights_whole = True
        # Weak, so that an engine that is dropped is freed at once.
        self._turns = Turns(WeakMethod(self._recover), WeakMethod(self._count))
        self._count()
        self._pid = os.getpid()

    @property
    def tokenizer(self) -> Any | None:
        """The model's `transformers` tokenizer, None without one; its chat template is `chat`'s.

        It is a copy of the one that requests are encoded with: a tokenizer keeps truncation and
        padding as a state of its own, which one thread may change while another has text encoded.
        """
        if self._users_tokenizer is None:
            self._users_tokenizer = deepcopy(self._tokenizer)
        return self._users_tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._users_tokenizer, self._tokenizer = tokenizer, deepcopy(tokenizer)

    def __enter__(self) -> "LLMEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.exit()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an engine cannot be pickled or copied: make one where it is needed")

    def exit(self) -> None:
        """Drop all requests and give the memory back. The engine cannot be used afterwards."""
        if self._pid != os.getpid():  # the memory is the parent's
            self.model_runner = None
        if self.model_runner is not None:
            self._turns.note(self._shut_down)

    def _shut_down(self) -> None:
        self._requests, self._finished, self._in_flight = {}, [], None
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
        self._draw_seed(seq)
        try:
            self._enqueue([seq])
        except BaseException:
            self._abort({seq.seq_id})
            raise
        return seq.seq_id

    def abort_request(self, seq_id: int) -> None:
        """End a request in any state and free its blocks; an unknown id is ignored.

        Raises:
            TypeError: `seq_id` is no int.
            RuntimeError: the engine was shut down.
        """
        self._runner()
        if isinstance(seq_id, bool) or not hasattr(seq_id, "__index__"):
            raise TypeError(f"seq_id must be an int, got {seq_id!r:.80}")
        self._abort({index(seq_id)})

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

        Raises:
            RuntimeError: the engine was shut down.
            Exception: the tokenizer's, of a request whose stop texts were looked for: it is gone.
        """
        finished: list[Sequence] = []
        num_tokens = 0

        def step() -> None:
            nonlocal finished, num_tokens
            num_tokens = self._step()
            finished, self._finished = self._finished, []

        try:
            self._take_turn(step)
            for index, seq in enumerate(finished):
                if seq.error is not None:
                    del finished[index]
                    seq.raise_error()
            outputs = [(seq.seq_id, seq.completion_token_ids) for seq in finished]
        except BaseException:
            self._finished = finished + self._finished  # so that an interruption loses no result
            raise
        return outputs, num_tokens

    def generate(
        self,
        prompts: Prompt | ListLike[Prompt],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[Result]:
        """Complete prompts.

        Args:
            prompts: texts, lists of token ids, or one prompt of either kind.
            sampling_params: one for all prompts, or one for each.
            use_tqdm: show the prompts done, the tokens, and the prefill and decode speed.

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
        self._refuse_nested_steps()
        seqs = self._make_sequences(prompts, sampling_params)
        try:
            self._enqueue(seqs)
            self._run_until_finished(seqs, use_tqdm)
        except BaseException:
            self._abort({seq.seq_id for seq in seqs})
            raise
        return [result(seq, self._tokenizer) for seq in seqs]

    def chat(
        self,
        messages: Conversation | ListLike[Conversation],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[Result]:
        """Complete conversations, each written out by the tokenizer's chat template.

        Args:
            messages: dicts with "role" and "content", or a list of such conversations.
            sampling_params: one for all conversations, or one for each.
            use_tqdm: as in `generate`.
            **template_options: given to the template: add_generation_prompt (True unless given),
                enable_thinking, tools, chat_template and what else it uses.

        Returns:
            What `generate` gives.

        Raises:
            TypeError, ValueError: no tokenizer, no chat template, an option that it does not use, a
                malformed conversation, or what `generate` refuses; nothing is queued.
            RuntimeError: the engine was shut down.
        """
        self._refuse_nested_steps()
        prompts = self._chat_prompts(messages, template_options)
        return self.generate(prompts, sampling_params, use_tqdm)

    def stream(
        self,
        prompts: Prompt | ListLike[Prompt] | Conversation | ListLike[Conversation],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None = None,
        **template_options: Any,
    ) -> Stream:
        """Complete prompts or conversations, giving the tokens as they come.

        Nothing is queued before the first result is asked for. When the iterator is closed, dropped
        or left by an exception, its requests are aborted. In between, the engine may be used for
        anything else.

        Args:
            prompts: as in `generate`, or the messages of `chat`.
            sampling_params: as in `generate`.
            **template_options: as in `chat`, for conversations.

        Returns:
            An iterator of dicts: "index" of the prompt, "text" and "token_ids" that are new,
            "finish_reason" and "stop_reason" (None but in a prompt's last dict), and "logprobs" of
            the new tokens where asked for. Joined, they are what `generate` gives. Text that may
            yet become another character, or part of a stop text, comes later than its tokens.

        Raises:
            TypeError, ValueError, RuntimeError: at the call, what `generate` raises.
        """
        self._runner()
        if is_chat(prompts):
            prompts = self._chat_prompts(cast(Conversation, prompts), template_options)
        elif template_options:
            raise TypeError(f"only conversations take {', '.join(template_options)}")
        prompts = cast(ListLike[Prompt], prompts)
        return Stream(self, self._make_sequences(prompts, sampling_params, is_streamed=True))

    def stats(self) -> dict[str, int | float]:
        """What the engine holds now, and counts since it was made.

        Returns:
            "num_waiting" and "num_running" requests, "num_free_blocks" and "num_used_blocks" of the
            KV pool; and so far: "num_prompt_tokens" whose prefill began, "prefix_hit_rate" (the
            share of them found in the prefix cache, 0 to 1), "num_generated_tokens",
            "num_preemptions". From within a step: as of the step before.

        Raises:
            RuntimeError: the engine was shut down.
        """
        self._runner()
        return dict(self._stats)

    def _count(self) -> None:
        """After each change: what `stats` gives, in the middle of the next one too."""
        scheduler = self.scheduler
        self._stats = {
            "num_waiting": len(scheduler.waiting),
            "num_running": len(scheduler.running),
            "num_free_blocks": scheduler.block_manager.num_free_blocks,
            "num_used_blocks": scheduler.block_manager.num_used_blocks,
            "prefix_hit_rate": scheduler.num_cached_tokens / max(1, scheduler.num_prompt_tokens),
            "num_preemptions": scheduler.num_preemptions,
            "num_prompt_tokens": scheduler.num_prompt_tokens,
            "num_generated_tokens": scheduler.num_generated_tokens,
        }

    def reset_prefix_cache(self) -> None:
        """Forget the K/V of all prompts so far; requests under way keep theirs.

        Raises:
            RuntimeError: the engine was shut down, or this thread has interrupted a step.
        """
        self._take_turn(lambda: self._turns.change(self._forget_prefixes))

    def load_weights(self, model: str | Path) -> None:
        """Fill the model from another checkpoint of the same shape, and forget every prefix.

        Names and shapes are checked before anything is changed. If it fails halfway for all that,
        the engine refuses to generate until a load succeeds.

        Args:
            model: a local directory, or a Hub repo id.

        Raises:
            TypeError, ValueError: no checkpoint, or one of another shape.
            RuntimeError: requests are under way, the engine was shut down, or this thread has
                interrupted a step.
        """
        self._refuse_nested_steps()
        model_dir = resolve_model_dir(model)
        other = self.config.read_model_config(model_dir)
        if found := self.config.model_config.differences(other):
            raise ValueError(f"{model_dir} does not fit the model: {', '.join(found)}")

        def load() -> None:
            self._runner().check_weights(model_dir)
            self._are_weights_whole = False
            self._runner().load_weights(model_dir)
            self._forget_prefixes()
            self._are_weights_whole = True

        def work() -> None:
            if self._requests:
                raise RuntimeError(
                    f"load_weights: {len(self._requests)} requests are under way, whose K/V is of "
                    "the old weights; let them end or abort them first"
                )
            self._turns.change(load)

        self._take_turn(work)

    def _forget_prefixes(self) -> None:
        self.scheduler.block_manager.forget_prefixes()

    def _run_until_finished(self, seqs: list[Sequence], use_tqdm: bool) -> None:
        """Step, or have another thread step, until all of `seqs` have ended."""
        own = {seq.seq_id for seq in seqs}
        with Progress(seqs, use_tqdm) as progress:
            while own:
                self._step_until(partial(self._has_ended_one_of, own), progress.count_step)
                left = own & self._requests.keys()
                progress.count_prompts(len(own) - len(left))
                own = left

    def _has_ended_one_of(self, seq_ids: set[int]) -> bool:
        return not self._requests.keys() >= seq_ids

    def _step_until(
        self,
        has_news: Callable[[], bool],
        show: Callable[[int, float], None] = lambda num_tokens, seconds: None,
    ) -> None:
        """Step until there is news for the caller, unless another thread's steps bring it.

        Args:
            has_news: true once the caller has something to do.
            show: told of each step that this thread makes, its tokens as `step` gives them and
                its seconds; and now and then, of no tokens, while another thread steps.
        """

        def steps() -> None:
            while self._requests and not has_news():
                started = perf_counter()
                num_tokens = self._step()
                show(num_tokens, perf_counter() - started)

        self._take_turn(steps, has_news, lambda: show(0, 0))
        self._runner()

    def _take_turn(
        self,
        work: Callable[[], None],
        has_news: Callable[[], bool] = never,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """Do some work in this thread's turn, unless there is news before: see Turns.take."""
        self._refuse_nested_steps()
        self._turns.take(work, has_news, while_waiting)

    def _refuse_nested_steps(self) -> None:
        """Raise RuntimeError if this thread has interrupted a step of its own."""
        self._runner()
        if self._turns.is_inside():
            raise RuntimeError(
                "a signal handler or finaliser that interrupts a step of its own thread can add "
                "and abort requests, close streams and shut the engine down, but not step itself"
            )

    def _is_under_way(self, seq: Sequence) -> bool:
        return seq.seq_id in self._requests

    def _step(self) -> int:
        """One turn of the loop; gives its tokens as `step` does, and adds to `_finished`."""
        return self._turns.change(self._advance)

    def _advance(self) -> int:
        runner = self._ready_runner()
        step = self._launch_ahead(runner) if runner.runs_ahead else self._launch(runner)
        if step is None:
            return 0
        token_ids, logprobs = step.token_ids(), step.logprobs()
        self._tell("read", step.batch)
        finished = self.scheduler.postprocess(step.batch, token_ids, logprobs)
        self._tell("processed", step.batch)
        for item in step.batch.items:
            if item.seq.is_streamed:
                item.seq.publish()
        self._finished.extend(seq for seq in finished if not seq.is_awaited)
        for seq in finished:
            del self._requests[seq.seq_id]
        self._drop_idle_step()
        return step.batch.num_tokens if step.batch.is_prefill else -step.batch.num_tokens

    def _drop_idle_step(self) -> None:
        """Forget a step in flight if all that it computes is for requests that have ended."""
        if not self._requests:
            self._in_flight = None

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

    def _tell(self, event: Event, batch: Batch | None) -> None:
        for observer in tuple(self.observers):
            observer(event, batch)

    def _enqueue(self, seqs: list[Sequence], is_wanted: Callable[[], bool] = always) -> None:
        """Queue requests, unless by the time that it can be done they are not wanted any more."""

        def enqueue() -> None:
            for seq in seqs if is_wanted() else ():
                if seq.seq_id not in self._requests:
                    self._requests[seq.seq_id] = seq
                    self.scheduler.add(seq)

        self._turns.note(enqueue)

    def _abort(self, seq_ids: set[int], waits: bool = True) -> None:
        """Forget requests, whatever state they are in; waits: see Turns.note."""

        def abort() -> None:
            seqs = [self._requests[seq_id] for seq_id in seq_ids if seq_id in self._requests]
            self._finished = [seq for seq in self._finished if seq.seq_id not in seq_ids]
            self._requests = {i: seq for i, seq in self._requests.items() if i not in seq_ids}
            for seq in seqs:
                self.scheduler.abort(seq)
            self._drop_idle_step()

        self._turns.note(abort, waits)

    def _recover(self) -> None:
        """After a change that broke off halfway: start anew from the requests and their tokens."""
        if self.model_runner is None:
            return
        self._in_flight = None
        self.model_runner.synchronize()
        reported = {seq.seq_id for seq in self._finished}
        seqs = [seq for seq_id, seq in self._requests.items() if seq_id not in reported]
        ended = self.scheduler.start_over(seqs)
        for seq in seqs:
            seq.publish()
        self._finished.extend(seq for seq in ended if not seq.is_awaited)
        self._requests = {seq.seq_id: seq for seq in seqs if seq.finish_reason is None}

    def _runner(self) -> ModelRunner:
        if self._pid != os.getpid():
            raise RuntimeError(
                "this engine belongs to the process that forked: make one in a process that is "
                "spawned, since PyTorch's threads are not there in one that is forked"
            )
        if self.model_runner is None:
            raise RuntimeError("this engine was shut down by exit(); make a new one")
        return self.model_runner

    def _ready_runner(self) -> ModelRunner:
        if not self._are_weights_whole:
            raise RuntimeError(
                "the last load_weights failed: load a checkpoint that is whole first"
            )
        return self._runner()

    def _chat_prompts(
        self, messages: Conversation | ListLike[Conversation], options: dict[str, Any]
    ) -> list[list[int]]:
        template = self._users_tokenizer or self._tokenizer  # whichever a user can have changed
        return as_chat_prompts(messages, self.config, template, self._tokenizer, options)

    def _make_sequences(
        self,
        prompts: Prompt | ListLike[Prompt],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None,
        is_streamed: bool = False,
    ) -> list[Sequence]:
        """Check prompts and their parameters, and make the requests of a call that awaits them."""
        self._runner()
        prompts = as_prompt_list(prompts)
        params = as_params_list(sampling_params, len(prompts))
        pairs = list(zip(prompts, params, strict=True))
        seqs = for_each(lambda pair: self._make_sequence(*pair, is_streamed), "prompt", pairs)
        for seq in seqs:
            seq.is_awaited = True
            self._draw_seed(seq)
        return seqs

    def _make_sequence(
        self, prompt: Prompt, params: SamplingParams, is_streamed: bool = False
    ) -> Sequence:
        """Check a prompt and its parameters; the seed is drawn later, once all are checked."""
        self._ready_runner()
        check_params(params, self.config, self._tokenizer)
        token_ids = as_prompt_ids(prompt, self.config, self._tokenizer)
        seq = Sequence(token_ids, params, self.config.max_model_len, params.seed or 0)
        seq.is_streamed = is_streamed
        if params.stop or (is_streamed and self._tokenizer is not None):
            seq.detokenizer = Detokenizer(
                self._tokenizer, params, seq.num_prompt_tokens, self._hidden_ids
            )
        return seq

    def _draw_seed(self, seq: Sequence) -> None:
        """A seed from torch's generator, for a request that needs one and was given none."""
        if seq.params.seed is None and seq.params.temperature:
            seq.seed = self._runner().new_seed()
