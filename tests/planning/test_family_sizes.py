"""Planning for any family: sizes by its modules, the same from configs alone, and never too small."""

import json
from dataclasses import replace
from math import prod

import diffusers
import pytest
import torch

from kvlock_fast.cli import main
from kvlock_fast.config import CacheConfig
from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.masks import Geometry
from kvlock_fast.models import wrap_pipeline
from kvlock_fast.models.registry import family_of_transformer
from kvlock_fast.planning import plan_edit
from kvlock_fast.planning.find_model import find_model, from_config, from_pipeline
from kvlock_fast.planning.job import Job
from kvlock_fast.planning.machine import Machine
from kvlock_fast.planning.model_size import PEAKS
from tests.families.cases.flux import tiny_flux
from tests.support.conformance import all_cases, case_modules
from tests.support.tiny import tiny_wan

CASES = {case.name: case for case in all_cases()}
FIRST = {module.CASES[0].name for module in case_modules()}
NAMES = [name if name in FIRST else pytest.param(name, marks=pytest.mark.large) for name in CASES]


def test_numbers_of_frames_in_words(capsys, tmp_path):
    patch = (1, 2, 2)
    assert Geometry(4, 8, patch).frame_words == "4n+1" and Geometry(4, 8, patch, causal=False).frame_words == "4n"
    assert Geometry(4, 8, patch, least_frames=5).frame_words == "4n+1 of at least 5"
    CASES["allegro"].make().save_pretrained(tmp_path)
    assert main(["plan", "--config", str(tmp_path), "--frames", "9", "--size", "32x48"]) == 0
    assert "warning: 9 frames are not 4n: planning for 12" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_pipeline_and_its_folder_say_the_same(name, tmp_path):
    case = CASES[name]
    pipe = case.make()
    model, size = wrap_pipeline(pipe), from_pipeline(pipe)
    attentions = model.arch.attentions(model.transformers[0])
    assert size.layers == len(attentions) and size.parameters == sum(p.numel() for p in pipe.transformer.parameters())
    assert prod(size.geometry.token_grid(*case.size)) == prod(model.geometry.token_grid(*case.size))
    # What is kept of a layer is as wide as the planner says.
    assert {getattr(a, "to_v", None) and a.to_v.out_features for _, a in attentions} <= {size.dim, None}
    if size.family not in PEAKS:
        assert size.feed_forward >= size.dim and size.text_tokens >= 256
    assert (size.frames == 1) == size.geometry.one_frame
    pipe.save_pretrained(tmp_path)
    read = from_config(tmp_path)
    # Files hold buffers beside the parameters, and shared embeddings once or twice.
    left_out = {"name": "", "dtype": torch.float32, "text_encoder_parameters": 0, "vae_parameters": 0}
    assert replace(read, **left_out) == replace(size, **left_out)
    assert read.vae_parameters >= size.vae_parameters > 0


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    tiny_flux().save_pretrained(folder)
    return folder


def test_plans_for_images(flux, capsys):
    arguments = ["plan", "--model", str(flux), "--size", "32x48", "--steps", "4", "--json", "-"]
    assert main(arguments) == 0
    made = json.loads(capsys.readouterr().out)
    text = json.dumps(made)
    assert '"lockstep"' in text and '"resident"' in text
    assert main([*arguments, "--frames", "5"]) == 2
    assert "the model makes images" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_scale_that_is_told_needs_no_second_branch(flux):
    assert not find_model(str(flux)).two_branches
    assert not from_pipeline(tiny_flux(False)).two_branches, "only where a negative prompt is given"
    assert from_pipeline(tiny_wan()).two_branches


@pytest.mark.parametrize("make", [tiny_wan, CASES["cogvideox-5b"].make, CASES["ltx"].make, CASES["hunyuan-video"].make])
def test_the_configs_that_are_fetched_from_the_hub_are_enough(make, tmp_path):
    make().save_pretrained(tmp_path / "whole")
    for pattern in ("model_index.json", "transformer*/config.json", "vae/config.json"):
        for path in (tmp_path / "whole").glob(pattern):
            copy = tmp_path / "fetched" / path.relative_to(tmp_path / "whole")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text())
    assert from_config(tmp_path / "fetched").geometry == from_config(tmp_path / "whole").geometry


BAD = {
    "no family": (lambda folder: index(folder, _class_name="OtherPipeline"), "is a OtherPipeline, of no known family"),
    "no vae": (lambda folder: (folder / "vae/config.json").unlink(), "makes no sense"),
    "no transformer": (lambda folder: index(folder, transformer=[None, None]), "has no transformer"),
    "heads": (lambda folder: config(folder / "transformer", num_attention_heads="two"), "makes no sense"),
}  # fmt: skip


