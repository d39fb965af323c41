"""The command line: what it prints where, and the status it ends with."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from fake_engine import REPLY, FakeEngine
from typer.testing import CliRunner, Result

import quire
from quire.core.config import EngineConfig
from quire.core.engine.async_engine import AsyncEngine
from quire.core.errors import ConfigError, EngineDeadError, PluginError, RequestError
from quire.core.sampling_params import SamplingParams
from quire.core.serving.cli.application import application
from quire.core.serving.cli.errors import require_extra, status_of
from quire.core.serving.cli.options import field_docs, make_config, parse_bytes
from quire.core.serving.cli.serve import with_bounded_queue


@pytest.fixture
def started(monkeypatch) -> list[EngineConfig]:
    """The configurations that engines were started with; all engines are fakes."""
    configs = []

    async def start(config):
        configs.append(config)
        return FakeEngine(default_sampling={"temperature": 0.7})

    monkeypatch.setattr(AsyncEngine, "start", start)
    return configs


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """The command sets up logging for its process; the next test has its own."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(application, list(arguments), input=stdin)


def test_version_is_the_packages():
    """--version says which Quire this is."""
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"quire {quire.__version__}\n")


def test_server_without_a_bound_of_its_own_bounds_its_queue():
    """Under overload nobody waits for ever; a bound that was asked for is left as it is."""
    assert with_bounded_queue(EngineConfig(model="m", max_num_seqs=4)).max_num_queued == 64
    assert with_bounded_queue(EngineConfig(model="m", max_num_queued=3)).max_num_queued == 3


def test_help_names_every_command():
    """A newcomer finds all commands on one page."""
    page = run("--help").stdout
    for command in ("generate", "chat", "serve", "backends", "plan", "doctor", "demo", "bench"):
        assert command in page


def test_generate_streams_one_prompt(started):
    """The text alone goes to stdout, so that it can be piped on."""
    result = run("generate", "fake", "hi", "--max-tokens", "5")
    assert result.exit_code == 0, result.output
    assert result.stdout == REPLY[:5] + "\n"
    assert "fake" in result.stderr


def test_generate_reads_stdin_without_prompts(started):
    """A prompt may come through a pipe."""
    assert run("generate", "fake", stdin="hi").stdout == REPLY + "\n"


def test_generate_batch_as_json_is_one_object_a_line(started):
    """Several prompts come as lines of JSON, in their order."""
    result = run("generate", "fake", "a", "b", "--json", "--n", "2", "--max-tokens", "3")
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["prompt"] for record in records] == ["a", "b"]
    assert [o["text"] for o in records[0]["outputs"]] == [REPLY[:3]] * 2
    assert records[0]["outputs"][0]["finish_reason"] == "length"


def test_generate_batch_as_text_names_prompts(started):
    """For people each output stands under its prompt."""
    assert run("generate", "fake", "a", "b").stdout == f"=== a\n{REPLY}\n=== b\n{REPLY}\n"


def test_engine_options_reach_the_configuration(started):
    """Every option is a setting of the engine, under the same name."""
    options = (
        *("--served-model-name", "me", "--max-model-len", "99", "--max-num-seqs", "3"),
        *("--cache-memory-bytes", "2M", "--no-enable-prefix-caching", "--dtype", "float16"),
        *("--options", "acme.a=1", "--options", "acme.b=x=y", "--device", "null:1"),
    )
    assert run("generate", "fake", "a", *options).exit_code == 0
    assert started == [
        EngineConfig(
            model="fake",
            served_model_name="me",
            max_model_len=99,
            max_num_seqs=3,
            cache_memory_bytes=2 * 2**20,
            enable_prefix_caching=False,
            dtype="float16",
            options={"acme.a": "1", "acme.b": "x=y"},
            device="null:1",
        )
    ]


