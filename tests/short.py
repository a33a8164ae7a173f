"Short notebooks: projects whose stages take seconds, and what tests see of their processes."

import contextlib
import time

import nbformat
import pandas as pd
import psutil
from conftest import ROOT, STRESS

from aerec_nb.core.stages import STAGES
from aerec_nb.pipeline import new_project

# The first seven stages: enough for what the pipeline does with any stage.
PART = [
    "configuration",
    "data_import",
    "business_preprocessing",
    "model_preprocessing",
    "modeling",
    "training",
    "validation",
]


# Settings with which stages do little; for tests of what is around them.
QUICK = {
    "AEREC_MODEL__MODELS": "popularity,ease",
    "AEREC_VALIDATION__N_BOOTSTRAP": "100",
    "AEREC_VALIDATION__LECTURE_REPLAY": "off",
    "AEREC_SERVING__N_REQUESTS": "20",
}


def sample(n_users=None):
    "The ratings of the generated sample, of its first users or of all."
    data = pd.read_csv(ROOT / "dataset" / "sample" / "ratings.csv")
    return data[data.userId.isin(data.userId.drop_duplicates()[:n_users])] if n_users else data


def strip(source, target, stage, shows=False):
    """Write a stage's notebook without its library part: the installed module stands for it.

    `shows`: with the cells that show what came of the stage.
    """
    nb = nbformat.read(source, as_version=4)
    cells = [c for c in nb.cells if c.cell_type == "code"]
    at = next(i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", []))
    begin = next(
        i
        for i, c in enumerate(cells)
        if i > at and "open_run(parameters(globals()" in c.source and not c.source.startswith("#| export")
    )
    imports = [
        c
        for c in cells[at + 1 : begin]
        if not c.source.startswith("#| export")
        and all(line.startswith(("import ", "from ", "#")) for line in c.source.splitlines() if line)
    ]
    library = (
        f"import {STAGES[stage].module} as module\n"
        'globals().update({k: v for k, v in vars(module).items() if k != "run" and not k.startswith("__")})'
    )
    execute = (
        "from aerec_nb.core.artifacts import open_run, parameters\n"
        f"run = open_run(parameters(globals(), local=('dry_run',)))\nrun.execute({stage!r}).name"
    )
    if shows:
        nb.cells = [cells[at], nbformat.v4.new_code_cell(library), *imports, *cells[begin:]]
    else:
        nb.cells = [cells[at], nbformat.v4.new_code_cell(execute)]
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, target)


def short_project(folder, shows=False):
    "Lay out a project of short notebooks; returns its folder."
    new_project(folder)
    for s in STAGES.values():
        strip(ROOT / "nbs" / f"{s.notebook}.ipynb", folder / "nbs" / f"{s.notebook}.ipynb", s.name, shows)
    return folder


def stage_notebook(name, folder, shows=True):
    "Return the notebook of a stage: the whole one under STRESS, else a short one that is written to a folder."
    source = ROOT / "nbs" / f"{name}.ipynb"
    if STRESS:
        return source
    stage = next(s.name for s in STAGES.values() if s.notebook == name)
    strip(source, folder / source.name, stage, shows)
    return folder / source.name


def execute_here(*paths):
    "Execute notebooks one after the other in this process; for use in a fork."
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    for path in paths:
        shell.reset()
        for cell in nbformat.read(path, as_version=4).cells:
            shell.run_cell(cell.source, store_history=True).raise_error()


def left_after(seconds, environ):
    "Return the processes that still work in these runs after so many seconds; [] as soon as there is none."
    deadline = time.monotonic() + seconds
    found = []
    while time.monotonic() < deadline:
        found = []
        for p in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if p.environ().get("AEREC_RUNS_DIR") == environ["AEREC_RUNS_DIR"]:
                    found.append(p)
        if not found:
            break
        time.sleep(0.2)
    return found
