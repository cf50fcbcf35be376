"""Classes of values that are quick to define, as `dataclass(frozen=True, slots=True)` are not.

That compiles seven methods for each of its classes, a quarter of a millisecond, and was an eighth
of every command's start. Here `__init__` alone is a class's own, and what compares, hashes and
shows is the same for all. That nobody assigns to a field is for the type checker to see.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, TypeVar, dataclass_transform, overload

T = TypeVar("T")


@overload
def frozen(cls: type[T], /) -> type[T]: ...


@overload
def frozen(*, kw_only: bool) -> Callable[[type[T]], type[T]]: ...


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(
    cls: type[T] | None = None, /, *, kw_only: bool = False
) -> type[T] | Callable[[type[T]], type[T]]:
    """Make a class one of values: a dataclass with slots, equal and hashed by its fields."""

    def make(cls: type[T]) -> type[T]:
        found: Any = dataclass(cls, repr=False, eq=False, slots=True, kw_only=kw_only)
        compared = [each.name for each in fields(found) if each.compare]
        found._compared = attrgetter(*compared) if compared else type
        for name, method in _SHARED.items():
            if name not in cls.__dict__:
                setattr(found, name, method)
        return found  # type: ignore[no-any-return]

    return make if cls is None else make(cls)


def _repr(self: Any) -> str:  # noqa: ANN401
    shown = (f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if each.repr)
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _eq(self: Any, other: Any) -> Any:  # noqa: ANN401
    if type(other) is not type(self):
        return NotImplemented
    return self._compared(self) == self._compared(other)


def _hash(self: Any) -> int:  # noqa: ANN401
    return hash(self._compared(self))


_SHARED = {"__repr__": _repr, "__eq__": _eq, "__hash__": _hash}
