"""Config, forward pass, losses, gradients, saving and loading of every variant."""

import json
import math

import pytest
import torch
from families import AFT_VARIANTS, LIMIT, UNLIMITED, VARIANTS, make_config, make_ids, make_model, model_classes
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_aft import (
    AFTConfig,
    AFTForCausalLM,
    AFTModel,
    AFTSeq2SeqConfig,
    AFTVisionConfig,
    SynthesizerConfig,
    SynthesizerSeq2SeqConfig,
)
from modeling_aft.modeling_text import sinusoids


variants = pytest.mark.parametrize("variant", VARIANTS)
FAMILIES = [AFTConfig, AFTVisionConfig, AFTSeq2SeqConfig, SynthesizerConfig, SynthesizerSeq2SeqConfig]


def test_config_errors_are_collected_into_one():
    with pytest.raises(ValueError) as error:
        AFTConfig(aft_type="global", hidden_size=0, window_size=-1, hidden_act="gelo", hidden_dropout_prob=1.5)
    for expected in ("aft_type", "'global'", "full, local, simple, conv", "hidden_size", "window_size", "gelo", "1.5"):
        assert expected in str(error.value)


@pytest.mark.parametrize("config_class", [AFTConfig, SynthesizerConfig])
def test_fields_of_a_wrong_type_are_collected_too(config_class):
    with pytest.raises(ValueError, match="hidden_size.*'64'.*num_hidden_layers.*2.5"):
        config_class(hidden_size="64", num_hidden_layers=2.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("field", ["hidden_dropout_prob", "initializer_range", "layer_norm_eps"])
@pytest.mark.parametrize("config_class", [AFTConfig, SynthesizerConfig])
def test_numbers_that_are_not_finite_are_refused(config_class, field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be .*got {value}"):
        config_class(**{field: value})


@pytest.mark.parametrize("config_class", FAMILIES)
def test_a_field_that_there_is_not_is_named(config_class, caplog):
    right = "num_cross_attention_heads" if "Seq2Seq" in config_class.__name__ else "num_attention_heads"
    wrong = right.replace("attention", "atention")
    config = config_class(**{wrong: 2}, quantization_config={}, auto_map={}, num_labels=3, attn_implementation=None)
    (record,) = caplog.records
    assert f"`{wrong}` is no field of {config_class.__name__}" in record.message
    assert f"Did you mean `{right}`?" in record.message and getattr(config, wrong) == 2


@pytest.mark.parametrize("config_class", FAMILIES)
def test_what_a_config_saves_of_itself_is_known(config_class, tmp_path, caplog):
    config_class(num_labels=3, architectures=["A"], dtype="float32").save_pretrained(tmp_path)
    loaded = config_class.from_pretrained(tmp_path, revision="main", trust_remote_code=False)
    config_class.from_dict(loaded.to_dict())
    assert not caplog.records


def test_a_causal_language_model_must_be_causal():
    with pytest.raises(ValueError, match="is_decoder.*True.*False"):
        AFTForCausalLM(make_config("simple", is_decoder=False))


@variants
def test_runs_on_the_meta_device(variant):
    model = model_classes(variant)[1](make_config(variant)).to("meta")
    assert model(make_ids(9).to("meta"), use_cache=False).logits.shape == (2, 9, 256)


@variants
def test_position_ids_may_have_one_row(variant):
    model, ids = make_model(variant), make_ids(9)
    shifted = torch.arange(3, 12)[None]
    expected = model(ids, position_ids=shifted.expand(2, -1)).logits
    torch.testing.assert_close(model(ids, position_ids=shifted).logits, expected)
    torch.testing.assert_close(model(ids, position_ids=torch.arange(9)[None]).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aft_type": "conv", "hidden_size": 16, "num_attention_heads": 3}, "num_attention_heads.*divisor.*16.*3"),
        ({"aft_type": "local", "window_size": 65, "max_position_embeddings": 64}, "window_size.*64.*65"),
        ({"position_embedding_type": "rotary"}, "position_embedding_type.*learned, sinusoidal, none.*rotary"),
        ({"position_embedding_type": "sinusoidal", "hidden_size": 15}, "hidden_size.*even.*15"),
        ({"norm_type": "batch"}, "norm_type.*layer, dyt, rms.*batch"),
        ({"linear_fan_in": 0}, "linear_fan_in.*None or at least 1.*0"),
        ({"linear_activation": "relu"}, "linear_activation.*none, tanh.*relu"),
        ({"query_activation": "softmax"}, "query_activation.*sigmoid, tanh, relu, identity.*softmax"),
        ({"key_activation": "relu"}, "key_activation.*none, tanh.*relu"),
        ({"decay": "linear"}, "`decay`.*learned, fixed.*linear"),
        ({"aft_type": "full", "decay": "learned"}, "`decay`.*full.*learned"),
        ({"decay_min_half_life": 0.0}, "decay_min_half_life.*positive.*0.0"),
        ({"decay_min_half_life": 8, "decay_max_half_life": 4}, r"decay_max_half_life.*\(8\).*4"),
        ({"position_bias_type": "rotary"}, "position_bias_type.*absolute, relative.*rotary"),
        ({"aft_type": "conv", "position_bias_type": "relative"}, "position_bias_type.*absolute.*conv.*relative"),
        ({"aft_type": "conv", "position_bias_init_std": -1}, "position_bias_init_std. must be at least 0.*-1"),
        ({"aft_type": "conv", "position_bias_init_mean": math.nan}, "position_bias_init_mean. must be finite.*nan"),
        (
            {"position_bias_type": "relative", "hidden_size": 16, "num_attention_heads": 3},
            "num_attention_heads.*divisor.*16.*3",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_errors_name_field_value_and_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        AFTConfig(**fields)


@pytest.mark.parametrize("decay", ["learned", "fixed"])
def test_decays_begin_with_half_lives_that_rise_by_equal_factors(decay):
    model = AFTModel(make_config("local", decay=decay, decay_min_half_life=3, decay_max_half_life=3 * 4.0**15))
    for layer in model.layers:
        half_lives = math.log(2) / layer.mixer.decay()
        torch.testing.assert_close(half_lives, 3 * 4.0 ** torch.arange(16))
    trained = [name for name, _ in model.named_parameters() if "decay" in name]
    assert len(trained) == (2 if decay == "learned" else 0)
    assert sum("decay" in name for name in model.state_dict()) == 2


def test_a_decay_is_learned():
    model = make_model("relative-decay").train()
    model(make_ids(40), labels=make_ids(40)).loss.backward()
    for layer in model.model.layers:
        assert (layer.mixer.decay.weight.grad != 0).all()


def test_relative_biases_are_those_of_a_table_whose_rows_are_equal():
    relative = make_model("local", position_bias_type="relative", num_attention_heads=1)
    absolute = make_model("local", position_bias_rank=None)
    weights = relative.state_dict()
    for name in list(weights):
        if "position_bias" in name:
            weights[name.replace("weight", "table")] = weights.pop(name).expand(LIMIT, -1)
    absolute.load_state_dict(weights)
    ids = make_ids(LIMIT)
    torch.testing.assert_close(relative(ids).logits, absolute(ids).logits)


def test_the_kind_of_a_state_names_what_keys_are_made_of_only_where_something_is():
    """Caches that were saved before there was a choice fit still."""
    plain, bounded = make_config("simple"), make_config("simple", key_activation="tanh")
    assert "key_activation" not in plain.state_kind
    assert json.loads(bounded.state_kind) == {**json.loads(plain.state_kind), "key_activation": "tanh"}


def test_sinusoids_are_sine_and_cosine_in_turn():
    positions = torch.tensor([[0, 1, 1_000_000]])
    found = sinusoids(positions, 6)
    for pair in range(3):
        angle = positions.double() * 1e4 ** (-pair / 3)
        torch.testing.assert_close(found[..., 2 * pair], torch.sin(angle), atol=1e-7, rtol=0)
        torch.testing.assert_close(found[..., 2 * pair + 1], torch.cos(angle), atol=1e-7, rtol=0)


def test_sinusoidal_positions_are_added_to_the_tokens():
    """Those that the tokens have, padding aside: the same vectors as a learned table that holds them."""
    model = make_model("conv", position_embedding_type="sinusoidal")
    learned = make_model("conv")
    weights = {**model.state_dict(), "model.embed_positions.weight": sinusoids(torch.arange(LIMIT), 16)}
    learned.load_state_dict(weights)
    ids, mask = make_ids(12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    expected = learned(ids, attention_mask=mask).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)


def test_dynamic_tanh_is_its_formula():
    model = make_model("conv", norm_type="dyt")
    norm, hidden = model.model.norm, torch.randn(2, 3, 16, dtype=torch.float64)
    torch.testing.assert_close(norm(hidden), norm.weight * (norm.alpha * hidden).tanh() + norm.bias)
    fresh = AFTModel(make_config("conv", norm_type="dyt")).norm
    assert fresh.alpha.item() == 0.5 and bool((fresh.weight == 1).all()) and not fresh.bias.any()


def test_a_config_changed_after_its_creation_is_checked_by_the_model_and_when_saved(tmp_path):
    config = make_config("conv")
    config.num_attention_heads = 3
    with pytest.raises(ValueError, match="num_attention_heads"):
        AFTModel(config)
    with pytest.raises(Exception, match="num_attention_heads"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@variants
def test_config_round_trip(variant, tmp_path):
    config = make_config(variant)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    loaded._name_or_path = config._name_or_path
    assert loaded.to_dict() == config.to_dict()
    assert "layer_types" not in json.loads((tmp_path / "config.json").read_text())


@variants
def test_forward_shapes_and_outputs(variant):
    model = make_model(variant)
    output = model(make_ids(9), output_hidden_states=True)
    assert output.logits.shape == (2, 9, 256)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[-1], model.model(make_ids(9)).last_hidden_state)
    as_tuple = model(make_ids(9), return_dict=False, use_cache=False)
    assert torch.equal(as_tuple[0], output.logits)


@variants
def test_loss_is_the_shifted_cross_entropy(variant):
    model, ids = make_model(variant), make_ids(12)
    labels = ids.clone()
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(output.loss, expected)
    # Gradient accumulation: the sum over the batch divided by the number that the trainer gives.
    count = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=2 * count).loss, expected / 2)


@variants
def test_logits_to_keep(variant):
    model, ids = make_model(variant), make_ids(12)
    everything = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, everything[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, everything[:, [0, 5]])


@variants
def test_inputs_embeds_replace_input_ids(variant):
    model, ids = make_model(variant), make_ids(12)
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="exactly one"):
        model()


@variants
def test_causality(variant):
    model, ids = make_model(variant), make_ids(20)
    changed = ids.clone()
    changed[:, 11:] = make_ids(9, seed=5)
    torch.testing.assert_close(model(changed).logits[:, :11], model(ids).logits[:, :11])


@variants
def test_bidirectional_models_see_both_sides(variant):
    model, ids = make_model(variant, head=False, is_decoder=False), make_ids(20)
    changed = ids.clone()
    changed[:, 19] = 7
    before, after = model(ids), model(changed)
    assert before.cache is None
    assert (before.last_hidden_state - after.last_hidden_state)[:, 0].abs().max() > 1e-6
    with pytest.raises(ValueError, match="is_decoder=True"):
        model(ids, use_cache=True)


@pytest.mark.parametrize("side", ["left", "right", "interior"])
@pytest.mark.parametrize("is_decoder", [True, False], ids=["causal", "bidirectional"])
@variants
def test_padding_changes_nothing(variant, is_decoder, side):
    model, ids = make_model(variant, head=False, is_decoder=is_decoder), make_ids(14)
    mask = torch.ones_like(ids)
    padded = {"left": slice(0, 5), "right": slice(-5, None), "interior": slice(4, 9)}[side]
    mask[0, padded] = 0
    hidden = model(ids, attention_mask=mask).last_hidden_state
    alone = model(ids[:1, mask[0].bool()]).last_hidden_state
    torch.testing.assert_close(hidden[:1, mask[0].bool()], alone)
    torch.testing.assert_close(hidden[1:], model(ids[1:]).last_hidden_state)


def test_attention_mask_of_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask.*\[2, 14 or more\].*\[2, 3\]"):
        make_model("simple")(make_ids(14), attention_mask=torch.ones(2, 3))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in UNLIMITED])
