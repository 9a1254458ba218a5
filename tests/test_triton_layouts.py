"""How the layouts of the Triton kernels are chosen, kept and read. Without a GPU: times are made up."""

import csv
import importlib.util
import sys
from types import SimpleNamespace

import compile_triton
import pytest
import torch
import tune_triton

from aft.benchmark_rows import LAYOUT_COLUMNS, REGISTER_COLUMNS
from aft.triton_kernels import Sizes, add_layouts, best_layouts
from modeling_aft import ops_triton, triton_language, triton_layouts


GPU = "sm_80"


def row(form, columns, forward, backward, length=64, warps=1):
    layout = {"columns": str(columns), "num_warps": str(warps), "processor_warps": "8"}
    size = {"batch_size": "1", "length": str(length), "width": "32", "heads": "2", "window": "8", "dtype": "bfloat16"}
    times = {"forward_ms": str(forward), "backward_ms": str(backward)}
    return {**dict.fromkeys(LAYOUT_COLUMNS, ""), "form": form, **layout, **size, **times, "architecture": GPU}


def columns_of(layouts):
    return {(form, name): best["columns"] for form, ways in layouts[GPU].items() for name, best in ways.items()}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A copy of the file of layouts, in the place of the package's."""
    path = tmp_path / "triton_layouts.py"
    with open(triton_layouts.__file__, encoding="utf-8") as file:
        path.write_text(file.read(), encoding="utf-8")
    monkeypatch.setattr(triton_layouts, "__file__", str(path))
    monkeypatch.setattr(triton_layouts, "LAYOUTS", {**triton_layouts.LAYOUTS})
    return path


def layouts_in(path):
    spec = importlib.util.spec_from_file_location("written_layouts", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LAYOUTS


def test_the_fastest_layout_of_each_direction_is_chosen_over_all_forms_and_sizes():
    rows = [row("simple", 16, 1.0, 5.0), row("simple", 32, 2.0, 4.0)]
    # Of local 16 is much faster, of conv a little slower; a long input counts as much as a short one.
    rows += [row("local", 16, 1.0, 1.0), row("local", 32, 2.0, 1.1)]
    rows += [row("conv", 16, 12.0, 40.0, 640), row("conv", 32, 10.0, 10.0, 640)]
    assert columns_of(best_layouts(rows)) == {
        ("simple", "forward"): 16,
        ("simple", "backward"): 32,
        ("windowed", "forward"): 16,
        ("windowed", "backward"): 32,
    }


def test_a_layout_has_the_fields_of_its_form():
    fields = {
        "rows": "128",
        "columns": "64",
        "depth": "32",
        "num_warps": "8",
        "num_stages": "3",
        "processor_warps": "",
    }
    found = best_layouts([{**row("full", 64, 1.0, 2.0), **fields}, row("simple", 16, 1.0, 1.0)])
    layout = triton_layouts.LAYOUTS["default"]["full"]["forward"]
    assert found[GPU]["full"] == {"forward": layout, "backward": layout}
    assert found[GPU]["simple"]["forward"] == {"columns": 16, "num_warps": 1, "processor_warps": 8}


def test_rows_as_they_are_measured_choose_a_layout(monkeypatch):
    """Each has the fields of its own form alone."""
    args = SimpleNamespace(columns=[16, 32], warps=[1], processor_warps=[8], forms=["simple", "full"], seconds=60)
    args.sizes, args.dtype = [Sizes(1, 64, 32, 2, 8)], "bfloat16"
    times = {"forward_ms": "1", "backward_ms": "2"}
    monkeypatch.setattr(tune_triton, "measure", lambda args, form, layout, sizes: times)
    monkeypatch.setattr(tune_triton, "compile_in_time", lambda args, cases, deadline: cases)
    monkeypatch.setattr(tune_triton, "processor_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(ops_triton, "processor", lambda device: (GPU, 100))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3"))
    rows = tune_triton.measure_layouts(args)
    assert {form: set(ways) for form, ways in best_layouts(rows)[GPU].items()} == {
        "simple": {"forward", "backward"},
        "full": {"forward", "backward"},
    }


def test_a_layout_that_was_not_timed_at_all_sizes_is_not_chosen():
    rows = [row("simple", 16, 1.0, "", 64), row("simple", 16, "", "", 640)]
    rows += [row("simple", 32, 3.0, 3.0, length) for length in (64, 640)]
    assert columns_of(best_layouts(rows)) == {("simple", "forward"): 32, ("simple", "backward"): 32}
    assert best_layouts(rows[:2]) == best_layouts([]) == {}


def test_entries_are_added_and_the_file_stays_as_the_formatter_writes_it(table):
    before, shipped = table.read_text(encoding="utf-8"), layouts_in(table)
    add_layouts(table, {})
    assert table.read_text(encoding="utf-8") == before
    layout = {"columns": 16, "num_warps": 2, "processor_warps": 4}
    add_layouts(table, {GPU: {"simple": {"forward": layout}}})
    add_layouts(table, {GPU: {"windowed": {"backward": layout}}, "sm_90": {"simple": {"forward": layout}}})
    assert layouts_in(table) == {
        "default": shipped["default"],
        GPU: {"simple": {"forward": layout}, "windowed": {"backward": layout}},
        "sm_90": {**shipped["sm_90"], "simple": {"forward": layout}},
    }
    after = table.read_text(encoding="utf-8")
    assert after.startswith(before.partition("LAYOUTS = ")[0]) and after.endswith("    },\n}\n")


