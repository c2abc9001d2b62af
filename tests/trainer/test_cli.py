"""The command line as people meet it: what it says first, what it refuses and how, what it leaves behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from dying import command
from runs import config, fail, flags, python

import fastlm
from fastlm.backends import native
from fastlm.interop import to_huggingface
from fastlm.models import Transformer
from fastlm.models.presets import preset
from fastlm.trainer import cli


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_said(capsys):
    assert "torch sees no GPU" in fail(capsys, "pretrain", "--device", "cuda")


def test_an_empty_text_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    assert "empty.txt: 1 × no text in it: empty.txt" in fail(capsys, "pretrain", "--data", "empty.txt")
    (tmp_path / "short.txt").write_text("word\n" * 30)
    assert "the train side of the text has" in fail(capsys, "pretrain", "--data", "short.txt")
    (tmp_path / "short.txt").write_text("word\n" * 300)
    short = fail(capsys, "pretrain", "--data", "short.txt", "--context", "100")
    assert "the held-out side of the text has" in short and "give more text or a smaller --context" in short
    assert not (tmp_path / "runs").exists()


def test_commands_that_are_advised_are_quoted(capsys, tmp_path):
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    assert f"already holds a run; `fastlm resume '{folder}'` goes on" in fail(capsys, "pretrain", "--out", str(folder))


def test_an_unknown_backend_is_one_line(capsys, text, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "foo")
    assert "has no backend 'foo'" in fail(capsys, "pretrain", *flags(config(text, tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    assert cli.main(["info"]) == 2 and "no op has a backend 'foo'" in capsys.readouterr().err


@pytest.mark.skipif(
    not native.build_report().get("cpu", {}).get("built"), reason="the C++ extension is not built: pip install ."
)
def test_an_unknown_instruction_set_is_one_line():
    said = python(
        "import sys; from fastlm.trainer.cli import main; sys.exit(main(['info']))",
        env=os.environ | {"FASTLM_ISA": "foo"},
    )
    assert (
        said.returncode == 2
        and said.stderr.startswith("fastlm: FASTLM_ISA: instruction set 'foo'")
        and said.stderr.count("\n") == 1
    )


def test_a_prompt_in_another_encoding_is_refused(capsys, tmp_path):
    prompt = b"caf\xe9".decode("utf-8", "surrogateescape")  # as Python decodes the command line
    assert "--prompt caf? is not UTF-8" in fail(capsys, "sample", str(tmp_path), "--prompt", prompt)


@pytest.mark.parametrize("name", ("config.json", "model.safetensors", "tokenizer.json"))
def test_what_a_sample_cannot_read_is_named(capsys, tmp_path, name):
    to_huggingface(Transformer(preset("llama", vocab_size=300, dim=32, layers=1, heads=2, context=16)), tmp_path)
    assert f"{tmp_path / 'tokenizer.json'} is missing" in fail(capsys, "sample", str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).write_text("{")
    assert f"{tmp_path / name} cannot be read (" in fail(capsys, "sample", str(tmp_path))


def test_a_missing_extra_is_one_line_with_the_command(capsys, monkeypatch):
    real = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name in ("tyro", "numpy") else real(name))
    for argv in (["pretrain"], ["resume", "x"], ["sample", "x"]):
        assert "numpy, tyro, not installed here; cure: pip install 'fastlm[train]'" in fail(capsys, *argv)


# ---------------------------------------------------------------------------------------------------------------------
# First words, help, info


def test_the_first_line_comes_before_torch():
    code = "import sys; sys.modules['torch'] = None; from fastlm.trainer.cli import main; main(['info'])"
    died = python(code)
    assert died.stdout == f"fastlm {fastlm.__version__}\n" and "torch" in died.stderr


@pytest.mark.parametrize(
    "argv", (["--help"], ["pretrain", "--help"], ["resume", "--help"], ["sample", "--help"], ["info", "--help"])
)
def test_help(capsys, argv):
    try:
        assert cli.main(argv) == 0
    except SystemExit as end:
        assert end.code == 0
    assert "usage: fastlm" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"fastlm {fastlm.__version__}\n"


def test_info_says_what_is_forced(capsys, monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "reference")
    assert cli.main(["info"]) == 0
    assert re.search(r"cpu +attention +reference \(forced by FASTLM_BACKEND\)\n", capsys.readouterr().out)


@pytest.mark.skipif(os.name == "nt", reason="pipes end differently on Windows")
@pytest.mark.parametrize("argv", (["info"], ["--help"], ["pretrain", "--help"]), ids=" ".join)
def test_a_reader_that_goes_away_is_no_error(argv):
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([sys.executable, "-m", "fastlm", *argv], stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert ended.returncode == 1 and not ended.stderr


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell closes the stream")
@pytest.mark.parametrize("stream", (">&-", "2>&-"))
def test_a_closed_stream_is_no_error(stream):
    for argv, status in (("--help", 0), ("nonsense", 2)):
        ended = subprocess.run(
            f"{sys.executable} -m fastlm {argv} {stream}", shell=True, capture_output=True, timeout=60
        )
        assert ended.returncode == status and b"Traceback" not in ended.stdout + ended.stderr


def test_no_command_shows_the_usage(capsys):
    assert cli.main([]) == 2 and "pretrain" in capsys.readouterr().out


def test_info_of_presets(capsys):
    """BERT-base has 110,106,428 parameters; training by AdamW keeps four numbers of four bytes for each."""
    assert cli.main(["info", "--presets", "bert-base", "albert"]) == 0
    _, heading, bert, albert = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["preset", "kind", "parameters"] and "adamw" in heading
    assert bert.split()[:3] == ["bert-base", "encoder", "110M"] and "1.76 GB" in bert
    assert albert.startswith("albert ")
    assert cli.main(["info", "--presets", "bret-base"]) == 2
    assert "--presets bret-base is unknown; did you mean bert-base?" in capsys.readouterr().err


def test_info_needs_torch_alone_and_names_every_op():
    extra = ("tokenizers", "safetensors", "tyro", "matplotlib", "transformers")
    hide = f"import sys; [sys.modules.__setitem__(m, None) for m in {extra}]; "
    shown = python(hide + "from fastlm.trainer.cli import main; sys.exit(main(['info']))")
    assert shown.returncode == 0, shown.stderr
    for words in ("torch", "device", "adamw", "attention", "→ reference"):
        assert words in shown.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def start(text: Path, out: Path, **changes) -> subprocess.Popen:
    command = [sys.executable, "-m", "fastlm", "pretrain", *flags(config(text, out, **changes))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM), ids=("ctrl-c", "sigterm"))
def test_a_signal_saves_and_says_how_to_resume(text, tmp_path, number):
    process = start(text, tmp_path / "run", steps=100_000, save_every=1e9)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"loss"' in metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and not err
    assert f"saved; go on with `fastlm resume {tmp_path / 'run'}`" in out
    assert len(list((tmp_path / "run" / "state").glob("step-*"))) == 1


LABELS = ["fastlm", "torch", "data", "threads", "kernels", "memory", "steps", "writes", "done", "wrote", "next"]
NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("this machine has no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from fastlm.trainer.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_it_runs_without_a_network_and_without_a_terminal(text, tmp_path):
    done = python(NO_NETWORK, "pretrain", *flags(config(text, tmp_path / "run")))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    labels = [line.split(" ")[0] for line in done.stdout.splitlines()]
    assert [label for label in labels if label in LABELS] == LABELS
    assert labels.count("sample") == 4
    chosen = [line.split() for line in done.stdout.splitlines() if "← chosen" in line]
    assert [line[0] for line in chosen] == ["adamw"]
    assert re.search(r"^100%  0:00 left  step 12  loss \d", done.stdout, re.MULTILINE)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {
        ".lock", "run.json", "metrics.jsonl", "state", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
        "config.json", "loss.png", "sample.txt", "report.md",
    }  # fmt: skip
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "run" / "report.md").read_text()
    for words in (
        "held-out bits per byte",
        "zlib -9",
        "SHA-256",
        "--vocab 300",
        "| adamw, chosen |",
        torch.__version__,
        "AutoModelForCausalLM.from_pretrained",
    ):
        assert words in report


PLUGIN = """
import torch
from fastlm.optim import OPTIMIZERS
from fastlm.positions import ALiBi
class Mine(ALiBi, name="mine"):
    pass
