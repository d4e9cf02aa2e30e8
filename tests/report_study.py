"""A made-up study in the form of results.json, for the tests of reports."""

import random

LAYOUTS = ("C-C-C-C", "C-C-C-T", "C-C-T-T", "C-T-T-T", "T-T-T-T")
MEANS = {"recall": (56.2, 62.4, 99.1, 99.6, 94.0), "texture": (91.3, 90.8, 86.4, 79.5, 68.2)}
# a black pixel
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABc3UBGAAAAABJRU5ErkJggg=="
)


def spread(values):
    return {"mean": sum(values) / len(values), "per_seed": values}


def with_interval(values, margin):
    mean = sum(values) / len(values)
    bounds = {"low": mean - margin, "high": mean + margin} if len(values) > 1 else {"low": None, "high": None}
    return {"mean": mean, **bounds, "per_seed": values}


def candidate(
    name, data, mean, i=0, *, fraction=1.0, after=None, width=1.0, without=None, seeds=3, classes=4, epochs=5
):
    """One candidate whose seeds lie around `mean`."""
    noise = random.Random(f"{name} {data} {fraction} {after} {width} {without}")
    accuracies = [min(100.0, mean + noise.gauss(0, 1.5)) for _ in range(seeds)]
    losses = [1.2 - mean / 100 + 0.05 * noise.random() for _ in range(seeds)]
    gaps = [0.05 + 0.04 * i + 0.02 * noise.random() for _ in range(seeds)]
    return {
        "name": name, "data": data, "fraction": fraction, "after": after, "width": width, "without": without,
        "seeds": list(range(seeds)),
        "test_accuracy": with_interval(accuracies, 2.1),
        "difference_to_best": None,
        "train_loss": spread([loss + 0.3 for loss in losses]),
        "fit": {
            "train_loss": spread(losses),
            "test_loss": spread([a + b for a, b in zip(losses, gaps, strict=True)]),
            "gap": spread(gaps),
            "train_accuracy": spread([min(100.0, a + 2) for a in accuracies]),
        },
        "params": 109_224 + 3_211 * i, "macs": round((12_345_678 + 40_000 * i) * width**2), "resized": True,
        "lr": 0.001, "dims": [24, 48, 96, 192], "mlp_ratio": 4.0,
        "images_per_second": (1234.5 - 90 * i) / width, "images_per_second_forward": (3987.6 - 300 * i) / width,
        "seconds_per_epoch": 6.71 + i, "peak_memory": (180 + 31 * i) * 2**20,
        "confusion": [
            [round(mean) if a == b else (100 - round(mean)) // (classes - 1) + (a + b + i) % 3 for b in range(classes)]
            for a in range(classes)
        ],
        "curves": [
            {
                "seed": seed,
                "train_loss": [losses[seed] + 0.3 + 1.3 * 0.5**epoch for epoch in range(1, epochs + 1)],
                "test_accuracy": [25 + (accuracies[seed] - 25) * (1 - 0.4**epoch) for epoch in range(1, epochs + 1)],
            }
            for seed in range(seeds)
        ],
    }  # fmt: skip


def dataset(name, classes=4, hardest=4):
    return {
        "name": name, "train_images": 4000, "test_images": 1000, "classes": [f"class {i}" for i in range(classes)],
        "img_size": [24, 28], "in_chans": 1, "note": "Images were stretched.",
        "recipe": {"epochs": 5, "batch_size": 32, "lr": 0.001},
        "hardest": [
            {"index": 17 + i, "label": "class 0", "loss": 4.56 - 0.3 * i, "right": i / 10, "predicted": "class 1",
             "picture": PICTURE}
            for i in range(hardest)
        ],
    }  # fmt: skip


def verdict(candidates, *, winner=True, **condition):
    """Names the highest mean, or nobody."""
    ranked = sorted(candidates, key=lambda c: -c["test_accuracy"]["mean"])
    best, others = ranked[0], ranked[1:]
    for other in others:
        difference = other["test_accuracy"]["mean"] - best["test_accuracy"]["mean"]
        other["difference_to_best"] = {"mean": difference, "low": difference - 2.5, "high": difference + 2.5}
    name = best["name"]
    said = f"{name} is the best: 5.2 points above {others[0]['name']}." if winner else (
        f"No winner: {name} has the highest mean accuracy, but {others[0]['name']} cannot be told apart from it. "
        "To find differences as large as those seen, about 12 seeds each would be needed."
    )  # fmt: skip
    return {
        "data": best["data"], "fraction": 1.0, "after": None, "width": 1.0, **condition,
        "winner": name if winner else None, "best": name, "sentence": said,
        "seeds_needed": None if winner else 12, "equal_budget": True, "target": 12_345_678,
        "pairs": [
            {"name": other["name"], "difference": other["difference_to_best"]["mean"],
             "low": other["difference_to_best"]["low"], "high": other["difference_to_best"]["high"],
             "p_seeds": 0.0123, "p_images": 0.00001, "p_holm": 0.0246}
            for other in others
        ],
    }  # fmt: skip


def study():
    """Five layouts on two data sets, three seeds."""
    candidates = [
        candidate(name, data, mean, i)
        for data, means in MEANS.items()
        for i, (name, mean) in enumerate(zip(LAYOUTS, means, strict=True))
    ]
    return {
        "glocal": "0.2.0", "torch": "2.11.0", "device": "CPU, one thread a run",
        "data": dataset("recall"), "datasets": [dataset("recall"), dataset("texture")], "recipe": {"epochs": 5},
        "budget": {"of": "macs", "targets": {"recall": 12_345_678, "texture": 12_345_678}},
        "runs": {"finished": 30, "planned": 30},
        "candidates": candidates,
        "verdicts": [verdict(candidates[:5], winner=False), verdict(candidates[5:])],
        "ablations": [],
    }  # fmt: skip


def everything():
    """The same, with data fractions, widths, transfer and ablations."""
    results = study()
    more = results["candidates"]
    for fraction in (0.05, 0.2):
        own = [candidate(n, "recall", m * (0.6 + fraction), i, fraction=fraction)
               for i, (n, m) in enumerate(zip(LAYOUTS, MEANS["recall"], strict=True))]  # fmt: skip
        results["verdicts"].append(verdict(own, fraction=fraction))
        more += own
    for width in (0.5, 2.0):
        more += [candidate(n, "texture", m - 3 / width, i, width=width)
                 for i, (n, m) in enumerate(zip(LAYOUTS, MEANS["texture"], strict=True))]  # fmt: skip
    own = [candidate(n, "texture", m + 1.5 * i, i, after="recall")
           for i, (n, m) in enumerate(zip(LAYOUTS, MEANS["texture"], strict=True))]  # fmt: skip
    results["verdicts"].append(verdict(own, after="recall"))
    more += own
    more += [
        candidate(n, "recall", m - 20, i, without=without)
        for i, (n, m) in enumerate(zip(LAYOUTS, MEANS["recall"], strict=True))
        for without in ("skip", "mlp")
    ]
    results["ablations"] = [
        {"data": "recall", "fraction": 1.0, "width": 1.0, "name": name, "without": without,
         "difference": {"mean": -20.25 + 3 * i, "low": -24.5 + 3 * i, "high": -16.0 + 3 * i}}
        for i, name in enumerate(LAYOUTS) for without in ("skip", "mlp")
    ]  # fmt: skip
    return results
