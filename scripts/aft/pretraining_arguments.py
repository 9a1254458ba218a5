# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The command line of `aft pretrain`: its flags, the presets that set their defaults, and the checks on them."""

import argparse
import math
import reprlib
from dataclasses import dataclass, field, fields
from pathlib import Path

from aft.atomic_files import check_file
from aft.flags import IMPORT_HELP, FlagParser, check_model_name, find_preset, flag, from_folder, import_files
from aft.masking_arguments import MaskingArguments, masking_problems, masking_settings
from aft.picture_arguments import PictureArguments, complete_source, source_problems
from aft.protocols import CAUSAL, Protocol
from aft.redaction import public_address, public_path, readable
from aft.settings_files import read_yaml
from aft.text_arguments import TextArguments


CHOICES = {
    "objective": ("causal", "masked"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "optimizer": ("adamw", "muon"),
    "lr_decay": ("cosine", "linear", "inverse_sqrt", "constant"),
}
# Flags that hold a path: in a preset, a relative one starts at the preset's folder.
PATHS = ("model_preset", "dataset_path", "cache_dir", "output_dir")
MAYBE_PATHS = ("dataset", "pictures", "tokenizer", "init_from")  # which may be names too: a path if something is there
# Flags that change neither the weights nor the scores: where the model and the data come from, of which the content
# counts, and what a run writes. An unfinished comparison may go on with others.
MAY_DIFFER_WHEN_CONTINUED = {
    *("training_preset", "model_preset", "model_override", "imports"),
    *("dataset", "dataset_path", "dataset_config", "dataset_url", "text_column", "cache_dir"),
    *("validation_split", "test_split", "test_size", "pictures", "image_column", "image_size", "num_channels"),
    *("output_dir", "resume", "overwrite", "report_to", "save_every", "keep_checkpoints"),
    *("sample_every", "sample_bytes", "sample_prompt", "sample_pictures"),
}
# With those that change scores alone, what a resumed run may change.
MAY_DIFFER_ON_RESUME = MAY_DIFFER_WHEN_CONTINUED | {
    *("eval_protocol", "eval_stride", "eval_stream_length", "eval_refresh_every", "eval_refresh_overlap"),
    *("eval_every", "eval_bytes", "eval_pictures", "test_pictures", "eval_batch_size", "log_every", "init_from"),
    *("early_stopping_patience", "load_best_model_at_end"),
}


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    training_preset: str | None = flag(
        None,
        "YAML file whose keys are flags of this program, or the name of one in the package: tiny, small, enwik8, "
        "pictures, cifar10. Explicit flags win.",
        "--preset",
    )
    model_preset: str | None = flag(
        None,
        "JSON file of a model config, or the name of one in the package; None is init_from's, else aft-conv-tiny.",
        "--model",
    )
    init_from: str | None = flag(
        None, "Begin with the weights of a saved model, a folder or a name on the Hub, in place of random ones."
    )
    model_override: list[str] = field(
        default_factory=list,
        metadata={"help": "Configuration fields to change, as key=value with a JSON value: window_size=16."},
    )
    imports: list[str] = field(default_factory=list, metadata={"help": IMPORT_HELP, "aliases": ["--import"]})
    objective: str = flag(
        "causal",
        "causal, which predicts the next token; or masked, which predicts hidden tokens from all others, with a "
        "bidirectional model: a preset is made one.",
    )
    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward pass to save memory.")
    compile: bool = flag(False, "Compile the model with torch.compile.")


@dataclass
class DataArguments:
    _argument_group_name = "tokens and windows"

    tokenizer: str | None = flag(
        None,
        "bytes; bpe, which is trained on the train split and has vocab_size tokens; or a saved tokenizer: a folder, a "
        "tokenizer.json, or a name on the Hub. None is that of init_from, else bytes.",
    )
    vocab_size: int | None = flag(None, "How many tokens --tokenizer bpe gets, at least 257.")
    shuffle_buffer: int | None = flag(
        None,
        "With streaming: among how many documents the next is drawn; 0 keeps the order. None is 1000, of a text 0.",
    )
    sequence_length: int | None = flag(None, "T, tokens per training window; None is max_position_embeddings.")
    carry_state: bool = flag(
        False,
        "Let each row of the batch read on where it ended in the step before, with the state of there but not its "
        "gradient; for a model with a state of fixed size and no position tables, such as AFT-conv without positions.",
    )
    stream_length: int | None = flag(
        None, "Tokens that a row reads so before it begins elsewhere with an empty state; None is 4 sequence_length."
    )
    horizontal_flip: bool = flag(
        False, "Of --pictures: mirror every second one of train; wrong for digits and letters."
    )
    color_shift: int = flag(
        0, "Of --pictures: add a whole number from [-N, N] to all sub-pixels of one of train, clipped to 0 to 255."
    )


@dataclass
class TrainingArguments:
    _argument_group_name = "training"

    batch_size: int = flag(8, "Windows per optimizer step, over all processes and accumulated micro-batches.")
    micro_batch_size: int | None = flag(
        None, "Windows per process in one forward; None is batch_size / processes. Gradients accumulate over the rest."
    )
    max_steps: int | None = flag(None, "Optimizer steps; give this or num_epochs. 800 when neither is given.")
    num_epochs: float | None = flag(None, "Passes over the train split, in windows of sequence_length.")
    optimizer: str = flag(
        "adamw",
        "adamw, or muon: Muon for the weights of linear layers and AdamW for all others; not with fp16 or FSDP.",
    )
    learning_rate: float = flag(3e-3, "Peak learning rate.")
    position_lr_scale: float = flag(1.0, "The learning rate of position biases and random logits, as a multiple.")
    warmup_steps: int = flag(100, "Steps of linear warm-up.")
    lr_decay: str = flag("cosine", "After warm-up: cosine, linear, inverse_sqrt (sqrt(warmup / step)) or constant.")
    min_lr_ratio: float = flag(0.1, "Where cosine and linear end, as a fraction of learning_rate.")
    weight_decay: float = flag(0.1, "Decay of the weights of linear layers; nothing else decays.")
    adam_beta1: float = flag(0.9, "First beta of AdamW.")
    adam_beta2: float = flag(0.99, "Second beta of AdamW.")
    max_grad_norm: float = flag(1.0, "Norm to which gradients are clipped; 0 = no clipping.")
    ema_decay: float | None = flag(
        None, "Average the weights with this decay, such as 0.999; what is scored and saved is the average."
    )
    early_stopping_patience: int | None = flag(
        None, "End after so many evaluations on valid in a row that are no better than the best before."
    )
    load_best_model_at_end: bool = flag(
        False, "End with the checkpoint that is the best on valid, in place of the newest. Both are kept in any case."
    )
    mixed_precision: str | None = flag(None, "no, bf16 or fp16; None is what accelerate launch was told, else no.")
    seed: int = flag(0, "Seed of the initial weights, the data order, dropout and samples.")


@dataclass
class OutputArguments:
    _argument_group_name = "evaluation and output"

    output_dir: str = flag("runs/pretraining", "Folder of the run: log, checkpoints and the final model.")
    eval_protocol: str | None = flag(
        None,
        "segments (default), sliding, carried or refreshed; masked, and nothing else, with --objective masked, and "
        "pictures with --pictures (see aft evaluate --help).",
    )
    eval_stride: int | None = flag(None, "Stride of sliding; None is half of sequence_length.")
    eval_stream_length: int | None = flag(None, "Tokens of a stream of carried; None is the whole split.")
    eval_refresh_every: int | None = flag(None, "Tokens that refreshed reads between one start and the next.")
    eval_refresh_overlap: int | None = flag(None, "How many of them refreshed had read before.")
    eval_every: int = flag(200, "Steps between evaluations on valid; 0 = only at the end.")
    eval_bytes: int = flag(0, "Score only the first so many bytes of valid; 0 = all. The test split is always whole.")
    eval_pictures: int = flag(0, "Score only the first so many pictures of valid; 0 = all.")
    test_pictures: int = flag(0, "Score only the first so many pictures of test; 0 = all.")
    eval_batch_size: int | None = flag(None, "Windows per process in one evaluation; None is micro_batch_size.")
    log_every: int = flag(10, "Steps between lines of the log.")
    report_to: list[str] = field(
        default_factory=list,
        metadata={"help": "Trackers of accelerate that also get the log: tensorboard, wandb, ...; none for none."},
    )
    sample_every: int = flag(250, "Steps between samples; 0 = only at the end.")
    sample_bytes: int | None = flag(
        None, "Tokens per sample; 0 = no samples. None is 300, and 0 with --objective masked, which cannot continue."
    )
    sample_pictures: int | None = flag(
        None, "With --pictures: how many are sampled, and held-out ones completed; 0 = none. None is 8."
    )
    sample_prompt: str = flag("The ", "What samples begin with.")
    save_every: int = flag(250, "Steps between checkpoints; 0 = only at the end.")
    keep_checkpoints: int = flag(2, "How many of the newest checkpoints to keep.")
    resume: str = flag("none", "auto (newest checkpoint of output_dir, else start), a checkpoint's path, or none.")
    overwrite: bool = flag(False, "Replace the run that is in output_dir.")


GROUPS = (
    *(ModelArguments, MaskingArguments, TextArguments, PictureArguments, DataArguments),
    *(TrainingArguments, OutputArguments),
)
NOT_OF_PICTURES = {  # flags that mean nothing for pictures
    *("tokenizer", "vocab_size", "shuffle_buffer", "carry_state", "stream_length", "sample_bytes", "sample_prompt"),
    *("eval_stride", "eval_stream_length", "eval_refresh_every", "eval_refresh_overlap", "eval_bytes"),
}
# And those that mean something for nothing else.
OF_PICTURES = {"horizontal_flip", "color_shift", "eval_pictures", "test_pictures", "sample_pictures"}


def parse_arguments(argv: list[str], description: str = "") -> argparse.Namespace:
    """
    All flags in one namespace. A training preset is read as flags that stand before the explicit ones.

    Raises:
        ValueError: a flag or a key of the preset is unknown, or a value has the wrong type.
    """
    preset_flag = FlagParser("pretrain", "")
    preset_flag.add_argument("--training_preset", "--training-preset", "--preset")
    preset = preset_flag.parse_known_args([item for item in argv if item not in ("-h", "--help")])[0].training_preset
    defaults = [] if preset is None else read_preset(find_preset(preset, "training", "--training_preset"), argv)
    args = FlagParser("pretrain", description, GROUPS).parse_args([*defaults, *argv])
    if args.init_from is None:
        args.model_preset = "aft-conv-tiny" if args.model_preset is None else args.model_preset
        args.model_preset = find_preset(args.model_preset, "models", "--model_preset")
    complete_source(args)
    masked = args.objective == "masked"
    if args.pictures is None:
        args.tokenizer = (args.init_from or "bytes") if args.tokenizer is None else args.tokenizer
        args.eval_protocol = args.eval_protocol or ("masked" if masked else "segments")
        args.sample_bytes = (0 if masked else 300) if args.sample_bytes is None else args.sample_bytes
    else:
        args.eval_protocol = args.eval_protocol or "pictures"
        args.sample_pictures = 8 if args.sample_pictures is None else args.sample_pictures
    return args


def flag_name(flag: str, groups: tuple[type, ...] = GROUPS) -> str:
    """The name of a flag, however it is written: `--model-preset`, `--model_preset=a.json` or its alias `--model`."""
    name = flag.partition("=")[0]
    for group in groups:
        for entry in fields(group):
            if name in entry.metadata.get("aliases", ()):
                return entry.name
    return name[2:].replace("-", "_")


def named_flags(argv: list[str], groups: tuple[type, ...] = GROUPS) -> set[str]:
    """The names of the flags that a command line has; those of `groups` may be written by an alias."""
    return {flag_name(item, groups) for item in argv if item.startswith("--")}


def read_preset(path: str, argv: list[str]) -> list[str]:
    """
    The flags that a YAML preset stands for, e.g. `["--batch_size=32"]`, without what `argv` rules out. A value is the
    text that stands there, as on the command line; null is the default of a flag whose default is None.

    Raises:
        ValueError: the file cannot be read, or a key is unknown or has a value of the wrong kind.
    """
    preset = read_yaml(path, "--training_preset", plain=True)
    known = {entry.name: entry for group in GROUPS for entry in fields(group) if entry.name != "training_preset"}
    if unknown := sorted(map(str, set(preset) - set(known))):
        raise ValueError(f"--training_preset {path}: unknown keys {', '.join(unknown)}; known: {sorted(known)}")
    explicit = named_flags(argv)
    rivals = (("max_steps", "num_epochs"), ("num_epochs", "max_steps"), ("model_preset", "init_from"))
    for name, rival in rivals:
        if rival in explicit:
            preset.pop(name, None)
    flags = []
    folder = Path(path).resolve().parent
    for name, value in preset.items():
        is_list = list[str] in (known[name].type, *getattr(known[name].type, "__args__", ()))
        if is_list and isinstance(value, list) and all(isinstance(item, str) for item in value):
            values = [from_folder(folder, name, item, PATHS, MAYBE_PATHS) for item in value]
            flags += [f"--{name}", *values] if value and name not in explicit else []
        elif isinstance(value, str):
            if known[name].type is bool:
                value = {"on": "true", "off": "false"}.get(value.lower(), value)  # which YAML has beside yes and no
            if not is_list or name not in explicit:  # what is explicit would be added to a list
                flags.append(f"--{name}={from_folder(folder, name, value, PATHS, MAYBE_PATHS)}")
        elif value is not None or known[name].default is not None:
            allowed = "a list of texts" if is_list else "one value"
            got = "null" if value is None else reprlib.repr(value)
            raise ValueError(f"--training_preset {path}: {name} must be {allowed}, got {got}")
    return flags


def public_value(name: str, value):
    """The value of a flag as others may read it: no folders of the machine, no credentials of an address."""
    if name == "dataset_url" and value is not None:
        return public_address(value)
    if name in ("imports", "dataset_path") and isinstance(value, list):
        return [readable(public_path(path)) for path in value]
    if name in (*PATHS, *MAYBE_PATHS, "training_preset", "resume", "imports") and value is not None:
        value = public_path(value)
    return readable(value) if isinstance(value, str) else value


def public_flags(argv: list[str]) -> list[str]:
    """A command line as others may read it, in the manner of `public_value`."""
    shown, name = [], ""
    for item in argv:
        if item.startswith("--"):
            flag, equals, value = item.partition("=")
            name = flag_name(flag)
            shown.append(f"{flag}={public_value(name, value)}" if equals else flag)
        else:
            shown.append(public_value(name, item))
    return shown


def prompt_bytes(prompt: str) -> bytes:
    """A prompt in UTF-8. Bytes of the command line that are none, lone surrogates in Python, stay what they are."""
    return prompt.encode("utf-8", "surrogateescape")


def evaluation_protocol(args: argparse.Namespace) -> Protocol:
    """The protocol of the evaluations of a run. A stride is always there, as half of T, and read by sliding alone."""
    stride = args.eval_stride if args.eval_protocol == "sliding" else None
    others = (args.eval_stream_length, args.eval_refresh_every, args.eval_refresh_overlap)
    return Protocol(args.eval_protocol, args.sequence_length, stride, *others, **masking_settings(args))


def flag_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags by themselves, without a look at the model."""
    problems = []

    def check(ok: bool, name: str, allowed: str):
        if not ok:
            problems.append(f"--{name} must be {allowed}, got {getattr(args, name)!r}")

    for name, value in vars(args).items():
        check(value != "" or name == "sample_prompt", name, "given, or left out")
        check(not isinstance(value, float) or math.isfinite(value), name, "a finite number")
        check(not isinstance(value, int) or abs(value) < 2**63, name, "less than 2^63")
    for name in ("output_dir", "cache_dir"):  # which libraries get that want UTF-8
        value = getattr(args, name)
        check(value == readable(value), name, "text that Python's locale can read (PYTHONUTF8=1 reads UTF-8)")
    for name, choices in CHOICES.items():
        check(getattr(args, name) in (*choices, None), name, "one of " + ", ".join(choices))
    for name in ("batch_size", "log_every", "keep_checkpoints"):
        check(getattr(args, name) >= 1, name, "at least 1")
    for name in (
        "micro_batch_size",
        "max_steps",
        "sequence_length",
        "stream_length",
        "eval_stride",
        "eval_batch_size",
    ):
        check(getattr(args, name) is None or getattr(args, name) >= 1, name, "at least 1")
    for name in ("warmup_steps", "weight_decay", "max_grad_norm", "seed", "eval_every", "eval_bytes", "color_shift"):
        check(getattr(args, name) >= 0, name, "at least 0")
    for name in ("sample_every", "sample_bytes", "sample_pictures", "eval_pictures", "test_pictures", "save_every"):
        check(getattr(args, name) is None or getattr(args, name) >= 0, name, "at least 0")
    for name in ("adam_beta1", "adam_beta2"):
        check(0 <= getattr(args, name) < 1, name, "in [0, 1)")
    for name in ("learning_rate", "position_lr_scale"):
        check(getattr(args, name) > 0, name, "positive")
    check(0 <= args.min_lr_ratio <= 1, "min_lr_ratio", "in [0, 1]")
    check(args.seed < 2**32, "seed", "less than 2^32")
    check(args.num_epochs is None or 0 < args.num_epochs <= 1e9, "num_epochs", "positive and at most 1e9")
    check(args.num_epochs is None or args.max_steps is None, "num_epochs", "left out when --max_steps is given")
    check(args.lr_decay != "inverse_sqrt" or args.warmup_steps >= 1, "warmup_steps", "at least 1 with inverse_sqrt")
    check(args.optimizer != "muon" or args.mixed_precision != "fp16", "optimizer", "adamw with fp16")
    problems += source_problems(args)
    has_pictures, defaults = args.pictures is not None, {e.name: e.default for group in GROUPS for e in fields(group)}
    for name in sorted(NOT_OF_PICTURES if has_pictures else OF_PICTURES):
        left_out = f"left out {'with' if has_pictures else 'without'} --pictures"
        check(getattr(args, name) == defaults[name], name, left_out)
    check(args.color_shift <= 255, "color_shift", "at most 255")
    check(not has_pictures or args.objective != "masked", "objective", "causal with --pictures")
    is_bpe, masked = args.tokenizer == "bpe", args.objective == "masked"
    check(is_bpe or args.vocab_size is None, "vocab_size", "left out without --tokenizer bpe")
    least = 258 if masked else 257
    check(not is_bpe or (args.vocab_size or 0) >= least, "vocab_size", f"at least {least} with --tokenizer bpe")
    problems += masking_problems(args, masked, "--objective masked")
    allowed = ("pictures",) if has_pictures else ("masked",) if masked else CAUSAL
    needed = "--pictures" if has_pictures else f"--objective {args.objective}"
    check(args.eval_protocol in allowed, "eval_protocol", f"{' or '.join(allowed)} with {needed}")
    check(not masked or not args.sample_bytes, "sample_bytes", "0 with --objective masked, which continues no text")
    check(not masked or not args.carry_state, "carry_state", "left out with --objective masked, which has no state")
    check(args.init_from is None or args.model_preset is None, "model_preset", "left out with --init_from")
    check(args.ema_decay is None or 0 < args.ema_decay < 1, "ema_decay", "in (0, 1)")
    patience = args.early_stopping_patience
    check(patience is None or patience >= 1, "early_stopping_patience", "at least 1")
    check(patience is None or args.eval_every > 0, "eval_every", "at least 1 with --early_stopping_patience")
    best = args.load_best_model_at_end
    check(not best or args.eval_every > 0, "eval_every", "at least 1 with --load_best_model_at_end")
    both = args.save_every > 0 and args.eval_every % max(args.save_every, 1) == 0
    check(
        not best or both, "save_every", f"a divisor of --eval_every ({args.eval_every}) with --load_best_model_at_end"
    )
    check("none" not in args.report_to or args.report_to == ["none"], "report_to", "trackers, or none alone")
    check(args.streaming or args.shuffle_buffer is None, "shuffle_buffer", "left out without --streaming")
    check(args.shuffle_buffer is None or args.shuffle_buffer >= 0, "shuffle_buffer", "at least 0")
    check(not args.streaming or args.num_epochs is None, "num_epochs", "left out with --streaming, give --max_steps")
    check(not args.streaming or not args.carry_state, "carry_state", "left out with --streaming")
    check(not args.sample_bytes or args.sample_prompt, "sample_prompt", "at least one character")
    try:
        prompt_bytes(args.sample_prompt)
    except UnicodeEncodeError:
        check(False, "sample_prompt", "text that UTF-8 has")
    check(args.carry_state or args.stream_length is None, "stream_length", "left out without --carry_state")
    check(not args.overwrite or args.resume == "none", "overwrite", "left out when --resume is given")
    for look in (
        lambda: args.model_preset and check_file(Path(args.model_preset), "--model_preset"),
        lambda: args.init_from is not None and check_model_name(args.init_from, "--init_from"),
    ):
        try:
            look()
        except ValueError as error:
            problems.append(str(error))
    return problems


def picture_problems(args: argparse.Namespace, config) -> list[str]:
    """
    What is wrong with the pictures, or with the model for them. Their shape decides `sequence_length`, and both are
    filled in.
    """
    from aft.picture_data import check_picture_model, picture_shape

    name = f"--model_preset {args.model_preset}" if args.init_from is None else f"--init_from {args.init_from}"
    try:
        shape = picture_shape(args)
        check_picture_model(config, shape, name)
    except ValueError as error:
        return [str(error)]
    length, size = math.prod(shape), " x ".join(map(str, shape))
    if length < 2:
        return [f"--image_size must be at least 2 for one channel, got {args.image_size}"]
    if args.sequence_length not in (None, length):
        allowed = f"left out, or {length}, the sub-pixels of {size}"
        return [f"--sequence_length must be {allowed}, got {args.sequence_length}"]
    args.picture_shape, args.sequence_length = list(shape), length
    return []


def length_problems(args: argparse.Namespace, config) -> list[str]:
    """What is wrong with `sequence_length`, or with what follows from it, for a model; both are filled in."""
    from aft.model_configs import has_length_limit

    problems = []

    def check(ok: bool, name: str, allowed: str):
        if not ok:
            problems.append(f"--{name} must be {allowed}, got {getattr(args, name)!r}")

    length = getattr(config, "max_position_embeddings", None)
    args.sequence_length = args.sequence_length or length
    if args.sequence_length is None:
        return ["--sequence_length must be given: the model has no max_position_embeddings, got None"]
    if has_length_limit(config) and args.pictures is None:
        check(args.sequence_length <= length, "sequence_length", f"at most max_position_embeddings ({length})")
        check(len(prompt_bytes(args.sample_prompt)) < length, "sample_prompt", f"shorter than {length} bytes")
    if args.carry_state:
        args.stream_length = 4 * args.sequence_length if args.stream_length is None else args.stream_length
        whole = args.stream_length % args.sequence_length == 0 and args.stream_length > args.sequence_length
        check(whole, "stream_length", f"2 sequence_length or more, a multiple of it ({args.sequence_length})")
    args.eval_stride = args.eval_stride or max(args.sequence_length // 2, 1)
    return problems + evaluation_protocol(args).problems(length if has_length_limit(config) else None, "--eval_")


def check_arguments(args: argparse.Namespace, num_processes: int):
    """
    Fills in the values that follow from others, and returns the model's `PreTrainedConfig`.

    Raises:
        ValueError: one error that lists everything that is wrong.
    """
    from accelerate.tracking import get_available_trackers

    from aft.memory_needs import check_memory
    from aft.model_configs import build_config, has_fixed_state, has_length_limit

    import_files(args.imports)
    problems = flag_problems(args)

    def check(ok: bool, name: str, allowed: str):
        if not ok:
            problems.append(f"--{name} must be {allowed}, got {getattr(args, name)!r}")

    check(args.batch_size % num_processes == 0, "batch_size", f"divisible by {num_processes}, the number of processes")
    args.micro_batch_size = args.micro_batch_size or max(args.batch_size // num_processes, 1)
    per_step = args.micro_batch_size * num_processes
    check(args.batch_size % per_step == 0, "batch_size", f"divisible by micro_batch_size x processes ({per_step})")

    args.report_to = [name for name in args.report_to if name != "none"]
    trackers = {str(name) for name in get_available_trackers()}
    lacks = f"of those that are installed ({', '.join(sorted(trackers)) or 'none'})"
    check({*args.report_to} <= trackers, "report_to", lacks)
    config = None
    try:
        config = build_config(args)
    except ValueError as error:
        problems.append(str(error))
    if config is not None and args.carry_state:
        lacks = f"left out: this model, {config.model_type}, has no state of fixed size"
        check(has_fixed_state(config), "carry_state", lacks)
        check(not has_length_limit(config), "carry_state", "left out: this model's position tables end")
        twice = "left out with --carry_state: it would read the state twice"
        check(not args.gradient_checkpointing, "gradient_checkpointing", twice)
    args.picture_shape = None
    if args.pictures is not None and not problems:
        problems += picture_problems(args, config)
    if config is not None:
        problems += length_problems(args, config)
    args.eval_batch_size = args.eval_batch_size or args.micro_batch_size
    if args.objective == "masked" and not problems:
        check(args.sequence_length >= 2, "sequence_length", "at least 2 with --objective masked")
    if not problems:
        problems = check_memory(args, config, num_processes)
    if problems:
        raise ValueError("aft pretrain: " + "; ".join(problems))
    if args.max_steps is None and args.num_epochs is None:
        args.max_steps = 800
    return config
