import bz2
import gzip
import io
import lzma
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.data.files import Files
from clipkit.data.images import OTHER_SUFFIXES, SUFFIXES
from clipkit.data.sources import pictures
from clipkit.errors import DataError, SampleError
from clipkit.zeroshot.galleries import open_gallery


def put(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def tar_of(members, kind=""):
    """Bytes of a tar of (name, content) or (name, type, target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as tar:
        for name, *rest in members:
            info = tarfile.TarInfo(name)
            if isinstance(rest[0], bytes) and len(rest) == 1:
                info.size = len(rest[0])
                tar.addfile(info, io.BytesIO(rest[0]))
            else:
                info.type, info.linkname = rest
                tar.addfile(info)
    return buffer.getvalue()


def found(source):
    """What is read and what is not: {name: bytes}, {name: reason}."""
    files = Files(source)
    read = {file.name: file.read() for file in files}
    assert list(read) == files.names
    return read, dict(files.aside)


def test_every_suffix_is_read_or_counted(tmp_path):
    for suffix in (*SUFFIXES, *OTHER_SUFFIXES, ".txt", ""):
        put(tmp_path / f"a/x{suffix}")
        put(tmp_path / f"a/Y{suffix.upper()}")
    read, aside = found(tmp_path)
    assert set(read) == {f"a/{n}" for s in SUFFIXES for n in (f"x{s}", f"Y{s.upper()}")}
    assert list(aside.values()).count("other format") == 2 * len(OTHER_SUFFIXES)
    assert list(aside.values()).count("not an image") == 4
    assert not set(SUFFIXES) & set(OTHER_SUFFIXES)


def test_links_are_followed_and_circles_end(tmp_path):
    put(tmp_path / "store/red/0.jpg", b"red")
    put(tmp_path / "store/blue/0.jpg", b"blue")
    top = tmp_path / "top"
    (top / "blue").mkdir(parents=True)
    (top / "red").symlink_to("../store/red")
    (top / "crimson").symlink_to(tmp_path / "store/red")  # a second name is no circle
    (top / "blue/0.jpg").symlink_to("../../store/blue/0.jpg")
    (top / "blue/all").symlink_to("..")
    (top / "blue/self.jpg").symlink_to("self.jpg")
    (top / "gone").symlink_to("../store/green")
    read, aside = found(top)
    assert read == {"blue/0.jpg": b"blue", "crimson/0.jpg": b"red", "red/0.jpg": b"red"}
    assert aside == {"blue/all": "link in a circle", "blue/self.jpg": "broken link", "gone": "broken link"}


def test_two_folders_that_link_to_each_other(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        put(tmp_path / name / "0.jpg")
        (tmp_path / name / "link").symlink_to(f"../{other}")
    read, aside = found(tmp_path)
    assert set(read) == {"a/0.jpg", "a/link/0.jpg", "b/0.jpg", "b/link/0.jpg"}
    assert set(aside.values()) == {"link in a circle"}


def test_what_is_no_regular_file_is_counted_and_never_waited_for(tmp_path):
    put(tmp_path / "a/0.jpg")
    (tmp_path / "a/folder.jpg").mkdir()
    os.mkfifo(tmp_path / "a/pipe.jpg")
    put(tmp_path / "a/St. Bernard.png/0.jpg")  # a folder all the same
    read, aside = found(tmp_path)
    assert set(read) == {"a/0.jpg", "a/St. Bernard.png/0.jpg"}
    assert aside == {"a/folder.jpg": "unreadable file", "a/pipe.jpg": "unreadable file"}


def test_a_file_that_cannot_be_read_is_one_bad_picture(tmp_path, monkeypatch, capsys):
    for name in ("a/0.jpg", "a/1.jpg", "locked/0.jpg"):
        put(tmp_path / name)
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    files = Files(tmp_path)
    (tmp_path / "a/1.jpg").unlink()
    good, bad = files
    assert good.read() == b"x"
    with pytest.raises(SampleError, match=r"^unreadable file: .*1\.jpg: No such file"):
        bad.read()
    assert files.aside == [("locked", "unreadable file")]
    assert dict(pictures(str(tmp_path))) == {"a/0.jpg": b"x"}
    assert capsys.readouterr().err == f"clipkit: {tmp_path}: not taken: 1 unreadable file\n"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
def test_an_error_of_the_disk(tmp_path):
    put(tmp_path / "0.jpg")
    (tmp_path / "1.jpg").symlink_to("/proc/self/mem")
    with pytest.raises(SampleError, match="Input/output error"):
        list(Files(tmp_path))[1].read()


def test_names_that_are_not_utf8(tmp_path):
    put(tmp_path / os.fsdecode(b"caf\xe9/0.jpg"))
    files = Files(tmp_path)
    assert (len(files.names), len(files.fingerprint)) == (1, 64)


def test_index_and_metrics_say_what_they_do_not_take(tmp_path, capsys):
    put(tmp_path / "0.jpg")
    put(tmp_path / "1.gif")
    line = f"clipkit: {tmp_path}: not taken: 1 other format\n"
    assert len(open_gallery(str(tmp_path))) == 1
    assert capsys.readouterr().err == line
    assert [name for name, _ in pictures(str(tmp_path))] == ["0.jpg"]
    assert capsys.readouterr().err == line
    assert len(open_gallery(str(tmp_path), quietly=True)) == 1  # as search opens it
    assert capsys.readouterr().err == ""


def test_the_fingerprint_is_of_pictures(tmp_path):
    def fingerprint():
        return Files(tmp_path).fingerprint

    put(tmp_path / "a/0.jpg", b"1")
    os.utime(tmp_path / "a/0.jpg", ns=(0, 0))
    seen = {fingerprint()}
    put(tmp_path / "a/notes.txt")
    assert fingerprint() in seen  # nothing that would be packed
    for change in (
        lambda: put(tmp_path / "a/1.jpg"),
        lambda: put(tmp_path / "a/0.jpg", b"2"),  # of the same size
        lambda: (tmp_path / "a/1.jpg").rename(tmp_path / "a/2.jpg"),
        lambda: (tmp_path / "a/2.jpg").unlink(),
    ):
        change()
        assert fingerprint() not in seen
        seen.add(fingerprint())
    (tmp_path / "x.tar").write_bytes(tar_of([("a/0.jpg", b"1")]))
    before = Files(tmp_path / "x.tar").fingerprint
    (tmp_path / "x.tar").write_bytes(tar_of([("a/0.jpg", b"1"), ("a/1.jpg", b"1")]) + bytes(512))
    assert Files(tmp_path / "x.tar").fingerprint != before


@pytest.mark.parametrize("kind", ["", "gz", "bz2", "xz"])
@pytest.mark.parametrize("padding", [0, 512, 20480])
def test_tars_behind_each_other_are_read(tmp_path, kind, padding):
    press = {"": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind]
    one, two = (tar_of([(f"{n}/0.jpg", n.encode() * 700)]) for n in "ab")
    expected = {"a/0.jpg": b"a" * 700, "b/0.jpg": b"b" * 700}
    for data in (press(one + bytes(padding) + two), press(one + bytes(padding)) + press(two)):
        (tmp_path / "x.tar").write_bytes(data)
        assert found(tmp_path / "x.tar") == (expected, {})


@pytest.mark.parametrize("kind", ["", "gz", "xz"])
def test_whatever_else_is_behind_the_end_or_cut_is_damage(tmp_path, kind):
    press = {"": bytes, "gz": gzip.compress, "xz": lzma.compress}[kind]
    sound = tar_of([("a/0.jpg", b"a" * 700), ("a/1.jpg", b"b" * 700)])
    for data in (press(sound + b"more"), press(sound + b"m" * 512), press(sound[:3000]), press(sound[:2100])):
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(DataError, match="neither a folder nor a readable tar"):
            found(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(press(sound)[:-600])
    if kind:
        with pytest.raises(DataError, match="neither a folder nor a readable tar"):
            found(tmp_path / "x.tar")


def test_damage_in_a_compressed_picture_is_no_traceback(tmp_path):
    data = bytearray(gzip.compress(tar_of([("a/0.jpg", os.urandom(50_000))]), 0))
    data[25_000] ^= 255
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(DataError, match="neither a folder nor a readable tar: CRC check failed"):
        found(tmp_path / "x.tar")


def test_links_in_tars_lead_to_what_is_in_them(tmp_path):
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    content = [
        ("top/red/first.jpg", soft, "../../store/0.jpg"),  # its target comes later
        ("top/store/x.jpg", b"x"),
        ("store/0.jpg", b"0"),
        ("top/red/hard.jpg", hard, "store/0.jpg"),
        ("top/red/twice.jpg", soft, "first.jpg"),
        ("top/blue", soft, "../store"),
        ("top/red/gone.jpg", soft, "nothing.jpg"),
        ("top/red/loop.jpg", soft, "loop.jpg"),
        ("top/red/out.jpg", soft, "/etc/passwd"),
        ("top/red/0.gif", soft, "../../store/0.jpg"),
        ("top/red/._0.jpg", soft, "../../store/0.jpg"),
    ]
    for kind in ("", "gz"):
        (tmp_path / "x.tar").write_bytes(tar_of(content, kind))
        read, aside = found(tmp_path / "x.tar")
        assert read == {
            "top/store/x.jpg": b"x",
            "store/0.jpg": b"0",
            **dict.fromkeys(["top/red/first.jpg", "top/red/hard.jpg", "top/red/twice.jpg", "top/blue/0.jpg"], b"0"),
        }
        broken = [f"top/red/{n}.jpg" for n in ("gone", "loop", "out")]
        assert aside == {"top/red/0.gif": "other format", **dict.fromkeys(broken, "broken link")}


def test_names_in_tars(tmp_path):
    content = [
        ("./a/0.jpg", b"0"),
        ("/b/0.jpg", b"1"),
        ("../c/0.jpg", b"2"),
        ("a//../a/1.jpg", b"3"),
        ("._a/0.jpg", b""),
    ]
    (tmp_path / "x.tar").write_bytes(tar_of(content))
    read, aside = found(tmp_path / "x.tar")
    assert read == {"a/0.jpg": b"0", "b/0.jpg": b"1", "a/1.jpg": b"3"}
    assert aside == {"../c/0.jpg": "unsafe name"}


def test_a_pipe_is_no_source(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe or device, which cannot be read twice"):
        Files(tmp_path / "pipe")


@given(st.lists(st.sampled_from(["a/0.jpg", "a/b/0.png", "a.b/0.jpg", "a b/0.jpg", "a/0.gif", "c/._0.jpg", "c/d.txt"])))
def test_a_tar_has_what_its_folder_has(anywhere, names):
    names, folder = sorted(set(names)), anywhere / f"{len(list(anywhere.iterdir()))}"
    folder.mkdir()
    for name in names:
        put(folder / name, name.encode())
    (folder / "x.tar").write_bytes(tar_of([(name, name.encode()) for name in names]))
    inside = found(folder / "x.tar")
    (folder / "x.tar").unlink()
    assert found(folder) == inside


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory):
    return tmp_path_factory.mktemp("t")


def test_links_inside_a_linked_folder_of_a_tar(tmp_path):
    soft = tarfile.SYMTYPE
    content = [
        ("cat/1.png", b"cat"),
        ("dog/1.png", b"dog"),
        ("dog/2.png", soft, "../cat/1.png"),
        ("wolf", soft, "dog"),
        ("fox/1.png", soft, "../wolf/2.png"),  # by way of a linked folder
    ]
    (tmp_path / "x.tar").write_bytes(tar_of(content, ""))
    read, aside = found(tmp_path / "x.tar")
    cats = dict.fromkeys(["cat/1.png", "dog/2.png", "wolf/2.png", "fox/1.png"], b"cat")
    assert (read, aside) == ({**cats, "dog/1.png": b"dog", "wolf/1.png": b"dog"}, {})
