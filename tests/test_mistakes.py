"""Every mistake gets an error of the library: short, naming the value and what to do; docs/mistakes.md has them."""

import pytest

pytest.importorskip("diffusers")

from mistakes import MISTAKES, PAGE, namespace, page, tried

import dithooks


@pytest.fixture(scope="module")
def names():
    return namespace()


def test_there_are_forty():
    assert len(set(MISTAKES)) == len(MISTAKES) >= 40


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_said(mistake, names):
    kind, message = tried(mistake, names)
    assert 20 <= len(message) <= 300
    assert kind in ("exit code 2", "MissingFile") or issubclass(getattr(dithooks, kind), dithooks.DitHooksError)


def test_the_page():
    assert PAGE.read_text(encoding="utf-8") == page(), "PYTHONPATH=tests:. python tests/mistakes.py writes it"
