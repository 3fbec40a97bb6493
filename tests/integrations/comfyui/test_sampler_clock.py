"""Steps and branches of a sampler's calls, from σ and from what ComfyUI hands along."""

from types import SimpleNamespace

import pytest
import torch

from dithooks.integrations.comfyui.sampler_clock import SamplerSession

SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]


def placed(sigmas, calls):
    """Step and branch of calls, each a σ and what its options are besides."""
    session, places = SamplerSession(sigmas), []
    for sigma, options in calls:
        latents = torch.zeros(options.pop("shape", (1, 2)))
        given = {"cond_or_uncond": [0], "uuids": ["a"], **options}
        session.place_call(latents, given, torch.tensor([sigma]), given.pop("hooks", ()))
        places.append((session.step_source.step, session.step_source.branch))
    return places


def steps(sigmas, levels):
    return [step for step, _ in placed(sigmas, [(level, {}) for level in levels])]


@pytest.mark.parametrize(
    ("levels", "right"),
    [
        pytest.param([1.0, 0.8, 0.6, 0.4, 0.2], [0, 1, 2, 3, 4], id="euler"),
        pytest.param([1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2], [0, 1, 1, 2, 2, 3, 3, 4, 4], id="heun"),
        pytest.param([1.0, 0.89, 0.8, 0.69, 0.6, 0.49], [0, 0, 1, 1, 2, 2], id="a midpoint belongs to the step before"),
        pytest.param([1.0, 0.8, 0.6, 0.8, 0.6, 0.4, 0.6], [0, 1, 2, 2, 2, 3, 3], id="heunpp2 looks ahead"),
        pytest.param([0.99998, 0.80001, 0.59999], [0, 1, 2], id="through the logarithm and back"),
        pytest.param([1.1, 0.82, 0.8, 0.61], [0, 0, 1, 1], id="noise is added again"),
        pytest.param([1.0, 0.1, 0.0], [0, 4, 4], id="below the last"),
    ],
)
def test_a_call_is_of_the_step_of_its_sigma(levels, right):
    assert steps(SIGMAS, levels) == right


def test_a_level_that_comes_twice_is_one_step():
    session = SamplerSession([1.0, 0.5, 0.5, 0.2, 0.0])
    assert session.levels == [1.0, 0.5, 0.2]
    assert session.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.5, 0.2])


def test_a_schedule_need_not_end_at_zero():
    """The last evaluation of Heun's method is then at the level where another sampler goes on."""
    assert steps(SIGMAS[:3], [1.0, 0.8, 0.8, 0.6]) == [0, 1, 1, 1]


def test_a_step_has_sigma_and_number_of_steps():
    session = SamplerSession(SIGMAS)
    session.place_call(None, {}, 0.7)
    tick = session.step_source.tick(None, None, None, None)
    assert (tick.step, tick.steps, tick.sigma, tick.branch) == (1, 5, 0.7, "call")
    session.place_call(None, {}, 0.6)
    assert session.step_source.tick(None, None, None, None).epoch is tick.epoch


UNCOND, BOTH = {"cond_or_uncond": [1], "uuids": ["b"]}, {"cond_or_uncond": [1, 0], "uuids": ["b", "a"]}


def names(*steps_):
    """Branches of the calls of each step."""
    calls = [(SIGMAS[number], dict(call)) for number, calls in enumerate(steps_) for call in calls]
    given = iter(branch for _, branch in placed(SIGMAS, calls))
    return [[next(given) for _ in calls] for calls in steps_]


def test_prompts_are_told_apart_by_their_ids():
    assert names([UNCOND, {}], [UNCOND, {}]) == [["uncond", "cond"]] * 2
    assert names([BOTH], [BOTH]) == [["uncond+cond"]] * 2
    assert names([{"uuids": ["a"]}], [{"uuids": ["c"]}]) == [["cond"], ["cond (2)"]]
    assert names([{"cond_or_uncond": [2]}]) == [["cond 2"]]


def test_from_where_the_calls_of_a_step_part_all_are_new():
    """The second call without the prompt may be another one than that of the step before, which was the first."""
    assert names([BOTH, {}], [UNCOND, {}, {}], [UNCOND, {}, {}]) == [
        ["uncond+cond", "cond"],
        *[["uncond", "cond (2)", "cond (3)"]] * 2,
    ]
    assert names([{}], [{}, {}], [{}, {}]) == [["cond"], ["cond", "cond (2)"], ["cond", "cond (2)"]]
    assert names([UNCOND, {}], [{}], [{}]) == [["uncond", "cond"], ["cond (2)"], ["cond (2)"]]


def window(*frames):
    return {"context_window": SimpleNamespace(index_list=list(frames))}


def patched(function):
    return {"patches_replace": {"dit": {("double_block", 0): function}}}


def skip(args, extra):
    return args


@pytest.mark.parametrize(
    ("one", "alike", "other"),
    [
        pytest.param(window(0, 1), window(0, 1), window(1, 2), id="window"),
        pytest.param(patched(skip), patched(skip), patched(lambda *_: None), id="function in a block"),
        pytest.param({"patches": {"post_input": [skip]}}, {"patches": {"post_input": [skip]}}, {}, id="function"),
        pytest.param({"shape": (1, 2)}, {"shape": (1, 2)}, {"shape": (1, 3)}, id="shape"),
    ],
)
def test_a_call_is_told_by(one, alike, other):
    assert names([one], [alike], [other]) == [["cond"], ["cond"], ["cond (2)"]]


def test_a_hook_that_changes_its_strength_makes_another_branch():
    strong, weak = SimpleNamespace(strength=1.0), SimpleNamespace(strength=0.5)
    calls = [(sigma, {"hooks": [hook]}) for sigma, hook in zip(SIGMAS, (strong, strong, weak), strict=False)]
    assert [branch for _, branch in placed(SIGMAS, calls)] == ["cond", "cond", "cond (2)"]


def test_sigma_is_read_once_for_the_calls_of_an_evaluation():
    class Counted(torch.Tensor):
        reads = 0

        def __float__(self):
            type(self).reads += 1
            return super().__float__()

    session, sigma = SamplerSession(SIGMAS), torch.tensor([1.0]).as_subclass(Counted)
    for _ in range(3):
        session.place_call(None, {}, sigma)
    assert Counted.reads == 1
