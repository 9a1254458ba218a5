# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A saved model on the Hub, in one commit: what `aft push` does."""

import argparse
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import transformers
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from transformers import AutoConfig, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top, 5.17 wants torchvision

from aft.console import one_line
from aft.run_log import fill_model_card, read_log
from aft.settings_files import read_json
from aft.vocabulary import rows_needed


# What a model consists of; run.jsonl is where the numbers on its card come from.
PARTS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "*.jinja",
    "*.py",
    "run.jsonl",
    "training_curve.png",
)
TOKENIZER, PROCESSOR = "tokenizer_config.json", "preprocessor_config.json"  # what reads the inputs of a model
READ_ONLY = ("README.md", "eval_results.json")  # what the card is made of besides
AUTO_CLASSES = (  # that may be on a card
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForImageClassification",
    "AutoModel",
)
PICTURES = (".png", ".svg")
CODE = Path(find_spec("modeling_aft").origin).parent  # what a saved folder carries
TIMINGS = re.compile("runtime|per_second")  # in the results of Trainer


def check_files(folder: Path) -> dict:
    """
    The configuration of the model in `folder`, after a check that nothing is missing.

    Raises:
        ValueError: lists what is missing.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; allowed: a folder that save_pretrained wrote")
    check_inside(folder, [path for part in (*PARTS, *READ_ONLY) for path in folder.glob(part)])
    config = read_json(folder / "config.json", f"{folder}:")
    reader = reader_file(folder, config)
    needed = {reader, *code_files(config, folder / "config.json")}
    if (folder / reader).is_file():
        needed |= code_files(read_json(folder / reader, f"{folder}:"), folder / reader)
    index = folder / "model.safetensors.index.json"
    weights = read_json(index, f"{folder}:").get("weight_map", {}) if index.is_file() else {"all": "model.safetensors"}
    needed |= set(weights.values())
    problems = [f"no {name}" for name in sorted(needed) if Path(name).name != name or not (folder / name).is_file()]
    if index.is_file() and (folder / "model.safetensors").is_file():
        problems.append("weights twice: model.safetensors and model.safetensors.index.json")
    if not config.get("architectures"):
        problems.append("config.json has no architectures")
    if (
        not config.get("auto_map")
        and not is_of_library(config)
        and (code := sorted(path.name for path in folder.glob("*.py")))
    ):
        problems.append(f"config.json has no auto_map, but here is code: {', '.join(code)}")
    if problems:
        raise ValueError(f"{folder}: " + "; ".join(problems))
    return config


def is_of_images(config: dict) -> bool:
    """Whether a model reads images, and not text."""
    names = config.get("architectures") or ()
    return config.get("model_type") == "aft_vision" or any("ForImageClassification" in str(name) for name in names)


def reader_file(folder: Path, config: dict) -> str:
    """The file of what reads the inputs of a model: a language model has an image processor if it is of pictures."""
    is_of_pictures = (folder / PROCESSOR).is_file() and not (folder / TOKENIZER).is_file()
    return PROCESSOR if is_of_images(config) or is_of_pictures else TOKENIZER


def is_of_library(config: dict) -> bool:
    """Whether a model is of a type that transformers has itself, and needs no code."""
    return not config.get("auto_map") and config.get("model_type") in CONFIG_MAPPING_NAMES


def find_loader(config: dict, folder: Path, name: Path) -> tuple[str, type]:
    """
    The name of the Auto class that loads the model in `folder`, and the class of the model.

    Raises:
        ValueError: no Auto class has that of `architectures`; begins with `name`.
    """
    model_class = config["architectures"][0]
    if is_of_library(config):
        kind = type(AutoConfig.from_pretrained(folder))
        for auto_class in AUTO_CLASSES:
            found = getattr(transformers, auto_class)._model_mapping.get(kind, None)
            if found is not None and found.__name__ == model_class:
                return auto_class, found
        raise ValueError(f"{name}: architectures must be of {', '.join(AUTO_CLASSES)}, got {model_class!r}")
    auto_classes = {reference.split(".")[-1]: key for key, reference in config["auto_map"].items()}
    if model_class not in auto_classes:
        raise ValueError(f"{name}: architectures is {model_class!r}; auto_map has {', '.join(sorted(auto_classes))}")
    auto_class = auto_classes[model_class]
    try:
        return auto_class, get_class_from_dynamic_module(config["auto_map"][auto_class], folder)
    except Exception as error:
        raise ValueError(f"{name} does not load: {type(error).__name__}: {error}") from error


def code_files(config: dict, path: Path) -> set[str]:
    """
    The files that a configuration takes classes from; one of another repository is named with it, owner/name--.

    Raises:
        ValueError: its auto_map does not map classes to names.
    """
    auto_map = config.get("auto_map") or {}
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    names = [name for value in values for name in (value if isinstance(value, list) else [value]) if name is not None]
    if not isinstance(auto_map, dict) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: auto_map must map classes to names, got {auto_map!r}")
    return {f"{name.rpartition('.')[0]}.py" for name in names}


def check_inside(folder: Path, paths: list[Path]) -> None:
    """
    Checks that files that are read or sent are in the folder: what was downloaded may hold links to anything.

    Raises:
        ValueError: lists those that are not.
    """
    outside = [path for path in paths if not path.resolve().is_relative_to(folder.resolve())]
    if outside:
        found = ", ".join(f"{path.name} -> {path.resolve()}" for path in sorted(outside))
        raise ValueError(f"{folder}: must hold its files itself, and not lead out of itself: {found}")


def check_code(folder: Path) -> None:
    """
    Checks that the code in `folder` is that of this repository, which may run.

    Raises:
        ValueError: lists the files that are not, or says that one is not Python.
    """
    foreign = []
    for path in sorted(folder.glob("*.py")):
        ours, content = CODE / path.name, path.read_bytes()
        if not ours.is_file() or ours.read_bytes() != content:
            foreign.append(path.name)
            try:
                compile(content, path.name, "exec")
            except (SyntaxError, ValueError) as error:
                raise ValueError(f"{folder} does not load: {type(error).__name__}: {error}") from error
    if foreign:
        raise ValueError(
            f"{folder}: {', '.join(foreign)} {'is' if len(foreign) == 1 else 'are'} not the code of this repository; "
            "--trust_remote_code runs it"
        )


def find_pictures(folder: Path, events: list[dict]) -> list[Path]:
    """
    The pictures that a log names and that are there.

    Raises:
        ValueError: a name is not that of a picture in the folder.
    """
    named = [picture["file"] for event in events for picture in event.get("pictures", [])]
    for name in named:
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in PICTURES:
            allowed = f"names of pictures in the folder, {' or '.join(PICTURES)}"
            raise ValueError(f"{folder / 'run.jsonl'}: pictures must have {allowed}, got {name!r}")
    pictures = [folder / name for name in dict.fromkeys(named) if (folder / name).is_file()]
    check_inside(folder, pictures)
    return pictures


def copy_with_code(folder: Path, into: Path) -> Path:
    """
    A copy, in `into`, of what is pushed of a folder without code, and with it the code of the package.

    Raises:
        ValueError: the model does not load, or is not one of the package.
    """
    from aft.model_code import add_code  # which needs the package, as a folder with code does not

    copy = into / folder.resolve().name
    copy.mkdir()
    for path in find_parts(folder):
        shutil.copyfile(path, copy / path.name)
    try:
        add_code(copy)
    except Exception as error:
        raise ValueError(f"{folder}: has no code, and none can be added: {one_line(error)}") from error
    return copy


def find_parts(folder: Path) -> set[Path]:
    """The files of `PARTS` in a folder."""
    return {path for part in PARTS for path in folder.glob(part) if path.is_file()}


def check_model(folder: Path, name: Path) -> dict:
    """
    What a model card says of the model in `folder`, after the code there, also where the package is installed, has
    loaded its weights and its tokenizer or image processor. Errors begin with `name`.

    Raises:
        ValueError: they do not load, or do not belong together.
    """
    config = read_json(folder / "config.json", f"{name}:")
    model_class = config["architectures"][0]
    auto_class, loader = find_loader(config, folder, name)
    try:
        model, report = loader.from_pretrained(folder, output_loading_info=True)
        reader = find_reader(folder, config).from_pretrained(folder, trust_remote_code=True)
    except Exception as error:
        raise ValueError(f"{name} does not load: {type(error).__name__}: {error}") from error
    problems = [f"{kind.replace('_', ' ')}: {', '.join(map(str, found))}" for kind, found in report.items() if found]
    makes_pictures = isinstance(reader, BaseImageProcessor) and not is_of_images(config)
    if is_of_images(config):
        found, channels = reader.image_mean, getattr(model.config, "num_channels", 3)
        if reader.do_normalize and isinstance(found, (list, tuple)) and len(found) != channels:
            problems.append(f"{len(found)} channels of the image processor, but num_channels {channels}")
    elif makes_pictures:
        problems += pixel_problems(reader, model.config)
    elif (needed := rows_needed(reader, model.config)) > model.config.vocab_size:
        problems.append(f"{needed} tokens of the tokenizer, but vocab_size {model.config.vocab_size}")
    if problems:
        raise ValueError(f"{name}: " + "; ".join(problems))
    return {
        "model_type": config["model_type"],
        "model_class": model_class,
        "auto_class": auto_class,
        "images": is_of_images(config),
        "picture": " x ".join(map(str, reader.shape)) if makes_pictures else None,
        "parameters": model.num_parameters(),
    }


def pixel_problems(processor: BaseImageProcessor, config) -> list[str]:
    """What is wrong with the image processor of a language model of pictures, and the configuration of the model."""
    if not hasattr(processor, "num_subpixels"):
        return [f"a language model of pictures needs AFTImageProcessor, got {type(processor).__name__}"]
    problems = []
    if processor.bos_token_id >= config.vocab_size:
        problems.append(
            f"bos_token_id {processor.bos_token_id} of the image processor, vocab_size {config.vocab_size}"
        )
    if config.has_position_table and processor.num_subpixels > config.max_position_embeddings:
        found = f"max_position_embeddings {config.max_position_embeddings}"
        problems.append(f"{processor.num_subpixels} sub-pixels of the image processor, but {found}")
    return problems


def find_reader(folder: Path, config: dict):
    """The class of the tokenizer or image processor in `folder`: that of the code there, if any, also where the
    package is imported."""
    file = reader_file(folder, config)
    default = AutoImageProcessor if file == PROCESSOR else AutoTokenizer
    auto_map = read_json(folder / file, f"{folder}:").get("auto_map") or {}
    names = auto_map.get(default.__name__) or [None]
    found = [name for name in (names if isinstance(names, list) else [names]) if name is not None]
    return get_class_from_dynamic_module(found[-1], folder) if found else default


def make_card(args: argparse.Namespace, events: list[dict], values: dict) -> str:
    """The README.md to push; `events` are those of the log, and `values` those of `check_model`."""
    results, readme = (args.folder / name for name in ("eval_results.json", "README.md"))
    metrics = read_json(results, f"{args.folder}:") if results.is_file() else {}
    metrics = {name.removeprefix("eval_"): value for name, value in metrics.items() if not TIMINGS.search(name)}
    where = {"name": args.repo_id, "path": args.repo_id, "has_code": True}
    card = made = ModelCard(fill_model_card(events, **where, metrics=metrics, **values))
    if readme.is_file() and (args.keep_card or not events):
        card = ModelCard(readme.read_text(encoding="utf-8"))
        for name, value in vars(made.data).items():
            if card.data.get(name) is None:
                card.data[name] = value
    for name in ("license", "datasets"):
        if (value := getattr(args, name)) is not None:
            card.data[name] = value
    return str(card)


def push(args: argparse.Namespace, files: list[Path], card: str, message: str) -> str:
    """Commits `files` and the card, without the files of an earlier push that are not among them; returns the URL."""
    api = HfApi()
    repo_id = api.create_repo(args.repo_id, private=args.private or None, exist_ok=True).repo_id
    if args.revision is not None:
        api.create_branch(repo_id, branch=args.revision, exist_ok=True)
    operations = [CommitOperationAdd(path.name, path) for path in files]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    # Weights in one file would be loaded in place of newer ones in several.
    pushed = {operation.path_in_repo for operation in operations}
    for name in api.list_repo_files(repo_id, revision=args.revision):
        if name not in pushed and any(Path(name).match(part) for part in PARTS) and "/" not in name:
            operations.append(CommitOperationDelete(name))
    # Not upload_folder, which may make several commits of them.
    commit = api.create_commit(
        repo_id, operations, commit_message=message, revision=args.revision, create_pr=args.create_pr
    )
    return commit.pr_url or commit.commit_url


def send(args: argparse.Namespace, files: list[Path], card: str, model_class: str) -> None:
    """
    Prints what is pushed, and pushes it if this is no dry run.

    Raises:
        OSError: it was not pushed.
    """
    for name, size in [*((path.name, path.stat().st_size) for path in files), ("README.md", len(card.encode()))]:
        print(f"{size:>13,} {name}")
    if args.dry_run:
        print(f"\n{card}\nNothing was pushed: --dry_run.")
        return
    message = args.commit_message or f"Upload {model_class}"
    try:
        url = push(args, files, card, message)
    except OSError:
        raise
    except Exception as error:  # of the client's HTTP library, whose errors are not all OSErrors
        raise OSError(f"{args.repo_id} was not pushed: {type(error).__name__}: {one_line(error)}") from error
    print(f"pushed: {url}")


def push_folder(args: argparse.Namespace) -> None:
    """
    Checks a folder and pushes it, with the flags of `aft push`.

    Raises:
        ValueError: the folder is not one to push.
        OSError: it was not pushed.
    """
    transformers.utils.logging.disable_progress_bar()
    config = check_files(args.folder)
    if not args.trust_remote_code:
        check_code(args.folder)
    log = args.folder / "run.jsonl"
    events = read_log(log) if log.is_file() else []
    pictures = find_pictures(args.folder, events)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (
            args.folder
            if config.get("auto_map") or is_of_library(config)
            else copy_with_code(args.folder, Path(temporary))
        )
        values = check_model(folder, args.folder)
        card = make_card(args, events, values)
        files = {path.name: path for path in (*pictures, *find_parts(folder))}
        send(args, [files[name] for name in sorted(files)], card, values["model_class"])
