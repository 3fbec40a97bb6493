"""Searches that measure more than PSNR: what stands in the table, the plan and the journal."""

import learned_metric
import pytest
import torch
from solvers import Solved
from toys import Net, latents

from dithooks import CachePlan, dit_cache, search
from dithooks.errors import MissingPackage
from dithooks.recording.image_metrics import compare, samples_of

STEPS = 8


class Pictures:
    """A run that draws four pictures of 4 × 4 pixels and counts how often it did."""

    def __init__(self):
        torch.manual_seed(6)
        self.pipe, self.x, self.calls = Solved(Net("single", 3)), latents(4, 12), 0

    def __call__(self, pipe):
        self.calls += 1
        return [torch.sigmoid(each).reshape(4, 4, 3) for each in pipe(self.x, STEPS)]

    def search(self, **given):
        return search(self.pipe, self, 2.0, **{"cost": "blocks", "max_evals": 2, "verbose": False, **given})


@pytest.fixture
def _installed(tmp_path, monkeypatch):
    learned_metric.installed(tmp_path, monkeypatch)


@pytest.mark.usefixtures("_installed")
def test_what_is_measured_is_said(tmp_path):
    """In the table, of every plan; and in the plan, of the pictures that were left out of its fit."""
    run = Pictures()
    found = run.search(metrics=("psnr", "lpips"))
    head, first, *_ = str(found).splitlines()
    assert head.endswith("SSIM    LPIPS")
    assert first.endswith(f"{found.evaluations[0].score.lpips:.4f}")
    plain = samples_of(run(run.pipe))
    with dit_cache(run.pipe, found.evaluations[0].plan):
        drawn = samples_of(run(run.pipe))
    assert found.evaluations[0].score.lpips == pytest.approx(compare(drawn, plain, ("lpips",)).lpips, rel=0.02)
    assert found.plan.provenance.lpips > 0
    assert f"LPIPS {found.plan.provenance.lpips:.4f}" in str(found.plan)
    found.plan.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == found.plan


def test_what_is_not_measured_is_not_said():
    found = Pictures().search()
    assert "LPIPS" not in str(found)
    assert "lpips" not in found.plan.to_json()


def test_without_the_package_nothing_is_run(monkeypatch, tmp_path):
    learned_metric.missing(monkeypatch)
    run = Pictures()
    with pytest.raises(MissingPackage, match=r"pip install 'dithooks\[lpips\]'"):
        run.search(metrics=("lpips",), journal=tmp_path / "journal")
    assert run.calls == 0
    assert not (tmp_path / "journal").exists()


@pytest.mark.usefixtures("_installed")
def test_a_journal_of_less(tmp_path):
    """Plans that were not measured so are run again, once; those that were are not, whatever else is asked for."""
    run, journal = Pictures(), tmp_path / "journal"
    run.search(journal=journal)
    assert "lpips" not in (journal / "evaluations.jsonl").read_text()
    run.calls = 0
    first = run.search(journal=journal, metrics=("lpips",))
    assert run.calls == 1 + len(first.evaluations) + 1  # an uncached run to compare with, and the fit at last
    run.calls = 0
    again = run.search(journal=journal, metrics=("lpips",))
    assert run.calls == 1
    assert again.plan.provenance.lpips == first.plan.provenance.lpips > 0
    run.calls = 0
    run.search(journal=journal)
    assert run.calls == 1
