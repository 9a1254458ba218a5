# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The surprise of each line of a text without end: what `aft stream` does."""

import argparse
import contextlib
import math
import os
import select
import signal
import sys
import time
from collections.abc import Iterator

import torch
import transformers
from transformers import AutoModelForCausalLM

from aft.machine import peak_resident_bytes
from aft.saved_models import load_config, load_model
from aft.vocabulary import vocabulary_of_model
from modeling_aft import TokenStream


AT_ONCE = 4096  # most bytes of a read
WAIT = 0.2  # seconds between looks at a file that may grow, and at signals
FIRST_MARKED = 10  # lines before one can be marked
NOTES = {"lines": 0, "mean": 0.0, "squares": 0.0, "offset": 0}


class Signals:
    """Remembers, in a `with` block, that a signal has come: Ctrl-C or SIGTERM to stop, SIGUSR1 to expect."""

    STOP = (signal.SIGINT, signal.SIGTERM)
    EXPECT = getattr(signal, "SIGUSR1", None)  # Windows has none

    def __enter__(self) -> "Signals":
        self.found = set()
        numbers = [number for number in (*self.STOP, self.EXPECT) if number is not None]
        self.before = {number: signal.signal(number, lambda number, _: self.found.add(number)) for number in numbers}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @property
    def stop(self) -> bool:
        return not self.found.isdisjoint(self.STOP)

    def take_expect(self) -> bool:
        """Whether SIGUSR1 has come since the last call."""
        asked = self.EXPECT in self.found
        self.found.discard(self.EXPECT)
        return asked


class Lines:
    """
    Prints the lines of a stream with their surprise. Of a line that has not ended it keeps sums and as much of its
    text as is shown.

    Args:
        stream (`TokenStream`): in whose `notes` the number, mean and sum of squared deviations of the lines are.
        mark (`float`): standard deviations above the mean from which on a line is marked.
        width (`int`): most bytes of a line that are shown.
    """

    def __init__(self, stream: TokenStream, mark: float, width: int):
        self.stream, self.mark, self.width = stream, mark, width
        self.text, self.num_bytes, self.scored, self.nats = b"", 0, 0, 0.0
        self.total_scored, self.total_nats = 0, 0.0

    def read(self, content: bytes) -> None:
        """Reads the next bytes, and prints what lines end in them."""
        is_first = self.stream.num_tokens == 0
        surprise = self.stream.read(torch.frombuffer(bytearray(content), dtype=torch.uint8)[None])[0].double().cpu()
        start = 0
        while start < len(content):
            end = content.find(b"\n", start) + 1 or len(content)
            self.text += content[start : min(end, start + max(self.width - len(self.text), 0))]
            self.num_bytes += end - start
            self.scored += end - start - (is_first and start == 0)
            self.nats += surprise[start:end].sum().item()
            if content[end - 1 : end] == b"\n":
                self.end_line()
            start = end

    def end_line(self) -> None:
        """Prints the line so far, if there is any, and counts it."""
        if self.num_bytes == 0:
            return
        notes = self.stream.notes
        bits = self.nats / math.log(2) / max(self.scored, 1)
        deviation = math.sqrt(notes["squares"] / max(notes["lines"], 1))
        marked = notes["lines"] >= FIRST_MARKED and bits > notes["mean"] + self.mark * deviation
        print(f"{'*' if marked else ' '} {bits:7.3f} {self.num_bytes:7d}  {readable(self.text)}", flush=True)
        notes["lines"] += 1
        before = bits - notes["mean"]
        notes["mean"] += before / notes["lines"]
        notes["squares"] += before * (bits - notes["mean"])
        self.total_scored, self.total_nats = self.total_scored + self.scored, self.total_nats + self.nats
        self.text, self.num_bytes, self.scored, self.nats = b"", 0, 0, 0.0

    def summary(self) -> str:
        """The score of all lines so far, in a line."""
        if not self.total_scored:
            return "no byte was scored"
        bits = self.total_nats / math.log(2) / self.total_scored
        peak = peak_resident_bytes()
        memory = "" if peak is None else f"; peak memory {peak / 2**20:.0f} MiB"
        return f"{bits:.4f} bits per byte, {self.total_scored} bytes scored{memory}"


