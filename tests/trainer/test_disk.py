"""Files are whole or not there."""

import os

import pytest

from fastlm.trainer import disk


def test_write_file_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    disk.write_file(path, "old")
    monkeypatch.setattr(disk, "flush", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        disk.write_file(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
