"""Small runs of scripts/pretrain_enwik8.py, for the tests of what goes wrong with them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from aft.run_log import read_log


ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "pretrain_enwik8.py"
MODEL = {
    "model_type": "aft",
    "aft_type": "local",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "max_position_embeddings": 16,
    "window_size": 4,
    "position_bias_rank": 2,
    "hidden_dropout_prob": 0.1,
}
STEPS = 8


def make_inputs(folder: Path) -> Path:
    """The folder, with a model preset and a file of text."""
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "text.bin").write_bytes(b"a line of text, and another one\n" * 100)
    return folder


def flags(inputs: Path, output_dir: Path | str, **changes) -> list[str]:
    """The flags of a run of `STEPS` steps that saves, evaluates and samples every two."""
    values = {
        "model_preset": inputs / "model.json",
        "dataset_path": inputs / "text.bin",
        "cache_dir": inputs / "cache",
        "output_dir": output_dir,
        "batch_size": 4,
        "max_steps": STEPS,
        "warmup_steps": 2,
        "learning_rate": 0.01,
        "log_every": 1,
        "eval_every": 2,
        "save_every": 2,
        "sample_every": 2,
        "sample_bytes": 5,
        "keep_checkpoints": STEPS,
        **changes,
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value)) if value is not None]


def run_script(argv: list[str], *, before: str = "", stdout=subprocess.PIPE, **environment):
    """The script in a process of its own, after the statements `before`; bytes are what it prints."""
    code = f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\n{before}\n"
    code += "from aft.console import run_program\nfrom pretrain_enwik8 import main\nrun_program(main)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", **environment}
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, timeout=240)


def checkpoints(folder: Path) -> list[str]:
    """The names of all that lies where a run keeps its checkpoints, in order."""
    found = (folder / "checkpoints").iterdir() if (folder / "checkpoints").exists() else []
    return sorted(path.name for path in found)


def history(folder: Path) -> list[tuple]:
    """What the log of a run says that every run with the same flags must say; config and resume are left out."""
    names = ("event", "step", "split", "bits_per_byte", "text", "sample")
    events = [event for event in read_log(folder / "run.jsonl") if event["event"] not in ("config", "resume")]
    return [tuple(event.get(name) for name in names) for event in events]
