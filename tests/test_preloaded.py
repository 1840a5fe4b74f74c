"""Forks of a process that has imported the libraries are processes like any other."""

import os
import signal
import subprocess
import time

import preloaded
import pytest

SLEEPS = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def test_several_run_at_a_time_and_end_in_any_order():
    first, second = (preloaded.start("-c", SLEEPS) for _ in range(2))
    third = preloaded.run("-c", "import sys; print(sys.argv); sys.stderr.write('said'); sys.exit(3)", "a", "b\n")
    assert (third.returncode, third.stdout, third.stderr) == (3, "['-c', 'a', 'b\\n']\n", "said")
    assert first.poll() is None and second.poll() is None and first.returncode is None
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(timeout=0.01)
    for process, signum in ((second, signal.SIGTERM), (first, signal.SIGKILL)):
        while not process.out.read_text():
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(signum)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == process.poll() == process.wait() == -signum
        assert int(out) == process.pid
        process.send_signal(signum)  # which is of no use
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


def test_a_server_that_has_died_is_replaced():
    died = preloaded.start("-c", "print('before')", PRELOADED_TEST="1")
    died.wait()
    parent = died._parent._process
    parent.kill()
    parent.wait()
    assert preloaded.run("-c", "print('after')", PRELOADED_TEST="1").stdout == "after\n"
