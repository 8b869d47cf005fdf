"""The page: what it answers, what it refuses, and that it works in a browser."""

import base64
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import ipaddress
import itertools
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import types
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import uvicorn
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from process_faults import HANG, until
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient

from clipkit import DEFAULT_MODEL, app, load
from clipkit.app import draw_queue, guard, inference, limits, routes, server
from clipkit.data import drawings
from clipkit.errors import CheckpointError, DataError, UsageError
from clipkit.guidance.image_grid import grid
from clipkit.zeroshot.similarity import classify, similarities

TEXTS = ("a red rocket", "a blue fish", "a green tree")


@pytest.fixture(scope="module")
def state():
    return app.AppState.open(DEFAULT_MODEL, device="cpu")


@pytest.fixture
def client(state):
    with TestClient(app.make_app(state), base_url="http://localhost") as client:
        yield client


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(split="val", index=0, size=48):
    image = drawings.draw(split, 1, index, size=size).image
    return image, encoded(image)


def test_classify_is_the_commands(client):
    image, data = picture()
    answer = client.post(
        "/api/classify", files={"picture": data}, data={"labels": "rocket, house,, tree", "template": "a {}"}
    )
    guesses = classify(load(device="cpu"), [image], ["rocket", "house", "tree"], ["a {}"])[0]
    found = answer.json()["guesses"]
    assert [g["label"] for g in found] == [g.label for g in guesses]
    assert [g["probability"] for g in found] == pytest.approx([g.probability for g in guesses], abs=1e-6)


def test_compare_is_the_commands(client):
    pictures = [picture(index=i) for i in range(3)]
    files = [("pictures", (f"{i}.png", data)) for i, (_, data) in enumerate(pictures)]
    found = client.post("/api/similarity", files=files, data={"texts": "\n".join(TEXTS)}).json()
    assert found["texts"] == list(TEXTS)
    expected = similarities(load(device="cpu"), [image for image, _ in pictures], TEXTS)
    torch.testing.assert_close(torch.tensor(found["cosines"]), expected, atol=1e-5, rtol=0)


def test_search_by_words_and_by_picture(client):
    hits = client.post("/api/search", data={"text": "a yellow star"}).json()["hits"]
    assert hits[0]["key"] == "yellow star.png"
    shown = client.get(f"/api/picture/{hits[0]['row']}")
    assert shown.headers["content-type"] == "image/png"
    again = client.post("/api/search", files={"picture": shown.content}).json()["hits"]
    assert again[0]["row"] == hits[0]["row"]
    assert again[0]["score"] > 0.99


def test_the_default_gallery_has_every_drawing(client):
    assert client.get("/api/about").json()["pictures"] == len(drawings.PAIRS)


def test_draw_tells_each_step_and_ends_as_the_studio_does(client, state):
    wanted = {"prompt": "a red rocket", "n": 2, "steps": 4, "seed": 3, "negative": "a tree"}
    with client.stream("POST", "/api/draw", json=wanted) as answer:
        events = [json.loads(line) for line in answer.iter_lines()]
    assert [event.get("step") for event in events] == [1, 2, 3, 4, None]
    drawn = state.pipeline.draw("a red rocket", n=2, steps=4, seed=3, negative=["a tree"])
    last = events[-1]
    assert last["scores"] == drawn.scores
    shown = Image.open(io.BytesIO(base64.b64decode(last["picture"].partition(",")[2])))
    assert shown.tobytes() == grid(drawn.images).tobytes()


def test_a_drawing_that_nobody_listens_to_ends(client, state):
    steps, gone = [], threading.Event()

    class Watched:
        def draw(self, *words, watch, **options):
            def noted(x0):
                steps.append(1)
                watch(x0)
                assert gone.wait(HANG)

            return state.pipeline.draw(*words, watch=noted, **options)

    queue = draw_queue.DrawQueue(Watched())

    async def leave():
        events = queue.draw(draw_queue.DrawBody(prompt="a rocket", n=1, steps=100))
        await anext(events)
        await events.aclose()

    client.portal.call(leave)
    gone.set()
    until(lambda: not queue._present)
    assert len(steps) == 2


