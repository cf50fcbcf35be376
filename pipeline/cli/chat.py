"""`pipeline-orch chat`: a conversation in the terminal.

The main thread reads lines, as only it can be interrupted while it does; the pipeline runs in
another, and its tokens come over a queue. What is said is kept in memory alone.
"""

import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Self, TypeVar

import trio

from pipeline.agreement.manifest import Manifest, load_manifest
from pipeline.cli.chat_flags import ChatFlags
from pipeline.cli.logs import tell, tell_error
from pipeline.cli.pipeline_access import (
    ManifestSource,
    PipelineAccess,
    end_tokens,
    longest_text,
)
from pipeline.cli.pipeline_flags import PipelineFlags
from pipeline.cli.privacy_bound import privacy_budget, tell_prompt
from pipeline.cli.shard_directories import client_dir, model_or_parts
from pipeline.cli.terminal import write_text
from pipeline.codecs.privacy_budget import PrivacyBudget
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation, TokenOutput
from pipeline.engine.idle_prefixes import PrefixOptions
from pipeline.engine.limits import Limits
from pipeline.engine.output_text import StoppedText
from pipeline.engine.token_stream import Listener
from pipeline.errors import (
    InputError,
    PipelineError,
    PromptError,
    RequestFailed,
    RequestTimedOut,
    SessionError,
)
from pipeline.gateway.chat_tokenizer import GatewayTokenizer
from pipeline.gateway.templates import ChatTemplate
from pipeline.orchestrator.open_pipeline import Pipeline

_Event = TokenOutput | PipelineError
_Result = TypeVar("_Result")

COMMAND = "pipeline-orch chat"
# All of the one slot's memory: a turn computes only what is new of the conversation.
_PREFIXES = PrefixOptions(share=1.0, ttl_seconds=86400.0)
_SALT = b"chat"


class Conversation:
    """What has been said, as the prompt that asks for the next answer."""

    def __init__(
        self, tokenizer: GatewayTokenizer, template: ChatTemplate, room: int, system: str | None
    ) -> None:
        """`room`: tokens there are for a prompt and its answer."""
        self._tokenizer = tokenizer
        self._template = template
        self.room = room
        self._told = [] if system is None else [{"role": "system", "content": system}]
        self._said: list[dict[str, str]] = []

    def ask(self, text: str) -> tuple[tuple[int, ...], int]:
        """Say something; the prompt for its answer, and how many old messages it has no room for.

        These are forgotten, the oldest first. Raises PromptError, as if nothing had been said, for
        what can never fit, or the model's template refuses.
        """
        said = [*self._said, {"role": "user", "content": text}]
        num_said = len(said)
        while len(prompt_ids := self._encode(said)) >= self.room:
            if len(said) == 1:
                raise PromptError(
                    f"this takes {len(prompt_ids)} tokens, and there is room for {self.room - 1}"
                )
            del said[:2]  # a question and its answer
        self._said = said
        return prompt_ids, num_said - len(said)

    def answer(self, text: str) -> None:
        """What came of it; what was asked without any answer is forgotten."""
        if text:
            self._said.append({"role": "assistant", "content": text})
        else:
            self._said.pop()

    def _encode(self, said: list[dict[str, str]]) -> tuple[int, ...]:
        return self._tokenizer.encode_rendered(self._template.render([*self._told, *said]))


