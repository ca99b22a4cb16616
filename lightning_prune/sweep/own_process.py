"""Calls in processes of their own: none takes another along, and all can be ended at any moment."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

PATIENCE = 60.0
"""Seconds that a process has to end by itself after it has answered."""
LOOK = 1.0
"""Seconds after which processes are looked at, whatever they say."""

Call = tuple[Callable[..., object], tuple[object, ...]]
"""A function and its arguments."""


class ProcessError(RuntimeError):
    """A call has come to nothing: it raised, or its process ended before it did."""


def call_apart(
    calls: Sequence[Call], at_a_time: int, environment: Mapping[str, str]
) -> Generator[tuple[int, Any], None, None]:
    """Make each call in a process that does nothing else, which ends with this one, whatever ends it.

    The processes are loky's, which starts functions of scripts without the scripts. Its executor is not used, nor are
    threads: an interrupted worker may leave half an answer, and an interrupted thread a lock, both waited for without
    end.

    Args:
        calls: to be made, in this order.
        at_a_time: how many processes there are at most, 1 or more.
        environment: variables to set in them, from their first moment.

    Yields:
        Index of a call and what it returned, or a `ProcessError` that says what went wrong, as they end. Where the
        iterator is closed before, or interrupted, all processes are killed, and all that they have started.
    """
    waiting, running = list(enumerate(calls)), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                index, call = waiting.pop(0)
                running.append(_Running(index))
                running[-1].start(call, environment)
            wait([found for process in running for found in process.signs()], timeout=LOOK)
            for process in [process for process in running if process.is_over()]:
                running.remove(process)
                process.kill()
                yield process.index, process.answer
    finally:
        for process in running:
            process.kill()


class _Running:
    """A process that makes one call.

    Args:
        index: of the call.
    """

    def __init__(self, index: int) -> None:
        self.index, self.deadline = index, float("inf")
        self.answer: Any = None
        self.process: Any = None
        self.connection: Any = None
        self.is_silent = False

    def start(self, call: Call, environment: Mapping[str, str]) -> None:
        """Start the process, and hand it its call."""
        from joblib.externals.loky.backend import get_context
        from joblib.externals.loky.backend.reduction import dumps

        context = get_context("loky")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), env=dict(environment))
        with theirs, _interrupts_blocked():
            self.process.start()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is over, which is seen soon
            self.connection.send_bytes(dumps(call))

    def signs(self) -> list[Any]:
        """Return what is to be waited for: its end, or an answer."""
        return [self.process.sentinel] if self.is_silent else [self.process.sentinel, self.connection]

    def is_over(self) -> bool:
        """Take the answer if there is one, and say whether the process has ended, or had its time to."""
        has_ended = self.process.exitcode is not None
        if not self.is_silent and self.connection.poll():
            self.is_silent = True
            try:
                is_returned, value = self.connection.recv()
            except (EOFError, ConnectionResetError):
                pass
            except (
                Exception
            ) as error:  # what can be sent cannot always be read, as errors that ask for arguments
                self._take(ProcessError(f"its answer cannot be read: {type(error).__name__}: {error}"))
            else:
                self._take(value if is_returned else ProcessError(value))
        if has_ended and self.deadline == float("inf"):
            self.answer = ProcessError(f"its process ended before it did, {_fate(self.process.exitcode)}")
        return has_ended or time.monotonic() > self.deadline

    def _take(self, answer: Any) -> None:
        self.answer, self.deadline = answer, time.monotonic() + PATIENCE

    def kill(self) -> None:
        """Kill the process and what it has started, whatever is left of them."""
        if self.process is None or self.process.pid is None:
            return
        if hasattr(os, "killpg"):
            sends = (os.killpg, os.kill) if self.process.exitcode is None else (os.killpg,)
            for send in sends:  # it has no group of its own before it is asked
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    send(self.process.pid, signal.SIGKILL)
        else:
            self.process.terminate()
        self.process.join()
        self.connection.close()


def serve(connection: Any) -> None:
    """Make the call that is asked for in this process, and end with the process that has asked."""
    from joblib.externals.loky.backend.reduction import dumps

    if hasattr(os, "setsid"):
        os.setsid()  # what the call starts can be ended with it, and Ctrl-C is for the one that has asked
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # also one that waits since the process began
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        function, arguments = connection.recv()
        Thread(target=_end_with_caller, args=(connection,), daemon=True).start()
        answer = dumps((True, function(*arguments)))
    except BaseException as error:
        answer = dumps((False, f"{type(error).__name__}: {error}"))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody asks any more
        connection.send_bytes(answer)


def _end_with_caller(connection: Any) -> None:
    """Wait for the end of the connection: nothing more is ever sent."""
    connection.poll(None)
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Let a process that is started here know nothing of Ctrl-C until it is ready to."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _fate(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
