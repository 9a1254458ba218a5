# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Makes of a finished run of pretrain_enwik8.py a folder to hand out: small weights, scores of those weights, pictures.

    python scripts/release.py runs/aft-conv model_cards/aft-conv-small --dataset_path FILE --dtype bfloat16
    python scripts/release.py runs/aft-conv model_cards/aft-conv-small --dataset_path FILE --beside runs/aft-simple

The weights are stored in --dtype and computed with in float32, as config.json then says. Valid and test are scored
again with what was stored, by every protocol that the model allows. A compressor, `xz -9e`, gets the same bytes: what
the test split adds to the length of everything before it. The pictures are those of draw_model.py; --beside names runs
for the picture of the receptive field. All of this goes into the folder's run.jsonl, from which the card is made.
"""

import argparse
import hashlib
import json
import lzma
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from bpb_evaluation import evaluate_bits_per_byte
from byte_data import file_bytes, pydoc_bytes, split_ranges
from draw_model import draw_fields, draw_model, load_models, read_windows, receptive_field
from drawing import save_figure
from pretraining_arguments import has_length_limit
from run_log import fill_model_card, read_log, today
from transformers import AutoModelForCausalLM

from modeling_aft import ByteTokenizer


DTYPES = ("float32", "bfloat16", "float16")
CAPTIONS = {
    "bias-map": "What each layer has learned about positions: its biases.",
    "bias-curve": "The same over the offset t - t', from a query to the keys before it.",
    "mixture": "How much each component of the mixture counts, layer by layer.",
    "receptive-field": "How near the keys are that the attention weights exp(k + w) fall on, over bytes of valid.",
}


def xz_bits_per_byte(content: bytes, start: int) -> float:
    """Bits that `xz -9e` spends on each byte from `start` on, beyond those for everything before."""
    with_it, without = (
        len(lzma.compress(part, preset=9 | lzma.PRESET_EXTREME)) for part in (content, content[:start])
    )
    return 8 * (with_it - without) / (len(content) - start)


def protocols(config, length: int) -> list[dict]:
    """The protocols of bpb_evaluation.py that a model allows, the first the one that it was trained with."""
    found = [{"protocol": "segments", "stride": length}, {"protocol": "sliding", "stride": max(length // 4, 1)}]
    if not has_length_limit(config):
        found.append({"protocol": "carried", "stride": length})
    return found


def score(model, content: bytes, split: str, length: int, protocol: str, stride: int, batch_size: int = 16) -> dict:
    """Bits per byte of a model on a split; see `evaluate_bits_per_byte`."""
    text = np.frombuffer(content, np.uint8)
    accelerator = Accelerator()
    return evaluate_bits_per_byte(
        accelerator.prepare(model),
        lambda first, end: text[first:end],
        accelerator,
        *split_ranges(len(content))[split],
        protocol=protocol,
        length=length,
        stride=stride,
        batch_size=batch_size,
    )


def check_run(folder: Path, content: bytes) -> list[dict]:
    """
    The log of a finished run.

    Raises:
        ValueError: the run is not finished, or was trained on other data than `content`.
    """
    if not (folder / "config.json").is_file() or not (folder / "run.jsonl").is_file():
        raise ValueError(f"run: {folder} must be the folder of a finished run, with config.json and run.jsonl")
    events = read_log(folder / "run.jsonl")
    if events[-1]["event"] != "final":
        raise ValueError(f"run: {folder} must be finished, got a log that ends with {events[-1]['event']!r}")
    trained_on, sha256 = events[0]["data_sha256"], hashlib.sha256(content).hexdigest()
    if trained_on != sha256:
        raise ValueError(f"--dataset_path must be the data of the run, of sha256 {trained_on}, got {sha256}")
    return events


def save_weights(run: Path, folder: Path, dtype: torch.dtype) -> None:
    """Saves the model of `run` with its floating-point numbers in `dtype`; they are computed with in float32."""
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    state = model.state_dict()
    rounded = {tensor.data_ptr(): tensor.to(dtype) for tensor in state.values()}  # what is tied remains so
    model.save_pretrained(folder, state_dict={name: rounded[tensor.data_ptr()] for name, tensor in state.items()})
    ByteTokenizer().save_pretrained(folder)


def score_release(run: Path, folder: Path, content: bytes, length: int, flags: list[str]) -> list[dict]:
    """The events of the scores: of what is stored in `folder`, and what storing cost.

    `flags` are those of bpb_evaluation.py that the commands beside the scores begin with.
    """
    model, stored = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (run, folder))
    events = []
    for split in ("test", "valid"):
        for protocol in protocols(stored.config, length):
            result = score(stored, content, split, length, **protocol)
            more = ["--split", split, "--protocol", protocol["protocol"], "--length", str(length)]
            more += ["--stride", str(protocol["stride"])] if protocol["protocol"] == "sliding" else []
            command = shlex.join(["python", "scripts/bpb_evaluation.py", *flags, *more])
            events.append({"event": "evaluation", "split": split, **result, "command": command})
            print(f"{split}: {result['bits_per_byte']:.4f} bits per byte, {protocol['protocol']}", flush=True)
    before = score(model.float(), content, "test", length, **protocols(stored.config, length)[0])
    cost = events[0]["bits_per_byte"] - before["bits_per_byte"]
    print(f"storing the weights cost {cost:+.5f} bits per byte")
    return [{"event": "storage", "bits_per_byte": cost}, *events]


def draw(run: Path, folder: Path, name: str, beside: list[Path], dataset_path: Path | None, length: int) -> list[dict]:
    """Draws the pictures into `folder`; returns their events."""
    models = load_models([folder, *beside])
    models = {name if index == 0 else each: model for index, (each, model) in enumerate(models.items())}
    files = draw_model(name, models[name], folder)
    if models[name].config.model_type == "aft":
        windows = read_windows(dataset_path, length, 4)
        fields = {each: receptive_field(model, windows) for each, model in models.items()}
        files.append(save_figure(draw_fields(fields), folder / f"{name}-receptive-field.svg"))
    kinds = [path.stem.removeprefix(f"{name}-") for path in files]
    pictures = [
        {"event": "picture", "file": path.name, "caption": CAPTIONS[kind]}
        for path, kind in zip(files, kinds, strict=True)
    ]
    shutil.copy(run / "training_curve.png", folder)
    return pictures


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """
    The flags of this script.

    Raises:
        ValueError: one error that lists every value that is not allowed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("folder", type=Path, help="the new folder, whose name is that of the model")
    parser.add_argument("--dataset_path", type=Path, help="data of the run; Python's documentation when left out")
    parser.add_argument("--dtype", default="bfloat16", help=f"of the stored weights: {', '.join(DTYPES)}")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], help="AFT models for the receptive field")
    parser.add_argument("--dataset_note", help="what the data are and where from, for the card")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")
    args = parser.parse_args(argv)
    problems = []
    if args.dtype not in DTYPES:
        problems.append(f"--dtype must be one of {', '.join(DTYPES)}, got {args.dtype!r}")
    if args.folder.exists() and not args.overwrite:
        problems.append(f"folder must not exist without --overwrite, got {args.folder}")
    if args.folder.resolve() == args.run.resolve():
        problems.append(f"folder must be another than the run, got {args.folder}")
    if problems:
        raise ValueError("release.py: " + "; ".join(problems))
    return args


