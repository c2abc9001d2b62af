"""Flags: what is refused, in which words and how soon, what --help says, and what can be chosen."""

import json
import os
import re
from pathlib import Path

import pytest
from runs import config, fail, flags, python

from fastlm.models.presets import PRESETS
from fastlm.positions import SCHEMES
from fastlm.trainer.options import choices
from fastlm.trainer.options.config import Config
from fastlm.trainer.options.flags import parse
from fastlm.trainer.options.flags import shown as flags_of
from fastlm.trainer.words import flag

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("argv, words", [
    (["pretrian"], "did you mean pretrain?"),
    (["pretrain", "--postion", "rope"], "did you mean --position?"),
    (["pretrain", "--weight_decy=1"], "did you mean --weight-decay?"),
    (["pretrain", "--position", "rop"], "did you mean rope?; choose from preset, "),
    (["pretrain", "--preset", "lama"], "did you mean llama?"),
    (["pretrain", "--optimizer", "adafacto"], "did you mean adafactor?"),
    (["pretrain", "--dtype", "fp8"], "choose from fp32, bf16, fp16"),
    (["pretrain", "--steps", "many"], "--steps many is not a whole number"),
    (["pretrain", "--lr", "x"], "--lr x is not a number"),
    (["pretrain", "--seed"], "--seed takes 1 value"),
    (["pretrain", "--betas", "0.9"], "--betas takes 2 values"),
    (["pretrain", "--schedule", "cosin"], "did you mean cosine?"),
    (["pretrain", "--minutes", "5m"], "--minutes 5m is not a number"),
    (["pretrain", "stray"], "pretrain cannot place stray"),
    (["pretrain", "-steps", "5"], "no flag -steps; did you mean --steps?"),
    (["pretrain", "steps=5"], "cannot place steps=5; flags begin with --"),
    (["resume", "x", "--steps", "5"], "resume has no flag --steps; `fastlm resume --help`"),
    (["version"], "did you mean --version?"),
    (["pretrain", "--data"], "--data is given no value"),
    (["pretrain", "--data", ""], "--data is given an empty value"),
    (["pretrain", "--plugin", "--steps", "5"], "--plugin is given no value"),
    (["pretrain", "--steps", "0"], "--steps is 0; it must be at least 1"),
    (["pretrain", "--threads", "100000"], "--threads is 100000; it must be at most"),
    (["pretrain", "--vocab", str(10**11)], "--vocab is 100000000000; it must be at most 4294967296"),
    (["pretrain", "--seed", str(2**63)], "it must be at most 9223372036854775807"),
    (["pretrain", "--plugin", "nowhere.py"], "--plugin nowhere.py cannot be imported"),
    (["pretrain", "--plugin=no_such_module", "--seed", "1"], "No module named 'no_such_module'"),
    (["pretrain", "--minutes", "0"], "--minutes is 0"),
    (["pretrain", "--minutes", "nan"], "--minutes is nan"),
    (["pretrain", "--batch", "-1"], "--batch is -1; it must be at least 1"),
    (["pretrain", "--dim", "0"], "--dim is 0; it must be at least 1"),
    (["pretrain", "--layers", "-2"], "--layers is -2; it must be at least 1"),
    (["pretrain", "--lr", "nan"], "--lr is nan"),
    (["pretrain", "--lr", "inf"], "--lr is inf; it must be a finite number"),
    (["pretrain", "--warmup", "1.5"], "it is a share, from 0 to 1"),
    (["pretrain", "--vocab", "100"], "--vocab is 100; it must be at least 261"),
    (["pretrain", "--betas", "0.9", "1.0"], "betas"),
    (["pretrain", "--dropout", "1"], "--dropout is 1.0; it is a share"),
    (["pretrain", "--heads", "3"], "--dim 128 is no multiple of --heads 3; give --dim 129, or other --heads"),
    (["pretrain", "--dim", "12", "--heads", "4"], "--dim 12 / --heads 4 makes heads 3 wide: change one of"),
    (["pretrain", "--data", "/nowhere/at/all"], "--data /nowhere/at/all does not exist; give a file or a folder"),
    (["pretrain", "--out", str(ROOT)], "is not an empty folder"),
    (["pretrain", "--out", "/dev/null/x"], "--out /dev/null/x cannot be made"),
    (["resume"], "resume needs the run's folder, named before any flag"),
    (["resume", "/nowhere"], "/nowhere does not exist; give the folder of a run"),
    (["resume", "/"], "/ holds no run"),
    (["resume", __file__], "is a file; give the folder of a run"),
    (["sample", "/nowhere"], "/nowhere does not exist; give the folder of a run"),
    (["sample", "/"], "/ holds no trained model (no model.safetensors); `fastlm pretrain` trains one"),
    (["sample", "/nowhere", "--prompt", "\udcff"], "is not UTF-8"),
    (["sample", "/nowhere", "--tokens", "0"], "--tokens is 0; it must be at least 1"),
    (["sample", "/nowhere", "--temperature", "1e-40"], "--temperature is 1e-40"),
    (["sample", "/nowhere", "--temperature", "nan"], "--temperature is nan"),
    (["sample", "/nowhere", "--top-k", "0"], "--top-k is 0; it must be at least 1"),
    (["sample", "/nowhere", "--top-p", "1.5"], "--top-p is 1.5; it is a probability, above 0 and at most 1"),
    (["sample", "/nowhere", "--beams", "0"], "--beams is 0; it must be at least 1"),
    (["sample", "/nowhere", "--seed", "99999999999999999999999"], "--seed is 99999999999999999999999"),
    (["info", "more"], "info takes no arguments"),
])  # fmt: skip
def test_what_cannot_be_done_is_said_in_one_line(capsys, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    assert words in fail(capsys, *argv)
    assert not list(tmp_path.iterdir())


NO_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, *where):
        assert name != "torch", "torch was imported"
