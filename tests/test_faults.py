"""The list of deliberate faults fits the code; `python tests/faults.py` puts each of them in and runs the tests."""

import pytest
from fault_runner import BrokenFault, Fault, check, first_failure, try_fault
from faults import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_fits_the_code(fault):
    check(fault)


def test_names_are_different():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize(
    "where, change, message",
    [
        ("ops_states.merge", lambda original: original, "there is no ops_states"),
        ("ops_state.unite", lambda original: original, "there is no ops_state.unite"),
        ("cache_state.Layer.crop", lambda original: original, "there is no cache_state.Layer.crop"),
        ("aft.painting.draw", lambda original: original, "there is no aft.painting.draw in aft"),
        ("cache_state.GrowingStateLayer.crop", lambda original: original, "there is no cache_state.Grow"),  # inherited
        ("ops_state.merge", lambda original: lambda first, last: first, "takes"),
        ("ops_cpu._LARGEST_SUM", lambda original: None, "is a NoneType"),
    ],
)
def test_what_does_not_fit_is_named(where, change, message):
    with pytest.raises(BrokenFault, match=message):
        check(Fault("a fault", where, change, "test_ops.py"))


def test_a_fault_is_caught_and_its_absence_is_not():
    fault = next(fault for fault in FAULTS if fault.name == "pooling averages over padding")
    caught_by = try_fault(fault).caught_by
    assert caught_by.startswith("test_heads.py::")
    assert first_failure(caught_by) is None
