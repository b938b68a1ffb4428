"""Trains on two hosts, which are two network namespaces joined by a virtual cable, and compares with one host.

    python tests/scripts/two_hosts.py FOLDER        (as root on Linux)

Each host runs one process under torchrun's own rendezvous; the other run has both processes on this host. Every tensor
of both last checkpoints has to be equal to the bit. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "scripts")]

from kill_runs import differences, tiny_words  # noqa: E402

from solov2.checkpoint import load_file  # noqa: E402

HOSTS = {"solov2-a": "10.77.0.1", "solov2-b": "10.77.0.2"}
PORT = 29477


def ip(*words: str) -> None:
    """Run iproute2's `ip`."""
    subprocess.run(["ip", *words], check=True)


def lay_cable() -> None:
    """Two namespaces with one address each, joined directly."""
    for host in HOSTS:
        ip("netns", "add", host)
    first, second = HOSTS
    ip("link", "add", "veth-a", "netns", first, "type", "veth", "peer", "name", "veth-b", "netns", second)
    for (host, address), device in zip(HOSTS.items(), ("veth-a", "veth-b"), strict=True):
        ip("-n", host, "address", "add", f"{address}/24", "dev", device)
        ip("-n", host, "link", "set", device, "up")
        ip("-n", host, "link", "set", "lo", "up")


def remove_cable() -> None:
    """Take the namespaces away, and the cable with them."""
    for host in HOSTS:
        subprocess.run(["ip", "netns", "delete", host], check=False)


def launch(
    words: list[str], output: Path, *launcher: str, host: str | None = None, device: str = "lo"
) -> subprocess.Popen:
    """torchrun with these options, in a namespace where one is named."""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / "train.py"), *words]
    command += ["--output", str(output)]
    inside = ["ip", "netns", "exec", host] if host else []
    log = open(output.with_name(f"{output.name}_{host}.log"), "w")  # noqa: SIM115 (the child writes it)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": device}
    return subprocess.Popen([*inside, *command], stdout=log, stderr=log, env=environment)


def main() -> int:
    """Exit code 1 where a process fails or a bit differs."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    words = tiny_words(folder)
    single = launch(words, folder / "one_host", "--standalone", "--nproc-per-node", "2")
    if single.wait():
        raise SystemExit(f"the run on one host failed, see {folder}")
    try:
        lay_cable()
        address = next(iter(HOSTS.values()))
        runs = [
            launch(
                words, folder / "two_hosts", "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1",
                "--rdzv-backend", "static", "--master-addr", address, "--master-port", str(PORT),
                host=host, device=f"veth-{'ab'[rank]}",
            )
            for rank, host in enumerate(HOSTS)
        ]  # fmt: skip
        codes = [run.wait() for run in runs]
    finally:
        remove_cable()
    first, second = (load_file(folder / name / "last.pth") for name in ("one_host", "two_hosts"))
    different = differences(first, second)
    print(json.dumps({"exit_codes": codes, "hosts": HOSTS, "different": different}))
    return any(codes) or bool(different)


if __name__ == "__main__":
    sys.exit(main())
