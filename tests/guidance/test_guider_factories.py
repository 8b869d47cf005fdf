"""Guiders by name: their parameters, what they do, and those of other packages."""

import inspect
import json
import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from PIL import Image
from toy_distributions import gaussian

from clipkit.errors import UsageError
from clipkit.guidance import samplers
from clipkit.guidance.config import DrawRequest, GuidanceConfig
from clipkit.guidance.denoiser import clipped, from_x0
from clipkit.guidance.guider_factories import GuiderContext, clean_log_prob, make_guider
from clipkit.guidance.guiders import classifier_free, inpaint, score_shift
from clipkit.guidance.pipeline import Pipeline
from clipkit.guidance.schedule import alpha, karras, sigma, trailing
from clipkit.registry import GUIDERS, SAMPLERS, Entry, declares


@pytest.fixture(scope="module")
def tiny():
    return Pipeline.open("clipkit-tiny", "cpu")


@pytest.fixture(scope="module")
def untrained(chain):
    """Its denoiser is unconditional."""
    return Pipeline.open(chain, "cpu")


def context(pipeline, **fields):
    request = DrawRequest.of("a cat", guiders=["universal"], **fields).completed(pipeline.is_conditional)
    return GuiderContext(pipeline, request, karras(-9.0, 9.0, 3))


def parameters(name):
    signature = inspect.signature(GUIDERS[name])
    return {key: p for key, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("name", list(GUIDERS.own))
def test_the_help_of_a_guider_lists_its_parameters_and_defaults(name):
    listed = GUIDERS.entry(name).help.rpartition("; ")[2].split(", ")
    found = {key: p.default for key, p in parameters(name).items()}
    assert [pair.partition("=")[0] for pair in listed] == list(found)
    for pair, (key, default) in zip(listed, found.items(), strict=True):
        value = pair.partition("=")[2]
        assert value.isupper() if default is inspect.Parameter.empty else float(value) == default, key


@pytest.mark.parametrize("name", list(GUIDERS.own))
def test_a_guider_says_where_it_is_from(name):
    assert re.search(r"arXiv \d{4}\.\d{5}, (equation|algorithm) \d", GUIDERS[name].__doc__)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cfg+", r"unknown guider 'cfg\+'; did you mean 'cfg\+\+'\?"),
        ("universal:scal=2", r"guider 'universal' has no parameter 'scal'; did you mean 'scale'\?"),
        ("universal:scale", "'scale' is not key=value"),
        ("universal:scale=much", "scale is 'much'; it must be a finite number"),
        ("universal:scale=nan", "scale is 'nan'; it must be a finite number"),
        ("universal:cutouts=1.5", "cutouts is '1.5'; it must be a whole number"),
        ("universal:scale=1,scale=2", "scale is given twice"),
        ("universal:cutouts=-1", "cutouts is -1; it must be at least 0"),
        ("universal:scale=0", "no effect at scale 0"),
        ("autoguidance", "guider 'autoguidance' needs guide; write autoguidance:guide=..."),
        ("autoguidance:guide=", "guide is empty; give the run of a weaker denoiser"),
        ("autoguidance:guide=clipkit-tiny,scale=1", "scale of autoguidance is 1; it must be above 1"),
        ("autoguidance:guide=clipkit-tiny,scale=0", "scale of autoguidance is 0; it must be above 1"),
        ("autoguidance:guide=clipkit-tiny,scale=-2", "scale of autoguidance is -2; it must be above 1"),
        ("autoguidance:guide=clipkit-tiny", "no effect: clipkit-tiny is the denoiser itself"),
        ("cfg++", r"cfg\+\+ needs a sampler that renoises, and dpmpp-2m does not; use ddim"),
    ],
)
def test_a_guider_that_cannot_be_made_is_refused(tiny, text, message):
    with pytest.raises(UsageError, match=message):
        make_guider(text, context(tiny))


