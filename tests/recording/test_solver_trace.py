"""What a recording keeps of the solver's steps, against a plain loop; files of it, and files that are none."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, HeunDiscreteScheduler
from solvers import Euler, Halving, Solved
from toys import Net, Pipe, latents, prompt

from dithooks import Recording, plan, record, search
from dithooks.recording.solver_trace import NUMBERS, places_of, taken

STEPS, DEPTH = 6, 3


class Keeping(Euler):
    """Keeps what it was given, and has returned."""

    def __init__(self):
        super().__init__()
        self.given, self.returned = [], []

    def __deepcopy__(self, memo):
        twin = Euler()
        twin.sigmas, twin.timesteps, twin.step_index = self.sigmas, self.timesteps, self.step_index
        return twin

    def step(self, model_output, timestep, sample):
        (following,) = super().step(model_output, timestep, sample)
        self.given.append(model_output.clone())
        self.returned.append(following.clone())
        return (following,)


def recorded(scheduler, *x, steps=STEPS):
    torch.manual_seed(2)
    pipe = Solved(Net("single", DEPTH), scheduler=scheduler)
    return pipe, record(pipe, lambda pipe: [each for part in x for each in pipe(part, steps)])


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A recording, and its file's arrays."""
    _, recording = recorded(Euler(), latents(2))
    path = tmp_path_factory.mktemp("solver") / "recording.npz"
    recording.save(path)
    with np.load(path) as file:
        return recording, path, dict(file)


