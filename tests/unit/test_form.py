"""Forms as clients write them, as nobody should, and as an attacker would."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import BadRequest, RequestError, TooLarge
from server.form import MAX_FIELDS, MAX_HEAD_BYTES, files_of

TYPE = "multipart/form-data; boundary=x"
SIZE = 20_000_000
HEAD = b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


def form(*parts: bytes) -> bytes:
    return b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + b"--x--\r\n"


def read(body: bytes, content_type: str = TYPE, max_files: int = 256) -> list[tuple[str, bytes]]:
    return list(files_of(body, content_type, max_files))


def test_a_form_as_curl_sends_it() -> None:
    boundary = b"------------------------d74496d66958873e"
    body = (
        b"--" + boundary + b'\r\nContent-Disposition: form-data; name="file"; filename="a \\"b\\".png"\r\n'
        b"Content-Type: image/png\r\n\r\n\x89PNG\r\n--\r\n\r\n--" + boundary + b"--\r\n"
    )
    content_type = f"multipart/form-data; boundary={boundary.decode()}"
    assert read(body, content_type) == [("image/png", b"\x89PNG\r\n--\r\n")]


def test_a_form_as_browsers_and_libraries_send_it() -> None:
    body = form(
        b'content-disposition: form-data; name="note"\r\n\r\nhello',
        b"Content-Type: image/jpeg; q=1\r\nContent-Disposition: form-data; name=file; filename=b\r\n\r\n\r\n--y\r\n",
        b"Content-Disposition: form-data; NAME=\"file\"; filename*=UTF-8''%c3%a9\r\nX-More: 1\r\n\r\n",
        b'Content-Disposition: form-data; name="other"; filename="c"\r\n\r\nc',
        b'Content-Disposition: form-data; name="file"\r\n\r\nno file name',
        b"\r\nno head",
    )
    for given_body in (body, b"a preamble\r\n" + body, body + b"what follows\r\n--x\r\n", body.removesuffix(b"\r\n")):
        assert read(given_body) == [("image/jpeg; q=1", b"\r\n--y\r\n"), ("", b"")]


@pytest.mark.parametrize(
    "content_type",
    [
        "Multipart/Form-Data; Boundary=x",
        'multipart/form-data; boundary="x"',
        'multipart/form-data; charset="utf-8"; boundary=x',
        'multipart/form-data;boundary="\\x"',
    ],
)
def test_the_boundary_is_found(content_type: str) -> None:
    assert read(form(HEAD + b"1", HEAD + b"2"), content_type) == [("", b"1"), ("", b"2")]


BAD = {
    "no boundary": (form(HEAD), "multipart/form-data", "boundary is ''"),
    "an empty one": (form(HEAD), 'multipart/form-data; boundary=""', "1 to 70"),
    "a long one": (form(HEAD), f"multipart/form-data; boundary={'x' * 71}", "1 to 70"),
    "another one": (form(HEAD), "multipart/form-data; boundary=y", "'y' is not in the body"),
    "no part": (b"nothing", TYPE, "not in the body"),
    "a longer one": (form(HEAD).replace(b"--x\r", b"--xy\r"), TYPE, "part 1"),
    "no head": (b"--x\r\n--x--\r\n", TYPE, "part 1"),
    "a long head": (form(b"X: " + b"a" * MAX_HEAD_BYTES + HEAD), TYPE, str(MAX_HEAD_BYTES)),
    "no end": (form(HEAD)[: -len("--x--\r\n")], TYPE, "within part 1"),
    "no second end": (form(HEAD, HEAD)[:-9], TYPE, "within part 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_form_is_refused_in_one_sentence(case: str) -> None:
    body, content_type, named = BAD[case]
    with pytest.raises(BadRequest) as refusal:
        read(body, content_type)
    assert named in refusal.value.detail
    assert refusal.value.detail.endswith(".")


def test_parts_are_counted_and_not_only_files() -> None:
    field = b'Content-Disposition: form-data; name="a"\r\n\r\n1'
    assert len(read(form(*[field] * MAX_FIELDS, *[HEAD] * 3), max_files=3)) == 3
    for part in (field, HEAD):
        with pytest.raises(TooLarge, match=rf"{MAX_FIELDS + 4} parts or more; the limit is {MAX_FIELDS + 3}: send"):
            read(form(*[part] * (MAX_FIELDS + 4)), max_files=3)


HOSTILE = {
    "boundaries": b"--x\r\n" * (SIZE // 5),
    "empty parts": b"--x\r\n\r\n" * (SIZE // 7),
    "small files": form(*[HEAD + b"1"] * (SIZE // 80)),
    "headers": b"--x\r\n" + b"a:b\r\n" * (SIZE // 5),
    "parameters": b"--x\r\nContent-Disposition: form-data" + b"; a=b" * (SIZE // 5),
    "quotes": form(*[b"Content-Disposition: form-data" + b'; a="' * 1600 + b"\r\n\r\n"] * 400),
    "line ends": b"--x\r\n" + HEAD + b"\r\n" * (SIZE // 2),
    "dashes": b"--x\r\n" + HEAD + b"-" * SIZE,
    "near misses": b"--x\r\n" + HEAD + b"\r\n--" * (SIZE // 4),
    "padding": b"--x" + b" " * SIZE,
    "a preamble": b"\r\n--" * (SIZE // 4),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_form_of_a_million_trifles_is_refused_at_once(case: str) -> None:
    started = time.process_time()
    with pytest.raises(RequestError):
        read(HOSTILE[case])
    assert time.process_time() - started < 0.3


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.binary(max_size=30).filter(lambda part: b"\r\n--x" not in b"\r\n" + part), max_size=5))
def test_files_of_any_bytes_survive(contents: list[bytes]) -> None:
    assert [content for _, content in read(form(*[HEAD + content for content in contents]))] == contents


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from([b"--x", b"--", b"\r\n", b" ", HEAD, b"a", b'"', b";", b"\\"]), max_size=12))
def test_any_pieces_of_a_form_are_read_or_refused(pieces: list[bytes]) -> None:
    with suppress(RequestError):  # and nothing else is raised
        read(b"".join(pieces))
