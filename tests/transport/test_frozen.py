from dataclasses import dataclass, field, fields, replace

import pytest

from transport.frozen import frozen


@frozen
class Point:
    """A point."""

    x: int
    y: int = 2
    tags: list[str] = field(default_factory=list, compare=False)


@dataclass(frozen=True, slots=True)
class Twin:
    x: int
    y: int = 2
    tags: list[str] = field(default_factory=list, compare=False)


@frozen(kw_only=True)
class Named(Point):
    name: str
    key: bytes = field(default=b"", repr=False)

    def __post_init__(self):
        if not self.name:
            raise ValueError("no name")


@frozen
class Nothing:
    pass


def test_it_is_made_shown_and_altered_as_a_dataclass_is():
    mine, twin = Point(1, tags=["a"]), Twin(1, tags=["a"])
    assert repr(mine) == repr(twin).replace("Twin", "Point")
    assert repr(replace(mine, y=5)) == repr(replace(twin, y=5)).replace("Twin", "Point")
    assert [each.name for each in fields(mine)] == [each.name for each in fields(twin)]
    assert Point.__match_args__ == Twin.__match_args__
    assert Point(1).tags is not Point(1).tags
    with pytest.raises(TypeError):
        Point()


def test_values_are_equal_and_hashed_by_what_is_compared_within_a_class():
    assert Point(1, tags=["a"]) == Point(1, tags=["b"])
    assert Point(1) != Point(2)
    assert len({Point(1), Point(1), Point(2)}) == 2
    assert Point(1) != Twin(1)
    assert Point(1) != Named(1, name="a")
    assert Nothing() == Nothing()
    assert len({Nothing(), Nothing()}) == 1
    assert repr(Nothing()) == "Nothing()"


def test_a_class_below_has_the_fields_of_both_and_keeps_what_is_hidden_hidden():
    found = Named(1, name="a", key=b"secret")
    assert (found.x, found.y, found.name, found.key) == (1, 2, "a", b"secret")
    assert repr(found) == "Named(x=1, y=2, tags=[], name='a')"
    assert found != replace(found, key=b"other")
    with pytest.raises(TypeError):
        Named(1, 2, [], "a")
    with pytest.raises(ValueError, match="no name"):
        Named(1, name="")


def test_it_has_slots_and_what_a_class_says_of_itself():
    @frozen
    class Own:
        x: int

        def __repr__(self):
            return "own"

    assert repr(Own(1)) == "own"
    assert not hasattr(Own(1), "__dict__")
