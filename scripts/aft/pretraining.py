# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A run of `aft pretrain`: set up in its folder, trained, and finished with a score and a saved model."""

import argparse
import contextlib
import copy
import importlib.metadata
import math
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import (
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    parse_flag_from_env,
    set_seed,
)
from tqdm.auto import tqdm
from transformers import DynamicCache

import modeling_aft  # noqa: F401  (registers the model types)
from aft.atomic_files import write_whole
from aft.averaging import WeightAverage
from aft.bits_per_byte import evaluate_split, load_metric
from aft.carried_state import CarriedState
from aft.checkpointing import (
    abandon,
    complete_checkpoints,
    find_checkpoint,
    load_checkpoint,
    prune,
    read_state,
    save_checkpoint,
)
from aft.console import program
from aft.estimates import estimate
from aft.folder_lock import locked
from aft.machine import hardware_name, settle_allocator
from aft.masking import MaskedWindows, Masking, make_masking
from aft.masking_arguments import complete_masking
from aft.model_configs import changed_fields, has_length_limit
from aft.optimization import all_finite, create_optimizers, learning_rate, set_learning_rate
from aft.painting import draw_completions, draw_samples, save_picture
from aft.picture_arguments import source_flags
from aft.picture_data import PictureData, PictureTokens, PictureWindows, load_source
from aft.pretraining_arguments import (
    MAY_DIFFER_ON_RESUME,
    check_arguments,
    evaluation_protocol,
    parse_arguments,
    prompt_bytes,
    public_flags,
    public_value,
)
from aft.protocols import unit_of
from aft.redaction import public_path, readable
from aft.run_folder import check_output, clear_output, save_model
from aft.run_log import (
    HUB_DATASETS,
    RunLog,
    describe_score,
    fill_model_card,
    plot_training_curve,
    read_log,
    today,
)
from aft.saved_models import LANGUAGE_MODELS, first_of, load_config, load_model, without_cache
from aft.streamed_windows import StreamedWindows
from aft.text_sources import DocumentText, FileText
from aft.token_data import TokenData, token_data
from aft.training_windows import TrainingWindows
from aft.vocabulary import make_vocabulary


CAPTIONS = ("Samples", "The upper halves of held-out pictures, completions, and the pictures themselves")
VERSIONS = ("torch", "transformers", "accelerate", "datasets", "evaluate", "tokenizers")


def make_windows(args, text, data: TokenData, vocabulary, accelerator: Accelerator, masking: Masking | None = None):
    """
    The windows that training reads, of pictures, of what is memory-mapped or of a stream; some of their tokens may be
    hidden.
    """
    if isinstance(data, PictureTokens):
        return PictureWindows(data, args.batch_size, args.seed, args.horizontal_flip, args.color_shift)
    if masking is not None:
        return MaskedWindows(make_windows(args, text, data, vocabulary, accelerator), masking, args.seed)
    if text.stream is not None:
        buffer = (1000 if text.separated else 0) if args.shuffle_buffer is None else args.shuffle_buffer
        sizes = (args.sequence_length, args.batch_size, args.micro_batch_size)
        return StreamedWindows(text, vocabulary, *sizes, args.seed, buffer, accelerator)
    start, stop = data.splits["train"]
    sizes = None if data.sizes is None else data.read_sizes
    return TrainingWindows(
        data.read, stop - start, args.sequence_length, args.batch_size, args.seed, args.stream_length, sizes
    )


