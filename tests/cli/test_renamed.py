"""Words of version 0.1 that are others now: each is refused with the new one, and `migrate` rewrites manifests."""

import csv
import io
import json
import sqlite3
import tomllib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import kvlock_fast as kvf
from kvlock_fast.batch.jobs import Job, Setup
from kvlock_fast.batch.ledger import Ledger
from kvlock_fast.batch.manifest import read_manifest
from kvlock_fast.batch.migrate import migrate_spec, migrate_text
from kvlock_fast.cli import main
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.renamed import FIELDS, OPTIONS, REPLACED
from kvlock_fast.settings import Finish
from tests.pipeline.test_pipeline import a_mask, a_video
from tests.support.tiny import tiny_wan

JOB = {"id": "a", "source": "a.mp4", "mask": "box:0,0,8,8", "source_prompt": "a", "prompt": "b"}
OLD = {**JOB, "clip_window": 17, "window": 6, "cache_steps": "window", "clip_overlap": 4}
NEW = {**JOB, "clip_frames": 17, "variance_window": 6, "cache_steps": "dynamic", "clip_overlap": 4}


@pytest.mark.parametrize(("old", "new"), OPTIONS.items())
def test_old_options_are_refused_with_the_new_one(capsys, old, new):
    assert main(["edit", old, "9"]) == 2
    assert capsys.readouterr().err == f"error: {old} is called {new} now\n"


@pytest.mark.parametrize("old", REPLACED)
def test_parameters_of_another_form_are_refused(tmp_path, capsys, old):
    """An old name is refused in Python and in a manifest, which nobody rewrites."""
    new = REPLACED[old]
    with pytest.raises(TypeError, match=f"{old} is called {new} now"):
        LockConfig(**{old: 2})
    with pytest.raises(ValueError, match=f"lock parameter '{old}' is called '{new}' now"):
        LockConfig.preset("paper", **{old: 2})
    path = manifest(tmp_path / "m.jsonl", {**JOB, old: 2})
    assert (1, old, f"is called {new!r} now, and takes another value") in read_manifest(path, tmp_path, {}).problems
    assert main(["migrate", str(path)]) == 2
    assert f"line 1: {old} is called {new} now, and takes another value: change it by hand" in capsys.readouterr().err


def test_a_ledgers_values_take_their_new_form():
    job = Job("a", "b", "a.mp4", Setup("s", "m", "p", steps=20, lock=LockConfig(skip_share=0.1, zero_init_share=0.05)))
    data = json.loads(job.spec())
    new, old = data["lock"], {"skip_share": ("skip_steps", 2), "zero_init_share": ("zero_init_steps", 1),
                              "free_share": ("free_steps", 0)}  # fmt: skip
    data["lock"] = dict(old.get(name, (name, value)) for name, value in new.items())
    assert "skip_share" not in data["lock"] and migrate_spec(json.dumps(data)) == job.spec()


