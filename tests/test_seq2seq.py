"""Encoder-decoders: the formula, losses, caches and `generate`, weights that are shared, and what is refused."""

import functools
import json
import math

import pytest
import torch
from families import make_config, make_ids, make_seq2seq, make_seq2seq_config
from peft import LoraConfig, get_peft_model
from test_export import outputs, session
from test_static_cache import compilations, compiled, counting_backend
from torch.export import Dim
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from modeling_aft import AFTConfig, SynthesizerConfig, SynthesizerEncoderModel, SynthesizerSeq2SeqConfig


VARIANTS = ["dense", "random", "factorized-random", "random+dot_product", "conv", "local", "simple"]
MIXED = [("random", "dense"), ("simple-nopos", "full")]
# Rows of a source of 9 tokens: padded before, behind, within, not at all.
MASK = torch.tensor([[0] * 3 + [1] * 6, [1] * 7 + [0] * 2, [1, 0, 1, 0, 0, 1, 1, 1, 0], [1] * 9])


def names(variants):
    return [v if isinstance(v, str) else "-".join(v) for v in variants]


def both(variant):
    return (variant,) if isinstance(variant, str) else variant


def make_source(seed=1):
    return make_ids(9, 4, seed)


def by_hand(model, states, keep, ids):
    """Logits [B, T, V] of a decoder for what its encoder gives, one row, block and head at a time."""
    decoder, rows = model.model.decoder, []
    for state, kept, row in zip(states, keep.bool(), ids, strict=True):
        x = decoder.embed_tokens(row)
        if decoder.embed_positions is not None:
            x = x + decoder.embed_positions.weight[: len(row)]
        for block in decoder.layers:
            x = x + block.mixer(block.mixer_norm(x)[None])[0][0]
            attention, heads = block.cross_attention, []
            query = attention.q_proj(block.cross_attention_norm(x)).chunk(attention.heads, -1)
            key = attention.k_proj(state[kept]).chunk(attention.heads, -1)
            value = attention.v_proj(state[kept]).chunk(attention.heads, -1)
            for q, k, v in zip(query, key, value, strict=True):
                heads.append((q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v)
            x = x + attention.o_proj(torch.cat(heads, -1))
            x = x + block.feed_forward(block.feed_forward_norm(x))
        rows.append(model.lm_head(decoder.norm(x)))
    return torch.stack(rows)


@pytest.mark.parametrize("variant", VARIANTS + MIXED, ids=names(VARIANTS + MIXED))
def test_logits_are_those_of_the_formula(variant):
    model, source, ids = make_seq2seq(*both(variant)), make_source(), make_ids(7, 4, 2)
    out = model(source, MASK, ids)
    expected = by_hand(model, out.encoder_last_hidden_state, MASK, ids)
    torch.testing.assert_close(out.logits, expected)
    for row in range(4):
        alone = model(source[row][MASK[row].bool()][None], decoder_input_ids=ids[row][None])
        torch.testing.assert_close(out.logits[row], alone.logits[0])
    assert out.logits[0].std(0).min() > 1e-3


def test_widths_lengths_and_depths_of_the_stacks_may_differ():
    changes = {"of_encoder": {"hidden_size": 24, "vocab_size": 300, "num_hidden_layers": 3}}
    model = make_seq2seq("dense", "random+dot_product", tie_word_embeddings=False, **changes)
    source = make_source() + 43
    out = model(source, MASK, ids := make_ids(7, 4, 2), output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(out.logits, by_hand(model, out.encoder_last_hidden_state, MASK, ids))
    assert [len(t) for t in (out.encoder_hidden_states, out.decoder_hidden_states)] == [4, 3]
    assert [len(t) for t in (out.encoder_attentions, out.decoder_attentions, out.cross_attentions)] == [3, 2, 2]


def test_weights_of_the_cross_attention():
    model, source, ids = make_seq2seq("random"), make_source(), make_ids(7, 4, 2)
    out = model(source, MASK, ids, output_attentions=True)
    torch.testing.assert_close(out.logits, model(source, MASK, ids).logits)
    for weights in out.cross_attentions:
        assert weights.shape == (4, 2, 7, 9)
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2, 7, dtype=weights.dtype))
        assert not weights.masked_select(MASK[:, None, None] == 0).any()


