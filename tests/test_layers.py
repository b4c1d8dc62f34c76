"""Rules of the code: imports go down only, and one file knows Paddle's private names and its versions."""

import ast
import functools
import sys

import paddle
from support.runs import ROOT

PACKAGES = (
    *("runtime", "config", "diffusion", "transport", "models", "objectives", "weights", "features", "sampling"),
    *("evaluation", "training", "verification"),
)
SCRIPTS = {"tools", "benchmarks", "tests", *(path.stem for path in ROOT.glob("*.py"))}
FRAMEWORKS = {"paddle", "paddlenlp", "ppdiffusers", "visualdl", "sklearn", "PIL"}
# What a package may import of ours, beside itself and `runtime`, and of the frameworks, at any depth of its code.
ALLOWED = {
    "runtime": {"paddle"},
    "config": set(),
    "diffusion": {"paddle"},
    "transport": {"paddle"},
    "models": {"paddle"},
    "objectives": {"paddle", "diffusion", "transport", "models.hooks", "models.regularizers"},
    "weights": {"paddle", "models", "config", "ppdiffusers"},
    "features": {"paddle", "weights", "config", "objectives.base", "PIL", "ppdiffusers"},
}
ALLOWED["sampling"] = {"paddle", *ALLOWED, "PIL", "ppdiffusers"}
ALLOWED["evaluation"] = {*ALLOWED["sampling"], "sampling", "sklearn"}
ALLOWED["training"] = {*ALLOWED["sampling"], "sampling", "evaluation", "visualdl"}
ALLOWED["verification"] = {*ALLOWED["training"], "training"}
ALONE = {"diffusion", "transport"}  # can be copied into another project: they import not even `runtime`

PRODUCT = [*(path for folder in (*PACKAGES, "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py"))]
PRODUCT += ROOT.glob("*.py")
TESTS = [*(ROOT / "tests").glob("*.py"), *(ROOT / "tests/faults").glob("*.py")]


def folder(path):
    return path.relative_to(ROOT).parts[0]


def assert_none(paths, find):
    """Fails with a line for each file in which `find(path)` finds something."""
    found = {path.relative_to(ROOT): ", ".join(sorted(find(path))) for path in paths}
    lines = [f"{path}: {names}" for path, names in found.items() if names]
    assert not lines, "\n".join(lines)


@functools.cache
def tree(path):
    return ast.parse(path.read_text())


def imports(node, package=""):
    """The modules that a piece of code imports; relative ones as of `package`."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            yield from (alias.name for alias in inner.names)
        elif isinstance(inner, ast.ImportFrom):
            prefix = f"{package}." if inner.level else ""
            yield from (f"{prefix}{inner.module or alias.name}" for alias in inner.names)
            if not inner.level:
                yield from (f"{inner.module}.{alias.name}" for alias in inner.names)


def refused(path, forbidden, allowed=()):
    """The imports of a file whose first name is forbidden, unless they are, or lie in, an allowed one."""
    return sorted(
        name
        for name in set(imports(tree(path)))
        if name.split(".")[0] in forbidden and not any(f"{name}.".startswith(f"{ok}.") for ok in allowed)
        if not any(f"{ok}.".startswith(f"{name}.") for ok in allowed)  # `objectives` of `objectives.base`
    )


PACKAGED = [path for path in PRODUCT if folder(path) in PACKAGES]


def test_imports_go_down_only():
    def find(path):
        package = folder(path)
        allowed = ALLOWED[package] | {package} | (set() if package in ALONE else {"runtime"})
        if package == "training" and path.name.startswith("trainer"):
            allowed |= {"paddlenlp"}
        return refused(path, {*PACKAGES, *SCRIPTS, *FRAMEWORKS}, allowed)

    assert_none(PACKAGED, find)


def test_what_every_help_needs_imports_no_framework_at_its_top():
    def find(path):
        top = [node for node in tree(path).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        return {name.split(".")[0] for node in top for name in imports(node)} & FRAMEWORKS

    assert_none([path for path in PACKAGED if folder(path) in ("runtime", "config")], find)


def test_scripts_are_imported_by_tests_and_benchmarks_only():
    def find(path):
        allowed = {"tests.support", "_root"}
        if folder(path) == "benchmarks":  # which time commands
            allowed |= {"benchmarks", "tools"}
        return refused(path, SCRIPTS, allowed)

    assert_none([path for path in PRODUCT if path not in PACKAGED], find)


def test_tests_import_neither_benchmarks_nor_one_another():
    others = {path.stem for path in TESTS if path.name.startswith("test_")}
    assert_none(TESTS, lambda path: refused(path, {"benchmarks", *others}))


# -- Private names ----------------------------------------------------------------------------------------------------

# Private names that are no Paddle's: parts of an interface, and what other libraries do not offer otherwise.
OTHERS = {
    *("_replace", "_asdict", "_fields", "_make", "_exit", "_root"),
    *("_actions", "_option_string_actions"),  # argparse
    *("_foreach_add_", "_foreach_mul_"),  # torch, of a benchmark
    *("_current_frames", "_mmap", "_wrapped"),  # sys; numpy's memmap; tqdm's ObjectWrapper
    *("_progress_bar_config", "_convert_deprecated_attention_blocks", "_update_deprecated_state_dict"),  # ppdiffusers
}


def is_private(name):
    return name.startswith("_") and name != "_" and not (name.startswith("__") and name.endswith("__"))


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@functools.cache
def of_paddle():
    """The private attributes that Paddle's objects have from birth, whoever's `self` they hang on."""
    layer = paddle.nn.LayerNorm(2)
    optimizer = paddle.optimizer.AdamW(parameters=layer.parameters(), grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0))
    samples = (layer, optimizer, layer.weight, paddle.amp.GradScaler(enable=False), paddle.io.BatchSampler([1]))
    return {name for sample in samples for name in dir(sample) if is_private(name)}


def defined(path):
    """The private names that a file makes: functions, classes, variables, and attributes of `self`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            if node.attr not in of_paddle():
                yield node.attr


