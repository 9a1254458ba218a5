"""
Clients of the Hub in processes of their own, with and without the package.

The processes import this module, so it must not import the package.
"""

import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi


FAMILIES = {"AFT": "local", "Synthesizer": "dense+dot_product"}
IDS = torch.arange(40, 52).reshape(2, 6)


def online(hub: HubServer, home: Path, **more: str) -> dict[str, str]:
    """The environment of a process that knows no Hub but the one given, and starts with nothing."""
    left_out = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN", "HF_MODULES_CACHE", "HF_HUB_CACHE")
    return {
        **{name: value for name, value in os.environ.items() if name not in left_out and "PROXY" not in name.upper()},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # which does not speak to HF_ENDPOINT
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **more,
    }


@contextlib.contextmanager
def process(hub: HubServer, home: Path, with_package: bool, **more: str):
    """A function that calls another one in a process of its own, `with_package` or without."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare, (with_package,))
    with patch.dict(os.environ, online(hub, home, **more), clear=True):
        pool.submit(os.getpid).result()  # starts it
    with pool:
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result()


# What they do


def prepare(with_package: bool) -> None:
    """Once in each process."""
    time.sleep = lambda seconds: None  # the client waits between its attempts, up to 23 seconds in all
    # A new process inherits the search path, and with it the folder of remote code of the process that starts it.
    sys.path[:] = [folder for folder in sys.path if not Path(folder, "transformers_modules").is_dir()]
    if with_package:
        import modeling_aft  # noqa: F401
    else:
        sys.modules["modeling_aft"] = None  # importing it now fails, also where it is installed


def contents(model) -> dict:
    """All that must be the same before and after, the tensors as bytes."""
    module = sys.modules[type(model).__module__]
    with torch.no_grad():
        output = model.eval()(IDS)[0]
    config = model.config.to_dict()
    return {
        "class": type(model).__name__,
        "config": {key: config[key] for key in config if key not in ("auto_map", "_name_or_path")},
        "generation_config": model.generation_config.to_diff_dict() if model.can_generate() else None,
        "weights": {name: weight.numpy().tobytes() for name, weight in model.state_dict().items()},
        "output": output.numpy().tobytes(),
        "remote": module.__name__.startswith("transformers_modules."),
        "code": getattr(module, "CODE", "first"),
    }


def make(family: str, head: str, seed: int = 0):
    from families import make_config

    import modeling_aft

    torch.manual_seed(seed)
    config = make_config(FAMILIES[family], is_decoder=head in ("Model", "ForCausalLM"), initializer_range=0.5)
    model = getattr(modeling_aft, f"{family}{head}")(config)
    if head == "ForCausalLM":
        model.generation_config.update(do_sample=True, top_k=7)
    return model


def publish(family: str, head: str, repo: str, seed: int = 0, **options) -> dict:
    """Pushes a model and its tokenizer with `push_to_hub`; returns the contents and the id of the commit."""
    from modeling_aft import ByteTokenizer

    model = make(family, head, seed)
    model.push_to_hub(repo, **options)
    commit = ByteTokenizer().push_to_hub(repo, **options)
    return {**contents(model), "commit": commit.oid}


def save(family: str, head: str, folder: Path, seed: int = 0, **options) -> dict:
    """As `publish`, but to a folder."""
    from modeling_aft import ByteTokenizer

    model = make(family, head, seed)
    model.save_pretrained(folder, **options)
    ByteTokenizer().save_pretrained(folder)
    return contents(model)


def train(folder: Path) -> None:
    """A run of pretrain_enwik8.py, as short as it can be, with a checkpoint in its folder."""
    from pretrain_enwik8 import main

    fields = {"model_type": "aft", "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 128}
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps({**fields, "position_bias_rank": 4}))
    (folder / "text").write_bytes(b"The state of a window. " * 100)
    flags = {"model_preset": folder / "model.json", "dataset_path": folder / "text", "cache_dir": folder / "cache"}
    flags |= {"output_dir": folder / "run", "max_steps": 2, "batch_size": 2, "warmup_steps": 1, "sample_bytes": 8}
    main([word for name, value in flags.items() for word in (f"--{name}", str(value))])


def commit(repo: str, add: dict[str, bytes] | None = None, delete: str | None = None) -> None:
    """Changes single files of a repository."""
    operations = [CommitOperationAdd(name, content) for name, content in (add or {}).items()]
    operations += [CommitOperationDelete(delete)] if delete else []
    HfApi().create_commit(repo, operations, commit_message="change")


def tag(repo: str, name: str) -> None:
    HfApi().create_tag(repo, tag=name)


def load(auto_class: str, repo: str, **options) -> dict:
    return contents(getattr(transformers, auto_class).from_pretrained(repo, **options))


def republish(auto_class: str, repo: str, new_repo: str, token: str) -> dict:
    """Pushes what a repository has to another one."""
    for loader in (transformers.AutoTokenizer, getattr(transformers, auto_class)):
        loaded = loader.from_pretrained(repo, trust_remote_code=True)
        loaded.push_to_hub(new_repo, token=token)
    return contents(loaded)


def load_config(repo: str, **options) -> dict:
    config = transformers.AutoConfig.from_pretrained(repo, **options)
    return {"class": type(config).__name__, "module": type(config).__module__}


def load_tokenizer(repo: str, **options) -> dict:
    tokenizer = transformers.AutoTokenizer.from_pretrained(repo, **options)
    ids = tokenizer(["né", "a"], padding=True).input_ids
    found = {"class": type(tokenizer).__name__, "module": type(tokenizer).__module__}
    return {**found, "ids": ids, "limit": tokenizer.model_max_length}


def run_script(*flags: str | Path) -> str:
    """What push_to_hub.py prints."""
    from push_to_hub import main

    with contextlib.redirect_stdout(io.StringIO()) as output:
        main([str(flag) for flag in flags])
    return output.getvalue()


def run_example(card: str) -> None:
    """Runs the Python of a model card."""
    (example,) = re.findall(r"^```python\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)
    exec(example, {})


def failure(function, *args, **options) -> str:
    """The error of a call that must fail and those that led to it, as types and messages."""
    try:
        function(*args, **options)
    except Exception as caught:
        error, chain = caught, []
        while error is not None:
            chain.append(f"{type(error).__name__}: {error}")
            error = error.__cause__
        return "\n".join(chain)
    raise AssertionError(f"{function.__name__} did not fail")
