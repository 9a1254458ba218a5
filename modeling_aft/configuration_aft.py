# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Configuration of the Attention Free Transformer (arXiv 2105.14103)."""

import math

from .configuration_common import ACTIVATIONS, MixerConfig, TextMixerConfig, strict_config
from .ops_state import QUERY_ACTIVATIONS


AFT_TYPES = ("full", "local", "simple", "conv")
POSITION_BIAS_TYPES = ("absolute", "relative")
DECAYS = ("learned", "fixed")


@strict_config
class AFTMixerConfig(MixerConfig):
    """Fields of AFT's mixers, over text and images; see [`AFTConfig`] and [`AFTVisionConfig`], which document them."""

    aft_type: str = "local"
    window_size: int = 32
    position_bias_rank: int | None = 256
    position_bias_type: str = "absolute"
    query_activation: str = "sigmoid"
    key_activation: str = "none"
    conv_reparameterization: bool = True
    position_bias_init_mean: float | int = 0.0
    position_bias_init_std: float | int = 0.0

    @property
    def key_width(self) -> int:
        """The number of key channels of a layer."""
        return self.num_attention_heads if self.aft_type == "conv" else self.hidden_size

    @property
    def has_relative_bias(self) -> bool:
        """Whether the position biases are those of heads and offsets."""
        return self.aft_type == "conv" or (self.aft_type == "local" and self.position_bias_type == "relative")

    @property
    def has_bias_table(self) -> bool:
        """Whether the position biases are a table of positions, which ends."""
        is_local = self.aft_type == "local" and not self.has_relative_bias and self.window_size > 0
        return self.aft_type == "full" or is_local

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.aft_type not in AFT_TYPES:
            problems.append(self._problem("aft_type", f"one of {', '.join(AFT_TYPES)}"))
        if self.position_bias_rank is not None and self.position_bias_rank < 1:
            problems.append(self._problem("position_bias_rank", "None or at least 1"))
        if self.window_size < 0:
            problems.append(self._problem("window_size", "at least 0"))
        if self.position_bias_type not in POSITION_BIAS_TYPES:
            problems.append(self._problem("position_bias_type", f"one of {', '.join(POSITION_BIAS_TYPES)}"))
        if self.aft_type != "local" and self.position_bias_type == "relative":
            problems.append(self._problem("position_bias_type", f"absolute for aft_type={self.aft_type!r}"))
        if self.aft_type == "local" and not self.has_relative_bias and self.window_size > self.max_position_embeddings:
            allowed = f"at most max_position_embeddings ({self.max_position_embeddings})"
            problems.append(self._problem("window_size", allowed))
        if self.query_activation not in QUERY_ACTIVATIONS:
            problems.append(self._problem("query_activation", f"one of {', '.join(QUERY_ACTIVATIONS)}"))
        if self.key_activation not in ACTIVATIONS:
            problems.append(self._problem("key_activation", f"one of {', '.join(ACTIVATIONS)}"))
        if self.has_relative_bias:
            problems += self._heads_problem()
        if not math.isfinite(self.position_bias_init_mean):
            problems.append(self._problem("position_bias_init_mean", "finite"))
        if not 0 <= self.position_bias_init_std < math.inf:
            problems.append(self._problem("position_bias_init_std", "at least 0 and finite"))
        return problems


