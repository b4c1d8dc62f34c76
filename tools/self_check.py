"""Say what this machine has, and whether a small training step gives the right numbers here.

    python tools/self_check.py             # for people
    python tools/self_check.py --json      # for a bug report

Told are the versions of Python and of Paddle's packages, packages that differ from the pins of constraints.txt, the
processor, memory, disk and GPUs, one forward and backward pass of a tiny DiT beside the numbers that it must give, and
which downloaded weights are there. No path of yours and no variable of the environment is told, but for
MKL_DEBUG_CPU_TYPE and OMP_NUM_THREADS.

Exit code: 0 all is well, 1 there are problems.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time

from _root import ROOT

from config.flags import CommandParser, add_device_flag
from config.options import DEFAULT_VAE, SIT_VAE
from runtime.machine import available_memory, has_bundled_mkl, read_processor
from runtime.process import configure_runtime, counted, one_line, resolve_device, run_cli, say

SHOWN = ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "ppdiffusers", "numpy", "safetensors", "visualdl")
IMPORTED = ("paddle", "paddlenlp", "ppdiffusers")
# What tools/setup_env.sh leaves out, or puts in another one's place.
NOT_INSTALLED = {"ligo-segments", "onnxoptimizer", "paddle2onnx"}
INSTEAD = {"opencv-python": "opencv-python-headless", "paddlepaddle": "paddlepaddle-gpu"}
PROCESSOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
MODEL = {"type": "DiT", "sample_size": 8, "patch_size": 2, "num_layers": 2, "num_attention_heads": 2}
MODEL |= {"attention_head_dim": 16, "num_classes": 10}
# Loss and norm of the gradients of `tiny_step` in float32; its network is one that the tests hold to the official one.
EXPECTED = {"loss": 1.4499017, "gradient_norm": 1.3313488}
TOLERANCE = 1e-4  # of a number's size; GPUs with TF32 are the worst


def installed_version(package):
    """Returns the version of an installed package; None: it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
        if version is None or not pin.specifier.contains(version, prereleases=True):
            found.append({"package": pin.name, "installed": version, "pinned": str(pin.specifier).lstrip("=")})
    return found


def without_paths(text):
    """Returns a text in which the folders of this project and of the user have short names."""
    for folder, name in ((ROOT, "."), (sys.prefix, ".venv"), (os.path.expanduser("~"), "~")):
        text = text.replace(folder, name) if len(folder) > 1 else text
    return text


def try_imports():
    """Imports the packages of Paddle's stack: `{package: {seconds, error}}`, the error one line or None."""
    found = {}
    for package in IMPORTED:
        start, error = time.perf_counter(), None
        try:
            importlib.import_module(package)
        except Exception as problem:  # whatever a broken mixture of versions raises
            error = without_paths(f"{type(problem).__name__}: {one_line(problem)}")
        found[package] = {"seconds": round(time.perf_counter() - start, 1), "error": error}
    return found


def describe_machine():
    """Returns processor, memory and disk: the `machine` section of the report."""
    vendor, flags = read_processor()
    free = available_memory()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "vendor": vendor or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in PROCESSOR_FLAGS if flag in flags],
        "paddle_bundles_mkl": has_bundled_mkl(),
        "MKL_DEBUG_CPU_TYPE": os.environ.get("MKL_DEBUG_CPU_TYPE"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "available_memory_gib": free and round(free / 2**30, 1),
        "free_disk_gib": round(shutil.disk_usage(ROOT).free / 2**30, 1),
    }


def describe_devices():
    """Returns `[{device, name, memory_gib, compute_capability}]`, the CPU alone where Paddle sees no GPU."""
    import paddle

    found = []
    for index in range(paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0):
        properties = paddle.device.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"gpu:{index}",
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found or [{"device": "cpu", "name": "CPU"}]


def tiny_step():
    """Returns loss and gradient norm of one forward and backward pass of a tiny DiT on Paddle's current device.

    Weights, latents, times and labels are numpy's, so that they are the same on every machine and device.
    """
    import numpy as np
    import paddle

    from models import build_model

    rng = np.random.default_rng(0)
    network = build_model(MODEL)
    network.eval()  # so that no label is dropped
    for name, parameter in network.named_parameters():
        if name != "pos_embed":
            parameter.set_value(0.1 * rng.standard_normal(parameter.shape).astype("float32"))
    x, target = (paddle.to_tensor(rng.standard_normal((4, 4, 8, 8)).astype("float32")) for _ in range(2))
    output = network(x, paddle.to_tensor([0, 10, 500, 999]), paddle.to_tensor([0, 3, 7, 10]))  # 10 is the null class
    loss = ((output[:, :4] - target) ** 2).mean()
    loss.backward()
    squares = [float((p.grad**2).sum()) for p in network.parameters() if p.grad is not None]
    return {"loss": float(loss), "gradient_norm": float(np.sqrt(np.sum(squares)))}


