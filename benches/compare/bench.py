#!/usr/bin/env python3
"""Measures sidegate beside nginx and HAProxy on this machine, over the loopback interface.

Every proxy runs pinned to one core, the load and the upstream on another. The proxies of a
scenario are all up at the same time and take the load in turn, in short interleaved rounds; the
table shows the medians. CPU time is the kernel's account of the proxy's whole process tree.
"""

import argparse
import getpass
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Optional

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TARGET = HERE / "target"
RESULTS = HERE / "results"
DEFAULT_PEERS = "nginx,nginx-log,haproxy,resilient"
# Those that come from this repository.
OWN_PEERS = ("hyper-min", "resilient")
TICK = os.sysconf("SC_CLK_TCK")
# A core that other programs took this much of disturbs a round.
MAX_OTHER = 0.15
# So many open files are asked for; each idle connection costs the load generator one, an open
# stream costs the proxy two.
FILES = 16384

# Figures of one round or one scenario, by name.
Sample = dict


# ---------------------------------------------------------------- what is asked of sidegate


@dataclass(frozen=True)
class Bar:
    """The most that sidegate's figure may be: absolutely, or as seen from nginx's."""

    text: str
    limit: Callable[[Optional[float]], Optional[float]]


def times_nginx(factor: float) -> Bar:
    return Bar(f"<= {factor:g} x nginx", lambda nginx: None if nginx is None else factor * nginx)


def above_nginx(extra: float, unit: str) -> Bar:
    return Bar(f"<= nginx + {extra:g} {unit}", lambda nginx: None if nginx is None else nginx + extra)


def at_most(most: float, unit: str) -> Bar:
    return Bar(f"<= {most:g} {unit}", lambda _nginx: most)


@dataclass(frozen=True)
class Row:
    """One line of the table: a figure of every proxy."""

    label: str
    key: str
    bar: Optional[Bar] = None


# ---------------------------------------------------------------- processes


def fields_of_stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on; the name before it may hold anything."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2 :].split()


def tree(pid: int) -> list[int]:
    """A process and all that come from it."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                children.setdefault(int(fields_of_stat(int(entry))[1]), []).append(int(entry))
            except OSError:
                pass  # ended meanwhile
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process tree, to the nanosecond where the kernel keeps that."""
    total = 0.0
    for member in tree(pid):
        try:
            total += sum(int(p.read_text().split()[0]) for p in Path(f"/proc/{member}/task").glob("*/schedstat")) / 1e9
        except (OSError, IndexError):
            pass
    if total == 0.0:
        for member in tree(pid):
            try:
                stat = fields_of_stat(member)
                total += (int(stat[11]) + int(stat[12])) / TICK
            except OSError:
                pass
    return total


def resident_kib(pid: int) -> int:
    total = 0
    for member in tree(pid):
        try:
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith("Rss:"):
                    total += int(line.split()[1])
        except OSError:
            pass
    return total


def busy_seconds() -> float:
    """CPU time that the whole machine has used."""
    values = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(values) - values[3] - values[4]) / TICK


def spawn(argv: list[str], core: int, **options) -> subprocess.Popen:
    """Starts a program on one core. Its own session keeps a Ctrl-C for the driver, which then ends it."""
    options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.Popen(argv, preexec_fn=lambda: os.sched_setaffinity(0, {core}), start_new_session=True, **options)


