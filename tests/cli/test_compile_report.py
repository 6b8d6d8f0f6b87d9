"""Every kernel that ships compiles for its GPUs as it should, without one; and what should not ship is seen."""

import json
import os
from dataclasses import replace

import pytest

from kvlock_fast.cli import main
from kvlock_fast.cli.kernels import kernels
from kvlock_fast.errors import InputError
from kvlock_fast.tools import compile_report
from kvlock_fast.tools.compiler_process import Row, _cause, _problems

pytest.importorskip("triton")

FAULTY = "tests.support.faulty_kernels"
MATRIX_MODULES = ("attention", "attention_fp8", "fused_attention")


@pytest.fixture(scope="module")
def pool():
    with compile_report.compiler_processes() as pool:
        yield pool


def rows_of(pool, arch, module):
    return list(compile_report.compile_kernels(pool, [arch], compile_report.parse_modules([module])))


class Sampling:
    """A pool in which one of so many variants is compiled, from the first on."""

    def __init__(self, pool, every):
        self.pool, self.every = pool, every

    def submit(self, function, *arguments):
        if function is compile_report.keys:
            return Sampled(self.pool.submit(function, *arguments), self.every)
        return self.pool.submit(function, *arguments)


class Sampled:
    def __init__(self, future, every):
        self.future, self.every = future, every

    def result(self):
        return self.future.result()[:: self.every]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("module", compile_report.kernel_modules())
def test_what_ships_compiles_for_the_target(pool, module, request):
    """Every variant with --all; else one of four."""
    rows = rows_of(pool if request.config.getoption("--all") else Sampling(pool, 4), 90, module)
    assert rows and not [(row.kernel, row.variant, row.problems) for row in rows if row.problems]
    assert all(0 < row.registers <= 255 and row.arch == "sm_90" for row in rows)
    assert len({(row.kernel, row.variant) for row in rows}) == len(rows)
    if module in MATRIX_MODULES:
        assert any(row.matrix and ("HGMMA" in row.mma or "QGMMA" in row.mma) for row in rows)


@pytest.mark.large
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("module", compile_report.kernel_modules())
@pytest.mark.parametrize("arch", [arch for arch in compile_report.ARCHITECTURES if arch != 90], ids="sm_{}".format)
def test_what_ships_compiles_for_the_other_architectures(pool, arch, module):
    assert not [(row.kernel, row.variant, row.problems) for row in rows_of(pool, arch, module) if row.problems]


@pytest.fixture(scope="module")
def faulty(pool):
    rows = list(compile_report.compile_kernels(pool, [80, 90], [FAULTY]))
    return {(row.arch, row.kernel, row.variant.split(" N=")[-1].split()[0] if row.variant else ""): row for row in rows}


@pytest.mark.parametrize(
    "arch, kernel, size, problem",
    [
        ("sm_90", "_spilling_kernel", "128", "bytes of registers spill"),
        ("sm_90", "_product_kernel", "64", "no HGMMA or QGMMA, but HMMA"),
        ("sm_90", "_greedy_kernel", "128", "bytes of shared memory, sm_90 has 232448"),
        ("sm_90", "_broken_kernel", "16", "no_such_method"),
        ("sm_80", FAULTY, "", "its dry launches fail: ValueError: no tiles for sm_80"),
    ],
    ids=["a spill", "no warp-group product", "too much shared memory", "does not compile", "does not launch"],
)
def test_what_must_not_ship_is_seen(faulty, arch, kernel, size, problem):
    assert any(problem in found for found in faulty[arch, kernel, size].problems), faulty


def test_the_name_of_a_failure_is_its_cause(faulty):
    (problem,) = faulty["sm_90", "_broken_kernel", "16"].problems
    assert problem.startswith("does not compile: ") and "'no_such_method'" in problem and "^" not in problem


def test_a_sound_kernel_has_no_problem_and_each_specialisation_one_row(pool):
    rows = [r for r in compile_report.compile_kernels(pool, [90], [FAULTY]) if r.kernel == "_sound_kernel"]
    assert [row.problems for row in rows] == [(), ()]
    assert rows[1].variant == f"{rows[0].variant} (2)"


