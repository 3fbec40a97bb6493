"""``dithooks env``: what it says of sound environments, and of those in which PyTorch itself cannot be imported."""

import importlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dithooks import __version__
from dithooks.cli.main import main
from dithooks.environment import ascend
from dithooks.environment import env_report as env
from dithooks.environment import torch_subprocess as torch_probe
from dithooks.environment.optional_packages import EXTRAS, missing_extras

ROOT = Path(__file__).parents[2]
SOUND = {
    "dithooks": "1",
    "plan_schemas": [1, 2],
    "missing": [],
    "python": {"version": "3.11.7", "executable": "/usr/bin/python", "platform": "Linux"},
    "torch": {
        "installed": "2.10.0+cpu",
        "imports": True,
        "error": None,
        "imports_without_backends": None,
        **{"version": "2.10.0+cpu", "git": "0", "build": {"CUDA": None}, "threads": 8, "distributed": ["gloo", "hccl"]},
    },
    "accelerator": {"type": "npu", "devices": [{"name": "Ascend910B3", "free": 2**35, "total": 2**36}]},
    "backends": [{"name": "torch_npu", "distribution": "torch_npu", "version": "2.10.0"}],
    "torch_npu": {"installed": "2.10.0", "error": None},
    "cann": {"home": "/opt/cann", "set_by": "ASCEND_HOME_PATH", "version": "9.0.0", "scripts": [], "libraries": {}},
    "launch": {},
    "packages": {},
    "compiler": {"path": "/usr/bin/g++", "version": "g++ 12"},
}
NONE = {**SOUND, "backends": [], "torch_npu": {"installed": None}, "cann": {**SOUND["cann"], "home": None}}


def changed(report, **parts):
    """A report with some of it otherwise."""
    return {
        **report,
        **{name: {**report[name], **new} if isinstance(new, dict) else new for name, new in parts.items()},
    }


def said(report):
    return [(level, what, remedy) for level, what, remedy in ascend.findings(report)]


def command(*arguments, path=None, **environment):
    """The installed command, as pip's script calls it, in an environment with more packages."""
    code = "import sys; sys.argv[0] = 'dithooks'; from dithooks.cli.main import main; sys.exit(main())"
    paths = os.pathsep.join(str(each) for each in (path, ROOT) if each is not None)
    clean = {name: value for name, value in os.environ.items() if name != ascend.SWITCH and "ASCEND" not in name}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**clean, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=250,
    )


def plugin(folder, version, source):
    """A package torch_npu that registers itself with PyTorch as the real one does, and of which this is the code."""
    (folder / "torch_npu").mkdir(parents=True)
    (folder / "torch_npu" / "__init__.py").write_text(source)
    info = folder / f"torch_npu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    (info / "RECORD").write_text("")
    return folder


HAL = "libascend_hal.so: cannot open shared object file: No such file or directory"
RAISES = f"raise ImportError({HAL!r})\n"
EXITS = "import sys\nprint('ImportError: libhccl.so: no such file', file=sys.stderr)\nsys.exit()\n"
WORKS = "def _autoload(): ...\n"


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """torch_npu 2.8.0.post2 without driver and CANN."""
    return plugin(tmp_path_factory.mktemp("site"), "2.8.0.post2", RAISES)


@pytest.fixture(scope="module")
def report():
    """Of the environment that the tests run in."""
    return env.look()


@pytest.fixture(scope="module")
def diagnosed(broken):
    """What the command prints where the plug-in breaks PyTorch, and its report."""
    file = broken / "env.json"
    return command("env", "--json", str(file), path=broken), json.loads(file.read_text())