def test_positions_beyond_the_tables_are_refused_with_both_numbers(variant):
    model = make_model(variant)
    assert model(make_ids(LIMIT)).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"Position {LIMIT} .*max_position_embeddings={LIMIT}"):
        model(make_ids(LIMIT + 1))
    with pytest.raises(ValueError, match=f"Position 99 .*{LIMIT}"):
        model(make_ids(2), position_ids=torch.tensor([[98, 99], [0, 1]]))
    past = model(make_ids(LIMIT - 1)).cache
    past = model(make_ids(1), cache=past).cache
    with pytest.raises(ValueError, match=f"Position {LIMIT} "):
        model(make_ids(1), cache=past)
    # Positions count kept tokens, so padding does not use the tables up.
    mask = torch.ones(2, LIMIT + 4, dtype=torch.long)
    mask[:, :4] = 0
    torch.testing.assert_close(
        model(make_ids(LIMIT + 4), attention_mask=mask).logits[:, 4:], model(make_ids(LIMIT + 4)[:, 4:]).logits
    )


@variants
def test_padding_fed_to_a_row_that_has_used_its_table_up(variant):
    """One row of the batch is full and gets padding, the other, which began with padding, goes on."""
    model, ids = make_model(variant), make_ids(LIMIT + 1)
    mask = torch.ones_like(ids)
    mask[1, :5], mask[0, LIMIT] = 0, 0
    with torch.no_grad():
        past = model(ids[:, :LIMIT], attention_mask=mask[:, :LIMIT], use_cache=True).cache
        logits = model(ids[:, LIMIT:], attention_mask=mask, cache=past).logits
        torch.testing.assert_close(logits[1], model(ids[1:, 5:], use_cache=False).logits[0, -1:])


