"""Every file in configuration/ loads through the code that will read it, and is named in configuration/README.md."""

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
)

from aft.classifying_flags import add_recipe, picture_problems, read_flags
from aft.model_configs import build_config
from aft.pretraining_arguments import check_arguments, parse_arguments
from aft.settings_files import read_yaml
from modeling_aft import (
    AFTConfig,
    AFTForCausalLM,
    AFTForImageClassification,
    SynthesizerConfig,
    SynthesizerForCausalLM,
)


CLASSES = {"aft": (AFTConfig, AFTForCausalLM), "synthesizer": (SynthesizerConfig, SynthesizerForCausalLM)}
CONFIGURATION = Path(__file__).resolve().parent.parent / "configuration"
MODELS = sorted(CONFIGURATION.glob("models/*.json"))
IMAGES = sorted(CONFIGURATION.glob("images/*.json"))
SEQ2SEQ = sorted(CONFIGURATION.glob("seq2seq/*.json"))
RECIPES = sorted(CONFIGURATION.glob("recipes/*.yaml"))
TRAINING = sorted(CONFIGURATION.glob("training/*.yaml"))
ACCELERATE = sorted(CONFIGURATION.glob("accelerate/*.yaml"))
COMPARE = sorted(CONFIGURATION.glob("compare/*.yaml"))  # test_compare.py loads them
SMALL_ENOUGH_TO_RUN = [path for path in MODELS if path.stem.endswith(("-tiny", "-small"))]


def stem(path: Path) -> str:
    return path.stem


def table_rows() -> dict[str, list[str]]:
    """The cells of each table row in configuration/README.md that starts with the name of a file or an override."""
    text = (CONFIGURATION / "README.md").read_text(encoding="utf-8")
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|")
    return {match[1]: cells for cells in rows if (match := re.fullmatch(r"`(\S+[.=]\S+)`", cells[0]))}


OVERRIDES = {name: cells for name, cells in table_rows().items() if "=" in name}


def test_readme_names_every_file():
    presets = {*MODELS, *IMAGES, *SEQ2SEQ, *RECIPES, *TRAINING, *ACCELERATE, *COMPARE}
    assert set(table_rows()) - set(OVERRIDES) == {str(path.relative_to(CONFIGURATION)) for path in presets}
    others = {path for path in CONFIGURATION.rglob("*") if path.is_file()} - presets
    assert others == {CONFIGURATION / "README.md"}


def check_fields(config: PreTrainedConfig, written: dict, *inherited: str):
    """What a file says is in fields of the configuration that it becomes, and those of its parts."""
    assert set(written) <= {"model_type", *inherited, *(field.name for field in fields(type(config)))}
    for name, value in written.items():
        if isinstance(value, dict):
            check_fields(getattr(config, name), value)
        else:
            assert getattr(config, name) == value, name


def read_preset(path: Path, auto_class: type, *inherited: str):
    """The model of a preset, without memory, after a look at its fields and at its row in the README."""
    config = AutoConfig.from_pretrained(path)
    check_fields(config, json.loads(path.read_text(encoding="utf-8")), *inherited)
    with torch.device("meta"):
        model = auto_class.from_config(config)
    assert table_rows()[str(path.relative_to(CONFIGURATION))][1] == f"{model.num_parameters():,}"
    return model


@pytest.mark.parametrize("path", MODELS, ids=stem)
def test_model_preset(path):
    model = read_preset(path, AutoModelForCausalLM)
    config = model.config
    assert (type(config), type(model)) == CLASSES[config.model_type]
    if path.stem.endswith("-small"):  # the models that are compared with each other; matrices per head are larger
        assert 1.9e6 < model.num_parameters() < (4.7e6 if "random" in config.to_json_string() else 2.9e6)


