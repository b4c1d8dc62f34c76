"""Imports go down only, and what is light stays light."""

import ast

import pytest
from conftest import ROOT

OURS = {"runtime", "untrusted", "models", "diffusion", "transport", "objectives", "sampling", "training", "tools"}
# What a package may import of ours, and of the heavy frameworks, at any depth of its code.
ALLOWED = {
    "runtime": set(),
    "untrusted": set(),
    "models": {"models"},
    "diffusion": {"diffusion"},
    "transport": {"transport"},
    "objectives": {"diffusion", "transport"},
    "sampling": {"models", "diffusion", "transport", "objectives", "sampling", "ppdiffusers"},
    "training": {"models", "objectives", "sampling", "training", "visualdl"},
}
TRAINER_SIDE = {"trainer.py", "trainer_arguments.py"}
FRAMEWORKS = {"paddlenlp", "ppdiffusers", "visualdl", "sklearn", "PIL"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


FILES = sorted(
    path
    for package in ALLOWED
    for path in ([ROOT / f"{package}.py"] if (ROOT / f"{package}.py").exists() else (ROOT / package).rglob("*.py"))
)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_go_down_only(path):
    package = path.relative_to(ROOT).parts[0].removesuffix(".py")
    allowed = ALLOWED[package] | {"runtime", "untrusted"}  # below all of them, on the standard library alone
    if package in ("sampling", "training"):
        allowed.add("PIL")
    if path.name in TRAINER_SIDE:
        allowed.add("paddlenlp")
    assert set(imports(path)) & (OURS | FRAMEWORKS) <= allowed


@pytest.mark.parametrize("script", ["train_image_generation_trainer.py", "train_image_generation_notrainer.py"])
def test_loops_do_not_ask_which_model_they_train(script):
    source = (ROOT / script).read_text() + (ROOT / "training/trainer.py").read_text()
    for name in ("DiT", "SiT", "LargeDiT", "diffusion", "transport"):
        code = "\n".join(line for line in source.splitlines() if '"""' not in line and "#" not in line)
        assert f'"{name}"' not in code and f"import {name}" not in code
