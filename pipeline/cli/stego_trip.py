"""What `pipeline-orch stego` does: a message into a text, or back, over one pipeline."""

import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import trio
import typer

from pipeline.agreement.manifest import Manifest, load_manifest
from pipeline.cli.logs import tell
from pipeline.cli.pipeline_access import ManifestSource, PipelineAccess, longest_text
from pipeline.cli.privacy_bound import privacy_budget
from pipeline.cli.progress import progress_bar
from pipeline.cli.prompt_input import MAX_PROMPT_BYTES, read_bytes
from pipeline.cli.shard_directories import client_dir
from pipeline.cli.signals import run_until_signalled
from pipeline.cli.stego_flags import CarrierFlags, TripFlags
from pipeline.cli.stego_model import local_fingerprint, new_service
from pipeline.cli.terminal import write_text
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.limits import Limits
from pipeline.engine.request_time import request_time
from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import InputError
from pipeline.files import check_writable, write_atomically
from pipeline.gateway.templates import ChatTemplate
from pipeline.orchestrator.open_pipeline import Pipeline
from pipeline.stego import fingerprint as fingerprints
from pipeline.stego.cover import CoverProgress
from pipeline.stego.errors import StegoError, Unreadable
from pipeline.stego.fingerprint import Fingerprint
from pipeline.stego.message import MAX_MESSAGE_BYTES, check_message
from pipeline.stego.retokenise import CoverTokenizer
from pipeline.stego.secret_files import (
    create_secret,
    fingerprint_path,
    read_fingerprint,
    read_secret,
)
from pipeline.stego.service import Hear, StegoService, Task, num_read_tokens, num_written_tokens
from pipeline.tasks import open_tasks

