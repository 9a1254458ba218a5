"""
Hugging Face's own tests of models: where they come from, and how they are imported.

The source distribution of transformers carries the modules that every model of the library is tested with. The one of
the installed version is downloaded once, by pip and so from wherever pip is configured to look:

    python tests/hf_sources.py

It is kept in $MODELING_AFT_CACHE, by default ~/.cache/modeling_aft. What it lacks, the tests of `generate` and of
pipelines, comes from a checkout of the transformers repository of about that version: HF_TESTS_CHECKOUT=FOLDER.
"""

import importlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import transformers
from filelock import FileLock


CHECKOUT = os.environ.get("HF_TESTS_CHECKOUT")
HINT = (
    "Hugging Face's tests are in the source distribution of transformers, which pip must be able to download once: "
    "`python tests/hf_sources.py` (MODELING_AFT_SKIP_HF_TESTS=1 leaves them out)."
)
PACKAGE = "tests"  # by which the modules call each other
PIPELINES = (
    "feature_extraction",
    "fill_mask",
    "text_classification",
    "text_generation",
    "token_classification",
    "zero_shot",
)


def cache_folder() -> Path:
    """$MODELING_AFT_CACHE, or the folder `modeling_aft` among the caches of the user."""
    if chosen := os.environ.get("MODELING_AFT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "modeling_aft"


def folders() -> list[Path]:
    """
    Where the modules of the tests lie; what the first folder has is not taken from the second.

    Raises:
        ValueError: HF_TESTS_CHECKOUT is no checkout of transformers.
        OSError: the source distribution cannot be downloaded.
    """
    if CHECKOUT is None:
        return [fetch() / "tests"]
    checkout = Path(CHECKOUT, "tests")
    needed = ["causal_lm_tester.py", "generation/test_utils.py", "pipelines/test_pipelines_common.py"]
    if not all((checkout / name).is_file() for name in needed):
        raise ValueError(f"HF_TESTS_CHECKOUT must be a checkout of transformers with its tests, got {CHECKOUT}")
    return [fetch() / "tests", checkout]


def fetch() -> Path:
    """Downloads the tests of the installed version if they are not there; the folder appears when it is whole."""
    name = f"transformers-{transformers.__version__}"
    target = cache_folder() / f"{name}-tests"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # the processes of pytest-xdist begin at the same time
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            archive = download(transformers.__version__, folder)
            with tarfile.open(archive) as content:
                wanted = [
                    member for member in content if member.name.startswith((f"{name}/tests/", f"{name}/LICENSE"))
                ]
                content.extractall(folder, members=wanted, filter="data")
            os.rename(Path(folder, name), target)
    return target


def download(version: str, folder: str) -> Path:
    """The source distribution of a version of transformers, as pip finds it. Raises OSError if it does not."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers", "--dest", folder]
    done = subprocess.run([*command, f"transformers=={version}"], capture_output=True, text=True)
    archives = list(Path(folder).glob("*.tar.gz"))
    if done.returncode or len(archives) != 1:
        raise OSError(
            f"No source distribution of transformers {version}.\n{HINT}\n{done.stdout[-500:]}{done.stderr[-1500:]}"
        )
    return archives[0]


class StandIns:
    """Finds any module of the tests in a folder, and gives it an empty class for every name asked of it."""

    def __init__(self, folder: str):
        self.folder = folder

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.startswith(self.folder) else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        def empty_class(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = empty_class


@contextmanager
def stand_ins():
    """
    Missing modules are made up inside, and forgotten afterwards; those for exporting always are, because the programs
    that they look into are those of the exporters of one version.
    """
    first, last = StandIns(f"{PACKAGE}.exporters"), StandIns(f"{PACKAGE}.")
    sys.meta_path.insert(0, first)
    sys.meta_path.append(last)
    try:
        yield
    finally:
        for finder in (first, last):
            sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if isinstance(getattr(module, "__loader__", None), StandIns):
                del sys.modules[name]


def load() -> SimpleNamespace:
    """
    The modules `configuration`, `modeling`, `pipelines` and `training`, and of a checkout `generation` and, if it fits
    the installed version, `causal_lm`; else None.
    """
    package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
    package.__path__ = [str(folder) for folder in folders()]
    modules = dict.fromkeys(["generation", "causal_lm"])

    def load_one(short: str, name: str):
        modules[short] = importlib.import_module(f"{PACKAGE}.{name}")

    with tempfile.TemporaryDirectory() as no_models, stand_ins():
        # Read at import: a list of models on the Hub. The tests make their own.
        Path(no_models, "reports").mkdir()
        Path(no_models, "reports", "tiny_model_summary.json").write_text(json.dumps({}))
        with (
            mock.patch.dict(os.environ, TRANSFORMERS_TINY_MODEL_PATH=no_models),
            # The library under test is the installed one, not one beside the tests.
            mock.patch("transformers.utils.direct_transformers_import", return_value=transformers),
            # A test is left out for what it needs, not for taking long.
            mock.patch("transformers.testing_utils._run_slow_tests", True),
            # Their marks are none of this project's, which --strict-markers would reject.
            mock.patch.object(pytest.mark, "_config", None),
        ):
            load_one("configuration", "test_configuration_common")
            load_one("modeling", "test_modeling_common")
            load_one("pipelines", "test_pipeline_mixin")
            load_one("training", "test_training_mixin")
            if CHECKOUT:
                load_one("generation", "generation.test_utils")
                with suppress(ImportError):  # it imports what only its own version of the library has
                    load_one("causal_lm", "causal_lm_tester")
                for name in PIPELINES:  # here, because the mixin would import them when it runs them
                    importlib.import_module(f"{PACKAGE}.pipelines.test_pipelines_{name}")
    return SimpleNamespace(**modules)


if __name__ == "__main__":
    try:
        print(*folders())
    except (OSError, ValueError) as error:
        sys.exit(str(error))
