"""Early stopping: when a run ends, which weights it keeps, and that an interruption does not show."""

import pytest
import torch
from runs import TINY, fail, repeatable, stop_before, train
from safetensors.torch import load_file

import fastlm.interop
from fastlm.trainer import cli
from fastlm.trainer.commands import run
from fastlm.trainer.distributed.ranks import Ranks
from fastlm.trainer.outputs.metrics import Metrics, read_rows
from fastlm.trainer.patience import Patience
from fastlm.trainer.step import Trainer

LOSSES = (5.0, 4.0, 3.0, 3.5, 3.0, 2.0, 2.5, 2.6, 2.1, 1.0, 1.0, 1.0, 1.0)  # at steps 0, 1, 2, …


@pytest.fixture
def losses(monkeypatch):
    """Evaluations find these losses; the weights of each step are kept."""
    seen, evaluate = {}, Trainer.evaluate

    def scripted(trainer: Trainer, windows: int | None = None) -> dict[str, float]:
        seen[trainer.step] = [p.detach().clone() for p in trainer.model.parameters()]
        return evaluate(trainer, windows) | {"loss": LOSSES[trainer.step]}

    monkeypatch.setattr(Trainer, "evaluate", scripted)
    return seen


def looks(folder) -> list[int]:
    return [row["step"] for row in read_rows(folder / "metrics.jsonl") if "held_out_loss" in row]


def test_it_counts_evaluations_since_the_best():
    patience = Patience(2)
    found = []
    for step, loss in enumerate(LOSSES[:8]):
        patience.count(step, loss, patience.better(loss))
        found.append((patience.step, patience.since, patience.over))
    assert found == [
        (0, 0, False), (1, 0, False), (2, 0, False), (2, 1, False), (2, 2, True), (5, 0, False), (5, 1, False),
        (5, 2, True),
    ]  # fmt: skip
    again = Patience(2)
    again.load_state_dict(patience.state_dict())
    assert again == patience and not Patience(None, since=9).over


@pytest.mark.parametrize("patience, ended, best", ((2, 4, 2), (9, 12, 9)))
def test_a_run_ends_when_nothing_was_better(text, tmp_path, losses, capsys, patience, ended, best):
    folder = tmp_path / "run"
    assert train(text, folder, evaluations=12, patience=patience) == 0
    out, report = capsys.readouterr().out, (folder / "report.md").read_text()
    assert sorted(set(looks(folder))) == list(range(ended + 1))
    assert f"── step {ended} ──" in (folder / "sample.txt").read_text()
    assert f"held out {LOSSES[best]:.3f} at step {best}, in best/" in out
    assert f"| best held-out loss | {LOSSES[best]:.4f} at step {best}, in best/ |" in report
    early = f"after step {ended} of 12: no better held-out loss in {patience} evaluations"
    assert (early in out) == (ended < 12) and ("12, ended by --patience |" in report) == (ended < 12)
    for name, step in (("best", best), (".", ended)):
        opened = fastlm.interop.from_huggingface(folder / name)
        torch.testing.assert_close(list(opened.parameters()), losses[step], rtol=0, atol=0)
    assert run.resume(folder) == 0
    said = f"--patience {patience} ended it after step {ended} of 12" if ended < 12 else "all 12 steps are trained"
    assert said in capsys.readouterr().out


def test_the_last_evaluation_is_of_all_windows_wherever_the_run_ends(text, tmp_path, monkeypatch):
    monkeypatch.setattr("fastlm.objectives.Causal.looked_at", 4)
    assert train(text, tmp_path / "run", evaluations=12, patience=2, lr=0.0) == 0
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "held_out_loss" in row]
    assert [(row["step"], row["held_out_windows"]) for row in rows] == [(0, 4), (1, 4), (2, 4), (2, 18)]


@pytest.mark.parametrize("step", (3, 4))
def test_resumed_is_bit_identical(text, tmp_path, losses, monkeypatch, step):
    asked = dict(evaluations=12, patience=3, dropout=0.1)
    assert train(text, tmp_path / "whole", **asked) == 0
    stop_before(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        train(text, tmp_path / "parts", save_every=0.0, **asked)
    assert run.resume(tmp_path / "parts") == 0
    assert repeatable(tmp_path / "parts") == repeatable(tmp_path / "whole")
    best = [load_file(tmp_path / name / "best" / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])


def test_an_evaluation_that_was_written_and_not_counted_is_counted(text, tmp_path, losses, monkeypatch):
    """The disk was full when the best weights were to be written."""
    asked = dict(evaluations=12, patience=3)
    assert train(text, tmp_path / "whole", **asked) == 0
    with monkeypatch.context() as patch:
        write = lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        patch.setattr("fastlm.trainer.outputs.artefacts.write_best", write)
        with pytest.raises(RuntimeError, match="No space left on device"):
            train(text, tmp_path / "parts", **asked)
    assert run.resume(tmp_path / "parts") == 0
    assert repeatable(tmp_path / "parts") == repeatable(tmp_path / "whole")
    assert (tmp_path / "parts" / "best" / "model.safetensors").exists()


def test_the_best_weights_are_sampled_measured_and_begun_with(text, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(text, folder, steps=2, patience=3, preset="gpt") == 0
    for command in ("sample", "evaluate"):
        capsys.readouterr()
        data = ["--data", str(text)] if command == "evaluate" else ["--tokens", "4"]
        assert cli.main([command, str(folder / "best"), *data]) == 0
    assert "result   causal" in capsys.readouterr().out
    assert cli.main(["pretrain", "--from", str(folder / "best"), "--data", str(text), "--steps", "2",
                     "--out", str(tmp_path / "more")]) == 0  # fmt: skip


def decides(rank: int, world: int) -> None:
    """Ranks whose sums differ in their last bit count alike."""
    ranks, patience = Ranks(rank, world), Patience(2, loss=1.0, step=3)
    better = ranks.any(patience.better(1.0 - 1e-16 * rank * 2))
    patience.count(4, 1.0, better)
    assert (patience.step, patience.since) == (4, 0)


@pytest.mark.parametrize("ranks", [2], indirect=True, ids=["2_ranks"])
def test_ranks_decide_together(ranks):
    ranks.run(decides)


def test_it_is_at_least_one_evaluation(capsys):
    assert "--patience is 0; it must be at least 1" in fail(capsys, "pretrain", "--patience", "0")


# ---------------------------------------------------------------------------------------------------------------------
# The share of updates whose gradient was clipped


def test_the_clipped_share_is_counted_and_said(text, tmp_path, capsys):
    assert train(text, tmp_path / "run", clip=1.6) == 0
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    share = sum(row["grad_norm"] > 1.6 for row in rows) / len(rows)
    assert all(row["clipped"] == (row["grad_norm"] > 1.6) for row in rows) and 0 < share < 1
    assert f"clipped {share:.0%}" in capsys.readouterr().out
    assert f"| clipped updates | {share:.1%} |" in (tmp_path / "run" / "report.md").read_text()
    assert Metrics(tmp_path / "run" / "metrics.jsonl", TINY["steps"], writes=False).clipped == share


def test_without_a_bound_nothing_is_clipped(text, tmp_path, capsys):
    assert train(text, tmp_path / "run", clip=0.0) == 0
    assert "clipped" not in (tmp_path / "run" / "report.md").read_text() + capsys.readouterr().out
