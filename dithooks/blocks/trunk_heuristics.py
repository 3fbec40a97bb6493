"""Which lists of a model are its trunk, guessed before it runs: by their contents, weight and names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from .module_paths import denoisers_among, is_called_other

LIGHT = 8  # lists below 1/8 of the heaviest list's parameters are no trunk: refiners have 1/13 or less

# Parts of the names of lists that prepare inputs or steer, whatever their weight.
SIDE_NAMES = {
    "refiner": "a refiner",
    "text": "for the text",
    "txt": "for the text",
    "context": "for the text",
    "caption": "for the text",
    "control": "a ControlNet",
    "controlnet": "a ControlNet",
    "vace": "a ControlNet",
    "adapter": "an adapter",
    "perceiver": "an adapter",
}

# Of two parts of a model whose lists differ less than by this factor, the name decides which one denoises.
CLOSE = 2

# Words in the names of parts that encode what the denoiser is conditioned on.
CONDITIONS = {*SIDE_NAMES, "cond", "condition", "conditioner", "conditioning", "encoder", "encoders", "prompt"}


@dataclass(frozen=True)
class FoundList:
    """A list of modules found in a model.

    Args:
        path: from the model that was searched.
        blocks: the list.
        parameters: number of its parameters.
        apart: why the list is not part of the trunk; empty if it is.
    """

    path: str
    blocks: nn.ModuleList
    parameters: int
    apart: str = ""


@dataclass(frozen=True)
class Owner:
    """A module that calls lists of blocks, with these lists: the trunk and others.

    Args:
        path: from the model that was searched.
        module: the module.
        lists: its lists, and those of other parts of the model.
        rivals: other parts that may be the denoiser as well, by all that is known before they are called.
    """

    path: str
    module: nn.Module
    lists: tuple[FoundList, ...]
    rivals: tuple[Owner, ...] = ()

    @property
    def trunk(self) -> tuple[FoundList, ...]:
        return tuple(listed for listed in self.lists if not listed.apart)

    def below(self, prefix: str) -> Owner:
        """Return this owner with paths that start further above."""
        if not prefix:
            return self
        lists = tuple(replace(listed, path=f"{prefix}.{listed.path}") for listed in self.lists)
        rivals = tuple(rival.below(prefix) for rival in self.rivals)
        return Owner(f"{prefix}.{self.path}".rstrip("."), self.module, lists, rivals)


def find_owners(model: nn.Module, chosen: Collection[str] = ()) -> list[Owner]:
    """Find the modules that call the long lists of a model: as a rule one, the model itself or a part of it.

    Several are returned only if they have one class and one size, as experts do; none if there is no list.

    Args:
        model: the model.
        chosen: paths of parts that are preferred to others that may denoise as well.
    """
    held: dict[str, list[tuple[str, nn.ModuleList]]] = {}
    for owner, path, blocks in _lists(model, ""):
        held.setdefault(owner, []).append((path, blocks))
    anything = not any(_made_of_modules(blocks) for lists in held.values() for _, blocks in lists)
    weights = {
        owner: sum(_weight(blocks) for _, blocks in lists if anything or _made_of_modules(blocks))
        for owner, lists in held.items()
    }
    heaviest = max(weights.values(), default=0)
    if not heaviest:
        return []
    outer = _outermost([owner for owner, weight in weights.items() if weight * LIGHT >= heaviest], weights)
    path = next((each for each in outer if each in chosen), outer[0])
    modules = dict(model.named_modules())
    alike = [
        owner
        for owner in held
        if type(modules[owner]) is type(modules[path])
        and weights[owner] == weights[path]
        and _depth(owner) == _depth(path)
    ]
    found = []
    for owner in [*alike, *(each for each in outer if each not in alike and len(alike) == 1)]:
        others = [item for other, lists in held.items() if other != owner for item in lists]
        lists = _sorted_out(owner, held[owner], others if len(alike) == 1 else [], anything)
        found.append(Owner(owner, modules[owner], lists))
    return found if len(alike) > 1 else [replace(found[0], rivals=tuple(found[1:]))]


def _outermost(owners: Sequence[str], weights: Mapping[str, int]) -> list[str]:
    """Return the modules that are in no other one of them, the likeliest denoiser first: by weight, then by name."""
    outer = [path for path in owners if not any(path != other and _is_in(path, other) for other in owners)]
    most = max(weights[path] for path in outer)
    return sorted(outer, key=lambda path: (weights[path] * CLOSE < most, not _denoises(path), -weights[path]))


def _is_in(path: str, outer: str) -> bool:
    """Return whether a module is another one, or part of it."""
    return path == outer or not outer or path.startswith(f"{outer}.")


def _denoises(path: str) -> bool:
    """Return whether a module is called like a denoiser rather than an encoder of conditions."""
    words = path.replace(".", "_").split("_")
    return not any(word in CONDITIONS for word in words)


def _sorted_out(
    owner: str,
    lists: list[tuple[str, nn.ModuleList]],
    others: list[tuple[str, nn.ModuleList]],
    anything: bool,
) -> tuple[FoundList, ...]:
    """Divide the lists of a module into trunk and others, the latter with a reason."""
    weights = {path: _weight(blocks) for path, blocks in lists if anything or _made_of_modules(blocks)}
    heaviest = max(weights.values())
    unnamed = max((weight for path, weight in weights.items() if not _side(path, owner)), default=0)
    if unnamed * LIGHT >= heaviest:
        heaviest = unnamed
    found = []
    for path, blocks in lists:
        weight, reason = _weight(blocks), ""
        if path not in weights:
            kind = type(next(iter(blocks)))
            reason = f"single layers ({kind.__name__}), no blocks"
            if kind is nn.ModuleDict:
                reason = "dicts of modules, called part by part"
        elif unnamed * LIGHT >= heaviest and (side := _side(path, owner)):
            reason = side
        elif weight * LIGHT < heaviest:
            reason = f"{weight / heaviest:.1%} of the parameters of the heaviest list"
        found.append(FoundList(path, blocks, weight, reason))
    for path, blocks in others:
        found.append(FoundList(path, blocks, _weight(blocks), "in a part of the model that is called by itself"))
    return tuple(found)


def _lists(module: nn.Module, path: str, owner: str = "") -> list[tuple[str, str, nn.ModuleList]]:
    """List owner, path and list below a module, without lists inside blocks; an owner is itself called.

    A module without lists of its own is taken for a pipeline, whose components are distinguished by name and class.
    """
    found: list[tuple[str, tuple[str, str, nn.ModuleList]]] = []  # each with the child that it is in
    for name, child in module.named_children():
        here = f"{path}.{name}".lstrip(".")
        nested = isinstance(child, nn.ModuleList) and all(isinstance(entry, nn.ModuleList) for entry in child)
        if isinstance(child, nn.ModuleList) and not nested and not _holds_models(child):
            found.append((name, (owner, here, child)))
        else:
            container = isinstance(child, (nn.ModuleList, nn.ModuleDict))
            found += [(name, item) for item in _lists(child, here, owner if container else here)]
    parts = {name: module._modules[name] for name, item in found if item[0] != owner}
    components = {name: part for name, part in parts.items() if part is not None}
    denoising = denoisers_among(components) or components
    if any(item[0] == owner for _, item in found):
        denoising = {name: part for name, part in components.items() if not is_called_other(name)}
    return [item for name, item in found if item[0] == owner or name in denoising]


def _holds_models(blocks: nn.ModuleList) -> bool:
    """Whether the entries of a list are models with block lists of their own, such as two experts."""
    inner = [
        max((len(child) for child in entry.children() if isinstance(child, nn.ModuleList)), default=0)
        for entry in blocks
    ]
    return len(blocks) < 4 and min(inner) > len(blocks)


def _made_of_modules(blocks: nn.ModuleList) -> bool:
    """Whether the entries of a list are made of modules, rather than single layers, and have parameters."""
    made = all(any(True for _ in entry.children()) and type(entry) is not nn.ModuleDict for entry in blocks)
    return made and any(True for _ in blocks.parameters())


def _weight(blocks: nn.ModuleList) -> int:
    """Count parameters, plus one per entry, so that lists without parameters differ as well."""
    return len(blocks) + sum(parameter.numel() for parameter in blocks.parameters())


def _side(name: str, owner: str) -> str:
    """Explain by its name why a list prepares or steers; empty if the name does not show that."""
    words = name.removeprefix(owner).replace(".", "_").split("_")
    word = next((word for word in words if word in SIDE_NAMES), None)
    return "" if word is None else f"named as {SIDE_NAMES[word]}"


def _depth(path: str) -> int:
    return path.count(".") + 1 if path else 0
