"""How a process starts, speaks and ends, alone or beside others of a launcher. Standard library only."""

import contextlib
import ctypes
import functools
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
import traceback
import warnings

from runtime import paddle_private
from runtime.machine import set_mkl_cpu_type
from runtime.run_lock import close_inherited


def is_terminal(stream):
    """Returns True if a stream is a terminal; False also if it is closed, or None."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return stream.isatty()
    return False


def local_processes():
    """Returns how many processes the launcher started on this machine; 1 without a launcher."""
    return max(1, int(os.environ.get("PADDLE_LOCAL_SIZE") or os.environ.get("PADDLE_TRAINERS_NUM") or 1))


SAVING_THREAD = "checkpoint"  # the name of threads that write a run's folders, which are waited for before the end
STARTED = time.monotonic()
# Exit codes beside 0, 1 (an error in the program) and 2 (a user's mistake, a file system's refusal):
EXIT_BAD_STEP = 65  # numbers that are not finite ended the run (EX_DATAERR): again is no use
EXIT_LOST = 70  # a rank hangs or is gone (EX_SOFTWARE)
EXIT_STOPPED = 75  # stopped on request and saved, to be resumed (EX_TEMPFAIL of sysexits.h: try again)
EXIT_INTERRUPTED = 130  # Ctrl-C, nothing to save
EXIT_UNREAD = 141  # nobody reads the output any more, as in `command | head -1` (128 + SIGPIPE)


def configure_runtime():
    """Sets what Paddle reads at import; call it first. Each setting can be overridden from the environment.

    - `OMP_NUM_THREADS`: Paddle's CPU build computes on one thread unless it is set: the cores over the local processes.
    - `FLAGS_use_stride_kernel=0`: strided views make later operators copy element by element on a CPU.
    - `MKL_DEBUG_CPU_TYPE=5` on processors of other vendors than Intel, see `runtime.machine.set_mkl_cpu_type`.
    - glibc's malloc thresholds: large buffers are kept instead of being mapped and unmapped at each use.
    - Python's zlib is loaded before Paddle: see `runtime.paddle_private.prepare_import`.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local_processes())))
    os.environ.setdefault("FLAGS_use_stride_kernel", "0")
    os.environ.setdefault("GLOG_minloglevel", "2")
    set_mkl_cpu_type()
    paddle_private.prepare_import()
    # These two warnings of Paddle's import tell a user of this project nothing.
    warnings.filterwarnings("ignore", message="No ccache found")
    warnings.filterwarnings("ignore", message="Setuptools is replacing distutils")
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            m_trim_threshold, m_mmap_threshold, gigabyte = -1, -3, 1 << 30
            libc.mallopt(m_mmap_threshold, gigabyte)
            libc.mallopt(m_trim_threshold, gigabyte)


