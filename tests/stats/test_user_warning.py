"""A warning names the line of the user's own file, also where it comes by way of installed packages, and once."""

import ast
import importlib.util
import site
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch
from toys import Net, latents

from dithooks import DitCacheConfig, DitHooksWarning, dit_cache, timestep_scope
from dithooks.stats import user_warning

LIBRARY = "def apply(function): return function()"


def code_in(place: Path, text: str):
    """Return a module made of a text, as if it lay at this place."""
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(place.stem, None))
    exec(compile(text, str(place), "exec"), vars(module))
    return module


def test_installed_packages_are_passed_over():
    library = code_in(Path(sysconfig.get_path("purelib"), "server", "loop.py"), LIBRARY)
    with pytest.warns(DitHooksWarning) as caught:
        library.apply(lambda: user_warning.warn_user("here"))  # this line
    assert Path(caught[0].filename) == Path(__file__)
    assert "# this line" in Path(__file__).read_text().splitlines()[caught[0].lineno - 1]


def test_a_program_that_is_installed_itself_is_named(monkeypatch):
    """If every caller is an installed package, the nearest is named, and not this library."""
    monkeypatch.setattr(user_warning, "_installed", lambda: ("",))
    server = Path(sysconfig.get_path("purelib"), "server", "loop.py")
    with pytest.warns(DitHooksWarning) as caught:
        code_in(server, LIBRARY).apply(lambda: user_warning.warn_user("here"))
    assert Path(caught[0].filename) == Path(__file__)  # of the two, the lambda is the nearer


def test_once_for_a_line_and_cause():
    """A cache attached anew for every prompt says the same once, as Python shows a message once at a line."""
    net = Net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            with dit_cache(net, DitCacheConfig(5, 2)):
                for step in range(3):
                    with timestep_scope(step, steps=3):
                        net(latents(), torch.tensor(0.5))
    assert len(caught) == 1
    line = Path(caught[0].filename).read_text().splitlines()[caught[0].lineno - 1]
    assert line.strip() in ("net(latents(), torch.tensor(0.5))", "with timestep_scope(step, steps=3):")


def test_every_warning_goes_this_way():
    """No other file calls ``warnings.warn``, whose ``stacklevel`` is right for one depth of calls only."""
    package = Path(user_warning.__file__).parents[1]
    calls = {
        file.relative_to(package).with_suffix("").as_posix()
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("warnings.warn")
    }
    assert calls == {"stats/user_warning"}


def test_code_without_a_module_is_warned_too():
    """Of ``exec``, as of a console or a service that runs snippets."""
    with pytest.warns(DitHooksWarning, match="here"):
        exec("warn('here')", {"warn": user_warning.warn_user})


def test_a_namespace_that_refuses_to_be_written():
    """Python's own warnings write into it as into a plain dictionary, and so do these."""

    class ReadOnly(dict):
        def __setitem__(self, key, value):
            raise TypeError("read-only")

        def setdefault(self, key, value=None):
            raise TypeError("read-only")

    with pytest.warns(DitHooksWarning, match="here"):
        exec("warn('here')", ReadOnly(warn=user_warning.warn_user, __builtins__={}))


def test_packages_of_the_user_site_are_passed_over(monkeypatch, tmp_path):
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path))
    user_warning._installed.cache_clear()
    try:
        with pytest.warns(DitHooksWarning) as caught:
            code_in(tmp_path / "server.py", LIBRARY).apply(lambda: code_in(tmp_path / "other.py", LIBRARY).apply(here))
        assert Path(caught[0].filename) == Path(__file__)
    finally:
        user_warning._installed.cache_clear()


def here():
    exec(
        compile("warn('here')", str(Path(site.getusersitepackages(), "inner.py")), "exec"),
        {"warn": user_warning.warn_user},
    )