def test_device_of_the_environment_counts_unless_asked(monkeypatch):
    """QUIRE_DEVICE is the device where no option names one."""
    monkeypatch.setenv("QUIRE_DEVICE", "sim")
    assert make_config({"model": "m"}).device == "sim"
    assert make_config({"model": "m", "device": "cpu"}).device == "cpu"


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (("generate", "fake", "a", "--temperature", "-1"), 2, "temperature"),
        (("generate", "fake", "a", "--max-num-seqs", "0"), 2, "max_num_seqs"),
        (("generate", "fake", "a", "--options", "x"), 2, "NAME=VALUE"),
        (("generate", "fake", "a", "--cache-memory-bytes", "lots"), 2, "lots"),
        (("generate", "fake", "a", "--no-such-option"), 2, "--no-such-option"),
        (("generate",), 2, "model"),
        (("serve", "fake", "--port", "70000"), 2, "port"),
        (("--log-level", "loud", "backends"), 2, "loud"),
        (("plan", "/nowhere/at/all"), 1, "/nowhere/at/all"),
        (("plan", "demo", "--device", "unheard-of"), 2, "unheard-of"),
        (("bench", "serve", "--url", "http://127.0.0.1:9"), 2, "http://127.0.0.1:9"),
        (("bench", "throughput", "fake", "--prompts-file", "/nowhere"), 2, "/nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistake_is_one_message_on_stderr(started, arguments, status, word):
    """A mistake is told without a traceback, on stderr, and with the status that scripts look at."""
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert word in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_debug_shows_the_traceback(started):
    """--debug lets the exception through."""
    result = run("--debug", "generate", "fake", "a", "--temperature", "-1")
    assert isinstance(result.exception, RequestError)


def test_statuses_tell_mistakes_from_failures():
    """2: ask differently; 1: something broke."""
    assert status_of(ConfigError("x")) == status_of(RequestError("x")) == 2
    assert status_of(EngineDeadError("x")) == status_of(PluginError("x")) == 1


def test_missing_extra_is_told_with_its_command():
    """Whoever lacks the libraries of a command reads how to get them."""
    with pytest.raises(ConfigError, match=r"no_such_module.*pip install \"quire\[serve\]\""):
        require_extra("serve", "json", "no_such_module")
    require_extra("serve", "json")


def test_chat_keeps_the_conversation(started, monkeypatch):
    """Each answer is given with all turns before it, until /reset."""
    seen = []
    render = FakeEngine.render_chat

    async def noted(self, messages, **options):
        seen.append([message["content"] for message in messages])
        return await render(self, messages, **options)

    monkeypatch.setattr(FakeEngine, "render_chat", noted)
    lines = "one\n\ntwo\n/reset\nthree\n/exit\nfour\n"
    result = run("chat", "fake", "--system", "sys", "--max-tokens", "5", stdin=lines)
    assert result.exit_code == 0, result.output
    assert result.stdout == "Hello\n" * 3
    assert seen == [["sys", "one"], ["sys", "one", "Hello", "two"], ["sys", "three"]]


def test_chat_goes_on_after_a_message_that_is_too_long(started):
    """A refused message is told and forgotten; the conversation goes on."""
    result = run("chat", "fake", "--max-tokens", "5", stdin="x" * 600 + "\nhi\n")
    assert result.exit_code == 0
    assert "600" in result.stderr or "tokens" in result.stderr
    assert result.stdout.endswith("Hello\n")


def test_demo_streams_and_answers_a_batch(started):
    """The demo says which device it uses and why, and how fast it was."""
    result = run("demo", "--max-tokens", "8", "--device", "null")
    assert result.exit_code == 0, result.output
    assert started[0].model == "demo"
    assert "null:0" in result.stdout
    assert "asked for" in result.stdout
    assert "8 prompts, 64 tokens" in result.stdout
    assert "tokens/s" in result.stdout


def test_backends_lists_what_is_installed():
    """Each backend is a row, as a table and as JSON."""
    names = {record["name"] for record in json.loads(run("backends", "--json").stdout)}
    assert "null" in names
    page = run("backends").stdout
    assert all(name in page for name in names)


def test_plan_of_the_demo_model_is_told():
    """The plan names device, kernels, cache and memory."""
    result = run("plan", "demo", "--device", "null", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["is_supported"] is True
    assert plan["device"]["backend"] == "null"
    assert plan["memory"][0]["tag"] == "weights"
    page = run("plan", "demo", "--device", "null").stdout
    for word in ("Kernels", "Cache", "Memory", "LlamaForCausalLM"):
        assert word in page


def test_plan_that_is_refused_tells_every_reason():
    """Status 1, and all reasons at once, for people and for programs."""
    arguments = ("plan", "demo", "--device", "null", "--dtype", "int3", "--cache-dtype", "int5")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "config.dtype" in result.stderr
    assert "config.cache_dtype" in result.stderr
    as_json = run(*arguments, "--json")
    assert as_json.exit_code == 1
    reasons = json.loads(as_json.stdout)["reasons"]
    assert {"config.dtype", "config.cache_dtype"} <= {reason["code"] for reason in reasons}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7", 7), ("512M", 512 * 2**20), ("4g", 4 * 2**30), ("1.5KiB", 1536), ("2GB", 2 * 2**31 // 2)],
)
def test_parse_bytes_reads_units(text, expected):
    """Sizes are written as people write them."""
    assert parse_bytes(text) == expected


def test_every_setting_has_help():
    """Each option explains itself, in the words of the configuration's own field."""
    docs = field_docs(SamplingParams)
    assert "greedy" in docs["temperature"]
    page = run("generate", "--help").stdout
    for name in EngineConfig.__dataclass_fields__:
        # Long names are cut in the table of a narrow terminal.
        assert name == "model" or f"--{name.replace('_', '-')}"[:14] in page, name


def quire_process(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "quire", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, **options
    )


def test_help_loads_no_heavy_library():
    """`quire --help` comes fast, since it loads neither models' nor the server's libraries."""
    program = (
        "import sys, contextlib\n"
        "from quire.core.serving.cli import main\n"
        "sys.argv = ['quire', '--help']\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'uvicorn', 'numpy', 'httpx', 'zmq'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.endswith("loaded: []\n")


def test_process_without_terminal_has_no_colours():
    """In a pipe there are no escape codes, and mistakes end with status 2."""
    environment = {**os.environ, "COLUMNS": "80"}
    environment.pop("FORCE_COLOR", None)
    good = quire_process("backends", env=environment)
    assert good.returncode == 0
    bad = quire_process("serve", "demo", "--port", "70000", env=environment)
    assert bad.returncode == 2
    assert bad.stderr.startswith("quire: error: port is 70000")
    assert bad.stderr.count("\n") == 1
    assert "\x1b" not in good.stdout + good.stderr + bad.stdout + bad.stderr
