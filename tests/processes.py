"""Programs that tests start: one that hangs ends in time, with all that it started."""
import os
import signal
import subprocess
from collections.abc import Sequence

TO_END = 60.0


def run(command: Sequence[object], seconds: float, **settings: object) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with captured output and a limit of time that holds for the whole group of processes.

    Raises:
        subprocess.TimeoutExpired: with what was written until then. Nothing of the group runs any more.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    with subprocess.Popen([*map(str, command)], text=True, start_new_session=True, **pipes, **settings) as process:
        return communicate(process, seconds)


def communicate(process: subprocess.Popen, seconds: float) -> subprocess.CompletedProcess[str]:
    """Of a process that leads a session."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except BaseException as error:
        # Asked first: torchrun ends its workers, which lead sessions of their own.
        _signal(process, signal.SIGTERM)
        try:
            output, errors = process.communicate(timeout=TO_END)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            output, errors = process.communicate()
        kill(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise subprocess.TimeoutExpired(process.args, seconds, output, errors) from None
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def kill(process: subprocess.Popen) -> None:
    """With its group, whatever is left of it."""
    with process:
        _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
