"""``dithooks inspect``: what it says of models is so, what it cannot say it refuses in one line."""

import io
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from dithooks import timestep_scope
from dithooks.cli.main import main
from dithooks.cli.targets.resolver import find_subject
from dithooks.errors import TargetError
from dithooks.inspection import diffusers_class
from dithooks.inspection import model_table as models
from dithooks.inspection.model_report import inspect, paste, show
from dithooks.inspection.range_trials import try_out
from dithooks.inspection.survey import survey
from dithooks.inspection.wording import describe, kind_of, places, ranges_of, reasons
from dithooks.tiny import build, names

diffusers = pytest.importorskip("diffusers")
console = pytest.importorskip("rich.console")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
PINNED = f"diffusers=={version('diffusers')}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()

FACTORIES = '''
import torch
from torch import nn
from dithooks import BlockAdapter
from dithooks.demo import load_pipeline

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
    def forward(self, x):
        return x + self.inner(x)

class Model(nn.Module):
    """Uses what leaves block 3 once more at the end."""
    def __init__(self, number=12):
        super().__init__()
        self.body = nn.ModuleList(Block() for _ in range(number))
        self.unused = nn.ModuleList(Block() for _ in range(4))
    def forward(self, x, t=None):
        for number, block in enumerate(self.body):
            x = block(x)
            kept = x if number == 3 else kept if number > 3 else None
        return x + 0.1 * kept

x = torch.ones(1, 3, 8)

def keywords():
    return Model(), {"x": x}

def positional():
    return Model(), (x,)

def function():
    model = Model()
    return model, lambda: model(x)

def adapter():
    return BlockAdapter(transformer=Model(), blocks="body"), {"x": x}

def pipeline():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe, lambda: runs.append(2) or pipe(["panda face"], num_inference_steps=2)

runs = []

def alone():
    return Model()

def uncalled():
    return Model(), lambda: None

def listless():
    return nn.Linear(8, 8), (x,)

def fails():
    raise ValueError("a fault of the user's")

def fails_when_run():
    return Model(), {"y": x}
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a file of factories."""
    (tmp_path / "mine.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine", None)


def looked_at(name, **options):
    return inspect(find_subject(name), **options)


def printed(inspection, width=100):
    paper = io.StringIO()
    show(inspection, console.Console(width=width, file=paper))
    return paper.getvalue()


def run_pasted(text, name, target):
    """What comes of the lines, with their ``...`` replaced by two steps of the target."""
    scope = {name: target.target, "run": target.run, "timestep_scope": timestep_scope, "found": []}
    steps = "for step in range(12):\n        with timestep_scope(step): run()\n    found.append(cache.stats)"
    exec(text.replace("    ...", f"    {steps}"), scope)
    return scope["found"]


class TestClasses:
    def test_numbers_are_real_and_streams_of_the_tiny_model(self):
        found = looked_at("FluxPipeline")
        (survey,) = found.surveys
        assert [(each.path, found.subject.counts[each.path]) for each in survey.lists] == [
            ("transformer.transformer_blocks", 19),
            ("transformer.single_transformer_blocks", 38),
        ]
        assert describe(ranges_of(survey, found.subject.counts)) == "any range in 0–56"
        assert "cache_block_start=0, cache_num_blocks=57\n" in paste(found)
        assert "with dit_cache(pipe, config) as cache:" in paste(found)
        text = printed(found)
        assert "transformer (FluxTransformer2DModel): 57 blocks" in text
        assert "hidden_states [1, 16, 32] float32" in text
        assert "36 of 36 ranges; all can be cached" in text

    @pytest.mark.parametrize(
        ("pipeline", "paths"),
        [
            ("WanPipeline", ["transformer", "transformer_2"]),  # annotated as X | None
            ("HunyuanImagePipeline", ["transformer"]),  # annotations are strings
            ("KandinskyV22PriorPipeline", ["prior"]),
        ],
    )
    def test_components_are_found_by_annotations(self, pipeline, paths):
        found = looked_at(pipeline, tests=1)
        assert [each.path for each in found.surveys] == paths
        for each in found.surveys:
            assert all(listed.path.startswith(f"{each.path}.") for listed in each.lists)

    def test_blocks_are_named_where_a_pipeline_may_have_others(self):
        assert 'blocks="prior.transformer_blocks"' in paste(looked_at("KandinskyV22PriorPipeline", tests=1))

    def test_with_a_controlnet(self):
        found = looked_at("StableDiffusion3ControlNetPipeline", tests=1)
        (each,) = found.surveys
        assert [(places(each, numbers), line) for numbers, line in each.gaps] == [
            ("between all blocks", "hidden_states: a new tensor in its place")
        ]
        assert "controlnet (SD3ControlNetModel) is not cached along with it" in printed(found)

    def test_variants(self):
        found = looked_at("FluxTransformer2DModel#controlnet", tests=1)
        assert found.surveys[0].gaps
        assert not looked_at("FluxTransformer2DModel", tests=1).surveys[0].gaps

    def test_blocks_option(self):
        found = looked_at("FluxPipeline", blocks=("transformer.single_transformer_blocks",), tests=1)
        assert describe(ranges_of(found.surveys[0], found.subject.counts)) == "any range in 0–37"
        assert 'config, blocks="transformer.single_transformer_blocks")' in paste(found)

    def test_skips_past_a_range(self):
        """U-shaped: what one half keeps the other takes, so ranges are allowed as a whole, or within the second."""
        found = looked_at("HunyuanDiT2DModel")
        text = printed(found)
        assert "any range in 0, 1 or 2–5; as a whole only: 0–5, 1–4, 1–5, counted in the tiny model" in text
        assert "refused     blocks.0 … blocks.1: an output of blocks.0 goes to blocks.5 (skip=)" in text
        assert "cache_block_start=0, cache_num_blocks=28" in paste(found)  # the whole, of the real number

    def test_lists_that_do_not_join(self):
        found = looked_at("Flux3Transformer2DModel#image_cond")
        assert "any range in one list" in printed(found)
        assert "cache_block_start=0, cache_num_blocks=28" in paste(found)
        assert 'blocks="single_transformer_blocks"' in paste(found)

    def test_nothing_can_be_cached(self):
        found = looked_at("RFD4ProteinaTransformer")
        assert printed(found).count("runs 2 times in one call of the transformer") == 1  # not once for each block
        assert paste(found) == ""

    @pytest.mark.parametrize(
        "name", ["WanAnimatePipeline", "Flux3Transformer2DModel#image_cond", "FluxControlNetModel"]
    )
    def test_fits_a_terminal_of_100_columns(self, name):
        found = looked_at(name, tests=4)
        text = printed(found)
        assert max(map(len, text.splitlines())) <= 100
        for each in found.surveys:
            for listed in each.lists:
                whole = rf"^{re.escape(listed.path)} +\d" if not listed.apart else rf"{re.escape(listed.path)} \(\d"
                assert re.search(whole, text, re.MULTILINE)


class TestStored:
    def saved(self, folder, cls="FluxTransformer2DModel", **changes):
        """A folder with the configuration of a transformer, as diffusers saves it."""
        folder.mkdir(parents=True)
        config = dict(build(cls).model.config) | changes
        (folder / "config.json").write_text(json.dumps({"_class_name": cls, "_diffusers_version": "0.36.0"} | config))

    def pipeline(self, folder, **changes):
        self.saved(folder / "transformer", **changes)
        index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
        index |= {"vae": ["diffusers", "AutoencoderKL"], "image_encoder": [None, None]}
        (folder / "model_index.json").write_text(json.dumps(index))

    def cached(self, tmp_path, monkeypatch):
        """A model in the cache of the Hub, where nothing can be fetched."""
        hub = pytest.importorskip("huggingface_hub")
        download = hub.snapshot_download

        def asked(name, **options):
            assert options == {"local_files_only": True}
            return download(name, **options)

        monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(hub, "snapshot_download", asked)
        repo = tmp_path / "models--someone--some-model"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("a" * 40)
        return repo / "snapshots" / ("a" * 40)

    def test_pipeline(self, tmp_path):
        self.pipeline(tmp_path / "saved", num_layers=7, num_single_layers=9)
        found = looked_at(str(tmp_path / "saved"), tests=1)
        assert describe(ranges_of(found.surveys[0], found.subject.counts)) == "any range in 0–15"
        assert "with dit_cache(pipe, config)" in paste(found)

    def test_transformer(self, tmp_path):
        self.saved(tmp_path / "saved", "WanTransformer3DModel", num_layers=30)
        found = looked_at(str(tmp_path / "saved"), tests=1)
        assert describe(ranges_of(found.surveys[0], found.subject.counts)) == "any range in 0–29"
        assert "with dit_cache(transformer, config)" in paste(found)

    def test_cache_of_the_hub(self, tmp_path, monkeypatch):
        self.pipeline(self.cached(tmp_path, monkeypatch), num_layers=7)
        found = looked_at("someone/some-model", tests=1)
        assert describe(ranges_of(found.surveys[0], found.subject.counts)) == "any range in 0–10"

    def test_cache_that_holds_the_transformer_only(self, tmp_path, monkeypatch):
        self.saved(self.cached(tmp_path, monkeypatch) / "transformer", num_layers=8)
        found = looked_at("someone/some-model", tests=1)
        assert describe(ranges_of(found.surveys[0], found.subject.counts)) == "any range in 0–11"

    def test_what_is_not_there(self, tmp_path, monkeypatch):
        self.cached(tmp_path, monkeypatch)
        with pytest.raises(TargetError, match=r"neither a folder nor in the local cache .* nothing is downloaded"):
            find_subject("someone/another-model")

    def test_what_is_of_no_use(self, tmp_path):
        with pytest.raises(TargetError, match=r"no model_index\.json or config.json"):
            find_subject(str(tmp_path))
        self.pipeline(tmp_path / "torn")
        (tmp_path / "torn" / "transformer" / "config.json").unlink()
        with pytest.raises(TargetError, match=r"lacks transformer/config\.json: download it, or name the class"):
            find_subject(str(tmp_path / "torn"))
        self.saved(tmp_path / "bad", num_layers="many")
        with pytest.raises(TargetError, match=r"bad/config.json makes no FluxTransformer2DModel"):
            find_subject(str(tmp_path / "bad"))
        (tmp_path / "bad" / "config.json").write_text("{")
        with pytest.raises(TargetError, match=r"bad/config.json cannot be read"):
            find_subject(str(tmp_path / "bad"))


class TestOwn:
    @pytest.mark.parametrize("name", ["keywords", "positional", "function", "adapter"])
    def test_what_a_factory_may_return(self, folder, name):
        """All find that no range may go from block 3, whose output is used again, to the next; the lines work."""
        found = looked_at(f"mine.py:{name}", tests=100)
        assert found.surveys[0].ranges == ((0, 3), (4, 11))
        lines = paste(found)
        assert "cache_block_start=4, cache_num_blocks=8" in lines
        (stats,) = run_pasted(lines, "target", found.subject)
        assert stats.blocks_run == 12 * 12 - 8 * 2  # of 12 steps, 9 and 11 are reused

    def test_module(self, folder):
        assert looked_at("mine:keywords", tests=0).surveys[0].name == "Model"

    def test_pipeline_by_its_own_steps(self, folder):
        found = looked_at("mine.py:pipeline", tests=2)
        assert found.surveys[0].tested == 2
        assert sys.modules["mine"].runs == [2, 2, 2]  # one to see the blocks, one for each range
        assert describe(ranges_of(found.surveys[0], {})) == "any range in 0–11"

    def test_errors_of_the_factory_are_shown_as_they_are(self, folder, capsys):
        for name, error, match in (
            ("fails", ValueError, "a fault of the user's"),
            ("fails_when_run", TypeError, "unexpected keyword argument 'y'"),
        ):
            assert main(["inspect", f"mine.py:{name}"]) == 1
            assert f"{error.__name__}: " in (shown := capsys.readouterr().err)
            assert match in shown
        (folder / "needs.py").write_text("import something_that_is_not_there")
        assert main(["inspect", "needs:factory"]) == 1
        assert "ModuleNotFoundError: No module named 'something_that_is_not_there'" in capsys.readouterr().err


class TestTriedRanges:
    """With fewer attempts than ranges."""

    def survey(self, folder, number, tests):
        find_subject("mine.py:keywords")
        model = sys.modules["mine"].Model(number)
        return survey(model, lambda: model(torch.ones(1, 3, 8)), test=tests)[0]

    def test_a_fault_between_two_blocks_is_found(self, folder):
        found = self.survey(folder, 16, tests=32)  # of 136
        assert found.ranges == ((0, 3), (4, 15))
        assert found.tested == 32

    def test_what_holds_a_range_that_failed_is_refused(self, folder):
        found = self.survey(folder, 16, tests=8)
        assert (found.ranges, found.wholes) == (((0, 3), (4, 15)), ())
        assert found.tested == 8
        assert len(reasons(found)) == 1

    def test_the_longest_that_is_left_is_tried(self):
        tried = []
        everything = {(first, last) for first in range(16) for last in range(first, 16)}
        try_out(everything, 16, 8, lambda pair: tried.append(pair) or ("bad" if pair[0] <= 3 < pair[1] else None))
        assert tried == [(0, 15), *((block, block + 1) for block in range(6)), (4, 15)]

    def test_parts_are_tried_where_the_whole_can_be_cached(self):
        tried = []
        everything = {(first, last) for first in range(16) for last in range(first, 16)}
        try_out(everything, 16, 9, lambda pair: tried.append(pair))
        assert tried[:7] == [(0, 15), (0, 7), (8, 15), (0, 3), (4, 7), (8, 11), (12, 15)]
        assert tried[7:] == [(0, 14), (1, 15)]

    def test_none(self, folder):
        found = self.survey(folder, 16, tests=0)
        assert (found.ranges, found.tested) == (((0, 15),), 0)


def test_refused_reasons_that_are_alike_are_said_once():
    (found,) = looked_at("UTransformer2DModel").surveys
    assert kind_of(found) == "single"
    ((_, why),) = reasons(found)
    assert why.startswith("the model uses more of these blocks than what leaves the last one")


def test_a_controlnet_has_nothing_to_paste():
    found = looked_at("FluxControlNetModel")
    assert kind_of(found.surveys[0]) == "none"
    assert paste(found) == ""
    assert "FluxControlNetModel is a ControlNet" in " ".join(printed(found).split())


def test_places_in_words():
    (found,) = looked_at("AuraFlowTransformer2DModel", tests=0).surveys
    lists = "joint_transformer_blocks", "single_transformer_blocks"
    for numbers, words in (
        ((3,), f"between {lists[0]} and {lists[1]}"),
        ((0, 1, 2), f"between the blocks of {lists[0]}"),
        ((0, 1, 2, 3), f"between the blocks of {lists[0]}, between {lists[0]} and {lists[1]}"),
        ((4, 6), f"after {lists[1]}.0, 2"),
        (tuple(range(7)), "between all blocks"),
    ):
        assert places(found, numbers) == words


class TestCommand:
    def test_json(self, capsys, tmp_path):
        assert main(["inspect", "WanTransformer3DModel", "--json", str(tmp_path / "wan.json")]) == 0
        assert "WanTransformer3DModel: 40 blocks" in capsys.readouterr().out
        assert main(["inspect", "WanTransformer3DModel", "--json", "-"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told == json.loads((tmp_path / "wan.json").read_text())
        (transformer,) = told["transformers"]
        assert (transformer["kind"], transformer["blocks"], transformer["largest"]) == ("any", 40, [0, 39])
        assert told["paste"].startswith("from dithooks import")

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ("", "either a MODEL or --all"),
            ("FluxPipeline --all", "either a MODEL or --all"),
            ("FluxPipeline --markdown x.md", "--markdown goes with --all only"),
            ("FluxPipeline --tests -1", "--tests is -1: it must be 0 or more"),
            ("FluxPipeline --json no/such/file", "no/such is not a folder"),
            ("FluxPipeline --blocks transformer.nothing", "has no 'nothing'"),
            ("FluxPipline", "do you mean FluxPipeline"),
            ("UNet2DModel", "neither a pipeline nor a transformer"),
            ("StableDiffusionPipeline", "names no transformer class that is known here (unet: UNet2DConditionModel)"),
            ("mine.py:alone", "returned Model: it has to return a pair"),
            ("mine.py:x", "has a Tensor, not a function, 'x'"),
            ("mine.py:nothing", "has no 'nothing'"),
            ("mine.py:uncalled", "the run did not call its blocks"),
            ("mine.py:listless", "Linear has no list of blocks"),
            ("nothing.py:make", "no file nothing.py"),
            ("no_such_module:make", "no module 'no_such_module'"),
        ],
    )
    def test_errors_are_one_line(self, folder, capsys, arguments, match):
        if arguments == "mine.py:x":
            (folder / "mine.py").write_text("import torch\nx = torch.ones(1)")
        assert main(["inspect", *arguments.split()]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("dithooks: error: ")
        assert match in told.err
        assert told.err.count("\n") == 1

    @pytest.mark.parametrize(("package", "remedy"), [("rich", "rich"), ("diffusers", '"dithooks[diffusers]"')])
    def test_missing_packages(self, monkeypatch, capsys, package, remedy):
        monkeypatch.setitem(sys.modules, package, None)
        assert main(["inspect", "FluxPipeline"]) == 2
        assert capsys.readouterr().err == f"dithooks: error: inspect needs {package}: pip install {remedy}\n"

    def test_own_models_need_no_diffusers(self, folder, monkeypatch, capsys):
        (folder / "mine.py").write_text(FACTORIES.replace("from dithooks.demo import load_pipeline", ""))
        monkeypatch.setitem(sys.modules, "diffusers", None)
        assert main(["inspect", "mine.py:keywords", "--tests", "1"]) == 0
        assert "Model: 12 blocks" in capsys.readouterr().out


class TestTable:
    ROWS = re.findall(r"^\| `(.*?)`.*$", PAGE, re.MULTILINE)
    SAMPLE = (
        "AuraFlowTransformer2DModel",
        "CogVideoXTransformer3DModel",
        "DualTransformer2DModel",
        "Flux3Transformer2DModel",
        "HunyuanDiT2DModel",
        "LatteTransformer3DModel",
        "QwenImageTransformer2DModel",
        "RFD4ProteinaTransformer",
        "SD3ControlNetModel",
        "WanTransformer3DModel",
        "ZImageTransformer2DModel",
    )

    def test_every_class_is_there(self):
        assert {name.partition("#")[0] for name in self.ROWS} == {name.partition("#")[0] for name in names()}
        assert len(set(self.ROWS)) == len(self.ROWS)
        assert f"{len(models.classes())} classes: " in PAGE

    @pytest.mark.skipif(not PINNED, reason="the table was made with another version of diffusers")
    @pytest.mark.parametrize("cls", SAMPLE)
    def test_rows_are_what_comes_out_now(self, cls):
        """If this fails after a change that is meant: ``dithooks inspect --all --markdown docs/models.md``."""
        here = [line for line in PAGE.splitlines() if re.match(rf"\| `{cls}[`#]", line)]
        assert here == [models.markdown_row(row) for row in models.rows_of(cls)]

    def test_command(self, tmp_path, capsys, monkeypatch):
        classes = ("DiTTransformer2DModel", "RFD4ProteinaTransformer")
        monkeypatch.setattr(models, "classes", lambda: classes)
        assert main(["inspect", "--all"]) == 0
        told = capsys.readouterr().out
        assert "2 classes: in 1, any range of blocks can be cached" in " ".join(told.split())
        assert main(["inspect", "--all", "--markdown", str(tmp_path / "models.md")]) == 0
        page = (tmp_path / "models.md").read_text(encoding="utf-8")
        rows = [line for line in page.splitlines() if line.startswith("| `")]
        assert rows == [line for line in PAGE.splitlines() if re.match(rf"\| `({'|'.join(classes)})[`#]", line)]


def test_models_of_the_installed_version_only(monkeypatch):
    """A class that this diffusers does not have is left out of the table, and named below it."""
    monkeypatch.setattr(models, "classes", lambda: ("DiTTransformer2DModel", "FluxTransformer2DModel"))
    monkeypatch.delattr(diffusers, "FluxTransformer2DModel", raising=False)
    monkeypatch.setattr(diffusers_class, "build", _without("FluxTransformer2DModel"))
    rows, missing = models.all_rows()
    assert [row.cls for row in rows] == ["DiTTransformer2DModel"]
    assert "Not in this version of diffusers: `FluxTransformer2DModel`." in models.markdown(rows, missing)
    with pytest.raises(TargetError, match="has no FluxTransformer2DModel: install a newer one"):
        find_subject("FluxTransformer2DModel")


def _without(cls):
    def made(name):
        if name.partition("#")[0] == cls:
            raise AttributeError(name)
        return build(name)

    return made
