"""Published models: names, and fetching from a hub that lives on this machine."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse

import pytest
from external_models import CONFIGS, TEXT, theirs, written
from safetensors.torch import load_file, save_file

from clipkit.convert import hub
from clipkit.errors import UsageError

REPOSITORY, COMMIT = "someone/tiny-clip", "1" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a download needs."""

    folder, damage, cut = None, False, False

    def do_GET(self):
        path = urllib.parse.urlparse(self.path).path
        name = path.rpartition("/")[2]
        if not path.startswith(f"/{REPOSITORY}/resolve/") or not (self.folder / name).is_file():
            code = "EntryNotFound" if REPOSITORY in path else "RepoNotFound"
            return self.answer(b"", 404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
        data = (self.folder / name).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if self.damage and name.endswith(".safetensors"):
            data = data[:-1] + bytes([data[-1] ^ 1])
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            start, total = int(wanted[1]), len(data)
            data, headers["Content-Range"] = data[start:], f"bytes {start}-{total - 1}/{total}"
        return self.answer(data, 206 if wanted else 200, headers)

    do_HEAD = do_GET

    def answer(self, data, status=200, headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if self.cut and len(data) > 10_000 else data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    config = {**CONFIGS["convnext"], "text_cfg": {**TEXT, "layers": 1}}
    handler = type("Served", (Hub,), {"folder": written(tmp_path / "served", config, theirs(config))})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", handler
        running.shutdown()


_PROGRAM = """
import sys, clipkit
try:
    print(clipkit.load(sys.argv[1]).model.config.embed_dim)
except clipkit.ClipkitError as error:
    sys.exit(f"clipkit: {error}")
"""


def loading(name, cache, endpoint, **more):
    """Exit code, stdout and stderr of a process of its own: the hub's library reads its settings once."""
    settings = {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_ETAG_TIMEOUT": "2", **more}
    command = [sys.executable, "-c", _PROGRAM, name]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_a_repository_is_fetched_once_and_then_works_offline(server, tmp_path):
    url, _ = server
    name = f"hf-hub:{REPOSITORY}"
    assert loading(name, tmp_path / "cache", url) == (0, "40", "")
    assert loading(name, tmp_path / "cache", "http://127.0.0.1:9", HF_HUB_OFFLINE="1") == (0, "40", "")


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("hf-hub:someone/else", {}, "the hub has no repository someone/else"),
        ("hf-hub:not a name", {}, "cannot fetch not a name from the hub"),
        (f"hf-hub:{REPOSITORY}", {"HF_HUB_OFFLINE": "1"}, "without a network, give a folder that holds its files"),
        (f"hf-hub:{REPOSITORY}", {"endpoint": "http://127.0.0.1:9"}, "without a network, give a folder"),
        ("ViT-B-32/laion2b_s34b_b79", {}, "did you mean 'ViT-B-32/laion2b_s34b_b79k'?"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(server, tmp_path, name, more, message):
    code, _, err = loading(
        name,
        tmp_path / "cache",
        **{"endpoint": server[0], **more} if "HF_ENDPOINT" not in more else {"endpoint": more["HF_ENDPOINT"]},
    )
    assert (code, len(err.splitlines())) == (1, 1), err
    assert message in err


def test_a_damaged_download_is_found_and_fetched_again(server, tmp_path):
    url, handler = server
    handler.damage = True
    code, _, err = loading(f"hf-hub:{REPOSITORY}", tmp_path / "cache", url)
    assert code == 1
    assert "came damaged: its sha256 is" in err
    handler.damage = False
    assert loading(f"hf-hub:{REPOSITORY}", tmp_path / "cache", url)[0] == 0


def test_a_cut_download_is_one_line_and_can_be_repeated(server, tmp_path):
    url, handler = server
    handler.cut = True
    code, _, err = loading(f"hf-hub:{REPOSITORY}", tmp_path / "cache", url)
    assert (code, len(err.splitlines())) == (1, 1), err
    assert f"cannot fetch {REPOSITORY} from the hub" in err
    handler.cut = False
    assert loading(f"hf-hub:{REPOSITORY}", tmp_path / "cache", url)[0] == 0


def test_open_clips_names():
    assert hub.find("ViT-B-32/laion2b_s34b_b79k") == hub.Published("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", False)
    assert hub.find("ViT-B-32-quickgelu/openai") == hub.find("ViT-B-32/openai")
    assert hub.find("ViT-B-32/openai").quick_gelu
    assert hub.find("hf-hub:a/b") == hub.Published("a/b")
    assert hub.find("runs/clip") is None
    with pytest.raises(UsageError, match="trained with plain GELU"):
        hub.find("ViT-B-32-quickgelu/laion2b_s34b_b79k")


def test_every_published_name_has_an_architecture_that_is_here():
    from clipkit.convert.tokenizer_files import TokenizerFiles
    from clipkit.convert.weights import from_open_clip

    open_clip = pytest.importorskip("open_clip")
    for name in hub.known():
        config = open_clip.get_model_config(name.split("/")[0])
        theirs = config["text_cfg"].get("hf_tokenizer_name")
        from_open_clip(config, {}, TokenizerFiles(clip_like=False, pad_id=1) if theirs else TokenizerFiles())


def test_a_model_in_several_files_is_fetched_whole(server, tmp_path):
    url, handler = server
    folder = handler.folder
    tensors = load_file(folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    placed = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(placed.values()):
        save_file({n: t for n, t in tensors.items() if placed[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    name = f"hf-hub:{REPOSITORY}"
    assert loading(name, tmp_path / "cache", url) == (0, "40", "")
    assert loading(name, tmp_path / "cache", "http://127.0.0.1:9", HF_HUB_OFFLINE="1") == (0, "40", "")
    (folder / "model-1.safetensors").unlink()
    code, _, err = loading(name, tmp_path / "other", url)
    assert (code, len(err.splitlines())) == (1, 1), err
    assert "lacks model-1.safetensors, which the index of its weights lists" in err


def test_what_an_older_version_fetched_still_loads_offline(server, tmp_path):
    """It did not ask for the tokenizer's settings; without a network nobody knows whether there are any."""
    url, _ = server
    name = f"hf-hub:{REPOSITORY}"
    assert loading(name, tmp_path / "cache", url)[0] == 0
    for unasked in (tmp_path / "cache").rglob(".no_exist/*/tokenizer_config.json"):
        unasked.unlink()
    assert loading(name, tmp_path / "cache", "http://127.0.0.1:9", HF_HUB_OFFLINE="1") == (0, "40", "")
