"""The lab itself, on real hosts: what other tests rely on when they cut, kill and capture."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root"),
    pytest.mark.skipif(not shutil.which("systemd-nspawn"), reason="run `tests/lab/lab deps` first"),
]

HERE = Path(__file__).parent
LEFT, RIGHT = "203.0.113.1", "198.51.100.1"
# Of this test run alone, so that it disturbs no lab of somebody else, and no second run disturbs it.
NAME = f"selftest-{os.getpid()}"
TWIN = f"{NAME}-twin"


def lab(*words: str, name: str = NAME, check: bool = True, timeout: float = 1500) -> subprocess.CompletedProcess[str]:
    """Run a lab command on the lab `name`."""
    command, *rest = words
    done = subprocess.run(
        [sys.executable, str(HERE / "lab"), command, "--name", name, *rest],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def on(host: str, line: str, *, name: str = NAME) -> str:
    """What a shell command line on a host prints; it must succeed."""
    return lab("shell", host, "--", line, name=name).stdout


def reaches(host: str, address: str, *, name: str = NAME) -> bool:
    """Whether an address answers a host's ping."""
    line = f"ping -c 1 -W 1 {address}"
    return lab("shell", host, "--", line, name=name, check=False).returncode == 0


def listed(name: str) -> dict[str, Any] | None:
    """What `lab list --json` says about a lab."""
    done = subprocess.run([sys.executable, str(HERE / "lab"), "list", "--json"], capture_output=True, check=True)
    labs: list[dict[str, Any]] = json.loads(done.stdout)["labs"]
    return next((entry for entry in labs if entry["name"] == name), None)


