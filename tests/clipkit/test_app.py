"""The page: what it answers, what it refuses, and that it works in a browser."""

import base64
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from clipkit import DEFAULT_MODEL, app, drawings, load
from clipkit.errors import UsageError
from clipkit.guidance.sheet import grid
from clipkit.zeroshot.similarity import classify, similarities

TEXTS = ("a red rocket", "a blue fish", "a green tree")


@pytest.fixture(scope="module")
def rooms():
    return app.Rooms.open(DEFAULT_MODEL, device="cpu")


@pytest.fixture
def client(rooms):
    with TestClient(app.make_app(rooms), base_url="http://localhost") as client:
        yield client


def picture(split="val", index=0, size=48):
    image = drawings.draw(split, 1, index, size=size).image
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return image, buffer.getvalue()


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


def test_draw_tells_each_step_and_ends_as_the_studio_does(client, rooms):
    wanted = {"prompt": "a red rocket", "n": 2, "steps": 4, "seed": 3, "negative": "a tree"}
    with client.stream("POST", "/api/draw", json=wanted) as answer:
        events = [json.loads(line) for line in answer.iter_lines()]
    assert [event.get("step") for event in events] == [1, 2, 3, 4, None]
    drawn = rooms.studio.draw("a red rocket", n=2, steps=4, seed=3, negative=["a tree"])
    last = events[-1]
    assert last["scores"] == drawn.scores
    shown = Image.open(io.BytesIO(base64.b64decode(last["picture"].partition(",")[2])))
    assert shown.tobytes() == grid(drawn.images).tobytes()


def test_a_drawing_that_nobody_listens_to_ends(client, rooms):
    steps = []

    class Watched:
        def draw(self, *words, watch, **options):
            def noted(x0):
                steps.append(1)
                watch(x0)

            return rooms.studio.draw(*words, watch=noted, **options)

    easel = app.Easel(Watched())

    async def leave():
        events = easel.draw(app.Wanted(prompt="a rocket", n=1, steps=100))
        await anext(events)
        await events.aclose()

    client.portal.call(leave)
    deadline = threading.Event()
    for _ in range(200):
        if not easel._present:
            break
        deadline.wait(0.05)
    assert easel._present == 0
    assert len(steps) < 100


def test_a_prompt_of_blanks_is_an_answer_in_the_stream(client):
    answer = client.post("/api/draw", json={"prompt": "  ", "n": 1, "steps": 1})
    assert json.loads(answer.text) == {"error": "the prompt is empty; say what to draw"}


def test_too_many_waiting(client, rooms):
    easel = app.Easel(rooms.studio)
    easel._present = app.MAX_WAITING + 1
    with pytest.raises(app.HTTPException, match="waiting already"):
        easel.draw(app.Wanted(prompt="a rocket"))


def test_a_model_without_denoiser_says_so(rooms):
    import dataclasses

    plain = dataclasses.replace(rooms, studio="this model cannot draw: there is no denoiser")
    with TestClient(app.make_app(plain), base_url="http://localhost") as client:
        assert client.get("/api/about").json()["cannot_draw"].startswith("this model cannot draw")
        answer = client.post("/api/draw", json={"prompt": "a rocket"})
    assert (answer.status_code, answer.json()["error"]) == (400, plain.studio)


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
            {"files": {"picture": picture()[1]}, "data": {"labels": "a" * 501, "template": "{}"}},
            422,
            "labels: string should have",
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
        ("prompt", "", "prompt: string should have at least 1 character"),
    ],
)
def test_a_drawing_has_limits(client, what, value, message):
    answer = client.post("/api/draw", json={"prompt": "a rocket", what: value})
    assert (answer.status_code, answer.json()["error"]) == (422, message)


def test_an_empty_search(client):
    assert client.post("/api/search", data={"text": " "}).json()["error"] == "describe a picture, or give one"


def test_pictures_that_are_not_there(client):
    assert client.get("/api/picture/100000").status_code == 404
    assert client.get("/api/picture/-1").status_code == 404
    assert client.get("/%2e%2e/%2e%2e/_version.py").status_code == 404


