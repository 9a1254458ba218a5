# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The command line `aft`: finds the command, and lets it read its flags."""

import importlib
import sys

from aft.console import any_text, run_program
from aft.flags import did_you_mean


COMMANDS = {
    "pretrain": "train a language model, and score it in bits per byte",
    "finetune": "go on with a saved model: on a text, or as a classifier of labelled texts",
    "classify": "train a classifier of pictures, from nothing or from a saved model",
    "seq2seq": "train an encoder-decoder on pairs of texts, or by span corruption",
    "generate": "continue a prompt",
    "paint": "draw pictures with a language model of pictures, or complete some",
    "evaluate": "bits per byte of a saved model, by a named protocol",
    "stream": "read a text without end, and say how surprising each line is",
    "compare": "train the models of a plan, and make a table and a picture of them",
    "draw": "pictures of what a model has learned about positions",
    "release": "make of a finished run a folder to hand out",
    "push": "push a saved model to the Hub",
}


def usage() -> str:
    """What `aft --help` prints."""
    lines = [f"  {name:<9} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: aft COMMAND [FLAGS]",
            "",
            *lines,
            "",
            "aft COMMAND --help lists the flags of a command.",
            "On several GPUs: accelerate launch -m aft COMMAND [FLAGS]",
        ]
    )


@any_text()
def main(argv: list[str] | None = None) -> object:
    """
    Runs the command that `argv` begins with, by default the command line; returns what its `main` returns.

    Raises:
        ValueError: there is no such command; or what the command raises.
    """
    command, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        return print(usage())
    if command == "--version":
        from importlib.metadata import version

        return print(f"modeling-aft {version('modeling-aft')}")
    if command not in COMMANDS:
        raise ValueError(f"no command {command!r}{did_you_mean(command, COMMANDS)}; aft --help lists them")
    return importlib.import_module(f"aft.commands.{command}").main(flags)


def run() -> None:
    """The program `aft`."""
    run_program(main)


if __name__ == "__main__":
    run()
