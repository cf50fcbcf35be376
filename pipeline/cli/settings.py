"""What a role can be told: frozen classes whose fields are flags and variables alike.

A field says all of a setting once: type, bounds, default, and a `Flag` with what `--help` shows.
The command's flag, its variable VEILPIPE_<NAME> and the check of both follow from it. A flag beats
its variable, and an error names the variable that a value came from.
"""

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Self, get_args, get_origin

import typer
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic.fields import FieldInfo

from pipeline.errors import InputError, PipelineError
from pipeline.files import is_file
from transport.dial_and_listen import Endpoint, parse_endpoint
from transport.errors import EndpointError, TransportError
from transport.frozen import frozen

# Kubernetes sets VEILPIPE_PORT to this kind of thing for a service that is called veilpipe, and
# VEILPIPE_DATA_OUT_PORT for one called veilpipe-data-out.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://\S+:\d+")
_MOST_SHOWN = 80  # characters of a value that will not do

Command = Callable[..., Any]


@frozen
class Flag:
    """What is said of a setting beside its type, bounds and default."""

    metavar: str | None
    help: str
    # How the command line spells it, if not as --name.
    spelled: tuple[str, ...] = ()
    # What its variable was called in older systems.
    older: tuple[str, ...] = ()
    # Of these, those that come last where they name no file that is there.
    if_there: frozenset[str] = frozenset()
    # What gives up a protection, and what is of one run alone, is said where it is done. A prompt
    # or a message in the environment could be read in every process that is started from there.
    is_by_hand: bool = False


def parse_address(text: object) -> Endpoint:
    """An address as pydantic's validators take them. Raises ValueError."""
    try:
        return parse_endpoint(str(text))
    except EndpointError as error:
        raise ValueError(str(error)) from error


Address = Annotated[Endpoint, PlainValidator(parse_address)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65535)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Settings(BaseModel):
    """Base of every group of settings; a field may be a group of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    @classmethod
    def environment(cls, given: Mapping[str, object]) -> Mapping[str, str]:
        """The variables that count beside the flags that are given."""
        del given
        return os.environ


def takes_flags(**groups: type[Settings]) -> Callable[[Command], Command]:
    """Give a typer command the flags of settings: as `name` it gets what they and variables say.

    A command that has others below it gets none where one of those is meant.
    """

    def add(command: Command) -> Command:
        @wraps(command)
        def run(**values: Any) -> Any:  # noqa: ANN401  (what typer found on the command line)
            names = [name for group in groups.values() for name in _flags(group)]
            given = {name: values.pop(name, None) for name in names}
            given = {name: value for name, value in given.items() if value not in (None, [])}
            below = getattr(values.get("ctx"), "invoked_subcommand", None)
            if below is not None:
                for name in given:
                    raise InputError(f"--{_dashed(name)} belongs behind {below}")
                return None
            sources = {name: _Source.of(group, given) for name, group in groups.items()}
            try:
                settings = {name: each.read(groups[name]) for name, each in sources.items()}
                return command(**values, **settings)
            except (PipelineError, TransportError) as error:
                for source in sources.values():
                    source.name_variables(error)
                raise

        own = inspect.signature(command, eval_str=True).parameters.values()
        merged = [each for each in own if each.name not in groups]
        for group in groups.values():
            merged += [_parameter(name, *found) for name, found in _flags(group).items()]
        # By name only: then those that must be given may come after those that need not.
        by_name = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in merged]
        run.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]
        return run

    return add


def for_these(arguments: Sequence[str], command: Command) -> Command:
    """A command that takes flags, without those that are not among the arguments.

    typer makes a validator for every flag that it knows, given or not. Where anything is not
    spelled as a flag of the command is, or is help, the command stays whole.
    """
    parameters = inspect.signature(command).parameters.values()
    options = {
        each.name: get_args(each.annotation)[1]
        for each in parameters
        if get_origin(each.annotation) is Annotated
    }
    # typer keeps the first way to spell an option as its default until it is told of the command
    spelled = {name: {each.default, *each.param_decls} for name, each in options.items()}
    words = {each.partition("=")[0] for each in arguments if each.startswith("-")}
    if not words <= set().union(*spelled.values()):
        return command

    @wraps(command)
    def run(**values: Any) -> Any:  # noqa: ANN401
        return command(**values)

    kept = [each for each in parameters if each.name not in spelled or spelled[each.name] & words]
    run.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
    return run


@frozen
class _Source:
    """What settings were given, and which of it by which variable."""

    values: dict[str, object]
    variables: dict[str, str]

    @classmethod
    def of(cls, settings: type[Settings], given: Mapping[str, object]) -> Self:
        environment = settings.environment(given)
        values, variables = {}, {}
        for name, (_, flag) in _flags(settings).items():
            if name in given:
                values[name] = given[name]
            elif found := next(_set_variables(name, flag, environment), None):
                values[name], variables[name] = environment[found], found
        return cls(values, variables)

    def read(self, settings: type[Settings]) -> Settings:
        """Raises InputError for what is missing or will not do."""
        try:
            return settings.model_validate(self._nested(settings))
        except ValidationError as error:
            raise _refusal(error, _flags(settings)) from error

    def name_variables(self, error: Exception) -> None:
        """Note at an error which variables what it speaks of came from."""
        words = set(re.findall(r"[a-z][a-z-]*", str(error).lower().replace("_", "-")))
        for name, variable in self.variables.items():
            if _dashed(name) in words:
                error.add_note(variable)

    def _nested(self, settings: type[Settings]) -> dict[str, object]:
        values: dict[str, object] = {}
        for name, info in settings.model_fields.items():
            if (group := _group_of(info)) is not None:
                values[name] = self._nested(group)
            elif name in self.values:
                values[name] = self.values[name]
        return values


def _flags(settings: type[Settings]) -> dict[str, tuple[FieldInfo, Flag]]:
    """The fields that are flags, with those of groups in it."""
    found: dict[str, tuple[FieldInfo, Flag]] = {}
    for name, info in settings.model_fields.items():
        if (group := _group_of(info)) is not None:
            found |= _flags(group)
        else:
            (flag,) = (each for each in info.metadata if isinstance(each, Flag))
            found[name] = (info, flag)
    return found


def _group_of(info: FieldInfo) -> type[Settings] | None:
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


def _variables(name: str, flag: Flag) -> tuple[str, ...]:
    """What a setting's variable may be called; the first of them that is set counts."""
    return () if flag.is_by_hand else (f"VEILPIPE_{name.upper()}", *flag.older)


