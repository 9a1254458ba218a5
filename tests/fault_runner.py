"""Puts a deliberate fault in the place of a function of the package or of the programs, and runs tests on it.

A fault is bound to a function by its name. The function keeps its identity and gets another body, so that every
reference to it has the fault, be it imported by name, in a table of kernels, in a closure or in a class. That happens
as soon as its module has been executed, before any other module can have called it, and also where a test loads a copy
of the package as remote code; not in programs that a test starts.

Each run of tests is a process of its own, forked from one that has imported the libraries, but not the package.
"""

import importlib
import inspect
import io
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from launching import processes


ROOT = Path(__file__).parents[1]
PACKAGE, PROGRAMS = "modeling_aft", "aft"
REMOTE_CODE = "transformers_modules"  # the package of it
# The module that has the list `FAULTS`, and the name of the function that calls the one with the fault.
LIST, REPLACED = "faults", "<replaced by a fault>"


class Fault(NamedTuple):
    """
    Attributes:
        name: what is wrong.
        where: the function that has it, `module.function`, `module.Class.method`, or a constant or table of that kind;
            of the programs with `aft.` before it.
        change: gives what is to stand in its place, from the original.
        tests: the file of tests that must catch it.
    """

    name: str
    where: str
    change: Callable[[Any], Any]
    tests: str


class BrokenFault(Exception):
    """A fault that does not fit the code, so that it says nothing of the tests."""


class Failure(NamedTuple):
    """The first test that failed, and what is wrong with the run itself, if anything is."""

    test: str
    broken: str | None = None


class Outcome(NamedTuple):
    fault: Fault
    caught_by: str | None  # the first test that fails with the fault, and passes without, None if none does
    broken: str | None = None


# The place of a fault


def place(fault: Fault) -> tuple[str, str, list[str]]:
    """The package and the module of a fault's function, and the names that lead to it there."""
    of_programs = fault.where.startswith(f"{PROGRAMS}.")
    module, *names = fault.where.removeprefix(f"{PROGRAMS}.").split(".")
    return PROGRAMS if of_programs else PACKAGE, module, names


def find(fault: Fault, module: ModuleType) -> tuple[Any, str, Any]:
    """The module or class that the fault's function stands in, its name there, and what it is: a function beneath all
    decorators, or a value."""
    package, _, (*classes, name) = place(fault)
    owner = module
    for part in classes:
        owner = vars(owner).get(part)
    if not hasattr(owner, "__dict__") or name not in vars(owner):
        raise BrokenFault(f"{fault.name!r}: there is no {fault.where} in {package}.")
    found = vars(owner)[name]
    if isinstance(found, property):
        found = found.fget
    elif isinstance(found, (classmethod, staticmethod)):
        found = found.__func__
    if inspect.isroutine(found) and not isinstance(inspect.unwrap(found), FunctionType):
        raise BrokenFault(f"{fault.name!r}: {fault.where} is no Python function.")
    return owner, name, inspect.unwrap(found) if callable(found) and not inspect.isclass(found) else found


def changed(fault: Fault, original: Any) -> Any:
    """What is to stand in the place of the original, checked to take the same arguments."""
    replacement = fault.change(original)
    if isinstance(original, FunctionType):
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        takes, wanted = (list(inspect.signature(function).parameters.values()) for function in (replacement, original))
        named, wanted = [p.name for p in takes if p.kind not in variable], [p.name for p in wanted]
        if named != (wanted if len(named) == len(takes) else wanted[: len(named)]):
            raise BrokenFault(f"{fault.name!r} takes {named}, but {fault.where} takes {wanted}.")
    elif type(replacement) is not type(original):
        raise BrokenFault(f"{fault.name!r} is a {type(replacement).__name__}, but {fault.where} is not.")
    return replacement


def copy_of(function: FunctionType) -> FunctionType:
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def give_body(function: FunctionType, replacement: FunctionType) -> None:
    """Makes a function do what another does."""
    cells = ", ".join(function.__code__.co_freevars)  # its new code must have as many
    source = (
        f"def make({cells}):\n    def replaced(*args, **kwargs):\n        {cells or 'pass'}\n"
        f"        return __fault__(*args, **kwargs)\n    return replaced"
    )
    exec(compile(source, REPLACED, "exec"), namespace := {})
    function.__signature__ = inspect.signature(function)
    function.__code__ = namespace["make"](*[None] * len(function.__code__.co_freevars)).__code__
    function.__defaults__ = function.__kwdefaults__ = None
    function.__globals__["__fault__"] = replacement