def index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_cannot_be_used_is_named(name, tmp_path):
    spoil, message = BAD[name]
    tiny_flux().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        from_config(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def edit(pipe, **changes):
    case = CASES["flux-dev"]
    return case.edit(pipe, steps=3, **changes)


def test_edits_of_images_are_planned_for(monkeypatch):
    planned = []
    plain = plan_edit.plan
    monkeypatch.setattr(plan_edit, "plan", lambda *args: planned.append(plain(*args)) or planned[-1])
    edit(tiny_flux())
    assert planned[0].choice.tier == "lockstep" and planned[0].job.model.family == "flux" and not planned[0].job.guided
    monkeypatch.setattr(Machine, "here", lambda *_: Machine(None, 1000, 1000))
    with pytest.raises(InputError, match="there is too little memory"):
        edit(tiny_flux())


def test_layers_of_several_sizes_run_the_source_along():
    """FLUX's own forward does not read how many heads there are."""
    pipe = tiny_flux()
    along = edit(pipe).latents
    pipe.transformer.transformer_blocks[0].attn.heads = 1
    with pytest.warns(InputWarning, match="of different sizes.*the source is run along instead"):
        out = edit(pipe, cache=CacheConfig(tier="resident"))
    assert out.trace.cache == {"tier": "lockstep"} and torch.equal(out.latents, along)


FULL = {
    "FluxTransformer2DModel": dict(num_layers=1, num_single_layers=1, guidance_embeds=True),
    "SD3Transformer2DModel": dict(num_layers=2, num_attention_heads=24, caption_projection_dim=1536),
    "QwenImageTransformer2DModel": dict(num_layers=2),
    "Flux2Transformer2DModel": dict(num_layers=1, num_single_layers=1),
}  # fmt: skip


def forward_arguments(kind, tokens, text, model, dtype):
    """Empty inputs of one sample: an image of 1024 x 1024 pixels."""
    channels, side = model.config.in_channels, int(tokens**0.5)
    words = torch.empty(1, text, model.config.joint_attention_dim, dtype=dtype)
    given = dict(timestep=torch.ones(1), encoder_hidden_states=words, return_dict=False)
    if kind == "SD3Transformer2DModel":
        latents = torch.empty(1, channels, 2 * side, 2 * side, dtype=dtype)
        return given | dict(hidden_states=latents, pooled_projections=torch.empty(1, 2048, dtype=dtype))
    given["hidden_states"] = torch.empty(1, tokens, channels, dtype=dtype)
    if kind == "QwenImageTransformer2DModel":
        return given | dict(img_shapes=[[(1, side, side)]])
    axes = 4 if kind == "Flux2Transformer2DModel" else 3
    given |= dict(txt_ids=torch.zeros(text, axes), img_ids=torch.zeros(tokens, axes), guidance=torch.ones(1))
    return given | (dict(pooled_projections=torch.empty(1, 768, dtype=dtype)) if axes == 3 else {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", FULL)
def test_activations_are_never_planned_too_small(kind, dtype):
    """Traced with fake tensors at full width; planned for at most three times of it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    tools = pytest.importorskip("torch.distributed._tools.mem_tracker")
    before, tokens, text = torch.get_default_dtype(), 4096, 512
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        torch.set_default_dtype(dtype)
        try:
            model = getattr(diffusers, kind)(**FULL[kind]).eval()
        finally:
            torch.set_default_dtype(before)
        given = forward_arguments(kind, tokens, text, model, dtype)
        tracker = tools.MemTracker()
        tracker.track_external(model)
        with tracker:
            model(**given)
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    used = peak["Total"] - sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    planned = (tokens + text) * size_like(kind, model).activation_bytes(dtype)
    assert used <= planned <= 3 * used


def size_like(kind, transformer):
    """The size that a pipeline with this transformer has."""
    from kvlock_fast.locking.lock import kv_sizes
    from kvlock_fast.planning.any_family import _widest_input
    from kvlock_fast.planning.model_size import ModelSize

    arch = family_of_transformer(kind).load().arch
    names = [name for name, _ in arch.attentions(transformer)]
    heads, head_dim = kv_sizes(transformer, arch)
    width = _widest_input(transformer, names)
    geometry = Geometry(1, 8, (1, 2, 2), one_frame=True)
    return ModelSize("", arch.family, len(names), heads, head_dim, width, 512, 16, geometry, 1, 1024, 1024, 1)


def test_a_plan_of_the_full_model_reads_well():
    """FLUX.1 dev at 1024 x 1024: by hand, 4,096 tokens of 57 layers of 24 x 128, K and V in bf16."""
    geometry = Geometry(1, 8, (1, 2, 2), one_frame=True)
    from kvlock_fast.planning.model_size import ModelSize

    size = ModelSize("flux", "flux", 57, 24, 128, 15360, 512, 64, geometry, 1, 1024, 1024, 11_901_408_320)
    job = Job(size, 1, 1024, 1024, 3072, 50, 50, guided=False)
    assert job.tokens == 4096 and job.naive_bytes_per_step == 2 * 4096 * 3072 * 57 * 2
    assert job.rows(1, True) == 2
