"""The hunt for mutants finds those that are there, and no others."""

import subprocess
import sys
import textwrap

import pytest

from tests.diffusion.mutants import mutants
from tests.diffusion.mutation import ROOT, equivalent, targets

SOURCE = textwrap.dedent(
    '''
    """A file."""

    LIMIT = 2.0


    def step(x: float, x0: float, level: float, below: float, eta: float = 1.0) -> float:
        """Down."""
        if level <= 0:
            raise ValueError(f"level must be above {0}")
        return move(x, x0, level / below - eta)[-1]
    '''
)


def test_every_simple_change_is_a_mutant_and_no_text_or_message_is():
    changes = {(m.function, m.change) for m in mutants("file.py", SOURCE)}
    assert changes == {
        ("", "2.0 -> 1.8"),
        ("step", "1.0 -> 0.9"),
        ("step", "level <= 0 -> level < 0"),
        ("step", "level <= 0 -> level <= 1"),
        ("step", "level <= 0 -> not level <= 0"),
        ("step", "move(x, x0, level / below - eta) -> move(x, x0, level / below + eta)"),
        ("step", "move(x, x0, level / below - eta) -> move(x, x0, eta - level / below)"),
        ("step", "level / below - eta -> level / below - 0.0"),
        ("step", "level / below - eta -> level * below - eta"),
        ("step", "level / below - eta -> below / level - eta"),
        ("step", "move(x, x0, level / below - eta)[-1] -> move(x0, x, level / below - eta)[-1]"),
        ("step", "-1 -> -2"),
        ("step", "-1 -> -0"),
        ("step", "move(x, x0, level / below - eta)[-1] -> move(x, x0, level / below - eta)[+1]"),
    }


def test_the_equivalent_ones_exist_and_each_has_its_reason():
    found = {mutant.key for file, source in targets().items() for mutant in mutants(file, source)}
    assert set(equivalent()) <= found
    assert all(equivalent().values())


HUNT = """
import ast, sys
from pathlib import Path
from tests.diffusion.mutants import Mutant, mutants
from tests.diffusion.mutation import hunt, targets

file = "samplers/base.py"
source = targets()[file]
every = mutants(file, source)
wanted = [m for m in every if m.function == "mixed" or "given == work" in m.change or "100.0" in m.change]
tree = ast.parse(source)
place, node = next((k, n) for k, n in enumerate(ast.walk(tree)) if isinstance(n, ast.Constant) and n.value == 100.0)
wanted.append(Mutant(file, "", node.lineno, "nothing", place, ast.Constant(100.0)))
done = hunt(wanted, {file: source}, [sys.argv[1]])
print(len(wanted), [(m.function, m.change) for m in done.survivors], done.broken)
"""

TESTS = """
import torch
from ldm.diffusion.samplers import base, euler, multistep
from ldm.diffusion.noise import NoiseLevel

def test_mixed():
    assert base.mixed([2.0, 3.0], [torch.tensor(5.0), torch.tensor(10.0)]) == 40

def test_constant():
    assert base.MOSTLY_NOISE == 100 and base.mostly_noise.__globals__["MOSTLY_NOISE"] == 100

def test_in_a_wrapper_that_others_were_made_by():
    levels = NoiseLevel(*(torch.tensor(v, dtype=torch.float64) for v in ([9.0, 0.0], [0.6, 1.0], [0.8, 0.0])))
    *_, step = euler(lambda x, level: x, torch.ones(1, 1, 1, 1, dtype=torch.float16), levels)
    assert step.x.dtype == torch.float16

def test_that_proves_nothing():
    assert base.mixed([2.0], [torch.tensor(1.0)]) == 3
"""


def test_what_the_tests_notice_is_caught_and_what_changes_nothing_survives(tmp_path):
    """The one test that fails as it is is named and left out."""
    (tmp_path / "test_some.py").write_text(TESTS)
    ran = subprocess.run(
        [sys.executable, "-c", HUNT, str(tmp_path / "test_some.py")], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    count, rest = ran.stdout.splitlines()[-1].split(" ", 1)
    assert int(count) > 5
    assert rest == "[('', 'nothing')] ['::test_that_proves_nothing']"


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_no_mutant_of_the_samplers_survives():
    ran = subprocess.run([sys.executable, "-m", "tests.diffusion.mutation"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]