def main(argv: list[str] | None = None) -> Path:
    """
    Runs the program with the flags `argv`, those of the command line by default; returns the folder.

    Raises:
        ValueError: a flag is wrong, or the run is not finished or of other data.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    content = pydoc_bytes() if args.dataset_path is None else file_bytes(args.dataset_path)
    events = check_run(args.run, content)
    length = events[0]["arguments"]["sequence_length"]
    name = args.folder.name
    flags = [str(args.folder), *([] if args.dataset_path is None else ["--dataset_path", str(args.dataset_path)])]

    temporary = args.folder.with_name(f"{name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_weights(args.run, temporary, getattr(torch, args.dtype))
    command = shlex.join(["python", "scripts/release.py", *argv])
    final = {key: value for key, value in events[-1].items() if key != "model_path"} | {"model_name": name}
    events = [*events[:-1], final, {"event": "release", "dtype": args.dtype}]
    events[-1] |= {"date": today(), "command": command, "dataset_note": args.dataset_note}
    events += score_release(args.run, temporary, content, length, flags)
    test_start = split_ranges(len(content))["test"][0]
    events.append({"event": "xz", "bits_per_byte": xz_bits_per_byte(content, test_start)})
    events += draw(args.run, temporary, name, args.beside, args.dataset_path, length)
    (temporary / "run.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    (temporary / "README.md").write_text(fill_model_card(events), encoding="utf-8")
    if args.folder.exists():
        shutil.rmtree(args.folder)
    temporary.rename(args.folder)
    print(f"wrote {args.folder}")
    return args.folder


if __name__ == "__main__":
    main()