def test_a_prompt_of_blanks_is_an_answer_in_the_stream(client):
    answer = client.post("/api/draw", json={"prompt": "  ", "n": 1, "steps": 1})
    assert json.loads(answer.text) == {"error": "the prompt is empty; say what to draw"}


def test_too_many_waiting(client, state):
    queue = draw_queue.DrawQueue(state.pipeline)
    queue._present = limits.MAX_WAITING + 1
    with pytest.raises(HTTPException, match="waiting already"):
        queue.draw(draw_queue.DrawBody(prompt="a rocket"))


def test_what_the_drawing_refuses_is_its_line(client, state):
    class Refusing:
        def draw(self, *words, **options):
            raise UsageError("a negative prompt has no effect")

    with TestClient(
        app.make_app(dataclasses.replace(state, pipeline=Refusing())), base_url="http://localhost"
    ) as other:
        answer = other.post("/api/draw", json={"prompt": "a rocket", "negative": "a tree", "cfg_scale": 1})
    assert json.loads(answer.text) == {"error": "a negative prompt has no effect"}


def test_a_model_without_denoiser_says_so(state):
    plain = dataclasses.replace(state, pipeline="this model cannot draw: there is no denoiser")
    with TestClient(app.make_app(plain), base_url="http://localhost") as client:
        assert client.get("/api/about").json()["cannot_draw"].startswith("this model cannot draw")
        answer = client.post("/api/draw", json={"prompt": "a rocket"})
    assert (answer.status_code, answer.json()["error"]) == (400, plain.pipeline)


@pytest.mark.parametrize(
    ("send", "status", "message"),
    [
        (
            {"files": {"picture": b"GIF89a, or so it says"}, "data": {"labels": "a,b", "template": "{}"}},
            400,
            "not an image",
        ),
        ({"files": {"picture": picture()[1]}, "data": {"labels": " , ", "template": "{}"}}, 400, "0 texts were given"),
        (
            {"files": {"picture": picture()[1]}, "data": {"labels": "a," * 250, "template": "{}"}},
            400,
            "250 texts were given; 1 to 200",
        ),
        (
            {"files": {"picture": picture()[1]}, "data": {"labels": "b," + "a" * 501, "template": "{}"}},
            400,
            f"{'a' * 40}... has 501 characters; at most 500",
        ),
        (
            {"files": {"picture": picture()[1]}, "data": {"labels": "a" * 100_001, "template": "{}"}},
            422,
            "labels: string should have",
        ),
        (
            {"files": {"picture": picture()[1]}, "data": {"labels": "a cat,dog, a cat", "template": "{}"}},
            400,
            "'a cat' is given twice",
        ),
        (
            {"files": {"picture": picture()[1]}, "data": {"labels": "a,b", "template": "{x}"}},
            400,
            "template '{x}'",
        ),
        (
            {"files": {"picture": picture()[1][:300]}, "data": {"labels": "a,b", "template": "{}"}},
            400,
            "damaged image",
        ),
        (
            {"files": {"picture": b""}, "data": {"labels": "a,b", "template": "{}"}},
            400,
            "not an image",
        ),
        (
            {"files": {"picture": picture()[1]}, "data": {"labels": "a,b", "template": "a photo"}},
            400,
            "template 'a photo'",
        ),
        ({"data": {"labels": "a", "template": "{}"}}, 422, "picture: field required"),
    ],
)
def test_bad_input_is_one_line(client, send, status, message):
    answer = client.post("/api/classify", **send)
    assert answer.status_code == status
    assert answer.json()["error"].startswith(message)
    assert "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("n", 17, "n: input should be less than or equal to 16"),
        ("steps", 0, "steps: input should be greater than or equal to 1"),
        ("scale", 1e6, "scale: input should be less than or equal to 100"),
        ("scale", float("nan"), "scale: input should be "),
        ("cfg_scale", float("inf"), "cfg_scale: input should be less than or equal to 100"),
        ("seed", 2**64, "seed: input should be less than 4294967296"),
        ("prompt", "", "prompt: string should have at least 1 character"),
        ("prompt", "a" * 501, "prompt: string should have at most 500 characters"),
        ("prompt", "\ud800", "prompt: input should be a valid string, unable to parse raw data as a unicode string"),
    ],
)
def test_a_drawing_has_limits(client, what, value, message):
    body = json.dumps({"prompt": "a rocket", what: value})
    answer = client.post("/api/draw", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(message)


def test_a_request_that_is_no_json(client):
    answer = client.post("/api/draw", content="{", headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]) == (422, "1: JSON decode error")