def test_a_source_of_nothing_but_padding_adds_nothing():
    model, source, ids = make_seq2seq("dense"), make_source(), make_ids(3, 4)
    mask = MASK * torch.tensor([[0], [1], [1], [1]])
    fused, explicit = model(source, mask, ids), model(source, mask, ids, output_attentions=True)
    torch.testing.assert_close(fused.logits, explicit.logits)
    torch.testing.assert_close(fused.logits[1:], model(source, MASK, ids).logits[1:])
    assert not explicit.cross_attentions[0][0].any()
    fused.logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


T5_STYLE = {
    "norm_type": "rms",
    "linear_bias": False,
    "scaling": "weights",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "layer_norm_eps": 1e-6,
    "hidden_act": "relu",
    "position_embedding_type": "none",
}


def as_t5(model):
    """T5 of the library with the weights of a model that mixes by dot products alone, in its style."""
    config = model.config.decoder
    width, heads = config.hidden_size, config.num_attention_heads
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=config.vocab_size,
            d_model=width,
            d_kv=width // heads,
            d_ff=4 * width,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            relative_attention_num_buckets=config.relative_attention_num_buckets,
            relative_attention_max_distance=config.relative_attention_max_distance,
            dropout_rate=0.0,
        )
    )
    weights = {"shared.weight": model.lm_head.weight}
    for side in ("encoder", "decoder"):
        stack = getattr(model.model, side)
        weights[f"{side}.embed_tokens.weight"] = model.lm_head.weight
        weights[f"{side}.final_layer_norm.weight"] = stack.norm.weight
        first = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        weights[first] = stack.relative_attention_bias.weight
        for i, block in enumerate(stack.layers):
            parts = [("SelfAttention", block.mixer_norm, block.mixer.qkv_proj.weight.chunk(3), block.mixer.o_proj)]
            if side == "decoder":
                cross = block.cross_attention
                projections = [p.weight for p in (cross.q_proj, cross.k_proj, cross.v_proj)]
                parts.append(("EncDecAttention", block.cross_attention_norm, projections, cross.o_proj))
            for j, (name, norm, projections, out) in enumerate(parts):
                prefix = f"{side}.block.{i}.layer.{j}."
                weights[prefix + "layer_norm.weight"] = norm.weight
                weights |= {f"{prefix}{name}.{n}.weight": p for n, p in zip("qkv", projections, strict=True)}
                weights[f"{prefix}{name}.o.weight"] = out.weight
            prefix = f"{side}.block.{i}.layer.{len(parts)}."
            weights[prefix + "layer_norm.weight"] = block.feed_forward_norm.weight
            weights[prefix + "DenseReluDense.wi.weight"] = block.feed_forward.up_proj.weight
            weights[prefix + "DenseReluDense.wo.weight"] = block.feed_forward.down_proj.weight
    weights["lm_head.weight"] = model.lm_head.weight
    t5.load_state_dict(weights)
    return t5.to(model.dtype).eval()


def test_dot_products_in_the_style_of_t5_are_t5():
    fields = {"of_encoder": T5_STYLE, "of_decoder": T5_STYLE, "num_cross_attention_heads": 4}
    model = make_seq2seq("dot_product", dtype=torch.float32, **fields)  # in which norms of T5 are computed
    t5, source, mask, ids = as_t5(model), make_ids(30), torch.ones(2, 30, dtype=torch.long), make_ids(21, 2, 2)
    mask[1, 24:] = 0
    expected = t5(source, mask, ids).logits
    check = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    check(model(source, mask, ids).logits, expected)
    left = source.roll(6, 1), mask.roll(6, 1)
    check(model(*left, ids, output_attentions=True).logits[1], expected[1])  # by the definition
    out = model(source, mask, ids[:, :20], use_cache=True)
    step = model(None, mask, ids[:, 20:], encoder_outputs=(out.encoder_last_hidden_state,), cache=out.cache)
    check(step.logits, expected[:, 20:])


