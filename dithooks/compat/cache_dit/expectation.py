"""Settings of cache-dit that have no effect here, compared with the runs."""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.run import RunEnd


@dataclass(frozen=True)
class Expectation:
    """An expectation about the runs of one transformer; the cache does not depend on it.

    Args:
        has_separate_cfg: whether guidance takes several calls per step (``True``) or one (``False``).
        num_inference_steps: number of steps of a run.

    Example:
        >>> run = RunEnd("net", steps=8, most_calls=1, scheduled=8, is_over=True)
        >>> Expectation(num_inference_steps=8).difference(run) is None
        True
        >>> Expectation(num_inference_steps=50).difference(run)
        ('unexpected', 'net: num_inference_steps=50, but the run had 8: the run counts')
    """

    has_separate_cfg: bool | None = None
    num_inference_steps: int | None = None

    def difference(self, run: RunEnd) -> tuple[str, str] | None:
        """Return topic and wording of a warning of a run that differs; ``None`` if it does not differ."""
        steps, declared = run.steps, self.num_inference_steps
        if steps < 2:
            return None
        differences = []
        if self.has_separate_cfg and run.most_calls == 1:
            differences.append(f"has_separate_cfg=True, but none of {steps} steps made more than one call")
        if self.has_separate_cfg is False and run.most_calls > 1:
            differences.append(
                f"has_separate_cfg=False, but a step made {run.most_calls} calls: they are kept apart all the same"
            )
        made = run.scheduled or (steps if run.is_over or steps > (declared or 0) else declared)
        if declared is not None and declared not in (made, steps):  # steps alone: another transformer makes the others
            differences.append(f"num_inference_steps={declared}, but the run had {made}: the run counts")
        return ("unexpected", f"{run.name}: {'; '.join(differences)}") if differences else None
