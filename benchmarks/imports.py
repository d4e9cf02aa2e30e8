"""What importing costs: torch, then glocal on top, in fresh processes one after the other; the best of five each.

python benchmarks/imports.py
"""

import subprocess
import sys
import time

CODES = {
    "import torch": "import torch",
    "import torch, glocal": "import torch, glocal",
    "every operator": "import torch, glocal; glocal.build",
}


def seconds(code: str) -> float:
    """Wall time of a process that does nothing else."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    best = dict.fromkeys(CODES, float("inf"))
    for _ in range(5):  # interleaved, so that a busy moment meets all of them
        for name, code in CODES.items():
            best[name] = min(best[name], seconds(code))
    for name, took in best.items():
        print(f"{name}: {took:.2f} s ({took - best['import torch']:+.2f})")