def test_a_search_is_by_words_or_by_a_picture(client):
    for text in ("", " ", "\n"):
        assert client.post("/api/search", data={"text": text}).json()["error"] == "describe a picture, or give one"
    both = client.post("/api/search", data={"text": "a star"}, files={"picture": picture()[1]})
    assert (both.status_code, both.json()["error"]) == (400, "describe a picture, or give one, not both")
    broken = client.post("/api/search", files={"picture": b"II*\x00"})
    assert (broken.status_code, broken.json()["error"].partition(":")[0]) == (400, "not an image")


@pytest.mark.parametrize(
    "words",
    [
        "/etc/passwd",
        "missing.jpg",
        "~",
        "é" * 150,
        "xyzzy",
        "🚀 寿司",
        "{} {}",
        "a clock at 10:30",
        "-1",
    ],
)
def test_words_are_words_whatever_they_look_like(client, words):
    """No path is opened, no word is too long for a file's name, and none is unknown to a tokenizer."""
    assert len(client.post("/api/search", data={"text": words}).json()["hits"]) == 24
    send = {"files": {"picture": picture()[1]}, "data": {"labels": f"{words},tree", "template": "a {}"}}
    assert {g["label"] for g in client.post("/api/classify", **send).json()["guesses"]} == {words, "tree"}
    drawn = client.post("/api/draw", json={"prompt": words, "n": 1, "steps": 1, "negative": words})
    assert "scores" in json.loads(drawn.text.splitlines()[-1])


def test_words_that_the_model_cannot_know_are_named(client):
    send = {"files": {"picture": picture()[1]}, "data": {"labels": "a walrus,rocket 7", "template": "{}"}}
    assert client.post("/api/classify", **send).json()["unknown_words"] == ["walrus"]
    assert client.post("/api/search", data={"text": "a walrus"}).json()["unknown_words"] == ["walrus"]
    assert client.post("/api/search", files={"picture": picture()[1]}).json()["unknown_words"] == []
    files = [("pictures", ("a.png", picture()[1]))]
    compared = client.post("/api/similarity", files=files, data={"texts": "a walrus"}).json()
    assert compared["unknown_words"] == ["walrus"]


@pytest.mark.parametrize("kind", [2, 5, 0, 99])
def test_odd_exif_is_no_fault_of_the_picture(client, kind):
    """A text tag that is stored as a rational, or as nothing that there is, in a picture that EXIF turns."""
    tags = struct.pack("<HHLL", 0x010E, kind, 1, 38) + struct.pack("<HHLL", 0x0112, 3, 1, 6)
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + tags + struct.pack("<LLL", 0, 3, 7)
    sent = encoded(Image.new("RGB", (64, 48), "red"), "JPEG", exif=exif)
    answer = client.post("/api/search", files={"picture": sent})
    assert answer.status_code == 200, answer.text


def test_twenty_labels_are_longer_than_a_files_name(client):
    labels = [f"a label with the number {i}" for i in range(200)]
    send = {"files": {"picture": picture()[1]}, "data": {"labels": ",".join(labels), "template": "{}"}}
    assert len(client.post("/api/classify", **send).json()["guesses"]) == 5


def test_a_picture_from_a_telephone(client):
    """Large, turned by its EXIF, and reduced while it is decoded: what is seen is what there is to see."""
    image = drawings.draw("val", 1, 0, size=48).image
    exif = Image.Exif()
    exif[0x0112] = 6
    large = image.resize((4800, 4800), Image.Resampling.BICUBIC)
    sent = encoded(large.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)
    files = [("pictures", ("a.png", encoded(image))), ("pictures", ("a.jpg", sent))]
    (one, other), *_ = client.post("/api/similarity", files=files, data={"texts": "a red rocket"}).json()["cosines"]
    assert other == pytest.approx(one, abs=0.02)


