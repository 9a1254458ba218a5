# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The encoder-decoders that `benchmark.py seq2seq` measures side by side, ours and T5 and BART of transformers."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BartConfig, PreTrainedConfig, T5Config

from aft.benchmark_contestants import Contestant, Contestants, about_model
from modeling_aft import AFTSeq2SeqConfig, SynthesizerSeq2SeqConfig


VOCABULARY = 8000  # tokens of every model
PAD, END = 0, 1


def seq2seq_configs(args, positions: int) -> dict[str, Callable[[], PreTrainedConfig]]:
    """
    The models by name: two stacks of `args.layers` blocks, feed-forward layers of 4 D, one embedding for source,
    target and head, and `args.dropout` at the places where a model has it.

    Args:
        positions: length of the learned tables.
    """
    width, heads = args.width, args.heads
    ids = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
    stack = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
        "position_embedding_type": "learned",
        "hidden_dropout_prob": args.dropout,
    }

    def ours(config_class, **fields):
        stacks = {name: {**stack, **fields} for name in ("encoder", "decoder")}
        return config_class(**stacks, **ids, num_cross_attention_heads=heads)

    synthesizer = partial(ours, SynthesizerSeq2SeqConfig)
    mixture = partial(synthesizer, synthesizer_type="mixture")
    return {
        "synthesizer-random": partial(synthesizer, synthesizer_type="random"),
        "synthesizer-factorized-random": partial(synthesizer, synthesizer_type="factorized_random"),
        "synthesizer-dense": partial(synthesizer, synthesizer_type="dense"),
        "synthesizer-random-dot-product": partial(mixture, mixture_components=["random", "dot_product"]),
        "transformer": partial(mixture, mixture_components=["dot_product"]),
        f"aft-conv-{args.conv_heads}-{args.window}": partial(
            ours, AFTSeq2SeqConfig, aft_type="conv", window_size=args.window, num_attention_heads=args.conv_heads
        ),
        "t5": partial(
            T5Config,
            **{**ids, "vocab_size": VOCABULARY, "d_model": width, "d_kv": width // heads, "d_ff": 4 * width},
            num_layers=args.layers,
            num_heads=heads,
            dropout_rate=args.dropout,
        ),
        "bart": partial(
            BartConfig,
            **{**ids, "bos_token_id": None, "forced_eos_token_id": None},
            vocab_size=VOCABULARY,
            d_model=width,
            **{f"{stack}_layers": args.layers for stack in ("encoder", "decoder")},
            **{f"{stack}_ffn_dim": 4 * width for stack in ("encoder", "decoder")},
            **{f"{stack}_attention_heads": heads for stack in ("encoder", "decoder")},
            max_position_embeddings=positions,
            dropout=args.dropout,
        ),
    }


def seq2seq_contestants(args, batch: int, length: int) -> Contestants:
    """
    A training step (forward pass, loss, backward pass, AdamW) on sources and targets of `length` tokens, which both
    count, and `generate` of such targets, greedily, with the cache that it makes.
    """
    configs = seq2seq_configs(args, length)

    @cache
    def prepared(name):
        if name in configs:
            config = configs[name]()
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=getattr(torch, args.dtype)).to(args.device)
        ids = torch.randint(END + 1, model.config.vocab_size, (batch, length), device=args.device)
        return model, ids

    def make(name, trains):
        model, ids = prepared(name)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True) if trains else None

        def train():
            model.train()(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def write():
            # One token is read before the first that is written, and the last is never read.
            made = model.eval().generate(ids, min_new_tokens=length, max_new_tokens=length, do_sample=False)
            assert made.shape == (batch, length + 1)

        work = 2 * batch * length if trains else batch * length
        return Contestant(train if trains else write, work, about=about_model(model))

    parts = {"training": True, "generation": False}
    return {f"{Path(n).stem}-{part}": partial(make, n, trains) for part, trains in parts.items() for n in args.models}
