"""Trials of the zoo, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection

from benchmarks.lib.results import Record


def records_of_all(names: Sequence[str], *, jobs: int, timeout_s: float) -> Iterator[Record]:
    """Yields a record for each architecture, in order; ``jobs`` at a time."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["benchmarks.lib.zoo_preload"])
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(partial(isolated_record, timeout_s=timeout_s), names)


def isolated_record(name: str, timeout_s: float) -> Record:
    """Returns the record of one architecture; a crash or a hang costs that one only."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send_record, args=(theirs, name), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(timeout_s):
            record: Record = ours.recv()
            return record
        text = f"no result after {timeout_s:.0f} s"
    except EOFError:
        process.join()
        text = f"the process died with code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return {"model": name, "part": "train", "verdict": "CRASH", "error": text, "message": text}


def _send_record(connection: Connection, name: str) -> None:
    from benchmarks.lib.zoo_trial import record_of  # imports all that the server has imported already

    connection.send(record_of(name))
