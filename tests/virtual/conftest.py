"""A virtual Pi for the tests: one bench per kernel and process, pristine for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pilab.store.cache import Cache

from pilab.assembly import Ready, prepare_virtual
from pilab.bench import Bench, open_bench
from pilab.virtual.machine import Machine
from pilab.virtual.snapshot import copy_disk

KERNEL = "6.1"


@pytest.fixture(scope="session")
def ready() -> Ready:
    """What a virtual Pi is started from, made once."""
    return prepare_virtual(KERNEL, Cache())


@pytest.fixture
def machine(ready: Ready, tmp_path: Path) -> Iterator[Machine]:
    """A machine that has restored its snapshot and is halted."""
    machine = Machine(ready.config, copy_disk(ready.disk, tmp_path / "disk.qcow2"))
    machine.restore()
    yield machine
    machine.close()


@pytest.fixture(scope="session")
def open_virtual_bench() -> Iterator[Bench]:
    """One bench for all tests of this process."""
    with open_bench("virt", KERNEL) as bench:
        yield bench


@pytest.fixture
def virtual_bench(open_virtual_bench: Bench) -> Bench:
    """A bench with a pristine kernel."""
    open_virtual_bench.begin("test")
    return open_virtual_bench
