"""Do the tests notice? Each line of the samplers is made wrong in every simple way, and the tests are to fail.

    python -m tests.diffusion.mutation [--file onestep.py ...] [--list]

A mutant is one change of one expression: a coefficient, a sign, the order of two operands, a comparison. Tests are
collected and run once as they are, which shows which of them call which function; each mutant then lives in a fork,
where the new code is put into the functions that are already imported, and those tests run until one fails. Prints
the mutants that none caught; the exit status is 1 if one of them is not in equivalent_mutants.txt.
"""

import argparse
import ast
import gc
import importlib
import itertools
import logging
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import pytest
import torch

from tests.diffusion.mutants import Mutant, described, mutants, replaced

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "ldm" / "diffusion"
TESTS = (
    "diffusion/test_samplers*.py",
    "diffusion/test_noise.py",
    "parity/test_k_diffusion.py",
    "parity/test_schedulers.py",
)
LEFT_OUT = "not thousand and not exactly_n and not matrix"
"""Tests of many steps that quicker ones stand for."""
BUDGET = 40.0
"""Seconds of tests, the most telling first, after which a mutant counts as a survivor."""

ACCEPTED = ROOT / "tests" / "diffusion" / "equivalent_mutants.txt"
"""Mutants that cannot change a result: file | function | change, and below it, indented, why not."""


def plant(mutant: Mutant, source: str, module: ModuleType, functions: list[FunctionType]) -> None:
    """Put the mutant's code into the functions of an imported module, and its constants wherever they went.

    functions: all that there are of the files in question, those in wrappers and tables too.

    Raises ValueError where the change moves a variable of a closure.
    """
    tree = ast.parse(source)
    node = list(ast.walk(tree))[mutant.place]
    changed = ast.fix_missing_locations(replaced(tree, node, mutant.new))
    code = compile(changed, module.__file__ or "", "exec")
    codes = {_place(one): one for one in _inner(code)}
    fresh: dict[str, Any] = {"__name__": module.__name__, "__file__": module.__file__}
    exec(code, fresh)
    defaults = {function.__code__.co_qualname: function for function in _functions(fresh)}
    for function in functions:
        if function.__code__.co_filename == module.__file__:
            function.__code__ = codes[_place(function.__code__)]
            twin = defaults.get(function.__code__.co_qualname)
            if twin is not None:
                function.__defaults__, function.__kwdefaults__ = twin.__defaults__, twin.__kwdefaults__
    for name, value in fresh.items():
        _replace_constant(name, getattr(module, name, None), value)


