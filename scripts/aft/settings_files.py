# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""YAML and JSON files of settings, read strictly: what is no mapping, or has a key twice, is an error with a name."""

import json
import reprlib
from collections.abc import Callable
from pathlib import Path

import yaml

from aft.atomic_files import check_file
from aft.console import one_line


def unique_keys(pairs: list[tuple]) -> dict:
    """A mapping of the pairs; a ValueError if two have one key."""
    values = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {reprlib.repr(key)} stands there twice")
        values[key] = value
    return values


class Loader(yaml.SafeLoader):
    """YAML with the types of YAML 1.1; a key that stands twice is an error."""

    def construct_mapping(self, node, deep=False):
        own = [(self.construct_object(key, deep=True), None) for key, _ in node.value if key.value != "<<"]
        unique_keys(own)
        return super().construct_mapping(node, deep)


class PlainLoader(Loader):
    """
    The same without types: each scalar is a string, as it is written, so that `no`, `007` and a date stay what they
    are; but null, and an empty value, is None.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(path: str | Path, name: str, plain: bool = False) -> dict:
    """
    The mapping in a YAML file, with the types of YAML, or if `plain` as `PlainLoader` reads it.

    Raises:
        ValueError: it cannot be read or is no mapping; the message begins with `name`.
    """
    return read_mapping(path, name, lambda text: yaml.load(text, PlainLoader if plain else Loader))


def read_json(path: str | Path, name: str) -> dict:
    """
    The object in a JSON file.

    Raises:
        ValueError: it cannot be read or is no object; the message begins with `name`.
    """
    return read_mapping(path, name, lambda text: json.loads(text, object_pairs_hook=unique_keys))


def read_mapping(path: str | Path, name: str, parse: Callable[[str], object]) -> dict:
    check_file(Path(path), name)
    try:
        content = parse(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{name} {path}: is nested too deeply") from None
    except Exception as error:  # PyYAML raises anything, TypeError for a key that is a list
        raise ValueError(f"{name} {path}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} {path}: must be a mapping of names to values, got {reprlib.repr(content)}")
    return content