def test_pixels_have_a_limit(client):
    answer = client.post("/api/search", files={"picture": encoded(Image.new("1", (4001, 4000)))})
    assert (answer.status_code, answer.json()["error"]) == (
        400,
        "too many pixels: 4001x4000 is over the limit of 16000000",
    )


def test_pictures_are_decoded_two_at_a_time(state, monkeypatch):
    """Six wait at the door; as many as were ever inside together are counted."""
    inside, most, door, lock = 0, 0, threading.Barrier(limits.MAX_DECODING), threading.Lock()

    def slow(picture, **limits):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        door.wait(HANG)  # two come in before one leaves
        with lock:
            inside -= 1
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(inference, "decode", slow)
    limited = inference.Inference(state.clip)
    with concurrent.futures.ThreadPoolExecutor(6) as many:
        asked = [many.submit(limited.embed, [b""]) for _ in range(2)]
        asked += [many.submit(limited.thumbnail, b"") for _ in range(4)]
        assert all(one.result(HANG) is not None for one in asked)
    assert most == limits.MAX_DECODING


def test_a_picture_that_fails_gives_its_turn_back(state):
    limited = inference.Inference(state.clip)
    for _ in range(2 * limits.MAX_DECODING):
        with pytest.raises(DataError, match="not an image"):
            limited.embed([b"x"])
    assert limited.embed([picture()[1]]).shape == (1, state.clip.model.config.embed_dim)


def test_what_nobody_foresaw_is_one_line_too(state):
    class Broken:
        rows = (0,)

        def search(self, *_, **__):
            raise RuntimeError("a defect")

        def __len__(self):
            return 1

    broken = app.make_app(dataclasses.replace(state, index=Broken()))
    with TestClient(broken, base_url="http://localhost", raise_server_exceptions=False) as client:
        answer = client.post("/api/search", data={"text": "a star"})
    assert (answer.status_code, answer.json()["error"]) == (500, "that failed; the terminal shows why")


def test_pictures_that_are_not_there(client):
    assert client.get("/api/picture/100000").json()["error"] == "there is no picture 100000"
    assert client.get("/api/nothing").json() == {"error": "Not Found"}
    assert client.get("/api/picture/100000").status_code == 404
    assert client.get("/api/picture/-1").status_code == 404
    assert client.get("/%2e%2e/%2e%2e/_version.py").status_code == 404


def test_too_much_at_once(client):
    answer = client.post("/api/search", content=b"x", headers={"Content-Length": str(limits.MAX_BYTES + 1)})
    assert (answer.status_code, answer.json()["error"]) == (413, "that is 20.0 MB; at most 20 are taken")
    many = [("pictures", (f"{i}.png", picture()[1])) for i in range(17)]
    answer = client.post("/api/similarity", files=many, data={"texts": "a"})
    assert "at most 16 are compared" in answer.json()["error"]
    for path in ("/api/search", "/"):
        assert client.post(path, content=iter([b"x"])).status_code == 411  # chunked: of unknown length
        for length in ("-1", "²", "many"):
            headers = {"Content-Length": length.encode("latin-1")}
            assert client.post(path, content=b"x", headers=headers).status_code == 411


