"""
The agent: the program on the DUT, one file, standard library only, Python 3.9 or newer.

    python3 agent.py /dev/virtio-ports/org.pilab.agent     a virtio-serial port or a terminal line
    python3 agent.py -                                     standard streams, as SSH gives them

Three parts. *Framing*, which the host imports too: messages on a byte stream that may lose,
repeat or garble bytes. *Work*, what a request does. *Agent*, the main process: it selects on the
port and on the pipes of its workers and touches nothing else, so that no module can take it
along. Every request runs in a worker process forked beforehand. When the kernel kills a worker
the others go on, and the host learns the signal.

A worker serves again after requests that leave nothing behind (files, modules, clocks); one
that ran somebody's function or command ends, and the answer is given once it has: by then all
that it had open is closed.

A virtual DUT is put back to a snapshot in which the agent sits idle, while requests of before may
still be on their way to it. Frames therefore carry a session, made from a number of the host's
(fresh at each greeting) and one of the agent's (its clock): what was sent before can never be
taken for something sent now.
"""

from __future__ import annotations

import binascii
import errno
import fcntl
import gc
import json
import os
import select
import signal
import struct
import sys
import time

try:
    import ctypes
except ImportError:  # a reduced standard library: all but load and unload works
    ctypes = None  # type: ignore[assignment]

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing costs the DUT's slow start more than it is worth
    from collections.abc import Callable
    from typing import Any

# --- framing ------------------------------------------------------------------------

VERSION = 1
LIMIT_BYTES = 16 << 20
"""Largest payload of a frame, in bytes."""

_PREFIX = b"\xf1PL"
MAGIC = _PREFIX + b"M"
"""Begins a frame and occurs nowhere inside one: an interrupted frame ends where the next begins."""
_ESCAPED = _PREFIX + b"\0"

_HEAD = struct.Struct(">BBQIII")  # version, type, session, id, lane, length on the wire
_HEAD_HEX = 2 * _HEAD.size
HEADER_BYTES = len(MAGIC) + _HEAD_HEX + 8

HELLO = 1
"""Host greets (session: its number), agent answers (same session field)."""
PING = 2
"""Answered by the main process with its clocks."""
REQUEST = 3
"""To any worker (lane 0), to a new one that stays (lane equal to id), to that one (its lane)."""
CANCEL = 4
"""Kill the worker of request or lane `lane`; answered when it is gone."""
INPUT = 5
"""For the worker of a lane, without an answer: what is typed."""
REPLY = 6
OUTPUT = 7
"""What a terminal shows."""
LOST = 8
"""The worker ended without an answer: killed, or stuck in the kernel."""


class Frame:
    """One message as it came off the wire."""

    __slots__ = ("id", "kind", "lane", "payload", "session")

    def __init__(self, kind: int, session: int, id: int, lane: int, payload: bytes) -> None:  # noqa: A002 - the field's name on the wire
        self.kind = kind
        self.session = session
        self.id = id
        self.lane = lane
        self.payload = payload


def frame(kind: int, session: int, id: int, lane: int = 0, payload: bytes = b"") -> bytes:  # noqa: A002 - the field's name on the wire
    """
    Return a frame as it goes onto the wire.

    Raises:
        ValueError: The payload is larger than LIMIT_BYTES.
    """
    if len(payload) > LIMIT_BYTES:
        raise ValueError(f"a message of {len(payload)} bytes is over the limit of {LIMIT_BYTES}")
    body = payload.replace(_PREFIX, _ESCAPED)
    head = binascii.hexlify(_HEAD.pack(VERSION, kind, session, id, lane, len(body)))
    crc = binascii.crc32(body, binascii.crc32(head))
    return b"%b%b%08x%b" % (MAGIC, head, crc, body)


