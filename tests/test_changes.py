"""All of the changes or none, and each can be taken back."""

from types import SimpleNamespace

import pytest

from crossattn_kernels.integrations.changes import ABSENT, Change, make


def test_changes_and_their_way_back():
    thing = SimpleNamespace(a=1, b=2)
    back = [Change(thing, "a", 3).make(), Change(thing, "b", ABSENT).make(), Change(thing, "c", 4).make()]
    assert vars(thing) == dict(a=3, c=4)
    make(reversed(back))
    assert vars(thing) == dict(a=1, b=2)
    make([Change(thing, "c", ABSENT)])  # is not there, as wanted
    assert vars(thing) == dict(a=1, b=2)


def test_an_error_takes_everything_back():
    thing = SimpleNamespace(a=1)

    def changes():
        yield Change(thing, "a", 2)
        yield Change(thing, "a", thing.a + 1)  # sees what was made before
        assert thing.a == 3
        raise KeyError

    with pytest.raises(KeyError):
        make(changes())
    assert vars(thing) == dict(a=1)
