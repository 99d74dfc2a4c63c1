"""Builds the endpoint's Serve application and starts it on a Ray cluster."""

from __future__ import annotations

import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.deployment import Application

from vce_ray import env
from vce_ray.config import EMBEDDED, SamplingConfig
from vce_ray.errors import UserError
from vce_ray.models.adapter_location import check_adapter, resolve_adapter
from vce_ray.models.check import check_base
from vce_ray.models.families import default_sampling
from vce_ray.models.folder import absolute
from vce_ray.serving.app import Api
from vce_ray.serving.auth import check_host, check_token, token_digest
from vce_ray.serving.engine import Engine
from vce_ray.serving.schema import MAX_IMAGES

APP = "vce-ray"
"""Name of the application in Serve."""
START_TIMEOUT_S = 600.0


def build_app(
    base: str,
    adapter: str | None,
    sampling: SamplingConfig,
    *,
    name: str | None = None,
    num_replicas: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    max_waiting: int = 256,
    token: str | None = None,
) -> Application:
    """Return the Serve application: an ingress in front of `num_replicas` engines.

    Args:
        base: name of the embedded model, a checkpoint folder or a hub id.
        adapter: a local folder, the URI of one in a store, or None for the unmodified base.
        sampling: sampling settings; batch_size is the number of images generated at once.
        name: model id in the API; by default made from the base and the erased concept.
        num_cpus, num_gpus: resources of each engine. With a GPU it generates there.
        max_waiting: images that may wait in each engine before callers get 429.
        token: the token that callers must send, '' for none; by default taken from the environment (env.API_TOKEN).

    Raises:
        UserError: the base is unknown or incomplete, the adapter was made for another revision of it, or the token is
            weak.
        StoreError: the adapter cannot be read.
    """
    if max_waiting < MAX_IMAGES:
        raise UserError(f"max_waiting {max_waiting} is less than one request may ask for: give {MAX_IMAGES} or more")
    token = check_token(env.API_TOKEN.get() if token is None else token)
    check_base(base)
    base = absolute(base)
    concept = None
    if adapter is not None:
        adapter = resolve_adapter(adapter)
        concept = check_adapter(base, adapter).get("concept", "a concept")
    label = Path(base).name if Path(base).is_absolute() else base
    engine = Engine.options(
        num_replicas=num_replicas,
        # Every request waits for at least one image, so the engine's own limit, which reports when to retry, is reached
        # before this one.
        max_ongoing_requests=max_waiting + 2 * sampling.batch_size + 64,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
    ).bind(base, adapter, sampling, "cuda" if num_gpus else "cpu", max_waiting)
    model = name or (label if concept is None else f"{label}-without-{concept}".replace(" ", "-"))
    return Api.bind(engine, model, {"base": label, "erased": concept}, token_digest(token) if token else None)


class Endpoint(BaseModel):
    """The endpoint's arguments in a `serveConfigV2`, named as in build_app."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    base: str = EMBEDDED
    adapter: str | None = None
    name: str | None = None
    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=1, gt=0)
    num_gpus: float = Field(default=0, ge=0)
    max_waiting: int = 256
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"


def app_from_args(args: dict[str, Any]) -> Application:
    """Return the application for a Serve config file, such as a RayService's.

    The file names it as `vce_ray.serving.deploy:app_from_args`. Where such files are deployed, the whole cluster can
    reach Serve, so a token is required.

    Raises:
        UserError: an argument is unknown or invalid, no token is set, or build_app rejects the arguments.
    """
    endpoint = Endpoint.model_validate(args)
    if not env.API_TOKEN.get():
        raise UserError(f"{env.API_TOKEN.name} is not set: an endpoint that other machines can reach requires a token")
    sampling = default_sampling(endpoint.base, kv_cache_dtype=endpoint.kv_cache_dtype)
    return build_app(**endpoint.model_dump(exclude={"kv_cache_dtype"}), sampling=sampling)


def start(
    base: str,
    adapter: str | None,
    sampling: SamplingConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    timeout_s: float = START_TIMEOUT_S,
    **options: Any,
) -> str:
    """Start the endpoint on the running Ray cluster, wait until it is ready, and return its URL.

    Ray must be initialized. On failure, everything started here is shut down again.

    Args:
        base, adapter, sampling, options: as for build_app.
        host, port: address of Serve's proxy on the head node.

    Raises:
        UserError, StoreError: as for build_app; also if other machines can reach the host and no token is set, the port
            is in use, or Serve already runs on this cluster at another address.
        RuntimeError: a replica failed to start, or was not ready within `timeout_s`.
    """
    token = env.API_TOKEN.get()
    check_host(host, token)
    app = build_app(base, adapter, sampling, token=token, **options)
    client = _get_global_client(raise_if_no_controller_running=False)  # the public API does not report the address
    if client is None:
        check_port(host, port)
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=host, port=port))
    elif (client.http_config.host, client.http_config.port) != (host, port):
        raise UserError(
            f"Serve already runs on this cluster at {client.http_config.host}:{client.http_config.port}, not at "
            f"{host}:{port}: use that host and port, or shut it down first (serve shutdown)"
        )
    try:
        serve.run_many(
            [serve.RunTarget(app, name=APP, route_prefix="/")],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        _wait_until_running(timeout_s)
    except BaseException:
        if client is None:
            serve.shutdown()
        else:
            serve.delete(APP)
        raise
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve_command(base: str, adapter: str | None, host: str, port: int, sampling: SamplingConfig) -> None:
    """Run `vce-ray serve`: start the endpoint on the caller's Ray session, print its URL and serve until interrupted.

    The engine gets a GPU if the cluster has one.

    Raises:
        UserError, StoreError, RuntimeError: as for start.
    """
    check_host(host, env.API_TOKEN.get())
    num_gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    url = start(base, adapter, sampling, host=host, port=port, num_gpus=num_gpus)
    print(f"ready: {url}/v1/images/generations (press Ctrl-C to stop)", flush=True)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())  # a container's end; Ray's own would exit at once
    with suppress(KeyboardInterrupt):
        ended.wait()
    serve.shutdown()


def check_port(host: str, port: int) -> None:
    """Raise UserError if the port is invalid or in use. Serve's own proxy would retry for a minute first."""
    if not 1 <= port <= 65535:
        raise UserError(f"port {port} is out of range: give one from 1 to 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port} ({error.strerror}): give another port or host") from error


def _wait_until_running(timeout_s: float) -> None:
    """Poll Serve until the application runs. Raises RuntimeError with Serve's own message on failure or timeout."""
    deadline = time.monotonic() + timeout_s
    while True:
        status = serve.status().applications.get(APP)
        if status is not None and status.status == "RUNNING":
            return
        failed = status is not None and status.status in ("DEPLOY_FAILED", "UNHEALTHY")
        if failed or time.monotonic() > deadline:
            parts = [status.message, *(f"{k}: {v.message}" for k, v in status.deployments.items())] if status else []
            reason = "\n".join(part for part in parts if part)
            outcome = "failed to start" if failed else f"did not start within {timeout_s:g} s"
            resources = {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
            raise RuntimeError(f"the endpoint {outcome} (cluster resources: {resources}): {reason}")
        time.sleep(0.2)