def install(fault: Fault, module: ModuleType) -> None:
    """Puts a fault into a module."""
    owner, name, original = find(fault, module)
    if isinstance(original, FunctionType):
        copy = copy_of(original)
        give_body(original, changed(fault, copy))
    else:
        setattr(owner, name, changed(fault, original))


def install_on_import(fault: Fault) -> None:
    """Puts a fault into its module once that has been executed, and into every copy that is loaded as remote code."""
    (package, wanted, _), execute = place(fault), SourceFileLoader.exec_module

    def exec_module(loader, module):
        execute(loader, module)
        parts = module.__name__.split(".")
        if parts == [package, wanted] or (package == PACKAGE and (parts[0], parts[-1]) == (REMOTE_CODE, wanted)):
            install(fault, module)

    SourceFileLoader.exec_module = exec_module


def check(fault: Fault) -> None:
    """Raises a BrokenFault if a fault does not fit the package, or its tests do not exist. Nothing is changed."""
    package, name, _ = place(fault)
    try:
        module = importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError:
        raise BrokenFault(f"{fault.name!r}: there is no {name} in {package}.") from None
    changed(fault, find(fault, module)[2])
    if not (ROOT / "tests" / fault.tests).is_file():
        raise BrokenFault(f"{fault.name!r}: there is no {fault.tests}.")


# Runs of tests


class Recorder:
    """A plugin of pytest that remembers the first failure, which is to come soon: each test function has its turn
    before one of them comes with other parameters."""

    def __init__(self):
        self.failure: Failure | None = None
        self.inside = False  # of the fault itself

    def pytest_collection_modifyitems(self, items):
        random.Random(0).shuffle(items)  # else the first parameters of all of them would be much the same
        turns = Counter()
        order = {}
        for item in items:
            function = item.nodeid.partition("[")[0]
            order[item] = turns[function]
            turns[function] += 1
        items.sort(key=order.get)

    def pytest_exception_interact(self, node, call, report):
        last = call.excinfo.traceback[-1] if call.excinfo.traceback else None
        self.inside = last is not None and str(last.path).endswith((REPLACED, f"{os.sep}{LIST}.py"))

    def pytest_runtest_logreport(self, report):
        if report.failed and self.failure is None:
            broken = f"it raises an error of its own:\n{report.longreprtext[-1500:]}" if self.inside else None
            self.failure = Failure(report.nodeid.removeprefix("tests/"), broken)

    def pytest_collectreport(self, report):
        if report.failed and self.failure is None:
            broken = f"the tests cannot be imported:\n{report.longreprtext[-1500:]}"
            self.failure = Failure(report.nodeid.removeprefix("tests/"), broken)


def run_tests(tests: str, fault_name: str | None, without: list[str]) -> Failure | None:
    """Runs tests in this process up to the first that fails, with the fault of that name, if any; None if all pass."""
    import pytest

    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    if found := {PACKAGE, PROGRAMS} & {name.partition(".")[0] for name in sys.modules}:
        raise BrokenFault(f"{' and '.join(found)} has been imported before the fault.")
    if fault_name is not None:
        faults = importlib.import_module(LIST).FAULTS
        install_on_import(next(fault for fault in faults if fault.name == fault_name))
    recorder, output = Recorder(), io.StringIO()
    options = ["-q", "-x", "-p", "no:cacheprovider", *(f"--deselect=tests/{test}" for test in without)]
    with redirect_stdout(output), redirect_stderr(output):
        status = pytest.main([*options, f"tests/{tests}"], plugins=[recorder])
    if recorder.failure is None and status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise BrokenFault(f"pytest did not run:\n{output.getvalue()}")
    return recorder.failure


def first_failure(tests: str, fault: Fault | None = None, without: tuple[str, ...] = ()) -> Failure | None:
    """The same in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=processes()) as process:
        return process.submit(run_tests, tests, fault and fault.name, list(without)).result()


@cache
def passes(test: str) -> bool:
    """Whether a test passes without any fault."""
    return first_failure(test) is None


def try_fault(fault: Fault) -> Outcome:
    """Runs the tests of a fault, without those that fail by themselves."""
    without = ()
    while failure := first_failure(fault.tests, fault, without):
        if failure.broken is not None or passes(failure.test):
            return Outcome(fault, failure.test, failure.broken)
        without = (*without, failure.test)
    return Outcome(fault, None)
