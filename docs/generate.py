"""What the site says of fastlm's own lists, made from them while it is built: a hook of mkdocs.

A page holds `<!-- generate: NAME -->` on a line of its own where the text of PARTS[NAME] stands. Pictures are made too.
Nothing of it is written into the checkout.
"""

import inspect
import io
import re
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

import fastlm
from fastlm.models import Transformer
from fastlm.models.presets import FAMILY, PRESETS, preset
from fastlm.objectives import OBJECTIVES, recipe
from fastlm.optim import OPTIMIZERS, memory_table
from fastlm.positions import SCHEMES, Position, make

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"^<!-- generate: ([\w.-]+) -->$", re.MULTILINE)
LENGTH, HEADS = 64, 4  # of the pictures; the width of a head is LENGTH too
FAR = 1000  # tokens, at least as far as a scheme tells distances apart
FACTS = dict(dim=HEADS * LENGTH, heads=HEADS, head_dim=LENGTH, context=LENGTH, causal=False)
ROOMS = ("fastlm", "fastlm.nn", "fastlm.masks", "fastlm.positions", "fastlm.optim", "fastlm.amp", "fastlm.models",
         "fastlm.objectives", "fastlm.interop")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Positional schemes


def new(name: str) -> Position:
    """The scheme with parameters as it draws them, the same at every build."""
    torch.manual_seed(0)
    return make(name, **FACTS)


def code(name: str) -> str:
    """The expression that makes the scheme: its class with the arguments that have no default."""
    required = [p for p in inspect.signature(SCHEMES[name]).parameters.values() if p.default is p.empty]
    given = ", ".join(f"{p.name}={FACTS[p.name]}" for p in required if p.name in FACTS)
    return f"fastlm.positions.{SCHEMES[name].__name__}({given})"


def acts(scheme: Position) -> list[str]:
    """Where the scheme acts and what that takes, a sentence for each of the methods that answer."""
    found, few = [], torch.arange(3)
    if scheme.embeds():
        found.append("adds a vector to each token's embedding, once; attention costs what it does without a scheme")
    if scheme.angles(few.double()) is not None:
        found.append("turns queries and keys, O(L · D) a head; a score costs nothing more")
    if scheme.bias(few) is not None:
        found.append("adds a number to each score, from a table of one row a head and one column a distance")
    rows = scheme.vectors(few)
    met = [what for what, given in (("queries", rows.query_vectors), ("keys", rows.key_vectors)) if given is not None]
    if met:
        shared = scheme.vectors(torch.arange(-FAR, FAR)).buckets is not None
        product = "a product more for each score" + (", on CPUs one for all distances that share it" if shared else "")
        found.append(f"{' and '.join(met)} meet a vector of the distance: {product}")
    if rows.value_vectors is not None:
        found.append("a vector of the distance is added to values")
    return found or ["adds nothing; the causal mask alone tells tokens apart"]


@torch.no_grad()
def added(scheme: Position) -> torch.Tensor:
    """[heads, 2·LENGTH - 1] fp64: what the scheme adds to the score of a query and a key that are all ones, by the
    key's position minus the query's. It is asked of `fastlm.attention`, whatever the scheme does inside.
    """
    ones, values = torch.ones(1, HEADS, LENGTH, LENGTH).double(), torch.eye(LENGTH).double().expand(1, HEADS, -1, -1)
    with fastlm.use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that fp64 is slow, and that a causal scheme sees later keys
        if scheme.vectors(torch.arange(1)).value_vectors is not None:  # the outputs would be more than probabilities
            scheme = without_values(scheme)
        found, lse = fastlm.attention(
            ones, ones, values.contiguous(), position=scheme, scale=LENGTH**-0.5, return_lse=True
        )
    scores = found[0].log() + lse[0].double()[..., None] - LENGTH**0.5
    return torch.cat((scores[:, -1, :-1], scores[:, 0]), -1)  # the last query sees what is before, the first the rest


def without_values(scheme: Position):
    terms = scheme.terms(LENGTH, LENGTH)
    return terms._replace(vectors=terms.vectors._replace(value_vectors=None))


