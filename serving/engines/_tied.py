"""`python _tied.py PARENT COMMAND…`: becomes COMMAND, and the kernel kills it when PARENT ends, however that ends."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent has ended already")
    os.execvp(sys.argv[2], sys.argv[2:])