sys.meta_path.insert(0, NoTorch())
from fastlm.trainer.cli import main
"""
TYPOS = (
    ["pretrian"], ["pretrain", "--stpes", "5"], ["pretrain", "--position", "ropee"], ["pretrain", "--steps", "0"],
    ["pretrain", "--data", "nowhere"], ["resume", "nowhere"], ["sample", "nowhere"],
)  # fmt: skip


def test_a_typo_does_not_wait_for_torch(tmp_path):
    (tmp_path / "somewhere").mkdir()
    said = python(NO_TORCH + f"for argv in {TYPOS}: main(argv)", cwd=tmp_path)
    refusals = [line for line in said.stderr.splitlines() if line.startswith("fastlm: ")]
    assert said.returncode == 0 and len(refusals) == len(TYPOS), said.stderr
    assert refusals[-1] == "fastlm: nowhere does not exist; did you mean somewhere?"


def test_names_are_read_without_importing():
    code = "from fastlm.trainer.options.choices import *; import json; "
    code += "print(json.dumps({f: choices(f) for f in REGISTRIES}))"
    read = python(NO_TORCH + code)
    assert read.returncode == 0, read.stderr
    for name, names in json.loads(read.stdout).items():
        assert sorted(names) == sorted(choices.choices(name))


def test_help_says_what_every_flag_is_unless_given():
    """And does not wait for torch either."""
    shown = python(NO_TORCH + "main(['pretrain', '--help'])", env=os.environ | {"COLUMNS": "200", "PYTHONUTF8": "1"})
    rows = dict(re.findall(r"^│ --([a-z-]+) (.*?\(default: [^)]+\))", shown.stdout, re.DOTALL | re.MULTILINE))
    assert set(rows) == {flag(name).removeprefix("--") for name in flags_of(Config)}, shown.stderr
    assert not any("None" in row for row in rows.values())
    for name in ("context", "dim", "layers", "heads", "dropout"):
        assert f"(default: the preset's; {getattr(PRESETS['llama'], name)} for llama)" in rows[name]


def test_lists_may_be_given_in_parts():
    parsed = parse(
        Config, "pretrain", ["--data", "a", "b", "--steps", "3", "--data=c", "--plugin", "x", "--plugin", "y"]
    )
    assert parsed.data == (Path("a"), Path("b"), Path("c")) and parsed.plugin == ("x", "y") and parsed.steps == 3


def test_every_flag_is_a_field_and_every_choice_is_known():
    Config().check()
    assert set(flags(config(Path("x"), Path("y")))) >= {"--vocab", "--data", "--out"}
    parsed = parse(Config, "pretrain", flags(config(Path("x"), Path("y"), lr=0.5, betas=(0.8, 0.9))))
    assert parsed == config(Path("x"), Path("y"), lr=0.5, betas=(0.8, 0.9))
    assert Config.from_json(json.loads(json.dumps(parsed.to_json()))) == parsed
    for name in SCHEMES:
        assert parse(Config, "pretrain", ["--position", name]).position == name
