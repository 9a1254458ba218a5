"""The windows that training reads: their order, and that each token is read once in an epoch."""

from functools import partial

import numpy as np
import pytest

from aft.training_windows import TrainingWindows


def training_windows(
    num_bytes: int = 1000, length: int = 16, batch_size: int = 8, seed: int = 0, stream_length: int | None = None
) -> TrainingWindows:
    # Every value is its own position, so that a window shows where it was read.
    text = np.arange(num_bytes)
    return TrainingWindows(lambda start, stop: text[start:stop], num_bytes, length, batch_size, seed, stream_length)


training_streams = partial(training_windows, stream_length=48)
kinds = pytest.mark.parametrize("make", [training_windows, training_streams], ids=["windows", "streams"])


def epoch(windows: TrainingWindows, steps: range) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and labels of some steps, [steps, batch_size, length]."""
    batches = [windows.batch(step, range(windows.batch_size)) for step in steps]
    return tuple(np.stack(arrays) for arrays in zip(*batches, strict=True))


@kinds
def test_labels_are_the_next_bytes(make):
    inputs, labels = make().batch(step=3, rows=range(8))
    assert inputs.shape == labels.shape == (8, 16)
    assert inputs.dtype == labels.dtype == np.int64
    assert (labels == inputs + 1).all()
    assert (np.diff(inputs, axis=1) == 1).all()


@pytest.mark.parametrize("num_bytes, length", [(1000, 16), (1001, 10), (33, 16), (257, 1)])
def test_an_epoch_sees_each_byte_once(num_bytes, length):
    windows = training_windows(num_bytes, length, batch_size=1)
    inputs, labels = epoch(windows, range(windows.windows_per_epoch))
    assert len(np.unique(inputs)) == inputs.size > num_bytes - 2 * length - 1
    assert inputs.min() >= 0 and labels.max() < num_bytes


def test_epochs_differ_in_order_and_offset():
    windows = training_windows()
    starts = [windows.epoch_order(epoch) for epoch in range(4)]
    assert len({tuple(order) for order in starts}) == 4
    assert len({order[0] % 16 for order in starts}) > 1
    assert not (np.diff(starts[0]) > 0).all()


@pytest.mark.parametrize("step", [0, 7, 8, 1000])  # the second epoch begins in or before step 7
@pytest.mark.parametrize("parts", [1, 2, 4])
@kinds
def test_a_batch_depends_only_on_seed_and_step(make, step, parts):
    whole, _ = make().batch(step, range(8))
    windows = make()
    windows.batch(5, range(8))  # what was read before does not matter
    size = 8 // parts
    pieces = [windows.batch(step, range(first, first + size))[0] for first in range(0, 8, size)]
    assert (np.concatenate(pieces) == whole).all()
    assert (make(seed=1).batch(step, range(8))[0] != whole).any()


STREAMS = [(1000, 16, 8, 48), (1001, 10, 1, 20), (513, 16, 8, 256), (260, 1, 128, 2)]
streams = pytest.mark.parametrize("num_bytes, length, batch_size, stream_length", STREAMS)


@streams
def test_a_row_goes_on_where_it_ended(num_bytes, length, batch_size, stream_length):
    windows = training_windows(num_bytes, length, batch_size, stream_length=stream_length)
    steps = stream_length // length
    inputs, labels = epoch(windows, range(7 * steps))
    begins = np.array([windows.begins(step) for step in range(7 * steps)])
    assert begins.tolist() == ([True] + [False] * (steps - 1)) * 7
    follows = inputs[1:, :, 0] == labels[:-1, :, -1]
    assert follows[~begins[1:]].all() and not follows[begins[1:]].all()


@streams
def test_an_epoch_of_streams_sees_each_byte_once(num_bytes, length, batch_size, stream_length):
    windows = training_windows(num_bytes, length, 1, stream_length=stream_length)
    inputs, labels = epoch(windows, range(windows.windows_per_epoch))
    assert inputs.size == windows.windows_per_epoch * length > num_bytes - 2 * stream_length - 1
    assert sorted(inputs.flatten()) == list(range(inputs.min(), inputs.min() + inputs.size))
    assert inputs.min() >= 0 and labels.max() < num_bytes


def test_a_stream_of_one_window_is_a_window():
    plain, streams = training_windows(), training_windows(stream_length=16)
    for step in range(20):
        assert (plain.batch(step, range(8))[0] == streams.batch(step, range(8))[0]).all()
        assert plain.begins(step) and streams.begins(step)


@pytest.mark.parametrize("name, options", [("sequence_length", {}), ("stream_length", {"stream_length": 48})])
def test_short_train_split_is_refused(name, options):
    length = options.get("stream_length", 16)
    training_windows(2 * length + 1, **options)
    message = f"--{name} must be at most {length - 1}, as a train split of {2 * length} tokens .* got {length}"
    with pytest.raises(ValueError, match=message):
        training_windows(2 * length, **options)
