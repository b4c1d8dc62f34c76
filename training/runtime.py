"""Process set-up: runtime flags before Paddle is imported, device, process group, step seeds, one-line errors.

Importing this module does not import Paddle.
"""

import contextlib
import ctypes
import multiprocessing
import os
import sys
import threading
import time
import traceback
import warnings

DEVICES = ("auto", "cpu", "gpu")
SAVING_THREAD = "checkpoint"  # a thread of this name is waited for before the process ends
STARTED = time.monotonic()
# Exit codes beside 0, 1 (an error in the program) and 2 (a user's mistake, a file system's refusal):
EXIT_STOPPED = 75  # stopped on request and saved, to be resumed (EX_TEMPFAIL of sysexits.h: try again)
EXIT_BAD_STEP = 65  # numbers that are not finite ended the run (EX_DATAERR): again is no use, see training.watch
EXIT_LOST = 70  # a rank hangs or is gone (EX_SOFTWARE)
EXIT_INTERRUPTED = 130  # Ctrl-C, nothing to save


def configure_runtime():
    """Sets what Paddle reads at import; call it first. Each setting can be overridden from the environment.

    - `OMP_NUM_THREADS`: Paddle's CPU build computes on one thread unless it is set: the cores over the local processes.
    - `FLAGS_use_stride_kernel=0`: strided views make later operators copy element by element on a CPU.
    - glibc's malloc thresholds: large buffers are kept instead of being mapped and unmapped at each use.
    """
    processes = max(1, int(os.environ.get("PADDLE_LOCAL_SIZE") or os.environ.get("PADDLE_TRAINERS_NUM") or 1))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("FLAGS_use_stride_kernel", "0")
    os.environ.setdefault("GLOG_minloglevel", "2")
    # Noise of Paddle's import that tells a user of this project nothing.
    warnings.filterwarnings("ignore", message="No ccache found")
    warnings.filterwarnings("ignore", message="Setuptools is replacing distutils")
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            m_trim_threshold, m_mmap_threshold, gigabyte = -1, -3, 1 << 30
            libc.mallopt(m_mmap_threshold, gigabyte)
            libc.mallopt(m_trim_threshold, gigabyte)


def run_cli(main):
    """Runs a command: a user's mistake (`ValueError`) or a file system's refusal is one line on stderr, exit code 2.

    `TRACEBACK=1` in the environment shows where it came from. Ctrl-C is one line too.
    """
    try:
        main()
        leave_distributed()
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK") == "1":
            raise
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        exit_now(getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        exit_now(EXIT_INTERRUPTED)
    except SystemExit as end:
        if end.code == EXIT_STOPPED:
            leave_distributed(EXIT_STOPPED)
            exit_now(EXIT_STOPPED)
        raise
    except Exception:
        if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) == 1:
            raise
        traceback.print_exc()
        exit_now(1)  # the destructors of a process group may wait for the other ranks


def leave_distributed(code=0):
    """Ends this process of a finished job; does nothing in a process that is alone.

    All ranks wait for one another, and run no destructors: those of a process group talk to the store of rank 0, and
    abort where that is gone already.
    """
    if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) > 1:
        import paddle.distributed as dist

        if dist.is_initialized():
            dist.barrier()
            exit_now(code)


def exit_now(code, saving_seconds=None):
    """Ends this process without destructors; loader processes are killed.

    Args:
        saving_seconds: how long to wait for a checkpoint that is being written; None: until it is.
    """
    for thread in threading.enumerate():
        if thread.name == SAVING_THREAD:
            thread.join(saving_seconds)
    sys.stdout.flush()
    sys.stderr.flush()
    # Loader processes outlive their parent, and the threads of a process group or a log keep it from ending.
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def one_line(error):
    """The message of an error on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the file system'}: {error.strerror}"
    return " ".join(str(error).split())


def resolve_device(requested):
    """`auto`, `cpu`, `gpu` or `gpu:N` to what Paddle takes; raises `ValueError` for a GPU that is not there."""
    import paddle

    kind = requested.split(":")[0]
    if kind not in DEVICES:
        raise ValueError(f"device must be auto, cpu, gpu or gpu:N, got {requested!r}")
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if kind == "auto":
        kind = requested = "gpu" if gpus else "cpu"
    if kind == "gpu" and not gpus:
        raise ValueError(
            "device gpu was asked for, but Paddle sees no GPU here; use --device cpu, or install paddlepaddle-gpu"
        )
    return requested  # "gpu" alone is the one that the launcher chose for this process


def compute_capability(device):
    """`(major, minor)` of a GPU, None for other devices."""
    import paddle

    return tuple(paddle.device.cuda.get_device_capability(device)) if device.startswith("gpu") else None


def init_distributed():
    """Joins the process group of `paddle.distributed.launch`; returns `(rank, world_size)`."""
    import paddle.distributed as dist

    if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) > 1:
        dist.init_parallel_env()
        dist.barrier()  # a rank that ends with an error now does not leave the others waiting for its connection
    return dist.get_rank(), dist.get_world_size()


def seed_step(seed, step):
    """Seeds Paddle's generators for an optimizer step: a resumed run draws the same noise as an unbroken one.

    All ranks take the same seed: each draws for the whole global batch and keeps its rows (`objectives.Rows`).
    """
    import numpy as np
    import paddle

    paddle.seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