def test_the_weights_of_the_style_of_t5_begin_as_those_of_t5():
    fields = {**T5_STYLE, "hidden_size": 128}
    config = make_seq2seq_config("dot_product", of_encoder=fields, of_decoder=fields, num_cross_attention_heads=4)
    torch.manual_seed(0)
    t5 = as_t5(model := AutoModelForSeq2SeqLM.from_config(config))
    fresh = type(t5)(t5.config)
    for (name, ours), theirs in zip(t5.named_parameters(), fresh.parameters(), strict=True):
        if "relative" not in name:
            torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.1, atol=0, msg=name)
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]


@pytest.mark.parametrize("variant", ["random", "dense+dot_product"])
def test_synthesizers_in_the_style_of_t5(variant):
    fields = {**T5_STYLE, "position_embedding_type": "learned"}
    model, source = make_seq2seq(variant, of_encoder=fields, of_decoder=fields), make_source()
    out = model(source, MASK, ids := make_ids(7, 4, 2))
    torch.testing.assert_close(out.logits, model(source, MASK, ids, output_attentions=True).logits)
    for row in range(3):
        alone = model(source[row][MASK[row].bool()][None], decoder_input_ids=ids[row][None])
        torch.testing.assert_close(out.logits[row], alone.logits[0])
    assert all(
        stack.relative_attention_bias.weight.grad is None for stack in (model.model.encoder, model.get_decoder())
    )
    out.logits.square().sum().backward()
    assert all(stack.relative_attention_bias.weight.grad.any() for stack in (model.model.encoder, model.get_decoder()))


@pytest.mark.parametrize("variant", ["random+dot_product", "conv"])
def test_gradients(variant):
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "vocab_size": 5, "intermediate_size": 3}
    model = make_seq2seq(variant, of_encoder=sizes, of_decoder=sizes)
    parameters = dict(model.named_parameters())
    source, mask, labels = make_ids(4) % 5, torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]]), make_ids(3) % 5
    chosen = [n for n in parameters if "cross_attention" in n or "encoder.layers.0.mixer." in n or "embed_tok" in n]

    def states_of(*values):  # the loss of the package is in single precision
        given = (source, mask, labels)
        return torch.func.functional_call(model, dict(zip(chosen, values, strict=True)), given).logits

    assert torch.autograd.gradcheck(states_of, [parameters[name] for name in chosen], fast_mode=True)


def test_the_loss_is_not_shifted():
    model, source = make_seq2seq("dense", dtype=torch.float32), make_source()
    labels = make_ids(6, 4, 3)
    labels[1, 4:] = -100
    out = model(source, MASK, labels=labels)
    ids = torch.cat([torch.zeros(4, 1, dtype=torch.long), labels[:, :-1]], 1).clamp_min(0)
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), ids)
    torch.testing.assert_close(out.logits, model(source, MASK, ids).logits)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))


def test_losses_of_parts_of_a_batch_add_up():
    model, source, labels = make_seq2seq("conv", dtype=torch.float32), make_source(), make_ids(6, 4, 3)
    labels[0, 1:] = -100
    whole, number = model(source, MASK, labels=labels).loss, (labels != -100).sum()
    parts = [
        model(source[rows], MASK[rows], labels=labels[rows], num_items_in_batch=number).loss
        for rows in (slice(2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("variant", VARIANTS, ids=names(VARIANTS))
def test_generate_with_a_cache_writes_what_it_writes_without(variant, beams):
    model, source = make_seq2seq(variant), make_source()
    options = {"max_new_tokens": 6, "num_beams": beams, "num_return_sequences": beams, "length_penalty": 0.6}
    written = model.generate(source, attention_mask=MASK, **options)
    assert torch.equal(written, model.generate(source, attention_mask=MASK, use_cache=False, **options))
    for row in range(3):
        alone = model.generate(source[row][MASK[row].bool()][None], **options)
        assert torch.equal(written[row * beams : row * beams + beams, : alone.shape[1]], alone)


@pytest.mark.parametrize("variant", ["random+dot_product", "local"])
def test_what_generate_offers(variant):
    model, source = make_seq2seq(variant), make_source()
    options = {"attention_mask": MASK, "max_new_tokens": 8}
    greedy = model.generate(source, **options)
    states = model.get_encoder()(source, MASK)
    assert torch.equal(model.generate(encoder_outputs=states, **options), greedy)
    assert torch.equal(model.generate(source, cache_implementation="static", **options), greedy)
    caches = [
        EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config)),
        EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache()),
        EncoderDecoderCache(*(StaticCache(config=model.config, max_cache_len=n) for n in (8, 9))),
    ]
    for cache in caches:
        assert torch.equal(model.generate(source, past_key_values=cache, **options), greedy)
    longer = model.generate(source, decoder_input_ids=greedy[:, :4], attention_mask=MASK, max_new_tokens=5)
    assert torch.equal(longer, greedy)
    for more in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": make_seq2seq("simple")}):
        one = model.generate(source[:1], attention_mask=MASK[:1], max_new_tokens=8, **more)
        assert torch.equal(one[0], greedy[0, : one.shape[1]])
    torch.manual_seed(0)
    sampled = model.generate(source, do_sample=True, num_return_sequences=2, top_k=0, **options)
    torch.manual_seed(0)
    again = model.generate(source, do_sample=True, num_return_sequences=2, top_k=0, use_cache=False, **options)
    assert sampled.shape[0] == 8 and torch.equal(sampled, again)


