"""Series are found from names and headers alone; the headers here are written by hand."""

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from probe.errors import CheckpointError, CheckpointUnavailableError, ConfigError
from probe.series import list_checkpoints, tokens_in_name
from probe.spec import GgufCheckpoint, HubCheckpoints, LocalCheckpoints


def write_safetensors(path: Path, **shapes: list[int]) -> None:
    """A float32 file of zeros: 8 bytes of header length, JSON, data."""
    header, offset = {}, 0
    for key, shape in shapes.items():
        size = 4
        for extent in shape:
            size *= extent
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(offset))


def write_checkpoint(directory: Path, *, moments: bool = False, state: dict | None = None) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    write_safetensors(directory / "model.safetensors", w=[3, 2])
    if moments:
        moment_shapes = {"w.exp_avg": [3, 2], "w.exp_avg_sq": [3, 2], "w.step": []}
        write_safetensors(directory / "optimizer.safetensors", **moment_shapes)
    if state is not None:
        (directory / "training_state.json").write_text(json.dumps(state))
    return directory


def steps(refs):
    return [ref.step for ref in refs]


@pytest.fixture
def run(tmp_path):
    for step in (1000, 20, 3, 100):
        write_checkpoint(tmp_path / f"step-{step}", moments=step > 3)
    (tmp_path / "step-log.txt").write_text("not a checkpoint")
    (tmp_path / "step-logs").mkdir()
    return tmp_path


def local(run, pattern="step-*", **options):
    return list_checkpoints(LocalCheckpoints(path=str(run / pattern), **options))


def test_orders_by_number_not_by_text(run):
    assert steps(local(run)) == [3, 20, 100, 1000]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every": 2}, [3, 100]),
        ({"first_step": 20}, [20, 100, 1000]),
        ({"last_step": 20}, [3, 20]),
        ({"first_step": 4, "every": 2}, [20, 1000]),
        ({"first_step": 100, "last_step": 100}, [100]),
    ],
)
def test_range_first_then_every_kth(run, options, expected):
    assert steps(local(run, **options)) == expected


def test_an_empty_range_lists_the_steps(run):
    with pytest.raises(CheckpointError, match="found steps 3, 20, 100, 1000"):
        local(run, first_step=2000)


def test_says_format_moments_and_size_from_headers(run):
    first, second = local(run)[:2]
    assert (first.format, first.has_moments) == ("safetensors", False)
    assert second.has_moments is True
    files = ("model.safetensors", "optimizer.safetensors")
    on_disk = sum((run / "step-20" / name).stat().st_size for name in files)
    assert second.size_bytes == on_disk


def test_one_directory_needs_no_step(tmp_path):
    directory = write_checkpoint(tmp_path / "final")
    (ref,) = list_checkpoints(LocalCheckpoints(path=str(directory)))
    assert ref.step is None
    assert ref.label == "final"


def test_locations_are_absolute(run, monkeypatch):
    """The worker that opens them may run elsewhere."""
    monkeypatch.chdir(run)
    (ref,) = list_checkpoints(LocalCheckpoints(path="step-20"))
    assert (ref.location, ref.step) == (str(run / "step-20"), 20)
    monkeypatch.chdir(run / "step-20")
    assert list_checkpoints(LocalCheckpoints(path=".")) == [ref]


def test_several_need_a_step_each(run):
    write_checkpoint(run / "step-final")
    with pytest.raises(CheckpointError, match=r"no training step in .*step-final"):
        local(run)


def test_two_of_one_step_are_not_one_run(run):
    write_checkpoint(run / "again" / "step-20")
    write_checkpoint(run / "other" / "step-20")
    with pytest.raises(
        CheckpointError, match=r"again/step-20 and .*other/step-20 both are step 20"
    ):
        local(run, "*/step-*")


