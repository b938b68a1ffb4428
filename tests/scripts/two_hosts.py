"""Train on two hosts, simulated by two connected network namespaces, and compare the result with one host.

    python tests/scripts/two_hosts.py FOLDER        (as root on Linux)

Each host runs one process with torchrun's own rendezvous; the other run has both processes on this host. The last
checkpoints of both runs must be bit-identical. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "scripts")]

from kill_runs import differences, folder_argument, tiny_words  # noqa: E402

from solov2.checkpoint import load_file  # noqa: E402

HOSTS = {"solov2-a": "10.77.0.1", "solov2-b": "10.77.0.2"}
PORT = 29477


def ip(*words: str) -> None:
    """Run iproute2's `ip`."""
    subprocess.run(["ip", *words], check=True)


def connect_hosts() -> None:
    """Create two namespaces with one address each, and connect them directly."""
    for host in HOSTS:
        ip("netns", "add", host)
    first, second = HOSTS
    ip("link", "add", "veth-a", "netns", first, "type", "veth", "peer", "name", "veth-b", "netns", second)
    for (host, address), device in zip(HOSTS.items(), ("veth-a", "veth-b"), strict=True):
        ip("-n", host, "address", "add", f"{address}/24", "dev", device)
        ip("-n", host, "link", "set", device, "up")
        ip("-n", host, "link", "set", "lo", "up")


def remove_hosts() -> None:
    """Delete the namespaces and, with them, their connection."""
    for host in HOSTS:
        subprocess.run(["ip", "netns", "delete", host], check=False)


def launch(
    words: list[str], output: Path, *launcher: str, host: str | None = None, device: str = "lo"
) -> subprocess.Popen:
    """Start torchrun with these options, in the namespace of `host` if given."""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / "train.py"), *words]
    command += ["--output", str(output)]
    inside = ["ip", "netns", "exec", host] if host else []
    log = open(output.with_name(f"{output.name}_{host}.log"), "w")  # noqa: SIM115 (the child writes it)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": device}
    return subprocess.Popen([*inside, *command], stdout=log, stderr=log, env=environment)


def main() -> int:
    """Returns exit code 1 if a process fails or the checkpoints differ."""
    folder = folder_argument(__doc__)
    folder.mkdir(parents=True, exist_ok=True)
    words = tiny_words(folder)
    single = launch(words, folder / "one_host", "--standalone", "--nproc-per-node", "2")
    if single.wait():
        raise SystemExit(f"the run on one host failed, see {folder}")
    try:
        connect_hosts()
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
        remove_hosts()
    first, second = (load_file(folder / name / "last.pth") for name in ("one_host", "two_hosts"))
    different = differences(first, second)
    print(json.dumps({"exit_codes": codes, "hosts": HOSTS, "different": different}))
    return any(codes) or bool(different)


if __name__ == "__main__":
    sys.exit(main())
