"""Calls in processes of their own, for real: what they answer, and how they end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest

from lightning_prune.sweep import own_process
from lightning_prune.sweep.own_process import ProcessError, call_apart

pytestmark = pytest.mark.skipif(find_spec("joblib") is None, reason="no joblib: pip install '.[sweeps]'")


def is_alive(pid):
    """Whether a process runs: one that is dead, but that nobody has asked for yet, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def all_end(pids):
    wait_until(lambda: not any(map(is_alive, pids)))
    return True


def lengths(*values):
    return [len(value) for value in values], os.environ["OF_ITS_OWN"], os.getpid()


def leave(code):
    sys.exit(code)


def be_killed(number):
    os.kill(os.getpid(), number)


def start_another_and_wait(note, ignored=()):
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    note.write_text(f"{os.getpid()} {other.pid}\n")
    time.sleep(600)


def answer_by_half(note):
    """Begin an answer and never end it, as one does that is interrupted there."""
    from multiprocessing.connection import Connection

    (connection,) = (found for found in gc.get_objects() if isinstance(found, Connection) and found.writable)
    os.write(connection.fileno(), (1000).to_bytes(4, "big") + b"not a thousand")
    note.write_text(f"{os.getpid()}\n")
    time.sleep(600)


def answer_and_linger():
    threading.Thread(target=time.sleep, args=(600,)).start()
    return os.getpid()


def span():
    begin = time.monotonic()
    time.sleep(0.3)
    return begin, time.monotonic()


def cannot_be_sent():
    return threading.Lock()


class AsksForTwoError(Exception):
    """Can be sent, and not be read: it is made again of one argument."""

    def __init__(self, first, second):
        super().__init__(first)


def give_what_cannot_be_read():
    return AsksForTwoError(1, 2)


def ask_in_another_process(function, note):
    code = (
        "import pathlib, signal, sys\n"
        "from lightning_prune.sweep.own_process import call_apart\n"
        f"from tests.sweep.test_own_process import {function}\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"list(call_apart([({function}, (pathlib.Path(sys.argv[1]),))], 1, {{}}))\n"
    )
    command = [sys.executable, "-c", code, str(note)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def pids_in(note):
    wait_until(lambda: note.is_file() and note.read_text().endswith("\n"))
    return [int(word) for word in note.read_text().split()]


def called(*calls, at_a_time=2):
    """Make calls, and return the answers in their order."""
    answers = dict(call_apart(calls, at_a_time, {"OF_ITS_OWN": "yes"}))
    return [answers[i] for i in range(len(calls))]


def test_they_are_other_processes_with_their_own_environment():
    large = "x" * 3_000_000  # more than a pipe holds
    (sizes, variable, pid), (_, _, other) = called((lengths, (large, "abc")), (lengths, ()))
    assert (sizes, variable) == ([3_000_000, 3], "yes")
    assert len({pid, other, os.getpid()}) == 3 and "OF_ITS_OWN" not in os.environ
    assert not is_alive(pid) and not is_alive(other)


def test_an_answer_that_cannot_be_read_is_the_error_of_its_call_alone():
    unread, read = called((give_what_cannot_be_read, ()), (lengths, ("ab",)))
    assert isinstance(unread, ProcessError) and "cannot be read: TypeError" in str(unread)
    assert read[0] == [2]


def test_a_local_function_and_a_large_answer():
    factor = 1_000_000
    assert called((lambda: "ab" * factor, ())) == ["ab" * factor]


def test_one_that_has_answered_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(own_process, "PATIENCE", 0.3)
    pid, right = called((answer_and_linger, ()), (len, ("abc",)), at_a_time=1)
    assert right == 3 and not is_alive(pid)


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_no_more_at_a_time_than_asked_for(at_a_time):
    spans = called(*[(span, ())] * 4, at_a_time=at_a_time)
    at_once = max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans)
    assert at_once <= at_a_time


def test_what_goes_wrong_is_said_and_takes_nobody_along():
    wrong = [
        (int, ("seven",), "ValueError: invalid literal for int"),
        (leave, (3,), "SystemExit: 3"),
        (be_killed, (signal.SIGINT,), "KeyboardInterrupt: "),
        (be_killed, (signal.SIGKILL,), "its process ended before it did, killed by SIGKILL"),
        (os._exit, (5,), "its process ended before it did, with exit code 5"),
        (cannot_be_sent, (), "TypeError: cannot pickle"),
    ]
    *answers, right = called(*[(function, arguments) for function, arguments, _ in wrong], (len, ("abc",)))
    assert right == 3
    for answer, (*_, message) in zip(answers, wrong, strict=True):
        assert isinstance(answer, ProcessError) and str(answer).startswith(message), answer


@pytest.mark.parametrize("ignored", [(), (signal.SIGINT, signal.SIGTERM)])
def test_all_are_ended_with_what_they_have_started(tmp_path, ignored):
    notes = [tmp_path / name for name in "ab"]
    calls = [(len, ("abc",)), *((start_another_and_wait, (note, ignored)) for note in notes)]
    with closing(call_apart(calls, 3, {})) as answers:
        assert next(answers) == (0, 3)
        pids = [pid for note in notes for pid in pids_in(note)]
        assert all(map(is_alive, pids))
    assert all_end(pids)


def test_ctrl_c_in_the_middle_of_an_answer(tmp_path):
    note = tmp_path / "note"
    asks = ask_in_another_process("answer_by_half", note)
    try:
        (pid,) = pids_in(note)
        time.sleep(0.3)  # it reads the answer now
        asks.send_signal(signal.SIGINT)
        _, errors = asks.communicate(timeout=60)
    finally:
        asks.kill()
    assert errors.strip().endswith("KeyboardInterrupt")
    assert all_end([pid])


def test_they_end_with_the_process_that_has_asked(tmp_path):
    note = tmp_path / "note"
    asks = ask_in_another_process("start_another_and_wait", note)
    try:
        pids = pids_in(note)
    finally:
        asks.kill()
    asks.communicate()
    assert all_end(pids)
