"""The command line: what it prints, where, and its one-line errors."""

import json
import os
import subprocess
import sys
import threading

import click
import pytest
from PIL import Image

from clipkit.cli import TURN, cli


def one_line(err, *parts):
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("clipkit: ")
    for part in parts:
        assert part in err


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_with_an_example(command, name):
    code, out, _ = command(name, "--help")
    assert code == 0
    assert f"clipkit {name}" in out.split("Example", 1)[1]


def test_no_command_shows_the_help(command):
    code, out, err = command()
    assert code == 0
    assert "Commands:" in out + err


def test_no_command_is_cut_short_in_the_list(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = command("--help")
    assert "..." not in out.split("Commands:")[1]


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_option_has_a_help_text(name):
    options = [p for p in cli.commands[name].params if isinstance(p, click.Option)]
    assert not [option.opts for option in options if not option.help]


def test_zeroshot_json_is_one_object_and_nothing_else(command, chain, packs):
    code, out, _ = command("zeroshot", "--model", chain, "--dataset", f"shards:{packs / 'heldout'}", "--json")
    result = json.loads(out)
    assert code == 0
    assert list(result)[:6] == ["dataset", "model", "n", "top1", "top5", "mean_per_class"]
    assert list(result)[6:] == ["top1_low", "top1_high", "ece", "skipped"]
    assert result["n"] == 64
    assert 0 <= result["top1_low"] <= result["top1"] <= result["top1_high"] <= 1
    assert result["top1"] <= result["top5"] <= 1


def test_zeroshot_on_a_folder_with_names_and_templates(command, chain, tmp_path):
    for name in ("n1", "n2"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(tmp_path / "set" / name / "a.png")
    (tmp_path / "names.json").write_text('{"n2": ["house", "home"], "n1": "cup"}')
    (tmp_path / "templates.txt").write_text("a {}\na drawing of a {}\n")
    words = ["zeroshot", "--model", chain, "--dataset", f"folder:{tmp_path / 'set'}", "--templates"]
    code, out, _ = command(*words, tmp_path / "templates.txt", "--classnames", tmp_path / "names.json")
    assert code == 0
    assert f"folder:{tmp_path / 'set'}" in out.splitlines()[1]
    code, _, err = command(*words, "eighty")
    assert code == 2
    one_line(err, "'eighty' is neither a file nor one of one, 7, 80")
    (tmp_path / "names.txt").write_text("only one\n")
    code, _, err = command(*words, tmp_path / "templates.txt", "--classnames", tmp_path / "names.txt")
    assert code == 2
    one_line(err, "lists 1 classes; the data set has 2")


def test_guided_sample_writes_what_it_says(command, chain, tmp_path):
    words = ["guided-sample", "a red rocket", "--model", chain, "--n", "2", "--steps", "2", "--negative", "a cat"]
    code, out, _ = command(*words, "--out", tmp_path / "a.png", "--gif", tmp_path / "a.gif", "--json")
    result = json.loads(out)
    assert code == 0
    assert (result["prompt"], len(result["clip_scores"])) == ("a red rocket", 2)
    assert (tmp_path / "a.gif").is_file()
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.text["prompt"] == "a red rocket"


def test_what_is_wrong_on_all_ranks_is_for_rank_0_to_say(command, monkeypatch, tmp_path):
    """The others wait for torchrun to end them; one that it does not end was alone with its complaint."""
    waited = []
    monkeypatch.setattr("clipkit.cli.time.sleep", waited.append)
    for rank, waits in (("0", []), ("1", [TURN])):
        monkeypatch.setenv("RANK", rank)
        code, _, err = command("pretrain", "drawings_clip", "run.stesp=1")
        assert (code, waited) == (2, waits)
        one_line(err, "run.stesp")
        assert err.rstrip().endswith("[rank 1]") == (rank == "1")


def test_an_interrupted_wait_still_ends_in_one_line(command, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("clipkit.cli.time.sleep", interrupted)
    monkeypatch.setenv("RANK", "1")
    code, _, err = command("pretrain", "drawings_clip", "run.stesp=1")
    assert code == 2
    one_line(err, "run.stesp", "[rank 1]")


def test_what_happens_to_one_rank_it_says_at_once(command, monkeypatch, tmp_path):
    monkeypatch.setattr("clipkit.cli.time.sleep", None)
    monkeypatch.setenv("RANK", "1")
    code, _, err = command("pretrain", "drawings_clip", f"run.out={tmp_path}", f"data.shards={tmp_path / 'none'}")
    assert code == 1
    one_line(err, "[rank 1]")


@pytest.mark.parametrize("name", ["pretrain", "denoiser", "noisy-clip"])
def test_dry_run_prints_the_resolved_recipe(command, name):
    recipe = {"pretrain": "clip", "denoiser": "denoiser", "noisy-clip": "noisy_clip"}[name]
    code, out, _ = command(name, f"drawings_{recipe}", "--dry-run", "run.seed=7")
    assert code == 0
    assert "seed = 7" in out
    assert "[optim]" in out


def test_pack_says_what_it_packed(command, tmp_path):
    code, out, _ = command("pack", "drawings", tmp_path / "p", "--count", 12, "--holdout", 2)
    assert (code, out.strip()) == (0, f"{tmp_path / 'p'}: 10 samples in 1 shard; skipped: none")


def bad_inputs(chain, packs, tmp):
    data = f"data.shards={packs / 'train'}"
    draw = ["guided-sample", "a cat", "--model", chain]
    (tmp / "images").mkdir()
    (tmp / "empty.csv").write_text("image,caption\n")
    (tmp / "one").mkdir()
    (tmp / "one" / "shard-000000.tar").write_bytes(b"<html>not a shard</html>" * 100)
    (tmp / "photos" / "cat").mkdir(parents=True)
    (tmp / "photos" / "cat" / "a.jpg").write_text("not an image")
    (tmp / "note.txt").write_text("")
    out = f"run.out={tmp / 'run'}"
    return {
        "unknown option": (2, ["zeroshot", "--datset", "x"], "No such option"),
        "unknown command": (2, ["zeroshoot"], "No such command"),
        "missing option": (2, ["zeroshot", "--model", "x"], "Missing option '--dataset'"),
        "unknown recipe key": (2, ["pretrain", "drawings_clip", "run.stesp=1"], "did you mean 'run.steps'?"),
        "wrong type": (2, ["pretrain", "drawings_clip", "run.steps=soon"], "must be of type int"),
        "no recipe": (2, ["pretrain", "nothing.toml"], "no recipe at nothing.toml"),
        "recipe with a slip": (2, ["pretrain", "drawing_clip.toml"], "did you mean 'drawings_clip'?"),
        "shown recipe with a slip": (2, ["recipe", "drawings_clpi"], "did you mean 'drawings_clip'?"),
        "recipe of another task": (
            2,
            ["pretrain", "drawings_denoiser.toml"],
            "(by its name, it is a recipe of `clipkit denoiser`)",
        ),
        "kind with a slip": (2, ["zeroshot", "--dataset", "foldr:photos"], "did you mean 'folder:photos'?"),
        "no pack there": (1, ["verify", tmp / "nowhere"], "there is no "),
        "no pack": (1, ["pretrain", "drawings_clip", out, f"data.shards={tmp / 'none'}"], "no pack at"),
        "no shards": (1, ["pretrain", "drawings_clip", out, f"data.shards={tmp / 'images'}"], "no .tar shards"),
        "corrupt shard": (1, ["pretrain", "drawings_clip", out, f"data.shards={tmp / 'one'}"], "is damaged"),
        "sigmoid without bias": (
            2,
            ["pretrain", "drawings_clip", "loss.kind=sigmoid"],
            "set model.init_logit_bias=-10",
        ),
        "bias without sigmoid": (
            2,
            ["pretrain", "drawings_clip", "model.init_logit_bias=-10"],
            "learns no logit bias",
        ),
        "sigmoid with noise": (2, ["noisy-clip", "drawings_noisy_clip", "loss.kind=sigmoid"], "learns by InfoNCE"),
        "layer decay": (2, ["pretrain", "drawings_clip", "finetune.layer_decay=2"], "must be in (0, 1]"),
        "learning rate": (2, ["pretrain", "drawings_clip", "optim.lr=-1"], "optim.lr is -1.0; it must be above 0"),
        "not a number": (2, ["denoiser", "drawings_denoiser", "run.grad_clip=nan"], "run.grad_clip is nan"),
        "no run to start from": (
            1,
            ["pretrain", "drawings_clip", out, data, f"finetune.init_from={tmp / 'none'}"],
            "is not a model: it does not exist",
        ),
        "unknown tower": (2, ["pretrain", "drawings_clip", out, data, "model.image_tower=resnet1"], "timm has no"),
        "unknown device": (2, ["pretrain", "drawings_clip", out, data, "run.device=tpu"], "device 'tpu'"),
        "no captions": (1, ["pack", tmp / "images", tmp / "p1", "--csv", tmp / "empty.csv"], "nothing to pack"),
        "no images": (1, ["pack", tmp / "images", tmp / "p2"], "no <class>/<image> layout"),
        "not images": (1, ["pack", tmp / "photos", tmp / "p3"], "nothing to pack: 1 not an image"),
        "no source": (2, ["pack", tmp / "nowhere", tmp / "p4"], "no folder or tar at"),
        "empty templates": (2, ["pack", tmp / "photos", tmp / "p5", "--templates", tmp / "note.txt"], "is empty"),
        "not a model": (1, ["zeroshot", "--model", tmp, "--dataset", f"folder:{tmp / 'photos'}"], "is not a model"),
        "no model": (1, ["guided-sample", "a cat", "--model", tmp / "none"], "does not exist"),
        "not an image": (1, ["zeroshot", "--model", chain, "--dataset", f"folder:{tmp / 'photos'}"], "not an image"),
        "unknown data set": (2, ["zeroshot", "--model", chain, "--dataset", "cifar11"], "did you mean 'cifar10"),
        "missing data set": (1, ["zeroshot", "--model", chain, "--dataset", "cifar100"], "download it, or give"),
        "steps beyond the schedule": (
            2,
            [*draw, "--sampler", "ddim", "--steps", "1001"],
            "the schedule has 1000 levels",
        ),
        "mask without init": (2, [*draw, "--mask", "x.png"], "give --init too"),
        "no such start": (1, [*draw, "--init", "x.png"], "cannot read x.png"),
        "empty prompt": (2, ["guided-sample", " ", "--model", chain], "the prompt is empty"),
        "n 0": (2, [*draw, "--n", "0"], "0 is not in the range x>=1"),
        "steps 0": (2, [*draw, "--steps", "0"], "0 is not in the range x>=1"),
        "unknown sampler": (2, [*draw, "--sampler", "euler"], "'euler' is not one of"),
        "unwritable": (2, [*draw, "--n", "1", "--steps", "1", "--out", tmp / "note.txt" / "a.png"], "cannot write"),
    }


def test_bad_input_is_one_line_and_an_exit_code(command, chain, packs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for what, (expected, words, part) in bad_inputs(chain, packs, tmp_path).items():
        code, out, err = command(*words)
        assert code == expected, f"{what}: {code} {err}"
        assert out == "", what
        one_line(err.splitlines()[-1], part)
        assert "Traceback" not in err


def test_a_missing_shard_of_a_pack(command, tmp_path):
    command("pack", "drawings", tmp_path / "p", "--count", 20, "--shard-size", 10)
    (tmp_path / "p" / "shard-000001.tar").unlink()
    code, _, err = command("pretrain", "drawings_clip", f"data.shards={tmp_path / 'p'}", f"run.out={tmp_path / 'r'}")
    assert code == 1
    one_line(err, "shard-000001.tar is missing")


def test_no_traceback_from_a_real_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "clipkit", "zeroshot", "--model", "nowhere", "--dataset", "cifar10"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ},
    )
    assert done.returncode == 1
    one_line(done.stderr)


def clipkit_process(words, **how):
    """The command in a process of its own; `bash` if the words are a line for it."""
    shell = isinstance(words, str)
    line = ["bash", "-c", words] if shell else [sys.executable, "-m", "clipkit", *map(str, words)]
    environment = {**os.environ, "PYTHON": sys.executable, **how.pop("env", {})}
    return subprocess.run(line, capture_output=True, env=environment, **how)


def test_a_reader_who_has_seen_enough_is_no_error():
    done = clipkit_process('"$PYTHON" -m clipkit models | head -1')
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, b"", 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
def test_a_full_disk_is_one_line():
    done = clipkit_process('"$PYTHON" -m clipkit models > /dev/full')
    assert done.returncode == 1
    one_line(done.stderr.decode(), "No space left on device")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    done = clipkit_process(["classify", "a.png", "--labels", "loop.txt"], cwd=tmp_path)
    assert done.returncode == 2
    one_line(done.stderr.decode(), "loop.txt")
    done = clipkit_process(["classify", "a.png", "--labels", "x,y", "--model", "m" * 300], cwd=tmp_path)
    assert done.returncode in (1, 2)
    one_line(done.stderr.decode(), "m" * 77 + "...")


STRICT = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_names_that_a_strict_terminal_cannot_show(chain, tmp_path):
    folder = os.fsencode(tmp_path / "photos")
    os.mkdir(folder)
    for name in (b"caf\xe9.png", "caf\u00e9 \U0001f680.png".encode()):
        with open(folder + b"/" + name, "wb") as file:
            Image.new("RGB", (24, 24), "red").save(file, "PNG")
    named = [b"photos/caf\xe9.png"]
    for words in (
        ["index", "photos", "ix", "--model", chain],
        ["search", "ix", "a caf\u00e9 \U0001f680", "--out", "sheet.png"],
        ["classify", "photos", "--labels", "caf\u00e9,\U0001f680", "--model", chain],
        ["similarity", *named, "--text", "\U0001f680", "--model", chain],
        ["classify", *named, "--labels", "caf\u00e9,\U0001f680", "--model", chain],
        ["classify", b"none-caf\xe9.png", "--labels", "a,b", "--model", chain],
    ):
        for as_json in ([], ["--json"]) if words[0] != "index" else ([],):
            line = [os.fsencode(str(w)) if not isinstance(w, bytes) else w for w in [*words, *as_json]]
            done = subprocess.run(
                [os.fsencode(sys.executable), b"-m", b"clipkit", *line],
                cwd=tmp_path,
                capture_output=True,
                env={**os.environ, **STRICT},
            )
            assert done.returncode == (1 if words[1] == b"none-caf\xe9.png" else 0), done.stderr
            assert b"Traceback" not in done.stderr
            if as_json and not done.returncode:
                json.loads(done.stdout.decode("ascii"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["models"], "clipkit: interrupted\n"),
        (["classify", "a.png", "--labels", "a,b"], "clipkit: interrupted\n"),
        (["pack", "drawings", "p"], "clipkit: interrupted; the same command resumes\n"),
        (["index", "photos", "ix"], "clipkit: interrupted; the same command resumes\n"),
        (["demo"], "clipkit: interrupted; the same command resumes\n"),
        (["pretrain", "drawings_clip"], "clipkit: interrupted; the same command resumes\n"),
    ],
)
def test_an_interrupted_command_promises_what_it_keeps(command, monkeypatch, words, said):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.commands[words[0]], "callback", interrupted)
    assert command(*words) == (130, "", said)


