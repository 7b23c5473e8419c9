"""The HTTP server with nothing importable but what the dependency group `server` brings.

Run by test_server_packages.py: `python server_alone.py DATA_DIR`, on standard input a JSON list of
{"spec", "results"}. Each spec is planned and submitted, its results are put into the database as a
worker would, and everything a client can ask for is asked for. Prints one JSON line of what was
answered.
"""

import importlib.metadata as metadata
import json
import re
import sys
import threading
import tomllib
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FORMATS = {"results": ("json", "csv", "parquet"), "chart": ("vega", "svg", "png")}


def closure(requirements: list[str]) -> set[str]:
    """Names of the distributions that installing the requirements installs, as pip reads them."""
    from packaging.requirements import Requirement

    found: set[tuple[str, str]] = set()
    pending = [Requirement(text) for text in requirements]
    while pending:
        wanted = pending.pop()
        for extra in {"", *wanted.extras}:
            key = (_canonical(wanted.name), extra)
            if key in found:
                continue
            found.add(key)
            for text in metadata.requires(wanted.name) or ():
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    pending.append(needed)
    return {name for name, _ in found}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class OutOfReach:
    """A finder that has every module of the distributions that are not allowed fail to import."""

    def __init__(self, allowed: set[str]) -> None:
        self.modules = {
            module
            for module, names in metadata.packages_distributions().items()
            if not allowed & {_canonical(name) for name in names}
        } - {"probe", "server", "clients"}

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] in self.modules:
            raise ModuleNotFoundError(f"{name} is not among the server's packages", name=name)
        return None


def serve(data_dir: Path) -> tuple[Any, str]:
    """The app's store, and the address at which it answers."""
    import uvicorn

    from server.api.app import create_app
    from server.settings import Settings

    app = create_app(Settings(data_dir=data_dir))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    return app.state.store, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


def record(store: Any, job_id: str, results: list[dict[str, Any]]) -> None:
    """Put results into the database; a worker does it with more ceremony."""
    import sqlalchemy as sa

    from server.tables import unit_results

    with store.engine.begin() as connection:
        for result in results:
            connection.execute(
                sa.insert(unit_results).values(
                    job_id=job_id,
                    unit_index=result["unit"]["index"],
                    has_every_answer=True,
                    num_forward_passes=result["num_forward_passes"],
                    recorded_at=0,
                    result=result,
                )
            )


def ask(address: str, store: Any, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    import httpx

    answers: dict[str, Any] = {}
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        for path in ("/healthz", "/readyz", "/metrics", "/", "/docs", "/openapi.json"):
            answers[path] = client.get(path).status_code
        for job in jobs:
            kind = job["spec"]["kind"]
            planned = client.post("/v1/jobs:plan", json=job["spec"])
            answers[f"{kind} plan"] = (planned.status_code, len(planned.json().get("units", ())))
            job_id = client.post("/v1/jobs", json=job["spec"]).json()["id"]
            record(store, job_id, job["results"])
            for what, formats in FORMATS.items():
                for name in formats:
                    answer = client.get(f"/v1/jobs/{job_id}/{what}", params={"format": name})
                    answers[f"{kind} {what} {name}"] = (answer.status_code, len(answer.content))
            answers[f"{kind} page"] = client.get(f"/jobs/{job_id}").status_code
    return answers


def main() -> None:
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["server"]
    blocker = OutOfReach(closure(group))
    sys.meta_path.insert(0, blocker)
    jobs = json.load(sys.stdin)
    store, address = serve(Path(sys.argv[1]))
    answers = ask(address, store, jobs)
    answers["out of reach"] = sorted(blocker.modules)
    print(json.dumps(answers))  # noqa: T201


if __name__ == "__main__":
    main()