def used(path):
    """The private names that a file imports, or asks of an object."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            if not is_self(node.value) or node.attr in of_paddle():
                yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)
            yield from (node.module or "").split(".")
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "setattr", "hasattr", "delattr"):
                yield from (argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant))


@functools.cache
def defined_by_package(package):
    return {name for path in PACKAGED if folder(path) == package for name in defined(path)}


def test_private_names_of_paddle_stand_in_one_file():
    def find(path):
        ours = defined_by_package(folder(path)) if folder(path) in PACKAGES else set(defined(path))
        return {name for name in used(path) if is_private(name)} - ours - OTHERS - set(sys.stdlib_module_names)

    assert_none([path for path in PRODUCT if path != ROOT / "runtime/paddle_private.py"], find)


# -- Versions of Paddle -----------------------------------------------------------------------------------------------


def of_frameworks(path):
    """The names by which a file knows frameworks, their modules and what it imports of them."""
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                module = node.module or "" if isinstance(node, ast.ImportFrom) else alias.name
                if module.split(".")[0] in FRAMEWORKS | {"paddlenlp"}:
                    yield alias.asname or alias.name.split(".")[0]


def root(node):
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def questions(path):
    """Where a file asks what a framework has, or does more with its version than telling it."""
    frameworks = set(of_frameworks(path))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            asks = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
            if asks and root(node.args[0]) in frameworks:
                yield f"line {node.lineno}: {node.func.id}"
        elif isinstance(node, (ast.Compare, ast.Attribute, ast.Subscript)):
            parts = ast.walk(node) if isinstance(node, ast.Compare) else [node.value]
            if any(isinstance(part, ast.Attribute) and part.attr == "__version__" for part in parts):
                yield f"line {node.lineno}: __version__"


def test_one_file_knows_what_versions_of_paddle_differ_in():
    assert_none([path for path in PRODUCT if path != ROOT / "runtime/paddle_private.py"], questions)


def test_that_would_be_seen(tmp_path):
    path = tmp_path / "code.py"
    path.write_text(
        """
import paddle
from paddle.nn import functional as F

if paddle.__version__ < "3":
    pass
if int(paddle.__version__.split(".")[0]) < 3:
    pass
hasattr(F, "swiglu")
getattr(paddle.nn, "sdpa", None)
f"{paddle.__version__} {getattr(paddle, 'rand')}"
"""
    )
    lines = {5: "__version__", 7: "__version__", 9: "hasattr", 10: "getattr"}
    assert {*questions(path)} == {f"line {line}: {what}" for line, what in lines.items()}
