"""scripts/push_to_hub.py: nothing outside of the folder is read or sent, and no foreign code runs unasked."""

import json
import shutil
from pathlib import Path

import pytest

from aft.commands.push import main
from aft.model_code import remove_code
from aft.pushing import find_pictures
from modeling_aft import AFTConfig, AFTForCausalLM, ByteTokenizer


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 32, "position_bias_rank": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    AFTForCausalLM(AFTConfig(**SIZES)).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    (tmp_path / "secret.json").write_text('{"key": 1}')
    (tmp_path / "secret.png").write_bytes(b"secret")
    return shutil.copytree(saved, tmp_path / "model")


def push(folder: Path, *flags: str) -> None:
    main([str(folder), "me/model", "--dry_run", *flags])


def pictures(*names) -> list[dict]:
    return [{"event": "release", "pictures": [{"file": name, "caption": "a"} for name in names]}]


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.png", "/etc/passwd", "/etc/picture.png", "sub/a.png", "..", "", ".", "id_rsa", "config.json"),
        *("a.png/..", "a.png.txt", ".png/../../secret.png", None, 1, ["a.png"]),
    ],
)
def test_only_pictures_in_the_folder_are_named(folder, name):
    (folder / "a.png").write_bytes(b"a")
    (folder / "id_rsa").write_bytes(b"a")
    with pytest.raises(
        ValueError, match="run.jsonl: pictures must have names of pictures in the folder, .png or .svg"
    ):
        find_pictures(folder, pictures("a.png", name))


def test_pictures_that_are_there_are_found(folder):
    for name in ("a.png", "b.svg"):
        (folder / name).write_bytes(b"a")
    assert find_pictures(folder, pictures("a.png", "b.svg", "a.png", "gone.png")) == [
        folder / "a.png",
        folder / "b.svg",
    ]


@pytest.mark.parametrize("target", ["../secret.png", "{parent}/secret.png"], ids=["relative", "absolute"])
def test_a_picture_is_no_link_out_of_the_folder(folder, target):
    (folder / "a.png").symlink_to(target.format(parent=folder.parent))
    with pytest.raises(ValueError, match="must hold its files itself, and not lead out of itself: a.png -> "):
        find_pictures(folder, pictures("a.png"))


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer_more.json", "model-extra.safetensors", "extra.py", "chat.jinja", "run.jsonl", "README.md"),
        *("eval_results.json", "training_curve.png", "special_tokens_map.json"),
    ],
)
def test_no_part_is_a_link_out_of_the_folder(folder, capsys, name):
    (folder / name).symlink_to(folder.parent / "secret.json")
    with pytest.raises(ValueError, match=f"not lead out of itself: {name} -> .*secret.json$"):
        push(folder)
    assert capsys.readouterr().out == ""


def test_a_link_inside_of_the_folder_and_to_it_is_fine(folder, capsys):
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (folder.parent / "link").symlink_to(folder)
    push(folder.parent / "link")
    assert "model.safetensors" in capsys.readouterr().out


def edit(path: Path, change) -> None:
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.mark.parametrize("name", ["modeling_attention_free.py", "tokenization_bytes.py", "ops.py", "added.py"])
def test_foreign_code_runs_only_when_asked_for(folder, name, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\n"
    path = folder / name
    path.write_text((path.read_text(encoding="utf-8") if path.exists() else "") + code, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} is not the code of this repository; --trust_remote_code runs it"):
        push(folder)
    assert not ran.exists()
    push(folder, "--trust_remote_code")
    assert ran.exists() or name == "added.py"


@pytest.mark.parametrize(
    "name, key", [("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")]
)
def test_code_of_another_repository_is_refused(folder, name, key):
    def elsewhere(text):
        content = json.loads(text)
        value = content["auto_map"][key]
        other = "evil/repo--module.Class"
        content["auto_map"][key] = [other, None] if isinstance(value, list) else other
        return json.dumps(content)

    edit(folder / name, elsewhere)
    with pytest.raises(ValueError, match="no evil/repo--module.py"):
        push(folder, "--trust_remote_code")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", "{", "config.json: Expecting property name"),
        ("config.json", "[]", "config.json: must be a mapping"),
        ("config.json", '{"auto_map": ["a"]}', "auto_map must map classes to names"),
        ("config.json", '{"auto_map": {"AutoModel": 1}}', "auto_map must map classes to names"),
        ("tokenizer_config.json", "\xff", "tokenizer_config.json: .*can't decode"),
        ("eval_results.json", "1", "eval_results.json: must be a mapping"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../secret.json"}}', "no ../secret.json"),
    ],
)
def test_broken_files_are_named(folder, name, content, message):
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        push(folder)


def test_no_folder_is_no_folder(monkeypatch, folder):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="aft push: folder must be a path, got ''"):
        main(["", "me/model", "--dry_run"])


def test_no_connection_is_one_error(folder, monkeypatch):
    class Unreachable(Exception):
        """As of an HTTP library."""

    def create_repo(*args, **options):
        raise Unreachable("connection\nrefused")

    monkeypatch.setattr("aft.pushing.HfApi.create_repo", create_repo)
    with pytest.raises(OSError, match="^me/model was not pushed: Unreachable: connection refused$"):
        main([str(folder), "me/model"])


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "SynthesizerModel"])
def test_no_code_is_added_to_other_models(folder, name):
    remove_code(folder)
    push(folder)
    edit(folder / "config.json", lambda text: text.replace("AFTForCausalLM", name))
    with pytest.raises(ValueError, match=f"^{folder}: has no code, and none can be added: "):
        push(folder)