def _place(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def _inner(code: CodeType) -> Iterator[CodeType]:
    """The code of all functions in it."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inner(constant)


def _functions(names: dict[str, Any]) -> Iterator[FunctionType]:
    """The functions of a module and of its classes, out of their wrappers."""
    for value in names.values():
        if isinstance(value, type) and value.__module__ == names.get("__name__", value.__module__):
            yield from _functions(dict(vars(value)) | {"__name__": value.__module__})
        while isinstance(value, FunctionType):
            yield value
            value = getattr(value, "__wrapped__", None)


def _replace_constant(name: str, old: Any, new: Any) -> None:
    if not isinstance(new, int | float | tuple | dict) or old == new or name.startswith("__"):
        return
    for module in list(sys.modules.values()):
        if module is not None and getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


class Hunt:
    """A plugin of pytest that runs the tests once to see what they call, then again in a fork for each mutant."""

    def __init__(self, wanted: list[Mutant], sources: dict[str, str]) -> None:
        self.wanted, self.sources = wanted, sources
        self.survivors: list[Mutant] = []
        self.broken: list[str] = []  # tests that fail without a mutant, and so prove nothing
        self.failed: str | None = None
        self.seconds: dict[str, float] = {}
        self.called: dict[str, set[tuple[str, str]]] = {}
        self.kills: dict[str, int] = {}
        self.done = False

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            raise RuntimeError(f"a test file does not load: {report.longrepr}")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_runtestloop(self, session: Any) -> bool:
        for item in session.items:
            self._watched(item)
            if self.failed:
                self.broken.append(self.failed)
                self.failed = None
        usable = [item for item in session.items if item.nodeid not in self.broken]
        files = {str(FOLDER / file) for file in self.sources}
        functions = [f for f in gc.get_objects() if type(f) is FunctionType and f.__code__.co_filename in files]
        gc.freeze()  # a fork that collects no garbage of its parent's copies little memory
        logging.info("%d tests, %.0f s", len(usable), sum(self.seconds.values()))
        for count, mutant in enumerate(self.wanted, 1):
            items = [i for i in usable if not mutant.function or mutant.key[:2] in self.called[i.nodeid]]
            items.sort(key=lambda item: (-self.kills.get(item.nodeid, 0), self.seconds[item.nodeid]))
            ends = itertools.accumulate(self.seconds[item.nodeid] for item in items)
            killer = self._caught(mutant, functions, [i for i, end in zip(items, ends, strict=True) if end < BUDGET])
            if killer is None:
                self.survivors.append(mutant)
                logging.info("%s", described(mutant))
            else:
                self.kills[killer] = self.kills.get(killer, 0) + 1
            if count % 100 == 0:
                logging.info("%d of %d mutants, %d survive", count, len(self.wanted), len(self.survivors))
        self.done = True
        return True

    def _watched(self, item: Any) -> None:
        """Run a test with a note of the functions it calls."""
        called: set[tuple[str, str]] = set()
        files = {str(FOLDER / file): file for file in self.sources}

        def note(frame: FrameType, event: str, _: Any) -> None:
            file = files.get(frame.f_code.co_filename)
            if event == "call" and file is not None:
                called.add((file, re.sub(r"\.<\w+>", "", frame.f_code.co_qualname)))

        start = time.perf_counter()
        sys.settrace(note)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        sys.settrace(None)
        self.seconds[item.nodeid], self.called[item.nodeid] = time.perf_counter() - start, called

    def _caught(self, mutant: Mutant, functions: list[FunctionType], items: list[Any]) -> str | None:
        """What caught it: the test, or what went wrong before; None if nothing did."""
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            self._run(mutant, functions, items, tell)
        os.close(tell)
        found = None
        if select.select([told], [], [], 4 * BUDGET)[0]:
            found = os.read(told, 1000).decode() or "the process died"
        else:
            os.kill(child, signal.SIGKILL)
            found = "it runs for ever"
        os.close(told)
        os.waitpid(child, 0)
        return None if found == "-" else found

    def _run(self, mutant: Mutant, functions: list[FunctionType], items: list[Any], tell: int) -> None:
        """In the fork: never returns."""
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        found = "-"
        try:
            plant(mutant, self.sources[mutant.file], sys.modules[_module(mutant.file)], functions)
            for item, following in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if self.failed:
                    found = self.failed
                    break
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        os.write(tell, found.encode()[:1000])
        os._exit(0)


def _module(file: str) -> str:
    return "ldm.diffusion." + file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def hunt(wanted: list[Mutant], sources: dict[str, str], tests: list[str]) -> Hunt:
    """The mutants, hunted. Raises RuntimeError if the tests do not load."""
    torch.set_num_threads(1)  # a fork has none but its own thread
    for file in sources:
        importlib.import_module(_module(file))
    plugin = Hunt(wanted, sources)
    off = [argument for name in ("cacheprovider", "terminal", "timeout", "xdist") for argument in ("-p", f"no:{name}")]
    options = [
        "-o",
        "addopts=",
        "-m",
        "not slow and not long",
        "-k",
        LEFT_OUT,
        "--confcutdir",
        str(ROOT / "tests" / "diffusion"),
    ]
    pytest.main([*off, *options, "--rootdir", str(ROOT), *tests], plugins=[plugin])
    if not plugin.done:
        raise RuntimeError("the tests do not load")
    return plugin


def targets() -> dict[str, str]:
    """File under ldm/diffusion -> its source."""
    files = [*sorted((FOLDER / "samplers").glob("*.py")), FOLDER / "brownian.py", FOLDER / "spacings.py"]
    return {str(file.relative_to(FOLDER)): file.read_text() for file in files}


def equivalent() -> dict[tuple[str, str, str], str]:
    """(file, function, change) -> why no result can be different."""
    lines = ACCEPTED.read_text().splitlines()
    keys = [tuple(line.split(" | ", 2)) for line in lines[::2]]
    return {
        (file, function, change): why.strip() for (file, function, change), why in zip(keys, lines[1::2], strict=True)
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Which mutants of the samplers survive the tests?")
    parser.add_argument("--file", action="append", help="a file alone, such as onestep.py; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sources = {k: v for k, v in targets().items() if not asked.file or Path(k).name in asked.file}
    wanted = [mutant for file, source in sources.items() for mutant in mutants(file, source)]
    if asked.list:
        for mutant in wanted:
            logging.info("%s", described(mutant))
        return 0
    tests = [str(file) for pattern in TESTS for file in sorted((ROOT / "tests").glob(pattern))]
    done = hunt(wanted, sources, tests)
    accepted = equivalent()
    missed = [mutant for mutant in done.survivors if mutant.key not in accepted]
    for file in sources:
        each = [sum(mutant.file == file for mutant in group) for group in (wanted, done.survivors, missed)]
        logging.info("%-25s %4d mutants, %4d caught, %3d equivalent, %3d missed",
                     file, each[0], each[0] - each[1], each[1] - each[2], each[2])  # fmt: skip
    for mutant in missed:
        logging.info("missed: %s", described(mutant))
    for test in done.broken:
        logging.info("fails without a mutant: %s", test)
    return 1 if missed or done.broken else 0


if __name__ == "__main__":
    sys.exit(main())
