"""A Python that has PyTorch, transformers and peft loaded before it is asked: a process that a test starts of it begins
at once, and costs four seconds less.

One process loads the packages, nothing of the project, and forks for every program; folder, environment, PYTHONPATH,
words and standard streams are those of whoever asks. A signal does not reach the program, only the process that asked.
What a cold start costs is tested elsewhere (`commands/test_cli.py`).
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

LOADED = ("torch._dynamo", "transformers.trainer", "peft", "pandas", "scipy.optimize", "matplotlib.pyplot")
MOST = 1 << 16  # B of a message


@contextmanager
def ready_python() -> Iterator[list[str]]:
    """What to write for `python`, before `-c PROGRAM WORDS...`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        address = str(Path(folder) / "socket")
        listener.bind(address)
        listener.listen()
        files = [listener.fileno()]
        server = [sys.executable, __file__, *map(str, files)]
        with subprocess.Popen(server, env=environment, cwd=folder, stdin=subprocess.PIPE, pass_fds=files) as loading:
            listener.close()  # whoever asks a server that has died is refused
            try:
                yield [sys.executable, "-S", __file__, address]
            finally:
                loading.terminate()


def ask(address: str, words: list[str]) -> int:
    """Have `-c PROGRAM WORDS...` run by the server, on the streams of this process; returns its exit code."""
    with socket.socket(socket.AF_UNIX) as asked:
        asked.connect(address)
        message = json.dumps([os.getcwd(), dict(os.environ), words]).encode()
        socket.send_fds(asked, [message], [0, 1, 2])
        asked.shutdown(socket.SHUT_WR)
        return int(asked.recv(MOST) or 70)


def serve(listener: socket.socket) -> str:
    """Fork for whoever asks, as long as stdin is open (the tests run); in a child returns its program, all as asked."""
    for name in LOADED:
        __import__(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    while listener in select.select([listener, 0], [], [])[0]:
        asked, _ = listener.accept()
        with asked:
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                message, files, *_ = socket.recv_fds(asked, MOST, 3)
                while more := asked.recv(MOST):
                    message += more
                if (child := os.fork()) == 0:
                    return become(json.loads(message), files)
                asked.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
                os._exit(0)
    sys.exit()


def become(request: tuple[str, dict[str, str], list[str]], files: list[int]) -> str:
    """Take over what a request says of a process; returns its program."""
    folder, environment, (option, program, *words) = request
    for stream, file in enumerate(files):
        os.dup2(file, stream)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:1] = ["", *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [option, *words]
    return program


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    exec(serve(socket.socket(fileno=int(sys.argv[1]))), {"__name__": "__main__"})
