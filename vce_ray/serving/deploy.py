"""Puts the endpoint together and starts it on a Ray cluster."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from pathlib import Path
from typing import Any, Literal

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.deployment import Application

from vce_ray import env
from vce_ray.config import SamplingConfig, default_sampling
from vce_ray.errors import UserError
from vce_ray.serving.adapters import check_adapter, resolve_adapter, resolve_base
from vce_ray.serving.app import Api, token_digest
from vce_ray.serving.engine import Engine
from vce_ray.serving.schema import MAX_IMAGES

APP = "vce-ray"
"""Name of the application in Serve."""
MIN_TOKEN_CHARS = 16
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
    """The Serve application: an ingress before `num_replicas` engines.

    Args:
        base: 'emoji-world', a checkpoint folder or a hub id.
        adapter: a local folder, the URI of one in a store, or None for the base as it is.
        sampling: how images are drawn; batch_size is how many at once.
        name: id of the model in the API; made from the base and the erased concept by default.
        num_cpus, num_gpus: what each engine takes; with a GPU it draws there.
        max_waiting: images that may wait in each engine before callers get 429.
        token: what callers must send, '' for none; by default the environment's (env.API_TOKEN).

    Raises:
        UserError: unknown base, or an adapter that was made for another revision of it, or a weak token.
        StoreError: the adapter cannot be read.
    """
    if max_waiting < MAX_IMAGES:
        raise UserError(f"max_waiting {max_waiting} is less than one request may ask for: give {MAX_IMAGES} or more")
    token = check_token(env.API_TOKEN.get() if token is None else token)
    base = resolve_base(base)
    concept = None
    if adapter is not None:
        adapter = resolve_adapter(adapter)
        concept = check_adapter(base, adapter).get("concept", "a concept")
    label = Path(base).name if Path(base).is_absolute() else base
    engine = Engine.options(
        num_replicas=num_replicas,
        # Each request waits for one image at least, so the engine's own limit is met first and says when to come back.
        max_ongoing_requests=max_waiting + 2 * sampling.batch_size + 64,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
    ).bind(base, adapter, sampling, "cuda" if num_gpus else "cpu", max_waiting)
    model = name or (label if concept is None else f"{label}-without-{concept}".replace(" ", "-"))
    return Api.bind(engine, model, {"base": label, "erased": concept}, token_digest(token) if token else None)


class Endpoint(BaseModel):
    """What a `serveConfigV2` says of the endpoint: build_app's arguments under the same names."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    base: str = "emoji-world"
    adapter: str | None = None
    name: str | None = None
    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=1, gt=0)
    num_gpus: float = Field(default=0, ge=0)
    max_waiting: int = 256
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"


def app_from_args(args: dict[str, Any]) -> Application:
    """The application that a Serve config file names as `vce_ray.serving.deploy:app_from_args`, e.g. a RayService's.

    Where such files are deployed Serve listens to the whole cluster, so the token is not left to choice.

    Raises:
        UserError: an argument is unknown or wrong, no token is set, or what build_app raises.
    """
    endpoint = Endpoint.model_validate(args)
    if not env.API_TOKEN.get():
        raise UserError(f"{env.API_TOKEN.name} is not set: an endpoint that others can reach wants a token")
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
    """Starts the endpoint on the running Ray cluster and waits until it answers; gives its URL.

    Ray must be initialised. On failure everything that was started here is taken down again.

    Args:
        base, adapter, sampling, options: as build_app takes them.
        host, port: where Serve's proxy on the head node listens.

    Raises:
        UserError, StoreError: as build_app; or the host is open to others and no token is set, the port is taken, or
            Serve runs on this cluster elsewhere already.
        RuntimeError: a replica failed to start, or did not within `timeout_s`; says why.
    """
    token = env.API_TOKEN.get()
    check_host(host, token)
    app = build_app(base, adapter, sampling, token=token, **options)
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        check_port(host, port)
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=host, port=port))
    elif (client.http_config.host, client.http_config.port) != (host, port):
        raise UserError(
            f"Serve runs on this cluster already, at {client.http_config.host}:{client.http_config.port} and not at "
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


def serve_command(
    base: str, adapter: str | None, host: str, port: int, sampling: SamplingConfig, block: bool = True
) -> str:
    """What `vce-ray serve` does: starts the endpoint on the Ray session of the caller; gives its URL.

    An engine takes a GPU where the cluster has one.

    Args:
        block: tells the URL and serves until interrupted, then shuts down.

    Raises:
        UserError, StoreError, RuntimeError: as start does, before the endpoint says that it is ready.
    """
    check_host(host, env.API_TOKEN.get())
    num_gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    url = start(base, adapter, sampling, host=host, port=port, num_gpus=num_gpus)
    if block:
        print(f"ready: {url}/v1/images/generations (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            serve.shutdown()
    return url


def check_host(host: str, token: str) -> None:
    """Raises UserError where others could reach the endpoint and no token keeps them out."""
    check_token(token)
    if not token and not is_loopback(host):
        raise UserError(
            f"host {host!r} is open to other machines and {env.API_TOKEN.name} is not set: set it to a secret of "
            f"{MIN_TOKEN_CHARS} characters or more, or bind to 127.0.0.1"
        )


def check_token(token: str) -> str:
    """The token itself, if it can go into a header and is not guessed at once. Never repeats it in an error."""
    if token and (len(token) < MIN_TOKEN_CHARS or not all("!" <= char <= "~" for char in token)):
        raise UserError(
            f"{env.API_TOKEN.name} has {len(token)} characters or some that a header cannot hold: use at least "
            f"{MIN_TOKEN_CHARS} of ASCII without spaces, like `openssl rand -hex 24` prints"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. A name other than localhost counts as open."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_port(host: str, port: int) -> None:
    """Raises UserError if the port is no port or is taken: Serve's own proxy would try again for a minute."""
    if not 1 <= port <= 65535:
        raise UserError(f"port {port} is out of range: give one from 1 to 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port} ({error.strerror}): give another port or host") from error


def _wait_until_running(timeout_s: float) -> None:
    """Polls Serve. Raises RuntimeError with the replica's own message if it fails, or with what it still waits for."""
    deadline = time.monotonic() + timeout_s
    while True:
        status = serve.status().applications.get(APP)
        if status is not None and status.status == "RUNNING":
            return
        failed = status is not None and status.status in ("DEPLOY_FAILED", "UNHEALTHY")
        if failed or time.monotonic() > deadline:
            parts = [status.message, *(f"{k}: {v.message}" for k, v in status.deployments.items())] if status else []
            reason = "\n".join(part for part in parts if part)
            what = "failed to start" if failed else f"did not start within {timeout_s:g} s"
            has = {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
            raise RuntimeError(f"the endpoint {what} (cluster has {has}): {reason}")
        time.sleep(0.2)
