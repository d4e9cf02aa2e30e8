"""C code that is compiled on demand: found again, never half written, and done without where it cannot be."""

import mmap
import os
import stat
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from glocal.kernels import compiled, local_sum

SCRIPT = """
    import sys, time, torch
    from glocal.kernels import compiled, local_sum
    x, w = torch.randn(1, 6, 5, 8), torch.randn(1, 1, 1, 8, 49)
    y = local_sum(x, w)
    expected = torch.nn.functional.conv2d(x.movedim(-1, 1), w.view(8, 1, 7, 7), padding=3, groups=8).movedim(1, -1)
    torch.testing.assert_close(y, expected)
    print(compiled.unavailable() or compiled._load("local_sum.c", torch.float32, (
        ("DILATION", 1), ("KH", 7), ("KW", 7), ("SHARED", 1), ("SUM", 1))))
"""


def start(cache, **environment):
    environment = {**os.environ, "GLOCAL_CACHE": str(cache), **environment}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(process):
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out.strip()


needs_compiler = pytest.mark.skipif(compiled.unavailable() is not None, reason=str(compiled.unavailable()))


@needs_compiler
def test_processes_that_start_together_build_one_library(tmp_path):
    processes = [start(tmp_path) for _ in range(4)]
    assert all("CDLL" in said(p) for p in processes)
    files = sorted(f.name for f in (tmp_path / "kernels").iterdir())
    assert len(files) == 1 and files[0].startswith("local_sum-") and files[0].endswith(".so")
    built = (tmp_path / "kernels" / files[0]).stat().st_mtime_ns
    assert "CDLL" in said(start(tmp_path))
    assert (tmp_path / "kernels" / files[0]).stat().st_mtime_ns == built  # and it is found again


@needs_compiler
def test_what_is_prepared_is_built_once_and_waited_for(monkeypatch):
    built = []

    def find(source, dtype, sizes):
        built.append(sizes)
        time.sleep(0.3)
        return sys

    monkeypatch.setattr(compiled, "_find", find)
    monkeypatch.setattr(compiled, "_found", {})
    monkeypatch.setattr(compiled, "_locks", {})
    for _ in range(3):
        compiled.prepare("local_sum.c", torch.float32, K=3)
    assert compiled.load("local_sum.c", torch.float32, K=3) is sys
    compiled.prepare("local_sum.c", torch.float32, K=3)
    assert built == [(("K", 3),)]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CC": "/nowhere/cc"}, "the C compiler that CC names, /nowhere/cc, was not found"),
        ({"GLOCAL_KERNELS": "eager"}, "GLOCAL_KERNELS=eager is set"),
        ({"CC": "false"}, "the C compiler failed: exit status 1"),
    ],
)
def test_without_a_compiler_the_result_is_the_same(tmp_path, environment, reason):
    assert said(start(tmp_path, **environment)) == reason
    assert list(tmp_path.rglob("*.so")) == []


@needs_compiler
def test_what_the_compiler_says_is_told(tmp_path):
    assert "-mno-such-machine" in said(start(tmp_path, GLOCAL_CFLAGS="-mno-such-machine"))


@needs_compiler
def test_flags_of_another_machine_are_another_library(tmp_path):
    said(start(tmp_path))
    said(start(tmp_path, GLOCAL_CFLAGS="-O1"))
    assert len(list((tmp_path / "kernels").iterdir())) == 2


@needs_compiler
def test_a_broken_library_is_said_and_done_without(tmp_path):
    said(start(tmp_path))
    (library,) = (tmp_path / "kernels").iterdir()
    library.write_bytes(b"not a library")
    assert said(start(tmp_path)).startswith("a compiled kernel could not be loaded")


@needs_compiler
def test_a_cache_that_cannot_be_written_to_is_replaced(tmp_path):
    """By a folder of the process itself: what others may write to is never loaded."""
    (tmp_path / "file").write_text("")
    assert "glocal-kernels-" in said(start(tmp_path / "file"))


def test_the_cache_is_the_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOCAL_CACHE", str(tmp_path))
    folder = compiled.folder.__wrapped__()
    assert folder == tmp_path / "kernels" and stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)  # anybody could put a library there
    assert compiled.folder.__wrapped__() != folder


