"""
The Hub: what is pushed by repository id loads back, bit for bit, in other processes, and nothing loads by halves.

The server is the one in hub_server.py. An author with the package and a token pushes; a reader with the package and
one without it load.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
from hub_clients import (
    FAMILIES,
    commit,
    failure,
    load,
    load_config,
    load_tokenizer,
    online,
    process,
    publish,
    republish,
    run_example,
    run_script,
    save,
    tag,
    train,
)
from hub_server import TOKEN, HubServer, Repository
from huggingface_hub import ModelCard

from aft.run_log import read_log


ROOT = Path(__file__).resolve().parent.parent
HEADS = {
    "Model": "feature-extraction",
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
}
FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=str.lower)
CAUSAL = "me/AFT-ForCausalLM"


def auto_class(head: str) -> str:
    return "AutoModel" if head == "Model" else f"AutoModel{head}"


# The server and the processes


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def every_request_is_known(hub):
    yield
    assert hub.unknown == []


@pytest.fixture(scope="module")
def author(hub, tmp_path_factory):
    with process(hub, tmp_path_factory.mktemp("author"), with_package=True, HF_TOKEN=TOKEN) as call:
        yield call


@pytest.fixture(scope="module")
def installed(hub, tmp_path_factory):
    with process(hub, tmp_path_factory.mktemp("installed"), with_package=True) as call:
        yield call


@pytest.fixture(scope="module")
def not_installed(hub, tmp_path_factory):
    with process(hub, tmp_path_factory.mktemp("not_installed"), with_package=False) as call:
        yield call


@pytest.fixture(params=["installed", "not-installed"])
def reader(request):
    """The process of a reader and what it must say to load a model."""
    if request.param == "installed":
        return request.getfixturevalue("installed"), {}
    return request.getfixturevalue("not_installed"), {"trust_remote_code": True}


@pytest.fixture(scope="module")
def published(author) -> dict:
    """What was pushed, by repository: every class of both families."""
    return {
        f"me/{family}-{head}": author(publish, family, head, f"me/{family}-{head}")
        for family in FAMILIES
        for head in HEADS
    }


def assert_same(found: dict, expected: dict) -> None:
    for name in ("class", "config", "generation_config", "weights", "output"):
        assert found[name] == expected[name], name


# Loading


@FAMILY
@pytest.mark.parametrize("head", HEADS)
def test_each_auto_class_loads_what_was_pushed(reader, published, family, head):
    call, trust = reader
    repo = f"me/{family}-{head}"
    found = call(load, auto_class(head), repo, **trust)
    assert_same(found, published[repo])
    assert found["remote"] == bool(trust)


@FAMILY
def test_configuration_and_tokenizer_load(reader, published, family):
    call, trust = reader
    config = call(load_config, f"me/{family}-ForCausalLM", **trust)
    tokenizer = call(load_tokenizer, f"me/{family}-ForCausalLM", **trust)
    assert (config["class"], tokenizer["class"]) == (f"{family}Config", "ByteTokenizer")
    assert {found["module"].startswith("transformers_modules.") for found in (config, tokenizer)} == {bool(trust)}
    assert tokenizer["ids"] == [[110, 195, 169], [256, 256, 97]]
    if not trust:  # the tokenizer was pushed alone, and the package knows the model that it finds there
        assert tokenizer["limit"] == published[f"me/{family}-ForCausalLM"]["config"]["max_position_embeddings"]


@FAMILY
def test_generation_config_and_card_are_pushed(hub, published, family):
    files = hub.repositories[f"me/{family}-ForCausalLM"].files()
    generation = json.loads(files["generation_config.json"])
    assert (generation["do_sample"], generation["top_k"]) == (True, 7)
    assert ModelCard(files["README.md"].decode()).data.library_name == "transformers"


@FAMILY
@pytest.mark.parametrize("loader", ["AutoConfig", "AutoTokenizer", "AutoModel", "AutoModelForCausalLM"])
def test_code_is_refused_without_trust(not_installed, published, tmp_path, family, loader):
    call = {"AutoConfig": (load_config,), "AutoTokenizer": (load_tokenizer,)}.get(loader, (load, loader))
    for options in ({}, {"trust_remote_code": False}):
        error = not_installed(failure, *call, f"me/{family}-ForCausalLM", cache_dir=tmp_path, **options)
        assert "trust_remote_code=True" in error


@FAMILY
def test_a_revision_pins_weights_and_code(author, reader, hub, family):
    call, trust = reader
    repo = f"me/{family}-revisions-{len(trust)}"
    first = author(publish, family, "ForCausalLM", repo, seed=1)
    author(tag, repo, "v1")
    second = author(publish, family, "ForCausalLM", repo, seed=2)
    name = {"aft": "modeling_attention_free.py", "synthesizer": "modeling_synthesizer.py"}[family.lower()]
    author(commit, repo, {name: hub.repositories[repo].files()[name] + b'\nCODE = "second"\n'})
    branch = author(publish, family, "ForCausalLM", repo, seed=3, revision="branch")
    assert first["weights"] != second["weights"] != branch["weights"]
    for revision, expected, code in (
        (None, second, "second"),
        ("v1", first, "first"),
        (first["commit"], first, "first"),
        ("branch", branch, "first"),
    ):
        found = call(load, "AutoModelForCausalLM", repo, revision=revision, **trust)
        assert_same(found, expected)
        assert found["code"] == (code if trust else "first")


@FAMILY
def test_what_was_loaded_without_the_package_is_pushed_with_its_code(hub, not_installed, published, family):
    source, repo = f"me/{family}-ForCausalLM", f"me/{family}-again"
    pushed = not_installed(republish, "AutoModelForCausalLM", source, repo, TOKEN)
    assert pushed["remote"]
    code, again = (
        {name: content for name, content in hub.repositories[name].files().items() if name.endswith(".py")}
        for name in (source, repo)
    )
    assert code == again
    found = not_installed(load, "AutoModelForCausalLM", repo, trust_remote_code=True)
    assert_same(found, published[source])


# What breaks off, is missing, or is cut


@pytest.fixture
def copy(hub, published):
    """A function that makes a repository: one that was pushed, with other files, or without those that are None."""

    def make_copy(changes: dict[str, bytes | None]) -> str:
        files = {**hub.repositories[CAUSAL].files(), **changes}
        name = f"me/copy-{len(hub.repositories)}"
        hub.repositories[name] = Repository()
        hub.repositories[name].add("main", {key: value for key, value in files.items() if value is not None}, "copy")
        return name

    return make_copy


@pytest.mark.parametrize(
    "requests, kind, message",
    [
        pytest.param("PUT ", "drop", "uploading 'model.safetensors'", id="connection-lost-in-the-weights"),
        pytest.param("PUT ", 500, "uploading 'model.safetensors'", id="weights-not-stored"),
        pytest.param("POST .*/commit/", "drop", "disconnected", id="connection-lost-in-the-commit"),
        pytest.param("POST .*/commit/", 500, "500", id="commit-not-made"),
    ],
)
def test_an_upload_that_breaks_off_leaves_the_last_version(
    hub, author, not_installed, published, copy, tmp_path, requests, kind, message
):
    repo = copy({})
    before = dict(hub.repositories[repo].refs)
    options = {"trust_remote_code": True, "cache_dir": tmp_path}
    with hub.fault(requests, kind):
        assert message in author(failure, publish, "AFT", "ForCausalLM", repo, seed=1)
    assert hub.repositories[repo].refs == before
    assert_same(not_installed(load, "AutoModelForCausalLM", repo, **options), published[CAUSAL])
    second = author(publish, "AFT", "ForCausalLM", repo, seed=1)
    assert_same(not_installed(load, "AutoModelForCausalLM", repo, **options), second)


def test_an_upload_that_is_interrupted_once_goes_on(hub, author, copy):
    repo = copy({})
    with hub.fault("PUT ", "drop", times=1):
        author(publish, "AFT", "ForCausalLM", repo, seed=1)
    assert "Upload AFTForCausalLM" in hub.repositories[repo].messages


def test_a_download_that_is_interrupted_once_goes_on(hub, reader, published, copy, tmp_path):
    call, trust = reader
    repo = copy({})
    with hub.fault("GET .*/model.safetensors", "cut", times=1):
        found = call(load, "AutoModelForCausalLM", repo, cache_dir=tmp_path, **trust)
    assert_same(found, published[CAUSAL])
    assert sum(request.endswith("/model.safetensors") for request in hub.requests if f"GET /{repo}/" in request) == 2


@pytest.mark.parametrize("kind, message", [("drop", "disconnected"), ("cut", "closed connection"), (500, "500")])
def test_a_download_that_breaks_off_fails_and_can_be_repeated(hub, reader, published, copy, tmp_path, kind, message):
    call, trust = reader
    repo = copy({})
    with hub.fault("GET .*/model.safetensors", kind):
        assert message in call(failure, load, "AutoModelForCausalLM", repo, cache_dir=tmp_path, **trust)
    assert_same(call(load, "AutoModelForCausalLM", repo, cache_dir=tmp_path, **trust), published[CAUSAL])


@pytest.mark.parametrize(
    "name, function",
    [
        ("config.json", load_config),
        ("model.safetensors", load),
        ("modeling_attention_free.py", load),
        ("ops_state.py", load),
        ("tokenization_bytes.py", load_tokenizer),
    ],
    ids=["config", "weights", "code", "imported-code", "code-of-the-tokenizer"],
)
def test_a_missing_file_is_named(not_installed, copy, tmp_path, name, function):
    arguments = ("AutoModelForCausalLM",) if function is load else ()
    error = not_installed(
        failure, function, *arguments, copy({name: None}), cache_dir=tmp_path, trust_remote_code=True
    )
    assert name in error


@pytest.mark.parametrize("kept", [4, 500, -1], ids=["in-the-length", "in-the-header", "in-the-tensors"])
def test_truncated_weights_are_refused(hub, reader, copy, tmp_path, kept):
    call, trust = reader
    repo = copy({"model.safetensors": hub.repositories[CAUSAL].files()["model.safetensors"][:kept]})
    error = call(failure, load, "AutoModelForCausalLM", repo, cache_dir=tmp_path, **trust)
    assert error.startswith("SafetensorError: Error while deserializing header")


# scripts/push_to_hub.py


@pytest.fixture(scope="module")
def run(author, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "made"
    author(train, folder)
    return folder / "run"


@pytest.fixture(scope="module")
def pushed_run(hub, run, tmp_path_factory) -> Repository:
    """A run that the script has pushed, in a process of its own, as me/run."""
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "push_to_hub.py", run, "me/run", "--datasets", "me/windows"],
        env=online(hub, tmp_path_factory.mktemp("script"), HF_TOKEN=TOKEN),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1].startswith(f"pushed: {hub.url}/me/run/commit/")
    return hub.repositories["me/run"]


@pytest.fixture(scope="module")
def saved(author, tmp_path_factory) -> Path:
    """A folder that `save_pretrained` of a model and a tokenizer wrote."""
    folder = tmp_path_factory.mktemp("saved")
    author(save, "AFT", "ForCausalLM", folder)
    return folder


def test_script_pushes_what_belongs_to_the_model_in_one_commit(run, pushed_run):
    files = pushed_run.files()
    left = {"checkpoints", "README.md"}
    assert {path.name for path in run.iterdir()} - left == files.keys() - {".gitattributes", "README.md"}
    assert all(files[name] == (run / name).read_bytes() for name in files.keys() - {".gitattributes", "README.md"})
    assert pushed_run.messages == ["initial commit", "Upload AFTForCausalLM"]


def test_pushed_run_loads(author, reader, run, pushed_run):
    call, trust = reader
    assert_same(call(load, "AutoModelForCausalLM", "me/run", **trust), author(load, "AutoModelForCausalLM", run))


def test_pushed_card_has_the_results_of_the_log(not_installed, run, pushed_run):
    card = ModelCard(pushed_run.files()["README.md"].decode())
    data, (result,) = card.data, card.data.eval_results
    test = [event for event in read_log(run / "run.jsonl") if event["event"] == "evaluation"][-1]
    assert result.metric_value == round(test["bits_per_byte"], 4)
    assert (result.metric_type, result.dataset_name, result.dataset_split) == ("bits_per_byte", "text", "test")
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert (data.model_name, data.tags[0], data.datasets) == ("me/run", "aft", ["me/windows"])
    assert "import modeling_aft" in card.text
    not_installed(run_example, card.text)  # which loads it by its name


def card_of(output: str) -> ModelCard:
    """The card in what a dry run prints."""
    return ModelCard(output[output.index("---\n") :])


def test_dry_run_sends_nothing(hub, author, saved):
    requests = len(hub.requests)
    output = author(run_script, saved, "me/nothing", "--dry_run")
    assert len(hub.requests) == requests
    printed = {line.split()[-1] for line in output[: output.index("---\n")].splitlines() if line}
    assert printed == {path.name for path in saved.iterdir()} | {"README.md"}


@FAMILY
@pytest.mark.parametrize("head, task", HEADS.items(), ids=HEADS)
def test_card_of_each_head_says_how_to_load_it(author, tmp_path, family, head, task):
    author(save, family, head, tmp_path / "model")
    card = card_of(author(run_script, tmp_path / "model", "me/x", "--dry_run", "--license", "mit"))
    assert f"{auto_class(head)}.from_pretrained(name, trust_remote_code=True)" in card.text
    assert (card.data.pipeline_tag, card.data.license, card.data.tags) == (task, "mit", [family.lower()])


def test_card_has_the_results_of_trainer(author, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "eval_results.json").write_text(json.dumps({"eval_accuracy": 0.75, "eval_runtime": 2.0, "epoch": 3.0}))
    card = card_of(author(run_script, folder, "me/x", "--dry_run"))
    assert "| accuracy | 0.75 |" in card.text and "runtime" not in card.text


@pytest.mark.parametrize("with_log", [False, True], ids=["without-log", "with-log"])
def test_a_card_written_by_hand_is_kept(author, run, saved, tmp_path, with_log):
    folder = shutil.copytree(run if with_log else saved, tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    card = card_of(author(run_script, folder, "me/x", "--dry_run", *["--keep_card"] * with_log))
    assert card.text.startswith("Mine.\n")
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")
    assert bool(card.data.eval_results) == with_log


def without(*keys: str):
    """A change of a JSON file."""
    return lambda content: json.dumps({k: v for k, v in json.loads(content).items() if k not in keys}).encode()


def without_a_tensor(content: bytes) -> bytes:
    tensors = safetensors.torch.load(content)
    tensors.pop("model.norm.bias")
    return safetensors.torch.save(tensors, {"format": "pt"})


@pytest.mark.parametrize(
    "name, change, message",
    [
        pytest.param("config.json", None, "no config.json", id="no-config"),
        pytest.param("config.json", without("auto_map"), "no auto_map", id="no-auto-map"),
        pytest.param("config.json", without("architectures"), "no architectures", id="no-class"),
        pytest.param("model.safetensors", None, "no model.safetensors", id="no-weights"),
        pytest.param("model.safetensors.index.json", b'{"weight_map": {}}', "weights twice", id="weights-twice"),
        pytest.param("model.safetensors", lambda content: content[:-1], "SafetensorError", id="truncated-weights"),
        pytest.param("model.safetensors", without_a_tensor, "missing keys: model.norm.bias", id="no-tensor"),
        pytest.param("tokenizer_config.json", None, "no tokenizer_config.json", id="no-tokenizer"),
        pytest.param("modeling_attention_free.py", None, "no modeling_attention_free.py", id="no-code"),
        pytest.param("modeling_attention_free.py", lambda content: b"(" + content, "SyntaxError", id="broken-code"),
        pytest.param("ops_state.py", None, "FileNotFoundError", id="no-imported-code"),
    ],
)
def test_script_refuses_a_folder_that_would_not_load(hub, author, saved, tmp_path, name, change, message):
    folder = shutil.copytree(saved, tmp_path / "model")
    if change is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(change if isinstance(change, bytes) else change((folder / name).read_bytes()))
    error = author(failure, run_script, folder, "me/refused")
    assert error.startswith(f"ValueError: {folder}") and message in error.splitlines()[0]
    assert "me/refused" not in hub.repositories


@pytest.mark.parametrize(
    "flags, message",
    [
        (("a/b/c",), "repo_id.*a/b/c"),
        (("me/x", "--create_pr", "--revision", "next"), "--revision .*next"),
        (("me/x", "--commit_message", " "), "--commit_message .*' '"),
    ],
    ids=["repo-id", "revision-of-a-pull-request", "empty-message"],
)
def test_script_refuses_wrong_flags(author, saved, flags, message):
    assert re.match(f"ValueError: aft push: {message}", author(failure, run_script, saved, *flags))


def test_script_needs_a_token(hub, installed, saved):
    assert "401" in installed(failure, run_script, saved, "me/refused")
    assert "me/refused" not in hub.repositories


def test_script_that_breaks_off_leaves_the_last_version(hub, author, saved, copy):
    repo = copy({"config.json": b"{}"})
    before = dict(hub.repositories[repo].refs)
    with hub.fault("POST .*/commit/", 500):
        assert "500" in author(failure, run_script, saved, repo)
    assert hub.repositories[repo].refs == before


def test_script_replaces_weights_in_one_file_by_weights_in_several_and_back(hub, author, reader, tmp_path):
    call, trust = reader
    repo = f"me/shards-{len(trust)}"
    for seed, size in enumerate(("1GB", "20KB", "1GB")):
        expected = author(save, "AFT", "ForCausalLM", tmp_path / f"{seed}", seed=seed, max_shard_size=size)
        author(run_script, tmp_path / f"{seed}", repo)
        files = {name for name in hub.repositories[repo].files() if name.endswith(("safetensors", "index.json"))}
        assert ("model.safetensors" in files) == (size == "1GB") == (len(files) == 1)
        assert_same(call(load, "AutoModelForCausalLM", repo, **trust), expected)


def test_script_pushes_to_a_branch_or_a_pull_request(hub, author, not_installed, published, saved, copy):
    repo = copy({"model.safetensors": None})
    before = hub.repositories[repo].refs["main"]
    author(run_script, saved, repo, "--revision", "next", "--commit_message", "mine")
    assert "/discussions/1" in author(run_script, saved, repo, "--create_pr")
    assert hub.repositories[repo].messages == ["copy", "mine", "Upload AFTForCausalLM"]
    assert hub.repositories[repo].refs["main"] == before
    for revision in ("next", "refs/pr/1"):
        found = not_installed(load, "AutoModelForCausalLM", repo, revision=revision, trust_remote_code=True)
        assert found["weights"] == published[CAUSAL]["weights"]


def test_script_makes_a_private_repository(hub, author, saved):
    author(run_script, saved, "me/secret", "--private")
    assert hub.repositories["me/secret"].private
