"""Jobs on a running Ray cluster, through its job server: submit, follow, list, stop. Every refusal is one sentence.

Tokens and certificates are Ray's own: RAY_AUTH_MODE and RAY_AUTH_TOKEN, RAY_JOB_HEADERS, a file of certificates for https.
Rejected: Ray Client (`ray://`), whose driver stays on the laptop and dies with its connection.
"""

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardmoe.config import Json
from hardmoe.errors import BackendError
from hardmoe.execution.ray.connection import CONNECT_SECONDS, TOKEN_REMEDY, prepare_environment, reason

_ANSWER_SECONDS = 8.0
_ACTION_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_STARTING_SECONDS = 60.0
_HEADERS_REMEDY = 'RAY_JOB_HEADERS is no JSON object of texts; write it like {"Authorization": "Bearer …"}'
_SILENCE_SECONDS = 300.0
"""A job server that does not answer for so long is given up; the job may go on."""


@dataclass(frozen=True)
class Job:
    """What the job server says of a job."""

    id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str
    exit_code: int | None
    """Of the driver, negative if a signal ended it; None if it never came to an end of its own."""
    started: float
    command: str
    root: str

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class JobServer:
    """The job server of a cluster.

    Args:
        address: `http://head:8265` or https.
        certificates: file or directory of trusted certificates for https; None for the system's.

    Raises:
        BackendError: nobody answers there, or not to us.
    """

    def __init__(self, address: str, certificates: Path | None = None) -> None:
        self._address = address
        if not address.startswith(("http://", "https://")):
            raise BackendError(f"--address '{address}' is no job server's; give the head node's, such as http://10.0.0.1:8265")
        prepare_environment(joins=True)
        with self._told():
            self._client = _client(address, certificates)

    def submit(self, command: str, archive: Path, environment: Mapping[str, str], about: Mapping[str, str]) -> str:
        """Hand a job over; returns its id."""
        runtime = {"working_dir": str(archive), "env_vars": dict(environment)}
        give_up = time.monotonic() + _STARTING_SECONDS
        while True:
            with self._told():
                try:
                    job: str = self._client.submit_job(entrypoint=command, runtime_env=runtime, metadata=dict(about))
                    return job
                except RuntimeError as error:
                    # A cluster that was just started, whose head is not through with its own start.
                    if "No available agent" not in str(error) or time.monotonic() > give_up:
                        raise
            time.sleep(_LOOK_SECONDS)

    def find(self, job: str) -> Job:
        """How a job stands.

        Raises:
            BackendError: there is none of this id.
        """
        with self._told():
            return _job(self._client.get_job_info(job))

    def list(self) -> Sequence[Job]:
        """All jobs that were submitted, the latest first."""
        with self._told():
            found = [_job(each) for each in self._client.list_jobs() if each.submission_id]
        return sorted(found, key=lambda each: -each.started)

    def logs(self, job: str) -> str:
        """All that a job's driver has printed."""
        with self._told():
            text: str = self._client.get_job_logs(job)
        return text

    def stop(self, job: str) -> bool:
        """Ask a job's driver to end; False if it had ended."""
        with self._told():
            stopped: bool = self._client.stop_job(job)
        return stopped

    def nodes(self) -> Sequence[Mapping[str, float]]:
        """Resources of the living nodes; none where an autoscaler may add others, or the server does not tell."""
        with self._told():
            status = self._client.ask("/api/cluster_status")
            body = self._client.ask("/api/v0/nodes?detail=1&limit=10000")
        # Ray runs an autoscaler without a cloud everywhere; there every node has a type of its own, named after it.
        report = ((status or {}).get("data", {}).get("clusterStatus") or {}).get("autoscalerReport") or {}
        types = report.get("nodeTypeMapping") or {}
        if body is None or not types or any(kind != f"node_{node}" for node, kind in types.items()):
            return []
        return [row["resources_total"] for row in body["data"]["result"]["result"] if row["state"] == "ALIVE"]

    def follow(self, job: str, show: Callable[[str], None]) -> Job:
        """Show what the driver prints, as it comes, until the job is over; survives a job server that is away for a while."""
        shown, heard = 0, time.monotonic()
        while True:
            try:
                if (found := self.find(job)).status != "PENDING":
                    for text in self._tail(job, shown):
                        show(text)
                        shown += len(text)
                    found = self.find(job)
                heard = time.monotonic()
            except BackendError:
                if time.monotonic() - heard > _SILENCE_SECONDS:
                    raise
                found = None
            if found is not None and found.is_over:
                if len(rest := self.logs(job)) > shown:
                    show(rest[shown:])
                return found
            time.sleep(_LOOK_SECONDS)

    def _tail(self, job: str, skip: int) -> Iterator[str]:
        """New pieces of the log until the server ends it or is not there any more; without the first `skip` characters."""
        import aiohttp

        pieces = self._client.tail_job_logs(job)
        with asyncio.Runner() as runner:
            while True:
                try:
                    text: str = runner.run(anext(pieces))
                except (StopAsyncIteration, aiohttp.ClientError, RuntimeError, OSError):
                    return
                skipped, skip = text[:skip], max(0, skip - len(text))
                if rest := text[len(skipped) :]:
                    yield rest

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what Ray and requests raise into one sentence."""
        import ray
        import requests

        place = f"the job server at '{self._address}'"
        try:
            yield
        except ray.exceptions.AuthenticationError as error:
            raise BackendError(f"{place} refuses this token; {TOKEN_REMEDY}") from error
        except requests.exceptions.HTTPError as error:
            raise BackendError(f"{place} refuses: {_refusal(error)}") from error
        except (requests.exceptions.RequestException, ConnectionError) as error:
            # Ray raises an error of its own over the one that says it.
            if isinstance(error.__context__ or error, requests.exceptions.SSLError):
                remedy = "name its authority's with --ca FILE"
                raise BackendError(f"{place} has a certificate that is not trusted here; {remedy}") from error
            raise BackendError(
                f"no job server answers at '{self._address}'; correct --address (the head node's, http://host:8265), forward the "
                "port if it is behind a firewall, and start the head with the dashboard (pip install 'ray[default]')"
            ) from error
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise BackendError(f"{place} refuses: {_refusal(error)}") from error


def _refusal(error: BaseException) -> str:
    text = reason(error)
    if "status code 404" in text and "does not exist" in text:
        return "there is no such job; 'hardmoe submit --list' shows those there are"
    if "No available agent" in text:
        return (
            f"its head's agent is not there after {_STARTING_SECONDS:g} s, see its dashboard_agent.log; where another Ray there "
            "has its port, start the head with --dashboard-agent-listen-port"
        )
    return f"{text[:300]}; see its logs on the head node"


def _client(address: str, certificates: Path | None) -> Any:
    """Ray's client, with time limits on every request: a firewall that drops packets would be waited for by the hour."""
    try:
        import aiohttp  # noqa: F401 - without it Ray's client is there and does not work
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise BackendError("submitting needs Ray's job client; install it with: pip install 'hardmoe[cluster]'") from error

    for module in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.ERROR)

    class Client(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            patience = _ANSWER_SECONDS if method == "GET" else _ACTION_SECONDS
            return super()._do_request(method, endpoint, timeout=(CONNECT_SECONDS, patience), **options)

        def ask(self, endpoint: str) -> Json:
            """A JSON answer, or None if the server has none."""
            answer = self._do_request("GET", endpoint)
            return answer.json() if answer.status_code == 200 else None

    try:
        headers = json.loads(os.environ.get("RAY_JOB_HEADERS", "{}"))
    except ValueError as error:
        raise BackendError(_HEADERS_REMEDY) from error
    if not isinstance(headers, dict) or not all(isinstance(text, str) for text in headers.values()):
        raise BackendError(_HEADERS_REMEDY)
    return Client(address, headers=headers, verify=str(certificates) if certificates else True)


def _job(details: Any) -> Job:
    about = details.metadata or {}
    return Job(
        id=details.submission_id,
        status=str(details.status),
        message=(details.message or "").strip(),
        exit_code=details.driver_exit_code,
        started=(details.start_time or 0) / 1000,
        command=about.get("hardmoe_command", details.entrypoint),
        root=about.get("hardmoe_root", ""),
    )