def test_many_large_requests_at_once_wait_for_each_other(client, monkeypatch):
    monkeypatch.setattr(limits, "MAX_BYTES_HELD", 1000)
    for _ in range(3):  # what is answered is no longer held
        assert client.post("/api/search", data={"text": "a" * 480}).status_code == 200
    refused = client.post("/api/search", data={"text": "a" * 1000})
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert refused.json()["error"] == "many pictures are in work; try again later"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),  # another port of this machine
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://before-a-proxy.example"}, 200),
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "http://localhost"}, 200),
        ({"Origin": "http://localhost:8001", "Host": "localhost:8000"}, 403),
        ({"Origin": "http://localhost:8000", "Host": "localhost:8000"}, 200),
        ({"Origin": "http://LOCALHOST:8000", "Host": "localhost:8000"}, 200),
        ({"Origin": "http://[::1]:8000", "Host": "[::1]:8000"}, 200),
        ({"Origin": "http://localhost.elsewhere.example"}, 403),
        ({}, 200),
    ],
)
def test_other_sites_are_refused(client, headers, status):
    assert client.get("/api/about", headers=headers).status_code == status
    assert client.get("/", headers=headers).status_code == status
    assert client.post("/api/search", headers=headers, data={"text": "a star"}).status_code == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("LocalHost.:8000", 200),
        ("127.0.0.1:8000", 200),
        ("192.168.1.20:8000", 200),  # an address cannot be another site's name
        ("[::1]:8000", 200),
        ("[fe80::1%25eth0]:8000", 200),
        ("rebound.example", 400),
        ("rebound.example:8000", 400),
        ("localhost.rebound.example", 400),
        ("127.0.0.1.rebound.example", 400),
        ("192.168.1.20.nip.io", 400),
        ("1.2.3", 400),
        ("[::1", 400),
        (":8000", 400),
        ("", 400),
    ],
)
def test_other_names_are_refused(client, host, status):
    assert client.get("/api/about", headers={"Host": host}).status_code == status
    assert client.get("/", headers={"Host": host}).status_code == status


_hosts = st.one_of(st.ip_addresses().map(str), st.text(st.characters(max_codepoint=255), max_size=30))


@given(_hosts | st.from_regex(r"[a-z0-9.:\[\]-]{1,30}", fullmatch=True))
@example("desk.example:80")
@example("desk.example.:80")
def test_a_host_is_an_address_or_a_known_name(host):
    checked = guard.Guard(None, guard.Rate(10**9), {"desk.example"})
    headers = Headers({"host": f"[{host}]" if host.count(":") > 1 and "[" not in host else host})
    allowed = checked._refusal({"type": "http", "path": "/", "headers": headers.raw}) is None
    named = guard._host(headers["host"])
    with contextlib.suppress(ValueError):
        assert allowed == (named == "desk.example" or bool(ipaddress.ip_address(named)))
        return
    assert allowed == (named == "desk.example")


def test_a_host_that_was_given_is_known_by_its_names(state, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "Desk.Lab.Example")
    monkeypatch.setattr(socket, "getfqdn", lambda: "desk.lab.example")
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1"):
        assert server.names_of(host) == {"localhost"}
    for host in ("0.0.0.0", "::", "192.168.1.20"):
        assert server.names_of(host) == {"localhost", host, "desk.lab.example", "desk.local"}
    assert "pictures.example" in server.names_of("Pictures.Example")
    with TestClient(app.make_app(state, server.names_of("0.0.0.0")), base_url="http://desk.local:8000") as client:
        assert client.get("/api/about").status_code == 200
        assert client.get("/api/about", headers={"Host": "rebound.example"}).json() == {
            "error": "this page is not at 'rebound.example'; open its address, or let it listen at rebound.example"
        }


def test_the_page_may_load_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = Path(app.__file__).parents[1] / "assets" / "app"
    for file in page.iterdir():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", file.read_text()), file


def test_floods_are_refused_and_time_heals(state, monkeypatch):
    monkeypatch.setattr(limits, "REQUESTS_PER_MINUTE", 5)
    monkeypatch.setattr(routes, "Rate", functools.partial(guard.Rate, clock=lambda: 0.0))
    with TestClient(app.make_app(state), base_url="http://localhost") as other:
        answers = [other.get("/api/about") for _ in range(8)]
        page = other.get("/")
    assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 3
    assert int(answers[-1].headers["Retry-After"]) >= 1
    assert page.status_code == 200
    clock = itertools.count()
    monkeypatch.undo()
    rate = guard.Rate(60, clock=lambda: next(clock) / 10)  # a tenth of a second between requests regains a tenth of one
    waits = [rate.wait("a") for _ in range(70)]
    assert waits[:60] == [0.0] * 60
    assert 0 < waits[-1] <= 1
    assert rate.wait("b") == 0.0
    for _ in range(20):
        next(clock)
    assert rate.wait("a") == 0.0


