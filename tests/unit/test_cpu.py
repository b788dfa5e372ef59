"""What /proc/cpuinfo says of the CPU."""

from __future__ import annotations

from pathlib import Path

from hybrid_k2.host.cpu import cpu_model


def test_the_name_of_the_cpu_is_read_where_there_is_one(tmp_path: Path) -> None:
    file = tmp_path / "proc" / "cpuinfo"
    file.parent.mkdir()
    assert cpu_model(tmp_path) == ""
    file.write_text("processor\t: 0\nmodel name\t: A CPU: fast\nmodel name\t: A CPU: fast\n")
    assert cpu_model(tmp_path) == "A CPU: fast"
    file.write_text("processor\t: 0\n")
    assert cpu_model(tmp_path) == ""
