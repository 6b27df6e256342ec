"""Signals in one process: at once, put off, and restored. What a whole run does is in commands/test_signals.py."""

# ruff: noqa: PT012 - each block is one run, which a signal ends

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from vlmpo import interrupt
from vlmpo.interrupt import Interrupted

CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), CODES)
def test_outside_a_step_a_signal_ends_at_once(number: int, code: int) -> None:
    before = [signal.getsignal(each) for each in interrupt.SIGNALS]
    with pytest.raises(Interrupted) as end, interrupt.watching():
        send(number)
        pytest.fail("it went on")
    assert (end.value.code, end.value.step) == (code, None)
    assert str(end.value) == f"interrupted by {signal.Signals(number).name}"
    assert [signal.getsignal(each) for each in interrupt.SIGNALS] == before
    assert interrupt.requested() == 0


@pytest.mark.parametrize(("number", "code"), CODES)
def test_within_a_step_it_is_put_off(number: int, code: int) -> None:
    with pytest.raises(Interrupted) as end, interrupt.watching(), interrupt.deferred():
        assert interrupt.requested() == 0
        send(number)
        send(number)  # a launcher's repetition
        assert interrupt.requested() == number
        interrupt.stop(number, 7)
    assert (end.value.code, end.value.step) == (code, 7)


def test_what_the_step_does_not_act_on_ends_the_run_after_it() -> None:
    reached = []
    with pytest.raises(Interrupted) as end, interrupt.watching():
        with interrupt.deferred():
            send(signal.SIGTERM)
            reached.append("end of the step")
        reached.append("after it")
    assert reached == ["end of the step"]
    assert end.value.step is None


def test_an_evaluation_within_training_ends_at_once() -> None:
    with pytest.raises(Interrupted), interrupt.watching(), interrupt.deferred(), interrupt.at_once():
        send(signal.SIGTERM)
        pytest.fail("it went on")
    with pytest.raises(Interrupted), interrupt.watching(), interrupt.deferred():
        send(signal.SIGTERM)
        with interrupt.at_once():
            pytest.fail("it began")


def test_a_signal_that_came_to_another_rank_ends_this_one_too() -> None:
    with pytest.raises(Interrupted) as end, interrupt.watching(), interrupt.deferred():
        interrupt.stop(signal.SIGTERM, 3)
    assert (end.value.code, end.value.step) == (143, 3)
    with pytest.raises(Interrupted) as end:  # and without handlers
        interrupt.stop(signal.SIGTERM, 4)
    assert (end.value.code, end.value.step) == (143, 4)


def test_other_threads_and_libraries_keep_pythons_own_handlers() -> None:
    found = []

    def body() -> None:
        with interrupt.watching():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [before]
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt), interrupt.deferred(), interrupt.at_once():
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, own)


def test_an_error_within_is_not_replaced() -> None:
    with pytest.raises(ZeroDivisionError), interrupt.watching(), interrupt.deferred():
        send(signal.SIGTERM)
        raise ZeroDivisionError