@strict_config
class AFTConfig(AFTMixerConfig, TextMixerConfig):
    r"""
    Configuration of [`AFTModel`] and [`AFTForCausalLM`]. The defaults are the 12-layer AFT-local-32 of the paper's
    Enwik8 table (byte vocabulary, T = 1024).

    Args:
        aft_type (`str`, defaults to `"local"`):
            Which pairs of positions carry a learned bias: `"full"` (all, eq. 2), `"local"` (offsets below
            `window_size`, eq. 4), `"simple"` (none, eq. 5) or `"conv"` (offsets below `window_size`, one bias per
            offset and head, eq. 6).
        vocab_size (`int`, defaults to 256):
            Number of token ids. 256 is every byte value.
        hidden_size (`int`, defaults to 512):
            Width d of the residual stream and of queries and values.
        num_hidden_layers (`int`, defaults to 12):
            Number of blocks.
        intermediate_size (`int`, *optional*):
            Width of the feed-forward layer. `None` means `4 * hidden_size`.
        hidden_act (`str`, defaults to `"gelu"`):
            Activation of the feed-forward layer, a name from `transformers.activations.ACT2FN`.
        max_position_embeddings (`int`, defaults to 1024):
            Length T of the learned tables: position embeddings, and the absolute position biases of full and local.
            Nothing limits the length of simple, conv, and local with relative biases, without learned position
            embeddings.
        window_size (`int`, defaults to 32):
            s of local and conv: offsets `|t - t'| < s` carry a learned bias, so 1 is the diagonal and 0 is
            AFT-simple. Outside the window the bias is 0 (weight 1), not minus infinity. Unused by full and simple.
        position_bias_rank (`int`, *optional*, defaults to 256):
            Rank d' of the factorised bias `w = u v^T` of full and local (eq. 7). `None` learns every bias by itself: a
            `T x T` table for full, its band of `window_size` offsets for local. Unused by simple and conv, and by
            relative biases.
        position_bias_type (`str`, defaults to `"absolute"`):
            Of local: `"absolute"` learns the biases of each position (the paper's), `"relative"` one per offset and
            head, so that no table ends. Full has absolute ones; simple has none, and those of conv are relative.
        num_attention_heads (`int`, defaults to 1):
            h of conv: the number of bias sets, and the width of the keys. With relative biases of local, the number of
            bias sets, each for an equal share of the channels. The other types have one bias set shared by all
            channels, and do not read this field.
        decay (`str`, *optional*):
            Whether keys fade: each key channel adds `-rate * |t - t'|` to its biases, within the window and beyond, so
            that however long a text is, its recent part keeps its weight. `"learned"` trains the rates, `"fixed"`
            keeps those that they begin with, `None` has none. Not for full. It is not in the paper.
        decay_min_half_life, decay_max_half_life (`float`, default to 4.0 and 4096.0):
            The half-lives, in tokens, that the key channels of each layer begin with: `rate = ln 2 / half-life`, and
            the half-lives rise from the first channel to the last by equal factors. Unused without a decay.
        query_activation (`str`, defaults to `"sigmoid"`):
            What is made of the query before it multiplies the average: `"sigmoid"` (the paper's), `"tanh"`, `"relu"`
            or `"identity"`.
        key_activation (`str`, defaults to `"none"`):
            `"tanh"` bounds the keys to (-1, 1), `"none"` leaves them as they are.
        conv_reparameterization (`bool`, defaults to `True`):
            Whether the biases of conv are standardised, scaled and shifted (eq. 8). Otherwise they are learned as they
            are. Unused by the other types.
        position_bias_init_mean, position_bias_init_std (`float`, default to 0.0):
            Mean and standard deviation of the initial biases of conv, and of relative ones of local; with eq. 8 they
            are the initial beta and gamma. With 0, as in the paper, the layer begins as AFT-simple, which knows
            nothing of places. Unused by the other types.
        position_embedding_type (`str`, defaults to `"learned"`):
            `"learned"` adds a learned vector per position to the token embedding, `"sinusoidal"` sines and cosines of
            the position, which need no table, `"none"` nothing.
        hidden_dropout_prob (`float`, defaults to 0.1):
            Dropout on the embeddings and on the output of every mixer and feed-forward layer.
        layer_norm_eps (`float`, defaults to 1e-05):
            Epsilon of the layer norms.
        norm_type (`str`, defaults to `"layer"`):
            What stands before mixers, feed-forward layers and head: `"layer"` norms, or `"dyt"`,
            `weight * tanh(alpha * x) + bias` with one learned alpha, 0.5 at first (arXiv 2503.10622), or `"rms"`,
            whose norms have no bias.
        linear_fan_in (`int`, *optional*):
            k, the number of inputs of each output of the linear layers inside of blocks. Which ones is drawn with the
            weights. `None`, or k not below the number of inputs, means all.
        linear_activation (`str`, defaults to `"none"`):
            `"tanh"` stands behind every linear layer inside of blocks, `"none"` is nothing.
        linear_bias (`bool`, defaults to `True`):
            Whether the other linear layers inside of blocks have a bias.
        scaling (`str`, defaults to `"logits"`):
            `"logits"` divides dot products of queries and keys by the root of the head size. `"weights"` leaves that
            to the initial weights, as T5 does: their deviation is the inverse root of the number of inputs, and less
            by that of the head size for queries; that of embeddings is 1, and a head that shares their weight divides
            its input by the root of `hidden_size`.
        qkv_bias (`bool`, defaults to `False`):
            Whether the projection to queries, keys and values has a bias.
        lm_head_bias (`bool`, defaults to `False`):
            Whether the language-model head has a bias.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial linear and embedding weights.
        tie_word_embeddings (`bool`, defaults to `True`):
            Whether the language-model head shares the weight of the token embedding.
        use_cache (`bool`, defaults to `True`):
            Whether the model returns its recurrent state when it is not training.
        is_decoder (`bool`, defaults to `True`):
            Causal when true: position t sees positions up to t. When false every position sees all others, and there
            is no cache.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*):
            Special token ids; none by default, because each of the 256 ids of the byte vocabulary is a byte.

    Raises:
        ValueError: one error that lists every field with a value that is not allowed.

    Example:

    ```python
    >>> from modeling_aft import AFTConfig, AFTForCausalLM

    >>> config = AFTConfig(aft_type="conv", hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = AFTForCausalLM(config)
    ```"""

    model_type = "aft"

    decay: str | None = None
    decay_min_half_life: float | int = 4.0
    decay_max_half_life: float | int = 4096.0

    @property
    def layer_types(self) -> list[str]:
        """One name per layer, by which transformers chooses the cache layers (not serialised)."""
        return ["aft_full_state" if self.aft_type == "full" else "aft_state"] * self.num_hidden_layers

    @property
    def _state_fields(self) -> tuple[str, ...]:
        of_type = {"local": ("window_size",), "conv": ("window_size", "num_attention_heads")}
        decay = () if self.decay is None else ("decay",)
        keys = () if self.key_activation == "none" else ("key_activation",)
        return (*super()._state_fields, "aft_type", *of_type.get(self.aft_type, ()), *decay, *keys)

    @property
    def has_position_table(self) -> bool:
        """Whether some learned table ends at `max_position_embeddings`."""
        return self.position_embedding_type == "learned" or self.has_bias_table

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.decay is not None and self.decay not in DECAYS:
            problems.append(self._problem("decay", f"None or one of {', '.join(DECAYS)}"))
        if self.decay is not None and self.aft_type == "full":
            problems.append(self._problem("decay", "None for aft_type='full', which has no sums that could fade"))
        if not 0 < self.decay_min_half_life < math.inf:
            problems.append(self._problem("decay_min_half_life", "positive and finite"))
        if not self.decay_min_half_life <= self.decay_max_half_life < math.inf:
            allowed = f"at least decay_min_half_life ({self.decay_min_half_life}) and finite"
            problems.append(self._problem("decay_max_half_life", allowed))
        return problems


__all__ = ["AFTConfig"]
