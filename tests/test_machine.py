"""Settings before Paddle computes: the MKL of its CPU wheels is slow on processors that are not Intel's; the heap."""

import importlib
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.runs import ROOT

import models
from runtime import machine
from runtime.process import configure_runtime

AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx avx2 fma\n\nprocessor\t: 1\nvendor_id\t: other\n"


def chosen(tmp_path, cpuinfo, environ=None, library="libmklml_intel.so"):
    libraries = tmp_path / "paddle" / "libs"
    libraries.mkdir(parents=True)
    (libraries / library).touch()
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    environ = {} if environ is None else environ
    machine.set_mkl_cpu_type(environ, str(path), [str(tmp_path)])
    return environ.get("MKL_DEBUG_CPU_TYPE")


@pytest.mark.parametrize(
    "cpuinfo, expected",
    [
        (AMD, "5"),
        (AMD.replace("AuthenticAMD", "HygonGenuine"), "5"),
        (AMD.replace("AuthenticAMD", "GenuineIntel"), None),
        (AMD.replace(" avx2", ""), None),
        ("processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\n", None),  # arm64
        (None, None),
    ],
    ids=["AMD", "Hygon", "Intel", "no AVX2", "arm64", "no list"],
)
def test_only_other_vendors_with_avx2_are_told(tmp_path, cpuinfo, expected):
    assert chosen(tmp_path, cpuinfo) == expected


@pytest.mark.parametrize("given", ["", "7"])
def test_what_the_user_has_set_stays(tmp_path, given):
    assert chosen(tmp_path, AMD, {"MKL_DEBUG_CPU_TYPE": given}) == given


def test_paddle_with_another_library_is_left_alone(tmp_path):
    assert chosen(tmp_path, AMD, library="libopenblas.so") is None


def test_every_way_in_sets_it(monkeypatch):
    monkeypatch.delenv("MKL_DEBUG_CPU_TYPE", raising=False)
    monkeypatch.setattr(machine, "read_processor", lambda path: ("AuthenticAMD", {"avx2"}))
    monkeypatch.setattr(machine, "has_bundled_mkl", lambda folders: True)
    for start in (configure_runtime, lambda: importlib.reload(models)):
        start()
        assert os.environ.pop("MKL_DEBUG_CPU_TYPE") == "5"
    monkeypatch.undo()


def test_the_python_of_the_virtual_environment_sets_it():
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("this Python is not that of tools/setup_env.sh")
    assert (Path(sysconfig.get_path("purelib")) / "paddle_processor.pth").is_file()
    environ = {key: value for key, value in os.environ.items() if key != "MKL_DEBUG_CPU_TYPE"}
    expected = {}
    machine.set_mkl_cpu_type(expected)
    code = "import os; print(os.environ.get('MKL_DEBUG_CPU_TYPE'))"
    found = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(expected.get("MKL_DEBUG_CPU_TYPE")) and not found.stderr


@pytest.mark.parametrize(
    ("vendor", "given", "expected"),
    [
        ("GenuineIntel", {}, "AUTO,STRICT"),
        ("GenuineIntel", {"MKL_CBWR": "AVX2"}, "AVX2"),
        ("AuthenticAMD", {}, None),
    ],
)
def test_reproducible_products_are_for_intels_processors(vendor, given, expected, tmp_path):
    (tmp_path / "cpuinfo").write_text(AMD.replace("AuthenticAMD", vendor))
    machine.set_mkl_reproducible(given, str(tmp_path / "cpuinfo"))
    assert given.get("MKL_CBWR") == expected


HEAP = """
import ctypes
from runtime.process import configure_runtime, spare_small_blocks

configure_runtime()
spare_small_blocks()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.aligned_alloc.restype, libc.aligned_alloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t] * 2
libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
libc.free.argtypes = [ctypes.c_void_p]
ends, buffers = [libc.sbrk(0)], [0] * 50
for _ in range(2):
    for i in range(len(buffers)):
        buffers[i] = libc.aligned_alloc(4096, 3000000)
        for j in range(10):
            libc.malloc(40 + 16 * ((i + j) % 60))
    for buffer in buffers:
        libc.free(buffer)
    ends.append(libc.sbrk(0))
print((ends[2] - ends[1]) / (ends[1] - ends[0]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc's malloc")
def test_small_objects_keep_no_freed_buffers_apart():
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    found = subprocess.run(
        [sys.executable, "-c", HEAP], env=environ, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(found.stdout) < 0.1  # by how much a second round of the same buffers makes the heap grow
