"""Several processes for a test, forked from this one, so that they have nothing to import."""

import multiprocessing
import os
import pickle
import traceback

import torch
from torch.distributed import TCPStore

PATIENCE = 60


def run_ranks(world_size, function):
    """Calls ``function()`` in processes that find one another as those of torchrun do.

    Returns:
        What it gave in each process, or the exception that it raised.
    """
    # Kept by the parent, as torchrun keeps it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_run, args=(rank, world_size, store.port, function, sender)
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results = []
    for pipe, process in zip(pipes, processes, strict=True):
        try:
            found = pipe.recv_bytes() if pipe.poll(PATIENCE) else None
            results.append(pickle.loads(found) if found else TimeoutError())
        except EOFError:
            results.append(None)  # killed
        process.join(10)
        process.kill()
    return results


def _run(rank, world_size, port, function, sender):
    torch.set_num_threads(1)  # the threads of the parent are not there
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        result = function()
    except BaseException as error:
        traceback.print_exc()
        result = error
    try:
        content = pickle.dumps(result)  # not through shared memory, which ends with the process
        pickle.loads(content)
    except Exception:  # not every exception can be sent
        content = pickle.dumps(RuntimeError(repr(result)))
    sender.send_bytes(content)
    sender.close()
    os._exit(0)