class TestHere:
    def test_it_is_sound(self, report):
        assert report["sound"], report["findings"]
        assert report["dithooks"] == __version__
        assert report["torch"]["imports"]
        assert report["torch"]["version"] == torch.__version__
        assert report["torch"]["git"] == torch.version.git_version
        assert report["torch"]["imports_without_backends"] is None
        assert report["packages"]["numpy"]
        assert "gloo" in report["torch"]["distributed"]
        assert (report["accelerator"] is None) == (not torch.accelerator.is_available())
        json.dumps(report)

    @pytest.mark.parametrize("rich", [True, False])
    def test_text(self, report, monkeypatch, capsys, rich):
        if not rich:
            monkeypatch.setitem(sys.modules, "rich.console", None)
        env.show(report)
        shown = capsys.readouterr().out
        assert re.search(rf"^dithooks +{re.escape(__version__)}", shown, re.MULTILINE)
        assert re.search(rf"^torch +{re.escape(torch.__version__)}", shown, re.MULTILINE)

    def test_it_is_short_and_names_what_is_missing(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "100")
        lacking = [{"what": "plots need matplotlib", "install": 'pip install "dithooks[plot]"'}]
        env.show(changed(SOUND, findings=[], missing=lacking, packages={"diffusers": "0.40.0", "numpy": "2.4"}))
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert lines[0] == "dithooks     1, plans of schema 1 and 2"
        assert "diffusers    0.40.0" in lines
        assert "packages     numpy 2.4" in lines
        assert 'not here     plots need matplotlib: pip install "dithooks[plot]"' in lines
        assert len(lines) < 20

    def test_files(self, report, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(env, "look", lambda: report)
        assert main(["env", "--json", str(tmp_path / "env.json")]) == 0
        assert json.loads((tmp_path / "env.json").read_text()) == report
        assert "Python" in capsys.readouterr().out
        assert main(["env", "--json", "-"]) == 0
        assert json.loads(capsys.readouterr().out) == report
        assert main(["env", "--json", str(tmp_path / "no" / "env.json")]) == 2
        assert re.fullmatch(r"dithooks: error: .*cannot be written.*\n", capsys.readouterr().err)
        assert main(["env", "--json", str(tmp_path)]) == 2
        assert "cannot be written" in capsys.readouterr().err
        done = command("env", "--json", str(tmp_path / "no" / "env.json"))
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"dithooks: error: .*cannot be written.*\n", done.stderr)

    def test_a_broken_one_is_exit_code_1(self, report, monkeypatch):
        monkeypatch.setattr(env, "look", lambda: {**report, "sound": False})
        assert main(["env", "--json", "-"]) == 1


class TestBrokenPlugin:
    def test_it_really_breaks_pytorch(self, broken):
        """Or the other tests would show nothing."""
        paths = {"PYTHONPATH": f"{broken}{os.pathsep}{ROOT}"}
        code = (
            "import sys, dithooks\ntry: dithooks.dit_cache\n"
            "finally: print(dithooks.__version__, 'dithooks.config.cache_config' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **paths}, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stdout == f"{__version__} False\n"
        assert "Failed to load the backend extension: torch_npu" in done.stderr

    def test_diagnosis(self, diagnosed):
        done, _ = diagnosed
        assert done.returncode == 1
        assert done.stderr == ""
        text = " ".join(done.stdout.split())
        loads = "broken: torch_npu breaks `import torch`, which loads what is installed for accelerators"
        assert f"{loads}: ImportError: {HAL}" in text
        assert "libascend_hal.so belongs to the NPU's driver: install it" in text
        assert "export TORCH_DEVICE_BACKEND_AUTOLOAD=0" in text
        assert re.search(r"torch 2\.\d+\.\d+\S*, cannot be imported", text)
        assert "torch_npu 2.8.0.post2 is made for torch 2.8.0" in text

    def test_as_json(self, diagnosed):
        _, report = diagnosed
        assert not report["sound"]
        assert report["torch"]["imports"] is False
        assert report["torch"]["imports_without_backends"] is True
        assert report["torch"]["version"] == torch.__version__  # as seen with the plug-in aside
        assert report["torch_npu"]["installed"] == "2.8.0.post2"
        assert report["backends"] == [{"name": "torch_npu", "distribution": "torch_npu", "version": "2.8.0.post2"}]
        assert [each["level"] for each in report["findings"]][:2] == ["broken", "warning"]
        assert set(report["cann"]["libraries"]) == set(ascend.LIBRARIES)

    def test_kept_aside_it_is_a_warning(self, broken):
        done = command("env", path=broken, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
        assert done.returncode == 0
        text = " ".join(done.stdout.split())
        assert (
            f"warning: torch_npu 2.8.0.post2 cannot be imported: ImportError: {HAL} (TORCH_DEVICE_BACKEND_AUTOLOAD=0"
            in text
        )

    def test_other_commands_say_it_in_a_line(self, broken):
        done = command("demo", path=broken)
        assert done.returncode == 1
        assert done.stdout == ""
        assert re.fullmatch(r"dithooks: error: PyTorch cannot be imported \(.*\): see `dithooks env`\n", done.stderr)

    def test_one_that_ends_the_process(self, tmp_path):
        """Some releases print a traceback and exit, with code 0, where CANN's libraries are missing."""
        path = plugin(tmp_path, "2.9.0", EXITS)
        done = command("env", "--json", "-", path=path)
        report = json.loads(done.stdout)
        assert done.returncode == 1
        assert "libhccl.so" in report["torch"]["error"]
        assert "install CANN 8.5.0 and source its set_env.sh" in report["findings"][0]["remedy"]
        other = command("demo", path=path)
        assert other.returncode == 1
        assert "PyTorch cannot be imported (SystemExit)" in other.stderr


def test_without_any_package(tmp_path):
    """Neither PyTorch nor NumPy is installed: the command says so, and what to install."""

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)

    def bare(*arguments):
        call = [tmp_path / "bin" / "python", "-m", "dithooks.cli", *arguments]
        return subprocess.run(call, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True)

    done = bare("env")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith(f"dithooks      {__version__}, plans of schema ")
    assert "broken: PyTorch is not installed\n  -> pip install torch\n" in done.stdout
    done = bare("demo")
    assert (done.returncode, done.stdout) == (1, "")
    reason = "PyTorch cannot be imported (No module named 'torch')"
    assert done.stderr == f"dithooks: error: {reason}: see `dithooks env`\n"
    assert bare("--version").stdout == f"dithooks {__version__}\n"


def test_a_plugin_that_works(tmp_path):
    """Installed for another PyTorch: it is said, with the pair that fits; the rest of the command line works."""
    path = plugin(tmp_path, "2.8.0.post2", WORKS)
    done = command("env", "--json", "-", path=path)
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["torch"]["imports"]
    assert report["torch_npu"] == {"installed": "2.8.0.post2", "error": None}
    assert [each["level"] for each in report["findings"]][:1] == ["warning"]
    assert "torch_npu 2.8.0.post2 is made for torch 2.8.0" in report["findings"][0]["what"]
    assert "pip install torch==2.8.0" in report["findings"][0]["remedy"]
    assert command("--version", path=path).stdout == f"dithooks {__version__}\n"


def test_one_that_kills_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(plugin(tmp_path, "2.9.0", "import os; os.abort()\n")))
    assert torch_probe.ask_torch()["error"] == "the process is killed by SIGABRT"