def check_step(device):
    """Returns the `step` section of the report: the numbers of `tiny_step` beside those that it must give."""
    import paddle

    try:
        paddle.set_device(resolve_device(device))
        start = time.perf_counter()
        numbers = tiny_step()
    except ValueError:
        raise
    except Exception as error:  # an operator without a kernel, a driver that does not fit, no memory, ...
        return {"device": device, "right": False, "error": without_paths(f"{type(error).__name__}: {one_line(error)}")}
    right = all(abs(numbers[name] - value) <= TOLERANCE * value for name, value in EXPECTED.items())
    seconds = round(time.perf_counter() - start, 2)
    return {"device": paddle.get_device(), "right": right, "seconds": seconds, **numbers, "expected": EXPECTED}


def find_weights():
    """Returns which weights that are usually downloaded are on this machine: `{name: True or False}`."""
    from evaluation import inception

    found = {}
    try:
        from ppdiffusers.utils import PPDIFFUSERS_CACHE

        for name in (DEFAULT_VAE, SIT_VAE):
            folder = os.path.join(PPDIFFUSERS_CACHE, name)
            found[name] = os.path.isfile(os.path.join(folder, "config.json"))
    except Exception:  # told already, with the imports
        pass
    try:
        inception.find_weights()
        found["FID's Inception"] = True
    except ValueError:
        found["FID's Inception"] = False
    return found


def list_problems(report):
    """Yields a line for each thing that is not as it should be."""
    for name, tried in report["imports"].items():
        if tried["error"]:
            yield f"import {name}: {tried['error']}; run bash tools/setup_env.sh"
    for pin in report["pins"]["different"]:
        there = f"is {pin['installed']}" if pin["installed"] else "is not installed"
        yield f"{pin['package']} {there}, pinned is {pin['pinned']}"
    machine = report["machine"]
    is_other = machine["vendor"] not in ("GenuineIntel", "unknown") and "avx2" in machine["flags"]
    if is_other and machine["paddle_bundles_mkl"] and machine["MKL_DEBUG_CPU_TYPE"] != "5":
        yield "MKL_DEBUG_CPU_TYPE is not 5: matrix products are slow on this processor"
    step = report.get("step")
    if step and "error" in step:
        yield f"a tiny training step on {step['device']} failed: {step['error']}"
    elif step and not step["right"]:
        numbers = ", ".join(f"{name} {step[name]:.6g}, expected {value:.6g}" for name, value in EXPECTED.items())
        yield f"a tiny training step on {step['device']} gives other numbers: {numbers}"


def make_report(device):
    """Returns everything that is told, as one dictionary."""
    constraints = "constraints-py313.txt" if sys.version_info[:2] == (3, 13) else "constraints.txt"
    report = {
        "python": platform.python_version(),
        "packages": {name: version for name in SHOWN if (version := installed_version(name))},
        "pins": {"file": constraints, "different": compare_pins(os.path.join(ROOT, constraints))},
        "imports": try_imports(),
        "machine": describe_machine(),
    }
    if not report["imports"]["paddle"]["error"]:
        report |= {"devices": describe_devices(), "step": check_step(device)}
        report["weights"] = find_weights()
    report["problems"] = list(list_problems(report))
    return report


def print_report(report):
    """Prints the report for people."""
    machine, different = report["machine"], report["pins"]["different"]
    say(f"Python {report['python']}, {', '.join(f'{name} {version}' for name, version in report['packages'].items())}")
    say(f"pins of {report['pins']['file']}: {counted(len(different), 'package')} differ" if different else "pins: kept")
    say(", ".join(f"import {name} {tried['seconds']} s" for name, tried in report["imports"].items()))
    say(f"{machine['system']}, {machine['vendor']}, {counted(machine['cores'], 'core')}, {' '.join(machine['flags'])}")
    variables = (f"{name}={machine[name]}" for name in ("MKL_DEBUG_CPU_TYPE", "OMP_NUM_THREADS") if machine[name])
    say(f"free: memory {machine['available_memory_gib']} GiB, disk {machine['free_disk_gib']} GiB")
    say(", ".join(variables))
    for device in report.get("devices", ()):
        say(", ".join(str(value) for value in device.values()))
    if report.get("step", {}).get("right"):
        say("a tiny training step on {device}: right, loss {loss:.6f}, {seconds} s".format(**report["step"]))
    for name, there in report.get("weights", {}).items():
        say(f"{name}: {'on this machine' if there else 'not on this machine'}")
    for problem in report["problems"]:
        say(f"problem: {problem}")
    say("no problems" if not report["problems"] else counted(len(report["problems"]), "problem"))


def main(argv=None):
    parser = CommandParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, for a bug report")
    add_device_flag(parser)
    args = parser.parse_args(argv)
    configure_runtime()
    with contextlib.redirect_stdout(sys.stderr):  # so that nothing that an import prints comes between the JSON
        report = make_report(args.device)
    if args.json:
        say(json.dumps(report, indent=2))
    else:
        print_report(report)
    if report["problems"]:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
