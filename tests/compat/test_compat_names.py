"""Names of cache-dit: each that its users import is here, or says what to take instead; the page lists them all."""

import importlib
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from toys import Net, Pipe

import dithooks
from bench.checks.peer_names import HERE, PAGE, found, listed, unknown, used
from dithooks import DitCacheConfig, dit_cache
from dithooks.compat import cache_dit
from dithooks.compat.cache_dit import BlockAdapter, BlockAdapterRegister, DBCacheConfig
from dithooks.compat.cache_dit.absent_names import ABSENT_NAMES, AbsentName
from dithooks.errors import DitHooksError, InvalidSetting

TEXT = PAGE.read_text(encoding="utf-8")
LISTED = listed(TEXT)


class TestThePage:
    def test_it_lists_what_the_servers_import(self):
        """SGLang 0.5.23 and vLLM-Omni 0.30.0: ``python -m bench.checks.peer_names`` reads their wheels."""
        for server, least in (("SGLang", 17), ("vLLM-Omni", 18)):
            assert sum(server in users for users, _ in LISTED.values()) >= least

    @pytest.mark.parametrize("name", LISTED)
    def test_each_is_here_or_says_what_the_page_says(self, name):
        cell = LISTED[name][1]
        if cell.startswith("there"):
            assert not isinstance(found(name), AbsentName)
            return
        remedy = re.sub("[`*]", "", cell)
        with pytest.raises(InvalidSetting) as told:
            found(name)()
        assert re.sub("`", "", str(told.value)).endswith(f" of cache-dit is not here: {remedy}")

    def test_all_that_are_not_here_are_listed(self):
        assert {name.rpartition(".")[2] for name in LISTED} >= ABSENT_NAMES.keys()

    def test_all_that_are_here_are_listed(self):
        assert {name.rpartition(".")[2] for name in LISTED} >= set(cache_dit.__all__) - {"CacheStats"}


class TestTheReader:
    def test_a_name_is_read_by_its_path_whatever_it_is_called_there(self):
        source = """
import cache_dit
import cache_dit.caching as there, torch
from cache_dit import BlockAdapter as Adapter, ForwardPattern
from .cache_dit import not_theirs
def later():
    from cache_dit.caching.cache_contexts import cache_manager
    cache_manager.CachedContextManager.similarity, Adapter.is_cached, there.steps_mask, torch.cache_dit
    cache_dit.enable_cache(ForwardPattern.Pattern_0, self.cache_dit.nothing)
"""
        manager = "caching.cache_contexts.cache_manager"
        assert used(source) == {
            *("BlockAdapter", "BlockAdapter.is_cached", "ForwardPattern", "ForwardPattern.Pattern_0", "enable_cache"),
            *("caching.steps_mask", manager, f"{manager}.CachedContextManager"),
            f"{manager}.CachedContextManager.similarity",
        }
        assert [name for name in used(source) if unknown(name, LISTED)] == []

    @pytest.mark.parametrize("name", ["nothing", "caching.nothing", "BlockAdapter.nothing", "strange.enable_cache"])
    def test_one_that_leads_nowhere(self, name):
        assert unknown(name, LISTED)


class TestAbsent:
    @pytest.mark.parametrize("name", ABSENT_NAMES)
    def test_it_can_be_imported_and_every_use_of_it_says_what_to_take(self, name):
        given = {}
        exec(f"from {HERE} import {name}", given)
        absent = given[name]
        derived = type("Derived", (absent,), {"own": 1})
        for use in (absent, lambda: absent(1, a=2), lambda: absent.AUTO, derived, lambda: derived.apply):
            with pytest.raises(DitHooksError, match=f"{name} of cache-dit is not here: ") as told:
                use()
            assert len(str(told.value)) <= 300
        assert not hasattr(absent, "AUTO")
        assert not isinstance(1, absent)
        assert derived.own == 1

    def test_a_name_that_never_was(self):
        with pytest.raises(AttributeError, match="has no quantise"):
            cache_dit.quantise  # noqa: B018
        with pytest.raises(ImportError, match="quantise"):
            exec(f"from {HERE}.caching import quantise")


