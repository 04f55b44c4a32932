"""Many cases in one set of processes: gloo ranks forked from a server with torch loaded, and what each case said."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext

import torch
import torch.distributed as dist

TIMEOUT = 30.0  # seconds of a group


def context() -> ForkServerContext:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "torch.distributed", "moesaic", "moesaic.parallel"])
    return server


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def join(rank: int, size: int, port: int, timeout: float) -> None:
    """Become a rank."""
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank)
    )
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout))


def _rank(rank, size, port, timeout, function, arguments, results) -> None:
    join(rank, size, port, timeout)
    try:
        results.put((rank, None, function(rank, size, *arguments)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        raise
    finally:
        results.close()
        results.join_thread()


def launch(
    function: Callable, size: int, *arguments, timeout: float = TIMEOUT, limit: float = 90.0, enough: int | None = None
) -> tuple[dict[int, str | None], dict[int, object], list[int | None]]:
    """`function(rank, size, *arguments)` on gloo ranks: traceback or None, result, and exit code of each.

    It ends ranks that are still there when `enough` (by default all) have answered, or after `limit` seconds.
    """
    server, port = context(), free_port()
    results = server.Queue()
    ranks = [
        server.Process(target=_rank, args=(r, size, port, timeout, function, arguments, results), daemon=True)
        for r in range(size)
    ]
    for process in ranks:
        process.start()
    errors: dict[int, str | None] = {}
    values: dict[int, object] = {}
    end = time.monotonic() + limit
    while len(errors) < (enough or size) and time.monotonic() < end:
        try:
            rank, error, value = results.get(timeout=0.2)
            errors[rank], values[rank] = error, value
        except queue.Empty:
            if not any(p.is_alive() for p in ranks) and results.empty():
                break
    for process in ranks:
        process.join(5.0 if enough is None else 0.3)
        if process.is_alive():
            process.kill()
            process.join()
    return errors, values, [p.exitcode for p in ranks]


def run_cases(rank: int, size: int, cases: list[Callable]) -> dict[str, str | None]:
    """Every case in turn; its traceback, or None. After one that fails the ranks are no longer in step, and stop."""
    said: dict[str, str | None] = {}
    for case in cases:
        try:
            case(rank, size)
            said[case.__name__] = None
        except Exception:
            said[case.__name__] = traceback.format_exc()
            break
    else:
        dist.barrier()  # rank 0 has the store that the others' last groups are made with
    return said


def check(size: int, cases: list[Callable]) -> None:
    """Run all cases on `size` ranks, in one launch; raise with every rank's trouble unless all of them passed."""
    errors, values, codes = launch(run_cases, size, cases)
    trouble = []
    for rank in range(size):
        if (error := errors.get(rank, "said nothing")) is not None:
            trouble.append(f"rank {rank} of {size}, exit {codes[rank]}: {error}")
            continue
        said = values[rank]
        assert isinstance(said, dict)
        for case in cases:
            if (error := said.get(case.__name__, "not run: an earlier case failed")) is not None:
                trouble.append(f"{case.__name__}, rank {rank} of {size}: {error}")
    assert not trouble, "\n".join(trouble)