@pytest.mark.parametrize(
    ("name", "depth", "width", "length", "rank"),
    [
        ("aft-local-256-24x256-cifar10", 24, 256, 3072, 64),
        ("aft-local-256-12x512-cifar10", 12, 512, 3072, 64),
        ("aft-simple-24x256-cifar10", 24, 256, 3072, 0),
        ("aft-local-112-4x128-pixels-28", 4, 128, 784, 32),
    ],
)
def test_preset_of_pictures_has_the_parameters_of_the_formula(name, depth, width, length, rank):
    """257 rows of the vocabulary and those of positions, query, key, value and output, 8 D^2 of the feed-forward layer
    and its biases, two norms, and u and v of each position."""
    mixer = 4 * width**2 + width + 2 * length * rank
    block = mixer + 8 * width**2 + 5 * width + 4 * width
    expected = (257 + length) * width + depth * block + 2 * width
    assert table_rows()[f"models/{name}.json"][1] == f"{expected:,}"


@pytest.mark.parametrize("path", IMAGES, ids=stem)
def test_image_model_preset(path):
    model = read_preset(path, AutoModelForImageClassification, "num_labels")
    assert isinstance(model, AFTForImageClassification) == path.stem.startswith("aft-")


@pytest.mark.parametrize("path", SEQ2SEQ, ids=stem)
def test_preset_of_encoder_decoders(path):
    model = read_preset(path, AutoModelForSeq2SeqLM)
    family, *_, size = path.stem.split("-")
    assert model.config.model_type == ("aft_seq2seq" if family == "aft" else "synthesizer_seq2seq")
    encoder, decoder = (stack.to_dict() for stack in (model.config.encoder, model.config.decoder))
    assert {name for name in encoder if encoder[name] != decoder[name]} == {"is_decoder"}
    if size == "small":  # those that are compared with each other
        assert 2.1e6 < model.num_parameters() < 3e6
    parts = model.config.decoder.components if family != "aft" else [model.config.decoder.aft_type]
    name = path.stem.removesuffix(f"-{size}")
    assert name == ("transformer" if parts == ["dot_product"] else "-".join([family, *parts]).replace("_", "-"))


