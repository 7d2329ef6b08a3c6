"""Which releases of a library an integration knows."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def check(library: str, first: str, last: str) -> None:
    """ImportError, with the range, unless `library` is installed in a release from `first` to before `last`."""
    supported = f"{library} >= {first}, < {last}"
    try:
        installed = version(library)
    except PackageNotFoundError:
        raise ImportError(f"this needs {supported}: pip install '.[{library}]' in the checkout") from None
    if not _release(first) <= _release(installed) < _release(last):
        raise ImportError(f"this needs {supported}, but {installed} is installed")


def _release(text: str) -> tuple[int, int]:
    """(major, minor) of a version: (5, 23) of "5.23.0.dev0"."""
    from packaging.version import Version  # the libraries in question bring it

    return Version(text).major, Version(text).minor
