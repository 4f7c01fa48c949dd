"""Reading what /proc says, and parameters as finit_module wants them."""

from __future__ import annotations

import pytest

from pilab.checks.interrupts import InterruptCounter, InterruptRow, parse_interrupts
from pilab.checks.modules import LoadedModule, format_parameters, parse_modules
from pilab.clock import Deadline
from pilab.errors import CheckError

PROC_INTERRUPTS = """\
           CPU0       CPU1
 11:       1532       1420     GICv2  27 Level     arch_timer
 24:          7          0     GICv2  78 Edge      virtio0
 45:          2          1  9030000.pl061   0 Edge      pilab-a, pilab-b
 46:          0          0  9030000.pl061   1 Edge
IPI0:       801        765       Rescheduling interrupts
Err:          0
"""


def test_parse_interrupts_reads_numbered_rows_only() -> None:
    """Counts per processor, chip, trigger and every handler's name; IPI and Err are left out."""
    rows = parse_interrupts(PROC_INTERRUPTS)
    assert [row.irq for row in rows] == [11, 24, 45, 46]
    assert rows[2] == InterruptRow(45, (2, 1), "9030000.pl061", 0, "Edge", ("pilab-a", "pilab-b"))
    assert rows[2].total == 3
    assert rows[3].actions == ()


@pytest.mark.parametrize("text", ["", "           CPU0\n"])
def test_parse_interrupts_of_nothing_is_nothing(text: str) -> None:
    """An empty file or a header alone has no rows."""
    assert parse_interrupts(text) == []


class _Rows:
    """Rows that count one more at each reading, up to a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 10
        self.readings: list[tuple[str, int | None, int]] = []

    def read(self) -> list[InterruptRow]:
        row = InterruptRow(45, (self.count, 0), "chip", 0, "Edge", ("mine", "other"))
        self.count = min(self.count + 1, 10 + self.limit)
        return [row]

    def note(self, name: str, irq: int | None, count: int) -> None:
        self.readings.append((name, irq, count))


def _counter(rows: _Rows, name: str = "mine") -> InterruptCounter:
    return InterruptCounter(name, rows.read, Deadline, rows.note)


def test_counter_counts_from_its_own_start() -> None:
    """What was counted before the counter was made does not count."""
    rows = _Rows(limit=5)
    counter = _counter(rows)
    assert counter.since_start() == 1
    assert rows.readings[0] == ("mine", 45, 10)


def test_counter_waits_until_the_count_is_reached() -> None:
    """An interrupt that is still on its way is waited for."""
    _counter(_Rows(limit=3)).expect(3, within_s=5)


@pytest.mark.parametrize("limit", [2, 9])
def test_counter_refuses_fewer_and_more(limit: int) -> None:
    """Fewer interrupts in time and more than wanted are both wrong, and both are named."""
    rows = _Rows(limit)
    counter = _counter(rows)
    rows.count = 10 + limit
    with pytest.raises(CheckError) as caught:
        counter.expect(3, within_s=0.01)
    assert caught.value.wanted == "exactly 3"
    assert caught.value.seen == str(limit)


def test_counter_without_a_row_says_so() -> None:
    """A name that nobody registered has no row, and the failure says that."""
    counter = _counter(_Rows(limit=1), "absent")
    assert counter.row is None
    with pytest.raises(CheckError) as caught:
        counter.expect(1, within_s=0.01)
    assert caught.value.seen == "no such row"


def test_parse_modules_reads_users_state_and_taint() -> None:
    """Refcount, users, state and taint come from the fields that the kernel prints."""
    modules = parse_modules(
        "pilab_b 16384 0 - Live 0xffff800008000000 (OE)\n"
        "pilab_a 16384 1 pilab_b, Live 0xffff800008010000 (OE)\n"
        "core 20480 - - Loading 0x0\n"
    )
    assert modules["pilab_b"].users == ()
    assert modules["pilab_b"].taint == "OE"
    assert modules["pilab_a"].refcount == 1
    assert modules["pilab_a"].users == ("pilab_b",)
    assert modules["core"].refcount == -1
    assert modules["core"].state == "Loading"


def test_format_parameters_writes_what_insmod_takes() -> None:
    """Lists get commas, booleans Y or N, text with blanks quotes; words stay as they are."""
    text = format_parameters(["raw=1"], {"n": 3, "on": True, "list": [1, 2], "s": "two words"})
    assert text == 'raw=1 n=3 on=Y list=1,2 s="two words"'
    assert format_parameters([], {}) == ""


def test_loaded_module_is_unloaded_once() -> None:
    """Leaving the block unloads, unless that was done or the block failed."""
    calls: list[str] = []
    with LoadedModule("m", lambda: calls.append("with")):
        pass
    with LoadedModule("m", lambda: calls.append("early")) as module:
        module.unload()
        assert not module.loaded
    with pytest.raises(KeyError), LoadedModule("m", lambda: calls.append("never")):
        raise KeyError
    assert calls == ["with", "early"]
