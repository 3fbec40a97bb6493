"""A stand-in for the package that LPIPS takes its weights from, made so that distances can be worked out by hand."""

import sys

import torch


def installed(folder, monkeypatch):
    """Put it on the path. Of flat pictures, only red and green count, as directions of (2·red − 1, 2·green − 1).

    Where both are above 0.5, the distance is |difference of the directions in red|² + 2 · |that in green|².
    """
    convolutions = {"1.0": (2, 3, 5), "2.5": (1, 2, 5), "3.9": (1, 1, 3), "4.11": (1, 1, 3), "5.13": (1, 1, 3)}
    weights = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    for layer, (name, (wide, deep, size)) in enumerate(convolutions.items()):
        kernel = torch.zeros(wide, deep, size, size)
        for channel in range(wide):
            kernel[channel, channel, size // 2, size // 2] = 1
        weights |= {f"net.slice{name}.weight": kernel, f"net.slice{name}.bias": torch.zeros(wide)}
        weights[f"lin{layer}.model.1.weight"] = torch.zeros(1, wide, 1, 1)
    weights["lin0.model.1.weight"] = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)
    package = folder / "stand_in" / "stlpips_pytorch"
    (package / "weights" / "vST0.0").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('it is not to be imported')\n")
    torch.save(weights, package / "weights" / "vST0.0" / "alex_shift_tolerant.pth")
    monkeypatch.syspath_prepend(str(package.parent))


def missing(monkeypatch):
    """Leave the package out, also where it is installed."""
    monkeypatch.setitem(sys.modules, "stlpips_pytorch", None)
