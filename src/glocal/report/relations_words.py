"""What the page of relations says of measured properties, in English and in Chinese."""

from collections.abc import Iterable, Mapping, Sequence

_Values = Mapping[object, str]

_PROPERTIES: Mapping[str, Mapping[str, _Values]] = {
    "en": {
        "positions": {
            "itself": "reads its own position only",
            "local": "reads nearby positions",
            "sparse": "reads a few positions, far ones too",
            "global": "reads all positions",
        },
        "channels": {"separable": "keeps channels apart", "dense": "mixes channels"},
        "shared_over_positions": {
            "yes": "one set of weights for all positions",
            "periodically": "weights repeat from window to window",
            "no": "own weights at every position",
        },
        "pattern_over_positions": {
            "yes": "reads the same neighbours everywhere",
            "periodically": "reads in windows",
            "no": "reads different neighbours at different positions",
        },
        "shared_over_channels": {
            "all": "one set of weights for all channels",
            "groups": "one set of weights for each group of channels",
            "no": "own weights for each channel",
        },
        "dynamic": {
            "no": "weights do not change with the input",
            "per image": "weights change with the image",
            "per position": "weights change with the image, at every position in its own way",
        },
        "made_by": {
            "nothing": "no token makes the weights",
            "itself": "the token in its own place makes the weights",
            "some of what it reads": "some of the tokens it reads make the weights",
            "what it reads": "all tokens it reads make the weights",
            "more than it reads": "also tokens it does not read make the weights",
        },
        "low_rank_positions": {True: "low rank over positions", False: "full rank over positions"},
        "low_rank_channels": {True: "low rank over channels", False: "full rank over channels"},
        "keeps_positions": {True: "an output for each position", False: "fewer outputs than positions"},
        "all_matrices": {
            True: "any channel matrix between any two positions",
            False: "few channel matrices for all pairs of positions",
        },
        "frozen": {True: "weights can be held still", False: "weights cannot be told from values"},
    },
    "zh": {
        "positions": {
            "itself": "只读自己的位置",
            "local": "只读附近的位置",
            "sparse": "读少数位置，其中也有远处的",
            "global": "读所有位置",
        },
        "channels": {"separable": "各通道互不相混", "dense": "通道相混"},
        "shared_over_positions": {
            "yes": "所有位置共用一组权重",
            "periodically": "权重逐窗口重复",
            "no": "每个位置各有权重",
        },
        "pattern_over_positions": {
            "yes": "在各处读同样的邻居",
            "periodically": "按窗口读",
            "no": "在各处读不同的邻居",
        },
        "shared_over_channels": {
            "all": "所有通道共用一组权重",
            "groups": "每组通道共用一组权重",
            "no": "每个通道各有权重",
        },
        "dynamic": {
            "no": "权重不随输入改变",
            "per image": "权重随图像改变",
            "per position": "权重随图像改变，且各位置不同",
        },
        "made_by": {
            "nothing": "权重不由任何词元决定",
            "itself": "权重由本位置的词元决定",
            "some of what it reads": "权重由所读词元中的一部分决定",
            "what it reads": "权重由所读的全部词元决定",
            "more than it reads": "权重也由没有读到的词元决定",
        },
        "low_rank_positions": {True: "位置上低秩", False: "位置上满秩"},
        "low_rank_channels": {True: "通道上低秩", False: "通道上满秩"},
        "keeps_positions": {True: "每个位置都有输出", False: "输出的个数少于位置数"},
        "all_matrices": {True: "任意两个位置之间可用任意通道矩阵", False: "所有位置对只用少数通道矩阵"},
        "frozen": {True: "权重可以固定", False: "权重与值分不开"},
    },
}

