"""Who may know whom: ``scala_model`` <- ``server`` <- ``benchmarks``; policies know numbers, engines know no HTTP."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH, HTTP = {"torch"}, {"fastapi", "starlette", "uvicorn"}
TORCH_ENGINES = {
    f"server.engine.{name}" for name in ("torch_engine", "cuda_graphs", "serving_forward", "device_errors")
}


def modules_of(package: str) -> dict[str, Path]:
    """Dotted names of all modules of a package, and their files."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


MODULES = modules_of("scala_model") | modules_of("server")
POLICY_MODULES = [
    "server.types",
    "server.errors",
    "server.request_queue",
    "server.load_monitor",
    "server.latency_profile",
    "server.profile_store",
    "server.planner",
    *(module for module in MODULES if module.startswith("server.policies")),
]
SERVING = ("server.app", "server.planner", "server.lifecycle")
UNPICKLING = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
NOT_SERVING = ("server.simulation", "server.bench", "server.replay")  # and nothing of theirs is loaded to serve


@cache
def imported(module: str, *, at_import: bool) -> frozenset[str]:
    """Names that a module imports; ``at_import``: without what its functions import, or only type checkers."""
    return frozenset(_imports(tree(module), at_import))


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def _imports(tree: ast.AST, at_import: bool) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (at_import and _runs_later(node)):
            yield from _imports(node, at_import)


def _runs_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def packages(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def loaded_with(module: str) -> set[str]:
    """The packages that importing a module leads to through modules of ours."""
    return packages(reached_from(module, at_import=True))


def reached_from(module: str, *, at_import: bool) -> set[str]:
    """The names that a module imports, and those that modules of ours among them import, and so on."""
    seen, todo = {module}, [module]
    while todo:
        name = todo.pop()
        names = imported(name, at_import=at_import) | {name.rpartition(".")[0] or name}
        todo += [other for other in names if other in MODULES and other not in seen]
        seen |= names
    return seen


def loaded_after(*modules: str) -> set[str]:
    """The packages that a fresh interpreter holds after importing ``modules``."""
    return packages(modules_after(*modules))


def modules_after(*modules: str) -> set[str]:
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


# -- by reading the source


def test_the_source_is_where_we_look_for_it() -> None:
    assert {"scala_model", "scala_model.vit", "server.routes.classify", "server.engine.contract"} <= MODULES.keys()
    assert loaded_with("server.app") >= {"fastapi", "starlette"}
    assert "torch" in loaded_with("server.engine.torch_engine")


@pytest.mark.parametrize(
    ("package", "strangers"),
    [("scala_model", {"server", "benchmarks", "tests"}), ("server", {"benchmarks", "tests"})],
)
def test_nobody_knows_those_above(package: str, strangers: set[str]) -> None:
    for module in modules_of(package):
        assert packages(imported(module, at_import=False)).isdisjoint(strangers), module


def test_what_decides_knows_neither_torch_nor_http() -> None:
    for module in POLICY_MODULES:
        assert packages(imported(module, at_import=False)).isdisjoint(TORCH | HTTP), module
        assert loaded_with(module).isdisjoint(TORCH | HTTP), module


def test_engines_know_no_http() -> None:
    for module in MODULES:
        if module.startswith("server.engine"):
            assert packages(imported(module, at_import=False)).isdisjoint(HTTP), module
            assert loaded_with(module).isdisjoint(HTTP), module


def test_the_codec_of_a_protocol_knows_no_http() -> None:
    for module in MODULES:
        if module.startswith("server.oip"):
            assert packages(imported(module, at_import=False)).isdisjoint(TORCH | HTTP), module
            assert loaded_with(module).isdisjoint(TORCH | HTTP), module


def test_the_server_loads_torch_only_to_serve_with_it() -> None:
    for module in MODULES:
        if module.startswith("server.") and module not in TORCH_ENGINES:
            assert "torch" not in loaded_with(module), module


def test_serving_knows_nothing_of_simulation_load_generator_and_replay() -> None:
    """Not even inside its functions."""
    for root in SERVING:
        reached = reached_from(root, at_import=False)
        assert {"server.policies.adaptive", "server.latency_profile"} <= reached
        assert not [name for name in reached if name.startswith(NOT_SERVING)], root


def test_nothing_that_serves_unpickles_or_runs_text() -> None:
    """Not even inside its functions. Imported weights, which come as pickles, are another command's."""
    reached = {name for root in SERVING for name in reached_from(root, at_import=False)}
    assert {"server.policies.plan", "server.engine.torch_engine", "scala_model.checkpoint"} <= reached
    assert packages(reached).isdisjoint(UNPICKLING)
    assert "scala_model.importing" not in reached
    calls = [node for name in reached & MODULES.keys() for node in ast.walk(tree(name)) if isinstance(node, ast.Call)]
    loads = [ast.unparse(call) for call in calls if ast.unparse(call.func).endswith(("np.load", "torch.load"))]
    assert loads == ["np.load(file, allow_pickle=False)"]
    assert not [call for call in calls if ast.unparse(call.func) in ("eval", "exec", "compile", "__import__")]


# -- by importing it


def test_policies_load_neither_torch_nor_http() -> None:
    assert loaded_after(*POLICY_MODULES).isdisjoint(TORCH | HTTP)


def test_the_application_is_imported_without_torch() -> None:
    loaded = loaded_after("server.app", "server.lifecycle", "server.cli", "server.engine.contract")
    assert "torch" not in loaded
    assert "fastapi" in loaded


def test_serving_loads_neither_simulation_nor_load_generator_nor_replay() -> None:
    loaded = modules_after("server.app", "server.lifecycle")
    assert "server.policies.adaptive" in loaded
    assert not [name for name in loaded if name.startswith(NOT_SERVING)]


def test_openvino_tells_nobody_that_it_was_imported() -> None:
    after = modules_after("server.engine.openvino_engine")
    assert "openvino" in after
    assert not {module for module in after if module.startswith("openvino_telemetry.")}