def test_too_much_at_once(client):
    answer = client.post("/api/search", content=b"x", headers={"Content-Length": str(app.MAX_BYTES + 1)})
    assert (answer.status_code, answer.json()["error"]) == (413, "that is 20.0 MB; at most 20 are taken")
    many = [("pictures", (f"{i}.png", picture()[1])) for i in range(17)]
    answer = client.post("/api/similarity", files=many, data={"texts": "a"})
    assert "at most 16 are compared" in answer.json()["error"]
    assert client.post("/api/search", content=iter([b"x"])).status_code == 411  # chunked: of unknown length


def test_other_sites_and_other_names_are_refused(client):
    assert client.get("/api/about", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.get("/api/about", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    assert client.get("/api/about", headers={"Host": "rebound.example"}).status_code == 400


def test_the_page_may_load_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = Path(app.__file__).parent / "data" / "app"
    for file in page.iterdir():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", file.read_text()), file


def test_floods_are_refused_and_time_heals(rooms, monkeypatch):
    monkeypatch.setattr(app, "REQUESTS_PER_MINUTE", 5)
    with TestClient(app.make_app(rooms), base_url="http://localhost") as other:
        answers = [other.get("/api/about") for _ in range(8)]
        page = other.get("/")
    assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 3
    assert int(answers[-1].headers["Retry-After"]) >= 1
    assert page.status_code == 200
    clock = itertools.count()
    rate = app.Rate(
        60, clock=lambda: next(clock) / 10
    )  # a tenth of a second between requests: a tenth of one is regained
    waits = [rate.wait("a") for _ in range(70)]
    assert waits[:60] == [0.0] * 60
    assert 0 < waits[-1] <= 1
    assert rate.wait("b") == 0.0
    for _ in range(20):
        next(clock)
    assert rate.wait("a") == 0.0


def test_a_port_that_is_taken(rooms):
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        with pytest.raises(UsageError, match=r"cannot listen at 127\.0\.0\.1:\d+: Address already in use; try another"):
            app.serve(rooms, "127.0.0.1", held.getsockname()[1])


def test_the_command_needs_its_extra(command, monkeypatch):
    import clipkit

    monkeypatch.delattr(clipkit, "app", raising=False)
    monkeypatch.delitem(sys.modules, "clipkit.app")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = command("app")
    assert (code, err) == (2, 'clipkit: the page needs uvicorn: pip install "clipkit[app]"\n')


def test_a_folder_without_pictures(command, tmp_path):
    code, _, err = command("app", "--images", tmp_path)
    assert (code, err) == (1, f"clipkit: {tmp_path} holds no images (JPEG, PNG or WebP)\n")


@pytest.fixture(scope="module")
def served():
    """The command itself, on a free port -> its address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "clipkit", "app", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        address = next((line.split()[0] for line in process.stderr if line.startswith("http://")), None)
        assert address is not None
        yield address
        process.send_signal(2)  # Ctrl-C
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


@pytest.fixture
def page(served):
    """The page in headless Chromium; whatever it logs or fails to load fails the test."""
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=shutil.which(browser), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1000, "height": 1100})
        faults = []
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(served)
        yield page
        chromium.close()
    assert faults == []


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
    page.wait_for_selector("#draw output:has-text('step')")  # the preview is live
    page.wait_for_selector("#draw output:text-is('done')", timeout=60_000)
    assert page.locator("#draw figcaption").text_content().startswith("CLIP scores")
    assert page.evaluate("document.querySelector('#draw img').naturalWidth") > 100

    page.fill("#draw [name=prompt]", "a giraffe")
    page.click("#draw button:text-is('Draw')")
    page.wait_for_selector("#draw output:has-text('guessed'):has-text('\"giraffe\"')", timeout=60_000)

    page.fill("#draw [name=steps]", "100")
    page.click("#draw button:text-is('Draw')")
    page.wait_for_selector("#draw output:has-text('step')")
    page.click("#draw .stop")
    page.wait_for_selector("#draw output:text-is('stopped')")

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
