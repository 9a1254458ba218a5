# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Configuration of the Attention Free Transformer for images (arXiv 2105.14103, section 5.3)."""

from .configuration_aft import AFTMixerConfig
from .configuration_common import strict_config


POOLINGS = ("mean", "token")


def sides(size: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    """Height and width: one number means both."""
    return (size, size) if isinstance(size, int) else tuple(size)


@strict_config
class AFTVisionConfig(AFTMixerConfig):
    r"""
    Configuration of [`AFTVisionModel`] and [`AFTForImageClassification`]: AFT in the place of the attention of a ViT,
    and all else as in DeiT. The defaults are the paper's small AFT-conv with 16 heads and kernels of 11 x 11. N below
    is the number of patches of an image of `image_size`, and one more if there is a class token.

    Args:
        aft_type (`str`, defaults to `"conv"`):
            `"conv"` has a bias per head and offset of two patches in the grid, within `kernel_size` (eq. 6), and takes
            images of any size. `"full"` has one per pair of patches (eq. 2), `"local"` those of patches nearer than
            `window_size` in raster order (eq. 4), `"simple"` has none (eq. 5).
        kernel_size (`int`, defaults to 11):
            k of conv, odd: the side of the square of k x k patches around a patch that have a bias. All other patches
            have weight exp(key), as everywhere in AFT. It may be larger than the grid.
        num_attention_heads (`int`, defaults to 16):
            h of conv: the number of kernels, and the width of the keys, a divisor of `hidden_size`. With relative
            biases of local, the number of bias sets.
        image_size (`int` or `[height, width]`, defaults to 224):
            Pixels of the images that the tables are for, and that image processors make.
        patch_size (`int` or `[height, width]`, defaults to 16): pixels of a patch; must divide `image_size`.
        num_channels (`int`, defaults to 3): numbers of a pixel.
        pooling (`str`, *optional*):
            What stands for an image: `"mean"` of its patches after the last norm, or a class `"token"` put before
            them. By default, as in the paper, the mean with conv, which has no place for a token, and else the token.
        position_embedding_type (`str`, *optional*):
            `"learned"` adds a learned vector per place, `"none"` nothing. By default none with conv, else learned.
        drop_path_rate (`float`, defaults to 0.0):
            How often training leaves out a mixer or feed-forward layer of the last block for an image; linear in the
            depth, from 0 (arXiv 1603.09382).
        hidden_size (`int`, defaults to 384): Width d.
        num_hidden_layers (`int`, defaults to 12): Number of blocks.
        position_bias_rank (`int`, *optional*, defaults to 128):
            Rank d' of the factorised bias of full and local (eq. 7). `None` learns every bias by itself.
        qkv_bias (`bool`, defaults to `True`): Whether the projection to queries, keys and values has a bias.
        hidden_dropout_prob (`float`, defaults to 0.0): Dropout on embeddings and on each layer's output.
        layer_norm_eps (`float`, defaults to 1e-06): Epsilon of the layer norms.
        intermediate_size, hidden_act, window_size, position_bias_type, query_activation, key_activation,
        conv_reparameterization, position_bias_init_mean, position_bias_init_std, norm_type, linear_fan_in,
        linear_activation, initializer_range:
            As in [`AFTConfig`].

    Raises:
        ValueError: one error that lists every field with a value that is not allowed.

    Example:

    ```python
    >>> from modeling_aft import AFTForImageClassification, AFTVisionConfig

    >>> config = AFTVisionConfig(image_size=28, patch_size=4, num_channels=1, kernel_size=5, num_labels=10)
    >>> model = AFTForImageClassification(config)
    ```"""

    model_type = "aft_vision"

    aft_type: str = "conv"
    kernel_size: int = 11
    num_attention_heads: int = 16
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    pooling: str | None = None
    position_embedding_type: str | None = None
    drop_path_rate: float | int = 0.0
    hidden_size: int = 384
    position_bias_rank: int | None = 128
    qkv_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        is_conv = self.aft_type == "conv"
        if self.pooling is None:
            self.pooling = "mean" if is_conv else "token"
        if self.position_embedding_type is None:
            self.position_embedding_type = "none" if is_conv else "learned"
        super().__post_init__(**kwargs)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of `image_size`."""
        (height, width), (rows, columns) = sides(self.image_size), sides(self.patch_size)
        return height // rows, width // columns

    @property
    def lead(self) -> int:
        """How many tokens stand before the patches: the class token, or none (not serialised)."""
        return int(self.pooling == "token")

    @property
    def max_position_embeddings(self) -> int:
        """N, the number of places in the tables (not serialised)."""
        rows, columns = self.grid
        return self.lead + rows * columns

    @property
    def decay(self) -> None:
        """The keys of images do not fade: they stand in no order."""
        return None

    @property
    def has_position_table(self) -> bool:
        """Whether some learned table is for images of `image_size` alone."""
        return self.position_embedding_type == "learned" or self.has_bias_table

    def _problems(self) -> list[str]:
        problems = self._below_one("num_channels")
        image, patch = sides(self.image_size), sides(self.patch_size)
        for name, size in (("image_size", image), ("patch_size", patch)):
            if len(size) != 2 or min(size) < 1:
                problems.append(self._problem(name, "a number or two of at least 1: height and width"))
        if problems:
            return problems  # there is no grid that the rest could be compared with
        if image[0] % patch[0] or image[1] % patch[1]:
            problems.append(self._problem("image_size", f"a multiple of patch_size ({self.patch_size})"))
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            problems.append(self._problem("kernel_size", "odd and at least 1"))
        if self.pooling not in POOLINGS:
            problems.append(self._problem("pooling", f"None or one of {', '.join(POOLINGS)}"))
        elif self.pooling == "token" and self.aft_type == "conv":
            problems.append(self._problem("pooling", "mean for aft_type='conv': a token has no place in the grid"))
        if self.position_embedding_type not in ("learned", "none"):
            problems.append(self._problem("position_embedding_type", "None, learned or none"))
        if not 0 <= self.drop_path_rate < 1:
            problems.append(self._problem("drop_path_rate", "in [0, 1)"))
        return problems + super()._problems()


__all__ = ["AFTVisionConfig"]
