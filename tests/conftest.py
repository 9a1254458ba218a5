"""Settings of every test: no network, one thread per test process, seeded."""

import gc
import os


# Before transformers and datasets are imported, which read these once.
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(name, "1")
# Subprocesses inherit it. One thread each, because pytest-xdist already runs one process per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import set_seed  # noqa: E402


torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords hold the names of folders as well
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """All that has been imported and collected stays: the collector of garbage, whose every full turn takes half a
    second else, looks at what tests make."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # libraries count what they leave behind


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Runs of accelerate, here and in new processes, use the CPU, also on a machine with a GPU."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def seed():
    set_seed(0)
