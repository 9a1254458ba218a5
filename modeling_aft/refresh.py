# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Refresh: a model starts anew from time to time and reads the last tokens again, so that no text is too long for it.

With R = `refresh_every` and O = `refresh_overlap`, a window is what is read from one start to the next. The first
window is the tokens 0 to R - 1. Each later one begins with the last O tokens of the one before, and has R - O new
ones. So the model reads R / (R - O) times the tokens of the text, and holds R at most.
"""

from torch import Tensor


def check_refresh(config, refresh_every: int | None, refresh_overlap: int | None) -> None:
    """
    Checks R and O, which may both be None.

    Args:
        config: that of the model which is to start anew.

    Raises:
        ValueError: only one is given, or they are not whole numbers with 1 <= O < R, or the tables of the model end
            before R.
    """
    values = {"refresh_every": refresh_every, "refresh_overlap": refresh_overlap}
    if refresh_every is None and refresh_overlap is None:
        return
    for name, other in (("refresh_every", "refresh_overlap"), ("refresh_overlap", "refresh_every")):
        if values[name] is None:
            raise ValueError(f"`{name}` must be given with `{other}`, got None.")
        if type(values[name]) is not int or values[name] < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {values[name]!r}.")
    if refresh_overlap >= refresh_every:
        raise ValueError(
            f"`refresh_overlap` must be less than `refresh_every` ({refresh_every}), got {refresh_overlap}."
        )
    limit = config.max_position_embeddings
    if config.has_position_table and refresh_every > limit:
        raise ValueError(
            f"`refresh_every` must be at most max_position_embeddings ({limit}), where the position tables of the "
            f"model end, got {refresh_every}."
        )


def window_start(index: int | Tensor, refresh_every: int, refresh_overlap: int) -> int | Tensor:
    """The first token of the window that reads token number `index`, at least 0, as one of its new ones."""
    new = refresh_every - refresh_overlap
    number = (index - refresh_every) // new + 1  # of the window: 0 or less for the first
    return number.clamp_min(0) * new if isinstance(number, Tensor) else max(number, 0) * new
