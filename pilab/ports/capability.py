"""What a bench may or may not be able to do."""

from __future__ import annotations

import enum


class Capability(enum.StrEnum):
    """
    A thing that an experiment may need; a bench without it gives SKIP, never a silent pass.
    """

    EDGE_INTERRUPTS = "edge-interrupts"
    """Edges of an input interrupt the DUT."""
    LEVEL_INTERRUPTS = "level-interrupts"
    """Levels of an input interrupt the DUT."""
    WATCH_EDGES = "watch-edges"
    """The board sees every edge of the DUT's outputs."""
    SURVIVES_CRASH = "survives-crash"
    """The bench comes back by itself after the kernel died."""
    EXACT_TIMING = "exact-timing"
    """Intervals on the wire are real time, not that of an emulator."""
    PULLS = "pulls"
    """The DUT's lines have pull resistors."""
