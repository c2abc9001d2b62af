"""Early stopping (Prechelt 1998): the best held-out loss of a run, and how many evaluations ago it was."""

from dataclasses import asdict, dataclass


@dataclass
class Patience:
    """allowed: evaluations in a row without a better loss that end the run; None to look for none.
    loss, step: of the best evaluation, None before there is one. since: evaluations after it. counted: the step of the
    last one that was counted.
    """

    allowed: int | None
    loss: float | None = None
    step: int | None = None
    since: int = 0
    counted: int | None = None

    @property
    def over(self) -> bool:
        return self.allowed is not None and self.since >= self.allowed

    def better(self, loss: float) -> bool:
        return self.loss is None or loss < self.loss

    def count(self, step: int, loss: float, better: bool) -> None:
        """Take in an evaluation."""
        self.counted, self.since = step, 0 if better else self.since + 1
        if better:
            self.loss, self.step = loss, step

    def state_dict(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name != "allowed"}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)
