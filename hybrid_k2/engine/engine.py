"""The Python API: load a checkpoint, ask for logits, generate, chat."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrid_k2.accelerator import Trace, check_trace_file
from hybrid_k2.engine.generation import Generation, OnPrefill, Runner
from hybrid_k2.engine.kept_usage import KeptUsage
from hybrid_k2.engine.loading import LoadedModel, OnPlan, load_model
from hybrid_k2.engine.params import SamplingParams
from hybrid_k2.engine.prefix import PrefixCache
from hybrid_k2.engine.reply import Reply
from hybrid_k2.engine.request import chat_sequences, check_ids, check_prompt_fits, text_sequences
from hybrid_k2.engine.sequence import TokenSequence, cut
from hybrid_k2.engine.sight import Sight
from hybrid_k2.errors import EngineError, MemoryBudgetError, RequestError, shown
from hybrid_k2.experts.usage import ExpertUse
from hybrid_k2.model.batch import Batch
from hybrid_k2.model.latent_cache import LatentCache

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hybrid_k2.model.loader import Progress
    from hybrid_k2.placement import Rules
    from hybrid_k2.protocol.images import ImageFormat

log = logging.getLogger("hybrid_k2")


class Engine:
    """Run one checkpoint; build it with `load`, and close it or use it in a `with` statement.

    One request runs at a time: a second one that starts before the first has ended is refused with a RequestError.
    Any thread may call; `Generation.cancel` and all properties may be used while a request runs.
    """

    def __init__(self, loaded: LoadedModel, trace_to: Path | None = None) -> None:
        self.config = loaded.config
        self.plan = loaded.plan
        self.tokenizer = loaded.tokenizer
        self.folder = loaded.folder
        self.loaded = loaded
        self._trace_to = trace_to
        loaded.text.trace = Trace() if trace_to is not None else None
        self._cache = LatentCache(loaded.plan.kv_cache, loaded.config)
        self._prefix = PrefixCache(self._cache)
        remembered = loaded.text.usage if loaded.plan.accelerator is not None else {}
        self._usage = KeptUsage(loaded.folder, remembered)
        self.runner = Runner(
            loaded.text,
            self._cache,
            self._prefix,
            Sight(loaded.vision),
            loaded.plan.chunk_tokens,
            self._enter,
            self._memory_share,
            self._usage.after_step,
        )
        self._busy = threading.Lock()
        self._generations: weakref.WeakSet[Generation] = weakref.WeakSet()
        self._closed = False

    @classmethod
    def load(
        cls,
        path: str | Path,
        rules: str | Path | Rules | None = None,
        *,
        on_plan: OnPlan | None = None,
        progress: Progress | None = None,
        trace: str | Path | None = None,
    ) -> Engine:
        """Load a checkpoint: a folder, a Hugging Face repository, or "demo" for the built-in one.

        `rules`: a placement rule file or the name of a shipped one; None chooses for the machine. `on_plan` gets the
        plan when everything has been checked and nothing large was read; an exception from it ends the loading.
        `progress` gets the bytes read and the bytes to read. `trace`: a file that `close` writes, with the times of all
        operations of accelerator and experts, for Chrome or Perfetto; they are kept in memory until then. A file that
        is there already is replaced only if it is a trace, or empty.
        Raises: CheckpointError, ConfigError, UnsupportedModelError, RulesError, HardwareError.
        """
        trace_to = None if trace is None else check_trace_file(trace)
        loaded = load_model(path, rules, on_plan, progress)
        try:
            return cls(loaded, trace_to)
        except BaseException:  # no memory for the cache, or Ctrl-C
            loaded.close()
            raise

    @property
    def context_tokens(self) -> int:
        """The longest prompt and reply together: what the KV cache holds, at most the model's context."""
        return self.loaded.context_tokens

    @property
    def images(self) -> ImageFormat | None:
        """How the model wants images; None: messages may have none."""
        return self.loaded.images

    @property
    def experts_name(self) -> str:
        """The backend that computes the routed experts."""
        return self.loaded.text.experts_runtime.name

    @cached_property
    def read_gbps(self) -> float:
        """The memory's read bandwidth in GB/s (10^9 bytes), measured in about 0.1 s when it is first asked for.

        Raises: MemoryBudgetError if there is too little to measure it.
        """
        self._check_open()
        return self.loaded.text.experts_runtime.measure_read_gbps()

    def expert_use(self) -> dict[int, ExpertUse]:
        """Return how often each expert was chosen, by MoE layer; any thread, any time.

        Beside an accelerator, the counts go on from what was remembered. Where there are hot experts, they
        are halved now and then.
        """
        return self.loaded.text.expert_use()

    def default_params(self, thinking: bool = True) -> SamplingParams:
        """Return the sampling values that requests use where they state none."""
        return SamplingParams.defaults(thinking, self.loaded.generation_config)

    def prepare_grammars(self) -> None:
        """Do now what the first request with a grammar would wait for: a second or two. Twice is fine.

        Raises: RequestError where llguidance is not installed.
        """
        self._check_open()
        _ = self.loaded.guide_vocabulary

    def logits(self, token_ids: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Return the logits after each of the tokens; they are cut into chunks as a prompt with a seed is.

        Takes 4 * vocab_size bytes for each token, and as much again for the tokens of one prefill chunk.
        Shapes: token_ids: [T] -> [T, vocab_size].
        Raises: RequestError for ids outside the vocabulary, no ids, more than the KV cache holds, or a busy engine.
        """
        ids = check_ids(token_ids, self.config.vocab_size)
        check_prompt_fits(len(ids), self.loaded)
        with self._enter():
            logits = np.empty((len(ids), self.config.vocab_size), np.float32)
            pages = self._prefix.allocate(self._cache.pages_for(len(ids)))
            try:
                done = 0
                while done < len(ids):
                    chunks = cut(ids, done, len(ids), self.loaded.block_tokens, self.plan.chunk_tokens, pages)
                    part = self.loaded.text.forward(Batch.build(chunks, all_logits=True), self._cache)
                    logits[done : done + len(part)] = part.cpu().numpy()
                    done += len(part)
            finally:
                self._cache.pool.free(pages)
        return logits

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        preserve_thinking: bool = False,
        params: SamplingParams | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> Generation:
        """Return an iterator over the events of one reply; the last is a FinishEvent with the reply.

        `prompt`: text or token ids to continue; all events are content, and special tokens in the text are ordinary
        text. `messages`: a conversation to answer. `thinking` also chooses the default temperature. `on_prefill` gets
        the prompt tokens done and the prompt tokens, before the first chunk of the prompt and after each.
        Raises: RequestError at once for a request that is wrong; while iterating, RequestError if another request
        runs, EngineError.
        """
        (sequence,) = self.sequences(
            prompt,
            messages=messages,
            tools=tools,
            thinking=thinking,
            preserve_thinking=preserve_thinking,
            params=params,
        )
        generation = Generation(self.runner, sequence, on_prefill)
        self._generations.add(generation)
        return generation

    def sequences(
        self,
        prompt: str | Sequence[int] | None,
        *,
        messages: Sequence[Mapping[str, Any]] | None,
        tools: Sequence[Mapping[str, Any]] | None,
        thinking: bool,
        preserve_thinking: bool,
        params: SamplingParams | None,
        n: int = 1,
    ) -> list[TokenSequence]:
        """Check a request and prepare `n` replies to it; choice i of a request with a seed has seed + i.

        Any thread, any time. Raises: RequestError, EngineError if closed.
        """
        self._check_open()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params: expected SamplingParams, got {shown(params)}")
        for name, flag in (("thinking", thinking), ("preserve_thinking", preserve_thinking)):
            if not isinstance(flag, bool):
                raise RequestError(f"{name}: expected True or False, got {shown(flag)}")
        if messages is not None and prompt is None:
            return chat_sequences(self.loaded, messages, tools, thinking, preserve_thinking, params, n)
        if prompt is not None and messages is None:
            if tools or preserve_thinking:
                raise RequestError("generate: expected tools and preserve_thinking with messages only, got a prompt")
            return text_sequences(self.loaded, prompt, thinking, params, n)
        raise RequestError(f"generate: expected prompt or messages, got {'neither' if prompt is None else 'both'}")

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        preserve_thinking: bool = False,
        params: SamplingParams | None = None,
    ) -> Reply:
        """Answer a conversation and return the whole reply; see `generate` for the arguments and errors."""
        with self.generate(
            messages=messages, tools=tools, thinking=thinking, preserve_thinking=preserve_thinking, params=params
        ) as generation:
            for _ in generation:
                pass
        return generation.reply

    def close(self) -> None:
        """Free weights, cache and threads. Closing twice is fine.

        A generation that is waiting for its reader is ended. Beside an accelerator, how often each expert was used is
        remembered for the next plan, in a small file in the user's cache; while requests run, every few minutes, too.
        Raises: EngineError while another thread computes, or if the trace cannot be written.
        """
        if self._closed:
            return
        for generation in list(self._generations):
            generation.close()
        with self._enter():
            self._closed = True
            self._prefix.release()
            self.runner.sight.forget()
            trace = self.loaded.text.trace
            with ExitStack() as left:  # whatever one of them raises, the others follow; from the last to the first
                if trace is not None and self._trace_to is not None:
                    left.callback(trace.write, self._trace_to)
                left.callback(self._cache.close)
                left.callback(self.loaded.close)
                left.callback(self._usage.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self.experts_name
        return f"Engine({str(self.folder)!r}, {state})"

    @contextmanager
    def _enter(self) -> Iterator[None]:
        """Let one request in."""
        if not self._busy.acquire(blocking=False):
            raise RequestError(
                "engine: expected one request at a time, got a second while the first has not ended",
                hint="read the first one's events to the end, or close() it; a Service runs many at once",
            )
        try:
            self._check_open()
            yield
        finally:
            self._busy.release()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("engine: expected an open one, got one that was closed")

    def _memory_share(self, tokens_per_s: float) -> float | None:
        """Compare the weights read per second with the memory.

        None with a GPU, whose memory is another one, for the reference, which reads more than the stored weights, and
        where memory is too short to measure it: a reply is not lost for that.
        """
        if self._closed or self.plan.devices != ("host",) or self.plan.numerics == "reference":
            return None
        try:
            return self.plan.bytes_per_token * tokens_per_s / (self.read_gbps * 1e9)
        except (MemoryBudgetError, MemoryError) as error:
            log.info("the share of the memory's bandwidth is not known: %s", error)
            return None