def test_requests_on_which_a_guider_has_no_effect_are_refused(tiny, untrained, chain):
    with pytest.raises(UsageError, match=r"scale of cfg\+\+ is 1\.5"):
        make_guider("cfg++:scale=1.5", context(tiny, sampler="ddim"))
    with pytest.raises(UsageError, match="omit the classifier-free scale"):
        make_guider("cfg++", context(tiny, sampler="ddim", guidance=GuidanceConfig(2.0)))
    with pytest.raises(UsageError, match="trained without descriptions"):
        make_guider("cfg++", context(untrained, sampler="ddim"))


def test_a_negative_prompt_needs_a_guider_that_reads_it(tiny, chain):
    """A named guider, or an object, declares `reads`; no other reads negative prompts."""

    def plain(denoise):
        return denoise

    def reading(denoise):
        return denoise

    reading.reads = {"negative"}
    fields = {"n": 1, "steps": 2, "negative": ["a blue rocket"]}
    for guider in (plain, f"autoguidance:guide={chain}"):
        with pytest.raises(UsageError, match="a negative prompt has no effect at the classifier-free scale 1 and"):
            tiny.draw("a red rocket", guiders=[guider], **fields)
        tiny.draw("a red rocket", guiders=[guider], guidance=GuidanceConfig(2.0), **fields)
        tiny.draw("a red rocket", guiders=[guider, "universal"], **fields)
    with pytest.raises(UsageError, match="would be drawn at the noise-aware scale -5"):
        tiny.draw("a red rocket", guiders=["universal"], scale=-5.0, **fields)
    tiny.draw("a red rocket", guiders=[reading], **fields)
    avoided = tiny.draw("a red rocket", guiders=["cfg++"], sampler="ddim", **fields).images
    without = tiny.draw("a red rocket", guiders=["cfg++"], sampler="ddim", n=1, steps=2).images
    assert not torch.equal(avoided, without)


LATER = """from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipkit.guidance.guider_factories import GuiderContext


def factory(context: GuiderContext, by: float, *, times: int = 1, flag: bool = False, word: str = "", other: list = ()):
    return lambda denoise: (by, times, flag, word)


def nothing(context: GuiderContext):
    return None
"""


def test_annotations_that_are_not_evaluated_are_read(tiny, tmp_path, monkeypatch):
    (tmp_path / "annotated_later.py").write_text(LATER)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("factory", "nothing"):
        monkeypatch.setitem(GUIDERS.entries, name, Entry(f"annotated_later:{name}", "from a test"))
    made = make_guider("factory:by=0.5,times=3,flag=true,word=a b", context(tiny))
    assert made(None) == (0.5, 3, True, "a b")
    for text, message in (
        ("factory", "guider 'factory' needs by"),
        ("factory:context=1", "has no parameter 'context'"),
        ("factory:by=1,times=1.5", "times is '1.5'; it must be a whole number"),
        ("factory:by=1,other=1", "other cannot be given as a text"),
        ("nothing", "^the factory of guider 'nothing' returned None; it must return a guider$"),
    ):
        with pytest.raises(UsageError, match=message):
            make_guider(text, context(tiny))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler": 7}, "sampler is 7; it must be a name or a function"),
        ({"spacing": 7}, "spacing is 7; it must be a name or a function"),
        ({"guiders": "universal"}, r"guiders is 'universal'; it must be a list, such as \['universal'\]"),
        ({"guiders": abs}, r"guiders is <built-in function abs>; it must be a list"),
        ({"guiders": [7]}, "guider is 7; it must be a name or a function"),
        ({"guiders": ["universall"]}, "unknown guider 'universall'; did you mean"),
        ({"negative": "a dog"}, r"negative is 'a dog'; it must be a list"),
    ],
)
def test_a_request_refuses_values_of_another_type(fields, message):
    with pytest.raises(UsageError, match=message) as refused:
        DrawRequest.of("a cat", **fields)
    assert "\n" not in str(refused.value)


