"""What a signal means to a command that serves."""

from __future__ import annotations

import os
import subprocess
import sys

# The main thread has the signal blocked: it goes to the other thread, and does not interrupt the sleep. That is how a
# signal that comes between the last bytecode and the system call looks, at any time.
MISSED = """
import os, signal, threading, time
import homeloop
from homeloop.cli.ending import Ending

async def main():
    context = homeloop.main_context()

    def send():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while not context.inbox.sleeping():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    with Ending(lambda: "given up") as ending:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        sender = threading.Thread(target=send)
        sender.start()
        await ending.wanted.wait()          # no timer: it would end the sleep, too
        sender.join()
    print("ended")

homeloop.run(main())
"""


def test_a_signal_that_does_not_interrupt_the_sleep_ends_it() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-c", MISSED]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, env=env, check=False)
    assert (done.stdout, done.stderr) == ("ended\n", "")
