"""A search over actors of Ray: processes on this machine or others, each with a model of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ...blocks.block_lists import fingerprint
from ...blocks.discovery import Blocks
from ...config.cache_plan import CachePlan
from ...errors import InvalidSetting, WrongType
from ...recording.image_metrics import samples_of
from ...recording.rank_broadcast import is_single_process
from ...recording.record import recordable
from ...validation import check_count, check_number, shown
from ..evaluation import Evaluation, Evaluator
from ..timed_run import picture_mismatch
from .executor import ExecutorResult, plan_key

RETRIES = 3  # of a plan whose actor ended


@dataclass(frozen=True)
class Actors:
    """An executor that runs plans on actors of Ray; ``search(executor="ray")`` is short for ``Actors()``.

    A running Ray is used, or one is started for the search.

    Args:
        workers: number of actors; ``None``: as many as the cluster has room for, and the search has plans for.
        num_cpus: CPUs of each actor.
        num_gpus: GPUs of each actor, which may be a part of one; ``None``: one if the target is on an accelerator.
        resources: other resources of each actor, by Ray's names: ``{"NPU": 1}``.
        load: function without arguments that makes the target in each actor; ``run`` has to draw with the target that
            it is given, and refer to no other. ``None``: the target is pickled with all its weights, and sent to
            devices of the same names.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.

    Example:
        >>> Actors(workers=4, num_gpus=0.5).num_gpus
        0.5
        >>> Actors(workers=0)
        Traceback (most recent call last):
        ...
        dithooks.errors.InvalidSetting: workers=0 is out of range: it must be at least 1
    """

    workers: int | None = None
    num_cpus: float = 1
    num_gpus: float | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    load: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        if self.workers is not None:
            check_count("workers", self.workers, 1)
        check_number("num_cpus", self.num_cpus, 0)
        if self.num_gpus is not None:
            check_number("num_gpus", self.num_gpus, 0)
        for name, amount in self.resources.items():
            check_number(f"resources[{name!r}]", amount, 0)
        if self.load is not None and not callable(self.load):
            raise WrongType(f"load must be a function without arguments that makes the target, not {shown(self.load)}")

    def check(self, models: Sequence[nn.Module]) -> None:
        """Check that Ray is installed, and that this is the only process.

        Raises:
            ModuleNotFoundError: Ray is not installed.
            ValueError: ``torch.distributed`` has several ranks.
        """
        ray_module()
        if not is_single_process():
            raise InvalidSetting(
                "executor='ray' is for one process that has the actors to itself, but torch.distributed has several "
                "ranks: give executor='torchrun', or search in one of them before it is initialized"
            )

    def start(self, evaluator: Evaluator, results: Any, most: int) -> _ActorGroup:
        """Start actors with the target; where the target speed-up is of time, each makes an uncached run."""
        ray = ray_module()
        started = not ray.is_initialized()
        if started:
            ray.init(include_dashboard=False, log_to_driver=False)
        try:
            return _ActorGroup(ray, self, evaluator, most, started)
        except BaseException:
            if started:
                ray.shutdown()
            raise

    def options(self, on_accelerator: bool) -> dict[str, Any]:
        """Return the options of each actor, by Ray's names."""
        gpus = float(on_accelerator and not self.resources) if self.num_gpus is None else self.num_gpus
        needs = {"num_cpus": self.num_cpus, "num_gpus": gpus, "resources": dict(self.resources)}
        return {**needs, "max_restarts": RETRIES, "max_task_retries": RETRIES}


