"""A command that is started again when it fails: `python -m cluster.retrying RETRIES FILE -- COMMAND --then COMMAND`.

The second command takes over once FILE, a whole path or a URI, is there: for a run or a search, the recipe in its folder, from which on
it can be resumed. This runs inside the job, so that nobody has to stay connected. A command that refused (2), was stopped by an alarm (3)
or by a person (130) is not started again, nor is any after a signal to this process.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from cluster.storage import Folder

PAUSE_SECONDS = 5.0
"""Until Ray has taken the failed driver's actors away."""
LOOKS = 5
LOOK_SECONDS = 5.0
"""Between looks for the file, while its storage does not answer."""
STOPPED = 130
FINAL = (0, 2, 3, STOPPED)
STEP_SECONDS = 0.1
_THEN = "--then"


def main(retries: int, file: str, first: list[str], then: list[str]) -> int:
    """Exit code of the last try; 128 + n when signal n ended it, 130 when a signal came before the first. `SystemExit` says in words that
    the file's storage does not answer."""
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever stops a job signals the command as well, and waits for both
        signal.signal(number, lambda number, frame: signals.append(number))
    code = STOPPED
    for tries in range(retries + 1):
        begun = _there(file, signals)
        if signals:  # nobody would tell a command that starts now
            break
        code = subprocess.Popen(then if begun else first).wait()
        code = code if code >= 0 else 128 - code
        if signals or code in FINAL or tries == retries:
            break
        print(f"The command ended with {code}. Try {tries + 2} of {retries + 1} in {PAUSE_SECONDS:g} seconds.", flush=True)
        _pause(PAUSE_SECONDS, signals)
    return code


def _there(file: str, signals: Sequence[int]) -> bool:
    """Whether a file is there; where its storage does not answer, some looks later."""
    folder, _, name = file.rpartition("/")
    for looks in range(1, LOOKS + 1):
        try:
            return not signals and Folder(folder).exists(name)
        except OSError as error:
            unseen = f"Cannot see whether {file} is there ({' '.join(str(error).split())})."
        if looks < LOOKS:
            print(f"{unseen} Looking again in {LOOK_SECONDS:g} seconds.", flush=True)
            _pause(LOOK_SECONDS, signals)
    raise SystemExit(f"{unseen} It says whether to begin or to go on: submit again when its storage answers.")


def _pause(seconds: float, signals: Sequence[int]) -> None:
    """Waits, until a signal at most."""
    end = time.monotonic() + seconds
    while not signals and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, STEP_SECONDS))


if __name__ == "__main__":
    commands = sys.argv[4:]
    cut = commands.index(_THEN)
    sys.exit(main(int(sys.argv[1]), sys.argv[2], commands[:cut], commands[cut + 1 :]))