def test_a_port_that_is_taken(command):
    with app.listen("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        code, _, err = command("app", "--port", port)
    message = f"cannot listen at 127.0.0.1:{port}: Address already in use; try another port"
    assert (code, err) == (2, f"clipkit: {message}\n")


@pytest.mark.parametrize("host", ["", "no such host", "nowhere.invalid", "a" * 300, "寿司" * 40, "[::1]", "1.2.3.4.5"])
def test_a_host_that_is_none(host, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    if host.isascii() and len(host) < 64:  # which a resolver is asked about, over the network as it may be
        monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UsageError, match=r"the host .* cannot be resolved: ") as error:
        app.listen(host, 0)
    assert "\n" not in str(error.value)


def test_a_host_of_another_machine():
    with pytest.raises(UsageError, match=r"cannot listen at 192\.0\.2\.1:0: .*; try another host"):  # RFC 5737
        app.listen("192.0.2.1", 0)


def test_it_listens_at_an_address_of_the_newer_kind():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 here")
    with app.listen("::1", 0) as listening:
        assert listening.getsockname()[0] == "::1"


def test_the_command_needs_its_extra(command, monkeypatch):
    import clipkit

    monkeypatch.delattr(clipkit, "app", raising=False)
    for name in [name for name in sys.modules if name.startswith("clipkit.app")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = command("app")
    assert (code, err) == (2, 'clipkit: the page needs uvicorn: pip install "clipkit[app]"\n')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no folder at {}"),
        (lambda folder: folder.write_text("a file"), "no folder at {}"),
        (lambda folder: folder.mkdir(), "{} holds no images (JPEG, PNG or WebP)"),
    ],
)
def test_a_folder_without_pictures(command, tmp_path, make, message):
    make(tmp_path / "pictures")
    code, _, err = command("app", "--images", tmp_path / "pictures", "--port", 0)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert err.startswith(f"clipkit: {message.format(tmp_path / 'pictures')}"[:-1])


def test_a_folder_that_may_not_be_read(command, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()

    def refuse(source):
        raise PermissionError(13, "Permission denied", source)

    monkeypatch.setattr("clipkit.app.state.open_gallery", refuse)
    code, _, err = command("app", "--images", tmp_path / "pictures", "--port", 0)
    assert (code, err) == (1, f"clipkit: {tmp_path / 'pictures'}: Permission denied\n")


def test_pictures_that_cannot_be_read_are_counted(tmp_path, capsys):
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"none of the 2 pictures of .* can be read \(2 not an image\)"):
        app.AppState.open(DEFAULT_MODEL, str(tmp_path), "cpu")
    (tmp_path / "c.png").write_bytes(picture()[1])
    capsys.readouterr()
    state = app.AppState.open(DEFAULT_MODEL, str(tmp_path), "cpu")
    assert capsys.readouterr().err == f"2 of 3 pictures of {tmp_path} are skipped (2 not an image)\n"
    with TestClient(app.make_app(state), base_url="http://localhost") as client:
        assert client.get("/api/about").json()["pictures"] == 1
        assert client.get("/api/some/4").json() == {"rows": [2]}  # the one that can be shown
        assert client.get("/api/picture/2").status_code == 200
        assert client.get("/api/picture/0").json() == {
            "error": "a.png: not an image: no readable JPEG, PNG, WEBP header in 10 bytes"
        }
        assert len(client.post("/api/search", data={"text": "a rocket"}).json()["hits"]) == 1


def test_a_model_that_cannot_draw_is_named_once(chain, packs, capsys):
    state = app.AppState.open(str(chain / "clip"), str(packs / "heldout"), "cpu")
    assert isinstance(state.pipeline, str)
    assert state.pipeline in capsys.readouterr().err.splitlines()
    with pytest.raises(CheckpointError, match="is not a model"):
        app.AppState.open(str(packs), str(packs / "heldout"), "cpu")


