"""Names of PyTorch as older releases have them: each is taken away here, as it was missing there."""

import runpy
import sys
import types

import pytest
import torch

from dithooks.environment import accelerators, torch_api
from dithooks.recording.stopwatch import has_timed_events


@pytest.fixture
def older(monkeypatch):
    """Run the file once more without some names of PyTorch."""

    def without(*names, file=torch_api.__file__):
        for name in names:
            owner, _, last = ("torch." + name).rpartition(".")
            module = sys.modules[owner]
            if hasattr(module, last):
                monkeypatch.delattr(module, last)
        return types.SimpleNamespace(**runpy.run_path(file))

    return without


def test_running_out_of_memory_before_2_5(older):
    assert older("OutOfMemoryError").OutOfMemoryError is torch.cuda.OutOfMemoryError


def test_nothing_is_compiled_where_that_cannot_be_asked(older):
    api = older("compiler.is_dynamo_compiling", "compiler.is_exporting")
    assert (api.is_dynamo_compiling(), api.is_exporting()) == (False, False)


class TestAutocastBefore24:
    """Which can't be asked for a device by its name; what it says is another function for each."""

    @pytest.fixture
    def api(self, older, monkeypatch):
        def is_enabled():  # takes no arguments
            return True

        api = older("get_autocast_dtype")
        monkeypatch.setattr(torch, "is_autocast_enabled", is_enabled)
        monkeypatch.setattr(torch, "is_autocast_cpu_enabled", lambda: True)
        monkeypatch.setattr(torch, "get_autocast_cpu_dtype", lambda: torch.bfloat16)
        monkeypatch.setattr(torch, "get_autocast_gpu_dtype", lambda: torch.float16)
        return api

    def test_each_device_has_a_function_of_its_own(self, api, monkeypatch):
        npu = types.SimpleNamespace(is_autocast_enabled=lambda: True, get_autocast_dtype=lambda: torch.float16)
        monkeypatch.setattr(torch, "npu", npu, raising=False)
        found = [api.autocast_dtype(device) for device in ("cpu", "cuda", "npu", "vulkan")]
        assert found == [torch.bfloat16, torch.float16, torch.float16, None]
        npu.is_autocast_enabled = lambda: False
        monkeypatch.setattr(torch, "is_autocast_cpu_enabled", lambda: False)
        assert [api.autocast_dtype(device) for device in ("cpu", "npu")] == [None, None]


def test_autocast_of_devices():
    with torch.autocast("cpu", torch.bfloat16):
        assert torch_api.autocast_dtype("cpu") is torch.bfloat16
    assert torch_api.autocast_dtype("cpu") is None
    assert torch_api.autocast_dtype("vulkan") is None  # has none, which PyTorch raises for


def test_timed_events_before_2_4(monkeypatch):
    monkeypatch.delattr(torch, "Event")
    assert has_timed_events(torch.device("xpu")) is False


def test_the_compilers_own_function_is_used_where_there_is_one():
    assert torch_api.is_dynamo_compiling is torch.compiler.is_dynamo_compiling


class TestAcceleratorsBefore26:
    def plug_in(self, monkeypatch, devices):
        """A module as torch_npu registers it."""
        npu = types.SimpleNamespace(is_available=lambda: devices > 0, device_count=lambda: devices)
        monkeypatch.setattr(torch, "privateuseone", npu, raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        return npu

    def test_a_plug_in_is_found(self, older, monkeypatch):
        npu = self.plug_in(monkeypatch, 3)
        api = older("accelerator", file=accelerators.__file__)
        assert api.current_accelerator() == torch.device("privateuseone")
        assert api.device_count() == 3
        assert api.accelerator_modules(torch.device("privateuseone")) == [npu]

    def test_none(self, older, monkeypatch):
        self.plug_in(monkeypatch, 0)
        api = older("accelerator", file=accelerators.__file__)
        assert api.current_accelerator() is None
        assert api.device_count() == 0


def test_meshes_before_2_2(older, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed.device_mesh", None)  # as if there were no such module
    assert torch_api.mesh_classes() == ()
