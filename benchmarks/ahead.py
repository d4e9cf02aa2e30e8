"""What calls compile, compiled before anything is timed, by several processes at a time, for the caches on disk.

Triton's kernels take a second or two in each of a few configurations, a network under torch.compile a minute: one after
the other that is most of the time that a benchmark has on a GPU.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from multiprocessing import get_context

MOST = 6  # configurations of a kernel


def compile_ahead(work: Callable[[str], None], names: Sequence[str], processes: int) -> None:
    """Calls `work`, a function of a module or a partial of one, with each of the names. What fails is said, no more."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(work, name): name for name in names}
        for done in as_completed(running):
            if (why := done.exception()) is not None:
                print(f"{running[done]}, compiled ahead: {type(why).__name__}: {why}".splitlines()[0], flush=True)


def spare_cores() -> int:
    return max((os.cpu_count() or 1) - 2, 1)


def every_configuration(run: Callable[[], object]) -> None:
    """Runs a call with each configuration that its kernels of Triton have. None is timed, none is chosen for later.

    One that cannot be launched is left out, as it is where they are timed.
    """
    from glocal.kernels.triton import tuning

    chosen = tuning._choice
    try:
        for number in range(MOST):
            tuning._choice = lambda _, __, configurations, *___, n=number: min(n, len(configurations) - 1)
            with suppress(Exception):
                run()
    finally:
        tuning._choice = chosen
