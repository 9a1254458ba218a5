# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What `benchmark.py` measures: for each suite, the contestants at one length, by name.

A suite is a function of the flags, the batch size and the length. It gives a dict from names to functions that make
the contestant, so that those which are left out at a length are never made.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RwkvConfig,
    StaticCache,
    ViTConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from aft.flags import find_preset
from aft.gpu_plan import OF_FLA
from modeling_aft import AFTConfig, SynthesizerConfig, SynthesizerModel
from modeling_aft.compatibility import CACHE_NAME
from modeling_aft.configuration_common import TextMixerConfig
from modeling_aft.ops import aft_attention


BYTES = 256  # vocabulary of every model
PREFILL = 1024  # tokens that a model of this package reads at once
WARM_UPS = 2  # turns before those that count
# transformers makes a mask for a compiled model, with which SDPA cannot take FlashAttention; it makes none for a
# function like this one, of which it does not know what masks it takes.
CAUSAL_SDPA = "causal_sdpa"
AttentionInterface.register(CAUSAL_SDPA, sdpa_attention_forward)
# Calls of an operator in a turn: a GPU computes one while Python launches the next.
QUEUED = {"cpu": 1, "cuda": 10}


@dataclass
class Contestant:
    """One call of `run` does `work` units, `unit` being what its speed is counted in, and waits for the device only
    where users do. A turn is `calls` calls. `about` replaces columns of its row."""

    run: Callable[[], object]
    work: float
    unit: str = "tokens/s"
    calls: int = 1
    about: dict = field(default_factory=dict)


Contestants = dict[str, Callable[[], Contestant]]


