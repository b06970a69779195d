"""Two "hosts": network namespaces with names of their own and a link of 1 Gbit/s between them.

Where the kernel has netem, the link takes 1 ms there and back. The tests need root, and are skipped
where namespaces are not permitted, as in most containers.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import tiny
from launching import MPIRUN, environment, needs_mpi, run
from safetensors.numpy import load_file

pytestmark = [needs_mpi, pytest.mark.slow]
HERE = Path(__file__).parent
NAMES = [f"pyloss{os.getpid()}{letter}" for letter in "ab"]
#: what docs/distributed.md says of a lost connection
KEEPALIVE = ["time 2", "intvl 1", "probes 3"]


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """The words before mpirun's own that start ranks on both hosts."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs ip (Debian: iproute2) and unshare")
    made = [ip("netns", "add", name) for name in NAMES]
    try:
        links = [f"{name}0"[-15:] for name in NAMES]
        ends = "link", "add", links[0], "netns", NAMES[0], "type", "veth", "peer"
        made.append(ip(*ends, "name", links[1], "netns", NAMES[1]))
        if any(done.returncode for done in made):
            pytest.skip(f"network namespaces are not permitted here: {made[-1].stderr.strip()}")
        for number, (name, link) in enumerate(zip(NAMES, links), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            for device in ("lo", link):
                assert ip("-n", name, "link", "set", device, "up").returncode == 0
            shape = ["tc", "qdisc", "add", "dev", link, "root"]
            slow = [*shape, "netem", "delay", "0.5ms", "rate", "1gbit"]
            if ip("netns", "exec", name, *slow).returncode:
                limit = ["tbf", "rate", "1gbit", "burst", "1mb", "latency", "50ms"]
                ip("netns", "exec", name, *shape, *limit)
        agent = tmp_path_factory.mktemp("hosts") / "agent.sh"  # in the place of ssh
        agent.write_text(
            f'#!/bin/sh\nshift\nexec ip netns exec {NAMES[1]} unshare --uts sh -c "hostname host-b; $*"\n'
        )
        agent.chmod(0o755)
        yield {"agent": agent, "link": links[1]}
    finally:
        for name in NAMES:
            ip("netns", "del", name)


def on_hosts(hosts, *words, **more):
    """The command of two ranks, one on each host."""
    options = [f"plm_rsh_agent {hosts['agent']}", "btl self,tcp"]
    options += [f"{layer}_tcp_if_include 10.77.0.0/24" for layer in ("btl", "oob")]
    options += [f"oob_tcp_keepalive_{option}" for option in KEEPALIVE]
    settings = [word for option in options for word in ("--mca", *option.split(" ", 1))]
    given = [word for name in ("PYTHONPATH", "PYLOSS_NUM_THREADS", *more) for word in ("-x", name)]
    start = ["ip", "netns", "exec", NAMES[0], "unshare", "--uts", "sh", "-c"]
    start += ['hostname host-a; exec "$@"', "sh", *MPIRUN, *settings]
    return [*start, "--host", "10.77.0.1:1,10.77.0.2:1", *given, "-n", "2", *map(str, words)]


def started(hosts, *words, **more):
    import sys

    return subprocess.Popen(
        on_hosts(hosts, sys.executable, *words, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**more),
    )


def test_two_hosts_have_the_bits_of_one(hosts, tmp_path):
    """The order of a sum is that of the ranks, wherever they are."""
    tiny.write_folder(tmp_path / "base", tied=False)
    specs = [
        {"folder": str(tmp_path / "base"), "batch": 8, "kind": kind, "dropout": 0.1}
        for kind in ("lora", "full")
    ]
    run(2, HERE / "tiny_runs.py", json.dumps(specs), tmp_path / "one.json")
    process = started(hosts, HERE / "tiny_runs.py", json.dumps(specs), tmp_path / "two.json")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for here, there in zip(one, two):
        assert here["bits"] == there["bits"] and here["losses"] == there["losses"]


def test_a_host_with_other_data_is_named(hosts, tmp_path):
    process = started(hosts, HERE / "faulty_run.py", tmp_path / "run", "data", "1", "0")
    _, errors = process.communicate(timeout=60)
    assert process.returncode
    assert "training data differs: rank 1 on host-b has" in errors


def test_a_link_that_goes_down_ends_both_hosts(hosts, tmp_path):
    folder = tmp_path / "run"
    process = started(hosts, HERE / "faulty_run.py", folder, "resume", "0", "0", ITERS="100000")
    try:
        for line in process.stdout:
            if line.startswith("20 "):
                break
        down = ip("-n", NAMES[1], "link", "set", hosts["link"], "down")
        begun = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert down.returncode == 0 and process.returncode
        assert time.monotonic() - begun < 20, "a lost connection was noticed too late"
        assert "lost communication" in errors
    finally:
        process.kill()
        ip("-n", NAMES[1], "link", "set", hosts["link"], "up")
    assert load_file(folder / "adapters.safetensors")
