"""Plans to share: pushed to a folder or to a stand-in for the Hub, and loaded again, from there or from the cache."""

import inspect
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from config.test_plan_tiers import FAST, MEDIUM, PLANS, SLOW
from solvers import Solved
from toys import Net, latents

from dithooks import CachePlan, PlanTiers, SearchResult, push_to_hub, search
from dithooks.errors import FileError, InvalidSetting, MissingFile, MissingPackage
from dithooks.sharing.model_card import MARK

pytest.importorskip("matplotlib")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def found():
    """A search for two targets."""
    pipe, x = Solved(Net("single", 3)), latents(4)
    run = lambda pipe: [each[None] for each in pipe(x, 8)]  # noqa: E731
    return search(pipe, run, targets=(1.6, 3), cost="blocks", max_evals=1, verbose=False)


class Hub:
    """The repositories of a stand-in for the Hub, which are folders, and what was asked of it."""

    def __init__(self, place):
        self.place, self.asked = place, []

    def api(self, token=None):
        hub = self

        class Api:
            def create_repo(self, repo_id, **given):
                hub.asked.append(("create_repo", (repo_id,), given))
                (hub.place / repo_id).mkdir(parents=True, exist_ok=given["exist_ok"])

            def file_exists(self, repo_id, filename, **given):
                hub.asked.append(("file_exists", (repo_id, filename), given))
                return (hub.place / repo_id / filename).is_file()

            def hf_hub_download(self, repo_id, filename, **given):
                hub.asked.append(("hf_hub_download", (repo_id, filename), given))
                return str(hub.place / repo_id / filename)

            def upload_folder(self, **given):
                hub.asked.append(("upload_folder", (), given))
                shutil.copytree(given["folder_path"], hub.place / given["repo_id"], dirs_exist_ok=True)
                return "https://huggingface.co/" + given["repo_id"] + "/commit/" + COMMIT

        hub.token = token
        return Api()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", made.api)
    return made


