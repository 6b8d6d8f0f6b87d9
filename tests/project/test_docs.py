"""Every Python block of the pages in docs/ and of the README runs as it stands: a page is one program, from the top."""

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "kvlock_fast" / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?P<marker><!-- not run: (?P<reason>[^\n]+) -->\n)?^```python\n(?P<code>.*?)^```$", re.S | re.M)


def blocks(page):
    """(line, code) of the blocks that run."""
    text = page.read_text()
    return [
        (text.count("\n", 0, found.start("code")) + 1, found["code"])
        for found in BLOCK.finditer(text)
        if found["marker"] is None
    ]


def run(page):
    space = {"__name__": page.stem}
    for line, code in blocks(page):
        # Its own lines in a traceback.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), space)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_a_page_runs_as_it_stands(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of libraries that announce changes
        run(page)


def test_pages_with_examples_are_not_lost():
    with_code = {page.name for page in PAGES if blocks(page)}
    assert {"README.md", "backend.md", "own_loop.md", "wrap_pipeline.md", "ops.md", "image_flux.md"} <= with_code


def test_a_block_is_left_out_only_with_a_reason():
    left_out = [found["reason"] for page in PAGES for found in BLOCK.finditer(page.read_text()) if found["marker"]]
    assert all("weights" in reason for reason in left_out)
    everything = sum(page.read_text().count("\n```python\n") for page in PAGES)
    assert everything == len(left_out) + sum(len(blocks(page)) for page in PAGES)


def test_an_example_that_fails_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text.\n\n```python\nx = 1\n```\n\n<!-- not run: no weights -->\n```python\n1 / 0\n```\n\n"
        "```python\nassert x == 2\n```\n"
    )
    assert [line for line, _ in blocks(page)] == [4, 13]
    with pytest.raises(AssertionError) as failed:
        run(page)
    assert failed.traceback[-1].lineno + 1 == 13 and str(failed.traceback[-1].path) == str(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_go_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        found = (page.parent / name) if name else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target