_SUBJECTS = {
    "en": {
        "positions": "which positions are read",
        "channels": "whether channels mix",
        "shared_over_positions": "sharing over positions",
        "pattern_over_positions": "whether windows repeat",
        "shared_over_channels": "sharing over channels",
        "dynamic": "what the weights change with",
        "made_by": "which tokens make the weights",
        "low_rank_positions": "rank over positions",
        "low_rank_channels": "rank over channels",
    },
    "zh": {
        "positions": "读哪些位置",
        "channels": "通道是否相混",
        "shared_over_positions": "位置间的共享",
        "pattern_over_positions": "窗口是否重复",
        "shared_over_channels": "通道间的共享",
        "dynamic": "权重随什么改变",
        "made_by": "权重由哪些词元决定",
        "low_rank_positions": "位置上的秩",
        "low_rank_channels": "通道上的秩",
    },
}

_CLAIMS = {
    "en": {
        "local": "reads nearby positions instead of all",
        "separable": "no longer mixes channels",
        "dynamic": "weights begin to change with the input",
        "lower rank over positions": "lower rank over positions",
        "lower rank over channels": "lower rank over channels",
        "only other sharing": "nothing but the sharing of weights changes",
    },
    "zh": {
        "local": "由读所有位置变为只读附近",
        "separable": "通道不再相混",
        "dynamic": "权重开始随输入改变",
        "lower rank over positions": "位置上的秩降低",
        "lower rank over channels": "通道上的秩降低",
        "only other sharing": "只有权重的共享方式改变",
    },
}

_LABELS = {
    "en": {
        "language": "English", "in": "in", "out": "out", "inputs": "inputs", "outputs": "outputs",
        "image": "image {}", "or": " or ", "and": "; ", "none": "none",
        "unmeasured": "not measured: one end has no operator",
        "pairs": "{} of {} pairs", "besides": "{} ({} of {})", "sparse": "sparse connection",
        "dynamic": "dynamic weight", "low rank": "low rank", "sharing": "another sharing of weights",
        "positions": "Which positions are connected", "channels": "Which channels are connected",
    },
    "zh": {
        "language": "中文", "in": "输入", "out": "输出", "inputs": "输入", "outputs": "输出",
        "image": "图像 {}", "or": "或", "and": "；", "none": "无", "unmeasured": "未测：有一端没有算子",
        "pairs": "{1} 对中的 {0} 对", "besides": "{0}（{2} 对中的 {1} 对）", "sparse": "稀疏连接",
        "dynamic": "动态权重", "low rank": "低秩", "sharing": "另一种权重共享",
        "positions": "哪些位置相连", "channels": "哪些通道相连",
    },
}  # fmt: skip


class Words:
    """One language.

    Args:
        language: "en" or "zh".
    """

    def __init__(self, language: str) -> None:
        self.language = language

    def __getitem__(self, label: str) -> str:
        """A short label."""
        return _LABELS[self.language][label]

    def demand(self, name: str, allowed: Sequence[object]) -> str:
        """What a node asks of a property."""
        return self["or"].join(_PROPERTIES[self.language][name][value] for value in allowed)

    def demands(self, where: Mapping[str, Sequence[object]]) -> str:
        """All that a node asks; that weights can be held still goes without saying."""
        return self["and"].join(self.demand(name, allowed) for name, allowed in where.items() if name != "frozen")

    def found(self, values: Mapping[str, object]) -> str:
        """What is measured."""
        return self["and"].join(_PROPERTIES[self.language][name][value] for name, value in values.items())

    def claim(self, change: str) -> str:
        """What an edge says."""
        return _CLAIMS[self.language][change]

    def subjects(self, names: Iterable[str]) -> str:
        """Names of properties in words."""
        return self["and"].join(_SUBJECTS[self.language][name] for name in names)

    def besides(self, counts: Mapping[str, int], pairs: int) -> str:
        """What else changes along an edge, and how often."""
        subjects = _SUBJECTS[self.language]
        shown = [self["besides"].format(subjects[name], count, pairs) for name, count in counts.items()]
        return self["and"].join(shown) or "–"


LANGUAGES = (Words("en"), Words("zh"))