def cached(place, repo, files, revision="main"):
    """Write files as the local cache of the Hub has them: blobs, links to these, and a name for the commit."""
    folder = place / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for part in (folder / "refs", folder / "blobs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(COMMIT)
    for number, (name, data) in enumerate(files.items()):
        (folder / "blobs" / str(number)).write_bytes(data)
        (snapshot / name).symlink_to(os.path.relpath(folder / "blobs" / str(number), snapshot))


class TestFolder:
    def test_tiers(self, tmp_path):
        """A plan file, a card with the promises, and a picture; and the same tiers come out of it."""
        assert push_to_hub(PLANS, tmp_path / "org" / "repo") == str(tmp_path / "org" / "repo")
        folder = tmp_path / "org" / "repo"
        assert sorted(path.name for path in folder.iterdir()) == ["README.md", "plans.json", "plans.png"]
        assert PlanTiers.from_pretrained(folder) == PlanTiers.from_pretrained(str(folder), "plans.json") == PLANS
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: dithooks\n")
        assert "| high | 1.30× | 60.0 dB | 20.0 dB | – | – | ●●●○ |" in card
        assert "| fast | 3.50× | 35.0 dB | 30.0 dB | – | – | ●○○○ |" in card
        assert "![PSNR over speed-up](plans.png)" in card
        assert (folder / "plans.png").read_bytes().startswith(b"\x89PNG")

    def test_one_plan(self, tmp_path):
        push_to_hub(MEDIUM, tmp_path, base_model="org/model", licence="apache-2.0")
        assert CachePlan.from_pretrained(tmp_path) == MEDIUM
        assert PlanTiers.from_pretrained(tmp_path, "plan.json") == PlanTiers({"2x": MEDIUM})
        card = (tmp_path / "README.md").read_text()
        assert "\nbase_model: org/model\nlicense: apache-2.0\n" in card
        assert "with dit_cache(pipe, plan):" in card

    def test_what_a_search_has_found(self, found, tmp_path):
        """All tiers; or of one target, its plan."""
        push_to_hub(found, tmp_path / "tiers")
        assert PlanTiers.from_pretrained(tmp_path / "tiers") == found.plans
        one = found.tiers["3x"]
        assert isinstance(one, SearchResult)
        push_to_hub(one, tmp_path / "plan", filename="three.json")
        assert CachePlan.from_pretrained(tmp_path / "plan", "three.json") == one.plan

    def test_the_code_of_the_card_runs(self, tmp_path, monkeypatch):
        """As it stands, but for the pipeline."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org" / "repo").mkdir(parents=True)
        push_to_hub(PLANS, "org/repo")
        code = (tmp_path / "org/repo/README.md").read_text().partition("```python\n")[2].partition("```")[0]
        head, _, _ = code.partition("with dit_cache")
        names = {}
        exec(head, names)
        assert names["plans"] == PLANS

    def test_a_card_of_others_stays(self, tmp_path):
        """And one that was written here is written anew."""
        (tmp_path / "README.md").write_text("# My model\n")
        push_to_hub(PLANS, tmp_path)
        assert (tmp_path / "README.md").read_text() == "# My model\n"
        assert MARK in (tmp_path / "plans.md").read_text()
        (tmp_path / "README.md").unlink()
        push_to_hub(PLANS, tmp_path)
        push_to_hub(PlanTiers({"only": FAST}), tmp_path)
        card = (tmp_path / "README.md").read_text()
        assert "| only |" in card
        assert "| high |" not in card

    def test_texts_of_a_plan_are_no_markup(self, tmp_path):
        """They may come from anybody's file."""
        evil = "<script>x</script>](http://e)![y](z)| a |\n# b ${c} `d`"
        plan = replace(
            SLOW,
            made=replace(SLOW.made, model=evil, scheduler=evil, fingerprint="`</code><img src=x>"),
            provenance=replace(SLOW.provenance, method=evil, machine=evil, date="\n---\n", versions={evil: evil}),
        )
        push_to_hub(plan, tmp_path)
        card = (tmp_path / "README.md").read_text()
        assert "<script" not in card
        assert "<img" not in card
        assert "![y](" not in card
        assert "](http" not in card
        assert card.count("\n---\n") == 1
        assert not [line for line in card.splitlines() if line.startswith("# b")]


class TestHub:
    def test_pushed_and_loaded(self, hub, tmp_path):
        """Every call fits the real ``HfApi``."""
        made = push_to_hub(PLANS, "org/repo", private=True, commit_message="Better ones", token="t", create_pr=True)
        assert made == f"https://huggingface.co/org/repo/commit/{COMMIT}"
        assert hub.token == "t"
        for method, args, given in hub.asked:
            real = getattr(REAL, method)
            inspect.signature(real).bind(None, *args, **given)
        inspect.signature(REAL.__init__).bind(None, token="t")
        asked = {method: given for method, _, given in hub.asked}
        assert asked["create_repo"] == {"exist_ok": True, "private": True}
        upload = asked["upload_folder"]
        assert (upload["commit_message"], upload["create_pr"], upload["revision"]) == ("Better ones", True, None)
        assert not Path(upload["folder_path"]).exists()
        repo = hub.place / "org" / "repo"
        assert sorted(path.name for path in repo.iterdir()) == ["README.md", "plans.json", "plans.png"]
        assert PlanTiers.from_pretrained(repo) == PLANS
        assert 'PlanTiers.from_pretrained("org/repo", "plans.json")' in (repo / "README.md").read_text()

    def test_a_card_of_others_stays(self, hub):
        repo = hub.place / "org" / "repo"
        repo.mkdir(parents=True)
        (repo / "README.md").write_text("# My model\n")
        push_to_hub(SLOW, "org/repo")
        assert (repo / "README.md").read_text() == "# My model\n"
        assert MARK in (repo / "plan.md").read_text()

    def test_what_the_hub_refuses(self, hub, monkeypatch):
        """Its errors come as one line that says what was pushed."""
        monkeypatch.setattr(hub, "place", Path(os.devnull))
        with pytest.raises(FileError, match=r"^org/repo cannot be read or written on the Hub: .*Not a directory"):
            push_to_hub(SLOW, "org/repo")

    def test_the_cache(self, tmp_path, monkeypatch):
        """Offline: the file of the commit that a branch is known to be at, or of one that is named."""
        files = {"plans.json": PLANS.to_json().encode(), "plan.json": SLOW.to_json().encode()}
        cached(tmp_path, "org/repo", files)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert PlanTiers.from_pretrained("org/repo", cache_dir=tmp_path) == PLANS
        assert CachePlan.from_pretrained("org/repo", cache_dir=tmp_path) == SLOW
        assert CachePlan.from_pretrained("org/repo", revision=COMMIT, cache_dir=tmp_path) == SLOW
        for given, said in (
            ({"filename": "other.json"}, r"^org/repo: other.json is not there, or cannot be reached"),
            ({"revision": "v2"}, r"^org/repo: plan.json is not there"),
        ):
            with pytest.raises(MissingFile, match=said) as raised:
                CachePlan.from_pretrained("org/repo", cache_dir=tmp_path, **given)
            assert len(str(raised.value)) <= 300

    def test_the_cache_without_asking(self, tmp_path):
        cached(tmp_path, "org/repo", {"plan.json": SLOW.to_json().encode()})
        assert CachePlan.from_pretrained("org/repo", cache_dir=tmp_path, local_files_only=True) == SLOW

    @pytest.mark.parametrize(
        "data",
        [
            b"\x80\x04\x95",  # a pickle
            b'{"schema": 2, "kind": "CachePlan"}',
            SLOW.to_json().replace('"Reuse"', '"os.system"').replace('"date": "', '"run": "x", "date": "').encode(),
            b"[" * 100_000,
            b'{"schema": 1e999, "kind": "CachePlan"}',
            b" " * (2**22 + 1),
        ],
        ids=["pickle", "lacking", "fields", "nested", "infinite", "large"],
    )
    @pytest.mark.parametrize("kind", [CachePlan, PlanTiers])
    def test_a_hostile_file(self, kind, data, tmp_path):
        """It is refused by the reader of all files, from the cache and from a folder."""
        cached(tmp_path / "cache", "org/repo", {"plan.json": data})
        (tmp_path / "plan.json").write_bytes(data)
        for repo, given in (("org/repo", {"cache_dir": tmp_path / "cache", "local_files_only": True}), (tmp_path, {})):
            with pytest.raises(InvalidSetting, match=r"plan\.json") as raised:
                kind.from_pretrained(repo, "plan.json", **given)
            assert len(str(raised.value)) <= 400


class TestArguments:
    @pytest.mark.parametrize("name", ["../plan.json", "/etc/x.json", "plan.yaml", "", "a/../../b.json", "a\\b.json", 3])
    def test_names_that_lead_elsewhere(self, name, tmp_path):
        with pytest.raises((ValueError, TypeError), match="filename"):
            CachePlan.from_pretrained(tmp_path, name)
        with pytest.raises((ValueError, TypeError), match="filename"):
            push_to_hub(SLOW, tmp_path, filename=name)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"repo": "no_id"}, "repo='no_id' is neither a folder nor an id"),
            ({"repo": "a/b/c"}, "neither a folder"),
            ({"repo": 3}, "repo must be"),
            ({"base_model": "a\n---\nb"}, "base_model="),
            ({"licence": "x: y"}, "licence="),
            ({"plans": "plan.json"}, "plans must be"),
            ({"revision": "main"}, "revision and create_pr"),
            ({"create_pr": True}, "revision and create_pr"),
        ],
    )
    def test_what_cannot_be_pushed(self, given, said, tmp_path, hub):
        arguments = {"plans": SLOW, "repo": tmp_path / "here", **given}
        with pytest.raises((ValueError, TypeError), match=said):
            push_to_hub(**arguments)
        assert not list(tmp_path.iterdir())
        assert hub.asked == []

    def test_a_revision_of_a_folder(self, tmp_path):
        SLOW.save(tmp_path / "plan.json")
        with pytest.raises(ValueError, match="revision='main' is of repositories"):
            CachePlan.from_pretrained(tmp_path, revision="main")
        with pytest.raises(MissingFile):
            CachePlan.from_pretrained(tmp_path / "elsewhere")

    def test_without_the_packages(self, monkeypatch, tmp_path):
        """A folder needs no ``huggingface_hub``; without matplotlib, nothing is touched."""
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        push_to_hub(SLOW, tmp_path / "a")
        assert CachePlan.from_pretrained(tmp_path / "a") == SLOW
        with pytest.raises(MissingPackage, match=r"pip install 'dithooks\[hub\]'"):
            CachePlan.from_pretrained("org/repo")
        with pytest.raises(MissingPackage, match=r"push_to_hub needs huggingface_hub"):
            push_to_hub(SLOW, "org/repo")
        for name in [each for each in sys.modules if each.partition(".")[0] == "matplotlib"]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ModuleNotFoundError, match=r"dithooks\[plot\]"):
            push_to_hub(SLOW, tmp_path / "b")
        assert not (tmp_path / "b").exists()


REAL = huggingface_hub.HfApi


def test_plans_of_which_nothing_was_measured(tmp_path):
    """There is nothing to draw, and nothing is written."""
    plan = replace(SLOW, provenance=replace(SLOW.provenance, psnr=None, worst=None))
    with pytest.raises(InvalidSetting, match="no PSNR was measured"):
        push_to_hub(plan, tmp_path / "here")
    assert not (tmp_path / "here").exists()
    assert json.loads(plan.to_json())["kind"] == "CachePlan"
