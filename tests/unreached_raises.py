"""List the `raise` statements of the package that no test reaches.

Tests run in a temporary copy of the project. In the copy every `raise X`, in modules and in notebooks, also makes
an empty file that is named after the statement. So it counts in every process: kernels, services, Ray workers.

    .venv/bin/python tests/unreached_raises.py                                     # all tests: takes long
    .venv/bin/python tests/unreached_raises.py --modules scale --tests -n 0 tests/test_scale.py
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import ROOT, tracked


def raises(source, module):
    "Return pairs of a name and a `raise` with an expression; in a notebook and in its module the name is the same."
    found = []

    def visit(node, scope):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            scope = (*scope, node.name)
        if isinstance(node, ast.Raise) and node.exc:
            twins = sum(name[0] == scope and name[1] == ast.unparse(node) for name, _ in found)
            found.append(((scope, ast.unparse(node), twins), node))
        for child in ast.iter_child_nodes(node):
            visit(child, scope)

    visit(ast.parse(source), ())
    return [(hashlib.sha256(repr((module, name)).encode()).hexdigest()[:20], node) for name, node in found]


def instrument(source, module, log):
    "Make every raised expression of a source also touch its file in the folder `log`; lines stay where they are."
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    marks = []
    for key, node in raises(source, module):
        touch = f', __import__("io").open({str(log / key)!r}, "w").close())[0]'
        marks.append((node.exc.lineno, node.exc.col_offset, b"("))
        marks.append((node.exc.end_lineno, node.exc.end_col_offset, touch.encode()))

    for line, column, mark in sorted(marks, reverse=True):
        text = lines[line - 1]
        lines[line - 1] = text[:column] + mark + text[column:]
    return b"".join(lines).decode()


def module_name(path, root):
    "Return the name of a module of a copy of the project, without the package."
    return ".".join(path.relative_to(root / "aerec_nb").with_suffix("").parts)


def copy_project(copy, log):
    "Copy what git tracks into the folder `copy`, with instrumented modules and notebooks."
    for path in tracked():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)

    for path in (copy / "aerec_nb").rglob("*.py"):
        path.write_text(instrument(path.read_text(), module_name(path, copy), log))
    for path in (copy / "nbs").rglob("*.ipynb"):
        notebook = json.loads(path.read_text())
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        module = re.search(r"#\| default_exp ([\w.]+)", "\n".join("".join(cell["source"]) for cell in cells))
        for cell in cells if module else []:
            source = "".join(cell["source"])
            if not re.search(r"^\s*[%!]", source, re.M):
                cell["source"] = instrument(source, module[1], log).splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")

    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    subprocess.run(["git", "add", "-A"], cwd=copy, check=True)


def main():
    "Run tests in a copy; print the raises that were not reached and return 1 if there are any."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", help="names of modules, with commas; default: all")
    parser.add_argument("--log", type=Path, help="folder that keeps what was reached, for several runs")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, default=[], help="what follows goes to tests/run.py")
    options = parser.parse_args()

    scratch = Path(tempfile.mkdtemp(prefix="aerec_nb-raises-"))
    scratch.chmod(0o755)  # some tests give up their rights and still read the project
    log = (options.log or scratch / "log").resolve()
    log.mkdir(parents=True, exist_ok=True)
    log.chmod(0o777)
    try:
        copy_project(scratch / "copy", log)
        env = {**os.environ, "PYTHONPATH": str(scratch / "copy")}
        subprocess.run([sys.executable, "tests/run.py", *options.tests], cwd=scratch / "copy", env=env, check=False)
        return report(options.modules.split(",") if options.modules else None, log)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def report(modules, log):
    "Print each raise that has no file in `log` as file:line: text, then the counts."
    n_all = 0
    n_unreached = 0
    for path in sorted((ROOT / "aerec_nb").rglob("*.py")):
        name = module_name(path, ROOT)
        if modules and name not in modules:
            continue
        for key, node in raises(path.read_text(), name):
            n_all += 1
            if not (log / key).exists():
                n_unreached += 1
                print(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    print(f"{n_all} raises, {n_unreached} not reached")
    return 1 if n_unreached else 0


if __name__ == "__main__":
    sys.exit(main())
