"""Local and global modelling: every operator between convolution and self-attention behind one interface."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from glocal import mixers as mixers
    from glocal import positions as positions
    from glocal.aggregation import Aggregation as Aggregation
    from glocal.aggregation import aggregate as aggregate
    from glocal.aggregation import cat as cat
    from glocal.backbone import Backbone as Backbone
    from glocal.conversion import compare_conversion as compare_conversion
    from glocal.conversion import to_attention as to_attention
    from glocal.conversion import to_convolution as to_convolution
    from glocal.inspection import inspect as inspect
    from glocal.mixer import Cache as Cache
    from glocal.mixer import TokenMixer as TokenMixer
    from glocal.mixer import Unsupported as Unsupported
    from glocal.models import create_model as create_model
    from glocal.models import list_models as list_models
    from glocal.operator import TokenModule as TokenModule
    from glocal.spec import available as available
    from glocal.spec import build as build

# Public name -> the module that defines it, loaded when the name is first used. None: the name is a module.
_PUBLIC = {
    "Aggregation": "glocal.aggregation",
    "Backbone": "glocal.backbone",
    "Cache": "glocal.mixer",
    "TokenMixer": "glocal.mixer",
    "TokenModule": "glocal.operator",
    "Unsupported": "glocal.mixer",
    "aggregate": "glocal.aggregation",
    "available": "glocal.spec",
    "build": "glocal.spec",
    "cat": "glocal.aggregation",
    "compare_conversion": "glocal.conversion",
    "create_model": "glocal.models",
    "inspect": "glocal.inspection",
    "list_models": "glocal.models",
    "mixers": None,
    "positions": None,
    "to_attention": "glocal.conversion",
    "to_convolution": "glocal.conversion",
}

__all__ = ["__version__", *_PUBLIC]

if not TYPE_CHECKING:  # a type checker must see the imports above only, so that it refuses unknown names

    def __getattr__(name):
        if name not in _PUBLIC:
            raise AttributeError(f"module 'glocal' has no attribute {name!r}; public names: {', '.join(_PUBLIC)}")
        module = _PUBLIC[name]
        value = import_module(f"glocal.{name}") if module is None else getattr(import_module(module), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *_PUBLIC})
