"""The DUT's power and its way back to a pristine kernel."""

from __future__ import annotations

from typing import Protocol


class Power(Protocol):
    """Switches the DUT and brings it back to a state in which no module was ever loaded."""

    def on(self) -> None:
        """Switch on; nothing happens if it is on."""

    def off(self) -> None:
        """Switch off; nothing happens if it is off."""

    def pristine(self) -> None:
        """
        Give the DUT a kernel that no experiment has touched.

        Whatever ran there is gone: the agent must be greeted anew and inputs driven again.

        Raises:
            BenchError: It did not come back in time.
        """

    def starved_ns(self) -> int:
        """Return for how many ns in all the DUT wanted to run and got no processor; 0 if real."""

    def alive(self) -> bool:
        """Whether the machine itself (not its kernel) is still there."""