COMMAND = "pipeline-orch stego"


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a text goes, and what it took; None: stdout, nowhere."""

    text: Path | None
    statistics: Path | None


def read_message(text: str | None, source: Path | None) -> bytes:
    """What to hide, from the command line, a file or stdin. Raises InputError."""
    if text is not None and source is not None:
        raise InputError("--message and --in exclude each other")
    if text is not None:
        return text.encode("utf-8", "surrogateescape")
    return read_bytes(source or Path("-"), "--in", MAX_MESSAGE_BYTES)


def read_text(source: Path) -> str:
    """The text to read a message from. Raises InputError."""
    try:
        return read_bytes(source, "--in", MAX_PROMPT_BYTES).decode()
    except UnicodeDecodeError as error:
        raise StegoError("--in: the text is not UTF-8, so it was altered on its way") from error


def keygen(out: Path, given: CarrierFlags, manifest: Path | None, model_dir: Path | None) -> None:
    """Make a secret and its fingerprint. Raises InputError."""
    settings = _settings(given, None)
    model = Fingerprint()
    if manifest is not None and model_dir is not None:
        model = local_fingerprint(load_manifest(manifest), client_dir(model_dir))
    beside = create_secret(out, model.model_copy(update=dict(settings)))
    tell(COMMAND, f"wrote {out} and {beside}")


def encode(flags: TripFlags, message: bytes, outputs: Outputs, *, compresses: bool) -> None:
    """Write a text. Raises PipelineError, or typer.Exit after a signal."""
    check_message(message)
    for path in (outputs.text, outputs.statistics):
        if path is not None:
            check_writable(path)
    trip = _Trip.plan(flags)

    async def work(service: StegoService, hear: Hear) -> None:
        hidden = await service.hide(message, trip.task, hear, compresses=compresses)
        _record(flags.secret_file, service.fingerprint(trip.task.settings))
        if outputs.text is None:
            write_text(hidden.text + "\n")
        else:
            write_atomically(outputs.text, hidden.text)
        tell(COMMAND, hidden.statistics.summary())
        if outputs.statistics is not None:
            write_atomically(outputs.statistics, json.dumps(hidden.statistics.to_json()) + "\n")

    trip.run(num_written_tokens(len(message)), "hiding", work)


def decode(flags: TripFlags, text: str) -> None:
    """Print the message of a text. Raises PipelineError, or typer.Exit after a signal."""
    if not text.strip():
        raise StegoError("--in: the text is empty")
    trip = _Trip.plan(flags)
    num_text = len(CoverTokenizer(trip.tokenizer).ids(text))

    async def work(service: StegoService, hear: Hear) -> None:
        try:
            found = await service.find(text, trip.task, hear)
        except Unreadable:
            recorded = read_fingerprint(flags.secret_file) or Fingerprint()
            differences = service.fingerprint(trip.task.settings).differences(recorded)
            raise Unreadable(differences) from None
        tell(COMMAND, found.statistics.summary())
        _write_message(found.message)

    trip.run(num_read_tokens(num_text), "reading", work)


@dataclass(frozen=True, slots=True)
class _Trip:
    """What is to be done, understood as far as that goes without a pipeline."""

    flags: TripFlags
    manifest: Manifest
    tokenizer: Tokenizer
    task: Task

    @classmethod
    def plan(cls, flags: TripFlags) -> "_Trip":
        """Read what the flags name. Raises InputError."""
        manifest = load_manifest(flags.manifest)
        longest_text(flags.context, manifest, flags.pipeline.tide_window)
        if manifest.dp is not None:
            raise StegoError(
                "this manifest adds noise, which is another whenever a text is computed: "
                "no message could be read from one"
            )
        privacy_budget(manifest, flags.pipeline.dp_epsilon, flags.pipeline.dp_delta)  # refuses both
        tokenizer = Tokenizer(client_dir(flags.model_dir) / "tokenizer.json")
        task = Task(
            prompt_ids=_prompt_ids(flags, tokenizer),
            secret=read_secret(flags.secret_file, flags.passphrase_file),
            settings=_settings(flags.carrier, flags.secret_file),
            max_tokens=flags.max_tokens,
        )
        return cls(flags, manifest, tokenizer, task)

    def run(
        self, num_tokens: int, what: str, work: Callable[[StegoService, Hear], Awaitable[None]]
    ) -> None:
        """Do `work` over a pipeline with room for so many tokens beside the prompt.

        Raises PipelineError, or typer.Exit after a signal.
        """
        flags, manifest = self.flags, self.manifest
        # No more than it takes: a model may have room for far more than its stages' memory.
        needed = len(self.task.prompt_ids) + (flags.max_tokens or num_tokens)
        window = flags.pipeline.tide_window
        room = flags.context or min(needed, longest_text(None, manifest, window))
        # What does not fit would end in the middle of a message.
        limits = Limits(
            1, room, num_stages=len(manifest.stages), window=window, is_length_asked=True
        )
        engine = PipelineEngine(limits)
        home = client_dir(flags.model_dir)
        source = ManifestSource(manifest, flags.manifest, flags.model_dir, home)
        access = PipelineAccess.create(
            source, flags.pipeline, limits, is_resumable=flags.pipeline.starts_workers
        )

        async def with_bar(pipeline: Pipeline) -> None:
            self.tokenizer.check_vocabulary(pipeline.vocab_size)
            self.tokenizer.check_ids(self.task.prompt_ids)
            service = new_service(engine, self.tokenizer, manifest, home, pipeline, window)
            with progress_bar(what, "bits") as bar:

                def hear(progress: CoverProgress) -> None:
                    if bar is not None and progress.needed:
                        bar(round(progress.carried), progress.needed)

                await work(service, hear)

        async def in_time(pipeline: Pipeline) -> None:
            with request_time(flags.pipeline.request_timeout, trio.current_time()):
                await with_bar(pipeline)

        number = run_until_signalled(lambda: _run_beside(access, engine, in_time))
        if number is not None:
            raise typer.Exit(128 + number)


async def _run_beside(
    access: PipelineAccess, engine: PipelineEngine, work: Callable[[Pipeline], Awaitable[None]]
) -> None:
    """Do `work` once while the engine runs; a stage that is lost and mended is none of its."""
    standing: list[Pipeline] = []
    is_standing, is_done = trio.Event(), trio.Event()

    async def serve(pipeline: Pipeline) -> None:
        standing.append(pipeline)
        is_standing.set()
        async with open_tasks() as running:
            running.start_soon(engine.run, pipeline)
            await is_done.wait()
            running.cancel_scope.cancel()

    async with open_tasks() as tasks:
        tasks.start_soon(access.run, serve, engine.scheduler)
        await is_standing.wait()
        await work(standing[0])
        is_done.set()  # then the stages are told goodbye


def _prompt_ids(flags: TripFlags, tokenizer: Tokenizer) -> tuple[int, ...]:
    if not flags.chat:
        return tokenizer.encode(flags.prompt)
    messages = [{"role": "user", "content": flags.prompt}]
    rendered = ChatTemplate.load(client_dir(flags.model_dir)).render(messages)
    return tokenizer.encode(rendered, add_special_tokens=False)


def _settings(given: CarrierFlags, secret_file: Path | None) -> fingerprints.Settings:
    """What the command line says, else what lies beside the secret. Raises InputError."""
    recorded = read_fingerprint(secret_file) or fingerprints.Settings()
    names = set(fingerprints.Settings.model_fields)
    settings = fingerprints.Settings(
        **(recorded.model_dump(include=names) | given.model_dump(exclude_none=True))
    )
    _ = settings.sampling  # raises for what leaves nothing to choose from
    return settings


def _record(secret_file: Path | None, used: Fingerprint) -> None:
    """Add to the file beside the secret what it leaves open; say where it is otherwise."""
    recorded = read_fingerprint(secret_file)
    if secret_file is None or recorded is None:
        return
    if differences := used.differences(recorded):
        tell(COMMAND, f"not as the secret's fingerprint has it: {differences}")
    whole = used.model_copy(update=recorded.model_dump(exclude_none=True))
    if whole != recorded:
        write_atomically(fingerprint_path(secret_file), whole.to_json())


def _write_message(message: bytes) -> None:
    if sys.stdout.isatty():
        write_text(message.decode("utf-8", "backslashreplace"))
        return
    sys.stdout.buffer.write(message)
    sys.stdout.buffer.flush()
