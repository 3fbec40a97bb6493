"""Pages of documentation as programs: their fenced blocks, and tiny pipelines in the place of those they load."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import diffsynth_pipelines
import diffusers
import pipelines
import pytest
import torch
from models import VideoTransformer

from dithooks import CacheHandle
from dithooks.cli.main import build_parser
from dithooks.errors import UsageError

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\S*)[^\n]*\n(?P<body>.*?)^(?P=indent)``` *$", re.M | re.S)
INERT = {"text", "sh", "json", "yaml"}  # what is not run
GUIDANCE = {"guidance_scale", "true_cfg_scale"}
SIZES = {"height", "width", "num_frames"}  # of what tiny pipelines draw


class Block(NamedTuple):
    """A fenced block: its language, text, line in the page, and whether it stands right behind another."""

    kind: str
    body: str
    line: int
    follows: bool


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found, end = [], -1
    for fence in FENCE.finditer(text):
        body = re.sub(rf"^{fence['indent']}", "", fence["body"], flags=re.M)
        follows = end >= 0 and not text[end : fence.start()].strip()
        found.append(Block(fence["kind"], body, text.count("\n", 0, fence.start()) + 1, follows))
        end = fence.end()
    return found


def commands(text: str) -> list[list[str]]:
    """Every call of ``dithooks`` in the shell blocks of a page, as its words."""
    found: list[list[str]] = []
    for block in blocks(text):
        for line in block.body.replace("\\\n", " ").splitlines() if block.kind == "sh" else ():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set("();<>|&"):
                    found += [words] if words[:1] == ["dithooks"] else []
                    words = []
                else:
                    words.append(word)
    return found


def check_command(words: list[str]) -> None:
    """Parse a call of ``dithooks`` as the command line would; ``--help`` and the like end there."""
    try:
        build_parser().parse_args(words[1:])
    except UsageError as error:
        pytest.fail(f"{words}: {error}")
    except SystemExit as ended:  # --help, --version
        if ended.code:
            pytest.fail(f"{words}: ends with {ended.code}")


def run_page(
    text: str,
    given: dict[str, Any],
    before: Callable[[Block, dict[str, Any]], None] | None = None,
    outputs: bool = True,
) -> dict[str, Any]:
    """Run every Python block of a page, in order and in one namespace, which is returned.

    A text block right behind one of Python is what that prints, unless ``outputs`` are of another model. A cache that a
    page attaches and does not keep, as in a list of ways to call it, is taken off again. ``before`` each block, what it
    needs can be put in its namespace.
    """
    namespace: dict[str, Any] = {"__name__": "__page__", **given}
    printed: str | None = None
    for block in blocks(text):
        if block.kind == "python":
            if before is not None:
                before(block, namespace)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                _execute(block, namespace)
            printed = out.getvalue()
            continue
        assert block.kind in INERT, f"line {block.line}: a block of {block.kind or 'no language'}"
        if outputs and block.follows and block.kind == "text" and printed is not None:
            assert printed == block.body, f"line {block.line}: {printed}"
        printed = None
    for value in namespace.values():
        if isinstance(value, CacheHandle) and value.active:
            value.remove()
    return namespace


def _execute(block: Block, namespace: dict[str, Any]) -> None:
    tree = ast.parse(block.body)
    ast.increment_lineno(tree, block.line)
    for statement in tree.body:
        if isinstance(statement, ast.Expr):
            value = eval(compile(ast.Expression(statement.value), "page", "eval"), namespace)
            if isinstance(value, CacheHandle):
                value.remove()
        else:
            exec(compile(ast.Module([statement], []), "page", "exec"), namespace)


def _sd3() -> pipelines.Built:
    """With as many blocks as SD3 medium."""
    transformer = pipelines.part("SD3Transformer2DModel", num_layers=24, **pipelines.SD3)
    pipe, call = pipelines.sd3()
    pipe.register_modules(transformer=transformer)
    return pipe, call


BUILDERS = {
    "FluxPipeline": pipelines.flux,
    "WanPipeline": lambda: pipelines.wan(2),
    "QwenImagePipeline": pipelines.qwen_image,
    "HunyuanVideoPipeline": pipelines.hunyuan_video,
    "StableDiffusion3Pipeline": _sd3,
}


def tiny(name: str) -> Any:
    """A pipeline of that class, small and random, called as the real one is: by prompts, and at its own size."""
    built, call = BUILDERS[name]()
    kind = getattr(diffusers, name)
    takes = set(inspect.signature(kind.__call__).parameters)

    class Tiny(kind):
        def to(self, *args: Any, **kwargs: Any) -> Any:  # there is one device
            return self

        def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
            assert not any(block._forward_hooks for block in self.transformer.modules()), "the cache is attached"

        def __call__(self, prompt: str | list[str], **given: Any) -> Any:
            assert set(given) <= takes, f"{name} takes no {set(given) - takes}"
            many = 1 if isinstance(prompt, str) else len(prompt)
            own = {key: value for key, value in call.items() if key not in GUIDANCE}
            own = {key: _repeated(value, many) for key, value in own.items()}
            given = {key: value for key, value in given.items() if key not in {"negative_prompt", *SIZES}}
            return super().__call__(**{**own, **given})

    built.__class__ = Tiny  # and not a copy, whose parts would have to be registered anew
    Tiny.__name__ = Tiny.__qualname__ = name
    built.set_progress_bar_config(disable=True)
    return built


def _repeated(value: Any, many: int) -> Any:
    return value.repeat_interleave(many, 0) if isinstance(value, torch.Tensor) else value


class OpenSora(VideoTransformer):
    """Open-Sora Plan's shape under its name."""

    @classmethod
    def from_pretrained(cls, path: str) -> OpenSora:
        assert path
        return cls()

    def to(self, *args: Any, **kwargs: Any) -> OpenSora:
        return self