def test_training_state_gives_tokens_and_may_not_contradict(tmp_path):
    write_checkpoint(tmp_path / "step-7", state={"step": 7, "tokens": 512})
    (ref,) = local(tmp_path)
    assert (ref.step, ref.num_tokens, ref.num_tokens_rounded) == (7, 512, False)
    write_checkpoint(tmp_path / "step-8", state={"step": 7})
    with pytest.raises(CheckpointError, match=r"name says step 8, training_state.json says 7"):
        local(tmp_path)


def test_a_pattern_that_backtracks_is_given_up(tmp_path, monkeypatch):
    """A server evaluates patterns of strangers; this one takes some 10^12 steps on this name."""
    monkeypatch.setattr("probe.series._PATTERN_S", 0.05)
    write_checkpoint(tmp_path / ("a" * 60))
    with pytest.raises(ConfigError, match=r"takes over 0.05 s"):
        local(tmp_path, "a*", step_pattern=r"^(?:a|aa)+(\d)")


def test_a_glob_of_everything_is_cut_short(run, monkeypatch):
    monkeypatch.setattr("probe.series._MAX_MATCHES", 5)
    with pytest.raises(CheckpointError, match="matches over 5 files and directories; narrow it"):
        local(run, "**")


@pytest.mark.parametrize("source", ["local", "gguf"])
@pytest.mark.parametrize("path", ["x" * 300 + "/y.gguf", "~nobody-of-this-name/y.gguf"])
def test_names_no_file_can_have_are_not_found(source, path):
    spec = {"local": LocalCheckpoints, "gguf": GgufCheckpoint}[source](source=source, path=path)
    with pytest.raises(CheckpointError, match=r"no such file|no checkpoint directory"):
        list_checkpoints(spec)


def test_nothing_there_lists_what_is_near(run):
    with pytest.raises(CheckpointError, match=r"holds step-100, step-1000, step-20"):
        local(run, "ckpt-*")
    with pytest.raises(CheckpointError, match=f"{re.escape(str(run))} holds"):
        local(run, "no/such/dir")


def test_a_broken_checkpoint_stops_the_listing(run):
    path = run / "step-20" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-20/model.safetensors: found \d+ bytes"):
        local(run)


@pytest.mark.parametrize("pattern", ["step(", r"step-\d+", r"(st)(ep)", r"(step)"])
def test_a_bad_step_pattern_is_a_config_error(run, pattern):
    with pytest.raises(ConfigError, match="step_pattern"):
        local(run, step_pattern=pattern)


def test_a_step_pattern_of_ones_own(tmp_path):
    for name in ("run_b00012", "run_b00003"):
        write_checkpoint(tmp_path / name)
    assert steps(local(tmp_path, "run_*", step_pattern=r"_b(\d+)")) == [3, 12]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("stage1-step928646-tokens3896B", 3_896_000_000_000),
        ("step1000-tokens4B", 4_000_000_000),
        ("stage2-ingredient1-step11931-tokens50B", 50_000_000_000),
        ("step5-tokens1.5T", 1_500_000_000_000),
        ("tokens512", 512),
        ("step100", None),
        ("tokens3Bad", None),
    ],
)
def test_tokens_in_names(name, tokens):
    assert tokens_in_name(name) == tokens


OLMO = [
    "main",
    "stage1-step1000-tokens3B",
    "stage1-step10000-tokens21B",
    "stage1-step2000-tokens5B",
    "stage2-ingredient1-step1000-tokens3B",
]


@pytest.fixture
def hub(monkeypatch):
    """The hub's answer to a listing; `hub.fails` is raised instead where set."""
    answer = SimpleNamespace(fails=None, num_requests=0)

    def list_repo_refs(self, repo):
        answer.num_requests += 1
        if answer.fails is not None:
            raise answer.fails
        named = [SimpleNamespace(name=name) for name in OLMO]
        return SimpleNamespace(branches=named[:3], tags=named[3:])

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_refs", list_repo_refs)
    return answer


