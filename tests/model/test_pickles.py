"""Pickles are read as data: what wants to run code is refused, a trainer's leavings are not looked at."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from batchsd.model.pickles import read_pickle
from batchsd.model.weights import read_state
from batchsd.types import UsageError


class Harmful:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.file),)


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "more": Harmful(tmp_path / "made")}, tmp_path / "a.ckpt")
    with pytest.raises(UsageError, match=r"a.ckpt: refused, this pickle wants to run code \(\w+\.mkdir\)") as error:
        read_pickle(tmp_path / "a.ckpt")
    assert "\n" not in str(error.value) and not (tmp_path / "made").exists()


def test_a_trainers_objects_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("pytorch_lightning.callbacks")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, module.__name__, module)
        callback = module.ModelCheckpoint()
        callback.best = 3
        torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": {"c": callback}}, tmp_path / "a.ckpt")
    assert read_pickle(tmp_path / "a.ckpt")["a"].tolist() == [1, 1]


def test_the_older_format(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert read_state(tmp_path / "a.pt")["a"].tolist() == [1, 1]


def test_broken_files_are_one_clear_line(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2000)}, tmp_path / "whole.ckpt")
    save_file({"a": torch.ones(2000)}, tmp_path / "whole.safetensors")
    for suffix in ("ckpt", "safetensors"):
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(content[: len(content) // 2])
    (tmp_path / "page.safetensors").write_text("<!doctype html><title>Not found</title>" * 9)
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    (tmp_path / "page.ckpt").write_text("<!doctype html>")
    torch.save([1], tmp_path / "list.ckpt")
    for name, message in {
        "cut.safetensors": "is the download complete?", "page.safetensors": "it is a text file",
        "pointer.safetensors": "git lfs pull", "cut.ckpt": "not readable as weights",
        "page.ckpt": "not readable as weights", "list.ckpt": "holds a list, not weights by name",
    }.items():  # fmt: skip
        with pytest.raises(UsageError) as error:
            read_state(tmp_path / name)
        assert name in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