class _ActorGroup:
    def __init__(self, ray: Any, asked: Actors, evaluator: Evaluator, most: int, started: bool) -> None:
        self._ray, self._started, self._actors = ray, started, []
        self.seconds, self.run_equivalents = evaluator.seconds, 0.0
        here = recordable(evaluator.target, evaluator.blocks)
        options = asked.options(any(_is_elsewhere(chain.owner) for chain in here))
        fits = _room(ray.cluster_resources(), options)
        self.size = asked.workers or max(1, min(fits, most))
        if self.size > fits:
            need = ", ".join(f"{amount:g} {name}" for name, amount in _needed(options).items())
            raise InvalidSetting(
                f"{self.size} actors of {need} each were asked for, and the cluster has room for {fits}: "
                "give Actors(workers=..., num_cpus=..., num_gpus=...) fewer or smaller ones"
            )
        sent = evaluator if asked.load is None else replace(evaluator, target=torch.nn.Module())  # they make their own
        state = _TorchState(torch.get_num_threads(), torch.is_grad_enabled(), torch.get_float32_matmul_precision())
        try:
            packed = ray.cloudpickle.dumps((sent, asked.load, state, fingerprint(here)))
        except Exception as error:  # anything that the target holds may fail in its own way
            raise InvalidSetting(
                f"what is searched cannot be sent to other processes ({error}): give executor=Actors(load=...), a "
                "function that makes the target, and a run that draws with what it is given and refers to nothing else"
            ) from error
        self._box = [ray.put(packed)]  # sent with each task: an actor that was restarted needs it again
        kind = ray.remote(Worker).options(**options)
        try:
            self._actors = [kind.remote() for _ in range(self.size)]
            self.run_equivalents = float(
                sum(self._results([actor.ready.remote(self._box) for actor in self._actors], True))
            )
        except BaseException:
            self._dismiss()
            raise

    def run(self, plans: Sequence[CachePlan]) -> dict[str, ExecutorResult]:
        """Run one plan on each actor. Ray restarts an actor that ends, which then runs its plan once more."""
        tasks = [actor.run.remote(self._box, plan.to_json()) for actor, plan in zip(self._actors, plans, strict=False)]
        return {plan_key(plan): result for plan, result in zip(plans, self._results(tasks), strict=True)}

    def run_here(self, evaluator: Evaluator, plan: CachePlan) -> ExecutorResult:
        """Run a plan in this process."""
        return evaluator(plan)

    def close(self) -> None:
        """End the actors, and Ray if it was started for them."""
        self._dismiss()
        if self._started:
            self._ray.shutdown()

    def _dismiss(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []

    def _results(self, tasks: Sequence[Any], raise_errors: bool = False) -> list[Any]:
        """Return each task's result, or, unless it is to be raised, its error."""
        results: list[Any] = []
        for task in tasks:
            try:
                results.append(self._ray.get(task))
            except Exception as error:
                plain = _plain(error)
                if raise_errors:
                    raise plain from error
                results.append(plain)
        return results


@dataclass(frozen=True)
class _TorchState:
    """Settings of PyTorch in this process that change the pictures."""

    threads: int
    gradients: bool
    precision: str

    def apply(self) -> None:
        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(self.gradients)
        torch.set_float32_matmul_precision(self.precision)


class Worker:
    """One actor. Its first task sets it up, also after a restart."""

    def __init__(self) -> None:
        self._evaluator: Evaluator | None = None

    def ready(self, box: Sequence[Any]) -> int:
        """Set the actor up; return the number of uncached runs that it made.

        Args:
            box: a list with a reference to what the actor needs, pickled: in a list, Ray does not resolve it.

        Raises:
            ValueError: the actor has another model, or does not draw what was recorded.
        """
        ray = ray_module()
        evaluator, load, state, expected = ray.cloudpickle.loads(ray.get(box[0]))
        state.apply()
        if load is not None:
            evaluator = replace(evaluator, target=load())
            if (own := _fingerprint(evaluator.target, evaluator.blocks)) != expected:
                raise InvalidSetting(
                    f"load() makes another model than the one that was recorded (fingerprint {own}, not {expected})"
                )
        timed = evaluator.seconds is not None
        if timed:  # its speed, while the other actors run, too
            results, seconds = evaluator.timed_run(evaluator.target)
            mismatch = picture_mismatch(samples_of(results), evaluator.reference, "from it")
            if mismatch is not None:
                raise InvalidSetting(f"run does not draw in an actor what was recorded: {mismatch}")
            evaluator = replace(evaluator, seconds=seconds)
        self._evaluator = evaluator
        return int(timed)

    def run(self, box: Sequence[Any], plan: str) -> Evaluation:
        """Evaluate a plan."""
        if self._evaluator is None:
            self.ready(box)
        assert self._evaluator is not None
        return self._evaluator(CachePlan.from_json(plan))


def ray_module() -> Any:
    """Import Ray.

    Raises:
        ModuleNotFoundError: Ray is not installed.
    """
    try:
        return import_module("ray")
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Ray is not installed: pip install 'dithooks[ray]'") from None


def _fingerprint(target: object, blocks: Blocks) -> str:
    return fingerprint(recordable(target, blocks))


def _is_elsewhere(module: nn.Module) -> bool:
    return any(parameter.device.type not in ("cpu", "meta") for parameter in module.parameters())


def _needed(options: Mapping[str, Any]) -> dict[str, float]:
    needed = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], **options["resources"]}
    return {name: amount for name, amount in needed.items() if amount}


def _room(cluster: Mapping[str, float], options: Mapping[str, Any]) -> int:
    """Return how many actors fit into a cluster, as if it were one machine.

    Example:
        >>> _room({"CPU": 8.0, "GPU": 2.0}, {"num_cpus": 1, "num_gpus": 0.5, "resources": {}})
        4
    """
    fitting = [cluster.get(name, 0.0) / amount for name, amount in _needed(options).items()]
    return math.floor(min(fitting, default=64.0) + 1e-9)


def _plain(error: Exception) -> Exception:
    """Return the error that an actor raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    for kind in (InvalidSetting, WrongType, ValueError, TypeError):
        if isinstance(cause, kind):
            return kind(str(cause))
    original = error if cause is None else cause
    return RuntimeError(f"an actor failed: {type(original).__name__}: {original}")