def revisions(*names, **options):
    return list_checkpoints(
        HubCheckpoints(source="hub", repo="allenai/OLMo-2", revisions=list(names), **options)
    )


def test_hub_patterns_are_listed_and_ordered(hub):
    refs = revisions("stage1-step*-tokens*")
    assert steps(refs) == [1000, 2000, 10000]
    assert (refs[0].num_tokens, refs[0].num_tokens_rounded) == (3_000_000_000, True)
    assert refs[0].location == "allenai/OLMo-2"
    assert refs[0].has_moments is None
    assert steps(revisions("stage1-step*", every=2)) == [1000, 10000]
    assert steps(revisions("stage1-step?000-*", "stage1-step*")) == [1000, 2000, 10000]


def test_full_names_need_no_hub(hub):
    hub.fails = httpx.ConnectError("no network")
    refs = revisions("stage1-step5-tokens1B", "stage1-step4-tokens1B")
    assert steps(refs) == [4, 5]
    assert hub.num_requests == 0


def test_a_dot_in_a_pattern_is_a_dot(hub):
    with pytest.raises(CheckpointError, match="no branch or tag matches"):
        revisions("stage1.step*")


def test_revision_patterns_do_not_backtrack(hub, monkeypatch):
    monkeypatch.setattr(f"{__name__}.OLMO", ["a" * 80, "step[1]"])
    with pytest.raises(CheckpointError, match="no branch or tag matches"):
        revisions("*a" * 25 + "*b")
    (ref,) = revisions("step[1*", step_pattern=r"(\d)")  # brackets mean themselves
    assert (ref.revision, ref.step) == ("step[1]", 1)


def test_no_match_lists_the_nearest(hub):
    with pytest.raises(CheckpointError, match=r"it has 5, the nearest are .*stage1-step"):
        revisions("stage1-steps*-tokens*")


def test_stages_are_not_one_series(hub):
    with pytest.raises(CheckpointError, match=r"several stages \(stage1-, stage2-ingredient1-\)"):
        revisions("stage*-step*")


def test_a_revision_without_step_among_several(hub):
    with pytest.raises(CheckpointError, match="no training step in main"):
        revisions("*ma*", "stage1-step*")
    (ref,) = revisions("main")
    assert ref.step is None


class FakeHub(BaseHTTPRequestHandler):
    """Answers the hub's refs request over real HTTP, in the hub's format."""

    def do_GET(self):
        status, names = self.server.answer
        body = json.dumps(
            {
                "branches": [{"name": n, "ref": n, "targetCommit": "0"} for n in names],
                "tags": [],
                "converts": [],
            }
        ).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def http_hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.answer = (200, OLMO)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    yield server
    server.shutdown()
    server.server_close()


def test_lists_over_http(http_hub):
    assert steps(revisions("stage1-step*")) == [1000, 2000, 10000]


@pytest.mark.parametrize(
    ("status", "retryable"), [(503, True), (429, True), (404, False), (401, False)]
)
def test_answers_of_the_hub_say_whether_to_try_again(http_hub, status, retryable):
    http_hub.answer = (status, [])
    with pytest.raises(CheckpointError, match="listing its revisions needs the hub") as caught:
        revisions("stage1-*")
    assert caught.value.retryable is retryable


def test_no_connection_to_the_hub_is_worth_another_try(http_hub):
    http_hub.shutdown()
    http_hub.server_close()
    with pytest.raises(CheckpointUnavailableError, match="listing its revisions needs the hub"):
        revisions("stage1-*")


def test_gguf_files(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    (ref,) = list_checkpoints(GgufCheckpoint(source="gguf", path=str(path), step=9))
    assert (ref.source, ref.step, ref.has_moments, ref.size_bytes) == ("gguf", 9, False, 4)
    with pytest.raises(CheckpointError, match=r"no such file; .* holds m\.gguf"):
        list_checkpoints(GgufCheckpoint(source="gguf", path=str(tmp_path / "n.gguf")))
    (tmp_path / "m.bin").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"expected a \.gguf or \.gguf\.gz"):
        list_checkpoints(GgufCheckpoint(source="gguf", path=str(tmp_path / "m.bin")))


