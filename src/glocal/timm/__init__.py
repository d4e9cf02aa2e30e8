"""`import glocal.timm`: models of `glocal.list_models()` that timm lacks are there by `timm.create_model`, too.

timm's own names keep their meaning: `timm.create_model("resnet50")` is timm's network, as without this import.
`timm.list_models(module="glocal")` lists what was added. Weights do not come with a name: give
`pretrained_cfg_overlay={"file": PATH}` or `{"hf_hub_id": "owner/name"}` beside `pretrained=True`.
"""

try:
    import timm as timm
except ModuleNotFoundError as error:
    if error.name != "timm":
        raise
    raise ImportError(
        "glocal.timm adds models to timm's, and timm is not installed; run: pip install timm, or build them by "
        "glocal.create_model, which does not need it"
    ) from None

from glocal.timm.glocal import ADDED as ADDED