def plain_aft(query: Tensor, key: Tensor, value: Tensor, position_bias: Tensor) -> Tensor:
    """AFT-full as it is usually written: exp of a masked [T, T] bias times exp(key), with a maximum over all keys.

    Args:
        query, key, value (`Tensor` [B, T, D]), position_bias (`Tensor` [T, T]): floating point, of one dtype.

    Returns:
        `Tensor` [B, T, D], the causal form of eq. 2 of arXiv 2105.14103.
    """
    length = key.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=key.device).triu(1)
    weight = (position_bias.masked_fill(future, -torch.inf) - position_bias.amax(-1, keepdim=True)).exp()
    exp_key = (key - key.amax(1, keepdim=True)).exp()
    numerator = torch.einsum("ts,bsd->btd", weight, exp_key * value)
    return torch.sigmoid(query) * numerator / torch.einsum("ts,bsd->btd", weight, exp_key)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Causal dot-product attention on [B, T, D], the heads side by side."""
    split = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(*split, is_causal=True).transpose(1, 2).flatten(2)


def has_fla(args) -> bool:
    """Whether the kernels of flash-linear-attention can take part."""
    return args.device == "cuda" and find_spec("fla") is not None


def operators(args, batch: int, length: int) -> dict[str, Callable[[], tuple]]:
    """By name: what makes the function of each operator, and its inputs."""
    dtype, window, heads = getattr(torch, args.dtype), args.window, args.conv_heads

    def leaf(*shape):
        return torch.randn(*shape, device=args.device, dtype=dtype).requires_grad_()

    query, key, value = (leaf(batch, length, args.width) for _ in range(3))
    head_key = leaf(batch, length, heads)
    table = cache(lambda: leaf(length, length))  # made only for those that need it

    def windowed(query, key, value, bias):
        return aft_attention(query, key, value, window_bias=bias)

    def rwkv4(query, key, value, decay, first):
        from fla.ops.rwkv4 import fused_recurrent_rwkv4

        state = key.new_zeros(batch, 3, 1, args.width)
        state[:, 2] = -1e38  # the logarithm of an empty sum
        return torch.sigmoid(query) * fused_recurrent_rwkv4(decay, first, key, value, state)[0]

    forwards = {
        f"sdpa-h{args.heads}": lambda: (partial(attention, heads=args.heads), query, key, value),
        "aft-simple": lambda: (aft_attention, query, key, value),
        f"aft-local-{window}": lambda: (windowed, query, key, value, leaf(1, length, window)),
        f"aft-conv-{heads}-{window}": lambda: (windowed, query, head_key, value, leaf(heads, 1, window)),
        "aft-full": lambda: (aft_attention, query, key, value, table()),
        "plain-aft-full": lambda: (plain_aft, query, key, value, table()),
    }
    if has_fla(args):
        forwards["rwkv4-fla"] = lambda: (rwkv4, query, key, value, leaf(args.width), leaf(args.width))
    return forwards


def operator_contestants(args, batch: int, length: int) -> Contestants:
    """One forward and backward pass of each operator."""
    seed = torch.randn(batch, length, args.width, device=args.device, dtype=getattr(torch, args.dtype))

    def make(forward):
        function, *inputs = forward()
        run = lambda: torch.autograd.grad(function(*inputs), inputs, seed)  # noqa: E731
        return Contestant(run, batch * length, calls=QUEUED[args.device])

    return {name: partial(make, forward) for name, forward in operators(args, batch, length).items()}


def forward_contestants(args, batch: int, length: int) -> Contestants:
    """One forward pass of each operator, without what a backward pass would need."""

    def make(forward):
        function, *inputs = forward()
        return Contestant(torch.no_grad()(partial(function, *inputs)), batch * length, calls=QUEUED[args.device])

    return {name: partial(make, forward) for name, forward in operators(args, batch, length).items()}


def dense_contestants(args, batch: int, length: int) -> Contestants:
    """One forward and backward pass of a dense Synthesizer mixer, with its [T, T] logits and by factors."""
    config = SynthesizerConfig(
        synthesizer_type="dense",
        hidden_size=args.width,
        num_attention_heads=args.heads,
        max_position_embeddings=length,
        num_hidden_layers=1,
    )
    dtype = getattr(torch, args.dtype)
    mixer = SynthesizerModel(config).layers[0].mixer.to(args.device, dtype)
    hidden = torch.randn(batch, length, args.width, device=args.device, dtype=dtype, requires_grad=True)
    inputs = [hidden, *mixer.parameters()]

    def make(plain):
        def run():
            torch.autograd.grad(mixer(hidden, output_attentions=plain)[0].sum(), inputs)

        return Contestant(run, batch * length)

    return {"dense-plain": partial(make, True), "dense": partial(make, False)}


def model_configs(args, positions: int, embeddings: str) -> dict[str, Callable[[], PreTrainedConfig]]:
    """The models by name: `args.layers` blocks of about 12 D^2 weights, no dropout, a head tied to the embedding.

    A block of Mamba has half of that, so it gets twice as many.

    Args:
        positions: length of the learned tables.
        embeddings: `position_embedding_type` of the models of this package.
    """
    width, heads = args.width, args.heads
    sizes = {"vocab_size": BYTES, "hidden_size": width, "num_hidden_layers": args.layers}
    ours = {
        **sizes,
        "max_position_embeddings": positions,
        "position_embedding_type": embeddings,
        "hidden_dropout_prob": 0.0,
    }
    peers = {**sizes, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    aft = partial(AFTConfig, **ours, window_size=args.window, position_bias_rank=args.rank)
    synthesizer = partial(SynthesizerConfig, **ours, num_attention_heads=heads)
    with_state = {
        "aft-simple": partial(aft, aft_type="simple"),
        f"aft-local-{args.window}": partial(aft, aft_type="local"),
        f"aft-conv-{args.conv_heads}-{args.window}": partial(
            aft, aft_type="conv", num_attention_heads=args.conv_heads
        ),
    }
    configs = {
        **with_state,
        **{f"{name}-decay": partial(config, decay="learned") for name, config in with_state.items()},
        "aft-full": partial(aft, aft_type="full"),
        "synthesizer-dense": partial(synthesizer, synthesizer_type="dense"),
        "transformer": partial(synthesizer, synthesizer_type="mixture", mixture_components=["dot_product"]),
        "gpt2": partial(
            GPT2Config, **peers, n_positions=positions, n_head=heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        ),
        "llama": partial(
            LlamaConfig,
            **peers,
            intermediate_size=round(8 / 3 * width / 32) * 32 or 32,  # three matrices instead of two
            num_attention_heads=heads,
            max_position_embeddings=positions,
        ),
        "mamba": partial(MambaConfig, **{**peers, "num_hidden_layers": 2 * args.layers}),
        "rwkv": partial(RwkvConfig, **peers, context_length=positions),
    }
    if has_fla(args):
        from fla import models as of_fla

        for name, config in OF_FLA.items():
            layers = args.layers * (2 if name == "mamba2" else 1)
            configs[f"{name}-fla"] = partial(getattr(of_fla, config), **{**peers, "num_hidden_layers": layers})
    return configs


# Those whose decoding step is measured: the others have no such cache, or are the same as one that is.
DECODED = ("aft-", "gpt2", "llama")


# Classifiers of 1,000 classes: presets, and the ViT of the library in the sizes of DeiT.
VIT_WIDTHS = {"vit-tiny": 192, "vit-small": 384}
IMAGE_MODELS = ["aft-conv-tiny-11-32", "aft-full-tiny", "vit-tiny", "aft-conv-small-11-16", "vit-small"]


def make_model(args, name: str, positions: int, embeddings: str, **options) -> PreTrainedModel:
    """A model by its name or by the path of its preset, for inputs of up to `positions` tokens; `options` as those of
    `from_config`."""
    configs = model_configs(args, positions, embeddings)
    if name in configs:
        config = configs[name]()
    else:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        config.max_position_embeddings = max(config.max_position_embeddings, positions)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype), **options).to(args.device)


def about_model(model: PreTrainedModel) -> dict:
    """The columns that tell its size."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"layers": config.num_hidden_layers, "width": config.hidden_size, "parameters": parameters}


