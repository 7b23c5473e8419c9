"""The baseline: a FastAPI app with nothing behind it, the same answers from memory.

`python bare.py PORT_FILE`: standard input holds a job view and a list, one JSON object a line.
Each route is `async def`, returns a model, and FastAPI writes it out: what the framework alone
costs, on the same HTTP server, with no database, no guard and no metrics.
"""

import json
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI

from server.wire import JobList, JobView


def make_app(view: dict[str, Any], page: dict[str, Any]) -> FastAPI:
    app = FastAPI()
    one, many = JobView.model_validate(view), JobList.model_validate(page)

    @app.get("/v1/jobs/{job_id}")
    async def show(job_id: str) -> JobView:
        return one

    @app.get("/v1/jobs")
    async def listed(after: str | None = None, limit: int = 50) -> JobList:
        return many

    return app


if __name__ == "__main__":
    uvicorn.run(
        make_app(json.loads(sys.stdin.readline()), json.loads(sys.stdin.readline())),
        port=int(sys.argv[1]),
        log_config=None,
        access_log=False,
        server_header=False,
    )
