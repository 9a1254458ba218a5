# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Configuration of the Synthesizer (arXiv 2005.00743)."""

import math

from .configuration_common import TextMixerConfig, strict_config


SYNTHESIZER_TYPES = ("dense", "random", "fixed_random", "factorized_dense", "factorized_random", "mixture")
MIXTURE_COMPONENTS = (*SYNTHESIZER_TYPES[:-1], "dot_product")


@strict_config
class SynthesizerConfig(TextMixerConfig):
    r"""
    Configuration of [`SynthesizerModel`] and [`SynthesizerForCausalLM`]: attention whose logits are not (only) dot
    products. N below is `max_position_embeddings`, H `num_attention_heads`, d the head size.

    Args:
        synthesizer_type (`str`, defaults to `"dense"`):
            Where the logits come from: `"dense"` (a two-layer MLP of the query token gives one logit per position),
            `"random"` (a learned N x N matrix per head), `"fixed_random"` (the same, never trained),
            `"factorized_dense"` (two MLPs of the token give a and b values, all a*b products are the logits),
            `"factorized_random"` (R1 R2^T of rank k), or `"mixture"`.
        mixture_components (`list[str]`, *optional*):
            For `"mixture"` only: one or more different of the other types and `"dot_product"`. Their logits are summed
            under weights that a softmax makes from one learned number per head and component. `["dot_product"]` alone
            is the vanilla Transformer.
        factorized_rank (`int`, defaults to 8): k of factorized_random.
        factorized_dense_shape (`list[int]`, *optional*):
            [a, b] of factorized_dense, with a * b = N. None takes the divisors of N that are closest to each other.
        vocab_size (`int`, defaults to 256): Number of token ids. 256 is every byte value.
        hidden_size (`int`, defaults to 512): Width of the residual stream.
        num_hidden_layers (`int`, defaults to 12): Number of blocks.
        intermediate_size (`int`, *optional*): Width of the feed-forward layer. `None` means `4 * hidden_size`.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the feed-forward layer, a name from `ACT2FN`.
        max_position_embeddings (`int`, defaults to 1024):
            N, the length of the synthesized rows, and so the longest input (save for a mixture of dot_product alone
            without position embeddings).
        num_attention_heads (`int`, defaults to 8): H, a divisor of `hidden_size`.
        position_embedding_type (`str`, defaults to `"learned"`): `"learned"`, `"sinusoidal"` or `"none"`.
        hidden_dropout_prob (`float`, defaults to 0.1): Dropout on embeddings and on each layer's output.
        layer_norm_eps (`float`, defaults to 1e-05): Epsilon of the layer norms.
        norm_type, linear_fan_in, linear_activation, linear_bias, scaling, qkv_bias, lm_head_bias:
            As in [`AFTConfig`].
        relative_attention_num_buckets (`int`, *optional*):
            The number of intervals of distances, as in T5 (32), for each of which every head learns a number that all
            layers add to their logits. `None` adds nothing.
        relative_attention_max_distance (`int`, defaults to 128):
            From this distance on, all are in the last interval. Unused without intervals.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
        tie_word_embeddings (`bool`, defaults to `True`): Whether head and token embedding share their weight.
        use_cache (`bool`, defaults to `True`): Whether the model returns its cache when it is not training.
        is_decoder (`bool`, defaults to `True`): Causal when true, bidirectional and without a cache when false.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): Special token ids; none by default.

    Raises:
        ValueError: one error that lists every field with a value that is not allowed.

    Example:

    ```python
    >>> from modeling_aft import SynthesizerConfig, SynthesizerForCausalLM

    >>> config = SynthesizerConfig(synthesizer_type="mixture", mixture_components=["random", "dot_product"])
    >>> model = SynthesizerForCausalLM(config)
    ```"""

    model_type = "synthesizer"

    synthesizer_type: str = "dense"
    mixture_components: list[str] | None = None
    factorized_rank: int = 8
    factorized_dense_shape: list[int] | None = None
    num_attention_heads: int = 8
    relative_attention_num_buckets: int | None = None
    relative_attention_max_distance: int = 128

    @property
    def components(self) -> list[str]:
        """The types whose logits are summed: one, or those of the mixture."""
        return self.mixture_components if self.synthesizer_type == "mixture" else [self.synthesizer_type]

    @property
    def dense_factors(self) -> tuple[int, int]:
        """[a, b] of factorized_dense: the given ones, or the divisors of N that are closest to each other."""
        if self.factorized_dense_shape is not None:
            return tuple(self.factorized_dense_shape)
        length = self.max_position_embeddings
        factor = next(a for a in range(math.isqrt(length), 0, -1) if length % a == 0)
        return factor, length // factor

    @property
    def layer_types(self) -> list[str]:
        """One name per layer, by which transformers chooses the cache layers (not serialised)."""
        return ["synthesizer_state"] * self.num_hidden_layers

    @property
    def _state_fields(self) -> tuple[str, ...]:
        return (*super()._state_fields, "num_attention_heads", "components", "factorized_rank", "dense_factors")

    @property
    def has_position_table(self) -> bool:
        """Whether some learned table ends at `max_position_embeddings`."""
        return self.position_embedding_type == "learned" or self.components != ["dot_product"]

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.synthesizer_type not in SYNTHESIZER_TYPES:
            problems.append(self._problem("synthesizer_type", f"one of {', '.join(SYNTHESIZER_TYPES)}"))
        components = self.mixture_components
        if self.synthesizer_type == "mixture":
            if not components or len(set(components)) < len(components) or set(components) - set(MIXTURE_COMPONENTS):
                allowed = f"a list of different ones of {', '.join(MIXTURE_COMPONENTS)}"
                problems.append(self._problem("mixture_components", allowed))
        elif components is not None:
            problems.append(self._problem("mixture_components", "None unless synthesizer_type is 'mixture'"))
        if self.factorized_rank < 1:
            problems.append(self._problem("factorized_rank", "at least 1"))
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets is not None and (buckets < 4 or buckets % 2):
            problems.append(self._problem("relative_attention_num_buckets", "None or even and at least 4"))
        elif buckets is not None and distance <= buckets // 2:
            allowed = f"more than half of relative_attention_num_buckets ({buckets})"
            problems.append(self._problem("relative_attention_max_distance", allowed))
        shape = self.factorized_dense_shape
        fits = shape is not None and len(shape) == 2 and min(shape) >= 1
        if shape is not None and not (fits and shape[0] * shape[1] == self.max_position_embeddings):
            allowed = f"[a, b] with a * b = max_position_embeddings ({self.max_position_embeddings})"
            problems.append(self._problem("factorized_dense_shape", allowed))
        return problems + self._heads_problem()


__all__ = ["SynthesizerConfig"]