class Decoder:
    """
    Finds the frames in a stream of bytes, in pieces of any size.

    Bytes that belong to no whole frame are dropped and counted in `garbage_bytes`; `excerpt`
    holds the last of them.
    """

    def __init__(self) -> None:
        self.garbage_bytes = 0
        self.frames = 0
        self.excerpt = b""
        self._buffer = bytearray()
        self._scanned = 0

    def reset(self) -> None:
        """Forget a frame that has only partly arrived."""
        self._drop(len(self._buffer))

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that `data` completes, in order."""
        buffer = self._buffer
        buffer += data
        found: list[Frame] = []
        while self._align():
            if len(buffer) < HEADER_BYTES:
                if self._interrupted(len(buffer)):
                    continue
                break
            fields = self._header()
            if fields is None:
                self._drop(len(MAGIC))
                continue
            kind, session, number, lane, end, crc = fields
            if self._interrupted(end):
                continue
            if len(buffer) < end:
                self._scanned = len(buffer) - len(MAGIC) + 1
                break
            head_end = len(MAGIC) + _HEAD_HEX
            body = bytes(buffer[HEADER_BYTES:end])
            if binascii.crc32(body, binascii.crc32(buffer[len(MAGIC) : head_end])) != crc:
                self._drop(len(MAGIC))
                continue
            del buffer[:end]
            self._scanned = 0
            self.frames += 1
            found.append(Frame(kind, session, number, lane, body.replace(_ESCAPED, _PREFIX)))
        return found

    def _align(self) -> bool:
        """Drop what is before the next MAGIC; return whether there is one."""
        buffer = self._buffer
        if buffer.startswith(MAGIC):
            return True
        start = buffer.find(MAGIC)
        if start < 0:  # its first bytes may be the last ones here
            start = len(buffer) - max(
                n for n in range(len(MAGIC)) if MAGIC.startswith(buffer[len(buffer) - n :])
            )
            self._drop(start)
            return False
        self._drop(start)
        return True

    def _interrupted(self, end: int) -> bool:
        """Drop a frame inside which the next one begins; return whether it was so."""
        again = self._buffer.find(MAGIC, max(self._scanned, len(MAGIC)), end)
        if again < 0:
            return False
        self._drop(again)
        return True

    def _header(self) -> tuple[int, int, int, int, int, int] | None:
        try:
            raw = binascii.unhexlify(self._buffer[len(MAGIC) : HEADER_BYTES])
        except ValueError:
            return None
        version, kind, session, number, lane, length = _HEAD.unpack_from(raw)
        if version != VERSION or length > LIMIT_BYTES + LIMIT_BYTES // 2:
            return None
        crc = int.from_bytes(raw[_HEAD.size :], "big")
        return kind, session, number, lane, HEADER_BYTES + length, crc

    def _drop(self, count: int) -> None:
        if count:
            self.garbage_bytes += count
            self.excerpt = (self.excerpt + bytes(self._buffer[:count]))[-64:]
            del self._buffer[:count]
        self._scanned = 0


_SIZES = struct.Struct("<III")  # length of the JSON text, number of attachments, mark


def pack(value: Any) -> bytes:
    """
    Return a value as a payload: JSON, with every bytes object attached raw.

    Args:
        value: None, bool, int, float, str, bytes, list, tuple (becomes a list), dict with str keys.

    Raises:
        TypeError, ValueError: It holds something else.
    """
    mark = 0
    while True:
        key = f"\0{mark}"
        blobs: list[bytes] = []

        def attach(item: Any, key: str = key, blobs: list[bytes] = blobs) -> dict[str, int]:
            if not isinstance(item, (bytes, bytearray, memoryview)):
                raise TypeError(f"{type(item).__name__} cannot be sent between host and DUT")
            blobs.append(bytes(item))
            return {key: len(blobs) - 1}

        text = json.dumps(value, separators=(",", ":"), default=attach)
        if text.count(f'"\\u0000{mark}":') == len(blobs):
            break
        mark += 1  # a dict of the value's own has the very key that marks attachments
    sizes = struct.pack(f"<{len(blobs)}I", *map(len, blobs))
    return b"".join([_SIZES.pack(len(text), len(blobs), mark), sizes, text.encode(), *blobs])


def unpack(payload: bytes) -> Any:
    """
    Return the value that `pack` made a payload of.

    Raises:
        ValueError: It is no such payload.
    """
    try:
        length, count, mark = _SIZES.unpack_from(payload)
        sizes = struct.unpack_from(f"<{count}I", payload, _SIZES.size)
    except struct.error as error:
        raise ValueError(f"a payload too short: {error}") from None
    position = _SIZES.size + 4 * count
    text = payload[position : position + length]
    if not count:
        return json.loads(text)
    position += length
    blobs = []
    for size in sizes:
        blobs.append(payload[position : position + size])
        position += size
    key = f"\0{mark}"
    return json.loads(text, object_hook=lambda d: blobs[d[key]] if key in d else d)


# --- work: what a request does, in a worker -----------------------------------------

_FINIT_MODULE, _DELETE_MODULE = (273, 106) if os.uname().machine == "aarch64" else (313, 176)
_OUTPUT_LIMIT_BYTES = 7 << 20
_TERMINAL_WINDOW_BYTES = 256 << 10
_TIOCSWINSZ = 0x5414
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class CallError(Exception):
    """A system call failed."""

    def __init__(self, number: int, call: str, subject: str) -> None:
        super().__init__(number, call, subject)
        self.reply = {"errno": number, "call": call, "subject": subject}


class AlarmError(BaseException):
    """The time of a request is over; not an Exception, so that no function swallows it."""


def _sys(call: str, subject: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except OSError as error:
        raise CallError(error.errno or errno.EIO, call, subject) from None


def _syscall(call: str, subject: str, number: int, *args: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if libc.syscall(ctypes.c_long(number), *args) < 0:
        raise CallError(ctypes.get_errno(), call, subject)


def _image_descriptor(image: bytes, name: str) -> int:
    """Return a descriptor of a file with these bytes that nobody has open for writing."""
    # The kernel refuses a module file that is open for writing (ETXTBSY).
    fd = os.memfd_create(name + ".ko")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(image)
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


def load(image: bytes, name: str, params: str) -> None:
    """finit_module(2)."""
    fd = _sys("memfd_create", name, _image_descriptor, image, name)
    try:
        text = ctypes.c_char_p(params.encode())
        _syscall("finit_module", name, _FINIT_MODULE, ctypes.c_int(fd), text, ctypes.c_int(0))
    finally:
        os.close(fd)


def unload(name: str) -> None:
    """delete_module(2) with O_NONBLOCK."""
    text = ctypes.c_char_p(name.encode())
    _syscall("delete_module", name, _DELETE_MODULE, text, ctypes.c_int(os.O_NONBLOCK))


def read_file(path: str, limit: int) -> bytes:
    """Open, read to the end or to `limit` bytes, close."""
    fd = _sys("open", path, os.open, path, os.O_RDONLY)
    parts = []
    try:
        while limit > 0:
            part = _sys("read", path, os.read, fd, min(limit, 1 << 17))
            if not part:
                break
            parts.append(part)
            limit -= len(part)
    finally:
        os.close(fd)
    return b"".join(parts)


def write_file(path: str, data: bytes, create: bool, mode: int) -> int:
    """Open, one write(2), close."""
    flags = os.O_WRONLY | (os.O_CREAT | os.O_TRUNC if create else 0)
    mask = os.umask(0)
    try:
        fd = _sys("open", path, os.open, path, flags, mode)
    finally:
        os.umask(mask)
    try:
        written: int = _sys("write", path, os.write, fd, data)
    except CallError:
        os.close(fd)
        raise
    _sys("close", path, os.close, fd)
    return written


def list_directory(path: str) -> list[str]:
    """Names in a directory, sorted."""
    return sorted(_sys("listdir", path, os.listdir, path))


def exists(path: str) -> bool:
    """Whether there is such a name, be it a dangling link."""
    return os.path.lexists(path)


def printk_clock(rounds: int) -> list[int]:
    """
    Write markers into the kernel's log and read back the time it gave them.

    Returns:
        CLOCK_MONOTONIC before and after, ns, and printk's own time, us, of the tightest round.
    """
    path = "/dev/kmsg"
    log = _sys("open", path, os.open, path, os.O_RDONLY | os.O_NONBLOCK)
    pen = _sys("open", path, os.open, path, os.O_WRONLY)
    best: list[int] = []
    try:
        for n in range(rounds):
            # Without its line end a record may still grow, and is kept from readers.
            marker = b"pilab-agent: clock %d.%d\n" % (os.getpid(), n)
            _sys("lseek", path, os.lseek, log, 0, os.SEEK_END)
            before = time.monotonic_ns()
            _sys("write", path, os.write, pen, b"<7>" + marker)
            after = time.monotonic_ns()
            record = b""
            while marker not in record:
                record = _sys("read", path, os.read, log, 8192)
            printk_us = int(record.split(b",", 3)[2])
            if not best or after - before < best[1] - best[0]:
                best = [before, after, printk_us]
    finally:
        os.close(log)
        os.close(pen)
    return best


def run(argv: list[str], stdin: bytes) -> dict[str, Any]:
    """Run a command to its end; what it leaves in its process group dies with this worker."""
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    actions = [
        (os.POSIX_SPAWN_DUP2, in_read, 0),
        (os.POSIX_SPAWN_DUP2, out_write, 1),
        (os.POSIX_SPAWN_DUP2, err_write, 2),
    ]
    pid = _sys(
        "execve",
        argv[0],
        lambda: os.posix_spawnp(
            argv[0],
            argv,
            os.environ,
            file_actions=actions,
            setsigdef=[signal.SIGPIPE, signal.SIGALRM],
        ),
    )
    for fd in (in_read, out_write, err_write):
        os.close(fd)
    outputs: dict[int, list[bytes]] = {out_read: [], err_read: []}
    status = _pump(pid, in_write, stdin, outputs)
    return {
        "status": status,
        "stdout": b"".join(outputs[out_read]),
        "stderr": b"".join(outputs[err_read]),
    }


def _pump(pid: int, in_write: int, stdin: bytes, outputs: dict[int, list[bytes]]) -> int:
    """Feed and read a command until it has ended; return its status."""
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    for fd in (in_write, *outputs):
        os.set_blocking(fd, False)
        poll.register(fd, select.POLLOUT if fd == in_write else select.POLLIN)
    rest = memoryview(stdin)
    total = 0
    alive = True
    while alive:
        ready = dict(poll.poll())
        alive = ended not in ready  # and one last look at what it wrote
        if in_write in ready:
            try:
                rest = rest[os.write(in_write, rest[: 1 << 16]) :] if rest else rest
            except BrokenPipeError:
                rest = memoryview(b"")
            if not rest:
                poll.unregister(in_write)
                os.close(in_write)
                in_write = -1
        for fd, parts in outputs.items():
            while True:
                try:
                    part = os.read(fd, 1 << 16)
                except BlockingIOError:
                    break
                if not part:
                    if fd in ready:
                        poll.unregister(fd)
                    break
                parts.append(part)
                total += len(part)
                if total > _OUTPUT_LIMIT_BYTES:
                    raise CallError(errno.EFBIG, "read", "the command's output")
    return _status(os.waitpid(pid, 0)[1])


def _status(status: int) -> int:
    """An exit status; negative: the signal that ended it."""
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


_TO_WORKER = struct.Struct("<IQII")  # length, session, id, lane
_TO_MAIN = struct.Struct("<IBI")  # length, fate, id
_SERVES_AGAIN, _ENDS, _STAYS, _GOES_ON = range(4)
"""What becomes of a worker after a message to the main process."""


class Work:
    """
    A worker: takes requests from the main process, one after the other, and answers.

    Args:
        requests: Descriptor to read requests from.
        replies: Descriptor to write replies to.
    """

    _REUSABLE = frozenset(
        ["load", "unload", "read_file", "write_file", "list_directory", "exists", "printk_clock"]
    )

    def __init__(self, requests: int, replies: int) -> None:
        self._requests = requests
        self._replies = replies
        self._buffer = bytearray()
        self._session = self._id = self._lane = 0
        self._pid = os.getpid()
        self._armed = False
        self._names: dict[str, Any] = {"__name__": "pilab_call"}
        self._sources: dict[str, str] = {}
        self._operations: dict[str, Callable[..., Any]] = {
            "load": load,
            "unload": unload,
            "read_file": read_file,
            "write_file": write_file,
            "list_directory": list_directory,
            "exists": exists,
            "printk_clock": printk_clock,
            "run": run,
            "call": self._call,
            "process": os.getpid,
            "terminal": self._terminal,
            "open": lambda path, flags: _sys("open", path, os.open, path, flags, 0o644),
            "close": lambda subject, fd: _sys("close", subject, os.close, fd),
            "read": lambda subject, fd, size: _sys("read", subject, os.read, fd, size),
            "write": lambda subject, fd, data: _sys("write", subject, os.write, fd, data),
            "lseek": lambda subject, *args: _sys("lseek", subject, os.lseek, *args),
            "ioctl": self._ioctl,
            "poll": self._poll,
        }
        signal.signal(signal.SIGALRM, self._ring)

    def serve(self) -> None:
        """Serve until the main process goes away, or until a request uses this worker up."""
        while True:
            payload = self._next()
            if payload is None:
                return
            name, args, timeout_s = unpack(payload)
            answer = self._answer(name, args, timeout_s)
            if os.getpid() != self._pid:
                return  # a child that a function forked and forgot
            if self._lane and name != "terminal":
                fate = _STAYS
            else:
                fate = _SERVES_AGAIN if name in self._REUSABLE else _ENDS
            try:
                message = frame(REPLY, self._session, self._id, self._lane, pack(answer))
            except (TypeError, ValueError) as error:
                answer = self._trouble(error)
                message = frame(REPLY, self._session, self._id, self._lane, pack(answer))
            self._send(fate, message)
            if fate == _ENDS:
                return

    def _answer(self, name: str, args: list[Any], timeout_s: float | None) -> dict[str, Any]:
        try:
            self._armed = timeout_s is not None
            if timeout_s is not None:
                signal.setitimer(signal.ITIMER_REAL, max(timeout_s, 1e-6))
            try:
                return {"value": self._operations[name](*args)}
            finally:
                self._armed = False
                if timeout_s is not None:
                    signal.setitimer(signal.ITIMER_REAL, 0)
        except CallError as error:
            return error.reply
        except AlarmError:
            return {"timeout": True}
        except OSError as error:
            if error.errno is None:
                return self._trouble(error)
            subject = os.fsdecode(error.filename) if error.filename else ""
            return {"errno": error.errno, "call": "", "subject": subject}
        except BaseException as error:  # noqa: BLE001 - a function may raise anything, SystemExit too
            return self._trouble(error)

    def _ring(self, *_: object) -> None:
        if self._armed:
            self._armed = False
            raise AlarmError

    def _call(self, source: str, file: str, name: str, args: list[Any]) -> Any:
        self._sources[file] = source
        code = compile(source, file, "exec", annotations.compiler_flag, True)
        exec(code, self._names)  # noqa: S102 - this is what a call is
        return self._names[name](*args)

    def _trouble(self, error: BaseException) -> dict[str, str]:
        """What a function raised, with a traceback in the check's own file and lines."""
        lines = []
        step = error.__traceback__
        while step is not None:
            code = step.tb_frame.f_code
            if code.co_filename != __file__:
                lines.append(
                    f'  File "{code.co_filename}", line {step.tb_lineno}, in {code.co_name}'
                )
                source = self._sources.get(code.co_filename, "").split("\n")
                lines += [f"    {line.strip()}" for line in source[step.tb_lineno - 1 :][:1]]
            step = step.tb_next
        kind = type(error).__name__
        return {
            "kind": kind,
            "text": str(error),
            "traceback": "\n".join([*lines, f"{kind}: {error}"]),
        }

    def _ioctl(self, subject: str, fd: int, request: int, arg: Any) -> list[Any]:
        if isinstance(arg, int):
            return [_sys("ioctl", subject, fcntl.ioctl, fd, request, arg), b""]
        buffer = bytearray(arg)
        return [_sys("ioctl", subject, fcntl.ioctl, fd, request, buffer, True), bytes(buffer)]

    def _poll(self, fd: int, events: int, timeout_ms: int) -> int:
        poll = select.poll()
        poll.register(fd, events)
        ready = poll.poll(timeout_ms)
        return ready[0][1] if ready else 0

    # --- a terminal ---

    def _terminal(self, argv: list[str], rows: int, columns: int) -> int:
        pid, master = os.forkpty()
        if pid == 0:
            try:
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                fcntl.ioctl(0, _TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
                os.environ.setdefault("TERM", "xterm")
                os.execvp(argv[0], argv)  # noqa: S606 - there is no shell on purpose
            except OSError as error:
                os.write(2, f"{argv[0]}: {error.strerror}\r\n".encode())
            finally:
                os._exit(127)
        os.set_blocking(master, False)
        ended = os.pidfd_open(pid)
        typed = bytearray()
        room = _TERMINAL_WINDOW_BYTES
        while True:
            poll = select.poll()
            poll.register(self._requests, select.POLLIN)
            poll.register(ended, select.POLLIN)
            wanted = (select.POLLIN if room > 0 else 0) | (select.POLLOUT if typed else 0)
            if wanted:
                poll.register(master, wanted)
            ready = dict(poll.poll())
            if self._requests in ready:
                payload = self._next(keep_id=True)
                while payload is not None:
                    name, value = unpack(payload)
                    if name == "send":
                        typed += value
                    elif name == "resize":
                        fcntl.ioctl(master, _TIOCSWINSZ, struct.pack("4H", *value, 0, 0))
                    else:
                        room += value
                    payload = self._next(keep_id=True) if self._has_next() else None
            if typed and ready.get(master, 0) & select.POLLOUT:
                del typed[: os.write(master, typed)]
            while room > 0 or ended in ready:
                try:
                    data = os.read(master, 1 << 14)
                except OSError:  # nothing now, or EIO: nobody has the terminal open
                    break
                room -= len(data)
                self._send(_GOES_ON, frame(OUTPUT, self._session, self._id, self._lane, data))
            if ended in ready:
                return _status(os.waitpid(pid, 0)[1])

    # --- the pipes ---

    def _has_next(self) -> bool:
        size = _TO_WORKER.size
        have = len(self._buffer)
        return have >= size and have >= size + _TO_WORKER.unpack_from(self._buffer)[0]

    def _next(self, keep_id: bool = False) -> bytes | None:
        """Wait for the next request; None: the main process is gone."""
        size = _TO_WORKER.size
        while not self._has_next():
            data = os.read(self._requests, 1 << 16)
            if not data:
                os._exit(0)
            self._buffer += data
        length, session, number, lane = _TO_WORKER.unpack_from(self._buffer)
        if not keep_id:
            self._session, self._id, self._lane = session, number, lane
        payload = bytes(self._buffer[size : size + length])
        del self._buffer[: size + length]
        return payload

    def _send(self, fate: int, message: bytes) -> None:
        rest = memoryview(_TO_MAIN.pack(len(message), fate, self._id) + message)
        while rest:
            rest = rest[os.write(self._replies, rest) :]


# --- agent: the main process --------------------------------------------------------

_SPARES = 3
_REFILL_NS = 10_000_000
_RETRY_NS = 10_000_000
_STUCK_NS = 1_000_000_000
_QUEUE_HIGH_BYTES = 4 << 20
_QUEUE_LOW_BYTES = 1 << 20
_GONE = frozenset([errno.EIO, errno.ENODEV, errno.ENXIO, errno.EBADF])


class Port:
    """
    The byte stream to the host, never blocking.

    Args:
        path: A character device, the name of a virtio port, or "-" for the standard streams.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.reader = self.writer = -1
        self.ends = path == "-"
        """Whether the end of the stream is the end of the agent."""

    def open(self) -> bool:
        """Open it; False: it is not there yet, or somebody else has it."""
        if self.ends:
            self.reader, self.writer = os.dup(0), os.dup(1)
        else:
            self.close()
            try:
                flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY
                self.reader = self.writer = os.open(_port_device(self.path), flags)
            except OSError:
                return False
            if os.isatty(self.reader):
                import termios  # only here: the reduced standard library may lack it
                import tty

                tty.setraw(self.reader, termios.TCSANOW)
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)
        return True

    def close(self) -> None:
        """Close it. Idempotent."""
        if self.reader >= 0:
            os.close(self.reader)
        self.reader = self.writer = -1


def _port_device(path: str) -> str:
    """Where a virtio port is when no udev made its link."""
    ports = "/sys/class/virtio-ports"
    if path.startswith("/dev/virtio-ports/") and not os.path.exists(path) and os.path.isdir(ports):
        for device in os.listdir(ports):
            try:
                with open(f"{ports}/{device}/name") as file:
                    if file.read().strip() == path.rpartition("/")[2]:
                        return f"/dev/{device}"
            except OSError:
                continue
    return path


class Worker:
    """A worker as the main process sees it."""

    __slots__ = (
        "dead_at_ns",
        "held",
        "incoming",
        "killers",
        "lane",
        "open",
        "pending",
        "pid",
        "pidfd",
        "reader",
        "requests",
        "writer",
    )

    def __init__(self, pid: int, reader: int, writer: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.reader = reader
        self.writer = writer
        self.open = True
        self.lane = 0
        self.requests: list[int] = []
        self.killers: list[int] = []
        self.incoming = bytearray()
        self.pending = bytearray()
        self.held: bytes | None = None
        self.dead_at_ns = 0


class Agent:
    """
    The main process.

    Args:
        port: The stream to the host.
        spares: How many idle workers to keep.
    """

    def __init__(self, port: Port, spares: int = _SPARES) -> None:
        self._port = port
        self._spares = spares
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._decoder = Decoder()
        self._out = bytearray()
        self._writing = False
        self._paused = False
        self._retry_at_ns = 0
        self._refill_at_ns = 0
        self._greeting: int | None = None
        self._session = 0
        self._idle: list[Worker] = []
        self._busy: dict[int, Worker] = {}
        self._lanes: dict[int, Worker] = {}
        self._workers: dict[int, Worker] = {}
        self._dying: list[Worker] = []
        try:
            cmdline = read_file("/proc/cmdline", 1 << 14).decode(errors="replace").strip()
        except CallError:
            cmdline = ""
        self._self = {
            "python": sys.version.split()[0],
            "release": os.uname().release,
            "machine": os.uname().machine,
            "pid": os.getpid(),
            "cmdline": cmdline,
        }

    def serve(self) -> None:
        """Serve for ever, or until the standard streams end."""
        while len(self._idle) < self._spares:
            self._fork()
        self._connect()
        while not (self._port.ends and self._port.reader < 0):
            for fd, mask in self._poll.poll(self._timeout_ms()):
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler(mask)
            self._on_time()
        for worker in list(self._workers.values()):
            self._kill(worker)

    # --- time ---

    def _timeout_ms(self) -> int | None:
        if len(self._idle) < self._spares and not self._refill_at_ns:
            self._refill_at_ns = time.monotonic_ns() + _REFILL_NS
        times = [w.dead_at_ns for w in self._dying]
        times += [t for t in (self._retry_at_ns, self._refill_at_ns) if t]
        if not times:
            return None
        return max(0, (min(times) - time.monotonic_ns()) // 1_000_000 + 1)

    def _on_time(self) -> None:
        if not (self._dying or self._retry_at_ns or self._refill_at_ns):
            return
        now_ns = time.monotonic_ns()
        if self._retry_at_ns and now_ns >= self._retry_at_ns:
            self._retry_at_ns = 0
            self._connect()
        if self._refill_at_ns and now_ns >= self._refill_at_ns:
            self._refill_at_ns = 0
            if len(self._idle) < self._spares:
                self._fork()
        for worker in [w for w in self._dying if now_ns >= w.dead_at_ns]:
            self._dying.remove(worker)  # it sits in the kernel and cannot die
            self._lost(worker, {"lost": "stuck", "pid": worker.pid})

    # --- the port ---

    def _connect(self) -> None:
        if self._port.reader < 0 and not self._port.open():
            self._retry_at_ns = time.monotonic_ns() + _RETRY_NS
            return
        self._watch(self._port.reader, select.POLLIN, self._on_port)

    def _disconnected(self, number: int = 0) -> None:
        """Nobody listens: look again in a while, for poll would return at once."""
        self._decoder.reset()
        self._out.clear()
        self._unwatch(self._port.reader)
        if self._writing and self._port.writer != self._port.reader:
            self._unwatch(self._port.writer)
        self._writing = False
        if self._port.ends or number in _GONE:
            self._port.close()
        self._retry_at_ns = time.monotonic_ns() + _RETRY_NS
        self._pause()

    def _on_port(self, mask: int) -> None:
        if mask & ~select.POLLOUT:
            parts = []
            size = 0
            try:
                while size < 1 << 20:
                    part = os.read(self._port.reader, 1 << 16)
                    if not part:
                        break
                    parts.append(part)
                    size += len(part)
                    if len(part) < 4096:  # the size of virtio's buffers: there is no more now
                        break
            except BlockingIOError:
                pass
            except OSError as error:
                self._disconnected(error.errno or 0)
                return
            else:
                if not parts:
                    self._disconnected()
                    return
            for message in self._decoder.feed(b"".join(parts)):
                self._on_frame(message)
        if mask & select.POLLOUT:
            self._flush()

    def _on_writable(self, _: int) -> None:
        self._flush()

    def _say(self, message: bytes) -> None:
        if self._retry_at_ns and self._port.reader not in self._handlers:
            return  # nobody listens
        self._out += message
        if not self._writing:
            self._flush()

    def _flush(self) -> None:
        out = self._out
        try:
            while out:
                with memoryview(out) as view:
                    sent = os.write(self._port.writer, view[: 1 << 16])
                del out[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            self._disconnected(error.errno or 0)
            return
        if self._writing != bool(out):
            self._writing = bool(out)
            if self._port.writer == self._port.reader:
                wanted = select.POLLIN | (select.POLLOUT if out else 0)
                self._watch(self._port.reader, wanted, self._on_port)
            elif out:
                self._watch(self._port.writer, select.POLLOUT, self._on_writable)
            else:
                self._unwatch(self._port.writer)
        self._pause()

    def _pause(self) -> None:
        """Let the workers wait while the host does not keep up."""
        if self._paused == (
            len(self._out) > (_QUEUE_LOW_BYTES if self._paused else _QUEUE_HIGH_BYTES)
        ):
            return
        self._paused = not self._paused
        for worker in self._workers.values():
            if worker.open:
                self._watch_replies(worker)

    # --- frames ---

    def _on_frame(self, message: Frame) -> None:
        if message.kind == HELLO:
            self._greet(message)
        elif message.session != self._session or self._greeting is None:
            return  # from before the DUT was restored, or from another host
        elif message.kind == PING:
            clocks = [time.monotonic_ns(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)]
            self._say(frame(REPLY, self._session, message.id, 0, pack({"value": clocks})))
        elif message.kind == REQUEST:
            self._request(message)
        elif message.kind == INPUT:
            worker = self._lanes.get(message.lane)
            if worker is not None:
                self._give(worker, message)
        elif message.kind == CANCEL:
            worker = self._lanes.get(message.lane) or self._busy.get(message.lane)
            if worker is None:
                self._say(frame(REPLY, self._session, message.id, 0, pack({"value": None})))
            else:
                worker.killers.append(message.id)
                self._kill(worker)

    def _greet(self, message: Frame) -> None:
        if message.session != self._greeting:
            self._greeting = message.session
            self._session = (message.session + time.monotonic_ns()) & (1 << 64) - 1
            self._out.clear()
            for worker in {*self._busy.values(), *self._lanes.values()}:
                worker.requests.clear()
                worker.killers.clear()
                self._kill(worker)
            self._busy.clear()
            self._lanes.clear()
        if not self._dying:  # else at the next greeting: what they have open may be in the way
            told = {"value": dict(self._self, session=self._session)}
            self._say(frame(HELLO, message.session, message.id, 0, pack(told)))

    def _request(self, message: Frame) -> None:
        worker = self._lanes.get(message.lane)
        if worker is None:
            if message.lane not in (0, message.id):
                payload = pack({"lost": "ended"})
                self._say(frame(LOST, self._session, message.id, message.lane, payload))
                return
            if not self._idle:
                self._fork()
            worker = self._idle.pop()
            worker.lane = message.lane
            if message.lane:
                self._lanes[message.lane] = worker
        self._busy[message.id] = worker
        worker.requests.append(message.id)
        self._give(worker, message)

    # --- workers ---

    def _fork(self) -> None:
        to_worker, to_worker_end = os.pipe()
        from_worker_end, from_worker = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                top = max(*self._handlers, self._port.reader, to_worker_end, from_worker)
                _become_worker(to_worker, from_worker, top)
            finally:
                os._exit(70)
        os.close(to_worker)
        os.close(from_worker)
        os.set_blocking(to_worker_end, False)
        os.set_blocking(from_worker_end, False)
        worker = Worker(pid, from_worker_end, to_worker_end)
        self._workers[pid] = worker
        self._idle.insert(0, worker)
        self._watch(worker.pidfd, select.POLLIN, lambda _: self._on_exit(worker))
        self._watch_replies(worker)

    def _watch_replies(self, worker: Worker) -> None:
        if self._paused:
            self._unwatch(worker.reader)
        else:
            self._watch(worker.reader, select.POLLIN, lambda _: self._on_replies(worker))

    def _give(self, worker: Worker, message: Frame) -> None:
        head = _TO_WORKER.pack(len(message.payload), message.session, message.id, message.lane)
        idle = not worker.pending
        worker.pending += head + message.payload
        if idle:
            self._feed(worker)

    def _feed(self, worker: Worker) -> None:
        try:
            while worker.pending:
                with memoryview(worker.pending) as view:
                    taken = os.write(worker.writer, view[: 1 << 16])
                del worker.pending[:taken]
        except BlockingIOError:
            self._watch(worker.writer, select.POLLOUT, lambda _: self._feed(worker))
            return
        except BrokenPipeError:  # it died; its end will be seen
            worker.pending.clear()
        self._unwatch(worker.writer)

    def _on_replies(self, worker: Worker) -> None:
        incoming = worker.incoming
        try:
            data = os.read(worker.reader, 1 << 20)
        except BlockingIOError:
            return
        if not data:
            worker.open = False
            self._unwatch(worker.reader)
            return
        incoming += data
        size = _TO_MAIN.size
        while len(incoming) >= size:
            length, fate, number = _TO_MAIN.unpack_from(incoming)
            if len(incoming) < size + length:
                return
            message = bytes(incoming[size : size + length])
            del incoming[: size + length]
            if number not in worker.requests:
                continue  # of a session that is over
            if fate == _GOES_ON:
                self._say(message)
            elif fate == _ENDS:
                worker.held = message
            else:
                worker.requests.remove(number)
                self._busy.pop(number, None)
                self._say(message)
                if fate == _SERVES_AGAIN and worker not in self._dying:
                    self._idle.append(worker)

    def _kill(self, worker: Worker) -> None:
        if not worker.dead_at_ns:
            worker.dead_at_ns = time.monotonic_ns() + _STUCK_NS
            self._dying.append(worker)
        _kill_group(worker.pid)

    def _on_exit(self, worker: Worker) -> None:
        while worker.open:
            self._on_replies(worker)
        _kill_group(worker.pid)  # what it left behind
        status = _status(os.waitpid(worker.pid, 0)[1])
        for fd in (worker.pidfd, worker.reader, worker.writer):
            self._unwatch(fd)
            os.close(fd)
        del self._workers[worker.pid]
        for workers in (self._idle, self._dying):
            if worker in workers:
                workers.remove(worker)
        if worker.held is not None and status == 0 and worker.requests:
            self._busy.pop(worker.requests.pop(0), None)
            self._say(worker.held)
        how = (
            {"lost": "killed", "signal": -status}
            if status < 0
            else {"lost": "exited", "status": status}
        )
        self._lost(worker, how)

    def _lost(self, worker: Worker, how: dict[str, Any]) -> None:
        payload = pack(how)
        for number in worker.requests:
            self._busy.pop(number, None)
            self._say(frame(LOST, self._session, number, worker.lane, payload))
        for number in worker.killers:
            self._say(frame(REPLY, self._session, number, 0, pack({"value": how})))
        worker.requests.clear()
        worker.killers.clear()
        if self._lanes.get(worker.lane) is worker:
            del self._lanes[worker.lane]

    # --- poll ---

    def _watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        self._poll.register(fd, events)
        self._handlers[fd] = handler

    def _unwatch(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)


def _kill_group(pid: int) -> None:
    """SIGKILL a worker and its children, also one that has not become a leader yet."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _become_worker(requests: int, replies: int, top: int) -> None:
    os.setsid()
    # Nothing of the main process may stay open here: its death must be seen as the pipe's end.
    for fd in range(3, top + 1):
        if fd not in (requests, replies):
            try:
                os.close(fd)
            except OSError:
                continue
    Work(requests, replies).serve()
    os._exit(0)


def _name_process(name: str) -> None:
    """So that a crash's "Comm:" tells who it was."""
    try:
        with open("/proc/self/comm", "w") as file:
            file.write(name)
    except OSError:
        pass


def main(argv: list[str]) -> int:
    """Serve on the port that the command line names."""
    if len(argv) != 2:
        sys.stderr.write("usage: agent.py PORT|-\n")
        return 2
    port = Port(argv[1])
    if port.ends:
        port.open()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    os.environ.setdefault("PATH", _PATH)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _name_process("pilab-agent")
    gc.collect()
    gc.freeze()  # what is shared with the workers stays shared
    Agent(port).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