def test_a_spacing_may_be_an_object(tiny):
    named = tiny.draw("a cat", n=1, steps=3, spacing="trailing")
    given = tiny.draw("a cat", n=1, steps=3, spacing=trailing)
    assert torch.equal(named.images, given.images)
    assert given.about["spacing"] == "trailing"


def test_a_sampler_declares_its_spacing_and_whether_it_renoises(tiny):
    """Also another package's, and one inside a functools.partial."""

    @declares(spacing="leading", renoises=True)
    def ours(denoise, x, lambdas, generator=None, watch=None):
        return samplers.ddim(denoise, x, lambdas, generator, watch)

    expected = {name: ("linspace" if name in ("ddim", "ddpm") else "karras", name == "ddim") for name in SAMPLERS.own}
    requests = {name: DrawRequest.of("a cat", sampler=name) for name in SAMPLERS.own}
    assert {name: (r.completed(True).spacing, r.renoises) for name, r in requests.items()} == expected
    assert DrawRequest.of("a cat", sampler=partial(samplers.ddim, eta=0.5)).completed(True).spacing == "linspace"
    drawn = tiny.draw("a cat", n=1, steps=3, sampler=ours, guiders=["cfg++"])
    assert drawn.about["spacing"] == "leading"
    named = tiny.draw("a cat", n=1, steps=3, sampler="ddim", spacing="leading", guiders=["cfg++"])
    assert torch.equal(drawn.images, named.images)


def test_autoguidance_extrapolates_from_the_weaker_denoiser(tiny, chain):
    """D = D_0 + w (D_1 - D_0) (Karras et al. 2024, equation 3); the weaker network here is unconditional."""
    made = context(tiny)
    x, lam = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)), torch.tensor(0.3)
    strong, weak = tiny.conditional({"a cat": 1.0}, [], 1.0), Pipeline.open(chain, "cpu").denoiser
    found = make_guider(f"autoguidance:guide={chain},scale=1.7", made)(strong)(x, lam).x0
    torch.testing.assert_close(found, weak(x, lam).x0 + 1.7 * (strong(x, lam).x0 - weak(x, lam).x0))
    assert made.weights.keys() == {f"autoguidance:guide={chain}"}


def test_autoguidance_needs_a_denoiser_of_the_same_shape(tiny, latent):
    with pytest.raises(UsageError, match="draws latents 4 x 12 x 12, this one pixels 3 x 24 x 24"):
        make_guider(f"autoguidance:guide={latent}", context(tiny))


def test_cfg_plus_plus_is_the_closed_form_on_gaussians():
    """Two Gaussians of equal variance d^2 and means m: algorithm 2 is an affine map at every step.

    x' = a' x0_u + s' eps_u + a' w s^2 (m_c - m_u) / (a^2 d^2 + s^2), x0_u and eps_u of the unconditional Gaussian.
    """
    d, m_c, m_u, w = 0.5, 0.8, -0.2, 0.6
    (conditional, _), (unconditional, _) = gaussian(m_c, d), gaussian(m_u, d)
    levels = karras(-6.0, 8.0, 12)
    x = torch.linspace(-2, 2, 5).double()
    found = samplers.ddim(classifier_free(unconditional, w, renoise=True)(conditional), x, levels)
    ends = zip([*alpha(levels[1:]).tolist(), 1.0], [*sigma(levels[1:]).tolist(), 0.0], strict=True)
    for a, s, (a_next, s_next) in zip(alpha(levels).tolist(), sigma(levels).tolist(), ends, strict=True):
        n = a * a * d * d + s * s
        x0, eps = (a * d * d * x + s * s * m_u) / n, s * (x - a * m_u) / n
        x = a_next * x0 + s_next * eps + a_next * w * s * s * (m_c - m_u) / n
    torch.testing.assert_close(found, x)
    plain = samplers.ddim(classifier_free(unconditional, w)(conditional), torch.linspace(-2, 2, 5).double(), levels)
    assert (plain - found).abs().max() > 0.05