def traces(name: str) -> list[str]:
    """Everything on this machine that bears a lab's name: namespaces, mounts, processes, control groups, files."""
    # TWIN's name begins with NAME: a name ends where a host's begins, or where a path goes on.
    mark = re.compile(rf"\bfs-{name}-[a-z0-9]+(?![a-z0-9-])|farshore-lab/{name}(/|\s|$)|--name {name}\s")
    found = []
    for what, command in (
        ("namespace", ["ip", "netns"]),
        ("mount", ["cat", "/proc/mounts"]),
        ("process", ["ps", "-eo", "stat,pid,args"]),
        ("group", ["find", "/sys/fs/cgroup", "-type", "d", "-path", "*farshore-lab*"]),
        ("file", ["find", "/run/farshore-lab", "/var/tmp/farshore-lab", "/run/systemd/nspawn", "-maxdepth", "2"]),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found += [f"{what}: {line}" for line in done.stdout.splitlines() if mark.search(line) and line[0] != "Z"]
    return found


@pytest.fixture(scope="module", autouse=True)
def pair() -> Iterator[None]:
    """A lab of two hosts, called NAME, for all tests of this file."""
    try:
        lab("up", "--topology", "pair")
        yield
    finally:
        lab("down", name=TWIN)
        lab("down")


def test_hosts_are_as_their_topology_says() -> None:
    assert on("left", ". /etc/os-release; echo $VERSION_CODENAME; hostname").split() == ["bookworm", "left"]
    assert on("right", ". /etc/os-release; echo $VERSION_CODENAME; hostname").split() == ["trixie", "right"]
    assert on("left", "systemctl is-system-running").strip() == "running"
    assert reaches("left", RIGHT)
    entry = listed(NAME)
    assert entry is not None
    assert entry["hosts"]["left"]["addresses"] == {"inet0": f"{LEFT}/24"}
    assert {host["state"] for host in entry["hosts"].values()} == {"on"}


def test_exit_codes_and_words_pass_through_the_shell() -> None:
    assert lab("shell", "left", "--", "exit 7", check=False).returncode == 7
    assert lab("shell", "left", "--", "printf", "%s|", "a b", "$HOME").stdout == "a b|$HOME|"
    assert lab("shell", "--direct", "left", "--", "hostname; exit 3", check=False).returncode == 3


@pytest.mark.parametrize("host", ["left", "right"])
def test_a_host_begins_like_a_fresh_server(host: str) -> None:
    assert on(host, "sysctl -n net.ipv4.ip_forward").strip() == "0"
    assert on(host, "ip route show default") == ""
    for unit in ("nginx", "postgresql", "named", "strongswan"):
        assert on(host, f"systemctl is-active {unit}; systemctl is-enabled {unit}; true").split() == [
            "inactive",
            "disabled",
        ]


@pytest.mark.parametrize("host", ["left", "right"])
def test_a_host_permits_what_the_roles_do(host: str) -> None:
    on(host, "sysctl -w net.ipv4.ip_forward=1")
    rules = "*nat\n:FS - [0:0]\n-A FS -p tcp --dport 80 -m conntrack --ctstate NEW -j DNAT --to-destination 10.2.0.10\n"
    on(host, f"printf '{rules}COMMIT\\n' | iptables-restore --noflush")
    on(host, "iptables -t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu")
    on(host, "iptables -A FORWARD -m policy --dir in --pol ipsec -j ACCEPT")
    on(host, "conntrack -D -p tcp --dport 80; conntrack -L")
    on(host, "cd /root && touch f && setfattr -n user.x -v 1 f && setfacl -m u:nobody:r f && mkfifo p")
    on(host, "apt-get update && apt-get install -y nginx")
    on(host, "sed -i 's/load = no/load = yes/' /etc/strongswan.d/charon/kernel-libipsec.conf")
    on(host, "systemctl enable --now nginx strongswan")
    assert "ipsec0" in on(host, "ip -o link show")
    assert "200 OK" in on(host, "curl -sI http://127.0.0.1/")


@pytest.mark.parametrize("host", ["left", "right"])
def test_the_root_file_system_behaves_like_a_disks(host: str) -> None:
    # Files of the base are below an overlay: that must not show in hard links or file handles.
    on(host, "ln /etc/services /etc/services.link && echo more >> /etc/services.link && cmp /etc/services*")
    script = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "group = libc.fanotify_init(0x200 | 0x400 | 0x800, 0)\n"  # FAN_REPORT_FID, _DIR_FID, _NAME
        "mask = ctypes.c_uint64(0x100)\n"  # FAN_CREATE
        "assert libc.fanotify_mark(group, 0x101, mask, -100, b'/root') == 0, os.strerror(ctypes.get_errno())\n"
        "open('/srv/born', 'w').close()\n"
        "assert b'born' in os.read(group, 4096)\n"
    )
    on(host, f'python3 -c "{script}"')


def test_hosts_meet_only_on_the_networks_under_test() -> None:
    entry = listed(NAME)
    assert entry is not None
    assert not reaches("left", entry["hosts"]["right"]["management"])


def test_a_killed_host_is_silent_and_keeps_its_files() -> None:
    on("right", "echo precious > /srv/file && sync && iptables -A INPUT -p tcp --dport 9 -j DROP")
    boot = on("right", "cat /proc/sys/kernel/random/boot_id")

    lab("kill", "right")

    assert not reaches("left", RIGHT)
    entry = listed(NAME)
    assert entry is not None
    assert entry["hosts"]["right"]["state"] == "off"
    assert lab("shell", "right", "--", "true", check=False).returncode != 0

    lab("start", "right")

    assert on("right", "cat /srv/file") == "precious\n"
    assert on("right", "cat /proc/sys/kernel/random/boot_id") != boot
    assert "--dport 9" not in on("right", "iptables -S")
    assert reaches("left", RIGHT)


def test_a_reboot_keeps_addresses_but_not_rules() -> None:
    on("left", "iptables -A INPUT -p tcp --dport 9 -j DROP")

    lab("reboot", "left")

    assert f"{LEFT}/24" in on("left", "ip -br addr show inet0")
    assert "--dport 9" not in on("left", "iptables -S")
    assert reaches("left", RIGHT)


