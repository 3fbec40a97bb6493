"""ComfyUI: nodes that cache the model of a workflow while its sampler draws, and at no other time.

``python -m dithooks.integrations.comfyui path/to/ComfyUI/custom_nodes`` writes the entry that makes ComfyUI load them.
"""

from .node_classes import exports

__all__ = ["exports"]
