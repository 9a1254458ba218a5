# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The encoder-decoder of `aft seq2seq` and its tokenizer: saved, or new ones that fit each other."""

from collections.abc import Iterable

import torch
from tokenizers import processors
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig, PreTrainedConfig

from aft.finetuning_flags import is_preset, read_preset
from aft.model_configs import override, stack_limits
from aft.saved_models import load, load_config, load_model
from aft.seq2seq_flags import PRESETS, Seq2SeqInputs
from aft.span_corruption import SENTINELS
from aft.vocabulary import train_bpe
from modeling_aft import ByteTokenizer


PAD, END = "<pad>", "</s>"
FROM_TOKENIZER = ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id")  # fields that a tokenizer decides


def is_new(inputs: Seq2SeqInputs) -> bool:
    """Whether the model begins from nothing."""
    return is_preset(inputs.model, PRESETS)


def read_config(inputs: Seq2SeqInputs) -> PreTrainedConfig:
    """
    The configuration of `--model`, with the fields of `--model_override` changed.

    Raises:
        ValueError: it is none of an encoder-decoder, or a field is not allowed or not for flags to set.
    """
    name = f"--model {inputs.model}"
    changed = {item.partition("=")[0].rpartition(".")[2] for item in inputs.model_override}
    if fixed := sorted(changed & set(FROM_TOKENIZER)):
        raise ValueError(f"--model_override {fixed[0]}: must be left out, the tokenizer says it")
    if is_new(inputs):
        # Without a first id of its own the configuration gets that of the tokenizer, not the default of its class.
        values = {"decoder_start_token_id": None, **read_preset(inputs.model, PRESETS)}
        config = override(values, inputs.model_override, name)
    else:
        config = load_config(inputs.model, trust_remote_code=inputs.trust_remote_code)
        if inputs.model_override:
            config = override(config.to_dict(), inputs.model_override, name)
    known = type(config) in AutoModelForSeq2SeqLM._model_mapping
    if not config.is_encoder_decoder or not (known or inputs.trust_remote_code):
        allowed = "one that has a AutoModelForSeq2SeqLM"
        raise ValueError(f"{name}: model_type must be {allowed}, got {config.model_type!r}")
    return config


def make_tokenizer(inputs: Seq2SeqInputs, config: PreTrainedConfig, texts: Iterable[list[str]]):
    """
    The tokenizer of a saved model, or that of `--tokenizer`. It ends each text with the token for that, pads on the
    right, as labels must be, and has sentinels if there is to be span corruption.

    Args:
        texts: lists of those to train on.

    Raises:
        ValueError: it does not load, lacks a token, is not fast, or the texts give no BPE of this size.
    """
    sentinels = {"extra_special_tokens": list(SENTINELS)} if inputs.text_file else {}
    if not is_new(inputs) or inputs.tokenizer not in (None, "bpe", "bytes"):
        flag, name = ("--tokenizer", inputs.tokenizer) if inputs.tokenizer else ("--model", inputs.model)
        what, file = ("tokenizer", "tokenizer_config.json") if inputs.tokenizer else ("model", "config.json")
        tokenizer = load(AutoTokenizer, name, flag, what, file, trust_remote_code=inputs.trust_remote_code)
        check_tokenizer(tokenizer, f"{flag} {name}")
        if is_new(inputs) and inputs.text_file:
            tokenizer.add_tokens(list(SENTINELS), special_tokens=True)  # those that it has not
    elif inputs.tokenizer == "bytes":
        tokenizer = ByteTokenizer(**sentinels)
    else:
        special = {"pad_token": PAD, "eos_token": END, **sentinels}
        size = inputs.vocab_size or config.vocab_size
        least = 256 + 2 + (len(SENTINELS) if inputs.text_file else 0)
        if size < least:
            raise ValueError(f"--vocab_size must be at least {least}, all bytes and special tokens, got {size}")
        tokenizer = train_bpe(texts, size, special)
    end_texts(tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer


def check_tokenizer(tokenizer, name: str) -> None:
    """Raises a ValueError, which begins with `name`, if a saved tokenizer lacks what an encoder-decoder needs."""
    for token in ("eos_token", "pad_token"):
        if getattr(tokenizer, token) is None:
            raise ValueError(f"{name}: its tokenizer must have {token}")
    if not tokenizer.is_fast and tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        raise ValueError(f"{name}: its tokenizer must be a fast one, or end texts with eos_token")


def end_texts(tokenizer) -> None:
    """Lets a tokenizer end each text with its `eos_token`, as that of T5 does, if it does not yet."""
    if tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
        return
    end = tokenizer.eos_token
    ending = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B:1", f"{end}:1"], special_tokens=[(end, tokenizer.eos_token_id)]
    )
    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = ending if before is None else processors.Sequence([before, ending])


