"""What an experiment says of itself: the arguments of the `experiment` marker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from pilab.ports import Capability


@dataclass(frozen=True)
class Experiment:
    """
    One topic of the curriculum.

    Args:
        name: "irq-button".
        chapter: The guide's chapter, as people read it: "Interrupts".
        module: Folder under kmod/; the module it is about.
        topic: What it teaches, one line.
        needs: What the bench must be able to do.
        destructive: Whether the kernel does not survive it.
    """

    name: str
    chapter: str
    module: str
    topic: str
    needs: tuple[Capability, ...]
    destructive: bool


def experiment(
    name: str,
    *,
    chapter: str,
    module: str,
    topic: str = "",
    needs: Sequence[Capability] = (),
    destructive: bool = False,
) -> pytest.MarkDecorator:
    """Mark a test as an experiment; arguments as those of `Experiment`."""
    return pytest.mark.experiment(
        Experiment(name, chapter, module, topic, tuple(needs), destructive)
    )


def experiment_of(item: Any) -> Experiment | None:
    """Return the experiment that a test item or function definition is; None if it is none."""
    marker = item.get_closest_marker("experiment")
    return None if marker is None else marker.args[0]
