"""ComfyUI's node classes, made of the declarations: by its V3 schema, and by the mapping of earlier releases."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .node_declarations import NodeDeclaration, NodeInput, all_nodes
from .plan_folder import register_folder

CATEGORY = "dithooks"
V3_TYPES = {
    "MODEL": "Model",
    "LATENT": "Latent",
    "STRING": "String",
    "FLOAT": "Float",
    "INT": "Int",
    "BOOLEAN": "Boolean",
    "COMBO": "Combo",
}


def exports() -> dict[str, Any]:
    """Return what ComfyUI looks for in a module of custom nodes.

    It is ``comfy_entrypoint`` where there is the V3 schema, else the mappings of class and title.

    Raises:
        ModuleNotFoundError: this is not ComfyUI's Python.
    """
    register_folder()
    try:
        api = import_module("comfy_api.latest")
    except ModuleNotFoundError:
        return {
            "NODE_CLASS_MAPPINGS": {node.id: classic_class(node) for node in all_nodes()},
            "NODE_DISPLAY_NAME_MAPPINGS": {node.id: node.title for node in all_nodes()},
        }

    async def get_node_list(self: Any) -> list[type]:
        return [v3_class(node, api) for node in all_nodes()]

    extension = type("DithooksExtension", (api.ComfyExtension,), {"get_node_list": get_node_list})

    async def comfy_entrypoint() -> Any:
        return extension()

    return {"comfy_entrypoint": comfy_entrypoint}


def v3_class(node: NodeDeclaration, api: Any) -> type:
    """Return a node by the V3 schema.

    Args:
        node: its declaration.
        api: the module ``comfy_api.latest``.
    """

    def typed(kind: str) -> Any:
        return getattr(api.io, V3_TYPES[kind])

    def input_of(each: NodeInput) -> Any:
        choices = {} if each.choices is None else {"options": each.choices()}
        return typed(each.kind).Input(each.name, tooltip=each.tooltip, **each.settings, **choices)

    def define_schema(cls: Any, /) -> Any:
        return api.io.Schema(
            node_id=node.id,
            display_name=node.title,
            category=CATEGORY,
            description=node.description,
            inputs=[input_of(each) for each in node.inputs],
            outputs=[typed(kind).Output(display_name=name) for kind, name in node.outputs],
            is_output_node=node.shows is not None,
        )

    def execute(cls: Any, /, **given: Any) -> Any:
        outputs = node.run(**given)
        shown = None if node.shows is None else {"text": (outputs[node.shows],)}
        return api.io.NodeOutput(*outputs, ui=shown)

    members: dict[str, Any] = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    if (fingerprint := node.fingerprint) is not None:
        members["fingerprint_inputs"] = classmethod(lambda cls, /, **given: fingerprint(**given))
    return type(node.id, (api.io.ComfyNode,), members)


def classic_class(node: NodeDeclaration) -> type:
    """Return a node by the interface of earlier releases."""

    def input_of(each: NodeInput) -> tuple[Any, dict[str, Any]]:
        kind = each.kind if each.choices is None else each.choices()
        return kind, {**each.settings, "tooltip": each.tooltip}

    def input_types(cls: Any, /) -> dict[str, Any]:
        return {"required": {each.name: input_of(each) for each in node.inputs}}

    def run(self: object, **given: Any) -> Any:
        outputs = node.run(**given)
        return outputs if node.shows is None else {"ui": {"text": (outputs[node.shows],)}, "result": outputs}

    members: dict[str, Any] = {
        "INPUT_TYPES": classmethod(input_types),
        "RETURN_TYPES": tuple(kind for kind, _ in node.outputs),
        "RETURN_NAMES": tuple(name for _, name in node.outputs),
        "FUNCTION": "run",
        "CATEGORY": CATEGORY,
        "DESCRIPTION": node.description,
        "OUTPUT_NODE": node.shows is not None,
        "run": run,
    }
    if (fingerprint := node.fingerprint) is not None:
        members["IS_CHANGED"] = classmethod(lambda cls, /, **given: fingerprint(**given))
    return type(node.id, (), members)
