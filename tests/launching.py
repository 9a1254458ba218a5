"""Scripts that tests start in processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent


def free_port() -> str:
    """A port of this machine that no one listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_on_two_processes(script: Path, flags: list[str], **environment: str) -> subprocess.CompletedProcess:
    """A script under `accelerate launch` on two processes of the CPU; fails if it does."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", free_port()]
    launch += ["--config_file", str(ROOT / "configuration" / "accelerate" / "cpu-2-processes.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    result = subprocess.run(
        [*launch, str(script), *flags], env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result
