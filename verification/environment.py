"""What is installed here, on what machine: versions and pins, imports, processor, memory, GPUs, CUDA, weights."""

import contextlib
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time

from config.options import DEFAULT_VAE, SIT_VAE
from runtime.machine import available_memory, has_bundled_mkl, read_processor
from runtime.process import one_line
from verification.gpus import card
from verification.groups import ROOT
from verification.verdicts import Check, Skip, Wrong

SHOWN = ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "ppdiffusers", "numpy", "safetensors", "visualdl")
IMPORTED = ("paddle", "paddlenlp", "ppdiffusers")
# What tools/setup_env.sh leaves out, or puts in another one's place.
NOT_INSTALLED = {"ligo-segments", "onnxoptimizer", "paddle2onnx"}
INSTEAD = {"opencv-python": "opencv-python-headless", "paddlepaddle": "paddlepaddle-gpu"}
PROCESSOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def checks(settings):
    """Yields the checks of this group."""
    yield Check("packages", check_packages)
    yield Check("imports", check_imports)
    yield Check("machine", check_machine)
    yield Check("matrix products", check_matrix_products)
    yield Check("device", lambda: check_device(settings))
    yield Check("CUDA", lambda: check_cuda(settings))
    yield Check("compute capability", lambda: check_compute_capability(settings))
    yield Check("downloaded weights", find_weights)


def installed_version(package):
    """Returns the version of an installed package; None: it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pins_of_this_environment():
    """Returns the name of the constraints file that tools/setup_env.sh takes for this Python and this Paddle."""
    paddle = installed_version("paddlepaddle") or installed_version("paddlepaddle-gpu") or ""
    if paddle.startswith("2."):
        return "constraints-paddle26.txt"
    return "constraints-py313.txt" if sys.version_info[:2] == (3, 13) else "constraints.txt"


def compare_pins(path):
    """Lists packages whose version is not that of a constraints file: `[{package, installed, pinned}]`."""
    from packaging.requirements import Requirement

    found = []
    with open(path, encoding="utf-8") as file:
        pins = [Requirement(line.strip()) for line in file if line.strip() and not line.startswith("#")]
    for pin in pins:
        if pin.name in NOT_INSTALLED or (pin.marker and not pin.marker.evaluate()):
            continue
        version = installed_version(pin.name)
        if version is None and pin.name in INSTEAD:
            version = installed_version(INSTEAD[pin.name])
        if pin.name == "paddlepaddle" and version:  # Paddle's own index has builds for other CUDAs as 2.6.2.post120
            version = re.sub(r"\.post\d+$", "", version)
        if version is None or not pin.specifier.contains(version, prereleases=True):
            found.append({"package": pin.name, "installed": version, "pinned": str(pin.specifier).lstrip("=")})
    return found


def check_packages():
    """Compares what is installed with the pins; the text names the packages that matter most."""
    file = pins_of_this_environment()
    versions = {name: version for name in SHOWN if (version := installed_version(name))}
    different = compare_pins(os.path.join(ROOT, file))
    figures = {"python": platform.python_version(), **versions, "pins": file, "different": different}
    if different:
        named = ", ".join(
            f"{pin['package']} is {pin['installed'] or 'missing'}, not {pin['pinned']}" for pin in different
        )
        raise Wrong(f"not as {file} pins them: {named}; run bash tools/setup_env.sh", figures)
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"Python {figures['python']}, {told}; all as {file} pins them", figures


def check_imports():
    """Imports the packages of Paddle's stack."""
    seconds, failed = {}, {}
    for package in IMPORTED:
        start = time.perf_counter()
        try:
            importlib.import_module(package)
        except Exception as error:  # whatever a broken mixture of versions raises
            failed[package] = f"{type(error).__name__}: {one_line(error)}"
        seconds[package] = round(time.perf_counter() - start, 1)
    if failed:
        raise Wrong("; ".join(f"{package}: {error}" for package, error in failed.items()), seconds)
    return ", ".join(f"{package} in {took} s" for package, took in seconds.items()), seconds