class OpenSoraPipeline:
    """Open-Sora Plan's pipeline in small: guidance by one batch, and a video of whole numbers as ``images``."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.transformer, self.scheduler = transformer, diffusers.FlowMatchEulerDiscreteScheduler()

    @torch.no_grad()
    def __call__(self, prompt: str, num_frames: int, height: int, width: int, num_inference_steps: int) -> Any:
        noise, mask, given, none = inputs()
        text = {name: torch.cat([none[name], given[name]]) for name in given}
        self.scheduler.set_timesteps(num_inference_steps)
        latents = noise
        for t in self.scheduler.timesteps:
            both, time = torch.cat([latents] * 2), t.expand(2)
            out = self.transformer(both, time, attention_mask=mask.repeat(2, 1, 1, 1), **text, return_dict=False)[0]
            away, towards = out.chunk(2)
            latents = self.scheduler.step(away + 4.0 * (towards - away), t, latents, return_dict=False)[0]
        video = ((latents[:, :3] / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 4, 1)
        return SimpleNamespace(images=video, videos=video)


class StagedTransformer(VideoTransformer):
    """The same in stages: a list of lists."""

    def __init__(self) -> None:
        super().__init__(depth=20)
        counts, listed = (2, 4, 8, 4, 2), iter(self.transformer_blocks)
        self.transformer_blocks = Stages(torch.nn.ModuleList(next(listed) for _ in range(count)) for count in counts)


class Stages(torch.nn.ModuleList):
    """Lists of blocks, run one after the other."""

    def __iter__(self) -> Iterator[torch.nn.Module]:
        return (block for stage in super().__iter__() for block in stage)


class WanVideoPipeline(diffsynth_pipelines.Pipeline):
    """DiffSynth-Studio's pipeline of Wan 2.2, in small."""

    @classmethod
    def from_pretrained(cls, torch_dtype: torch.dtype, device: str, model_configs: list[Any]) -> WanVideoPipeline:
        assert len(model_configs) == 4
        return cls(experts=2)

    def __call__(self, prompt: str, negative_prompt: str = "", seed: int = 0, num_inference_steps: int = 50) -> Any:
        return super().__call__(num_inference_steps, boundary=660)  # 17 of 40 steps, as of Wan 2.2


def make_pipeline(version: str = "1.2") -> OpenSoraPipeline:
    """A pipeline as Open-Sora Plan's scripts build it."""
    return OpenSoraPipeline(StagedTransformer() if version == "1.5" else VideoTransformer())


def inputs() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Latents and their mask for it, and two texts."""
    made = torch.Generator().manual_seed(0)
    noise, *texts = (torch.randn(shape, generator=made) for shape in ((1, 4, 3, 8, 8), (1, 5, 16), (1, 5, 16)))
    given, none = ({"encoder_hidden_states": text, "encoder_attention_mask": torch.ones(1, 5)} for text in texts)
    return noise, torch.ones(1, 3, 8, 8), given, none


@contextlib.contextmanager
def stand_ins(loaded: list[str]) -> Iterator[None]:
    """Tiny pipelines for all that is loaded by name, an ``opensora`` to import, and ``compile`` without a compiler.

    Names of what was loaded go to ``loaded``. Pipelines in folders (the one that ships) are loaded as ever.
    """
    real = diffusers.DiffusionPipeline.from_pretrained.__func__
    compiles = torch.nn.Module.compile

    def from_pretrained(cls: type, name: Any, **options: Any) -> Any:
        if Path(name).is_dir():
            return real(cls, name, **options)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", name), name
        assert isinstance(options.get("torch_dtype"), torch.dtype), options
        loaded.append(f"{cls.__name__} {name}")
        return tiny(cls.__name__)

    packages = ["opensora", "models", "diffusion", "opensora_v1_3", "modeling_opensora"]
    modules = {".".join(packages[: n + 1]): ModuleType(".".join(packages[: n + 1])) for n in range(len(packages))}
    for module in modules.values():
        module.__path__ = []
    modules[".".join(packages)].OpenSoraT2V_v1_3 = OpenSora
    names = ["diffsynth", "diffsynth.pipelines", "diffsynth.pipelines.wan_video"]
    for name in names:
        modules[name] = ModuleType(name)
        modules[name].__path__ = []
    modules[names[-1]].WanVideoPipeline, modules[names[-1]].ModelConfig = WanVideoPipeline, dict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
        patch.setattr(torch.nn.Module, "compile", lambda self, **given: compiles(self, **given, backend="eager"))
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield
