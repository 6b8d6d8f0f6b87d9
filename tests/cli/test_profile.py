"""Ranges and `kvlock-fast profile`: on tiny models, on traces written by hand, and what is refused."""

import json
import os
import runpy
import shlex
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import kvlock_fast as kvf
from kvlock_fast import nvtx
from kvlock_fast.cli import main
from kvlock_fast.errors import InputWarning
from kvlock_fast.loop.ranges import groups, layer_ranges
from kvlock_fast.models.wan import WAN
from kvlock_fast.planning.find_model import find_model
from kvlock_fast.planning.known_models import CONFIGS, MODELS
from kvlock_fast.planning.machine import Machine
from kvlock_fast.profiling import subjects
from kvlock_fast.profiling.command import ProfilerSwitch, _without_notes, run_tools
from kvlock_fast.profiling.extent import SHORT, find_extent, flops
from kvlock_fast.profiling.timeline import read_trace, table
from tests.project.test_light_imports import loaded_by
from tests.support.tiny import tiny_transformer, tiny_wan

INSIDE = {"step 0", "step 1", "layer 0", "layer 1", "layer 2", "attention", "lock", "prologue", "epilogue"}
STAGES = {"encode", "text", "denoise", "source path", "decode"}


class Watched:
    """Stands for NVTX's domain: the ranges by name, in the order they began, and those that are open."""

    def __init__(self):
        self.begun, self.open, self.deepest = [], {}, ()

    def _stack(self):
        return self.open.setdefault(threading.get_ident(), [])

    def push_range(self, name):
        self.begun.append(name)
        self._stack().append(name)
        self.deepest = max(self.deepest, tuple(self._stack()), key=len)

    def pop_range(self):
        self._stack().pop()

    @property
    def balanced(self):
        return not any(self.open.values())


@pytest.fixture
def watched(monkeypatch):
    """Ranges on, and where they go."""
    domain = Watched()
    monkeypatch.setattr(nvtx, "_libraries", lambda: (torch.autograd.profiler, domain))
    monkeypatch.setattr(nvtx, "_attributes", lambda name: name)
    with nvtx.switched_on():
        yield domain


@pytest.fixture(scope="module")
def pipe():
    return kvf.KVLockPipeline.from_pipe(tiny_wan())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_wan().save_pretrained(folder)
    return folder


def edit(pipe, tier="lockstep", **more):
    video = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), np.uint8)
    mask = np.zeros((5, 32, 48), bool)
    mask[:, 8:24, 8:24] = True
    more = {"num_inference_steps": 2, "output": "latent", **more}
    return pipe(
        video, mask, source_prompt="a red circle", prompt="a blue circle", cache=kvf.CacheConfig(tier=tier),
        generator=torch.Generator().manual_seed(0), **more,
    ).latents  # fmt: skip


def profile(*arguments):
    return main(["profile", "--quiet", *map(str, arguments)])


def tiny_profile(model, folder, *more):
    extent = ("--frames", 5, "--size", "32x48", "--steps", 2)
    return profile("--model", model, *extent, "--output", folder, *more)


# ranges


def test_off_is_one_shared_object():
    assert not nvtx.enabled()
    assert nvtx.span("step", 3) is nvtx.span("lock") is nvtx.span("lock")
    with nvtx.switched_on():
        assert nvtx.span("lock") is not nvtx.span("lock")
    assert nvtx.span("lock") is nvtx.span("step", 4)


def test_off_puts_no_hooks_on_the_model(pipe):
    transformer = pipe.model.transformers[0]
    hooks = []

    def count(stage, done, total):
        hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in transformer.modules()))

    edit(pipe, progress=count)
    assert not any(hooks)
    with nvtx.switched_on():
        edit(pipe, progress=count)
    assert any(hooks)
    count("after it", 0, 0)
    assert hooks[-1] == 0


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False)])
def test_the_environment_switches_them_on(monkeypatch, value, on):
    monkeypatch.setenv("KVLOCK_FAST_NVTX", value)
    assert runpy.run_path(nvtx.__file__)["_on"] is on


def test_the_switch_is_light():
    assert loaded_by("from kvlock_fast.nvtx import span\nwith span('step', 1): pass", "torch", "nvtx") == set()


@pytest.mark.parametrize("tier", ["lockstep", "resident", "host"])
def test_ranges_change_no_bit(pipe, tier):
    plain = edit(pipe, tier)
    with nvtx.switched_on(), torch.profiler.profile():
        ranged = edit(pipe, tier)
    assert torch.equal(plain, ranged)


def test_an_edits_ranges(pipe, watched):
    edit(pipe, output="frames")
    assert watched.balanced
    assert set(watched.begun) == STAGES | INSIDE | {"forward all"}
    assert watched.begun.count("attention") == 2 * 3 and watched.begun.count("lock") == 2 * 3 * 2
    nested = ("denoise", "step 0", "forward all", "layer 0", "attention", "lock")
    assert watched.deepest == nested


def test_a_stored_sources_ranges(pipe, watched):
    lock = kvf.LockConfig.preset("kvlock", source_path="invert")
    edit(pipe, "host", lock=lock)
    assert watched.balanced
    assert set(watched.begun) - INSIDE - STAGES == {
        "source pass", "forward source", "forward edit", "capture", "transfers", "transfer wait"
    }  # fmt: skip
    assert watched.begun.count("transfers") == 4  # two steps, there and back


def test_ranges_are_balanced_when_a_block_fails(pipe, watched, monkeypatch):
    def fail(*_, **__):
        raise KeyError("on purpose")

    transformer = pipe.model.transformers[0]
    monkeypatch.setattr(transformer.blocks[1].ffn, "forward", fail)
    with pytest.raises(KeyError, match="on purpose"):
        edit(pipe)
    assert "layer 1" in watched.begun and "layer 2" not in watched.begun
    assert watched.balanced
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in transformer.modules())
    inputs = torch.zeros(1, 4, 1, 4, 4), torch.zeros(1), torch.zeros(1, 2, 16)
    with layer_ranges(transformer, WAN):
        with pytest.raises(KeyError), nvtx.span("forward edit"):
            transformer(*inputs)
        assert watched.balanced  # at once, not only when the hooks are taken off


def test_a_range_ends_with_its_body_and_the_switch(watched):
    with pytest.raises(ValueError, match="inside"), nvtx.span("step", 1), nvtx.span("lock"):
        nvtx.enable(False)
        raise ValueError("inside")
    assert watched.begun == ["step 1", "lock"] and watched.balanced


def test_compiled_code_has_no_ranges(watched):
    def f(x):
        with nvtx.span("lock"):
            return x + 1

    assert torch.compile(f, backend="eager", fullgraph=True)(torch.zeros(2)).sum() == 2
    assert watched.begun == []
    transformer = tiny_transformer()
    transformer.compile_repeated_blocks(backend="eager")
    kvf_pipe = tiny_wan()
    kvf_pipe.transformer = transformer
    edit(kvf.KVLockPipeline.from_pipe(kvf_pipe), lock=kvf.LockConfig.preset("cfg"))
    assert watched.balanced and "forward edit" in watched.begun and "attention" not in watched.begun


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, [(0, 0)]), (3, [(0, 0), (1, 1), (2, 2)]), (30, [(0, 6), (7, 14), (15, 21), (22, 29)]), (0, [])],
)
def test_groups_of_layers(layers, expected):
    assert groups(layers) == expected


# times from a trace


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": tid, "ts": ts * 1e6, "dur": dur * 1e6, "args": args}


HOST = [
    event("user_annotation", "profile", 100, 10),
    event("user_annotation", "step 0", 101, 4),
    event("user_annotation", "lock", 102, 1),
    event("user_annotation", "step 1", 106, 3),
    event("user_annotation", "Somebody's own", 106, 2),
]


def by_name(timeline):
    return {row.name: (row.calls, row.launches, round(row.seconds, 6), round(row.inside, 6)) for row in timeline.rows}


def test_times_on_the_cpu_are_exclusive():
    operators = [
        event("cpu_op", "aten::matmul", 102, 0.5),
        event("cpu_op", "aten::mm", 102.1, 0.2),
        event("cpu_op", "aten::add", 104, 0.5),
        event("cpu_op", "aten::mul", 106.5, 0.5),
        event("cpu_op", "aten::copy_", 103, 0.5, tid=2),
    ]
    beside = [event("user_annotation", "transfers", 102.5, 2, tid=2)]
    timeline = read_trace({"traceEvents": [*operators, *HOST[::-1], *beside, {"ph": "M"}]})
    assert not timeline.on_gpu and timeline.seconds == 10
    assert by_name(timeline) == {"step": (2, 2, 6, 7), "lock": (1, 1, 1, 1), "other": (1, 0, 3, 3)}
    assert [(row.name, row.launches, row.seconds) for row in timeline.beside] == [("transfers", 1, 2)]
    assert timeline.steps() == [4, 3]
    assert "transfers" in table(timeline)


def test_times_of_a_gpu_belong_to_where_kernels_were_launched():
    device = [
        event("cuda_runtime", "cudaLaunchKernel", 102.2, 0.1, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 104, 0.1, correlation=2),
        event("user_annotation", "transfers", 102.5, 2, tid=2),
        event("cuda_runtime", "cudaMemcpyAsync", 103, 0.1, tid=2, correlation=3),
        event("kernel", "blend", 103, 1, tid=7, correlation=1),
        event("kernel", "gemm", 104, 2, tid=7, correlation=2),
        event("gpu_memcpy", "Memcpy HtoD", 105.5, 1.5, tid=8, correlation=3),
        event("kernel", "nobody's", 108, 0.5, tid=7, correlation=9),
        event("gpu_user_annotation", "lock", 103, 1, tid=7),
    ]
    timeline = read_trace({"traceEvents": [*HOST, *device]})
    assert timeline.on_gpu
    assert by_name(timeline) == {
        "step": (2, 1, 2, 3),
        "lock": (1, 1, 1, 1),
        "transfers": (1, 0, 1, 1),  # half a second of the copy hides under the gemm
        "other": (1, 1, 0.5, 0.5),
        "idle": (1, 0, 5.5, 5.5),
    }
    assert sum(row.seconds for row in timeline.rows) == pytest.approx(timeline.seconds)
    assert timeline.steps() == [3, 0] and timeline.beside == []
    lines = table(timeline).splitlines()
    assert "kernels" in lines[0] and "host" in lines[0]
    assert lines[-1].split() == ["total", "3", "10.0", "s", "100.0", "%"]


def test_kernels_that_overlap_count_once():
    device = [event("cuda_runtime", "launch", 102, 0.1, correlation=c) for c in range(3)]
    device += [event("kernel", "k", 103 + c, 3, tid=7 + c, correlation=c) for c in range(3)]
    assert by_name(read_trace({"traceEvents": [*HOST, *device]}))["lock"] == (1, 3, 5, 5)


def test_a_trace_without_its_root_is_refused():
    with pytest.raises(ValueError, match="this one has 0"):
        read_trace({"traceEvents": HOST[1:]})


# the command


@pytest.fixture(scope="module")
def profiled(model, tmp_path_factory):
    """A profile of a tiny model with a stored source: its folder, its figures and the seconds around it."""
    folder = tmp_path_factory.mktemp("profile")
    start = time.perf_counter()
    assert tiny_profile(model, folder, "--cache-tier", "host", "--json", folder / "figures.json") == 0
    return folder, json.loads((folder / "profile.json").read_text()), time.perf_counter() - start


