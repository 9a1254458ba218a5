"""Models that are not of the package: of transformers, and variants of a reader's own, from training to the Hub."""

import json
import sys
from pathlib import Path

import pytest
import torch
from launching import run
from small_runs import flags, make_inputs
from transformers import AutoConfig, AutoModelForCausalLM

from aft.__main__ import main
from aft.flags import import_files
from aft.run_log import read_log


ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "your-own-variant.md"
SIZES = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OTHERS = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 256, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    | {"bos_token_id": None, "eos_token_id": None},
    "llama": {"model_type": "llama", **SIZES, "intermediate_size": 32, "max_position_embeddings": 32}
    | {"bos_token_id": None, "eos_token_id": None},
    "mamba": {"model_type": "mamba", "vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
}

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_transformers_goes_all_the_way(tmp_path, capsys, name):
    make_inputs(tmp_path)
    (tmp_path / "other.json").write_text(json.dumps(OTHERS[name]))
    run, data = tmp_path / "run", str(tmp_path / "text.bin")
    given = {"model_preset": None, "sequence_length": 16, "max_steps": 2, "warmup_steps": 0}
    main(["pretrain", *flags(tmp_path, run, **given), "--model", str(tmp_path / "other.json")])
    assert read_log(run / "run.jsonl")[0]["model"].startswith(f"{name}, ")
    assert f"`{name}` with" in (run / "README.md").read_text(encoding="utf-8")
    score = main(["evaluate", str(run), "--dataset_path", data, "--length", "16"])
    assert score["bits_per_byte"] == pytest.approx(read_log(run / "run.jsonl")[-1]["test_bits_per_byte"], rel=1e-5)
    main(["generate", "--model", str(run), "--prompt", "a", "--max_new_tokens", "3"])
    main(["push", str(run), "me/other", "--dry_run"])
    release = tmp_path / "release"
    main(["release", str(run), str(release), "--dataset_path", data])
    assert not list(release.glob("*.svg")) and f"`{name}` with" in (release / "README.md").read_text(encoding="utf-8")
    capsys.readouterr()
    main(["push", str(release), "me/other", "--dry_run"])
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed and "Nothing was pushed" in printed


@pytest.fixture
def variant(tmp_path, monkeypatch):
    """The file and the config of the page, and nothing of them in this process when the test ends."""
    text = PAGE.read_text(encoding="utf-8")
    code, config = (text.partition(f"```{language}\n")[2].partition("```")[0] for language in ("python", "json"))
    (tmp_path / "my_variant.py").write_text(code)
    (tmp_path / "my-variant.json").write_text(config)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    yield tmp_path / "my_variant.py", tmp_path / "my-variant.json"
    sys.modules.pop("my_variant", None)
    from transformers.models.auto import configuration_auto, modeling_auto

    found = configuration_auto.CONFIG_MAPPING._extra_content.pop("aft-falling", None)
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(found, None)


def test_the_variant_of_the_page_trains_and_loads(tmp_path, variant):
    make_inputs(tmp_path)
    code, config = map(str, variant)
    given = {"model_preset": config, "sequence_length": 16, "max_steps": 3, "warmup_steps": 0}
    more = ["--import", code, "--model_override", "hidden_size=16", "num_hidden_layers=1", "window_size=4"]
    run = tmp_path / "run"
    main(["pretrain", *flags(tmp_path, run, **given), *more])
    model = AutoModelForCausalLM.from_pretrained(run)
    assert model.config.model_type == "aft-falling"
    bias = model.model.layers[0].mixer.position_bias
    assert type(bias).__name__ == "FallingBias" and bias.weight.abs().sum() > 0  # it has been trained
    score = main(
        ["evaluate", str(run), "--import", code, "--dataset_path", str(tmp_path / "text.bin"), "--length", "16"]
    )
    assert score["bits_per_byte"] == pytest.approx(read_log(run / "run.jsonl")[-1]["test_bits_per_byte"], rel=1e-5)
    ids = torch.randint(0, 256, (2, 11))
    model.eval()
    steps = model.generate(ids, max_new_tokens=4, do_sample=False)
    for length in range(11, 15):  # the state says the same as the whole text
        torch.testing.assert_close(steps[:, length], model(steps[:, :length]).logits[:, -1].argmax(-1))
    assert "my_variant" not in (run / "README.md").read_text(encoding="utf-8").partition("```bash")[0]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file; did you mean .*other.py"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def", "SyntaxError: "),
    ],
    ids=["missing", "error", "syntax"],
)
@pytest.mark.parametrize("command", ["pretrain", "evaluate", "generate", "stream", "finetune", "release"])
def test_a_file_that_cannot_be_imported_is_named(tmp_path, command, content, message):
    (tmp_path / "other.py").write_text("")
    path, model = tmp_path / "othr.py", tmp_path / "model"
    if content is not None:
        path.write_text(content)
    make_inputs(tmp_path)
    model.mkdir()
    (model / "config.json").write_text("{}")
    more = {
        "pretrain": flags(tmp_path, tmp_path / "run"),
        "evaluate": [str(model)],
        "generate": ["--model", str(model), "--prompt", "a"],
        "stream": [str(model)],
        "finetune": ["--model", str(model), "--text_file", str(tmp_path / "text.bin"), "--output_dir", str(tmp_path)],
        "release": [str(model), str(tmp_path / "release")],
    }
    with pytest.raises(ValueError, match=f"--import .*othr.py: {message}"):
        main([command, *more[command], "--import", str(path)])
    assert "othr" not in sys.modules


def test_a_file_is_imported_once_and_not_in_place_of_a_module(tmp_path):
    path = tmp_path / "imported_once.py"
    path.write_text("import sys\nsys.imports = getattr(sys, 'imports', 0) + 1")
    import_files([str(path), str(path)])
    import_files([str(path)])
    assert sys.imports == 1
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ValueError, match="must have another name than the module json"):
        import_files([str(tmp_path / "json.py")])
    del sys.imports, sys.modules["imported_once"]


@pytest.mark.parametrize("model_type", ["aft", "synthesizer"])
def test_a_folder_with_a_config_alone_can_be_initialised_from(tmp_path, model_type):
    """Where the package is not installed: the configuration brings the code of the models."""
    config = AutoConfig.for_model(model_type, hidden_size=16, num_hidden_layers=1, max_position_embeddings=32)
    config.save_pretrained(tmp_path / "config")
    program = """
import sys
sys.modules["modeling_aft"] = None
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
print(AutoModelForCausalLM.from_config(config, trust_remote_code=True).num_parameters())
"""
    done = run(program, tmp_path / "config", cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == AutoModelForCausalLM.from_config(config).num_parameters()
