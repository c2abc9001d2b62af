"""What a trained model is fine-tuned to do: each task an objective over labelled examples.

    rows.py            which columns of a file make an example, and of which kind
    layout.py          texts → rows of ids
    examples.py        two sides of a task, and what a result on them is compared with
    library.py         a task where none is given: what is code, what a comment, what a docstring
    task.py            Task, what one defines; TASKS, name → class

    classification.py  which of some labels a text, or a pair of texts, has
    regression.py      which number
    spans.py           where in a text the answer to a question stands
    text_to_text.py    which text answers a text

In goes a file of the user's; out comes the objective that `step.Trainer` trains. To add a kind, write a file with a
class, and its columns in rows.py.
"""

from fastlm.trainer.tasks.classification import Classification
from fastlm.trainer.tasks.regression import Regression
from fastlm.trainer.tasks.spans import Spans
from fastlm.trainer.tasks.task import TASKS, Task
from fastlm.trainer.tasks.text_to_text import TextToText

__all__ = ["TASKS", "Classification", "Regression", "Spans", "Task", "TextToText"]
