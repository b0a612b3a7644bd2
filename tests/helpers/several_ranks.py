"""Functions on several gloo ranks: processes of one server, which has imported Lightning once for all of them."""

import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def on_ranks(count: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Call a function of a module on each of some ranks, and give what each returns.

    Lightning and Fabric find the variables of a launcher there, with as many devices as ranks.

    Args:
        count: ranks.
        function: of a module that can be imported; what it takes and gives can be pickled.
        folder: where the results pass through.
        arguments: of the function.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning", "discrete_lit.cli.evaluate", "discrete_lit.callbacks"])
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_call, args=(rank, count, port, str(folder), function, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout=600)
    finally:
        for process in processes:
            process.kill()
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
    failed = [result[1] for result in results if result[0] == "failed"]
    assert not failed, "\n".join(failed)
    return [result[1] for result in results]


def _call(rank: int, count: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
    }
    try:
        result = "done", function(*arguments)
    except BaseException:
        result = "failed", traceback.format_exc()
    torch.save(result, f"{folder}/{rank}.pt")
