"""The rooms of the package, read from its imports: their order, their circles, and their picture.

python -m tests.project.rooms     # draws kvlock_fast/docs/rooms.svg
"""

import ast
from collections import defaultdict
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "kvlock_fast" / "docs" / "rooms.svg"

ORDER = [
    group.split()
    for group in (
        "kernels",
        "errors version renamed owner units parameters files progress nvtx",
        "config presets settings masks conditioning ops",
        "media",
        "locking",
        "models cache",
        "loop",
        "methods",
        "scene open_scene edits",
        "planning",
        "pipeline",
        "integrations report",
        "edit edit_files invert",
        "batch profiling tools demo",
        "segment service app comfyui",
        "cli",
    )
]
"""A room imports only rooms of the groups before its own, or of its own group."""
FRONT = ("kvlock_fast", "kvlock_fast.parallel", "kvlock_fast.modular", "kvlock_fast.tables")
"""Names handed on to other people's code. They may import any room, and no room imports them (but `__init__`)."""


def modules() -> dict[str, Path]:
    """The file of every module of the package and of the kernels."""
    found = {}
    for path in [*(ROOT / "kvlock_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[:2] != ("kvlock_fast", "kernels"):
            inside = parts if parts[0] == "kvlock_fast" else ("kvlock_fast", *parts)
            found[".".join(inside).removesuffix(".__init__")] = path
    return found


def imports(files: dict[str, Path]) -> dict[str, set[str]]:
    """The modules of ours that each module imports anywhere: at its head, in functions, for type checkers."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                raise ValueError(f"{module} has a relative import in line {node.lineno}")
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kvlock_fast":
                inside = (f"{node.module}.{alias.name}" for alias in node.names)
                found[module] |= {name if name in files else node.module for name in inside}
            elif isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names if alias.name.split(".")[0] == "kvlock_fast"}
        found[module].discard(module)
    return found


def room_of(module: str) -> str:
    """The room a module is in: a folder, or a file at the package's top."""
    if module == "kvlock_fast":
        raise ValueError("a room imports the package's top: name the room that is meant")
    return module.split(".")[1]


def rooms() -> tuple[dict[str, int], dict[str, set[str]]]:
    """Lines of each room, and the rooms it imports."""
    files, sizes, arrows = modules(), defaultdict(int), defaultdict(set)
    for module, path in files.items():
        if module not in FRONT:
            sizes[room_of(module)] += len(path.read_text().splitlines())
    for module, targets in imports(files).items():
        if module not in FRONT:
            arrows[room_of(module)] |= {room_of(t) for t in targets if t not in FRONT} - {room_of(module)}
    return dict(sizes), dict(arrows)


def _needed(arrows: dict[str, set[str]]) -> set[tuple[str, str]]:
    """The arrows without those that a way through other rooms stands for."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        todo = list(arrows.get(start, ()))
        while todo:
            if (room := todo.pop()) not in found:
                found.add(room)
                todo += arrows.get(room, ())
        return found

    below = {room: reached(room) for room in arrows}
    return {(a, b) for a in arrows for b in arrows[a] if not any(b in below.get(c, ()) for c in arrows[a] - {b})}


def draw() -> str:
    """The picture: a row a group, the command line on top; a line from each room down to those it rests on."""
    sizes, arrows = rooms()
    rows = [[room for room in group if room in sizes] for group in reversed(ORDER)]
    rows = [row for row in rows if row]
    width, height, gap, margin = 132, 38, 14, 20
    wide = max(len(row) for row in rows) * (width + gap) - gap + 2 * margin
    tall = len(rows) * (height + 26) + margin
    at = {
        room: ((wide - len(row) * (width + gap) + gap) / 2 + i * (width + gap), margin / 2 + y * (height + 26))
        for y, row in enumerate(rows)
        for i, room in enumerate(row)
    }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" font-family="sans-serif" font-size="13">',
        "<title>The rooms of kvlock_fast: each rests on the rooms below it</title>",
        f'<rect width="{wide}" height="{tall}" fill="#fbfaf7"/>',
    ]
    words = {room for group in ORDER[:3] for room in group}
    for a, b in sorted(_needed({room: targets - words for room, targets in arrows.items()})):
        (ax, ay), (bx, by) = at[a], at[b]
        x1, y1, x2, y2 = ax + width / 2, ay + height, bx + width / 2, by
        # Long arrows go around the rooms between their ends.
        aside = 0 if y2 - y1 < height else (150 if (x1 + x2) / 2 >= wide / 2 else -150)
        bend = (y2 - y1) / 2
        curve = (
            f"M{x1:.0f} {y1:.0f} C{x1 + aside:.0f} {y1 + bend:.0f} {x2 + aside:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}"
        )
        parts.append(f'<path d="{curve}" fill="none" stroke="#9aa5b1" stroke-width="1.2"/>')
    top = min(at[room][1] for room in words if room in at) - 12
    parts.append(
        f'<rect x="4" y="{top:.0f}" width="{wide - 8}" height="{tall - top - 4:.0f}" rx="8" fill="#eceae2"/>'
        f'<text x="{margin}" y="{tall - 16:.0f}" font-size="11" fill="#52606d">every room above may use these</text>'
    )
    for room, (x, y) in at.items():
        folder = (ROOT / "kvlock_fast" / room).is_dir()
        name, lines = escape(room + ("/" if folder else "")), f"{sizes[room]:,} lines"
        parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{width}" height="{height}" rx="6" '
            f'fill="{"#dfe9f3" if folder else "#f1ece0"}" stroke="#5b6770"/>'
            f'<text x="{x + width / 2:.0f}" y="{y + 16:.0f}" text-anchor="middle" fill="#1f2933">{name}</text>'
            f'<text x="{x + width / 2:.0f}" y="{y + 31:.0f}" text-anchor="middle" font-size="10" fill="#52606d">'
            f"{lines}</text>"
        )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw())
    print(f"drew {PICTURE.relative_to(ROOT)}")