class TestSubmodules:
    @pytest.mark.parametrize(
        "line",
        [
            "from HERE.caching.block_adapters import BlockAdapterRegister",
            "from HERE.caching import BlockAdapterRegister",
            "import HERE.caching.block_adapters as there; BlockAdapterRegister = there.BlockAdapterRegister",
            "import HERE.caching as there; BlockAdapterRegister = there.block_adapters.BlockAdapterRegister",
        ],
    )
    def test_a_name_by_its_path(self, line):
        given = {}
        exec(line.replace("HERE", HERE), given)
        assert given["BlockAdapterRegister"] is BlockAdapterRegister

    @pytest.mark.parametrize("path", ["caching.patch_functors", "cache_factory.patch_functors"])
    def test_functors(self, path):
        functors, model = importlib.import_module(f"{HERE}.{path}"), Net()
        assert issubclass(functors.HiDreamPatchFunctor, cache_dit.PatchFunctor)
        assert functors.HiDreamPatchFunctor().apply(model) is model

    @pytest.mark.slow
    def test_in_a_process_that_has_imported_nothing_yet(self):
        """A path deeper than the package that is imported first."""
        code = f"from {HERE}.caching.cache_contexts.cache_manager import CachedContextManager as C; print(C.__name__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "CachedContextManager\n"

    def test_the_machine(self):
        from dithooks.compat.cache_dit.logger import init_logger

        from dithooks.compat.cache_dit.platforms import current_platform

        kind = current_platform.device_type
        assert torch.empty(1, device=kind).device.type == kind
        assert current_platform.is_accelerator_available() == (kind != "cpu")
        assert current_platform.device_count() >= 1
        current_platform.synchronize()
        with pytest.raises(AttributeError):
            current_platform.no_such_name  # noqa: B018
        assert init_logger("a.b").name == "a.b"


class TestModels:
    def test_supported_is_what_can_be_enabled(self):
        pipe = Pipe(Net("two_lists"))
        for target in (pipe, pipe.transformer):
            assert BlockAdapterRegister.is_supported(target)
            assert cache_dit.enable_cache(target, DBCacheConfig(Fn_compute_blocks=1)) is target
            cache_dit.disable_cache(target)
        for target in (nn.Linear(2, 2), Pipe(nn.Linear(2, 2)), "QwenImagePipeline", None, BlockAdapterRegister):
            assert not BlockAdapterRegister.is_supported(target)
            assert BlockAdapterRegister.get_adapter(target) is None

    def test_the_adapter_of_one_that_is_registered(self):
        class Registered(Net):
            pass

        @BlockAdapterRegister.register("Registere")
        def registered(pipe, **kwargs):
            blocks = pipe.transformer.blocks
            return BlockAdapter(transformer=pipe.transformer, blocks=blocks, has_separate_cfg=True, **kwargs)

        try:
            model = Registered()
            adapter = cache_dit.get_adapter(model, has_separate_cfg=False)
            assert adapter.blocks is model.blocks
            assert adapter.has_separate_cfg is False
            assert BlockAdapterRegister.get_adapter(model).has_separate_cfg is True
            assert "Registere" in cache_dit.supported_pipelines()[1]
        finally:
            BlockAdapterRegister.unregister("Registere")

    def test_the_adapter_of_one_that_is_not(self):
        model = Net()
        adapter = cache_dit.get_adapter(model)
        assert adapter.transformer is model
        assert cache_dit.enable_cache(adapter, DBCacheConfig(Fn_compute_blocks=1)) is adapter
        cache_dit.disable_cache(model)
        with pytest.raises(TypeError, match="has no field 'block': did you mean 'blocks'"):
            cache_dit.get_adapter(model, block=1)

    def test_those_that_were_tried(self):
        count, names = cache_dit.supported_pipelines()
        assert count == len(names) == len(set(names)) > 80
        assert {"FluxTransformer2DModel", "WanTransformer3DModel"} <= {*names}

    def test_is_cached(self):
        pipe, other = Pipe(Net()), Net()
        adapter = BlockAdapter(transformer=pipe.transformer, auto=True)
        targets = [pipe, pipe.transformer, adapter, [pipe.transformer]]
        assert [BlockAdapter.is_cached(each) for each in targets] == [False] * 4
        cache_dit.enable_cache(pipe, DBCacheConfig(Fn_compute_blocks=1))
        assert [BlockAdapter.is_cached(each) for each in targets] == [True] * 4
        assert not BlockAdapter.is_cached(other)
        assert not BlockAdapter.is_cached([pipe.transformer, other])
        assert not BlockAdapter.is_cached([])
        cache_dit.disable_cache(pipe)
        assert [BlockAdapter.is_cached(each) for each in targets] == [False] * 4
        with dit_cache(other, DitCacheConfig(0, 2)):
            assert BlockAdapter.is_cached(other)


def test_what_is_asked_about_the_version():
    assert cache_dit.__version__ == ".".join(map(str, cache_dit.version_tuple)) == "1.5.3"
    assert f"cache-dit {cache_dit.__version__}" in TEXT
    assert dithooks.__version__ != cache_dit.__version__


def test_settings_of_the_compiler_stay_as_they_are():
    import torch._dynamo.config
    import torch._inductor.config

    before = [vars(config).copy() for config in (torch._dynamo.config, torch._inductor.config)]
    limit = torch._dynamo.config.recompile_limit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache_dit.set_compile_configs()
    with pytest.warns(UserWarning, match="set_compile_configs: cuda_graphs without effect"):
        cache_dit.set_compile_configs(cuda_graphs=True)
    assert [vars(config) for config in (torch._dynamo.config, torch._inductor.config)] == before
    assert torch._dynamo.config.recompile_limit == limit


def test_the_deprecated_name_of_load_configs():
    assert cache_dit.load_options({"max_warmup_steps": 4})["cache_config"] == DBCacheConfig(max_warmup_steps=4)
