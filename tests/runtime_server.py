"""A server of another project, started on 127.0.0.1 for a test, and the cache of a teacher that it serves."""

import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from served import agreement, served_and_live  # noqa: E402


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


def both_name(address, model, blocks, k, out):
    """The log-probabilities of the tokens that a server's cache and the live teacher's both name, with arguments as there."""
    named, *logp = agreement(*served_and_live(f"{address}/v1", model, blocks, k, out)[0])
    assert named > 0.95, "the likeliest tokens are the same, but for near ties"
    return logp