@pytest.mark.parametrize(
    "command",
    ["plan --model demo", "edit --source a --mask b --prompt c --output o.mp4"],
    ids=["plan", "edit"],
)
def test_an_old_value_of_cache_steps(capsys, command):
    assert main([*command.split(), "--cache-steps", "window"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "window" in last and "dynamic" in last and "now" in last


def test_old_arguments_in_python():
    with pytest.raises(TypeError, match="window is called variance_window now"):
        LockConfig(window=3)
    with pytest.raises(ValueError, match="lock parameter 'window' is called 'variance_window' now"):
        LockConfig.preset("paper", window=3)
    with pytest.raises(TypeError, match="lock_share is called lock_interval now"):
        LockConfig(lock_share=0.5)
    with pytest.raises(ValueError, match="lock parameter 'lock_share' is called 'lock_interval' now"):
        LockConfig.preset("proedit", lock_share=0.5)
    with pytest.raises(TypeError, match="window is called variance_window now"):
        kvf.ops.Schedule(window=3)
    with pytest.raises(ValueError, match="steps 'window' is called 'dynamic' now"):
        CacheConfig(steps="window")
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan())
    for old, new in (("window", "clip_frames"), ("overlap", "clip_overlap")):
        with pytest.raises(TypeError, match=f"{old} is called {new} now"):
            pipe(a_video(), a_mask(), source_prompt="a", prompt="b", **{old: 5})


def manifest(path, values):
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, values)
            writer.writeheader()
            writer.writerow(values)
    else:
        path.write_text(json.dumps(values) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_an_old_manifest_is_refused_field_by_field(tmp_path, suffix):
    reading = read_manifest(manifest(tmp_path / f"m{suffix}", OLD), tmp_path, {})
    said = {name: sentence for _, name, sentence in reading.problems}
    assert set(said) == {"clip_window", "window", "cache_steps"}
    assert said["window"] == "is called 'variance_window' now: kvlock-fast migrate rewrites a manifest"
    assert said["cache_steps"].startswith("'window' is called 'dynamic' now")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_migrate_makes_the_same_jobs(tmp_path, capsys, suffix):
    path = manifest(tmp_path / f"m{suffix}", OLD)
    before = path.read_bytes()
    assert main(["migrate", str(path)]) == 0
    assert "rewritten; the old one is m" in capsys.readouterr().out
    assert (tmp_path / f"m{suffix}.0.1").read_bytes() == before
    jobs = read_manifest(path, tmp_path, {}).jobs
    assert jobs == read_manifest(manifest(tmp_path / f"n{suffix}", NEW), tmp_path, {}).jobs and len(jobs) == 1
    assert main(["migrate", str(path)]) == 0
    assert "nothing to rename" in capsys.readouterr().out


def test_nothing_is_overwritten(tmp_path, capsys):
    path = manifest(tmp_path / "m.jsonl", OLD)
    (tmp_path / "m.jsonl.0.1").write_text("mine")
    other = tmp_path / "other.jsonl"
    other.write_text("mine too")
    for more in ([], ["--output", str(other)]):
        assert main(["migrate", str(path), *more]) == 2
        assert "is there already: nothing is overwritten" in capsys.readouterr().err
    assert other.read_text() == "mine too" and json.loads(path.read_text()) == OLD
    assert main(["migrate", str(path), "--output", str(tmp_path / "new.jsonl")]) == 0
    assert json.loads((tmp_path / "new.jsonl").read_text()) == NEW and json.loads(path.read_text()) == OLD


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("m.jsonl", '{"window": 3, "variance_window": 4}\n', "line 1: window and variance_window are both given"),
        ("m.jsonl", '{"id": "a"}\n[1]\n', "line 2: it holds a list, not an object"),
        ("m.jsonl", "{", "line 1: "),
        ("m.jsonl", '{"window": 3, "window": 4}', "line 1: the field 'window' is there twice"),
        ("m.jsonl", '{"tau": NaN}', "line 1: NaN is no number of JSON"),
        ("m.jsonl", "[" * 100_000, "line 1: "),
        ("m.csv", "id,window,window\n1,2,3\n", "line 1: a column is there twice"),
        ("m.csv", 'id,window\n1,"2\n', "line 2: unexpected end of data"),
        ("m.csv", "id,window\n" + "x" * 200_000 + ",2\n", "line 2: field larger than field limit"),
        ("d.yaml", "window: 3\nvariance_window: 4\n", "window and variance_window are both given"),
        ("d.yaml", "{window: 3}\n", "has window in a form that is not rewritten here"),
        ("d.toml", "a = 1\na = 2\n", "cannot be read: "),
        ("d.yaml", "- window\n", "holds a list, not fields of a job"),
        ("m.txt", "", "is no manifest: its name must end in .jsonl"),
        ("missing.jsonl", None, "cannot be read"),
    ],
)
def test_what_cannot_be_migrated_is_named(tmp_path, capsys, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["migrate", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


def test_files_of_defaults():
    text = "# ours\nwindow: 6\ncache_steps: 'window'\nsteps: 30\n"
    fresh, changed = migrate_text(text, ".yaml", "d.yaml")
    assert changed == 2 and fresh.startswith("# ours\n")
    assert yaml.safe_load(fresh) == {"variance_window": 6, "cache_steps": "dynamic", "steps": 30}
    fresh, changed = migrate_text('clip_window = 17\ncache_steps = "window" # all\n', ".toml", "d.toml")
    assert changed == 2 and tomllib.loads(fresh) == {"clip_frames": 17, "cache_steps": "dynamic"}


@pytest.mark.parametrize("name", ["m.jsonl", "m.ndjson", "m.csv", "d.yaml"])
def test_a_mark_of_the_byte_order_and_ends_of_lines_stay(tmp_path, name):
    text = {"d.yaml": "window: 6\r\nsteps: 3", "m.csv": 'window,id\r\n6,"a ""b"""\r\n7,c'}.get(
        name, '{"window": 6, "id": "\\ud800"}\r\n{"id": "b"}'
    )
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert main(["migrate", str(tmp_path / name)]) == 0
    fresh = (tmp_path / name).read_bytes()
    assert fresh == b"\xef\xbb\xbf" + text.replace("window", "variance_window").encode()


def test_longer_texts_are_not_touched():
    text = 'negative_prompt = """\nwindow = 3\n"""\nclip_window = 5\n'
    with pytest.raises(kvf.InputError, match="in a form that is not rewritten here"):
        migrate_text(text, ".toml", "d.toml")


def test_a_copy_is_written_even_where_nothing_changes(tmp_path, capsys):
    path = manifest(tmp_path / "m.jsonl", NEW)
    assert main(["migrate", str(path), "--output", str(tmp_path / "n.jsonl")]) == 0
    assert "copied to" in capsys.readouterr().out and (tmp_path / "n.jsonl").read_bytes() == path.read_bytes()


def test_a_damaged_ledger_of_0_1_is_named(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.take([Job("a", "b", "a.mp4", Setup("s", "m", "p"))], lambda output: 5)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        db.execute("UPDATE jobs SET spec = '[1]'")
        db.execute("PRAGMA user_version = 1")
    for _ in range(2):  # nothing is left held
        with pytest.raises(kvf.InputError, match=r"ledger.sqlite' is damaged: job 'a'"):
            Ledger(tmp_path)


VALUES = st.one_of(st.integers(), st.booleans(), st.text(), st.lists(st.integers(), max_size=3))


@given(st.lists(st.dictionaries(st.sampled_from([*FIELDS, "id", "steps", "cache_steps"]), VALUES), max_size=5))
def test_every_line_keeps_all_but_names(lines):
    text = "\n".join(json.dumps(line) for line in lines)
    fresh, _ = migrate_text(text, ".jsonl", "m.jsonl")
    for old, new in zip(lines, fresh.split("\n"), strict=False):
        wanted = {FIELDS.get(name, name): value for name, value in old.items()}
        if wanted.get("cache_steps") == "window":
            wanted["cache_steps"] = "dynamic"
        assert json.loads(new) == wanted


@given(st.lists(st.lists(st.text(alphabet='ab,"\n; é', max_size=5), min_size=3, max_size=3), max_size=4))
def test_every_cell_of_a_table_is_kept(rows):
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["id", "window", "cache_steps"], *rows, ["x", "3", "window"]])
    fresh, _ = migrate_text(out.getvalue(), ".csv", "m.csv")
    found = list(csv.reader(io.StringIO(fresh, newline="")))
    assert found == [["id", "variance_window", "cache_steps"], *rows, ["x", "3", "dynamic"]]


def old_spec(job: Job) -> str:
    """As version 0.1 had it in its ledger."""
    data = json.loads(job.spec())
    names = {new: old for old, new in FIELDS.items()}
    for part in (data, data["lock"]):
        renamed = {names.get(name, name): value for name, value in part.items()}
        part.clear()
        part.update(renamed)
    data["cache"]["steps"] = {"dynamic": "window"}.get(data["cache"]["steps"], data["cache"]["steps"])
    return json.dumps(data)


def test_a_raw_result_of_an_older_ledger_stays_done_and_a_composite_is_made_again(tmp_path):
    ways = [Finish(composite=False), Finish(feather=2), Finish()]
    jobs = [Job(str(i), "b", f"{i}.mp4", Setup("s", "m", "p"), way) for i, way in enumerate(ways)]
    with Ledger(tmp_path) as ledger:
        ledger.take(jobs, lambda output: 5)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        for job, feather in zip(jobs, (None, 2, 8), strict=True):
            data = {**json.loads(job.spec()), "feather": feather}
            del data["paste"]
            db.execute("UPDATE jobs SET spec = ?, state = 'done', bytes = 5 WHERE id = ?", (json.dumps(data), job.id))
        db.execute("PRAGMA user_version = 2")
    with Ledger(tmp_path) as ledger:
        assert [Job.from_spec(row["spec"]).finish for row in ledger.rows()] == ways
        changes = ledger.take(jobs, lambda output: 5)
        assert (changes.new, changes.changed, changes.gone) == (0, 2, 0)
        assert [row["state"] for row in ledger.rows()] == ["done", "pending", "pending"]


def test_a_ledger_of_0_1_is_read_and_what_is_done_stays_done(tmp_path):
    setup = Setup("s", "m", "p", cache=CacheConfig(steps="dynamic"), clip_frames=9, lock=LockConfig(variance_window=4))
    jobs = [Job(str(i), "b", f"{i}.mp4", setup) for i in range(3)]
    assert "variance_window" not in old_spec(jobs[0]) and migrate_spec(old_spec(jobs[0])) == jobs[0].spec()
    with Ledger(tmp_path) as ledger:
        ledger.take(jobs, lambda output: 5)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        for job in jobs:
            db.execute("UPDATE jobs SET spec = ?, state = 'done', bytes = 5 WHERE id = ?", (old_spec(job), job.id))
        db.execute("PRAGMA user_version = 1")
    with Ledger(tmp_path) as ledger:
        changes = ledger.take(jobs, lambda output: 5)
        assert (changes.new, changes.changed, changes.gone) == (0, 0, 0)
        assert ledger.counts([job.id for job in jobs])["done"] == 3
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == 3
