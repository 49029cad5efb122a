"""Base trees: one read-only Debian root per release, built once and kept in the user's cache.

A base stands for a freshly installed server: SSH runs, nothing else does. What the roles would `apt-get install` is
there too, because the hosts have no way out to a mirror, but stopped and disabled, as if it were not installed yet.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .proc import LabError, locked, run, tail

RELEASES = ("bookworm", "trixie")
DEFAULT_MIRROR = "http://deb.debian.org/debian"

# What a server has before anybody deploys anything to it.
SYSTEM = """
systemd systemd-sysv dbus udev openssh-server python3 python3-apt sudo ca-certificates
iproute2 procps psmisc e2fsprogs iputils-ping netcat-openbsd curl tcpdump less kmod
"""

# What roles and tests install on it: present, but never started or enabled by the base.
OFFLINE = """
python3-venv python3-cryptography python3-psycopg2 iptables nftables conntrack
strongswan-swanctl charon-systemd libcharon-extra-plugins libstrongswan-standard-plugins
libstrongswan-extra-plugins nginx postgresql bind9 bind9-dnsutils
rsync attr acl openssl socat iperf3 strace zstd xz-utils
"""

_builders: set[subprocess.Popen[str]] = set()

# Stage 1 and 2 are separated because every unit that stage 2 enables gets disabled again.
_PREPARE = r"""
cat > /etc/dpkg/dpkg.cfg.d/lab <<END
force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/man/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/lintian/*
END
printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
apt-get -q update
"""

_INSTALL = "apt-get -q -y --no-install-recommends install {packages}\n"

_ENABLED = "find /etc/systemd/system -path '*.wants/*' -o -path '*.requires/*' | sort > /tmp/{name}\n"

_FINISH = r"""
# systemctl is given unit names: a .wants link's name is one.
comm -13 /tmp/before /tmp/after | sed 's,.*/,,' | sort -u | while read -r unit; do
    systemctl --root=/ disable "$unit" || rm -f /etc/systemd/system/*.wants/"$unit"
done
for unit in systemd-networkd.service systemd-networkd.socket ssh.socket getty@.service; do
    systemctl --root=/ disable "$unit" || true
done
# No host here has a screen, a disk of its own, or a mirror; periodic jobs would only disturb measurements.
for unit in console-getty.service getty.target systemd-firstboot.service systemd-networkd-wait-online.service \
    apt-daily.timer apt-daily-upgrade.timer man-db.timer dpkg-db-backup.timer fstrim.timer e2scrub_all.timer \
    e2scrub_reap.service sshd-keygen.service systemd-udev-trigger.service systemd-udevd.service; do
    ln -sf /dev/null /etc/systemd/system/"$unit"
done
systemctl --root=/ enable ssh.service
cat > /etc/ssh/sshd_config.d/lab.conf <<END
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
UseDNS no
MaxStartups 100
MaxSessions 100
END
mkdir -p /var/log/journal
apt-get -q clean
# No source at all, rather than unreachable ones: `apt-get update` then succeeds, so `update_cache` in a role does too.
rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/* /etc/apt/apt.conf.d/00lab /var/lib/apt/lists/*
rm -f /usr/sbin/policy-rc.d /etc/ssh/ssh_host_* /etc/machine-id /var/lib/dbus/machine-id /tmp/before /tmp/after
rm -rf /usr/share/man/* /usr/share/info/* /usr/share/locale/* /usr/share/lintian/* /var/cache/debconf/*-old
find /usr/share/doc -mindepth 1 ! -type d ! -name copyright -delete
find /var/log -type f -delete
: > /etc/resolv.conf
nginx -V 2>&1 | grep -q http_dav_module
"""


def _recipe() -> str:
    return "set -eu\nexport DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8\n" + "".join(
        (
            _PREPARE,
            _INSTALL.format(packages=" ".join(SYSTEM.split())),
            _ENABLED.format(name="before"),
            _INSTALL.format(packages=" ".join(OFFLINE.split())),
            _ENABLED.format(name="after"),
            _FINISH,
        )
    )


def cache_root() -> Path:
    """The directory that holds the base trees; FARSHORE_CACHE moves it."""
    root = os.environ.get("FARSHORE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "farshore") / "base"


def base_path(release: str) -> Path:
    """Where the tree for `release` is, or will be: its name changes with packages and recipe."""
    digest = hashlib.sha256(_recipe().encode()).hexdigest()[:12]
    return cache_root() / f"{release}-{digest}"


def mirror() -> str:
    """The Debian mirror this machine itself uses; FARSHORE_DEBIAN_MIRROR overrides it."""
    if override := os.environ.get("FARSHORE_DEBIAN_MIRROR"):
        return override
    etc = Path("/etc/apt")
    files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*.list"))]
    files += sorted((etc / "sources.list.d").glob("*.sources"))
    for file in files:
        if not file.is_file():
            continue
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            # Both formats: "deb [options] URI suite component" and "URIs: URI ...".
            found = re.match(r"(?:deb\s+(?:\[[^]]*\]\s+)?|URIs:\s*)(https?://\S+?/debian)/?(?:\s|$)", line)
            if found:
                return found[1]
    return DEFAULT_MIRROR


def ensure(releases: Iterable[str], say: Callable[[str], None]) -> dict[str, Path]:
    """Build what is missing, in parallel, and return each release's tree."""
    wanted = sorted(set(releases))
    for release in wanted:
        if release not in RELEASES:
            raise LabError(f"release {release!r}: the lab knows {', '.join(RELEASES)}")
    with ThreadPoolExecutor(max_workers=len(RELEASES)) as pool:
        try:
            return dict(zip(wanted, pool.map(lambda name: _ensure_one(name, say), wanted), strict=True))
        except BaseException:
            # Leaving the pool waits for its threads: an interrupt, or a failure of one, must not wait for a build.
            for builder in tuple(_builders):
                builder.kill()
            raise


def _ensure_one(release: str, say: Callable[[str], None]) -> Path:
    path = base_path(release)
    if path.is_dir():
        return path
    with locked(path.with_suffix(".lock"), f"the base {path.name}", timeout=1500):
        if path.is_dir():  # the one who held the lock has built it
            return path
        started = time.monotonic()
        say(f"building base {path.name} from {mirror()} (a few minutes, once)")
        _build(release, path)
        say(f"built base {path.name} in {time.monotonic() - started:.0f} s")
    return path


def _build(release: str, path: Path) -> None:
    # A fixed name under the lock: what a killed builder left is found, and removed, by the next one.
    partial = path.with_name(f".{path.name}.partial")
    log = path.with_suffix(".log")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    settings = _apt_settings()
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    if proxy := re.search(r'^Acquire::http::Proxy "([^"]+)";', settings, re.MULTILINE):
        environment.setdefault("http_proxy", proxy[1])
    script = f"""
        set -eu
        debootstrap --variant=minbase --include=ca-certificates {release} "$1" {mirror()}
        cat > "$1/etc/apt/apt.conf.d/00lab"
        mount -t proc proc "$1/proc"
        mount --rbind /dev "$1/dev"
        exec chroot "$1" /bin/sh -c "$2"
    """
    # Namespaces of its own, and death with the builder's: whatever ends the builder also ends what it started and
    # unmounts what it mounted, so that nobody writes any more when the next builder clears up.
    argv = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"]
    argv += ["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script, "build", str(partial), _recipe()]
    try:
        with log.open("w", encoding="utf-8") as output:
            builder = subprocess.Popen(
                argv, stdin=subprocess.PIPE, text=True, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
            _builders.add(builder)
            try:
                builder.communicate(settings, timeout=1200)
            finally:
                _builders.discard(builder)
                builder.kill()
                builder.wait()
        if builder.returncode != 0:
            raise LabError(f"building the base {path.name} failed: {log} ends with\n{tail(log)}")
        partial.rename(path)
    except subprocess.TimeoutExpired as error:
        raise LabError(f"building the base {path.name} has not ended: {log} ends with\n{tail(log)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _apt_settings() -> str:
    """This machine's proxy and date settings for apt, to be used while the tree is built."""
    dump = run(["apt-config", "dump"]).stdout
    return "".join(
        line + "\n"
        for line in dump.splitlines()
        if re.match(r'Acquire::(https?::Proxy|Check-Valid-Until|Check-Date)\S* ".+";', line)
    )