def check_machine():
    """Tells system, processor, memory and disk."""
    vendor, flags = read_processor()
    free = available_memory()
    figures = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "vendor": vendor or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in PROCESSOR_FLAGS if flag in flags],
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "available_memory_gib": free and round(free / 2**30, 1),
        "free_disk_gib": round(shutil.disk_usage(ROOT).free / 2**30, 1),
    }
    text = (
        "{system}, {vendor}, cores {cores}, threads {OMP_NUM_THREADS}, free: memory {available_memory_gib} GiB, "
        "disk {free_disk_gib} GiB"
    )
    return text.format(**figures), figures


def check_matrix_products():
    """Finds a processor on which Paddle's matrix products run by their slow path."""
    vendor, flags = read_processor()
    figures = {
        "vendor": vendor,
        "bundled": has_bundled_mkl(),
        "MKL_DEBUG_CPU_TYPE": os.environ.get("MKL_DEBUG_CPU_TYPE"),
    }
    is_other = vendor not in ("GenuineIntel", "") and "avx2" in flags
    if is_other and figures["bundled"] and figures["MKL_DEBUG_CPU_TYPE"] != "5":
        raise Wrong("MKL_DEBUG_CPU_TYPE is not 5: they are slow on this processor", figures)
    return f"MKL_DEBUG_CPU_TYPE is {figures['MKL_DEBUG_CPU_TYPE'] or 'not set'}, as it should be", figures


def check_device(settings):
    """Tells the device that the other groups are about, and all GPUs."""
    import paddle

    gpus = []
    for index in range(paddle.device.cuda.device_count() if settings.on_gpu else 0):
        properties = paddle.device.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = round(properties.total_memory / 2**30, 1)
        gpus.append({"name": properties.name, "memory_gib": memory, "compute_capability": capability})
    told = "; ".join("{name}, {memory_gib} GiB, compute capability {compute_capability}".format(**gpu) for gpu in gpus)
    return f"{settings.device}{': ' if told else ''}{told}", {"device": settings.device, "gpus": gpus}


def need_gpu(settings):
    """Skips the check where no GPU is asked about, or none is there."""
    with contextlib.suppress(ValueError):
        if settings.on_gpu:
            return
    raise Skip("no GPU")


def check_cuda(settings):
    """Tells the versions of CUDA, cuDNN, NCCL and the driver."""
    import paddle

    from runtime.paddle_private import nccl_version

    need_gpu(settings)
    figures = {"cuda": paddle.version.cuda(), "cudnn": paddle.get_cudnn_version(), "nccl": nccl_version()}
    figures["driver"] = query_driver()
    return ", ".join(f"{name} {value or 'unknown'}" for name, value in figures.items()), figures


def query_driver():
    """Returns the version of the NVIDIA driver; None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    return None


def check_compute_capability(settings):
    """Compares the GPU's compute capability with those that this build of Paddle has machine code for."""

    from runtime.paddle_private import compiled_architectures

    need_gpu(settings)
    built_for, properties = compiled_architectures(), card()
    major, minor = properties.major, properties.minor
    figures = {"gpu": f"{major}.{minor}", "built_for": [f"{major}.{minor}" for major, minor in built_for]}
    if not built_for:
        raise Skip("this build of Paddle does not tell what it was built for")
    known = ", ".join(figures["built_for"])
    if not any(major == built_major and minor >= built_minor for built_major, built_minor in built_for):
        raise Wrong(f"no code for {figures['gpu']}; this Paddle is built for {known}", figures)
    return f"{figures['gpu']}; built for {known}", figures


def find_weights():
    """Tells which weights that are usually downloaded are on this machine."""
    from ppdiffusers.utils import PPDIFFUSERS_CACHE

    from evaluation import inception

    figures = {}
    for name in (DEFAULT_VAE, SIT_VAE):
        figures[name] = os.path.isfile(os.path.join(PPDIFFUSERS_CACHE, name, "config.json"))
    try:
        inception.find_weights()
        figures["FID's Inception"] = True
    except ValueError:
        figures["FID's Inception"] = False
    return ", ".join(f"{name}: {'here' if there else 'not here'}" for name, there in figures.items()), figures