def test_a_cache_that_cannot_be_made(command, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("clipkit.app.state.CACHE", tmp_path / "file" / "clipkit")
    code, _, err = command("app", "--port", 0)
    assert (code, err) == (1, f"clipkit: {tmp_path / 'file' / 'clipkit' / 'drawings'}: Not a directory\n")


@pytest.fixture(scope="module")
def served():
    """The command itself, on a free port -> its address and process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "clipkit", "app", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        address = next((line.split()[0] for line in process.stderr if line.startswith("http://")), None)
        assert address is not None
        yield types.SimpleNamespace(address=address, pid=process.pid)
        process.send_signal(2)  # Ctrl-C
        assert process.wait(HANG) == 0
        assert process.stderr.read() == ""


def _memory(pid, field):
    """MiB that a process has (VmRSS), or had at most (VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _sent(address, data):
    between = "between-the-parts"
    head = f'--{between}\r\nContent-Disposition: form-data; name="picture"; filename="a.png"\r\n\r\n'
    body = head.encode() + data + f"\r\n--{between}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={between}"}
    request = urllib.request.Request(f"{address}/api/search", body, kind)
    try:
        with urllib.request.urlopen(request, timeout=HANG) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux's /proc")
def test_twenty_pictures_of_many_pixels_take_the_memory_of_two_and_give_it_back(served):
    allowed, beyond = (encoded(Image.new("1", (side, side))) for side in (4000, 7000))
    assert len(beyond) < 8000
    with concurrent.futures.ThreadPoolExecutor(20) as many:

        def send(data):
            return set(many.map(functools.partial(_sent, served.address), [data] * 20))

        assert _sent(served.address, allowed) == 200
        Path(f"/proc/{served.pid}/clear_refs").write_text("5")  # forget the peak so far
        before = _memory(served.pid, "VmRSS")
        assert send(beyond) == {400}
        assert _memory(served.pid, "VmHWM") - before < 150
        assert send(allowed) == {200}
    # 16 megapixels are 80 MB as they are converted: 160 for two, 1,600 for twenty.
    assert _memory(served.pid, "VmHWM") - before < 500
    assert _memory(served.pid, "VmRSS") - before < 150


@pytest.fixture
def open_page():
    """Open an address in headless Chromium; whatever the page logs or fails to load fails the test."""
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api")
    faults = []
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=shutil.which(browser), args=["--no-sandbox"], timeout=0)

        def show(address):
            page = chromium.new_page(viewport={"width": 1000, "height": 1100})
            page.set_default_timeout(1000 * HANG / 2)
            page.on("console", lambda message: faults.append(message.text))
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.goto(address)
            return page

        yield show
        chromium.close()
    assert faults == []


@pytest.fixture
def page(open_page, served):
    return open_page(served.address)


def test_the_four_tabs_in_a_browser(page, tmp_path):
    _, data = picture(size=96)
    (tmp_path / "rocket.png").write_bytes(data)

    page.wait_for_selector("#about:has-text('clipkit-tiny')")
    page.click("#classify button:text-is('Classify')")
    page.wait_for_selector("#classify output.wrong:text-is('choose a picture first')")
    page.set_input_files("#classify input[name=picture]", tmp_path / "rocket.png")
    page.click("#classify button:text-is('Classify')")
    page.wait_for_selector("#classify .bars li")
    assert page.locator("#classify .bars li").count() == 5

    page.click("#tab-search")
    page.fill("#search [name=text]", "a blue heart")
    page.press("#search [name=text]", "Enter")
    page.wait_for_selector("#search .hits figure")
    assert "blue heart.png" in page.locator("#search .hits span").first.text_content()

    page.click("#tab-draw")
    page.fill("#draw [name=n]", "4")
    page.fill("#draw [name=steps]", "10")
    page.click("#draw button:text-is('Draw')")
    page.wait_for_selector("#draw output:text-is('done')")
    assert page.locator("#draw figcaption").text_content().startswith("CLIP scores")
    assert page.evaluate("document.querySelector('#draw img').naturalWidth") > 100

    page.fill("#draw [name=prompt]", "a giraffe")
    page.click("#draw button:text-is('Draw')")
    page.wait_for_selector("#draw output:has-text('guessed'):has-text('\"giraffe\"')")

    page.click("#tab-compare")
    page.click("#compare .example")
    page.wait_for_selector("#compare .drop span:text-is('4 pictures')")
    page.click("#compare button:text-is('Compare')")
    page.wait_for_selector("#compare tbody tr")
    assert page.locator("#compare td").count() == 16
    page.keyboard.press("Tab")
    page.focus("#tab-compare")
    page.keyboard.press("ArrowRight")  # around to the first
    assert page.get_attribute("#tab-classify", "aria-selected") == "true"
    assert page.is_visible("#classify")
    assert not page.is_visible("#compare")


