# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Bits per byte, or per dimension, of a saved model: what `aft evaluate` does."""

import argparse

import transformers
from accelerate import Accelerator

from aft.atomic_files import write_rows
from aft.bits_per_byte import evaluate_split
from aft.masking import Masking, make_masking
from aft.masking_arguments import complete_masking, masking_problems, masking_settings
from aft.model_configs import has_length_limit
from aft.picture_data import (
    PictureTokens,
    check_picture_model,
    load_pictures,
    picture_shape,
)
from aft.protocols import CAUSAL, POSITION_COLUMNS, Protocol
from aft.run_log import describe_protocol, describe_score
from aft.saved_models import LANGUAGE_MODELS, load_config, load_model, objective_of, shape_of_model
from aft.text_sources import load_text
from aft.token_data import TokenData, tokens_at_hand
from aft.vocabulary import START_OF_PICTURE, vocabulary_of_model


def choose_protocol(config, args: argparse.Namespace) -> Protocol:
    """
    The protocol that the flags name, for a model; T is `max_position_embeddings` and S half of T if they do not say.

    Raises:
        ValueError: the model has no such length, its position tables end before the protocol does, or a flag does not
            belong to the protocol or the model, or fit the others.
    """
    masked = objective_of(config) == "masked"
    allowed = ("masked",) if masked else CAUSAL
    if args.protocol not in (*allowed, None):
        kind = f"a {'masked' if masked else 'causal'} language model"
        raise ValueError(f"--protocol must be {' or '.join(allowed)} for {kind}, got {args.protocol!r}")
    if problems := masking_problems(args, masked, "a masked language model"):
        raise ValueError("aft evaluate: " + "; ".join(problems))
    limit = getattr(config, "max_position_embeddings", None)
    length = args.length or limit
    if length is None:
        raise ValueError("--length must be given: the model has no max_position_embeddings")
    limit = limit if has_length_limit(config) else None
    if limit is not None and length > limit:
        raise ValueError(f"--length must be at most max_position_embeddings ({limit}), got {length}")
    stride = max(length // 2, 1) if args.protocol == "sliding" and args.stride is None else args.stride
    others = (args.stream_length, args.refresh_every, args.refresh_overlap)
    protocol = Protocol(args.protocol or allowed[0], length, stride, *others, **masking_settings(args))
    if problems := protocol.problems(limit):
        raise ValueError("aft evaluate: " + "; ".join(problems))
    return protocol


def read_text(args: argparse.Namespace, config) -> tuple[TokenData, Protocol, Masking | None]:
    """The tokens of the text of the flags, how they are scored, and what is hidden from a masked model."""
    protocol = choose_protocol(config, args)
    vocabulary = vocabulary_of_model(args.model, config, trust_remote_code=args.trust_remote_code)
    text = load_text(args)
    data = tokens_at_hand(text, vocabulary, args.cache_dir)
    if objective_of(config) != "masked":
        return data, protocol, None
    complete_masking(args, vocabulary.is_bytes)
    protocol = choose_protocol(config, args)
    return data, protocol, make_masking(protocol, vocabulary, text.are_documents)


def read_pictures(args: argparse.Namespace, config) -> tuple[TokenData, Protocol, None]:
    """
    The same for pictures: of the size that the model has, if its folder says it.

    Raises:
        ValueError: the model is none of pictures of this size, or they cannot be read.
    """
    shape = shape_of_model(args.model)
    if shape is None:
        shape = picture_shape(args)
    check_picture_model(config, shape, f"--model {args.model}", starts=False)
    start = START_OF_PICTURE if config.vocab_size > START_OF_PICTURE else None
    data = PictureTokens(load_pictures(args, shape), start)
    return data, Protocol("pictures", data.length, first_bits=8.0 if start is None else None), None


def evaluate(args: argparse.Namespace) -> dict:
    """
    The score of a model, with the flags of `aft evaluate`.

    Raises:
        ValueError: a flag does not fit the model, or the model is not whole and finite, or the text cannot be read.
        FloatingPointError: the score is NaN or infinite.
    """
    transformers.utils.logging.disable_progress_bar()
    trust = {"trust_remote_code": args.trust_remote_code}
    config = load_config(args.model, **trust)
    accelerator = Accelerator()
    with accelerator.local_main_process_first():
        read = read_text if args.pictures is None else read_pictures
        data, protocol, masking = read(args, config)
    model, _ = load_model(LANGUAGE_MODELS[objective_of(config)], args.model, dtype=args.dtype, **trust)
    model, options = accelerator.prepare(model), {"masking": masking}
    if args.max_pictures is not None:
        options["max_bytes"] = args.max_pictures * protocol.length
    result = evaluate_split(model, data, args.split, accelerator, protocol, args.batch_size, **options)
    accelerator.print(f"{args.split}: {describe_score(result)} ({describe_protocol(result)})")
    if args.by_position is not None and accelerator.is_main_process:
        names = {"model": args.model, "split": args.split, "protocol": describe_protocol(result)}
        rows = [{**names, **row} for row in result["by_position"]]
        write_rows(args.by_position, POSITION_COLUMNS, rows)
    return result
