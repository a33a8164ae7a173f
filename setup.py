"""Installs aerec_nb; every value comes from settings.ini, so that nbdev and pip never disagree. Wheels carry the
notebooks, copied in when they are built.
"""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
readme = here / "README.md"


class BuildPy(build_py):
    """The modules, and beside them in `_project` what `aerec new` lays out; an executed copy left in nbs/ has lost its
    tagged cell and stays behind.
    """

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return  # there the notebooks are where they always are
        target = Path(self.build_lib) / cfg["lib_path"] / "_project"
        shutil.rmtree(target, ignore_errors=True)
        numbered = [
            p
            for p in sorted(here.glob("nbs/[0-9]*.ipynb"))
            if "papermill-error-cell-tag" in p.read_text(encoding="utf-8")
        ]
        for path in [
            *numbered,
            *(
                p
                for part in (
                    "nbs/tutorials/*.ipynb",
                    "nbs/how_to/*.ipynb",
                    "config/*.toml",
                    "dataset/README.md",
                    "constraints.txt",
                )
                for p in sorted(here.glob(part))
            ),
        ]:
            (target / path.relative_to(here)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(here))


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    packages=find_packages(include=["aerec_nb", "aerec_nb.*"]),
    include_package_data=True,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("dev", "onnx", "ray")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split("\n"),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Programming Language :: Python :: 3",
        "Operating System :: OS Independent",
    ],
    cmdclass={"build_py": BuildPy},
    zip_safe=False,
)
