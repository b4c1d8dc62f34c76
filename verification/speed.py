"""How fast is a training step here, and does it take the memory that was planned? Speed is told, never wrong."""

import dataclasses
import gc
import statistics
import tempfile
import time
from pathlib import Path

from verification.gpus import card, has_bfloat16
from verification.tiny_runs import ROOT, write_features
from verification.verdicts import Check, Skip, Wrong

GIB = 2**30
# Peak TFLOP/s of the tensor cores by words of the GPU's name: bfloat16, or float16 where there is none, dense (NVIDIA's
# data sheets give twice as much, with sparsity), summed in float32. The first row whose words are all there counts.
PEAKS = {
    ("B200",): 2250.0,
    ("H200",): 989.0,
    ("H100", "NVL"): 835.0,
    ("H100", "PCIe"): 756.0,
    ("H100",): 989.0,
    ("H800",): 989.0,
    ("H20",): 148.0,
    ("A100",): 312.0,
    ("A800",): 312.0,
    ("A40",): 149.7,
    ("A30",): 165.0,
    ("A10",): 125.0,
    ("L40S",): 362.0,
    ("L40",): 181.0,
    ("L20",): 119.5,
    ("L4",): 121.0,
    ("V100", "PCIE"): 112.0,
    ("V100",): 125.0,
    ("T4",): 65.0,
    ("4090",): 165.2,
}
OTHER_CARDS = {"Laptop", "MIG", "D", "Ti", "SUPER"}  # words that make it another card, or a part of one
PRESETS = ("DiT_XL_patch2", "DiT_L_patch2", "DiT_B_patch2", "DiT_S_patch2", "DiT_S_patch8")
BATCHES = (128, 64, 32, 16, 8)
USABLE = 0.85  # of a GPU's memory: the rest is CUDA's context, workspaces, and what the allocator can't use
# The plan is within 4% of what was measured on a CPU (docs/memory.md); a GPU's kernels have workspaces of their own.
PLAN_BOUND = 0.15


def checks(settings):
    """Yields the checks of this group."""
    speed = Speed(settings)
    for case in list(speed.cases())[: 2 if settings.quick else None]:
        yield Check(f"step, {case}", lambda case=case: speed.tell_step(case))
        yield Check(f"memory, {case}", lambda case=case: speed.compare_memory(case))


@dataclasses.dataclass(frozen=True)
class Case:
    """How a preset is trained; `recompute` and `fused` None: as the preset says."""

    dtype: str = "float32"
    level: str = "O1"
    fused: bool | None = None
    recompute: bool | None = None

    def __str__(self):
        words = [self.dtype if self.dtype == "float32" else f"{self.dtype} {self.level}"]
        if self.fused is None:
            return f"{words[0]}, attention and recompute as in the preset"
        return f"{words[0]}, {'fused' if self.fused else 'plain'} attention{', recompute' if self.recompute else ''}"


@dataclasses.dataclass
class Measured:
    """A case's figures."""

    planned: object  # `training.parallel.memory_plan.Plan`
    preset: str
    seconds: float  # of a step
    peak: int | None  # bytes beyond those before the run; None where Paddle can't count anew
    notes: list


