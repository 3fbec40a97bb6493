"""msmodelslim's DiT cache under its own names: ``from dithooks.compat.msmodelslim import DitCacheAdaptor, …``.

Written for code that used ``msmodelslim.pytorch.multi_modal.dit_cache`` (version 26.1.0); only the import changes. What
differs is in ``docs/migration.md``.
"""

from .adaptor import DitCacheAdaptor
from .adaptor_configs import DitCacheConfig, DitCacheSearchConfig

__all__ = ["DitCacheAdaptor", "DitCacheConfig", "DitCacheSearchConfig"]
