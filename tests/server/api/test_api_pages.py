"""The dashboard: what it shows, that it escapes, and that it asks nobody else for anything."""

import re
from html.parser import HTMLParser

import pytest

from server.api.pages import WEB, number

NAME = "<script>alert('x')</script>\"'&"


class Page(HTMLParser):
    """Elements, their attributes, and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


@pytest.fixture
def hostile(client, store, spec, make_unit_result):
    """A job whose every free text is an attack, with two units and an error event."""
    spec |= {"name": NAME, "labels": {"x": NAME}}
    job_id = client.post("/v1/jobs", json=spec).json()["id"]
    store.record_unit(job_id, make_unit_result(0, None, location=f"runs/{NAME}", spec=spec))
    store.record_unit(job_id, make_unit_result(1, 200, {"update": ["no_crossing"]}, spec=spec))
    store.append_event(
        job_id, "unit.retrying", {"unit_id": NAME, "index": 2, "code": "x", "message": NAME}
    )
    return job_id


@pytest.mark.parametrize("path", ["/", "/jobs/{id}"])
def test_hostile_names_are_text(client, hostile, path):
    answer = client.get(path.format(id=hostile))
    assert answer.status_code == 200
    page = Page(answer.text)
    scripts = [attrs for tag, attrs in page.elements if tag == "script"]
    assert scripts == [{"src": "/static/app.js", "defer": None}]
    assert NAME in page.text
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)


def test_a_job_page_shows_results_outcomes_and_what_to_follow(client, hostile):
    page = Page(client.get(f"/jobs/{hostile}").text)
    assert "20.00" in page.text  # lambda_c = 2 / 0.1
    assert "no_crossing" in page.text
    assert "2 of 3 checkpoints" in page.text
    (progress,) = [attrs for tag, attrs in page.elements if tag == "progress"]
    assert (progress["max"], progress["value"]) == ("3", "2")
    (main,) = [attrs for tag, attrs in page.elements if tag == "main"]
    assert main["data-events"] == f"/v1/jobs/{hostile}/events?after=4"
    (image,) = [attrs for tag, attrs in page.elements if tag == "img"]
    assert client.get(image["src"]).headers["content-type"] == "image/svg+xml"
    assert image["alt"]


def test_an_ended_job_is_not_followed_and_cannot_be_cancelled(client, submitted):
    client.post(f"/v1/jobs/{submitted}/cancel")
    page = Page(client.get(f"/jobs/{submitted}").text)
    assert not any("data-events" in attrs for _, attrs in page.elements)
    assert not any(tag == "button" for tag, _ in page.elements)


def test_the_list_pages_through_every_job(client, spec):
    ids = [client.post("/v1/jobs", json=spec).json()["id"] for _ in range(30)]
    page = Page(client.get("/").text)
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    older = next(link for link in links if "after=" in link)
    links += [attrs["href"] for tag, attrs in Page(client.get(older).text).elements if tag == "a"]
    assert [f"/jobs/{job_id}" in links for job_id in ids] == [True] * 30
    assert "No job here" in Page(client.get("/?status=failed").text).text


def test_the_api_page_lists_every_operation(client):
    text = Page(client.get("/docs").text).text
    for path in client.get("/openapi.json").json()["paths"]:
        assert path in text
    assert "CheckpointSeriesSpec" in text


@pytest.mark.parametrize("path", ["/", "/docs", "/login", "/jobs/{id}"])
def test_pages_load_nothing_from_elsewhere(client, submitted, path):
    page = Page(client.get(path.format(id=submitted)).text)
    for _, attrs in page.elements:
        assert "style" not in attrs  # the policy would ignore it
        for name in ("src", "href", "srcset", "action"):
            assert attrs.get(name, "/").startswith(("/", "#"))
    for file in WEB.iterdir():
        found = set(re.findall(r"https?://[^\"']+", file.read_text()))
        assert found <= {"http://www.w3.org/2000/svg"}  # a name, never fetched


def test_static_files_are_these_and_no_others(client):
    assert client.get("/static/icon.svg").headers["content-type"] == "image/svg+xml"
    assert client.get("/static/app.js").headers["content-type"].startswith("text/javascript")
    assert client.get("/static/style.css").headers["content-type"].startswith("text/css")
    for name in ("job.html", "..%2Fapi%2Fapp.py", "../api/app.py", ""):
        assert client.get(f"/static/{name}").status_code == 404


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "\u2014"), (0.0, "0"), (19.42, "19.42"), (346.0, "346.0"), (123456.0, "1.235e+05"),
     (0.012345, "0.01235"), (1e-9, "1.000e-09"), (99999.6, "100000")],
)  # fmt: skip
def test_numbers_for_people(value, shown):
    assert number(value) == shown
