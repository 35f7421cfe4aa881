"""Run a function in several gloo processes on this machine."""
import multiprocessing
import os
import socket
import time


def forked(world, function, *args, timeout=240):
    """Run function(rank, *args) in `world` processes -> their exit codes.

    Forked, as importing torch takes seconds; killed when they take longer than `timeout` s."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def begin(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        function(rank, *args)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=begin, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    deadline = time.time() + timeout
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.time()))
        alive = [process.pid for process in processes if process.is_alive()]
        assert not alive, f"still running after {timeout} s"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