def test_seeds_have_64_bits(command, tmp_path):
    for words in (["demo", "--out", tmp_path / "d"], ["probe", "--train", "folder:a", "--test", "folder:b"]):
        for seed in (-1, 2**64):
            code, _, err = command(*words, "--seed", seed)
            assert code == 2
            one_line(err, "is not in the range")
    assert not (tmp_path / "d").exists()


def test_the_demo_checks_its_folder_before_the_work(command, tmp_path):
    (tmp_path / "file").write_text("x")
    code, out, err = command("demo", "--out", tmp_path / "file" / "a")
    assert (code, out) == (2, "")
    one_line(err, f"cannot write into {tmp_path / 'file' / 'a'}: Not a directory")


def test_python_dash_m_says_its_name():
    done = subprocess.run([sys.executable, "-m", "clipkit", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("clipkit, version")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (
            ["a", "red", "rocket"],
            'quote one of several words, "a red rocket", or write several with their',
        ),
        (["red", "rocket"], "2 prompts of a word each"),
        (["a rocket", "cat", "--negative", "a"], '"a" alone says nothing; put quotes around a prompt'),
        (["a cat", "The", "dog"], '"The" alone says nothing'),
        (["a cat", "a cat:0.5"], "the prompt 'a cat' is given twice"),
        (["a cat:0.5"], "weights are relative among several prompts"),
        (["a cat:inf", "red"], "the weight of 'a cat' is inf"),
        (["a cat", "red:-1"], "the weights of the prompts add up to 0"),
        (["a cat", "red:-2"], "add up to -1; their sum must be above 0"),
        (["a cat", "--strength", 0.5], "--strength is the share of noise added to --init; give --init too"),
        (["a cat", "--scale", "nan"], "the noise-aware scale is nan"),
        (["a cat", "--cfg-scale", "inf"], "the classifier-free scale is inf"),
        (["a cat", "--negative", "a dog", "--cfg-scale", 1], "a negative prompt has no effect"),
        (["a cat", "--negative", "a dog:0.5"], "--negative 'a dog:0.5' has a weight; negative prompts have none"),
        (["a cat", "a  cat"], "is given twice"),
        (["a cat", "0.8"], "the prompt '0.8' is a number"),
        (["a cat", "--shift", "score"], "the shift has no effect at the noise-aware scale 0"),
        (["a cat", "--image-prompt", "dot.png"], "the image prompt has no effect at the noise-aware scale 0"),
        (["a cat", "--init", "dot.png", "--strength", 1], "at strength 1 nothing is left"),
        (["a cat", "--init", "dot.png", "--mask", "dot.png"], "the mask is white all over"),
        (["a cat", "--seed", 2**64], "it must be from 0 to 4294967295"),
        (["a cat", "--out", "x.tif"], "does not say what to write"),
        (["a cat", "--out", "dot.png/"], "cannot write into dot.png"),
        (["a cat", "--gif", "x.png"], "must end in one of .gif"),
    ],
)
def test_a_drawing_that_would_not_be_what_was_asked_for_is_refused(command, monkeypatch, tmp_path, words, part):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (24, 24), "white").save("dot.png")
    code, out, err = command("guided-sample", *words, "--n", 1, "--steps", 1)
    assert (code, out) == (2, "")
    one_line(err.splitlines()[-1], part)
    assert [file.name for file in tmp_path.iterdir()] == ["dot.png"]


def test_pictures_are_read_once_so_that_they_may_be_pipes(command, tmp_path):
    pipe, picture = tmp_path / "pipe", tmp_path / "red.png"
    Image.new("RGB", (24, 24), "red").save(picture)
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(picture.read_bytes(),))
    writer.start()
    words = ["guided-sample", "a cat", "--n", 1, "--steps", 2, "--json", "--out", tmp_path / "a.png", "--init"]
    code, out, _ = command(*words, pipe)
    writer.join()
    assert code == 0
    assert json.loads(out)["init"]["sha256"] == json.loads(command(*words, picture)[1])["init"]["sha256"]
