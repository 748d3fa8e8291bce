"""Holds the lock under which this process plans: tracers and profilers are set up for the whole process."""

from __future__ import annotations

import os
import threading

PLANNING = threading.RLock()

if hasattr(os, "register_at_fork"):  # a child must not begin with a lock that a thread holds which it does not have
    os.register_at_fork(before=PLANNING.acquire, after_in_parent=PLANNING.release, after_in_child=PLANNING.release)
