# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The flags that say what is hidden from a masked language model, in training and in its scores."""

import argparse
from dataclasses import dataclass, fields

from aft.flags import flag


MASK_UNITS = ("token", "word", "span")


@dataclass
class MaskingArguments:
    _argument_group_name = "masked language models"

    mlm_probability: float | None = flag(None, "Share of the tokens of a window that are hidden; None is 0.15.")
    mask_unit: str | None = flag(
        None,
        "What is hidden as a whole: token (default), word (up to the next space), or span, of random length.",
    )
    mean_span_length: float | None = flag(
        None, "Mean number of tokens of a span; None is 20 for bytes, as ByT5 has it, else 3, as T5 does."
    )


def masking_settings(args: argparse.Namespace) -> dict:
    """The values of these flags, by the names that `Protocol` has for them too."""
    return {entry.name: getattr(args, entry.name) for entry in fields(MaskingArguments)}


def masking_problems(args: argparse.Namespace, masked: bool, needed: str) -> list[str]:
    """
    What is wrong with these flags.

    Args:
        masked: whether anything is hidden; None if that is not known yet.
        needed: the flag without which they must be left out.
    """
    problems = []

    def check(ok: bool, name: str, allowed: str):
        if not ok:
            problems.append(f"--{name} must be {allowed}, got {getattr(args, name)!r}")

    if masked is False:
        for name, value in masking_settings(args).items():
            check(value is None, name, f"left out without {needed}")
        return problems
    probability, length = args.mlm_probability, args.mean_span_length
    check(probability is None or 0 < probability < 1, "mlm_probability", "in (0, 1)")
    check(args.mask_unit in (*MASK_UNITS, None), "mask_unit", f"one of {', '.join(MASK_UNITS)}")
    check(length is None or args.mask_unit == "span", "mean_span_length", "left out without --mask_unit span")
    check(length is None or 1 <= length < float("inf"), "mean_span_length", "at least 1 and finite")
    return problems


def complete_masking(args: argparse.Namespace, is_bytes: bool) -> None:
    """Fills in what the flags leave open; `is_bytes` says what the tokens are."""
    args.mlm_probability = 0.15 if args.mlm_probability is None else args.mlm_probability  # of BERT
    args.mask_unit = args.mask_unit or "token"
    if args.mask_unit == "span" and args.mean_span_length is None:
        args.mean_span_length = 20.0 if is_bytes else 3.0