@pytest.mark.parametrize("variant", ["random+dot_product", "local"])
def test_generate_compiles_the_decoding_step_once(variant):
    """Not once per token, nor again for the next text."""
    model, options = make_seq2seq(variant, dtype=torch.float32), compiled(counting_backend)
    torch._dynamo.reset()
    compilations.clear()
    for source in (make_source(), make_source(2)):
        expected = model.generate(source, attention_mask=MASK, max_new_tokens=8)
        assert torch.equal(model.generate(source, attention_mask=MASK, max_new_tokens=8, **options), expected)
    assert len(compilations) == 1


@pytest.mark.parametrize("variant", ["random+dot_product", "simple"])
def test_exported_program_and_its_onnx_graph_equal_the_model_at_any_size(variant):
    one = {"num_hidden_layers": 1}
    model = make_seq2seq(variant, dtype=torch.float32, of_encoder=one, of_decoder={"use_cache": False, **one})
    sizes = {0: Dim("batch"), 1: Dim("source", max=24)}
    shapes = {"input_ids": sizes, "attention_mask": sizes, "decoder_input_ids": {0: sizes[0], 1: Dim("to", max=24)}}

    def inputs(source, mask, length):
        return {"input_ids": source, "attention_mask": mask, "decoder_input_ids": make_ids(length, len(source), 2)}

    with torch.no_grad():
        example = inputs(make_source(), MASK, 7)
        program = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False)
        graph = session(torch.onnx.export(program, (), dynamo=True, verbose=False))
        module = program.module()
        for other in (
            inputs(make_source()[:3, :5], MASK[:3, :5], 20),
            inputs(make_ids(24, 1), make_ids(24, 1) > 40, 1),
        ):
            expected = model(**other).logits
            in_onnx, *_ = outputs(graph, {name: tensor.long() for name, tensor in other.items()}).values()
            for logits in (module(**other)["logits"], torch.from_numpy(in_onnx)):
                torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)


def test_low_rank_adapters_train_and_merge():
    model, source = make_seq2seq("random+dot_product"), make_source()
    settings = LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules="all-linear", r=2, init_lora_weights=False)
    adapted = get_peft_model(model, settings)
    adapted(input_ids=source, attention_mask=MASK, labels=make_ids(5, 4, 3)).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name}
    ids = make_ids(3, 4)
    logits = adapted(input_ids=source, attention_mask=MASK, decoder_input_ids=ids).logits
    made = adapted.generate(input_ids=source, attention_mask=MASK, max_new_tokens=4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(source, MASK, ids).logits, logits)
    assert torch.equal(merged.generate(source, attention_mask=MASK, max_new_tokens=4), made)


def test_steps_give_the_logits_of_the_whole():
    model, source, ids = make_seq2seq("dense"), make_source(), make_ids(7, 4, 2)
    whole = model(source, MASK, ids).logits
    out = model(source, MASK, ids[:, :3], use_cache=True)
    parts, states = [out.logits], (out.encoder_last_hidden_state,)
    for t in range(3, 7):
        out = model(None, MASK, ids[:, t : t + 1], encoder_outputs=states, cache=out.cache)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    with pytest.raises(ValueError, match="`encoder_outputs` must be 4 rows of 9"):
        model(None, decoder_input_ids=ids[:, :1], encoder_outputs=(states[0][:, 1:],), cache=out.cache)


