"""Small models of every variant, shared by the tests of both model families."""

import torch

from modeling_aft import AFTConfig, AFTForCausalLM


LIMIT = 48  # max_position_embeddings of the models below

VARIANTS = {
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
}
UNLIMITED = ["simple-nopos", "conv-nopos"]


def make_config(variant, **changes):
    fields = dict(
        hidden_size=16,
        num_hidden_layers=2,
        max_position_embeddings=LIMIT,
        window_size=5,
        position_bias_rank=4,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
    )
    return AFTConfig(**{**fields, **VARIANTS[variant], **changes})


def make_model(variant, model_class=AFTForCausalLM, dtype=torch.float64, **changes):
    """A model whose every parameter matters: the initial weights make all models say the same."""
    torch.manual_seed(0)
    model = model_class(make_config(variant, **changes)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "position_bias" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.4 if "proj" in name else 1.0))
    return model


def make_ids(length, batch=2, seed=1):
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))