def train_contestants(args, batch: int, length: int) -> Contestants:
    """One training step (forward pass, loss, backward pass, AdamW) of each model, without autocast."""

    def make(name):
        options = {"attn_implementation": CAUSAL_SDPA} if name in ("gpt2", "llama") else {}
        model = make_model(args, name, length, "learned", **options).train()
        called = torch.compile(model) if args.compile else model
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.randint(model.config.vocab_size, (batch, length), device=args.device)

        def run():
            called(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return Contestant(run, batch * length, about=about_model(model))

    suffix = "-compiled" if args.compile else ""
    return {Path(name).stem + suffix: partial(make, name) for name in args.models}


def image_contestants(args, batch: int, side: int) -> Contestants:
    """A forward pass, and forward and backward, of each classifier of images of side x side pixels."""

    @cache
    def prepared(name):
        if name in VIT_WIDTHS:
            width = VIT_WIDTHS[name]
            sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
            config = ViTConfig(**sizes, num_labels=1000)
        else:
            config = AutoConfig.from_pretrained(find_preset(name, "images", "--models"), trust_remote_code=False)
        config.image_size = side
        model = AutoModelForImageClassification.from_config(config, dtype=getattr(torch, args.dtype)).to(args.device)
        pixels = torch.randn(batch, config.num_channels, side, side, device=args.device, dtype=model.dtype)
        return model, pixels, torch.zeros(batch, dtype=torch.long, device=args.device)

    def make(name, trains):
        model, pixels, labels = prepared(name)

        def train():
            model.train()(pixel_values=pixels, labels=labels).loss.backward()
            model.zero_grad()

        @torch.inference_mode()
        def classify():
            model.eval()(pixel_values=pixels)

        return Contestant(train if trains else classify, batch, "images/s", about=about_model(model))

    parts = {"forward": False, "training": True}
    return {f"{Path(n).stem}-{part}": partial(make, n, trains) for part, trains in parts.items() for n in args.models}


def decode_contestants(args, batch: int, length: int) -> Contestants:
    """Decoding steps of each model after `length` random tokens, the same ones in each row; with `--compile` also
    compiled ones, and with `--largest_batch` ones with a static cache.

    A compiled step has a static cache, as `generate(cache_implementation="static")` makes and compiles it.
    """
    room = length + args.steps * (args.repeats + WARM_UPS) + 1  # and the step whose memory is measured

    @cache
    def prepared(name):
        """The model, whose weights anyone may train, its tokens, and a dynamic cache that has read them."""
        model = make_model(args, name, room, "none").eval()
        ids = torch.randint(model.config.vocab_size, (1, length), device=args.device)
        filled = DynamicCache(config=model.config)
        read(model, ids, filled)
        return model, ids, filled

    @torch.inference_mode()
    def read(model, ids, past):
        # In parts, a model of this package needs less memory; attention would need more, for its masks.
        for part in ids.split(PREFILL if isinstance(model.config, TextMixerConfig) else length, 1):
            model(part, **{CACHE_NAME: past}, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def static_cache(model, ids, filled):
        static = StaticCache(config=model.config, max_cache_len=room)
        if isinstance(model.config, TextMixerConfig):
            read(model, ids, static)
            static.batch_repeat_interleave(batch)
        else:
            for index, layer in enumerate(filled.layers):
                # Not what steps of the other contestant may have added, nor the rows.
                keys, values = (t[:1, :, :length].expand(batch, -1, -1, -1) for t in (layer.keys, layer.values))
                static.update(keys, values, index)
        return static

    @torch.inference_mode()
    def rows_of(filled):
        filled.batch_repeat_interleave(batch)
        return filled

    def make(name, kind):
        model, ids, filled = prepared(name)
        past = static_cache(model, ids, filled) if kind else rows_of(filled)
        called = model.get_compiled_call(None) if kind == "-compiled" else model
        token = ids[:, -1:].repeat(batch, 1)

        @torch.inference_mode()
        def run():
            called(input_ids=token, **{CACHE_NAME: past}, use_cache=True)
            if args.device == "cuda":
                torch.cuda.synchronize()  # as `generate` does to see whether a text has ended

        return Contestant(run, batch, calls=args.steps, about=about_model(model))

    kinds = ["", *(["-compiled"] if args.compile else []), *(["-static"] if args.largest_batch else [])]
    return {f"{Path(name).stem}{kind}": partial(make, name, kind) for name in args.models for kind in kinds}


def ceiling_contestants(args, batch: int, length: int) -> Contestants:
    """What the processor can do at best: copies (read and written bytes are counted), exp, and matrix products.

    `length` is the number of elements of the large copy. The product of a batch has the shape of the operator's.
    """
    dtype, on_gpu = getattr(torch, args.dtype), args.device == "cuda"
    # 128 KiB of float32 for each core, 8 MiB for a GPU: source and result fit into the second-level cache.
    cached = 2**21 if on_gpu else 2**15 * torch.get_num_threads()

    def tensor(*shape):
        return torch.randn(*shape, device=args.device, dtype=dtype)

    def about(length):
        return {"length": length, "width": ""}

    def copy(count, calls):
        source, result = tensor(count), tensor(count)
        work = 2 * count * source.element_size() / 1e9
        return Contestant(lambda: result.copy_(source), work, "GB/s", calls, about(count))

    def exp(count):
        source, result = tensor(count), tensor(count)
        return Contestant(lambda: torch.exp(source, out=result), count / 1e9, "Gexp/s", 100, about(count))

    def product(calls, left, right):
        a, b = tensor(*left), tensor(*right)
        result = a @ b
        work = 2 * result.numel() * left[-1] / 1e9
        return Contestant(lambda: torch.matmul(a, b, out=result), work, "GFLOP/s", calls, about(left[-2]))

    contestants = {
        "copy": partial(copy, length, 1),
        "copy-in-cache": partial(copy, cached, 100),
        "exp-in-cache": partial(exp, cached),
        "matmul-1024": partial(product, 1, (1024, 1024), (1024, 1024)),
        "bmm-64x96x512": partial(product, 10, (64, 64, 96), (64, 96, 512)),
    }
    if on_gpu:
        contestants["matmul-8192"] = partial(product, 1, (8192, 8192), (8192, 8192))
    return contestants
