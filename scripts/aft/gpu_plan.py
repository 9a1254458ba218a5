# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What `scripts/gpu.py` runs: the steps of its parts in order, each a process with a share of the time."""

import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
PLANNED_MINUTES = 25  # on an H100
PARTS = ("compile", "tests", "tune", "ceiling", "operator", "train", "decode", "report")
LENGTHS = {"cuda": (1024, 8192, 32768), "cpu": (32, 64, 128)}  # T of operators and of training
CONTEXT = {"cuda": 16384, "cpu": 48}  # of the largest batches
AFT_MODELS = ("aft-simple", "aft-local-32", "aft-conv-32-32")
# Recurrent models of fla, those first that are expected to be the fastest, and what they are made from.
OF_FLA = {
    **{"gla": "GLAConfig", "hgrn": "HGRNConfig", "retnet": "RetNetConfig", "hgrn2": "HGRN2Config"},
    **{"delta-net": "DeltaNetConfig", "rwkv7": "RWKV7Config", "mamba2": "Mamba2Config"},
}
SIZES = {
    "cuda": "--device cuda --dtype bfloat16 --layers 6 --width 1024 --heads 16 --conv_heads 32 --window 32",
    "cpu": "--device cpu --dtype bfloat16 --layers 1 --width 64 --heads 2 --conv_heads 32 --window 32 --repeats 1",
}
SECONDS = "{seconds}"  # in a command: how long it may measure


@dataclass(frozen=True)
class Step:
    """
    One process.

    Attributes:
        part, name: what it belongs to, and what it is called there.
        minutes: its share of PLANNED_MINUTES.
        command: what Python gets, with SECONDS in the place of the time for what it measures.
        needs: packages without which it is left out.
        restores: what puts back, after it has finished in another run, what it left outside of the folder.
    """

    part: str
    name: str
    minutes: float
    command: str
    needs: tuple[str, ...] = ()
    restores: str = ""

    @property
    def missing(self) -> list[str]:
        """Which of those packages are not there."""
        return [name for name in self.needs if find_spec(name) is None]

    def arguments(self, seconds: float) -> list[str]:
        """The command for a process that has so many seconds."""
        words = shlex.split(self.command)
        return [sys.executable, *(word.replace(SECONDS, f"{max(1.0, 0.8 * seconds):.0f}") for word in words)]


def marked_files() -> list[str]:
    """The files with tests marked `gpu`."""
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{path.name}" for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]


def make_plan(device: str, folder: Path) -> list[Step]:
    """The steps on a GPU, or as many as a CPU can take, at tiny sizes, which try the way and measure nothing."""
    into = shlex.quote(str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder))
    on_gpu = device == "cuda"
    lengths, context = " ".join(str(length) for length in LENGTHS[device]), CONTEXT[device]
    models, sizes = " ".join(AFT_MODELS), SIZES[device]
    side_by_side = "-n 8" if find_spec("xdist") else ""  # most of their time goes into compilers
    kernels = "tests/test_ops_triton.py tests/test_ops_triton_full.py"
    pytest = f"-m pytest -q -p no:cacheprovider {side_by_side}"
    layouts = f"{into}/triton-layouts.csv"

    def benchmark(suite: str, flags: str) -> str:
        return f"scripts/benchmark.py {suite} {sizes} {flags} --output_dir {into}"

    compiled = "--jobs 8" if on_gpu else "--forms simple --dtypes bfloat16"
    steps = [
        Step(
            "compile",
            "kernels for sm_90",
            1,
            f"scripts/compile_triton.py {compiled} --csv {into}/triton-registers.csv",
            ("triton",),
        ),
    ]
    if on_gpu:
        steps += [
            Step("tests", "kernels", 2.5, f"{pytest} {kernels}", ("pytest", "triton")),
            Step("tests", "marked gpu", 1.5, f"{pytest} -m gpu {' '.join(marked_files())}", ("pytest",)),
            Step(
                "tune",
                "layouts",
                3.5,
                f"scripts/tune_triton.py --seconds {SECONDS} --csv {layouts}",
                ("triton",),
                f"scripts/tune_triton.py --chosen_from {layouts}",
            ),
        ]
    copied = 2**28 if on_gpu else 2**12
    tokens = 2**18 if on_gpu else 128
    operators = f"--lengths {lengths} --tokens {tokens} --seconds {5 if on_gpu else 1}"
    steps += [
        Step(
            "ceiling",
            "copies, exp, products",
            0.5,
            benchmark("ceiling", f"--lengths {copied} --seconds 5 {'' if on_gpu else '--dtype float32'}"),
        ),
        Step("operator", "forward", 1, benchmark("forward", operators)),
        Step("operator", "forward and backward", 1.5, benchmark("operator", operators)),
    ]
    compiler = "--compile" if on_gpu else ""
    trained = f"--tokens {2**15 if on_gpu else 128} --seconds 8 {'--repeats 20' if on_gpu else ''}"
    for length in LENGTHS[device]:
        flags = f"{compiler} --models {models} gpt2 llama --lengths {length} {trained}"
        steps.append(Step("train", f"T = {length:,}", 2.4, benchmark("train", flags)))
    if on_gpu:
        for how in ("", "--compile"):
            for name in OF_FLA:
                flags = f"{how} --models {name}-fla --lengths {lengths} {trained}"
                title = f"{name} of fla{', compiled' if how else ''}"
                steps.append(Step("train", title, 0.2, benchmark("train", flags), ("fla",)))
    contexts = f"1024 {context}" if on_gpu else "16"
    largest = f"--largest_batch {2**14 if on_gpu else 2} --lengths {context} --repeats 5 --seconds 3"
    for name in (*AFT_MODELS, "llama"):
        title = f"largest batch of {name}"
        steps.append(Step("decode", title, 0.4, benchmark("decode", f"{largest} --models {name}")))
    for batch in (1, 32):
        flags = f"--batch_size {batch} --models {models} gpt2 llama --lengths {contexts} --seconds 5"
        steps.append(Step("decode", f"batch {batch}", 0.45, benchmark("decode", flags)))
    if on_gpu:
        flags = f"--compile --batch_size 1 --models {models} gpt2 llama --lengths 1024 --seconds 5"
        steps.append(Step("decode", "batch 1, compiled", 0.8, benchmark("decode", flags)))
    drawing = f"scripts/benchmark.py pictures --output_dir {into}"
    return [*steps, Step("report", "pictures", 0.1, drawing, ("matplotlib",))]
