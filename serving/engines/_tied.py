"""`python _tied.py COMMAND…`: runs COMMAND, and kills its whole process group when standard input ends.

The other end of that pipe is Whetstone's: it ends with it, however that ends. PR_SET_PDEATHSIG wouldn't do: SGLang's
own processes ask for it only after their imports, and those of a server that dies before stayed for ever.
"""

import os
import signal
import subprocess
import sys
import threading


def _watch() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)  # is for COMMAND, which ends by itself; a handler isn't inherited
    try:
        command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    except OSError as error:
        sys.exit(f"{sys.argv[1]} can't be started: {error}")
    threading.Thread(target=_watch, daemon=True).start()
    status = command.wait()
    sys.exit(status if status >= 0 else 128 - status)
