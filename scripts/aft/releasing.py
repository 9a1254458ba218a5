# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A finished run as a folder to hand out: what `aft release` does."""

import argparse
import hashlib
import json
import lzma
import shlex
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from safetensors import SafetensorError

from aft.bits_per_byte import evaluate_split
from aft.console import one_line
from aft.drawing import save_figure
from aft.masking import Masking, make_masking
from aft.masking_arguments import masking_settings
from aft.model_code import remove_code
from aft.model_configs import has_fixed_state, has_length_limit
from aft.model_pictures import data_of_model, draw_model, draw_receptive_fields, load_models
from aft.picture_arguments import source_flags
from aft.picture_data import PictureData, PictureTokens, check_picture_model, load_pictures
from aft.pretraining import draw_sample, final_sample
from aft.protocols import Protocol
from aft.redaction import public_path, readable
from aft.run_log import MEANINGLESS_ELSEWHERE, describe_score, fill_model_card, plot_training_curve, read_log, today
from aft.saved_models import LANGUAGE_MODELS, load_model, shape_of_model
from aft.text_sources import SPLITS, DocumentText, FileText, load_text
from aft.token_data import TokenData, tokens_at_hand
from aft.vocabulary import PixelVocabulary, vocabulary_of_model


BATCH_SIZE = 16  # windows at once in an evaluation
CAPTIONS = {
    "bias-map": "What each layer has learned about positions: its biases.",
    "bias-curve": "The same over the offset t - t', from a query to the keys before it.",
    "mixture": "How much each component of the mixture counts, layer by layer.",
    "receptive-field": "How near the keys are that the attention weights exp(k + w) fall on, over bytes of valid.",
}


def xz_bits_per_byte(parts: list[bytes]) -> float:
    """Bits that `xz -9e` spends on each byte of the last part, beyond those for all before it."""
    content, start = b"".join(parts), sum(map(len, parts[:-1]))
    with_it, without = (
        len(lzma.compress(part, preset=9 | lzma.PRESET_EXTREME)) for part in (content, content[:start])
    )
    return 8 * (with_it - without) / (len(content) - start)


def check_run(folder: Path) -> list[dict]:
    """
    The log of a finished run.

    Raises:
        ValueError: the run is not finished.
    """
    log = folder / "run.jsonl"
    events = read_log(log) if log.is_file() else []
    if not (folder / "config.json").is_file() or not events or events[-1]["event"] != "final":
        last = events[-1]["event"] if events else None
        raise ValueError(f"run: {folder} must be the folder of a finished run, got one whose log ends with {last!r}")
    return events


def load_data(args: argparse.Namespace, config: dict) -> FileText | DocumentText | PictureData:
    """
    What the run was trained on, by the flags that name it.

    Args:
        config: the first event of the log.

    Raises:
        ValueError: they name something else.
    """
    of_pictures = config["arguments"].get("pictures") is not None
    if of_pictures != (args.pictures is not None):
        allowed = "the pictures of the run" if of_pictures else "left out: the run was trained on a text"
        raise ValueError(f"--pictures must be {allowed}, got {args.pictures!r}")
    if of_pictures and args.beside:
        raise ValueError(f"--beside must be left out for a run on pictures, got {', '.join(map(str, args.beside))}")
    data = load_pictures(args, shape_of_model(args.run)) if of_pictures else load_text(args)
    trained_on = config.get("data_sha256")
    if data.sha256 != trained_on:
        flag = "--pictures" if of_pictures else "--dataset_path"
        raise ValueError(f"{flag} must be the data of the run, of sha256 {trained_on}, got {data.sha256}")
    return data


def save_weights(model, vocabulary, folder: Path, dtype: torch.dtype) -> None:
    """
    Saves a model without code, its floating-point numbers in `dtype`; config.json keeps the dtype that the model has.

    Raises:
        OSError: it cannot be written.
    """
    state = model.state_dict()
    rounded = {  # by address, so that what is tied stays tied
        tensor.data_ptr(): tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in state.values()
    }
    try:
        model.save_pretrained(folder, state_dict={name: rounded[tensor.data_ptr()] for name, tensor in state.items()})
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"the weights cannot be written to {folder.parent.parent}: {one_line(error)}") from error
    vocabulary.save(folder, model.config)
    remove_code(folder)


def draw(name: str, models: dict, folder: Path, data: dict[str, TokenData]) -> list[dict]:
    """
    Draws the model `name` into `folder`, if it is of AFT with the fields of all `models`; returns files and captions.
    The `data` are those of each model; without, there are no fields.
    """
    if models[name].config.model_type not in ("aft", "synthesizer"):
        return []
    figures, captions = draw_model(name, models[name]), dict(CAPTIONS)
    if data and models[name].config.model_type == "aft":
        figures[f"{name}-receptive-field.svg"] = draw_receptive_fields(models, data)
        captions["receptive-field"] += describe_company({key: models[key] for key in models if key != name})
    files = [save_figure(figure, folder / file) for file, figure in figures.items()]
    return [{"file": path.name, "caption": captions[path.stem.removeprefix(f"{name}-")]} for path in files]


def describe_company(models: dict) -> str:
    """What the other AFT models of a picture are, in a sentence; nothing if there are none."""
    parts = []
    for name, model in models.items():
        config = model.config
        window = f" of window {config.window_size}" if config.aft_type in ("local", "conv") else ""
        size = f"{config.num_hidden_layers} layers of {config.hidden_size} channels"
        parts.append(f"{name} is AFT-{config.aft_type}{window} with {size}")
    return f" Beside it, {'; '.join(parts)}." if parts else ""