HALVES = """
    import torch
    from glocal.kernels import compiled, local_sum
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    factors = torch.tensor([1, -1, 1 / 3, 6e-5, 7e-8, 1e-3, 1.0009765625, 1500], dtype=torch.float16)
    for channels in (8, 5):  # in whole vectors and one by one
        x, w = every.view(1, -1, 1).expand(-1, -1, channels).contiguous(), factors[:channels].view(1, 1, channels, 1)
        expected = (x.double() * w.flatten().double()).half()
        torch.testing.assert_close(local_sum(x, w), expected, rtol=0, atol=0, equal_nan=True)
    assert not [found for found in compiled._found.values() if isinstance(found, str)], compiled._found
"""


@needs_compiler
@pytest.mark.parametrize("flags", ["", "-U__FLT16_MAX__"], ids=["own type", "by hand"])
def test_float16_with_and_without_a_type_of_the_compiler(tmp_path, flags):
    """Every number is widened exactly, and every product of two rounded as torch rounds it."""
    environment = {**os.environ, "GLOCAL_CACHE": str(tmp_path), "GLOCAL_CFLAGS": f"-O3 -fopenmp {flags}"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(HALVES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_a_failing_compiler_is_heard_of_once(tmp_path):
    process = start(tmp_path, GLOCAL_CFLAGS="-mno-such-machine")
    assert process.communicate(timeout=120)[1].count("local_sum.c runs in plain PyTorch, more slowly") == 1


@needs_compiler
def test_a_cache_that_disappears_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path / "gone")
    with pytest.warns(UserWarning, match="No such file"):
        assert "No such file" in compiled._load.__wrapped__("local_sum.c", torch.float32, (("GONE", 1),))


def test_types_without_code_run_eagerly():
    with pytest.raises(compiled.Unavailable, match=r"no torch\.int64"):
        compiled.load("local_sum.c", torch.int64)
    x, w = torch.arange(5.0).view(1, 5, 1), torch.ones(1, 1, 1, 3)
    assert local_sum(x, w).flatten().tolist() == [1, 3, 6, 9, 7]


def test_a_call_without_memory_raises():
    class Refuses:
        __name__ = "refuses"

        def __call__(self, *arguments):
            return 1

    with pytest.raises(MemoryError, match="refuses: no memory"):
        compiled.call(Refuses())


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages for those who ask")
def test_asks_for_huge_pages_for_large_tensors_and_no_others(monkeypatch):
    asked = []
    monkeypatch.setattr(compiled, "_advise", lambda: lambda *arguments: asked.append(arguments))
    compiled.on_huge_pages(torch.empty(2**19 - 1))
    assert not asked
    new = torch.empty(2**19 + 1)
    assert compiled.on_huge_pages(new) is new
    [(begin, length, advice)] = asked
    assert begin % mmap.PAGESIZE == 0
    assert begin <= new.data_ptr()
    assert new.data_ptr() + new.nbytes == begin + length
    assert advice == mmap.MADV_HUGEPAGE


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages for those who ask")
def test_the_system_hears_of_it():
    """Not that it has any left: only that the request is one."""
    new = torch.empty(2**20)
    begin = new.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    assert compiled._advise()(begin, new.data_ptr() + new.nbytes - begin, mmap.MADV_HUGEPAGE) == 0


FAULTS = {
    "kernels/compiled.py": (
        (
            "huge pages are asked for at an odd address",
            "new.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE",
            "new.data_ptr()",
        ),
        ("a library is written under its own name while it is built", "os.replace(unfinished, path)", "pass"),
        ("sources do not count for the name", "hashlib.sha256(text + ", "hashlib.sha256("),
        ("the types of elements share a library", 'f"-D{TYPES[dtype]}", ', '"-DFLOAT32", '),
        ("anybody may write to the cache", "mode=0o700", "mode=0o777"),
        ("a failure of memory goes unnoticed", "raise MemoryError(", "print("),
    ),
    "kernels/common.h": (
        ("the smallest halves are widened wrongly", "float_of(0x38800000)); /* 2", "float_of(0x38000000)); /* 2"),
        ("infinity is widened to 65536", "rest >= 0x0f800000 ?", "rest >= 0x1f800000 ?"),
        ("ties are rounded up", "rest - 0x38000000 + 0xfff + (rest >> 13 & 1)", "rest - 0x38000000 + 0x1000"),
        ("what is too large for a half wraps around", "rest >= 0x47800000 ? large", "rest > 0x7f800000 ? large"),
        ("small products lose their last bit", "+ 0.5f) - 0x3f000000", "+ 1.0f) - 0x3f800000"),
        ("an older compiler's halves lose their sign", "(uint16_t)(sign | (rest", "(uint16_t)((rest"),
    ),
}
