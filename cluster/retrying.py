"""A command that is started again when it fails: `python -m cluster.retrying RETRIES FILE -- COMMAND --then COMMAND`.

The second command takes over once FILE, a whole path or a URI, is there: for a run, the recipe in its folder, from which on it can be
resumed. This runs inside the job, so that nobody has to stay connected. A command that refused (2), was stopped by an alarm (3) or by a
person (130) is not started again, nor is any after a signal to this process.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from cluster.storage import Folder

PAUSE_SECONDS = 5.0
"""Until Ray has taken the failed driver's actors away."""
FINAL = (0, 2, 3, 130)
_THEN = "--then"


def main(retries: int, file: str, first: list[str], then: list[str]) -> int:
    """Exit code of the last try; 128 + n when signal n ended it."""
    stopped = False
    folder, _, name = file.rpartition("/")

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True  # whoever stops a job signals the command as well, and waits for both

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    for tries in range(retries + 1):
        child = subprocess.Popen(then if Folder(folder).exists(name) else first)
        code = child.wait()
        code = code if code >= 0 else 128 - code
        if stopped or code in FINAL or tries == retries:
            break
        print(f"The command ended with {code}. Try {tries + 2} of {retries + 1} in {PAUSE_SECONDS:g} seconds.", flush=True)
        time.sleep(PAUSE_SECONDS)
    return code


if __name__ == "__main__":
    commands = sys.argv[4:]
    cut = commands.index(_THEN)
    sys.exit(main(int(sys.argv[1]), sys.argv[2], commands[:cut], commands[cut + 1 :]))
