"""Event streams, as the HTML standard's own examples and rules say."""

from hypothesis import given
from hypothesis import strategies as st

from clients.sse import ServerSentEvent, StreamState, parse_events, split_lines


def parsed(text: str, state: StreamState | None = None) -> list[ServerSentEvent]:
    return list(parse_events(split_lines([text.encode()]), state or StreamState()))


def test_the_standards_examples() -> None:
    # HTML standard, 9.2.6: three events; the second has no id of its own; the third is " third".
    text = ": test stream\n\ndata: first event\nid: 1\n\n"
    text += "data:second event\nid\n\ndata:  third event\n\n"
    assert [(e.id, e.data) for e in parsed(text)] == [
        ("1", "first event"),
        ("", "second event"),
        ("", " third event"),
    ]
    assert [e.data for e in parsed("data\n\ndata\ndata\n\ndata:")] == ["", "\n"]
    assert [e.data for e in parsed("data: YHOO\ndata: +2\ndata: 10\n\n")] == ["YHOO\n+2\n10"]


def test_an_event_cut_off_is_neither_seen_nor_remembered() -> None:
    state = StreamState()
    assert len(parsed("id: 1\ndata: a\n\nid: 2\ndata: b", state)) == 1
    assert state.last_event_id == "1"


def test_names_retry_and_heartbeats() -> None:
    state = StreamState()
    text = ": ping\n\nretry: 250\nretry: soon\nevent: unit.finished\ndata: x\n\n: ping\n\n"
    assert [e.event for e in parsed(text, state)] == ["unit.finished"]
    assert state.retry_s == 0.25


def test_an_id_without_data_counts_for_the_reconnect() -> None:
    state = StreamState()
    assert parsed("id: 7\n\n", state) == []
    assert state.last_event_id == "7"


@given(
    st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8")), max_size=8),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.integers(1, 7),
)
def test_lines_do_not_depend_on_how_bytes_arrive(
    lines: list[str], ending: bytes, size: int
) -> None:
    raw = b"".join(line.encode() + ending for line in lines) + b"."
    chunks = [raw[i : i + size] for i in range(0, len(raw), size)]
    assert list(split_lines(chunks)) == lines


def test_u2028_inside_a_text_ends_no_line() -> None:
    assert [e.data for e in parsed('data: "a\u2028b\x85c"\n\n')] == ['"a\u2028b\x85c"']
