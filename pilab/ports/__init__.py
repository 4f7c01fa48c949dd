"""What a backend must do: protocols that import nothing but the core."""

from pilab.ports.board import Board, BoardEdge, EdgeSink
from pilab.ports.capability import Capability
from pilab.ports.channel import Channel
from pilab.ports.console import Console, ConsoleSink
from pilab.ports.power import Power
from pilab.ports.target import ClockMap, Completed, DutCall, DutProcess, Target, Terminal

__all__ = [
    "Board",
    "BoardEdge",
    "Capability",
    "Channel",
    "ClockMap",
    "Completed",
    "Console",
    "ConsoleSink",
    "DutCall",
    "DutProcess",
    "EdgeSink",
    "Power",
    "Target",
    "Terminal",
]
