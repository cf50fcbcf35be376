"""Everything the pipeline can report to its user, under one root; each class fixes an exit code."""

from typing import ClassVar


class PipelineError(Exception):
    """Root of every error this package raises; the message is one line a user can act on."""

    exit_code: ClassVar[int] = 1


class InputError(PipelineError):
    """Something the user gave is unusable: a flag, a file, a prompt."""

    exit_code: ClassVar[int] = 2


class ManifestError(InputError):
    """A manifest is missing, malformed or inconsistent."""


class ModelError(InputError):
    """A model directory cannot serve the layers asked of it."""


class TokenizerError(InputError):
    """A tokenizer file cannot be read, or does not belong to the model."""


class PromptError(InputError):
    """A prompt is empty or does not fit the context."""


class PolicyError(InputError):
    """A protection the current mode demands is missing, so nothing is started."""


class SessionInUse(InputError):
    """Somebody else has the kept session that is asked for, until they are done with it."""


class FetchError(PipelineError):
    """A model cannot be fetched: its hub or the network failed."""


class SessionError(PipelineError):
    """A peer or the network failed while the pipeline was running."""


class RequestFailed(PipelineError):
    """One request cannot be served; it says nothing of any other."""


class RequestTimedOut(RequestFailed):
    """One request has had the time that a request may take."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the request took longer than the {seconds:g} s that it may take")


class BudgetSpent(RequestFailed):
    """All that may be told of a session's texts has been."""


class StoreError(PipelineError):
    """A store of sessions cannot be used now; what it holds may be whole."""


class StateRefused(PipelineError):
    """What a store has of a session is not what was put there: it is to be rebuilt from tokens."""


class SessionRefused(SessionError):
    """A session as it was asked for cannot be had, however often one asks."""

    exit_code: ClassVar[int] = 2


class PartLost(SessionError):
    """A worker that a stage asks for part of its layers' work does not answer any more."""


class PartRefused(SessionRefused):
    """Such a worker will not do what it is asked, however often one asks."""


class ServerLeaving(SessionError):
    """Whoever runs the pipeline has been told to stop, and had no more time."""


class StageMismatch(SessionError):
    """What answers at a stage's address is not what the manifest says."""

    def __init__(self, message: str, stage_idx: int | None = None) -> None:
        super().__init__(message)
        self.stage_idx = stage_idx


class StageAbsent(SessionError):
    """A stage was not up at any of the attempts that were to be made."""


class MessageError(SessionError):
    """An authentic peer sent a control message or step this side cannot accept."""


class StageLost(SessionError):
    """A stage stopped answering; `stage_idx` names it."""

    def __init__(self, stage_idx: int, reason: str) -> None:
        super().__init__(f"stage {stage_idx} is lost: {reason}")
        self.stage_idx = stage_idx
        self.reason = reason


class StageHung(StageLost):
    """A stage that had answered does not any more, on a channel that nobody else has access to."""


class StageSilent(StageLost):
    """A connection was taken and nothing said: a stage that hangs, or one kept busy by others."""


class LinkLost(StageLost):
    """A data channel broke; `stage_idx` is at its far end, and may live."""