def picture(name: str) -> bytes:
    """An SVG of `added`, a line a head; of a scheme that embeds, the rows that it adds to embeddings."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    scheme, file = new(name), io.BytesIO()
    with plt.rc_context({"svg.hashsalt": name, "font.size": 9}):
        figure, axis = plt.subplots(figsize=(6, 2.2), layout="constrained")
        if scheme.embeds():
            rows = scheme.embed(torch.arange(LENGTH)).detach()
            axis.imshow(rows[:, :LENGTH].T.tolist(), cmap="magma", aspect="auto")
            axis.set(xlabel="position", ylabel="channel")
        else:
            for head, row in enumerate(added(scheme)):
                axis.plot(range(1 - LENGTH, LENGTH), row.tolist(), linewidth=1, label=f"head {head}")
            axis.set(xlabel="key's position - query's", ylabel="added to the score")
            axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
    return file.getvalue()


def entry(name: str) -> str:
    """A scheme's heading, docstring as far as its arguments, picture, code and cost."""
    cls = SCHEMES[name]
    about = inspect.getdoc(cls).split("\n\nArgs:")[0].split("\n\nRaises:")[0]
    costs = "\n".join(f"* {sentence}" for sentence in acts(new(name)))
    return (
        f"## {name}\n\n{about}\n\n![What {name} adds](pictures/{name}.svg)\n\n"
        f"```python\nimport fastlm\n\nscheme = {code(name)}\n```\n\n{costs}\n\n"
        f"On the command line `--position {name}`. Its options: [`{cls.__name__}`][{cls.__module__}.{cls.__name__}].\n"
    )


def schemes() -> str:
    return "\n".join(map(entry, SCHEMES))


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers, models, objectives


def memory(dtype: torch.dtype) -> str:
    with torch.device("meta"):
        model = Transformer(preset("gpt2")).to(dtype)
    return f"```text\n{memory_table(model)}\n```\n"


def optimizers() -> str:
    rows = [f"| [`{name}`][{cls.__module__}.{cls.__name__}] | {first_line(cls)} |" for name, cls in OPTIMIZERS.items()]
    return "\n".join(["| `--optimizer` | |", "|---|---|", *rows, ""])


def presets() -> str:
    lines = ["| preset | family | kind | parameters | position | layers | width | heads | context | learns |"]
    lines.append("|---|---|---|--:|---|--:|--:|--:|--:|---|")
    for name, c in PRESETS.items():
        with torch.device("meta"):
            parameters = Transformer(c).parameter_count()
        size = f"{parameters / 1e6:,.1f} M"
        cells = name, FAMILY[name], c.kind, size, c.position, c.layers, c.dim, c.heads, c.context, recipe(name)[0]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def objectives() -> str:
    rows = [
        f"| [`{name}`][{cls.__module__}.{cls.__name__}] | {cls.kind} | {first_line(cls)} |"
        for name, cls in OBJECTIVES.items()
    ]
    return "\n".join(["| `--objective` | models | what is learned |", "|---|---|---|", *rows, ""])


def first_line(cls: type) -> str:
    return " ".join(inspect.getdoc(cls).split("\n\n")[0].split()).replace("|", "\\|")


# ---------------------------------------------------------------------------------------------------------------------
# Reference


def reference(room: str) -> str:
    """An entry for every public class and function of a room, from its docstring."""
    module = import_module(room)
    found = {name: getattr(module, name) for name in module.__all__} if hasattr(module, "__all__") else own(module)
    entries = [f"::: {thing.__module__}.{thing.__qualname__}" for thing in found.values() if documented(thing)]
    return "\n\n".join(entries) + "\n"


def own(module) -> dict:
    return {
        name: thing
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
    }


def documented(thing) -> bool:
    ours = callable(thing) and getattr(thing, "__module__", "").startswith("fastlm")
    return ours and hasattr(thing, "__qualname__") and bool(thing.__doc__)


PARTS: dict[str, Callable[[], str]] = {
    "schemes": schemes,
    "memory-fp32": lambda: memory(torch.float32),
    "memory-bf16": lambda: memory(torch.bfloat16),
    "optimizers": optimizers,
    "presets": presets,
    "objectives": objectives,
    **{room: lambda room=room: reference(room) for room in ROOMS},
}


def filled(markdown: str) -> str:
    """The page with every part in its place. Raises KeyError for one that PARTS lacks."""
    return MARK.sub(lambda match: PARTS[match[1]](), markdown)


# ---------------------------------------------------------------------------------------------------------------------
# mkdocs calls these by their names


def on_files(files, config):
    from mkdocs.structure.files import File

    drawn = {f"pictures/{name}.svg": picture(name) for name in SCHEMES}
    drawn["pictures/gallery.png"] = (ROOT / "benchmarks/results/gallery.png").read_bytes()
    for path, content in drawn.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    return filled(markdown)
