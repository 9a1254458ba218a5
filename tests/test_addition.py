"""scripts/addition.py: what equations look like, which pairs are held back, what counts as right."""

import addition
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_aft import AFTConfig, AFTForCausalLM


def read(equations: torch.Tensor) -> list[str]:
    return ["".join(addition.CHARACTERS[index] for index in row) for row in equations.tolist()]


def test_equations_are_padded_with_zeros():
    pairs = np.array([17_985, 0, 999_999, 5_040])
    expected = ["017+985=1002\n", "000+000=0000\n", "999+999=1998\n", "005+040=0045\n"]
    equations = addition.write_equations(pairs, 3)
    assert read(equations) == expected and equations.dtype == torch.int64
    assert read(addition.write_equations(np.array([95]), 1)) == ["9+5=14\n"]


@pytest.mark.parametrize(("digits", "count"), [(1, 10), (2, 1000), (3, 10_000), (9, 10_000)])
def test_pairs_are_held_back_and_never_trained_on(digits, count):
    held_back = addition.draw_held_back(digits)
    assert len(np.unique(held_back)) == count and 0 <= held_back.min() <= held_back.max() < 10 ** (2 * digits)
    assert np.array_equal(held_back, addition.draw_held_back(digits))
    pairs = addition.draw_pairs(np.random.default_rng(1), 2000, digits, held_back)
    assert not np.isin(pairs, held_back).any()
    if digits == 1:
        assert sorted(set(pairs)) == sorted(set(range(100)) - set(held_back))


class Calculator(AFTForCausalLM):
    """Knows all sums but those of an even first number, whose last digit it gets wrong."""

    def generate(self, prompts, attention_mask, max_new_tokens, do_sample):
        assert prompts.shape[1] == 6 and max_new_tokens == 4 and not do_sample
        assert bool(attention_mask.all())
        digits = prompts[:, [0, 1, 3, 4]]
        pairs = (digits * torch.tensor([1000, 100, 10, 1])).sum(1).numpy()
        equations = addition.write_equations(pairs, 2)
        equations[:, -2] = torch.where(digits[:, 1] % 2 == 0, 9 - equations[:, -2], equations[:, -2])
        return equations


def test_a_sum_counts_where_all_of_it_is_right():
    model = Calculator(AFTConfig(aft_type="simple", hidden_size=8, num_hidden_layers=1, vocab_size=13))
    equations = addition.write_equations(np.arange(10_000)[::7], 2)
    odd = (equations[:, 1] % 2 == 1).double().mean().item()
    assert addition.exact_match(model, equations, 2) == pytest.approx(odd)


def small_preset(folder):
    path = folder / "preset.json"
    config = AFTConfig(
        aft_type="conv", vocab_size=13, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, window_size=4
    )
    config.to_json_file(path, use_diff=False)
    return str(path)


def test_a_run_learns_is_repeatable_and_leaves_a_model(tmp_path, capsys):
    flags = ["--model_preset", small_preset(tmp_path), "--digits", "1", "--max_steps", "40", "--batch_size", "32"]
    flags += ["--learning_rate", "1e-2", "--warmup_steps", "5", "--eval_every", "20"]
    scores = [addition.main([*flags, "--output_dir", str(tmp_path / name)]) for name in ("first", "second")]
    assert scores[0] == scores[1]
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[3]) for line in lines if line.startswith("step")]
    assert losses[:2] == losses[2:] and losses[1] < 0.9 * losses[0]
    assert not [path for path in (tmp_path / "first").iterdir() if path.name.startswith(".")]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("first", "second")]
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    equations = addition.write_equations(addition.draw_held_back(1), 1)
    assert addition.exact_match(models[0], equations, 1) == scores[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--digits", "0", "--max_steps", "0"], "--digits must be at least 1, got 0; --max_steps must be at least 1"),
        (["--digits", "10"], "--digits must be at most 9, got 10"),
        (["--optimizer", "sgd"], "--optimizer must be adamw or muon, got sgd"),
        (["--learning_rate", "nan"], "--learning_rate must be positive and finite, got nan"),
        (["--model_preset", "configuration/models/aft-conv-tiny.json"], "must be of 13 tokens, got 256"),
    ],
    ids=["counts", "digits", "optimizer", "rate", "vocabulary"],
)
def test_wrong_flags_are_refused(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(addition.Path(__file__).resolve().parent.parent)
    with pytest.raises(ValueError, match=message):
        addition.main(["--output_dir", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()
