"""What the HTTP server can be told; the engine has its own configuration."""

from __future__ import annotations

from dataclasses import dataclass

from quire.core.errors import ConfigError
from quire.core.serving.operations.api_keys import ApiKey
from quire.core.serving.tools.registry import unknown_formats

ENGINE_DEATH_POLICIES = ("restart", "exit", "stay")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of the HTTP side, complete before the server exists."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    api_keys: tuple[str, ...] = ()
    """Clients must send one of these, which may do everything; empty: nobody is asked."""
    keys: tuple[ApiKey, ...] = ()
    """Keys with names, scopes and limits, as a file lists them."""
    protect_metrics: bool = False
    """Whether `/metrics` and `/load` need a key with the scope `metrics`."""
    max_body_bytes: int = 32 * 2**20
    max_outputs: int = 4096
    """The most outputs of one request: its prompts times `n`."""
    max_logprobs: int = 20
    """The most log-probabilities a position that a client may ask for."""
    shutdown_timeout_s: float = 30.0
    """How long requests in flight may take to finish after a signal to end."""
    retry_after_s: int = 1
    """What a client is told to wait when the queue is full."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server from a browser; `*`: all."""
    trust_request_chat_template: bool = False
    """Whether clients may bring a chat template, which is a program."""
    tool_call_parser: str = "auto"
    """How the model writes tool calls; `auto`: as its chat template says, where that is sure."""
    reasoning_parser: str = "auto"
    """How the model writes its thoughts; `none`: they stay in the text."""
    keep_alive_s: float = 15.0
    """A stream on which nothing happened for so long gets a comment, so that proxies keep it."""
    request_timeout_s: float | None = None
    """How long a request may take from its first byte to its last; None: as long as it takes."""
    on_engine_death: str = "restart"
    """`restart` it, `exit` with status 1, or `stay` and answer 503 to everything."""
    max_engine_restarts: int = 3
    """So often in ten minutes; one death more ends the server with status 1."""
    root_path: str = ""
    """The prefix under which a proxy shows this server, as `/quire`."""
    log_requests: bool = False
    """One line for each request, without its prompt."""
    log_prompts: bool = False
    """The bodies of requests too: for debugging, where nobody's words are private."""
    serve_playground: bool = True
    """Whether `/` shows the page on which people try the model."""
    otlp_traces_endpoint: str | None = None
    """Where spans are sent, as `http://collector:4318/v1/traces`; None: none are made."""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.port <= 65535:
            problems.append(f"port is {self.port}; it must be in [0, 65535]")
        if self.max_body_bytes < 1:
            problems.append(f"max_body_bytes is {self.max_body_bytes}; it must be at least 1")
        if self.max_logprobs < 0:
            problems.append(f"max_logprobs is {self.max_logprobs}; it must be at least 0")
        if self.shutdown_timeout_s < 0:
            problems.append(
                f"shutdown_timeout_s is {self.shutdown_timeout_s}; it must not be negative"
            )
        if not self.keep_alive_s > 0:
            problems.append(f"keep_alive_s is {self.keep_alive_s}; it must be above 0")
        if self.request_timeout_s is not None and not self.request_timeout_s > 0:
            problems.append(f"request_timeout_s is {self.request_timeout_s}; it must be above 0")
        if self.on_engine_death not in ENGINE_DEATH_POLICIES:
            known = ", ".join(ENGINE_DEATH_POLICIES)
            problems.append(f"on_engine_death is {self.on_engine_death!r}; choose one of {known}")
        problems += unknown_formats(self.tool_call_parser, self.reasoning_parser)
        if self.max_engine_restarts < 0:
            problems.append("max_engine_restarts is negative; 0 never restarts")
        if self.root_path and not self.root_path.startswith("/"):
            problems.append(f"root_path is {self.root_path!r}; it must begin with /")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            problems.append("ssl_certfile and ssl_keyfile belong together; give both")
        if any(not key for key in self.api_keys):
            problems.append("an API key is empty; leave it out to ask for none")
        if problems:
            raise ConfigError("; ".join(problems))