SOUND = Row("k", "v", "sm_90", registers=128, shared_memory=1000, mma="HGMMA", matrix=True)


@pytest.mark.parametrize(
    "row, arch, problem",
    [
        (SOUND, 90, None),
        (replace(SOUND, mma="HMMA"), 80, None),
        (replace(SOUND, mma="UTCHMMA"), 100, None),
        (replace(SOUND, mma="", matrix=False), 90, None),
        (replace(SOUND, warnings=("ptxas warning : something",)), 90, None),
        (replace(SOUND, warnings=("(C7510) wgmma serialized",)), 90, "the assembler warns: (C7510) wgmma serialized"),
        (replace(SOUND, mma="HMMA"), 90, "no HGMMA or QGMMA, but HMMA"),
        (replace(SOUND, mma=""), 90, "no HGMMA or QGMMA, but no matrix instruction"),
        (replace(SOUND, mma=""), 120, "no matrix instruction"),
        (replace(SOUND, spills=8), 90, "8 bytes of registers spill"),
        (replace(SOUND, mma="HMMA", shared_memory=100 << 10), 89, "102400 bytes of shared memory, sm_89 has 101376"),
    ],
)
def test_problems_of_a_row(row, arch, problem):
    found = _problems(row, arch, set(filter(None, row.mma.split("+"))))
    assert found == ([] if problem is None else [problem])


def test_the_cause_is_the_innermost_error_without_the_pointer_into_the_source():
    try:
        try:
            raise KeyError("the reason")
        except KeyError as error:
            raise RuntimeError("at 3:4:\n    x = y\n        ^") from error
    except RuntimeError as error:
        assert _cause(error) == "KeyError: 'the reason'"
    said = "PTXAS error: codegen error\n`ptxas` stderr:\nptxas fatal   : no such thing\nRepro command: ptxas a.ptx"
    assert _cause(RuntimeError(said)) == "RuntimeError: ptxas fatal   : no such thing"


def test_the_command_writes_figures_and_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["kernels", "--arch", "sm_90,sm_80", "--only", "variance", "--json", str(tmp_path / "k.json")]) == 0
    captured = capsys.readouterr()
    data = json.loads((tmp_path / "k.json").read_text())
    assert {row["arch"] for row in data["kernels"]} == {"sm_80", "sm_90"} and data["versions"]["triton"]
    names = "kernel variant arch registers spills shared_memory mma matrix warnings problems".split()
    assert all(list(row) == names and row["registers"] > 0 and row["problems"] == [] for row in data["kernels"])
    assert captured.out.splitlines()[0].startswith("arch   kernel") and "_variance_kernel" in captured.out
    assert f"compiling: step {len(data['kernels'])} of {len(data['kernels'])}" in captured.err
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_the_command_fails_with_the_problems_last(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compile_report, "parse_modules", lambda names: [FAULTY])
    assert kernels("sm_90", [], "-", quiet=True) == 1
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["kernels"]) == 6
    lines = captured.err.splitlines()
    assert len(lines) >= 4 and all(line.startswith("sm_90 ") and "]: " in line for line in lines)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arch", "sm_75"], "--arch must be of sm_80, sm_89, sm_90, sm_100, sm_120, got 'sm_75'"),
        (["--arch", ""], "--arch must be of sm_80, sm_89, sm_90, sm_100, sm_120, got ''"),
        (["--only", "nothing"], "--only must be one of attention"),
        (["--json", "/no/such/folder/k.json"], "cannot write '/no/such/folder/k.json'"),
    ],
    ids=["architecture", "no architecture", "module", "json"],
)
def test_bad_arguments_are_one_sentence(capsys, arguments, message):
    assert main(["kernels", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {message}")


def test_architectures_by_name():
    assert compile_report.parse_architectures("sm_90, 80,sm_90a") == [90, 80]
    with pytest.raises(InputError, match="'sm_9O'"):
        compile_report.parse_architectures("sm_9O")
