"""The list of deliberate faults fits the code; `python tests/faults.py` puts each of them in and runs the tests."""

import ast
import shutil

import pytest
from faults import FAULTS, ROOT, apply, try_fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_applies_to_the_code_and_leaves_it_readable(fault, tmp_path):
    shutil.copyfile(ROOT / "modeling_aft" / fault.file, tmp_path / fault.file)
    apply(fault, tmp_path)
    ast.parse((tmp_path / fault.file).read_text())
    assert (ROOT / "tests" / fault.tests).is_file()


def test_names_are_different():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_a_fault_is_caught_and_its_absence_is_not():
    fault = next(fault for fault in FAULTS if fault.name == "pooling averages over padding")
    assert try_fault(fault).caught_by.startswith("test_heads.py::test_padding_changes_nothing")
    assert try_fault(fault._replace(new=fault.old)).caught_by is None