def test_guiders_around_cfg_plus_plus_leave_its_noise():
    (conditional, _), (unconditional, _) = gaussian(0.8, 0.5), gaussian(-0.2, 0.5)
    x, lam = torch.randn(1, 1, 4, 4).double(), torch.tensor(0.3).double()
    denoise = classifier_free(unconditional, 0.6, renoise=True)(conditional)
    nothing = torch.zeros(1, 1, 4, 4)
    for guider in (inpaint(nothing, nothing), score_shift(lambda x, lam: -x.sum((1, 2, 3)), 1.0)):
        found = clipped(guider(denoise))(x, lam)
        assert torch.equal(found.renoise, unconditional(x, lam).eps)
        assert not torch.equal(found.x0, denoise(x, lam).x0)


def test_universal_guidance_is_the_gradient_through_the_denoiser(tiny):
    x, lam = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)), torch.tensor(0.3)
    denoise = tiny.conditional({"a cat": 1.0}, [], 1.0)
    found = make_guider("universal:scale=3", context(tiny))(denoise)(x, lam).x0
    seen = x.clone().requires_grad_()
    x0 = denoise(seen, lam).x0
    (g,) = torch.autograd.grad(clean_log_prob(tiny, {"a cat": 1.0})(x0).sum(), seen)
    torch.testing.assert_close(found, (x0 + 3 * sigma(lam) ** 2 / alpha(lam) * g).detach())
    assert not torch.allclose(found, x0.detach())


def test_the_clean_clip_prefers_the_prompt_to_other_captions(tiny):
    """Also without a noise-aware CLIP, whose captions are the alternatives."""
    images = tiny.draw("a red rocket", n=2, steps=8, scale=0.0, guidance=GuidanceConfig(2.0)).images
    alone = Pipeline(tiny.denoiser, None, tiny.clip)
    for pipeline in (tiny, alone):
        texts = ("a red rocket", "a green tree")
        right, wrong = (clean_log_prob(pipeline, {text: 1.0})(images).mean() for text in texts)
        assert right > wrong


def test_pictures_by_guiders_of_both_kinds_and_their_metadata(tiny):
    calls = []

    def watched(denoise):
        def look(x, lam):
            calls.append(float(lam))
            return denoise(x, lam)

        return look

    drawn = tiny.draw("a cat", n=1, steps=3, sampler="ddim", guiders=["cfg++:scale=0.5", watched])
    assert drawn.about["guiders"][0] == "cfg++:scale=0.5"
    assert "watched" in drawn.about["guiders"][1]
    assert (drawn.about["cfg_scale"], drawn.about["scale"]) == (1, 0)
    assert len(calls) == 3
    assert not torch.equal(drawn.images, tiny.draw("a cat", n=1, steps=3, sampler="ddim").images)


def test_guiders_are_composed_in_the_documented_order(tiny, monkeypatch):
    """From the network outwards: classifier-free, noise-aware, those given, ILVR, clipping, inpainting."""
    order = []

    def note(name):
        def guider(denoise):
            order.append(name)
            return denoise

        return guider

    monkeypatch.setattr(Pipeline, "noise_aware", lambda self, *how: note("noise-aware"))
    monkeypatch.setattr(Pipeline, "_ilvr", lambda self, *how: note("ilvr"))
    module = "clipkit.guidance.pipeline."
    monkeypatch.setattr(module + "classifier_free", lambda *how: note("classifier-free"))
    monkeypatch.setattr(module + "clipped", note("clipped"))
    monkeypatch.setattr(module + "inpaint", lambda *how: note("inpaint"))
    from clipkit.guidance.config import Start

    image, mask = torch.zeros(1, 3, 24, 24), torch.zeros(1, 1, 24, 24)
    mask[..., :12] = 1
    tiny.draw(
        "a cat", n=1, steps=2, scale=1.0, guiders=[note("first"), note("second")], reference=image,
        start=Start(image, 1.0, mask),
    )  # fmt: skip
    assert order == ["classifier-free", "noise-aware", "first", "second", "ilvr", "clipped", "inpaint"]