class Background:
    """An engine and its pipeline in a thread of their own, while the context is open."""

    def __init__(self, engine: PipelineEngine, run: Callable[[], Awaitable[None]]) -> None:
        """`run` drives the engine until it is cancelled, or raises why it cannot any more."""
        # Set when the pipeline stands for the first time, or never will.
        self.is_settled = threading.Event()
        self._failure: Exception | None = None
        self._engine = engine
        self._run = run
        self._scope = trio.CancelScope()
        self._has_begun = threading.Event()
        self._thread = threading.Thread(target=self._main, name="pipeline", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._has_begun.wait()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(trio.RunFinishedError):
            self._call(self._scope.cancel)
        self._thread.join()

    def submit(self, generation: Generation, listener: Listener) -> int:
        """As the engine's own. Raises what it raises, or why the pipeline has failed."""
        with suppress(trio.RunFinishedError):
            return self._call(partial(self._engine.submit, generation, listener))
        self._thread.join()
        self.check()
        raise SessionError("the pipeline has ended")

    def cancel(self, request_id: int) -> None:
        """Have no more of it; what has come of it can be gone on from."""
        with suppress(trio.RunFinishedError):
            self._call(partial(self._engine.cancel, request_id, keeps=True))

    def check(self) -> None:
        """Raise why the pipeline has failed, if it has."""
        if self._failure is not None:
            raise self._failure

    def _call(self, work: Callable[[], _Result]) -> _Result:
        return trio.from_thread.run_sync(work, trio_token=self._token)

    def _main(self) -> None:
        async def main() -> None:
            self._token = trio.lowlevel.current_trio_token()
            self._has_begun.set()
            with self._scope:
                await self._run()

        try:
            trio.run(main)
        except Exception as error:
            self._failure = error
        # Whoever waits for an answer hears that there will be none.
        self._engine.fail(SessionError(str(self._failure or "the pipeline has ended")))
        self.is_settled.set()


class _Talk:
    """Questions and answers, one after another."""

    def __init__(
        self,
        flags: ChatFlags,
        manifest: Manifest,
        tokenizer: GatewayTokenizer,
        conversation: Conversation,
        engine: PipelineEngine,
        budget: PrivacyBudget | None,
        request_seconds: float | None,
    ) -> None:
        self._sampling = flags.sampling.params()
        self._engine = engine
        # Under a window a text need not end by itself before very long.
        self._max_tokens = flags.max_tokens or manifest.activation_spec.max_seq_len
        self._ends = end_tokens(manifest, tokenizer)
        self._tokenizer = tokenizer
        self._conversation = conversation
        self._budget = budget
        self._request_seconds = request_seconds

    def ask(self, text: str, background: Background) -> None:
        """Print the answer to something. Raises PipelineError, PromptError for what is none."""
        # What stages have room for is known since they stand.
        self._conversation.room = room = self._engine.max_seq_len
        prompt_ids, num_forgotten = self._conversation.ask(text)
        if num_forgotten:
            tell(COMMAND, f"no room for all that was said: {num_forgotten} messages are forgotten")
        max_tokens = min(self._max_tokens, room - len(prompt_ids))
        if self._budget is not None:
            tell_prompt(self._budget, len(prompt_ids), max_tokens)
        generation = Generation(prompt_ids, max_tokens, self._ends, self._sampling, salt=_SALT)
        answer = ""
        try:
            for piece in self._pieces(generation, background):
                write_text(piece)
                answer += piece
        finally:
            write_text("\n")
            self._conversation.answer(answer)

    def _pieces(self, generation: Generation, background: Background) -> Iterator[str]:
        """The answer's text, until it ends or Ctrl-C is pressed. Raises PipelineError."""
        text = StoppedText(self._tokenizer, generation.prompt_ids, self._sampling.stop)
        events: SimpleQueue[_Event | None] = SimpleQueue()
        with _interrupted_by(lambda: events.put(None)):
            request_id = background.submit(generation, events.put)
            try:
                for event in _heard(events, self._request_seconds):
                    if isinstance(event, PipelineError):
                        background.check()  # which knows more of it
                        raise event
                    piece, is_stopped = text.push(event.token_id)
                    yield piece
                    if is_stopped or event.finish is not None:
                        break
                yield text.finish()[0]
            finally:
                background.cancel(request_id)


def _heard(events: "SimpleQueue[_Event | None]", seconds: float | None) -> Iterator[_Event]:
    """What comes, up to a None. Raises RequestTimedOut where that takes longer; None: no limit."""
    began = time.monotonic()
    while True:
        left = None if seconds is None else max(0.0, began + seconds - time.monotonic())
        try:
            event = events.get(timeout=left)
        except Empty:
            assert seconds is not None  # or it would wait on
            raise RequestTimedOut(seconds) from None
        if event is None:
            return
        yield event


def chat(flags: ChatFlags, shared: PipelineFlags) -> None:
    """Talk until there is no more input. Raises PipelineError."""
    if sys.stdin is None:
        raise InputError("stdin is closed, so there is nobody to talk to")
    manifest = load_manifest(flags.manifest)
    home = client_dir(model_or_parts(flags.model_dir, flags.manifest, "--model-dir"))
    tokenizer = GatewayTokenizer(home / "tokenizer.json")
    longest = longest_text(flags.context, manifest, shared.tide_window)
    room = flags.context or longest
    limits = Limits(
        1,
        room,
        num_stages=len(manifest.stages),
        window=shared.tide_window,
        is_length_asked=flags.context is not None,
    )
    budget = privacy_budget(manifest, shared.dp_epsilon, shared.dp_delta)
    engine = PipelineEngine(limits, budget, _PREFIXES)
    source = ManifestSource(manifest, flags.manifest, flags.model_dir, home)
    access = PipelineAccess.create(source, shared, limits, is_resumable=True)
    template = ChatTemplate.load(home)
    conversation = Conversation(tokenizer, template, room, flags.system)
    talk = _Talk(flags, manifest, tokenizer, conversation, engine, budget, shared.request_timeout)

    async def work(pipeline: Pipeline) -> None:
        tokenizer.check_vocabulary(pipeline.vocab_size)
        engine.allow_reuse(pipeline.is_row_exact)
        background.is_settled.set()
        await engine.run(pipeline)

    background = Background(engine, lambda: access.run(work, engine.scheduler))
    try:
        with background:
            background.is_settled.wait()
            background.check()
            _converse(talk, background)
    finally:
        template.close()


def _converse(talk: _Talk, background: Background) -> None:
    for line in _lines():
        try:
            if line.strip():
                talk.ask(line, background)
        except (PromptError, RequestFailed) as error:  # this one; the next may do
            tell_error(COMMAND, str(error), error.exit_code)


def _lines() -> Iterator[str]:
    """What is typed, until Ctrl-D; at a terminal with history, and Ctrl-C takes a line back."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with suppress(ImportError):
            import_module("readline")  # `input` edits lines and remembers them, in memory alone
    while True:
        try:
            line = input("> " if is_terminal else "")
            line.encode()
        except EOFError:
            if is_terminal:
                write_text("\n")
            return
        except UnicodeError as error:
            raise PromptError("stdin is not UTF-8 text") from error
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            write_text("\n")
        else:
            yield line


@contextmanager
def _interrupted_by(stop: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C calls `stop` meanwhile, and raises nothing: that could be anywhere."""

    def handle(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