def test_the_files_of_a_profile(profiled):
    folder, data, _ = profiled
    names = {"profile.json", "profile.txt", "profile.png", "trace.json", "figures.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "figures.json").read_text()) == data
    text = (folder / "profile.txt").read_text()
    assert all(row["range"] in text for row in data["ranges"]) and data["commands"]["ncu"] in text
    picture = np.asarray(Image.open(folder / "profile.png").convert("RGB"))
    assert picture.shape[1] > 1000 and len({tuple(c) for c in picture[::9, ::9].reshape(-1, 3)}) > 20


def test_times_add_up_to_the_whole(profiled):
    _, data, around = profiled
    rows = data["ranges"]
    assert sum(row["seconds"] for row in rows) == pytest.approx(data["seconds"], rel=0.01)
    assert sum(row["share"] for row in rows) == pytest.approx(1, rel=0.01)
    assert sum(row["launches"] for row in rows) == data["launches"] > 500
    assert all(row["seconds"] > 0 and row["calls"] > 0 for row in rows)
    assert 0 < data["seconds"] < around
    steps = next(row for row in rows if row["range"] == "step")
    assert len(data["step_seconds"]) == 2 and sum(data["step_seconds"]) == pytest.approx(steps["seconds_with_inside"])


def test_the_ranges_of_a_profile(profiled):
    folder, data, _ = profiled
    names = {row["range"] for row in data["ranges"]}
    inside = {name for name in INSIDE if not name.startswith("step")} | {"step"}
    stored = {"source pass", "forward source", "forward edit", "capture", "transfer wait"}
    assert names == STAGES | inside | stored | {"composite", "write", "other"}
    assert [row["range"] for row in data["other_threads"]] == ["transfers"]
    traced = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert {r["name"] for r in data["timeline"]} <= {e["name"] for e in traced}
    assert {(r["main_thread"], r["name"]) for r in data["timeline"]} >= {(True, "step 1"), (False, "transfers")}


def test_what_was_run_is_said(profiled, model):
    _, data, _ = profiled
    expected = {
        "model": f"'{model}'", "weights": "its own", "layers": 3, "frames": 5, "size": [32, 48], "tokens": 12,
        "steps": 2, "preset": "kvlock", "cache_tier": "host", "cache_format": "fp8_e4m3", "device": "cpu",
        "dtype": "float32", "time_of": "main thread", "launches_of": "operators",
    }  # fmt: skip
    assert {name: data[name] for name in expected} == expected
    assert data["versions"]["torch"] == torch.__version__


def test_the_printed_commands_run_this_very_run(profiled, tmp_path, monkeypatch, watched):
    folder, data, _ = profiled
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for tool, words in data["commands"].items():
        words = shlex.split(words)
        assert words[0] == tool and {"--capture-range=cudaProfilerApi", "--profile-from-start=off"} & set(words)
        own = words[words.index("profile", 2) :]
        assert own[own.index("--frames") + 1] == "5" and own[own.index("--cache-tier") + 1] == "host"
        watched.begun.clear()
        assert main(own) == 0
        assert {"step 0", "step 1", "attention", "transfers"} <= set(watched.begun) and watched.balanced
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_json_on_stdout_is_alone_there(model, tmp_path, capfd):
    config = tmp_path / "config.json"
    config.write_text((model / "transformer" / "config.json").read_text())
    status = profile("--config", config, "--frames", 5, "--size", "32x48", "--steps", 2, "--layers", 2,
                     "--output", tmp_path / "p", "--json", "-")  # fmt: skip
    captured = capfd.readouterr()
    data = json.loads(captured.out)
    assert captured.err == ""
    assert status == 0 and data["weights"] == "random" and data["layers"] == 2
    names = {row["range"] for row in data["ranges"]}
    assert {"step", "layer 0", "layer 1", "attention", "lock", "epilogue"} <= names
    assert not names & {"encode", "decode", "layer 2"}


def test_the_bundled_model(tmp_path, capsys):
    assert profile("--config", "demo", "--steps", 1, "--layers", 1, "--frames", 5, "--output", tmp_path) == 0
    out = capsys.readouterr().out
    assert "demo, 1 layer of its own weights\n5 frames of 64x64, 128 tokens; 1 step, kvlock, lockstep\n" in out
    assert "attention" in out and "\nnsys profile" in out.replace("  nsys", "nsys") and "ncu --" in out


def test_a_folders_config_is_its_transformers(model):
    extent = find_extent(find_model(model), 5, (32, 48), None)
    config = subjects.transformer_config(str(model), extent.model)
    assert (config["ffn_dim"], config["text_dim"], extent.model.layers, extent.tokens) == (32, 16, 3, 12)


def test_random_weights_are_of_the_right_kind():
    config = subjects.transformer_config("wan-1.3b", MODELS["wan-1.3b"])
    small = {**config, "num_attention_heads": 1, "ffn_dim": 64}
    transformer = subjects.random_transformer(small, 2, torch.device("cpu"), torch.bfloat16)
    block = transformer.blocks[1]
    assert len(transformer.blocks) == 2 and block.attn1.to_q.weight.dtype == torch.bfloat16
    assert block.scale_shift_table.dtype == block.norm2.weight.dtype == torch.float32
    assert 0.019 < block.attn1.to_q.weight.float().std() < 0.021 and (block.attn1.norm_q.weight == 1).all()
    assert not any(p.is_meta for p in (*transformer.parameters(), *transformer.buffers()))


def test_a_model_with_text_in_self_attention(tmp_path, capsys):
    """CogVideoX's own width, one layer of it."""
    command = ["--config", "cogvideox-2b", "--layers", 1, "--frames", 9, "--size", "32x48", "--steps", 2]
    assert profile(*command, "--output", tmp_path) == 0
    out = capsys.readouterr().out
    assert "cogvideox-2b, 1 layer of random weights\n9 frames of 32x48, 18 tokens; 2 steps, kvlock, lockstep\n" in out
    transformer = subjects.random_transformer(
        {**CONFIGS["cogvideox-5b"], "num_attention_heads": 1}, 3, torch.device("cpu"), torch.float16
    )
    assert transformer.dtype == torch.float16 and len(transformer.transformer_blocks) == 3
    subjects.cut_depth(transformer, subjects.model_of(type(transformer).__name__).arch, 2)
    assert len(transformer.transformer_blocks) == transformer.config.num_layers == 2


BAD = {
    "neither": ([], "one of --config and --model must be given, not neither"),
    "both": (["--config", "demo", "--model", "demo"], "not both"),
    "unknown config": (["--config", "wan-2b"], "'wan-2b' is no config file"),
    "family": (["--config", "ltx"], "ltx is of the family ltx; profile by sizes alone runs wan, cogvideox"),
    "steps": (["--config", "demo", "--steps", "0"], "--steps must be a whole number from 1 to 10000, got 0"),
    "layers": (["--config", "demo", "--layers", "6"], "--layers must be a whole number from 1 to 5, got 6"),
    "frames": (["--config", "demo", "--frames", "0"], "--frames must be a whole number from 1 to 100000, got 0"),
    "frames beyond the model": (["--config", "demo", "--frames", "257"], "257 frames of 64x64 are too many for demo"),
    "size": (["--config", "demo", "--size", "64"], "--size must be HEIGHTxWIDTH in pixels, like 480x832, got '64'"),
    "preset": (["--config", "demo", "--preset", "nix"], "unknown preset 'nix'"),
    "no lock": (["--config", "demo", "--preset", "cfg"], "--preset cfg never locks"),
    "tier": (["--config", "demo", "--cache-tier", "auto"], "--cache-tier must be one of lockstep, resident"),
    "format": (["--config", "demo", "--cache-format", "fp4"], "--cache-format must be one of native"),
    "dtype": (["--config", "wan-1.3b", "--dtype", "fp4"], "dtype 'fp4' is not one of"),
    "device": (["--config", "demo", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    "model": (["--model", "no/such/model"], "no/such/model"),
    "output": (["--config", "demo", "--output", "/dev/null/p"], "/dev/null/p"),
    "json": (["--config", "demo", "--json", "/no/such/folder/f.json"], "/no/such/folder"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_sentence(tmp_path, capsys, arguments, message):
    folder = tmp_path / "p"
    assert profile("--output", folder, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err
    assert captured.out == "" and (not folder.exists() or not list(folder.iterdir()))


@pytest.fixture
def slow_cpu(monkeypatch):
    """10 GFLOP/s and 20 GB."""
    monkeypatch.setattr("kvlock_fast.profiling.extent._matrix_rate", lambda: 1e10)
    monkeypatch.setattr(Machine, "here", lambda *_: Machine(None, 20 * 10**9, 10**12))
    monkeypatch.setattr(subjects, "RandomSubject", lambda config, extent, *_: SimpleNamespace(extent=extent))


def test_what_takes_hours_is_refused_and_what_fits_is_named(slow_cpu, tmp_path, capsys):
    command = ["--config", "wan-1.3b", "--steps", 2, "--output", tmp_path / "p"]
    assert profile(*command) == 2
    message = capsys.readouterr().err
    assert "wan-1.3b with 30 layers, 81 frames of 480x832: 2 steps of it take about 47 hours on this CPU; --" in message
    assert message.rstrip().endswith("would fit, --force runs it all the same") and message.count("\n") == 1
    words = message.split("CPU; ")[1].split(" (about")[0].split()
    given = dict(zip(words[::2], words[1::2], strict=True))
    size = tuple(map(int, given.get("--size", "480x832").split("x")))
    frames, layers = int(given.get("--frames", 81)), int(given.get("--layers", 30))
    cpu = torch.device("cpu")
    small = subjects.Wanted(config="wan-1.3b", frames=frames, size=size, layers=layers)
    assert flops(subjects.make_subject(small, 2, cpu).extent, 3) * 2 / 1e10 <= SHORT
    forced = subjects.Wanted(config="wan-1.3b", force=True)
    assert subjects.make_subject(forced, 2, cpu).extent.tokens == 32760


def test_what_has_no_memory_is_refused(slow_cpu, tmp_path, capsys):
    assert profile("--config", "wan-14b", "--frames", 1, "--size", "64x64", "--output", tmp_path / "p") == 2
    message = capsys.readouterr().err
    assert "1 frame of 64x64: it needs 57.2 GB of memory; --layers 8 (about" in message


def test_sizes_that_do_not_fit_are_changed_and_said(tmp_path):
    with pytest.warns(InputWarning) as warned:
        extent = find_extent(MODELS["wan-1.3b"], 80, (100, 100), 2)
    assert (extent.frames, extent.height, extent.width, extent.model.layers) == (81, 96, 96, 2)
    said = [str(w.message) for w in warned]
    assert said[0].endswith("profiling 96x96") and said[1].startswith("80 frames are not 4n+1: profiling 81")


def test_only_the_profilers_notes_are_kept_from_stderr(capfd):
    with _without_notes():
        os.write(2, b"USDT: a note\n")
        os.write(2, b"WARNING: CUPTI\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "WARNING: CUPTI\nafter\n"


# other tools


def test_a_missing_tool_is_said_after_the_table(profiled, model, tmp_path, capsys, monkeypatch):
    folder, data, _ = profiled
    made = read_trace(json.loads((folder / "trace.json").read_text()))
    monkeypatch.setattr("kvlock_fast.profiling.command.profile", lambda *_: (made, data))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tiny_profile(model, folder, "--nsys", "--ncu") == 1
    captured = capsys.readouterr()
    assert captured.out.startswith((folder / "profile.txt").read_text())
    assert [line.split()[0] for line in captured.err.splitlines()] == ["nsys", "ncu"]
    assert tiny_profile(model, folder) == 0


def test_a_tool_is_run_with_the_printed_command(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, status in (("nsys", 0), ("ncu", 3)):
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\necho "$0" "$@"\nexit {status}\n')
        script.chmod(0o755)
    problems = run_tools(["nsys", "ncu"], {"nsys": "nsys profile 'a b'", "ncu": "ncu x"})
    assert problems == ["ncu ended with status 3"]
    captured = capfd.readouterr()
    assert captured.out == "" and f"{tmp_path}/nsys profile a b\n{tmp_path}/ncu x" in captured.err


def test_only_the_denoising_lies_between_start_and_stop(monkeypatch):
    calls = []
    cudart = SimpleNamespace(cudaProfilerStart=lambda: calls.append("start") or 0,
                             cudaProfilerStop=lambda: calls.append("stop") or 0)  # fmt: skip
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    switch = ProfilerSwitch(torch.device("cuda"), lambda stage, done, total: calls.append((stage, done)))
    for stage, done in (("encode", 0), ("denoise", 0), ("denoise", 1), ("decode", 0), ("decode", 1)):
        switch(stage, done, 2)
    switch.close()
    assert calls == [
        ("encode", 0), "wait", "start", ("denoise", 0), ("denoise", 1), "wait", "stop", ("decode", 0), ("decode", 1)
    ]  # fmt: skip
    switch("denoise", 0, 2)
    switch.close()  # as after an error
    assert calls[-2:] == ["wait", "stop"]
