"""The mutants of the engine: each edit can be made, and the tests that it is tried against exist."""

from pathlib import Path

import pytest

from bench.checks.mutant_list import EXPLAINED, MUTANTS, TESTS
from bench.checks.mutants import mutated

ROOT = Path(__file__).parents[2]


def test_each_edit_can_be_made():
    for mutant in MUTANTS:
        mutated(mutant)


@pytest.mark.parametrize("test", sorted({test for tests in TESTS.values() for test in tests}))
def test_what_they_are_tried_against_exists(test):
    assert (ROOT / test).is_file()


def test_survivors_are_explained_by_name():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert set(EXPLAINED) <= {mutant.name for mutant in MUTANTS}