def test_a_sampler_may_be_an_object(tiny):
    named = tiny.draw("a cat", n=1, steps=3, sampler="heun")
    given = tiny.draw("a cat", n=1, steps=3, sampler=samplers.heun)
    assert torch.equal(named.images, given.images)
    assert given.about["sampler"] == "heun"


def test_the_former_keyword_works_and_warns(tiny):
    with pytest.warns(DeprecationWarning, match=r"is now draw\(guidance=\.\.\.\)"):
        former = tiny.draw("a cat", n=1, steps=2, steering=GuidanceConfig(1.0))
    assert torch.equal(former.images, tiny.draw("a cat", n=1, steps=2, guidance=GuidanceConfig(1.0)).images)


def test_former_names_of_guiders_work_and_warn():
    from clipkit.guidance import guiders

    for former, present in (("contrast", "classifier_free"), ("mixed", "compose"), ("like", "ilvr")):
        with pytest.warns(DeprecationWarning, match=f"guiders.{former} is now {present}"):
            assert getattr(guiders, former) is getattr(guiders, present)
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        _ = guiders.other


PACKAGE = '''"""A sampler and a guider of another package."""

from clipkit.guidance.guiders import moved


def euler(denoise, x, lambdas, generator=None, watch=None):
    """Euler's method, which is DDIM."""
    from clipkit.guidance.samplers import ddim

    return ddim(denoise, x, lambdas, generator, watch)


def brighter(context, *, by: float = 0.1):
    """Adds to x0."""

    def guider(denoise):
        def guided(x, lam):
            prediction = denoise(x, lam)
            return moved(prediction, x, prediction.x0 + by, lam.to(x).expand(len(x)))

        return guided

    return guider
'''


def test_another_package_adds_a_sampler_and_a_guider(tmp_path):
    """By entry points: both are in --help, which imports no torch, and draw from the command line."""
    (tmp_path / "shiny.py").write_text(PACKAGE)
    info = tmp_path / "shiny-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shiny\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[clipkit.samplers]\neuler = shiny:euler\n[clipkit.guiders]\nbrighter = shiny:brighter\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(*words):
        code = "import sys\nfrom clipkit.cli import cli\ncli.main(sys.argv[1:], standalone_mode=False)\n"
        code += "print('torch' in sys.modules, file=sys.stderr)"
        done = subprocess.run(
            [sys.executable, "-c", code, "guided-sample", *words],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done

    shown = run("--help")
    assert shown.stderr.splitlines()[-1] == "False"
    for name in ("euler", "brighter"):
        assert re.search(rf"^  {name} +from shiny$", shown.stdout, re.MULTILINE)
    words = ["a cat", "--n", "1", "--steps", "2", "--spacing", "linspace", "--cfg-scale", "1", "--out"]
    run(*words, "euler.png", "--sampler", "euler")
    run(*words, "ddim.png", "--sampler", "ddim")
    told = run(*words, "bright.png", "--sampler", "euler", "--guider", "brighter:by=0.5", "--json")
    assert json.loads(told.stdout)["guiders"] == ["brighter:by=0.5"]
    pixels = {name: Image.open(tmp_path / f"{name}.png").convert("L").tobytes() for name in ("euler", "ddim", "bright")}
    assert pixels["euler"] == pixels["ddim"]
    assert sum(pixels["bright"]) > sum(pixels["euler"])


def test_every_sampler_of_the_registry_is_one():
    assert all(callable(SAMPLERS[name]) for name in SAMPLERS)
    x = torch.zeros(1, 2)
    assert SAMPLERS["ddim"](lambda x, lam: from_x0(x, x, lam), x, karras(-1.0, 1.0, 2)).shape == (1, 2)
