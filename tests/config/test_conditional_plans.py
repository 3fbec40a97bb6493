"""Plans with steps at which one branch of guidance alone is computed: files, counts, and what is refused."""

import json
from dataclasses import replace

import pytest

from dithooks import CachePlan
from dithooks.config.provenance import PlanTarget, Provenance
from dithooks.config.transformer_plan import TransformerPlan
from dithooks.errors import InvalidSetting, WrongType
from dithooks.policies.conditional import Conditional
from dithooks.policies.history import Schedule
from dithooks.predictors.fitted import BranchWeights

STEPS = (1, 1, 1, 0, 1, 0)
WEIGHTS = (None, None, None, (1.5, -0.5), None, (1.0,))
SIGMAS = (1.0, 0.8, 0.6, 0.4, 0.3, 0.1)
ALONE = Conditional(0, (0, 0, 1, 0, 1, 0))


def piece(conditional=ALONE, **given):
    fields = {"payload": "output", "conditional": conditional, **given}
    return TransformerPlan("transformer", 0, 3, 3, STEPS, WEIGHTS, SIGMAS, **fields)


def plan(*pieces):
    made = PlanTarget("Model", "0123456789abcdef", 3, "float32", 6, None, ())
    return CachePlan(pieces, made, Provenance("2026-11-30", {}, "CPU", 1, 2.0, "by hand", 2.0, 0.0))


def test_a_file_has_them_where_they_are_given():
    given = plan(piece())
    text = given.to_json()
    assert json.loads(text)["schema"] == 2
    assert json.loads(text)["pieces"][0]["conditional"] == {"branch": 0, "steps": [0, 0, 1, 0, 1, 0]}
    assert CachePlan.from_json(text) == given
    in_batch = plan(piece(Conditional(1, ALONE.steps, in_batch=True)))
    assert json.loads(in_batch.to_json())["pieces"][0]["conditional"]["in_batch"] is True
    assert CachePlan.from_json(in_batch.to_json()) == in_batch
    assert "conditional" not in plan(piece(None)).to_json()


def test_a_configuration_has_them_too():
    config = plan(piece()).config
    assert config.when.conditional == ALONE
    assert type(config).from_json(config.to_json()) == config
    assert '"conditional"' not in plan(piece(None)).config.to_json()


def test_a_step_of_one_branch_counts_half():
    """Of 6 steps of 3 blocks, two are left out, and two by half."""
    given = piece()
    assert given.picture == "●●◐○◐○"
    assert given.executions == (18, 9.0)
    assert given.saved == 0.5
    assert plan(given).speedup == 2.0
    assert "●●◐○◐○  2 of 6 steps reused" in str(plan(given))
    assert piece(None).executions == (18, 6)


def test_of_a_transformer_that_is_called_later():
    later = replace(piece(Conditional(0, (0, 0, 0, 0, 1, 0))), called=(1, 6))
    assert later.picture == "·●●○◐○"
    assert later.executions == (15, 7.5)


def test_runs_of_as_many_steps_have_them_and_others_compute_whole():
    other = replace(
        piece(None),
        steps=(1, 1, 0, 1, 1, 1, 1, 0),
        coefficients=(None, None, (1.0,), None, None, None, None, (1.0,)),
        sigmas=(1.0, 0.9, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1),
        conditional=Conditional(0, (0, 0, 0, 0, 0, 1, 0, 0)),
    )
    given = replace(piece(), others=(other,))
    assert CachePlan.from_json(plan(given).to_json()) == plan(given)
    policy = given.policy
    assert policy.has_conditional
    assert policy.for_run(Schedule(6, sigmas=SIGMAS)).conditional == ALONE
    assert policy.for_run(Schedule(8, sigmas=other.sigmas)).conditional == other.conditional
    assert policy.for_run(Schedule(7)).conditional is None
    assert not piece(None).policy.has_conditional


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"conditional": Conditional(0, (0, 0, 0, 1, 0, 0))}, "step 3, which is reused"),
        ({"conditional": Conditional(0, (1, 0, 0, 0, 0, 0))}, "step 0, the first"),
        ({"conditional": Conditional(0, (0, 0, 1))}, "3 entries, but there are 6 steps"),
        ({"conditional": ALONE, "called": (2, 6), "coefficients": (*WEIGHTS[:3], (1.0,), None, (1.0,))}, "step 2, the"),
        ({"conditional": Conditional(0, (0, 1, 0, 0, 0, 0)), "called": (2, 6)}, "step 1, at which .* not called"),
        ({"payload": "residual"}, "give payload='output', or leave conditional out"),
        (
            {"branches": (BranchWeights(WEIGHTS),) * 2, "in_batch": True},
            "in_batch=True, but conditional.in_batch=False",
        ),
        ({"branches": (BranchWeights(WEIGHTS),) * 2, "conditional": Conditional(2, ALONE.steps)}, "weights of 2 bran"),
    ],
)
def test_what_does_not_fit_is_refused(change, why):
    fields = {"coefficients": WEIGHTS, "payload": "output", "conditional": ALONE, **change}
    if "called" in change:
        fields["coefficients"] = (*WEIGHTS[:3], (1.0,), None, (1.0,))
    with pytest.raises(InvalidSetting, match=why) as caught:
        TransformerPlan("transformer", 0, 3, 3, STEPS, sigmas=SIGMAS, **fields)
    assert len(str(caught.value)) <= 300


def test_what_is_no_such_setting_is_refused():
    for make, why in (
        (lambda: Conditional(0, (0, 0)), "leave conditional out if there is none"),
        (lambda: Conditional(0, (0, 2)), "give a 1 for each step"),
        (lambda: Conditional(2, (0, 1), True), "halves of a batch are 0 and 1"),
        (lambda: Conditional(-1, (0, 1)), "branch"),
    ):
        with pytest.raises(InvalidSetting, match=why):
            make()
    for make in (lambda: Conditional(0, 3), lambda: piece((0, 0, 1, 0, 0, 0)), lambda: Conditional(0, (0, 1), 1)):
        with pytest.raises(WrongType):
            make()


def test_a_file_with_something_else_is_refused():
    data = json.loads(plan(piece()).to_json())
    data["pieces"][0]["conditional"] = [0, 1]
    with pytest.raises(WrongType, match="conditional must be an object with the fields of a Conditional"):
        CachePlan.from_json(json.dumps(data))
    data["pieces"][0]["conditional"] = {"branch": 0}
    with pytest.raises(InvalidSetting, match="conditional lacks steps"):
        CachePlan.from_json(json.dumps(data))
