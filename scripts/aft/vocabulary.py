# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Which tokenizer fits a model, and how many rows of its embedding it needs."""


def byte_tokenizer(config):
    """
    The `ByteTokenizer` of a model of 256 bytes. Only the models of this package need no row for padding; others pad
    with the byte that ends a text, which UTF-8 never has.
    """
    from modeling_aft import ByteTokenizer  # what else is here runs without the package

    return ByteTokenizer() if hasattr(config, "has_position_table") else ByteTokenizer(pad_token="<|endoftext|>")


def rows_needed(tokenizer, config) -> int:
    """
    The number of ids that the tokens of a text can have.

    Args:
        tokenizer: of transformers.
        config: of the model. Those of this package need no row for padding, whose id may come after all others.
    """
    ids = set(tokenizer.get_vocab().values())
    others = {tokenizer.convert_tokens_to_ids(t) for n, t in tokenizer.special_tokens_map.items() if n != "pad_token"}
    if hasattr(config, "has_position_table"):
        ids -= {tokenizer.pad_token_id} - others
    return 1 + max(ids)
