"""What a report reads out of `results.json`: conditions, their candidates, their verdicts, and values as text.

A study may be incomplete, and results of an earlier version lack some keys; whatever is missing is None here.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from glocal.report.drawing import Series, compact, drawable, series_of

Candidate = dict[str, Any]


@dataclass(frozen=True)
class Condition:
    """What candidates are compared under: the same data, share of them, data before them and width."""

    data: str
    fraction: float = 1.0
    after: str | None = None
    width: float = 1.0


@dataclass
class Study:
    """A results dict, arranged.

    Args:
        results: What `results.json` holds.
    """

    results: dict[str, Any]
    names: list[str] = field(init=False)
    datasets: dict[str, dict[str, Any]] = field(init=False)
    candidates: dict[Condition, list[Candidate]] = field(init=False)

    def __post_init__(self) -> None:
        """Groups the candidates by condition, in the order of the file."""
        everyone = self.results.get("candidates") or []
        self.names = list(dict.fromkeys(candidate["name"] for candidate in everyone))
        datasets = self.results.get("datasets")
        if not datasets:
            datasets = [{**self.results.get("data", {}), "recipe": self.results.get("recipe", {})}]
        self.datasets = {str(dataset.get("name", "data")): dataset for dataset in datasets}
        self.candidates = {}
        for candidate in everyone:
            if candidate.get("without") is None:
                self.candidates.setdefault(condition_of(candidate), []).append(candidate)

    def series(self, name: str) -> Series:
        """How a candidate looks in every picture."""
        return series_of(self.names.index(name), len(self.names)) if name in self.names else Series(0)

    def verdict(self, condition: Condition) -> dict[str, Any] | None:
        """What was concluded under a condition."""
        verdicts = self.results.get("verdicts") or []
        return next((verdict for verdict in verdicts if condition_of(verdict) == condition), None)

    def scratch(self) -> list[Condition]:
        """Conditions without data before them, at the reference width; of each data set, those with most data first."""
        found = [c for c in self.candidates if c.after is None and c.width == self.reference_width(c.data)]
        order = list(dict.fromkeys(c.data for c in found))
        return sorted(found, key=lambda c: (order.index(c.data), -c.fraction))

    def main(self) -> list[Condition]:
        """One condition for each data set: all of the data, or the most of it."""
        return list({c.data: c for c in reversed(self.scratch())}.values())[::-1]

    def reference_width(self, data: str) -> float:
        """The width that other widths are multiples of; where it was not measured, the nearest one."""
        widths = {c.width for c in self.candidates if c.data == data and c.after is None}
        return min(widths, key=lambda width: abs(math.log(width)) if width > 0 else math.inf, default=1.0)

    def everyone(self) -> list[Candidate]:
        """All candidates, those with a part removed left out."""
        return [candidate for own in self.candidates.values() for candidate in own]

    def ranked(self, condition: Condition) -> list[Candidate]:
        """A condition's candidates with a measured accuracy, the best first."""
        measured = [c for c in self.candidates[condition] if drawable(at(c, "test_accuracy", "mean"))]
        return sorted(measured, key=mean_of, reverse=True)

    def same(self, condition: Condition) -> list[Condition]:
        """The conditions of all widths with this data and share of it, and nothing before it."""
        return [
            c for c in self.candidates if (c.data, c.fraction, c.after) == (condition.data, condition.fraction, None)
        ]

    def label(self, data: str) -> str:
        """A data set's name in titles: of a path its last part, where no other one ends so."""
        last = [name.rstrip("/").rpartition("/")[2] for name in (data, *self.datasets)]
        alike = {name for name, end in zip(self.datasets, last[1:], strict=True) if end == last[0]} | {data}
        return last[0] if last[0] and len(alike) == 1 else data

    def title(self, condition: Condition) -> str:
        """A condition in words; what all conditions share is left out."""
        words = [self.label(condition.data)]
        if condition.fraction != 1 or len({c.fraction for c in self.candidates if c.data == condition.data}) > 1:
            share = "all" if condition.fraction == 1 else f"{100 * condition.fraction:.3g} %"
            words.append(f"{share} of the training images")
        if condition.after is not None:
            words.append(f"after {self.label(condition.after)}")
        if condition.width != 1:
            words.append(f"width {condition.width:g}")
        return ", ".join(words)

    def train_images(self, condition: Condition) -> float | None:
        """How many images were trained on."""
        count = self.datasets.get(condition.data, {}).get("train_images")
        return None if count is None else condition.fraction * count


def condition_of(entry: dict[str, Any]) -> Condition:
    """The condition that a candidate, verdict or ablation belongs to."""
    return Condition(
        str(entry.get("data", "data")),
        float(entry.get("fraction", 1.0)),
        entry.get("after"),
        float(entry.get("width", 1.0)),
    )


def at(entry: Any, *keys: str) -> Any:
    """`entry[key][key]...`, or None where something on the way is missing."""
    for key in keys:
        if not isinstance(entry, dict):
            return None
        entry = entry.get(key)
    return entry


def seeds_of(entry: Any, *keys: str) -> list[float | None]:
    """The values of every seed."""
    values = at(entry, *keys, "per_seed")
    return list(values) if isinstance(values, list | tuple) else []


def mean_of(candidate: Candidate) -> float:
    """The mean accuracy of a candidate that has one."""
    return candidate["test_accuracy"]["mean"]


def count(n: int, what: str) -> str:
    """So many of something."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def half_width(entry: Any) -> float | None:
    """How far an interval reaches from its mean, or None where there is none. One side may be cut at 0 or 100."""
    mean, low, high = at(entry, "mean"), at(entry, "low"), at(entry, "high")
    if any(value is None or not drawable(value) for value in (mean, low, high)):
        return None
    return max(high - mean, mean - low)


def number(value: float | None, decimals: int = 1, *, sign: bool = False) -> str:
    """A value as text; a dash where there is none."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value != 0 and abs(value) >= 1e7:
        return f"{value:.2e}"
    shown = f"{value:{'+' if sign else ''},.{decimals}f}"
    return shown.replace("-", "−") if float(shown.replace(",", "")) != 0 else f"{0:.{decimals}f}"


def with_interval(entry: Any, decimals: int = 1, *, sign: bool = False) -> str:
    """mean [low, high]."""
    mean, low, high = (at(entry, key) for key in ("mean", "low", "high"))
    shown = number(mean, decimals, sign=sign)
    if low is None or high is None:
        return shown
    return f"{shown} [{number(low, decimals, sign=sign)}, {number(high, decimals, sign=sign)}]"


def whole(value: float | None) -> str:
    """A count as text, with separators of thousands."""
    return "–" if value is None else number(value, 0) if not math.isfinite(value) else f"{value:,.0f}"


def amount(value: float | None) -> str:
    """A large count as text, of three digits: 12.3 M."""
    if value is None or not math.isfinite(value):
        return number(value)
    shown = compact(value, "#.3g")
    return f"{shown[:-1].rstrip('.')} {shown[-1]}" if shown[-1].isalpha() else shown.rstrip(".")


def memory(value: float | None) -> str:
    """Bytes as text."""
    return "–" if value is None else f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def decimals_for(values: list[float | None]) -> int:
    """Decimals at which accuracies of this spread are told apart: one, or two where all lie within a point."""
    known = [value for value in values if value is not None and drawable(value)]
    return 2 if known and 0 < max(known) - min(known) < 1 else 1
