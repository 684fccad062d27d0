"""Makes this process look like one on macOS or Windows to what is imported afterwards; also a plugin of pytest.

`PRETEND=darwin python -m pytest -p other_system tests/kernels/test_packing.py`, with this folder on PYTHONPATH. pytest
itself does not start under `PRETEND=win32`.
"""

import os
import select
import signal
import sys
import sysconfig

# Linux alone has Triton; the others are modules of POSIX, some of which macOS has as well
MISSING = ("triton", "resource", "fcntl", "termios", "pwd", "grp", "pty", "tty", "syslog")
NAMES = {
    signal: ("SIGALRM", "SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "setitimer", "ITIMER_REAL"),
    select: ("poll", "epoll"),
    os: ("fork", "getuid", "geteuid", "sched_getaffinity", "setsid", "killpg", "getpgid", "mkfifo", "sysconf"),
}


def pretend(system):
    """Sets the name of the system, and takes away what it has not; torch, which is this system's, must be imported."""
    # reads files of this system, and keeps what it has read
    sysconfig.get_config_vars()
    for name in MISSING:
        sys.modules[name] = None
    for module, names in NAMES.items():
        for name in names:
            vars(module).pop(name, None)
    sys.platform = system


if "PRETEND" in os.environ:
    import torch  # noqa: F401

    pretend(os.environ["PRETEND"])
