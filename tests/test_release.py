"""scripts/release.py: what is handed out is the run's model in fewer bits, scored, drawn, and described by its log."""

import json
import lzma
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_pictures import GREY, make_data, save_pngs
from transformers import AutoModelForCausalLM

from aft.commands.evaluate import main as evaluate
from aft.commands.paint import main as paint
from aft.commands.pretrain import main as pretrain
from aft.commands.push import main as push
from aft.commands.release import main
from aft.releasing import public_argument, xz_bits_per_byte
from aft.run_log import fill_model_card, read_log


MODELS = {
    "conv": {"aft_type": "conv", "num_attention_heads": 4, "position_embedding_type": "none"},
    "simple": {"aft_type": "simple"},
    "pictures": {"aft_type": "local", "window_size": 4},
    "mixture": {"synthesizer_type": "mixture", "mixture_components": ["random", "dense"], "num_attention_heads": 2},
}
RELEASED = ("conv", "mixture", "pictures")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 16, "initializer_range": 0.3}
NOTE = ["--dataset_note", "the same bytes over and over", "--dataset_license", "none", "--language", "en", "de"]
FLAGS = ["--max_steps", "3", "--warmup_steps", "1", "--batch_size", "2", "--save_every", "0"]


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text"
    path.write_bytes(bytes(range(40, 120)) * 30)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    for split, pictures in make_data(GREY).splits.items():
        save_pngs(folder / split, pictures)
    return folder