def _set_variables(name: str, flag: Flag, environment: Mapping[str, str]) -> Iterator[str]:
    later = []
    for variable in _variables(name, flag):
        text = environment.get(variable)
        if text and not (variable.endswith("_PORT") and _SERVICE_LINK.fullmatch(text)):
            if variable in flag.if_there and not is_file(Path(text)):
                later.append(variable)  # where nothing else is set, what is missing is told of
            else:
                yield variable
    yield from later


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _spellings(name: str, flag: Flag) -> tuple[str, ...]:
    return flag.spelled or (f"--{_dashed(name)}",)


def _parameter(name: str, info: FieldInfo, flag: Flag) -> inspect.Parameter:
    """How typer is told of a flag. It only finds the text: what that may be is for the settings."""
    kind: Any = str | None
    if info.annotation is bool:
        kind = bool | None
    elif get_origin(info.annotation) is tuple:
        kind = list[str] | None
    option = typer.Option(
        *_spellings(name, flag), metavar=flag.metavar, help=_help(name, info, flag)
    )
    annotation = Annotated[kind, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _help(name: str, info: FieldInfo, flag: Flag) -> str:
    notes = []
    if variables := _variables(name, flag):
        notes.append(f"env var: {', '.join(variables)}")
    if info.is_required():
        notes.append("required")
    elif info.default is not None and info.annotation is not bool and info.default != ():
        notes.append(f"default: {info.default}")
    return f"{flag.help}  [{'; '.join(notes)}]" if notes else flag.help


def _refusal(error: ValidationError, flags: Mapping[str, tuple[FieldInfo, Flag]]) -> InputError:
    """One line for the first setting that will not do, or else for all that are missing."""

    def spelled(found: Any) -> str:  # noqa: ANN401  (pydantic's dict of an error)
        name = next(part for part in reversed(found["loc"]) if part in flags)
        return _spellings(name, flags[name][1])[0]

    problems = error.errors()
    missing = [spelled(each) for each in problems if each["type"] == "missing"]
    if len(missing) == len(problems):
        return InputError(f"missing {', '.join(missing)}; see --help")
    first = next(each for each in problems if each["type"] != "missing")
    reason = first.get("ctx", {}).get("error") or first["msg"][:1].lower() + first["msg"][1:]
    return InputError(f"{spelled(first)} {str(first['input'])[:_MOST_SHOWN]}: {reason}")