def test_the_kernels_read_the_entry_of_their_gpu(monkeypatch):
    layout = {"columns": 16, "num_warps": 2, "processor_warps": 4}
    monkeypatch.setitem(triton_layouts.LAYOUTS, GPU, {"simple": {"forward": layout}})
    for module in (triton_language, ops_triton):
        monkeypatch.setattr(module, "processor", lambda device: (GPU, 100))
    device, default = torch.device("cpu"), triton_layouts.LAYOUTS["default"]
    assert ops_triton.layout_of("simple", "forward", device) == layout
    assert ops_triton.layout_of("simple", "backward", device) == default["simple"]["backward"]
    assert ops_triton.layout_of("windowed", "forward", device) == default["windowed"]["forward"]
    # 400 warps are wanted, and each program has two of them; a chunk has eight tiles at least.
    chunks = [
        ops_triton._chunks(programs, tiles, layout, device) for programs, tiles in ((10, 800), (10, 80), (300, 80))
    ]
    assert chunks == [20, 10, 1]


@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", ("default", 0)), ("cuda:0", ("sm_90", 132))], ids=["cpu", "cuda"]
)
def test_what_a_processor_is_called(device, expected, monkeypatch):
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert ops_triton.processor.__wrapped__(torch.device(device)) == expected


def write_table(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LAYOUT_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def test_layouts_that_were_measured_elsewhere_are_put_into_the_table(table, tmp_path, capsys):
    path = tmp_path / "times.csv"
    write_table(path, [row("simple", 16, 1.0, 1.0), row("simple", 32, 2.0, 2.0), row("conv", 16, "", "")])
    best = {"columns": 16, "num_warps": 1, "processor_warps": 8}
    written = tune_triton.main(["--chosen_from", str(path)])
    assert layouts_in(table)[GPU] == written[GPU] == {"simple": {"forward": best, "backward": best}}
    assert "1 of 3 forms and layouts at a size have no time" in capsys.readouterr().out
    write_table(path, [])
    assert tune_triton.main(["--chosen_from", str(path)]) == {}


def test_a_package_that_cannot_be_written_to_is_refused(table, tmp_path, monkeypatch):
    path = tmp_path / "times.csv"
    write_table(path, [row("simple", 16, 1.0, 1.0)])
    monkeypatch.setattr(tune_triton.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="tune_triton.py must be able to write .*triton_layouts.py"):
        tune_triton.main(["--chosen_from", str(path)])


def test_layouts_near_the_default_come_first():
    args = SimpleNamespace(columns=[16, 32, 64], warps=[1, 2, 4], processor_warps=[8, 16], forms=["simple", "conv"])
    cases = tune_triton.in_order(args)
    assert len(cases) == 36 and [form for form, _ in cases[:2]] == ["simple", "conv"]
    args.forms = ["conv", "full"]
    mixed = tune_triton.in_order(args)
    assert [form for form, _ in mixed] == ["conv", "full"] * 10 + ["conv"] * 8
    shipped = triton_layouts.LAYOUTS["sm_90"]["full"]["forward"]
    assert mixed[1] == ("full", shipped) and ("full", triton_layouts.LAYOUTS["default"]["full"]["forward"]) in mixed
    assert cases[0][1] == tune_triton.DEFAULT
    assert cases[-1][1] in [{"columns": columns, "num_warps": 4, "processor_warps": 16} for columns in (16, 64)]


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        (tune_triton, ["--sizes", "0x8"], "--sizes must be at least 1, got 0x8"),
        (
            tune_triton,
            ["--seconds", "0", "--warps", "3"],
            "--warps must be powers of 2, got 3; --seconds must be posi",
        ),
        (tune_triton, ["--chosen_from", "nowhere.csv"], "--chosen_from: no such file: nowhere.csv"),
        (tune_triton, [], "tune_triton.py needs a CUDA device and the package triton, and there is none here"),
        (compile_triton, ["--columns", "16"], r"--columns and --warps must be given together, got \[16\] and None"),
        (compile_triton, ["--columns", "1", "--warps", "3"], "--columns must be powers .* got 1; --warps .*, got 3"),
        (compile_triton, ["--architecture", "H100", "--jobs", "0"], "--architecture .* got H100; --jobs .* got 0"),
    ],
    ids=lambda value: " ".join(value) or "none" if isinstance(value, list) else "",
)
def test_wrong_flags_are_refused(program, flags, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        program.main(flags)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_what_kernels_take_is_noted(tmp_path, monkeypatch):
    """Of one form in another layout than the default; the compiler itself is left out."""
    kernel = SimpleNamespace(log="Used 40 registers, 8 bytes spill stores, 4 bytes spill loads")
    kernel.metadata = SimpleNamespace(shared=16, num_warps=2)
    monkeypatch.setattr("triton.JITFunction.run", lambda *arguments, **options: kernel)
    monkeypatch.setattr(compile_triton, "resources", lambda kernel: {"registers": 40, "spill_stores": 8})
    flags = ["--forms", "simple", "--dtypes", "bfloat16", "--columns", "16", "--warps", "2"]
    rows = compile_triton.main([*flags, "--csv", str(tmp_path / "registers.csv")])
    with open(tmp_path / "registers.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert tuple(written[0]) == REGISTER_COLUMNS and len(written) == len(rows) == 8
    assert {(r["columns"], r["registers"], r["architecture"]) for r in written} == {("16", "40", "sm_90")}
    assert ["_forward", "_backward"] == [r["kernel"] for r in written if r["kernel"] in ("_forward", "_backward")]