def test_listing_imports_no_torch(run):
    code = (
        "import sys; from probe.series import list_checkpoints; "
        "from probe.spec import LocalCheckpoints; "
        f"assert len(list_checkpoints(LocalCheckpoints(path={str(run / 'step-*')!r}))) == 4; "
        "import huggingface_hub; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


SEVEN_B = "allenai/OLMo-2-1124-7B"
STEP_1000 = "stage1-step1000-tokens5B"


def published(optimizer_states, *names, repo=SEVEN_B):
    spec = HubCheckpoints(
        source="hub", repo=repo, revisions=list(names), optimizer_states=optimizer_states
    )
    return list_checkpoints(spec)


def test_a_known_run_has_exact_tokens_and_known_places():
    (ref,) = published("auto", STEP_1000)
    assert (ref.num_tokens, ref.num_tokens_rounded) == (1000 * 1024 * 4096, False)
    assert ref.moments_url == "https://olmo-checkpoints.org/ai2-llm/peteish7/step1000-unsharded/"
    assert ref.has_moments is None  # nothing is asked before the worker does


def test_where_no_place_is_known_or_wanted():
    assert published("none", STEP_1000)[0].moments_url is None
    assert published("auto", STEP_1000, repo="someone/else")[0].moments_url is None


def test_a_url_pattern_gives_each_step_its_directory():
    refs = published("https://example.org/run/step{step}/", "a-step7", "a-step70", repo="o/r")
    assert [r.moments_url for r in refs] == [
        "https://example.org/run/step7/",
        "https://example.org/run/step70/",
    ]


@pytest.mark.parametrize(
    "value", ["http://example.org/{step}/", "https://example.org/step7/", "file:///x.csv", "some"]
)
def test_other_places_are_refused(value):
    with pytest.raises(ValueError, match="an https URL with"):
        published(value, STEP_1000)


def test_a_published_csv_of_two_ingredients(tmp_path, caplog):
    """As allenai/OLMo has them, with the row of the 13B that points to another step's state."""
    base = "https://olmo-checkpoints.org/ai2-llm/x"
    rows = ["Ingredient,Step,Checkpoint Directory"]
    rows += [f"{i},{s},{base}/ingredient{i}/step{s}-unsharded/" for i in (1, 3) for s in (1, 2)]
    rows.append(f"3,11931,{base}/ingredient3/step11000-unsharded/")
    path = tmp_path / "stage2.csv"
    path.write_text("\n".join(rows))
    names = [f"stage2-ingredient3-step{s}-tokens1B" for s in (1, 2, 3, 11931)]
    urls = [ref.moments_url for ref in published(str(path), *names)]
    assert urls[:2] == [f"{base}/ingredient3/step{s}-unsharded/" for s in (1, 2)]
    assert urls[2:] == [None, None]
    assert "step 11931 points to" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("Step,Where\n1,https://x/\n", "expected columns Step and Checkpoint Directory"),
        ("Step,Checkpoint Directory\n1,http://10.0.0.1/\n", "an https URL"),
        ("Step,Checkpoint Directory\none,https://x/\n", "expected a step"),
    ],
)
def test_a_broken_csv_says_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "list.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        published(str(path), STEP_1000)


def test_an_olmo_core_run_counts_tokens_by_its_batch(tmp_path):
    run = write_checkpoint(tmp_path / "step30-tokens1B")
    config = {"model": {"d_model": 1}, "data_loader": {"global_batch_size": 4096}}
    assert local(tmp_path, "step*")[0].num_tokens_rounded
    (run / "config.json").write_text(json.dumps(config))
    (ref,) = local(tmp_path, "step*")
    assert (ref.num_tokens, ref.num_tokens_rounded) == (30 * 4096, False)