def test_only_values_are_kept_where_no_dot_product_is_mixed_in():
    for variant, has_keys in (("random", False), ("random+dot_product", True)):
        cache = make_seq2seq(variant)(make_source(), decoder_input_ids=make_ids(3, 4), use_cache=True).cache
        assert (cache.self_attention_cache.layers[0].state.key is not None) == has_keys
        assert cache.cross_attention_cache.layers[0].keys.shape == (4, 2, 9, 8)


def test_a_text_ends_where_the_tables_of_the_decoder_end(caplog):
    model = make_seq2seq("random", eos_token_id=None)
    assert model.generate(make_source(), max_new_tokens=100).shape == (4, 25)
    assert "max_position_embeddings=24" in caplog.text
    free = make_seq2seq("simple-nopos", eos_token_id=None)
    assert free.generate(make_source(), max_new_tokens=30).shape == (4, 31)


def test_weights_are_shared_on_all_levels(tmp_path):
    model = make_seq2seq("dense", dtype=torch.float32)
    table = model.get_input_embeddings().weight
    assert table is model.lm_head.weight is model.model.decoder.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert (
        loaded.lm_head.weight is loaded.model.encoder.embed_tokens.weight is loaded.get_decoder().embed_tokens.weight
    )
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    encoder = SynthesizerEncoderModel.from_pretrained(tmp_path)
    states = encoder(make_source(), MASK).last_hidden_state
    torch.testing.assert_close(states, model.model.encoder(make_source(), MASK).last_hidden_state)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_resizing_embeddings(tied):
    model = make_seq2seq("dense", tie_word_embeddings=tied, of_decoder={"lm_head_bias": True})
    model.resize_token_embeddings(260)
    tables = [model.model.encoder.embed_tokens, model.model.decoder.embed_tokens, model.lm_head]
    assert len({id(table.weight) for table in tables}) == (1 if tied else 3)
    assert all(len(table.weight) == 260 for table in tables) and len(model.lm_head.bias) == 260
    config = model.config
    assert config.vocab_size == config.encoder.vocab_size == config.decoder.vocab_size == 260
    config.validate_fields()
    assert model(make_source() + 3, decoder_input_ids=make_ids(3, 4) + 4).logits.shape == (4, 3, 260)


def test_the_configuration_survives_json(tmp_path):
    config = make_seq2seq_config("random", "dense+dot_product")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert type(loaded.encoder) is SynthesizerConfig and not loaded.encoder.is_decoder and loaded.decoder.is_decoder
    assert json.loads((tmp_path / "config.json").read_text())["encoder"]["synthesizer_type"] == "random"
    assert loaded.get_text_config(decoder=True) is loaded.decoder
    assert loaded.encoder.pad_token_id == 0
    assert (loaded.hidden_size, loaded.num_hidden_layers, loaded.num_attention_heads) == (16, 2, 4)
    loaded.pad_token_id = 3
    assert loaded.encoder.pad_token_id == loaded.decoder.pad_token_id == 3


