"""The reference of recipe keys, and the command that prints it."""

import pytest

from clipkit import reference
from clipkit.config import SHIPPED, load_recipe
from clipkit.errors import UsageError
from clipkit.registry import TASKS
from clipkit.train.denoiser import DenoiserRecipe


@pytest.mark.parametrize("kind", TASKS.own)
def test_every_key_and_section_has_help(kind):
    sections = reference.recipe_sections(kind)
    assert not [section.name for section in sections if not section.help]
    keys = reference.recipe_keys(kind)
    assert len(keys) > 40
    assert not [key.name for key in keys if not key.help]
    assert [key.name for key in keys if key.default is None][:3] == ["run.out", "run.steps", "data.shards"]


def test_a_key_has_type_default_and_help():
    keys = {key.name: key for key in reference.recipe_keys("clip")}
    assert keys["run.precision"].type == '"auto" | "fp32" | "bf16"'
    assert (keys["run.save_minutes"].type, keys["run.save_minutes"].default) == ("float", "30.0")
    assert (keys["data.mix"].type, keys["data.mix"].default) == ("table of float", "{}")
    assert (keys["model.init_logit_bias"].type, keys["model.init_logit_bias"].default) == ("float", "")
    assert keys["distil.teachers"].type == "list of str"
    assert keys["optim.lr"] == reference.Key("optim.lr", "float", "0.001", "Peak learning rate.")
    assert "Epsilon" in keys["model.conventions.text_norm_eps"].help


def test_the_task_of_a_recipe_is_the_end_of_its_name(tmp_path):
    kinds = [reference.kind_of(f"a/drawings_{kind}.toml") for kind in TASKS.own]
    assert kinds == list(TASKS.own)
    assert reference.kind_of("clip") == "clip"
    (tmp_path / "mine.toml").touch()
    with pytest.raises(UsageError, match=r"the name of .*mine\.toml ends with no task \(clip, denoiser, "):
        reference.kind_of(tmp_path / "mine.toml")
    with pytest.raises(UsageError, match=r"no recipe at drawing_clp; did you mean 'drawings_clip'\?"):
        reference.kind_of("drawing_clp")
    with pytest.raises(UsageError, match="unknown task 'clap'; did you mean 'clip'"):
        reference.recipe_keys("clap")


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda p: p.stem)
def test_an_annotated_recipe_is_the_same_recipe(path, tmp_path):
    kind = reference.kind_of(path)
    recipe = load_recipe(TASKS[kind].recipe, path)
    text = reference.annotated_toml(recipe, kind)
    assert "# Steps between log lines.\nlog_every = " in text
    (tmp_path / "again.toml").write_text(text)
    assert load_recipe(TASKS[kind].recipe, tmp_path / "again.toml") == recipe


def test_the_command(command, tmp_path):
    code, out, _ = command("recipe", "drawings_denoiser", "run.steps=7")
    assert code == 0
    (tmp_path / "again_denoiser.toml").write_text(out)
    assert load_recipe(DenoiserRecipe, tmp_path / "again_denoiser.toml").run.steps == 7
    (tmp_path / "again_denoiser.toml").rename(tmp_path / "mine.toml")
    assert command("recipe", tmp_path / "mine.toml", "--task", "denoiser")[1] == out
    code, _, err = command("recipe", tmp_path / "mine.toml")
    assert (code, err.count("\n")) == (2, 1)
    listed = dict(line.split(maxsplit=1) for line in command("recipe")[1].splitlines())
    assert list(listed) == sorted(path.stem for path in SHIPPED.glob("*.toml"))
    assert listed["drawings_noisy_classifier"].startswith("A noise-aware classifier of the drawings' (object")


def test_the_command_lists_all_keys(command):
    code, out, _ = command("recipe", "--keys")
    assert code == 0
    for kind in TASKS.own:
        for key in reference.recipe_keys(kind):
            assert f"  {key.name}  (" in out
    assert f"[run] of {', '.join(TASKS)}: " in out
    assert out.count("  optim.lr  (float, default 0.001)\n      Peak learning rate.\n") == 1
    assert "optim.lr" not in command("recipe", "--keys", "drawings_clip")[1]
    assert "[unet]" not in command("recipe", "--keys", "--task", "clip")[1]
