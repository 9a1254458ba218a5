# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Trains a model to add numbers digit by digit, as characters, and counts the sums that it gets right.

    python scripts/addition.py --output_dir runs/addition
    python scripts/addition.py --output_dir runs/addition --digits 2 --max_steps 6000 --learning_rate 2e-3

A row of the data is an equation of N digits, "017+985=1002" and a line end: 3 N + 4 characters of 13. The sums that
are counted are of pairs that training never shows.
"""

import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from aft.atomic_files import move_model
from aft.console import run_program
from aft.model_configs import make_config
from aft.optimization import create_optimizers, learning_rate, set_learning_rate
from aft.settings_files import read_json


CHARACTERS = "0123456789+=\n"  # the token ids are their places
HELD_BACK = 10_000  # pairs that are scored and never trained on; a tenth of all where those are fewer


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """
    The flags of this script.

    Raises:
        ValueError: one error that lists every value that is not allowed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preset = Path(__file__).resolve().parent.parent / "configuration" / "models" / "z1t-addition.json"
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--model_preset", type=Path, default=preset, help="configuration of a model of 13 tokens")
    parser.add_argument("--digits", type=int, default=3, help="N, of both numbers (default: %(default)s)")
    parser.add_argument("--max_steps", type=int, default=20_000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=128, help="equations per step (default: %(default)s)")
    parser.add_argument("--optimizer", default="adamw", help="adamw, or muon and adamw (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="at its peak (default: %(default)s)")
    parser.add_argument("--warmup_steps", type=int, default=500, help="steps to the peak (default: %(default)s)")
    parser.add_argument("--eval_every", type=int, default=500, help="steps between scores (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    # The recipe of the published addition task, by the names that shared/optimization.py reads.
    parser.set_defaults(weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95)
    parser.set_defaults(position_lr_scale=1.0, lr_decay="cosine", min_lr_ratio=0.1)
    args = parser.parse_args(argv)
    counts = ("digits", "max_steps", "batch_size", "eval_every")
    problems = [
        f"--{name} must be {allowed}, got {getattr(args, name)}"
        for name, ok, allowed in (
            *((name, getattr(args, name) >= 1, "at least 1") for name in counts),
            ("digits", args.digits <= 9, "at most 9"),
            ("optimizer", args.optimizer in ("adamw", "muon"), "adamw or muon"),
            ("learning_rate", 0 < args.learning_rate < float("inf"), "positive and finite"),
            ("warmup_steps", args.warmup_steps >= 0, "at least 0"),
        )
        if not ok
    ]
    if args.output_dir.exists() and not args.output_dir.is_dir():
        problems.append(f"--output_dir must be a folder, got {args.output_dir}")
    if problems:
        raise ValueError("; ".join(problems))
    return args


def write_equations(pairs: np.ndarray, digits: int) -> torch.Tensor:
    """[B, 3 N + 4] token ids of "x+y=z" and a line end, padded with zeros; a pair is the number x 10^N + y, [B]."""
    x, y = np.divmod(pairs, 10**digits)
    column = np.full(len(pairs), CHARACTERS.index("+")), np.full(len(pairs), CHARACTERS.index("="))
    end = np.full(len(pairs), CHARACTERS.index("\n"))

    def spell(numbers: np.ndarray, length: int) -> list[np.ndarray]:
        return [numbers // 10**power % 10 for power in reversed(range(length))]

    columns = [*spell(x, digits), column[0], *spell(y, digits), column[1], *spell(x + y, digits + 1), end]
    return torch.from_numpy(np.stack(columns, 1))


def draw_held_back(digits: int) -> np.ndarray:
    """The pairs that are scored, the same for every seed; sorted."""
    count = min(HELD_BACK, 10 ** (2 * digits) // 10)
    return np.sort(np.random.default_rng(0).choice(10 ** (2 * digits), count, replace=False, shuffle=False))


def draw_pairs(random: np.random.Generator, count: int, digits: int, held_back: np.ndarray) -> np.ndarray:
    """Pairs to train on, uniformly among all that are not held back, [count]."""
    pairs = random.integers(10 ** (2 * digits), size=count)
    while (wrong := np.isin(pairs, held_back)).any():
        pairs[wrong] = random.integers(10 ** (2 * digits), size=int(wrong.sum()))
    return pairs


@torch.no_grad()
def exact_match(model: PreTrainedModel, equations: torch.Tensor, digits: int) -> float:
    """The share of equations [B, 3 N + 4] whose sum, all of its digits and the line end, is what the model continues
    them with, the likeliest character each time."""
    model.eval()
    prompts, right = equations[:, : 2 * digits + 2], 0
    for rows, prompt in zip(equations.split(1000), prompts.split(1000), strict=True):
        mask = torch.ones_like(prompt)
        written = model.generate(prompt, attention_mask=mask, max_new_tokens=digits + 2, do_sample=False)
        right += int((written == rows).all(1).sum())
    model.train()
    return right / len(equations)


def train(model: PreTrainedModel, args: argparse.Namespace) -> float:
    """Trains a model as the flags say, prints how it goes, and returns the `exact_match` of what is held back."""
    random = np.random.default_rng(args.seed)
    held_back = draw_held_back(args.digits)
    equations = write_equations(held_back, args.digits)
    some = equations[:: max(len(equations) // 1000, 1)]
    optimizers = create_optimizers(model, args)
    start = perf_counter()
    model.train()
    for step in range(args.max_steps):
        rows = write_equations(draw_pairs(random, args.batch_size, args.digits, held_back), args.digits)
        loss = model(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_learning_rate(optimizers, learning_rate(step, args))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % args.eval_every == 0:
            score, seconds = exact_match(model, some, args.digits), perf_counter() - start
            print(f"step {step + 1}  loss {loss.item():.4f}  exact match {score:.2%}  {seconds:.0f} s", flush=True)
    return exact_match(model, equations, args.digits)


def main(argv: list[str] | None = None) -> float:
    """
    Trains, scores and saves a model; returns the share of sums of the held-back pairs that are right.

    Raises:
        ValueError: a flag is wrong, or the configuration is none of a causal model of 13 tokens.
    """
    args = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    config = make_config(read_json(args.model_preset, "--model_preset"), f"--model_preset {args.model_preset}")
    if config.vocab_size != len(CHARACTERS):
        raise ValueError(f"--model_preset must be of {len(CHARACTERS)} tokens, got {config.vocab_size}")
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()  # as large as the sinusoids that are added to it
    start = perf_counter()
    score = train(model, args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".") as temporary:
        model.save_pretrained(temporary)
        move_model(Path(temporary), args.output_dir)
    count, seconds = len(draw_held_back(args.digits)), perf_counter() - start
    print(f"exact match {score:.2%} of {count} held-back sums, {seconds:.0f} s; wrote {args.output_dir}")
    return score


if __name__ == "__main__":
    run_program(main)
