"""The page of every option, made from the declarations.

python -m tests.project.options     # writes kvlock_fast/docs/options.md
"""

from pathlib import Path

from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.parameters import PANELS, Parameter, declared
from kvlock_fast.settings import JOB, EditFiles, EditSettings, MaskShape, Preset

PAGE = Path(__file__).resolve().parents[2] / "kvlock_fast" / "docs" / "options.md"
KINDS = (EditFiles, EditSettings, MaskShape, Preset, LockConfig, CacheConfig)
HEAD = """# Options

Every parameter of an edit, as `kvlock-fast edit` takes it. `invert`, `batch`, `plan` and `profile` take the same option
where they have the same parameter; options of `batch` are defaults for jobs that do not give the field. "Python" names
the dataclass and field that declare it, "manifest" the field of a job. Defaults of the lock are those of the preset
`kvlock`; another preset changes some. This page is written by `make options`.
"""
COLUMNS = ("| option | values | default | meaning | Python | manifest |", "| --- | --- | --- | --- | --- | --- |")


def page() -> str:
    """The page: a table for each panel of the help."""
    jobs = {one.name for one in declared(*JOB) if one.manifest} | {"prompt", "output"}
    parts = [HEAD]
    for panel in PANELS:
        rows = [_row(kind, one, jobs) for kind in KINDS for one in declared(kind) if one.panel == panel]
        parts.append("\n".join([f"## {panel}\n", *COLUMNS, *rows, ""]))
    return "\n".join(parts)


def _row(kind: type, one: Parameter, jobs: set[str]) -> str:
    values = one.values.replace("|", ", ") or "on, off"
    default = "(required)" if one.required else one.default_text or ("off" if one.default is False else "")
    field = f"`{one.name}`" if one.name in jobs else ""
    cells = (f"`{one.option}`", values, default, one.help, f"`{kind.__name__}.{one.attribute}`", field)
    return f"| {' | '.join(cell.replace('|', ', ') for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
