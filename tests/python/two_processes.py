"""Runs a function in two processes joined by gloo."""

import datetime
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

LIMIT = 600  # seconds for all of it; a process that waits for the other in vain gives up before
PROCESSES = 2


def _start(rank, store, function):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=LIMIT // 3),
    )
    torch.manual_seed(20)
    try:
        function(rank)
        dist.barrier()  # nobody leaves while another still talks
    finally:
        dist.destroy_process_group()


def run_in_two_processes(function, folder):
    """function(rank), a function of a module, in each; the first exception is raised here.

    They meet through a file, not a port: tests may run beside each other. Now and then one of them
    is aborted when it is done, of a thread that gloo has not joined; then once more.
    """
    try:
        _run(function, folder / "store")
    except torch.multiprocessing.ProcessExitedException as error:
        if error.signal_name != "SIGABRT":
            raise
        _run(function, folder / "second store")


def _run(function, store):
    context = torch.multiprocessing.spawn(
        _start, (str(store), function), nprocs=PROCESSES, join=False
    )
    deadline = time.monotonic() + LIMIT
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{function.__name__}: the processes have not ended after {LIMIT} s")
