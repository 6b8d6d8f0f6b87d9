"""`kvlock-fast invert` and `edit --cache`, in process, on a tiny model saved to disk."""

import json
import shutil

import pytest
import torch

import kvlock_fast as kvf
from kvlock_fast.cli import main
from tests.cli.test_cli import clip, edit, model  # noqa: F401  (fixtures)
from tests.pipeline.test_pipeline import a_mask, a_video
from tests.support.tiny import tiny_wan


def invert(clip, model, output, *more):  # noqa: F811
    return main([
        "invert", "--source", str(clip / "source.mkv"), "--mask", str(clip / "mask.mkv"), "--source-prompt",
        "a red circle", "--model", str(model), "--output", str(output), "--steps", "2", "--size", "32x48",
        *map(str, more),
    ])  # fmt: skip


def cached(clip, model, output, cache, *more):  # noqa: F811
    """An edit that takes everything it can from the cache."""
    return main([
        "edit", "--source", str(clip / "source.mkv"), "--mask", str(clip / "mask.mkv"), "--model", str(model),
        "--prompt", "a blue circle", "--output", str(output), "--cache", str(cache), *map(str, more),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def cache(clip, model, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("cache")
    (folder / "notes.txt").write_text("mine")
    figures = folder / "figures.json"
    assert invert(clip, model, folder, "--seed", 3, "--format", "native", "--json", figures, "--quiet") == 0
    made = json.loads(figures.read_text())
    assert made["steps_stored"] == 2 and made["format"] == "native" and made["seed"] == 3 and made["bytes"] > 4096
    assert (folder / "notes.txt").read_text() == "mine"
    return folder


def figures_of(path):
    return json.loads(path.read_text())


def test_an_edit_takes_over_how_the_cache_was_made(clip, model, cache, tmp_path, capsys):  # noqa: F811
    assert cached(clip, model, tmp_path / "o.mkv", cache, "--json", tmp_path / "f.json") == 0, capsys.readouterr().err
    found = figures_of(tmp_path / "f.json")
    settings = found["settings"]
    assert settings["seed"] == 3 and settings["steps"] == 2 and settings["size"] == [32, 48]
    assert settings["source_prompt"] == "a red circle" and settings["cache_path"] == str(cache)
    assert found["forwards"] == 2 * 2
    edit(clip, model, tmp_path / "p.mkv", "--seed", 3, "--size", "32x48", "--trace", tmp_path / "t.json")
    along = figures_of(tmp_path / "t.json")
    assert along["forwards"] == 2 * 3
    assert found["metrics"][0]["background_psnr"] == pytest.approx(along["metrics"][0]["background_psnr"], abs=0.01)


@pytest.mark.parametrize("tier", ["resident", "host", "disk"])
def test_any_tier_reads_it(clip, model, cache, tmp_path, capsys, tier):  # noqa: F811
    assert cached(clip, model, tmp_path / "o.mkv", cache, "--cache-tier", tier) == 0, capsys.readouterr().err


REFUSED = {
    "seed": (["--seed", 4], "--seed is 4, but the cache"),
    "steps": (["--steps", 3], "--steps is 3, but the cache"),
    "prompt": (["--source-prompt", "a dog"], "--source-prompt is 'a dog', but the cache"),
    "frames": (["--max-frames", 2], "another length or working size ([9, 32, 48], not [5, 32, 48])"),
    "size": (["--size", "48x48"], "another length or working size ([9, 32, 48], not [9, 48, 48])"),
    "tier": (["--cache-tier", "lockstep"], "tier must not be lockstep"),
    "no tier": (["--cache-tier", "floppy"], "tier must be one of auto, lockstep, resident, host, disk, got 'floppy'"),
    "format": (["--cache-format", "int2"], "format must be one of native, bf16, fp8_e4m3, int8, int4, got 'int2'"),
    "stride": (["--cache-stride", 0], "step_stride must be a whole number of at least 1, got 0"),
    "quota": (["--cache-quota", "many"], "--cache-quota must be an amount of memory"),
    "its own format": (["--cache-format", "int4"], "format must not be given for the cache"),
    "its own steps": (["--cache-steps", "dynamic"], "steps must not be given for the cache"),
    "inverted": (["--source-path", "invert"], "another way to the source's latents"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_an_edit_that_the_cache_is_not_for_is_refused(clip, model, cache, tmp_path, capsys, case):  # noqa: F811
    arguments, words = REFUSED[case]
    (tmp_path / "o.mkv").write_text("earlier")
    assert cached(clip, model, tmp_path / "o.mkv", cache, *arguments) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "o.mkv").read_text() == "earlier"


def test_a_damaged_cache_that_is_named_is_refused(clip, model, cache, tmp_path, capsys):  # noqa: F811
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    (shard,) = folder.rglob("step-00001.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert cached(clip, model, tmp_path / "o.mkv", folder) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert str(shard) in last and "damaged" in last and not (tmp_path / "o.mkv").exists()
    assert main(["cache", "verify", str(folder)]) == 1
    assert "step-00001.safetensors" in "".join(capsys.readouterr())
    assert cached(clip, model, tmp_path / "o.mkv", tmp_path) == 2
    assert "no cache in" in capsys.readouterr().err.splitlines()[-1]


def test_another_inversion_replaces_it(clip, model, tmp_path, capsys):  # noqa: F811
    assert invert(clip, model, tmp_path / "c") == 0
    assert "fp8_e4m3" in capsys.readouterr().out
    assert invert(clip, model, tmp_path / "c", "--format", "int4", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["format"] == "int4"
    assert len(list((tmp_path / "c").rglob("*.safetensors"))) == 3
    assert cached(clip, model, tmp_path / "o.mkv", tmp_path / "c", "--quiet") == 0


def test_an_inverted_source(clip, model, tmp_path, capsys):  # noqa: F811
    inverted = ["--source-path", "invert"]
    assert invert(clip, model, tmp_path / "c", *inverted) == 0
    found = tmp_path / "f.json"
    assert cached(clip, model, tmp_path / "o.mkv", tmp_path / "c", *inverted, "--json", found) == 0
    assert figures_of(found)["forwards"] == 4
    assert cached(clip, model, tmp_path / "o.mkv", tmp_path / "c") == 2
    assert "another way to the source's latents" in capsys.readouterr().err.splitlines()[-1]


def test_an_automatic_cache_is_found_again(clip, model, tmp_path):  # noqa: F811
    more = ["--cache-tier", "disk", "--cache-root", tmp_path / "root", "--cache-quota", "1GB", "--json"]
    rows = []
    for name in ("a.json", "b.json"):
        assert edit(clip, model, tmp_path / "o.mkv", "--size", "32x48", *more, tmp_path / name) == 0
        rows.append(figures_of(tmp_path / name)["forwards"])
    assert rows == [2 * 3, 2 * 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--alpha", 0], "never locks"),
        (["--steps", 0], "num_inference_steps"),
        (["--format", "zip"], "format must be one of"),
        (["--layers", "7"], "layer 7"),
        (["--mask", "box:0,0,900,900"], "mask"),
    ],
)
def test_what_invert_refuses(clip, model, tmp_path, capsys, arguments, words):  # noqa: F811
    assert invert(clip, model, tmp_path / "c", *arguments) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "c").exists()


def test_nothing_is_written_over_a_cache_or_a_model(clip, model, cache, tmp_path, capsys):  # noqa: F811
    manifest = (cache / "manifest.json").read_bytes()
    assert cached(clip, model, tmp_path / "o.mkv", cache, "--trace", cache / "manifest.json") == 2
    assert "lies in the folder of the cache" in capsys.readouterr().err.splitlines()[-1]
    assert (cache / "manifest.json").read_bytes() == manifest
    assert invert(clip, model, tmp_path / "c", "--json", tmp_path / "c" / "manifest.json") == 2
    assert "is the manifest of --output" in capsys.readouterr().err.splitlines()[-1]
    assert invert(clip, model, model / "c") == 2
    assert "lies in the model's folder" in capsys.readouterr().err.splitlines()[-1]


def test_a_cache_has_what_any_lock_asks_for(clip, model, cache, tmp_path):  # noqa: F811
    found = tmp_path / "f.json"
    assert cached(clip, model, tmp_path / "o.mkv", cache, "--tau", "auto", "--json", found) == 0
    assert figures_of(found)["forwards"] == 2 * 2


def test_a_cache_that_lacks_steps_says_so(clip, model, tmp_path, capsys):  # noqa: F811
    assert invert(clip, model, tmp_path / "c", "--kappa", 1, "--cache-steps", "dynamic") == 0
    assert cached(clip, model, tmp_path / "o.mkv", tmp_path / "c", "--kappa", 1) == 0
    assert "lacks 1 of 2 steps: the source is run along" in capsys.readouterr().err
    assert invert(clip, model, tmp_path / "d", "--kappa", 0, "--warmup-alpha", 0) == 2
    assert "no step of this lock" in capsys.readouterr().err.splitlines()[-1]


def test_without_a_cache_the_source_prompt_is_needed(clip, model, tmp_path, capsys):  # noqa: F811
    arguments = ["--source", str(clip / "source.mkv"), "--mask", str(clip / "mask.mkv"), "--prompt", "a"]
    assert main(["edit", *arguments, "--output", str(tmp_path / "o.mkv"), "--model", str(model)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: missing option '--source-prompt'"


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("what", ["norm_k", "to_v"])
def test_a_source_that_is_not_finite_is_not_published(tmp_path, what, value):
    """Keys or values of one layer: `verify` would find every byte as it was written."""
    broken = tiny_wan()
    with torch.no_grad():
        getattr(broken.transformer.blocks[1].attn1, what).weight.view(-1)[0] = value
    pipe = kvf.KVLockPipeline.from_pipe(broken)
    with pytest.raises(kvf.InputError, match="the source's prediction became NaN or inf at step 1 of 2"):
        pipe.invert(a_video(), a_mask(), tmp_path / "cache", source_prompt="a", num_inference_steps=2)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(kvf.InputError, match="became NaN or inf"):
        pipe(a_video(), a_mask(), source_prompt="a", prompt="b", num_inference_steps=2,
             cache=kvf.CacheConfig(tier="resident"))  # fmt: skip