class TestWhatIsKept:
    @pytest.mark.parametrize("runs", [1, 3])
    def test_what_a_plain_loop_sees(self, runs):
        x, scheduler = [latents(2) for _ in range(runs)], Keeping()
        _, recording = recorded(scheduler, *x)
        solver = recording.solver
        assert recording.unsolved == ""
        for name, seen in (("outputs", scheduler.given), ("latents", scheduler.returned)):
            wanted = np.stack(
                [np.concatenate([seen[run * STEPS + step].numpy() for run in range(runs)]) for step in range(STEPS)]
            ).reshape(STEPS, 2 * runs, -1)
            assert getattr(solver, name).dtype == np.float32
            np.testing.assert_array_equal(getattr(solver, name), wanted)
        np.testing.assert_allclose(solver.gains, [-1 / STEPS] * STEPS, rtol=1e-5)
        assert solver.places.tolist() == list(range(24))
        flat = solver.outputs.reshape(STEPS, -1).astype(np.float64)
        np.testing.assert_allclose(solver.gram, np.einsum("sd,td->st", flat, flat), rtol=1e-12)

    def test_of_large_pictures_some_numbers(self):
        """The same ones at each step, for each picture, all of them different."""
        scheduler, x = Keeping(), torch.randn(1, NUMBERS // 2, 4)
        _, recording = recorded(scheduler, x, steps=3)
        places = recording.solver.places
        assert places.shape == (NUMBERS,)
        assert (np.diff(places) > 0).all()
        assert places[0] >= 0
        assert places[-1] < 2 * NUMBERS
        for step in range(3):
            given = scheduler.given[step].reshape(1, -1).numpy()
            np.testing.assert_array_equal(recording.solver.outputs[step], given[:, places])

    def test_places(self):
        """2²⁴ numbers of a recording at most, whatever its pictures."""
        assert places_of(10).tolist() == list(range(10))
        assert len(places_of(10**6)) == NUMBERS
        assert len(places_of(10**6, pictures=64, steps=50)) == 2**24 // (64 * 50)
        assert len(places_of(10**6, pictures=10**6, steps=10**3)) == 1
        tensor = torch.arange(24.0, dtype=torch.bfloat16).reshape(2, 3, 4)
        assert taken(tensor, np.array([0, 5, 11])).tolist() == [[0, 5, 11], [12, 17, 23]]


class TestUnsolved:
    def test_a_scheduler_that_cuts_off(self):
        """The plan and the search go without, and forecast residuals with the recording's weights."""
        pipe, recording = recorded(Halving(), x := latents(2))
        assert recording.solver is None
        assert "at step 0, what the scheduler returns does not go with the model's output: " in recording.unsolved
        run = lambda pipe: list(pipe(x, STEPS))  # noqa: E731
        found = search(pipe, run, 1.4, recording=recording, cost="blocks", max_evals=1, verbose=False)
        assert found.plan.pieces[0].payload == "residual"
        assert found.plan.pieces[0].corrections is None
        assert found.plan.pieces == plan(recording, 1.4, cost="blocks").pieces

    def test_a_scheduler_whose_noise_is_a_step_by_itself(self):
        """DDPM clips what it predicts."""
        scheduler = DDPMScheduler(clip_sample=True, clip_sample_range=0.01)

        class Noisy(Solved):
            def __call__(self, x, steps):
                torch.manual_seed(1)
                return super().__call__(x, steps)

        pipe, x = Noisy(Net("single", DEPTH), scheduler=scheduler), latents(2)
        recording = record(pipe, lambda pipe: list(pipe(x, STEPS)))
        assert recording.solver is None
        assert "does not go with the model's output" in recording.unsolved

    def test_no_scheduler_to_watch(self):
        x, pipe = latents(2), Pipe(Net("single", DEPTH))
        recording = record(pipe, lambda pipe: list(pipe(x, STEPS)))
        assert recording.solver is None
        assert recording.unsolved == "there is none whose step() takes an output and a sample"

    def test_a_scheduler_that_is_not_stepped(self):
        class Aside(Solved):
            def __call__(self, x, steps):
                self.scheduler.set_timesteps(steps)
                for t in self.scheduler.timesteps:
                    x = x - self.transformer(x, t / 1000) / steps
                    self.scheduler.step_index = (self.scheduler.step_index or 0) + 1
                return x

        pipe, x = Aside(Net("single", DEPTH)), latents(2)
        with torch.no_grad():
            recording = record(pipe, lambda pipe: list(pipe(x, STEPS)))
        assert (recording.solver, recording.unsolved) == (None, "its step() is not called")

    def test_another_step_count_or_shape(self):
        class Twice(Solved):
            """Steps twice at one step of the transformer."""

            def __call__(self, x, steps):
                self.scheduler.set_timesteps(steps)
                for step, t in enumerate(self.scheduler.timesteps):
                    out = self.transformer(x, t / 1000)
                    x = self.scheduler.step(out, t, x)[0]
                    if step == 2:
                        self.scheduler.step_index = 2
                        x = self.scheduler.step(out, t, x)[0]
                return x

        pipe, x = Twice(Net("single", DEPTH)), latents(2)
        with torch.no_grad():
            recording = record(pipe, lambda pipe: list(pipe(x, STEPS)))
        assert recording.solver is None
        assert "the scheduler makes several steps at step 2" in recording.unsolved

    def test_what_is_drawn_stays(self):
        """With a scheduler that cannot be watched to the end, the pictures are those of a plain run, bit for bit."""
        torch.manual_seed(2)
        x = latents(2)
        plain = Solved(Net("single", DEPTH), scheduler=Halving())
        with torch.no_grad():
            wanted = plain(x, STEPS)
            recording = record(plain, lambda pipe: list(pipe(x, STEPS)))
        assert torch.equal(torch.stack(recording.results), wanted)
        assert "step" not in vars(plain.scheduler)


class TestHeun:
    def test_two_calls_a_step(self):
        """Each call of the transformer is a step to the clock, and each is the solver's, too: 2·n − 1 of them."""
        scheduler, seen = HeunDiscreteScheduler(), []

        class Looking(Solved):
            def guided(self, model, x, t, prompts):
                seen.append(super().guided(model, x, t, prompts).clone())
                return seen[-1]

        pipe, x = Looking(Net("single", DEPTH), scheduler=scheduler), latents(2)
        recording = record(pipe, lambda pipe: list(pipe(x, 4)))
        assert recording.solver is not None, recording.unsolved
        assert recording.steps == len(recording.solver.outputs) == 7
        seen = seen[-7:]
        np.testing.assert_array_equal(recording.solver.outputs, torch.stack(seen).reshape(7, 2, -1).numpy())
        np.testing.assert_array_equal(recording.solver.latents[-1], torch.stack(recording.results).reshape(2, -1))


class TestFiles:
    def test_there_and_back(self, stored):
        recording, path, _ = stored
        read = Recording.load(path)
        for name in ("outputs", "latents", "gains", "places"):
            one, other = getattr(read.solver, name), getattr(recording.solver, name)
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        assert read.unsolved == ""
        assert read.solver.numbers == recording.solver.numbers == 24

    def test_an_unsolved_one(self, tmp_path):
        _, recording = recorded(Halving(), latents(2))
        recording.save(tmp_path / "recording.npz")
        read = Recording.load(tmp_path / "recording.npz")
        assert (read.solver, read.unsolved) == (None, recording.unsolved)

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("outputs", lambda a: a[:-1], "outputs is of shape (5, 2, 24), and should be (6, 2, 24)"),
            ("outputs", lambda a: a[:, :, 0], "outputs is of shape (6, 2), and should be (steps, pictures, numbers)"),
            ("outputs", lambda a: a[:, :0], "outputs is of shape (6, 0, 24), and should be (steps, pictures, numbers)"),
            ("outputs", lambda a: np.where(a == a.max(), np.nan, a), "outputs has numbers that are not finite"),
            ("outputs", lambda a: a.astype("U4"), "outputs is of <U4, and should be of numbers"),
            ("latents", lambda a: a[:, :1], "latents is of shape (6, 1, 24), and should be (6, 2, 24)"),
            ("latents", lambda a: np.where(a == a.max(), np.inf, a), "latents has numbers that are not finite"),
            ("gains", lambda a: a[1:], "gains is of shape (5,), and should be (6,)"),
            ("gains", lambda a: a * np.nan, "gains has numbers that are not finite"),
            ("places", lambda a: a[::-1], "places must rise, from 0 on"),
            ("places", lambda a: a - 1, "places must rise, from 0 on"),
            ("places", lambda a: a * 1.0, "places is of float64, and should be of whole numbers"),
            ("places", lambda a: a[:-1], "places is of shape (23,), and should be (24,)"),
            ("places", lambda a: a + 1, "places reach 24, beyond latent_numbers, 24"),
            ("latents", None, "it lacks 'solver.latents'"),
        ],
        ids=lambda each: each if isinstance(each, str) else "changed",
    )
    def test_files_that_are_none(self, stored, tmp_path, name, change, message):
        arrays = dict(stored[2])
        array = arrays.pop(f"solver.{name}")
        if change is not None:
            arrays[f"solver.{name}"] = change(array)
        np.savez(tmp_path / "recording.npz", **arrays)
        with pytest.raises(ValueError, match="is no file that Recording") as raised:
            Recording.load(tmp_path / "recording.npz")
        assert message in str(raised.value)

    def test_a_file_of_an_earlier_version(self, stored, tmp_path):
        """It says nothing of a solver."""
        arrays = {name: array for name, array in stored[2].items() if not name.startswith("solver.")}
        head = json.loads(str(arrays["head"]))
        del head["is_solved"], head["unsolved"]
        arrays["head"] = np.array(json.dumps(head))
        np.savez(tmp_path / "recording.npz", **arrays)
        read = Recording.load(tmp_path / "recording.npz")
        assert (read.solver, read.unsolved) == (None, "")


