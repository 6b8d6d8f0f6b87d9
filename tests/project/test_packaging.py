"""Installed in every way people install, the kernels are kvlock_fast.kernels and nothing else is.

Each way gets a virtual environment of its own that sees the libraries of this one by path alone, so an editable
install of the project in this one is out of its sight.
"""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
INSTALLED = {distribution.metadata["Name"].lower() for distribution in importlib.metadata.distributions()}
SHIPPED = ["setup.py", "pyproject.toml", "LICENSE", "README.md", "kernels", "kvlock_fast"]


def run(*command, cwd):
    result = subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of what a checkout holds, so that building leaves nothing in this one."""
    copy = tmp_path_factory.mktemp("checkout") / "project"
    copy.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(project) -> Path:
    return build(project, "wheel")


@pytest.fixture(scope="module")
def sdist(project) -> Path:
    return build(project, "sdist")


def build(project: Path, kind: str) -> Path:
    """A wheel or sdist by the build backend itself, without isolation and so without fetching anything."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    run(sys.executable, "-c", code, project.parent / "dist", cwd=project)
    return next((project.parent / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz"))


def environment(folder: Path) -> Path:
    """A virtual environment that has our libraries on its path but not what .pth files add to it; its python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(run(python, "-c", ask, cwd=folder).strip())
    paths = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    (site / "libraries.pth").write_text("\n".join(sorted(paths)))
    return python


def install(python: Path, *what) -> None:
    # --ignore-installed: pip would otherwise try to remove an older one that it finds on the path, outside.
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    alone = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed"]
    run(sys.executable, "-m", "pip", "--python", python, *quiet, "install", *alone, *what, cwd=python.parent)


# Run in the installed environment; argv: the modules in kernels/.
CHECK = """
import importlib, importlib.metadata, json, sys
from importlib.util import find_spec
import kvlock_fast
for name in sys.argv[1:]:
    importlib.import_module(f"kvlock_fast.kernels.{name}")
package = sys.modules["kvlock_fast.kernels"]
assert getattr(package, "__file__", None) is None, "kernels/ must stay a namespace: no __init__.py"
from diffusers.utils.import_utils import is_kernels_available
top_level = find_spec("kernels")
scripts = importlib.metadata.entry_points(group="console_scripts", name="kvlock-fast")
print("FOUND", json.dumps({
    "versions": [importlib.metadata.version("kvlock-fast"), kvlock_fast.__version__],
    "entry": scripts["kvlock-fast"].value,
    "files": [str(f) for f in importlib.metadata.files("kvlock-fast")],
    "top_level": top_level and (top_level.origin or str(list(top_level.submodule_search_locations))),
    "diffusers_sees_kernels": is_kernels_available(),
}))
"""


def check(python: Path, cwd: Path) -> dict:
    return json.loads(run(python, "-c", CHECK, *KERNELS, cwd=cwd).partition("FOUND ")[2])


def pretend_theirs(python: Path) -> Path:
    """Put a package named kernels beside ours, as Hugging Face's; its __init__.py."""
    site = next(python.parent.parent.rglob("libraries.pth")).parent
    (site / "kernels").mkdir()
    (site / "kernels/__init__.py").write_text("")
    (site / "kernels-9.9.dist-info").mkdir()
    (site / "kernels-9.9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 9.9\n")
    return site / "kernels/__init__.py"


def ways(project, wheel, sdist, way):
    return {
        "wheel": [wheel],
        "sdist": [sdist],
        "editable": ["-e", project],
        "strict": ["-e", project, "--config-settings", "editable_mode=strict"],
        "compat": ["-e", project, "--config-settings", "editable_mode=compat"],
    }[way]


EXTRA = [pytest.param(way, marks=pytest.mark.large) for way in ("strict", "compat")]


@pytest.mark.parametrize("way", ["wheel", "sdist", "editable", *EXTRA])
def test_installed(project, wheel, sdist, way, tmp_path):
    assert KERNELS
    python = environment(tmp_path / "venv")
    install(python, *ways(project, wheel, sdist, way))
    (tmp_path / "elsewhere").mkdir()
    found = check(python, tmp_path / "elsewhere")
    assert found["entry"] == "kvlock_fast.cli:main"
    assert len(set(found["versions"])) == 1
    if way in ("wheel", "sdist"):
        assert all(re.match(r"kvlock_fast[/-]|\.\.", name) for name in found["files"])
    if "kernels" not in INSTALLED:
        assert found["diffusers_sees_kernels"] is False
        # The compat mode puts the checkout itself on the path: there it is found, but as a namespace, which yields.
        assert found["top_level"] is None or way == "compat"
        theirs = pretend_theirs(python)
        # From the checkout's root, where our folder comes first on the path: the harder case.
        found = check(python, project)
        assert found["diffusers_sees_kernels"] is True
        assert Path(found["top_level"]).samefile(theirs)
    assert not list(project.glob("kernels*-info")) and not list(project.glob("kernels/*-info"))


def test_what_a_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"kvlock_fast"}
    assert {f"kvlock_fast/kernels/{name}.py" for name in KERNELS} <= names
    assert "kvlock_fast/kernels/__init__.py" not in names
    assert {"kvlock_fast/report/page.html.jinja", "kvlock_fast/py.typed", "kvlock_fast/version.py"} <= names
    assert any(name.endswith("LICENSE") for name in names)
    # Whatever a checkout's package holds beside code, an installed one holds as well: weights, vocabularies, templates.
    data = {p.relative_to(ROOT).as_posix() for p in (ROOT / "kvlock_fast").rglob("*") if p.is_file()}
    wanted = {name for name in data if not name.endswith((".pyc", ".md")) and not name.startswith("kvlock_fast/docs/")}
    assert wanted <= names, sorted(wanted - names)


def test_an_sdist_holds_the_kernels_as_files(sdist):
    with tarfile.open(sdist) as archive:
        members = {m.name.partition("/")[2]: m for m in archive.getmembers()}
    for name in KERNELS:
        assert members[f"kvlock_fast/kernels/{name}.py"].isfile()
    assert "LICENSE" in members


def test_the_symlink_is_relative_and_has_no_init():
    link = ROOT / "kvlock_fast/kernels"
    assert link.is_symlink() and link.readlink().as_posix() == "../kernels"
    assert not (ROOT / "kernels/__init__.py").exists()


def test_kernels_refuse_another_name(project):
    """From a checkout's root, `import kernels.x` finds the file, which must not register its operators again."""
    code = """
import importlib, sys
sys.path.insert(0, ".")
for name in sys.argv[1:]:
    try:
        importlib.import_module(f"kernels.{name}")
    except ImportError as error:
        assert "kvlock_fast.kernels" in str(error), error
    else:
        raise SystemExit(f"kernels.{name} was imported under this name")
"""
    run(sys.executable, "-c", code, *KERNELS, cwd=project)
