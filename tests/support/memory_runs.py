"""The training runs whose memory was measured: docs/memory.md has a row for each, in this order."""

from config.schema import resolve_config
from training.parallel.memory_plan import Setting

NARROW = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32}
WIDE = {"num_layers": 6, "num_attention_heads": 6, "attention_head_dim": 64}
SMALL = {"sample_size": 16, "patch_size": 2, "num_classes": 10}  # 64 tokens
LONG = {"sample_size": 32, "patch_size": 2, "num_classes": 10}  # 256 tokens
QK_NORM = {"qk_norm": True}
GELU = {"qk_norm": True, "rms_norm": False, "swiglu": False}
GQA = {"qk_norm": True, "num_kv_heads": 2, "multiple_of": 32}


def _case(name, kind, batch, *sizes, ranks=1, **settings):
    model = {"type": kind}
    for part in sizes:
        model.update(part)
    return {"name": name, "model": model, "batch": batch, "ranks": ranks, "settings": settings}


CASES = [
    _case("narrow", "DiT", 8, SMALL, NARROW),
    _case("narrow, batch 32", "DiT", 32, SMALL, NARROW),
    _case("narrow, recompute", "DiT", 32, SMALL, NARROW, recompute=True),
    _case("wide", "DiT", 8, SMALL, WIDE),
    _case("wide, recompute, accumulation 2", "DiT", 32, SMALL, WIDE, recompute=True, gradient_accumulation_steps=2),
    _case("256 tokens", "DiT", 4, LONG, NARROW),
    _case("256 tokens, fused attention", "DiT", 4, LONG, NARROW, fused_attention=True),
    _case("256 tokens, recompute", "DiT", 8, LONG, NARROW, recompute=True),
    _case("no EMA, clipping", "DiT", 16, SMALL, WIDE, use_ema=False, max_grad_norm=1.0),
    _case("patch 4", "DiT", 8, LONG, NARROW, {"patch_size": 4}),
    _case("narrow", "SiT", 16, SMALL, NARROW),
    _case("256 tokens, recompute", "SiT", 12, LONG, WIDE, recompute=True),
    _case("narrow", "LargeDiT", 8, SMALL, NARROW, {"multiple_of": 32}),
    _case("qk_norm, GQA", "LargeDiT", 16, SMALL, NARROW, GQA),
    _case("qk_norm, GQA, recompute", "LargeDiT", 16, SMALL, NARROW, GQA, recompute=True),
    _case("qk_norm, GQA, 256 tokens", "LargeDiT", 4, LONG, WIDE, GQA, fused_attention=True),
    _case("wide, recompute", "LargeSiT", 32, SMALL, WIDE, {"multiple_of": 32}, recompute=True),
    _case("narrow", "LightningDiT", 8, SMALL, NARROW),
    _case("256 tokens, qk_norm, cosine loss", "LightningDiT", 4, LONG, NARROW, QK_NORM, cosine_loss=True),
    _case("wide, recompute", "LightningDiT", 32, SMALL, WIDE, recompute=True),
    _case("layer norms, GELU, qk_norm", "LightningDiT", 16, SMALL, WIDE, GELU),
    _case("O1, wide", "DiT", 16, SMALL, WIDE, amp_dtype="bfloat16"),
    _case("O1, 256 tokens, recompute", "DiT", 8, LONG, NARROW, amp_dtype="bfloat16", recompute=True),
    _case("O1, qk_norm, GQA", "LargeDiT", 16, SMALL, NARROW, GQA, amp_dtype="bfloat16"),
    _case("O1, qk_norm, GQA, recompute", "LargeDiT", 32, SMALL, WIDE, GQA, amp_dtype="bfloat16", recompute=True),
    _case("O1, qk_norm", "LightningDiT", 16, SMALL, NARROW, QK_NORM, amp_dtype="bfloat16"),
    _case("2 processes, DataParallel", "DiT", 4, SMALL, WIDE, ranks=2),
    _case("2 processes, DataParallel, recompute", "DiT", 4, SMALL, WIDE, ranks=2, recompute=True),
    _case("2 processes, DataParallel, Trainer", "DiT", 4, SMALL, WIDE, ranks=2, trainer=True),
    _case(
        "2 processes, DataParallel, Trainer, recompute", "DiT", 4, SMALL, WIDE, ranks=2, trainer=True, recompute=True
    ),
    _case("2 processes, sharding stage1", "DiT", 4, SMALL, WIDE, ranks=2, sharding="stage1"),
    _case("2 processes, sharding stage2", "DiT", 4, SMALL, WIDE, ranks=2, sharding="stage2"),
    _case("2 processes, sharding stage3", "DiT", 4, SMALL, WIDE, ranks=2, sharding="stage3"),
    _case("2 processes, tensor parallel", "DiT", 4, SMALL, WIDE, ranks=2, tensor_parallel=2),
    _case(
        "2 processes, tensor parallel, recompute",
        "LargeDiT",
        4,
        SMALL,
        WIDE,
        GQA,
        ranks=2,
        tensor_parallel=2,
        recompute=True,
    ),
    _case("2 processes, tensor parallel", "LightningDiT", 4, SMALL, WIDE, QK_NORM, ranks=2, tensor_parallel=2),
]


def resolved(case):
    """Returns a case's config and its `Setting`."""
    others = ("sharding", "tensor_parallel", "trainer", "cosine_loss")
    training = {k: v for k, v in case["settings"].items() if k not in others}
    objective = {"cosine_loss": True} if case["settings"].get("cosine_loss") else {}
    config = resolve_config({"model": case["model"], "objective": objective, "training": training})
    training = config["training"]
    sharding, tensor = case["settings"].get("sharding", ""), case["settings"].get("tensor_parallel", 1)
    half = training["amp_dtype"] != "float32"
    setting = Setting.of(
        training,
        world_size=case["ranks"],
        tensor_parallel=tensor,
        sharding=sharding,
        sharding_degree=case["ranks"] if sharding else 1,
        batch=case["batch"],
        # Attention is plain on a CPU, half precision stands for a GPU's.
        fused_attention=False,
        device="gpu" if half else "cpu",
    )
    return config, setting