class TestFindings:
    def test_sound(self):
        assert said(SOUND) == []
        assert said(NONE) == []

    @pytest.mark.parametrize(("npu", "cann"), [("2.10.0", "9.0.0"), ("2.8.0.post2", "8.5.0"), ("2.6.0", "8.2.rc1")])
    def test_pairs_that_fit(self, npu, cann):
        torch_version = ascend.release(npu) + "+cpu"
        report = changed(
            SOUND, torch_npu={"installed": npu}, torch={"installed": torch_version}, cann={"version": cann}
        )
        assert said(report) == []

    def test_another_pytorch(self):
        ((level, what, remedy),) = said(changed(SOUND, torch={"installed": "2.9.0"}))
        assert (level, what) == ("warning", "torch_npu 2.10.0 is made for torch 2.10.0, and torch 2.9.0 is installed")
        assert remedy.startswith(
            "pip install torch==2.10.0, or torch_npu 2.9.0.post6 with CANN 9.1.0; all pairs: https://"
        )

    def test_another_cann(self):
        ((level, what, _),) = said(changed(SOUND, cann={"version": "8.5.0"}))
        assert (level, what) == ("warning", "torch_npu 2.10.0 is made for CANN 9.0.0, and CANN 8.5.0 is here")

    def test_a_release_that_is_not_in_the_table(self):
        ((level, what, remedy),) = said(changed(SOUND, torch_npu={"installed": "2.10.0.post99"}))
        assert (level, what) == ("note", "which CANN goes with torch_npu 2.10.0.post99 is not known here")
        assert ascend.TABLE in remedy

    @pytest.mark.parametrize("version", ["2.13.0", "2.14.0", "2.1.0.post3"])
    def test_releases_whose_cann_has_no_source_are_not_guessed(self, version):
        assert version not in ascend.CANN_OF

    @pytest.mark.parametrize(
        ("npu", "cann"), [("2.1.0.post17", "8.3.RC1"), ("2.1.0", "7.0.0"), ("2.4.0", "8.0.RC3"), ("2.5.1", "8.1.RC1")]
    )
    def test_pairs_of_old_releases(self, npu, cann):
        assert ascend.CANN_OF[npu] == cann

    def test_releases_that_were_not_measured(self):
        report = changed(NONE, torch={"installed": "2.16.0"}, packages={"diffusers": "0.43.0", "numpy": "9"})
        assert said(report) == [
            (
                "note",
                "torch 2.16.0 was not measured with dithooks, 2.1 to 2.15 was",
                "docs/versions.md says what was run",
            ),
            (
                "note",
                "diffusers 0.43.0 was not measured with dithooks, 0.38 to 0.42 was",
                "docs/versions.md says what was run",
            ),
        ]

    def test_a_diffusers_that_runs_code_unasked(self):
        ((level, what, remedy),) = said(changed(NONE, packages={"diffusers": "0.37.1"}))
        assert (level, remedy) == ("warning", "pip install 'diffusers>=0.38'")
        assert what.startswith("diffusers 0.37.1 runs code")

    @pytest.mark.parametrize(
        ("version", "words"),
        [
            ("2.1.0", "with a cache: nothing"),
            ("2.5.1", "with a cache: nothing"),
            ("2.6.0", "with a cache: blocks one by one;"),
            ("2.7.1", "with a cache: blocks one by one;"),
            ("2.8.0", "with a cache: blocks and models, with breaks"),
            ("2.10.0", "with a cache: blocks and models, fullgraph too"),
        ],
    )
    def test_what_a_release_compiles(self, version, words):
        rows = dict(env.rows(changed(SOUND, torch={"version": version})))
        assert rows["compiled"].startswith(words)

    def test_no_pytorch(self):
        report = changed(NONE, torch={"installed": None, "imports": False, "error": "ModuleNotFoundError"})
        assert said(report) == [("broken", "PyTorch is not installed", "pip install torch")]

    def test_pytorch_itself(self):
        report = changed(NONE, torch={"imports": False, "error": "OSError: libgomp", "imports_without_backends": False})
        ((level, what, _),) = said(report)
        assert (level, what) == ("broken", "`import torch` fails: OSError: libgomp")

    def test_another_plugin(self):
        report = changed(NONE, torch={"imports": False, "error": "OSError: x", "imports_without_backends": True})
        report["backends"] = [{"name": "x", "distribution": "intel_x", "version": "1"}]
        ((level, what, remedy),) = said(report)
        assert level == "broken"
        assert what.startswith("intel_x breaks `import torch`")
        assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in remedy

    @pytest.mark.parametrize(
        ("error", "cann", "remedy"),
        [
            ("libhccl.so: none", {"home": None}, "install CANN 9.0.0 and source its set_env.sh"),
            ("libascendcl.so: none", {"home": None, "scripts": ["/x/set_env.sh"]}, "source /x/set_env.sh"),
            ("libhccl.so: none", {}, "see whether CANN in /opt/cann is whole and of version 9.0.0"),
            ("libascend_hal.so: none", {}, "belongs to the NPU's driver"),
        ],
    )
    def test_what_is_missing(self, error, cann, remedy):
        report = changed(SOUND, torch_npu={"error": error}, cann=cann)
        level, what, help_ = said(report)[0]
        assert level == "broken"
        assert error in what
        assert remedy in help_
        assert "export TORCH_DEVICE_BACKEND_AUTOLOAD=0" in help_

    def test_no_compiler(self):
        assert [level for level, *_ in said({**NONE, "compiler": None})] == ["note"]


