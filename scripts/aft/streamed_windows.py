# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The windows of a text that is read as it is needed, and never whole."""

import itertools
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from datasets.distributed import split_dataset_by_node

from aft.atomic_files import write_whole
from aft.text_sources import DocumentText, check_texts


TOGETHER = 64  # documents that are tokenized at once


class StreamedWindows:
    """
    The windows of one process, one after the other in the order of its documents, which follow each other without a
    gap. Each process reads documents of its own, so the batch of a step depends on their number. What is kept is the
    step that is being read and the place where it begins; checkpoints of the accelerator include that place, from
    which the stream is read again.

    Args:
        text (`DocumentText`): with a stream.
        vocabulary: encodes the documents; the token of its that ends a text follows each if they are separate.
        length (`int`): inputs per window, T.
        batch_size (`int`): windows per step, over all processes and micro-batches.
        micro_batch_size (`int`): windows of one forward.
        seed (`int`): of the order.
        shuffle_buffer (`int`): among how many documents the next one is drawn; 0 keeps the order.
        accelerator (`Accelerator`): says which process this is, and saves and loads the checkpoints.
    """

    windows_per_epoch = None  # nobody knows before the end

    def __init__(
        self,
        text: DocumentText,
        vocabulary,
        length: int,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        shuffle_buffer: int,
        accelerator: Accelerator,
    ):
        self.text, self.vocabulary, self.length = text, vocabulary, length
        self.labels_per_window = length
        self.micro_batch_size, self.num_processes = micro_batch_size, accelerator.num_processes
        self.rows_here = batch_size // accelerator.num_processes
        self.process = accelerator.process_index
        stream = text.stream
        if shuffle_buffer:
            stream = stream.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.stream = split_dataset_by_node(stream, self.process, accelerator.num_processes)
        self.end = vocabulary.end if text.separated else None
        self.step = 0
        self.place = {"epoch": 0, "document": 0, "token": 0}  # where the windows of `step` begin
        self.documents = None  # an iterator over those not read yet
        self.waiting: deque[tuple[dict, np.ndarray, np.ndarray]] = deque()  # places, ids and sizes of those read
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: self.save(Path(folder)))
        accelerator.register_load_state_pre_hook(lambda models, folder: self.load(Path(folder)))

    def read_documents(self, epoch: int, first: int) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
        """The place, ids and sizes of each document from number `first` of an epoch on, epoch after epoch."""
        while True:
            self.stream.set_epoch(epoch)
            number, num_tokens = first, 0
            rows = itertools.islice(iter(self.stream), first, None)
            while True:
                batch = [row[self.text.column] for row in itertools.islice(rows, TOGETHER)]
                if not batch:
                    break
                check_texts(batch, "train", number)
                for ids, sizes in self.vocabulary.encode(batch):
                    if self.end is not None:
                        ids, sizes = np.append(ids, self.end), np.append(sizes, 0)
                    yield {"epoch": epoch, "document": number, "token": 0}, ids, sizes
                    number, num_tokens = number + 1, num_tokens + len(ids)
            if num_tokens == 0 and first == 0:
                raise ValueError("--dataset: the stream has no text for each process")
            epoch, first = epoch + 1, 0

    def fill(self, count: int) -> None:
        """Reads documents until `count` tokens wait."""
        if self.documents is None:
            self.documents = self.read_documents(self.place["epoch"], self.place["document"])
            place, ids, sizes = next(self.documents)
            skipped = self.place["token"]
            self.waiting = deque([({**place, "token": skipped}, ids[skipped:], sizes[skipped:])])
        have = sum(len(ids) for _, ids, _ in self.waiting)
        while have < count:
            self.waiting.append(next(self.documents))
            have += len(self.waiting[-1][1])

    def advance(self, step: int) -> None:
        """Goes on to the windows of a later step."""
        while self.step < step:
            count = self.rows_here * self.length
            self.fill(count + 1)
            while count:
                place, ids, sizes = self.waiting.popleft()
                if len(ids) > count:
                    rest = {**place, "token": place["token"] + count}
                    self.waiting.appendleft((rest, ids[count:], sizes[count:]))
                count -= min(len(ids), count)
            self.step += 1
            self.place = self.waiting[0][0]

    def read(self, step: int, rows: range, part: int) -> np.ndarray:
        """The ids (part 1) or sizes (part 2) of the windows of these rows, and of the token after each."""
        if step < self.step:
            raise ValueError(f"a stream is read forwards: step {step} comes before {self.step}")
        self.advance(step)
        needed = self.rows_here * self.length + 1
        self.fill(needed)
        whole, have = [], 0
        for entry in self.waiting:
            whole.append(entry[part])
            have += len(entry[part])
            if have >= needed:
                break
        tokens = np.concatenate(whole)
        size, others = self.micro_batch_size, self.num_processes
        here = [row // (size * others) * size + row % size for row in rows]  # among the rows of this process
        return np.stack([tokens[row * self.length : (row + 1) * self.length + 1] for row in here]).astype(np.int64)

    def batch(self, step: int, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """
        Rows `rows` of the global batch of `step`, which are of this process.

        Returns:
            `tuple`: inputs and labels, int64 [len(rows), length]; a label is the token after its input.

        Raises:
            ValueError: a later step has been read already, or the stream has no documents.
        """
        windows = self.read(step, rows, 1)
        return windows[:, :-1], windows[:, 1:]

    def sizes(self, step: int, rows: range) -> np.ndarray:
        """How many bytes of text the labels of these rows stand for, int64 [len(rows), length]."""
        return self.read(step, rows, 2)[:, 1:]

    def file(self, folder: Path) -> Path:
        return folder / f"stream_{self.process}.json"

    def save(self, folder: Path) -> None:
        """Writes where the step that was read last begins."""
        write_whole(self.file(folder), json.dumps({"step": self.step, **self.place}))

    def load(self, folder: Path) -> None:
        """Goes on from there."""
        state = json.loads(self.file(folder).read_text())
        self.step = state.pop("step")
        self.place, self.documents = state, None
        self.waiting.clear()
