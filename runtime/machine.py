"""Processor and memory of this machine. Standard library only, and quick to import.

`tools/setup_env.sh` lets the Python of `.venv` call `set_mkl_cpu_type` whenever it starts.
"""

import contextlib
import itertools
import os
import platform
import sys
import sysconfig

PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "ppdiffusers", "numpy")  # whose versions matter to a run


def read_processor(path="/proc/cpuinfo"):
    """Returns vendor and feature flags of the first processor that Linux lists, both empty on arm64 and elsewhere."""
    fields = _processor_fields(path)
    return fields.get("vendor_id", ""), set(fields.get("flags", "").split())


def _processor_fields(path="/proc/cpuinfo"):
    fields = {}
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in itertools.takewhile(str.strip, file):  # the first processor; a server lists hundreds
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    return fields


def describe_environment():
    """Returns what a run's numbers and speed may depend on, JSON values: versions, system, processor, threads."""
    from importlib import metadata  # slow to import, and this module is at each start of .venv's Python

    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "python": platform.python_version(),
        **versions,
        "system": platform.platform(),
        "processor": _processor_fields().get("model name") or platform.machine(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def has_bundled_mkl(folders=None):
    """Returns whether the Paddle that would be imported bundles an MKL of 2019, as its x86 wheels do."""
    if folders is None:
        folders = [*sys.path, sysconfig.get_path("platlib")]
    return any(os.path.isfile(os.path.join(folder, "paddle", "libs", "libmklml_intel.so")) for folder in folders)


def set_mkl_cpu_type(environ=os.environ, cpuinfo="/proc/cpuinfo", folders=None):
    """Sets MKL_DEBUG_CPU_TYPE, so that Paddle's matrix products use AVX2 on processors that are not Intel's.

    The MKL in Paddle's CPU wheels takes its slowest path there; newer ones, as PyTorch's, do not read the variable.
    A value that the environment has already stays. MKL reads it at the first product, be Paddle imported or not.
    """
    if "MKL_DEBUG_CPU_TYPE" in environ:
        return
    vendor, flags = read_processor(cpuinfo)
    if vendor and vendor != "GenuineIntel" and "avx2" in flags and has_bundled_mkl(folders):
        environ["MKL_DEBUG_CPU_TYPE"] = "5"  # AVX2


def set_mkl_reproducible(environ=os.environ, cpuinfo="/proc/cpuinfo"):
    """Sets MKL_CBWR, so that no bit of a product depends on the number of threads, nor a row's on the other rows.

    That is for Intel's processors, where it takes no time; on others MKL would take its slowest path. A value that the
    environment has already stays. MKL reads it at the first product.
    """
    if read_processor(cpuinfo)[0] == "GenuineIntel":
        environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def cpu_has_bfloat16():
    """Returns whether this CPU multiplies bfloat16 (avx512_bf16, AMX): Paddle does not say if it takes float32."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(read_processor()[1])


def available_memory():
    """Returns the bytes that this machine or container can still give to processes and page cache; None: unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration, IndexError):
        with open("/proc/meminfo") as file:
            found.append(int(next(line for line in file if line.startswith("MemAvailable")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        with open("/sys/fs/cgroup/memory.max") as file:
            found.append(int(file.read()))
    return min(found, default=None)