def test_a_host_that_powers_itself_off_can_be_started() -> None:
    lab("shell", "left", "--", "systemctl poweroff", check=False)
    deadline = time.monotonic() + 60
    while (entry := listed(NAME)) and entry["hosts"]["left"]["state"] == "on":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not reaches("right", LEFT)

    lab("start", "left")

    assert reaches("right", LEFT)


def test_a_cut_outlives_a_restart_and_is_undone_by_restore() -> None:
    lab("cut", "left:inet0")
    try:
        assert not reaches("right", LEFT)
        assert "LOWER_UP" in on("left", "ip -br link show inet0")
        lab("kill", "left")
        lab("start", "left")
        assert not reaches("right", LEFT)
    finally:
        lab("restore", "left:inet0")
    assert reaches("right", LEFT)


def test_an_unplugged_interface_has_no_carrier() -> None:
    lab("cut", "--unplug", "left:inet0")
    try:
        assert "NO-CARRIER" in on("left", "ip -br link show inet0")
    finally:
        lab("restore", "left:inet0")
    assert reaches("right", LEFT)


def test_a_capture_has_all_from_its_start_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "net.pcap"
    lab("capture", "start", str(file))
    on("left", f"ping -c 3 -i 0.1 -W 1 {RIGHT}")
    assert lab("capture", "stop").stdout.split() == [str(file)]

    packets = subprocess.run(
        ["tcpdump", "-Z", "root", "-n", "-r", str(file), "icmp"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(packets) == 6


def test_labs_with_the_same_addresses_live_side_by_side() -> None:
    lab("up", "--topology", "pair", name=TWIN)
    try:
        on("left", "echo twin > /srv/whose", name=TWIN)
        on("left", "echo first > /srv/whose")
        assert on("left", "cat /srv/whose", name=TWIN) == "twin\n"
        lab("kill", "right")
        assert reaches("left", RIGHT, name=TWIN)
        assert not reaches("left", RIGHT)
        again = lab("up", "--topology", "pair", name=TWIN, check=False)
        assert again.returncode == 1
        assert f"down --name {TWIN}" in again.stderr
    finally:
        lab("down", name=TWIN)
        if (entry := listed(NAME)) and entry["hosts"]["right"]["state"] == "off":
            lab("start", "right")
    assert traces(TWIN) == []
    assert reaches("left", RIGHT)


def start_up(name: str) -> subprocess.Popen[bytes]:
    """Begin to make a lab, and return when its hosts are booting."""
    words = [sys.executable, "-u", str(HERE / "lab"), "up", "--name", name, "--topology", "pair"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if b"booting" in line:
            break
    time.sleep(0.2)
    return process


def test_an_interrupted_up_removes_what_it_made() -> None:
    process = start_up(TWIN)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)

    assert process.returncode == 130
    assert traces(TWIN) == []


def test_down_removes_what_a_killed_up_left() -> None:
    process = start_up(TWIN)
    process.kill()
    process.communicate(timeout=60)
    assert traces(TWIN) != []

    lab("down", name=TWIN)

    assert traces(TWIN) == []
    assert "no lab" in lab("down", name=TWIN).stdout


def test_a_failed_up_removes_what_it_made_and_shows_the_console(tmp_path: Path) -> None:
    # The kernel refuses the second of two equal routes: the file is well-formed, the supervisor fails.
    text = (HERE / "topologies" / "pair.yml").read_text(encoding="utf-8")
    text = text.replace("on_link: [", "on_link: [192.0.2.0/24, 192.0.2.0/24, ")
    file = tmp_path / "broken.yml"
    file.write_text(text, encoding="utf-8")

    done = lab("up", "--topology", str(file), name=TWIN, check=False)

    assert done.returncode == 1
    assert "ended instead of booting" in done.stderr
    assert "File exists" in done.stderr
    assert traces(TWIN) == []


def test_down_leaves_nothing() -> None:
    assert traces(NAME) != []
    lab("capture", "start", "/dev/null")

    lab("down")

    assert traces(NAME) == []
    assert listed(NAME) is None