def seed_step(seed: int, step: int, process: int) -> None:
    """Seeds torch (dropout) for one step of one process."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0]))


def first_rows(accelerator: Accelerator, args) -> range:
    """With which rows of the global batch the micro-batches of this process begin."""
    size = args.micro_batch_size
    return range(accelerator.process_index * size, args.batch_size, accelerator.num_processes * size)


def summed_nats(
    model,
    accelerator: Accelerator,
    windows: TrainingWindows,
    step: int,
    first_row: int,
    args,
    cache: DynamicCache | None = None,
):
    """
    The summed nats, a scalar tensor, of one micro-batch: of the rows of the batch of `step` from `first_row` on. They
    go on from a cache, if there is one, which is updated.
    """
    batch = windows.batch(step, range(first_row, first_row + args.micro_batch_size))
    inputs, labels = (torch.from_numpy(array).to(accelerator.device) for array in batch)  # [micro batch, T]
    past = without_cache(args.objective) if cache is None else {"cache": cache}
    logits = model(input_ids=inputs, **past).logits
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")


def train_step(
    model,
    optimizers,
    accelerator: Accelerator,
    windows: TrainingWindows,
    step: int,
    args,
    carried: CarriedState | None = None,
) -> torch.Tensor:
    """
    One optimizer step on the global batch of `step`; returns the summed nats of this process's windows, and the bytes
    of text that their labels stand for, float64 [2].
    """
    seed_step(args.seed, step, accelerator.process_index)
    set_learning_rate(optimizers, learning_rate(step, args))
    nats, num_bytes = torch.zeros((), device=accelerator.device), 0
    rows = first_rows(accelerator, args)
    for first_row in rows:
        cache = None if carried is None else carried.before(step, first_row)
        with contextlib.nullcontext() if first_row == rows[-1] else accelerator.no_sync(model):
            loss = summed_nats(model, accelerator, windows, step, first_row, args, cache)
            # Gradients are averaged over processes, so this makes them those of the mean over the global batch.
            accelerator.backward(loss * accelerator.num_processes / (args.batch_size * windows.labels_per_window))
        nats += loss.detach()
        num_bytes += int(windows.sizes(step, range(first_row, first_row + args.micro_batch_size)).sum())
        if carried is not None:
            carried.keep(first_row, cache)
    if args.max_grad_norm > 0:
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack([nats, torch.full_like(nats, num_bytes)])


def sample_text(model, vocabulary, args) -> str:
    """The prompt and a sampled continuation of it, with U+FFFD for bytes that are not UTF-8."""
    prompt = vocabulary.encode_prompt(prompt_bytes(args.sample_prompt))
    num_tokens = args.sample_bytes
    if has_length_limit(model.config):
        num_tokens = min(num_tokens, model.config.max_position_embeddings - len(prompt))
    was_training = model.training
    model.eval()
    torch.manual_seed(args.seed)
    ids = model.generate(torch.tensor([prompt], device=model.device), max_new_tokens=num_tokens)[0].tolist()
    model.train(was_training)
    return vocabulary.decode(ids).decode("utf-8", errors="replace")


def sample_pictures(model, data: PictureTokens, args, folder: Path, name: str) -> list[str]:
    """
    Draws pictures from nothing, and completes the lower halves of some of valid; writes `{name}.png` and
    `{name}-completed.png` to a folder, and returns these names.
    """
    count, batch_size = args.sample_pictures, max(args.sample_pictures, args.eval_batch_size)
    samples = draw_samples(model, data.shape, count, args.seed, batch_size)
    pictures = data.pictures["valid"][: -(-count // 4)].reshape(-1, *data.shape)
    completed = draw_completions(model, pictures, data.shape[0] // 2, args.seed, batch_size)
    files = {f"{name}.png": samples, f"{name}-completed.png": completed}
    for file, picture in files.items():
        save_picture(picture, folder / file)
    return list(files)


def draw_sample(model, vocabulary, data: TokenData, args, folder: Path, name: str = "samples") -> dict:
    """A sample of text, or the names of the files with pictures that are written to a folder, as the log has it."""
    if isinstance(data, PictureTokens):
        return {"files": sample_pictures(model, data, args, folder, name)}
    return {"text": sample_text(model, vocabulary, args)}


def final_sample(sample: dict) -> dict:
    """What the final event of the log has of a sample, {} for none: that of the card."""
    pictures = zip(sample.get("files", []), CAPTIONS, strict=False)
    return {
        "sample": sample.get("text", ""),
        "pictures": [{"file": file, "caption": caption} for file, caption in pictures],
    }


def describe_run(args, accelerator: Accelerator, model, text, data: TokenData, vocabulary, windows) -> dict:
    """Every quantity that follows from the arguments, for the log and the terminal."""
    per_epoch = windows.windows_per_epoch
    num_bytes = dict(data.num_bytes)
    if text.stream is not None:
        num_bytes["train"] = None  # nobody knows
    return {
        "model": f"{model.config.model_type}, {type(model).__name__}",
        "init_from": None if args.init_from is None else public_value("init_from", args.init_from),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data": text.name,
        "data_sha256": data.sha256,
        "hub_dataset": HUB_DATASETS.get(text.known.name) if text.known else text.hub_dataset,
        **{f"{split}_bytes": count for split, count in num_bytes.items()},
        **describe_tokens(text, data, vocabulary),
        "windows_per_epoch": per_epoch,
        "epochs": per_epoch and round(args.max_steps * args.batch_size / per_epoch, 3),
        "steps": args.max_steps,
        "tokens": args.max_steps * args.batch_size * args.sequence_length,
        "tokens_per_step": args.batch_size * args.sequence_length,
        **describe_needs(args, model.config),
        "micro_batches_per_step": args.batch_size // (args.micro_batch_size * accelerator.num_processes),
        "num_processes": accelerator.num_processes,
        "hardware": hardware_name(accelerator.device),
        "precision": accelerator.mixed_precision if accelerator.mixed_precision != "no" else "float32",
    }


def describe_needs(args, config) -> dict:
    """What a step takes, as far as shapes tell: operations, and memory in float32 without anything that saves it."""
    found = estimate(config, args.sequence_length, args.objective)
    if found is None:
        return {}
    return {
        "flops_per_token": round(found.flops_per_token),
        "megabytes_of_weights_and_averages": round(found.state_bytes / 1e6),
        "megabytes_per_window": round(found.window_bytes / 1e6, 1),
    }


def describe_tokens(text: FileText | DocumentText | PictureData, data: TokenData, vocabulary) -> dict:
    """What the tokens are, where they are no bytes, and how many of them the text has."""
    if isinstance(text, PictureData):
        return text.describe()
    facts = {}
    if text.are_documents:
        facts["documents"] = "each ends with a token" if vocabulary.end is not None else "not separated"
    if vocabulary.is_bytes:
        return facts
    tokens = {f"{split}_tokens": stop - start for split, (start, stop) in data.splits.items()}
    if text.stream is not None:
        del tokens["train_tokens"]
    start, stop = data.splits["test"]
    return {
        "tokenizer": readable(public_path(vocabulary.name)),
        "vocab_size": vocabulary.size,
        "keeps_text": vocabulary.is_exact,
        **tokens,
        "test_bytes_per_token": round(data.num_bytes["test"] / (stop - start), 3),
        **facts,
    }


@dataclass
class Run:
    """A run that is set up: `train` goes from `state["step"]` to the end, `finish` scores and saves the model."""

    args: argparse.Namespace
    accelerator: Accelerator
    model: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    data: TokenData
    vocabulary: object
    windows: TrainingWindows | StreamedWindows | MaskedWindows | PictureWindows
    masking: Masking | None  # with --objective masked
    carried: CarriedState | None  # with --carry_state
    average: WeightAverage | None  # with --ema_decay
    log: RunLog
    scores: list[tuple[int, float]]  # steps and bits per byte of the evaluations on valid
    folder: Path
    state: dict  # of the last checkpoint
    identity: dict  # what decides the weights
    step: int = 0  # how many steps are done

    def report(self, text: str) -> None:
        """Prints above the progress bar, once."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def averaged(self):
        """A block in which the model has the averages of its weights, if there are any."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    @property
    def best(self) -> int | None:
        """The step of the checkpoint whose model is the best on valid; None before there is one."""
        saved = [(score, step) for step, score in self.scores if self.is_due("save", step)]
        return min(saved)[1] if saved else None

    @property
    def is_over(self) -> bool:
        """Whether the last evaluations were no better than the best before, as often as patience allows."""
        scores, patience = [score for _, score in self.scores], self.args.early_stopping_patience
        return patience is not None and bool(scores) and len(scores) - 1 - scores.index(min(scores)) >= patience

    def check(self, ok: bool, what: str, step: int) -> None:
        """Ends a run that has diverged, and names the checkpoint that is left."""
        if not ok:
            found = complete_checkpoints(self.folder / "checkpoints")
            left = f"the last checkpoint before is {found[-1]}" if found else "there is no checkpoint before"
            raise FloatingPointError(f"{what} at step {step}: the run has diverged, lower --learning_rate; {left}")

    def evaluate(self, split: str, step: int, max_bytes: int = 0) -> dict:
        """Scores a split, or its first `max_bytes`, and logs the result."""
        protocol, batch_size = evaluation_protocol(self.args), self.args.eval_batch_size
        try:
            with self.averaged():
                result = evaluate_split(
                    self.model, self.data, split, self.accelerator, protocol, batch_size, max_bytes, self.masking
                )
            if not math.isfinite(result["bits_per_byte"]):
                raise FloatingPointError(f"the score is {describe_score(result)}")
        except FloatingPointError as error:
            if self.accelerator.is_main_process:
                abandon(self.folder / "checkpoints", step - 1)  # with the one of this step, if it was saved
            self.accelerator.wait_for_everyone()
            self.check(False, f"{error} on {split}", step)
        self.log.write("evaluation", split=split, step=step, **result)
        self.report(f"step {step}: {split} {describe_score(result)}")
        return result

    @property
    def has_samples(self) -> bool:
        return bool(self.args.sample_bytes or self.args.sample_pictures)

    def sample(self, step: int) -> None:
        """Logs and shows a sample; a sharded model has none, because it cannot generate on one process."""
        if self.accelerator.is_main_process and self.accelerator.distributed_type != DistributedType.FSDP:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            with self.averaged():
                name = f"samples-{step}"
                sample = draw_sample(model, self.vocabulary, self.data, self.args, self.folder, name)
            self.log.write("sample", step=step, **sample)
            self.report(describe_sample(sample, f"sample at step {step}"))

    def is_due(self, name: str, step: int) -> bool:
        """Whether what happens each `--{name}_every` steps, and after the last one, happens after this step."""
        every = getattr(self.args, f"{name}_every")
        return step == self.args.max_steps or (every > 0 and step % every == 0)

    def measure(self, step: int) -> None:
        """Evaluates and samples if it is time, after the checkpoint of the step: whatever fails here loses none."""
        if self.is_due("eval", step):
            most = self.args.eval_bytes or self.args.eval_pictures * self.windows.length
            self.scores.append((step, self.evaluate("valid", step, most)["bits_per_byte"]))
        if self.has_samples and step < self.args.max_steps and self.is_due("sample", step):
            self.sample(step)  # the last sample is made of the saved model

    @torch.no_grad()
    def is_sound(self, step: int) -> bool:
        """Whether all numbers of the model and its optimizers are finite, and its loss on a micro-batch to come is."""
        self.model.eval()
        first_row = first_rows(self.accelerator, self.args)[0]
        # A copy: the forward pass updates the cache.
        cache = None if self.carried is None else copy.deepcopy(self.carried.before(step, first_row))
        nats = summed_nats(self.model, self.accelerator, self.windows, step, first_row, self.args, cache)
        self.model.train()
        sound = all_finite(self.model, self.optimizers) and math.isfinite(nats.item())
        return self.accelerator.reduce(torch.tensor(float(not sound), device=nats.device), "sum").item() == 0

    def save(self, step: int) -> None:
        """Saves a checkpoint, whose model is yet to be measured."""
        self.check(self.is_sound(step), "weights or loss are not finite", step)
        self.log.sync()
        self.state |= {
            "step": step,
            "log_lines": self.log.num_lines,
            "identity": self.identity,
            "measured": False,
        }
        save_checkpoint(self.accelerator, self.folder / "checkpoints", self.state)

    def prune(self) -> None:
        """Removes old checkpoints; the model of the newest has proved good."""
        if self.accelerator.is_main_process:
            prune(self.folder / "checkpoints", self.args.keep_checkpoints, self.best)

    def train(self) -> None:
        """Trains, and saves, evaluates and samples on the way."""
        args, state = self.args, self.state
        self.step = state["step"]
        if not state.get("measured", True):  # the run that saved this checkpoint may have ended before
            self.measure(state["step"])
        self.model.train()
        with tqdm(
            total=args.max_steps,
            initial=state["step"],
            unit="step",
            disable=not self.accelerator.is_main_process,
        ) as progress:
            sums, tokens, started = 0.0, 0, time.perf_counter()  # of nats and bytes
            for step in range(state["step"], args.max_steps):
                if self.is_over:
                    self.report(f"valid has not become better {args.early_stopping_patience} times: the run ends")
                    break
                sums += train_step(
                    self.model, self.optimizers, self.accelerator, self.windows, step, args, self.carried
                )
                if self.average is not None:
                    self.average.update()
                tokens += args.batch_size * args.sequence_length
                done = self.step = step + 1
                progress.update()
                # A line also stands before everything that is no training, so that no measured time includes it.
                if not any(self.is_due(name, done) for name in ("log", "eval", "sample", "save")):
                    continue
                nats, num_bytes = self.accelerator.reduce(sums, reduction="sum").tolist()
                bits_per_byte = nats / (math.log(2) * max(num_bytes, 1))
                seconds = time.perf_counter() - started
                self.check(math.isfinite(bits_per_byte), f"the loss is {bits_per_byte}", done)
                state["training_seconds"] += seconds
                rates = {"learning_rate": learning_rate(step, args), "tokens_per_second": tokens / seconds}
                seconds = state["training_seconds"]
                self.log.write("train", step=done, bits_per_byte=bits_per_byte, **rates, seconds=seconds)
                unit, _ = unit_of(args.eval_protocol)
                progress.set_postfix_str(f"{bits_per_byte:.3f} {unit}, {rates['tokens_per_second']:,.0f} tokens/s")
                if self.is_due("save", done):
                    self.save(done)
                    self.measure(done)
                    self.prune()
                else:
                    self.measure(done)
                sums, tokens, started = 0.0, 0, time.perf_counter()

    def finish(self) -> dict:
        """Scores the test split, saves the model with curve and card, and returns the final event of the log."""
        step, best = self.step, self.best
        if best is not None:
            self.report(f"best on valid: step {best}")
            if self.args.load_best_model_at_end and best != step:
                load_checkpoint(self.accelerator, self.folder / "checkpoints" / f"step-{best}")
                step = best
        test = self.evaluate("test", step, self.args.test_pictures * self.windows.length)
        with self.averaged():
            save_model(self.model, self.accelerator, self.folder, self.vocabulary)
        self.prune()
        path = self.folder.resolve()
        final = {"step": step, "test_bits_per_byte": test["bits_per_byte"]}
        final |= {"model_name": readable(path.name), "training_seconds": self.state["training_seconds"]}
        if self.accelerator.is_main_process:
            sample = {}
            if self.has_samples:  # from the folder, which shows that it loads
                model = LANGUAGE_MODELS["causal"].from_pretrained(self.folder)
                sample = draw_sample(model, self.vocabulary, self.data, self.args, self.folder)
            final |= final_sample(sample)
            self.log.write("final", **final, model_path=readable(public_path(self.args.output_dir)))
            self.log.sync()
            events = read_log(self.log.path)
            plot_training_curve(events, self.folder / "training_curve.png")
            write_whole(self.folder / "README.md", fill_model_card(events))
            if sample:
                print(describe_sample(sample, "sample"))
            print(f"test: {describe_score(test)}\nmodel: {path}")
            print(next_commands(self.args))
        self.accelerator.wait_for_everyone()
        return {**final, "model_path": str(path)}


def describe_sample(sample: dict, title: str) -> str:
    """A sample of `Run.draw` as it is shown."""
    return f"{title}: {', '.join(sample['files'])}" if "files" in sample else f"--- {title}\n{sample['text']}\n---"


def next_commands(args: argparse.Namespace) -> str:
    """What to type when a run has ended: three commands for its model."""
    aft, folder = program(), shlex.quote(args.output_dir)
    evaluation = f"{aft} evaluate {folder} {shlex.join(source_flags(args))}".rstrip()
    tuning = f"{aft} finetune --model {folder} --{{}} FILE --output_dir {folder}-tuned"
    if args.pictures is not None:
        commands = [f"{aft} paint {folder} --output {folder}/painted.png", evaluation, f"{aft} push --help"]
    elif args.objective == "masked":
        commands = [evaluation, tuning.format("labelled_file"), f"{aft} push --help"]
    else:
        commands = [f'{aft} generate --model {folder} --prompt "The "', evaluation, tuning.format("text_file")]
    return "\n  ".join(["next:", *commands])


def make_accelerator(args) -> Accelerator:
    """
    The accelerator of the run.

    Raises:
        ValueError: the optimizer, or carrying a state, does not work with its precision or its sharding.
    """
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        dynamo_backend="inductor" if args.compile else None,
        # train_step divides the loss itself; without this, a launch file could make backward divide it again.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=args.report_to or None,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir) / "tensorboard")),
    )
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if args.optimizer == "muon" and (sharded or accelerator.mixed_precision == "fp16"):
        reason = (
            "with FSDP: Muon needs whole matrices"
            if sharded
            else "with fp16, whose loss scale belongs to one optimizer"
        )
        raise ValueError(f"--optimizer must be adamw {reason}, got 'muon'")
    if args.ema_decay is not None and sharded:
        raise ValueError(f"--ema_decay must be left out with FSDP, whose weights are sharded, got {args.ema_decay}")
    if args.carry_state and sharded and accelerator.state.fsdp_plugin.activation_checkpointing:
        raise ValueError(
            "--carry_state must be left out with fsdp_activation_checkpointing, which would read the state twice, got "
            "True"
        )
    return accelerator


def open_log(args, accelerator: Accelerator, checkpoint: Path | None, state: dict, argv: list[str], **facts) -> RunLog:
    """The log of the run, which begins with its config event, or goes on where `checkpoint` was saved."""
    log = RunLog(
        Path(args.output_dir) / "run.jsonl",
        continues=None if checkpoint is None else checkpoint.parent.parent / "run.jsonl",
        keep_lines=state["log_lines"],
        track=accelerator.log if args.report_to else None,
        active=accelerator.is_main_process,
    )
    command = shlex.join(["aft", "pretrain", *public_flags(argv)])
    if args.report_to:
        arguments = {name: str(public_value(name, value)) for name, value in vars(args).items()}
        last_step = log.kept[-1].get("step", 0) if log.kept else 0
        options = {"tensorboard": {"purge_step": last_step + 1 if log.kept else None}}
        accelerator.init_trackers("aft", arguments, options)
    if log.active and (missing := state["log_lines"] - len(log.kept)):
        print(f"run.jsonl beside {checkpoint} has {missing} lines less than when that was saved", file=sys.stderr)
    if not any(event["event"] == "config" for event in log.kept):
        versions = {package: importlib.metadata.version(package) for package in VERSIONS}
        log.write(
            "config",
            **facts,
            arguments={name: public_value(name, value) for name, value in vars(args).items()},
            versions={"Python": platform.python_version(), **versions},
            command=command,
            date=today(),
        )
    if checkpoint is not None:
        log.write("resume", step=state["step"], command=command)
    return log


def added_tensors(args, config) -> frozenset[str]:
    """The names of the tensors that `--model_override` adds to the model of `--init_from`, as a decay does."""
    if not args.model_override:
        return frozenset()
    with torch.device("meta"):
        saved, changed = (
            LANGUAGE_MODELS[args.objective].from_config(each).state_dict()
            for each in (load_config(args.init_from), config)
        )
    return frozenset(changed) - frozenset(saved)


def set_up(args, argv: list[str], config) -> Run:
    """
    Everything that a run needs, in its folder, which is held for it. Nothing of an earlier run is touched before all
    else is there.

    Raises:
        ValueError: the arguments do not fit the data, the checkpoint, or what is in the folder.
    """
    folder = Path(args.output_dir)
    checkpoint = find_checkpoint(args.resume, folder / "checkpoints")
    accelerator = make_accelerator(args)
    transformers.utils.logging.disable_progress_bar()
    with accelerator.local_main_process_first():
        load_metric()  # before the training, in which nothing may keep it from loading
        text = load_source(args)
        vocabulary = make_vocabulary(args, text)
        data = PictureTokens(text) if args.pictures is not None else token_data(text, vocabulary, args.cache_dir)
    masking = None
    if args.objective == "masked":
        complete_masking(args, vocabulary.is_bytes)
        masking = make_masking(args, vocabulary, text.are_documents)
    windows = make_windows(args, text, data, vocabulary, accelerator, masking)
    if text.are_documents and vocabulary.end is not None:
        config.eos_token_id = vocabulary.end  # where generate stops
    if args.max_steps is None:
        args.max_steps = math.ceil(args.num_epochs * windows.windows_per_epoch / args.batch_size)

    identity = {key: value for key, value in vars(args).items() if key not in MAY_DIFFER_ON_RESUME}
    identity |= {"data": data.sha256, "num_processes": accelerator.num_processes}
    identity |= {"mixed_precision": accelerator.mixed_precision, "model_config": changed_fields(config)}
    state = {"step": 0, "log_lines": 0, "training_seconds": 0.0}
    if checkpoint is not None:
        state = read_state(checkpoint, identity)
    check_output(args, checkpoint)

    set_seed(args.seed)
    auto_class = LANGUAGE_MODELS[args.objective]
    if args.init_from is None:
        model = auto_class.from_config(config)
    else:
        options = {"config": config, "dtype": torch.float32, "added": added_tensors(args, config)}
        model, new = load_model(auto_class, args.init_from, "--init_from", **options)
        if new:
            accelerator.print(f"not in {args.init_from}, so new: {first_of(new)}")
    if args.pictures is not None:
        model.generation_config = vocabulary.processor().generation_config()
    elif args.objective == "causal":
        model.generation_config.update(do_sample=True, temperature=0.8, top_k=40)
        if has_length_limit(config):  # else pipelines ask for 256 tokens, whatever there is room for
            model.generation_config.max_new_tokens = max(1, config.max_position_embeddings // 2)
    # What tools take for the length that the model knows.
    if not has_length_limit(config) and hasattr(config, "max_position_embeddings"):
        model.config.max_position_embeddings = args.sequence_length
    if args.gradient_checkpointing:
        # transformers 5.23 gave gradient_checkpointing_enable this new name.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    facts = describe_run(args, accelerator, model, text, data, vocabulary, windows)
    model, *optimizers = accelerator.prepare(model, *create_optimizers(model, args))
    rows = first_rows(accelerator, args)
    average = None
    if args.ema_decay is not None:
        average = WeightAverage(accelerator.unwrap_model(model), args.ema_decay)
        accelerator.register_for_checkpointing(average)
    carried = CarriedState(config, windows, rows, accelerator) if args.carry_state else None
    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint)

    for key, value in facts.items():
        if value is not None:
            accelerator.print(f"{key.replace('_', ' ')}: {f'{value:,}' if type(value) is int else value}")
    accelerator.print(f"checkpoint: {checkpoint or 'none, starting from the beginning'}")
    accelerator.wait_for_everyone()  # all processes have looked before one of them writes
    if accelerator.is_main_process:
        clear_output(args, checkpoint, state["step"])
    facts["model_config"] = identity["model_config"]
    log = open_log(args, accelerator, checkpoint, state, argv, **facts)
    scores = [
        (event["step"], event["bits_per_byte"])
        for event in log.kept
        if event["event"] == "evaluation" and event["split"] == "valid"
    ]
    [scores] = broadcast_object_list([scores])  # of the process that has the log
    parts = (model, optimizers, data, vocabulary, windows, masking, carried, average)
    return Run(args, accelerator, *parts, log, scores, folder, state, identity)


def pretrain(argv: list[str]) -> dict:
    """
    A whole run of `aft pretrain`, with its flags.

    Returns:
        The final event of the log, with the path of the model in `model_path`.

    Raises:
        ValueError: a flag or a file is wrong, or another run holds the folder.
        OSError: something cannot be read or written.
        FloatingPointError: the run has diverged; no model is written, and the checkpoints before that are there.
    """
    args = parse_arguments(argv)
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "aft pretrain: distributed_type of the launch file must not be DEEPSPEED, whose engine steps after "
            "every micro-batch; configuration/accelerate/fsdp.yaml shards the state of this script"
        )
    # Before Accelerator, so that a wrong precision is one of the problems that are listed together.
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    config = check_arguments(args, processes.num_processes)
    with locked(Path(args.output_dir), active=processes.is_main_process):
        processes.wait_for_everyone()  # no process looks into the folder before it is held
        run = set_up(args, argv, config)
        settle_allocator()
        run.train()
        final = run.finish()
        run.accelerator.end_training()
        return final
