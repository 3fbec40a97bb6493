"""``dithooks search``: plans come out of it, for the pipeline that ships and for users' own; errors are one line."""

import json
import re
import subprocess
import sys

import pytest
import torch

from dithooks import CachePlan, PlanTiers, dit_cache
from dithooks.cli.main import main
from dithooks.cli.targets.user_factory import of_factory
from dithooks.recording.recording import Recording
from dithooks.tuning import search as tuning_search

pytest.importorskip("diffusers")

from dithooks.demo import load_pipeline

DEMO = ["search", "demo", "--steps", "6", "--prompt", "cat face", "--max-evals", "1", "--cost", "blocks"]
TOY = ["--max-evals", "2", "--cost", "blocks"]

FACTORIES = '''
import torch
from torch import nn
from dithooks import BlockAdapter
from dithooks.demo import load_pipeline

TIMES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1)
starts = []

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
    def forward(self, x, t):
        return x + t * torch.tanh(self.inner(x))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
    def forward(self, x, t):
        for block in self.blocks:
            x = block(x, t)
        return x

class Between(Model):
    """Draws noise between its blocks, so that no call can be made again."""
    def forward(self, x, t):
        for block in self.blocks:
            x = block(x, t) * torch.rand(())
        return x

class Toy:
    """A pipeline whose noise comes from a generator, or from torch's own."""
    def __init__(self, model=Model):
        self.transformer = model()
    def __call__(self, scale=1.0, generator=None, steps=len(TIMES), several=()):
        for each in (*several, generator):
            x = scale * torch.randn(1, 8, 4, generator=each)
        starts.append(x)
        for t in TIMES[:steps]:
            x = x - 0.1 * self.transformer(x, t)
        return [x]

def toy():
    print("a factory may print")
    return Toy(), {"generator": torch.Generator().manual_seed(7)}

def several():
    return Toy(), {"several": [torch.Generator().manual_seed(n) for n in (7, 8)]}

def four():
    return Toy(), lambda pipe: [pipe(generator=torch.Generator().manual_seed(n))[0] for n in range(4)]

def positional():
    return Toy(), (2.0, torch.Generator().manual_seed(7))

def counted():
    class Counted(Toy):
        def __call__(self, num_inference_steps=6, generator=None):
            return super().__call__(generator=generator, steps=num_inference_steps)
    return Counted(), {"num_inference_steps": 6, "generator": torch.Generator().manual_seed(7)}

def counting():
    return Toy(), lambda pipe, steps: pipe(generator=torch.Generator().manual_seed(7), steps=steps)

def without_generator():
    return Toy(), {}

def given_the_pipeline():
    return Toy(), lambda pipe: pipe()

def without_arguments():
    pipe = Toy()
    return pipe, lambda: pipe()

def adapter():
    return BlockAdapter(pipe=Toy(), blocks="transformer.blocks"), lambda pipe: pipe()

def loop():
    model = Model()
    def run():
        x = torch.ones(1, 8, 4)
        for t in TIMES:
            x = x - 0.1 * model(x, t)
        return [x]
    return model, run

def pipeline():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(n) for n in (1, 2)]
    return pipe, {"prompt": ["cat face", "taxi"], "num_inference_steps": 4, "generator": generators}

def interrupted(at):
    pipe, calls = Toy(), []
    def run():
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return pipe(generator=torch.Generator().manual_seed(7))
    return pipe, run

def interrupted_1(): return interrupted(1)
def interrupted_2(): return interrupted(2)
def interrupted_3(): return interrupted(3)

def no_pair(): return Toy()
def no_blocks(): return nn.Linear(4, 4), {"input": torch.ones(1, 4)}
def two_arguments(): return Toy(), lambda one, two: None
def unfollowed(): return Toy(Between), {"generator": torch.Generator()}
def no_step(): return Toy(), lambda: [torch.ones(4)]
def nothing_drawn():
    pipe = Toy()
    return pipe, lambda: pipe() and None
def gradients():
    return Toy(), torch.enable_grad()(lambda pipe: pipe())
def one_step():
    return Model(), {"x": torch.ones(1, 8, 4), "t": 0.5}
def fails(): raise ValueError("a fault of the user's")
def fails_when_run(): return Toy(), {"strength": 1}
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a file of factories."""
    (tmp_path / "mine.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine", None)


def starts():
    return sys.modules["mine"].starts


def all_equal(tensors):
    return all(torch.equal(tensors[0], each) for each in tensors)


def pictures(pipe, steps):
    noise = torch.Generator().manual_seed(5)
    return pipe(["rocket"], num_inference_steps=steps, generator=noise, output_type="pt").images


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A plan for the demo in six steps, with what else comes of a search."""
    where = tmp_path_factory.mktemp("found")
    with torch.no_grad():
        code = main([*DEMO, *(f"--{name}={where / file}" for name, file in FILES.items()), "--target", "2"])
    assert code == 0
    return where


FILES = {"out": "plan.json", "json": "numbers.json", "record": "run.npz"}


class TestDemo:
    def test_files(self, found):
        plan = CachePlan.load(found / "plan.json")
        assert plan.made.steps == 6
        assert plan.speedup >= 2
        assert plan.provenance.reached
        assert plan.provenance.samples == 1
        told = json.loads((found / "numbers.json").read_text())
        assert CachePlan.from_json(json.dumps(told["plan"])) == plan
        assert (told["target"], told["reached"], told["interrupted"]) == (2.0, True, False)
        (evaluation,) = told["evaluations"]
        assert evaluation["steps"] == [plan.pieces[0].picture]
        assert evaluation["score"]["psnr"] == pytest.approx(plan.provenance.psnr)
        assert evaluation["blocks"] == pytest.approx(1 / plan.speedup)
        assert told["run_equivalents"] == pytest.approx(1 + evaluation["blocks"])  # of one picture, none is left out
        assert told["seconds"] > 0
        recording = Recording.load(found / "run.npz")
        assert (recording.steps, recording.samples) == (6, 1)

    def test_the_plan_is_used_by_the_demo(self, found, tmp_path, capsys):
        arguments = ["demo", "--plan", str(found / "plan.json"), "--steps", "6", "--pairs", "1", "--prompt", "rocket"]
        assert main([*arguments, "--json", "-", "--out", str(tmp_path / "demo.png")]) == 0
        told = json.loads(capsys.readouterr().out)
        plan = CachePlan.load(found / "plan.json")
        assert told["schedule"] == told["plan"]["steps"] == plan.pieces[0].picture
        assert told["blocks_total"] / told["blocks_run"] == pytest.approx(plan.speedup)
        assert told["remarks"] == []

    def test_a_fresh_process_draws_the_same_with_it(self, found):
        """To the last bit."""
        pipe = load_pipeline()
        pipe.set_progress_bar_config(disable=True)
        with dit_cache(pipe, CachePlan.load(found / "plan.json")):
            here = pictures(pipe, 6)
        code = f"""
import torch
from dithooks import CachePlan, dit_cache
from dithooks.demo import load_pipeline
torch.set_num_threads({torch.get_num_threads()})
pipe = load_pipeline()
pipe.set_progress_bar_config(disable=True)
noise = torch.Generator().manual_seed(5)
with dit_cache(pipe, CachePlan.load({str(found / "plan.json")!r})):
    drawn = pipe(["rocket"], num_inference_steps=6, generator=noise, output_type="pt").images
torch.save(drawn, {str(found / "drawn.pt")!r})
"""
        subprocess.run([sys.executable, "-c", code], check=True)
        assert torch.equal(torch.load(found / "drawn.pt"), here)
        assert not torch.equal(here, pictures(pipe, 6))

    def test_several_targets_of_one_recording(self, found, folder, capsys):
        arguments = ["--recording", str(found / "run.npz"), "--target", "1.5", "--target", "3", "--json", "all.json"]
        command = [each for each in DEMO if each not in ("--steps", "6")]  # the recording tells
        assert main([*command, *arguments, "--out", "plan-{target}x.json"]) == 0
        slow, fast = (CachePlan.load(f"plan-{target}x.json") for target in ("1.5", "3"))
        assert 1.5 <= slow.speedup < 3 <= fast.speedup
        told = json.loads((folder / "all.json").read_text())
        assert [each["target"] for each in told] == [1.5, 3.0]
        assert told[0]["run_equivalents"] > 1  # the recording has no pictures: they are drawn once
        assert told[1]["run_equivalents"] < 1
        shown = capsys.readouterr()
        assert shown.out.count("CachePlan for FluxTransformer2DModel, 12 blocks") == 2
        assert "record" not in shown.err

    def test_several_targets_in_one_file(self, found, folder, capsys):
        """One uncached run serves both; each has its table, and all are named at last."""
        arguments = ["--recording", str(found / "run.npz"), "--target", "3", "--target", "1.5", "--json", "all.json"]
        command = [each for each in DEMO if each not in ("--steps", "6")]
        assert main([*command, *arguments, "--out", "plans.json", "--quiet"]) == 0
        plans = PlanTiers.load("plans.json")
        assert list(plans.plans) == ["1.5x", "3x"]
        assert 1.5 <= plans.select("1.5x").speedup < 3 <= plans.select("3x").speedup
        told = json.loads((folder / "all.json").read_text())
        assert [each["target"] for each in told] == [3.0, 1.5]
        shown = capsys.readouterr().out
        assert "together" in shown
        assert "PlanTiers for FluxTransformer2DModel, 12 blocks" in shown
        assert shown.endswith("written to plans.json\n")

    def test_tiers_that_are_not_good_enough(self, found, folder, capsys):
        """The others are written all the same; with none, nothing is."""
        arguments = ["--recording", str(found / "run.npz"), "--target", "1.5", "--target", "6", "--quiet"]
        assert main([*DEMO, *arguments, "--out", "plans.json", "--json", "n.json"]) == 0
        slow, fast = (each["evaluations"][0]["score"]["soft"] for each in json.loads((folder / "n.json").read_text()))
        between = str((slow + fast) / 2)
        capsys.readouterr()
        assert main([*DEMO, *arguments, "--out", "plans.json", "--min-psnr", between]) == 3
        assert list(PlanTiers.load("plans.json").plans) == ["1.5x"]
        assert re.match("dithooks: tier 6x is left out: no plan draws at", capsys.readouterr().err)
        assert main([*DEMO, *arguments, "--out", "none.json", "--min-psnr", "500"]) == 3
        assert not (folder / "none.json").exists()

    def test_several_numbers_of_steps(self, folder):
        """The plan is of the first, and has a schedule of its own for the other, which runs are made by."""
        command = [each for each in DEMO if each not in ("--steps", "6")]
        assert main([*command, "--steps", "6", "--steps", "4", "--target", "2", "--quiet"]) == 0
        plan = CachePlan.load("plan.json")
        assert plan.made.steps == 6
        (other,) = plan.pieces[0].others
        assert len(other.steps) == 4
        assert [each.steps for each in plan.provenance.elsewhere] == [4, 6]
        pipe = load_pipeline()
        pipe.set_progress_bar_config(disable=True)
        for steps, mask in ((4, other.steps), (6, plan.pieces[0].steps)):
            with dit_cache(pipe, plan) as cache:
                pictures(pipe, steps)
            assert cache.stats.blocks_run == 2 * 12 * sum(mask)

    def test_unreachable(self, found, folder, capsys):
        arguments = ["--recording", str(found / "run.npz"), "--target", "50", "--out", "fast.json", "--quiet"]
        assert main([*DEMO, *arguments]) == 3
        shown = capsys.readouterr()
        assert re.fullmatch(
            r"dithooks: target 50x was not reached: predicted 6.00x, measured [\d.]+x; what comes nearest is in "
            r"fast.json\n",
            shown.err,
        )
        assert "50× was not reached" in shown.out
        assert not CachePlan.load("fast.json").provenance.reached

    def test_a_least_psnr_that_no_plan_reaches(self, found, folder, capsys):
        """Nothing is written, one line says so, and the next target is searched all the same."""
        arguments = ["--recording", str(found / "run.npz"), "--min-psnr", "500", "--target", "2", "--target", "3"]
        assert main([*DEMO, *arguments, "--out", "{target}.json", "--json", "n.json", "--quiet"]) == 3
        shown = capsys.readouterr()
        assert shown.out == ""
        two, three = shown.err.splitlines()
        assert re.match(r"dithooks: target 2x: no plan draws at 500 dB or better: the best of 1, 2.00× as fast", two)
        assert two.endswith("dB (both). Ask for a lower speed-up or min_psnr, or take more steps")
        assert three.startswith("dithooks: target 3x: no plan draws")
        assert not [*folder.glob("[23].json")]
        told = json.loads((folder / "n.json").read_text())
        assert [(each["target"], each["plan"], each["reached"]) for each in told] == [
            (2.0, None, False),
            (3.0, None, False),
        ]

    def test_the_fastest_of_a_psnr(self, found, folder, capsys):
        """It is the fastest of those that were tried and are good enough; an unreachable one is said in dB."""
        arguments = ["--recording", str(found / "run.npz"), "--quiet", "--max-runs", "inf", "--objective", "mean"]
        demo = [each for each in DEMO if each not in ("--max-evals", "1")]
        told = {}
        for level, code in ((15, 0), (500, 3)):
            numbers = ["--target-psnr", str(level), "--out", "plan-{target}.json", "--json", f"n{level}.json"]
            assert main([*demo, *arguments, *numbers, "--max-evals", "4"]) == code
            told[level] = json.loads((folder / f"n{level}.json").read_text())
        shown = capsys.readouterr()
        tried = [(each["score"]["psnr"], each["predicted_speedup"]) for each in told[15]["evaluations"]]
        best = max(speedup for psnr, speedup in tried if psnr >= 15)
        assert CachePlan.load("plan-15.json").speedup == pytest.approx(best)
        assert told[15]["target_psnr"] == 15
        assert re.fullmatch(
            r"dithooks: target 500 dB was not reached: the mean is [\d.]+ dB; what comes nearest is in plan-500.json\n",
            shown.err,
        )
        assert "500 dB was not reached" in shown.out

    def test_another_process(self, tmp_path):
        """As a user calls it: the tables on stdout, progress on stderr."""
        command = [sys.executable, "-m", "dithooks.cli", *DEMO, "--target", "2.5"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert re.search(r"best +output +●[○●]{5} ", done.stdout)
        assert done.stdout.endswith("written to plan.json\n")
        assert "record: 1 of 6" in done.stderr
        plan = CachePlan.load(tmp_path / "plan.json")
        assert str(plan) in done.stdout
        assert plan.speedup >= 2.5

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--prompt", "piza"], "never seen 'piza'; close to 'piza': pizza"),
            (["--prompt", "!?"], "holds no word"),
            (["--target", "1"], "--target is 1: give a number above 1"),
            (["--target", "nan"], "--target is nan"),
            (["--target", "fast"], "invalid float value: 'fast'"),
            (["--target", "2", "--target", "2.0"], "--target is given twice"),
            (["--target", "2", "--target", "2.0", "--out", "{target}.json"], "two results would go to 2.json"),
            (["--steps", "0"], "--steps is 0: it must be 1 or more"),
            (["--max-evals", "0"], "--max-evals is 0"),
            (["--local-moves", "-1"], "--local-moves is -1"),
            (["--max-runs", "0"], "--max-runs is 0: it must be above 0"),
            (["--max-seconds", "nan"], "--max-seconds is nan"),
            (["--min-psnr", "-3"], "--min-psnr is -3: give a number of dB"),
            (["--target-psnr", "inf"], "--target-psnr is inf"),
            (["--target-psnr", "30", "--target", "2"], "--target-psnr goes without --target"),
            (["--objective", "best"], "invalid choice: 'best'"),
            (["--seed", "-1"], "--seed is -1"),
            (["--seed", str(2**62)], "below 2**62"),
            (["--guidance", "inf"], "--guidance is inf"),
            (["--cost", "money"], "invalid choice: 'money'"),
            (["--out", "no/such/plan.json"], "no/such is not a folder"),
            (["--out", "."], ". is a folder"),
            (["--record", "no/run.npz"], "no is not a folder"),
            (["--json", "no/n.json"], "no is not a folder"),
            (["--json", "plan.json"], "two results would go to plan.json"),
            (["--journal", "mine.py"], "mine.py is a file: give a folder"),
            (["--recording", "no.npz"], "no.npz"),
            (["--recording", "mine.py"], "mine.py is no file that Recording.save wrote"),
            (["--recording", "mine.py", "--record", "run.npz"], "--record goes without --recording"),
            (["--steps", "1"], "nothing of this run can be reused"),
            (["--steps", "6", "--steps", "6"], "--steps is given twice with the same number: 6, 6"),
            (["--steps", "6", "--steps", "1"], "--steps is 1: it must be 2 or more"),
            (["--steps", "6", "--steps", "9", "--interval", "2"], "--interval goes with one number of --steps"),
            (["--steps", "6", "--steps", "9", "--executor", "ray"], "--executor goes with one number of --steps"),
        ],
    )
    def test_asked_wrongly(self, arguments, message, folder, capsys):
        assert main(["search", "demo", "--quiet", *arguments]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert message in shown.err
        assert len(shown.err.splitlines()) == 1
        assert [path.name for path in folder.iterdir() if path.suffix != ""] == ["mine.py"]

    def test_recording_of_something_else(self, found, folder, capsys):
        recording = ["--recording", str(found / "run.npz"), "--quiet"]
        assert main(["search", "demo", *recording, "--steps", "5"]) == 2
        assert "--steps is 5, but the recording is of 6" in capsys.readouterr().err
        assert main(["search", "mine.py:loop", *recording]) == 2
        shown = capsys.readouterr().err
        assert "the recording is of another model" in shown
        assert len(shown.splitlines()) == 1

    def test_missing_package_names_the_extra(self, monkeypatch, capsys):
        for name in list(sys.modules):
            if name.partition(".")[0] == "diffusers":
                monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, "dithooks.demo.pipeline", raising=False)
        assert main(["search", "demo"]) == 2
        assert capsys.readouterr().err == 'dithooks: error: the demo needs diffusers: pip install "dithooks[demo]"\n'


class TestOwn:
    @pytest.mark.parametrize(
        "name",
        ["toy", "several", "positional", "without_generator", "given_the_pipeline", "without_arguments", "adapter"],
    )
    def test_every_run_begins_with_the_same_noise(self, name, folder, capsys):
        """Of a generator, which a run uses up, of several, and of torch's own."""
        assert main(["search", f"mine.py:{name}", *TOY, "--target", "1.8", "--quiet"]) == 0
        assert 2 <= len(starts()) <= 3
        assert all_equal(starts())
        plan = CachePlan.load("plan.json")
        assert plan.made.blocks == 4
        assert plan.speedup >= 1.8
        assert plan.provenance.psnr > 20

    def test_a_model_in_a_loop(self, folder):
        assert main(["search", "mine:loop", *TOY, "--steps", "6", "--quiet"]) == 0
        target, run = sys.modules["mine"].loop()
        with dit_cache(target, CachePlan.load("plan.json")) as cache:
            run()
        assert cache.stats.blocks_total / cache.stats.blocks_run >= 2

    def test_a_pipeline_with_generators_draws_the_same_twice(self, folder):
        subject = of_factory("mine.py:pipeline")
        first, second = subject.run().images, subject.run().images
        assert [each.tobytes() for each in first] == [each.tobytes() for each in second]
        assert main(["search", "mine.py:pipeline", *TOY, "--quiet"]) == 0  # pictures of PIL, in an output
        assert CachePlan.load("plan.json").provenance.samples == 2

    def test_several_numbers_of_steps(self, folder):
        """A dict's number is replaced, its generators are set back each time; a function is given the number."""
        for name in ("counted", "counting"):
            assert main(["search", f"mine.py:{name}", *TOY, "--steps", "6", "--steps", "4", "--quiet"]) == 0
            plan = CachePlan.load("plan.json")
            assert (plan.made.steps, [len(each.steps) for each in plan.pieces[0].others]) == (6, [4])
            assert all_equal(starts())
            starts().clear()

    @pytest.mark.parametrize("name", ["toy", "positional", "given_the_pipeline"])
    def test_a_factory_that_takes_no_number_of_steps(self, name, folder, capsys):
        assert main(["search", f"mine.py:{name}", "--steps", "6", "--steps", "4"]) == 2
        assert f"what mine.py:{name} returned takes no number of steps" in capsys.readouterr().err
        assert not (folder / "plan.json").exists()

    def test_json_is_alone_on_stdout(self, folder, capsys):
        assert main(["search", "mine.py:toy", *TOY, "--json", "-"]) == 0
        shown = capsys.readouterr()
        told = json.loads(shown.out)
        assert CachePlan.from_json(json.dumps(told["plan"])) == CachePlan.load("plan.json")
        assert "a factory may print" in shown.err

    def test_journal(self, folder):
        command = ["search", "mine.py:toy", *TOY, "--journal", "journal", "--quiet"]
        assert main([*command, "--out", "first.json"]) == 0
        assert len(starts()) > 1
        sys.modules.pop("mine")
        assert main([*command, "--out", "second.json"]) == 0
        assert len(starts()) == 1  # without a cache, to see that it draws the same
        assert CachePlan.load("first.json").pieces == CachePlan.load("second.json").pieces

    def test_probing_is_one_run_more(self, folder):
        made = []
        for more in (("--probe",), ()):
            sys.modules.pop("mine", None)
            assert main(["search", "mine.py:four", *TOY, "--target", "1.5", "--quiet", *more]) in (0, 1)
            made.append(len(starts()))
        assert made[0] == made[1] + 4  # pictures, one after another

    def test_limits(self, folder):
        assert main(["search", "mine.py:toy", "--cost", "blocks", "--max-runs", "1.1", "--quiet"]) == 0
        assert len(starts()) == 1  # no plan can be run
        assert main(["search", "mine.py:toy", *TOY, "--max-runs", "inf", "--local-moves", "2", "--quiet"]) == 0

    def test_interrupted_when_a_plan_was_run(self, folder, capsys):
        targets = ["--target", "1.8", "--target", "3", "--out", "{target}.json", "--json", "n.json"]
        assert main(["search", "mine.py:interrupted_3", *TOY, "--local-moves", "9", *targets, "--quiet"]) == 130
        shown = capsys.readouterr()
        assert shown.err == "dithooks: interrupted: the best so far is in 1.8.json; not searched: 3x\n"
        assert CachePlan.load("1.8.json").provenance.psnr is not None
        assert json.loads((folder / "n.json").read_text())[0]["interrupted"]
        assert not (folder / "3.json").exists()

    def test_interrupted_when_none_was(self, folder, capsys):
        assert main(["search", "mine.py:interrupted_2", *TOY, "--quiet"]) == 130
        assert "a plan from the recording, which was not run, is in plan.json" in capsys.readouterr().err
        assert CachePlan.load("plan.json").provenance.psnr is None

    def test_interrupted_while_recording(self, folder, capsys):
        assert main(["search", "mine.py:interrupted_1", *TOY, "--quiet"]) == 130
        assert capsys.readouterr().err == "dithooks: interrupted\n"
        assert not (folder / "plan.json").exists()

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            ("FluxPipeline", "there is no model 'FluxPipeline': give demo, FILE.py:FACTORY or MODULE:FACTORY"),
            ("nowhere.py:make", "there is no file nowhere.py"),
            ("nowhere:make", "there is no module 'nowhere'"),
            ("mine.py:make", "mine.py has no 'make'"),
            ("mine.py:no_pair", "mine.py:no_pair returned Toy: it has to return a pair"),
            ("mine.py:two_arguments", "returned a function of (one, two): it takes no argument, or one"),
            ("mine.py:no_blocks", "no list of blocks"),
            ("mine.py:no_step", "run made no step of the target"),
            ("mine.py:nothing_drawn", "run returned None"),
            ("mine.py:gradients", "is called with gradients enabled"),
            ("mine.py:unfollowed", "none of 2 plans could be run: WiringError"),
            ("mine.py:one_step", "nothing of this run can be reused"),
        ],
    )
    def test_asked_wrongly(self, target, message, folder, capsys):
        assert main(["search", target, *TOY, "--quiet"]) == 2
        shown = capsys.readouterr()
        assert message in shown.err
        assert len(shown.err.splitlines()) == 1
        assert not (folder / "plan.json").exists()

    @pytest.mark.parametrize("option", [["--prompt", "taxi"], ["--seed", "0"], ["--guidance", "2"]])
    def test_options_of_the_demo(self, option, folder, capsys):
        assert main(["search", "mine.py:toy", *option]) == 2
        assert f"{option[0]} goes with the model demo only" in capsys.readouterr().err

    def test_other_steps_than_the_run_has(self, folder, capsys):
        assert main(["search", "mine.py:pipeline", *TOY, "--steps", "5", "--quiet"]) == 2
        shown = capsys.readouterr().err
        assert "num_inference_steps=5, but run made 4 steps" in shown
        assert len(shown.splitlines()) == 1

    def test_journal_of_another_search(self, folder, capsys):
        command = ["search", "mine.py:toy", "--journal", "journal", "--max-evals", "1", "--quiet"]
        assert main([*command, "--cost", "blocks"]) == 0
        assert main([*command, "--cost", "time"]) == 2
        assert "has the journal of another search" in capsys.readouterr().err

    def test_errors_that_are_not_of_the_asking_are_shown_as_they_are(self, folder, monkeypatch, capsys):
        for name, error, match in (
            ("fails", ValueError, "a fault of the user's"),
            ("fails_when_run", TypeError, "unexpected keyword argument 'strength'"),
        ):
            assert main(["search", f"mine.py:{name}", "--quiet"]) == 1
            assert f"{error.__name__}: " in (shown := capsys.readouterr().err)
            assert match in shown
        monkeypatch.setattr(tuning_search, "samples_of", None)
        with pytest.raises(TypeError, match="not callable"):  # where the library complains of what it is given
            main(["search", "mine.py:toy", "--quiet"])


def test_help_tells_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    assert "3    written, but a target was not reached; or not written" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "3    done, but a target was not reached: search, compare, generate" in shown
    assert "dithooks search my_model.py:make --target" in shown