def end(process: subprocess.Popen) -> None:
    """Ends a process that was started here; its children too, should it not see to them in time."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(5)
        return
    except subprocess.TimeoutExpired:
        pass
    # As long as the process is there, so is its claim to these ids.
    for pid in tree(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    process.wait(5)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return answer.read()


def wait_until_serving(port: int, process: subprocess.Popen) -> bool:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if get(port, "/hello") == b"Hello, World!":
                return True
        except OSError:
            pass
        time.sleep(0.05)
    return False


# ---------------------------------------------------------------- the proxies


@dataclass(frozen=True)
class Kind:
    """How a proxy is started. `{...}` in the command and in its file are filled in at each start."""

    name: str
    command: list[str]
    config: Optional[str] = None
    fill: tuple = ()
    # HTTP/2 with prior knowledge on the port of HTTP/1.1, rather than on one of its own.
    one_port: bool = False


NGINX_LOG = ("{log}", "access_log {tmp}/access.log line buffer=64k flush=1s")
NO_CACHE = ("{cache}", "proxy_cache off")


def cached_kinds(sidegate: str, redis: Optional[int]) -> list[Kind]:
    """sidegate that keeps answers in memory, that keeps none, and that finds them in Redis; and then its peers."""
    run = [sidegate, "run", "{config}"]
    # Room for fewer answers than are asked for: nearly all of them come out of Redis.
    there = (("{redis}", f'redis: {{ url: "redis://127.0.0.1:{redis}" }}'), ("{memory}", "max_bytes: 256KiB, max_body: 64KiB"))
    keep = "proxy_cache_path {tmp}/cache keys_zone=kept:16m max_size=64m; proxy_cache kept; proxy_cache_valid 200 1h"
    varnish = ["varnishd", "-F", "-j", "none", "-n", "{tmp}", "-a", "127.0.0.1:{port}", "-b", "127.0.0.1:{upstream}"]
    peers = [
        Kind("nginx", ["nginx", "-p", "{tmp}", "-c", "{config}"], "nginx.conf", (NGINX_LOG, ("{cache}", keep))),
        Kind("varnish", [*varnish, "-t", "3600", "-s", "malloc,64m", "-p", "thread_pools=1"]),
    ]
    return [
        Kind("sidegate", run, "cached.yaml", (("{redis}", ""), ("{memory}", "max_bytes: 64MiB")), one_port=True),
        Kind("no cache", run, "sidegate.yaml", one_port=True),
        Kind("in Redis", run, "cached.yaml", there, one_port=True),
        *(peer for peer in peers if shutil.which(peer.command[0])),
    ]


def kinds(sidegates: dict[str, str], hyper_min: str) -> dict[str, Kind]:
    nginx = ["nginx", "-p", "{tmp}", "-c", "{config}"]
    every = [
        *(Kind(name, [path, "run", "{config}"], "sidegate.yaml", one_port=True) for name, path in sidegates.items()),
        Kind("resilient", [sidegates["sidegate"], "run", "{config}"], "resilient.yaml", one_port=True),
        Kind("nginx", nginx, "nginx.conf", (("{log}", "access_log off"), NO_CACHE)),
        Kind("nginx-log", nginx, "nginx.conf", (NGINX_LOG, NO_CACHE)),
        Kind("haproxy", ["haproxy", "-db", "-f", "{config}"], "haproxy.cfg"),
        Kind("hyper-min", [hyper_min, "{port}", "{upstream}"], one_port=True),
    ]
    return {kind.name: kind for kind in every}


def limited_kinds(sidegate: str, redis: int) -> list[Kind]:
    """Without limits; with three rules in Redis, and in memory; and with one of them used up."""
    store = ("{redis}", f'redis: {{ url: "redis://127.0.0.1:{redis}" }}')
    # What the others have counted would refuse its first request, too.
    apart = ("{redis}", f'redis: {{ url: "redis://127.0.0.1:{redis}", prefix: denied }}')
    run, wide = [sidegate, "run", "{config}"], ("{limit}", "1000000000")
    return [
        Kind("sidegate", run, "sidegate.yaml", one_port=True),
        Kind("limited", run, "limited.yaml", (store, wide), one_port=True),
        Kind("in memory", run, "limited.yaml", (("{redis}", ""), wide), one_port=True),
        Kind("denied", run, "limited.yaml", (apart, ("{limit}", "1")), one_port=True),
    ]


class Proxy:
    """A running proxy, or the upstream itself, named `direct`."""

    def __init__(self, kind: Kind, bench: "Bench"):
        self.kind, self.bench, self.name = kind, bench, kind.name
        self.process: Optional[subprocess.Popen] = None
        self.tmp = Path()

    def start(self) -> None:
        if self.name == "direct":
            self.port = self.bench.upstream_port
            self.process = self.bench.upstream
            return
        self.tmp = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=self.bench.tmp))
        os.chmod(self.tmp, 0o755)  # nginx's worker may be another user
        for _ in range(3):  # another program may take a free port before the proxy does
            self.port, h2port, admin = free_ports(3)
            self.h2port = self.port if self.kind.one_port else h2port
            values = {
                **dict(self.kind.fill),
                "{port}": str(self.port),
                "{h2port}": str(h2port),
                "{admin}": str(admin),
                "{upstream}": str(self.bench.upstream_port),
                "{tmp}": str(self.tmp),
                "{user}": getpass.getuser(),
                "{files}": str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
            }

            def filled(text: str) -> str:
                for key, value in values.items():
                    text = text.replace(key, value)
                return text

            if self.kind.config:
                config = self.tmp / self.kind.config
                config.write_text(filled((HERE / self.kind.config).read_text()))
                values["{config}"] = str(config)
            with open(self.tmp / "output", "w") as output:
                self.process = spawn([filled(a) for a in self.kind.command], self.bench.proxy_core, stdout=output, stderr=output)
            if wait_until_serving(self.port, self.process):
                return
            end(self.process)
        said = (self.tmp / "output").read_text()[-1000:]
        raise RuntimeError(f"{self.name} does not serve:\n{said}")

    def stop(self) -> None:
        if self.process and self.name != "direct":
            end(self.process)
            shutil.rmtree(self.tmp, ignore_errors=True)
        self.process = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


# ---------------------------------------------------------------- load


Load = Callable[["Bench", Proxy, int, list[str]], Sample]


def run_load(bench: "Bench", argv: list[str], seconds: int) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=seconds + 60, preexec_fn=lambda: os.sched_setaffinity(0, {bench.load_core})
    )
    if done.returncode != 0:
        raise RuntimeError(f"{os.path.basename(argv[0])}: {(done.stderr or done.stdout)[-400:].strip()}")
    return done.stdout


def wrk(path: str, connections: int, method: str = "GET", size: int = 0, keys: int = 1) -> Load:
    def load(bench: "Bench", proxy: Proxy, seconds: int, prefix: list[str]) -> Sample:
        options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(HERE / "wrk.lua")]
        out = run_load(bench, [*prefix, "wrk", *options, f"http://{proxy.address}{path}", "--", method, str(size), str(keys)], seconds)
        return json.loads(next(line[5:] for line in out.splitlines() if line.startswith("JSON ")))

    return load


def h2load(path: str, connections: int, streams: int) -> Load:
    def load(bench: "Bench", proxy: Proxy, seconds: int, prefix: list[str]) -> Sample:
        log = bench.tmp / "h2load.log"
        log.unlink(missing_ok=True)
        options = ["-t1", f"-c{connections}", f"-m{streams}", f"-D{seconds}", f"--log-file={log}"]
        run_load(bench, [*prefix, "h2load", *options, f"http://127.0.0.1:{proxy.h2port}{path}"], seconds)
        # A line for each request: when it began, its status, its microseconds.
        lines = [line.split() for line in log.read_text().splitlines()]
        times = sorted(int(took) for _, status, took, *_ in lines if status == "200")
        if not times:
            raise RuntimeError("h2load: no request succeeded")
        pick = lambda percent: times[min(len(times) - 1, len(times) * percent // 100)]
        return dict(count=len(times), secs=float(seconds), p50=pick(50), p99=pick(99), errors=len(lines) - len(times))

    return load


def streams(what: str, *arguments: int) -> Load:
    def load(bench: "Bench", proxy: Proxy, seconds: int, prefix: list[str]) -> Sample:
        argv = [str(bench.client), what, proxy.address, *map(str, arguments), str(seconds)]
        sample = json.loads(run_load(bench, [*prefix, *argv], seconds))
        if sample["errors"]:
            say(f"{proxy.name}: {sample['errors']} of {sample['streams']} streams failed: {sample['error']}")
        return sample

    return load


@dataclass(frozen=True)
class Scenario:
    """Load that is put on each proxy in turn, round after round."""

    name: str
    title: str
    tool: Optional[str]
    load: Load
    rows: list[Row]
    # The bare upstream is measured too: what the machine itself takes.
    direct: bool = False
    syscalls: bool = False


def requests(cpu: Optional[Bar] = None) -> list[Row]:
    return [Row("CPU us per request", "cpu_us", cpu), Row("requests/s", "rate"), Row("p50 us", "p50"), Row("p99 us", "p99")]


SCENARIOS = [
    Scenario("hello", "GET 13 B, 64 connections", "wrk", wrk("/hello", 64), requests(times_nginx(1.5)), syscalls=True),
    Scenario("hello1", "GET 13 B, 1 connection", "wrk", wrk("/hello", 1), requests(), direct=True),
    Scenario("json64k", "GET 64 KiB JSON, 32 connections", "wrk", wrk("/json64k", 32), requests(times_nginx(1.2))),
    Scenario("post", "POST 4 KiB, echoed, 64 connections", "wrk", wrk("/echo", 64, "POST", 4096), requests()),
    Scenario("h2c", "HTTP/2 cleartext, 8 connections x 16 streams", "h2load", h2load("/hello", 8, 16), requests()),
    Scenario(
        "frames",
        "SSE, 100 streams, an event every 20 ms each",
        None,
        streams("frames", 100, 20_000),
        [
            Row("delay per frame, p50 us", "p50", above_nginx(50, "us")),
            Row("delay per frame, p99 us", "p99"),
            Row("CPU us per event", "cpu_us"),
        ],
        direct=True,
    ),
    Scenario(
        "burst",
        "SSE, 16 streams of 500 small events back to back",
        None,
        streams("burst", 16, 500),
        [Row("CPU us per event", "cpu_us", times_nginx(3)), Row("events/s", "rate")],
        syscalls=True,
    ),
]

# Those of a scenario that only sidegate takes, without limits and with them.
LIMITS = [
    Scenario("limits", "Rate limits: GET 13 B, 64 connections", "wrk", wrk("/hello", 64), requests()),
    Scenario("limits1", "Rate limits: GET 13 B, 1 connection", "wrk", wrk("/hello", 1), requests()),
]

# Those of caches. Each answer but the first is a hit.
CACHED = [
    Scenario("hits", "Cache: hits of 13 B, 64 connections", "wrk", wrk("/hello", 64), requests(times_nginx(1))),
    Scenario("hits64k", "Cache: hits of 64 KiB, 32 connections", "wrk", wrk("/json64k", 32), requests(times_nginx(1))),
]
# More answers than sidegate has room for in memory, where its others are in Redis.
MANY = Scenario(
    "many",
    "Cache: hits of 13 B under 10,000 keys in turn, 64 connections",
    "wrk",
    wrk("/hello", 64, keys=10_000),
    requests(times_nginx(1)),
)
# Of sidegate alone: nothing is a hit, and everything is recorded.
RECORDED = Scenario(
    "recorded",
    "Cache: SSE, 100 streams, an event every 20 ms each, recorded",
    None,
    streams("frames", 100, 20_000),
    [Row("delay per frame, p50 us", "p50"), Row("delay per frame, p99 us", "p99"), Row("CPU us per event", "cpu_us")],
)

MEMORY_ROWS = [
    Row("resident at start, MiB", "start_mib"),
    Row("per idle connection, KiB", "idle_kib"),
    Row("per open SSE stream, KiB", "stream_kib", at_most(33, "KiB")),
]

CANCEL_ROWS = [
    Row("before the head, p50 us", "head_p50", at_most(1000, "us")),
    Row("before the head, p99 us", "head_p99", at_most(1000, "us")),
    Row("mid-stream, p50 us", "stream_p50", at_most(1000, "us")),
    Row("mid-stream, p99 us", "stream_p99", at_most(1000, "us")),
    Row("not seen within 3 s", "unseen"),
]


# ---------------------------------------------------------------- the run


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


class Bench:
    """One run: the upstream, the settings, and what came out."""

    def __init__(self, options: argparse.Namespace, tmp: Path, upstream: str, client: str):
        cores = sorted(os.sched_getaffinity(0))
        self.options, self.tmp, self.client = options, tmp, client
        self.proxy_core, self.load_core = cores[0], cores[1 % len(cores)]
        self.notes: list[str] = []
        self.rounds = self.disturbed = 0
        for _ in range(3):
            (self.upstream_port,) = free_ports(1)
            self.upstream = spawn([upstream, str(self.upstream_port)], self.load_core)
            if wait_until_serving(self.upstream_port, self.upstream):
                return
            end(self.upstream)
        raise RuntimeError("the upstream does not serve")

    def started(self, all_kinds: list[Kind], stack: ExitStack) -> list[Proxy]:
        """Those proxies that come up; `stack` ends them."""
        proxies = []
        for kind in all_kinds:
            proxy = Proxy(kind, self)
            stack.callback(proxy.stop)
            try:
                proxy.start()
                proxies.append(proxy)
            except (RuntimeError, OSError) as error:
                say(str(error))
                self.notes.append(f"{kind.name} did not start and is left out of a scenario")
        return proxies

    def measured(self, proxy: Proxy, load: Load) -> Sample:
        """One round: the load's own figures, the proxy's CPU time, and how much others took of the machine."""
        watched = [proxy.pid, self.upstream.pid]
        before, busy, children, began = [cpu_seconds(p) for p in watched], busy_seconds(), os.times(), time.monotonic()
        sample = load(self, proxy, self.options.secs, [])
        took, children_now, busy_now = time.monotonic() - began, os.times(), busy_seconds()
        own, upstream = (cpu_seconds(p) - b for p, b in zip(watched, before))
        ours = sum(children_now[:4]) - sum(children[:4]) + upstream + (0 if proxy.name == "direct" else own)
        sample["cpu_us"] = own * 1e6 / max(1, sample["count"])
        sample["rate"] = sample["count"] / sample["secs"]
        sample["other"] = (busy_now - busy - ours) / took
        return sample

    def scenario(self, scenario: Scenario, all_kinds: list[Kind]) -> dict[str, Sample]:
        """Interleaved rounds of one scenario; the medians by proxy."""
        if scenario.direct:
            all_kinds = [*all_kinds, Kind("direct", [])]
        rounds: dict[str, list[Sample]] = {}
        counts: dict[str, float] = {}
        with ExitStack() as stack:
            proxies = self.started(all_kinds, stack)
            for proxy in proxies:
                self.attempt(proxy, lambda p: scenario.load(self, p, 1, []))
            lasting = False
            for number in range(self.options.rounds):
                # Each round begins with another proxy, so that none is always first after a pause.
                first = number % max(1, len(proxies))
                for proxy in proxies[first:] + proxies[:first]:
                    sample = self.attempt(proxy, lambda p: self.measured(p, scenario.load))
                    # Once more after a disturbance, but noise that lasts is not waited for.
                    if sample and sample["other"] > MAX_OTHER and not lasting:
                        sample = self.attempt(proxy, lambda p: self.measured(p, scenario.load)) or sample
                    if sample:
                        lasting = sample["other"] > MAX_OTHER
                        rounds.setdefault(proxy.name, []).append(sample)
                        say(f"{scenario.name} {number + 1}/{self.options.rounds} {proxy.name}: {sample['rate']:.0f}/s, {sample['cpu_us']:.2f} us CPU" + (f" (disturbed: {sample['other']:.2f} of a core)" if lasting else ""))
            if scenario.syscalls and self.options.syscalls:
                for proxy in proxies:
                    calls = self.attempt(proxy, lambda p: self.syscalls(p, scenario.load))
                    if calls is not None:
                        counts[proxy.name] = calls
        return {name: self.summary(scenario, name, samples, counts.get(name)) for name, samples in rounds.items()}

    def summary(self, scenario: Scenario, name: str, samples: list[Sample], syscalls: Optional[float]) -> Sample:
        quiet = [s for s in samples if s["other"] <= MAX_OTHER]
        self.rounds += len(samples)
        self.disturbed += len(samples) - len(quiet)
        # Who is denied gets errors.
        if (errors := sum(s["errors"] for s in samples)) and name != "denied":
            self.notes.append(f"{scenario.name}, {name}: {errors} errors")
        # Where there are two quiet rounds, they alone count.
        used = quiet if len(quiet) >= 2 else samples
        result = {key: statistics.median(s[key] for s in used) for key in ("cpu_us", "rate", "p50", "p99")}
        result.update(cpu_us_best=min(s["cpu_us"] for s in samples), rounds=len(samples), quiet=len(quiet), errors=errors)
        if name == "direct":
            del result["cpu_us"]  # the upstream's own
        if syscalls is not None:
            result["syscalls"] = syscalls
        return result

    @contextmanager
    def redis(self) -> Iterator[int]:
        """The port of a Redis that keeps nothing on disk, beside the upstream."""
        (port,) = free_ports(1)
        options = ["--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(self.tmp)]
        redis = spawn(["redis-server", *options], self.load_core, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 10
            while subprocess.run(["redis-cli", "-p", str(port), "PING"], capture_output=True).stdout != b"PONG\n":
                if time.monotonic() > deadline:
                    raise RuntimeError("Redis does not serve")
                time.sleep(0.05)
            yield port
        finally:
            end(redis)

    def caches(self, sidegate: str) -> list[tuple[str, list[Row], dict[str, Sample]]]:
        """What hits cost, of all caches; those out of Redis; and what recording a stream does."""
        has_redis = all(map(shutil.which, ("redis-server", "redis-cli")))
        with self.redis() if has_redis else nullcontext() as port:
            here, none, there, *others = cached_kinds(sidegate, port)
            runs = [(scenario, [here, none, *others]) for scenario in CACHED] if shutil.which("wrk") else []
            if has_redis and runs:
                runs.append((MANY, [here, there, *others]))
            runs.append((RECORDED, [here, none]))
            return [(scenario.title, scenario.rows, self.scenario(scenario, of)) for scenario, of in runs]

    def limits(self, sidegate: str) -> tuple[list[tuple[str, list[Row], dict[str, Sample]]], float]:
        """What limits cost, and the median of a bare EVALSHA of their script, in microseconds."""
        with self.redis() as port:
            cli = ["redis-cli", "-p", str(port)]
            script = (ROOT / "src/layers/rate_limit/script.lua").read_text()
            known = subprocess.run([*cli, "SCRIPT", "LOAD", script], capture_output=True, text=True, check=True).stdout.strip()
            rule = [["0", "1", "1000000000", "3600000000", "1000000000", "0"], ["1", "1", "1000000000", "3600000000", "1000000000", "0"]]
            call = ["EVALSHA", known, "3", "{b}a", "{b}b", "{b}c", *rule[0], *rule[0], *rule[1], *["0"] * 6]
            bare = ["redis-benchmark", "-p", str(port), "-c", "1", "-n", "20000", "--csv", *call]
            # Where the proxies stand.
            pin = lambda: os.sched_setaffinity(0, {self.proxy_core})
            rounds = [subprocess.run(bare, capture_output=True, text=True, check=True, preexec_fn=pin).stdout for _ in range(3)]
            # "test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms",...
            trip = statistics.median(float(out.splitlines()[-1].split(",")[4].strip('"')) * 1000 for out in rounds)
            all_kinds, sections = limited_kinds(sidegate, port), []
            for scenario in LIMITS:
                sections.append((scenario.title, scenario.rows, self.scenario(scenario, all_kinds)))
            return sections, trip

    def attempt(self, proxy: Proxy, what: Callable[[Proxy], object]):
        """A failed round is told and left out; it does not end the run."""
        try:
            return what(proxy)
        except (RuntimeError, OSError, ValueError, StopIteration, subprocess.TimeoutExpired) as error:
            say(f"{proxy.name}: {error}")
            return None

    def syscalls(self, proxy: Proxy, load: Load) -> float:
        """System calls for each thing that was counted, from the kernel's own tracepoint: free of noise."""
        counts = self.tmp / "perf.csv"
        pids = ",".join(map(str, tree(proxy.pid)))
        perf = ["perf", "stat", "-x,", "-e", "raw_syscalls:sys_enter", "-o", str(counts), "-p", pids, "--"]
        sample = load(self, proxy, 1, perf)
        found = re.search(r"^(\d+),", counts.read_text(), re.MULTILINE)
        if not found:
            raise RuntimeError("perf counted nothing")
        return int(found[1]) / sample["count"]

    def memory(self, all_kinds: list[Kind]) -> dict[str, Sample]:
        """What one more connection, and one more open stream, costs a proxy that has already worked."""
        result: dict[str, Sample] = {}
        for kind in all_kinds:
            # A fresh process for each, for memory that the first one gave back would hide the second's.
            for what, count, key in (("idle", self.options.idle, "idle_kib"), ("stream", self.options.streams, "stream_kib")):
                with ExitStack() as stack:
                    for proxy in self.started([kind], stack):
                        time.sleep(0.3)
                        start = resident_kib(proxy.pid)
                        held = self.attempt(proxy, lambda p: self.held(p, what, count))
                        if held is not None:
                            result.setdefault(kind.name, {}).update({"start_mib": start / 1024, key: held})
            say(f"memory {kind.name}: {result.get(kind.name)}")
        return result

    def held(self, proxy: Proxy, what: str, count: int) -> float:
        if shutil.which("wrk"):
            wrk("/hello", 64)(self, proxy, 1, [])
        time.sleep(0.7)
        before = resident_kib(proxy.pid)
        argv = [str(self.client), "hold", proxy.address, what, str(count)]
        client = spawn(argv, self.load_core, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            if client.stdout.readline() != "ready\n":
                raise RuntimeError(f"{count} x {what} could not be opened")
            # Two or three events of each stream later.
            time.sleep(2.5 if what == "stream" else 0.7)
            if what == "stream" and (open_streams := int(get(self.upstream_port, "/streams"))) != count:
                raise RuntimeError(f"the upstream sees {open_streams} of {count} streams")
            return (resident_kib(proxy.pid) - before) / count
        finally:
            client.stdin.close()
            try:
                client.wait(5)
            except subprocess.TimeoutExpired:
                end(client)
            client.stdout.close()

    def cancel(self, all_kinds: list[Kind]) -> dict[str, Sample]:
        """How long after a client left the upstream sees it, one client at a time."""
        result: dict[str, Sample] = {}
        with ExitStack() as stack:
            for proxy in self.started([*all_kinds, Kind("direct", [])], stack):
                figures: Sample = {"unseen": 0}
                for when in ("head", "stream"):
                    argv = [str(self.client), "cancel", proxy.address, f"127.0.0.1:{self.upstream_port}", when, str(self.options.cancels)]
                    seen = self.attempt(proxy, lambda _p: json.loads(run_load(self, argv, 30)))
                    if seen:
                        figures["unseen"] += seen["unseen"]
                        if seen["count"]:
                            figures.update({f"{when}_p50": seen["p50"], f"{when}_p99": seen["p99"]})
                result[proxy.name] = figures
                say(f"cancel {proxy.name}: {figures}")
        return result


# ---------------------------------------------------------------- the table


def number(value: Optional[float]) -> str:
    """Three figures, or all that stand before the point."""
    if value is None:
        return "-"
    digits = 0 if isinstance(value, int) or abs(value) >= 100 or value == 0 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def table(sections: list[tuple[str, list[Row], dict[str, Sample]]], names: list[str], others: list[str]) -> tuple[list[str], int, int]:
    """The lines of the table with the ratio to `others`, and how many bars were passed and missed."""
    peers = [name for name in others if name in names]
    rows = [["", *names, *(f"/ {peer}" for peer in peers), "bar", "result"]]
    passed = missed = 0
    for title, lines, figures in sections:
        rows.append([f"**{title}**", *[""] * (len(rows[0]) - 1)])
        for line in lines:
            value = {name: figures.get(name, {}).get(line.key) for name in names}
            if all(v is None for v in value.values()):
                continue
            ours = value["sidegate"]
            cells = [line.label, *(number(value[name]) for name in names)]
            for peer in peers:
                cells.append(f"{ours / value[peer]:.2f}" if ours is not None and value[peer] else "-")
            verdict = ""
            limit = line.bar.limit(value.get("nginx")) if line.bar else None
            if ours is not None and limit is not None:
                verdict = "pass" if ours <= limit else "**miss**"
                passed, missed = passed + (ours <= limit), missed + (ours > limit)
            rows.append([*cells, line.bar.text if line.bar else "", verdict])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = {0, len(widths) - 1, len(widths) - 2}
    align = lambda row: "| " + " | ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i in left else ":") for i, w in enumerate(widths)) + "|"
    return [align(rows[0]), rule, *map(align, rows[1:])], passed, missed


def limits_table(sections: list[tuple[str, list[Row], dict[str, Sample]]], trip: float) -> list[str]:
    names = ["sidegate", "limited", "in memory", "denied"]
    lines, _, _ = table(sections, names, [])
    (_, _, many), (_, _, one) = sections
    added = one["limited"]["p50"] - one["sidegate"]["p50"]
    allowed, denied = many["limited"]["rate"], many["denied"]["rate"]
    return [
        *lines,
        "",
        f"- a bare EVALSHA of the three rules, p50: {trip:.0f} us; added to a request, p50: {added:.0f} us, {added / trip:.2f} x (aim: under 1.3)",
        f"- denied over allowed requests/s: {denied / allowed:.2f} x (aim: above 3)",
    ]


def cached_table(sections: list[tuple[str, list[Row], dict[str, Sample]]]) -> tuple[list[str], int, int]:
    names = [name for name in ("sidegate", "no cache", "in Redis", "nginx", "varnish") if any(name in figures for _, _, figures in sections)]
    return table(sections, names, ["no cache", "in Redis", "nginx", "varnish"])


def said_by(argv: list[str], pattern: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
        found = re.search(pattern, done.stdout + done.stderr)
        return found[1] if found else "?"
    except OSError:
        return "?"


def facts(bench: Bench, names: list[str], sidegates: dict[str, str]) -> list[str]:
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    commit = said_by(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], r"(\S+)")
    number_of = r"(\d[\w.+-]*)"
    versions = [f"{name} {said_by([path, '--version'], number_of)}" for name, path in sidegates.items()]
    if "nginx" in names or "nginx-log" in names:
        versions.append("nginx " + said_by(["nginx", "-v"], r"nginx/(\S+)"))
    if "cache" in bench.options.only:
        versions.append("Varnish " + said_by(["varnishd", "-V"], r"varnish-(\S+)"))
    if "haproxy" in names:
        versions.append("HAProxy " + said_by(["haproxy", "-v"], r"version (\S+)"))
    rustc = said_by(["rustc", "--version"], r"(rustc \S+)")
    o = bench.options
    return [
        f"- {len(os.sched_getaffinity(0))} cores ({model[1].strip() if model else platform.machine()}), {int(memory[1]) / 2**20:.0f} GiB, Linux {platform.release()}",
        f"- {', '.join(versions)}; commit {commit}; {rustc}",
        f"- every proxy on core {bench.proxy_core} with one worker, load and upstream on core {bench.load_core}; medians of {o.rounds} interleaved rounds of {o.secs} s",
        f"- {o.idle} idle connections, {o.streams} open streams, {o.cancels} departures of each sort",
        f"- {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, load average at the end {os.getloadavg()[0]:.2f}",
    ]


# ---------------------------------------------------------------- the command


def build(manifest: Path, target: Optional[Path] = None) -> dict[str, str]:
    """Builds a package for release; its programs by name."""
    command = ["cargo", "build", "--release", "--bins", "--manifest-path", str(manifest), "--message-format", "json-render-diagnostics"]
    if target:
        command += ["--target-dir", str(target)]
    say(f"building {manifest.parent.name}")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(done.returncode)
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    return {m["target"]["name"]: m["executable"] for m in messages if m.get("executable")}


def arguments() -> argparse.Namespace:
    names = [s.name for s in SCENARIOS] + ["limits", "cache", "memory", "cancel"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test of a minute: one round of a second each, fewer connections")
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("BENCH_ROUNDS") or 3), help="rounds of each scenario (default: $BENCH_ROUNDS, else 3)")
    parser.add_argument("--secs", type=int, default=2, help="seconds of each round (default 2)")
    parser.add_argument("--first", action="store_true", help="before all other programs (nice -19; root only): on a machine that does something else besides")
    parser.add_argument("--only", default=",".join(names), metavar="LIST", help="of " + ",".join(names))
    parser.add_argument("--peers", default=DEFAULT_PEERS, metavar="LIST", help=f"of {DEFAULT_PEERS},hyper-min, or empty (default {DEFAULT_PEERS})")
    parser.add_argument("--sidegate", metavar="PATH", help="a program that is already built, instead of this checkout's release build")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=PATH", help="one more sidegate in the same run, such as the build before a change")
    options = parser.parse_args()
    options.only = [name for name in options.only.split(",") if name]
    options.peers = [name for name in options.peers.split(",") if name]
    if unknown := set(options.only) - set(names):
        parser.error(f"no scenario {', '.join(sorted(unknown))}")
    if unknown := set(options.peers) - {*DEFAULT_PEERS.split(","), *OWN_PEERS}:
        parser.error(f"no peer {', '.join(sorted(unknown))}")
    if any("=" not in pair for pair in options.also):
        parser.error("--also wants NAME=PATH")
    options.rounds, options.secs = max(1, options.rounds), max(1, options.secs)
    options.idle, options.streams, options.cancels = 2000, 1000, 300
    if options.quick:
        options.rounds, options.secs = 1, 1
        options.idle, options.streams, options.cancels = 500, 200, 50
    options.syscalls = not options.quick and counts_syscalls()
    return options


