"""A server of another project, started on 127.0.0.1 for a test, and the cache of a teacher that it serves."""

import socket
import subprocess
import time
from contextlib import contextmanager

import requests
import torch

from hf_minitron.distillation.batch import collate
from hf_minitron.distillation.cache import write_cache
from hf_minitron.distillation.cached import CachedTeacher


@contextmanager
def running(command, folder, seconds, **environment):
    """The address of a server, once it answers; `{port}` in its command is one that is free.

    Args:
        command (`list[str]`): The program and its arguments.
        folder (`Path`): Where its log goes.
        seconds (`float`): How long it may take to answer.
        environment (`Mapping[str, str]`, *optional*): As for `subprocess.Popen`, under `env`.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    address, path = f"http://127.0.0.1:{port}", folder / "server.log"
    with path.open("w") as log:
        process = subprocess.Popen([part.format(port=port) for part in command], stdout=log, stderr=log, **environment)
    try:
        _wait_for(address, process, path, time.monotonic() + seconds)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def _wait_for(address, process, log, deadline):
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if requests.get(f"{address}/health", timeout=5).ok:
                return
        except requests.ConnectionError:
            pass
        time.sleep(0.2)
    raise TimeoutError(log.read_text())


def served_and_live(address, model, blocks, k, out):
    """The log-probabilities of the `k` likeliest tokens, of a server and of the live teacher, where both name the same ones.

    Args:
        address (`str`): Of the server.
        model (`Path`): The teacher's folder.
        blocks (`Dataset`): What both read.
        k (`int`): How many.
        out (`Path`): A folder for both caches.
    """
    how = {"method": {"top_k": k}, "dtype": "float32", "batch_size": len(blocks) // 2}
    facts = write_cache(model, blocks, out / "served", server=f"{address}/v1", **how)
    assert facts["tokens"] == sum(len(row) - 1 for row in blocks["input_ids"])
    write_cache(model, blocks, out / "live", init_kwargs={"dtype": "float32"}, **how)
    batch = collate([blocks[i] for i in range(len(blocks))])
    (ids, logp), (live_ids, live_logp) = (CachedTeacher(out / name).columns(batch).values() for name in ("served", "live"))
    same = (ids == live_ids).all(-1)
    assert same.float().mean() > 0.95, "the likeliest tokens are the same, but for near ties"
    return [values.view(torch.float32)[same] for values in (logp, live_logp)]
