"""Waiting on the timeline."""

from __future__ import annotations

import threading

from pilab.clock import Deadline
from pilab.events import Event, Note
from pilab.timeline import Timeline


def _note(text: str) -> Note:
    return Note(t_ns=0, text=text)


def test_add_labels_events_and_tells_every_sink_in_order() -> None:
    """An event gets DUT and experiment unless it has them; sinks hear all, in order."""
    timeline = Timeline("6.1-0")
    heard: list[Event] = []
    timeline.add_sink(heard.append)
    timeline.experiment = "hello"
    first = timeline.add(_note("one"))
    second = timeline.add(Note(t_ns=0, dut="other", experiment="else", text="two"))
    timeline.remove_sink(heard.append)
    timeline.add(_note("three"))
    assert (first.dut, first.experiment) == ("6.1-0", "hello")
    assert (second.dut, second.experiment) == ("other", "else")
    assert heard == [first, second]


def test_wait_does_not_count_what_was_there_before() -> None:
    """Without a mark only what is added from now on satisfies a wait."""
    timeline = Timeline()
    timeline.add(_note("old"))
    assert timeline.wait(lambda e: True, Deadline(0)) is None
    assert timeline.wait(lambda e: True, Deadline(0), mark=0) is not None


def test_wait_wakes_on_an_event_of_another_thread() -> None:
    """A waiter gets the first event that matches, though others come before it."""
    timeline = Timeline()
    mark = timeline.mark()

    def add() -> None:
        for text in ("no", "not yet", "now", "later"):
            timeline.add(_note(text))

    thread = threading.Thread(target=add)
    thread.start()
    found = timeline.wait(lambda e: isinstance(e, Note) and e.text == "now", Deadline(10), mark)
    thread.join()
    assert isinstance(found, Note)
    assert found.text == "now"
    assert [e.text for e in timeline.since(mark) if isinstance(e, Note)][-1] == "later"


def test_wait_gives_up_at_its_deadline() -> None:
    """A wait that nothing satisfies ends with None."""
    timeline = Timeline()
    assert timeline.wait(lambda e: True, Deadline(0.01)) is None


def test_forget_empties_memory_but_not_the_sinks() -> None:
    """Between experiments the memory is dropped."""
    timeline = Timeline()
    heard: list[Event] = []
    timeline.add_sink(heard.append)
    timeline.add(_note("one"))
    timeline.forget()
    assert timeline.since(0) == ()
    assert timeline.mark() == 0
    assert len(heard) == 1