class Speed:
    """Measures training steps of a preset, each case once."""

    def __init__(self, settings):
        self._settings, self._measured, self._product = settings, {}, None

    def cases(self):
        """Yields the `Case`s of the device, those of --quick first."""
        if not self._settings.on_gpu:
            yield Case("float32", "O1", False, False)
            return
        half = "bfloat16" if has_bfloat16() else "float16"
        yield Case(half, "O2", True, False)
        yield Case(half, "O1")
        for fused, recompute in ((True, True), (False, False), (False, True)):
            yield Case(half, "O2", fused, recompute)

    def tell_step(self, case):
        """Returns text and figures on the speed of a case."""
        from training.parallel.step_time import step_flops

        measured = self._measure(case)
        flops, batch = step_flops(measured.planned), measured.planned.setting.batch
        tflops = flops / measured.seconds / 1e12
        product, peak = self._measured_product(case.dtype), self._peak()
        shares = {f"of a matrix product's {product:.3g} here": tflops / product}
        if peak is not None:
            shares = {f"of the card's {peak:g}": tflops / peak, **shares}
        figures = {"preset": measured.preset, "batch": batch, "step_s": measured.seconds, "flops": flops}
        figures |= {"samples_per_s": batch / measured.seconds, "tflops": tflops}
        figures |= {"product_tflops": product, "card_tflops": peak, "notes": measured.notes}
        text = (
            f"{measured.preset}, batch {batch}: {measured.seconds:.3f} s a step, {batch / measured.seconds:.3g} "
            f"samples/s, {tflops:.3g} TFLOP/s ({', '.join(f'{share:.0%} {what}' for what, share in shares.items())})"
        )
        return "; ".join([text, *measured.notes]), figures

    def compare_memory(self, case):
        """Compares the peak of allocated memory with the plan's; a plan that is too low is wrong."""
        measured = self._measure(case)
        if measured.peak is None:
            raise Skip("this Paddle can't count the peak of its memory anew; Paddle 3 can")
        planned = measured.planned.peak
        beyond = measured.peak / planned - 1
        figures = {"measured_bytes": measured.peak, "planned_bytes": planned, "bound": PLAN_BOUND}
        text = f"{measured.peak / GIB:.2f} GiB at the peak, planned {planned / GIB:.2f} ({beyond:+.1%})"
        if beyond > PLAN_BOUND:
            raise Wrong(f"{text}: the plan is more than {PLAN_BOUND:.0%} too low", figures)
        return f"{text}{'' if -beyond <= PLAN_BOUND else ': less than planned, which is safe'}", figures

    def _measure(self, case):
        if case not in self._measured:
            try:
                self._measured[case] = self._run(case)
            except Exception as error:
                self._measured[case] = type(error).__name__  # not the error, whose frames hold the network
                raise
        if isinstance(self._measured[case], str):
            raise Skip(f"the step could not be measured: {self._measured[case]}")
        return self._measured[case]

    def _run(self, case):
        """Trains a few steps; with half the batch again where memory ends."""
        preset, config, planned = choose_preset(case, *self._room())
        notes = []
        while True:
            batch = planned.setting.batch
            try:
                seconds, peak = measure(config, batch, Path(self._settings.folder), quick=self._settings.quick)
                return Measured(planned, preset, seconds, peak, notes)
            except Exception as error:
                if not is_out_of_memory(error) or batch == 1:
                    raise
            notes.append(f"batch {batch} did not fit, planned were {planned.peak / GIB:.1f} GiB")
            planned = type(planned)(config, dataclasses.replace(planned.setting, batch=batch // 2))
            forget_memory()

    def _room(self):
        """Returns bytes that a run may take, presets, and batch sizes."""
        if not self._settings.on_gpu:
            return None, PRESETS[-1:], (4,)
        return USABLE * card().total_memory, PRESETS, BATCHES

    def _peak(self):
        """Returns the TFLOP/s of the card by its data sheet; None for one that is not in the table, and for a CPU."""
        return card_peak(card().name) if self._settings.on_gpu else None

    def _measured_product(self, dtype):
        if self._product is None:
            self._product = measure_product(dtype, 8192 if self._settings.on_gpu else 1024)
        return self._product


def card_peak(name):
    """Returns the peak TFLOP/s in half precision of a GPU's name; None if it is not known."""
    words = set(name.replace("-", " ").split())
    if words & OTHER_CARDS:
        return None
    return next((peak for row, peak in PEAKS.items() if words.issuperset(row)), None)


def choose_preset(case, room, presets, batches):
    """Returns `(name, config, Plan)` of the largest preset and batch whose plan is within `room` bytes, if not None."""
    from config.schema import load_config
    from training.parallel.memory_plan import Plan, Setting

    for preset in presets:
        config = load_config(ROOT / "config" / f"{preset}.json")
        training = config["training"]
        training.update(amp_dtype=case.dtype, amp_level=case.level)
        if case.fused is not None:
            training.update(fused_attention=case.fused, recompute=case.recompute)
        for batch in batches:
            setting = Setting.of(training, batch=batch, accumulation=1, device="cpu" if room is None else "gpu")
            planned = Plan(config, setting)
            if room is None or planned.peak <= room:
                return preset, config, planned
    raise Skip(f"{presets[-1]} with {batches[-1]} samples takes {planned.peak / GIB:.1f} GiB, more than there are")


def measure(config, batch, folder, *, quick):
    """Returns the median seconds of a step of the hand-written loop, and the peak of its memory in bytes, or None."""
    from runtime.paddle_private import allocated_bytes, count_peak_anew

    forget_memory()
    counts, before = count_peak_anew(), allocated_bytes("current")
    step, seconds = training_step(config, batch, folder), []
    for _ in range(2 if quick else 3):
        step()
    for _ in range(2 if quick else 5):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), allocated_bytes("peak") - before if counts else None


def training_step(config, batch, folder):
    """Returns a function that does a step of the hand-written loop on latents that stay, and waits for the device."""
    import paddle

    from objectives import Rows, make_batch
    from runtime.process import seed_step
    from training import setup
    from training.session import Outputs, build_session

    model, training = config["model"], config["training"]
    training.update(global_batch_size=batch, gradient_accumulation_steps=1, max_steps=10**6)
    shape = model["in_channels"], model["sample_size"], model["sample_size"]
    features = folder / f"features-{batch}-{shape[-1]}"
    data = setup.open_data(config, write_features(features, batch, shape, model["num_classes"]), 64)
    precision = setup.setup_precision(training, paddle.get_device())
    outputs = Outputs(log_every=10**6, show_bar=False)
    session = build_session(config, data, tempfile.mkdtemp(dir=folder), precision=precision, outputs=outputs).start()
    latents = make_batch(map(paddle.to_tensor, data.dataset.read(range(batch))))
    numbers = iter(range(1, 10**6))

    def step():
        number = next(numbers)
        seed_step(training["seed"], number)
        with precision.autocast():
            losses = session.objective.training_losses(session.model, latents, Rows(0, batch, batch))
            loss = losses["loss"].mean()
        session.scaler.scale(loss).backward()
        session.add_losses(loss, losses)
        session.begin_update(number)
        session.scaler.step(session.optimizer)
        session.scaler.update()
        session.end_update()
        session.optimizer.clear_grad()
        session.after_step(number)
        float(loss)

    return step


def measure_product(dtype, size):
    """Returns the TFLOP/s of a square matrix product."""
    import paddle

    x, seconds = paddle.rand([size, size]).astype(dtype), []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(3):
            y = paddle.matmul(x, x)
        float(y[0, 0].astype("float32"))  # waits for the device
        seconds.append((time.perf_counter() - start) / 3)
    return 2 * size**3 / min(seconds) / 1e12


def is_out_of_memory(error):
    """Returns whether an error of Paddle's says that the device has no memory left."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "alloc_failed" in text


def forget_memory():
    """Gives back what earlier runs held."""
    import paddle

    gc.collect()
    if paddle.get_device().startswith("gpu"):
        paddle.device.cuda.empty_cache()