# Parameters of a mixer of the WMT models beside the values and the output, and the count of the paper, in millions.
WIDTH, HEADS, LENGTH = 512, 8, 256
DENSE = HEADS * (WIDTH // HEADS + 1) * LENGTH
RANDOM = HEADS * LENGTH**2
WMT = {
    "transformer": (2 * WIDTH**2, 67),
    "synthesizer-random": (RANDOM, 67),
    "synthesizer-fixed-random": (0, 61),
    "synthesizer-dense": (WIDTH**2 + DENSE, 62),
    "synthesizer-factorized-random": (HEADS * 2 * 8 * LENGTH, 61),
    "synthesizer-factorized-dense": (WIDTH**2 + DENSE * (16 + 16) // LENGTH, 61),
    "synthesizer-random-dense": (WIDTH**2 + RANDOM + DENSE + 2 * HEADS, 67),
    "synthesizer-random-dot-product": (2 * WIDTH**2 + RANDOM + 2 * HEADS, 73),
    "synthesizer-dense-dot-product": (2 * WIDTH**2 + DENSE + 2 * HEADS, 74),
}
AS_THE_PAPER = [*WMT][:3] + ["synthesizer-factorized-random", "synthesizer-random-dot-product"]


@pytest.mark.parametrize("name", WMT)
def test_presets_of_wmt_have_the_parameters_of_the_formula(name):
    """Tables of 44,000 tokens and of the positions of both stacks, whose norms end them; of a layer the values and the
    output of the mixer, 8 D^2 of the feed-forward layer and its biases, norms, and in a decoder another attention."""
    mixer, paper = WMT[name]
    layer = mixer + 2 * WIDTH**2 + WIDTH + 8 * WIDTH**2 + 5 * WIDTH + 2 * 2 * WIDTH
    between = 4 * WIDTH**2 + WIDTH + 2 * WIDTH
    expected = (44_000 + 2 * LENGTH) * WIDTH + 2 * 2 * WIDTH + 6 * (2 * layer + between)
    row = table_rows()[f"seq2seq/{name}-wmt.json"]
    assert row[1] == f"{expected:,}" and row[2].startswith(f"paper ({paper}): ")
    assert (round(expected / 1e6) == paper) == (name in AS_THE_PAPER)
    claims = (CONFIGURATION.parent / "benchmarks" / "claims.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| .* \| {paper}†? \| {expected / 1e6:.1f} \|$", claims, re.MULTILINE)


@pytest.mark.parametrize("path", RECIPES, ids=stem)
def test_recipe(path):
    argv = add_recipe(["--data", "owner/name", "--recipe", path.stem])
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert argv[: len(written)] == [f"--{name}={text}" for name, text in read_yaml(path, "recipe", plain=True).items()]
    flags = read_flags(argv)
    assert picture_problems(flags) == []
    assert all(getattr(flags, name) == value for name, value in written.items() if hasattr(flags, name))


@pytest.mark.parametrize("override", OVERRIDES)
def test_override_of_the_paper(override):
    preset = CONFIGURATION / "models" / "aft-local-32-24x256.json"
    config = build_config(parse_arguments(["--model_preset", str(preset), "--model_override", override]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    _, parameters, row = OVERRIDES[override]
    assert parameters == f"{model.num_parameters():,}"
    assert row.split(":")[0] == f"s = {'T' if config.window_size == 1024 else config.window_size}"


def test_overrides_are_the_windows_of_the_paper():
    assert list(OVERRIDES) == [f"window_size={size}" for size in (0, 1, 2, 4, 8, 64, 128, 256, 512, 1024)]


@pytest.mark.parametrize("path", SMALL_ENOUGH_TO_RUN, ids=stem)
def test_model_preset_runs(path):
    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_config(config)
    input_ids = torch.randint(config.vocab_size, (1, config.max_position_embeddings))
    loss = model(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    # Small initial weights: the first guess is close to uniform over the vocabulary.
    assert loss.item() == pytest.approx(torch.tensor(config.vocab_size).log().item(), abs=0.5)


@pytest.mark.parametrize("path", [path for path in SEQ2SEQ if path.stem.endswith("-small")], ids=stem)
def test_small_preset_of_encoder_decoders_runs(path):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(path))
    ids = torch.randint(2, model.config.vocab_size, (1, 128))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    # Logits of a normed state and of rows of this deviation are normal, which adds half of their variance.
    variance = model.config.hidden_size * model.config.decoder.initializer_range**2
    assert loss.item() == pytest.approx(math.log(model.config.vocab_size) + variance / 2, abs=0.2)


@pytest.mark.parametrize("path", TRAINING, ids=stem)
def test_training_preset(path, monkeypatch):
    monkeypatch.setattr("aft.memory_needs.device_memory", lambda: 10**12)  # that of several GPUs, for enwik8
    monkeypatch.setattr("aft.memory_needs.bound", lambda *sizes: None)  # what a step takes, which takes long to find
    args = parse_arguments(["--training_preset", str(path)])
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name in set(written) - {"model_preset"}:
        assert getattr(args, name) == written[name]
    assert isinstance(check_arguments(args, num_processes=1), AFTConfig)


@pytest.mark.parametrize("path", ACCELERATE, ids=stem)
def test_accelerate_file(path):
    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    # The launcher's own merge of file and flags; a key of fsdp_config that is no flag would be ignored silently.
    parser = launch_command_parser()
    args, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(path), "script.py"]))
    known = {action.dest for action in parser._actions}
    assert set(config.fsdp_config) <= known
    assert args.num_processes == config.num_processes
    assert args.mixed_precision == (config.mixed_precision or "no")
    assert args.multi_gpu == (config.distributed_type == DistributedType.MULTI_GPU)
    assert args.use_fsdp == (config.distributed_type == DistributedType.FSDP)


@pytest.mark.parametrize("preset", ["aft-local-tiny", "synthesizer-dense-tiny"])
def test_fsdp_wraps_the_blocks_of_the_model(preset):
    config = load_config_from_file(str(CONFIGURATION / "accelerate" / "fsdp.yaml")).fsdp_config
    assert config["fsdp_version"] == 2
    # Without this key, accelerate wraps what the model itself names.
    assert "fsdp_transformer_layer_cls_to_wrap" not in config
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CONFIGURATION / "models" / f"{preset}.json"))
    wrapped = [module for module in model.modules() if type(module).__name__ in set(model._no_split_modules)]
    assert wrapped == list(model.model.layers)