@pytest.mark.parametrize("variant", UNLIMITED)
def test_models_without_tables_have_no_limit(variant):
    assert make_model(variant)(make_ids(5 * LIMIT)).logits.isfinite().all()


@variants
def test_gradient_checkpointing_changes_no_gradient(variant):
    grads = []
    for checkpointing in (False, True):
        model = make_model(variant, hidden_dropout_prob=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(make_ids(12), labels=make_ids(12)).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@variants
def test_every_parameter_gets_a_gradient(variant):
    model = make_model(variant)
    model(make_ids(30), labels=make_ids(30)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A window of one offset has no shape to learn: standardised (eq. 8), only beta is left of it.
        unused = variant == "conv-1" and name.endswith(("position_bias.weight", "position_bias.gamma"))
        assert (parameter.grad.abs().sum() > 0) != unused, name


@variants
def test_training_makes_no_cache_unless_asked(variant):
    model = make_model(variant).train()
    assert model(make_ids(5)).cache is None
    assert model(make_ids(5), use_cache=True).cache is not None


@variants
def test_dropout_zero_makes_train_and_eval_agree(variant):
    model = make_model(variant)
    torch.testing.assert_close(model.train()(make_ids(9)).logits, model.eval()(make_ids(9)).logits)


def test_dropout_is_used():
    model = make_model("simple", hidden_dropout_prob=0.5).train()
    assert not torch.equal(model(make_ids(9)).logits, model(make_ids(9)).logits)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_token_embeddings_can_be_resized(tied):
    model = make_model("conv", tie_word_embeddings=tied)
    before = model(make_ids(9)).logits
    model.resize_token_embeddings(300)
    assert model.config.vocab_size == 300 and model(make_ids(9)).logits.shape[-1] == 300
    torch.testing.assert_close(model(make_ids(9)).logits[..., :256], before)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@variants
def test_save_and_load_is_bit_exact(variant, tied, tmp_path):
    model = make_model(variant, dtype=torch.float32, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118
    for load in (model_classes(variant)[1], AutoModelForCausalLM):
        loaded = load.from_pretrained(tmp_path)
        for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
            assert torch.equal(a, b), name
        # Not bit-equal: products may be taken in another order where the loaded weights are aligned otherwise.
        torch.testing.assert_close(loaded(make_ids(9)).logits, model(make_ids(9)).logits)
    torch.testing.assert_close(
        AutoModel.from_pretrained(tmp_path).embed_tokens.weight, model.model.embed_tokens.weight
    )


@variants
def test_no_buffers_and_a_fresh_model_is_initialised(variant):
    model = model_classes(variant)[1](make_config(variant))
    # The only buffers are what is never trained: a matrix, rates, the inputs of outputs. Every file holds them.
    buffers = {name.rsplit(".", 1)[1] for name, _ in model.named_buffers() if not name.endswith("decay.weight")}
    assert buffers <= {"table", "indices"}
    assert {name for name, _ in model.named_buffers()} <= model.state_dict().keys()
    for name, parameter in model.state_dict().items():
        assert parameter.isfinite().all(), name
    if variant in AFT_VARIANTS and model.config.aft_type == "conv":
        # At the start AFT-conv is AFT-simple.
        bias = model.model.layers[0].mixer.position_bias(torch.arange(5))
        assert (bias == 0).all()


@variants
def test_bfloat16_and_autocast(variant):
    model = make_model(variant, dtype=torch.float32)
    reference = model(make_ids(12), use_cache=False).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            model(make_ids(12)).logits.float(), reference, rtol=0.1, atol=0.15 * reference.std().item()
        )
    half = model.to(torch.bfloat16)(make_ids(12)).logits
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), reference, rtol=0.1, atol=0.2 * reference.std().item())