def test_what_comes_back_is_text_not_markup(page):
    page.wait_for_selector("#about:has-text('clipkit-tiny')")
    page.click("#classify .example")
    page.wait_for_selector("#classify .drop img:visible")
    page.fill("#classify [name=labels]", "<b>bold</b>, plain")
    page.click("#classify button:text-is('Classify')")
    page.wait_for_selector("#classify .bars li")
    assert "<b>bold</b>" in page.locator("#classify .bars").inner_text()


@contextlib.contextmanager
def serving(state):
    """The page of `state` from a thread -> its address."""
    with app.listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(app.make_app(state), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def test_the_preview_is_live_and_a_drawing_can_be_stopped(open_page, state):
    """The drawing waits after its first step until it has been stopped."""
    stopped = threading.Event()

    class Waiting:
        def __getattr__(self, name):
            return getattr(state.pipeline, name)

        def draw(self, *words, watch, **options):
            def watched(x0):
                watch(x0)
                assert stopped.wait(HANG)

            return state.pipeline.draw(*words, watch=watched, **options)

    with serving(dataclasses.replace(state, pipeline=Waiting())) as address:
        page = open_page(address)
        page.click("#tab-draw")
        page.click("#draw button:text-is('Draw')")
        page.wait_for_selector("#draw output:text-is('step 1 of 25')")
        assert page.evaluate("document.querySelector('#draw img').src").startswith("data:image/png")
        page.click("#draw .stop")
        page.wait_for_selector("#draw output:text-is('stopped')")
        stopped.set()


def test_the_last_of_words_and_picture_is_what_is_searched_for(page, tmp_path):
    (tmp_path / "rocket.png").write_bytes(picture(size=96)[1])
    page.click("#tab-search")
    page.fill("#search [name=text]", "a blue heart")
    page.set_input_files("#search input[name=picture]", tmp_path / "rocket.png")
    assert page.input_value("#search [name=text]") == ""
    page.click("#search button:text-is('Search')")
    page.wait_for_selector("#search .hits figure")
    page.fill("#search [name=text]", "a blue heart")
    assert page.is_hidden("#search .drop img")
    page.wait_for_selector("#search .drop span:text-is('Or drop a picture like it here')")
    page.click("#search button:text-is('Search')")
    page.wait_for_selector("#search .hits span:has-text('blue heart.png')")


@pytest.mark.parametrize("width", [320, 390, 768])
def test_it_fits_a_narrow_window(page, width):
    page.set_viewport_size({"width": width, "height": 700})
    long = "a-label-without-any-space-" * 10

    def fits():
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width

    page.wait_for_selector("#about:has-text('clipkit-tiny')")
    page.click("#classify .example")
    page.wait_for_selector("#classify .drop img:visible")
    page.fill("#classify [name=labels]", f"{long}, cat")
    fits()
    page.click("#classify button:text-is('Classify')")
    page.wait_for_selector("#classify .bars li")
    fits()
    page.evaluate(f"document.querySelector('#classify output').textContent = {long!r}")
    fits()
    page.click("#tab-search")
    page.fill("#search [name=text]", "a star")
    page.press("#search [name=text]", "Enter")
    page.wait_for_selector("#search .hits figure")
    fits()
    page.click("#tab-draw")
    fits()
    page.fill("#draw [name=n]", "16")
    page.fill("#draw [name=steps]", "2")
    page.click("#draw button:text-is('Draw')")
    page.wait_for_selector("#draw figcaption:has-text('CLIP scores')")
    fits()
    page.click("#tab-compare")
    page.click("#compare .example")
    page.wait_for_selector("#compare .drop span:text-is('4 pictures')")
    page.fill("#compare [name=texts]", f"{long}\na star")
    page.click("#compare button:text-is('Compare')")
    page.wait_for_selector("#compare tbody tr")
    fits()
