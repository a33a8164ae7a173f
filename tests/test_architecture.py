"""The architecture: which module may import which, computed from the code and compared with the picture."""

import ast
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

from aerec_nb.core import code
from aerec_nb.core.artifacts import sections_of
from aerec_nb.core.plugins import built_ins
from aerec_nb.core.stages import STAGES

PACKAGE = ROOT / "aerec_nb"
# The picture of the architecture, top line first. A module imports only from lines below its own, and from its own
# line without a cycle. Stages import libraries, never another stage.
PICTURE = [
    ("workflow", "pipeline", "testing"),
    ("stages",),
    ("service",),
    ("observability", "distributed"),
    ("release", "learning"),
    ("recommending", "evaluation"),
    ("models",),
    ("data",),
    ("core",),
]
# Modules that have not moved into a folder of the picture yet, with the modules that they may import besides those of
# the lines data and core.
NOT_MOVED = {
    "data_import": [],
    "validation": [],
    "training": ["validation"],
    "blocklist": ["data_import"],
    "postprocessing": ["blocklist"],
    "inference": ["postprocessing"],
    "packaging": ["validation", "inference"],
    "transport": [],
    "service_state": ["blocklist"],
    "serving": ["packaging", "transport", "service_state"],
    "monitoring": ["data_import", "packaging"],
    "scale": ["training", "packaging"],
    "warm_kernels": [],
    "pipeline": ["training", "serving", "monitoring", "scale", "warm_kernels"],
}


def module_name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = sorted(module_name(p) for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))


def source(name):
    return PACKAGE.joinpath(*name.split(".")).with_suffix(".py").read_text(encoding="utf-8")


def imported(name):
    "Modules of this package that a module imports, also inside functions."
    found = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            parts = f"aerec_nb.{name}".split(".")[: -node.level] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {m.removeprefix("aerec_nb.") for m in found} & set(MODULES)


IMPORTED = {name: imported(name) for name in MODULES}


def line_of(name):
    "The line of a module in the picture; None where it has not moved."
    if name in NOT_MOVED:
        return None
    top = "stages" if name in STAGES else name.split(".")[0]
    return next(i for i, line in enumerate(PICTURE) if top in line)


def test_every_module_is_in_the_picture():
    for name in MODULES:
        line_of(name)
    assert set(NOT_MOVED) <= set(MODULES)


def test_imports_follow_the_picture():
    for name in MODULES:
        if name in NOT_MOVED:
            continue
        for other in IMPORTED[name]:
            if other in NOT_MOVED:  # its line is not decided by its place; a library may not wait for it
                assert name in STAGES, f"{name} imports {other}, which has not moved"
                continue
            assert line_of(other) >= line_of(name), f"{name} imports {other} of a higher line"
            assert other not in STAGES, f"{name} imports the stage {other}"


def test_modules_that_have_not_moved_follow_their_table():
    def reach(name):
        return {name}.union(*(reach(n) for n in NOT_MOVED[name]))

    base = {name for name in MODULES if name.startswith(("core.", "data.", "models."))}
    own = {"packaging": {"release.settings"}, "scale": {"distributed.settings"}, "pipeline": {"configuration"}}
    for name in NOT_MOVED:
        unexpected = IMPORTED[name] - base - reach(name) - own.get(name, set())
        assert not unexpected, f"{name} imports {sorted(unexpected)}"


def test_imports_have_no_cycle():
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in IMPORTED[name]:
                visit(other, [*path, name])
            done.add(name)

    for name in MODULES:
        visit(name, [])


def test_only_the_table_of_plugins_names_modules_in_strings():
    for name in MODULES:
        if name in NOT_MOVED:
            continue
        for node in ast.walk(ast.parse(source(name))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                package, _, module = node.value.partition(":")[0].partition(".")
                is_module = package == "aerec_nb" and module in MODULES
                assert not is_module, f"{name} names the module {node.value!r}"


def test_every_name_of_the_table_leads_to_an_object():
    table = tomllib.loads((PACKAGE / "plugins.toml").read_text(encoding="utf-8"))
    for kind, names in table.items():
        for name, address in names.items():
            module, _, thing = address.partition(":")
            defined = {
                n
                for node in ast.parse(source(module.removeprefix("aerec_nb."))).body
                for n in [getattr(node, "name", None), *(getattr(t, "id", None) for t in getattr(node, "targets", []))]
            }
            assert thing in defined, f"{kind}.{name}: {address}"


def test_settings_load_without_heavy_packages():
    heavy = ("torch", "ray", "mlflow", "fastapi", "matplotlib", "scipy", "sqlalchemy")
    script = (
        "import sys; from aerec_nb.core.settings import load_settings; load_settings('test')\n"
        f"print(*[name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


@pytest.fixture(scope="module")
def copy_of_package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package") / "aerec_nb"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_a_changed_line_runs_the_stages_that_reach_it(copy_of_package, monkeypatch):
    monkeypatch.setattr(code, "_package_dir", lambda: copy_of_package)

    def hashes():
        return {name: code.code_hash(s.module, sections_of(s)) for name, s in STAGES.items()}

    before = hashes()
    changed = {}
    for name in MODULES:
        path = copy_of_package.joinpath(*name.split(".")).with_suffix(".py")
        original = path.read_text(encoding="utf-8")
        path.write_text(f"{original}\n_changed = 1\n", encoding="utf-8")
        changed[name] = {stage for stage, value in hashes().items() if value != before[stage]}
        path.write_text(original, encoding="utf-8")
    assert hashes() == before

    for name in STAGES:
        assert name in changed[name], f"{name} does not run again when its own module changes"
    assert changed["data.rules"] >= {"configuration", "business_preprocessing"}
    assert "training" not in changed["workflow.settings"] and "configuration" in changed["workflow.settings"]
    assert "data_import" not in changed["models.neural"] and "modeling" in changed["models.neural"]
    assert changed["core.errors"] == set(STAGES)
    assert changed["pipeline"] == set()
    for stage, loaded in loaded_by_stages().items():
        missed = {m for m in loaded if m in changed and stage not in changed[m]} - NEVER_IN_KEY
        assert not missed, f"{stage} loads {sorted(missed)}, and does not run again when they change"


NEVER_IN_KEY = {f"{line}.settings" for names in PICTURE for line in names}  # of other stages: all are composed


def loaded_by_stages():
    "Modules of this package that a fresh process loads for the builder of each stage."
    script = """
import json, os, sys
import fastapi, matplotlib.pyplot, mlflow, pandas, scipy.sparse, torch  # shared by the forks
from aerec_nb.core.stages import STAGES
before = set(sys.modules)
found = {}
for name, stage in STAGES.items():
    r, w = os.pipe()
    if os.fork() == 0:
        stage.builder()
        loaded = [m.removeprefix("aerec_nb.") for m in set(sys.modules) - before if m.startswith("aerec_nb.")]
        os.write(w, json.dumps(loaded).encode())
        os._exit(0)
    os.close(w)
    found[name] = json.loads(os.fdopen(r).read())
    os.wait()
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout)


def test_a_stage_reads_the_groups_it_declares():
    for stage in STAGES.values():
        assert set(sections_of(stage)) <= set(built_ins("settings")), stage.name


def test_packages_have_no_code_of_their_own():
    for path in PACKAGE.rglob("__init__.py"):
        assert path == PACKAGE / "__init__.py" or not path.read_text(encoding="utf-8").strip(), path
    assert isinstance(PACKAGE, Path)
