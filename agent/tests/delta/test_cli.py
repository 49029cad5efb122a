"""``farshore delta``, from the arguments to the files."""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from farshore.cli import delta as cli
from farshore.delta import DeltaCorrupt, DeltaFileError, Signature, SignatureCorrupt
from farshore.errors import UsageError


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(dest="command", required=True))
    parsed = parser.parse_args(["delta", *map(str, arguments)])
    result = parsed.func(parsed)
    assert isinstance(result, int)
    return result


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rng = random.Random(1)
    old = rng.randbytes(200_000)
    (tmp_path / "old").write_bytes(old)
    (tmp_path / "new").write_bytes(old[:70_000] + b"inserted" + old[70_000:])
    return tmp_path


def prepare(files: Path) -> None:
    assert run("signature", files / "old", files / "sig") == 0
    assert run("encode", files / "sig", files / "new", files / "delta") == 0


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_three_steps_give_the_new_file(files: Path) -> None:
    prepare(files)
    assert run("apply", files / "old", files / "delta", files / "out") == 0
    assert (files / "out").read_bytes() == (files / "new").read_bytes()
    assert (files / "delta").stat().st_size < 10_000
    assert names(files) == ["delta", "new", "old", "out", "sig"]
    mask = os.umask(0)
    os.umask(mask)
    assert (files / "out").stat().st_mode & 0o777 == 0o666 & ~mask


def test_the_old_file_can_be_replaced_in_place(files: Path) -> None:
    prepare(files)
    (files / "old").chmod(0o640)
    (files / "link").symlink_to("old")
    run("apply", files / "old", files / "delta", files / "link")
    assert (files / "link").is_symlink()
    assert (files / "old").read_bytes() == (files / "new").read_bytes()
    assert (files / "old").stat().st_mode & 0o777 == 0o640


def test_stats_are_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("signature", "--block-size", 2048, "--stats", files / "old", files / "sig")
    shown = json.loads(capsys.readouterr().out)
    assert shown["command"] == "signature"
    assert shown["block_size"] == 2048
    assert shown["blocks"] == 98
    assert shown["signature_bytes"] == (files / "sig").stat().st_size
    run("encode", "--stats", files / "sig", files / "new", files / "delta")
    shown = json.loads(capsys.readouterr().out)
    assert shown["literal_bytes"] + shown["copied_bytes"] == shown["new_bytes"] == 200_008
    assert shown["delta_bytes"] == (files / "delta").stat().st_size
    run("apply", "--stats", files / "old", files / "delta", files / "out")
    applied = json.loads(capsys.readouterr().out)
    assert applied["digest"] == shown["digest"]
    assert applied["seconds"] >= 0


def test_a_failed_apply_leaves_the_old_out(files: Path) -> None:
    prepare(files)
    (files / "out").write_bytes(b"precious")
    damaged = bytearray((files / "delta").read_bytes())
    damaged[-1] ^= 1
    (files / "delta").write_bytes(damaged)
    before = names(files)
    with pytest.raises(DeltaCorrupt):
        run("apply", files / "old", files / "delta", files / "out")
    assert (files / "out").read_bytes() == b"precious"
    assert names(files) == before


def test_errors_name_the_file(files: Path) -> None:
    with pytest.raises(DeltaFileError, match=r"absent: No such file"):
        run("signature", files / "absent", files / "sig")
    with pytest.raises(DeltaFileError, match=r"No such file"):
        run("signature", files / "old", files / "absent" / "sig")
    with pytest.raises(DeltaFileError, match=r"Is a directory"):
        run("signature", files / "old", files)
    with pytest.raises(SignatureCorrupt):
        run("encode", files / "old", files / "new", files / "delta")
    with pytest.raises(UsageError, match="--block-size 5"):
        run("signature", "--block-size", 5, files / "old", files / "sig")
    with pytest.raises(UsageError, match=r"--block-size 3000: .* powers of two from 1024 to 1048576"):
        run("signature", "--block-size", 3000, files / "old", files / "sig")
    with pytest.raises(UsageError, match="BASE"):
        run("apply", "-", files / "delta", files / "out")
    with pytest.raises(UsageError, match="stdin"):
        run("encode", "-", "-", files / "out")
    assert names(files) == ["new", "old"]


def test_dash_is_stdin_and_stdout(files: Path) -> None:
    code = (
        "import argparse, sys; from farshore.cli import delta;"
        "p = argparse.ArgumentParser(); delta.add_parser(p.add_subparsers());"
        "a = p.parse_args(); sys.exit(a.func(a))"
    )

    def pipe(*arguments: object, data: bytes) -> tuple[bytes, bytes]:
        done = subprocess.run(
            [sys.executable, "-c", code, "delta", *map(str, arguments)],
            input=data,
            capture_output=True,
            check=True,
        )
        return done.stdout, done.stderr

    old, new = (files / "old").read_bytes(), (files / "new").read_bytes()
    signature, said = pipe("signature", "--stats", "-", "-", data=old)
    assert json.loads(said)["blocks"] == 49
    assert Signature.from_bytes(signature).length == len(old)
    (files / "sig").write_bytes(signature)
    delta, _ = pipe("encode", files / "sig", "-", "-", data=new)
    out, _ = pipe("apply", files / "old", "-", "-", data=delta)
    assert out == new


def test_devices_are_written_and_not_replaced(files: Path) -> None:
    run("signature", files / "old", "/dev/null")
    assert not Path("/dev/null").is_file()


def test_the_command_line_does_not_load_numba() -> None:
    code = "import sys, farshore.cli.delta, io;sys.exit('numba' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_that_shrinks_meanwhile_does_no_harm(files: Path) -> None:
    from farshore.delta import Encoder, apply_bytes, sign

    data = (files / "old").read_bytes() * 60
    path = files / "large"
    path.write_bytes(data)
    base = sign(io.BytesIO(data))
    with path.open("r+b", buffering=0) as file:
        stream = Encoder(base).encode(file)
        delta = b""
        for number, chunk in enumerate(stream):
            delta += chunk
            if number == 0:
                os.truncate(path, 5_000_000)
        delta_content = apply_bytes(data, delta)
    assert data.startswith(delta_content)
