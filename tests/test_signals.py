"""Real signals to real processes: a request to stop is answered where nothing is lost, and a second one at once."""

import contextlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from fused_rec.distributed import signals
from fused_rec.distributed.signals import ONE_REQUEST, Stopped, deferred, handle_signals, immediate, raise_if_requested


@pytest.fixture(autouse=True)
def python_as_it_starts():
    """Shells begin background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_request_is_answered_at_once(signum, status):
    with pytest.raises(Stopped, match=f"stopped by {signum.name}") as caught, handle_signals():
        signal.raise_signal(signum)
        pytest.fail("went on")
    assert caught.value.exit_status == status
    assert not isinstance(caught.value, Exception)


def test_a_held_block_ends_first():
    done = []
    with pytest.raises(Stopped), handle_signals():
        with deferred():
            with deferred():
                signal.raise_signal(signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("never")
    assert done == ["inner", "outer"]


def test_check_and_released_are_safe_points_of_a_held_block():
    with pytest.raises(Stopped), handle_signals(), deferred():
        raise_if_requested()
        signal.raise_signal(signal.SIGTERM)
        raise_if_requested()
        pytest.fail("went on")
    with pytest.raises(Stopped), handle_signals(), deferred():
        with immediate():
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("went on")
    with pytest.raises(Stopped), handle_signals(), deferred():
        signal.raise_signal(signal.SIGTERM)
        with immediate():
            pytest.fail("went on")


def test_what_follows_the_answer_is_not_disturbed_by_the_same_request():
    """What a loop saves on its way out it saves whole, also where the shell sent the signal twice."""
    saved = []
    with pytest.raises(Stopped), handle_signals(), deferred():
        try:
            with immediate():
                signal.raise_signal(signal.SIGINT)
        except Stopped:
            signal.raise_signal(signal.SIGINT)
            saved.append(1)
            raise
    assert saved == [1]


def test_a_request_that_a_library_swallowed_is_answered_at_the_next_safe_point():
    with pytest.raises(Stopped), handle_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            pass
        with deferred():
            pytest.fail("went on")


def test_handlers_are_put_back_and_without_them_nothing_is_asked():
    before = [signal.getsignal(signum) for signum in signals.SIGNALS]
    with pytest.raises(Stopped), handle_signals():
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(signum) for signum in signals.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    with deferred(), immediate():
        raise_if_requested()
    deadline = time.monotonic() + 5
    while any(thread.name == "signals" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.name == "signals" for thread in threading.enumerate())


def test_a_signal_that_is_ignored_stays_ignored():
    """nohup, and a shell's background jobs, are begun so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with handle_signals():
        signal.raise_signal(signal.SIGINT)
        raise_if_requested()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_outside_the_main_thread_nothing_changes():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with handle_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


class Finalized:
    """Where an exception cannot be passed on."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def test_a_request_that_a_finalizer_swallowed_is_asked_again(capfd):
    hook = sys.unraisablehook
    with pytest.raises(Stopped), handle_signals():
        Finalized()
        time.sleep(10)
        pytest.fail("went on")
    assert sys.unraisablehook is hook
    assert "Traceback" not in capfd.readouterr().err


def test_a_request_that_is_asked_again_waits_for_a_held_block():
    done = []
    with pytest.raises(Stopped), handle_signals():
        with contextlib.suppress(Stopped):
            signals._repeat(signal.SIGTERM)
            time.sleep(0.1)
        with deferred():
            pytest.fail("went on")
    assert done == []


BUSY = """
import hashlib
from fused_rec.distributed.signals import handle_signals
with handle_signals():
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in C, where no Python handler runs
"""


def test_a_second_request_ends_the_process_even_in_a_long_call():
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # within ONE_REQUEST: still the first
    process.stderr.readline()
    assert "SIGTERM: stopping at the next safe point; another signal stops at once" in process.stderr.readline()
    time.sleep(2 * ONE_REQUEST)  # no longer than a person takes to press a key twice
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