def sentinel_ids(tokenizer, name: str) -> list[int]:
    """
    The ids of the sentinels that a tokenizer has, from the first on.

    Raises:
        ValueError: there is none; begins with `name`.
    """
    known, ids = tokenizer.get_vocab(), []
    while f"<extra_id_{len(ids)}>" in known:
        ids.append(known[f"<extra_id_{len(ids)}>"])
    if not ids:
        raise ValueError(f"{name}: its tokenizer must have sentinels ({SENTINELS[0]}, ...) for span corruption")
    return ids


def fit_config(config: PreTrainedConfig, tokenizer, inputs: Seq2SeqInputs) -> None:
    """
    Gives a new configuration what the tokenizer says: the decoder begins with padding, as in T5, unless the
    configuration says otherwise. Of a saved one only checks that it has a row for each token.

    Raises:
        ValueError: it has not.
    """
    size = 1 + max(tokenizer.get_vocab().values())
    if not is_new(inputs):
        if size > config.vocab_size:
            allowed = f"at least that of its tokenizer, {size}"
            raise ValueError(f"--model {inputs.model}: its vocab_size must be {allowed}, got {config.vocab_size}")
        return
    config.vocab_size = size
    for name in FROM_TOKENIZER[1:]:
        setattr(config, name, getattr(tokenizer, name))
    if config.decoder_start_token_id is None:
        config.decoder_start_token_id = tokenizer.pad_token_id


def make_model(inputs: Seq2SeqInputs, config: PreTrainedConfig) -> tuple[torch.nn.Module, set[str]]:
    """
    The model of a configuration, and the names of its tensors that are new.

    Raises:
        ValueError: it does not load.
    """
    if is_new(inputs):
        try:
            model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
        except ValueError as error:  # of what is checked of all fields together
            raise ValueError(f"--model {inputs.model}: {error}") from error
        model.generation_config = GenerationConfig()
        return model, set(model.state_dict())
    options = {"config": config, "dtype": torch.float32, "trust_remote_code": inputs.trust_remote_code}
    return load_model(AutoModelForSeq2SeqLM, inputs.model, **options)


def fit_generation(model, tokenizer, inputs: Seq2SeqInputs, args, limit: int | None, longest: int) -> None:
    """
    Lets `generate` write targets by the flags, and else as the model says, unless longer ones are trained. The longest
    then has no end, as the token that the decoder begins with counts.

    Args:
        limit: how many tokens a target may have; None for any number.
        longest: how many the longest has that is trained.

    Raises:
        ValueError: `--length_penalty` is given without beams, or `--generation_max_length` ends behind the tables.
    """
    own, asked, table = model.generation_config, args.generation_max_length, stack_limits(model.config)[1]
    if asked is not None and table is not None and asked > table + 1:
        allowed = f"at most {table + 1}, the tables of the decoder and a token that nothing reads"
        raise ValueError(f"--generation_max_length must be {allowed}, got {asked}")
    length = asked or inputs.max_target_length
    if length is None and own.max_length is None:
        length = limit or longest
    elif length is None and args.trains:
        length = max(own.max_length, longest)
    values = {
        "eos_token_id": own.eos_token_id or tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "decoder_start_token_id": model.config.decoder_start_token_id,
        "max_length": length,
        "num_beams": args.generation_num_beams,
        "length_penalty": inputs.length_penalty,
    }
    own.update(**{name: value for name, value in values.items() if value is not None})
    if inputs.length_penalty is not None and (own.num_beams or 1) == 1:
        raise ValueError(f"--length_penalty must be left out without beams, got {inputs.length_penalty}")
