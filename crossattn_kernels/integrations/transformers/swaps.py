"""Attention classes that do not ask transformers' attention interface, and what takes their place."""

from __future__ import annotations

# the upstream class: ours, a subclass of it that overrides `forward`
SWAPS: dict[str, str] = {}