class TestCann:
    @pytest.mark.parametrize(
        ("file", "text"),
        [
            (
                "aarch64-linux/ascend_toolkit_install.info",
                "package_name=Ascend-cann-toolkit\nversion=8.5.0\narch=aarch64\n",
            ),
            ("x86_64-linux/ascend_nnae_install.info", "version=8.5.0\n"),
            ("runtime/version.info", "Version=8.5.0\nversion_dir=8.5\n"),
        ],
    )
    def test_where_the_environment_says(self, tmp_path, monkeypatch, file, text):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(text)
        (tmp_path / "set_env.sh").write_text("")
        monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
        monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path))
        found = ascend.cann()
        assert (found["home"], found["set_by"]) == (str(tmp_path), "ASCEND_TOOLKIT_HOME")
        assert (found["version"], found["file"]) == ("8.5.0", str(tmp_path / file))
        assert found["scripts"] == [str(tmp_path / "set_env.sh")]

    def test_none(self, tmp_path, monkeypatch):
        for name in ascend.HOMES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(ascend, "INSTALLED", (str(tmp_path / "latest"),))
        assert ascend.cann() == {
            **{"home": None, "set_by": None, "version": None, "file": None, "scripts": [], "libraries": {}}
        }

    def test_a_place_that_is_not_there(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "gone"))
        assert ascend.cann()["version"] is None
        assert ascend.cann()["home"] == str(tmp_path / "gone")

    def test_a_file_that_cannot_be_read_is_passed_over(self, tmp_path, monkeypatch):
        """In place of one that is the superuser's alone."""
        (tmp_path / "ascend_toolkit_install.info").mkdir()
        (tmp_path / "version.info").write_text("Version=8.5.0\n")
        monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
        assert ascend.cann()["version"] == "8.5.0"

    def test_in_words(self):
        shown = dict(env.rows(SOUND))
        assert shown["CANN"] == "9.0.0: /opt/cann (ASCEND_HOME_PATH)"
        assert shown["torch_npu"] == "2.10.0"
        assert shown["accelerator"] == "npu"
        assert shown[""] == "0: Ascend910B3, 32.0 of 64.0 GiB free"

    def test_libraries(self):
        assert torch_probe.loads("libc.so.6") is None
        assert "cannot open shared object file" in torch_probe.loads("libascend_none.so")