@functools.cache
def spare_small_blocks(count=256):
    """Gives glibc's malloc `count` free blocks of each size up to 1 KiB, no two side by side; call before training.

    Paddle aligns every buffer to a page, and malloc asks a free block to be a page larger. With the gap beside it a
    freed buffer is that, unless a small object has moved into the gap: then no buffer of its size fits, and the
    process grows by far more than its activations. With these blocks small objects find room elsewhere. They take 10
    MB, and 20 ms to make.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 (what is not glibc keeps other lists)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        smallest, largest = 24, 1016  # bytes; there is a size every 16
        blocks = []
        for size in [*range(smallest, largest + 1, 16)] * count:
            blocks.append(libc.malloc(size))
            libc.malloc(smallest)  # stays, so that free neighbours do not become one block
        for block in blocks:
            libc.free(block)


def run_cli(main):
    """Runs a command: a user's mistake or a file system's refusal is one line on stderr and exit code 2.

    `TRACEBACK=1` in the environment shows where it came from. Ctrl-C is one line too; a reader of the output that is
    gone ends a command without one. Before Paddle is imported, which takes seconds, a line on stderr says so.
    """
    from runtime.console import LoadingNotice

    LoadingNotice.install()
    try:
        main()
        leave_distributed()
        _flush_output()
    except Exception as error:
        launched = launched_rank()[1] > 1
        if isinstance(error, BrokenPipeError) and not launched and _is_unread(sys.stdout):
            exit_now(EXIT_UNREAD)
        if is_mistake(error) and os.environ.get("TRACEBACK") != "1":
            say(f"error: {one_line(error)}", sys.stderr)
            exit_now(getattr(error, "exit_code", 2))
        if not is_mistake(error) and launched:
            with contextlib.suppress(OSError):
                traceback.print_exc()
            exit_now(1)  # because the destructors of a process group may wait for the other ranks
        raise
    except KeyboardInterrupt:
        say("interrupted", sys.stderr)
        exit_now(EXIT_INTERRUPTED)
    except SystemExit as end:
        if end.code == EXIT_STOPPED:
            leave_distributed(EXIT_STOPPED)
            exit_now(EXIT_STOPPED)
        _flush_output()
        raise


def _is_unread(stream):
    """Returns whether a stream is a pipe whose reader is gone."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def _flush_output():
    """Flushes stdout while a reader that is gone can be told from other errors; Python would complain of any."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # None if it was closed from the start
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            exit_now(EXIT_UNREAD)


def is_mistake(error):
    """Returns True for a user's mistake or a file system's refusal, False for an error of the program."""
    return isinstance(error, ValueError) or is_refusal(error)


def is_refusal(error):
    """Returns True for the error of a file system or a network; an `OSError` of CUDA or NCCL has no errno."""
    return isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError)


def is_saving():
    """Returns True while this process writes a checkpoint, or a snapshot, beside its training."""
    return any(thread.name == SAVING_THREAD for thread in threading.enumerate())


def launched_rank():
    """Returns `(rank, world_size)` that the launcher gave this process, without Paddle; `(0, 1)` without a launcher."""
    return int(os.environ.get("PADDLE_TRAINER_ID", "0")), int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


def leave_distributed(code=0):
    """Ends this process of a finished job, when all ranks are here; does nothing in a process that is alone.

    No destructors run: those of a process group abort where the store of rank 0 is gone already.
    """
    if launched_rank()[1] > 1:
        import paddle.distributed as dist

        if dist.is_initialized():
            dist.barrier()
            exit_now(code)


def exit_now(code, saving_seconds=None):
    """Ends this process without destructors; a checkpoint being written gets `saving_seconds` for it (None: any)."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    for thread in threading.enumerate():
        if thread.name == SAVING_THREAD and thread.is_alive():
            if in_main_thread:  # a launcher that ends the job because of an error of any rank starts with SIGTERM
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            thread.join(saving_seconds)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # None if it was closed from the start
            stream.flush()
    # Other processes outlive their parent. Those of `start_worker` don't: from another thread they are left to it.
    if in_main_thread and (children := multiprocessing.active_children()):
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # because Paddle's handler raises here when a loader dies
        for child in children:
            child.kill()
    os._exit(code)


def say(text, stream=None):
    """Prints a line to `stream`, or stdout; a full disk or a reader that is gone ends no run."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stream or sys.stdout, flush=True)


def counted(number, noun, plural=None):
    """Returns a number with its noun: `1 image`, `1,200 images`; `plural` is for a noun that takes no s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def one_line(error):
    """Returns the message of an error on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the file system'}: {error.strerror}"
    return " ".join(str(error).split())


def resolve_device(requested):
    """Returns what `paddle.set_device` takes for `auto`, `cpu`, `gpu` or `gpu:N`; ValueError where there is no GPU."""
    import paddle

    kind = requested.split(":")[0]
    if kind not in ("auto", "cpu", "gpu"):
        raise ValueError(f"device must be auto, cpu, gpu or gpu:N, got {requested!r}")
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if kind == "auto":
        kind = requested = "gpu" if gpus else "cpu"
    if kind == "gpu" and not gpus:
        use = "use --device cpu, or install paddlepaddle-gpu"
        raise ValueError(f"device gpu was asked for, but Paddle sees no GPU here; {use}")
    return requested  # "gpu" alone is the one that the launcher chose for this process


def init_distributed():
    """Joins the process group of `paddle.distributed.launch`; returns `(rank, world_size)`."""
    import paddle.distributed as dist

    if launched_rank()[1] > 1:
        dist.init_parallel_env()
        dist.barrier()  # so that a rank that ends with an error now leaves nobody waiting for its connection
    return dist.get_rank(), dist.get_world_size()


def seed_step(seed, step):
    """Seeds Paddle's generators for a step, alike on all ranks: a resumed run draws the noise of an unbroken one."""
    import numpy as np
    import paddle

    paddle.seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


def start_worker(*_):
    """Prepares a loader process, as its `worker_init_fn`: it was forked with everything that the run holds.

    It ends by SIGTERM from the run itself, and with a run that is killed. A signal to the whole group it leaves to the
    run, which needs its loaders until it has saved.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)

    def wait_for_parent():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()
    close_inherited()
