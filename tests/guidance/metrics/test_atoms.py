"""Atomic facts: prompts, their score on renders and on other pictures, and intervals."""

import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

from clipkit.errors import UsageError
from clipkit.guidance.metrics.atoms import Prompt, Share, draw, prompts, renders, score
from clipkit.world import Caption, Fact
from clipkit.world.scene import SPLITS, Kind


def test_prompts_are_a_function_of_their_seed():
    assert prompts(5, seed=3) == prompts(5, seed=3)
    assert prompts(5, seed=3) == prompts(8, seed=3)[:5]
    assert prompts(5, seed=3) != prompts(5, seed=4)


def test_plain_prompts_name_one_object_in_its_colour():
    for prompt in prompts(20, plain=True):
        ((shape, colour),) = {of for fact in prompt.caption.facts for of in fact.of}
        assert prompt.caption.text in (f"a {colour} {shape}", f"an {colour} {shape}")


def test_the_judge_passes_the_renderer_and_fails_other_pictures():
    asked = prompts(20)
    own = score(asked, renders(asked, 64))
    assert own["prompt"].right >= 19
    assert {"object", "colour", "count", "relation", "background"} <= own.keys()
    shifted = score(asked, renders(asked[1:] + asked[:1], 64))
    assert shifted["prompt"].right <= 1
    empty = score(asked, [Image.new("RGB", (64, 64), "white")] * len(asked))
    assert empty["object"].right == empty["relation"].right == empty["count"].right == 0


def test_every_kind_of_fact_is_scored():
    """In the order of the world's kinds, the whole prompts last."""
    kinds = [*get_args(Kind)]
    facts = tuple(Fact(kind, (), "any") for kind in reversed(kinds))
    asked = [Prompt(Caption("a text", facts), prompts(1)[0].scene)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipkit.guidance.metrics.atoms.check", lambda picture, facts: dict.fromkeys(facts, True))
        assert list(score(asked, renders(asked, 24))) == [*kinds, "prompt"]


def test_relations_are_of_the_split():
    asked = prompts(10, "relations")
    assert all(len(prompt.scene.objects) > 1 for prompt in asked)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_are_wilsons(counts):
    right, total = counts
    low, high = Share(right, total).interval
    exact = binomtest(right, total).proportion_ci(method="wilson")
    assert low == pytest.approx(exact.low, abs=1e-6)
    assert high == pytest.approx(exact.high, abs=1e-6)


def test_of_nothing_nothing_is_known():
    assert Share(0, 0).interval == (0.0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prompts(0), "0 prompts were asked for"),
        (lambda: prompts(3, "test"), "unknown split 'test'"),
        (lambda: prompts(3, "relations", plain=True), "plain prompts name one object"),
        (lambda: prompts(2, seed=2**32 - 1), "^seed is 4294967295; for 2 prompts, .* from 0 to 4294967294$"),
        (lambda: draw(None, prompts(2), seed=2**32 - 1), "^seed is 4294967295; for 2 prompts"),
        (lambda: score(prompts(2), []), "0 pictures were given for 2 prompts"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_the_command(command, chain, tmp_path):
    words = ["atoms", "--model", chain, "--plain", "--n", "3", "--steps", "2"]
    code, out, _ = command(*words, "--json", "--out", tmp_path / "atoms.png")
    facts = json.loads(out)["facts"]
    assert code == 0
    assert list(facts) == ["object", "colour", "count", "prompt"]
    assert {row["total"] for row in facts.values()} == {3}
    assert {row["judge"] for row in facts.values()} == {1.0}
    assert all(row["low"] <= row["share"] <= row["high"] for row in facts.values())
    with Image.open(tmp_path / "atoms.png") as sheet:
        assert sheet.width > 48
    code, out, _ = command(*words)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["fact", *facts]


def test_the_command_takes_every_split_of_the_world():
    from clipkit.commands.measuring import atoms

    assert next(p for p in atoms.params if p.name == "split").type.choices == SPLITS


def test_the_command_refuses_before_it_draws(command, tmp_path):
    code, _, err = command("atoms", "--model", "no-such-run", "--seed", 2**32 - 1, "--n", 2)
    assert (code, err.count("\n")) == (2, 1)
    assert "seed is 4294967295; for 2 prompts" in err
    code, _, err = command("atoms", "--split", "relations", "--plain")
    assert (code, err.count("\n")) == (2, 1)
    assert "take another split" in err
    code, _, err = command("atoms", "--out", tmp_path / "atoms.pdf")
    assert code == 2