@pytest.fixture(scope="module")
def runs(data, photos, tmp_path_factory) -> Path:
    """A folder with a finished run of each of the models."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        for name, model in MODELS.items():
            preset = folder / f"{name}.json"
            model_type = "synthesizer" if name == "mixture" else "aft"
            preset.write_text(json.dumps({"model_type": model_type, **SIZES, **model}))
            of_text = ["--dataset_path", str(data), "--sample_bytes", "5"]
            source = ["--pictures", str(photos), "--sample_pictures", "4"] if name == "pictures" else of_text
            where = ["--model_preset", str(preset), *source, "--output_dir", str(folder / name)]
            pretrain([*FLAGS, *where, "--cache_dir", str(folder / "cache")])
            AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture(scope="module")
def released(runs, data, photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model_cards")
    for name in RELEASED:
        beside = ["--beside", str(runs / "simple")] if name == "conv" else []
        source = ["--pictures", str(photos)] if name == "pictures" else ["--dataset_path", str(data)]
        main([str(runs / name), str(folder / f"my-{name}"), *source, *beside, *NOTE])
        AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.mark.parametrize("name", RELEASED)
def test_weights_are_the_rounded_ones_of_the_run(runs, released, name):
    before, after = (load_file(folder / "model.safetensors") for folder in (runs / name, released / f"my-{name}"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor.to(torch.bfloat16)) for key, tensor in before.items())
    model = AutoModelForCausalLM.from_pretrained(released / f"my-{name}")
    assert model.dtype == torch.float32
    assert {path.name for path in released.iterdir()} == {f"my-{each}" for each in RELEASED}
    assert not list(released.glob("*/*.py")) and "auto_map" not in (released / f"my-{name}/config.json").read_text()


@pytest.mark.parametrize("name", RELEASED)
def test_every_score_is_what_its_command_prints(released, name, monkeypatch):
    card = ModelCard.load(released / f"my-{name}" / "README.md")
    events = read_log(released / f"my-{name}" / "run.jsonl")
    scores = [event for event in events if event["event"] == "evaluation" and "command" in event]
    protocols = {
        "conv": ["segments", "sliding", "carried", "refreshed"],
        "mixture": ["segments", "sliding"],
        "pictures": ["pictures"],
    }[name]
    assert [(e["split"], e["protocol"]) for e in scores] == [(s, p) for s in ("test", "valid") for p in protocols]
    for event in scores:
        assert event["command"] in card.content
        program, command, *flags = shlex.split(event["command"])
        assert (program, command) == ("aft", "evaluate")
        assert evaluate(flags)["bits_per_byte"] == pytest.approx(event["bits_per_byte"], rel=1e-6)
        assert f"| {event['split']} | {event['bits_per_byte']:.4f} | {event['protocol']}, T = 16" in card.content
    results = card.data.eval_results
    assert [round(e["bits_per_byte"], 4) for e in scores if e["split"] == "test"] == [r.metric_value for r in results]


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("conv", ["bias-map.png", "bias-curve.svg", "receptive-field.svg"]),
        ("mixture", ["bias-map.png", "bias-curve.svg", "mixture.svg"]),
        ("pictures", ["bias-map.png", "bias-curve.svg"]),
    ],
)
def test_card_shows_the_pictures(released, name, kinds):
    folder = released / f"my-{name}"
    content = (folder / "README.md").read_text()
    assert content == fill_model_card(read_log(folder / "run.jsonl"))
    expected = {"training_curve.png": 1000, **{f"my-{name}-{kind}": 1000 for kind in kinds}}
    if name == "pictures":
        expected |= {"samples.png": 100, "samples-completed.png": 100}
    for file, least in expected.items():
        assert f"]({file})" in content and (folder / file).stat().st_size > least
    assert {path.name for path in folder.iterdir() if path.suffix in (".png", ".svg")} == {*expected}
    if name == "conv":  # both models stand in one picture
        text = (folder / "my-conv-receptive-field.svg").read_text()
        assert "my-conv<" in text and "simple<" in text
        assert re.search(r"Beside it, simple is AFT-simple with \d layers? of \d+ channels\.\n", content)


def test_card_names_the_compressor_and_no_path(released, data):
    content = data.read_bytes()
    start = len(content) * 95 // 100
    sizes = [len(lzma.compress(part, preset=9 | lzma.PRESET_EXTREME)) for part in (content, content[:start])]
    expected = 8 * (sizes[0] - sizes[1]) / (len(content) - start)
    assert xz_bits_per_byte([content[: start // 2], content[start // 2 : start], content[start:]]) == expected
    log, card = ((released / "my-conv" / name).read_text() for name in ("run.jsonl", "README.md"))
    assert f"| test | {expected:.4f} | what the split adds" in card
    assert "# my-conv" in card and "model_path" not in log
    assert "text, the same bytes over and over: 2,160 bytes of train" in card
    assert "| cache_dir |" not in card and "| learning_rate |" in card


def test_card_of_pictures_draws_and_completes(released, photos, monkeypatch, capsys):
    folder = released / "my-pictures"
    content = (folder / "README.md").read_text()
    assert (
        "A picture is 4 x 4 x 1" in content and "photos, the same bytes over and over: 10 pictures of train" in content
    )
    assert "byte" not in content.partition("In the repository")[0].replace("all bytes before it", "")
    python, shell = re.findall(r"```(?:python|bash)\n(.*?)```", content.partition("## Load it")[2], re.DOTALL)[:2]
    monkeypatch.chdir(released)
    exec(python, {})
    for line in shell.splitlines():
        program, command, *flags = shlex.split(line.replace("FOLDER", str(photos)))
        assert (program, command) == ("aft", "paint")
        paint(flags)
    sizes = {"drawn.png": (4, 4), "completed.png": (4, 4), "samples.png": (22, 22), "completions.png": (34, 22)}
    for file, size in sizes.items():
        with Image.open(file) as picture:
            assert picture.size == size
        Path(file).unlink()
    push([str(folder), "me/pictures", "--dry_run"])
    printed = capsys.readouterr().out
    for file in ("samples.png", "samples-completed.png", "preprocessor_config.json", "image_processing_aft.py"):
        assert f" {file}\n" in printed


def test_what_is_pushed_has_the_pictures(released, capsys):
    push([str(released / "my-conv"), "me/conv", "--dry_run"])
    printed = capsys.readouterr().out
    assert "my-conv-bias-map.png" in printed and "my-conv-receptive-field.svg" in printed
    assert "what the split adds to the length of" in printed
    assert " modeling_stack.py\n" in printed


@pytest.mark.parametrize(
    "change, message",
    [
        ({"run": "cache"}, "must be the folder of a finished run, got one whose log ends with None"),
        ({"folder": "conv"}, "folder must be new, or with --overwrite that of an earlier release, got"),
        ({"--dtype": "int8"}, "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"--dataset_path": "conv/model.safetensors"}, "--dataset_path must be the data of the run, of sha256"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_is_refused(runs, data, tmp_path, change, message):
    given = {"run": runs / "conv", "folder": tmp_path / "out", "--dataset_path": data}
    given |= {key: value if key == "--dtype" else runs / value for key, value in change.items()}
    flags = [str(given.pop("run")), str(given.pop("folder"))]
    with pytest.raises(ValueError, match=message):
        main([*flags, *(str(text) for entry in given.items() for text in entry)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "run, words, message",
    [
        ("pictures", ["--dataset_path", "text"], "--pictures must be the pictures of the run, got None"),
        ("pictures", ["--pictures", "photos/test"], "--pictures must be the data of the run, of sha256"),
        (
            "pictures",
            ["--pictures", "photos", "--beside", "simple"],
            "--beside must be left out for a run on pictures",
        ),
        (
            "pictures",
            ["--pictures", "photos", "--num_channels", "3"],
            "--num_channels must be left out, or what the mo",
        ),
        ("conv", ["--pictures", "photos"], "--pictures must be left out: the run was trained on a text, got"),
    ],
    ids=["text", "others", "beside", "channels", "run-of-text"],
)
def test_other_data_than_the_pictures_of_a_run_are_refused(runs, data, photos, tmp_path, run, words, message):
    paths = {"text": data, "photos": photos, "photos/test": photos / "test", "simple": runs / "simple"}
    with pytest.raises(ValueError, match=message):
        main([str(runs / run), str(tmp_path / "out"), *(str(paths.get(word, word)) for word in words)])
    assert list(tmp_path.iterdir()) == []


def test_unfinished_run_is_refused(runs, data, tmp_path):
    for name in ("config.json", "run.jsonl"):
        lines = (runs / "conv" / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(lines[:-1] if name == "run.jsonl" else lines))
    with pytest.raises(ValueError, match="a finished run, got one whose log ends with 'evaluation'"):
        main([str(tmp_path), str(tmp_path / "out"), "--dataset_path", str(data)])


@pytest.mark.parametrize(
    "run, beside, message",
    [
        ("conv", "simple", "--beside must have other names than simple, got simple"),
        ("conv", "mixture", "--beside must be AFT models, for a run of one, got mixture"),
        ("mixture", "conv", "--beside must be AFT models, for a run of one, got conv"),
    ],
)
def test_wrong_company_is_refused(runs, data, tmp_path, run, beside, message):
    target = tmp_path / ("simple" if beside == "simple" else "out")
    with pytest.raises(ValueError, match=message):
        main([str(runs / run), str(target), "--dataset_path", str(data), "--beside", str(runs / beside)])
    assert list(tmp_path.iterdir()) == []


def test_only_an_earlier_release_is_overwritten(runs, released, data, tmp_path):
    with pytest.raises(ValueError, match="--overwrite that of an earlier release"):
        main([str(runs / "conv"), str(runs / "simple"), "--dataset_path", str(data), "--overwrite"])
    assert (runs / "simple" / "model.safetensors").is_file()
    folder = tmp_path / "my-conv"
    shutil.copytree(released / "my-conv", folder)
    (folder / "old").touch()
    main([str(runs / "conv"), str(folder), "--dataset_path", str(data), "--overwrite", "--dtype", "float32"])
    assert not (folder / "old").exists() and [path.name for path in tmp_path.iterdir()] == ["my-conv"]
    before, after = (load_file(path / "model.safetensors") for path in (runs / "conv", folder))
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert "stored in" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "value, message",
    [
        (None, "run: .*: its tensors are not those of AFTForCausalLM; missing: model.norm.bias"),
        (float("nan"), "run: .*; not finite: model.norm.bias"),
        (1e30, "--dtype float16: .*; not finite: model.norm.bias"),
    ],
    ids=["missing", "nan", "too-large-for-the-dtype"],
)
def test_incomplete_weights_are_not_released(runs, data, tmp_path, value, message):
    run = shutil.copytree(runs / "conv", tmp_path / "run")
    tensors = load_file(run / "model.safetensors")
    tensors["model.norm.bias"][0] = value or 0
    if value is None:
        del tensors["model.norm.bias"]
    save_file(tensors, run / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        main([str(run), str(tmp_path / "out"), "--dataset_path", str(data), "--dtype", "float16"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_earlier_release_stays_until_the_new_one_is_there(runs, released, data, tmp_path, monkeypatch):
    folder = shutil.copytree(released / "my-conv", tmp_path / "my-conv")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def no_space(events):
        raise OSError("No space left on device")

    monkeypatch.setattr("aft.releasing.fill_model_card", no_space)
    with pytest.raises(OSError, match="No space"):
        main([str(runs / "conv"), str(folder), "--dataset_path", str(data), "--overwrite"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["my-conv"]


def test_full_disk_is_an_os_error(runs, data, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(OSError, match=f"the weights cannot be written to {tmp_path}: I/O error: No space left"):
        main([str(runs / "conv"), str(tmp_path / "out"), "--dataset_path", str(data)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "run, folder, message",
    [
        ("", "out", "run must be a path, got ''"),
        ("run", "", "folder must be a path, got ''"),
        ("run", "caf\udce9", "folder must have a name in UTF-8"),
    ],
)
def test_names_that_cannot_be_are_refused(run, folder, message):
    with pytest.raises(ValueError, match=f"aft release: .*{message}"):
        main([run, folder])


@pytest.mark.parametrize(
    "word, shown",
    [
        ("/home/someone/secret/text", "text"),
        ("--dataset_path=/home/someone/text", "--dataset_path=text"),
        ("runs/conv", "runs/conv"),
        ("--dataset_note", "--dataset_note"),
        ("caf\udcc3\udca9 \udcff", "caf\u00e9 \ufffd"),
    ],
)
def test_command_on_the_card_tells_nothing_of_the_machine(word, shown):
    assert public_argument(word) == shown