class TestGuidance:
    """The direction of guidance: the share of the other branch times what it has returned less the first one's."""

    def guided(self, guidance, scale=3.0, guide=None, starts=((5, 6),), unguided=None):
        torch.manual_seed(2)
        net = Net("swapped", DEPTH).double()
        seen = []

        class Recorded(Solved):
            def guided(self, model, x, t, prompts):
                first, second = prompts
                if len(seen) == unguided:
                    seen.append(None)
                    return model(x, t, encoder_hidden_states=first)
                if guidance == "calls":
                    one, two = model(x, t, encoder_hidden_states=first), model(x, t, encoder_hidden_states=second)
                else:
                    both = model(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([first, second]))
                    one, two = both.chunk(2)
                seen.append((one, two))
                return two + scale * (one - two) if guide is None else guide(len(seen) - 1, one, two)

        pipe = Recorded(net, guidance)
        x = [latents(count, tokens).double() for count, tokens in starts]
        prompts = [[prompt(len(each)).double() for _ in range(2)] for each in x]
        run = lambda pipe: [each for pair in zip(x, prompts, strict=True) for each in pipe(pair[0], STEPS, pair[1])]  # noqa: E731
        return record(pipe, run), seen

    @pytest.mark.parametrize("guidance", ["calls", "batch"])
    def test_what_a_plain_loop_sees(self, guidance, tmp_path):
        recording, seen = self.guided(guidance, starts=((5, 6), (3, 6)))
        solver = recording.solver
        assert (solver.conditional, solver.in_batch) == (0, guidance == "batch")
        wanted = np.stack(
            [
                np.concatenate([(-2.0 * (two - one)).reshape(len(one), -1).numpy() for one, two in seen[step::STEPS]])
                for step in range(STEPS)
            ]
        )
        assert solver.apart.dtype == np.float32
        np.testing.assert_allclose(solver.apart, wanted, rtol=0, atol=1e-4)
        squares = ((wanted[:, None] - wanted[None]) ** 2).sum((2, 3))
        np.testing.assert_allclose(solver.apart_squares, squares, rtol=1e-3, atol=1e-4)
        recording.save(path := tmp_path / "recording.npz")
        again = Recording.load(path).solver
        assert (again.conditional, again.in_batch) == (solver.conditional, solver.in_batch)
        np.testing.assert_array_equal(again.apart, solver.apart)

    def test_the_branch_with_the_largest_share_may_be_the_second_half(self):
        recording, seen = self.guided("batch", scale=-2.0)  # shares −2 and 3
        assert (recording.solver.conditional, recording.solver.in_batch) == (1, True)
        wanted = np.stack([(-2.0 * (one - two)).reshape(len(one), -1).numpy() for one, two in seen])
        np.testing.assert_allclose(recording.solver.apart, wanted, rtol=0, atol=1e-4)

    def test_but_not_the_second_call(self):
        recording, _ = self.guided("calls", scale=-2.0)
        assert (recording.solver.apart, recording.solver.conditional) == (None, None)
        assert recording.solver.apart_squares is None

    def test_guidance_at_some_steps_only(self):
        recording, _ = self.guided("calls", unguided=3)
        assert recording.solver.apart is None

    def test_guidance_that_is_no_weighted_sum(self):
        recording, _ = self.guided("calls", guide=lambda step, one, two: (20.0 * (one - two)).sin())
        assert recording.solver.outputs.shape[0] == STEPS
        assert recording.solver.apart is None

    def test_without_guidance(self):
        _, recording = recorded(Euler(), latents(2))
        assert (recording.solver.apart, recording.solver.conditional, recording.solver.in_batch) == (None, None, False)

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"solver.apart": np.zeros((1, 2, 3), np.float32)}, "solver: apart is of shape"),
            ({"conditional": 1}, "conditional=1: it should be the first of two calls"),
            ({"conditional": -1}, "conditional"),
            ({"in_batch": 1}, "in_batch"),
        ],
    )
    def test_files_that_are_none(self, changes, why, tmp_path):
        recording, _ = self.guided("calls")
        recording.save(path := tmp_path / "recording.npz")
        with np.load(path) as file:
            arrays = dict(file)
        head = json.loads(str(arrays["head"]))
        for name, value in changes.items():
            (arrays if name in arrays else head)[name] = value
        np.savez(path, **{**arrays, "head": np.array(json.dumps(head))})
        with pytest.raises(ValueError, match=why):
            Recording.load(path)
