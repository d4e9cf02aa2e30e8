"""The page in which one chooses a query and sees what every layer and head reads at it."""

import base64
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from markupsafe import Markup

from glocal.report.page import render

# in the order in which they need each other; the last one starts
SCRIPTS = ("explorer_numbers.js", "explorer_drawing.js", "explorer_controls.js", "explorer.js")


@dataclass(frozen=True)
class Picture:
    """An image that the model was shown.

    Args:
        name: Such as the name of its file.
        file: The pixels that the model saw, as a PNG or a JPEG file.
        note: What is known of it, such as the class that was predicted; may be empty.
    """

    name: str
    file: bytes
    note: str = ""


def explorer(
    title: str,
    pictures: Sequence[Picture],
    layers: Sequence[Any],
    *,
    notes: Sequence[str] = (),
    refused: dict[str, str] | None = None,
    epochs: Sequence[dict[str, Any]] = (),
) -> str:
    """The page as one HTML file that needs nothing else.

    Args:
        title: What the model is called.
        pictures: What it was shown.
        layers: For every call a `Map` of glocal.analysis.maps; where one has a list with an entry for each image,
            they are in the order of the pictures.
        notes: Sentences about the model, such as that its weights are random.
        refused: Why a layer is missing, by its name.
        epochs: Where heads were during training, {"epoch": number, "layers": {name: {"centers", "precision"}}}.
    """
    blocks, folder = _Blocks(), files("glocal.report")
    ellipses = any(layer.centers is not None for layer in layers)
    epochs = epochs if ellipses else ()
    about = {
        "title": title,
        "pictures": [
            {"name": p.name, "note": p.note, "src": f"data:{_kind(p.file)};base64,{base64.b64encode(p.file).decode()}"}
            for p in pictures
        ],
        "layers": [_layer(layer, blocks) for layer in layers],
        "epochs": blocks.text(json.dumps([_rounded(epoch) for epoch in epochs])) if epochs else None,
    }
    return render(
        "explorer.html",
        title=title,
        notes=list(notes),
        kernels=[layer.name for layer in layers if layer.kernel],
        mixtures=[layer.name for layer in layers if layer.kind == "mixture"],
        refused=refused or {},
        worst=max(layer.error for layer in layers),
        sampled=[(layer.name, layer.stride) for layer in layers if layer.stride > 1],
        offsets=[layer.name for layer in layers if "unary share" in layer.shares],
        about=Markup(_for_script(json.dumps(about))),
        blocks=[Markup(text) for text in blocks.texts],
        script=Markup("\n".join(folder.joinpath(name).read_text("utf-8") for name in SCRIPTS)),
        ellipses=ellipses,
        epochs=len(epochs),
    )


class _Blocks:
    """Numbers, compressed, each a text of its own that the page reads when it needs it."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def text(self, text: str) -> int:
        return self._add(text.encode())

    def array(self, values: np.ndarray) -> dict[str, Any]:
        kept = values.astype(values.dtype.newbyteorder("<"))
        return {"block": self._add(kept.tobytes()), "type": kept.dtype.str[1:], "shape": list(kept.shape)}

    def _add(self, content: bytes) -> int:
        # codes repeat little: where nothing is to be found, looking for repetitions costs a few percent
        packed = [zlib.compressobj(6, strategy=how) for how in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY)]
        self.texts.append(base64.b64encode(min((p.compress(content) + p.flush() for p in packed), key=len)).decode())
        return len(self.texts) - 1


def _kind(file: bytes) -> str:
    return "image/png" if file.startswith(b"\x89PNG") else "image/jpeg"


def _layer(layer: Any, blocks: _Blocks) -> dict[str, Any]:
    def coded(rows: Iterable[Any]) -> list[dict[str, Any]]:
        return [{"codes": blocks.array(each.codes), "scales": blocks.array(each.scales)} for each in rows]

    def index(values: np.ndarray) -> np.ndarray:
        return values.astype(np.int16) if values.max(initial=0) < 2**15 else values

    places = {
        side: {"prefix": where.prefix, "grid": where.grid, "origin": where.origin, "step": where.step}
        for side, where in (("queries", layer.queries), ("sources", layer.sources))
    }
    own = ("name", "operator", "error", "heads", "stride", "kind", "terms", "distance", "entropy", "shares")
    return {
        **{name: getattr(layer, name) for name in own},
        **places,
        "rows": coded(layer.rows),
        "table": coded(layer.table),
        "index": [blocks.array(index(each)) for each in layer.index],
        "ellipses": None
        if layer.centers is None
        else _rounded({"centers": layer.centers.tolist(), "precision": layer.precision.tolist()}),
    }


def _rounded(value: Any) -> Any:
    """The same with five digits of each number."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def _for_script(text: str) -> str:
    """JSON in which nothing can end the element that holds it."""
    return text.replace("<", "\\u003c")
