# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Reads bytes without end with one model, and says of each line how surprising it was.

    tail -n 1000 server.log | aft stream runs/logs
    aft stream runs/logs server.log --follow --state runs/server.safetensors
    aft stream runs/logs server.log --expect 200

A line of the output has the bits per byte of a line of the input, its length in bytes, and its text: what is not UTF-8
as U+FFFD, control characters as escapes, no more than --width of it. A `*` marks a line of more bits per byte than the
mean of all lines before it plus --mark standard deviations; the first ten lines are never marked. A line ends with a
newline or where the input ends. The very first byte of a stream is not scored: nothing comes before it.

With --state the stream goes on where the last run left it: with the mean of all lines, and in FILE at the byte that it
had come to. The state is saved at the end. Ctrl-C and SIGTERM end the program as the end of the input does; SIGUSR1
writes what is expected at that moment. A FILE that has become shorter is read from its beginning.

A model with position tables, or with a state that grows, needs --refresh_every and --refresh_overlap. So do most
models that were trained on windows alone: see docs/streams.md.
"""

import argparse
import math
from pathlib import Path

from aft.console import any_text
from aft.flags import DTYPES, FlagParser, check_model_name, import_files


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """
    The flags of this program.

    Raises:
        ValueError: one error that lists every value that is not allowed.
    """
    parser = FlagParser("stream", __doc__)
    parser.add_argument("model", help="folder of a saved model, or a name on the Hub")
    parser.add_argument("file", nargs="?", help="file to read; standard input when left out")
    parser.add_argument("--follow", action="store_true", help="wait for more where FILE ends, until a signal")
    parser.add_argument("--state", help="file of the stream: gone on with if it is there, and saved at the end")
    parser.add_argument("--expect", type=int, help="write the likeliest next bytes at the end, so many")
    parser.add_argument("--mark", type=float, default=3.0, help="standard deviations of a mark (default: %(default)s)")
    parser.add_argument("--width", type=int, default=100, help="most bytes shown of a line (default: %(default)s)")
    parser.add_argument("--refresh_every", type=int, help="R: the model starts anew before it would read more bytes")
    parser.add_argument("--refresh_overlap", type=int, help="O: and then reads so many again")
    parser.add_argument("--dtype", default="auto", help="auto (what config.json says; default) or one like float32")
    parser.add_loading()
    args = parser.parse_intermixed_args(argv)  # else a flag between the two names would end them
    source, state = (None if name is None else Path(name) for name in (args.file, args.state))
    problems = [
        f"{name} must be {allowed}, got {getattr(args, name.removeprefix('--'))!r}"
        for name, ok, allowed in (
            ("file", source is None or (source.exists() and not source.is_dir()), "a file or a pipe"),
            ("--follow", source is not None or not args.follow, "left out without a file: standard input ends itself"),
            ("--state", state is None or state.is_file() or not state.exists(), "a new file or a regular one"),
            ("--state", state is None or state.absolute().parent.is_dir(), "a file in a folder that is there"),
            ("--expect", args.expect is None or args.expect >= 1, "at least 1"),
            ("--mark", math.isfinite(args.mark), "a finite number"),
            ("--width", args.width >= 0, "at least 0"),
            ("--dtype", args.dtype in ("auto", *DTYPES), f"one of auto, {', '.join(DTYPES)}"),
        )
        if not ok
    ]
    if problems:
        raise ValueError("aft stream: " + "; ".join(problems))
    check_model_name(args.model, "model")
    args.file, args.state = source, state
    return args


@any_text()
def main(argv: list[str] | None = None):
    """
    Runs the program with the flags `argv`, those of the command line by default; returns the `TokenStream`.

    Raises:
        ValueError: a flag is wrong, or the model not one of bytes, whole and finite, or does not fit the flags.
    """
    args = parse_arguments(argv)
    import_files(args.imports)
    from aft.line_surprise import read_stream

    return read_stream(args)
