"""Small models of every variant of both families, shared by the tests."""

import torch

from modeling_aft import (
    AFTConfig,
    AFTForCausalLM,
    AFTForConditionalGeneration,
    AFTModel,
    AFTSeq2SeqConfig,
    SynthesizerConfig,
    SynthesizerForCausalLM,
    SynthesizerForConditionalGeneration,
    SynthesizerModel,
    SynthesizerSeq2SeqConfig,
)


LIMIT = 48  # max_position_embeddings of the models below

# What both families have beside what a variant is named after.
UNUSUAL = {
    "position_embedding_type": "sinusoidal",
    "norm_type": "dyt",
    "linear_fan_in": 4,
    "linear_activation": "tanh",
    "qkv_bias": True,
    "lm_head_bias": True,
    "tie_word_embeddings": False,
}
AFT_VARIANTS = {
    "full": {"aft_type": "full"},
    "full-dense": {"aft_type": "full", "position_bias_rank": None},
    "local": {"aft_type": "local"},
    "local-dense": {"aft_type": "local", "position_bias_rank": None},
    "local-nopos": {"aft_type": "local", "position_embedding_type": "none"},
    "local-0": {"aft_type": "local", "window_size": 0},
    "local-1": {"aft_type": "local", "window_size": 1},
    "simple": {"aft_type": "simple"},
    "simple-nopos": {"aft_type": "simple", "position_embedding_type": "none"},
    "conv": {"aft_type": "conv"},
    "conv-nopos": {"aft_type": "conv", "position_embedding_type": "none"},
    "conv-1": {"aft_type": "conv", "window_size": 1},
    "conv-decay": {"aft_type": "conv", "decay": "fixed"},
    "relative-decay": {
        "aft_type": "local",
        "position_bias_type": "relative",
        "position_embedding_type": "none",
        "decay": "learned",
    },
    "z1t": {
        "aft_type": "conv",
        "query_activation": "tanh",
        "key_activation": "tanh",
        "conv_reparameterization": False,
        **UNUSUAL,
    },
}
SYNTHESIZER_VARIANTS = {
    **{
        name: {"synthesizer_type": name.replace("-", "_")}
        for name in ("dense", "random", "fixed-random", "factorized-dense", "factorized-random")
    },
    **{
        name: {"synthesizer_type": "mixture", "mixture_components": name.split("+")}
        for name in (
            "dot_product",
            "random+dot_product",
            "dense+dot_product",
            "factorized_random+dense",
            "factorized_random+fixed_random",
            "dense+random+factorized_dense+dot_product",
        )
    },
    "dense-unusual": {"synthesizer_type": "dense", **UNUSUAL},
    "dot_product-nopos": {
        "synthesizer_type": "mixture",
        "mixture_components": ["dot_product"],
        "position_embedding_type": "none",
    },
}
VARIANTS = {**AFT_VARIANTS, **SYNTHESIZER_VARIANTS}
UNLIMITED = ["simple-nopos", "conv-nopos", "relative-decay", "z1t", "dot_product-nopos"]
FIXED_STATE = [name for name in AFT_VARIANTS if "full" not in name]


def make_config(variant, **changes):
    fields = dict(
        hidden_size=16,
        num_hidden_layers=2,
        max_position_embeddings=LIMIT,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
    )
    if variant in SYNTHESIZER_VARIANTS:
        return SynthesizerConfig(**{**fields, "factorized_rank": 3, **SYNTHESIZER_VARIANTS[variant], **changes})
    return AFTConfig(**{**fields, "window_size": 5, "position_bias_rank": 4, **AFT_VARIANTS[variant], **changes})


def model_classes(variant):
    """The model without a head and the causal language model."""
    if variant in SYNTHESIZER_VARIANTS:
        return SynthesizerModel, SynthesizerForCausalLM
    return AFTModel, AFTForCausalLM


def make_model(variant, head=True, dtype=torch.float64, **changes):
    """A model whose every parameter matters: the initial weights make all models say the same."""
    torch.manual_seed(0)
    return spread(model_classes(variant)[head](make_config(variant, **changes)).to(dtype).eval())


def make_seq2seq_config(encoder, decoder=None, *, of_encoder=None, of_decoder=None, **changes):
    """An encoder-decoder of two variants of one family, by default of the same, with a decoder of another length."""
    is_synthesizer = encoder in SYNTHESIZER_VARIANTS
    fields = dict(num_cross_attention_heads=2, pad_token_id=0, decoder_start_token_id=0, eos_token_id=1)
    return (SynthesizerSeq2SeqConfig if is_synthesizer else AFTSeq2SeqConfig)(
        encoder=make_config(encoder, is_decoder=False, **(of_encoder or {})),
        decoder=make_config(decoder or encoder, **{"max_position_embeddings": LIMIT // 2, **(of_decoder or {})}),
        **{**fields, **changes},
    )


def make_seq2seq(encoder, decoder=None, dtype=torch.float64, **changes):
    """The same with a head, with weights of which every one matters."""
    torch.manual_seed(0)
    config = make_seq2seq_config(encoder, decoder, **changes)
    is_synthesizer = encoder in SYNTHESIZER_VARIANTS
    model = SynthesizerForConditionalGeneration if is_synthesizer else AFTForConditionalGeneration
    return spread(model(config).to(dtype).eval())


def spread(model):
    """The model with other weights than those that it begins with."""
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if not parameter.is_floating_point():
                continue  # which inputs an output has
            if parameter.dim() == 1 and "position_bias" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.4 if "proj" in name else 1.0))
    return model


def make_ids(length, batch=2, seed=1):
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))
