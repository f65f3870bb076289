"""Locks of the package are free again after any interrupt."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from bge_rerank_integrations.runtime.locks import SafeCondition, SafeLock
from tests.support.interrupts import Interrupt

NUM_INTERRUPTS = 2_000


class AlarmError(Exception):
    """Raised by the signal handler."""


def is_free(lock: SafeLock) -> bool:
    """Whether another thread can take the lock."""

    def can_take() -> bool:
        if not lock.acquire(blocking=False):
            return False
        lock.release()
        return True

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(can_take).result()


@pytest.mark.parametrize("make", [SafeLock, SafeCondition])
def test_a_lock_can_be_taken_again_by_its_thread_only(make: type[SafeLock]) -> None:
    lock = make()
    with lock:
        with lock:
            assert not is_free(lock)
        assert not is_free(lock)
    assert is_free(lock)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that sends signals")
@pytest.mark.parametrize("make", [SafeLock, SafeCondition])
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_signal_leaves_no_lock_taken(make: type[SafeLock], *, is_nested: bool) -> None:
    def raise_alarm(*_: object) -> None:
        raise AlarmError

    def use_until_alarm(delay_s: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, delay_s)
        while True:
            with lock:
                if is_nested:
                    with lock:
                        pass

    lock = make()
    before = signal.signal(signal.SIGALRM, raise_alarm)
    try:
        for number in range(NUM_INTERRUPTS):
            with pytest.raises(AlarmError):
                use_until_alarm(100e-6 + number * 50e-9)
            assert is_free(lock), number
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_interrupted_entry_or_exit_leaves_no_lock_taken() -> None:
    lock = SafeLock()

    def use() -> None:
        interrupt.arm()
        with lock, lock:
            threading.get_ident()

    for number in count():
        interrupt = Interrupt(number)
        interrupt.call(use)
        assert is_free(lock), number
        if not interrupt.is_reached:
            break
    assert number > 0