def readable(text: bytes) -> str:
    """Bytes as one line of text, without the newline that ends them and a character that is cut off."""
    text = text.removesuffix(b"\n").removesuffix(b"\r")
    for cut in range(min(3, len(text)) + 1):  # a character has four bytes at most
        with contextlib.suppress(UnicodeDecodeError):
            return escape(text[: len(text) - cut].decode())
    return escape(text.decode(errors="replace"))


def escape(text: str) -> str:
    """The text with escapes for what no terminal shows."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_parts(file, follow: bool, signals: Signals) -> Iterator[bytes]:
    """What a binary file without buffer has, in parts; b"" where there is nothing now, to look at signals."""
    while not signals.stop:
        if file.seekable():
            if os.fstat(file.fileno()).st_size < file.tell():
                file.seek(0)
        elif os.name != "nt" and not select.select([file], [], [], WAIT)[0]:  # Windows selects sockets alone
            yield b""
            continue
        part = file.read(AT_ONCE)
        if not part and not follow:
            return
        if not part:
            time.sleep(WAIT)
        yield part


def open_stream(model, args: argparse.Namespace) -> TokenStream:
    """
    The stream of --state, or a new one.

    Raises:
        ValueError: the model needs a refresh or cannot have this one, or the file holds no stream, or one of another
            kind of model or with another refresh.
    """
    refresh = {"refresh_every": args.refresh_every, "refresh_overlap": args.refresh_overlap}
    if args.state is None or not args.state.exists():
        stream = TokenStream(model, **refresh)
        stream.notes |= NOTES
        return stream
    stream = TokenStream.load(args.state, model)
    if stream.notes.keys() != NOTES.keys():
        raise ValueError(f"--state {args.state} must be a file that aft stream wrote, got notes {stream.notes}")
    for name, value in refresh.items():
        if value not in (None, getattr(stream, name)):
            raise ValueError(f"--{name} must be {getattr(stream, name)} as in --state {args.state}, got {value}")
    return stream


def read_stream(args: argparse.Namespace) -> TokenStream:
    """
    Reads a stream with the flags of `aft stream`, and returns it.

    Raises:
        ValueError: the model is not one of bytes, whole and finite, or does not fit the flags.
    """
    transformers.utils.logging.disable_progress_bar()
    trust = {"trust_remote_code": args.trust_remote_code}
    if not vocabulary_of_model(args.model, load_config(args.model, **trust), **trust).is_bytes:
        raise ValueError(f"--model {args.model}: must be a model of bytes, which a stream consists of")
    model, _ = load_model(AutoModelForCausalLM, args.model, dtype=args.dtype, **trust)
    stream = open_stream(model.to("cuda" if torch.cuda.is_available() else "cpu"), args)
    lines = Lines(stream, args.mark, args.width)

    def expect() -> None:
        if args.expect and stream.num_tokens:
            made = stream.expect(args.expect, do_sample=False)[0].tolist()
            print(f"expected next: {escape(bytes(made).decode(errors='replace'))}", flush=True)

    source = getattr(sys.stdin, "buffer", sys.stdin) if args.file is None else None
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        if source is None:
            source = stack.enter_context(open(args.file, "rb", buffering=0))
            if source.seekable():
                source.seek(stream.notes["offset"])
        for part in read_parts(getattr(source, "raw", source), args.follow, signals):
            if part:
                lines.read(part)
            if signals.take_expect():
                expect()
        if args.file is not None and source.seekable():
            stream.notes["offset"] = source.tell()
        lines.end_line()
        if args.state is not None and stream.num_tokens:
            stream.save(args.state)
        print(lines.summary())
        expect()
    return stream