OPTIMIZERS["nadam"] = torch.optim.NAdam
"""


def test_a_plugin_is_chosen_and_remembered_but_not_imported_unasked(text, tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    mine, folder = ["--plugin", "mine.py"], str(tmp_path / "run")
    asked = [*flags(config(text, tmp_path / "run")), "--position", "mine", "--optimizer", "nadam"]
    begun = command("pretrain", *asked, *mine)
    assert begun.returncode == 0, begun.stderr
    assert f'weights open with fastlm.interop.from_huggingface("{folder}")' in begun.stdout
    (tmp_path / "run" / "report.md").unlink()
    for again in (["resume", folder], ["sample", folder, "--tokens", "3"]):
        refused = command(*again)
        assert refused.returncode == 2 and "mine.py; give it again if you trust that code" in refused.stderr
        done = command(*again, *mine)
        assert done.returncode == 0, done.stderr


def test_on_a_terminal_one_line_is_updated(text, tmp_path):
    pty = pytest.importorskip("pty", reason="pseudo-terminals are not there on this system")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fastlm", "pretrain", *flags(config(text, tmp_path / "run"))]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"}) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
    os.close(ours)
    assert process.returncode == 0 and b"\r100%" in shown and b"\x1b" not in shown
    kept = [line.split("\r")[-1] for line in shown.decode().split("\r\n")]
    assert [step for line in kept for step in re.findall(r"^held out .* step (\d+) ", line)] == [
        "0",
        "3",
        "4",
        "6",
        "8",
        "9",
        "12",
    ]


def test_a_run_can_be_sampled_and_opens_in_transformers(text, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[test]'")
    assert cli.main(["pretrain", *flags(config(text, tmp_path / "run", steps=60, lr=1e-2))]) == 0
    capsys.readouterr()
    texts = set()
    for seed in ("1", "1", "2"):
        assert cli.main(["sample", str(tmp_path / "run"), "--prompt", "Ada", "--tokens", "20", "--seed", seed]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 2 and all(t.startswith("Ada") for t in texts)
    greedy = ["sample", str(tmp_path / "run"), "--prompt", "Ada", "--tokens", "12"]
    for same in (["--temperature", "0"], ["--top-k", "1"], ["--top-p", "1e-9"], ["--temperature", "0", "--seed", "1"]):
        assert cli.main([*greedy, *same]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 3
    assert cli.main([*greedy, "--beams", "3"]) == 0
    assert capsys.readouterr().out.startswith("Ada")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    ids = tokenizer("Ada writes 7 lines of code.\n", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "Ada writes 7 lines of code.\n" and tokenizer.eos_token_id == 1
    from fastlm.interop import from_huggingface

    with torch.no_grad():
        torch.testing.assert_close(from_huggingface(tmp_path / "run")(ids), model(ids).logits, rtol=1e-4, atol=1e-4)
