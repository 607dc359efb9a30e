"""The marker ``one_in``: which cases of a test are of which set."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import pytest_collection_modifyitems


class Item:
    """What the hook asks of a case."""

    def __init__(self, nodeid: str, *marks: Any) -> None:
        self.nodeid, self.own_markers = nodeid, [m.mark for m in marks]

    def get_closest_marker(self, name: str) -> Any:
        return next((m for m in self.own_markers if m.name == name), None)

    def add_marker(self, name: str) -> None:
        self.own_markers.append(getattr(pytest.mark, name).mark)

    @property
    def set(self) -> list[str]:
        return [m.name for m in self.own_markers if m.name != "one_in"]


def sets(*cases: Item) -> list[list[str]]:
    pytest_collection_modifyitems(list(cases))  # type: ignore[arg-type]
    return [case.set for case in cases]


def test_one_in_n_stays_and_the_rest_is_where_it_says() -> None:
    mark = pytest.mark.one_in
    assert sets(*(Item(f"a.py::b[{n}]", mark(3)) for n in range(5))) == [[], ["slow"], ["slow"], [], ["slow"]]
    rest = sets(*(Item(f"a.py::b[{n}]", mark(2, rest="exhaustive")) for n in range(3)))
    assert rest == [[], ["exhaustive"], []]


def test_tests_are_counted_by_themselves() -> None:
    mark = pytest.mark.one_in(2)
    names = ("a.py::A::b[0]", "a.py::B::b[0]", "a.py::b[0]", "a.py::b[1]", "c.py::b")
    assert sets(*(Item(name, mark) for name in names)) == [[], [], [], ["slow"], []]


def test_slow_cases_are_counted_by_themselves_and_leave_their_set() -> None:
    """``-m slow`` does not run what is exhaustive."""
    mark, slow = pytest.mark.one_in(2, rest="exhaustive"), pytest.mark.slow
    cases = [Item(f"a.py::b[{n}]", mark, *([slow] * (n > 1))) for n in range(4)]
    assert sets(*cases) == [[], ["exhaustive"], ["slow"], ["exhaustive"]]


def test_others_are_left_alone() -> None:
    cases = [Item("a.py::b[0]"), Item("a.py::b[1]", pytest.mark.slow)]
    assert sets(*cases) == [[], ["slow"]]
    assert sets(Item("a.py::b[0]", pytest.mark.one_in(2), pytest.mark.exhaustive)) == [["exhaustive"]]
