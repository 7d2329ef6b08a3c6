"""Changes to live objects, made as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

ABSENT = object()


class Change(NamedTuple):
    """An attribute of an object and its new value; ABSENT takes it away."""

    target: Any
    name: str
    value: Any

    def make(self) -> Change:
        """Make the change; returns the one that takes it back."""
        own = {"__class__": type(self.target), **vars(self.target)}
        back = Change(self.target, self.name, own.get(self.name, ABSENT))
        if self.value is not ABSENT:
            setattr(self.target, self.name, self.value)
        elif back.value is not ABSENT:
            delattr(self.target, self.name)
        return back


def make(changes: Iterable[Change]) -> None:
    """All of them; if one fails, those before it are taken back and the error goes on."""
    done: list[Change] = []
    try:
        for change in changes:
            done.append(change.make())
    except BaseException:
        for change in reversed(done):
            change.make()
        raise