SMALL = {"hidden_size": 16, "max_position_embeddings": 8, "num_attention_heads": 2}
BAD_CONFIGS = {
    "encoder-of-a-decoder": ({"encoder": make_config("dense")}, "`encoder.is_decoder` must be False, got True"),
    "decoder-of-an-encoder": ({"decoder": {"is_decoder": False}}, "`decoder.is_decoder` must be True, got False"),
    "other-family": ({"encoder": AFTConfig()}, "encoder"),
    "other-model-type": ({"encoder": {"model_type": "aft"}}, "`encoder`: `model_type` must be 'synthesizer'"),
    "both-stacks": (
        {"encoder": {"hidden_size": 0}, "decoder": {"synthesizer_type": "x"}},
        "`encoder`: .*hidden_size.*; `decoder`: .*synthesizer_type",
    ),
    "widths": ({"encoder": {**SMALL, "hidden_size": 32}}, r"`encoder.hidden_size` must be that of the decoder \(16\)"),
    "vocabularies": ({"encoder": {**SMALL, "vocab_size": 9}}, "`encoder.vocab_size` must be that .* got 9"),
    "cross-heads": ({"num_cross_attention_heads": 3}, r"`num_cross_attention_heads` must be a divisor of .*, got 3"),
    "no-cross-heads": ({"num_cross_attention_heads": 0}, "`num_cross_attention_heads` must be at least 1, got 0"),
    "padding": (
        {"encoder": {**SMALL, "pad_token_id": 2}},
        r"`encoder.pad_token_id` must be None or .*\(None\), got 2",
    ),
    "start": ({"decoder_start_token_id": 256}, r"`decoder_start_token_id` must be None or an id .*\(0 to 255\)"),
    "buckets": ({"encoder": {**SMALL, "relative_attention_num_buckets": 5}}, "`encoder`: .* None or even .* got 5"),
    "distance": (
        {"encoder": {**SMALL, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 4}},
        r"`relative_attention_max_distance` must be more than half of relative_attention_num_buckets \(8\), got 4",
    ),
    "scaling": ({"decoder": {**SMALL, "scaling": "x"}}, "`scaling` must be one of logits, weights, got 'x'"),
    "beside-the-stacks": (
        {"hidden_size": 16, "synthesizer_type": "random"},
        "`hidden_size` must be given in `encoder` or `decoder`, got 16 beside them; `synthesizer_type`",
    ),
    "no-encoder-decoder": ({"is_encoder_decoder": False}, "`is_encoder_decoder` must be True, got False"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SynthesizerSeq2SeqConfig(**{"encoder": SMALL, "decoder": SMALL, **fields})


SOURCE, TARGET = make_source(), make_ids(3, 4)
BAD_INPUTS = {
    "no-decoder-input": ({}, "exactly one of `decoder_input_ids` and `decoder_inputs_embeds`"),
    "two-sources": (
        {"decoder_input_ids": TARGET, "encoder_outputs": (torch.zeros(4, 9, 16),)},
        "`input_ids` must be None where `encoder_outputs` are given",
    ),
    "own-cache-alone": (
        {"decoder_input_ids": TARGET, "cache": DynamicCache()},
        "`cache` must be an EncoderDecoderCache.*, got DynamicCache",
    ),
    "self-attention-cache": (
        {"decoder_input_ids": TARGET, "cache": EncoderDecoderCache(DynamicCache(), DynamicCache())},
        r"`cache` must be a cache made for this model.* got DynamicCache with \[\]",
    ),
    "packed-source": ({"decoder_input_ids": TARGET, "attention_mask": MASK * 2 + MASK.cumsum(1) // 4}, "several"),
    "packed-target": (
        {"decoder_input_ids": TARGET, "decoder_position_ids": torch.tensor([[0, 0, 1]])},
        "`decoder_attention_mask` must be that of one document per row",
    ),
    "matrix": (
        {"decoder_input_ids": TARGET, "attention_mask": torch.ones(4, 1, 9, 9, dtype=torch.bool)},
        r"`attention_mask` must be \[B, S\]",
    ),
    "long-target": ({"decoder_input_ids": make_ids(25, 4)}, "Position 24 lies beyond"),
}


@pytest.mark.parametrize(("inputs", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        make_seq2seq("dense", dtype=torch.float32)(SOURCE, **inputs)


def test_labels_need_a_first_id_and_one_for_what_does_not_count():
    model = make_seq2seq("dense", decoder_start_token_id=None)
    with pytest.raises(ValueError, match="`config.decoder_start_token_id` must be an id"):
        model(make_source(), labels=make_ids(3, 4))
    model = make_seq2seq("dense", pad_token_id=None)
    assert model(make_source(), labels=make_ids(3, 4)).loss > 0
    with pytest.raises(ValueError, match="`config.pad_token_id` must be an id"):
        model(make_source(), labels=torch.full((4, 3), -100))
    with pytest.raises(TypeError, match="unexpected keyword arguments labelz"):
        model(make_source(), labelz=1)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, source, labels = make_seq2seq("random+dot_product").train(), make_source(), make_ids(5, 4)
    gradients = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        model(source, MASK, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients)