def choose_protocols(config, arguments: dict) -> list[Protocol]:
    """Those that a model trained with these flags is scored by."""
    length = arguments["sequence_length"]
    if arguments.get("pictures") is not None:
        return [Protocol("pictures", length)]
    if arguments.get("objective") == "masked":
        return [Protocol("masked", length, **masking_settings(argparse.Namespace(**arguments)))]
    protocols = [Protocol("segments", length), Protocol("sliding", length, stride=max(length // 4, 1))]
    if has_fixed_state(config) and not has_length_limit(config):
        protocols.append(Protocol("carried", length))
        overlap = max(length // 2, 1)
        protocols.append(Protocol("refreshed", length, refresh_every=2 * length, refresh_overlap=overlap))
    return protocols


def score(
    model, data: TokenData, splits: tuple[str, ...], protocols: list[Protocol], masking: Masking | None
) -> list[dict]:
    """The events of the scores of a model, split by split, with the flags of `aft evaluate` that repeat each."""
    accelerator = Accelerator(mixed_precision="no")
    model = accelerator.prepare(model)
    events = []
    for split in splits:
        for protocol in protocols:
            result = evaluate_split(model, data, split, accelerator, protocol, BATCH_SIZE, masking=masking)
            given = {"split": split, **{name: value for name, value in asdict(protocol).items() if value is not None}}
            if protocol.protocol == "pictures":
                del given["length"]  # which the model has, and no flag
            command = " ".join(f"--{name} {value}" for name, value in given.items())
            events.append({"event": "evaluation", "split": split, **result, "command": command})
            print(f"{split}: {describe_score(result)}, {protocol.protocol}", flush=True)
    return events


def public_argument(word: str) -> str:
    """A word of the command line as the card shows it, without where this machine has its files."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return readable(flag + equals + public_path(value))


def release(args: argparse.Namespace, argv: list[str]) -> Path:
    """
    Makes the folder with the flags of `aft release`, which were written as `argv`, and returns it.

    Raises:
        ValueError: the run is not finished or of other data, or a model has the wrong type.
    """
    transformers.utils.logging.disable_progress_bar()
    events = check_run(args.run)
    arguments = events[0]["arguments"]
    text = load_data(args, events[0])
    auto_class = LANGUAGE_MODELS[arguments.get("objective", "causal")]
    trained, _ = load_model(auto_class, args.run, "run:", dtype=torch.float32, trust_remote_code=False)
    if args.pictures is None:
        vocabulary = vocabulary_of_model(args.run, trained.config, "run:", trust_remote_code=False)
        data = tokens_at_hand(text, vocabulary, args.cache_dir)
    else:
        check_picture_model(trained.config, text.shape, f"run: {args.run}")
        vocabulary, data = PixelVocabulary(text.shape), PictureTokens(text)
    beside = load_models(args.beside, "--beside")
    if wrong := [
        name for name, model in beside.items() if {model.config.model_type, trained.config.model_type} != {"aft"}
    ]:
        raise ValueError(f"--beside must be AFT models, for a run of one, got {', '.join(wrong)}")
    config, final, name = events[0], events[-1], args.folder.name
    protocols, masking = choose_protocols(trained.config, arguments), None
    if arguments.get("objective") == "masked":
        masking = make_masking(protocols[0], vocabulary, text.are_documents)

    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder.parent, prefix=f".{name}-") as temporary:
        folder = Path(temporary) / name
        save_weights(trained, vocabulary, folder, getattr(torch, args.dtype))
        stored, _ = load_model(auto_class, folder, f"--dtype {args.dtype}:", trust_remote_code=False)
        texts = {}
        if args.pictures is None:
            texts = {name: data, **{key: data_of_model(beside[key], text, args.cache_dir) for key in beside}}
        pictures = draw(name, {name: stored.base_model, **beside}, folder, texts)
        plot_training_curve(events, folder / "training_curve.png")

        scores = score(stored, data, ("test", "valid"), protocols, masking)
        program = ["aft", "evaluate", str(args.folder)]
        program += source_flags(args)
        for event in scores:
            event |= {"step": final["step"], "command": f"{shlex.join(program)} {event['command']}"}
        [before] = score(trained, data, ("valid",), protocols[:1], masking)
        after = next(event for event in scores if event["split"] == "valid")

        final = {**final, "model_name": name}
        if masking is None:
            sizes = {"sample_bytes": arguments["sample_bytes"] or 300}
            sizes["sample_pictures"] = arguments.get("sample_pictures") or 8
            sampling = argparse.Namespace(**{**arguments, **sizes})
            final |= final_sample(draw_sample(stored, vocabulary, data, sampling, folder))
        del final["model_path"]
        config = {**config, "arguments": {k: v for k, v in arguments.items() if k not in MEANINGLESS_ELSEWHERE}}
        released = {
            "event": "release",
            "command": shlex.join(["aft", "release", *map(public_argument, argv)]),
            "date": today(),
            "folder": public_path(args.folder),
            "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
            "dataset_note": args.dataset_note and readable(args.dataset_note),
            "dataset_license": args.dataset_license and readable(args.dataset_license),
            "language": args.language,
            "dtype": args.dtype,
            "storage_cost": after["bits_per_byte"] - before["bits_per_byte"],
            "xz_bits_per_byte": xz_bits_per_byte([text.split_bytes(split) for split in SPLITS]),
            "pictures": pictures,
        }
        events = [config, *events[1:-1], final, released, *scores]
        (folder / "run.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
        (folder / "README.md").write_text(fill_model_card(events), encoding="utf-8")
        if args.folder.exists():
            args.folder.rename(Path(temporary) / "replaced")  # which is removed when the new one is there
        folder.rename(args.folder)
    print(f"wrote {args.folder}")
    return args.folder