def counts_syscalls() -> bool:
    """Whether perf is there and may count."""
    try:
        done = subprocess.run(["perf", "stat", "-x,", "-e", "raw_syscalls:sys_enter", "true"], capture_output=True, text=True, timeout=20)
        return done.returncode == 0 and re.search(r"^\d+,", done.stderr, re.MULTILINE) is not None
    except OSError:
        return False


def main() -> None:
    options = arguments()
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # where Debian puts servers
    # A SIGTERM ends what was started, as an interrupt does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    options.idle, options.streams = min(options.idle, files // 2), min(options.streams, files // 4)

    programs = build(HERE / "harness" / "Cargo.toml", TARGET)
    sidegate = options.sidegate or build(ROOT / "Cargo.toml")["sidegate"]
    sidegates = {"sidegate": sidegate, **dict(pair.split("=", 1) for pair in options.also)}
    hyper_min = build(HERE / "hyper-min" / "Cargo.toml", TARGET)["hyper-min"] if "hyper-min" in options.peers else ""

    if options.first:
        os.setpriority(os.PRIO_PROCESS, 0, -19)  # what is started from here on has it too

    skipped = []
    peers = [p for p in options.peers if p in OWN_PEERS or shutil.which(p.split("-")[0])]
    if missing := sorted({p.split("-")[0] for p in set(options.peers) - set(peers)}):
        skipped.append(f"not installed, and so not measured: {', '.join(missing)}")
    names = [*sidegates, *peers]
    by_name = kinds(sidegates, hyper_min)
    sections, raw, limits, trip, cached = [], {}, [], 0.0, []
    with tempfile.TemporaryDirectory(prefix="sidegate-bench-") as tmp:
        os.chmod(tmp, 0o755)
        bench = Bench(options, Path(tmp), programs["upstream"], programs["client"])
        bench.notes += skipped
        if len(os.sched_getaffinity(0)) < 2:
            bench.notes.append("one core only: load and proxy take time from each other, so rates and delays say little")
        try:
            for scenario in SCENARIOS:
                if scenario.name not in options.only:
                    continue
                if scenario.tool and not shutil.which(scenario.tool):
                    bench.notes.append(f"{scenario.name} is left out: {scenario.tool} is not installed")
                    continue
                raw[scenario.name] = bench.scenario(scenario, [by_name[n] for n in names])
                sections.append((scenario.title, [*scenario.rows, *([Row("system calls each", "syscalls")] if scenario.syscalls else [])], raw[scenario.name]))
            if "limits" in options.only and all(map(shutil.which, ("wrk", "redis-server", "redis-cli", "redis-benchmark"))):
                limits, trip = bench.limits(sidegate)
            elif "limits" in options.only:
                bench.notes.append("limits are left out: wrk or Redis is not installed")
            if "cache" in options.only:
                cached = bench.caches(sidegate)
            if "memory" in options.only:
                raw["memory"] = bench.memory([by_name[n] for n in names])
                sections.append(("Memory", MEMORY_ROWS, raw["memory"]))
            if "cancel" in options.only:
                raw["cancel"] = bench.cancel([by_name[n] for n in names])
                sections.append(("From a client's leaving to the upstream's seeing it", CANCEL_ROWS, raw["cancel"]))
        finally:
            end(bench.upstream)

    columns = [*names, *(["direct"] if any("direct" in figures for _, _, figures in sections) else [])]
    lines, passed, missed = table(sections, columns, ["nginx", "nginx-log", "resilient", *list(sidegates)[1:]])
    if limits:
        raw.update(zip((s.name for s in LIMITS), (figures for _, _, figures in limits)))
        lines += ["", *limits_table(limits, trip)]
    if cached:
        raw.update((title, figures) for title, _, figures in cached)
        more, hit, miss = cached_table(cached)
        lines, passed, missed = [*lines, "", *more], passed + hit, missed + miss
    report = [*facts(bench, names, sidegates), "", *lines, "", f"{passed} bars passed, {missed} missed."]
    if bench.disturbed:
        bench.notes.append(
            f"other programs took more than {MAX_OTHER:g} of a core in {bench.disturbed} of {bench.rounds} rounds: "
            "where fewer than two quiet ones were left, the figures hold those too"
        )
    if bench.notes:
        report += ["", *(f"- {note}" for note in dict.fromkeys(bench.notes))]
    text = "\n".join(report) + "\n"
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps({"options": vars(options), "notes": bench.notes, "figures": raw}, indent=1) + "\n")
    print(text)
    say(f"written to {os.path.relpath(stem)}.md and .json")
    if not any("sidegate" in figures for figures in raw.values()):
        sys.exit("bench: sidegate itself could not be measured")


if __name__ == "__main__":
    main()