@pytest.mark.parametrize("variant", ["full", "local"])
@torch.no_grad()
def test_products_of_position_factors_are_exact_under_autocast(variant):
    """In half precision a bias of some tens would be off by tenths, and its weight by as many tens of percent."""
    mixer = make_model(variant, dtype=torch.float32).model.layers[0].mixer
    mixer.qkv_proj.weight.split(mixer.widths)[1].zero_()  # the bias alone decides
    for factors in (mixer.position_bias.query_factors, mixer.position_bias.key_factors):
        factors.copy_(4 * torch.randn(factors.shape))
    hidden_states = torch.randn(2, 20, 16)
    expected, _ = mixer(hidden_states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = mixer(hidden_states)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02 * expected.std().item())


@pytest.mark.parametrize(
    "variant", ["full", "local", "simple", "conv", "dense", "random", "factorized-dense", "random+dot_product"]
)
def test_compiles_without_a_graph_break(variant):
    torch._dynamo.reset()
    model, ids = make_model(variant, dtype=torch.float32), make_ids(12)
    compiled = torch.compile(
        lambda ids: model(ids, labels=ids, use_cache=False).loss, fullgraph=True, backend="aot_eager"
    )
    loss = compiled(ids)
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)
    loss.backward()
    assert model.model.layers[0].mixer.qkv_proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("is_decoder", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("rank", [4, None], ids=["factors", "table"])
def test_local_bias_is_the_band_of_the_full_bias(rank, is_decoder):
    """AFT-local with w = u v^T is AFT-full with the entries outside the window set to 0 (eq. 4 of eq. 7)."""
    local = make_model("local", head=False, position_bias_rank=rank, is_decoder=is_decoder)
    full = make_model("full", head=False, position_bias_rank=None, is_decoder=is_decoder)
    state = {name: tensor for name, tensor in local.state_dict().items() if "position_bias" not in name}
    for index, layer in enumerate(local.layers):
        bias = layer.mixer.position_bias(torch.arange(LIMIT))[0]
        table = torch.zeros(LIMIT, LIMIT, dtype=bias.dtype)
        for t in range(LIMIT):
            for tap in range(bias.shape[1]):
                key = t - tap + (0 if is_decoder else 4)
                if 0 <= key < LIMIT:
                    table[t, key] = bias[t, tap]
        if rank is not None:
            factors = layer.mixer.position_bias
            band = (factors.query_factors @ factors.key_factors.T)[table != 0]
            torch.testing.assert_close(table[table != 0], band)
        state[f"layers.{index}.mixer.position_bias.table"] = table
    full.load_state_dict(state)
    torch.testing.assert_close(full(make_ids(30)).last_hidden_state, local(make_ids(30)).last_hidden_state)


@pytest.mark.parametrize(
    "fields",
    [{"aft_type": "conv"}, {"aft_type": "conv", "conv_reparameterization": False}, {"position_bias_type": "relative"}],
    ids=["conv", "conv-plain", "local-relative"],
)
def test_initial_relative_biases(fields):
    def begin(**initial):
        torch.manual_seed(0)
        return AFTModel(make_config("local", num_attention_heads=2, window_size=400, **fields, **initial))

    plain = begin()
    for layer in begin(position_bias_init_mean=2.0, position_bias_init_std=0.5).layers:
        biases = layer.mixer.position_bias(torch.arange(3)).detach()
        assert biases.mean(-1).flatten().tolist() == pytest.approx([2, 2], abs=0.1)
        assert biases.std(-1).flatten().tolist() == pytest.approx([0.5, 0.5], abs=0.05)
    assert not plain.layers[0].mixer.position_bias(torch.arange(3)).any()
    assert torch.equal(begin(position_bias_init_mean=1.0).embed_tokens.weight, plain.embed_tokens.weight)


def test_window_size_zero_is_simple():
    local, simple = make_model("local-0"), make_model("simple")
    assert local.state_dict().keys() == simple.state_dict().keys()
    assert torch.equal(local(make_ids(20)).logits, simple(make_ids(20)).logits)


class RandomText(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = make_ids(16, batch=1, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("variant", ["local", "conv"])
def test_trainer_trains_evaluates_and_accumulates(variant, tmp_path):
    losses = []
    for batch, steps in ((4, 1), (1, 4)):
        model = make_model(variant, dtype=torch.float32)
        arguments = TrainingArguments(
            str(tmp_path / f"{steps}"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=RandomText(), eval_dataset=RandomText())
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
        assert trainer.predict(RandomText()).predictions.shape == (8, 16, 256)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
