"""Deliberate faults, each put into a copy of the package, to show that the tests notice every one of them.

    python tests/faults.py              # all of them; exit status 1 if one survives
    python tests/faults.py crop static  # those whose name contains one of the words
    python tests/faults.py --list

A fault is a replacement in one file. Each names the test files that must catch it, and the table that is printed says
which test did, first of all.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[1]
GENERATION, STATIC, FEATURES = "test_generation.py", "test_static_cache.py", "test_generate_features.py"
MODELING, HEADS, OPS, SYNTHESIZER = "test_modeling.py", "test_heads.py", "test_ops.py", "test_synthesizer.py"
REMOTE, MODES, PACKING = "test_remote_code.py", "test_ops_modes.py", "test_packing.py"
INPUTS, CACHE, COMPATIBILITY = "test_model_inputs.py", "test_cache.py", "test_compatibility.py"


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = [
    # the cache
    Fault(
        "decoding ignores the state",
        "cache_state.py",
        "return layer.read()",
        "return None",
        GENERATION,
    ),
    Fault(
        "the state is never replaced",
        "cache_state.py",
        "                    o.copy_(n)\n            self.state = old",
        "                    pass\n            self.state = old",
        GENERATION,
    ),
    Fault(
        "reordering beams does nothing",
        "cache_state.py",
        "lambda t: t.index_select(0, beam_idx.to(t.device))",
        "lambda t: t.clone()",
        GENERATION,
    ),
    Fault(
        "selecting rows does nothing",
        "cache_state.py",
        "self._map(lambda t: t[indices.to(t.device)])",
        "pass",
        GENERATION,
    ),
    Fault(
        "repeating rows tiles them",
        "cache_state.py",
        "t.repeat_interleave(repeats, dim=0)",
        "t.repeat(repeats, *[1] * (t.dim() - 1))",
        GENERATION,
    ),
    Fault(
        "crop removes one token less",
        "cache_state.py",
        "remaining, like = -tokens_to_remove, self.state",
        "remaining, like = max(-tokens_to_remove - 1, 0), self.state",
        GENERATION,
    ),
    Fault(
        "crop keeps the length",
        "cache_state.py",
        "            self.cumulative_length = self.cumulative_length - new.length\n",
        "",
        GENERATION,
    ),
    Fault(
        "crop forgets the tokens it should keep",
        "cache_state.py",
        "self.state = self._placed(self.advance(state, new.first(kept), like), kept)",
        "pass",
        GENERATION,
    ),
    Fault(
        "recording writes over what it recorded",
        "cache_state.py",
        "            self.state = state\n        else:\n            self._write(state)\n",
        "        self._write(state)\n",
        GENERATION,
    ),
    Fault(
        "autograd's tensors are overwritten",
        "cache_state.py",
        "        if torch.is_grad_enabled() or self.in_graph:\n            return False\n",
        "",
        GENERATION,
    ),
    Fault(
        "states made in inference mode are overwritten outside",
        "cache_state.py",
        "return torch.is_inference_mode_enabled() or not tensor.is_inference()",
        "return True",
        GENERATION,
    ),
    Fault(
        "states are replaced instead of written into",
        "cache_state.py",
        "if old is not None and all(map(self._can_take, old, state)):",
        "if False:",
        STATIC,
    ),
    Fault(
        "a static cache writes at its beginning",
        "cache_state.py",
        "torch.arange(length, device=self.device) + self.cumulative_length",
        "torch.arange(length, device=self.device)",
        STATIC,
    ),
    Fault(
        "a reset static cache keeps old keys",
        "cache_state.py",
        "tensors[name] = spare.fill_(nothing)",
        "tensors[name] = spare",
        STATIC,
    ),
    Fault(
        "the room of a static cache counts as tokens",
        "modeling_attention_free.py",
        '{"key": (-2, -torch.inf), "value": (-2, 0), "key_position": (-1, 0)}',
        '{"key": (-2, 0), "value": (-2, 0), "key_position": (-1, 0)}',
        STATIC,
    ),
    Fault(
        "the room of a Synthesizer's static cache counts as tokens",
        "modeling_synthesizer.py",
        '{"key": (-2, 0), "value": (-2, 0), "key_position": (-1, -1)}',
        '{"key": (-2, 0), "value": (-2, 0), "key_position": (-1, 0)}',
        STATIC,
    ),
    Fault(
        "a reset keeps the length",
        "cache_state.py",
        "            self.cumulative_length.zero_()\n",
        "            pass\n",
        STATIC,
    ),
    Fault(
        "a saved cache starts counting anew",
        "cache_state.py",
        'self.cumulative_length = tensors.pop("cumulative_length")',
        'self.cumulative_length = tensors.pop("cumulative_length").zero_()',
        FEATURES,
    ),
    Fault(
        "a prefetched state stays on the CPU",
        "cache_state.py",
        "self._map(lambda t: t.to(self.device, non_blocking=True))",
        "pass",
        FEATURES,
    ),
    # the operator's state and padding
    Fault(
        "the sum of old tokens is dropped in a step",
        "ops_torch.py",
        "older = (maximum + normalizer.clamp_min(_NOTHING).log())[:, None]",
        "older = (maximum + normalizer.clamp_min(_NOTHING).log())[:, None] - torch.inf",
        GENERATION,
    ),
    Fault(
        "the window of the state is one token stale",
        "ops_torch.py",
        "window_key, window_value = key[:, length:], value[:, length:]",
        "window_key, window_value = key[:, length - 1 : -1], value[:, length - 1 : -1]",
        GENERATION,
    ),
    Fault(
        "the sums leak the future within a chunk",
        "ops_chunks.py",
        "sums = tuple(torch.cat([i[:, None], t[:, :-1]], 1) for i, t in zip(initial, sums, strict=True))",
        "sums = merge(tuple(i[:, None] for i in initial), sums)",
        OPS,
    ),
    Fault(
        "AFT-full sees one token of the future",
        "ops_torch.py",
        "device=key.device) > query_index, -torch.inf)",
        "device=key.device) > query_index + 1, -torch.inf).contiguous()",
        MODELING,
    ),
    Fault(
        "the window sees one token of the future",
        "ops_chunks.py",
        "bias = bias.masked_fill(tap < 0, -torch.inf)",
        "bias = bias.masked_fill(tap < -1, -torch.inf)",
        OPS,
    ),
    Fault(
        "the sums of the CPU's chunks leak the future",
        "ops_cpu.py",
        "    return sums[:, :-1], sums[:, -1]",
        "    return sums[:, 1:], sums[:, -1]",
        MODELING,
    ),
    Fault(
        "the CPU's window is turned around",
        "ops_cpu.py",
        "unflatten(2, (chunks, chunk)).flip(-1))",
        "unflatten(2, (chunks, chunk)))",
        OPS,
    ),
    Fault(
        "what is older than a block is lost on the CPU",
        "ops_cpu.py",
        "older, carry[batch] = _older(",
        "older, _ = _older(",
        OPS,
    ),
    Fault(
        "what is newer than a block gives no gradient on the CPU",
        "ops_cpu.py",
        "newer, carry[batch] = _newer(",
        "newer, _ = _newer(",
        OPS,
    ),
    Fault(
        "the CPU takes any exponential as it is",
        "ops_cpu.py",
        "_LARGEST_SUM = 80.0",
        "_LARGEST_SUM = math.inf",
        MODES,
    ),
    Fault(
        "the CPU trusts sums that have vanished",
        "ops_cpu.py",
        "_SMALLEST_TOTAL = 1e-20",
        "_SMALLEST_TOTAL = 0.0",
        OPS,
    ),
    Fault(
        "padding enters the keys",
        "ops_torch.py",
        "        key = key.masked_fill(~keep[..., None], -torch.inf)\n",
        "",
        MODELING,
    ),
    Fault(
        "padding enters the state",
        "ops_torch.py",
        "        older_key = older_key.masked_fill(beyond[..., None], -torch.inf)\n",
        "",
        GENERATION,
    ),
    Fault(
        "padding takes the place of a token in the window",
        "ops_torch.py",
        "window_key = key.gather(1, index.expand(-1, -1, key.shape[2]))",
        "pass",
        GENERATION,
    ),
    Fault(
        "a chunk after the first starts from nothing",
        "ops_chunks.py",
        "    while step < sums[0].shape[1]:\n        sums = merge(_shift(sums, step), sums)\n        step *= 2\n",
        "",
        OPS,
    ),
    Fault(
        "rows that underflow are not computed again",
        "ops_panel.py",
        "return [index.unbind(1) for index in rows.split(group)] if len(rows) else []",
        "return []",
        OPS,
    ),
    Fault(
        "exponentials without the row maximum",
        "ops_panel.py",
        "pair_weight = (bias - finite(bias.amax(-1, keepdim=True))).exp_()",
        "pair_weight = bias.exp()",
        OPS,
    ),
    Fault(
        "position biases in the dtype of autocast",
        "modeling_attention_free.py",
        "with without_autocast(key):",
        "with torch.set_grad_enabled(torch.is_grad_enabled()):",
        MODELING,
    ),
    Fault(
        "a step reads the bias of the wrong offset",
        "modeling_attention_free.py",
        "keys = positions - offsets",
        "keys = positions - offsets - 1",
        GENERATION,
    ),
    # the Synthesizer
    Fault(
        "the Synthesizer sees one token of the future",
        "ops_synthesizer.py",
        "return (places[: rows.stop] <= places[rows, None])[None, None]",
        "return (places[: rows.stop] <= places[rows, None] + 1)[None, None]",
        MODELING,
    ),
    Fault(
        "the Synthesizer's cached prefill sees the future",
        "modeling_synthesizer.py",
        "            visible = visible & (places <= places[-length:, None])\n",
        "            pass\n",
        GENERATION,
    ),
    Fault(
        "the Synthesizer's state holds padding",
        "ops_synthesizer.py",
        "key_position = torch.where(keep, positions, -1)",
        "key_position = positions",
        GENERATION,
    ),
    Fault(
        "mixture weights over heads instead of components",
        "modeling_synthesizer.py",
        "self.mixture_logits.softmax(1)",
        "self.mixture_logits.softmax(0)",
        SYNTHESIZER,
    ),
    Fault(
        "dot products without their scale in decoding",
        "modeling_synthesizer.py",
        "part = self.scaling * query @ state.key.transpose(2, 3)",
        "part = query @ state.key.transpose(2, 3)",
        GENERATION,
    ),
    Fault(
        "fixed random logits that no checkpoint holds",
        "modeling_synthesizer.py",
        'self.register_buffer("table", table)',
        'self.register_buffer("table", table, persistent=False)',
        MODELING,
    ),
    # model and heads
    Fault(
        "positions count padding",
        "modeling_tokens.py",
        "positions = mask.long().cumsum(1) - 1",
        "positions = torch.ones_like(mask.long()).cumsum(1) - 1",
        MODELING,
    ),
    Fault(
        "positions begin again with every call",
        "modeling_tokens.py",
        "        positions = positions + seen[:, None].to(positions.device)\n",
        "        pass\n",
        GENERATION,
    ),
    Fault(
        "the first columns of the mask are read",
        "modeling_tokens.py",
        "attention_mask = attention_mask[:, -length:]",
        "attention_mask = attention_mask[:, :length]",
        GENERATION,
    ),
    Fault(
        "the mask is read on the first call only",
        "modeling_tokens.py",
        "        attention_mask, numbered = _check_mask(attention_mask, inputs)\n",
        "        attention_mask, numbered = _check_mask(attention_mask, inputs)\n"
        "        attention_mask = attention_mask if seen is None else None\n",
        GENERATION,
    ),
    Fault(
        "packed documents see those before them",
        "ops_packing.py",
        "        starts[1:] |= comparison(values[1:], values[:-1])\n",
        "        pass\n",
        PACKING,
    ),
    Fault(
        "positions that begin again are of one document",
        "ops_packing.py",
        "ends.append((position_ids, torch.le))",
        "pass",
        PACKING,
    ),
    Fault(
        "the first token of a document is predicted from another",
        "modeling_causal_lm.py",
        "labels = labels.masked_fill(~tokens.continues.to(labels.device), ignored)",
        "pass",
        PACKING,
    ),
    Fault(
        "what is predicted from padding counts",
        "modeling_tokens.py",
        "mask[:, 1:] & mask[:, :-1]",
        "mask[:, 1:]",
        INPUTS,
    ),
    Fault(
        "a mask of twos is added up",
        "modeling_tokens.py",
        "keep = attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0",
        "keep = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 1",
        INPUTS,
    ),
    Fault(
        "negative positions are rows of the tables",
        "modeling_tokens.py",
        "    if first < 0:\n",
        "    if False:\n",
        INPUTS,
    ),
    Fault(
        "a padding id inside of a text is padding to classifiers",
        "modeling_tokens.py",
        "    if at_ends:\n",
        "    if False:\n",
        INPUTS,
    ),
    Fault(
        "a cache reads its prompt again",
        "modeling_causal_lm.py",
        "prompt.shape[1] if mask is None else mask.shape[1]\n        if past:",
        "prompt.shape[1] if mask is None else mask.shape[1]\n        if False:",
        CACHE,
    ),
    Fault(
        "an interrupted forward pass leaves a cache like others",
        "modeling_common.py",
        "        if first.unfinished:\n",
        "        if False:\n",
        CACHE,
    ),
    Fault(
        "a cache of another kind of model is taken",
        "modeling_common.py",
        'check_kind("`cache`", first.kind, self._state_kind)',
        "pass",
        CACHE,
    ),
    Fault(
        "checkpointing where nothing is recorded loses the cache",
        "modeling_common.py",
        "return self._checkpoints and torch.is_grad_enabled()",
        "return self._checkpoints",
        CACHE,
    ),
    Fault(
        "unknown keywords are swallowed",
        "compatibility.py",
        "    if unknown := sorted(keywords.keys() - known):\n",
        "    if unknown := []:\n",
        COMPATIBILITY,
    ),
    Fault(
        "a release that renames the cache is taken",
        "compatibility.py",
        "    if len(passed) != 1 or passed != read:\n",
        "    if False:\n",
        COMPATIBILITY,
    ),
    Fault(
        "the trainer does not know what the classes are",
        "compatibility.py",
        "        tables[auto_class][model_type] = model_class.__name__\n",
        "        pass\n",
        "test_ecosystem.py",
    ),
    Fault(
        "logits_to_keep is ignored",
        "modeling_causal_lm.py",
        "kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep",
        "kept = slice(None)",
        MODELING,
    ),
    Fault(
        "the loss forgets how many tokens a step has",
        "modeling_causal_lm.py",
        "labels=labels, vocab_size=self.config.vocab_size, **loss_keywords)",
        "labels=labels, vocab_size=self.config.vocab_size)",
        MODELING,
    ),
    Fault(
        "embeddings are not tied",
        "modeling_causal_lm.py",
        '_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}',
        "_tied_weights_keys = {}",
        MODELING,
    ),
    Fault(
        "training builds a cache",
        "modeling_common.py",
        "(self.config.use_cache and not self.training)",
        "self.config.use_cache",
        MODELING,
    ),
    Fault(
        "a parameter keeps what memory held",
        "modeling_attention_free.py",
        "            initialization.zeros_(module.gamma)\n",
        "",
        MODELING,
    ),
    Fault(
        "pooling averages over padding",
        "modeling_heads.py",
        "pooled = (hidden_states * kept).sum(1) / kept.sum(1).clamp_min(1)",
        "pooled = hidden_states.mean(1)",
        HEADS,
    ),
    Fault(
        "a masked language model sees the past only",
        "modeling_attention_free.py",
        "self.is_causal = config.is_decoder",
        "self.is_causal = True",
        MODELING,
    ),
    Fault(
        "a saved model names one Auto class only",
        "modeling_common.py",
        '{**(getattr(self.config, "auto_map", None) or {}), **self._auto_map}',
        "self.config.auto_map",
        REMOTE,
    ),
]


class Outcome(NamedTuple):
    fault: Fault
    caught_by: str | None  # the first test that failed, None if none did


def apply(fault: Fault, package: Path) -> None:
    """Makes the replacement in a copy of the package; a ValueError if its text does not stand there exactly once."""
    path = package / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.name!r}: {text.count(fault.old)} places in {fault.file} read {fault.old!r}, not 1.")
    path.write_text(text.replace(fault.old, fault.new))


def try_fault(fault: Fault) -> Outcome:
    """Runs the tests of a fault on a copy of the repository that has it."""
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        copy = Path(folder)
        for name in ("modeling_aft", "scripts", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "configuration"):
            (copy / name).symlink_to(ROOT / name)
        apply(fault, copy / "modeling_aft")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "--tb=no",
            "-p",
            "no:cacheprovider",
            f"tests/{fault.tests}",
        ]
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if run.returncode == 0:
        return Outcome(fault, None)
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", run.stdout, re.MULTILINE)
    if failed is None:
        raise RuntimeError(f"pytest did not run with the fault {fault.name!r}:\n{run.stdout}\n{run.stderr}")
    return Outcome(fault, failed[1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only faults whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many to try at once")
    options = parser.parse_args(arguments)
    chosen = [fault for fault in FAULTS if not options.words or any(word in fault.name for word in options.words)]
    if options.list:
        print(*(fault.name for fault in chosen), sep="\n")
        return 0
    survivors = 0
    print("| fault | file | caught by |\n|---|---|---|")
    with ThreadPoolExecutor(options.jobs) as pool:
        for fault, caught_by in pool.map(try_fault, chosen):
            survivors += caught_by is None
            print(f"| {fault.name} | {fault.file} | {caught_by or '**nothing**'} |", flush=True)
    print(f"\n{len(chosen) - survivors} of {len(chosen)} faults were caught.")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