def test_the_table():
    """The pairs named in the page for NPUs are those that the command knows."""
    page = (ROOT / "docs" / "npu.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| (\d\S+) \| \d\S+ \| (\d\S+) \|$", page, re.MULTILINE))
    assert told == ascend.CANN_OF
    for npu, torch_version in re.findall(r"^\| (\d\S+) \| (\d\S+) \| \d\S+ \|$", page, re.MULTILINE):
        assert ascend.release(npu) == torch_version
    assert (ascend.CANN_OF["2.10.0"], ascend.CANN_OF["2.8.0.post2"]) == ("9.0.0", "8.5.0")


def test_the_code_of_the_page_runs(tmp_path):
    """Every piece of Python in the page for NPUs, one after another, on the CPU, as the only rank."""
    page = (ROOT / "docs" / "npu.md").read_text(encoding="utf-8")
    pieces = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(pieces) == 5
    (launched,) = (number for number, piece in enumerate(pieces) if piece.startswith("# draw.py"))
    pieces[launched] = f"os.environ['WORLD_SIZE'] = '8'\n{pieces[launched]}os.environ['WORLD_SIZE'] = '1'\n"
    for number, piece in enumerate(pieces):
        if "load_plan" not in piece:  # a plan is of so many steps; the others may be made shorter here
            pieces[number] = piece.replace("num_inference_steps=28", "num_inference_steps=8")
    (tmp_path / "page.py").write_text("\n".join(["import os", *pieces]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **rank, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-W", "error::UserWarning:dithooks", "page.py"]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'reuse'" in done.stdout
    assert [path.name for path in tmp_path.glob("*.png")] == [
        "penguin.png"
    ]  # the first of eight ranks has one of eight


def test_extras_are_those_of_the_package():
    """Each install line names an extra that exists, and installs the package that is missing."""
    tomllib = pytest.importorskip("tomllib")
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def packages(extra):
        for each in filter(None, map(str.strip, found[extra])):
            name = re.match(r"[\w.-]+", each)[0]
            for inner in re.findall(r"\[([\w,]+)\]", each):
                yield from (
                    (inner_name for other in inner.split(",") for inner_name in packages(other))
                    if (name == "dithooks")
                    else [f"{name}-{inner}"]
                )
            yield name

    for extra, (purpose, needed) in EXTRAS.items():
        assert purpose
        assert {each.lower() for each in needed} <= {each.lower() for each in packages(extra)}, extra


def test_what_is_missing_has_its_install_line():
    there = {"diffusers": "0.42", "safetensors": "1", "pillow": "1", "rich": "1", "scikit-image": "1", "ray": "2"}
    assert list(missing_extras(there.get)) == [
        ("plots need matplotlib", 'pip install "dithooks[plot]"'),
        ("videos as mp4 need imageio, imageio-ffmpeg", 'pip install "dithooks[video]"'),
        ("--metric lpips needs stlpips-pytorch", 'pip install "dithooks[lpips]"'),
        ("plans on the Hugging Face Hub need huggingface_hub", 'pip install "dithooks[hub]"'),
        ("configurations in YAML need PyYAML", 'pip install "dithooks[yaml]"'),
    ]


def test_the_command_is_installed():
    scripts = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts.keys() == {"dithooks"}
    module, _, function = scripts["dithooks"].partition(":")
    assert getattr(importlib.import_module(module), function) is main


def test_no_module_of_it_imports_more_than_python():
    code = (
        "import sys, dithooks.cli.main; sys.argv = ['dithooks', 'env', '--help']\n"
        "try: dithooks.cli.main.main()\n"
        "except SystemExit: pass\n"
        "print({name.partition('.')[0] for name in sys.modules} & {'torch', 'numpy', 'rich', 'diffusers'})"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.endswith("set()\n"), done.stderr
    assert "exit codes: 0 the environment is sound" in " ".join(done.stdout.split())
